"""What a lane cost and what went wrong in it, by position in the pack; from the run database alone.

    memory = Memory.open("eval/runs.db")
    measures = measured(memory, "agent", ["frozen-lake:small/eval/1/0"])
    print(measures[0].calls, measures[0].malformed)

Rewards say how well a model did; these say why not, and for how much: answers the world did not understand, updates that
were refused, how long the notes grew, and the calls, tokens and time of it all.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cod_agent.environments.base import MALFORMED
from cod_agent.memory import Memory
from cod_agent.tasks import Feedback

_EPISODES = """
WITH lived AS (
  SELECT r.id, t.position, t.feedback FROM runs r JOIN tasks t ON t.run_id = r.id
  WHERE r.agent = ?1 AND r.name IN (SELECT value FROM json_each(?2)) AND t.state IN ('judged', 'updated', 'closed')
)
SELECT l.id, l.position, e.kind, e.state, e.reason, count(*),
  sum(CASE WHEN e.kind = 'solve' AND json_valid(l.feedback) THEN json_extract(l.feedback, '$.ending') = ?3 END),
  sum(length(coalesce(c.body, ''))), sum(e.finished - e.started)
FROM lived l JOIN episodes e ON e.run_id = l.id AND e.position = l.position JOIN contexts c ON c.id = e.context_id
GROUP BY l.id, l.position, e.kind, e.state, e.reason
"""
"""A lost reward is stored as NaN, which is no JSON: such a task was aborted, and is not malformed."""

_CALLS = """
WITH lived AS (
  SELECT r.id, t.position FROM runs r JOIN tasks t ON t.run_id = r.id
  WHERE r.agent = ?1 AND r.name IN (SELECT value FROM json_each(?2)) AND t.state IN ('judged', 'updated', 'closed')
)
SELECT l.id, l.position, count(*), count(k.prompt_tokens), sum(k.prompt_tokens), count(k.sampled_tokens), sum(k.sampled_tokens)
FROM lived l JOIN episodes e ON e.run_id = l.id AND e.position = l.position JOIN calls k ON k.episode_id = e.id
GROUP BY l.id, l.position
"""

_LOST = """
SELECT r.id, t.position, t.feedback FROM runs r JOIN tasks t ON t.run_id = r.id
WHERE r.agent = ?1 AND r.name IN (SELECT value FROM json_each(?2)) AND t.state IN ('judged', 'updated', 'closed')
  AND t.feedback IS NOT NULL AND NOT json_valid(t.feedback)
"""
"""Tasks whose reward is lost: NaN, see above."""

_TASKS = """
SELECT r.id, t.position, t.fingerprint FROM runs r JOIN tasks t ON t.run_id = r.id
WHERE r.agent = ?1 AND r.name IN (SELECT value FROM json_each(?2)) ORDER BY r.id, t.position
"""


@dataclass(frozen=True, slots=True)
class Measure:
    """One position of one lane. Means are per task that was lived there."""

    position: int
    tasks: int
    """Tasks that were lived, all runs together."""
    tries: int
    """Solve episodes: as many as tasks, and more where tasks were tried again."""
    malformed: int
    """Solve episodes that ended because the answer said nothing the world understands."""
    aborted: int
    """Solve episodes that were given up, their reward lost."""
    written: int
    """Updates that wrote a new context."""
    refused: int
    """Updates that were none; the last good context stayed."""
    reasons: dict[str, int] = field(hash=False)
    """Why updates were refused, and how often: `unparsable`, `empty`, `oversized`, `cut off`, ..."""
    shown: float
    """Length of the context that a solve episode was shown: mean, in characters."""
    calls: float
    """Model calls, solve and update together: mean."""
    prompt_tokens: float | None
    """As the server counts them: mean; None where any call was not counted."""
    sampled_tokens: float | None
    """As the server counts them: mean; None where any call was not counted."""
    seconds: float
    """From the beginning to the end of the task's episodes, waiting for others included: mean."""
    lost: dict[str, int] = field(default_factory=dict, hash=False)
    """Tasks whose reward is lost, by how they ended (`lost_by`)."""

    def json(self) -> dict[str, Any]:
        """As JSON, means to three digits."""
        return {
            "position": self.position,
            "tasks": self.tasks,
            "tries": self.tries,
            "malformed": self.malformed,
            "aborted": self.aborted,
            "lost": self.lost,
            "updates": {"written": self.written, "refused": self.refused, "reasons": self.reasons},
            "context_characters": round(self.shown, 3),
            "calls": round(self.calls, 3),
            "prompt_tokens": _rounded(self.prompt_tokens),
            "sampled_tokens": _rounded(self.sampled_tokens),
            "seconds": round(self.seconds, 3),
        }


