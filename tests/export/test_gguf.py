"""GGUF files, read back with the gguf package."""

import errno
import gc
import itertools
import json
import logging
import os
import resource
import weakref

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Encoding
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from smolseek.cli import main
from smolseek.export import tensors as export_tensors
from smolseek.export.gguf import export_gguf
from smolseek.export.keys import query_scales
from tests.export.folders import YARN, read_gguf, tiny_folder
from tests.text import ENTRIES, tiny_tokenizer


def test_keys(tmp_path):
    tiny_folder(tmp_path / "m", n_group=4, topk_group=2)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="f32")
    keys, tensors = read_gguf(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 3,
        "deepseek2.context_length": 64,
        "deepseek2.vocab_size": ENTRIES,
        "deepseek2.leading_dense_block_count": 1,
        "deepseek2.attention.head_count": 3,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 0,
        "deepseek2.attention.kv_lora_rank": 24,
        "deepseek2.attention.key_length": 32,
        "deepseek2.attention.value_length": 24,
        "deepseek2.attention.key_length_mla": 20,
        "deepseek2.attention.value_length_mla": 16,
        "deepseek2.rope.dimension_count": 8,
        "deepseek2.rope.freq_base": 100.0,
        "deepseek2.expert_count": 8,
        "deepseek2.expert_used_count": 3,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.expert_feed_forward_length": 20,
        "deepseek2.expert_group_count": 4,
        "deepseek2.expert_group_used_count": 2,
        "deepseek2.expert_weights_scale": 1.5,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.expert_gating_func": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: keys.get(name) for name in wanted} == wanted
    assert "deepseek2.rope.scaling.type" not in keys
    assert tensors["blk.1.ffn_up_exps.weight"].shape.tolist() == [40, 20, 8]
    assert tensors["blk.1.attn_k_b.weight"].shape.tolist() == [12, 24, 3]
    assert tensors["blk.1.attn_v_b.weight"].shape.tolist() == [24, 16, 3]


@pytest.mark.parametrize(("groups", "chosen"), [(None, None), (4, 4), (1, 1)])
def test_all_groups_chosen_is_no_limit(tmp_path, groups, chosen):
    tiny_folder(tmp_path / "m", n_group=groups or 1, topk_group=chosen or 1)
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"n_group": groups, "topk_group": chosen}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    keys, _ = read_gguf(tmp_path / "m.gguf")
    assert keys["deepseek2.expert_group_count"] == keys["deepseek2.expert_group_used_count"] == 1


@pytest.mark.parametrize(
    ("rope", "unrotated", "rotated", "key_mscale"),
    [
        (
            {},
            1 / 1.138629436**2,
            1.0,
            1.0,
        ),  # only the rotated part is scaled: undone in the rest
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.0, 1.0),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0, 1.0, 0.7),
        ({"mscale": 1.0, "mscale_all_dim": 0.7}, 1.0, (1.138629436 / 1.097040605) ** 2, 0.7),
        ({"attention_factor": 1.0, "mscale_all_dim": 0.7}, 1.0, 1.0, 0.7),
    ],
)
def test_yarn_scales(rope, unrotated, rotated, key_mscale):
    scales = query_scales({"rope_parameters": YARN | rope})
    assert scales.unrotated == pytest.approx(unrotated) and scales.rotated == pytest.approx(rotated)
    assert scales.mscale == key_mscale
    assert query_scales({"rope_theta": 5.0}) == type(scales)()


@pytest.mark.parametrize(("field", "value"), [("factor", None), ("factor", "4"), ("mscale", [1.0])])
def test_yarn_with_parameters_that_are_no_numbers(field, value):
    with pytest.raises(ValueError, match=f"{field} .*: must be a number"):
        query_scales({"rope_parameters": YARN | {field: value}})


