"""The rule of the promotion gate, from what was lived to a verdict: plain arithmetic on rewards and counts.

Each condition is a `Check` with its figure and its bound; a `Verdict` says what follows from them, as words and as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cod_agent.evaluation import AtLeast, Curve, at_least, curve
from cod_agent.evaluation.statistics import Rewards, width
from cod_train.gate_lives import Lived

MARGIN = 0.1
"""Reward that a position may lose, as far as the packs can tell; as much more as rewards reach further than from 0 to 1."""
REFUSED_MORE, REFUSED_MOST = 0.02, 0.05
"""Share of updates refused: so much more than the incumbent, and so many in all (an incumbent that has more may keep them)."""
COST = 1.5
"""Times the calls and the tokens that a task takes with the incumbent."""


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of a promotion."""

    name: str
    holds: bool
    figure: float
    bound: float
    said: str
    """Figure and bound, in words."""

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "figure": _finite(self.figure), "bound": _finite(self.bound)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found, and what follows."""

    candidate: str
    """Its weights' name."""
    incumbent: str | None
    why: str
    """What follows, in a sentence or two."""
    checks: tuple[Check, ...]
    setting: dict[str, Any]
    """What makes it repeatable: world, split, seed, packs, pack_size, form, max_tokens, margin, engine."""
    ours: Lived | None
    """What the candidate lived; None if it could not."""
    theirs: Lived | None
    """What the incumbent lived; None if there is none."""

    @property
    def promoted(self) -> bool:
        """Whether every condition holds."""
        return all(check.holds for check in self.checks)

    def json(self) -> dict[str, Any]:
        """One JSON object.

        `positions` is a list of {position, candidate, incumbent, difference}, of which `difference` has `low`, its one-sided lower end;
        `overall` is the same over all tasks. `rewards` are the packs by role: words such as 0111 where rewards are 0 and 1 (- for
        a lost one), lists otherwise. Databases are named relative to the verdict's folder.
        """
        roles = {"candidate": self.ours, "incumbent": self.theirs}
        by_role = {role: one for role, one in roles.items() if one is not None}
        curves = {role: curve(one.rewards) for role, one in by_role.items()}
        paired = _Paired.of(self.ours, self.theirs) if self.ours is not None and self.theirs is not None else None
        return {
            "candidate": self.candidate,
            "incumbent": self.incumbent,
            "promoted": self.promoted,
            "why": self.why,
            **self.setting,
            "positions": _rows(curves, paired),
            "overall": {
                **{role: found.overall.json() for role, found in curves.items()},
                "difference": paired.overall.json() if paired is not None else None,
            },
            "checks": [check.json() for check in self.checks],
            "played": {role: _counts(one) for role, one in by_role.items()},
            "rewards": {role: spelt(one.rewards) for role, one in by_role.items()},
            "databases": {role: one.database.name for role, one in by_role.items()},
        }


# ---- the conditions ----


def checks(candidate: Lived, incumbent: Lived | None, margin: float = MARGIN) -> tuple[Check, ...]:
    """The conditions, each with its figure and its bound; those that need no incumbent where there is none."""
    if incumbent is None:
        return (_updates(candidate, None), _exact(candidate, None), _whole(candidate))
    paired = _Paired.of(candidate, incumbent)
    return (
        _better(paired),
        _no_position_worse(paired, margin),
        _updates(candidate, incumbent),
        _exact(candidate, incumbent),
        *(_cost(what, candidate, incumbent) for what in ("calls", "tokens")),
        _whole(candidate),
    )


@dataclass(frozen=True, slots=True)
class _Paired:
    """Candidate minus incumbent, pack by pack."""

    overall: AtLeast
    positions: tuple[AtLeast, ...]
    width: float
    """How far apart rewards may be."""

    @classmethod
    def of(cls, candidate: Lived, incumbent: Lived) -> _Paired:
        differences, wide = candidate.rewards - incumbent.rewards, width(candidate.rewards, incumbent.rewards)
        each = tuple(at_least(column, wide) for column in differences.T)
        return cls(at_least(differences.mean(1), wide), each, wide)


def _better(paired: _Paired) -> Check:
    found = paired.overall
    said = f"{_signed(found.mean)} a task on average, at least {_signed(found.low)}; it has to be above 0"
    return Check("better", found.low > 0, found.low, 0.0, said)


