"""What a checkpoint says to fixed conversations, so that whoever serves it can be compared with it.

A probe holds, for each of about sixteen short conversations, the checkpoint's own prompt ids, its greedy answer and that answer's raw
log-probabilities, computed by transformers in 32 bits. It lies beside the weights as `probe.json`. A server or a file is right if it
makes the same prompt ids and gives the same tokens the same log-probabilities:

    prompt ids differ          its chat template or tokenizer is another one
    the greedy token differs   two tokens were as likely (its own choice is as likely as ours was): that conversation ends there;
                               or it is not: these are other weights
    log-probabilities differ   by more than the tolerance: other weights, or weights that were rounded

One rule judges both kinds of server: no token may be off by more than the tolerance, nor all of them on average by more than a quarter
of it. In 32 bits engines agree within 1e-4, so `TOLERANCE` is generous. In 16 bits single tokens were measured up to .09 off
while the mean stays near .01: there (`TOLERANCE_16BIT`) the mean is what judges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.context import Message, message, prompts_for
from cod_agent.environments.base import Form
from cod_agent.errors import CodError, ModelRefused, UsageError
from cod_agent.models.base import Sampling
from cod_agent.models.openai import EXACT
from cod_train.exact_model import greedy, load_exactly

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "probe.json"
ANSWER_TOKENS = 24
TOLERANCE = 0.02
"""Nats a token of a 32-bit server may be off."""
TOLERANCE_16BIT = 0.2
"""Nats a token of a server in bfloat16 or float16 may be off; a quarter of it on average."""
FEWEST = 4
"""Conversations a probe needs to say anything."""

_CHAT = (
    ("Hello! Who are you?",),
    ("What is the capital of France?",),
    ("Count from 1 to 10.",),
    ("Write a short poem about the sea.",),
    ("Explain in one sentence why the sky is blue.",),
    ("Übersetze ins Englische: Guten Morgen, wie geht es dir?",),
    ("What is 17 + 25?", "It is 42.", "And twice that?"),
    ("Say yes or no: is ice cold?", "Yes.", "Why?"),
)
_NOTES = {
    "compact": "Left: Direction 3\nUp: Direction 1",
    "natural": "Direction 3 is left, direction 1 is up. The other two are not known yet.",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One conversation and its greedy answer."""

    messages: list[dict[str, str]]
    """As chat completion APIs take them."""
    prompt_ids: list[int]
    answer_ids: list[int]
    """The token that ends the turn included."""
    logprobs: list[float]
    """One for each answer id: natural, raw."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a checkpoint says."""

    items: list[Item]
    digest: str = ""
    """Of the checkpoint that said it."""

    def text(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write `probe.json` to a checkpoint's folder, whole or not at all.

        Raises:
            UsageError: the folder cannot be written.
        """
        part = folder / f".{FILE}.part"
        try:
            part.write_text(self.text())
            part.replace(folder / FILE)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UsageError(f"cannot write {folder / FILE}: {error.strerror or error}") from None

    @classmethod
    def load(cls, folder: Path) -> Probe:
        """The probe in a checkpoint's folder.

        Raises:
            UsageError: there is none, or it is damaged.
        """
        try:
            said = json.loads((folder / FILE).read_text())
            items = [Item(**item) for item in said["items"]]
            if len(items) < FEWEST or any(
                len(item.answer_ids) != len(item.logprobs) or not item.logprobs for item in items
            ):
                raise ValueError
        except FileNotFoundError:
            raise UsageError(f"{folder} has no {FILE}: `cod checkpoint add` makes it") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{folder / FILE} is damaged: remove it, `cod checkpoint add` makes it again") from None
        return cls(items, str(said.get("digest", "")))


@dataclass(frozen=True, slots=True)
class Answered:
    """What somebody else made of a probe's conversation."""

    prompt_ids: list[int]
    answer_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far somebody's answers are from a probe."""

    largest: float
    """Nats, of one token."""
    mean: float
    """Nats, over the tokens."""
    tokens: int
    """How many were compared."""
    trouble: str
    """Why it is not the probe's checkpoint; "" if it agrees."""


# ---- making one ----


def conversations() -> list[list[Message]]:
    """The fixed conversations: general chat, and first turns of FrozenLake in both forms, with and without a context."""
    roles = ("user", "assistant", "user")
    out = [
        [message(role, ("application", text)) for role, text in zip(roles, said, strict=False)]  # type: ignore[arg-type]
        for said in _CHAT
    ]
    forms: tuple[Form, ...] = ("compact", "natural")
    for form in forms:
        out += _lake(form)
    return out


def _lake(form: Form) -> list[list[Message]]:
    from cod_agent.environments.frozen_lake import FrozenLake

    lake = FrozenLake("small", 0, form=form)
    prompts = prompts_for(lake)
    first, second = lake.pack(2).tasks
    return [
        prompts.solve(task, context, lake.start(task).reset())
        for task in (first, second)
        for context in ("", _NOTES[form])
    ]


def make_probe(folder: Path, base: Path | None = None, *, digest: str = "") -> Probe:
    """Ask the checkpoint in `folder`, in 32 bits; on a GPU where there is one.

    Args:
        base: of an adapter; `folder` is then a PEFT folder.
        digest: of the checkpoint, to be kept in the probe.

    Raises:
        MissingExtra: torch or transformers is not installed.
        UsageError: it cannot be loaded, lacks weights, takes no such conversations, or answers with no numbers.
    """
    model, tokenizer = load_exactly(folder, base)
    import torch

    room = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30) - ANSWER_TOKENS
    items = []
    with torch.inference_mode():
        for said in conversations():
            wire = [one.wire() for one in said]
            try:
                prompt = _prompt_ids(tokenizer, wire)
            except ModelRefused:  # such as a template without a system turn
                continue
            if len(prompt) <= room:
                items.append(Item(wire, prompt, *greedy(model, prompt, ANSWER_TOKENS)))
    if len(items) < FEWEST:
        raise UsageError(
            f"the chat template of {folder} takes {len(items)} of the probe's conversations: {FEWEST} are needed"
        )
    if not all(map(math.isfinite, (value for item in items for value in item.logprobs))):
        raise UsageError(f"the model in {folder} gives log-probabilities that are no numbers: its weights are damaged")
    return Probe(items, digest)


