"""LoRA on the router: tied embeddings merge into what was trained, the family's targets, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fusionroute_worker as worker
import pytest
import torch
from fusionroute_tiny import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.training.adapters import with_adapter

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

IDS = torch.tensor([[1, 7, 8, 9, 22, 31]])
SMALL = {"vocab_size": worker.V, "hidden_size": 32, "layers": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    worker.save_fusion(folder)
    return folder


def tied(root: Path, family: str = "llama", **overrides: Any) -> Any:
    router = tiny_model(family, 3, tie_word_embeddings=True, **SMALL, **overrides)
    model = FusionRouteForCausalLM.from_experts(router, {"one": root / "one", "two": root / "two"})
    torch.nn.init.normal_(model.route_head.weight, std=0.3)
    return model


ADAPTERS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "all": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*(q_proj|lm_head)"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8, 9]},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [7, 8]},
    },
    "tokens that differ": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [9, 22]},
    },
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 8]}},
    "tied head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tied embeddings": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tied tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [7, 8, 9],
        "ensure_weight_tying": True,
    },
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "dora": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"], "use_dora": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("ran_before", [False, True])
def test_tied_embeddings_merge_into_the_model_that_was_trained(
    root: Path, tmp_path: Path, name: str, ran_before: bool
) -> None:
    model = tied(root)
    if ran_before:
        model(input_ids=IDS)
    before = model(input_ids=IDS, router_only=True).logits if ran_before else None
    lora = peft.LoraConfig(r=2, lora_dropout=0.0, task_type="CAUSAL_LM", **ADAPTERS[name])
    trainer = worker.sft_trainer(model, tmp_path, max_steps=2, learning_rate=0.05, trainer={"peft_config": lora})
    trainer.train()
    trained = trainer.model.eval()
    expected = trained(input_ids=IDS).logits
    alone = trained(input_ids=IDS, router_only=True).logits
    trainer.save_merged(tmp_path / "merged")
    if before is not None:
        assert (alone - before).abs().max() > 1e-2, "training changed nothing"
    found = worker.load(tmp_path / "merged")
    torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(input_ids=IDS, router_only=True).logits, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(trained(input_ids=IDS).logits, expected), "merging changed the trainer's own model"
    router = found.router
    weights = (router.get_input_embeddings().weight, router.get_output_embeddings().weight)
    assert found.config.tie_word_embeddings == (weights[0] is weights[1]) == router.config.tie_word_embeddings
    # What was saved is a checkpoint like any other.
    found.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(worker.load(tmp_path / "again")(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_config_answers_for_the_router(root: Path) -> None:
    model = tied(root)
    config = model.config
    assert config.tie_word_embeddings is True
    assert config.to_dict()["tie_word_embeddings"] is True
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 1, 4)
    assert config.get_text_config().vocab_size == config.vocab_size == worker.V
    assert not hasattr(config, "no_such_name")
    config.tie_word_embeddings = False
    assert model.router.config.tie_word_embeddings is False
    assert worker.load(root / "start").config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", {"q_proj", "v_proj"}), ("qwen2", {"q_proj", "v_proj"}), ("gemma3", None)]
)
def test_targets_are_those_of_the_routers_family(root: Path, family: str, targets: set[str] | None) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    model = with_adapter(tied(root, family), lora)
    assert lora.target_modules is None, "the user's own is left as it was"
    found = set(model.peft_config["default"].target_modules)
    assert found == set(KNOWN["gemma3_text"]) if targets is None else found == targets
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("route_head.modules_to_save" in name for name in trained)
    assert all(".lora_" in name or "route_head.modules_to_save" in name for name in trained)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*(q_proj|head)"},
        {"target_modules": ["q_proj", "route_head"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.k_proj"},
    ],
)
def test_the_route_head_gets_no_adapter(root: Path, settings: dict[str, Any]) -> None:
    model = with_adapter(tied(root), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    names = [name for name, _ in model.named_parameters()]
    assert not any("route_head" in name and "lora_" in name for name in names)
    assert any("q_proj.lora_A" in name for name in names)
    if "exclude_modules" in settings:
        assert not any("k_proj.lora_A" in name for name in names)


def test_an_unknown_family_and_what_cannot_be_trained_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraModel

    model = tied(root)
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "target_module_mapping", {})
        with pytest.raises(ValueError, match=r"target_modules is None .* type 'llama': pass target_modules"):
            with_adapter(model, peft.LoraConfig(r=2))
    for config, message in [
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "peft_config is a PromptTuningConfig"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "peft_config is a PrefixTuningConfig"),
        (peft.AdaptionPromptConfig(adapter_len=4, task_type="CAUSAL_LM"), "peft_config is a AdaptionPromptConfig"),
        (peft.LoraConfig(r=2, layer_replication=[(0, 1), (0, 1)]), "layer_replication="),
        (peft.LoraConfig(r=2, task_type="SEQ_CLS"), "task_type='SEQ_CLS': a router is a causal language model"),
    ]:
        with pytest.raises(ValueError, match=message):
            worker.sft_trainer(model, tmp_path, trainer={"peft_config": config})
    with pytest.raises(TypeError, match="peft_config is a dict: pass a config of PEFT"):
        worker.sft_trainer(model, tmp_path, trainer={"peft_config": {"r": 4}})
    sizes = {"token_dim": 32, "num_layers": 1, "num_attention_heads": 4, "num_transformer_submodules": 1}
    prompts = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", **sizes)
    made = peft.get_peft_model(model, prompts)
    with pytest.raises(ValueError, match="peft_config is a PromptTuningConfig"):
        worker.sft_trainer(made, tmp_path)
    assert not (tmp_path / "expert_cache").exists(), "refused before the experts were run"


@pytest.mark.slow
def test_other_adapters_merge_too(root: Path, tmp_path: Path) -> None:
    for config in (
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
    ):
        trainer = worker.sft_trainer(
            tied(root), tmp_path / type(config).__name__, max_steps=2, trainer={"peft_config": config}
        )
        trainer.train()
        expected = trainer.model.eval()(input_ids=IDS).logits
        trainer.save_merged(tmp_path / type(config).__name__ / "merged")
        found = worker.load(tmp_path / type(config).__name__ / "merged")
        torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}])
@pytest.mark.parametrize("begin", ["path", "model", "checkpoint"])
def test_a_quantised_router_trains_an_adapter(root: Path, tmp_path: Path, bits: dict[str, Any], begin: str) -> None:
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **bits)
    experts = {"one": root / "one", "two": root / "two"}
    if begin == "checkpoint":
        model = worker.load(root / "start", quantization_config=quantization)
    elif begin == "path":
        model = FusionRouteForCausalLM.from_experts(root / "router", experts, quantization_config=quantization)
    else:
        router = AutoModelForCausalLM.from_pretrained(root / "router", quantization_config=quantization)
        model = FusionRouteForCausalLM.from_experts(router, experts)
    kinds = {type(module).__name__ for module in model.router.modules()}
    assert "Linear4bit" in kinds
    # Saved as it is, it is the same quantised model.
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "quantised")
    torch.testing.assert_close(worker.load(tmp_path / "quantised")(input_ids=IDS).logits, logits)
    with pytest.raises(ValueError, match="the router's weights are quantised, .* pass peft_config"):
        worker.sft_trainer(model, tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    trainer = worker.sft_trainer(model, tmp_path, learning_rate=0.05, max_steps=2, trainer={"peft_config": lora})
    trainer.train()
    expected = trainer.model.eval()(input_ids=IDS).logits
    assert (expected - logits).abs().max() > 1e-2
    trainer.save_merged(tmp_path / "merged")
    found = worker.load(tmp_path / "merged")
    assert not {"Linear4bit"} & {type(module).__name__ for module in found.router.modules()}
    assert "quantization_config" not in found.config.to_dict()
    torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(trainer.model(input_ids=IDS).logits, expected)


@pytest.mark.slow
def test_an_8_bit_router_merges_to_its_rounding(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = worker.load(root / "start", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = worker.sft_trainer(model, tmp_path, learning_rate=0.05, max_steps=2, trainer={"peft_config": lora})
    trainer.train()
    expected = trainer.model.eval()(input_ids=IDS).logits
    trainer.save_merged(tmp_path / "merged")
    found = worker.load(tmp_path / "merged")(input_ids=IDS).logits
    # 8-bit layers round their inputs too, which a merged model does not.
    assert (found - expected).abs().mean() < 0.03 * expected.abs().mean()
