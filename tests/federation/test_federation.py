"""The round, the run and its directory, in one process."""

import json
import threading
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import toy
from diffusers.training_utils import EMAModel
from runs import fit, sha, train, whole_round
from safetensors.torch import load_file

from fedray.algorithms import Algorithm
from fedray.algorithms.folds import Collect
from fedray.cli import main
from fedray.config import Config
from fedray.data.partition import Dirichlet, Partition, Shards
from fedray.errors import RunError, UserError
from fedray.federation import fit as whole_run
from fedray.federation.fit import prepare
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import disk_needed, make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session
from fedray.federation.worker import Shared, Worker
from fedray.presets import PRESETS
from fedray.record import pictures
from fedray.record import run as record_run
from fedray.record.checkpoint import State
from fedray.record.pictures import grid
from fedray.record.run import Run
from fedray.wire.float16 import Float16


def stored_model(out, rounds):
    return load_file(out / f"checkpoints/round-{rounds:06d}.safetensors")["model"]


def train_one(worker, plan, client):
    """What a client makes of the initial model in the first round."""
    down = Shared({"model": plan.initial.numpy()}, plan.round(worker.config, 0))
    _, trained = client_update(worker, down, TrainJob(0, client, plan.shards[client], plan.held_out[client]))
    return trained.payload["model"].copy()


def test_a_round_is_the_weighted_mean_of_what_clients_train(toy_config, tmp_path):
    """One round of four clients against four separate local trainings, averaged in float64."""
    config = toy_config(rounds=1, partition=Dirichlet(0.5))
    train(config, tmp_path / "run")
    plan = make_plan(config)
    trained = []
    for client in range(4):
        worker = Worker(config, torch.device("cpu"), "test")
        trained.append(train_one(worker, plan, client).astype(np.float64))
    expected = np.average(trained, axis=0, weights=plan.shards.sizes)
    weights = stored_model(tmp_path / "run", 1)
    assert len(set(plan.shards.sizes.tolist())) > 1
    assert np.abs(weights.numpy() - expected).max() < 1e-6


def test_rows_say_what_happened(toy_config, tmp_path):
    config = toy_config(rounds=2, clients=3, fraction=0.7, labels=3, each=4)
    rows = train(config, tmp_path / "run")
    assert Run.open(tmp_path / "run").rows == rows
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert len(row["cohort"]) == 2
        assert row["examples"] == 8
        assert row["steps"] == 2 * 2 * 2  # clients × epochs × ⌈4 / 3⌉
        assert row["images"] == 16
        assert row["bytes_down"] == row["bytes_up"] == 2 * 16 * 4
        assert row["loss"] == pytest.approx(np.mean([client["loss"] for client in row["clients"]]))
        assert [client["client"] for client in row["clients"]] == row["cohort"]
        for client in row["clients"]:
            assert client["outcome"] == "ok"
            assert client["actor"] == "local"
            assert client["seconds"] > 0
    result = Run.open(tmp_path / "run").result
    assert result["steps"] == 16
    assert result["sequential_steps"] == 8
    assert result["passes"] == pytest.approx(32 / 12)


def test_the_run_directory_is_whole(toy_config, tmp_path):
    train(toy_config(), tmp_path / "run")
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (events,) = {name for name in names if name.startswith("tensorboard/events.out.tfevents")}
    names.remove(events)
    assert names == {
        "config.json", "rounds.jsonl", "result.json", "checkpoints/round-000003.safetensors",
        "samples/round-000003.png", "samples.png", "model/network.pt", "model/README.md", "partition.csv",
        "partition.png", ".lock",
    }  # fmt: skip
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["config"]["partition"] == "by-label"
    assert saved["config"]["task"]["name"] == "toy"
    assert {"fedray", "torch", "diffusers", "ray", "numpy", "python"} <= set(saved["versions"])
    assert "git_commit" in saved


