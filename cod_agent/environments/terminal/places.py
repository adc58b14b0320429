"""Where tasks take place: two hosts, drawn for every task alone, or once for a pack that shares them.

An `Estate` is what the tasks of a pack share: who one is on either host and what they run, in which folder which subject lies (on
either side), how files are called, and what is peculiar: where the server takes files from elsewhere, how things are removed,
which tool packs. A `Scene` is one task: two trees and a job.

The split is a property of what is hidden, by a hash of all of it: of the estate, or of a scene that stands alone.

Source: Terminal of arXiv 2606.20002 (`paper` and `paper-hard`); estates are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, TypeVar

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, of_eval, shuffled
from cod_agent.environments.terminal.archives import EXTENSIONS
from cod_agent.environments.terminal.commands import ABSENT
from cod_agent.environments.terminal.filesystem import (
    Archive,
    Content,
    Facts,
    File,
    Folder,
    Host,
    Member,
    Path,
    Removal,
    System,
)
from cod_agent.environments.terminal.habits import MONTHS, Habit, draw_habit, stem
from cod_agent.environments.terminal.jobs import (
    COMPOSITE,
    DOWN,
    FORMATS,
    MODES,
    NOTHING,
    SIDES,
    SINGLE,
    UP,
    Detail,
    Job,
    Said,
    Thing,
    make_job,
)

SYSTEMS: tuple[System, ...] = ("linux", "macos", "windows")
USERS = ("anna", "ben", "carla", "david", "emma", "felix", "grace")
_SUBJECTS = (
    "invoices contracts budgets photos letters reports plans orders receipts surveys minutes drawings samples scores "
    "recipes maps tickets payrolls forecasts audits menus notices quotes rosters labels"
)
SUBJECTS = tuple(_SUBJECTS.split())
_FOLDERS = (
    "alpha bay cedar delta ember fjord grove harbor iris jade kelp lark maple north opal pine quartz river slate tide"
)
FOLDERS = tuple(_FOLDERS.split())
"""Names that tell nothing."""
SPOOLS = ("inbox", "incoming", "dropbox", "uploads", "transfer", "arrivals")
TOOLS = {"tar": frozenset({"tar", "gzip", "gunzip"}), "zip": frozenset({"zip", "unzip"})}
"""The two ways of packing, and the commands of each."""
EXTENSIONS_ALONE = ("txt", "csv", "md", "log", "dat")
JUNK = ("notes.txt", "todo.txt", "readme.md", "old.log")
LOGIN = "server.txt"
"""The file in one's home that says who one is on the server."""
ROOT: Path = ("srv",)
"""Where a shared server keeps its files."""

COMBINED = 0.5
"""The chance that a job is one of the eight that combine several."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of tasks a world has."""

    steps: int
    rooms: int = 0
    """Folders of a shared host, each with `shelves`; 0: the tasks of a pack share nothing."""
    shelves: int = 0
    subjects: int = 0
    """Of a shared estate."""
    counts: bool = False
    """Whether every command of a line is a step, and not the line."""


PRESETS = {
    "small": Preset(steps=6, rooms=4, shelves=3, subjects=5, counts=True),
    "paper": Preset(steps=15),
    "paper-hard": Preset(steps=12),
    "paper-shared": Preset(steps=8, rooms=6, shelves=4, subjects=8, counts=True),
}


@dataclass(frozen=True, slots=True)
class Estate:
    """What the tasks of a pack share."""

    local: Facts
    remote: Facts
    tool: str
    habit: Habit
    shelves: Mapping[bool, Mapping[str, Path]]
    """Side (True: the server) -> subject -> the folder of its files."""
    months: Mapping[str, tuple[int, ...]]
    """Of each subject the twelve in the order in which they are given away: see `_KEPT`."""
    numbers: Mapping[tuple[bool, str, int], int]
    """By side, subject and month: what makes a file's content its own."""
    folders: Mapping[bool, Sequence[Path]]
    """All of a side in which files may lie; in those that are no subject's lies nothing of interest."""

    def content(self, remote: bool, subject: str, month: int) -> str:
        return f"{subject} of {MONTHS[month - 1]}, no. {self.numbers[remote, subject, month]}"

    def kept(self, subject: str, use: str) -> tuple[int, ...]:
        """The months of a subject that are kept in that way."""
        low, high = _KEPT[use]
        return self.months[subject][low:high]


_KEPT = {"local": (0, 2), "remote": (2, 4), "both": (4, 5), "archive": (5, 6), "free": (6, 12)}
"""Which months are files on one side only, on both (with other contents), in an archive on the server, or nowhere."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One task: the two hosts (to be copied, not changed), and the job."""

    local: Host
    remote: Host
    job: Job


# ---- trees ----


def _home(system: System, user: str) -> Path:
    return ("home" if system == "linux" else "Users", user)


