"""Rows to labelled tokens: every form that is documented, and what is masked, cut and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fusionroute_tiny import BOS, EOS, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ebpo_core.fusionroute.training.data import tokenize_pairs, tokenize_samples
from ebpo_core.fusionroute.training.sequences import PreferencePairs, TokenSequences

TOKENIZER = tiny_tokenizer(40)
USER, ASSISTANT = 4, 5
# As the paper's models have it: a mark after every turn, and replies inside generation blocks.
MARKED = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}>{% if m['role'] == 'assistant' %} {% generation %}"
    "{{ m['content'] }} <eos>{% endgeneration %}{% else %} {{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
# Writes earlier replies differently once a conversation goes on, as templates do that drop old reasoning.
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}>"
    "{% if m['role'] != 'assistant' or loop.last %} {{ m['content'] }}{% else %} w39{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def reply(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def one(row: dict[str, Any], tokenizer: Any = TOKENIZER, **options: Any) -> tuple[list[int], list[int]]:
    """(input_ids, ids that have a label) of one sample; the rest of the labels must be -100."""
    ids, labels = tokenize_samples([row], tokenizer, **options)[0]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return ids.tolist(), [int(label) for label in labels if label != -100]


def pair(row: dict[str, Any], **options: Any) -> list[tuple[list[int], list[int]]]:
    sequences = tokenize_pairs([row], TOKENIZER, **options).sequences
    return [(ids.tolist(), [int(x) for x in labels if x != -100]) for ids, labels in (sequences[0], sequences[1])]


def test_strings_end_with_eos_and_the_prompt_has_no_labels() -> None:
    assert one({"prompt": "w7 w8", "completion": " w9 w10"}) == ([BOS, 7, 8, 9, 10, EOS], [9, 10, EOS])
    assert one({"prompt": "w7", "completion": " w9 <eos>"}) == ([BOS, 7, 9, EOS], [9, EOS])
    # The first token cannot be predicted, so it has no label even where everything has one.
    assert one({"prompt": "w7", "completion": " w9"}, train_on="all") == ([BOS, 7, 9, EOS], [7, 9, EOS])


def test_chats_as_prompt_and_completion() -> None:
    expected = ([BOS, USER, 7, ASSISTANT, 9, EOS], [9, EOS])
    assert one({"prompt": [user("w7")], "completion": [reply("w9")]}) == expected
    assert one({"prompt": [user("w7")], "completion": "w9"}) == expected
    assert one({"prompt": "w7", "completion": [reply("w9")]}) == expected


@pytest.mark.parametrize("template", [None, MARKED], ids=["compared", "generation-blocks"])
def test_every_reply_of_messages_has_labels(template: str | None) -> None:
    tokenizer = tiny_tokenizer(40)
    tokenizer.chat_template = template or tokenizer.chat_template
    row = {"messages": [user("w7"), reply("w8 w9"), user("w10"), reply("w11")]}
    marks = [EOS] if template else []
    ids = [BOS, USER, 7, ASSISTANT, 8, 9, *marks, USER, 10, ASSISTANT, 11, EOS]
    assert one(row, tokenizer) == (ids, [8, 9, *marks, 11, EOS])
    assert one(row, tokenizer, train_on="all") == (ids, ids[1:])


def test_a_template_that_marks_the_end_gets_no_second_eos() -> None:
    tokenizer = tiny_tokenizer(40)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endfor %}", " w20{% endfor %}")
    assert one({"messages": [user("w7"), reply("w8")]}, tokenizer)[0] == [BOS, USER, 7, 20, ASSISTANT, 8, 20]


def test_a_template_whose_prefixes_change_is_refused() -> None:
    tokenizer = tiny_tokenizer(40)
    tokenizer.chat_template = FORGETFUL
    row = {"messages": [user("w7"), reply("w8"), user("w9"), reply("w10")]}
    with pytest.raises(ValueError, match=r"row 0: the chat template .* message 1 .*generation"):
        one(row, tokenizer)
    assert one(row, tokenizer, train_on="all")[0] == [BOS, USER, 7, ASSISTANT, 39, USER, 9, ASSISTANT, 10, EOS]


def test_a_text_is_learnt_whole() -> None:
    assert one({"text": "w7 w8"}) == ([BOS, 7, 8, EOS], [7, 8, EOS])
    assert one({"text": "w7 <eos>"}) == ([BOS, 7, EOS], [7, EOS])
    assert one({"text": "w7", "messages": [user("w8"), reply("w9")]})[0] == [BOS, USER, 8, ASSISTANT, 9, EOS]


def test_sharegpt_is_messages_under_other_names() -> None:
    turns = [("human", "w7"), ("gpt", "w9"), ("human", "w8"), ("gpt", "w10")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    messages = [user("w7"), reply("w9"), user("w8"), reply("w10")]
    assert one(row) == one({"messages": messages})
    assert one({"conversations": messages}) == one({"messages": messages})
    assert one({"conversations": [{"from": "user", "value": "w7"}, {"from": "assistant", "value": "w9"}]}) == one(
        {"messages": messages[:2]}
    )
    system = {"role": "system", "content": "w20"}
    assert one({**row, "system": "w20"}) == one({"messages": [system, *messages]})
    assert one({**row, "system": ""}) == one(row)
    sides = {"chosen": {"from": "gpt", "value": "w10"}, "rejected": {"from": "gpt", "value": "w11"}}
    ranked = {"conversations": row["conversations"][:3], **sides}
    assert pair(ranked) == pair({"prompt": messages[:3], "chosen": "w10", "rejected": "w11"})
    with pytest.raises(ValueError, match=r"row 0: from='narrator': use one of \['assistant', 'gpt', 'human'"):
        one({"conversations": [{"from": "narrator", "value": "w7"}]})
    with pytest.raises(ValueError, match="row 0: None is a NoneType: give a string"):
        one({"conversations": [{"from": "human"}, {"from": "gpt", "value": "w9"}]})
    with pytest.raises(ValueError, match="row 0: 7 is a int: give a string"):
        one({"text": 7})


def test_arguments_of_the_template() -> None:
    tokenizer = tiny_tokenizer(40)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token }} {{ tone }}")
    row = {"messages": [user("w7"), reply("w8")]}
    assert one(row, tokenizer, chat_template_kwargs={"tone": "w30"})[0][:2] == [BOS, 30]


def test_tokenized_rows_are_taken_as_they_are() -> None:
    assert one({"input_ids": [5, 6, 7], "labels": [5, -100, 7]}) == ([5, 6, 7], [7])
    padded = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    assert one(padded, tokenizer=None) == ([5, 6, 7], [6, 7])
    for array in (np.array, np.float32):
        assert one({"input_ids": array([5, 6]), "labels": array([-100, 6])}) == ([5, 6], [6])
    assert one({"input_ids": [[5, 6]], "labels": [[-100.0, 6.0]]}) == ([5, 6], [6])  # a batch of one; a nullable column


def test_pairs_in_every_form() -> None:
    expected = [([BOS, 7, 8, 9, EOS], [9, EOS]), ([BOS, 7, 8, 10, 11, EOS], [10, 11, EOS])]
    assert pair({"prompt": "w7 w8", "chosen": " w9", "rejected": " w10 w11"}) == expected
    assert pair({"chosen": "w7 w8 w9", "rejected": "w7 w8 w10 w11"}) == expected
    ids = {"prompt_ids": [BOS, 7, 8], "chosen_ids": [9, EOS], "rejected_ids": [10, 11, EOS]}
    assert pair(ids) == expected

    head = [BOS, USER, 7, ASSISTANT]
    expected = [([*head, 9, EOS], [9, EOS]), ([*head, 10, EOS], [10, EOS])]
    assert pair({"prompt": [user("w7")], "chosen": [reply("w9")], "rejected": [reply("w10")]}) == expected
    assert pair({"prompt": [user("w7")], "chosen": "w9", "rejected": "w10"}) == expected
    whole = {"chosen": [user("w7"), reply("w9")], "rejected": [user("w7"), reply("w10")]}
    assert pair(whole) == expected
    assert pair(whole | {"prompt": "w7"}) == expected  # as UltraFeedback's binarized form repeats it
    assert pair({"prompt": "w7", "chosen": [reply("w9")], "rejected": [reply("w10")]}) == expected


def test_sides_of_which_one_begins_the_other() -> None:
    assert pair({"chosen": "w7 w8", "rejected": "w7 w8 w9"}) == [
        ([BOS, 7, 8, EOS], [EOS]),
        ([BOS, 7, 8, 9, EOS], [9, EOS]),
    ]
    assert pair({"chosen": "w7", "rejected": "w7"}) == [([BOS, 7, EOS], [EOS])] * 2


def test_cutting_is_counted_and_what_is_left_empty_is_dropped() -> None:
    rows = [
        {"prompt": "w7", "completion": " w9"},  # 4 tokens
        {"prompt": "w7", "completion": " w9 w10 w11"},  # 6: cut
        {"prompt": "w7 w8 w9 w10", "completion": " w11"},  # 7: only prompt left
    ]
    data = tokenize_samples(rows, TOKENIZER, max_length=5)
    assert (len(data), data.truncated, data.dropped) == (2, 2, 1)
    assert data[1][0].tolist() == [BOS, 7, 9, 10, 11]
    assert tokenize_samples(rows, TOKENIZER).truncated == 0

    pairs = [
        {"prompt": "w7", "chosen": " w8", "rejected": " w9 w10 w11"},  # 4 and 6: one side cut
        {"prompt": "w7 w8 w9 w10", "chosen": " w11", "rejected": " w12"},  # both sides only prompt: dropped
    ]
    kept = tokenize_pairs(pairs, TOKENIZER, max_length=5)
    assert (len(kept), kept.sequences.truncated, kept.sequences.dropped) == (1, 3, 1)
    assert kept.sequences[1][0].tolist() == [BOS, 7, 9, 10, 11]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "w7"}, r"row 1: columns \['body'\]: a row of SFT data must be one of .*messages"),
        ({"input_ids": [5, 6]}, "row 1: input_ids without labels"),
        ({"input_ids": [5, 6], "labels": [5]}, "row 1: 2 input_ids and 1 labels"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "row 1: nothing to learn"),
        ({"messages": []}, "row 1: .* is not a list of messages"),
        ({"messages": ["w7"]}, "row 1: .* is not a list of messages"),
        ({"messages": 7}, "row 1: 7 is not a list of messages"),
        ({"prompt": "w7", "completion": 8}, "row 1: 8 is not a list of messages"),
        ({"conversations": [{"from": ["gpt"], "value": "w7"}]}, r"row 1: from=\['gpt'\]: use one of"),
        ({"text": "w7 \ud800"}, "row 1: the tokenizer or its chat template does not take it"),
        ({"input_ids": [5, 6.5], "labels": [5, 6]}, r"row 1: input_ids is \[5, 6.5\]: give a list of whole numbers"),
        ({"input_ids": [5, None], "labels": [5, 6]}, "row 1: input_ids is"),
        ({"input_ids": [5, 2**40], "labels": [5, 6]}, r"row 1: input_ids is \[5, 1099511627776\]: .* below 2\*\*31"),
        ({"input_ids": [5, 2**70], "labels": [5, 6]}, "row 1: input_ids is"),
        ({"input_ids": [5, 6], "labels": [5, float("nan")]}, "row 1: labels is"),
        ({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [7, 8]]}, "row 1: input_ids is"),
        ({"input_ids": [[5, 6], [7]], "labels": [[5, 6], [7]]}, "row 1: input_ids is"),
        (
            {"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1]},
            "row 1: 2 input_ids and an attention_mask",
        ),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "w7", "completion": " w8"}
    with pytest.raises(ValueError, match=message):
        tokenize_samples([good, row], TOKENIZER)


def test_what_a_chat_template_refuses_is_named_by_its_row() -> None:
    """As Gemma's does a system message; and what it cannot write."""
    tokenizer = tiny_tokenizer(40)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ ' ' + m['content'] }}{% endfor %}"
    )
    good = {"messages": [user("w7"), reply("w8")]}
    bad = {"messages": [{"role": "system", "content": "w9"}, *good["messages"]]}
    with pytest.raises(ValueError, match=r"row 1: the tokenizer or its chat template .*\(no system role\)"):
        tokenize_samples([good, bad], tokenizer)
    with pytest.raises(ValueError, match="row 0: the tokenizer or its chat template"):
        tokenize_samples([{"messages": [{"role": "user", "content": None}, reply("w8")]}], tokenizer)


