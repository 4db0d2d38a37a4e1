"""The page of fedray report: what it says, and that it needs nothing else."""

import base64
import io
import json
import math
import re
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from pages import CONFIG, EVIL, Page, write_run, write_sweep
from PIL import Image
from scipy import stats

from fedray.cli import main
from fedray.reports import page as page_module
from fedray.reports.answer import answer, decisive, number, pair, ranked, with_settings
from fedray.reports.comparisons import compare, compare_columns
from fedray.reports.results import load, varied


def answer_of(*places, planned=1):
    rounds = load(*places).rounds
    return answer(with_settings(rounds, varied(rounds)), planned)


# The answer


def test_of_two_settings_it_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(5, 1, 5), "b": rng.normal(7, 1, 5)}
    frame = load_like([(name, seed, values[name][seed]) for seed in (3, 0, 4, 1, 2) for name in "ba"])
    found = compare(frame, "fid").difference("b", "a")
    wanted = stats.ttest_rel(values["b"], values["a"]).confidence_interval(0.95)
    assert found.value == pytest.approx((values["b"] - values["a"]).mean())
    assert (found.low, found.high, found.seeds) == (
        pytest.approx(wanted.low, rel=1e-5), pytest.approx(wanted.high, rel=1e-5), 5
    )  # fmt: skip


def frame_of(values):
    """Scores [seeds, settings] as runs."""
    return load_like([(f"s{k}", n, value) for (n, k), value in np.ndenumerate(values)])


def test_of_several_settings_it_is_tukeys_interval():
    """The mean square by least squares on dummies of settings and seeds; the quantile by simulating ranges."""
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (4, 5)) + rng.normal(0, 3, (4, 1)) + np.arange(5)
    dummies = np.array([np.r_[np.eye(4)[n], np.eye(5)[k]] for n in range(4) for k in range(5)])
    left = values.ravel() - dummies @ np.linalg.lstsq(dummies, values.ravel(), rcond=None)[0]
    error = np.sqrt((left**2).sum() / 12 / 4)
    ranges = np.ptp(rng.normal(size=(200_000, 5)), axis=1) / np.sqrt(rng.chisquare(12, 200_000) / 12)
    found = compare(frame_of(values), "fid")
    assert found.half == pytest.approx(np.quantile(ranges, 0.95) * error, rel=0.01)
    assert found.pairs == 10
    assert found.difference("s4", "s1").value == pytest.approx((values[:, 4] - values[:, 1]).mean())


def test_equal_settings_are_told_apart_in_five_of_a_hundred_sweeps():
    """Eleven equal settings, three seeds: some setting's interval to the lowest excludes 0. Intervals taken each for
    itself say so in every second sweep."""
    rng, wrong, alone = np.random.default_rng(2), 0, 0
    for _ in range(1000):
        values = rng.normal(5, 1.5, (3, 11)) + rng.normal(0, 1, (3, 1))
        found = compare_columns(pd.DataFrame(values).add_prefix("s"))
        means = values.mean(0)
        wrong += found.difference(f"s{means.argmax()}", f"s{means.argmin()}").low > 0
        gaps = np.delete(values - values[:, [means.argmin()]], means.argmin(), axis=1)
        alone += (gaps.mean(0) > stats.t.ppf(0.975, 2) * gaps.std(0, ddof=1) / 3**0.5).any()
    assert wrong / 1000 == pytest.approx(0.05, abs=0.021)  # three standard errors
    assert alone / 1000 > 0.45


@pytest.mark.parametrize(("settings", "seeds"), [(2, 5), (6, 3)])
def test_the_visible_difference_is_seen_in_four_of_five_sweeps(settings, seeds):
    rng, seen = np.random.default_rng(3), 0
    shifts = []
    for _ in range(5):  # its error, known here, is estimated in each
        values = rng.normal(0, 1, (seeds, settings))
        found = compare_columns(pd.DataFrame(values).add_prefix("s"))
        shifts.append(found.visible / found.half)
    per_error = shifts[0] * stats.studentized_range.ppf(0.95, settings, (settings - 1) * (seeds - 1))
    assert np.ptp(shifts) < 1e-9
    for _ in range(1000):
        values = rng.normal(0, 1, (seeds, settings))
        values[:, 1] += per_error / seeds**0.5
        seen += compare_columns(pd.DataFrame(values).add_prefix("s")).difference("s1", "s0").low > 0
    assert seen / 1000 == pytest.approx(0.8, abs=0.04)


