"""Making a reference batch: images and the statistics of their features, in the official layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.classes import CLASS_RULES, ClassNames
from guided_diffusion.cli import run_renamed
from guided_diffusion.errors import UserError
from guided_diffusion.files import check_writable
from guided_diffusion.image_datasets import (
    FASHION_MNIST,
    crop_square,
    find_data,
    given_as,
    holds_idx,
    list_images,
    load_arrays,
    named_labels,
    pad_to_frame,
    resize_smaller_side,
)
from guided_diffusion.image_files import Resized, read_image
from guided_diffusion.npz import BatchFile, write_batch
from guided_diffusion.options import option
from guided_diffusion.pixels import to_rounded_uint8
from guided_diffusion.runs.command import say_note
from guided_diffusion.runs.effects import in_words

from .class_accuracy import read_labels
from .extractor_options import ExtractorOptions, load_extractor_once
from .extractors.depth import depth_extractor
from .features import FeatureExtractor, Features, extract, feature_folder, own_folder
from .image_sets import open_images
from .metrics import feature_statistics
from .stored_statistics import settings_text

LABELS, CLASS_NAMES = "arr_1", "class_names"        # arrays of a reference batch
MOST_MOVED = 0.01           # by float16, as a share of how far features lie from their mean; Inception's move by 0.0003


@dataclass(frozen=True)
class ReferenceOptions(ExtractorOptions):
    """The reference batch."""

    keep: str = option("images", "what stands beside the statistics: images, for precision and recall with any "
                       "network; features, for them with this one; or nothing",
                       choices=("images", "features", "nothing"))
    half: bool = option(False, "keep the features in half precision")
    statistics: bool = option(True, "also mean and covariance of the features; False: the images alone, which do for "
                              "every network")
    classes: str = option("", "also keep the classes of a folder's pictures as labels, by folders or by the prefix of "
                          "their names, as for training; unset: no labels", choices=CLASS_RULES)
    num_images: int | None = option(None, "only the first so many images; unset: all", minimum=2)
    image_size: int | None = option(None, "crop pictures of a folder to squares of this many pixels, as for training; "
                                    "unset: they must have one size", minimum=1)

    def useless(self) -> dict[str, str]:
        """The options that have no effect beside the others, and why. Raises UserError as `find_extractor`."""
        idle = super().useless() if self.statistics else dict.fromkeys(
            ("backend", "inception", "device", "dtype"), "--statistics False needs no network")
        return idle if self.keep == "features" else {**idle, "half": f"--keep {self.keep} keeps no features"}


def make_reference(source: str, out: str, options: ReferenceOptions, given: Collection[str] = ()) -> str:
    """Writes the reference batch `out` of the images in `source`, on all ranks together.

    source: an .npz with arr_0, an .npy of images, a .zip of pictures of one size, a folder of pictures (at any depth),
    or a folder of IDX files ("fashion-mnist": where Debian installs them; its test images). Where images are kept, so
    are the labels and the names of classes that a file has. given: the options that the user gave, of which those
    without effect are said. Returns a line that says what was made, "" on ranks other than the first. Raises UserError
    for images and labels that cannot be read, and where `out` cannot be written.
    """
    as_it_is = source not in ("", FASHION_MNIST) and not Path(source).is_dir()     # a file of images of one size
    if not options.statistics and options.keep != "images":
        raise UserError(f"--keep {options.keep}: must be images with --statistics False")
    with given_as(""):
        of_pictures = not as_it_is and not holds_idx(find_data(source))
    for flag in ("classes", "image_size"):
        if getattr(options, flag) and not of_pictures:
            raise UserError(f"--{flag} {getattr(options, flag)}: must be left out, {source} is no folder of pictures")
    say_note(in_words(options.useless(), given))
    made = ""
    dist_util.connect()
    with dist_util.together():
        if dist_util.is_main():
            check_writable("OUT", out, read=[source])
    with feature_folder(options.cache) as folder, own_folder(folder) as own:
        written = own / f"images-{Path(out).name}"
        with dist_util.together(), given_as(""):
            if not as_it_is and dist_util.is_main():
                write_images(source, written, options)
        with dist_util.together():
            images = open_images(source) if as_it_is else BatchFile(written)
            count = options.num_images or len(images)
            if not 2 <= count <= len(images):
                raise UserError(f"{source} holds {len(images)} images: {count} are needed")
            labels = _labels(images, count) if options.classes or options.keep == "images" else {}
        made = _write(images, labels, out, folder, count, options)
    dist_util.shutdown()
    return made


def _labels(images: BatchFile, count: int) -> dict[str, np.ndarray]:
    """Returns the labels of the first `count` images and the names of the classes, as far as the file has them.

    Raises UserError for labels that are none.
    """
    if LABELS not in images.members:
        return {}
    labels, names = named_labels(images.path, read_labels(images, count), where=str(images.path))
    return {LABELS: labels, **({CLASS_NAMES: np.array(names.to_json())} if names else {})}


def _write(images: BatchFile, labels: dict[str, np.ndarray], out: str, folder: Path, count: int,
           options: ReferenceOptions) -> str:
    """Writes the reference batch of the first `count` images, and returns what `make_reference` does.

    labels: what stands beside them, by name.
    """
    arrays: dict[str, np.ndarray] = {}
    network = "images alone"
    if options.statistics:
        extractor = load_extractor_once(options)
        features = extract(images, extractor, folder, options.batch_size, count)
        if dist_util.is_main():
            arrays = _of_network(features, extractor, images, count, options)
        network = extractor.name
    if not dist_util.is_main():
        return ""
    images.check_unchanged()
    kept = _images(images, count, options.batch_size) if options.keep == "images" else None
    write_batch(out, arrays | labels, kept, (count, *images.shape[1:]))
    return f"reference: {out}, {count} images, {network}"


def _images(images: BatchFile, count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the first `count` images in pieces; raises UserError where they have changed since they were opened."""
    for _, batch in images.batches(batch_size, num_images=count):
        yield batch
    images.check_unchanged()            # else they are not those of the features


