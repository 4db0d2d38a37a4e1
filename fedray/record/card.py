"""Model cards in Hugging Face's form: a model's data, training, privacy and scores."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURES = {  # of a run, with their captions
    "samples.png": "Samples of the model",
    "validation.png": "Samples for each prompt, from the base to the last round",
    "partition.png": "Which client holds what",
}
WORDS = {"image": "unconditional-image-generation", "text": "text-to-image"}  # the hub's names of tasks

CLASSES = """\
The network draws a given class, from 0 to {last}, which `DDPMPipeline` does not pass on; so give it to the network:

```python
from functools import partial

import torch
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("model")
labels = torch.tensor([0, {last}])
pipeline.unet.forward = partial(pipeline.unet.forward, class_labels=labels)
images = pipeline(batch_size=len(labels)).images
```
"""


def privacy_of(result: dict[str, Any]) -> str | None:
    """Say what noise proves; None where there was none."""
    spent = result.get("privacy")
    if spent is None:
        return None
    if spent["epsilon"] is None:
        return "updates are clipped, without noise: no ε"
    return (
        f"ε = {spent['epsilon']:.4g} at δ = {spent['delta']:g} for {spent['neighbours']}, {spent['accountant']}"
        f"{_sampled(spent)}{_seeded(spent)}"
    )


def _examples(result: dict[str, Any]) -> str | None:
    """Say what clients' own noise proves of their examples; None where there was none."""
    spent = result.get("example_privacy")
    if spent is None or spent["epsilon"] is None:
        return None
    return (
        f"ε at most {spent['epsilon']:.4g} at δ = {spent['delta']:g} for {spent['neighbours']}, {spent['accountant']}"
        f"{_seeded(spent)}"
    )


def _sampled(spent: Mapping[str, Any]) -> str:
    known = spent.get("epsilon_of_known_cohorts", spent["epsilon"])
    return "" if known <= spent["epsilon"] else f"; ε = {known:.4g} to those who know which clients took part"


def _seeded(spent: Mapping[str, Any]) -> str:
    return "; the noise follows from the run's seed, which must stay secret" if spent.get("repeatable", True) else ""


def _before(result: Mapping[str, Any]) -> str | None:
    """Say what the run that it starts from has spent, which comes on top; None where it starts from none."""
    before = result.get("started_from")
    if before is None:
        return None
    told = [before[kind] for kind in ("privacy", "example_privacy") if before[kind] and before[kind]["epsilon"]]
    spent = [f"ε = {each['epsilon']:.4g} at δ = {each['delta']:g} for {each['neighbours']}" for each in told]
    own = f"of the run {before['run']}, on top: {', '.join(spent) or 'no ε is known'}"
    return "; ".join(filter(None, [own, _before(before)]))


def _public(command: Sequence[str], result: Mapping[str, Any]) -> list[str]:
    """Return a command without the seed that noise followed from."""
    if not {"privacy", "example_privacy"} & set(result):
        return list(command)
    pairs = zip(["", *command], command, strict=False)  # each word, after the one before
    return [word for before, word in pairs if before != "--seed" and word.partition("=")[0] != "--seed"]


def model_card(
    settings: Mapping[str, Any],
    result: dict[str, Any],
    command: Sequence[str],
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Write the card, from a run's settings (as JSON has them), its result and the command that began it.

    Args:
        license: of the model, as the hub names it (apache-2.0, mit …): that is for the user to say.
        pictures: which of `PICTURES` lie beside the card.
    """
    from huggingface_hub import ModelCardData  # takes long to import

    task = settings["task"]
    base, data = task.get("pretrained_model_name_or_path"), task.get("train_data_dir") or task.get("dataset_name")
    here = base is not None and Path(base).exists()  # a path of this machine says nothing elsewhere
    data = Path(str(data or task["name"])).name
    kind = WORDS["image" if base is None else "text"]
    prompts = [*(task.get("validation_prompt") or ()), "-"]  # "-": a picture without a prompt
    shown = next((name for name in ("validation.png", "samples.png") if name in pictures), None)
    front = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=kind,
        base_model=None if here else base,
        tags=["diffusers", "federated-learning", "fedray", *(["lora"] if base is not None else [])],
        widget=[{"text": prompts[0], "output": {"url": shown}}] if shown else None,
        eval_results=_results(kind, data, result) or None,
        model_name=f"{data}, {settings['clients']} clients, {settings['algorithm']}",
    )
    classes = task.get("num_class_embeds")
    epochs, steps = settings["local_epochs"], settings["local_steps"]
    facts = {
        "base": Path(base).name if here else base,
        "classes": classes,
        "data": f"{data}, {result['examples']:,} images among {settings['clients']} clients",
        "partition": settings["partition"],
        "rounds": f"{result['rounds']}, aggregated by {settings['algorithm']}",
        "ended early": result.get("stopped"),
        "local training": f"{steps} steps" if steps else f"{epochs} epochs",
        "sent": f"{result['bytes_down']:,} bytes down, {result['bytes_up']:,} up",
        "privacy of clients": privacy_of(result) or "no noise was added: the model may tell of the images it learned",
        "privacy of examples": _examples(result),
        "privacy of its start": _before(result),
        **{name: _value(score) for name, score in result["scores"].items()},
        "scores measured with": result["evaluation"].get("features") if result["scores"] else None,
        "weights' SHA-256": result.get("delivered_sha256", result["vector_sha256"]),
        "command": f"`{shlex.join(_public(command, result))}`",
    }
    lines = [f"| {name} | {fact} |" for name, fact in facts.items() if fact]
    images = [line for name in PICTURES if name in pictures for line in (f"![{PICTURES[name]}]({name})", "")]
    title = "# A model trained by federated averaging" if base is None else "# Adapters trained by federated averaging"
    head = ["---", front.to_yaml(), "---", "", title, ""]
    use = CLASSES.format(last=classes - 1).splitlines() if classes else []
    return "\n".join([*head, *images, "| | |", "|---|---|", *lines, "", *use])


def _value(score: Mapping[str, Any]) -> str:
    std = f" ± {score['std']:.2g}" if score.get("std") is not None else ""
    return f"{score['value']:.4g}{std} (n = {score['n']})"


def _results(kind: str, data: str, result: dict[str, Any]) -> list[Any]:
    """Return a run's scores as the hub shows them."""
    from huggingface_hub import EvalResult

    features = result["evaluation"].get("features")
    return [
        EvalResult(
            task_type=kind,
            dataset_type=data,
            dataset_name=data,
            metric_type=name.split("[")[0].split("@")[0].split("/")[0],
            metric_name=name,
            metric_value=score["value"],
            metric_args={"n": score["n"], "std": score.get("std"), "over": score.get("over"), "features": features},
        )
        for name, score in result["scores"].items()
        if not name.endswith("/real")  # of real images
    ]
