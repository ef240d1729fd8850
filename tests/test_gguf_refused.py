"""GGUF files that are refused, each by name: wrong headers, sizes that cannot be, tokenizers that are not known."""

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from bincompress.errors import CheckpointError
from bincompress.model.tokenizer import load_tokenizer
from bincompress.sources.hub import open_source
from tests.conftest import Run
from tests.gguf_files import entry, numbers, raw, tensor, text
from tests.test_gguf import WORDS, both

ARCH = entry("general.architecture", "qwen2")
OWN = [ARCH, *numbers("qwen2")]
EMBEDDING = tensor("token_embd.weight", (4, 256))

WRONG: list[tuple[bytes, str]] = [
    (b"", "not readable|not a GGUF file"),
    (b"PK\x03\x04" + bytes(100), r"not a GGUF file: it begins with b'PK"),
    (b"GGUF\x03", "truncated: 5 bytes"),
    (raw(OWN, [EMBEDDING], version=1), "GGUF version 1; expected version 2 or 3"),
    (raw(OWN, [EMBEDDING], version=3 << 24), "big-endian byte order, which is not read"),
    (raw(OWN, [EMBEDDING], counts=(1 << 62, 7)), "4,611,686,018,427,387,904 tensors; expected at most"),
    (raw(OWN, [EMBEDDING], counts=(1, 1 << 40)), "1,099,511,627,776 keys"),
    (raw(OWN, [EMBEDDING], data=0)[:-60], "in the middle of its entries"),
    (raw([ARCH, ARCH], [EMBEDDING]), "the key 'general.architecture' twice"),
    (raw(OWN, [EMBEDDING, EMBEDDING]), "the tensor 'token_embd.weight' twice"),
    (raw([text("a" * 70000)], []), "a key of 70,000 bytes"),
    (raw([struct.pack("<Q", 1 << 60)], []), "a key of 1,152,921,504,606,846,976 bytes"),
    (raw([text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)], []), "1,152,921,504,606,846,976 texts"),
    (raw([text("k") + struct.pack("<IIQ", 9, 4, 1 << 61)], []), "in the middle of its entries"),
    (raw([text("k") + struct.pack("<IIQ", 9, 9, 1)], []), "an array of type 9"),
    (raw([text("k") + struct.pack("<I", 99)], []), "type 99 is not known"),
    (raw([text(b"\xff\xfe")], []), "is not UTF-8"),
    (raw([text("k") + struct.pack("<IB", 7, 3)], []), "3 as a truth"),
    (raw([*OWN, entry("general.alignment", 3)], [EMBEDDING]), "general.alignment 3; expected a power of two"),
    (raw([*OWN, entry("general.alignment", 0)], [EMBEDDING]), "general.alignment 0"),
    (raw(OWN, [tensor("token_embd.weight", (4, 256), 0, 1 << 40)]), "lie outside the .* of the file"),
    (raw(OWN, [tensor("token_embd.weight", (4, 256), 0, 4)]), "begins at byte 4, no multiple of 32"),
    (raw(OWN, [EMBEDDING, tensor("output_norm.weight", (256,), 0, 1024)]), "'output_norm.weight' overlaps 'token_embd"),
    (raw(OWN, [tensor("token_embd.weight", (4, 256), 99)]), "tensors of type 99 are not read"),
    (raw(OWN, [tensor("token_embd.weight", (4, 250), 8)]), "250 columns; Q8_0 has blocks of 32"),
    (raw(OWN, [tensor("token_embd.weight", (1 << 40, 1 << 40))]), "lie outside"),
    (raw(OWN, [tensor("token_embd.weight", (1, 1, 1, 1, 1))]), "5 dimensions"),
    (raw(OWN, [tensor("token_embd.weight", (0, 4))]), "dimensions .4, 0."),
    (raw(OWN, [tensor("../../etc/passwd", (4, 4))]), "token_embd.weight is missing"),
    (raw(OWN, [EMBEDDING, tensor("blk.0.../x.weight", (4,), 0, 4096)], 8192), "not a tensor of Qwen2ForCausalLM"),
    (raw([entry("general.architecture", "rwkv7")], []), "architecture 'rwkv7' is not read from GGUF files"),
    (raw([], []), "architecture None is not read"),
    (raw([ARCH], [EMBEDDING]), "qwen2.embedding_length: expected a whole number, found None"),
    (raw([*OWN, entry("qwen2.attention.key_length", "x")], [EMBEDDING]), "key_length: expected a whole number"),
    (raw([*numbers("qwen2", **{"attention.head_count": 0}), ARCH], [EMBEDDING]), "head_count is 0"),
    (raw([*OWN, *map(entry, ("qwen2.attention.key_length", "qwen2.rope.dimension_count"), (64, 32))], [EMBEDDING]),
     "32 of 64 columns of a head; expected all"),
    (raw([*OWN, entry("tokenizer.ggml.model", "rwkv")], [EMBEDDING]), "tokenizer.ggml.tokens: expected a list"),
    (raw([*OWN, entry("tokenizer.ggml.tokens", ["a"] * 5)], [EMBEDDING]), "5 tokens; token_embd.weight has 4 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG, ids=range(len(WRONG)))
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, run: Run, content: bytes, message: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as found:
        open_source(str(file))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 1000
    code, out, err = run("compress", file, tmp_path / "store")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert not (tmp_path / "store").exists()


def tokenizer_of(tmp_path: Path, **changes: Any) -> Any:
    own = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    _, file = both(tmp_path, "Qwen2ForCausalLM", more=own)
    return load_tokenizer(open_source(str(file)).assets())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "never-heard-of"}, "pre: 'never-heard-of': how this tokenizer splits text is not known; known: "),
        ({"model": "bert"}, "model: 'bert' is not read"),
        ({"token_type": [1]}, "token_type: expected 96 numbers, one a token, found 1"),
        ({"merges": ["a b c"]}, "merges: 'a b c'; expected two parts"),
        ({"merges": ["nope t1"]}, "no tokenizer can be made of it"),
        ({"bos_token_id": 96}, "bos_token_id: 96; expected one of 96 tokens"),
        ({"add_bos_token": "yes"}, "add_bos_token: expected a truth"),
        ({"merges": None, "model": "llama"}, "scores: expected 96 numbers, one a token, found None"),
        (
            {"merges": None, "model": "llama", "tokens": ["a" * 20000, "b"], "scores": [0.0, 1.0]},
            "a token of 20,000 characters is too long",
        ),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_of(tmp_path, **changes)


