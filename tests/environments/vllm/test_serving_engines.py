"""Composites of several kinds in vLLM's engine answer what our ``generate`` answers: eager, compiled, quantised, split.

Engines that compile nothing share one process, since starting it takes longer than they do. All but the one on two
ranks run in it, without vLLM's own processes: the server's tests have those.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import MIXED, VOCAB, load, prompts, quantise, reference, said_by, save_checkpoint
from fusionroute_tiny import save_tiny
from transformers import MixtralConfig, MixtralForCausalLM

from ebpo_core.fusionroute import RoutedToken

pytestmark = pytest.mark.timeout(600)  # engines start slowly on a busy machine

NEW = 24
LENGTHS = (5, 40, 150)


ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SECOND = {**ALONE, "VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}


def two_ranks() -> dict[str, str]:
    """One memory node: vLLM is told which cores each rank has."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def question(model: Path, experts: int, *, watch: bool = False, **engine: Any) -> dict[str, Any]:
    """What an engine is asked: all prompts at once."""
    return {
        "model": str(model),
        "prompts": prompts(LENGTHS),
        "new": NEW,
        "num_experts": experts,
        "vocab_size": VOCAB,
        "watch": watch,
        "engine": {"enforce_eager": True, **engine},
    }


def run(*questions: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """What engines answer, one after the other in a process of its own."""
    found: list[dict[str, Any]] = said_by("engine_worker.py", questions, environment=environment or ALONE)
    return found


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
    (found,) = run(question(checkpoint, 2, enforce_eager=False))
    assert found["second_runner"] is False
    assert check(found, load(checkpoint), least=60) == {0, 1}


class Eager(NamedTuple):
    """A checkpoint, what is asked of it, and how its answers are compared."""

    checkpoint: Path
    experts: int
    least: int
    engine: Mapping[str, Any] = MappingProxyType({})
    asked: Mapping[str, Any] = MappingProxyType({})
    live: Mapping[str, Any] = MappingProxyType({})
    rounding: float = 5e-5


def _gemmas_and_a_llama_routing_only(folder: Path) -> Eager:
    experts = {"two": ("gemma2", {"window": 16}), "three": ("gemma3", {"window": 16}), "llama": ("llama", {})}
    return Eager(save_checkpoint(folder, "gemma2", experts, complementary=False), 3, least=40)


def _a_shorter_expert_and_windows(folder: Path) -> Eager:
    # Here the router slides and an expert does not: an engine's one window must reach neither too far nor too short.
    experts = {"full": ("llama", {"max_position_embeddings": 256}), "slides": ("mistral", {"window": 48})}
    return Eager(save_checkpoint(folder, "mistral", experts), 2, least=60, engine={"max_model_len": None})


def _a_quantised_expert_beside_a_plain_one(folder: Path) -> Eager:
    # No width is a multiple of 32: on a CPU with AMX vLLM would take a kernel for those that knows no float32.
    narrow = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
    eight = save_tiny(folder / "eight", "llama", 1, **narrow, head_dim=80)
    attention = [f"model.layers.0.self_attn.{one}_proj" for one in "qkv"]
    checkpoint = save_checkpoint(folder, "llama", {"plain": ("qwen2", {}), "eight": (eight, {})})
    live = quantise(eight, [*attention, r"re:model[.]layers[.]1[.]mlp[.]down_proj"])
    config = json.loads((checkpoint / "config.json").read_text())
    del config["experts"][1]["hash"]  # it was quantised after the checkpoint was saved
    (checkpoint / "config.json").write_text(json.dumps(config))
    # An activation that falls to the other side of an int8 step moves logits by far more than float32 rounds.
    return Eager(checkpoint, 2, least=20, live={"eight": live}, rounding=1e-3)


def _a_mixture_of_experts_as_an_expert(folder: Path) -> Eager:
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
    mixture.save_pretrained(folder / "mixture")
    experts = {"dense": ("llama", {}), "mixture": (folder / "mixture", {})}
    return Eager(save_checkpoint(folder, "llama", experts), 2, least=60)


def _a_tokenizer_with_more_tokens_than_take_part(folder: Path) -> Eager:
    """Prompts hold tokens that no answer can, behind the routing's columns, too: every model has embeddings of them."""
    few = VOCAB - 69
    checkpoint = save_checkpoint(folder, "llama", {"one": ("llama", {}), "two": ("qwen2", {})}, vocab_size=few)
    # A penalty looks a prompt's tokens up among the logits. This one is too small to change an answer.
    return Eager(checkpoint, 2, least=60, asked={"vocab_size": few, "sampling": {"presence_penalty": 1e-6}})


EAGER: tuple[Callable[[Path], Eager], ...] = (
    _gemmas_and_a_llama_routing_only,
    _a_shorter_expert_and_windows,
    _a_quantised_expert_beside_a_plain_one,
    _a_mixture_of_experts_as_an_expert,
    _a_tokenizer_with_more_tokens_than_take_part,
)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Eager, dict[str, Any]]]:
    """Each of these checkpoints, and its engine's answers."""
    made = [make(tmp_path_factory.mktemp("eager")) for make in EAGER]
    found = run(*(question(one.checkpoint, one.experts, **one.engine) | one.asked for one in made))
    return {make.__name__: both for make, both in zip(EAGER, zip(made, found, strict=True), strict=True)}


@pytest.mark.parametrize("name", [make.__name__ for make in EAGER])
def test_composites_of_every_kind(eager: dict[str, tuple[Eager, dict[str, Any]]], name: str) -> None:
    one, found = eager[name]
    wrote = check(found, load(one.checkpoint, **one.live), least=one.least, rounding=one.rounding)
    assert len(wrote) > 1
    if one.experts == 2:
        assert wrote == {0, 1}


def test_a_shorter_expert_shortens_the_context(eager: dict[str, tuple[Eager, dict[str, Any]]]) -> None:
    assert eager["_a_shorter_expert_and_windows"][1]["max_model_len"] == 256


def test_the_second_runner_of_models(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, "llama", MIXED)
    (found,) = run(question(checkpoint, 3), **SECOND)
    assert found["second_runner"] is True
    assert check(found, load(checkpoint), least=60) == {0, 1, 2}


def test_two_ranks_of_tensor_parallelism(tmp_path: Path) -> None:
    experts = MIXED | {
        "window": ("mistral", {"window": 16, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32})
    }
    checkpoint = save_checkpoint(tmp_path, "llama", experts)
    (found,) = run(question(checkpoint, 3, tensor_parallel_size=2), **two_ranks())
    assert check(found, load(checkpoint), least=60) == {0, 1, 2}


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
        found: list[list[list[str]]] = said_by("keys_worker.py", pairs, {"model": str(checkpoint)})
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
