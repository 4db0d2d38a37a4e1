"""What experiments/ show users, run as it stands there."""

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import fedray
from fedray.cli import main
from fedray.record.run import Run

ROOT = Path(__file__).parent.parent


def python(*arguments, cwd):
    ran = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a file of experiments/ as `python FILE` does, in this process: of its own, one imports for ten seconds."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "experiments" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def few_samples(monkeypatch):
    """Presets that draw few samples in few steps."""
    for name in ("digits", "digits-lora"):
        few = replace(fedray.PRESETS[name], evaluate_samples=40, sampling_steps=4, kid_subset_size=20)
        monkeypatch.setitem(fedray.PRESETS, name, few)


@pytest.mark.slow
@pytest.mark.parametrize("actors", [0, 2])
def test_a_network_and_dataset_of_ones_own(tmp_path, script, actors):
    """On actors as a user's process, whose `__main__` has the classes."""
    arguments = ["--out", tmp_path / "run", "--rounds", 2, "--examples", 100, "--actors", actors]
    if actors:
        printed = python(ROOT / "experiments/custom_task.py", *arguments, cwd=tmp_path)
    else:
        printed = script("custom_task.py", *arguments)
    assert "samples.png" in printed
    run = Run.open(tmp_path / "run")
    assert run.result["rounds"] == 2
    assert run.rows[1]["loss"] < run.rows[0]["loss"]
    assert {path.name for path in (run.directory / "model").iterdir()} == {"velocity.pt", "README.md"}


@pytest.mark.slow
def test_the_digits_experiment_in_short(tmp_path, script, few_samples):
    command = ["digits.py", "--rounds", 1, "--seeds", 0, 1, "--out", tmp_path / "runs", "--actors", 0]
    printed = script(*command)
    assert "fd[digits], federated ÷" in printed
    table = pd.read_csv(tmp_path / "runs/summary.csv")
    assert len(table) == 6
    steps = table[table.seed == 0].set_index("run")["sequential steps"]
    passes = table[table.seed == 0].set_index("run")["passes"]
    assert steps["federated"] == steps["centralised, same steps"] == 60
    assert passes["federated"] == passes["centralised, same passes"] == 4
    assert Image.open(tmp_path / "runs/samples.png").width == 1600
    before = (tmp_path / "runs/federated-0/result.json").stat().st_mtime_ns
    script(*command)  # nothing is trained twice
    assert (tmp_path / "runs/federated-0/result.json").stat().st_mtime_ns == before


def test_effects_of_clients_steps_and_images_are_told_apart():
    """From scores made with known effects: +10 % for twice the clients, −20 % images, nothing of the steps."""
    import same_steps

    rng, rows = np.random.default_rng(0), []
    for clients, steps, batch, seed in product((1, 2, 4, 8), (15, 30, 60), (32, 64), range(5)):
        images = clients * 1200 * batch
        score = 50 * 1.1 ** np.log2(clients) * 0.8 ** np.log2(images / 1e5) * np.exp(0.2 * seed + rng.normal(0, 0.05))
        rows.append(
            {"clients": clients, "local_steps": steps, "total.images": images, "seed": seed, "fd[digits]": score,
             "round": 1, "rounds": 1, "complete": True, "directory": str(len(rows)), "sha256": str(len(rows))}
        )  # fmt: skip
    rounds = pd.DataFrame(rows)
    found = same_steps.effects(rounds)
    assert (found["low"] <= found["change"]).all()
    for name, truth in {"clients": 10, "steps between averagings": 0, "images": -20}.items():
        assert found.loc[name, "low"] < truth < found.loc[name, "high"]
        assert found.loc[name, "high"] - found.loc[name, "low"] < 6
    alone = same_steps.effects(rounds[rounds["total.images"] == rounds["clients"] * 1200 * 32])
    assert list(alone.index) == ["clients", "steps between averagings"]  # clients and images rise together


@pytest.mark.slow
def test_the_samplers_experiment(tmp_path, script):
    flags = "--rounds 1 --local-steps 2 --evaluate-samples 0 --actors 0 --kid-subset-size 8"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "run")]) == 0
    script("samplers.py", tmp_path / "run", "--samples", 10)
    table = pd.read_csv(tmp_path / "run/samplers.csv", index_col="sampler")
    assert {"ddpm-1000", "ddim-50", "ddim-100", "dpmsolver++-20", "unipc-10", "unipc-20"} <= set(table.index)
    assert table["seconds"].idxmax() == "ddpm-1000"
    assert table["fd[digits]"].notna().all()


