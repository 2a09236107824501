"""Results of an evaluation: what each says of how it was made, and all of them in words."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from guided_diffusion import __version__
from guided_diffusion.late import torch

from .evaluator_options import EvaluatorOptions
from .extractor_options import ExtractorOptions
from .features import FeatureExtractor
from .metrics import METRICS
from .metrics.registry import SPLIT_SIZE
from .stored_statistics import extractor_settings


def described_extractor(extractor: FeatureExtractor, options: ExtractorOptions) -> dict[str, Any]:
    """Returns what a result says of the extractor, which was loaded by these options."""
    kind = options.kind
    return {"name": extractor.name, "sha256": extractor.fingerprint,
            **({"features_of": kind.network} if kind.network else {}),
            **({"dtype": options.dtype} if kind.has_dtype else {}),
            **({"backend": kind.name, "settings": extractor_settings(extractor)} if kind.is_own else {})}


def protocol(options: EvaluatorOptions) -> dict[str, Any]:
    """Returns what a result says of how the metrics were computed, of those that were."""
    neighbours = {metric.word: metric.neighbours for metric in options.computed if metric.neighbours}
    return {**({"precision_recall": options.precision_recall} if options.of_manifolds else {}),
            **({"neighbours": neighbours} if neighbours else {}),
            **({"inception_score_split": SPLIT_SIZE} if METRICS["is"] in options.computed else {}),
            **({"seed": options.seed} if options.is_random else {})}


def versions() -> dict[str, str]:
    """Returns the versions of what computed a result."""
    return {"guided_diffusion": __version__, "torch": torch.__version__, "numpy": np.__version__,
            "scipy": scipy.__version__, "python": platform.python_version()}


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Returns the results in words: what they were made with, then for each file a line for each metric."""
    first = results[0]
    reference, backend = first["reference"], first["backend"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    distances = first["protocol"].get("precision_recall")
    lines = [f"reference: {_described(reference)}",
             f"network:   {backend['name']}, sha256 {backend['sha256'][:16]}",
             f"protocol:  {f'{distances} precision and recall; ' if distances else ''}{versions}"]
    for result in results:
        lines.append(f"{'held out: ' if result.get('held_out') else 'sample:   '} {_described(result['sample'])}")
        for word, value in result["metrics"].items():
            metric = METRICS[word].by(backend.get("features_of", ""))
            low, high = result.get("intervals95", {}).get(word, (None, None))
            sides = [result["sample"]["images"], *[reference["images"]] * metric.of_fewer]
            of_count = f", of {metric.label} of {min(sides)} images"
            label = "95 %" + of_count * metric.falls_with_count
            interval = "" if low is None else f"   ({label}: {low:.6g} to {high:.6g})"
            lines.append(f"{metric.title}: {'nan' if value is None else value}{interval}")
    return "\n".join(lines)


def _described(file: dict[str, Any]) -> str:
    size = f" of {file['resolution']}" if "resolution" in file else ""
    count = file["images"] or "an unknown number of"
    return f"{file['file']}, {count} images{size}, statistics {file['statistics']}, sha256 {file['sha256'][:16]}"
