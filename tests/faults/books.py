"""What a hub that is not running has on its disk of rounds, and what must hold of it whatever has happened."""

from dataclasses import dataclass

import msgspec

from cloud_hub.store.blobs import FolderBlobs
from edge_cascade.weights import FROM_ZEROS, climb_chain, weights_digest, zeros_of
from tests.faults.processes import on_disk

MAX_BYTES = 2**24


@dataclass(frozen=True)
class RoundInBooks:
    """A round. `votes`: the devices whose update counts in it, as often as one does; `members`: their states."""

    id: str
    phase: str
    outcome: str | None
    why: str
    has_result: bool
    counted: int
    votes: list[str]
    members: dict[str, str]


@dataclass(frozen=True)
class SeriesInBooks:
    """A series with its rounds in order, and the releases that were made of it."""

    phase: str
    why: str
    rounds: list[RoundInBooks]
    releases: list[str]


class Books:
    """The books of a hub, read anew at every question."""

    def __init__(self, state_dir):
        self._database = state_dir / "hub.db"
        self._blobs = FolderBlobs(state_dir / "blobs")

    def updates(self, round_id):
        """The devices whose update for a round is committed, counted or not."""
        return [
            device for (device,) in self._ask(f"SELECT device FROM updates WHERE round_id = '{round_id}'")
        ]

    def looked_at(self):
        """Up to which case guards and certificates have looked."""
        return self._ask("SELECT looked_at FROM holdout_marks")[0][0]

    def series(self, number):
        ((phase, why),) = self._ask(f"SELECT phase, why FROM series WHERE id = {number}")
        found = self._ask(f"SELECT id FROM rounds WHERE series = {number} ORDER BY number")
        releases = self._ask(f"SELECT state FROM releases WHERE series = {number}")
        return SeriesInBooks(
            phase, why, [self.round(round_id) for (round_id,) in found], [state for (state,) in releases]
        )

    def round(self, round_id):
        ((encoded, outcome, why, result),) = self._ask(
            f"SELECT state, outcome, why, result FROM rounds WHERE id = '{round_id}'"
        )
        state = msgspec.json.decode(encoded)
        votes = self._ask(f"SELECT device FROM updates WHERE counted_in = '{round_id}' ORDER BY device")
        members = self._ask(f"SELECT device, state FROM round_members WHERE round_id = '{round_id}'")
        return RoundInBooks(
            round_id,
            state["phase"],
            outcome,
            why,
            result is not None,
            state["counted"],
            [device for (device,) in votes],
            dict(members),
        )

    def check(self, shapes):
        """Nothing is there twice, every sum is that of its rows, every base is where its steps lead."""
        self._check_votes()
        self._check_counters()
        self._check_bases(shapes)

    def _check_votes(self):
        for (round_id,) in self._ask("SELECT id FROM rounds"):
            found = self.round(round_id)
            assert len(found.votes) == len(set(found.votes)), "a device counts twice"
            assert set(found.votes) <= found.members.keys()
            counted = sorted(device for device, state in found.members.items() if state == "counted")
            assert found.counted == len(counted)
            if found.outcome == "committed":
                assert counted == found.votes
        # What came after a series' end may not have been looked at before the hub ended; it counts in nothing.
        (unseen,) = self._ask("SELECT count(*) FROM updates WHERE counted_in IS NOT NULL AND NOT noted")
        assert unseen == (0,)

    def _check_counters(self):
        counters = dict(self._ask("SELECT name, value FROM counters"))
        rows = self._ask(
            "SELECT 'rounds/' || model || '/' || outcome, count(*) FROM rounds JOIN series "
            "ON rounds.series = series.id WHERE outcome IS NOT NULL GROUP BY model, outcome "
            "UNION ALL SELECT 'votes/counted', count(*) FROM round_members WHERE state = 'counted' "
            "UNION ALL SELECT 'updates', count(*) FROM updates "
            "UNION ALL SELECT 'round_bytes/up', coalesce(sum(blob_length), 0) FROM updates WHERE noted"
        )
        said = {name: counters.get(name, 0) for name, _ in rows}
        assert said == dict(rows), f"{said} counted, there are {rows}"
        of_rounds = {name for name in counters if name.startswith("rounds/")}
        assert of_rounds <= {name for name, _ in rows}

    def _check_bases(self, shapes):
        rows = self._ask(
            "SELECT digest, origin, blob, step_offset, step_length, whole_offset, whole_length "
            "FROM training_bases"
        )
        steps = {digest: (origin, blob, at, length) for digest, origin, blob, at, length, _, _ in rows}
        for digest, _, blob, _, _, at, length in rows:
            chain = []
            end = digest
            while end != FROM_ZEROS:
                end, *place = steps[end]
                chain.insert(0, self._blobs.get(*place))
            reached = climb_chain(zeros_of(shapes), chain, expected=digest, max_bytes=MAX_BYTES)
            whole = self._blobs.get(blob, at, length)
            climb_chain(zeros_of(shapes), [whole], expected=weights_digest(reached), max_bytes=MAX_BYTES)
        for base, result in self._ask("SELECT base, result FROM rounds WHERE outcome = 'committed'"):
            assert steps[result][0] == base
        for number, first, last in self._ask("SELECT id, first_base, base FROM series"):
            committed = self._ask(
                f"SELECT base, result FROM rounds WHERE series = {number} AND outcome = 'committed' "
                "ORDER BY number"
            )
            assert [first, *(result for _, result in committed)] == [*(base for base, _ in committed), last]

    def _ask(self, statement):
        return on_disk(self._database, statement)
