"""Stock Hugging Face folders in and out, safetensors only, tensor by tensor.

Shapes: E routed experts, I neurons in one expert, D hidden.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smolseek.checkpoint.atomic import atomic_folder
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import take_expert_counts

log = logging.getLogger(__name__)

BUILTIN_BASE = "builtin:base"
SOFTMAX_MODEL_TYPE = "smolseek_v3_softmax"
"""`model_type` of folders whose router is not stock V3's, so that no other loader takes them for it."""
STOCK_FIELDS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
"""What llama.cpp and vLLM read from config.json and transformers does not know (design: silently wrong without)."""

_MAX_SHARD_BYTES = 2 * 2**30
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_WANTED_FILES = ("*.safetensors", "*.json", *_TOKENIZER_FILES)


def resolve_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint: a folder, builtin:base, or a hub id (downloaded to the hub library's cache).

    Raises:
        ValueError: it is neither, or the hub cannot give it.
    """
    if str(source) == BUILTIN_BASE:
        return Path(__file__).parent.parent / "assets" / "base-python"
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise ValueError(f"checkpoint {source}: no such folder; name a folder with config.json, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint {source}: no such folder, and the hub gave none ({type(error).__name__}); check the id and the "
            "connection, or download it elsewhere and name the folder"
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder as a dict.

    Raises:
        ValueError: the file is missing or is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"checkpoint {folder}: no config.json; name a folder written by transformers' save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no JSON object; fetch the file again")
    return config


class TensorFolder:
    """The tensors of a safetensors checkpoint, single or sharded, each read when asked for.

    Raises:
        ValueError: no safetensors (pickle alone is refused), a shard is missing or half, a name is unknown.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            with self._open(single.name) as file:
                self._files = {name: single.name for name in file.keys()}  # noqa: SIM118  (not a dict)
        elif list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pt*")):
            raise ValueError(f"checkpoint {folder}: only pickle weights; re-save it with safe_serialization=True")
        else:
            raise ValueError(f"checkpoint {folder}: no model.safetensors; fetch the weights")

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        with self._open(self._file(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors writes it (F32, BF16 ...), from the header."""
        with self._open(self._file(name)) as file:
            return file.get_slice(name).get_dtype()

    def get(self, name: str) -> Tensor:
        """One tensor, as stored."""
        with self._open(self._file(name)) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{self.folder / self._file(name)}: tensor {name}: {error}") from error

    def _file(self, name: str) -> str:
        if name not in self._files:
            raise ValueError(f"checkpoint {self.folder}: no tensor {name}; the weights do not fit its config.json")
        return self._files[name]

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from error


class FolderWriter(AbstractContextManager["FolderWriter"]):
    """A checkpoint folder written shard by shard; complete or absent.

    Raises:
        ValueError: the folder exists and `force` is not set.
    """

    def __init__(self, out: str | Path, *, force: bool = False) -> None:
        self._folder = atomic_folder(Path(out), force=force)
        self._shard: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = 0

    def __enter__(self) -> FolderWriter:
        self.path = self._folder.__enter__()
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        if raised[0] is None:
            try:
                self._finish()
            except BaseException as error:  # the folder must go, whatever happened
                if not self._folder.__exit__(type(error), error, error.__traceback__):
                    raise
        return self._folder.__exit__(*raised)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor; a full shard is written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes() + size > _MAX_SHARD_BYTES:
            self._flush()
        self._shard[name] = tensor.detach().cpu().contiguous()
        self._bytes += size

    def write_json(self, name: str, tree: Any) -> None:
        """A JSON file in the folder."""
        self.write_text(name, json.dumps(tree, indent=2, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A text file in the folder."""
        (self.path / name).write_text(text, encoding="utf-8")

    def copy_tokenizer(self, source: str | Path) -> None:
        """The tokenizer files of another folder."""
        for name in (*_TOKENIZER_FILES, "generation_config.json"):
            if (Path(source) / name).is_file() and not (self.path / name).exists():
                shutil.copyfile(Path(source) / name, self.path / name)

    def _shard_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._shard.values())

    def _flush(self) -> None:
        self._shards.append(sorted(self._shard))
        try:
            save_file(self._shard, self.path / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{self.path.parent}: cannot write the weights ({error})") from error
        self._shard = {}

    def _finish(self) -> None:
        if self._shard:
            self._flush()
        count, weight_map = len(self._shards), {}
        for number, names in enumerate(self._shards, start=1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.path / f"shard-{number}").rename(self.path / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            self.write_json(
                "model.safetensors.index.json", {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            )


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a folder or hub id.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    path = resolve_folder(folder)
    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer.model").is_file():
        raise ValueError(f"checkpoint {folder}: no tokenizer.json; copy the tokenizer's files into it")
    return AutoTokenizer.from_pretrained(path)


def load_config(folder: str | Path) -> Any:
    """The transformers config of a folder; a `DeepseekV3Config` for V3, softmax-routed ones included."""
    from transformers import AutoConfig, DeepseekV3Config

    tree = read_config(folder)
    if tree.get("model_type") == SOFTMAX_MODEL_TYPE:
        return DeepseekV3Config(**{**tree, "model_type": "deepseek_v3"})
    return AutoConfig.from_pretrained(folder)


def load(source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DeepseekV3 | StockModel:
    """A model from a folder or hub id: ours for DeepSeek-V3, any other causal LM through transformers.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `TensorFolder` do, or weights that do not fit the config.
    """
    folder = resolve_folder(source)
    if read_config(folder).get("model_type") not in ("deepseek_v3", SOFTMAX_MODEL_TYPE):
        return load_stock(folder, dtype=dtype, device=device)
    tensors = TensorFolder(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = DeepseekV3(config)
    model.to_empty(device="cpu")
    # What is in no checkpoint: the rope table and the counters.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    take_expert_counts(model)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                _fill(target, name, tensors)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device=device, dtype=dtype).eval()


def load_stock(source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StockModel:
    """Any causal LM exactly as unmodified transformers runs it.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `TensorFolder` do, or transformers does not know the model.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(source)
    model_type = read_config(folder).get("model_type")
    TensorFolder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"checkpoint {source}: transformers does not load model_type {model_type!r} ({reason})") from error
    return StockModel(model.to(device)).eval()


def save(
    model: DeepseekV3 | StockModel,
    out: str | Path,
    *,
    tokenizer_from: str | Path | Any | None = None,
    card: str | None = None,
    force: bool = False,
) -> Path:
    """Write a model as a stock folder in its config's dtype (fp32 when it names none), one tensor per expert.

    `tokenizer_from` is a folder, or a transformers tokenizer.
    """
    config = model.config.to_dict()
    dtype = getattr(torch, str(model.config.dtype).removeprefix("torch.")) if model.config.dtype else torch.float32
    with FolderWriter(out, force=force) as writer:
        for name, tensor in named_disk_tensors(model):
            keep_fp32 = name.endswith("e_score_correction_bias")
            writer.add(name, tensor if keep_fp32 else tensor.to(dtype))
        writer.write_json("config.json", disk_config(config) if isinstance(model, DeepseekV3) else config)
        if hasattr(tokenizer_from, "save_pretrained"):
            tokenizer_from.save_pretrained(writer.path)
        elif tokenizer_from is not None:
            writer.copy_tokenizer(resolve_folder(tokenizer_from))
        if card is not None:
            writer.write_text("README.md", card)
    return Path(out)


def disk_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a V3 folder: stock fields added, or a model type of its own when the router is not stock."""
    tree = {**config, **STOCK_FIELDS, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    if config.get("scoring_func") == "softmax":
        tree |= {
            "scoring_func": "softmax",
            "model_type": SOFTMAX_MODEL_TYPE,
            "architectures": ["SmolseekSoftmaxV3ForCausalLM"],
        }
    return tree


def named_disk_tensors(model: DeepseekV3 | StockModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as written to disk: tied heads left out, stacked experts one by one."""
    state = model.state_dict() if isinstance(model, DeepseekV3) else model.model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj" and prefix.endswith("experts"):
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate.clone()
                yield f"{prefix}.{expert}.up_proj.weight", up.clone()
        elif kind == "down_proj" and prefix.endswith("mlp.experts"):
            for expert, down in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", down.clone()
        else:
            yield name, tensor


def _fill(target: Tensor, name: str, tensors: TensorFolder) -> None:
    """Copy one in-memory tensor from disk, stacking experts; ValueError when its shape is not the config's."""
    prefix, _, kind = name.rpartition(".")
    if prefix.endswith("mlp.experts"):
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert in range(target.shape[0]):
            loaded = torch.cat([tensors.get(f"{prefix}.{expert}.{part}.weight") for part in parts])
            _copy(target[expert], loaded, f"{prefix}.{expert}.{parts[0]}.weight")
    else:
        _copy(target, tensors.get(name), name)


def _copy(target: Tensor, loaded: Tensor, name: str) -> None:
    if target.shape != loaded.shape:
        raise ValueError(
            f"tensor {name}: shape {tuple(loaded.shape)} where config.json asks for {tuple(target.shape)}; "
            "the weights do not fit the config"
        )
    target.copy_(loaded)
