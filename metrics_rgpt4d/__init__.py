"""Metrics of region-level 4D question answering: one folder a metric, each also a Hub Space of its own.

Files that several metrics share lie here, and each metric's folder has relative links to those that it uses: a folder
alone is then complete, for `evaluate.load` and as a Space.
"""

from metrics_rgpt4d.choice_accuracy.choice_accuracy import ChoiceAccuracy
from metrics_rgpt4d.depth_flow.depth_flow import DepthFlow
from metrics_rgpt4d.mean_relative_accuracy.mean_relative_accuracy import MeanRelativeAccuracy
from metrics_rgpt4d.paired_comparison.paired_comparison import PairedComparison
from metrics_rgpt4d.r4d_bench.r4d_bench import R4DBench
from metrics_rgpt4d.timebench.timebench import TimeBench

__all__ = ["ChoiceAccuracy", "DepthFlow", "MeanRelativeAccuracy", "PairedComparison", "R4DBench", "TimeBench"]
