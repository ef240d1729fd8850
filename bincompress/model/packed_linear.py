"""What the decoder multiplies with when the weights are packed, and its table of token vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.model.linear import FEW_TOKENS, Floats, Linear, write_product
from bincompress.model.threads import over_ranges
from bincompress.process.blas import one_blas_thread
from bincompress.tensors.dequantize import dequantize
from bincompress.tensors.packed import PackedTensor
from cpu_kernels.matmul import wide_lookup
from cpu_kernels.matmul.activations import Activations, Per, quantize
from cpu_kernels.matmul.chosen import ChosenProducts
from cpu_kernels.matmul.prepacking import PackedMatrix
from cpu_kernels.matmul.products import MOST_FEW, FewTokensProduct, TokenProduct, multiply
from cpu_kernels.parallel.workers import Workers

_TILE_WEIGHTS = 1 << 20  # weights that are float32 at a time: 4 MB a thread
_ROWS_PER_THREAD = 64


@dataclass(frozen=True)
class ActivationSettings:
    """How inputs of packed matrices are quantized: bits 8 or 6, a scale per token or per token and 128 columns.

    bits 16 leaves them in float32: the weights are then decoded, tile by tile, for every product.
    """

    bits: int = 8
    per: Per = "segment"


@dataclass(frozen=True, eq=False)
class Listed:
    """Single weights that are not what the planes say, as differences from them."""

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    difference: Floats

    def add(self, x: Floats, result: Floats, first_row: int) -> None:
        """Add their share to result (n, rows), whose column `first_row` is the matrix's first row."""
        places: Any = (slice(None), self.rows + first_row)
        np.add.at(result, places, x[:, self.cols] * self.difference)


class PackedLinear:
    """Planes laid out for this CPU, multiplied with quantized activations."""

    tokens_alike: int | None = None  # a token's product is the same beside any number of others

    def __init__(
        self, matrix: PackedMatrix, listed: Sequence[tuple[int, Listed]], settings: ActivationSettings, workers: Workers
    ) -> None:
        self.matrix = matrix
        self.rows, self.cols = matrix.rows, matrix.cols
        self.nbytes = matrix.nbytes
        self.path = f"{matrix.kernel} {matrix.instruction_set}"
        self._listed = tuple(listed)
        self._settings = settings
        self._workers = workers
        self._of_token: TokenProduct | None = None  # made when the first token is written: its kernel is loaded then
        self._of_few: FewTokensProduct | None = None

    def per_token(self) -> "PackedLinear":
        """Return the same matrix with one scale for all activations of a token, as some models are trained."""
        settings = replace(self._settings, per="token")
        return PackedLinear(self.matrix, self._listed, settings, self._workers)

    def quantized(self, x: Floats) -> Activations:
        """Return the activations as this matrix multiplies them; matrices with one input share them."""
        return quantize(x, self._settings.bits, self._settings.per)

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix, (n, rows)."""
        if len(x) > 1:
            return self._of_several(x)
        if self._of_token is None:
            self._of_token = TokenProduct(self.matrix, self._settings.bits, self._settings.per, self._workers)
        return self._with_listed(x, self._of_token(x))

    def _of_several(self, x: Floats) -> Floats:
        if len(x) > MOST_FEW or not wide_lookup.fits(self.matrix) or not x.flags.c_contiguous:
            return self.times(x, self.quantized(x))
        if self._of_few is None:
            self._of_few = FewTokensProduct(self.matrix, self._settings.bits, self._settings.per, self._workers)
        return self._with_listed(x, self._of_few(x))

    def times(self, x: Floats, activations: Activations) -> Floats:
        """Return the product where the activations are quantized already."""
        return self._with_listed(x, multiply(self.matrix, activations, pool=self._workers))

    def alone(self, x: Floats, out: Floats | None = None) -> Floats:
        """Return the product with x (n, cols) by the calling thread alone; other threads may multiply meanwhile.

        out: where it is written, float32 (n, rows), C-contiguous.
        """
        return self._with_listed(x, multiply(self.matrix, self.quantized(x), out))

    def put(self, products: ChosenProducts, number: int) -> bool:
        """Put the matrix among these under a number; return False where it cannot be."""
        return not self._listed and products.put(number, self.matrix, self._settings.bits, self._settings.per)

    def _with_listed(self, x: Floats, result: Floats) -> Floats:
        for first_row, part in self._listed:
            part.add(x, result, first_row)
        return result


class ScaledLinear:
    """A packed matrix whose input channels are scaled before they are quantized."""

    tokens_alike: int | None = None

    def __init__(self, linear: PackedLinear, in_scale: Floats) -> None:
        self.rows, self.cols = linear.rows, linear.cols
        self.nbytes = linear.nbytes + in_scale.nbytes
        self.path = linear.path
        self._linear = linear
        self._in_scale = in_scale

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols), scaled, times the transposed matrix, (n, rows)."""
        return self._linear(x * self._in_scale)


