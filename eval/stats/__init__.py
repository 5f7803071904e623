"""Intervals and tests of rates and means: one system, two systems on the same prompts, several training seeds.

Pure functions of counts and columns; scipy supplies the distributions. What the intervals promise is simulated in
benchmarks/coverage.py, with results in benchmarks/results/coverage.json.
"""

from resafe.eval.stats._common import Difference, Interval
from resafe.eval.stats.agreement import alpha_interval, cohen_kappa, kappa_interval, krippendorff_alpha
from resafe.eval.stats.clusters import cluster_bootstrap, clustered_interval, crossed_test
from resafe.eval.stats.means import mean_interval, paired_mean_difference, wilcoxon_signed_rank
from resafe.eval.stats.missing import bounds, bounds_difference, bounds_mean, crosses
from resafe.eval.stats.multiple import holm
from resafe.eval.stats.paired import (
    Table,
    crosstab,
    mcnemar_exact,
    non_inferior,
    paired_difference,
    tango,
    tango_limits,
    tango_score,
    within_margin,
)
from resafe.eval.stats.power import power_mcnemar, power_non_inferior, prompts_needed, sample_size_for_margin, smallest
from resafe.eval.stats.rates import wilson

__all__ = [
    "Difference",
    "Interval",
    "Table",
    "alpha_interval",
    "bounds",
    "bounds_difference",
    "bounds_mean",
    "cluster_bootstrap",
    "clustered_interval",
    "cohen_kappa",
    "kappa_interval",
    "crossed_test",
    "crosses",
    "crosstab",
    "holm",
    "krippendorff_alpha",
    "mcnemar_exact",
    "mean_interval",
    "non_inferior",
    "paired_difference",
    "paired_mean_difference",
    "power_mcnemar",
    "power_non_inferior",
    "prompts_needed",
    "sample_size_for_margin",
    "smallest",
    "tango",
    "tango_limits",
    "tango_score",
    "wilcoxon_signed_rank",
    "wilson",
    "within_margin",
]
