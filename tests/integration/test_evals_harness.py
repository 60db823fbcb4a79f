"""Log-likelihood tasks on hf + peft, by lm-eval: the fallback, and the oracle of the serving path."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.registry.base_family import load_base_family
from tests.corpus import make_adapter

ROOT = Path(__file__).parents[2]
BASE = ROOT / "build" / "models" / "smollm2-135m-instruct"
# In the form of ARC's rows, four choices each.
QUESTIONS = (
    ("Which of these is a source of light?", ("the Sun", "a mirror", "a stone", "the Moon"), "A"),
    ("What do plants take in through their roots?", ("light", "water", "sound", "wind"), "B"),
    ("Which animal lays eggs?", ("a dog", "a horse", "a hen", "a whale"), "C"),
    ("What happens to ice that is warmed?", ("It grows.", "It burns.", "It rusts.", "It melts."), "D"),
    ("Which tool measures temperature?", ("a ruler", "a thermometer", "a clock", "a scale"), "B"),
    ("Why does the Moon shine at night?", ("It burns.", "It is hot.", "It reflects sunlight.", "It is ice."), "C"),
)
ROWS = len(QUESTIONS)

TASK = {
    "output_type": "multiple_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "arc.jsonl"}},
    "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip

# Scores base, base again for half of the items, and the adapter; then one-token choices by the model class of ours
# against hf itself, through a stand-in for the serving path.
PROGRAM = """
import json, sys
from pathlib import Path
from evals.config import HarnessTask
from evals.harness import ClozeModel, load_harness_task, load_tokenizer, score_cloze, score_loglikelihood
from evals.items import ClozeItem
from evals.errors import SuiteInvalid
from evals.serving import NextToken, Target

folder, base, adapter = map(Path, sys.argv[1:])
task = HarnessTask(name="arc", config="arc.yaml", metric="acc_norm")
data = load_harness_task(folder, task)
found = {}
for name, path, items in (("base", None, data.items), ("half", None, data.items[::2]), ("adapter", adapter, data.items)):
    answers = score_loglikelihood(base, path, {"arc": (data, "acc_norm", items)}, dtype="float32")["arc"]
    found[name] = [a.model_dump() for a in answers]

class Local:
    asked = 0
    def next_tokens(self, target, questions, done):
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        Local.asked += len(questions)
        out = []
        for prompt, tokens in questions:
            with torch.inference_mode():
                values = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            out.append(NextToken({t: values[t].item() for t in tokens}, int(values.argmax()), "local"))
        return out

items = [ClozeItem(id="a", prompt="The capital of France is", choices=(" Paris", " London", " Rome"), answer=0),
         ClozeItem(id="b", prompt="2 + 1 = 3\\n2 + 2 = ", choices=("5", "4"), answer=1)]
model = ClozeModel(Local(), Target("x", "0" * 64), load_tokenizer(base), lambda n: None)
found["cloze"] = {a.item: a.logprobs for a in score_cloze(model, {"facts": items[:1], "sums": items[1:], "none": []})}
found["keys"] = [item.key for item in items]
found["asked"], found["engines"] = Local.asked, sorted(model.engines)
try:
    model.token("The capital of Mongolia is", " Ulaanbaatar")
except SuiteInvalid as error:
    found["refused"] = error.message
print(json.dumps(found))
"""


def rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"q-{number}",
            "question": question,
            "choices": {"text": list(choices), "label": list("ABCD")},
            "answerKey": answer,
        }
        for number, (question, choices, answer) in enumerate(QUESTIONS)
    ]


def write_task(folder: Path, **fields: Any) -> None:
    (folder / "arc.yaml").write_text(yaml.safe_dump({**TASK, **fields}))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    write_task(folder)
    adapter = make_adapter(folder / "adapter", load_base_family("smollm2-135m", BASE), seed=5, scale=0.8)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(BASE), str(adapter)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    data: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return data


@pytest.mark.heavy
def test_every_item_is_scored_under_its_own_name(found: dict[str, Any]) -> None:
    assert len({answer["item"] for answer in found["base"]}) == ROWS
    assert [a["item"] for a in found["adapter"]] == [a["item"] for a in found["base"]]
    assert all(len(answer["logprobs"]) == 4 and answer["is_right"] is not None for answer in found["base"])


@pytest.mark.heavy
def test_a_subset_is_scored_as_it_is_among_all(found: dict[str, Any]) -> None:
    whole = {answer["item"]: answer for answer in found["base"]}

    assert len(found["half"]) == ROWS // 2
    for answer in found["half"]:
        assert answer["is_right"] == whole[answer["item"]]["is_right"]
        assert answer["logprobs"] == pytest.approx(whole[answer["item"]]["logprobs"], abs=1e-2)


@pytest.mark.heavy
def test_the_adapter_is_really_applied(found: dict[str, Any]) -> None:
    gaps = [
        abs(a - b)
        for one, other in zip(found["base"], found["adapter"], strict=True)
        for a, b in zip(one["logprobs"], other["logprobs"], strict=True)
    ]

    assert min(gaps) > 1e-3


@pytest.mark.heavy
def test_one_token_choices_cost_one_request_each(found: dict[str, Any]) -> None:
    facts, sums = (found["cloze"][key] for key in found["keys"])

    assert found["asked"] == 2
    assert found["engines"] == ["local"]
    assert len(facts) == 3
    assert facts[0] > max(facts[1:])
    assert sums[1] > sums[0]


@pytest.mark.heavy
def test_a_choice_of_several_tokens_is_refused(found: dict[str, Any]) -> None:
    assert "' Ulaanbaatar' is not one token" in found["refused"]
