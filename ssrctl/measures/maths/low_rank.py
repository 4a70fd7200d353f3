"""Singular values of a weight matrix, and its largest singular vectors, by the eigenvalues of its Gram matrix.

A matrix is read in pieces of rows and computed with in float64, whatever its dtype, so that besides the matrix itself
only squares of its smaller side are held. Sums, differences and perturbed copies of matrices are made piece by piece
too (``Rows``). All of it runs on the device of the rows, and a GPU's results are a CPU's up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
# Elements converted to float64 at once: 16 MiB.
_PIECE = 1 << 21
# Elements up to which a computed matrix may be kept: 512 MiB in float64, on a GPU 2 GiB.
_HELD, _HELD_ON_GPU = 1 << 26, 1 << 28
# Columns of a block of a Gram matrix.
_GRAM_BLOCK = 512
# Davidson: directions beyond k.
_NEARBY_EXTRA = 10

# Machine epsilon of float32. That of the weights is useless: with bfloat16's 2^-7 numpy's tolerance passes sigma_1 from
# 128 rows on, and every rank would be 0. It is not needed either, since the difference of two 16-bit weights is exact.
EPS = 2.0**-23


@dataclass(frozen=True)
class Rows:
    """A matrix with no fewer rows than columns, made in pieces.

    Attributes:
        shape: (rows, columns), rows >= columns.
        piece: returns rows start:stop as float64 ``[stop - start, columns]`` on ``device``, the same ones every time.
        device: where everything is computed.
    """

    shape: tuple[int, int]
    piece: Callable[[int, int], Tensor]
    device: torch.device = CPU

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, float64 rows), in order."""
        rows, columns = self.shape
        step = max(1, _PIECE // columns)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield start, stop, self.piece(start, stop)

    def held(self) -> Rows:
        """Compute the matrix once and keep it in float64, if that takes no more than 512 MiB (2 GiB on a GPU)."""
        rows, columns = self.shape
        if rows * columns > (_HELD if self.device.type == "cpu" else _HELD_ON_GPU):
            return self
        return plain(torch.cat([piece for _, _, piece in self.pieces()]), self.device)

    def gram(self) -> Tensor:
        """Return ``A^T A``, float64 ``[columns, columns]``; half of it is computed, in blocks of columns."""
        columns = self.shape[1]
        total = self._zeros(columns, columns)
        for _, _, piece in self.pieces():
            for first in range(0, columns, _GRAM_BLOCK):
                last = min(columns, first + _GRAM_BLOCK)
                total[first:last, first:].addmm_(piece[:, first:last].T, piece[:, first:])
        upper = total.triu_().triu(1)
        return total.add_(upper.T)

    def times(self, block: Tensor) -> Tensor:
        """Return ``A X``, ``[rows, b]``, for float64 ``X [columns, b]``."""
        product = self._zeros(self.shape[0], block.shape[1])
        for start, stop, piece in self.pieces():
            torch.mm(piece, block, out=product[start:stop])
        return product

    def normal_times(self, block: Tensor) -> Tensor:
        """Return ``A^T A X`` for float64 ``X [columns, b]``, in one pass over the matrix."""
        product = self._zeros(self.shape[1], block.shape[1])
        for _, _, piece in self.pieces():
            product.addmm_(piece.T, piece @ block)
        return product

    def _zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.float64, device=self.device)


@dataclass(frozen=True)
class LowRank:
    """The k largest singular values of a matrix ``[m, n]`` with their vectors; ``U diag(S) V^T`` reconstructs it.

    Attributes:
        U: left singular vectors, float64 ``[m, k]``, orthonormal.
        S: singular values, float64 ``[k]``, descending.
        V: right singular vectors, float64 ``[n, k]``, orthonormal.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def transposed(self) -> LowRank:
        """Return the decomposition of the transposed matrix."""
        return replace(self, U=self.V, V=self.U)


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a matrix ``[rows, n]``, n <= rows, and all right singular vectors.

    Values below 1e-8 of the largest are noise, since they are square roots of the Gram matrix's eigenvalues.

    Attributes:
        values: float64 ``[n]``, descending.
        basis: float64 ``[n, n]``, the vectors in its columns in the order of the values.
    """

    values: Tensor
    basis: Tensor

    def top(self, rows: Rows, k: int) -> LowRank:
        """Return the k largest, improved by a Rayleigh-Ritz step on the matrix itself.

        Values are then good to about 1e-16 of the largest, the subspace to 1e-16 (sigma_1 / sigma_k)^2 over the relative
        gap after it.
        """
        return _ritz(rows, self.basis[:, :k].flip(1))


def spectrum(rows: Rows) -> Spectrum:
    """Return all singular values and right vectors, by the eigenvectors of the Gram matrix."""
    return eigenvectors(rows.gram())


