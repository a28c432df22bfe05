"""What vLLM says when it configures an engine for each of several checkpoints, as JSON: an error's text, or null.

python startup_worker.py '[{"model": ..., "hf_overrides": {...}}, ...]'
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    from vllm.engine.arg_utils import EngineArgs

    said = []
    for case in json.loads(sys.argv[1]):
        environment = case.pop("environment", {})
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        os.environ.update(environment)
        try:
            config = EngineArgs(dtype="float32", **case).create_engine_config()
        except (ValueError, OSError) as error:
            said.append(str(error))
        else:
            said.append(None)
            assert config.model_config.get_vocab_size() > config.model_config.hf_config.vocab_size
    print(json.dumps({"said": said}))


if __name__ == "__main__":
    main()
