"""Run databases -> rollouts -> segments. Exact tokens only, and never a silent drop.

A recorded run and a rollout that was just lived are read by the same function, so that from here on nothing knows where
an episode came from. What cannot train stays in its rollout with the reason (`Segment.refused`), because its rewards still
count for others; an `Account` says how often each reason occurred and names a case of it. Needs neither torch nor verl.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from bisect import bisect, bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

from cod_agent.errors import UnknownName, UsageError, VerificationFailed
from cod_agent.memory.content import TOKEN_COLUMNS, next_tokens
from cod_agent.memory.gone import word
from cod_agent.memory.readonly import look
from cod_train.sequences import Call, Kind, Segment, Sequence, sequences

__all__ = ["Account", "Call", "Rollout", "Segment", "Sequence", "read_rollout", "read_rollouts", "sequences"]

UNFINISHED = "the episode was not finished"
ABORTED = "the episode was given up"
NO_CALLS = "the episode has no model calls"
NO_REWARD = "no reward is known, neither of this task nor of a later one"
NOTHING_AFTER = "nothing came after this update yet"
HELD = "the update's version was held back, and nobody adopted it"
PURPOSES = {
    "canary": "the run was lived to try a context out, not to learn from",
    "forget": "the run was lived to derive a context again, not to learn from",
}
"""Why a run cannot train, by what its settings give as its purpose."""
PRUNED = "the tokens were pruned"
FORGOTTEN = "the episode was forgotten"
EMPTY = "the answer has no tokens"
OFF_POLICY = "the log-probabilities are not those of the distribution that was sampled"
MISSPELT = "the tokens do not spell the recorded answer: they are of another tokenizer"


@dataclass(frozen=True, slots=True)
class Rollout:
    """A run, with everything credit needs of it. S is its number of positions."""

    name: str
    """Agent and run, with the file for recorded ones."""
    group: str
    """The same for rollouts whose rewards may be compared position by position; "" for an open-ended life."""
    environment: str
    rewards: tuple[float, ...]
    """S; NaN where lost, not judged, or not lived."""
    update_rewards: tuple[float, ...]
    """S-1: 0 for an accepted update, the negative penalty for a refused one, NaN where there was none, or its time ran out, or nothing
    came after it."""
    heirs: tuple[int, ...]
    """S: the first position whose solve began after the update of this one was settled; S if there is none."""
    segments: tuple[Segment, ...]
    """Solve before update, by position."""
    weights: frozenset[str]
    """Of all its calls."""


@dataclass(slots=True)
class Account:
    """What was read, and what of it cannot train and why."""

    rollouts: int = 0
    segments: int = 0
    usable: int = 0
    """Segments that can train."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By reason: how many segments, and where the first of them is."""

    def take(self, rollout: Rollout) -> None:
        """Count a rollout."""
        self.rollouts += 1
        for segment in rollout.segments:
            self.segments += 1
            if segment.refused:
                self.refuse(segment.refused, f"{rollout.name}, {segment.where}")
            else:
                self.usable += 1

    def refuse(self, reason: str, where: str, count: int = 1) -> None:
        """Count what cannot train."""
        before, example = self.refused.get(reason, (0, where))
        self.refused[reason] = (before + count, example)

    def merge(self, other: Account) -> None:
        """Add what another account counted."""
        self.rollouts += other.rollouts
        self.segments += other.segments
        self.usable += other.usable
        for reason, (count, where) in other.refused.items():
            self.refuse(reason, where, count)

    def __str__(self) -> str:
        lines = [f"{self.usable} of {self.segments} segments in {self.rollouts} rollouts can train"]
        for reason, (count, where) in sorted(self.refused.items(), key=lambda item: -item[1][0]):
            lines.append(f"  {count} cannot: {reason} ({where})")
        return "\n".join(lines)


Spell = Callable[[list[int]], str]


