"""Made by hand, with numbers that tests choose: run directories in the format of `fedray.record`, and rounds."""

import json
from dataclasses import replace

import fedray
from fedray.algorithms import Round, Upload
from fedray.algorithms.folds import Mean
from fedray.config import Config, sha256_of
from fedray.vector import Layout

PROVENANCE = {
    "images_sha256": "1" * 64, "partition_sha256": "2" * 64, "versions": {"fedray": "0.1.0"}, "git_commit": "3" * 40
}  # fmt: skip


def config(**changes) -> Config:
    return replace(fedray.PRESETS["digits"], **{"rounds": 3, "clients": 2, "local_epochs": 1, **changes})


def row(number, *, clients=2, loss=1.0, steps=10, payload=1000, seconds=0.5, scores=None, held_out=None):
    """A round's row. Client k takes `seconds` + k / 10."""
    each = [
        {
            "client": client, "examples": 8, "bytes_down": payload, "steps": steps, "images": 8, "loss": loss,
            "bytes_up": payload, "actor": "here", "seconds": seconds + client / 10, "outcome": "ok",
        }
        for client in range(clients)
    ]  # fmt: skip
    return {
        "round": number, "cohort": list(range(clients)), "loss": loss, "examples": 8 * clients,
        "steps": steps * clients, "sequential_steps": steps, "images": 8 * clients, "bytes_down": payload * clients,
        "bytes_up": payload * clients, "seconds": {"fold": 0.01, "round": 1.0, "save": 0.1}, "aggregation": {},
        "held_out": held_out or {}, "scores": scores or {}, "evaluation": {}, "clients": each,
    }  # fmt: skip


def scores(value, name="fd[digits]", n=64):
    return {name: {"value": value, "n": n, "std": 0.25, "over": "10 resamples"}, "plain": {"value": -value, "n": n}}


def run(directory, settings=None, rows=None, complete=True, **provenance):
    """Write a run directory. `settings` is a `Config`, or what its `to_json` gives; its last row is scored 5."""
    settings = settings or config()
    saved = settings.to_json() if isinstance(settings, Config) else settings
    if rows is None:
        rows = [row(number, clients=saved["clients"]) for number in range(1, saved["rounds"] + 1)]
        rows[-1]["scores"] = scores(5.0)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"config": saved, **PROVENANCE, **provenance}))
    (directory / "rounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    if complete:
        (directory / "result.json").write_text(json.dumps({"rounds": len(rows)}))
    return directory


def sweep(out, changes, value, name="made", question="Does it matter?", **settings):
    """A sweep of runs, one for each of `changes`, whose last round scores `value(**change)`, and its record."""
    trials = []
    for change in changes:
        made = config(**settings, **change)
        ending = sha256_of(made.to_json())[:8]
        was = [path.name for path in out.glob(f"*-{ending}")]  # sweeps share runs
        directory = was[0] if was else "-".join(f"{key}-{value}" for key, value in change.items()) + f"-{ending}"
        trials.append({"directory": directory, "changes": change})
        if was:
            continue
        assert made.local_epochs is not None
        steps = 48 * made.local_epochs // made.clients
        final = value(**change)
        rows = [
            row(
                number, clients=made.clients, steps=steps, payload=600_000, seconds=0.02 * steps,
                loss=0.04 + final / 500 + 0.4 / (number * steps / 12),
            )
            for number in range(1, made.rounds + 1)
        ]  # fmt: skip
        rows[-1]["scores"] = scores(final, n=512)
        run(out / directory, made, rows)
    record = {"name": name, "question": question, "varied": list(changes[0]), "trials": trials}
    (out / f"{name}.sweep.json").write_text(json.dumps(record, default=str))
    return out


def round_of(weights, layout=None, *, number=0, seed=0, clients=None, adapters=None):
    """A round of the clients that `weights` names; by default there are no others."""
    layout = layout or Layout(("w",), ((2,),))
    return Round(number, seed, tuple(sorted(weights)), clients or max(weights) + 1, weights, layout, adapters)


def uploads(vectors, round, rows=None):
    """What the cohort sends: of each client a vector, or several tensors by name."""
    sent = []
    for index, (client, vector) in enumerate(zip(round.cohort, vectors, strict=True)):
        tensors = vector if isinstance(vector, dict) else {"model": vector}
        weights = {name: round.weight(client, name) for name in tensors}
        sent.append(Upload(client, tensors, weights, rows[index] if rows else {}))
    return sent


def fold(vectors, round, fold=Mean(), rows=None):  # noqa: B008 (it is frozen)
    """What they make together, added sequentially."""
    return fold.result(added(uploads(vectors, round, rows), round, fold), round)


def added(sent, round, fold):
    """The partial of some uploads."""
    partial = fold.start(round)
    for upload in sent:
        partial = fold.add(partial, upload, round)
    return partial
