"""Files that are damaged, or written by somebody with bad intent: a clear error, and nothing of them is run."""

import json
import random

import pytest
import torch
from compact_cases import masked
from safetensors import safe_open
from safetensors.torch import save_file

import mfp
from mfp import files
from mfp.train.models import CifarResNet

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.mfp"
    torch.manual_seed(0)
    network = masked(CifarResNet(8, width=8), mask_bn=False)
    mfp.save(mfp.compact(network, torch.randn(1, 3, 32, 32)), path)
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