def test_pairs_that_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0: chosen_ids is None: give a list of whole numbers"):
        tokenize_pairs([{"prompt_ids": [5], "rejected_ids": [6]}], TOKENIZER)
    with pytest.raises(ValueError, match=r"row 0: columns \['prompt'\]: a row of preference data must be one of"):
        tokenize_pairs([{"prompt": "w7"}], TOKENIZER)
    with pytest.raises(ValueError, match="no first message in common"):
        tokenize_pairs([{"chosen": [reply("w7")], "rejected": [reply("w8")]}], TOKENIZER)
    with pytest.raises(ValueError, match="pass processing_class"):
        tokenize_pairs([{"chosen": "w7", "rejected": "w8"}], None)
    for length in (1, 3.5, "8"):
        with pytest.raises(ValueError, match=f"max_length={length!r}: give a whole number of at least 2"):
            tokenize_pairs([], TOKENIZER, max_length=length)  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer(40)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_samples([{"prompt": "w7", "completion": " w8"}], tokenizer)


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 39), st.booleans()), min_size=1, max_size=9), min_size=0, max_size=6
)


@given(sequences)
def test_sequences_hold_what_they_were_given(rows: list[list[tuple[int, bool]]]) -> None:
    given_rows = [([t for t, _ in row], [t if own else -100 for t, own in row]) for row in rows]
    data = TokenSequences.of(given_rows)
    assert len(data) == len(rows)
    for i, (ids, labels) in enumerate(given_rows):
        assert data[i][0].tolist() == ids
        assert data[i][1].tolist() == [-100, *labels[1:]]
        assert data.label_counts[i] == sum(label != -100 for label in labels[1:])
    assert data.lengths.tolist() == [len(row) for row in rows]
    with pytest.raises(IndexError):
        data[len(data)]


