import pytest

from edge_cascade.errors import first_line


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("\n  shapes differ\nat node 3\n", "shapes differ"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_of_a_long_error_the_first_line_is_told_and_of_a_silent_one_its_type(said, line):
    assert first_line(ValueError(said)) == line
