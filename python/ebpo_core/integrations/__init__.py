"""EBPO inside other people's trainers: one module a framework, and what they share.

Importing this package, or :mod:`.settings`, :mod:`.sidecar` and :mod:`.saturation`, needs NumPy only. A framework's own
module imports that framework.
"""

from __future__ import annotations
