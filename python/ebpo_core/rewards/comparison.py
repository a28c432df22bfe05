r"""Two nodes compared, formula by formula, by Math-Verify; runs in a worker process.

Lists, tuples, ratios and inequalities are taken apart here, so that a pair is no set and a clock time no fraction; what
is left are formulas, and Math-Verify says whether two are equal. A "yes" is then checked: it rounds (``float_rounding``,
``numeric_precision``), so that numbers that differ by little would be equal.
"""

from __future__ import annotations

import math
import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ebpo_core.rewards.numerals import UnreadableError
from ebpo_core.rewards.reading import Node, read
from ebpo_core.rewards.simple import same_numbers, same_units, same_words

if TYPE_CHECKING:
    from ebpo_core.rewards.presets import Preset

_COMMA = re.compile(r"-?[0-9]+,[0-9]+")
_MOST_DIGITS = 40_000
_POINTS = 3


def equal(reference: str, answer: str, preset: Preset) -> bool:
    """Whether an answer is the reference.

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
        return _ratio_and_value(left, right, preset) if kinds == {"ratio", "value"} else False
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
        left, right = _distinct(left, preset), _distinct(right, preset)
    if len(left.members) != len(right.members):
        return False
    names = [{member.name for member in node.members} for node in (left, right)]
    if any(len(found) > 1 and "" not in found for found in names) and {""} in names:
        return _in_order(left, right, preset)
    if left.kind == right.kind == "list" and {left.marks, right.marks} == {("or",), ("and",)} and _relational(left):
        return False
    free = list(right.members)
    for number, member in enumerate(left.members):
        # What stands at the same place first: most lists are in order.
        candidates = sorted(
            range(len(free)), key=lambda place, near=number: abs(place - near + len(left.members) - len(free))
        )
        match = next((place for place in candidates if _member(member, free[place], preset)), None)
        if match is None:
            return False
        del free[match]
    return True


def _distinct(node: Node, preset: Preset) -> Node:
    """A list without repetitions that are written alike, as far as two members are left."""
    members = tuple(dict.fromkeys(node.members))
    return node._replace(members=members) if len(members) > 1 else node


def _member(left: Node, right: Node, preset: Preset) -> bool:
    """Members of lists: ``p=5,q=2;p=7,q=2`` lists pairs, as ``(5,2),(7,2)`` does."""
    if {left.kind, right.kind} == {"list", "tuple"}:
        return ("(", ")") in (left.marks, right.marks) and _in_order(left, right, preset)
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
    one, other = left.members, right.members
    return all(
        _formulas(rf"({a.text}) \cdot ({d.text})", rf"({b.text}) \cdot ({c.text})", preset)
        for a, b, c, d in zip(one, one[1:], other, other[1:], strict=False)
    ) and all(member.kind == "value" for member in (*one, *other))


def _bare(node: Node) -> Node:
    return node._replace(members=tuple(member._replace(unit="") for member in node.members))


def _is_clock(node: Node, *, shape: bool = False) -> bool:
    """Whether hours and minutes are meant, not a ratio: ``1:05``, ``12:30 pm``, ``12:30`` (a ratio would be 2:5).

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


def _ratio_and_value(left: Node, right: Node, preset: Preset) -> bool:
    ratio, value = (left, right) if left.kind == "ratio" else (right, left)
    if len(ratio.members) != 2 or _is_clock(ratio) or value.unit:
        return False
    above, below = ratio.members
    if below.number == 0:
        return False
    return _formulas(rf"\frac{{{above.text}}}{{{below.text}}}", value.text, preset)


