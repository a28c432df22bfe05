"""Posteriors against binomial sums, priors against simulation, labels, buckets and rows."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.curriculum.difficulty import arrange, bucket_of, check_edges, curriculum_rows, difficulties
from ebpo_core.curriculum.posterior import JEFFREYS, UNIFORM, BetaPrior, fit_prior, posterior
from ebpo_core.curriculum.topics import PAPER_TOPICS, UNLABELLED, column_topics, function_topics, parse_label
from ebpo_core.evaluation.problems import from_rows


@given(st.integers(1, 40), st.data(), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_ends_of_an_interval_cut_off_equal_tails(rollouts: int, data: st.DataObject, level: float) -> None:
    """Under the uniform prior P(rate <= x) = P(Binomial(rollouts + 1, x) > passes), summed here in exact fractions."""
    passes = data.draw(st.integers(0, rollouts))
    found = posterior(passes, rollouts, level=level)
    for end, probability in ((found.low, (1 - level) / 2), (found.high, (1 + level) / 2)):
        x, n = Fraction(end), rollouts + 1
        below = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(passes + 1, n + 1))
        assert float(below) == pytest.approx(probability, abs=1e-10)


@given(st.integers(1, 64), st.data())
def test_posteriors(rollouts: int, data: st.DataObject) -> None:
    passes = data.draw(st.integers(0, rollouts))
    found = posterior(passes, rollouts)
    assert found.mean == (passes + 1) / (rollouts + 2)
    assert 0 < found.low < found.mean < found.high < 1
    mirrored = posterior(rollouts - passes, rollouts)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)
    if passes < rollouts:
        more = posterior(passes + 1, rollouts)
        assert more.low > found.low
        assert more.high > found.high


def test_intervals_cover_as_often_as_they_say() -> None:
    """For rates drawn from the prior a credible interval's coverage is exact."""
    rng = np.random.default_rng(0)
    prior = BetaPrior(2.0, 5.0)
    rates = rng.beta(*prior, 4000)
    intervals = [posterior(int(c), 8, prior, level=0.8) for c in rng.binomial(8, rates)]
    covered = sum(found.low <= rate <= found.high for found, rate in zip(intervals, rates, strict=True))
    assert covered / 4000 == pytest.approx(0.8, abs=5 * math.sqrt(0.8 * 0.2 / 4000))


@pytest.mark.parametrize("true", [(0.6, 1.4), (3.0, 2.0), (8.0, 30.0)])
def test_a_fitted_prior_is_the_one_that_drew_the_rates(true: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    passes = rng.binomial(8, rng.beta(*true, 20_000))
    assert fit_prior(passes.tolist(), [8] * len(passes)) == pytest.approx(true, rel=0.1)


def test_a_fitted_prior_of_equal_problems_shrinks_all_the_way() -> None:
    passes = np.random.default_rng(2).binomial(16, 0.3, 300)
    prior = fit_prior(passes.tolist(), [16] * 300)
    assert prior.a + prior.b > 100
    assert prior.a / (prior.a + prior.b) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("passes", "rollouts"), [([], []), ([1], [4]), ([0, 0], [4, 4]), ([4, 4], [4, 4]), ([1, 0], [1, 1])]
)
def test_nothing_to_fit_is_the_uniform_prior(passes: list[int], rollouts: list[int]) -> None:
    assert fit_prior(passes, rollouts) == UNIFORM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 4), "passes=5"),
        ((-1, 4), "passes=-1"),
        ((1, 4, BetaPrior(0.0, 1.0)), "prior="),
        ((1, 4, UNIFORM, 1.0), r"level=1\.0"),
    ],
)
def test_impossible_posteriors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior(*arguments)


PROBLEMS = from_rows(
    [{"prompt": name, "id": name, "topic": topic} for name, topic in zip("abcde", "xxyyx", strict=True)]
)
PASSES = {"a": 4, "b": 0, "c": 2, "d": 1, "e": 3}
RECORDS = [
    {"problem": name, "sample": number, "score": 1.0 if number < count else 0.5}
    for name, count in PASSES.items()
    for number in range(5)
]


