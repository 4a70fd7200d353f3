"""Memory of masks in each form: all masks of a training run at once, and one mask at every density.

The shapes are those of Qwen3-1.7B (1.72e9 coordinates); the gradients are drawn, one tensor at a time:

- random: every coordinate is as likely as any other
- clustered: |a_i b_j x| with log-normal row and column scales (sigma 1) and normal x, as of a layer whose
  inputs and outputs differ in size; the largest 4% are protected, then come the steps' sets by size

A question's bookkeeping is the protected set (4%), the claimed set, and T = 20 disjoint step sets of B / T of
the unprotected coordinates, B = 5%. What KronosOpt holds: one bit per coordinate for each of the first two
(``core.bits``), two bytes per index for the step sets (``core.index_sets``). Bit-packed tiles (``core.mask``)
are the form of files and of set algebra.

The paper's table names Qwen3-1.7B for its 18.4 GB dense and 9.8 GB in blocks; its text arrives at the former as
21 masks of 7e9 coordinates at one bit each. Both are printed as they stand, beside what the true shapes give.

    python benchmarks/mask_memory.py [--layers 28] [--spread random clustered]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator

import torch
from common import goal, machine, peak_rss_bytes, table
from torch import Tensor

from ssrctl.core.bits import bits_from_indices
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.mask import TILE, TileSet
from ssrctl.io.packed_numbers import pack_indices

T, BUDGET, PROTECTED = 20, 0.05, 0.04
PAPER = {"dense bool": "18.4", "BSR bool": "9.7", "KronosOpt": "9.8 (its BSR and cache)"}
FORMS = ("dense bool", "bitset", "BSR bool", "our BSR", "int64 indices", "int32 indices", "index set")
_CHUNK = 1 << 24

Bands = list[Tensor]  # ascending flat indices: the protected set, then the steps' in order


def qwen3_shapes(layers: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of Qwen3-1.7B's trainable tensors; embeddings are tied."""
    hidden, intermediate, query, key, head = 2048, 6144, 16 * 128, 8 * 128, 128
    yield (151936, hidden)
    for _ in range(layers):
        yield from ((query, hidden), (key, hidden), (key, hidden), (hidden, query), (head,), (head,))
        yield from ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,), (hidden,))
    yield (hidden,)


def shares(protected: float, steps: list[float]) -> Tensor:
    """Return the cumulative share of all coordinates after the protected set and each step; steps share the rest."""
    return torch.tensor([protected, *(share * (1 - protected) for share in steps)], dtype=torch.float64).cumsum(0)


def random_bands(shape: tuple[int, ...], upto: Tensor, generator: torch.Generator) -> Bands:
    """Draw for each coordinate, independently, at most one band."""
    numel, total = int(torch.tensor(shape).prod()), float(upto[-1])
    found = []
    for start in range(0, numel, _CHUNK):
        draws = torch.rand(min(_CHUNK, numel - start), generator=generator)
        chosen = (draws < total).nonzero().flatten()
        found.append((chosen + start, torch.bucketize(draws[chosen].double(), upto)))
    return _split(found, upto.numel())


