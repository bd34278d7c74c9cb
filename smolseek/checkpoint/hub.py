"""Reads models from stock Hugging Face folders and writes them back."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.source import (
    check_tokenizer,
    has_tokenizer,
    read_config,
    read_conversion,
    read_end_tokens,
    read_json,
    resolve_folder,
)
from smolseek.formats.deepseek_v3 import SOFTMAX_MODEL_TYPE, disk_config, expected_tensors
from smolseek.formats.fields import Rule, check_architectures, check_fields, number
from smolseek.formats.headers import float_dtype
from smolseek.formats.refusing import refusing
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import routers, take_expert_counts
from smolseek.model.skeleton import AnyModel, Shard, keep_whole, take_memory
from smolseek.numerics.memory import release_memory
from smolseek.numerics.rounding import rounded
from smolseek.numerics.shards import gathers_weights, own_part, release_gathered, whole

_READ_LATER: dict[str, Rule] = dict.fromkeys(
    ("max_position_embeddings", "sliding_window"), number(1, 1e12).or_null()
) | {
    "attention_dropout": number(0, 1).or_null(),
    "dtype": Rule(lambda name: isinstance(getattr(torch, name, None), torch.dtype), "a dtype of torch").or_null(),
}
"""Fields that transformers takes as they are, and that are first read where a model generates, trains or is saved."""
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"
_NOTES = ("_from_model_config", "transformers_version")
"""Fields of generation_config.json that change nothing."""
_READ_BY_TOKENIZERS = ("model_type", "transformers_version")
"""Fields of config.json that change how transformers reads the tokenizer beside it."""
_EARLIER_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Names of tokenizer classes that transformers 4 knows, too."""
_HEAD_TOLERANCE = 0.01
"""Logits may be this far, relative to their size, from what the head gives; bf16 rounds by up to 0.004."""
Part = tuple[str, int | None, slice]
"""Name of a stored tensor, the expert it belongs to, and the rows of the model's tensor that it fills."""


def load_tokenizer(folder: str | Path) -> Any:
    """Returns the fast tokenizer of a folder, hub id or GGUF file.

    Raises:
        ValueError: the folder has no tokenizer, or transformers does not load it.
    """
    from transformers import AutoTokenizer

    path = resolve_folder(folder)
    check_tokenizer(path, folder)
    with refusing(f"checkpoint {folder}: transformers does not load its tokenizer{_sentencepiece_remedy(path)}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a")  # some fields are first read when a text is encoded
        return tokenizer


def _sentencepiece_remedy(folder: Path) -> str:
    """Returns what to install if the only tokenizer of a folder is one of sentencepiece, which is not there; or ""."""
    alone = not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    if alone and importlib.util.find_spec("sentencepiece") is None:
        return ", as sentencepiece is not installed; install it: pip install sentencepiece protobuf"
    return ""


def load_config(folder: str | Path) -> Any:
    """Returns the transformers config of a folder; a `DeepseekV3Config` for V3, with a softmax router too.

    Raises:
        ValueError: as `read_config` does, it is no language model's, or transformers refuses it.
    """
    from transformers import AutoConfig, DeepseekV3Config

    tree = read_config(folder)
    check_architectures(tree, where=f"checkpoint {folder}: config.json")
    with refusing(f"checkpoint {folder}: transformers does not take its config.json"):
        if tree.get("model_type") == SOFTMAX_MODEL_TYPE:
            config: Any = DeepseekV3Config(**{**tree, "model_type": "deepseek_v3"})
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found = {field: getattr(config, field, None) for field in _READ_LATER}
    found = {field: None if value is False else value for field, value in found.items()}
    found["dtype"] = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    check_fields(found, _READ_LATER, where=f"checkpoint {folder}: config.json")
    return config


def check_stock(folder: str | Path) -> None:
    """Checks that transformers takes a folder's config.json.

    Raises:
        ValueError: as `load_config` does, or no model can be built from it.
    """
    _stock_skeleton(folder)


