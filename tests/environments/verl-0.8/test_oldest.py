"""verl 0.8 looks for no plugins: it takes the estimator from the environment. The rest is that of verl 0.9."""

from __future__ import annotations

import os
import subprocess
import sys

import verl

CODE = (
    "import sys, verl; print('ebpo_core.integrations.verl' in sys.modules); "
    "from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY; print('ebpo' in ADV_ESTIMATOR_REGISTRY)"
)


def test_this_is_the_oldest_verl_supported() -> None:
    assert verl.__version__ == "0.8.0"


def test_the_environment_variable_registers_the_estimator() -> None:
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "ebpo_core.integrations.verl"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr
