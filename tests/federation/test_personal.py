"""What clients keep to themselves: parts of the model, by name, and models of their own."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import fit, sha, train

from fedray.data.partition import IID
from fedray.errors import UserError
from fedray.federation.delivered import model_of, sampling_of
from fedray.federation.evaluation import sample
from fedray.federation.local import held_out_loss
from fedray.federation.plan import bytes_planned, make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session, validate_round
from fedray.record.run import Run
from fedray.vector import Layout
from fedray.vector.part import Part

LAYOUT = Layout(("a", "b", "c", "d"), ((2, 3), (4,), (1,), (2, 2)))


@pytest.mark.parametrize("wanted", ["", "a", "b", "bc", "ad", "abcd"])
def test_a_part_and_the_rest_make_the_vector(wanted):
    part, vector = Part.of(LAYOUT, lambda name: name in wanted), torch.randn(LAYOUT.size)
    views = LAYOUT.views(vector)
    expected = torch.cat([vector[:0], *(views[name].reshape(-1) for name in wanted)])
    assert torch.equal(part.take(vector), expected)
    assert part.layout == Layout(tuple(wanted), tuple(tuple(views[name].shape) for name in wanted))
    assert torch.equal(part.join(part.take(vector), part.rest.take(vector)), vector)
    assert part.take(vector).data_ptr() != vector.data_ptr() or not wanted
    assert len(part.ranges) == {"": 0, "ad": 2}.get(wanted, 1)


def own(out, client, rounds):
    run = Run.open(out)
    return run.recall(client, run.generation(client, rounds))["local/model"]


SPLIT = {"layers": 3, "share": "^(0|2)", "evaluate_samples": 0}  # of three layers the middle one is local


@pytest.mark.parametrize("settings", [{"rounds": 1}, {"rounds": 3, "keep_optimizer": True}], ids=["once", "kept"])
def test_one_client_is_plain_training_bit_for_bit(toy_config, tmp_path, settings):
    """Also where gradients are clipped by the norm of all of it."""
    config = toy_config(clients=1, partition=IID(), max_grad_norm=0.5, **{**SPLIT, **settings})
    train(config, tmp_path / "split")
    train(replace(config, share=None), tmp_path / "whole")
    part = Part.of(make_plan(replace(config, share=None)).layout, config.shares)
    state = Run.open(tmp_path / "split").state(part.layout).tensors["model"]
    whole = Run.open(tmp_path / "whole").state(part.whole).tensors["model"]
    assert torch.equal(part.join(state, own(tmp_path / "split", 0, config.rounds)), whole)


def test_shared_parts_are_averaged_and_local_ones_are_each_clients_own(toy_config, tmp_path):
    """After one round, against each client alone."""
    config = toy_config(rounds=1, **SPLIT)
    (row,) = train(config, tmp_path / "run")
    whole, plan = make_plan(replace(config, share=None)), make_plan(config)
    part = Part.of(whole.layout, config.shares)
    alone = []
    for client in range(4):
        train(replace(config, share=None, only_client=client), tmp_path / f"alone-{client}")
        alone.append(Run.open(tmp_path / f"alone-{client}").state(whole.layout).tensors["model"])
        assert torch.equal(own(tmp_path / "run", client, 1), part.rest.take(alone[-1]))
    mean = np.average([part.take(each).double().numpy() for each in alone], axis=0, weights=plan.shards.sizes)
    found = Run.open(tmp_path / "run").state(part.layout).tensors
    assert list(found) == ["model"]
    assert found["model"].numpy() == pytest.approx(mean, abs=1e-6)
    assert {client["bytes_up"] for client in row["clients"]} == {4 * part.layout.size}
    assert {client["bytes_down"] for client in row["clients"]} == {4 * part.layout.size}
    assert bytes_planned(config, plan) == (4 * part.layout.size,) * 3
    saved = torch.load(tmp_path / "run/model/network.pt")  # shared parts, and local ones as they were drawn
    vector = torch.cat([each.reshape(-1) for each in saved.values()])
    assert torch.equal(vector, part.join(found["model"], part.rest.take(whole.initial)))


def test_held_out_losses_are_of_clients_own_models(toy_config, tmp_path):
    """Local layers reach what clients hold; without them, the model of the average would be measured."""
    config = toy_config(rounds=4, held_out_share=0.25, local_epochs=20, **SPLIT)
    row = train(config, tmp_path / "run")[-1]
    plan, pool = make_plan(config), LocalPool(config)
    worker, part = pool.worker, pool.worker.shared
    state = Run.open(tmp_path / "run").state(part.layout).tensors["model"]
    for client in range(4):
        worker.learner.flat.vector.detach().copy_(part.join(state, own(tmp_path / "run", client, 4)))
        found = held_out_loss(worker, client, plan.held_out[client])
        assert row["held_out"]["clients"][client] == pytest.approx(found, rel=1e-6)
    worker.load(state)
    assert held_out_loss(worker, 3, plan.held_out[3]) > 1.5 * row["held_out"]["clients"][3]


def test_samples_are_of_clients_own_models_in_turn(toy_config, tmp_path):
    """Client k's model is brighter than client k − 1's; and the run's scores are of all of them."""
    config = toy_config(rounds=3, local_epochs=20, **SPLIT | {"evaluate_samples": 64})
    seen = []

    def brightness(samples, images):
        seen.append(samples)
        return samples.mean()

    list(fit(config, LocalPool(config), tmp_path / "run", metrics={"brightness": brightness}))
    levels = seen[-1].reshape(4, 16, -1).mean((1, 2))
    assert np.all(np.diff(levels) > 3)


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_resumed_with_failed_clients_it_is_the_same_to_the_local_parts(toy_config, tmp_path, wire):
    toy = {"labels": 6, "failing": (2,)}
    config = toy_config(
        **toy, fraction=0.67, **SPLIT | {"rounds": 4, "wire": wire, "keep_optimizer": True, "algorithm": "ema:0.9"}
    )
    train(config, tmp_path / "whole")
    train(config, tmp_path / "stopped", rounds=2)
    train(config, tmp_path / "stopped", resume=True)
    assert sha(tmp_path / "whole") == sha(tmp_path / "stopped")
    for client in (0, 1, 3, 4, 5):
        assert torch.equal(own(tmp_path / "whole", client, 4), own(tmp_path / "stopped", client, 4))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"share": "^up"}, "--share ^up: nothing would be shared; names of parameters are, for instance, weight"),
        ({"keep_local": "^up"}, "--keep-local ^up: everything would be"),
        ({"share": "("}, "--share '(' is no regular expression"),
        ({"adapters": True, "algorithm": "fedex", "share": "lora_A"}, "fedex aggregates whole adapters: leave --share"),
        ({"evaluate_personal": True}, "--evaluate-personal: --algorithm fedavg makes no model of a client's own"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(toy_config, tmp_path, settings, sentence):
    with pytest.raises(UserError) as error:
        train(toy_config(**settings), tmp_path / "run")
    assert sentence in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_is_kept_local_is_what_is_not_shared(toy_config, tmp_path):
    shared, kept = toy_config(**SPLIT), toy_config(**SPLIT | {"share": None, "keep_local": "^1"})
    both = toy_config(**SPLIT | {"share": "^[012]", "keep_local": "^1"})
    for name, config in {"shared": shared, "kept": kept, "both": both}.items():
        train(config, tmp_path / name)
    assert sha(tmp_path / "shared") == sha(tmp_path / "kept") == sha(tmp_path / "both")


def test_clients_own_parts_are_read_one_at_a_time(toy_config, tmp_path, monkeypatch):
    """For samples and for held-out losses: counted while they are alive."""
    config = toy_config(labels=12, rounds=1, held_out_share=0.25, **SPLIT)
    (row,) = train(config, tmp_path / "run")
    run, plan, pool = Run.open(tmp_path / "run"), make_plan(config), LocalPool(config)
    recall, alive, read, most = Run.recall, set(), [], []

    def counted(self, client, generation):
        kept = recall(self, client, generation)
        for name, tensor in kept.items():
            alive.add((len(read), name))
            weakref.finalize(tensor, alive.discard, (len(read), name))
        read.append(client)
        most.append(len(alive))
        return kept

    monkeypatch.setattr(Run, "recall", counted)
    images = sample(pool, model_of(run, config), sampling_of(run, config, 60, 0))[1]
    assert len(images) == 60
    assert read == [*range(12)]  # a batch of five each
    assert max(most) <= 2  # the job that is done, and the next
    read.clear()
    state = run.state(plan.layout)
    found = validate_round(Session(config, plan, pool, run), state, {"clients": [], "seconds": {}})
    assert found["clients"] == row["held_out"]["clients"]
    assert read == [*range(12)]
    assert max(most) <= 2
