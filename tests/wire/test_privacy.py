"""Clip and noise: what one client can change, against float64; and the noise itself."""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace

import made
import numpy as np
import pytest
import torch
from runs import sha, train
from scipy import stats

from fedray.algorithms import Upload
from fedray.algorithms.cohorts import Cohort
from fedray.algorithms.folds import Mean
from fedray.algorithms.secure import Secure
from fedray.errors import UserError
from fedray.federation.fit import prepare
from fedray.menus import LINKS, parse_wire
from fedray.record.run import Run
from fedray.vector import Layout
from fedray.wire import Link, Wire
from fedray.wire.privacy import Clip, Noise, split
from fedray.wire.topk import TopK

MEAN = Mean()
SIZE = 10_000
LAYOUT = Layout(("a", "b", "c"), ((50, 100), (4990,), (10,)))


@dataclass(frozen=True)
class Some(Link):
    """Sends every other value: never longer than the whole."""

    lossy = contracts = True

    def encode(self, x, memory, round, client):
        return torch.where(torch.arange(len(x)) % 2 == 0, x, 0.0), {}


OWN = [(Clip(0.3), Some(), Noise(1.0)), (Clip(0.3), Noise(1.0), Some())]  # with a link of the user's own


def named(links):
    return "-".join(type(link).__name__ for link in links)


def round_of(clients, **changes):
    round = made.round_of(dict.fromkeys(clients, 1), LAYOUT, clients=1000)
    return replace(round, norm=0.3, expected=5.0, **changes)


def hostile(rng):
    """Updates that try to move a sum by more than the clip."""
    yield torch.from_numpy(rng.normal(size=SIZE).astype(np.float32))
    yield torch.full((SIZE,), 3e37)
    yield torch.eye(1, SIZE)[0] * 1e30
    yield torch.full((SIZE,), 0.3 / math.sqrt(SIZE))  # as long as the clip, but for rounding
    yield torch.full((SIZE,), float(np.nextafter(np.float32(0.3 / math.sqrt(SIZE)), np.float32(1))))
    yield torch.full((SIZE,), 1.5 * 2.0**-42)  # half-way between two of the sum's integers
    yield torch.from_numpy(rng.standard_cauchy(SIZE).astype(np.float32))
    yield torch.full((SIZE,), 1e-45)


def summed(wire, updates, round, fold=MEAN):
    uploads = []
    for client, update in updates.items():
        payload, _ = wire.encode({"model": update}, {}, round, client)
        tensors = wire.decode(fold.seal(payload, round, client), round)
        uploads.append(Upload(client, tensors, dict.fromkeys(tensors, 1)))
    folded = fold.result(made.added(uploads, round, fold), round)
    return folded.sums.get("model", torch.zeros(SIZE, dtype=torch.float64)).numpy().copy()


CLIPS = ("clip:0.3", "clip:0.3:per_layer=true", "clip:0.3:quantile=0.5:count_noise=2")
FORMS = (*CLIPS, "noise:1", "float16", "bfloat16", "int8", "topk:0.25", "randk:0.25", "feedback:topk:0.25")
ALLOWED = [
    *[(clip,) for clip in CLIPS],
    *[(clip, *after) for clip in CLIPS for after in [("noise:1",), ("topk:0.25",)]],
    *[
        (clip, *after)
        for clip in CLIPS
        for after in [("noise:1", "topk:0.25"), ("topk:0.25", "noise:1"), ("topk:0.25", "topk:0.25")]
    ],
]  # of up to three links, those that have a clip


def allowed(toy_config, forms):
    try:
        toy_config(wire=",".join(forms)).check()
    except UserError:
        return False
    return True


def test_which_orders_of_links_are_allowed(toy_config):
    """Of all links there are, in all orders of up to three: a clip is first, and what follows never lengthens."""
    names = {form.partition(":")[0] for form in FORMS}
    assert names == set(LINKS.classes)  # a new link belongs into this list
    orders = [order for length in (1, 2, 3) for order in itertools.product(FORMS, repeat=length)]
    clipped = [order for order in orders if set(order) & set(CLIPS)]
    assert sorted(order for order in clipped if allowed(toy_config, order)) == sorted(ALLOWED)
    noisy = [order for order in orders if "noise:1" in order and not set(order) & set(CLIPS)]
    assert not any(allowed(toy_config, order) for order in noisy)


