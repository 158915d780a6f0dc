"""Result files: whole, flat, with machine, date, command and commit."""

import datetime
import json

import pytest
import torch

from mfp.bench import results
from mfp.errors import MfpError

ROWS = [{"arch": "resnet18", "ms": 1.5, "engine": None, "fused": True}, {"arch": "resnet50", "ms": 7}]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "some.json"
    results.write(path, "mfp bench --arch resnet18", ROWS, note="idle")
    found = results.read(path)
    assert found["rows"] == ROWS and found["note"] == "idle" and found["command"] == "mfp bench --arch resnet18"
    assert found["torch"] == torch.__version__ and str(torch.get_num_threads()) in found["machine"]
    assert datetime.date.fromisoformat(found["date"])
    assert all(isinstance(found[key], str) for key in results.KEYS[:-1])
    assert list(found) == [*results.KEYS[:-1], "note", "rows"]
    assert len(path.read_text().splitlines()) == 8 + len(ROWS) + 3  # a row a line
    results.write(path, "again", ROWS, machine="another", date="2026-01-31")
    assert results.read(path)["machine"] == "another" and results.read(path)["date"] == "2026-01-31"


@pytest.mark.parametrize("rows", [[], [{"arch": "resnet18", "times": [1.0]}], [{"limits": {"adds": 1}}]])
def test_rows_are_flat(tmp_path, rows):
    with pytest.raises(MfpError, match="rows to write|of a row is a"):
        results.write(tmp_path / "some.json", "x", rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[1]", "[]", json.dumps({"rows": ROWS})])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "some.json").write_text(content)
    with pytest.raises(MfpError, match="is not a result file"):
        results.read(tmp_path / "some.json")
    with pytest.raises(MfpError, match="is not a result file"):
        results.read(tmp_path / "none.json")
