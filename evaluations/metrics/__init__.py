"""From features to numbers: FID, sFID, Inception Score, precision and recall, KID, MIND, authenticity and others.

The functions need numpy and scipy only. Features are arrays (images, channels); the order of the images matters to the
Inception Score alone. What a user can put right (shapes, NaN, too few images, a matrix that is not a covariance) raises
UserError. `METRICS` lists the metrics of the evaluator by their words.
"""

from .authenticity import authentic_samples
from .bootstrap import (
    Interval,
    Replicates,
    Statistic,
    bootstrap,
    bootstrap_interval,
    resampled_mean,
    resamplings,
)
from .comparison import Comparison, ComparisonSettings, Feature, FeatureSet, FileFeatures, feature_statistics
from .extrapolation import frechet_distance_at_infinity, resampled_frechet_distance_at_infinity
from .frechet import RunningStatistics, frechet_distance, resampled_frechet_distance
from .inception_score import inception_score, resampled_inception_score
from .kid import kid, resampled_kid
from .mind import mind, resampled_mind
from .neighbours import (
    Neighbourhoods,
    density_coverage,
    manifold_membership,
    neighbourhoods,
    precision_recall,
)
from .pixels import contrast, saturation
from .registry import METRICS, FromReference, Metric, Resampled
from .subsets import subset_coverage, subset_recall, subset_replicates
from .verdicts import BETTER, EQUAL, HIGHER, LOWER, WORSE, Direction

# Earlier names, which scripts outside this repository use.
inside, interval = manifold_membership, bootstrap_interval

__all__ = [
    "BETTER", "EQUAL", "HIGHER", "LOWER", "METRICS", "WORSE", "Comparison", "ComparisonSettings", "Direction",
    "Feature", "FeatureSet", "FileFeatures", "FromReference", "Interval", "Metric", "Neighbourhoods", "Replicates",
    "Resampled", "RunningStatistics", "Statistic", "authentic_samples", "bootstrap", "bootstrap_interval",
    "contrast", "density_coverage", "feature_statistics", "frechet_distance", "frechet_distance_at_infinity",
    "inception_score", "inside", "interval", "kid", "manifold_membership", "mind", "neighbourhoods",
    "precision_recall", "resampled_frechet_distance", "resampled_frechet_distance_at_infinity",
    "resampled_inception_score", "resampled_kid", "resampled_mean", "resampled_mind", "resamplings", "saturation",
    "subset_coverage", "subset_recall", "subset_replicates",
]