@pytest.mark.parametrize("links", [*map(parse_wire, map(",".join, ALLOWED)), *OWN], ids=named)
def test_no_client_moves_the_sum_by_more_than_the_clip(links):
    """Neighbouring cohorts of nobody, one, two, and many; their size, and so the unit of the integers, differs too."""
    wire, rng, longest = Wire(links), np.random.default_rng(0), 0.0
    crowd = {client: torch.from_numpy(rng.normal(size=SIZE).astype(np.float32)) for client in range(33)}
    for others in ({}, {0: crowd[0]}, {client: crowd[client] for client in range(3)}, crowd):
        without = summed(wire, others, round_of(others or [0]))
        for update in hostile(rng):
            with_one_more = summed(wire, others | {99: update}, round_of([*others, 99]))
            moved = np.linalg.norm(with_one_more - without)
            assert moved <= 0.3 * (1 + 1e-6)
            longest = max(longest, moved)
    assert longest > (0.15 if any(isinstance(link, (Some, TopK)) for link in links) else 0.2999)  # and one uses all


@pytest.mark.parametrize("bits", [8, 20])
def test_a_secure_sum_is_moved_by_no_more_than_its_noise_is_made_for(bits, toy_config, tmp_path):
    """The clip, and half a unit in each coordinate, as `Plan.round` scales the noise."""
    fold, wire, rng = Secure(0.5, bits=bits, limit=1.0), Wire((Clip(0.3), Noise(1.0))), np.random.default_rng(0)
    crowd = {client: torch.from_numpy(rng.normal(size=SIZE).astype(np.float32)) for client in range(4)}
    without, longest = summed(wire, crowd, round_of(range(4)), fold), 0.0
    just_above_half = torch.full((SIZE,), 2.0 ** -(bits + 1) * 1.001)
    for update in (*hostile(rng), just_above_half):
        more = summed(wire, crowd | {99: update}, round_of([*range(4), 99]), fold)
        longest = max(longest, np.linalg.norm(more - without))
    config = toy_config(size=SIZE, fold=f"secure:0.5:bits={bits}:limit=1", wire="clip:0.3,noise:1")
    made_for = prepare(config, Run(tmp_path / "run")).round(config, 0).deviation
    assert longest <= made_for * (1 + 1e-6)
    if bits == 8:
        assert longest > 0.35  # rounding does lengthen what was clipped


def test_updates_within_the_norm_pass_as_they_are_and_others_keep_their_direction():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=SIZE).astype(np.float32))
    short, _ = Clip(1e6).encode(x, {}, replace(round_of([0]), norm=1e6), 0)
    assert torch.equal(short, x)
    long, _ = Clip(0.3).encode(x, {}, round_of([0]), 0)
    expected = x.double().numpy() * (0.3 / np.linalg.norm(x.double().numpy()))
    assert np.allclose(long.numpy(), expected, rtol=2e-6)


def test_layers_are_clipped_one_by_one():
    x = torch.cat([torch.full((5000,), 10.0), torch.full((4990,), 1e-6), torch.full((10,), 10.0)])
    clipped, _ = Clip(0.3, per_layer=True).encode(x, {}, round_of([0]), 0)
    norms = [float(view.double().norm()) for view in LAYOUT.views(clipped).values()]
    assert norms[0] == pytest.approx(0.3 / math.sqrt(3), rel=2e-6)
    assert torch.equal(clipped[5000:9990], x[5000:9990])
    assert norms[2] == pytest.approx(0.3 / math.sqrt(3), rel=2e-6)
    assert x[0] == 10


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_is_normal_and_as_large_as_it_should_be(secure):
    """Chance of a false alarm: 1e-6, where the noise is new every time."""
    total = torch.full((200_001,), 7.0, dtype=torch.float64)
    round = round_of([0], deviation=2.5, secure_noise=secure)
    noisy, weight = Noise(1.0).finish(total, 1, round, [0])
    assert weight == 5
    drawn = (noisy.numpy() - 7) / 2.5
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(drawn[:100_000], drawn[100_001:])[0, 1]) < 5 / math.sqrt(100_000)  # Box and Muller's halves
    again, _ = Noise(1.0).finish(total, 1, round, [0])
    assert torch.equal(noisy, again) != secure
    other, _ = Noise(1.0).finish(total, 1, replace(round, number=1), [0])
    assert not torch.equal(noisy, other)
    assert round.noise(3, "noise").shape == (3,)


