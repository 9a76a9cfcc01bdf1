"""Conversations: which characters of a rendering are the assistant's, whatever the template."""

from __future__ import annotations

import pytest

from slideformer.graph.errors import DataError
from slideformer.models.data.byte_tokenizer import CHAT_TEMPLATE, build_byte_tokenizer
from slideformer.models.data.chat import ChatRenderer, RenderedChat
from slideformer.models.data.reading import ChatRecord, Message

HEADER = "{{ '<' + m['role'] + '>' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
PLAIN = "{% for m in messages %}" + HEADER + "{{ m['content'] + '</s>\n' }}{% endfor %}" + PROMPT
# Trims what is said, writes the user's turns without a header for the answer, ends turns bare.
BRACKETS = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + '</s>' }}"
    "{% endif %}{% endfor %}"
)
# Adds an empty thought to a conversation's last turn, and drops the thoughts of earlier ones.
THINKING = (
    "{% for m in messages %}" + HEADER + "{% set said = m['content'].split('</think>')[-1] %}"
    "{% if m['role'] != 'assistant' or not loop.last %}{{ said }}"
    "{% elif '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}{{ '<think></think>' + said }}{% endif %}{{ '</s>\n' }}{% endfor %}" + PROMPT
)


def render(template: str | None, *turns: tuple[str, str]) -> RenderedChat:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = template
    messages = tuple(Message(role, content) for role, content in turns)
    return ChatRenderer(tokenizer).render(ChatRecord("train.jsonl, line 7", messages))


def learnt(template: str, *turns: tuple[str, str]) -> list[str]:
    chat = render(template, *turns)
    return [chat.text[start:end] for start, end in chat.spans]


TWO_TURNS = (
    ("system", "Be brief."),
    ("user", "one"),
    ("assistant", "first"),
    ("user", "two"),
    ("assistant", "second"),
)


def test_marked_template_is_taken_at_its_word() -> None:
    eos = "<|endoftext|>"
    assert learnt(CHAT_TEMPLATE, *TWO_TURNS) == [f"first{eos}", f"second{eos}"]


def test_plain_template_learns_words_and_end_of_turn() -> None:
    chat = render(PLAIN, *TWO_TURNS)
    assert chat.text == (
        "<system>Be brief.</s>\n<user>one</s>\n<assistant>first</s>\n"
        "<user>two</s>\n<assistant>second</s>\n"
    )
    assert learnt(PLAIN, *TWO_TURNS) == ["first</s>\n", "second</s>\n"]


def test_marked_and_plain_template_agree() -> None:
    plain = PLAIN.replace("m['content'] + '</s>\n'", "m['content'] + '</s>'")
    marked = plain.replace(
        "{{ m['content'] + '</s>' }}",
        "{% if m['role'] == 'assistant' %}{%- generation -%}{{ m['content'] + '</s>' }}"
        "{%- endgeneration -%}{% else %}{{ m['content'] + '</s>' }}{% endif %}",
    )
    assert render(plain, *TWO_TURNS) == render(marked, *TWO_TURNS)


def test_same_words_said_by_all() -> None:
    turns = (("user", "x"), ("assistant", "x"), ("user", "x"), ("assistant", "x"), ("user", "x"))
    chat = render(PLAIN, *turns)
    words = [(chat.text[:start].rsplit("<")[-1], chat.text[start:end]) for start, end in chat.spans]
    assert words == [("assistant>", "x</s>\n")] * 2


def test_consecutive_and_empty_assistant_turns() -> None:
    turns = (("user", "q"), ("assistant", ""), ("assistant", "</s>\n"), ("assistant", "z"))
    assert learnt(PLAIN, *turns) == ["</s>\n", "</s>\n</s>\n", "z</s>\n"]


def test_conversation_opened_by_the_assistant_and_one_without_it() -> None:
    assert learnt(PLAIN, ("assistant", "hello"), ("user", "hi")) == ["hello</s>\n"]
    assert learnt(PLAIN, ("user", "hi"), ("critic", "hm")) == []


def test_template_that_trims_and_has_no_generation_prompt() -> None:
    turns = (("user", "a"), ("assistant", "  b\n"), ("user", "c"), ("assistant", " d "))
    assert learnt(BRACKETS, *turns) == [" b</s>", " d</s>"]


def test_template_that_renders_the_last_turn_differently() -> None:
    turns = (
        ("user", "a"),
        ("assistant", "<think>hm</think>b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
        ("assistant", "<think>ah</think>f"),
    )
    assert learnt(THINKING, *turns) == ["b</s>\n", "d</s>\n", "<think>ah</think>f</s>\n"]
    assert learnt(THINKING, *turns[:4]) == ["b</s>\n", "<think></think>d</s>\n"]


@pytest.mark.parametrize(
    "template",
    [
        PLAIN.replace("<assistant>", "<assistant><think>"),
        "{{ messages | length }}" + PLAIN,
    ],
)
def test_prompt_that_changes_once_the_answer_follows(template: str) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 7: .*messages\[2\] differently"):
        render(template, *TWO_TURNS)


@pytest.mark.parametrize(
    "template",
    [
        # The last turn alone has an end mark.
        PLAIN.replace(
            "'</s>\n'", "('<end>' if loop.last and m['role'] == 'assistant' else '</s>\n')"
        ),
        # What follows the words depends on them.
        PLAIN.replace(
            HEADER, "{{ '<' + m['role'] + '>' }}{{ (loop.previtem or m)['content'][:1] }}"
        ),
        # The words of the assistant are not there.
        PLAIN.replace("m['content'] +", "('' if m['role'] == 'assistant' else m['content']) +"),
    ],
)
def test_turn_whose_end_cannot_be_told(template: str) -> None:
    with pytest.raises(DataError) as caught:
        render(template, *TWO_TURNS)
    assert str(caught.value).startswith("train.jsonl, line 7: the chat template does not show")
    assert "{% generation %}" in str(caught.value)


def test_template_that_refuses() -> None:
    template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('No system!') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"line 7: .*refuses the conversation: No system!"):
        render(template, *TWO_TURNS)


def test_tokenizer_without_a_template() -> None:
    with pytest.raises(DataError, match=r"line 7: .*chat_template\.jinja.*'prompt'"):
        render(None, *TWO_TURNS)


def test_named_templates_use_the_default() -> None:
    tokenizer = build_byte_tokenizer()
    record = ChatRecord("train.jsonl, line 7", (Message("assistant", "x"),))
    tokenizer.chat_template = {"default": PLAIN, "rag": "unused"}
    assert ChatRenderer(tokenizer).render(record).text == "<assistant>x</s>\n"
    tokenizer.chat_template = {"rag": PLAIN}
    with pytest.raises(DataError, match="several and no default"):
        ChatRenderer(tokenizer).render(record)
