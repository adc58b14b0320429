"""What a long conversation takes on disk, against its unique content.

    python benchmarks/storage.py [--turns 200] [--characters 650] [--inexact]

Unique content: the JSON of each distinct message once, 4 bytes for each sampled token id, 4 for each log-probability, and 4
for each prompt token that the prompt before it (with its answer) did not have. Stored: the pages of the database after the
conversation, less those of the same database before it, and the whole file with its schema. Messages are sentences of
300 to 1,000 characters from a fixed vocabulary, four characters to a token, as with large models. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Completion, Feedback, Memory, Message, Observation, Task, Tokens
from cod_agent.journal import record_completion
from cod_agent.memory.hashing import compact

TARGET = 1.5


class Talker:
    """A model that says sentences, with a token for every four characters."""

    name, form = "talker", "natural"

    def __init__(self, characters: int, exact: bool) -> None:
        self._random, self._characters, self._exact = random.Random(7), characters, exact
        self.prompt: list[int] = []
        self.content: set[str] = set()
        self.unique = 0

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1.0}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        text = sentences(self._random, self._characters)
        if "Write the new note" in messages[-1].content:
            text = f"<context>\n{text}\n</context>"
        said = [compact(m.wire()) for m in messages] + [compact({"role": "assistant", "content": text})]
        self.unique += sum(len(body.encode()) for body in set(said) - self.content)
        self.content |= set(said)
        if not self._exact:
            return Completion(text, inexact="asked for none", weights="talker-1")
        prompt, sampled = [t for m in messages for t in self._ids(m.content)], self._ids(text)
        shared = next(
            (i for i, (a, b) in enumerate(zip(self.prompt, prompt, strict=False)) if a != b),
            min(len(prompt), len(self.prompt)),
        )
        self.prompt = prompt + sampled
        self.unique += 4 * (len(prompt) - shared) + 8 * len(sampled)
        return Completion(
            text, tokens=Tokens(prompt, sampled, [-self._random.expovariate(1.5) for _ in sampled]), weights="talker-1"
        )

    def _ids(self, text: str) -> list[int]:
        pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
        return [int.from_bytes(piece.encode()[:4], "little") * 2654435761 % 151_643 for piece in pieces]


def sentences(source: random.Random, characters: int) -> str:
    length, words = source.randint(characters // 2, characters * 3 // 2), []
    while sum(map(len, words)) + len(words) < length:
        words.append("".join(source.choice("etaoinshrdlucm") for _ in range(source.randint(2, 9))))
    return " ".join(words)


class Parlour:
    """An environment that talks for a number of turns."""

    name = "parlour"

    def __init__(self, turns: int, characters: int) -> None:
        self._turns, self._characters, self._left, self._random = turns, characters, turns, random.Random(8)

    def start(self, task: Task) -> Parlour:
        return Parlour(self._turns, self._characters)

    def reset(self) -> Observation:
        return Observation(sentences(self._random, self._characters))

    def step(self, answer: str) -> Observation:
        self._left -= 1
        feedback = None if self._left else Feedback(reward=1.0)
        return Observation(sentences(self._random, self._characters), done=not self._left, feedback=feedback)


def size(path: Path) -> int:
    """Bytes of the pages in use."""
    with sqlite3.connect(path) as conn:
        conn.execute("VACUUM")
        return int(conn.execute("PRAGMA page_count").fetchone()[0] * conn.execute("PRAGMA page_size").fetchone()[0])


def by_table(path: Path) -> dict[str, int]:
    """Bytes by table and index, where this SQLite can tell."""
    with sqlite3.connect(path) as conn:
        try:
            return dict(
                conn.execute(
                    "SELECT name, sum(pgsize) AS bytes FROM dbstat GROUP BY name HAVING bytes > 8192 ORDER BY bytes DESC"
                )
            )
        except sqlite3.OperationalError:
            return {}


def measure(folder: Path, turns: int = 200, characters: int = 650, *, exact: bool = True) -> dict[str, Any]:
    """Live one conversation of that many turns and weigh it."""
    path = folder / "storage.db"
    Memory.open(path).close()
    empty, model = size(path), Talker(characters, exact)

    async def live() -> None:
        async with CoDAgent(
            "a", model=model, memory=path, environment=Parlour(turns, characters), updates=False
        ) as agent:
            async for _ in agent.run([Task(id="talk", prompt="Talk.")]):
                pass

    asyncio.run(live())
    whole = size(path)
    return {
        "turns": turns, "exact": exact, "unique_bytes": model.unique, "stored_bytes": whole - empty, "file_bytes": whole,
        "ratio": round((whole - empty) / model.unique, 3), "ratio_of_file": round(whole / model.unique, 3), "target": TARGET,
        "by_table": by_table(path),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--characters", type=int, default=650, help="mean length of a message")
    parser.add_argument("--inexact", action="store_true", help="an endpoint that gives no tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given.turns, given.characters, exact=not given.inexact)
    json.dump(result, sys.stdout, indent=1)
    print()  # noqa: T201


if __name__ == "__main__":
    main()
