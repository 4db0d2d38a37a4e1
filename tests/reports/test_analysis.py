"""What analysis/ draws and says, compared with plain Python over the rows that it is drawn from."""

import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import made
import matplotlib.colors
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import fedray
from fedray.data.partition import IID, ByLabel
from fedray.errors import UserError
from fedray.reports.results import load, write

ANALYSIS = Path(__file__).parents[2] / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))
T975 = 4.302652729911275  # the 97.5 % quantile of Student's t with 2 degrees of freedom, from a table


@pytest.fixture(scope="module")
def figures():
    sys.path.insert(0, str(ANALYSIS))
    import figures

    yield figures
    sys.path.remove(str(ANALYSIS))


def score(clients, local_epochs, seed, rounds=4):
    steps = local_epochs * rounds / clients
    return 3 + 10 / steps * (1 + (seed - 1) ** 2 / 10 + seed / 100) + 0.2 * clients * (1 + seed / 50)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """C × E, and with it the control at equal sequential steps, over three seeds."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    table = [{"local_epochs": e, "clients": c, "seed": s} for e, c, s in product((1, 2), (2, 4, 8), (0, 1, 2))]
    made.sweep(out, table, score, name="table", question="How do they go together?", rounds=4)
    control = [{"local_epochs": 2, "clients": c, "rounds": c, "seed": s} for c, s in product((2, 4, 8), (0, 1, 2))]
    made.sweep(out, control, score, name="same_steps", question="At equal steps?")
    return out


@pytest.fixture(scope="module")
def table(figures, out):
    return figures.sweeps(out, load(out).rounds)["table"][1]


def bars(axes):
    """Lower and upper end of each error bar, by its place."""
    segments = [each for drawn in axes.containers for line in drawn.lines[2] for each in line.get_segments()]
    return {
        (round(float(each[0][0]), 6), round(float(each[0][1]), 6)): float(each[1][1]) for each in segments if len(each)
    }


def legends(figure):
    return {each.get_title().get_text(): [text.get_text() for text in each.get_texts()] for each in figure.legends}


# Figures


def test_points_are_means_and_bars_deviations(figures, table):
    figure = figures.score_against(table, "fd[digits]", "clients", "local_epochs")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert legends(figure) == {"local epochs E": ["1", "2"]}
    assert [matplotlib.colors.to_hex(line.get_color()).upper() for line in lines] == list(figures.style.COLOURS[:2])
    expected = {}
    for line, epochs in zip(lines, (1, 2), strict=True):
        values = [[score(clients, epochs, seed) for seed in (0, 1, 2)] for clients in (2, 4, 8)]
        assert line.get_xdata().tolist() == [2, 4, 8]
        assert line.get_ydata() == pytest.approx([statistics.mean(each) for each in values])
        for clients, each in zip((2, 4, 8), values, strict=True):
            low, high = (statistics.mean(each) + sign * statistics.stdev(each) for sign in (-1, 1))
            expected[clients, round(low, 6)] = high
    assert bars(axes) == pytest.approx(expected)
    assert axes.get_xlabel() == "clients C"
    assert axes.get_ylabel() == "fd[digits], 512 samples"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "4", "8"]
    assert figure.get_suptitle() == "mean over 3 seeds; bars: ± standard deviation"


def test_against_what_a_run_costs(figures, table):
    figure = figures.score_against(table, "fd[digits]", "total.bytes", "clients")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [line.get_xdata().tolist() for line in lines] == [[c * 2 * 600_000 * 4] * 2 for c in (2, 4, 8)]
    assert legends(figure) == {"clients C": ["2", "4", "8"], "local epochs E": ["1", "2"]}
    assert axes.xaxis.get_major_formatter()(4_800_000) == "4.8 MB"
    steps = figures.score_against(table, "fd[digits]", "total.sequential_steps", "clients").axes[0]
    lines = [line for line in steps.lines if line.get_linestyle() == "-"]
    assert [line.get_xdata().tolist() for line in lines] == [[4 * 48 * e / c for e in (1, 2)] for c in (2, 4, 8)]
    assert steps.get_xscale() == "log"
    seconds = figures.score_against(table, "fd[digits]", "total.training_seconds").axes[0]
    expected = sorted(4 * (0.02 * 48 * e / c + (c - 1) / 10) for e, c in product((1, 2), (2, 4, 8)))
    assert seconds.lines[0].get_xdata() == pytest.approx(expected)


def test_one_seed_has_no_bars(figures, table):
    figure = figures.score_against(table[table["seed"] == 1], "fd[digits]", "clients", "local_epochs")
    assert bars(figure.axes[0]) == {}
    assert figure.get_suptitle() == "one seed"
    uneven = table[(table["seed"] == 1) | (table["clients"] == 2)]
    figure = figures.score_against(uneven, "fd[digits]", "clients", "local_epochs")
    assert figure.get_suptitle() == "mean over 1 to 3 seeds; bars: ± standard deviation"


def test_settings_that_are_no_numbers(figures, tmp_path):
    for number, (partition, steps) in enumerate(product((IID(), ByLabel()), (None, 5))):
        epochs = 1 if steps is None else None
        made.run(tmp_path / f"{number}", made.config(partition=partition, local_epochs=epochs, local_steps=steps))
    rounds = load(tmp_path).rounds
    axes = figures.score_against(rounds, "fd[digits]", "partition", "local_steps").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["by-label", "iid"]
    assert axes.lines[0].get_xdata().tolist() == [0, 1]
    axes = figures.score_against(rounds, "fd[digits]", "local_steps", "partition").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["5", "none"]


def test_real_against_real(figures, tmp_path):
    for clients in (2, 4):
        rows = [made.row(1, scores=made.scores(9.0) | {"fd[digits]/real": {"value": clients / 2, "n": 64}})]
        made.run(tmp_path / f"{clients}", made.config(clients=clients, rounds=1), rows)
    axes = figures.score_against(load(tmp_path).rounds, "fd[digits]", "clients").axes[0]
    assert [line.get_ydata() for line in axes.lines if line.get_linestyle() == ":"] == [[1.5, 1.5]]


def test_lines_over_rounds(figures, table):
    figure = figures.curves(table, "loss", "total.sequential_steps", "clients", "local_epochs")
    assert [axes.get_title() for axes in figure.axes] == ["E = 1", "E = 2"]
    for axes, epochs in zip(figure.axes, (1, 2), strict=True):
        for line, band, clients in zip(axes.lines, axes.collections, (2, 4, 8), strict=True):
            steps = 48 * epochs // clients
            assert line.get_xdata().tolist() == [steps * number for number in (1, 2, 3, 4)]
            finals = [score(clients, epochs, seed) for seed in (0, 1, 2)]
            losses = [[0.04 + final / 500 + 0.4 / (k * steps / 12) for final in finals] for k in (1, 2, 3, 4)]
            assert line.get_ydata() == pytest.approx([statistics.mean(each) for each in losses])
            heights = {round(float(y), 9) for _, y in band.get_paths()[0].vertices}
            for each in losses:
                for sign in (-1, 1):
                    assert round(statistics.mean(each) + sign * statistics.stdev(each), 9) in heights
    assert legends(figure) == {"clients C": ["2", "4", "8"]}
    assert figure.get_supxlabel() == "sequential optimizer steps (of the slowest client)"
    assert figure.get_suptitle() == "mean over 3 seeds; bands: ± standard deviation"


def test_held_out_loss_beside_the_training_loss(figures, tmp_path):
    rows = [
        made.row(k, loss=1 / k, held_out={"global": 2 / k}) if k % 2 else made.row(k, loss=1 / k) for k in (1, 2, 3)
    ]
    made.run(tmp_path / "run", rows=rows)
    figure = figures.curves(load(tmp_path).rounds, ["loss", "held_out.global"])
    solid, dashed = figure.axes[0].lines
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert (solid.get_xdata().tolist(), solid.get_ydata().tolist()) == ([1, 2, 3], [1, 1 / 2, 1 / 3])
    assert (dashed.get_xdata().tolist(), dashed.get_ydata().tolist()) == ([1, 3], [2, 2 / 3])
    assert legends(figure) == {"": ["training loss", "held-out loss"]}


def picture(level):
    return fedray.grid(torch.full((4, 1, 8, 8), level, dtype=torch.uint8), 2)


def test_pictures_of_samples(figures, tmp_path):
    for clients, seed in product((2, 4), (1, 0)):
        run = made.run(tmp_path / f"{clients}-{seed}", made.config(clients=clients, seed=seed))
        (run / "samples").mkdir()
        for number in range(1, 9) if clients == 2 else (3,):
            picture(10 * number + seed).save(run / f"samples/round-{number:06d}.png")
    figure = figures.samples(load(tmp_path).rounds)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == [f"round {k}" for k in (1, 2, 4, 5, 7, 8, 3)]
    for axes, level in zip(drawn, (10, 20, 40, 50, 70, 80, 30), strict=True):  # of seed 0
        assert np.array_equal(axes.images[0].get_array(), np.asarray(picture(level)))
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["C = 2", "C = 4"]


def test_pictures_of_last_rounds_are_a_table(figures, tmp_path):
    for clients, epochs in product((2, 4), (1, 2)):
        run = made.run(tmp_path / f"{clients}-{epochs}", made.config(clients=clients, local_epochs=epochs))
        (run / "samples").mkdir()
        picture(10 * clients + epochs).save(run / "samples/round-000003.png")
    figure = figures.samples(load(tmp_path).rounds)
    assert [axes.get_title() for axes in figure.axes] == ["E = 1", "E = 2", "E = 1", "E = 2"]
    levels = [axes.images[0].get_array()[6, 6, 0] for axes in figure.axes]
    assert levels == [21, 22, 41, 42]


def test_what_a_figure_cannot_be_drawn_from(figures, table):
    with pytest.raises(UserError, match=r"there is no score 'fd'; .* There are: fd\[digits\], plain"):
        figures.score_against(table, "fd", "clients")
    with pytest.raises(UserError, match="the runs differ also in local_epochs"):
        figures.score_against(table, "plain", "clients")
    with pytest.raises(UserError, match="the runs differ also in clients"):
        figures.curves(table, "loss", by="local_epochs")
    with pytest.raises(UserError, match="there is no column 'client'"):
        figures.curves(table, "loss", by="client")
    with pytest.raises(UserError, match="no complete run has plain"):
        figures.score_against(table[table["round"] < 4], "plain", "clients")
    with pytest.raises(UserError, match="none of these runs has pictures"):
        figures.samples(table)


def test_what_follows_from_other_settings_is_no_dimension(figures, out):
    sweeps = figures.sweeps(out, load(out).rounds)
    assert {name: question for name, (question, _) in sweeps.items()} == {
        "table": "How do they go together?", "same_steps": "At equal steps?"
    }  # fmt: skip
    assert figures.dimensions(sweeps["table"][1]) == ["clients", "local_epochs"]
    assert figures.dimensions(sweeps["same_steps"][1]) == ["clients"]
    assert figures.dimensions(load(out).rounds) == ["clients", "local_epochs", "rounds"]
    steps = sweeps["same_steps"][1].groupby("directory")["total.sequential_steps"].max()
    assert steps.unique().tolist() == [48 * 2]  # E·T/C epochs of 48 steps


@pytest.fixture
def command(figures, capsys):
    """What `python analysis/figures.py …` writes, in this process."""

    def run(*arguments, **asked):
        figures.main(figures.Question(*arguments, **asked))
        return [Path(line.split(maxsplit=1)[1]) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.slow
def test_the_command(command, tmp_path):
    changes = [
        {"clients": clients, "learning_rate": rate, "partition": partition, "local_epochs": 1, "seed": seed}
        for clients, rate, partition, seed in product((2, 4), (1e-3, 2e-3), (IID(), ByLabel()), (0, 1))
    ]
    out = made.sweep(tmp_path / "runs", changes, lambda **_: 5.0)
    written = command(out, score="plain")
    assert {path.parent for path in written} == {out / "figures"}
    drawn = [f"score-against-{x}" for x in ("clients", "partition", "sequential_steps", "bytes", "training_seconds")]
    drawn += ["loss-over-rounds", "loss-over-steps"]
    names = {f"{name}-learning_rate-{rate}" for name in drawn for rate in ("0.001", "0.002")}
    assert {path.name for path in written} == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    for path in written:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert Image.open(path).width > 600
    before = {path: path.read_bytes() for path in written}
    command(out, score="plain")
    assert {path: path.read_bytes() for path in written} == before  # the same figures are the same files


@pytest.mark.slow
def test_the_command_on_several_sweeps_and_a_table_alone(command, out, tmp_path):
    write(load(out).rounds, tmp_path / "table")
    for path in out.glob("*.sweep.json"):
        (tmp_path / "table" / path.name).write_bytes(path.read_bytes())
    command(tmp_path / "table/results.parquet", out=tmp_path / "drawn")
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"table", "same_steps"}
    assert (tmp_path / "drawn/same_steps/score-against-clients.svg").exists()
    assert not (tmp_path / "drawn/same_steps/score-against-sequential_steps.svg").exists()  # all are equal


def test_mistakes_of_the_user(command, out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there are no results at .*nowhere"):
        command(tmp_path / "nowhere")
    with pytest.raises(UserError, match="file is not a table of results"):
        command(tmp_path / "file")
    with pytest.raises(UserError, match="there is no score 'fd_digits'; did you mean"):
        command(out, score="fd_digits")
    with pytest.raises(UserError, match=r"file cannot be written: .*; choose another --out\."):
        command(out, out=tmp_path / "file")
    with pytest.raises(UserError, match="there is no complete round at"):
        command(made.run(tmp_path / "empty/run", rows=[], complete=False))


def test_a_mistake_is_told_in_one_sentence(tmp_path):
    program = [sys.executable, str(ANALYSIS / "figures.py"), str(tmp_path / "nowhere")]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"figures.py: there are no results at {tmp_path / 'nowhere'}: it does not exist.\n"


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("execution_count") is None
        assert cell.get("outputs", []) == []
        assert set(cell.metadata) == set()


def execute(name, monkeypatch, **environment):
    """Run a notebook top to bottom with this interpreter. Returns its texts, and how many pictures it shows."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(value))
    notebook = nbformat.read(ANALYSIS / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import sys; print(sys.executable)"))
    where = {"metadata": {"path": str(ANALYSIS)}}
    NotebookClient(notebook, kernel_name="python3", timeout=200, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs.pop()["text"].strip() == sys.executable
    shown = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs] + [data.get("text/markdown", "") for data in shown]
    return "\n".join(texts), sum("image/png" in data for data in shown)


@pytest.mark.slow
def test_the_sweep_notebook_says_what_the_numbers_say(out, tmp_path, monkeypatch):
    write(load(out).rounds, tmp_path)
    for path in out.glob("*.sweep.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text, pictures = execute("sweep.ipynb", monkeypatch, FEDRAY_RESULTS=tmp_path)
    assert pictures == 7
    assert "How do they go together?" in text
    assert "18 complete runs, seeds 0, 1, 2; controls: same_steps" in text
    values = [score(8, 1, seed) for seed in (0, 1, 2)]
    assert f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" in text
    for at, fewest, most in (("local_epochs = 2", 4, 4), ("equal steps, local_epochs = 2", 2, 8)):  # rounds
        low, high = ([score(c, 2, seed, t) for seed in (0, 1, 2)] for c, t in ((2, fewest), (8, most)))
        paired = [b - a for a, b in zip(low, high, strict=True)]
        mean, half = statistics.mean(paired), T975 * statistics.stdev(paired) / math.sqrt(3)
        more = "higher" if mean > 0 else "lower"
        assert f"{at}: from clients = 2 to clients = 8, fd[digits] is {abs(mean):.3g} {more} (95 % interval" in text
        assert f"interval {mean - half:.3g} to {mean + half:.3g}, 3 seeds)" in text
    lowest = statistics.mean(score(2, 2, seed) for seed in (0, 1, 2))
    assert f"lowest mean fd[digits], {lowest:.3g}, is at C = 2, E = 2" in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four short runs, really trained."""
    out = tmp_path_factory.mktemp("trained")
    small = replace(fedray.PRESETS["digits"], **fedray.SMOKE, local_epochs=1, held_out_share=0.05, evaluate_every=1)
    for clients, seed in product((2, 4), (0, 1)):
        config = replace(small, clients=clients, seed=seed, actors=0)
        fedray.run(config, out / f"{clients}-{seed}")
    return out


@pytest.mark.slow
def test_notebooks_and_figures_of_trained_runs(command, trained, monkeypatch, tmp_path):
    text, pictures = execute("sweep.ipynb", monkeypatch, FEDRAY_RESULTS=trained)
    assert pictures == 7
    assert "4 complete runs, seeds 0, 1; controls: none" in text
    text, pictures = execute("run.ipynb", monkeypatch, FEDRAY_RUN=trained / "4-1")
    assert pictures == 6  # loss, score, seconds, samples, nearest, partition
    result = fedray.Run.open(trained / "4-1").result
    assert f"{result['bytes_down'] + result['bytes_up']:,}" in text
    assert "2 of 2 rounds" in text
    command(trained, out=tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} >= {"score-over-rounds", "held-out-loss-over-steps", "samples"}
    assert (tmp_path / "score-over-training_seconds.svg").exists()


@pytest.mark.slow
def test_the_kept_results_say_what_the_log_says(monkeypatch):
    monkeypatch.delenv("FEDRAY_RESULTS", raising=False)
    monkeypatch.delenv("FEDRAY_RUN", raising=False)
    text, pictures = execute("sweep.ipynb", monkeypatch)
    log = (ANALYSIS.parent / "experiments/LOG.md").read_text()
    assert pictures == 7
    assert "27 complete runs, seeds 0, 1, 2; controls: same_steps" in text
    cells = re.findall(r"[\d.]+ ± [\d.]+", text)
    assert len(set(cells)) == 11
    assert all(cell in log for cell in cells)
    assert "3.75 lower (95 % interval -4.81 to -2.7" in text
    assert "3.75\n(95 % interval 2.70 to 4.81)" in log
    text, pictures = execute("run.ipynb", monkeypatch)
    assert "40 of 40 rounds" in text
    assert pictures == 2  # the loss, and seconds: pictures are not kept
