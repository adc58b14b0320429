"""From rollouts to a training step: which rows there are, what each is worth, and in which order they are laid out.

A row is a sequence with a label: everything that credit needs to know of it, small and JSON, so that it can travel apart from
the tokens. Labels of all rows of a step give all advantages; where a row came from (a live rollout, a database, this
process, a cluster) is of no account here.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cod_agent.errors import UsageError
from cod_train import credit
from cod_train.rollouts import Rollout, sequences
from cod_train.rollouts import Sequence as TokenSequence

Floats = NDArray[np.float64]
NOTHING = 1e-9
"""An advantage nearer to zero is zero."""
NO_RETURN = "no finite reward in its return"
NO_OTHER = "no other to compare it with"
Label = Mapping[str, Any]
"""rollout, group, environment (names); kind, position; rewards, updates (lists, null where lost), heirs; tokens (trained ones)."""


@dataclass(frozen=True, slots=True)
class Credit:
    """How rewards become advantages; docs/credit.md says when to choose what."""

    kind: Literal["segment", "trajectory", "solve"] = "segment"
    returns: Literal["mean", "window", "discounted"] = "mean"
    window: int | None = None
    gamma: float | None = None
    baseline: Literal["group", "leave-one-out", "position"] = "group"
    own: Literal["element", "beside"] = "element"
    reweight: Literal["exact", "published"] | None = None
    reweight_by: Literal["batch", "environment", "group"] = "batch"

    def __post_init__(self) -> None:
        plain = Credit.__dataclass_fields__
        ignored = ("returns", "window", "gamma", "own") if self.kind == "trajectory" else ()
        if changed := [name for name in ignored if getattr(self, name) != plain[name].default]:
            raise UsageError(f"credit kind trajectory knows no {', '.join(changed)}: leave it out")


@dataclass(frozen=True, slots=True)
class Shaping:
    """What a reward is worth in training; reports show the reward itself."""

    length_penalty: float = 0.0
    """At most taken from a solved task's reward, in proportion to the calls it took."""
    longest: int = 0
    """Calls of a solve episode at which the whole penalty is due."""

    def __call__(self, reward: float, calls: int) -> float:
        if not self.length_penalty or not reward > 0:
            return reward
        return max(0.0, reward - self.length_penalty * min(1.0, calls / max(1, self.longest)))


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence and its label."""

    tokens: TokenSequence
    label: Label


@dataclass(slots=True)
class Report:
    """What credit made of a step."""

    rollouts: int = 0
    reward: dict[int, float] = field(default_factory=dict)
    """Mean reward by position, over the rollouts that have one there."""
    by_world: dict[str, dict[int, float]] = field(default_factory=dict)
    """The same of each world: rewards of different worlds need not be of one scale."""
    lost: int = 0
    """Tasks without a reward: lost by a judge or the infrastructure, or not lived."""
    refused_updates: float = 0.0
    """Share of the updates that were refused."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows that count nothing, by reason."""
    zero: int = 0
    """Rows whose advantage is zero."""
    alone: int = 0
    """Rollouts that are compared with those of other packs, for want of others in their group."""
    advantage_abs: float = 0.0
    """Mean size of the rows' advantages; of `Plan.worth` it would shrink with the tokens that are left out."""
    temperature: float = 0.0
    """Mean RED temperature of the groups that were re-weighted; 0 if none was."""


def rows_of(rollout: Rollout, *, merge: bool = True, shaping: Shaping = Shaping()) -> Iterator[Row]:  # noqa: B008
    """The rows of a rollout's segments that can train."""
    calls = {segment.position: len(segment.calls) for segment in rollout.segments if segment.kind == "solve"}
    shaped = [shaping(reward, calls.get(at, 0)) for at, reward in enumerate(rollout.rewards)]
    about = {
        "rollout": rollout.name,
        "group": rollout.group,
        "environment": rollout.environment,
        "rewards": [_plain(value) for value in shaped],
        "successes": [_plain(value) for value in rollout.rewards],
        "updates": [_plain(value) for value in rollout.update_rewards],
        "heirs": list(rollout.heirs),
    }
    for segment in rollout.segments:
        if segment.refused:
            continue
        for made in sequences(segment, merge=merge):
            place = {"kind": segment.kind, "position": segment.position, "tokens": sum(made.mask)}
            yield Row(made, {**about, **place})


def gathered(
    rollouts: Iterable[Rollout],
    *,
    merge: bool = True,
    shaping: Shaping = Shaping(),  # noqa: B008
) -> tuple[list[Row], Counter[str], Counter[str]]:
    """The rows of a step's rollouts; the rollouts that have none and the segments of the others that have none, by reason."""
    rows: list[Row] = []
    lost: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for rollout in rollouts:
        if made := list(rows_of(rollout, merge=merge, shaping=shaping)):
            rows += made
            refused.update(segment.refused for segment in rollout.segments if segment.refused)
        else:
            lost[why_none(rollout)] += 1
    return rows, lost, refused


