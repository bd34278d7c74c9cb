"""The model card of a folder: origin, cache, quality, loading, limits and licence."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from smolseek.config import Recipe
from smolseek.formats.deepseek_v3 import has_stock_router, is_latent
from smolseek.formats.paths import plain_name, plain_names
from smolseek.formats.rope import YARN_STANDS_IN, rope_parameters
from smolseek.formats.runtimes import check, llama_cpp_options, verdict
from smolseek.numerics.perplexity import perplexity

_LOADING = {
    "transformers": '`AutoModelForCausalLM.from_pretrained("{name}")`',
    "vllm": "`vllm serve {name}`",
    "sglang": "`python -m sglang.launch_server --model-path {name}`",
    "llama.cpp": "`smolseek export gguf {name} {name}.gguf`, then `llama-completion -m {name}.gguf`",
}
_TRITON = {"vllm": "TRITON_MLA", "sglang": "triton"}
"""What the runtimes call the attention backend of Triton's kernels."""
_STAGES = ("dense", "closed_form", "refined", "distilled")


@dataclass(frozen=True)
class Training:
    """A training for the card: its recipe, its length, and the losses of the run's models on the same held-out text."""

    recipe: Recipe
    steps: int
    tokens: int
    held_out_losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """The content of a folder's README.md.

    Args:
        name: the model's name.
        config: the model's config.json.
        licence: the licence fields of its source, from `licence_fields`.
        conversion: the conversion.json of a converted model.
        training: the training of a trained model.
    """

    name: str
    config: Mapping[str, Any]
    licence: Mapping[str, Any]
    conversion: Mapping[str, Any] | None = None
    training: Training | None = None

    def render(self) -> str:
        """Returns the card as Markdown with its front matter.

        Raises:
            ValueError: the conversion has other values than smolseek writes.
        """
        try:
            return self._render()
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            if self.conversion is None:
                raise
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(f"conversion.json: not as smolseek writes it ({what}); convert again") from error

    def _render(self) -> str:
        sections = {
            "": self._origin(),
            "Cache": self._cache(),
            "Quality": self._quality(),
            "Loading": self._loading(),
            "Limits": "\n".join(f"- {limit}" for limit in self._limits()),
            "Licence": self._licence(),
            "Settings of the conversion": self._settings(),
            "Recipe of the training": self._recipe(),
        }
        parts = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
        return "\n\n".join([f"{self._front_matter()}\n# {self.name}", *parts]) + "\n"

    @property
    def _source(self) -> str | None:
        """The dense model's id on the hub or its path; None for random weights."""
        if self.conversion:
            return self.conversion["source"]
        source = self.training.recipe.source if self.training else None
        return source and re.sub(r"@[0-9a-f]{40}$", "", source)

    @property
    def _source_name(self) -> str:
        """The source's name in the text: an id on the hub, or the last part of a local path."""
        return "Random weights" if self._source is None else plain_name(self._source)

    @property
    def _on_hub(self) -> bool:
        return self._source is not None and "/" in self._source_name

    @property
    def _is_stock(self) -> bool:
        return has_stock_router(self.config)

    @property
    def _is_exact(self) -> bool:
        """Whether the model computes what its source does: nothing was approximated, and nothing trained since."""
        settings = self.conversion["settings"] if self.conversion else {}
        return bool(settings.get("exact")) and settings.get("experts") != "carve" and self.training is None

    def _front_matter(self) -> str:
        tags = [self.config["model_type"], *(["mla"] if is_latent(self.config) else []), "smolseek"]
        tree: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
        tree |= ({"base_model": self._source} if self._on_hub else {}) | dict(self.licence)
        return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}---"

    def _origin(self) -> str:
        kind = self.config["model_type"] + ("" if self._is_stock else ", softmax router: not stock DeepSeek-V3")
        if self.conversion:
            versions = self.conversion["versions"]
            sentences = [
                f"{self._source_name}, converted to a stock `DeepseekV3ForCausalLM` by smolseek {versions['smolseek']} "
                f"in {self.conversion['seconds']:,.0f} s (transformers {versions['transformers']}, torch "
                f"{versions['torch']})."
            ]
            if not self._is_exact:
                sentences.append("The error of every layer by stage is in `conversion.json`.")
        elif self._source is None:
            sentences = [f"A causal language model ({kind}), made by smolseek from random weights."]
        else:
            sentences = [f"{self._source_name} ({kind}), trained on by smolseek."]
        if self.training:
            steps, tokens, data = self.training.steps, self.training.tokens, self.training.recipe.data.train
            sentences.append(f"Trained for {steps:,} steps, {tokens:,} tokens of {', '.join(map(plain_name, data))}.")
        elif self._is_exact:
            sentences.append("It computes what its source computes, but for rounding.")
        elif self.conversion:
            sentences.append("It learned from the dense model's outputs alone; `smolseek train` heals it on text.")
        return " ".join(sentences)

    def _cache(self) -> str:
        if not self.conversion:
            return ""
        cache = self.conversion["cache"]
        return (
            "| key-value cache per token | numbers | bytes |\n|---|---|---|\n"
            f"| of the source | {cache['source_numbers_per_token']:,} | {cache['source_bytes_per_token']:,} |\n"
            f"| of this model | {cache['numbers_per_token']:,} | {cache['bytes_per_token']:,} |\n\n"
            f"In each layer a latent of {self.config['kv_lora_rank']} and one rotated key of "
            f"{self.config['qk_rope_head_dim']} numbers."
        )

    def _settings(self) -> str:
        if not self.conversion:
            return ""
        commit = {"source_commit": self.conversion["source_commit"]} if self.conversion.get("source_commit") else {}
        return _yaml({"source": self._source_name, **commit, **plain_names(self.conversion["settings"])})

    def _recipe(self) -> str:
        return _yaml(plain_names(dataclasses.asdict(self.training.recipe))) if self.training else ""

    def _quality(self) -> str:
        parts = []
        if self.conversion and self.conversion["losses"]:
            losses = {stage: loss for stage in _STAGES if (loss := self.conversion["losses"].get(stage)) is not None}
            calibration = self.conversion["calibration"]
            tokens, digest = calibration["judged_tokens"], calibration["tokens_sha256"]
            apart = "did not learn from" if calibration.get("judged_apart", True) else "learned from"
            read = "; ".join(
                f"{plain_name(fact['source'])}: {fact['windows']:,} windows of {fact['documents']:,} documents"
                for fact in calibration.get("sources", ())
            )
            parts.append(
                f"Perplexity by stage of the conversion, on {tokens:,} tokens of the calibration text that it {apart} "
                f"({read + '; ' if read else ''}all of that text: sha256 {digest}):\n\n{_losses(losses)}"
            )
        if self.conversion and self.conversion.get("judged"):
            what = "After the conversion, on text that nothing was learnt from, beside the dense model"
            parts.append(f"{what}:\n\n{_judged(self.conversion['judged'])}")
        if self.training and self.training.held_out_losses:
            parts.append(f"On held-out text, after training:\n\n{_losses(self.training.held_out_losses)}")
        return "\n\n".join(parts) or "Not measured."

    def _loading(self) -> str:
        if not self._is_stock:
            return f'`smolseek.load("{self.name}")` alone: no other loader has a softmax router in this architecture.'
        if self.config["model_type"] != "deepseek_v3":
            return f'`AutoModelForCausalLM.from_pretrained("{self.name}")`'
        rows = ["| runtime | by config.json | command |", "|---|---|---|"]
        for runtime, findings in check(dict(self.config)).items():
            refused = any(finding.refuses for finding in findings)
            command = "" if refused else _LOADING[runtime].format(name=self.name)
            if "choose the Triton attention backend" in verdict(findings):
                command = f"{command[:-1]} --attention-backend {_TRITON[runtime]}`"
            if command and runtime == "llama.cpp":
                command = " ".join([command[:-1], *llama_cpp_options(self.config)]) + "`"
            rows.append(f"| {runtime} | {verdict(findings)} | {command} |")
        return "\n".join(rows)

    def _limits(self) -> list[str]:
        context = self.config.get("max_position_embeddings")
        limits = [f"It reads up to {context:,} tokens."] if context else []
        if self._is_exact:
            limits.append("It knows what its source knows, gets wrong what that gets wrong, and has its biases.")
        elif self.conversion:
            limits.append(
                "It is an approximation of its source, with what that knows, gets wrong and is biased to, and was "
                "compared with it by the numbers above alone; `smolseek eval FOLDER --compare SOURCE --text FILE` says "
                "where the two differ."
            )
        if self.conversion:
            window = self.conversion["calibration"].get("window_tokens")
            limits += [f"The conversion weighed errors on windows of {window:,} tokens."] if window else []
            limits += _approximations(self.conversion["layers"])
            if rope_parameters(self.config)["rope_type"] == "yarn":
                limits.append(f"{YARN_STANDS_IN}.")
            if self.conversion["settings"]["exact"]:
                limits.append("The exact form: its cache is larger, and transformers alone loads it.")
        if not self._is_stock:
            limits.append("A softmax router is not stock DeepSeek-V3.")
        return limits

    def _licence(self) -> str:
        if self._source is None:
            return "Trained from random weights: the licence is the trainer's to choose."
        if not self.licence:
            return (
                f"{self._source_name} came with no card that names a licence; its licence files, if it has any, are in "
                "this folder. Ask its owner before you share what was made from it."
            )
        name = self.licence.get("license_name", self.licence.get("license"))
        return f"That of {self._source_name}: {name}. Its licence files, if it has any, are in this folder."


def _approximations(layers: list[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each part of the source that DeepSeek-V3 lacks, with the largest loss in a layer."""
    sentences = []
    for key, what in (("qk_norm_energy_lost", "norms on queries and keys"), ("bias_energy_lost", "biases")):
        if layers and key in layers[0]:
            most = max(layer[key] for layer in layers)
            sentences.append(
                f"The source's {what} are approximated: before refinement up to {most:.2g} of their energy is lost."
            )
    return sentences


def _losses(losses: Mapping[str, float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {loss:.4f} | {perplexity(loss):.3f} |" for name, loss in losses.items()]
    return "\n".join(["| | loss | perplexity |", "|---|---|---|", *rows])


def _judged(records: list[dict[str, Any]]) -> str:
    rows = [
        f"| {plain_name(r['source'])} | {r['tokens']:,} | {r['dense_perplexity']:.3f} | {r['perplexity']:.3f} "
        f"| {r['ratio']:.3f} | {r['kl']:.4f} | {r['agreement']:.1%} |"
        for r in records
    ]
    head = "| | tokens | dense perplexity | perplexity | ratio | KL | same top token |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _yaml(tree: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(tree, default=str))
    return f"```yaml\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)}```"
