"""The model of scale: what it says in cases that can be worked out by hand, and beside what was measured."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("model_of_scale", ROOT / "experiments/cluster/model.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def free(model):
    """Constants of a machine on which nothing but training takes time."""
    return model.Constants(*[0.0] * len(model.Constants.__dataclass_fields__))


def test_training_alone(model):
    for nodes, actors, cohort, rounds in ((1, 1, 12, 12), (3, 1, 12, 4), (2, 4, 16, 2), (1, 4, 5, 2)):
        cluster = model.Cluster(nodes, actors, 1000, cohort, seconds=2.0)
        assert model.simulate(cluster, free(model))["round"] == pytest.approx(2.0 * rounds)


@pytest.mark.parametrize("merged", [True, False])
def test_transfer_alone(model, merged):
    """Vectors of 4 bytes a weight to all nodes but the driver's; one partial of 8 from each, as each has one block."""
    slow = replace(free(model), transfer=1e-3)
    cluster = model.Cluster(5, 1, 1000, 5, seconds=2.0, merged=merged)
    found = model.simulate(cluster, slow)
    assert found["down"] == pytest.approx(4 * 4.0)
    assert found["network"] == pytest.approx(4 * 4.0 + 4 * 8.0)
    # Not merged, partials come as nodes end: the first while others still wait for the vector.
    assert found["round"] == pytest.approx(4 * 4.0 + 2 + 4 * 8.0 if merged else 4 * 4.0 + 4 * 8.0)


def test_a_partial_from_each_node_or_from_each_block(model):
    slow = replace(free(model), transfer=1e-3)
    cluster = model.Cluster(2, 1, 1000, 40, seconds=2.0)  # longer than a block: a client each
    merged = model.simulate(cluster, slow)
    apart = model.simulate(replace(cluster, merged=False), slow)
    assert merged["network"] == pytest.approx(4 + 8)
    blocks = (apart["network"] - 4) / 8
    assert 10 < blocks < 40
    assert blocks == pytest.approx(round(blocks))


def test_the_drivers_own_time(model):
    """Blocks that take it longer than actors train: these wait, and the driver's time is the round's."""
    busy = replace(free(model), block=1.0)
    found = model.simulate(model.Cluster(1, 100, 1000, 300, seconds=2.0), busy)
    assert found["driver"] == pytest.approx(300)
    assert found["round"] == pytest.approx(300 + 2)


def test_the_model_is_that_of_what_was_measured(model):
    """Within a fifth, on 1, 2 and 3 nodes."""
    kept = json.loads((ROOT / "experiments/cluster/model.json").read_text())
    constants = model.Constants(**kept["constants"])
    assert {row["nodes"] for row in kept["check"]} == {1, 2, 3}
    for row in kept["check"]:
        found = model.simulate(model.here(row, constants), constants)["round"]
        assert found == pytest.approx(row["model"])
        assert abs(found / row["measured"] - 1) < 0.2, row


def test_the_page_has_the_models_numbers(model):
    kept = json.loads((ROOT / "experiments/cluster/model.json").read_text())
    page = (ROOT / "docs/scale.md").read_text()
    for line in model.lines(model.table(model.Constants(**kept["constants"]))):
        assert line in page
    for row in kept["check"]:
        assert f"| {row['nodes']} | {row['weights']:,} | {row['measured']:.2f} s | {row['model']:.2f} s |" in page
    assert re.search(r"!\[.*\]\(scale\.png\)", page)
