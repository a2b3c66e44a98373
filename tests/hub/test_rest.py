"""The REST interface, against a server that listens; every answer is held against the OpenAPI document."""

import asyncio
import gzip
import io
import json
import socket
import threading
import urllib.error
import urllib.request
from collections import namedtuple
from contextlib import ExitStack, contextmanager, suppress

import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import validate as validate_openapi

from cloud_hub.admin.metrics import MAX_UNKNOWN, Vitals, render_metrics, stats_document
from cloud_hub.admin.route import RolloutParts
from cloud_hub.admin.routes import ROUTES
from cloud_hub.admin.service import MAX_BODY_BYTES, Service
from cloud_hub.admin.tokens import check_token, create_token, list_tokens, revoke_token
from cloud_hub.core.delivery import NewReport, NewStatus
from cloud_hub.errors import ListenError, StoreUnavailableError
from cloud_hub.full_model import FullModelWorker
from cloud_hub.store.queries import Totals
from cloud_hub.store.store import Store
from cloud_hub.store.verdicts import due_verdicts
from edge_cascade.messages import RunningModel
from tests.hub.fleet import BOOT, BUNDLE, a_delivery, a_model, a_new_case, sample, wait_until

Answer = namedtuple("Answer", "status type body headers")


class Api:
    """A running service, and a client that checks every answer against the document."""

    def __init__(self, store, models=None):
        self.store = store
        self.woken = 0
        self.found_problems = []
        self.labelled = []
        vitals = Vitals(True, 0, 3, (0.004, 0.02), 5, True)
        self.service = Service(
            store,
            models or {"pump": a_model()},
            vitals=lambda: vitals,
            problems=lambda: self.found_problems,
            on_labelled=self.labelled.append,
            on_series=self._wake,
            rollouts=RolloutParts(is_signed=lambda *_: True, wake=self._wake),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = self.call(self.service.start("127.0.0.1", 0))
        self.tokens = {
            scope: store.database.run(
                lambda c, scope=scope: create_token(c, f"{scope}er", [scope], now_ms=1, expires_at_ms=None)
            )
            for scope in ("read", "label", "admin")
        }
        self.document = None
        self.document = json.loads(self.ask("/v1/openapi.json").body)

    def _wake(self):
        self.woken += 1

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def close(self):
        self.call(self.service.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, path, *, method="GET", body=None, token="read", headers=None):
        headers = dict(headers or {})
        token = self.tokens.get(token, token)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body, method=method, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                answer = Answer(
                    response.status, response.headers.get_content_type(), response.read(), response.headers
                )
        except urllib.error.HTTPError as error:
            with error:
                answer = Answer(error.code, error.headers.get_content_type(), error.read(), error.headers)
        if self.document is not None:
            self.check(path, method, answer)
        return answer

    def used(self, name):
        return any(
            token.name == name and token.last_used_ms for token in self.store.database.run(list_tokens)
        )

    def json(self, path, **how):
        answer = self.ask(path, **how)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    def problem(self, path, status, **how):
        answer = self.ask(path, **how)
        assert (answer.status, answer.type) == (status, "application/problem+json"), answer.body
        problem = json.loads(answer.body)
        assert problem["status"] == status
        assert "Traceback" not in problem["detail"]
        return problem["detail"]

    def check(self, path, method, answer):
        """Status, media type and body must be what the document says of this operation."""
        operation = self.operation(path.partition("?")[0], method)
        if operation is None:
            assert answer.type == "application/problem+json"
            return
        content = operation["responses"][str(answer.status)]["content"]
        schema = content[answer.type]["schema"]
        if answer.type.endswith("json"):
            jsonschema.validate(
                json.loads(answer.body),
                schema | {"components": self.document["components"]},
                cls=jsonschema.Draft202012Validator,
            )

    def operation(self, path, method):
        for template, operations in self.document["paths"].items():
            steps, wanted = path.split("/"), template.split("/")
            if len(steps) == len(wanted) and all(
                w.startswith("{") or w == s for s, w in zip(steps, wanted, strict=True)
            ):
                return operations.get(method.lower())
        return None


@contextmanager
def serving(state_dir):
    with Store(state_dir) as store:
        status = NewStatus("press-1", True, BOOT, "1.2", (RunningModel("pump", BUNDLE, "default", 2),))
        report = NewReport("press-1", BOOT, 90, 55, {"shed": 4})
        cases = [
            a_new_case(0, x=sample(0), device_label=0, escalated=False, audit_ppm=10_000),
            a_new_case(1, x=sample(1), device_label=0),
            a_new_case(2, x=sample(2.5), device="press-2"),
        ]
        store.commit([a_delivery(*cases, status=status, report=report)], now_ms=1_000)
        FullModelWorker(store, {"pump": a_model()}).answer_some(a_model())
        store.commit([a_delivery(a_new_case(3, model="fan"))], now_ms=2_000)
        api = Api(store)
        try:
            yield api
        finally:
            api.close()


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """For tests that only ask."""
    with serving(tmp_path_factory.mktemp("state")) as api:
        yield api


@pytest.fixture
def own_api(tmp_path):
    """For tests that change something, a wrong token's count included."""
    with serving(tmp_path) as api:
        yield api


def test_the_document_is_valid_openapi_and_names_every_route(api):
    assert api.document["openapi"].startswith("3.1")
    validate_openapi(api.document)
    described = {
        (method.upper(), path) for path, operations in api.document["paths"].items() for method in operations
    }
    served = {
        (route.method, route.resource.canonical)
        for route in api.service.application().router.routes()
        if route.method != "HEAD"
    }
    assert described == served == {(route.method, route.path) for route in ROUTES}


def test_devices_show_what_they_run_and_count(api):
    page = api.json("/v1/devices")
    assert [device["name"] for device in page["devices"]] == ["press-1"]
    device = page["devices"][0]
    running = {
        "model": "pump",
        "bundle": BUNDLE.hex(),
        "plan": "default",
        "point": 2,
        "takes_releases": False,
    }
    assert device["models"] == [running]
    assert (device["online"], device["counters"], device["daemon_version"]) == (True, {"shed": 4}, "1.2")


def test_cases_come_newest_first_and_page_by_page(api):
    first = api.json("/v1/cases?limit=3")
    assert [case["seq"] for case in first["cases"]] == [3, 2, 1]
    second = api.json(f"/v1/cases?limit=3&cursor={first['next']}")
    assert ([case["seq"] for case in second["cases"]], second["next"]) == ([0], None)


@pytest.mark.parametrize(
    ("query", "seqs"),
    [
        ("device=press-2", [2]),
        ("model=fan", [3]),
        ("audited=true", [0]),
        ("escalated=false", [0]),
        ("verdict=false", [3]),
        ("source=model", [2, 1, 0]),
        ("source=human", []),
        ("since=2000", [3]),
        ("until=2000", [2, 1, 0]),
        ("label=1", [1]),
        ("model=pump&label=worn", [1]),
    ],
)
def test_filters_reach_the_store(api, query, seqs):
    assert [case["seq"] for case in api.json(f"/v1/cases?{query}")["cases"]] == seqs


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=x", "limit"),
        ("cursor=abc", "cursor"),
        ("escalated=perhaps", "escalated"),
        ("colour=red", "colour"),
        ("source=cat", "cat"),
        ("limit=1&limit=2", "more than once"),
        ("label=worn", "needs `model`"),
        ("model=pump&label=rusty", "calm, worn, broken"),
    ],
)
def test_a_query_that_makes_no_sense_is_a_400_that_says_why(api, query, says):
    assert says in api.problem(f"/v1/cases?{query}", 400)


