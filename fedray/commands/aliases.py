"""Flags of diffusers' training scripts that have another name here, or another meaning, or none.

A flag in none of these tables is either the same in both or unknown. docs/diffusers.md lists all of them.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedray.commands import model_config
from fedray.config import Config
from fedray.errors import UserError

RENAMED = {
    "--output-dir": "--out",
    "--ddpm-num-inference-steps": "--sampling-steps",
    "--logger": "--report-to",
}

# What follows from other settings: `applied` works it out. The last has no value.
PASSES = ("--num-epochs", "--num-train-epochs")
EVERY = {
    "--save-images-epochs": "evaluate_every",
    "--save-model-epochs": "checkpoint_every",
    "--validation-epochs": "validation_rounds",
}
STEPS, RESUME, SCALE = "--max-train-steps", "--resume-from-checkpoint", "--scale-lr"
MEANT = (*PASSES, *EVERY, STEPS, RESUME, model_config.FLAG, SCALE)

# Accepted, for what they ask for is always so, or is only allowed.
NOTHING = {
    "--allow-tf32": "the deterministic setting stays: matrix products keep float32's bits; --mixed-precision bf16 is "
    "faster still",
    "--cache-latents": "latents are always kept, in this machine's cache",
    "--cache-latents-to-disk": "latents are always kept, in this machine's cache",
    "--center-crop": "the central square of an image is what is always kept",
    "--checkpointing-steps": "every complete round is saved (--checkpoint-every saves fewer)",
    "--dataloader-num-workers": "images are decoded once, into a file that all processes map",
    "--enable-xformers-memory-efficient-attention": "torch's own attention needs as little memory",
}

SWITCHES = (SCALE, "--allow-tf32", "--cache-latents", "--cache-latents-to-disk", "--center-crop",
            "--enable-xformers-memory-efficient-attention")  # fmt: skip

REFUSED = {
    "--cache-dir": "set HF_HOME for what is downloaded, and FEDRAY_CACHE for decoded images",
    "--image-interpolation-mode": "images are resized by an antialiased bicubic filter; leave it out",
    "--local-rank": "Ray places clients; say --actors, --cpus-per-actor and --gpus-per-actor",
    "--logging-dir": "the curves are in OUT/tensorboard; leave it out",
    "--overwrite-output-dir": "no run overwrites another; choose another --out, or remove the old one first",
    "--preserve-input-precision": "images have 8 bits a channel here; leave it out",
    "--use-8bit-adam": "say --optimizer Adafactor or sgd, which keep fewer numbers than adamw",
    # Of `fedray train`, in fine-tuning.
    "--class-conditional": "captions are what fine-tuning is given; leave it out",
    # Of other scripts.
    "--enable-bucket": "say --aspect-ratio-buckets, with the sizes as HEIGHT,WIDTH;HEIGHT,WIDTH",
    "--batch-size": "say --train-batch-size",
    "--epochs": "say --local-epochs (passes in a round), or --num-epochs (in all)",
    "--lr": "say --learning-rate",
    "--num-clients": "say --clients",
    "--num-rounds": "say --rounds",
}

ALL = {*RENAMED, *MEANT, *NOTHING, *REFUSED}


def name_of(word: str) -> str:
    """Return the flag that a word of a command line is, with hyphens and without its value."""
    return word.partition("=")[0].replace("_", "-")


def translated(arguments: Sequence[str], flags: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Translate a command line: return it in fedray's names, and the values of what `applied` has to work out.

    Args:
        flags: the command's own, which come before all others.

    Raises:
        UserError: a flag has no meaning here; says what to use.
    """
    words, left, meant = list(arguments), list[str](), dict[str, str]()
    while words:
        word = words.pop(0)
        name, (_, equals, value) = name_of(word), word.partition("=")
        if not word.startswith("--") or name in flags:
            left.append(word)
        elif name in REFUSED:
            raise UserError(f"{name}: {REFUSED[name]}.")
        elif name in RENAMED:
            left.append(RENAMED[name] + equals + value)
        elif name in MEANT or name in NOTHING:
            if name not in SWITCHES and not equals:
                if not words or words[0].startswith("--"):
                    raise UserError(f"{name} needs a value.")
                value = words.pop(0)
            if name in MEANT:
                meant[name] = value
        else:
            left.append(word)
    return left, meant


def foreign(arguments: Sequence[str], flags: Collection[str]) -> bool:
    """Tell whether a command line has a flag that only diffusers' scripts have."""
    names = {name_of(word) for word in arguments if word.startswith("--")}
    return bool(names & {*RENAMED, *MEANT, *NOTHING} - set(flags))


