"""Facts about the rows of a batch that verl's V1 trainer knows and does not pass to an advantage estimator.

:func:`install` replaces one method, ``PPOTrainer._compute_advantage``, by one that looks at the batch's keys and the
data set's columns, leaves both here for the estimator, calls the original, and adds ``ebpo/*`` to the step's metrics.
verl itself treats sessions with several outputs so for GRPO alone (``compute_advantage_for_multi_trajectories``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebpo_core.integrations.verl.estimator import WHERE, is_ebpo, key_columns, running
from ebpo_core.keys import key_of_row


@dataclass(frozen=True)
class Rows:
    """Facts about each of the B rows of a batch."""

    last: NDArray[np.int64]
    """Position of the last output of the row's session, shape (B,)."""
    keys: list[Any] | None
    """Key of each row's prior: the column's value, or a tuple of several; None without ``algorithm.ebpo.keys``."""


_pending: Rows | None = None


def take(size: int) -> Rows | None:
    """The facts left for the batch of ``size`` rows that is being scored; None where nothing was left."""
    global _pending
    rows, _pending = _pending, None
    if rows is not None and len(rows.last) != size:
        raise RuntimeError(
            f"verl's trainer announced {len(rows.last)} rows and passed {size} to the estimator: "
            "this release of ebpo_core does not know this release of verl"
        )
    return rows


def install() -> None:
    """Replace ``PPOTrainer._compute_advantage`` of verl's V1 trainers; a second call does nothing."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    original = PPOTrainer._compute_advantage
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def _compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        global _pending
        algorithm = self.config.algorithm
        if not is_ebpo(algorithm):
            return original(self, batch, metrics)
        ebpo = running(algorithm)
        _pending = Rows(last_outputs(batch.keys), keys_of(batch, key_columns()))
        try:
            result = original(self, batch, metrics)
        finally:
            _pending = None
        diagnostics = ebpo.diagnostics
        metrics.update({} if diagnostics is None else diagnostics.metrics())
        return result

    PPOTrainer._compute_advantage = _compute_advantage


def last_outputs(keys: Sequence[str]) -> NDArray[np.int64]:
    """For each of the batch's keys ``{uid}_{session}_{output}``, the position of its session's last output.

    Raises:
        ValueError: a key of another form.
    """
    found: dict[str, tuple[int, int]] = {}
    sessions = []
    for position, key in enumerate(keys):
        session, _, output = key.rpartition("_")
        if not session or not output.isdecimal():
            raise ValueError(f"the batch has the key {key!r}: expected '<uid>_<session>_<output>', as verl writes them")
        sessions.append(session)
        if session not in found or found[session][0] < int(output):
            found[session] = int(output), position
    return np.array([found[session][1] for session in sessions], dtype=np.int64)


def keys_of(batch: Any, columns: Sequence[str]) -> list[Any] | None:
    """Keys of the rows, from ``columns`` in TransferQueue, where rollout put every column of the data set.

    Raises:
        ValueError: a column that the rows do not have.
    """
    if not columns:
        return None
    import transfer_queue

    fields = list(dict.fromkeys(column.split(".")[0] for column in columns))
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    for field in fields:
        if field not in data:  # verl relies on it: fields that nobody wrote are left out
            raise ValueError(f"{WHERE}.keys names {field!r}, which is no column of the data set")
    # `get`, because `data[field]` turns what is not a tensor into a list of another type.
    values = zip(*(data.get(field).tolist() for field in fields), strict=True)
    return [key_of_row(columns, dict(zip(fields, row, strict=True)), f"{WHERE}.keys") for row in values]
