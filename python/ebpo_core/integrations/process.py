"""The estimator of this process, for frameworks that call a plain function or have no place for our options.

Options come from the framework's own configuration where it can hold them, else from the environment variable
``EBPO_OPTIONS``, a JSON object: ``EBPO_OPTIONS='{"normalize": "scale", "decay": 0.99}'``. Beside the options of
:class:`ebpo_core.EBPO` there is ``allow_missing_prior``: resume from a checkpoint without a prior, with an empty one.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebpo_core.estimator import EBPO
from ebpo_core.integrations import settings, sidecar

VARIABLE = "EBPO_OPTIONS"


def options_from_environment() -> dict[str, Any]:
    """The mapping in ``EBPO_OPTIONS``, not yet checked; empty where the variable is unset or blank.

    Raises:
        ValueError: it is not a JSON object.
    """
    text = os.environ.get(VARIABLE, "")
    if not text.strip():
        return {}
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={text!r} is not JSON ({error}): write {VARIABLE}='{{\"eps\": 1e-4}}'") from error
    if not isinstance(options, dict):
        raise ValueError(f"{VARIABLE}={text!r}: expected a JSON object, as in '{{\"eps\": 1e-4}}'")
    return options


class ProcessEstimator:
    """One estimator, made at first use with the options asked for then. Safe to share by threads.

    Args:
        own: Names of further options that the adapter reads itself; :meth:`option` returns them.
    """

    def __init__(self, *own: str) -> None:
        self._own = ("allow_missing_prior", *own)
        self._lock = threading.Lock()
        self._ebpo: EBPO | None = None
        self._mine: dict[str, Any] = {}

    def get(
        self,
        options: Mapping[str, Any] | None = None,
        where: str = VARIABLE,
        *,
        defaults: Mapping[str, Any] | None = None,
    ) -> EBPO:
        """The estimator.

        Args:
            options: Options from the framework's configuration; None reads ``EBPO_OPTIONS``.
            where: What the user calls ``options``, for the errors.
            defaults: Options that hold where the user gave none.

        Raises:
            TypeError, ValueError: a wrong option, or options other than those the estimator was made with.
        """
        wanted = settings.read_mapping(options_from_environment() if options is None else options, where)
        mine = {name: wanted.pop(name) for name in self._own if name in wanted}
        settings.check_names(wanted, (*settings.option_names(), *self._own), where)
        if not isinstance(mine.get("allow_missing_prior", False), bool):
            raise TypeError(f"{where}: allow_missing_prior={mine['allow_missing_prior']!r}: expected true or false")
        fresh = EBPO(**settings.estimator_options({**(defaults or {}), **wanted}, where))
        with self._lock:
            if self._ebpo is None:
                self._ebpo, self._mine = fresh, mine
            elif (self._ebpo.options, self._mine) != (fresh.options, mine):
                raise ValueError(
                    f"{where} asks for {fresh.options | mine}, and this process already estimates with "
                    f"{self._ebpo.options | self._mine}: use one setting a process"
                )
            return self._ebpo

    def option(self, name: str, default: Any = None) -> Any:
        """The adapter's own option ``name``, as given to the first :meth:`get`."""
        return self._mine.get(name, default)

    def reset(self) -> None:
        """Forget the estimator: the next :meth:`get` makes another, with an empty prior."""
        with self._lock:
            self._ebpo, self._mine = None, {}


def restore(path: Path | str, ebpo: EBPO, allow_missing: bool) -> None:
    """Load the prior beside a checkpoint that is being resumed.

    Args:
        path: The checkpoint's folder, or the prior's own ``.json`` file.
        ebpo: The estimator; untouched if this raises.
        allow_missing: Leave ``ebpo`` empty where there is no file: the checkpoint is one of plain GRPO.

    Raises:
        FileNotFoundError: no file, and ``allow_missing`` is False.
        ValueError: as :func:`ebpo_core.integrations.sidecar.load`.
    """
    try:
        sidecar.load(path, ebpo)
    except FileNotFoundError as error:
        if not allow_missing:
            raise FileNotFoundError(f"{error}, or set the option allow_missing_prior to true") from None
        ebpo.reset()
