"""What does a client gain from the others' adapters?

The small Stable Diffusion that ships with fedray knows the digits 0 to 5. Four clients have 32 images each of one digit
that it has never seen: 6, 7, 8, 9. They fine-tune it together by LoRA (federated), pool their images (centralised, with
as many sequential steps: of batches of the same size, or of batches four times as large, which see as many images as
the federation), or train alone. Then each model is asked for all four digits, and a classifier says which digit came
out: the prompt accuracy. An untrained adapter is the base itself.

    python experiments/lora_digits.py --seeds 0 1 2     the question, with its spread
    python experiments/lora_digits.py --demo            `make demo-lora`: the federation alone, before and after
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

import fedray
from fedray.cluster.connection import connected
from fedray.commands.terminal import program, progress
from fedray.data.sources import digits
from fedray.federation.evaluation import Comparison, Scoring, evaluate, open_reference, prompts_of
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling
from fedray.federation.worker import model
from fedray.seeds import generator
from fedray.tasks.embedded import HELD_OUT, enlarge, prompt

PRESET = fedray.PRESETS["digits-lora"]
IMAGES = 32  # per client


def photos(out: Path, seed: int, images: int = IMAGES) -> Path:
    """A folder per client, named as its prompt, with images of one digit."""
    root, data = out / f"photos-{seed}", digits()
    for label in HELD_OUT:
        folder = root / prompt(label)
        folder.mkdir(parents=True, exist_ok=True)
        ours = torch.from_numpy(data.images[data.labels == label])
        chosen = ours[torch.randperm(len(ours), generator=generator(seed, "photos", label))[:images]]
        for index, image in enumerate(enlarge(chosen)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:02d}.png")
    return root


def settings(out: Path, seed: int, rounds: int) -> dict[str, fedray.Config]:
    """The runs of one seed, by name."""
    task = replace(PRESET.task, train_data_dir=str(photos(out, seed)))
    federated = replace(PRESET, task=task, seed=seed, rounds=rounds)
    alone = replace(federated, clients=1, partition=fedray.IID())
    return {
        "federated": federated,
        "centralised": alone,
        "centralised, same images": replace(alone, train_batch_size=4 * federated.train_batch_size),
        "alone": federated,
    }


def base_scores(config: fedray.Config) -> dict[str, float]:
    """Of an untrained adapter: B is 0, so it draws what the base does."""
    plan = make_plan(config)
    pool = LocalPool(config, plan.dataset)
    scoring = Scoring.of(config)
    assert scoring is not None
    comparison = Comparison(plan.dataset, scoring, open_reference(scoring, plan.dataset, pool))
    sampling = Sampling.of(config, config.evaluate_samples, prompts_of(config, plan.dataset))
    with progress(1) as (_, show):
        found = evaluate(pool, model({"model": plan.initial}), sampling, comparison, show=show)
    return {name: score.value for name, score in found.scores.items()}


def train(config: fedray.Config, out: Path, name: str) -> list[Path]:
    """One run (or one per client), continued if it was begun before."""
    print(f"\n{name}, seed {config.seed}")
    with progress(config.rounds) as (_, show):
        if name == "alone":
            return [run.directory for run in fedray.run_local_only(config, out, show=show)]
        fedray.run(config, out, resume=(out / "config.json").exists(), on_row=lambda row: None, show=show)
    return [out]


def main(
    seeds: tuple[int, ...] = (0,),
    rounds: int = PRESET.rounds,
    demo: bool = False,
    out: Path | None = None,
    actors: int | None = None,
) -> None:
    """Fine-tune and compare; runs that are in OUT already are not repeated.

    Args:
        seeds: one of each for each.
        rounds: communication rounds.
        demo: the federation only, not its baselines.
        out: directory of the runs; by default runs/lora-digits-DATE-TIME.
        actors: client actors of a run; 0 trains in this process, without Ray.
    """
    out = out or Path("runs") / time.strftime("lora-digits-%Y%m%d-%H%M%S")
    rows = []
    with nullcontext() if actors == 0 else connected(None):
        for seed in seeds:
            configs = settings(out, seed, rounds)
            rows.append({"run": "base", "seed": seed, **base_scores(configs["federated"])})
            for name, config in configs.items():
                if demo and name != "federated":
                    continue
                runs = train(
                    replace(config, actors=actors), out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}", name
                )
                mean = fedray.summary({str(run): run for run in runs}).mean()
                rows.append({"run": name, "seed": seed} | {str(what): value for what, value in mean.items()})
    table = pd.DataFrame(rows)
    table.to_csv(out / "summary.csv", index=False)
    show(table)
    first = out / f"federated-{seeds[0]}"
    print(f"picture   {first / 'validation.png'}: the four prompts, from the base to the last round")
    print(f"run       {first}")
    print(f'next      {program()} sample {first} --prompt "the digit nine" --num-images 64')


def show(table: pd.DataFrame) -> None:
    """Mean and standard deviation over the seeds, and each one's gain over the base."""
    names = ["accuracy[digits]", "sure[digits]", "fd[digits]", "MB up"]
    names = [name for name in names if name in table]
    mean, std = (table.groupby("run", sort=False)[names].agg(what) for what in ("mean", "std"))
    shown = Table("", *(name.replace("[", r"\[") for name in names), "gain in accuracy over the base")
    base = table[table.run == "base"].set_index("seed")["accuracy[digits]"]
    for run in mean.index:
        gain = table[table.run == run].set_index("seed")["accuracy[digits]"] - base
        cells = [_with_spread(mean.loc[run, name], std.loc[run, name]) for name in names]
        shown.add_row(str(run), *cells, _with_spread(gain.mean(), gain.std()))
    Console().print(shown)


def _with_spread(mean: float, std: float) -> str:
    if pd.isna(mean):
        return "–"
    return f"{mean:.3g}" if pd.isna(std) else f"{mean:.3g} ± {std:.2g}"


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"lora_digits.py: {error}") from None
