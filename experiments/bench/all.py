"""Measures all that docs/benchmarks.md says of this machine, and writes its tables.

    make bench [BENCH="--flower PYTHON --pfl PYTHON"]

Each script is a new process. What it prints goes to results.json beside this file, with the machine, versions and
command; the tables of docs/benchmarks.md are made from that. Peers that need other versions of Ray, or are no part of
fedray's environment, have one of their own, whose Python is given; without it their places in the tables say so.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro
from measure import FILE

HERE = Path(__file__).parent
PAGE, RESULTS = HERE.parent.parent / "docs" / "benchmarks.md", HERE / "results.json"
BENCHES: dict[str, tuple[list[str], list[str] | None]] = {  # options, and those of the short form: None leaves it out
    "overhead": ([], None),
    "shape": ([], ["--rounds", "2", "--repeats", "1", "--cohort", "4"]),
    "start": ([], ["--repeats", "1", "--trials", "2", "--sweeps", "1"]),
    "clients": ([], ["--repeats", "1", "--no-large"]),
    "sums": ([], ["--repeats", "1"]),
    "cohorts": ([], ["--repeats", "1", "--rounds", "2", "--most", "1", "--longest", "2"]),  # the last row alone
    "payloads": ([], ["--repeats", "1", "--rounds", "2", "--only", "100"]),
    "memory": ([], ["--no-large"]),
    "evaluation": ([], ["--repeats", "1", "--n", "64", "--steps", "2", "--features", "400", "--dimensions", "64"]),
    "lora": ([], ["--repeats", "1", "--steps", "2", "--no-large"]),
    "images": ([], ["--repeats", "1", "--n", "100"]),
}  # fmt: skip
PEERS = {"payloads": ("flower",), "shape": ("flower", "pfl")}  # by script: the options that take a peer's Python
PYTHONS = re.compile(r"--(flower|pfl) \S+")  # where they lie tells nobody anything
BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine() -> str:
    """Name the processor, its cores, and the memory."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} cores of {name}, {memory / 2**30:.0f} GiB"


def measure(name: str, options: list[str]) -> dict[str, Any]:
    """Run a script and return its tables, and what they were measured with."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "tables.json"
        subprocess.run([sys.executable, HERE / f"{name}.py", *options], env=os.environ | {FILE: str(file)}, check=True)
        return {
            "command": PYTHONS.sub(r"--\1 PYTHON", " ".join(["python", f"experiments/bench/{name}.py", *options])),
            "tables": json.loads(file.read_text()),
            "machine": machine(),
            "versions": {each: version(each) for each in ("fedray", "torch", "ray", "diffusers", "numpy")},
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }


def block(result: dict[str, Any]) -> str:
    """Write a result for the page: the command, the tables, and with what they were measured."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name != "fedray")
    where = f"{result['machine']}; {result['date']}; Python {result['python']}, {versions}."
    return "\n\n".join([f"```\n{result['command']}\n```", *result["tables"], where]) + "\n"


def page(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the page with its measured blocks made from the results."""

    def made(found: re.Match[str]) -> str:
        return found[1] + block(results[found[2]]) + found[3] if found[2] in results else found[0]

    return BLOCK.sub(made, text)


def main(short: bool = False, only: tuple[str, ...] = (), flower: Path | None = None, pfl: Path | None = None) -> None:
    """Measure.

    Args:
        short: some minutes, to see that all work; writes nothing.
        only: measure these alone, and keep what is there of the others.
        flower: the Python of an environment with flwr[simulation] and torch.
        pfl: the Python of an environment with pfl and torch.
    """
    pythons = {"flower": flower, "pfl": pfl}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    forms = {name: form[short] for name, form in BENCHES.items() if not only or name in only}
    chosen = {name: options for name, options in forms.items() if options is not None}
    for number, (name, options) in enumerate(chosen.items(), 1):
        print(f"{number}/{len(chosen)} {name}", flush=True)
        peers = [part for peer in PEERS.get(name, ()) if pythons[peer] for part in (f"--{peer}", str(pythons[peer]))]
        results[name] = measure(name, [*options, *peers])
        if not short:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    tyro.cli(main)
