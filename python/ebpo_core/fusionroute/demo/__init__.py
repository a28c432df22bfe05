"""``fusionroute demo``: three experts and a router from scratch, on a CPU, in minutes; see :mod:`.demo`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, see :func:`ebpo_core.fusionroute.demo.demo.main`."""
    from .demo import main as run

    return run(argv)