def eigenvectors(gram: Tensor) -> Spectrum:
    """Return the spectrum of a matrix from its Gram matrix."""
    if gram.device.type == "cpu":
        # numpy's LAPACK, mostly OpenBLAS, takes 14 s for a side of 4096 where torch's takes 23 (one core of an EPYC).
        squares, vectors = map(torch.from_numpy, np.linalg.eigh(gram.numpy()))
    else:
        squares, vectors = torch.linalg.eigh(gram)
    return Spectrum(squares.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1))


def rank_k_svd(matrix: Tensor, k: int) -> LowRank:
    """Return the best rank-k approximation of a matrix.

    Args:
        matrix: ``[m, n]``, any real floating dtype, finite.
        k: 1 <= k <= min(m, n).

    Raises:
        ValueError: not a matrix, or k out of range.
    """
    if matrix.ndim != 2 or not 1 <= k <= min(matrix.shape):
        raise ValueError(f"rank {k} is out of range for a tensor of shape {list(matrix.shape)}")
    rows = upright(matrix)
    found = spectrum(rows).top(rows, k)
    return found if matrix.shape[0] >= matrix.shape[1] else found.transposed()


def upright(matrix: Tensor, device: torch.device | str = "cpu") -> Rows:
    """Return the rows of a stored matrix, transposed if it has fewer rows than columns."""
    return plain(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, device)


def plain(matrix: Tensor, device: torch.device | str = "cpu") -> Rows:
    """Return the rows of a stored matrix ``[m, n]``, m >= n."""
    where = torch.device(device)
    shape = matrix.shape[0], matrix.shape[1]
    return Rows(shape, lambda start, stop: matrix[start:stop].to(where).to(torch.float64), where)


def difference(base: Tensor, tuned: Tensor, device: torch.device | str = "cpu") -> Rows:
    """Return the rows of ``tuned - base``, both ``[m, n]`` with m >= n and of any dtypes, subtracted in float64."""
    ours, theirs = plain(base, device), plain(tuned, device)
    return Rows(ours.shape, lambda start, stop: theirs.piece(start, stop) - ours.piece(start, stop), ours.device)


def singular_values(gram: Tensor) -> Tensor:
    """Return all singular values, float64, descending, from the Gram matrix: those below 1e-8 of the largest are noise."""
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp_(min=0).sqrt_()


def nearby_top_k(
    rows: Rows,
    base: Spectrum,
    k: int,
    *,
    tolerance: float,
    iterations: int,
    normal_times: Callable[[Tensor], Tensor] | None = None,
) -> LowRank | None:
    """Return the top k of a matrix near one that was decomposed, several times as fast as ``spectrum``.

    Block Davidson iteration from the base's vectors: residuals are divided by the differences of the squared singular
    values, in the base's basis, where this is the first order of perturbation theory (Davidson 1975).

    Args:
        rows: the matrix.
        base: of a nearby matrix.
        k: number of directions.
        tolerance: of the angle between the subspaces of the two, relative to that angle, by the size of the next
            correction; corrections within the round-off of the Gram matrix are none.
        iterations: after which the matrix counts as not near.
        normal_times: returns ``A^T A X``; by default that of ``rows``.

    Returns:
        None when the iterations did not reach the tolerance: the matrix is not near.
    """
    multiply = normal_times or rows.normal_times
    columns = rows.shape[1]
    width = min(columns, k + _NEARBY_EXTRA)
    # The Gram matrix is good to this, its eigenvectors to that over the gap of the squares.
    noise = rows.shape[0] * 2.0**-52 * float(base.values[0]) ** 2
    vectors = base.basis[:, :width]
    images = multiply(vectors)
    for _ in range(iterations):
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
        gap = float(squares[k - 1] - squares[k]) if k < width else 0.0
        enough = max(tolerance * turned, noise / gap if gap > noise else 0.0)
        if float(torch.linalg.matrix_norm(step[:, :k], 2)) <= enough:
            return _ritz(rows, vectors[:, :k])
        fresh = torch.linalg.qr(step[:, : columns - width]).Q  # no more than there are dimensions left
        fresh = torch.linalg.qr(fresh - vectors @ (vectors.T @ fresh)).Q
        vectors = torch.cat((vectors, fresh), dim=1)
        images = torch.cat((images, multiply(fresh)), dim=1)
    return None


def _ritz(rows: Rows, right: Tensor) -> LowRank:
    """Return the singular triplets of the matrix within the span of orthonormal ``right [columns, k]``."""
    left, values, turn = torch.linalg.svd(rows.times(right), full_matrices=False)
    return LowRank(left, values, right @ turn.T)
