"""`bincompress evaluate`: several texts, overlapping windows, several bits, questions, and what it refuses."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bincompress.commands.evaluated import print_rows
from bincompress.inference.evaluate import Evaluation, evaluate, log_softmax
from bincompress.inference.prompts import PromptFileError
from bincompress.model.errors import PromptError
from bincompress.scoring.measure import TaskRow, TextRow
from bincompress.scoring.models import load_scored
from bincompress.scoring.questions import Accuracy, accuracy, read_questions
from bincompress.scoring.scorer import Scorer
from tests.conftest import DEMO_MODEL, Run
from tests.test_model_evaluate import random_decoder

QUESTIONS: list[dict[str, Any]] = [
    {"context": "The scheduler decides which process", "choices": [" runs next", " a table of"], "answer": 0},
    {
        "context": "A table in a database has rows and",
        "choices": [" purple", " columns", " the"],
        "answer": 1,
        "id": "b",
    },
    {"context": "", "choices": ["The kernel", "Kernel the of it is a"], "answer": 0},
    {"context": "In Python, a list is", "choices": [" a sequence of objects", " x"], "answer": 1},
]


@pytest.fixture(scope="module")
def store(chat_store: Path) -> Path:
    return chat_store


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "prose").write_text("The scheduler decides which process runs next. A process has a priority. " * 5)
    (folder / "code").write_text("def page(table):\n    return table[0]\n\n" * 8)
    return [folder / "prose", folder / "code"]


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("stride", [1, 7, 19])
def test_overlapping_windows_score_each_token_once(stride: int) -> None:
    model, baseline = random_decoder(1), random_decoder(2)
    tokens = np.random.default_rng(0).integers(0, 50, 47)
    found = evaluate(model, tokens, 20, baseline=baseline, stride=stride)
    losses: list[float] = []
    for place in range(1, 47):
        # The first window that holds the token scores it, behind what that window holds before it.
        begin = 0 if place < 20 else math.ceil((place - 19) / stride) * stride
        rows = log_softmax(model.logits(tokens[begin:place], model.new_cache()))
        losses.append(-float(rows[-1, tokens[place]]))
    assert found.tokens == 46
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert found.windows == 1 + math.ceil(27 / stride)
    assert (found.stride, evaluate(model, tokens, 20).stride) == (stride, 20)
    few = evaluate(model, tokens, 20, 2, stride=stride)
    assert (few.windows, few.tokens) == (2, 19 + stride)


@pytest.mark.parametrize("stride", [0, 20, 21])
def test_a_stride_that_is_none_is_refused(stride: int) -> None:
    with pytest.raises(PromptError, match=f"stride: expected 1 to 19, less than the context, found {stride}"):
        evaluate(random_decoder(1), np.arange(40), 20, stride=stride)


def test_several_texts_and_bits_are_those_of_each_alone(run: Run, store: Path, texts: list[Path]) -> None:
    common = ("--context", 32, "--windows", 2, "--threads", 1, "--baseline", DEMO_MODEL, "--json")
    given = ("--text", texts[0], "--text", texts[1], "--activation-bits", "16,6")
    code, out, _ = run("evaluate", store, *given, *common)
    assert code == 0
    rows = json.loads(out)["texts"]
    assert [(row["text"], row["activations"]) for row in rows] == [
        (name, activations)
        for activations in ("float32", "6 bits per segment")
        for name in (str(texts[0]), str(texts[1]), None)
    ]
    alone = json.loads(run("evaluate", store, "--text", texts[1], "--activation-bits", "6", *common)[1])
    assert rows[4].items() <= alone.items()
    for first, second, whole in (rows[:3], rows[3:]):
        both = [first, second]
        assert whole["tokens"] == sum(each["tokens"] for each in both) == 4 * 31
        for name in ("perplexity", "baseline_perplexity"):
            loss = sum(each["tokens"] * math.log(each[name]) for each in both) / whole["tokens"]
            assert whole[name] == pytest.approx(math.exp(loss))
        assert whole["kl_divergence"] == pytest.approx(np.mean([each["kl_divergence"] for each in both]))


def test_several_rows_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    exact, rounded = Evaluation(10.0, 60, 2, 31, stride=31), Evaluation(11.0, 60, 2, 31, stride=31)
    print_rows([TextRow("a", "float32", exact)])
    assert capsys.readouterr().out == "perplexity 10.0000  (60 tokens scored, 2 windows of 31)\nactivations float32\n"
    print_rows([TextRow("a", "float32", exact), TextRow("a", "8 bits per segment", rounded)])
    assert capsys.readouterr().out == (
        "text  activations         tokens  perplexity    rise\n"
        "a     float32                 60     10.0000   0.00%\n"
        "a     8 bits per segment      60     11.0000  10.00%\n"
    )
    compared = replace(exact, baseline_perplexity=8.0, kl_divergence=0.5, top1_agreement=0.25)
    print_rows([TextRow("a", "float32", compared), TextRow(None, "float32", compared)])
    assert capsys.readouterr().out == (
        "text       activations  tokens  perplexity  baseline   ratio       KL   top-1\n"
        "a          float32          60     10.0000    8.0000  1.2500  0.50000  25.00%\n"
        "all texts  float32          60     10.0000    8.0000  1.2500  0.50000  25.00%\n"
    )
    print_rows([TaskRow("q", "float32", Accuracy(4, 0.5, 0.25, 1.0, 0.0), Accuracy(4, 0.75, 0.2, 0.5, None))])
    assert capsys.readouterr().out == (
        "task  activations  questions              acc         acc_norm     baseline acc  baseline acc_norm\n"
        "q     float32              4  0.5000 ± 0.2500  1.0000 ± 0.0000  0.7500 ± 0.2000             0.5000\n"
    )


def test_accuracies_by_hand(store: Path, tmp_path: Path) -> None:
    scorer = Scorer(load_scored(str(store), threads=1))
    questions = read_questions(written(tmp_path / "q.jsonl", QUESTIONS))
    counts: list[tuple[int, int]] = []
    found = accuracy(scorer, questions, lambda *count: counts.append(count))
    right, normed = [], []
    for asked in QUESTIONS:
        shares = [scorer.loglikelihood([(asked["context"], choice)])[0][0] for choice in asked["choices"]]
        per_character = [share / len(choice) for share, choice in zip(shares, asked["choices"], strict=True)]
        right.append(float(shares.index(max(shares)) == asked["answer"]))
        normed.append(float(per_character.index(max(per_character)) == asked["answer"]))
    assert (found.questions, found.acc, found.acc_norm) == (4, float(np.mean(right)), float(np.mean(normed)))
    assert 0 < found.acc < 1
    assert found.acc_stderr == pytest.approx(np.std(right, ddof=1) / 2)
    assert found.acc_norm_stderr == pytest.approx(np.std(normed, ddof=1) / 2)
    assert counts[-1] == (9, 9)
    assert accuracy(scorer, questions[:1]).acc_stderr is None


def test_questions_on_the_command_line(run: Run, store: Path, texts: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path / "q.jsonl", QUESTIONS)
    code, out, _ = run("evaluate", store, "--task", file, "--baseline", DEMO_MODEL, "--threads", 1, "--json")
    assert code == 0
    (row,) = json.loads(out)["tasks"]
    assert (row["task"], row["questions"], row["activations"]) == (str(file), 4, "8 bits per segment")
    code, out, _ = run("evaluate", DEMO_MODEL, "--task", file, "--threads", 1, "--json")
    (other,) = json.loads(out)["tasks"]
    assert (row["baseline_acc"], row["baseline_acc_norm_stderr"]) == (other["acc"], other["acc_norm_stderr"])
    code, out, _ = run("evaluate", store, "--task", file, "--limit", 1, "--text", texts[0], "--context", 16)
    assert code == 0
    assert out.startswith("perplexity ")
    assert out.splitlines()[-1].split()[-3:] == ["1", *out.splitlines()[-1].split()[-2:]]
    assert "±" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object such as"),
        ({"context": "a", "choices": ["b", "c"], "answer": 0, "label": 1}, "'label' is not supported"),
        ({"choices": ["b", "c"], "answer": 0}, "context: expected a text"),
        ({"context": "a", "choices": ["b"], "answer": 0}, "choices: expected a list of at least two texts"),
        ({"context": "a", "choices": ["b", ""], "answer": 0}, "choices: expected texts that are not empty"),
        ({"context": "a", "choices": ["b", "b"], "answer": 0}, "choices: expected texts that are not empty and differ"),
        ({"context": "a", "choices": ["b", 1], "answer": 0}, "choices: expected texts"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "0 to 1, found 2"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "0 to 1, found True"),
        ({"context": "a", "choices": ["b", "c"], "answer": "b"}, "0 to 1, found 'b'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"context": "\\ud800", "choices": ["b", "c"], "answer": 0}', "lone surrogate"),
    ],
)
def test_a_line_that_is_no_question_is_refused(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(PromptFileError, match=rf"q\.jsonl, line 2: .*{message}"):
        read_questions(written(tmp_path / "q.jsonl", [QUESTIONS[0], line]))


def test_an_empty_file_of_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="holds no question"):
        read_questions(written(tmp_path / "q.jsonl", ["", ""]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to evaluate: give --text FILE, --task FILE.jsonl or --tasks NAMES"),
        (("--text", "TEXT", "--text", "TEXT"), "is given twice"),
        (("--text", "TEXT", "--activation-bits", "8,7"), "expected 6, 8 or 16, or several of them"),
        (("--text", "TEXT", "--activation-bits", "8,8"), "expected 6, 8 or 16, or several of them"),
        (("--text", "TEXT", "--stride", "1024"), "stride: expected 1 to 1023"),
        (("--text", "TEXT", "--num-fewshot", "2"), "--num-fewshot is for --tasks"),
        (("--text", "TEXT", "--apply-chat-template"), "--apply-chat-template is for --tasks"),
        (("--tasks", "arc_easy", "--baseline", "MODEL"), "--baseline is for --text and --task"),
        (("--task", "TEXT"), "line 1: not JSON"),
        (("--text", "TEXT", "--limit", "3"), "--limit is for --task and --tasks"),
        (("--task", "TEXT", "--stride", "3"), "--stride is for --text"),
        (("--tasks", "arc_easy", "--windows", "3"), "--windows is for --text"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: Run, store: Path, texts: list[Path], options: tuple[str, ...], message: str
) -> None:
    places = {"TEXT": texts[0], "MODEL": DEMO_MODEL}
    code, out, errors = run("evaluate", store, *(places.get(option, option) for option in options))
    assert (code, out) == (2, "")
    assert message in errors


def test_several_bits_of_a_checkpoint_are_refused(run: Run, texts: list[Path]) -> None:
    code, _, errors = run("evaluate", DEMO_MODEL, "--text", texts[0], "--activation-bits", "16,8")
    assert code == 2
    assert "an unquantized checkpoint runs in float32 alone" in errors


def test_tasks_of_the_harness_without_it_are_refused(tmp_path: Path, store: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError('No module named lm_eval', name='lm_eval')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[1]}"}
    arguments = ["-m", "bincompress", "evaluate", str(store), "--tasks", "arc_easy"]
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --tasks needs lm_eval, which is not installed: pip install 'bincompress[lm-eval]'\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval, which is not installed")
def test_tasks_of_the_harness_give_what_the_file_gives(store: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "q.jsonl", [{**asked, "id": str(place)} for place, asked in enumerate(QUESTIONS)])
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1"}

    def call(*options: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "bincompress", "evaluate", store, "--threads", 1, *options]
        return subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True)

    done = call("--task", file, "--tasks", "own", "--include-path", tmp_path, "--activation-bits", "8,6", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for row in found["tasks"]:
        theirs = found["lm_eval"][row["activations"]]["results"]["own"]
        assert (theirs["acc,none"], theirs["acc_norm,none"]) == (row["acc"], row["acc_norm"])
        assert theirs["acc_stderr,none"] == pytest.approx(row["acc_stderr"])
    assert list(found["lm_eval"]) == ["8 bits per segment", "6 bits per segment"]
    refused = call("--tasks", "own,nothing_of_the_kind", "--include-path", tmp_path)
    assert refused.returncode == 2
    assert "'nothing_of_the_kind' is not a task of lm-evaluation-harness" in refused.stderr
