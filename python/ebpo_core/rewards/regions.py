"""Sets of numbers however written: intervals, inequalities in one variable, unions of them; and other relations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebpo_core.rewards.comparison import _in_any_order, _is_region, _member, _same
from ebpo_core.rewards.formulas import differ, evaluated, expression
from ebpo_core.rewards.nodes import Node
from ebpo_core.rewards.numerals import UnreadableError, written
from ebpo_core.rewards.tex import tidy

if TYPE_CHECKING:
    from ebpo_core.rewards.presets import Preset

_FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", "=": "=", r"\neq": r"\neq", r"\equiv": r"\equiv"}


def same_regions(left: Node, right: Node, preset: Preset) -> bool:
    """True if two nodes, one of them a relation, sets, or inequalities joined by words, say the same."""
    constants = [_constant(node, preset) for node in (left, right)]
    if any(constants):
        one, other = (found or node for found, node in zip(constants, (left, right), strict=True))
        return False if "no" in (one, other) else _same(one, other, preset)
    left, right = (_as_equation(node, other) for node, other in ((left, right), (right, left)))
    if left.kind == right.kind == "relation" and _same_sides(left, right, preset):
        return True
    if left.kind == right.kind == "list":
        if left.marks == right.marks and _in_any_order(left, right, preset):
            return True
        if not (_is_region(left) and _is_region(right)):
            return False
    for node in (left, right):
        if node.kind in ("value", "words", "ratio") or (node.kind == "list" and not _is_region(node)):
            return False
    names = [_variable(node) for node in (left, right)]
    if names[0] and names[1] and names[0] != names[1]:
        return False
    try:
        sets = [_as_set(node) for node in (left, right)]
    except UnreadableError:
        if left.kind == right.kind == "relation":
            return _same_relations(left, right)
        raise
    if sets[0].is_empty and {left.kind, right.kind} <= {"relation", "list"}:
        return False  # relations that never hold have only that in common
    return _same_sets(sets[0], sets[1])


def same_equations(left: Node, right: Node) -> bool:
    """Two formulas with different names before "=", as equations."""
    one, other = _equation(left), _equation(right)
    return _same_relations(one, other) if one is not None and other is not None else False


def _equation(node: Node) -> Node | None:
    if node.members or node.unit:
        return None
    name = node._replace(text=written(tidy(node.name)), name="", number=None)
    return Node("relation", f"{name.text} = {node.text}", members=(name, node._replace(name="")), marks=("=",))


def _as_equation(node: Node, other: Node) -> Node:
    """``y=2x`` as an equation, beside one."""
    if node.kind != "value" or not node.name or other.kind != "relation" or other.marks != ("=",):
        return node
    return _equation(node) or node


def _constant(node: Node, preset: Preset) -> Any:
    """The value of an equation between constants (``6 \\cdot 7 = 42``), "no" where it does not hold."""
    if node.kind != "relation" or set(node.marks) != {"="}:
        return None
    if any(side.kind != "value" or expression(side.text).free_symbols for side in node.members):
        return None
    *others, last = node.members
    return last if all(_same(last, side, preset) for side in others) else "no"


def _same_sides(left: Node, right: Node, preset: Preset) -> bool:
    """The same relation with equal sides, read from either end."""
    if len(left.members) != len(right.members):
        return False
    turned = right._replace(
        members=right.members[::-1], marks=tuple(_FLIPPED.get(mark, "") for mark in right.marks[::-1])
    )
    return any(
        left.marks == other.marks
        and all(_member(one, two, preset) for one, two in zip(left.members, other.members, strict=True))
        for other in (right, turned)
    )


def _same_relations(left: Node, right: Node) -> bool:
    """Equations and inequalities in several variables: Math-Verify's word, and one side a multiple of the other."""
    import sympy
    from math_verify import verify

    one, other = expression(left.text), expression(right.text)
    if one.free_symbols != other.free_symbols or len(left.members) != 2 or len(right.members) != 2:
        return False
    if not isinstance(one, sympy.core.relational.Relational) or not isinstance(other, sympy.core.relational.Relational):
        return False
    if isinstance(one, sympy.Eq) and isinstance(other, sympy.Eq):
        ratio = sympy.simplify((one.lhs - one.rhs) / (other.lhs - other.rhs))
        if ratio.is_number and ratio.is_nonzero and ratio.is_finite:
            return True
        if not sympy.solve(one, one.free_symbols) or not sympy.solve(other, other.free_symbols):
            return False  # all() of no solutions would be true
    return bool(verify(one, other, timeout_seconds=None, raise_on_error=True))