def check_generation_config(folder: Path) -> None:
    """Checks what a folder says of generation, in generation_config.json or, as old ones do, in config.json.

    Raises:
        ValueError: as `read_end_tokens` does, or transformers refuses it.
    """
    read_end_tokens(folder)
    _generation_fields(folder)


def _generation_fields(folder: Path) -> dict[str, Any]:
    """Returns what transformers reads of generation in a folder, without defaults."""
    from transformers import GenerationConfig

    name = _GENERATION_CONFIG if (folder / _GENERATION_CONFIG).is_file() else "config.json"
    if not (folder / name).is_file():
        return {}
    read = GenerationConfig.from_dict if name == _GENERATION_CONFIG else GenerationConfig.from_model_config
    tree = read_json(folder / name)
    with refusing(f"checkpoint {folder}: transformers does not take what its {name} says of generation"):
        fields = read(tree).to_diff_dict()
    return {field: value for field, value in fields.items() if field not in _NOTES}


def _stock_skeleton(folder: str | Path, *, untied: bool = False) -> Any:
    """Returns transformers' fp32 model of a folder's config.json, without memory for its weights.

    `untied` gives it a head of its own, whatever config.json says.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    config.tie_word_embeddings = config.tie_word_embeddings and not untied
    with refusing(f"checkpoint {folder}: transformers builds no model from its config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def load(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", shard: Shard = keep_whole
) -> DeepseekV3 | StockModel:
    """Loads a model from a folder, hub id or GGUF file: DeepSeek-V3 as our `DeepseekV3`, others by transformers.

    With the `shard` of several processes each of them reads its part of the weights alone; all of them must call this.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `TensorFolder` do, or transformers refuses the config, or
            the weights do not fit it.
    """
    folder = resolve_folder(source)
    if read_config(folder).get("model_type") not in ("deepseek_v3", SOFTMAX_MODEL_TYPE):
        return load_stock(folder, dtype=dtype, device=device, shard=shard)
    tensors = TensorFolder(folder)
    config = load_config(folder)
    config.dtype = _written_dtype(tensors)
    config.tie_word_embeddings = config.tie_word_embeddings and not tensors.has_own_head()
    _check_tensors(tensors, read_config(folder) | {"tie_word_embeddings": config.tie_word_embeddings})
    with refusing(f"checkpoint {source}: no model can be built from its config.json"):
        with torch.device("meta"):
            skeleton = DeepseekV3(config).to(dtype)
        type(skeleton.model.rotary_emb)(config)  # some rope parameters are first read where a table has numbers
    return _read(skeleton, tensors, source, device, shard)


def load_stock(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", shard: Shard = keep_whole
) -> StockModel:
    """Loads any causal model as unmodified transformers runs it; `shard` as in `load`.

    Its config says that the head is tied only if it is: transformers keeps a head of its own whatever config.json says.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `TensorFolder` do, or transformers does not load the model,
            or would draw weights that the checkpoint lacks, or its logits are not what its head gives.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(source)
    model_type = read_config(folder).get("model_type")
    tensors = TensorFolder(folder)
    for name, weight in _stock_skeleton(folder).state_dict().items():  # before memory is taken for them
        if name in tensors.headers and tensors.shape(name) != weight.shape:
            raise ValueError(_misfit(name, tensors.shape(name), tuple(weight.shape)))
    if shard is not keep_whole:
        return _load_parts(source, tensors, dtype, device, shard)
    with refusing(f"checkpoint {source}: transformers does not load model_type {model_type!r}"):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"checkpoint {source}: no tensor {missing[0]}; the weights do not fit its config.json")
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    model.config.dtype = _written_dtype(tensors)
    stock = StockModel(model.to(device)).eval()
    stock.end_token_ids = read_end_tokens(folder)
    return _with_plain_head(_tried(stock, source), source)


