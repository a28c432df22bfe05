"""Engines without a server, in this process, one after the other: for a machine that is too busy to time anything on.

There, seconds say how busy it was. The CPU time that a run took does not, but for caches and memory that others use at
the same time. On two cores a vLLM engine has one thread that computes.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from typing import Any, NamedTuple

import torch

from .answering import Answer, Case, Run


class Engine(NamedTuple):
    """What an engine is made of: a checkpoint, and adapters that requests name in turn, or none."""

    checkpoint: str
    adapters: dict[str, str]


def ask_engine(engine: Engine, dtype: str, cases: list[Case], args: argparse.Namespace) -> dict[int, list[Run]]:
    """The runs of each case by its clients. Memory is not told: what one engine frees, the next one takes."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.kv_cache)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    torch.set_num_threads(1)  # threads that wait for each other would be counted
    lora: dict[str, Any] = {}
    if engine.adapters:
        lora = {"enable_lora": True, "max_loras": len(engine.adapters), "max_lora_rank": args.rank}
    llm = LLM(
        model=engine.checkpoint,
        dtype=dtype,
        max_model_len=args.prompt + args.new,
        max_num_seqs=max(args.concurrency),
        enable_prefix_caching=False,
        enforce_eager=args.enforce_eager,
        **lora,
    )
    named = [LoRARequest(name, number, path) for number, (name, path) in enumerate(engine.adapters.items(), start=1)]

    runs = {}
    for case in cases:
        _run(llm, named, case._replace(prompts=case.prompts[: case.clients], new=min(4, case.new)))
        runs[case.clients] = [_run(llm, named, case) for _ in range(args.rounds)]
    del llm
    gc.collect()
    return runs


def _run(llm: Any, named: list[Any], case: Case) -> Run:
    """As many prompts at once as there are clients; requests name the adapters in turn."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=case.new, ignore_eos=True)
    answers: list[Answer] = []
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(case.prompts), case.clients):
        prompts = [{"prompt_token_ids": one} for one in case.prompts[first : first + case.clients]]
        asked = [named[index % len(named)] for index in range(len(prompts))] if named else None
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=asked, use_tqdm=False)
        latency = time.perf_counter() - begin
        answers += [Answer(list(output.outputs[0].token_ids), latency, latency) for output in outputs]
    return Run(answers, time.perf_counter() - start, time.process_time() - cpu)
