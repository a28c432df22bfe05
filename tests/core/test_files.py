"""Files that are whole or absent: what is left after a failure, links, pipes, two writers, and the two formats."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, safe_open

from ebpo_core import files


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    files.write_text(file, "old\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(file, "new\n")
    assert file.read_text() == "old\n"
    assert names(tmp_path) == ["state.json"]


def test_the_content_and_the_rename_are_flushed_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, list[str]]] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(handle).st_mode), [name[: len(".a.")] for name in names(tmp_path)]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    files.write_bytes(tmp_path / "a", b"content")
    # First the temporary file, ".a.<hex>", then its folder, where it has become "a".
    assert seen == [(False, [".a."]), (True, ["a"])]


def test_links_are_followed_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.write_text(tmp_path / "link", "one")
    files.write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "two"
    code = "import sys; from ebpo_core import files; files.write_text('/dev/stdout', 'to the pipe')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "to the pipe"
    with pytest.raises(IsADirectoryError):
        files.write_text(tmp_path, "a folder")
    with pytest.raises(FileNotFoundError):
        files.write_text(tmp_path / "missing" / "file", "")


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    contents = [bytes([65 + index]) * 200_000 for index in range(4)]
    threads = [threading.Thread(target=files.write_bytes, args=(tmp_path / "one", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "one").read_bytes() in contents
    assert names(tmp_path) == ["one"]


def test_json_survives_bit_for_bit_and_names_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    # The last text is how Python spells a file name that is not UTF-8.
    content = {"format": "ours", "version": 1, "x": [0.1 + 0.2, 5e-324, math.pi], "text": "λ \udcff"}
    files.write_json(file, content)
    assert files.read_json(file, form="ours", version=1, what="cache") == content
    assert file.read_text(encoding="ascii").endswith("}\n")
    with pytest.raises(ValueError, match=r"is no cache \(format 'theirs'\)"):
        files.read_json(file, form="theirs", version=1, what="cache")
    with pytest.raises(ValueError, match="has version 1 and this ebpo_core reads 2"):
        files.read_json(file, form="ours", version=2, what="cache")
    file.write_text(json.dumps(content)[:-1])
    with pytest.raises(ValueError, match="is not JSON"):
        files.read_json(file, form="ours", version=1, what="cache")
    with pytest.raises(FileNotFoundError, match="no cache at"):
        files.read_json(tmp_path / "none.json", form="ours", version=1, what="cache")


def test_arrays_of_any_stride_and_their_metadata(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    files.write_arrays(tmp_path / "a.safetensors", {"turned": values.T, "every": values[:, ::2]}, {"made": "here"})
    found = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["turned"], values.T)
    np.testing.assert_array_equal(found["every"], values[:, ::2])
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == {"made": "here"}
