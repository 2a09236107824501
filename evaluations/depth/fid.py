"""dFID of depth maps that were estimated with any network: FID between two sets of them, seen as images.

A file holds depth, (N, H, W) numbers; estimate those of real and of generated images with one and the same network
(arXiv 2212.08861 has a DPT). A file without depth holds grey images of it, arr_0, such as the samples of a depth prior.
Each map becomes an 8-bit image, round((d + 1) * 127.5), with d from -1 to 1: over its own range, or that of
--depth_range. Then they are images as any others for evaluations/evaluator.py, whose options of the network are here
too: Inception of 2015 unless told otherwise. Under mpiexec or torchrun the ranks share the maps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.depth.images import depth_images
from guided_diffusion.depth.pairs import DepthReader
from guided_diffusion.depth.ranges import OWN_RANGE, parse_depth_range
from guided_diffusion.errors import UserError, said_otherwise
from guided_diffusion.files import check_writable, write_json
from guided_diffusion.npz import BatchFile, write_batch
from guided_diffusion.options import Options, option, seed_option

from ..evaluation import Evaluation, evaluation_job
from ..evaluator_options import EvaluatorOptions
from ..extractor_options import ExtractorOptions
from ..features import feature_folder, own_folder
from ..metrics import METRICS
from ..metrics.bootstrap import MOST_RESAMPLINGS

PIECE = 64


@dataclass(frozen=True)
class DepthFidOptions(Options):
    """The comparison."""

    depth_range: str = option(OWN_RANGE, "depths that become -1 and 1: image (each map's own), or NEAR,FAR in the "
                              "units of the files")
    map_size: int | None = option(None, "height and width of the images, to which maps are resized; unset: the smaller "
                                  "side of the maps, which all files must have in common", minimum=2)
    num_images: int | None = option(None, "only the first so many maps of each sample file; unset: all", minimum=2)
    bootstrap: int = option(0, "resamplings for 95 % intervals; 0: none", minimum=0, maximum=MOST_RESAMPLINGS)
    seed: int = seed_option("seed of the resamplings")
    json: str = option("", "also write the results to this file")

    def useless(self) -> dict[str, str]:
        """The options that have no effect beside the others, and why."""
        return {} if self.bootstrap else {"seed": "nothing is drawn"}


class DepthFile:
    """A file of depth maps, or of grey images of them. Raises UserError where the file holds anything else.

    size: height and width of the images that the maps become; None: the smaller side of the maps.
    """

    def __init__(self, path: str, size: int | None = None) -> None:
        self.file = BatchFile(path)
        self.member = "depth" if "depth" in self.file.members or "arr_0" not in self.file.members else "arr_0"
        if self.member not in self.file.members:
            raise UserError(f"{path}: has no depth, which must be (N, H, W) numbers")
        self.shape, dtype = self.file.header(self.member)
        channels = (1, 3) if self.member == "arr_0" else (1,)
        maps = len(self.shape) == 3 or (len(self.shape) == 4 and self.shape[3] in channels)
        if not maps or min(self.shape) < 1 or dtype.kind not in "fiu":
            raise UserError(f"{path}: {self.member} is {self.shape} {dtype}, must be (N, H, W) numbers"
                            f"{', or grey images (N, H, W, 3)' * (self.member == 'arr_0')}")
        if self.shape[0] < 2:
            raise UserError(f"{path}: has {self.shape[0]} depth map, at least 2 are needed")
        self.size = size or min(self.shape[1:3])

    def images(self, limits: tuple[float, float] | None) -> Iterator[np.ndarray]:
        """The depth maps as images, in pieces (n, size, size, 3) uint8.

        limits: NEAR and FAR, or None: each map has its own. Raises UserError as `DepthReader` does, and for images that
        are not grey.
        """
        maps, first = DepthReader(self.size, limits, grey=self.member == "arr_0"), 0
        for depth in self.file.pieces(self.member, PIECE):
            if depth.ndim == 4:
                if depth.shape[3] > 1 and (depth != depth[..., :1]).any():
                    raise UserError(f"{self.file.path}: has no depth, which must be (N, H, W) numbers, and arr_0 holds "
                                    "colour images, not grey ones of depth maps")
                depth = depth[..., 0]
            piece = _DepthPiece(depth, f"{self.file.path}: depth map", first)
            yield depth_images(np.stack([maps.read(piece, index) for index in range(len(depth))]))
            first += len(depth)
        maps.report(self.file.path)

    def write_images(self, path: Path, limits: tuple[float, float] | None) -> None:
        """Writes the depth maps as images; limits as in `images`."""
        write_batch(path, {}, self.images(limits), (self.shape[0], self.size, self.size, 3))


@dataclass(frozen=True)
class _DepthPiece:
    """Depth maps (n, H, W) of a file, from number `first` on, as `DepthReader` asks for them."""

    maps: np.ndarray
    title: str
    first: int

    def depth(self, index: int) -> np.ndarray:
        """One of the maps, (H, W)."""
        return self.maps[index]

    def name(self, index: int) -> str:
        """Its name in messages."""
        return f"{self.title} {self.first + index}"


def depth_fid(reference: str, samples: Sequence[str], extractor: ExtractorOptions, options: DepthFidOptions,
              warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Compares files of depth maps; returns the evaluator's results for each file of samples, with FID as dfid.

    warn: receives each warning, a sentence. On ranks other than the first there are no results. Raises UserError for
    files and options that cannot work.
    """
    dist_util.connect()
    with dist_util.together():
        limits = parse_depth_range(options.depth_range)
        check_writable("--json", options.json, read=[reference, *samples])
        files = _checked_files(reference, samples, options)
    with (evaluation_job(options.json, Path(samples[0])), feature_folder(extractor.cache) as folder,
          own_folder(folder) as own):
        pictures = [own / f"depth-{index}-{file.file.sha256[:16]}.npz" for index, file in enumerate(files)]
        with dist_util.together():
            if dist_util.is_main():
                for file, path in zip(files, pictures, strict=True):
                    file.write_images(path, limits)
        said = _Translation(dict(zip(map(str, pictures), files, strict=True)), extractor)
        with said_otherwise(said):
            with dist_util.together():
                chosen = EvaluatorOptions(metrics="fid", num_images=options.num_images, bootstrap=options.bootstrap,
                                          seed=options.seed)
                evaluation = Evaluation(str(pictures[0]), list(map(str, pictures[1:])), extractor, chosen,
                                        warn=lambda text: warn(said(text)))
            results = evaluation.run(folder)
    for result, file in zip(results, files[1:], strict=bool(results)):
        _describe_depth(result, files[0], file, options)
    if results and options.json:
        write_json(options.json, results)
    return results


