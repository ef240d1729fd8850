"""How fast does the engine read prompts and write tokens, beside llama.cpp, in one run?

    pip install llama-cpp-python gguf      # built from source, so that it uses this CPU
    python -m benchmarks.decoding [--threads 1 2] [--repeats 5] [--json]
    python -m benchmarks.decoding --loading --layers 56      # loading a store of 1 GB alone; without llama.cpp
    python -m benchmarks.decoding --store STORE --gguf FILE  # a real model: its store beside a file of llama.cpp's

Without --store the model has Llama-3.2-1B's shapes with a vocabulary of 32,768, random weights, two planes per weight
with blocks of 128 columns, and embeddings and output head in 4 bits; llama.cpp's has TQ2_0 matrices and Q4_0 embeddings
and head.
"""

import argparse
import ctypes
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"

import numpy as np  # noqa: E402

from benchmarks.compression import machine  # noqa: E402
from benchmarks.synthetic import LLAMA_1B, write_checkpoint  # noqa: E402
from bincompress.compression.plan import make_plan  # noqa: E402
from bincompress.compression.recipe import load_recipe  # noqa: E402
from bincompress.compression.run import compress  # noqa: E402
from bincompress.inference.load import load_decoder  # noqa: E402
from bincompress.model.packed_linear import ActivationSettings  # noqa: E402
from bincompress.sources.checkpoint import open_checkpoint, read_weight  # noqa: E402

MODEL = {**LLAMA_1B, "vocab_size": 32768}
_SPIN = 1.0  # seconds: llama.cpp's threads go on spinning for a while, and would take a core from the next run
_TQ2_0, _Q4_0 = 37, 2  # llama.cpp's numbers: a file type, a tensor type
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def bandwidth(nbytes: int, threads: int) -> float:
    """Return bytes per second of reading a buffer of so many bytes, shared among threads."""
    from cpu_kernels.parallel.workers import Workers
    from cpu_kernels.reading import read_bandwidth

    with Workers(threads) as workers:
        return read_bandwidth(workers, nbytes)


