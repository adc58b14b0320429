"""What an update of the weights has to read: calls merged into sequences, against one sample per call.

    python benchmarks/merging.py [--packs 64] [--seed 0] [--policies embedded embedded-base]

A policy plays frozen-lake:small in the compact form, recorded as always. Then the same games are played once more in the
natural form, move by move and note by note: what differs is how the world and the prompts talk (rules, sentences, a map with
tabs). Answers of the natural form are the bare `<answer>3</answer>`: a model that thinks aloud has longer ones.

Tokens are the policy's own. Its vocabulary was made for the compact form and spells English nearly letter by letter, so the
natural form is counted a second time, as the words, numbers and marks that the tokenizers of large models cut text into
before anything else: about as many tokens as those have. Prints JSON; milliseconds are those of one rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Completion, Memory, Message, Tokens
from cod_agent.environments import FrozenLake
from cod_agent.environments.frozen_lake.world import parse_answer
from cod_agent.journal import record_completion
from cod_agent.models.embedded import GgufModel
from cod_agent.models.gguf import read_metadata
from cod_agent.models.spelling import Spelling
from cod_agent.policies import folder_of
from cod_train.rollouts import Rollout, Segment, read_rollouts, sequences

AIMS = {"compact": 2.0, "natural": 4.0}


CONTROL = re.compile(r"(<\|[a-z]+\|>)")
WORD = re.compile(r" ?[^\W\d_]+|\d| ?[^\w\s]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|_")
Encode = Callable[[str], list[int]]


def words(text: str) -> list[int]:
    """An id for each word, number and mark; control tokens are one each."""
    pieces = [[part] if CONTROL.fullmatch(part) else WORD.findall(part) for part in CONTROL.split(text)]
    return [zlib.crc32(word.encode()) >> 1 for part in pieces for word in part]


class Again:
    """A model that says what it is told to say, in tokens of one kind or another."""

    name, form = "again", "natural"

    def __init__(self, show: Callable[[list[Any]], str], encode: Encode, answers: list[str]) -> None:
        self._show, self._encode, self._answers = show, encode, iter(answers)

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1.0}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        text = next(self._answers)
        prompt, sampled = self._encode(self._show([said.wire() for said in messages])), self._encode(f"{text}<|end|>")
        return Completion(text, tokens=Tokens(prompt, sampled, [-1.0] * len(sampled)))


def play(file: Path, lake: FrozenLake, models: Sequence[Any]) -> list[Rollout]:
    """Live the first packs of a lake, one with each model."""
    memory = Memory.open(file, durable=False)

    async def live(index: int, model: Any) -> None:
        async with CoDAgent("a", model=model, memory=memory) as agent:
            async for _ in agent.run(lake.pack(4, index)):
                pass

    async def all_of_them() -> None:
        await asyncio.gather(*(live(index, model) for index, model in enumerate(models)))

    asyncio.run(all_of_them())
    memory.close()
    return sorted(read_rollouts([file])[0], key=lambda rollout: int(rollout.name.rpartition("/")[2]))


def retold(segment: Segment, spell: Spelling) -> list[str]:
    """The answers of a segment as the natural form takes them; what was malformed stays so."""
    said = [spell(call.sampled) for call in segment.calls]
    if segment.kind == "update":
        return said
    moves = [parse_answer(answer, "compact") for answer in said]
    return [f"<answer>{'?' if move is None else move}</answer>" for move in moves]


def measure(file: Path, rollouts: list[Rollout]) -> dict[str, Any]:
    """Rows and tokens of the rollouts, and how long it takes to read and to merge them."""
    segments = [segment for rollout in rollouts for segment in rollout.segments]
    found = {"all": fewer(segments)}
    for kind in ("solve", "update"):
        found[kind] = fewer([segment for segment in segments if segment.kind == kind])
    started = time.perf_counter()
    read_rollouts([file])
    read = time.perf_counter()
    for segment in segments:
        sequences(segment)
    seconds = {"read_ms": read - started, "merge_ms": time.perf_counter() - read}
    return {**found, **{name: round(1e3 * value / len(rollouts), 2) for name, value in seconds.items()}}


def fewer(segments: list[Segment]) -> dict[str, Any]:
    """Rows and tokens apart and merged."""
    apart = [made for segment in segments for made in sequences(segment, merge=False)]
    merged = [made for segment in segments for made in sequences(segment)]
    before, after = (sum(len(made.prompt) + len(made.response) for made in rows) for rows in (apart, merged))
    said = {"calls": len(apart), "rows": len(merged), "tokens_apart": before, "tokens": after}
    return {**said, "sampled": sum(sum(made.mask) for made in merged), "times_fewer": round(before / after, 2)}


def compare(policy: str, packs: int, seed: int, folder: Path) -> dict[str, Any]:
    """The compact games of a policy, and the same games in the natural form."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_of(policy), model_max_length=1_000_000)
    gguf = folder_of(policy) / "model.gguf"
    spell, model = Spelling(read_metadata(gguf)), GgufModel(gguf, form="compact")
    file = folder / f"{policy}.db"
    played = play(file, FrozenLake("small", seed, form="compact"), [model] * packs)
    model.close()
    answers = [[said for segment in rollout.segments for said in retold(segment, spell)] for rollout in played]
    found = {"compact": {**measure(file, played), "aim": AIMS["compact"]}}

    def show(messages: list[Any]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    kinds: dict[str, Encode] = {"natural": partial(tokenizer.encode, add_special_tokens=False), "natural, words": words}
    for name, encode in kinds.items():
        file = folder / f"{policy}-{name}.db"
        again = play(file, FrozenLake("small", seed), [Again(show, encode, said) for said in answers])
        if [one.rewards for one in again] != [one.rewards for one in played]:
            raise RuntimeError("the games did not go as they went before")
        found[name] = {**measure(file, again), "aim": AIMS["natural"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=["embedded", "embedded-base"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {policy: compare(policy, given.packs, given.seed, Path(folder)) for policy in given.policies}
    json.dump(found, sys.stdout, indent=1)
    print()  # noqa: T201


if __name__ == "__main__":
    main()
