"""FedProx against numbers worked out by hand, and μ as it follows the loss."""

import made
import numpy as np
import pytest
import torch
from runs import sha, train, trained_client
from toy import Linear

from fedray.algorithms.fedprox import AdaptiveFedProx
from fedray.config import Config
from fedray.errors import UserError
from fedray.menus import ALGORITHMS
from fedray.record.run import Run


def full_batches(algorithm, epochs, **changes):
    """Plain SGD on both examples at once, without clipping."""
    settings = dict(
        task=Linear(), clients=1, local_epochs=epochs, train_batch_size=2, optimizer="sgd", learning_rate=0.5,
        max_grad_norm=None, evaluate_samples=0, actors=0,
    )  # fmt: skip
    return Config(algorithm=algorithm, **(settings | changes))


def moved(algorithm, epochs, **down):
    _, trained = trained_client(full_batches(algorithm, epochs), down)
    return (trained.payload["model"].reshape(2, 2) - np.array(Linear().w)).tolist(), trained.payload["model"]


def loss_at(vector):
    x, t = np.array(Linear().x), np.array(Linear().t)
    return np.abs(x @ vector.reshape(2, 2) - t).sum(1).mean()


def test_two_steps_with_and_without_the_pull():
    change, vector = moved("fedprox:0", 2)
    assert (change, loss_at(vector)) == ([[0.5, 0.5], [1, 1]], 1.5)
    change, vector = moved("fedprox:1", 2)
    assert (change, loss_at(vector)) == ([[0.375, 0.375], [0.75, 0.75]], 2.125)


def test_the_first_step_does_not_feel_it():
    assert moved("fedprox:0", 1)[0] == moved("fedprox:5", 1)[0] == [[0.25, 0.25], [0.5, 0.5]]


def test_the_adaptive_one_pulls_by_the_mu_that_it_received():
    for mu in (0.0, 1.0):
        assert moved("fedprox-adaptive", 2, mu=torch.tensor([mu]))[0] == moved(f"fedprox:{mu:g}", 2)[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_mu_0_is_averaging_bit_for_bit(toy_config, tmp_path, optimizer):
    shas = set()
    for name in ("fedavg", "fedprox:0"):
        train(toy_config(algorithm=name, optimizer=optimizer, evaluate_samples=0), tmp_path / name)
        shas.add(sha(tmp_path / name))
    assert len(shas) == 1
    train(toy_config(algorithm="fedprox:1", optimizer=optimizer, evaluate_samples=0), tmp_path / "pulled")
    assert sha(tmp_path / "pulled") not in shas


def mus(algorithm, losses, examples=(1, 3)):
    """μ after each round; the losses are means of two clients', weighted by their examples."""
    round, server = made.round_of(dict(enumerate(examples))), None
    server = algorithm.init(torch.zeros(2), round.layout)
    for loss in losses:
        rows = [{"examples": n, "steps": 1, "loss": loss + d} for n, d in zip(examples, (0.3, -0.1), strict=True)]
        server = algorithm.aggregate(server, made.fold([torch.zeros(2)] * 2, round, rows=rows), round)
        yield pytest.approx(algorithm.broadcast(server, round)["mu"].item(), abs=1e-6)


def test_mu_follows_the_loss():
    assert list(mus(AdaptiveFedProx(), [1, 2, 3, 3, 4])) == [0, 0.1, 0.2, 0.2, 0.3]
    falling = [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # the fifth fall is in the sixth round, the tenth in the eleventh
    assert list(mus(AdaptiveFedProx(1.0), falling)) == [1] * 5 + [0.9] * 5 + [0.8]
    interrupted = [10, 9, 8, 7, 6, 7, 6, 5, 4, 3, 2]  # four falls, a rise, five falls
    assert list(mus(AdaptiveFedProx(1.0), interrupted)) == [1] * 5 + [1.1] * 5 + [1.0]
    level = [10, 9, 8, 8, 7, 6, 5, 4, 3]
    assert list(mus(AdaptiveFedProx(0.05), level)) == [0.05] * 8 + [0]  # never below 0


def test_mu_of_a_run_is_in_its_rows_and_counts_four_bytes(toy_config, tmp_path):
    """With a learning rate that diverges, losses rise."""
    config = toy_config(
        algorithm="fedprox-adaptive:change=0.001", optimizer="sgd", learning_rate=17.0, max_grad_norm=None, rounds=3,
        evaluate_samples=0,
    )  # fmt: skip
    rows = train(config, tmp_path / "run")
    assert rows[0]["loss"] < rows[1]["loss"] < rows[2]["loss"]
    assert [row["aggregation"]["mu"] for row in rows] == pytest.approx([0, 0.001, 0.002])
    assert {client["bytes_down"] for client in rows[0]["clients"]} == {16 * 4 + 4}
    import fedray

    frame = fedray.load(tmp_path / "run").rounds
    assert frame["aggregation.mu"].tolist() == pytest.approx([0, 0.001, 0.002])
    assert Run.open(tmp_path / "run").saved["config"]["algorithm"] == "fedprox-adaptive:change=0.001"


def test_what_it_refuses():
    with pytest.raises(UserError, match="algorithm 'fedprox:-1': mu is -1.0; it must be not negative"):
        ALGORITHMS.parse("fedprox:-1")
    with pytest.raises(UserError, match="algorithm 'fedprox' is not of the form 'fedprox:mu'"):
        ALGORITHMS.parse("fedprox")
