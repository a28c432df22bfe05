"""Two formulas: Math-Verify's word on whether they are equal, and a check of it by exact numbers; in a worker process.

Math-Verify rounds (``float_rounding``, ``numeric_precision``), so that numbers that differ by little would be equal.
"""

from __future__ import annotations

import math
import random
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ebpo_core.rewards.numerals import UnreadableError

if TYPE_CHECKING:
    from ebpo_core.rewards.presets import Preset

_CAPITAL = re.compile(r"(\\[a-zA-Z]+)|[A-Z]")  # letters, and not those of a command such as \Delta
_MOST_DIGITS = 40_000
_POINTS = 3


def same_formulas(left: str, right: str, preset: Preset) -> bool:
    """True if Math-Verify finds two formulas equal, in either order, and a check does not find them different."""
    from math_verify import verify

    if left == right:
        return is_definite(expression(left))
    complex_ = _is_complex(left) or _is_complex(right)
    pairs = [(expression(left, complex_), expression(right, complex_))]
    small = [_CAPITAL.sub(lambda match: match[1] or match[0].lower(), text) for text in (left, right)]
    if not preset.case and small != [left, right] and _keeps_symbols(left, right):
        pairs.append((expression(small[0], complex_), expression(small[1], complex_)))
    for one, other in pairs:
        if not (is_definite(one) and is_definite(other)):
            return False
        found = differ(one, other)
        if found is True:
            continue
        if verify(one, other, timeout_seconds=None, raise_on_error=True) or (
            verify(other, one, timeout_seconds=None, raise_on_error=True)
        ):
            return True
    return False


def _keeps_symbols(left: str, right: str) -> bool:
    """True if letters in lower case are as many as before: R^2-r^2 must not become 0."""
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


def is_definite(found: Any) -> bool:
    """True if a formula has a value: not 1/0."""
    import sympy

    if isinstance(found, sympy.MatrixBase):
        return all(map(is_definite, found))
    if not isinstance(found, sympy.Basic):
        return False
    if found.has(sympy.zoo, sympy.nan):
        return False
    return not (isinstance(found, sympy.Expr) and not found.free_symbols and evaluated(found).has(sympy.zoo, sympy.nan))


def evaluated(found: Any) -> Any:
    try:
        return found.doit()
    except (AttributeError, NotImplementedError, ValueError, TypeError):
        return found


def differ(left: Any, right: Any) -> bool | None:
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
        return _nonzero(evaluated(left) - evaluated(right), digits)
    found: list[bool | None] = []
    chance = random.Random(0)  # noqa: S311  points, no secrets
    for _ in range(_POINTS):
        at = {symbol: sympy.Rational(chance.randint(11, 97), chance.choice((7, 11, 13))) for symbol in symbols}
        try:
            difference = evaluated(left.subs(at)) - evaluated(right.subs(at))
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
