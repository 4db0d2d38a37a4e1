"""Where the seconds of rounds on two actors went."""

import math

import pytest

import fedray


@pytest.mark.slow
def test_on_two_actors_of_which_one_is_slow(ray, toy_config, tmp_path):
    """Client 0 sleeps 0.9 seconds, client 1 does not: the mean trains for half of it, and half is waited for."""
    config = toy_config(actors=2, labels=2, slow=(0,), pause=0.3, local_epochs=1, rounds=2)
    rows = fedray.run(config, tmp_path / "run").rows
    assert {client["actor"] for client in rows[-1]["clients"]} == {"actor 0", "actor 1"}
    for row in rows:
        seconds = dict(row["seconds"])
        total = seconds.pop("round")
        beside = [seconds.pop(name, 0.0) for name in ("save", "evaluate")]
        assert min(*beside, *seconds.values()) >= 0
        assert math.fsum(seconds.values()) == pytest.approx(total, rel=1e-9)
        assert seconds["training"] >= math.fsum(client["seconds"] for client in row["clients"]) / 2 >= 0.45
        if len({client["actor"] for client in row["clients"]}) == 2:
            one, other = (client["seconds"] for client in row["clients"])
            assert seconds["waiting"] + seconds["transfer"] >= 0.9 * abs(one - other) / 2
