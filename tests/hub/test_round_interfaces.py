"""Series and rounds as people see them: REST, the commands beside a hub, the settings and their bounds."""

import json
import stat

import msgspec
import pytest

from cloud_hub.__main__ import main
from cloud_hub.errors import ConfigError, StoreError
from cloud_hub.federation.keys import KEY_NAME, private_key, public_key
from cloud_hub.federation.settings import STRATEGIES, SeriesSettings, settings_of, strategy_of, terms_of
from cloud_hub.store.rounds import get_series
from cloud_hub.store.store import Store
from edge_cascade.round_terms import encode_terms, is_signed, sign_terms
from tests.hub.rounds_fleet import World, a_learner
from tests.hub.test_rest import Api


@pytest.fixture(scope="module")
def learner(tiny_model_dir):
    return a_learner(tiny_model_dir)


def a_round_long(world, **settings):
    """One committed round, one that is open, one rejected vote."""
    world.start(rounds=2, **settings)
    for board in world.boards[:4]:
        board.answer()
    world.boards[4].answer(delta=b"\x01\x00rubbish")
    world.turn()


@pytest.fixture(scope="module")
def seen(tmp_path_factory, learner):
    with Store(tmp_path_factory.mktemp("state")) as store:
        world = World(store, learner)
        a_round_long(world)
        api = Api(store, {"tiny": learner})
        try:
            yield world, api
        finally:
            api.close()


@pytest.fixture
def own(tmp_path, learner):
    with Store(tmp_path) as store:
        world = World(store, learner)
        api = Api(store, {"tiny": learner})
        try:
            yield world, api
        finally:
            api.close()


def post(api, path, document, *, token="admin"):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return api.ask(path, method="POST", body=body, token=token)


def test_rounds_are_shown_with_their_votes_bytes_and_what_the_guard_said(seen):
    _, api = seen
    found = api.json("/v1/rounds?series=1")
    second, first = found["rounds"]
    assert found["next"] is None
    assert (first["phase"], first["asked"], first["answered"], first["counted"]) == ("committed", 5, 5, 4)
    assert first["rejected"] == {"malformed": 1}
    assert first["bytes_up"] > 1000
    assert first["bytes_down"] >= 5 * 100
    assert first["guard"]["says"] == "not worse: 100.0% before, 100.0% after, on 60 samples"
    assert (second["phase"], second["asked"], second["guard"]) == ("collecting", 5, None)
    shown = api.json(f"/v1/rounds/{first['id']}")
    assert shown["round"] == first
    assert [member["state"] for member in shown["members"]] == ["counted"] * 4 + ["rejected"]
    assert shown["members"][4]["reason"] == "malformed"


def test_pages_of_rounds_and_series_are_whole(seen):
    _, api = seen
    first = api.json("/v1/rounds?limit=1")
    second = api.json(f"/v1/rounds?limit=1&cursor={first['next']}")
    assert [page["rounds"][0]["number"] for page in (first, second)] == [2, 1]
    assert second["next"] is None
    (series,) = api.json("/v1/series?limit=1")["series"]
    assert (series["id"], series["phase"], series["committed"]) == (1, "running", 1)
    assert series["settings"]["cohort"] == 5


def test_metrics_count_rounds_votes_and_bytes(seen):
    _, api = seen
    lines = api.ask("/metrics", token=None).body.decode().splitlines()
    assert 'hub_rounds_total{model="tiny",outcome="committed"} 1.0' in lines
    assert 'hub_votes_total{outcome="counted"} 4.0' in lines
    assert 'hub_votes_total{outcome="malformed"} 1.0' in lines
    assert any(line.startswith('hub_round_bytes_total{direction="down"}') for line in lines)


@pytest.mark.parametrize("path", ["/v1/rounds/unknown", "/v1/rounds/%2e%2e", "/v1/rounds/" + "a" * 65])
def test_a_round_that_is_not_there_is_a_problem(seen, path):
    assert "there is no round" in seen[1].problem(path, 404)


