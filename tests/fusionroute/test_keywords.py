"""Keywords by name: what from_experts, from_pretrained, the config and forward take, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionroute_tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from ebpo_core.fusionroute import FusionRouteConfig, FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

IDS = torch.tensor([[1, 7, 8, 9]])
SMALL = {"hidden_size": 32, "layers": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["router", "one", "two"]):
        save_tiny(folder / name, "llama", seed, **SMALL)
    made(folder).save_pretrained(folder / "fused")
    return folder


def made(root: Path, router: Any = None, **options: Any) -> Any:
    experts = {"one": root / "one", "two": root / "two"}
    return FusionRouteForCausalLM.from_experts(root / "router" if router is None else router, experts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hysterisis": 0.5}, "unexpected keyword argument 'hysterisis': did you mean 'hysteresis'"),
        ({"alpa": 0.5}, "did you mean 'alpha'"),
        ({"experts_paths": {}}, "unexpected keyword argument 'experts_paths'"),
        ({"forced_expert": "one"}, "unexpected keyword argument 'forced_expert'"),
        ({"load_in_4bit": True}, "does not take 'load_in_4bit'"),
        ({"load_in_8bit": True}, "does not take 'load_in_8bit'"),
        ({"trust_remote_cod": True}, "did you mean 'trust_remote_code'"),
        ({"max_memory": {0: "1GB"}}, "does not take 'max_memory'"),
        ({"use_safetensors": False}, "does not take 'use_safetensors'"),
        ({"use_cache": False}, "unexpected keyword argument 'use_cache'"),
        ({"architectures": ["X"]}, "unexpected keyword argument 'architectures'"),
    ],
)
def test_from_experts_refuses_other_names(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        made(tmp_path, **options)  # where nothing could be loaded


def test_from_experts_refuses_what_it_cannot_do(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device_map='auto': a router is on one device"):
        made(tmp_path, device_map="auto")
    with pytest.raises(ValueError, match="device_map="):
        made(tmp_path, device_map={"model": 0, "lm_head": 1})
    with pytest.raises(ValueError, match="alpha is nan"):
        made(tmp_path, alpha=float("nan"))
    router = tiny_model("llama", 0, **SMALL)
    for name, value in {"attn_implementation": "eager", "device_map": "cpu", "revision": "main"}.items():
        with pytest.raises(TypeError, match=f"{name}='{value}': the router is a loaded model"):
            made(root, router, **{name: value})


def test_loading_arguments_work(root: Path, tmp_path: Path) -> None:
    model = made(root, torch_dtype="bfloat16")
    assert (model.router.dtype, model.experts[0].model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert made(root, dtype=torch.bfloat16).router.dtype == torch.bfloat16
    model = made(root, attn_implementation="eager", device_map="cpu", local_files_only=True, token=None, alpha=0.5)
    assert model.router.config._attn_implementation == "eager"
    assert (model.config.alpha, model.device.type) == (0.5, "cpu")
    model.save_pretrained(tmp_path)
    stored, known = (
        json.loads((tmp_path / "config.json").read_text()),
        json.loads((root / "fused/config.json").read_text()),
    )
    assert stored.keys() == known.keys(), "loading arguments are not stored"


def test_the_config_takes_and_stores_known_names_alone(root: Path, tmp_path: Path) -> None:
    router = tiny_model("llama", 0, **SMALL).config
    for wrong in ({"hysterisis": 0.5}, {"foo": 1}, {"load_in_4bit": True}, {"device_map": "auto"}):
        with pytest.raises(
            TypeError, match=f"FusionRouteConfig got an unexpected keyword argument '{next(iter(wrong))}'"
        ):
            FusionRouteConfig(router_config=router, **wrong)
    # A key that a later transformers wrote does not keep a checkpoint from loading, and is not written again.
    config = json.loads((root / "fused" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "of_tomorrow": 1}))
    found = FusionRouteConfig.from_pretrained(tmp_path)
    assert not hasattr(found, "of_tomorrow")
    found.save_pretrained(tmp_path / "again")
    assert "of_tomorrow" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert FusionRouteConfig.from_pretrained(tmp_path, alpha=0.25).alpha == 0.25


@pytest.mark.parametrize("loader", [FusionRouteForCausalLM, AutoModelForCausalLM])
def test_from_pretrained_refuses_other_names(root: Path, loader: Any) -> None:
    for wrong in ({"hysterisis": 0.5}, {"expert_path": {}}, {"load_in_4bit": True}, {"verify_expert": False}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
            loader.from_pretrained(root / "fused", **wrong)
    assert loader.from_pretrained(root / "fused", alpha=0.25, attn_implementation="eager").config.alpha == 0.25


def test_forward_refuses_other_names(root: Path) -> None:
    model = made(root)
    for name in ("alhpa", "forced_exprt", "router_onyl", "token_type_ids", "foo"):
        with pytest.raises(TypeError, match=f"forward got an unexpected keyword argument '{name}'"):
            model(input_ids=IDS, **{name: 1})
    with pytest.raises(ValueError, match="cu_seq_lens_q with experts"):
        model(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    out = model(input_ids=IDS, alpha=0.5, output_hidden_states=True, return_dict=True, output_attentions=False)
    assert len(out.hidden_states) == 2
    model(input_ids=IDS, labels=IDS, num_items_in_batch=torch.tensor(3))
    with pytest.raises(ValueError, match="alhpa"):
        model.generate(IDS, max_new_tokens=1, alhpa=0.5)


def test_routers_that_are_none_are_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    small = tiny_model("llama", 0, **SMALL)
    adapted = peft.get_peft_model(tiny_model("llama", 0, **SMALL), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    loaded = tiny_model("llama", 0, **SMALL)
    loaded.load_adapter(str(tmp_path))
    for router, message in [
        (adapted, "router is a PeftModel with an adapter: merge it"),
        (loaded, "router is a LlamaForCausalLM with an adapter: merge it"),
        (small.model, "router is a LlamaModel, without an LM head: use AutoModelForCausalLM"),
        (made(root), "router is a FusionRoute model: pass model.router"),
        (root / "fused", "router is a FusionRoute model: pass model.router"),
        (torch.nn.Linear(2, 2), "router is a Linear: pass a path"),
        (None, "router is a NoneType: pass a path"),
    ]:
        with pytest.raises(TypeError, match=message) as caught:
            FusionRouteForCausalLM.from_experts(router, {"one": tmp_path / "nowhere"})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a PEFT adapter, not a model; merge it into its base"):
        made(root, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        made(root, tmp_path / "nowhere")


@pytest.mark.parametrize("command", [["generate", "--prompt=w7"], ["eval", "--tasks=arc_easy"], ["convert", "out"]])
def test_commands_name_a_model_that_is_no_checkpoint(
    root: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name, rest = command[0], command[1:]
    tiny_model("llama", 0, **SMALL).save_pretrained(tmp_path / "bare")  # without a tokenizer
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    capsys.readouterr()  # bars of saving
    for folder, message in [(root / "router", "llama"), (tmp_path / "bare", "llama"), (tmp_path / "adapter", "give")]:
        assert main([name, str(folder), *rest]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert error[0].startswith(f"fusionroute {name}: ")
        assert "FusionRoute checkpoint" in error[0]
        assert message in error[0]


def test_embeddings_are_refused_by_name(root: Path) -> None:
    model = made(root)
    embeds = model.get_input_embeddings()(IDS)
    alone = "pass token ids alone; embeddings of one model mean nothing to the others"
    with pytest.raises(ValueError, match=f"inputs_embeds is given: {alone}"):
        model(input_ids=IDS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match=f"input_ids is None: {alone}"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=alone):
        model.generate(input_ids=IDS, inputs_embeds=embeds, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_to_keep": -1}, "logits_to_keep is -1: pass a number of last positions, or 0 for all"),
        ({"labels": IDS, "router_only": True}, "labels with router_only=True: the loss is that of the fused logits"),
        ({"labels": IDS, "fuse": False}, "labels with fuse=False: the loss is that of the fused logits"),
        ({"output_router_logits": True}, "output_router_logits=True: router_logits of the output are the router LM's"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \[4\]: pass \[B, S\]"),
        ({"input_ids": IDS[:, :0]}, r"input_ids has shape \[1, 0\]: pass \[B, S\], at least one token a row"),
    ],
)
def test_forward_refuses_what_it_would_ignore(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(root)(**{"input_ids": IDS, **options})


def test_saving_refuses_other_names(root: Path, tmp_path: Path) -> None:
    model = made(root)
    with pytest.raises(TypeError, match="argument 'save_expert': did you mean 'save_experts'"):
        model.save_pretrained(tmp_path / "out", save_expert=True)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", save_experts=True, max_shard_size="1GB", safe_serialization=True)
    assert (tmp_path / "out" / "experts" / "one" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["draft_tokens", "output_routing", "alpha", "allowed_experts"])
def test_a_generation_config_holds_nothing_that_would_not_be_read(root: Path, name: str) -> None:
    """transformers keeps any name there, and says nothing."""
    model = made(root)
    config = GenerationConfig(max_new_tokens=2, **{name: 0})
    message = f"generation_config has {name}=0, which is not read there: pass it to generate"
    for arguments in ({"generation_config": config}, {"generation_config": config, "draft_tokens": 2}):
        with pytest.raises(ValueError, match=message):
            model.generate(IDS, **arguments)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, config)
    plain, model.generation_config = model.generation_config, config
    with pytest.raises(ValueError, match=message):
        model.generate(IDS)
    model.generation_config = plain
    assert model.generate(IDS, GenerationConfig(max_new_tokens=2, eos_token_id=None, pad_token_id=0)).shape == (1, 6)
