"""Run directories as tables, compared with plain Python over their rows; and what is said of damaged ones."""

import json
import math
import os
import statistics
from dataclasses import replace

import made
import pandas as pd
import pytest

import fedray
from fedray.data.partition import Dirichlet
from fedray.errors import UserError
from fedray.record.run import Run
from fedray.reports.results import finals, load, scores_of, settings_of, varied, write
from fedray.reports.tables import by_setting, cells, pivot, to_latex, to_markdown


def rows_of(directory):
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture
def out(tmp_path):
    """C × E over three seeds, of which C = 4, E = 2 has one."""
    changes = [
        {"clients": clients, "local_epochs": epochs, "seed": seed}
        for clients in (2, 4) for epochs in (1, 2) for seed in (0, 1, 2)
        if (clients, epochs) != (4, 2) or seed == 0
    ]  # fmt: skip
    return made.sweep(tmp_path / "out", changes, score)


def score(clients, local_epochs, seed):
    return clients / local_epochs + (seed - 1) ** 2 * 0.3 + seed * 0.05


def test_a_row_per_run_and_round_with_its_numbers(out):
    rounds, problems = load(out)
    assert problems == []
    assert len(rounds) == 10 * 3
    for directory in rounds["directory"].unique():
        run, mine = Run.open(directory), rounds[rounds["directory"] == directory]
        assert mine["run"].unique().tolist() == [run.directory.name]
        assert mine["sha256"].unique().tolist() == [run.config.sha256]
        steps = images = payload = 0
        seconds = 0.0
        for row, (_, found) in zip(rows_of(run.directory), mine.iterrows(), strict=True):
            steps += row["sequential_steps"]
            images += row["images"]
            payload += row["bytes_down"] + row["bytes_up"]
            slowest = 0.02 * row["sequential_steps"] + (run.config.clients - 1) / 10  # as made.row has it
            seconds += slowest
            for name in ("round", "loss", "steps", "sequential_steps", "images", "bytes_down", "bytes_up"):
                assert found[name] == row[name]
            assert found["training_seconds"] == pytest.approx(slowest)
            assert found["seconds.fold"] == 0.01
            assert (found["total.sequential_steps"], found["total.images"]) == (steps, images)
            assert found["total.bytes"] == payload
            assert found["total.training_seconds"] == pytest.approx(seconds)
        for name in ("clients", "seed", "partition", "learning_rate", "keep_optimizer"):
            assert mine[name].iloc[0] == run.saved["config"][name]
        assert mine["task.resolution"].iloc[0] == run.config.task.resolution
        assert json.loads(mine["task.block_out_channels"].iloc[0]) == list(run.config.task.block_out_channels)
        assert mine["fd[digits]"].isna().tolist() == [True, True, False]
        last = rows_of(run.directory)[-1]["scores"]["fd[digits]"]
        assert mine[["fd[digits]", "fd[digits].n", "fd[digits].std"]].iloc[-1].tolist() == [last["value"], 512, 0.25]


def test_types(out):
    rounds = load(out).rounds
    assert rounds["seed"].dtype == rounds["local_steps"].dtype == rounds["fd[digits].n"].dtype == "Int64"
    assert rounds["evaluate_every"].dtype == rounds["only_client"].dtype == "Int64"  # though no run has a value
    assert rounds["total.bytes"].dtype == "Int64"
    assert rounds["loss"].dtype == rounds["max_grad_norm"].dtype == rounds["total.training_seconds"].dtype == "float64"
    assert rounds["complete"].dtype == rounds["keep_optimizer"].dtype == "boolean"
    assert rounds["partition"].dtype == rounds["inception_weights"].dtype == rounds["sha256"].dtype == "string"
    assert "task" not in rounds
    assert "held_out.global" not in rounds
    assert scores_of(rounds) == ["fd[digits]", "plain"]


def test_groups_of_numbers_have_their_columns(tmp_path):
    row = made.row(1, held_out={"local": 1.0, "global": 2.5, "aggregated": None, "spread": 0.5, "clients": {"0": 2.5}})
    row["aggregation"] = {"error_mean": 0.25, "error_max": 0.5}
    row["seconds"]["evaluate"] = 3.5
    made.run(tmp_path / "run", made.config(rounds=1), [row])
    found = load(tmp_path / "run").rounds.iloc[0]
    assert found[["held_out.local", "held_out.global", "held_out.spread"]].tolist() == [1.0, 2.5, 0.5]
    assert pd.isna(found["held_out.aggregated"])
    assert "held_out.clients" not in found
    assert found[["aggregation.error_mean", "aggregation.error_max", "seconds.evaluate"]].tolist() == [0.25, 0.5, 3.5]


