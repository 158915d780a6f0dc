"""The pruner in timm's training script: one line after its scheduler is made.

timm's train.py calls `lr_scheduler.step(epoch + 1, ...)` once at the end of every epoch. `prune_with` makes that call
prune first, so that in train.py only this is added, before its loop over the epochs:

    from timm_hook import prune_with
    prune_with(lr_scheduler, mfp.FilterPruner(model, rate=0.4, epochs=num_epochs))

To train on what is left from the epoch `hold` on, two lines more, at the end of that loop (the optimiser, the scheduler
and timm's ModelEma stay the objects that they are):

    if epoch + 1 == hold:
        pruner.hold_()
        model = pruner.shrink_(optimizer, averaged=model_ema)

Needs: pip install 'mfp[train]' timm
"""

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import mfp
from mfp.train.data import load_data


def prune_with(lr_scheduler, pruner: mfp.FilterPruner) -> None:
    """Lets the scheduler's step at the end of an epoch prune before it sets the next learning rate."""
    step = lr_scheduler.step

    def prune_and_step(epoch: int, *arguments, **keywords):
        decision = pruner.step(epoch - 1)  # timm hands in the epoch that comes
        if decision:
            print(f"epoch {epoch}: pruned by {decision.criterion}, churn {decision.churn:.2f}")
        return step(epoch, *arguments, **keywords)

    lr_scheduler.step = prune_and_step


def main(epochs: int = 2, images: int = 256, name: str = "test_resnet") -> torch.nn.Module:
    """What train.py does, in short: its functions, in its order."""
    data = load_data("digits")
    pairs = [data.plain[0, index] for index in range(images)]
    x, y = torch.stack([image for image, _ in pairs]), torch.tensor([target for _, target in pairs])
    model = timm.create_model(name, num_classes=10)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9)
    lr_scheduler, num_epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0)

    pruner = mfp.FilterPruner(model, rate=0.4, epochs=num_epochs)
    prune_with(lr_scheduler, pruner)

    for epoch in range(num_epochs):
        model.train()
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        lr_scheduler.step(epoch + 1)
        if epoch + 1 == num_epochs // 2:
            pruner.hold_()
            model = pruner.shrink_(optimizer)
    return mfp.compact(pruner.masked().eval(), x[:1])


if __name__ == "__main__":
    main()
