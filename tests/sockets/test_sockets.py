"""Methods in one file each, fedray's and a user's own: on actors, killed and resumed, with a client that fails."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import AnySize, fit, renew, sha, train, trained
from scipy.optimize import minimize

import fedray
from fedray import menus
from fedray.cli import main
from fedray.cluster.pool import RayPool
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.blocks import Pace
from fedray.federation.fit import prepare
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.record.run import Run
from fedray.reports import page

EXAMPLES = Path(__file__).parent / "examples"
DYN, EXP, SIGNS, GEOMETRIC = (str(EXAMPLES / f"{name}.py") for name in ("dyn", "exp", "signs", "geometric"))
SETTINGS = {
    # Of a user's own
    "dyn": {"algorithm": f"{DYN}:FedDyn:0.3"},
    "exp": {"algorithm": f"{EXP}:FedExP:epsilon=1e-6"},
    "signs": {"wire": f"{SIGNS}:Signs"},
    "geometric median": {"fold": f"{GEOMETRIC}:GeometricMedian"},
    "exp, top-k, bfloat16": {"algorithm": f"{EXP}:FedExP", "wire": "feedback:topk:0.25,bfloat16"},
    "average of dyn, top-k": {"algorithm": f"ema:0.9:{DYN}:FedDyn:0.3", "wire": "feedback:topk:0.5"},
    # fedray's
    "fedavgm": {"algorithm": "fedavgm:0.9:0.5"},
    "fedavgm, median": {"algorithm": "fedavgm", "fold": "median", "malicious": "0.67:labelflip"},
    "fedadagrad, uniform": {"algorithm": "fedadagrad", "weights": "uniform", "partition": "dirichlet:0.3"},
    "average of fedadam": {"algorithm": "ema:0.999:fedadam:0.01"},
    "fedyogi, float16": {"algorithm": "fedyogi:0.05:tau=0.01", "wire": "float16"},
    "fedprox": {"algorithm": "fedprox:0.3"},
    "fedprox-adaptive": {"algorithm": "fedprox-adaptive:mu=0.2:patience=1"},
    "scaffold": {"algorithm": "scaffold", "optimizer": "sgd"},
    "scaffold, gradients": {"algorithm": "scaffold:1", "optimizer": "sgd"},
    "average of scaffold, top-k": {
        "algorithm": "ema:0.9:scaffold", "wire": "feedback:topk:0.5", "optimizer": "sgd",
    },
    "fednova, unequal": {"algorithm": "fednova", "optimizer": "sgd:momentum=0.5", "partition": "dirichlet:0.3"},
    "trimmed, int8": {"fold": "trimmed:0.34", "wire": "int8", "malicious": "0.34:signflip"},
    "krum, random-k": {"fold": "krum:0", "wire": "randk:0.5", "malicious": "0.34:noise:2", "wire_down": "bfloat16"},
    "multikrum, feedback": {"fold": "multikrum:0:2", "wire": "feedback:randk:0.5:false", "wire_down": "int8"},
    "bounded norms": {"fold": "normbound:0.05", "malicious": "0.34:signflip:3"},
    "feedback, int8": {"wire": "feedback:int8:norm=l2", "wire_down": "float32"},
    "fedex, float16": {"adapters": True, "algorithm": "fedex", "wire": "float16"},
    "rolora, kept optimizers": {"adapters": True, "algorithm": "rolora", "keep_optimizer": True},
    "average of rolora, float16": {"adapters": True, "algorithm": "ema:0.9:rolora", "wire": "float16"},
    "partial": {"layers": 3, "share": "^(0|2)", "keep_optimizer": True},
    "partial scaffold, top-k": {
        "layers": 3, "keep_local": "^1", "algorithm": "scaffold", "wire": "feedback:topk:0.25",
        "optimizer": "sgd",
    },
    "raflora, unequal ranks, float16": {
        "adapters": True, "ranks": (1, 3, 2), "algorithm": "raflora", "wire": "float16",
    },
    "ditto, sparse": {"algorithm": "ema:0.9:ditto:0.5", "wire": "feedback:topk:0.25", "keep_optimizer": True},
    "flora, warm": {"adapters": True, "algorithm": "flora:warm=true"},
    "flora, factors": {"adapters": True, "ranks": (1,), "algorithm": "flora", "fraction": 0.34, "failing": (5,)},
    "svd, float16": {"adapters": True, "algorithm": "svd", "wire": "float16"},
    "ffa, kept optimizers": {"adapters": True, "algorithm": "ffa", "keep_optimizer": True},
    "split, int8, kept optimizers": {
        "layers": 3, "algorithm": "split:^0", "wire": "int8", "keep_optimizer": True, "partition": "dirichlet:0.3",
    },
    "fixed": {"cohort": "fixed:0.67", "fraction": 1.0, "algorithm": "fedavg", "fold": "mean"},
    "poisson": {"cohort": "poisson:0.5", "fraction": 1.0},
    "dropout": {"dropout_rate": 0.3, "fraction": 1.0},
    "secure sums": {"fold": "secure:0.5", "algorithm": "scaffold", "optimizer": "sgd"},
    "secure sums, noise": {"fold": "secure:0.5:bits=24:limit=1", "wire": "clip:0.3,noise:0.5"},
    "adaptive clip, secure sums": {"wire": "clip:0.3:quantile=0.5:count_noise=2,noise:0.5", "fold": "secure:0.5"},
    "noise": {"wire": "clip:0.3,noise:0.5"},
    "poisson, average of momentum, noise by layers": {
        "cohort": "poisson:0.5", "fraction": 1.0, "algorithm": "ema:0.9:fedavgm:0.1",
        "wire": "clip:0.3:per_layer=true,noise:0.5",
    },
}  # fmt: skip


@pytest.fixture(params=SETTINGS, ids=lambda name: name.replace(", ", "-"))
def config(request, toy_config):
    """Six clients, of whom two thirds take part in a round, and one fails whenever it does."""
    toy = {"labels": 6, "failing": (2,)}
    toy |= {"fraction": 0.67, "rounds": 4, "learning_rate": 0.05, "evaluate_samples": 0}
    return toy_config(**toy | SETTINGS[request.param])


@pytest.mark.parametrize(
    ("setting", "menu"),
    {
        "algorithm": menus.ALGORITHMS, "fold": menus.FOLDS, "wire": menus.LINKS, "cohort": menus.COHORTS,
        "malicious": menus.ATTACKS,
    }.items(),
)  # fmt: skip
def test_everything_in_a_menu_is_tried_here(setting, menu):
    forms = [settings.get(setting, "") for settings in SETTINGS.values()]
    elsewhere = {"dpsgd"}  # needs a loss that calls its network once: test_private_examples.py
    assert set(menu.classes) - elsewhere <= {name for form in forms for name in re.split("[:,]", form)}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_a_file_of_at_most_forty_lines(path):
    assert len(path.read_text().splitlines()) <= 40


def test_stopped_after_any_round_and_resumed_is_undisturbed(config, tmp_path):
    rows = train(config, tmp_path / "whole")
    assert any(client["outcome"] != "ok" for row in rows for client in row["clients"])
    for stop in (1, 3):
        out = tmp_path / f"stopped-{stop}"
        train(config, out, rounds=stop)
        train(config, out, resume=True)
        assert sha(out) == sha(tmp_path / "whole")
        assert [row["loss"] for row in Run.open(out).rows] == [row["loss"] for row in rows]


def test_a_round_that_is_done_again_reads_the_memories_from_before_it(config, tmp_path, monkeypatch):
    """Killed between the last client's memory and the checkpoint: what was remembered belongs to no complete round."""
    train(config, tmp_path / "whole")
    right, calls = Run.complete, []

    def complete(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        right(*arguments)

    with monkeypatch.context() as context:
        context.setattr(Run, "complete", complete)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed")
    train(config, tmp_path / "killed", resume=True)
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole")


class Shuffled(LocalPool):
    """A pool whose replies come in any order."""

    def __init__(self, config, rng):
        super().__init__(config)
        self.rng = rng

    def map(self, work, shared, jobs, progress):
        replies = list(super().map(work, shared, jobs, progress))
        yield from self.rng.sample(replies, len(replies))


def test_the_same_in_random_blocks_that_come_in_any_order(config):
    """States and memories."""
    plan = make_plan(config)
    expected = trained(config, plan, LocalPool(config), Pace(), 2)
    for seed in range(3):
        rng = random.Random(seed)
        assert trained(config, plan, Shuffled(config, rng), AnySize(rng), 2) == expected


@pytest.fixture(scope="module")
def pool(ray):
    """Two actors for all of these runs."""
    pool = RayPool.start(Config(local_steps=1, actors=2))
    yield pool
    pool.close()


@pytest.mark.slow
def test_the_same_on_two_actors_and_after_a_stop_on_one(config, tmp_path, pool):
    train(config, tmp_path / "here")
    renew(pool, config)
    for row in fit(config, pool, tmp_path / "stopped"):
        if row["round"] == 2:
            break
    list(fit(config, pool.apart()[1], tmp_path / "stopped", resume=True))
    assert sha(tmp_path / "stopped") == sha(tmp_path / "here")


# What they make, against numbers obtained another way


def test_dyns_servers_state_is_the_mean_of_the_clients(toy_config, tmp_path):
    """h = (1/N) Σ g_i, also where clients fail, are not asked, and after a stop."""
    config = toy_config(
        labels=6, failing=(2,), fraction=0.67, rounds=5, learning_rate=0.05, algorithm=f"{DYN}:FedDyn:0.3"
    )
    train(config, tmp_path / "run", rounds=3)
    train(config, tmp_path / "run", resume=True)
    run = Run.open(tmp_path / "run")
    state = run.state(prepare(config, Run(tmp_path / "x")).layout)
    own = [
        run.recall(client, run.generation(client, 5)).get("algorithm/gradient", torch.zeros(16)) for client in range(6)
    ]
    assert sum(bool(gradient.any()) for gradient in own) >= 4
    torch.testing.assert_close(state.tensors["h"], torch.stack(own).mean(0), rtol=1e-5, atol=1e-6)


def test_exp_steps_as_far_as_its_clients_disagree(toy_config, tmp_path):
    """Against float64, from what each client makes alone."""
    config = toy_config(rounds=1, algorithm=f"{EXP}:FedExP:1e-6")
    train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "x"))
    changes = []
    for client in range(4):
        train(replace(config, algorithm="fedavg", only_client=client), tmp_path / f"alone-{client}")
        alone = Run.open(tmp_path / f"alone-{client}").state(plan.layout).tensors["model"]
        changes.append((alone - plan.initial).double().numpy())
    mean = np.mean(changes, axis=0)
    step = max(1.0, sum(np.sum(np.square(change)) for change in changes) / (2 * 4 * (np.sum(mean**2) + 1e-6)))
    found = Run.open(tmp_path / "run").state(plan.layout).tensors["model"]
    np.testing.assert_allclose(found.numpy(), plan.initial.numpy() + step * mean, rtol=1e-5, atol=1e-6)


