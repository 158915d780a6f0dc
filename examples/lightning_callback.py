"""The pruner as a Lightning callback; its state travels in Lightning's own checkpoints.

Needs: pip install 'mfp[train]' pytorch-lightning
"""

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import mfp
from mfp.train.data import load_data
from mfp.train.models import CifarResNet


class FilterPruning(lightning.Callback):
    """Prunes `module.model` at the end of every epoch until the epoch `hold`, and trains on what is left from there.

    The other arguments are those of mfp.FilterPruner.
    """

    def __init__(self, hold: int, **arguments) -> None:
        self.hold, self.arguments, self.state = hold, arguments, None

    def on_fit_start(self, trainer, module) -> None:
        self.pruner = mfp.FilterPruner(module.model, epochs=trainer.max_epochs, **self.arguments)
        if self.state:
            self.pruner.load_state_dict(self.state)

    def on_train_epoch_end(self, trainer, module) -> None:
        decision = self.pruner.step(trainer.current_epoch)
        if decision:
            module.log("churn", decision.churn)
        if trainer.current_epoch + 1 == self.hold:
            self.pruner.hold_()
            self.pruner.shrink_(trainer.optimizers[0], within=module)  # replaces module.model

    def state_dict(self) -> dict:
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict) -> None:  # comes before the fit starts
        self.state = state


class Classifier(lightning.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.model = CifarResNet(8, width=width)

    def training_step(self, batch, _):
        images, targets = batch
        return F.cross_entropy(self.model(images), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(epochs: int = 2, images: int = 512) -> torch.nn.Module:
    data = load_data("digits")
    pairs = [data.plain[0, index] for index in range(images)]
    x, y = torch.stack([image for image, _ in pairs]), torch.tensor([target for _, target in pairs])
    pruning = FilterPruning(hold=1, rate=0.4, attribute="loss", calibration=[(x[:64], y[:64])])
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[pruning], gradient_clip_val=1.0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    print("pruned by", [decision.criterion for decision in pruning.pruner.decisions])
    return mfp.compact(pruning.pruner.masked().eval(), x[:1])


if __name__ == "__main__":
    main()
