"""A node: what a reference or an answer states, as one reading finds it in either."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fractions import Fraction


class Node(NamedTuple):
    """The statement of a text.

    Attributes:
        kind: "value" (a formula), "words", "list", "set", "tuple", "sets" (unions and the like), "relation", "ratio".
        text: LaTeX for Math-Verify; for "words" their letters.
        number: The value of a plain number.
        digits: Significant digits of a decimal; 0 for what is exact.
        unit: "" for none.
        name: What stands before the equals sign of ``x=5``, "" for nothing.
        members: Of a list, set, tuple or ratio; the sides of a relation. Of a value: what else it is said to equal.
        marks: Brackets of a tuple, signs of a relation, the word that joins a list.
    """

    kind: str
    text: str
    number: Fraction | None = None
    digits: int = 0
    unit: str = ""
    name: str = ""
    members: tuple[Node, ...] = ()
    marks: tuple[str, ...] = ()
