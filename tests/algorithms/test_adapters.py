"""Rules for adapters, as linear algebra: each against float64, from its definition, on layers of every shape."""

from dataclasses import replace
from itertools import pairwise

import made
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from runs import fit
from torch import nn

from fedray.algorithms.fedavg import FedAvg
from fedray.algorithms.folds import Mean
from fedray.algorithms.lora import SVD, FedEx, Flora, RaFLoRA, RoLoRA
from fedray.errors import UserError
from fedray.federation.fit import prepare
from fedray.federation.local import TrainJob, client_update
from fedray.federation.plan import bytes_planned, disk_needed, make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.traffic import bytes_down_in_all
from fedray.federation.worker import Shared
from fedray.presets import PRESETS
from fedray.record.checkpoint import load_state
from fedray.record.run import Run
from fedray.vector import Layout
from fedray.vector.adapters import Adapters
from fedray.wire import Wire, counted
from fedray.wire.float16 import Float16

SHAPES = {"wide": (6, 24), "tall": (20, 5), "square": (8, 8), "narrow": (3, 3)}  # (out, in); the last as wide as r
RANK, SCALE = 3, 0.5
NAMES = {
    f"{layer}.lora_{which}.default.weight": (RANK, columns) if which == "A" else (rows, RANK)
    for layer, (rows, columns) in SHAPES.items()
    for which in "AB"
}
LAYOUT = Layout(tuple(NAMES), tuple(NAMES.values()))
ADAPTERS = Adapters(LAYOUT, SCALE, {}, SHAPES)
EXAMPLES = {0: 5, 1: 1, 3: 12, 4: 2}  # of clients


def draw(seed):
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))


def product(vector):
    """s B A of every layer, float64, by the names of the parameters."""
    views = LAYOUT.views(vector.double())
    return [
        SCALE * views[f"{layer}.lora_B.default.weight"] @ views[f"{layer}.lora_A.default.weight"] for layer in SHAPES
    ]


def mean_product(vectors, examples):
    parts = [[n / sum(examples) * each for each in product(v)] for v, n in zip(vectors, examples, strict=True)]
    return [sum(layer) for layer in zip(*parts, strict=True)]


def change(state):
    """What a state adds to each layer's weights."""
    parts = product(state["model"])
    if "base" in state:
        parts = [part + each for part, each in zip(parts, ADAPTERS.changes(state["base"]), strict=True)]
    return parts


def aggregate(method, vectors, state, examples=EXAMPLES, number=0, wire=()):
    """A round of clients that end at these vectors, over the wire; the next state and the measured error."""
    round, wire = made.round_of(examples, LAYOUT, number=number, adapters=ADAPTERS), Wire(wire)
    broadcast = method.broadcast(state, round)
    received = wire.arrive(wire.send(broadcast, round), round)
    sent = []
    for vector in vectors:
        tensors, _, _ = method.upload(Ended(vector, round), method.receive(received, round), {})
        if wire.lossy:
            tensors = tensors | {"model": tensors["model"] - received["model"]}
        sent.append(wire.decode(wire.encode(tensors, {}, round, 0)[0], round))
    folded = wire.finish(made.fold(sent, round, Mean()), broadcast, round)
    after = method.aggregate(state, folded, round)
    return after, method.diagnose(state, after, folded, round)


class Ended:
    """A client whose training has ended at some weights."""

    def __init__(self, weights, round):
        self.weights, self.round = weights, round


