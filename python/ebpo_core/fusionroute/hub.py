"""A checkpoint on its way to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


def upload(
    folder: Path,
    repo_id: str,
    files_timestamps: Mapping[str, float],
    always: Collection[str],
    *,
    commit_message: str | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """The commit that holds the new files of ``folder``, in sub-folders of any depth.

    transformers' own upload, whose arguments these are, looks one folder deep, and experts lie deeper.

    Args:
        folder: of the checkpoint.
        repo_id: on the hub.
        files_timestamps: when each entry of ``folder`` had changed last before it was saved into.
        always: entries that go up whenever they changed: what was written before those times were taken.
        commit_message, token, create_pr, revision, commit_description: as for ``push_to_hub``.
    """
    new = []
    for entry in sorted(folder.iterdir()):
        if entry.name in always or entry.stat().st_mtime > files_timestamps.get(entry.name, -1.0):
            files = [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
            new += [file.relative_to(folder).as_posix() for file in files]
    api = HfApi(token=token)
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Who may only propose a change cannot make a branch; a missing one is refused by the upload.
            if not create_pr or error.response is None or error.response.status_code != 403:
                raise
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[escape(name) for name in new],
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        create_pr=create_pr,
        revision=revision,
    )
