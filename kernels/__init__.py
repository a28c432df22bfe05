"""Decode kernels of FusionRoute (arXiv 2601.05106): select an expert, add its logits to the router's, pick a token.

The files live in ``kernels/`` at the top of the repository and ship as ``ebpo_core.kernels``. They import the standard
library and PyTorch only, and each other by relative imports, so that the directory can also be used on its own. Triton
is imported by the first call that is given tensors of a GPU; tensors of the CPU take the reference.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('ebpo_core.kernels needs PyTorch: pip install "ebpo-core[torch]"') from error

from .argmax import SelectedTokens, select_add, select_add_argmax
from .lm_head import lm_head_select_add_argmax
from .logprob import TokenLogprobs, select_add_logprob
from .sample import select_add_sample
from .warmup import warmup

__all__ = [
    "SelectedTokens",
    "TokenLogprobs",
    "lm_head_select_add_argmax",
    "select_add",
    "select_add_argmax",
    "select_add_logprob",
    "select_add_sample",
    "warmup",
]
