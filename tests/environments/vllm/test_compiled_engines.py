"""Compiled checkpoints in vLLM's engine answer what our ``generate`` answers: every family, eager, compiled, split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import VOCAB, WIDE, load, prompts, tied
from fusionroute_compiled import save_compiled
from fusionroute_tiny import tiny_tokenizer
from test_serving_engines import LENGTHS, NEW, check, run

pytestmark = pytest.mark.timeout(900)  # engines start slowly on a busy machine

WORKER = Path(__file__).parent / "compiled_worker.py"
LAYERS, EXPERTS = 2, 3
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
    asked = [
        {
            "model": str(checkpoint),
            "prompts": prompts(LENGTHS),
            "new": NEW,
            "num_experts": EXPERTS,
            "vocab_size": VOCAB,
            "engine": {"enforce_eager": True},
        }
        for checkpoint in checkpoints.values()
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(asked)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"engines"')]
    wrote = set()
    for (family, checkpoint), found in zip(checkpoints.items(), json.loads(line)["engines"], strict=True):
        print(family)  # shown where the next line fails
        wrote |= check(found, load(checkpoint), least=40)
        assert found["caches"] == [f"router.model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
        assert found["own_parameters"] == ["lora_A", "lora_B"]
        # Prompts are read in chunks; of each chunk the adapted stack runs the last row only.
        assert sum(found["rows"]["router"]) == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
        assert max(found["rows"]["adapted"]) <= len(LENGTHS)
        assert max(found["rows"]["router"]) > max(found["rows"]["adapted"])
    assert wrote == set(range(EXPERTS))


def test_seven_experts_compiled_by_torch(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "llama", experts=7, seed=3)
    assert len(check(run(checkpoint, 7, enforce_eager=False), load(checkpoint), least=40)) > 2


def test_two_ranks_of_tensor_parallelism(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, "qwen2")
    cores = sorted(os.sched_getaffinity(0))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    found = run(checkpoint, EXPERTS, environment, tensor_parallel_size=2)
    assert len(check(found, load(checkpoint), least=40)) > 1
