"""transformers' own tests: of models, from the source distribution of the installed version, and of ``generate``.

Both are fetched once, into an ignored folder: the former by pip and so from whatever index it is set up with; the
latter, which no distribution holds, at the version's tag of transformers' repository. ``TRANSFORMERS_SOURCE`` names a
checkout, of this version or of an older one, to take the tests of ``generate`` from in its place.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import unittest
import urllib.request
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import transformers

from ebpo_core.fusionroute.compat import CACHE

_SOURCES = Path(__file__).parents[1] / "fusionroute" / ".sources"
_FOLDER = _SOURCES / f"transformers-{transformers.__version__}"
_PACKAGE = "transformers_suite_tests"
_GENERATE = "tests/generation/test_utils.py"
_RENAMED = {"past_key_values": CACHE, "dynamic_full": "dynamic"}  # within the range of transformers supported
_URL = f"https://raw.githubusercontent.com/huggingface/transformers/v{transformers.__version__}/{_GENERATE}"


def testers() -> tuple[Any, Any]:
    """``ModelTesterMixin`` and ``GenerationTesterMixin``; skips the calling module where neither can be had.

    The second is one test, skipped with the reason, where its source alone is out of reach.
    """
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    _module().__path__ = [str(_model_tests())]
    _module("exporters")
    # Not in the source distribution; FusionRoute has exports of its own.
    _module("exporters.test_export").ExportTesterMixin = type("ExportTesterMixin", (), {})  # type: ignore[attr-defined]
    _module("generation")
    generation = _generation_tester()
    _module("generation.test_utils").GenerationTesterMixin = generation  # type: ignore[attr-defined]
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common").ModelTesterMixin, generation


def _module(name: str = "") -> ModuleType:
    """A module of the package of transformers' tests, registered; empty if there was none."""
    full = f"{_PACKAGE}.{name}".removesuffix(".")
    return sys.modules.setdefault(full, ModuleType(full))


def _model_tests() -> Path:
    tests = _FOLDER / "tests"
    if (tests / "test_modeling_common.py").is_file():
        return tests
    version = transformers.__version__
    _SOURCES.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=_SOURCES) as folder:  # every worker of pytest may be here
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", folder, f"transformers=={version}"]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob(f"transformers-{version}.tar.gz"))
        if not archives:
            reason = f"the source of transformers {version} is out of reach: {fetched.stderr[-300:]}"
            pytest.skip(reason, allow_module_level=True)
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        with suppress(OSError):  # another was faster
            (Path(folder) / _FOLDER.name).rename(_FOLDER)
    return tests


def _generation_tester() -> Any:
    checkout = os.environ.get("TRANSFORMERS_SOURCE")
    try:
        text = _of_checkout(Path(checkout)) if checkout else _of_tag()
    except OSError as error:
        if checkout:
            raise  # it was asked for
        reason = (
            f"{_URL} is out of reach: {error}; for transformers' tests of generate set TRANSFORMERS_SOURCE to a "
            "checkout of its repository"
        )
        return type("GenerationTesterMixin", (), {"test_generate": unittest.skip(reason)(lambda _: None)})
    module = ModuleType(f"{_PACKAGE}.generation.test_utils")
    # Not imported: the text may differ from the file's.
    exec(compile(text, Path(checkout or _FOLDER) / _GENERATE, "exec"), module.__dict__)  # noqa: S102
    return module.GenerationTesterMixin


def _of_checkout(checkout: Path) -> str:
    text = (checkout / _GENERATE).read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', (checkout / "src/transformers/__init__.py").read_text("utf-8"))
    if version is not None and version[1] != transformers.__version__:
        for older, name in _RENAMED.items():
            text = re.sub(rf"\b{older}\b", name, text)
    return text


def _of_tag() -> str:
    stored = _FOLDER / _GENERATE
    if not stored.is_file():
        with urllib.request.urlopen(_URL, timeout=30) as answer:
            text: bytes = answer.read()
        stored.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=_SOURCES) as folder:
            part = Path(folder) / stored.name
            part.write_bytes(text)
            part.replace(stored)
    return stored.read_text(encoding="utf-8")
