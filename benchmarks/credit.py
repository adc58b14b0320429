"""How long credit takes: `segment_credit` for a million segments, in each return style and baseline, and re-weighting.

    python benchmarks/credit.py [--segments 1000000] [--repeats 5]

Rollouts of packs of 4 (4 solve and 3 update segments each) in groups of 8; `one_life` is a single run of as many segments.
A twentieth of the rewards is lost. `reweight_batch` are 2,000 segments in 8 groups, a large training step. Prints one JSON object,
seconds of wall time, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from cod_train.credit import reweight, segment_credit

TARGET = 0.5
POSITIONS, RUNS = 4, 8


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    dice = np.random.default_rng(1)
    packs = -(-arguments.segments // (RUNS * (2 * POSITIONS - 1)))
    rewards = (dice.random((packs, RUNS, POSITIONS)) < 0.5).astype(float)
    rewards[dice.random(rewards.shape) < 0.05] = np.nan
    updates = np.where(dice.random((packs, RUNS, POSITIONS - 1)) < 0.1, -0.1, 0.0)
    life = dice.random((1, arguments.segments // 2 + 1))
    advantages, lengths, groups = dice.normal(-0.1, 0.5, 2000), dice.integers(1, 60, 2000), dice.integers(0, 8, 2000)

    works: dict[str, Callable[[], object]] = {
        "default": lambda: segment_credit(rewards, updates),
        "window": lambda: segment_credit(rewards, updates, returns="window", window=2),
        "discounted": lambda: segment_credit(rewards, updates, returns="discounted", gamma=0.9),
        "leave_one_out": lambda: segment_credit(rewards, updates, baseline="leave-one-out"),
        "position": lambda: segment_credit(rewards, updates, baseline="position"),
        "one_life": lambda: segment_credit(life, np.zeros_like(life[:, 1:]), baseline="position"),
        "reweight_batch": lambda: reweight(advantages, lengths, groups),
    }
    made = {name: seconds(work, arguments.repeats) for name, work in works.items()}
    json.dump({"segments": rewards.size + updates.size, **made, "aim": TARGET}, sys.stdout)
    print()  # noqa: T201


if __name__ == "__main__":
    main()
