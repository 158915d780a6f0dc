"""Compact networks leave for other runtimes: ONNX, torch.export and torch.compile give the same outputs."""

import copy
import functools
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from compact_cases import difference, killed, masked
from small_networks import NETWORKS
from torch import nn

import mfp
from mfp.export import prepare
from mfp.export.engines import measure, run_file, verify
from mfp.modules import ExpandChannels, ResidualJoin
from mfp.train.models import CifarResNet


class Residual(nn.Module):
    """Two joins by index, a widened stream, a border map (with mask_bn=False) and a shuffle of channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1))
            for _ in range(2)
        )
        self.shuffle = nn.ChannelShuffle(4)
        self.last = nn.Conv2d(16, 20, 3, padding=1, groups=4)
        self.fc = nn.Linear(20, 7)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.fc(self.last(self.shuffle(x)).mean((2, 3)))


@functools.cache
def small_network(mask_bn, fold_bn):
    """A compact network and the masked one it is of; not to be changed, many tests share them."""
    torch.manual_seed(0)
    model = masked(Residual(), mask_bn=mask_bn)
    return mfp.compact(model, torch.zeros(1, 3, 12, 12), fold_bn=fold_bn).eval(), model.eval()


@pytest.fixture(params=[(True, False), (True, True), (False, False), (False, True)], ids=str)
def networks(request):
    return small_network(*request.param)


def other_batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 12, 12, generator=generator) for n in (1, 2, 5)]


def check_onnx(small, model, images, path):
    onnx = pytest.importorskip("onnx")
    report = mfp.export(small, path)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""}, "operators that other runtimes do not have"
    for batch in images:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            assert difference(torch.from_numpy(session.run(None, {"x": batch.numpy()})[0]), model(batch)) < 1e-5
    return report, Counter(node.op_type for node in written.graph.node)


def test_onnx(networks, tmp_path, request):
    report, operators = check_onnx(*networks, other_batches(), tmp_path / "small.onnx")
    assert report.files == [tmp_path / "small.onnx"] and report.free_batch and report.difference < 1e-5
    assert "any batch x 3 x 12 x 12" in str(report)
    assert operators["Add"] >= 2 and report.flops_exported > report.flops_compact
    assert "BatchNormalization" not in operators
    assert not any("Scatter" in name for name in operators), "joins by index"
    if request.node.callspec.params["networks"] != (False, True):  # a serving form with border maps
        assert not report.left


@pytest.mark.parametrize("name", ["mobilenet_v3", "shufflenet"])
def test_onnx_of_known_networks(name, tmp_path):
    torch.manual_seed(0)
    model = masked(NETWORKS[name]())
    images = [torch.randn(n, 3, 64, 64) for n in (1, 3)]
    check_onnx(mfp.compact(model, images[0]), model, images, tmp_path / "small.onnx")


@pytest.mark.parametrize("form", ["compact", "serving form with border maps", "masked"])
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_other_formats(form, engine, tmp_path):
    """There, and back in the engine; what test_onnx asks of all four compact networks is not asked again."""
    if engine == "openvino":
        pytest.importorskip("openvino")
    small, model = small_network(*((True, False) if form == "compact" else (False, True)))
    file = tmp_path / ("small.pt2" if engine == "torch" else "small.xml")
    report = mfp.export(*(model, file, torch.zeros(1, 3, 12, 12)) if form == "masked" else (small, file))
    assert sorted(report.files) == sorted(tmp_path.iterdir())
    found = verify(file, model, {"x": torch.randn(2, 3, 12, 12)}, engine)
    assert list(found) == [1, 3] and max(found.values()) < 1e-5


def test_measured_in_turns(tmp_path):
    small, _ = small_network(True, False)
    mfp.export(small, tmp_path / "small.onnx")
    calls = []
    contestants = {"a": ("onnxruntime", tmp_path / "small.onnx"), "b": ("onnxruntime", tmp_path / "small.onnx")}
    inputs = {"x": np.zeros((1, 3, 12, 12), np.float32)}
    times = measure(contestants, inputs, (1, 2), rounds=2, seconds=0.01, advance=lambda: calls.append(0))
    assert list(times) == ["a", "b"] and all(set(found) == {1, 2} for found in times.values()) and len(calls) == 4
    assert all(time > 0 for found in times.values() for time in found.values())


class Gated(nn.Module):
    """Squeeze-excite, SiLU, layer scale, channels last, a stream that begins with a pruned stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.narrow, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.branch = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 16, 1))
        self.scale = nn.Parameter(torch.rand(16, 1, 1))
        self.last, self.mix = nn.Linear(16, 16), nn.Conv2d(16, 5, 3)

    def forward(self, x):
        x = F.max_pool2d(self.bn(self.stem(x)).relu(), 2)
        x = x + self.scale * self.branch(x)
        x = x * self.wide(F.silu(self.narrow(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = x + self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.mix(F.hardswish(x)).flatten(1)


@pytest.mark.parametrize("mask_bn", [True, False])
def test_widened_networks_compute_the_same(mask_bn):
    torch.manual_seed(0)
    model = masked(Gated(), 0.4, mask_bn, skip=(), layer_rates={"mix": 0.0}).double()
    for layer in (model.branch[2], model.last, model.wide):
        killed(layer, *torch.randperm(16)[:6].tolist())
    small = mfp.compact(model, torch.zeros(1, 3, 12, 12).double())
    network, _, report = prepare(small)
    assert any(isinstance(module, ResidualJoin | ExpandChannels) for module in small.modules())
    x = torch.randn(3, 3, 12, 12).double()
    with torch.no_grad():
        assert difference(network(x), model(x)) < 1e-9
        assert difference(small(x), model(x)) < 1e-12, "the network that was exported is left as it is"
    assert not any(isinstance(module, ResidualJoin | ExpandChannels) for module in network.modules())
    assert not report.left or not mask_bn
    assert all(after > before for before, after in report.grown.values())


def widths(network):
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return {conv.out_channels for conv in convs} | {conv.in_channels for conv in convs if conv.in_channels != 3}


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v3"])
def test_odd_numbers_of_channels_are_filled_up(name):
    """Streams, depthwise convs, gates, and a classifier behind a flattened image of one pixel."""
    torch.manual_seed(0)
    model = masked(NETWORKS[name](), 0.4).double()
    example = torch.randn(2, 3, 64, 64).double()
    before = mfp.compact(model, example)
    network, _, report = prepare(before)
    assert (
        any(width % 8 for width in widths(before)) and report.filled and "filled up to a multiple of 8" in str(report)
    )
    assert {width % 8 for width in widths(network)} == {0}
    with torch.no_grad():
        assert difference(network(example), model(example)) < 1e-9


def test_readers_of_all_channels_are_not_filled():
    """Concatenation, softmax over channels, groups, the same layer called twice, and a stream that is given back."""

    class Readers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 12, 1) for _ in range(5))
            self.grouped, self.twice, self.mix = (
                nn.Conv2d(12, 12, 1, groups=2),
                nn.Conv2d(12, 12, 1),
                nn.Conv2d(48, 5, 1),
            )

        def forward(self, x):
            d = self.d(x)
            twice = self.twice(self.twice(self.c(x)))
            return self.mix(torch.cat([self.a(x), self.b(x).softmax(1), twice, self.grouped(d)], 1)), d + self.e(x)

    torch.manual_seed(0)
    network, _, report = prepare(Readers(), torch.randn(1, 3, 4, 4))
    assert widths(network) == {12, 48, 5} and not report.filled


def test_what_cannot_grow_is_said(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), killed(nn.Conv2d(3, 6, 1), 1, 4)
            self.first, self.second = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1, groups=2)

        def forward(self, x):
            branch = self.b(x)  # read by a grouped conv too, which cannot be given more inputs
            return self.first(self.a(x) + branch) + self.second(branch)

    torch.manual_seed(0)
    small = mfp.compact(Shared(), torch.zeros(1, 3, 4, 4))
    report = mfp.export(small, tmp_path / "small.pt2")
    assert len(report.left) == 1 and "the engine puts zeros between the channels when it runs (1 such" in str(report)
    x = torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        assert difference(torch.export.load(tmp_path / "small.pt2").module()(x), small(x)) < 1e-6


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    small, model = small_network(True, False)
    with pytest.raises(mfp.MfpError, match="small.tflite: the ending says the format, one of .onnx, .xml, .pt2"):
        mfp.export(small, tmp_path / "small.tflite")
    with pytest.raises(mfp.MfpError, match="give mfp.export an example input: this Residual does not say"):
        mfp.export(model, tmp_path / "small.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(mfp.MfpError, match="cannot write .*nothing older was touched"):
        mfp.export(small, tmp_path / "file" / "small.pt2")
    with pytest.raises(mfp.MfpError, match="engine must be one of onnxruntime, openvino, .* not 'tvm'"):
        run_file("tvm", tmp_path / "small.pt2", {})
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(mfp.MfpError, match=r"onnxruntime cannot run .*broken\.onnx: "):
        run_file("onnxruntime", tmp_path / "broken.onnx", {"x": np.zeros((1, 3, 12, 12), np.float32)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(mfp.MfpError, match=r"openvino is not installed; it comes with: pip install 'mfp\[openvino\]'"):
        mfp.export(small, tmp_path / "small.xml")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "broken.onnx"}


@pytest.mark.parametrize("ending", ["onnx", "xml"])
def test_an_operator_that_a_format_lacks_is_named(tmp_path, ending):
    if ending == "xml":
        pytest.importorskip("openvino")

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = killed(nn.Conv2d(3, 4, 1), 1)

        def forward(self, x):
            return torch.special.modified_bessel_k0(self.conv(x).abs() + 1)

    small = mfp.compact(Odd(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(mfp.MfpError, match=r"cannot be expressed in .*modified_bessel_k0.*\(behind conv\)") as raised:
        mfp.export(small, tmp_path / f"small.{ending}")
    assert len(str(raised.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_torch_export(networks):
    """The program has torch's own operators only, and takes other batch sizes."""
    small, model = networks
    batches = other_batches()
    program = torch.export.export(small, (batches[1],), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    namespaces = {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert "aten" in namespaces and not namespaces & {"mfp", "mkldnn"}
    with torch.no_grad():
        for batch in batches:
            assert difference(program.module()(batch), model(batch)) < 1e-5


@pytest.mark.parametrize("fold_bn", [False, True])
def test_torch_compile(fold_bn):
    small, model = small_network(False, fold_bn)
    batch = other_batches()[1]
    compiled = torch.compile(small, fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(batch), model(batch)) < 1e-5


def test_training_through_torch_compile():
    small = copy.deepcopy(small_network(False, False)[0]).train()
    batch = other_batches()[2]
    torch.compile(small, fullgraph=True, backend="aot_eager")(batch).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in small.named_parameters()}
    small.zero_grad()
    small(batch).square().sum().backward()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert parameter.grad.any(), name


def test_a_padded_shortcut_needs_no_join(tmp_path):
    """A CIFAR ResNet's shortcuts have no weights: their channels lie in the middle of the wider stream."""
    torch.manual_seed(0)
    model = masked(CifarResNet(8), 0.3)
    for network in (model, masked(CifarResNet(8), 0.0)):
        report = mfp.export(network, tmp_path / "small.pt2", torch.zeros(1, 3, 32, 32))
        assert len(report.left) >= 2
        program = torch.export.load(tmp_path / "small.pt2")
        names = {str(node.target) for node in program.graph.nodes}
        assert not any("index_add" in name or "index_copy" in name for name in names)
        x = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            assert difference(program.module()(x), network(x)) < 1e-5
