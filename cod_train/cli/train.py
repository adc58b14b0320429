"""`cod train`: the short way to train, from recorded lives, in a world, or both.

It composes the config that `python -m cod_train.verl_main` takes, runs that in a process of its own with its output in
OUT/train.log, and reads from OUT how it goes. The same command again goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any

import typer

from cod_agent.cli.output import command_line, console, print_json, say
from cod_agent.environments import make_world
from cod_agent.errors import CodError, MissingExtra, UnknownName, UsageError
from cod_agent.policies import POLICIES, folder_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Training = subprocess.Popen[bytes]

LOOKED_FOR = ("megatron", "msprobe", "nvtx", "sglang", "trl", "vllm")
"""Packages that verl uses where it finds something of their name."""

POLL = 0.5
"""Seconds between two looks at how it goes."""


@app.command("train")
def train(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[DB|KEY=VALUE]...", help="More run databases; keys of the config.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option("--from", metavar="DB", help="Run databases to train from; several may follow.")
    ] = None,
    env: Annotated[
        str | None,
        typer.Option(
            "--env",
            metavar="WORLD",
            help="World to live and be measured in, or several with commas between (default: the config's).",
        ),
    ] = None,
    base: Annotated[str, typer.Option("--base", help="A shipped policy or a Hugging Face folder.")] = "embedded-base",
    out: Annotated[Path, typer.Option("--out", help="Where checkpoints, metrics, records and figure go.")] = Path(
        "trained"
    ),
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps in all (default: the config's).")] = None,
    packs: Annotated[int | None, typer.Option("--packs", min=1, help="Packs in a step.")] = None,
    group: Annotated[int | None, typer.Option("--group", min=1, help="Rollouts of each pack.")] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Learning rate.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the packs and the sampling.")] = 0,
    eval_packs: Annotated[
        int, typer.Option("--eval-packs", help="Held-out packs lived before and after; 0 measures nothing.")
    ] = 128,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")] = 10,
    form: Annotated[
        str | None, typer.Option("--form", metavar="natural|compact", help="How worlds talk (default: what fits).")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="One process, without Ray: the same update, sooner begun.")
    ] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Send metrics to Weights & Biases, too.")] = False,
    config: Annotated[
        str, typer.Option("--config", help="cpu_tiny, cpu_tiny_mixed, gpu_tiny, gpu_small, cluster_8b, or your own.")
    ] = "cpu_tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Train a policy by reinforcement learning with segment credit.

    Example: cod train --env frozen-lake:small --base embedded-base --out trained --in-process
    """
    more = more or []
    files = [*(source or []), *(word for word in more if "=" not in word)]
    if more and not source and files:
        raise UsageError(f"what is {files[0]!r}? Run databases follow --from, keys of the config have an =")
    for file in files:
        if not Path(file).is_file():
            raise UsageError(f"no such file: {file}")
    _check_names(base, env)
    _check_folder(out)
    origin = "live" if not files else "mixed" if env else "recorded"
    words = [f"--config-name={config}", f"data.source={origin}", f"trainer.default_local_dir={json.dumps(str(out))}"]
    words += [f"data.recorded={json.dumps([str(Path(file).absolute()) for file in files])}"]
    words += [f"data.seed={seed}", f"+actor_rollout_ref.rollout.engine_kwargs.cod_cpu.seed={seed}"]
    words += [f"actor_rollout_ref.model.path={json.dumps(base)}", f"trainer.save_freq={save_every}"]
    words += [f"trainer.experiment_name={json.dumps(out.resolve().name)}", f"data.form={form or _form(base)}"]
    given = {
        "data.world": f"[{env}]" if env and "," in env else env,
        "trainer.total_training_steps": steps,
        "data.train_batch_size": packs,
        "actor_rollout_ref.rollout.n": group,
        "actor_rollout_ref.actor.optim.lr": rate,
    }
    words += [f"{key}={value}" for key, value in given.items() if value is not None]
    if eval_packs:
        last = f"{steps}" if steps is not None else "${trainer.total_training_steps}"
        words += [f"data.eval_packs={eval_packs}", "trainer.val_before_train=true", f"trainer.test_freq={last}"]
    words += [f"trainer.logger=[file,tensorboard{',wandb' if wandb else ''}]"]
    words += [word for word in more if "=" in word]
    from cod_train.checks import check_before_training
    from cod_train.settings import Settings
    from cod_train.verl_main import composed

    composition = composed(words)
    check_before_training(composition, Settings.of(composition))  # before the folder is this training's
    _begin(out, words)
    _run(words, out, composition, in_process, quiet=as_json)
    _tell(out, base, composition.data.world, as_json)


