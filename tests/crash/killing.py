"""Lives that end before their time, one after another: what each must leave, and what must come of it.

`python -m crash.killing FOLDER` reads trials, a line of JSON each, and answers each with a line. A trial says how the first attempts
to live end; the last one is left alone. Every attempt is a fork of a process that has imported everything: it costs little.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from cod_agent.errors import StoreError, StoreFull, UsageError
from cod_agent.memory import database
from cod_agent.memory.projection import projection
from cod_agent.memory.verify import verify
from crash import disk, life, points, power

FLIGHT = 3
"""Model calls in the air at once: two of the clerk's, one of the walker's."""
PATIENCE = 120


@dataclass(frozen=True)
class End:
    """How an attempt to live ends. Exactly one of these, or none: at its own end."""

    dies: int = 0
    """Killed at this point."""
    statements: tuple[int, int] = (0, 0)
    """The store's statements fail in this range of points."""
    writes: tuple[int, int] = (0, 0)
    """What SQLite writes and syncs fails from this one to before that one."""
    full: bool = True
    """Failing means a full disk; else it means I/O errors."""
    longest: int = 0
    """The system lets no file grow beyond so many bytes."""
    space: int = 0
    """The file system, a small one, has so many bytes left."""


LEFT_ALONE = End()


@dataclass(frozen=True)
class Trial:
    """Attempts to live that end, then one that does not."""

    ends: tuple[End, ...]
    threads: bool = False
    """Commits are made by a worker thread, as on a slow disk."""


@dataclass
class Verdict:
    """What came of a trial."""

    ended: list[str] = field(default_factory=list)
    """Of each attempt: killed, full (StoreFull was raised) or done."""
    wrong: list[str] = field(default_factory=list)
    doubts: int = 0
    """Tools that were in doubt and were not run again."""
    lost: int = 0
    """Rows whose commit was acknowledged and that a cut took, of a file that is not durable."""


def ended(folder: Path, end: End = LEFT_ALONE, threads: bool = False, doubts: Sequence[str] = ()) -> str:
    """Live in a fork, and say how it ended.

    Raises:
        RuntimeError: in a way that is none of these.
    """
    with _little_space(folder.parent, end.space) if end.space else nullcontext():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(PATIENCE)
                code = _live(folder, end, threads, doubts)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 3):
        return "full" if os.WEXITSTATUS(status) else "done"
    raise RuntimeError(f"{end}: ended with {status}")


@contextmanager
def _little_space(folder: Path, left: int) -> Iterator[None]:
    """Have only so many bytes left where the folder is."""
    found = os.statvfs(folder)
    with (folder / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, found.f_bavail * found.f_frsize - left)
    try:
        yield
    finally:
        (folder / "filler").unlink()


def _live(
    folder: Path,
    end: End = LEFT_ALONE,
    threads: bool = False,
    doubts: Sequence[str] = (),
    durable: bool = True,
    watched: bool = False,
) -> int:
    database._SLOW_SECONDS = -1.0 if threads else 1e9
    words = "database or disk is full" if end.full else "disk I/O error"
    if end != LEFT_ALONE or watched:
        points.watch_store()
        disk.DISK.install()
    points.order(end.dies, (*end.statements, words))
    if end.longest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (end.longest, end.longest))
    failing = disk.failing(*end.writes, end.full) if end.writes != (0, 0) else nullcontext()
    try:
        with failing:
            life.live(folder, doubts, durable)
    except (StoreFull, ExceptionGroup) as error:
        if isinstance(error, ExceptionGroup) and error.split(StoreFull)[1] is not None:
            raise
        return 3
    return 0


