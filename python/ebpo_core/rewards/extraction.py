r"""The final answer in a completion: the last box, ``<answer>`` tag, ``#### number`` or ``Answer: ...``.

One answer decides: a policy that states many is judged by one, or by their list. Text without any of these marks has no
final answer, however right it is, so that the form of an answer is learned as well.
"""

from __future__ import annotations

import math
import re
from collections import deque
from fractions import Fraction
from numbers import Number
from typing import Any

from ebpo_core.rewards.limits import MAX_LENGTH, refusal
from ebpo_core.rewards.numerals import UnreadableError
from ebpo_core.rewards.reading import read

# A little more than an answer may have, so that what is cut here is refused as too long, not judged by its beginning.
_WINDOW = MAX_LENGTH + 1
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LINE = re.compile(rf"[^\n]{{0,{_WINDOW}}}")
_WORDS = ("Answer", "answer", "ANSWER")
_ANSWER = re.compile(r"(?:Answer|answer|ANSWER)[*_}]*\s*:[\s*_}]*")
_DISPLAY = re.compile(rf"\\\[(.{{0,{_WINDOW}}}?)\\\]|\$\$(.{{0,{_WINDOW}}}?)\$\$", re.DOTALL)
_TAG = re.compile(rf"<answer>((?:(?!<answer>).){{0,{8 * _WINDOW}}}?)</answer>", re.DOTALL)
_HASHES = re.compile(r"(?<!#)####[ \t]*(?=[-+.0-9$£€\\])")
_MAX_HASHES = 8
_MAX_BOXES = 16
_EMPTY = re.compile(
    r"(?:\s|\\[,;:! ]|\\q?quad|\\text\{\s*\}|\{\}|\\[lc]?dots|\.{2,}|\?|_)*"
)  # "put it into \boxed{...}"
# What joins boxes to one list: commas, "and", line breaks, and a name for the next ("and y = ").
_JOINT = re.compile(
    r"(?:[\s$&;,]|\\\\|\\[()\[\],;: ]|\\q?quad(?![a-z])|\\text\{\s*(?:,|and|or)*\s*\}|\band\b|\bor\b)*", re.ASCII
)
_SPOKEN = re.compile(r"[^.!?\n\\]{0,30}\s(?:and|or)\s(?:\$|\\\()?\s*|\s*\\text\{[^{}.!?]{0,30}\b(?:and|or)\s*\}\s*")
_NAMED = re.compile(r"(?:[$\s,;]|\\[()])*(?:and|or|,)?(?:[$\s,;]|\\[()])*[A-Za-z](?:_\{?\w+\}?)?\s*=\s*")
_SENTENCE = re.compile(r"[\s*_]*(?:the\s+)?(?:final\s+)?answer[*_]*\s*(?::|is:?)[\s*_]*", re.IGNORECASE)
_MINERVA_END = re.compile(rf"inal answer is:?([^\n]{{1,{_WINDOW}}}?)\.?\s*I hope it is correct", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    r"""The final answer that ``text`` states.

    - ``\boxed{...}`` or ``\fbox{...}``: what is between balanced braces, of the last one that is not empty. Several
      that are joined by commas, "and" or line breaks are one list. A last box that never closes (a completion cut off
      at its limit) is no answer, and neither is a box before it.
    - ``<answer>...</answer>``, and in it a box.
    - ``#### ...``, GSM8K's form: the rest of the line, where that is one number. Other lines that begin so are
      headings, and only the last few are looked at.
    - ``The final answer is ... I hope it is correct``, Minerva's form.
    - ``Answer: ...``, also ``answer`` and ``ANSWER``, bold in Markdown or TeX, where there is no box: the rest of the
      line, or the next line that is not empty, or the display formula that begins there. A full stop at the end goes.

    Of the first three the last counts, and where there is none, of the others. Answers longer than ``MAX_LENGTH`` are
    cut just above that length.

    Returns:
        The answer without surrounding white space, or None where there is none. Never raises on text.
    """
    boxes = _boxes(text)
    if boxes is None:
        return None
    found: list[tuple[int, str]] = []
    if boxes:
        found.append((boxes[0][0], _as_list(boxes)))
    inside = range(boxes[0][0], boxes[0][1]) if boxes else range(0)
    tag = _last_tag(text)
    if tag is not None:
        content = tag[1].strip()
        if not boxes or boxes[0][0] < tag.start():
            found.append((tag.start(), content[: _WINDOW + 1]))
    for match in deque(_HASHES.finditer(text), _MAX_HASHES) if "####" in text else ():
        rest = _rest_of_line(text, match.end())
        if match.start() not in inside and _is_number(rest):
            found.append((match.start(), rest))
    if not boxes:
        for word in _WORDS:
            answer = _last(word, _ANSWER, text)
            if answer is not None and (tag is None or not tag.start() <= answer.start() < tag.end()):
                found.append((answer.start(), _after(text, answer.end())))
        minerva = _last("inal answer is", _MINERVA_END, text)
        if minerva is not None:
            found.append((minerva.start(), minerva[1]))
    if not found:
        return None
    return max(found)[1].strip() or None


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` as :func:`final_answer` reads it; None without a closed one."""
    boxes = _boxes(text)
    return _as_list(boxes) or None if boxes else None


def reference_answer(reference: Any) -> str:
    r"""The answer in a reference column: a number, the bare answer, or a solution that ends with one.

    ``\boxed{...}``, ``#### ...`` and "Answer: ..." mark an answer in a reference. A text without them is the answer
    itself. "" for None and NaN, which cannot be scored.

    Raises:
        TypeError: The reference is no text and no number, such as a dict.
    """
    if isinstance(reference, (list, tuple)) and len(reference) == 1:
        reference = reference[0]  # one answer in a list, as several data sets keep it
    if hasattr(reference, "item") and not isinstance(reference, (str, int, float)):
        reference = reference.item()  # a NumPy scalar
    if reference is None:
        return ""
    if isinstance(reference, bool) or not isinstance(reference, (str, Number)):
        raise TypeError(
            f"reference={str(reference)[:80]!r} is a {type(reference).__name__}: give the answer as text or a number"
        )
    if not isinstance(reference, str):
        if isinstance(reference, (int, Fraction)):
            return str(reference)
        return "" if isinstance(reference, float) and math.isnan(reference) else str(reference)
    text = reference
    if _last_box(text) is not None or "####" in text or "<answer>" in text:
        return final_answer(text) or text.strip()
    minerva = _last("inal answer is", _MINERVA_END, text)
    if minerva is not None:
        return minerva[1].strip()
    sentence = _SENTENCE.match(text)
    return text[sentence.end() :].strip() if sentence is not None else text.strip()


def _boxes(text: str) -> list[tuple[int, int, str]] | None:
    """The last boxes that are not empty and belong together: start, end, content; None where the last never closes."""
    found: list[tuple[int, int, str]] = []
    end_of_text = len(text)
    for _ in range(_MAX_BOXES * 4):
        box = _last_box(text, end_of_text)
        if box is None or len(found) >= _MAX_BOXES:
            break
        end = _closing_brace(text, box.end())
        if end is None:
            return found if found else None
        content = text[box.end() : end].strip()
        end_of_text = box.start()
        if _EMPTY.fullmatch(content):
            continue
        if found and end > found[0][0]:
            # Around what was found: the outer box is the answer, but for \boxed{\boxed{7}}.
            if content != text[found[0][0] : found[0][1] + 1]:
                found = [(box.start(), end, content)]
            continue
        if found and not _joined(text[end + 1 : found[0][0]]):
            break
        if not found or found[0][2] != content:
            found.insert(0, (box.start(), end, content))
        else:
            found[0] = (box.start(), found[0][1], content)
    return found


def _joined(between: str) -> bool:
    return len(between) <= 60 and any(joint.fullmatch(between) for joint in (_JOINT, _SPOKEN, _NAMED))


def _as_list(boxes: list[tuple[int, int, str]]) -> str:
    return ", ".join(content for _, _, content in boxes)[: max(_WINDOW, len(boxes[-1][2]))]


def _is_number(text: str) -> bool:
    try:
        return len(text) <= MAX_LENGTH and refusal(text) is None and read(text).number is not None
    except UnreadableError:
        return False


def _last_tag(text: str) -> re.Match[str] | None:
    start = text.rfind("<answer>")
    return _TAG.match(text, start) if start >= 0 else None


def _last_box(text: str, end: int | None = None) -> re.Match[str] | None:
    matches = (_last(word, _BOX, text, end) for word in ("\\boxed", "\\fbox"))
    return max((match for match in matches if match is not None), key=lambda match: match.start(), default=None)


def _last(word: str, pattern: re.Pattern[str], text: str, end: int | None = None) -> re.Match[str] | None:
    """The last match of a pattern before ``end``. Looking for the ``word`` it begins with first makes this quick."""
    end = len(text) if end is None else end
    while (position := text.rfind(word, 0, end)) >= 0:
        match = pattern.match(text, position)
        if match is not None:
            return match
        end = position
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one before ``start``, or the window's end; None if the text ends first."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + _WINDOW):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None if start + _WINDOW >= len(text) else start + _WINDOW


def _after(text: str, start: int) -> str:
    """A display formula after "Answer:", or the rest of the line; without the brace of ``\\textbf{Answer: 42}``."""
    display = _DISPLAY.match(text, start)
    if display is not None:
        return (display[1] or display[2] or "").strip()
    line = _rest_of_line(text, start).strip("*_")
    if line.endswith("}") and line.replace(r"\}", "").count("}") > line.replace(r"\{", "").count("{"):
        line = line[:-1]
    return line


def _rest_of_line(text: str, start: int) -> str:
    match = _LINE.match(text, start)
    return match[0].strip() if match else ""
