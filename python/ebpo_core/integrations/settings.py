"""The estimator's options out of a framework's configuration: names and values checked before training starts.

Configurations reach us as mappings (OmegaConf nodes, YAML, command lines), where a misspelt name would otherwise be
ignored in silence and train with the default.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ebpo_core.estimator import EBPO


def option_names() -> tuple[str, ...]:
    """The names of :class:`ebpo_core.EBPO`'s options."""
    return tuple(EBPO.__init__.__kwdefaults__ or {})


def estimator_options(mapping: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Check ``mapping`` and return it as keyword arguments of :class:`ebpo_core.EBPO`.

    Args:
        mapping: Option names to values; None or empty gives the defaults. OmegaConf nodes are mappings too.
        where: What the user calls this mapping, for the errors: ``"algorithm.ebpo"``, or an environment variable.

    Returns:
        Only the options given, so that a state saved before an option existed still loads.

    Raises:
        TypeError: ``mapping`` is not a mapping, or a value has the wrong type.
        ValueError: an unknown name (the nearest option is named), or a value out of the option's domain.
    """
    options = read_mapping(mapping, where)
    check_names(options, option_names(), where)
    check_values(options, where)
    return options


def read_mapping(mapping: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """A plain dict of ``mapping``, whose names must be strings; ``{}`` for None."""
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"{where}={mapping!r} is of type {type(mapping).__name__}: expected a mapping of option names to values, "
            "as in {eps: 1e-4, normalize: scale}"
        )
    for name in mapping:
        if not isinstance(name, str):
            raise TypeError(f"{where} has the name {name!r} of type {type(name).__name__}: expected a string")
    return {name: mapping[name] for name in mapping}


def check_names(options: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError on the first name that is not ``known``, with the nearest one that is."""
    known = tuple(known)
    for name in options:
        if name in known:
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of: {', '.join(known)}"
        raise ValueError(f"{where} has the unknown option {name!r}: {hint}")


def check_values(options: Mapping[str, Any], where: str) -> None:
    """Raise what :class:`ebpo_core.EBPO` raises on these options, with ``where`` in front."""
    try:
        EBPO(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
