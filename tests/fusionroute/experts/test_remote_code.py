"""Experts whose folders bring their own model class: run when that is allowed, remembered, compared, copied."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from fusionroute_tiny import put_in_hub_cache, save_tiny, save_tiny_adapter, tiny_model
from transformers import AutoModelForCausalLM, dynamic_module_utils

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.cli import main
from ebpo_core.fusionroute.conversion import convert_checkpoint
from ebpo_core.fusionroute.experts.experts import Experts
from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.fusionroute.training.preparation import expert_sources

IDS = torch.tensor([[1, 10, 20, 30, 40]])
# Logits are twice Llama's: they show which class ran. The marker shows that anything ran at all.
_MODELING = """
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .configuration_doubled import DoubledConfig
from .factor import FACTOR

with Path({marker!r}).open("a") as file:
    file.write("ran\\n")


class Head(torch.nn.Linear):
    def forward(self, hidden):
        return FACTOR * super().forward(hidden)


class DoubledForCausalLM(LlamaForCausalLM):
    config_class = DoubledConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
"""
_CONFIGURATION = """
from transformers import LlamaConfig


class DoubledConfig(LlamaConfig):
    model_type = "doubled_llama"
"""
_CLASSES = {
    "AutoConfig": "configuration_doubled.DoubledConfig",
    "AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM",
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def save_custom(folder: Path, seed: int = 3, *, model_type: str = "doubled_llama") -> Path:
    """A tiny Llama whose folder brings a class with doubled logits; ``folder.parent / "ran"`` grows when it is run."""
    save_tiny(folder, "llama", seed=seed)
    config = json.loads((folder / "config.json").read_text())
    classes = dict(_CLASSES)
    if model_type == "llama":  # a type of transformers, and another class for it
        del classes["AutoConfig"]
    config |= {"model_type": model_type, "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    modeling = _MODELING.format(marker=str(folder.parent / "ran"))
    if model_type == "llama":
        modeling = modeling.replace("from .configuration_doubled import DoubledConfig\n", "")
        modeling = modeling.replace("    config_class = DoubledConfig\n", "")
    else:
        (folder / "configuration_doubled.py").write_text(_CONFIGURATION)
    (folder / "modeling_doubled.py").write_text(modeling)
    (folder / "factor.py").write_text("FACTOR = 2.0\n")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folders: ``router``, ``plain``, and ``custom`` with code."""
    save_tiny(tmp_path / "router", "llama")
    save_tiny(tmp_path / "plain", "qwen3", seed=1)
    save_custom(tmp_path / "custom")
    return tmp_path


def built(models: Path, **options: Any) -> Any:
    experts = {"plain": models / "plain", "custom": models / "custom"}
    return FusionRouteForCausalLM.from_experts(models / "router", experts, **options)


