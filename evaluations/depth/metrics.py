"""How right the geometry of sampled scenes is, by the depth that the judge of scenes sees in them.

The reference is a file of RGB scenes (arr_0, 32x32), or the shipped one by name, 10,000 held-out scenes.

    dFID            FID between depth maps of real and of generated images, both estimated by the judge (as arXiv
                    2212.08861 has both from one network), as 8-bit images, round((d + 1) * 127.5), on the 64 pooled
                    features of the embedded Fashion-MNIST classifier
    FID             of the RGB images, on the 64 pooled features of the judge
    edge sharpness  mean over the images of the mean magnitude of the depth gradient, in metres per pixel, over the
                    tenth of the pixels where it is largest; the gradient is that of forward differences
    sharpness gap   its distance from that of the real scenes

The judge smooths: of the depth of real scenes it sees three quarters of the edge sharpness. These numbers compare with
no others: not with those of Inception, nor with those of another number of images. Intervals are 95 % intervals by
bootstrap. Differences are to the first sample file, by the same resampled image numbers in both: with the same seed,
image i begins in the same noise in every file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.depth.images import depth_images
from guided_diffusion.depth.ranges import from_unit_range
from guided_diffusion.depth.scenes import FAR, NEAR
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable, write_json
from guided_diffusion.npz import BatchFile, Statistics
from guided_diffusion.options import Options, option
from guided_diffusion.progress import progress_bar

from .. import metrics
from ..evaluator import open_reference, statistics
from ..extractors.bundled import IMAGE_SIZE
from ..extractors.fashion_mnist import FashionMnistClassifier, load_fashion_mnist
from ..extractors.scenes import ScenesExtractor, load_scenes

# By the words of the JSON file; of these names, and of what a difference above and below 0 is.
NAMES = {"dfid": "dFID", "fid": "FID", "sharpness": "edge sharpness", "gap": "sharpness gap"}
VERDICTS = {"dfid": ("worse", "better"), "fid": ("worse", "better"), "sharpness": ("sharper", "softer"),
            "gap": ("worse", "better")}
EQUAL = "no difference"
EDGE_SHARE = 0.1
BATCH = 250
DEPTH_ARRAYS = ("mu_depth", "sigma_depth", "sharpness")     # in reference files, beside the SHA-256 of both networks


@dataclass(frozen=True)
class DepthMetricsOptions(Options):
    """The evaluation of depth."""

    num_images: int | None = option(None, "only the first so many images of each sample file; unset: all", minimum=2)
    bootstrap: int = option(1000, "resamplings for 95 % intervals", minimum=2)
    seed: int = option(0, "seed of the resamplings", minimum=0)
    json: str = option("", "also write the results to this file")


class Seen(NamedTuple):
    """What the networks see in N images."""

    pooled: np.ndarray              # (N, 64), the judge's features: FID
    depth_features: np.ndarray      # (N, 64), the classifier's, of the judge's depth maps: dFID
    sharpness: np.ndarray           # (N,), metres per pixel


class Target(NamedTuple):
    """What generated images are compared with."""

    file: str                       # as it was named
    images: int
    pooled: Statistics
    depth_features: Statistics
    sharpness: np.ndarray           # (N,)


class DepthEvaluator:
    """The two networks, the shipped ones unless others are given."""

    def __init__(self, judge: ScenesExtractor | None = None, classifier: FashionMnistClassifier | None = None) -> None:
        self.judge, self.classifier = judge or load_scenes(), classifier or load_fashion_mnist()

    def description(self) -> dict[str, Any]:
        return {"judge": {"name": self.judge.name, "sha256": self.judge.fingerprint, "accuracy": self.judge.accuracy},
                "extractor": {"name": self.classifier.name, "sha256": self.classifier.fingerprint}}

    def see(self, file: BatchFile, count: int | None = None) -> Seen:
        """The first `count` images of a file (None: all). Raises UserError where it can't be what is asked for."""
        check_scenes(file, count)
        count, parts = count or len(file), []
        with progress_bar(count, file.path.name, "img") as progress:
            for _, images in file.batches(BATCH, num_images=count):
                features, depth = self.judge.features_and_depth(images)
                parts.append(Seen(features.pooled, self.classifier.features(depth_images(depth)).pooled,
                                  edge_sharpness(metres(depth))))
                progress.update(len(images))
        return Seen(*map(np.concatenate, zip(*parts, strict=True)))

    def target(self, word: str) -> Target:
        """The reference in a file, or the shipped one of that name, from its statistics where it has them.

        Raises UserError where they are those of other networks, and where there are no images either.
        """
        file = open_reference(word)
        if not all(name in file.members for name in DEPTH_ARRAYS):
            seen = self.see(file)
            return Target(word, len(file), statistics(seen.pooled), statistics(seen.depth_features),
                          seen.sharpness)
        made_by = {"judge": self.judge.fingerprint, "extractor": self.classifier.fingerprint}
        for name, fingerprint in made_by.items():
            if file.value(name) != fingerprint:
                raise UserError(f"{file.path}: its statistics are those of another {name} (SHA-256 "
                                f"{str(file.value(name))[:16]}..., not {fingerprint[:16]}...): make it again with "
                                "evaluations.make_reference")
        sharpness = file.read("sharpness")
        return Target(word, len(sharpness), file.statistics(), file.statistics("_depth"), sharpness)


