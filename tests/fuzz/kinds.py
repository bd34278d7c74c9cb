"""The kinds of damaged input: for each the commands that read it, and the changes that hypothesis draws.

Every section is one kind: a function that draws the changes for one command.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from hypothesis import strategies as st

from smolseek.config import (
    ConvertSettings,
    DataSettings,
    ParallelSettings,
    Recipe,
    SampleSettings,
    TrainSettings,
)
from tests.fuzz.changes import (
    MISSING,
    Append,
    Copy,
    Cut,
    Edit,
    EditHeader,
    FillNumbers,
    Keys,
    MakeFolder,
    Parquet,
    Recode,
    Remove,
    Repeat,
    RepeatName,
    Shard,
    Splice,
    SpliceBehind,
    Write,
    read_header,
    read_tree,
)
from tests.fuzz.engine import Change, Outcome, examine
from tests.fuzz.inputs import COMMANDS, GGUF, OTHER_TOKENIZERS, RESUMED, RUN, sound_files

Draw = Callable[[st.SearchStrategy[Any]], Any]

# -- values and bytes of every kind -----------------------------------------------------------------------------------

SMALL = [0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 32, 64, 299, 300, 301]
LARGE = [2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400, 1e308, math.inf]
ODD = [None, True, False, -1, -(2**63), 0.0, 0.5, 1.0, -1.0, 1e-320, math.nan, -math.inf]
WORDS = ["", "x", "../x", "/dev/null", "a/b", "é\n", "\ud800", "\0", "float32", "auto", "x" * 5000, "{}", "1e3"]
TREES = [[], {}, [[]], [None], [1, "x"], {"a": None}, {"a": {"b": []}}, [[[[[[[[[[1]]]]]]]]]], {"": 0}]
VALUES = st.sampled_from([*SMALL, *ODD, *WORDS, *TREES, *LARGE, MISSING, MISSING, MISSING]) | st.one_of(
    st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(-3, 400), max_size=4)
)
NESTED = b'{"a":' * 100_000
NO_JSON = [b"", b" ", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"{", b"\0", b"\xff\xfe", NESTED[:500]]
BYTES = st.sampled_from(NO_JSON) | st.binary(max_size=64)
ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "utf-7", "cp037", "latin-1", "utf-8-sig"]


def places(tree: Any, depth: int = 4, width: int = 40) -> list[Keys]:
    """Returns the keys of every entry of a tree, down to a depth; of long lists and mappings only the first entries."""
    if depth == 0 or not isinstance(tree, dict | list):
        return []
    entries = [*(tree.items() if isinstance(tree, dict) else enumerate(tree))][:width]
    return [way for key, value in entries for way in ((key,), *((key, *rest) for rest in places(value, depth - 1, 4)))]


def edits(draw: Draw, file: str, more: Sequence[str] = (), values: st.SearchStrategy[Any] = VALUES) -> list[Change]:
    """Draws up to three other values in a file; `more` has fields that it does not hold but could."""
    keys = st.sampled_from([*places(read_tree(sound_files() / file)), *((field,) for field in more), ("unknown",)])
    return draw(st.lists(st.builds(Edit, st.just(file), keys, values), min_size=1, max_size=3))


def spoiled(draw: Draw, file: str) -> list[Change]:
    """Draws one way to spoil a whole file."""
    share, at = st.floats(0, 1), st.just(file)
    ways = (
        st.builds(Write, at, BYTES),
        st.builds(Cut, at, share),
        st.builds(Splice, at, share, st.binary(min_size=1, max_size=8)),
        st.builds(Append, at, BYTES),
        st.builds(Recode, at, st.sampled_from(ENCODINGS)),
        st.builds(Repeat, at, st.sampled_from([b'{"a":', b"[", b"- ", b"\xff", b"\n"]), st.just(100_000)),
        st.builds(Remove, at),
        st.builds(MakeFolder, at),
    )
    return [draw(st.one_of(*ways))]


def edited_or_spoiled(draw: Draw, file: str, more: Sequence[str] = ()) -> list[Change]:
    return edits(draw, file, more) if draw(st.integers(0, 3)) else spoiled(draw, file)


def models_of(command: str) -> list[str]:
    """Returns the folders of models that a command reads."""
    line = " ".join(COMMANDS[command])
    folders = {"inputs/dense": "inputs/dense", "inputs/v3": "inputs/v3"}
    folders |= {"recipe.yaml": "inputs/dense", "heal.yaml": "inputs/v3"}
    return sorted({folder for word, folder in folders.items() if word in line})


# -- config.json ------------------------------------------------------------------------------------------------------

FIELDS = (
    "rope_scaling rope_theta rope_parameters partial_rotary_factor sliding_window use_sliding_window layer_types "
    "quantization_config quantization auto_map torch_dtype dtype architectures pad_token_id bos_token_id eos_token_id "
    "attention_dropout pretraining_tp q_lora_rank kv_lora_rank n_routed_experts n_shared_experts n_group topk_group "
    "moe_intermediate_size first_k_dense_replace num_experts_per_tok scoring_func topk_method norm_topk_prob head_dim "
    "tie_word_embeddings attn_implementation use_cache is_encoder_decoder is_decoder num_labels id2label "
    "task_specific_params output_hidden_states return_dict chunk_size_feed_forward transformers_version _name_or_path"
).split()
ROPES = [
    {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": 0, "rope_theta": 100.0},
    {"rope_type": "linear", "factor": -1.0, "rope_theta": 100.0},
    {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0], "long_factor": []},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4},
    {"rope_type": None, "rope_theta": 0},
    {"type": "dynamic", "factor": math.nan},
    {"full_attention": {"rope_type": "default"}},
]


def config(draw: Draw, command: str) -> list[Change]:
    file = f"{draw(st.sampled_from(models_of(command)))}/config.json"
    if draw(st.integers(0, 9)) == 0:
        return [Edit(file, (draw(st.sampled_from(["rope_parameters", "rope_scaling"])),), draw(st.sampled_from(ROPES)))]
    return edited_or_spoiled(draw, file, FIELDS)


# -- safetensors ------------------------------------------------------------------------------------------------------

DTYPES = ["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", "U64", "f32", "X", "", None, 3]
LENGTHS = [0, 1, 7, 2**20, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]
FLOATS = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\xff\xff\x7f\x7f", b"\1\0\0\0"]
"""NaN, infinity, zero, the largest float and the smallest."""
SHARDS = ["model-00001-of-00001.safetensors", "a.safetensors", "../beside.safetensors", "model.safetensors", "x.bin"]
NAMES = [*SHARDS, "../dense/model.safetensors", "/dev/zero", "/etc/passwd", "", "..", "a/b.safetensors", "\0", 3, []]
SPANS = [[0, 0], [0, 4], [4, 0], [-4, 0], [0, 2**63], [2**63, 2**64], [0.5, 4], [0]]
SHAPES = [[], [1], [0], [-1], [16], [300, 16], [16, 300], [0, 16], [2**40, 2**40], [0, 2**62]]
INSIDE: list[Keys] = [(), ("dtype",), ("shape",), ("shape", 0), ("shape", 1), ("data_offsets",), ("data_offsets", 1)]
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(DTYPES), "shape": st.sampled_from(SHAPES), "data_offsets": st.sampled_from(SPANS)}
)


def weights(draw: Draw, command: str) -> list[Change]:
    folder = draw(st.sampled_from(models_of(command)))
    file, kind = f"{folder}/model.safetensors", draw(st.integers(0, 9))
    if kind == 0:
        return spoiled(draw, file)
    if kind == 1:
        return [Splice(file, 0.0, draw(st.sampled_from(LENGTHS)).to_bytes(8, "little"))]
    if kind == 2:
        return [FillNumbers(file, draw(st.sampled_from(FLOATS)))]
    if kind == 3:
        other = draw(st.sampled_from(["inputs/dense", "inputs/v3"]))
        return draw(st.sampled_from([[RepeatName(file)], [Copy(f"{other}/model.safetensors", file)]]))
    if kind == 4:
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2))
        return [Shard(folder, draw(st.sampled_from(SHARDS)), tuple(names), draw(st.booleans()))]
    tensor = draw(st.sampled_from([*sorted(read_header(sound_files() / file)), "unknown"]))
    values = VALUES | st.sampled_from([*DTYPES, *SPANS, *SHAPES]) | ENTRY
    return [EditHeader(file, (tensor, *draw(st.sampled_from(INSIDE))), draw(values))]


# -- GGUF -------------------------------------------------------------------------------------------------------------

WORDS_OF_32 = [*range(14), 24, 30, 31, 64, 300, 2**31 - 1, 2**31, 2**32 - 1, 0x7FC00000, 0x7F800000]
"""Numbers of types, counts, sizes, and the floats NaN and infinity."""


def gguf(draw: Draw, command: str) -> list[Change]:
    if draw(st.integers(0, 3)) == 0:
        return spoiled(draw, GGUF)
    reader = GGUFReader(sound_files() / GGUF)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    name = draw(st.sampled_from([*keys, *(tensor.name for tensor in reader.tensors)]))
    words = draw(st.lists(st.sampled_from(WORDS_OF_32), min_size=1, max_size=3))
    return [SpliceBehind(GGUF, name.encode(), 4 * draw(st.integers(0, 7)), struct.pack(f"<{len(words)}I", *words))]


# -- tokenizer, chat template, generation_config.json -----------------------------------------------------------------

TEMPLATES = [
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.content }",
    "{{ messages[9].content }}",
    "{{ messages | nothing }}",
    "{{ 1 / 0 }}",
    "{{ undefined_function() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ('a' * 1000) * 10 }}",
    "{{ 'a' * 10000000000 }}",
    "{% include 'x' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10000000) %}{% endfor %}",
    "{% generation %}",
    "{{ messages[0]['content'] + 3 }}",
    "\ud800".encode("utf-8", "replace").decode(),
    "",
    " ",
]
TOKENIZER_FIELDS = (
    "chat_template model_max_length bos_token eos_token pad_token unk_token add_bos_token tokenizer_class auto_map "
    "extra_special_tokens additional_special_tokens added_tokens_decoder clean_up_tokenization_spaces padding_side "
    "legacy name_or_path processor_class backend"
).split()
GENERATION_FIELDS = (
    "eos_token_id bos_token_id pad_token_id max_length temperature top_k top_p do_sample num_beams cache_implementation"
).split()
MORE_FILES = (
    "special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model chat_template.jinja".split()
)
PAIR = ("tokenizer.json", "tokenizer_config.json")


def tokenizer(draw: Draw, command: str) -> list[Change]:
    folder = draw(st.sampled_from(models_of(command)))
    kind = draw(st.integers(0, 1 if command == "chat" else 6))
    if kind == 0:
        template = draw(st.sampled_from(TEMPLATES))
        whole: list[Change] = [Write(f"{folder}/chat_template.jinja", template.encode())]
        return draw(st.sampled_from([whole, [Edit(f"{folder}/tokenizer_config.json", ("chat_template",), template)]]))
    if kind == 1:
        return edited_or_spoiled(draw, f"{folder}/tokenizer_config.json", TOKENIZER_FIELDS)
    if kind == 2:
        return edited_or_spoiled(draw, f"{folder}/generation_config.json", GENERATION_FIELDS)
    if kind == 3:
        other = draw(st.sampled_from(OTHER_TOKENIZERS))
        return [
            Copy(f"{other}/{name}", f"{folder}/{name}") for name in draw(st.sampled_from([PAIR, PAIR[:1], PAIR[1:]]))
        ]
    if kind == 4:
        return [Write(f"{folder}/{draw(st.sampled_from(MORE_FILES))}", draw(BYTES))]
    return edited_or_spoiled(draw, f"{folder}/tokenizer.json")


# -- recipes ----------------------------------------------------------------------------------------------------------

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
)
"""Billions of texts by aliases."""
YAMLS = [
    *("", "- 1", "3", "a: b: c", "\t", "name: [", "name: &n [*n]", "data: &d {train: *d}", "model: &m {a: *m}"),
    *(LAUGHS, f"{LAUGHS}\nname: *a11", f"{LAUGHS}\nmodel: {{model_type: *a11}}", f"{LAUGHS}\nmodel: {{a: *a4}}"),
    *("!!python/object/apply:os.system [ls]", "name: !!binary aGVsbG8=", "name: 2020-01-01", "name: 2020-13-45"),
    *("seed: 1:20", "seed: 0x10", f"seed: {'9' * 5000}", "name: a\n---\nname: b", "name: a\nname: b", "null: 2"),
    *(
        "? [1, 2]\n: 3",
        "? {a: 1}\n: 3",
        "<<: {name: x}",
        "<<: 3",
        'name: "\\ud800"',
        'name: "a\\0b"',
        "%YAML 9\n---\n3",
    ),
    *("[" * 3000, "a: " * 3000, "{a: " * 3000),
]
RUN_NAMES = ["../x", "/tmp/x", "a/b", "", ".", "..", "x" * 300, "é", "a b", "a\n", "~", "-", ".hidden", "\\", "*"]
SECTIONS: dict[tuple[str, ...], type] = {
    (): Recipe,
    ("convert",): ConvertSettings,
    ("data",): DataSettings,
    ("train",): TrainSettings,
    ("sample",): SampleSettings,
    ("parallel",): ParallelSettings,
}
KEYS: list[Keys] = [(*way, field) for way, kind in SECTIONS.items() for field in kind.__annotations__]
LENGTHY = {
    *("steps", "tokens", "batch_windows", "gradient_accumulation", "max_new_tokens", "refine_steps", "distill_steps"),
    *("calibration_windows", "calibration_window_tokens", "window_tokens", "evaluate_every", "warmup_steps"),
}
"""Fields whose large values ask for long runs, which is no mistake."""
STAGES = [[{"steps": 1}], [{"steps": 1, "trains": "experts"}], [{}], [{"steps": -1}], [{"tokens": 0}], {"steps": 1}]


def recipe(draw: Draw, command: str) -> list[Change]:
    file, kind = "inputs/recipe.yaml", draw(st.integers(0, 9))
    if kind == 0:
        return [Write(file, draw(st.sampled_from(YAMLS)).encode())]
    if kind == 1:
        return spoiled(draw, file)
    if kind == 2:
        return [Edit(file, ("name",), draw(st.sampled_from(RUN_NAMES)))]
    keys = st.sampled_from([*places(read_tree(sound_files() / file)), *KEYS, ("unknown",)])
    changes: list[Change] = []
    for way in draw(st.lists(keys, min_size=1, max_size=3)):
        values = st.sampled_from([0, 1, 2, *ODD, *WORDS, *TREES, MISSING]) if way[-1] in LENGTHY else VALUES
        changes.append(Edit(file, way, draw(st.sampled_from(STAGES) if way[-1] == "stages" else values)))
    return changes


# -- text -------------------------------------------------------------------------------------------------------------

SENTENCE = "Anna sees a ball and the cat.\n"
TEXTS = [
    *(SENTENCE.encode(encoding) * 20 for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig")),
    "Café ".encode("latin-1") * 50,
    SENTENCE.encode() * 20 + b"\0" + SENTENCE.encode() * 20,
    b"\n" * 2**20 + SENTENCE.encode() + b"\xff\xfe\xff" + SENTENCE.encode() * 5,
    b"a" * 50_000,
    b"",
    b"\n",
    b" \t\r\n" * 50,
    b"<|endoftext|>" * 20,
    b"<|endoftext|>\n" * 20 + b"x",
    b"<s></s>" * 100,
    b"\r" * 100,
    "👩‍👩‍👧 e\u0301 \u202e ﷽ ".encode() * 50,
    b"x",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80" * 20,
]
SOME = st.sampled_from([None, 3, True, "", "x", SENTENCE * 10, [], {}, [{}], "\ud800", "a" * 20_000, math.nan])
ROLES = st.sampled_from(["user", "assistant", "system", "x", None, 3])
TURN = st.fixed_dictionaries({}, optional={"role": ROLES, "content": SOME, "tool_calls": SOME, "name": SOME})
TURNS = SOME | st.lists(TURN, max_size=3)
ROW = SOME | st.fixed_dictionaries({}, optional={"text": SOME, "messages": TURNS})
LINE = (
    ROW.map(json.dumps).map(str.encode) | BYTES | st.sampled_from([NESTED, b"[" * 100_000, b"9" * 5000, b'{"text": "a'])
)
COLUMNS: list[tuple[str, tuple[Any, ...]]] = [
    *(("int64", (1, 2)), ("binary", (b"\xff", b"x")), ("null", (None,)), ("bool_", (True,)), ("float64", (math.nan,))),
    *(
        ("string", ()),
        ("string", (None, None)),
        ("large_string", (SENTENCE * 20,)),
        ("date32", (1,)),
        ("string", ("",)),
    ),
]


def text(draw: Draw, command: str) -> list[Change]:
    line = " ".join(COMMANDS[command])
    if "rows.jsonl" in line:
        which = draw(st.integers(0, 4))
        if which == 0:
            return spoiled(draw, "inputs/rows.parquet")
        if which == 1:
            kind, values = draw(st.sampled_from(COLUMNS))
            return [Parquet("inputs/rows.parquet", draw(st.sampled_from(["text", "messages", "x"])), kind, values)]
        if which == 2:
            return spoiled(draw, "inputs/rows.jsonl")
        return [Write("inputs/rows.jsonl", b"\n".join(draw(st.lists(LINE, max_size=6))))]
    file = "inputs/prompt.txt" if "prompt-file" in line else "inputs/text.txt"
    content = draw(st.sampled_from(TEXTS) | st.binary(max_size=300))
    return [Write(file, content)] if draw(st.integers(0, 4)) else spoiled(draw, file)


def typed(draw: Draw) -> bytes:
    """Draws standard input, short enough for a chat."""
    return draw(st.sampled_from([content for content in TEXTS if len(content) < 5000]) | st.binary(max_size=60))


# -- finished folders -------------------------------------------------------------------------------------------------

FINISHED: dict[str, list[str]] = {
    "report conversion": ["inputs/v3/conversion.json"],
    "push": ["inputs/v3/conversion.json", "inputs/v3/README.md"],
    "report run": [
        f"{RUN}/run.json",
        f"{RUN}/metrics.jsonl",
        f"{RUN}/summary.json",
        f"{RUN}/converted/conversion.json",
    ],
    "eval run": [f"{RUN}/model/conversion.json"],
    "push run": [f"{RUN}/model/conversion.json", f"{RUN}/model/README.md"],
    "resume": [
        *(f"{RESUMED}/{name}" for name in ("run.json", "metrics.jsonl", "summary.json", "converted/conversion.json")),
        *(f"{RESUMED}/checkpoints/step-00000002/{name}" for name in ("state.json", "checksums.json", "tensors")),
        *(f"{RESUMED}/{name}" for name in ("converted/config.json", "best/config.json", "logs.txt")),
    ],
}


def finished(draw: Draw, command: str) -> list[Change]:
    file = draw(st.sampled_from(FINISHED[command]))
    if Path(file).suffix not in (".json", ".jsonl"):
        return spoiled(draw, file)
    return edited_or_spoiled(draw, file)


# -- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command, the changes of the files that it reads, and its standard input."""

    command: str
    changes: list[Change]
    stdin: bytes = b"Anna sees\nBen likes\n"


