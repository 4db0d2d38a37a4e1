"""The code of docs/python.md, run as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_its_blocks_run_one_after_the_other(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "page.py").write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "<fedray.Run" in done.stdout
    budget = json.loads((tmp_path / "runs/budget/result.json").read_text())
    assert 2 < budget["rounds"] < 50
    assert re.fullmatch(r"\d\.\d MB were sent|fd\[digits\] has not been better .*", budget["stopped"])
    lines = (tmp_path / "runs/lines/lines.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "sixteen.png").is_file()
