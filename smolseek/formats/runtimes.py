"""What each runtime accepts of a DeepSeek-V3 folder: one table of rules over config.json and the tensors' headers.

Every rule names its source. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smolseek.formats.deepseek_v3 import check_sizes, expected_tensors, group_problem, has_stock_router, with_defaults
from smolseek.formats.fields import check_fields, number
from smolseek.formats.headers import FLOATS, Header
from smolseek.formats.rope import rope_parameters

RUNTIMES = ("transformers", "vllm", "sglang", "llama.cpp")

VLLM_HEADS = ((64, 64, 128), (128, 64, 128), (192, 64, 256))
"""(qk_nope_head_dim, qk_rope_head_dim, v_head_dim) of vLLM's CUDA prefill."""

VLLM_LATENTS = ((256, 64), (448, 64), (512, 64))
"""(kv_lora_rank, qk_rope_head_dim) whose sum vLLM's MLA takes, on every backend, with a rotated key of its prefill."""

LARGEST_LLAMA_CPP_EXPERTS = 1024

_TRANSFORMERS, _VLLM, _SGLANG = "run with transformers 5.24", "read in vLLM 0.33", "read in SGLang 0.5.23"
_VLLM_RUN = "run with vLLM 0.32 on a CPU"
_LLAMA_CPP = "run with the llama.cpp of xllamacpp 2026.10.11549"
_EXPORT = "smolseek export gguf"
_PAPER = "DeepSeek-V3, section 2.1.2"
_OTHER = f"{_VLLM_RUN}: other logits; {_LLAMA_CPP}: other logits"


_BETAS = dict.fromkeys(("beta_fast", "beta_slow"), number(0, 1e30).or_null())
"""What YaRN's betas must be."""

Config = Mapping[str, Any]
Headers = Mapping[str, Header]


@dataclass(frozen=True)
class Finding:
    """A reason for which a runtime refuses a folder, or a note on what the runtime needs.

    In a rule `field` and `reason` may name fields of config.json in braces, and {tensors}.
    """

    field: str
    reason: str
    remedy: str
    source: str
    refuses: bool = True


@dataclass(frozen=True)
class Rule:
    """A finding, the runtimes it holds for, and which configs it applies to.

    It does not apply to a folder with the tensor `excused_by`.
    """

    runtimes: tuple[str, ...]
    applies: Callable[[Config], bool]
    finding: Finding
    excused_by: str | None = None

    def found(self, config: Config, headers: Headers | None) -> Finding | None:
        """Returns the finding about this folder, if the rule applies to it."""
        excused = headers is not None and self.excused_by in headers
        return _fill_in(self.finding, config) if self.applies(config) and not excused else None


@dataclass(frozen=True)
class TensorRule:
    """A finding about tensors, the runtimes it holds for, and which tensors of a folder it is about."""

    runtimes: tuple[str, ...]
    concerns: Callable[[Config, Headers], list[str]]
    finding: Finding

    def found(self, config: Config, headers: Headers | None) -> Finding | None:
        """Returns the finding about this folder, if it has such tensors; None where its headers are not known."""
        names = [] if headers is None else self.concerns(config, headers)
        return _fill_in(self.finding, config, names) if names else None


def _fill_in(finding: Finding, config: Config, names: list[str] | None = None) -> Finding:
    """Returns the finding with the config's values in its text."""
    more = f" and {len(names) - 1} more" if names and len(names) > 1 else ""
    shown = defaultdict(lambda: "absent", config, tensors=f"{names[0]}{more}" if names else "")
    field, reason = (text.format_map(shown) for text in (finding.field, finding.reason))
    return dataclasses.replace(finding, field=field, reason=reason)


def _yarn(config: Config) -> Config:
    """Returns YaRN's parameters; empty under another rope type."""
    rope = rope_parameters(config)
    return rope if rope["rope_type"] == "yarn" else {}


def llama_cpp_options(config: Config) -> list[str]:
    """Returns the command line options that llama.cpp needs for this config, because no GGUF file says it to it.

    Raises:
        ValueError: one of YaRN's betas is no number.
    """
    check_fields(_yarn(config), _BETAS)
    betas = {"fast": _yarn(config).get("beta_fast") or 32, "slow": _yarn(config).get("beta_slow") or 1}
    if betas == {"fast": 32, "slow": 1}:
        return []
    return [f"--yarn-beta-{name} {beta:.6g}" for name, beta in betas.items()]


def _scales_alone(yarn: Config) -> bool:
    """Returns whether one of YaRN's two scales stands alone, so that 1 and 0 for what is absent is not the same."""
    both = yarn.get("mscale") and yarn.get("mscale_all_dim")
    return not both and (yarn.get("mscale", 1), yarn.get("mscale_all_dim", 0)) != (1, 0)