def read_rollouts(
    files: Iterable[str | Path],
    *,
    format_penalty: float = 0.1,
    spell: Spell | None = None,
    vocabulary: int | None = None,
) -> tuple[list[Rollout], Account]:
    """The runs of the files, as far as they can train, and the account of all.

    A run without a single segment that can train is counted and left out, so that a scripted player's rewards are nobody's
    baseline. One that was cut short trains as far as it came.

    Args:
        files: run databases, each read once; nothing is written to them.
        format_penalty: what a refused update costs.
        spell: decodes ids as the model that is trained does. Answers whose tokens spell something else are refused.
        vocabulary: how many ids that model knows; answers with others are refused.

    Raises:
        UsageError: there is no such file, or nothing in them can train; the message has the account.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
        VerificationFailed: a row is malformed.
    """
    rollouts: list[Rollout] = []
    account = Account()
    for file in {Path(file).resolve(): file for file in files}.values():
        with look(file) as conn:
            for (run_id,) in conn.execute("SELECT id FROM runs ORDER BY id").fetchall():
                rollout = read_rollout(
                    conn, run_id, format_penalty=format_penalty, file=str(file), spell=spell, vocabulary=vocabulary
                )
                account.take(rollout)
                if any(not segment.refused for segment in rollout.segments):
                    rollouts.append(rollout)
    if not rollouts:
        raise UsageError(
            f"nothing recorded there can train. {account}\nRecord with exact tokens, at temperature 1 without top-p or top-k: "
            "`--model embedded`, or `--exact` with a vLLM server (docs/models.md)"
        )
    return rollouts, account


def read_rollout(
    conn: sqlite3.Connection,
    run_id: int,
    *,
    format_penalty: float = 0.1,
    file: str = "",
    spell: Spell | None = None,
    vocabulary: int | None = None,
) -> Rollout:
    """One run of a run database, finished or not: a killed one is read as far as it came. Arguments as for `read_rollouts`.

    Raises:
        UnknownName: the file has no such run.
        VerificationFailed: a row is malformed.
    """
    try:
        return _Reader(conn, run_id, spell, vocabulary).rollout(file, format_penalty)
    except UsageError:
        raise
    except (ValueError, TypeError, LookupError, zlib.error) as error:
        raise VerificationFailed(
            f"run {run_id} of {file or 'the run database'} is malformed ({type(error).__name__}: {error}): "
            "`cod verify` says where; restore a backup"
        ) from error


_PARENTS = (
    "SELECT c.version, p.version FROM contexts c LEFT JOIN contexts p ON p.id = c.parent_id AND p.run_id = c.run_id"
    " WHERE c.run_id = ?"
)
_FORGOTTEN = (
    "SELECT t.position FROM tasks t JOIN tombstones s ON s.part IN ('task', 'answer') AND s.row_id = t.id"
    " JOIN commits k ON k.run_id = s.run_id AND k.seq = s.seq AND k.what = 'forgot' WHERE t.run_id = ?"
)
_WRITTEN = "SELECT e.position, c.version, c.held <> '' FROM contexts c JOIN episodes e ON e.id = c.episode_id WHERE c.run_id = ?"


@dataclass(frozen=True, slots=True)
class _Episode:
    id: int
    position: int
    kind: Kind
    state: str
    version: int
    """Of the context it started from."""


