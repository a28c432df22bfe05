"""EBPO inside other people's trainers: one module a framework, and what they share.

Importing this package, :mod:`.process` or :mod:`.checks` needs NumPy only. A framework's own module imports that
framework.
"""

from __future__ import annotations
