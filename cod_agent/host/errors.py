"""Which error is which status, and what the service itself says no with."""

from __future__ import annotations

from cod_agent import errors
from cod_agent.errors import CodError

RETRY_AFTER = 5
"""Seconds a client may as well wait before it asks again."""


class BadRequest(CodError):
    """What came is not HTTP with JSON as it should be."""


class Invalid(CodError):
    """It is JSON, and not what was asked for."""


class Unauthorized(CodError):
    """The token is missing, or another one."""


class WrongHost(CodError):
    """The Host header names somebody else: a proxy that is not known here, or a page that rebinds a name."""


class NotFound(CodError):
    """There is no such page."""


class MethodNotAllowed(CodError):
    """The page is there, for another method."""


class TooSlow(CodError):
    """The body did not come in time."""


class TooLarge(CodError):
    """The body is longer than it may be."""


class UnsupportedMediaType(CodError):
    """The body is not JSON."""


class Busy(CodError):
    """A queue is full, or as many agents are at work as may be."""


class Draining(CodError):
    """The service is about to stop; what it accepted goes on when it starts again."""


class StillUnderWay(CodError):
    """The request has waited as long as it may; the task goes on."""


STATUSES: tuple[tuple[type[CodError], int], ...] = (
    (BadRequest, 400),
    (Unauthorized, 401),
    (NotFound, 404),
    (errors.UnknownName, 404),
    (MethodNotAllowed, 405),
    (TooSlow, 408),
    (errors.UsageError, 409),
    (errors.RunLeased, 409),
    (errors.ReplayDiverged, 409),
    (errors.ToolInDoubt, 409),
    (errors.BudgetSpent, 409),
    (TooLarge, 413),
    (UnsupportedMediaType, 415),
    (WrongHost, 421),
    (Invalid, 422),
    (Busy, 429),
    (errors.ModelRefused, 502),
    (errors.ModelGarbled, 502),
    (Draining, 503),
    (errors.ModelUnreachable, 503),
    (errors.ModelOverloaded, 503),
    (errors.StoreBusy, 503),
    (StillUnderWay, 504),
    (errors.ModelTimeout, 504),
    (errors.StoreFull, 507),
)
"""The first that fits; anything else is a 500."""

LATER = (429, 503, 504)
"""Statuses that come with Retry-After."""


def status_of(error: BaseException) -> int:
    """The status an error is answered with."""
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def said_of(error: BaseException) -> tuple[str, str]:
    """(type, message) for whoever asked; what is not ours is in the log only."""
    if isinstance(error, CodError):
        return type(error).__name__, str(error)
    return "InternalError", "something went wrong inside the service: its log says what"
