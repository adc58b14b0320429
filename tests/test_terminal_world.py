"""Terminal: jobs that can be done, simulated commands that behave, stable seeds, splits that share nothing, no line that breaks it."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from functools import cache
from random import Random
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_agent.context import COMPACT, NATURAL, message
from cod_agent.environments import make_world
from cod_agent.environments.base import Environment
from cod_agent.environments.draws import randomness
from cod_agent.environments.terminal import PLAYERS, PRESETS, Terminal
from cod_agent.environments.terminal.commands import ALIASES, COMMANDS
from cod_agent.environments.terminal.filesystem import MOST_DEPTH, MOST_NODES, Facts, File, Folder, Host, walk
from cod_agent.environments.terminal.habits import draw_habit, read_name
from cod_agent.environments.terminal.jobs import COMPOSITE, MODES, SINGLE
from cod_agent.environments.terminal.notes import SIDE, Known
from cod_agent.environments.terminal.places import FOLDERS, SUBJECTS, USERS, canonical
from cod_agent.environments.terminal.players import choices, noted
from cod_agent.environments.terminal.shell import Shell, matches, split
from cod_agent.environments.terminal.world import LONGEST_ANSWER, _estate, _scene, parse_answer
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.players import _episode, life, played
from cod_agent.evaluation.statistics import difference
from cod_agent.tasks import Pack, Task

GOLDEN = {
    "small": "a309e28f99faecd78029822f5f7465b360d18a9dbebe2bbd793c2eb56900f8a0",
    "paper": "4401cb25c29429c055a700ffbb09cf57113c0ac887865a263be9d05bf05de938",
    "paper-hard": "e73e128776b83d3e1dda4ebaed4b225833a7f91b8ade84e5cfe14143959dd06e",
    "paper-shared": "424210b906e84a427e533bb8a9671b5c2512ce8facd36a03a49b5a332898073e",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""

NAMED = frozenset(SUBJECTS)
SHARED = [preset for preset, kind in PRESETS.items() if kind.rooms]


def tree(host: Host) -> dict[str, object]:
    """Every path of a host, with content, owner and mode."""
    return {
        "/".join(path): (repr(node.content) if isinstance(node, File) else None, node.owner, node.mode)
        for path, node in walk(host.root)
    }


def estate(pack: Pack):
    return _estate(*(pack.data[key] for key in ("preset", "split", "seed", "pack")))[0]


def scene(world: Terminal, task: Task):
    return _scene(world.place(task))


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    world = make_world("terminal", form="compact")
    assert isinstance(world, Environment) and isinstance(world, Terminal)
    assert (world.name, world.form, world.recovery) == ("terminal:small", "compact", "deterministic")


@pytest.mark.parametrize("wrong", [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}])
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        Terminal(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    shown = []
    for split_of in ("train", "eval"):
        for form in ("natural", "compact"):
            world = Terminal(preset, 7, split=split_of, form=form)
            for pack in world.packs(3, 4):
                for task in pack:
                    found = scene(world, task)
                    shown += [
                        world.start(task).reset().text,
                        tree(found.local),
                        tree(found.remote),
                        repr(found.job.checks),
                    ]
    assert hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest() == GOLDEN[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_longer_pack_begins_with_the_shorter_one(preset):
    world = Terminal(preset, 5, form="compact")
    assert world.pack(8, 2).tasks[:3] == world.pack(3, 2).tasks
    first = [world.start(task).reset().text for task in world.pack(8, 2)]
    assert [world.start(task).reset().text for task in world.pack(3, 2)] == first[:3] and len(set(first)) > 4


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    world = Terminal("small", 5)
    pack = world.pack(3, 1)
    task = Task.model_validate_json(pack[2].model_dump_json())
    assert Terminal("small", 99).start(task).reset() == world.start(pack[2]).reset()
    told, hidden = task.model_dump_json() + json.dumps(pack.data), estate(pack)
    assert hidden.remote.name not in told and not any(subject in told for subject in SUBJECTS)


@pytest.mark.parametrize("preset", PRESETS)
def test_both_forms_are_the_same_pack(preset):
    natural, compact = Terminal(preset, 3), Terminal(preset, 3, form="compact")
    for one, other in zip(natural.pack(4), compact.pack(4), strict=True):
        job = scene(natural, one).job
        assert job is scene(compact, other).job
        assert job.said[0] in natural.start(one).reset().text and job.said[1] in compact.start(other).reset().text


def test_the_tasks_of_a_shared_pack_take_place_on_the_same_computers_and_those_of_others_do_not():
    for preset in PRESETS:
        world = Terminal(preset, 2)
        hosts = {
            json.dumps([tree(found.local), tree(found.remote)]) for found in (scene(world, t) for t in world.pack(6))
        }
        assert len(hosts) == (1 if preset in SHARED else 6)


@pytest.mark.parametrize("preset", PRESETS)
def test_half_of_the_jobs_are_composite(preset):
    world = Terminal(preset, 11)
    verbs = Counter(scene(world, task).job.verb for pack in world.packs(30, 4) for task in pack)
    assert set(verbs) == {*SINGLE, *COMPOSITE}
    assert abs(sum(verbs[verb] for verb in COMPOSITE) / 120 - 0.5) < 0.15


@pytest.mark.parametrize("preset", SHARED)
def test_as_many_tasks_in_a_row_as_there_are_subjects_are_each_about_another_one(preset):
    world, many = Terminal(preset, 4), PRESETS[preset].subjects
    for pack in world.packs(20, 2 * many):
        said = [scene(world, task).job.said[1].split() for task in pack]
        named = [words[2] if words[1] == "-" else words[1].partition("/")[0] for words in said]
        assert len(set(named[:many])) == many and named[many:] == named[:many]
        assert len(set(map(tuple, said))) > 2 * many - 3


def test_the_words_are_as_many_as_the_published_ones():
    assert (len(SINGLE), len(COMPOSITE), len(COMMANDS), len(MODES)) == (9, 8, 21, 8)
    assert (len(set(SUBJECTS)), len(set(FOLDERS)), len(set(USERS))) == (25, 20, 7)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_that_is_hidden_in_one_split_occurs_in_the_other(preset):
    def hidden(split_of):
        world = Terminal(preset, 3, split=split_of)
        if preset in SHARED:
            return {canonical(estate(pack)) for pack in world.packs(24, 1)}
        return {repr(scene(world, task).job) for pack in world.packs(6, 4) for task in pack}

    assert len(hidden("train")) == len(hidden("eval")) == 24 and not hidden("train") & hidden("eval")


# Jobs that can be done


def note_of(pack: Pack) -> str:
    """Everything there is to know of a pack."""
    found = estate(pack)
    hosts = {False: Host(found.local, Folder("")), True: Host(found.remote, Folder(""))}
    known = Known(found.remote.user, "/" + "/".join(found.remote.spool), found.remote.removal, found.tool)
    known.example = found.habit.name(next(iter(found.months)), 1)
    known.shelves = {
        side: {name: hosts[side].shown(path) for name, path in found.shelves[side].items()} for side in SIDE
    }
    return known.text()


@pytest.mark.parametrize("preset", PRESETS)
def test_who_knows_everything_does_every_job_within_the_steps(preset):
    world, verbs = Terminal(preset, 17, form="compact"), set()
    for pack in world.packs(20, 4):
        note = note_of(pack) if preset in SHARED else ""
        assert len(note) < 2_000
        for task in pack:
            episode = _episode(world.start(task), task, note, PLAYERS["perfect"](Random(0)))
            last = episode.turns[-1].observation
            assert last.feedback.reward == 1.0 and last.feedback.ending == "done", scene(world, task).job
            assert preset != "small" or len(episode.turns) <= PRESETS[preset].steps
            verbs.add(scene(world, task).job.verb)
    assert verbs >= set(COMPOSITE)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_job_is_done_before_it_is_begun(preset):
    world = Terminal(preset, 8, form="compact")
    for pack in world.packs(10, 4):
        for task in pack:
            session = world.start(task)
            session.reset()
            assert not session.step("pwd").done


# The shell


def machine(system: str = "linux", **facts: object) -> Host:
    """A computer with an empty home."""
    home = {"linux": ("home", "anna"), "macos": ("Users", "anna"), "windows": ("Users", "anna")}[system]
    root = Folder("root", {home[0]: Folder("root", {home[1]: Folder("anna")})})
    return Host(Facts(system, "pc", "anna", home, **facts), root)


def shell(system: str = "linux", missing: frozenset[str] = frozenset(), removal: str = "", **facts: object) -> Shell:
    """Two computers; facts are the server's."""
    root = Folder("root", {"home": Folder("root", {"ben": Folder("ben")}), "etc": Folder("root")})
    server = Host(Facts("linux", "192.168.1.23", "ben", ("home", "ben"), **facts), root)
    local = machine(system, missing=missing, removal=removal)
    return Shell(local, server, COMMANDS | ALIASES if system == "windows" else COMMANDS)


