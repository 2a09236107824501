"""Chunks of a run and some of them, without lists."""

import itertools

import pytest

from guided_diffusion.runs.chunks import Chunks, Indices


@pytest.mark.parametrize(("total", "size"), [(7, 3), (6, 3), (1, 5), (5, 1), (4, 4)])
def test_chunks_are_the_ranges_of_a_list(total, size):
    wanted = [range(first, min(first + size, total)) for first in range(0, total, size)]
    chunks = Chunks(total, size)
    assert list(chunks) == wanted == [chunks[index] for index in range(len(chunks))]
    for index in (-1, len(chunks)):
        with pytest.raises(IndexError):
            chunks[index]


@pytest.mark.parametrize("others", [[], [0], [3], [1, 2], [0, 3], [0, 1, 2, 3], [2, 0, 0]])
def test_indices_are_those_that_are_left(others):
    wanted = [index for index in range(4) if index not in others]
    indices = Indices.without(4, others)
    assert list(indices) == wanted == [indices[place] for place in range(len(indices))]
    assert [number in indices for number in range(-1, 5)] == [number in wanted for number in range(-1, 5)]
    assert Indices.of([list(span) for span in indices.spans]) == indices
    with pytest.raises(IndexError):
        indices[len(wanted)]


def test_images_of_some_chunks():
    chunks = Chunks(7, 3)
    for others in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in range(4)):
        indices = Indices.without(3, others)
        assert chunks.images_in(indices) == sum(len(chunks[index]) for index in indices)


def test_billions_of_images_take_no_list():
    chunks = Chunks(10**10, 4)
    todo = Indices.without(len(chunks), [5, 10**9])
    assert (len(chunks), len(todo), chunks.images_in(todo)) == (25 * 10**8, 25 * 10**8 - 2, 10**10 - 8)
    assert (todo[5], todo[10**9 - 1], todo[len(todo) - 1]) == (6, 10**9 + 1, len(chunks) - 1)
    assert chunks[todo[0]] == range(4) and len(todo.spans) == 3
