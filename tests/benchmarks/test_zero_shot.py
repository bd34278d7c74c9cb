"""The task files on local documents: what lm-eval asks of them, and paired differences of the answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from zero_shot import TEMPLATES, answer, differences, scores, task_mean, write_tasks

from smolseek.evaluation.paired import Estimate, estimate
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer

CHOICE = {"query": "Question: Anna sees\n", "choices": ["a ball", "the cat"], "gold": 1}
CONTEXTS = {
    "context_options": ["Anna sees Ben so Anna", "Anna sees Ben so Ben"],
    "continuation": "finds it.",
    "gold": 1,
}
WORD = {"context": "Anna sees the", "continuation": "cat"}
METRICS = {
    "arc_challenge acc_norm",
    "arc_easy acc",
    "hellaswag acc_norm",
    "lambada_openai acc",
    "openbook_qa acc_norm",
    "piqa acc_norm",
    "winogrande acc",
}


def write_documents(folder: Path, rows: int = 3) -> Path:
    """Writes a file of documents for every task and returns the folder."""
    folder.mkdir()
    kinds: dict[str, dict[str, Any]] = {"winogrande": CONTEXTS, "lambada_openai": WORD}
    for name in TEMPLATES:
        lines = [json.dumps(kinds.get(name, CHOICE)) + "\n"] * rows
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def out(tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install 'smolseek[eval]'")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_each_task_has_its_usual_metric_and_a_digit_for_every_drawn_document(tmp_path, out):
    manager = write_tasks(write_documents(tmp_path / "documents"), out, 2)
    answers = answer(StockModel(tiny_llama(vocab_size=ENTRIES)), tiny_tokenizer(), manager)
    assert set(answers) == METRICS
    assert all(len(digits) == 2 and set(digits) <= {"0", "1"} for digits in answers.values())
    assert (out / "cache").is_dir(), "the documents' cache lies beside them"


def test_a_line_separator_in_a_text_ends_no_document(tmp_path, out):
    documents = write_documents(tmp_path / "documents")
    lines = [json.dumps(CHOICE | {"query": f"a\u2028b\x85 {number}"}, ensure_ascii=False) for number in range(3)]
    (documents / "arc_easy.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_tasks(documents, out, 2)
    drawn = (out / "arc_easy.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert len(drawn) == 2 and set(drawn) <= set(lines)


def test_what_the_model_is_asked(tmp_path, out):
    manager = write_tasks(write_documents(tmp_path / "documents"), out, 1)
    asked = {}
    for name, task in manager.load(list(TEMPLATES))["tasks"].items():
        task.build_all_requests(limit=1)
        asked[name] = [request.args for request in task.instances]
    assert asked["piqa"] == [
        ("Question: Anna sees\nAnswer:", " a ball"),
        ("Question: Anna sees\nAnswer:", " the cat"),
    ]
    assert asked["winogrande"] == [(context, " finds it.") for context in CONTEXTS["context_options"]]
    assert asked["lambada_openai"] == [("Anna sees the", " cat")]


def test_documents_are_drawn_over_the_whole_file_and_always_the_same(tmp_path, out):
    documents = write_documents(tmp_path / "documents")
    lines = [json.dumps(CHOICE | {"query": f"{number}"}) for number in range(100)]
    (documents / "piqa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    drawn = []
    for _ in range(2):
        write_tasks(documents, out, 10)
        drawn.append((out / "piqa.jsonl").read_text().splitlines())
    assert drawn[0] == drawn[1] and set(drawn[0]) <= set(lines) and len(drawn[0]) == 10
    assert any(line in lines[50:] for line in drawn[0])


def test_a_task_without_documents(tmp_path):
    documents = write_documents(tmp_path / "documents")
    (documents / "piqa.jsonl").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"no piqa\.jsonl in it"):
        write_tasks(documents, tmp_path / "out", 2)


def test_differences_are_paired_and_their_mean_has_an_error():
    ours, theirs = {"a acc": "1100", "b acc": "1111"}, {"a acc": "1010", "b acc": "1110"}
    assert scores(ours)["a acc"].value == estimate([1.0, 1.0, 0.0, 0.0])
    apart = differences(ours, theirs)
    assert apart == {"a acc": estimate([0.0, 1.0, -1.0, 0.0]), "b acc": estimate([0.0, 0.0, 0.0, 1.0])}
    assert task_mean({"a": Estimate(1.0, 0.3), "b": Estimate(2.0, 0.4)}) == Estimate(1.5, 0.25)
    assert task_mean({"a": Estimate(1.0, 0.3), "b": Estimate(2.0, None)}) == Estimate(1.5, None)
