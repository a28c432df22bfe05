"""Fresh processes: a user's verl finds the estimator, by the wheel's entry point or by the environment variable."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

REGISTERED = (
    "import sys, verl; print('ebpo_core.integrations.verl' in sys.modules); "
    "from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY; print('ebpo' in ADV_ESTIMATOR_REGISTRY)"
)
FIRST = (
    "import ebpo_core.integrations.verl as ours; from verl.trainer.ppo.core_algos import get_adv_estimator_fn; "
    "print(get_adv_estimator_fn('ebpo') is ours.compute_ebpo_advantage)"
)
# The second import runs verl/__init__.py again, in less time than another process takes.
TWICE = (
    f"{REGISTERED}; import os, importlib; os.environ['VERL_USE_EXTERNAL_MODULES'] = 'ebpo_core.integrations.verl'; "
    f"importlib.reload(verl); {REGISTERED}"
)
PROCESSES = {"installed": (REGISTERED, "auto"), "variable": (TWICE, "none"), "ours first": (FIRST, "auto")}


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """What each process printed. They run at once: each spends its time importing verl."""
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins},
        )
        for name, (code, plugins) in PROCESSES.items()
    }
    return {name: process.communicate()[0].split() for name, process in running.items()}


def test_the_wheel_has_the_entry_point() -> None:
    (point,) = entry_points(group="verl.plugins", name="ebpo")
    assert point.value == "ebpo_core.integrations.verl"


def test_importing_verl_registers_the_estimator(said: dict[str, list[str]]) -> None:
    assert said["installed"] == ["True", "True"]


def test_the_environment_variable_registers_it_where_plugins_are_off(said: dict[str, list[str]]) -> None:
    assert said["variable"] == ["False", "False", "True", "True"]


def test_our_module_may_be_imported_first(said: dict[str, list[str]]) -> None:
    assert said["ours first"] == ["True"]
