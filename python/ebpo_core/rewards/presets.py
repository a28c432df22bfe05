"""Presets: what a verifier accepts as the same answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Leniency beyond what is mathematically the same.

    Attributes:
        name: How results call it.
        digits: Significant digits that a decimal needs to stand for an irrational number (``3.141593`` for ``\\pi``).
        rational: Whether such a decimal may stand for a fraction too (``0.333333`` for ``\\frac{1}{3}``).
        reference_precision: Whether an answer is right that rounds to a decimal reference at the reference's digits.
        percent: Whether a percent sign may be missing on one side.
        tuples: Whether a list in the same order is right for a tuple, and the other way round.
        chains: Whether every step of ``x=5+6=11`` has to hold, not only the last side to be right.
        case: Whether letters of another case are other variables.
    """

    name: str
    digits: int
    rational: bool
    reference_precision: bool
    percent: bool
    tuples: bool
    chains: bool
    case: bool

    @property
    def symmetric(self) -> bool:
        """True if reference and answer may change places."""
        return not self.reference_precision


STRICT = Preset(
    "strict", digits=7, rational=False, reference_precision=False, percent=False, tuples=False, chains=True, case=True
)
LENIENT = Preset(
    "lenient", digits=4, rational=True, reference_precision=True, percent=True, tuples=True, chains=False, case=False
)
PRESETS = {preset.name: preset for preset in (STRICT, LENIENT)}
