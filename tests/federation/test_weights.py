"""What clients count for in means: their examples, or all alike."""

from dataclasses import replace

import numpy as np
import pytest
from runs import train

import fedray
from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.plan import make_plan
from fedray.record.run import Run


def test_means_by_examples_and_of_all_alike(toy_config, tmp_path):
    """Against the models that clients make alone."""
    config = toy_config(rounds=1, partition="quantity:0.5", evaluate_samples=0)
    plan = make_plan(config)
    sizes = [len(plan.shards[client]) for client in range(4)]
    assert len(set(sizes)) > 1
    assert [plan.round(config, 0).weights[client] for client in range(4)] == sizes
    assert set(plan.round(replace(config, weights="uniform"), 0).weights.values()) == {1}

    def model(name, **changes):
        train(replace(config, **changes), tmp_path / name)
        return Run.open(tmp_path / name).state(plan.layout).tensors["model"].double().numpy()

    alone = [model(f"alone-{client}", only_client=client) for client in range(4)]
    np.testing.assert_allclose(model("examples"), np.average(alone, axis=0, weights=sizes), rtol=1e-6)
    np.testing.assert_allclose(model("uniform", weights="uniform"), np.mean(alone, axis=0), rtol=1e-6)
    frame = fedray.load(tmp_path / "examples", tmp_path / "uniform").rounds
    assert frame["weights"].tolist() == ["examples", "uniform"]
    assert Run.open(tmp_path / "uniform").saved["config"]["weights"] == "uniform"


def test_nonsense_is_refused_and_a_resumed_run_keeps_them(toy_config, tmp_path):
    with pytest.raises(UserError, match="there is no kind of weights 'unifrom'; did you mean 'uniform'"):
        Config(local_epochs=1, weights="unifrom").check()
    config = toy_config(evaluate_samples=0)
    train(config, tmp_path / "run", rounds=1)
    with pytest.raises(UserError, match="--weights is uniform now, but was examples when the run began"):
        train(replace(config, weights="uniform"), tmp_path / "run", resume=True)
