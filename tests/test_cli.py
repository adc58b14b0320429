"""The `cod` command as a person uses it: what it prints, how it ends, that it goes on after what stopped it."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from servers import Fault, ScriptedServer
from typer.testing import CliRunner

import cod_agent.cli
from cod_agent.memory import database
from cod_agent.memory.projection import projection
from cod_agent.memory.schema import APPLICATION_ID

PERFECT = ("--model", "scripted:perfect")
LAKE = "frozen-lake:small"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Commands run in an empty folder and know no endpoint; of one in trouble they ask again soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cod_agent.models.openai.FIRST_WAIT", 0.01)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path


def cod(*words: object, code: int = 0) -> Any:
    """Run a command in this process; `stdout` and `stderr` of what comes back."""
    result = CliRunner().invoke(cod_agent.cli.app, [str(word) for word in words], prog_name="cod")
    assert result.exit_code == code, f"{result.exit_code}: {result.stdout}{result.stderr}{result.exception!r}"
    return result


def process(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "cod_agent.cli", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(), **options)


def environment() -> dict[str, str]:
    """For processes that find the package where this one found it."""
    return {**os.environ, "PYTHONPATH": str(Path(cod_agent.cli.__file__).parents[2])}


def count(path: str | Path, table: str = "calls") -> int:
    with sqlite3.connect(path) as conn:
        return int(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


# ---- help ----


@pytest.mark.parametrize(
    "command",
    [("demo",), ("run",), ("eval",), ("verify",), ("context", "log"), ("context", "show"), ("context", "diff")],
)
def test_every_command_has_help_with_an_example_and_json(command: tuple[str, ...]) -> None:
    said = cod(*command, "--help").stdout
    assert f"Example: cod {' '.join(command)}" in said
    assert "--json" in said


def test_the_version_is_said() -> None:
    assert cod("--version").stdout == f"connect-the-dots {cod_agent.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nimport cod_agent.cli\n"
        "assert CliRunner().invoke(cod_agent.cli.app, ['--help']).exit_code == 0\n"
        "print(sorted({'numpy', 'openai', 'httpx', 'httpx2', 'xllamacpp', 'matplotlib', 'torch'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert said.stdout == "[]\n"


@pytest.mark.parametrize(
    "words", [("run", LAKE, "--bogus"), ("frobnicate",), ("run", LAKE, "--packs", "many"), ("verify",)]
)
def test_a_command_line_nobody_understands_ends_with_2(words: tuple[str, ...]) -> None:
    assert cod(*words, code=2).stdout == ""


# ---- run, context, verify ----


def test_run_says_a_line_a_task_and_sums_up() -> None:
    said = cod("run", LAKE, *PERFECT, "--packs", 3, "--db", "lake.db").stdout
    lines = [line for line in said.splitlines() if line.startswith(f"{LAKE}/eval/1/")]
    assert len(lines) == 12
    assert all("reward 0" in line or "reward 1" in line for line in lines)
    assert "3 packs of 4 lived" in said and "9 contexts written" in said
    assert "\x1b[" not in said
    assert "agrees with itself" in cod("verify", "lake.db").stdout


def test_run_says_how_a_task_ended_that_was_no_success() -> None:
    Path("mute.py").write_text(
        "from cod_agent import Feedback, Observation, Pack, Task\n"
        "ENDINGS = [(0.0, 'malformed'), (float('nan'), 'unjudged'), (0.0, ''), (1.0, 'goal')]\n"
        "class World:\n"
        "    name, form = 'mute', 'compact'\n"
        "    def __init__(self, **_): self.players = {'perfect': lambda dice: lambda said: ''}\n"
        "    def pack(self, n, index=0):\n"
        "        return Pack(f'mute/{index}', tuple(Task(id=f'{index}-{at}', data={'at': at}) for at in range(n)), self)\n"
        "    def start(self, task):\n"
        "        session = World()\n"
        "        session.end = ENDINGS[task.data['at']]\n"
        "        return session\n"
        "    def reset(self): return Observation('say')\n"
        "    def step(self, answer):\n"
        "        reward, ending = self.end\n"
        "        return Observation('', done=True, feedback=Feedback(reward=reward, text='', ending=ending))\n"
    )
    said = cod("run", "mute:World", *PERFECT, "--packs", 1, "--db", "mute.db").stdout
    told = [
        line.partition("reward ")[2].partition(",")[0] for line in said.splitlines() if line.startswith("mute/0 task")
    ]
    assert told == ["0 (malformed)", "lost (unjudged)", "0", "1"]
    assert "1 of 4 rewards is lost, and left out: 1 unjudged." in said
    assert "1 of 4 tasks ended with an answer that said nothing the world understands" in said
    again = json.loads(cod("run", "--resume", "--db", "mute.db", "--json").stdout)
    assert [task["ending"] for task in again["tasks"]] == ["malformed", "unjudged", "", "goal"]


def test_a_suite_is_no_world_to_run() -> None:
    said = cod("run", "tiny", *PERFECT, code=1).stderr
    assert "a suite of cod eval" in said and "frozen-lake:small, alchemy:tiny" in said and not Path("cod.db").exists()


def test_json_is_all_there_is_on_standard_output() -> None:
    said = json.loads(cod("run", LAKE, *PERFECT, "--packs", 2, "--json").stdout)
    assert said["world"] == LAKE and len(said["tasks"]) == 8 and len(said["positions"]) == 4
    assert json.loads(cod("verify", "cod.db", "--json").stdout)["ok"]
    assert len(json.loads(cod("context", "log", "cod.db", "--json").stdout)["runs"]) == 2


def test_resume_needs_nothing_but_the_file() -> None:
    cod("run", LAKE, *PERFECT, "--packs", 2, "--pack-size", 3, "--seed", 5, "--agent", "ann", "--db", "lake.db")
    before = projection("lake.db")
    said = cod("run", "--resume", "--db", "lake.db").stdout
    assert "(6 tasks had been lived before)" in said
    assert projection("lake.db") == before
    cod("run", "--resume", "--db", "lake.db", "--packs", 3)
    assert count("lake.db", "runs") == 3
    one = json.loads(cod("run", "--resume", "--db", "lake.db", "--run", f"{LAKE}/eval/5/1", "--json").stdout)
    assert (one["packs"], len(one["tasks"]), one["lost"]) == (1, 3, 0)


def test_what_is_recorded_for_training_is_not_measured() -> None:
    said = json.loads(cod("run", LAKE, *PERFECT, "--split", "train", "--packs", 2, "--db", "lake.db", "--json").stdout)
    assert said["split"] == "train" and {task["run"] for task in said["tasks"]} == {
        f"{LAKE}/train/1/{n}" for n in (0, 1)
    }
    assert json.loads(cod("run", "--resume", "--db", "lake.db", "--packs", 3, "--json").stdout)["split"] == "train"
    assert count("lake.db", "runs") == 3
    assert "split train, not eval" in cod("run", "--resume", "--db", "lake.db", "--split", "eval", code=1).stderr
    refused = cod("eval", "--resume", "--db", "lake.db", code=1).stderr
    assert "nothing is measured there" in refused and "cod run --resume --db lake.db" in refused


def test_resume_refuses_to_change_what_is_lived() -> None:
    cod("run", LAKE, *PERFECT, "--packs", 1, "--db", "lake.db")
    for flags in (("--model", "embedded"), ("--seed", 9), ("--pack-size", 7)):
        assert "leave that out to resume" in cod("run", "--resume", "--db", "lake.db", *flags, code=1).stderr
    assert "choose another file" in cod("run", LAKE, "--model", "scripted:memoryless", "--db", "lake.db", code=1).stderr
    assert "there is no file none.db" in cod("run", "--resume", "--db", "none.db", code=1).stderr
    assert not Path("none.db").exists()


def test_the_history_of_a_context() -> None:
    cod("run", LAKE, *PERFECT, "--packs", 2, "--db", "lake.db")
    listed = cod("context", "log", "lake.db").stdout
    assert f"{LAKE}/eval/1/0" in listed and "2 runs" in listed
    named = ("lake.db", "--run", f"{LAKE}/eval/1/0")
    log = json.loads(cod("context", "log", *named, "--json").stdout)
    assert [step["update"] for step in log["steps"]] == ["written", "written", "written", "none"]
    assert all(step["weights"] == "scripted:perfect" for step in log["steps"][:3])
    assert "scripted:perfect" in cod("context", "log", *named).stdout
    shown = cod("context", "show", *named, "--version", 1).stdout
    assert shown == log["steps"][0]["body"] + "\n"
    assert cod("context", "show", *named, "--version", 0).stdout == "\n"
    first = cod("context", "diff", *named, "--version", 0, "--version", 1).stdout
    assert first.startswith("--- version 0") and "+" + shown.splitlines()[0] in first
    assert json.loads(cod("context", "diff", *named, "--json").stdout)["to"]["version"] == 3


def test_the_history_says_what_it_does_not_know() -> None:
    cod("run", LAKE, *PERFECT, "--packs", 2, "--db", "lake.db")
    assert "known are agent" in cod("context", "log", "lake.db", "--agent", "x", code=1).stderr
    assert "did you mean" in cod("context", "log", "lake.db", "--run", f"{LAKE}/eval/1/7", code=1).stderr
    assert "say which by --agent and --run" in cod("context", "show", "lake.db", code=1).stderr
    named = ("lake.db", "--run", f"{LAKE}/eval/1/0")
    assert "it has 0 to 3" in cod("context", "show", *named, "--version", 9, code=1).stderr


def test_verify_names_the_first_fault() -> None:
    cod("run", LAKE, *PERFECT, "--packs", 1, "--db", "lake.db")
    with sqlite3.connect("lake.db") as conn:
        conn.execute("UPDATE contexts SET body = 'Up: Direction 4' WHERE version = 2")
    said = cod("verify", "lake.db", code=1)
    assert "row 3 of contexts is not the one written" in said.stderr and said.stdout == ""
    assert not json.loads(cod("verify", "lake.db", "--json", code=1).stdout)["ok"]


# ---- eval and demo ----


def test_eval_leaves_a_table_a_figure_and_the_evidence() -> None:
    pytest.importorskip("matplotlib")
    command = ("eval", LAKE, *PERFECT, "--packs", 24, "--controls", "no-context,memoryless", "--out", "out")
    said = cod(*command).stdout
    assert "no-context" in said and "last - first" in said and "What the context is worth" in said
    assert Path("out/eval.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("out/eval.json").read_text())
    assert found["controls"].keys() == {"no-context", "memoryless"}
    calls = count("out/runs.db")
    again = json.loads(cod("eval", "--resume", "--out", "out", "--json").stdout)
    assert again["positions"] == found["positions"] and count("out/runs.db") == calls
    assert json.loads(cod(*command, "--json").stdout)["controls"] == found["controls"]


def test_eval_without_controls_lives_one_lane() -> None:
    found = json.loads(cod("eval", LAKE, *PERFECT, "--packs", 2, "--controls", "none", "--out", "out", "--json").stdout)
    assert found["controls"] == {} and found["benefit"] is None
    lived, _ = count("out/runs.db"), cod("eval", "--resume", "--out", "out", "--controls", "none")
    assert count("out/runs.db") == lived


def test_demo_shows_a_story_and_what_it_is_worth() -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("matplotlib")
    said = cod("demo", "--packs", 4).stdout
    for words in (
        "task 4",
        "its note after each task",
        "with context",
        "no-context",
        "95% intervals",
        "cod context log",
    ):
        assert words in said
    assert "\x1b[" not in said
    assert {path.name for path in Path("demo").iterdir()} >= {"demo.db", "demo.json", "demo.png"}
    assert "agrees with itself" in cod("verify", "demo/demo.db").stdout
    said = json.loads(cod("demo", "--packs", 2, "--json").stdout)
    assert said["files"]["database"] == "demo/demo-2.db" and said["model"] == "embedded"


# ---- bad input ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "frozen-lak"), "did you mean frozen-lake"),
        (("run", "frozen-lake:smal"), "did you mean small"),
        (("run", LAKE, "--model", "embeded"), "did you mean embedded"),
        (("run", LAKE, "--model", "scripted:perfekt"), "did you mean scripted:perfect"),
        (("run", LAKE, "--model", "openai"), "lacks its second half"),
        (("run", LAKE, "--model", "gguf:none.gguf"), "none.gguf"),
        (("run", LAKE, *PERFECT, "--form", "compct"), "did you mean compact"),
        (("run", LAKE, *PERFECT, "--split", "trian"), "did you mean train"),
        (("run", LAKE, *PERFECT, "--form", "natural"), "compact form"),
        (("run", LAKE, *PERFECT, "--packs", "0"), "at least 1"),
        (("run", LAKE, *PERFECT, "--exact"), "--exact asks a server"),
        (("run", LAKE, "--model", "openai:x"), "no endpoint is named"),
        (("run",), "name a world"),
        (("eval", LAKE, *PERFECT, "--controls", "no-contxt"), "did you mean no-context"),
        (("verify", "none.db"), "there is no file none.db"),
        (("context", "log", "none.db"), "there is no file none.db"),
    ],
)
def test_what_does_not_exist_is_one_sentence_that_helps(words: tuple[str, ...], said: str) -> None:
    error = cod(*words, code=1).stderr
    assert error.startswith("Error: ") and said in error
    assert "Traceback" not in error


def test_files_that_are_no_run_database() -> None:
    Path("text.db").write_text("once upon a time there was no database " * 40)
    with sqlite3.connect("other.db") as conn:
        conn.execute("CREATE TABLE t (x)")
    with sqlite3.connect("newer.db") as conn:
        conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        conn.execute("PRAGMA user_version = 99")
    for path, said in (
        ("text.db", "not a run database"),
        ("other.db", "another program"),
        ("newer.db", "pip install -U"),
    ):
        before = Path(path).read_bytes()
        for words in (("run", LAKE, *PERFECT, "--db", path), ("verify", path), ("context", "log", path)):
            assert said in cod(*words, code=1).stderr
        assert Path(path).read_bytes() == before


def test_a_locked_database(monkeypatch: pytest.MonkeyPatch) -> None:
    cod("run", LAKE, *PERFECT, "--packs", 1, "--db", "lake.db")
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    holder = sqlite3.connect("lake.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        error = cod("run", "--resume", "--db", "lake.db", "--packs", 2, code=1).stderr
        assert "locked by another program" in error and "cod run --resume --db lake.db" in error
    finally:
        holder.close()
    cod("run", "--resume", "--db", "lake.db", "--packs", 2)


def test_a_full_disk_loses_nothing_that_was_recorded() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    stopped = process("run", LAKE, *PERFECT, "--packs", 64, "--db", "lake.db", preexec_fn=limit)
    _, error = stopped.communicate(timeout=60)
    assert stopped.returncode == 1, error
    assert "cannot be written" in error and "cod run --resume --db lake.db" in error and "Traceback" not in error
    assert "agrees with itself" in cod("verify", "lake.db").stdout
    before = count("lake.db")
    assert before > 0
    said = cod("run", "--resume", "--db", "lake.db").stdout
    assert "64 packs of 4 lived" in said and count("lake.db") > before
    assert "agrees with itself" in cod("verify", "lake.db").stdout


# ---- endpoints ----


def player(request: dict[str, Any], n: int) -> str:
    """Plays badly, and notes it well."""
    if "Write the new note" in request["messages"][-1]["content"]:
        return "<context>\nDirection 1 was tried.\n</context>"
    return "<answer>1</answer>"


def test_an_endpoint_that_is_not_there() -> None:
    with ScriptedServer() as server:
        port = server.port
    endpoint = ("--model", "openai:x", "--base-url", f"http://127.0.0.1:{port}/v1")
    error = cod("run", LAKE, *endpoint, "--packs", 1, "--db", "lake.db", code=1).stderr
    assert "cannot reach" in error and "cod run --resume --db lake.db" in error
    with ScriptedServer(player, port=port):
        assert "1 pack of 4 lived" in cod("run", "--resume", "--db", "lake.db").stdout


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=401), "set OPENAI_API_KEY"),
        (Fault(status=404), "404"),
        (Fault(status=429, retry_after=0.01), "resume later"),
        (Fault(status=500, retry_after=0.01), "resume later"),
        (Fault(garbage=b"<html>a login page</html>"), "not JSON"),
    ],
)
def test_an_endpoint_in_trouble_stops_the_run_and_resume_goes_on(fault: Fault, said: str) -> None:
    broken = [False]

    def reply(request: dict[str, Any], n: int) -> Any:
        broken[0] = broken[0] or n >= 5
        return fault if broken[0] else player(request, n)

    with ScriptedServer(reply) as server:
        words = ("run", LAKE, "--model", "openai:x", "--base-url", server.url, "--packs", 2, "--db", "lake.db")
        error = cod(*words, "--concurrency", 1, code=1).stderr
        assert error.startswith("Error: ") and said in error and "cod run --resume --db lake.db" in error
        assert count("lake.db") == 5 and count("lake.db", "attempts") >= 1
        server.reply = player
        asked = server.count
        cod("run", "--resume", "--db", "lake.db")
        assert server.count - asked == count("lake.db") - 5
    assert "agrees with itself" in cod("verify", "lake.db").stdout


def test_a_key_is_sent_and_never_stored() -> None:
    with ScriptedServer(player) as server:
        endpoint = ("--model", "openai:x", "--base-url", server.url, "--api-key", "sk-very-secret")
        sampling = ("--exact", "--stream", "--timeout", 20, "--max-tokens", 99, "--temperature", 0.5)
        cod("run", LAKE, *endpoint, *sampling, "--packs", 1, "--db", "lake.db")
        assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
        request = server.requests[0]
    assert (request["temperature"], request["max_tokens"]) == (0.5, 99)
    assert request["stream"] and request["return_token_ids"]
    for path in Path().glob("lake.db*"):
        assert b"sk-very-secret" not in path.read_bytes()
    with sqlite3.connect("lake.db") as conn:
        assert conn.execute("SELECT count(*) FROM calls WHERE sampled_ids IS NULL").fetchone() == (0,)


# ---- stopped ----


def slow(request: dict[str, Any], n: int) -> str:
    time.sleep(0.02)
    return player(request, n)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_where_it_was(how: signal.Signals) -> None:
    with ScriptedServer(slow) as server:
        words = ("run", LAKE, "--model", "openai:x", "--base-url", server.url, "--packs", 6, "--db", "lake.db")
        stopped = process(*words, "--concurrency", 2)
        while server.count < 20:
            assert stopped.poll() is None, stopped.communicate()
            time.sleep(0.01)
        stopped.send_signal(how)
        _, error = stopped.communicate(timeout=30)
        assert "Traceback" not in error
        if how == signal.SIGINT:
            assert stopped.returncode == 130
            assert "Go on with: cod run --resume --db lake.db" in error
        assert "agrees with itself" in cod("verify", "lake.db").stdout
        recorded, asked = count("lake.db"), server.count
        assert 20 - 2 <= recorded <= asked
        said = json.loads(cod("run", "--resume", "--db", "lake.db", "--json").stdout)
        assert said["packs"] == 6 and len(said["tasks"]) == 24
        assert server.count - asked == count("lake.db") - recorded
    assert "agrees with itself" in cod("verify", "lake.db").stdout


# ---- commands of other packages ----


def test_other_packages_add_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        dist = SimpleNamespace(name="somebody's package")

        def __init__(self, app: Any) -> None:
            self.app = app

        def load(self) -> Any:
            if isinstance(self.app, Exception):
                raise self.app
            return self.app

    app = typer.Typer()

    @app.command()
    def greet(name: str) -> None:
        """Say hello."""
        typer.echo(f"hello {name}")

    found = {"greet": Entry(app), "broken": Entry(ImportError("no module named torch"))}
    monkeypatch.setattr(cod_agent.cli, "_others", lambda: found)
    assert cod("greet", "Ann").stdout == "hello Ann\n"
    said = cod("--help").stdout
    assert "greet" in said and "broken" in said and "verify" in said
    assert (
        "somebody's package cannot be loaded: ImportError: no module named torch"
        in cod("broken", "--any", code=1).stderr
    )


def test_a_command_that_is_refused_leaves_nothing_behind_and_takes_nothing_away(tmp_path: Path) -> None:
    cod("eval", "frozen-lak", "--packs", "2", code=1)
    cod("run", "frozen-lake", "--model", "nobody", "--db", "deep/lake.db", code=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept.db.backup").write_text("mine")
    cod("run", "frozen-lake:tiny", "--model", "scripted:perfect", "--packs", "1", "--db", "kept.db")
    cod("run", "frozen-lake:small", "--model", "nobody", "--db", "kept.db", code=1)
    assert {path.name for path in tmp_path.iterdir()} >= {"kept.db", "kept.db.backup"}


def test_a_world_of_ones_own_that_raises_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "broken_world.py").write_text(
        "from cod_agent.environments import FrozenLake\n\n\nclass Lake(FrozenLake):\n    def session(self, place):\n"
        "        return 1 / place.index\n\n\ndef lake(**how):\n    return Lake('tiny', **how)\n"
    )
    said = cod(
        "run", "broken_world:lake", "--model", "scripted:perfect", "--db", "lake.db", "--packs", "1", code=1
    ).stderr
    assert "broken_world.py" in said and "ZeroDivisionError" in said and len(said.splitlines()) < 12
    assert "go on with: cod run --resume --db lake.db" in said