class _Tree:
    """A tree being built: folders on the way belong to the user from `own` on, to root above."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.root = facts, Folder("root")
        self.folder(facts.home)

    def folder(self, path: Path, own: int = 1) -> Folder:
        """The folder at a path, made if need be; the last `own` parts of it are the user's."""
        at = self.root
        for depth, name in enumerate(path):
            mine = depth >= len(path) - own
            there = at.children.setdefault(name, Folder(self.facts.user if mine else "root"))
            if isinstance(there, Folder):
                at = there
        return at

    def file(self, path: Path, content: Content) -> None:
        self.folder(path[:-1]).children[path[-1]] = File(content, self.facts.user)

    def host(self) -> Host:
        return Host(self.facts, self.root)


def _pick(rng: Random, items: Sequence[T]) -> T:
    return items[below(rng, len(items))]


def _packed(tool: str, name: str, content: str) -> tuple[str, Archive]:
    """The name and the content of an archive of one file."""
    format = "zip" if tool == "zip" else "tar.gz"
    return stem(name) + EXTENSIONS[format][0], Archive(format, (Member((name,), content, 0o644),))


# ---- estates ----


def draw_estate(rng: Random, preset: Preset, split: Split) -> Estate:
    """An estate of `split`, by rejection."""
    while True:
        estate = _estate(rng, preset)
        if ("eval" if of_eval(canonical(estate)) else "train") == split:
            return estate


def canonical(estate: Estate) -> str:
    """All that there is to know of an estate, as text; what contents are in it, nobody needs to know."""
    places = sorted((side, subject, path) for side, of in estate.shelves.items() for subject, path in of.items())
    facts = [asdict(each) | {"missing": sorted(each.missing)} for each in (estate.local, estate.remote)]
    return repr([*map(_sorted, facts), estate.tool, _sorted(asdict(estate.habit)), places])


