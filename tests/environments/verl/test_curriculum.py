"""verl's own data set, sampler and stateful loader over ``ebpo_core.curriculum``: order, resume, wrong options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerFast
from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
from verl.utils.dataset.rl_dataset import collate_fn

from ebpo_core.curriculum.samplers import CurriculumSampler

TOPICS = ["abc"[i % 3] for i in range(30)]
RATES = [(i * 7 % 11) / 10 for i in range(30)]
BATCH = 4
SPECIALS = {"pad_token": "<pad>", "eos_token": "<eos>"}

# torchdata calls a function that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIALS.values(), *map(str, range(30))])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)
    built.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return built


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [
        {
            "prompt": [{"role": "user", "content": str(i)}],
            "data_source": "test",
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "pass_rate": RATES[i],
            "extra_info": {"index": i, "topic": TOPICS[i]},
        }
        for i in range(30)
    ]
    path = tmp_path / "train.parquet"
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def config(file: str, curriculum: dict[str, Any] | None, **more: Any) -> Any:
    return OmegaConf.create(
        {
            "train_files": file,
            "train_batch_size": BATCH,
            "max_prompt_length": 16,
            "filter_overlong_prompts": False,
            "shuffle": False,
            "seed": None,
            "cache_dir": str(Path(file).parent / "cache"),
            "custom_cls": {"path": "pkg://ebpo_core.curriculum.verl", "name": "CurriculumDataset"},
            "curriculum": curriculum,
            **more,
        }
    )


def loader(settings: Any, tokenizer: Any) -> StatefulDataLoader:
    """As verl's trainers make it."""
    data = create_rl_dataset([settings.train_files], settings, tokenizer, None)
    return StatefulDataLoader(
        dataset=data,
        batch_size=settings.train_batch_size,
        num_workers=0,
        drop_last=True,
        collate_fn=collate_fn,
        sampler=create_rl_sampler(settings, data),
    )


def places(batch: dict[str, Any]) -> list[int]:
    return [int(info["index"]) for info in batch["extra_info"]]


def test_batches_of_one_topic(file: str, tokenizer: Any) -> None:
    settings = config(file, {"order": "topic", "topics": "extra_info.topic", "seed": 3})
    batches = [places(batch) for batch in loader(settings, tokenizer)]
    plan = CurriculumSampler(30, "topic", topics=TOPICS, batch_size=BATCH, seed=3).plan().tolist()
    assert batches == [plan[start : start + BATCH] for start in range(0, 28, BATCH)]
    assert [len({TOPICS[i] for i in batch}) for batch in batches[:6]] == [1] * 6


def test_easy_to_hard(file: str, tokenizer: Any) -> None:
    order = [i for batch in loader(config(file, {"order": "easy_to_hard"}), tokenizer) for i in places(batch)]
    rates = [RATES[i] for i in order]
    assert rates == sorted(rates, reverse=True)


def test_a_checkpoint_goes_on_in_the_same_order(file: str, tokenizer: Any) -> None:
    settings = config(file, {"order": "topic", "topics": "extra_info.topic"})
    whole = [places(batch) for batch in loader(settings, tokenizer)]
    first = loader(settings, tokenizer)
    steps = iter(first)
    seen = [places(next(steps)) for _ in range(3)]
    again = loader(settings, tokenizer)
    again.load_state_dict(first.state_dict())
    assert seen + [places(batch) for batch in again] == whole


def test_our_sampler_in_a_stateful_loader(file: str, tokenizer: Any) -> None:
    """torchdata saves and restores a sampler with a state of its own, with and without a worker that draws ahead."""
    for workers in (0, 1):

        def build(workers: int = workers) -> StatefulDataLoader:
            sampler = CurriculumSampler(30, "topic", topics=TOPICS, batch_size=BATCH, seed=1)
            return StatefulDataLoader(list(range(30)), batch_size=BATCH, sampler=sampler, num_workers=workers)

        whole = [batch.tolist() for batch in build()]
        first = build()
        steps = iter(first)
        seen = [next(steps).tolist() for _ in range(3)]
        again = build()
        again.load_state_dict(first.state_dict())
        assert seen + [batch.tolist() for batch in again] == whole


def test_validation_files_stay_as_they_are(file: str, tokenizer: Any) -> None:
    settings = config(file, {"order": "easy_to_hard"})
    settings.train_files = "another.parquet"
    data = create_rl_dataset([file], settings, tokenizer, None, is_train=False)
    assert [row["index"] for row in data.dataframe["extra_info"]] == list(range(30))


@pytest.mark.parametrize(
    ("curriculum", "more", "message"),
    [
        ({"order": "topic"}, {}, "no column 'topic'"),
        ({"order": "topic", "topics": "extra_info.subject"}, {}, "'subject'"),
        ({"order": "hard"}, {}, "order='hard'"),
        ({"oder": "topic"}, {}, r"data\.curriculum\.oder"),
        ({"order": "easy_to_hard"}, {"shuffle": True}, r"data\.shuffle=False"),
    ],
)
def test_wrong_options(
    file: str, tokenizer: Any, curriculum: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_rl_dataset([file], config(file, curriculum, **more), tokenizer, None)
