"""The router's forward: logits at some positions, and what its LM head reads at all of them."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from contextvars import ContextVar
from threading import Lock
from typing import Any

from torch import Tensor, nn


class _HeadInput:
    """The input of the router's LM head in one forward: all S positions are kept, and those asked for passed on."""

    def __init__(self, head: nn.Module, keep: slice | Tensor | None) -> None:
        self.head, self.keep = head, keep
        self.seen: list[Tensor] = []


# Set while `run_router` listens. Per thread, so that calls may run side by side.
_head_input: ContextVar[_HeadInput | None] = ContextVar("fusionroute_lm_head_input", default=None)
_listening = Lock()  # threads that run a model's first forward side by side must not register the hook twice


def _listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    heard = _head_input.get()
    if heard is None or module is not heard.head:  # a head that PEFT has wrapped since still has the hook
        return None
    heard.seen.append(inputs[0])
    return None if heard.keep is None else (at(heard.keep, inputs[0]), *inputs[1:])


def kept(logits_to_keep: int | Tensor, columns: int) -> slice | Tensor | None:
    """The positions whose logits are asked for, as an index; None for all ``columns``."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if 0 < logits_to_keep < columns else None


def at(keep: slice | Tensor | None, columns: Tensor) -> Tensor:
    """The positions ``keep`` of ``[B, S, ...]``."""
    return columns if keep is None else columns[:, keep]


def run_router(router: Any, keep: slice | Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor, Any]:
    """Run the router, its LM head on the positions ``keep`` alone.

    Returns:
        Its logits, ``[B, K, V_router]``; the input that its LM head has at all positions, ``[B, S, D]``; its output
        object.

    Raises:
        ValueError: a router that does not call its LM head once.
    """
    head = router.get_output_embeddings()
    with _listening:
        if _listen not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_listen)
    heard = _HeadInput(head, keep)
    token = _head_input.set(heard)
    try:
        out = router(**inputs, return_dict=True)
    finally:
        _head_input.reset(token)
    if len(heard.seen) != 1:
        raise ValueError(
            f"the router {type(router).__name__} called its LM head {len(heard.seen)} times in one forward: "
            "FusionRoute needs a causal LM that calls the module get_output_embeddings() returns once"
        )
    return out.logits, heard.seen[0], out
