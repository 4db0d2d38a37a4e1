"""Watching a run: what actors print reaches its directory, and its numbers the metrics that the board asks for."""

import json
import re
from pathlib import Path

import pytest
from runs import train

import fedray
from fedray.cluster import logs, metrics
from fedray.cluster.logs import Log, Printed, printed
from fedray.record import logs as written
from fedray.record.run import Run

BOARD = Path(__file__).parents[2] / "experiments/cluster/grafana.json"


def test_lines_are_read_once_and_whole(tmp_path):
    out, err = tmp_path / "worker-1.out", tmp_path / "worker-1.err"
    out.write_text(":job_id:01\n:actor_name:ClientActor\none\ntw")
    err.write_text("a warning\n")
    text, read = printed(str(err), (0, 0))
    assert text == "one\na warning\n"
    with out.open("a") as file:
        file.write("o\nthe rest of a line")
    text, read = printed(str(err), read)
    assert text == "two\n"
    assert printed(str(err), read) == Printed("", read)
    text, read = printed(str(err), read, last=True)
    assert text == "the rest of a line\n"
    assert read == (out.stat().st_size, err.stat().st_size)
    out.unlink()
    assert printed(str(err), read) == Printed("", read)
    assert printed("", (3, 4)) == printed("pipe:[1234]", (3, 4)) == Printed("", (3, 4))


def test_of_what_is_printed_too_fast_the_end_is_kept(tmp_path):
    out, err = tmp_path / "worker-1.out", tmp_path / "worker-1.err"
    err.touch()
    lines = [f"line {number:05d}\n" for number in range(10_000)]
    out.write_text("".join(lines))
    text, (read, _) = printed(str(err), (0, 0))
    assert read == out.stat().st_size
    first, *rest = text.splitlines(keepends=True)
    assert first == f"… {out.stat().st_size - logs.MOST:,} bytes left out …\n"
    assert rest[1:] == lines[-len(rest) + 1 :]
    assert sum(map(len, rest)) == logs.MOST


def test_what_nobody_takes_does_not_grow():
    log = Log("actor-0")
    for _ in range(100):
        log.hear(Printed("x" * 999 + "\n", (0, 0)))
    assert len(log.take()) == logs.KEPT
    assert log.take() == ""


def test_logs_are_bounded_and_not_written_through_links(tmp_path, monkeypatch):
    monkeypatch.setattr(written, "MOST", 1000)
    run, private = Run(tmp_path / "run"), tmp_path / "private"
    run.directory.mkdir()
    for number in range(100):
        written.write(run, {"actor-0": f"{number:099d}\n"})
    found = {path.name: path.read_text() for path in (run.directory / "logs").iterdir()}
    assert set(found) == {"actor-0.log", "actor-0.log.1"}
    assert all(len(text) <= 1100 for text in found.values())
    last = (found["actor-0.log.1"] + found["actor-0.log"]).split()
    assert [int(line) for line in last] == list(range(100 - len(last), 100))
    (run.directory / "logs/actor-1.log").symlink_to(private)
    written.write(run, {"actor-1": "to a link\n"})
    assert not private.exists()


@pytest.mark.slow
def test_what_clients_print_reaches_the_run(ray, toy_config, tmp_path):
    """Also the last words of a process that ends, and not what the command line prints."""
    config = toy_config(chatty=(0, 1), deadly=(3,), actors=2, rounds=1)
    out = tmp_path / "run"
    fedray.run(config, out)
    found = {path.name: path.read_text() for path in (out / "logs").iterdir()}
    assert set(found) <= {"actor-0.log", "actor-1.log", "driver.log"}
    actors = found["actor-0.log"] + found["actor-1.log"]
    batches = 2 * 3  # epochs, batches of a client
    assert actors.count("a line of a client's {0}") == actors.count("a line of a client's {1}") == batches
    assert "UserWarning: a warning of a client's" in actors
    assert actors.count("an error that a client logs") == 2 * batches
    assert actors.count("the camera is on fire") == 3  # processes that it ends
    assert actors.count("--- on node ") >= 2 + 3 - 1  # of the last, the run may not wait for the start
    assert ":actor_name:" not in actors


def rows_of(config, out):
    train(config, out)
    return Run.open(out).rows


def test_every_metric_has_its_number(toy_config, tmp_path):
    rows = rows_of(toy_config(), tmp_path / "run")
    row = rows[0] | {"nodes": {"abc": {"actors": 2, "clients": 4, "seconds": 1.5}}, "seconds": {"round": 2.0}}
    assert metrics.counted(row).keys() == metrics.COUNTERS.keys()
    assert metrics.measured(row).keys() == metrics.GAUGES.keys()
    assert metrics.at_nodes(row) == {"abc": {"fedray_busy_seconds": 1.5, "fedray_waiting_seconds": 2.5}}
    assert metrics.BY_NODE.keys() == metrics.at_nodes(row)["abc"].keys()
    assert metrics.measured(row)["fedray_clients_per_second"] == 4 / 2
    assert metrics.counted(row)["fedray_up_bytes"] == 4 * 16 * 4  # clients, values of four bytes


def test_rounds_are_counted_once(toy_config, tmp_path, monkeypatch):
    """Those of before are not counted by a run that is resumed; those that were missed are, when a tracker restarts."""
    counts = {}

    class Fake:
        def __init__(self, name, about, tags):
            self.name = name

        def set_default_tags(self, tags):
            assert tags == {"run": "here"}
            return self

        def inc(self, value, tags=None):
            assert value > 0
            counts[self.name] = counts.get(self.name, 0) + value

        def set(self, value):
            counts[self.name] = value

    class Broken(metrics.Metrics):
        failed = 0

        def log(self, entry):
            if entry.round == 4 and not self.failed:
                self.failed = entry.round
                raise OSError("the agent is gone")
            super().log(entry)

    monkeypatch.setattr(metrics, "Counter", Fake)
    monkeypatch.setattr(metrics, "Gauge", Fake)
    config, out = toy_config(rounds=6), tmp_path / "run"
    train(config, out, rounds=2)
    before = len(Run(out).rows)
    with pytest.warns(UserWarning, match="Broken shows no new rounds"):
        train(config, out, resume=True, report_to=[broken := Broken("here")])
    rows = Run(out).rows
    assert broken.failed == 4
    assert counts["fedray_rounds"] == 6 - before
    assert counts["fedray_clients"] == 4 * (6 - before)
    assert counts["fedray_down_bytes"] == sum(row["bytes_down"] for row in rows[before:])
    assert counts["fedray_loss"] == rows[5]["loss"]


def exported():
    """The names that Prometheus reads: Ray puts `ray_` before all, and `_total` after counters."""
    return {f"ray_{name}_total" for name in [*metrics.COUNTERS, *metrics.BY_NODE]} | {
        f"ray_{name}" for name in metrics.GAUGES
    }


def queries():
    board = json.loads(BOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_board_asks_for_what_is_exported():
    asked = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert asked == exported()
    for query in queries():
        assert 'run=~"$run"' in query


def test_the_board_is_one_that_grafana_takes():
    """What Grafana's import needs: an input for the data source, which each panel uses; no panel lies on another."""
    board = json.loads(BOARD.read_text())
    (source,) = board["__inputs"]
    assert (source["type"], source["pluginId"]) == ("datasource", "prometheus")
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells = set()
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${" + source["name"] + "}"}
        at = panel["gridPos"]
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells
        assert at["x"] + at["w"] <= 24
        cells |= covered
