"""What the prose names exists: links and their anchors, paths of the repository, dotted names of the package."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = r"(?:benches|docs|examples|kernels|python|recipes|rust|tests|\.ci|\.github)"
REPOSITORY_PATH = re.compile(rf"(?<![\w/.~:-]){FOLDERS}/[\w.*/-]*")
DOTTED = re.compile(r"(?<![\w./])ebpo_core(?:\.[A-Za-z_]\w*)+(?::[A-Za-z_]\w*)?")
IMPORT = re.compile(r"^from (ebpo_core[\w.]*) import ([\w, ]+)", re.MULTILINE)


@cache
def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub and MkDocs make them of its headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower() for title in titles)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title)) for title in plain}


@cache
def package() -> griffe.Module:
    """The package as its sources say; nothing of it is imported."""
    return griffe.load("ebpo_core", search_paths=[ROOT / "python"], allow_inspection=False)


def resolves(name: str) -> bool:
    """True if a dotted name is a module of the package or something defined or exported there."""
    try:
        return griffe.Kind(package()[name.removeprefix("ebpo_core.")].kind) is not None
    except (KeyError, griffe.AliasResolutionError):
        return False


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in headings(file), f"{target}: {file.name} has no such heading, only {sorted(headings(file))}"


@every_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    for name in REPOSITORY_PATH.findall(page.read_text(encoding="utf-8")):
        path = name.rstrip("./")
        assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), f"{name}: no such file or folder"


@every_page
def test_dotted_names_of_the_package_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = {name.replace(":", ".") for name in DOTTED.findall(text)}
    for module, imported in IMPORT.findall(text):
        names |= {f"{module}.{name.split(' as ')[0].strip()}" for name in imported.split(",")}
    assert [name for name in sorted(names) if not resolves(name)] == []


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("ebpo_core.EBPO.group", True),
        ("ebpo_core.trainer.EBPOTrainer", True),
        ("ebpo_core.fusionroute.FusionRouteForCausalLM.from_experts", True),
        ("ebpo_core.kernels.select_add", True),
        ("ebpo_core.EBPO.nothing", False),
        ("ebpo_core.verifiers", False),
    ],
)
def test_a_name_resolves_if_it_is_there(name: str, right: bool) -> None:
    assert resolves(name) is right


def test_docstrings_become_markdown() -> None:
    markdown = runpy.run_path(str(ROOT / "docs" / "roles.py"))["markdown"]
    assert markdown("See :func:`~.losses.bias` and :class:`Prior`::") == "See `bias` and `Prior`:"
    assert 'identifier="ebpo_core.EBPO.group"><code>group</code>' in markdown(":meth:`~ebpo_core.EBPO.group`")
    table = "    ====  =====\n    a     b c\n    ====  =====\n    1     2 3\n    ====  ====="
    assert markdown(table).splitlines() == ["    | a | b c |", "    | --- | --- |", "    | 1 | 2 3 |"]
