"""Compact networks leave for other runtimes: ONNX, torch.export and torch.compile give the same outputs."""

import numpy as np
import pytest
import torch
import torchvision
from compact_cases import difference, masked
from torch import nn

import mfp
from mfp.train.load import write_onnx


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


def small_network(mask_bn, fold_bn):
    torch.manual_seed(0)
    model = masked(Residual(), mask_bn=mask_bn)
    return mfp.compact(model, torch.zeros(1, 3, 12, 12), fold_bn=fold_bn).eval(), model


@pytest.fixture(params=[(True, False), (True, True), (False, False), (False, True)], ids=str)
def networks(request):
    return small_network(*request.param)


def other_batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 12, 12, generator=generator) for n in (1, 2, 5)]


def run_onnx(path, images):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))


def check_onnx(small, model, images, path):
    onnx = pytest.importorskip("onnx")
    write_onnx(small, images[0], path)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""}, "operators that other runtimes do not have"
    for batch in images:
        with torch.no_grad():
            assert difference(run_onnx(path, batch), model(batch)) < 1e-5


def test_onnx(networks, tmp_path):
    check_onnx(*networks, other_batches(), tmp_path / "small.onnx")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_onnx_of_known_networks(name, tmp_path):
    torch.manual_seed(0)
    model = masked(torchvision.models.get_model(name, num_classes=10))
    images = [torch.randn(n, 3, 64, 64) for n in (1, 3)]
    check_onnx(mfp.compact(model, images[0], fold_bn=True), model, images, tmp_path / "small.onnx")


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
    small, model = small_network(mask_bn=False, fold_bn=fold_bn)
    batch = other_batches()[1]
    compiled = torch.compile(small, fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(batch), model(batch)) < 1e-5


def test_training_through_torch_compile():
    small, _ = small_network(mask_bn=False, fold_bn=False)
    small.train()
    batch = other_batches()[2]
    torch.compile(small, fullgraph=True, backend="aot_eager")(batch).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in small.named_parameters()}
    small.zero_grad()
    small(batch).square().sum().backward()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
        assert parameter.grad.any(), name
