import json
import logging
import threading

import pytest
from safetensors.torch import load_file, save_file

import smolseek.checkpoint.folder
from smolseek.checkpoint.hub import save
from smolseek.checkpoint.push import push
from smolseek.checkpoint.source import read_config
from smolseek.cli import main
from smolseek.model import StockModel
from tests.checkpoint.push_server import TOKEN, TakingHub
from tests.factories import tiny_llama, tiny_v3
from tests.text import tiny_tokenizer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Starts the fake hub, and puts a token in the hub library's store."""
    server = TakingHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    out = save(tiny_v3(), tmp_path / "model", tokenizer_from=tiny_tokenizer(), card="# model\n")
    (out / ".hidden").write_text("mine")
    (out / "cache").mkdir()
    (out / "cache" / "part").write_text("")
    return out


def test_a_folder_goes_up_whole_and_private_and_the_token_is_not_seen(folder, hub, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    assert main(["push", str(folder), "someone/model"]) == 0
    assert hub.private is True
    wanted = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".hidden"}
    assert hub.files == wanted and {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(wanted)
    said = capsys.readouterr()
    assert "someone/model" in said.out and TOKEN not in said.out + said.err + caplog.text
    assert main(["push", str(folder), "someone/model"]) == 0  # a second time, into the same repository


def test_names_and_digests_go_up_and_paths_do_not(folder, hub):
    paths = {"source": "/home/me/dense", "text": "/home/me/secret/text.txt"}
    conversion = {
        "source": paths["source"],
        "settings": {"calibration": [paths["text"]]},
        "calibration": {"tokens_sha256": "ab12", "sources": [{"source": paths["text"], "windows": 3}]},
    }
    (folder / "conversion.json").write_text(json.dumps(conversion))
    (folder / "README.md").write_text(f"# model\nmade of {paths['source']} with {paths['text']}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push(folder, "someone/model")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sent = {name: content.decode(errors="replace") for name, content in hub.files.items()}
    assert not [name for name, text in sent.items() if "/home/me" in text or str(folder.parent) in text]
    assert json.loads(sent["conversion.json"])["calibration"]["tokens_sha256"] == "ab12"
    assert sent["README.md"] == "# model\nmade of dense with text.txt\n"
    assert sent["additional_chat_templates/tools.jinja"] == "{{ tools }}"


@pytest.mark.parametrize(
    ("conversion", "card", "words"),
    [
        ({"settings": {}}, b"# model", "conversion.json: not as smolseek writes it (KeyError: 'source')"),
        ({"source": "a", "settings": {"calibration": None}}, b"# model", "conversion.json: not as smolseek writes it"),
        ({"source": "a", "settings": {}}, b"# caf\xe9 au lait", "README.md: not UTF-8 at byte 5"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_repository_is_made(folder, hub, conversion, card, words, capsys):
    (folder / "conversion.json").write_text(json.dumps(conversion))
    (folder / "README.md").write_bytes(card)
    assert main(["push", str(folder), "someone/model"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and hub.asked == []


def test_public_only_when_asked_for(folder, hub, capsys):
    hub.private = False
    assert main(["push", str(folder), "someone/model"]) == 2
    assert "is there and public; pass --public" in capsys.readouterr().err and not hub.files
    hub.private = None
    assert main(["push", str(folder), "someone/model", "--public"]) == 0
    assert hub.private is False


def test_a_dry_run_asks_the_hub_nothing(folder, hub, capsys):
    assert main(["push", str(folder), "someone/model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in out and "nothing is uploaded" in out and ".hidden" not in out
    assert hub.asked == []


def test_refusals_of_the_hub_are_one_line_without_the_token(folder, hub, monkeypatch, tmp_path, capsys):
    hub.refuses = True
    assert main(["push", str(folder), "someone/model"]) == 2
    error = capsys.readouterr().err
    assert "the hub refused (status 403)" in error and error.count("\n") == 1 and TOKEN not in error
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(folder), "someone/model"]) == 2
    assert "the hub is not there" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["push", str(folder), "someone/model"]) == 2
    assert "hf auth login" in capsys.readouterr().err


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def change_a_size(folder):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"intermediate_size": 60}))


def cut_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_a_tensor, "model.layers.1.mlp.experts.3.up_proj.weight is not there"),
        (change_a_size, "is (56, 40), and config.json asks for (60, 40)"),
        (cut_the_weights, "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: folder.rename(folder.with_name("other")), "no such folder"),
    ],
)
def test_half_a_folder_is_refused(folder, hub, damage, words, capsys):
    damage(folder)
    assert main(["push", str(folder), "someone/model"]) == 2
    assert words in capsys.readouterr().err and hub.asked == []


def test_a_missing_shard_is_refused(tmp_path, monkeypatch, hub, capsys):
    monkeypatch.setattr(smolseek.checkpoint.folder, "_MAX_SHARD_BYTES", 20_000)
    for number, model in enumerate((tiny_v3(), StockModel(tiny_llama()))):
        out = save(model, tmp_path / str(number), tokenizer_from=tiny_tokenizer())
        next(out.glob("model-00002-*.safetensors")).unlink()
        assert main(["push", str(out), "someone/model"]) == 2
        assert "model-00002" in capsys.readouterr().err
