"""The demo's problems: three procedural domains over one character tokenizer, and problems that mix two domains.

======== =========== ================ ===================================================
domain   prompt      answer           what is asked for
======== =========== ================ ===================================================
add      ``A12+34:`` ``A12+34=046``   the sum, in three digits
reverse  ``Rabcde:`` ``Rabcde=edcba`` the letters from last to first
caesar   ``Cabcde:`` ``Cabcde=defgh`` each letter three places on, around the alphabet a..j
======== =========== ================ ===================================================

An answer repeats its question, as worked answers do, so that it reads the same wherever it stands. A problem with two
questions, ``A12+34;Rabcde:``, wants both in order, ``A12+34=046;Rabcde=edcba``. Two questions of one domain are a
"pair"; two of different domains are "mixed", and no model that knows one domain alone can answer them. Answers are
strict: one text a problem is right.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, NamedTuple

from ebpo_core.data import Problem
from ebpo_core.tasks.splits import check_choice, split_of
from ebpo_core.tasks.tiny_model import word_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghij"
DIGITS = "0123456789"
WORD_LENGTH = 5
CAESAR_SHIFT = 3

DOMAINS: tuple[str, ...] = ("add", "reverse", "caesar")
PAIRS: tuple[str, ...] = tuple(f"{domain} pair" for domain in DOMAINS)
MIXED = "mixed"
KINDS: tuple[str, ...] = (*DOMAINS, *PAIRS, MIXED)

MAX_ANSWER_TOKENS = 2 * (2 * WORD_LENGTH + 2) + 2
"""Tokens of the longest answer: twice ``Rabcde=edcba``, the ";" between them and the end-of-sequence token."""


class Question(NamedTuple):
    """One question: its domain and its argument, ``12+34`` of an addition, a word of the others."""

    domain: str
    argument: str

    @property
    def text(self) -> str:
        return self.domain[0].upper() + self.argument

    @property
    def result(self) -> str:
        if self.domain == "add":
            left, right = map(int, self.argument.split("+"))
            return f"{left + right:03d}"
        if self.domain == "reverse":
            return self.argument[::-1]
        return "".join(LETTERS[(LETTERS.index(letter) + CAESAR_SHIFT) % len(LETTERS)] for letter in self.argument)

    @property
    def key(self) -> str:
        """The question's identity; the two orders of a sum are one question."""
        return f"A{'+'.join(sorted(self.argument.split('+')))}" if self.domain == "add" else self.text


def compose(*questions: Question) -> Problem:
    """The problem of one or two questions to be answered in order; its topic is one of :data:`KINDS`."""
    domains = {question.domain for question in questions}
    kind = MIXED if len(domains) > 1 else questions[0].domain + (" pair" if len(questions) > 1 else "")
    prompt = ";".join(question.text for question in questions) + ":"
    answer = ";".join(f"{question.text}={question.result}" for question in questions)
    return Problem(prompt, prompt, answer, topic=kind)


def draw_question(rng: random.Random, domain: str, split: str) -> Question:
    """Draw one question of a split, "train" or "test"; which of the two it is in depends on the question alone."""
    while True:
        if domain == "add":
            argument = f"{rng.randrange(100):02d}+{rng.randrange(100):02d}"
        else:
            argument = "".join(rng.choice(LETTERS) for _ in range(WORD_LENGTH))
        question = Question(domain, argument)
        if split_of(question.key) == split:
            return question


def generate(size: int, seed: int, split: str, kinds: Sequence[str] = KINDS) -> Iterator[Problem]:
    """Draw ``size`` problems, the kinds taking turns, so that they are equally frequent.

    No question of a "test" problem, alone or beside another, is in any "train" problem, whatever the seeds and sizes.
    Problems are drawn independently and can repeat.

    Raises:
        ValueError: a kind or split that there is not.
    """
    check_choice("kinds", kinds, KINDS)
    check_choice("split", [split], ["train", "test"])
    rng = random.Random(f"fusionroute demo {split} {seed}")  # noqa: S311 -- problems, not cryptography
    for index in range(size):
        kind = kinds[index % len(kinds)]
        domains = rng.sample(DOMAINS, 2) if kind == MIXED else [kind.removesuffix(" pair")] * (1 + (kind in PAIRS))
        yield compose(*(draw_question(rng, domain, split) for domain in domains))


def corrupted(problem: Problem, rng: random.Random) -> str:
    """A plausible wrong answer: one character of one result replaced by another digit or letter."""
    answer: str = problem.answer
    # Results are what follows each "=", up to the next question.
    results = re.finditer(r"(?<==)[^;]+", answer)
    place = rng.choice([place for result in results for place in range(*result.span())])
    right = answer[place]
    wrong = rng.choice([other for other in (DIGITS if right in DIGITS else LETTERS) if other != right])
    return answer[:place] + wrong + answer[place + 1 :]


def sft_rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    """Rows with the columns ``prompt`` and ``completion``."""
    return [{"prompt": problem.text, "completion": problem.answer} for problem in problems]


def preference_rows(problems: Sequence[Problem], answers: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Rows with the columns ``prompt``, ``chosen`` and ``rejected`` for DPO and CDPO, one for each problem.

    The right answer is chosen. What is rejected is the answer that a model gave, where that is wrong; else the right
    answer :func:`corrupted`, by a generator of this seed.
    """
    rng = random.Random(f"fusionroute demo corrupted {seed}")  # noqa: S311
    return [
        {
            "prompt": problem.text,
            "chosen": problem.answer,
            "rejected": answer if answer != problem.answer else corrupted(problem, rng),
        }
        for problem, answer in zip(problems, answers, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character; it puts a ``<bos>`` in front and decodes without spaces."""
    from tokenizers import Regex
    from tokenizers.decoders import Fuse
    from tokenizers.pre_tokenizers import Split

    marks = [domain[0].upper() for domain in DOMAINS]
    return word_tokenizer([*DIGITS, *LETTERS, *marks, *"+;:="], Split(Regex("."), "isolated"), Fuse())
