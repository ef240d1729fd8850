"""The model that lm-evaluation-harness finds by its name; importing this module registers it."""

import lm_eval.models  # noqa: F401 (the harness registers its own models only where none is registered yet)
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from bincompress.lm_eval.requests import HarnessRequests


@register_model("bincompress")
class BincompressLM(HarnessRequests, LM):  # type: ignore[misc]
    """`--model bincompress --model_args store=STORE`; the other arguments are those of `HarnessRequests`."""

    def __init__(self, **arguments: object) -> None:
        LM.__init__(self)
        HarnessRequests.__init__(self, **arguments)  # type: ignore[arg-type]
