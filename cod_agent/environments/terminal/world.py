"""Terminal as an environment: two simulated computers, a job that a command line does, and, in some presets, a world that a pack shares.

Every turn is one line for the shell. When all that the job asks for is true of the two hosts, the reward is 1; when the steps run out
before that, it is 0. In `paper` and `paper-hard` every task has computers of its own, as published: what carries over is how to
use a shell. In `small` and `paper-shared` the tasks of a pack take place on the same two computers (see `places.Estate`), and tasks
speak of things by what they mean, so that what was found out (where things lie, how they are called, what is peculiar) helps later.

Two forms say the same thing. The natural one explains itself; the compact one is

    upload invoices/3 invoices - @srv     the job (see `jobs`), then the system, the server and how many steps there are
    linux 192.168.1.23 6
    anna@pc:~$                            the prompt; the agent answers with a command line
    ls ~/alpha                            the agent
    maple/  opal/                         the world: what the line printed, and the prompt again
    anna@pc:~$

A malformed answer ends the episode with reward 0, as in the published environment.
"""

from __future__ import annotations

from functools import lru_cache

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place
from cod_agent.environments.draws import randomness
from cod_agent.environments.terminal.commands import ALIASES, COMMANDS
from cod_agent.environments.terminal.filesystem import Host
from cod_agent.environments.terminal.places import (
    LOGIN,
    PRESETS,
    Estate,
    Preset,
    Scene,
    draw_estate,
    estate_hosts,
    lone_scene,
    shared_scene,
)
from cod_agent.environments.terminal.players import PLAYERS
from cod_agent.environments.terminal.shell import Shell
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation

WORLD = "terminal"
LONGEST_ANSWER = 1000
MOST_COMMANDS = 12
"""Of a line."""
LONGEST_SUMMARY = 2400

RULES = """\
You work at the terminal of a computer, and one job is to be done there, or on a server that you reach over the network. Both are \
simulated, and forget everything after the task. Each turn you give one line for the shell and see what it prints, \
and the prompt. The task ends with success as soon as everything that was asked for is true.

There are 21 commands: ls cd pwd cat mkdir chmod cp mv rm touch echo whoami ssh exit scp rsync tar zip unzip gzip gunzip. A computer with \
Windows also has dir type copy move del md rd ren, but not chmod touch rsync tar gzip gunzip. Files go from one computer \
to the other with scp or rsync, which are to be started on your own computer, never on the server. `ssh user@host` logs in at the server \
and `exit` leaves it; `ssh user@host "command"` runs one line there. Commands may be joined with && and ;, but there are no pipes and no \
redirections. ~ and variables are expanded, and so are * and ? in the last part of a path. Listings show 50 \
entries at most, a transfer takes 8 files and folders at most, and there is no ls -R and no find.

{sharing}

{steps}

Answer each turn with one command line between answer tags, for example:
<answer>ls -l ~</answer>
Anything else ends the task without success."""

_ALONE = "The computers are other ones in every task. Where a file lies that is named without its directory you have to look up."
_SHARED = (
    "All tasks of this series take place on the same two computers, which are as before again at the beginning of every task. Files lie "
    "in directories below your home directory, and on the server below /srv, two levels deep. A directory holds the files of one subject, "
    "at most one a month: not every month is there, and some are kept as an archive that holds the file. Every file is named in the same "
    "way. Where which subject lies, how files are named, and what is peculiar about these computers nobody tells you, except that "
    "{login} in your home directory says which account on the server is yours. "
    "What you find out helps in later tasks. A file that is moved, copied, uploaded or packed keeps its name."
)
_BY_LINE = "You have {steps} turns."
_BY_COMMAND = "You have {steps} steps. Every command of a line is a step, also one that ssh runs on the server."

_ENDS = {
    "done": "Success: everything that was asked for is done.",
    "steps": "You ran out of steps before everything was done.",
    MALFORMED: "The answer was malformed: {reason}.",
}


def parse_answer(answer: object, form: Form) -> tuple[str, str]:
    """The line for the shell in an answer, and "" or what is wrong with it."""
    if not isinstance(answer, str):
        return "", "it is no text"
    line = answer.strip() if form == "compact" else tagged(answer)
    if line is None:
        return "", "one command line between answer tags was expected"
    if not line:
        return "", "it is empty"
    if len(line) > LONGEST_ANSWER:
        return "", f"it is longer than {LONGEST_ANSWER} characters"
    if len(line.splitlines()) > 1:
        return "", "it has several lines, one was expected"
    line = line.replace("\t", " ")
    return (line, "") if line.isprintable() else ("", "it holds a character that cannot be typed")


