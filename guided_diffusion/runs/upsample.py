"""A run that upsamples the images of another: its options, and what differs from a run that begins with noise alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from .. import dist_util
from ..build import UpsamplerOptions
from ..errors import UserError
from ..options import Options, option
from .base_images import OF_BASE, BaseImages
from .labels import ANY_LABELS
from .options import MOST_IMAGES, SampleOptions, command_values, option_classes
from .sample import SamplingRun


@dataclass(frozen=True)
class UpsampleOptions(SampleOptions):
    """The upsampling run."""

    base_samples: str = option("", "the images to upsample: a file of samples (.npz), of which image i gives image i, "
                               "or the output folder of a sampling run")
    num_samples: int = option(0, "number of images; 0: as many as --base_samples holds", minimum=0, maximum=MOST_IMAGES)
    labels: str = option(OF_BASE, "classes of conditional samples: base (those of --base_samples), random, balanced "
                                  "(number modulo classes), none (of a network with a null class), one class by its "
                                  "number or name, or a .npy file of one for each image")


@dataclass(frozen=True)
class UpsamplingRun(SamplingRun):
    """All options of an upsampling run; `run()` makes image i of image i of `--base_samples`."""

    LABELS: ClassVar[tuple[str, ...]] = (OF_BASE, *ANY_LABELS)

    sample: UpsampleOptions
    model: UpsamplerOptions         # type: ignore[assignment]   # what sampling reads of both has the same names

    @classmethod
    def of(cls, options: Sequence[Any]) -> Self:
        """The run of an instance of each of `classes()`, in that order. Classifiers see its large images."""
        run = super().of(options)
        return run.changed(image_size=run.model.image_size)

    @classmethod
    def classes(cls) -> tuple[type[Options], ...]:
        """The classes of the options, in the order of `of`."""
        return (UpsampleOptions, UpsamplerOptions, *option_classes()[1:])

    @classmethod
    def preset_values(cls, given: dict[str, Any]) -> dict[str, Any]:
        """As `SamplingRun.preset_values`, of an upsampler; raises UserError also for another `--image_size`."""
        values = command_values({name: value for name, value in given.items() if name != "image_size"}, "upsampler")
        size = {**values, **given}.get("large_size", UpsamplerOptions().large_size)
        if given.get("image_size", size) != size:
            raise UserError(f"--image_size {given['image_size']}: an upsampler makes images of --large_size, which is "
                            f"{size}; leave it out")
        return {**values, "image_size": size}

    def base_images(self) -> BaseImages:
        """The images that this run upsamples. Raises UserError where they cannot be used."""
        return BaseImages(self.sample.base_samples, self.model.small_size, self.model.in_channels)

    def run(self) -> Path | None:
        """As `SamplingRun.run`, of all images of `--base_samples` where no number is given."""
        dist_util.connect()
        with dist_util.together():
            count = len(self.base_images())
        return super(UpsamplingRun, self.changed(num_samples=self.sample.num_samples or count).placed()).run()