def why_none(rollout: Rollout) -> str:
    """Why a rollout has no row."""
    return "; ".join(sorted({segment.refused for segment in rollout.segments if segment.refused})) or "it has no calls"


def advantages(labels: Sequence[Label | None], how: Credit) -> tuple[Floats, Report]:
    """The advantage of each row [rows] (None: padding, worth 0) and a report. A row without a return, or without another
    to compare it with, is worth 0 and counted as dropped.

    Raises:
        UsageError: `how` does not make sense.
    """
    out = np.zeros(len(labels))
    lives: dict[str, dict[str, Label]] = defaultdict(dict)
    for label in labels:
        if label is not None:
            lives[label["environment"]].setdefault(label["rollout"], label)
    report = _reported([label for of in lives.values() for label in of.values()])
    worth: dict[tuple[str, str, int], tuple[float, float]] = {}
    for of in lives.values():
        for groups, baseline in _pools(list(of.values()), how):
            worth |= _worth(groups, how, baseline)
            if baseline != how.baseline:
                report.alone += len(groups)
    for row, label in enumerate(labels):
        if label is not None:
            advantage, returned = worth[label["rollout"], label["kind"], label["position"]]
            if math.isnan(advantage):
                report.dropped[NO_RETURN if math.isnan(returned) else NO_OTHER] += 1
            else:
                out[row] = advantage
    out = _reweighted(out, labels, how, report)
    sizes = [abs(float(value)) for value, label in zip(out, labels, strict=True) if label is not None]
    report.zero = sum(size < NOTHING for size in sizes)
    report.advantage_abs = sum(sizes) / max(1, len(sizes))
    return out, report


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step's update is."""

    worth: Floats
    """[rows] the advantage of each row."""
    order: list[int | None]
    """As `layout` gives it, of the rows that are computed."""
    report: Report


def plan(
    labels: Sequence[Label],
    lengths: Sequence[tuple[int, int]],
    names: Sequence[Any],
    how: Credit,
    *,
    mini_batches: int,
    ranks: int,
    micro_batches: int,
    seed: int,
    skip: bool,
) -> Plan:
    """Credit and layout of a step's rows.

    Args:
        lengths, names, mini_batches, ranks, micro_batches, seed: as for `layout`.
        skip: leave rows worth nothing out of the computation, where the loss has no other part than advantages. The loss is a
            mean over tokens; the others' advantages shrink by the tokens left out, so that it stays the mean over all.
    """
    worth, report = advantages(labels, how)
    kept = [row for row, value in enumerate(worth) if abs(value) >= NOTHING]
    if not skip or not kept:
        kept = list(range(len(labels)))
    tokens = [label["tokens"] for label in labels]
    worth *= sum(tokens[row] for row in kept) / max(1, sum(tokens))
    order = layout(
        [lengths[row] for row in kept],
        [names[row] for row in kept],
        mini_batches=mini_batches,
        ranks=ranks,
        micro_batches=micro_batches,
        seed=seed,
    )
    return Plan(worth, [None if at is None else kept[at] for at in order], report)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _reported(lives: Sequence[Label]) -> Report:
    report = Report(rollouts=len(lives))
    worlds: dict[str, list[Label]] = defaultdict(list)
    for label in lives:
        worlds[label["environment"]].append(label)
    updates = [value for label in lives for value in label["updates"] if value is not None]
    report.reward = _means(lives)
    report.by_world = {world: _means(of) for world, of in sorted(worlds.items())}
    report.lost = sum(label["successes"].count(None) for label in lives)
    report.refused_updates = float(np.mean([value < 0 for value in updates])) if updates else 0.0
    return report


def _means(lives: Sequence[Label]) -> dict[int, float]:
    """Mean reward by position."""
    at: dict[int, list[float]] = defaultdict(list)
    for label in lives:
        for position, reward in enumerate(label["successes"]):
            if reward is not None:
                at[position].append(reward)
    return {position: float(np.mean(values)) for position, values in sorted(at.items())}


def _pools(lives: list[Label], how: Credit) -> Iterator[tuple[list[list[Label]], credit.Baseline]]:
    """Lives that are compared with one another, as groups, each pool with its baseline. Lives alone in their group, or without
    one, are compared with one another by position instead."""
    if how.baseline == "position":
        yield [[label] for label in lives], "position"
        return
    groups: dict[str, list[Label]] = defaultdict(list)
    for label in lives:
        groups[label["group"]].append(label)
    alone = groups.pop("", []) + [group[0] for group in groups.values() if len(group) == 1]
    together = [group for group in groups.values() if len(group) > 1]
    if together:
        yield together, how.baseline
    if alone:
        yield [[label] for label in alone], "position"


