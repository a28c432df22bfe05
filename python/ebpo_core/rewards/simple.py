"""Comparisons without a symbolic library: two plain numbers, words, and units."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction

    from ebpo_core.rewards.nodes import Node
    from ebpo_core.rewards.presets import Preset


def decided(reference: Node, answer: Node, preset: Preset) -> bool | None:
    """True if two nodes are the same, as far as plain numbers and words tell; None where Math-Verify has to."""
    for node in (reference, answer):
        if node.name or node.members or node.kind not in ("value", "words"):
            return None
    if reference.number is not None and answer.number is not None:
        if "degree" in (reference.unit, answer.unit) and reference.number != answer.number:
            return None
        if not same_units(reference, answer):
            return False
        if preset.percent and (reference.unit == "%") != (answer.unit == "%"):
            scaled = [
                node.number * (100 if node.unit == "%" else 1)
                for node in (reference, answer)
                if node.number is not None
            ]
            return scaled[0] == scaled[1] or same_numbers(reference, answer, preset)
        return same_numbers(reference, answer, preset)
    if "words" in (reference.kind, answer.kind):
        return same_words(reference, answer)
    return True if reference.text == answer.text and same_units(reference, answer) else None


def same_units(left: Node, right: Node) -> bool:
    """A unit may be missing on one side; a percent sign is part of the value."""
    units = {left.unit, right.unit} - {"", "%"}
    return len(units) < 2 and not (units and "%" in (left.unit, right.unit))


def same_numbers(reference: Node, answer: Node, preset: Preset) -> bool:
    """Plain numbers: exactly the same, or to the digits of a decimal where the preset says so."""
    left, right = reference.number, answer.number
    if left is None or right is None:
        return False
    if left == right:
        return True
    if preset.reference_precision and reference.digits > 1:
        return _rounds(left, reference.digits, right)
    if preset.rational and answer.digits >= preset.digits and not reference.digits:
        return _rounds(right, answer.digits, left)
    return False


def same_words(left: Node, right: Node) -> bool:
    """Words letter by letter, whatever their case, but for single letters, of which one may stand bare."""
    if left.number is not None or right.number is not None or left.unit or right.unit:
        return False
    one, other = (re.sub(r"\\text\{(\w+)\}", r"\1", node.text) for node in (left, right))
    return one == other if len(one) == 1 else one.casefold() == other.casefold()


def _rounds(decimal: Fraction, digits: int, value: Fraction) -> bool:
    """True if a value is within half a unit in the last of a decimal's significant digits."""
    if decimal == 0:
        return False
    size = abs(decimal)
    exponent = len(str(size.numerator)) - len(str(size.denominator))
    while size >= 10 ** (exponent + 1) if exponent >= -1 else size * 10 ** (-exponent - 1) >= 1:
        exponent += 1
    while size < 10**exponent if exponent >= 0 else size * 10**-exponent < 1:
        exponent -= 1
    place = exponent - digits + 1
    difference = abs(value - decimal) * 2
    return bool(difference * 10**-place <= 1 if place < 0 else difference <= 10**place)
