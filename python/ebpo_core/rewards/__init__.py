"""Rewards for mathematical answers: two plain numbers exactly, everything else by Math-Verify, in limited processes.

The final answer of a completion and the reference go through the same reading. Plain numbers and words are compared in
this process. What that cannot decide goes to Math-Verify (``pip install "ebpo-core[math]"``) in worker processes with a
hard limit on time and memory per answer. Model text is compared or read by grammars; it is never evaluated as code.
"""

from __future__ import annotations

from ebpo_core.rewards.extraction import final_answer
from ebpo_core.rewards.math_verifier import MathVerifier, Verdict
from ebpo_core.rewards.pool import VerifierPoolError
from ebpo_core.rewards.rewards import compute_score, math_reward

__all__ = ["MathVerifier", "Verdict", "VerifierPoolError", "compute_score", "final_answer", "math_reward"]
