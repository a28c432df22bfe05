"""Compiled checkpoints: loaded and saved like any other, refused beside another router, never trained."""

from __future__ import annotations

import copy
import json
import logging
import pickle
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


def test_a_model_changed_in_memory_is_not_saved_whatever_way_it_changed(checkpoint: Path, tmp_path: Path) -> None:
    def in_place(model: Any) -> None:
        with torch.no_grad():
            model.router.lm_head.weight.add_(1.0)

    def uncounted(model: Any) -> None:
        model.router.lm_head.weight.data.add_(1.0)

    def assigned(model: Any) -> None:
        other = {**model.state_dict(), "router.lm_head.weight": model.router.lm_head.weight + 1}
        model.load_state_dict(other, assign=True)

    def routes(model: Any) -> None:
        model.route_head.weight.data.neg_()

    for change in (in_place, uncounted, assigned, routes):
        model = load_compiled(checkpoint)
        change(model)
        name = "route_head.weight" if change is routes else "router.lm_head.weight"
        with pytest.raises(ValueError, match=rf"'{name}' was changed in memory.*compiled=False"):
            model.save_pretrained(tmp_path / "changed")
    model = load_compiled(checkpoint)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="was changed in memory"):
        model.save_pretrained(tmp_path / "changed", state_dict=state)
    assert not (tmp_path / "changed").exists()


def test_copies_are_the_model_and_convert_for_themselves(checkpoint: Path, tmp_path: Path) -> None:
    model = load_compiled(checkpoint)
    expected = logits(model)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    load_compiled(checkpoint, torch.bfloat16).float().save_pretrained(tmp_path / "rounded")
    assert load_compiled(tmp_path / "rounded").dtype == torch.float32


def test_resizing_and_variants_are_refused_with_the_remedy(checkpoint: Path, tmp_path: Path) -> None:
    model = load_compiled(checkpoint)
    with pytest.raises(ValueError, match=r"resize_token_embeddings.*compiled=False"):
        model.resize_token_embeddings(210)
    assert model.config.vocab_size == 200
    with pytest.raises(ValueError, match="variant='fp16', and the experts are compiled"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant").exists()
    with pytest.raises(ValueError, match="variant='fp16', and the experts are compiled"):
        FusionRouteForCausalLM.from_pretrained(checkpoint, variant="fp16")


def test_a_subfolder_is_where_the_adapters_are(checkpoint: Path) -> None:
    found = FusionRouteForCausalLM.from_pretrained(checkpoint.parent, subfolder=checkpoint.name)
    assert torch.equal(logits(found), logits(load_compiled(checkpoint)))


def test_saving_asks_for_no_paths_of_experts_that_are_not_loaded(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_compiled(checkpoint)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "copy")
    assert "expert_paths" not in caplog.text


def test_an_expert_counts_its_adapters_parameters(checkpoint: Path) -> None:
    model = load_compiled(checkpoint)
    stored = load_file(checkpoint / "compiled/llama1/adapter_model.safetensors")
    assert model.experts["llama1"].num_parameters == sum(value.numel() for value in stored.values())


def test_a_broken_report_is_found_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    report = checkpoint / "compiled/report.json"
    for content, message in (("{", "is no JSON"), ("[]", "no JSON object"), ("{}", r"has the keys \[\] alone")):
        report.write_text(content)
        with pytest.raises(ValueError, match=f"report on compiled experts.*{message}.*delete it"):
            load_compiled(checkpoint).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


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
    good = {"rank": 4, "scale": 1.5, "router": "x"}
    for wrong in ({"rank": 4}, {**good, "scale": float("nan")}, {**good, "scale": 0.0}, {**good, "rank": True}):
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
    for broken in (torch.nan, torch.inf, 1):
        save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.full((RANK, 64), broken)}, weights)
        with pytest.raises(ValueError, match=r"'llama1': .* no finite numbers, \['lm_head.lora_A"):
            load_compiled(checkpoint)
    save_file(tensors, weights)
    kinds = {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "bias": "all"}
    kinds |= {"peft_type": "IA3", "use_qalora": True, "layers_to_transform": [0], "alora_invocation_tokens": [5]}
    for name, value in kinds.items():
        config.write_text(json.dumps({**settings, name: value}))
        with pytest.raises(ValueError, match=f"its adapter has {name}="):
            load_compiled(checkpoint)
    for change in ({"lora_alpha": ALPHA + 1}, {"lora_alpha": None}, {"lora_alpha": "6"}, {"r": 8}):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match="the checkpoint's rank is 4 and its scale 1.5"):
            load_compiled(checkpoint)
    for content, message in (("{", "is no JSON"), ("[]", "holds no JSON object")):
        config.write_text(content)
        with pytest.raises(ValueError, match=f"'llama1': .*adapter_config.json' {message}"):
            load_compiled(checkpoint)
    config.unlink()
    with pytest.raises(FileNotFoundError, match="'llama1' is compiled, but .* is missing"):
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
