"""EBPO in trainers without a hook for it: each module patches its framework, or takes the place of its trainer."""

from __future__ import annotations
