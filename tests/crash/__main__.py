"""End a life at every point there is: `make crash`. Says how many trials there were, what went wrong, and how long it took."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from crash import plans
from crash.killing import Jury, Trial
from crash.power import Cut


def main() -> int:
    ask = argparse.ArgumentParser(prog="python -m crash", description=__doc__)
    ask.add_argument("--every", type=int, default=1, help="take every n-th point only")
    ask.add_argument("--seed", type=int, default=1, help="for what is sampled")
    ask.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="processes")
    said = ask.parse_args()
    dice, every, wrong = Random(said.seed), said.every, 0
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        Jury(Path(folder), said.at_once) as jury,
    ):
        kinds = Counter(jury.kinds)
        print(f"{jury.points} points: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
        kills = plans.kills(jury.points, every)
        # In an order that makes what was tried when somebody stops it a sample of all.
        wrong += _judged(jury, "killed", [kill for first in range(8) for kill in kills[first::8]])
        wrong += _judged(jury, "killed, commits by a thread", plans.kills_of_threads(jury.points, 300 // every, dice))
        wrong += _judged(jury, "killed again while resuming", plans.kills_again(jury.points, 500 // every, dice))
        wrong += _judged(jury, "statements fail", plans.statements_fail(jury.points, 7 * every))
        wrong += _judged(jury, "writes and syncs fail", plans.writes_fail(kinds, 3 * every))
        operations = sum(kinds[kind] for kind in ("open", "write", "sync", "truncate", "delete"))
        wrong += _judged(jury, "power cut", plans.cuts(operations, 2000 // every, dice))
        wrong += _judged(jury, "power cut, durable=False", plans.cuts(operations, 500 // every, dice, durable=False))
    return 1 if wrong else 0


def _judged(jury: Jury, name: str, trials: Sequence[Trial | Cut]) -> int:
    """How many trials went wrong."""
    began, wrong, ended, doubts, lost = time.monotonic(), 0, Counter[str](), 0, 0
    for number, (trial, verdict) in enumerate(jury.judge(trials), 1):
        wrong += bool(verdict.wrong)
        ended.update(verdict.ended[:-1] or verdict.ended)
        doubts += verdict.doubts > 0
        lost += verdict.lost > 0
        if verdict.wrong:
            print(f"\n{trial}\n  {verdict}")
        if sys.stdout.isatty() or number % 500 == 0:
            print(
                f"\r{name}: {number}/{len(trials)}, {wrong} wrong", end="" if sys.stdout.isatty() else "\n", flush=True
            )
    how = ", ".join(f"{count} {what}" for what, count in sorted(ended.items()))
    also = f"; {doubts} left a tool in doubt" * bool(doubts) + f"; {lost} lost what was not synced" * bool(lost)
    print(f"\r{name}: {len(trials)} trials ({how}{also}), {wrong} wrong, {time.monotonic() - began:.0f} s", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