def _heads(config: Config) -> tuple[Any, ...]:
    return tuple(config.get(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))


def _cached(config: Config) -> int:
    """Returns how many numbers a layer caches for a token."""
    return int(config.get("kv_lora_rank") or 0) + int(config.get("qk_rope_head_dim") or 0)


def _has_experts(config: Config) -> bool:
    filled = with_defaults(config)
    return bool(filled["first_k_dense_replace"] < filled["num_hidden_layers"])


def _has_no_shared_expert(config: Config) -> bool:
    return _has_experts(config) and config.get("n_shared_experts") == 0


def _layer(name: str) -> int:
    """Returns the number of the layer that a tensor belongs to; -1 outside of layers."""
    number = name.removeprefix("model.layers.").split(".")[0]
    return int(number) if name.startswith("model.layers.") and number.isdecimal() else -1


def _in_layers(name: str, config: Config) -> bool:
    """Returns whether a tensor is a weight of the model: not of a multi-token prediction layer, not a rope table."""
    return _layer(name) < with_defaults(config)["num_hidden_layers"] and not name.endswith("rotary_emb.inv_freq")


def _missing(config: Config, headers: Headers) -> list[str]:
    return [name for name in expected_tensors(config) if name not in headers]


def _misshapen(config: Config, headers: Headers) -> list[str]:
    return [
        name for name, shape in expected_tensors(config).items() if name in headers and headers[name].shape != shape
    ]


def _unexpected(config: Config, headers: Headers) -> list[str]:
    """Returns tensors that have no place in the model; none if it is quantised, where scales stand beside weights."""
    known = {*expected_tensors(config), "lm_head.weight"}
    quantised = bool(config.get("quantization_config"))
    return [] if quantised else [name for name in headers if name not in known and _in_layers(name, config)]


def _uncounted(config: Config, headers: Headers) -> list[str]:
    """Returns tensors of layers after those that config.json counts, multi-token prediction layers among them."""
    counted = config.get("num_nextn_predict_layers", 1)
    layers = with_defaults(config)["num_hidden_layers"] + (counted if isinstance(counted, int) else 0)
    return [name for name in headers if _layer(name) >= layers]


def _not_floats(config: Config, headers: Headers) -> list[str]:
    return [name for name, header in headers.items() if header.dtype not in FLOATS and _in_layers(name, config)]


def _rounded_biases(_config: Config, headers: Headers) -> list[str]:
    names = [name for name in headers if name.endswith("e_score_correction_bias")]
    return [name for name in names if headers[name].dtype not in ("F32", "F64")]


