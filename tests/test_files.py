"""What mfp.save writes, mfp.load gives back: every kind of network, whole or not at all."""

import copy
import functools
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import NamedTuple

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from compact_cases import masked
from small_networks import NETWORKS
from torch import nn
from zoo_networks import transformers_network

import mfp
from mfp import atomic, graph_json
from mfp.capture import DROPOUTS
from mfp.compact.operators import RULES
from mfp.train.models import CifarResNet

torch.set_num_threads(1)


@functools.cache
def small_network(mask_bn=False, **options):
    """Not to be changed: many tests share it."""
    torch.manual_seed(0)
    return mfp.compact(masked(CifarResNet(8, width=8), mask_bn=mask_bn), torch.randn(1, 3, 32, 32), **options)


@pytest.mark.parametrize("options", [{}, {"fold_bn": True}])
@pytest.mark.parametrize("mask_bn", [True, False])
def test_loaded_network_is_the_saved_one(tmp_path, options, mask_bn):
    small = small_network(mask_bn, **options)
    mfp.save(small, tmp_path / "small.mfp")
    loaded = mfp.load(tmp_path / "small.mfp")
    x = torch.randn(3, 3, 40, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
    assert_equal_networks(loaded, small)
    assert not loaded.training
    loaded.train()
    F.cross_entropy(loaded(x), torch.tensor([0, 1, 2])).backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_loading_needs_no_code_of_the_original_model(tmp_path):
    written = tmp_path / "small.mfp"
    mfp.save(small_network(), written)
    program = f"""
import sys, mfp, torch
small = mfp.load({str(written)!r})
assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
assert "mfp.train.models" not in sys.modules and "torchvision" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_modes_frozen_and_shared_parameters_survive(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.scale = nn.Parameter(torch.rand(3, 1, 1))
            self.register_buffer("shift", torch.rand(1, 3, 1, 1), persistent=False)

        def forward(self, x):
            return self.bn(self.conv(self.conv(x))).mul(self.scale) + self.shift[:, :, 0:1, ...]

    model = Twice()
    model.conv.weight.requires_grad_(False)
    model.bn.eval()
    small = mfp.compact(model, torch.randn(2, 3, 8, 8))
    mfp.save(small, tmp_path / "twice.mfp")
    loaded = mfp.load(tmp_path / "twice.mfp")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    assert loaded.training
    assert not loaded.bn.training
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["conv.weight"]


def test_only_compact_networks_are_saved(tmp_path):
    with pytest.raises(mfp.MfpError, match="result of mfp.compact, not a CifarResNet"):
        mfp.save(CifarResNet(8), tmp_path / "x")

    small = copy.deepcopy(small_network())
    small.bn1 = Odd()
    with pytest.raises(mfp.MfpError, match=r"layer 'bn1' is a test_files\.Odd"):
        mfp.save(small, tmp_path / "x")
    small = copy.deepcopy(small_network())
    node = next(node for node in small.graph.nodes if node.target is torch.ops.aten.relu.default)
    node.target = torch.ops.aten.bernoulli.default
    with pytest.raises(mfp.MfpError, match=rf"operation {node.name} \(aten\.bernoulli\.default\) is not on the list"):
        mfp.save(small, tmp_path / "x")
    node.target, node.args = torch.ops.aten.relu.default, (object(),)
    with pytest.raises(mfp.MfpError, match=f"{node.name} has an argument that is no plain value"):
        mfp.save(small, tmp_path / "x")
    assert os.listdir(tmp_path) == []


class Odd(nn.Module):
    def forward(self, x):
        return x


# ---- networks


def with_same_padding():
    """Convs whose padding follows from the image's size, as timm's networks from TensorFlow have them."""
    layers = timm.layers
    return nn.Sequential(
        layers.Conv2dSame(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        layers.Conv2dSame(8, 8, 5, stride=2), nn.BatchNorm2d(8), nn.Hardswish(), layers.AvgPool2dSame(2, 2),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip


KINDS = {
    **{name: NETWORKS[name] for name in ("mobilenet_v3", "shufflenet", "convnext", "densenet", "lraspp")},
    "same padding": with_same_padding,
    "transformers": lambda: transformers_network("ResNet-basic"),
}


@pytest.mark.parametrize(
    ("name", "fold_bn"), [*((name, False) for name in KINDS), ("mobilenet_v3", True), ("densenet", True)]
)
def test_kinds_of_networks(tmp_path, name, fold_bn):
    size = 64
    small = mfp.compact(masked(KINDS[name](), 0.3), torch.randn(1, 3, size, size), fold_bn=fold_bn)
    mfp.save(small, tmp_path / "small.mfp")
    loaded = mfp.load(tmp_path / "small.mfp")
    assert_equal_networks(loaded, small)
    for shape in [(2, 3, size, size), (3, 3, size + 32, size + (32 if name == "same padding" else 15))]:
        x = torch.randn(shape)
        with torch.no_grad():
            assert_equal_results(loaded(x.clone()), small(x.clone()))


def assert_equal_networks(loaded, small):
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = (list(getattr(network, of)(remove_duplicate=False)) for network in (loaded, small))
        assert [(n, t.dtype, t.requires_grad) for n, t in ours] == [(n, t.dtype, t.requires_grad) for n, t in theirs]
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert [(n, m.training) for n, m in loaded.named_modules()] == [(n, m.training) for n, m in small.named_modules()]
    assert loaded.report == small.report


def assert_equal_results(ours, theirs):
    if isinstance(theirs, dict):  # transformers' ModelOutput is one
        assert type(ours) in (dict, OrderedDict)
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, tuple | list):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal_results(a, b)
    else:
        assert torch.equal(ours, theirs)


def test_nested_results_defaults_and_direct_parameters(tmp_path):
    class Answer(NamedTuple):
        logits: torch.Tensor
        parts: OrderedDict

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.zeta, self.inner.alpha = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, scale=float("inf"), names=("a", None)):
            y = self.conv(x).clamp(max=scale) * self.inner.zeta + self.inner.alpha
            return [Answer(y, OrderedDict(mean=y.mean((2, 3)), odd={names[0]: y.double()})), None, 3]

    small = mfp.compact(Several(), {"x": torch.randn(2, 3, 8, 8), "scale": float("inf"), "names": ("a", None)})
    mfp.save(small, tmp_path / "several.mfp")
    loaded = mfp.load(tmp_path / "several.mfp")
    assert_equal_networks(loaded, small)
    x = torch.randn(1, 3, 9, 7)
    ours, theirs = loaded(x), small(x)
    assert type(ours[0]) is tuple and type(ours[0][1]) is OrderedDict and ours[1:] == [None, 3]
    assert torch.equal(ours[0][0], theirs[0].logits)
    assert_equal_results(ours[0][1], theirs[0].parts)


def test_half_precision_and_devices_in_arguments(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            y = self.conv(x).contiguous(memory_format=torch.channels_last)
            return y + torch.arange(y.shape[-1], device=y.device, dtype=torch.int64).to(y.dtype)

    small = mfp.compact(Positions().to(torch.bfloat16), torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
    mfp.save(small, tmp_path / "positions.mfp")
    loaded = mfp.load(tmp_path / "positions.mfp")
    assert_equal_networks(loaded, small)
    x = torch.randn(3, 3, 6, 9, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), small(x))


# ---- the list of operators


def test_every_operator_with_a_rule_can_be_saved():
    written_as_modules = set(DROPOUTS)
    assert {packet.__name__ for packet in set(RULES) - written_as_modules} <= graph_json.ATEN


def test_listed_operators_write_to_nothing():
    """Neither to their inputs nor to files; the schemas say so, whatever the version of torch."""
    for name in graph_json.ATEN:
        packet = getattr(torch.ops.aten, name)
        found = [graph_json.function_named(f"aten.{name}.{overload}") for overload in packet.overloads()]
        assert any(found), name
        for overload in filter(None, found):
            assert not overload._schema.is_mutable
            kinds = " ".join(str(argument.type) for argument in overload._schema.arguments)
            assert not {"Generator", "Storage", "Stream"} & set(kinds.split()), overload


UNSAFE = """as_strided.default as_strided_copy.default set_.source_Storage set_.default resize_.default resize.default
    from_file.default empty.memory_format empty_strided.default new_empty.default empty_like.default add.out add_.Tensor
    relu.out copy_.default data_ptr.default rand.default bernoulli.default _local_scalar_dense.default item.default
    _unsafe_index.Tensor native_batch_norm.default relu relu.default.default relu.nothing relu._schema relu.__class__
    __class__.default"""


@pytest.mark.parametrize("name", UNSAFE.split())
def test_unsafe_operators_have_no_name(name):
    assert graph_json.function_named(f"aten.{name}") is None
    assert graph_json.function_named(f"prims.{name}") is None


# ---- writing is all or nothing


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "small.mfp"
    small = small_network()
    mfp.save(small, path)
    old = path.read_bytes()
    for call in ("open", "write", "fsync", "replace"):

        def fail(*args, call=call):
            raise OSError(28, f"no space left for {call}")

        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, call, fail)
            with pytest.raises(mfp.MfpError, match=f"cannot write .*no space left for {call}"):
                mfp.save(small, path)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["small.mfp"]


def test_reader_never_sees_a_part(tmp_path):
    path, small = tmp_path / "small.mfp", small_network()
    mfp.save(small, path)
    stop, failures = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                mfp.load(path)
            except mfp.MfpError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        mfp.save(small, path)
    stop.set()
    reader.join()
    assert failures == []
