"""What every built wheel must do in an environment that holds NumPy only; run by the workflows after installing it."""

import sys
from importlib.metadata import files, version

import ebpo_core

advantages = ebpo_core.advantages([[1.0, 0.0], [0.0, 0.0]])
assert advantages[0][0] > 0 > advantages[0][1], advantages

names = {str(path).replace("\\", "/") for path in files("ebpo-core") or ()}
for name in ("kernels/__init__.py", "kernels/reference.py", "trainer/__init__.py", "_core.pyi", "py.typed"):
    assert f"ebpo_core/{name}" in names, f"the wheel lacks ebpo_core/{name}"

try:
    import ebpo_core.kernels
except ImportError as error:
    told = str(error)
else:
    told = "no error: torch is installed here, so this run does not show that the wheel works without it"
assert 'pip install "ebpo-core[torch]"' in told, told

print(f"ebpo-core {version('ebpo-core')} works on Python {sys.version.split()[0]}, {sys.platform}: {advantages}")
