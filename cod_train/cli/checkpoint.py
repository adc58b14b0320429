"""`cod checkpoint`: which checkpoints there are, what each came from, and making one that can be served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli.output import command_line, console, print_json, say
from cod_agent.errors import UsageError
from cod_agent.policies import POLICIES, folder_of
from cod_train.cli.options import REGISTRY, RegistryFile

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint, KeptVerdict, Registry
    from cod_train.lineage import TrainingRun

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Checkpoints: weights with their parent, training data and evaluation.\n\nExample: cod checkpoint list",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Of a checkpoint, or of its weights as calls have them on record.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command("add")
def add(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER|POLICY", help="A Hugging Face or PEFT folder, or a shipped policy.")
    ],
    registry: RegistryFile = REGISTRY,
    name: Annotated[str | None, typer.Option("--name", help="Its name (default: the folder's).")] = None,
    parent: Annotated[
        str | None, typer.Option("--parent", help="What it was trained from (default: what is promoted).")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="DB", help="A run database it was trained on; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Register a checkpoint as a candidate, after checking that it could serve; a registry that is not there is begun.

    Example: cod checkpoint add trained/model --name better --parent embedded-base --data lives.db
    """
    from cod_train.checkpoints import Registry

    with Registry(registry, create=True) as opened:
        added = opened.add(_folder(folder), name=name, parent=parent, data=data or (), config=_words(folder))
        runs = opened.training_runs(added.name)
    if as_json:
        return print_json(added.json())
    origin = f", from {added.parent}" if added.parent else ""
    say(f"{added.weights} is a {added.state}{origin}{_counted(runs)}: {added.folder}")
    if added.state == "candidate":
        say(f"Let it compete: {_command('cod', 'promote', added.name, registry=registry)}")
    return None


@app.command("list")
def show_all(registry: RegistryFile = REGISTRY, as_json: Json = False) -> None:
    """List the checkpoints, oldest first.

    Example: cod checkpoint list --registry runs/loop/registry.db
    """
    from cod_train.checkpoints import Registry

    with Registry(registry) as opened:
        found, verdicts = opened.all(), opened.verdicts()
    if as_json:
        return print_json({"checkpoints": [one.json() for one in found]})
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "state", "parent", "weights", "verdict"):
        table.add_column(column, overflow="fold")
    for one in found:
        said = _last(verdicts, one.name)
        table.add_row(one.name, one.state, one.parent or "", one.weights.rpartition("@")[2], _verdict(said))
    return console().print(table)


