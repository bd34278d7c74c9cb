"""Recipes as frozen dataclasses, and the strict YAML loader. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from smolseek.formats.fields import shown
from smolseek.formats.text import is_text, read_text

SEEDS = range(-(2**63), 2**63)
"""Seeds, and all other whole numbers, that a recipe or an option may name: those of 64 bits."""
SEPARATOR = "<|endoftext|>"
"""Default text between the documents of a text file."""
SELF = "self"
"""The name, among the calibration sources, of text that the model writes itself; no text of a run is called so."""
PROSE = "builtin:prose"
"""Text of many kinds that comes with smolseek, and calibrates beside what the model writes itself."""
_MOST_ENTRIES = 100_000  # of a recipe


@dataclass(frozen=True)
class ConvertSettings:
    """How a dense checkpoint is converted to DeepSeek-V3; sizes that are not set follow from the source's sizes."""

    kv_lora_rank: int | None = None
    """Width of the latent, which holds values and unrotated keys."""
    qk_rope_head_dim: int | None = None
    """Width of the one rotated key that all heads share (even)."""
    calibration: tuple[str, ...] = ()
    """Calibration text, drawn over the whole of each source: files, folders, globs, hub:ID[:CONFIG], builtin:python
    (its training split), builtin:prose (text of many kinds that comes with smolseek), or self: text that the model
    writes itself. None: self, and for models above 24M parameters builtin:prose; in a recipe, the training text."""
    calibration_weights: tuple[float, ...] = ()
    """Shares of the calibration windows, one for each source of calibration, in any unit; none: equal shares."""
    calibration_windows: int = 128
    """Number of windows of calibration text."""
    calibration_window_tokens: int = 256
    """Tokens in a calibration window."""
    qk_nope_head_dim: int | None = None
    """Width of a head's unrotated query and key; none: the source's head_dim."""
    v_head_dim: int | None = None
    """Width of a head's value; none: the source's head_dim."""
    q_lora_rank: int | None = None
    """Width of the query latent; none: queries come straight from the hidden state."""
    cache: float | None = None
    """Size of the cache as a share of the source's, instead of kv_lora_rank and qk_rope_head_dim; none: 0.4."""
    profile: Literal["portable", "vllm", "transformers"] = "portable"
    """Runtimes that load the result: transformers, SGLang and llama.cpp (portable), vLLM too, or transformers alone;
    the last keeps biases and rope types that the others do not read."""
    experts: Literal["none", "upcycle", "carve"] = "none"
    """Keep the MLP dense (none), or make experts of several copies of it (upcycle) or of its own neurons (carve)."""
    active: float | None = None
    """Share of the dense neurons that each token uses (carve); none: 0.75."""
    n_shared_experts: int | None = None
    """Shared experts, which every token uses."""
    n_routed_experts: int | None = None
    """Routed experts in a layer."""
    num_experts_per_tok: int | None = None
    """Routed experts that each token uses."""
    moe_intermediate_size: int | None = None
    """Neurons in one expert, before padding to a multiple of 8."""
    first_k_dense_replace: int = 0
    """Number of first layers that keep their dense MLP."""
    refine_steps: int | None = None
    """Steps in which each converted layer learns to match its dense layer's output; 0: the closed form only; none: 300,
    but 40 for a source above 24M parameters, whose carved MLPs take six times as many."""
    distill_steps: int | None = None
    """Steps of end-to-end distillation (KL to the dense model) after that; none: what takes minutes on a CPU, 600 at
    most; above 24M parameters 60, and up to 240 for carved experts or where less than half of the cache is kept; 0
    above 500M."""
    exact: bool = False
    """Convert exactly: the same logits and a larger cache; only transformers loads the result."""
    seed: int = 0
    """Seed of all random draws."""
    separator: str = SEPARATOR
    """Text that separates the documents of a text file."""


