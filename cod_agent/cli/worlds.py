"""`cod worlds`: which worlds there are, what a solver is told in one, and a turn at it oneself."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli.output import console, print_json, say
from cod_agent.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from cod_agent.tasks import Pack


def worlds(
    world: Annotated[
        str | None, typer.Argument(metavar="[WORLD]", help="WORLD or WORLD:PRESET; without one, all that are built in.")
    ] = None,
    play: Annotated[bool, typer.Option("--play", help="Answer yourself, a line a turn, task after task.")] = False,
    size: Annotated[int, typer.Option("--pack-size", min=1, help="Tasks to play.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of the world.")] = 0,
    pack: Annotated[int, typer.Option("--pack", min=0, help="Which of its packs.")] = 0,
    split: Annotated[
        str, typer.Option("--split", metavar="train|eval", help="Packs to train on, or to be measured on.")
    ] = "eval",
    form: Annotated[str, typer.Option("--form", help="natural or compact.")] = "natural",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show the worlds, or what a solver is told and sees in one of them; or be the solver.

    Packs are those of `cod eval` (with --split train, those to train on). What you play is not recorded.

    Example: cod worlds alchemy:small --play
    """
    if world is None:
        if play:
            raise UsageError("name the world to play in, for example: cod worlds frozen-lake:small --play")
        _list(as_json)
        return
    from cod_agent.environments import SPLITS, make_world
    from cod_agent.environments.base import awaited
    from cod_agent.evaluation.suites import refuse_suite

    if split not in SPLITS:
        raise UnknownName.among("split", split, list(SPLITS))
    refuse_suite(world)
    made = make_world(world, seed=seed, split=split, form=form)  # type: ignore[arg-type]
    lived: Pack = made.pack(size if play else 1, pack)
    if play and as_json:
        raise UsageError("--play talks with a person: leave --json out")
    if play:
        _play(lived)
        return
    first = awaited(lived.environment.start(lived[0]).reset())
    if as_json:
        print_json({"world": lived.environment.name, "prompt": lived[0].prompt, "observation": first.text})
    else:
        say("\n\n".join(part for part in (lived[0].prompt, first.text) if part))


def _list(as_json: bool) -> None:
    """The built-in worlds, as a table or as JSON."""
    from cod_agent.environments.named import WORLDS

    rows: list[dict[str, Any]] = []
    for name, (module, kind, default) in WORLDS.items():
        loaded = import_module(module)
        about = (loaded.__doc__ or "").partition("\n")[0]
        rows.append({"world": name, "about": about, "default": default, "presets": list(getattr(loaded, kind).presets)})
    if as_json:
        print_json({"worlds": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("world", "presets, the default first", "what it is about"):
        table.add_column(title, overflow="fold")
    for row in rows:
        others = [preset for preset in row["presets"] if preset != row["default"]]
        table.add_row(row["world"], ", ".join([row["default"], *others]), row["about"])
    console().print(table)
    say("\nAlso gymnasium:ID, and MODULE:NAME for your own. Look into one: cod worlds frozen-lake:small")


def _play(pack: Pack) -> None:
    """Live a pack with a person as the solver, who may remember what they like."""
    from cod_agent.environments.base import awaited, started

    carried: Any = None
    say("You are the solver: a line is an answer, without tags. Ctrl-D stops.\n")
    say(pack[0].prompt)
    for position, task in enumerate(pack, 1):
        say(f"\n---- task {position} of {len(pack)} ----\n")
        session = started(pack.environment, task, carried)
        seen = awaited(session.reset())
        while not seen.done:
            say(seen.text)
            try:
                answer = input("> ")
            except EOFError:
                say("\nStopped.")
                return
            seen = awaited(session.step(_spoken(answer, pack)))
        carried = seen.carried
        say(seen.text)
        if seen.feedback:
            reward = "not known yet" if seen.feedback.reward is None else f"{seen.feedback.reward:.3g}"
            say(f"\nReward {reward}. {seen.feedback.text}")


def _spoken(answer: str, pack: Pack) -> str:
    """What a person typed, between the tags that the natural form of the built-in worlds asks for."""
    from cod_agent.environments.answers import CLOSE, OPEN

    asked = OPEN in pack[0].prompt and OPEN not in answer
    return f"{OPEN}{answer}{CLOSE}" if asked else answer