def check_scenes(file: BatchFile, count: int | None = None) -> None:
    """Raises UserError where a file has not `count` images (None: two), or they are not 32x32."""
    if not len(file):
        raise UserError(f"{file.path}: has no images, arr_0 must be (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3) uint8")
    if file.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"{file.path}: its images are {file.resolution}, the judge of scenes reads {IMAGE_SIZE}x"
                        f"{IMAGE_SIZE}; for others evaluations.depth_fid compares depth maps that you estimated")
    if len(file) < (count or 2):
        raise UserError(f"{file.path}: has {len(file)} images, {count or 2} are needed")


def depth_arrays(images: BatchFile, count: int, judge: ScenesExtractor) -> dict[str, np.ndarray]:
    """What a reference file holds of the depth of its images, by the names of DEPTH_ARRAYS."""
    evaluator = DepthEvaluator(judge)
    seen = evaluator.see(images, count)
    depth = statistics(seen.depth_features)
    return {"mu_depth": depth.mean, "sigma_depth": depth.covariance, "sharpness": seen.sharpness,
            "judge": np.array(evaluator.judge.fingerprint), "extractor": np.array(evaluator.classifier.fingerprint)}


# Depth maps


def metres(depth: np.ndarray) -> np.ndarray:
    """Depth in [-1, 1] in metres."""
    return from_unit_range(depth, NEAR, FAR)


def edge_sharpness(depth: np.ndarray) -> np.ndarray:
    """(N,): mean magnitude of the gradient of depth (N, H, W) over the tenth of the pixels where it is largest.

    In the unit of depth per pixel. By forward differences to the right and down, so at (H - 1)(W - 1) pixels: a step
    between two pixels counts with its whole height, a ramp with its slope.
    """
    across, down = depth[:, :-1, 1:] - depth[:, :-1, :-1], depth[:, 1:, :-1] - depth[:, :-1, :-1]
    magnitude = np.hypot(across, down).reshape(len(depth), -1)
    count = max(1, round(EDGE_SHARE * magnitude.shape[1]))
    return np.partition(magnitude, -count, axis=1)[:, -count:].mean(axis=1)


# Comparison


