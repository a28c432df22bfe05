"""Fetch the frameworks that are not on the package index, at the commits that the suite was written against.

``python tests/environments/frameworks/fetch_sources.py [NAME ...]`` clones into ``.sources/NAME`` beside this file,
which git ignores. The tests of a framework whose source is not there are skipped. Clones of your own elsewhere:
``FRAMEWORK_SOURCES=/path/to/folder``, which holds one folder a framework, by these names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One framework: where it is, which commit, and the folders in it that go on the import path."""

    url: str
    commit: str
    roots: tuple[str, ...] = (".",)


SOURCES = {
    "slime": Source("https://github.com/THUDM/slime", "624b824a898ab0ec1fcb4d373004c7f3852bf515"),
    "rllm": Source("https://github.com/rllm-org/rllm", "9beb6e0f676a46d38858991fd79ac5f8e0b16d4c"),
    "nemo_rl": Source("https://github.com/NVIDIA-NeMo/RL", "7ea279abfbeb698b092856d0dab61e7cf39bc909"),
    "prime_rl": Source(
        "https://github.com/PrimeIntellect-ai/prime-rl",
        "559b44772e471d1538537b8805cc77f3824a5e64",
        ("src", "packages/prime-rl-configs/src"),
    ),
}


def folder() -> Path:
    """Where the sources are."""
    return Path(os.environ.get("FRAMEWORK_SOURCES", Path(__file__).with_name(".sources")))


def roots(name: str) -> list[Path]:
    """The folders of a framework that go on the import path; empty if its source is not there."""
    paths = [folder() / name / root for root in SOURCES[name].roots]
    return paths if all(path.is_dir() for path in paths) else []


def fetch(name: str) -> None:
    """Clone one framework at its commit, or bring an older clone to it; files are fetched as they are checked out."""
    source, target = SOURCES[name], folder() / name
    git = ["git", "-C", str(target)]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["git", "clone", "--quiet", "--filter=blob:none", "--no-checkout", source.url, str(target)]
        subprocess.run(command, check=True)
    elif subprocess.run([*git, "cat-file", "-e", source.commit], stderr=subprocess.DEVNULL, check=False).returncode:
        subprocess.run([*git, "fetch", "--quiet", "origin"], check=True)
    subprocess.run([*git, "checkout", "--quiet", source.commit], check=True)
    print(f"{name}: {source.commit[:12]} in {target}")


def main() -> int:
    """Fetch what the command line names, or all."""
    names = sys.argv[1:] or list(SOURCES)
    unknown = sorted(set(names) - set(SOURCES))
    if unknown:
        print(f"error: unknown framework {unknown[0]!r}: expected one of {', '.join(SOURCES)}", file=sys.stderr)
        return 2
    for name in names:
        fetch(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