RULES: tuple[Rule | TensorRule, ...] = (
    Rule(
        RUNTIMES,
        lambda config: config.get("model_type") != "deepseek_v3",
        Finding("model_type", "{model_type} is not stock DeepSeek-V3", "convert it to deepseek_v3", _TRANSFORMERS),
    ),
    Rule(
        RUNTIMES,
        lambda config: not has_stock_router(config),
        Finding("scoring_func", "stock V3 scores experts by sigmoid, not {scoring_func}", "train with sigmoid", _PAPER),
    ),
    Rule(
        RUNTIMES,
        lambda config: group_problem(config) is not None,
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
        Finding(
            "scoring_func",
            "absent, and read as softmax",
            "write scoring_func: sigmoid",
            f"{_VLLM_RUN}: other logits; {_LLAMA_CPP}",
        ),
    ),
    Rule(
        ("sglang",),
        lambda config: "scoring_func" not in config,
        Finding("scoring_func", "absent, and loading stops", "write scoring_func: sigmoid", _SGLANG),
    ),
    Rule(
        ("vllm", "sglang", "llama.cpp"),
        lambda config: config.get("topk_method") != "noaux_tc",
        Finding(
            "topk_method",
            "{topk_method}, so the routing bias is not read",
            "write topk_method: noaux_tc",
            f"{_VLLM_RUN}: it stops at the bias; {_SGLANG}: it stops where the field is absent; {_LLAMA_CPP}",
        ),
    ),
    Rule(
        ("transformers", "vllm", "sglang"),
        lambda config: _has_experts(config) and None in (config.get("n_group", 1), config.get("topk_group", 1)),
        Finding(
            "n_group",
            "n_group {n_group} and topk_group {topk_group}: null is no number of groups",
            "write n_group: 1 and topk_group: 1",
            f"{_TRANSFORMERS}: it stops; {_VLLM_RUN}: it stops; {_SGLANG}",
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
            f"{_VLLM_RUN}: other logits; {_SGLANG}",
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
        lambda config: rope_parameters(config)["rope_type"] not in ("default", "yarn"),
        Finding(
            "rope_parameters",
            "of rope types only the default and yarn are read",
            "convert with --profile portable and without --exact",
            f"{_VLLM_RUN}: other logits, or it stops; {_SGLANG}; {_LLAMA_CPP}",
        ),
    ),
    Rule(
        ("vllm",),
        lambda config: bool(config.get("tie_word_embeddings")),
        Finding(
            "tie_word_embeddings",
            "lm_head is not taken from the embeddings",
            "convert with --profile vllm, which writes lm_head.weight",
            f"{_VLLM_RUN}: other logits",
        ),
        excused_by="lm_head.weight",
    ),
    Rule(
        ("vllm",),
        lambda config: _cached(config) not in map(sum, VLLM_LATENTS),
        Finding(
            "kv_lora_rank",
            "{kv_lora_rank} + {qk_rope_head_dim}: its MLA takes 320, 512 or 576 numbers only",
            "use --profile vllm; or serve with VLLM_MLA_DISABLE=1, which caches whole keys and values",
            f"{_VLLM_RUN}; {_VLLM}",
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
            "the GGUF file must say that there is none, as deepseek2.attention.q_lora_rank = 0",
            "smolseek export gguf writes it",
            _LLAMA_CPP,
            refuses=False,
        ),
    ),
    Rule(
        ("vllm", "sglang", "llama.cpp"),
        lambda config: config.get("hidden_act", "silu") != "silu",
        Finding(
            "hidden_act",
            "{hidden_act}: only silu is computed",
            "train with silu",
            f"{_VLLM_RUN}: it stops; {_SGLANG}: it stops; {_LLAMA_CPP}: other logits",
        ),
    ),
    Rule(
        ("vllm", "llama.cpp"),
        lambda config: config.get("rope_interleave") is False,
        Finding(
            "rope_interleave",
            "false, and pairs of neighbouring channels are rotated all the same",
            "interleave the rotated rows of the queries and of kv_a_proj_with_mqa, and write true",
            _OTHER,
        ),
    ),
    Rule(
        ("vllm", "sglang", "llama.cpp"),
        lambda config: _yarn(config).get("truncate", True) is False,
        Finding(
            "rope_parameters",
            "YaRN's truncate: false is not read",
            "train with the default",
            f"{_SGLANG}; {_OTHER}",
        ),
    ),
    Rule(
        ("vllm", "sglang"),
        lambda config: _yarn(config).get("attention_factor") is not None,
        Finding(
            "rope_parameters",
            "YaRN's attention_factor is not read",
            "say it by mscale and mscale_all_dim",
            f"{_VLLM_RUN}: other logits; {_SGLANG}",
        ),
    ),
    Rule(
        ("vllm", "sglang"),
        lambda config: _scales_alone(_yarn(config)),
        Finding(
            "rope_parameters",
            "YaRN's mscale without mscale_all_dim, or the reverse, scales the rotation; in transformers it does not",
            "train with both of them, or with neither",
            f"{_VLLM_RUN}: other logits; {_SGLANG}",
        ),
    ),
    Rule(
        ("llama.cpp",),
        lambda config: bool(llama_cpp_options(config)),
        Finding(
            "rope_parameters",
            "YaRN's beta_fast and beta_slow are not read from the file",
            "run it with --yarn-beta-fast and --yarn-beta-slow as in config.json",
            _LLAMA_CPP,
            refuses=False,
        ),
    ),
    Rule(
        ("llama.cpp",),
        lambda config: config.get("qk_nope_head_dim") == 0,
        Finding(
            "qk_nope_head_dim",
            "0, and llama.cpp ends with a failed assertion",
            "use 1 or more unrotated channels",
            _LLAMA_CPP,
        ),
    ),
    Rule(
        ("llama.cpp",),
        lambda config: config.get("num_hidden_layers") in (26, 27) and config.get("q_lora_rank") is not None,
        Finding(
            "q_lora_rank",
            "{q_lora_rank} with {num_hidden_layers} layers, which llama.cpp takes for DeepSeek-V2-Lite, without it",
            "convert without --q-lora-rank",
            f"{_LLAMA_CPP}: attn_q.weight not found",
        ),
    ),
    Rule(
        ("llama.cpp",),
        _has_no_shared_expert,
        Finding(
            "n_shared_experts",
            "0, and llama.cpp ends with a failed assertion",
            "convert with at least one shared expert",
            _LLAMA_CPP,
        ),
    ),
    Rule(
        ("vllm",),
        _has_no_shared_expert,
        Finding(
            "n_shared_experts",
            "0, and vLLM on a CPU ends with a division by zero",
            "convert with at least one shared expert",
            f"{_VLLM_RUN}: the process ends",
        ),
    ),
    Rule(
        ("llama.cpp",),
        lambda config: (config.get("n_routed_experts") or 0) > LARGEST_LLAMA_CPP_EXPERTS,
        Finding(
            "n_routed_experts",
            f"{{n_routed_experts}} are more than llama.cpp's {LARGEST_LLAMA_CPP_EXPERTS}",
            "use fewer, wider experts",
            f"{_LLAMA_CPP}: LLAMA_MAX_EXPERTS",
        ),
    ),
    TensorRule(
        RUNTIMES,
        _missing,
        Finding(
            "{tensors}",
            "not in the folder though config.json asks for it",
            "fetch the weights again, or write the fields of config.json that they were made with",
            f"{_TRANSFORMERS}: random numbers in its place, or it stops at a missing expert; {_VLLM_RUN}: "
            f"it stops at a missing norm, otherwise what memory holds; {_SGLANG}: what memory holds; {_EXPORT}",
        ),
    ),
    TensorRule(
        RUNTIMES,
        _misshapen,
        Finding(
            "{tensors}",
            "another shape than config.json asks for",
            "write the sizes into config.json that the weights have",
            f"{_TRANSFORMERS}: it stops; {_VLLM_RUN}: it stops, or fills an expert in part; {_SGLANG}; {_EXPORT}",
        ),
    ),
    TensorRule(
        ("transformers", "sglang"),
        _unexpected,
        Finding(
            "{tensors}",
            "has no place in the model and is left out",
            "remove it",
            f"{_TRANSFORMERS}; {_SGLANG}: a warning, but it stops at such a gate_proj or up_proj outside the experts",
            refuses=False,
        ),
    ),
    TensorRule(
        ("vllm", "llama.cpp"),
        _unexpected,
        Finding(
            "{tensors}",
            "has no place in the model: loading stops or, at a bias, leaves it out",
            "remove it",
            f"{_VLLM_RUN}; {_EXPORT}",
        ),
    ),
    TensorRule(
        ("vllm",),
        _uncounted,
        Finding(
            "{tensors}",
            "is in a layer that num_nextn_predict_layers does not count: loading stops",
            "write how many such layers there are, or remove it",
            _VLLM_RUN,
        ),
    ),
    TensorRule(
        ("llama.cpp",),
        _not_floats,
        Finding("{tensors}", "is quantised", "name the checkpoint that it was made from", _EXPORT),
    ),
    TensorRule(
        RUNTIMES,
        _rounded_biases,
        Finding(
            "{tensors}",
            "is not fp32, so the balancing was rounded",
            "write it in fp32, in which every runtime keeps it",
            f"{_TRANSFORMERS}; {_VLLM_RUN}; {_SGLANG}",
            refuses=False,
        ),
    ),
)


def check(config: Config, headers: Headers | None = None) -> dict[str, list[Finding]]:
    """Returns each runtime's findings about a DeepSeek-V3 config.json and, where they are known, its tensors' headers.

    A runtime loads the folder if no finding refuses it. A config that is not DeepSeek-V3's gets one finding only.

    Raises:
        ValueError: as `check_sizes` and `llama_cpp_options` do.
    """
    findings: dict[str, list[Finding]] = {runtime: [] for runtime in RUNTIMES}
    is_v3 = config.get("model_type") == "deepseek_v3"
    if is_v3:
        check_sizes(config)
        config = with_defaults(config)
    for rule in RULES if is_v3 else RULES[:1]:
        finding = rule.found(config, headers)
        if finding is not None:
            for runtime in rule.runtimes:
                findings[runtime].append(finding)
    return findings


def verdict(findings: list[Finding]) -> str:
    """Returns one runtime's findings as a line: loads, or refuses and why; notes only if nothing is refused."""
    refusals = [finding for finding in findings if finding.refuses]
    told = "; ".join(f"{finding.field}: {finding.reason} ({finding.remedy})" for finding in refusals or findings)
    if refusals:
        return f"refuses: {told}"
    return f"loads, note {told}" if told else "loads"


def render_rules() -> str:
    """Returns the table as Markdown, one rule a line; names in braces stand for the folder's own values."""
    rows = ["| runtimes | about | what | what to change | source |", "|---|---|---|---|---|"]
    for rule in RULES:
        finding, runtimes = rule.finding, "all" if rule.runtimes == RUNTIMES else ", ".join(rule.runtimes)
        about = finding.field.replace("{tensors}", "a tensor")
        kind = "" if finding.refuses else "note: "
        rows.append(f"| {runtimes} | `{about}` | {kind}{finding.reason} | {finding.remedy} | {finding.source} |")
    return "\n".join(rows)
