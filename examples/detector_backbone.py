"""The backbone of a detector: what comes behind it decides on tensor values, so it is pruned and compacted by itself.

python examples/detector_backbone.py
"""

import torch
import torchvision

import mfp


def main(size: int = 320) -> torch.nn.Module:
    torch.manual_seed(0)
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=size, max_size=size
    ).eval()
    images = [torch.rand(3, size, size), torch.rand(3, size, size)]
    example = torch.zeros(1, 3, size, size)  # what the detector hands to its backbone

    backbone = detector.backbone
    pruner = mfp.FilterPruner(backbone, rate=0.4, criteria=("l2_distance",), example_input=example)
    pruner.step(-1)  # at once; in a training loop of the detector: after every epoch (plain_loop.py)
    small = mfp.compact(detector, (images,), submodule="backbone")  # a detector with a smaller backbone
    with torch.no_grad():
        masked, compact = detector(images), small(images)
    print(small.report)
    apart = max(float((a["boxes"] - b["boxes"]).abs().max()) for a, b in zip(masked, compact, strict=True))
    print(f"the boxes of {len(images)} images differ by at most {apart:.1e} pixels")
    return small


if __name__ == "__main__":
    main()