def said(terminal: Shell, line: str, most: int = 20) -> str:
    return terminal.run(line, most, lambda: False).text


def written(terminal: Shell, path: str, content: str, *, away: bool = False) -> None:
    host = terminal.remote if away else terminal.local
    host.write(host.path(path, host.facts.home), content)


def content(host: Host, path: str) -> object:
    node = host.get(host.path(path, host.facts.home))
    return node.content if isinstance(node, File) else node


def test_listings_look_like_those_of_real_tools_and_are_cut():
    terminal = shell()
    assert said(terminal, "mkdir -p a/b && touch a/x 'a/y z' .hidden && ls a") == "b/  x  'y z'"
    assert said(terminal, "ls") == "a/" and said(terminal, "ls -a") == ".hidden  a/"
    assert said(terminal, "chmod 640 a/x; ls -l a/x a/b") == "-rw-r----- anna 0 a/x\na/b:"
    assert said(terminal, "ls nowhere") == "ls: cannot access 'nowhere': No such file or directory"
    assert said(shell("macos"), "ls nowhere") == "ls: nowhere: No such file or directory"
    for i in range(3):
        said(terminal, "touch " + " ".join(f"f{i}{j:02}" for j in range(25)))
    shown = said(terminal, "ls").split("\n")
    assert len(shown[0].split("  ")) == 50 and shown[1] == "... 26 more entries"
    assert said(terminal, "ls f0* a").count("f0") == 25


