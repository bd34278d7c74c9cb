"""What each runtime accepts of a DeepSeek-V3 config.json: one table of rules, each with its source; no torch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RUNTIMES = ("transformers", "vllm", "sglang", "llama.cpp")

VLLM_HEADS = ((64, 64, 128), (128, 64, 128), (192, 64, 256))
"""(qk_nope_head_dim, qk_rope_head_dim, v_head_dim) of vLLM's CUDA prefill."""

_TRANSFORMERS, _VLLM, _SGLANG = "run with transformers 5.23", "read in vLLM 0.33", "read in SGLang 0.5.10"
_LLAMA_CPP = "run with the llama.cpp of llama-cpp-python 0.3.36"
_PAPER = "DeepSeek-V3, section 2.1.2"


@dataclass(frozen=True)
class Finding:
    """Something about a config that a runtime refuses or, as a note, asks for; `reason` may name fields in braces."""

    field: str
    reason: str
    remedy: str
    source: str
    refuses: bool = True


@dataclass(frozen=True)
class Rule:
    """A finding, the runtimes it holds for and the configs it applies to."""

    runtimes: tuple[str, ...]
    applies: Callable[[dict[str, Any]], bool]
    finding: Finding


def _rope_type(config: dict[str, Any]) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type") or "default"


def _groups_invalid(config: dict[str, Any]) -> bool:
    """Experts are scored by the two best of their group, so every group needs two; K must fit the chosen groups."""
    experts, groups, chosen = (config.get(name) or 1 for name in ("n_routed_experts", "n_group", "topk_group"))
    return (
        experts % groups != 0
        or experts < 2 * groups
        or chosen > groups
        or (config.get("num_experts_per_tok") or 1) > chosen * (experts // groups)
    )


def _heads(config: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(config.get(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))


RULES = (
    Rule(
        RUNTIMES,
        lambda config: config.get("model_type") != "deepseek_v3",
        Finding("model_type", "{model_type} is not stock DeepSeek-V3", "convert it to deepseek_v3", _TRANSFORMERS),
    ),
    Rule(
        RUNTIMES,
        lambda config: config.get("scoring_func", "sigmoid") != "sigmoid",
        Finding("scoring_func", "stock V3 scores experts by sigmoid, not {scoring_func}", "train with sigmoid", _PAPER),
    ),
    Rule(
        RUNTIMES,
        _groups_invalid,
        Finding(
            "n_group",
            "top {num_experts_per_tok} of {n_routed_experts} experts from {topk_group} of {n_group} groups: the groups "
            "must be equal, of two experts or more, and the chosen ones must hold enough",
            "set n_group and topk_group to 1",
            _TRANSFORMERS,
        ),
    ),
    Rule(
        ("vllm", "llama.cpp"),
        lambda config: "scoring_func" not in config,
        Finding("scoring_func", "absent, and read as softmax", "write scoring_func: sigmoid", f"{_VLLM}; {_LLAMA_CPP}"),
    ),
    Rule(
        ("vllm", "llama.cpp"),
        lambda config: config.get("topk_method") != "noaux_tc",
        Finding(
            "topk_method",
            "{topk_method}, so the routing bias is not read",
            "write topk_method: noaux_tc",
            f"{_VLLM}; {_LLAMA_CPP}",
        ),
    ),
    Rule(
        RUNTIMES,
        lambda config: "num_nextn_predict_layers" not in config,
        Finding(
            "num_nextn_predict_layers",
            "absent, and transformers then assumes one",
            "write num_nextn_predict_layers: 0",
            _TRANSFORMERS,
            refuses=False,
        ),
    ),
    Rule(
        ("vllm", "sglang"),
        lambda config: bool(config.get("attention_bias")),
        Finding(
            "attention_bias",
            "the bias of kv_a_proj_with_mqa is dropped, so the output is wrong",
            "convert with --profile portable and without --exact",
            f"{_VLLM}; {_SGLANG}",
        ),
    ),
    Rule(
        ("llama.cpp",),
        lambda config: bool(config.get("attention_bias")),
        Finding(
            "attention_bias",
            "loading fails at the bias of kv_a_proj_with_mqa",
            "convert with --profile portable and without --exact",
            _LLAMA_CPP,
        ),
    ),
    Rule(
        ("vllm", "sglang", "llama.cpp"),
        lambda config: _rope_type(config) not in ("default", "yarn"),
        Finding(
            "rope_parameters",
            "of rope types only the default and yarn are read",
            "convert with --profile portable and without --exact",
            f"{_VLLM}; {_SGLANG}; {_LLAMA_CPP}",
        ),
    ),
    Rule(
        ("vllm",),
        lambda config: bool(config.get("tie_word_embeddings")),
        Finding(
            "tie_word_embeddings",
            "lm_head is not taken from the embeddings",
            "convert with --profile vllm, which writes lm_head.weight",
            _VLLM,
        ),
    ),
    Rule(
        ("vllm",),
        lambda config: _heads(config) not in VLLM_HEADS,
        Finding(
            "v_head_dim",
            "CUDA prefill (Hopper and older) takes no head sizes (nope, rope, v) = ({qk_nope_head_dim}, "
            "{qk_rope_head_dim}, {v_head_dim})",
            f"use --profile vllm, or one of {', '.join(map(str, VLLM_HEADS))}",
            _VLLM,
        ),
    ),
    Rule(
        ("vllm", "sglang"),
        lambda config: config.get("kv_lora_rank") != 512,
        Finding(
            "kv_lora_rank",
            "{kv_lora_rank} runs on Triton's kernels only",
            "choose the Triton attention backend",
            f"{_VLLM}; {_SGLANG}",
            refuses=False,
        ),
    ),
    Rule(
        ("llama.cpp",),
        lambda config: config.get("q_lora_rank") is None,
        Finding(
            "q_lora_rank",
            "the GGUF file must say that there is none",
            "write deepseek2.attention.q_lora_rank = 0 into it",
            _LLAMA_CPP,
            refuses=False,
        ),
    ),
)


def check(config: dict[str, Any]) -> dict[str, list[Finding]]:
    """What each runtime says to a DeepSeek-V3 config.json; it loads where no finding refuses."""
    shown = defaultdict(lambda: "absent", config)
    findings: dict[str, list[Finding]] = {runtime: [] for runtime in RUNTIMES}
    for rule in RULES:
        if rule.applies(config):
            finding = dataclasses.replace(rule.finding, reason=rule.finding.reason.format_map(shown))
            for runtime in rule.runtimes:
                findings[runtime].append(finding)
    return findings


def verdict(findings: list[Finding]) -> str:
    """One runtime's findings as a line: loads, or refuses and why; notes only where nothing is refused."""
    refusals = [finding for finding in findings if finding.refuses]
    told = "; ".join(f"{finding.field}: {finding.reason} ({finding.remedy})" for finding in refusals or findings)
    if refusals:
        return f"refuses: {told}"
    return f"loads, note {told}" if told else "loads"
