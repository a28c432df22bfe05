"""The model as a transformers user sees it: config, from_experts, save and load, Auto classes, dtypes, PEFT."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_hub import hub_stand_in
from fusionroute_oracle import VOCAB, fusionroute, padded_prompts
from fusionroute_tiny import FAMILIES, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ebpo_core.fusionroute import FusionRouteConfig, FusionRouteForCausalLM

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A router and three experts on disk."""
    root = tmp_path_factory.mktemp("models")
    families = {"router": "llama", "math": "llama", "code": "qwen2", "chat": "mistral"}
    return {name: save_tiny(root / name, family, seed=i) for i, (name, family) in enumerate(families.items())}


def experts_of(folders: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in folders.items() if name != "router"}


@pytest.fixture
def model(folders: dict[str, Path]) -> FusionRouteForCausalLM:
    built = FusionRouteForCausalLM.from_experts(str(folders["router"]), experts_of(folders), alpha=0.7)
    with torch.no_grad():
        built.route_head.weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    return built


def greedy(model: Any) -> list[list[int]]:
    ids, mask = padded_prompts([4, 7], seed=1)
    tokens: list[list[int]] = model.generate(ids, attention_mask=mask, **GREEDY).tolist()
    return tokens


# --------------------------------------------------------------------------------------------------------------- config


def test_config_survives_json(model: FusionRouteForCausalLM, tmp_path: Path) -> None:
    config = model.config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FusionRouteConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.router_config.to_dict() == config.router_config.to_dict()
    assert loaded.num_experts == 3
    assert loaded.alpha == 0.7
    assert loaded.eos_token_id == 2
    assert loaded.get_text_config().num_hidden_layers == 2
    assert [sorted(expert) for expert in loaded.experts] == [["hash", "name", "path", "vocab_size"]] * 3


def test_config_of_a_newer_version_is_refused(model: FusionRouteForCausalLM, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fusionroute_version": 2}))
    with pytest.raises(ValueError, match="fusionroute_version is 2 and this ebpo_core reads 1"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"route": "best"}, "route is 'best'"),
        ({"router_config": {"model_type": "no_such_model"}}, "model_type 'no_such_model'"),
    ],
)
def test_config_checks_its_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionRouteConfig(**{"router_config": tiny_config("llama"), **changes})


def test_narrow_vocabulary_is_what_transformers_sees() -> None:
    config = FusionRouteConfig(router_config=tiny_config("llama", vocab_size=208), vocab_size=200)
    assert config.get_text_config().vocab_size == 200
    assert isinstance(config.router_config, PreTrainedConfig)
    assert config.router_config.vocab_size == 208


# -------------------------------------------------------------------------------------------------------- save and load