def test_words_are_quoted_and_expanded_as_in_a_shell():
    terminal = shell()
    assert said(terminal, r"""echo 'a  b' "c $USER" d\ e '$USER' ~ ~/x "~" $HOME/${USER}2 $NONE. a~ '*'""") == (
        "a  b c anna d e $USER /home/anna /home/anna/x ~ /home/anna/anna2 . a~ *"
    )
    assert said(terminal, "touch ab.txt ac.txt b.md && echo a?.txt *.md ./* x* '*.md'") == (
        "ab.txt ac.txt b.md ./ab.txt ./ac.txt ./b.md x* *.md"
    )
    windows = shell("windows")
    assert said(windows, r'echo %USERNAME% "%USERPROFILE%\a b" %nothing% 50% ~\x $HOME') == (
        r"anna C:\Users\anna\a b %nothing% 50% C:\Users\anna\x $HOME"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("cat a | cat", "pipes"),
        ("echo a > b", "redirections"),
        ("echo a >> b", "redirections"),
        ("cat < b", "redirections"),
        ("ls &", "background"),
        ("mkdir b & mkdir c", "join commands with && or ;"),
        ("ls ./*/*", "./*/*: * and ? work in the last part of a path only"),
        ("rm -r a?/b a", "last part of a path only"),
        ("scp -r ben@192.168.1.23:/home/*/x .", "last part of a path only"),
        ("echo `ls`", "substitution"),
        ("echo $(ls)", "subshells"),
        ("ls || ls", "pipes"),
        ("mkdir -p b/{c,d}", "braces"),
        ("touch [ab].txt", "sets of characters"),
        ("echo 'a", "looking for a matching '"),
        ("&& ls", "unexpected token"),
        ("ls && ; ls", "unexpected token"),
        ("ls &&", "nothing follows &&"),
        ("find . -name x", "find: command not found"),
        ("ls -R", "invalid option -- 'R'"),
        ("ls --all", "unrecognized option"),
    ],
)
def test_what_the_shell_does_not_do_it_says_and_does_not_do(line, reason):
    terminal = shell()
    said(terminal, "mkdir a")
    before = tree(terminal.local)
    assert reason in said(terminal, line) and tree(terminal.local) == before


def test_chains_go_on_after_success_or_in_any_case():
    terminal = shell()
    said(terminal, "cd nowhere && touch a; touch b && touch c ; cat x && touch d")
    assert said(terminal, "ls") == "b  c"
    result = terminal.run("touch 1; touch 2; touch 3", 2, lambda: False)
    assert result.count == 2 and "too many commands" in result.text and said(terminal, "ls") == "1  2  b  c"
    result = terminal.run("touch e; touch f", 9, lambda: terminal.local.get(("home", "anna", "e")) is not None)
    assert result.count == 1 and "f" not in said(terminal, "ls")


def test_the_server_is_reached_with_the_right_account_and_left_again():
    terminal = shell()
    assert said(terminal, "ssh anna@192.168.1.23") == "anna@192.168.1.23: Permission denied (publickey)."
    assert "No route" in said(terminal, "ssh ben@192.168.1.99") and "not logged in" in said(terminal, "exit")
    assert said(terminal, "ssh ben@192.168.1.23; whoami; pwd; mkdir a; cd a") == "ben\n/home/ben"
    assert terminal.prompt == "ben@192.168.1.23:~/a$" and "cannot reach" in said(terminal, "ssh ben@192.168.1.23")
    assert (
        "cannot reach" in said(terminal, "scp x ben@192.168.1.23:y")
        and said(terminal, "exit; whoami") == "logout\nanna"
    )
    assert said(terminal, "ssh -p 22 ben@192.168.1.23 'ls; exit; whoami'") == "a/\nlogout"
    assert terminal.prompt == "anna@pc:~$"
    assert terminal.run("ssh ben@192.168.1.23 'cat x' && touch y", 9, lambda: False).count == 2