def test_one_case_shows_exits_verdict_and_names(api):
    detail = api.json("/v1/cases/2")
    case = detail["case"]
    assert detail["labels"] == []
    assert case["exits"][0]["label"] == 1
    assert (case["device_label_name"], case["reason"], case["state"]) == ("calm", "unsure", "answered")
    verdict = case["verdict"]
    assert (verdict["label_name"], verdict["source"], verdict["confirmed"]) == ("worn", "model", False)
    assert sum(verdict["probabilities"]) == pytest.approx(1, abs=1e-4)


def test_a_tensor_comes_as_npy_without_pickle(api):
    answer = api.ask("/v1/cases/3/tensor")
    assert (answer.status, answer.type) == (200, "application/octet-stream")
    x = np.load(io.BytesIO(answer.body), allow_pickle=False)
    assert (x.dtype, x.tolist()) == (np.float32, sample(2.5).tolist())


@pytest.mark.parametrize(
    "path", ["/v1/cases/99", "/v1/cases/99/tensor", "/v1/cases/abc", "/v1/cases/" + "9" * 40]
)
def test_a_case_that_is_not_there_is_a_404(api, path):
    assert "there is no case" in api.problem(path, 404)


def test_a_label_outranks_the_model_by_name_or_index_and_enters_the_outbox(own_api):
    body = json.dumps({"label": "broken"}).encode()
    labelled = own_api.json("/v1/cases/2/label", method="POST", body=body, token="label")
    assert labelled == {"case": 2, "label": 2, "label_name": "broken", "revision": 2}
    assert own_api.labelled == ["press-1"]
    assert (
        own_api.json("/v1/cases/2/label", method="POST", body=b'{"label":0}', token="admin")["revision"] == 3
    )
    detail = own_api.json("/v1/cases/2")
    assert [(one["label_name"], one["labelled_by"]) for one in detail["labels"]] == [
        ("broken", "labeler"),
        ("calm", "adminer"),
    ]
    verdict = detail["case"]["verdict"]
    assert (verdict["source"], verdict["label"], verdict["model_label"]) == ("human", 0, 1)
    due = own_api.store.database.run(lambda c: due_verdicts(c, "press-1", now_ms=0, limit=10))
    assert (2, 3, 0) in {(v.case_id, v.revision, v.label) for v in due}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/cases/2/label", b"", 400, "the body must be"),
        ("/v1/cases/2/label", b"\xff\xfe", 400, "the body must be"),
        ("/v1/cases/2/label", b'{"label": -1}', 400, "the body must be"),
        ("/v1/cases/2/label", b'{"label": null}', 400, "the body must be"),
        ("/v1/cases/2/label", b'{"label": "x", "more": 1}', 400, "more"),
        ("/v1/cases/2/label", b'{"label": "rusty"}', 400, "calm, worn, broken"),
        ("/v1/cases/2/label", b'{"label": 3}', 400, "calm, worn, broken"),
        ("/v1/cases/2/label", b"[" * 5000, 400, "the body must be"),
        ("/v1/cases/4/label", b'{"label": "calm"}', 409, "no model 'fan'"),
        ("/v1/cases/77/label", b'{"label": "calm"}', 404, "there is no case 77"),
        ("/v1/cases/2/label", b" " * (MAX_BODY_BYTES + 1), 413, "larger than"),
    ],
)
def test_a_label_that_cannot_be_is_refused_with_the_reason(api, path, body, status, says):
    assert says in api.problem(path, status, method="POST", body=body, token="label")


