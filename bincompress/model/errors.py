"""What can be wrong with a model or a prompt when it is to be run."""

from bincompress.errors import BincompressError


class UnsupportedModelError(BincompressError):
    """The model's architecture, or an option of it that changes the arithmetic, is not handled."""


class ConfigError(BincompressError):
    """A value of config.json is missing, of the wrong type or contradicts another."""


class PromptError(BincompressError):
    """The prompt cannot be run: empty, too long, or not expressible with the model's template."""


class NotFiniteError(BincompressError):
    """The model computes NaN or infinity."""


class TokenizerError(BincompressError):
    """The model's tokenizer is missing or cannot be read."""


class TemplateError(BincompressError):
    """The model's chat template is missing, broken or does what a template may not."""


class SamplingError(BincompressError):
    """A sampling setting is out of its range."""