def compare(target: Target, rows: Mapping[str, Seen], replicates: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For each row and metric: value and interval95; of rows after the first also difference, difference95, verdict.

    rows: of the same image numbers. Raises UserError for rows of different numbers of images.
    """
    counts = {name: len(seen.sharpness) for name, seen in rows.items()}
    first = next(iter(rows))
    for name, count in counts.items():
        if count != counts[first]:
            raise UserError(f"{name} has {count} images and {first} has {counts[first]}: differences need the same "
                            "images of both")
    drawn = metrics.resamplings(counts[first], replicates, seed)
    results: dict[str, dict[str, Any]] = {}
    base: dict[str, metrics.Replicates] = {}
    for name, seen in rows.items():
        numbers = _replicates(target, seen, drawn)
        base = base or numbers
        results[name] = {word: _described(word, number, None if name == first else number.minus(base[word]))
                         for word, number in numbers.items()}
    return results


def real_sharpness(target: Target, replicates: int, seed: int = 0) -> dict[str, Any]:
    """Value and interval95 of the edge sharpness of the reference."""
    drawn = metrics.resamplings(len(target.sharpness), replicates, seed)
    return _described("sharpness", _resampled(metrics.resampled_mean(target.sharpness), drawn), None)


def _replicates(target: Target, seen: Seen, drawn: np.ndarray) -> dict[str, metrics.Replicates]:
    """By the words of NAMES."""
    distances = {"dfid": (target.depth_features, seen.depth_features), "fid": (target.pooled, seen.pooled)}
    numbers = {word: _resampled(metrics.resampled_frechet_distance(*wanted, features), drawn)
               for word, (wanted, features) in distances.items()}
    sharpness, real = _resampled(metrics.resampled_mean(seen.sharpness), drawn), float(np.mean(target.sharpness))
    gap = metrics.Replicates(abs(sharpness.estimate - real), abs(sharpness.values - real))
    return {**numbers, "sharpness": sharpness, "gap": gap}


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], drawn: np.ndarray) -> metrics.Replicates:
    every = np.ones((1, drawn.shape[1]), drawn.dtype)
    return metrics.Replicates(float(statistic(every)[0]), statistic(drawn))


def _described(word: str, number: metrics.Replicates, difference: metrics.Replicates | None) -> dict[str, Any]:
    low, high = number.interval
    described = {"value": number.estimate, "interval95": [max(0.0, low), high]}     # none of them can be negative
    if difference is None:
        return described
    return {**described, "difference": difference.estimate, "difference95": list(difference.interval),
            "verdict": verdict(word, *difference.interval)}


def verdict(word: str, low: float, high: float) -> str:
    """What the interval of a difference says: that it is above 0, below 0, or neither."""
    above, below = VERDICTS[word]
    return above if low > 0 else below if high < 0 else EQUAL


# Words


def markdown(results: Mapping[str, dict[str, Any]], real: dict[str, Any]) -> str:
    """Two tables: the numbers of each row, then what differs from the first row."""
    first = next(iter(results))
    lines = [f"| row | {' | '.join(NAMES.values())} |", "|---" * (1 + len(NAMES)) + "|"]
    lines += [f"| {name} | {' | '.join(_shown(row[word], 'value', 'interval95') for word in NAMES)} |"
              for name, row in results.items()]
    lines.append(f"| real scenes | | | {_shown(real, 'value', 'interval95')} | |")
    if len(results) > 1:
        lines += ["", f"| difference to {first} | {' | '.join(NAMES.values())} |", "|---" * (1 + len(NAMES)) + "|"]
        lines += [f"| {name} | {' | '.join(_difference(row[word]) for word in NAMES)} |"
                  for name, row in results.items() if name != first]
    return "\n".join(lines)


def _shown(number: dict[str, Any], value: str, bounds: str, sign: str = "") -> str:
    low, high = number[bounds]
    return f"{number[value]:{sign}.4g} ({low:{sign}.4g} to {high:{sign}.4g})"


def _difference(number: dict[str, Any]) -> str:
    return f"{_shown(number, 'difference', 'difference95', '+')}: {number['verdict']}"


def header(evaluator: DepthEvaluator, target: Target) -> str:
    accuracy = ", ".join(f"{name} {value:.4g}" for name, value in evaluator.judge.accuracy.items())
    return (f"reference: {target.file}, {target.images} images\n"
            f"judge:     sha256 {evaluator.judge.fingerprint[:16]}, on held-out scenes: {accuracy}\n"
            f"features:  {evaluator.classifier.name}, sha256 {evaluator.classifier.fingerprint[:16]}")


def measure_depth(reference: str, samples: Sequence[str], options: DepthMetricsOptions) -> str:
    """The tables of these sample files against the reference, and what they were made with.

    Raises UserError for files that are no scenes, and where --json cannot be written.
    """
    check_writable("--json", options.json)
    files = {name: BatchFile(name) for name in samples}
    for file in files.values():
        check_scenes(file, options.num_images)
    evaluator = DepthEvaluator()
    target = evaluator.target(reference)
    seen = {name: evaluator.see(file, options.num_images) for name, file in files.items()}
    results = compare(target, seen, options.bootstrap, options.seed)
    real = real_sharpness(target, options.bootstrap, options.seed)
    if options.json:
        described = {name: {"sha256": file.sha256, "images": len(seen[name].sharpness)} for name, file in files.items()}
        write_json(options.json, {"reference": {"file": target.file, "images": target.images, "sharpness": real},
                                  **evaluator.description(), "bootstrap": options.bootstrap,
                                  "rows": {name: {**described[name], "metrics": results[name]} for name in files}})
    return f"{header(evaluator, target)}\n\n{markdown(results, real)}"
