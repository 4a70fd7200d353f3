"""Masks against numpy on dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.mask import TILE, BlockMask, TileSet, matrix_shape

SHAPES: list[tuple[int, ...]] = [
    (), (1,), (16,), (17,), (300,), (16, 16), (17, 33), (1, 40), (40, 1), (5, 3, 7), (2, 2, 3, 4), (0,), (0, 5), (5, 0)
]  # fmt: skip


def draw(shape: tuple[int, ...], seed: int, density: float) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < density


def tiles_of(array: np.ndarray) -> TileSet:
    return TileSet.from_dense(torch.from_numpy(np.asarray(array)))


shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 10_000)
densities = st.sampled_from([0.0, 0.02, 0.5, 1.0])


@given(shapes, seeds, densities)
def test_conversions_round_trip(shape: tuple[int, ...], seed: int, density: float) -> None:
    array = draw(shape, seed, density)
    tiles = tiles_of(array)
    assert tiles.shape == shape and tiles.numel == array.size and tiles.count() == array.sum()
    assert np.array_equal(tiles.to_dense().numpy(), array)
    assert tiles.to_indices().tolist() == np.flatnonzero(array).tolist()
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(np.flatnonzero(array)))
    for other in (
        TileSet.from_indices(shape, shuffled),
        TileSet.from_sparse_bsr(tiles.to_sparse_bsr(), shape),
        TileSet.from_row_pointers(shape, *tiles.row_pointers(), tiles.tiles),
    ):
        assert other.shape == shape
        assert torch.equal(other.tile_ids, tiles.tile_ids) and torch.equal(other.tiles, tiles.tiles)


@given(shapes, seeds, densities)
def test_stored_form_is_that_of_the_design(shape: tuple[int, ...], seed: int, density: float) -> None:
    """Tile by tile: row by row, least significant bit first, padding zero, empty tiles absent."""
    array = draw(shape, seed, density)
    tiles = tiles_of(array)
    rows, columns = matrix_shape(shape)
    grid = (-(-rows // 16), -(-columns // 16))
    padded = np.zeros((grid[0] * 16, grid[1] * 16), dtype=bool)
    padded[:rows, :columns] = array.reshape(rows, columns)
    crow, col, stored = [0], [], []
    for r in range(grid[0]):
        for c in range(grid[1]):
            block = padded[16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
            if block.any():
                col.append(c)
                stored.append(np.packbits(block.flatten(), bitorder="little").tolist())
        crow.append(len(col))
    got_crow, got_col = tiles.row_pointers()
    assert got_crow.tolist() == crow and got_col.tolist() == col and tiles.tiles.tolist() == stored
    assert got_crow.dtype == got_col.dtype == torch.int32 and tiles.tiles.dtype == torch.uint8
    assert tiles.num_bytes == 32 * len(col) + 4 * len(col) + 4 * len(crow)
    assert np.array_equal(tiles.to_sparse_bsr().to_dense().numpy(), padded)


@given(shapes, seeds, seeds, densities, densities)
def test_set_algebra_equals_numpy(shape: tuple[int, ...], s1: int, s2: int, d1: float, d2: float) -> None:
    a, b = draw(shape, s1, d1), draw(shape, s2, d2)
    one, other = BlockMask({"x": tiles_of(a)}), BlockMask({"x": tiles_of(b)})
    before = one.to_dense()["x"]
    for made, expected in (
        (one | other, a | b),
        (one & other, a & b),
        (one - other, a & ~b),
        (~one, ~a),
    ):
        tiles = made.tensors["x"]
        assert np.array_equal(tiles.to_dense().numpy(), expected)
        assert torch.equal(tiles.tile_ids, tiles.tile_ids.sort().values)
        assert bool((tiles.tiles != 0).any(dim=1).all()), "an empty tile is kept"
    either = (a | b).sum()
    assert one.jaccard(other) == ((a & b).sum() / either if either else 0.0)
    assert torch.equal(one.to_dense()["x"], before), "an operand was changed"


def test_a_mask_of_several_tensors() -> None:
    shapes = {"w": (20, 20), "b": (4,)}
    mask = BlockMask.from_indices(shapes, {"w": torch.tensor([399, 0])})
    assert mask.shapes == shapes and mask.numel == 404 and mask.count() == 2
    assert mask.density() == 2 / 404
    assert mask.to_indices()["w"].tolist() == [0, 399] and mask.to_indices()["b"].tolist() == []
    assert (~mask).count() == 402
    assert BlockMask.empty(shapes).count() == 0 and BlockMask.empty({}).density() == 0.0
    assert mask.jaccard(BlockMask.empty(shapes)) == 0.0 and mask.jaccard(mask) == 1.0


def test_operands_must_fit() -> None:
    mask = BlockMask.empty({"a": (4,), "b": (2, 2)})
    with pytest.raises(ValueError, match=r"different tensors: b, c"):
        mask | BlockMask.empty({"a": (4,), "c": (2, 2)})
    with pytest.raises(ValueError, match=r"different shapes: \(4,\) and \(2, 2\)"):
        mask & BlockMask.empty({"a": (2, 2), "b": (2, 2)})
    with pytest.raises(ValueError, match="unknown tensors: c"):
        BlockMask.from_indices({"a": (4,)}, {"c": torch.tensor([0])})


@pytest.mark.parametrize("index", [-1, 12])
def test_indices_outside_the_tensor_are_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"flat index {index} "):
        TileSet.from_indices((3, 4), torch.tensor([2, index]))


@pytest.mark.parametrize("indices", [[3, 3], [7, 7, 1], [0, 0, 1], [5] * 300])
def test_repeated_indices_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="duplicates"):
        TileSet.from_indices((3, 4), torch.tensor(indices))


def test_only_bool_is_a_mask() -> None:
    with pytest.raises(TypeError, match="float32"):
        TileSet.from_dense(torch.ones(3))


def damaged(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored form of a set over a 20x40 tensor (2x3 tiles), with parts replaced."""
    crow, col = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    tiles = torch.zeros(3, 32, dtype=torch.uint8)
    tiles[:, 0] = 1
    return {"crow": crow, "col": col, "tiles": tiles} | changes


