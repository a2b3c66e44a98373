import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.__main__ import build_parser
from cloud_hub.builder.commands import request_of
from cloud_hub.builder.request import BuildRequest, make_request, read_recipe
from cloud_hub.errors import BuildError

LEAST = {"full": "/f.onnx", "data": "/d.npz", "out": "/o"}
EVERY = {
    "full": "/f.onnx",
    "data": "/d.npz",
    "out": "/o",
    "edge": "/e.onnx",
    "model": "my-model",
    "version": "2.1",
    "seed": 7,
    "epsilon": 0.01,
    "delta": 0.1,
    "disagreement_epsilon": 0.03,
    "max_upload": 0.4,
    "plans": ("fp32", "int8"),
    "scale": 0.5,
    "mean": (0.25, -1.0, 3.0),
    "std": (1.0, 2.0, 0.5),
    "layout": "channels_last",
    "encoding": "int8",
    "wire_scale": 0.125,
    "window": 128,
    "hop": 64,
    "x_key": "signals",
    "y_key": "fault",
    "groups_key": "machine",
    "labels_key": "faults",
    "window_overlap": 32,
    "max_bytes": 1000,
    "exits": (0.1, 0.6),
    "profile": "/board.json",
    "distillation": 0.75,
    "litert": True,
    "calibration_is_fresh": True,
}
OTHERS = [
    {"budget_ms": 1.5, "budget_kb": 200.0, "epochs": 3, "batch": 32},
    {"size": "small"},
    {"edge": "/e.onnx", "cuts": ("conv1", "relu/4")},
    {"edge": "/e.onnx", "fine_tune": True, "learning_rate": 0.02, "epochs": 4, "batch": 16},
    {"rebase": "/old", "hop": 4, "calibration_is_fresh": True},
    {"uncertified": True},
]
"""What does nothing beside some of the keys above."""


def typed(values):
    """The command line that says the same."""
    arguments = []
    for key, value in values.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(name if value else name.replace("--", "--no-", 1))
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            arguments.append(f"{name}={text}")
    return arguments


def written(values):
    """The recipe that says the same."""
    lines = []
    for key, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value
        lines.append(f"{key} = {json.dumps(plain)}\n")
    return "".join(lines)


def parse(*arguments):
    return request_of(build_parser().parse_args(["build", *map(str, arguments)]))