def test_any_place_finds_a_run_once(out, tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    inner = made.run(tmp_path / "deep/er/run", made.config(seed=9))
    made.run(inner / "model/another", made.config(seed=10))  # below a run nothing is looked for
    made.run(tmp_path / ".hidden/run", made.config(seed=11))
    one = next(path for path in out.iterdir() if path.is_dir())
    assert load(tmp_path).rounds["directory"].nunique() == 11
    assert load(inner, out, one, tmp_path).rounds["directory"].nunique() == 11
    assert load(one).rounds["run"].unique().tolist() == [one.name]
    assert load(out).rounds["directory"].unique().tolist() == sorted(
        str(path) for path in out.iterdir() if path.is_dir()
    )


def test_clients_that_were_left_out_are_told(tmp_path, toy_config):
    config = toy_config(failing=(1,), rounds=2, client_retries=1)
    fedray.run(config, tmp_path / "run")
    rounds, problems = load(tmp_path)
    assert problems == [
        f"in the run {tmp_path / 'run'} clients were left out of 2 of 2 rounds (client 1: ValueError: this client's "
        f"camera is broken)."
    ]
    for name, count in {"asked": 4, "folded": 3, "retried": 1, "failed": 1, "actors_lost": 0, "nodes_lost": 0}.items():
        assert rounds[f"ledger.{name}"].tolist() == [count] * 2
    seconds = [
        sum(loss["seconds"] for loss in row["lost"]) + row["clients"][1]["seconds"] for row in rows_of(tmp_path / "run")
    ]
    assert rounds["ledger.seconds_lost"].tolist() == pytest.approx(seconds)


def test_mixed_runs_share_a_frame(tmp_path, toy_config):
    made.run(tmp_path / "ddpm", made.config(seed=3))
    made.run(tmp_path / "lora", replace(fedray.PRESETS["digits-lora"], rounds=2))
    made.run(tmp_path / "unscored", made.config(evaluate_samples=0), [made.row(number) for number in (1, 2, 3)])
    fedray.run(toy_config(rounds=2), tmp_path / "own")  # a task that is not fedray's, really run
    older = {key: value for key, value in made.config().to_json().items() if key != "wire"} | {"ema_decay": 0.5}
    made.run(tmp_path / "older", older)
    rounds, problems = load(tmp_path)
    assert all(problem.startswith("the runs are of 2 ") for problem in problems)
    runs = rounds.drop_duplicates("run").set_index("run")
    assert runs["task.name"].loc[["ddpm", "lora", "older", "own"]].tolist() == ["ddpm", "lora", "ddpm", "toy"]
    assert runs["task.rank"].dropna().to_dict() == {"lora": 8}
    assert runs["task.lora_alpha"].dtype == "float64"
    assert runs.index[runs["wire"].isna()].tolist() == ["older"]
    assert runs.loc["older", "ema_decay"] == 0.5
    assert json.loads(runs.loc["own", "task.failing"]) == []
    own = Run.open(tmp_path / "own")
    assert rounds[rounds["run"] == "own"]["loss"].tolist() == [row["loss"] for row in own.rows]
    totals = finals(rounds).set_index("run")
    assert totals.loc["own", "total.sequential_steps"] == own.result["sequential_steps"]
    assert totals.loc["own", "total.bytes"] == own.result["bytes_down"] + own.result["bytes_up"]
    assert totals.index[totals["fd[digits]"].isna()].tolist() == ["own", "unscored"]


def test_numbers_beyond_64_bits_and_mixed_values(tmp_path):
    for name, changes in {"a": {"seed": 2**70}, "b": {"learning_rate": 1}}.items():
        made.run(tmp_path / name, made.config(**changes))
    settings = made.config().to_json()
    made.run(tmp_path / "c", settings | {"task": settings["task"] | {"own": 1}})
    made.run(tmp_path / "d", settings | {"task": settings["task"] | {"own": {"b": [1], "a": None}}})
    runs = load(tmp_path).rounds.drop_duplicates("run")
    assert runs["seed"].tolist() == [str(2**70), "0", "0", "0"]
    assert runs["learning_rate"].tolist() == [4e-3, 1.0, 4e-3, 4e-3]
    assert runs["task.own"].fillna("").tolist() == ["", "", "1", '{"b": [1], "a": null}']


def test_a_metric_may_have_the_name_of_a_column(tmp_path):
    rows = [made.row(1, loss=3.0, scores=made.scores(7.0, "loss"))]
    made.run(tmp_path / "run", made.config(rounds=1), rows)
    rounds = load(tmp_path).rounds
    assert rounds["loss"].tolist() == [3.0]
    assert rounds["score.loss"].tolist() == [7.0]
    assert scores_of(rounds) == ["score.loss", "plain"]


# What is damaged or missing


def damage_line(run):
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text(lines[0] + lines[1].replace(":", ";", 1) + lines[2])


def cut_last_line(run):
    text = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(text[:-40])


def lose_a_line(run):
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text(lines[0] + lines[2])


def lose_the_end(run):
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text(lines[0])


def change(run, **values):
    lines = [json.dumps(json.loads(line) | values) for line in (run / "rounds.jsonl").read_text().splitlines()]
    (run / "rounds.jsonl").write_text("\n".join(lines))


def stop(run, name=None, reason=""):
    (run / "result.json").unlink()
    (run / "rounds.jsonl").write_text((run / "rounds.jsonl").read_text().splitlines(keepends=True)[0])
    if name:
        (run / name).write_text(reason)


def lose_config(run):
    (run / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "left", "said"),
    [
        (damage_line, 1, "rounds.jsonl is damaged at line 2; the rounds before it are read"),
        (cut_last_line, 2, "rounds.jsonl is damaged at line 3"),
        (lose_a_line, 1, "rounds.jsonl is damaged at line 2"),
        (lose_the_end, 1, "rounds.jsonl has 1 of the 3 rounds of a complete run"),
        (lambda run: (run / "rounds.jsonl").write_bytes(b"\xff\xfe\x00[]"), 0, "rounds.jsonl is damaged at line 1"),
        (lambda run: (run / "rounds.jsonl").write_text("[]\n"), 0, "rounds.jsonl is damaged at line 1"),
        (lambda run: change(run, loss=None), 0, "rounds.jsonl is damaged at line 1"),
        (lambda run: change(run, scores={"fd": 3}), 0, "rounds.jsonl is damaged at line 1"),
        (lambda run: change(run, clients=[{"seconds": "long"}]), 0, "rounds.jsonl is damaged at line 1"),
        (lambda run: (run / "config.json").write_text('{"config": {'), 0, "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"act_fn": "silu"}'), 0, "config.json is not the configuration"),
        (lambda run: (run / "config.json").write_text("[1]"), 0, "config.json is not the configuration"),
        (lose_config, 0, "has rounds but no config.json"),
        (stop, 1, "is not complete: it stands after round 1 of 3"),
        (lambda run: stop(run, "failed.txt", "no model.\n"), 1, "failed after round 1 of 3: no model."),
        (lambda run: stop(run, "stopped.txt", "ASHA\n"), 1, "was stopped early after round 1 of 3: ASHA."),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_and_the_rest_loads(tmp_path, harm, left, said):
    good = made.run(tmp_path / "good", made.config(seed=1))
    bad = made.run(tmp_path / "bad")
    harm(bad)
    rounds, problems = load(tmp_path)
    assert rounds["run"].value_counts().to_dict() == {"good": 3} | ({"bad": left} if left else {})
    assert len(problems) == 1, problems
    assert said in problems[0]
    assert str(bad) in problems[0]
    assert problems[0].endswith(".")
    assert finals(rounds)["directory"].tolist() == [str(good)]
    assert rounds[rounds["run"] == "bad"]["complete"].tolist() == [False] * left


def test_trials_of_a_sweep_that_are_not_there(out):
    trials = json.loads((out / "made.sweep.json").read_text())["trials"]
    gone, empty, failed, stopped = (out / trial["directory"] for trial in trials[:4])
    for path in (gone, empty, failed, stopped):
        for file in path.iterdir():
            file.unlink()
    gone.rmdir()
    (failed / "failed.txt").write_text("its process ended\n")
    (stopped / "stopped.txt").write_text("ASHA stopped it after round 2\n")
    rounds, problems = load(out)
    assert rounds["directory"].nunique() == 6
    assert sorted(problems) == sorted(
        [
            f"the trial {gone} of made.sweep.json has not begun.",
            f"the trial {empty} of made.sweep.json has not begun.",
            f"the trial {failed} failed: its process ended.",
            f"the trial {stopped} was stopped early: ASHA stopped it after round 2.",
        ]
    )
    (out / "made.sweep.json").write_text("{")
    assert any("made.sweep.json is damaged" in problem for problem in load(out).problems)


def test_what_runs_should_have_in_common(tmp_path):
    made.run(tmp_path / "a", made.config(seed=0))
    made.run(tmp_path / "b", made.config(seed=1))
    assert load(tmp_path).problems == []
    made.run(tmp_path / "c", made.config(seed=2), versions={"fedray": "0.2.0"})
    assert load(tmp_path).problems == ["the runs are of 2 versions of fedray: 0.1.0 (2 runs), 0.2.0 (1 run)."]
    made.run(tmp_path / "old", made.config(seed=4), versions=None)
    assert "None (1 run)" in load(tmp_path / "a", tmp_path / "old").problems[0]
    made.run(tmp_path / "d", made.config(seed=3), git_commit="4" * 40 + "-dirty", images_sha256="5" * 64)
    assert load(tmp_path / "a", tmp_path / "d").problems == [
        "the runs are of 2 git commits of fedray: 333333333333 (1 run), 444444444444-dirty (1 run).",
        "the runs are of 2 sets of images: 111111111111 (1 run), 555555555555 (1 run).",
    ]


def test_nothing_there(tmp_path):
    rounds, problems = load(tmp_path)
    assert problems == [f"{tmp_path} holds no runs."]
    assert rounds.empty
    assert {"directory", "seed", "round", "loss", "total.bytes"} <= set(rounds)
    assert rounds["seed"].dtype == "Int64"
    assert finals(rounds).empty
    write(rounds, tmp_path)
    pd.testing.assert_frame_equal(load(tmp_path).rounds, rounds)
    with pytest.raises(UserError, match=r"there are no results at .*nowhere: it does not exist\."):
        load(tmp_path / "nowhere")
    (tmp_path / "results.csv").write_text("a\n1\n")
    for wrong in ("results.csv", "other.parquet"):
        pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
        with pytest.raises(UserError, match=f"{wrong} is not a table of results that fedray wrote"):
            load(tmp_path / wrong)


@pytest.mark.parametrize("name", ["config.json", "rounds.jsonl", "results.parquet", "made.sweep.json"])
def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(tmp_path, name):
    made.run(tmp_path / "good")
    directory = made.run(tmp_path / "odd")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    found = load(tmp_path)
    assert set(found.rounds["run"]) >= {"good"}
    assert f"{directory / name} is no file; it is left out." in found.problems


def test_a_damaged_table_among_others_is_named(tmp_path):
    write(load(made.run(tmp_path / "run")).rounds, tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/results.parquet").write_bytes((tmp_path / "good/results.parquet").read_bytes()[:-100])
    rounds, problems = load(tmp_path / "good", tmp_path / "bad")
    assert len(rounds) == 3
    assert len(problems) == 1
    assert problems[0].startswith(f"{tmp_path / 'bad/results.parquet'} is not a table of results that fedray wrote")


# Files


def test_parquet_reads_back_exactly_and_csv_as_its_values(out, tmp_path):
    made.run(out / "other", replace(fedray.PRESETS["digits-lora"], rounds=2, max_grad_norm=None))
    made.run(out / "odd", made.config(seed=5, learning_rate=0.1 + 0.2))
    stop(out / "odd")
    rounds = load(out).rounds
    write(rounds, tmp_path / "table")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table/results.parquet"), rounds, check_exact=True)
    read = pd.read_csv(tmp_path / "table/results.csv", dtype=rounds.dtypes.to_dict(), float_precision="round_trip")
    pd.testing.assert_frame_equal(read, rounds, check_exact=True)


def test_a_table_stands_in_for_runs_that_are_not_there(out, tmp_path):
    stop(next(path for path in sorted(out.iterdir()) if path.is_dir()))
    rounds, problems = load(out)
    write(rounds, tmp_path / "table")
    (tmp_path / "table/made.sweep.json").write_bytes((out / "made.sweep.json").read_bytes())
    for place in (tmp_path / "table", tmp_path / "table/results.parquet"):
        again = load(place)
        pd.testing.assert_frame_equal(again.rounds, rounds, check_exact=True)
        assert again.problems == problems
    write(rounds.iloc[:3], out)  # an old one, beside the runs
    pd.testing.assert_frame_equal(load(out).rounds, rounds, check_exact=True)
    more = made.run(tmp_path / "more/run", made.config(seed=7))
    both = load(tmp_path / "table", more).rounds
    assert both["directory"].nunique() == rounds["directory"].nunique() + 1
    assert both[rounds.columns].dtypes.equals(rounds.dtypes)


# What is read from it


def test_a_configuration_counts_once_and_complete_runs_only(out):
    first = next(path for path in sorted(out.iterdir()) if path.is_dir())
    config = Run.open(first).config
    elsewhere = replace(config, actors=3, gpus_per_actor=0.0, client_timeout=5.0)  # placement alone
    assert elsewhere != config
    made.run(out / "zz-again", elsewhere)
    stop(made.run(out / "zz-stopped", made.config(seed=99)))
    rounds = load(out).rounds
    last = finals(rounds)
    assert len(last) == 10
    assert set(last["directory"]) == {str(out / name) for name in set(rounds["run"]) - {"zz-again", "zz-stopped"}}
    assert (last["round"] == 3).all()


def test_a_table_of_means_over_seeds(out):
    rounds = load(out).rounds
    table = pivot(rounds, "fd[digits]")
    assert table.index.tolist() == [2, 4]
    assert [*table.columns] == [(epochs, what) for epochs in (1, 2) for what in ("mean", "std", "n")]
    assert table.index.name == "clients"
    assert table.columns.names[0] == "local_epochs"
    for clients, epochs in ((2, 1), (2, 2), (4, 1)):
        values = [score(clients, epochs, seed) for seed in (0, 1, 2)]
        cell = table.loc[clients, epochs]
        assert cell["mean"] == pytest.approx(statistics.mean(values))
        assert cell["std"] == pytest.approx(statistics.stdev(values))
        assert cell["n"] == 3
    assert table.loc[4, (2, "mean")] == pytest.approx(score(4, 2, 0))
    assert math.isnan(table.loc[4, (2, "std")])
    assert table.loc[4, (2, "n")] == 1
    without = pivot(rounds[(rounds["clients"] == 2) | (rounds["local_epochs"] == 1)], "fd[digits]")
    assert without.loc[4, (2, "n")] == 0
    assert cells(without).loc[4, 2] == "–"
    assert pivot(rounds, "total.bytes").loc[2, (1, "mean")] == 3 * 2 * 2 * 600_000
    other = pivot(rounds, "fd[digits]", rows="local_epochs", columns="clients")
    assert other.loc[1, (4, "mean")] == table.loc[4, (1, "mean")]


def test_a_setting_that_only_some_runs_have(tmp_path):
    made.run(tmp_path / "a", made.config())
    made.run(tmp_path / "b", made.config(local_epochs=None, local_steps=7))
    table = cells(pivot(load(tmp_path).rounds, "fd[digits]", "local_steps", "local_epochs"))
    assert table.index.tolist() == [7, "–"]
    assert table.loc["–", 1] == "5.00"
    assert table.loc[7, "–"] == "5.00"
    assert table.loc[7, 1] == "–"


def test_means_do_not_mix_settings(out):
    made.run(out / "other", made.config(partition=Dirichlet(0.1), learning_rate=1.0))
    rounds = load(out).rounds
    assert varied(rounds) == ["clients", "partition", "local_epochs", "learning_rate"]
    with pytest.raises(UserError, match="clients 2 and local_epochs 1 differ also in partition, learning_rate: choose"):
        pivot(rounds, "fd[digits]")
    assert pivot(rounds[rounds["partition"] == "iid"], "fd[digits]").loc[2, (1, "n")] == 3


def test_settings_are_told_from_what_was_measured(tmp_path):
    """Also those of another version, and of a task that is not fedray's; whatever the order of the columns."""
    row = made.row(1, held_out={"global": 2.5}, scores=made.scores(3.0) | made.scores(1.0, "brightness"))
    row["aggregation"] = {"error_mean": 0.25}
    own = made.config(rounds=1).to_json()
    own |= {"older": 3, "task": own["task"] | {"of_mine": 1}}
    made.run(tmp_path / "run", own, [row])
    rounds = load(tmp_path).rounds
    expected = {name for name in own if name != "task"} | {f"task.{name}" for name in own["task"]}
    assert set(settings_of(rounds)) == expected
    assert settings_of(rounds) == [name for name in rounds if name in expected]
    shuffled = rounds[sorted(rounds)].assign(setting="in words")
    assert settings_of(shuffled) == sorted(expected)


def test_wrong_names(out):
    rounds = load(out).rounds
    with pytest.raises(UserError, match=r"there is no score 'fd'; .*There are: fd\[digits\], plain\."):
        pivot(rounds, "fd")
    with pytest.raises(UserError, match="there is no setting 'client'; did you mean 'clients'"):
        pivot(rounds, "plain", rows="client")
    with pytest.raises(UserError, match=r"no complete run has fd\[digits\]"):
        pivot(rounds[rounds["round"] < 3], "fd[digits]")


def made_table(values, rows="clients", columns="local_epochs"):
    frame = pd.DataFrame({("x|_%", name): [value] for name, value in zip(("mean", "std", "n"), values, strict=True)})
    frame.columns.names = [columns, None]
    frame.index = pd.Index([4], name=rows)
    return frame


@pytest.mark.parametrize(
    ("mean", "std", "digits", "text"),
    [
        (5.527, 1.694, 3, "5.53 ± 1.69"),
        (5.527, math.nan, 3, "5.53"),
        (51.04, 3.86, 3, "51.0 ± 3.9"),
        (1234.5, 22.2, 3, "1234 ± 22"),
        (0.7081, 0.0214, 3, "0.708 ± 0.021"),
        (0.001, 1.234, 3, "0.00 ± 1.23"),
        (0.0, math.nan, 3, "0.00"),
        (0.0, 0.0, 2, "0.0 ± 0.0"),
        (-5.527, 0.5, 2, "-5.5 ± 0.5"),
        (9.999, 0.001, 2, "10.0 ± 0.0"),
        (math.nan, math.nan, 3, "–"),
        (math.inf, math.nan, 3, "inf"),
    ],
)
def test_cells(mean, std, digits, text):
    assert cells(made_table((mean, std, 3)), digits).iloc[0, 0] == text


def test_markdown(out):
    lines = to_markdown(cells(pivot(load(out).rounds, "fd[digits]"))).splitlines()
    read = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    values = [score(2, 1, seed) for seed in (0, 1, 2)]
    assert read[0] == ["clients / local_epochs", "1", "2"]
    assert read[2] == ["2", f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}", read[2][2]]
    assert read[3] == ["4", read[3][1], "2.30"]
    assert r"x\|_%" in to_markdown(cells(made_table((1.0, 2.0, 3))))


def test_latex():
    latex = to_latex(cells(made_table((1.0, 2.0, 3))))
    assert r"clients / local\_epochs & x|\_\% \\" in latex
    assert r"4 & 1.00 $\pm$ 2.00 \\" in latex
    assert r"4 & -- \\" in to_latex(cells(made_table((math.nan, math.nan, 0))))


def test_a_row_per_setting(tmp_path):
    values = {(2, 0): 3.0, (2, 1): 5.0, (8, 0): 10.0}
    for (clients, seed), value in values.items():
        scores = {"fd[digits]": {"value": value, "n": 16, "std": 3.0 + seed}}
        made.run(
            tmp_path / f"{clients}-{seed}",
            made.config(clients=clients, seed=seed, rounds=1),
            [made.row(1, scores=scores)],
        )
    settings = {"2-0": "two", "2-1": "two", "4-0": "four", "8-0": "eight", "8-1": "eight"}  # four has not begun
    table = by_setting(load(tmp_path).rounds, settings, "clients", ["fd[digits]", "loss"])
    assert list(table.index) == ["two", "four", "eight"]
    assert table["fd[digits]"]["mean"].dropna().tolist() == [4.0, 10.0]
    assert table["fd[digits]"]["std"].iloc[0] == pytest.approx(statistics.stdev([3.0, 5.0]))
    assert math.isnan(table["fd[digits]"]["std"].iloc[2])
    assert table["loss"]["n"].tolist() == [2, 0, 1]
    assert list(table.columns) == [
        *(("fd[digits]", kind) for kind in ("mean", "std", "n", "within")),
        *(("loss", kind) for kind in ("mean", "std", "n")),
    ]  # fmt: skip
    assert table["fd[digits]"]["within"].iloc[0] == pytest.approx(12.5**0.5)  # root mean square of 3 and 4
    lines = [[cell.strip() for cell in line.split("|")] for line in to_markdown(cells(table)).splitlines()]
    assert lines[0][1] == "clients / score"
    assert lines[3][1:3] == ["four", "–"]