def _worth(
    groups: list[list[Label]], how: Credit, baseline: credit.Baseline
) -> dict[tuple[str, str, int], tuple[float, float]]:
    """(advantage, return) by rollout, kind and position."""
    most, longest = max(map(len, groups)), max(len(label["rewards"]) for group in groups for label in group)
    rewards = np.full((len(groups), most, longest), np.nan)
    updates = np.full((len(groups), most, max(0, longest - 1)), np.nan)
    heirs = np.full((len(groups), most, longest), longest)
    for p, group in enumerate(groups):
        for g, label in enumerate(group):
            rewards[p, g, : len(label["rewards"])] = _floats(label["rewards"])
            updates[p, g, : len(label["updates"])] = _floats(label["updates"])
            heirs[p, g, : len(label["heirs"])] = label["heirs"]
    if how.kind == "trajectory":
        made = credit.trajectory_credit(rewards, updates, baseline=baseline)
    else:
        credited = credit.segment_credit if how.kind == "segment" else credit.solve_only_credit
        made = credited(
            rewards,
            updates,
            returns=how.returns,
            window=how.window,
            gamma=how.gamma,
            baseline=baseline,
            own=how.own,
            heirs=heirs,
        )
    out: dict[tuple[str, str, int], tuple[float, float]] = {}
    parts = ("solve", made.solve, made.solve_returns), ("update", made.update, made.update_returns)
    for p, group in enumerate(groups):
        for g, label in enumerate(group):
            for kind, worth, returned in parts:
                for position in range(worth.shape[-1]):
                    out[label["rollout"], kind, position] = (
                        float(worth[p, g, position]),
                        float(returned[p, g, position]),
                    )
    return out


def _floats(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _reweighted(advantage: Floats, labels: Sequence[Label | None], how: Credit, report: Report) -> Floats:
    if how.reweight is None:
        return advantage
    lengths = np.array([0 if label is None else label["tokens"] for label in labels], float)
    groups = None
    if how.reweight_by != "batch":
        groups = np.array(["" if label is None else str(label[how.reweight_by]) for label in labels])
    temperatures = credit.temperatures(advantage, lengths, groups, method=how.reweight)
    finite = [value for value in temperatures.values() if math.isfinite(value)]
    report.temperature = float(np.mean(finite)) if finite else 0.0
    return np.asarray(credit.reweight(advantage, lengths, groups, method=how.reweight))


def layout(
    lengths: Sequence[tuple[int, int]],
    order: Sequence[Any],
    *,
    mini_batches: int,
    ranks: int,
    micro_batches: int,
    seed: int,
) -> list[int | None]:
    """Which row stands where: for each rank its mini-batches one after the other, each sorted by length; None is a padding row.

    Rows are dealt by length, so that every mini-batch is a random sample with the same profile of lengths and every rank has
    as much to do. What a mini-batch holds does not depend on the number of ranks, nor on the order in which rows arrived.

    Args:
        lengths: tokens of each row's prompt and of its response.
        order: a sortable, distinct name of each row; rows of one length are dealt in its order.
        mini_batches: optimizer steps.
        micro_batches: parts of a rank's mini-batch that are computed at once.
        seed: of the dealing, e.g. the step's number.

    Raises:
        UsageError: a number below 1.
    """
    if min(mini_batches, ranks, micro_batches) < 1:
        raise UsageError(
            f"mini_batches, ranks and micro_batches are at least 1, not {mini_batches}, {ranks}, {micro_batches}"
        )
    by_length = sorted(range(len(lengths)), key=lambda row: (sum(lengths[row]), order[row]))
    minis = _dealt(by_length, mini_batches, random.Random(seed))
    most = max(map(len, minis), default=0)
    quota = max(1, -(-most // (ranks * micro_batches))) * micro_batches
    # Back and forth, so that no rank gets all the longer ones of each round.
    hands = [
        [mini[rank :: 2 * ranks] + mini[2 * ranks - 1 - rank :: 2 * ranks] for mini in minis] for rank in range(ranks)
    ]
    for hand in hands:
        rows = [row for part in hand for row in part]
        alike = any(len({lengths[row][column] for row in rows}) == 1 for column in (0, 1))
        if alike and len(rows) == quota * mini_batches:
            # A column of one length becomes a plain tensor on the way, which verl does not take: a padding row makes it differ.
            quota += micro_batches
    out: list[list[int | None]] = [[] for _ in range(ranks)]
    for rank, hand in enumerate(hands):
        for part in hand:
            part.sort(key=lambda row: (sum(lengths[row]), order[row]))
            out[rank] += [*[None] * (quota - len(part)), *part]
    return [row for hand in out for row in hand]


def _dealt(rows: list[int], hands: int, dice: random.Random) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in range(hands)]
    for start in range(0, len(rows), hands):
        round_ = rows[start : start + hands]
        dice.shuffle(round_)
        # The last, short round goes to hands at random, too.
        for hand, row in zip(dice.sample(out, len(round_)), round_, strict=True):
            hand.append(row)
    return out
