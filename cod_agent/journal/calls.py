"""A finished model call as a row of `calls`: written, and read back as the answer it was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cod_agent.completions import Completion, Tokens
from cod_agent.journal.answers import Answer, restore_logprobs
from cod_agent.journal.requests import Request
from cod_agent.journal.tap import Tap
from cod_agent.memory import rows
from cod_agent.memory.content import (
    conversation,
    link,
    pack_floats,
    pack_ids,
    read_tokens,
    shared_prefix,
    store_child,
    store_head,
    store_nodes,
)
from cod_agent.memory.hashing import call_hash, checksum, compact

REDACTED = "redacted"
"""Why a call is inexact whose request or answer held a secret."""


@dataclass(frozen=True, slots=True)
class FinishedCall:
    """A call and its answer, to be stored."""

    request: Request
    answer: Answer
    started: float
    seconds: float
    on_policy: bool
    """Whether its log-probabilities are those of the distribution that was sampled."""
    lean: bool
    """Whether nobody will want the answer's body back as it was sent: see `Answer.envelope`."""
    before: tuple[int, Sequence[int]] | None
    """(row, its prompt and sampled ids) of the call whose tokens this prompt is stored relative to."""

    def store(self, conn: sqlite3.Connection, cache: dict[bytes, int], episode_id: int) -> int:
        """Inside a transaction: the new row's id."""
        request, completion = self.request, self.answer.completion
        parent = request.nodes[-1].hash if request.nodes else request.head_hash
        node = link(parent, compact(self.answer.message), f'[[{len(completion.text)},"model"]]')
        envelope = compact(self.answer.envelope(self.lean))
        prompt_id = store_nodes(conn, cache, request.nodes)
        prompt_tokens, sampled_tokens = completion.usage or (None, None)
        said = {
            "style": request.style,
            "finish_reason": completion.finish_reason,
            "weights": completion.weights,
            "inexact": completion.inexact,
            "on_policy": self.on_policy,
            "usage": (prompt_tokens, sampled_tokens),
        }
        tokens = self._tokens()
        exact = completion.tokens
        hashed = (exact.prompt, exact.sampled, tokens["logprobs"]) if exact else None
        row = {
            "episode_id": episode_id,
            "request": request.key,
            "occurrence": request.occurrence,
            "head_id": store_head(conn, cache, request.head_hash, request.head),
            "prompt_id": prompt_id,
            "style": request.style,
            "answer_id": store_child(conn, cache, prompt_id, node),
            "envelope": envelope,
            "envelope_crc": checksum(envelope),
            "finish_reason": completion.finish_reason,
            "model": str(request.params.get("model", "")),
            "weights": completion.weights,
            **tokens,
            "on_policy": int(self.on_policy),
            "inexact": completion.inexact,
            "prompt_tokens": prompt_tokens,
            "sampled_tokens": sampled_tokens,
            "hash": call_hash(request.key, request.occurrence, node.hash, said, hashed),
            "started": self.started,
            "seconds": self.seconds,
        }
        return rows.insert(conn, "calls", row)

    def _tokens(self) -> dict[str, Any]:
        exact = self.answer.completion.tokens
        if exact is None:
            return dict.fromkeys(("prompt_base_id", "prompt_shared", "prompt_ids", "sampled_ids", "logprobs"))
        prompt = list(exact.prompt)
        shared = shared_prefix(self.before[1], prompt) if self.before else 0
        return {
            "prompt_base_id": self.before[0] if self.before and shared else None,
            "prompt_shared": shared,
            "prompt_ids": pack_ids(prompt[shared:]),
            "sampled_ids": pack_ids(exact.sampled),
            "logprobs": pack_floats(exact.logprobs),
        }


def read_call(conn: sqlite3.Connection, row: dict[str, Any]) -> Answer:
    """The recorded answer of a call, from its row."""
    message = json.loads(conversation(conn, row["answer_id"])[-1][1] or "")
    exact = read_tokens(conn, row["id"])
    tokens = Tokens(*exact) if exact else None
    body = json.loads(row["envelope"])
    first = body["choices"][0]
    first["message"] = {**message, **first["message"]}
    if tokens is not None:
        body["prompt_token_ids"], first["token_ids"] = list(tokens.prompt), list(tokens.sampled)
        restore_logprobs(first, tokens.logprobs)
    content = message.get("content")
    usage = None if row["prompt_tokens"] is None else (row["prompt_tokens"], row["sampled_tokens"])
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    completion = Completion(text, row["finish_reason"], tokens, row["inexact"], row["weights"], usage)
    return Answer(body, completion)


def redacted(answer: Answer, tap: Tap, request: Request) -> Answer:
    """The answer with its texts redacted; where that changed it or its request, its tokens are no record of a policy and are dropped."""
    body = answer.body if _clean(answer, tap) else tap.value(answer.body)
    if body == answer.body:
        if not request.redacted:
            return answer
        body = {**body, "choices": [{**choice} for choice in body["choices"]]}
    body.pop("prompt_token_ids", None)
    for choice in body["choices"]:
        choice.pop("token_ids", None)
        choice.pop("logprobs", None)
    said, content = answer.completion, body["choices"][0]["message"].get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    return Answer(body, replace(said, text=text, weights=tap.text(said.weights), tokens=None, inexact=REDACTED))


def _clean(answer: Answer, tap: Tap) -> bool:
    """Whether there is certainly nothing to redact: told without a walk through the log-probabilities of every token."""
    first, *others = answer.body["choices"]
    entries = (first.get("logprobs") or {}).get("content") or ()
    spelt = "".join(str(entry.get("token", "")) for entry in entries if isinstance(entry, dict))
    rest = {name: value for name, value in first.items() if name not in ("token_ids", "logprobs")}
    said = {name: value for name, value in answer.body.items() if name not in ("choices", "prompt_token_ids")}
    return not (others or any(map(tap.suspects, (answer.completion.text, spelt, compact([said, rest])))))
