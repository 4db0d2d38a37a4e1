"""Chains of links, with links of one's own."""

from dataclasses import dataclass

import made
import pytest
import torch

from fedray.wire import VALUES, Link, Wire, counted
from fedray.wire.float16 import Float16

ROUND = made.round_of({0: 1, 1: 1})


@dataclass(frozen=True)
class Scaled(Link):
    """Values between -1 and 1, and beside them their scale; it remembers how often each client sent."""

    def send(self, x, round):
        return self._scaled(x)

    def arrive(self, payload, round):
        return payload[VALUES] * payload["scale"]

    def encode(self, x, memory, round, client):
        return self._scaled(x), {"sent": memory.get("sent", torch.zeros(1)) + 1}

    def decode(self, payload, round):
        return payload[VALUES] * payload["scale"]

    def _scaled(self, x):
        scale = x.abs().max().reshape(1)
        return {VALUES: x / scale, "scale": scale}


@dataclass(frozen=True)
class Shifted(Link):
    """Adds one to what is sent, of the model and of "momentum"; the sum of all is shifted back once."""

    tensors = ("model", "momentum")

    def encode(self, x, memory, round, client):
        return x + 1, {}

    def finish(self, total, weight, round, survivors):
        return total - weight, weight


def test_links_act_in_order_and_are_undone_in_reverse():
    wire, x = Wire((Scaled(), Float16())), torch.tensor([100_000.0, -50_000.0, 3.0])
    down = wire.send({"model": x}, ROUND)
    assert {name: str(array.dtype) for name, array in down.items()} == {"model": "float16", "model/0.scale": "float32"}
    assert counted(down, frozenset()) == 3 * 2 + 4
    assert torch.allclose(wire.arrive(down, ROUND)["model"], x, rtol=1e-3)
    with pytest.raises(OverflowError):  # the other way round, float16 comes before the scale
        Wire((Float16(), Scaled())).send({"model": x}, ROUND)
    up, _ = wire.encode({"model": x}, {}, ROUND, 0)
    assert list(wire.decode(up, ROUND)) == ["model"]
    assert torch.allclose(wire.decode(up, ROUND)["model"], x, rtol=1e-3)


def test_each_link_has_a_memory_of_its_own():
    wire, memory = Wire((Scaled(), Float16(), Scaled())), {}
    for _ in range(3):
        up, memory = wire.encode({"model": torch.tensor([1.0, 2.0])}, memory, ROUND, 0)
    assert {name: value.item() for name, value in memory.items()} == {"link0.scaled/sent": 3, "link2.scaled/sent": 3}
    assert torch.allclose(wire.decode(up, ROUND)["model"], torch.tensor([1.0, 2.0]))


def test_a_link_acts_on_the_tensors_that_it_names_and_finishes_their_sums():
    wire = Wire((Shifted(), Scaled()))
    tensors = {"model": torch.tensor([1.0, 2.0]), "momentum": torch.tensor([4.0]), "other": torch.tensor([8.0])}
    up, _ = wire.encode(tensors, {}, ROUND, 0)
    came = wire.decode(up, ROUND)
    assert came.keys() == tensors.keys()
    assert torch.allclose(came["model"], torch.tensor([2.0, 3.0]))
    assert (came["momentum"].item(), came["other"].item()) == (5.0, 8.0)
    folded = made.fold([came, came], ROUND)
    folded = wire.finish(folded, {"model": torch.zeros(2)}, ROUND)
    for name, tensor in tensors.items():
        assert torch.allclose(folded.mean(name), tensor)


def test_bytes_of_uncounted_tensors_are_not_counted():
    message = Wire().send({"model": torch.zeros(3), "ema/model": torch.zeros(3)}, ROUND)
    assert counted(message, frozenset({"ema/model"})) == 12
    assert counted(message, frozenset()) == 24
