"""A model and an example in, a functional graph out."""

import contextlib
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from compact_cases import difference, killed
from small_networks import NETWORKS
from torch import fx, nn

import mfp
from mfp.capture import capture, example_arguments
from mfp.errors import CaptureError, MfpError

torch.set_num_threads(1)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.sum() > 0:
            return self.conv(x)
        return x


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image, mask=None, *, scale=2.0, double=False):
        out = self.dropout(self.conv(image)) * scale
        if mask is not None:
            out = out * mask
        return out + out if double else out


def captured(model, example):
    return capture(model, example_arguments(model, example))


def runnable(found) -> fx.GraphModule:
    """The captured graph as a module, to compare with the model."""
    root = nn.Module()
    for name, tensor in found.tensors.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_buffer(last, tensor)
    return fx.GraphModule(root, found.graph)


def test_arguments_that_are_not_given_keep_their_defaults():
    model = Optional()
    image, mask = torch.randn(2, 3, 6, 6), torch.rand(2, 1, 4, 4)
    examples = (image, (image,), (image, mask), {"mask": mask, "image": image}, {"image": image, "scale": 3.0})
    for example in examples:
        arguments = example_arguments(model, example)
        graph = runnable(capture(model, arguments))
        assert [node.name for node in graph.graph.nodes if node.op == "placeholder"] == list(arguments)
        assert model.training
        torch.testing.assert_close(graph(**arguments), model.eval()(**arguments))
        model.train()


