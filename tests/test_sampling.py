"""How tokens are chosen: greedy, filters, seeds, refusals."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bincompress.inference.sampling import Sampler, Sampling, biased, candidates, filtered, less_repeated
from bincompress.model.errors import SamplingError

LOGITS = np.log(np.array([0.1, 0.2, 0.4, 0.25, 0.05], np.float32))
UNSEEN = np.zeros(5, bool)


def kept(chosen: Sampling) -> list[int]:
    return [int(token) for token in candidates(LOGITS, UNSEEN, chosen)[0]]


def test_filters_by_hand() -> None:
    assert kept(Sampling()) == [0, 1, 2, 3, 4]
    assert kept(Sampling(top_k=2)) == [2, 3]
    assert kept(Sampling(top_p=0.6)) == [2, 3]
    assert kept(Sampling(top_p=1e-9)) == [2]
    assert kept(Sampling(top_p=0.0)) == [2]
    assert kept(Sampling(min_p=0.45)) == [1, 2, 3]
    assert kept(Sampling(top_k=4, top_p=0.9, min_p=0.3)) == [1, 2, 3]


def test_temperature_zero_takes_the_largest() -> None:
    assert Sampler(Sampling(temperature=0.0), 5).choose(LOGITS) == 2


def test_repetition_penalty_remembers_what_was_chosen() -> None:
    logits = np.array([3.0, 2.9, -1.0], np.float32)
    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=1.5), 3)
    assert [sampler.choose(logits), sampler.choose(logits)] == [0, 1]
    assert Sampler(Sampling(temperature=0.0, repetition_penalty=1.5), 3, seen=[0]).choose(logits) == 1


def test_a_seed_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((50, 5)).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), 5)
        return [sampler.choose(step) for step in steps]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(seed=1), 5)
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    assert np.abs(counts - np.exp(LOGITS)).max() < 0.03


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("temperature", 10**400),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SamplingError, match=f"^{name}: expected .*, found "):
        Sampling(**{name: value})  # type: ignore[arg-type]


@settings(max_examples=60)
@given(
    drawn=st.lists(st.integers(0, 11), max_size=30),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=4),
    seed=st.integers(0, 99),
)
def test_penalties_and_bias_follow_their_formula(
    drawn: list[int], presence: float, frequency: float, bias: dict[int, float], seed: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    counts = np.bincount(drawn, minlength=12).astype(np.int32)
    found = less_repeated(biased(logits, tuple(bias.items())), counts, presence, frequency)
    for token in range(12):
        plain = float(logits[token]) + bias.get(token, 0.0)
        for number in range(drawn.count(token)):
            plain -= frequency + (presence if number == 0 else 0.0)
        assert found[token] == pytest.approx(plain, abs=1e-4)


def test_penalties_count_what_was_chosen_and_not_the_prompt() -> None:
    logits = np.array([3.0, 2.5, 2.2], np.float32)
    greedy = Sampler(Sampling(temperature=0.0, frequency_penalty=0.4), 3, seen=[0, 1, 2])
    assert [greedy.choose(logits) for _ in range(6)] == [0, 0, 1, 0, 2, 1]
    once = Sampler(Sampling(temperature=0.0, presence_penalty=2.0), 3)
    assert [once.choose(logits) for _ in range(4)] == [0, 1, 2, 0]


def test_a_bias_bans_and_forces_tokens() -> None:
    logits = np.array([3.0, 2.5, 2.2], np.float32)
    assert Sampler(Sampling(temperature=0.0, logit_bias=((0, -100.0),)), 3).choose(logits) == 1
    drawing = Sampler(Sampling(seed=1, logit_bias=((2, 100.0),)), 3)
    assert [drawing.choose(logits) for _ in range(20)] == [2] * 20
    with pytest.raises(SamplingError, match="logit_bias: expected tokens of the vocabulary, 0 to 2, found 3"):
        Sampler(Sampling(logit_bias=((3, 1.0),)), 3)


@pytest.mark.parametrize("bias", [((-1, 0.0),), ((0, 101.0),), ((0, float("nan")),)])
def test_a_bias_has_limits(bias: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(SamplingError, match="logit_bias: expected"):
        Sampling(logit_bias=bias)


@settings(max_examples=60)
@given(seed=st.integers(0, 999), top_p=st.floats(0, 1), temperature=st.floats(0.05, 3), scale=st.floats(0.1, 20))
def test_top_p_keeps_what_a_full_sort_keeps(seed: int, top_p: float, temperature: float, scale: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal(500) * scale).astype(np.float32)
    values = logits / np.float32(temperature)
    shares = np.exp((values - values.max()).astype(np.float64))
    order = np.argsort(values, kind="stable")
    below = np.cumsum(shares[order]) / shares.sum()
    # What lies within a rounding of the bound may go either way.
    sure, possible = set(order[below > 1 - top_p + 1e-9]), set(order[below > 1 - top_p - 1e-9]) | {order[-1]}
    found = {int(token) for token in candidates(logits, np.zeros(500, bool), Sampling(temperature, top_p=top_p))[0]}
    assert sure <= found <= possible


EXTREMES = [5e-324, 1e-300, 1e-45, 1e-38, 1e-30, 1e-6, 0.5, 1e6, 1e38, 1e300, 1.7e308, 10**300]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", EXTREMES)
@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 7, "top_p": 0.5}])
def test_extreme_temperatures_draw_as_a_plain_implementation(temperature: float, others: dict[str, float]) -> None:
    rng = np.random.default_rng(3)
    for scale in (1.0, 20.0, 1e4):
        logits = (rng.standard_normal(50) * scale).astype(np.float32)
        chosen = Sampling(temperature, seed=1, **others)  # type: ignore[arg-type]
        drawing = Sampler(chosen, 50)
        ids = {drawing.choose(logits) for _ in range(20)}
        order = sorted(range(50), key=lambda token: -float(logits[token]))
        shares = _plain_shares([float(logits[token]) for token in order], temperature)
        order, shares = order[: chosen.top_k or 50], shares[: chosen.top_k or 50]
        total, before = math.fsum(shares), 0.0
        kept: set[int] = set()
        for token, share in zip(order, shares, strict=True):
            if share > 0 and (before < chosen.top_p * total or not kept) and share >= chosen.min_p * shares[0]:
                kept.add(token)
            before += share
        # Where the temperature makes all alike, which of the equal tokens top-p keeps is open, but not how many.
        assert len(ids - kept) == 0 or shares[0] == shares[-1]
        assert temperature > 1e-30 or ids == {int(np.argmax(logits))}
        assert temperature < 1e30 or len(ids) > 1


def _plain_shares(logits: list[float], temperature: float) -> list[float]:
    """Return the softmax of logits, the largest first, in exact fractions up to the last step."""
    exact = [(Fraction(logit) - Fraction(logits[0])) / Fraction(temperature) for logit in logits]
    return [math.exp(float(max(each, Fraction(-10000)))) for each in exact]


@pytest.mark.parametrize("vocab", [50, 640, 1_000, 4_097])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_is_that_of_a_whole_sort(vocab: int, ties: bool) -> None:
    random = np.random.default_rng(vocab)
    for count in (1, 2, 9, 15, 16, 49):
        logits = random.standard_normal(vocab).astype(np.float32)
        if ties:
            logits = np.round(logits)
        logits[random.random(vocab) < 0.3] = -np.inf
        least = np.sort(logits)[-count]
        ids, _ = filtered(logits, Sampling(top_k=count))
        np.testing.assert_array_equal(ids, np.flatnonzero(logits >= least))
