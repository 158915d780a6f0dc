"""The pruner as a callback of transformers' Trainer, on one of its ResNets.

Needs: pip install 'mfp[train]' transformers accelerate
"""

import tempfile

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import mfp
from mfp.train.data import load_data


class Classifier(nn.Module):
    """What the Trainer trains: the network is a part of it, so that a smaller one can take its place."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels):
        logits = self.network(pixel_values=pixel_values).logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class FilterPruning(TrainerCallback):
    """Prunes at the end of every epoch up to ``hold_after``; the arguments are those of mfp.FilterPruner."""

    def __init__(self, network: nn.Module, hold_after: int, **arguments) -> None:
        self.pruner, self.hold_after = mfp.FilterPruner(network, **arguments), hold_after

    def on_epoch_end(self, args, state, control, model, optimizer, **others) -> None:
        epoch = round(state.epoch)  # the Trainer counts from 1
        decision = self.pruner.step(epoch - 1)
        if decision:
            print(f"epoch {epoch}: pruned by {decision.criterion}, churn {decision.churn:.2f}")
        if epoch == self.hold_after:
            self.pruner.hold_()
            self.pruner.shrink_(optimizer.optimizer, within=model)  # replaces model.network


def main(epochs: int = 3, images: int = 256) -> nn.Module:
    torch.manual_seed(0)
    data = load_data("digits")
    pairs = [data.plain[0, index] for index in range(images)]
    dataset = [{"pixel_values": image, "labels": int(target)} for image, target in pairs]
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    model = Classifier(ResNetForImageClassification(config))
    example = {"pixel_values": dataset[0]["pixel_values"][None]}  # what the network's forward takes, by name

    hold_after = epochs - 1
    pruning = FilterPruning(model.network, hold_after, rate=0.4, epochs=hold_after, example_input=example)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=1e-3, max_grad_norm=1.0,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=dataset, callbacks=[pruning]).train()

    small = mfp.compact(pruning.pruner.masked().eval(), example)
    print(small.report)
    return small


if __name__ == "__main__":
    main()
