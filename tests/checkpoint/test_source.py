"""Sources by name: folders, hub ids with revisions, and folders of other kinds."""

import fnmatch
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError

from smolseek.checkpoint.source import (
    check_tokenizer,
    commit_of,
    fetch_config,
    pinned,
    read_config,
    read_end_tokens,
    read_json,
    resolve_folder,
)
from smolseek.formats.files import TOKENIZER_FILES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Replaces the hub library's download; returns what it was asked for."""
    calls = []

    def serve(repo_id, **options):
        calls.append((repo_id, options))
        folder = tmp_path / "cache" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve)
    return calls


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", COMMIT])
def test_a_hub_id_may_have_a_revision(revision, asked):
    assert resolve_folder(f"owner/name@{revision}").name == COMMIT
    assert asked[0][0] == "owner/name" and asked[0][1]["revision"] == revision


def test_without_a_revision_the_hub_library_chooses(asked):
    resolve_folder("owner/name")
    assert "revision" not in asked[0][1]


def test_a_source_is_pinned_to_the_commit_that_it_means_now(asked, tmp_path):
    assert pinned("owner/name") == pinned("owner/name@main") == f"owner/name@{COMMIT}"
    assert [options["allow_patterns"] for _, options in asked] == [["config.json"]] * 2
    assert pinned(tmp_path) == str(tmp_path) and pinned("builtin:base") == "builtin:base"
    assert len(asked) == 2


def test_a_gated_model_says_what_opens_it(monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)  # its __init__ wants the hub's answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"owner/name: .*accept them on its page, and log in"):
        resolve_folder("owner/name")


def test_a_pinned_source_in_its_parts(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert commit_of(f"owner/name@{COMMIT}") == ("owner/name", COMMIT)
    assert commit_of("owner/name") == ("owner/name", None)
    for source in ("builtin:base", "/no/such/folder@x", str(tmp_path / "a@b"), str(tmp_path)):
        assert commit_of(source) == (source, None)
    assert commit_of(Path("runs/x")) == ("runs/x", None)


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path, monkeypatch, asked):
    (tmp_path / "owner" / "name@main").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("owner/name@main") == Path("owner/name@main") and not asked


@pytest.mark.parametrize("source", ["owner/name@", "@main", "owner/name@a@b", "a/b/c", "../x@main", "owner/na me@x"])
def test_names_that_are_none_are_not_asked_for(source, asked):
    with pytest.raises(ValueError, match="no such folder"):
        resolve_folder(source)
    assert not asked


def test_only_the_files_in_use_are_fetched(asked):
    resolve_folder("owner/name")
    patterns = asked[0][1]["allow_patterns"]

    def is_fetched(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    wanted = ["model.safetensors", "model-00001-of-000163.safetensors", "model.safetensors.index.json", "config.json"]
    wanted += ["generation_config.json", "conversion.json", "README.md", "LICENSE.txt", "NOTICE", "tokenizer.json"]
    wanted += ["spiece.model", "vocab.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    other = ["consolidated.safetensors", "fp16/model.safetensors", "onnx/model.onnx", "onnx/config.json"]
    other += ["onnx/tokenizer.json", "model.fp16.safetensors", "trainer_state.json", "pytorch_model.bin", "x.gguf"]
    other += ["original/tokenizer.model", "eval/model-00001-of-00002.safetensors"]
    assert [name for name in wanted if not is_fetched(name)] == [name for name in other if is_fetched(name)] == []


@pytest.mark.parametrize(
    ("made", "message"), [("model", "is a run; name its model: .*/model$"), ("", "is a run without")]
)
def test_a_run_is_told_from_its_model(made, message, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / made).mkdir(exist_ok=True)
    for read in (read_config, fetch_config, lambda folder: check_tokenizer(folder, folder)):
        with pytest.raises(ValueError, match=message) as refusal:
            read(tmp_path)
        assert "\n" not in str(refusal.value)


FOREIGN = {
    "adapter_config.json": "a LoRA .* merge_and_unload",
    "model-q4.gguf": "a folder with a GGUF file; name that file itself",
    "model_index.json": "a diffusers pipeline",
    "model.onnx": "ONNX is a format to run models",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_folders_of_other_kinds_are_named(name, tmp_path):
    (tmp_path / name).write_text("{}")
    for read in (read_config, fetch_config, lambda folder: check_tokenizer(folder, folder)):
        with pytest.raises(ValueError, match=FOREIGN[name]) as refusal:
            read(tmp_path)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "message"), [("a.gguf", "GGUF"), ("model.safetensors", "is a file; name the folder")])
def test_a_file_is_no_folder(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message):
        resolve_folder(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        fetch_config(tmp_path / name)


@pytest.mark.parametrize("text", ["[1]", "7", "null", "{", "", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "\xff"])
def test_what_is_no_json_object_is_refused_by_file(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json: (not JSON|holds no JSON object)"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "names", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["tokenizer.model"], ["spiece.model"], ["vocab.txt"]]
)
def test_every_kind_of_tokenizer_is_found(names, tmp_path):
    for name in names:
        with pytest.raises(ValueError, match=r"no tokenizer\.json"):
            check_tokenizer(tmp_path, "it")
        (tmp_path / name).write_text("")
    check_tokenizer(tmp_path, "it")
    assert set(names) <= set(TOKENIZER_FILES)


def _write(folder, config, generation):
    for name, named in (("config.json", config), ("generation_config.json", generation)):
        if named is not None:
            (folder / name).write_text(json.dumps(named))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        (None, {"eos_token_id": [7, 5]}, (7, 5)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 0, 7]}, (5, 7, 0)),
        ({"eos_token_id": [4, 3]}, {"eos_token_id": 3}, (4, 3)),
        ({"eos_token_id": None}, {}, ()),
        (None, None, ()),
    ],
)
def test_end_tokens_of_both_files(tmp_path, config, generation, ends):
    _write(tmp_path, config, generation)
    assert read_end_tokens(tmp_path) == ends


@pytest.mark.parametrize("named", ["</s>", 2.0, True, [2, None], {"id": 2}])
def test_an_end_token_that_is_no_number_is_refused(tmp_path, named):
    _write(tmp_path, {"eos_token_id": 2}, {"eos_token_id": named})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id .* is no whole number; name") as said:
        read_end_tokens(tmp_path)
    assert "\n" not in str(said.value)
    _write(tmp_path, {"eos_token_id": named}, None)
    with pytest.raises(ValueError, match=r"/config\.json: eos_token_id"):
        read_end_tokens(tmp_path)
