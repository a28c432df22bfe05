"""Checkpoints: the prior's file in them, which of them are complete, and which one to resume from. Needs NumPy only.

The prior is one JSON object, ``ebpo_prior.json``, in the checkpoint folder of whatever framework trains::

    {"format": "ebpo-core/prior", "version": 1,
     "ebpo": EBPO.state_dict(),          # floats survive JSON bit for bit (Python prints the shortest exact decimal)
     "global_step": 40,                  # of the trainer, None or missing outside training
     "generation_phase": 0, "generate_every": 4,   # TRL: where in its generation batch the run stood, see trainer.py
     "written_after": []}                # files that the framework writes last: a checkpoint without them is not whole

With one prior per reward function there is, in place of ``"ebpo"``,
``"ebpo_per_reward": [{"reward": "accuracy", "ebpo": {...}}, ...]``, in the order of the functions.

The keys of an estimator that has more than ``MANY_KEYS`` are in a second file beside it (:mod:`ebpo_core.keyfiles`).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ebpo_core.estimator import EBPO
from ebpo_core.files import write_json
from ebpo_core.keyfiles import is_reference, read_keys, remove_others, write_keys

PRIOR_NAME = "ebpo_prior.json"
TRAINER_STATE_NAME = "trainer_state.json"
FORMAT = "ebpo-core/prior"
VERSION = 1
MANY_KEYS = 1024
"""Keys above which an estimator's are written into a file of their own."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Folders of one step, in TRL, verl, SkyRL, NeMo-RL, prime-rl and slime; NeMo-RL writes a checkpoint in `tmp_step_7`.
_STEP = re.compile(r"(?:checkpoint-|global_step_?|step_)?(\d+)")
_DEPTH = 4  # folders between that of a run and the prior's file, at most

# The mixin's base is whatever trainer it is put in front of; type checkers see one with every attribute.
_Base: Any = object


def write_prior(path: str | os.PathLike[str], state: Any, **extra: Any) -> Path:
    """Write ``state``: a reader sees the old files or the new ones, never half of one.

    Args:
        path: a folder (made if missing), in which ``ebpo_prior.json`` is written, or a file name ending in ``.json``.
        state: an estimator (:class:`ebpo_core.EBPO`) or its ``state_dict()``; or a list of ``{"reward": name, "ebpo":
            one of these}`` for one prior per function. The keys of an estimator with more than ``MANY_KEYS``, and of a
            ``state_dict(arrays=True)``, go into a file of their own.
        extra: further JSON-safe fields, beside ``format``, ``version`` and ``ebpo``.

    Returns:
        The file's path.
    """
    json.dumps(extra)  # what is not JSON is refused before any file is written
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        target = target / PRIOR_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(state, list):
        entries = [{**entry, "ebpo": _for_json(target, entry["ebpo"])} for entry in state]
        states: dict[str, Any] = {"ebpo_per_reward": entries}
    else:
        entries = [{"ebpo": _for_json(target, state)}]
        states = entries[0]
    write_json(target, {"format": FORMAT, "version": VERSION, **states, **extra})
    remove_others(target, _key_files(entries))
    return target


def _for_json(target: Path, state: Any) -> dict[str, Any]:
    if isinstance(state, EBPO):
        state = state.state_dict(arrays=state.key_count > MANY_KEYS)
    keys = state.get("keys")
    return {**state, "keys": write_keys(target, keys)} if isinstance(keys, dict) else state


def _key_files(entries: list[dict[str, Any]]) -> list[str]:
    references = (entry["ebpo"].get("keys") for entry in entries)
    return [keys["file"] for keys in references if is_reference(keys)]


def prior_files(path: str | os.PathLike[str]) -> list[str]:
    """Names of the files that make up the prior at ``path``, as :func:`read_prior` takes it, for who copies them.

    Of one that cannot be read it is the name of the JSON file alone.
    """
    file = Path(path)
    file = file / PRIOR_NAME if file.is_dir() else file
    return [file.name, *_key_files(_entries(_json_object(file) or {}))]