def test_the_model_is_what_was_trained(toy_config, tmp_path):
    for use_ema in (False, True):
        out = tmp_path / f"ema-{use_ema}"
        train(toy_config(use_ema=use_ema), out)
        stored = load_file(out / "checkpoints/round-000003.safetensors")
        saved = torch.load(out / "model/network.pt")
        assert torch.equal(saved["weight"], stored["ema/model" if use_ema else "model"][None])


def test_server_ema_decays_per_local_step(toy_config, tmp_path):
    """A round of n steps (the example-weighted mean) is as n steps of diffusers' EMAModel at the same weights."""
    config = toy_config(use_ema=True, ema_max_decay=0.8, partition=Dirichlet(0.5))
    plan = make_plan(config)
    steps = round(np.average([config.steps(size) for size in plan.shards.sizes], weights=plan.shards.sizes))
    weights = torch.nn.Parameter(plan.initial.double())
    ema = EMAModel([weights], decay=0.8, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for row in fit(config, LocalPool(config), tmp_path / "run"):
        stored = load_file(tmp_path / f"run/checkpoints/round-{row['round']:06d}.safetensors")
        weights.data.copy_(stored["model"])
        for _ in range(steps):
            ema.step([weights])
    expected = ema.shadow_params[0]
    assert torch.allclose(stored["ema/model"].double(), expected, atol=1e-6)
    assert not torch.allclose(stored["ema/model"], stored["model"], atol=1e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"keep_optimizer": True, "fraction": 0.5}, {"wire": "float16", "use_ema": True}]
)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_and_resumed_is_the_same_run(toy_config, tmp_path, changes, stop):
    config = toy_config(lr_scheduler="linear", **changes)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", rounds=stop)
    train(config, tmp_path / "run", resume=True)
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    rows = Run.open(tmp_path / "run").rows
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert (tmp_path / "run/samples.png").read_bytes() == (tmp_path / "whole/samples.png").read_bytes()
    assert train(config, tmp_path / "run", resume=True) == []  # complete: nothing to do


@pytest.mark.parametrize("where", ["append", "complete", "draw", "_finish"])
def test_killed_in_the_middle_of_writing_and_resumed(toy_config, tmp_path, monkeypatch, where):
    """Killed in the second round, just before it is saved, after it is saved, or at the very end."""
    config = toy_config(keep_optimizer=True)
    train(config, tmp_path / "whole")
    owner = {"_finish": whole_run, "draw": pictures}.get(where, Run)
    right, calls = getattr(owner, where), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == (2 if where in ("append", "complete") else 1):
            if where == "append":  # a line cut short
                with open(tmp_path / "run/rounds.jsonl", "a") as file:
                    file.write('{"round": 2, "coh')
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(owner, where, killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert Run.open(tmp_path / "run").result is None
    train(config, tmp_path / "run", resume=True)
    assert sha(tmp_path / "run") == sha(tmp_path / "whole")
    assert [row["round"] for row in Run.open(tmp_path / "run").rows] == [1, 2, 3]


def test_kept_optimizers_change_the_run_and_keep_one_file_a_client(toy_config, tmp_path):
    train(toy_config(), tmp_path / "fresh")
    train(toy_config(keep_optimizer=True), tmp_path / "kept")
    assert sha(tmp_path / "fresh") != sha(tmp_path / "kept")
    kept = sorted(path.relative_to(tmp_path / "kept/clients") for path in (tmp_path / "kept").glob("clients/*/*"))
    assert [str(path) for path in kept] == [f"{client:06d}/000003.safetensors" for client in range(4)]
    assert load_file(tmp_path / "kept/clients/000000/000003.safetensors")["optimizer/step"] == 3 * 2 * 3


def test_a_failed_client_is_left_out_with_its_reason(toy_config, tmp_path):
    config = toy_config(failing=(0,), infinite=(2,))
    rows = train(config, tmp_path / "run")
    outcomes = [client["outcome"] for client in rows[0]["clients"]]
    assert outcomes[0] == "ValueError: this client's camera is broken"
    assert "FloatingPointError: the trained weights are not finite" in outcomes[2]
    assert outcomes[1] == outcomes[3] == "ok"
    assert rows[0]["examples"] == 16
    assert rows[0]["bytes_down"] == 2 * rows[0]["bytes_up"]


def test_the_others_are_averaged_as_if_the_failed_were_not_there(toy_config, tmp_path):
    config = toy_config(rounds=1, failing=(0,), infinite=(2,))
    train(config, tmp_path / "run")
    plan = make_plan(config)
    worker = Worker(config, torch.device("cpu"), "test")
    trained = [train_one(worker, plan, client) for client in (1, 3)]
    weights = stored_model(tmp_path / "run", 1)
    assert np.abs(weights.numpy() - np.mean(trained, axis=0, dtype=np.float64)).max() < 1e-6


def test_no_usable_client_ends_the_run_and_it_can_be_resumed(toy_config, tmp_path):
    config = toy_config(failing=(0, 1, 2, 3))
    with pytest.raises(RunError, match="no client returned a model. Client 0: ValueError: .* broken") as caught:
        train(config, tmp_path / "run")
    assert "Traceback" in caught.value.__notes__[0]
    assert Run.open(tmp_path / "run").rows == []
    mended = replace(config, task=replace(config.task, failing=()))
    with pytest.raises(UserError, match="--task is .* resumed run keeps its settings"):
        train(mended, tmp_path / "run", resume=True)


def test_a_gpu_that_is_too_small_is_named(toy_config, tmp_path, capsys):
    """torch's own error, raised by a toy: a client is left out for it, and if none is left it is the user's mistake."""
    row = train(toy_config(hungry=(0,), rounds=1), tmp_path / "one")[0]
    assert row["examples"] == 24
    assert row["clients"][0]["outcome"].startswith("UserError: client 0 in round 1 needs more GPU memory")
    flags = f"--task {toy.__file__}:Toy --hungry 0 1 2 3 --clients 4 --partition by-label --rounds 1 --actors 0"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "all")]) == 2
    said = capsys.readouterr().err
    assert "client 0 in round 1 needs more GPU memory than it may have (--gpus-per-actor 0): lower" in said
    assert "Traceback" not in said