class DecodedLinear:
    """A matrix of many groups (or any, for float32 activations): rows are decoded tile by tile and multiplied."""

    tokens_alike = FEW_TOKENS

    def __init__(self, packed: PackedTensor, workers: Workers) -> None:
        self.rows, self.cols = packed.shape
        self.nbytes = packed.planes.nbytes + packed.coef.nbytes
        self.path = "decoded float32"
        self._packed = packed
        self._workers = workers

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix, (n, rows)."""
        result = np.empty((len(x), self.rows), np.float32)
        tile = max(1, _TILE_WEIGHTS // self.cols)

        def work(start: int, stop: int, _: int) -> None:
            for row in range(start, stop, tile):
                last = min(stop, row + tile)
                write_product(x, dequantize(self._packed, slice(row, last)), result[:, row:last])

        with one_blas_thread():
            over_ranges(self._workers, work, self.rows, _ROWS_PER_THREAD)
        return result


class StackedLinear:
    """Several matrices with one input whose forms differ, rows one below the other."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self.rows = sum(part.rows for part in parts)
        self.cols = parts[0].cols
        self.nbytes = sum(int(getattr(part, "nbytes", 0)) for part in parts)
        limits = [getattr(part, "tokens_alike", FEW_TOKENS) for part in parts]
        self.tokens_alike = min((limit for limit in limits if limit is not None), default=None)

    def __call__(self, x: Floats) -> Floats:
        """Return x (n, cols) times the transposed matrix, (n, rows)."""
        if len(x) == 1:  # each makes its own activations in less time than it takes to hand them on
            return np.concatenate([part(x) for part in self.parts], axis=1)
        shared: Activations | None = None
        results = []
        for part in self.parts:
            if isinstance(part, PackedLinear):
                shared = shared or part.quantized(x)
                results.append(part.times(x, shared))
            else:
                results.append(part(x))
        return np.concatenate(results, axis=1)


class PackedEmbedding:
    """A packed table of token vectors, of which only the rows that are asked for are decoded."""

    def __init__(self, packed: PackedTensor) -> None:
        self._packed = packed

    def rows_of(self, ids: NDArray[np.int64]) -> Floats:
        """Return the vectors of these tokens, (n, cols)."""
        packed = self._packed
        wanted, places = np.unique(ids, return_inverse=True)
        numbers = packed.numbers if packed.numbers.shape[1] == 1 else packed.numbers[:, wanted]
        few = replace(
            packed, planes=np.ascontiguousarray(packed.planes[:, wanted]), numbers=numbers,
            shape=(wanted.size, packed.shape[1]), listed_index=np.empty(0, np.uint64),
            listed_value=np.empty(0, np.float32),
        )  # fmt: skip
        rows = dequantize(few)
        cols = packed.shape[1]
        for number, row in enumerate(wanted if packed.listed_index.size else ()):
            begin, end = np.searchsorted(packed.listed_index, [row * cols, (row + 1) * cols])
            rows[number, packed.listed_index[begin:end].astype(np.int64) - row * cols] = packed.listed_value[begin:end]
        return rows[places]
