"""What a teacher said, read out of run databases as chat, and written as samples in a student's tokens.

Supervised learning may write text as tokens anew (reinforcement learning may not: `cod_train.rollouts`). Every call becomes the
conversation the student would have been shown, under the student's own chat template, with the teacher's answer as the target up
to the token that ends it. A call whose prompt begins with everything before it, token for token, continues that sequence; a
template that rewrites its history (as those do that drop earlier reasoning) makes it a sequence of its own.

Nothing is left out silently: whatever cannot be learnt from is counted by reason.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cod_agent.errors import UsageError
from cod_agent.journal.calls import REDACTED
from cod_agent.memory.content import conversation
from cod_agent.memory.readonly import look
from cod_train.supervised import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["solve", "update"]
Wire = dict[str, Any]
"""A message as chat completion APIs take it."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One call, read as chat."""

    messages: list[Wire]
    answer: Wire
    template: Wire
    """What else the chat template was given: tools, and the request's `chat_template_kwargs`."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """The calls of one episode that can be learnt from."""

    kind: Kind
    calls: tuple[Spoken, ...]


# ---- out of the database ----

_EPISODES = """
SELECT e.id, e.kind, CASE WHEN EXISTS (
    SELECT 1 FROM contexts h WHERE h.run_id = e.run_id AND h.episode_id = e.id AND h.held <> '' AND h.decided <> 'adopted'
    ) THEN 'held back' ELSE e.state END, json_extract(r.settings, '$.purpose'), CASE e.kind WHEN 'solve' THEN t.reward ELSE (
    SELECT avg(n.reward) FROM contexts c JOIN episodes s ON s.context_id = c.id AND s.kind = 'solve'
    JOIN tasks n ON n.run_id = s.run_id AND n.position = s.position LEFT JOIN contexts p ON p.id = c.parent_id
    WHERE c.run_id = e.run_id AND (c.episode_id = e.id OR c.episode_id IS NULL AND p.held <> '' AND p.episode_id = e.id)) END
FROM episodes e JOIN runs r ON r.id = e.run_id JOIN tasks t ON t.run_id = e.run_id AND t.position = e.position ORDER BY e.id
"""
_CALLS = """
SELECT CASE WHEN c.envelope IS NOT NULL THEN h.body END, c.style, c.prompt_id, c.answer_id, c.finish_reason, c.inexact
FROM calls c JOIN heads h ON h.id = c.head_id WHERE c.episode_id = ? ORDER BY c.id
"""


def read_transcripts(
    databases: Sequence[str | Path],
    *,
    kinds: Sequence[Kind] = ("solve", "update"),
    min_reward: float | None = None,
) -> tuple[list[Transcript], Counter[str]]:
    """The finished episodes of all runs in `databases`, in order.

    Args:
        min_reward: leave out solve episodes with less, and update episodes whose context served tasks with less on average
            (rejection sampling); an episode without such a reward is left out too. None: keep all.

    Returns:
        The transcripts, and how many episodes or calls were left out for which reason.

    Raises:
        UsageError, StoreError: a file is missing or is no run database.
    """
    found: list[Transcript] = []
    left_out: Counter[str] = Counter()
    for path in databases:
        with look(path) as conn:
            for episode, kind, state, purpose, reward in conn.execute(_EPISODES).fetchall():
                if kind not in kinds:
                    continue
                if purpose:
                    left_out[f"{kind} episodes of runs lived for another purpose ({purpose})"] += 1
                elif state != "done":
                    left_out[f"{kind} episodes that are {state}"] += 1
                elif min_reward is not None and (reward is None or reward < min_reward):
                    left_out[f"{kind} episodes below the reward asked for"] += 1
                elif calls := tuple(_calls(conn, episode, left_out)):
                    found.append(Transcript(kind, calls))
    return found, left_out


def _calls(conn: sqlite3.Connection, episode: int, left_out: Counter[str]) -> Iterator[Spoken]:
    for head, style, prompt, answer, finish, inexact in conn.execute(_CALLS, (episode,)).fetchall():
        bodies = [body for _, body, _ in conversation(conn, answer)]
        if style in ("raw", "bytes") or prompt is None:
            left_out["calls that are not stored as a conversation"] += 1
        elif inexact == REDACTED:
            left_out["calls that a secret was taken out of"] += 1
        elif finish == "length":
            left_out["calls whose answer was cut off"] += 1
        elif head is None or None in bodies:
            left_out["calls whose text was pruned"] += 1
        else:
            *messages, said = (_readable(json.loads(str(body))) for body in bodies)
            request = json.loads(head)
            tools = {"tools": request["tools"]} if request.get("tools") else {}
            yield Spoken(messages, said, {**tools, **(request.get("chat_template_kwargs") or {})})


def _readable(message: Wire) -> Wire:
    """The message as chat templates expect it: text in one piece, arguments of tool calls as objects."""
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        message = {**message, "content": "\n".join(part["text"] for part in content)}
    if message.get("tool_calls"):
        message = {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
    return message


def _with_object(call: Wire) -> Wire:
    function = call.get("function") or {}
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return call  # garbled, as models do: the template shows it as it is
    return {**call, "function": {**function, "arguments": arguments}}


# ---- into tokens ----


class Chat:
    """A student's chat template and tokenizer.

    Args:
        ends: ids of the tokens that end an answer.

    Raises:
        UsageError: the tokenizer has no chat template, or no token that ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
        if not tokenizer.chat_template:
            raise UsageError(
                "the base has no chat template: choose one that was made for chat, or add chat_template.jinja"
            )
        if not ends:
            raise UsageError("the base has no token that ends an answer: set eos_token in its tokenizer_config.json")
        self._tokenizer, self._ends = tokenizer, ends

    def samples(self, transcript: Transcript, left_out: Counter[str]) -> list[Sample]:
        """A transcript as sequences, whose targets are the tokens the student should say."""
        sequences: list[Sample] = []
        for call in transcript.calls:
            tokens = self._tokens(call)
            if isinstance(tokens, str):
                left_out[tokens] += 1
                continue
            prompt, said = tokens
            if sequences and prompt[: len(sequences[-1].ids)] == sequences[-1].ids:
                sequences[-1].ids[:] = prompt
            else:
                sequences.append(Sample(prompt, []))
            last = sequences[-1]
            last.targets += [(len(prompt) - 1 + i, token, 1.0) for i, token in enumerate(said)]
            last.ids += said
        return sequences

    def _tokens(self, call: Spoken) -> tuple[list[int], list[int]] | str:
        """(prompt ids, ids of the answer with the token that ends it), or why there are none."""
        from jinja2 import TemplateError

        render: Callable[..., Any] = self._tokenizer.apply_chat_template
        try:
            asked = render(call.messages, tokenize=False, add_generation_prompt=True, **call.template)
            whole = render([*call.messages, call.answer], tokenize=False, **call.template)
        except (TemplateError, TypeError, ValueError) as error:
            return f"calls that the chat template refuses ({error})"
        if not whole.startswith(asked):
            return "calls whose answer does not follow its prompt under the chat template"
        prompt, both = self._encode(asked), self._encode(whole)
        # What is sampled follows the prompt's own tokens, even where text written in one go would share one across.
        said = both[len(prompt) :] if both[: len(prompt)] == prompt else self._encode(whole[len(asked) :])
        end = next((i for i, token in enumerate(said) if token in self._ends), None)
        return prompt, [*said, min(self._ends)] if end is None else said[: end + 1]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