def _values(left: Node, right: Node, preset: Preset) -> bool:
    """Two formulas with their units."""
    if "\\circ" in left.text + right.text or not same_units(left, right):
        return _angles(left, right, preset)
    percent = [node.unit == "%" for node in (left, right)]
    if percent[0] != percent[1] and preset.percent and not (left.unit and right.unit):
        scaled = [rf"({node.text}) \cdot 100" if node.unit == "%" else node.text for node in (left, right)]
        if _formulas(scaled[0], scaled[1], preset):
            return True
    if left.number is not None and right.number is not None:
        return same_numbers(left, right, preset)
    if (left.digits or right.digits) and _rounds_to(left, right, preset):
        return True
    if _formulas(left.text, right.text, preset):
        return True
    return "degree" in (left.unit, right.unit) and _angles(left, right, preset)


def _angles(left: Node, right: Node, preset: Preset) -> bool:
    """Degrees and radians: ``90^\\circ`` is ``\\frac{\\pi}{2}``."""
    if "degree" in (left.unit, right.unit) and {left.unit, right.unit} <= {"degree", "", "rad"}:
        texts = [
            rf"({node.text}) \cdot \frac{{\pi}}{{180}}" if node.unit == "degree" else node.text
            for node in (left, right)
        ]
        return left.unit != right.unit and _formulas(texts[0], texts[1], preset)
    return same_units(left, right) and _formulas(left.text, right.text, preset)


def _rounds_to(left: Node, right: Node, preset: Preset) -> bool:
    """A decimal and what it is rounded from, relative to the decimal's digits."""
    for decimal, exact, is_reference in ((left, right, True), (right, left, False)):
        enough = decimal.digits >= preset.digits or (is_reference and preset.reference_precision and decimal.digits > 1)
        if not decimal.digits or not enough or exact.digits > decimal.digits:
            continue
        rounded, value = expression(decimal.text), expression(exact.text)
        if rounded.free_symbols or value.free_symbols:
            return False
        if not (preset.rational or (is_reference and preset.reference_precision)) and _value(value).is_rational:
            return False
        difference = abs(_value(rounded) - _value(value)).evalf(30)
        unit = abs(_value(rounded)).evalf(30)
        if not unit:
            return False
        import sympy

        place = Fraction(10) ** (int(sympy.floor(sympy.log(unit, 10))) - decimal.digits + 1)
        return bool(difference <= sympy.Rational(place.numerator, 2 * place.denominator))
    return False


def _formulas(left: str, right: str, preset: Preset) -> bool:
    """Whether Math-Verify finds two formulas equal, in either order, and a check does not find them different."""
    from math_verify import verify

    if left == right:
        return _is_definite(expression(left))
    complex_ = _is_complex(left) or _is_complex(right)
    pairs = [(expression(left, complex_), expression(right, complex_))]
    if not preset.case and (left.lower(), right.lower()) != (left, right) and _keeps_symbols(left, right):
        pairs.append((expression(left.lower(), complex_), expression(right.lower(), complex_)))
    for one, other in pairs:
        if not (_is_definite(one) and _is_definite(other)):
            return False
        found = _differ(one, other)
        if found is True:
            continue
        if verify(one, other, timeout_seconds=None, raise_on_error=True) or (
            verify(other, one, timeout_seconds=None, raise_on_error=True)
        ):
            return True
    return False


def _keeps_symbols(left: str, right: str) -> bool:
    """Whether letters in lower case are as many as before: R^2-r^2 must not become 0."""
    for text in (left, right):
        symbols = {str(symbol) for symbol in expression(text).free_symbols}
        if len({symbol.lower() for symbol in symbols}) < len(symbols):
            return False
    return True


