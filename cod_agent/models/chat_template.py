"""A model's own chat template, rendered the way its trainers render it.

The template is the one in the model file; it is rendered with jinja2 under the settings and helpers that Hugging
Face's `apply_chat_template` documents, so that the text an embedded model sees is the text its weights were trained
on. Templates come from strangers' files: they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from cod_agent.context import Message
from cod_agent.errors import MissingExtra, ModelRefused, UsageError


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the jinja2 text.
        bos: the text of the model's first token, "" if it has none.
        eos: the text of its last.

    Raises:
        MissingExtra: jinja2 is not installed.
        UsageError: the template is not valid.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        try:
            from jinja2 import TemplateError, TemplateSyntaxError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise MissingExtra("a chat template", "local") from None
        self._bos, self._eos, self._error = bos, eos, TemplateError
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        world.filters["tojson"] = _to_json
        world.globals["raise_exception"] = self._refuse
        world.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = world.from_string(source)
        except TemplateSyntaxError as error:
            raise UsageError(f"the model file's chat template is not valid: {error}") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt: the conversation, and the opening of the assistant's turn.

        Raises:
            ModelRefused: the template does not take such a conversation, or goes wrong on it.
        """
        said = [message.wire() for message in messages]
        try:
            return self._template.render(
                messages=said, add_generation_prompt=True, bos_token=self._bos, eos_token=self._eos
            )
        except Exception as error:  # whatever a stranger's template does
            raise ModelRefused(f"the model's chat template does not take this conversation: {error}") from None

    def _refuse(self, reason: str) -> NoReturn:
        raise self._error(reason)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
