"""Evaluate sample files against a reference batch: FID, sFID, Inception Score, precision, recall, and more.

    python evaluations/evaluator.py VIRTUAL_imagenet128_labeled.npz samples_50000x128x128x3.npz
    python evaluations/evaluator.py fmnist32 samples_1000x32x32x3.npz --backend embedded
    python evaluations/evaluator.py scenes32 samples_2000x32x32x3.npz --backend scenes

The reference is a file in the official layout, or a shipped one by name (fmnist32, scenes32). Under mpiexec or
torchrun the ranks share the images.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch

from evaluations import metrics, plots
from evaluations.extractors import BACKENDS, find_extractor
from evaluations.features import FeatureExtractor, Features, extract, feature_folder
from guided_diffusion import __version__, dist_util
from guided_diffusion.cli import run_script
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable, write_json
from guided_diffusion.npz import BatchFile, Statistics
from guided_diffusion.options import Options, Words, nearest, option, parse_words

MODELS = Path(__file__).parent / "models"
SPLIT_SIZE = 5000
KID_IMAGES = 10_000

# Metrics by the word that --metrics takes and the line that shows them; the official five first, in their order.
NAMES = {"is": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall",
         "kid": "KID", "density": "Density", "coverage": "Coverage"}
NEIGHBOURS = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
PAIRED = ("kid", *NEIGHBOURS)           # metrics that need the features of the reference, not only their statistics
SUFFIXES = {"fid": "", "sfid": "_s"}    # of the statistics' names in reference batches


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The network that sees the images."""

    backend: str = option("torch", "the network: torch or tensorflow (Inception of 2015) or, for the shipped "
                          "models, embedded (a small classifier of Fashion-MNIST) or scenes (the judge of scenes)",
                          choices=BACKENDS)
    inception: str = option("", "the official classify_image_graph_def.pb, or its conversion; unset: from the cache of "
                            "this library, else downloaded")
    device: str = option("", "device of the network, like cpu or cuda:1; unset: a GPU for each rank, else the CPU")
    dtype: str = option("float32", "type in which the torch Inception computes; bfloat16 moves FID in its first "
                       "decimal and is for quick looks", choices=("float32", "bfloat16"))
    batch_size: int = option(64, "images at a time on each rank", minimum=1)
    cache: str = option("", "folder that keeps features, so that a file is read by the network once; unset: not kept")


@dataclass(frozen=True)
class EvaluatorOptions(Options):
    """The evaluation."""

    metrics: str = option("is,fid,sfid,precision,recall", f"which numbers, of {','.join(NAMES)}")
    num_images: int | None = option(None, "only the first so many images of each sample file; unset: all", minimum=2)
    precision_recall: str = option("exact", "distances of precision and recall: exact, or official: in half precision",
                                   choices=("exact", "official"))
    bootstrap: int = option(0, "resamplings for 95 % intervals; 0: none", minimum=0)
    seed: int = option(0, "seed of the resamplings and of KID's subsets", minimum=0)
    json: str = option("", "also write the results to this file")
    plot: str = option("", "also draw them to this file (PNG, SVG or PDF)")

    @property
    def wanted(self) -> list[str]:
        return [word for word in NAMES if word in self.metrics.replace(" ", "").lower().split(",")]

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.metrics.replace(" ", "").lower().split(",")
        for word in words:
            if word not in NAMES:
                raise UserError(f"--metrics {self.metrics}: {word!r} is none of {', '.join(NAMES)}"
                                f"{nearest(word, NAMES)}")


def open_reference(word: str) -> BatchFile:
    """The reference batch of that path, or the shipped one of that name."""
    shipped = shipped_reference(word)
    return BatchFile(shipped if shipped.is_file() and not Path(word).exists() else word)


def shipped_reference(word: str) -> Path:
    """Where the shipped reference batch of that name is, if there is one."""
    return MODELS / f"{word}_reference.npz"


def load_network(options: NetworkOptions) -> FeatureExtractor:
    """The extractor that `--backend` names."""
    return find_extractor(options.backend).load(inception=options.inception, device=options.device,
                                                dtype=options.dtype)


def load_network_once(options: NetworkOptions) -> FeatureExtractor:
    """The network on all ranks; the first one goes ahead, so that a file is downloaded or converted once."""
    network = None
    for turn in (dist_util.is_main(), not dist_util.is_main()):
        with dist_util.together():
            if turn:
                network = load_network(options)
    return network


def statistics(features: np.ndarray, rows: int = 4096) -> Statistics:
    """Mean and covariance of (N, D) features, which may be mapped from a file: a few rows in memory at a time."""
    running = metrics.RunningStatistics()
    for start in range(0, len(features), rows):
        piece = features[start:start + rows]
        if isinstance(features, np.memmap):         # read, not mapped: mapped pages would stay in memory
            place = features.offset + start * piece[0].nbytes
            piece = np.fromfile(features.filename, features.dtype, piece.size, offset=place).reshape(piece.shape)
        running.update(piece)
    return Statistics(running.mean, running.covariance)


