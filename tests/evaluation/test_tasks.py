"""lm-eval itself on a task of our own: local documents, a tiny model, no network."""

import json
import math

import pytest

from smolseek.checkpoint.hub import save
from smolseek.cli import main
from smolseek.evaluation.paired import Estimate, estimate
from smolseek.evaluation.tasks import Score, find_tasks
from smolseek.model import StockModel
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, stories, tiny_tokenizer

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: ends
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Returns the folder of a task that asks which of two words ends a story's first sentence."""
    pytest.importorskip("lm_eval", reason="needs pip install 'smolseek[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, documents = tmp_path / "task", tmp_path / "documents.jsonl"
    folder.mkdir()
    begins = [story.partition(".")[0].rsplit(" ", 1) for story in stories(12)]
    rows = [{"begin": a, "ends": [f" {b}", " nowhere"], "right": 0} for a, b in begins]
    documents.write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny_choice.yaml").write_text(TASK.format(documents=documents))
    return folder


@pytest.fixture
def dense(tmp_path):
    return save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "dense", tokenizer_from=tiny_tokenizer())


@pytest.fixture
def converted(tmp_path, dense):
    """Returns a folder that looks like a converted one: its conversion.json names its source."""
    out = save(tiny_v3(vocab_size=ENTRIES), tmp_path / "converted", tokenizer_from=tiny_tokenizer())
    (out / "conversion.json").write_text(json.dumps({"source": str(dense)}))
    return out


def test_scores_of_both_models_and_the_paired_difference(task, converted, dense, capsys):
    command = ["eval", str(converted), "--tasks", "tiny_choice", "--include-path", str(task), "--json"]
    assert main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (row["task"], row["metric"]) == ("tiny_choice", "acc")
    assert row["difference"]["mean"] == pytest.approx(row["score"]["mean"] - row["dense"]["mean"])
    p = row["score"]["mean"]
    assert row["score"]["error"] == pytest.approx(math.sqrt(p * (1 - p) / 11))
    assert main([*command, "--compare", str(converted), "--limit", "5"]) == 0
    (same,) = json.loads(capsys.readouterr().out)["tasks"]
    assert same["difference"] == {"mean": 0, "error": 0}


def test_a_source_that_is_gone_is_no_reason_to_stop(task, converted, capsys):
    (converted / "conversion.json").write_text(json.dumps({"source": "./gone"}))
    assert main(["eval", str(converted), "--tasks", "tiny_choice", "--include-path", str(task), "--limit", "3"]) == 0
    assert "dense" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        ("nonsense_of_ours", [], "--tasks nonsense_of_ours: lm-eval knows no such task"),
        (
            "tiny_choise",
            ["--include-path", "TASK"],
            "tiny_choise: lm-eval knows no such task; did you mean tiny_choice",
        ),
        ("arc_easy", ["--include-path", "nowhere"], "--include-path nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(task, dense, tasks, options, words, capsys):
    options = [str(task) if option == "TASK" else option for option in options]
    assert main(["eval", str(dense), "--tasks", tasks, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("smolseek:") == 1


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed; run pip install 'smolseek\[eval\]'"):
        find_tasks(["arc_easy"])


def test_documents_are_matched_by_number_and_else_errors_add_up():
    ours = Score("t", "acc", estimate([1.0, 0.0, 1.0]), {0: 1.0, 1: 0.0, 2: 1.0})
    theirs = Score("t", "acc", estimate([1.0, 0.0, 0.0]), {2: 0.0, 1: 0.0, 0: 1.0})
    assert ours.minus(theirs) == estimate([0.0, 0.0, 1.0])
    unmatched = Score("t", "word_perplexity", Estimate(10.0, 3.0), None)
    assert unmatched.minus(Score("t", "word_perplexity", Estimate(8.0, 4.0), None)) == Estimate(2.0, 5.0)


def test_lm_eval_s_own_command_line_reads_a_folder(task, converted, tmp_path, monkeypatch, capsys):
    program = pytest.importorskip("lm_eval.__main__")
    options = ["--tasks", "tiny_choice", "--include_path", str(task), "--device", "cpu", "--batch_size", "4"]
    model = ["--model", "hf", "--model_args", f"pretrained={converted},dtype=float32"]
    monkeypatch.setattr("sys.argv", ["lm_eval", *model, *options, "--output_path", str(tmp_path / "scores")])
    monkeypatch.setattr(program, "setup_logging", lambda: None)
    program.cli_evaluate()
    (path,) = (tmp_path / "scores").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["tiny_choice"]["acc,none"]
    capsys.readouterr()
    assert main(["eval", str(converted), "--tasks", "tiny_choice", "--include-path", str(task), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["tasks"]
    assert row["score"]["mean"] == pytest.approx(theirs)
