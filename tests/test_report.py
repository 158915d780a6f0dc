from __future__ import annotations

import csv
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

import mfp
from mfp import charts as charts_module
from mfp.charts import COLOURS
from mfp.errors import MfpError
from mfp.report import write_report
from mfp.train.progress import Reporter
from mfp.train.run import run

CHARTS = 1 + 4 + 2 + 2 + 2 + 1  # gained, training, choices, regret, scores of two layers, filters kept
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
    choice = result["choice"]
    for text in (f"{result['compact']['flops']:,}", f"{result['masked']['top1']:.2f}", "5 of 8", "8 of 12", "churn",
                 "TinyNet on digits", f"Scores per layer: {choice['chosen']}"):  # fmt: skip
        assert text in page
    for name, accuracy in choice["hindsight"].items():
        mark = " (chosen)" if name == choice["chosen"] else ""
        assert f"<td>{name}{mark}</td><td>{choice['neighbours'][name]:.5g}</td><td>{accuracy:.2f}</td>" in page
    chosen = re.findall(r"<td>\d</td><td>(\w+)</td>", page)
    assert chosen == result["criteria"]
    assert len(chosen) == 3
    assert page.count('id="chosen-') == 2 * 3  # every choice is ringed in both charts


def test_the_regret_is_that_of_the_choices(finished):
    directory, _ = finished
    with (directory / "pruned" / "epochs.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    behind = []
    for row in points:
        accuracies = {name: float(row[f"hindsight_{name}"]) for name in mfp.PAPER_CRITERIA}
        behind.append(max(accuracies.values()) - accuracies[row["criterion"]])
    assert len(points) == 3
    text = f"Over 3 pruning points the choice was {sum(behind) / 3:.2f} points behind the best candidate"
    assert text in write_report(directory).read_text()


def test_the_page_needs_nothing_but_itself(finished):
    page = write_report(finished[0]).read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:|#)|url\((?!#)", page)
    assert "http" not in page and "@import" not in page


def charts_of(page):
    """All charts, after a look at whether they are well-formed, drawn in finite numbers, and inside their frames."""
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for chart in charts:
        root = ET.fromstring(chart)
        _, _, width, height = map(float, root.get("viewBox").split())
        assert width > 100 and height > 50 and root.get("aria-label")
        paths = [shape.get("d") for shape in root.iter("path") if shape.get("d")]
        assert len(paths) > 3 and "nan" not in chart and charts_module.INK not in chart
        for shape in root.iter("use"):
            assert -1 <= float(shape.get("x")) <= width + 1 and -1 <= float(shape.get("y")) <= height + 1
    return charts


def test_every_chart_is_well_formed_and_inside_its_frame(finished):
    assert len(charts_of(write_report(finished[0]).read_text())) == CHARTS


def test_sensitivities_and_rates(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    losses = {"conv1": {"0.3": 2.5, "0.6": 3.0}, "conv2": {"0.3": 2.25, "0.6": float("nan")}}
    rates = {"layer_rates": {"conv1": 0.05, "conv2": 0.45}, "what": "flops", "reached": 61.0, "dense": 100.0}
    (copy / "rates.json").write_text(json.dumps(rates | {"sensitivities": {"loss": 2.0, "losses": losses}}))
    page = write_report(copy).read_text()
    for text in ("<td>conv1</td><td>0.05</td>", "<td>conv2</td><td>0.45</td>", "61.0% of the flops are left",
                 "pruned by rates that suit the layers", "added loss"):  # fmt: skip
        assert text in page
    assert len(charts_of(page)) == CHARTS + 1


def test_a_run_that_is_not_finished(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished[0], copy)
    (copy / "result.json").unlink()
    (copy / "pruned" / "scores.safetensors").unlink()
    page = write_report(copy, tmp_path / "page.html").read_text()
    assert "The run is not finished" in page
    assert page.count("<svg") == 4 + 2 + 2


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
    assert dom.stdout.count("<svg") == page.read_text().count("<svg") == CHARTS
    dark = tmp_path / "dark.png"
    options = ["--window-size=500,2400", "--blink-settings=preferredColorScheme=0", f"--screenshot={dark}"]
    subprocess.run([*command, *options, page.as_uri()], capture_output=True, env=environment, check=False)
    narrow = Image.open(dark).convert("RGB")
    assert sum(narrow.getpixel((250, 3))) < 100 < 500 < sum(picture.getpixel((600, 3)))  # of the page itself


def test_colours_of_variants_are_one():
    names = ["l1_norm", "l2_norm", "l1_norm by sensitivity", "l2_norm by sensitivity"]
    colours = [charts_module.colour_of(name, names) for name in names]
    assert colours == [COLOURS[0], COLOURS[1]] * 2
    assert "background:none" in charts_module.swatch(names[2], names) and "none" not in charts_module.swatch(
        "l1_norm", names
    )
