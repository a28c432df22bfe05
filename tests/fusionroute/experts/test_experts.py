"""Experts loaded by reference and given live: what they compute, that they stay frozen, checks, copies, errors."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers")

import torch
from fusionroute_tiny import (
    FAMILIES,
    put_in_hub_cache,
    save_tiny,
    save_tiny_adapter,
    save_tiny_gguf,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations import deepspeed

from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.references import ExpertReference

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 9, 30, 77, 150, 8, 199, 44, 23, 12, 101, 57]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {family: save_tiny(root / family, family, seed) for seed, family in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Experts:
    return Experts.load(folders)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_expert_computes_what_its_model_does(loaded: Experts, folders: dict[str, Path], family: str) -> None:
    expert, model = loaded[family], tiny_model(family, FAMILIES.index(family))
    assert torch.equal(logits(expert), logits(model))
    assert expert.reference.path == str(folders[family])
    assert (expert.vocab_size, expert.device, expert.config.vocab_size) == (200, torch.device("cpu"), 200)
    assert type(expert.model) is type(model)


def test_a_sequence_that_is_also_found_by_name(loaded: Experts) -> None:
    assert loaded.names == list(FAMILIES)
    assert loaded["qwen3"] is loaded[2] is list(loaded)[2] is loaded[-4]
    assert loaded[1:3].names == ["qwen2", "qwen3"]
    with pytest.raises(KeyError, match=r"'math'.*\['llama', 'qwen2'"):
        loaded["math"]
    assert len(Experts()) == 0
    assert Experts().to("cpu").names == []


def test_frozen_whatever_others_do(loaded: Experts) -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    (expert,) = Experts.load({"math": model})
    expected = logits(expert)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    out = expert(input_ids=IDS).logits
    assert torch.equal(out, expected)
    assert not out.requires_grad
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    assert not expert(inputs_embeds=embeddings).logits.requires_grad
    holder = nn.ModuleDict({"router": nn.Linear(2, 2)})
    object.__setattr__(holder, "experts", loaded)
    holder.train()
    holder.bfloat16()
    assert not any(each.model.training or each.model.dtype != torch.float32 for each in loaded)
    assert copy.deepcopy(holder).experts is loaded, "a deep copy shares them"


def test_autocast_does_not_change_an_expert(loaded: Experts) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded[0](input_ids=IDS).logits, logits(loaded[0]))
        assert loaded[0](input_ids=IDS).logits.dtype == torch.float32


def test_dtype_and_attention(folders: dict[str, Path]) -> None:
    path = str(folders["llama"])
    variants = [
        {"path": path},
        {"path": path, "dtype": "bfloat16", "attn_implementation": "eager"},
        {"path": path, "dtype": "auto"},
    ]
    experts = Experts.load(variants, default_dtype=torch.float64)
    assert [expert.model.dtype for expert in experts] == [torch.float64, torch.bfloat16, torch.float32]
    assert experts[1].config._attn_implementation == "eager"
    assert experts.references[0].dtype is None, "it goes on following the router"
    assert Experts.load([path]).references[0].hash == experts.references[1].hash
    assert Experts.load([path], default_dtype="float16")[0].model.dtype == torch.float16


def test_equal_references_share_one_model(folders: dict[str, Path]) -> None:
    path = str(folders["llama"])
    experts = Experts.load({"a": path, "b": path, "c": {"path": path, "dtype": "bfloat16"}})
    assert experts["a"].model is experts["b"].model is not experts["c"].model


def test_gguf(tmp_path: Path) -> None:
    model = save_tiny_gguf(tmp_path / "tiny.gguf", seed=5)
    (expert,) = Experts.load([tmp_path / "tiny.gguf"], default_dtype="float32")
    assert torch.equal(logits(expert), logits(model))
    (reference,) = Experts([expert]).save_into(tmp_path / "checkpoint")
    assert (reference.path, reference.gguf_file) == ("experts/tiny", "tiny.gguf")
    assert reference.hash == expert.hash
    (again,) = Experts.load([reference], base_dir=tmp_path / "checkpoint", default_dtype="float32")
    assert torch.equal(logits(again), logits(model))


def test_threads(folders: dict[str, Path]) -> None:
    """Several threads on shared, offloaded and plain experts: every result is the expert's own."""
    paths = {name: str(folders[name]) for name in ("llama", "qwen3", "gemma3")}
    experts = Experts.load(
        {
            "plain": paths["llama"],
            "first": {"path": paths["qwen3"], "offload": True},
            "second": {"path": paths["gemma3"], "offload": True},
        }
    )
    expected = [logits(expert) for expert in experts]
    wrong: list[str] = []

    def work(offset: int) -> None:
        for step in range(12):
            index = (step * offset + step) % len(experts)
            if not torch.equal(experts[index](input_ids=IDS).logits, expected[index]):
                wrong.append(experts.names[index])

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "math", "llama")
    stored = Experts.load([folder]).stored(tmp_path)
    assert stored[0].path == "./math"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="expert 'math'.*sha256:files:.*sha256:files:.*verify=False"):
        Experts.load(stored, base_dir=tmp_path)
    experts = Experts.load(stored, base_dir=tmp_path, verify=False)
    assert experts.references[0].hash is None
    again = experts.stored(tmp_path)[0]
    assert again.hash not in (None, stored[0].hash), "what is stored next is what was used"
    Experts.load([again], base_dir=tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="expert 'math'.*sha256:files:"):
        Experts.load([again], base_dir=tmp_path)  # compared before anything is loaded
    with pytest.raises(ValueError, match="expert 'math'.*no known kind"):
        Experts.load([replace(again, hash="md5:0")], base_dir=tmp_path)


