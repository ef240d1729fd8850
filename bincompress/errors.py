"""Everything that can be wrong with a user's input: one line each, saying what, expected, found and what next."""

_LONGEST = 900  # characters of a message; what it quotes of a file may be of any length


class BincompressError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with code 2."""

    def __str__(self) -> str:
        """Return the message as one line that can be printed: its middle is left out where it is long."""
        line = " ".join(super().__str__().split("\n")).encode("utf-8", "backslashreplace").decode("utf-8")
        if len(line) <= _LONGEST:
            return line
        return f"{line[: _LONGEST * 2 // 3]} ... {line[-_LONGEST // 4 :]}"


class CheckpointError(BincompressError):
    """The source is not a checkpoint that can be read as it claims."""


class RecipeError(BincompressError):
    """The settings contradict each other, the recipe or the checkpoint."""


class StoreError(BincompressError):
    """The store cannot be created, read or continued."""


class TensorError(BincompressError):
    """One tensor cannot be packed; the others can."""


class LossError(TensorError):
    """A method that gives every weight exactly cannot for this tensor: the message says which weight, and why."""


class DamagedError(StoreError):
    """Bytes in the store are not those that were written."""