def test_a_series_is_started_and_ended_by_an_admin_alone(own):
    world, api = own
    wanted = {"model": "tiny", "settings": {"min_holdout": 50, "cohort": 3}}
    assert post(api, "/v1/series", wanted, token="read").status == 403
    answer = post(api, "/v1/series", wanted)
    assert (answer.status, json.loads(answer.body), api.woken) == (200, {"series": 1}, 1)
    assert world.store.database.run(lambda c: get_series(c, 1))["created_by"] == "adminer"
    detail = api.problem("/v1/series", 409, method="POST", body=json.dumps(wanted).encode(), token="admin")
    assert detail == "model 'tiny' has an open series, 1; wait, or `cloud-hub round abort 1`"
    assert post(api, "/v1/series/1/abort", {"reason": "enough"}, token="label").status == 403
    assert post(api, "/v1/series/1/abort", {"reason": "enough"}).status == 200
    world.turn()
    (series,) = api.json("/v1/series")["series"]
    assert (series["phase"], series["why"]) == ("aborted", "enough")
    assert post(api, "/v1/series/1/abort", b"").status == 409
    assert post(api, "/v1/series/7/abort", b"").status == 404


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "the body must be like"),
        (b'{"model": "tiny", "more": 1}', 400, "more"),
        (b'{"model": "else"}', 404, "no model 'else'; it has: tiny"),
        (b'{"model": "tiny", "settings": {"rounds": 0}}', 400, "series: rounds = 0: expected int >= 1"),
        (b'{"model": "tiny", "settings": {"round": 1}}', 400, "did you mean 'rounds'?"),
        (b'{"model": "tiny", "settings": {"min_holdout": 500}}', 409, "has 60 holdout samples"),
    ],
)
def test_a_series_that_cannot_be_started_is_refused_with_the_reason(own, body, status, says):
    assert says in own[1].problem("/v1/series", status, method="POST", body=body, token="admin")


# --- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, tiny_model_dir, capsys):
    path = tmp_path / "hub.toml"
    path.write_text(
        f'[hub]\nstate_dir = "{tmp_path}/state"\n[[models]]\nbundle = "{tiny_model_dir / "bundle"}"\n'
    )

    def run(*arguments):
        capsys.readouterr()
        code = main([*map(str, arguments), "--config", str(path)])
        return code, *capsys.readouterr()

    return run


def test_the_commands_start_show_list_and_end_a_series_beside_a_hub(tmp_path, learner, command):
    with Store(tmp_path / "state") as store:
        world = World(store, learner)
        start = ("round", "start", "tiny", "--rounds", 2, "--cohort", 5, "--min-holdout", 50)
        assert command(*start, "--private-heads", "--seed", "7") == (0, "1\n", "")
        settings = msgspec.json.decode(store.database.run(lambda c: get_series(c, 1))["settings"])
        assert (settings["private_heads"], settings["rounds"], settings["seed"]) == (True, 2, 7)
        world.turn()
        code, listed, _ = command("round", "list")
        assert (code, listed.splitlines()[1].split()[:5]) == (0, ["1", "tiny", "running", "0/2", "fedavg"])
        code, shown, _ = command("round", "show", 1)
        assert code == 0
        assert "asked 5, answered 0, votes 0, late 0, rejected 0" in shown
        assert "settings    rounds 2, cohort 5, private_heads True, min_holdout 50, seed 7" in shown
        detail = json.loads(command("round", "show", 1, "--json")[1])
        (round_,) = detail["rounds"]
        code, shown, _ = command("round", "show", round_["id"])
        assert [line.split()[:2] for line in shown.splitlines()[4:]] == [
            [f"press-{n}", "asked"] for n in range(5)
        ]
        assert json.loads(command("round", "list", "--json")[1])[0]["id"] == 1
        assert command("round", "abort", 1, "--reason", "enough")[0] == 0
        world.turn()
        assert "aborted, enough" in command("round", "show", 1)[1]
        code, _, error = command("round", "abort", 1)
        assert (code, error.count("\n")) == (12, 1)


