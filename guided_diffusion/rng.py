"""Every use of random numbers that a result depends on, and how its key is built from the seed.

Random numbers are functions of keys, never of what was drawn before: image i of a run depends on (seed, i) alone, not
on batch, rank or restarts, and step s of a training on (seed, s). There are two kinds of streams.

Images (`IMAGE_STREAMS`), by the counter-based Philox: the key is (seed, image), the counter (0, stage, step, word). The
words differ, so no two uses share a number. The stage is 0 but in upsampling: there it is how often the images had been
upsampled before, so that no two upsamplers in a row share one. Drawing counts in the first place, which never is full.

Trainings and evaluations (`STREAMS`), by NumPy's SeedSequence of (seed, word, *indices), which takes missing indices
for zeros. Uses of one program and one word share keys, like the order of epoch e and the timesteps of step e of a
training. They draw numbers of different kinds from them; words of their own would change what each seed has meant in
every training so far. A new use takes a word that its program has not yet: a test refuses anything else.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import UserError
from .late import Tensor, torch
from .options import MAX_SEED, shortened

IMAGE_STREAMS = {
    "noise": 0,         # of x_T and of each step of a sampler
    "label": 1,         # the class of an image, where --labels is random
    "mask": 2,          # tokens that a random mask of self-attention guidance takes, with the seed 0
    "depth": 3,         # tau and eta of depth prior guidance
    "scene": 4,         # all of a rendered scene
    "independent label": 5,     # the class that independent condition guidance takes at a step
    "embedding": 6,     # noise of time step guidance
    "upsampling": 7,    # noise of x_T and of each step where images are upsampled: not that of the smaller ones
    "likelihood": 8,    # noise of the image at each step, whose likelihood is bounded
    "start": 9,         # of x_T where it is not to depend on the number of steps
    "upsampling start": 10,     # the same where images are upsampled
    "own": 11,          # of methods of guidance that are not of this library
}


class Stream(NamedTuple):
    """One use of random numbers in a program: the word and the indices that its key has after the seed."""

    program: str
    word: int
    indices: tuple[str, ...] = ()


IMAGE_TRAINING, DEPTH_TRAINING = "training on images", "training of depth predictors"
DEPTH_READING = "depth images by a predictor"
DEPTH_NETWORKS = "training of depth networks on generated images"
EVALUATION = "evaluation"

STREAMS = {
    "order": Stream(IMAGE_TRAINING, 0, ("epoch",)),                         # permutation of the images
    "augmentation": Stream(IMAGE_TRAINING, 1, ("batch",)),                  # flips and crops
    "training timesteps": Stream(IMAGE_TRAINING, 0, ("step",)),
    "training noise": Stream(IMAGE_TRAINING, 0, ("step", "image")),
    "validation timesteps": Stream(IMAGE_TRAINING, 1, ("batch",)),
    "validation noise": Stream(IMAGE_TRAINING, 1, ("batch", "image")),
    "weights": Stream(IMAGE_TRAINING, 2),
    "dropout": Stream(IMAGE_TRAINING, 3, ("step", "rank")),
    "label dropout": Stream(IMAGE_TRAINING, 4, ("step",)),                  # images that lose their label
    "depth weights": Stream(DEPTH_TRAINING, 0),
    "depth batch": Stream(DEPTH_TRAINING, 1, ("step",)),                    # which images, and which draws of each
    "depth noise": Stream(DEPTH_TRAINING, 2, ("image", "draw")),            # timestep and noise
    "held-out noise": Stream(DEPTH_TRAINING, 1, ("image", "step")),         # of the images that measure accuracy
    "depth reading": Stream(DEPTH_READING, 0, ("image",)),                  # timestep and noise
    "depth network weights": Stream(DEPTH_NETWORKS, 0),
    "depth network batch": Stream(DEPTH_NETWORKS, 1, ("step",)),            # which images, and which are mirrored
    "depth label noise": Stream(DEPTH_NETWORKS, 2, ("image", "draw")),
    "directions": Stream(EVALUATION, 1),        # of MIND; word 0 alone would give the numbers of default_rng(seed)
}


def image_generator(seed: int, image_id: int, step: int = 0, stream: str = "noise", stage: int = 0,
                    ) -> np.random.Generator:
    """The generator of one image (its index in the run, >= 0) at one step, for one use in IMAGE_STREAMS.

    stage: how often the image was upsampled before, where it is upsampled. Raises UserError for what `checked_seed`
    refuses: it would give the numbers of another seed; and for a use that is none of these.
    """
    if stream not in IMAGE_STREAMS:
        raise UserError(f"stream {shortened(stream)}: must be one of {', '.join(IMAGE_STREAMS)}")
    key = np.array([checked_seed(seed), image_id], np.uint64)         # of a list, NumPy would make float64 from 2^63 on
    counter = np.array([0, stage, step, IMAGE_STREAMS[stream]], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def checked_seed(seed: int) -> int:
    """A seed of images, also one of NumPy, as an int. Raises UserError but for whole numbers from 0 to 2^64 - 1."""
    with contextlib.suppress(TypeError):
        if not isinstance(seed, bool) and 0 <= (found := operator.index(seed)) <= MAX_SEED:
            return found
    raise UserError(f"seed {shortened(seed)}: must be a whole number, at least 0 and at most {MAX_SEED}")


def image_numbers(what: str, numbers: Sequence[int] | Tensor) -> list[int]:
    """Numbers of images, which are keys, as a list. Raises UserError, beginning with `what`, where they are none."""
    given: Any = numbers.tolist() if isinstance(numbers, Tensor) else numbers
    with contextlib.suppress(TypeError):
        found = [operator.index(number) for number in given]
        if all(0 <= number < 2**63 for number in found):
            return found
    raise UserError(f"{what} {shortened(given)}: must be whole numbers from 0 up, the places of the images in the run")


def image_noise(seed: int, image_ids: Sequence[int], step: int, shape: Sequence[int], stream: str = "noise",
                stage: int = 0) -> Tensor:
    """Standard normal noise for one use in IMAGE_STREAMS, (len(image_ids), *shape) float32 on the CPU.

    stage: as in `image_generator`.
    """
    return torch.from_numpy(np.stack([
        image_generator(seed, int(image_id), step, stream, stage).standard_normal(tuple(shape), dtype=np.float32)
        for image_id in image_ids]))


def image_labels(seed: int, image_ids: Sequence[int], num_classes: int) -> Tensor:
    """Uniform labels, (len(image_ids),) int64 in [0, num_classes)."""
    return torch.tensor([int(image_generator(seed, int(image_id), stream="label").integers(num_classes))
                         for image_id in image_ids], dtype=torch.int64)


def stream_generator(stream: str, seed: int, *indices: int) -> np.random.Generator:
    """The generator of one use in STREAMS, at its indices."""
    return np.random.default_rng(_sequence(stream, seed, indices))


@contextlib.contextmanager
def seeded_torch(stream: str, seed: int, *indices: int, device: torch.device | None = None) -> Iterator[None]:
    """PyTorch's global random numbers as one use in STREAMS, at its indices, put back as they were at the end.

    device: a GPU whose numbers are meant too.
    """
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(int(_sequence(stream, seed, indices).generate_state(1, np.uint64)[0]))
        yield


def _sequence(stream: str, seed: int, indices: Sequence[int]) -> np.random.SeedSequence:
    known = STREAMS[stream]
    if len(indices) != len(known.indices):
        raise ValueError(f"stream {stream!r}: has the indices {known.indices}, not {len(indices)} of them")
    return np.random.SeedSequence((seed, known.word, *map(int, indices)))
