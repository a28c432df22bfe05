"""The Hugging Face hub as far as an upload needs it: what would go over the network stays here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects


def hub_stand_in(monkeypatch: pytest.MonkeyPatch, commit: Callable[[dict[str, bytes]], object]) -> None:
    """Have every upload of a folder call ``commit`` with the files that the hub would get, by their names there."""

    def upload_folder(_api: Any, *, folder_path: Path, allow_patterns: list[str], **_how: Any) -> None:
        names = [file.relative_to(folder_path).as_posix() for file in folder_path.rglob("*") if file.is_file()]
        chosen = filter_repo_objects(names, allow_patterns=allow_patterns)
        commit({name: (folder_path / name).read_bytes() for name in chosen})

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_a, **_k: RepoUrl("https://huggingface.co/someone/fused"))