def refusal_of(call, *arguments, **keywords):
    with pytest.raises(BuildError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_values_here_are_every_key_and_no_default():
    assert set().union(EVERY, *OTHERS) == set(BuildRequest.__struct_fields__)
    plain = make_request(LEAST)
    for values in (EVERY, *OTHERS):
        request = make_request({**LEAST, **values})
        same = {key for key in values if getattr(request, key) == getattr(plain, key)}
        assert same <= set(LEAST)


def test_what_was_not_said_of_samples_is_none():
    plain = make_request(LEAST)
    unsaid = ("model", "scale", "mean", "std", "layout", "encoding", "wire_scale", "window", "hop")
    assert {getattr(plain, key) for key in unsaid} == {None}


@pytest.mark.parametrize("values", [EVERY, LEAST, *({**LEAST, **values} for values in OTHERS)])
def test_typed_written_and_in_python_a_request_is_the_same(recipe, values):
    expected = make_request(values)
    assert all(getattr(expected, key) == value for key, value in values.items())
    assert parse(*typed(values)) == expected
    assert parse(recipe(written(values))) == expected


@pytest.mark.parametrize("key", sorted(EVERY))
def test_each_key_may_be_written_while_the_rest_is_typed(recipe, key):
    rest = {name: value for name, value in EVERY.items() if name != key}
    assert parse(recipe(written({key: EVERY[key]})), *typed(rest)) == make_request(EVERY)


def test_what_is_typed_outranks_the_recipe(recipe):
    path = recipe(written({**LEAST, "epsilon": 0.01, "seed": 3, "uncertified": True, "litert": True}))
    request = parse(path, "--epsilon", "0.02", "--no-uncertified", "--no-litert")
    assert (request.epsilon, request.seed, request.uncertified, request.litert) == (0.02, 3, False, False)


def test_paths_in_a_recipe_start_at_its_folder_and_typed_ones_at_the_working_directory(recipe):
    path = recipe(
        written({"full": "nets/full.onnx", "data": "/abs.npz", "out": "../out", "profile": "b.json"})
    )
    request = parse(path, "--data", "typed.npz")
    folder = path.parent
    assert (request.full, request.data, request.out, request.profile) == (
        str(folder / "nets/full.onnx"),
        "typed.npz",
        str(folder / "../out"),
        str(folder / "b.json"),
    )
    assert parse(path).data == "/abs.npz"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"epsilon": 5.0}, "build: epsilon = 5.0: expected float < 1.0"),
        ({"epsilon": 0.0}, "epsilon = 0.0: expected float > 0.0"),
        ({"seed": -1}, "seed = -1: expected int >= 0"),
        ({"seed": 1.5}, "seed = 1.5: expected int, got float"),
        ({"plans": ("int4",)}, "plans = ('int4',): allowed: int8, int8-fp32, fp32"),
        ({"plans": ()}, "plans = (): allowed: int8"),
        ({"plans": ("int8", "int8")}, "plans names one twice"),
        ({"model": "a b"}, "model = 'a b': allowed: 1 to 64 letters"),
        ({"layout": "nhwc"}, "layout = 'nhwc': allowed: channels_first, channels_last"),
        ({"full": ""}, "full = '': expected str of length >= 1"),
        ({"full": "a\0b"}, "full holds a zero byte"),
        ({"mean": (float("nan"),)}, "mean = nan: give a finite number"),
        ({"std": (1.0, float("inf"))}, "std = inf: give a finite number"),
        ({"std": (0.0,)}, "std = (0.0,): expected float > 0.0"),
        ({"budget_ms": float("nan")}, "budget_ms = nan: expected float > 0.0"),
        ({"mean": 0.5}, "mean = 0.5: expected array, got float"),
        ({"hop": 3}, "hop does nothing without window or rebase: it is the distance"),
        ({"window": 4, "hop": 5}, "hop = 5: 1 to the window's 4"),
        ({"edge": "a", "exits": (0.5, 0.2)}, "exits are shares of the cost in ascending order"),
        ({"encoding": "float32", "wire_scale": 1.0}, "wire_scale is a step of int8 or uint8"),
        ({"epsilom": 0.1}, "epsilom"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(change, complaint):
    assert complaint in refusal_of(make_request, {**LEAST, **change})


def test_epochs_and_batch_do_nothing_with_edge_but_where_it_is_fine_tuned(recipe):
    edge = {**LEAST, "edge": "a", "fine_tune": True}
    assert make_request({**edge, "epochs": 3, "batch": 8}).epochs == 3
    assert "epochs does nothing with edge: " in refusal_of(
        make_request, {**edge, "epochs": 3, "fine_tune": False}
    )
    assert refusal_of(make_request, {**LEAST, "fine_tune": True}).startswith(
        "build: fine_tune does nothing without edge"
    )
    assert refusal_of(make_request, {**LEAST, "edge": "a", "learning_rate": 0.1}).startswith(
        "build: learning_rate does nothing without fine_tune"
    )


@pytest.mark.parametrize("key", ["epochs = 3\n", "fine_tune = true\nepochs = 3\n"])
def test_a_recipes_epochs_stay_where_a_typed_edge_is_fine_tuned(recipe, key):
    path = recipe('full = "f"\ndata = "d"\nout = "o"\n' + key)
    typed_too = () if "fine_tune" in key else ("--fine-tune",)
    assert parse(path, "--edge", "e.onnx", *typed_too).epochs == 3
    if "fine_tune" not in key:
        assert parse(path, "--edge", "e.onnx").epochs == make_request(LEAST).epochs


@pytest.mark.parametrize(
    ("beside", "keys"),
    [
        ({"uncertified": True}, {"delta": 0.05, "disagreement_epsilon": 0.1, "max_upload": 0.5}),
        (
            {"rebase": "a"},
            {
                "edge": "b",
                "cuts": ("b",),
                "exits": (0.2, 0.5),
                "fine_tune": True,
                "learning_rate": 0.003,
                "size": "small",
                "budget_ms": 1.0,
                "budget_kb": 1.0,
                "epochs": 15,
                "batch": 128,
                "distillation": 0.5,
            },
        ),
        (
            {"edge": "a"},
            {"size": "small", "budget_ms": 1.0, "budget_kb": 1.0, "epochs": 15, "batch": 128},
        ),
        ({"cuts": ("a",), "edge": "b"}, {"exits": (0.2, 0.5)}),
        ({"size": "medium"}, {"budget_ms": 1.0, "budget_kb": 0.001}),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_even_as_its_default(recipe, beside, keys):
    for key, value in keys.items():
        values = {**LEAST, **beside, key: value}
        line = refusal_of(make_request, values)
        assert line.startswith(f"build: {key} does nothing with {next(iter(beside))}: ")
        assert line.endswith(": leave one of them out")
        assert f"{key} does nothing with" in refusal_of(parse, *typed(values))
        # Typed on top of a recipe it was meant, and is refused too.
        path = recipe(written({**LEAST, **beside}))
        assert refusal_of(parse, path, *typed({key: value})).startswith(f"{path}: {key} does nothing with")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"cuts": ("a",)}, "cuts does nothing without edge: they name values of a network of your own"),
        ({"exits": (0.2, 0.5)}, "exits does nothing without edge: they are places in a network of your own"),
        ({"calibration_is_fresh": True}, "calibration_is_fresh does nothing without edge or rebase"),
    ],
)
def test_a_key_that_lacks_what_it_is_about_is_refused(values, complaint):
    assert complaint in refusal_of(make_request, {**LEAST, **values})


def test_what_says_nothing_hinders_nothing():
    made = make_request({**LEAST, "rebase": "a", "edge": None, "size": "auto", "cuts": ()})
    assert made == make_request({**LEAST, "rebase": "a"})
    assert make_request({**LEAST, "size": "auto", "budget_kb": 9.0}).budget_kb == 9.0
    assert make_request({**LEAST, "uncertified": False, "delta": 0.1}).delta == 0.1


