"""GGUF files as a source: the header, the model that it describes, and the values of its tensors.

The `gguf` package, which knows the quantized types, is imported when a value is computed, never before.
"""

from bincompress.sources.gguf import blocks

# What computes the values of an encoded tensor, by the name in its encoding.
DECODERS = {"gguf": blocks.decoder}
