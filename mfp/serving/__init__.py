"""The serving form of a compact network: folded norms, packed convs, fused joins, reused memory."""

from mfp.serving.network import ServingNetwork
from mfp.serving.prepare import SERVING_BYTES, prepare_for_serving

__all__ = ["SERVING_BYTES", "ServingNetwork", "prepare_for_serving"]