def test_a_checkpoint_refers_to_its_experts(model: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    expected = greedy(model)
    model.save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert file.get_tensor("route_head.weight").dtype == torch.float32
    assert {key.partition(".")[0] for key in keys} == {"router", "route_head"}
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert [expert["path"] for expert in stored["experts"]] == [
        str(folders[n].resolve()) for n in ("math", "code", "chat")
    ]
    assert "0.7" in (tmp_path / "saved" / "README.md").read_text()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is FusionRouteForCausalLM
    assert loaded.experts.names == ["math", "code", "chat"]
    assert greedy(loaded) == expected
    assert not loaded.training


def test_saving_again_changes_nothing(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one")
    loaded = FusionRouteForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    router_alone = FusionRouteForCausalLM.from_pretrained(tmp_path / "two", load_experts=False)
    assert len(router_alone.experts) == 0
    router_alone.save_pretrained(tmp_path / "three")
    for other in ("two", "three"):
        for name in ("config.json", "model.safetensors", "README.md", "generation_config.json"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), (other, name)


def test_a_complete_checkpoint_can_be_moved(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copies = {name: shutil.copytree(path, tmp_path / "models" / name) for name, path in folders.items()}
    model = FusionRouteForCausalLM.from_experts(str(copies["router"]), experts_of(copies))
    expected = greedy(model)
    model.save_pretrained(tmp_path / "whole", save_experts=True)
    shutil.rmtree(tmp_path / "models")
    shutil.move(tmp_path / "whole", tmp_path / "elsewhere")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert greedy(loaded) == expected
    stored = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    assert [expert["path"] for expert in stored["experts"]] == ["experts/math", "experts/code", "experts/chat"]
    router_alone = FusionRouteForCausalLM.from_pretrained(tmp_path / "elsewhere", load_experts=False)
    router_alone.save_pretrained(tmp_path / "trained on")  # the references still lead to the copies
    assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "trained on")) == expected


def test_moved_and_changed_experts(model: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    expected = greedy(model)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    content = json.loads(file.read_text())
    content["experts"][1]["path"] = str(tmp_path / "gone")
    file.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="expert 'code'.*expert_paths"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    moved = shutil.copytree(folders["code"], tmp_path / "here now")
    assert (
        greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", expert_paths={"code": str(moved)})) == expected
    )

    tiny_model("qwen2", seed=99).save_pretrained(moved)
    with pytest.raises(ValueError, match="weights of expert 'code' are not those.*verify_experts=False"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", expert_paths={"code": str(moved)})
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", expert_paths={"code": str(moved)}, verify_experts=False
    )
    assert greedy(other) != expected
    with pytest.raises(ValueError, match=r"\['nobody'\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", expert_paths={"nobody": "x"})


def test_an_expert_of_a_narrower_vocabulary_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    narrow = save_tiny(tmp_path / "narrow", "qwen2", vocab_size=150)
    with pytest.raises(ValueError, match="expert 'code' has 150 logits, the checkpoint's vocab_size is 200"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", expert_paths={"code": str(narrow)}, verify_experts=False
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_routers_of_every_family_round_trip(family: str, tied: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    router = tiny_model(family, seed=5, tie_word_embeddings=tied)
    model = FusionRouteForCausalLM.from_experts(router, {"math": str(folders["math"])})
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    head, embeddings = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) == tied


def test_shards_and_dtypes(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.router.dtype == torch.bfloat16
    assert loaded.route_head.weight.dtype == torch.float32
    assert torch.equal(loaded.route_head.weight, model.route_head.weight)
    assert {expert.model.dtype for expert in loaded.experts} == {torch.bfloat16}
    with torch.no_grad():
        out = loaded(torch.tensor([[5, 6, 7]]))
    assert out.logits.dtype == torch.float32
    assert out.routing_weights.dtype == torch.float32


def test_pickled_router_weights_are_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_live_experts_need_a_path_or_a_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = fusionroute(["llama", "qwen2"])
    expected = greedy(model)
    logging.getLogger("ebpo_core.fusionroute.checkpoint").addHandler(caplog.handler)
    model.save_pretrained(tmp_path / "live")
    assert "expert 'llama0' was given as a model that was never saved" in caplog.text
    with pytest.raises(ValueError, match="expert 'llama0' was given as a live model and never saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "live")
    given = {expert.name: expert.model for expert in model.experts}
    assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "live", expert_paths=given)) == expected
    model.save_pretrained(tmp_path / "copied", save_experts=True)
    assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "copied")) == expected


@pytest.mark.parametrize("how", ["live", "by path"])
@pytest.mark.parametrize("when", ["before", "between saves"])
def test_an_expert_changed_in_memory_is_warned_of_or_copied_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, when: str
) -> None:
    for seed, name in enumerate(["router", "math"]):
        save_tiny(tmp_path / name, "llama", seed)
    expert: Any = tmp_path / "math"
    if how == "live":
        expert = AutoModelForCausalLM.from_pretrained(expert)
        if when == "before":
            expert.model.norm.weight.data.mul_(3)
    model = FusionRouteForCausalLM.from_experts(tmp_path / "router", {"math": expert})
    logging.getLogger("ebpo_core.fusionroute.checkpoint").addHandler(caplog.handler)
    if when == "between saves":
        model.save_pretrained(tmp_path / "first")
        assert "changed in memory" not in caplog.text
        assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "first")) == greedy(model)
    if how == "by path" or when == "between saves":
        with torch.no_grad():
            model.experts[0].model.model.norm.weight.mul_(3)
    expected = greedy(model)
    model.save_pretrained(tmp_path / "second")
    assert f"expert 'math' was changed in memory since it was loaded from {str(tmp_path / 'math')!r}" in caplog.text
    if how == "live":  # its hash is of what the router was saved beside
        with pytest.raises(ValueError, match="the weights of expert 'math' are not those"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "second")
        model.experts[0].model.save_pretrained(tmp_path / "changed")
        moved = {"math": tmp_path / "changed"}
        assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "second", expert_paths=moved)) == expected
    model.save_pretrained(tmp_path / "copied", save_experts=True)
    assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "copied")) == expected


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bytes]]:
    """What was sent to the hub, a dict of files for each commit."""
    sent: list[dict[str, bytes]] = []
    hub_stand_in(monkeypatch, sent.append)
    return sent