def test_stats_count_what_happened(api):
    stats = api.json("/v1/stats")
    assert stats["models"]["pump"] == {
        "cases": {"unsure": 3},
        "verdicts": {"model": 3},
        "failed": 0,
        "audits": {"same": 1, "different": 0, "share": 1.0},
        "escalations": {"same": 0, "different": 2, "share": 0.0},
        "rounds": {},
    }
    assert (stats["pending"], stats["unconfirmed_verdicts"], stats["devices_online"]) == (1, 3, 1)
    assert stats["acks_latency"] == {"p50_ms": 4.0, "p99_ms": 20.0}
    assert stats["stored_bytes"] > 0


def test_metrics_are_prometheus_and_an_unknown_model_adds_no_label(api):
    answer = api.ask("/metrics", token=None)
    assert (answer.status, answer.type) == (200, "text/plain")
    lines = answer.body.decode().splitlines()
    assert 'hub_cases_total{model="pump",reason="unsure"} 3.0' in lines
    assert 'hub_cases_total{model="other",reason="unsure"} 1.0' in lines
    assert "hub_not_taken_total 3.0" in lines


def test_a_board_that_invents_models_costs_the_statistics_nothing():
    counters = {f"{kind}/invented-{n}/unsure": 1 for n in range(20_000) for kind in ("cases", "verdicts")}
    counters |= {"cases/pump/unsure": 7, "failures/pump": 2}
    vitals = Vitals(True, 0, 0, None, 0, True)
    looked = CountedLooks(counters)
    stats = stats_document(Totals(looked, 0, 0, 1, 1), vitals, {"pump"})
    assert looked.times < 5
    assert len(stats.models) == MAX_UNKNOWN + 2
    assert (stats.models["pump"].cases, stats.models["pump"].failed) == ({"unsure": 7}, 2)
    assert stats.models["other"].cases == {"unsure": 20_000 - MAX_UNKNOWN}
    lines = render_metrics(stats, vitals, {"pump"}).decode().splitlines()
    assert 'hub_cases_total{model="other",reason="unsure"} 20000.0' in lines


