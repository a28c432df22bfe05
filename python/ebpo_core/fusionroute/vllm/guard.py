"""The extra vocabulary ids can never be asked for nor emitted; and what was emitted is counted per expert.

Both are one logits processor of vLLM, which is where an engine shows each request's tokens to code from outside.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .counters import Counts, open_counts

_PREFIX, _COMPILED = "Vocabulary", "CompiledVocabulary"


class _Selections:
    """The experts that the rows of one step selected, and their own tokens; moved to the host when first asked."""

    def __init__(self, ids: Tensor, own: Tensor) -> None:
        self.rows = len(ids)
        self._tensors: tuple[Tensor, Tensor] | None = (ids, own)
        self._lists: tuple[list[int], list[int]] = ([], [])

    def of(self, row: int) -> tuple[int, int]:
        if self._tensors is not None:
            ids, own = self._tensors
            self._lists, self._tensors = (ids.tolist(), own.tolist()), None
        return self._lists[0][row], self._lists[1][row]


class _Step:
    """The model's selections of one step, for the processor of the same process, which runs right after it."""

    def __init__(self) -> None:
        self.selections: _Selections | None = None

    def record(self, ids: Tensor, own: Tensor) -> None:
        self.selections = _Selections(ids, own)


STEP = _Step()


class _Row:
    """One request in the batch: its tokens, which vLLM appends to, and a selection whose token is not known yet."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.length = 0
        self.pending: tuple[_Selections, int] | None = None

    def settle(self, counts: Counts | None) -> None:
        """Count the pending selection if its token was kept: that of a chunk of a prompt, for one, is thrown away."""
        pending, self.pending = self.pending, None
        if pending is None or counts is None or len(self.tokens) <= self.length:
            return
        token = self.tokens[self.length]
        if token >= 0:  # -1 stands for one that an asynchronous engine has not brought back
            expert, own = pending[0].of(pending[1])
            counts.add(expert, overruled=token != own)


class RoutingGuard(LogitsProcessor):  # type: ignore[misc]
    """vLLM's logits processor of a served FusionRoute model; its subclasses know their vocabulary, see below."""

    vocab_size: ClassVar[int]
    compiled: ClassVar[bool]

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse requests that name extra ids, where they would change what is emitted, and log-probabilities of
        prompts where not all of a prompt is read for them.

        Raises:
            VLLMValidationError: which the server answers with status 400.
        """
        if cls.compiled and sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                f"prompt_logprobs is {sampling_params.prompt_logprobs}: a compiled checkpoint fuses the logits of new "
                "tokens only; leave it out (and echo), or serve the checkpoint that was compiled",
                parameter="prompt_logprobs",
                value=sampling_params.prompt_logprobs,
            )
        named: dict[str, Iterable[int] | None] = {
            "allowed_token_ids": sampling_params.allowed_token_ids,
            "logit_bias": sampling_params.logit_bias,
            "stop_token_ids": sampling_params.stop_token_ids,
        }
        for parameter, ids in named.items():
            wrong = sorted(token for token in ids or () if token >= cls.vocab_size)
            if wrong:
                raise VLLMValidationError(
                    f"{parameter} names {wrong}: the vocabulary ends at {cls.vocab_size - 1}; ids behind it carry the "
                    "routing and may stand in logprob_token_ids only",
                    parameter=parameter,
                    value=wrong,
                )

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        del device, is_pin_memory
        config = vllm_config.model_config.hf_config
        names = [str(expert["name"]) for expert in config.experts]
        self._counts = open_counts(names, self.vocab_size) if get_tensor_model_parallel_rank() == 0 else None
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """False: greedy decoding must not see the extra ids either."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they join, leave and move in the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(self._rows.pop(index, None))
        for index, _params, _prompt, tokens in batch_update.added:
            self._leave(self._rows.pop(index, None))
            self._rows[index] = _Row(tokens)
        for source, target, direction in batch_update.moved:
            row, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if row is not None:
                self._rows[target] = row
            if other is not None:
                if direction == MoveDirectionality.SWAP:
                    self._rows[source] = other
                else:
                    self._leave(other)

    def apply(self, logits: Tensor) -> Tensor:
        """Mask the extra columns of ``[rows, V + n + 2]``, in place."""
        selections = STEP.selections
        for index, row in self._rows.items():
            row.settle(self._counts)
            if selections is not None and index < selections.rows == len(logits):
                row.length, row.pending = len(row.tokens), (selections, index)
        logits[:, self.vocab_size :] = -math.inf
        return logits

    def _leave(self, row: _Row | None) -> None:
        if row is not None:
            row.settle(self._counts)


def processor_name(vocab_size: int, *, compiled: bool = False) -> str:
    """The name by which vLLM finds the guard of a vocabulary of V ids, of a compiled checkpoint or of another."""
    return f"{__name__}:{_COMPILED if compiled else _PREFIX}{vocab_size}"


def __getattr__(name: str) -> Any:
    # vLLM checks a request by calling a class method that learns of nothing but the request, in processes that share
    # only names with this one. So the class' name carries what it needs, and the class is made when it is looked up.
    for prefix in (_PREFIX, _COMPILED):
        digits = name.removeprefix(prefix)
        if name.startswith(prefix) and digits.isdecimal():
            known = {"vocab_size": int(digits), "compiled": prefix == _COMPILED, "__module__": __name__}
            guard = type(name, (RoutingGuard,), known)
            globals()[name] = guard
            return guard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> Sequence[str]:
    return ["STEP", "RoutingGuard", "processor_name"]
