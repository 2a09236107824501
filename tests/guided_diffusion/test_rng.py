import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from evaluations.evaluation import EvaluatorOptions
from guided_diffusion.errors import UserError
from guided_diffusion.rng import (
    IMAGE_STREAMS,
    STREAMS,
    image_generator,
    image_labels,
    image_noise,
    seeded_torch,
    stream_generator,
)
from guided_diffusion.runs.options import SampleOptions


def test_noise_of_an_image_is_the_same_in_any_batch_and_order():
    together = image_noise(3, range(6), 10, (1, 4, 5))
    assert together.shape == (6, 1, 4, 5) and together.dtype == torch.float32
    assert torch.equal(image_noise(3, [5, 2], 10, (1, 4, 5)), together[[5, 2]])
    assert torch.equal(image_noise(3, torch.tensor([4]), 10, (1, 4, 5)), together[[4]])


def test_labels_of_an_image_are_the_same_in_any_batch_and_order():
    together = image_labels(3, range(50), 10)
    assert together.shape == (50,) and together.dtype == torch.int64
    assert torch.equal(image_labels(3, [40, 7], 10), together[[40, 7]])


@pytest.mark.parametrize(("seed", "number", "step"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0), (0, 2**40, 0)])
def test_noise_changes_with_seed_number_and_step(seed, number, step):
    first = image_noise(0, [0], 0, (4096,))
    other = image_noise(seed, [number], step, (4096,))
    assert abs(stats.pearsonr(first[0], other[0]).statistic) < 0.08         # 5 standard deviations of independent ones


def test_noise_is_standard_normal_within_an_image_and_across_images_and_steps():
    within = image_noise(0, [7], 3, (20000,))[0]
    across = torch.stack([image_noise(0, range(100), step, (2,)) for step in range(100)])
    for sample in (within, across[..., 0].flatten(), across[..., 1].flatten()):
        assert stats.kstest(sample.double().numpy(), "norm").pvalue > 0.001


def test_neighbouring_images_and_steps_are_independent():
    noise = torch.stack([image_noise(0, range(40), step, (64,)) for step in range(40)])     # (step, image, value)
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[1:, 1:], noise[:-1, :-1])):
        assert abs(stats.pearsonr(a.flatten(), b.flatten()).statistic) < 5 / a.numel() ** 0.5


def test_labels_are_uniform():
    counts = image_labels(0, range(5000), 10).bincount(minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 0.001


def test_streams_of_images_are_independent():
    keys = [(stream, 0) for stream in IMAGE_STREAMS]
    keys += itertools.product(["upsampling", "upsampling start"], [1, 2])
    draws = [image_generator(0, 5, 2, *key).standard_normal(4096) for key in keys]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert abs(correlations).max() < 0.08


def test_the_numbers_themselves_do_not_change():
    """A run can be repeated with a later version: these values are what seed 0 means."""
    expected = [[0.3736333, -1.0456378], [4.2794123, -0.3392039]]
    np.testing.assert_allclose(image_noise(0, [0, 1], 2, (2,)), expected, rtol=1e-6)
    assert image_labels(0, range(12), 10).tolist() == [7, 8, 4, 5, 1, 9, 0, 9, 1, 9, 1, 7]


def test_every_seed_that_is_allowed_has_its_own_numbers():
    seeds = [0, 1, 2**32, 2**63 - 2, 2**63 - 1, 2**63, 2**63 + 1, 2**63 + 1000, 2**64 - 2, 2**64 - 1]
    drawn = {tuple(image_noise(seed, [0], 3, (4,)).flatten().tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)
    for seed in (-1, 2**64, 1.5, None, True):
        with pytest.raises(UserError, match=f"seed {seed}: must be a whole number, at least 0 and at most {2**64 - 1}"):
            image_noise(seed, [0], 0, (4,))


def test_options_refuse_seeds_that_would_repeat_others():
    assert EvaluatorOptions(seed=2**64 - 1).seed == SampleOptions(seed=2**64 - 1).seed == 2**64 - 1
    for options in (EvaluatorOptions, SampleOptions):
        with pytest.raises(UserError, match=f"--seed {2**64}: must be at most {2**64 - 1}"):
            options(seed=2**64)


# Trainings

def first_numbers(stream):
    """What the generators of a stream draw first, at small seeds and indices: the number -> (seed, *indices)."""
    keys = itertools.product(range(3), *[range(4)] * len(STREAMS[stream].indices))
    drawn = {int(stream_generator(stream, *key).integers(2**63)): key for key in keys}
    assert len(drawn) == 3 * 4 ** len(STREAMS[stream].indices)
    return drawn


def test_streams_of_a_training_share_no_key_but_by_their_word():
    for one, other in itertools.combinations(STREAMS, 2):
        shared = first_numbers(one).keys() & first_numbers(other).keys()
        if STREAMS[one].program == STREAMS[other].program:
            assert bool(shared) == (STREAMS[one].word == STREAMS[other].word), (one, other)


def test_no_further_stream_of_a_training_takes_a_word_that_is_taken():
    """The words that carry more than one use do so from before: a new use needs a word of its own."""
    uses = {}
    for name, stream in STREAMS.items():
        uses.setdefault((stream.program, stream.word), set()).add(name)
    assert [names for names in uses.values() if len(names) > 1] == [
        {"order", "training timesteps", "training noise"},
        {"augmentation", "validation timesteps", "validation noise"},
        {"depth batch", "held-out noise"}]


def test_the_numbers_of_a_training_do_not_change():
    """A training can be repeated with a later version: the same numbers as from tuples (seed, word, *indices)."""
    words = {"order": 0, "augmentation": 1, "training timesteps": 0, "training noise": 0, "validation timesteps": 1,
             "validation noise": 1, "weights": 2, "dropout": 3, "depth weights": 0, "depth batch": 1, "depth noise": 2,
             "held-out noise": 1, "label dropout": 4, "depth reading": 0,
             "depth network weights": 0, "depth network batch": 1, "depth label noise": 2,
             "directions": 1}
    assert words.keys() == STREAMS.keys()
    for name, word in words.items():
        indices = tuple(range(5, 5 + len(STREAMS[name].indices)))
        expected = np.random.default_rng((7, word, *indices)).random(4)
        np.testing.assert_array_equal(stream_generator(name, 7, *indices).random(4), expected)


def test_seeded_torch_leaves_the_global_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded_torch("dropout", 0, 3, 1):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded_torch("dropout", 0, 3, 1):
        assert torch.equal(torch.rand(3), inside)
    with pytest.raises(ValueError, match="has the indices"), seeded_torch("dropout", 0, 3):
        pass


def test_methods_of_others_have_numbers_of_their_own_and_unknown_uses_are_told():
    def numbers(stream):
        return image_generator(3, 5, 7, stream).integers(2**63, size=2).tolist()

    assert numbers("own") not in [numbers(stream) for stream in IMAGE_STREAMS if stream != "own"]
    with pytest.raises(UserError, match=r"^stream 'mine': must be one of noise, label, .*, own$"):
        image_generator(0, 0, 0, "mine")
