r"""The published forms of mathematical data sets: which columns each has, and how a row becomes a :class:`Problem`.

Prompts: forms that carry whole prompts (verl, DAPO, problem) are kept as they are, DAPO's instruction to end on
``Answer: $Answer`` included. All others get ``BOXED`` after the question. ``ebpo_core.rewards`` reads both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ebpo_core.data.problem import Problem, with_instruction
from ebpo_core.rewards.extraction import final_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Schema:
    """The marks of a form: all columns of ``needs``, none of ``lacks``, and a first row for which ``mark`` holds."""

    needs: frozenset[str]
    lacks: frozenset[str] = frozenset()
    mark: Callable[[Mapping[str, Any]], bool] = field(default=lambda _: True)

    def fits(self, columns: set[str], first: Mapping[str, Any]) -> bool:
        return self.needs <= columns and not self.lacks & columns and self.mark(first)


@dataclass(frozen=True)
class Format:
    """A published form.

    ``question``, ``answer``, ``topic``, ``level`` and ``id`` name columns, the first of which that a row has is taken;
    or they are functions of a row. ``whole`` marks prompts that already hold their instruction. ``repeats`` marks sets
    that repeat rows. ``leaves_out`` says of a row that nothing can be verified in it, such as a proof; it is skipped.
    """

    schemas: tuple[Schema, ...]
    question: tuple[str, ...] | Callable[[Mapping[str, Any]], Any]
    answer: tuple[str, ...] | Callable[[Mapping[str, Any]], Any]
    topic: tuple[str, ...] | Callable[[Mapping[str, Any]], Any] = ()
    level: tuple[str, ...] | Callable[[Mapping[str, Any]], Any] = ()
    id: tuple[str, ...] | Callable[[Mapping[str, Any]], Any] = ()
    source: tuple[str, ...] = ()
    whole: bool = False
    repeats: bool = False
    leaves_out: Callable[[Mapping[str, Any]], bool] = field(default=lambda _: False)

    def problem(self, row: Mapping[str, Any], number: int, source: str, instruction: str | None) -> Problem:
        """The problem in one row; ``number`` counts rows from 0.

        Raises:
            ValueError: The row has no question or no answer, or needs an image.
        """
        where = f"row {number} of {source}"
        if any(row.get(column) for column in row if re.fullmatch(r"images?(_\d+)?", column)):
            raise ValueError(
                f"{where}: the problem needs an image, which a text prompt cannot hold; read a text-only set"
            )
        question = _text(_take(self.question, row))
        if not question:
            raise ValueError(f"{where}: no question; columns are {sorted(row)}")
        answer = _text(_take(self.answer, row))
        if not answer:
            raise ValueError(
                f"{where}: no answer to compare with (a proof, or a row of another kind?); columns are {sorted(row)}"
            )
        level = _text(_take(self.level, row))
        return Problem(
            id=_text(_take(self.id, row)) or f"{source}/{number}",
            prompt=question if self.whole else with_instruction(question, instruction),
            answer=answer,
            topic=_text(_take(self.topic, row)) or None,
            level=level.removeprefix("Level ") or None,
            source=_text(_take(self.source, row)) or source,
        )


def _take(where: tuple[str, ...] | Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any]) -> Any:
    if callable(where):
        return where(row)
    return next((row[column] for column in where if row.get(column) is not None), None)


def _text(value: Any) -> str:
    """A cell as text. AMC's answers are floats: 142.0 is the answer 142."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _messages(value: Any) -> str:
    """A prompt in text, or the content of its one message."""
    if isinstance(value, str) or not value:
        return value or ""
    if len(value) > 1 or value[0]["role"] != "user":
        raise ValueError(
            f"a prompt of the messages {[message['role'] for message in value]}: a problem is one user message; "
            "drop the others (a system message can be given to to_rows and write_verl_parquet)"
        )
    return str(value[0]["content"])


