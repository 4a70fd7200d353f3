"""Block masks, compared with dense numpy arrays and with the file format written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import tiles as reference

from ssrctl.core import tile_bits
from ssrctl.core.mask import BlockMask, TileSet, matrix_shape

SHAPES = [(), (1,), (15,), (16,), (40,), (0,), (0, 5), (3, 0), (16, 16), (17, 33), (5, 3, 7), (2, 2, 3, 4), (33, 1)]
cases = st.tuples(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.5, 1.0]))

pytestmark = pytest.mark.filterwarnings("ignore:Sparse BSR tensor support:UserWarning")


def random_dense(shape, seed, density):
    return np.random.default_rng(seed).random(shape) < density


def same(tiles, dense):
    np.testing.assert_array_equal(tiles.to_dense().numpy(), dense)
    assert tiles.count() == int(np.sum(dense))
    assert bool((tiles.tiles != 0).any(dim=1).all()), "an empty tile was kept"
    assert bool((tiles.tile_ids.diff() > 0).all()), "tiles are out of order"


@given(cases)
def test_every_form_round_trips(case):
    shape, seed, density = case
    dense = random_dense(shape, seed, density)
    tiles = TileSet.from_dense(torch.tensor(dense))
    same(tiles, dense)
    flat = np.flatnonzero(dense)
    assert tiles.to_indices().tolist() == flat.tolist()
    order = np.random.default_rng(seed).permutation(flat)
    same(TileSet.from_indices(shape, torch.tensor(order, dtype=torch.int64)), dense)
    same(TileSet.from_row_pointers(shape, *tiles.row_pointers(), tiles.tiles), dense)
    same(TileSet.from_sparse_bsr(tiles.to_sparse_bsr(), shape), dense)


TALL = [(70, 33), (129, 5), (50, 3, 7), (64, 16), (300,)]


@pytest.mark.parametrize("density", [0.0, 0.004, 0.3, 1.0])
@pytest.mark.parametrize("sparse_tiles", [0, 10**9])
@pytest.mark.parametrize("strip", [1, 16 * 33 * 2, 1 << 22])
@pytest.mark.parametrize("shape", TALL)
def test_the_result_does_not_depend_on_how_it_is_cut(monkeypatch, shape, strip, sparse_tiles, density):
    monkeypatch.setattr(tile_bits, "STRIP", strip)
    monkeypatch.setattr(tile_bits, "_SPARSE_TILES", sparse_tiles)
    dense = random_dense(shape, 7, density)
    dense.flat[-1] = density > 0
    indices = torch.tensor(np.flatnonzero(dense))
    for tiles in (TileSet.from_dense(torch.tensor(dense)), TileSet.from_indices(shape, indices.flip(0))):
        same(tiles, dense)
        assert tiles.to_indices().tolist() == indices.tolist()
        crow, col = tiles.row_pointers()
        assert (crow.tolist(), col.tolist(), tiles.tiles.tolist()) == reference.pack(dense)
        parts = list(tiles.index_parts())
        assert [index for part in parts for index in part.tolist()] == indices.tolist()
        if strip == 1 and density == 1.0:
            assert len(parts) == -(-matrix_shape(shape)[0] // 16)


@given(cases)
def test_the_stored_form_is_the_documented_one(case):
    shape, seed, density = case
    dense = random_dense(shape, seed, density)
    tiles = TileSet.from_dense(torch.tensor(dense))
    crow, col = tiles.row_pointers()
    assert (crow.tolist(), col.tolist(), tiles.tiles.tolist()) == reference.pack(dense)
    assert crow.dtype == col.dtype == torch.int32
    assert tiles.tiles.dtype == torch.uint8


@given(cases)
def test_the_sparse_bsr_form_is_the_padded_matrix(case):
    shape, seed, density = case
    dense = random_dense(shape, seed, density)
    matrix = TileSet.from_dense(torch.tensor(dense)).to_sparse_bsr()
    rows, columns = matrix_shape(shape)
    padded = np.zeros((-(-rows // 16) * 16, -(-columns // 16) * 16), dtype=bool)
    padded[:rows, :columns] = dense.reshape(rows, columns)
    assert matrix.layout == torch.sparse_bsr
    assert tuple(matrix.shape) == padded.shape
    np.testing.assert_array_equal(matrix.to_dense().numpy(), padded)


@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.5, 1.0]), st.floats(0, 1))
def test_algebra_equals_numpy(shape, seed, density, other_density):
    a, b = random_dense(shape, seed, density), random_dense(shape, seed + 1, other_density)
    x, y = (BlockMask.from_dense({"w": torch.tensor(m)}) for m in (a, b))
    same((x | y).tensors["w"], a | b)
    same((x & y).tensors["w"], a & b)
    same((x - y).tensors["w"], a & ~b)
    same((~x).tensors["w"], ~a)
    union = np.sum(a | b)
    assert x.jaccard(y) == (np.sum(a & b) / union if union else 0.0)
    same(x.tensors["w"], a)  # operands are left as they were
    same(y.tensors["w"], b)


def test_counts_over_several_tensors():
    shapes = {"a": (3, 40), "b": (7,), "c": ()}
    mask = BlockMask.from_indices(shapes, {"a": torch.tensor([0, 119]), "c": torch.tensor([0])})
    assert mask.shapes == shapes
    assert (mask.count(), mask.numel, mask.density()) == (3, 128, 3 / 128)
    assert {name: i.tolist() for name, i in mask.to_indices().items()} == {"a": [0, 119], "b": [], "c": [0]}
    # a: 2 tiles of 32 bytes, 2 columns, 2 row pointers; b: 2 row pointers; c: 1 tile, 1 column, 2 row pointers
    assert mask.num_bytes == (64 + 8 + 8) + 8 + (32 + 4 + 8)
    assert BlockMask.empty({}).density() == 0.0
    assert BlockMask.empty(shapes).jaccard(BlockMask.empty(shapes)) == 0.0


@pytest.mark.parametrize("bad", [-1, 10])
def test_indices_outside_are_refused(bad):
    with pytest.raises(IndexError, match=rf"flat index {bad} is outside a tensor of shape \(2, 5\)"):
        TileSet.from_indices((2, 5), torch.tensor([0, bad]))


@pytest.mark.parametrize("indices", [[3, 3], [0, 1, 2, 3, 0], [7] * 300, [7, 7, 6], [7, 7, 8]])
def test_repeated_indices_are_refused(indices):
    with pytest.raises(ValueError, match="duplicates"):
        TileSet.from_indices((2, 5), torch.tensor(indices))


def test_only_bool_is_a_dense_mask():
    with pytest.raises(TypeError, match="bool"):
        TileSet.from_dense(torch.ones(3))


def test_masks_over_other_tensors_do_not_mix():
    a = BlockMask.empty({"w": (3, 4)})
    with pytest.raises(ValueError, match=r"different shapes: \(3, 4\) and \(4, 3\)"):
        a | BlockMask.empty({"w": (4, 3)})
    with pytest.raises(ValueError, match="different tensors: v, w"):
        a & BlockMask.empty({"v": (3, 4)})
    with pytest.raises(ValueError, match="unknown tensors: x"):
        BlockMask.from_indices({"w": (3, 4)}, {"x": torch.tensor([0])})


def test_masks_stay_on_their_device():
    """The meta device stands for one that is not the CPU; it holds no values, so operations stop at the check."""
    away = BlockMask.empty({"w": (3, 4)}, "meta")
    assert away.tensors["w"].device.type == TileSet.empty((), "meta").device.type == "meta"
    assert BlockMask.empty({"w": (3, 4)}).to("meta").tensors["w"].tile_ids.device.type == "meta"
    made = BlockMask.from_indices({"v": (2,), "w": (3, 4)}, {"w": torch.empty(0, dtype=torch.int64, device="meta")})
    assert {tiles.device.type for tiles in made.tensors.values()} == {"meta"}
    here = BlockMask.from_indices({"w": (3, 4)}, {"w": torch.tensor([5])})
    for operation in (lambda: here | away, lambda: away & here, lambda: here - away, lambda: here.jaccard(away)):
        with pytest.raises(
            ValueError, match=r"on different devices, (cpu and meta|meta and cpu): move one with to\(\)"
        ):
            operation()


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    a, b = (torch.tensor(random_dense((130, 70), seed, 0.1)) for seed in (0, 1))
    x, y = TileSet.from_dense(a.cuda()), TileSet.from_dense(b.cuda())
    assert x.device.type == "cuda"
    pairs = [(x.union(y), a | b), (x.intersection(y), a & b), (x.difference(y), a & ~b), (x.complement(), ~a)]
    for tiles, dense in pairs:
        same(tiles.to("cpu"), dense.numpy())
        assert tiles.to_indices().tolist() == np.flatnonzero(dense).tolist()
        assert tiles.count() == int(dense.sum())
    same(TileSet.from_row_pointers((130, 70), *x.row_pointers(), x.tiles).to("cpu"), a.numpy())


def stored(shape=(17, 33)):
    tiles = TileSet.from_dense(torch.ones(shape, dtype=torch.bool))
    crow, col = tiles.row_pointers()
    return crow.clone(), col.clone(), tiles.tiles.clone()


def test_a_bit_in_the_padding_is_refused():
    for tile, byte in ((2, 1), (3, 2), (5, 31)):  # right edge, bottom edge, corner
        crow, col, tiles = stored()
        tiles[tile, byte] |= 0x80
        with pytest.raises(ValueError, match=r"a bit is set outside the tensor of shape \(17, 33\)"):
            TileSet.from_row_pointers((17, 33), crow, col, tiles)


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("crow", lambda t: t[:-1], "do not fit"),
        ("crow", lambda t: t + 1, "do not ascend"),
        ("crow", lambda t: torch.tensor([0, 7, 6], dtype=torch.int32), "do not ascend"),
        ("crow", lambda t: t.float(), "wrong dtypes"),
        ("col", lambda t: t.flip(0), "not in ascending order"),
        ("col", lambda t: t.new_tensor([0, 1, 1, 0, 1, 2]), "not in ascending order"),
        ("col", lambda t: t + 1, "a tile column lies outside 0..2"),
        ("col", lambda t: t - 1, "a tile column lies outside 0..2"),
        ("col", lambda t: t[:-1], "do not fit"),
        ("col", lambda t: t.view(2, 3), "do not fit"),
        ("tiles", lambda t: t[:, :31], "do not fit"),
        ("tiles", lambda t: t.to(torch.int16), "wrong dtypes"),
    ],
)
def test_damaged_stored_forms_are_refused(part, broken, message):
    parts = dict(zip(("crow", "col", "tiles"), stored(), strict=True))
    parts[part] = broken(parts[part])
    with pytest.raises(ValueError, match=message):
        TileSet.from_row_pointers((17, 33), parts["crow"], parts["col"], parts["tiles"])


def test_a_bsr_matrix_with_other_blocks_is_refused():
    dense = torch.ones(32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="blocks of 16x16"):
        TileSet.from_sparse_bsr(dense.to_sparse_bsr((8, 32)), (32, 32))


def test_stored_tiles_without_a_bit_are_dropped():
    crow, col, tiles = stored()
    tiles[1] = 0
    same(TileSet.from_row_pointers((17, 33), crow, col, tiles), _without_tile())


def _without_tile():
    dense = np.ones((17, 33), dtype=bool)
    dense[:16, 16:32] = False
    return dense
