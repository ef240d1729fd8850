"""A program of its own: can the grammar on its standard input be compiled within bounds? Prints a JSON line.

A hostile grammar can exhaust the stack, the memory or the time of whoever compiles it, and native code cannot be
interrupted. So it is tried here first, in a process that is limited and may be lost. It imports nothing of bincompress,
so that it starts at once.
"""

import contextlib
import json
import sys
import threading
from typing import Any

CPU_SECONDS = 2
MEMORY_BYTES = 2 << 30
STACK_BYTES = 2 << 20  # a quarter of what threads of the process that asks have
TOKENS = 64  # that are tried, as whoever asks would have them

# The bounds of every grammar: what one token may cost, and what all of them may keep.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 100_000, "step_max_items": 20_000, "max_items_in_row": 2000,
    "max_lexer_states": 20_000, "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip


def try_out(grammar: str) -> str:
    """Return what is wrong with a grammar, if anything."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
    if warnings:
        return str(warnings[0])
    for number in range(TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [place for place in range(256) if mask[place >> 3] >> (place & 7) & 1]
        if allowed:
            matcher.consume_token(allowed[number * 37 % len(allowed)])
    return str(matcher.get_error())


def _limit_itself() -> None:
    """Bound time and memory where the system does that; whoever asks looks at both as well."""
    try:
        import resource
    except ImportError:  # Windows
        return
    bounds = {"RLIMIT_CPU": CPU_SECONDS, "RLIMIT_AS": MEMORY_BYTES, "RLIMIT_CORE": 0}
    for name, bound in bounds.items():
        with contextlib.suppress(ValueError, OSError):  # macOS takes no bound of a process's addresses
            resource.setrlimit(getattr(resource, name), (bound, bound))


def main() -> None:
    """Read a grammar, and say what is wrong with it."""
    _limit_itself()
    grammar = sys.stdin.buffer.read().decode("utf-8")
    found: list[str] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: found.append(try_out(grammar)))
    thread.start()
    thread.join()
    print(json.dumps({"problem": found[0]} if found else {}))


if __name__ == "__main__":
    main()
