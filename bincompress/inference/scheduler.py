"""Several texts at once: each pass over the weights gives every text its next token, or a piece of its prompt.

A pass over the weights takes little longer for a few tokens than for one, so texts that are written together are
written faster in all. A long prompt is read in pieces, beside which the others go on. Each text is what it would be
alone: the kernels give a token the same numbers whichever tokens share its pass (`Decoder.tokens_alike`).
"""

import collections
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bincompress.errors import BincompressError
from bincompress.inference.generate import Model
from bincompress.inference.prefixes import PrefixCache
from bincompress.inference.sampling import Floats
from bincompress.inference.sequence import Listener, Request, Writing
from bincompress.model.linear import FEW_TOKENS
from bincompress.process.systems import give_back_freed_memory

_PASS_SECONDS = 0.15  # that a pass with pieces of prompts may take: for so long the others wait for their next token
_FEWEST, _MOST = 16, 256  # tokens of such a pass
_FIRST_PASS = 32
_GIVEN_BACK = 10.0  # seconds from one return of freed memory to the next
_FULL_LOGITS = 32  # tokens of a piece whose logits are all wanted


class BusyError(BincompressError):
    """As many texts wait as may wait."""


class ClosedError(BincompressError):
    """The scheduler takes no more texts."""


@dataclass(frozen=True)
class Limits:
    """How much at once?

    parallel: texts that are written; waiting: texts beyond them. context: tokens of a prompt and its answer.
    prefix_bytes: of caches that are kept for texts to come.
    """

    parallel: int = 4
    waiting: int = 64
    context: int = 8192
    prefix_bytes: int = 1 << 30


@dataclass
class Counts:
    """What was done so far, in tokens but for texts, passes and seconds."""

    read: int = 0
    reused: int = 0
    written: int = 0
    finished: int = 0  # texts
    passes: int = 0
    busy_seconds: float = 0.0


