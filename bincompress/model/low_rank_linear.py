"""What the decoder multiplies with where matrices are stored in low-rank form: two products in place of one."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bincompress.model.linear import FEW_TOKENS, Floats, write_product
from bincompress.model.packed_linear import ActivationSettings, Listed
from bincompress.model.threads import over_ranges
from bincompress.process.blas import one_blas_thread
from bincompress.tensors.low_rank import LowRankTensor, signs, signs_at
from cpu_kernels.matmul.activations import quantize
from cpu_kernels.matmul.chained import ChainedProducts
from cpu_kernels.matmul.prepacking import PackedMatrix, Part, prepack_rows
from cpu_kernels.matmul.products import multiply
from cpu_kernels.parallel.workers import Workers

# Of what lies between the products. The second one then takes two thirds of the time that it takes with 8, and its
# rounding is a thousandth of the middle's square, where the factors themselves are off by a tenth or more.
MIDDLE_BITS = 6
_ROWS_AT_ONCE = 512  # whose bits are turned at a time
_TILE_SIGNS = 1 << 20  # that are float32 at a time: 4 MB a thread
_PER_THREAD = 64


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix in low-rank form whose factors, (rank, cols) and (rows, rank), are laid out for a kernel."""

    right: PackedMatrix
    left: PackedMatrix
    column_scale: Floats  # (cols,)
    listed: Listed | None


def low_rank_linear(
    tensors: Sequence[LowRankTensor],
    settings: ActivationSettings,
    workers: Workers,
    kernel: str | None = None,
    own_pages: bool = False,
) -> "LowRankLinear":
    """Return tensors with one input as a matrix; own_pages: its memory is given back as soon as it is not used."""
    return LowRankLinear([_factors(tensor, kernel, own_pages) for tensor in tensors], settings, workers)


def _factors(tensor: LowRankTensor, kernel: str | None, own_pages: bool) -> Factors:
    right, left = lay_out_factors(tensor, kernel, own_pages)
    listed = low_rank_differences(tensor) if tensor.listed_index.size else None
    return Factors(right, left, tensor.column_scale.astype(np.float32), listed)


