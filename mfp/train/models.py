"""Networks by name: the CIFAR ResNets, torchvision's classification networks, or the user's own function."""

from __future__ import annotations

import difflib
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfp.errors import MfpError
from mfp.train.user_code import users_function

CIFAR_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet56": 56, "resnet110": 110}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the width doubles, the shortcut takes every second pixel and adds zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:  # [B, Cin, H, W] -> [B, C, H/stride, W/stride]
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        if self.new_channels:
            before = self.new_channels // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(branch + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images, 6n+2 layers deep, with parameter-free shortcuts.

    >>> CifarResNet(20)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])

    Args:
        depth: 6n+2 (20, 32, 56, 110 in the paper).
        num_classes: outputs of the last linear layer.
        width: channels of the first stage (16 in the paper); the others have 2 and 4 times as many.
    Raises:
        MfpError: depth is not 6n+2.
    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, option A.
    """

    def __init__(self, depth: int, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise MfpError(f"a CIFAR ResNet has 6n+2 layers (8, 14, 20, 32, 56, 110, ...), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, num_classes]
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


@cache
def available_models() -> tuple[str, ...]:
    """Names that `build_model` knows: the CIFAR ResNets, then torchvision's classification networks."""
    import torchvision

    return (*CIFAR_DEPTHS, *torchvision.models.list_models(module=torchvision.models))


def build_model(arch: str, num_classes: int, weights: str | None = None, *, download: bool = False) -> nn.Module:
    """A network by name, with the given number of classes, and weights if asked for.

    >>> build_model("resnet20", 10).conv1.weight.shape
    torch.Size([16, 3, 3, 3])

    Args:
        arch: a name of `available_models()`, or "package:function", a function of yours that is called with
            `num_classes=` and returns a module. Only the second form imports code.
        weights: None, a file (safetensors, or a torch file that holds only tensors), "pretrained" (the
            IMAGENET1K_V1 of torchvision, the papers' baseline) or "pretrained:NAME" (another of its sets).
        download: whether pretrained weights that are not on this machine may be fetched.
    Raises:
        MfpError: unknown name, or weights that are missing, unreadable or of another network.
    """
    if weights in ("none", ""):
        weights = None
    model = _construct(arch, num_classes)
    if weights is None:
        return model
    if weights.split(":")[0] == "pretrained":
        state = _pretrained_state(arch, weights.partition(":")[2] or "IMAGENET1K_V1", download)
    else:
        state = read_state(weights)
    load_state(model, state, weights)
    return model


def _construct(arch: str, num_classes: int) -> nn.Module:
    if ":" in arch:
        return _users_own(arch, num_classes)
    if arch in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[arch], num_classes)
    import torchvision

    if arch not in available_models():
        near = difflib.get_close_matches(arch, available_models(), n=8, cutoff=0.3) or available_models()[:8]
        raise MfpError(f"unknown network {arch!r}; near it: {', '.join(near)} (or package:function, yours)")
    # their second classifiers would make the output of the training network a tuple
    single = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **single)


def _users_own(arch: str, num_classes: int) -> nn.Module:
    model = users_function("--model", arch)(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise MfpError(f"--model {arch}: returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _pretrained_state(arch: str, name: str, download: bool) -> dict[str, Tensor]:
    import torchvision

    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise MfpError(f"no pretrained weights for {arch}: torchvision has them only for its own networks")
    choices = torchvision.models.get_model_weights(arch)
    if name not in choices.__members__:
        raise MfpError(f"{arch} has no weights {name!r}; there are: {', '.join(choices.__members__)}")
    url = choices[name].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists() and not download:
        raise MfpError(f"{path} is not there: put {url} there, or give --download to fetch it")
    return choices[name].get_state_dict(progress=False, check_hash=True, weights_only=True)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch file, read without running any code.

    A torch file may hold the state dict itself or have it under "state_dict" or "model"; a "module." prefix,
    left by DataParallel, is taken off.

    Raises:
        MfpError: the file is missing, cut short, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MfpError(f"no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds for a broken or hostile file
        reason = str(error).strip().splitlines()[0][:160]
        raise MfpError(f"cannot read weights from {path}: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise MfpError(f"{path} does not hold a state dict (names and tensors only)")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_state(model: nn.Module, state: dict[str, Tensor], source: str = "weights") -> None:
    """Loads a state dict; a classifier of another number of classes is left as it was, with a warning.

    Raises:
        MfpError: names or shapes differ anywhere else; the first few are listed.
    """
    own = model.state_dict()
    other_shape = [name for name in own if name in state and own[name].shape != state[name].shape]
    classifier = {name.rpartition(".")[0] for name in other_shape}
    is_classifier = len(classifier) == 1 and _last_layer(model) in classifier
    differing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    differing += [name for name in state if name not in own and not name.startswith(("AuxLogits.", "aux1.", "aux2."))]
    if not is_classifier:
        differing += [f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}" for name in other_shape]
    if differing:
        first = "; ".join(differing[:3])
        raise MfpError(f"{source} is of another network: {len(differing)} entries differ, first {first}")
    if is_classifier:
        warnings.warn(
            f"{source}: the classifier {_last_layer(model)} has another number of classes and starts anew",
            stacklevel=2,
        )
        state = {name: value for name, value in state.items() if name not in other_shape}
    model.load_state_dict(state, strict=False)


def _last_layer(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
