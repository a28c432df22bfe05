"""One model as a vLLM engine of its own, in its own process: it reads what it is told, and leaves logits in a file.

Part of a prototype (see ``separate.py``), written against vLLM 0.32: it calls the engine's core, which is not public.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class LogitsToRows(LogitsProcessor):
    """Where an engine shows logits to code from outside: copies each request's to its row of the file."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        file = vllm_config.additional_config["logits"]
        self._out = torch.from_numpy(np.memmap(file["path"], np.float32, "r+", shape=file["shape"]))
        self._rows: dict[int, int] = {}  # of the batch: of the file

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, lambda params, _prompt, _tokens: params.extra_args["row"])

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        indices = sorted(self._rows)
        self._out[[self._rows[index] for index in indices]] = logits[indices].float()
        return logits


class CountingScheduler(Scheduler):
    forwards = 0
    computed = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        scheduled = super().schedule(*args, **kwargs)
        self.forwards += scheduled.total_num_scheduled_tokens > 0
        self.computed += scheduled.total_num_scheduled_tokens
        return scheduled


class Engine:
    """An engine without a server: requests go in together, and it steps until each has its logits."""

    def __init__(self, model: str, logits: dict[str, Any], *, settings: dict[str, Any], sessions: bool) -> None:
        config = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            async_scheduling=False,
            scheduler_cls=CountingScheduler,
            logits_processors=[LogitsToRows],
            additional_config={"logits": logits},
            enable_prefix_caching=not sessions,
            **settings,
        ).create_engine_config()
        self._core = EngineCore(config, Executor.get_class(config), log_stats=False)
        self._sessions = sessions

    def read(self, reads: list[tuple[str, int, list[int]]]) -> tuple[int, int, float]:
        """Request, row of the logits, tokens: in a session those that the engine has not seen, otherwise all.

        A session's request stays, with its blocks, until more tokens come; what it sampled is dropped then.

        Returns:
            forwards, tokens that they computed, seconds.
        """
        begin = time.perf_counter()
        waiting = {name for name, _, _ in reads}
        for name, row, tokens in reads:
            request = EngineCoreRequest(
                request_id=name,
                external_req_id=name,
                prompt_token_ids=tokens,
                mm_features=None,
                sampling_params=SamplingParams(
                    temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args={"row": row}
                ),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                resumable=self._sessions,
            )
            self._core.add_request(*self._core.preprocess_add_request(request))
        counts = self._core.scheduler
        counts.forwards = counts.computed = 0
        while waiting:
            outputs, executed = self._core.step_fn()
            self._core.post_step(executed)
            for group in (outputs or {}).values():
                waiting -= {output.request_id for output in group.outputs if output.finish_reason is not None}
        return counts.forwards, counts.computed, time.perf_counter() - begin

    def end(self, requests: Sequence[str]) -> None:
        if self._sessions and requests:
            self._core.abort_requests(list(requests))
