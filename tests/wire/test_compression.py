"""Links that compress: numbers of their papers, identities of error feedback, bytes, and what cannot be chained."""

import math

import made
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.config import Config
from fedray.errors import UserError
from fedray.menus import LINKS, parse_wire, wire_form
from fedray.vector import Layout
from fedray.wire import Wire, counted
from fedray.wire.bfloat16 import BFloat16
from fedray.wire.feedback import Feedback
from fedray.wire.float16 import Float16
from fedray.wire.int8 import Int8
from fedray.wire.randk import RandK
from fedray.wire.topk import TopK

NONE = frozenset()


def round_of(size, number=0):
    return made.round_of({0: 1, 1: 1}, Layout(("w",), ((size,),)), number=number)


def through(links, x, number=0, client=0, memory=None):
    """What arrives of a vector, the bytes, and the memory afterwards."""
    wire, round = Wire(links), round_of(len(x), number)
    payload, kept = wire.encode({"model": x}, memory or {}, round, client)
    return wire.decode(payload, round)["model"], counted(payload, NONE), kept


def normal(size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=size).astype(np.float32))


def test_bfloat16_is_the_upper_half_of_the_bits_rounded_to_even():
    x = torch.cat([normal(1000) * 10.0**scale for scale in (-30, -3, 0, 30)])
    x[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # ties
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + (bits >> 16) % 2) >> 16
    expected = (upper << 16).astype(np.uint32).view(np.float32)
    assert expected[:2].tolist() == [1, 1 + 2.0**-6]
    came, size, _ = through((BFloat16(),), x)
    assert np.array_equal(came.numpy(), expected)
    assert size == 2 * len(x)
    wire, round = Wire((BFloat16(),)), round_of(len(x))
    down = wire.send({"model": x}, round)
    assert np.array_equal(wire.arrive(down, round)["model"].numpy(), expected)
    assert counted(down, NONE) == 2 * len(x)


# QSGD


def test_values_on_the_grid_are_exact():
    """[2, 3, 6] has norm 7: with seven levels nothing is rounded. Nor with six of the largest."""
    x = torch.tensor([2.0, -3.0, 6.0])
    for number in range(50):
        assert torch.equal(through((Int8(7, 3, "l2"),), x, number)[0], x)
        assert torch.equal(through((Int8(6, 3),), x, number)[0], x)


@pytest.mark.parametrize("link", [Int8(), Int8(norm="l2"), Int8(4, 64, "l2"), Int8(1, 50)])
def test_rounding_is_unbiased_and_its_variance_bounded(link):
    """E Q(v) = v and E ‖Q(v) − v‖² ≤ min(d / s², √d / s) ‖v‖² in each block (Alistarh et al. 2017, lemma 3.1)."""
    x, draws = normal(300) * torch.logspace(-3, 3, 300), 2000
    came = torch.stack([through((link,), x, number)[0] for number in range(draws)]).double()
    errors = (came - x).square()
    lengths = torch.stack([b.norm(p=2 if link.norm == "l2" else math.inf) for b in x.split(link.block)]).double()
    step = (lengths / link.levels).repeat_interleave(link.block)[:300]
    up = (x / step).frac().abs()  # how often it is rounded away from zero
    # The mean of Bernoulli numbers, off by five standard deviations, or by five draws where it is rarely rounded up.
    assert ((came.mean(0) - x).abs() <= step * (5 * (up * (1 - up) / draws).sqrt() + 5 / draws)).all()
    for start in range(0, 300, link.block):
        part = x[start : start + link.block].double()
        bound = min(link.block / link.levels**2, math.sqrt(link.block) / link.levels)
        assert errors[:, start : start + link.block].sum(1).mean() <= bound * part.square().sum()


def test_a_rounding_is_to_a_neighbour_and_differs_by_client_and_round():
    x = normal(1000)
    came = {(n, c): through((Int8(),), x, n, c)[0] for n in (0, 1) for c in (0, 1)}
    assert len({tensor.numpy().tobytes() for tensor in came.values()}) == 4
    assert torch.equal(came[1, 1], through((Int8(),), x, 1, 1)[0])
    steps = torch.stack([block.abs().max() / 127 for block in x.split(256)]).repeat_interleave(256)[:1000]
    for tensor in came.values():
        assert ((tensor - x).abs() < steps * (1 + 1e-5)).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 10_000])
