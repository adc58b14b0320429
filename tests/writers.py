"""A model whose notes are given beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cod_agent.completions import Completion
from cod_agent.context import Message


class Writer:
    """Answers "fine", and writes the notes it was given, one after the other."""

    name, form = "writer", "natural"

    def __init__(self, *notes: str) -> None:
        self.notes, self.shown = list(notes), list[str]()
        """Those still to be written, and the contexts that tasks were solved with."""

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        said = messages[0].content
        if "You learn across tasks" in said:
            return Completion(f"<context>\n{self.notes.pop(0)}\n</context>")
        self.shown.append(said.partition("<context>\n")[2].partition("\n</context>")[0])
        return Completion("fine")
