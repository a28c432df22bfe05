"""Low-rank terms of several experts beside the router's linear layers, each token with its own expert's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn


class LowRank:
    """The adapters of n experts at every target module, stacked: ``scale * B_e (A_e x)`` for a token of expert e.

    Attributes:
        down: A by module name, ``[n, r, in]``.
        up: B by module name, transposed and with the scale in it, ``[n, r, out]``: experts that lie behind each other
            are one matrix ``[n r, out]``, so that all terms of a batch are two products.
    """

    def __init__(self, down: Mapping[str, Tensor], up: Mapping[str, Tensor]) -> None:
        self.down, self.up = dict(down), dict(up)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and convert in place; free where nothing changes. Threads may ask for the same at once."""
        first = next(iter(self.down.values()))
        if first.device == device and first.dtype == dtype:
            return
        down, up = (
            {name: value.to(device, dtype) for name, value in tensors.items()} for tensors in (self.down, self.up)
        )
        # The first of `down` says that all are done.
        self.up = up
        self.down = down

    def copy(self) -> LowRank:
        """The same tensors, which :meth:`to` will replace here alone."""
        return LowRank(self.down, self.up)

    @property
    def count(self) -> int:
        """n."""
        return next(iter(self.down.values())).shape[0]

    @property
    def rank(self) -> int:
        """r."""
        return next(iter(self.down.values())).shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        return sum(value.nbytes for tensors in (self.down, self.up) for value in tensors.values())

    def terms(self, modules: Mapping[str, nn.Module], ids: Tensor) -> dict[nn.Module, _Term]:
        """What :func:`added` takes: for each module its term for tokens of the experts ``ids``, of any shape."""
        flat = ids.flatten()
        others: Tensor | None = None
        if self.count == 1:
            flat = flat[:0]
        elif len(flat) >= self.count:  # reading each expert once is less than gathering one per token
            others = torch.arange(self.count, device=flat.device) != flat[:, None]
        return {module: _Term(self.down[name], self.up[name], flat, others) for name, module in modules.items()}


class _Term:
    """The term of one module: see :class:`LowRank`."""

    def __init__(self, down: Tensor, up: Tensor, ids: Tensor, others: Tensor | None) -> None:
        self.down, self.up, self.ids, self.others = down, up, ids, others

    def added_to(self, output: Tensor, x: Tensor) -> Tensor:
        """``output``, ``[..., out]``, and the term for ``x``, ``[..., in]``."""
        n, r, _ = self.down.shape
        flat = x.reshape(-1, x.shape[-1]).to(self.down.dtype)
        into = output.reshape(-1, output.shape[-1])
        if n == 1 or self.others is not None:
            inner = flat @ self.down.flatten(0, 1).T  # [N, n r]
            if self.others is not None:
                # Zero in the place of other experts, which then add nothing.
                inner = inner.view(-1, n, r).masked_fill(self.others[..., None], 0.0).flatten(1)
            up = self.up.flatten(0, 1)
            same = into.dtype == up.dtype
            result = torch.addmm(into, inner, up) if same else into + (inner @ up).to(into.dtype)
        else:
            inner = torch.bmm(self.down[self.ids], flat[..., None])  # [N, r, 1]
            result = into + torch.bmm(inner.mT, self.up[self.ids])[:, 0].to(into.dtype)
        return result.view_as(output)


# Set while the adapted stream runs. Per thread: the router may run in another one meanwhile, without terms.
_terms: ContextVar[Mapping[nn.Module, _Term] | None] = ContextVar("fusionroute_low_rank_terms", default=None)
_listening = Lock()


def _add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    terms = _terms.get()
    term = None if terms is None else terms.get(module)
    return None if term is None else term.added_to(output, inputs[0])


@contextmanager
def added(terms: Mapping[nn.Module, _Term]) -> Iterator[None]:
    """A block in which this thread's forwards of the modules have their terms added, by a hook that stays on them."""
    with _listening:
        for module in terms:
            if _add not in module._forward_hooks.values():
                module.register_forward_hook(_add)
    token = _terms.set(terms)
    try:
        yield
    finally:
        _terms.reset(token)
