"""Which merges does a vocabulary with scores imply? SentencePiece's files, and GGUF files made of them, list none."""

from collections.abc import Mapping

from bincompress.errors import CheckpointError

_MOST_WORK = 1 << 28  # characters in all the pieces that are looked up; the largest vocabularies take 1 << 25


def merges_of_vocabulary(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that make up a token, best first.

    Equal scores are ordered by the lengths of the parts, longer first, then by the order of the vocabulary. Raises
    CheckpointError where tokens are so long that it would take minutes. Source: transformers,
    tokenization_utils_base.py (`generate_merges`).
    """
    work = sum(len(token) ** 2 for token in vocab)
    if work > _MOST_WORK:
        longest = max(map(len, vocab))
        raise CheckpointError(f"GGUF metadata: tokenizer.ggml.tokens: a token of {longest:,} characters is too long")
    merges: list[tuple[str, str, float]] = []
    for token, score in scores.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((*pair, score) for pair in known)
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]
