import json
import re

import pytest

from smolseek.cli import main
from smolseek.cli.export import next_commands
from tests.export.folders import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "m"
    tiny_folder(folder, hidden_size=64)
    return str(folder)


def test_check_has_a_line_for_each_runtime(folder, capsys):
    assert main(["check", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["transformers", "vllm", "sglang", "llama.cpp"]
    assert lines[0].split() == ["transformers", "loads"] and lines[1].split()[1] == "refuses:"


def test_a_runtime_asked_for_that_refuses_is_status_1(folder, capsys):
    assert main(["check", folder, "--runtime", "vllm", "llama.cpp"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["check", folder, "--runtime", "llama.cpp"]) == 0
    assert main(["check", folder, "--runtime", "ollama"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_as_json(folder, capsys):
    assert main(["check", folder, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["transformers"] == {"loads": True, "findings": []}
    assert tree["vllm"]["loads"] is False
    assert set(tree["vllm"]["findings"][0]) == {"field", "reason", "remedy", "source", "refuses"}


def test_a_folder_that_is_no_checkpoint_is_status_2_and_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["check", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "kv_lora_rank": 8}')
    assert main(["check", str(tmp_path)]) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_check_loads_no_torch(folder):
    import subprocess
    import sys

    code = f"import sys; from smolseek.cli import main; main(['check', {folder!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_export_says_what_it_wrote_and_what_to_run(folder, tmp_path, capsys):
    out = tmp_path / "m.gguf"
    assert main(["export", "gguf", folder, str(out), "--type", "q8_0"]) == 0
    said = capsys.readouterr().out
    assert "of them as f16, as blocks of 32 do not divide their rows: " in said and "attn_k_b" in said
    for program in ("llama-completion", "llama-server", "ollama create"):
        assert program in said
    assert main(["export", "gguf", folder, str(out)]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert main(["export", "gguf", folder, str(out), "--force", "--type", "bf16"]) == 0
    assert "do not divide" not in capsys.readouterr().out


def test_commands_quote_paths_and_know_a_chat(tmp_path):
    plain = next_commands(tmp_path / "a b.gguf", has_template=False)
    assert all(f"'{tmp_path}/a b.gguf'" in line for line in plain if line.startswith("llama-"))
    assert "ollama create a-b" in plain[2] and f"FROM {tmp_path}" in plain[2]
    assert next_commands(tmp_path / "m.gguf", has_template=True)[0].startswith("llama-cli")
    options = ["--yarn-beta-fast 2", "--yarn-beta-slow 0.5"]
    told = next_commands(tmp_path / "m.gguf", has_template=False, options=options)
    assert told[-1] == f"llama-server -m {tmp_path / 'm.gguf'} --yarn-beta-fast 2 --yarn-beta-slow 0.5"


def test_k_quants_name_their_real_size(folder, tmp_path, capsys, caplog):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    out = tmp_path / "m.gguf"
    assert main(["export", "gguf", folder, str(out), "--type", "q4_k_m"]) == 0
    said = capsys.readouterr()
    (others,) = re.findall(r"of them as (.*), as blocks of 256 do not divide their rows: ", said.out)
    assert set(others.split(", ")) == {"q5_0", "q8_0", "f16"}
    assert "bits per weight, q4_k_m" in said.out
    assert "bits per weight, where q4_k_m would take " in caplog.text


def test_k_quants_without_llama_cpp_are_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "gguf", folder, str(tmp_path / "m.gguf"), "--type", "q5_k_m"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install xllamacpp" in said
    assert list(tmp_path.iterdir()) == []