def off(found, expected):
    return max(
        (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item() for a, b in zip(found, expected, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("method", [FedEx(), Flora(), Flora(warm=True)])
def test_exact_rules_land_on_the_mean_of_the_products_round_after_round(method):
    state, before = {"model": draw(9)}, [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES.values()]
    for number in range(3):
        vectors = [draw(10 * number + client) for client in EXAMPLES]
        after, error = aggregate(method, vectors, state, number=number)
        expected = [b + m for b, m in zip(before, mean_product(vectors, EXAMPLES.values()), strict=True)]
        assert off(change(after), expected) < 1e-6
        assert error["error_max"] < 1e-6
        state = after
        before = [whole - own for whole, own in zip(change(state), product(state["model"]), strict=True)]


def test_fedex_keeps_the_averages_and_gives_the_base_what_they_lose():
    """Σ w (B_i − B̄) (A_i − Ā), which has rank (K − 1) r at most."""
    vectors, total = [draw(client) for client in EXAMPLES], sum(EXAMPLES.values())
    after, _ = aggregate(FedEx(), vectors, {"model": draw(9)})
    averaged, _ = aggregate(FedAvg(), vectors, {"model": draw(9)})
    assert torch.equal(after["model"], averaged["model"])
    centre = sum(n / total * v.double() for v, n in zip(vectors, EXAMPLES.values(), strict=True))
    lost = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES.values()]
    for vector, n in zip(vectors, EXAMPLES.values(), strict=True):
        lost = [a + n / total * b for a, b in zip(lost, product(vector.double() - centre), strict=True)]
    assert off(list(ADAPTERS.changes(after["base"])), lost) < 1e-6
    two, _ = aggregate(FedEx(), vectors[:2], {"model": draw(9)}, {0: 5, 1: 1})
    wide = next(iter(ADAPTERS.changes(two["base"])))
    assert torch.linalg.matrix_rank(wide, tol=1e-4) == RANK


# The change of the base


@pytest.mark.parametrize("ranks", [(2,), (1, 3, 2)], ids=["equal", "unequal"])
@pytest.mark.parametrize("method", [FedEx(), Flora(), Flora(warm=True)])
def test_the_base_is_factors_until_their_product_is_shorter(method, ranks):
    """Against the dense change, in float64 from the definition; its length is counted by hand."""
    shapes, rank, rounds = {"large": (40, 30), "long": (12, 90), "small": (5, 4)}, max(ranks), 6
    names = {
        f"{layer}.lora_{which}.default.weight": (rank, columns) if which == "A" else (rows, rank)
        for layer, (rows, columns) in shapes.items()
        for which in "AB"
    }
    layout = Layout(tuple(names), tuple(names.values()))
    what = Adapters(layout, SCALE, {}, shapes, ranks)
    held = [ranks[client % len(ranks)] for client in EXAMPLES]
    columns = {FedEx(): 3 * rank, Flora(): sum(held), Flora(warm=True): sum(held) - rank}[method]
    state = {"model": torch.randn(layout.size, generator=torch.Generator().manual_seed(0))}
    dense = [torch.zeros(shape, dtype=torch.float64) for shape in shapes.values()]
    forms = []
    for number in range(rounds):
        round = made.round_of(EXAMPLES, layout, number=number, adapters=what)
        vectors = []
        for client in EXAMPLES:
            vector = torch.randn(layout.size, generator=torch.Generator().manual_seed(10 * number + client))
            what.cut(vector, client)
            vectors.append(vector)
        state = method.aggregate(state, made.fold(vectors, round, Mean()), round)
        for layer, parts in enumerate(zip(*map(what.factors, [*vectors, state["model"]]), strict=True)):
            *each, (b, a) = [(b.double(), a.double()) for b, a in parts]
            mean = sum(n * b_i @ a_i for n, (b_i, a_i) in zip(EXAMPLES.values(), each, strict=True))
            dense[layer] += SCALE * (mean / sum(EXAMPLES.values()) - b @ a)
        k = (number + 1) * columns
        lengths = [min(k * (rows + width), rows * width) for rows, width in shapes.values()]
        assert len(state["base"]) == sum(lengths) <= sum(map(torch.numel, dense))
        assert method.growth(round, number + 1) == state["base"].nbytes
        sent = Wire().send(method.broadcast(state, round), round)
        assert counted(sent, frozenset()) == 4 * (layout.size + sum(lengths))
        assert off(list(what.changes(state["base"])), dense) < 1e-6
        half = what.changes(what.weakened_base(state["base"], 0.5))
        assert off(list(half), [each / 2 for each in dense]) < 1e-6
        forms.append([right is None for _, right in what.parts(state["base"])])
    assert forms[0][0] is False
    assert forms[-1][0] is True
    with pytest.raises(ValueError, match="is of other layers"):
        list(what.parts(torch.zeros(sum(map(torch.numel, dense)) + 1)))


@pytest.mark.parametrize("algorithm", ["fedex", "flora", "flora:warm=true"])
def test_a_base_of_factors_on_the_wire_and_in_checkpoints(toy_config, tmp_path, algorithm):
    """Two clients of rank 1: layers of 4 x 6 and 5 x 5 are factors of up to two columns, then dense."""
    config = toy_config(adapters=True, labels=2, ranks=(1,), algorithm=algorithm, rounds=4, checkpoints_total_limit=9)
    plan = prepare(config, Run(tmp_path / "none"))
    rows = list(fit(config, LocalPool(config), tmp_path / "run"))
    paths = sorted((tmp_path / "run/checkpoints").glob("*.safetensors"))
    a_round = 2 if algorithm == "flora" else 1
    lengths = [min(10 * a_round * rounds, 24) + min(10 * a_round * rounds, 25) for rounds in range(5)]
    assert [len(load_state(path, plan.layout).tensors["base"]) for path in paths] == lengths[1:]
    down = [4 * (plan.layout.size + length) for length in lengths[:4]]
    assert [row["clients"][0]["bytes_down"] for row in rows] == down
    planned = bytes_planned(config, plan)
    assert (planned.first, planned.down) == (down[0], down[-1])
    assert bytes_down_in_all(config, plan, planned, [2] * 4) == sum(row["bytes_down"] for row in rows)
    assert disk_needed(config, plan)["checkpoints"] == 10 * 4 * (plan.layout.size + lengths[4])
    assert max(row["aggregation"]["error_max"] for row in rows) < 1e-5


@pytest.mark.parametrize("method", [FedAvg(), FedEx(), Flora(), Flora(warm=True), SVD(), RoLoRA()])
def test_one_client_is_the_identity_and_order_does_not_matter(method):
    state, own = {"model": draw(9)}, draw(1)
    if method == RoLoRA():  # trains B alone
        own = joined(b=own, a=state["model"])
    after, _ = aggregate(method, [own], state, {2: 7})
    assert off(change(after), product(own)) < 1e-6
    if method in (FedAvg(), FedEx(), RoLoRA()):
        assert torch.equal(after["model"], own)
    vectors = {client: draw(client) for client in EXAMPLES}
    first, _ = aggregate(method, vectors.values(), state)
    renamed = {9 - client: n for client, n in EXAMPLES.items()}  # asked, and added, in the opposite order
    second, _ = aggregate(method, [vectors[9 - client] for client in sorted(renamed)], state, renamed)
    assert off(change(second), change(first)) < 1e-5


def joined(b, a):
    """A vector with the B of one and the A of another."""
    views, result = LAYOUT.views(b), a.clone()
    for name, view in LAYOUT.views(result).items():
        if ".lora_B." in name:
            view.copy_(views[name])
    return result


def test_rolora_trains_b_then_a_and_is_exact_in_each():
    state, sizes = {"model": draw(9)}, set()
    for number in range(4):
        start = state["model"]
        vectors = [draw(10 * number + client) for client in EXAMPLES]
        vectors = [joined(b=v, a=start) if number % 2 == 0 else joined(b=start, a=v) for v in vectors]
        after, error = aggregate(RoLoRA(), vectors, state, number=number)
        assert off(change(after), mean_product(vectors, EXAMPLES.values())) < 1e-6
        assert error["error_max"] < 1e-6
        frozen = ".lora_A." if number % 2 == 0 else ".lora_B."
        for name, view in LAYOUT.views(after["model"]).items():
            assert torch.equal(view, LAYOUT.views(start)[name]) == (frozen in name)
        state = after
        round = made.round_of(EXAMPLES, LAYOUT, number=number)
        (sent, _, _) = RoLoRA().upload(Ended(start, round), {}, {})
        sizes.add(len(sent["model"]))
    assert sum(sizes) == LAYOUT.size


@pytest.mark.parametrize("method", [FedEx(), Flora(warm=True), RoLoRA()])
def test_over_float16_the_same_to_its_rounding(method):
    state = {"model": draw(9)}
    vectors = [state["model"] + 0.1 * draw(client) for client in EXAMPLES]
    if method == RoLoRA():
        vectors = [joined(b=v, a=state["model"]) for v in vectors]
    exact, _ = aggregate(method, vectors, state)
    found, _ = aggregate(method, vectors, state, wire=(Float16(),))
    assert 0 < off(change(found), change(exact)) < 1e-3


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))


