"""Compiled experts: experts as low-rank adapters of the router, which read the router's own keys and values."""