class _Reader:
    """What one run's rows say, a query each."""

    def __init__(self, conn: sqlite3.Connection, run_id: int, spell: Spell | None, vocabulary: int | None) -> None:
        self._conn, self._run_id, self._spell, self._vocabulary = conn, run_id, spell, vocabulary
        rows = self._all("SELECT agent, name, environment, pack, length, settings FROM runs WHERE id = ?")
        if not rows:
            raise UnknownName(f"the run database has no run {run_id}")
        self.agent, self.name, self.environment, self.pack, self.length, settings = rows[0]
        self.settings: dict[str, Any] = json.loads(settings)
        known = dict(self._all("SELECT position, reward FROM tasks WHERE run_id = ?"))
        self.size = self.length or max(known, default=-1) + 1
        self.forgotten = {position for (position,) in self._all(_FORGOTTEN)}
        known |= dict.fromkeys(self.forgotten)  # those rewards were earned with a context that is no more
        self.rewards = tuple(nan if known.get(k) is None else float(known[k]) for k in range(self.size))
        self.last = max((k for k in range(self.size) if not isnan(self.rewards[k])), default=-1)
        """The last position whose reward is known."""
        self.episodes = [
            _Episode(*row)
            for row in self._all(
                "SELECT e.id, e.position, e.kind, "
                # An update whose time ran out was refused, so that the last good context stays; the policy is not to blame.
                "iif(e.reason LIKE 'budget-seconds%', 'aborted', e.state), c.version FROM episodes e JOIN contexts c ON c.id = e.context_id"
                " WHERE e.run_id = ? ORDER BY e.position, e.kind"
            )
        ]
        self.held = set[int]()
        """Positions whose update wrote a version that was held back and not adopted."""
        self.parents: dict[int, int | None] = dict(self._all(_PARENTS))
        """Of each version, the one of this run that it was made from."""
        self.heirs = self._heirs()

    def _all(self, query: str) -> list[Any]:
        return self._conn.execute(query, (self._run_id,)).fetchall()

    def rollout(self, file: str, format_penalty: float) -> Rollout:
        settled = {e.position: 0.0 if e.state == "done" else -format_penalty for e in self._updates()}
        calls = self._calls()
        segments = tuple(self._segment(episode, calls.get(episode.id, [])) for episode in self.episodes)
        return Rollout(
            name=f"{file}:{self.agent}/{self.name}" if file else f"{self.agent}/{self.name}",
            group=self._group(),
            environment=self.environment or "",
            rewards=self.rewards,
            update_rewards=tuple(settled.get(k, nan) for k in range(self.size - 1)),
            heirs=self.heirs,
            segments=segments,
            weights=frozenset(row[-2] for rows in calls.values() for row in rows),
        )

    def _group(self) -> str:
        if not self.pack:
            return ""
        # Another length, updates that are held back, or none at all change what a position's later rewards amount to.
        alone = "" if self.settings.get("updates", True) else ", no updates"
        gate = self.settings.get("gate", "open")
        gated = "" if gate == "open" else f", gate {gate}"
        return f"{self.environment}: {json.loads(self.pack)['id']}, {self.length} tasks{alone}{gated}"

    def _updates(self) -> list[_Episode]:
        """Those that were settled and were followed by something that was judged."""
        return [
            e
            for e in self.episodes
            if e.kind == "update" and e.state not in ("live", "aborted") and self.heirs[e.position] <= self.last
        ]

    def _heirs(self) -> tuple[int, ...]:
        """From the ledger of commits: when each update was settled, and which solves began later.

        Solves begin one after the other, so that later ones have later rows, end later and start from later versions. A version that
        was held back has heirs from its adoption on; one that the run went back behind has none.
        """
        settled: dict[int, tuple[int, int]] = {}
        solved: dict[int, int] = {}
        standing = 0
        written = {row[0]: row[1:] for row in self._all(_WRITTEN)}
        of = {version: position for position, (version, _) in written.items()}
        ledger = self._all("SELECT seq, what, position, detail FROM commits WHERE run_id = ? ORDER BY seq")
        for seq, what, position, detail in ledger:
            if what == "updated" and written[position][1]:
                self.held.add(position)
                continue
            if what == "adopted":
                said = json.loads(detail)
                standing, (*run, version) = said["version"], said["of"]
                position = of.get(version) if run == [self.agent, self.name] else None
                if position not in self.held:
                    continue
                self.held.remove(position)
            elif what == "updated":
                standing = written[position][0]
            if what in ("updated", "kept", "adopted"):
                settled[position] = (seq, standing)
            elif what == "solved":
                solved[position] = seq
        solves = [e for e in self.episodes if e.kind == "solve"]
        rows, versions = [e.id for e in solves], [e.version for e in solves]
        ends = [solved.get(e.position, len(ledger)) for e in solves]
        heirs = [self.size] * self.size
        for update in self.episodes:
            if update.kind == "update" and update.position in settled:
                seq, version = settled[update.position]
                first = max(bisect(rows, update.id), bisect(ends, seq), bisect_left(versions, version))
                if first < len(solves) and self._descends(versions[first], version):
                    heirs[update.position] = first
        return tuple(heirs)

    def _descends(self, version: int, ancestor: int) -> bool:
        """Whether a version of the run was made from another one, or is that one."""
        above: int | None = version
        while above is not None and above > ancestor:
            above = self.parents[above]
        return above == ancestor

    def _calls(self) -> dict[int, list[Any]]:
        columns = ", ".join(f"c.{name}" for name in TOKEN_COLUMNS.split(", "))
        rows = self._all(
            f"SELECT c.episode_id, {columns}, c.on_policy, c.inexact, c.weights, c.answer_id FROM calls c"
            " JOIN episodes e ON e.id = c.episode_id WHERE e.run_id = ? ORDER BY c.id"
        )
        by_episode: dict[int, list[Any]] = {}
        for row in rows:
            by_episode.setdefault(row[0], []).append(row[1:])
        return by_episode

    def _segment(self, episode: _Episode, rows: list[Any]) -> Segment:
        kind, position, state = episode.kind, episode.position, episode.state
        where = f"{kind} at position {position}"
        calls: list[Call] = []
        refused = self._episode_refused(episode, rows)
        told: dict[int, list[int]] = {}
        for number, row in enumerate(rows if not refused else ()):
            call, refused = self._call(told, row)
            if refused == EMPTY and calls:  # no room was left for an answer: what was said until then trains
                refused = ""
                continue
            if call is None:
                where += f", call {number + 1} of {len(rows)}"
                break
            calls.append(call)
        if refused:
            return Segment(kind, position, state, (), refused, where)
        return Segment(kind, position, state, tuple(calls))

    def _episode_refused(self, episode: _Episode, rows: list[Any]) -> str:
        """Why an episode cannot train, whatever its calls are, or ""."""
        if purpose := self.settings.get("purpose"):
            return PURPOSES.get(purpose, f"the run was lived for another purpose ({purpose})")
        if episode.kind == "solve" and episode.position in self.forgotten:
            return FORGOTTEN
        if episode.state == "live":
            return UNFINISHED
        if episode.state == "aborted":
            return ABORTED
        if not rows:
            return NO_CALLS
        nothing_after = self.heirs[episode.position] > self.last
        if episode.kind == "update":
            return HELD if episode.position in self.held else NOTHING_AFTER if nothing_after else ""
        return NO_REWARD if nothing_after and isnan(self.rewards[episode.position]) else ""

    def _call(self, told: dict[int, list[int]], row: Any) -> tuple[Call | None, str]:
        """The call, or why it cannot train."""
        *tokens, on_policy, inexact, weights, answer_id = row
        if inexact:
            return None, f"the tokens are not exact: {inexact}"
        exact = next_tokens(told, tokens)
        if exact is None:
            return None, FORGOTTEN if word(self._conn, row[0], "call") == "forgotten" else PRUNED
        if not on_policy:
            return None, OFF_POLICY
        prompt, sampled, logprobs = exact
        if len(logprobs) != len(sampled):
            raise ValueError(f"call {row[0]} has {len(sampled)} sampled tokens and {len(logprobs)} log-probabilities")
        if not sampled:
            return None, EMPTY
        if self._vocabulary is not None and max(prompt + sampled) >= self._vocabulary:
            return None, MISSPELT
        if self._spell is not None and not self._spells(self._spell(sampled), answer_id):
            return None, MISSPELT
        return Call(prompt, sampled, logprobs, weights), ""

    def _spells(self, spelt: str, answer_id: int) -> bool:
        """Whether the recorded answer is part of what its tokens spell: servers take control tokens and thoughts out of it."""
        body = self._conn.execute("SELECT body FROM messages WHERE id = ?", (answer_id,)).fetchone()[0]
        content = json.loads(body).get("content") if body else None
        return content.strip() in spelt if isinstance(content, str) else True
