"""The real lm-evaluation-harness on tasks of local files: bincompress gives what the `hf` backend gives."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bincompress.inference.load import load
from tests.chat_stores import make_store
from tests.conftest import DEMO_MODEL
from tests.serving import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval, which is not installed"),
]

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = [
    ("The scheduler decides which process", [" runs next", " a table of", " is", " the of"], 0),
    ("A table in a database has rows and", [" purple", " columns", " columns and an index", " kernel"], 1),
    ("A table in a database has rows and", [" nothing", " the", " columns", "."], 2),
    ("In Python, a list is a sequence of ", ["objects", "seas", "rows of the kernel", "x"], 0),
    ("The kernel maps each page to a", [" frame", " song of the sea", " poem", " cook"], 0),
]
TEXT = (ROOT / "docs" / "format.md").read_text("utf-8")
TASKS = ["local_choices", "local_text", "local_written"]
SHARED = """task: local_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
CHOICES = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WHOLE = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
WRITTEN = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs:
  until: ["."]
  max_gen_toks: 16
  do_sample: false
metric_list:
  - metric: exact_match
"""


def write_tasks(folder: Path) -> None:
    """Write three small tasks and their files."""
    asked = [{"question": text, "choices": choices, "gold": gold} for text, choices, gold in SENTENCES]
    rows: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "choices": (CHOICES, asked),
        "text": (WHOLE, [{"text": TEXT[:400]}, {"text": TEXT[:7500]}]),  # the second beyond the model's 2,048 tokens
        "written": (WRITTEN, [{"question": text, "answer": "x"} for text, _, _ in SENTENCES]),
    }
    for name, (settings, lines) in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}.yaml").write_text(SHARED.format(name=name, file=file) + settings)


def run(*arguments: object) -> str:
    """Run Python without a network, and return its output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def numbers(found: Any) -> list[float]:
    """Return the numbers in single answers, which the harness may have written as texts."""
    if isinstance(found, list):
        return [number for each in found for number in numbers(each)]
    return [float(found)] if str(found).lstrip("-").replace(".", "").replace("e-", "").isdigit() else []


def test_the_figures_are_those_of_transformers_and_of_the_server(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    store = make_store(tmp_path)
    with running(store, load(str(store), threads=1)) as server:
        url = f"base_url=http://127.0.0.1:{server.port}/v1/completions,model=tiny"
        models = [
            ("hf", f"pretrained={DEMO_MODEL},dtype=float32", TASKS),
            ("bincompress", f"store={DEMO_MODEL},threads=1", TASKS),
            ("bincompress", f"store={store},threads=1,max_length=510", ["local_choices", "local_text"]),
            (
                "local-completions",
                f"{url},tokenizer={DEMO_MODEL},tokenizer_backend=huggingface,add_bos_token=True,max_length=512",
                ["local_choices", "local_text"],
            ),
        ]
        run(ROOT / "tests" / "lm_eval_program.py", tmp_path, json.dumps(models))
    theirs, ours, packed, served = json.loads((tmp_path / "results.json").read_text())
    # Sums over thousands of tokens, which the hf backend adds up in float32, agree in six digits.
    for first, second, bounds in ((theirs, ours, (1e-3, 1e-6)), (packed, served, (1e-9, 1e-12))):
        for task in first["samples"]:
            found = numbers(second["samples"][task])
            assert numbers(first["samples"][task]) == pytest.approx(found, abs=bounds[0], rel=bounds[1])
        for name in ("acc,none", "acc_norm,none"):
            assert first["results"]["local_choices"][name] == second["results"]["local_choices"][name]
        assert first["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(
            second["results"]["local_text"]["bits_per_byte,none"], abs=1e-5
        )
    assert len(numbers(ours["samples"]["local_choices"])) == 20
    assert theirs["samples"]["local_written"] == ours["samples"]["local_written"]
    assert all(text for (text,) in ours["samples"]["local_written"])


def test_the_harness_own_command_line_knows_the_model(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    arguments = f"store={DEMO_MODEL},threads=1"
    out = run(
        "-m", "bincompress.lm_eval", "run", "--model", "bincompress", "--model_args", arguments, "--tasks",
        "local_choices", "--include_path", tmp_path, "--limit", "2",
    )  # fmt: skip
    assert f"bincompress ({{'store': '{DEMO_MODEL}'" in out
    assert "|local_choices|" in out


def test_the_entry_point_leads_to_the_model() -> None:
    """Of releases of the harness that look for models there."""
    from bincompress.lm_eval.model import BincompressLM

    found = importlib.metadata.EntryPoint("bincompress", "bincompress.lm_eval.model:BincompressLM", "lm_eval.models")
    assert found.load() is BincompressLM
    assert f'bincompress = "{found.value}"' in (ROOT / "pyproject.toml").read_text("utf-8")