class CountedLooks(dict):
    """Counters that count how often somebody goes through all of them."""

    times = 0

    def items(self):
        self.times += 1
        return super().items()

    def __iter__(self):
        self.times += 1
        return super().__iter__()


def test_health_says_what_is_wrong_without_a_token(own_api):
    assert own_api.json("/healthz", token=None) == {"status": "ok", "problems": []}
    assert own_api.json("/readyz", token=None)["status"] == "ok"
    own_api.found_problems.append("broker: no connection")
    answer = own_api.ask("/readyz", token=None)
    assert (answer.status, json.loads(answer.body)["problems"]) == (503, ["broker: no connection"])


def test_without_a_valid_token_there_is_one_constant_answer(own_api):
    answers = set()
    for token in (None, "", "nonsense", "a.b", "0" * 12 + ".x", "\xe9", "x" * 4000):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        answer = own_api.ask("/v1/cases", token=None, headers=headers)
        answers.add((answer.status, answer.headers["WWW-Authenticate"], answer.body))
    ((status, challenge, body),) = answers
    assert (status, challenge) == (401, 'Bearer realm="cloud-hub"')
    assert b"a valid token is needed" in body


def test_a_right_id_with_a_wrong_secret_is_a_401(own_api):
    token_id, _, secret = own_api.tokens["read"].partition(".")
    assert "valid token" in own_api.problem("/v1/cases", 401, token=f"{token_id}.{secret[:-1]}x")
    assert "valid token" in own_api.problem("/v1/cases", 401, token=f"{'0' * 12}.{secret}")


def test_a_revoked_or_expired_token_is_a_401(own_api):
    expired = own_api.store.database.run(
        lambda c: create_token(c, "old", ["read"], now_ms=1, expires_at_ms=2)
    )
    own_api.problem("/v1/cases", 401, token=expired)
    assert own_api.json("/v1/stats")
    token_id = own_api.tokens["read"].partition(".")[0]
    own_api.store.database.run(lambda c: revoke_token(c, token_id, now_ms=5))
    own_api.problem("/v1/cases", 401)


def test_a_scope_that_is_missing_is_a_403_that_names_it(api):
    detail = api.problem("/v1/cases/2/label", 403, method="POST", body=b'{"label":0}', token="read")
    assert "lacks the scope 'label'" in detail
    assert "lacks the scope 'read'" in api.problem("/v1/cases", 403, token="label")
    assert api.json("/v1/cases", token="admin")


