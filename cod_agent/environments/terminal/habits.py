"""How files are called: one habit makes a name of a subject and a month, and tells from a name what it is of.

Habit("upper", "_", "mar", True, "v2", "csv").name("invoices", 3)      # MAR_INVOICES_V2.csv
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from cod_agent.environments.draws import below

_MONTHS = "January February March April May June July August September October November December"
MONTHS = tuple(_MONTHS.split())

CASES = ("lower", "upper", "title")
SEPARATORS = ("-", "_", ".")
DATES = ("03", "m03", "mar", "2603", "202603")
"""How March is written."""
VERSIONS = ("", "v1", "v2", "final", "draft", "copy", "rev3")
EXTENSIONS = ("csv", "txt", "dat", "md", "log", "xml")


@dataclass(frozen=True, slots=True)
class Habit:
    """A way of naming files."""

    case: str
    separator: str
    date: str
    first: bool
    """Whether the date comes before the subject."""
    version: str
    """What stands at the end of every name, "" for nothing."""
    extension: str

    def name(self, subject: str, month: int) -> str:
        """Of the file of a subject and a month (1 to 12)."""
        parts = [_date(self.date, month), subject] if self.first else [subject, _date(self.date, month)]
        shown = [_cased(part, self.case) for part in (*parts, self.version) if part]
        return f"{self.separator.join(shown)}.{self.extension}"


def draw_habit(rng: Random) -> Habit:
    """Any of them, all with even chances."""

    def one(of: tuple[str, ...]) -> str:
        return of[below(rng, len(of))]

    return Habit(one(CASES), one(SEPARATORS), one(DATES), rng.random() < 0.5, one(VERSIONS), one(EXTENSIONS))


def stem(name: str) -> str:
    """A name without its extension."""
    return name.rpartition(".")[0] or name


@lru_cache(4096)
def read_name(name: str, subjects: frozenset[str]) -> tuple[Habit, str, int] | None:
    """The habit, the subject and the month of a file's name; None if no habit makes it."""
    head, _, extension = name.rpartition(".")
    separator = next((sign for sign in SEPARATORS if sign in head), "")
    parts = head.split(separator) if separator else []
    if extension not in EXTENSIONS or len(parts) not in (2, 3):
        return None
    low = [part.lower() for part in parts]
    first = low[1] in subjects
    subject, date = (low[1], low[0]) if first else (low[0], low[1])
    month, form = _month(date)
    case = next((each for each in CASES if _cased(subject, each) == parts[first]), "")
    version = low[2] if len(low) == 3 else ""
    if subject not in subjects or not month or not case or version not in VERSIONS:
        return None
    habit = Habit(case, separator, form, first, version, extension)
    return (habit, subject, month) if habit.name(subject, month) == name else None


def _cased(text: str, case: str) -> str:
    return text.upper() if case == "upper" else text.title() if case == "title" else text


def _date(form: str, month: int) -> str:
    return MONTHS[month - 1][:3].lower() if form == "mar" else f"{form[:-2]}{month:02}"


_READ = {_date(form, month): (month, form) for form in DATES for month in range(1, 13)}


def _month(date: str) -> tuple[int, str]:
    return _READ.get(date, (0, ""))
