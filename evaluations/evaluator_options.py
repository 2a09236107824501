"""Options of an evaluation: what is measured, and where results and pictures go."""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options import Options, option, seed_option

from .metrics import METRICS, ComparisonSettings, Metric
from .metrics.bootstrap import MOST_RESAMPLINGS
from .metrics.comparison import MANIFOLD_K
from .metrics.registry import metric_words

MANIFOLD = (METRICS["precision"], METRICS["recall"])        # whose distances --precision_recall chooses


def _depth_words() -> str:
    return " and ".join(word for word, metric in METRICS.items() if metric.needs_depth)


@dataclass(frozen=True)
class EvaluatorOptions(Options):
    """The evaluation."""

    metrics: str = option(",".join(word for word, metric in METRICS.items() if metric.official),
                          f"which numbers, of {','.join(METRICS)}; {_depth_words()} need an extractor of depth")
    num_images: int | None = option(None, "only the first so many images of each sample file; unset: all", minimum=2)
    precision_recall: str = option("exact", "distances of precision and recall: exact, or official: in half precision",
                                   choices=("exact", "official"))
    bootstrap: int = option(0, "resamplings for 95 % intervals; 0: none", minimum=0, maximum=MOST_RESAMPLINGS)
    held_out: str = option("", "real images that the reference does not hold, of which the same numbers are shown "
                           "first; unset: none")
    seed: int = seed_option("seed of the resamplings, of the images that KID and MIND draw, and of MIND's directions")
    json: str = option("", "also write the results to this file")
    plot: str = option("", "also draw them to this file (PNG, SVG or PDF)")
    nearest: str = option("", "also draw, to this PNG file, the samples that lie nearest to images of the reference, "
                          "and those images below them: what a network has memorised shows there")

    def __post_init__(self) -> None:
        super().__post_init__()
        metric_words(self.metrics)

    @property
    def is_drawn(self) -> bool:
        """Whether a picture is asked for, which needs the features of every image."""
        return bool(self.plot or self.nearest)

    @property
    def wanted(self) -> list[Metric]:
        """The metrics that are asked for, in the order of METRICS."""
        words = metric_words(self.metrics)
        return [metric for word, metric in METRICS.items() if word in words]

    @property
    def computed(self) -> list[Metric]:
        """The metrics that are computed: those that are asked for, and those that the picture of --plot shows."""
        shown = MANIFOLD if self.plot else ()
        return [metric for metric in METRICS.values() if metric in self.wanted or metric in shown]

    @property
    def of_manifolds(self) -> bool:
        """Whether precision or recall is computed."""
        return any(metric in MANIFOLD for metric in self.computed)

    @property
    def is_random(self) -> bool:
        """Whether random numbers have a part in the results."""
        return self.bootstrap > 0 or any(metric.by_seed for metric in self.computed)

    def useless(self) -> dict[str, str]:
        """The options that have no effect beside the others, and why."""
        idle = {}
        if not self.of_manifolds:
            idle["precision_recall"] = "neither precision nor recall is computed"
        if not self.is_random:
            idle["seed"] = "nothing is drawn"
        return idle

    @property
    def settings(self) -> ComparisonSettings:
        """What the values of the metrics depend on besides the features."""
        dense = any(metric.neighbours > MANIFOLD_K for metric in self.wanted)
        return ComparisonSettings(self.precision_recall, self.seed, bool(self.plot) or dense)
