"""The table of rules: which configs and folders each runtime loads, and why it refuses the others."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from smolseek.checkpoint.hub import save
from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import expected_tensors
from smolseek.formats.dense import read_source
from smolseek.formats.headers import Header
from smolseek.formats.runtimes import RULES, RUNTIMES, check, verdict
from tests.configs import TINY
from tests.factories import logits_of, random_ids, tiny_v3

PORTABLE = target_config(read_source(TINY), ConvertSettings(experts="upcycle"))
EVERYWHERE = PORTABLE | {
    "tie_word_embeddings": False,
    "q_lora_rank": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
HEADERS = {
    name: Header("model.safetensors", "F32" if name.endswith("bias") else "BF16", shape)
    for name, shape in expected_tensors(EVERYWHERE).items()
}
HEAD, GATE = "lm_head.weight", "model.layers.1.mlp.gate"


def refusing(config: dict[str, Any], headers: dict[str, Header] | None = None) -> set[str]:
    return {runtime for runtime, findings in check(config, headers).items() if verdict(findings).startswith("refuses")}


def altered(name: str, **fields: Any) -> dict[str, Header]:
    return HEADERS | {name: dataclasses.replace(HEADERS[name], **fields)}


def without(*fields: str) -> dict[str, Any]:
    return {name: value for name, value in EVERYWHERE.items() if name not in fields}


def test_a_config_in_vllm_s_sizes_loads_everywhere() -> None:
    assert check(EVERYWHERE) == {runtime: [] for runtime in RUNTIMES}
    assert {verdict(findings) for findings in check(EVERYWHERE).values()} == {"loads"}


def test_fields_that_are_left_out_have_transformers_values() -> None:
    sizes = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok", "q_lora_rank", "kv_lora_rank")
    sizes += ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert check(without(*sizes)) == {runtime: [] for runtime in RUNTIMES}
    assert refusing(without("n_group") | {"n_routed_experts": 12}) == set(RUNTIMES), "transformers makes 8 groups"
    assert refusing(without("q_lora_rank") | {"num_hidden_layers": 27}) == {"llama.cpp"}


def test_a_beta_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"beta_fast 'a': must be a number from 0 to 1e\+30, or null"):
        check(EVERYWHERE | {"rope_parameters": YARN | {"beta_fast": "a"}})


CASES: list[tuple[dict[str, Any], set[str]]] = [
    (PORTABLE, {"vllm"}),
    (target_config(read_source(TINY), ConvertSettings(profile="vllm", kv_lora_rank=256, experts="carve")), set()),
    (target_config(read_source(TINY | {"model_type": "qwen2"}), ConvertSettings()), {"vllm"}),
    (
        target_config(read_source(TINY | {"model_type": "qwen2"}), ConvertSettings(profile="transformers")),
        {"vllm", "sglang", "llama.cpp"},
    ),
    (EVERYWHERE | {"rope_parameters": {"rope_type": "llama3"}}, {"vllm", "sglang", "llama.cpp"}),
    (EVERYWHERE | {"rope_parameters": {"rope_type": "yarn"}}, set()),
    (target_config(read_source(TINY), ConvertSettings(exact=True)), {"vllm", "sglang", "llama.cpp"}),
    (EVERYWHERE | {"tie_word_embeddings": True}, {"vllm"}),
    (EVERYWHERE | {"v_head_dim": 64}, {"vllm"}),
    (EVERYWHERE | {"kv_lora_rank": 128}, {"vllm"}),
    (EVERYWHERE | {"attention_bias": True}, {"vllm", "sglang", "llama.cpp"}),
    (EVERYWHERE | {"rope_parameters": {"rope_type": "longrope"}}, {"vllm", "sglang", "llama.cpp"}),
    (without("rope_parameters") | {"rope_scaling": {"type": "longrope"}}, {"vllm", "sglang", "llama.cpp"}),
    (without("scoring_func"), {"vllm", "sglang", "llama.cpp"}),
    (without("topk_method"), {"vllm", "sglang", "llama.cpp"}),
    (without("num_nextn_predict_layers"), set()),
    (EVERYWHERE | {"q_lora_rank": None}, set()),
    (EVERYWHERE | {"scoring_func": "softmax"}, set(RUNTIMES)),
    (EVERYWHERE | {"model_type": "smolseek_v3_softmax"}, set(RUNTIMES)),
    (EVERYWHERE | {"n_group": 16}, set(RUNTIMES)),
    (EVERYWHERE | {"n_group": 3, "topk_group": 3}, set(RUNTIMES)),
    (EVERYWHERE | {"topk_group": 5}, set(RUNTIMES)),
    (EVERYWHERE | {"num_experts_per_tok": 5}, set(RUNTIMES)),
    (EVERYWHERE | {"n_group": None, "topk_group": None}, {"transformers", "vllm", "sglang"}),
    (EVERYWHERE | {"n_group": None, "topk_group": None, "first_k_dense_replace": 2}, set()),
    (EVERYWHERE | {"hidden_act": "gelu"}, {"vllm", "sglang", "llama.cpp"}),
    (EVERYWHERE | {"rope_interleave": False}, {"vllm", "llama.cpp"}),
    (EVERYWHERE | {"rope_parameters": YARN | {"truncate": False}}, {"vllm", "sglang", "llama.cpp"}),
    (EVERYWHERE | {"rope_parameters": YARN | {"attention_factor": 1.2}}, {"vllm", "sglang"}),
    (EVERYWHERE | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, set()),
    (EVERYWHERE | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0}}, set()),
    (EVERYWHERE | {"rope_parameters": YARN | {"mscale": 0.7}}, {"vllm", "sglang"}),
    (EVERYWHERE | {"rope_parameters": YARN | {"mscale_all_dim": 0.7}}, {"vllm", "sglang"}),
    (EVERYWHERE | {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1.0}}, set()),
    (EVERYWHERE | {"rope_parameters": YARN | {"beta_fast": 16}}, set()),
    (EVERYWHERE | {"qk_nope_head_dim": 0}, {"vllm", "llama.cpp"}),
    (EVERYWHERE | {"num_hidden_layers": 27}, {"llama.cpp"}),
    (EVERYWHERE | {"num_hidden_layers": 26, "q_lora_rank": None}, set()),
    (EVERYWHERE | {"n_shared_experts": 0}, {"vllm", "llama.cpp"}),
    (EVERYWHERE | {"n_shared_experts": 0, "first_k_dense_replace": 2}, set()),
    (EVERYWHERE | {"n_routed_experts": 1028}, {"llama.cpp"}),
]


@pytest.mark.parametrize(("config", "refusing_runtimes"), CASES)
def test_who_refuses(config: dict[str, Any], refusing_runtimes: set[str]) -> None:
    assert refusing(config) == refusing_runtimes


def test_a_note_is_said_and_does_not_refuse() -> None:
    findings = check(EVERYWHERE | {"q_lora_rank": None})
    assert verdict(findings["llama.cpp"]).startswith("loads, note q_lora_rank")
    assert verdict(findings["vllm"]) == "loads"
    assert verdict(check(EVERYWHERE | {"kv_lora_rank": 120})["sglang"]).startswith("loads, note kv_lora_rank: 120")


def test_a_refusal_names_the_values_and_the_remedy() -> None:
    line = verdict(check(EVERYWHERE | {"v_head_dim": 64})["vllm"])
    assert "(128, 64, 64)" in line and "(192, 64, 256)" in line
    assert "absent" in verdict(check(without("topk_method"))["vllm"])


def test_a_whole_folder_loads_everywhere() -> None:
    assert check(EVERYWHERE, HEADERS) == {runtime: [] for runtime in RUNTIMES}


TENSOR_CASES: list[tuple[dict[str, Header], set[str], str]] = [
    ({n: h for n, h in HEADERS.items() if n != f"{GATE}.weight"}, set(RUNTIMES), "gate.weight: not in the folder"),
    ({n: h for n, h in HEADERS.items() if n != HEAD}, set(RUNTIMES), "lm_head.weight: not in the folder"),
    ({n: h for n, h in HEADERS.items() if "experts.0." not in n}, set(RUNTIMES), "weight and 5 more: not in"),
    (altered(HEAD, shape=(3, 3)), set(RUNTIMES), "lm_head.weight: another shape"),
    (altered(HEAD, dtype="F8_E4M3"), {"llama.cpp"}, "lm_head.weight: is quantised"),
    (altered(f"{GATE}.e_score_correction_bias", dtype="BF16"), set(), "is not fp32"),
    (HEADERS | {f"{GATE}.scale": HEADERS[HEAD]}, {"vllm", "llama.cpp"}, "gate.scale: has no place"),
    (HEADERS | {"model.layers.2.enorm.weight": HEADERS[HEAD]}, {"vllm"}, ""),
    (HEADERS | {"model.layers.0.self_attn.rotary_emb.inv_freq": HEADERS[HEAD]}, set(), ""),
]


@pytest.mark.parametrize(("headers", "refusing_runtimes", "said"), TENSOR_CASES)
def test_what_headers_tell(headers: dict[str, Header], refusing_runtimes: set[str], said: str) -> None:
    assert refusing(EVERYWHERE, headers) == refusing_runtimes
    assert said in verdict(check(EVERYWHERE, headers)["llama.cpp"])


def test_a_head_on_disk_excuses_tied_embeddings() -> None:
    tied = EVERYWHERE | {"tie_word_embeddings": True}
    assert refusing(tied, HEADERS) == set()
    assert refusing(tied, {name: header for name, header in HEADERS.items() if name != HEAD}) == {"vllm"}


def test_scales_of_a_quantised_checkpoint_are_expected() -> None:
    headers = HEADERS | {"lm_head.weight_scale_inv": HEADERS[HEAD]}
    assert refusing(EVERYWHERE | {"quantization_config": {"quant_method": "fp8"}}, headers) == set()


def test_a_counted_prediction_layer_is_expected() -> None:
    headers = HEADERS | {"model.layers.2.enorm.weight": HEADERS[HEAD]}
    assert refusing(EVERYWHERE | {"num_nextn_predict_layers": 1}, headers) == set()
    assert refusing(without("num_nextn_predict_layers"), headers) == set()


def test_a_foreign_config_is_told_nothing_else() -> None:
    findings = check({"model_type": "llama", "hidden_size": "wide"}, HEADERS)
    assert {len(said) for said in findings.values()} == {1}


def _loaded_difference(folder: Path, drop: str = "", **added: torch.Tensor) -> float:
    """Returns how far transformers' logits move when tensors are dropped from or added to a folder."""
    model = tiny_v3()
    save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name != drop} | added
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), random_ids(1, 12)
    return (logits_of(loaded, ids) - logits_of(model, ids)).abs().max().item()