def test_difficulties_and_rows() -> None:
    found = difficulties(PROBLEMS, RECORDS, 4, edges=(0.25, 0.75), prior=JEFFREYS)
    assert [one.passes for one in found] == list(PASSES.values())
    assert [one.bucket for one in found] == [0, 2, 1, 1, 0]
    rows = curriculum_rows(PROBLEMS, found)
    assert rows[2] == {
        "prompt": "c",
        "id": "c",
        "topic": "y",
        "pass_rate": 0.5,
        "passes": 2,
        "rollouts": 4,
        "pass_rate_mean": 0.5,
        "pass_rate_low": found[2].posterior.low,
        "pass_rate_high": found[2].posterior.high,
        "difficulty": 1,
    }
    assert [row["id"] for row in arrange(rows, "easy_to_hard")] == list("aecdb")
    assert [row["id"] for row in arrange(rows, "none")] == list("abcde")
    topics = [row["topic"] for row in arrange(rows, "topic_blocks", batch_size=1)]
    assert topics in (["x", "x", "x", "y", "y"], ["y", "y", "x", "x", "x"])
    labelled = curriculum_rows(PROBLEMS, found, list("ppppp"))
    assert {row["topic"] for row in labelled} == {"p"}
    empirical = difficulties(PROBLEMS, RECORDS, 4, prior="empirical")
    prior = fit_prior(list(PASSES.values()), [4] * 5)
    assert empirical[1].posterior == posterior(0, 4, prior)


def test_rollouts_that_are_missing_raise() -> None:
    with pytest.raises(ValueError, match="5 problems have not had 6 rollouts"):
        difficulties(PROBLEMS, RECORDS, 6)
    with pytest.raises(ValueError, match="0 rollouts"):
        difficulties(PROBLEMS, RECORDS, 0)


def test_buckets() -> None:
    assert [bucket_of(rate) for rate in (1.0, 0.8, 0.79, 0.2, 0.19, 0.0)] == [0, 0, 1, 3, 4, 4]
    assert bucket_of(0.5, ()) == 0
    for edges in ((0.5, 0.2), (0.2, 0.2), (0.0,), (1.0,)):
        with pytest.raises(ValueError, match="edges"):
            check_edges(edges)


@pytest.mark.parametrize("label", PAPER_TOPICS)
@pytest.mark.parametrize("form", ["{}", " {}.\n", '"{}"', "**{}**", "`{}`", '"{}."'])
def test_labels_are_read(label: str, form: str) -> None:
    for text in (label, label.upper(), label.replace(" ", "  ")):
        assert parse_label(form.format(text)) == label


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Algebra",
        "Linear",
        "Topic: Linear Algebra",
        "Linear Algebra or Geometry & Trigonometry",
        "It is Linear Algebra.",
        "Algebra and Number Theory",
        "6",
        "<think>Linear Algebra</think>",
        "Linear Algebra\nBecause of the matrix.",
        "'",
        '"',
    ],
)
def test_anything_else_is_no_label(reply: str) -> None:
    assert parse_label(reply) is None


def test_the_paper_has_nine_topics() -> None:
    assert len(set(PAPER_TOPICS)) == 9


def first_letter(row: dict[str, Any]) -> str | None:
    return None if row["prompt"] == "a" else row["prompt"]


def wrong_kind(row: dict[str, Any]) -> int:
    return 3


def test_topics_of_columns_and_functions() -> None:
    rows = from_rows([{"prompt": "a", "subject": "s"}, {"prompt": "b", "subject": None}, {"prompt": "c", "subject": 4}])
    assert column_topics(rows, "subject") == ["s", UNLABELLED, "4"]
    with pytest.raises(ValueError, match="column 'none'"):
        column_topics(rows, "none")
    assert function_topics(rows, f"{__name__}:first_letter") == [UNLABELLED, "b", "c"]
    assert function_topics(rows, first_letter) == [UNLABELLED, "b", "c"]
    with pytest.raises(TypeError, match="returned 3"):
        function_topics(rows, wrong_kind)  # type: ignore[arg-type]
