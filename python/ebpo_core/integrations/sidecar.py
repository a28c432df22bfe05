"""The prior's own file in a checkpoint folder of a framework that has no place for an estimator's state.

The format is that of :mod:`ebpo_core.checkpoint`, so ``ebpo prior show FOLDER/ebpo_state.json`` prints it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ebpo_core.checkpoint import read_prior, write_prior
from ebpo_core.estimator import EBPO

NAME = "ebpo_state.json"


def save(path: Path | str | os.PathLike[str], ebpo: EBPO, **extra: Any) -> None:
    """Write the estimator's state as JSON: a reader, or a run killed meanwhile, finds the old file or the new one.

    Args:
        path: A folder (made if missing), in which ``ebpo_state.json`` is written, or a file name ending in ``.json``.
        ebpo: The estimator.
        extra: Further JSON-safe fields to keep in the file, the framework's step for one.
    """
    write_prior(_file(path), ebpo.state_dict(), **extra)


def load(path: Path | str | os.PathLike[str], ebpo: EBPO) -> None:
    """Put the state that :func:`save` wrote into ``ebpo``, which must have been made with the same options.

    Args:
        path: The folder, or the file.
        ebpo: The estimator; untouched if this raises.

    Raises:
        FileNotFoundError: No such file. A prior that silently starts empty would change the advantages.
        ValueError: The file is damaged, or was written with other options or by a newer release.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no EBPO prior at {str(file)!r}: this checkpoint was written without one, or was cut short before it. "
            "Resume from another checkpoint, or start without resuming"
        )
    try:
        content = read_prior(file)
        if "ebpo" not in content:
            raise ValueError("it holds one prior per reward function, and this framework has one in all")
        ebpo.load_state_dict(content["ebpo"])
    except ValueError as error:
        raise ValueError(f"cannot resume from {str(file)!r}: {error}") from error


def _file(path: Path | str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".json" and not file.is_dir() else file / NAME
