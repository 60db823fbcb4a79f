"""The only caller of lm-eval, by its Python API. It reseeds Python, numpy and torch: run it in a process of its own.

Never used: its caches (`use_cache` is keyed without the model, `cache_requests` without the data) and its standard
errors (neither paired nor clustered). Samples are logged, statistics are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tokenizers import Tokenizer

from .config import HarnessTask, suite_file
from .errors import SuiteInvalid
from .items import ClozeItem, digest_of, load_rows
from .scores import Answer
from .serving import NextToken, Serving, Target

CLOZE_TASK = Path(__file__).parent / "tasks" / "cloze.yaml"
VERSION: str = lm_eval.__version__
BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class HarnessData:
    """A task of lm-eval, read: its configuration without data, its rows by split, and a digest of both."""

    name: str
    config: Mapping[str, Any]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    digest: str

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of the rows that are scored, in their order."""
        return tuple(digest_of(row) for row in self.rows[self.config["test_split"]])


class ClozeModel(LM):
    """One request per question: the log-probabilities of all its one-token choices, from what is really served."""

    def __init__(self, serving: Serving, target: Target, tokenizer: Tokenizer, done: Callable[[int], None]) -> None:
        super().__init__()
        self._serving, self._target, self._tokenizer, self._done = serving, target, tokenizer, done
        self.engines: set[str] = set()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability, is it the greedy answer) of each (context, continuation)."""
        contexts: dict[str, dict[str, int]] = {}
        for request in requests:
            context, continuation = request.args
            contexts.setdefault(context, {})[continuation] = self.token(context, continuation)
        questions = [(self._ids(context, special=True), tuple(tokens.values())) for context, tokens in contexts.items()]
        answers = self._serving.next_tokens(self._target, questions, self._done)
        self.engines.update(answer.engine for answer in answers)
        by_context: dict[str, NextToken] = dict(zip(contexts, answers, strict=True))
        return [
            self._read(by_context[context], contexts[context][choice]) for context, choice in (r.args for r in requests)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: the serving path gives one token at a time."""
        raise NotImplementedError("perplexity is no one-token choice; use a check of kind loglikelihood")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Refused: generation has a check of its own."""
        raise NotImplementedError("generation is no one-token choice; use a check of kind target")

    def token(self, context: str, continuation: str) -> int:
        """The one token that a choice is after its context."""
        ids = self._ids(continuation, special=False)
        joined = self._ids(context + continuation, special=True)
        if len(ids) != 1 or joined != [*self._ids(context, special=True), *ids]:
            raise SuiteInvalid(
                f"choice {continuation!r} is not one token after {context[-60:]!r}; choose another word, "
                "or move the space into the prompt"
            )
        return ids[0]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    @staticmethod
    def _read(answer: NextToken, token: int) -> tuple[float, bool]:
        return answer.logprobs[token], answer.greedy == token


def load_tokenizer(base_model: Path) -> Tokenizer:
    """The base model's tokenizer, without loading a model."""
    return Tokenizer.from_file(str(base_model / "tokenizer.json"))


def score_cloze(model: ClozeModel, tasks: Mapping[str, Sequence[ClozeItem]]) -> tuple[Answer, ...]:
    """Answers under the items' keys; `logprobs` stand in the order of the item's choices."""
    template = yaml.safe_load(CLOZE_TASK.read_text())
    configs = [
        {**template, "task": name, "custom_dataset": _dataset({"test": [item.model_dump() for item in items]})}
        for name, items in tasks.items()
        if items
    ]
    samples = _evaluate(model, configs)
    return tuple(
        Answer(
            item=tasks[name][sample["doc_id"]].key,
            logprobs=tuple(float(value) for value, _ in sample["filtered_resps"]),
        )
        for name, found in samples.items()
        for sample in found
    )


def load_harness_task(folder: Path, task: HarnessTask) -> HarnessData:
    """Read a task's YAML and the JSONL it names; anything that is code (`!function`) or leads elsewhere is refused."""
    path = suite_file(folder, task.config)
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SuiteInvalid(
            f"{path} is not plain YAML (tags such as !function are code and not run): {error}"
        ) from error
    if not isinstance(config, dict) or config.pop("dataset_path", None) != "json":
        raise SuiteInvalid(f"{path}: dataset_path must be `json`, over files of the suite's folder")
    files = (config.pop("dataset_kwargs", None) or {}).get("data_files")
    split = config.get("test_split")
    if not isinstance(files, dict) or split not in files:
        raise SuiteInvalid(
            f"{path}: dataset_kwargs.data_files must map splits to files, test_split ({split!r}) among them"
        )
    rows = {name: [row for _, row in load_rows(suite_file(folder, file))] for name, file in files.items()}
    if len({digest_of(row) for row in rows[split]}) != len(rows[split]):
        raise SuiteInvalid(f"{folder / files[split]}: rows repeat themselves; remove the copies")
    return HarnessData(task.name, config, rows, digest_of([config, rows, task.metric]))


def score_loglikelihood(
    base_model: Path, adapter: Path | None, tasks: Mapping[str, tuple[HarnessData, str, Sequence[str]]], *, dtype: str
) -> dict[str, tuple[Answer, ...]]:
    """Answers by task, on hf + peft here and now. `tasks`: data, metric, and the items still wanted."""
    from lm_eval.models.huggingface import HFLM

    configs: list[dict[str, Any]] = []
    asked: dict[str, list[str]] = {}
    for name, (data, metric, wanted) in tasks.items():
        split = data.config["test_split"]
        chosen = [pair for pair in zip(data.items, data.rows[split], strict=True) if pair[0] in set(wanted)]
        asked[name] = [item for item, _ in chosen]
        if chosen:
            dataset = _dataset({**data.rows, split: [row for _, row in chosen]})
            configs.append(
                {**data.config, "task": name, "custom_dataset": dataset, "metric_list": [{"metric": metric}]}
            )
    if not configs:
        return dict.fromkeys(tasks, ())
    model = HFLM(
        pretrained=str(base_model), tokenizer=str(base_model), peft=str(adapter) if adapter else None,
        dtype=dtype, device="cpu", batch_size=BATCH_SIZE, trust_remote_code=False,
    )  # fmt: skip
    samples = _evaluate(model, configs)
    return {
        name: tuple(_judged(sample, asked[name], metric) for sample in samples.get(name, ()))
        for name, (_, metric, _) in tasks.items()
    }


def _judged(sample: Mapping[str, Any], asked: Sequence[str], metric: str) -> Answer:
    """One sample as the harness scored it. By its position: `datasets` fills missing keys, so the row itself may differ."""
    responses = sample["filtered_resps"]
    is_choice = bool(responses) and isinstance(responses[0], tuple | list)
    logprobs = tuple(float(value) for value, _ in responses) if is_choice else ()
    return Answer(item=asked[sample["doc_id"]], logprobs=logprobs, is_right=bool(sample[metric]))


def _evaluate(model: LM, configs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    if not configs:
        return {}
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(configs), bootstrap_iters=0, log_samples=True, use_cache=None, cache_requests=False,
        apply_chat_template=False,
    )  # fmt: skip
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    return samples


def _dataset(splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Callable[..., dict[str, Dataset]]:
    """Rows as lm-eval wants them, without the disk cache of `datasets`."""

    def load(**_: object) -> dict[str, Dataset]:
        return {split: Dataset.from_list([dict(row) for row in rows]) for split, rows in splits.items()}

    return load
