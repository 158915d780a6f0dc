"""Times every operator of a file in one engine: a process of its own, started by layers.py.

Prints [[operator, convolution, channels, milliseconds], ...] in the order in which the operators run. ``convolution``
says which one it is ("3x3 on 14x14, groups"), "" for other operators; it reads so many channels in a group.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile

import numpy as np

WARM_UP = 3
Times = dict[tuple[str, str, str, int], list[float]]  # {(name, and what is printed): milliseconds of each call}


def openvino(file: str, values: list[np.ndarray], threads: int, calls: int) -> Times:
    import openvino as engine

    core = engine.Core()
    model = core.read_model(file)
    model.reshape({port: list(value.shape) for port, value in zip(model.inputs, values, strict=True)})
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    compiled = core.compile_model(model, "CPU", settings)
    convs = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].astype(str) == "Convolution":
            weight, result = (list(port.get_shape()) for port in (node.inputs()[1], node.outputs()[0]))
            convs[node.get_friendly_name()] = _convolution(weight[-3:], result, grouped=len(weight) == 5)
    request = compiled.create_infer_request()
    times: Times = {}
    for number in range(calls + WARM_UP):
        request.infer(values, share_inputs=True)
        if number < WARM_UP:
            continue
        for info in request.get_profiling_info():
            if info.status == engine.ProfilingInfo.Status.EXECUTED:
                key = (info.node_name, info.node_type, *convs.get(info.node_name, ("", 0)))
                times.setdefault(key, []).append(1e3 * info.real_time.total_seconds())
    return times


def onnxruntime(file: str, values: list[np.ndarray], threads: int, calls: int) -> Times:
    import onnxruntime as engine

    with tempfile.TemporaryDirectory() as directory:
        options = engine.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = threads, True
        options.profile_file_prefix = os.path.join(directory, "profile")
        session = engine.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = dict(zip((port.name for port in session.get_inputs()), values, strict=True))
        for _ in range(calls + WARM_UP):
            session.run(None, inputs)
        with open(session.end_profiling()) as lines:
            events = json.load(lines)
    times: Times = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            arguments, conv = event["args"], ("", 0)
            if "Conv" in arguments["op_name"]:
                shapes = *arguments["input_type_shape"][:2], arguments["output_type_shape"][0]
                image, weight, result = (shape for part in shapes for shape in part.values())
                conv = _convolution(weight[1:], result, grouped=image[1] >= 2 * weight[1])
            times.setdefault((event["name"], arguments["op_name"], *conv), []).append(event["dur"] / 1e3)
    return {key: found[WARM_UP:] for key, found in times.items()}


def _convolution(weight: list[int], result: list[int], grouped: bool) -> tuple[str, int]:
    """Named like those of layers.py; and the channels that it reads in a group."""
    channels, *kernel = weight
    size, image = "x".join(map(str, kernel)), "x".join(map(str, result[2:]))
    return f"{size} on {image}{', groups' if grouped else ''}", channels


def main(engine: str, file: str, inputs: str, batch: int, threads: int, calls: int) -> None:
    values = [np.concatenate([value] * batch) for value in np.load(inputs).values()]
    times = {"openvino": openvino, "onnxruntime": onnxruntime}[engine](file, values, threads, calls)
    print(json.dumps([[*key[1:], statistics.median(found)] for key, found in times.items()]))


if __name__ == "__main__":
    name, network, images, *numbers = sys.argv[1:]
    main(name, network, images, *map(int, numbers))