def test_windows_has_its_own_names_paths_and_gaps():
    terminal = shell("windows", missing=frozenset({"chmod", "tar"}))
    assert terminal.prompt == r"C:\Users\anna>"
    assert "cannot find" in said(terminal, r"md a\b && copy nothing a")
    written(terminal, r"C:\Users\anna\a\One.txt", "1")
    assert said(terminal, r"ren A\one.TXT two.txt; dir a; type a/two.txt") == "b/  two.txt\n1"
    assert (
        said(terminal, r"copy /Y a\two.txt %USERPROFILE%\three.txt && del a\two.txt && rd /s /q a && dir")
        == "three.txt"
    )
    assert said(terminal, r"cd /D C:\Users && pwd; cd") == r"C:\Users" and "too many" in said(terminal, "cd /d a b")
    assert "join commands with && or ;" in said(terminal, "dir & type three.txt")
    assert r"C:\*\anna: * and ?" in said(terminal, r"dir C:\*\anna")
    assert "not recognized" in said(terminal, "chmod 600 three.txt") and "drive" in said(terminal, r"type D:\x")
    assert said(terminal, r"scp C:\Users\anna\three.txt ben@192.168.1.23:") == ""
    assert content(terminal.remote, "three.txt") == "1"


@pytest.mark.parametrize("tool", ["scp", "rsync"])
def test_files_go_both_ways(tool):
    terminal = shell()
    written(terminal, "a.txt", "A")
    said(terminal, "mkdir d; cp a.txt d")
    flags = "-r" if tool == "scp" else "-av"
    assert said(terminal, f"{tool} {flags} a.txt d ben@192.168.1.23:") == ""
    assert content(terminal.remote, "a.txt") == content(terminal.remote, "d/a.txt") == "A"
    assert said(terminal, f"{tool} ben@192.168.1.23:~/d/*.txt b.txt && cat b.txt") == "A"
    assert "No such file" in said(terminal, f"{tool} ben@192.168.1.23:x .")
    assert "exactly one side" in said(terminal, f"{tool} a.txt b.txt")
    assert "exactly one side" in said(terminal, f"{tool} ben@192.168.1.23:a.txt ben@192.168.1.23:b.txt")
    assert "publickey" in said(terminal, f"{tool} a.txt 192.168.1.23:x")
    assert "Permission denied" in said(terminal, f"{tool} a.txt ben@192.168.1.23:/etc/")


def test_rsync_copies_what_is_in_a_folder_and_makes_the_one_it_goes_to():
    terminal = shell()
    written(terminal, "a.txt", "A")
    said(terminal, "mkdir d; mv a.txt d; rsync -a d/ ben@192.168.1.23:new; rsync -av d/a.txt ben@192.168.1.23:other/")
    assert content(terminal.remote, "new/a.txt") == content(terminal.remote, "other/a.txt") == "A"
    assert "-r copies directories" in said(terminal, "rsync d ben@192.168.1.23:")


def test_pitfalls_say_what_to_do_instead():
    terminal = shell(removal="force", spool=("home", "ben", "in"))
    written(terminal, "a.txt", "A")
    terminal.remote.make_folder(("home", "ben", "in"))
    assert said(terminal, "scp a.txt ben@192.168.1.23:").endswith("takes files from elsewhere in /home/ben/in only")
    assert said(terminal, "scp a.txt ben@192.168.1.23:in/") == "" and content(terminal.remote, "in/a.txt") == "A"
    assert "use -f" in said(terminal, "rm a.txt") and said(terminal, "rm -f a.txt; ls") == ""
    assert "switched off" in said(shell(removal="plain"), "rm -f a.txt")


@pytest.mark.parametrize(
    ("pack", "archive", "format", "unpack"),
    [
        ("tar -czf x.tar.gz d", "x.tar.gz", "tar.gz", "tar -xzf x.tar.gz -C out"),
        ("tar cjf x.tar.bz2 -C . d", "x.tar.bz2", "tar.bz2", "tar -xf x.tar.bz2 -C out"),
        ("tar -cf x.tar d && gzip x.tar", "x.tar.gz", "tar.gz", "gunzip x.tar.gz && tar xf x.tar -C out"),
        ("zip -r x d", "x.zip", "zip", "unzip x.zip -d out"),
        ("zip -qr x.zip d", "x.zip", "zip", "unzip -q x.zip -d out"),
    ],
)
def test_what_is_packed_comes_out_as_it_was(pack, archive, format, unpack):
    terminal = shell()
    said(terminal, "mkdir -p d/e out")
    written(terminal, "d/a.txt", "A")
    written(terminal, "d/e/b.txt", "B")
    said(terminal, f"{pack} && rm -r d")
    assert content(terminal.local, archive).format == format and "archive" in said(terminal, f"cat {archive}")
    said(terminal, unpack)
    assert said(terminal, "cat out/d/a.txt out/d/e/b.txt") == "A\nB"


@pytest.mark.parametrize("line", ["scp -r {}:d x", "scp -r {}:d/* .", "rsync -a {}:d/ x", "scp -r {}:d/a {}:d/b ."])
def test_a_transfer_takes_no_whole_tree(line):
    terminal = shell()
    for folder in "abc":
        terminal.remote.make_folder(("home", "ben", "d", folder), parents=True)
        for name in "1234":
            written(terminal, f"d/{folder}/{name}", "", away=True)
    told = said(terminal, line.replace("{}", "ben@192.168.1.23"))
    assert "takes 8 files and folders at most" in told and terminal.local.count <= 3 + 5


