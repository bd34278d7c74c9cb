"""The table of rules: what each runtime says to a config."""

from typing import Any

import pytest

from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.runtimes import RULES, RUNTIMES, check, verdict
from tests.configs import TINY

PORTABLE = target_config(TINY, ConvertSettings(experts="upcycle"))
EVERYWHERE = PORTABLE | {
    "tie_word_embeddings": False,
    "q_lora_rank": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def refusing(config: dict[str, Any]) -> set[str]:
    return {runtime for runtime, findings in check(config).items() if verdict(findings).startswith("refuses")}


def without(*fields: str) -> dict[str, Any]:
    return {name: value for name, value in EVERYWHERE.items() if name not in fields}


def test_a_config_in_vllm_s_sizes_loads_everywhere() -> None:
    assert check(EVERYWHERE) == {runtime: [] for runtime in RUNTIMES}
    assert {verdict(findings) for findings in check(EVERYWHERE).values()} == {"loads"}


@pytest.mark.parametrize(
    ("config", "refusing_runtimes"),
    [
        (PORTABLE, {"vllm"}),
        (target_config(TINY, ConvertSettings(profile="vllm", experts="carve")), set()),
        (target_config(TINY | {"model_type": "qwen2"}, ConvertSettings()), {"vllm"}),
        (
            target_config(TINY | {"model_type": "qwen2"}, ConvertSettings(profile="transformers")),
            {"vllm", "sglang", "llama.cpp"},
        ),
        (EVERYWHERE | {"rope_parameters": {"rope_type": "llama3"}}, {"vllm", "sglang", "llama.cpp"}),
        (EVERYWHERE | {"rope_parameters": {"rope_type": "yarn"}}, set()),
        (target_config(TINY, ConvertSettings(exact=True)), {"vllm", "sglang", "llama.cpp"}),
        (EVERYWHERE | {"tie_word_embeddings": True}, {"vllm"}),
        (EVERYWHERE | {"v_head_dim": 64}, {"vllm"}),
        (EVERYWHERE | {"attention_bias": True}, {"vllm", "sglang", "llama.cpp"}),
        (EVERYWHERE | {"rope_parameters": {"rope_type": "longrope"}}, {"vllm", "sglang", "llama.cpp"}),
        (without("rope_parameters") | {"rope_scaling": {"type": "longrope"}}, {"vllm", "sglang", "llama.cpp"}),
        (without("scoring_func"), {"vllm", "llama.cpp"}),
        (without("topk_method"), {"vllm", "llama.cpp"}),
        (without("num_nextn_predict_layers"), set()),
        (EVERYWHERE | {"q_lora_rank": None}, set()),
        (EVERYWHERE | {"scoring_func": "softmax"}, set(RUNTIMES)),
        (EVERYWHERE | {"model_type": "smolseek_v3_softmax"}, set(RUNTIMES)),
        (EVERYWHERE | {"n_group": 16}, set(RUNTIMES)),
        (EVERYWHERE | {"n_group": 3, "topk_group": 3}, set(RUNTIMES)),
        (EVERYWHERE | {"topk_group": 5}, set(RUNTIMES)),
        (EVERYWHERE | {"num_experts_per_tok": 5}, set(RUNTIMES)),
        (EVERYWHERE | {"n_group": None, "topk_group": None}, set()),
    ],
)
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


def test_every_rule_can_apply_and_has_its_source() -> None:
    worst: dict[str, Any] = {"n_routed_experts": 3, "n_group": 2, "attention_bias": True, "tie_word_embeddings": True}
    worst["rope_scaling"] = {"rope_type": "longrope"}
    applied = [rule for rule in RULES if rule.applies(worst) or rule.applies(worst | {"scoring_func": "softmax"})]
    assert applied == list(RULES)
    assert all(rule.finding.source and rule.finding.remedy and set(rule.runtimes) <= set(RUNTIMES) for rule in RULES)
