import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smolseek.checkpoint.hub import save
from smolseek.cli import VERBS, main
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.text import ENTRIES, kind_of_tokenizer, tiny_tokenizer, write_stories

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    return save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "source", tokenizer_from=tiny_tokenizer())


@pytest.fixture
def text(tmp_path):
    return str(write_stories(tmp_path / "a.txt"))


def run_python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("module", ["smolseek", "smolseek.cli", "smolseek.config", "smolseek.planning"])
def test_help_and_plan_need_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_help_lists_the_verbs():
    result = run_python("-m", "smolseek", "--help")
    assert result.returncode == 0
    for verb in ("plan", "convert", "train", "generate", "chat", "eval", "report"):
        assert verb in result.stdout and verb in VERBS


@pytest.mark.parametrize("verb", [*VERBS])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_convert_eval_generate_and_plan(source, text, tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ["--kv-lora-rank", "12", "--qk-rope-head-dim", "4"]
    command = ["convert", str(source), str(out), *sizes, "--calibration", text, "--calibration-window-tokens", "32"]
    command += ["--refine-steps", "2", "--distill-steps", "2"]
    assert main(command) == 0
    assert str(out) in capsys.readouterr().out
    assert main([*command]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    capsys.readouterr()
    for folder in (source, out):
        assert main(["eval", str(folder), "--text", text, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert set(result) == {"loss", "perplexity", "bits_per_byte", "tokens", "texts"} and result["tokens"] > 500
    texts = []
    for seed in ("1", "1", "2"):
        generate = ["generate", str(out), "--prompt", "Anna", "--max-new-tokens", "20", "--seed", seed]
        assert main(generate) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("Anna") and texts[0] == texts[1] != texts[2]
    assert main(["plan", str(source), *sizes, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["kv_lora_rank"] == 12 and set(plan["runtimes"]) == {
        "transformers",
        "vllm",
        "sglang",
        "llama.cpp",
    }


def test_eval_of_several_texts_against_the_dense_model(source, text, tmp_path, capsys):
    other = str(write_stories(tmp_path / "b.txt", count=9, seed=1))
    command = ["eval", str(source), "--text", text, other, "--window-tokens", "32", "--stride", "20"]
    assert main([*command, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert list(alone["texts"]) == [text, other]
    assert alone["tokens"] == sum(quality["tokens"] for quality in alone["texts"].values())
    command += ["--compare", str(source), "--needle", "--needle-trials", "2"]
    assert main([*command, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["loss"] == pytest.approx(alone["loss"]) and both["texts"][other]["bits_per_byte"] == pytest.approx(
        alone["texts"][other]["bits_per_byte"]
    )
    assert both["comparison"]["overall"]["kl"] == pytest.approx(0, abs=1e-6)
    assert both["comparison"]["by_context"]["16 to 63"]["agreement"] == 1
    assert both["needle"] == both["needle_dense"] and [row["distance_tokens"] for row in both["needle"]] == [16, 31]
    assert main(command) == 0
    out = capsys.readouterr().out
    for words in ("together", "against the dense model", "tokens before it: 1 to 15", "rank by frequency: 1 to 10"):
        assert words in out
    assert main([*command, "--stride", "32"]) == 2
    assert "stride 32: must be 1 to 31" in capsys.readouterr().err


def test_eval_of_experts_tells_their_balance(source, text, tmp_path, capsys):
    out = str(tmp_path / "experts")
    assert main(["convert", str(source), out, "--exact", "--experts", "upcycle", "--calibration", text]) == 0
    capsys.readouterr()
    assert main(["eval", out, "--text", text, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["maxvio"] == max(found["maxvio_per_layer"].values()) and list(found["maxvio_per_layer"]) == ["0", "1"]
    assert main(["eval", out, "--text", text]) == 0
    assert "MaxVio of the worst layer" in capsys.readouterr().out


def test_the_needle_needs_no_text(source, capsys):
    assert main(["eval", str(source), "--needle", "--needle-trials", "2", "--seed", "3"]) == 0
    assert "copied from, tokens before" in capsys.readouterr().out
    assert main(["eval", str(source), "--needle", "--needle-tokens", "65"]) == 2
    assert "a context of 65 tokens: the model reads 64" in capsys.readouterr().err


def test_the_python_interface(source, text, tmp_path):
    import torch

    import smolseek

    out = smolseek.convert(
        source,
        tmp_path / "out",
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        calibration=text,
        calibration_window_tokens=32,
        refine_steps=2,
        distill_steps=0,
    )
    model = smolseek.load(out)
    ids = torch.tensor([[0, 5, 6]])
    assert model(ids).shape == (1, 3, ENTRIES)
    assert smolseek.generate(model, ids, max_new_tokens=4).shape == (1, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_samples_as_json(source, capsys, tmp_path, dtype):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Anna sees")
    command = ["generate", str(source), "--prompt-file", str(prompt), "--samples", "2", "--seed", "3", "--json"]
    assert main([*command, "--max-new-tokens", "6", "--dtype", dtype]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in lines] == [3, 4]
    assert all(line["prompt"] == "Anna sees" and line["new_tokens"] <= 6 for line in lines)
    assert lines[0]["tokens_per_second"] > 0 and lines[0]["text"] != lines[1]["text"]


def test_text_on_one_stream_and_speed_on_the_other(source, capsys):
    command = ["generate", str(source), "--prompt", "Anna", "--max-new-tokens", "12", "--temperature", "0"]
    assert main(command) == 0
    whole, said = capsys.readouterr()
    assert "tokens/s" in said
    word = whole[len("Anna") + 5 : len("Anna") + 9]
    assert main([*command, "--stop", word]) == 0
    assert capsys.readouterr().out.rstrip("\n") == whole[: whole.index(word, len("Anna"))].rstrip("\n")


def test_chat_without_a_template_continues_one_text(source, capsys, monkeypatch):
    lines = iter(["Anna sees", "Ben likes", ""])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    assert main(["chat", str(source), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_perplexity_is_stock_transformers(source, text, capsys):
    """Computes perplexity again from its definition: documents parted by EOS, windows of the model's limit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["eval", str(source), "--text", text, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    ids = []
    for document in Path(text).read_text().split("<|endoftext|>"):
        ids += [*([tokenizer.eos_token_id] if ids else []), *tokenizer(document.strip("\n"))["input_ids"]]
    total = count = 0
    with torch.no_grad():
        for start in range(0, len(ids), 64):
            window = torch.tensor([ids[start : start + 64]])
            if window.shape[1] > 1:
                total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
                count += window.shape[1] - 1
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(total / count, abs=1e-5)


def test_a_dense_model_with_other_tokens_is_not_compared_with(source, text, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "other")
    kind_of_tokenizer("has").save_pretrained(tmp_path / "other")
    assert main(["eval", str(source), "--text", text, "--compare", str(tmp_path / "other")]) == 2
    assert "they must share a tokenizer" in capsys.readouterr().err


def test_tokens_that_the_model_lacks_are_one_line(source, text, capsys):
    tokenizer = kind_of_tokenizer("has")
    tokenizer.add_tokens([*(f"<{number}>" for number in range(ENTRIES)), "sees a"])
    tokenizer.save_pretrained(source)
    assert main(["eval", str(source), "--text", text]) == 2
    error = capsys.readouterr().err
    assert "vocabulary entries" in error and error.count("\n") == 1


@pytest.mark.parametrize("recipe", [[], [str(ROOT / "recipes" / "heal.yaml")]])
def test_data_stats_trains_nothing_and_loads_no_model(source, text, tmp_path, capsys, monkeypatch, recipe):
    for weights in source.glob("*.safetensors"):
        weights.unlink()
    (tmp_path / "b.jsonl").write_text('{"text": "Anna likes a ball."}\nbroken\n')
    command = ["data", "stats", *recipe, "--source", str(source), "--data.train", text, str(tmp_path / "b.jsonl")]
    command += ["--data.held-out-share", "0.2", "--data.weights", "3", "1"]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--json"]) == 0
    stories, broken = json.loads(capsys.readouterr().out)["sources"]
    assert stories["padding_share"] == broken["padding_share"] == 0 and broken["malformed"] == 1
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"-- first rows of {text}" in out and "Anna likes a ball." in out and "cut at" not in out
    assert not (tmp_path / "runs").exists()


def test_data_stats_counts_the_tokens_of_all_stages(source, text, tmp_path, capsys):
    stages = {"stages": [{"steps": 2}, {"steps": 3}], "batch_windows": 4, "gradient_accumulation": 5}
    train = stages | {"window_tokens": 16}
    recipe = {"source": str(source), "data": {"train": [text], "held_out_share": 0.2}, "train": train}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    assert main(["data", "stats", str(tmp_path / "r.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_tokens"] == 5 * 4 * 5 * 16


def test_the_plan_of_a_recipe_is_of_its_own_conversion(source, text, tmp_path, capsys):
    recipe = {"source": str(source), "data": {"train": [text]}, "convert": {"cache": 0.5}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert main(["plan", str(tmp_path / "r.yaml"), "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["stages"]
    assert seconds and not seconds.get("sample text"), "it reads the training text"
    assert main(["plan", str(tmp_path / "r.yaml"), "--cache", "0.9"]) == 2
    assert "its own key convert says what is planned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "no such verb"),
        (["data"], "data stats RECIPE"),
        (["data", "fly"], "data stats RECIPE"),
        (["data", "stats", "nowhere.yaml"], "no such file"),
        (["data", "stats", "--data.train", "nowhere.txt"], "no such file"),
        (["train", "nowhere.yaml"], "no such file"),
        (["eval", "./nowhere", "--text", "a.txt"], "no such folder"),
        (["eval", "builtin:base"], "nothing to measure"),
        (["eval", "builtin:base", "--text", "nowhere.txt"], "no such file"),
        (["push", "./nowhere", "someone/model"], "no such folder"),
        (["generate", "./nowhere", "--prompt", "a"], "no such folder"),
        (["generate", "./nowhere", "--prompt", "a", "--prompt-file", "b"], "give one of them"),
        (["generate", "./nowhere", "--prompt", "a", "--samples", "0"], "at least 1"),
        (["chat", "./nowhere", "--json"], "smolseek generate has them"),
        (["plan", "./nowhere"], "no such folder"),
        (["plan", "builtin:base", "--heal-tokens", "-5"], "heal_tokens -5: must be 0 or more"),
        (["convert", "./nowhere", "out", "--calibration", "a.txt"], "no such folder"),
        (["convert", "builtin:base", "out", "--judge", "a", "--judge=b"], "--judge: is given twice"),
        (["train", "--data.train", "a", "--data.train", "b"], "--data.train: is given twice"),
        (["convert", "builtin:base", "out", "--cache", "1", "--cache", "nan"], "cache: nan is no number"),
        (["convert", "builtin:base", "out", "--seed", str(2**64 - 1)], "seed: 18446744073709551615 is no number of 64"),
        (["convert", "builtin:base", "out", "--first-k-dense-replace", "-1"], "first_k_dense_replace -1: leaves"),
        (["train", "--train.learning-rate", "nan"], "train.learning_rate: nan is no number"),
        (["train", "--data.held-out-share", "1.5"], "data.held_out_share 1.5: must be 0 or more, and less than 1"),
        (["train", "--data.shuffle-windows", "-5"], "data.shuffle_windows -5: must be 1 or more"),
        (["data", "stats", "--data.held-out-share", "-0.5"], "data.held_out_share -0.5: must be 0 or more"),
        (["eval", "builtin:base", "--needle", "--limit", "0"], "limit 0: must be 1 or more"),
        (["eval", "builtin:base", "--needle", "--batch-size", "0"], "batch_size 0: must be 1 or more"),
        (["eval", "builtin:base", "--needle", "--compare", ""], "compare '': is no name of a model"),
        (["push", ".", "model", "--dry-run"], "push model: is no name of a repository; write it as owner/name"),
        (["push", ".", "a/b/c", "--dry-run"], "push a/b/c: is no name of a repository"),
        (["check", "builtin:base", "--runtime", "foo"], "invalid choice 'foo' for argument '--runtime'. Expected"),
        (["plan", "builtin:base", "--cahce", "0.5"], "did you mean --cache?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--text", "FULL", "EMPTY"], ["--needle", "--text", "EMPTY"]])
def test_a_text_with_nothing_in_it_is_named_before_any_is_measured(options, source, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    names = {"FULL": text, "EMPTY": str(tmp_path / "empty.txt")}
    assert main(["eval", str(source), *(names.get(option, option) for option in options)]) == 2
    error = capsys.readouterr().err
    assert f"text {tmp_path / 'empty.txt'}: has 0 tokens, and at least 2 are needed" in error and error.count("\n") == 1


def test_spans_of_a_short_text_are_refused_before_it_is_measured(source, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Anna sees Ben.")
    assert main(["eval", str(source), "--needle", "--text", str(tmp_path / "short.txt")]) == 2
    error = capsys.readouterr().err
    assert f"text {tmp_path / 'short.txt'}: " in error and "spans of 16 are drawn" in error and error.count("\n") == 1


def test_a_box_of_a_terminal_without_utf_8_is_one_line(monkeypatch, capsys):
    program = f"import sys; from smolseek.cli import main; sys.exit(main({['check', 'x', '--runtime', 'foo']}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (
        done.returncode == 2 and done.stderr.startswith("smolseek: invalid choice 'foo'") and "---" not in done.stderr
    )


def test_the_system_s_errors_name_the_file(monkeypatch, capsys):
    def fail(_command):
        raise IsADirectoryError(21, "Is a directory", "runs/tiny/logs.txt")

    monkeypatch.setitem(VERBS, "plan", (VERBS["plan"][0], fail))
    assert main(["plan", "builtin:base"]) == 2
    assert capsys.readouterr().err == "smolseek: runs/tiny/logs.txt: is a directory; check the path\n"


@pytest.mark.parametrize("verb", ["eval", "plan", "convert"])
def test_a_device_that_is_not_there(verb, source, text, capsys, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    options = {"eval": ["--text", text], "plan": [], "convert": [str(tmp_path / "out"), "--calibration", text]}
    assert main([verb, str(source), *options[verb], "--device", "cuda"]) == 2
    assert "device cuda: not available here; use cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