class Side:
    """A file, its features where the metrics need them, and its statistics, stored or computed."""

    def __init__(self, file: BatchFile, count: int, features: Features | None = None) -> None:
        self.file = file
        self.count = count
        self.features = features
        self._statistics: dict[str, Statistics | None] = {}

    def first(self, count: int) -> Side:
        """The side of its first `count` images alone."""
        if count == self.count:
            return self
        return Side(self.file, count, Features(*(values[:count] for values in self.features)))

    @cached_property
    def pooled(self) -> np.ndarray:
        """(N, D)."""
        return self.features.pooled if self.features is not None else self.file.read("pooled")

    def statistics(self, suffix: str) -> Statistics:
        """Of pooled features, or with suffix "_s" of spatial ones."""
        if suffix not in self._statistics:
            stored = self.file.statistics(suffix) if self.whole else None
            self._statistics[suffix] = stored or statistics(self.features.spatial if suffix else self.features.pooled)
        return self._statistics[suffix]

    @property
    def whole(self) -> bool:
        """Whether all images of the file take part: only then do stored statistics stand for them."""
        return self.count >= len(self.file)

    def description(self) -> dict[str, Any]:
        stored = self.whole and any(self.file.statistics(suffix) for suffix in ("", "_s"))
        return {"file": str(self.file.path), "sha256": self.file.sha256, "images": self.count,
                "statistics": "stored" if stored else "computed",
                **({"resolution": self.file.resolution} if len(self.file) else {})}


def check_reference(reference: BatchFile, options: EvaluatorOptions, backend: str) -> None:
    """Raises UserError where a reference lacks what the metrics need, or is of another kind of network."""
    stored = {suffix for suffix in ("", "_s") if reference.statistics(suffix) is not None}
    lacking = [word for word, suffix in SUFFIXES.items() if word in options.wanted and suffix not in stored]
    if "pooled" not in reference.members:
        lacking += [word for word in options.wanted if word in PAIRED] + ["plot"] * bool(options.plot)
    if lacking and not len(reference):
        raise UserError(f"{reference.path}: has no images (arr_0), which {', '.join(lacking)} would need: leave "
                        "them out of --metrics")
    made_by = reference.value("backend")
    if made_by is None and not find_extractor(backend).is_inception and reference.statistics():
        raise UserError(f"{reference.path}: its statistics are Inception's, not those of --backend {backend}")
    if made_by is not None and find_extractor(backend).is_inception:
        raise UserError(f"{reference.path}: its statistics are of the network {made_by!r}, not of Inception: pass "
                        "another --backend")


