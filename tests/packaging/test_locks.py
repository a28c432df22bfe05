"""The lock files hold names and versions, and agree with what each environment asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "tests" / "environments"
SUITES = sorted(path.parent.name for path in ENVIRONMENTS.glob("*/requirements.txt"))
PIN = re.compile(r"[a-z0-9][a-z0-9-]*==[A-Za-z0-9.]+( ; .+)?")


def requirements(text: str) -> list[Requirement]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def pins(environment: str) -> dict[str, list[Requirement]]:
    """Requirements ``name==version`` of a lock file by name; several where Pythons or systems differ."""
    found: dict[str, list[Requirement]] = {}
    for pin in requirements((ENVIRONMENTS / environment / "lock.txt").read_text()):
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def asked(environment: str) -> list[Requirement]:
    """Requirements of an environment as its author wrote them; an override takes its requirement's place."""
    if environment == "main":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.search(r"^EXTRAS +:= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
        lines = project["dependencies"] + [line for name in extras for line in project["optional-dependencies"][name]]
        return [Requirement(line) for line in lines]
    folder = ENVIRONMENTS / environment
    overrides = requirements((folder / "overrides.txt").read_text()) if (folder / "overrides.txt").exists() else []
    replaced = {canonicalize_name(override.name) for override in overrides}
    written = requirements((folder / "requirements.txt").read_text())
    return [*overrides, *(line for line in written if canonicalize_name(line.name) not in replaced)]


@pytest.mark.parametrize("environment", ["main", *SUITES])
def test_a_lock_holds_names_and_versions_only(environment):
    for line in (ENVIRONMENTS / environment / "lock.txt").read_text().splitlines():
        assert line.startswith("#") or PIN.fullmatch(line), f"{environment}: {line}"


@pytest.mark.parametrize("environment", ["main", *SUITES])
def test_a_lock_agrees_with_what_its_environment_asks_for(environment):
    locked = pins(environment)
    for wanted in asked(environment):
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue  # for another system, or an override that drops a package
        found = locked.get(canonicalize_name(wanted.name), [])
        assert found, f"{environment}: {wanted} is not locked; run `make lock`"
        for pin in found:
            (version,) = (item.version for item in pin.specifier)
            assert wanted.specifier.contains(version, prereleases=True), f"{environment}: {wanted}, but {pin}"


def test_the_models_of_the_slow_tests_are_pinned():
    for line in requirements((ENVIRONMENTS / "main" / "models.txt").read_text()):
        assert [item.operator for item in line.specifier] == ["=="], line
