"""What a run keeps of each epoch: a line on the screen, a row of epochs.csv, TensorBoard's curves."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors

import mfp
from mfp.errors import MfpError
from mfp.train.evaluation import regret_of


class Clock:
    """Where the time of an epoch goes, by the host's clock (a GPU works on while the host prepares)."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        total = time.perf_counter() - self.start
        return {f"share_{part}": round(seconds / total, 4) for part, seconds in self.parts.items()}


def epoch_line(record: dict[str, Any], epochs: int, watched: str, short: bool) -> str:
    """The line that is said after an epoch; `watched` names the images that it was evaluated on.

    Args:
        short: for a log; the rest is in epochs.csv.
    """
    line = f"epoch {record['epoch'] + 1}/{epochs}  train loss {record['train_loss']:.4f}"
    line += f"  {watched} loss {record['loss']:.4f}  accuracy {record['top1']:.2f} %"
    if "criterion" in record:
        line += f"  pruned by {record['criterion']}"
    line += f"  {record['images_per_second']:.0f} images/s"
    if short:
        return line
    if "criterion" in record:
        line += f"  churn {record['churn']:.2f}"
    shares = [
        f"{key[6:].replace('_', '/')} {100 * value:.0f} %" for key, value in record.items() if key.startswith("share_")
    ]
    return f"{line}  ({', '.join(shares)})"


def to_csv(history: list[dict[str, Any]]) -> bytes:
    """The whole table, which is written anew each time, so that a resumed run never leaves a row twice."""
    names = list(dict.fromkeys(key for record in history for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def scores_file(scores: mfp.FilterScores) -> bytes:
    """Scores by criterion as safetensors, with the layers' places in them as metadata."""
    names = {layer.name: [layer.offset, layer.num_filters] for layer in scores.plan.layers}
    return to_safetensors({name: value.cpu() for name, value in scores.items()}, {"layers": json.dumps(names)})


def make_board(directory: Path, epoch: int):
    """TensorBoard's writer, which forgets what it has from this epoch on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MfpError("--tensorboard needs the package tensorboard: pip install 'mfp[train]'") from error
    return SummaryWriter(directory / "tensorboard", purge_step=epoch)


def write_board(board, record: dict[str, Any], mask: mfp.FilterMask | None) -> None:
    for key, value in record.items():
        if isinstance(value, float):
            board.add_scalar(key, value, record["epoch"])
    if "criterion" in record:
        board.add_text("criterion", record["criterion"], record["epoch"])
        for name, kept in mask.kept.items():
            board.add_scalar(f"filters_kept/{name}", kept, record["epoch"])
    board.flush()


def decision_record(decision: mfp.Decision) -> dict[str, Any]:
    """One pruning point as columns of the table of epochs."""
    criterion = decision.neighbour
    if isinstance(criterion, dict):  # chosen per layer: name them by how often they won
        counts = sorted(
            ((list(criterion.values()).count(name), name) for name in set(criterion.values())), reverse=True
        )
        criterion = " ".join(f"{name}:{count}" for count, name in counts)
    record = {"rate_factor": decision.rate_factor, "criterion": criterion, "attribute": decision.attribute}
    record |= {"attribute_before": decision.attribute_before, "attribute_after": decision.attribute_after}
    record |= {"churn": decision.churn, "filters_pruned": decision.num_pruned}
    record |= {f"neighbour_{name}": value for name, value in decision.neighbours.items()}
    if decision.hindsight:
        record["regret"], record["ahead_of_mean"] = regret_of(decision.hindsight, decision.neighbour)
    return record | {f"hindsight_{name}": value for name, value in decision.hindsight.items()}