def test_live_models_are_stored_by_where_they_came_from(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "math", "llama", dtype=torch.bfloat16)
    model = Experts.load([folder])[0].model
    stored = Experts.load({"math": model, "code": tiny_model("qwen2")}).stored(tmp_path)
    assert [reference.path for reference in stored] == ["./math", None]
    assert all(str(reference.hash).startswith("sha256:tensors:") for reference in stored)
    (again,) = Experts.load(stored[:1], base_dir=tmp_path, default_dtype="float32")
    assert again.model.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="expert 'code' was given as a live model"):
        Experts.load(stored, base_dir=tmp_path)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    changed = Experts.load({"math": model}).stored(tmp_path)
    with pytest.raises(ValueError, match="expert 'math'.*sha256:tensors:"):
        Experts.load(changed, base_dir=tmp_path)


def test_save_into(tmp_path: Path, folders: dict[str, Path]) -> None:
    sharded = save_tiny(tmp_path / "sharded", "mistral", max_shard_size="100KB")
    (sharded / "LICENSE.txt").write_text("terms")
    (sharded / "trainer_state.json").write_text("{}")
    (sharded / "optimizer.pt").write_bytes(b"x")
    live = tiny_model("gemma2", 3)
    experts = Experts.load({"a": sharded, "b": folders["qwen3"], "live": live})
    expected = [logits(expert) for expert in experts]
    references = experts.save_into(tmp_path / "checkpoint")
    assert [reference.path for reference in references] == ["experts/a", "experts/b", "experts/live"]
    copied = tmp_path / "checkpoint" / "experts" / "a"
    left_out = {"trainer_state.json", "optimizer.pt"}
    assert {file.name for file in copied.iterdir()} == {file.name for file in sharded.iterdir()} - left_out
    for file in copied.iterdir():
        assert file.read_bytes() == (sharded / file.name).read_bytes()
    assert {path.name for path in copied.parent.iterdir()} == {"a", "b", "live"}, "no temporary folder stays"
    stored = [ExpertReference.from_dict(json.loads(json.dumps(reference.to_dict()))) for reference in references]
    # The folder is complete by itself, wherever it is moved.
    moved = shutil.move(tmp_path / "checkpoint", tmp_path / "moved")
    shutil.rmtree(sharded)
    again = Experts.load(stored, base_dir=moved)
    assert [torch.equal(logits(expert), out) for expert, out in zip(again, expected, strict=True)] == [True] * 3
    # Saved onto itself, with two experts' names exchanged, and once more elsewhere.
    first, second = again.save_into(moved)[:2]
    assert (first.path, first.hash) == (stored[0].path, stored[0].hash)
    swapped = Experts.load({"a": folders["qwen3"], "b": moved / "experts" / "a"})
    assert [each.hash for each in swapped.save_into(moved)] == [second.hash, first.hash]
    assert torch.equal(logits(Experts.load([moved / "experts" / "b"])[0]), expected[0])


