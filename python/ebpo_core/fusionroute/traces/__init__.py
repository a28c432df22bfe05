"""Which expert wrote which token: the record, its JSON form, its picture in a terminal or browser. Needs no torch."""

from __future__ import annotations

from .trace import RoutedToken, RoutingTrace, dump, load

__all__ = ["RoutedToken", "RoutingTrace", "dump", "load"]
