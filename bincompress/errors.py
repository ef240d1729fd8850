"""Everything that can be wrong with a user's input: one line each, saying what, expected, found and what next."""


class BincompressError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with code 2."""


class CheckpointError(BincompressError):
    """The source is not a checkpoint that can be read as it claims."""


class RecipeError(BincompressError):
    """The settings contradict each other, the recipe or the checkpoint."""


class StoreError(BincompressError):
    """The store cannot be created, read or continued."""


class TensorError(BincompressError):
    """One tensor cannot be packed; the others can."""


class DamagedError(StoreError):
    """Bytes in the store are not those that were written."""
