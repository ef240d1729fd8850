"""Do generate, chat, evaluate and bench do what the README says, and refuse in one line?"""

import io
import json
import sys
from pathlib import Path

import pytest

from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.sources.checkpoint import open_checkpoint
from tests.conftest import DEMO_MODEL, SHARED, Run


def test_generate_is_repeatable_and_counts(run: Run, demo: Path) -> None:
    arguments = ("generate", demo, "The scheduler", "--max-tokens", 12, "--seed", 3, "--threads", 1)
    code, first, _ = run(*arguments)
    assert code == 0
    assert run(*arguments)[1] == first
    code, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert found["text"] + "\n" == first
    assert (found["completion_tokens"], found["finish_reason"], found["threads"]) == (12, "length", 1)
    assert found["total_tokens"] == found["prompt_tokens"] + 12


def test_generate_greedy_is_the_same_with_any_number_of_threads(run: Run, demo: Path) -> None:
    texts = {run("generate", demo, "A list", "--max-tokens", 8, "--temperature", 0, "--threads", n)[1] for n in (1, 2)}
    assert len(texts) == 1


def test_generate_stops_at_a_text_and_reads_standard_input(
    run: Run, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The scheduler"))
    code, out, _ = run("generate", demo, "-", "--temperature", 0, "--max-tokens", 30, "--stop", "is", "--json")
    assert code == 0
    assert json.loads(out)["finish_reason"] == "stop"
    assert "is" not in json.loads(out)["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "STORE", "word " * 3000), "the prompt has"),
        (("generate", "STORE", "x", "--temperature", "-1"), "temperature: expected 0"),
        (("generate", "STORE", "x", "--top-p", "-1"), "top_p: expected 0 to 1"),
        (("generate", "STORE", "x", "--max-tokens", "0"), "max tokens: expected at least 1"),
        (("generate", "STORE", "x", "--stop", ""), "stop: expected non-empty texts"),
        (("generate", "STORE", "x", "--kernel", "abacus"), "kernel 'abacus' is unknown"),
        (("generate", "nowhere", "x"), "no such store"),
        (("chat", "STORE"), "no chat template"),
        (("evaluate", "STORE", "--text", "nowhere.txt"), "not readable as UTF-8 text"),
        (("evaluate", "STORE", "--text", "TEXT", "--context", "1"), "context: expected 2 to 2048"),
        (("evaluate", "STORE", "--text", "TEXT", "--windows", "0"), "windows: expected at least 1"),
        (("evaluate", "STORE", "--text", "TEXT", "--baseline", "nowhere"), "neither a folder nor a Hub id"),
    ],
)
def test_refusals_are_one_line(run: Run, demo: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    words = [{"STORE": str(demo), "TEXT": str(text)}.get(word, word) for word in arguments]
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err.strip().splitlines()[-1]


def test_an_empty_prompt_begins_a_text(run: Run, demo: Path) -> None:
    code, out, _ = run("generate", demo, "", "--max-tokens", 3, "--json")
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == 1


def test_chat_follows_the_models_template(
    run: Run, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in DEMO_MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    )
    assert compress(make_plan(open_checkpoint(folder), load_recipe(None, {})), str(tmp_path / "store")).complete
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a page?\nAnd a table?\n\n"))
    code, out, _ = run("chat", tmp_path / "store", "--max-tokens", 5, "--seed", 1, "--system", "Be brief.")
    assert code == 0
    assert out.count("\n") >= 2


def test_evaluate_against_a_baseline(run: Run, demo: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The scheduler decides which process runs next. Every process has a priority. " * 12)
    code, out, _ = run("evaluate", demo, "--text", text, "--context", 64, "--baseline", DEMO_MODEL, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["perplexity"] > found["baseline_perplexity"] > 1
    assert 0 < found["kl_divergence"] < 5
    assert 0.2 < found["top1_agreement"] <= 1
    assert found["tokens"] == found["windows"] * 63
    assert found["activations"] == "8 bits per segment"
    code, out, _ = run("evaluate", DEMO_MODEL, "--text", text, "--context", 64, "--json")
    assert json.loads(out)["perplexity"] == pytest.approx(found["baseline_perplexity"], rel=1e-6)
    code, out, _ = run("evaluate", demo, "--text", text, "--context", 64, "--windows", 2, "--activation-bits", 16)
    assert "activations float32" in out


def test_bench_shows_speeds_and_paths(run: Run, demo: Path) -> None:
    code, out, _ = run("bench", demo, "--prompt", 8, "--tokens", 4, "--repeats", 2, "--threads", 1, "--verbose")
    assert code == 0
    assert "pp8" in out
    assert "tg4" in out
    assert "model.layers.0.mlp.up_proj.weight: " in out
    found = json.loads(run("bench", demo, "--prompt", 0, "--tokens", 2, "--repeats", 1, "--json")[1])
    assert list(found["tests"]) == ["tg2"]
    assert found["paths"]["model.layers.0.mlp.up_proj.weight"].split()[0] in ("lookup", "popcount")


@pytest.mark.slow
@pytest.mark.needs_shared
def test_packed_perplexity_is_within_half_a_percent_of_the_dequantized_weights(run: Run, tmp_path: Path) -> None:
    model, text = SHARED / "models" / "doclm-29m", SHARED / "data" / "valid.txt"
    assert compress(make_plan(open_checkpoint(model), load_recipe(None, {})), str(tmp_path / "store")).complete
    found = [
        json.loads(run("evaluate", tmp_path / "store", "--text", text, "--windows", 2, "--json", *bits)[1])[
            "perplexity"
        ]
        for bits in ((), ("--activation-bits", 16))
    ]
    assert found[0] == pytest.approx(found[1], rel=5e-3)
