"""The prior's file in the folders that each framework's checkpoints make, and the newest complete one of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import ebpo_core
from ebpo_core.checkpoint import PRIOR_NAME, find_prior, is_complete, read_prior, write_prior

# Of two checkpoints of a run: the folder of the prior, and what the framework writes after it, by file.
LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "TRL": ("checkpoint-{step}", {"trainer_state.json": '{{"global_step": {step}}}'}),
    "verl": ("global_step_{step}", {}),
    "SkyRL": ("global_step_{step}", {"trainer_state.pt": ""}),
    "slime": ("rollout/{step}", {}),
    "NeMo-RL": ("step_{step}", {}),
    "OpenRLHF": ("_actor/global_step{step}", {}),
    "prime-rl": ("checkpoints/step_{step}/orchestrator", {"progress.pt": ""}),
}


def save(run: Path, framework: str, step: int, *, whole: bool = True) -> Path:
    """A checkpoint as our adapter for the framework leaves it, or as a kill before its last file does."""
    folder, last = LAYOUTS[framework]
    ebpo = ebpo_core.EBPO()
    ebpo([[1.0, 0.0]] * step)
    extra: dict[str, Any] = {} if framework == "TRL" else {"written_after": list(last)}
    file = write_prior(run / folder.format(step=step), ebpo.state_dict(), global_step=step, **extra)
    for name, content in last.items() if whole else ():
        (file.parent / name).write_text(content.format(step=step))
    return file


@pytest.mark.parametrize("framework", LAYOUTS)
def test_a_runs_newest_checkpoint_is_found(framework: str, tmp_path: Path) -> None:
    files = {step: save(tmp_path, framework, step) for step in (9, 10, 2)}  # neither by name nor by time
    assert find_prior(tmp_path) == files[10]
    for step, file in files.items():
        assert find_prior(file) == file
        assert find_prior(file.parent) == file  # the checkpoint's own folder
        assert read_prior(file)["global_step"] == step


@pytest.mark.parametrize("framework", ["TRL", "SkyRL", "prime-rl"])
def test_a_checkpoint_cut_short_is_passed_over(framework: str, tmp_path: Path) -> None:
    cut = save(tmp_path, framework, 4, whole=False)
    with pytest.raises(FileNotFoundError, match=r"no EBPO prior at .*these checkpoints are incomplete:"):
        find_prior(tmp_path)
    older = save(tmp_path, framework, 3)
    assert find_prior(tmp_path) == older
    assert find_prior(cut.parent) == cut  # asked for by name


def test_nemo_rls_temporary_folder_is_passed_over(tmp_path: Path) -> None:
    whole = save(tmp_path, "NeMo-RL", 1)
    save(tmp_path, "NeMo-RL", 2).parent.rename(tmp_path / "tmp_step_2")
    assert find_prior(tmp_path) == whole


def test_a_recovery_folder_without_a_step_and_openrlhfs_best(tmp_path: Path) -> None:
    areal = write_prior(tmp_path / "default" / "recover_checkpoint", ebpo_core.EBPO().state_dict())
    assert find_prior(tmp_path) == find_prior(tmp_path / "default") == areal
    best = write_prior(tmp_path / "run" / "_actor" / "best_global_step9", ebpo_core.EBPO().state_dict(), global_step=9)
    assert find_prior(tmp_path / "run") == best
    regular = save(tmp_path / "run", "OpenRLHF", 4)
    os.utime(best)
    assert find_prior(tmp_path / "run") == regular  # the one that OpenRLHF keeps going on from


def test_a_damaged_file_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, "verl", 2).write_text("{")
    with pytest.raises(FileNotFoundError, match="global_step_2"):
        find_prior(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_where_there_is_none_the_error_says_what_to_give(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"a checkpoint folder.*{PRIOR_NAME}.*the folder of such a run"):
        find_prior(tmp_path / path)


def test_a_checkpoint_of_another_step_is_not_complete(tmp_path: Path) -> None:
    file = save(tmp_path, "TRL", 3)
    assert is_complete(file.parent)
    (file.parent / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    assert not is_complete(file.parent)
