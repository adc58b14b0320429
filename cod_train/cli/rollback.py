"""`cod rollback`: what was promoted before serves again."""

from __future__ import annotations

from typing import Annotated

import typer

from cod_agent.cli import options
from cod_agent.cli.output import print_json, say
from cod_train.cli.options import REGISTRY, RegistryFile

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("rollback")
def rollback(
    why: Annotated[str, typer.Option("--why", help="Kept in the history.")] = "asked for by hand",
    registry: RegistryFile = REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Take the last promotion back: the checkpoint promoted before it is promoted again. Once more goes further back.

    A running `cod serve` switches at once; requests under way are answered by what they were sent to.

    Example: cod rollback --registry registry.db --why "answers got rude"
    """
    from cod_train.checkpoints import Registry

    with Registry(registry) as opened:
        before = opened.promoted()
        now = opened.rollback(why)
    left = before.weights if before is not None else ""
    if as_json:
        print_json({"promoted": now.json(), "taken_back": left, "why": why})
        return
    say(f"{now.weights} is promoted again; {left} is retired ({why}).")


__all__ = ["app", "rollback"]
