"""Typical, DRY and XTC beside plain implementations of their papers and first authors."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bincompress.inference.samplers import dry, repetitions, typical, without_top_choices
from bincompress.inference.sampling import Sampler, Sampling
from bincompress.model.errors import SamplingError
from bincompress.model.tokenizer import load_tokenizer
from tests.conftest import DEMO_MODEL

SCORES = st.lists(st.floats(-20, 0), min_size=1, max_size=12)


def shares(scores: Sequence[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / math.fsum(powers) for power in powers]


@given(SCORES, st.floats(0, 0.999))
def test_typical(scores: list[float], mass: float) -> None:
    found = shares(scores)
    entropy = -math.fsum(share * math.log(share) for share in found if share)
    distance = [abs(-math.log(share) - entropy) if share else math.inf for share in found]
    kept: list[int] = []
    for place in sorted(range(len(scores)), key=lambda place: distance[place]):
        kept.append(place)
        if math.fsum(found[each] for each in kept) >= mass:
            break
    chosen = set(typical(np.array(scores), mass).tolist())
    # Those as near as the last one come with it; rounding may add or drop one at the border.
    assert abs(math.fsum(found[each] for each in chosen) - mass) < 1e-9 or set(kept) <= chosen | {kept[-1]}
    assert all(distance[each] <= distance[kept[-1]] + 1e-9 for each in chosen)


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 0.95])
def test_typical_keeps_what_transformers_keeps(mass: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import TypicalLogitsWarper

    scores = np.random.default_rng(3).normal(0, 3, 200)
    theirs = TypicalLogitsWarper(mass)(None, torch.tensor(scores)[None])[0]
    assert typical(scores, mass).tolist() == torch.isfinite(theirs).nonzero()[:, 0].tolist()


def plain_repetitions(history: list[int], breakers: set[int]) -> dict[int, int]:
    """As the author of DRY wrote it: go back from each earlier place of the last token."""
    found: dict[int, int] = {}
    if not history or history[-1] in breakers:
        return found
    for place in range(len(history) - 1):
        if history[place] != history[-1]:
            continue
        length = 1
        while length < 50 and place - length >= 0 and history[place - length] == history[-1 - length]:
            if history[-1 - length] in breakers:
                break
            length += 1
        found[history[place + 1]] = max(found.get(history[place + 1], 0), length)
    return found


@given(st.lists(st.integers(0, 3), max_size=60), st.sets(st.integers(0, 3), max_size=2))
def test_repetitions(history: list[int], breakers: set[int]) -> None:
    mask = np.array([token in breakers for token in range(4)])
    tokens, lengths = repetitions(np.array(history, np.int64), mask)
    assert dict(zip(tokens.tolist(), lengths.tolist(), strict=True)) == plain_repetitions(history, breakers)


def test_dry_penalties_grow_with_the_repetition() -> None:
    logits = np.zeros(6, np.float32)
    history = np.array([1, 2, 3, 4, 1, 2, 3])
    found = dry(logits, history, np.zeros(6, bool), 0.8, 1.75, 2)
    assert found.tolist() == pytest.approx([0, 0, 0, 0, -0.8 * 1.75, 0])
    assert dry(logits, history, np.zeros(6, bool), 0.8, 1.75, 4).tolist() == [0] * 6
    breakers = np.array([False, False, True, False, False, False])
    assert dry(logits, history, breakers, 0.8, 1.75, 1).tolist() == pytest.approx([0, 0, 0, 0, -0.8, 0])
    endless = np.ones(200, np.int64)
    assert np.isfinite(dry(logits, endless, np.zeros(6, bool), 100.0, 100.0, 1)).all()
    assert not logits.any()


@given(SCORES, st.floats(0.01, 0.6))
def test_xtc(scores: list[float], threshold: float) -> None:
    found = shares(scores)
    likely = sorted((place for place, share in enumerate(found) if share >= threshold), key=lambda place: found[place])
    left = without_top_choices(np.array(scores), threshold).tolist()
    if len(likely) < 2:
        assert left == list(range(len(scores)))
    else:
        assert [found[place] for place in left if place in likely] == [found[likely[0]]]
        assert len(left) == len(scores) - len(likely) + 1


def test_the_sampler_applies_them() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    never = Sampler(Sampling(xtc_probability=1.0, xtc_threshold=0.1, seed=1), 4)
    assert {never.choose(logits) for _ in range(50)} == {2, 3}
    seen = Sampler(Sampling(xtc_probability=0.5, xtc_threshold=0.1, seed=1), 4)
    assert {seen.choose(logits) for _ in range(100)} == {0, 1, 2, 3}
    plain, other = Sampler(Sampling(seed=5), 4), Sampler(Sampling(seed=5, typical_p=1.0, xtc_probability=0.0), 4)
    assert [plain.choose(logits) for _ in range(20)] == [other.choose(logits) for _ in range(20)]
    least = Sampler(Sampling(typical_p=0.01, seed=1), 4)
    assert {least.choose(logits) for _ in range(20)} == {1}  # 1.2 nats, the entropy is 1.14
    greedy = Sampler(Sampling(temperature=0.0, dry_multiplier=5.0, dry_allowed_length=2), 4, [1, 2, 0, 1, 2])
    assert greedy.choose(logits) == 1  # 0 would be the third token that is repeated
    short = Sampler(Sampling(temperature=0.0, dry_multiplier=5.0, dry_penalty_last_n=3), 4, [1, 2, 0, 1, 2])
    assert short.choose(logits) == 0
    off = Sampler(Sampling(temperature=0.0, dry_multiplier=5.0, dry_penalty_last_n=0), 4, [1, 2, 0, 1, 2])
    assert off.choose(logits) == 0
    with pytest.raises(SamplingError, match="typical_p: expected 0 to 1, found 2"):
        Sampling(typical_p=2)


def test_breakers_are_tokens_that_hold_them() -> None:
    tokenizer = load_tokenizer({name: (DEMO_MODEL / name).read_bytes() for name in ("tokenizer.json", "config.json")})
    settings = Sampling(dry_multiplier=1.0)
    found = settings.breakers(tokenizer, tokenizer.size)
    assert found is not None
    for token in range(tokenizer.size):
        assert found[token] == any(mark in tokenizer.token_bytes(token) for mark in (b"\n", b":", b'"', b"*"))
    assert 0 < found.sum() < 500
    assert Sampling().breakers(tokenizer, tokenizer.size) is None