def _check_folder(out: Path) -> None:
    """Raises: UsageError, for a folder that verl would import for a package, since processes of a training look here, too."""
    top = out.absolute().relative_to(Path.cwd()).parts[:1] if out.absolute().is_relative_to(Path.cwd()) else ()
    if top and top[0] in LOOKED_FOR:
        raise UsageError(f"verl would take a folder {top[0]} here for the package of that name: choose another --out")


def _check_names(base: str, world: str | None) -> None:
    """Raises: UnknownName, UsageError, before anything is started."""
    from cod_agent.evaluation.suites import refuse_suite

    for one in world.split(",") if world else ():
        refuse_suite(one)
        make_world(one)
    if base in POLICIES or (Path(base) / "config.json").is_file():
        return
    if Path(base).is_dir():
        raise UsageError(f"{base} has no config.json: give --base the folder of a Hugging Face model")
    if "/" not in base:  # else it may be one of a hub's
        raise UnknownName.among("base", base, list(POLICIES))


def _form(base: str) -> str:
    """What the base speaks, as far as its folder says."""
    from cod_train.checkpoint_files import form_of

    folder = folder_of(base) if base in POLICIES else Path(base)
    try:
        return form_of(folder)
    except UsageError:  # the training says itself that the tokenizer has no template; one of a hub is not here yet
        return "natural"


def _begin(out: Path, words: list[str]) -> None:
    """Note what is trained here; a folder belongs to one training."""
    from cod_train.progress import newest_checkpoint, steps

    out.mkdir(parents=True, exist_ok=True)
    note = out / "train.json"
    # What may be said anew when going on.
    free = (
        "trainer.total_training_steps",
        "trainer.test_freq",
        "trainer.logger",
        "trainer.val_before_train",
        "trainer.save_freq",
        "data.eval_packs",
    )
    if note.is_file() and (steps(out) or newest_checkpoint(out)):
        before = json.loads(note.read_text())["config"]
        kept, said = ([word for word in some if not word.startswith(free)] for some in (before, words))
        if kept != said:
            theirs, ours = (", ".join(sorted(set(a) - set(b))) for a, b in ((kept, said), (said, kept)))
            raise UsageError(
                f"{out} is of another training: there {theirs or 'nothing'}, here {ours or 'nothing'}. Choose another --out, "
                "or say the same"
            )
    note.write_text(json.dumps({"config": words}, indent=2) + "\n")


def _run(words: list[str], out: Path, config: Any, in_process: bool, *, quiet: bool) -> None:
    """Train in a process of its own, saying how it goes.

    Raises:
        CodError: it failed; the message has its last words.
    """
    from cod_train.progress import newest_checkpoint, steps
    from cod_train.verl_main import CPU_ENVIRONMENT

    total = config.trainer.total_training_steps
    way = ["--in-process"] if in_process else []
    log = out / "train.log"
    say(f"Training in {out}; its log is {log}", err=True)
    environment = {**os.environ, **(CPU_ENVIRONMENT if config.trainer.device == "cpu" else {})}
    command = [sys.executable, "-m", "cod_train.verl_main", *way, *words]
    began = log.stat().st_size if log.is_file() else 0
    with log.open("ab") as told, _started(command, told, environment) as (process, asked):
        said = len(steps(out))
        try:
            while (ended := process.poll()) is None:
                time.sleep(POLL)
                said = _say_steps(steps(out), said, total, quiet)
        except KeyboardInterrupt:
            process.wait()
            raise _stopped(130) from None
        _say_steps(steps(out), said, total, quiet)
    if ended and asked:
        raise _stopped(128 + signal.SIGTERM)
    if ended:
        further = "; the same command goes on from the last checkpoint" if newest_checkpoint(out) else ""
        raise CodError(f"{_last_words(log, began)}\nThe whole log is {log}{further}")
    if total and (done := steps(out)) and done[-1].number < total:
        say(f"There was nothing more to train on after step {done[-1].number} of {total}.", err=True)


def _stopped(code: int) -> typer.Exit:
    say(f"Stopped. The same command goes on: {command_line(*sys.argv)}", err=True)
    return typer.Exit(code)


