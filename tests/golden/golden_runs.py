"""Small runs whose results a refactoring must keep, bit for bit.

    python tests/golden/golden_runs.py                      run them with this checkout and print what came out
    python tests/golden/golden_runs.py --against COMMIT     and with another commit, side by side: what differs

Float sums differ between kinds of CPU, so two commits are compared on one machine.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACES = ROOT.parent / "shared/data/faces"

TRAIN = "train --preset digits --rounds 2 --local-steps 3 --evaluate-samples 0 --actors 0"
PLAIN = f"{TRAIN} --no-use-ema --no-keep-optimizer"
ADAPT = "finetune --preset digits-lora --rounds 2 --local-steps 2 --evaluate-samples 0 --validation-rounds 2 --actors 0"
RUNS = {
    "plain": PLAIN,
    "kept optimizer": f"{TRAIN} --no-use-ema",
    "ema": f"{TRAIN} --no-keep-optimizer",
    "scores": TRAIN.replace("samples 0", "samples 16 --sampling-steps 4 --kid-subset-size 8"),
    "one client": f"{TRAIN} --clients 1",
    "only client": f"{TRAIN} --only-client 2",
    "fraction": f"{PLAIN} --clients 10 --fraction 0.5 --partition dirichlet:0.5 --keep-optimizer",
    "float16": f"{PLAIN} --codec float16",
    "held out": f"{PLAIN} --held-out-share 0.2 --test-share 0.5",
    "schedule": f"{PLAIN} --lr-scheduler linear --lr-warmup-steps 2 --gradient-accumulation-steps 2 --random-flip "
    "--mixed-precision bf16 --max-grad-norm None",
    "epochs": f"{PLAIN} --partition quantity:0.5 --train-batch-size 64 --rounds 1".replace(
        "--local-steps 3", "--local-epochs 1"
    ),
    "velocity": f"{PLAIN} --prediction-type v_prediction --snr-gamma 5 --adam-weight-decay 0.01",
    "lora fedavg": f"{ADAPT} --rule fedavg",
    "lora fedavg float16 ema": f"{ADAPT} --rule fedavg --codec float16 --use-ema --lora-dropout 0.1",
    "lora ffa": f"{ADAPT} --rule ffa",
    "lora svd": f"{ADAPT} --rule svd --no-keep-optimizer",
    "lora svd float16": f"{ADAPT} --rule svd --no-keep-optimizer --codec float16",
    "lora flora": f"{ADAPT} --rule flora --no-keep-optimizer --held-out-share 0.1",
    "faces": "train --preset faces --rounds 1 --local-steps 1 --fraction 0.1 --evaluate-samples 0 --actors 0",
    "custom task": "",
}
# Against commits before the mean was a sum of integers (d07c74e), only these are the same: "one client", "only client",
# and those that collect: "lora svd", "lora svd float16", "lora flora".


def key() -> str:
    """What the bits depend on, beside the code."""
    import torch

    cpu = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in cpuinfo() if ":" in line]))
    kind = ", ".join(cpu.get(name, "unknown") for name in ("model name", "cpu family", "model"))
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {kind}"


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def run(name: str, out: Path, photos: Path) -> dict[str, object] | None:
    """Do one run in this process; what came out, or None where its data is not at hand."""
    from fedray.cli import main

    arguments = RUNS[name].split()
    if name == "faces":
        if not FACES.is_dir():
            return None
        arguments += ["--train-data-dir", str(FACES)]
    if arguments[:1] == ["finetune"]:
        arguments += ["--train-data-dir", str(photos)]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        if name == "custom task":
            import custom_task

            custom_task.main(out=out, rounds=2, examples=64, actors=0)
            code = 0
        else:
            code = main([*arguments, "--out", str(out)])
    assert code == 0, said.getvalue()
    result = json.loads((out / "result.json").read_text())
    rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    kept = ("round", "cohort", "loss", "steps", "images", "bytes_down", "bytes_up", "aggregation", "held_out", "scores")
    told = json.dumps([{field: row[field] for field in kept} for row in rows], sort_keys=True)
    return {
        "vector": result["vector_sha256"][:16],
        "model": tensors_sha256(out / "model"),
        "rows": hashlib.sha256(told.encode()).hexdigest()[:16],
    }


def tensors_sha256(folder: Path) -> str:
    """Of all weights that a run delivers, by name: its average, where it keeps one."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for path in sorted((*folder.rglob("*.safetensors"), *folder.rglob("*.pt"))):
        tensors = torch.load(path) if path.suffix == ".pt" else load_file(path)
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_all(names: list[str]) -> dict[str, dict[str, object] | None]:
    """Do the runs of these names with the fedray of `ROOT`."""
    sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
    import torch
    from lora_digits import photos

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FEDRAY_CACHE"] = f"{scratch}/cache"
        folder = photos(Path(scratch), 0)
        return {name: run(name, Path(scratch) / name.replace(" ", "-"), folder) for name in names}


def run_commit(commit: str, names: list[str]) -> dict[str, dict[str, object] | None]:
    """Do the runs with another commit, in a worktree and a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(place), commit], check=True)
        try:
            return run_tree(place, names)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)], check=True)


def run_tree(place: Path, names: list[str]) -> dict[str, dict[str, object] | None]:
    """Do the runs with the fedray of another checkout."""
    program = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import golden_runs as g; "
        f"g.ROOT = g.Path({str(place)!r}); print(json.dumps(g.run_all({names!r})))"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="another commit, or the directory of another checkout")
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(RUNS)}")
    asked = parser.parse_args()
    names = asked.names or list(RUNS)
    now = run_all(names)
    if not asked.against:
        print(json.dumps({key(): now}, indent=2))
        return
    before = (run_tree if Path(asked.against).is_dir() else run_commit)(
        Path(asked.against) if Path(asked.against).is_dir() else asked.against, names
    )
    for name in names:
        same = "the same" if now[name] == before[name] else f"was {before[name]}, is {now[name]}"
        print(f"{name:26} {same}")


if __name__ == "__main__":
    main()
