"""Pruning to a time: the rate at which OpenVINO answers in 60 % of the time that it takes now.

    python examples/openvino_time.py [ARCH] [SHARE]        # writes small.xml, small.bin

Needs: pip install 'mfp[train,openvino]'
"""

import sys

import torch
import torchvision

import mfp


def main(arch: str = "resnet18", share: str = "60%", size: int = 224) -> mfp.RateForTarget:
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch).eval()
    example = torch.randn(1, 3, size, size)
    found = mfp.find_rate(
        model, example, milliseconds=share, engine="openvino", residual="coupled", channel_multiple=8, say=print
    )
    print(found)
    pruner = mfp.FilterPruner(
        model, rate=found.rate, criteria=("l2_norm",), residual="coupled", channel_multiple=found.channel_multiple
    )
    pruner.step(-1)  # at once; in your own loop: after every epoch (plain_loop.py)
    small = mfp.compact(model, example)
    print(mfp.export(small, "small.xml"))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
