"""Runs of one file copied into another: the same record, whatever way it came, and never two lives under one name."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from random import Random

import pytest

from cod_agent import CoDAgent, Completion, Task, Tokens
from cod_agent.environments import make_world
from cod_agent.errors import ModelUnreachable, RunLeased, UsageError, VerificationFailed
from cod_agent.journal import record_completion
from cod_agent.memory import Memory
from cod_agent.memory.merge import Merged, merge
from cod_agent.memory.projection import projection
from cod_agent.memory.verify import verify

LAKE = make_world("frozen-lake:small", seed=3, form="compact")


class Player:
    """The world's player, with tokens of its own making: a character each."""

    name, form = "scripted:exact", "compact"

    def __init__(self, dice: int = 0, calls: int = 1000) -> None:
        self.play, self.left = LAKE.players["perfect"](Random(dice)), calls

    async def complete(self, messages, *, on_delta=None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1}, self.answer)

    async def answer(self, messages) -> Completion:
        self.left -= 1
        if self.left < 0:
            raise ModelUnreachable("the line is dead")
        said, prompt = self.play(messages), [ord(at) for message in messages for at in message.content]
        sampled = [ord(at) for at in said]
        return Completion(said, tokens=Tokens(prompt, sampled, [-0.5] * len(sampled)), weights="w-1")


def live(path: Path, packs: range, *, tasks: int = 3, dice: int = 0, agent: str = "agent") -> Path:
    """Live packs of three tasks in a file, at most `tasks` of each."""
    with CoDAgent(agent, model=Player(dice), memory=path) as living:
        for index in packs:
            life = living.run_sync(LAKE.pack(3, index))
            for _, _ in zip(range(tasks), life, strict=False):
                pass
            life.close()
    return path


def test_lives_lived_apart_are_the_record_of_one(memory: Memory, tmp_path: Path) -> None:
    whole = live(tmp_path / "whole.db", range(4))
    for number, packs in enumerate((range(2), range(2, 4))):
        part = Memory.open(tmp_path / f"part-{number}.db", durable=False)
        assert merge(part, whole, only={("agent", LAKE.pack(3, index).id) for index in packs}) == Merged(2, 0, 0)
        part.close()
        assert merge(memory, part.path) == Merged(2, 0, 0)
    assert projection(memory.path) == projection(whole)
    report = verify(memory.path)
    assert report.ok and report.counts["runs"] == 4 and report.requests == verify(whole).requests


def test_merging_twice_changes_nothing_and_content_is_stored_once(memory: Memory, tmp_path: Path) -> None:
    one, other = live(tmp_path / "one.db", range(2)), live(tmp_path / "other.db", range(2), agent="other")
    assert merge(memory, one) == Merged(2, 0, 0)
    heads = counted(memory, "heads")
    before = dump(memory)
    assert merge(memory, one) == Merged(0, 0, 2)
    assert dump(memory) == before
    assert merge(memory, other) == Merged(2, 0, 0)
    assert counted(memory, "heads") == heads and counted(memory, "runs") == 4
    assert verify(memory.path).ok


def test_a_life_that_went_on_elsewhere_extends_ours_and_an_older_copy_changes_nothing(
    memory: Memory, tmp_path: Path
) -> None:
    merge(memory, live(tmp_path / "there.db", range(1), tasks=1))
    early = dump(memory)
    live(tmp_path / "there.db", range(1))
    assert len(early) < len(dump_of(tmp_path / "there.db"))
    older = tmp_path / "older.db"
    copied = Memory.open(older, durable=False)
    merge(copied, memory.path)
    copied.close()
    assert merge(memory, tmp_path / "there.db") == Merged(0, 1, 0)
    assert projection(memory.path) == projection(tmp_path / "there.db")
    assert merge(memory, older) == Merged(0, 0, 1)
    assert verify(memory.path).ok and counted(memory, "leases") == 0
    # It goes on here as it would there: nothing is lived again.
    live(Path(memory.path), range(1), dice=7)
    assert projection(memory.path) == projection(tmp_path / "there.db")


def test_an_episode_that_broke_off_is_taken_along_and_gone_on_with(memory: Memory, tmp_path: Path) -> None:
    there = tmp_path / "there.db"
    with CoDAgent("agent", model=Player(calls=4), memory=there) as living, pytest.raises(ModelUnreachable):
        list(living.run_sync(LAKE.pack(3)))
    assert merge(memory, there) == Merged(1, 0, 0)
    assert projection(memory.path) == projection(there) and verify(memory.path).ok
    assert counted(memory, "calls") == 4 and counted(memory, "attempts") == 1
    live(Path(memory.path), range(1), dice=7)
    assert merge(memory, there) == Merged(0, 0, 1)
    assert verify(memory.path).ok and counted(memory, "attempts") == 1


def test_another_life_of_the_same_name_is_refused_and_changes_nothing(memory: Memory, tmp_path: Path) -> None:
    merge(memory, live(tmp_path / "one.db", range(3)))
    before = dump(memory)
    with pytest.raises(UsageError, match="another life"):
        merge(memory, live(tmp_path / "other.db", range(3), dice=5))
    assert dump(memory) == before


def test_a_damaged_file_is_refused(memory: Memory, tmp_path: Path) -> None:
    there = live(tmp_path / "there.db", range(1))
    with sqlite3.connect(there) as conn:
        conn.execute("UPDATE contexts SET body = 'Up: Direction 9' WHERE version = 1")
    with pytest.raises(VerificationFailed):
        merge(memory, there)
    assert counted(memory, "runs") == 0
    with pytest.raises(UsageError, match="no file"):
        merge(memory, tmp_path / "nowhere.db")


def test_a_fork_finds_the_run_it_was_made_from(memory: Memory, tmp_path: Path) -> None:
    there = live(tmp_path / "there.db", range(1))
    origin = LAKE.pack(3, 0).id
    with CoDAgent("agent", model=Player(), memory=there) as living:
        list(living.run_sync(LAKE.pack(3, 1), run="fork", fork=(origin, 2)))
    with pytest.raises(UsageError, match="merge that too"):
        merge(memory, there, only={("agent", "fork")})
    assert merge(memory, there) == Merged(2, 0, 0)
    assert projection(memory.path) == projection(there) and verify(memory.path).ok


def test_a_run_that_another_process_lives_is_not_extended(memory: Memory, tmp_path: Path) -> None:
    there = live(tmp_path / "there.db", range(1), tasks=1)
    merge(memory, there)
    live(there, range(1))
    held = "INSERT INTO leases (run_id, owner, host, pid, expires) SELECT id, 'them', 'there', 1, unixepoch() + 50 FROM runs"
    memory.write_sync(lambda conn: conn.execute(held))
    with pytest.raises(RunLeased):
        merge(memory, there)


def test_an_application_s_life_without_an_end_is_merged(memory: Memory, tmp_path: Path) -> None:
    with CoDAgent("app", memory=tmp_path / "there.db", updates=False, solver=lambda task, note, tools: "done") as agent:
        for name in ("one", "two"):
            agent.feedback_sync(agent.solve_sync(Task(id=name)), 1.0)
    assert merge(memory, tmp_path / "there.db") == Merged(1, 0, 0)
    assert projection(memory.path) == projection(tmp_path / "there.db") and verify(memory.path).ok


def counted(memory: Memory, table: str) -> int:
    return memory.read_sync(lambda conn: conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def dump(memory: Memory) -> list[str]:
    return memory.read_sync(lambda conn: list(conn.iterdump()))


def dump_of(path: Path) -> list[str]:
    with sqlite3.connect(path) as conn:
        return list(conn.iterdump())
