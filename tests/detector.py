"""Two small one-stage detectors with what such networks are made of, up to decoded boxes; no decisions on values.

``shared=False``: C2f blocks (chunk, keep every intermediate, concatenate), a head of its own for each level, boxes from
a predicted distribution over distances (DFL). ``shared=True``: a space-to-depth stem and CSP blocks (two convs beside
each other), one head that all three levels share, anchors of three sizes.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 96, 128)  # of the stem and of the stages after it, each at twice the stride of the one before
BINS = 8  # distances from an anchor point to a side of its box, of which the DFL head predicts the distribution


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels, 3), Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C2f(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, outputs), Conv((2 + depth) * half, outputs)
        self.m = nn.ModuleList(Bottleneck(half, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.cv2(torch.cat(parts, 1))


class Csp(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2, self.cv3 = Conv(inputs, half), Conv(inputs, half), Conv(2 * half, outputs)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Focus(nn.Module):
    """Four pixels become four times the channels."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.conv(torch.cat(corners, 1))


class Sppf(nn.Module):
    """A pyramid of max poolings, each on top of the one before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels // 2), Conv(channels * 2, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.cv1(x)]
        levels.extend(self.m(levels[-1]) for _ in range(3))
        return self.cv2(torch.cat(levels, 1))


class Neck(nn.Module):
    """Features go up the levels (FPN), then down again (PAN)."""

    def __init__(self, block: type[nn.Module], widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.up4, self.up3 = block(b + c, b, 1, False), block(a + b, a, 1, False)
        self.down3, self.down4 = Conv(a, a, 3, 2), Conv(b, b, 3, 2)
        self.out4, self.out5 = block(a + b, b, 1, False), block(b + c, c, 1, False)

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> list[Tensor]:
        m4 = self.up4(torch.cat((self.up(p5), p4), 1))
        n3 = self.up3(torch.cat((self.up(m4), p3), 1))
        n4 = self.out4(torch.cat((self.down3(n3), m4), 1))
        return [n3, n4, self.out5(torch.cat((self.down4(n4), p5), 1))]


class DistributionHead(nn.Module):
    """For each level convs of its own; a side of a box is the mean of a predicted distribution of distances."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.classes, self.strides = classes, strides
        self.box = nn.ModuleList(self.branch(width, 4 * BINS) for width in widths)
        self.cls = nn.ModuleList(self.branch(width, classes) for width in widths)
        self.mean = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)  # a fixed sum, written as a conv
        self.mean.weight.data = torch.arange(BINS, dtype=torch.float).view(1, BINS, 1, 1)

    @staticmethod
    def branch(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(Conv(inputs, 32, 3), nn.Conv2d(32, outputs, 1))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        maps = [torch.cat((box(x), cls(x)), 1) for box, cls, x in zip(self.box, self.cls, levels, strict=True)]
        batch = maps[0].shape[0]
        flat = torch.cat([x.view(batch, 4 * BINS + self.classes, -1) for x in maps], 2)
        box, scores = flat.split((4 * BINS, self.classes), 1)
        distances = self.mean(box.view(batch, 4, BINS, -1).transpose(2, 1).softmax(1)).view(batch, 4, -1)
        points, strides = self.points(maps)
        near, far = distances.chunk(2, 1)
        low, high = points - near, points + far
        boxes = torch.cat(((low + high) / 2, high - low), 1) * strides
        return torch.cat((boxes, scores.sigmoid()), 1), maps

    def points(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, strides = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            height, width = x.shape[2:]
            rows = torch.arange(height, device=x.device, dtype=x.dtype) + 0.5
            columns = torch.arange(width, device=x.device, dtype=x.dtype) + 0.5
            y, x_ = torch.meshgrid(rows, columns, indexing="ij")
            points.append(torch.stack((x_, y)).view(2, -1))
            strides.append(torch.full((1, height * width), float(stride), device=x.device, dtype=x.dtype))
        return torch.cat(points, 1), torch.cat(strides, 1)


class AnchorHead(nn.Module):
    """One head that all levels share; a box is an offset from one of three anchors at each place."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, anchors = 48, 3
        self.anchors, self.outputs, self.strides = anchors, 5 + classes, strides
        self.lateral = nn.ModuleList(Conv(width, channels) for width in widths)
        self.tower = Conv(channels, channels, 3)
        self.predict = nn.Conv2d(channels, anchors * self.outputs, 1)
        self.register_buffer("sizes", torch.rand(len(widths), 1, anchors, 1, 1, 2) * 4 + 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        found = []
        for i, x in enumerate(levels):
            x = self.predict(self.tower(self.lateral[i](x)))
            batch, _, height, width = x.shape
            x = x.view(batch, self.anchors, self.outputs, height, width).permute(0, 1, 3, 4, 2).contiguous()
            rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).to(x.dtype) - 0.5
            xy, wh, scores = x.sigmoid().split((2, 2, self.outputs - 4), -1)
            xy, wh = (xy * 2 + grid) * self.strides[i], (wh * 2) ** 2 * self.sizes[i] * self.strides[i]
            found.append(torch.cat((xy, wh, scores), -1).view(batch, -1, self.outputs))
        return torch.cat(found, 1)


class Detector(nn.Module):
    """The last three of its stages are the levels at which boxes are found."""

    def __init__(self, shared: bool = False, widths: tuple[int, ...] = WIDTHS, classes: int = 4) -> None:
        super().__init__()
        block = Csp if shared else C2f
        self.stem = Focus(widths[0]) if shared else Conv(3, widths[0], 3, 2)
        self.stages = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            self.stages.append(nn.Sequential(Conv(inputs, outputs, 3, 2), block(outputs, outputs, 1 + (i == 1))))
        self.sppf = Sppf(widths[-1])
        self.neck = Neck(block, widths[-3:])
        strides = tuple(2**i for i in range(len(widths) - 2, len(widths) + 1))
        self.head = (AnchorHead if shared else DistributionHead)(widths[-3:], strides, classes)

    def forward(self, x: Tensor):
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        levels[-1] = self.sppf(x)
        return self.head(self.neck(*levels[-3:]))