def _sorted(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(facts.items())


def _estate(rng: Random, preset: Preset) -> Estate:
    system, user, account = _pick(rng, SYSTEMS), _pick(rng, USERS), _pick(rng, USERS)
    tool = "zip" if system == "windows" else _pick(rng, tuple(TOOLS))
    missing = TOOLS["tar" if tool == "zip" else "zip"]
    home = ("home", account)
    spool = (*_pick(rng, (home, ("var",), ("data",), ("mnt",), ("opt",))), _pick(rng, SPOOLS))
    removal: Removal = "force" if rng.random() < 0.5 else "plain"
    lacking = missing | ABSENT if system == "windows" else missing
    local = Facts(system, "pc", user, _home(system, user), lacking, None, removal)
    remote = Facts("linux", f"192.168.1.{10 + below(rng, 90)}", account, home, missing, spool, removal)
    subjects = shuffled(rng, SUBJECTS)[: preset.subjects]
    roots = {False: local.home, True: ROOT}
    every = {side: _shelves(rng, preset, root) for side, root in roots.items()}
    shelves = {side: dict(zip(subjects, shuffled(rng, paths), strict=False)) for side, paths in every.items()}
    months = {subject: tuple(shuffled(rng, range(1, 13))) for subject in subjects}
    numbers = {
        (s, k, month): 1000 + below(rng, 9000) for s in (False, True) for k in subjects for month in range(1, 13)
    }
    return Estate(local, remote, tool, draw_habit(rng), shelves, months, numbers, every)


def _shelves(rng: Random, preset: Preset, root: Path) -> list[Path]:
    """The folders in which files may lie on one side."""
    rooms = shuffled(rng, FOLDERS)[: preset.rooms]
    return [(*root, room, shelf) for room in rooms for shelf in shuffled(rng, FOLDERS)[: preset.shelves]]


def estate_hosts(estate: Estate) -> tuple[Host, Host]:
    """The two hosts as every task of an estate finds them."""
    local, remote = trees = _Tree(estate.local), _Tree(estate.remote)
    for side, tree in enumerate(trees):
        for number, path in enumerate(estate.folders[bool(side)]):
            tree.folder(path, own=2)
            if path not in estate.shelves[bool(side)].values():
                tree.file((*path, JUNK[number % len(JUNK)]), "Nothing of interest.")
        _fill(estate, bool(side), tree)
    local.file((*estate.local.home, LOGIN), f"The account on the server {estate.remote.name} is {estate.remote.user}.")
    remote.folder(estate.remote.spool or ())
    return local.host(), remote.host()


def _fill(estate: Estate, side: bool, tree: _Tree) -> None:
    """Put the files of every subject where they belong."""
    for subject, folder in estate.shelves[side].items():
        for month in (*estate.kept(subject, "remote" if side else "local"), *estate.kept(subject, "both")):
            name = estate.habit.name(subject, month)
            tree.file((*folder, name), estate.content(side, subject, month))
        for month in estate.kept(subject, "archive") if side else ():
            name = estate.habit.name(subject, month)
            packed, archive = _packed(estate.tool, name, estate.content(True, subject, month))
            tree.file((*folder, packed), archive)


def draw_verb(rng: Random) -> str:
    """One of the jobs."""
    return _pick(rng, COMPOSITE if rng.random() < COMBINED else SINGLE)


def _side(rng: Random, verb: str, system: System) -> bool:
    """Where a job ends up being true; True: on the server. Windows has no `chmod`."""
    if verb in UP | DOWN:
        return verb in UP
    return (verb == "chmod" and system == "windows") or rng.random() < 0.5


def shared_scene(rng: Random, preset: Preset, estate: Estate, hosts: tuple[Host, Host], index: int) -> Scene:
    """A task of an estate, in which things are spoken of by what they mean. Subjects take turns, and so do their months, so that hardly a
    job comes twice."""
    verb = draw_verb(rng)
    remote = _side(rng, verb, estate.local.system)
    source = not remote if verb in UP | DOWN else remote
    turn, number = divmod(index, len(estate.months))
    subject = tuple(estate.months)[number]
    other = _pick(rng, [each for each in estate.months if each != subject])
    use = {"backup+replace": "both", "download+extract": "archive"}.get(verb, "remote" if source else "local")
    months = estate.kept(subject, use)
    month = months[turn % len(months)]
    name, content = estate.habit.name(subject, month), estate.content(source, subject, month)
    packed = _packed(estate.tool, name, content)[0] if use == "archive" else name
    holding = "the archive with " if use == "archive" else ""
    said = f"{holding}the {subject} of {MONTHS[month - 1]}", f"{subject}/{month}"
    older = estate.content(remote, subject, month) if use == "both" else ""
    thing = Thing((*estate.shelves[source][subject], packed), name, content, said, older)
    at = other if verb in ("move", "copy") else subject
    place = estate.shelves[remote][at], (f"the directory where {SIDES[remote][0]} keeps its {at}", at)
    new = _pick(rng, estate.kept(subject, "free"))
    named = estate.habit.name(subject, new), (f"that of the {subject} of {MONTHS[new - 1]}", f"{subject}/{new}")
    formats = tuple(each for each in FORMATS if (each == "zip") == (estate.tool == "zip"))
    job = make_job(verb, remote, thing, place, _detail(rng, verb, named, formats, ("in any format", "any")))
    return Scene(*hosts, job)


def _detail(rng: Random, verb: str, named: tuple[str, Said], formats: tuple[str, ...], said: Said) -> Detail:
    """What else the job says: a drawn mode or folder, or the name or formats given."""
    if "rename" in verb:
        return Detail(named[1], name=named[0])
    if "mkdir" in verb:
        name = _pick(rng, FOLDERS)
        return Detail((name, name), name=name)
    if "chmod" in verb:
        mode = _pick(rng, MODES)
        return Detail((f"{mode:03o}",) * 2, mode=mode)
    return Detail(said if "pack" in verb else NOTHING, formats=formats)


# ---- tasks that stand alone ----


def lone_scene(rng: Random, preset: Preset, split: Split) -> Scene:
    """A task that shares nothing with others, of `split`, by rejection: files are named, and only where a thing lies is not told."""
    while True:
        scene = _lone(rng, preset)
        told = repr((scene.local.facts.user, scene.remote.facts.name, scene.job.said, scene.job.checks))
        if ("eval" if of_eval(told) else "train") == split:
            return scene


def _lone(rng: Random, preset: Preset) -> Scene:
    system, user, account = _pick(rng, SYSTEMS), _pick(rng, USERS), _pick(rng, USERS)
    local = Facts(system, "pc", user, _home(system, user), ABSENT if system == "windows" else frozenset())
    remote = Facts("linux", f"192.168.1.{10 + below(rng, 90)}", account, ("home", account))
    verb = draw_verb(rng)
    at_server = _side(rng, verb, system)
    source = not at_server if verb in UP | DOWN else at_server
    trees = {False: _Tree(local), True: _Tree(remote)}
    folders = {side: [(*tree.facts.home, name) for name in shuffled(rng, FOLDERS)[:5]] for side, tree in trees.items()}
    for side, paths in folders.items():
        for path in paths:
            trees[side].folder(path, own=2)
    endings = shuffled(rng, EXTENSIONS_ALONE)
    names = [f"{subject}.{ending}" for subject, ending in zip(shuffled(rng, SUBJECTS), endings, strict=False)]
    format = "zip" if system == "windows" else _pick(rng, FORMATS)
    content = f"{names[0]}, no. {1000 + below(rng, 9000)}"
    lies, goes = folders[source][0], folders[at_server][1]
    older = f"{names[0]}, no. {1000 + below(rng, 9000)}, older" if verb == "backup+replace" else ""
    called = names[0]
    if verb == "download+extract":
        called = stem(called) + EXTENSIONS[format][0]
        trees[source].file((*lies, called), Archive(format, (Member((names[0],), content, 0o644),)))
    else:
        trees[source].file((*lies, called), content)
    if older:
        trees[True].file((*goes, called), older)
    for name in names[2:]:
        side = rng.random() < 0.5
        trees[side].file((*_pick(rng, folders[side]), name), f"{name}, no. {1000 + below(rng, 9000)}")
    shown = trees[at_server].host().shown(goes)
    named = names[1], (names[1], names[1])
    detail = _detail(rng, verb, named, (format,), (format, format))
    thing = Thing((*lies, called), names[0], content, (called, called), older)
    return Scene(
        trees[False].host(), trees[True].host(), make_job(verb, at_server, thing, (goes, (shown, shown)), detail)
    )
