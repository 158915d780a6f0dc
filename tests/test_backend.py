"""Which backend runs, and that one that is asked for is never replaced silently."""

import pytest
import torch

import mfp
from mfp import backend

CPU = torch.device("cpu")


def test_the_compiled_cpu_backend_is_chosen_for_cpu_tensors():
    assert backend.choose(CPU).name == "cpu"
    assert backend.build_info()["torch"] == torch.__version__


def test_records_say_why_not():
    records = backend.backends()
    assert list(records) == ["cpu", "cuda", "triton", "reference"]
    assert records["reference"].unusable is None
    if not torch.cuda.is_available():
        assert "CUDA" in records["cuda"].unusable
        assert records["triton"].unusable


def test_any_other_device_gets_the_reference():
    assert backend.choose(torch.device("meta")).name == "reference"


def test_a_forced_backend(monkeypatch):
    monkeypatch.setenv("MFP_BACKEND", "reference")
    assert backend.choose(CPU).name == "reference"
    assert backend.choose(CPU, "cpu").name == "cpu"  # an argument is stronger than the environment
    monkeypatch.setenv("MFP_BACKEND", "tpu")
    with pytest.raises(mfp.MfpError, match="unknown backend 'tpu': known are cpu, cuda, triton, reference"):
        backend.choose(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device these backends can run")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_run_is_an_error(name):
    with pytest.raises(mfp.MfpError, match=f"backend '{name}' was requested and cannot run: "):
        backend.choose(CPU, name)


def test_a_forced_backend_for_the_wrong_device_is_an_error():
    with pytest.raises(mfp.MfpError, match="backend 'cpu' was requested for tensors on meta; it takes cpu"):
        backend.choose(torch.device("meta"), "cpu")


def test_a_build_for_another_torch_is_said(monkeypatch):
    """The compiled part remembers its torch; with another one the reference takes over, and says so."""
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    for cached in (backend._compiled, backend.backends):
        cached.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"built for torch .*, running 1\.0\.0; rebuild with: python -m pip install"
        ):
            assert backend.choose(CPU).name == "reference"
        assert "rebuild with" in backend.backends()["cpu"].unusable
    finally:
        monkeypatch.undo()
        for cached in (backend._compiled, backend.backends):
            cached.cache_clear()
    assert backend.choose(CPU).name == "cpu"