def read_prior(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_prior` wrote: the whole object, the state under ``"ebpo"`` or ``"ebpo_per_reward"``.

    Args:
        path: a checkpoint folder, or the file itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a prior, is damaged, or was written by a newer version of this package.
    """
    file = Path(path)
    if file.is_dir():
        file = file / PRIOR_NAME
    content = _read_json(file)
    while True:
        names = _key_files(_entries(content))
        try:
            for state in _states(content):
                if is_reference(state.get("keys")):
                    state["keys"] = read_keys(file, state["keys"])
        except ValueError:  # it may have been written over since: then the keys that it named are gone
            content = _read_json(file)
            if _key_files(_entries(content)) == names:
                raise
        else:
            return content


def _read_json(file: Path) -> dict[str, Any]:
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


def find_prior(path: str | os.PathLike[str]) -> Path:
    """The prior's file in a checkpoint of any framework, or in the newest complete checkpoint of a run.

    Args:
        path: the file itself, the folder that holds it, or a folder of checkpoints above.

    Raises:
        FileNotFoundError: there is none, or only in checkpoints that were not written to their end.
    """
    root = Path(path)
    if root.is_file():
        return root
    if (root / PRIOR_NAME).is_file():
        return root / PRIOR_NAME
    found = [file for depth in range(1, _DEPTH + 1) for file in root.glob("*/" * depth + PRIOR_NAME)]
    complete = [file for file in found if _is_in_complete_checkpoint(file, root)]
    if not complete:
        cut = f", and these checkpoints are incomplete: {[str(file.parent) for file in found]}" if found else ""
        raise FileNotFoundError(
            f"no EBPO prior at {str(root)!r}{cut}: give a checkpoint folder that an EBPO run wrote (it holds "
            f"{PRIOR_NAME}), the folder of such a run, or the file itself"
        )
    return max(complete, key=lambda file: (_step_of(file, root), file.stat().st_mtime))


def _step_of(file: Path, root: Path) -> int:
    """The step in the name of a folder between ``root`` and ``file``, the innermost; -1 where none has a step."""
    matches = [_STEP.fullmatch(name) for name in reversed(file.parent.relative_to(root).parts)]
    return next((int(match.group(1)) for match in matches if match), -1)


def _is_in_complete_checkpoint(file: Path, root: Path) -> bool:
    if _CHECKPOINT.fullmatch(file.parent.name):
        return is_complete(file.parent)
    if any(name.startswith("tmp_") for name in file.parent.relative_to(root).parts):
        return False
    prior = _json_object(file)
    return prior is not None and all((file.parent / name).exists() for name in prior.get("written_after", []))


def is_complete(checkpoint: str | os.PathLike[str]) -> bool:
    """True for a checkpoint folder of ``transformers.Trainer`` that was written to its end.

    ``transformers`` writes the weights, then optimizer, scheduler, scaler and random state, and ``trainer_state.json``
    last; the prior is written before all of them, and :class:`CompleteCheckpoints` makes the main process wait for the
    random state of every rank and removes an older ``trainer_state.json`` first. So that file, parsed and of this step,
    proves the rest. It is written in place, so it may itself be cut: hence the parsing. A checkpoint of plain GRPO
    (without a prior) counts as complete.
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


def resolve_resume(resume: str | None, output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint that ``resume_from_checkpoint`` of a command or a recipe means, None for a fresh start.

    Args:
        resume: None, "false", "no" or "none" for a fresh start; "auto", "true" or "yes" for the last complete
            checkpoint in ``output_dir``, or a fresh start where there is none; else a folder.
        output_dir: the run's folder.

    Raises:
        FileNotFoundError: no such folder.
    """
    if resume is None or resume.lower() in ("false", "no", "none"):
        return None
    if resume.lower() in ("auto", "true", "yes"):
        return last_complete_checkpoint(output_dir)
    if not Path(resume).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={resume!r}: no such directory; give one, or auto")
    return resume


class CompleteCheckpoints(_Base):  # type: ignore[misc]
    """Put in front of a ``transformers.Trainer``, it writes checkpoints that :func:`is_complete` can judge."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, but ``resume_from_checkpoint=True`` takes the last *complete* checkpoint.

        Raises:
            ValueError: ``True`` and no complete checkpoint in ``output_dir``.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: no complete checkpoint in output_dir={self.args.output_dir!r}; "
                    "give the path of one, or leave it unset to start from the beginning"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def write_first(self, checkpoint: Path) -> None:
        """Called on the main process before anything else of a checkpoint is written; for subclasses."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            # A folder of an earlier, longer run may be written over: until it is done it must not look complete.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            self.write_first(folder)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes trainer_state.json next; with every rank's file in place it proves the whole folder.
        self.accelerator.wait_for_everyone()


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What holds the states of estimators in a prior's file; empty if nothing does."""
    entries = content.get("ebpo_per_reward", [{"ebpo": content.get("ebpo")}])
    whole = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("ebpo"), dict) for entry in entries
    )
    return entries if whole else []


def _states(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry["ebpo"] for entry in _entries(content)]


def _json_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in ``file``; None if it is missing, cut, or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
