"""Operators ``torch.ops.ebpo_core.*`` on one decode step, and the shorter way around them in eager mode.

A registered operator is what torch.compile, export and graph capture see. Going through the dispatcher costs an eager
call several microseconds of a decode step that takes a few, so plain tensors outside of a trace skip it.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import launch
from .arguments import Layout, Step

NAMESPACE = "ebpo_core"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_STEP = "Tensor router, Tensor? selection, Tensor[] experts, int layout, float alpha, int vocab_size, bool round_sum"

Outputs = tuple[Tensor | None, ...]  # None for what was not asked for
Planned = tuple[Outputs, list[launch.Launch]]  # outputs, and the launches that write them


class Operator:
    """One operation on a :class:`~.arguments.Step`: on the CPU, on a GPU, and as shapes alone.

    Each of the three functions takes the step and the operation's own arguments, and returns a tuple of ``outputs``
    tensors, None for those that were not asked for. A schema knows no optional output: the registered operator returns
    an empty tensor in place of None.

    Args:
        name: of the operator in the namespace.
        arguments: schema of the operation's own arguments, after the step's; may be empty.
        outputs: number of tensors returned. None of them may alias an argument.
        reference: runs on CPU tensors, and on devices that have no kernels.
        kernels: allocates the outputs on a GPU and returns the launches beside them; may import Triton.
        fake: allocates the outputs.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        outputs: int,
        *,
        reference: Callable[..., Outputs],
        kernels: Callable[..., Planned],
        fake: Callable[..., Outputs],
    ) -> None:
        self.name = name
        self._reference = reference
        self._kernels = kernels
        # This folder has the name of Hugging Face's package `kernels`: where the root of the repository is on the
        # import path, transformers imports it under that name first. One definition serves both copies.
        if hasattr(getattr(torch.ops, NAMESPACE), name):
            return
        inputs = ", ".join(filter(None, (_STEP, arguments)))
        _library.define(f"{name}({inputs}) -> ({', '.join(['Tensor'] * outputs)})")
        _library.impl(name, _registered(reference), "CompositeExplicitAutograd")
        _library.impl(name, _registered(self._launched), "CUDA")
        _library.impl(name, _registered(self._launched), "XPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _registered(fake), lib=_library)

    def __call__(self, step: Step, *arguments: Any) -> Any:
        return self.eager(step, *arguments) if is_eager(step) else self.traced(step, *arguments)

    def eager(self, step: Step, *arguments: Any) -> Any:
        """The implementation for the step's device, called directly."""
        return (self._launched if fuses_on(step.router.device) else self._reference)(step, *arguments)

    def traced(self, step: Step, *arguments: Any) -> Any:
        """The registered operator."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name)(*step[:3], int(step.layout), *step[4:], *arguments)

    def _launched(self, step: Step, *arguments: Any) -> Outputs:
        require_triton()
        outputs, launches = self._kernels(step, *arguments)
        launch.run(launches, step.router.device)
        return outputs


def fuses_on(device: torch.device) -> bool:
    """True where the Triton kernels run (ROCm calls itself cuda too)."""
    return device.type in ("cuda", "xpu")


def require_triton() -> None:
    """Import Triton, or say how to get it; called before a file of kernels is imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the kernels need Triton for tensors of a GPU: pip install "ebpo-core[kernels]" (Linux), '
            "or move the logits to the CPU"
        ) from error


def is_eager(step: Step) -> bool:
    """True where the dispatcher can be skipped: nothing is traced, and no tensor is a stand-in for another."""
    return not torch.compiler.is_compiling() and are_plain(step.router, *step.experts)


def are_plain(*tensors: Tensor) -> bool:
    """True where all tensors are what they seem: no fakes, no functional wrappers."""
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def _registered(implementation: Callable[..., Outputs]) -> Callable[..., tuple[Tensor, ...]]:
    def call(router: Tensor, selection: Tensor | None, experts: list[Tensor], layout: int, *rest: Any) -> Any:
        step = Step(router, selection, list(experts), Layout(layout), *rest[:3])
        return tuple(router.new_empty(0) if x is None else x for x in implementation(step, *rest[3:]))

    return call
