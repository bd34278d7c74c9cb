import copy
import json

import pytest

from smolseek.config import DataSettings
from smolseek.data import chat
from smolseek.data.chat import encode_chat, render_prompt
from smolseek.data.encoding import read_marks
from smolseek.data.packing import pack
from smolseek.data.splits import held_out_documents
from smolseek.data.stream import WindowStream
from tests.text import tiny_tokenizer

CHATML = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MARKED = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>
{% endgeneration %}{% else %}{{ m.content }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
# Like Llama 2's: no generation prompt, and the roles must alternate.
STRICT = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}\
{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}\
{% endfor %}"""
# Like Qwen3's: an empty thought before the last reply only.
THINKING = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' and loop.last %}<think></think>
{% endif %}{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
# Like Phi-3's: a token closes the conversation, and its first characters are also those of the next turn.
CLOSED = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
MESSAGES = [
    {"role": "user", "content": "Anna sees a ball"},
    {"role": "assistant", "content": "Ben likes the cat 7."},
    {"role": "user", "content": "Ben likes the cat 7."},
    {"role": "assistant", "content": " Ünï 日本"},
]


def tokenizer_with(template):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def learnt(template, messages=MESSAGES):
    """Returns the stretches of text on which loss is taken."""
    tokenizer = tokenizer_with(template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]})
    ids, written = encode_chat(tokenizer, messages)
    assert (
        ids == tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    )
    stretches, run = [], []
    for token, mine in [*zip(ids, written, strict=True), (0, False)]:
        if mine:
            run.append(token)
        elif run:
            stretches.append(tokenizer.decode(run))
            run = []
    return stretches


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML, ["Ben likes the cat 7.<|end|>\n", " Ünï 日本<|end|>\n"]),
        (MARKED, ["Ben likes the cat 7.<|end|>\n", " Ünï 日本<|end|>\n"]),
        (STRICT, [" Ben likes the cat 7. </s>", " Ünï 日本 </s>"]),
        (THINKING, ["<think></think>\n Ünï 日本<|end|>\n"]),
        (CLOSED, ["Ben likes the cat 7.<|end|>\n", " Ünï 日本<|end|>\n<|endoftext|>"]),
    ],
    ids=["chatml", "marked", "strict", "thinking", "closed"],
)
def test_the_assistants_turns_alone_are_learnt(template, turns):
    assert learnt(template) == turns


def test_a_system_message_and_a_reply_before_any_question_are_not_learnt():
    greeting = [{"role": "assistant", "content": "Hello."}, *MESSAGES[:2]]
    assert learnt(CHATML, greeting) == ["Ben likes the cat 7.<|end|>\n"]
    assert learnt(CHATML, [{"role": "system", "content": "Be kind."}, *MESSAGES[:2]]) == [
        "Ben likes the cat 7.<|end|>\n"
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED, STRICT])
def test_nothing_to_learn_from(template):
    assert encode_chat(tokenizer_with(template), MESSAGES[:1]) is None


# Like Qwen2.5's: calls of tools are written as JSON.
TOOLS = """{% for m in messages %}<|{{ m.role }}|>
{% if m.content %}{{ m.content }}{% endif %}\
{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
CALLING = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": {"at": "Rome"}}}],
    },
    {"role": "tool", "content": "No."},
    {"role": "assistant", "content": "It is dry."},
]


@pytest.mark.parametrize("content", [None, ""])
def test_calls_of_tools_are_learnt(content):
    call = '<call>{"name": "weather", "arguments": {"at": "Rome"}}</call><|end|>\n'
    messages = [CALLING[0], CALLING[1] | {"content": content}, *CALLING[2:]]
    assert learnt(TOOLS, messages) == [call, "It is dry.<|end|>\n"]
    assert learnt(TOOLS, messages[:2]) == [call]


def test_a_call_that_the_template_leaves_out_is_not_learnt():
    """Silence in place of the call would be learnt instead."""
    assert learnt(CHATML, [CALLING[0], CALLING[1] | {"content": ""}, *CALLING[2:]]) == ["It is dry.<|end|>\n"]


def test_an_empty_reply_is_learnt():
    messages = [MESSAGES[0], {"role": "assistant", "content": ""}, *MESSAGES[2:]]
    assert learnt(CHATML, messages) == ["<|end|>\n", " Ünï 日本<|end|>\n"]


def test_a_conversation_that_the_template_refuses(caplog, monkeypatch):
    monkeypatch.setattr(chat, "_warned_of", set())
    tokenizer = tokenizer_with(STRICT)
    for _ in range(3):
        assert encode_chat(tokenizer, [MESSAGES[0], *MESSAGES]) is None
    assert encode_chat(tokenizer, MESSAGES) is not None
    assert len(caplog.records) == 1 and "the first reason: roles" in caplog.text