def test_a_shown_round_says_what_was_judged(tmp_path, learner, command):
    with Store(tmp_path / "state") as store:
        a_round_long(World(store, learner))
        shown = command("round", "show", 1)[1]
    assert "asked 5, answered 5, votes 4, late 0, rejected 1 malformed" in shown
    assert "guard not worse: 100.0% before, 100.0% after, on 60 samples\n" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("start", "tiny"), 12, "model 'tiny' has 0 holdout samples with a verdict, needs 100"),
        (("start", "tiny", "--rounds", "0"), 2, "rounds = 0: expected int >= 1 (allowed: a whole number"),
        (("start", "tiny", "--rounds", "many"), 2, 'rounds = "many": expected int'),
        (("start", "tiny", "--strategy", "x"), 2, '(allowed: "clipped", "fedadam"'),
        (("start", "else"), 2, "none is called 'else'; there are: tiny"),
        (("show", "5"), 8, "there is no series 5"),
        (("show", "abc"), 8, "there is no round 'abc'"),
        (("abort", "5"), 8, "there is no series 5"),
    ],
)
def test_a_command_that_cannot_be_is_one_line_with_its_exit_code(command, arguments, code, says):
    got, out, error = command("round", *arguments)
    assert (got, out, error.count("\n")) == (code, "", 1)
    assert says in error


def test_the_key_is_made_once_kept_private_and_signs_what_boards_check(tmp_path, command):
    code, shown, _ = command("round", "key")
    path = tmp_path / "state" / KEY_NAME
    assert (code, stat.S_IMODE(path.stat().st_mode)) == (0, 0o600)
    assert command("round", "key")[1] == shown == f"{public_key(tmp_path / 'state')}\n"
    key = private_key(tmp_path / "state")
    assert is_signed(b"terms", sign_terms(b"terms", key), bytes.fromhex(shown))
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_a_key_file_with_something_else_in_it_is_one_line(tmp_path):
    (tmp_path / KEY_NAME).write_text("hello")
    with pytest.raises(StoreError, match="is not 64 hexadecimal digits; restore it"):
        private_key(tmp_path)


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"strategy": "fedprox"}, "needs prox_mu above 0"),
        ({"strategy": "clipped"}, "needs max_vote_norm"),
        ({"strategy": "median", "cohort": 65}, "median holds the votes, 64 at most"),
        ({"grace_s": 10, "deadline_s": 5}, "is longer than deadline_s = 5"),
        ({"min_examples": 3000}, "is more than max_examples = 2000"),
        ({"noise_multiplier": 1.0}, "without clip_norm hides nothing"),
        (
            {"noise_multiplier": 1.0, "clip_norm": 1.0, "encoding": "sign"},
            "error feedback brings back what noise hid",
        ),
        ({"base_encoding": "topk"}, '(allowed: "fp32", "int8")'),
        ({"quorum": 0}, "(allowed: a number > 0 and <= 1)"),
        ({"seed": 1.5}, "seed = 1.5"),
    ],
)
def test_settings_that_cannot_be_are_explained_in_one_line(values, says):
    with pytest.raises(ConfigError) as caught:
        settings_of(values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_had_and_its_terms_are_ones_that_boards_take(strategy):
    settings = settings_of({"strategy": strategy, "prox_mu": 0.01, "max_vote_norm": 1.0})
    strategy_of(settings)
    terms = terms_of(settings, "m", "r", graph=bytes(32), base=bytes(32), base_bytes=8)
    assert (terms.learning_rate_ppm, terms.prox_mu_ppm, terms.momentum_ppm) == (1_000, 10_000, 900_000)
    encode_terms(terms)


def test_settings_that_were_kept_are_read_again_as_they_were():
    settings = settings_of({"rounds": 9, "max_vote_norm": 2.5})
    encoded = msgspec.json.encode(settings)
    assert msgspec.json.decode(encoded, type=SeriesSettings) == settings
