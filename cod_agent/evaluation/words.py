"""What an evaluation says, in sentences: the answer, where it stands between floor and ceiling, what each arm is for."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cod_agent.evaluation.players import CEILING, FLOOR
from cod_agent.evaluation.result import AGAINST, MAIN, NO_CONTEXT, compared, count
from cod_agent.evaluation.statistics import Interval

if TYPE_CHECKING:
    from cod_agent.evaluation.plan import Plan
    from cod_agent.evaluation.result import Evaluation, Study
    from cod_agent.evaluation.statistics import Curve

FLAT = 0.06
"""A difference of at most this is none that matters, where rewards are between 0 and 1; where they reach further, so much more."""

MANY, FEW = 0.2, 64
"""A share of failures above this, and fewer packs than that, are said at the top."""

TOO_FEW = 16
"""With fewer packs than this, nothing is said of what makes no difference, or of how near the ceiling is."""

LONGEST = 2000
"""Characters of a text from elsewhere that are shown."""

LOWEST, HIGHEST = "floor", "ceiling"
"""How the figures of the world's players are named that stand beside every arm; an arm of such a player keeps its own name."""

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
    LOWEST: "The world's own player that plays each task well and remembers nothing: what there is without memory.",
    HIGHEST: "The world's own player that remembers everything it saw, as good a one as we could write: what memory brings.",
    FLOOR: "The player that remembers nothing as an arm of its own, with all that is recorded. It writes `null` every time.",
    CEILING: "The player that remembers everything as an arm of its own, with all that is recorded.",
}

_LABELS = {NO_CONTEXT: "without context", FLOOR: "memoryless player", CEILING: "perfect player"}


def meaning(arm: str) -> str:
    """What an arm is for, in a sentence or two."""
    if arm.startswith(AGAINST):
        return "The other model on the same packs: after each task it rewrites a context of its own."
    return _MEANINGS.get(arm, "A player of the world on the same packs.")


def label(arm: str, found: Evaluation | None = None) -> str:
    """An arm as figures name it; of two models each by its name."""
    name = short(arm, found)
    return _LABELS.get(name, name)


