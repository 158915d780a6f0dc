"""The pruner as a callback of transformers' Trainer, on one of its ResNets.

Needs: pip install 'mfp[train]' transformers accelerate
"""

import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import mfp
from mfp.train.data import load_data


class FilterPruning(TrainerCallback):
    """Prunes at the end of every epoch; the arguments are those of mfp.FilterPruner."""

    def __init__(self, model: torch.nn.Module, **arguments) -> None:
        self.pruner = mfp.FilterPruner(model, **arguments)

    def on_epoch_end(self, args, state, control, **others) -> None:
        decision = self.pruner.step(round(state.epoch) - 1)  # the Trainer counts from 1
        if decision:
            print(f"epoch {round(state.epoch)}: pruned by {decision.criterion}, churn {decision.churn:.2f}")


def main(epochs: int = 2, images: int = 256) -> torch.nn.Module:
    torch.manual_seed(0)
    data = load_data("digits")
    pairs = [data.plain[0, index] for index in range(images)]
    dataset = [{"pixel_values": image, "labels": int(target)} for image, target in pairs]
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    example = {"pixel_values": dataset[0]["pixel_values"][None]}  # what its forward takes, by name

    pruning = FilterPruning(model, rate=0.4, epochs=epochs, example_input=example)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=1e-3, max_grad_norm=1.0,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=dataset, callbacks=[pruning]).train()

    small = mfp.compact(model.eval(), example)
    print(small.report)
    return small


if __name__ == "__main__":
    main()
