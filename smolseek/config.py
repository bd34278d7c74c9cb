"""Recipes: frozen dataclasses and the strict YAML loader; imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


@dataclass(frozen=True)
class ConvertSettings:
    """How a dense checkpoint becomes DeepSeek-V3; sizes left out are chosen from the source's."""

    kv_lora_rank: int | None = None
    """Width of the latent that holds values and unrotated keys."""
    qk_rope_head_dim: int | None = None
    """Width of the one rotated key that all heads share (even)."""
    calibration: tuple[str, ...] = ()
    """Text for the moments: files, globs, hub:ID or builtin:python (its training split)."""
    calibration_windows: int = 128
    """How many windows of calibration text are read."""
    calibration_window_tokens: int = 256
    """Tokens in a calibration window."""
    qk_nope_head_dim: int | None = None
    """Width of a head's unrotated query and key; none: the source's head_dim."""
    v_head_dim: int | None = None
    """Width of a head's value; none: the source's head_dim."""
    q_lora_rank: int | None = None
    """Width of a latent query; none: queries straight from the hidden state."""
    cache: float | None = None
    """Share of the source's cache to keep, in place of kv_lora_rank and qk_rope_head_dim; none: 0.4."""
    profile: Literal["portable", "vllm", "transformers"] = "portable"
    """What the result may use: what most runtimes read, vLLM's head sizes, or all that transformers reads."""
    experts: Literal["none", "upcycle", "carve"] = "none"
    """Keep the MLP dense, copy it to more neurons (upcycle) or divide its neurons (carve) among experts."""
    active: float | None = None
    """Share of the dense neurons that a token meets (carve); none: 0.75."""
    n_shared_experts: int | None = None
    """Shared experts."""
    n_routed_experts: int | None = None
    """Routed experts in all."""
    num_experts_per_tok: int | None = None
    """Routed experts a token meets."""
    moe_intermediate_size: int | None = None
    """Neurons in one expert, before padding to a multiple of 8."""
    first_k_dense_replace: int = 0
    """First layers that keep their dense MLP."""
    refine_steps: int = 300
    """Steps in which each converted layer learns the dense layer's output; 0: the closed form only."""
    distill_steps: int | None = None
    """Steps of end-to-end KL to the dense model after that; none: what takes minutes on a CPU, 600 at most, 0 for a
    source above 24M parameters."""
    exact: bool = False
    """The exact conversion: same logits, larger cache, loads in transformers only."""
    seed: int = 0
    """Seed of everything drawn at random."""
    separator: str = "<|endoftext|>"
    """What stands between the documents of a text file."""


@dataclass(frozen=True)
class DataSettings:
    """Where the training text comes from and how it is cut."""

    train: tuple[str, ...] = ("builtin:python",)
    """Sources, read again and again: files, globs, hub:ID[:CONFIG] or builtin:python."""
    held_out: tuple[str, ...] = ()
    """Sources of held-out text; none: a share of the training documents, chosen by hash, is kept out of training."""
    held_out_share: float = 0.1
    """Share of the documents held out when no held-out source is named."""
    held_out_tokens: int = 65536
    """How many held-out tokens an evaluation reads."""
    text_column: str = "text"
    """Field of a JSON line, Parquet row or hub row that holds the text."""
    separator: str = "<|endoftext|>"
    """What stands between the documents of a text file."""
    shuffle_windows: int = 1024
    """Size of the shuffle buffer, in packed windows."""
    weights: tuple[float, ...] = ()
    """Share of the training tokens for each source, in any unit; none: one source after the other."""
    messages_column: str = "messages"
    """Field that holds a conversation, a list of {role, content}: only the assistant's tokens are learnt."""


