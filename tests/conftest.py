"""What all tests share: the same numbers in every run, threads that suit the workers, and `make fuzz`.

The package alone must be enough to import this file: it also serves the test of the wheel, where hypothesis is not.
"""

import functools
import math
import os
import random
import sys
import time
from pathlib import Path

import pytest

try:
    import hypothesis
    from hypothesis.errors import HypothesisException
    from hypothesis.internal.conjecture import providers
except ImportError:
    hypothesis = None

# Before torch is imported: a worker that waits leaves the core to another one, and one thread is enough for each.
# Tests of what several threads do take the fixture below.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

FUZZ_EXAMPLES = 10**9  # more than there is time for
fuzz_until = None


class TimeUp(pytest.skip.Exception):
    """Ends a property's test early: hypothesis lets a skip through at once, and here it becomes a pass."""


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=float, metavar="SECONDS", help="only the property tests, this long, with new cases")


def pytest_configure(config):
    if hypothesis:
        settings, slow = hypothesis.settings, [hypothesis.HealthCheck.too_slow]  # the machine may be busy
        common = {"database": None, "deadline": None, "print_blob": True, "suppress_health_check": slow}
        settings.register_profile("same", derandomize=True, **common)
        settings.register_profile("fuzz", derandomize=False, **common)
        settings.load_profile("fuzz" if config.getoption("fuzz") else "same")
        if not config.getoption("fuzz"):
            # Else it takes constants from the sources that are imported, which depends on the tests that are chosen.
            providers.is_local_module_file = lambda path: False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    seconds = config.getoption("fuzz")
    if seconds:
        items[:] = [item for item in items if "hypothesis" in item.keywords]
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        share = seconds / max(math.ceil(len(items) / workers), 1)
        for function in {item.obj for item in items}:
            kept = function._hypothesis_internal_use_settings
            function._hypothesis_internal_use_settings = hypothesis.settings(kept, max_examples=FUZZ_EXAMPLES)
            function.hypothesis.inner_test = for_a_time(function.hypothesis.inner_test, share)


def for_a_time(test, seconds):
    """Ends the property's test when the time is up, but not while hypothesis makes a failing case smaller."""
    cases = 0
    failed = False

    @functools.wraps(test)
    def timed(*args, **kwargs):
        global fuzz_until
        nonlocal cases, failed
        cases += 1
        try:
            test(*args, **kwargs)
        except Exception as error:
            failed = failed or not isinstance(error, HypothesisException)
            raise
        if fuzz_until is None:  # the first case takes long: what is drawn from is set up then
            fuzz_until = time.monotonic() + seconds
        if time.monotonic() > fuzz_until and not failed:
            raise TimeUp(f"no fault found in {cases:,} cases of {test.__name__}")

    return timed


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except TimeUp as end:
        pyfuncitem.user_properties.append(("fuzz", end.msg))
        return True


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, found in report.user_properties:
            if name == "fuzz" and report.when == "call":
                terminalreporter.write_line(found)


def seed():
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def let_children_train():
    """A fake tensor makes a torch built for CUDA believe in a GPU, on a machine without one too. The first backward
    pass would then start threads for it, after which no forked child can train; tests fork to have several ranks."""
    import torch

    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet = lambda: None


def pytest_collectstart(collector):
    """Before a file is imported: some draw numbers then."""
    if isinstance(collector, pytest.Module):
        seed()
        let_children_train()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture: no test depends on what those before it have drawn."""
    global fuzz_until
    fuzz_until = None
    seed()


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Each instruction set of the CPU's kernels that this machine has."""
    from mfp import backend

    levels, built = ["portable", "avx2", "avx512"], backend.build_info()
    if built is None or levels.index(request.param) > levels.index(built["cpu_isa"]):
        pytest.skip("mfp._C is not built" if built is None else f"this machine has no {request.param}")
    monkeypatch.setenv("MFP_CPU_ISA", request.param)


@pytest.fixture(scope="module")
def three_threads():
    """For tests of compiled kernels: the work is shared among threads, whatever the machine and its workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `mfp ...` in this process: exit code, standard output, standard error."""
    from mfp import cli

    monkeypatch.syspath_prepend(Path(__file__).parent)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mfp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run
