from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image
from train_helpers import tiny_config

from mfp.errors import MfpError
from mfp.report import COLOURS, _ticks, write_report
from mfp.train.progress import Reporter
from mfp.train.run import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = tiny_config(arch="train_helpers:TinyNet", batch=100, epochs=3)
    result = run(config, directory, reporter=Reporter(quiet=True))
    torch.set_num_threads(threads)
    return directory, result


def test_the_page_says_what_the_run_found(finished):
    directory, result = finished
    page = write_report(directory).read_text()
    for text in (f"{result['compact']['flops']:,}", f"{result['masked']['top1']:.2f}", "conv1: l2_norm",
                 "conv2: l2_distance", "5 of 8", "8 of 12", "churn", "TinyNet on digits"):  # fmt: skip
        assert text in page
    chosen = re.findall(r"<td>\d</td><td>(\w+)</td>", page)
    assert chosen == result["criteria"]
    assert len(chosen) == 3
    assert page.count("r='6'") == 3  # every choice is ringed in the chart


def test_the_page_needs_nothing_but_itself(finished):
    page = write_report(finished[0]).read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", page)
    assert "http" not in page.replace("https://", "http://").split("<style>")[0]


def charts_of(page):
    """All charts, after a look at whether they are well-formed and inside their frames."""
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for chart in charts:
        root = ET.fromstring(chart)
        width, height = float(root.get("width")), float(root.get("height"))
        shapes = list(root)
        assert len(shapes) > 3
        for shape in shapes:
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(shape.get(key, 0)) <= width
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(shape.get(key, 0)) <= height + 1
            assert float(shape.get("height", 0)) >= 0
    return charts


def test_every_chart_is_well_formed_and_inside_its_frame(finished):
    assert len(charts_of(write_report(finished[0]).read_text())) == 1 + 4 + 2 + 4 + 1


def test_sensitivities_and_rates(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    losses = {"conv1": {"0.3": 2.5, "0.6": 3.0}, "conv2": {"0.3": 2.25, "0.6": float("nan")}}
    rates = {"layer_rates": {"conv1": 0.05, "conv2": 0.45}, "what": "flops", "reached": 61.0, "dense": 100.0}
    (copy / "rates.json").write_text(json.dumps(rates | {"sensitivities": {"loss": 2.0, "losses": losses}}))
    page = write_report(copy).read_text()
    for text in ("conv1: 0.05", "conv2: 0.45", "61.0% of the flops are left", "pruned by rates that suit the layers"):
        assert text in page
    assert len(charts_of(page)) == 1 + 4 + 2 + 4 + 1 + 2


def test_a_run_that_is_not_finished(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    (copy / "result.json").unlink()
    (copy / "pruned" / "scores.safetensors").unlink()
    page = write_report(copy, tmp_path / "page.html").read_text()
    assert "The run is not finished" in page
    assert page.count("<svg") == 6


def test_names_from_files_are_text(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    config = copy / "config.json"
    config.write_text(config.read_text().replace("train_helpers:TinyNet", "<script>alert(1)</script>"))
    page = write_report(copy).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(MfpError, match=r"is not the directory of a run: it has no config\.json"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MfpError, match="holds no finished epoch yet"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MfpError, match=r"cannot read .*config\.json"):
        write_report(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser on this machine: install chromium (`make browser` as root)")
def test_in_a_browser(finished, tmp_path):
    page = write_report(finished[0], tmp_path / "page.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options = ["--enable-logging=stderr", "--window-size=1200,2400", f"--screenshot={tmp_path / 'page.png'}"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    shot = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, env=environment, check=False
    )
    assert "CONSOLE" not in shot.stderr
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    counts = {colour: count for count, colour in picture.getcolors(1 << 24)}
    for colour in COLOURS[:5]:  # lines, bars and histograms are really painted
        assert counts.get(tuple(bytes.fromhex(colour[1:])), 0) > 50, colour
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, env=environment, check=False
    )
    assert dom.stdout.count("<svg") == page.read_text().count("<svg") == 12


def test_ticks_are_round_and_inside():
    assert _ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert _ticks(0.13, 0.94, 4) == pytest.approx([0.5])
    assert _ticks(1, 2, 7, whole=True) == [1, 2]
