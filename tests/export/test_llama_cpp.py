"""llama.cpp itself, from the xllamacpp wheel, runs exported files."""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import llamacpp
import pytest
import torch
import torch.nn.functional as F
from llamacpp import LlamaCpp
from safetensors.torch import load_file, save_file

import smolseek
from smolseek.checkpoint.hub import load, load_tokenizer, save
from smolseek.checkpoint.source import resolve_folder
from smolseek.data.chat import render_prompt
from smolseek.export.gguf import export_gguf
from smolseek.export.special import KNOWN_ENDS
from smolseek.formats.pre_tokenizers import PRE_TYPES
from smolseek.formats.runtimes import LARGEST_LLAMA_CPP_EXPERTS
from smolseek.generation import end_tokens, stream
from smolseek.model import StockModel
from tests.export.folders import (
    METASPACE,
    REPLACE,
    YARN,
    YARN_SIZES,
    around,
    byte_level_tree,
    ids,
    sentencepiece_tree,
    tiny_folder,
    tokenizer_folder,
)
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories

try:
    llamacpp.shared_library()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)

DATA = Path(__file__).parents[3] / "shared" / "data"
NEAR_TIE = 0.05
"""Below this gap between the two best logits, different rounding may swap them."""


def both_logits(folder, ids_T, kind="f32"):
    """Returns (llama.cpp's logits, our logits), each (T, V); ours are computed in fp32 from the folder's weights."""
    out = folder.with_suffix(f".{kind}.gguf")
    exported = export_gguf(folder, out, type=kind)
    with LlamaCpp(out, options=exported.options) as theirs, torch.inference_mode():
        return theirs.logits(ids_T), load(folder)(ids_T[None])[0]


CONFIGS = {
    "no query rank": {},
    "query rank": {"q_lora_rank": 20},
    "two groups of four": {"n_group": 4, "topk_group": 2},
    "one group, as upcycled": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
    "all groups": {"n_group": 4, "topk_group": 4},
    "three shared experts": {"n_shared_experts": 3},
    "no first dense layer": {"first_k_dense_replace": 0},
    "dense": {"first_k_dense_replace": 3},
    "weights not normalised": {"norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {"kv_lora_rank": 23, "qk_rope_head_dim": 2, "v_head_dim": 7},
    "26 layers": {"num_hidden_layers": 26},
    "yarn": {"rope_parameters": YARN, **YARN_SIZES},
    "yarn, one mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, **YARN_SIZES},
    "yarn, two mscales": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, **YARN_SIZES},
    "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.5}, **YARN_SIZES},
    "yarn, as conversion writes it": {
        "rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.5, "mscale": 1e-6, "mscale_all_dim": 1e-6},
        **YARN_SIZES,
    },
    "yarn, a factor": {"rope_parameters": YARN | {"attention_factor": 1.4}, "q_lora_rank": 20, **YARN_SIZES},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_f32_logits_are_ours(tmp_path, name):
    tiny_folder(tmp_path / "m", **CONFIGS[name])
    theirs_TV, ours_TV = both_logits(tmp_path / "m", ids())
    assert torch.equal(theirs_TV.argmax(-1), ours_TV.argmax(-1))
    assert (theirs_TV - ours_TV).abs().max() < 1e-4  # the aim is 2e-3


@pytest.mark.parametrize("experts", ["upcycle", "carve"])
def test_a_converted_model_runs(tmp_path, experts):
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "dense", tokenizer_from=tiny_tokenizer())
    smolseek.convert(
        tmp_path / "dense",
        tmp_path / "v3",
        cache=0.5,
        experts=experts,
        calibration=write_stories(tmp_path / "text.txt"),
        calibration_windows=4,
        calibration_window_tokens=32,
        refine_steps=2,
        distill_steps=0,
    )
    theirs_TV, ours_TV = both_logits(tmp_path / "v3", ids())
    assert torch.equal(theirs_TV.argmax(-1), ours_TV.argmax(-1))
    assert (theirs_TV - ours_TV).abs().max() < 2e-3


