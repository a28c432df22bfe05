"""Does this run have a signal? Dead groups now and expected, what buys signal, what each rule does, and what is wrong.

``ebpo signal`` is its command. :func:`read_rollouts` reads what trainers and evaluations write, :func:`diagnose`
answers, :class:`SignalCallback` warns during a run of TRL. Importing this needs NumPy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .expectation import SIZES
from .faults import Fault
from .groups import Groups, group_rewards
from .report import Report, diagnose
from .rollouts import Rollouts, read_rollouts

if TYPE_CHECKING:
    from .trl import SignalCallback, SignalWarning

__all__ = [
    "SIZES",
    "Fault",
    "Groups",
    "Report",
    "Rollouts",
    "SignalCallback",
    "SignalWarning",
    "diagnose",
    "group_rewards",
    "read_rollouts",
]


def __getattr__(name: str) -> Any:
    # A callback derives from a class of transformers, which takes seconds to import and is an extra.
    if name not in ("SignalCallback", "SignalWarning"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ebpo_core.signal import trl
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ebpo_core"):
            raise
        raise ImportError(
            f'{__name__}.{name} needs transformers, and {error.name!r} was not found: pip install "ebpo-core[train]"'
        ) from error
    return getattr(trl, name)