class Judge:
    """Knows the life nothing happened to, and judges the others by it.

    Args:
        folder: of its own; best in memory, for it is not the disk that is tested here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        whole = self._fresh("whole")
        life.live(whole)  # here, and not in a fork: what is imported on the way is there for all
        gc.collect()
        gc.freeze()
        self.whole = {(): projection(whole / "life.db")}
        """What the file must say at the end, by the tools that are left in doubt."""
        self._operations: dict[bool, list[disk.Op]] = {}
        self.calls = len(life.Log(whole / "log").lines("call"))
        if _recorded(whole)[0] != self.calls:
            raise RuntimeError("the uninterrupted life did not record what it did")

    def points(self) -> tuple[int, Counter[str]]:
        """How many points a whole life has, and of which kinds."""
        counted, told = self._fresh("counted"), os.pipe()
        pid = os.fork()
        if pid == 0:
            _live(counted, watched=True)
            os.write(told[1], json.dumps(points.kinds).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        kinds = Counter(json.loads(os.read(told[0], 10000)))
        return kinds.total(), kinds

    def judge(self, trial: Trial) -> Verdict:
        folder, verdict = self._fresh("trial"), Verdict()
        log = life.Log(folder / "log")
        recorded, made, doubtful = 0, 0, set[str]()
        for end in (*trial.ends, LEFT_ALONE):
            verdict.ended.append(ended(folder, end, trial.threads))
            whole = verdict.ended[-1] == "done"
            before, made_before = recorded, made
            recorded, _, started = _recorded(folder if whole else self._copied(folder, verdict))
            made = len(log.lines("call"))
            doubtful |= started
            new, now = recorded - before, made - made_before
            if not new <= now <= new + (0 if whole else FLIGHT):
                verdict.wrong.append(f"{now} calls were made and {new} recorded")
        if verdict.ended[-1] == "done":
            self._compare(folder, log, doubtful, verdict)
        else:
            verdict.wrong.append(f"left alone, it ended with {verdict.ended[-1]}")
        return verdict

    def cut(self, order: power.Cut) -> Verdict:
        """What comes of a file whose machine lost its power."""
        ops = self._ops(order.durable)
        found = power.cut(ops, order.at % (len(ops) + 1), Random(order.seed))
        folder, verdict = self._fresh("trial"), Verdict(["cut"])
        for name, content in found.files.items():
            (folder / name).write_bytes(content)
        log = (self.folder / f"recorded-{order.durable}" / "log").read_text().splitlines(keepends=True)
        (folder / "log").write_text("".join(log[: found.lines]))
        copy = self._copied(folder, verdict)
        rows = _rows(copy) if (copy / "life.db").exists() else (0,) * len(power.TABLES)
        verdict.lost = sum(max(0, then - now) for now, then in zip(rows, found.acknowledged, strict=True))
        if order.durable and verdict.lost:
            verdict.wrong.append(f"{found.acknowledged} rows were acknowledged, {rows} are there")
        if order.resumed:
            doubtful = _recorded(copy)[2]
            verdict.ended.append(ended(folder))
            if order.durable:  # else what was done and forgotten is done again
                self._compare(folder, life.Log(folder / "log"), doubtful, verdict)
            elif projection(folder / "life.db") != self._expected(_recorded(folder)[1]):
                verdict.wrong.append("the life went on another way")
        return verdict

    def _ops(self, durable: bool) -> list[disk.Op]:
        if durable not in self._operations:
            folder = self._fresh(f"recorded-{durable}")
            self._operations[durable] = power.recorded(folder, lambda: _live(folder, durable=durable, watched=True))
        return self._operations[durable]

    def _copied(self, folder: Path, verdict: Verdict) -> Path:
        """A copy of what an attempt left, to look at: opening the file itself would mend it."""
        copy = self._fresh("copy")
        for name in ("life.db", "life.db-wal", "life.db-journal"):
            if (folder / name).exists():
                shutil.copy(folder / name, copy / name)
        if (copy / "life.db-journal").exists():  # who may only read cannot take a half transaction back
            _recorded(copy)
        try:
            verdict.wrong += [f"as it was left: {said}" for said in verify(copy / "life.db").faults]
        except (StoreError, UsageError) as error:
            if not any(said in str(error) for said in ("is empty", "no file")):
                verdict.wrong.append(f"as it was left: {error}")
        return copy

    def _compare(self, folder: Path, log: life.Log, doubtful: set[str], verdict: Verdict) -> None:
        _, tools, _ = _recorded(folder)
        ran = Counter(" ".join(line.split()[1:3]) for line in log.lines("tool"))
        doubts = _doubts(tools)
        verdict.doubts = len(doubts)
        for said in tools:
            allowed = len(verdict.ended) if said.startswith("look") else 1
            if ran[said] > allowed or (not ran[said] and said not in doubts):
                verdict.wrong.append(f"{said} ran {ran[said]} times")
        if not doubtful.issuperset(doubts):
            verdict.wrong.append(f"in doubt without a reason: {set(doubts) - doubtful}")
        found = projection(folder / "life.db")
        if found != (whole := self._expected(tools)):
            differ = [said for said in found if said not in whole]
            verdict.wrong.append(f"{len(differ)} entries differ from the uninterrupted life's: {str(differ[:1])[:300]}")
        verdict.wrong += verify(folder / "life.db").faults

    def _expected(self, tools: dict[str, str]) -> list[Any]:
        """What the file must say, given which tools were in doubt and which of two at once came to be recorded first: either may."""
        chosen = _doubts(tools)
        order = list(tools)
        for book in (said for said in order if said.startswith("book")):
            look = book.replace("book", "look")
            if look in order and order.index(look) > order.index(book):
                chosen += (f"{look} late",)
            elif book in chosen:
                chosen += (f"{book} late",)
        if chosen not in self.whole:
            other = self._fresh("doubts")
            ended(other, doubts=chosen)
            self.whole[chosen] = projection(other / "life.db")
        return self.whole[chosen]

    def _fresh(self, name: str) -> Path:
        made = self.folder / name
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        return made


def _doubts(tools: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(said for said, result in tools.items() if life.DOUBT in result))


def _rows(folder: Path) -> tuple[int, ...]:
    with closing(sqlite3.connect(folder / "life.db")) as conn:
        if not conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempts'").fetchone():
            return (0,) * len(power.TABLES)
        return tuple(conn.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in power.TABLES)


def _recorded(folder: Path) -> tuple[int, dict[str, str], set[str]]:
    """(number of calls, result of each tool run, tool runs that were started and are not recorded)."""
    with closing(sqlite3.connect(folder / "life.db")) as conn:
        if not conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempts'").fetchone():
            return 0, {}, set()
        calls = conn.execute("SELECT count(*) FROM calls").fetchone()[0]
        effects = conn.execute("SELECT name, arguments, result FROM effects WHERE kind = 'tool' ORDER BY id").fetchall()
        started = conn.execute(
            "SELECT a.request, a.occurrence, e.position FROM attempts a JOIN episodes e ON e.id = a.episode_id"
            " WHERE a.state = 'started' AND NOT EXISTS (SELECT 1 FROM effects x WHERE x.episode_id = a.episode_id"
            " AND x.request = a.request AND x.occurrence = a.occurrence)"
        ).fetchall()
    names = [f"{'book' if position % 2 else 'pay'} errand-{position}" for _, _, position in started]
    return calls, {f"{name} {json.loads(said)['what']}": result for name, said, result in effects}, set(names)


class Jury:
    """Judges in processes of their own, each with a core."""

    def __init__(self, folder: Path, processes: int) -> None:
        command = [sys.executable, "-m", "crash.killing"]
        here = str(Path(__file__).parent.parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)])}
        self.judges = [
            subprocess.Popen(
                [*command, str(folder / str(n))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
            )
            for n in range(processes)
        ]
        counted = [json.loads(self._line(judge)) for judge in self.judges]
        self.points, self.kinds = counted[0]

    @staticmethod
    def _line(judge: subprocess.Popen[str]) -> str:
        assert judge.stdout is not None
        line = judge.stdout.readline()
        if not line:
            raise RuntimeError("a judge is gone: what it said last stands above")
        return line

    def judge(self, trials: Sequence[Trial | power.Cut]) -> Iterator[tuple[Trial | power.Cut, Verdict]]:
        """A verdict for each trial, in order."""
        several = len(self.judges)
        for at in range(0, len(trials), several):
            now = list(zip(trials[at : at + several], self.judges, strict=False))
            for trial, judge in now:
                assert judge.stdin is not None
                judge.stdin.write(json.dumps([isinstance(trial, Trial), asdict(trial)]) + "\n")
                judge.stdin.flush()
            for trial, judge in now:
                yield trial, Verdict(**json.loads(self._line(judge)))

    def __enter__(self) -> Jury:
        return self

    def __exit__(self, *_: object) -> None:
        for judge in self.judges:
            assert judge.stdin is not None and judge.stdout is not None
            judge.stdin.close()
            judge.wait()
            judge.stdout.close()


def _asked(line: str) -> Trial | power.Cut:
    is_trial, said = json.loads(line)
    if not is_trial:
        return power.Cut(**said)
    ends = [{name: tuple(is_) if isinstance(is_, list) else is_ for name, is_ in end.items()} for end in said["ends"]]
    return Trial(tuple(End(**end) for end in ends), said["threads"])


def _serve(folder: Path) -> None:
    judge = Judge(folder)
    print(json.dumps(judge.points()), flush=True)
    for line in sys.stdin:
        asked = _asked(line)
        verdict = judge.judge(asked) if isinstance(asked, Trial) else judge.cut(asked)
        print(json.dumps(asdict(verdict)), flush=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
