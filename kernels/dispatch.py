"""The operators ``torch.ops.ebpo_core.*``, and the shorter way around them in eager mode.

A registered operator is what torch.compile, export and graph capture see. Going through the dispatcher costs an eager
call several microseconds of a decode step that takes a few, so plain tensors outside of a trace skip it.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import launch, reference
from .arguments import Form, Step
from .reference import Filters

NAMESPACE = "ebpo_core"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_operators = getattr(torch.ops, NAMESPACE)
# This folder has the name of Hugging Face's package `kernels`: where the root of the repository is on the import path,
# transformers imports it under that name first. One definition serves both copies.
_defined = hasattr(_operators, "select_add_tokens")
_STEP = "Tensor router, Tensor? selection, Tensor[] experts, int form, float alpha, int vocab_size, bool round_sum"


def _define(schema: str) -> None:
    if not _defined:
        _library.define(schema)


def fuses_on(device: torch.device) -> bool:
    """Whether tensors of this device take the Triton kernels (ROCm calls itself cuda too)."""
    return device.type in ("cuda", "xpu")


def require_triton() -> None:
    """Import Triton, or say how to get it."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the kernels need Triton for tensors of a GPU: pip install "ebpo-core[kernels]" (Linux), '
            "or move the logits to the CPU"
        ) from error


def direct(step: Step) -> bool:
    """Whether the dispatcher can be skipped: not traced, and no tensor is a stand-in for another."""
    return not torch.compiler.is_compiling() and plain(step.router, *step.experts)


def plain(*tensors: Tensor) -> bool:
    """Whether all tensors are what they seem: no fakes, no functional wrappers."""
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


# ------------------------------------------------------------------------------------------------------------- tokens

_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_define(f"select_add_tokens({_STEP}, Tensor? tokens, bool logprobs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def select_add_tokens(step: Step, tokens: Tensor | None, logprobs: bool) -> _Five:
    """Token ids (empty when given), expert ids, fused logits, log-probabilities, scores; empty where not asked for."""
    if direct(step):
        return (
            _tokens_triton(step, tokens, logprobs) if fuses_on(step.router.device) else _tokens(step, tokens, logprobs)
        )
    out: _Five = _operators.select_add_tokens(*_flat(step), tokens, logprobs)
    return out


def _tokens(step: Step, tokens: Tensor | None, logprobs: bool) -> _Five:
    nothing = step.router.new_empty(0, dtype=torch.float32)
    no_tokens = step.router.new_empty(0, dtype=torch.int64)
    if tokens is None:
        chosen, ids, logits = reference.argmax(step)
    else:
        chosen, ids, logits = tokens, reference.expert_ids(step), nothing
    policy, score = reference.logprobs(step, chosen) if logprobs else (nothing, nothing.clone())
    return chosen if tokens is None else no_tokens, ids, logits, policy, score


def _tokens_triton(step: Step, tokens: Tensor | None, logprobs: bool) -> _Five:
    require_triton()
    out, launches = launch.tokens(step, tokens, logprobs)
    if step.batch:
        launch.run(launches, step.router.device)

    def empty(dtype: torch.dtype = torch.float32) -> Tensor:
        return step.router.new_empty(0, dtype=dtype)

    return (
        out.token_ids if tokens is None else empty(torch.int64),
        out.expert_ids,
        empty() if out.logits is None else out.logits,
        empty() if out.logprobs is None else out.logprobs,
        empty() if out.scores is None else out.scores,
    )


def _tokens_fake(*arguments: object) -> _Five:
    step, (tokens, logprobs) = _step(arguments)
    new, B = step.router.new_empty, step.batch
    return (
        new(B if tokens is None else 0, dtype=torch.int64),
        new(B, dtype=torch.int64),
        new(B if tokens is None else 0, dtype=torch.float32),
        new(B if logprobs else 0, dtype=torch.float32),
        new(B if logprobs else 0, dtype=torch.float32),
    )


# ---------------------------------------------------------------------------------------------------------------- add

_define(f"select_add({_STEP}) -> (Tensor, Tensor)")


def select_add(step: Step) -> tuple[Tensor, Tensor]:
    """Fused logits ``[B, V]`` float32, expert ids ``[B]`` int64."""
    if direct(step):
        return _add_triton(step) if fuses_on(step.router.device) else _add(step)
    out: tuple[Tensor, Tensor] = _operators.select_add(*_flat(step))
    return out


def _add(step: Step) -> tuple[Tensor, Tensor]:
    ids = reference.expert_ids(step)
    return reference.fused_logits(step, ids), ids


def _add_triton(step: Step) -> tuple[Tensor, Tensor]:
    require_triton()
    out, ids, launches = launch.add(step)
    if step.batch:
        launch.run(launches, step.router.device)
    return out, ids


def _add_fake(*arguments: object) -> tuple[Tensor, Tensor]:
    step, _ = _step(arguments)
    new = step.router.new_empty
    return new(step.batch, step.vocab_size, dtype=torch.float32), new(step.batch, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------------------- sample

_define(
    f"select_add_sample({_STEP}, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? log_min_p, "
    "Tensor? seed, Tensor? position, Tensor? noise) -> (Tensor, Tensor)"
)


def select_add_sample(
    step: Step, filters: Filters, seed: Tensor | None, position: Tensor | int | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token ids and expert ids, ``[B]`` int64 each."""
    if direct(step):
        draw = _sample_triton if fuses_on(step.router.device) else reference.sample
        return draw(step, filters, seed, position, noise)
    # The operator takes tensors only: one schema, and no new graph for a new number.
    kinds = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64)
    parameters = [
        None if value is None else reference.per_row(value, step, dtype)
        for value, dtype in zip((*filters, position), kinds, strict=True)
    ]
    out: tuple[Tensor, Tensor] = _operators.select_add_sample(*_flat(step), *parameters[:4], seed, parameters[4], noise)
    return out


def _sample_triton(
    step: Step, filters: Filters, seed: Tensor | None, position: Tensor | int | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    require_triton()
    tokens, ids, launches = launch.sample(step, filters, seed, position, noise)
    if step.batch:
        launch.run(launches, step.router.device)
    return tokens, ids


def _sample_fake(*arguments: object) -> tuple[Tensor, Tensor]:
    step, _ = _step(arguments)
    return step.router.new_empty(step.batch, dtype=torch.int64), step.router.new_empty(step.batch, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------------- registration


def _flat(step: Step) -> tuple[object, ...]:
    return (*step[:3], int(step.form), *step[4:])


def _step(arguments: tuple[object, ...]) -> tuple[Step, tuple[object, ...]]:
    router, selection, experts, form, *rest = arguments
    step = Step(router, selection, list(experts), Form(form), *rest[:3])  # type: ignore[arg-type, call-overload]
    return step, tuple(rest[3:])


def _from_flat(function: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        step, rest = _step(arguments)
        if function in (reference.sample, _sample_triton):
            rest = (Filters(*rest[:4]), *rest[4:])  # type: ignore[arg-type]
        return function(step, *rest)

    return call


def _register() -> None:
    table: dict[str, tuple[Callable[..., object], ...]] = {
        "select_add_tokens": (_tokens, _tokens_triton, _tokens_fake),
        "select_add": (_add, _add_triton, _add_fake),
        "select_add_sample": (reference.sample, _sample_triton, _sample_fake),
    }
    for name, (reference_path, triton_path, fake) in table.items():
        _library.impl(name, _from_flat(reference_path), "CompositeExplicitAutograd")
        _library.impl(name, _from_flat(triton_path), "CUDA")
        _library.impl(name, _from_flat(triton_path), "XPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


if not _defined:
    _register()
