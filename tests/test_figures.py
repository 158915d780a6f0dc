"""Tables and charts in the documents are those of the result files; what is not, is found."""

import json
import sys
from pathlib import Path

import pytest

from mfp.bench import results

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import charts
import figures

BLOCK = "before <!-- figures: {} -->\nold\n<!-- end of figures --> after\n"


@pytest.mark.parametrize("path", figures.documents(), ids=lambda path: path.name)
def test_documents_show_their_result_files(path):
    document = path.read_text()
    assert document.count("<!-- figures:") == document.count("<!-- end of figures -->")
    assert figures.written(document) == document, "run `make figures`"


@pytest.mark.parametrize("chart", charts.CHARTS)
def test_charts_show_their_result_files(chart):
    assert charts.up_to_date(chart), "run `make figures`"


def test_documents_have_tables():
    found = [key for path in figures.documents() for _, key, _ in figures.BLOCK.findall(path.read_text())]
    assert {"scoring", "compact", "engines", "torch_pruning", "demo"} <= set(found)


@pytest.fixture
def other_results(monkeypatch, tmp_path):
    """The result files, to be changed."""
    for path in figures.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("key", figures.TABLES)
def test_a_changed_number_shows(other_results, key):
    document = figures.written(BLOCK.format(key))
    assert figures.written(document) == document and document.startswith("before <!--") and "old" not in document
    path = min(other_results.glob(figures.TABLES[key][0]))
    content = json.loads(path.read_text())
    row = content["rows"][0]
    number = next(k for k in ("seconds", "dense_ms", "ms", "milliseconds", "ms_1", "flops_kept") if k in row)
    row[number] *= 2
    path.write_text(json.dumps(content))
    assert figures.written(document) != document


def test_a_note_and_a_missing_file(other_results):
    row = {"arch": "resnet18", "by": "mfp", "failed": "", "ms": 12345.0, "flops_kept": 0.12345}
    results.write(other_results / "torch_pruning.json", "mfp bench", [row], note="x")
    shown = figures.text("torch_pruning")
    assert "| ResNet-18 | 12,345 ms, 12.3% |" in shown and "`mfp bench`. X.*" in shown
    (other_results / "torch_pruning.json").unlink()
    with pytest.raises(SystemExit, match=r"no benchmarks/results/torch_pruning\*\.json"):
        figures.text("torch_pruning")


def test_a_run_becomes_a_result_file(other_results, tmp_path):
    networks = {
        name: {"top1": 99.0, "flops": 10, "parameters": 5, "milliseconds": 1.0} for name in ("dense", "compact")
    }
    masked = {"top1": 98.0, "flops": 10, "parameters": 5}
    run = {"config": {"arch": "resnet20", "data": "digits"}, **networks, "masked": masked}
    (tmp_path / "result.json").write_text(json.dumps(run))
    figures.demo_result(tmp_path)
    found = results.read(other_results / "demo.json")
    assert found["command"] == "mfp prune" and [row["top1"] for row in found["rows"]] == [99.0, 98.0, 99.0]
    assert "| 98.00 |" in figures.text("demo")
