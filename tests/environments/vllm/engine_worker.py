"""vLLM engines, one after the other in this process: greedy answers to prompts of token ids, and their routing.

python engine_worker.py '[{"model": ..., "prompts": [[...]], "new": 24, "num_experts": 2, ..., "watch": true}, ...]'

With TRITON_INTERPRET=1 in the environment, vLLM's second runner of models works here, too: its kernels are Triton's,
for which vLLM's build for CPUs has no compiler.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

from ebpo_core.fusionroute.vllm.columns import decode, routing_ids


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_triton()
    said = [_engine(asked) for asked in json.loads(sys.argv[1])]
    print("answer", json.dumps(said))


def _engine(asked: dict[str, Any]) -> dict[str, Any]:
    """An engine's answers to what was asked, and, if it is watched, what it is made of."""
    from vllm import LLM, SamplingParams

    engine = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 400,
        **asked["engine"],
    }
    llm = LLM(model=asked["model"], **engine)
    model = _watched(llm) if asked.get("watch") else None
    ids = routing_ids(asked["vocab_size"], asked["num_experts"])
    settings = {"temperature": 0, "max_tokens": asked["new"], "ignore_eos": True, **asked.get("sampling", {})}
    sampling = SamplingParams(**settings, logprobs=len(ids), logprob_token_ids=ids)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False)
    answers = []
    for output in outputs:
        best = output.outputs[0]
        columns = [decode([row[one].logprob for one in ids]) for row in best.logprobs]
        answers.append({"tokens": list(best.token_ids), "routing": columns})
    said: dict[str, Any] = {
        "answers": answers,
        "max_model_len": llm.model_config.max_model_len,
        "second_runner": llm.llm_engine.vllm_config.use_v2_model_runner,
    }
    if model is not None:
        own = {name for name, _ in model.named_parameters() if not name.startswith(("router.", "route_head."))}
        said["rows"] = model.rows
        said["caches"] = sorted(llm.collective_rpc("get_kv_cache_spec")[0])
        said["own_parameters"] = sorted({name.rpartition(".")[2] for name in own})
    del llm, model
    gc.collect()
    return said


def _watched(llm: Any) -> Any:
    """The model of a compiled checkpoint, which notes how many rows each stack runs from now on."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    model.rows = {"router": [], "adapted": []}
    for name, rows in model.rows.items():
        getattr(model, name).register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
    return model


def _interpret_triton() -> None:
    """Give vLLM the Triton that it finds no compiler for: in its interpreter it needs none."""
    import triton
    import triton.language
    import vllm.triton_utils
    import vllm.triton_utils.importing

    for module in (vllm.triton_utils, vllm.triton_utils.importing):
        module.HAS_TRITON = True
    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language


if __name__ == "__main__":
    main()
