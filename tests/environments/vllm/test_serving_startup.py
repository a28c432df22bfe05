"""Checkpoints and settings that cannot be served stop vLLM at its start, with this package's message and a remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import VOCAB, WIDE, said_by, save_checkpoint
from fusionroute_tiny import put_in_hub_cache, save_tiny, save_tiny_adapter, save_tiny_gguf, tiny_model
from safetensors.torch import load_file, save_file
from server import command, environment, free_port

from ebpo_core.fusionroute import FusionRouteForCausalLM

pytestmark = pytest.mark.timeout(600)  # engines start slowly on a busy machine

HUB = "someone/expert"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("good"), "llama", {"one": ("llama", {}), "two": ("qwen2", {})})


def check_starts(cases: Sequence[tuple[dict[str, Any], str | None]], **environment: str) -> None:
    """Assert that vLLM, configured for each case in one process, says what is expected: None is for nothing."""
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **environment}
    said = said_by("startup_worker.py", [case for case, _ in cases], environment=variables)
    for (case, expected), found in zip(cases, said, strict=True):
        assert (found is None) == (expected is None), (case, found)
        assert expected is None or expected in found, (case, found)


def changed(good: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the checkpoint whose config was changed."""
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def expert(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the first expert; its weights are no longer those of the hash."""

    def change(config: dict[str, Any]) -> None:
        config["experts"][0] = {"name": "one", **fields}

    return change


def _of_lacking_experts(folder: Path) -> str:
    """A checkpoint as ``from_experts`` makes it of an expert without the router's last two tokens."""
    save_tiny(folder / "router", "llama", 0, vocab_size=VOCAB + 2, **WIDE)
    save_tiny(folder / "one", "llama", 1, vocab_size=VOCAB, **WIDE)
    substitutes = {f"w{VOCAB}": "<eos>", f"w{VOCAB + 1}": "<bos>"}
    model = FusionRouteForCausalLM.from_experts(folder / "router", [folder / "one"], substitutes=substitutes)
    model.save_pretrained(folder / "fused")
    return str(folder / "fused")


def test_what_is_refused_at_the_start(good: Path, tmp_path: Path) -> None:
    source = good.parent
    narrow = save_tiny(tmp_path / "narrow", "llama", 1, vocab_size=VOCAB - 40, **WIDE)
    short = save_tiny(tmp_path / "short", "llama", 1, max_position_embeddings=128, **WIDE)
    pickled = tmp_path / "pickled"
    shutil.copytree(source / "one", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    other = tmp_path / "other"
    shutil.copytree(source / "one", other)
    save_file(
        {name: tensor * 1.5 for name, tensor in load_file(other / "model.safetensors").items()},
        other / "model.safetensors",
    )
    save_tiny_gguf(tmp_path / "model.gguf")
    save_tiny_adapter(tmp_path / "adapter", tiny_model("llama", 1, **WIDE))
    put_in_hub_cache(tmp_path / "hub", HUB, source / "one")
    one = str(source / "one")

    def nothing(config: dict[str, Any]) -> None:
        config["experts"] = []

    def sampled(config: dict[str, Any]) -> None:
        config["route"] = "sample"

    def sticky(config: dict[str, Any]) -> None:
        config["hysteresis"] = 0.5

    def lacking(config: dict[str, Any]) -> None:  # an id that its matrices have, its tokenizer not
        config["experts"][1]["substitutes"] = {str(VOCAB - 1): 7}

    moved = {"expert_paths": {"one": str(other)}}
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"model": str(good)}, None),
        ({"model": str(good), "hf_overrides": {**moved, "verify_experts": False}}, None),
        (
            {"model": str(good), "hf_overrides": moved},
            "weights of expert 'one' are not those the router was trained with",
        ),
        ({"model": str(good), "hf_overrides": {"expert_paths": {"three": one}}}, "experts are ['one', 'two']"),
        ({"model": changed(good, tmp_path / "a", expert(path="/nowhere/at/all"))}, "expert 'one': there is no path"),
        ({"model": changed(good, tmp_path / "b", expert(path=str(narrow)))}, f"expert 'one' has {VOCAB - 40} logits"),
        ({"model": changed(good, tmp_path / "c", expert(path=str(pickled)))}, "weights as pickles"),
        ({"model": changed(good, tmp_path / "d", expert(path=str(tmp_path / "model.gguf")))}, "fusionroute convert"),
        (
            {"model": changed(good, tmp_path / "e", expert(path=one, adapter=str(tmp_path / "adapter")))},
            "fusionroute convert",
        ),
        ({"model": changed(good, tmp_path / "f", expert(path=HUB))}, None),
        (
            {"model": changed(good, tmp_path / "g", expert(path=HUB, revision="v9"))},
            "'someone/expert' at revision 'v9'",
        ),
        ({"model": changed(good, tmp_path / "h", expert(path="someone/absent"))}, "Check its path and revision"),
        ({"model": changed(good, tmp_path / "i", nothing)}, "names no experts"),
        ({"model": changed(good, tmp_path / "j", sampled)}, '--hf-overrides \'{"route": "argmax"}\''),
        ({"model": changed(good, tmp_path / "k", sticky)}, "--hf-overrides '{\"hysteresis\": 0}'"),
        ({"model": str(tmp_path / "k"), "hf_overrides": {"hysteresis": 0}}, None),
        ({"model": changed(good, tmp_path / "l", expert(path=str(short)))}, None),
        ({"model": str(tmp_path / "l"), "max_model_len": 300}, "expert 'one' has 128 positions"),
        (
            {"model": changed(good, tmp_path / "m", lacking)},
            f"expert 'two' has substitutes for tokens that it lacks (ids {VOCAB - 1})",
        ),
        (
            {"model": str(tmp_path / "m"), "hf_overrides": {"expert_paths": {"two": {"substitutes": None}}}},
            None,
        ),
        (
            {"model": _of_lacking_experts(tmp_path / "lacking"), "max_model_len": 64},
            "use the checkpoint's own generate",
        ),
        ({"model": str(good), "pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"model": str(good), "enable_lora": True}, "LoRA"),
        ({"model": str(good), "enable_prompt_embeds": True}, "prompts given as embeddings"),
        ({"model": str(good), "enable_dbo": True}, "dual batch overlap"),
        (
            {"model": str(good), "speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
    ]
    check_starts(cases, HF_HUB_CACHE=str(tmp_path / "hub"))


def test_a_server_that_cannot_start_ends_with_the_message(good: Path, tmp_path: Path) -> None:
    gone = changed(good, tmp_path / "gone", expert(path="./experts/gone"))
    start = command(Path(gone), free_port(), "--dtype", "float32", "--enforce-eager")
    done = subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "expert 'one': there is no path" in done.stderr
    assert "expert_paths" in done.stderr


def test_another_model_is_served_as_if_the_plugin_were_not_there(good: Path) -> None:
    check_starts([({"model": str(good.parent / "one")}, None)])