@pytest.mark.slow
def test_the_lora_experiment_in_short(tmp_path, script, few_samples):
    printed = script("lora_digits.py", "--rounds", 1, "--actors", 0, "--out", tmp_path / "runs")
    assert "gain in accuracy over" in printed.replace("\n", " ")
    table = pd.read_csv(tmp_path / "runs/summary.csv").set_index("run")
    assert list(table.index) == ["base", "federated", "centralised", "centralised, same images", "alone"]
    assert table.loc["federated", "sequential steps"] == table.loc["centralised", "sequential steps"] == 8
    assert table.loc["base", "accuracy[digits]"] < 0.1
    assert Image.open(tmp_path / "runs/federated-0/validation.png").width > 500


@pytest.mark.slow
def test_the_rules_of_adapters_in_short(tmp_path, script):
    import lora_rules

    printed = script("lora_rules.py", "--smoke", "--actors", 0, "--out", tmp_path / "rules")
    assert "rates chosen by accuracy[digits]" in printed
    tuning, report = (pd.read_csv(tmp_path / f"rules/{name}.csv") for name in ("tuning", "summary"))
    rules = list(lora_rules.RULES)
    assert list(dict.fromkeys(report["rule"])) == rules
    assert set(tuning["seed"]) == {0}
    assert set(report["seed"]) == {1}  # the report's seeds were not tuned on
    for rule in rules:
        tried = tuning[tuning["rule"] == rule].set_index("learning rate")
        rates = {tried["accuracy[digits]"].idxmax(), tried["fd[digits]"].idxmin()}
        assert set(report[report["rule"] == rule]["learning rate"]) == rates
    first = report.groupby("rule").first()
    exact = ["flora", "flora, warm", "fedex", "ffa", "rolora"]
    assert first.loc[exact, "aggregation error"].max() < 1e-6 < first.loc["fedavg", "aggregation error"]
    assert first["MB up"].to_numpy() == pytest.approx(first.loc["fedavg", "MB up"], rel=0.05)  # at twice the rank too


@pytest.mark.slow
def test_private_adapters_in_short(tmp_path):
    command = [ROOT / "experiments/lora_privacy.py", "--smoke", "--actors", 0, "--out", tmp_path / "runs"]
    printed = python(*command, cwd=tmp_path)
    assert "membership" in printed
    table = pd.read_csv(tmp_path / "runs/audits.csv").set_index("ε")
    assert list(table.index.round(1)) == [float(f"{table.index[0]:.1f}"), float("inf")]
    assert table.index[0] <= 8
    assert table[["membership", "exposure", "copies", "accuracy[digits]", "fd[digits]"]].notna().all().all()
    assert (table["ε at least"] <= table.index).all()


@pytest.mark.slow
def test_energy_by_rank_where_nobody_learns(tmp_path, capsys):
    """Of 12 clients 8 have rank 8 and 4 have rank 16: what their docstring says of singular values, round by round."""
    import rank_collapse

    rank_collapse.main(seeds=(0,), count=2, out=tmp_path / "energy.csv")
    assert "ranks 9-16" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "energy.csv")
    still = table[table["step"] == 0].set_index(["rule", "round"])
    for rule, power in {"fedavg": 4, "svd": 2, "raflora": 0}.items():
        for number in range(3):
            parts = np.array([4, 4 * (2 / 3) ** (power * number), 8 * (1 / 3) ** (power * number)])
            found = still.loc[(rule, number), ["ranks 5-8", "ranks 9-16"]].to_numpy(float)
            assert found == pytest.approx(parts[1:] / parts.sum(), rel=2e-3)
    assert set(table["step"]) == {0, 0.1}


def test_learning_rates_are_chosen_by_each_metric():
    import lora_rules

    rows = [("fedavg", 1e-2, 0.5, 60), ("fedavg", 2e-2, 0.6, 70), ("ffa", 1e-2, 0.4, 50), ("ffa", 2e-2, 0.3, 55)]
    table = pd.DataFrame(rows, columns=["rule", "learning rate", "accuracy[digits]", "fd[digits]"])
    assert lora_rules.best(table) == {
        "fedavg": {"accuracy[digits]": 2e-2, "fd[digits]": 1e-2}, "ffa": {"accuracy[digits]": 1e-2, "fd[digits]": 1e-2}
    }  # fmt: skip


@pytest.mark.slow
def test_the_payloads(script):
    printed = script("lora_payload.py")
    for oracle in ("454,692,876", "3,188,736", "3,438,083,856", "1,719,041,928", "143 to 1", "539 to 1"):
        assert oracle in printed
    printed = script("lora_payload.py", "--smoke")
    (said,) = re.findall(r"LoRA .*?46,592.*?([\d,]+) +│\n", printed)
    assert f"a round of it: {said} bytes down to a client and {said} up" in printed
