"""Which fields of generation_config.json would change a model's answers, and are not obeyed here?"""

from collections.abc import Mapping
from typing import Any

from bincompress.model.files import json_object

_NAME = "generation_config.json"
# With the values that change nothing. Source: transformers 5, generation/configuration_utils.py.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "diversity_penalty": (0,), "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1,),
    "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],), "sequence_bias": ([], {}),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "min_length": (0,), "min_new_tokens": (0,), "stop_strings": ([], ""), "guidance_scale": (1,),
    "exponential_decay_length_penalty": ([],), "watermarking_config": ({},), "dola_layers": (),
    "token_healing": (False,), "max_new_tokens": (), "max_length": (20,), "max_time": (), "num_return_sequences": (1,),
    "forced_decoder_ids": ([],),
}  # fmt: skip
_OF_DRAWING: dict[str, tuple[Any, ...]] = {"typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": ()}


def not_obeyed(assets: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return a note that names these fields, nothing where there are none; raises TokenizerError for a broken file."""
    found = json_object(assets, _NAME) or {}
    fields = _NEUTRAL | (_OF_DRAWING if found.get("do_sample") is True else {})
    named = [field for field, neutral in fields.items() if found.get(field) is not None and found[field] not in neutral]
    return (f"{_NAME}: {', '.join(named)}: not obeyed, so that answers may differ",) if named else ()
