"""The ops as Triton kernels, imported as ``mfp.kernels``: for GPUs where mfp was built without CUDA.

Same names and arguments as the ops in ``mfp.ops``. Sizes of layers are run-time numbers: another network compiles
nothing new.
"""

if __name__ == "mfp.kernels":
    from mfp.kernels.mask import mask_filters_
    from mfp.kernels.optim import masked_adamw_, masked_sgd_
    from mfp.kernels.scatter import scatter_add_
    from mfp.kernels.score import prune_filters_, score_filters

    __all__ = ["mask_filters_", "masked_adamw_", "masked_sgd_", "prune_filters_", "scatter_add_", "score_filters"]
else:  # Python was started in this repository, and transformers looks whether another package of this name is there
    __version__ = "0"