class Evaluation:
    """Sample files against one reference."""

    def __init__(self, reference: str, samples: Sequence[str], network_options: NetworkOptions,
                 options: EvaluatorOptions, warn: Callable[[str], None] = lambda text: None,
                 network: FeatureExtractor | None = None) -> None:
        """network: used in place of the one that `network_options` name."""
        self.options, self.network_options, self.network = options, network_options, network
        self.reference = open_reference(reference)
        self.samples = [BatchFile(path) for path in samples]
        self.warn = warn
        self._check()

    def _check(self) -> None:
        """Raises UserError for what cannot work, before the network is loaded."""
        options, reference = self.options, self.reference
        for flag in ("json", "plot"):
            check_writable(f"--{flag}", getattr(options, flag))
        if options.plot:
            plots.check_plot(options.plot)
        if options.bootstrap == 1:
            raise UserError("--bootstrap 1: must be 0, or at least 2")
        if not self.samples:
            raise UserError("no sample file is given: name the reference and one or more sample files")
        for file in self.samples:
            if not len(file):
                raise UserError(f"{file.path}: has no images, arr_0 must be (N, H, W, 3) uint8")
            if options.num_images and options.num_images > len(file):
                raise UserError(f"--num_images {options.num_images}: {file.path} holds {len(file)}")
        check_reference(reference, options, self.network_options.backend)
        needed = 1 + max([NEIGHBOURS.get(word, 1) for word in options.wanted])
        for file, count in [(file, self._count(file)) for file in self.samples] + [(reference, len(reference))]:
            if 0 < count < needed:
                raise UserError(f"{file.path}: has {count} images, --metrics {options.metrics} needs at least {needed}")

    def _count(self, file: BatchFile) -> int:
        return self.options.num_images or len(file)

    def sides(self, folder: Path) -> tuple[Side, list[Side]]:
        """The reference and the sample files with what the metrics need of them; `folder` takes the features."""
        self.network = self.network or load_network_once(self.network_options)
        with dist_util.together():
            self._check_made_by()
        reference = self._side(self.reference, len(self.reference), folder, wanted=self._reference_features_needed())
        return reference, [self._side(file, self._count(file), folder) for file in self.samples]

    def run(self, folder: Path) -> list[dict[str, Any]]:
        """The results, one for each sample file; none on ranks other than the first. `folder` takes the features."""
        reference, sides = self.sides(folder)
        results = []
        with dist_util.together():
            if dist_util.is_main():
                self._warn(reference, sides)
                compared = [Compared(reference, side, self.options) for side in sides]
                results = [self._result(reference, one) for one in compared]
                if self.options.plot:
                    self._plot(compared, results)
                if self.options.json:
                    write_json(self.options.json, results)
        return results

    def _side(self, file: BatchFile, count: int, folder: Path, wanted: bool = True) -> Side:
        features = extract(file, self.network, folder, self.network_options.batch_size, count) if wanted else None
        return Side(file, count or int(file.value("count") or 0), features)

    def _check_made_by(self) -> None:
        made_by = self.reference.value("backend")
        if made_by is not None and made_by != self.network.name:
            raise UserError(f"{self.reference.path}: its statistics are of the network {made_by!r}, not of "
                            f"{self.network.name!r}: pass another --backend")

    def _reference_features_needed(self) -> bool:
        file, wanted = self.reference, self.options.wanted
        pooled = "pooled" not in file.members and (self.options.plot or any(word in PAIRED for word in wanted))
        return bool(pooled or ("fid" in wanted and not file.statistics())
                    or ("sfid" in wanted and not file.statistics("_s")))

    def _warn(self, reference: Side, sides: list[Side]) -> None:
        if self.network.caveat:
            self.warn(self.network.caveat)
        counts = [side.count for side in (reference, *sides) if side.count]
        if len(set(counts)) > 1:
            self.warn(f"different numbers of images ({_listed(counts)}), on which FID and the others depend")
        sizes = [side.file.resolution for side in (reference, *sides) if len(side.file)]
        if len(set(sizes)) > 1:
            self.warn(f"images of different sizes ({_listed(sizes)}), which the network resizes to its own")

    def _result(self, reference: Side, compared: Compared) -> dict[str, Any]:
        values, intervals = compared.metrics()
        if np.isnan(values.get("is", 0)):
            self.warn(f"{compared.sample.file.path}: a class has probability 0 for some image, so that the Inception "
                      "Score is not a number, as in the official evaluator")
            values["is"] = None         # JSON has no NaN
        return {
            "reference": reference.description(),
            "sample": compared.sample.description(),
            "metrics": values,
            **({"intervals95": intervals, "bootstrap": self.options.bootstrap} if intervals else {}),
            "backend": {"name": self.network.name, "sha256": self.network.fingerprint,
                        **({"dtype": self.network_options.dtype}
                           if find_extractor(self.network_options.backend).has_dtype else {})},
            "protocol": {"precision_recall": self.options.precision_recall, "neighbours": NEIGHBOURS,
                         "inception_score_split": SPLIT_SIZE, "seed": self.options.seed},
            "versions": {"guided_diffusion": __version__, "torch": torch.__version__, "numpy": np.__version__,
                         "scipy": scipy.__version__, "python": platform.python_version()},
        }

    def _plot(self, compared: list[Compared], results: list[dict[str, Any]], shown: int = 10) -> None:
        drawn = []
        for one, result in zip(compared, results, strict=True):
            ranked = np.argsort(-one.neighbourhoods.realism, kind="stable").tolist()
            intervals = [result.get("intervals95", {}).get(word) for word in ("precision", "recall")]
            precision, recall = one.precision_recall
            images = one.sample.file.pick(ranked[:shown] + ranked[:-shown - 1:-1])
            drawn.append(plots.PlottedFile(
                "/".join(one.sample.file.path.parts[-2:]), float(precision.mean()), float(recall.mean()),
                intervals if all(intervals) else None, one.neighbourhoods.sample_distance,
                *np.split(images, 2)))
        plots.plot_evaluation(self.options.plot, drawn, compared[0].neighbourhoods.reference_distance,
                   f"{self.network.name}, reference {self.reference.path.name}")


