"""Model cards in Hugging Face's form: a model's data, training and scores."""

import shlex
from pathlib import Path
from typing import Any

from fedray.config import Config


def privacy_of(result: dict[str, Any]) -> str | None:
    """Say what noise proves; None where there was none."""
    spent = result.get("privacy")
    if spent is None:
        return None
    if spent["epsilon"] is None:
        return "updates are clipped, without noise: no ε"
    seed = "" if not spent["repeatable"] else "; the noise follows from the run's seed, which must stay secret"
    return (
        f"ε = {spent['epsilon']:.4g} at δ = {spent['delta']:g} for {spent['neighbours']}, {spent['accountant']}{seed}"
    )


def model_card(config: Config, result: dict[str, Any], command: list[str]) -> str:
    """Write the card in Markdown, from a run's settings, its result and the command that began it."""
    settings = config.to_json()
    base = getattr(config.task, "pretrained_model_name_or_path", None)
    base = Path(base).name if base and Path(base).exists() else base  # a path of this machine says nothing elsewhere
    data = getattr(config.task, "train_data_dir", None) or getattr(config.task, "dataset_name", config.task.name)
    facts = {
        "base": base,
        "data": f"{Path(str(data)).name}, {result['examples']:,} images among {config.clients} clients",
        "partition": settings["partition"],
        "rounds": f"{result['rounds']}, aggregated by {settings['algorithm']}",
        "local training": f"{config.local_steps} steps" if config.local_steps else f"{config.local_epochs} epochs",
        "sent": f"{result['bytes_down']:,} bytes down, {result['bytes_up']:,} up",
        "privacy of clients": privacy_of(result),
        **{name: f"{score['value']:.4g} (n = {score['n']})" for name, score in result["scores"].items()},
        "weights' SHA-256": result.get("delivered_sha256", result["vector_sha256"]),
        "command": f"`{shlex.join(command)}`",
    }
    front = ["---", "library_name: diffusers", *([f"base_model: {base}"] if base else []), "tags: [fedray]", "---"]
    lines = [f"| {name} | {fact} |" for name, fact in facts.items() if fact]
    return "\n".join([*front, "", "# A model trained by federated averaging", "", "| | |", "|---|---|", *lines, ""])
