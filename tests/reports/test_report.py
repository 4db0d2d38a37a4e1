"""The page of fedray report: what it says, that it needs nothing else, and that it works in a browser."""

import base64
import json
import math
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

import fedray
from fedray.cli import main
from fedray.config import Config
from fedray.reports import page as page_module
from fedray.reports.answer import answer, decisive, number, pair, ranked, with_settings
from fedray.reports.comparisons import compare, compare_columns
from fedray.reports.results import load, varied

CONFIG = Config(clients=2, rounds=3, local_epochs=1, evaluate_samples=16, features="digits", actors=0)
EVIL = "<script>alert('<b>')</script>"


def write_run(directory, scores=(), complete=True, done=3, config=CONFIG, held_out=False, picture=8, **texts):
    """A run directory as a run leaves it. `scores` are those of fd[digits] in the last rounds."""
    values = config.to_json() | texts
    directory.mkdir(parents=True)
    saved = {
        "config": values, "images_sha256": "11" * 32, "partition_sha256": directory.name, "git_commit": "abc",
        "versions": {"fedray": "0.1.0"}, "machine": {"cpus": 2, "gpus": 0}, "started": "2026-01-01T00:00:00+0000",
        "command": ["/opt/tools/bin/fedray", "train", "--clients", "2", "--out", "with space"],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(saved))
    for kind in ("samples", "validation"):
        (directory / kind).mkdir()
    rows = []
    for k in range(1, done + 1):
        late = k - 1 - (done - len(scores))
        measured = {"fd[digits]": {"value": scores[late], "n": config.evaluate_samples}} if late >= 0 else {}
        if measured:
            measured["fd[digits]/real"] = {"value": 4.0, "n": 16}
            noise = np.random.default_rng(k).integers(0, 256, (picture, picture, 3), np.uint8)
            Image.fromarray(noise).save(directory / "samples" / f"round-{k:06d}.png")
        client = {"client": 0, "seconds": 1.5, "loss": 0.5, "bytes_down": 1000, "bytes_up": 500, "outcome": "ok"}
        losses = {"local": 0.7 / k, "aggregated": 0.6 / k, "global": 0.5 / k, "spread": 0.01}
        rows.append({
            "round": k, "cohort": [0], "loss": 1 / k, "steps": 8, "sequential_steps": 4, "images": 64,
            "bytes_down": 2000, "bytes_up": 1000, "seconds": {"fold": 0.5, "round": 3.0, "save": 0.25},
            "aggregation": {}, "held_out": losses if held_out else {}, "scores": measured, "clients": [client],
        })  # fmt: skip
    (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        result = {"scores": rows[-1]["scores"]}
        (directory / "result.json").write_text(json.dumps(result))
    return directory


SWEEP = {2: [5.0, 6.0, 7.0], 8: [8.0, 10.0, 10.0]}  # by clients, of seeds 0, 1, 2


def write_sweep(out, values=SWEEP, question="Do more clients hurt?\n\n    fedray sweep x.py\n\nMore of it."):
    trials = [(clients, seed) for clients in values for seed in range(len(values[clients]))]
    for clients, seed in reversed(trials):
        config = replace(CONFIG, clients=clients, seed=seed)
        score = values[clients][seed]
        write_run(out / f"clients-{clients}-seed-{seed}", [score + 3, score + 1, score], config=config)
    record = {
        "name": "figure", "question": question, "started": "2026-01-01T00:00:00+0000",
        "command": ["/opt/tools/bin/fedray", "sweep", "experiments/x.py"], "varied": ["clients", "seed"],
        "trials": [
            {"directory": f"clients-{clients}-seed-{seed}", "changes": {"clients": clients, "seed": seed}}
            for clients, seed in trials
        ],
    }  # fmt: skip
    (out / "figure.sweep.json").write_text(json.dumps(record))
    return out


def answer_of(*places, planned=1):
    rounds = load(*places).rounds
    return answer(with_settings(rounds, varied(rounds)), planned)


class Page(HTMLParser):
    """Links, styles and visible text of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.styles, self.text, self.images, self.stack = [], "", "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href", "srcset", "action", "poster", "data") if name in found]
        self.styles += found.get("style") or ""
        if tag == "img":
            self.images.append(found)
        if tag not in ("meta", "link", "img", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack[-1:] == ["style"]:
            self.styles += data
        elif self.stack[-1:] != ["script"]:
            self.text += data


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
    best = re.search(r'<tr class="best">.*?</tr>', page, re.DOTALL).group()
    assert "clients=2, local_epochs=4" in best


def test_a_setting_without_the_score_is_left_empty(tmp_path):
    write_run(tmp_path / "a", [5.0])
    write_run(tmp_path / "b", config=replace(CONFIG, clients=8))
    page = page_module.make([tmp_path])
    row = re.search(r"<tr><th scope=\"row\">clients=8.*?</tr>", page).group()
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
    escaped = "partition=&lt;script&gt;alert(&#x27;&lt;b&gt;&#x27;)&lt;/script&gt;"  # plotly.js reads markup
    assert escaped in charts[-1]["figure"]["data"][0]["name"]
    assert escaped in charts[-2]["figure"]["data"][0]["x"]
    assert "<script" not in json.dumps(charts)


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
    assert "What comes of it when 2 clients (partition iid) train on digits, for 3 rounds of 1 local epoch?" in text
    assert "fedray train --clients 2 --out 'with space'" in text


def test_costs_are_sums_and_means(tmp_path):
    page = page_module.make([write_run(tmp_path / "run", [5.0])])
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    assert ["run", "1,000", "500", "0.00300", "0.00900"] in rows  # 2000 + 1000 bytes, three rounds
    assert ["run", "7.50", "1.50", "0.750", "9.75"] in rows  # training, fold, save and all, seconds


def test_many_and_large_pictures_are_thinned_and_compressed(tmp_path):
    scores = list(np.linspace(9, 5, 40))
    run = write_run(tmp_path / "run", scores, done=40, config=replace(CONFIG, rounds=40), picture=512)
    before = sum(path.stat().st_size for path in run.glob("samples/*.png"))
    page = page_module.make([run])
    assert before > 30e6
    assert len(page) < 12e6
    labels = [image["data-label"] for image in Page(page).images]
    assert 3 <= len(labels) <= 12
    assert (labels[0], labels[-1]) == ("round 1", "round 40")


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


# In a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium without a network."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver) and "CI" not in os.environ:
        pytest.skip("chromium and chromedriver are not installed")
    assert chromium, "chromium is not installed"
    assert driver, "chromedriver is not installed"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
    ):  # fmt: skip
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def look_at(browser, path, width, height=900):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(path.as_uri())
    assert "fedray report" in browser.title


def hovered(browser, title, curve, point):
    """What is shown when the mouse is on a point of a chart."""
    chart = browser.find_element(By.CSS_SELECTOR, f'.chart[aria-label^="{title}"]')
    x, y = browser.execute_script(
        """const [chart, curve, point] = arguments, line = chart.data[curve], layout = chart._fullLayout;
        chart.scrollIntoView({block: "center"});
        const box = chart.getBoundingClientRect(), size = layout._size, {xaxis, yaxis} = layout;
        return [box.left + size.l + xaxis.d2p(line.x[point]), box.top + size.t + yaxis.d2p(line.y[point])];
        """,
        chart, curve, point,
    )  # fmt: skip
    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(round(x) - 3, round(y) - 3)
    mouse.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    mouse.perform()
    texts = WebDriverWait(browser, 10).until(lambda _: chart.find_elements(By.CSS_SELECTOR, ".hoverlayer .hovertext"))
    return [text.text for text in texts]


def shown(browser, kind):
    """The picture that a viewer shows, and what stands beside its slider."""
    viewer = browser.find_element(By.CSS_SELECTOR, f".viewer.{kind}")
    pictures = [picture for picture in viewer.find_elements(By.TAG_NAME, "img") if picture.is_displayed()]
    assert len(pictures) == 1
    assert browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", pictures[0])
    return pictures[0].get_attribute("src"), viewer.find_element(By.TAG_NAME, "output").text


@pytest.mark.slow
def test_a_runs_page_in_a_browser(tmp_path, browser):
    config = replace(
        fedray.PRESETS["digits"], rounds=3, local_epochs=None, local_steps=2, evaluate_every=1, evaluate_samples=16,
        sampling_steps=2, kid_subset_size=8, actors=0,
    )  # fmt: skip
    run = fedray.run(config, tmp_path / "run")
    assert main(["report", str(run.directory)]) == 0
    page = run.directory / "report.html"

    look_at(browser, page, 1200)
    source = {k: as_data(run.directory / f"samples/round-{k:06d}.png") for k in (1, 2, 3)}
    assert shown(browser, "samples") == (source[3], "round 3")
    slider = browser.find_element(By.CSS_SELECTOR, ".viewer.samples input")
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown(browser, "samples") == (source[2], "round 2")
    slider.send_keys(Keys.HOME)
    assert shown(browser, "samples") == (source[1], "round 1")
    assert slider.get_attribute("aria-valuetext") == "round 1"

    for title, name in (("fd[digits] over rounds", "fd[digits]"), ("Training loss over rounds", "training loss")):
        row = run.rows[1]
        value = row["loss"] if name == "training loss" else row["scores"][name]["value"]
        (text,) = hovered(browser, title, 0, 1)
        assert "round 2" in text
        assert float(text.split(name)[1].replace(",", "")) == pytest.approx(value, rel=1e-3)

    # Against steps: two for each round.
    choice = Select(browser.find_element(By.CSS_SELECTOR, ".axis"))
    choice.select_by_visible_text("sequential steps")
    assert browser.execute_script("return document.querySelector('.chart').data[0].x") == [2, 4, 6]

    assert_fits(browser, page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.slow
def test_a_sweeps_page_in_a_browser(tmp_path, browser):
    sweep = write_sweep(tmp_path / "sweep", {clients: [5.0, 6.5] for clients in (2, 4, 8, 16, 32, 64, 128, 256, 512)})
    write_run(tmp_path / "run", [5.0], partition=EVIL, held_out=True)
    page = tmp_path / "page.html"
    page_module.write([sweep, tmp_path / "run"], page)

    look_at(browser, page, 1200)
    (text,) = hovered(browser, "fd[digits] after the last round", 0, 1)
    assert "clients=4" in text
    assert "5.75" in text
    assert "5.00 to 6.50 over 2 seeds" in text
    first = shown(browser, "samples")
    viewer = browser.find_element(By.CSS_SELECTOR, ".viewer.samples")
    choice, slider = Select(viewer.find_element(By.TAG_NAME, "select")), viewer.find_element(By.TAG_NAME, "input")
    slider.send_keys(Keys.HOME)
    assert shown(browser, "samples")[1] == "round 1"
    choice.select_by_visible_text("clients=4, seed 0")
    assert shown(browser, "samples") == first  # the last round again; the writer draws the same noise for all
    with pytest.raises(Exception, match="no such alert"):
        browser.switch_to.alert  # noqa: B018

    assert_fits(browser, page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def as_data(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def assert_fits(browser, page):
    """Nothing is wider than a phone, but what scrolls in itself."""
    look_at(browser, page, 375)
    inside, page_width = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inside == 375
    assert page_width <= 375
    wide = browser.execute_script(
        """return [...document.querySelectorAll("main *")].filter(element =>
            !element.closest(".wide, pre, .chart") && element.getBoundingClientRect().right > innerWidth + 1
        ).map(element => element.outerHTML.slice(0, 100))"""
    )
    assert wide == []
