"""docs/serving: its commands, its table, and its two scripts with a fake server and with llama.cpp's server."""

import functools
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import smolseek
from smolseek.checkpoint.hub import load_tokenizer, save
from smolseek.cli import VERBS, main, parse_verb
from smolseek.data.chat import render_prompt
from smolseek.export.gguf import export_gguf
from smolseek.formats.runtimes import render_rules
from smolseek.generation import stream
from smolseek.model import StockModel
from tests.export.folders import tiny_folder
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SERVING = Path(__file__).parent.parent / "docs" / "serving"
README = (SERVING / "README.md").read_text(encoding="utf-8")


def script(name):
    """Returns a script of docs/serving as a module."""
    spec = importlib.util.spec_from_file_location(f"serving_{name}", SERVING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


compare, complete = script("compare"), script("complete")


def test_the_table_is_the_rules():
    assert render_rules() in README, "write it anew: it is what smolseek.formats.runtimes.render_rules() returns"


@pytest.mark.parametrize(
    "line", [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
)
def test_commands_name_what_there_is(line):
    program, *arguments = shlex.split(line)
    if program == "smolseek":
        parse_verb(VERBS[arguments[0]][0], arguments[0], arguments[1:])
    elif program == "python" and arguments[0].endswith(".py"):
        assert (SERVING.parent.parent / arguments[0]).is_file()


class FakeServer:
    """An OpenAI-compatible server that completes by `answer(ids, tokens)`, which returns (text, finish_reason)."""

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def _reply(self, tree, status=200):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(tree).encode())

            def do_GET(self):
                self._reply({"data": [{"id": "served"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if (body["model"], body["temperature"], body["repetition_penalty"]) != ("served", 0, 1):
                    return self._reply({"error": "unknown model"}, 404)
                text, reason = answer(body["prompt"], body["max_tokens"])
                return self._reply({"choices": [{"text": text, "finish_reason": reason}]})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self.address

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a model that generates only whole characters: other tokens have zero rows in its head."""
    folder = tmp_path_factory.mktemp("serving") / "m"
    model, tokenizer = tiny_folder(folder), tiny_tokenizer()
    with torch.no_grad():
        for token in range(ENTRIES):
            if "\ufffd" in tokenizer.decode([token]):
                model.lm_head.weight[token] = 0
    save(model, folder, tokenizer_from=tokenizer, force=True)
    return folder


def greedy(folder, *, second_choice_at=None, stop_at=None):
    """Returns the answers of an honest server, or of one that at some token takes its second choice or stops."""
    model, tokenizer = compare.load(folder), load_tokenizer(folder)

    def answer(ids, tokens):
        new = []
        for count in range(tokens):
            if count == stop_at:
                return compare._text(tokenizer, ids, new), "stop"
            with torch.inference_mode():
                ranked = model(torch.tensor([ids + new]))[0, -1].argsort(descending=True).tolist()
            ranked = [token for token in ranked if token != model.config.eos_token_id]
            new.append(ranked[1 if count == second_choice_at else 0])
        return compare._text(tokenizer, ids, new), "length"

    return answer


def test_the_same_texts(folder, capsys):
    with FakeServer(greedy(folder)) as address:
        assert compare.run(compare.Compare(str(folder), address, tokens=4)) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 21 and "20 of 20 the same, 0 part at a near-tie, 0 at a clear choice" in said


def test_a_server_that_chooses_otherwise(folder, capsys):
    with FakeServer(greedy(folder, second_choice_at=2)) as address:
        assert compare.run(compare.Compare(str(folder), address, tokens=4, near_tie=0.0)) == 1
        assert "2 tokens in common, parts where ours is" in capsys.readouterr().out
        assert compare.run(compare.Compare(str(folder), address, tokens=4, near_tie=50.0)) == 0
    assert " 0 at a clear choice" in capsys.readouterr().out


def test_a_server_that_stops_early(folder):
    model, tokenizer = compare.load(folder), load_tokenizer(folder)
    with FakeServer(greedy(folder, stop_at=2)) as address:
        verdict = compare.compare(model, tokenizer, address, "served", "Anna sees", 4)
    ids = compare.encode_prompt(tokenizer, "Anna sees")
    new = list(stream(model, torch.tensor([ids]), max_new_tokens=2))
    with torch.inference_mode():
        logits = model(torch.tensor([ids + new]))[0, -1]
    assert verdict.common_tokens == 2
    assert verdict.gap_nats == pytest.approx((logits.max() - logits[0]).item(), abs=1e-4)


def test_a_server_of_another_model_is_clear(folder):
    model, tokenizer = compare.load(folder), load_tokenizer(folder)
    with FakeServer(lambda ids, tokens: ("\u6771", "length")) as address:
        verdict = compare.compare(model, tokenizer, address, "served", "Anna", 4)
    assert verdict.common_tokens == 0 and verdict.is_clear(near_tie=100.0)


def test_a_server_that_does_not_answer(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(folder), "http://127.0.0.1:9"])
    assert compare.main() == 2
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1:9/v1/models: no answer")
    with FakeServer(greedy(folder)) as address, pytest.raises(ValueError, match="the server says 404"):
        compare.ask(address, "/v1/completions", {"model": "another", "temperature": 0, "repetition_penalty": 1})


def test_there_are_twenty_prompts():
    assert len(set(compare.PROMPTS)) == 20


def test_llama_cpp_s_server_says_the_same(folder, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    export_gguf(folder, tmp_path / "m.gguf", type="f32")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.verbosity, settings.n_ctx = str(tmp_path / "m.gguf"), -1, 256
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    assert compare.run(compare.Compare(str(folder), server.listening_address, tokens=6)) == 0


def test_two_commands_to_text_from_llama_cpp(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    out = tmp_path / "quick.gguf"
    assert main(["export", "gguf", str(folder), str(out)]) == 0
    assert f"llama-completion -m {out}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["complete.py", str(out), "Anna sees"])
    assert complete.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("Anna sees") and len(said) > len("Anna sees\n")


def test_two_commands_to_a_chat_with_llama_cpp(folder, tmp_path, monkeypatch, capsys):
    """The answers are those of transformers' template and our own greedy tokens, also in the second turn."""
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    chatty = shutil.copytree(folder, tmp_path / "m")
    (chatty / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    out = tmp_path / "chat.gguf"
    assert main(["export", "gguf", str(chatty), str(out), "--type", "f32"]) == 0
    assert f"llama-cli -m {out}" in capsys.readouterr().out
    monkeypatch.setattr(complete, "chat", functools.partial(complete.chat, tokens=4))
    monkeypatch.setattr(sys, "argv", ["complete.py", str(out), "--chat"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Anna\nBen\n"))
    assert complete.main() == 0
    said = capsys.readouterr()
    model, tokenizer = smolseek.load(chatty), load_tokenizer(chatty)
    messages, answers = [], []
    for line in ("Anna", "Ben"):
        messages.append({"role": "user", "content": line})
        ids = torch.tensor([render_prompt(tokenizer, messages)])
        answers.append(tokenizer.decode(list(stream(model, ids, max_new_tokens=4, eos_token_id=0))))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert said.out == "".join(f"{answer}\n" for answer in answers)
    assert "serving at http://127.0.0.1:" in said.err


def test_complete_says_what_is_missing(tmp_path, monkeypatch, capsys):
    for arguments, said in (([], "usage"), ([str(tmp_path / "no.gguf"), "a"], "no such file")):
        monkeypatch.setattr(sys, "argv", ["complete.py", *arguments])
        assert complete.main() == 2
        assert said in capsys.readouterr().err


def test_a_dense_folder_is_no_converted_one(tmp_path, capsys):
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "dense", tokenizer_from=tiny_tokenizer())
    assert main(["check", str(tmp_path / "dense")]) == 2
    assert "has no latent attention; convert it first" in capsys.readouterr().err