@app.command("show")
def show(
    name: Name,
    registry: RegistryFile = REGISTRY,
    check: Annotated[
        bool, typer.Option("--check", help="Compare its files and training data with what was registered.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show one checkpoint: what it is, what it was trained on, and what became of it.

    It says how many of the recorded runs were pruned or forgotten since. With --check, it exits with 1 if the weights are not what was
    registered, or recorded runs were changed.

    Example: cod checkpoint show better --check
    """
    from cod_train.checkpoints import Registry
    from cod_train.lineage import became

    with Registry(registry) as opened:
        found = opened.get(name)
        runs, history, verdicts = (
            opened.training_runs(found.name),
            opened.history(found.name),
            opened.verdicts(found.name),
        )
        files = _changed_files(opened, found) if check else []
    states = became(runs) if check else []
    if as_json:
        said = {
            **found.json(),
            "data": [run.json() | ({"now": states[at]} if check else {}) for at, run in enumerate(runs)],
            "history": [change.json() for change in history],
            "verdicts": [verdict.json() for verdict in verdicts],
        }
        print_json(said | ({"changed_files": files} if check else {}))
    else:
        _tell(found, runs, states)
        for change in history:
            say(f"{_when(change.when)}  {change.after}: {change.why}")
        if check:
            say(f"changed files: {', '.join(files)}" if files else "its files are what was registered")
    if files or "changed" in states:
        raise typer.Exit(1)


@app.command("verify")
def verify(
    db: Annotated[Path, typer.Argument(metavar="DB", help="A run database.")],
    registry: RegistryFile = REGISTRY,
    as_json: Json = False,
) -> None:
    """Check the checkpoints that a run database names: each is in the registry with that digest, and its files are still those.

    It exits with 1 if one is unknown or was changed. `cod verify DB` checks the database itself. Weights that do not call themselves
    NAME@DIGEST, as a provider's, are counted.

    Example: cod checkpoint verify lives.db
    """
    from cod_train.checkpoints import Registry
    from cod_train.recorded_weights import answered

    with Registry(registry) as opened:
        found = answered(db, opened)
        changed = {one.checkpoint.name: _changed_files(opened, one.checkpoint) for one in found if one.checkpoint}
    faults = [
        f"row {one.first} of calls names {one.weights}, which {registry} does not know" for one in found if one.lost
    ]
    faults += [
        f"checkpoint {name} is not what answered: {', '.join(files)}" for name, files in changed.items() if files
    ]
    elsewhere = [one.weights for one in found if one.checkpoint is None and not one.lost]
    if as_json:
        print_json({"ok": not faults, "checkpoints": sorted(changed), "elsewhere": elsewhere, "faults": faults})
    else:
        for fault in faults:
            say(fault)
        say(f"{len(changed)} checkpoints named by calls of {db}, {len(elsewhere)} other weights")
    if faults:
        raise typer.Exit(1)


@app.command("lineage")
def lineage(name: Name, registry: RegistryFile = REGISTRY, as_json: Json = False) -> None:
    """Show what a checkpoint came from, back to the first, with verdicts and training data, and what of that is gone since.

    Example: cod checkpoint lineage better
    """
    from cod_train.checkpoints import Registry
    from cod_train.lineage import taken_out

    with Registry(registry) as opened:
        found = opened.lineage(name)
        verdicts = opened.verdicts()
        runs = {one.name: opened.training_runs(one.name) for one in found}
    if as_json:
        steps = [
            {**one.json(), "runs": len(runs[one.name]), "tasks": sum(run.tasks for run in runs[one.name])}
            | {"verdicts": [said.json() for said in verdicts if said.candidate == one.name]}
            | {"gone": taken_out(runs[one.name])}
            for one in found
        ]
        return print_json({"lineage": steps})
    from rich.text import Text
    from rich.tree import Tree

    top: Any = None
    branch: Any = None
    for one in reversed(found):
        said = _verdict(_last(verdicts, one.name))
        gone = taken_out(runs[one.name])
        line = Text(f"{one.weights}  {one.state}{_counted(runs[one.name])}{f'; {said}' if said else ''}")
        line.append(f"; gone since: {gone}" if gone else "", style="yellow")
        branch = Tree(line) if branch is None else branch.add(line)
        top = top or branch
    return console().print(top)


@app.command("export")
def export(
    source: Annotated[
        str, typer.Argument(metavar="NAME|FOLDER", help="A checkpoint of the registry, a folder or a policy.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where it goes: a folder that is not there yet.")],
    registry: RegistryFile = REGISTRY,
    untie: Annotated[bool, typer.Option("--untie", help="Write the output embedding as a tensor of its own.")] = False,
    gguf: Annotated[
        bool | None,
        typer.Option("--gguf/--no-gguf", help="A file for the embedded engine, too (default: where possible)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a folder that can be served: adapters merged, types told truthfully, compared with the source.

    Example: cod checkpoint export trained/global_step_30/actor/huggingface --out better
    """
    from cod_train.export import exported

    folder, base = _source(source, registry)
    done = exported(folder, out, name=out.resolve().name, untied=untie, gguf=gguf, base=base)
    forms = {"hugging_face": done.compared, "gguf": done.compared_gguf}
    off = {form: found.largest for form, found in forms.items() if found is not None}
    if as_json:
        print_json({"folder": str(done.folder), "gguf": done.gguf and str(done.gguf), "largest_difference": off})
        return
    said = ", ".join(f"{form.replace('_', ' ')} {value:.1e}" for form, value in off.items())
    say(
        f"{done.folder} says what its source says, over {done.compared.tokens} tokens (largest difference in nats: {said})"
    )
    say(f"Register it: {_command('cod', 'checkpoint', 'add', done.folder, registry=registry)}")


# ---- words ----


def _folder(said: str) -> Path:
    return folder_of(said) if said in POLICIES and not Path(said).is_dir() else Path(said)


def _source(said: str, registry: Path) -> tuple[Path, Path | None]:
    """The folder behind a name, and an adapter's base."""
    if Path(said).is_dir() or said in POLICIES:
        return _folder(said), None
    if not registry.is_file():
        raise UsageError(
            f"{said} is no folder, and there is no registry {registry} that could know a checkpoint of that name"
        )
    from cod_train.checkpoints import Registry

    with Registry(registry) as opened:
        found = opened.get(said)
    return found.folder, found.base


def _words(folder: str) -> dict[str, Any]:
    return {"policy": folder} if folder in POLICIES and not Path(folder).is_dir() else {}


def _command(*words: Any, registry: Path) -> str:
    return command_line(*words, *(("--registry", registry) if registry != REGISTRY else ()))


def _changed_files(registry: Registry, found: Checkpoint) -> list[str]:
    from cod_agent.memory.hashing import text_hash
    from cod_agent.models.gguf import fingerprint
    from cod_train.checkpoint_files import contents
    from cod_train.probe import FILE, Probe

    kept = registry.files(found.name)
    try:
        now = contents(found.folder).files
        now[FILE] = text_hash(Probe.load(found.folder).text())
    except UsageError as error:
        return [str(error)]
    if found.gguf is not None:
        kept[found.gguf.name] = found.gguf_weights
        now[found.gguf.name] = fingerprint(found.gguf) if found.gguf.is_file() else "gone"
    return sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))


def _tell(found: Checkpoint, runs: Sequence[TrainingRun], states: Sequence[str]) -> None:
    from cod_train.lineage import taken_out

    lines = {
        "weights": found.weights,
        "state": found.state,
        "parent": found.parent or "none",
        "kind": found.kind if found.base is None else f"{found.kind} on {found.base}",
        "folder": found.folder,
        "digest": found.digest,
        "gguf": f"{found.gguf} ({found.gguf_weights})" if found.gguf else "none",
        "template": found.template,
        "code": found.code,
        "config": ", ".join(f"{key}={value}" for key, value in found.config.items()) or "none",
        "data": _counted(runs).removeprefix(", trained on ") or "none",
    }
    for key, value in lines.items():
        say(f"{key:9} {value}")
    for file in dict.fromkeys(run.file for run in runs):
        of_file = [at for at, run in enumerate(runs) if run.file == file]
        now = ", ".join(f"{count} {state}" for state, count in Counter(states[at] for at in of_file if states).items())
        say(f"          {file}: {len(of_file)} runs{f' ({now})' if now else ''}")
    if gone := taken_out(runs):
        say(f"gone      of its training data since: {gone}; its weights still know what that taught")


def _counted(runs: Sequence[TrainingRun]) -> str:
    return f", trained on {len(runs)} runs ({sum(run.tasks for run in runs)} tasks)" if runs else ""


def _last(verdicts: Sequence[KeptVerdict], name: str) -> KeptVerdict | None:
    return next((said for said in reversed(verdicts) if said.candidate == name), None)


def _verdict(said: KeptVerdict | None) -> str:
    """The last verdict in a line, with the rewards by position if it has them."""
    if said is None:
        return ""
    rewards = [row["candidate"]["mean"] for row in said.said.get("positions", []) if row.get("candidate")]
    shown = f" at {' '.join(f'{value:.2f}' for value in rewards)}" if rewards else ""
    return f"{'promoted' if said.promoted else 'rejected'}{shown}{f' over {said.incumbent}' if said.incumbent else ''}"


def _when(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
