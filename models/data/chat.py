"""Conversations: renders them with a tokenizer's chat template and finds what the assistant says.

The loss of a conversation covers the assistant's turns only, so each rendering comes with the
character spans of those turns. No tokens here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slideformer.graph.errors import DataError
from slideformer.models.data.reading import ChatRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Private-use characters: no text of a conversation has them, and no template changes them.
_SENTINEL = "\uf8d3\uf8d4\uf8d3"
_REMEDY = "mark the assistant's words in the template with {% generation %} ... {% endgeneration %}"


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the spans ``[start, end)`` of it (characters) to learn."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatRenderer:
    """Renders conversations with the chat template of ``tokenizer``.

    A template that marks the assistant's words with ``{% generation %}`` is taken at its word.
    Otherwise a turn begins where the prompt for it ends, with the template's generation prompt, and
    ends with what the template writes after an assistant's words, such as an end-of-turn token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._template: str | None = None

    def render(self, record: ChatRecord) -> RenderedChat:
        """The text and the assistant's spans of one conversation.

        Raises DataError, naming the line, without a chat template, when the template refuses the
        conversation, or when the spans cannot be told for certain.
        """
        messages = [
            {"role": message.role, "content": message.content} for message in record.messages
        ]
        if _GENERATION_TAG.search(self._chat_template(record.where)):
            text, spans = self._run(record.where, messages, marked=True)
            return RenderedChat(text, tuple(spans))
        text, _ = self._run(record.where, messages)
        turns = (turn for turn, message in enumerate(messages) if message["role"] == "assistant")
        return RenderedChat(
            text, tuple(self._span(record.where, messages, turn, text) for turn in turns)
        )

    def _span(
        self, where: str, messages: list[dict[str, str]], turn: int, text: str
    ) -> tuple[int, int]:
        """Where the assistant's message ``messages[turn]`` stands in the whole rendering."""
        prompt, _ = self._run(where, messages[:turn], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"{where}: the chat template renders the prompt of messages[{turn}] differently "
                "once the answer follows, so the assistant's words cannot be told from the rest; "
                f"{_REMEDY}"
            )
        if turn == len(messages) - 1:
            return len(prompt), len(text)
        # Rendering the conversation up to this turn would not do: several templates write the last
        # turn differently. What follows a sentinel put in the turn's place is the same.
        stand_in = {"role": "assistant", "content": _SENTINEL}
        closed, _ = self._run(where, [*messages[:turn], stand_in])
        continued, _ = self._run(where, [*messages[:turn], stand_in, *messages[turn + 1 :]])
        closing = closed.rpartition(_SENTINEL)[2]
        tail = continued.rpartition(_SENTINEL)[2]
        certain = (
            _SENTINEL in closed
            and _SENTINEL in continued
            and text.endswith(tail)
            and tail.startswith(closing)
        )
        if not certain:
            raise DataError(
                f"{where}: the chat template does not show where messages[{turn}] ends; {_REMEDY}"
            )
        return len(prompt), len(text) - len(tail) + len(closing)

    def _run(
        self,
        where: str,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        marked: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """One rendering; the spans of its generation blocks if ``marked``."""
        # The tokenizer's own method turns the spans into a token mask and loses all that follow a
        # span whose first character belongs to no token, so the step below it is called.
        from transformers.utils.chat_template_utils import render_jinja_template

        special_tokens: dict[str, Any] = self._tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self._chat_template(where),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise DataError(
                f"{where}: the tokenizer's chat template refuses the conversation: {error}"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if marked else []

    def _chat_template(self, where: str) -> str:
        if self._template is None:
            try:
                self._template = self._tokenizer.get_chat_template()
            except ValueError:
                raise DataError(
                    f"{where}: 'messages' need a chat template, and the model's tokenizer has none "
                    "(or several and no default); put a chat_template.jinja into the model's "
                    "folder, start from an instruction-tuned model, or give the record as "
                    "'prompt' and 'completion'"
                ) from None
        return self._template
