"""How fast does a mixture of experts run? Time per token against reading the bytes of the chosen experts and the rest.

    python -m benchmarks.experts [--layers 6] [--threads 2] [--folder FOLDER] [--json]

A made model of Qwen3-30B-A3B's shapes cut to a few layers (hidden 2048, 128 experts of 768, 8 for each token) with a
vocabulary of 32,768, in two groups per 128 columns, embeddings and head in 4 bits. Every layer has the same random
weights. 6 layers take 7 GB of disk as a checkpoint, and 1 GB as a store.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402

from benchmarks.compression import machine  # noqa: E402
from benchmarks.decoding import bandwidth  # noqa: E402
from benchmarks.synthetic import bfloat16_normal  # noqa: E402
from bincompress.compression.plan import make_plan  # noqa: E402
from bincompress.compression.recipe import load_recipe  # noqa: E402
from bincompress.compression.run import compress  # noqa: E402
from bincompress.inference.load import load_decoder  # noqa: E402
from bincompress.model.config import parse  # noqa: E402
from bincompress.model.decoder import Decoder  # noqa: E402
from bincompress.model.packed_linear import ActivationSettings  # noqa: E402
from bincompress.sources.checkpoint import open_checkpoint  # noqa: E402

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32768,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
PROMPT, TOKENS, REPEATS = 512, 64, 5


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write the checkpoint, a file a layer; the matrices of every layer are the same."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    shapes = parse(config).tensors()
    ends = {name: shape for name, shape in shapes.items() if ".layers." not in name}
    first = {name: shape for name, shape in shapes.items() if ".layers.0." in name}

    def filled(wanted: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        made = {
            name: bfloat16_normal(shape, 0.02, random) if len(shape) == 2 else np.full(shape, 0x3F80, np.uint16)
            for name, shape in wanted.items()
        }
        return {name: bits.view(ml_dtypes.bfloat16) for name, bits in made.items()}

    safetensors.numpy.save_file(filled(ends), folder / "model-00000.safetensors")
    layer = filled(first)
    for number in range(config["num_hidden_layers"]):
        named = {name.replace(".layers.0.", f".layers.{number}."): value for name, value in layer.items()}
        safetensors.numpy.save_file(named, folder / f"model-{number + 1:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def bytes_of_a_token(decoder: Decoder) -> int:
    """Return the bytes that one token reads: of the chosen experts, routers, attention and head."""
    total = decoder.head.nbytes  # type: ignore[attr-defined]
    for layer in decoder.layers:
        total += layer.qkv.nbytes + layer.out.nbytes  # type: ignore[attr-defined]
        experts = layer.experts
        assert experts is not None
        pair = experts.pairs[0]
        total += experts.router.nbytes + 8 * sum(linear.nbytes for linear in pair)  # type: ignore[attr-defined]
    return int(total)


def measure(store: str, threads: int) -> dict[str, Any]:
    """Return medians of a prompt and of tokens one by one, each token another one, so that experts change."""
    loaded = load_decoder(store, threads, ActivationSettings(8))
    decoder, nbytes = loaded.decoder, bytes_of_a_token(loaded.decoder)
    ids = np.random.default_rng(0).integers(0, decoder.config.vocab, PROMPT)
    seen: dict[str, list[float]] = {"prompt": [], "tokens": []}
    for repeat in range(REPEATS + 1):
        cache = decoder.new_cache(PROMPT, "float16")
        begin = time.perf_counter()
        decoder.next_logits(ids, cache)
        middle = time.perf_counter()
        cache = decoder.new_cache(TOKENS, "float16")
        after = time.perf_counter()
        for token in ids[:TOKENS]:
            decoder.next_logits([token], cache)
        end = time.perf_counter()
        if repeat:
            seen["prompt"].append((middle - begin) / PROMPT)
            seen["tokens"].append((end - after) / TOKENS)
    prompt, token = (statistics.median(found) for found in seen.values())
    read = bandwidth(loaded.nbytes, threads)
    return {
        "threads": threads, "packed_bytes": loaded.nbytes, "bytes_of_a_token": nbytes, "read_gb_per_second": read / 1e9,
        "milliseconds_a_token": 1e3 * token, "milliseconds_a_token_of_a_prompt": 1e3 * prompt,
        "time_per_token_over_reading_time": token / (nbytes / read), "prompt_over_token_by_token": token / prompt,
        "kernels": sorted(set(loaded.paths.values())),
    }  # fmt: skip


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="keep the model here, and use the one that is there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, store = folder / "model", folder / "store"
        if not source.exists():
            write_model(source, {**QWEN3_30B_A3B, "num_hidden_layers": options.layers})
        compress(make_plan(open_checkpoint(source), load_recipe(None, {"embeddings": "4bit"})), str(store))
        runs = [measure(str(store), threads) for threads in options.threads]
    if options.json:
        print(json.dumps({"machine": machine(), "runs": runs}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for run in runs:
        print("\n".join(["", *(f"{key:34s} {value}" for key, value in run.items())]))


if __name__ == "__main__":
    main()
