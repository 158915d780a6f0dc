"""mfp: filter pruning of convolutional networks at the speed of the hardware.

Scores, selects and zeroes the filters of all conv layers in one call while a network trains, switching between criteria
as in "Filter Pruning by Switching to Neighboring CNNs with Good Attributes" (arXiv 1904.03961), and removes the pruned
filters for good at the end.
"""

from mfp import backend, ops, optim
from mfp.allocation import RatesForTarget, find_rates
from mfp.attributes import recalibrate_batchnorm
from mfp.compact import CompactReport, compact, compact_optimizer, flops
from mfp.criteria import PAPER_CRITERIA
from mfp.errors import MfpError
from mfp.export import ExportReport, export
from mfp.files import load, save
from mfp.mask import FilterMask
from mfp.plan import FilterPlan
from mfp.pruner import Decision, FilterPruner
from mfp.scores import FilterScores, score_filters
from mfp.selection import prune_filters_, select_filters, select_mix
from mfp.sensitivity import Sensitivities, measure_sensitivities
from mfp.targets import RateForTarget, find_rate

__version__ = "0.2.0"

__all__ = [
    "PAPER_CRITERIA",
    "CompactReport",
    "Decision",
    "ExportReport",
    "FilterMask",
    "FilterPlan",
    "FilterPruner",
    "FilterScores",
    "MfpError",
    "RateForTarget",
    "RatesForTarget",
    "Sensitivities",
    "backend",
    "compact",
    "compact_optimizer",
    "export",
    "find_rate",
    "find_rates",
    "flops",
    "load",
    "measure_sensitivities",
    "ops",
    "optim",
    "prune_filters_",
    "recalibrate_batchnorm",
    "save",
    "score_filters",
    "select_filters",
    "select_mix",
]