def test_types_and_fallbacks(tmp_path):
    tiny_folder(tmp_path / "m", hidden_size=64, kv_lora_rank=32)
    for kind in ("f32", "f16", "bf16", "q8_0"):
        exported = export_gguf(tmp_path / "m", tmp_path / f"{kind}.gguf", type=kind)
        _, tensors = read_gguf(exported.path)
        assert len(tensors) == exported.tensors and exported.path.stat().st_size == exported.size_bytes
        assert tensors["token_embd.weight"].tensor_type == Encoding[kind.upper()]
        for name in ("output_norm.weight", "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias"):
            assert tensors[name].tensor_type == Encoding.F32
        fallbacks = {name for name, tensor in tensors.items() if tensor.tensor_type == Encoding.F16}
        assert set(exported.fallbacks) == (fallbacks if kind == "q8_0" else set())
    assert "blk.0.attn_k_b.weight" in exported.fallbacks and "blk.0.attn_v_b.weight" not in exported.fallbacks
    assert "blk.1.ffn_down_exps.weight" in exported.fallbacks and "blk.1.ffn_up_exps.weight" not in exported.fallbacks


BIG = {"hidden_size": 256, "kv_lora_rank": 64, "moe_intermediate_size": 256, "intermediate_size": 512}


def test_k_quants(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    tiny_folder(tmp_path / "m", **BIG)
    state = load_file(tmp_path / "m/model.safetensors")
    up = state["model.layers.1.mlp.experts.5.up_proj.weight"].numpy()
    for kind, base, other, bits, most in (
        ("q4_k_m", Encoding.Q4_K, Encoding.Q5_0, 4.5, 0.2),
        ("q5_k_m", Encoding.Q5_K, Encoding.Q5_1, 5.5, 0.1),
        ("q6_k", Encoding.Q6_K, Encoding.Q8_0, 6.5625, 0.05),
    ):
        exported = export_gguf(tmp_path / "m", tmp_path / f"{kind}.gguf", type=kind)
        keys, tensors = read_gguf(exported.path)
        assert keys["general.file_type"] == {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}[kind]
        assert tensors["output.weight"].tensor_type == Encoding.Q6_K
        assert tensors["token_embd.weight"].tensor_type == tensors["blk.0.ffn_up.weight"].tensor_type == base
        assert tensors["blk.2.ffn_down_exps.weight"].tensor_type == Encoding.Q6_K
        assert tensors["blk.0.attn_v_b.weight"].tensor_type == other
        assert tensors["blk.0.attn_k_b.weight"].tensor_type == Encoding.F16
        assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type == Encoding.F32
        assert {"blk.0.attn_v_b.weight", "blk.0.attn_k_b.weight"} <= set(exported.fallbacks)
        assert set(exported.fallback_encodings) == {other.name.lower(), "f16"}
        assert bits < exported.bits_per_weight < bits + 1
        found = tensors["blk.1.ffn_up_exps.weight"]
        assert np.abs(dequantize(found.data, found.tensor_type)[5] - up).max() < most * np.abs(up).max()


def test_only_k_quants_that_fall_back_warn(tmp_path, caplog):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    tiny_folder(tmp_path / "m", **BIG)
    exported = export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="q4_k_m")
    (record,) = caplog.records
    assert f"{exported.bits_per_weight:.2f} bits per weight, where q4_k_m would take" in record.message
    sizes = {"v_head_dim": 256, "qk_nope_head_dim": 256, "num_hidden_layers": 1}
    tiny_folder(tmp_path / "n", **BIG | sizes | {"kv_lora_rank": 256})
    caplog.clear()
    exported = export_gguf(tmp_path / "n", tmp_path / "n.gguf", type="q4_k_m")
    assert exported.fallbacks == exported.fallback_encodings == () and caplog.records == []