def test_packing_does_not_list_what_is_packed():
    terminal = shell()
    written(terminal, "hidden.txt", "A")
    assert said(terminal, "zip -r x ~") == "  adding: /home/anna"


def test_archives_of_another_format_missing_members_and_files_that_are_there_are_refused():
    terminal = shell()
    written(terminal, "a.txt", "A")
    said(terminal, "tar -czf a.tgz a.txt; zip -j a.zip ~/a.txt; gzip -k a.txt; mkdir b; rm a.txt")
    assert "not in tar.bz2 format" in said(terminal, "tar -xjf a.tgz") and "does not look like" in said(
        terminal, "unzip a.tgz"
    )
    assert "not found in the archive" in said(terminal, "tar -xf a.tgz b.txt") and "missing" in said(terminal, "unzip")
    assert said(terminal, "unzip -l a.zip; tar -tf a.tgz; gunzip a.txt.gz; cat a.txt") == "a.txt\na.txt\nA"
    assert "-o overwrites" in said(terminal, "unzip a.zip") and "inflating" in said(terminal, "unzip -o a.zip")
    assert "empty archive" in said(terminal, "tar -cf x.tar") and "nothing to do" in said(terminal, "zip x.zip")
    assert (
        "No such file" in said(terminal, "zip x.zip nothing") and terminal.local.get(("home", "anna", "x.zip")) is None
    )


def test_permissions_are_kept_and_obeyed():
    terminal = shell()
    written(terminal, "a", "A")
    assert said(terminal, "chmod 200 a; cat a") == "cat: a: Permission denied"
    assert (
        "Permission denied" in said(terminal, "chmod 500 ~; touch b") and said(terminal, "chmod 700 ~; touch b") == ""
    )
    assert "Operation not permitted" in said(terminal, "chmod 777 /home") and "invalid mode" in said(
        terminal, "chmod 9 a"
    )
    assert "Permission denied" in said(terminal, "mv a /") and "Permission denied" in said(terminal, "mkdir /x")
    assert "busy" in said(terminal, "rm -rf ~") and "busy" in said(terminal, "mv /home/anna /x; rm -r /")


class Naive:
    """The same once more, on a dict from paths to contents (None: a folder) and nothing else."""

    def __init__(self) -> None:
        self.all: dict[str, str | None] = {"/": None, "/home": None, "/home/anna": None}
        self.cwd = "/home/anna"

    def path(self, word: str) -> str:
        parts: list[str] = []
        for part in (word if word[0] == "/" else f"{self.cwd}/{word}").split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        return "/" + "/".join(parts)

    def folder(self, path: str) -> bool:
        return path in self.all and self.all[path] is None

    def up(self, path: str) -> str:
        return path.rpartition("/")[0] or "/"

    def below(self, path: str) -> list[str]:
        return sorted(each for each in self.all if each == path or each.startswith(path.rstrip("/") + "/"))

    def target(self, source: str, last: str, many: bool) -> str | None:
        to = self.path(last)
        if self.folder(to):
            return to.rstrip("/") + "/" + source.rpartition("/")[2]
        return None if many or last.endswith("/") or source == to else to

    def run(self, line: str) -> None:
        ok = True
        for part in line.split("; "):
            ok = True
            for command in part.split(" && "):
                if ok:
                    name, *words = command.split()
                    flags = "".join(word for word in words if word[0] == "-")
                    ok = getattr(self, name)([word for word in words if word[0] != "-"], flags)

    def cd(self, words, flags):
        path = self.path(words[0])
        if self.folder(path):
            self.cwd = path
        return self.folder(path)

    def touch(self, words, flags):
        oks = []
        for path in map(self.path, words):
            oks.append(path in self.all or self.folder(self.up(path)))
            if oks[-1] and path not in self.all:
                self.all[path] = ""
        return all(oks)

    def mkdir(self, words, flags):
        return all([self._mkdir(self.path(word), flags) for word in words])

    def _mkdir(self, path, flags):
        if "p" in flags:
            if path in self.all:
                return self.folder(path)
            if not self._mkdir(self.up(path), flags):
                return False
        elif path in self.all or not self.folder(self.up(path)):
            return False
        self.all[path] = None
        return True

    def rm(self, words, flags):
        return all([self._rm(self.path(word), flags) for word in words])

    def _rm(self, path, flags):
        if path not in self.all:
            return "f" in flags
        if self.folder(path) and (
            "r" not in flags or (self.cwd + "/").startswith(path.rstrip("/") + "/") or path in "/home/anna"
        ):
            return False
        for each in self.below(path):
            del self.all[each]
        return True

    def cp(self, words, flags):
        *sources, last = words
        return all([self._cp(self.path(word), last, len(sources) > 1, flags) for word in sources])

    def _cp(self, source, last, many, flags):
        to = self.target(source, last, many) if source in self.all else None
        if to is None or to == source or (self.folder(source) and "r" not in flags) or to.startswith(source + "/"):
            return False
        for each in self.below(source):
            new = to + each[len(source) :]
            if not self.folder(self.up(new)) or (new in self.all and self.folder(new) != self.folder(each)):
                return False
            self.all[new] = self.all[each]
        return True

    def mv(self, words, flags):
        *sources, last = words
        return all([self._mv(self.path(word), last, len(sources) > 1) for word in sources])

    def _mv(self, source, last, many):
        to = self.target(source, last, many) if source in self.all else None
        if to is None or to == source or to.startswith(source + "/") or not self.folder(self.up(to)):
            return False
        if to in self.all and (self.folder(to) or self.folder(source)):
            return False
        if (self.cwd + "/").startswith(source + "/") or source in "/home/anna":
            return False
        moved = {to + each[len(source) :]: self.all.pop(each) for each in self.below(source)}
        self.all.update(moved)
        return True


