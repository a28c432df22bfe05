"""transformers' own tests of models, from the source distribution of the installed version.

They are fetched once, into an ignored folder, by pip and so from whatever index it is set up with.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

_SOURCES = Path(__file__).parents[1] / "fusionroute" / ".sources"
_PACKAGE = "transformers_suite_tests"


def model_tester() -> Any:
    """``ModelTesterMixin``; skips the calling module where its source cannot be fetched."""
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(_tests())]
    sys.modules[_PACKAGE] = package
    # Not in the source distribution: tests of exports, and of generate, which the suite only asks whether one inherits.
    absent = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    for name, mixin in absent.items():
        parent, _, _ = name.partition(".")
        sys.modules.setdefault(f"{_PACKAGE}.{parent}", ModuleType(f"{_PACKAGE}.{parent}"))
        module = ModuleType(f"{_PACKAGE}.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common").ModelTesterMixin


def _tests() -> Path:
    version = transformers.__version__
    tests = _SOURCES / f"transformers-{version}" / "tests"
    if not tests.is_dir():
        _SOURCES.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(_SOURCES), f"transformers=={version}"]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(_SOURCES.glob(f"transformers-{version}.tar.gz"))
        if not archives:
            reason = f"the source of transformers {version} is out of reach: {fetched.stderr[-300:]}"
            pytest.skip(reason, allow_module_level=True)
        with tarfile.open(archives[0]) as archive:
            archive.extractall(_SOURCES, filter="data")
    return tests