@dataclass(slots=True)
class _Sums:
    """What is summed up at one position."""

    tasks: set[tuple[int, int]] = field(default_factory=set)
    tries: int = 0
    malformed: int = 0
    aborted: int = 0
    written: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    shown: int = 0
    seconds: float = 0.0
    lost: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    counted: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    """Of prompts and of answers: how many calls were counted, and what they sum up to."""

    def take(self, kind: str, state: str, reason: str, n: int, malformed: int, shown: int, seconds: float) -> None:
        """Count the episodes of one kind that ended in one way."""
        self.seconds += seconds
        if kind == "solve":
            self.tries += n
            self.malformed += malformed
            self.aborted += n if state == "aborted" else 0
            self.shown += shown
        elif state == "done":
            self.written += n
        elif state == "refused":
            self.reasons[reason.partition(":")[0]] += n

    def measure(self, position: int) -> Measure:
        tasks = len(self.tasks)
        tokens = [
            total / tasks if counted == self.calls > 0 else None
            for counted, total in zip(self.counted, self.tokens, strict=True)
        ]
        return Measure(
            position=position,
            tasks=tasks,
            tries=self.tries,
            malformed=self.malformed,
            aborted=self.aborted,
            written=self.written,
            refused=self.reasons.total(),
            reasons=dict(self.reasons.most_common()),
            shown=self.shown / self.tries,
            calls=self.calls / tasks,
            prompt_tokens=tokens[0],
            sampled_tokens=tokens[1],
            seconds=self.seconds / tasks,
            lost=dict(self.lost.most_common()),
        )


def measured(memory: Memory, agent: str, runs: Iterable[str], *, again: bool = False) -> tuple[Measure, ...]:
    """What the tasks of an agent's runs took, by position.

    Tasks that are not judged yet do not count, and a position where none was lived is left out.

    Args:
        agent: the lane's agent.
        runs: the names of its runs; those that the file does not know are passed over.
        again: tasks were tried again, each as often as there was room: the same one at neighbouring positions of a run is one task.
    """
    asked = (agent, json.dumps(list(runs)))

    def read(conn: sqlite3.Connection) -> tuple[list[Any], list[Any], list[Any], dict[tuple[int, int], int]]:
        episodes, calls, lost = (
            conn.execute(_EPISODES, (*asked, MALFORMED)).fetchall(),
            conn.execute(_CALLS, asked).fetchall(),
            conn.execute(_LOST, asked).fetchall(),
        )
        return episodes, calls, lost, _places(conn.execute(_TASKS, asked)) if again else {}

    episodes, calls, lost, places = memory.read_sync(read)
    found: dict[int, _Sums] = {}
    for run, at, kind, state, reason, n, malformed, shown, seconds in episodes:
        position = places.get((run, at), at)
        sums = found.setdefault(position, _Sums())
        sums.tasks.add((run, position))
        sums.take(kind, state, reason, n, malformed or 0, shown, seconds or 0.0)
    for run, at, n, prompts, prompt_tokens, samples, sampled_tokens in calls:
        sums = found[places.get((run, at), at)]
        sums.calls += n
        sums.counted = [sums.counted[0] + prompts, sums.counted[1] + samples]
        sums.tokens = [sums.tokens[0] + (prompt_tokens or 0), sums.tokens[1] + (sampled_tokens or 0)]
    for run, at, feedback in lost:
        found[places.get((run, at), at)].lost[lost_by(Feedback.model_validate_json(feedback))] += 1
    return tuple(sums.measure(position) for position, sums in sorted(found.items()))


def lost_by(feedback: Feedback | None) -> str:
    """How an episode whose reward is lost ended: the world's word for it, or `aborted` where it was given up."""
    return (feedback.ending if feedback else "") or "aborted"


def weights_of(memory: Memory, agent: str, runs: Iterable[str]) -> set[str]:
    """The weights that answered the calls of an agent's runs, as the calls name them."""
    query = (
        "SELECT DISTINCT k.weights FROM runs r JOIN episodes e ON e.run_id = r.id JOIN calls k ON k.episode_id = e.id "
        "WHERE r.agent = ? AND r.name IN (SELECT value FROM json_each(?))"
    )
    asked = (agent, json.dumps(list(runs)))
    return {row[0] for row in memory.read_sync(lambda conn: conn.execute(query, asked).fetchall())}


def _places(tasks: Iterable[tuple[int, int, str]]) -> dict[tuple[int, int], int]:
    """(run, position there) -> which of the run's tasks that is, where each may have been tried several times in a row."""
    places: dict[tuple[int, int], int] = {}
    before: tuple[int, str] | None = None
    number = 0
    for run, at, fingerprint in tasks:
        if before is None or before[0] != run:
            number = 0
        elif before[1] != fingerprint:
            number += 1
        places[run, at], before = number, (run, fingerprint)
    return places


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
