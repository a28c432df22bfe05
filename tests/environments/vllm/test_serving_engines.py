"""Composites of several kinds in vLLM's engine answer what our ``generate`` answers: eager, compiled, quantised, split.

Each engine has a process of its own. All but the one on two ranks run in it, without vLLM's own processes: the server's
tests have those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MIXED, VOCAB, WIDE, load, prompts, quantise, reference, save_checkpoint
from fusionroute_tiny import save_tiny
from transformers import MixtralConfig, MixtralForCausalLM

from ebpo_core.fusionroute import RoutedToken

pytestmark = pytest.mark.timeout(600)  # engines start slowly on a busy machine

NEW = 24
LENGTHS = (5, 40, 150)
WORKER = Path(__file__).parent / "engine_worker.py"


def run(model: Path, experts: int, environment: dict[str, str] | None = None, **engine: Any) -> dict[str, Any]:
    """What an engine in a process of its own answers to the prompts."""
    asked = {
        "model": str(model),
        "prompts": prompts(LENGTHS),
        "new": NEW,
        "num_experts": experts,
        "vocab_size": VOCAB,
        "engine": {"enforce_eager": True, **engine},
    }
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if environment is None else environment
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **alone}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(asked)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    answer: dict[str, Any] = json.loads(line)
    return answer


def check(found: dict[str, Any], model: Any, *, least: int, rounding: float = 5e-5) -> set[int]:
    """Compare with ``generate``, where rounding leaves ``least`` tokens at least; returns the experts that wrote."""
    sure, wrote = 0, set()
    for prompt, answer in zip(prompts(LENGTHS), found["answers"], strict=True):
        expected = reference(model, prompt, NEW, rounding=rounding)
        routing = [
            RoutedToken(token, expert, weight, token != own)
            for token, (expert, weight, own) in zip(answer["tokens"], answer["routing"], strict=True)
        ]
        expected.check(answer["tokens"], routing)
        sure += expected.sure
        wrote |= {token.expert for token in expected.routing}
    assert sure >= least
    return wrote


def test_llamas_of_one_shape_compiled(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, "llama", {"one": ("llama", {}), "two": ("llama", {})}, alpha=0.5)
    assert check(run(checkpoint, 2, enforce_eager=False), load(checkpoint), least=60) == {0, 1}


def test_gemmas_and_a_llama_routing_only(tmp_path: Path) -> None:
    experts = {"two": ("gemma2", {"window": 16}), "three": ("gemma3", {"window": 16}), "llama": ("llama", {})}
    checkpoint = save_checkpoint(tmp_path, "gemma2", experts, complementary=False)
    assert len(check(run(checkpoint, 3), load(checkpoint), least=40)) > 1


def test_a_shorter_expert_shortens_the_context_and_windows_stay_each_models_own(tmp_path: Path) -> None:
    # Here the router slides and an expert does not: an engine's one window must reach neither too far nor too short.
    experts = {"full": ("llama", {"max_position_embeddings": 256}), "slides": ("mistral", {"window": 48})}
    checkpoint = save_checkpoint(tmp_path, "mistral", experts)
    found = run(checkpoint, 2, max_model_len=None)
    assert found["max_model_len"] == 256
    assert check(found, load(checkpoint), least=60) == {0, 1}


def test_a_quantised_expert_beside_a_plain_one(tmp_path: Path) -> None:
    eight = save_tiny(tmp_path / "eight", "llama", 1, **WIDE)
    attention = [f"model.layers.0.self_attn.{one}_proj" for one in "qkv"]
    checkpoint = save_checkpoint(tmp_path, "llama", {"plain": ("qwen2", {}), "eight": (eight, {})})
    live = quantise(eight, [*attention, r"re:model[.]layers[.]1[.]mlp[.]down_proj"])
    config = json.loads((checkpoint / "config.json").read_text())
    del config["experts"][1]["hash"]  # it was quantised after the checkpoint was saved
    (checkpoint / "config.json").write_text(json.dumps(config))
    # An activation that falls to the other side of an int8 step moves logits by far more than float32 rounds.
    assert check(run(checkpoint, 2), load(checkpoint, eight=live), least=20, rounding=1e-3) == {0, 1}


def test_a_mixture_of_experts_as_an_expert(tmp_path: Path) -> None:
    torch.manual_seed(3)
    mixture = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=512,
            initializer_range=0.3,
            sliding_window=None,
        )
    )
    mixture.save_pretrained(tmp_path / "mixture")
    checkpoint = save_checkpoint(tmp_path, "llama", {"dense": ("llama", {}), "mixture": (tmp_path / "mixture", {})})
    assert check(run(checkpoint, 2), load(checkpoint), least=60) == {0, 1}


def test_two_ranks_of_tensor_parallelism(tmp_path: Path) -> None:
    experts = MIXED | {
        "window": ("mistral", {"window": 16, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32})
    }
    checkpoint = save_checkpoint(tmp_path, "llama", experts)
    # One memory node: vLLM is told which cores each rank has.
    cores = sorted(os.sched_getaffinity(0))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    assert check(run(checkpoint, 3, environment, tensor_parallel_size=2), load(checkpoint), least=60) == {0, 1, 2}


@pytest.fixture(autouse=True)
def _one_engine_at_a_time() -> None:
    """Engines read their settings from the environment: none may leak from one test into the next."""
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "EBPO_FUSIONROUTE_COUNTERS"):
        assert name not in os.environ


def test_compiled_code_is_found_again_by_slot_and_configuration(tmp_path: Path) -> None:
    """The CPU build never loads what it compiled before, so the keys are what can be tested here."""
    checkpoint = save_checkpoint(tmp_path, "llama", {"one": ("llama", {}), "two": ("qwen2", {})})
    one, two = str(tmp_path / "one"), str(tmp_path / "two")

    def keys(*pairs: list[Any]) -> list[list[list[str]]]:
        """Of each pair of experts and each slot: vLLM's hash, and the tag."""
        worker = WORKER.with_name("keys_worker.py")
        command = [sys.executable, str(worker), json.dumps(pairs), json.dumps({"model": str(checkpoint)})]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: list[list[list[str]]] = json.loads(done.stdout.splitlines()[-1])
        return found

    before, again, swapped, twice, few, many = keys(
        [one, two], [one, two], [two, one], [one, one], [one, [two, [3, 8]]], [one, [two, [7, 8]]]
    )
    assert before == again
    assert few[0] == many[0] == before[0]
    for part in (0, 1):  # adapters of so many experts and of such a rank
        assert len({before[1][part], few[1][part], many[1][part]}) == 3
    assert twice == [before[0], swapped[1]]
    for part in (0, 1):
        assert len({key[part] for key in (*before, *swapped)}) == 4
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (changed,) = keys([one, two])
    assert changed[1] == before[1]
    for part in (0, 1):
        assert changed[0][part] not in {key[part] for key in (*before, *swapped)}