@pytest.mark.parametrize("experts", [8, 3])
@pytest.mark.parametrize(
    ("kind", "dtype", "most"), [("bf16", "bfloat16", 1e-3), ("f16", "float32", 1e-3), ("q8_0", "float32", 5e-3)]
)
def test_fewer_bits_are_near_ours(tmp_path, kind, dtype, most, experts):
    """Compares with fewer bits per weight.

    With all 8 experts chosen, rounding cannot send a token to another expert, so clear winners must stay.
    """
    sizes = {"hidden_size": 64, "kv_lora_rank": 32, "moe_intermediate_size": 32, "num_experts_per_tok": experts}
    tiny_folder(tmp_path / "m", dtype=dtype, **sizes)
    theirs_TV, ours_TV = both_logits(tmp_path / "m", ids(), kind)
    kl = F.kl_div(theirs_TV.log_softmax(-1), ours_TV.log_softmax(-1), reduction="batchmean", log_target=True)
    assert kl < most
    best_TK = ours_TV.topk(2).values
    is_clear_T = best_TK[:, 0] - best_TK[:, 1] > NEAR_TIE
    agrees_T = theirs_TV.argmax(-1) == ours_TV.argmax(-1)
    assert is_clear_T.sum() > 30 and agrees_T[is_clear_T].float().mean() >= (
        1.0 if experts == 8 and kind != "q8_0" else 0.9
    )


@pytest.mark.parametrize(("kind", "most"), [("q6_k", 5e-3), ("q5_k_m", 0.02), ("q4_k_m", 0.06)])
def test_k_quants_are_near_ours(tmp_path, kind, most):
    sizes = {"hidden_size": 256, "kv_lora_rank": 32, "moe_intermediate_size": 256, "num_experts_per_tok": 8}
    tiny_folder(tmp_path / "m", **sizes)
    theirs_TV, ours_TV = both_logits(tmp_path / "m", ids(), kind)
    kl = F.kl_div(theirs_TV.log_softmax(-1), ours_TV.log_softmax(-1), reduction="batchmean", log_target=True)
    assert 0 < kl < most


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_act": "gelu"},
        {"rope_interleave": False},
        {"rope_parameters": YARN | {"truncate": False}, **YARN_SIZES},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ],
)
def test_what_the_rules_refuse_gives_other_logits(tmp_path, monkeypatch, overrides):
    tiny_folder(tmp_path / "m", **overrides)
    with pytest.raises(ValueError, match="refuses"):
        both_logits(tmp_path / "m", ids())
    monkeypatch.setattr("smolseek.export.gguf.check", lambda config, headers: {"llama.cpp": []})
    theirs_TV, ours_TV = both_logits(tmp_path / "m", ids())
    assert (theirs_TV - ours_TV).abs().max() > 0.1


def test_without_its_options_yarn_s_betas_give_other_logits(tmp_path, caplog):
    tiny_folder(tmp_path / "m", rope_parameters=YARN | {"beta_fast": 4.0, "beta_slow": 0.5}, **YARN_SIZES)
    exported = export_gguf(tmp_path / "m", tmp_path / "m.gguf", type="f32")
    assert exported.options == ("--yarn-beta-fast 4", "--yarn-beta-slow 0.5")
    assert f"run llama.cpp with {' '.join(exported.options)}, not Ollama" in caplog.text
    with LlamaCpp(exported.path) as theirs, torch.inference_mode():
        assert (theirs.logits(ids()) - load(tmp_path / "m")(ids()[None])[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"q_lora_rank": 20, "num_hidden_layers": 27}, "attn_q.weight"), ({"attention_bias": True}, "number of tensors")],
)
def test_what_the_rules_refuse_does_not_load(tmp_path, monkeypatch, overrides, said):
    tiny_folder(tmp_path / "m", **overrides)
    monkeypatch.setattr("smolseek.export.gguf.check", lambda config, headers: {"llama.cpp": []})
    with pytest.raises(ValueError, match=said):
        both_logits(tmp_path / "m", ids())