def test_noise_is_of_all_of_its_key():
    """Of SHAKE-256, and Box and Muller's transform, one number at a time; and other for every part of the key."""
    round = replace(round_of([0]), seed=7, number=3, transcript="ab")
    stream = hashlib.shake_256(b"(7, 'noise', 3, 'ab')").digest(48)
    u = [(int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(6)]
    expected = [math.sqrt(-2 * math.log(u[i] + 2**-53)) * math.cos(2 * math.pi * u[3 + i]) for i in range(3)]
    expected += [math.sqrt(-2 * math.log(u[i] + 2**-53)) * math.sin(2 * math.pi * u[3 + i]) for i in range(2)]
    drawn = round.noise(5, "noise")
    assert drawn.tolist() == pytest.approx(expected, rel=1e-12)
    for change in ({"seed": 7 + 2**64}, {"number": 4}, {"transcript": "abc"}):
        assert not np.isclose(replace(round, **change).noise(5, "noise"), drawn).any()
    assert not np.isclose(round.noise(5, "count noise"), drawn).any()


def test_of_nobody_there_is_noise_too_and_the_number_of_clients_does_not_show():
    wire, server = Wire((Clip(0.3), Noise(1.0))), {"model": torch.ones(SIZE)}
    round = round_of([0], deviation=0.5)
    drawn = round.noise(SIZE, "noise") * 0.5
    empty = wire.finish(Mean().result(Mean().start(round), round), server, round)
    assert torch.equal(empty.mean("model"), (1 + drawn / 5).float())
    folded = wire.finish(made.fold([torch.full((SIZE,), 0.25)], round), server, round)
    assert torch.allclose(folded.mean("model"), (1 + (drawn + 0.25) / 5).float())
    assert (folded.rows, folded.uploads, folded.survivors) == ([], [], [])


# A norm that follows the updates (Andrew et al. 2021)


def reported(wire, norms, round):
    """Uploads of these norms, folded."""
    uploads = []
    for client, length in enumerate(norms):
        update = torch.full((SIZE,), length / math.sqrt(SIZE))
        payload, _ = wire.encode({"model": update}, {}, round, client)
        tensors = wire.decode(payload, round)
        uploads.append(Upload(client, tensors, dict.fromkeys(tensors, 1)))
    return Mean().result(made.added(uploads, round, Mean()), round)


def test_the_norm_moves_towards_the_quantile():
    """C exp(−η (b − γ)) of C = 3, η = 0.2, b = 0.5, γ = 0.2."""
    wire = Wire((Clip(3.0, quantile=0.2, rate=0.2),))
    round = replace(round_of(range(4)), norm=3.0, expected=4.0)
    kept = wire.learn(reported(wire, [1, 2.9, 3.1, 50], round), round)
    assert kept["link0.clip/norm"].item() == pytest.approx(2.825293600752746, rel=1e-12)
    assert (wire.norm({}), wire.norm(kept)) == (3.0, kept["link0.clip/norm"].item())
    lengths, server = np.linspace(1, 9, 81), {}
    for _ in range(300):
        round = replace(round_of(range(81)), norm=wire.norm(server), expected=81.0)
        server = wire.learn(reported(wire, lengths, round), round)
    assert wire.norm(server) == pytest.approx(np.quantile(lengths, 0.2), rel=0.02)


def test_noise_is_split_between_updates_and_their_count(toy_config, tmp_path):
    assert split(2.0, 5.0) == pytest.approx(2.0412, abs=5e-5)
    assert split(2.0, 1e9) == pytest.approx(2)
    for multiplier in (0.3, 1, 3):  # both releases together are one of the multiplier: 1/z² = 1/z_Δ² + 1/(2 σ_b)²
        assert split(multiplier, 7) ** -2 + 14**-2 == pytest.approx(multiplier**-2)
    config = toy_config(wire="clip:3:quantile=0.5:count_noise=5,noise:2", cohort="poisson:0.5")
    round = prepare(config, Run(tmp_path / "run")).round(config, 0, {"link0.clip/norm": torch.tensor([1.5])})
    assert (round.norm, round.count_noise) == (1.5, 5)
    assert round.deviation == pytest.approx(2.0412 * 1.5, abs=1e-4)
    with pytest.raises(UserError, match="give count_noise above 1, or let more clients take part"):
        prepare(replace(config, wire="clip:3:quantile=0.5,noise:2"), Run(tmp_path / "other"))


def test_the_count_is_noised_around_its_expectation():
    wire = Wire((Clip(3.0, quantile=0.5, rate=1.0), Noise(1.0)))
    norms = []
    for number in range(400):
        round = replace(round_of(range(4)), norm=3.0, expected=4.0, count_noise=2.0, number=number)
        norms.append(float(wire.learn(reported(wire, [1], round), round)["link0.clip/norm"]))
    shares = 0.5 - np.log(np.array(norms) / 3)  # b: one of four, by a half above a half, and N(0, 2²) / 4
    assert stats.kstest((shares - 0.5 - 0.125) / 0.5, "norm").pvalue > 1e-3
    empty = Mean().result(Mean().start(round), round)
    assert wire.learn(empty, round)["link0.clip/norm"].item() != 3


def test_clipping_adapts_in_a_run(toy_config, tmp_path):
    config = toy_config(labels=6, wire="clip:100:quantile=0.5:rate=1,noise:0", rounds=12, evaluate_samples=0)
    train(config, tmp_path / "run")
    plan = prepare(config, Run(tmp_path / "x"))
    norm = Run.open(tmp_path / "run").state(plan.layout).tensors["link0.clip/norm"].item()
    assert norm < 5
    train(config, tmp_path / "stopped", rounds=5)
    train(config, tmp_path / "stopped", resume=True)
    assert sha(tmp_path / "stopped") == sha(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wire": "clip:1,noise:1", "only_client": 1}, "a client that trains alone is hidden in no sum"),
        ({"adapters": True, "ranks": (1, 3, 2), "wire": "clip:1,noise:1"}, "are for adapters of one rank"),
        ({"adapters": True, "ranks": (1, 3, 2), "fold": "secure:0.5"}, "are for adapters of one rank"),
        ({"wire": "noise:1"}, "noise:1: nothing bounds the updates that it hides; put clip:NORM before it"),
        ({"wire": "noise:1,clip:1"}, "put clip:NORM before it"),
        ({"wire": "clip:1,float16,noise:1"}, "float16 may lengthen what clip:1 has clipped"),
        ({"wire": "float16,clip:1"}, "float16 may lengthen"),
        ({"wire": "clip:1,clip:2,noise:1"}, "once is enough"),
        ({"wire": "clip:1,noise:1,noise:2"}, "once is enough"),
        ({"wire": "clip:1,noise"}, "give its multiplier"),
        ({"wire": "clip:1,noise:1", "target_epsilon": 1.0}, "leave one of them out"),
        ({"max_epsilon": 1.0}, "--max-epsilon is about noise"),
        ({"secure_noise": True}, "--secure-noise is about noise"),
        ({"wire": "clip:1,noise:1", "delta": 1.0}, "--delta 1.0: it must be above 0 and below 1"),
        ({"algorithm": "dpsgd:1:0.01", "delta": 1.0}, "--delta 1.0: it must be above 0 and below 1"),
        ({"canaries": 2, "delta": 0.0}, "--delta 0.0: it must be above 0 and below 1"),
        ({"wire": "clip:1,noise:1", "max_epsilon": 3.0}, r"--max-epsilon 3 is enough for 0 of 3 rounds"),
        ({"cohort": "poisson:0.5", "fraction": 0.5}, "--fraction and --cohort both"),
        ({"wire": "clip:1,noise", "target_epsilon": 1e-9, "delta": 1e-12}, "no noise reaches it"),
    ],
)
def test_what_would_not_hide_a_client_is_refused(toy_config, changes, message):
    with pytest.raises(UserError, match=message):
        toy_config(**changes).check()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("clip:0", "the norm must be above 0"),
        ("clip:inf", "the norm must be above 0"),
        ("clip:1:quantile=1.5", "a quantile lies between 0 and 1"),
        ("clip:1:true:quantile=0.5", "it is not per layer"),
        ("clip:1,noise:-1", "the multiplier must not be negative"),
    ],
)
def test_norms_and_multipliers_that_are_none(toy_config, form, message):
    with pytest.raises(UserError, match=message):
        toy_config(wire=form)


def test_of_a_cohort_of_ones_own_no_bound_is_known(toy_config):
    @dataclass(frozen=True)
    class First(Cohort):
        def expected(self, clients):
            return 1

        def draw(self, clients, rng):
            return [0]

    toy_config(cohort=First()).check()
    with pytest.raises(UserError, match="no ε is known for cohorts drawn so"):
        toy_config(cohort=First(), wire="clip:1,noise:1").check()