class _Translation:
    """What the evaluator says of the images of depth maps, said of the maps: their files, and dFID for its FID."""

    def __init__(self, files: Mapping[str, DepthFile], extractor: ExtractorOptions) -> None:
        """Takes the files by the names of those of their images."""
        self._words = {path: str(file.file.path) for path, file in files.items()}
        self._words[METRICS["fid"].by(extractor.kind.network).label] = METRICS["dfid"].label
        self._pattern = re.compile("|".join(map(re.escape, self._words)))

    def __call__(self, sentence: str) -> str:
        translated = self._pattern.sub(lambda found: self._words[found[0]], sentence)
        return f"{translated}; --map_size sets the size of the maps" if "images of shape" in translated else translated


def _checked_files(reference: str, samples: Sequence[str], options: DepthFidOptions) -> list[DepthFile]:
    """The files, the reference first; raises UserError where one is none, or has too few maps.

    So it does for maps of another size than those of the reference, unless all are resized.
    """
    first, *others = files = [DepthFile(path, options.map_size) for path in (reference, *samples)]
    for file in others:
        if file.size != first.size:
            raise UserError(f"--map_size is not given, and the maps of {file.file.path} would be images of "
                            f"{file.size}x{file.size} pixels, those of {first.file.path} of {first.size}x{first.size}: "
                            "give a size for both")
        if options.num_images and options.num_images > file.shape[0]:
            raise UserError(f"--num_images {options.num_images}: {file.file.path} holds {file.shape[0]}")
    return files


def _describe_depth(result: dict[str, Any], reference: DepthFile, sample: DepthFile, options: DepthFidOptions) -> None:
    """Puts the files of depth maps, dfid and --depth_range into a result, in place of images and fid.

    Raises UserError for a file that has changed since it was opened.
    """
    for name, source in (("reference", reference), ("sample", sample)):
        source.file.check_unchanged()
        result[name] |= {"file": str(source.file.path), "sha256": source.file.sha256}
    for values in (result["metrics"], result.get("intervals95", {})):
        values |= {"dfid": values.pop("fid")} if values else {}
    result["protocol"] = {"depth_range": options.depth_range, "map_size": sample.size, "seed": options.seed}


def in_words(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as text, two lines for each."""
    lines = []
    for result in results:
        low, high = result.get("intervals95", {}).get("dfid", (None, None))
        count = result["sample"]["images"]
        interval = "" if low is None else f"   (95 %, of dFID of {count} depth maps: {low:.6g} to {high:.6g})"
        lines += [f"sample: {result['sample']['file']}, {count} depth maps",
                  f"dFID: {result['metrics']['dfid']}{interval}"]
    return "\n".join(lines)
