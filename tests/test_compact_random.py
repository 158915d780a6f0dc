"""Random modules through export: branches, adds, cats, groups, shuffles, shared modules, convs with computed weights,
writes into views, dead filters and constants."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compact_cases import randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mfp

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:mfp.compact removed nothing")
WIDTHS = (4, 6, 8, 12)


class StandardisedConv(nn.Conv2d):
    """Its weight is computed from its parameter."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) * (variance + 1e-5).rsqrt(), self.bias, groups=self.groups)


class SameConv(nn.Conv2d):
    """Pads its input itself, by its size."""

    def forward(self, x):
        missing = self.kernel_size[0] - 1
        x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


class RandomNetwork(nn.Module):
    """A list of steps over numbered values; each step reads earlier values and appends one."""

    def __init__(self, steps: list[tuple], layers: dict[str, nn.Module], outputs: int) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        values = [x]
        for kind, sources, extra in self.steps:
            read = [values[i] for i in sources]
            if kind == "layer":
                values.append(getattr(self, extra)(*read))
            elif kind == "add":
                values.append(read[0] + read[1])
            elif kind == "iadd":
                out = read[0] * 1.0
                out += read[1]
                values.append(out)
            elif kind == "sub":
                values.append(read[0] - read[1])
            elif kind == "mul":
                values.append(read[0] * read[1])
            elif kind == "div":
                values.append(read[0] / (read[1].abs() + 1))
            elif kind == "scale":
                values.append(read[0] * torch.sigmoid(read[1].mean((2, 3), keepdim=True)))
            elif kind == "cat":
                values.append(torch.cat(read, 1))
            elif kind == "part":
                values.append(read[0].chunk(2, dim=1)[extra])
            elif kind == "shuffle":
                b, c, h, w = read[0].shape
                values.append(read[0].view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))
            elif kind == "pad_channels":
                values.append(F.pad(read[0], (0, 0, 0, 0, 1, 1)))
            elif kind == "pad":
                values.append(F.pad(read[0], (1, 1, 1, 1), value=extra))
            elif kind == "slice":
                values.append(read[0][:, 1:, 1:, ::1])
            elif kind == "pool":
                values.append(F.avg_pool2d(read[0], 3, 1, extra))
            elif kind == "unknown":
                values.append(torch.cumsum(read[0], extra))
            elif kind == "mixed_halves":
                first, second = read[0].chunk(2, 1)
                values.append(torch.cat([second, first * second], 1))
            elif kind == "write":
                out = read[0] * 1.0
                out[:, extra : extra + 2] += 1
                values.append(out)
            elif kind == "token":
                tokens = read[0].flatten(2).transpose(1, 2)
                tokens = torch.cat([getattr(self, extra).weight[None].expand(tokens.shape[0], -1, -1), tokens], 1)
                values.append(tokens[:, :-1].transpose(1, 2).reshape(read[0].shape))
            elif kind == "relu_":
                values.append(F.relu(read[0], inplace=True))
            elif kind == "channels_last_linear":
                values.append(getattr(self, extra)(read[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        last = values[-1]
        return {"last": last, "pooled": last.mean((2, 3)), "more": tuple(values[-self.outputs : -1])}


class Graphs:
    """Draws a RandomNetwork, keeping track of the shape of each value."""

    def __init__(self, draw) -> None:
        self.draw = draw
        self.shapes = [(3, 7, 7)]
        self.steps: list[tuple] = []
        self.layers: dict[str, nn.Module] = {}
        self.by_inputs: dict[tuple, list[str]] = {}

    def pick(self, options):
        return self.draw(st.sampled_from(list(options)))

    def append(self, kind, sources, extra, shape) -> None:
        self.steps.append((kind, sources, extra))
        self.shapes.append(shape)

    def layer(self, source: int, module: nn.Module, shape) -> None:
        name = f"layer{len(self.layers)}"
        self.layers[name] = module
        self.by_inputs.setdefault(self.shapes[source][0], []).append((name, module))
        self.append("layer", [source], name, shape)

    def conv(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        out = self.pick(WIDTHS)
        groups = self.pick([g for g in (1, 1, 1, 2, 3, channels) if channels % g == 0 and out % g == 0])
        kernel, padding = self.pick([(1, 0), (3, 1), (3, 0), (1, 1)])
        if kernel > min(height, width):
            kernel, padding = 1, 0
        bias, mode = self.draw(st.booleans()), self.pick(["zeros", "zeros", "replicate"])
        kind = self.pick([nn.Conv2d, nn.Conv2d, nn.Conv2d, SameConv, StandardisedConv])
        if kind is nn.Conv2d:
            conv = nn.Conv2d(channels, out, kernel, 1, padding, groups=groups, bias=bias, padding_mode=mode)
        else:
            conv, padding = kind(channels, out, kernel, groups=groups, bias=bias), 0
        lost = 0 if kind is SameConv else kernel - 1 - 2 * padding
        self.layer(source, conv, (out, height - lost, width - lost))
        if self.draw(st.booleans()):
            self.layer(len(self.shapes) - 1, nn.BatchNorm2d(out), self.shapes[-1])

    def depthwise(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        multiple = self.pick([1, 2])
        self.layer(source, nn.Conv2d(channels, multiple * channels, 3, 1, 1, groups=channels),
                   (multiple * channels, height, width))  # fmt: skip

    def transposed(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        groups = self.pick([g for g in (1, 2) if channels % g == 0])
        self.layer(source, nn.ConvTranspose2d(channels, 6, 3, 1, 1, groups=groups), (6, height, width))

    def activation(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        options = [
            nn.ReLU(), nn.ReLU(inplace=True), nn.Sigmoid(), nn.Hardswish(), nn.MaxPool2d(3, 1, 1), nn.Dropout(),
            nn.PReLU(channels), nn.GroupNorm(1, channels), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(channels),
        ]  # fmt: skip
        if min(height, width) > 1:  # one pixel has no statistics
            options.append(nn.InstanceNorm2d(channels, affine=True))
        module = self.pick(options)
        self.layer(source, module, self.shapes[source])

    def again(self, source: int) -> None:
        """Calls a layer that was already called on another value of the same width."""
        channels, height, width = self.shapes[source]
        names = self.by_inputs.get(channels)
        if not names:
            return
        name, module = self.pick(names)
        smallest = module.kernel_size[0] if isinstance(module, nn.Conv2d) else 2
        if min(height, width) < smallest:
            return
        out = copy.deepcopy(module).eval()(torch.zeros(1, channels, height, width)).shape[1:]
        self.append("layer", [source], name, tuple(out))

    def join(self, source: int) -> None:
        same = [i for i, shape in enumerate(self.shapes) if shape == self.shapes[source]]
        other = self.pick(same)
        kind = self.pick(["add", "add", "add", "iadd", "sub", "mul", "div"])
        self.append(kind, self.pick([[source, other], [other, source]]), None, self.shapes[source])

    def cat(self, source: int) -> None:
        size = self.shapes[source][1:]
        others = [i for i, shape in enumerate(self.shapes) if shape[1:] == size and shape[0] < 40]
        sources = [source, self.pick(others)]
        self.append("cat", sources, None, (sum(self.shapes[i][0] for i in sources), *size))

    def move(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        kind = self.pick(["part", "shuffle", "pad_channels", "pad", "slice", "pool", "scale", "unknown", "relu_",
                          "channels_last_linear", "mixed_halves", "write", "token"])  # fmt: skip
        shape, extra = (channels, height, width), None
        if kind in ("part", "shuffle", "mixed_halves") and channels % 2:
            return
        if kind == "part":
            extra, shape = self.pick([0, 1]), (channels // 2, height, width)
        elif kind == "pad_channels":
            shape = (channels + 2, height, width)
        elif kind == "pad":
            extra, shape = self.pick([0.0, 0.5]), (channels, height + 2, width + 2)
        elif kind == "slice":
            if min(channels, height) < 2:
                return
            shape = (channels - 1, height - 1, width)
        elif kind == "pool":
            extra = self.pick([0, 1])
            if min(height, width) < 3:
                return
            shape = (channels, height - 2 + 2 * extra, width - 2 + 2 * extra)
        elif kind == "unknown":
            extra = self.pick([1, 2])
        elif kind == "write":
            extra = self.pick([0, 1])
        elif kind == "token":
            extra = f"layer{len(self.layers)}"
            self.layers[extra] = nn.Embedding(1, channels)
        elif kind == "channels_last_linear":
            extra, out = f"layer{len(self.layers)}", self.pick(WIDTHS)
            self.layers[extra], shape = nn.Linear(channels, out), (out, height, width)
        self.append(kind, [source, source] if kind == "scale" else [source], extra, shape)

    def network(self) -> RandomNetwork:
        for _ in range(self.draw(st.integers(3, 9))):
            source = self.pick(range(max(0, len(self.shapes) - 4), len(self.shapes)))
            if self.shapes[source][0] > 40 or len(self.steps) == 0:
                self.conv(source)
            else:
                steps = [
                    self.conv, self.conv, self.conv, self.depthwise, self.transposed, self.activation, self.activation,
                    self.again, self.join, self.join, self.join, self.cat, self.move, self.move,
                ]  # fmt: skip
                self.pick(steps)(source)
        return RandomNetwork(self.steps, self.layers, self.pick([1, 1, 2, 3]))


def kill_filters(model: nn.Module, draw) -> int:
    """Zeroes random filters (their BatchNorm stays: it gives constants), input columns and BatchNorm scales."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    share = draw(st.sampled_from([0.2, 0.3, 0.4, 0.6, 1.0]))
    killed = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        dead = torch.rand(len(weight), generator=generator) < share
        if weight.dim() > 1 and torch.rand(1, generator=generator) < 0.8:
            weight.data[dead] = 0
            killed += int(dead.sum())
        if weight.dim() > 1 and torch.rand(1, generator=generator) < 0.2:
            weight.data[:, torch.rand(weight.shape[1], generator=generator) < 0.4] = 0
        bias = getattr(module, "bias", None)
        if bias is not None and torch.rand(1, generator=generator) < 0.5:
            bias.data[dead[: len(bias)] if len(dead) >= len(bias) else slice(0, 1)] = 0
        if weight.dim() == 1 and torch.rand(1, generator=generator) < 0.3:
            weight.data[dead] = 0
    return killed


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 10**6)))
    model = randomize(Graphs(draw).network(), seed=draw(st.integers(0, 10**6))).double().eval()
    kill_filters(model, draw)
    return model


def outputs(network, x) -> list[torch.Tensor]:
    with torch.no_grad():
        found = network(x.clone())
    return [found["last"], found["pooled"], *found["more"]]


def compare(model, small, x, tolerance=1e-9) -> None:
    """Equal to the tolerance; where a right result can differ by more, to what rounding does to the model itself."""
    expected = outputs(model, x)
    for index, (a, b) in enumerate(zip(expected, outputs(small, x), strict=True)):
        assert a.shape == b.shape
        if not a.isfinite().all():  # products of products
            continue
        apart = (a - b).abs().max()
        if not apart <= tolerance * max(a.abs().max(), 1.0):
            nearby = outputs(in_other_last_bits(model), x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x)))
            assert apart <= ROUNDINGS * (nearby[index] - a).abs().max()


#: How many times farther than by one change of all last bits: sums in another order round anew at each layer.
ROUNDINGS = 30


def in_other_last_bits(model):
    """The model with all parameters and statistics changed by about one rounding; what is zero stays zero."""
    twin = copy.deepcopy(model)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1 + torch.finfo(tensor.dtype).eps * torch.randn_like(tensor))
    return twin


def test_a_wrong_result_is_not_taken_for_rounding():
    """One filter a ten thousandth off in float64, in a well-conditioned network and behind one that cancels."""
    cancels = RandomNetwork(
        [("layer", [0], "layer0"), ("layer", [0], "layer1"), ("sub", [1, 2], None)],
        {"layer0": nn.Conv2d(3, 4, 1), "layer1": nn.Conv2d(3, 4, 1)}, 1,
    ).double()  # fmt: skip
    for scale in (1.0, 1e7):
        with torch.no_grad():
            cancels.layer0.weight.mul_(scale)
            cancels.layer1.weight.copy_(cancels.layer0.weight + 1)
        off = copy.deepcopy(cancels)
        off.layer1.weight.data[2] += 1e-4
        x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
        compare(cancels, in_other_last_bits(cancels), x)
        with pytest.raises(AssertionError):
            compare(cancels, off, x)


SETTINGS = settings(max_examples=16, suppress_health_check=list(HealthCheck))  # the rest: tests/conftest.py


def any_size(small):
    """Whether the network holds for other images than the example: maps of one pixel may make a size a constant."""
    return not any("size of dimension" in line for line in small.report.kept_because)


@SETTINGS
@given(networks())
def test_compact_equals_masked_on_random_graphs(model):
    small = mfp.compact(model, torch.randn(1, 3, 7, 7, dtype=torch.float64))
    compare(model, small, torch.randn(2, 3, 7, 7, dtype=torch.float64))
    if any_size(small):
        compare(model, small, torch.randn(1, 3, 9, 8, dtype=torch.float64))


@settings(SETTINGS, max_examples=8)
@given(networks())
def test_serving_form_equals_masked_on_random_graphs(model):
    """Filters filled up, BatchNorm folded, memory reused; in float32 the packed convs and the fused join run too."""
    small = mfp.compact(model, torch.randn(1, 3, 7, 7, dtype=torch.float64), fold_bn=True)
    compare(model, small, torch.randn(2, 3, 7, 7, dtype=torch.float64))
    model = model.float()
    small = mfp.compact(model, torch.randn(1, 3, 7, 7), fold_bn=True)
    for size in ((2, 3, 7, 7), (1, 3, 9, 8)) if any_size(small) else ((2, 3, 7, 7),):
        images = torch.randn(size)
        compare(model, small, images, 1e-4)
        compare(model, small, images.contiguous(memory_format=torch.channels_last), 1e-4)