@dataclass(frozen=True)
class StageSettings:
    """One stage of a run: fields of `train` that it sets otherwise, and its length."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Tokens to train on, in place of steps (rounded up to whole steps)."""
    trains: Literal["all", "attention", "experts"] | None = None
    """Which weights train."""
    optimizer: Literal["adamw", "muon"] | None = None
    """AdamW or Muon."""
    schedule: Literal["cosine", "wsd"] | None = None
    """A cosine or warm-up, stable, decay; over this stage alone."""
    learning_rate: float | None = None
    """Peak learning rate."""
    learning_rate_factors: dict[str, float] | None = None
    """Factors on the learning rate by group of weights."""
    final_learning_rate_share: float | None = None
    """Learning rate at the stage's last step, as a share of its peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    distill_weight: float | None = None
    """Weight of KL to the dense source in the loss."""
    patience: int | None = None
    """End the stage after this many evaluations in a row without a lower held-out loss."""


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation of one run."""

    steps: int = 300
    """Optimizer steps."""
    batch_windows: int = 8
    """Windows in one micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches in one optimizer step."""
    window_tokens: int = 256
    """Tokens predicted in one window."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    final_learning_rate_share: float = 0.0
    """Learning rate at the last step, as a share of the peak (cosine decay)."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; auto: bfloat16 where the hardware has it."""
    mask_documents: bool = True
    """Documents packed in one window do not see each other."""
    balance_update_speed: float | None = None
    """u of the auxiliary-loss-free load balancing: how far a routing bias moves per step; none: 1e-3; 0: not at all.
    With sign it falls to a fifth as the learning rate falls to 0."""
    distill_weight: float = 0.0
    """Weight of KL to the dense source in the loss; the rest is cross-entropy."""
    evaluate_every: int = 100
    """Steps between held-out evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines in the logs."""
    keep_last: int = 2
    """Checkpoints kept: when the newest is damaged, --resume goes on from the one before."""
    spike_factor: float = 3.0
    """A step whose loss is above this many times the median of recent ones is skipped; 0: never."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a spike, or for a loss or gradient that is not finite; one more stops."""
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
    """After the warm-up: a cosine, or the peak held and a straight line down over the last `decay_share`."""
    decay_share: float = 0.2
    """Share of the steps over which wsd goes down."""
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate by group of weights: attention, experts, router, norms, embeddings."""
    distill_temperature: float = 1.0
    """Temperature of both distributions in the KL, which is then multiplied by its square."""
    distill_steps: int | None = None
    """Steps that distil; after them plain cross-entropy and no teacher. None: all."""
    activation_checkpointing: bool = False
    """Keep one activation per block and compute the rest again in the backward pass: less memory, a second forward."""
    compile: bool = False
    """Compile the blocks of a DeepSeek-V3 model with torch.compile: faster steps, after one that takes a minute or two
    (seconds when the compiler's cache still has them); without a C++ compiler they run as they are."""
    trains: Literal["all", "attention", "experts"] = "all"
    """Which weights train."""
    patience: int | None = None
    """End early after this many evaluations in a row without a lower held-out loss; none: never."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where metrics are shown live, on top of the run's folder; each is an extra of the same name."""
    stages: tuple[StageSettings, ...] = ()
    """Stages one after the other, in place of one of `steps`; what a stage leaves out is as above."""


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes of a torchrun divide the work; without torchrun there is one process."""

    expert: int = 1
    """Processes among which the experts of a layer are divided; must divide the number of processes."""


@dataclass(frozen=True)
class SampleSettings:
    """Text drawn from the model during and after a run."""

    every: int = 100
    """Steps between samples."""
    prompts: tuple[str, ...] = ("The ",)
    """Each is continued."""
    max_new_tokens: int = 128
    """Length of a continuation."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely."""
    seed: int = 1337
    """Same seed, same text."""


@dataclass(frozen=True)
class Recipe:
    """One run, from a source checkpoint (or random weights) to a healed model."""

    name: str = "run"
    """The run's folder is runs/NAME."""
    source: str | None = None
    """Checkpoint to start from: a folder, a hub id or builtin:base; none: random weights of `model`."""
    convert: ConvertSettings | None = None
    """Conversion of a dense source; none: the source is trained as it is."""
    teacher: str | None = None
    """Dense checkpoint to distil from; none: the source that is converted."""
    model: dict[str, Any] = field(default_factory=dict)
    """For random weights: model_type (deepseek_v3 or llama) and fields of that transformers config."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; none: the source's."""
    train_tokenizer_entries: int = 0
    """For random weights: train a byte-level BPE tokenizer of this size on the training text."""
    compare_dense: bool = False
    """Afterwards train the dense source on the same tokens, for the table."""
    seed: int = 0
    """Seed of initialisation and data order."""
    data: DataSettings = field(default_factory=DataSettings)
    """Text."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Optimisation."""
    sample: SampleSettings = field(default_factory=SampleSettings)
    """Samples."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """Several processes."""


def recipes_folder() -> Path:
    """The folder of the recipes that come with the project (beside the package in a checkout, inside it in a wheel)."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe strictly.

    Raises:
        ValueError: the file is missing or not YAML, a key is unknown (its full path and the nearest known one are
            named) or a value has the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in recipes_folder().glob("*.yaml")))
        raise ValueError(f"recipe {path}: no such file; the project's own recipes are {known}, under recipes/")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from error
    recipe = _build(Recipe, {} if tree is None else tree, where="")
    return recipe if "name" in (tree or {}) else dataclasses.replace(recipe, name=path.stem)


def _build(kind: Any, tree: Any, where: str) -> Any:
    """A dataclass of type `kind` from a mapping; `where` is the dotted path for messages."""
    if not isinstance(tree, dict):
        raise ValueError(f"recipe key {where or '(top)'}: {tree!r} is not a mapping of settings")
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0)[0]
            raise ValueError(f"recipe key {path}: unknown; did you mean {f'{where}.{near}' if where else near}?")
        values[key] = _coerce(hints[key], value, path)
    return kind(**values)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`; numbers written like 3e-4, which YAML reads as text, are numbers."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _coerce(next(k for k in get_args(kind) if k is not types.NoneType), value, where)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"recipe key {where}: {value!r} is not one of {', '.join(map(str, get_args(kind)))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_coerce(get_args(kind)[0], item, where) for item in items)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f"recipe key {where}: {value!r} is not a mapping")
        item_kind = get_args(kind)[1]
        return {
            key: _number(item) if item_kind is Any else _coerce(item_kind, item, f"{where}.{key}")
            for key, item in value.items()
        }
    value = _number(value) if kind in (int, float) else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"recipe key {where}: {value!r} is not of type {kind.__name__}")
    return value


def _number(value: Any) -> Any:
    """The number a string spells, else the value itself."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
