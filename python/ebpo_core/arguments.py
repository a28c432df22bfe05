"""Scalar arguments, checked: every error names the argument, its value and what is expected."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def text(name: str, value: Any) -> Any:
    """A string, as a plain ``str``."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: expected a string")
    return str.__str__(value)  # its characters: str() of an enumeration's member is its name


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's included; not a number that merely has a truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: expected True or False")
    return bool(value)


def left_out(name: str, value: Any) -> bool | str:
    """What a baseline leaves out: False, True (or ``"group"``, the same), or ``"row"``; the core knows the names."""
    if isinstance(value, str):
        return True if value == "group" else text(name, value)
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f'{name}={value!r} is of type {type(value).__name__}: expected True, False or "row"')
    return bool(value)


def real(name: str, value: Any) -> float:
    """A real number, as a plain ``float``; strings and booleans are none."""
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}={value!r}: expected a number within the range of a float") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: expected a number") from None


def zero_or_one(name: str, value: Any) -> int:
    """Delta degrees of freedom: the integer 0 or 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, (bool, np.bool_)) or number not in (0, 1):
        raise ValueError(f"{name}={value!r}: expected 0 or 1")
    return number


def count(name: str, value: Any) -> int:
    """A number of things: an integer, at least 0."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: expected an int") from None
    if isinstance(value, (bool, np.bool_)) or not 0 <= number < 2**31:
        raise ValueError(f"{name}={value!r}: expected an int of at least 0 and below 2**31")
    return number


def step_id(step: Any) -> int | None:
    """The id of an update: None, or an integer that fits the core's 64 bits."""
    if step is None:
        return None
    try:
        value = operator.index(step)
    except TypeError:
        raise TypeError(f"step={step!r} is of type {type(step).__name__}: expected an int or None") from None
    if isinstance(step, bool) or not 0 <= value < 2**63:
        raise ValueError(f"step={step!r}: expected an int of at least 0 and below 2**63")
    return value
