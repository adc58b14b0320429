"""What an evaluation says, in sentences: the answer, where it stands between floor and ceiling, what each arm is for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cod_agent.evaluation.players import CEILING, FLOOR
from cod_agent.evaluation.result import AGAINST, MAIN, NO_CONTEXT

if TYPE_CHECKING:
    from cod_agent.evaluation.plan import Plan
    from cod_agent.evaluation.result import Evaluation, Study
    from cod_agent.evaluation.statistics import Curve, Interval

FLAT = 0.06
"""A difference of at most this is none that matters."""

MANY, FEW = 0.2, 64
"""A share of failures above this, and fewer packs than that, are said at the top."""

LONGEST = 2000
"""Characters of a text from elsewhere that are shown."""

_MEANINGS = {
    MAIN: "The model as it is meant to live: after each task it rewrites its context, and gets it with the next task.",
    NO_CONTEXT: "The same model, always with the empty context. What is above this line, the context did.",
    "frozen": "The context after task 1 is used to the end. What is above this line comes from learning on after the first task.",
    "foreign": "The context that the model wrote at this position in another pack. It helps as far as notes hold for every pack; what is "
    "above this line is knowledge of this pack.",
    "blank": "The model's own context with nothing left in its lines: as many, all empty. It shows what the mere presence of a note does.",
    "shuffled": "The model's own context with its lines in random order. It shows whether the order matters.",
    "history": "No context; the record of the earlier tasks stands in its place. It shows what rewriting is worth beside "
    "reading everything again.",
    "attempts": "No context, but each task is tried again for what the model spent on it with its context, solving and updating, "
    "and the best try counts. It shows what the same effort brings without memory.",
    "ralph-sample": "The first task of the pack again and again, with a context: learning one task by heart.",
    "ralph-full": "Each task of the pack again and again, with a context of its own; at each position the mean over the pack's tasks.",
    FLOOR: "The world's own player that plays each task well and remembers nothing: the floor.",
    CEILING: "The world's own player that notes everything it saw: the ceiling, as far as we could write one.",
}

_LABELS = {MAIN: "with context", NO_CONTEXT: "without context", FLOOR: "memoryless player", CEILING: "perfect player"}


def meaning(arm: str) -> str:
    """What an arm is for, in a sentence or two."""
    if arm.startswith(AGAINST):
        return "The other model on the same packs, with its own contexts."
    return _MEANINGS.get(arm, "A player of the world on the same packs.")


def label(arm: str) -> str:
    """An arm as figures name it."""
    return _LABELS.get(arm, arm)


def answer(found: Evaluation) -> str:
    """Whether the context helps at the last task, in one sentence with the figures it stands on."""
    last = found.main.points[-1]
    where = f"the last of {found.pack_size} tasks"
    bare = found.controls.get(NO_CONTEXT)
    if found.pack_size == 1:
        return f"Reward is {last} on the only task: where no task comes later, no context is read."
    if found.benefit is None or bare is None:
        gain = f"from {found.main.points[0]} on the first task to {last} on {where}"
        return f"Whether the context did it is not known, for there is no arm without it: reward went {gain}."
    worth, chances = found.benefit, f"{last} with it and {bare.points[-1]} without on {where}"
    if worth.mean != worth.mean:
        return "Nothing is known yet: no pack was lived to its last task both with its context and without."
    if worth.low > 0:
        return f"The context helps: reward is {chances}, a difference of {worth.signed}."
    if worth.high < 0:
        return f"The context hurts: reward is {chances}, a difference of {worth.signed}."
    if _flat(worth):
        return f"The context makes no difference that matters: reward is {chances}, a difference of {worth.signed}."
    more = "more packs would tell"
    return f"The data do not say whether the context helps: reward is {chances}; {worth.signed} may be chance, {more}."


def title(found: Evaluation) -> str:
    """A part of a study: its world, and how many tasks its packs have."""
    times = f"packs of {found.pack_size}" if found.packing == "cod" else f"{found.packing}, {found.pack_size} times"
    return f"{found.world} ({times})"


def seeds(found: Evaluation) -> str:
    """`seed 1`, or `seeds 1, 2`."""
    return f"seed{'s' if found.seeds[1:] else ''} {', '.join(map(str, found.seeds))}"


def answers(found: Sequence[Evaluation]) -> list[str]:
    """The answer of one part, or of all of them together, and what is to be known before believing it."""
    if len(found) == 1:
        (only,) = found
        compared = [only.comparison.sentence] if only.comparison else []
        return [answer(only), *filter(None, [standing(only)]), *compared, *doubts(only)]
    names: dict[str, list[str]] = {}
    for one in found:
        names.setdefault(verdict(one), []).append(title(one))
    unknown = names.pop("not compared", [])
    if not names:
        said = ["Whether the context helps is not known: no part shows a later task both with it and without"]
    else:
        said = [f"The context helps in {len(names.get('helps', ()))} of {len(found)} parts"]
    for kind, words in (("hurts", "it hurts"), ("no difference", "it makes no difference that matters")):
        said += [f"{words} in {_listed(names[kind])}"] if kind in names else []
    said += [f"for {_listed(names['not clear'])} the data do not say"] if "not clear" in names else []
    said += [f"in {_listed(unknown)} nothing was compared"] if names and unknown else []
    of_all = [doubt for doubt in doubts(found[0]) if all(doubt in doubts(one) for one in found)]
    more = [(one, [one.comparison.sentence] if one.comparison else []) for one in found]
    more += [(one, [doubt for doubt in doubts(one) if doubt not in of_all]) for one in found]
    return [
        "; ".join(said) + ".",
        *(f"{title(one)}: {sentence}" for one, sentences in more for sentence in sentences),
        *of_all,
    ]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def verdict(found: Evaluation) -> str:
    """The same in a word or two."""
    worth = found.benefit
    if worth is None or worth.mean != worth.mean or found.pack_size == 1:
        return "not compared"
    if worth.low > 0:
        return "helps"
    if worth.high < 0:
        return "hurts"
    return "no difference" if _flat(worth) else "not clear"


def _flat(worth: Interval) -> bool:
    """Whether a difference is surely none that matters."""
    return worth.low >= -FLAT and worth.high <= FLAT


def doubts(found: Evaluation) -> list[str]:
    """What a reader should know before believing any of it."""
    said, main = [], found.arms[0].measures
    tries, updates = sum(one.tries for one in main), sum(one.written + one.refused for one in main)
    malformed, refused = sum(one.malformed for one in main), sum(one.refused for one in main)
    if malformed > MANY * tries:
        share = f"{malformed / tries:.0%} of the answers said nothing that the world understands"
        said.append(f"{share}: where the model does not speak its language, contexts cannot show what they are worth.")
    if refused > MANY * updates:
        said.append(f"{refused / updates:.0%} of the updates were refused, and left the context as it was.")
    if found.main.lost:
        said.append(f"{found.main.lost:,} tasks were lost to the infrastructure, and are left out.")
    if found.packs < FEW:
        said.append(f"{found.packs} packs are few: the intervals are wide. Use 512 for a figure to quote.")
    return said


def standing(found: Evaluation) -> str:
    """Where the last task's reward is between the world's floor and ceiling; "" where there are none."""
    if found.floor is None or found.ceiling is None:
        return ""
    last, floor, ceiling = (_last(curve) for curve in (found.main, found.floor, found.ceiling))
    between = f"There a player that remembers nothing gets {floor:.2f}, and one that remembers everything {ceiling:.2f}"
    if not ceiling - floor > FLAT:
        return f"{between}: at this task memory hardly pays."
    if last < floor:
        return f"{between}: the model is below both."
    if last >= ceiling:
        return f"{between}: the model is as good as that."
    return f"{between}: the model has come {share(last, floor, ceiling):.0%} of the way."


def share(value: float, floor: float, ceiling: float) -> float:
    """Which part of the way from `floor` to `ceiling` a value has come."""
    return (value - floor) / (ceiling - floor)


def _last(curve: Curve) -> float:
    return curve.points[-1].mean


def commands(study: Study) -> list[str]:
    """What lives the study again, or goes on with it: one command, or one for each part where no single one says it all."""
    plans = study.plan
    worlds, sizes = (list(dict.fromkeys(getattr(plan, name) for plan in plans)) for name in ("world", "pack_size"))
    if [(plan.world, plan.pack_size) for plan in plans] == [(world, size) for world in worlds for size in sizes]:
        return [_command(plans[0], ",".join(worlds), ",".join(map(str, sizes)), study.database)]
    return [_command(plan, plan.world, str(plan.pack_size), study.database) for plan in plans]


def _command(plan: Plan, worlds: str, sizes: str, database: Path) -> str:
    # As it is kept: without credentials in an address.
    said = plan.settings()["plan"]
    said["seed"] = ",".join(map(str, plan.seeds))
    said["controls"] = ",".join(plan.controls) or "none"
    words = ["cod", "eval", worlds, "--model", plan.model, "--packs", str(plan.packs), "--pack-size", sizes]
    words += ["--seed", said["seed"], "--controls", said["controls"]]
    usual = {field.name: field.default for field in fields(plan)}
    for name in _FLAGS:
        if said[name] != usual[name]:
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if said[name] is True else [flag, f"{said[name]}"]
    where = ["--out", str(database.parent)]
    return shlex.join([*words, *where] if database.name == "runs.db" else [*words, *where, "--db", str(database)])


_FLAGS = (
    "repeats",
    "packing",
    "agent",
    "form",
    "temperature",
    "max_tokens",
    "base_url",
    "against",
    "against_base_url",
    "exact",
    "stream",
)
"""Of a plan, those that stand in a command only where they are not as usual."""

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def plain(text: str, limit: int = LONGEST) -> str:
    """Text from a model or a world as a page may hold it: at most `limit` characters, and none that a page cannot hold."""
    left = len(text) - limit
    shown = text if left <= 0 else f"{text[:limit]}\n... ({left:,} more characters)"
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", shown.replace("\r\n", "\n"))


def cut(text: str, longest: int) -> str:
    """On one line, and not longer than there is room."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
