"""What a checkpoint's config says of its compiled experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_FIELDS: dict[str, Any] = {"rank": int, "scale": (int, float), "router": str}  # of `compiled` in a checkpoint's config


def check_fields(compiled: Any) -> dict[str, Any] | None:
    """The config's ``compiled``, or None where it says that nothing is.

    Raises:
        ValueError: not of the form ``{"rank": r, "scale": alpha / r, "router": hash}``, or r or the scale is not
            above 0, or infinite.
    """
    if not compiled:
        return None
    wrong = not isinstance(compiled, Mapping) or compiled.keys() != _FIELDS.keys()
    wrong = wrong or not all(_fits(compiled[name], kind) for name, kind in _FIELDS.items())
    if wrong or compiled["rank"] < 1 or not (math.isfinite(compiled["scale"]) and compiled["scale"] > 0):
        raise ValueError(
            f"compiled is {compiled!r}: expected None, or {{'rank': r, 'scale': alpha / r, 'router': hash}}"
        )
    return dict(compiled)


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
