"""How tokens are chosen: greedy, filters, seeds, refusals."""

import numpy as np
import pytest

from bincompress.inference.sampling import Sampler, Sampling, candidates
from bincompress.model.errors import SamplingError

LOGITS = np.log(np.array([0.1, 0.2, 0.4, 0.25, 0.05], np.float32))
UNSEEN = np.zeros(5, bool)


def kept(settings: Sampling) -> list[int]:
    return [int(token) for token in candidates(LOGITS, UNSEEN, settings)[0]]


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
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SamplingError, match=f"^{name}: expected .*, found "):
        Sampling(**{name: value})  # type: ignore[arg-type]