def test_names_of_parameters_and_modules():
    model = NETWORKS["resnet"]()
    found = captured(model, torch.zeros(1, 3, 64, 64))
    owned = dict(model.named_parameters()) | dict(model.named_buffers())
    read = [node.target for node in found.graph.nodes if node.op == "get_attr"]
    assert set(read) == set(found.tensors) == {name for name in owned if "num_batches" not in name}
    assert all(found.tensors[name] is owned[name] for name in read)
    convs = [node for node in found.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert [node.meta["module"] for node in convs] == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    targets = [node.target for node in found.graph.nodes if node.op == "call_function"]
    assert all(target._schema.is_mutable is False for target in targets if hasattr(target, "_schema"))
    assert found.fixed == []


def test_capturing_leaves_the_model_alone():
    model = NETWORKS["mobilenet_v2"]()
    model.features[3].eval()
    before = [module.training for module in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    requires = [parameter.requires_grad for parameter in model.parameters()]
    captured(model, torch.zeros(1, 3, 64, 64))
    assert [module.training for module in model.modules()] == before
    assert not all(before) and any(before)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == requires


def test_refusal_names_the_line_and_the_way_on(capfd):
    with pytest.raises(CaptureError, match=r"Branching: .*test_capture\.py:\d+ \(`if x\.sum\(\) > 0:`\).*submodule="):
        captured(Branching(), torch.zeros(1, 3, 5, 5))
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ \(`if x\.sum\(\) > 0:`\)"):
        captured(nn.Sequential(nn.Conv2d(3, 3, 1), Branching()), torch.zeros(1, 3, 5, 5))
    assert capfd.readouterr() == ("", "")


DECISIONS = [lambda x: x * int(x.max()), lambda x: x[: int(x.sum())] * 2, lambda x: x * (x.sum().item() // 2)]


@pytest.mark.parametrize("function", DECISIONS)
def test_values_that_become_numbers_are_captured_or_refused(function):
    model, x = Sizes(function).eval(), torch.randn(2, 3, 6, 6)
    error = None
    try:
        found = captured(model, x)
    except CaptureError as failure:
        error = failure
    if error is None:
        x = torch.rand(2, 3, 6, 6) + 1
        torch.testing.assert_close(runnable(found)(x), model(x))
    else:
        assert "test_capture.py" in str(error)


def test_example_that_does_not_fit_is_refused():
    with pytest.raises(MfpError, match="no argument.*picture"):
        example_arguments(Optional(), {"picture": 1})
    with pytest.raises(MfpError, match="the example gives 5"):
        example_arguments(Optional(), (1, 2, 3, 4, 5))
    with pytest.raises(MfpError, match="'image'"):
        example_arguments(Optional(), {"mask": torch.ones(1)})
    with pytest.raises(MfpError, match=r"does not run on the example input.*\(1, 4, 8, 8\)"):
        mfp.compact(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 4, 8, 8))


# ---- sizes


class Sizes(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


FREE = [
    lambda x: x.view(x.size(0), -1).mean(1), lambda x: x.view(x.shape[0], 4, -1).sum(2), lambda x: x.flatten(1).sum(1),
    lambda x: F.interpolate(x, (x.shape[-2] * 2, x.shape[-1] // 2)), lambda x: x.view(-1, 4, *x.shape[2:]),
    lambda x: F.adaptive_avg_pool2d(x, 2), lambda x: x / x.shape[-1] + x.size(0),
    lambda x: x.new_ones(x.size(0), 1, 1, 1) * x,
]  # fmt: skip


@pytest.mark.parametrize("function", FREE)
def test_one_image_gives_a_network_for_any_batch_and_size(function):
    model = Sizes(function).eval()
    found = captured(model, torch.randn(1, 3, 12, 12))
    assert found.fixed == []
    graph = runnable(found)
    for shape in ((1, 3, 12, 12), (5, 3, 12, 12), (2, 3, 20, 14)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x))


def test_a_fixed_batch_is_said():
    def function(x):
        first, second = x  # len(x) is 2
        return first + second

    found = captured(Sizes(function), torch.randn(2, 3, 8, 8))
    assert found.fixed[0].startswith("batch size: is 2,")
    assert runnable(found)(torch.randn(2, 3, 8, 8)).shape == (4, 8, 8)
    small = mfp.compact(Sizes(lambda x: sum(x[i] for i in range(len(x)))), torch.randn(3, 3, 8, 8), fold_bn=True)
    assert any(line.startswith("batch size: is 3,") for line in small.report.kept_because)

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.token = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(1, 4))

        def forward(self, x):
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            return torch.cat([self.token.expand(len(tokens), 1, -1), tokens], 1)  # len() makes a number of the size

    with pytest.warns(UserWarning, match="removed nothing"):
        small = mfp.compact(Token(), torch.randn(1, 3, 8, 8))
    assert any(line.startswith("batch size: is 1,") for line in small.report.kept_because)
    with pytest.raises(ValueError, match="whose size in dimension 0 is 1, not 2"):
        small(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("function", "said"), [
    (lambda x: F.linear(x.flatten(1), torch.ones(3, 4 * 64)), r"image sizes: 4\*(height\*width|width\*height) = 256"),
    (lambda x: x + torch.ones(1, 1, 8, 8), "size of dimension 2 .* is 8,.*size of dimension 3 .* is 8,"),
    (lambda x: x + torch.ones(1, 1, 1, 8), "size of dimension 3 of the input: is 8,"),
    (lambda x: x + x.transpose(2, 3), "size of dimension 3 of the input: equal to dimension 2"),
])  # fmt: skip
def test_a_fixed_image_size_is_said(function, said):
    model = Sizes(function).eval()
    found = captured(model, torch.randn(1, 3, 8, 8))
    assert re.fullmatch(f"{said}.*", " ".join(found.fixed))
    x = torch.randn(3, 3, 8, 8)  # any batch, all the same
    with torch.no_grad():
        torch.testing.assert_close(runnable(found)(x), model(x))


def test_an_image_size_that_export_cannot_leave_free():
    """A decision on sizes: the branch of the example is taken, and the batch stays free."""

    def function(x):
        return x * 2 if x.shape[-1] > 10 else x

    model = Sizes(function).eval()
    found = captured(model, torch.randn(1, 3, 12, 12))
    for x in (torch.randn(4, 3, 12, 12), torch.randn(1, 3, 12, 12)):
        with torch.no_grad():
            torch.testing.assert_close(runnable(found)(x), model(x))


# ---- in place

IN_PLACE = [
    lambda x: F.relu_(x) + x,
    lambda x: x.mul_(2).add_(x.mean()),
    lambda x: (x[:, :2].add_(1), x)[1],
    lambda x: (x[:, 0].fill_(3), x.view(x.shape[0], -1).mul_(2), x)[2],
    lambda x: (y := x[:, :2], x.add_(1), y * 1)[2],
    lambda x: (y := x.clone(), x.zero_(), y + x)[2],
    lambda x: (y := x.transpose(1, 2), y[..., 0].copy_(y[..., 1]), x)[2],
    lambda x: (parts := x.chunk(2, 1), parts[0].sub_(parts[1]), x)[2],
    lambda x: (y := torch.zeros_like(x), y.copy_(x), y[:, :, 1:].add_(x[:, :, :-1]), y)[3],
    lambda x: (x.masked_fill_(x < 0, 0.5), x)[1],
    lambda x: torch.clamp_(x.flatten(1), 0, 1) + x.flatten(1),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(IN_PLACE)))
def test_writes_become_functional(number):
    torch.manual_seed(0)
    model = Sizes(IN_PLACE[number]).eval()
    x = torch.randn(2, 3, 6, 6)
    before = x.clone()
    found = captured(model, x)
    targets = [node.target for node in found.graph.nodes if hasattr(node.target, "_schema")]
    assert not any(target._schema.is_mutable for target in targets)
    assert torch.equal(x, before)
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        assert difference(model(x.clone()), runnable(found)(x)) < 1e-6


def test_a_buffer_that_forward_writes_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.conv(x) * self.calls

    model = Counts()
    with pytest.raises(MfpError, match="writes its buffer 'calls' in eval mode"):
        captured(model, torch.zeros(1, 3, 4, 4))
    assert model.calls == 0


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    x = torch.randn(1, 3, 6, 6)
    for function in (mfp.compact, lambda model, x: mfp.FilterPlan.from_model(model, 0.4, example_input=x)):
        with pytest.raises(MfpError, match=r"0\.weight was made inside torch\.inference_mode\(\).*outside"):
            function(model, x)


def test_an_output_that_cannot_be_built_is_refused():
    class Mine:
        def __init__(self, x):
            self.x = x

    torch.utils._pytree.register_pytree_node(Mine, lambda m: ([m.x], None), lambda leaves, _: Mine(*leaves))
    with pytest.raises(MfpError, match="returns a Mine"):
        captured(Sizes(Mine), torch.zeros(1, 3, 4, 4))


def test_capture_is_silent(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured(Sizes(lambda x: x + torch.ones(1, 1, 8, 8)), torch.randn(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")


def test_blocks_without_gradients_and_without_autocast():
    class Blocks(nn.Module):
        def __init__(self, enabled):
            super().__init__()
            self.first, self.second, self.enabled = killed(nn.Conv2d(3, 6, 1), 1, 4), nn.Conv2d(6, 4, 1), enabled

        def forward(self, x):
            x = self.first(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                x = F.relu(x.float())
                y = x.relu_() + 1 if self.enabled else x + x
            with torch.no_grad():
                z = y * 2
            return self.second(y + z)

    torch.manual_seed(0)
    model, x = Blocks(False), torch.randn(3, 3, 5, 5)
    small = mfp.compact(model, x[:1])
    assert small.second.in_channels == 4
    assert difference(model(x).detach(), small(x).detach()) < 1e-6
    with pytest.raises(MfpError, match="switches torch.autocast on"):
        mfp.compact(Blocks(True), x)


class Activations(nn.Module):
    """BatchNorm and activations, in place and not, on tensors that are contiguous, permuted, sliced and expanded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.bn(self.conv(x))
        for function in (F.relu, F.silu, F.hardswish, F.hardsigmoid, F.gelu):
            x = function(x.permute(0, 1, 3, 2)).permute(0, 1, 3, 2) + function(
                x[:, :, :1].expand(-1, -1, x.shape[2], -1)
            )
        for function in (F.relu, F.silu, F.hardswish, F.hardsigmoid):
            x = function(x + 1, inplace=True)
        return self.bn(x[:, :, ::2].permute(0, 1, 3, 2)).flatten(2)


@pytest.mark.parametrize(
    ("dtype", "memory_format"), [(torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format)]
)
def test_shapes_that_are_looked_up_are_those_that_torch_derives(dtype, memory_format, monkeypatch):
    model = Activations().to(dtype).to(memory_format=memory_format)
    example = torch.randn(2, 3, 12, 14).to(dtype).contiguous(memory_format=memory_format)

    def results():
        nodes = captured(model, example).graph.nodes
        return [(n.name, str(n.target), str(v := n.meta.get("val")), str(getattr(v, "stride", str)())) for n in nodes]

    quick, asked = results(), []
    monkeypatch.setattr("mfp.capture.fast_shapes", lambda: asked.append(1) or contextlib.nullcontext())
    assert quick == results() and asked