class Scheduler:
    """Owns a model and the thread that runs it. `submit` and `close` may be called from any thread.

    >>> scheduler = Scheduler(model, Limits(parallel=4))  # doctest: +SKIP
    >>> scheduler.submit([(Request((5, 7, 9)), print)])  # doctest: +SKIP
    """

    def __init__(self, model: Model, limits: Limits = Limits()) -> None:
        self.model = model
        self.limits = replace(limits, context=min(limits.context, model.decoder.config.context))
        self.counts = Counts()
        self._alike = model.decoder.tokens_alike
        self._has_states = model.decoder.config.recurrent is not None
        self._prefixes = PrefixCache(model.decoder, self.limits.context, model.defaults.cache, self.limits.prefix_bytes)
        self._changed = threading.Condition()
        self._waiting: collections.deque[Writing] = collections.deque()
        self._active: list[Writing] = []
        self._closing = False
        self._turn = 0
        self._piece = _FIRST_PASS
        self._give_back_at = time.monotonic() + _GIVEN_BACK
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that wait."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Texts that are being written."""
        return len(self._active)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the caches that are kept for texts to come."""
        return self._prefixes.held_bytes

    def submit(self, asked: Sequence[tuple[Request, Listener]]) -> list[Writing]:
        """Take on texts, all or none; their listeners are called by the scheduler's thread, and must not wait.

        Texts of one call that have the same prompt read it once. Raises PromptError, SamplingError, BusyError, or
        ClosedError.
        """
        made: list[Writing] = []
        leaders: dict[tuple[int, ...], Writing] = {}
        for request, listener in asked:
            context = min(request.settings.context or self.limits.context, self.limits.context)
            held = replace(request, settings=replace(request.settings, context=context))
            text = Writing(self.model, held, listener, leaders.get(request.prompt))
            leaders.setdefault(request.prompt, text)
            made.append(text)
        with self._changed:
            if self._closing:
                raise ClosedError("the server is ending and takes no more requests")
            room = self.limits.parallel - len(self._active) + self.limits.waiting - len(self._waiting)
            if len(made) > room:
                raise BusyError(
                    f"{len(self._active)} texts are being written and {len(self._waiting)} wait, as many as may; "
                    "try again later"
                )
            self._waiting.extend(made)
            self._changed.notify()
        return made

    def close(self, seconds: float = 0.0) -> None:
        """Take no more texts, give those at hand so long to be finished, cancel the rest, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            for text in (*self._waiting, *self._active):
                text.cancel()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._active:
                    if self._closing:
                        return
                    self._changed.wait()
            try:
                self._drop()
                self._admit()
                shares = self._shares()
                if shares:
                    self._run(shares)
            except Exception as error:  # a fault of ours: whoever waits is told, and the next texts are taken on
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End all texts."""
        with self._changed:
            texts = [*self._waiting, *self._active]
            self._waiting.clear()
        for text in texts:
            text.end(None, error)
            text.cache = None
        self._active.clear()

    def _drop(self) -> None:
        """End texts that were cancelled or are past their time."""
        now = time.monotonic()
        with self._changed:
            problems = [(text, text.problem(now)) for text in (*self._waiting, *self._active)]
            gone = {text for text, problem in problems if problem is not None}
            self._waiting = collections.deque(text for text in self._waiting if text not in gone)
        for text, problem in problems:
            if problem is not None:
                text.end(None, problem)
        self._retire()

    def _retire(self) -> None:
        """Keep the caches of texts that ended."""
        gone = [text for text in self._active if text.ended]
        for text in gone:
            self._active.remove(text)
            self.counts.finished += 1
            if text.cache is not None:
                self._prefixes.put(text.tokens, text.cache)
                text.cache = None  # who asked may keep the text for long
        if gone and time.monotonic() >= self._give_back_at:
            give_back_freed_memory()
            self._give_back_at = time.monotonic() + _GIVEN_BACK

    def _admit(self) -> None:
        """Take texts that wait, in their order; one whose prompt another is just reading waits until it is read."""
        with self._changed:
            ready = [text for text in self._waiting if not _reads_now(text.leader)]
            for text in ready[: self.limits.parallel - len(self._active)]:
                self._waiting.remove(text)
                self._active.append(text)
        for text in [text for text in self._active if text.cache is None]:
            try:
                prompt = text.tokens[:1] if text.wants_all else text.tokens
                others = [other.prefix for other in self._active if other.cache is not None]
                text.begin(self._prefixes.take(prompt, others))
                self.counts.reused += text.reused
            except (BincompressError, MemoryError) as error:
                text.end(None, error)
        self._retire()

    def _shares(self) -> list[tuple[Writing, int]]:
        """Return how many tokens of each text the next pass runs: one where one is left, equal shares for prompts.

        Where not all fit, texts take turns.
        """
        self._turn += 1
        places = len(self._active)
        order = [self._active[(self._turn + place) % places] for place in range(places)]
        reading = sorted((text for text in order if text.left > 1), key=lambda text: text.left)
        writing = [text for text in order if text.left == 1]
        room = max(self._piece, len(writing)) if reading else len(writing)
        if self._alike is not None:
            room = min(room, self._alike)
        shares = [(text, 1) for text in writing[: room - 1 if reading else room]]
        room -= len(shares)
        if not reading:
            shares = self._with_drafts(shares)
        for number, text in enumerate(reading):
            most = _FULL_LOGITS if text.wants_all else room
            share = min(-(-room // (len(reading) - number)), text.left - self._runs_last_alone(text), most)
            if share:
                shares.append((text, share))
                room -= share
        return shares

    def _runs_last_alone(self, text: Writing) -> bool:
        """Return whether a prompt's last token is run by itself, so that texts of the same prompt begin before it.

        A state without keys and values can be taken up only where a pass has ended.
        """
        return self._has_states and any(other.leader is text for other in self._waiting)

    def _with_drafts(self, shares: list[tuple[Writing, int]]) -> list[tuple[Writing, int]]:
        """Let each text that is written have a draft checked as well, as far as all fit into a pass."""
        left = FEW_TOKENS - len(shares)
        found = []
        for text, _ in shares:
            share = text.draft_within(1 + max(left, 0))
            left -= share - 1
            found.append((text, share))
        return found

    def _run(self, shares: Sequence[tuple[Writing, int]]) -> None:
        """Run a pass. Where it fails each text is run by itself, so that one which cannot be run ends no other."""
        begin = time.perf_counter()
        lengths = [text.held for text, _ in shares]
        try:
            rows = self._logits(shares)
        except Exception as error:
            for (text, _), length in zip(shares, lengths, strict=True):
                text.rewind(length)
            if len(shares) > 1:
                for text, share in shares:
                    self._run([(text, min(share, text.left))])
            else:
                shares[0][0].end(None, error)
                self._retire()
            return
        for (text, share), first, own in zip(shares, lengths, rows, strict=True):
            # Before anyone is told, who may look at the counts then.
            before = text.sampled
            self.counts.read += 0 if before else share
            self.counts.written += int(text.is_read and not text.request.only_prompt)
            try:
                text.advance(own, first)
            except Exception as error:
                text.end(None, error)
            self.counts.written += max(text.sampled - before - 1, 0)  # those that were drafted
        self._retire()
        self._learn(sum(share for _, share in shares), time.perf_counter() - begin)

    def _logits(self, shares: Sequence[tuple[Writing, int]]) -> list[Iterable[Floats]]:
        """Run these tokens of each text and return the logits that it wants of them, rows (vocab,).

        Those behind drafted tokens are computed as they are asked for, as most texts do not ask for all.
        """
        decoder = self.model.decoder
        states = decoder.states_of_all([text.following(share) for text, share in shares])
        ends = np.cumsum([share for _, share in shares])
        wanted = [
            np.arange(end - share, end) if text.wants_all and text.held <= len(text.request.prompt)
            else np.array([end - share]) if text.draft
            else np.array([end - 1]) if text.is_read else np.empty(0, np.int64)
            for (text, share), end in zip(shares, ends, strict=True)
        ]  # fmt: skip
        chosen = states[np.concatenate(wanted)]
        if not len(chosen):
            return [()] * len(shares)
        # A head that is kept as it is gives a state the same numbers beside so many others, and not beside more.
        parts = [decoder.logits_of(chosen[at : at + FEW_TOKENS]) for at in range(0, len(chosen), FEW_TOKENS)]
        together = parts[0] if len(parts) == 1 else np.concatenate(parts)  # some MB, of a large vocabulary
        found = np.split(together, np.cumsum([len(rows) for rows in wanted])[:-1])
        return [
            itertools.chain(rows, (decoder.logits_of(states[row : row + 1])[0] for row in range(end - share + 1, end)))
            if text.draft else rows
            for (text, share), rows, end in zip(shares, found, ends, strict=True)
        ]  # fmt: skip

    def _learn(self, tokens: int, seconds: float) -> None:
        """Note how long a pass took, and let the next pieces of prompts take about the time that they may."""
        self.counts.passes += 1
        self.counts.busy_seconds += seconds
        if tokens >= _FEWEST:
            fitting = int(tokens * _PASS_SECONDS / max(seconds, 1e-9)) // _FEWEST * _FEWEST
            self._piece = min(max(fitting, _FEWEST), 2 * self._piece, _MOST)


def _reads_now(leader: Writing | None) -> bool:
    return leader is not None and not leader.ended and not leader.sampled