@pytest.mark.parametrize(("method", "kind"), [(Flora(), "cat"), (FedEx(), "cat"), (SVD(), "svd")])
def test_pefts_weighted_adapters_are_the_same(method, kind):
    """ "cat" stacks, "svd" takes the best factors of the stack."""
    peft_config = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=list(SHAPES))
    model = LoraModel(Layers(), peft_config, "client0")
    vectors, total = [draw(client) for client in EXAMPLES], sum(EXAMPLES.values())
    names = [f"client{index}" for index in range(len(vectors))]
    for name, vector in zip(names, vectors, strict=True):
        if name != "client0":
            model.peft_config[name] = peft_config
            inject_adapter_in_model(peft_config, model.model, name)
        with torch.no_grad():
            for key, view in LAYOUT.views(vector).items():
                model.model.get_parameter(key.replace(".default.", f".{name}.")).copy_(view)
    weights = [n / total for n in EXAMPLES.values()]
    model.add_weighted_adapter(names, weights, "mean", kind, **({"svd_rank": RANK} if kind == "svd" else {}))
    expected = [model.model.get_submodule(layer).get_delta_weight("mean").double() for layer in SHAPES]
    after, _ = aggregate(method, vectors, {"model": draw(9)})
    assert off(change(after), expected) < 1e-5


