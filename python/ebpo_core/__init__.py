"""Empirical-Bayes advantages for GRPO-style RL post-training (EBPO, arXiv 2602.05165), with a Rust core.

Importing this package needs NumPy only. Its subpackages (:mod:`ebpo_core.trainer` for TRL,
:mod:`ebpo_core.fusionroute`, :mod:`ebpo_core.kernels` and others) bring their own requirements, behind extras.
"""

from __future__ import annotations

import warnings

from ebpo_core import _core
from ebpo_core._core import __version__
from ebpo_core.diagnostics import Diagnostics
from ebpo_core.estimator import EBPO, ShrunkenPrior
from ebpo_core.prior import Prior
from ebpo_core.stateless import advantages

if _core.DEBUG_BUILD:  # pragma: no cover
    warnings.warn("ebpo_core was compiled without optimisation; do not benchmark it", RuntimeWarning, stacklevel=2)

__all__ = ["EBPO", "Diagnostics", "Prior", "ShrunkenPrior", "__version__", "advantages"]
