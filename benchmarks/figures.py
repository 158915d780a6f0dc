"""Writes the tables and charts of README and docs from the files of benchmarks/results/: `make figures`.

A table stands in a document between two comments, and is written anew each time:

    <!-- figures: engines -->  ...  <!-- end of figures -->

The name is one of TABLES below. `--check` writes nothing and fails where a document or a chart differs from its result
files (tests/test_figures.py does the same).
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from mfp.atomic import write_atomically
from mfp.bench import results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
NAMES = {
    "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "mobilenet_v2": "MobileNetV2", "regnet_y_400mf": "RegNetY-400MF", "vgg16_bn": "VGG-16-BN",
    "densenet121": "DenseNet-121", "efficientnet_b0": "EfficientNet-B0", "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO", "mfp": "mfp's serving form",
}  # fmt: skip


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def name(key: str) -> str:
    return NAMES.get(key, key)


def number(value: float) -> str:
    """Three digits that count: 0.0123, 7.65, 412, 4,145."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def scoring(rows: list[dict]) -> str:
    lines, ours = [], {}
    for row in rows:
        first = ours.setdefault(row["job"], row)
        milliseconds = number(1e3 * row["seconds"])
        if row is first:
            lines.append([f"**{row['job']}**", row["who"], milliseconds, ""])
        else:
            lines.append(["", row["who"], milliseconds, f"{row['seconds'] / first['seconds']:.1f}"])
    return table(["job, all conv layers of ResNet-50", "by", "ms", "time / mfp's"], lines)


PARTS = {
    "passes": "forward and backward, one batch",
    "plain": "optimiser step, plain",
    "masked": "optimiser step, masked",
    "pruning": "pruning point: five criteria, choice, zeroing",
    "epoch, plain": "epoch of ImageNet, no pruning",
    "epoch, soft": "epoch, soft pruning once",
    "epoch, hard": "epoch, hard pruning once",
}


def overhead(rows: list[dict]) -> str:
    seconds = {row["part"]: row["seconds"] for row in rows}

    def added(part: str) -> str:
        return f"{seconds[part] / seconds['epoch, plain'] - 1:+.4%}" if part in ("epoch, soft", "epoch, hard") else ""

    return table(
        ["part", "seconds", "added"], ([PARTS[part], number(took), added(part)] for part, took in seconds.items())
    )


def compact(rows: list[dict]) -> str:
    header = ("network", "batch", "filters in multiples of", "dense, ms", "compact, ms", "FLOPs saved", "time saved")
    return table(
        [*header, "time / FLOPs"],
        (
            [name(row["arch"]), str(row["batch"]), str(row["channel_multiple"]), number(row["dense_ms"]),
             number(row["compact_ms"]), f"{row['flops_saved']:.1%}", f"{row['time_saved']:.1%}", f"{row['ratio']:.2f}"]
            for row in rows
        ),
    )  # fmt: skip


def engines(rows: list[dict]) -> str:
    names = list(dict.fromkeys(row["engine"] for row in rows))
    cells = {(row["arch"], row["batch"], row["residual"], row["engine"]): row for row in rows}
    lines = []
    for arch, batch, form in dict.fromkeys(key[:3] for key in cells):
        found = [cells[arch, batch, form, engine] for engine in names]
        kept = dict.fromkeys(f"{row['flops_kept']:.3f}" for row in found)
        fastest = min(found, key=lambda row: row["compact_ms"])["engine"]
        lines.append([f"{name(arch)}, {batch}", form, " / ".join(kept), *map(_saved, found), name(fastest)])
    return table(["network, batch", "residual", "FLOPs kept", *map(name, names), "fastest"], lines)


def _saved(row: dict) -> str:
    ratio = (1 - row["compact_ms"] / row["dense_ms"]) / max(1 - row["flops_kept"], 1e-9)
    return f"{number(row['dense_ms'])} → {number(row['compact_ms'])} ({ratio:.2f})"


def layers(rows: list[dict]) -> str:
    """A table for each batch size."""
    batches = dict.fromkeys(row["batch"] for row in rows)
    return "\n".join(_layers([row for row in rows if row["batch"] == batch]) for batch in batches)