def doubled(seed: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return 2 * tiny_model("llama", seed=seed)(input_ids=IDS).logits


def logits(expert: Any) -> torch.Tensor:
    found: torch.Tensor = expert(input_ids=IDS).logits
    return found


def ran(models: Path) -> bool:
    return (models / "ran").exists()


def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


def test_without_permission_nothing_is_loaded_or_run(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_loading(monkeypatch)
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(
            ValueError, match="expert 'custom': its model is Python code .* trust_remote_code=True"
        ) as e:
            built(models, **options)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Experts.load([models / "plain", models / "custom"])
    assert not ran(models)


def test_with_permission_the_folders_class_runs_and_decodes(models: Path) -> None:
    model = built(models, trust_remote_code=True)
    assert ran(models)
    torch.testing.assert_close(logits(model.experts["custom"]), doubled())
    reference = model.experts["custom"].reference
    assert str(reference.code_hash).startswith("sha256:files:")
    assert model.experts["plain"].reference.code_hash is None
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    slow = model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(tokens, slow)


def test_a_checkpoint_remembers_the_need_and_asks_again(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = built(models, trust_remote_code=True)
    expected = model(IDS).logits
    folder = models / "fused"
    model.save_pretrained(folder)
    shutil.copy(models / "router" / "tokenizer.json", folder)
    shutil.copy(models / "router" / "tokenizer_config.json", folder)
    (models / "ran").unlink()
    capsys.readouterr()
    stored = json.loads((folder / "config.json").read_text())["experts"]
    assert [sorted(each.keys() & {"code_hash", "trust_remote_code"}) for each in stored] == [[], ["code_hash"]]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    # What a config says is no permission.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    with monkeypatch.context() as patch:
        no_loading(patch)
        with pytest.raises(ValueError, match="expert 'custom': its model is Python code"):
            FusionRouteForCausalLM.from_pretrained(folder)
        assert main(["generate", str(folder), "--prompt", "w10", "--device", "cpu"]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        assert "--trust-remote-code" in error[0]
    assert not ran(models)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(again(IDS).logits, expected)
    argv = ["generate", str(folder), "--prompt", "w10", "--device", "cpu", "--max-new-tokens", "2"]
    assert main([*argv, "--trust-remote-code"]) == 0


@pytest.mark.parametrize("file", ["modeling_doubled.py", "factor.py", "configuration_doubled.py"])
def test_changed_code_is_noticed_before_it_runs(models: Path, file: str) -> None:
    folder = models / "fused"
    built(models, trust_remote_code=True).save_pretrained(folder)
    (models / "ran").unlink()
    code = models / "custom" / file
    code.write_text(code.read_text().replace("2.0", "3.0") + "# changed\n")
    with pytest.raises(ValueError, match="expert 'custom': the code in .* is not what the router was trained with"):
        FusionRouteForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        FusionRouteForCausalLM.from_pretrained(folder, verify_experts=False)
    assert not ran(models)
    model = FusionRouteForCausalLM.from_pretrained(folder, trust_remote_code=True, verify_experts=False)
    factor = 1.5 if file == "factor.py" else 1.0
    torch.testing.assert_close(logits(model.experts["custom"]), factor * doubled())


def test_a_type_of_transformers_needs_no_permission_and_runs_what_it_ran_then(models: Path) -> None:
    folder = save_custom(models / "other", model_type="llama")
    (stock,) = Experts.load([folder])
    assert not ran(models)
    torch.testing.assert_close(logits(stock), doubled() / 2)
    (own,) = Experts.load([folder], trust_remote_code=True)
    torch.testing.assert_close(logits(own), doubled())
    assert ran(models)
    # The permission alone does not turn one into the other.
    (again,) = Experts.load([stock.reference], trust_remote_code=True)
    assert torch.equal(logits(again), logits(stock))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Experts.load([own.reference])


def test_folders_of_one_name_have_their_own_code(models: Path) -> None:
    other = save_custom(models / "elsewhere" / "custom")
    (other / "factor.py").write_text("FACTOR = 6.0\n")
    experts = Experts.load({"a": models / "custom", "b": other}, trust_remote_code=True)
    torch.testing.assert_close(logits(experts["a"]), doubled())
    torch.testing.assert_close(logits(experts["b"]), 3 * doubled())


def test_copied_and_converted_experts_bring_their_code(models: Path, tmp_path: Path) -> None:
    model = built(models, trust_remote_code=True)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "whole", save_experts=True)
    convert_checkpoint(tmp_path / "whole", tmp_path / "converted", copy_all=True)
    shutil.rmtree(models / "custom")
    for name in ("whole", "converted"):
        again = FusionRouteForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(again(IDS).logits, expected)
        assert (tmp_path / name / "experts" / "custom" / "factor.py").is_file()
        assert not (tmp_path / name / "experts" / "plain" / "factor.py").exists()


def test_code_that_changed_is_not_copied_as_if_it_were_the_same(models: Path, tmp_path: Path) -> None:
    model = built(models, trust_remote_code=True)
    model.save_pretrained(tmp_path / "fused")
    (models / "custom" / "factor.py").write_text("FACTOR = 3.0\n")
    with pytest.raises(ValueError, match="expert 'custom': the code in .* is not what the router was trained with"):
        convert_checkpoint(tmp_path / "fused", tmp_path / "converted", copy_all=True)
    assert not (tmp_path / "converted").exists()
    model.save_pretrained(tmp_path / "whole", save_experts=True)
    with pytest.raises(ValueError, match="expert 'custom': the code in .* is not what the router was trained with"):
        FusionRouteForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)


def test_an_adapter_on_such_a_model_is_merged_with_permission_alone(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_tiny_adapter(tmp_path / "adapter", tiny_model("llama", seed=3))
    expert = {"path": models / "custom", "adapter": tmp_path / "adapter"}
    model = FusionRouteForCausalLM.from_experts(models / "router", {"a": expert}, trust_remote_code=True)
    expected = logits(model.experts["a"])
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        convert_checkpoint(tmp_path / "fused", tmp_path / "converted")
    convert_checkpoint(tmp_path / "fused", tmp_path / "converted", trust_remote_code=True)
    again = FusionRouteForCausalLM.from_pretrained(tmp_path / "converted", trust_remote_code=True)
    torch.testing.assert_close(logits(again.experts["a"]), expected, rtol=1e-4, atol=1e-4)


def test_a_live_model_of_such_a_class_is_remembered_too(models: Path, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(models / "custom", trust_remote_code=True)
    model = FusionRouteForCausalLM.from_experts(models / "router", {"live": live})
    expected = model(IDS).logits
    for folder, copied in ((tmp_path / "one", False), (tmp_path / "two", True)):
        model.save_pretrained(folder, save_experts=copied)
        with pytest.raises(ValueError, match="expert 'live': its model is Python code"):
            FusionRouteForCausalLM.from_pretrained(folder)
        again = FusionRouteForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(again(IDS).logits, expected)


def test_a_repository_s_code_is_compared_before_it_runs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models / "hub"))
    put_in_hub_cache(models / "hub", "owner/custom", models / "custom")
    with pytest.raises(ValueError, match="expert 'custom'.*trust_remote_code=True"):
        Experts.load({"custom": "owner/custom"})
    (expert,) = Experts.load({"custom": "owner/custom"}, trust_remote_code=True)
    assert expert.reference.path == "owner/custom"
    torch.testing.assert_close(logits(expert), doubled())
    (models / "ran").unlink()
    wrong = replace(expert.reference, code_hash="sha256:files:0")
    with pytest.raises(ValueError, match="is not what the router was trained with"):
        Experts.load([wrong], trust_remote_code=True)
    assert not ran(models)


def test_code_of_another_repository_is_refused(models: Path) -> None:
    file = models / "custom" / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {name: f"owner/other--{value}" for name, value in config["auto_map"].items()}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="takes code from another repository, 'owner/other'"):
        Experts.load([models / "custom"], trust_remote_code=True)


def test_a_router_with_code_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = AutoModelForCausalLM.from_pretrained(models / "custom", trust_remote_code=True)
    no_loading(monkeypatch)
    for router in (models / "custom", live):
        with pytest.raises(
            TypeError, match=r"^router.* a class of transformers|^router.*loaded with trust_remote_code"
        ):
            FusionRouteForCausalLM.from_experts(router, {"plain": models / "plain"}, trust_remote_code=True)


def test_experts_that_are_loaded_later_have_the_permission_of_the_checkpoint(models: Path, tmp_path: Path) -> None:
    built(models, trust_remote_code=True).save_pretrained(tmp_path / "fused")
    for trust in (False, True):
        model = FusionRouteForCausalLM.from_pretrained(tmp_path / "fused", load_experts=False, trust_remote_code=trust)
        source = expert_sources(model, torch.device("cpu"))[1]
        assert "code=sha256:files:" in source.identity
        if trust:
            torch.testing.assert_close(logits(source.load()), doubled())
        else:
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                source.load()


def test_the_training_command_has_the_permission_as_a_flag(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from ebpo_core.fusionroute.cli.arguments import parse
    from ebpo_core.fusionroute.cli.train import load_model

    experts = [f"plain={models / 'plain'}", f"custom={models / 'custom'}"]
    argv = ["--model_name_or_path", str(models / "router"), "--experts", *experts, "--data", "rows.jsonl"]
    argv += ["--output_dir", str(tmp_path / "out"), "--dtype", "float32", "--use_cpu", "true"]
    with pytest.raises(ValueError, match="expert 'custom': its model is Python code .*--trust_remote_code"):
        load_model(*parse(argv))
    assert not ran(models)
    model, _ = load_model(*parse([*argv, "--trust_remote_code", "true"]))
    torch.testing.assert_close(logits(model.experts["custom"]), doubled())


def test_the_reference_s_field_is_json() -> None:
    reference = ExpertReference(path="owner/name", code_hash="sha256:files:0")
    assert ExpertReference.from_dict(json.loads(json.dumps(reference.to_dict()))) == reference