def test_a_naive_file_system_agrees_on_random_lines():
    dice, failed = Random(5), 0

    def command() -> str:
        def word() -> str:
            parts = [
                dice.choice("abcd" if dice.random() < 0.9 else ["..", "."]) for _ in range(dice.choice((1, 1, 2, 2, 3)))
            ]
            return ("~/" if dice.random() < 0.3 else "") + "/".join(parts) + ("/" if dice.random() < 0.05 else "")

        name = dice.choice(["cd", "touch", "mkdir", "mkdir", "mkdir", "rm", "cp", "cp", "mv"])
        flags = {"mkdir": ["", "-p"], "rm": ["", "-r", "-rf", "-f"], "cp": ["", "-r"]}.get(name, [""])
        count = {"cd": (1,), "cp": (2, 2, 3), "mv": (2, 2, 3)}.get(name, (1, 1, 2))
        return " ".join(filter(None, [name, dice.choice(flags), *(word() for _ in range(dice.choice(count)))]))

    for _ in range(100):
        terminal, naive = shell(), Naive()
        for _, node in walk(terminal.local.root):
            node.owner = "anna"
        for number in range(12):
            line = (
                "".join(command() + dice.choice([" && ", "; "]) for _ in range(dice.choice((0, 0, 1, 2)))) + command()
            )
            written(terminal, f"/home/anna/z{number}", str(number))
            naive.all[f"/home/anna/z{number}"] = str(number)
            result = terminal.run(line, 9, lambda: False)
            failed += not result.ok
            naive.run(line.replace("~", "/home/anna"))
            found = {"/" + "/".join(path): getattr(node, "content", None) for path, node in walk(terminal.local.root)}
            assert found == naive.all, line
            assert terminal.local.count == len(found)
    assert 200 < failed < 1_000


# Bounds


GREEDY = [
    "mkdir -p " + " ".join(f"{'abcdefgh'[i]}/{'/'.join('pqrstuv')}" for i in range(8)),
    "; ".join(["cp -r a b"] * 12),
    "; ".join(["cp -r ~/* ~/a ; cp -r ~/* ~/b"] * 6),
    "zip -rq a.zip /; zip -rq b.zip / ; zip -rq c.zip / ; tar -czf d.tgz / / / / / / / / / / / /",
    "mkdir x; unzip -q c.zip -d x; unzip -q c.zip -d x/x; unzip -qo c.zip -d x; unzip -qo c.zip -d x/x/x",
    "ls -l " + "/* " * 200,
    "ls -l " + "~/* " * 10,
    "chmod -R 700 " + "~ " * 55,
    "echo " + "$PWD" * 240,
    "cp " + "a" * 900 + " b",
    "mkdir -p " + "a/" * 400,
    "touch " + "*" * 900,
    "touch " + "?*" * 300,
    "scp -r / ben@192.168.1.23: && scp -r ben@192.168.1.23:/ . && scp -r / ben@192.168.1.23:",
]


def test_no_line_makes_a_computer_large_or_slow():
    terminal = shell()
    for line in GREEDY * 2:
        began = time.thread_time()
        result = terminal.run(line, 12, lambda: False)
        assert time.thread_time() - began < 1 and len(result.text) < 7_000
        for host in (terminal.local, terminal.remote):
            nodes = list(walk(host.root))
            assert len(nodes) == host.count <= MOST_NODES and max(len(path) for path, _ in nodes) <= MOST_DEPTH + 1
    assert terminal.local.count > 100


def test_a_pattern_is_matched_in_no_time():
    pattern = split("*a" * 400 + "b", windows=False)[0][1][0]
    began = time.thread_time()
    assert not matches(pattern, "a" * 80) and matches(split("a*?c*", windows=False)[0][1][0], "abbc.txt")
    assert time.thread_time() - began < 0.1


# Sessions