def applied(config: Config, meant: dict[str, str], given: Collection[str]) -> Config:
    """Change a configuration as flags of diffusers' scripts say, in rounds of local epochs or steps.

    Args:
        given: flags on the command line.

    Raises:
        UserError: they do not fit the rounds.
    """
    passes = [name for name in PASSES if name in meant]
    if STEPS in meant:  # as there, it overrides passes
        config = _in_steps(config, _number(STEPS, meant), given)
    elif passes:
        config = _in_passes(config, passes[0], _number(passes[0], meant), given)
    for name, setting in EVERY.items():
        if name not in meant:
            continue
        if config.local_epochs is None:
            own = "--" + setting.replace("_", "-")
            raise UserError(f"{name} counts passes over the data; with local steps, say {own} in rounds.")
        changes: dict[str, Any] = {setting: math.ceil(_number(name, meant) / config.local_epochs)}
        config = replace(config, **changes)
    if model_config.FLAG in meant:
        if not hasattr(config.task, "block_out_channels"):
            raise UserError(f"{model_config.FLAG} is about the U-Net that `fedray train` builds.")
        task: Any = config.task
        task = model_config.with_network(task, meant[model_config.FLAG], "--resolution" not in given)
        config = replace(config, task=task)
    if SCALE in meant:
        batch = config.train_batch_size * config.gradient_accumulation_steps
        config = replace(config, learning_rate=config.learning_rate * batch)
    return config


def _in_passes(config: Config, name: str, passes: int, given: Collection[str]) -> Config:
    """Set the rounds (or, where those are given, the local epochs) that make so many passes over each client's data."""
    if config.local_epochs is None:
        raise UserError(f"{name} counts passes over the data; with local steps, say --rounds or {STEPS}.")
    rounds = "--rounds" in given
    if rounds and "--local-epochs" in given:
        raise UserError(f"{name}, --rounds and --local-epochs are all given; leave one of them out.")
    known, what = (config.rounds, "rounds") if rounds else (config.local_epochs, "local epochs of a round")
    if passes % known:
        raise UserError(
            f"{name} {passes}: it is no multiple of the {known} {what}; give --rounds or --local-epochs that fit."
        )
    if rounds:
        return replace(config, local_epochs=passes // known)
    return replace(config, rounds=passes // known)


def _in_steps(config: Config, steps: int, given: Collection[str]) -> Config:
    """Set the rounds (or the local steps, where those are not set) that make so many steps, one after the other."""
    if "--rounds" in given and "--local-steps" in given:
        raise UserError(f"{STEPS}, --rounds and --local-steps are all given; leave one of them out.")
    if "--local-epochs" in given:
        raise UserError(f"{STEPS} counts steps; with --local-epochs, say {PASSES[0]} or --rounds.")
    fixed = config.local_steps if config.local_steps is not None and "--rounds" not in given else None
    known, what = (config.rounds, "rounds") if fixed is None else (fixed, "local steps of a round")
    if steps % known:
        raise UserError(
            f"{STEPS} {steps}: it is no multiple of the {known} {what}; give --rounds or --local-steps that fit."
        )
    if fixed is not None:
        return replace(config, rounds=steps // fixed)
    return replace(config, local_steps=steps // known, local_epochs=None)


def _number(name: str, meant: dict[str, str]) -> int:
    text = meant[name]
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{name} {text}: it must be a whole number above 0.")
    return int(text)


def run_to_resume(arguments: Sequence[str], out: Path | None) -> Path | None:
    """Return the run that --resume-from-checkpoint names; None where there is none yet, which then begins.

    Args:
        out: the run's directory, of which "latest" is about.

    Raises:
        UserError: it names no run, or a checkpoint that is not its last.
    """
    found = [index for index, word in enumerate(arguments) if name_of(word) == RESUME]
    if not found:
        return None
    _, equals, value = arguments[found[-1]].partition("=")
    value = value if equals else arguments[found[-1] + 1]
    if value == "latest":
        if out is None:
            raise UserError(f"{RESUME} latest: say of which run, with --output-dir.")
        return out if (out / "config.json").is_file() else None
    place = Path(value)
    run = place.parent.parent if place.suffix == ".safetensors" else place
    if not (run / "config.json").is_file():
        raise UserError(f"{RESUME} {value}: it must be latest, or the directory of a run.")
    if place != run and place.name != max(path.name for path in place.parent.glob("*.safetensors")):
        raise UserError(f"{RESUME} {value}: a run continues after its last complete round; say {RESUME} latest.")
    return run
