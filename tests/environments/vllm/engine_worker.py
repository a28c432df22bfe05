"""One vLLM engine in a process of its own: greedy answers to prompts of token ids, and their routing, as JSON.

python engine_worker.py '{"model": ..., "prompts": [[...]], "new": 24, "num_experts": 2, ...}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from ebpo_core.fusionroute.vllm.columns import decode, routing_ids


def answered(asked: dict[str, Any], prepare: Callable[[Any], None] | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """An engine, on which ``prepare`` was called, and its answers to what was asked."""
    from vllm import LLM, SamplingParams

    engine = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 400,
        **asked["engine"],
    }
    llm = LLM(model=asked["model"], **engine)
    if prepare is not None:
        prepare(llm)
    ids = routing_ids(asked["vocab_size"], asked["num_experts"])
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=len(ids), logprob_token_ids=ids
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False)
    answers = []
    for output in outputs:
        best = output.outputs[0]
        columns = [decode([row[one].logprob for one in ids]) for row in best.logprobs]
        answers.append({"tokens": list(best.token_ids), "routing": columns})
    return llm, answers


def main() -> None:
    llm, answers = answered(json.loads(sys.argv[1]))
    print(json.dumps({"answers": answers, "max_model_len": llm.model_config.max_model_len}))


if __name__ == "__main__":
    main()
