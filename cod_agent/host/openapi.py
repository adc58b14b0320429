"""The service's OpenAPI 3.1 document, made from the models of `schema` and from one line for each operation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from cod_agent.agent import LIFE
from cod_agent.host import schema
from cod_agent.host.app import LONGEST_PAGE, PAGE
from cod_agent.host.errors import LATER
from cod_agent.host.settings import Settings

WHY = {
    400: "The body is no JSON, or has a number that is not finite.",
    401: "The token is missing, or another one.",
    404: "No such agent, run, position or version.",
    405: "Another method is expected.",
    408: "The body did not come in time.",
    409: "It does not fit what is on record: another task or other feedback stands there, the position is further than "
    "the next one, another process lives the run, or the program changed under an unfinished task.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    421: "The Host header names somebody else.",
    422: "A value is not what is expected.",
    429: "A queue is full, or too many are at work or listening.",
    500: "Something went wrong inside; the log says what.",
    502: "The model refused, or answered with garbage; the task stays and is tried again.",
    503: "About to stop, or the model or the database cannot be had at the moment; what was accepted goes on.",
    504: "Not done in time; the task goes on.",
    507: "The disk is full.",
}
"""Every status that is no success."""

_ALWAYS = (401, 405, 413, 421, 500)
_READ = (422, 503)
_WRITE = (400, 404, 408, 409, 415, 422, 429, 502, 503, 504, 507)


@dataclass(frozen=True)
class Operation:
    """What the document says of one path."""

    path: str
    method: str
    name: str
    summary: str
    gives: dict[int, type[schema.Said]]
    fails: tuple[int, ...]
    takes: type[schema.Asked] | None = None
    beside: tuple[str, ...] = ()
    """Query and header parameters, by their key in `_PARAMETERS`."""
    open: bool = False


_RUN = "/v1/agents/{agent}/runs/{run}"
OPERATIONS = (
    Operation(
        "/v1/agents/{agent}/tasks", "post", "submit", "Hand in a task.",
        {200: schema.Lived, 202: schema.Accepted}, _WRITE, schema.NewTask, ("Idempotency-Key",),
    ),
    Operation(f"{_RUN}/tasks/{{position}}", "get", "place", "Look at a task.", {200: schema.Place}, (404, *_READ)),
    Operation(
        f"{_RUN}/tasks/{{position}}/feedback", "post", "feedback", "Say how a task went; the update follows.",
        {200: schema.Lived}, _WRITE, schema.NewFeedback,
    ),
    Operation(
        f"{_RUN}/abandon", "post", "abandon", "Give up the task that stands unfinished in a run.",
        {200: schema.Abandoned}, (404, 409, 422, 503, 507),
    ),
    Operation(
        f"{_RUN}/held", "get", "held", "List the versions of a context that wait for a decision.", {200: schema.HeldVersions},
        (404, *_READ), beside=("after", "limit"),
    ),
    Operation(
        f"{_RUN}/decide", "post", "decide", "Accept or refuse a version that waits, or go back to an older one.",
        {200: schema.Decided}, (400, 404, 408, 409, 415, 422, 503, 504, 507), schema.NewDecision,
    ),
    Operation("/v1/agents", "get", "agents", "List agents.", {200: schema.Agents}, _READ, beside=("after_name", "limit")),
    Operation(
        "/v1/agents/{agent}/runs", "get", "runs", "List an agent's runs.", {200: schema.Runs}, (404, *_READ),
        beside=("after", "limit"),
    ),
    Operation(
        "/v1/agents/{agent}/context", "get", "context", "Read a context.", {200: schema.Context}, (404, *_READ),
        beside=("run", "version"),
    ),
    Operation(
        "/v1/agents/{agent}/contexts", "get", "contexts", "List the versions of a context, with the weights that wrote each.",
        {200: schema.Contexts}, (404, *_READ), beside=("run", "after", "limit"),
    ),
    Operation(
        "/v1/agents/{agent}/events", "get", "events", "Follow an agent's events.", {}, (422, 429, 503),
        beside=("after_event", "follow", "Last-Event-ID"),
    ),
    Operation(
        "/v1/events", "get", "all_events", "Follow all events.", {}, (422, 429, 503),
        beside=("after_event", "follow", "Last-Event-ID"),
    ),
    Operation("/health", "get", "health", "Whether the process lives.", {200: schema.Health}, (), open=True),
    Operation(
        "/ready", "get", "ready", "Whether it is worth sending a task here.", {200: schema.Ready, 503: schema.Ready}, (),
        open=True,
    ),
    Operation("/openapi.json", "get", "openapi", "This document.", {}, ()),
)  # fmt: skip

_NUMBER = {"type": "integer", "minimum": -1, "maximum": schema.LAST}
_CURSOR = {"type": "string", "pattern": r"^(0|[0-9]{1,17}-[0-9]{1,18}-[0-9]{1,18})$"}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "agent": {"in": "path", "required": True, "schema": {"type": "string", "pattern": schema.NAME}},
    "run_path": {"in": "path", "name": "run", "required": True, "schema": {"type": "string", "pattern": schema.NAME}},
    "position": {"in": "path", "required": True, "schema": {"type": "integer", "minimum": 0, "maximum": schema.LAST}},
    "run": {"in": "query", "schema": {"type": "string", "default": LIFE}},
    "version": {"in": "query", "description": "The newest if left out.", "schema": _NUMBER},
    "after": {"in": "query", "description": "`next` of the page before.", "schema": _NUMBER},
    "after_name": {"in": "query", "name": "after", "description": "`next` of the page before.", "schema": {"type": "string"}},
    "limit": {"in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_PAGE, "default": PAGE}},
    "after_event": {"in": "query", "name": "after", "description": "As Last-Event-ID.", "schema": _CURSOR},
    "follow": {"in": "query", "description": "false ends with what is recorded.", "schema": {"enum": ["true", "false"]}},
    "Last-Event-ID": {
        "in": "header", "description": "Go on after this event; 0: all that is recorded.", "schema": _CURSOR,
    },
    "Idempotency-Key": {
        "in": "header",
        "description": "A word for this task, kept for ever: the same word in the same run means the same task.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
}  # fmt: skip


@cache
def document(settings: Settings) -> bytes:
    """The document, as JSON."""
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, settings)
    kinds: list[Any] = [(kind, "serialization") for kind in schema.ANSWERS]
    kinds += [(kind, "validation") for kind in (schema.NewTask, schema.NewFeedback, schema.NewDecision)]
    _, defined = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    from cod_agent import __version__

    return json.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "cod host",
                "version": __version__,
                "description": "Agents that live long: hand in tasks, say how they went, look at what they remember.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": defined["$defs"],
                "responses": {str(status): _failure(status) for status in WHY},
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
        }
    ).encode()


def _operation(operation: Operation, settings: Settings) -> dict[str, Any]:
    named = [name for name in ("agent", "run", "position") if f"{{{name}}}" in operation.path]
    said: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": [_parameter("run_path" if name == "run" else name) for name in named]
        + [_parameter(name) for name in operation.beside],
        "responses": {str(status): _success(operation, status, kind) for status, kind in _gives(operation).items()},
    }
    always = [status for status in _ALWAYS if status != 401 or not operation.open]
    for status in sorted({*always, *operation.fails} - set(operation.gives)):
        said["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    if operation.takes is not None:
        content = {"application/json": {"schema": _ref(operation.takes)}}
        said["requestBody"] = {"required": True, "content": content}
    if not operation.open and not (operation.method == "get" and settings.open_reads):
        said["security"] = [{"token": []}]
    return said


def _gives(operation: Operation) -> dict[int, type[schema.Said] | None]:
    return {**operation.gives} or {200: None}


def _success(operation: Operation, status: int, kind: type[schema.Said] | None) -> dict[str, Any]:
    if kind is None and operation.name == "openapi":
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    elif kind is None:
        content = {"text/event-stream": {"schema": _EVENT}}
    else:
        content = {"application/json": {"schema": _ref(kind)}}
    said: dict[str, Any] = {"description": operation.summary, "content": content}
    if status == 202:
        said["headers"] = {"Location": {"schema": {"type": "string"}, "description": "Where to look at it."}}
    if status == 503:
        said["description"] = "Not now: it drains, or database or model cannot be had."
        said["headers"] = _LATER_HEADER
    return said


_EVENT = {
    "type": "object",
    "description": "One event of the stream; `data` is JSON. Only what is recorded has an id.",
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}

_LATER_HEADER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}


def _failure(status: int) -> dict[str, Any]:
    said: dict[str, Any] = {
        "description": WHY[status],
        "content": {"application/json": {"schema": _ref(schema.Failure)}},
    }
    if status in LATER:
        said["headers"] = _LATER_HEADER
    return said


def _ref(kind: type[Any]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _parameter(key: str) -> dict[str, Any]:
    return {"name": key, **_PARAMETERS[key]}
