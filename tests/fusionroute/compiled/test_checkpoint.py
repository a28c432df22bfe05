"""Compiled checkpoints: loaded and saved like any other, refused beside another router, never trained."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_compiled import ALPHA, RANK, load_compiled, save_compiled
from fusionroute_hub import hub_stand_in
from fusionroute_oracle import padded_prompts
from fusionroute_tiny import save_tiny, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ebpo_core.fusionroute import FusionRouteConfig, FusionRouteForCausalLM
from ebpo_core.fusionroute.compiled.experts import CompiledExperts
from ebpo_core.fusionroute.compiled.files import router_hash

IDS, _ = padded_prompts([9], 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_compiled(tmp_path / "checkpoint", "llama")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def test_it_loads_like_any_other_and_adapters_are_no_parameters(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    experts = model.experts
    assert isinstance(experts, CompiledExperts)
    assert experts.names == ["llama0", "llama1", "llama2"]
    assert not model.training
    stored = set(load_file(checkpoint / "model.safetensors"))
    assert set(model.state_dict()) == stored
    assert {name for name, _ in model.named_parameters()} == stored
    down = experts.adapters.down["model.layers.0.self_attn.q_proj"]
    assert down.shape == (3, RANK, 64)
    assert experts.adapters.up["lm_head"].shape == (3, RANK, 200)
    assert not down.requires_grad
    assert experts.adapters.rank == RANK


def test_saving_keeps_the_bytes_and_loads_again(checkpoint: Path, tmp_path: Path) -> None:
    model = load_compiled(checkpoint)
    copy = tmp_path / "copy"
    model.save_pretrained(copy)
    model.save_pretrained(copy)  # onto itself, too
    for name in model.experts.names:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            place = f"compiled/{name}/{file}"
            assert (copy / place).read_bytes() == (checkpoint / place).read_bytes()
    assert json.loads((copy / "config.json").read_text())["compiled"] == model.config.compiled
    shutil.rmtree(checkpoint)
    assert torch.equal(logits(load_compiled(copy)), logits(model))
    assert "reads the router's key/value cache" in (copy / "README.md").read_text()


def test_another_dtype_is_the_same_router_rounded(checkpoint: Path, tmp_path: Path) -> None:
    model = FusionRouteForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "half")
    again = FusionRouteForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    files = [folder / "compiled/llama0/adapter_model.safetensors" for folder in (checkpoint, tmp_path / "half")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_router_is_refused_with_the_remedy(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    tensors["router.model.norm.weight"] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not the one its experts were compiled for.*compiled=False"):
        load_compiled(checkpoint)
    model = FusionRouteForCausalLM.from_pretrained(checkpoint, verify_experts=False)
    assert model.compiled is not None


def test_the_hash_is_of_tensors_not_of_files(checkpoint: Path, tmp_path: Path) -> None:
    model = load_compiled(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert router_hash(tmp_path / "shards") == model.config.compiled["router"]
    assert torch.equal(logits(load_compiled(tmp_path / "shards")), logits(model))


def test_training_is_refused_with_the_remedy(checkpoint: Path) -> None:
    model = load_compiled(checkpoint)
    with pytest.raises(ValueError, match="compiled for this router.*compiled=False"):
        model.train()
    assert not model.training


def test_a_router_changed_in_memory_is_not_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = load_compiled(checkpoint)
    with torch.no_grad():
        model.router.lm_head.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"'lm_head.weight' was changed in memory"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_compiled_false_loads_the_experts_and_load_experts_false_the_router(tmp_path: Path) -> None:
    folder, source = tmp_path / "compiled", tmp_path / "source"
    paths = [save_tiny(tmp_path / f"expert{i}", "llama", i + 1) for i in range(3)]
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0), {f"llama{i}": p for i, p in enumerate(paths)})
    model.save_pretrained(source)
    save_compiled(folder, "llama")
    config = FusionRouteConfig.from_pretrained(folder)
    config.experts = FusionRouteConfig.from_pretrained(source).experts
    config.save_pretrained(folder)
    for found in (
        FusionRouteForCausalLM.from_pretrained(folder, compiled=False),
        AutoModelForCausalLM.from_pretrained(folder, compiled=False),
    ):
        assert found.compiled is None
        assert found.config.compiled is None
        assert found.experts.names == ["llama0", "llama1", "llama2"]
        found.train()
    alone = FusionRouteForCausalLM.from_pretrained(folder, load_experts=False)
    assert len(alone.experts) == 0
    assert alone.config.compiled is None
    again = load_compiled(folder)
    again.save_pretrained(tmp_path / "copy")
    assert [expert["path"] for expert in FusionRouteConfig.from_pretrained(tmp_path / "copy").experts or []] == [
        str(path) for path in paths
    ]


def test_what_has_no_meaning_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert_paths names .* compiled=False"):
        FusionRouteForCausalLM.from_pretrained(checkpoint, expert_paths={"llama0": "x"})
    with pytest.raises(ValueError, match="save_experts=True.*compiled=False"):
        load_compiled(checkpoint).save_pretrained(tmp_path / "copy", save_experts=True)
    whole = {"rank": 4, "scale": 1.5, "router": "sha256:x"}
    for wrong in ({"rank": 4}, *({**whole, "scale": scale} for scale in (math.nan, math.inf, 0.0, -1.0))):
        with pytest.raises(ValueError, match="compiled is .*expected None"):
            FusionRouteConfig(compiled=wrong)


def test_adapters_that_do_not_fit_are_refused(checkpoint: Path) -> None:
    folder = checkpoint / "compiled" / "llama1"
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    save_file({name: value for name, value in tensors.items() if "lm_head" not in name}, weights)
    with pytest.raises(ValueError, match=r"'llama1': its adapter does not fit the router, \['lm_head.lora_A"):
        load_compiled(checkpoint)
    save_file(tensors, weights)
    for name, value in {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "bias": "all"}.items():
        config.write_text(json.dumps({**settings, name: value}))
        with pytest.raises(ValueError, match=f"its adapter has {name}="):
            load_compiled(checkpoint)
    config.write_text(json.dumps({**settings, "lora_alpha": ALPHA + 1}))
    with pytest.raises(ValueError, match="the checkpoint's rank is 4 and its scale 1.5"):
        load_compiled(checkpoint)
    config.write_text(json.dumps({**settings, "lora_alpha": "six"}))
    with pytest.raises(ValueError, match=r"lora_alpha='six', the checkpoint's rank is 4 and its scale 1\.5"):
        load_compiled(checkpoint)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"'llama1': .*adapter_config\.json' is no JSON"):
        load_compiled(checkpoint)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="'llama1' is compiled, but .* is missing"):
        load_compiled(checkpoint)


@pytest.mark.parametrize("value", [math.nan, math.inf, None], ids=["NaN", "infinity", "integers"])
def test_adapters_that_are_not_of_finite_numbers_are_refused(checkpoint: Path, value: float | None) -> None:
    weights = checkpoint / "compiled" / "llama1" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.lm_head.lora_A.weight"
    if value is None:
        tensors[name] = tensors[name].to(torch.int32)
    else:
        tensors[name][0, 0] = value
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"'llama1': its adapter has values that are no finite .*lm_head\.lora_A"):
        load_compiled(checkpoint)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_itself_loads_the_adapters(tmp_path: Path) -> None:
    """In one layer keys and values are of the embeddings, so PEFT's own forward is the adapted stream."""
    from peft import PeftModel

    model = load_compiled(save_compiled(tmp_path, "llama", layers=1), torch.float64)
    for index in range(3):
        router = load_compiled(tmp_path, torch.float64).router
        adapted = PeftModel.from_pretrained(router, tmp_path / "compiled" / f"llama{index}").double()
        with torch.no_grad():
            expected = adapted(input_ids=IDS).logits
        found = model.experts[index](input_ids=IDS).logits
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_evaluation_and_a_tokenizer_go_on_as_before(checkpoint: Path) -> None:
    from ebpo_core.fusionroute.training import evaluate_samples, tokenize_samples

    model = load_compiled(checkpoint)
    rows = [{"prompt": "w7 w8", "completion": " w9 w10"}, {"prompt": "w7", "completion": " w12"}]
    found = evaluate_samples(model, tokenize_samples(rows, tiny_tokenizer()))
    assert list(found["models"]["experts"]) == ["llama0", "llama1", "llama2"]
    assert found["models"]["fusionroute"]["loss"] > 0


def test_the_hub_gets_the_adapters_and_the_hash_of_the_router_that_goes_with_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            place = tmp_path / "hub" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    hub_stand_in(monkeypatch, commit)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)  # another router, by its hash
    model.push_to_hub("someone/compiled")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "hub").rename(tmp_path / "first")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/compiled")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
