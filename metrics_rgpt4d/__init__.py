"""Metrics of region-level 4D question answering: one folder a metric, each also a Hub Space of its own."""

from metrics_rgpt4d.r4d_bench.r4d_bench import R4DBench

__all__ = ["R4DBench"]
