"""Compilation of the kernels before the first request needs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .argmax import select_add, select_add_argmax
from .arguments import LAYOUTS
from .dispatch import fuses_on
from .sample import select_add_sample

_OPERATIONS = ("argmax", "logprobs", "add", "sample", "filtered_sample")


def warmup(
    batch_sizes: Iterable[int],
    vocab_size: int,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    *,
    num_experts: int = 3,
    layout: str = "listed",
    weights_dtype: torch.dtype = torch.float32,
    operations: Sequence[str] = ("argmax",),
    device: torch.device | str | None = None,
) -> int:
    """Run every operation once per batch size and dtype on zeros, so that no decode step waits for the compiler.

    Compilation depends on the vocabulary, the dtypes, the number and layout of the experts, and, through the tile, on
    the batch; run this before capturing CUDA graphs.

    Args:
        batch_sizes: the batch sizes that will be decoded.
        vocab_size: V, also the width of the logits.
        dtypes: dtypes of the logits (router and experts alike).
        num_experts: n.
        layout: of the experts' logits, as in :func:`~.argmax.select_add_argmax`.
        weights_dtype: of the routing weights; an integer dtype stands for expert ids.
        operations: of "argmax", "logprobs", "add", "sample" and "filtered_sample".
        device: by default the current CUDA device, or the CPU if there is none.

    Returns:
        The number of calls made: 0 on a CPU, where there is nothing to compile.

    Raises:
        ValueError: an unknown operation or layout.
    """
    unknown = [name for name in operations if name not in _OPERATIONS]
    if unknown:
        raise ValueError(f"operations holds {unknown}: pass some of {list(_OPERATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: pass one of {list(LAYOUTS)}")
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not fuses_on(where):
        return 0
    calls = 0
    for batch in batch_sizes:
        for dtype in dtypes:
            inputs = _zeros(batch, vocab_size, dtype, num_experts, layout, weights_dtype, where)
            for name in operations:
                _run(name, inputs, layout)
                calls += 1
    torch.accelerator.synchronize(where)
    return calls


_Inputs = tuple[Tensor, Tensor, "Tensor | list[Tensor]"]


def _zeros(
    batch: int, V: int, dtype: torch.dtype, n: int, layout: str, weights_dtype: torch.dtype, device: torch.device
) -> _Inputs:
    router = torch.zeros(batch, V, dtype=dtype, device=device)
    shape = (batch, n) if weights_dtype.is_floating_point else (batch,)
    weights = torch.zeros(shape, dtype=weights_dtype, device=device)
    # The experts may share memory with the router: they are only read.
    if layout == "gathered":
        return router, weights, router
    if layout == "listed":
        return router, weights, [router] * n
    if layout == "ragged":
        return router, weights, [router, *[router[:0]] * (n - 1)]
    return router, weights, torch.zeros(n, batch, V, dtype=dtype, device=device)


def _run(name: str, inputs: _Inputs, layout: str) -> None:
    seed = torch.zeros(len(inputs[0]), dtype=torch.int64, device=inputs[0].device)
    if name == "argmax":
        select_add_argmax(*inputs, layout=layout)
    elif name == "logprobs":
        select_add_argmax(*inputs, return_logprobs=True, layout=layout)
    elif name == "add":
        select_add(*inputs, layout=layout)
    elif name == "sample":
        select_add_sample(*inputs, seed=seed, layout=layout)
    else:
        select_add_sample(*inputs, seed=seed, top_k=50, top_p=0.95, min_p=0.05, layout=layout)
