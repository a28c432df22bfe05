"""Hashes of weights: what changes them and what does not, how they are read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from fusionroute_tiny import put_in_hub_cache, save_tiny, save_tiny_adapter, save_tiny_gguf, tiny_model
from safetensors.torch import load_file, save_file

from ebpo_core.fusionroute.experts import hashes
from ebpo_core.fusionroute.experts.files import ADAPTER_WEIGHTS, INDEX, adapter_files, local_folder, weight_files
from ebpo_core.fusionroute.experts.hashes import (
    COMMIT,
    FILES,
    TENSORS,
    check_hash,
    commit_hash,
    files_hash,
    kind,
    sources_hash,
    tensors_hash,
)
from ebpo_core.fusionroute.experts.references import ExpertReference


def test_hash_of_files_is_sha256_over_digests_and_names(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"two" * 10_000)
    (tmp_path / "a").write_bytes(b"one")
    lines = "".join(f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()} {name}\n" for name in ("a", "b"))
    expected = "sha256:files:" + hashlib.sha256(lines.encode()).hexdigest()
    assert files_hash({"b": tmp_path / "b", "a": tmp_path / "a"}) == expected
    assert files_hash({"a": tmp_path / "b", "b": tmp_path / "a"}) != expected, "names count"


def test_all_shards_count_by_the_index(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sharded", "llama", max_shard_size="100KB")
    files = weight_files(folder)
    assert len(files) > 2
    assert list(files) == sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    before = files_hash(files)
    for name, file in files.items():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert files_hash(files) != before, f"a flipped bit in {name}"
        file.write_bytes(content)
    assert files_hash(files) == before
    (folder / "model-of-another-run.safetensors").write_bytes(b"")
    assert weight_files(folder) == files
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks \['{name}'\]"):
        weight_files(folder)


def test_copies_and_moved_folders_have_the_same_hash(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "one", "qwen3")
    copy = shutil.copytree(folder, tmp_path / "two")
    (copy / "README.md").write_text("not weights")
    assert files_hash(weight_files(folder)) == files_hash(weight_files(copy))
    other = save_tiny(tmp_path / "three", "qwen3", seed=1)
    assert files_hash(weight_files(folder)) != files_hash(weight_files(other))


def test_a_digest_is_read_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    first = files_hash({"w": file})
    # Same size, same time: by design the kept digest is used. Any other time, or another process, reads the file.
    status = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files_hash({"w": file}) == first
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files_hash({"w": file}) != first


def test_hash_of_tensors() -> None:
    model = tiny_model("mistral", dtype=torch.bfloat16)
    state = model.state_dict()
    expected = tensors_hash(state)
    assert (
        expected
        == tensors_hash(dict(reversed(state.items())))
        == tensors_hash(tiny_model("mistral").bfloat16().state_dict())
    )
    name = "model.norm.weight"
    for changed in (
        {**state, name: state[name].float()},
        {**state, name: state[name].reshape(1, -1)},
        {**state, name: state[name] + 1},
        {**state, "extra": torch.zeros(())},
        {other: value for other, value in state.items() if other != name},
    ):
        assert tensors_hash(changed) != expected
    zeros = [torch.zeros(2, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.uint32)]
    assert len({tensors_hash({"x": each}) for each in zeros}) == 3, "kinds of numbers count, not bytes alone"
    strided = torch.arange(12.0).reshape(3, 4).T
    assert tensors_hash({"x": strided}) == tensors_hash({"x": strided.contiguous()})
    assert tensors_hash({"x": torch.empty(0), "flag": torch.tensor(True), "note": "8bit"}).startswith("sha256:tensors:")


def test_blocks_do_not_change_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tiny_model("llama").state_dict()
    (tmp_path / "one").write_bytes(b"0123456789")
    (tmp_path / "two").write_bytes(b"0123456789")
    whole, file = tensors_hash(state), files_hash({"w": tmp_path / "one"})
    monkeypatch.setattr(hashes, "_BLOCK", 7)
    assert (tensors_hash(state), files_hash({"w": tmp_path / "two"})) == (whole, file)


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name, find in (("pytorch_model.bin", weight_files), ("adapter_model.bin", adapter_files)):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match=r"has no (adapter_)?model\.safetensors"):
            find(folder)
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=rf"pickles \({name}\).*safetensors"):
            find(folder)


def test_sources(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    for seed in (1, 2):
        save_tiny_adapter(tmp_path / f"lora{seed}", tiny_model("llama"), seed)
    plain = ExpertReference(path=str(base))
    found = {sources_hash(plain.source(), None)}
    for seed in (1, 2):
        reference = ExpertReference(path=str(base), adapter=str(tmp_path / f"lora{seed}"))
        found.add(sources_hash(reference.source(), reference.adapter_source()))
    save_tiny_gguf(tmp_path / "m.gguf")
    found.add(sources_hash(ExpertReference(path=str(tmp_path / "m.gguf")).source(), None))
    assert len(found) == 4
    tensors = load_file(tmp_path / "lora1" / ADAPTER_WEIGHTS)
    save_file({name: value + 1 for name, value in tensors.items()}, tmp_path / "lora1" / ADAPTER_WEIGHTS)
    reference = ExpertReference(path=str(base), adapter=str(tmp_path / "lora1"))
    assert sources_hash(reference.source(), reference.adapter_source()) not in found


def test_hub_ids_count_by_the_files_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "local", "llama")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = put_in_hub_cache(tmp_path / "hub", "owner/name", folder, commit="c" * 40)
    source = ExpertReference(path="owner/name").source()
    assert local_folder(source) == snapshot
    assert sources_hash(source, None) == sources_hash(ExpertReference(path=str(folder)).source(), None)
    assert sources_hash(source._replace(revision="c" * 40), None).startswith("sha256:files:")
    assert commit_hash(source, None) == "commit:" + "c" * 40
    (snapshot / "model.safetensors").unlink()
    assert sources_hash(source, None) == "commit:" + "c" * 40
    with pytest.raises(FileNotFoundError, match="'owner/other' at revision 'main' is not in the local cache"):
        sources_hash(ExpertReference(path="owner/other").source(), None)


def test_a_changed_hash_names_the_expert_both_hashes_and_the_remedies() -> None:
    check_hash("math", "sha256:files:1", "sha256:files:1")
    with pytest.raises(ValueError, match="expert 'math'.*sha256:files:1.*sha256:files:2.*Restore.*train.*verify"):
        check_hash("math", "sha256:files:1", "sha256:files:2")
    assert [kind(prefix + "00") for prefix in (FILES, TENSORS, COMMIT)] == [
        FILES,
        TENSORS,
        COMMIT,
    ]
    with pytest.raises(ValueError, match=r"'blake3:00'.*upgrade"):
        kind("blake3:00")


@pytest.mark.slow
def test_the_same_in_another_process(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gemma2")
    code = (
        "import sys; from fusionroute_tiny import tiny_model;"
        "from ebpo_core.fusionroute.experts.files import weight_files;"
        "from ebpo_core.fusionroute.experts.hashes import files_hash, tensors_hash;"
        "print(files_hash(weight_files(sys.argv[1])), tensors_hash(tiny_model('gemma2').state_dict()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support"), "PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", code, str(folder)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [files_hash(weight_files(folder)), tensors_hash(tiny_model("gemma2").state_dict())]
