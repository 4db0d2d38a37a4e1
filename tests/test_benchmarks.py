"""The measured tables of docs/benchmarks.md are those of the kept results, and every script runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "experiments" / "bench"


def load():
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_all", BENCH / "all.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCH))


def test_the_page_has_the_kept_results():
    bench = load()
    text, results = bench.PAGE.read_text(), json.loads(bench.RESULTS.read_text())
    blocks = {found[2] for found in bench.BLOCK.finditer(text)}
    assert set(results) <= blocks <= set(bench.BENCHES)
    assert bench.page(text, results) == text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_benchmarks_run_in_short():
    before = (BENCH / "results.json").read_bytes()
    done = subprocess.run([sys.executable, BENCH / "all.py", "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(line.startswith("| ---") for line in done.stdout.splitlines()) == 12
    assert (BENCH / "results.json").read_bytes() == before
