"""A few lives out of many, to be read: the pack that gained most, one in the middle, the one that gained least.

Figures say how much; only the trajectories say what was noted and whether it was used. Everything is read from the run database,
and is shown as it was recorded, but for its length.
"""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cod_agent.errors import UnknownName
from cod_agent.evaluation.result import NO_CONTEXT
from cod_agent.memory import read, runs, versions

if TYPE_CHECKING:
    from cod_agent.evaluation.result import Arm
    from cod_agent.evaluation.statistics import Rewards

EDGE = 6
"""Of a long pack so many first and last tasks are shown."""


@dataclass(frozen=True, slots=True)
class Step:
    """What was answered, and what came back."""

    answer: str
    seen: str


@dataclass(frozen=True, slots=True)
class LivedTask:
    """One task as it was lived."""

    position: int
    prompt: str
    """The rules, where the world tells them."""
    context: str
    """As the solve episode was shown it."""
    first: str
    """The first observation."""
    steps: tuple[Step, ...]
    reward: float | None
    ending: str
    feedback: str
    update: str
    """written, held, kept or none."""
    reason: str
    """Why an update was refused, or why the task ended without an answer."""
    changes: tuple[tuple[str, str], ...]
    """The new context, line by line: (` `, `+` or `-`; the line); empty where none was written."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One pack as one arm lived it."""

    why: str
    """What it is an example of."""
    arm: str
    agent: str
    run: str
    tasks: tuple[LivedTask, ...]
    left_out: int
    """Tasks in the middle that are not among them."""
    beside: Sample | None = None
    """The same pack without context."""

    @property
    def rewards(self) -> tuple[float | None, ...]:
        return tuple(task.reward for task in self.tasks)


def chosen(rewards: Rewards) -> list[tuple[str, int]]:
    """(why, pack) for the packs to be shown: ordered by last reward minus first, then by the mean, the best, middle and worst.

    Args:
        rewards: shape [packs, positions]; packs with a lost reward are passed over.
    """
    whole = np.flatnonzero(np.isfinite(rewards).all(1)) if rewards.size else np.empty(0, int)
    gains, means = rewards[whole, -1] - rewards[whole, 0], rewards[whole].mean(1)
    # Of equal packs the first: least comes first, so they are ordered backwards where they are equal.
    order = [int(pack) for pack in whole[np.lexsort((-whole, means, gains))]]
    if not order:
        return []
    asked = (("gained most", order[-1]), ("lies in the middle", order[len(order) // 2]), ("gained least", order[0]))
    return [(why, pack) for at, (why, pack) in enumerate(asked) if pack not in [other for _, other in asked[:at]]]


def samples(conn: sqlite3.Connection, arms: Sequence[Arm]) -> tuple[Sample, ...]:
    """The packs to be shown, lived by the main arm, and without context where there is that arm.

    Args:
        conn: the run database.
        arms: of one evaluation; the first one is the main one.
    """
    main, bare = arms[0], next((arm for arm in arms if arm.name == NO_CONTEXT), None)
    found = []
    for why, pack in chosen(main.rewards):
        beside = sample(conn, bare, pack, why) if bare else None
        shown = sample(conn, main, pack, why, beside)
        if shown is not None:
            found.append(shown)
    return tuple(found)


def sample(conn: sqlite3.Connection, arm: Arm, pack: int, why: str, beside: Sample | None = None) -> Sample | None:
    """How an arm lived a pack, the first time if there were several; None where the file does not have it."""
    name = arm.runs[pack][0] if pack < len(arm.runs) and arm.runs[pack] else ""
    try:
        run = runs.find_run(conn, arm.agent, name)
    except UnknownName:
        return None
    known = list(range(runs.next_position(conn, run.id)))
    shown = known if len(known) <= 2 * EDGE else known[:EDGE] + known[-EDGE:]
    tasks = tuple(_lived(conn, run, position) for position in shown)
    return Sample(why, arm.name, arm.agent, name, tasks, len(known) - len(shown), beside)


def _lived(conn: sqlite3.Connection, run: runs.Run, at: int) -> LivedTask:
    known, outcome = read.position(conn, run, at), read.outcome(conn, run, at)
    before = versions.get(conn, known.context_id).body if known.context_id else ""
    seen = read.trajectory(conn, known.solve_id or 0, known)
    said = outcome.feedback
    return LivedTask(
        position=at,
        prompt=outcome.task.prompt,
        context=before,
        first=seen.first.text if seen.first else "",
        steps=tuple(Step(turn.answer.removeprefix("Answer: "), turn.observation.text) for turn in seen.turns),
        reward=outcome.reward,
        ending=said.ending if said else "",
        feedback=said.text if said else "",
        update=outcome.update,
        reason=outcome.reason,
        changes=changes(before, outcome.context) if outcome.update == "written" else (),
    )


def changes(before: str, after: str) -> tuple[tuple[str, str], ...]:
    """A context and what is new in it, line by line: (` `, `+` or `-`; the line)."""
    old, new = before.splitlines(), after.splitlines()
    told: list[tuple[str, str]] = []
    for what, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            told += [(" ", line) for line in old[a:b]]
        else:
            told += [("-", line) for line in old[a:b]] + [("+", line) for line in new[c:d]]
    return tuple(told)
