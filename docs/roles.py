"""Docstrings as Markdown for the site: Sphinx's roles become code, its tables and literal blocks what Markdown has.

A griffe extension, named in ``mkdocs.yml``. The docstrings keep the roles, which ``help()`` and editors show as well.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)\.?([^`]+)`")
_TABLE = re.compile(r"^( *)=+(?: +=+)+$.*^ *=+(?: +=+)+$", re.MULTILINE | re.DOTALL)


def _code(match: re.Match[str]) -> str:
    short, target = match.groups()
    text = target.rsplit(".", 1)[-1] if short else target
    if not target.startswith("ebpo_core."):
        return f"`{text}`"
    return f'<autoref optional identifier="{target}"><code>{text}</code></autoref>'  # a link if the site has the target


def _markdown_table(match: re.Match[str]) -> str:
    """A table of the ``====  ====`` kind: its first row is the head, its columns begin where the rules do."""
    indent, lines = match.group(1), match.group().splitlines()
    starts = [rule.start() for rule in re.finditer("=+", lines[0])]
    spans = list(zip(starts, [*starts[1:], None], strict=True))
    rows = [[line[start:end].strip() for start, end in spans] for line in lines if "==" not in line]
    rows.insert(1, ["---"] * len(starts))
    return "\n".join(indent + "| " + " | ".join(row) + " |" for row in rows)


def markdown(docstring: str) -> str:
    """A docstring with its reStructuredText said in Markdown."""
    docstring = _TABLE.sub(_markdown_table, docstring)
    docstring = _ROLE.sub(_code, docstring)
    return re.sub(r"::$", ":", docstring, flags=re.MULTILINE)


class Roles(griffe.Extension):
    """The extension: rewrites each docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
