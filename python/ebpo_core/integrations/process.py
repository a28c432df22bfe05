"""The one estimator of this process: its options, and its prior when a run is resumed. Every adapter has one of these.

Options come from the framework's own configuration where it can hold them, else from the environment variable
``EBPO_OPTIONS``, a JSON object: ``EBPO_OPTIONS='{"normalize": "scale", "decay": 0.99}'``. Beside the options of
:class:`ebpo_core.EBPO` there is ``allow_missing_prior``: resume from a checkpoint without a prior, with an empty one.
Where the framework passes columns of the data set there is ``keys``, too: the columns whose values choose a prior.

Configurations reach us as mappings (OmegaConf nodes, YAML, command lines), where a misspelt name would otherwise be
ignored in silence and train with the default: names and values are checked before training starts.
"""

from __future__ import annotations

import difflib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebpo_core.checkpoint import read_prior
from ebpo_core.estimator import EBPO
from ebpo_core.keys import read_columns

VARIABLE = "EBPO_OPTIONS"


class ProcessEstimator:
    """One estimator, made at first use with the options asked for then. Safe to share by threads.

    Args:
        keyed: There is the option ``keys``; :attr:`columns` holds its value.

    Attributes:
        columns: Names of columns, from general to special; empty without keys, and before the first :meth:`get`.
    """

    def __init__(self, *, keyed: bool = False) -> None:
        self._own = ("allow_missing_prior", "keys") if keyed else ("allow_missing_prior",)
        self._lock = threading.Lock()
        self._ebpo: EBPO | None = None
        self._allow_missing = False
        self.columns: tuple[str, ...] = ()

    def get(self, options: Mapping[str, Any] | None = None, where: str = VARIABLE, *, scaled: bool = True) -> EBPO:
        """The estimator.

        Args:
            options: Options from the framework's configuration; None reads ``EBPO_OPTIONS``.
            where: The user's name for ``options``, for the errors: ``"algorithm.ebpo"``.
            scaled: The framework's own switch for dividing advantages by a standard deviation. False (Dr. GRPO) means
                ``normalize="none"``, unless the options say otherwise.

        Raises:
            TypeError, ValueError: a wrong option, or options other than those the estimator was made with.
        """
        if options is None:
            options, where = options_from_environment(), VARIABLE
        wanted = estimator_options(options, where, self._own)
        allow_missing, keys = wanted.pop("allow_missing_prior", False), wanted.pop("keys", None)
        if not isinstance(allow_missing, bool):
            raise TypeError(f"{where}.allow_missing_prior={allow_missing!r}: expected true or false")
        columns = read_columns(keys, f"{where}.keys")
        fresh = EBPO(**({} if scaled else {"normalize": "none"}) | wanted)
        with self._lock:
            if self._ebpo is None:
                self._ebpo, self._allow_missing, self.columns = fresh, allow_missing, columns
            asked = {**fresh.options, "allow_missing_prior": allow_missing, "keys": columns}
            present = {**self._ebpo.options, "allow_missing_prior": self._allow_missing, "keys": self.columns}
            if asked != present:
                raise ValueError(
                    f"{where} asks for {asked}, and this process already estimates with {present}: use one setting a "
                    "process, or call reset() before another run"
                )
            return self._ebpo

    def restore(self, path: Path | str) -> None:
        """Load the prior in a checkpoint that is being resumed into the estimator that :meth:`get` made.

        Where ``allow_missing_prior`` is set and there is no file (the checkpoint is one of plain GRPO), the prior
        becomes empty.

        Args:
            path: The checkpoint's folder, or the prior's own ``.json`` file.

        Raises:
            FileNotFoundError: No file, and ``allow_missing_prior`` is not set: a prior that silently starts empty would
                change the advantages. The estimator is untouched, as for the next error.
            ValueError: The file is damaged, or was written by a newer release. (Other options are logged.)
        """
        ebpo = self._ebpo
        if ebpo is None:
            raise RuntimeError("restore() before get(): the options of the estimator are not known yet")
        try:
            content = read_prior(path)
            if "ebpo" not in content:
                raise ValueError("it holds one prior per reward function, and this framework has one in all")
            ebpo.load_state_dict(content["ebpo"])
        except FileNotFoundError as error:
            if not self._allow_missing:
                raise FileNotFoundError(
                    f"{error}. This checkpoint was written without a prior, or was cut short: resume from another one, "
                    "start without resuming, or set the option allow_missing_prior to true"
                ) from None
            ebpo.reset()
        except ValueError as error:
            raise ValueError(f"cannot resume from {str(path)!r}: {error}") from error

    def reset(self) -> None:
        """Forget the estimator: the next :meth:`get` makes another, with an empty prior."""
        with self._lock:
            self._ebpo, self._allow_missing, self.columns = None, False, ()


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


def estimator_options(mapping: Mapping[str, Any] | None, where: str, own: Sequence[str] = ()) -> dict[str, Any]:
    """The options in ``mapping``, checked, and only those given.

    Args:
        mapping: Option names to values; None or empty gives the defaults. OmegaConf nodes are mappings too.
        where: The user's name for this mapping, for the errors.
        own: Names of further options, which the caller checks.

    Raises:
        TypeError: ``mapping`` is not a mapping, or a value has the wrong type.
        ValueError: an unknown name (the nearest option is named), or a value out of the option's domain.
    """
    if not isinstance(mapping, Mapping | None):
        raise TypeError(
            f"{where}={mapping!r} is of type {type(mapping).__name__}: expected a mapping of option names to values, "
            "as in {eps: 1e-4, normalize: scale}"
        )
    options = dict(mapping or {})
    known = (*(EBPO.__init__.__kwdefaults__ or {}), *own)
    for name in options:
        if not isinstance(name, str):
            raise TypeError(f"{where} has the name {name!r} of type {type(name).__name__}: expected a string")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of: {', '.join(known)}"
            raise ValueError(f"{where} has the unknown option {name!r}: {hint}")
    try:
        EBPO(**{name: value for name, value in options.items() if name not in own})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    return options