def test_float16_overflow_is_a_failure_of_the_client(toy_config, tmp_path):
    config = toy_config(wire=(Float16(),), learning_rate=1e9, max_grad_norm=None)
    with pytest.raises(RunError, match="OverflowError: the update has values beyond float16"):
        train(config, tmp_path / "run")


def test_a_resumed_run_keeps_its_settings_but_not_its_placement(toy_config, tmp_path):
    config = toy_config()
    train(config, tmp_path / "run", rounds=1)
    for changes, message in [
        ({"seed": 5}, "--seed is 5 now, but was 0"),
        ({"learning_rate": 1.0}, "--learning-rate is 1.0 now"),
        ({"partition": Dirichlet(1.0)}, "--partition is dirichlet:1 now, but was by-label"),
        ({"cpus_per_actor": 2.0}, "computes with 2 threads"),
    ]:
        with pytest.raises(UserError, match=message):
            train(replace(config, **changes), tmp_path / "run", resume=True)
    train(replace(config, cpus_per_actor=0.5, client_timeout=10.0), tmp_path / "run", resume=True)
    assert Run.open(tmp_path / "run").result["rounds"] == 3


def test_two_processes_cannot_write_one_run(toy_config, tmp_path, monkeypatch):
    config = toy_config()
    writing = fit(config, LocalPool(config), tmp_path / "run")
    next(writing)
    monkeypatch.setattr(record_run, "PATIENCE", 0.2)
    with pytest.raises(UserError, match="being written by another process"):
        train(config, tmp_path / "run", resume=True)
    # One that is about to end is waited for.
    monkeypatch.setattr(record_run, "PATIENCE", 30.0)
    threading.Timer(0.5, writing.close).start()
    train(config, tmp_path / "run", resume=True)


