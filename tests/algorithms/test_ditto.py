"""Ditto: a personal model beside the global one, against its algorithm written out in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import fit, sha, train

from fedray.errors import UserError
from fedray.federation.local import held_out_loss
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.record.run import Run
from fedray.seeds import generator


@pytest.fixture
def config(toy_config):
    return toy_config(
        algorithm="ditto:0.7", optimizer="sgd", learning_rate=0.9, max_grad_norm=None, rounds=3, evaluate_samples=0
    )


def own(out, client, rounds):
    run = Run.open(out)
    return run.recall(client, run.generation(client, rounds))["algorithm/ditto/model"]


def test_personal_models_are_those_of_the_paper(config, tmp_path):
    rows = train(replace(config, checkpoints_total_limit=9), tmp_path / "run")
    plan, examples = make_plan(config), config.task.each
    models = {client: plan.initial.double() for client in range(4)}
    received, size, losses = plan.initial.double(), config.task.size, {}
    for number in range(3):
        sent = []
        for client in range(4):
            rng = generator(config.seed, "train", number, client)
            own_model, w = models[client], received.clone()
            for _ in range(config.local_epochs):
                torch.randperm(examples, generator=rng)
                for _ in range(0, examples, config.train_batch_size):
                    target = client + 0.1 * torch.randn((), generator=rng).double()
                    losses.setdefault((number, client), []).append((own_model - target).square().mean().item())
                    pull = 0.7 * (own_model - received)
                    own_model = own_model - 0.9 * (2 * (own_model - target) / size + pull)
                    w = w - 0.9 * 2 * (w - target) / size
            models[client] = own_model
            sent.append(w)
        received = torch.stack(sent).mean(0)
    for client in range(4):
        assert own(tmp_path / "run", client, 3).double() == pytest.approx(models[client], abs=1e-5)
        found = rows[-1]["clients"][client]["algorithm"]["personal_loss"]
        assert found == pytest.approx(np.mean(losses[2, client]), rel=1e-5)
    global_model = Run.open(tmp_path / "run").state(plan.layout).tensors["model"]
    assert global_model.double() == pytest.approx(received, abs=1e-5)


def test_the_global_model_is_that_of_the_method_inside_bit_for_bit(config, tmp_path):
    config = replace(config, optimizer="adamw", keep_optimizer=True)
    rows = train(config, tmp_path / "ditto")
    plain = train(replace(config, algorithm="fedavg"), tmp_path / "plain")
    assert sha(tmp_path / "ditto") == sha(tmp_path / "plain")
    assert [row["bytes_up"] for row in rows] == [row["bytes_up"] for row in plain]
    for client in range(4):
        kept = [Run.open(tmp_path / name).recall(client, 3) for name in ("ditto", "plain")]
        for name in kept[1]:
            assert torch.equal(kept[0][name], kept[1][name])


def test_without_a_pull_the_first_personal_models_are_the_uploads(config, tmp_path):
    train(replace(config, algorithm="ditto:0", rounds=1), tmp_path / "run")
    plan = make_plan(config)
    for client in range(4):
        train(replace(config, algorithm="fedavg", rounds=1, only_client=client), tmp_path / f"{client}")
        alone = Run.open(tmp_path / f"{client}").state(plan.layout).tensors["model"]
        assert torch.equal(own(tmp_path / "run", client, 1), alone)


@pytest.mark.parametrize("asked", [False, True])
def test_samples_and_losses_are_of_personal_models_where_asked(config, tmp_path, asked):
    config = replace(
        config, algorithm="ditto:0.01", held_out_share=0.25, local_epochs=20, evaluate_samples=64,
        evaluate_personal=asked,
    )  # fmt: skip
    seen = []

    def brightness(samples, images):
        seen.append(samples)
        return samples.mean()

    row = list(fit(config, LocalPool(config), tmp_path / "run", metrics={"brightness": brightness}))[-1]
    levels = seen[-1].reshape(4, 16, -1).mean((1, 2))
    assert np.all(np.diff(levels) > 5) == asked
    plan, worker = make_plan(config), LocalPool(config).worker
    for client in range(4):
        worker.load(own(tmp_path / "run", client, 3))
        loss = held_out_loss(worker, client, plan.held_out[client])
        assert row["clients"][client]["held_out_local"] == pytest.approx(loss, rel=1e-6)
        assert (row["held_out"]["clients"][client] == pytest.approx(loss, rel=1e-6)) == asked


def test_personal_models_survive_a_stop(config, tmp_path):
    train(config, tmp_path / "whole")
    train(config, tmp_path / "stopped", rounds=2)
    train(config, tmp_path / "stopped", resume=True)
    for client in range(4):
        assert torch.equal(own(tmp_path / "whole", client, 3), own(tmp_path / "stopped", client, 3))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": 3, "share": "^0"}, "keeps a whole model of each client's own: leave --share"),
        ({"adapters": True, "algorithm": "ditto:0.7:flora"}, "which do not fit new factors"),
    ],
)
def test_what_does_not_fit_is_refused(toy_config, tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        train(toy_config(**{"algorithm": "ditto:0.7", **settings}), tmp_path / "run")