def _extra(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: (row.get("extra_info") or {}).get(name)


def _after_hashes(row: Mapping[str, Any]) -> str:
    """GSM8K's answer: after the last "####" of the solution, without thousands' commas."""
    _, found, answer = str(row["answer"]).rpartition("####")
    return answer.strip().replace(",", "") if found else ""


def _given_or_boxed(row: Mapping[str, Any]) -> Any:
    """The answer's column, or the final answer of the solution where there is none."""
    given = _take(("Answer", "answer"), row)
    return final_answer(str(row.get("solution"))) if given is None else given


def _list(value: Any) -> str:
    """OlympiadBench's answers: a list of texts in dollar signs, all of which belong to the answer."""
    return ", ".join(str(part).strip().strip("$").strip() for part in value or ())


def _domain(row: Mapping[str, Any]) -> str:
    """Big-Math's topic: the second step of "Mathematics -> Algebra -> ...", of the first domain."""
    parts = [part.strip() for part in str(next(iter(row.get("domain") or ()), "")).split("->")]
    return parts[1] if len(parts) > 1 else parts[0]


def _unverifiable(row: Mapping[str, Any]) -> bool:
    """NuminaMath's rows without an answer: proofs, problems marked as faulty, solutions that end without a box."""
    answer = _text(_given_or_boxed(row))
    return (
        answer.lower() in ("", "proof", "notfound")
        or row.get("question_type") == "proof"
        or "No" in (row.get("problem_is_valid"), row.get("solution_is_valid"))
    )


def _is_text(column: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: isinstance(row.get(column), str)


def _has_hashes(row: Mapping[str, Any]) -> bool:
    return "####" in str(row.get("answer"))


def _schema(needs: str, lacks: str = "", mark: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> Schema:
    return Schema(frozenset(needs.split()), frozenset(lacks.split()), mark)


FORMATS: dict[str, Format] = {
    # openai/gsm8k
    "gsm8k": Format(
        schemas=(_schema("question answer", "final_answer", _has_hashes),),
        question=("question",),
        answer=_after_hashes,
    ),
    # BytedTsinghua-SIA/DAPO-Math-17k, its AIME-2024, and any file for verl's RLHFDataset
    "verl": Format(
        schemas=(_schema("prompt reward_model", "", lambda row: not isinstance(row.get("prompt"), str)),),
        question=lambda row: _messages(row["prompt"]),
        answer=lambda row: (row["reward_model"] or {}).get("ground_truth"),
        topic=_extra("topic"),
        level=_extra("level"),
        id=lambda row: _extra("id")(row) or _extra("index")(row),
        source=("data_source",),
        whole=True,
        repeats=True,
    ),
    # open-r1/DAPO-Math-17k-Processed: the bare problem is in "prompt", DAPO's own prompt in "source_prompt"
    "dapo-processed": Format(
        schemas=(_schema("prompt solution source_prompt", "", _is_text("prompt")),),
        question=lambda row: _messages(row["source_prompt"]),
        answer=("solution",),
        id=_extra("index"),
        whole=True,
        repeats=True,
    ),
    # Maxwell-Jia/AIME_2024, HuggingFaceH4/aime_2024, math-ai/aime24 and aime25, MathArena/aime_2025,
    # opencompass/AIME2025
    "aime": Format(
        schemas=(
            _schema("ID Problem Answer"),
            _schema("problem answer year", "subject level"),
            _schema("problem answer problem_idx"),
            _schema("id problem answer", "url year solution subject level problem_idx"),
            _schema("id problem solution url", "year subject level problem_idx"),
            _schema("question answer", "id url final_answer", lambda row: not _has_hashes(row)),
        ),
        question=("Problem", "problem", "question"),
        answer=_given_or_boxed,
        id=("ID", "id"),
    ),
    # AI-MO/aimo-validation-amc, math-ai/amc23
    "amc": Format(
        schemas=(
            _schema("id problem answer url", "year solution"),
            _schema("id question answer url", "year solution"),
        ),
        question=("problem", "question"),
        answer=("answer",),
        id=("id",),
    ),
    # HuggingFaceH4/MATH-500, nlile/hendrycks-MATH-benchmark
    "math": Format(
        schemas=(
            _schema("problem solution answer subject level"),
            _schema("problem solution answer type level", "subject"),
            _schema("problem solution type level", "answer subject"),
        ),
        question=("problem",),
        answer=_given_or_boxed,
        topic=("subject", "type"),
        level=("level",),
        id=("unique_id",),
    ),
    # Hothan/OlympiadBench, the open-ended (OE) text-only (TO) configurations
    "olympiadbench": Format(
        schemas=(_schema("question final_answer subfield"),),
        question=lambda row: "\n\n".join(_text(row.get(part)) for part in ("context", "question") if row.get(part)),
        answer=lambda row: _list(row["final_answer"]),
        topic=("subfield",),
        level=("difficulty",),
        id=("id",),
    ),
    # agentica-org/DeepScaleR-Preview-Dataset
    "deepscaler": Format(
        schemas=(
            _schema("problem answer solution", "ID id url year subject level type problem_type domain uuid messages"),
        ),
        question=("problem",),
        answer=("answer",),
    ),
    # AI-MO/NuminaMath-1.5, NuminaMath-CoT and NuminaMath-TIR
    "numinamath": Format(
        schemas=(
            _schema("problem solution answer problem_type question_type", "generations"),
            _schema("problem solution messages", "generations answer"),
        ),
        question=("problem",),
        answer=_given_or_boxed,
        topic=("problem_type",),
        source=("source",),
        leaves_out=_unverifiable,
    ),
    # open-r1/OpenR1-Math-220k
    "openr1": Format(
        schemas=(_schema("problem answer generations uuid"),),
        question=("problem",),
        answer=("answer",),
        topic=("problem_type",),
        id=("uuid",),
        source=("source",),
        leaves_out=_unverifiable,
    ),
    # SynthLabsAI/Big-Math-RL-Verified
    "big-math": Format(
        schemas=(_schema("problem answer source domain"),),
        question=("problem",),
        answer=("answer",),
        topic=_domain,
        source=("source",),
    ),
    # Minerva's MATH and undergraduate STEM sets as evaluations copy them, and any bare problems with answers
    "minerva": Format(
        schemas=(
            _schema("problem solution type idx", "level answer"),
            _schema(
                "problem answer",
                "ID id idx year url solution subject level type problem_idx problem_type domain generations uuid "
                "prompt",
            ),
        ),
        question=("problem",),
        answer=_given_or_boxed,
        topic=("type",),
        id=("idx",),
    ),
    # Problem's own fields, one object a line
    "problem": Format(
        schemas=(_schema("prompt answer", "reward_model source_prompt"),),
        question=lambda row: _messages(row["prompt"]),
        answer=("answer",),
        topic=("topic",),
        level=("level",),
        id=("id",),
        source=("source",),
        whole=True,
    ),
}


def detect(columns: set[str], first: Mapping[str, Any], name: str) -> str:
    """The form of a data set from its columns and first row.

    Raises:
        ValueError: No form fits, or several do.
    """
    fitting = [key for key, form in FORMATS.items() if any(schema.fits(columns, first) for schema in form.schemas)]
    if len(fitting) == 1:
        return fitting[0]
    found = f"is ambiguous between {fitting}" if fitting else "is not known"
    known = "; ".join(
        f"{key}: {' or '.join('{' + ', '.join(sorted(schema.needs)) + '}' for schema in form.schemas)}"
        for key, form in FORMATS.items()
    )
    raise ValueError(
        f"{name}: the form of this data set {found}; its columns are {sorted(columns)}. "
        f"Pass format= one of these, or rename columns: {known}"
    )