def write_gguf(source: Path, target: Path) -> None:
    """Write the checkpoint as a float16 GGUF file without a vocabulary."""
    import gguf

    checkpoint = open_checkpoint(source)
    layers = checkpoint.config["num_hidden_layers"]
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(MODEL["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MODEL["intermediate_size"])
    writer.add_head_count(MODEL["num_attention_heads"])
    writer.add_head_count_kv(MODEL["num_key_value_heads"])
    writer.add_rope_dimension_count(MODEL["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(MODEL["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in checkpoint.tensors.items():
        values = read_weight(tensor).float32()
        stored = values.reshape(-1) if len(tensor.shape) == 1 else values.astype(np.float16)
        writer.add_tensor(gguf_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in top:
        return top[name] + ".weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


class LlamaCpp:
    """llama.cpp through the low-level functions of llama-cpp-python."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        silence_llama()
        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)

    def decode(self, ids: list[int]) -> None:
        """Run tokens after those before."""
        array = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama.cpp failed to decode")

    def reset(self) -> None:
        """Forget everything."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)


@functools.cache
def silence_llama() -> Any:
    """Switch llama.cpp's log off; the callback is kept as long as the process."""
    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    return silence


def quantize_gguf(source: Path, target: Path) -> None:
    """Quantize to TQ2_0, embeddings and head to Q4_0, as llama-quantize does."""
    import llama_cpp

    silence_llama()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = _TQ2_0, 2
    settings.token_embedding_type = settings.output_tensor_type = _Q4_0
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if failed:
        raise SystemExit("llama.cpp failed to quantize")


def timed(work: Callable[[], object], tokens: int) -> float:
    """Return tokens per second of one run."""
    begin = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - begin)


def compare(store: str, gguf: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Run both engines in turn, test by test, and return medians."""
    ours = {bits: load_decoder(store, threads, ActivationSettings(bits)) for bits in (8, 6)}
    theirs = LlamaCpp(gguf, threads)
    ids = np.random.default_rng(0).integers(0, ours[8].decoder.config.vocab, 512).tolist()
    seen: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for test, count in (("pp128", 128), ("pp512", 512), ("tg32", 32)):
            results = {}
            time.sleep(_SPIN)
            theirs.reset()
            if test.startswith("pp"):
                results["llama.cpp"] = timed(lambda count=count: theirs.decode(ids[:count]), count)  # type: ignore[misc]
            else:
                results["llama.cpp"] = timed(lambda: [theirs.decode([i]) for i in ids[:32]], count)  # type: ignore[func-returns-value]
            time.sleep(_SPIN)
            for bits, loaded in ours.items():
                cache = loaded.decoder.new_cache(count, "float16")
                run = loaded.decoder.next_logits
                if test.startswith("pp"):
                    speed = timed(lambda run=run, cache=cache, count=count: run(ids[:count], cache), count)  # type: ignore[misc]
                else:
                    speed = timed(lambda run=run, cache=cache: [run([i], cache) for i in ids[:32]], count)  # type: ignore[misc]
                results[f"{bits} bits"] = speed
            if repeat:
                for engine, speed in results.items():
                    seen.setdefault(f"{test} {engine}", []).append(speed)
    medians = {key: statistics.median(values) for key, values in seen.items()}
    nbytes = ours[8].nbytes
    read = bandwidth(nbytes, threads)
    ratios = {
        f"{test} {bits} bits over llama.cpp": medians[f"{test} {bits} bits"] / medians[f"{test} llama.cpp"]
        for test in ("pp128", "pp512", "tg32")
        for bits in (8, 6)
    }
    for bits in (8, 6):
        ratios[f"time per token over reading time, {bits} bits"] = (1 / medians[f"tg32 {bits} bits"]) / (nbytes / read)
    return {
        "threads": threads, "packed_bytes": nbytes, "read_gb_per_second": read / 1e9, "tokens_per_second": medians,
        "ratios": ratios, "paths": sorted(set(ours[8].paths.values())),
    }  # fmt: skip


def memory_and_loading(store: str) -> dict[str, float]:
    """Bar 5: resident memory of a process that has loaded the store and run it, and load time over reading time."""
    import subprocess
    import sys

    code = (
        "import sys, time; from pathlib import Path\n"
        "from bincompress.inference.load import load_decoder, ActivationSettings\n"
        "store = sys.argv[1]; files = [p for p in Path(store).rglob('*') if p.is_file()]\n"
        "t = time.perf_counter(); total = sum(len(p.read_bytes()) for p in files); reading = time.perf_counter() - t\n"
        "load_decoder(store, 2, ActivationSettings(8))\n"
        "t = time.perf_counter(); load_decoder(store, 2, ActivationSettings(8))\n"
        "print(total, reading, time.perf_counter() - t)"
    )
    # The same where the page cache holds nothing of the store: it comes from the disk both times.
    cold = (
        "import os, sys, time; from pathlib import Path\n"
        "from bincompress.inference.load import load_decoder, ActivationSettings\n"
        "store = sys.argv[1]; files = [p for p in Path(store).rglob('*') if p.is_file()]\n"
        "def forget():\n"
        "    for path in files:\n"
        "        with open(path, 'rb') as file:\n"
        "            os.fsync(file.fileno()); os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "load_decoder(store, 2, ActivationSettings(8)); forget()\n"
        "t = time.perf_counter(); [p.read_bytes() for p in files]; reading = time.perf_counter() - t; forget()\n"
        "t = time.perf_counter(); load_decoder(store, 2, ActivationSettings(8))\n"
        "print(reading, time.perf_counter() - t)"
    )
    memory = (
        "import sys; from bincompress.inference.load import load_decoder, ActivationSettings\n"
        "loaded = load_decoder(sys.argv[1], 2, ActivationSettings(8))\n"
        "cache = loaded.decoder.new_cache(512, 'float16')\n"
        "loaded.decoder.next_logits(list(range(512)), cache)\n"
        "lines = [line.split() for line in open('/proc/self/status') if line.startswith('VmRSS')]\n"
        "print(loaded.nbytes, cache.nbytes, 1024 * int(lines[0][1]))"
    )

    def run(text: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", text, store], capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    runs = sorted((run(code) for _ in range(5)), key=lambda found: found[2] / found[1])
    total, reading, loading = runs[0]
    _, reading_between, loading_between = runs[len(runs) // 2]
    run(memory)  # compiles kernels that are not in the cache yet, which takes 100 MB more
    packed, cache, resident = run(memory)
    reading_cold, loading_cold = sorted((run(cold) for _ in range(3)), key=lambda found: found[1] / found[0])[1]
    return {
        "store_bytes": total, "reading_seconds": reading, "loading_seconds": loading,
        "loading_over_reading": loading / reading,
        "loading_over_reading_median": loading_between / reading_between,
        "reading_from_disk_seconds": reading_cold, "loading_from_disk_seconds": loading_cold,
        "loading_over_reading_from_disk": loading_cold / reading_cold,
        "packed_bytes": packed, "cache_bytes": cache, "resident_bytes": resident,
        "resident_over_packed_and_cache_mb": (resident - packed - cache) / 1e6,
    }  # fmt: skip


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"], help="of the model, if it is made")
    parser.add_argument("--loading", action="store_true", help="only the memory and the time that loading takes")
    parser.add_argument("--folder", type=Path, help="keep the models here, and use those that are there")
    parser.add_argument("--store", help="a store to time instead of that model's, with --gguf")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp runs beside --store")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.store is None) != (options.gguf is None):
        parser.error("--store and --gguf go together")
    if options.store is not None:
        found = _found(options.store, options.gguf, options.threads, options.repeats)
        print(json.dumps(found, indent=1) if options.json else _text(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, store, gguf = folder / "model", folder / "store", folder / "tq2_0.gguf"
        if not source.exists():
            write_checkpoint(source, {**MODEL, "num_hidden_layers": options.layers}, tied=False)
        plan = make_plan(open_checkpoint(source), load_recipe(None, {"embeddings": "4bit"}))
        compress(plan, str(store))
        if not (gguf.exists() or options.loading):
            write_gguf(source, folder / "f16.gguf")
            quantize_gguf(folder / "f16.gguf", gguf)
            (folder / "f16.gguf").unlink()
        threads = [] if options.loading else options.threads
        found = _found(str(store), gguf, threads, options.repeats)
    print(json.dumps(found, indent=1) if options.json else _text(found))


def _found(store: str, gguf: Path, threads: list[int], repeats: int) -> dict[str, Any]:
    return {
        "machine": {**machine(), "threads": threads},
        "runs": [compare(store, gguf, count, repeats) for count in threads],
        "memory_and_loading": memory_and_loading(store),
    }


def _text(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in found["machine"].items())]
    for run in found["runs"]:
        lines += [
            "",
            f"{run['threads']} thread(s), {run['packed_bytes'] / 1e6:.0f} MB packed,"
            f" plain read {run['read_gb_per_second']:.1f} GB/s, {', '.join(run['paths'])}",
            *(f"  {key:24s} {value:8.1f} tokens/s" for key, value in sorted(run["tokens_per_second"].items())),
            *(f"  {key:45s} {value:6.2f}" for key, value in run["ratios"].items()),
        ]
    lines += ["", *(f"{key:36s} {value:16,.3f}" for key, value in found["memory_and_loading"].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
