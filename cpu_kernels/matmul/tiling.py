"""Where do the bytes of a stream lie? What follows from a matrix's shape and the rows of a tile alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What a product needs to know of a matrix, beside its bytes."""

    rows: int
    cols: int
    block: int  # columns that share scales
    planes: int
    plane_weights: tuple[float, ...] | None  # of each plane, where all share scales
    has_offset: bool

    @property
    def scale_sets(self) -> int:
        """Sets of scales in a block."""
        return self.planes if self.plane_weights is None else 1


@dataclass(frozen=True)
class Tiling:
    """Where the bytes of a stream lie."""

    tile: int  # rows
    rows: int
    count: int  # planes
    sets: int  # of scales and offsets
    blocks: int
    k_tiles: int
    k_tiles_per_block: int
    k_tile_words: int

    @property
    def tiles(self) -> int:
        """Row tiles, which threads share."""
        return -(-self.rows // self.tile)

    @property
    def block_bytes(self) -> int:
        """Bytes of bits of a whole block."""
        return self.k_tiles_per_block * self.count * self.k_tile_words * 8 * self.tile

    def header(self, half: int) -> int:
        """Return the bytes of scales and offsets of a block."""
        return self.sets * self.tile * (2 if half else 4)

    def tile_bytes(self, half: int) -> int:
        """Return the bytes of a tile."""
        return self.blocks * self.header(half) + self.k_tiles * self.count * self.k_tile_words * 8 * self.tile

    def stream_bytes(self, half: int) -> int:
        """Return the bytes of the whole stream."""
        return self.tiles * self.tile_bytes(half)


def tiling_of(shape: Shape, tile: int) -> Tiling:
    """Return how a matrix is cut, in tiles of so many rows; raises ValueError for a shape that no matrix has."""
    whole_row = shape.block >= shape.cols
    if not whole_row and shape.block % 64:
        raise ValueError(f"block: {shape.block}; expected a multiple of 64 or at least the {shape.cols} columns")
    k_tile_words = 2 if whole_row or shape.block % 128 == 0 else 1
    k_tiles = -(-shape.cols // (64 * k_tile_words))
    if shape.plane_weights is not None and len(shape.plane_weights) != shape.planes:
        raise ValueError(f"plane_weights: {len(shape.plane_weights)} numbers for {shape.planes} planes")
    return Tiling(
        tile=tile,
        rows=shape.rows,
        count=shape.planes,
        sets=shape.scale_sets + shape.has_offset,
        blocks=1 if whole_row else -(-shape.cols // shape.block),
        k_tiles=k_tiles,
        k_tiles_per_block=k_tiles if whole_row else shape.block // (64 * k_tile_words),
        k_tile_words=k_tile_words,
    )
