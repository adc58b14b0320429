"""What the promotion gate sees, and what it takes for better: simulated candidates, judged by the gate's own rule.

    python benchmarks/gate.py [--samples 400] [--rounds 10]

Rewards are 0 or 1, packs of 4, positions independent of each other; the incumbent solves .50, .70, .80 and .85 of the tasks by position.
Three tables: how often a candidate that is better by some amount at every position is promoted; how often the position check alone
passes one that is no different; and what N rounds of candidates that are no better at all do to what serves. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cod_train.gate_lives import Lived
from cod_train.gate_rule import Check, checks

RATES = np.array([0.5, 0.7, 0.8, 0.85])
PACKS = (64, 128, 256, 512, 1024, 2048)
GAINS = (0.0, 0.02, 0.03, 0.05, 0.1)
MARGINS = (0.05, 0.1, 0.2)


def lived(dice: np.random.Generator, rates: np.ndarray, packs: int) -> Lived:
    """Packs of a policy that solves so many tasks by position, and does nothing else wrong."""
    rewards = (dice.random((packs, len(rates))) < rates).astype(float)
    return Lived("", rewards, 3 * packs, 0, 4 * packs, 80 * packs, 0, Path(), 0.0)


def judged(dice: np.random.Generator, gain: float, packs: int, margin: float = 0.1) -> dict[str, Check]:
    """The conditions of a candidate that gains so much everywhere."""
    found = checks(lived(dice, RATES + gain, packs), lived(dice, RATES, packs), margin)
    return {check.name: check for check in found}


def share(found: list[bool]) -> str:
    return f"{np.mean(found):.0%}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def power(dice: np.random.Generator, samples: int) -> str:
    rows = []
    for packs in PACKS:
        cells = []
        for gain in GAINS:
            found = [judged(dice, gain, packs) for _ in range(samples)]
            cells.append(share([all(check.holds for check in one.values()) for one in found]))
        rows.append([f"{packs:,}", *cells])
    return table(["packs", *(f"+{gain:.2f}" for gain in GAINS)], rows)


def margins(dice: np.random.Generator, samples: int) -> str:
    rows = []
    for packs in PACKS:
        cells = []
        for margin in MARGINS:
            passed = [judged(dice, 0.0, packs, margin)["no position worse"].holds for _ in range(samples)]
            cells.append(share(passed))
        rows.append([f"{packs:,}", *cells])
    return table(["packs", *(f"margin {margin:g}" for margin in MARGINS)], rows)


def rounds(dice: np.random.Generator, samples: int, count: int, packs: int = 512) -> str:
    """Candidates are as good as what serves plus a shift, and the luck of the training: a spread of .03, at all positions alike."""
    rows = []
    for shift in (0.0, -0.02, -0.05):
        promoted, drift = [], []
        for _ in range(samples):
            serves, times = 0.0, 0
            for _ in range(count):
                gain = serves + shift + dice.normal(0, 0.03)
                ours = lived(dice, np.clip(RATES + gain, 0, 1), packs)
                theirs = lived(dice, np.clip(RATES + serves, 0, 1), packs)
                if all(check.holds for check in checks(ours, theirs)):
                    serves, times = gain, times + 1
            promoted.append(times)
            drift.append(serves)
        ends = [f"{value:+.3f}" for value in np.quantile(drift, [0.05, 0.5, 0.95])]
        rows.append([f"{shift:+.2f}", f"{np.mean(promoted):.2f}", *ends])
    return table(["candidates are", "promotions", "5 %", "median", "95 %"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    dice = np.random.default_rng(1)
    parts = (
        "Promoted, by how much better the candidate is at every position:",
        power(dice, arguments.samples),
        "The position check passes a candidate that is no different:",
        margins(dice, arguments.samples),
        f"{arguments.rounds} rounds of 512 packs each: promotions, and reward gained or lost in all (of 100 loops the 5th, 50th and 95th)",
        rounds(dice, arguments.samples // 2, arguments.rounds),
    )
    print("\n\n".join(parts))  # noqa: T201


if __name__ == "__main__":
    main()
