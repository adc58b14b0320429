"""The flags that `run` and `eval` share, and how they become a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.errors import UsageError

if TYPE_CHECKING:
    from cod_agent.evaluation import Plan
    from cod_agent.memory import Memory

World = Annotated[str | None, typer.Argument(metavar="WORLD", help="WORLD or WORLD:PRESET, e.g. frozen-lake:small.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="embedded, openai:NAME, litellm:NAME, gguf:PATH, scripted:PLAYER (default: embedded)."
    ),
]
Packs = Annotated[int | None, typer.Option("--packs", help="How many packs.")]
PackSize = Annotated[int | None, typer.Option("--pack-size", help="Tasks in a pack (default: 4).")]
Seed = Annotated[int | None, typer.Option("--seed", help="Which packs (default: 1).")]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="train|eval", help="Packs to train on, or to be measured on (default: eval)."),
]
Packing = Annotated[
    str | None,
    typer.Option(
        "--packing",
        metavar="cod|ralph-sample",
        help="A pack's tasks: related ones, or its first again and again (default: cod).",
    ),
]
Agent = Annotated[str | None, typer.Option("--agent", help="The agent's name in the database (default: agent).")]
Form = Annotated[
    str | None,
    typer.Option("--form", metavar="natural|compact", help="How the world talks (default: what fits the model)."),
]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Of the sampling (default: 1).")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Longest answer.")]
BaseUrl = Annotated[str | None, typer.Option("--base-url", help="Of the endpoint; better in OPENAI_BASE_URL.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Of the endpoint; better in OPENAI_API_KEY, where no process list shows it."),
]
Exact = Annotated[bool | None, typer.Option("--exact", help="Ask the endpoint for token ids, as vLLM gives them.")]
Stream = Annotated[bool | None, typer.Option("--stream", help="Read answers as they come.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds one attempt of a call may take.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="Packs lived at once (default: 32).")]
_LIMITS = "calls=20,tokens=50000,seconds=600,money=0.5,prices=3/15"
Limits = Annotated[
    str | None, typer.Option("--budget", metavar="LIMITS", help=f"What each episode may spend: some of {_LIMITS}.")
]
RunLimits = Annotated[
    str | None, typer.Option("--run-budget", metavar="LIMITS", help="What each run may spend in all, likewise.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the file holds; needs no other flag.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="open|quarantine|review",
        help="Which updates wait for a decision (default: open).",
    ),
]

# Of commands that look into a file.
Db = Annotated[Path, typer.Argument(metavar="DB", help="A run database.")]
Whose = Annotated[str | None, typer.Option("--agent", help="Whose; may be left out where the file has one agent.")]
OfRun = Annotated[str | None, typer.Option("--run", help="Which of its runs; may be left out where it has one.")]

FREE = ("packs", "concurrency", "run_budget", "timeout", "stream", "base_url", "against_base_url", "controls")
"""What may be said anew when resuming; everything else is as it was."""


def flags_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's arguments (`locals()`) that belong to a plan; None is not given."""
    from dataclasses import fields

    from cod_agent.evaluation import Plan

    return {field.name: arguments[field.name] for field in fields(Plan) if field.name in arguments}


def plan_of(flags: dict[str, Any], defaults: dict[str, Any]) -> Plan:
    """A new plan.

    Args:
        flags: what was given; None is not given.
        defaults: of this command, where they are not the plan's own.

    Raises:
        UsageError: no world was named, or a flag makes no sense.
    """
    from cod_agent.environments import WORLDS
    from cod_agent.errors import UnknownName
    from cod_agent.evaluation import Plan

    given = {key: value for key, value in flags.items() if value is not None}
    if "world" not in given:
        raise UsageError(
            f"name a world, for example frozen-lake:small (known are {', '.join(sorted(WORLDS))}), or --resume"
        )
    if given.get("form", "natural") not in ("natural", "compact"):
        raise UnknownName.among("form", given["form"], ["natural", "compact"])
    return Plan(**{"model": "embedded", **defaults, **given}).check()


def resumed(path: Path, flags: dict[str, Any], run: str | None = None) -> Plan:
    """The plan the file was made with; flags that would change what is lived are refused.

    Raises:
        UsageError: there is no such file, or a flag says something else than the file.
    """
    from cod_agent.evaluation import kept_plan

    with _opened(path) as memory:
        return _agreed(path, kept_plan(memory, run), flags)


def resumed_study(path: Path, flags: dict[str, Any]) -> tuple[Plan, ...]:
    """The plans of the study the file was made with; else as `resumed`."""
    from cod_agent.evaluation import kept_study

    with _opened(path) as memory:
        return tuple(_agreed(path, part, flags) for part in kept_study(memory))


@contextmanager
def _opened(path: Path) -> Iterator[Memory]:
    from cod_agent.memory import Memory

    if not path.is_file():
        raise UsageError(f"there is no file {path} to resume: check the path, or begin without --resume")
    memory = Memory.open(path)
    try:
        yield memory
    finally:
        memory.close()


def _agreed(path: Path, plan: Plan, flags: dict[str, Any]) -> Plan:
    """The plan with what may be said anew. Raises: UsageError, for anything else that differs."""
    given = {key: value for key, value in flags.items() if value is not None}
    for key, value in given.items():
        before = asdict(plan)[key]
        if key not in FREE and value != before and not (key == "world" and before.startswith(f"{value}:")):
            name, was, now = key.replace("_", " "), _spelt(before), _spelt(value)
            begun = f"with {name} {was}, not {now}" if was else f"without {name}, not with {now}"
            raise UsageError(
                f"{path} was begun {begun}: leave that out to resume, or begin another file without --resume"
            )
    return replace(plan, **{key: value for key, value in given.items() if key in FREE}).check()


def _spelt(value: Any) -> str:
    """A flag's value as it is written on the command line; "" for none."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)


def words(said: str | None) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in (said or "").split(",") if word.strip())


def numbers(flag: str, said: str | None) -> tuple[int, ...]:
    """Whole numbers between commas. Raises: UsageError."""
    try:
        return tuple(int(word) for word in words(said))
    except ValueError:
        raise UsageError(f"{flag} is a whole number, or several with commas between, not {said!r}") from None
