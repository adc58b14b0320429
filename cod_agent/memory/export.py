"""What agents lived, as plain objects that any program reads: an object an episode, or an object a model call.

    for episode in episodes("lake.db"):
        print(episode["run"], episode["position"], episode["kind"], episode["reward"])

One state of the file is read, an episode at a time, so that a file in use can be exported and a long life takes no more memory than its
longest episode (and a number for each version of a run). What is not there is None and never an empty text: `gone` beside it says that
it was "pruned" or "forgotten" ("unknown": nobody said so, and `cod verify` tells more), `lost` that a reward was lost to the
infrastructure. JSON has neither NaN nor infinities: they are None, too.
"""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cod_agent.errors import VerificationFailed
from cod_agent.memory import gone, history
from cod_agent.memory.content import TOKEN_COLUMNS, conversation, next_tokens
from cod_agent.memory.observations import unpack_observation
from cod_agent.memory.readonly import look

Object = dict[str, Any]
"""What JSON calls so."""

_RUNS = """
SELECT id, agent, name, environment, pack, model, coalesce(json_extract(settings, '$.purpose'), '') AS purpose FROM runs
WHERE (?1 IS NULL OR agent = ?1) AND (?2 IS NULL OR name = ?2) ORDER BY id
"""
_EPISODES = """
SELECT e.id, e.position, e.kind, e.state, e.reason, e.context_id, c.version, c.body AS context, t.id AS task_id, t.name, t.body,
  t.state AS task_state, t.answer, t.reward, t.feedback
FROM episodes e JOIN contexts c ON c.id = e.context_id JOIN tasks t ON t.run_id = e.run_id AND t.position = e.position
WHERE e.run_id = ? ORDER BY e.id
"""
_CALLS = f"""
SELECT {", ".join(f"c.{name}" for name in TOKEN_COLUMNS.split(", "))}, h.body AS head, c.head_id, c.style, c.prompt_id, c.answer_id,
  c.envelope IS NULL AS buried, c.finish_reason, c.model, c.weights, c.inexact, c.prompt_tokens, c.sampled_tokens
FROM calls c JOIN heads h ON h.id = c.head_id WHERE c.episode_id = ? ORDER BY c.id
"""
_RETURNS = """
SELECT CASE WHEN c.episode_id IS NULL AND p.held <> '' THEN p.id ELSE c.id END, avg(t.reward)
FROM episodes e JOIN tasks t ON t.run_id = e.run_id AND t.position = e.position JOIN contexts c ON c.id = e.context_id
  LEFT JOIN contexts p ON p.id = c.parent_id
WHERE e.run_id = ? AND e.kind = 'solve' GROUP BY 1
"""
"""By version: the mean reward of the tasks solved with it; with one that was held back and adopted later, under its first number."""


def episodes(
    path: str | Path, *, agent: str | None = None, run: str | None = None, tokens: bool = False
) -> Iterator[Object]:
    """The episodes of a run database, run by run, each run in the order it was lived; docs/memory.md describes the fields.

    Args:
        agent, run: only theirs.
        tokens: with the exact tokens of each call, where they are known.

    Raises:
        UnknownName: the file knows no such agent or run.
        VerificationFailed: a row is malformed.
        UsageError, NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
    """
    with look(path) as conn:
        lived = _rows(conn, _RUNS, agent, run).fetchall()
        if not lived:
            history.find(conn, agent, run)  # says what the file knows instead
        for row in lived:
            try:
                yield from _Run(conn, row, tokens).episodes()
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, zlib.error) as error:
                raise VerificationFailed(
                    f"run {row['name']!r} of agent {row['agent']!r} in {path} is malformed ({type(error).__name__}: {error}): "
                    "`cod verify` says where; restore a backup"
                ) from error


def chat(
    path: str | Path,
    skipped: Counter[str],
    *,
    agent: str | None = None,
    run: str | None = None,
    min_reward: float | None = None,
) -> Iterator[Object]:
    """The model calls of a run database as fine-tuning tools read them: `messages`, the answer last, `reward` and `meta`.

    The reward of a solve call is its task's; of an update call the mean of the tasks that were solved with what it wrote.

    Args:
        skipped: told how many calls were left out, by reason.
        min_reward: leave out solve calls of tasks with less, or with no reward.

    Raises:
        As `episodes`.
    """
    for episode in episodes(path, agent=agent, run=run):
        why = _unfit(episode, min_reward)
        for number, call in enumerate(episode["calls"]):
            if reason := why or _unfit_call(call):
                skipped[reason] += 1
            else:
                yield _spoken(episode, number, call)


