"""fedray push: a run's model to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from fedray.record.hub import check_repository, push
from fedray.record.run import Run


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where and how a model is pushed to the Hugging Face hub."""

    hub_model_id: str | None = None
    """Repository on the hub, USER/NAME; by default the name of the run's directory."""
    hub_token: str | None = None
    """Token that may write there; by default that of `hf auth login`, or $HF_TOKEN. It is written nowhere."""
    hub_private_repo: bool = False
    """Make the repository private, if it is not there yet."""
    license: str | None = None
    """Licence of the model, for its card, as the hub names it: apache-2.0, mit, openrail …"""

    def check(self, out: Path) -> None:
        """Raise `UserError` unless there can be such a repository."""
        check_repository(self.hub_model_id or out.name)

    def push(self, run: Run) -> None:
        """Push a complete run, and print where. Raises `UserError` or `RunError`."""
        name = self.hub_model_id or run.directory.resolve().name
        page = push(run, name, license=self.license, token=self.hub_token, private=self.hub_private_repo)
        print(f"pushed    {page}")


@dataclass(frozen=True, kw_only=True)
class Push(Hub):
    """Push a complete run's model to the Hugging Face hub: the folder for diffusers, a card with scores, pictures."""

    run: tyro.conf.Positional[Path]
    """Directory of the run, or its URL."""


def main(arguments: list[str]) -> None:
    """Parse and run `fedray push`."""
    options = tyro.cli(Push, args=arguments, prog="fedray push")
    options.push(Run.open(options.run))
