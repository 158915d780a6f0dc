"""Microseconds of every layer of a file in OpenVINO: a process of its own, started by layers.py."""

from __future__ import annotations

import json
import statistics
import sys

import numpy as np
import openvino


def main(file: str, inputs: str, batch: int, threads: int, calls: int) -> None:
    """Prints [[name, type, microseconds], ...] in the order in which the layers run."""
    core = openvino.Core()
    model = core.read_model(file)
    values = [np.concatenate([value] * batch) for value in np.load(inputs).values()]
    model.reshape({port: list(value.shape) for port, value in zip(model.inputs, values, strict=True)})
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(calls + 3):
        request.infer(values, share_inputs=True)
        if number < 3:
            continue
        for info in request.get_profiling_info():
            if info.status == openvino.ProfilingInfo.Status.EXECUTED:
                times.setdefault((info.node_name, info.node_type), []).append(info.real_time.total_seconds() * 1e6)
    print(json.dumps([[*key, statistics.median(found)] for key, found in times.items()]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