def _variable(node: Node) -> str:
    """The one variable that inequalities are about, or the name of what is in a set; "" for none."""
    if node.name:
        return node.name
    if node.kind == "list":
        found = {_variable(member) for member in node.members}
        return found.pop() if len(found) == 1 else ""
    if node.kind == "relation":
        names = [side.text for side in node.members if side.kind == "value" and side.number is None]
        return names[0].strip() if len(names) == 1 and len(names[0].strip()) == 1 else ""
    return ""


def _as_set(node: Node) -> Any:
    """SymPy's set of real numbers.

    Raises:
        UnreadableError: It is none of one variable.
    """
    import sympy

    if node.kind == "tuple":
        if len(node.members) != 2 or any(member.kind != "value" for member in node.members):
            raise UnreadableError("not an interval")
        start, end = (evaluated(expression(member.text)) for member in node.members)
        if (start >= end) == True:  # noqa: E712  SymPy's truth
            raise UnreadableError("not an interval")
        return sympy.Interval(start, end, node.marks[0] == "(", node.marks[1] == ")")
    if node.kind == "set":
        return sympy.FiniteSet(*(evaluated(expression(member.text)) for member in node.members))
    if node.kind == "sets":
        found = expression(node.text)
        if not isinstance(found, sympy.Set):
            raise UnreadableError("not a set")
        return evaluated(found)
    if node.kind == "list":
        parts = [_as_set(member) for member in node.members]
        return sympy.Union(*parts) if node.marks == ("or",) else sympy.Intersection(*parts)
    if node.kind == "relation":
        return _solved(node)
    raise UnreadableError(f"a {node.kind} is no set")


def _solved(node: Node) -> Any:
    import sympy

    signs = {"<": sympy.Lt, ">": sympy.Gt, r"\leq": sympy.Le, r"\geq": sympy.Ge, r"\neq": sympy.Ne, "=": sympy.Eq}
    if any(side.kind != "value" for side in node.members) or not set(node.marks) <= set(signs):
        raise UnreadableError("no inequality between formulas")
    sides = [expression(side.text) for side in node.members]
    # What is bounded may be named f(x): a number like any other.
    variable = sympy.Symbol("t", real=True)
    applied = {part for side in sides for part in side.atoms(sympy.core.function.AppliedUndef)}
    if len(applied) == 1:
        sides = [side.xreplace(dict.fromkeys(applied, variable)) for side in sides]
    symbols = {symbol for side in sides for symbol in side.free_symbols}
    if len(symbols) != 1:
        raise UnreadableError("an inequality of several variables")
    parts = [
        signs[mark](evaluated(one), evaluated(other))
        for mark, one, other in zip(node.marks, sides, sides[1:], strict=False)
    ]
    try:
        return sympy.Intersection(*(part.as_set() for part in parts))
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise UnreadableError("an inequality that SymPy cannot solve") from error


def _same_sets(left: Any, right: Any) -> bool:
    import sympy

    if left == right:
        return True
    pieces = [_pieces(found) for found in (left, right)]
    if pieces[0] is not None and pieces[1] is not None:
        return len(pieces[0]) == len(pieces[1]) and all(
            one[2:] == other[2:] and _same_ends(one[0], other[0]) and _same_ends(one[1], other[1])
            for one, other in zip(pieces[0], pieces[1], strict=True)
        )
    try:
        return bool(sympy.SymmetricDifference(left, right).is_empty)
    except (NotImplementedError, TypeError, ValueError):
        return False


def _pieces(found: Any) -> list[tuple[Any, Any, bool, bool]] | None:
    """Intervals and points in order, with their ends and whether these are open; None for other sets."""
    import sympy

    if isinstance(found, sympy.Complement):
        found = sympy.Union(*found.args[0].args) - found.args[1] if isinstance(found.args[0], sympy.Union) else found
    out: list[tuple[Any, Any, bool, bool]] = []
    for part in found.args if isinstance(found, sympy.Union) else (found,):
        if isinstance(part, sympy.Interval):
            out.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        elif isinstance(part, sympy.FiniteSet):
            out += ((point, point, False, False) for point in part)
        elif part == sympy.Reals:
            out.append((-sympy.oo, sympy.oo, True, True))
        elif part is not sympy.EmptySet:
            return None
    if any(not end.is_number for piece in out for end in piece[:2]):
        return None
    return sorted(out, key=lambda piece: (float(piece[0]), float(piece[1])))


def _same_ends(left: Any, right: Any) -> bool:
    return bool(left == right or (left.is_finite and right.is_finite and differ(left, right) is False))
