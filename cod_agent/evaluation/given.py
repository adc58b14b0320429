"""Contexts that a lane is given instead of writing its own. All but the history come from the main lane, which has lived first.

    frozen      for every task after the first, the context that the main lane had after its first task
    foreign     the context that the main lane had at the same position of the next pack of the same seed (after the last, the first)
    blank       the main lane's context of the same pack and position, with nothing left in any of its lines: the same number of lines,
                all of them empty
    shuffled    the main lane's context of the same pack and position, its lines in random order, the same one every time
    history     what the lane itself saw of the earlier tasks, as an update prompt shows it; of a long life the newest tasks that fit

Each is a function of the run database, so that a lane that was interrupted goes on as it would have.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from cod_agent.context import COMPACT, NATURAL
from cod_agent.environments.base import Form
from cod_agent.environments.draws import randomness
from cod_agent.environments.draws import shuffled as in_random_order
from cod_agent.errors import UnknownName
from cod_agent.memory import Memory, read, runs
from cod_agent.tasks import Feedback

Named = tuple[str, str]
"""A run: its agent and its name."""

LONGEST_HISTORY = 16_000
"""Characters; a model in this process with a smaller window gets as many characters as its window has tokens."""


@dataclass(frozen=True, slots=True)
class Giver:
    """What `CoDAgent(given=...)` takes: the text of a run's next context."""

    name: str
    text: Text
    memory: Memory
    main: Named
    """The run that contexts are taken from."""
    own: Named
    """The run they are given to."""
    form: Form
    limit: int
    """Longest history, in characters."""

    async def __call__(self, run: str, position: int) -> str:
        return await self.memory.read(lambda conn: self.text(conn, self, position))


Text = Callable[[sqlite3.Connection, Giver, int], str]


def frozen(conn: sqlite3.Connection, giver: Giver, position: int) -> str:
    """The same from the second task on."""
    return shown(conn, giver.main, min(position, 1))


def foreign(conn: sqlite3.Connection, giver: Giver, position: int) -> str:
    """`giver.main` is another pack's run."""
    return shown(conn, giver.main, position)


def blank(conn: sqlite3.Connection, giver: Giver, position: int) -> str:
    """As many line ends, and nothing else."""
    return "\n" * shown(conn, giver.main, position).count("\n")


def shuffled(conn: sqlite3.Connection, giver: Giver, position: int) -> str:
    """Drawn by the run's name and the position."""
    lines = shown(conn, giver.main, position).split("\n")
    return "\n".join(in_random_order(randomness("shuffled lines", giver.main[1], position), lines))


def history(conn: sqlite3.Connection, giver: Giver, position: int) -> str:
    """Oldest first, of whole tasks only."""
    run, prompts = runs.find_run(conn, *giver.own), COMPACT if giver.form == "compact" else NATURAL
    told: list[str] = []
    left = giver.limit
    for at in reversed(range(position)):
        known = read.position(conn, run, at)
        parts = prompts.happened(read.trajectory(conn, int(known.solve_id or 0), known), known.feedback or Feedback())
        text = "".join(said for _, said in parts)
        left -= len(text) + 1
        if left < 0:
            break
        told.insert(0, text)
    return "\n".join(told)


def shown(conn: sqlite3.Connection, run: Named, position: int) -> str:
    """The context a task was solved with.

    Raises:
        UnknownName: it was not.
    """
    row = conn.execute(
        "SELECT c.body FROM runs r JOIN episodes e ON e.run_id = r.id JOIN contexts c ON c.id = e.context_id "
        "WHERE r.agent = ? AND r.name = ? AND e.position = ? AND e.kind = 'solve'",
        (*run, position),
    ).fetchone()
    if row is None:
        raise UnknownName(f"run {run[1]!r} of agent {run[0]!r} has not come to position {position}: live it first")
    return row[0] or ""