class LowRankLinear:
    """Matrices in low-rank form with one input, rows one below the other, as products of one plane each.

    Inputs are scaled and quantized, multiplied by the right factor, quantized again, to 6 bits a token and segment, and
    multiplied by the left one.
    """

    tokens_alike: int | None = None  # a token's product is the same beside any number of others

    def __init__(self, factors: Sequence["Factors"], settings: ActivationSettings, workers: Workers) -> None:
        self._pairs = [(one.right, one.left) for one in factors]
        self.rows, self.cols = sum(left.rows for _, left in self._pairs), self._pairs[0][0].cols
        self._in_scale = np.stack([one.column_scale for one in factors])
        self.nbytes = sum(first.nbytes + second.nbytes for first, second in self._pairs) + self._in_scale.nbytes
        self.path = f"low rank {self._pairs[0][0].kernel} {self._pairs[0][0].instruction_set}"
        first_rows = np.cumsum([0, *(left.rows for _, left in self._pairs)])
        self._listed = [
            (int(row), one.listed) for row, one in zip(first_rows, factors, strict=False) if one.listed is not None
        ]
        self._settings, self._workers = settings, workers
        self._of_token: ChainedProducts | None = None  # made when the first token is written: its kernel is loaded then

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrices, (n, rows)."""
        if len(x) == 1:
            if self._of_token is None:
                self._of_token = ChainedProducts(
                    self._pairs, self._settings.bits, self._settings.per, self._workers, MIDDLE_BITS
                )
            result = self._of_token(x, self._in_scale)
        else:
            result = self._of_tokens(x)
        for row, listed in self._listed:
            listed.add(x, result, row)
        return result

    def per_token(self) -> "LowRankLinear":
        """Return the same matrices with one scale for all activations of a token, as some models are trained."""
        found = copy.copy(self)
        found._settings, found._of_token = replace(self._settings, per="token"), None
        return found

    def _of_tokens(self, x: Floats) -> Floats:
        bits, per = self._settings.bits, self._settings.per
        parts = []
        for (first, second), scale in zip(self._pairs, self._in_scale, strict=True):
            middle = multiply(first, quantize(x * scale, bits, per), pool=self._workers)
            parts.append(multiply(second, quantize(middle, MIDDLE_BITS, per), pool=self._workers))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


class DecodedLowRank:
    """A matrix in low-rank form for float32 activations: signs are decoded tile by tile and multiplied."""

    tokens_alike = FEW_TOKENS

    def __init__(self, tensor: LowRankTensor, workers: Workers) -> None:
        self.rows, self.cols = tensor.shape
        self.nbytes = tensor.nbytes
        self.path = "low rank decoded float32"
        self._tensor, self._workers = tensor, workers
        self._listed = low_rank_differences(tensor) if tensor.listed_index.size else None

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix, (n, rows)."""
        tensor = self._tensor
        scaled = x * tensor.column_scale.astype(np.float32)
        middle, result = (np.empty((len(x), size), np.float32) for size in (tensor.rank, self.rows))

        def first(start: int, stop: int, _: int) -> None:
            tile = max(1, _TILE_SIGNS // self.cols)
            for k in range(start, stop, tile):
                part = slice(k, min(stop, k + tile))
                write_product(scaled, signs(tensor.right[part], self.cols), middle[:, part])

        def second(start: int, stop: int, _: int) -> None:
            tile = max(1, _TILE_SIGNS // tensor.rank)
            for row in range(start, stop, tile):
                part = slice(row, min(stop, row + tile))
                write_product(middle, signs(tensor.left_by_rows(part), tensor.rank), result[:, part])

        with one_blas_thread():
            over_ranges(self._workers, first, tensor.rank, _PER_THREAD)
            middle *= np.ldexp(tensor.rank_scale.astype(np.float32), tensor.exponent)
            over_ranges(self._workers, second, self.rows, _PER_THREAD)
        result *= tensor.row_scale.astype(np.float32)
        if self._listed is not None:
            self._listed.add(x, result, 0)
        return result


class LowRankEmbedding:
    """A table of token vectors in low-rank form, of which only the rows that are asked for are decoded."""

    def __init__(self, tensor: LowRankTensor) -> None:
        self._tensor = tensor

    def rows_of(self, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Floats:
        """Return the vectors of these tokens, (n, cols)."""
        tensor, cols = self._tensor, self._tensor.shape[1]
        wanted, places = np.unique(ids, return_inverse=True)
        left = signs_at(tensor.left, wanted).T * np.ldexp(tensor.rank_scale.astype(np.float32), tensor.exponent)
        rows = np.zeros((wanted.size, cols), np.float32)
        tile = max(1, _TILE_SIGNS // cols)
        with one_blas_thread():
            for k in range(0, tensor.rank, tile):
                right = signs(tensor.right[k : k + tile], cols)
                for row, own in zip(rows, left[:, k : k + tile], strict=True):  # alike beside any number of others
                    row += own @ right
        rows *= tensor.row_scale.astype(np.float32)[wanted, None] * tensor.column_scale.astype(np.float32)
        for number, row in enumerate(wanted if tensor.listed_index.size else ()):
            begin, end = np.searchsorted(tensor.listed_index, [row * cols, (row + 1) * cols])
            rows[number, tensor.listed_index[begin:end].astype(np.int64) - row * cols] = tensor.listed_value[begin:end]
        return rows[places]


def low_rank_differences(tensor: LowRankTensor) -> Listed:
    """Return what the listed weights of a matrix are above what its factors say."""
    rows, cols = np.divmod(tensor.listed_index.astype(np.int64), tensor.shape[1])
    difference = np.empty(rows.size, np.float32)
    with one_blas_thread():
        for row in np.unique(rows):
            here = rows == row
            formula = tensor.weights_at(np.array([row]))[0, cols[here]]
            difference[here] = tensor.listed_value[here] - formula
    return Listed(rows, cols, difference)


def lay_out_factors(
    tensor: LowRankTensor, kernel: str | None = None, own_pages: bool = False, family: str | None = None
) -> tuple[PackedMatrix, PackedMatrix]:
    """Return the two matrices, (rank, cols) and (rows, rank); the options are those of `prepack_rows`."""
    rows, cols = tensor.shape
    right = Part(tensor.right[None], np.ascontiguousarray(tensor.rank_scale)[None, :, None])
    turned = [tensor.left_by_rows(slice(row, row + _ROWS_AT_ONCE)) for row in range(0, rows, _ROWS_AT_ONCE)]
    row_scale = np.ascontiguousarray(tensor.row_scale)[None, :, None]
    left = Part(np.concatenate(turned)[None], row_scale, exponent=tensor.exponent)
    return (
        prepack_rows([right], cols, cols, kernel=kernel, own_pages=own_pages, family=family),
        prepack_rows([left], tensor.rank, tensor.rank, kernel=kernel, own_pages=own_pages, family=family),
    )