def test_numbers_are_the_checkpoint_s(tmp_path):
    model = tiny_folder(tmp_path / "m", hidden_size=64, dtype="bfloat16")
    state = load_file(tmp_path / "m/model.safetensors")
    head_sizes = (model.config.qk_nope_head_dim, model.config.v_head_dim)
    for kind, tolerance in (("f32", 0.0), ("bf16", 0.0), ("q8_0", 0.02)):
        _, tensors = read_gguf(export_gguf(tmp_path / "m", tmp_path / f"{kind}.gguf", type=kind).path)
        numbers = {name: dequantize(tensor.data, tensor.tensor_type) for name, tensor in tensors.items()}
        embeddings = state["model.embed_tokens.weight"].float().numpy()
        assert np.abs(numbers["token_embd.weight"] - embeddings).max() <= tolerance
        expert = state["model.layers.2.mlp.experts.5.up_proj.weight"].float().numpy()
        assert np.abs(numbers["blk.2.ffn_up_exps.weight"][5] - expert).max() <= tolerance
        up_k, up_v = (
            state["model.layers.0.self_attn.kv_b_proj.weight"].float().unflatten(0, (3, -1)).split(head_sizes, 1)
        )
        norm = state["model.layers.0.self_attn.kv_a_layernorm.weight"].float().numpy()
        scale = numbers["blk.0.attn_kv_a_norm.weight"] / norm
        assert np.array_equal(np.log2(scale), np.log2(scale).round())
        keys, values = numbers["blk.0.attn_k_b.weight"] * scale[:, None], numbers["blk.0.attn_v_b.weight"] * scale
        assert np.abs(keys - up_k.transpose(1, 2).numpy()).max() <= max(tolerance, 1e-3)
        assert np.abs(values - up_v.numpy()).max() <= max(tolerance, 1e-3)


def test_a_large_channel_of_the_latent_keeps_its_small_columns(tmp_path):
    """As a conversion leaves it: packed among others, the columns would be rounded away. A padded channel stays."""
    tiny_folder(tmp_path / "m", hidden_size=64, kv_lora_rank=32)
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["model.layers.1.self_attn.kv_a_layernorm.weight"][0] *= 64
    tensors["model.layers.1.self_attn.kv_b_proj.weight"][:, 0] /= 64
    tensors["model.layers.1.self_attn.kv_b_proj.weight"][:, 1] = 0
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    values = {}
    for kind in ("f32", "q8_0"):
        out = export_gguf(tmp_path / "m", tmp_path / f"{kind}.gguf", type=kind).path
        tensor = read_gguf(out)[1]["blk.1.attn_v_b.weight"]
        values[kind] = dequantize(tensor.data, tensor.tensor_type)
    error = np.abs(values["q8_0"] - values["f32"])[..., 0].max()
    assert error < 0.01 * np.abs(values["f32"])[..., 0].max() and not values["f32"][..., 1].any()


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "m")
    read, alive, most = export_tensors._read, [], 0

    def watched(tensors, name):
        nonlocal most
        tensor = read(tensors, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(export_tensors, "_read", watched)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="f32")
    assert len(alive) > 60 and most == 8  # the 8 experts of one projection while they are stacked


