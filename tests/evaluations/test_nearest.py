"""The samples that lie nearest to a reference."""

import numpy as np

from evaluations.nearest import nearest_neighbours_of


def test_the_nearest_are_found_beside_an_image_that_lies_far_away():
    random = np.random.default_rng(0)
    reference, sample = random.standard_normal((100, 8)), random.standard_normal((60, 8))
    reference[0] = 1e7          # in units of which all other distances are the same in single precision
    squared = ((sample[:, None] - reference[None]) ** 2).sum(axis=2)
    found = nearest_neighbours_of(reference, sample)
    assert found.samples.tolist() == squared.min(axis=1).argsort()[:10].tolist()
    assert found.reference.tolist() == squared.argsort(axis=1)[found.samples, :2].tolist()