def test_save_into_that_fails_leaves_what_was_there(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = save_tiny(tmp_path / "gone", "llama")
    experts = Experts.load({"a": folders["qwen3"], "gone": folder})
    experts[:1].save_into(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expert 'gone'.*has no model\.safetensors"):
        experts.save_into(tmp_path / "checkpoint")
    assert [path.name for path in (tmp_path / "checkpoint" / "experts").iterdir()] == ["a"]
    Experts.load([tmp_path / "checkpoint" / "experts" / "a"])


def test_hub_ids(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the local cache, by its branch and by its commit, and a checkpoint that brings its experts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_in_hub_cache(tmp_path, "owner/math", folders["llama"], "a" * 40)
    experts = Experts.load(["owner/math", {"path": "owner/math", "revision": "a" * 40, "name": "pinned"}])
    expected = logits(tiny_model("llama"))
    assert torch.equal(logits(experts[0]), expected)
    assert experts.references[0].hash == Experts.load([folders["llama"]])[0].hash
    stored = experts.stored(tmp_path)
    assert [(each.path, each.revision) for each in stored] == [("owner/math", None), ("owner/math", "a" * 40)]
    Experts.load(stored)
    with pytest.raises(
        OSError, match=r"expert 'math' \('owner/math' at revision 'bbb(.|\n)*Check its path and revision"
    ):
        Experts.load([{"path": "owner/math", "revision": "b" * 40}])
    with pytest.raises(OSError, match=r"expert 'none' \('owner/none' at revision 'main'\)"):
        Experts.load(["owner/none"])
    checkpoint = tmp_path / "checkpoint"
    references = experts.save_into(checkpoint)
    put_in_hub_cache(tmp_path, "owner/routed", checkpoint)
    again = Experts.load(references, base_dir="owner/routed")
    assert torch.equal(logits(again["pinned"]), expected)


def test_loaded_whole_on_every_rank_of_a_sharded_run(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate sets up for a trained model (FSDP broadcasts it from the first rank) must not reach an expert."""
    for name, value in (
        ("ACCELERATE_USE_FSDP", "true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),
        ("LOCAL_RANK", "1"),
    ):
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        (expert,) = Experts.load([folders["gemma3"]])
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(logits(expert), logits(tiny_model("gemma3", FAMILIES.index("gemma3"))))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true", "set again for the router"


def test_loaded_whole_under_zero_3(folders: dict[str, Path]) -> None:
    class ZeRO3:
        def is_zero3(self) -> bool:
            return True

    config = ZeRO3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        (expert,) = Experts.load([folders["llama"]])
        assert deepspeed.is_deepspeed_zero3_enabled(), "set again for the router"
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert torch.equal(logits(expert), logits(tiny_model("llama")))


def test_errors_name_the_expert_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    shutil.copytree(folder, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    shutil.copytree(folder, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    shutil.copytree(folder, tmp_path / "strange")
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "no-such-model"}')
    for path, error, message in (
        (tmp_path / "gone", FileNotFoundError, "expert 'x': there is no path"),
        (tmp_path / "pickle", ValueError, "expert 'x': .*pickles.*safetensors"),
        (tmp_path / "partial", ValueError, "expert 'x': .*missing keys.*norm"),
        (tmp_path / "strange", ValueError, "expert 'x': .*no-such-model"),
    ):
        for verify in (True, False):
            with pytest.raises(error, match=message):
                Experts.load({"x": path}, verify=verify)
    with pytest.raises(ValueError, match="device 'cuda:63' is not in this machine"):
        Experts.load([{"path": str(folder), "device": "cuda:63"}])
    save_tiny_gguf(tmp_path / "m.gguf")
    save_tiny_adapter(tmp_path / "lora", tiny_model("llama"))
    for package, values in (
        ("gguf", {"path": str(tmp_path / "m.gguf")}),
        ("accelerate", {"path": str(folder), "offload": True}),
        ("peft", {"path": str(folder), "adapter": str(tmp_path / "lora")}),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"expert 'x': .*'{package}'.*ebpo-core\[fusionroute\]"):
            Experts.load([{"name": "x", **values}])
        monkeypatch.undo()
