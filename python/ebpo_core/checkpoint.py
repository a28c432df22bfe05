"""The prior's file in a checkpoint folder, and the search for the last complete checkpoint. Needs no TRL.

One JSON object per checkpoint, ``ebpo_prior.json``::

    {"format": "ebpo-core/prior", "version": 1,
     "ebpo": EBPO.state_dict(),          # floats survive JSON bit for bit (Python prints the shortest exact decimal)
     "global_step": 40,                  # of the trainer, None outside training
     "generation_phase": 0, "generate_every": 4,   # where in TRL's generation batch the run stood, see trainer.py
     "written_after": []}                # files TRL writes after trainer_state.json, needed for completeness

With one prior per reward function there is, in place of ``"ebpo"``,
``"ebpo_per_reward": [{"reward": "accuracy", "ebpo": {...}}, ...]``, in the order of the functions.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

PRIOR_NAME = "ebpo_prior.json"
TRAINER_STATE_NAME = "trainer_state.json"
FORMAT = "ebpo-core/prior"
VERSION = 1

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_prior(path: str | os.PathLike[str], state: dict[str, Any] | list[dict[str, Any]], **extra: Any) -> Path:
    """Write ``state`` (``EBPO.state_dict()``): a reader sees the old file or the new one, never half of one.

    Args:
        path: a folder (made if missing), in which ``ebpo_prior.json`` is written, or a file name ending in ``.json``.
        state: the estimator's state, or a list of ``{"reward": name, "ebpo": state}`` for one prior per function.
        extra: further JSON-safe fields, beside ``format``, ``version`` and ``ebpo``.

    Returns:
        The file's path.
    """
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        target = target / PRIOR_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    states = {"ebpo_per_reward" if isinstance(state, list) else "ebpo": state}
    text = json.dumps({"format": FORMAT, "version": VERSION, **states, **extra}, indent=2) + "\n"
    # A rename is atomic only within one file system, hence the temporary file beside its target.
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(target.parent)
    return target


def read_prior(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_prior` wrote: the whole object, the state under ``"ebpo"`` or ``"ebpo_per_reward"``.

    Args:
        path: a checkpoint folder, or the file itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a prior, or was written by a newer version of this package.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PRIOR_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"no EBPO prior at {str(file)!r}: give a checkpoint folder that an EBPO run wrote (it holds {PRIOR_NAME}) "
            "or the file itself"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): it is damaged, use another checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not _states(content):
        raise ValueError(f"{str(file)!r} is not an EBPO prior (format {FORMAT!r}): use a file named {PRIOR_NAME}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{str(file)!r} has version {content.get('version')!r} and this ebpo_core reads {VERSION}: "
            "upgrade ebpo-core to the version that wrote it"
        )
    return content


def is_complete(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint folder was written to its end.

    ``transformers`` writes the weights, then optimizer, scheduler, scaler and random state, and ``trainer_state.json``
    last; the prior is written before all of them, and ``EBPOMixin`` makes the main process wait for the random state
    of every rank and removes an older ``trainer_state.json`` first. So that file, parsed and of this step, proves the
    rest. It is written in place, so it may itself be cut: hence the parsing. A checkpoint of plain GRPO (without a
    prior) counts as complete.
    """
    folder = Path(checkpoint)
    match = _CHECKPOINT.fullmatch(folder.name)
    state = _json_object(folder / TRAINER_STATE_NAME)
    if state is None or not isinstance(state.get("global_step"), int):
        return False
    if match and state["global_step"] != int(match.group(1)):
        return False
    if not (folder / PRIOR_NAME).exists():
        return True
    prior = _json_object(folder / PRIOR_NAME)
    return prior is not None and all(_json_object(folder / name) is not None for name in prior.get("written_after", []))


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The path of the newest complete ``checkpoint-<step>`` folder in ``output_dir``, or None.

    Unlike ``transformers.trainer_utils.get_last_checkpoint`` it passes over folders that a killed run left half
    written (see :func:`is_complete`).
    """
    root = Path(output_dir)
    if not root.is_dir():
        return None
    steps = ((_CHECKPOINT.fullmatch(folder.name), folder) for folder in root.iterdir() if folder.is_dir())
    folders = sorted(((int(match.group(1)), folder) for match, folder in steps if match), reverse=True)
    return next((str(folder) for _, folder in folders if is_complete(folder)), None)


def _states(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of estimators in a prior's file; empty if it holds none."""
    entries = content.get("ebpo_per_reward", [{"ebpo": content.get("ebpo")}])
    whole = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("ebpo"), dict) for entry in entries
    )
    return [entry["ebpo"] for entry in entries] if whole else []


def _json_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in ``file``; None if it is missing, cut, or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut; file systems and platforms that cannot are left as they are."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
