import copy
import functools
import json
import os
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import NamedTuple

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from compact_cases import masked
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from zoo_networks import transformers_network

import mfp
from mfp import atomic, files, graph_json
from mfp.capture import DROPOUTS
from mfp.compact.operators import RULES
from mfp.train.models import CifarResNet

torch.set_num_threads(1)


@functools.cache
def small_network(mask_bn=False, **options):
    """Not to be changed: many tests share it."""
    torch.manual_seed(0)
    return mfp.compact(masked(CifarResNet(20, width=8), mask_bn=mask_bn), torch.randn(1, 3, 32, 32), **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.mfp"
    mfp.save(small_network(), path)
    return path


def rewritten(path, target, change) -> None:
    """A file with a changed description and a checksum that fits it: what somebody with bad intent would write."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["graph"])
    change(description, tensors)
    text = json.dumps(description)
    metadata = {"format": "mfp", "graph": text, "digest": files._digest(text, tensors)}
    save_file(tensors, target, metadata)


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


def test_loading_needs_no_code_of_the_original_model(written):
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
        mfp.save(CifarResNet(20), tmp_path / "x")

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


def torchvision_network(name, **options):
    return lambda: getattr(torchvision.models, name)(weights=None, **options)


def with_same_padding():
    """Convs whose padding follows from the image's size, as timm's networks from TensorFlow have them."""
    layers = timm.layers
    return nn.Sequential(
        layers.Conv2dSame(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        layers.Conv2dSame(8, 8, 5, stride=2), nn.BatchNorm2d(8), nn.Hardswish(), layers.AvgPool2dSame(2, 2),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip


NETWORKS = {
    "mobilenet": (torchvision_network("mobilenet_v3_small"), 64),
    "shufflenet": (torchvision_network("shufflenet_v2_x0_5"), 64),
    "convnext": (torchvision_network("convnext_tiny"), 64),
    "densenet": (torchvision_network("densenet121"), 64),
    "same padding": (with_same_padding, 64),
    "transformers": (lambda: transformers_network("ResNet-basic"), 64),
}  # fmt: skip


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_kinds_of_networks(tmp_path, name, fold_bn):
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    small = mfp.compact(masked(make(), 0.3), torch.randn(1, 3, size, size), fold_bn=fold_bn)
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


# ---- damaged files


def test_every_kind_of_cut_is_a_clear_error(written, tmp_path):
    contents = written.read_bytes()
    damaged = tmp_path / "cut.mfp"
    header = 8 + int.from_bytes(contents[:8], "little")
    cuts = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(contents) - 1, *range(10, len(contents), 997)}
    for length in sorted(cuts):
        damaged.write_bytes(contents[:length])
        with pytest.raises(files.ModelFileError, match=r"cut\.mfp"):
            mfp.load(damaged)


def test_every_flipped_bit_is_a_clear_error(written, tmp_path):
    contents = written.read_bytes()
    damaged = tmp_path / "flipped.mfp"
    rng = random.Random(0)
    for _ in range(300):
        changed = bytearray(contents)
        changed[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
        damaged.write_bytes(bytes(changed))
        with pytest.raises(files.ModelFileError, match=r"flipped\.mfp"):
            mfp.load(damaged)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(files.ModelFileError, match="cannot be read"):
        mfp.load(tmp_path / "nothing.mfp")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.mfp")
    with pytest.raises(files.ModelFileError, match=r"not one of mfp\.save"):
        mfp.load(tmp_path / "other.mfp")
    torch.save({"a": 1}, tmp_path / "pickle.mfp")
    with pytest.raises(files.ModelFileError, match="cannot be read"):
        mfp.load(tmp_path / "pickle.mfp")


# ---- hostile files: the checksum fits


def node_of(description, op):
    return next(node for node in description["nodes"] if node["op"] == op)


def first_conv(description):
    return next(m for m in description["modules"].values() if m["class"] == "Conv2d")


BUFFER = ["buffer", "conv1.weight", "contiguous_format"]
HOSTILE = {
    "newer version": lambda d, t: d.update(version=3),
    "no version": lambda d, t: d.pop("version"),
    "class that is no identifier": lambda d, t: d.update(name="A:\n import os"),
    "function outside the list": lambda d, t: node_of(d, "call_function").update(target="os.system"),
    "function by attribute path": lambda d, t: node_of(d, "call_function").update(target="torch.hub.load"),
    "operator outside the list": lambda d, t: node_of(d, "call_function").update(target="aten.from_file.default"),
    "operator on memory": lambda d, t: node_of(d, "call_function").update(target="aten.as_strided.default"),
    "operator in place": lambda d, t: node_of(d, "call_function").update(target="aten.add_.Tensor"),
    "operator that writes its result": lambda d, t: node_of(d, "call_function").update(target="aten.relu.out"),
    "operator of another library": lambda d, t: node_of(d, "call_function").update(target="mfp.relu.default"),
    "overload that is an attribute": lambda d, t: node_of(d, "call_function").update(target="aten.relu.__class__"),
    "function that is a list": lambda d, t: node_of(d, "call_function").update(target=["aten.relu.default"]),
    "method": lambda d, t: node_of(d, "call_function").update(op="call_method", target="relu"),
    "method that is a dunder": lambda d, t: node_of(d, "call_function").update(op="call_method", target="__reduce__"),
    "unknown kind of node": lambda d, t: node_of(d, "call_function").update(op="exec"),
    "node name that is code": lambda d, t: node_of(d, "call_function").update(name="a; import os"),
    "input name that is code": lambda d, t: node_of(d, "placeholder").update(target="x=print(1)"),
    "input with two defaults": lambda d, t: node_of(d, "placeholder").update(args=["1", "2"]),
    "input whose default is a node": lambda d, t: d["nodes"].append(
        {"op": "placeholder", "name": "late", "target": "late", "args": [{"node": "x"}], "kwargs": {}}),
    "default before an input without": lambda d, t: (node_of(d, "placeholder").update(args=[1]), d["nodes"].insert(
        1, {"op": "placeholder", "name": "late", "target": "late", "args": [], "kwargs": {}})),
    "keyword that is code": lambda d, t: node_of(d, "call_function").update(kwargs={"a=1, b": 2}),
    "call of a missing module": lambda d, t: node_of(d, "call_module").update(target="nothing"),
    "module name that is code": lambda d, t: d["modules"].update({'a"); print("': first_conv(d)}),
    "module name that is a dunder": lambda d, t: d["modules"].update({"__class__.x": first_conv(d)}),
    "module name that exists": lambda d, t: d["modules"].update({"forward": first_conv(d)}),
    "module class outside the list": lambda d, t: first_conv(d).update({"class": "LazyConv2d"}),
    "module class by path": lambda d, t: first_conv(d).update({"class": "modules.module.Module"}),
    "unknown constructor argument": lambda d, t: first_conv(d)["config"].update(secret=1),
    "constructor argument of a wrong type": lambda d, t: first_conv(d)["config"].update(out_channels="many"),
    "huge layer": lambda d, t: first_conv(d)["config"].update(out_channels=1 << 40),
    "layer beyond 64 bits": lambda d, t: first_conv(d)["config"].update(out_channels=1 << 80),
    "negative layer": lambda d, t: first_conv(d)["config"].update(out_channels=-3),
    "tensor of another shape": lambda d, t: t.update({"conv1.weight": torch.zeros(1, 3, 3, 3)}),
    "missing tensor": lambda d, t: t.pop("conv1.weight"),
    "tensor without layer": lambda d, t: t.update({"conv1.extra": torch.zeros(1)}),
    "tensor name that is a dunder": lambda d, t: t.update({"__dict__": torch.zeros(1)}),
    "tensor name that is code": lambda d, t: t.update({"a b": torch.zeros(1)}),
    "tensor that is stored nowhere": lambda d, t: d["tensors"]["conv1.weight"].__setitem__(1, "nothing"),
    "tensor that is not named": lambda d, t: d["tensors"].pop("conv1.weight"),
    "tensor of an unknown kind": lambda d, t: d["tensors"]["conv1.weight"].__setitem__(0, "code"),
    "tensor in an unknown order": lambda d, t: d["tensors"]["conv1.weight"].__setitem__(2, "strided"),
    "named tensor without layer": lambda d, t: d["tensors"].update({"conv1.extra": BUFFER}),
    "named tensor in no module": lambda d, t: d["tensors"].update({"a.b": BUFFER}),
    "tensor in the place of a method": lambda d, t: (
        d["tensors"].update({"forward": BUFFER}),
        d["nodes"].insert(1, {"op": "get_attr", "name": "a", "target": "forward", "args": [], "kwargs": {}})),
    "attribute that is no tensor": lambda d, t: d["nodes"].insert(
        1, {"op": "get_attr", "name": "a", "target": "conv1", "args": [], "kwargs": {}}),
    "dictionary with a node as key": lambda d, t: d["nodes"][1].update(args=[{"dict": [[{"node": "x"}, 1]]}]),
    "reference to a later node": lambda d, t: d["nodes"][1].update(args=[{"node": d["nodes"][3]["name"]}]),
    "reference to nothing": lambda d, t: d["nodes"][1].update(args=[{"node": "nothing"}]),
    "unknown kind of argument": lambda d, t: d["nodes"][1].update(args=[{"pickle": "gASVAAAA"}]),
    "argument of two kinds": lambda d, t: d["nodes"][1].update(args=[{"node": "x", "tuple": []}]),
    "deep nesting": lambda d, t: d["nodes"][1].update(args=[nested(400)]),
    "unknown dtype": lambda d, t: d["nodes"][1].update(args=[{"constant": "object"}]),
    "another device": lambda d, t: d["nodes"][1].update(args=[{"constant": "cuda:0"}]),
    "nodes are no list": lambda d, t: d.update(nodes=3),
    "no nodes": lambda d, t: d.pop("nodes"),
    "modules are no dict": lambda d, t: d.update(modules=[1]),
    "report that is none": lambda d, t: d.update(report={"layers": [], "danger": 1}),
    "description that is a list": lambda d, t: d.clear(),
    "join of a wrong kind": lambda d, t: d["modules"].update(
        {"conv1": {"class": "ResidualJoin", "config": {}, "training": 0}}
    ),
}  # fmt: skip


def nested(depth):
    value = 1
    for _ in range(depth):
        value = {"nothing": value}
    return value


@pytest.mark.parametrize("rule", HOSTILE)
def test_hostile_description_is_refused(written, tmp_path, rule, capsys):
    rewritten(written, tmp_path / "hostile.mfp", HOSTILE[rule])
    with pytest.raises(files.ModelFileError, match=r"hostile\.mfp"):
        mfp.load(tmp_path / "hostile.mfp")
    assert capsys.readouterr().out == ""


def test_file_of_version_1_says_what_to_do(written, tmp_path):
    rewritten(written, tmp_path / "old.mfp", lambda d, t: d.update(version=1))
    with pytest.raises(
        files.ModelFileError, match="written by mfp 0.1; make it again from the checkpoint with `mfp compact`"
    ):
        mfp.load(tmp_path / "old.mfp")


def test_unchanged_description_still_loads(written, tmp_path):
    """Guards the test above: the way it rewrites files is not what makes them invalid."""
    rewritten(written, tmp_path / "same.mfp", lambda d, t: None)
    mfp.load(tmp_path / "same.mfp")


def mutate(value, rng):
    """One random change somewhere in a JSON value."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        action = rng.random()
        if action < 0.1:
            del value[key]
        elif action < 0.2:
            value[rng.choice(["node", "tuple", "class", "a b", "__class__", key + "_"])] = value.pop(key)
        else:
            value[key] = mutate(value[key], rng)
        return value
    if isinstance(value, list) and value:
        index = rng.randrange(len(value))
        if rng.random() < 0.15:
            value.pop(index)
        else:
            value[index] = mutate(value[index], rng)
        return value
    return rng.choice([None, True, -1, 0, 1, 2, 1 << 40, 1.5, "x", "__class__", "', print(1), '", [], {}, value])


def test_random_changes_load_or_are_refused(written, tmp_path):
    """Structure-aware mutation: any outcome but a loaded network or a ModelFileError is a failure."""
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(300):
        rng = random.Random(seed)
        rewritten(written, tmp_path / "mutated.mfp", lambda d, t, rng=rng: mutate(d, rng))
        try:
            mfp.load(tmp_path / "mutated.mfp")
            outcomes["loaded"] += 1
        except files.ModelFileError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes


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