def test_transformers_does_as_the_rules_on_tensors_say(tmp_path: Path) -> None:
    projection = "model.layers.0.self_attn.o_proj"
    assert _loaded_difference(tmp_path / "missing", drop=f"{projection}.weight") > 0.1
    assert _loaded_difference(tmp_path / "unexpected", **{f"{projection}.bias": torch.ones(40)}) < 1e-5
    with pytest.raises((RuntimeError, ValueError)):
        _loaded_difference(tmp_path / "misshapen", **{f"{projection}.weight": torch.zeros(3, 3)})
    with pytest.raises((RuntimeError, ValueError)):
        _loaded_difference(tmp_path / "expert", drop="model.layers.1.mlp.experts.0.up_proj.weight")


def test_transformers_keeps_the_balancing_bias_in_fp32(tmp_path: Path) -> None:
    save(tiny_v3(), tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert loaded.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_every_rule_is_tried_above_and_has_its_source() -> None:
    tried = [(config, None) for config, _ in CASES] + [(EVERYWHERE, headers) for headers, *_ in TENSOR_CASES]
    assert [rule.finding for rule in RULES if not any(rule.found(*folder) for folder in tried)] == []
    assert all(rule.finding.source and rule.finding.remedy and set(rule.runtimes) <= set(RUNTIMES) for rule in RULES)


@pytest.mark.parametrize("field", ["first_k_dense_replace", "n_group", "num_hidden_layers", "tie_word_embeddings"])
def test_a_field_that_is_no_number_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} \[1\]: must be"):
        check(EVERYWHERE | {field: [1]})
