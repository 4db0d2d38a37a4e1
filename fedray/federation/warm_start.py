"""A warm start: a learner takes over the weights that a run, or a folder that diffusers loads, ends with."""

from pathlib import Path
from typing import Any

from fedray.errors import UserError, reason
from fedray.federation.worker import sampled
from fedray.record.run import Run
from fedray.tasks import Learner

TOLD = ("epsilon", "delta", "neighbours")  # of what a run has spent


def spent_before(source: Path) -> dict[str, Any] | None:
    """Return what a run, that another starts from, has spent: its own privacy, and that of its start; None of a folder.

    None for a kind without noise, and for all where the run has no result yet.
    """
    if (source / "model_index.json").is_file() or not (source / "config.json").is_file():
        return None
    result = Run.open(source).result or {}
    kinds = ("privacy", "example_privacy")
    told = {kind: {name: result[kind][name] for name in TOLD} if kind in result else None for kind in kinds}
    return {
        "run": source.name,
        **told,
        **({"started_from": result["started_from"]} if "started_from" in result else {}),
    }


def warm_start(learner: Learner, source: Path) -> None:
    """Load weights into a learner: of a run, what it delivers after its last complete round.

    Raises:
        UserError: there are none, or they are those of another network.
    """
    flag = f"--init-from {source}"
    if not source.is_dir():
        raise UserError(f"{flag}: there is no such directory; name a run, or a folder that diffusers loads.")
    if (source / "model_index.json").is_file() or not (source / "config.json").is_file():
        load = getattr(learner, "load", None)
        if load is None:
            raise UserError(f"{flag}: it is no run, and this task loads nothing else.")
        try:
            load(source)
        except Exception as error:  # libraries raise many kinds for files that are missing or damaged
            raise UserError(f"{flag}: it does not fit this network ({reason(error)}).") from error
        return
    try:
        state = Run.open(source).state(learner.flat.layout)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if state is None:
        raise UserError(f"{flag}: the run has no complete round yet.")
    if "base" in state.tensors:
        raise UserError(
            f"{flag}: the run changed its base too, which adapters do not hold; fine-tune its whole pipeline with "
            f"--pretrained-model-name-or-path {source / 'model'}."
        )
    learner.flat.vector.detach().copy_(sampled(state.tensors)["model"])