def test_an_interrupted_export_leaves_nothing(tmp_path):
    tiny_folder(tmp_path / "m")

    def stop(done, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", on_tensor=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    tiny_folder(tmp_path / "m")
    for name in ("m.gguf", "other.gguf"):
        (tmp_path / f".{name}.partial-9999999-abc").write_bytes(b"GGUF")  # no process has such a number
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.gguf.partial-9999999-abc", "m", "m.gguf"]


def test_a_model_of_the_hub_has_its_own_name_and_not_its_commit_s(tmp_path, monkeypatch):
    commit = tmp_path / ("a" * 40)
    tiny_folder(commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(commit))
    for source, name in (("owner/small", "small"), ("owner/small@v1.0", "small"), (commit, commit.name)):
        keys, _ = read_gguf(export_gguf(source, tmp_path / "m.gguf", force=True).path)
        assert keys["general.name"] == name


def _change(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    tiny_folder(tmp_path / "m")
    _change(tmp_path / "m", "model.norm.weight", lambda norm: norm * 1e6)
    export_gguf(tmp_path / "m", tmp_path / "norm.gguf", type="f16")  # norms stay fp32
    _change(tmp_path / "m", "lm_head.weight", lambda head: head * 1e6)
    for kind in ("f16", "q8_0"):
        with pytest.raises(ValueError, match=r"output\.weight: .* beyond f16's largest number; use --type bf16 or f32"):
            export_gguf(tmp_path / "m", tmp_path / "m.gguf", type=kind)
    assert not (tmp_path / "m.gguf").exists()
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="bf16")
    _change(tmp_path / "m", "lm_head.weight", lambda head: head.fill_(torch.nan))
    with pytest.raises(ValueError, match=r"lm_head\.weight: holds NaN"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="bf16", force=True)


def test_what_llama_cpp_refuses_is_not_written(tmp_path):
    tiny_folder(tmp_path / "m", attention_bias=True)
    with pytest.raises(ValueError, match=r"llama\.cpp refuses: attention_bias"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")


def test_progress_is_told_and_nothing_warns(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    tiny_folder(tmp_path / "m")
    told = []
    exported = export_gguf(tmp_path / "m", tmp_path / "m.gguf", on_tensor=lambda *at: told.append(at))
    assert told[-1] == (exported.tensors, exported.tensors) and len(told) == exported.tensors
    assert caplog.records == []


def test_a_chat_template_goes_along(tmp_path):
    model = tiny_folder(tmp_path / "m")
    assert not export_gguf(tmp_path / "m", tmp_path / "m.gguf").has_chat_template
    tokenizer = tiny_tokenizer()
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert export_gguf(tmp_path / "m", tmp_path / "m2.gguf").has_chat_template
    keys, _ = read_gguf(tmp_path / "m2.gguf")
    assert keys["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert tokenizer.chat_template is None and model.config.vocab_size == ENTRIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "m"
    tiny_folder(folder)
    return folder


def test_force_replaces_a_gguf_file_and_nothing_else(folder, tmp_path):
    out = tmp_path / "m.gguf"
    export_gguf(folder, out, type="f32")
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"m\.gguf: exists already; pass --force"):
        export_gguf(folder, out)
    export_gguf(folder, out, force=True)
    assert out.read_bytes() != before
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8photo")
    link = tmp_path / "link"
    link.symlink_to(folder / "model.safetensors")
    files = {path: path.read_bytes() for path in [photo, *folder.iterdir()]}
    for path, force in itertools.product((*files, link), (False, True)):
        with pytest.raises(ValueError, match=r"is no GGUF file, and --force replaces only those; name another$"):
            export_gguf(folder, path, force=force)
    assert {path: path.read_bytes() for path in files} == files


def test_the_folder_keeps_its_files_and_gets_none_of_their_names(folder):
    with pytest.raises(ValueError, match=r"generation_config\.json: may be taken for a file of the checkpoint"):
        export_gguf(folder, folder / "generation_config.json")
    export_gguf(folder, folder / "m.gguf")
    (folder / "m.gguf").unlink()


def test_places_where_no_file_can_be(folder, tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(ValueError, match=r"file is a file and no folder"):
        export_gguf(folder, tmp_path / "file/below/m.gguf")
    for force in (True, False):
        with pytest.raises(ValueError, match="is a folder; name a file"):
            export_gguf(folder, tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert export_gguf(folder, tmp_path / "new/folder/m.gguf").path.is_file()


@pytest.mark.parametrize("room", [100, 20_000, 150_000, -1])
def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys, room):
    """Lets the process write files of so many bytes only; -1: one byte too few, which shows when the file is closed."""
    whole = export_gguf(folder, tmp_path / "m.gguf").size_bytes
    (tmp_path / "m.gguf").unlink()
    ignored = []
    monkeypatch.setattr("sys.unraisablehook", ignored.append)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room % whole, former[1]))
    try:
        assert main(["export", "gguf", str(folder), str(tmp_path / "m.gguf")]) == 2
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert capsys.readouterr().err == f"smolseek: {tmp_path}/m.gguf: cannot be written (File too large)\n"
    assert list(tmp_path.iterdir()) == [] and ignored == []


def test_a_disk_that_is_full_at_the_end(folder, tmp_path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"m\.gguf: cannot be written \(No space left on device\)$"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []
