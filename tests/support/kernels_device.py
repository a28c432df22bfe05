"""Runs the public functions of ``ebpo_core.kernels`` on the Triton kernels, wherever the tests happen to run.

With a GPU: on the GPU, in this process. Without: in Triton's interpreter, on CPU tensors, in a process of its own,
because ``TRITON_INTERPRET`` must be set before anything imports Triton and must not reach anybody else's kernels.

Either way small tiles are forced, so that a small vocabulary is cut into several with a ragged last one, and every
uninitialised tensor the launcher allocates is poisoned first.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()


class Kernels:
    """``kernels("select_add_argmax", router, weights, experts, alpha=0.5, block=32)``: public names, CPU tensors."""

    _pool: ProcessPoolExecutor | None = None

    def _start(self) -> None:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"  # inherited by the process that starts here
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._pool.submit(os.getpid).result()
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        atexit.register(self._pool.shutdown)

    def __call__(self, name, *args, block=64, row_block=64, **kwargs):
        request = pickle.dumps((name, args, kwargs, block, row_block))  # by value: strides and padding travel along
        if ON_GPU:
            return pickle.loads(_serve(request))
        if self._pool is None:
            self._start()
        return pickle.loads(self._pool.submit(_serve, request).result())


kernels = Kernels()


def _serve(request: bytes) -> bytes:
    from ebpo_core import kernels
    from ebpo_core.kernels import argmax_triton, dispatch, launch, lm_head_triton, sample_triton

    name, args, kwargs, block, row_block = pickle.loads(request)
    small = launch.Tile(block, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tile_for", lambda *_: small)
        patch.setattr(sample_triton, "_ROW_TILE", launch.Tile(row_block, 4))
        for module in (argmax_triton, sample_triton, lm_head_triton):
            patch.setattr(module, "torch", _Poisoning())
        patch.setattr(dispatch, "fuses_on", lambda _: True)
        out = getattr(kernels, name)(*_to_device(args), **_to_device(kwargs))
    return pickle.dumps(_to_device(out, "cpu"))


class _Poisoning:
    """torch, but nothing can rely on what uninitialised memory holds."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, **kwargs):
        out = torch.empty(*args, **kwargs)
        return out.fill_(float("nan") if out.dtype.is_floating_point else torch.iinfo(out.dtype).max)


def _to_device(x, device="cuda" if ON_GPU else "cpu"):
    if isinstance(x, torch.Tensor):
        if x.device.type == device:
            return x
        if device == "cpu":
            return x.cpu()
        # Not .to(): that would drop the strides and the padding between rows.
        storage = x.untyped_storage().to(device=device)
        return torch.empty(0, dtype=x.dtype, device=device).set_(storage, x.storage_offset(), x.shape, x.stride())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_to_device(y, device) for y in x))
    if isinstance(x, (list, tuple)):
        return type(x)(_to_device(y, device) for y in x)
    if isinstance(x, dict):
        return {k: _to_device(y, device) for k, y in x.items()}
    return x
