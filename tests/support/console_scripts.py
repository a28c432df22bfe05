"""The installed console scripts, run as a user runs them: in a process and a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``ebpo`` or ``fusionroute`` with the environment of a user, but for the hub, and return what it printed."""
    script = Path(sys.executable).with_name(name)
    assert script.is_file(), f"{script}: the package is not installed in this environment"
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    command = [str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)
