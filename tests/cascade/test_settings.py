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
