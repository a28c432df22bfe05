"""The extra vocabulary ids can never be asked for nor emitted; and what was emitted is counted per expert.

Both are one logits processor of vLLM, which is where an engine shows each request's tokens to code from outside. vLLM
has two runners of models, which ask different things of a logits processor: :mod:`.first_runner` and
:mod:`.second_runner` have one each. Here is what they share.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.exceptions import VLLMValidationError

from .counters import Counts, open_counts

_PREFIX, _COMPILED = "Vocabulary", "CompiledVocabulary"


class Selections:
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
        self.selections: Selections | None = None

    def record(self, ids: Tensor, own: Tensor) -> None:
        self.selections = Selections(ids, own)


STEP = _Step()


class Guard:
    """What the logits processors of both runners know of their vocabulary, and check of a request."""

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

    @classmethod
    def counts(cls, vllm_config: Any) -> Counts | None:
        """The counter of this process; None for all ranks but the first, and where no server asked for one."""
        if get_tensor_model_parallel_rank() != 0:
            return None
        names = [str(expert["name"]) for expert in vllm_config.model_config.hf_config.experts]
        return open_counts(names, cls.vocab_size)


def processor_name(vllm_config: Any) -> str:
    """The name by which vLLM finds the guard that the engine's runner of models takes, of the checkpoint's vocabulary.

    Args:
        vllm_config: of the engine.
    """
    config = vllm_config.model_config.hf_config
    module = "second_runner" if vllm_config.use_v2_model_runner else "first_runner"
    prefix = _PREFIX if config.compiled is None else _COMPILED
    return f"{__package__}.{module}:{prefix}{int(config.vocab_size or 0)}"


def guards_by_name(base: type, module: dict[str, Any]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a module that holds the classes which :func:`processor_name` names.

    vLLM checks a request by calling a class method that learns of nothing but the request, in processes that share only
    names with this one. So the class' name carries what it needs, and the class is made when it is looked up.

    Args:
        base: the module's guard.
        module: its globals, which keep what was looked up.
    """

    def look_up(name: str) -> Any:
        for prefix in (_PREFIX, _COMPILED):
            digits = name.removeprefix(prefix)
            if name.startswith(prefix) and digits.isdecimal():
                known = {"vocab_size": int(digits), "compiled": prefix == _COMPILED, "__module__": base.__module__}
                module[name] = type(name, (base,), known)
                return module[name]
        raise AttributeError(f"module {base.__module__!r} has no attribute {name!r}")

    return look_up, lambda: [base.__name__]