def test_what_is_sent_and_what_is_kept_make_the_change(toy_config, tmp_path):
    """Σ sent + residual = Σ changes; and its bytes are those of the bits and their scale."""
    config = toy_config(clients=1, labels=1, rounds=1, wire=f"{SIGNS}:Signs")
    (row,) = train(config, tmp_path / "signs")
    train(replace(config, wire="float32"), tmp_path / "whole")
    plan = prepare(config, Run(tmp_path / "x"))
    run = Run.open(tmp_path / "signs")
    signs, whole = (Run.open(tmp_path / name).state(plan.layout).tensors["model"] for name in ("signs", "whole"))
    residual = run.recall(0, 1)["link0.signs/residual"]
    assert len((signs - plan.initial).abs().unique()) <= 3  # one magnitude, rounded with the model
    assert torch.allclose(signs - plan.initial + residual, whole - plan.initial, atol=1e-6)
    assert row["bytes_up"] == 16 / 8 + 4
    assert row["bytes_down"] == 16 * 4


def test_a_geometric_median_is_the_point_nearest_to_all(toy_config, tmp_path):
    config = toy_config(labels=5, rounds=1, fold=f"{GEOMETRIC}:GeometricMedian")
    train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "x"))
    models = []
    for client in range(5):
        train(replace(config, fold="mean", only_client=client), tmp_path / f"alone-{client}")
        models.append(Run.open(tmp_path / f"alone-{client}").state(plan.layout).tensors["model"].double().numpy())
    found = Run.open(tmp_path / "run").state(plan.layout).tensors["model"].numpy()

    def distances(point):
        return np.linalg.norm(models - point, axis=1).sum()

    least = minimize(distances, np.median(models, axis=0), tol=1e-12).fun
    assert least <= distances(found) * (1 + 1e-6) <= least * (1 + 1e-4) < distances(np.mean(models, axis=0))