def test_what_rolora_freezes_keeps_its_bits_under_weight_decay_and_kept_moments(toy_config, tmp_path):
    config = toy_config(adapters=True, algorithm="rolora", keep_optimizer=True, adam_weight_decay=0.1, rounds=4)
    plan = prepare(config, Run(tmp_path / "none"))
    rows = list(fit(replace(config, checkpoints_total_limit=9), LocalPool(config), tmp_path / "run"))
    paths = sorted((tmp_path / "run/checkpoints").glob("*.safetensors"))
    states = [plan.initial, *(load_state(path, plan.layout).tensors["model"] for path in paths)]
    halves = [4 * sum(view.numel() for name, view in plan.layout.views(plan.initial).items() if kind in name)
              for kind in (".lora_B.", ".lora_A.")]  # fmt: skip
    for number, (before, after) in enumerate(pairwise(states)):
        frozen = ".lora_A." if number % 2 == 0 else ".lora_B."
        for (name, old), new in zip(
            plan.layout.views(before).items(), plan.layout.views(after).values(), strict=True
        ):  # fmt: skip
            assert torch.equal(old, new) == (frozen in name)
        assert rows[number]["bytes_up"] == 4 * halves[number % 2]
        assert rows[number]["bytes_down"] == 4 * sum(halves)
        assert rows[number]["aggregation"]["error_max"] < 1e-5
    assert rows[-1]["loss"] < rows[0]["loss"]


# Unequal ranks


UNEQUAL = Adapters(LAYOUT, SCALE, {}, SHAPES, (1, 3, 2))  # of clients 0, 3, 6 … 1, of clients 1, 4, 7 … 3


def padded(client, seed):
    """A client's adapters, zero beyond its rank, cut by hand."""
    vector = draw(seed)
    for name, view in LAYOUT.views(vector).items():
        (view if ".lora_A." in name else view.T)[(1, 3, 2)[client % 3] :] = 0
    return vector


def of_rank(examples, state, method, vectors=None):
    round = made.round_of(examples, LAYOUT, adapters=UNEQUAL)
    vectors = vectors or [padded(client, client) for client in examples]
    return method.aggregate(state, made.fold(vectors, round, Mean()), round)


def test_a_client_holds_the_first_rows_of_a_and_columns_of_b():
    for client in range(6):
        expected, held = padded(client, client), UNEQUAL.held(client)
        vector = draw(client)
        UNEQUAL.cut(vector, client)
        assert torch.equal(vector, expected)
        assert held is None if client % 3 == 1 else torch.equal(held, expected != 0)


@pytest.mark.parametrize("examples", [{0: 5, 1: 1, 2: 12, 4: 2}, {0: 3, 3: 4}, {1: 1, 4: 2}])
def test_rank_partitions_are_averaged_over_those_that_have_them(examples):
    """Where nobody has a block, the server's stays."""
    state = {"model": draw(9)}
    blocks = []
    for rank in range(3):  # one rank at a time: what ranks of one block have in common is their weights
        having = {client: n for client, n in examples.items() if (1, 3, 2)[client % 3] > rank}
        sources = {client: padded(client, client) for client in having} or {None: draw(9)}
        total = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES.values()]
        for client, vector in sources.items():
            share = having[client] / sum(having.values()) if having else 1
            views = LAYOUT.views(vector.double())
            for layer, name in enumerate(SHAPES):
                a, b = views[f"{name}.lora_A.default.weight"], views[f"{name}.lora_B.default.weight"]
                total[layer] += share * SCALE * torch.outer(b[:, rank], a[rank])
        blocks.append(total)
    for layer, (found, parts) in enumerate(
        zip(change(of_rank(examples, state, RaFLoRA())), zip(*blocks, strict=True), strict=True)
    ):  # fmt: skip
        u, s, v = torch.linalg.svd(sum(parts), full_matrices=False)
        best = u[:, :RANK] * s[:RANK] @ v[:RANK]
        assert torch.linalg.norm(found - best) < 1e-5 * torch.linalg.norm(best), layer


