"""Networks for the suites. Run: python -m pytest benchmarks/benchmark_*.py -o addopts="" """

import functools

import pytest
import torch

from mfp.bench.jobs import Jobs
from mfp.bench.measure import Contestant
from mfp.train.models import CIFAR_DEPTHS, build_model

NETWORKS = ("resnet20", "resnet56", "resnet18", "resnet50", "vgg16_bn")


@functools.cache
def jobs_of(arch: str) -> Jobs:
    torch.manual_seed(0)
    small = arch in CIFAR_DEPTHS
    return Jobs(build_model(arch, 10 if small else 1000), rate=0.4, image_size=32 if small else 224)


@pytest.fixture(params=NETWORKS)
def jobs(request) -> Jobs:
    """The jobs of `mfp bench` on one network."""
    return jobs_of(request.param)


@pytest.fixture
def measure(benchmark):
    """Checks a contestant's result against the oracle, then times it."""

    def measure(contestant: Contestant) -> None:
        contestant.prepare()
        contestant.check(contestant.run())
        benchmark.pedantic(contestant.run, setup=contestant.prepare, rounds=10, warmup_rounds=1)

    return measure