# On the command line


DIGITS = "--rounds 3 --local-steps 2 --evaluate-samples 0 --actors 0 --no-use-ema --no-keep-optimizer"


# Of what needs no method, in a process that loads none.
WITHOUT = """
import sys
from fedray import own
from fedray.cli import main

assert main("train --resume killed".split()) == 2
print("refused", file=sys.stderr)
assert main("sample whole --num-images 4 --sampling-steps 2 --out s.png".split()) == 0
assert main("evaluate whole --samples 16 --sampling-steps 2 --kid-subset-size 8".split()) == 0
assert main("report whole".split()) == 0
assert own.loaded() == []
"""


@pytest.mark.slow
def test_a_run_of_ones_own_methods_from_the_command_line(tmp_path, monkeypatch):
    """Trained, killed, resumed, sampled, evaluated and reported on; the file is named again where it has to run."""
    monkeypatch.chdir(tmp_path)
    command = ["train", *DIGITS.split(), "--algorithm", f"{DYN}:FedDyn:0.01", "--wire", f"{SIGNS}:Signs", "--out"]
    assert main([*command, "whole"]) == 0
    killed = [sys.executable, "-m", "fedray", *command, "killed"]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed/checkpoints/round-000001.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    without = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert without.returncode == 0, without.stderr
    refused, _, _ = without.stderr.rpartition("refused\n")
    assert any(f"name the file again (--code {file})" in refused for file in (DYN, SIGNS))
    assert "Warning" not in refused
    assert main(["train", "--resume", "killed", "--code", DYN, SIGNS]) == 0
    assert sha(tmp_path / "killed") == sha(tmp_path / "whole")


