"""The installed package: it imports lean, carries its compiled part, and its parts are where they should be.

Runs in the development environment and, from a built wheel, in a second one that has torch and nothing of ours.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys

import torch

import mfp


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_version_is_that_of_the_metadata():
    assert mfp.__version__ == importlib.metadata.version("mfp")


def test_the_compiled_part_is_there_and_runs():
    info = mfp.backend.build_info()
    assert info["torch"] == torch.__version__
    assert mfp.backend.choose(torch.device("cpu")).name == "cpu"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), torch.nn.ReLU(), torch.nn.Conv2d(10, 2, 1))
    mask = mfp.prune_filters_(mfp.FilterPlan.from_model(model), "l2_distance")
    assert mask.kept == {"0": 6}


def test_importing_is_silent_starts_no_cuda_and_loads_no_training_code():
    heavy = run(
        "import warnings; warnings.simplefilter('error'); import sys, mfp, torch\n"
        "print([m for m in ('torchvision', 'sklearn', 'matplotlib', 'triton.language', "
        "'tensorboard') if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert heavy == "[] False"


def test_kernels_are_a_part_of_mfp_alone():
    """A top-level `kernels` would collide with other packages of that name."""
    assert importlib.util.find_spec("mfp.kernels") is not None
    installed = importlib.metadata.packages_distributions()
    assert [name for name, distributions in installed.items() if "mfp" in distributions] == ["mfp"]


def test_the_command_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert [script.value for script in scripts if script.name == "mfp"] == ["mfp.cli:main"]
