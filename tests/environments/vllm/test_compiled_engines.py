"""Compiled checkpoints in vLLM's engine answer what our ``generate`` answers: every family, eager, compiled, split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB, WIDE, load, tied
from fusionroute_compiled import save_compiled
from fusionroute_tiny import tiny_tokenizer
from test_serving_engines import LENGTHS, NEW, SECOND, check, question, run, two_ranks

from ebpo_core.fusionroute.vllm.lowrank import LowRankTerms, Selection, Shard

pytestmark = pytest.mark.timeout(900)  # engines start slowly on a busy machine

LAYERS, EXPERTS = 2, 3
SMALL = {
    "block_size": 32,
    "num_gpu_blocks_override": 8,
    "max_model_len": 192,
    "max_num_batched_tokens": 16,
}
"""An engine that reads prompts in half blocks, and has no room for all requests at once."""
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"window": 16},
    "gemma2": {"window": 16},
    "gemma3": {"window": 16},
}


def saved(folder: Path, family: str, experts: int = EXPERTS, seed: int = 0) -> Path:
    """A compiled checkpoint of layers that vLLM's attention on a CPU takes."""
    settings = FAMILIES[family] | WIDE | tied(family)
    checkpoint = save_compiled(folder / family, family, experts=experts, seed=seed, **settings)
    tiny_tokenizer(VOCAB).save_pretrained(checkpoint)
    return checkpoint


def test_every_family_answers_as_generate_with_one_cache_and_one_copy_of_the_weights(tmp_path: Path) -> None:
    checkpoints = {family: saved(tmp_path, family) for family in FAMILIES}
    asked = [question(checkpoint, EXPERTS, watch=True) for checkpoint in checkpoints.values()]
    *answers, small = run(*asked, question(checkpoints["llama"], EXPERTS, **SMALL))
    check(small, load(checkpoints["llama"]), least=40)
    wrote = set()
    for (family, checkpoint), found in zip(checkpoints.items(), answers, strict=True):
        print(family)  # shown where the next line fails
        wrote |= check(found, load(checkpoint), least=40)
        assert found["caches"] == [f"router.model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
        assert found["own_parameters"] == ["lora_A", "lora_B"]
        # Prompts are read in chunks; of each chunk the adapted stack runs the last row only.
        assert sum(found["rows"]["router"]) == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
        assert max(found["rows"]["adapted"]) <= len(LENGTHS)
        assert max(found["rows"]["router"]) > max(found["rows"]["adapted"])
    assert wrote == set(range(EXPERTS))


def test_an_overflow_in_one_experts_terms_stays_in_its_rows() -> None:
    """In float16 an activation that is ordinary to one expert may be too large for the adapter of another."""
    selection = Selection(3, num_experts=2, rank=1)
    terms = LowRankTerms(selection, Shard(0, 2), [Shard(0, 2)]).half()
    down = torch.tensor([[[1.0, 1.0]], [[6e4, 6e4]]])  # of the second expert, 6e4 + 6e4 overflows
    terms.load(0, down, torch.ones(2, 1, 2))
    selection.choose(torch.tensor([0, 1, 0]))
    out = torch.zeros(3, 2, dtype=torch.float16)
    terms.add_to(out, torch.ones(3, 2, dtype=torch.float16))
    assert out.tolist() == [[2, 2], [torch.inf, torch.inf], [2, 2]]


def test_seven_experts_compiled_by_torch(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "llama", experts=7, seed=3)
    (found,) = run(question(checkpoint, 7, enforce_eager=False))
    assert len(check(found, load(checkpoint), least=40)) > 2


def test_the_second_runner_of_models(tmp_path: Path) -> None:
    checkpoints = {"llama": saved(tmp_path, "llama"), "gemma3": saved(tmp_path, "gemma3")}
    answers = run(
        question(checkpoints["llama"], EXPERTS, **SMALL), question(checkpoints["gemma3"], EXPERTS, watch=True), **SECOND
    )
    for (family, checkpoint), found in zip(checkpoints.items(), answers, strict=True):
        assert found["second_runner"] is True, family
        assert len(check(found, load(checkpoint), least=40)) > 1
    assert answers[1]["caches"] == [f"router.model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
    assert max(answers[1]["rows"]["adapted"]) <= len(LENGTHS) < max(answers[1]["rows"]["router"])


def test_two_ranks_of_tensor_parallelism(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "qwen2")
    (found,) = run(question(checkpoint, EXPERTS, tensor_parallel_size=2), **two_ranks())
    assert len(check(found, load(checkpoint), least=40)) > 1