def _no_position_worse(paired: _Paired, margin: float) -> Check:
    found, margin = paired.positions, margin * paired.width
    worst = min(range(len(found)), key=lambda at: found[at].low)
    low = found[worst].low
    holds = all(one.low > -margin for one in found)
    said = f"task {worst + 1}: {_signed(found[worst].mean)}, at least {_signed(low)}; it has to be above {_signed(-margin)}"
    return Check("no position worse", holds, low, -margin, said)


def _updates(candidate: Lived, incumbent: Lived | None) -> Check:
    bound = REFUSED_MOST
    if incumbent is not None:
        bound = min(max(REFUSED_MOST, incumbent.refused), incumbent.refused + REFUSED_MORE)
    updates = candidate.written + candidate.kept
    said = f"{candidate.kept} of {updates} refused ({candidate.refused:.1%}); at most {bound:.1%} may be"
    holds = candidate.kept <= max(1, bound * updates)  # a single one says nothing, however few there are
    return Check("updates parse", holds, candidate.refused, bound, said)


def _exact(candidate: Lived, incumbent: Lived | None) -> Check:
    share = candidate.inexact / max(1, candidate.calls)
    bound = incumbent.inexact / max(1, incumbent.calls) if incumbent is not None else 0.0
    said = (
        f"{candidate.inexact} of {candidate.calls} calls lack token ids or log-probabilities; at most {bound:.1%} may"
    )
    return Check("answers are exact", share <= bound, share, bound, said)


def _cost(what: str, candidate: Lived, incumbent: Lived) -> Check:
    ours, theirs = (getattr(one, what) / one.rewards.size for one in (candidate, incumbent))
    said = f"{ours:.1f} a task, the incumbent {theirs:.1f}; at most {COST:g} times as many"
    return Check(what, ours <= COST * theirs, ours, COST * theirs, said)


def _whole(candidate: Lived) -> Check:
    said = f"{candidate.lost} of {candidate.rewards.size} tasks have no reward"
    return Check("nothing is lost", not candidate.lost, float(candidate.lost), 0.0, said)


def unfit(trouble: str) -> Check:
    """The condition that a candidate fails which cannot be lived with at all."""
    return Check("can be lived with", False, float("nan"), float("nan"), trouble)


def why(ours: Lived | None, theirs: Lived | None, found: tuple[Check, ...]) -> str:
    """What follows from the conditions, in a sentence or two."""
    failed = "; ".join(f"not so: {check.name} ({check.said})" for check in found if not check.holds)
    if failed or ours is None:
        return f"rejected, {failed}"
    packs = len(ours.rewards)
    if theirs is None:
        return f"promoted as the first: there was nothing to compare it with. {packs} packs, mean reward {ours.rewards.mean():.3f}"
    gained = _Paired.of(ours, theirs).overall
    return (
        f"promoted: on {packs} packs a task brings {_signed(gained.mean)} more than with {theirs.weights}, at least "
        f"{_signed(gained.low)} with 95 % confidence"
    )


# ---- as JSON ----


def spelt(rewards: Rewards) -> str | list[list[float | None]]:
    """Rewards of 0 and 1 as a word for each pack, - where there is none; others as lists."""
    if np.isin(rewards[np.isfinite(rewards)], (0.0, 1.0)).all():
        return " ".join("".join("-" if value != value else str(int(value)) for value in row) for row in rewards)
    return [[_finite(value) for value in row] for row in rewards.tolist()]


def _rows(curves: dict[str, Curve], paired: _Paired | None) -> list[dict[str, Any]]:
    count = max((len(found.points) for found in curves.values()), default=0)
    return [
        {
            "position": at,
            **{role: found.points[at].json() for role, found in curves.items()},
            "difference": paired.positions[at].json() if paired is not None else None,
        }
        for at in range(count)
    ]


def _counts(one: Lived) -> dict[str, Any]:
    return {
        "weights": one.weights,
        "written": one.written,
        "kept": one.kept,
        "calls": one.calls,
        "tokens": one.tokens,
        "inexact": one.inexact,
        "lost": one.lost,
        "seconds": round(one.seconds, 1),
    }


def _finite(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _signed(value: float) -> str:
    return f"{value:+.3f}"


__all__ = ["COST", "MARGIN", "REFUSED_MORE", "REFUSED_MOST", "Check", "Verdict", "checks", "spelt", "unfit", "why"]