@dataclass(frozen=True)
class DataSettings:
    """Where the training text comes from, and how it is divided."""

    train: tuple[str, ...] = ("builtin:python",)
    """Sources, read in endless epochs and mixed by `weights`: files, folders, globs, hub:ID[@REVISION][:CONFIG],
    builtin:python or builtin:prose."""
    held_out: tuple[str, ...] = ()
    """Sources of held-out text; none: a share of the training documents, chosen by hash, is held out."""
    held_out_share: float = 0.1
    """Share of the documents to hold out if no held-out source is named."""
    held_out_tokens: int = 65536
    """Number of held-out tokens in an evaluation, drawn over the whole of each source in equal shares."""
    text_column: str = "text"
    """Column with the text, in JSON lines, Parquet files and hub data sets."""
    separator: str = SEPARATOR
    """Text that separates the documents of a text file."""
    shuffle_windows: int = 1024
    """Size of the shuffle buffer, in packed windows."""
    weights: tuple[float, ...] = ()
    """Shares of the training tokens, one for each source, in any unit; none: the sources' sizes."""
    messages_column: str = "messages"
    """Column with a conversation, a list of {role, content}; loss is taken on the assistant's tokens only."""


@dataclass(frozen=True)
class StageSettings:
    """One stage of a run: its length, and the fields of `train` that it overrides."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Tokens to train on, instead of steps; rounded up to whole steps."""
    trains: Literal["all", "attention", "experts"] | None = None
    """Weights to train; the others stay as they are."""
    optimizer: Literal["adamw", "muon"] | None = None
    """AdamW or Muon."""
    schedule: Literal["cosine", "wsd"] | None = None
    """Cosine, or warm-up, stable, decay (wsd); over this stage alone."""
    learning_rate: float | None = None
    """Peak learning rate."""
    learning_rate_factors: dict[str, float] | None = None
    """Factors on the learning rate for groups of weights."""
    final_learning_rate_share: float | None = None
    """Learning rate that the stage ends at, after its last step, as a share of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    distill_weight: float | None = None
    """Weight of KL to the dense source in the loss."""
    patience: int | None = None
    """End the stage after this many evaluations in a row that do not lower the held-out loss."""


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation in a run."""

    steps: int = 300
    """Optimizer steps."""
    batch_windows: int = 8
    """Windows in one micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches in one optimizer step."""
    window_tokens: int = 256
    """Predicted tokens in one window."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    final_learning_rate_share: float = 0.0
    """Learning rate that the run ends at, after its last step, as a share of the peak."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, on matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; auto: bfloat16 if the hardware supports it."""
    mask_documents: bool = True
    """Prevent tokens from attending to other documents in their window."""
    balance_update_speed: float | None = None
    """u of the auxiliary-loss-free load balancing: how far a routing bias moves per step; none: 1e-3; 0: not at all.
    With sign it falls to a fifth as the learning rate falls to 0."""
    distill_weight: float = 0.0
    """Weight of KL to the dense source in the loss; cross-entropy has the remaining weight."""
    evaluate_every: int = 100
    """Steps between held-out evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between log lines."""
    keep_last: int = 2
    """Number of checkpoints to keep; if the newest is damaged, --resume continues from the one before."""
    spike_factor: float = 3.0
    """Skip a step whose loss is above this many times the median of recent losses; 0: never."""
    max_skipped_steps: int = 10
    """Most steps in a row to skip (for a spike, or a loss or gradient that is not finite); one more stops the run."""
    balance_rule: Literal["sign", "proportional"] = "sign"
    """How a routing bias moves: by u towards balance, or by u times the expert's relative lack of tokens."""
    balance_freeze_share: float = 0.0
    """Share of the steps, the last ones, in which the routing biases stay as they are."""
    balance_loss: Literal["sequence", "batch"] = "sequence"
    """Tokens that share one balance loss: those of each window, or of all windows of a micro-batch."""
    balance_loss_weight: float = 0.0
    """Weight of the balance loss per expert layer; 0: none. DeepSeek-V3 has 1e-4 (sequence)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for hidden matrices and AdamW for embeddings, head, norms and router."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine, or the peak and then a straight line down over the last `decay_share`."""
    decay_share: float = 0.2
    """Share of the steps, the last ones, in which wsd lowers the learning rate."""
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate for groups of weights: attention, experts, router, norms, embeddings."""
    distill_temperature: float = 1.0
    """Temperature of both distributions in the KL; the KL is then multiplied by the temperature's square."""
    distill_steps: int | None = None
    """Number of first steps that distil; later ones take cross-entropy alone, without a teacher. None: all steps."""
    activation_checkpointing: bool = False
    """Keep one activation per block and recompute the rest in the backward pass: less memory, one more forward pass."""
    compile: bool = False
    """Compile the blocks of a DeepSeek-V3 model with torch.compile. Steps are faster, but the first takes a minute or
    two (seconds if the compiler's cache has the blocks). Without a C++ compiler the blocks run uncompiled."""
    trains: Literal["all", "attention", "experts"] = "all"
    """Weights to train; the others stay as they are."""
    patience: int | None = None
    """End early after this many evaluations in a row that do not lower the held-out loss; none: never."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that show metrics live, besides the run's folder; each needs the extra of the same name."""
    stages: tuple[StageSettings, ...] = ()
    """Stages in their order, instead of one stage of `steps` steps; a field that a stage does not set is as above."""

    @property
    def most_distill_weight(self) -> float:
        """The highest `distill_weight` of all stages; 0: no teacher is needed."""
        weights = [stage.distill_weight for stage in self.stages] or [None]
        return max(self.distill_weight if weight is None else weight for weight in weights)


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes of torchrun divide the work; without torchrun there is one process."""

    expert: int = 1
    """Number of processes that share the experts of a layer; it must divide the number of all processes."""


@dataclass(frozen=True)
class SampleSettings:
    """Text that the model writes during and after a run."""

    every: int = 100
    """Steps between samples."""
    prompts: tuple[str, ...] = ("The ",)
    """Prompts to continue."""
    chat: bool = False
    """Put each prompt to the model as a user's message, by the tokenizer's chat template, and take its answer."""
    max_new_tokens: int = 128
    """Most tokens in a continuation."""
    temperature: float = 0.7
    """Sampling temperature; 0: always the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens less likely that have appeared before."""
    seed: int = 1337
    """Seed of the draws: the same seed gives the same text."""


@dataclass(frozen=True)
class Recipe:
    """One run, from a source checkpoint or random weights to a trained model."""

    name: str = "run"
    """The run's folder is runs/NAME."""
    source: str | None = None
    """Checkpoint to start from: a folder, a hub id, builtin:base or a dense model's GGUF file; none: random weights of
    `model`."""
    convert: ConvertSettings | None = None
    """Conversion of a dense source; none: the source is trained without conversion."""
    teacher: str | None = None
    """Dense checkpoint to distil from, named as `source` is; none: the source that is converted."""
    model: dict[str, Any] = field(default_factory=dict)
    """For random weights: model_type (deepseek_v3 or llama) and fields of its transformers config."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; none: the source's tokenizer."""
    train_tokenizer_entries: int = 0
    """For random weights: size of a byte-level BPE tokenizer to train on the training text; 0: none."""
    compare_dense: bool = False
    """Afterwards train the dense source, or the teacher of a converted source, on the same tokens, for comparison in
    the table."""
    seed: int = 0
    """Seed of the random weights and the order of the data."""
    data: DataSettings = field(default_factory=DataSettings)
    """The training text."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The optimisation."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    """Text that the model writes during the run."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """The division among several processes."""

    def conversion(self) -> tuple[ConvertSettings, DataSettings]:
        """Returns the settings of the run's conversion with the text that calibrates it, and how that text is read.

        Where `convert` names none, it is the training text. What the run holds out never calibrates.
        """
        assert self.convert is not None
        own, data = self.convert, self.data
        if own.calibration:
            data = dataclasses.replace(
                data, train=own.calibration, weights=own.calibration_weights, separator=own.separator
            )
        return dataclasses.replace(own, calibration=data.train, calibration_weights=data.weights), data


class _RepeatedKey(ValueError):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that is there twice is refused: PyYAML takes the last one alone."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _RepeatedKey(
                    f"key {key.value[:80]} is in line {lines[name]} and again in line {line}; write it once"
                )
            lines[name] = line
        return mapping


def recipes_folder() -> Path:
    """Returns the folder of the project's recipes: beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe(path: str | Path) -> Recipe:
    """Reads a YAML recipe; a recipe without a name is named after its file.

    Raises:
        ValueError: the file is missing, not UTF-8 or not YAML; a key is there twice, or is unknown (the message names
            its full path and the nearest known key); or a value has the wrong type.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"recipe {path}: is a folder and no recipe; a checkpoint is named by --source {path}")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in recipes_folder().glob("*.yaml")))
        raise ValueError(f"recipe {path}: no such file; the project's own recipes are {known}, under recipes/")
    text = read_text(path)
    try:
        tree = yaml.load(text, Loader=_Loader)
    except _RepeatedKey as error:
        raise ValueError(f"recipe {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe {path}: not YAML ({' '.join(str(error).split())[:200]}); correct it") from error
    _check_size(tree, path)
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"recipe {path}: {shown(tree)} is not a mapping of settings")
    recipe = _build(Recipe, tree, "recipe key ")
    return recipe if "name" in (tree or {}) else dataclasses.replace(recipe, name=path.stem)


def _check_size(tree: Any, path: Path) -> None:
    """Raises ValueError if a tree has too many entries: YAML's aliases can make any number of them from a few lines."""
    count, nodes = 0, [tree]
    while nodes:
        node = nodes.pop()
        nodes += [*node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
        count += 1
        if count > _MOST_ENTRIES:
            raise ValueError(f"recipe {path}: more than {_MOST_ENTRIES:,} entries with what its aliases repeat; cut it")


def check_fields(settings: Any, where: str = "") -> None:
    """Raises ValueError if a field of a settings dataclass, made in Python, has a value of another type or choice.

    `where` is the dotted path in front of its fields, for messages.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{where}{name}.")
        elif _coerce(kind, value, f"{where}{name}") != (tuple(value) if isinstance(value, list) else value):
            raise ValueError(f"{where}{name}: {value!r} is not of the type that it must have, {kind}")


def check_data(data: DataSettings) -> None:
    """Raises ValueError where no source is named, or for a number that no division of the text can have."""
    if not data.train:
        raise ValueError("data.train: names no source; name one, or leave the key out for builtin:python")
    if not 0 <= data.held_out_share < 1:
        raise ValueError(f"data.held_out_share {data.held_out_share}: must be 0 or more, and less than 1")
    for name in ("held_out_tokens", "shuffle_windows"):
        if getattr(data, name) < 1:
            raise ValueError(f"data.{name} {getattr(data, name)}: must be 1 or more")


def check_weights(data: DataSettings, name: str = "data.train", weights_name: str = "data.weights") -> None:
    """Raises ValueError unless there are no weights, or one above 0 for each source; the names are for the message."""
    weights = list(data.weights)
    if weights and len(weights) != len(data.train):
        raise ValueError(
            f"{weights_name} {weights}: {len(weights)} for {len(data.train)} sources of {name}; give each its own"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"{weights_name} {weights}: must be above 0; leave a source out in place of 0")


def _build(kind: Any, tree: Any, where: str) -> Any:
    """Builds the dataclass `kind` from a mapping; `where` is the dotted path in front of its keys, for messages.

    None, which YAML reads where all lines of a section are comments, is a mapping without keys.
    """
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{where.removesuffix('.')}: {shown(tree)} is not a mapping of settings")
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0)[0]
            parent = where.removeprefix("recipe key ")
            raise ValueError(f"{where}{str(key)[:80]}: unknown; did you mean {parent}{near}?")
        values[key] = _coerce(hints[key], value, f"{where}{key}")
    return kind(**values)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """Returns `value` as type `kind`; converts numbers such as 3e-4, which YAML reads as text.

    None is an empty list or mapping where the type is one.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _coerce(next(k for k in get_args(kind) if k is not types.NoneType), value, where)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _build(kind, value, f"{where}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where}: {shown(value)} is not one of {', '.join(map(str, get_args(kind)))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(_coerce(get_args(kind)[0], item, where) for item in items)
    if origin is dict or kind is dict:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {shown(value)} is not a mapping")
        item_kind = get_args(kind)[1]
        return {
            key: _number(item) if item_kind is Any else _coerce(item_kind, item, f"{where}.{key}")
            for key, item in value.items()
        }
    value = _number(value) if kind in (int, float) else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 10**300 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {shown(value)} is not of type {kind.__name__}")
    if kind is float and math.isnan(value):
        raise ValueError(f"{where}: nan is no number; use one")
    if kind is int and value not in SEEDS:
        raise ValueError(f"{where}: {shown(value)} is no number of 64 bits; use one nearer to 0")
    if kind is str and not is_text(value):
        raise ValueError(f"{where}: {ascii(value)[:80]} is no text that UTF-8 can write; correct it")
    return value


def _number(value: Any) -> Any:
    """Returns the number that a string spells, otherwise the value unchanged."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