def _of_network(features: Features, extractor: FeatureExtractor, images: BatchFile, count: int,
                options: ReferenceOptions) -> dict[str, np.ndarray]:
    """Returns what stands in the file of a network: statistics, and perhaps features and depth."""
    arrays = _statistics(features, extractor, count)
    if options.kind.is_own:
        arrays["backend_settings"] = np.array(settings_text(extractor))
    if options.keep == "features":
        arrays["pooled"] = _in_half(features.pooled, extractor) if options.half else features.pooled.astype(np.float32)
    if options.kind.estimates_depth:
        arrays |= depth_extractor(extractor).reference_arrays(images, count)
    return arrays


def _in_half(pooled: np.ndarray, extractor: FeatureExtractor) -> np.ndarray:
    """Returns features (N, D) as float16; raises UserError where it moves them by more than rounding."""
    with np.errstate(over="ignore"):
        half = pooled.astype(np.float16)
    spread = np.linalg.norm(pooled - pooled.mean(axis=0))
    moved = np.linalg.norm(half.astype(np.float64) - pooled)
    if not moved <= MOST_MOVED * spread:
        raise UserError(f"--half True: the features of {extractor.name} are up to {abs(pooled).max():.3g}, differ by "
                        f"{spread / pooled.size**0.5:.3g}, and do not fit into float16; leave it out")
    return half


def _statistics(features: Features, extractor: FeatureExtractor, count: int) -> dict[str, np.ndarray]:
    """Returns the statistics of the features, with the extractor's name and the SHA-256 of its weights."""
    pooled = feature_statistics(features.pooled)
    arrays = {"mu": pooled.mean, "sigma": pooled.covariance}
    if features.spatial.shape[1]:           # networks of users may have none
        spatial = feature_statistics(features.spatial)
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    return {**arrays, "backend": np.array(extractor.name), "backend_sha256": np.array(extractor.fingerprint),
            "count": np.array(count)}


def write_images(source: str, path: Path, options: ReferenceOptions) -> None:
    """Writes the images of a folder into an .npz."""
    folder = find_data(source)
    if holds_idx(folder):
        pixels, classes = load_arrays(folder, "test")
        side = 2 ** int(np.ceil(np.log2(max(pixels.shape[1:]))))
        grey = pad_to_frame(pixels, (1, side, side))
        images = np.repeat(to_rounded_uint8(grey.numpy()).transpose(0, 2, 3, 1), 3, axis=3)
        write_batch(path, {LABELS: classes}, iter([images]), images.shape)
        return
    every = list_images(folder)
    files = every[:options.num_images]
    resized = None if options.image_size is None else Resized(options.image_size)
    first = _pixels(files[0], resized)
    labels: dict[str, np.ndarray] = {}
    if options.classes:
        names = ClassNames.from_images(folder, every, options.classes)      # the first files may be of one class only
        labels = {LABELS: names.numbers(folder, files), CLASS_NAMES: np.array(names.to_json())}
    write_batch(path, labels, _pictures(files, first.shape, resized), (len(files), *first.shape))
    if resized is not None:
        dist_util.say(resized.line(source))


def _pictures(files: list[Path], shape: tuple[int, ...], resized: Resized | None) -> Iterator[np.ndarray]:
    for file in files:
        pixels = _pixels(file, resized)
        if pixels.shape != shape:
            raise UserError(f"{file} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the first picture {shape[1]}x"
                            f"{shape[0]}: pass --image_size to crop all to one size")
        yield pixels


def _pixels(file: Path, resized: Resized | None) -> np.ndarray:
    image = read_image(file, 3)
    if resized is not None:
        resized.look(file, image)
        image = crop_square(resize_smaller_side(image, resized.size), resized.size)
    return np.asarray(image)


if __name__ == "__main__":
    run_renamed("python -m evaluations.make_reference", "make_reference")
