"""Index sets, compared with sorted Python sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.index_sets import IndexSet

# indices near the edges of blocks of 65,536, where an off-by-one would show
near_edges = st.builds(lambda block, offset: max(0, block * 65536 + offset), st.integers(0, 5), st.integers(-2, 2))
cases = st.tuples(st.sets(st.one_of(near_edges, st.integers(0, 400_000)), max_size=60), st.integers(1, 70_000))


@given(cases)
def test_round_trip(case):
    chosen, beyond = case
    numel = max(chosen, default=0) + beyond
    made = IndexSet.from_indices(torch.tensor(sorted(chosen), dtype=torch.int64), numel)
    assert made.to_indices().tolist() == sorted(chosen)
    assert made.to_indices().dtype == torch.int64
    assert (made.count, made.numel) == (len(chosen), numel)
    assert made.low.dtype == torch.int16
    assert [i % 65536 for i in sorted(chosen)] == [low % 65536 for low in made.low.tolist()]
    blocks = (numel + 65535) // 65536
    assert made.counts.tolist() == [sum(i // 65536 == b for i in chosen) for b in range(blocks)]
    assert made.num_bytes == 2 * len(chosen) + 4 * blocks


def test_tensors_of_more_than_two_to_the_31_coordinates():
    indices = torch.tensor([0, 65535, 65536, 2**31 - 1, 2**31, 2**31 + 70_000, 2**33 - 1])
    made = IndexSet.from_indices(indices, 2**33)
    assert torch.equal(made.to_indices(), indices)
    with pytest.raises(IndexError, match=f"flat index {2**33 - 1} is outside a tensor of {2**33 - 1} elements"):
        IndexSet.from_indices(indices, 2**33 - 1)


def test_a_full_block_and_no_index_at_all():
    everything = torch.arange(65536 + 3)
    assert torch.equal(IndexSet.from_indices(everything, 65536 + 3).to_indices(), everything)
    for numel in (0, 5, 65536):
        none = IndexSet.from_indices(torch.empty(0, dtype=torch.int64), numel)
        assert none.to_indices().tolist() == []
        assert none.count == 0


def test_narrow_and_strided_indices_are_taken():
    assert IndexSet.from_indices(torch.tensor([1, 4], dtype=torch.int32), 9).to_indices().tolist() == [1, 4]
    assert IndexSet.from_indices(torch.tensor([1, 0, 4, 0])[::2], 9).to_indices().tolist() == [1, 4]


def test_the_same_coordinates_as_tiles():
    indices = torch.tensor([0, 16, 17 * 33 - 1])
    made = IndexSet.from_indices(indices, 17 * 33)
    tiles = made.to_tiles((17, 33))
    assert tiles.shape == (17, 33)
    assert torch.equal(tiles.to_indices(), indices)
    assert IndexSet.from_tiles(tiles).equals(made)
    with pytest.raises(ValueError, match=r"a set over 561 coordinates is none over a tensor of shape \(17, 32\)"):
        made.to_tiles((17, 32))


def test_equality():
    a, b = (IndexSet.from_indices(torch.tensor([1, 65540]), n) for n in (70_000, 70_001))
    assert a.equals(a.to("cpu"))
    assert not a.equals(b)
    assert not a.equals(IndexSet.from_indices(torch.tensor([4, 65537]), 70_000))
    assert not a.equals(IndexSet.from_indices(torch.tensor([1, 4]), 70_000))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([3, 3], ValueError, "the 2 indices are not strictly ascending"),
        ([1, 5, 4], ValueError, "the 3 indices are not strictly ascending"),
        ([-1, 2], IndexError, "flat index -1 is outside a tensor of 10 elements"),
        ([2, 10], IndexError, "flat index 10 is outside a tensor of 10 elements"),
        ([[1, 2]], ValueError, r"shape \[1, 2\]"),
    ],
)
def test_anything_but_ascending_indices_inside_is_refused(indices, error, message):
    with pytest.raises(error, match=message):
        IndexSet.from_indices(torch.tensor(indices), 10)


@pytest.mark.gpu
def test_on_a_gpu():
    indices = torch.tensor([0, 65535, 65536, 200_000], device="cuda")
    made = IndexSet.from_indices(indices, 200_001)
    assert made.device.type == made.to_indices().device.type == "cuda"
    assert torch.equal(made.to_indices(), indices)
    assert made.to("cpu").to_indices().tolist() == indices.tolist()
