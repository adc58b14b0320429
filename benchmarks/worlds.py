"""Whether every world holds: many packs drawn, and each lived by both of the world's players; nothing may fail, and memory has to pay.

    python benchmarks/worlds.py [--packs 10000] [--pack-size 4] [--seed 0] [--worlds frozen-lake:small,alchemy:paper] [--json FILE]

For each preset: lives that ended with an exception; reward at the last position of the memoryless and of the remembering player, and the
mean difference between them, pack by pack, each with its 95% interval; and milliseconds of CPU, median and 99th percentile, of a step
of the world, of an answer of the remembering player, and of drawing a pack with all its tasks. One core; the compact form.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cod_agent.environments import make_world
from cod_agent.environments.base import started
from cod_agent.environments.draws import randomness
from cod_agent.environments.named import WORLDS
from cod_agent.evaluation.players import CEILING, FLOOR, life
from cod_agent.evaluation.statistics import curve
from cod_agent.tasks import Observation, Task

COLUMNS = ("world", "failed", "memoryless", "perfect", "difference", "step", "answer", "pack")


class Watched:
    """An environment whose steps are timed."""

    def __init__(self, world: Any, seconds: list[float]) -> None:
        self.name, self.remembers = world.name, getattr(world, "remembers", False)
        self._world, self._seconds = world, seconds

    def start(self, task: Task, carried: Any = None) -> Any:
        session = started(self._world, task, carried)
        return _Watched(session, self._seconds)


class _Watched:
    def __init__(self, session: Any, seconds: list[float]) -> None:
        self._session, self._seconds = session, seconds

    def reset(self) -> Observation:
        return self._session.reset()

    def step(self, answer: str) -> Observation:
        before = time.thread_time()
        seen = self._session.step(answer)
        self._seconds.append(time.thread_time() - before)
        return seen


def timed(player: Callable[[Any], str], seconds: list[float]) -> Callable[[Any], str]:
    """The player, with the time of each of its answers noted."""

    def play(messages: Any) -> str:
        before = time.thread_time()
        answer = player(messages)
        seconds.append(time.thread_time() - before)
        return answer

    return play


def measure(name: str, packs: int, n: int, seed: int) -> dict[str, Any]:
    """What came of a preset."""
    world = make_world(name, seed=seed, form="compact")
    steps, answers, drawn = list[float](), list[float](), list[float]()
    rewards, failed = {player: np.full((packs, n), np.nan) for player in (FLOOR, CEILING)}, Counter[str]()
    watched = Watched(world, steps)
    for index in range(packs):
        before = time.thread_time()
        pack = world.pack(n, index)
        for task in pack:
            started(world, task).reset()
        drawn.append(time.thread_time() - before)
        for player, found in rewards.items():
            play = world.players[player](randomness("player", player, seed, pack.id))
            try:
                found[index] = life(watched, pack, timed(play, answers) if player == CEILING else play)
            except Exception as error:
                failed[f"{type(error).__name__}: {error}"] += 1
    last = {player: curve(found[:, -1:]).points[0] for player, found in rewards.items()}
    return {
        "world": world.name,
        "packs": packs,
        "pack_size": n,
        "seed": seed,
        "failed": failed.total(),
        "failures": dict(failed.most_common(3)),
        FLOOR: last[FLOOR].json(),
        CEILING: last[CEILING].json(),
        "difference": curve(rewards[CEILING][:, -1:] - rewards[FLOOR][:, -1:]).overall.json(),
        "ms": {"step": percentiles(steps), "answer": percentiles(answers), "pack": percentiles(drawn)},
        "steps": len(steps),
    }


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Median and 99th percentile, in milliseconds."""
    return [round(1000 * float(value), 3) for value in np.percentile(seconds, [50, 99])]


def row(found: dict[str, Any]) -> str:
    """A line of the table."""

    def said(point: dict[str, float]) -> str:
        return f"{point['mean']:.3f} [{point['low']:.3f}, {point['high']:.3f}]"

    times = [f"{median:.3f} / {most:.3f}" for median, most in found["ms"].values()]
    cells = [found["world"], f"{found['failed']:,}", *(said(found[name]) for name in COLUMNS[2:5]), *times]
    return f"| {' | '.join(cells)} |"


def default_worlds() -> list[str]:
    """Each world's default preset, and the published ones."""
    out = []
    for world, (_, _, default) in WORLDS.items():
        presets = type(make_world(world)).presets
        out += [f"{world}:{preset}" for preset in presets if preset == default or preset.startswith("paper")]
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=10_000)
    parser.add_argument("--pack-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worlds", help="commas between them (default: default presets and the published ones)")
    parser.add_argument("--json", type=Path, help="write what was found there, too")
    said = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)  # noqa: T201
    out = []
    for name in said.worlds.split(",") if said.worlds else default_worlds():
        out.append(measure(name, said.packs, said.pack_size, said.seed))
        print(row(out[-1]), flush=True)  # noqa: T201
        if said.json:
            said.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
