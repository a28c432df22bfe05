"""Experts written as plain folders: their dtypes, quantised and merged ones, and which must be written so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")
pytest.importorskip("peft")

import torch
from fusionroute_convertible import (
    MERGED,
    NAMES,
    Made,
    check,
    copied,
    dtypes,
    edit,
    edit_config,
    forced,
    fused,
    own,
    save_convertible,
    snapshot,
    stored,
)
from fusionroute_tiny import save_tiny, save_tiny_adapter, save_tiny_gguf, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebpo_core.fusionroute import ExpertReference, FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.conversion import convert_checkpoint
from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.export import export_expert, needs_conversion

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return save_convertible(tmp_path_factory.mktemp("models"))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    return copied(original, tmp_path / "models")


def test_needs_conversion(original: Made, tmp_path: Path) -> None:
    root = original.root
    reasons = [
        needs_conversion(each.anchored(root))
        for each in map(ExpertReference.from_dict, stored(original.checkpoint).values())
    ]
    assert reasons == ["it is a GGUF file", "it is a PEFT adapter on a base model", None]
    (tmp_path / "only").mkdir()
    shutil.copy(root / "math.gguf", tmp_path / "only")
    for path, reason in {"math.gguf": "it is a GGUF file", "chat": None}.items():
        assert needs_conversion(ExpertReference(path=path).anchored(root)) == reason
    assert needs_conversion(ExpertReference(path=tmp_path / "only").anchored()) == "it is a GGUF file"
    assert needs_conversion(ExpertReference(path="owner/name", gguf_file="x.gguf").anchored()) == "it is a GGUF file"
    assert needs_conversion(ExpertReference(path="owner/name").anchored()) is None
    quantised = ExpertReference(path=root / "chat", quantization_config={"load_in_8bit": True})
    assert needs_conversion(quantised) == "it is a model that its quantization_config quantises while loading"
    assert needs_conversion(ExpertReference(name="live")) == "it is a live model that was never saved"
    with pytest.raises(FileNotFoundError, match="expert 'x'"):
        needs_conversion(ExpertReference(name="x", path="/nowhere/at/all"))


def test_weights_have_the_dtype_that_experts_run_in(made: Made, tmp_path: Path) -> None:
    edit(made.checkpoint, "math", dtype="bfloat16")
    edit(made.checkpoint, "code", dtype="auto")
    before = forced(FusionRouteForCausalLM.from_pretrained(made.checkpoint))
    assert not torch.equal(before["math"], made.logits["math"])
    convert_checkpoint(made.checkpoint, tmp_path / "out")
    assert {dtypes(tmp_path / "out", name) for name in ("math", "code")} == {"bfloat16", "float32"}
    check(tmp_path / "out", before)


def test_the_router_s_dtype_is_that_of_references_without_one(made: Made, tmp_path: Path) -> None:
    model = fused(made.root, {"math": made.root / "math.gguf"}, dtype="bfloat16")
    model.save_pretrained(tmp_path / "fused")
    convert_checkpoint(tmp_path / "fused", tmp_path / "out")
    assert dtypes(tmp_path / "out", "math") == "bfloat16"
    check(tmp_path / "out", forced(model))


def test_dtype_is_that_of_all_written_experts(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(made.checkpoint), str(out), "--all", "--dtype", "bfloat16"]) == 0
    assert "chat: saved as bfloat16, experts/chat" in capsys.readouterr().out
    for name in NAMES:
        assert dtypes(out, name) == "bfloat16"
        assert stored(out)[name]["dtype"] == "bfloat16"
    paths = {"math": {"path": made.root / "math.gguf", "dtype": "bfloat16"}, "chat": {"dtype": "bfloat16"}}
    expected = forced(FusionRouteForCausalLM.from_pretrained(made.checkpoint, expert_paths=paths))
    found = forced(FusionRouteForCausalLM.from_pretrained(out))
    for name in ("math", "chat"):
        assert torch.equal(found[name], expected[name])
    assert (found["code"] - made.logits["code"]).abs().mean() < 0.2


@pytest.mark.parametrize("name", ["chat", "code"])
def test_what_is_quantised_while_loading_is_written_as_it_was(
    name: str,
    made: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit(made.checkpoint, name, quantization_config={"load_in_4bit": True}, device="cpu", attn_implementation="eager")
    assert main(["convert", str(made.checkpoint), str(tmp_path / "out"), "--expert", name]) == 0
    assert f"expert '{name}' is quantised while loading: its original weights are written" in caplog.text
    done = {"chat": "original weights saved", "code": "adapter merged into its base"}[name]
    assert f"{name}: {done}, experts/{name}, " in capsys.readouterr().out
    after = stored(tmp_path / "out")[name]
    assert "quantization_config" not in after
    assert (after["device"], after["attn_implementation"]) == ("cpu", "eager"), "where and how it runs is kept"
    check(tmp_path / "out", made.logits, exact=("math",))


def test_weights_that_are_quantised_on_disk(made: Made, tmp_path: Path) -> None:
    on_disk = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_config(made.root / "chat", quantization_config=on_disk)
    edit(made.checkpoint, "chat", quantization_config=on_disk)
    result = convert_checkpoint(made.checkpoint, tmp_path / "out", experts=["chat"], dtype="bfloat16")
    assert result[2].done == "copied"
    copied, origin = tmp_path / "out" / "experts" / "chat", made.root / "chat"
    for name in snapshot(origin):
        assert (copied / name).read_bytes() == (origin / name).read_bytes(), name
    assert "quantization_config" not in stored(tmp_path / "out")["chat"], "the folder's own says it"
    edit_config(made.root / "base", quantization_config=on_disk)
    with pytest.raises(ValueError, match="expert 'code': the weights of its base .* are quantised"):
        convert_checkpoint(made.checkpoint, tmp_path / "refused", experts=["code"])


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # that adapters of embeddings need care
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["o_proj", "lm_head"], "use_rslora": True},
        {"target_modules": ["embed_tokens", "up_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda settings: "-".join(map(str, settings)) if isinstance(settings, dict) else None,
)
def test_adapters_of_all_sorts(settings: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", 1, tie_word_embeddings=tied)
    adapted = save_tiny_adapter(tmp_path / "lora", tiny_model("llama", 1, tie_word_embeddings=tied), 2, **settings)
    changed = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for (
        tensor
    ) in changed.values():  # those saved whole, and deltas of tokens, are as in the base until they are trained
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    save_file(changed, tmp_path / "lora" / "adapter_model.safetensors")
    del adapted
    reference = ExpertReference(name="code", path=base, adapter=tmp_path / "lora")
    (expert,) = Experts.load([reference])
    expected, without = own(expert), own(tiny_model("llama", 1, tie_word_embeddings=tied))
    assert (expected - without).abs().max() > 0.5, "the test could not tell the adapter"
    written, done = export_expert(reference, "code", tmp_path / "out")
    assert done == "adapter merged into its base"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(own(model), expected, atol=5e-4, rtol=0.0)
    (again,) = Experts.load([written])
    assert torch.equal(own(again), own(model))
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    both = {"lm_head.weight", "model.embed_tokens.weight"} <= set(load_file(tmp_path / "out" / "model.safetensors"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (not both)
    untouched = {"q_proj", "norm"} & {*settings.get("target_modules", ()), *settings.get("modules_to_save", ())}
    assert both == (not (tied and untouched)), "tied as before, unless the adapter changes one of the two"


def test_the_adapter_s_own_tokenizer_comes_along(made: Made, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(made.root / "code")
    convert_checkpoint(made.checkpoint, tmp_path / "out", experts=["code"])
    folder = tmp_path / "out" / "experts" / "code"
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert (folder / "LICENSE").is_file(), "of the base"


def test_an_adapter_on_a_gguf_file(tmp_path: Path) -> None:
    base = save_tiny_gguf(tmp_path / "base.gguf", 1)
    adapted = save_tiny_adapter(tmp_path / "lora", base, 2)
    reference = ExpertReference(name="code", path=tmp_path / "base.gguf", adapter=tmp_path / "lora")
    assert needs_conversion(reference) == "it is a PEFT adapter on a base model"
    export_expert(reference, "code", tmp_path / "out")
    torch.testing.assert_close(own(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), own(adapted), **MERGED)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_an_adapter_that_cannot_be_merged(made: Made, tmp_path: Path) -> None:
    save_tiny_adapter(made.root / "code", tiny_model("llama", 1), 4, alora_invocation_tokens=[9], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="expert 'code': its adapter cannot be merged .*aLoRA.*'adapter': None"):
        convert_checkpoint(made.checkpoint, tmp_path / "out", verify_experts=False)
    assert not (tmp_path / "out").exists()
