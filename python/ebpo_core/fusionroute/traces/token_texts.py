"""The part of a decoded text that each token adds, for tokens that may end inside a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Decoding restarts from a recent token after this many, so that the texts of n tokens cost O(n), not O(n^2).
_WINDOW = 64


def token_texts(decode: Callable[[list[int]], str], context: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The pieces that ``ids`` add to the decoded text after ``context``; the pieces always concatenate to the whole.

    Token i ends where the decoding of the tokens up to i leaves the decoding of all of them: an incomplete character
    decodes to U+FFFD and therefore ends before it. This asks nothing of the tokenizer but ``decode``.

    Args:
        decode: From ids to text; [] gives "".
        context: Ids before the first token, whose text is nobody's.
        ids: The tokens.
    """
    whole = [*context, *ids]
    text = decode(whole)
    end = _common_prefix(decode(list(context)), text, 0)
    anchor, shift = 0, 0  # the decoding of whole[anchor:] is text[shift:]
    pieces = []
    for index in range(len(context), len(whole)):
        seen = decode(whole[anchor : index + 1])
        reached = shift + _common_prefix(seen, text[shift:], end - shift)
        clean = reached == shift + len(seen)
        reached = max(end, reached)
        pieces.append(text[end:reached])
        if clean and index - anchor >= _WINDOW:
            tail = decode(whole[index:])
            moved = len(text) - len(tail)
            # A tokenizer that drops the first word's space has moved past it; any other disagreement keeps the anchor.
            if text.endswith(tail) and shift <= moved <= reached:
                anchor, shift = index, moved
        end = reached
    return pieces


def _common_prefix(a: str, b: str, start: int) -> int:
    """Length of the longest common prefix of two strings which are the same up to ``start``, if they are."""
    if not a.startswith(b[:start]):
        return min(start, len(a))
    end = start
    while end < len(a) and end < len(b) and a[end] == b[end]:
        end += 1
    return end
