"""A run in Python and in notebooks: what it shows is what its files and `fedray sample` say."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import fedray
from fedray.commands.sample import main as draw
from fedray.presets import PRESETS


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of seconds on digits, scored every second round."""
    from dataclasses import replace

    config = replace(
        PRESETS["digits"], rounds=3, local_epochs=None, local_steps=2, evaluate_every=2, evaluate_samples=32,
        sampling_steps=4, kid_subset_size=16, actors=0,
    )  # fmt: skip
    return fedray.run(config, tmp_path_factory.mktemp("runs") / "digits")


def test_scores_and_rounds_are_those_of_the_record(digits):
    scores, last = digits.scores, digits.rows[-1]["scores"]
    assert list(scores.index) == list(last)
    assert scores.loc["fd[digits]", "value"] == last["fd[digits]"]["value"]
    assert scores.loc["fd[digits]", "n"] == 32
    frame = digits.frame
    assert list(frame["round"]) == [1, 2, 3]
    assert list(frame["loss"]) == [row["loss"] for row in digits.rows]
    assert frame.loc[2, "fd[digits]"] == last["fd[digits]"]["value"]


def test_samples_are_those_of_the_run_and_of_the_command(digits, tmp_path):
    np.testing.assert_array_equal(np.asarray(digits.samples), np.asarray(Image.open(digits.directory / "samples.png")))
    images = digits.sample(8, seed=1)
    assert images.dtype == torch.uint8
    assert images.shape == (8, 1, 8, 8)
    draw([str(digits.directory), "--num-images", "8", "--seed", "1", "--out", str(tmp_path / "picture.png")])
    np.testing.assert_array_equal(np.asarray(fedray.grid(images)), np.asarray(Image.open(tmp_path / "picture.png")))


def test_the_model_is_the_pipeline_with_the_average(digits):
    pipeline = digits.model()
    assert type(pipeline).__name__ == "DDPMPipeline"
    from fedray.vector import sha256

    learner = digits.config.task.build(torch.device("cpu"))
    learner.unet.load_state_dict(pipeline.unet.state_dict())
    assert sha256(learner.flat.vector.detach()) == digits.result["delivered_sha256"]


class Told:
    """A tracker that keeps what it is told."""

    def start(self, run):
        self.entries = []

    def log(self, entry):
        self.entries.append(entry)

    def finish(self):
        pass


@pytest.mark.slow
def test_the_model_of_a_fine_tuned_run(photos, tmp_path):
    from dataclasses import replace

    base = PRESETS["digits-lora"]
    task = replace(base.task, train_data_dir=str(photos), validation_prompt=("the digit six",))
    config = replace(base, task=task, rounds=1, local_steps=1, evaluate_samples=0, features=None, actors=0)
    told = Told()
    run = fedray.run(config, tmp_path / "run", report_to=[told])
    strips = [run.directory / f"validation/round-00000{number}.png" for number in (0, 1)]
    assert [entry.pictures.get("validation") for entry in told.entries] == strips
    pipeline = run.model()
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    adapters = {name: weight for name, weight in pipeline.unet.state_dict().items() if "lora_" in name}
    assert sum(weight.numel() for weight in adapters.values()) * 4 == run.rows[-1]["clients"][0]["bytes_up"]
    assert run.sample(2, prompts=["the digit six"]).shape == (2, 3, 16, 16)
    with pytest.raises(fedray.UserError, match="has drawn no samples"):
        run.samples  # noqa: B018


def test_its_repr(digits):
    value = digits.scores.loc["fd[digits]", "value"]
    assert repr(digits) == (
        f"<fedray.Run {digits.directory} · 3 of 3 rounds · loss {digits.rows[-1]['loss']:.4g} · "
        f"fd[digits] {value:.4g} (n = 32)>"
    )
    page = digits._repr_html_()
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (digits.directory / "samples.png").read_bytes()
    assert f"fd[digits] {value:.4g} (n = 32)" in page


def test_a_run_that_is_not_complete(toy_config, tmp_path):
    from runs import train

    train(toy_config(rounds=5), tmp_path, rounds=2)
    run = fedray.Run.open(tmp_path)
    assert "2 of 5 rounds · not complete" in repr(run)
    assert run.scores.empty
    with pytest.raises(fedray.UserError, match="is not complete, and has no model yet"):
        run.model()
    assert "no run" in repr(fedray.Run(tmp_path / "nowhere"))
    done = fedray.run(toy_config(), tmp_path / "toy")
    with pytest.raises(fedray.UserError, match="no pipeline of diffusers"):
        done.model()
    assert done.sample(3).shape == (
        3,
        1,
        2,
        2,
    )  # of a task that no file has: by the configuration that it was made with


NOTEBOOK = """
import fedray
from dataclasses import replace
config = replace(fedray.PRESETS["digits"], **{**fedray.SMOKE, "rounds": 2, "local_epochs": None, "local_steps": 1})
run = fedray.run(replace(config, actors=0), "notebook-run")
---
run
---
run.samples
---
run.scores
"""


@pytest.mark.slow
def test_a_notebook_shows_progress_run_picture_and_scores(tmp_path):
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK.split("---")]
    book = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}, timeout=300).execute()
    first, run, picture, scores = (cell.outputs for cell in book.cells)
    assert "ipywidgets" not in str(book)  # nobody is told to install them
    page, samples = first  # the table, and the picture of the last evaluation
    assert (
        samples.data["image/png"].strip()
        == base64.b64encode((tmp_path / "notebook-run/samples/round-000002.png").read_bytes()).decode()
    )
    assert "2 of 2 rounds" in page.data["text/html"]
    assert "<td>2</td>" in page.data["text/html"]
    assert "<progress" not in page.data["text/html"]
    assert "2 of 2 rounds" in run[0].data["text/html"]
    assert picture[0].data["image/png"]
    assert "fd[digits]" in scores[0].data["text/html"]


@pytest.mark.slow
def test_a_script_without_a_terminal_prints_nothing(tmp_path):
    code = NOTEBOOK.split("---")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert (tmp_path / "notebook-run/result.json").is_file()
    assert Path(tmp_path / "notebook-run/model/model_index.json").is_file()
