"""The largest singular values and vectors of a weight matrix, exactly or by a randomised method that states its error.

A matrix is read in pieces of rows and computed with in float64, whatever its dtype, so that besides the matrix itself
only a square of its smaller side is held. Sums, differences and perturbed copies of matrices are made piece by piece
too (``Rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Up to this smaller side everything is exact; beyond, a decomposition takes minutes and gigabytes.
EXACT_SIDE = 4096
# Elements converted to float64 at once: 16 MiB.
_PIECE = 1 << 21
# Elements up to which a computed matrix may be kept: 64 MiB in float64.
_HELD = 1 << 23
# Block Krylov: directions beyond k, blocks in a cycle, cycles, and the error relative to sigma_k that is good enough.
_OVERSAMPLING = 0.25
_DEPTH = 8
_CYCLES = 3
_TARGET = 1e-7
# Davidson: directions beyond k, and iterations after which a matrix counts as not near.
_NEARBY_EXTRA = 10
_NEARBY_ITERATIONS = 5

# Machine epsilon of float32. That of the weights is useless: with bfloat16's 2^-7 numpy's tolerance passes sigma_1 from
# 128 rows on, and every rank would be 0. It is not needed either, since the difference of two 16-bit weights is exact.
EPS = 2.0**-23


@dataclass(frozen=True)
class Rows:
    """A matrix with no fewer rows than columns, made in pieces.

    Attributes:
        shape: (rows, columns), rows >= columns.
        piece: returns rows start:stop as float64 ``[stop - start, columns]``, the same ones every time.
    """

    shape: tuple[int, int]
    piece: Callable[[int, int], Tensor]

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, float64 rows), in order."""
        rows, columns = self.shape
        step = max(1, _PIECE // columns)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield start, stop, self.piece(start, stop)

    def held(self) -> Rows:
        """Compute the matrix once and keep it in float64, if that takes no more than 64 MiB."""
        rows, columns = self.shape
        if rows * columns > _HELD:
            return self
        return plain(torch.cat([piece for _, _, piece in self.pieces()]))

    def gram(self) -> Tensor:
        """Return ``A^T A``, float64 ``[columns, columns]``."""
        total = torch.zeros(self.shape[1], self.shape[1], dtype=torch.float64)
        for _, _, piece in self.pieces():
            total.addmm_(piece.T, piece)
        return total

    def times(self, block: Tensor) -> Tensor:
        """Return ``A X``, ``[rows, b]``, for float64 ``X [columns, b]``."""
        product = torch.empty(self.shape[0], block.shape[1], dtype=torch.float64)
        for start, stop, piece in self.pieces():
            torch.mm(piece, block, out=product[start:stop])
        return product

    def transposed_times(self, block: Tensor) -> Tensor:
        """Return ``A^T X``, ``[columns, b]``, for float64 ``X [rows, b]``."""
        product = torch.zeros(self.shape[1], block.shape[1], dtype=torch.float64)
        for start, stop, piece in self.pieces():
            product.addmm_(piece.T, block[start:stop])
        return product

    def normal_times(self, block: Tensor) -> Tensor:
        """Return ``A^T A X`` for float64 ``X [columns, b]``, in one pass over the matrix."""
        product = torch.zeros(self.shape[1], block.shape[1], dtype=torch.float64)
        for _, _, piece in self.pieces():
            product.addmm_(piece.T, piece @ block)
        return product


@dataclass(frozen=True)
class LowRank:
    """The k largest singular values of a matrix ``[m, n]`` with their vectors; ``U diag(S) V^T`` reconstructs it.

    Attributes:
        U: left singular vectors, float64 ``[m, k]``, orthonormal.
        S: singular values, float64 ``[k]``, descending.
        V: right singular vectors, float64 ``[n, k]``, orthonormal.
        exact: computed from the whole spectrum, to round-off.
        error: of the randomised method, an upper bound, in units of the singular values, on the residual
            ``max(||A V - U S||_2, ||A^T U - V S||_2)``: each value is as close to a singular value of the matrix, and
            the subspaces are within asin(error / gap) of singular subspaces (Wedin 1972). None when exact, and from
            ``nearby_top_k``, whose tolerance the caller sets.
        values: all min(m, n) singular values, float64, descending; None unless exact.
        basis: the vectors of the shorter side that go with ``values``, all of them, ``[min(m, n), min(m, n)]``; None
            unless exact.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    exact: bool
    error: float | None
    values: Tensor | None = None
    basis: Tensor | None = None

    def transposed(self) -> LowRank:
        """Return the decomposition of the transposed matrix."""
        return replace(self, U=self.V, V=self.U)


def rank_k_svd(matrix: Tensor, k: int, *, seed: int) -> LowRank:
    """Return the best rank-k approximation of a matrix.

    Exact while the smaller side is at most ``EXACT_SIDE``, or k more than a tenth of it: eigenvectors of the Gram
    matrix in float64, then one Rayleigh-Ritz step on the matrix itself. Values are good to about 1e-16 of the largest,
    the subspace to 1e-16 (sigma_1 / sigma_k)^2 over the relative gap after it. Otherwise by randomised block Krylov
    iteration (Halko et al. 2011, arXiv:0909.4061; Musco and Musco 2015, arXiv:1504.05477), with the residual as
    ``error``.

    Args:
        matrix: ``[m, n]``, any real floating dtype, finite.
        k: 1 <= k <= min(m, n).
        seed: of the random start; without effect when exact.

    Raises:
        ValueError: not a matrix, or k out of range.
    """
    if matrix.ndim != 2 or not 1 <= k <= min(matrix.shape):
        raise ValueError(f"rank {k} is out of range for a tensor of shape {list(matrix.shape)}")
    if matrix.shape[0] < matrix.shape[1]:
        return top_k(plain(matrix.T), k, seed=seed).transposed()
    return top_k(plain(matrix), k, seed=seed)


def plain(matrix: Tensor) -> Rows:
    """Return the rows of a stored matrix ``[m, n]``, m >= n."""
    return Rows((matrix.shape[0], matrix.shape[1]), lambda start, stop: matrix[start:stop].to(torch.float64))


def difference(base: Tensor, tuned: Tensor) -> Rows:
    """Return the rows of ``tuned - base``, both ``[m, n]`` with m >= n and of any dtypes, subtracted in float64."""
    return Rows(
        (base.shape[0], base.shape[1]),
        lambda start, stop: tuned[start:stop].to(torch.float64) - base[start:stop].to(torch.float64),
    )


def top_k(rows: Rows, k: int, *, seed: int, start: Tensor | None = None, cycles: int = _CYCLES) -> LowRank:
    """Return the ``rank_k_svd`` of a matrix given in pieces.

    Args:
        start: right vectors ``[columns, b]`` of a matrix near this one, from which the randomised method starts.
        cycles: maximum of the randomised method.
    """
    columns = rows.shape[1]
    if columns <= EXACT_SIDE or _DEPTH * _width(k) > columns:
        squares, vectors = torch.linalg.eigh(rows.gram())
        values = squares.flip(0).clamp_(min=0).sqrt_()
        left, top, right = _ritz(rows, vectors[:, -k:])
        # The largest are known better from the matrix itself than from its square.
        values[:k] = top
        return LowRank(left, top, right, True, None, values, vectors.flip(1))
    return _block_krylov(rows, k, seed, start, cycles)


def singular_values(rows: Rows) -> Tensor:
    """Return all singular values, float64, descending, by the Gram matrix: those below 1e-8 of the largest are noise."""
    squares: Tensor = torch.linalg.eigvalsh(rows.gram())
    return squares.flip(0).clamp_(min=0).sqrt_()


def spectral_norm(rows: Rows, *, seed: int) -> float:
    """Return the largest singular value; of a large matrix an upper bound on it, by the randomised method."""
    if rows.shape[1] <= EXACT_SIDE:
        return float(singular_values(rows)[0])
    found = _block_krylov(rows, 1, seed, None, _CYCLES)
    return float(found.S[0]) + (found.error or 0.0)


def nearby_top_k(rows: Rows, base: LowRank, k: int, *, tolerance: float) -> LowRank | None:
    """Return ``top_k`` of a matrix near one that was decomposed exactly, several times as fast.

    Block Davidson iteration from the base's vectors: residuals are divided by the differences of the squared singular
    values, in the base's basis, where this is the first order of perturbation theory (Davidson 1975).

    Args:
        rows: the matrix.
        base: of a nearby matrix, exact.
        k: number of directions, at most those of ``base``.
        tolerance: of the angle between the subspaces of the two, relative to that angle, by the size of the next
            correction.

    Returns:
        None when a few iterations did not reach the tolerance: the matrix is not near.
    """
    assert base.values is not None and base.basis is not None
    columns = rows.shape[1]
    width = min(columns, k + _NEARBY_EXTRA)
    vectors = base.basis[:, :width]
    images = rows.normal_times(vectors)
    for _ in range(_NEARBY_ITERATIONS):
        inner = vectors.T @ images
        squares, turn = torch.linalg.eigh((inner + inner.T) / 2)
        squares, turn = squares[-width:].flip(0), turn[:, -width:].flip(1)
        vectors, images = vectors @ turn, images @ turn
        beyond = base.basis[:, width:]
        # Where the order has changed, a difference of the wrong sign: any small one will do, as columns are scaled.
        gaps = (squares - base.values[width:].square()[:, None]).clamp_(min=1e-12 * float(squares[0]))
        step = beyond @ (beyond.T @ (images - vectors * squares) / gaps)
        step -= vectors @ (vectors.T @ step)
        turned = float(torch.linalg.matrix_norm(base.basis[:, k:].T @ vectors[:, :k], 2))
        if float(torch.linalg.matrix_norm(step[:, :k], 2)) <= tolerance * turned:
            left, values, right = _ritz(rows, vectors[:, :k])
            return LowRank(left, values, right, False, None)
        fresh = torch.linalg.qr(step).Q
        fresh = torch.linalg.qr(fresh - vectors @ (vectors.T @ fresh)).Q
        vectors = torch.cat((vectors, fresh), dim=1)
        images = torch.cat((images, rows.normal_times(fresh)), dim=1)
    return None


def _ritz(rows: Rows, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular triplets of the matrix within the span of orthonormal ``right [columns, k]``."""
    left, values, turn = torch.linalg.svd(rows.times(right), full_matrices=False)
    return left, values, right @ turn.T


def _width(k: int) -> int:
    """Return the columns of a block that finds k directions."""
    return k + max(10, int(_OVERSAMPLING * k))


def _block_krylov(rows: Rows, k: int, seed: int, start: Tensor | None, cycles: int) -> LowRank:
    columns = rows.shape[1]
    width = min(columns, _width(k))
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    if start is not None:
        block[:, : start.shape[1]] = start[:, :width]
    for _ in range(cycles):
        block = _cycle(rows, torch.linalg.qr(block).Q)
        left, values, right = _ritz(rows, block[:, :k])
        # The other residual, A V - U S, is round-off after the Ritz step.
        error = float(torch.linalg.matrix_norm(rows.transposed_times(left) - right * values, 2))
        if error <= _TARGET * float(values[-1]):
            break
    return LowRank(left, values, right, False, error)


def _cycle(rows: Rows, block: Tensor) -> Tensor:
    """Run one cycle from an orthonormal block ``[n, b]``; return the best Ritz vectors of A^T A ``[n, b]``, orthonormal."""
    columns, width = block.shape
    basis, images = block, rows.normal_times(block)
    for _ in range(min(_DEPTH, columns // width) - 1):
        last = images[:, -width:]
        fresh = last - basis @ (basis.T @ last)
        if float(fresh.norm()) <= 1e-13 * float(last.norm()):
            break  # the span is invariant
        # Once more, since the round-off that the first projection left is blown up where the remainder is small.
        fresh = torch.linalg.qr(fresh).Q
        fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh)).Q
        basis = torch.cat((basis, fresh), dim=1)
        images = torch.cat((images, rows.normal_times(fresh)), dim=1)
    inner = basis.T @ images
    vectors: Tensor = torch.linalg.eigh((inner + inner.T) / 2).eigenvectors
    return basis @ vectors[:, -width:].flip(1)
