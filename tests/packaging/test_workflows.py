"""The facts about CI and releases that would otherwise be noticed only on the day of a release."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


CI, RELEASE = load("ci.yml"), load("release.yml")


def triggers(workflow: dict) -> dict:
    return workflow[True]  # YAML 1.1 reads the key `on` as a boolean


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def platforms(job: dict) -> list[dict]:
    """The matrix as GitHub expands it: the product of its lists, plus what `include` adds to matching entries."""
    matrix = dict(job["strategy"]["matrix"])
    include = matrix.pop("include", [])
    if not matrix:
        return include
    entries = [dict(zip(matrix, values, strict=True)) for values in product(*matrix.values())]
    for extra in include:
        for entry in entries:
            if all(entry[key] == value for key, value in extra.items() if key in matrix):
                entry.update(extra)
    return entries


def test_ci_runs_the_makefile_on_pushes_and_pull_requests():
    assert {"push", "pull_request", "workflow_call"} <= triggers(CI).keys()
    commands = [step.get("run") for step in CI["jobs"]["test"]["steps"]]
    assert "make test" in commands
    assert "make test-integrations" in commands
    assert set(CI["jobs"]["test"]["strategy"]["matrix"]["python"]) >= {"3.11", "3.13"}


def test_a_scheduled_run_takes_the_newest_of_everything_and_shows_what_moved():
    unpinned = load("unpinned.yml")
    assert "schedule" in triggers(unpinned)
    assert unpinned["jobs"]["newest"] == {"uses": "./.github/workflows/ci.yml", "with": {"unpinned": True}}
    assert triggers(CI)["workflow_call"]["inputs"]["unpinned"]["default"] is False
    commands = [step.get("run", "") for step in CI["jobs"]["test"]["steps"]]
    (update,) = [index for index, command in enumerate(commands) if "make update" in command]
    assert "GITHUB_STEP_SUMMARY" in commands[update]
    assert CI["jobs"]["test"]["steps"][update]["if"] == "inputs.unpinned"
    assert update < commands.index("make test")


def test_ci_installs_the_wheel_on_every_system():
    found = {(entry["os"].split("-")[0], entry["python"]) for entry in platforms(CI["jobs"]["wheel"])}
    assert {system for system, _ in found} == {"ubuntu", "macos", "windows"}
    assert "3.10" in {python for _, python in found}  # the oldest that requires-python allows


def test_release_builds_every_platform():
    linux = {(e["libc"], e["target"], e["policy"], e["runner"]) for e in platforms(RELEASE["jobs"]["linux"])}
    assert linux == {
        ("manylinux", "x86_64", "2_28", "ubuntu-24.04"),
        ("manylinux", "aarch64", "2_28", "ubuntu-24.04-arm"),
        ("musllinux", "x86_64", "musllinux_1_2", "ubuntu-24.04"),
        ("musllinux", "aarch64", "musllinux_1_2", "ubuntu-24.04-arm"),
    }
    desktop = {(e["os"], e["target"]) for e in platforms(RELEASE["jobs"]["desktop"])}
    assert desktop == {("macos", "x86_64"), ("macos", "aarch64"), ("windows", "x64")}
    assert "sdist" in RELEASE["jobs"]


@pytest.mark.parametrize("job", ["linux", "desktop", "sdist"])
def test_release_tries_what_it_built_before_it_uploads(job):
    steps = RELEASE["jobs"][job]["steps"]
    build = next(i for i, step in enumerate(steps) if step.get("uses", "").startswith("PyO3/maturin-action@"))
    smoke = next(i for i, step in enumerate(steps) if "tests/packaging/wheel_smoke.py" in step.get("run", ""))
    upload = next(i for i, step in enumerate(steps) if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert build < smoke < upload


def test_one_abi3_wheel_serves_every_python():
    """No build names an interpreter, so each platform gets the one wheel that Cargo's abi3 feature makes."""
    for step in steps(RELEASE) + steps(CI):
        if step.get("uses", "").startswith("PyO3/maturin-action@"):
            assert "interpreter" not in step["with"]["args"]
            assert "-i " not in step["with"]["args"]
    assert "abi3-py310" in (ROOT / "rust" / "py" / "Cargo.toml").read_text()


def test_artifact_names_are_distinct():
    """upload-artifact refuses a second upload of one name; a matrix must put its variables into it."""
    names = [s["with"]["name"] for s in steps(RELEASE) if s.get("uses", "").startswith("actions/upload-artifact@")]
    assert len(set(names)) == len(names) == 3
    assert "${{ matrix.libc }}-${{ matrix.target }}" in names[0]
    assert "${{ matrix.os }}-${{ matrix.target }}" in names[1]


def test_publishing_is_by_trusted_publishing_from_tags_only():
    job = RELEASE["jobs"]["publish"]
    assert set(job["needs"]) == {"test", "linux", "desktop", "sdist"}
    assert "startsWith(github.ref, 'refs/tags/v')" in job["if"]
    assert "github.event_name == 'push'" in job["if"]
    assert job["permissions"] == {"id-token": "write"}
    assert job["environment"] == "pypi"
    publish = next(s for s in job["steps"] if s.get("uses", "").startswith("pypa/gh-action-pypi-publish@"))
    assert "password" not in publish.get("with", {})
    assert triggers(RELEASE)["push"] == {"tags": ["v*"]}
    assert RELEASE["jobs"]["test"]["uses"] == "./.github/workflows/ci.yml"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_least_privilege(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        if "permissions" in job:
            assert name == "publish"
        assert "timeout-minutes" in job or "uses" in job
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    assert "secrets." not in path.read_text()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_major_version(path):
    for used in re.findall(r"uses: (\S+)", path.read_text()):
        assert used.startswith("./") or re.search(r"@(v\d+|release/v\d+)$", used), used


def test_windows_checks_the_kernels_symlink_out_as_one():
    for workflow, job in ((CI, "wheel"), (RELEASE, "desktop")):
        first = workflow["jobs"][job]["steps"][0]
        assert first["run"] == "git config --global core.symlinks true"


def test_the_ci_script_runs_both_targets_in_order():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^step (.*)$", script, re.MULTILINE) == ["make test", "make test-integrations"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