class _Run:
    """Reads the episodes of one run."""

    def __init__(self, conn: sqlite3.Connection, run: sqlite3.Row, tokens: bool) -> None:
        self._conn, self._run, self._tokens = conn, run, tokens
        self._returns: dict[int, float | None] = dict(conn.execute(_RETURNS, (run["id"],)).fetchall())

    def episodes(self) -> Iterator[Object]:
        run = self._run
        pack = _read(run["pack"]) if run["pack"] else None
        said = {"agent": run["agent"], "run": run["name"], **({"purpose": run["purpose"]} if run["purpose"] else {})}
        for row in _rows(self._conn, _EPISODES, run["id"]):
            solve = row["kind"] == "solve"
            yield {
                **said,
                "position": row["position"],
                "kind": row["kind"],
                "state": row["state"],
                "reason": row["reason"] or None,
                "task": self._task(row),
                "environment": run["environment"],
                "pack": pack,
                "model": run["model"],
                "context": self._context(row["context_id"], row["version"], row["context"]),
                "calls": list(self._calls(row["id"])),
                "effects": list(self._effects(row["id"])),
                **(self._judged(row) if solve else {"update": self._update(row)}),
            }

    def _task(self, row: sqlite3.Row) -> Object:
        if row["body"] is None:
            return {"id": row["name"], "prompt": None, "data": None, **self._gone(row["task_id"], "task")}
        return dict(_read(row["body"]))

    def _context(self, row_id: int, version: int, text: str | None) -> Object:
        return {"version": version, "text": text, **(self._gone(row_id, "context") if text is None else {})}

    def _judged(self, row: sqlite3.Row) -> Object:
        """What came of a task, as far as it came."""
        state, answer, told = row["task_state"], row["answer"], row["feedback"]
        feedback = _read(told) if told is not None else {}
        buried = (answer is None and state != "open") or (told is None and state not in ("open", "solved"))
        reward = row["reward"]
        if reward is None:  # not known yet, or lost: of a closed task whose feedback is gone, only that can be
            reward = json.loads(told)["reward"] if told is not None else math.nan if state == "closed" else None
        return {
            "answer": (answer or None) if row["state"] == "aborted" else answer,
            "reward": _finite(reward),
            **({"lost": True} if reward is not None and not math.isfinite(reward) else {}),
            "feedback": feedback.get("text"),
            "ending": feedback.get("ending") or None,
            **(self._gone(row["task_id"], "task", "answer", "feedback") if buried else {}),
        }

    def _update(self, row: sqlite3.Row) -> Object:
        """What became of an update: `written`, `held`, `kept`, or None as long as that is open."""
        wrote = self._conn.execute(
            "SELECT id, version, body, held, decided FROM contexts WHERE episode_id = ?", (row["id"],)
        ).fetchone()
        if wrote is None:
            return {"became": "kept" if row["task_state"] == "updated" else None, "version": None, "text": None}
        row_id, version, body, held, decided = wrote
        why = {"why": held if body is not None else None, "decided": decided or None} if held else {}
        written = self._context(row_id, version, body)
        return {"became": "held" if held else "written", **written, **why, "return": _finite(self._returns.get(row_id))}

    def _calls(self, episode: int) -> Iterator[Object]:
        told: dict[int, list[int]] = {}
        for row in _rows(self._conn, _CALLS, episode):
            usage = {"prompt_tokens": row["prompt_tokens"], "sampled_tokens": row["sampled_tokens"]}
            yield {
                **self._said(row),
                "finish_reason": row["finish_reason"],
                "model": row["model"],
                "weights": row["weights"] or None,
                "usage": None if row["prompt_tokens"] is None else usage,
                "inexact": row["inexact"] or None,
                **({"tokens": _tokens(told, row)} if self._tokens else {}),
            }

    def _said(self, row: sqlite3.Row) -> Object:
        """Messages as they were sent, what else the request asked for, and the message that answered."""
        bodies = [body for _, body, _ in conversation(self._conn, row["answer_id"])]
        if row["buried"] or row["head"] is None or None in bodies:
            word = self._gone(row["id"], "call")
            return {"messages": None, "parameters": None, "answer": None, **word}
        asked: list[Any] | None
        *asked, answer = [_read(body) for body in bodies if body is not None]
        if row["prompt_id"] is None:  # it could not be taken apart, and is stored whole
            request = _whole(row["head"], row["style"])
            asked = request.pop("messages") if isinstance(request.get("messages"), list) else None
        else:
            request = _read(row["head"])
            del request["messages"]
        return {"messages": asked, "parameters": request, "answer": answer}

    def _effects(self, episode: int) -> Iterator[Object]:
        """Tool calls, and steps of the environment."""
        query = "SELECT id, call_id, kind, name, arguments, result FROM steps WHERE episode_id = ? ORDER BY id"
        for row in _rows(self._conn, query, episode):
            kind, arguments, result = row["kind"], row["arguments"], row["result"]
            buried = result is None or (arguments is None and kind != "observe")
            said = None if result is None else _read(result)
            if said is not None and kind != "tool":
                seen = unpack_observation(said)
                said = {"text": seen.text, "summary": seen.summary or None, "done": seen.done}
            word = self._gone(row["id"], "effect", "asked") if buried else {}
            if word.get("gone") == _UNKNOWN and row["call_id"]:  # a step takes its text from the call
                word = self._gone(row["call_id"], "call")
            known = None if arguments is None else _read(arguments)
            yield {"kind": kind, "name": row["name"] or None, "arguments": known, "result": said, **word}

    def _gone(self, row_id: int, *parts: str) -> Object:
        return {"gone": gone.word(self._conn, row_id, *parts) or _UNKNOWN}


