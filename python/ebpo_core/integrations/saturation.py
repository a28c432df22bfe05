"""A warning about filters that drop saturated groups, which are what EBPO learns from."""

from __future__ import annotations

import warnings

_warned: set[tuple[str, str]] = set()


def warn_once(framework: str, option: str) -> None:
    """Warn, once a process for each pair, that ``option`` of ``framework`` hides saturated groups from the estimator.

    A group in which every completion failed (or passed) carries no signal for GRPO, so frameworks filter such groups
    out (DAPO's dynamic sampling). EBPO does learn from them (paper §3), and a prior that never sees them takes the mean
    of the mixed groups for the mean of all.

    Args:
        framework: ``"verl"``.
        option: The setting to change, as the user writes it: ``"algorithm.filter_groups.enable"``.
    """
    if (framework, option) in _warned:
        return
    _warned.add((framework, option))
    warnings.warn(
        f"{framework} filters saturated groups before EBPO sees them: set {option} off; the prior is biased, and "
        "the groups that EBPO can learn from and GRPO cannot are gone",
        UserWarning,
        stacklevel=3,
    )
