"""``fusionroute demo``: see :mod:`ebpo_core.fusionroute.demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the demo with its own options."""
    from ebpo_core.fusionroute import demo

    return int(demo.main(argv))