def short(arm: str, found: Evaluation | None = None) -> str:
    """The same as columns of a terminal name it."""
    if arm.startswith(AGAINST):
        other = arm.removeprefix(AGAINST)
        return f"{other} (other)" if found is not None and other == found.model else other
    return found.model if arm == MAIN and found is not None and found.rival is not None else arm


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
    if verdict(found) == UNMEASURED:
        return f"What the context is worth cannot be measured: {_deaf(found)}. Reward is {chances}."
    if worth.low > 0:
        return f"The context helps: reward is {chances}, a difference of {worth.signed}."
    if worth.high < 0:
        return f"The context hurts: reward is {chances}, a difference of {worth.signed}."
    if _flat(worth, found):
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
        if only.comparison is None:
            return [answer(only), *filter(None, [standing(only)]), *doubts(only)]
        with_and_without = [f"{only.model}: {answer(only)}"] if only.benefit is not None else []
        return [only.comparison.sentence, *with_and_without, *filter(None, [standing(only)]), *doubts(only)]
    whole = compared(found)
    first = [f"Over all {len(found)} parts: {whole.sentence}"] if whole else []
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
    said += [f"in {_listed(names[UNMEASURED])} it cannot be measured"] if UNMEASURED in names else []
    said += [f"in {_listed(unknown)} nothing was compared"] if names and unknown else []
    of_all = [doubt for doubt in doubts(found[0]) if all(doubt in doubts(one) for one in found)]
    more = [(one, [one.comparison.sentence] if one.comparison else []) for one in found]
    more += [(one, [doubt for doubt in doubts(one) if doubt not in of_all]) for one in found]
    if whole is None or names:
        first.append("; ".join(said) + ".")
    return [
        *first,
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
    if _deaf(found):
        return UNMEASURED
    return "no difference" if _flat(worth, found) else "not clear"


UNMEASURED = "cannot be measured"
"""The verdict on a context that nobody could read or write."""


def _deaf(found: Evaluation) -> str:
    """Why the context cannot show anything, or "": no answer was understood, or no update was accepted."""
    main = found.arms[0].measures
    if main and all(one.tries == one.malformed for one in main):
        return "the model does not speak this world's language, none of its answers said anything that the world understands"
    if sum(one.refused for one in main) and not any(one.written for one in main):
        return "the model does not write contexts as it is asked to, every update was refused"
    return ""


def _flat(worth: Interval, found: Evaluation) -> bool:
    """Whether a difference is surely none that matters."""
    return found.packs >= TOO_FEW and worth.low >= -FLAT * found.width and worth.high <= FLAT * found.width


def doubts(found: Evaluation) -> list[str]:
    """What a reader should know before believing any of it."""
    said, main = [], found.arms[0].measures
    tries, updates = sum(one.tries for one in main), sum(one.written + one.refused for one in main)
    malformed, refused = sum(one.malformed for one in main), sum(one.refused for one in main)
    if verdict(found) == UNMEASURED:
        tries = updates = malformed = refused = 0  # is the answer already
    if malformed > MANY * tries:
        share = f"{malformed / tries:.0%} of the answers said nothing that the world understands"
        said.append(f"{share}: where the model does not speak its language, contexts cannot show what they are worth.")
    if refused > MANY * updates:
        said.append(f"{refused / updates:.0%} of the updates were refused, and left the context as it was.")
    if found.held:
        said.append(
            f"{found.held:,} updates were held back by the write gate: no task was solved with what they wrote."
        )
    if len(found.weights) > 1:
        names = ", ".join(cut(name or "unknown", 40) for name in found.weights)
        said.append(
            f"{len(found.weights)} weights answered as {found.model} ({names}): these are figures of no one model."
        )
    if lost := sum((Counter(one.lost) for one in main), Counter()):
        said.append(losses(lost, sum(one.tasks for one in main)))
    elif found.main.lost:
        said.append(f"{found.main.lost:,} tasks were lost to the infrastructure, and are left out.")
    if found.packs == 1:
        said.append("One pack says next to nothing. Use 512 for a figure to quote.")
    elif found.packs < FEW:
        said.append(f"{found.packs} packs are few: the intervals are wide. Use 512 for a figure to quote.")
    return said


def losses(lost: Mapping[str, int], tasks: int) -> str:
    """How many rewards of so many tasks are lost, and how those tasks ended."""
    total, ways = sum(lost.values()), Counter(lost).most_common()
    said = ", ".join(f"{times:,} {cut(how, 40)}" for how, times in ways)
    of_all = f"{total:,} of {count(tasks, 'reward')} {'is' if total == 1 else 'are'} lost, and left out"
    return f"{of_all}: {said}. Each task's feedback says why."


def standing(found: Evaluation) -> str:
    """Where the last task's reward is between the world's floor and ceiling; "" where there are none."""
    if found.floor is None or found.ceiling is None:
        return ""
    last, floor, ceiling = (_last(curve) for curve in (found.main, found.floor, found.ceiling))
    between = f"On task {found.pack_size} floor (remembers nothing) gets {floor:.2f}, and ceiling (remembers everything) {ceiling:.2f}"
    if found.packs < TOO_FEW:
        return f"{between}: {count(found.packs, 'pack')} are too few to say where between them the model is."
    there = _between(found.floor.points[-1], found.ceiling.points[-1])
    if there.high <= FLAT * found.width:
        return f"{between}: memory hardly pays there."
    if not there.low > 0:
        return f"{between}: too few packs to say what memory pays there."
    who = found.model if found.rival else "the model"
    if last < floor:
        return f"{between}: {who}, at {last:.2f}, is below both."
    if last >= ceiling:
        return f"{between}: {who}, at {last:.2f}, is as good as the ceiling."
    return f"{between}: {who}, at {last:.2f}, has come {share(last, floor, ceiling):.0%} of the way."


def _between(floor: Interval, ceiling: Interval) -> Interval:
    """How far the ceiling is above the floor. Both intervals count, as if of different packs: a little too wide."""
    mean = ceiling.mean - floor.mean
    low = mean - math.hypot(ceiling.mean - ceiling.low, floor.high - floor.mean)
    return Interval(mean, low, mean + math.hypot(ceiling.high - ceiling.mean, floor.mean - floor.low))


def by_chance(differences: int) -> str:
    """How often one of so many intervals of 95% excludes zero where nothing is different, were they independent."""
    many = "1 difference" if differences == 1 else f"{differences} differences"
    often = round(1 / (1 - 0.95 ** max(1, differences)))
    return f"With {many}, expect about one evaluation in {often} to show one that excludes zero by chance alone"


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
    "gate",
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
    """On one line, and not longer than there is room. Both ends stay: names of two models often begin alike."""
    line = plain(" ".join(text.split()))
    end = (longest - 3) // 2
    return line if len(line) <= longest else f"{line[: longest - 3 - end]}...{line[len(line) - end :]}"