def clustered_bands(shape: tuple[int, ...], upto: Tensor, generator: torch.Generator) -> Bands:
    """Draw bands of falling magnitude |a_i b_j x|; quantiles are those of a sample of a million."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape
    a, b = (torch.randn(size, generator=generator).exp() for size in (rows, columns))
    sample_rows = torch.randint(rows, (1_000_000,), generator=generator)
    sample_columns = torch.randint(columns, (1_000_000,), generator=generator)
    noise = torch.randn(1_000_000, generator=generator).abs()
    sample = (a[sample_rows] * b[sample_columns] * noise).sort(descending=True).values
    edges = sample[(upto * (sample.numel() - 1)).long()]
    found = []
    height = max(1, _CHUNK // columns)
    for top in range(0, rows, height):
        strip = a[top : top + height, None] * b
        strip *= torch.randn(strip.shape, generator=generator)
        magnitudes = strip.abs_().flatten()
        chosen = (magnitudes > edges[-1]).nonzero().flatten()
        found.append((chosen + top * columns, torch.bucketize(-magnitudes[chosen], -edges)))
    return _split(found, upto.numel())


def _split(found: list[tuple[Tensor, Tensor]], bands: int) -> Bands:
    indices, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return [indices[labels == band] for band in range(bands)]


SPREADS = {"random": random_bands, "clustered": clustered_bands}


def sizes(shape: tuple[int, ...], indices: Tensor) -> Counter[str]:
    """Count the bytes of one set over one tensor, per form."""
    tiles = TileSet.from_indices(shape, indices)
    index_bytes = tiles.num_bytes - tiles.tiles.numel()  # int32 columns and row pointers
    made = {
        "dense bool": tiles.numel,
        "bitset": bits_from_indices(indices, tiles.numel).numel(),
        "BSR bool": TILE * TILE * tiles.tile_ids.numel() + index_bytes,
        "our BSR": tiles.num_bytes,
        "int64 indices": 8 * indices.numel(),
        "int32 indices": 4 * indices.numel(),
        "index set": IndexSet.from_indices(indices, tiles.numel).num_bytes,
    }
    return Counter(made)


def whole_run(spread: str, layers: int) -> tuple[int, Counter[str], Counter[str]]:
    """Return (coordinates, bytes of all sets per form, bytes that KronosOpt holds by part)."""
    generator = torch.Generator().manual_seed(0)
    upto = shares(PROTECTED, [BUDGET / T] * T)
    numel, forms, ours = 0, Counter[str](), Counter[str]()
    for shape in qwen3_shapes(layers):
        protected, *steps = SPREADS[spread](shape, upto, generator)
        claimed = torch.cat([protected, *steps]).sort().values  # claims start as the protected set
        of_protected, of_claimed, of_steps = sizes(shape, protected), sizes(shape, claimed), Counter[str]()
        for indices in steps:
            of_steps.update(sizes(shape, indices))
        numel += of_claimed["dense bool"]
        forms.update(of_protected + of_claimed + of_steps)
        ours.update({"protected": of_protected["bitset"], "claimed": of_claimed["bitset"]})
        ours.update({"step sets": of_steps["index set"]})
    return numel, forms, ours


def by_density() -> None:
    """Print the bytes per coordinate of one set over a 6144x2048 tensor, and per selected weight in a mask file."""
    shape, rows, of_files = (6144, 2048), [], []
    for spread, bands in SPREADS.items():
        for density in (1e-5, 1e-4, 1e-3, 0.0025, 0.01, 0.05, 0.2, 0.5):
            (indices,) = bands(shape, torch.tensor([density], dtype=torch.float64), torch.Generator().manual_seed(0))
            found = sizes(shape, indices)
            least = min(found.values())
            cells = [f"{found[f] / (6144 * 2048):.5f}" + ("*" if found[f] == least else " ") for f in FORMS]
            rows.append([spread, f"{density:.3%}", *cells])
            in_files = (found["our BSR"], pack_indices([indices], 6144 * 2048).numel())
            of_files.append([spread, f"{density:.3%}", *(f"{size / indices.numel():.2f}" for size in in_files)])
    print("\nbytes per coordinate of one set over a 6144x2048 tensor, by density (* the smallest)")
    print(table(["drawn", "density", *FORMS], rows))
    print("\nbytes per selected weight in a mask file (tiles are kept above 25%)")
    print(table(["drawn", "density", "tiles (plain)", "packed gaps (small)"], of_files))
    goal("bytes per selected weight, packed gaps, random 1%", float(of_files[4][3]), at_most=1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--spread", nargs="+", choices=SPREADS, default=list(SPREADS))
    arguments = parser.parse_args()
    print(machine())
    worst = 0.0
    for spread in arguments.spread:
        numel, forms, ours = whole_run(spread, arguments.layers)
        print(f"\n{spread}: {numel / 1e9:.3f}e9 coordinates; protected, claimed and {T} step sets, all in one form")
        rows = [[form, f"{forms[form] / 1e9:.2f}", f"{forms[form] / numel:.3f}", PAPER.get(form, "")] for form in FORMS]
        total = sum(ours.values())
        rows.append(["KronosOpt", f"{total / 1e9:.2f}", f"{total / numel:.3f}", PAPER["KronosOpt"]])
        rows += [[f"  {part}", f"{size / 1e9:.2f}", f"{size / numel:.3f}", ""] for part, size in ours.items()]
        print(table(["form", "1e9 bytes", "bytes per parameter", "paper's figure"], rows))
        worst = max(worst, total / 1e9)
    by_density()
    print(f"\npeak memory of this script: {peak_rss_bytes() / 2**30:.1f} GiB")
    goal("1e9 bytes of protected, claimed and 20 step sets, Qwen3-1.7B, B = 5%", worst, at_most=1.0)


if __name__ == "__main__":
    main()