@lru_cache(maxsize=1024)
def expression(text: str, complex_: bool = False) -> Any:
    """SymPy's expression of a formula, as the parser of Math-Verify reads it.

    Raises:
        UnreadableError: It cannot.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, normalize_latex
    from sympy import I, Symbol

    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none", equations=False
    )
    real = None if complex_ else True
    try:
        found = latex2sympy(
            normalize_latex(text, config),
            is_real=real,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception as error:
        raise UnreadableError(
            f"Math-Verify cannot read it: {str(error).splitlines()[0][:80] if str(error) else ''}"
        ) from error
    if found is None or isinstance(found, (list, dict, bool)):
        raise UnreadableError("Math-Verify reads no formula in it")
    return found.xreplace({Symbol("i", real=real): I}) if hasattr(found, "xreplace") and complex_ else found


def _is_complex(text: str) -> bool:
    from math_verify.grader import should_treat_as_complex

    return should_treat_as_complex(text) or "i" in {
        str(symbol) for symbol in getattr(expression(text), "free_symbols", ())
    }


def _is_definite(found: Any) -> bool:
    """Whether a formula has a value: not 1/0."""
    import sympy

    if isinstance(found, sympy.MatrixBase):
        return all(map(_is_definite, found))
    if not isinstance(found, sympy.Basic):
        return False
    if found.has(sympy.zoo, sympy.nan):
        return False
    return not (isinstance(found, sympy.Expr) and not found.free_symbols and _value(found).has(sympy.zoo, sympy.nan))


def _value(found: Any) -> Any:
    try:
        return found.doit()
    except (AttributeError, NotImplementedError, ValueError, TypeError):
        return found


def _differ(left: Any, right: Any) -> bool | None:
    """True where two expressions are certainly different: exactly for rational numbers, else at more digits than any
    cancellation in them can hide, with rational numbers for their variables."""
    import sympy

    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return None
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if left.free_symbols != right.free_symbols and not (left.free_symbols and right.free_symbols):
        # A variable on one side only has to cancel.
        pass
    digits = _digits(left, right)
    if not symbols:
        return _nonzero(_value(left) - _value(right), digits)
    found: list[bool | None] = []
    chance = random.Random(0)  # noqa: S311  points, no secrets
    for _ in range(_POINTS):
        at = {symbol: sympy.Rational(chance.randint(11, 97), chance.choice((7, 11, 13))) for symbol in symbols}
        try:
            difference = _value(left.subs(at)) - _value(right.subs(at))
            found.append(_nonzero(difference, digits))
        except (TypeError, ValueError, NotImplementedError, AttributeError, ArithmeticError):
            found.append(None)
    return True if True in found else None


def _digits(left: Any, right: Any) -> int:
    """Digits that tell numbers apart whose parts have powers and factorials as large as these."""
    import sympy

    most = 100
    for found in (left, right):
        for part in sympy.preorder_traversal(found):
            if isinstance(part, sympy.Pow) and part.exp.is_number and part.base.is_number:
                base, exponent = abs(part.base.evalf(5)), abs(part.exp.evalf(5))
                if (base.is_Float and base and exponent.is_Float) or exponent.is_Integer:
                    size = abs(float(sympy.log(base, 10))) * min(float(exponent), _MOST_DIGITS)
                    most += int(min(size, _MOST_DIGITS)) + 1
            elif isinstance(part, sympy.factorial) and part.args[0].is_Integer:
                size = int(part.args[0])
                most += int(math.lgamma(size + 1) / math.log(10)) + 1
            elif isinstance(part, sympy.Integer) and abs(part.p) > 10**15:
                most += part.p.bit_length() // 3
    return min(most, _MOST_DIGITS)


def _nonzero(difference: Any, digits: int) -> bool | None:
    import sympy

    if difference.is_Rational:
        return bool(difference != 0)
    if not difference.is_number or difference.has(sympy.oo, -sympy.oo, sympy.nan, sympy.zoo):
        return bool(difference not in (0,)) if difference in (sympy.oo, -sympy.oo) else None
    found = difference.evalf(15, maxn=digits)
    if found.is_Rational:
        return bool(found != 0)
    parts = found.as_real_imag()
    if any(not (part.is_Float or part.is_Integer or part.is_Rational) for part in parts):
        return None
    # SymPy gives precision 1 to what it could not tell from zero.
    return any(part != 0 and getattr(part, "_prec", 53) > 1 for part in parts)


def _relations_and_sets(left: Node, right: Node, preset: Preset) -> bool:
    from ebpo_core.rewards.regions import same_regions

    return same_regions(left, right, preset)
