"""What vLLM says when it configures an engine for each of several checkpoints, as JSON: an error's text, or null.

python startup_worker.py '[{"model": ..., "hf_overrides": {...}}, ...]'
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    print("answer", json.dumps([_said(case) for case in json.loads(sys.argv[1])]))


def _said(case: dict[str, Any]) -> str | None:
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(dtype="float32", **case).create_engine_config().model_config
    except (ValueError, OSError) as error:
        return str(error)
    # Another model is configured as if the plugin were not there.
    ours = config.hf_config.model_type == "fusionroute"
    assert ours == (config.get_vocab_size() > config.hf_config.vocab_size)
    assert ours == bool(config.logits_processors)
    return None


if __name__ == "__main__":
    main()