@pytest.mark.parametrize(
    ("in_recipe", "typed_beside"),
    [
        ({"edge": "/e.onnx", "exits": (0.3,), "distillation": 0.9}, {"rebase": "a"}),
        ({"size": "small", "epochs": 3, "batch": 32}, {"rebase": "a"}),
        ({"budget_kb": 3.0, "budget_ms": 3.0, "epochs": 3}, {"edge": "a"}),
        ({"edge": "/e.onnx", "calibration_is_fresh": True}, {"rebase": "a"}),
        ({"delta": 0.1, "max_upload": 0.5}, {"uncertified": True}),
        ({"budget_kb": 3.0}, {"size": "large"}),
    ],
)
def test_a_recipes_key_that_does_nothing_beside_a_typed_one_is_left_out(recipe, in_recipe, typed_beside):
    path = recipe(written({**LEAST, "seed": 3, **in_recipe}))
    assert parse(path, *typed(typed_beside)) == make_request({**LEAST, "seed": 3, **typed_beside})


def test_a_recipe_that_contradicts_itself_is_refused(recipe):
    path = recipe(written({**LEAST, "rebase": "/a", "epochs": 3}))
    assert refusal_of(parse, path).startswith(f"{path}: epochs does nothing with rebase")


def test_what_a_recipe_vouched_for_its_own_network_does_not_hold_of_another(recipe):
    path = recipe(written({**LEAST, "edge": "/e.onnx", "calibration_is_fresh": True}))
    assert parse(path).calibration_is_fresh
    assert not parse(path, "--rebase", "a").calibration_is_fresh
    assert parse(path, "--rebase", "a", "--calibration-is-fresh").calibration_is_fresh


@pytest.mark.parametrize("key", sorted(LEAST))
def test_what_is_missing_is_told_with_both_ways_to_give_it(recipe, key):
    values = {name: value for name, value in LEAST.items() if name != key}
    assert (
        refusal_of(make_request, values) == f"build: {key} is missing: give --{key}, or the key in a recipe"
    )
    path = recipe(written(values))
    assert refusal_of(read_recipe, path, {}).startswith(f"{path}: {key} is missing")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("epsilom = 0.1", "epsilom: unknown key; did you mean 'epsilon'?"),
        ("epsilon = 2", "epsilon = 2: expected float < 1.0"),
        ('plans = ["int8", "int4"]', 'plans[1] = "int4": not one of the allowed values'),
        ("mean = 0.5", "mean = 0.5: expected array, got float"),
        ("[full]\nfile = 1", "full"),
        ("epsilon = ", "not TOML"),
        ("seed = 1979-05-27", "seed"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_told_with_its_file(recipe, text, complaint):
    path = recipe(text)
    message = refusal_of(read_recipe, path, LEAST)
    assert message.startswith(str(path))
    assert complaint in message


def test_a_wrong_value_that_was_typed_is_not_blamed_on_the_recipe(recipe):
    path = recipe(written(LEAST))
    assert refusal_of(read_recipe, path, {"epsilon": 2.0}).startswith("build: epsilon = 2.0")


def test_a_recipe_that_is_not_there_is_told(tmp_path):
    assert "cannot be read: No such file" in refusal_of(read_recipe, tmp_path / "none.toml", {})


@pytest.mark.parametrize("option", ["--mean=a,b", "--exits=,", "--seed=x", "--layout=nhwc", "--nothing"])
def test_a_word_that_is_no_value_ends_with_usage(capsys, option):
    with pytest.raises(SystemExit) as caught:
        parse(*typed(LEAST), option)
    assert caught.value.code == 2
    assert option.split("=", maxsplit=1)[0] in capsys.readouterr().err.splitlines()[-1]


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["int8", "auto", "small", "channels_last"]),
    st.dates(),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
KEYS = st.one_of(st.sampled_from(BuildRequest.__struct_fields__), st.text(string.ascii_lowercase, max_size=3))


def outcome_of(call, *arguments):
    """The request, or else the one line that refuses it."""
    message = "made"
    try:
        call(*arguments)
    except BuildError as error:
        message = str(error)
    return message


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.booleans())
def test_whatever_values_are_given_they_are_a_request_or_one_line(values, complete):
    message = outcome_of(make_request, {**LEAST, **values} if complete else values)
    assert len(message.splitlines()) == 1


def toml_of(value):
    match value:
        case dict():
            return (
                "{" + ", ".join(f"{json.dumps(key)} = {toml_of(inner)}" for key, inner in value.items()) + "}"
            )
        case list():
            return "[" + ", ".join(map(toml_of, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case bool():
            return str(value).lower()
    return str(value)


@pytest.fixture(scope="module")
def any_recipe(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.toml"


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=5))
def test_whatever_a_recipe_holds_it_is_a_request_or_one_line(any_recipe, values):
    any_recipe.write_text(
        "".join(f"{key} = {toml_of(value)}\n" for key, value in values.items()), encoding="utf-8"
    )
    message = outcome_of(read_recipe, any_recipe, LEAST)
    assert len(message.splitlines()) == 1