class TerminalSession:
    """One job at a terminal; all state of the task is here.

    Args:
        scene: what the task begins with; it is copied, not changed.
        counts: whether every command of a line is a step.
        told: what the compact form calls the server.
    """

    def __init__(self, scene: Scene, steps: int, *, counts: bool, told: str, form: Form) -> None:
        self._scene, self._limit, self._counts, self._told, self._form = scene, steps, counts, told, form
        self._begin()

    def _begin(self) -> None:
        local, remote = self._scene.local.copy(), self._scene.remote.copy()
        self._shell = Shell(local, remote, COMMANDS | ALIASES if local.windows else COMMANDS)
        self._used, self._over = 0, False

    def reset(self) -> Observation:
        """Sit down at the terminal."""
        if self._used or self._over:
            self._begin()
        natural, compact = self._scene.job.said
        facts = self._shell.local.facts
        if self._form == "compact":
            return Observation(f"{compact}\n{facts.system} {self._told} {self._limit}\n{self._shell.prompt}")
        system = {"linux": "Linux", "macos": "macOS", "windows": "Windows"}[facts.system]
        where = f"Your computer runs {system}, and you are {facts.user}. The server is {self._told}."
        return Observation(f"{natural}\n\n{where}\n\n{self._standing()}")

    def step(self, answer: str) -> Observation:
        """Run one line; whatever is malformed ends the episode with reward 0.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this job is behind you: the episode is over, start the task again to do it once more")
        line, reason = parse_answer(answer, self._form)
        if reason:
            return self._end(MALFORMED, "", "", reason)
        prompt = self._shell.prompt
        left = self._limit - self._used
        result = self._shell.run(line, min(left, MOST_COMMANDS) if self._counts else MOST_COMMANDS, self._done)
        self._used += max(1, result.count) if self._counts else 1
        shown = f"{prompt} {line}\n{result.text}" if self._form == "compact" else result.text or "(nothing printed)"
        summary = shown.rstrip("\n")
        if len(summary) > LONGEST_SUMMARY:
            summary = summary[:LONGEST_SUMMARY] + " ..."
        if self._done():
            return self._end("done", result.text, summary)
        if self._used >= self._limit:
            return self._end("steps", result.text, summary)
        printed = f"{result.text}\n" if result.text else ""
        return Observation(f"{printed}{self._standing() if self._form == 'natural' else self._shell.prompt}", summary)

    def _standing(self) -> str:
        return f"Step {self._used + 1} of {self._limit}.\n{self._shell.prompt}"

    def _done(self) -> bool:
        shell = self._shell
        return all(check.holds(shell.remote if check.remote else shell.local) for check in self._scene.job.checks)

    def _end(self, how: str, text: str, summary: str, reason: str = "") -> Observation:
        self._over = True
        said = _ENDS[how].format(reason=reason)
        told = said if self._form == "natural" else "invalid" if how == MALFORMED else how
        feedback = Feedback(reward=float(how == "done"), text=told, ending=how)
        return Observation("\n".join(filter(None, (text, told))), summary or told, done=True, feedback=feedback)


class Terminal(DrawnWorld[Preset]):
    """The world `terminal`; its presets are small and paper-shared, in which the tasks of a pack share two computers, and paper and
    paper-hard, in which they share nothing.

    What is hidden in one split (computers that are shared, or else a task) is never drawn in the other.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)

    def rules(self) -> str:
        preset = self.preset
        sharing = _SHARED.format(login=LOGIN) if preset.rooms else _ALONE
        return RULES.format(
            sharing=sharing, steps=(_BY_COMMAND if preset.counts else _BY_LINE).format(steps=preset.steps)
        )

    def session(self, place: Place) -> TerminalSession:
        preset, scene = self.preset, _scene(place)
        facts = scene.remote.facts
        told = facts.name if preset.rooms else f"{facts.user}@{facts.name}"
        return TerminalSession(scene, preset.steps, counts=preset.counts, told=told, form=self.form)


@lru_cache(256)
def _scene(place: Place) -> Scene:
    """The beginning of a task; it is only read, so that sessions may share it."""
    names, preset = (WORLD, place.preset, place.split, place.seed, place.pack), PRESETS[place.preset]
    rng = randomness(*names, place.index)
    if not preset.rooms:
        return lone_scene(rng, preset, place.split)
    estate, hosts = _estate(place.preset, place.split, place.seed, place.pack)
    return shared_scene(rng, preset, estate, hosts, place.index)


@lru_cache(256)
def _estate(preset: str, split: Split, seed: int, pack: int) -> tuple[Estate, tuple[Host, Host]]:
    estate = draw_estate(randomness(WORLD, preset, split, seed, pack, "estate"), PRESETS[preset], split)
    return estate, estate_hosts(estate)
