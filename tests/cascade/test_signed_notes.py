"""What is signed along with a part: as TUF's canonical JSON takes it, and back."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.manifest import Norms
from edge_cascade.signed_releases import PartNote, note_fields, read_note

positive = st.floats(1e-6, 1e9)
norms = st.builds(Norms, positive, st.dictionaries(st.text(max_size=20), positive, max_size=4))


@given(st.integers(1, 2**31), st.sampled_from(["", "ab" * 32]), st.none() | norms)
def test_note_comes_back_as_it_was_signed(release, graph, norms):
    note = PartNote(release, graph, norms)
    assert read_note(msgspec.json.decode(msgspec.json.encode(note_fields(note)))) == note


def test_note_with_norms_is_canonical_json():
    canonical = pytest.importorskip("securesystemslib.formats", reason="needs python-tuf").encode_canonical
    note = PartNote(3, norms=Norms(64.0, {"fp32/a": 0.125}))
    assert "0.125" in canonical(note_fields(note))


@pytest.mark.parametrize(
    "fields", [None, {}, {"release": "1"}, {"release": 1, "norms": "x"}, {"release": 1, "norms": "{}"}]
)
def test_anything_else_is_no_note(fields):
    with pytest.raises(msgspec.ValidationError):
        read_note(fields)