def test_the_compact_form_says_what_really_happened():
    world = Terminal("small", 7, form="compact")
    task = world.pack(1)[0]
    session, job = world.start(task), scene(world, task).job
    facts = scene(world, task).local.facts
    prompt = session.reset().text.split("\n")[-1]
    assert session.reset().text == f"{job.said[1]}\n{facts.system} {estate(world.pack(1)).remote.name} 6\n{prompt}"
    seen = session.step("  whoami ")
    assert (seen.text, seen.summary, seen.done) == (f"{facts.user}\n{prompt}", f"{prompt} whoami\n{facts.user}", False)
    assert session.step("cd .").text == prompt
    seen = session.step("whoami; whoami; whoami; whoami; whoami")
    assert seen.done and seen.text.endswith("\nsteps") and seen.text.count(facts.user) >= 4
    assert (seen.feedback.reward, seen.feedback.text, seen.feedback.ending) == (0.0, "steps", "steps")
    with pytest.raises(UsageError, match="over"):
        session.step("ls")
    assert session.reset().text.endswith(prompt) and not session.step("ls").done


def test_the_natural_form_says_the_same_in_sentences():
    world = Terminal("paper", 7)
    session = world.start(world.pack(1)[0])
    assert "Step 1 of 15." in session.reset().text
    seen = session.step("Who am I? <answer> whoami; whoami </answer>")
    assert "Step 2 of 15." in seen.text and seen.summary.count("\n") == 1
    assert session.step("<answer>cd .</answer>").summary == "(nothing printed)"
    for _ in range(13):
        seen = session.step("<answer>pwd</answer>")
    assert seen.done and "out of steps" in seen.feedback.text and seen.feedback.ending == "steps"


def test_the_rules_are_told_in_the_natural_form_only():
    assert Terminal("small", form="compact").pack(1)[0].prompt == ""
    rules = Terminal("small").pack(1)[0].prompt
    assert "6 steps" in rules and "<answer>ls -l ~</answer>" in rules and "server.txt" in rules
    assert "not every month is there, and some are kept as an archive" in rules
    assert "15 turns" in Terminal("paper").pack(1)[0].prompt
    assert rules in NATURAL.solve(Terminal("small").pack(1)[0], "", None)[-1].content


def test_sessions_share_no_state():
    world = Terminal("small", 2, form="compact")
    task = world.pack(1)[0]
    one, other = world.start(task), world.start(task)
    shown = one.reset().text, other.reset().text
    before = other.step("ls").text
    one.step("mkdir new && cd new")
    assert shown[0] == shown[1] and other.step("ls").text == before and one.reset().text == shown[0]
    assert one.step("ls").text == before


MALFORMED = [
    *(
        "",
        " ",
        "\n",
        "ls\nls",
        "ls\r\nls",
        "ls\u2028ls",
        "\x00",
        "ls \x1b[0m",
        "\ud800",
        "ls \ue000",
        "x" * (LONGEST_ANSWER + 1),
    ),
    *(
        "<answer></answer>",
        "<answer>ls</answer><answer>ls</answer>",
        "</answer>ls<answer>",
        "a\n" * 500_000,
        "<answer>" * 100_000,
    ),
    *(None, 3, b"ls", ["ls"], {"line": "ls"}, float("nan")),
]


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:30])
def test_malformed_answers_end_the_episode_with_reward_0_and_a_reason(answer, form):
    world = Terminal("small", 1, form=form)
    session = world.start(world.pack(1)[0])
    session.reset()
    if form == "compact" and isinstance(answer, str) and "<answer>" in answer and len(answer) < LONGEST_ANSWER:
        assert not session.step(answer).done  # in the compact form tags are just words
        return
    seen = session.step(answer)
    assert seen.done and seen.feedback.reward == 0.0 and seen.feedback.ending == "malformed"
    assert seen.feedback.text == "invalid" if form == "compact" else "malformed: " in seen.feedback.text


def test_what_a_thinking_model_thinks_does_not_count():
    assert parse_answer("<think><answer>rm -r ~</answer></think>So: <answer>ls\t-l</answer>", "natural") == (
        "ls -l",
        "",
    )


WORDS = st.sampled_from(
    [
        *COMMANDS,
        *ALIASES,
        "-r",
        "-f",
        "-czf",
        "-xzf",
        "-C",
        "-j",
        "-d",
        "-p",
        "--",
        "-",
        "~",
        "*",
        "?",
        ".",
        "..",
        "/",
        "\\",
        "C:\\",
    ]
    + [
        "ben@192.168.1.23:",
        "ben@192.168.1.23",
        "192.168.1.23:/",
        ":",
        "@",
        "'",
        '"',
        "$HOME",
        "${",
        "%USERNAME%",
        "%",
        "$",
        "&&",
        ";",
    ]
    + ["a", "a/b", "b.zip", "c.tgz", "/etc", "/home/ben", "-", "é", "\u0663", "640", "a" * 200, "{0.__class__}", "%s%n"]
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(WORDS, max_size=12).map(" ".join) | st.text(max_size=40), max_size=6),
    st.sampled_from(["linux", "windows"]),
)
def test_no_line_raises(lines, system):
    terminal = shell(system)
    said(terminal, "mkdir a; touch a/b; zip -r b.zip a; tar -czf c.tgz a")
    for line in lines:
        if not parse_answer(line, "compact")[1]:
            assert isinstance(said(terminal, line), str) and terminal.prompt
    for host in (terminal.local, terminal.remote):
        assert host.count == len(list(walk(host.root))) and isinstance(host.get(host.facts.home), Folder)


