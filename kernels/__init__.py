"""Decode kernels of FusionRoute (arXiv 2601.05106): select an expert, add its logits to the router's, pick a token.

The files live in ``kernels/`` at the top of the repository and ship as ``ebpo_core.kernels``. They import the standard
library and PyTorch only, and each other by relative imports, so that the directory can also be used on its own.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('ebpo_core.kernels needs PyTorch: pip install "ebpo-core[torch]"') from error

from .reference import SelectedTokens, select_add_argmax

__all__ = ["SelectedTokens", "select_add_argmax"]