FAILURES = {
    "UndefinedError": "{{ m.tools.names }}",
    "TypeError": "{{ m.content + 1 }}",
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "ValueError": "{{ m.content.split('') }}",
    "KeyError": "{{ '%(a)s' % {} }}",
    "OverflowError": "{{ range(10 ** 9) | list }}",
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("kind", "failing"), FAILURES.items(), ids=FAILURES)
def test_a_template_that_fails_on_one_conversation_skips_it(caplog, monkeypatch, kind, failing, marked):
    monkeypatch.setattr(chat, "_warned_of", set())
    template = "{% for m in messages %}{% if 'bad' in m.content %}" + failing + "{% endif %}{% endfor %}" + CHATML
    tokenizer = tokenizer_with(template + "{% generation %}x{% endgeneration %}" * marked)
    bad = [MESSAGES[0], {"role": "assistant", "content": "bad"}]
    assert encode_chat(tokenizer, bad) is None and encode_chat(tokenizer, bad) is None
    assert encode_chat(tokenizer, MESSAGES) is not None
    assert len(caplog.records) == 1 and f"the first reason: {kind}: " in caplog.text


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }", "{{ messages | nothing }}", "{% if %}"])
def test_a_template_that_cannot_be_parsed_is_one_line(template):
    for use in (encode_chat, render_prompt):
        with pytest.raises(ValueError, match=r"chat template: cannot be parsed \(.*, line 1\); mend") as raised:
            use(tokenizer_with(template), MESSAGES)
        assert "\n" not in str(raised.value)


def test_an_error_of_the_tokenizer_is_not_a_refusal(monkeypatch):
    tokenizer = tokenizer_with(CHATML)
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_args, **_options: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        encode_chat(tokenizer, MESSAGES)


def test_a_prompt_ends_where_the_assistant_begins():
    tokenizer = tokenizer_with(CHATML)
    assert (
        tokenizer.decode(render_prompt(tokenizer, MESSAGES[:1])) == "<|user|>\nAnna sees a ball<|end|>\n<|assistant|>\n"
    )
    ids, written = encode_chat(tokenizer, MESSAGES[:2])
    prompt = render_prompt(tokenizer, MESSAGES[:1])
    assert ids[: len(prompt)] == prompt and not any(written[: len(prompt)])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('a system message\nis needed') }}", r"\(a system message is needed\)"),
        ("{{ messages[0].tools.names }}", r"\(UndefinedError: .*tools.*\)"),
        ("{{ 1 // 0 }}", r"\(ZeroDivisionError: .*\)"),
    ],
)
def test_a_prompt_that_the_template_refuses_is_one_line(template, words):
    with pytest.raises(ValueError, match=rf"chat template: refuses this conversation {words}; change") as raised:
        render_prompt(tokenizer_with(template), MESSAGES)
    assert "\n" not in str(raised.value)


def test_a_prompt_without_a_template_is_one_line():
    with pytest.raises(ValueError, match="chat template: the tokenizer has none; "):
        render_prompt(tiny_tokenizer(), MESSAGES)


def test_no_template_is_one_line():
    with pytest.raises(ValueError, match="no chat template") as raised:
        encode_chat(tiny_tokenizer(), MESSAGES)
    assert "\n" not in str(raised.value)


@pytest.fixture
def settings(tmp_path):
    rows = [{"messages": [m | {"content": m["content"] + str(n)} for m in MESSAGES]} for n in range(20)]
    rows.insert(2, {"messages": MESSAGES[:1]})
    (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"text": "Anna sees"}']))
    return DataSettings(train=(str(tmp_path / "a.jsonl"),), held_out=("unused.txt",), shuffle_windows=4)


@pytest.mark.parametrize("batches", [1, 13])
def test_the_mask_survives_the_buffer_and_a_checkpoint(settings, batches):
    tokenizer = tokenizer_with(CHATML)
    stream, restored = (WindowStream(tokenizer, settings, window_tokens=33, seed=0) for _ in range(2))
    for _ in range(batches):
        stream.next(3)
    plain, tensors = stream.state()
    restored.restore(json.loads(json.dumps(plain)), tensors)
    for _ in range(60):
        windows = stream.next(3)
        assert windows.equal(restored.next(3))
        ids, loss, _ = read_marks(windows)
        assert 0 < loss.float().mean() < 1
        text = "".join(tokenizer.decode(ids[0][loss[0]]))
        assert "<|user|>" not in text and "Anna sees a ball" not in text
    assert stream.malformed > 0


def test_conversations_are_packed_whole(settings):
    """A conversation is one document, even if its template begins every message with the same token."""
    tokenizer = tokenizer_with(CHATML)
    windows = WindowStream(tokenizer, settings, window_tokens=400, seed=0).windows()
    ids, _, segments = read_marks(next(windows)[0])
    for number in range(1, 4):
        text = tokenizer.decode(ids[segments == number])
        assert text.startswith("<|user|>\nAnna") and text.endswith("<|end|>\n") and text.count("<|end|>") == 4


def test_held_out_conversations_count_the_assistants_words(settings):
    settings = DataSettings(held_out=settings.train)
    tokenizer = tokenizer_with(CHATML)
    ids, counts, text_bytes = pack(tokenizer, held_out_documents(settings))
    text = tokenizer.decode(ids[counts])
    assert "<|user|>" not in text and text.count("<|end|>") == 40 and text.endswith("Anna sees")
    said = sum(len((m["content"] + str(n)).encode()) for m in MESSAGES[1::2] for n in range(20))
    assert text_bytes == said + len("Anna sees")
