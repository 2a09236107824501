"""What extractors of users' networks have in common: they are tried on images of noise before their features count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from guided_diffusion.steadiness import Outputs, check_steady, noise_images


class TriedExtractor:
    """Base of extractors whose network may depend on the batch, or on chance, which no metric could make good."""

    def __init__(self) -> None:
        self._tried: set[str] = set()

    def try_once(self, run: Callable[[np.ndarray], Outputs], images: np.ndarray, where: str, what: str = "features",
                 ) -> None:
        """Tries `run` on noise of the size of images (N, H, W, 3), once for each `what`.

        where: how sentences begin. Raises UserError, as `check_steady`, where its outputs are not steady.
        """
        if what not in self._tried:
            noise = noise_images(3, *images.shape[1:3]).mul(255).byte().movedim(1, 3).numpy()
            check_steady(run, noise, where, what)
            self._tried.add(what)