def test_many_wrong_tokens_from_one_address_have_to_wait(own_api):
    statuses = [own_api.ask("/v1/cases", token="wrong.token").status for _ in range(12)]
    assert statuses[:10] == [401] * 10
    assert statuses[-1] == 429
    answer = own_api.ask("/v1/cases", token="label")
    assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
    assert own_api.ask("/healthz", token=None).status == 200


def test_whose_token_was_right_before_does_not_wait_for_wrong_ones_from_the_same_address(own_api):
    assert own_api.json("/v1/stats", token="admin")
    assert [own_api.ask("/v1/cases", token="wrong.token").status for _ in range(12)][-1] == 429
    assert own_api.json("/v1/stats", token="admin")
    token_id = own_api.tokens["admin"].partition(".")[0]
    own_api.store.database.run(lambda c: revoke_token(c, token_id, now_ms=5))
    own_api.problem("/v1/stats", 401, token="admin")
    own_api.problem("/v1/stats", 429, token="admin")


def test_who_leaves_in_the_middle_of_a_body_is_no_fault_of_the_hubs(own_api, caplog):
    said = (
        "POST /v1/cases/2/label HTTP/1.1\r\nHost: hub\r\nContent-Length: 90\r\n"
        f"Authorization: Bearer {own_api.tokens['label']}\r\n\r\n{{"
    )
    with socket.create_connection(("127.0.0.1", own_api.port), timeout=10) as gone:
        gone.sendall(said.encode())
        wait_until(lambda: own_api.used("labeler"), what="the token to be looked at")
    own_api.call(own_api.service.stop())
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("body", [b"no gzip", gzip.compress(b" " * 10**6 + b'{"label": 0}')])
def test_a_packed_body_is_not_unpacked(own_api, caplog, body):
    packed = {"Content-Encoding": "gzip"}
    says = own_api.problem("/v1/cases/2/label", 400, method="POST", body=body, token="label", headers=packed)
    assert "the body must be like" in says
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_strangers_take_no_place_from_whoever_has_a_token(own_api, monkeypatch):
    monkeypatch.setattr("cloud_hub.admin.listener.most_connections", lambda: 4)
    own_api.call(own_api.service.stop())
    own_api.port = own_api.call(own_api.service.start("127.0.0.1", 0))
    with ExitStack() as held:
        strangers = [
            held.enter_context(socket.create_connection(("127.0.0.1", own_api.port), timeout=10))
            for _ in range(30)
        ]
        assert own_api.json("/v1/stats")
        with suppress(ConnectionResetError):
            assert strangers[0].recv(1) == b""


def test_secrets_are_kept_as_digests_only(own_api, tmp_path):
    for token in own_api.tokens.values():
        secret = token.partition(".")[2]
        assert not any(secret.encode() in file.read_bytes() for file in tmp_path.glob("hub.db*"))
        assert own_api.store.database.run(lambda c, token=token: check_token(c, token, now_ms=1)) is not None
    assert [info.scopes for info in own_api.store.database.run(list_tokens)].count(("read",)) == 1


def test_what_is_not_there_and_what_is_not_allowed_are_problems_too(api):
    assert "openapi.json" in api.problem("/v1/nothing", 404)
    answer = api.ask("/v1/cases", method="DELETE")
    assert (answer.status, answer.type, answer.headers["Allow"]) == (
        405,
        "application/problem+json",
        "GET",
    )


def test_a_store_that_is_away_is_a_503_and_a_fault_of_ours_a_500(own_api, monkeypatch, caplog):
    async def away(_):
        raise StoreUnavailableError("store: disk I/O error")

    async def fault(_):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(own_api.store.database, "run_async", away)
    assert own_api.problem("/v1/cases", 503) == "store: disk I/O error"
    monkeypatch.setattr(own_api.store.database, "run_async", fault)
    assert "secret detail" not in own_api.problem("/v1/cases", 500)
    assert "secret detail" in caplog.text


def test_an_address_in_use_is_one_clear_line(api):
    with pytest.raises(ListenError, match=rf"http\.port = {api.port}: cannot listen"):
        api.call(api.service.start("127.0.0.1", api.port))
