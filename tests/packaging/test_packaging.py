"""What the wheel and the sdist hold, and that they work on their own: both are built and the wheel is installed."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "ebpo_core"

pytestmark = pytest.mark.timeout(600)


def run(*command: object, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def maturin(*arguments: object, cwd: Path = ROOT, **env: str) -> None:
    run(sys.executable, "-m", "maturin", *arguments, cwd=cwd, **env)


def sources() -> dict[str, Path]:
    """Every file that has to ship, by its name in the wheel. No walk follows the symlink `kernels`, so it is named."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py"), PACKAGE / "_core.pyi", PACKAGE / "py.typed"]
    files += [PACKAGE / "fusionroute" / "traces" / "page.css", PACKAGE / "fusionroute" / "traces" / "page.js"]
    return {f"ebpo_core/{path.relative_to(PACKAGE).as_posix()}": path for path in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, in release mode: what users get. Cargo reuses what the installation built."""
    out = tmp_path_factory.mktemp("wheel")
    maturin("build", "--release", "--out", out)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    maturin("sdist", "--out", out)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked_sdist(sdist) -> Path:
    """At one place, so that building there twice does not fill the target folder."""
    where = ROOT / "target" / "sdist" / "unpacked"
    shutil.rmtree(where, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(where, filter="data")
    (path,) = where.iterdir()
    for source in path.rglob("*.rs"):
        source.touch()  # an archive keeps old times, by which Cargo would take changed sources for those it built last
    return path


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """Python of an environment into which the wheel was installed, with what it depends on and nothing else."""
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, venv)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, wheel)
    return python


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(archive.read(name).decode())


def test_one_abi3_wheel_serves_every_python_from_3_10(wheel, metadata):
    assert re.fullmatch(r"ebpo_core-[\w.]+-cp310-abi3-\w+\.whl", wheel.name)
    assert metadata["Requires-Python"] == ">=3.10"
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
    assert extension.startswith("ebpo_core/_core")
    assert "cpython" not in extension


def test_wheel_holds_every_source_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for name, path in sources().items():
            assert archive.read(name) == path.read_bytes(), name


@pytest.mark.parametrize(
    "subpackage",
    [
        "kernels",
        "trainer",
        "tasks",
        "cli",
        "integrations/verl",
        "integrations/contrib",
        "rewards",
        "data",
        "fusionroute/traces",
        "fusionroute/vllm",
    ],
)
def test_wheel_holds_the_subpackage(wheel, subpackage):
    with zipfile.ZipFile(wheel) as archive:
        assert f"ebpo_core/{subpackage}/__init__.py" in archive.namelist()


def test_wheel_adds_one_name_to_site_packages_and_nothing_stray(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"ebpo_core", info}
    extension = {name for name in names if name.startswith("ebpo_core/_core.") and name.endswith((".so", ".pyd"))}
    shipped = {name for name in names if name.startswith("ebpo_core/")} - extension
    assert shipped == sources().keys()
    assert not [name for name in names if "test" in name or name.endswith((".pyc", ".rs", ".safetensors", ".gguf"))]


def test_numpy_is_all_that_is_required_and_the_rest_are_extras(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line).group() for line in required] == ["numpy"]
    assert set(metadata.get_all("Provides-Extra")) >= {
        "torch",
        "train",
        "kernels",
        "fusionroute",
        "eval",
        "math",
        "dev",
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "LICENSE" in metadata.get_all("License-File")


@pytest.mark.parametrize(
    ("command", "module"), [("ebpo", "ebpo_core.cli"), ("fusionroute", "ebpo_core.fusionroute.cli")]
)
def test_wheel_declares_the_command(wheel, command, module):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        pattern = rf"^{command}\s*=\s*{re.escape(module)}:main$"
        assert re.search(pattern, archive.read(name).decode(), re.MULTILINE)


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        ("verl.plugins", "ebpo", "ebpo_core.integrations.verl"),
        ("vllm.general_plugins", "fusionroute", "ebpo_core.fusionroute.vllm.plugin:register"),
    ],
)
def test_wheel_declares_the_plugin(wheel, group, name, target):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        section = archive.read(file).decode().split(f"[{group}]")[1].split("[")[0]
    assert re.search(rf"^{name}\s*=\s*{re.escape(target)}$", section, re.MULTILINE)


def test_wheel_works_with_numpy_only(clean_python, tmp_path):
    installed = run(sys.executable, "-m", "uv", "pip", "freeze", "--python", clean_python)
    assert {re.split(r"==| @ ", line)[0] for line in installed.splitlines()} == {"ebpo-core", "numpy"}
    assert "works on Python" in run(
        clean_python, "-W", "error", ROOT / "tests" / "packaging" / "wheel_smoke.py", cwd=tmp_path
    )


@pytest.mark.parametrize("command", ["ebpo", "fusionroute"])
def test_the_command_starts_with_numpy_only(clean_python, tmp_path, command):
    assert f"usage: {command}" in run(clean_python.with_name(command), "--help", cwd=tmp_path)


def test_sdist_holds_real_kernel_files_the_lock_file_and_the_licence(unpacked_sdist):
    for name in ("Cargo.lock", "Cargo.toml", "pyproject.toml", "README.md", "LICENSE"):
        assert (unpacked_sdist / name).read_bytes() == (ROOT / name).read_bytes(), name
    for path in (ROOT / "kernels").rglob("*.py"):
        shipped = unpacked_sdist / "python" / "ebpo_core" / "kernels" / path.relative_to(ROOT / "kernels")
        assert not shipped.is_symlink()
        assert shipped.read_bytes() == path.read_bytes()


def test_sdist_builds_the_same_wheel(unpacked_sdist, wheel, tmp_path):
    """In the dev profile, whose dependencies stay in a target folder of their own: what is tested is the file list."""
    maturin(
        "build",
        "--profile",
        "dev",
        "--out",
        tmp_path,
        cwd=unpacked_sdist,
        CARGO_TARGET_DIR=str(ROOT / "target" / "sdist"),
    )
    (rebuilt,) = tmp_path.iterdir()
    with zipfile.ZipFile(rebuilt) as ours, zipfile.ZipFile(wheel) as theirs:
        assert set(ours.namelist()) == set(theirs.namelist())