def test_the_hub_gets_our_card(model: Any, tmp_path: Path, commits: list[dict[str, bytes]]) -> None:
    """push_to_hub writes transformers' empty form over the card, then uploads: what is uploaded is our card again."""
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Model Card for Model ID\n")
    model._upload_modified_files(tmp_path, "someone/fused", {})
    assert b"2601.05106" in commits[0]["README.md"]
    assert commits[0]["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_the_hub_gets_what_was_saved_alone_and_copied_experts_whole(
    model: Any, tmp_path: Path, commits: list[dict[str, bytes]]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "private.txt").write_text("mine")
    (tmp_path / "log.txt").write_text("mine")
    model.save_pretrained(tmp_path, save_experts=True, push_to_hub=True, repo_id="someone/fused")
    [sent] = commits
    here = {file.relative_to(tmp_path).as_posix(): file for file in tmp_path.rglob("*") if file.is_file()}
    assert set(sent) == {name for name in here if not name.startswith(("notes/", "log"))}
    assert sum(name.startswith("experts/") for name in sent) >= 2 * len(model.experts)
    assert all(sent[name] == here[name].read_bytes() for name in sent)


# --------------------------------------------------------------------------------------------------------- from_experts


def test_vocabulary_is_the_smallest_width(folders: dict[str, Path]) -> None:
    wide = {"padded": tiny_model("llama", 1, vocab_size=256), "wider": tiny_model("qwen2", 2, vocab_size=224)}
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", 0, vocab_size=208), wide)
    assert model.config.vocab_size == 208
    assert FusionRouteForCausalLM.from_experts(tiny_model("llama"), wide, vocab_size=150).config.vocab_size == 150
    with pytest.raises(ValueError, match="vocab_size is 300: pass 1 to 200"):
        FusionRouteForCausalLM.from_experts(tiny_model("llama"), wide, vocab_size=300)
    with pytest.raises(ValueError, match="experts is empty"):
        FusionRouteForCausalLM.from_experts(tiny_model("llama"), {})


def test_tokenizers_that_disagree_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = tiny_tokenizer(VOCAB)
    text = tokenizer.backend_tokenizer.to_str().replace('"w17"', '"other"')
    tokenizer._tokenizer = Tokenizer.from_str(text)
    odd = save_tiny(tmp_path / "odd", "llama", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="'router' and 'odd' disagree at id 17: 'w17' against 'other'"):
        FusionRouteForCausalLM.from_experts(str(folders["router"]), {"odd": str(odd)})
    with pytest.raises(ValueError, match="disagree at id 17"):
        FusionRouteForCausalLM.from_experts(tiny_model("llama"), {"odd": str(odd)}, tokenizer=tiny_tokenizer(VOCAB))


def test_a_router_keeps_its_attention() -> None:
    router = tiny_model("llama")
    router.set_attn_implementation("eager")
    model = FusionRouteForCausalLM.from_experts(router, [tiny_model("llama", 1)])
    assert router.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        out = model(torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert out.attentions[0].shape == (1, 4, 3, 3)


def test_the_routers_own_object_is_no_expert() -> None:
    router = tiny_model("llama")
    for experts in ([tiny_model("llama", 1), router], {"chat": router}):
        with pytest.raises(ValueError, match=r"as the same object.*copy\.deepcopy\(router\)"):
            FusionRouteForCausalLM.from_experts(router, experts)
    assert all(weight.requires_grad for weight in router.parameters())


def test_the_given_router_is_taken_over_and_draws_are_reproducible() -> None:
    router = tiny_model("llama")
    torch.manual_seed(0)
    one = FusionRouteForCausalLM.from_experts(router, [tiny_model("llama", 1)])
    assert one.router is router
    torch.manual_seed(0)
    two = FusionRouteForCausalLM.from_experts(router, [tiny_model("llama", 1)])
    assert torch.equal(one.route_head.weight, two.route_head.weight)
    assert one.route_head.weight.std() > 0
    assert one.generation_config.eos_token_id == 2


# ------------------------------------------------------------------------------------------------------ module protocol


def test_experts_stay_out_of_the_module_tree(model: FusionRouteForCausalLM) -> None:
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"router", "route_head"}
    assert {name.partition(".")[0] for name in model.state_dict()} == {"router", "route_head"}
    assert len(list(model.children())) == 2
    model.train()
    assert model.router.training
    assert not any(expert.model.training for expert in model.experts)
    assert not any(weight.requires_grad for expert in model.experts for weight in expert.model.parameters())


