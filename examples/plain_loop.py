"""The pruner in a plain PyTorch loop: the lines that matter are marked."""

import torch
import torch.nn.functional as F

import mfp
from mfp.train.data import load_data
from mfp.train.models import CifarResNet


def main(epochs: int = 3, images: int = 512, batch: int = 64, width: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    data = load_data("digits")
    pairs = [data.plain[0, index] for index in range(images)]
    x = torch.stack([image for image, _ in pairs])  # [images, 3, 32, 32]
    y = torch.tensor([target for _, target in pairs])
    model = CifarResNet(8, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    calibration = [(x[:batch], y[:batch])]  # <- a few batches to compare the neighbours on
    pruner = mfp.FilterPruner(model, rate=0.4, attribute="loss", calibration=calibration, epochs=epochs)  # <-
    for epoch in range(epochs):
        model.train()
        for part in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # <- filters that come back have large gradients
            optimizer.step()
        if decision := pruner.step(epoch):  # <- scores, tries the neighbours, zeroes the filters of the best
            print(f"epoch {epoch + 1}: pruned by {decision.criterion}, churn {decision.churn:.2f}")  # <-
        if epoch == epochs // 2:  # <- from here on the mask holds,
            pruner.hold_()  # <- and training goes on, by the same steps,
            model = pruner.shrink_(optimizer)  # <- with the network that is left

    masked = pruner.masked().eval()  # of the original shape, to compare
    small = mfp.compact(masked, x[:1])  # <- removes them for good
    mfp.save(small, "small.mfp")  # <- needs no code of the model to be loaded
    difference = (small(x[:batch]) - masked(x[:batch])).abs().max().item()
    print(f"{mfp.flops(masked, x[:1]):,} -> {mfp.flops(small, x[:1]):,} multiply-adds, difference {difference:.1e}")
    return small


if __name__ == "__main__":
    main()
