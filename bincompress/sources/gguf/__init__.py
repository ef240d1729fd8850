"""GGUF files as a source."""

DECODERS = {}