def test_the_undamaged_form_is_read() -> None:
    tiles = TileSet.from_row_pointers((20, 40), **damaged())
    assert tiles.to_indices().tolist() == [0, 32, 16 * 40 + 16]


def bit(tile: int, byte: int, value: int) -> torch.Tensor:
    tiles = damaged()["tiles"]
    tiles[tile, byte] = value
    return tiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crow": torch.tensor([0, 3])}, "do not fit a 2x3 grid"),
        ({"crow": torch.tensor([1, 2, 3])}, "do not ascend"),
        ({"crow": torch.tensor([0, 2, 2])}, "do not ascend"),
        ({"crow": torch.tensor([0, 4, 3])}, "do not ascend"),
        ({"col": torch.tensor([0, 3, 1])}, r"outside 0\.\.2"),
        ({"col": torch.tensor([-1, 2, 1])}, r"outside 0\.\.2"),
        ({"col": torch.tensor([2, 0, 1])}, "ascending"),
        ({"col": torch.tensor([0, 0, 1])}, "ascending"),
        ({"col": torch.tensor([0, 2])}, "do not fit"),
        ({"col": torch.tensor([0.0, 2.0, 1.0])}, "wrong dtypes"),
        ({"tiles": torch.ones(3, 32, dtype=torch.int32)}, "wrong dtypes"),
        ({"tiles": torch.ones(3, 31, dtype=torch.uint8)}, "do not fit"),
        # tile 1 is columns 32..47 of 40: byte 1 is columns 40..47; tile 2 is rows 16..31 of 20: byte 8 is row 20
        ({"tiles": bit(1, 1, 1)}, "outside the tensor"),
        ({"tiles": bit(2, 8, 1)}, "outside the tensor"),
    ],
)
def test_a_damaged_form_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileSet.from_row_pointers((20, 40), **damaged(**change))


def test_the_last_cells_inside_are_no_padding() -> None:
    assert TileSet.from_row_pointers((20, 40), **damaged(tiles=bit(1, 0, 0x80))).to_indices()[1] == 39
    assert TileSet.from_row_pointers((20, 40), **damaged(tiles=bit(2, 7, 0x80))).count() == 4


def test_blocks_of_another_size_are_refused() -> None:
    matrix = torch.eye(16).to_sparse_bsr((8, 8))
    with pytest.raises(ValueError, match=r"16x16, got \[8, 8\]"):
        TileSet.from_sparse_bsr(matrix, (16, 16))


def test_tile_is_what_files_say() -> None:
    assert TILE == 16
