"""The versions of vLLM that this package serves FusionRoute in, and what it says to another one.

Most of what is taken from vLLM is no public interface, so that a version is in this list once
``tests/environments/vllm/test_seams.py`` found every name and signature in its sources.
"""

from __future__ import annotations

from typing import Any

SUPPORTED = ((0, 32), (0, 33))
"""Major and minor versions."""
REMEDY = "pip install 'vllm>=0.32,<0.34'"


def check_version() -> None:
    """Refuse a vLLM that was not looked at.

    Raises:
        ValueError: with what to install.
    """
    import vllm

    found: tuple[Any, ...] = tuple(vllm.__version_tuple__[:2])
    if found not in SUPPORTED:
        known = " and ".join(".".join(map(str, one)) for one in SUPPORTED)
        raise ValueError(
            f"ebpo-core serves FusionRoute checkpoints in vLLM {known}, this is {vllm.__version__}: {REMEDY}"
        )