@torch.no_grad()
def _with_plain_head(stock: StockModel, source: str | Path) -> StockModel:
    """Returns the model; ValueError if its logits are not what its head gives, for only that is computed here."""
    ids_BT = torch.tensor([[0, stock.config.vocab_size // 2]], device=stock.lm_head.weight.device)
    own_BTV, plain_BTV = stock.model(ids_BT, use_cache=False).logits.float(), stock(ids_BT).float()
    if (own_BTV - plain_BTV).norm() > _HEAD_TOLERANCE * own_BTV.norm():
        raise ValueError(
            f"checkpoint {source}: its model changes what its head gives, as logits_scaling, logit_scale or "
            "final_logit_softcapping in config.json say, and only plain heads are computed here; name another model"
        )
    return stock


def _load_parts(source: str | Path, tensors: TensorFolder, dtype: torch.dtype, device: str, shard: Shard) -> StockModel:
    """Returns what `load_stock` does, divided by `shard`; this process reads its part alone.

    Raises:
        ValueError: tensors are missing, quantised, or stored under other names than transformers has for them.
    """
    untied = tensors.has_own_head()
    skeleton = StockModel(_stock_skeleton(tensors.folder, untied=untied))
    _cast(skeleton, dtype)
    skeleton.config.dtype = _written_dtype(tensors)
    for name, tensor in _stored_state(skeleton).items():
        for stored in [stored for stored, *_ in _stored_parts(name, tensor.shape)]:
            if stored not in tensors.headers:
                raise ValueError(
                    f"checkpoint {source}: no tensor {stored}, and several processes find tensors by these names only; "
                    "the weights do not fit its config.json, or use one process"
                )
            tensors.check_float(stored)
    return _read(skeleton, tensors, source, device, shard)


def _cast(skeleton: StockModel, dtype: torch.dtype) -> None:
    """Gives the weights of an fp32 model without memory the dtypes that transformers loads them in.

    Buffers stay fp32, as rope tables and routing biases are, and so do the weights that transformers keeps in fp32. A
    layer of two dtypes cannot be trained by FSDP2, so no weight of a 16-bit model can.
    """
    if dtype == torch.float32:
        return
    fp32 = getattr(skeleton.model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in skeleton.requires_grad_(False).named_parameters():
        if not any(f".{word}" in name for word in fp32):
            parameter.data = parameter.data.to(dtype)


def _read(model: AnyModel, tensors: TensorFolder, source: str | Path, device: str, shard: Shard) -> AnyModel:
    """Returns a model without memory with its weights, of which this process reads its part after `shard`."""
    model = take_memory(shard(model), device)
    with torch.no_grad():
        for name, target in _stored_state(model).items():
            _fill(target, name, tensors)
    model.end_token_ids = read_end_tokens(tensors.folder)
    return _tried(model.eval(), source)


@torch.no_grad()
def _tried(model: AnyModel, source: str | Path) -> AnyModel:
    """Returns the model after one token: some fields of a config.json are first read when a model runs."""
    with refusing(f"checkpoint {source}: its model does not run"):
        model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=model.lm_head.weight.device))
    if gathers_weights(model):
        release_gathered(model)
        release_memory()  # the first gathering leaves holes between what stays
    if isinstance(model, DeepseekV3):
        take_expert_counts(model)
    return model


def as_ours(stock: DeepseekV3 | StockModel) -> DeepseekV3 | StockModel:
    """Returns a stock DeepSeek-V3 as our model, which shares its weights; any other model as it is."""
    config, device = stock.config, stock.lm_head.weight.device
    if isinstance(stock, DeepseekV3) or config.model_type != "deepseek_v3":
        return stock
    with torch.device("meta"):
        model = DeepseekV3(config)
    model.load_state_dict(stock.model.state_dict(), assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # No state dict holds the rope table and the expert counts.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for router in routers(model).values():
        router.expert_counts = torch.zeros_like(router.expert_counts, device=device)
    model.end_token_ids = stock.end_token_ids
    return model.eval()


def load_for_evaluation(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", shard: Shard = keep_whole
) -> DeepseekV3 | StockModel:
    """Loads a model as unmodified transformers runs it; a softmax-routed folder, which it cannot run, as our model.

    `shard` as in `load`.
    """
    is_stock = read_config(resolve_folder(source)).get("model_type") != SOFTMAX_MODEL_TYPE
    return (load_stock if is_stock else load)(source, dtype=dtype, device=device, shard=shard)


def save(
    model: DeepseekV3 | StockModel,
    out: str | Path,
    *,
    tokenizer_from: Any = None,
    origin: Path | None = None,
    card: str | None = None,
    force: bool = False,
) -> Path:
    """Writes a model as a stock folder, in its config's dtype (fp32 if it names none), one tensor per expert.

    Args:
        model: the model.
        out: the folder to write.
        tokenizer_from: a folder or hub id with a tokenizer, or a transformers tokenizer.
        origin: the folder that the model was loaded from; its licence files, conversion.json and
            generation_config.json are copied.
        card: the text of README.md.
        force: replace `out` if it exists.

    Raises:
        ValueError: `out` exists and `force` is not set, or `tokenizer_from` cannot be found.
    """
    config = model.config.to_dict()
    dtype = getattr(torch, str(model.config.dtype).removeprefix("torch.")) if model.config.dtype else torch.float32
    with FolderWriter(out, force=force) as writer:
        for name, tensor in named_disk_tensors(model):
            keep_fp32 = name.endswith("e_score_correction_bias")
            writer.add(name, tensor if keep_fp32 else rounded(tensor, dtype))
        writer.write_json("config.json", disk_config(config) if isinstance(model, DeepseekV3) else config)
        if origin is not None:
            copy_generation_config(writer, origin)
            writer.copy_licence(origin)
            if (conversion := read_conversion(origin)) is not None:
                writer.write_json("conversion.json", conversion)
        if hasattr(tokenizer_from, "save_pretrained"):
            tokenizer_from.save_pretrained(writer.path)
        elif tokenizer_from is not None:
            folder = resolve_folder(tokenizer_from)
            copy_tokenizer(writer, folder)
            writer.copy_generation_config(folder)
        if card is not None:
            writer.write_text("README.md", card)
    return Path(out)


def copy_generation_config(writer: FolderWriter, source: Path) -> None:
    """Copies generation_config.json of another folder into one that has its config.json.

    Where the other folder has none, what its config.json says of generation is written, unless ours says it too.
    """
    writer.copy_generation_config(source)
    if not (writer.path / _GENERATION_CONFIG).exists():
        fields, ours = _generation_fields(source), read_config(writer.path)
        if any(value is not False and field not in ours for field, value in fields.items()):  # false is the default
            writer.write_json(_GENERATION_CONFIG, fields)


def copy_tokenizer(writer: FolderWriter, source: Path) -> None:
    """Copies the tokenizer of another folder into one that has its config.json, so that it gives the same tokens there.

    The files are the same byte for byte wherever the other config.json changes nothing. transformers chooses a
    tokenizer's class by model_type, too, so `tokenizer_class` names the source's where the other one takes another. It
    mends the cuts of some Mistrals (fix_mistral_regex) under their own model_type and old versions alone; then
    tokenizer.json is what it makes of the source's files.

    Raises:
        ValueError: transformers does not load the source's tokenizer.
    """
    writer.copy_tokenizer(source)
    configs = [read_json(path) for path in (source / "config.json", writer.path / "config.json") if path.is_file()]
    if len({str([config.get(field) for field in _READ_BY_TOKENIZERS]) for config in configs}) < 2:
        return
    if not has_tokenizer(source):
        return
    wanted, found = load_tokenizer(source), _read_tokenizer(writer.path)
    if type(wanted) is not type(found):
        _write_tokenizer_class(writer, type(wanted).__name__)
        found = _read_tokenizer(writer.path)
    backend = wanted.backend_tokenizer.to_str()
    if found is None or found.backend_tokenizer.to_str() != backend:
        writer.write_text("tokenizer.json", backend)
        _write_tokenizer_class(writer, "PreTrainedTokenizerFast")  # it reads tokenizer.json as it is


def _write_tokenizer_class(writer: FolderWriter, name: str) -> None:
    path = writer.path / _TOKENIZER_CONFIG
    given = read_json(path) if path.is_file() else {}
    writer.write_json(_TOKENIZER_CONFIG, given | {"tokenizer_class": _EARLIER_NAMES.get(name, name)})


def _read_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a folder, or None where transformers reads none."""
    try:
        return load_tokenizer(folder)
    except ValueError:
        return None


def named_disk_tensors(model: DeepseekV3 | StockModel) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) as written to disk: without a tied head, and with one tensor per expert.

    The tensors of a divided model are gathered one by one, so all processes must ask for them together.
    """
    for name, tensor in _stored_state(model).items():
        gathered = whole(tensor)
        for stored, expert, rows in _stored_parts(name, tensor.shape):
            if expert is not None:
                yield stored, gathered[expert, rows].clone()
            else:  # a head may share the embeddings' memory although the config unties it; safetensors refuses that
                yield stored, gathered.clone() if name == "lm_head.weight" else gathered


def _written_dtype(tensors: TensorFolder) -> Any:
    """Returns the dtype in which `save` writes a model of this folder again, whatever it is loaded in."""
    return load_config(tensors.folder).dtype or float_dtype(tensors.headers)


def _stored_state(model: DeepseekV3 | StockModel) -> dict[str, Tensor]:
    """Returns the tensors of a model that a checkpoint holds, under transformers' names."""
    state = model.state_dict() if isinstance(model, DeepseekV3) else model.model.state_dict()
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def _stored_parts(name: str, shape: Sequence[int]) -> list[Part]:
    """Returns what a checkpoint stores of a model's tensor: itself, or of stacked experts one tensor each."""
    prefix, _, kind = name.rpartition(".")
    if kind not in ("gate_up_proj", "down_proj") or not prefix.endswith("mlp.experts"):
        return [(name, None, slice(None))]
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    height = shape[1] // len(kinds)
    return [
        (f"{prefix}.{expert}.{part}.weight", expert, slice(number * height, (number + 1) * height))
        for expert in range(shape[0])
        for number, part in enumerate(kinds)
    ]


def _check_tensors(tensors: TensorFolder, tree: dict[str, Any]) -> None:
    """Checks the tensors of a DeepSeek-V3 folder against its config.json, before memory is taken for them.

    Raises:
        ValueError: one is missing, quantised or has another shape, or a size in config.json is none.
    """
    for name, shape in expected_tensors(tree).items():
        if tensors.shape(name) != shape:
            raise ValueError(_misfit(name, tensors.shape(name), shape))
        tensors.check_float(name)


def _misfit(name: str, has: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return f"tensor {name}: shape {has} where config.json asks for {wanted}; the weights do not fit the config"


def _fill(target: Tensor, name: str, tensors: TensorFolder) -> None:
    """Fills this process's part of a tensor of the model from disk, stacking experts."""
    part, bounds = own_part(target)
    for stored, expert, rows in _stored_parts(name, target.shape):
        if expert is None:
            is_all = part.shape == target.shape
            part.copy_(tensors.get(stored) if is_all else tensors.get(stored, bounds))
            continue
        experts, wanted, columns = bounds
        start, stop = max(wanted.start, rows.start), min(wanted.stop, rows.stop)
        if experts.start <= expert < experts.stop and start < stop:
            read = tensors.get(stored, (slice(start - rows.start, stop - rows.start), columns))
            part[expert - experts.start, start - wanted.start : stop - wanted.start].copy_(read)