def test_a_file_that_a_run_names_does_not_run_by_itself(toy_config, tmp_path):
    """Somebody else's run directory may name any file."""
    marker, evil = tmp_path / "ran", tmp_path / "evil.py"
    evil.write_text(
        "from dataclasses import dataclass\nfrom pathlib import Path\nfrom fedray import Algorithm\n"
        f"Path({str(marker)!r}).write_text('')\n@dataclass(frozen=True)\nclass Evil(Algorithm):\n    pass\n"
    )
    values = Config(local_epochs=1, algorithm=f"{evil}:Evil").to_json()
    marker.unlink()
    import fedray.own

    fedray.own._modules.clear()
    config = Config.from_json(values)
    assert not marker.exists()
    with pytest.raises(UserError, match=r"if you trust it, name the file again \(--code .*evil.py\)"):
        prepare(config, Run(tmp_path / "run"))
    assert not marker.exists()
    assert Config.from_json(values, {evil.resolve()}).to_json() == values
    assert marker.exists()


@pytest.mark.slow
def test_all_of_them_in_one_report(toy_config, tmp_path):
    for number, settings in enumerate(SETTINGS.values()):
        toy = {"labels": 6, "rounds": 2, "fraction": 0.67, "learning_rate": 0.05, "evaluate_samples": 4}
        train(toy_config(**toy | settings), tmp_path / f"run-{number}")
    page.write([tmp_path], tmp_path / "report.html")
    text, rounds = (tmp_path / "report.html").read_text(), fedray.load(tmp_path).rounds
    for setting in ("algorithm", "fold", "wire"):
        forms = {settings[setting] for settings in SETTINGS.values() if setting in settings}
        assert {form.split(":")[0] for form in forms} <= {str(form).split(":")[0] for form in rounds[setting]}
    assert len(set(rounds["run"])) == len(SETTINGS)
    assert all(f"run-{number}" in text for number in range(len(SETTINGS)))
