"""What must hold of any answer: it equals itself however it is written, another value never does, and nothing around it
changes the verdict."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("math_verify")

from math_pairs import PAIRS

from ebpo_core.rewards import MathVerifier
from ebpo_core.rewards.comparison import equal
from ebpo_core.rewards.numerals import UnreadableError
from ebpo_core.rewards.presets import LENIENT, STRICT

if TYPE_CHECKING:
    from ebpo_core.rewards.presets import Preset

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def same(reference: str, answer: str, preset: Preset = STRICT) -> bool:
    try:
        return equal(reference, answer, preset)
    except UnreadableError:
        return False


@st.composite
def spellings(draw: st.DrawFn, value: Fraction | None = None) -> tuple[Fraction, str, str]:
    """A rational number in two of its spellings."""
    if value is None:
        value = Fraction(draw(st.integers(-(10**7), 10**7)), draw(st.sampled_from([1, 1, 2, 3, 4, 7, 8, 40, 625])))
    return value, draw(st.sampled_from(forms(value))), draw(st.sampled_from(forms(value)))


def forms(value: Fraction) -> list[str]:
    sign, size = ("-" if value < 0 else ""), abs(value)
    above, below = size.numerator, size.denominator
    found = [
        rf"{sign}\frac{{{above}}}{{{below}}}",
        rf"{sign}\dfrac{{{above * 3}}}{{{below * 3}}}",
        rf"\frac{{{sign}{above}}}{{{below}}}",
        rf"\left({sign}\tfrac{{{above}}}{{{below}}}\right)",
        f"{sign}{above}/{below}",
        rf"$x = {sign}\frac{{{above}}}{{{below}}}$",
        rf"{sign}\frac{{{above}}}{{{below}}}\text{{ apples}}",
    ]
    if below == 1:
        found += [
            f"{sign}{above}",
            f"{sign}{above:,}",
            f"{sign}{above:,}".replace(",", "{,}"),
            f"{sign}{above:,}".replace(",", ",\\!"),
            f"{sign}{above}.0",
            rf"\text{{{sign}{above}}}",
            rf"\mathbf{{{sign}{above}}}",
            f"\N{MINUS SIGN}{above}" if sign else f"+{above}",
            f"{sign}{above} apples",
            rf"{sign}{above}\,\mathrm{{apples}}",
            rf"{sign}\sqrt{{{above**2}}}",
            rf"{sign}{above} \cdot 1",
        ]
    if below < 10 and above < 10:
        found.append(rf"{sign}\frac{above}{below}")
    if below > 1 and above > below:
        found.append(rf"{sign}{above // below}\frac{{{above % below}}}{{{below}}}")
    if 10**6 % below == 0:
        whole, rest = divmod(size * 10**6, 10**6)
        decimal = f"{sign}{int(whole)}.{int(rest):06}"
        found += [decimal, decimal.rstrip("0") if rest else decimal, rf"{decimal}\times10^{{0}}"]
        found.append(rf"{sign}{above * (10**6 // below) * 10**2}\cdot 10^{{-8}}")
    return found


@given(spellings())
@SETTINGS
def test_a_number_equals_itself_in_any_spelling(pair: tuple[Fraction, str, str]) -> None:
    _, one, other = pair
    assert same(one, other)
    assert same(one, other, LENIENT)


@given(spellings(), st.sampled_from([Fraction(1), Fraction(-1), Fraction(1, 7), Fraction(1, 10**5)]), st.data())
@SETTINGS
def test_another_number_never_does(pair: tuple[Fraction, str, str], change: Fraction, data: st.DataObject) -> None:
    value, one, _ = pair
    other = data.draw(st.sampled_from(forms(value + change)))
    assert not same(one, other)
    assert not same(other, one)


ATOMS = {
    r"\sqrt{2}": [r"\sqrt2", r"2^{1/2}", r"2^\frac12", r"\sqrt{ 2 }", r"2^{0.5}"],
    r"\sqrt[3]{5}": [r"\sqrt[3]5", r"5^{\frac13}", r"5^\frac13"],
    r"\pi": [r"\boldsymbol{\pi}", "π", r"{\pi}"],
    "x": ["x", "{x}", r"\mathit{x}"],
    "e": [r"\mathrm{e}", "e", r"\text{e}"],
    r"\log_2 3": [r"\log_{2}3", r"\log_{2}{3}", r"\log_2(3)"],
    r"\frac{1}{7}": [r"\frac17", r"\dfrac{1}7", r"\frac{1}{7}"],
}


@st.composite
def formulas(draw: st.DrawFn) -> tuple[str, str, str]:
    """A formula in two spellings, and one of another value."""
    atom = draw(st.sampled_from(sorted(ATOMS)))
    other = draw(st.sampled_from(sorted(set(ATOMS) - {atom})))
    factor, term = draw(st.integers(2, 40)), draw(st.integers(1, 40))
    spelled = draw(st.sampled_from(ATOMS[atom]))
    signs = [r"\cdot ", r"\times "] if "frac{1}" in atom else [" ", r"\cdot ", r"\times ", r"\,"]  # else a mixed number
    product = draw(st.sampled_from(signs))
    one = rf"{factor}\cdot {atom}+{term}"
    two = draw(st.sampled_from([rf"{factor}{product}{spelled} + {term}", rf"{term}+{factor}{product}{spelled}"]))
    changed = draw(
        st.sampled_from(
            [
                rf"{factor + 1}\cdot {atom}+{term}",
                rf"{factor}\cdot {atom}-{term}",
                rf"{factor}\cdot {other}+{term}",
                f"{factor + term}",
                rf"{factor}\cdot {atom}\cdot {term + 1}+{term}",
            ]
        )
    )
    return one, two, changed


@given(formulas())
@SETTINGS
def test_a_formula_equals_itself_in_any_spelling_and_no_other(case: tuple[str, str, str]) -> None:
    one, two, changed = case
    assert same(one, two)
    assert same(two, one)
    assert not same(one, changed)
    assert not same(changed, two)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
@SETTINGS
def test_lists_in_any_order_tuples_in_one(values: list[int], chance: random.Random) -> None:
    shuffled = chance.sample(values, len(values))
    texts = [", ".join(map(str, found)) for found in (values, shuffled)]
    assert same(texts[0], texts[1])
    assert same(texts[0], rf"\{{{texts[1]}\}}")
    assert same(f"({texts[0]})", f"({texts[1]})") is (values == shuffled)
    assert not same(f"({texts[0]})", rf"\{{{texts[0]}\}}")
    changed = ", ".join(map(str, [values[0] + 101, *values[1:]]))
    assert not same(texts[0], changed)


@given(st.integers(-9, 9), st.integers(1, 9), st.booleans(), st.booleans())
@SETTINGS
def test_intervals_as_brackets_and_as_inequalities(start: int, width: int, left: bool, right: bool) -> None:
    end = start + width
    interval = f"{'[' if left else '('}{start},{end}{']' if right else ')'}"
    below, above = ("\\le" if left else "<"), ("\\leq" if right else "<")
    inequality = f"{start} {below} x {above} {end}"
    turned = f"{end} {'>=' if right else '>'} x {below.replace('le', 'ge').replace('<', '>')} {start}"
    for one in (interval, inequality, turned, rf"x \in {interval}"):
        assert same(one, interval)
        assert same(interval, one)
    assert not same(interval, f"{start},{end}")
    assert not same(interval, f"{start} {below} x {above} {end + 1}")


def test_the_verdict_depends_on_nothing_around_the_answer() -> None:
    pairs = [pair for kind in PAIRS.values() for pair in kind if "\\frac{1}{0}" not in pair[0]]
    completions = [f"\\boxed{{{answer}}}" for _, answer, _ in pairs]
    references = [reference for reference, *_ in pairs]
    with MathVerifier(workers=2, timeout=60) as verifier:
        together = verifier.score(completions, references)
        order = random.Random(1).sample(range(len(pairs)), len(pairs))
        shuffled = verifier.score([completions[n] for n in order], [references[n] for n in order])
        assert shuffled == [together[n] for n in order]
        few = random.Random(2).sample(range(len(pairs)), 40)
        with ThreadPoolExecutor(4) as threads:
            alone = list(threads.map(lambda n: verifier.score([completions[n]], [references[n]])[0], few))
        assert alone == [together[n] for n in few]
