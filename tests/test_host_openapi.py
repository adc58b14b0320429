"""The service's OpenAPI document is valid, complete and true: requests made from it, well formed and not, meet what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from servers import ScriptedServer

pytest.importorskip("pydantic_settings")
pytest.importorskip("schemathesis")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from test_host import TOKEN, Host, hosting, reply

from cod_agent.host import errors
from cod_agent.host.app import make_app
from cod_agent.host.openapi import OPERATIONS, WHY, Operation
from cod_agent.host.service import Service
from cod_agent.host.settings import load


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with ScriptedServer(reply) as server, hosting(tmp_path_factory.mktemp("host"), server.url) as host:
        host.submit("known")
        host.submit("known", position=1)
        yield host


@pytest.fixture(scope="module")
def api(hosted: Host) -> Any:
    said = hosted.http.get("/openapi.json").json()
    for path in said["paths"].values():  # streams do not end: tests/test_host.py reads them
        for parameter in (one for operation in path.values() for one in operation["parameters"]):
            if parameter["name"] == "follow":
                parameter |= {"required": True, "schema": {"enum": ["false"]}}
    found = schemathesis.openapi.from_dict(said)
    found.config.update(base_url=hosted.started["url"])
    return found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_what_the_document_says_is_so(api: Any, operation: Operation, mode: GenerationMode) -> None:
    streams = operation.path.endswith("/events")
    if mode == GenerationMode.NEGATIVE and (streams or 422 not in operation.fails):
        pytest.skip("nothing of it could be wrong" if not streams else "what is wrong with `follow` could be right")

    @given(case=api[operation.path][operation.method.upper()].as_strategy(generation_mode=mode))
    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def asked(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})

    asked()


def test_every_error_has_a_status_that_is_documented() -> None:
    assert {status for _, status in errors.STATUSES} | {500} == set(WHY)
    answered = {status for operation in OPERATIONS for status in operation.fails} | {401, 405, 413, 421, 500}
    assert answered == set(WHY)


def test_every_route_is_documented() -> None:
    app = make_app(Service(load({"model": "openai:m"})), TOKEN)
    routes = {(route.path, method) for route in app.router.routes for method in route.methods or ()}  # type: ignore[attr-defined]
    documented = {(operation.path, operation.method.upper()) for operation in OPERATIONS}
    assert {(path, method) for path, method in routes if method != "HEAD"} == documented