def test_the_fingerprint_sees_ids_labels_and_boundaries() -> None:
    base = TokenSequences.of([([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5])])
    same = TokenSequences.of([([1, 2, 3], [1, 2, 3]), ([4, 5], [4, 5])])  # first labels never count
    assert base.fingerprint == same.fingerprint
    others = [
        [([1, 2, 4], [-100, 2, 4]), ([4, 5], [-100, 5])],
        [([1, 2, 3], [-100, -100, 3]), ([4, 5], [-100, 5])],
        [([1, 2], [-100, 2]), ([3, 4, 5], [-100, 4, 5])],
        [([4, 5], [-100, 5]), ([1, 2, 3], [-100, 2, 3])],
    ]
    assert len({base.fingerprint, *[TokenSequences.of(rows).fingerprint for rows in others]}) == 5


def test_ids_outside_the_shared_vocabulary_are_named() -> None:
    rows = [([1, 2], [-100, 2]), ([3, 9, 4], [-100, -100, 4])]
    TokenSequences.of(rows).check(10)
    with pytest.raises(ValueError, match=r"sequence 1: input id 9 .* position 1: .* vocab_size=9"):
        TokenSequences.of(rows).check(9)
    with pytest.raises(ValueError, match="sequence 0: input id 1 with label 30"):
        TokenSequences.of([([0, 1], [-100, 30])]).check(9)
    with pytest.raises(ValueError, match="sequence 1 has no label"):
        TokenSequences.of([([0, 1], [-100, 1]), ([0, 1], [0, -100])]).check(9)
    with pytest.raises(ValueError, match="row 0: 2 input_ids and 1 labels"):
        TokenSequences.of([([1, 2], [1])])
    with pytest.raises(ValueError, match="sequences has 1 rows"):
        PreferencePairs(TokenSequences.of([([1, 2], [1, 2])]))