_UNKNOWN = "unknown"


def _unfit(episode: Object, min_reward: float | None) -> str:
    """Why the calls of an episode are nothing to learn from; "" if they are."""
    if episode.get("purpose"):
        return "the run was lived to try a context, or to derive it again"
    if episode["kind"] == "update":
        update = episode["update"]
        adopted = update["became"] == "written" or update.get("decided") == "adopted"
        return "" if adopted else f"the update was {update['became'] or 'not finished'}"
    if min_reward is None:
        return ""
    if episode["reward"] is None:
        return "no reward is known"
    return "" if episode["reward"] >= min_reward else f"the reward is below {min_reward:g}"


def _unfit_call(call: Object) -> str:
    if "gone" in call:
        return f"the text is gone ({call['gone']})"
    if call["messages"] is None:
        return "the request is no conversation"
    return "the answer was cut off" if call["finish_reason"] == "length" else ""


def _spoken(episode: Object, number: int, call: Object) -> Object:
    tools = call["parameters"].get("tools")
    solve = episode["kind"] == "solve"
    meta = {name: episode[name] for name in ("agent", "run", "position", "kind", "environment")}
    return {
        "messages": [*call["messages"], call["answer"]],
        **({"tools": tools} if tools else {}),
        "reward": episode["reward"] if solve else episode["update"]["return"],
        "meta": {
            **meta,
            "task": episode["task"]["id"],
            "context": episode["context"]["version"],
            "call": number,
            **{name: call[name] for name in ("model", "weights", "finish_reason", "inexact")},
        },
    }


def _rows(conn: sqlite3.Connection, query: str, *values: Any) -> sqlite3.Cursor:
    cursor = conn.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(query, values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _read(text: str) -> Any:
    """JSON as it is stored, without the numbers that JSON does not have."""
    return json.loads(text, parse_constant=lambda _: None, parse_float=lambda digits: _finite(float(digits)))


def _whole(head: str, style: str) -> Object:
    """A request that is stored as it was sent; an empty one if it is no JSON object."""
    try:
        request = None if style == "bytes" else _read(head)
    except ValueError:
        return {}
    return request if isinstance(request, dict) else {}


def _tokens(told: dict[int, list[int]], row: sqlite3.Row) -> Object | None:
    """Ids and log-probabilities of a call; None if they were not all given, or pruned since."""
    exact = next_tokens(told, tuple(row)[: len(TOKEN_COLUMNS.split(", "))])
    if exact is None:
        return None
    prompt, sampled, logprobs = exact
    return {"prompt": prompt, "sampled": sampled, "logprobs": [_finite(value) for value in logprobs]}


__all__ = ["chat", "episodes"]