def test_int8_sends_a_byte_a_value_and_a_scale_a_block(size):
    x = normal(size)
    assert through((Int8(),), x)[1] == size + 4 * math.ceil(size / 256)
    assert torch.equal(through((Int8(),), torch.zeros(size))[0], torch.zeros(size))
    wire, round = Wire((Int8(),)), round_of(size)
    down = wire.send({"model": x}, round)
    assert counted(down, NONE) == size + 4 * math.ceil(size / 256)
    assert (wire.arrive(down, round)["model"] - x).abs().max() <= x.abs().max() / 127


# Sparse updates


def test_top_half_of_two_clients():
    first, second = (through((TopK(0.5),), torch.tensor(x))[0] for x in ([1.0, 2, 3, 4], [4.0, 3, 2, 1]))
    assert first.tolist() == [0, 0, 3, 4]
    assert (first + second).tolist() == [4, 3, 3, 4]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-3, 3) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.1, 0.29, 0.5, 1.0]),
)
def test_largest_values_are_those_of_a_stable_sort(values, share):
    x = np.array(values, np.float32)
    k = max(1, math.floor(round(share * 100) * len(x) / 100))
    kept = np.lexsort((np.arange(len(x)), -np.abs(x)))[:k]
    expected = np.zeros_like(x)
    expected[kept] = x[kept]
    came, size, _ = through((TopK(share),), torch.from_numpy(x))
    assert np.array_equal(came.numpy(), expected)
    assert size == 8 * k + 4
    lost = float(((x - expected).astype(float) ** 2).sum())
    assert lost <= (1 - k / len(x)) * float((x.astype(float) ** 2).sum()) * (1 + 1e-6)  # Stich et al. 2018


def test_random_values_are_unbiased_and_their_indices_do_not_travel():
    x, draws = normal(40), 4000
    came = torch.stack([through((RandK(0.25),), x, number)[0] for number in range(draws)]).double()
    assert (came[0] != 0).sum() == 10
    assert torch.allclose(came[0][came[0] != 0].float(), 4 * x[came[0] != 0])
    assert ((came.mean(0) - x).abs() <= 5 * math.sqrt(3 / draws) * x.abs()).all()  # each is 4 x with p = 1/4, else 0
    assert through((RandK(0.25),), x)[1] == 4 * 10 + 16
    plain = through((RandK(0.25, unbiased=False),), x, 3, 1)[0]
    assert torch.equal(plain[plain != 0], x[plain != 0])
    assert not torch.equal(plain != 0, through((RandK(0.25, unbiased=False),), x, 3, 0)[0] != 0)


# Error feedback


@pytest.mark.parametrize("link", [TopK(0.1), RandK(0.1, unbiased=False), Float16(), BFloat16(), Int8(), Int8(1)])
def test_what_is_sent_and_what_is_kept_are_what_came_in(link):
    """sent + residual = x + residual before, bit for bit where it is a float32; Σ sent + residual = Σ x."""
    exact = not isinstance(link, Int8)
    memory, sent, given_, residual = {}, torch.zeros(500).double(), torch.zeros(500).double(), torch.zeros(500)
    for number in range(30):
        x = normal(500, seed=number) * 0.01
        came, _, memory = through((Feedback(link),), x, number, 0, memory)
        (name,) = memory
        assert name == "link0.feedback/residual"
        if exact:
            assert torch.equal(came + memory[name], x + residual)
        else:
            torch.testing.assert_close(came + memory[name], x + residual, rtol=1e-6, atol=1e-8)
        residual = memory[name]
        sent, given_ = sent + came, given_ + x
    torch.testing.assert_close(sent + residual, given_, rtol=0, atol=1e-7)


