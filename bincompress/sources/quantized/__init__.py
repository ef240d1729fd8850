"""Checkpoints that other programs have quantized: which are read, and how their values are computed."""

from bincompress.sources.quantized import fp8, gptq, integers, mxfp4

# What computes the values of an encoded tensor, by the name in its encoding.
DECODERS = {
    "fp8": fp8.decoder,
    "integers": integers.decoder,
    "gptq": gptq.gptq_decoder,
    "awq": gptq.awq_decoder,
    "mxfp4": mxfp4.decoder,
}