def test_with_equal_ranks_rank_partition_is_the_svd():
    vectors = [draw(client) for client in EXAMPLES]
    first, _ = aggregate(RaFLoRA(), vectors, {"model": draw(9)})
    second, _ = aggregate(SVD(), vectors, {"model": draw(9)})
    assert off(change(first), change(second)) < 1e-6


def test_what_only_some_have_fades_but_not_with_rank_partition():
    """No client learns anything. Of 4 equal clients 2 have rank 3, one 2: averages multiply rank 3 by (1/2)², SVD by ½.

    Ranks that cross no other: singular values 4, 2, 1 of each layer.
    """
    examples = {0: 1, 1: 1, 2: 1, 4: 1}
    start, rng = torch.zeros(LAYOUT.size), torch.Generator().manual_seed(0)
    for layer, (rows, columns) in SHAPES.items():
        left, right = (torch.linalg.qr(torch.randn(n, RANK, generator=rng)).Q for n in (rows, columns))
        roots = torch.tensor([4.0, 2.0, 1.0]).sqrt()
        views = LAYOUT.views(start)
        views[f"{layer}.lora_B.default.weight"].copy_(left * roots)
        views[f"{layer}.lora_A.default.weight"].copy_((right * roots).T)
    # shares of the weights that have ranks 1, 2, 3
    for method, factor in (
        (FedAvg(), (1, (3 / 4) ** 2, (1 / 2) ** 2)),
        (SVD(), (1, 3 / 4, 1 / 2)),
        (RaFLoRA(), (1,) * 3),
    ):
        state = {"model": start}
        for _ in range(3):
            vectors = []
            for client in examples:
                vector = state["model"].clone()
                UNEQUAL.cut(vector, client)
                vectors.append(vector)
            state = of_rank(examples, state, method, vectors)
        for found in change(state):
            values = torch.linalg.svdvals(found)[:RANK]
            expected = [SCALE * s * f**3 for s, f in zip((4, 2, 1), factor, strict=True)]
            assert values.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wire", ["float32", "float16"])
@pytest.mark.parametrize("algorithm", ["fedavg", "ffa", "svd", "raflora", "flora", "fedex"])
def test_clients_train_and_send_only_their_ranks(toy_config, tmp_path, algorithm, wire):
    config = toy_config(adapters=True, ranks=(1, 3, 2), algorithm=algorithm, wire=wire, rounds=2, adam_weight_decay=0.1)
    plan = prepare(config, Run(tmp_path / "none"))
    rows = list(fit(config, LocalPool(config), tmp_path / "run"))
    each = plan.layout.size * (2 if wire == "float16" else 4) // 3  # of one rank
    assert [client["bytes_up"] for client in rows[-1]["clients"]] == [each, 3 * each, 2 * each, each]
    if algorithm in ("flora", "fedex"):
        assert rows[-1]["aggregation"]["error_max"] < 1e-5


def test_a_client_of_a_small_rank_trains_as_if_all_had_it(toy_config):
    """Beside clients of rank 3, one of rank 1 sends what it would send if adapters had rank 1."""
    settings = dict(adapters=True, labels=2, train_batch_size=8, local_epochs=5, adam_weight_decay=0.1)
    large, small = toy_config(ranks=(1, 3), **settings), toy_config(ranks=(1,), **settings)
    sent = []
    base = LocalPool(large).worker.learner.network
    for config in (large, small):
        plan, worker = make_plan(config), LocalPool(config).worker
        for layer, source in zip(worker.learner.network.values(), base.values(), strict=True):
            layer.base_layer.weight.data.copy_(source.base_layer.weight)
        start = plan.initial if config is large else sent[0][0]
        round = plan.round(config, 0)
        down = Shared({"model": start.numpy()}, round)
        _, trained = client_update(worker, down, TrainJob(0, 0, plan.shards[0], plan.held_out[0]))
        held = plan.adapters.held(0)
        sent.append((start if held is None else start[held], trained.payload["model"]))
    assert not torch.equal(sent[0][0], torch.from_numpy(sent[0][1]))
    assert sent[0][1] == pytest.approx(sent[1][1], abs=1e-6)


@pytest.mark.parametrize(("method", "refused"), [("rolora", "sends other tensors the next time"), ("fedex", None)])
def test_error_feedback_needs_the_same_tensors_every_round(photos, method, refused):
    task = replace(PRESETS["digits-lora"].task, train_data_dir=str(photos))
    config = replace(PRESETS["digits-lora"], task=task, algorithm=method, wire="feedback:topk:0.25")
    if refused is None:
        config.check()
    else:
        with pytest.raises(UserError, match=refused):
            config.check()