def probe_of(folder: Path, base: Path | None, digest: str) -> Probe:
    """The probe in a checkpoint's folder; made, where there is none or it is of other weights.

    Raises:
        MissingExtra, UsageError: it cannot be made or written.
    """
    if (folder / FILE).is_file():
        probe = Probe.load(folder)
        if probe.digest == digest:
            return probe
    probe = make_probe(folder, base, digest=digest)
    probe.save(folder)
    return probe


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, wire: list[dict[str, Any]]) -> list[int]:
    from cod_train.prompts import PromptIds

    return PromptIds(tokenizer, remembered=1).ids(wire)


# ---- comparing with it ----


def compare(probe: Probe, answers: Sequence[Answered], tolerance: float = TOLERANCE) -> Comparison:
    """Judge answers to a probe's conversations, one for each, by the rule above."""
    off: list[float] = []
    for number, (item, got) in enumerate(zip(probe.items, answers, strict=True), 1):
        where = f"conversation {number} of {len(probe.items)}"
        if got.prompt_ids != item.prompt_ids:
            return _found(off, f"prompt ids differ in {where}: its chat template or tokenizer is another one")
        if not got.answer_ids or len(got.answer_ids) != len(got.logprobs):
            said = f"{len(got.answer_ids)} token ids and {len(got.logprobs)} log-probabilities"
            return _found(off, f"{where} was answered with {said}: exact answers are needed")
        if not all(map(math.isfinite, got.logprobs)):
            return _found(off, f"{where} was answered with log-probabilities that are no numbers")
        pairs = zip(item.answer_ids, item.logprobs, got.answer_ids, got.logprobs, strict=False)
        for place, (ours, logprob, theirs, served) in enumerate(pairs, 1):
            off.append(abs(served - logprob))
            if ours != theirs:
                if off[-1] > tolerance:
                    said = f"token {place} of {where} is {theirs} ({served:.3f} nats), not {ours} ({logprob:.3f})"
                    return _found(off, f"tokens differ: {said}")
                break  # as likely as ours: what follows is another text
        else:
            if len(item.answer_ids) != len(got.answer_ids):
                counts = f"{len(got.answer_ids)} tokens, not {len(item.answer_ids)}"
                return _found(off, f"tokens differ: the answer of {where} has {counts}")
    largest, mean = max(off), sum(off) / len(off)
    if largest > tolerance or mean > tolerance / 4:
        allowed = f"allowed are {tolerance:g} and {tolerance / 4:g}"
        return _found(
            off, f"log-probabilities are off by {largest:.3g} nats at most and {mean:.3g} on average ({allowed})"
        )
    return _found(off, "")