def test_a_copy_shares_the_experts(model: FusionRouteForCausalLM) -> None:
    other = copy.deepcopy(model)
    assert other.experts is model.experts
    assert other.router is not model.router
    assert greedy(other) == greedy(model)


def test_moving_the_model_moves_its_experts(model: FusionRouteForCausalLM) -> None:
    """To the meta device, the only other one that every machine has."""
    from dataclasses import replace

    model.experts["chat"].reference = replace(model.experts["chat"].reference, device="cpu")
    model.to("meta")
    assert model.device.type == "meta"
    assert [expert.device.type for expert in model.experts] == ["meta", "meta", "cpu"]


def test_an_expert_on_another_device_gets_its_inputs_there(model: Any) -> None:
    """Inputs are sent to the expert's device and logits come back; on one CPU: the arguments of the moves."""
    expected = greedy(model)
    seen: list[torch.device] = []
    for expert in model.experts:
        expert.model.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].device), with_kwargs=True
        )
    assert greedy(model) == expected
    assert set(seen) == {torch.device("cpu")}


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # 5.24 renamed it; 5.16 has the old name only
def test_gradient_checkpointing_changes_no_gradient(model: FusionRouteForCausalLM) -> None:
    ids, mask = padded_prompts([6, 8], seed=3)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        out = model(input_ids=ids, attention_mask=mask, router_only=True)
        (out.logits.logsumexp(-1).sum() + out.routing_weights.square().sum()).backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    assert len(plain) == len(list(model.parameters()))
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_route_head_in_float32(model: FusionRouteForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids, router_only=True)
    assert out.routing_weights.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # PEFT asks for a name that 5.24 deprecates
def test_peft_wraps_the_router(model: FusionRouteForCausalLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = greedy(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["route_head"], r=2)
    )
    assert greedy(wrapped) == expected  # LoRA starts at zero
    trainable = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert any("route_head.modules_to_save" in name for name in trainable)
    assert not any("lora" in name for expert in model.experts for name, _ in expert.model.named_parameters())
    out = wrapped(input_ids=torch.tensor([[5, 6, 7]]), router_only=True)
    out.routing_weights.sum().backward()
    wrapped.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not [key for key in list(file.keys()) if "expert" in key]
    merged = wrapped.merge_and_unload()
    assert greedy(merged) == expected


def test_embeddings_can_be_resized(model: FusionRouteForCausalLM) -> None:
    model.resize_token_embeddings(VOCAB + 8)
    assert model.router.get_output_embeddings().weight.shape[0] == VOCAB + 8
    with torch.no_grad():
        assert model(torch.tensor([[5, VOCAB + 1]]), router_only=True).logits.shape[-1] == VOCAB


@pytest.mark.parametrize(("width", "vocabulary"), [(216, 200), (190, 190)])
def test_a_router_wider_than_v_can_be_resized_and_saved(width: int, vocabulary: int, tmp_path: Path) -> None:
    model = FusionRouteForCausalLM.from_experts(tiny_model("llama", vocab_size=208), [tiny_model("llama", 1)])
    assert model.config.vocab_size == 200
    model.resize_token_embeddings(width)
    assert model.config.vocab_size == vocabulary
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.shape[-1] == vocabulary
    model.save_pretrained(tmp_path, save_experts=True)
    loaded = FusionRouteForCausalLM.from_pretrained(tmp_path)
    assert loaded.router.get_input_embeddings().weight.shape[0] == width
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_another_model_in_a_checkpoints_place_is_named_before_anything_is_built(tmp_path: Path) -> None:
    tiny_model("llama", 0).save_pretrained(tmp_path)
    for load in (FusionRouteForCausalLM.from_pretrained, FusionRouteConfig.from_pretrained):
        with pytest.raises(ValueError, match="model_type 'llama': not a FusionRoute checkpoint"):
            load(tmp_path)
