"""One pack as a story, told from what the agent's stream of events says: the map, the steps, the note that is left for
the next task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cod_agent.events import Event

COLORS = {"@": "bold yellow", "*": "bold green", "#": "blue", ".": "dim"}
"""Of a map's cells."""
ENDS = {
    "goal": "reached goal",
    "hole": "fell in a hole",
    "steps": "out of steps",
    "invalid": "malformed",
}


@dataclass(slots=True)
class Chapter:
    """One task."""

    map: str = ""
    steps: list[str] = field(default_factory=list)
    answer: str = ""
    end: str = ""
    reward: float | None = None
    note: str = ""
    """The context after the task."""
    kept: str = ""
    """Why the update was refused."""


class Story:
    """Chapters that fill as events come.

    Args:
        tasks: how many chapters there will be.
    """

    def __init__(self, tasks: int) -> None:
        self.chapters = [Chapter() for _ in range(tasks)]

    def hear(self, event: Event) -> None:
        """Take an event."""
        from cod_agent.events import Answered, ContextKept, ContextWritten, Judged, Observed, TaskEnded

        chapter = self.chapters[event.position]
        if isinstance(event, Observed):
            self._observed(chapter, event.observation)
        elif isinstance(event, Answered) and event.kind == "solve":
            chapter.answer = event.text
        elif isinstance(event, Judged):
            chapter.end, chapter.reward = ENDS.get(event.feedback.text, event.feedback.text), event.feedback.reward
        elif isinstance(event, ContextWritten):
            chapter.note = event.context
        elif isinstance(event, ContextKept):
            chapter.kept = event.reason
        elif isinstance(event, TaskEnded):
            chapter.reward, chapter.note = event.outcome.reward, event.outcome.context

    def _observed(self, chapter: Chapter, seen: Any) -> None:
        if not chapter.map:
            chapter.map = seen.text
            return
        wanted = chapter.answer.strip().replace("Direction ", "")
        chapter.steps.append(f"{wanted} → {(seen.summary or seen.text).partition(':')[0].strip()}")

    def table(self) -> Any:
        """A column a task."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Narrow enough for 80 columns.
        table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, show_edge=False)
        table.add_column("", style="dim")
        for number in range(1, len(self.chapters) + 1):
            table.add_column(f"task {number}", min_width=16)
        table.add_row("lake", *(_map(chapter.map) for chapter in self.chapters))
        table.add_row("steps", *(Text("\n".join(chapter.steps)) for chapter in self.chapters))
        table.add_row("result", *(_end(chapter) for chapter in self.chapters), end_section=True)
        table.add_row("note", *_notes(self.chapters))
        return table


def _map(cells: str) -> Any:
    from rich.text import Text

    text = Text()
    for cell in cells:
        text.append(f"{cell} " if cell != "\n" else cell, COLORS.get(cell, ""))
    return text


def _end(chapter: Chapter) -> Any:
    from rich.text import Text

    return Text(chapter.end, "green" if chapter.reward == 1 else "red")


def _notes(chapters: Sequence[Chapter]) -> list[Any]:
    """Each task's note, what is new in it in bold."""
    from rich.text import Text

    notes, before = [], set[str]()
    for chapter in chapters:
        text = Text()
        lines = chapter.note.splitlines()
        for line in lines:
            text.append(line.replace("Direction ", "") + "\n", "" if line in before else "bold cyan")
        if chapter.kept:
            text.append(f"(kept: {chapter.kept})", "yellow")
        before = set(lines)
        notes.append(text)
    return notes
