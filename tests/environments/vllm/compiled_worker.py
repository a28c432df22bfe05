"""Engines of compiled checkpoints, one after the other in this process: their answers, and what they are made of.

python compiled_worker.py '[{"model": ..., "prompts": [[...]], "new": 24, "num_experts": 3, ...}, ...]'
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from engine_worker import answered


def main() -> None:
    said = []
    for asked in json.loads(sys.argv[1]):
        llm, answers = answered(asked, prepare=_watch)
        worker: Any = llm.llm_engine.model_executor.driver_worker
        model = worker.model_runner.model
        own = {name for name, _ in model.named_parameters() if not name.startswith(("router.", "route_head."))}
        said.append(
            {
                "answers": answers,
                "rows": model.rows,
                "caches": sorted(llm.collective_rpc("get_kv_cache_spec")[0]),
                "own_parameters": sorted({name.rpartition(".")[2] for name in own}),
            }
        )
        del llm, worker, model
        gc.collect()
    print(json.dumps({"engines": said}))


def _watch(llm: Any) -> None:
    """Note how many rows each stack runs from now on."""
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    model.rows = {"router": [], "adapted": []}
    for name, rows in model.rows.items():
        getattr(model, name).register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))


if __name__ == "__main__":
    main()