@settings(deadline=None, max_examples=40)
@given(st.lists(WORDS, max_size=9).map(" ".join), st.sampled_from(["natural", "compact"]))
def test_no_answer_raises_or_wins_wrongly(answer, form):
    world = Terminal("paper", 3, form=form)
    session = world.start(world.pack(1)[0])
    session.reset()
    seen = session.step(f"<answer>{answer}</answer>" if form == "natural" else answer)
    assert seen.done == (seen.feedback is not None) and not (seen.done and seen.feedback.reward)


# Players


@cache
def curves(preset: str, packs: int) -> dict[str, np.ndarray]:
    world = Terminal(preset, 0, form="compact")
    return {name: played(world, name, packs, 4) for name in ("perfect", "memoryless")}


@pytest.mark.parametrize("preset", SHARED)
def test_memory_pays_where_packs_share_something(preset):
    found = curves(preset, 24 if preset == "small" else 12)
    assert difference(found["perfect"], found["memoryless"]).low > 0.2
    assert 0.25 < found["memoryless"].mean() < 0.6 and found["perfect"][:, 3].mean() > 0.9
    assert np.ptp(found["memoryless"].mean(0)) < 0.45


@pytest.mark.parametrize("preset", ["paper", "paper-hard"])
def test_memory_is_of_no_use_to_a_good_player_where_packs_share_nothing(preset):
    found = curves(preset, 12)
    assert found["memoryless"].mean() > 0.97 and found["perfect"].mean() > 0.97


def test_the_note_fits_for_packs_of_eight_and_goes_on_from_the_one_before():
    world = Terminal("paper-shared", 4, form="compact")
    for pack in world.packs(6, 8):
        note = ""
        for task in pack:
            episode = _episode(world.start(task), task, note, PLAYERS["perfect"](Random(1)))
            before, note = (
                note,
                noted(COMPACT.update(task, note, episode, episode.turns[-1].observation.feedback)[0].content),
            )
            gone = {line for line in before.split("\n") if line and "?" not in line and not line.startswith("name ")}
            assert len(note) < 3_000 and not gone - set(note.split("\n"))


def test_a_name_tells_the_habit_that_made_it():
    for number in range(300):
        habit = draw_habit(randomness("habit", number))
        subject, month = SUBJECTS[number % 25], number % 12 + 1
        assert read_name(habit.name(subject, month), NAMED) == (habit, subject, month)
    assert [
        read_name(name, NAMED) for name in ("notes.txt", "invoices.csv", "", "03-nothing.csv", "13-invoices.csv")
    ] == [None] * 5


@settings(deadline=None, max_examples=40)
@given(
    st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from(
                [
                    "account ben",
                    "spool /x",
                    "removal x",
                    "tool tar",
                    "name 03-Plans.log",
                    "srv plans /srv/a/b",
                    "pc? /a",
                ]
            )
        ).map("\n".join),
    ),
    st.integers(0, 40),
)
def test_a_wrong_note_breaks_no_player(note, index):
    world = Terminal("small", 0, form="compact")
    task = world.pack(5, index)[4]
    (reward,) = life(
        world,
        [task],
        lambda messages: choices(COMPACT.solve(task, note, world.start(task).reset()) + list(messages[1:]))[0],
    )
    assert reward in (0.0, 1.0)


def test_what_really_happened_counts_more_than_the_note():
    world = Terminal("small", 0, form="compact")
    one, other = world.packs(2, 4)
    for task in other:
        right, wrong = (
            _episode(world.start(task), task, note_of(pack), PLAYERS["perfect"](Random(0))) for pack in (other, one)
        )
        assert right.turns[-1].observation.feedback.reward == 1.0
        assert len({turn.answer for turn in wrong.turns}) > 1


@pytest.mark.parametrize("messages", [[], COMPACT.solve(Task(id="x", prompt="hello"), "", None)])
def test_players_read_the_compact_form_only(messages):
    with pytest.raises(UsageError):
        choices(messages)
    with pytest.raises(UsageError, match="compact form only"):
        choices(NATURAL.solve(Terminal().pack(1)[0], "", Terminal().start(Terminal().pack(1)[0]).reset()))


# Cost


@pytest.mark.parametrize("preset", ["small", "paper-shared"])
def test_a_step_costs_below_a_millisecond_and_an_answer_below_two(preset):
    world, steps, answers = Terminal(preset, 0, form="compact"), [], []
    for pack in world.packs(12, 1):
        session = world.start(pack[0])
        messages = COMPACT.solve(pack[0], note_of(pack), session.reset())
        seen = None
        while seen is None or not seen.done:
            began = time.thread_time()  # other tests may want this core, too
            answer = choices(messages)[0]
            between = time.thread_time()
            seen = session.step(answer)
            answers.append(between - began)
            steps.append(time.thread_time() - between)
            messages = [*messages, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
    assert median(steps) < 1e-3 and median(answers) < 2e-3
