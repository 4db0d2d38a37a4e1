"""Small runs against what they were when their hashes were stored: bit for bit, on the same kind of CPU and torch."""

import json
from pathlib import Path

import golden_runs
import pytest

STORED = json.loads((Path(__file__).parent / "golden.json").read_text())
HERE = golden_runs.key()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from lora_digits import photos

    return photos(tmp_path_factory.mktemp("photos"), 0)


def test_there_are_a_dozen_runs():
    assert len(golden_runs.RUNS) >= 12
    for stored in STORED.values():
        assert set(stored) == set(golden_runs.RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_runs.RUNS)
def test_a_run_is_what_it_was(name, tmp_path, photos):
    if HERE not in STORED:
        pytest.skip(f"there are no hashes for {HERE}; compare commits by tests/golden/golden_runs.py --against COMMIT")
    made = golden_runs.run(name, tmp_path / "run", photos)
    if made is None:
        pytest.skip("the faces are not at hand")
    assert made == STORED[HERE][name]