class Compared:
    """A sample file beside the reference: what the metrics share is computed once, when it is first needed."""

    def __init__(self, reference: Side, sample: Side, options: EvaluatorOptions) -> None:
        self.reference, self.sample, self.options = reference, sample, options

    @cached_property
    def neighbourhoods(self) -> metrics.Neighbourhoods:
        return metrics.neighbourhoods(self.reference.pooled, self.sample.pooled, NEIGHBOURS["precision"],
                                      NEIGHBOURS["density"])

    @cached_property
    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """For each sample and each reference image, whether it is inside the other manifold."""
        if self.options.precision_recall == "exact" and (
                self.options.plot or {"density", "coverage"} & set(self.options.wanted)):
            return self.neighbourhoods.sample_inside, self.neighbourhoods.reference_inside
        return metrics.inside(self.reference.pooled, self.sample.pooled, NEIGHBOURS["precision"],
                              self.options.precision_recall)

    def metrics(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Values, and 95 % intervals where they are asked for, by the words of `--metrics`."""
        values, intervals = {}, {}
        for word in self.options.wanted:
            values[word] = self.value(word)
            if self.options.bootstrap:
                statistic, sizes = self._resampled(word)
                intervals[word] = tuple(metrics.bootstrap(statistic, sizes, self.options.bootstrap, self.options.seed))
        return values, intervals

    def replicates(self, word: str) -> metrics.Replicates:
        """The number of that word and of the options' resamplings: those of equally many images are the same."""
        statistic, sizes = self._resampled(word)
        drawn = metrics.resamplings(sizes, self.options.bootstrap, self.options.seed)
        return metrics.Replicates(self.value(word), statistic(drawn))

    def value(self, word: str) -> float:
        return float(self._value(word))

    def _value(self, word: str) -> float:
        if word == "is":
            return metrics.inception_score(self.sample.features.probabilities, SPLIT_SIZE)
        if word in SUFFIXES:
            reference, sample = (side.statistics(SUFFIXES[word]) for side in (self.reference, self.sample))
            return metrics.frechet_distance(*reference, *sample)
        if word == "kid":
            return metrics.kid(self.reference.pooled, self.sample.pooled, KID_IMAGES, self.options.seed)
        return self._per_image(word).mean()

    def _per_image(self, word: str) -> np.ndarray:
        if word in ("precision", "recall"):
            return self.precision_recall[word == "recall"]
        return self.neighbourhoods.density if word == "density" else self.neighbourhoods.covered

    def _resampled(self, word: str) -> tuple[metrics.Statistic, int | list[int]]:
        count = self.sample.count
        if word == "is":
            splits = [min(SPLIT_SIZE, count - start) for start in range(0, count, SPLIT_SIZE)]
            return metrics.resampled_inception_score(self.sample.features.probabilities, SPLIT_SIZE), splits
        if word in SUFFIXES:
            features = self.sample.features.spatial if SUFFIXES[word] else self.sample.features.pooled
            return metrics.resampled_frechet_distance(*self.reference.statistics(SUFFIXES[word]), features), count
        if word == "kid":
            return (metrics.resampled_kid(self.reference.pooled, self.sample.pooled, KID_IMAGES, self.options.seed),
                    min(count, KID_IMAGES))
        values = self._per_image(word)
        return metrics.resampled_mean(values), len(values)


def _listed(values: list[Any]) -> str:
    """Different values in their order, in words."""
    return ", ".join(map(str, dict.fromkeys(values)))


def summary(results: list[dict[str, Any]]) -> str:
    """What a reader needs: of what the numbers are, then for each file the official lines."""
    first = results[0]
    reference, backend = first["reference"], first["backend"]
    shown = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [f"reference: {_described(reference)}",
             f"network:   {backend['name']}, sha256 {backend['sha256'][:16]}",
             f"protocol:  {first['protocol']['precision_recall']} precision and recall; {shown}"]
    for result in results:
        lines.append(f"sample:    {_described(result['sample'])}")
        for word, value in result["metrics"].items():
            low, high = result.get("intervals95", {}).get(word, (None, None))
            interval = "" if low is None else f"   (95 %: {low:.6g} to {high:.6g})"
            lines.append(f"{NAMES[word]}: {'nan' if value is None else value}{interval}")
    return "\n".join(lines)


def _described(side: dict[str, Any]) -> str:
    size = f" of {side['resolution']}" if "resolution" in side else ""
    count = side["images"] or "an unknown number of"
    return f"{side['file']}, {count} images{size}, statistics {side['statistics']}, sha256 {side['sha256'][:16]}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words, (network, options) = parse_words(argv, Words("FILE", "the reference batch, then the sample files"),
                                            NetworkOptions, EvaluatorOptions, description=__doc__)
    if len(words) < 2:
        raise UserError(f"{len(words)} files given: the reference batch and one or more sample files are needed")
    dist_util.setup_dist()
    with dist_util.together():
        evaluation = Evaluation(words[0], words[1:], network, options, warn=warn)
    with feature_folder(network.cache) as folder:
        results = evaluation.run(folder)
    if results:
        print(summary(results))
    dist_util.shutdown()


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
