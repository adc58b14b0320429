"""The lane `attempts`: no context, but each task tried again for what the main lane spent on it; the best attempt counts.

What the main lane spent at a position is the tokens of all its calls there, prompts and answers, of the solve episode and of the
update. A task is tried again as long as less than that is spent on it and no attempt has got the world's highest reward; the last
attempt may go over it, so the lane never has less than the main one. Where not all calls are counted in tokens (scripted players
have none, some servers say none), both are counted in characters.

All attempts of a pack are one run without an end: so a world that remembers by itself does it from attempt to attempt, and a lane that was
interrupted goes on with the attempt it was at.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from functools import partial

from cod_agent.agent import CoDAgent
from cod_agent.evaluation.given import Named
from cod_agent.memory.content import conversation
from cod_agent.tasks import Outcome, Pack, Task


async def best_of(agent: CoDAgent, pack: Pack, run: str, main: Named) -> AsyncIterator[tuple[int, Outcome, bool]]:
    """Try the tasks of a pack again and again.

    Args:
        agent: whose environment is the pack's.
        run: the name of the attempts' run.
        main: the run that says how much may be spent on each task.

    Yields: the task's position in the pack, an attempt's outcome, and whether it was the task's last.
    """
    at, first, own = 0, 0, (agent.name, run)
    best = getattr(pack.environment, "highest_reward", 1.0) - 1e-9

    async def tasks() -> AsyncIterator[Task]:
        while at < len(pack):
            yield pack[at]

    async for outcome in agent.run(tasks(), run=run):
        tried = range(first, outcome.position + 1)
        left = await agent.memory.read(partial(_left, main=main, at=at, own=own, tried=tried))
        succeeded = outcome.reward is not None and outcome.reward >= best
        over = succeeded or left <= 0
        yield at, outcome, over
        if over:
            at, first = at + 1, outcome.position + 1


def _left(conn: sqlite3.Connection, *, main: Named, at: int, own: Named, tried: range) -> int:
    """What the main run spent on a task that the attempts have not."""
    allowed, spent = _calls(conn, main, range(at, at + 1)), _calls(conn, own, tried)
    in_tokens = all(tokens is not None for tokens, _ in allowed)
    return _sum(conn, allowed, in_tokens) - _sum(conn, spent, in_tokens)


Call = tuple[int | None, int]
"""Tokens of its prompt and answer, and the row of its last message."""


def _calls(conn: sqlite3.Connection, run: Named, positions: range) -> list[Call]:
    return conn.execute(
        "SELECT k.prompt_tokens + k.sampled_tokens, coalesce(k.answer_id, k.prompt_id) FROM runs r "
        "JOIN episodes e ON e.run_id = r.id JOIN calls k ON k.episode_id = e.id "
        "WHERE r.agent = ? AND r.name = ? AND e.position >= ? AND e.position < ?",
        (*run, positions.start, positions.stop),
    ).fetchall()


def _sum(conn: sqlite3.Connection, calls: list[Call], in_tokens: bool) -> int:
    """In tokens, or else in characters of the messages as they are stored."""
    return sum(tokens if in_tokens and tokens is not None else _characters(conn, last) for tokens, last in calls)


def _characters(conn: sqlite3.Connection, last: int) -> int:
    return sum(len(body or "") for _, body, _ in conversation(conn, last))