def test_without_feedback_the_small_values_never_arrive():
    x, memory = torch.tensor([1.0, 0.1, 0.1, 0.1]), {}
    lost, arrived = torch.zeros(4), torch.zeros(4)
    for number in range(40):
        lost += through((TopK(0.25),), x, number)[0]
        came, _, memory = through((Feedback(TopK(0.25)),), x, number, 0, memory)
        arrived += came
    assert lost.tolist() == [40, 0, 0, 0]
    assert (arrived - 40 * x).abs().max() <= 1.1


def test_feedback_leaves_the_way_down_as_it_is():
    wire, x = Wire((Feedback(Float16()),)), normal(100)
    assert torch.equal(wire.arrive(wire.send({"model": x}, round_of(100)), round_of(100))["model"], x)


# Chains and directions


def test_values_of_a_sparse_update_are_halved_again():
    x = normal(1000)
    came, size, _ = through((TopK(0.1), Float16()), x)
    assert size == 100 * (2 + 4) + 4
    assert torch.equal(came, through((TopK(0.1),), x)[0].half().float())
    assert through((TopK(0.1), Int8()), x)[1] == 100 * (1 + 4) + 4 + 4


def test_each_way_has_its_links_and_a_lossy_one_makes_differences():
    x, round = normal(1000), round_of(1000)
    wire = Wire((), (Int8(),))
    assert wire.lossy
    down = wire.send({"model": x}, round)
    received = wire.arrive(down, round)["model"]
    assert counted(down, NONE) == 1016
    up, _ = wire.encode({"model": torch.full((1000,), 0.5)}, {}, round, 0)
    assert counted(up, NONE) == 4000
    folded = wire.finish(made.fold([wire.decode(up, round)["model"]] * 2, round), {"model": x}, round)
    assert torch.equal(folded.mean("model"), x + 0.5)  # the server's own, exact model
    assert not torch.equal(received, x)
    assert counted(Wire((Int8(),), ()).send({"model": x}, round), NONE) == 4000


@pytest.mark.parametrize("link", [TopK(0.5), RandK(0.5), Int8(), BFloat16(), Feedback(TopK(0.5))])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_before_a_link_can_hide_it(link, value):
    x = normal(10)
    x[3] = value
    with pytest.raises(FloatingPointError, match="the model that it sends is not finite"):
        through((link,), x)


@pytest.mark.parametrize(
    "text",
    ["bfloat16", "int8", "int8:7:3:l2", "topk:0.01", "randk:0.1", "randk:0.1:false", "feedback:topk:0.01",
     "feedback:int8", "topk:0.01,float16", "feedback:topk:0.01,int8"],
)  # fmt: skip
def test_short_forms(text):
    links = parse_wire(text)
    assert wire_form(links) == text
    Config(local_epochs=1, wire=text).check()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("topk:0", "the share must be above 0"),
        ("int8:200", "levels must be from 1 to 127"),
        ("int8:norm=l1", "the norm is max or l2, not 'l1'"),
        ("feedback:randk:0.1", r"errors would grow \(unbiased=false\?\)"),
        ("feedback:feedback:int8", "remembers by itself"),
        ("int8,topk:0.1", "--wire: topk:0.1 cannot follow int8, which sends codes"),
        ("topk:0.1,feedback:float16", "feedback:float16 cannot follow topk:0.1, which sends other coordinates every"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence):
        Config(local_epochs=1, wire=text).check()


def test_the_way_down_takes_links_that_act_on_it():
    for text in ("topk:0.1", "randk:0.1", "feedback:int8"):
        with pytest.raises(UserError, match=f"--wire-down {text}: this link does nothing on the way down"):
            Config(local_epochs=1, wire_down=text).check()
    for text in ("float32", "float16", "bfloat16", "int8"):
        config = Config(local_epochs=1, wire="topk:0.1", wire_down=text)
        config.check()
        assert Config.from_json(config.to_json()) == config
    assert Config(local_epochs=1).to_json()["wire_down"] is None
    assert set(LINKS.classes) == {"bfloat16", "clip", "feedback", "float16", "int8", "noise", "randk", "topk"}
