import json
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from compact_cases import difference, masked
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import mfp
from mfp import atomic, files
from mfp.train.models import CifarResNet

torch.set_num_threads(1)


def small_network(mask_bn=False, **options):
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
        if options:  # packed weights are laid out for the first input that comes
            assert difference(loaded(x), small(x)) < 1e-6
        else:
            assert torch.equal(loaded(x), small(x))
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in small.named_parameters()]
    assert loaded.report == small.report
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

    class Odd(nn.Module):
        def forward(self, x):
            return x

    small = mfp.compact(nn.Sequential(nn.Conv2d(3, 3, 1), Odd()), torch.zeros(1, 3, 4, 4), leaf_modules=(Odd,))
    with pytest.raises(mfp.MfpError, match=r"layer '1' is a test_files\.Odd"):
        mfp.save(small, tmp_path / "x")
    assert os.listdir(tmp_path) == []


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


HOSTILE = {
    "newer version": lambda d, t: d.update(version=2),
    "no version": lambda d, t: d.pop("version"),
    "class that is no identifier": lambda d, t: d.update(name="A:\n import os"),
    "function outside the list": lambda d, t: node_of(d, "call_function").update(target="os.system"),
    "function by attribute path": lambda d, t: node_of(d, "call_function").update(target="torch.hub.load"),
    "getattr of a dunder": lambda d, t: node_of(d, "call_function").update(
        target="getattr", args=[{"node": "x"}, "__class__"], kwargs={}),
    "getattr with a node as name": lambda d, t: node_of(d, "call_function").update(
        target="getattr", args=[{"node": "x"}, {"node": "x"}], kwargs={}),
    "method outside the list": lambda d, t: node_of(d, "call_function").update(op="call_method", target="tofile"),
    "method that is a dunder": lambda d, t: node_of(d, "call_function").update(op="call_method", target="__reduce__"),
    "unknown kind of node": lambda d, t: node_of(d, "call_function").update(op="exec"),
    "node name that is code": lambda d, t: node_of(d, "call_function").update(name="a; import os"),
    "input name that is code": lambda d, t: node_of(d, "placeholder").update(target="x=print(1)"),
    "input with default": lambda d, t: node_of(d, "placeholder").update(args=["1"]),
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
    "alias of nothing": lambda d, t: d.update(aliases={"x.weight": "nothing"}),
    "reference to a later node": lambda d, t: d["nodes"][1].update(args=[{"node": d["nodes"][3]["name"]}]),
    "reference to nothing": lambda d, t: d["nodes"][1].update(args=[{"node": "nothing"}]),
    "unknown kind of argument": lambda d, t: d["nodes"][1].update(args=[{"pickle": "gASVAAAA"}]),
    "argument of two kinds": lambda d, t: d["nodes"][1].update(args=[{"node": "x", "tuple": []}]),
    "deep nesting": lambda d, t: d["nodes"][1].update(args=[nested(400)]),
    "unknown dtype": lambda d, t: d["nodes"][1].update(args=[{"dtype": "object"}]),
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
