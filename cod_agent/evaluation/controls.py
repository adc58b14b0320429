"""What a model with its context is held against, on the same packs: the lanes of a plan, by the names of its controls.

    no-context                          the same model with the empty context in every solve episode, and no updates
    frozen, foreign, blank, shuffled    a context that it is given, made of the main lane's (`cod_agent.evaluation.given`)
    history                             the record of its own earlier tasks instead of a context (`cod_agent.evaluation.given`)
    attempts                            no context, but more tries for each task (`cod_agent.evaluation.attempts`)
    ralph-sample, ralph-full            a context, and one task again and again: the pack's first, or each in turn (the rewards at a
                                        position are then the mean over the pack's tasks)
    perfect, memoryless, ...            a player of the world

`all` is every one of them that the plan has room for.
"""

from __future__ import annotations

from typing import Any, cast

from cod_agent.environments import Packing
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation import given
from cod_agent.evaluation.lanes import Lane, Way
from cod_agent.evaluation.plan import Plan, worlds_of
from cod_agent.evaluation.players import CEILING, FLOOR
from cod_agent.evaluation.result import AGAINST, MAIN, NO_CONTEXT
from cod_agent.models.base import Model

ALL = "all"

_OWN = Way(updates=True)
_WAYS = {
    NO_CONTEXT: Way(),
    "frozen": Way(text=given.frozen, after=0),
    "foreign": Way(text=given.foreign, after=1),
    "blank": Way(text=given.blank, after=0),
    "shuffled": Way(text=given.shuffled, after=0),
    "history": Way(text=given.history),
    "attempts": Way(after=0, again=True),
    "ralph-sample": _OWN,
    "ralph-full": _OWN,
}


def lanes_of(plan: Plan, world: Any, model: Model, against: Model | None = None) -> list[Lane]:
    """The plan's own lane, one for each of its controls, and one for another model.

    Args:
        world: the plan's, in the form that `model` speaks.
        against: the model that `plan.against` names.

    Raises:
        UnknownName: no such control.
        UsageError: a control that the world or the plan has no room for.
    """
    main = Lane(MAIN, plan.agent, model, plan, worlds_of(plan, world.form), _OWN)
    others = [_lane(name, plan, world, main) for name in controls_of(plan, world)]
    if against is not None:
        worlds = worlds_of(plan, plan.form or against.form)
        others.append(Lane(f"{AGAINST}{against.name}", f"{plan.agent}/against", against, plan, worlds, _OWN, main))
    return [main, *others]


def controls_of(plan: Plan, world: Any) -> tuple[str, ...]:
    """The names of the plan's controls, `all` spelt out.

    Raises:
        UnknownName, UsageError: see `lanes_of`.
    """
    players = tuple(getattr(world, "players", None) or {})
    known = (*_WAYS, *players)
    if ALL in plan.controls:
        return tuple(name for name in known if not _no_room(name, plan))
    for name in plan.controls:
        if name in (FLOOR, CEILING) and name not in players:
            raise UsageError(f"the control {name} is a player of the world, and {world.name} has none: leave it out")
        if name not in known:
            raise UnknownName.among("control", name, [*known, ALL])
        if reason := _no_room(name, plan):
            raise UsageError(f"the control {name} {reason}")
    return tuple(dict.fromkeys(plan.controls))


def _no_room(name: str, plan: Plan) -> str:
    """Why a control makes no sense here, or ""."""
    way = _WAYS.get(name, _OWN)
    if way.text is not None and plan.pack_size < 2:
        return "gives tasks a context from earlier ones, and a pack of one task has none: use --pack-size 2 or more"
    if name == "foreign" and plan.packs < (least := 2 * _next_pack(plan)):
        return f"takes the contexts of another pack, and not every one has one: use --packs {least} or more"
    if name.startswith("ralph-") and plan.packing != "cod":
        return f"is a Ralph loop beside related tasks, and this is one already (--packing {plan.packing}): leave it out"
    return ""


def _next_pack(plan: Plan) -> int:
    """How much further the next pack is that hides something else: `ralph-full` makes as many of one as it has tasks."""
    return plan.pack_size if plan.packing == "ralph-full" else 1


def _lane(name: str, plan: Plan, world: Any, main: Lane) -> Lane:
    agent, way = f"{plan.agent}/{name}", _WAYS.get(name, _OWN)
    if name == "foreign":
        way = Way(text=way.text, after=_next_pack(plan))
    if name.startswith("ralph-"):
        worlds = worlds_of(plan, world.form, cast("Packing", name))
        return Lane(name, agent, main.model, plan, worlds, way, main, plan.pack_size if name == "ralph-full" else 1)
    if name in _WAYS:
        return Lane(name, agent, main.model, plan, main.worlds, way, main)
    from cod_agent.models import resolve

    compact = worlds_of(plan, "compact")
    return Lane(name, agent, resolve(f"scripted:{name}", world=compact[0]), plan, compact, way, main)
