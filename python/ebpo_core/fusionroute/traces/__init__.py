"""Traces of which expert wrote which token: their JSON form, their picture in a terminal or browser, without torch."""

from __future__ import annotations

from .trace import RoutedToken, RoutingTrace, dump, load

__all__ = ["RoutedToken", "RoutingTrace", "dump", "load"]
