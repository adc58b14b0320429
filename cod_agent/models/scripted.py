"""Players of a world as models: `scripted:memoryless` and `scripted:perfect`. No weights, no server, no tokens.

A player is a function from the messages to an answer, so it goes through the very same prompts, journal and updates as a
language model does; floors and ceilings of a world are measured with what measures everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from cod_agent.context import Message
from cod_agent.environments.base import Form
from cod_agent.environments.players import Player
from cod_agent.models.base import Completion, OnDelta


class ScriptedModel:
    """A model that is a function.

    Args:
        name: as on the command line.
        player: messages -> answer.
    """

    form: Form

    def __init__(self, name: str, player: Player, form: Form = "compact") -> None:
        self.name, self.form, self._player = name, form, player

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        from cod_agent.journal import record_completion

        return await record_completion(self.name, messages, {}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        return Completion(self._player(messages), inexact="a scripted player has no tokens", weights=self.name)
