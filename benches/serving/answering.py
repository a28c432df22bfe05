"""The ways to answer concurrent clients that ``benches/serve.py`` measures, and whether their tokens agree."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from ebpo_core.fusionroute import FusionRouteForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "environments" / "vllm"))
from server import NAME, Server, command, free_port, serving_command

ROUNDING = 5e-5  # float32's, relative to the largest logit, as in the tests


class Answer(NamedTuple):
    """One request: new tokens, seconds until the last of them and until the first."""

    tokens: list[int]
    latency: float
    first: float


class Run(NamedTuple):
    """All requests of one case, and the seconds that they took together, and of CPU time where it was counted."""

    answers: list[Answer]
    seconds: float
    cpu: float | None = None


class Case(NamedTuple):
    """Prompts of all requests, so many clients, new tokens of each request."""

    prompts: list[list[int]]
    clients: int
    new: int


async def _ask(url: str, case: Case, models: Sequence[str]) -> Run:
    import openai

    answers: dict[int, Answer] = {}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:

        async def one(index: int) -> None:
            begin = time.perf_counter()
            first, tokens = 0.0, []
            stream = await client.completions.create(
                model=models[index % len(models)],
                prompt=case.prompts[index],
                max_tokens=case.new,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    new = (choice.model_extra or {}).get("token_ids") or []
                    if new and not tokens:
                        first = time.perf_counter() - begin
                    tokens += new
            answers[index] = Answer(tokens, time.perf_counter() - begin, first)

        async def send(start: int) -> None:
            for index in range(start, len(case.prompts), case.clients):
                await one(index)

        begin = time.perf_counter()
        await asyncio.gather(*map(send, range(case.clients)))
        seconds = time.perf_counter() - begin
    return Run([answers[index] for index in range(len(case.prompts))], seconds)


def ask(server: Server, case: Case, models: Sequence[str] = (NAME,)) -> Run:
    """Concurrent clients of the server; requests go to its ``models`` in turn."""
    return asyncio.run(_ask(server.url, case, models))


def generate(model: FusionRouteForCausalLM, prompts: list[list[int]], new: int, **options: Any) -> Any:
    """Greedy, exactly ``new`` tokens for each prompt."""
    ids = torch.tensor(prompts, device=model.device)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, **options
    )


def batches(model: FusionRouteForCausalLM, case: Case) -> Run:
    """As many rows at once as there are clients, batch after batch; one row at a time for ``clients=1``."""
    answers: list[Answer] = []
    begin = time.perf_counter()
    for start in range(0, len(case.prompts), case.clients):
        prompts = case.prompts[start : start + case.clients]
        before = time.perf_counter()
        tokens = generate(model, prompts, case.new)[:, len(prompts[0]) :].tolist()
        latency = time.perf_counter() - before
        answers += [Answer(row, latency, latency) for row in tokens]
    return Run(answers, time.perf_counter() - begin)


def queued(run: Run, clients: int, requests: int) -> list[Answer]:
    """Requests answered one by one while ``clients`` of them wait: each was sent when its client's last one ended."""
    ends = list(itertools.accumulate(one.latency for one in itertools.islice(itertools.cycle(run.answers), requests)))
    waits = [end - (ends[index - clients] if index >= clients else 0) for index, end in enumerate(ends)]
    return [Answer([], wait, wait) for wait in waits]


def start(
    checkpoint: str, dtype: str, args: argparse.Namespace, more: Sequence[str] = ()
) -> AbstractContextManager[Server]:
    """vLLM's server of the checkpoint, with ``more`` flags."""
    port = free_port()
    flags = ["--dtype", dtype, "--max-model-len", str(args.prompt + args.new), "--no-enable-prefix-caching"]
    flags += ["--max-num-seqs", str(max(args.concurrency))] + ["--enforce-eager"] * args.enforce_eager + [*more]
    cache = [f"VLLM_CPU_KVCACHE_SPACE={args.kv_cache}"] if args.device == "cpu" else []
    return serving_command(["env", *cache, *command(Path(checkpoint), port, *flags)], f"http://127.0.0.1:{port}")


def resident(pid: int | None = None) -> int:
    """Bytes of a process and of those it started; pages that several share count for each."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)] if pid is not None else [process]
    return sum(one.memory_info().rss for one in family)


def agreed(model: FusionRouteForCausalLM, prompt: list[int], ours: list[int], theirs: list[int], dtype: str) -> int:
    """How many tokens are the same up to the first difference; raises where float32 decides it."""
    assert len(ours) == len(theirs), f"{len(theirs)} tokens instead of {len(ours)}"
    step = next((step for step, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
    if step < len(ours) and dtype == "float32":
        ids = torch.tensor([prompt + ours[:step]], device=model.device)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        scale = float(out.logits.abs().max())
        gaps = [float(-values[0, -1].topk(2).values.diff()) for values in (out.logits / scale, out.routing_weights)]
        if min(gaps) > 10 * ROUNDING:
            raise AssertionError(f"token {step}: {theirs[step]} instead of {ours[step]}, margins {gaps}")
    return step
