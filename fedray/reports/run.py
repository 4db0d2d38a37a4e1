"""A run as Python and notebooks see it: its scores, rounds, pictures and model."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedray.config import Config
from fedray.errors import UserError
from fedray.lazy import torch
from fedray.record import run as record
from fedray.record.hub import push
from fedray.scores.metrics import deciding

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image


class Run(record.Run):
    """A run directory, to read from: `fedray.run` returns one, and `fedray.Run.open` opens one."""

    made_with: Config | None = None

    @classmethod
    def open(cls, directory: str | Path, config: Config | None = None) -> Self:
        """Open an existing run, at a path or a URL.

        Args:
            config: its configuration, where that has classes of your own: code that a directory names does not run.

        Raises:
            UserError: there is none.
        """
        run = super().open(directory)
        run.made_with = config
        return run

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return super().config if self.made_with is None else self.made_with

    @property
    def scores(self) -> pd.DataFrame:
        """The last evaluation's scores, by name: value, n, std, over (what std was taken over) and note."""
        import pandas as pd

        table = pd.DataFrame.from_dict(self._last_scores(), orient="index")
        return table.reindex(columns=["value", "n", "std", "over", "note"]).rename_axis("score")

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each complete round, with the columns of `fedray.load`."""
        from fedray.reports.results import load

        return load(self.directory).rounds

    @property
    def samples(self) -> Image.Image:
        """The grid of the last evaluation's samples. Raises `UserError` where there was none."""
        from PIL import Image

        path = self.directory / "samples.png"
        if not path.is_file():
            raise UserError(f"the run at {self} has drawn no samples; draw some by its sample().")
        with Image.open(path) as picture:
            picture.load()
            return picture

    def sample(
        self, n: int = 64, seed: int = 0, prompts: Sequence[str] = (), labels: Sequence[int] = ()
    ) -> torch.Tensor:
        """Draw images from the model of the last complete round, on this process's CPU: uint8 [n, channels, h, w].

        They are those of `fedray sample` of the same seed. `fedray.grid` makes a picture of them.

        Args:
            prompts: of fine-tuned models, what to draw, in turn; by default what the run drew.
            labels: of class-conditional models, the classes to draw, in turn; by default all.

        Raises:
            UserError: no round is complete, the model has no such class, or the configuration names Python code of
                yours: open the run with its `config`.
        """
        from fedray.federation.delivered import model_of, sampling_of
        from fedray.federation.evaluation import sample
        from fedray.federation.modes import plain
        from fedray.federation.pool import LocalPool

        config = replace(self.config, actors=0, gpus_per_actor=0.0, features=None)
        with plain():
            sampling = sampling_of(self, config, n, seed, prompts, labels)
            _, images = sample(LocalPool(config), model_of(self, config), sampling)
        return torch.from_numpy(images)

    def model(self) -> Any:
        """Load the delivered model as a pipeline of diffusers; adapters on top of their base.

        Raises:
            UserError: the run is not complete, or its model is not one of diffusers.
        """
        from diffusers import DiffusionPipeline

        folder = self.directory / "model"
        if self.result is None:
            raise UserError(f"the run at {self} is not complete, and has no model yet; resume it.")
        if (folder / "model_index.json").is_file():
            return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        task = self.saved["config"]["task"]
        base = task.get("pretrained_model_name_or_path")
        if base is None or not (folder / "pytorch_lora_weights.safetensors").is_file():
            raise UserError(f"{folder} is what a task of your own has written, and no pipeline of diffusers.")
        pipeline = DiffusionPipeline.from_pretrained(base)
        if task.get("prediction_type") is not None:
            scheduler = pipeline.scheduler
            pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=task["prediction_type"])
        pipeline.load_lora_weights(folder)
        return pipeline

    def push_to_hub(
        self, repository: str, *, license: str | None = None, token: str | None = None, private: bool = False
    ) -> str:
        """Upload the model and its card to the Hugging Face hub, and return its page; as `fedray push` does."""
        return push(self, repository, license=license, token=token, private=private)

    def __repr__(self) -> str:
        return f"<{' · '.join([f'fedray.Run {self}', *self.facts()])}>"

    def _repr_html_(self) -> str:
        facts = " · ".join(map(html.escape, self.facts()))
        picture = self.directory / "samples.png"
        image = ""
        if picture.is_file():
            data = base64.b64encode(picture.read_bytes()).decode()
            image = f'<img style="max-height: 24em" alt="samples" src="data:image/png;base64,{data}">'
        return f"<div><b>{html.escape(str(self))}</b><br>{facts}</div>{image}"

    def _last_scores(self) -> dict[str, Any]:
        return next((row["scores"] for row in reversed(self.rows) if row["scores"]), {})

    def facts(self) -> list[str]:
        """Say in a few words how far the run is, and how good."""
        if not (self.directory / "config.json").is_file():
            return ["no run"]
        rows, result = self.rows, self.result
        facts = [f"{len(rows)} of {self.saved['config']['rounds']} rounds"]
        facts += ["not complete"] if result is None else []
        facts += [f"ended early: {result['stopped']}"] if result is not None and "stopped" in result else []
        if rows:
            facts += [f"loss {row['loss']:.4g}" for row in rows[-1:] if row["loss"] is not None]
            scores = self._last_scores()
            name = deciding(scores) or next(iter(scores), None)
            facts += [f"{name} {scores[name]['value']:.4g} (n = {scores[name]['n']})"] if name else []
        return facts