def _found(off: list[float], trouble: str) -> Comparison:
    return Comparison(max(off, default=math.nan), sum(off) / len(off) if off else math.nan, len(off), trouble)


async def compare_served(
    probe: Probe, base_url: str, model: str, *, tolerance: float = TOLERANCE, key: str = ""
) -> Comparison:
    """Ask an OpenAI-compatible server that gives token ids (vLLM, our own), one conversation after the other.

    Args:
        base_url: ends in /v1.
        model: the name it serves the checkpoint under.
        tolerance: `TOLERANCE_16BIT` where it computes in 16 bits.
        key: what the server asks for, if anything.

    Returns:
        A server that cannot be reached or says no is trouble, too, not an exception.
    """
    from cod_agent.journal.http import http_module
    from cod_train.serving.server import bearer

    http = http_module()
    answers: list[Answered] = []
    # Straight there, whatever proxy the environment names: what is compared stands on this machine.
    transport = http.AsyncHTTPTransport(verify=False)
    async with http.AsyncClient(transport=transport, timeout=120, headers=bearer(key)) as client:
        for item in probe.items:
            body = {"model": model, "messages": item.messages, "temperature": 0.0, "max_tokens": ANSWER_TOKENS, **EXACT}
            try:
                response = await client.post(f"{base_url.rstrip('/')}/chat/completions", json=body)
            except http.HTTPError as error:
                return _found([], f"{base_url} gave no answer: {error or type(error).__name__}")
            if response.status_code != 200:
                return _found([], f"{base_url} answered {response.status_code}: {response.text[:300]}")
            try:
                answers.append(_answered(response.json()))
            except (ValueError, KeyError, TypeError, IndexError):
                return _found(
                    [], f"{base_url} gives no token ids and log-probabilities: it is asked for {', '.join(EXACT)}"
                )
    return compare(probe, answers, tolerance)


def _answered(body: dict[str, Any]) -> Answered:
    choice = body["choices"][0]
    logprobs = [float(one["logprob"]) for one in choice["logprobs"]["content"]]
    return Answered([*body["prompt_token_ids"]], [*choice["token_ids"]], logprobs)


def compare_file(probe: Probe, gguf: Path, *, tolerance: float = TOLERANCE) -> Comparison:
    """Ask a GGUF file, through the embedded engine. Blocks; not to be called from a running event loop.

    Raises:
        MissingExtra, UsageError: as `GgufModel`.
    """
    import asyncio

    from cod_agent.models.embedded import GgufModel

    model = GgufModel(gguf, sampling=Sampling(temperature=0.0, max_tokens=ANSWER_TOKENS))

    async def ask() -> list[Answered]:
        out = []
        for item in probe.items:
            said = [message(one["role"], ("application", one["content"])) for one in item.messages]  # type: ignore[arg-type]
            completion = await model.complete(said)
            if completion.tokens is None:
                raise CodError(f"the file gives no exact tokens: {completion.inexact}")
            tokens = completion.tokens
            out.append(Answered([*tokens.prompt], [*tokens.sampled], [*tokens.logprobs]))
        return out

    try:
        return compare(probe, asyncio.run(ask()), tolerance)
    except CodError as error:
        return _found([], str(error))
    finally:
        model.close()


def separation(a: Probe, b: Probe) -> float:
    """How far `b` would seem off if it were served as `a`: nats, to be held against a tolerance.

    Below it, a served check cannot tell the two checkpoints apart. Infinite where they do not even share prompt ids.
    """
    if [item.messages for item in a.items] != [item.messages for item in b.items]:
        return math.inf
    answers = [Answered(item.prompt_ids, item.answer_ids, item.logprobs) for item in b.items]
    found = compare(a, answers, math.inf)
    return math.inf if found.trouble else max(found.largest, 4 * found.mean)


__all__ = [
    "ANSWER_TOKENS",
    "TOLERANCE",
    "TOLERANCE_16BIT",
    "Answered",
    "Comparison",
    "Item",
    "Probe",
    "compare",
    "compare_file",
    "compare_served",
    "conversations",
    "make_probe",
    "probe_of",
    "separation",
]
