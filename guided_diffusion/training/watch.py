"""What looks at a training from outside while it goes on, and changes nothing: one that draws samples, for example.

The loop knows nothing of guidance, samplers and metrics, which stand above it: commands give it its watchers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..build import DiffusionOptions, ModelOptions, UpsamplerOptions
from ..late import Tensor

if TYPE_CHECKING:
    from ..classes import ClassNames
    from ..unet import UNetModel


@dataclass(frozen=True)
class Watched:
    """A training, as its watchers see it.

    model: the network; while a watcher looks, its weights are the averages in the file that `weights` names, and it is
    in evaluation mode. out: the folder of the training. count: of the images of the training data. examples: images
    (N, C, H, W) of that data by their numbers, with their labels (see `image_datasets.TrainingImages.at`). class_names:
    of these labels, where they have names. low_res: for an upsampler, of such images the small ones that it is given.
    """

    model: UNetModel
    weights: str
    model_options: ModelOptions | UpsamplerOptions
    diffusion_options: DiffusionOptions
    out: Path
    seed: int
    count: int
    examples: Callable[[Sequence[int]], tuple[Tensor, dict[str, Tensor]]]
    class_names: ClassNames | None
    low_res: Callable[[Tensor], Tensor] | None = None


class Watcher(Protocol):
    """Looks at a training every `interval` steps and after the last one; all ranks call it."""

    @property
    def interval(self) -> int:
        """Steps between two looks, from 1 up."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its options by flag, for config.json."""

    def prepare(self, training: Watched) -> None:
        """Called before the first step. Raises UserError for what cannot work."""

    def look(self, step: int) -> Mapping[str, float | Path]:
        """Looks at the network after so many steps; returns values and pictures for the log, by name, on rank 0."""
