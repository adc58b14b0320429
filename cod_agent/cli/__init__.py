"""The `cod` command: one module per noun, each a thin layer over the library, which does all the work.

Exit codes: 0 done; 1 a `CodError`, as one sentence that says what to do; 2 the command line was not understood; 130
stopped with Ctrl-C; 143 ended by SIGTERM. With `--json` standard output is JSON and nothing else; progress goes to
standard error.

Other packages add commands by entry points of the group `cod.commands`: a name, and a `typer.Typer` behind it,
which is imported only when it is asked for (or listed in the help).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cod_agent.cli.backup import backup as backup_command
from cod_agent.cli.context import app as context_app
from cod_agent.cli.demo import demo as demo_command
from cod_agent.cli.doctor import doctor as doctor_command
from cod_agent.cli.eval import evaluate as eval_command
from cod_agent.cli.export import export as export_command
from cod_agent.cli.host import host as host_command
from cod_agent.cli.output import say
from cod_agent.cli.prune import prune as prune_command
from cod_agent.cli.run import run as run_command
from cod_agent.cli.verify import anchor as anchor_command
from cod_agent.cli.verify import verify as verify_command
from cod_agent.cli.worlds import worlds as worlds_command
from cod_agent.errors import CodError, MissingExtra

GROUP = "cod.commands"

# The matrices of the tiny policies are too small to share: with a thread for each core a busy machine is several times slower. To
# be said before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@cache
def _others() -> dict[str, Any]:
    """Entry points of other packages, by command."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


class Commands(TyperGroup):
    """Our own commands, then those of other packages; errors of ours as one sentence."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*own, *sorted(_others().keys() - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known = super().get_command(ctx, cmd_name)
        return known if known is not None or cmd_name not in _others() else _load(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CodError as error:
            from cod_agent.secrets import Secrets

            say(f"Error: {Secrets()(str(error))}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            say("Stopped.", err=True)
            raise typer.Exit(130) from None


def _load(name: str) -> Any:
    """The command behind an entry point; one that cannot be imported says why when it is called."""
    try:
        command = typer.main.get_command(_others()[name].load())
        command.name = name  # of a group, the help shows its own
        return command
    except Exception as error:  # a stranger's package must not take the whole command line down
        reason = str(error) if isinstance(error, MissingExtra) else f"{type(error).__name__}: {error}"

        def broken() -> None:
            package = (found := _others()[name].dist) and found.name
            raise CodError(f"the command {name!r} of package {package} cannot be loaded: {reason}")

        broken.__doc__ = "Cannot be loaded: call it to see why."
        app = typer.Typer(add_completion=False)
        app.command(name, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(broken)
        return typer.main.get_command(app)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Agents with a long life: solve a task, rewrite the context, do better on the next.\n\nStart with `cod demo`.",
)
app.command("demo")(demo_command)
app.command("run")(run_command)
app.command("eval")(eval_command)
app.command("worlds")(worlds_command)
app.add_typer(context_app, name="context")
app.command("verify")(verify_command)
app.command("anchor")(anchor_command)
app.command("doctor")(doctor_command)
app.command("backup")(backup_command)
app.command("prune")(prune_command)
app.command("export")(export_command)
app.command("host")(host_command)


def _version(asked: bool) -> None:
    if asked:
        from cod_agent import __version__

        say(f"connect-the-dots {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script `cod`."""
    app(prog_name="cod")


__all__ = ["app", "main"]
