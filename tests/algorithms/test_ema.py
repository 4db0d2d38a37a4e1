"""The average of the global model against diffusers' `EMAModel`."""

from dataclasses import dataclass

import made
import pytest
import torch
from diffusers.training_utils import EMAModel
from runs import train
from safetensors.torch import load_file

from fedray.algorithms import Algorithm
from fedray.algorithms.ema import EMA
from fedray.algorithms.folds import Mean
from fedray.errors import UserError


@pytest.mark.parametrize(("max_decay", "inv_gamma", "power"), [(0.9999, 1.0, 0.75), (0.8, 2.0, 0.5)])
def test_the_decay_is_that_of_diffusers(max_decay, inv_gamma, power):
    theirs = EMAModel(
        [torch.nn.Parameter(torch.zeros(1))], decay=max_decay, use_ema_warmup=True, inv_gamma=inv_gamma, power=power
    )
    ours = EMA(max_decay, inv_gamma=inv_gamma, power=power)
    assert [ours.decay(step) for step in range(1, 50)] == pytest.approx([theirs.get_decay(k) for k in range(1, 50)])


def test_the_servers_average_takes_as_many_steps_as_clients_made_on_average():
    method, round = EMA(0.8), made.round_of({0: 3, 1: 1})
    server = method.init(torch.zeros(2), round.layout)
    weights = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    theirs = EMAModel([weights], decay=0.8, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for number, steps in enumerate([3, 8, 1]):  # cohorts differ, so a round's steps times the rounds is no clock
        vectors = [torch.tensor([number + 1.0, 2.0]), torch.tensor([3.0, -1.0])]
        folded = made.fold(
            vectors, round, Mean(), [{"examples": 3, "steps": steps - 1}, {"examples": 1, "steps": steps + 3}]
        )
        before = {name: tensor.clone() for name, tensor in server.items()}
        after = method.aggregate(server, folded, round)
        assert all(torch.equal(server[name], tensor) for name, tensor in before.items())  # not changed in place
        server = after
        weights.data.copy_((3 * vectors[0].double() + vectors[1].double()) / 4)
        for _ in range(steps):  # (3 (steps − 1) + steps + 3) / 4
            theirs.step([weights])
    assert server["ema/steps"].tolist() == [12]
    assert torch.allclose(server["ema/model"].double(), theirs.shadow_params[0], atol=1e-6)
    assert server["model"].tolist() == [3.0, 1.25]


def test_the_average_travels_where_one_client_trains_and_is_not_counted():
    method = EMA(0.8)
    server = method.init(torch.zeros(2), made.round_of({0: 1}).layout)
    alone = method.broadcast(server, made.round_of({0: 1}, clients=1))
    assert alone.keys() == {"model", "ema/model", "ema/steps"}
    assert alone.keys() - method.uncounted == {"model"}
    assert method.broadcast(server, made.round_of({0: 1}, clients=4)).keys() == {"model"}


@dataclass(frozen=True)
class EndsAtZero(Algorithm):
    """Trains as usual, and then throws it away: a method with a `train` of its own."""

    def train(self, local, down, memory):
        super().train(local, down, memory)
        local.weights.zero_()


def test_an_algorithm_trains_in_its_own_way_inside_the_average(toy_config, tmp_path):
    for use_ema in (False, True):
        out = tmp_path / f"ema-{use_ema}"
        train(toy_config(algorithm=EndsAtZero(), use_ema=use_ema, rounds=1, evaluate_samples=0), out)
        assert not load_file(out / "checkpoints/round-000001.safetensors")["model"].any()


def test_an_average_of_an_average_is_refused(toy_config):
    with pytest.raises(UserError, match="both ask for an average; leave one of them out"):
        toy_config(use_ema=True, algorithm="ema:0.9").check()
    toy_config(algorithm="ema:0.9").check()