def test_without_the_key_for_no_query_rank_it_does_not_load(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "m")
    monkeypatch.setattr("gguf.GGUFWriter.add_q_lora_rank", lambda *_: None)
    with pytest.raises(ValueError, match="q_lora_rank"):
        both_logits(tmp_path / "m", ids())


_ABORTED = """
import sys, torch
from pathlib import Path
from smolseek.export import gguf
from llamacpp import LlamaCpp
gguf.check = lambda config, headers: {"llama.cpp": []}
gguf.export_gguf(sys.argv[1], sys.argv[2], type="f32")
with LlamaCpp(Path(sys.argv[2])) as model:
    model.logits(torch.arange(8))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [{"n_shared_experts": 0}, {"qk_nope_head_dim": 0}, {"n_routed_experts": LARGEST_LLAMA_CPP_EXPERTS + 1}],
)
def test_what_the_rules_refuse_ends_the_process(tmp_path, overrides):
    tiny_folder(tmp_path / "m", **overrides)
    command = [sys.executable, "-c", _ABORTED, str(tmp_path / "m"), str(tmp_path / "m.gguf")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode < 0 and "GGML_ASSERT" in ended.stderr


TEXTS = (
    "Once upon a time, there was a little girl named Lily. She didn't like 12345 cats!",
    "def f(x):\n    return {'a': x[1:-1], \"b\": 3.14e-5}  # déjà vu\n\n\n\tif x >= 10: pass\r\n",
    "Ünïcödé 東京 привет \u00a0 I'LL WE'RE 🙂👍🏽   three   spaces ",
    "  leading",
    "\n",
)


def assert_cut_alike(folder, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    save(tiny_v3(vocab_size=len(tokenizer), num_hidden_layers=1), folder, tokenizer_from=tokenizer_folder)
    out = folder.with_suffix(".gguf")
    export_gguf(folder, out, type="f32")
    with LlamaCpp(out) as theirs:
        for text in TEXTS:
            assert theirs.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
            assert theirs.tokenize(text, special=True) == tokenizer(text)["input_ids"], text


def test_the_built_in_tokenizer_is_cut_alike(tmp_path):
    assert_cut_alike(tmp_path / "m", resolve_folder("builtin:base"))


@pytest.mark.parametrize("name", ["smollm2-tokenizer", "stories260K"])
def test_real_tokenizers_are_cut_alike(tmp_path, name):
    if not (DATA / name).is_dir():
        pytest.skip(f"needs {DATA / name}")
    folder = shutil.copytree(DATA / name, tmp_path / "tokenizer")
    if not (folder / "tokenizer_config.json").is_file():
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert_cut_alike(tmp_path / "m", folder)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_every_known_cut_is_llama_cpp_s(tmp_path, name):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    cuts, use_regex = PRE_TYPES[name]
    tree = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, byte_level]}
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        tmp_path / "tokenizer"
    )
    assert_cut_alike(tmp_path / "m", tmp_path / "tokenizer")


def ends(model):
    """Returns the ids at which llama.cpp stops."""
    is_end = llamacpp.shared_library().llama_vocab_is_eog
    is_end.restype, is_end.argtypes = ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32]
    return {number for number in range(ENTRIES) if is_end(model._vocabulary, number)}


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BOS, EOS = {"<s>": 1}, {"</s>": 2}
WITH_SPECIAL = ("a<s>b</s> <s> the cat", "<s>", "the</s>cat</s>", "a\n<|endoftext|>b <|endoftext|>", "<unk>")


def assert_alike(folder, texts=(*TEXTS, *WITH_SPECIAL, "123", "")):
    tokenizer = load_tokenizer(folder)
    out = folder.with_suffix(".gguf")
    export_gguf(folder, out, type="f32", force=True)
    with LlamaCpp(out) as theirs:
        for text in texts:
            assert theirs.tokenize(text, special=True) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("tree", "names", "added"),
    [
        (sentencepiece_tree(), NAMES, around("<s>", "A", **BOS)),
        (sentencepiece_tree(), NAMES, around("<s>", "A", "</s>", **BOS, **EOS)),
        (sentencepiece_tree(), NAMES, around("A", "</s>", **EOS)),
        (sentencepiece_tree(), NAMES, None),
        (sentencepiece_tree(), {"eos_token": "</s>"}, None),
        (byte_level_tree(), {"bos_token": "<|endoftext|>"}, around("<|endoftext|>", "A", **{"<|endoftext|>": 0})),
        (byte_level_tree(), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, None),
        (byte_level_tree(), {"eos_token": "<|endoftext|>"}, None),
    ],
)
def test_special_tokens_are_added_alike(tmp_path, tree, names, added):
    folder = tokenizer_folder(tmp_path / "m", tree | {"post_processor": added}, names, eos_token_id=[50, 2])
    assert_alike(folder)


@pytest.mark.parametrize(
    ("parts", "other"),
    [
        ({"normalizer": REPLACE}, ""),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}, ""),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always"}}, " the cat"),
        ({"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "first"}}, "</s>the cat"),
    ],
)
def test_spaces_are_cut_alike_but_where_a_warning_says_so(tmp_path, parts, other):
    folder = tokenizer_folder(tmp_path / "m", sentencepiece_tree() | parts, NAMES)
    assert_alike(folder, ("the cat  on\nit ", "", "12 ü東"))
    if other:
        with pytest.raises(AssertionError):
            assert_alike(folder, (other,))
    else:
        assert_alike(folder)


def test_a_class_with_steps_of_its_own_is_cut_as_transformers_does(tmp_path):
    """Qwen2Tokenizer has NFC and its own cut, whatever tokenizer.json says."""
    folder = tokenizer_folder(tmp_path / "m", byte_level_tree(), {"tokenizer_class": "Qwen2Tokenizer"}, eos_token_id=0)
    assert_alike(folder, TEXTS)
    with pytest.raises(AssertionError):
        assert_alike(folder, ("e\u0301",))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_flags_that_a_warning_names_give_other_tokens(tmp_path, flag):
    tree = sentencepiece_tree()
    tree["added_tokens"][2][flag] = True
    with pytest.raises(AssertionError):
        assert_alike(tokenizer_folder(tmp_path / "m", tree, NAMES), ("a </s> b</s>c",))


def _with_words(tree, *words):
    """Puts words that no merge makes in place of the last tokens."""
    vocabulary = tree["model"]["vocab"]
    for word, last in zip(words, sorted(vocabulary, key=vocabulary.get)[-len(words) :], strict=True):
        vocabulary[word] = vocabulary.pop(last)
    tree["model"]["merges"] = [merge for merge in tree["model"]["merges"] if "".join(merge) in vocabulary]
    return tree


@pytest.mark.parametrize(("ignored", "cut"), [(True, "smollm"), (False, "llama-bpe")])
def test_words_that_a_warning_names_become_other_tokens(tmp_path, caplog, ignored, cut):
    tree = _with_words(byte_level_tree(), "qx")
    tree["model"]["ignore_merges"] = ignored
    if cut == "llama-bpe":
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*PRE_TYPES[cut][0], byte_level]}
    folder = tokenizer_folder(tmp_path / "m", tree, {"eos_token": "<|endoftext|>"})
    assert_alike(folder, TEXTS)
    assert "words become other tokens: qx" in caplog.text
    with pytest.raises(AssertionError):
        assert_alike(folder, ("qx",))


def test_a_token_that_no_merge_makes_wins_over_none(tmp_path):
    folder = tokenizer_folder(tmp_path / "m", _with_words(sentencepiece_tree(), "ut"), NAMES)
    assert_alike(folder, ("u the", "at"))
    tree = _with_words(sentencepiece_tree(), "oi")  # a merge makes "in"
    assert_alike(tokenizer_folder(tmp_path / "n", tree, NAMES), ("oin",))


def test_llama_cpp_stops_at_each_end_token(tmp_path):
    folder = tokenizer_folder(tmp_path / "m", byte_level_tree(), {"eos_token": "<|endoftext|>"}, eos_token_id=[50, 0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, 70]}))
    export_gguf(folder, tmp_path / "m.gguf")
    with LlamaCpp(tmp_path / "m.gguf") as model:
        assert ends(model) == {0, 50, 60, 70}


def test_llama_cpp_stops_at_texts_that_it_knows(tmp_path):
    folder = tokenizer_folder(tmp_path / "m", _with_words(byte_level_tree(), *KNOWN_ENDS - {"<|endoftext|>"}), {})
    export_gguf(folder, tmp_path / "m.gguf")
    vocabulary = load_tokenizer(folder).get_vocab()
    with LlamaCpp(tmp_path / "m.gguf") as model:
        assert ends(model) == {vocabulary[text] for text in KNOWN_ENDS} | {11}


def test_a_chat_template_is_read(tmp_path):
    tiny_folder(tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages[0].content }}")
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    with LlamaCpp(tmp_path / "m.gguf") as model:
        assert model.chat_template() == "{{ messages[0].content }}"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Anna sees a ball?"},
    {"role": "assistant", "content": "Ben finds the cat."},
    {"role": "user", "content": "  a red hat\n"},
]


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def chat_folder(folder, *, adds_bos):
    """Saves a model that writes ASCII alone and talks in ChatML, with both marks as special tokens."""
    tree = _with_words(byte_level_tree(), "<|im_start|>", "<|im_end|>")
    vocabulary, flags = tree["model"]["vocab"], {key: tree["added_tokens"][0][key] for key in FLAGS}
    marks = {text: vocabulary[text] for text in ("<|im_start|>", "<|im_end|>")}
    tree["added_tokens"] += [{"id": number, "content": text, **flags} for text, number in marks.items()]
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    if adds_bos:
        tree["post_processor"] = around("<|endoftext|>", "A", **{"<|endoftext|>": 0})
        names["chat_template"] = "{{ bos_token }}" + CHATML
    tokenizer_folder(folder, tree, names, eos_token_id=marks["<|im_end|>"])
    tensors, tokenizer = load_file(folder / "model.safetensors"), load_tokenizer(folder)
    for token in range(ENTRIES):
        if not tokenizer.decode([token], skip_special_tokens=True).isascii():
            tensors["lm_head.weight"][token] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("adds_bos", [False, True])
def test_conversations_become_transformers_tokens_and_end_alike(tmp_path, adds_bos):
    """llama.cpp's own server, with the template in the file, answers with our greedy tokens."""
    import xllamacpp

    folder = chat_folder(tmp_path / "m", adds_bos=adds_bos)
    export_gguf(folder, tmp_path / "m.gguf", type="f32")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.verbosity, settings.n_ctx = str(tmp_path / "m.gguf"), -1, 256
    settings.cpuparams.n_threads, settings.warmup = 1, False
    server = xllamacpp.Server(settings)
    model, tokenizer = load(folder), load_tokenizer(folder)
    (end,) = end_tokens(model, tokenizer)
    for bias in (0.0, 100.0):  # the second time the end token is the likeliest
        question = {"messages": TURNS, "max_tokens": 6, "temperature": 0, "logprobs": True, "logit_bias": [[end, bias]]}
        answer = server.handle_chat_completions(question)
        ids = render_prompt(tokenizer, TURNS)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        ours = list(stream(model, torch.tensor([ids]), max_new_tokens=6, eos_token_id=end))
        theirs = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
        assert theirs == (ours if not bias else [end])
        assert answer["choices"][0]["finish_reason"] == ("stop" if bias else "length")
