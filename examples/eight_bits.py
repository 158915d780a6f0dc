"""Eight bits on top of pruning: the exported network goes through ONNX Runtime's and NNCF's quantisation as it is.

    python examples/eight_bits.py runs/resnet20-digits

Needs: pip install 'mfp[train,onnx,openvino]' nncf
"""

import sys
import tempfile
from pathlib import Path

import nncf
import numpy as np
import openvino
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from rich.console import Console
from rich.table import Table

import mfp
from mfp.export import dense_like
from mfp.export.engines import measure, run_file
from mfp.train.checkpoints import load_newest
from mfp.train.data import load_data
from mfp.train.load import load_network

CALIBRATION = 256  # training images


class Reader(CalibrationDataReader):
    """What ONNX Runtime asks its calibration images from."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = iter(np.array_split(images, 8))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch}


def arrays(dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [dataset[0, index] for index in range(min(count, len(dataset)))]
    return np.stack([image.numpy() for image, _ in pairs]), np.array([int(target) for _, target in pairs])


def quantize(engine: str, file: Path, images: np.ndarray) -> Path:
    """The file in 8 bits, by the engine's own tool."""
    made = file.with_stem(f"{file.stem}-8")
    if engine == "onnxruntime":
        quantize_static(file, made, Reader(images), quant_format=QuantFormat.QDQ, per_channel=True)
    else:
        network = openvino.Core().read_model(file)
        quantized = nncf.quantize(network, nncf.Dataset(images[:, None]), subset_size=len(images))
        openvino.save_model(quantized, made)
    return made


def accuracy(engine: str, file: Path, images: np.ndarray, targets: np.ndarray) -> float:
    """Percent of the images whose largest output is the right one."""
    _, outputs = run_file(engine, file, {"x": images})
    return 100 * float((outputs[1][0].argmax(1) == targets).mean())


def compare(networks: dict, data, rounds: int = 3, seconds: float = 1.0) -> list[dict]:
    """A row for each network, in float32 and in 8 bits, in each engine."""
    calibration, _ = arrays(data.plain, CALIBRATION)
    test, targets = arrays(data.test, 10_000)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for engine, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
            files = {}
            for name, network in networks.items():
                file = Path(directory) / f"{name}{suffix}"
                mfp.export(network, file, data.example())
                files[name], files[f"{name}, 8 bits"] = file, quantize(engine, file, calibration)
            contestants = {name: (engine, file) for name, file in files.items()}
            times = measure(contestants, {"x": test[:1]}, (1, 64), rounds=rounds, seconds=seconds)
            for name, file in files.items():
                rows.append({"engine": engine, "network": name, "top1": accuracy(engine, file, test, targets)})
                rows[-1] |= {"ms_1": times[name][1], "ms_64": times[name][64]}
    return rows


def main(run: str, data: str = "digits") -> list[dict]:
    masked = load_network(run).eval()
    return compare({"dense": load_network_dense(run) or dense_like(masked), "compact": masked}, load_data(data))


def load_network_dense(run: str):
    """The network that the run trained without pruning, if it did."""
    from mfp.train.config import RunConfig
    from mfp.train.models import build_model

    checkpoint = load_newest(Path(run) / "dense")
    if checkpoint is None:
        return None
    model = build_model(RunConfig(**checkpoint.state["config"]).arch, checkpoint.state["num_classes"])
    model.load_state_dict(checkpoint.state["model"])
    return model.eval()


if __name__ == "__main__":
    table = Table("engine", "network", "accuracy, %", "ms, batch 1", "ms, batch 64")
    for row in main(*sys.argv[1:]):
        table.add_row(row["engine"], row["network"], f"{row['top1']:.2f}", f"{row['ms_1']:.3f}", f"{row['ms_64']:.2f}")
    Console().print(table)
