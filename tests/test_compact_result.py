"""What compact gives back is an ordinary module: called, trained, copied, compiled and compacted like any other."""

import copy
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from compact_cases import compacted, compare, difference, killed, masked
from small_networks import NETWORKS
from torch import nn

import mfp
from mfp.modules import ConvWithBorder, ExpandChannels, ResidualJoin, SelectChannels

torch.set_num_threads(1)


class Pair(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


@dataclass
class Features:
    """As transformers' outputs are: some fields may be None."""

    last: torch.Tensor
    pooled: torch.Tensor | None = None
    hidden: tuple | None = None


torch.export.register_dataclass(Features)
FORMS = {
    "tensor": lambda a, b: b,
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, [b, a]],
    "dict": lambda a, b: {"b": b, "a": a, "parts": (b, a)},
    "ordered": lambda a, b: OrderedDict([("out", a), ("aux", b)]),
    "named tuple": lambda a, b: Pair(a, b),
    "dataclass": lambda a, b: Features(last=a, hidden=(a, b)),
    "nested": lambda a, b: OrderedDict(first=Pair(a, b), second=[Features(b), {"a": a}]),
}


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.a, self.b = killed(nn.Conv2d(3, 6, 1), 1, 4), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        a = self.a(x)
        return self.form(a, self.b(a.relu()))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_keep_their_form(form):
    small = compacted(Net(FORMS[form]), 3, 5, 5)
    assert small.b.in_channels == 4
    result = small(torch.zeros(2, 3, 5, 5).double())
    if form == "dataclass":
        assert type(result) is Features and result.pooled is None and type(result.hidden) is tuple


def test_positional_named_and_nested_arguments():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = killed(nn.Conv2d(3, 6, 1), 1, 4), nn.Conv2d(6, 4, 1)

        def forward(self, left, others=None, *, gain=1.0, flag=False):
            a = self.a(left)
            if others is not None:
                a = a + others["add"][0] * others["add"][1]
            return {"features": a, "parts": [self.b(-a if flag else a) * gain, a.mean((2, 3))]}

    torch.manual_seed(0)
    model, x = Many().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    others = {"add": [torch.randn(2, 6, 5, 5, dtype=torch.float64), torch.randn(2, 1, 5, 5, dtype=torch.float64)]}
    small = mfp.compact(model, {"left": x[:1]})
    assert difference(model(x), small(x)) < 1e-12
    assert difference(model(x), small(left=x)) < 1e-12
    assert small.a.out_channels == 4
    for example in ((x, others), {"others": others, "left": x}):
        small = mfp.compact(model, example)
        assert difference(model(x, others), small(x, others)) < 1e-12
        assert difference(model(x, others), small(others=others, left=x)) < 1e-12
    small = mfp.compact(model, {"left": x, "gain": 3.0, "flag": True})
    assert difference(model(x, gain=3.0, flag=True), small(x)) < 1e-12
    gain = torch.tensor(2.0, dtype=torch.float64)
    small = mfp.compact(model, {"left": x, "gain": gain})
    assert difference(model(x, gain=5 * gain), small(x, gain=5 * gain)) < 1e-12


