"""By which keys vLLM would find again what it compiled of each expert, as JSON, without building or compiling any.

python keys_worker.py '[["folder of expert 0", ["folder of expert 1", [sizes]]], ...]' '{"model": checkpoint}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import nn
from vllm.compilation import backends
from vllm.engine.arg_utils import EngineArgs

from ebpo_core.fusionroute.experts.references import ExpertReference
from ebpo_core.fusionroute.vllm import submodels


def main() -> None:
    keys: list[list[list[str]]] = []

    def recorded(vllm_config: Any, prefix: str) -> nn.Module:
        assert prefix.startswith("expert_")
        keys[-1].append([vllm_config.compute_hash(), backends.model_tag])
        return nn.Module()

    submodels.initialize_model = recorded
    config = EngineArgs(dtype="float32", **json.loads(sys.argv[2])).create_engine_config()
    for folders in json.loads(sys.argv[1]):
        keys.append([])
        for slot, each in enumerate(folders):
            folder, sizes = (each, ()) if isinstance(each, str) else each
            own = submodels.expert_config(ExpertReference(name=f"slot{slot}", path=folder))
            submodels.build(config, own, folder, f"expert_{slot}", "", sizes=sizes)
    print("answer", json.dumps(keys))


if __name__ == "__main__":
    main()
