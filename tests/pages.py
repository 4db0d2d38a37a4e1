"""Runs and sweeps as they leave their directories, made up; and what the page of a report says."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from fedray.config import Config

CONFIG = Config(clients=2, rounds=3, local_epochs=1, evaluate_samples=16, features="digits", actors=0)
EVIL = "<script>alert('<b>')</script>"


def write_run(directory, scores=(), complete=True, done=3, config=CONFIG, held_out=False, picture=8, **texts):
    """A run directory as a run leaves it. `scores` are those of fd[digits] in the last rounds."""
    values = config.to_json() | texts
    directory.mkdir(parents=True)
    saved = {
        "config": values, "images_sha256": "11" * 32, "partition_sha256": directory.name, "git_commit": "abc",
        "versions": {"fedray": "0.1.0"}, "machine": {"cpus": 2, "gpus": 0}, "started": "2026-01-01T00:00:00+0000",
        "command": ["/opt/tools/bin/fedray", "train", "--clients", "2", "--out", "with space"],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(saved))
    for kind in ("samples", "validation"):
        (directory / kind).mkdir()
    rows = []
    for k in range(1, done + 1):
        late = k - 1 - (done - len(scores))
        measured = {"fd[digits]": {"value": scores[late], "n": config.evaluate_samples}} if late >= 0 else {}
        if measured:
            measured["fd[digits]/real"] = {"value": 4.0, "n": 16}
            noise = np.random.default_rng(k).integers(0, 256, (picture, picture, 3), np.uint8)
            Image.fromarray(noise).save(directory / "samples" / f"round-{k:06d}.png")
        client = {"client": 0, "seconds": 1.5, "loss": 0.5, "bytes_down": 1000, "bytes_up": 500, "outcome": "ok"}
        losses = {"local": 0.7 / k, "aggregated": 0.6 / k, "global": 0.5 / k, "spread": 0.01}
        rows.append({
            "round": k, "cohort": [0], "loss": 1 / k, "steps": 8, "sequential_steps": 4, "images": 64,
            "bytes_down": 2000, "bytes_up": 1000, "seconds": {"fold": 0.5, "round": 3.0, "save": 0.25},
            "aggregation": {}, "held_out": losses if held_out else {}, "scores": measured, "clients": [client],
        })  # fmt: skip
    (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        result = {"scores": rows[-1]["scores"]}
        (directory / "result.json").write_text(json.dumps(result))
    return directory


SWEEP = {2: [5.0, 6.0, 7.0], 8: [8.0, 10.0, 10.0]}  # by clients, of seeds 0, 1, 2


def write_sweep(out, values=SWEEP, question="Do more clients hurt?\n\n    fedray sweep x.py\n\nMore of it."):
    trials = [(clients, seed) for clients in values for seed in range(len(values[clients]))]
    for clients, seed in reversed(trials):
        config = replace(CONFIG, clients=clients, seed=seed)
        score = values[clients][seed]
        write_run(out / f"clients-{clients}-seed-{seed}", [score + 3, score + 1, score], config=config)
    record = {
        "name": "figure", "question": question, "started": "2026-01-01T00:00:00+0000",
        "command": ["/opt/tools/bin/fedray", "sweep", "experiments/x.py"], "varied": ["clients", "seed"],
        "trials": [
            {"directory": f"clients-{clients}-seed-{seed}", "changes": {"clients": clients, "seed": seed}}
            for clients, seed in trials
        ],
    }  # fmt: skip
    (out / "figure.sweep.json").write_text(json.dumps(record))
    return out


class Page(HTMLParser):
    """Links, styles and visible text of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.styles, self.text, self.images, self.stack = [], "", "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "href", "srcset", "action", "poster", "data") if name in found]
        self.styles += found.get("style") or ""
        if tag == "img":
            self.images.append(found)
        if tag not in ("meta", "link", "img", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack[-1:] == ["style"]:
            self.styles += data
        elif self.stack[-1:] != ["script"]:
            self.text += data
