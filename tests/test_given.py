"""`CoDAgent(given=...)`: contexts from elsewhere are shown, kept as versions, committed, and used again after a crash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Memory
from cod_agent.context import Message
from cod_agent.environments import FrozenLake
from cod_agent.environments.players import note_in
from cod_agent.errors import UsageError
from cod_agent.memory.projection import projection
from cod_agent.memory.verify import verify
from cod_agent.models.scripted import ScriptedModel

LAKE = FrozenLake("tiny", seed=3, form="compact")
NOTES = ["", "1: up", "1: up", "2: down", ""]


class Seeing:
    """Answers 1, and knows which notes it was shown; raises when it is asked for the last time it may be."""

    def __init__(self, calls: int = 1000) -> None:
        self.left, self.notes = calls, list[str]()

    def __call__(self, messages: Sequence[Message]) -> str:
        self.left -= 1
        if self.left < 0:
            raise KeyError("killed by the test")
        self.notes.append(note_in(messages[0].content))
        return "Direction 1"


async def live(memory: Memory, seen: Seeing, given: Any, **more: Any) -> list[Any]:
    async with CoDAgent("a", model=ScriptedModel("seeing", seen), memory=memory, given=given, **more) as agent:
        return [outcome async for outcome in agent.run(LAKE.pack(len(NOTES)))]


def notes(run: str, position: int) -> str:
    return NOTES[position]


def rows(memory: Memory) -> list[tuple[int, str, str, Any]]:
    query = "SELECT version, body, sources, episode_id FROM contexts ORDER BY version"
    return memory.read_sync(lambda conn: conn.execute(query).fetchall())


async def test_what_is_given_is_shown_and_no_update_is_asked_for(memory: Memory) -> None:
    seen = Seeing()
    outcomes = await live(memory, seen, notes)
    assert {outcome.update for outcome in outcomes} == {"none"}
    assert [outcome.context for outcome in outcomes] == NOTES
    assert [note for at, note in enumerate(seen.notes) if at == 0 or note != seen.notes[at - 1]] == [
        *("", "1: up", "2: down", "")
    ]


async def test_a_version_is_written_where_the_text_is_another(memory: Memory) -> None:
    await live(memory, Seeing(), notes)
    written = rows(memory)
    assert [row[1] for row in written] == ["", "1: up", "2: down", ""]
    assert [json.loads(row[2]) for row in written] == [[], *([[{"given": "given"}]] * 3)]
    assert {row[3] for row in written} == {None}
    report = verify(memory.path)
    assert report.ok and report.counts["contexts"] == 4


async def test_it_may_be_async_and_have_a_name(memory: Memory) -> None:
    class Later:
        name = "elsewhere"

        async def __call__(self, run: str, position: int) -> str:
            return f"{run} {position}"

    await live(memory, Seeing(), Later())
    run = LAKE.pack(1).id
    assert [row[1] for row in rows(memory)] == ["", *(f"{run} {at}" for at in range(len(NOTES)))]
    assert json.loads(rows(memory)[1][2]) == [{"given": "elsewhere"}]


@pytest.mark.parametrize("calls", (0, 1, 3, 5))
async def test_after_a_crash_what_was_given_stays(tmp_path: Path, calls: int) -> None:
    """Whoever gives would say something else now: a task that was begun is gone on with as it was."""
    whole, cut = (Memory.open(tmp_path / name, durable=False) for name in ("whole.db", "cut.db"))
    await live(whole, Seeing(), notes)
    asked: list[int] = []
    with pytest.raises(KeyError):
        await live(cut, Seeing(calls), notes)
    begun = cut.read_sync(lambda conn: conn.execute("SELECT count(*) FROM tasks").fetchone()[0])

    def again(run: str, position: int) -> str:
        asked.append(position)
        return NOTES[position]

    await live(cut, Seeing(), again)
    assert asked == list(range(begun, len(NOTES)))
    whole.close()
    cut.close()
    assert verify(cut.path).ok
    assert projection(cut.path) == projection(whole.path)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE contexts SET body = '1: down' WHERE version = 1",
        """UPDATE contexts SET sources = '[{"given":"nobody"}]' WHERE version = 2""",
        "UPDATE contexts SET parent_id = 1 WHERE version = 2",
        "INSERT INTO contexts (run_id, version, parent_id, body, hash, sources, created)"
        " SELECT run_id, 4, id, body, hash, sources, created FROM contexts WHERE version = 3",
    ],
)
async def test_verify_sees_damage(memory: Memory, damage: str) -> None:
    await live(memory, Seeing(), notes)
    await memory.write(lambda conn: conn.execute(damage))
    assert not verify(memory.path).ok


async def test_secrets_are_redacted(memory: Memory) -> None:
    await live(memory, Seeing(), lambda run, position: "key 1234", redact=lambda text: text.replace("1234", "[key]"))
    assert rows(memory)[1][1] == "key [key]"


async def test_what_is_no_text_is_refused(memory: Memory) -> None:
    with pytest.raises(UsageError, match="the text of a context, not int 7"):
        await live(memory, Seeing(), lambda run, position: 7)
