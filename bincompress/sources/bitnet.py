"""BitNet b1.58: what its linear layers multiply with, of packed ternary weights or of those that a model rounds itself.

Source: transformers, integrations/bitnet.py. The layers round their inputs, too: `model.config` obeys that.

- linear_class "bitlinear": packed weights, divided by weight_scale.
- "autobitlinear", quantization_mode "offline": packed weights (or floats), multiplied by weight_scale.
- "autobitlinear", "online": plain weights w, of which the layer makes round(w / m) * m, clipped to one step, with m the
  mean of all |w|.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import CheckpointError
from bincompress.sources.mapping import ITEM_BYTES, map_floats, map_items
from bincompress.tensors.weight import Encoding, TensorSource, Weight, encoded

Fill = Callable[[int, int, NDArray[np.float32]], None]  # computes rows start .. stop into an array (stop - start, cols)

_A_BYTE = 4  # weights; the matrix has as many times the packed rows, and each quarter of its rows is two bits
_LEAST_MEAN = np.float32(1e-5)
_AT_ONCE = 1 << 22  # weights whose magnitudes are summed at a time
_WHERE = "config.json: quantization_config"


def is_bitnet(config: Mapping[str, Any]) -> bool:
    """Return whether config.json says that linear layers are BitNet's."""
    declared = config.get("quantization_config")
    return isinstance(declared, Mapping) and declared.get("quant_method") == "bitnet"


def checked(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return linear_class and quantization_mode; raises CheckpointError for what is not known."""
    declared = config["quantization_config"]
    linear, mode = declared.get("linear_class", "bitlinear"), declared.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear"):
        raise CheckpointError(f"{_WHERE}: linear_class {linear!r:.40}; expected bitlinear or autobitlinear")
    if mode not in ("offline", "online"):
        raise CheckpointError(f"{_WHERE}: quantization_mode {mode!r:.40}; expected offline or online")
    if declared.get("use_rms_norm"):
        raise CheckpointError(f"{_WHERE}: use_rms_norm, a norm in every linear layer, is not supported")
    unchanged = declared.get("modules_to_not_convert")
    if unchanged is not None and unchanged != ["lm_head"]:
        raise CheckpointError(f"{_WHERE}: modules_to_not_convert = {unchanged!r:.80} is not supported; only lm_head is")
    return linear, mode


def ternary(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSource]
) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    """Return the tensors with linear layers as what they multiply with, and a note of how they are read.

    config.json stays as it is: the decoder reads from it that inputs are rounded. Raises CheckpointError for shapes and
    dtypes that cannot be.
    """
    if not is_bitnet(config):
        return dict(tensors), ()
    linear, mode = checked(config)
    online = linear == "autobitlinear" and mode == "online"
    found, packed, rounded = dict(tensors), 0, 0
    for name, tensor in tensors.items():
        if not is_layer(name, tensor.shape):
            continue
        if online:
            if tensor.dtype not in ITEM_BYTES:
                floats = ", ".join(ITEM_BYTES)
                raise CheckpointError(f"{name}: {tensor.dtype}; {_WHERE}: quantization_mode online expects {floats}")
            encoding = Encoding("BitNet (absmean)", "absmean", (("weight", tensor),))
            found[name] = encoded(name, "F32", tensor.shape, encoding)
            rounded += 1
            continue
        found[name] = _scaled(tensor, found.pop(f"{name}_scale", None), divided=linear == "bitlinear")
        packed += 1
    if not packed + rounded:
        raise CheckpointError(f"{_WHERE} says bitnet, but there are no linear layers; remove it if that is right")
    what = (
        f"the weights of {rounded} linear layers are those that BitNet makes of the stored ones (absmean, ternary)"
        if online
        else f"{packed} linear layers are read from BitNet's weights and their scales"
    )
    return found, (f"{what}; their inputs are rounded to 8 bits a token, as the model was trained",)


def _scaled(tensor: TensorSource, scale: TensorSource | None, divided: bool) -> TensorSource:
    name = tensor.name
    if scale is None:
        raise CheckpointError(f"{name}: {name}_scale is missing, which BitNet's weights need")
    if scale.shape not in ((), (1,)) or scale.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{scale.name}: {scale.dtype} {list(scale.shape)}; expected one number, {', '.join(ITEM_BYTES)}"
        )
    rows, cols = tensor.shape
    # -1, 0 and 1 times a scale has its dtype; quotients, and what floats become, are float32.
    dtype = "F32" if divided or tensor.dtype != "U8" else scale.dtype
    parts = (("weight", tensor), ("scale", scale))
    options = (("divided", divided),)
    if tensor.dtype == "U8":
        return encoded(name, dtype, (_A_BYTE * rows, cols), Encoding("BitNet (packed)", "bitnet", parts, options))
    if tensor.dtype not in ITEM_BYTES or divided:
        raise CheckpointError(f"{name}: {tensor.dtype}; expected BitNet's packed weights, U8")
    return encoded(name, dtype, (rows, cols), Encoding("BitNet (scaled)", "bitnet", parts, options))


def is_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is the weight of one of the linear layers."""
    return name.endswith(".weight") and len(shape) == 2 and ".layers." in name


def exported(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a checkpoint that has what linear layers multiply with, and scales of 1."""
    if not is_bitnet(config):
        return dict(config)
    how = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    return {**config, "quantization_config": how}


def decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows: the weights times their scale, or divided by it."""
    encoding = source.encoding
    assert encoding is not None
    parts = dict(encoding.parts)
    stored, number = map_items(parts["weight"]), map_floats(parts["scale"]).reshape(())
    divided = encoding.option("divided")
    if not np.isfinite(number) or (divided and number == 0):
        raise CheckpointError(f"{parts['scale'].name}: {number}; expected a finite number other than 0")
    factor = np.float32(1.0) / number if divided else np.float32(number)
    count = len(stored)

    def fill(start: int, stop: int, values: NDArray[np.float32]) -> None:
        if parts["weight"].dtype == "U8":
            rows = np.arange(start, stop)
            bits = (stored[rows % count] >> (2 * (rows // count)).astype(np.uint8)[:, None]) & np.uint8(3)
            np.subtract(bits, np.float32(1.0), out=values, casting="unsafe")
        else:
            values[:] = Weight(stored[start:stop], parts["weight"].dtype).float32()
        np.multiply(values, factor, out=values)

    return fill


def absmean_decoder(source: TensorSource) -> Fill:
    """Return what computes the values of rows: the stored weights in steps of the mean magnitude, at most one."""
    encoding = source.encoding
    assert encoding is not None
    part = dict(encoding.parts)["weight"]
    weight = Weight(map_items(part), part.dtype)
    step, total = max(1, _AT_ONCE // weight.shape[1]), 0.0
    for row in range(0, weight.shape[0], step):
        total += float(np.sum(np.abs(weight.float32(slice(row, row + step))), dtype=np.float64))
    # As transformers computes it: the inverse of the mean, in float32.
    inverse = np.float32(1.0) / max(np.float32(total / weight.bits.size), _LEAST_MEAN)

    def fill(start: int, stop: int, values: NDArray[np.float32]) -> None:
        np.multiply(weight.float32(slice(start, stop)), inverse, out=values)
        np.clip(np.rint(values, out=values), -1.0, 1.0, out=values)
        np.divide(values, inverse, out=values)

    return fill


DECODERS: dict[str, Callable[[TensorSource], Fill]] = {"bitnet": decoder, "absmean": absmean_decoder}
