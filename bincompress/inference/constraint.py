"""Texts of a given form: which tokens may come next? llguidance knows, by a grammar compiled for a model's tokens."""

import collections
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bincompress.errors import BincompressError
from bincompress.inference import grammar_trial
from bincompress.inference.json_schema import SchemaError
from bincompress.model.errors import PromptError
from bincompress.model.tokenizer import Tokenizer

_TOKEN = re.compile(r"<\[\d+\]>")  # a token by its number, as a grammar writes it
_KEPT = 32  # compiled grammars
_TRIAL_SECONDS = 30.0  # to wait for a trial, which has less time of a CPU
_LOOK_SECONDS = 0.05  # between looks at its memory
_FIRST_FAULT = 0xC0000000  # Windows: a process that ended by a fault, such as a full stack, has such a number
_FIRST_SECONDS, _TOKEN_SECONDS = 1.0, 0.02  # of a CPU: what a text may take at once, and for each token in the mean


class ConstraintError(PromptError):
    """A text cannot be held to its form any longer."""


class Grammar:
    """A form of texts, compiled for a model's tokens; from it each text gets a constraint of its own."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def begin(self) -> "Constraint":
        """Return what holds one text to the form."""
        return Constraint(self._matcher.deep_copy(), self._vocab)


class Constraint:
    """Holds one text to a form, token after token."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._seconds = _FIRST_SECONDS

    @property
    def is_complete(self) -> bool:
        """Whether the text has its form and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens (vocab,) may come next; raise ConstraintError where there are none or it takes long."""
        begin = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.zeros(self._vocab, bool)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab]
        found[: len(known)] = known
        self._seconds += _TOKEN_SECONDS - (time.thread_time() - begin)
        if self._seconds < 0:
            raise ConstraintError("response format: it takes too long to find out what may follow; simplify the schema")
        if not found.any():
            raise ConstraintError("response format: no token of the model's vocabulary can follow")
        return found

    def take(self, token: int) -> None:
        """Note the next token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"response format: cannot go on: {_short(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for a model, and keeps those used last. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._known: collections.OrderedDict[str, Grammar] = collections.OrderedDict()
        self._own: Any = None  # llguidance's view of the tokenizer
        self._lock = threading.Lock()  # one is compiled at a time, so that they take one CPU at most

    def prepare(self) -> None:
        """Make llguidance's view of the tokenizer now, not at the first grammar."""
        with self._lock:
            self._tokens(_llguidance())

    def compiled(self, grammar: str) -> Grammar:
        """Return a grammar that llguidance reads, compiled; raise SchemaError where it is faulty or too complex."""
        with self._lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
                return self._known[grammar]
            llguidance = _llguidance()
            _try_out(grammar)
            limits = llguidance.LLParserLimits(**grammar_trial.LIMITS)
            matcher = llguidance.LLMatcher(self._tokens(llguidance), grammar, log_level=0, limits=limits)
            if matcher.is_error():
                raise SchemaError(f"schema: {_short(matcher.get_error())}")
            made = self._known[grammar] = Grammar(matcher, self._vocab)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return made

    def _tokens(self, llguidance: Any) -> Any:
        if self._own is None:
            ends = sorted(token for token in self._tokenizer.eos_ids if token < self._vocab)
            # A vocabulary may be smaller than the tokenizer's, which then knows tokens that never come.
            size = max(self._vocab, self._tokenizer.size)
            try:
                self._own = llguidance.LLTokenizer(self._tokenizer.as_json(), n_vocab=size, eos_token=ends or None)
            except ValueError as error:
                raise BincompressError(
                    f"tokenizer.json: llguidance, which holds texts to a form, cannot read it: {_short(str(error))}"
                ) from None
        return self._own


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise BincompressError(
            "texts of a given form need llguidance, which is not installed: pip install 'bincompress[structured]'"
        ) from None
    return llguidance


def _run_bounded(program: list[str], given: bytes) -> subprocess.CompletedProcess[bytes] | None:
    """Run a program; None where it took too much time or memory, which not every system bounds by itself."""
    import psutil

    pipe = subprocess.PIPE
    left: bytes | None = given  # given once: it goes on being sent
    end = time.monotonic() + _TRIAL_SECONDS
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        while True:
            try:
                output, errors = process.communicate(left, timeout=_LOOK_SECONDS)
                return subprocess.CompletedProcess(program, process.returncode, output, errors)
            except subprocess.TimeoutExpired:
                left, used = None, 0
                with contextlib.suppress(psutil.Error):  # it has just ended
                    used = psutil.Process(process.pid).memory_info().rss
                if time.monotonic() < end and used <= grammar_trial.MEMORY_BYTES:
                    continue
                process.kill()
                process.communicate()
                return None


def _try_out(grammar: str) -> None:
    """Compile a grammar in a process that may be lost; raise SchemaError where it is, or the grammar is faulty."""
    program = [sys.executable, "-P", str(Path(grammar_trial.__file__))]
    # The trial's tokens are bytes: any of them stands for one of the model's, whatever its number.
    of_bytes = _TOKEN.sub("<[1]>", grammar)
    done = _run_bounded(program, of_bytes.encode())
    if done is None or done.returncode < 0 or done.returncode >= _FIRST_FAULT:
        raise SchemaError("schema: too complex: it takes too much time, memory or depth; simplify it")
    try:
        problem = json.loads(done.stdout)["problem"]
    except (ValueError, KeyError):
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        if any("MemoryError" in line or "memory allocation" in line for line in told):
            raise SchemaError("schema: too complex: it takes too much memory; simplify it") from None
        raise BincompressError(f"the trial of a grammar failed: {(told or ['no output'])[-1][:200]}") from None
    if problem:
        raise SchemaError(f"schema: {_short(problem)}")


def _short(message: str) -> str:
    return message.split("\n<non-verbose/>")[0].replace("\n", " ")[:300]
