"""Everything this package raises, in one tree. Each message says what happened and what to do.

    CodError
    ├── UsageError (also ValueError)     something was asked for that does not exist or does not fit
    │   ├── UnknownName                  a model, world, preset, control, agent or run nobody knows
    │   ├── MissingExtra                 an optional package is needed: the message has the pip line
    │   └── TaskMismatch                 another task stands at a position already lived
    ├── StoreError                       the run database
    │   ├── NotADatabase                 the file is something else, or damaged
    │   ├── SchemaTooNew                 written by a later version of this package
    │   ├── StoreBusy                    locked by another program for too long
    │   ├── StoreFull                    the disk is full, or the file may not be written
    │   ├── RunLeased                    another process lives this run
    │   └── VerificationFailed           a hash, a chain or a rebuilt request does not agree
    ├── ReplayDiverged                   on resuming, the program did something else than what is recorded
    ├── ToolFailed                       a tool raised: the same on replay as it was live
    ├── ToolInDoubt                      a tool was running when the process died, and may not simply be run again
    ├── BudgetSpent                      a run may spend no more; raise its budget, then resume
    └── ModelError                       a model did not answer; the task stays open, resuming goes on there
        ├── ModelUnreachable             no connection
        ├── ModelTimeout                 no answer in time
        ├── ModelRefused                 the endpoint said no (401, 403, 404, 400): asking again will not help
        ├── ModelOverloaded              429 or 5xx after every retry
        └── ModelGarbled                 an answer that is none: not JSON, cut off, of another shape

A policy's mistake is data, not an error: a malformed answer scores 0 and a bad update keeps the last good context.
"""

from __future__ import annotations


class CodError(Exception):
    """Base of everything raised here."""


class UsageError(CodError, ValueError):
    """Something was asked for that does not exist or does not fit."""


class UnknownName(UsageError):
    """A model, world, preset, control, agent or run nobody knows."""

    @classmethod
    def among(cls, kind: str, name: str, known: list[str]) -> UnknownName:
        """With the nearest known name, if one is near."""
        from difflib import get_close_matches

        near = get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return cls(f"no {kind} called {name!r}: {hint}known are {', '.join(sorted(known)) or 'none'}")


class MissingExtra(UsageError):
    """An optional package is needed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package: pip install 'connect-the-dots[{extra}]'")
        self.what, self.extra = what, extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), (self.what, self.extra)


class TaskMismatch(UsageError):
    """Another task stands at a position already lived."""


class StoreError(CodError):
    """The run database."""


class NotADatabase(StoreError):
    """The file is something else, or damaged."""


class SchemaTooNew(StoreError):
    """Written by a later version of this package."""


class StoreBusy(StoreError):
    """Locked by another program for too long."""


class StoreFull(StoreError):
    """The disk is full, or the file may not be written."""


class RunLeased(StoreError):
    """Another process lives this run."""


class VerificationFailed(StoreError):
    """A hash, a chain or a rebuilt request does not agree with what is stored."""


class ReplayDiverged(CodError):
    """On resuming, the program did something else than what is recorded."""


class ToolFailed(CodError):
    """A tool raised; the message has the exception's name and words. The same on replay as it was live."""


class ToolInDoubt(CodError):
    """A tool was running when the process died, and its declaration forbids simply running it again."""


class BudgetSpent(CodError):
    """A call was not sent, because a budget is spent. A run's stops the run; an episode's just ends that episode."""

    what: str = ""
    """calls, tokens, money or seconds."""
    run: bool = False
    """Whether it is the run's."""


class ModelError(CodError):
    """A model did not answer; the task stays open and resuming goes on there."""


class ModelUnreachable(ModelError):
    """No connection."""


class ModelTimeout(ModelError):
    """No answer in time."""


class ModelRefused(ModelError):
    """The endpoint said no: asking again will not help."""

    status: int | None = None
    """The HTTP status, where an endpoint answered: 401, 403 and 404 are about the model, others about the request."""


class ModelOverloaded(ModelError):
    """429 or 5xx after every retry."""


class ModelGarbled(ModelError):
    """An answer that is none: not JSON, cut off, or of another shape."""
