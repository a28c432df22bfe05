r"""Two nodes compared, formula by formula, by Math-Verify; runs in a worker process.

Lists, tuples, ratios and inequalities are taken apart, so that a pair is no set and a clock time no fraction. What is
left are formulas, see ``formulas``.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING

from ebpo_core.rewards.formulas import evaluated, expression, same_formulas
from ebpo_core.rewards.reading import read
from ebpo_core.rewards.simple import same_numbers, same_units, same_words

if TYPE_CHECKING:
    from ebpo_core.rewards.nodes import Node
    from ebpo_core.rewards.presets import Preset

_COMMA = re.compile(r"-?[0-9]+,[0-9]+")


def equal(reference: str, answer: str, preset: Preset) -> bool:
    """True if an answer is the reference.

    Raises:
        UnreadableError: One of them has no reading.
    """
    left, right = read(reference), read(answer)
    if _same(left, right, preset):
        return True
    if left.kind in ("list", "set", "tuple") and right.kind == "value" and right.number is not None and "," in answer:
        # "2,100" beside a list is a list.
        return _same(left, read(answer, lists=True), preset)
    if preset.reference_precision and "value" in (left.kind, right.kind):
        # A decimal comma, beside a number.
        points = [
            text.strip("$ ").replace(",", ".") if _COMMA.fullmatch(text.strip("$ ")) else text
            for text in (reference, answer)
        ]
        if points != [reference, answer]:
            return _same(read(points[0]), read(points[1]), preset)
    return False


def _same(left: Node, right: Node, preset: Preset) -> bool:
    if left.name and right.name and not _same_name(left.name, right.name, preset):
        if left.kind != "value" or right.kind != "value":
            return False
        from ebpo_core.rewards.regions import same_equations

        return same_equations(left, right)  # y=x and x=y
    kinds = {left.kind, right.kind}
    for node in (left, right):
        if (
            node.kind == "value"
            and preset.chains
            and not all(_same(member, node._replace(name="", members=()), preset) for member in node.members)
        ):
            return False  # an equation that does not hold
    if kinds == {"value"}:
        return _values(left, right, preset)
    if "words" in kinds:
        return same_words(left, right)
    if kinds == {"ratio"}:
        return _ratios(left, right, preset)
    if "ratio" in kinds:
        return _ratio_andevaluated(left, right, preset) if kinds == {"ratio", "value"} else False
    if "relation" in kinds or "sets" in kinds or _is_region(left) or _is_region(right):
        return _relations_and_sets(left, right, preset)
    if kinds == {"tuple"}:
        brackets = left.marks == right.marks or len(left.members) > 2
        return brackets and _in_order(left, right, preset)
    if kinds <= {"list", "set"}:
        return _in_any_order(left, right, preset)
    if kinds == {"set", "value"}:
        return _alone(left, right, preset)
    if kinds == {"list", "tuple"}:
        if any(member.kind == "list" for member in (*left.members, *right.members)):
            return False
        return preset.tuples and ("(", ")") in (left.marks, right.marks) and _in_order(left, right, preset)
    return False


def _same_name(left: str, right: str, preset: Preset) -> bool:
    return left == right or (not preset.case and left.casefold() == right.casefold())


def _alone(left: Node, right: Node, preset: Preset) -> bool:
    """A set of one member, and that member."""
    if left.kind == "set":
        return len(left.members) == 1 and _same(left.members[0], right, preset)
    return len(right.members) == 1 and _same(left, right.members[0], preset)


def _in_order(left: Node, right: Node, preset: Preset) -> bool:
    return len(left.members) == len(right.members) and all(
        _same(one, other, preset) for one, other in zip(left.members, right.members, strict=True)
    )


def _in_any_order(left: Node, right: Node, preset: Preset) -> bool:
    """Lists and sets: the same members as often, in any order, but in order where only one side names its members."""
    if preset.tuples:
        left, right = _distinct(left), _distinct(right)
    if len(left.members) != len(right.members):
        return False
    names = [{member.name for member in node.members} for node in (left, right)]
    if any(len(found) > 1 and "" not in found for found in names) and {""} in names:
        return _in_order(left, right, preset)
    if left.kind == right.kind == "list" and {left.marks, right.marks} == {("or",), ("and",)} and _relational(left):
        return False
    free = list(right.members)
    for member in left.members:
        # What is written alike first: a number is found in a long list without asking Math-Verify.
        alike = [place for place, other in enumerate(free) if other == member]
        match = next((place for place in (*alike, *range(len(free))) if _member(member, free[place], preset)), None)
        if match is None:
            return False
        del free[match]
    return True


def _distinct(node: Node) -> Node:
    """A list without repetitions that are written alike, as far as two members are left."""
    members = tuple(dict.fromkeys(node.members))
    return node._replace(members=members) if len(members) > 1 else node


def _member(left: Node, right: Node, preset: Preset) -> bool:
    """Members of lists: ``p=5,q=2;p=7,q=2`` lists pairs, as ``(5,2),(7,2)`` does."""
    if {left.kind, right.kind} == {"list", "tuple"}:
        return ("(", ")") in (left.marks, right.marks) and _in_order(left, right, preset)
    if {left.kind, right.kind} == {"set", "value"}:
        return False  # {{1},2} is not {1,2}
    return _same(left, right, preset)


def _relational(node: Node) -> bool:
    return all(member.kind == "relation" for member in node.members)


def _is_region(node: Node) -> bool:
    return node.kind == "list" and len(node.members) > 1 and node.marks in (("or",), ("and",)) and _relational(node)


def _ratios(left: Node, right: Node, preset: Preset) -> bool:
    """In proportion; clock times part by part."""
    if len(left.members) != len(right.members):
        return False
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if _is_clock(left, shape=True) or _is_clock(right, shape=True):
        alike = _is_clock(left, shape=True) == _is_clock(right, shape=True)
        return alike and _in_order(_bare(left), _bare(right), preset)
    pairs = list(zip(left.members, right.members, strict=True))
    if any(member.kind != "value" for pair in pairs for member in pair):
        return False
    if any(all(member.number == 0 for member in node.members) for node in (left, right)):
        return False  # 0:0 is in every proportion
    return all(
        same_formulas(rf"({a.text}) \cdot ({d.text})", rf"({b.text}) \cdot ({c.text})", preset)
        for (a, c), (b, d) in combinations(pairs, 2)
    )


def _bare(node: Node) -> Node:
    return node._replace(members=tuple(member._replace(unit="") for member in node.members))


def _is_clock(node: Node, *, shape: bool = False) -> bool:
    """True if hours and minutes are meant, not a ratio: ``1:05``, ``12:30 pm``, ``12:30`` (a ratio would be 2:5).

    With ``shape``: whether they may be meant.
    """
    parts = re.findall("[0-9]+", node.text)
    numbers = [member.number for member in node.members]
    if any(number is None or number.denominator != 1 for number in numbers) or len(parts) != len(numbers):
        return False
    if any(len(part) != 2 for part in parts[1:]):
        return False
    hours, minutes = (int(number) for number in numbers[:2] if number is not None)
    if not (0 <= hours <= 24 and 0 <= minutes < 60):
        return False
    return shape or bool(node.unit) or parts[1][0] == "0" or math.gcd(hours, minutes) > 1 or len(parts) == 3


def _ratio_andevaluated(left: Node, right: Node, preset: Preset) -> bool:
    ratio, value = (left, right) if left.kind == "ratio" else (right, left)
    if len(ratio.members) != 2 or _is_clock(ratio) or value.unit:
        return False
    above, below = ratio.members
    if below.number == 0:
        return False
    return same_formulas(rf"\frac{{{above.text}}}{{{below.text}}}", value.text, preset)


def _values(left: Node, right: Node, preset: Preset) -> bool:
    """Two formulas with their units."""
    if "\\circ" in left.text + right.text or not same_units(left, right):
        return _angles(left, right, preset)
    percent = [node.unit == "%" for node in (left, right)]
    if percent[0] != percent[1] and preset.percent and not (left.unit and right.unit):
        scaled = [rf"({node.text}) \cdot 100" if node.unit == "%" else node.text for node in (left, right)]
        if same_formulas(scaled[0], scaled[1], preset):
            return True
    if left.number is not None and right.number is not None:
        return same_numbers(left, right, preset)
    if (left.digits or right.digits) and _rounds_to(left, right, preset):
        return True
    if same_formulas(left.text, right.text, preset):
        return True
    return "degree" in (left.unit, right.unit) and _angles(left, right, preset)


def _angles(left: Node, right: Node, preset: Preset) -> bool:
    """Degrees and radians: ``90^\\circ`` is ``\\frac{\\pi}{2}``."""
    if "degree" in (left.unit, right.unit) and {left.unit, right.unit} <= {"degree", "", "rad"}:
        texts = [
            rf"({node.text}) \cdot \frac{{\pi}}{{180}}" if node.unit == "degree" else node.text
            for node in (left, right)
        ]
        return left.unit != right.unit and same_formulas(texts[0], texts[1], preset)
    return same_units(left, right) and same_formulas(left.text, right.text, preset)


def _rounds_to(left: Node, right: Node, preset: Preset) -> bool:
    """A decimal and what it is rounded from, relative to the decimal's digits."""
    for decimal, exact, is_reference in ((left, right, True), (right, left, False)):
        enough = decimal.digits >= preset.digits or (is_reference and preset.reference_precision and decimal.digits > 1)
        if not decimal.digits or not enough or exact.digits > decimal.digits:
            continue
        rounded, value = expression(decimal.text), expression(exact.text)
        if rounded.free_symbols or value.free_symbols:
            return False
        if not (preset.rational or (is_reference and preset.reference_precision)) and evaluated(value).is_rational:
            return False
        difference = abs(evaluated(rounded) - evaluated(value)).evalf(30)
        unit = abs(evaluated(rounded)).evalf(30)
        if not unit:
            return False
        import sympy

        place = Fraction(10) ** (int(sympy.floor(sympy.log(unit, 10))) - decimal.digits + 1)
        return bool(difference <= sympy.Rational(place.numerator, 2 * place.denominator))
    return False


def _relations_and_sets(left: Node, right: Node, preset: Preset) -> bool:
    from ebpo_core.rewards.regions import same_regions

    return same_regions(left, right, preset)
