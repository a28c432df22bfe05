r"""The final answer in a completion: the last ``\boxed{...}``, ``Answer: ...`` or ``#### number``.

The last of them decides, whichever it is: a policy that states many answers is judged by one. Text without any of them
has no final answer, however right it is, so that the form of an answer is learned as well.
"""

from __future__ import annotations

import re
from collections import deque

from ebpo_core.rewards.answers import read_answer
from ebpo_core.rewards.limits import MAX_LENGTH

# A little more than an answer may have, so that what is cut here is refused as too long, not judged by its beginning.
_WINDOW = MAX_LENGTH + 1
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE = re.compile(rf"[^\n]{{0,{_WINDOW}}}")
_ANSWER = re.compile(r"(?:Answer|answer|ANSWER)\**\s*:[\s*]*")
_HASHES = re.compile(r"(?<!#)####[ \t]*(?=[-+.0-9$£€\\])")
_MAX_HASHES = 8


def final_answer(text: str) -> str | None:
    r"""The final answer that ``text`` states.

    - ``\boxed{...}``: what is between balanced braces. A last box that never closes (a completion cut off at its limit)
      is no answer, and neither is a box before it.
    - ``Answer: ...``, also ``answer`` and ``ANSWER``, and with Markdown's ``**`` around it: the rest of the line, or
      the next line that is not empty. A full stop at the end goes.
    - ``#### ...``, GSM8K's form: the rest of the line, where that is one number. Other lines that begin so are
      headings, and only the last few are looked at.

    A marker inside the last box is part of it. Answers longer than ``MAX_LENGTH`` are cut just above that length.

    Returns:
        The answer without surrounding white space, or None where there is none or it is empty. Never raises on text.
    """
    found: list[tuple[int, str]] = []
    inside = range(0)
    box = _last("\\boxed", _BOX, text)
    if box is not None:
        start, end = box.start(), _closing_brace(text, box.end())
        if end is None:
            # Markers after an unclosed brace may be inside it or not: nothing there can be trusted.
            return None
        inside = range(start, end)
        found.append((start, text[box.end() : end]))
    for word in ("Answer", "answer", "ANSWER"):
        answer = _last(word, _ANSWER, text, inside)
        if answer is not None:
            found.append((answer.start(), _rest_of_line(text, answer.end()).strip("*")))
    for match in deque(_HASHES.finditer(text), _MAX_HASHES) if "####" in text else ():
        rest = _rest_of_line(text, match.end())
        if match.start() not in inside and len(rest) <= MAX_LENGTH and read_answer(rest).value is not None:
            found.append((match.start(), rest))
    if not found:
        return None
    return max(found)[1].strip() or None


def reference_answer(text: str) -> str:
    r"""The answer in a reference column, which may be the bare answer or a solution that ends with one.

    Only ``\boxed{...}`` and ``#### ...`` mark an answer in a reference. A text without them is the answer itself.
    """
    if _last("\\boxed", _BOX, text) is None and "####" not in text:
        return text.strip()
    return final_answer(text) or text.strip()


def _last(word: str, pattern: re.Pattern[str], text: str, inside: range = range(0)) -> re.Match[str] | None:
    """The last match of a pattern, outside a range. Looking for the ``word`` it begins with first makes this quick."""
    end = len(text)
    while (position := text.rfind(word, 0, end)) >= 0:
        match = pattern.match(text, position)
        if match is not None and position not in inside:
            return match
        end = position
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace opened just before ``start`` closes, or the window's end; None where the text ends first."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + _WINDOW):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None if start + _WINDOW >= len(text) else start + _WINDOW


def _rest_of_line(text: str, start: int) -> str:
    match = _LINE.match(text, start)
    return match[0].strip() if match else ""
