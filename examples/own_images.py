"""A pretrained network of torchvision, on a folder of images: fine-tuned, pruned while it learns, fine-tuned small.

    python examples/own_images.py FOLDER        # FOLDER/CLASS/*.jpg; writes small.mfp and small.onnx

Needs: pip install 'mfp[train,onnx]'. torchvision fetches the pretrained weights once; without a network give main
weights=None, which starts from random ones.
"""

import sys

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, random_split
from torchvision.transforms import v2

import mfp


def load(folder: str, size: int):
    """A fifth of the images, always the same, is for testing."""
    transform = v2.Compose([
        v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    images = torchvision.datasets.ImageFolder(folder, transform)
    return *random_split(images, [0.8, 0.2], torch.Generator().manual_seed(0)), len(images.classes)


def train_epoch(model, optimizer, loader) -> None:
    model.train()
    for images, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model, loader) -> float:
    model.eval()
    right = [(model(images).argmax(1) == targets).float() for images, targets in loader]
    return 100 * float(torch.cat(right).mean())


def main(folder: str, epochs: int = 6, arch: str = "resnet18", weights: str | None = "DEFAULT", size: int = 224):
    train, test, classes = load(folder, size)
    train, test = DataLoader(train, 32, shuffle=True), DataLoader(test, 32)
    model = torchvision.models.get_model(arch, weights=weights)  # its weights are fetched once
    model.fc = torch.nn.Linear(model.fc.in_features, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    calibration = [next(iter(train))]
    pruner = mfp.FilterPruner(
        model,
        rate=0.4,
        attribute="loss",
        calibration=calibration,
        epochs=epochs,
        residual="coupled",
        channel_multiple=8,
    )
    for epoch in range(epochs):
        train_epoch(model, optimizer, train)
        decision = pruner.step(epoch)
        print(f"epoch {epoch + 1}: pruned by {decision.criterion}, accuracy {accuracy(model, test):.1f} %")

    example = calibration[0][0][:1]
    small = mfp.compact(model.eval(), example)
    optimizer = mfp.compact_optimizer(optimizer, model, small)
    for _ in range(epochs // 2):
        train_epoch(small, optimizer, train)
    print(small.report)
    print(f"accuracy of the small network: {accuracy(small, test):.1f} %")
    mfp.save(small, "small.mfp")
    mfp.export(small, "small.onnx")
    return small


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