def test_the_modules_are_torchs_under_their_old_names():
    class Block(nn.Sequential):
        def forward(self, x):
            return F.relu(x + super().forward(x))

    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(
        stem=nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        block=Block(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1)),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 5)),
    ))  # fmt: skip
    model = masked(model, mask_bn=False)
    small = mfp.compact(model, torch.randn(1, 3, 9, 9))
    own = (SelectChannels, ExpandChannels, ResidualJoin, ConvWithBorder)
    names = dict(model.named_modules())
    for name, module in small.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.Dropout):
            assert type(names[name.removesuffix(".conv")]) is type(module)
        else:
            assert isinstance(module, own) or type(module) is nn.Module or module is small, name
    kept = {name for name, module in names.items() if isinstance(module, nn.Linear | nn.BatchNorm2d | nn.Dropout)}
    assert kept <= {name for name, _ in small.named_modules()}
    called = [node for node in small.graph.nodes if node.op == "call_function"]
    assert all(isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten" for node in called)


@pytest.mark.parametrize("fold_bn", [False, True])
def test_under_inference_mode_it_is_the_same(fold_bn):
    torch.manual_seed(0)
    model = masked(NETWORKS["resnet"](), mask_bn=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        small = mfp.compact(model, x, fold_bn=fold_bn)  # x is an inference tensor itself
        images = torch.randn(2, 3, 64, 64)
        inside = mfp.compact(model, images, fold_bn=fold_bn)
        assert difference(model(images), inside(images)) < 1e-5
    assert small.report.flops_saved > 0.4
    assert small.report.flops_saved == inside.report.flops_saved
    for network in (small, inside):
        network.train()(x).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore:mfp.compact removed nothing")
@pytest.mark.parametrize("name", ["resnet", "shufflenet", "mobilenet_v3", "regnet_x"])
def test_idempotent(name):
    torch.manual_seed(0)
    model = masked(NETWORKS[name](), mask_bn=False).double()
    small = mfp.compact(model, torch.randn(1, 3, 64, 64).double())
    again = mfp.compact(small, torch.randn(1, 3, 64, 64).double())
    compare(model, again, 3, 64, 96)
    assert again.report.flops_before == small.report.flops_after
    if name == "regnet_x":  # filters that filled up a group are dead a second time
        assert again.report.flops_after <= small.report.flops_after
    else:
        assert again.report.flops_after == small.report.flops_after


def test_copied_saved_compiled_exported_masked_again(tmp_path):
    torch.manual_seed(0)
    model = masked(NETWORKS["resnet"](), mask_bn=False).double()  # border maps too
    small, x = mfp.compact(model, torch.randn(1, 3, 64, 64).double()), torch.randn(3, 3, 64, 48).double()
    expected = model(x).detach()
    copied = copy.deepcopy(small)
    for value in copied.state_dict().values():
        value.zero_()
    assert difference(expected, small(x).detach()) < 1e-12, "a copy shares memory"
    missing = copied.load_state_dict(small.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for network in (copied, loaded, compiled, program):
        with torch.no_grad():
            assert difference(expected, network(x)) < 1e-12
            assert difference(model(x[:2]), network(x[:2])) < 1e-12
    smaller = mfp.compact(masked(copied.float(), seed=1).double(), x)
    compare(copied, smaller, 3, 64, 64)
    assert smaller.report.flops_after < 0.75 * smaller.report.flops_before


@pytest.mark.parametrize(
    ("name", "mask_bn"), [("resnet", True), *((name, False) for name in ("mobilenet_v3", "densenet", "convnext"))]
)
def test_compact_network_trains_and_every_parameter_moves(name, mask_bn):
    torch.manual_seed(0)
    model = masked(NETWORKS[name](), mask_bn=mask_bn)
    model.train().double()
    small = mfp.compact(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert small.training
    before = {key: parameter.detach().clone() for key, parameter in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, weight_decay=1e-4)
    F.cross_entropy(small(torch.randn(4, 3, 64, 64, dtype=torch.float64)), torch.arange(4)).backward()
    optimizer.step()
    for key, parameter in small.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
        assert (parameter != before[key]).any(), key


def test_model_is_left_alone():
    model = masked(NETWORKS["mobilenet_v3"](), mask_bn=False).train()
    model.features[2].eval()
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = mfp.compact(model, torch.randn(2, 3, 64, 64))
    for (name, a), b in zip(model.named_modules(), before.modules(), strict=True):
        assert a.training == b.training, name
        assert vars(a).keys() == vars(b).keys(), name
        assert getattr(a, "inplace", None) == getattr(b, "inplace", None), name
    for key, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[key]), key
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in small.parameters()}
    assert not small.features.get_submodule("2").get_submodule("block.0.1").training


def test_a_network_that_overwrites_its_input_leaves_the_example_alone():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = killed(nn.Conv2d(3, 4, 1), 1), killed(nn.Conv2d(3, 4, 1), 1)

        def forward(self, x):
            y = self.first(x)
            return F.conv2d(y + self.second(torch.relu_(x)), torch.ones(2, 4, 1, 1))

    torch.manual_seed(0)
    model, x = Overwrites().eval(), torch.randn(1, 3, 5, 5)
    before = x.clone()
    for fold_bn in (False, True):
        small = mfp.compact(model, x, fold_bn=fold_bn)
        assert torch.equal(x, before)
        with torch.no_grad():
            assert difference(model(x.clone()), small(x)) < 1e-6
        assert torch.equal(x, before), "the compact network is functional"
