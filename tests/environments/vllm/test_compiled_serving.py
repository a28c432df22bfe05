"""A compiled checkpoint behind vLLM's real server: batches, prefix cache, metrics, refusals, also at the start."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from checkpoints import VOCAB, load, prompts, reference
from safetensors.torch import load_file, save_file
from server import CHUNKED, NAME, Server, serving
from test_compiled_engines import EXPERTS, saved
from test_serving_api import metric, per_expert
from test_serving_startup import check_starts

from ebpo_core.fusionroute import FusionRouteForCausalLM
from ebpo_core.fusionroute.vllm.answers import routed_tokens, routing_request

pytestmark = pytest.mark.timeout(900)  # engines start slowly on a busy machine

NEW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("compiled"), "llama")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> FusionRouteForCausalLM:
    return load(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, *CHUNKED) as one:
        yield one


async def ask(server: Server, requests: list[list[int]]) -> list[Any]:
    """Greedy completions of prompts that are sent at once, with their routing."""
    body = {"ignore_eos": True, "add_special_tokens": False, **routing_request(VOCAB, EXPERTS, chat=False)}
    logprobs = body.pop("logprobs")
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600) as client:

        async def one(prompt: list[int]) -> Any:
            return await client.completions.create(
                model=NAME, prompt=prompt, max_tokens=NEW, temperature=0, logprobs=logprobs, extra_body=body
            )

        return list(await asyncio.gather(*map(one, requests)))


def test_a_batch_that_changes_answers_as_generate_and_is_counted(server: Server, model: Any) -> None:
    requests = prompts([1, 5, 40, 150, 300, 7, 90, 20, 64, 65, 3, 128])
    before = per_expert(server, "fusionroute_tokens_total")
    sure, wrote = 0, dict.fromkeys(model.experts.names, 0)
    for prompt, answer in zip(requests, asyncio.run(ask(server, requests)), strict=True):
        routing = routed_tokens(answer.choices[0].logprobs, VOCAB, EXPERTS)
        expected = reference(model, prompt, NEW)
        expected.check([token.id for token in routing], routing)
        sure += expected.sure
        for token in routing:
            wrote[model.experts.names[token.expert]] += 1
    assert sure > len(requests) * NEW * 0.7  # the comparison is of most tokens
    now = per_expert(server, "fusionroute_tokens_total")
    assert {name: now[name] - before[name] for name in now} == wrote
    assert min(wrote.values()) > 0


def test_a_prompt_from_the_prefix_cache_gives_the_same(server: Server, model: Any) -> None:
    """Only the router has keys and values there, and those of a prompt were written without the adapted stack."""
    (prompt,) = prompts([200], seed=5)
    hits = "vllm:prefix_cache_hits_total"
    (first,) = asyncio.run(ask(server, [prompt]))
    before = metric(server, hits)
    (again,) = asyncio.run(ask(server, [prompt]))
    assert metric(server, hits) - before >= 128
    expected = reference(model, prompt, NEW)
    for answer in (first, again):
        routing = routed_tokens(answer.choices[0].logprobs, VOCAB, EXPERTS)
        expected.check([token.id for token in routing], routing)


def test_log_probabilities_of_a_prompt_are_refused_and_the_engine_lives(server: Server) -> None:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
        for settings in ({"echo": True, "logprobs": 1}, {"extra_body": {"prompt_logprobs": 1}}):
            with pytest.raises(openai.BadRequestError, match=r"prompt.logprobs"):
                client.completions.create(model=NAME, prompt=[7, 8, 9], max_tokens=2, **settings)
        assert server.healthy()
        client.completions.create(model=NAME, prompt=[7, 8, 9], max_tokens=2)


def changed(checkpoint: Path, folder: Path, change: Callable[[Path], None]) -> str:
    """A copy of the checkpoint in which something was changed."""
    shutil.copytree(checkpoint, folder)
    change(folder)
    return str(folder)


def _other_router(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def _other_rank(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["compiled"]["rank"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def _of_a_family_with_other_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["router_config"] |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_served_stops_the_start(checkpoint: Path, tmp_path: Path) -> None:
    (adapter, *_) = sorted((checkpoint / "compiled").iterdir())
    gone = Path("compiled", adapter.name, "adapter_model.safetensors")
    router = changed(checkpoint, tmp_path / "router", _other_router)
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"model": str(checkpoint)}, None),
        ({"model": router}, "is not the one its experts were compiled for"),
        ({"model": router, "hf_overrides": {"verify_experts": False}}, None),
        ({"model": changed(checkpoint, tmp_path / "rank", _other_rank)}, "the checkpoint's rank is 5"),
        ({"model": changed(checkpoint, tmp_path / "gone", lambda folder: (folder / gone).unlink())}, adapter.name),
        (
            {"model": changed(checkpoint, tmp_path / "family", _of_a_family_with_other_layers)},
            "the router is a GraniteForCausalLM: vLLM serves compiled checkpoints of LlamaForCausalLM, Mistral",
        ),
        ({"model": str(checkpoint), "enable_lora": True}, "LoRA"),
    ]
    check_starts(cases)
