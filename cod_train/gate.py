"""The promotion gate: a candidate is put in front of living agents only if it is better than what serves, and worse at nothing.

    verdict = await compare(candidate, incumbent, world="frozen-lake:small", seed=registry.fresh_seed(), folder=Path("gates/1"))
    kept = await decide(registry, "round-3", world="frozen-lake:small", folder=Path("gates/round-3"))   # and carried out

Both live the same held-out packs, which nobody has lived before: the seed is a new one for every verdict. Pack by pack the
candidate's reward minus the incumbent's is one independent number, so that the luck of the packs falls out of the comparison. Promoted
is who passes every check:

    better              of the paired difference in mean reward, the lower end (one-sided, 95 %) is above zero
    no position worse   of the paired difference at each position, the lower end is above -MARGIN
    updates parse       at most REFUSED_MORE more of the updates are refused than of the incumbent's, and at most REFUSED_MOST
    answers are exact   no larger share of the calls lacks what training needs than of the incumbent's (of a first one: none)
    calls, tokens       a task takes at most COST times as many of each as with the incumbent
    nothing is lost     every task has a reward

docs/promotion.md says why. The incumbent lives first: what it has just done on this machine and the candidate cannot is the
candidate's fault, and a rejection; all other trouble is an error, and decides nothing.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.environments import make_world
from cod_agent.environments.base import Form
from cod_agent.errors import UsageError
from cod_agent.evaluation import Plan, Watch
from cod_train.checkpoint_files import check_like, form_of
from cod_train.gate_lives import Lived, Undecided, Unfit, check_there, in_process, live, longest_answer
from cod_train.gate_rule import MARGIN, Check, Verdict, checks, unfit, why

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint, KeptVerdict, Registry
    from cod_train.serving import Engine

PACKS, PACK_SIZE = 512, 4
FEWEST = 8
"""Packs of which a verdict can be made at all; so few show only the largest differences."""
CONCURRENCY = 64
"""Packs lived at once."""
_NOTE = "gate.json"


# ---- living the packs ----


async def compare(
    candidate: Checkpoint,
    incumbent: Checkpoint | None,
    *,
    world: str,
    seed: int,
    folder: Path,
    packs: int = PACKS,
    pack_size: int = PACK_SIZE,
    margin: float = MARGIN,
    engine: Engine | None = None,
    form: Form | None = None,
    max_tokens: int | None = None,
    watch: Watch | None = None,
) -> Verdict:
    """Have both live the same packs of the eval split, and judge.

    Args:
        incumbent: None for the first of a registry, of which only what needs no comparison is asked.
        seed: which packs; one that no verdict had before.
        folder: where run databases and logs go; a verdict's own. The same call on the same folder lives only what is missing.
        margin: reward that a position may lose, as part of how far rewards reach (of 1 where they are between 0 and 1).
        engine: what answers; the embedded one if not given.
        form: how the world talks to both; as to the incumbent, whose agents the candidate would get, if not given.
        max_tokens: longest answer.
        watch: whom to tell how it goes; lanes' agents are `candidate` and `incumbent`.

    Raises:
        UsageError: it cannot be asked like that, or both have the same weights.
        Undecided, StoreError, MissingExtra: something else than the candidate was in the way; the same call goes on.
    """
    from cod_train.serving import Engine

    engine = engine or Engine("embedded")
    _check_asked(candidate, incumbent, world, packs, margin)
    spoken = incumbent or candidate
    form = form or form_of(spoken.folder, spoken.base)
    longest = max_tokens or longest_answer(form)
    plan = Plan(world, "", packs, pack_size, seed, form=form, max_tokens=longest, concurrency=CONCURRENCY).check()
    played = None if in_process(engine, candidate, incumbent) else engine
    kept = ("world", "split", "seed", "packs", "pack_size", "form", "max_tokens")
    setting = {key: getattr(plan, key) for key in kept} | {
        "margin": margin,
        "engine": engine.kind if played else "gguf",
    }
    _keep_note(folder, {"candidate": candidate.weights, "incumbent": _weights(incumbent), **setting})
    ours, theirs, trouble = await _both(candidate, incumbent, plan, played, folder, watch or Watch())
    found = (unfit(trouble),) if ours is None else checks(ours, theirs, margin)
    return Verdict(candidate.weights, _weights(incumbent), why(ours, theirs, found), found, setting, ours, theirs)


async def _both(
    candidate: Checkpoint, incumbent: Checkpoint | None, plan: Plan, engine: Engine | None, folder: Path, watch: Watch
) -> tuple[Lived | None, Lived | None, str]:
    """What both lived; None and why not for a candidate that cannot be lived with. Raises: Undecided."""
    theirs: Lived | None = None
    if incumbent is not None:
        theirs = await _incumbent(incumbent, replace(plan, agent="incumbent"), engine, folder, watch)
    try:
        if incumbent is not None:
            _check_language(candidate, incumbent)
        mine = replace(plan, agent="candidate")
        return await live(candidate, mine, engine, folder, watch, blame=incumbent is not None), theirs, ""
    except Unfit as error:
        return None, theirs, str(error)


async def decide(
    registry: Registry,
    name: str,
    *,
    world: str,
    folder: Path,
    packs: int = PACKS,
    pack_size: int = PACK_SIZE,
    **more: Any,
) -> KeptVerdict:
    """Compare a candidate with what is promoted, and promote or reject it: verdict and change of state are one transaction.

    The seed is a fresh one of the registry; it is kept in `folder`, so that the same call after a kill goes on with the same packs.

    Args:
        more: as `compare` takes it.

    Raises:
        UnknownName: no such checkpoint.
        UsageError: it is no candidate any more, or has the weights of the incumbent or of one that was rejected.
        CodError: as `compare`; nothing was decided.
    """
    candidate, incumbent = registry.get(name), registry.promoted()
    _check_candidate(registry, candidate)
    note = _read_note(folder)
    seed = int(note["seed"]) if note is not None else _unseen_seed(registry, name)
    verdict = await compare(
        candidate, incumbent, world=world, seed=seed, folder=folder, packs=packs, pack_size=pack_size, **more
    )
    now = registry.promoted()
    if now != incumbent:
        raise Undecided(
            f"{name} was compared with {incumbent.name if incumbent else 'nothing'}, and meanwhile {now.name if now else 'nothing'} "
            "is promoted: compare it with that, in another folder"
        )
    said = {**verdict.json(), "folder": str(folder)}
    number = registry.decide(candidate.name, incumbent.name if incumbent else None, verdict.promoted, said, verdict.why)
    return next(kept for kept in registry.verdicts(candidate.name) if kept.id == number)


def _unseen_seed(registry: Registry, name: str) -> int:
    """A fresh seed of which nothing in the candidate's lineage was trained on a pack: another registry's gate may have had it."""
    runs = [run.run for one in registry.lineage(name) for run in registry.training_runs(one.name)]
    while True:
        seed = registry.fresh_seed()
        if not any(f"/eval/{seed}/" in run for run in runs):
            return seed


def _check_candidate(registry: Registry, candidate: Checkpoint) -> None:
    """Raises: UsageError."""
    if candidate.state == "promoted":
        raise UsageError(f"{candidate.name} is promoted already: it is what serves")
    if candidate.state == "retired":
        raise UsageError(
            f"{candidate.name} was promoted before and is retired: `cod rollback` returns to the one before; to have this one compared "
            "again, add its folder under another name"
        )
    if candidate.state == "rejected" and registry.history(candidate.name)[-1].act == "rollback":
        raise UsageError(
            f"{candidate.name} was promoted and taken back ({registry.history(candidate.name)[-1].why}): to have it compared again, "
            "add its folder under another name"
        )
    same = [one for one in registry.all() if one.state == "rejected" and one.digest == candidate.digest]
    # Whatever could not be served has not been judged.
    rejected = [one for one in same if registry.history(one.name)[-1].act == "reject"]
    if rejected:
        why = registry.history(rejected[0].name)[-1].why.removeprefix("rejected, ")
        raise UsageError(
            f"the weights of {candidate.name} were rejected{'' if rejected[0].name == candidate.name else ' as ' + rejected[0].name} "
            f"({why}): asking until the dice fall well would promote by luck; train another checkpoint"
        )


def _check_asked(candidate: Checkpoint, incumbent: Checkpoint | None, world: str, packs: int, margin: float) -> None:
    """Raises: UsageError, UnknownName."""
    make_world(world)
    if packs < FEWEST:
        raise UsageError(f"a verdict needs at least {FEWEST} packs, not {packs}: {PACKS} tell differences of .05")
    if not 0 < margin < math.inf:
        raise UsageError(
            f"the margin must be above 0 and finite, not {margin:g}: with none, packs without end could not show it"
        )
    if incumbent is not None and incumbent.digest == candidate.digest:
        raise UsageError(
            f"{candidate.name} has the very weights of {incumbent.name}, which is promoted: there is nothing to compare"
        )


def _check_language(candidate: Checkpoint, incumbent: Checkpoint) -> None:
    """Agents that are alive get the candidate's tokens for what they say: they must be the incumbent's. Raises: Unfit, Undecided."""
    check_there(candidate)
    try:
        check_like(candidate.folder, candidate.base, incumbent.folder, incumbent.base)
    except UsageError as error:
        raise Unfit(str(error)) from None


async def _incumbent(incumbent: Checkpoint, plan: Plan, engine: Engine | None, folder: Path, watch: Watch) -> Lived:
    try:
        lived = await live(incumbent, plan, engine, folder, watch, blame=False)
    except Unfit as error:
        raise Undecided(
            f"the incumbent {incumbent.name} cannot be lived with, so nothing can be compared: {error}"
        ) from error
    if lived.lost:
        raise Undecided(
            f"{lived.lost} tasks of the incumbent {incumbent.name} have no reward, so nothing can be compared"
        )
    return lived


def _weights(checkpoint: Checkpoint | None) -> str | None:
    return checkpoint.weights if checkpoint is not None else None


# ---- the folder ----


def _read_note(folder: Path) -> dict[str, Any] | None:
    """What the gate in a folder was begun with; None where there is none. Raises: Undecided."""
    try:
        said = json.loads((folder / _NOTE).read_text())
        return {**said, "seed": int(said["seed"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Undecided(f"{folder / _NOTE} cannot be read ({error}): choose another folder") from None


def _keep_note(folder: Path, said: dict[str, Any]) -> None:
    """Note what is compared here; a folder belongs to one verdict.

    Raises:
        UsageError: it belongs to another.
        Undecided: it cannot be written.
    """
    before = _read_note(folder)
    if before is not None:
        differ = [f"{key} {before.get(key)}, not {said[key]}" for key in said if before.get(key) != said[key]]
        if differ:
            raise UsageError(
                f"{folder} was begun with {'; '.join(differ)}: say the same to go on, or choose another folder"
            )
        return
    part = folder / f".{_NOTE}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(said, indent=2) + "\n")
        os.replace(part, folder / _NOTE)
    except OSError as error:
        raise Undecided(f"cannot write {folder / _NOTE}: {error.strerror or error}") from None


__all__ = ["FEWEST", "MARGIN", "PACKS", "PACK_SIZE", "Check", "Undecided", "Verdict", "checks", "compare", "decide"]