@contextlib.contextmanager
def _started(command: list[str], log: IO[bytes], environment: dict[str, str]) -> Iterator[tuple[Training, list[int]]]:
    """Start the training, with a list of the SIGTERMs that come.

    Each is passed on, or the training would go on alone: supervisors send it to this process only, while Ctrl-C in a
    terminal reaches both.
    """
    asked: list[int] = []
    process: Training | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if process is not None:
            process.terminate()

    ours = threading.current_thread() is threading.main_thread()  # only it may listen to signals
    before = signal.signal(signal.SIGTERM, pass_on) if ours else None
    try:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if asked:  # it came too early to be passed on
            process.terminate()
        yield process, asked
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _say_steps(done: list[Any], said: int, total: int | None, quiet: bool) -> int:
    for step in done[said:]:
        by_position = " ".join(f"{reward:.2f}" for reward in step.rewards)
        lost = {what: step.metrics.get(f"cod/{what}_lost", 0) for what in ("rollouts", "rewards")}
        say(
            f"step {step.number:4d} of {total}  reward {step.reward:.3f}  by position {by_position}  {step.seconds:.1f} s"
            + "".join(f"  {count:.0f} {what} lost" for what, count in lost.items() if count),
            err=quiet,
        )
        for warning in _warnings(step.metrics):
            say(f"  note: {warning}", err=True)
    return len(done)


def _warnings(metrics: dict[str, Any]) -> Iterator[str]:
    """What of a step's metrics a person should not have to look for."""
    from cod_train.settings import DISAGREEMENT

    rows, drift = metrics.get("cod/rows", 0), metrics.get("actor/rec_kl", 0.0)
    if metrics.get("cod/zero_advantage_rows", 0) >= rows:
        yield "nothing was learnt: no row has an advantage (rollouts of one pack that differ in reward make one)"
    if abs(drift) > DISAGREEMENT:
        yield f"what was sampled is {drift:.2f} nats off the model that trains: records of another model, or too old"


def _last_words(log: Path, began: int) -> str:
    """The error that ended the process: ours as it stands, another's last line."""
    with log.open("rb") as told:
        told.seek(began)
        said = "\n" + told.read().decode(errors="replace")
    _, ours, message = said.rpartition("\nError: ")
    if ours:
        return message.strip()
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = [line for line in lines if "Error" in line and "File " not in line]
    return (found or lines or ["it said nothing"])[-1][-1500:]


def _tell(out: Path, base: str, world: Any, as_json: bool) -> None:
    from cod_train import progress
    from cod_train.export import exported
    from cod_train.gguf_file import why_not

    done, measured, checkpoint = progress.steps(out), progress.evaluations(out), progress.newest_checkpoint(out)
    model = None
    if checkpoint and not why_not(checkpoint):
        model = exported(checkpoint, out / "model", name=out.name, replace=True).gguf
    try:
        figure: Path | None = progress.draw(out, f"{out.name}, from {base}", out / "train.png")
    except MissingExtra as missing:
        say(f"No figure: {missing}", err=True)
        figure = None
    files = {"figure": figure, "checkpoint": checkpoint, "model": model}
    if as_json:
        curves = {
            str(step): {"positions": [point.json() for point in found.points], "overall": found.overall.json()}
            for step, found in measured.items()
        }
        trained = [{"step": step.number, "reward": step.rewards, "seconds": step.seconds} for step in done]
        shown = {name: str(path) for name, path in files.items() if path}
        print_json({"steps": trained, "evaluations": curves, "files": shown})
        return
    if measured:
        console().print(_table(measured, world))
    say(f"Files: {', '.join(str(path) for path in files.values() if path)}")
    if model is not None:
        worlds = world if isinstance(world, str) else ",".join(world)
        say(f"Look at it: {command_line('cod', 'eval', worlds, '--model', f'gguf:{model}')}")


def _table(measured: dict[int, Any], world: Any) -> Any:
    from rich.table import Table

    worlds = world if isinstance(world, str) else f"{', '.join(world)} together"
    table = Table(title=f"Reward by position on held-out packs of {worlds}, 95% intervals", title_justify="left")
    table.add_column("after step", justify="right")
    positions = max(len(found.points) for found in measured.values())
    for position in range(positions):
        table.add_column(f"task {position + 1}")
    table.add_column("all")
    for step, found in measured.items():
        cells = [f"{point.mean:.2f} [{point.low:.2f}, {point.high:.2f}]" for point in (*found.points, found.overall)]
        table.add_row(str(step), *cells)
    return table
