"""Tables where the output is no terminal."""

import pandas as pd

from fedray.commands.terminal import print_frame


def test_in_a_file_nothing_is_cut(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    frame = pd.DataFrame({f"a long name {index}": [f"value {index} " * 4] for index in range(12)}, index=["row"])
    print_frame(frame.rename_axis("setting"))
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert len(lines) == 5
    for index in range(12):
        assert f"a long name {index}" in lines[1]
        assert (f"value {index} " * 4).strip() in lines[3]
    assert "…" not in said