@dataclass(frozen=True)
class Kind:
    """One kind of damage: how it is drawn for a command, and the names of the commands."""

    changes: Callable[[Draw, str], list[Change]]
    commands: tuple[str, ...]


_MODELS = (
    *("convert", "generate dense", "generate", "eval dense", "eval", "eval against dense"),
    *("check", "export", "push"),
)
KINDS: dict[str, Kind] = {
    "config.json": Kind(config, ("plan", *_MODELS, "train", "heal")),
    "weights": Kind(weights, (*_MODELS, "train", "heal")),
    "GGUF": Kind(gguf, ("plan gguf", "convert gguf", "generate gguf")),
    "tokenizer": Kind(
        tokenizer, ("convert", "generate", "chat", "chat", "eval", "export", "push", "data stats", "train", "heal")
    ),
    "recipe": Kind(recipe, ("plan recipe", "data stats", "train", "train")),
    "text": Kind(
        text,
        (
            "convert",
            "convert rows",
            "eval",
            "eval rows",
            "generate from a file",
            "generate from stdin",
            "chat",
            "data stats",
            "data stats rows",
            "train",
            "train on rows",
        ),
    ),
    "finished folders": Kind(finished, tuple(FINISHED)),
}


@st.composite
def cases(draw: Draw, kind: str) -> Case:
    """Draws a case of one kind."""
    command = draw(st.sampled_from(KINDS[kind].commands))
    if kind == "text" and command in ("generate from stdin", "chat"):
        return Case(command, [], typed(draw))
    return Case(command, KINDS[kind].changes(draw, command))


def run_case(case: Case) -> tuple[Outcome, str]:
    """Runs a case; returns how it ended and what is wrong with it, if anything."""
    return examine(sound_files(), COMMANDS[case.command], case.changes, case.stdin)