def test_bad_settings_leave_nothing_behind(toy_config, tmp_path):
    for changes, message in [
        ({"clients": 33}, "--clients 33: there are only 32 examples"),
        ({"rounds": 0}, "--rounds 0"),
        ({"local_epochs": -1}, "--local-epochs -1"),
        ({"local_epochs": None}, "neither"),
        ({"local_steps": 3}, "both given"),
        ({"train_batch_size": 0}, "--train-batch-size 0"),
        ({"fraction": 0.0}, "--fraction 0"),
        ({"fraction": 1.01}, "--fraction 1.01"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"lr_scheduler": "cosin"}, "did you mean 'cosine'"),
        ({"features": "digit"}, "did you mean 'digits'"),
        ({"evaluate_samples": -1}, "--evaluate-samples -1"),
        ({"ema_max_decay": 1.0}, "--ema-max-decay 1.0"),
        ({"gpus_per_actor": 1.5}, "--gpus-per-actor 1.5"),
    ]:
        config = replace(toy_config(), **changes)
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "run") if not changes.get("gpus_per_actor") else config.check()
    assert list(tmp_path.iterdir()) == []


def test_another_run_in_the_directory_is_not_touched(toy_config, tmp_path):
    config = toy_config()
    train(config, tmp_path / "run")
    before = sha(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        train(replace(config, seed=1), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="not an empty directory"):
        train(config, tmp_path / "full")
    assert sha(tmp_path / "run") == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_kept_optimizers_that_do_not_fit_the_disk_are_refused(toy_config, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    # 16 float32 numbers: two checkpoints, a model; two such vectors for 4 clients and twice a cohort of 4.
    message = r"needs about 1.7 kB on the disk of .*\(checkpoints 0.1 kB, clients' memories 1.5 kB, model 0.1 kB\)"
    with pytest.raises(UserError, match=message):
        train(toy_config(keep_optimizer=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1728))
    with pytest.raises(RunError, match="checkpoint of round 1 needs 1.0 MB .* and 1.7 kB are free"):
        train(toy_config(keep_optimizer=True), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("changes", "memories", "state"),
    [
        ({"algorithm": "scaffold", "optimizer": "sgd"}, 1, 2),
        ({"wire": "feedback:topk:0.5"}, 1, 1),
        ({"algorithm": "scaffold", "optimizer": "sgd", "wire": "feedback:topk:0.5"}, 2, 2),
        ({"algorithm": "ditto:0.5"}, 1, 1),
        ({"layers": 2, "share": "^0"}, 1, 1),
    ],
)
def test_memories_that_do_not_fit_the_disk_are_refused_with_their_size(
    toy_config, tmp_path, monkeypatch, changes, memories, state
):
    """Vectors of 16 float32 numbers: for each of 4 clients, and twice for a cohort of 4; of the server, twice."""
    import shutil

    usage, config, vector = shutil.disk_usage(tmp_path), toy_config(evaluate_samples=0, **changes), 64
    model = vector * changes.get("layers", 1)
    needed = memories * vector * (4 + 2 * 4) + 2 * state * vector + model
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match=rf"needs about .* clients' memories {memories * vector * 12 / 1000:.1f} kB"):
        prepare(config, Run(tmp_path / "run"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    prepare(config, Run(tmp_path / "run"))


def test_memories_of_methods_and_links_are_expected_on_the_disk(toy_config):
    config = toy_config(optimizer="sgd", algorithm="scaffold", wire="feedback:topk:0.5")
    # A control variate and a residual for 4 clients and twice the cohort, 16 float32 numbers each.
    assert disk_needed(config, make_plan(config))["clients' memories"] == 2 * 64 * (4 + 2 * 4)
    kept = toy_config(keep_samples=True, evaluate_every=2, evaluate_samples=5)
    assert disk_needed(kept, make_plan(kept))["samples"] == 2 * 5 * 4  # after rounds 2 and 3, of 1 x 2 x 2 pixels


def test_configurations_survive_json():
    for config in PRESETS.values():
        config = replace(config, partition=Dirichlet(0.25), wire=(Float16(),))
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_configurations_of_others_are_refused_by_name():
    saved = PRESETS["digits"].to_json()
    with pytest.raises(UserError, match="another version of fedray: it has a setting 'momentum'"):
        Config.from_json(saved | {"momentum": 1})
    with pytest.raises(UserError, match="the task 'toy' of this run is not fedray's own"):
        Config.from_json(saved | {"task": {"name": "toy"}})


def test_a_users_own_algorithm_fold_and_partition_are_objects(toy_config, tmp_path):
    @dataclass(frozen=True)
    class Counting(Algorithm):
        by: int = 1

        def init(self, model, layout):
            return {"model": model, "counted": torch.zeros(1)}

        def aggregate(self, server, folded, round):
            return super().aggregate(server, folded, round) | {"counted": server["counted"] + self.by}

    @dataclass(frozen=True)
    class FirstOnly(Collect):
        def combine(self, tensors):
            return tensors[0]

    @dataclass(frozen=True)
    class Halves(Partition):
        def split(self, dataset, clients, rng):
            return Shards(np.arange(len(dataset)), np.linspace(0, len(dataset), clients + 1).astype(int))

    config = toy_config(algorithm=Counting(by=2), fold=FirstOnly(), partition=Halves())
    rows = train(config, tmp_path / "run", rounds=2)
    assert len(rows[0]["clients"]) == 4
    train(config, tmp_path / "run", resume=True)
    stored = load_file(tmp_path / "run/checkpoints/round-000003.safetensors")
    assert stored["model"].mean() < 0.6  # label 0's
    assert stored["counted"].tolist() == [6]
    with pytest.raises(UserError, match="--algorithm is .*by=3.* now, but was .*by=2"):
        train(replace(config, algorithm=Counting(by=3)), tmp_path / "run", resume=True)


def test_a_round_done_again_is_the_same_round(toy_config, tmp_path):
    """Clients read what they kept before the round, and not what they wrote when it was done the first time."""
    config = toy_config(keep_optimizer=True, rounds=3)
    plan, run, pool = make_plan(config), Run(tmp_path / "run"), LocalPool(config)
    run.create(config, plan.data, {})
    session = Session(config, plan, pool, run)
    state = State(0, config.method.init(plan.initial, plan.layout))
    for _ in range(2):
        before = state
        state, row = whole_round(session, before)
        again, _ = whole_round(session, before)
        assert torch.equal(again.tensors["model"], state.tensors["model"])
        assert [run.generation(client, state.round) for client in range(4)] == [state.round] * 4
        run.complete(state, [row], plan.layout, 1)
    assert load_file(tmp_path / "run/clients/000000/000002.safetensors")["optimizer/step"] == 2 * 2 * 3


def test_memories_are_generations(toy_config, tmp_path):
    run = Run(tmp_path)
    assert run.generation(5, 10) is None
    assert run.recall(5, None) == {}
    for generation in (1, 4):
        run.remember(5, generation, {"algorithm/control": torch.tensor([float(generation)])})
    assert [run.generation(5, rounds) for rounds in range(6)] == [None, 1, 1, 1, 4, 4]
    assert run.recall(5, 1)["algorithm/control"].tolist() == [1]
    (tmp_path / "clients/000005/000004.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="000004.safetensors is damaged"):
        run.recall(5, 4)


def test_lost_rows_are_noticed(toy_config, tmp_path):
    config = toy_config()
    train(config, tmp_path / "run", rounds=3)
    rounds = tmp_path / "run/rounds.jsonl"
    rounds.write_text("".join(rounds.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="does not have a row for each of the 3 complete rounds"):
        train(config, tmp_path / "run", resume=True)


def test_damaged_files_are_named(toy_config, tmp_path):
    train(toy_config(), tmp_path / "run")
    (tmp_path / "run/result.json").write_text("{")
    with pytest.raises(UserError, match="result.json is damaged at line 1"):
        Run.open(tmp_path / "run").result  # noqa: B018
    with pytest.raises(UserError, match="it has no config.json"):
        Run.open(tmp_path)


def test_grids_are_enlarged_with_gaps():
    images = torch.zeros((10, 1, 8, 8), dtype=torch.uint8)
    images[0] = 255
    picture = np.asarray(grid(images))
    assert picture.shape == (2 * 52 + 4, 8 * 52 + 4, 3)  # 48 pixels a tile and 4 between
    assert (picture[4:52, 4:52] == 255).all()
    assert (picture[:, :4] == 96).all()
    assert (picture[4:52, 56:104] == 0).all()


def flaky(monkeypatch, times):
    """Client 0's training fails so many times, and works then."""
    import toy

    right, failed = toy.ToyLearner.loss, []

    def loss(learner, batch, rng):
        if 0 in batch["labels"].tolist() and len(failed) < times:
            failed.append(1)
            raise RuntimeError("the network was away")
        return right(learner, batch, rng)

    monkeypatch.setattr(toy.ToyLearner, "loss", loss)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_client_that_fails_is_done_again_as_often_as_asked(toy_config, tmp_path, monkeypatch, times):
    train(toy_config(rounds=1, keep_optimizer=True), tmp_path / "quiet")
    flaky(monkeypatch, times)
    (row,) = train(toy_config(rounds=1, keep_optimizer=True, client_retries=2), tmp_path / "run")
    lost = [(loss["clients"], loss["reason"], loss["actor"]) for loss in row["lost"]]
    assert lost == [([0], "RuntimeError: the network was away", False)] * min(times, 2)
    vain = [loss["seconds"] for loss in row["lost"]] + [row["clients"][0]["seconds"]] * (times == 3)
    assert min(vain) > 0
    assert row["ledger"] == {
        "dropped": 0, "asked": 4, "folded": 3 + (times < 3), "retried": 1, "failed": int(times == 3), "actors_lost": 0,
        "nodes_lost": 0,        "seconds_lost": pytest.approx(sum(vain)),
    }  # fmt: skip
    assert row["clients"][0]["outcome"] == ("ok" if times < 3 else "RuntimeError: the network was away")
    assert (sha(tmp_path / "run") == sha(tmp_path / "quiet")) == (times < 3)


def test_too_few_clients_stop_the_run_which_can_be_resumed_with_fewer(toy_config, tmp_path):
    config = toy_config(failing=(0, 2), min_clients=3)
    message = "round 1: 2 of 4 clients returned a model, fewer than --min-clients 3. Client 0: ValueError"
    with pytest.raises(RunError, match=message):
        train(config, tmp_path / "run")
    assert not Run.open(tmp_path / "run").rows
    assert len(train(replace(config, min_clients=2), tmp_path / "run", resume=True)) == 3
    with pytest.raises(UserError, match="--min-clients 5: only 4 take part"):
        toy_config(min_clients=5).check()


def test_a_flipped_bit_anywhere_is_found(toy_config, tmp_path):
    """In a checkpoint and in a client's memory; what is read is what was written, or a sentence names the file."""
    config = toy_config(keep_optimizer=True, rounds=2, evaluate_samples=0)
    train(config, tmp_path / "run", rounds=1)
    run, layout = Run.open(tmp_path / "run"), make_plan(config).layout
    for path, read in (
        (run.checkpoint(), lambda: run.state(layout)),
        (run.directory / "clients/000000/000001.safetensors", lambda: run.recall(0, 1)),
    ):
        right = path.read_bytes()
        for place in np.linspace(0, len(right) - 1, 60).astype(int):
            path.write_bytes(right[:place] + bytes([right[place] ^ 4]) + right[place + 1 :])
            with pytest.raises(UserError, match="is damaged|is of another model"):
                read()
            path.write_bytes(right[:place])
            with pytest.raises(UserError, match="is damaged"):
                read()
        path.write_bytes(right)
        read()


def test_a_long_exception_is_cut(toy_config, tmp_path, monkeypatch):
    import toy

    def loss(learner, batch, rng):
        raise ValueError("x" * 5_000_000)

    monkeypatch.setattr(toy.ToyLearner, "loss", loss)
    with pytest.raises(RunError, match=r"x … \(5,000,012 characters\)") as failed:
        train(toy_config(), tmp_path / "run")
    assert len(str(failed.value)) < 1200


def test_a_full_disk_is_told_in_a_sentence_and_the_run_goes_on_later(toy_config, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    train(toy_config(), tmp_path / "quiet")
    train(toy_config(), tmp_path / "run", rounds=1)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as context:
        context.setattr("safetensors.torch.save_file", full)
        with pytest.raises(RunError, match="round-00000[23].safetensors cannot be written: I/O error: No space left"):
            train(toy_config(), tmp_path / "run", resume=True)
    train(toy_config(), tmp_path / "run", resume=True)
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")


@pytest.mark.parametrize("setting", [{"adam_epsilon": -1.0}, {"train_batch_size": 10**30}])
def test_settings_that_every_client_would_fail_at(toy_config, setting):
    with pytest.raises(UserError, match="--(adam-epsilon|train-batch-size)"):
        toy_config(**setting).check()


@dataclass(frozen=True)
class Shouting(Algorithm):
    """Client 1 sends what the sum cannot hold, in the model or beside it."""

    where: str = "model"
    value: float = 1024.0

    def init(self, model, layout):
        return {"model": model, "control": torch.zeros(3)}

    def upload(self, local, down, memory):
        tensors = {"model": local.weights.clone(), "control": torch.ones(3)}
        if local.client == 1:
            tensors[self.where][0] = self.value
        return tensors, {}, {"seen": memory.get("seen", torch.zeros(1)) + 1}


@pytest.mark.parametrize("where", ["model", "control"])
@pytest.mark.parametrize(("value", "reach"), [(1024.0, "below 1024"), (float("nan"), "not finite"), (1023.9, None)])
def test_what_a_sum_cannot_hold_is_that_clients_failure(toy_config, tmp_path, where, value, reach):
    rows = train(toy_config(algorithm=Shouting(where, value), rounds=2, evaluate_samples=0), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    for row in rows:
        outcomes = [client["outcome"] for client in row["clients"]]
        assert outcomes[0] == outcomes[2] == outcomes[3] == "ok"
        assert outcomes[1] == "ok" if reach is None else reach in outcomes[1]
    seen = [run.recall(client, run.generation(client, 2)).get("algorithm/seen") for client in range(4)]
    assert [None if each is None else each.item() for each in seen] == [2, 2 if reach is None else None, 2, 2]


def test_the_ledger_says_what_was_lost(toy_config, tmp_path):
    """Two blocks of round 2 are lost with their processes, and with a node."""
    config = toy_config(evaluate_samples=0)
    train(config, tmp_path / "quiet")

    class Losing(LocalPool):
        nodes = frozenset({"a", "b"})
        lost = ()

        def map(self, work, shared, jobs, progress):
            for reply in super().map(work, shared, jobs, progress):
                first = reply.job.jobs[0].client
                gone = shared.about.number == 1 and first not in self.lost and len(self.lost) < 2
                if gone:
                    self.lost = (*self.lost, first)
                    time.sleep(0.2)
                    self.nodes = frozenset({"a"})
                yield replace(reply, lost="it fell over") if gone else reply

    rows = train(config, tmp_path / "run", pool=Losing(config))
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")
    lost = {name: [row["ledger"][name] for row in rows] for name in rows[0]["ledger"]}
    again = {client for loss in rows[1]["lost"] for client in loss["clients"]}
    assert len(again) >= 2
    seconds = lost.pop("seconds_lost")
    assert lost == {
        "dropped": [0, 0, 0], "asked": [4, 4, 4], "folded": [4, 4, 4],
        "failed": [0, 0, 0], "retried": [0, len(again), 0],
        "actors_lost": [0, 2, 0], "nodes_lost": [0, 1, 0],
    }  # fmt: skip
    assert seconds[0] == seconds[2] == 0
    assert seconds[1] >= 2 * 0.2
