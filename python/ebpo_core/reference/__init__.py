"""NumPy twin of the Rust core: EBPO (arXiv 2602.05165) written to be read beside the paper.

It is the oracle of every faster path and the executable form of the documentation. It favours plain loops over speed;
:func:`algorithm_1` alone is vectorised, because it is also the NumPy peer in ``benches/advantages.py``.

Symbols, as in the paper: ``r`` rewards, ``n`` valid rows of a group (the paper's G), ``mu_m`` a group's mean,
``mu_glob`` the mean of every reward seen, ``sigma2`` their variance, ``tau2`` the variance of the group means,
``S`` the shrinkage factor, ``V`` the baseline; ``theta`` the three numbers ``(mu_glob, sigma2, tau2)`` of a prior.
"""

from .decoupled import decoupled_advantages
from .estimator import EBPO, algorithm_1, arrange
from .methods import baseline_advantages
from .prior import Moments, Prior
from .turns import by_trajectory, by_turn, returns_to_go

__all__ = [
    "EBPO",
    "Moments",
    "Prior",
    "algorithm_1",
    "arrange",
    "baseline_advantages",
    "by_trajectory",
    "by_turn",
    "decoupled_advantages",
    "returns_to_go",
]