def test_a_quantized_bias_in_another_order_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    own = [entry("general.architecture", "llama"), *numbers("llama")]
    file.write_bytes(raw(own, [EMBEDDING, tensor("blk.0.attn_q.bias", (256,), 8, 4096)], 8192))
    with pytest.raises(CheckpointError, match=r"'blk.0.attn_q.bias': a quantized bias of heads in another order"):
        open_source(str(file))


def test_a_token_that_no_template_can_hold_is_refused(tmp_path: Path) -> None:
    words = ["{'a': 1}", *WORDS[1:-1], "01"]
    with pytest.raises(CheckpointError, match="no tokenizer can be made of it: Cannot build Piece"):
        tokenizer_of(tmp_path, tokens=words, merges=["0 1"], add_bos_token=True)


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(raw(OWN, [EMBEDDING]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = run("compress", file, tmp_path / "store")
    assert code == 2
    assert "pip install 'bincompress[gguf]'" in err


def test_a_folder_with_a_gguf_file_says_which_to_give(tmp_path: Path, run: Run) -> None:
    (tmp_path / "m.gguf").write_bytes(raw(OWN, [EMBEDDING]))
    code, _, err = run("compress", tmp_path, tmp_path / "store")
    assert code == 2
    assert f"give the GGUF file itself: {tmp_path / 'm.gguf'}" in err
