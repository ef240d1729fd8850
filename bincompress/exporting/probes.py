"""Texts of which two tokenizers that are equal make equal tokens, and most others do not."""

from collections.abc import Iterator

TEXTS = (
    "", " ", "  ", "a", " a", "  a  ", "The scheduler", "It's we'll I'D they'RE", "x=1;y  =\t22\n\n\nz", "12345 6789",
    "for (int i = 0; i < 10; ++i) {\n    sum += a[i];\n}\n", "caf\u00e9 na\u00efve \u00fcber", "\u65e5\u672c\u8a9e",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u0645\u0631\u062d\u0628\u0627", "\U0001f600\U0001f680",
    "a\r\nb\rc", "CamelCaseWord ALLCAPS", "!!! ??? ... --- ///", "\u2581 \u2581a", "a\u00a0b\u3000c", "1.5e-3 0x1F",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "t1 t2t3", "https://example.org/a?b=c&d=%20", "\x00\x7f", "#hash @at",
)  # fmt: skip


def with_tokens(token: str) -> Iterator[str]:
    """Yield texts with a token that is matched whole: alone, between words, and beside spaces."""
    yield from (token, f"a{token}b", f"a {token} b", f"{token}{token}")
