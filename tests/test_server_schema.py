"""The schema, and whatever it allows or forbids, tried by schemathesis."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.server_kit import EVERYTHING, SIMPLE, engine_of, httpx, served_model, serving

pytestmark = pytest.mark.any_jax

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

ROUTES = (
    *("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize"),
    *("GET /v1/models", "GET /v1/models/{name}", "GET /tokenizer_info", "GET /health"),
    *("GET /metrics", "GET /"),
)


@pytest.fixture(scope="module")
def served():
    lm = served_model()
    with serving(lm, engine_of(lm, EVERYTHING, SIMPLE)) as running:
        yield running


@pytest.fixture(scope="module")
def api(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


@pytest.mark.parametrize(
    "route, mode",
    [(route, "POSITIVE") for route in ROUTES]
    + [(route, "NEGATIVE") for route in ROUTES if route.startswith("POST")],
)
def test_every_answer_is_one_that_the_schema_has(api, route, mode):
    """Its status, its type and its fields; and no request is answered that the schema forbids.

    What the schema allows may still be refused: a model that there is not, a prompt too long.
    """
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    method, path = route.split()
    operation = api[path][method]
    statuses = set()

    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=GenerationMode[mode]))
    def check(case):
        if mode == "POSITIVE" and isinstance(case.body, dict):
            # So that some of them come to be answered.
            case.body.pop("model", None)
            case.body |= {"max_tokens": 3} if path.startswith("/v1") else {}
            case.body.pop("max_completion_tokens", None)
        made = case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=30)
        statuses.add(made.status_code)

    check()
    assert mode == "NEGATIVE" or "{name}" in path or 200 in statuses


def test_the_schema_says_what_streams_and_what_may_go_wrong(served):
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert {f"{method.upper()} {path}" for path in paths for method in paths[path]} == set(ROUTES)
    for path in ("/v1/completions", "/v1/chat/completions"):
        responses = paths[path]["post"]["responses"]
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"400", "401", "404", "413", "429", "503"} <= set(responses)
        assert "422" not in responses, "no answer of FastAPI's own"
    served.quiet()
