from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from edge_cascade.errors import SettingsError
from edge_cascade.settings import read_settings


class Table(msgspec.Struct, frozen=True):
    name: str


class Lists(msgspec.Struct, frozen=True):
    plain: tuple[float, ...] = ()
    positive: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)] = (1.0,)
    shares: tuple[Annotated[float, Meta(gt=0, lt=1)], ...] = ()
    counts: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(max_length=4)] = ()
    names: tuple[Annotated[str, Meta(max_length=8)], ...] = ()
    plans: Annotated[tuple[Literal["int8", "fp32"], ...], Meta(min_length=1)] = ("fp32",)
    tables: Annotated[tuple[Table, ...], Meta(min_length=1, max_length=8)] = ()
    flags: tuple[bool, ...] = ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plain = 3", "plain = 3: expected array, got int (allowed: a list of numbers)"),
        ("positive = 3", "positive = 3: expected array, got int (allowed: a list of 1 or more numbers > 0)"),
        (
            "positive = []",
            "positive = []: expected array of length >= 1 (allowed: a list of 1 or more numbers > 0)",
        ),
        ("shares = 0.2", "shares = 0.2: expected array, got float (allowed: a list of numbers > 0 and < 1)"),
        ("counts = 3", "counts = 3: expected array, got int (allowed: a list of 0 to 4 whole numbers >= 1)"),
        ('names = "a"', 'names = "a": expected array, got str (allowed: a list of strings)'),
        (
            'plans = "int8"',
            'plans = "int8": expected array, got str (allowed: a list of 1 or more entries of: "fp32", "int8")',
        ),
        ("tables = 3", "tables = 3: expected array, got int (allowed: a list of 1 to 8 tables)"),
        ("flags = true", "flags = true: expected array, got bool (allowed: a list of entries)"),
        ("positive = [1, 0]", "positive[1] = 0: expected float > 0.0 (allowed: a number > 0)"),
    ],
)
def test_a_key_that_takes_a_list_says_of_what_and_of_how_many(tmp_path, line, said):
    path = tmp_path / "lists.toml"
    path.write_text(line)
    with pytest.raises(SettingsError) as raised:
        read_settings(path, {}, Lists, prefix="LISTS__", examples={})
    assert str(raised.value) == f"{path}: {said}"


def the_line(path, environ, check=None):
    with pytest.raises(SettingsError) as raised:
        read_settings(path, environ, Lists, prefix="LISTS__", examples={}, check=check)
    return str(raised.value)


def test_what_only_the_caller_can_find_is_said_like_everything_else(tmp_path):
    path = tmp_path / "lists.toml"
    path.write_text('names = ["a"]\n')

    def value(settings, origin):
        raise origin.wrong("names[0]", settings.names[0], "expected\nanother")

    def key(settings, origin):
        raise origin.error("names", f"{len(settings.names)} is too few")

    assert the_line(path, {}, value) == f'{path}: names[0] = "a": expected another'
    assert the_line(path, {"LISTS__NAMES": '["b"]'}, key) == "environment LISTS__NAMES: names: 1 is too few"


@pytest.mark.parametrize(
    ("value", "shown"), [(2.0, "2"), (0.1, "0.1"), (True, "true"), ("a" * 81, f'"{"a" * 80}..."')]
)
def test_a_value_is_shown_as_it_would_be_written_and_cut_when_it_is_long(tmp_path, value, shown):
    path = tmp_path / "lists.toml"
    path.write_text("")

    def check(_, origin):
        raise origin.wrong("key", value, "no")

    assert the_line(path, {}, check) == f"{path}: key = {shown}: no"
