"""The start of a run without a checkpoint: random weights, and a tokenizer trained on the run's own text."""

from __future__ import annotations

from typing import Any

import torch

from smolseek.config import Recipe
from smolseek.data.splits import training_documents
from smolseek.data.tokenizer import train_tokenizer
from smolseek.formats.refusing import refusing
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.skeleton import draw_weights


def random_model(recipe: Recipe, tokenizer: Any) -> DeepseekV3 | StockModel:
    """Returns a model of `recipe.model` with random weights drawn from `recipe.seed`, in a single process.

    Raises:
        ValueError: as `random_skeleton` does.
    """
    return draw_weights(random_skeleton(recipe, tokenizer), recipe.seed)


def random_skeleton(recipe: Recipe, tokenizer: Any) -> DeepseekV3 | StockModel:
    """Returns a model of `recipe.model` without memory; `draw_weights` gives it random weights.

    Raises:
        ValueError: an unknown model_type, a field that its config does not have or that comes from the tokenizer, or
            sizes that do not fit.
    """
    import transformers

    tree = dict(recipe.model)
    model_type = tree.pop("model_type", None)
    kinds = {"llama": transformers.LlamaConfig, "deepseek_v3": transformers.DeepseekV3Config}
    if model_type not in kinds:
        raise ValueError(f"recipe key model.model_type: {model_type!r} is not one of {', '.join(kinds)}")
    known = {*vars(kinds[model_type]()), "rope_theta", "scoring_func"}
    own = {"vocab_size": len(tokenizer)} | {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    for key in tree:
        if key in own:
            raise ValueError(f"recipe key model.{key}: the tokenizer gives it, here {own[key]}; leave it out")
        if key not in known:
            raise ValueError(f"recipe key model.{key}: unknown to the config of {model_type}")
    with refusing("recipe key model: no model can be built from it"), torch.device("meta"):
        config = kinds[model_type](**own, **tree)
        if model_type == "deepseek_v3":
            return DeepseekV3(config)
        return StockModel(transformers.LlamaForCausalLM(config).float())


def corpus_tokenizer(recipe: Recipe) -> Any:
    """Returns a byte-level BPE tokenizer of `train_tokenizer_entries` entries, trained on the training documents."""
    texts = (document.text for document in training_documents(recipe.data))
    return train_tokenizer(texts, recipe.train_tokenizer_entries)