def test_an_easy_seed_does_not_make_a_setting_best():
    """b has one more seed, a bad one; on the two that both have it is better."""
    values = [("a", 0, 5.0), ("a", 1, 5.2), ("b", 0, 4.0), ("b", 1, 4.1), ("b", 2, 20.0)]
    best = ranked(load_like(values), "fid")
    assert list(best.index) == ["b", "a"]
    assert best.loc["b", "mean"] == pytest.approx(4.05)
    assert best.loc["b", "count"] == 2


def test_only_seeds_that_all_have_are_paired():
    frame = load_like([("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 100.0), ("b", 0, 3.0), ("b", 1, 5.0)])
    found = compare(frame, "fid").difference("b", "a")  # differences 2 and 3; t of one degree of freedom is 12.7062
    assert (found.value, found.seeds) == (2.5, 2)
    assert (found.low, found.high) == (pytest.approx(2.5 - 6.3531, abs=1e-3), pytest.approx(2.5 + 6.3531, abs=1e-3))
    apart = compare(load_like([("a", 0, 1.0), ("b", 1, 3.0)]), "fid")
    assert apart.difference("b", "a").value == 2.0
    assert math.isnan(apart.difference("b", "a").low)
    assert math.isnan(apart.difference("c", "a").value)


def load_like(rows):
    return pd.DataFrame(rows, columns=["setting", "seed", "fid"])


def test_a_sweeps_answer(tmp_path):
    # Differences 3, 4, 3: mean 3.333, std 0.577; 4.3027 · 0.577 / √3 = 1.434.
    assert answer_of(write_sweep(tmp_path), planned=6) == (
        "fd[digits] is lowest at clients=2: 6.00 ± 1.00 over 3 seeds (n = 16; real against real 4.00). The next, "
        "clients=8, is higher by 3.33 (95 % interval 1.90 to 4.77, paired by 3 seeds). A true difference below 1.88 "
        "would be missed by more than one in five such comparisons."
    )


def test_an_interval_around_zero_is_said(tmp_path):
    # What is left without the means of settings and seeds: ± 0.5, 1, 0.5, a mean square of 1.5 of two degrees of
    # freedom; q(0.95; 3, 2) = 8.331 in tables, times √(1.5 / 2): ± 7.21.
    said = answer_of(write_sweep(tmp_path, {2: [5.0, 6.0], 4: [7.0, 5.0], 8: [20.0, 21.0]}), planned=6)
    assert "is higher by 0.500 (95 % interval −6.71 to 7.71, paired by 2 seeds), so that these seeds do not" in said
    assert "Of the 2 others, 1 is higher with an interval above 0: clients=8 by 15.0 (7.79 to 22.2)." in said
    assert "The intervals hold for all 3 pairs of the 3 settings at once (Tukey's method" in said


def test_without_common_seeds_there_is_no_interval(tmp_path):
    said = answer_of(write_sweep(tmp_path, {2: [5.0], 4: [7.5]}), planned=2)
    assert "lowest at clients=2: 5.00 (one seed; n = 16;" in said
    assert "higher by 2.50, without an interval" in said


@pytest.mark.parametrize(("repeats", "how"), [(1, "by resampling"), (4, "over 4 draws")])
def test_the_noise_of_drawing_samples_is_told_from_that_of_seeds(tmp_path, repeats, how):
    for seed, value in enumerate([5.0, 6.0, 7.0]):
        run = write_run(tmp_path / str(seed), [value], config=replace(CONFIG, seed=seed, evaluate_repeats=repeats))
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        rows[-1]["scores"]["fd[digits]"]["std"] = (3.0, 4.0, 0.0)[seed]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    within = (25 / 3) ** 0.5  # a root mean square
    assert f"a run's samples drawn again: ± {within:.2f}, {how})" in answer_of(tmp_path, planned=3)


def test_missing_runs_and_different_n_are_said(tmp_path):
    write_run(tmp_path / "a", [5.0])
    write_run(tmp_path / "b", [5.0], config=replace(CONFIG, evaluate_samples=64))
    said = answer_of(tmp_path, planned=3)
    assert said.startswith("2 of 3 runs are complete.")
    assert "n = 16 to 64, but scores of different n do not compare" in said


def test_seeds_of_one_setting_have_the_interval_of_their_mean(tmp_path):
    for seed, value in enumerate([5.0, 6.0, 7.0]):
        write_run(tmp_path / str(seed), [value], config=replace(CONFIG, seed=seed))
    low, high = stats.t.interval(0.95, 2, 6, stats.sem([5, 6, 7]))
    assert answer_of(tmp_path, planned=3) == (
        f"fd[digits] is 6.00 ± 1.00 over 3 seeds (95 % interval of the mean {low:.2f} to {high:.2f}; n = 16; "
        f"real against real 4.00)."
    )


def test_runs_without_scores_and_incomplete_runs(tmp_path):
    loss, held_out, begun = (
        answer_of(write_run(tmp_path / "loss")),
        answer_of(write_run(tmp_path / "held-out", held_out=True)),
        answer_of(write_run(tmp_path / "begun", complete=False, done=2)),
    )
    assert loss == "No score was measured. The training loss after round 3 is 0.333."
    assert held_out == "No score was measured. The held-out loss after round 3 is 0.167 ± 0.010 (± over clients)."
    assert begun == (
        "The run is not complete: 2 of 3 rounds. No score was measured. The training loss after round 2 is 0.500."
    )
    assert answer_of(tmp_path / "begun", planned=4) == "None of the 4 runs is complete yet."


def test_what_decides(tmp_path):
    rounds = load(write_run(tmp_path / "run", [5.0], held_out=True)).rounds
    assert decisive(rounds) == "fd[digits]"
    for name, wanted in {"fid[768]": "fid[768]", "kid": "kid", "precision": "held_out.global"}.items():
        renamed = rounds.rename(columns={"fd[digits]": name, "fd[digits].n": f"{name}.n"})
        renamed = renamed.drop(columns=["fd[digits]/real", "fd[digits]/real.n"])
        assert decisive(renamed) == wanted
    few = rounds.rename(columns={"fd[digits]": "fd[digits]@64", "fd[digits].n": "fd[digits]@64.n"})
    assert decisive(few.drop(columns="held_out.global")) == "loss"


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [(5.526, 1.687, "5.53 ± 1.69"), (14, 17.31, "14.0 ± 17.3"), (-0.0822, 0.0003, "−0.0822 ± 0.0003"),
     (1234.5, 2, "1,234 ± 2"), (5.0, float("nan"), "5.00"), (0.0, 0.5, "0.000 ± 0.500")],
)  # fmt: skip
def test_pairs(mean, std, text):
    assert pair(mean, std) == text


def test_numbers():
    assert [number(value) for value in (5.534, 0.08218, 1234.4, 0, float("nan"), 3e-8)] == [
        "5.53", "0.0822", "1,234", "0", "–", "3.00e-08"
    ]  # fmt: skip


# The page


def test_a_sweeps_page(tmp_path):
    page = Page(page_module.make([write_sweep(tmp_path)]))
    text = re.sub(r"\s+", " ", page.text)
    for words in ("Do more clients hurt?", "lowest at clients=2", "6.00 ± 1.00", "3.33 (1.90 to 4.77)", "More of it.",
                  "fedray sweep experiments/x.py", "1,000"):  # fmt: skip
        assert words in text
    assert "/opt/tools" not in text
    assert "To know before" not in text  # nothing is missing
    assert {image["alt"] for image in page.images if "round 3" in image["alt"]} == {
        "Samples: clients=2, seed 0 round 3", "Samples: clients=8, seed 0 round 3"
    }  # fmt: skip


def test_two_settings_that_cross_have_a_table(tmp_path):
    values = {(2, 1, 0): 5.0, (2, 1, 1): 6.0, (2, 4, 0): 3.0, (8, 1, 0): 9.0, (8, 4, 0): 7.0}
    for (clients, epochs, seed), value in values.items():
        config = replace(CONFIG, clients=clients, local_epochs=epochs, seed=seed)
        write_run(tmp_path / f"{clients}-{epochs}-{seed}", [value], config=config)
    page = page_module.make([tmp_path])
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    at = rows.index(["clients", "local_epochs=1", "local_epochs=4"])
    assert rows[at + 1 : at + 3] == [["2", "5.50 ± 0.71", "3.00"], ["8", "9.00", "7.00"]]
    best = re.search(r'<tr class="best" data-of="\d">.*?</tr>', page, re.DOTALL).group()
    assert "clients=2, local_epochs=4" in best


def test_a_setting_without_the_score_is_left_empty(tmp_path):
    write_run(tmp_path / "a", [5.0])
    write_run(tmp_path / "b", config=replace(CONFIG, clients=8))
    page = page_module.make([tmp_path])
    row = re.search(r"<tr data-of=\"1\"><th scope=\"row\">clients=8.*?</tr>", page).group()
    assert re.findall(r"<td>(.*?)</td>", row)[:4] == ["1", "", "–", "–"]
    assert "1 run has no fd[digits]. fd[digits] at clients=2 after round 3 is 5.00 (n = 16; " in Page(page).text


def test_sweeps_in_one_folder_each_have_their_answer(tmp_path):
    write_sweep(tmp_path / "one", {2: [5.0, 6.0], 4: [7.0, 8.0]}, "First?")
    write_sweep(tmp_path / "two", {2: [9.0, 9.5], 4: [1.0, 1.5]}, "Second?")
    text = Page(page_module.make([tmp_path])).text
    places = [text.index(words) for words in ("First?", "lowest at clients=2: 5.50", "Second?", "at clients=4: 1.25")]
    assert places == sorted(places)


def test_runs_that_differ_in_much_are_called_by_their_directories(tmp_path):
    """And runs on other data have a chapter of their own: scores on different data do not compare."""
    other = {"learning_rate": 1e-3, "rounds": 3, "fraction": 0.5, "train_batch_size": 4, "local_epochs": 2}
    write_run(tmp_path / "a/first", [5.0])
    write_run(tmp_path / "b/second", [3.0], config=replace(CONFIG, clients=4, seed=1, **other))
    text = Page(page_module.make([tmp_path])).text
    assert "fd[digits] is lowest at b/second: 3.00" in text
    assert "These runs differ in 5 settings (clients, fraction, local_epochs, train_batch_size, …)" in text
    assert "learning_rate=" not in text
    write_run(tmp_path / "c/third", [9.0], config=replace(CONFIG, task=replace(CONFIG.task, dataset_name="some/cats")))
    write_run(
        tmp_path / "c/fourth",
        [8.0],
        config=replace(CONFIG, seed=3, task=replace(CONFIG.task, dataset_name="some/cats")),
    )
    text = Page(page_module.make([tmp_path])).text
    name = tmp_path.resolve().name
    assert f"{name} on digits, {name} on some/cats" in text
    assert text.index("lowest at b/second: 3.00") < text.index("fd[digits] is 8.50")


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    write_run(tmp_path / "run", [5.0], held_out=True)
    page = Page(page_module.make([write_sweep(tmp_path / "sweep"), tmp_path / "run"]))
    assert len(page.links) > 3
    assert all(link.startswith("data:") for link in page.links)
    assert "font-family" in page.styles or "font:" in page.styles
    assert not re.search(r"@import|url\(", page.styles)


def test_what_users_wrote_is_text_and_not_markup(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", question=EVIL)
    write_run(tmp_path / "run", [5.0], partition=EVIL)
    write_run(tmp_path / "other", [5.0], partition="iid</script>")
    page = page_module.make([sweep, tmp_path / "run", tmp_path / "other"])
    assert "<script>alert" not in page
    assert "iid</script>" not in page
    text = Page(page).text
    assert EVIL in text  # the question
    assert f"partition={EVIL}" in text  # a row of the table
    charts = [json.loads(data) for data in re.findall(r'"application/json">(.*?)</script>', page)]
    named = f"partition={EVIL}"
    assert any(named in line["x"].get("setting", ()) for chart in charts for line in chart["figure"].get("lines", ()))
    assert all("<" not in data for data in re.findall(r'"application/json">(.*?)</script>', page))


def test_what_is_wrong_is_in_a_box(tmp_path):
    sweep = write_sweep(tmp_path)
    damaged = sweep / "clients-8-seed-2" / "rounds.jsonl"
    damaged.write_text(damaged.read_text().replace('"round": 2', "?"))
    shutil.rmtree(sweep / "clients-2-seed-1")
    page = page_module.make([sweep])
    box = re.search(r'<section class="problems".*?</section>', page, re.DOTALL).group()
    assert "damaged at line 2" in box
    assert "clients-2-seed-1 of figure.sweep.json has not begun" in box
    assert "4 of 6 runs are complete." in Page(page).text


def test_an_incomplete_run_has_a_page(tmp_path):
    text = Page(page_module.make([write_run(tmp_path / "run", complete=False, done=2)])).text
    assert "The run is not complete: 2 of 3 rounds." in text
    assert "To know before reading on" in text
    assert "What happens when 2 clients (partition iid) train on digits, for 3 rounds of 1 local epoch?" in text
    assert "fedray train --clients 2 --out 'with space'" in text


def test_costs_are_sums_and_means(tmp_path):
    page = page_module.make([write_run(tmp_path / "run", [5.0])])
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    assert ["run", "1,000", "500", "0.00300", "0.00900"] in rows  # 2000 + 1000 bytes, three rounds
    assert ["run", "7.50", "1.50", "0.750", "9.75"] in rows  # training, fold, save and all, seconds


def test_many_and_large_pictures_are_thinned_and_compressed(tmp_path):
    scores = list(np.linspace(9, 5, 40))
    run = write_run(tmp_path / "run", scores, done=40, config=replace(CONFIG, rounds=40), picture=512)
    before = sum(path.stat().st_size for path in run.glob("samples/*.png"))
    page = page_module.make([run])
    assert before > 30e6
    assert len(page.encode()) < 1.5e6
    shown = Page(page).images
    labels = [image["data-label"] for image in shown]
    assert 1 <= len(labels) <= 12
    assert labels[-1] == "round 40"
    data = base64.b64decode(shown[-1]["src"].split(",")[1])
    assert max(Image.open(io.BytesIO(data)).size) >= 200


def test_a_page_of_many_runs_is_below_its_bound(tmp_path):
    """60 settings, each with a picture of 30 kB after each of 10 rounds: 18 MB."""
    config = replace(CONFIG, rounds=10)
    for clients in range(2, 62):
        changed = replace(config, clients=clients)
        write_run(tmp_path / str(clients), list(np.linspace(9, 5, 10)), done=10, config=changed, picture=100)
    page = page_module.make([tmp_path])
    assert len(page.encode()) < 1.5e6
    assert len(Page(page).images) >= 20


@pytest.mark.slow
def test_so_is_one_of_many_settings_and_rounds(tmp_path):
    config = replace(CONFIG, rounds=150)
    for clients, seed in product(range(2, 32), (0, 1)):
        changed = replace(config, clients=clients, seed=seed)
        scores = list(np.linspace(9, 5, 150) + clients / 7)
        write_run(tmp_path / f"{clients}-{seed}", scores, done=150, config=changed, held_out=True)
    page = page_module.make([tmp_path])
    assert len(page.encode()) < 1.5e6
    assert len(Page(page).images) >= 30
    charts = [json.loads(data)["figure"] for data in re.findall(r'"application/json">(.*?)</script>', page)]
    lines = [line for chart in charts[1:4] for line in chart["lines"]]
    assert len(lines) == 90
    assert all(len(line["y"]) == 66 and line["x"]["round"][-1] == 150 for line in lines)


def test_pictures_come_before_tables(tmp_path):
    page = page_module.make([write_sweep(tmp_path)])
    assert page.index('class="answer"') < page.index("<input type=") < page.index('class="chart"') < page.index("<img ")
    assert max(page.rindex('class="chart"'), page.rindex("<img ")) < page.index("<table>")


def test_where_seconds_and_bytes_went_is_what_rows_say(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows, 1):
        row["seconds"] |= {"training": 1.5 * k, "waiting": 0.5, "transfer": 0.25, "fold": 0.5, "server": 0.2}
        row["seconds"] |= {"record": 0.05, "evaluate": 2.0 * k}
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    older = write_run(tmp_path / "older", config=replace(CONFIG, clients=8))
    page = page_module.make([run, older])
    charts = [json.loads(data)["figure"] for data in re.findall(r'"application/json">(.*?)</script>', page)]
    seconds, sent = (chart for chart in charts if chart["kind"] == "stack")
    names = {part["key"]: part["name"] for part in seconds["parts"]}
    first, second = ({names[key]: value for key, value in group["y"].items()} for group in seconds["groups"])
    assert first == {
        "training": [1.5, 3.0, 4.5], "waiting": [0.5] * 3, "transfer": [0.25] * 3, "fold": [0.5] * 3,
        "server": [0.2] * 3, "record": [0.05] * 3, "checkpoint": [0.25] * 3, "evaluation": [2.0, 4.0, 6.0],
    }  # fmt: skip
    assert (second["training"], second["waiting"]) == ([2.5] * 3, [0.0] * 3)  # 3.0 of the round but for its fold
    assert [group["y"] for group in sent["groups"]] == [{"bytes_down": [2000.0] * 3, "bytes_up": [1000.0] * 3}] * 2


def test_many_rounds_have_few_bars_and_the_same_mean(tmp_path):
    run = write_run(tmp_path / "run", done=150, config=replace(CONFIG, rounds=150))
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        row["bytes_up"] = k
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = re.findall(r'"application/json">(.*?)</script>', page_module.make([run]))
    (group,) = json.loads(data[-1])["figure"]["groups"]
    assert len(group["x"]) == 60
    spans = [[int(number) for number in text.split("–")] for text in group["x"]]
    assert (spans[0][0], spans[-1][-1]) == (1, 150)
    for span, value in zip(spans, group["y"]["bytes_up"], strict=True):
        assert value == pytest.approx(np.arange(span[0] - 1, span[-1]).mean(), rel=1e-4)


def test_clients_are_added_up_and_at_most_so_many(tmp_path):
    run = write_run(tmp_path / "run", held_out=True)
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        row["clients"] = [row["clients"][0] | {"client": k, "loss": k / 100, "images": 10} for k in range(1000)]
        row["held_out"]["clients"] = {str(k): k / 50 for k in range(1000)}
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_module.make([run])
    clients = re.search(r'<section class="clients">.*?</section>', page, re.DOTALL).group()
    found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr.*?</tr>", clients, re.DOTALL)]
    assert [row[0] for row in found[1:]] == [str(k) for k in range(600, 1000)]  # of the highest losses
    assert found[1] == ["600", "3", "30", "6.00", "12.0", "4.50", "0.00300", "0.00150", "0"]
    assert "without the 600 of the lowest losses" in clients


def test_command(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", [5.0])
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report    {run / 'report.html'}\n"
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html"), "--open"]) == 0
    assert opened == [(tmp_path / "page.html").as_uri()]
    assert "fd[digits]" in (tmp_path / "page.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "page.html"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("", "say what to report on"), ("nothing", "does not exist"), ("empty", "holds no runs"),
     ("run --out nowhere/page.html", "the directory nowhere does not exist"), ("run --out empty", "is a directory")],
)  # fmt: skip
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", [5.0])
    assert main(["report", *arguments.split()]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.html"))
