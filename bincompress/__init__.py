"""bincompress: language models in a few binary planes, for CPUs."""

__version__ = "0.1.0"
