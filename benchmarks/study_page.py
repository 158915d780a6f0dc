"""The page of the study: tables, plots and sentences, all computed from the rows of results.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from study_runs import BASELINES, SCRATCH

from mfp import PAPER_CRITERIA
from mfp.atomic import write_atomically
from mfp.attributes import WITH_DATA, WITHOUT_DATA
from mfp.errors import MfpError

MORE = ("weighted_hybrid", "taylor", "bn_scale")
POOLS = {"five": PAPER_CRITERIA, "eight": (*PAPER_CRITERIA, *MORE)}
#: An attribute as columns of the table name it: as mfp measures it, and with the dense network's statistics ("raw").
ATTRIBUTES = (*WITH_DATA, *(f"{name} raw" for name in WITH_DATA), *WITHOUT_DATA)
Row = dict[str, str]


class Results:
    """The rows, by what a table asks for."""

    def __init__(self, rows: list[Row]) -> None:
        self.cell = {(row["setting"], row["rates"], row["method"], int(row["seed"])): row for row in rows}
        self.seeds = sorted({int(row["seed"]) for row in rows})

    def values(self, setting: str, rates: str, method: str, column: str = "accuracy") -> dict[int, float]:
        """By seed."""
        cells = {seed: self.cell.get((setting, rates, method, seed), {}) for seed in self.seeds}
        return {seed: float(row[column]) for seed, row in cells.items() if row.get(column)}

    def rates(self, setting: str, allocated: bool = False) -> list[str]:
        return sorted({key[1] for key in self.cell if key[0] == setting and ("FLOPs" in key[1]) == allocated})

    def methods(self, setting: str) -> list[str]:
        return list(dict.fromkeys(key[2] for key in self.cell if key[0] == setting))

    def choice(self, rates: str, seed: int, attribute: str, pool: Sequence[str]) -> str | None:
        """What mfp.FilterPruner chooses: the candidate whose attribute is closest to the unpruned network's."""
        rows = {method: self.cell.get(("once", rates, method, seed)) for method in ("unpruned", *pool)}
        if not all(rows.values()):
            return None
        return min(pool, key=lambda method: abs(float(rows[method][attribute]) - float(rows["unpruned"][attribute])))

    def compared(self, setting: str, rates: str, attribute: str, pool: Sequence[str]) -> list[dict[str, float]]:
        """A dict a seed: accuracy of the choice, of each candidate's, and what that means."""
        accuracies = {method: self.values(setting, rates, method) for method in pool}
        seeds = [seed for seed in self.seeds if all(seed in own for own in accuracies.values())]
        if not seeds:
            return []
        fixed = max(pool, key=lambda method: mean(accuracies[method][seed] for seed in seeds))
        found = []
        for seed in seeds:
            chosen = self.choice(rates, seed, attribute, pool)
            if chosen is not None:
                own = [accuracies[method][seed] for method in pool]
                value = accuracies[chosen][seed]
                found.append({"chosen": chosen, "accuracy": value, "best": max(own) - value, "fixed name": fixed,
                              "fixed": accuracies[fixed][seed] - value, "average": value - mean(own)})  # fmt: skip
        return found


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    values = list(values)
    if not values:
        return "-"
    return f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def write_page(directory: Path, page: Path, runs: dict[str, tuple[int, int]]) -> None:
    """Writes the page and its plots from results.csv and study.json of a directory.

    Args:
        runs: for each setting, how many runs are there and how many there will be.
    """
    try:
        results = Results(list(csv.DictReader((directory / "results.csv").open())))
        about = json.loads((directory / "study.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        raise MfpError(f"{directory} holds no results of a study: {error}") from error
    plots = draw(results, page.with_suffix(""))
    lines = [*introduction(results, about), *missing(runs, about), *verdict(results)]
    lines += [*rates_section(results), *once_section(results), *finetune_section(results), *scratch_section(results)]
    lines += [f"![{title}]({page.stem}/{name})" for name, title in plots.items()]
    write_atomically(page, ("\n".join(lines).rstrip() + "\n").encode())


def introduction(results: Results, about: dict) -> list[str]:
    options = about["options"]
    data = options["data"]
    dense = results.values("dense", "", "unpruned")
    tested = (
        f"{options['test_images']:,} test images, the same for all" if options["test_images"] else "all test images"
    )
    return [
        "# Accuracy", "",
        "What the choice of the criterion, and rates that suit the layers, are worth. This page is written by",
        "`benchmarks/study.py`, every number and sentence of it from the table of its runs,",
        "`benchmarks/results/study/results.csv`.", "",
        f"{options['arch']} on {data}: epochs {options['epochs']}, batch {options['batch']}, seeds {len(dense)}; "
        f"{spread(dense.values())} % unpruned. Precision {options['precision']}. Attributes, `taylor` and BatchNorm "
        f"statistics: {options['calibration']} training images. Accuracy: percent of {tested}. "
        "Mean ± standard deviation over the seeds, in percent and in points; no setting was chosen by test images. "
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, {about['date']}, commit "
        f"{about['commit']}.", "",
    ]  # fmt: skip


def missing(runs: dict[str, tuple[int, int]], about: dict) -> list[str]:
    names = {"dense": "dense networks", "once": "pruned once, nothing trained after",
             "finetune": "fine-tuned after pruning", "scratch": "pruned from scratch"}  # fmt: skip
    options = about["options"]
    defaults = {"arch": "resnet20", "epochs": 2, "batch": 128, "lr": 0.1, "test_images": 0, "calibration": 1024,
                "precision": "float32", "finetune_images": 12800, "finetune_lr": 0.02, "scratch_epochs": 8,
                "scratch_images": 12800, "weights": None}  # fmt: skip
    own = " ".join(
        f"--{name.replace('_', '-')} {options[name]}"
        for name in defaults
        if options.get(name, defaults[name]) != defaults[name]
    )
    data = options["data"]
    command = f"    python benchmarks/study.py --data {data}:PATH {own} --output runs/study --page docs/accuracy.md"
    rows = [(names[setting], done, planned - done) for setting, (done, planned) in runs.items()]
    lines = ["## What ran, and what did not yet", "", "The command that gave these rows, and goes on with what is not "
             "there (copy benchmarks/results/study to runs/study to keep what is):", "", command, ""]  # fmt: skip
    return lines + table(("setting", "runs here", "not run yet"), rows)


def verdict(results: Results) -> list[str]:
    """Where switching gains something, and where nothing: in sentences."""
    lines = ["## In short", ""]
    for share in shares(results):
        before, after = (gains(results, setting, share) for setting in ("once", "finetune"))
        each = ", ".join(f"{value:+.1f}" for value in before.values())
        text = f"- At {share} of the FLOPs, rates by layer against one rate for all: "
        text += f"{spread(before.values(), '+')} points before any training (seed by seed {each})"
        if after:
            text += f", and {spread(after.values(), '+')} after fine-tuning"
        lines.append(text + ".")
    for setting, when in (("once", "Before any training"), ("finetune", "After fine-tuning")):
        for rates in results.rates(setting):
            found = results.compared(setting, rates, "loss", PAPER_CRITERIA)
            if not found:
                continue
            behind = [row["fixed"] for row in found]
            gain, error = -mean(behind), stdev(behind) / len(behind) ** 0.5 if len(behind) > 1 else 0.0
            against = f"against always `{found[0]['fixed name']}`, the best of the five in hindsight"
            says = "switching gains" if len(behind) > 2 and gain > 2 * error else "switching gains nothing that shows"
            if len(behind) > 2 and gain < -2 * error and gain < 0:
                says = "switching loses"
            ahead = spread((row["average"] for row in found), "+")
            lines.append(f"- {when}, rate {rates} (seeds: {len(found)}): {says} ({gain + 0.0:+.1f} points) {against}; "
                         f"{ahead} against their average.")  # fmt: skip
            drawn, worst = (spread(results.values(setting, rates, name).values()) for name in BASELINES)
            five = spread(row["accuracy"] - row["average"] for row in found)
            lines.append(
                f"  There the five average {five} %, filters drawn at random {drawn} %, "
                f"pruning the highest norms {worst} %."
            )
    return [*lines, *(scratch_sentence(results, rates) for rates in results.rates("scratch")), ""]


def shares(results: Results) -> list[str]:
    """The shares of the FLOPs for which both ways of finding rates ran."""
    names = results.rates("once", allocated=True)
    found = [name.removeprefix("by layer, ").removesuffix(" of FLOPs") for name in names if name.startswith("by layer")]
    return sorted((share for share in found if f"uniform, {share} of FLOPs" in names), reverse=True)


def allocated(results: Results, setting: str, way: str, share: str, column: str = "accuracy") -> dict[int, float]:
    """Accuracies at rates for a share of the FLOPs, by seed; they are of one criterion."""
    rates = f"{way}, {share} of FLOPs"
    method = next(key[2] for key in results.cell if key[1] == rates and key[2] != "unpruned")
    return results.values(setting, rates, method, column)


def gains(results: Results, setting: str, share: str) -> dict[int, float]:
    """Points that rates by layer are ahead of the uniform rate, by seed."""
    uniform, by_layer = (allocated(results, setting, way, share) for way in ("uniform", "by layer"))
    return {seed: by_layer[seed] - uniform[seed] for seed in uniform if seed in by_layer}


def rates_section(results: Results) -> list[str]:
    rows = []
    for share in shares(results):
        for setting, name in (("once", "before any training"), ("finetune", "after fine-tuning")):
            difference = gains(results, setting, share)
            if difference:
                cells = []
                for way in ("uniform", "by layer"):
                    reached = allocated(results, "once", way, share, "flops").values()
                    cells += [f"{100 * mean(reached):.1f}", spread(allocated(results, setting, way, share).values())]
                worst = f"{min(difference.values()):+.1f}"
                rows.append((share, name, len(difference), *cells, spread(difference.values(), "+"), worst))
    if not rows:
        return []
    head = ("asked", "", "seeds", "FLOPs left, %", "one rate for all", "FLOPs left, %", "rates by layer", "difference",
            "worst seed")  # fmt: skip
    text = (
        "`mfp.find_rates` against `mfp.find_rate`, both with `l2_distance` and re-estimated BatchNorm statistics, to "
        "the same share of the multiply-adds of the compact network. A uniform rate moves many layers by a "
        "filter at once and may stop well below the share that was asked for, which counts against it here."
    )
    text += made_on(row for key, row in results.cell.items() if "FLOPs" in key[1])
    return ["## Rates that suit the layers", "", text, "", *table(head, rows)]


def made_on(rows: Iterable[dict]) -> str:
    """On which machines, where rows came from others than the page's own."""
    rows = list(rows)
    machines = sorted({row["on"] for row in rows if row.get("on")})
    here = [] if all(row.get("on") for row in rows) else ["the machine above"]
    return f" Networks of these runs were trained and pruned on {'; '.join([*machines, *here])}." if machines else ""


def once_section(results: Results) -> list[str]:
    rates = results.rates("once")
    if not rates:
        return []
    lines = ["## Pruned once, nothing trained after", "",
             "BatchNorm statistics re-estimated. `random` draws the filters, `worst` takes those with the highest "
             "`l2_norm`. In bold the best of a column.", ""]  # fmt: skip
    left = [100 * next(iter(results.values("once", rate, "l2_norm", "flops").values()), 0.0) for rate in rates]
    lines += accuracy_table(
        results, "once", (*POOLS["eight"], *BASELINES), [("FLOPs left, %", *map("{:.0f}".format, left))]
    )
    lines += [
        "With the statistics of the unpruned network, as the papers measure (accuracy on the calibration images):",
        "",
    ]
    rows = []
    for method in POOLS["eight"]:
        errors = [results.values("once", rate, method, "top1_error raw").values() for rate in rates]
        rows.append((f"`{method}`", *(spread(100 - 100 * error for error in own) for own in errors)))
    lines += table(("", *rates), rows)
    return lines + choices(results, "once")


def accuracy_table(results: Results, setting: str, methods: Sequence[str], more: Sequence = ()) -> list[str]:
    rates = results.rates(setting)
    found = {method: [list(results.values(setting, rate, method).values()) for rate in rates] for method in methods}
    best = [max((mean(own[place]) for own in found.values() if own[place]), default=0) for place in range(len(rates))]
    rows = []
    for method, own in found.items():
        if any(own):
            cells = [
                f"**{spread(v)}**" if v and mean(v) == top else spread(v) for v, top in zip(own, best, strict=True)
            ]
            rows.append((f"`{method}`", *cells))
    counts = [max(len(own[place]) for own in found.values()) for place in range(len(rates))]
    return table(("rate", *rates), [*more, ("seeds", *counts), *rows])


def choices(results: Results, setting: str) -> list[str]:
    """MFP's choices by each attribute, and their regret, for both pools."""
    text = (
        "Where a network is pruned once, MFP's network is that of the criterion that it chooses. Each cell: accuracy "
        "of the choice, mean over the seeds; points behind the best fixed criterion of that rate "
        "in hindsight (negative: ahead of it); points ahead of the average criterion. Then, over all cases (a seed and "
        "a rate): the share in which the best candidate was chosen, and the points behind the best candidate of each "
        'case, which no method can beat. The choice is made before anything is trained; "not re-estimated" tells how '
        "it was made, not how the accuracy was measured."
    )
    lines = ["### What MFP chooses", "", text, ""]
    rates = results.rates(setting)
    for name, pool in POOLS.items():
        rows = []
        for attribute in ATTRIBUTES:
            cells, cases = [], []
            for rate in rates:
                found = results.compared(setting, rate, attribute, pool)
                cases += found
                parts = [mean(row[part] for row in found) for part in ("accuracy", "fixed", "average")] if found else []
                cells.append("{:.1f}; {:.1f}; {:+.1f}".format(*parts) if parts else "-")
            if cases:
                best = sum(row["best"] == 0 for row in cases) / len(cases)
                measured, _, raw = attribute.partition(" ")
                how = f"`{measured}`" + ", not re-estimated" * bool(raw)
                behind = f"{mean(row['best'] for row in cases):.1f}"
                rows.append((how, *cells, f"{best:.0%}", behind))
        if rows:
            lines += [f"Pool of {name}: {', '.join(pool)}.", ""]
            lines += table(("attribute", *rates, "best chosen", "behind the best of each case"), rows)
    return lines


def finetune_section(results: Results) -> list[str]:
    if not results.rates("finetune"):
        return []
    text = (
        "One pass over a part of the training images with the mask held (--finetune-images), from the networks above."
    )
    lines = ["## After short fine-tuning", "", text, ""]
    return lines + accuracy_table(results, "finetune", (*POOLS["eight"], *BASELINES)) + choices(results, "finetune")


def scratch_section(results: Results) -> list[str]:
    if not results.rates("scratch"):
        return []
    text = (
        "Trained from the start on a part of the training images (--scratch-images in each of --scratch-epochs), "
        "pruned softly after each epoch; in the last half of the epochs the mask holds. MFP "
        "switches between the five criteria; `random` draws anew at each pruning point. `mfp weight_energy` is always "
        "won by `l2_norm`, and `mfp sparsity`, which did not run, by `l1_norm`."
    )
    text += made_on(row for key, row in results.cell.items() if key[0] == "scratch")
    lines = ["## Pruned from scratch", "", text, ""]
    lines += accuracy_table(results, "scratch", [name for name in SCRATCH if name in results.methods("scratch")])
    return lines


def scratch_sentence(results: Results, rates: str) -> str:
    """`mfp loss` against the fixed criteria, seed by seed."""
    fixed = {name: results.values("scratch", rates, name) for name in PAPER_CRITERIA}
    fixed = {name: own for name, own in fixed.items() if own}
    switched = results.values("scratch", rates, "mfp loss")
    seeds = [seed for seed in switched if all(seed in own for own in fixed.values())]
    if not seeds or not fixed:
        return f"- Pruned from scratch, rate {rates}: not all of its runs are there."
    best = max(fixed, key=lambda name: mean(fixed[name][seed] for seed in seeds))
    ahead = spread((switched[seed] - fixed[best][seed] for seed in seeds), "+")
    average = spread((switched[seed] - mean(own[seed] for own in fixed.values()) for seed in seeds), "+")
    five = spread(mean(own[seed] for own in fixed.values()) for seed in seeds)
    drawn, worst = (spread(results.values("scratch", rates, name).values()) for name in BASELINES)
    return (f"- Pruned from scratch, rate {rates} (seeds: {len(seeds)}): switching by the loss is {ahead} points from "
            f"always `{best}`, the best of the {len(fixed)} in hindsight, and {average} from their average.\n  "
            f"There they average {five} %, random filters {drawn} %, pruning the highest norms {worst} %.")  # fmt: skip


TITLES = {
    "once": "Pruned once, nothing trained after",
    "finetune": "After short fine-tuning",
    "scratch": "Pruned from scratch",
}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """The plots as SVG files, the same bytes for the same rows; file name -> title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "mfp"
    drawn = {}
    for setting, title in (*TITLES.items(), ("allocation", "One rate for all layers, and rates by layer")):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        lines = _allocation_lines(results) if setting == "allocation" else _rate_lines(results, setting)
        for label, style, points in lines:
            places, heights = zip(*((x, mean(own)) for x, own in points), strict=True)
            errors = [stdev(own) if len(own) > 1 else 0 for _, own in points]
            axes.errorbar(places, heights, errors, label=label, linestyle=style, capsize=2, marker="o", markersize=3)
        if lines:
            axes.set(ylabel="test accuracy, %", title=title)
            axes.set_xlabel("share of the FLOPs left" if setting == "allocation" else "rate of every layer")
            axes.legend(fontsize="small", ncols=2)
            data, file = io.BytesIO(), f"{setting}.svg"
            figure.savefig(data, format="svg", metadata={"Date": None})
            write_atomically(folder / file, data.getvalue())
            drawn[file] = title
        pyplot.close(figure)
    return drawn


def _rate_lines(results: Results, setting: str) -> list[tuple[str, str, list]]:
    """Label, style and points (rate, accuracies of the seeds) of each method."""
    lines = []
    for method in results.methods(setting):
        points = [
            (float(rate), list(results.values(setting, rate, method).values())) for rate in results.rates(setting)
        ]
        style = ":" if method in BASELINES else "--" if method.startswith("mfp") else "-"
        lines.append((method, style, [(rate, own) for rate, own in points if own]))
    found = {rate: results.compared(setting, rate, "loss", PAPER_CRITERIA) for rate in results.rates(setting)}
    lines.append(
        ("MFP, loss", "--", [(float(rate), [row["accuracy"] for row in own]) for rate, own in found.items() if own])
    )
    return [line for line in lines if line[2] and line[0] != "unpruned"]


def _allocation_lines(results: Results) -> list[tuple[str, str, list]]:
    lines = []
    for setting, style in (("once", "-"), ("finetune", "--")):
        for way in ("uniform", "by layer"):
            found = [(share, allocated(results, setting, way, share)) for share in shares(results)]
            points = [(float(share), list(own.values())) for share, own in found if own]
            lines += [(f"{way}, {TITLES[setting].lower()}", style, points)] if points else []
    return lines
