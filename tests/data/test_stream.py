"""Every process and every resumed run takes the samples of one unbroken process."""

from itertools import islice

import pytest

from harmony.data.stream import Stream


def take(stream: Stream, count: int) -> list[tuple[int, int]]:
    return list(islice(stream, count))


def test_each_pass_is_a_permutation_of_its_own():
    """Guards the shuffle: every item once a pass, another order each pass and each seed."""
    pairs = take(Stream(10, 4, seed=1), 40)
    assert [p for p, _ in pairs] == list(range(40))
    passes = [[i for _, i in pairs[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert passes[0] != [i for _, i in take(Stream(10, 4, seed=2), 10)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batches_of_one_process(world):
    """Guards DDP: the ranks together see what one process with the whole batch sees, batch by batch."""
    batch = 6 // world
    one = take(Stream(7, 6, seed=5), 60)
    ranks = [take(Stream(7, batch, seed=5, rank=r, world=world), 10 * batch) for r in range(world)]
    for n in range(10):
        assert [pair for rank in ranks for pair in rank[n * batch : (n + 1) * batch]] == one[n * 6 : (n + 1) * 6]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_stream_goes_on(rank):
    """Guards exact resume: starting at global batch n gives what the unbroken stream gives from there on."""
    whole = take(Stream(10, 4, 3, rank, 2), 60)
    assert take(Stream(10, 4, 3, rank, 2, start=7), 32) == whole[28:]
