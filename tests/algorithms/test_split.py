"""The split exchange of FedDiffuse: which part a client sends, and means over those that sent it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import sha, train

from fedray.algorithms.split import Split
from fedray.data.partition import IID
from fedray.errors import UserError
from fedray.federation.fit import prepare
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import bytes_planned, make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.traffic import bytes_up_in_all
from fedray.federation.worker import Shared
from fedray.presets import PRESETS
from fedray.record.checkpoint import load_state
from fedray.record.run import Run
from fedray.seeds import generator

# Of three layers of 16 weights the first is the encoder: 64 bytes, and 128 of the rest.
SPLIT = {"layers": 3, "labels": 6, "algorithm": "split:^0", "evaluate_samples": 0, "learning_rate": 0.05}


def model(out, plan):
    return Run.open(out).state(plan.layout).tensors["model"].double().numpy()


def trained(config, plan):
    """What each client makes of the initial model, whole."""
    config = replace(config, algorithm="fedavg", wire=(), fold="mean", malicious=None)
    worker, down = LocalPool(config).worker, Shared({"model": plan.initial.numpy()}, plan.round(config, 0))
    ends = []
    for client in range(config.clients):
        _, sent = client_update(worker, down, TrainJob(0, client, plan.shards[client], plan.held_out[client]))
        ends.append(sent.payload["model"].astype(float))
    return np.array(ends)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("wire", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 0.02)])
def test_each_part_is_the_mean_of_those_that_sent_it(toy_config, tmp_path, wire, tolerance, seed):
    """Against each client alone; by unequal examples."""
    config = toy_config(**SPLIT, seed=seed, partition="quantity:1", rounds=1, wire=wire)
    (row,) = train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "none"))
    found, expected = model(tmp_path / "run", plan), plan.initial.double().numpy().copy()
    ends = trained(config, plan)
    draws = [torch.rand((), generator=generator(seed, "split", client, 0)).item() < 0.5 for client in range(6)]
    for part, first in ((slice(0, 16), True), (slice(16, 48), False)):
        senders = [client for client in range(6) if draws[client] == first]
        if senders:
            expected[part] = np.average(ends[senders, part], axis=0, weights=plan.shards.sizes[senders])
    np.testing.assert_allclose(found, expected, atol=tolerance)
    sizes = {"float32": (64, 128), "float16": (32, 64), "int8": (16 + 4, 32 + 4)}[wire]
    assert [client["bytes_up"] for client in row["clients"]] == [sizes[0] if first else sizes[1] for first in draws]
    assert {client["bytes_down"] for client in row["clients"]} == {sum(sizes)}
    assert bytes_planned(config, plan) == (sum(sizes), sum(sizes), sizes[0] if draws[0] else sizes[1])


def test_what_nobody_sent_stays_to_the_bit(toy_config, tmp_path):
    config = toy_config(**SPLIT | {"labels": 1}, partition=IID(), rounds=4, checkpoints_total_limit=9)
    rows = train(config, tmp_path / "run")
    plan, before = make_plan(config), make_plan(config).initial
    for row, path in zip(rows, sorted((tmp_path / "run/checkpoints").glob("*")), strict=True):
        after = load_state(path, plan.layout).tensors["model"]
        changed = slice(0, 16) if row["bytes_up"] == 64 else slice(16, 48)
        stays = slice(16, 48) if row["bytes_up"] == 64 else slice(0, 16)
        assert torch.equal(after[stays], before[stays])
        assert not torch.equal(after[changed], before[changed])
        before = after
    assert {row["bytes_up"] for row in rows} == {64, 128}


def test_each_client_sends_either_part_in_half_of_the_rounds(toy_config):
    config = toy_config(**SPLIT)
    plan, sent = make_plan(config), np.zeros((2, 6))
    for number in range(200):
        round = plan.round(config, number)
        for client in round.cohort:
            sent[int(config.algorithm.sent(client, round) == "model.rest"), client] += 1
    assert np.all(np.abs(sent / 200 - 0.5) < 0.15)
    assert abs(sent[0].sum() / 1200 - 0.5) < 0.05


def test_bytes_up_of_a_run_are_planned_from_several_clients(toy_config, tmp_path):
    """Of halves by turns and of unequal ranks exactly; of random parts, about."""
    for settings, error in (
        (SPLIT | {"labels": 8, "rounds": 20}, 0.2),
        ({"adapters": True, "algorithm": "rolora", "rounds": 2}, 0),
        ({"adapters": True, "algorithm": "raflora", "ranks": (1, 3, 2), "rounds": 2}, 0),
        ({"rounds": 2}, 0),
    ):
        config = toy_config(**{"evaluate_samples": 0} | settings)
        plan, messages = make_plan(config), config.rounds * config.clients
        planned = bytes_up_in_all(config, plan, bytes_planned(config, plan), messages)
        rows = train(config, tmp_path / type(config.algorithm).__name__)
        assert planned == pytest.approx(sum(row["bytes_up"] for row in rows), rel=error)


@pytest.mark.parametrize("fold", ["median", "trimmed:0.34", "normbound:0.05"])
def test_robust_folds_take_each_part_alone(toy_config, tmp_path, fold):
    config = toy_config(**SPLIT, seed=2, rounds=1, fold=fold)
    (row,) = train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "none"))
    start, expected = plan.initial.double().numpy(), plan.initial.double().numpy().copy()
    trained_to = trained(config, plan)
    for part, size in ((slice(0, 16), 64), (slice(16, 48), 128)):
        senders = [client["client"] for client in row["clients"] if client["bytes_up"] == size]
        assert len(senders) >= 2
        ends = trained_to[senders, part]
        if fold == "median":
            expected[part] = np.median(ends, axis=0)
        elif fold == "trimmed:0.34":
            cut = int(0.34 * len(senders))
            expected[part] = np.sort(ends, axis=0)[cut : len(senders) - cut].mean(0)
        else:
            changes = ends - start[part]
            shortened = [change * min(1, 0.05 / np.linalg.norm(change)) for change in changes]
            expected[part] += np.mean(shortened, axis=0)
    np.testing.assert_allclose(model(tmp_path / "run", plan), expected, atol=1e-6)


def test_attackers_turn_the_part_that_they_send(toy_config, tmp_path):
    config = toy_config(**SPLIT, seed=2, rounds=1, malicious="0.9:signflip")
    train(config, tmp_path / "run")
    train(replace(config, malicious=None), tmp_path / "honest")
    plan = make_plan(config)
    start = plan.initial.double().numpy()
    turned, honest = (model(tmp_path / name, plan) - start for name in ("run", "honest"))
    assert len(plan.malicious) == 5
    assert np.dot(turned, honest) < -0.3 * np.dot(honest, honest)


def test_without_two_parts_there_is_nothing_to_split(toy_config, tmp_path):
    for encoder, sentence in (("^9", "would be no parameter; names are, for instance, 0.weight"), (".", "every")):
        with pytest.raises(UserError, match=sentence):
            prepare(toy_config(**SPLIT | {"algorithm": f"split:{encoder}"}), Run(tmp_path / "run"))
    with pytest.raises(UserError, match="no regular expression"):
        toy_config(**SPLIT | {"algorithm": "split:("})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fold": "krum:0"}, "averages each part over the clients that sent it"),
        ({"fold": "secure:0.5"}, "averages each part over the clients that sent it"),
        ({"wire": "clip:1.0"}, "averages each part over the clients that sent it"),
        ({"wire": "clip:1.0,noise:1.0"}, "averages each part over the clients that sent it"),
        ({"wire": "feedback:topk:0.5"}, "sends other tensors the next time"),
    ],
)
def test_what_it_refuses(toy_config, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        toy_config(**SPLIT, **changes).check()


def test_around_it_an_average_and_personal_models(toy_config, tmp_path):
    config = toy_config(**SPLIT, rounds=3, failing=(2,))
    train(config, tmp_path / "plain")
    plan = make_plan(config)
    for name in ("ema:0.9:split:^0", "ditto:0.5:split:^0"):
        out = tmp_path / name.partition(":")[0]
        train(replace(config, algorithm=name), out)
        assert np.array_equal(model(out, plan), model(tmp_path / "plain", plan))
        assert sha(out) == sha(tmp_path / "plain") or name.startswith("ema")


def test_of_the_presets_unet_the_encoder_is_what_comes_before_the_bottleneck():
    with torch.device("meta"):
        names = [name for name, _ in PRESETS["celeba"].task.unet().named_parameters()]
    blocks = {name.split(".")[0] for name in names}
    encoder = {block for block in blocks if Split().encodes(f"{block}.weight")}
    assert encoder == {"conv_in", "time_embedding", "down_blocks"}
    assert blocks - encoder == {"mid_block", "up_blocks", "conv_norm_out", "conv_out"}
