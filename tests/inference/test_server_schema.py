"""schemathesis over the server's own OpenAPI description: it is what is taken and sent, and there is never a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from tests.inference.serving import running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
HOW = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}


@pytest.fixture(scope="module")
def server():
    with running(max_tokens=64) as one:
        yield one
        assert one.idle().used_slots == 0


@pytest.fixture(scope="module")
def operations(server):
    """The described operations by name, one by one: schemathesis' own pytest plugin is tied to pytest's insides."""
    api = schemathesis.openapi.from_url(server.url + "/openapi.json")
    return {f"{found.ok().method} {found.ok().path}": found.ok() for found in api.get_all_operations()}


NAMES = [
    *("post /v1/chat/completions", "post /v1/completions", "post /v1/responses", "post /v1/embeddings"),
    *("post /v1/rerank", "post /v1/feedback", "get /v1/models", "get /v1/models/{model}", "get /v1/responses/{id}"),
    *("delete /v1/responses/{id}", "get /health", "get /ready", "get /metrics"),
    *("delete /v1/feedback", "get /v1/feedback/stats"),
]


def hold(operation, mode, count):
    """Send `count` requests that are as described, or are not."""

    @settings(max_examples=count, **HOW)
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case):
        case.call_and_validate(checks=CHECKS, timeout=60)

    sent()


def test_every_route_is_described(operations):
    assert sorted(operations) == sorted(NAMES)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", NAMES)
def test_description_holds(operations, name, mode):
    if mode is GenerationMode.NEGATIVE and (name.startswith(("get", "delete")) or name.endswith("feedback")):
        pytest.skip("nothing in it can be wrong")
    hold(operations[name], mode, 15)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", NAMES[:6])
def test_description_holds_for_many(operations, name, mode):
    hold(operations[name], mode, 400)
