"""Runs one file in one engine and says what came out and how long it took: a process of its own, started by engines.py.

As a script it imports nothing but the engine, whose threads would otherwise compete with those of other engines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]
Runner = Callable[[Inputs], list[np.ndarray]]


def onnxruntime(file: str, threads: int, device: str) -> Runner:
    import onnxruntime as engine

    options = engine.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    session = engine.InferenceSession(file, options, providers=providers)
    return lambda inputs: session.run(None, inputs)


def openvino(file: str, threads: int, device: str) -> Runner:
    import openvino as engine

    model = engine.Core().read_model(file)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"  # else bfloat16 where the processor has it
    compiled: dict[tuple, Any] = {}

    def run(inputs: Inputs) -> list[np.ndarray]:
        values = list(inputs.values())
        shapes = tuple(value.shape for value in values)
        if shapes not in compiled:  # fixed sizes are faster than free ones
            model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
            compiled[shapes] = engine.Core().compile_model(model, "CPU", settings).create_infer_request()
        request = compiled[shapes]
        request.infer(values, share_inputs=True)
        return [request.get_output_tensor(i).data for i in range(len(model.outputs))]

    return run


def torch_program(file: str, threads: int, device: str, compiled: bool) -> Runner:
    import torch

    torch.set_num_threads(threads)
    network = torch.export.load(file).module()
    half = device == "cuda"
    if half:
        network = network.to(device, torch.float16, memory_format=torch.channels_last)
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True
        network = torch.compile(network, dynamic=False)
    return torch_runner(network, device, half, channels_last=half)


def torch_runner(network: Any, device: str, half: bool, channels_last: bool = False) -> Runner:
    import torch
    from torch.utils._pytree import tree_leaves

    given: dict[int, list[Any]] = {}

    def run(inputs: Inputs) -> list[np.ndarray]:
        if id(inputs) not in given:
            tensors = [torch.from_numpy(value).to(device) for value in inputs.values()]
            if half:
                tensors = [t.half() for t in tensors]
            if channels_last:
                tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
            given[id(inputs)] = tensors
        with torch.no_grad():
            result = tree_leaves(network(*given[id(inputs)]))
        if device == "cuda":
            torch.cuda.synchronize()
        return [value.float().cpu().numpy() for value in result if isinstance(value, torch.Tensor)]

    return run


def tensorrt(file: str, threads: int, device: str) -> Runner:
    import torch

    network = torch.export.load(file).module().to("cuda", torch.float16)
    network = torch.compile(network, backend="tensorrt", options={"enabled_precisions": {torch.float16}})
    return torch_runner(network, "cuda", True, channels_last=True)


def mfp(file: str, threads: int, device: str) -> Runner:
    import torch

    import mfp

    torch.set_num_threads(threads)
    return torch_runner(mfp.load(file).to(device), device, False, channels_last=True)


ENGINES: dict[str, Callable[[str, int, str], Runner]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "torch.compile": lambda *given: torch_program(*given, compiled=True),
    "torch": lambda *given: torch_program(*given, compiled=False),
    "tensorrt": tensorrt,
    "mfp": mfp,
}


def milliseconds(run: Runner, inputs: Inputs, seconds: float) -> float:
    """The fastest of the calls that fit into the time, after some to warm up."""
    end = time.perf_counter() + seconds / 3
    run(inputs)
    while time.perf_counter() < end:
        run(inputs)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main(engine: str, file: str, inputs: str, outputs: str, batches: str, seconds: str, device: str) -> None:
    """``inputs`` has the arrays for one image; each batch repeats it. ``outputs`` gets those of every batch."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run = ENGINES[engine](file, threads, device)
    one = dict(np.load(inputs))
    times: dict[int, float] = {}
    made: dict[str, np.ndarray] = {}
    for batch in (int(part) for part in batches.split(",")):
        given = {name: np.ascontiguousarray(np.concatenate([value] * batch)) for name, value in one.items()}
        made |= {f"{batch} {number:04}": value.copy() for number, value in enumerate(run(given))}
        if float(seconds):
            times[batch] = milliseconds(run, given, float(seconds))
    np.savez(outputs, **made)  # type: ignore[arg-type]
    print(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