def _layers(rows: list[dict]) -> str:
    """For each engine milliseconds, dense → compact: of the convolutions by kernel and image, and of all else."""
    engines = [key for key in ("onnxruntime", "openvino", "ms") if any(row.get(key) for row in rows)]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    total = {key: sum(row.get(key, 0.0) for row in rows if row["form"] == forms[0]) for key in engines}
    large = {row["layer"] for row in rows if any(row.get(key, 0.0) > total[key] / 20 for key in engines[:-1])}
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: not row["convolution"]):
        groups.setdefault(row["convolution"] or (row["layer"] if row["layer"] in large else "all else"), []).append(row)
    groups |= {"all else": groups.pop("all else", []), "all": rows}

    def arrow(group: list[dict], value: Callable[[dict], float]) -> str:
        sums = [sum(value(row) for row in group if row["form"] == form) for form in forms]
        return " → ".join(map(number, sums)) if any(sums) else ""

    lines = [
        [
            title, str(sum(bool(row["convolution"]) for row in group) // len(forms) or ""),
            arrow(group, lambda row: row["gmacs"] * row["ms"]),
            *(arrow(group, lambda row, key=key: row.get(key, 0.0)) for key in engines),
        ]
        for title, group in groups.items()
    ]  # fmt: skip
    about = f"{name(rows[0]['arch'])}, batch {rows[0]['batch']}, rate {rows[0]['rate']}, {' → '.join(forms)}"
    names = [f"{'mfp' if key == 'ms' else name(key)}, ms" for key in engines]
    return table([about, "layers", "million multiply-adds", *names], lines)


def training(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        one = f"{name(row['arch'])}, {row['batch']} images of {row['image_size']}²" if row is rows[0] else ""
        parts = [number(1e3 * row[part]) for part in ("forward", "backward", "step", "seconds")]
        smaller = "faster" in row
        gained = [""] * 3
        if smaller:
            gained = [f"{row['faster']:.2f}", f"{row['flops_saved']:.1%}", f"{row['realised']:.2f}"]
        lines.append([one, f"smaller, {row['network']}" if smaller else row["network"], *parts, *gained])
    header = ("", "network", "forward, ms", "backward, ms", "step, ms", "together, ms", "times as fast as masked")
    return table([*header, "FLOPs saved", "time / FLOPs"], lines)


def torch_pruning(rows: list[dict]) -> str:
    makers = list(dict.fromkeys(row["by"] for row in rows))
    cells = {(row["arch"], row["by"]): row for row in rows}

    def cell(row: dict) -> str:
        return row["failed"].split(":")[0] if row["failed"] else f"{number(row['ms'])} ms, {row['flops_kept']:.1%}"

    archs = dict.fromkeys(row["arch"] for row in rows)
    return table(
        ["network", *makers], ([name(arch), *(cell(cells[arch, maker]) for maker in makers)] for arch in archs)
    )


def whole_runs(rows: list[dict]) -> str:
    runs: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        runs.setdefault((row["schedule"], row["arch"], row["residual"], row["seed"]), {})[row["network"]] = row
    lines = []
    for (schedule, arch, residual, seed), found in runs.items():
        dense = found["dense"]["seconds"]
        times = [
            f"{found[key]['seconds']:.0f} ({found[key]['seconds'] / dense:.2f})" if key != "dense" else f"{dense:.0f}"
            for key in ("dense", "masked", "smaller")
        ]
        ends = [f"{found[key]['top1']:.2f}" for key in ("dense", "masked", "smaller")]
        kept = found["smaller"]["flops"] / found["dense"]["flops"]
        lines.append([schedule, f"{name(arch)}, {residual}", str(seed), f"{kept:.1%}", *times, *ends])
    header = ("schedule", "network", "seed", "FLOPs kept", "dense, s", "masked, s (/ dense)", "smaller, s (/ dense)")
    return table([*header, "top-1, %: dense", "masked", "smaller"], lines)


def demo(rows: list[dict]) -> str:
    lines = {
        "test accuracy, %": [f"{row['top1']:.2f}" for row in rows],
        "FLOPs (multiply-adds)": [f"{row['flops']:,}" for row in rows],
        "parameters": [f"{row['parameters']:,}" for row in rows],
        "ms per image": ["-" if row["milliseconds"] is None else f"{row['milliseconds']:.3f}" for row in rows],
    }
    return table(["", *(row["network"] for row in rows)], ([title, *cells] for title, cells in lines.items()))


def networks(rows: list[dict]) -> str:
    """The zoo's networks (tests/zoo.py), a table for each family."""
    header = ["network", "multiply-adds, M", "compact", "times live", "differs by", "seconds", ""]
    texts = []
    for family in dict.fromkeys(row["family"] for row in rows):
        lines = [_network(row) for row in rows if row["family"] == family]
        texts.append(f"**{family}**\n\n{table(header, lines)}")
    return "\n".join(texts)


def residual_forms(rows: list[dict]) -> str:
    lines = []
    for form in dict.fromkeys(row["residual"] for row in rows):
        found = [row for row in rows if row["residual"] == form]
        columns = [[row[key] for row in found] for key in ("dense_top1", "top1")]
        accuracies = [f"{mean(column):.2f} ({min(column):.2f} to {max(column):.2f})" for column in columns]
        kept = [f"{mean(row[key] for row in found):.1%}" for key in ("flops_kept", "parameters_kept")]
        lines.append([form, *accuracies, *kept, str(len(found))])
    header = ("residual", "dense, %", "pruned, %", "FLOPs kept", "parameters kept", "seeds")
    return table(header, lines)


def eight_bits(rows: list[dict]) -> str:
    header = ("engine", "network", "accuracy, %", "ms, batch 1", "ms, batch 64")
    return table(
        header,
        (
            [name(row["engine"]), row["network"], f"{row['top1']:.2f}", f"{row['ms_1']:.3f}", f"{row['ms_64']:.2f}"]
            for row in rows
        ),
    )


def _network(row: dict) -> list[str]:
    fixed = "one image size" if row.get("image_size") == "fixed" else None
    note = "; ".join(part for part in (row["failed"], row.get("note"), fixed) if part).replace("|", "\\|")
    if "times_live" not in row:
        return [row["name"], "", "", "", "", "", note]
    apart = " / ".join(f"{row[dtype]:.0e}" for dtype in ("float32", "float64") if dtype in row)
    counts = [f"{row['before'] / 1e6:.1f}", f"{row['after'] / 1e6:.1f}", f"{row['times_live']:.2f}"]
    return [row["name"], *counts, apart, f"{row['seconds']:.1f}", note]


#: Name of a table → the result files that it shows, one after the other, and how.
TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "scoring": ("scoring*.json", scoring),
    "overhead": ("overhead*.json", overhead),
    "compact": ("compact*.json", compact),
    "engines": ("engines*.json", engines),
    "layers": ("layers*.json", layers),
    "training": ("training*.json", training),
    "torch_pruning": ("torch_pruning*.json", torch_pruning),
    "whole-runs": ("whole-runs.json", whole_runs),
    "demo": ("demo.json", demo),
    "networks": ("zoo.json", networks),
    "eight_bits": ("eight-bits.json", eight_bits),
    "residual": ("residual-forms.json", residual_forms),
}


def text(key: str) -> str:
    """What stands between the comments of a table."""
    pattern, draw = TABLES[key]
    files = sorted(RESULTS.glob(pattern))
    if not files:
        raise SystemExit(f"a document shows {key}, and there is no benchmarks/results/{pattern}")
    return "\n".join(f"\n{draw(found['rows'])}\n{source(found)}\n" for found in map(results.read, files)) + "\n"


def source(found: dict) -> str:
    """The line under a table."""
    note = f" {found['note'][0].upper()}{found['note'][1:]}." if found.get("note") else ""
    return f"*{found['machine']}, torch {found['torch']}, {found['date']}: `{found['command']}`.{note}*"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(document: str) -> str:
    """The document with its tables as the result files have them now."""
    return BLOCK.sub(lambda found: found[1] + text(found[2]) + found[3], document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not up to date")
    parser.add_argument("--demo", metavar="RUN", help="first make results/demo.json of this run of `mfp prune`")
    parser.add_argument("--eight-bits", metavar="RUN", help="first make results/eight-bits.json of this run")
    options = parser.parse_args()
    if options.eight_bits:
        eight_bits_result(Path(options.eight_bits))
    if options.demo:
        demo_result(Path(options.demo))
    import charts

    changed = [path for path in documents() if written(path.read_text()) != path.read_text()]
    drawn = [chart for chart in charts.CHARTS if not charts.up_to_date(chart)]
    for path in () if options.check else changed:
        write_atomically(path, written(path.read_text()).encode())
    for chart in () if options.check else drawn:
        charts.draw(chart)
    names = [path.relative_to(ROOT) for path in (*changed, *map(charts.path, drawn))]
    verb = "differs from its result files; run `make figures`" if options.check else "written"
    print("\n".join(f"{each}: {verb}" for each in names) or "every table and chart is as the result files have it")
    sys.exit(bool(options.check and names))


def demo_result(run: Path) -> None:
    import json

    found = json.loads((run / "result.json").read_text())
    keys = ("top1", "flops", "parameters", "milliseconds")
    rows = [
        {"arch": found["config"]["arch"], "data": found["config"]["data"], "network": network}
        | {key: found[network].get(key) for key in keys}
        for network in ("dense", "masked", "compact")
    ]
    results.write(RESULTS / "demo.json", "mfp prune", rows)


def eight_bits_result(run: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import eight_bits

    results.write(RESULTS / "eight-bits.json", f"python examples/eight_bits.py {run}", eight_bits.main(str(run)))


if __name__ == "__main__":
    main()
