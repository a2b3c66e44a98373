"""Rounds while bundles are swapped: other weights of the same graph, another graph, one that cannot learn."""

import itertools
from dataclasses import replace

from edge_cascade.weights import weights_digest
from edge_daemon.core.rounds_events import Phase
from edge_daemon.training.job import read_base, read_job
from tests.device.rounds_cases import terms_for
from tests.device.spooling_cases import wait_until
from tests.device.test_follower import _quick, begin, world  # noqa: F401 - fixtures

OTHER_GRAPH = "99" * 32


def with_other_weights(bundle):
    stages = {
        key: replace(
            stage, weights={name: array + array.dtype.type(1) for name, array in stage.weights.items()}
        )
        for key, stage in bundle.stage_models.items()
    }
    return replace(bundle, bundle_id="77" * 32, stage_models=stages)


def with_other_graph(bundle):
    return replace(bundle, bundle_id="88" * 32, graph_sha256=OTHER_GRAPH)


def test_weights_that_were_swapped_in_are_a_base_that_is_not_fetched(world, tiny_bundle):  # noqa: F811
    after = with_other_weights(tiny_bundle)
    world.follower.take_bundle(after)
    of = terms_for(after)
    assert of.training_base != weights_digest(tiny_bundle.parameters())
    world.offer(of)
    assert weights_digest(read_base(world.child().directory)) == of.training_base
    assert world.requests == []


def test_a_training_goes_on_while_other_weights_of_its_graph_are_swapped_in(world, tiny_bundle):  # noqa: F811
    world.offer(terms_for(tiny_bundle))
    child = world.child()
    world.follower.take_bundle(with_other_weights(tiny_bundle))
    child.succeed()
    assert world.appended().round_id == "round-1"
    assert not child.is_killed


def test_another_graph_stops_the_training_and_learns_in_its_own_rounds(world, tiny_bundle):  # noqa: F811
    world.offer(terms_for(tiny_bundle))
    child = world.child()
    after = with_other_graph(tiny_bundle)
    world.follower.take_bundle(after)
    wait_until(lambda: child.is_killed, what="the training of a graph that is gone to be stopped")
    wait_until(lambda: not child.directory.exists(), what="its directory to go")
    world.offer(terms_for(tiny_bundle, "round-2"))
    wait_until(lambda: world.count("rounds_declined", "other_graph") == 1)

    of = terms_for(after, "round-3")
    world.offer(of)
    assert read_job(world.child(1).directory).terms == of
    world.child(1).succeed()
    assert world.appended().round_id == "round-3"


def test_an_update_of_the_graph_before_is_still_sent_once(world, tiny_bundle):  # noqa: F811
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    update = world.appended()
    after = with_other_graph(tiny_bundle)
    world.follower.take_bundle(after)
    wait_until(lambda: world.spool.appends == 2, what="the update to be given once more")
    assert list(world.spool.rows.values()) == [update]
    # Until it has left, no other is made.
    world.offer(terms_for(after, "round-2"))
    wait_until(lambda: world.phase() is Phase.OFFERED)
    assert len(world.children) == 1
    world.spool.settle()
    world.child(1).succeed()
    assert world.appended().round_id == "round-2"


def test_a_round_that_was_voted_in_is_not_trained_again_for_a_graph_that_comes_back(world, tiny_bundle):  # noqa: F811
    of = terms_for(tiny_bundle)
    world.offer(of)
    world.child().succeed()
    world.appended()
    world.spool.settle()
    wait_until(lambda: world.count("rounds_completed") == 1)
    for bundle in (with_other_graph(tiny_bundle), tiny_bundle):
        world.follower.take_bundle(bundle)
    world.offer(of)
    world.offer(terms_for(tiny_bundle, "round-2"))
    world.child(1).succeed()
    assert world.appended().round_id == "round-2"


def test_a_bundle_that_cannot_learn_takes_part_in_nothing_until_one_that_can_is_back(world, tiny_bundle):  # noqa: F811
    world.offer(terms_for(tiny_bundle))
    child = world.child()
    mute = replace(with_other_graph(tiny_bundle), train_step=None)
    world.follower.take_bundle(mute)
    wait_until(lambda: child.is_killed, what="the training to be stopped")
    world.offer(terms_for(tiny_bundle, "round-2", graph=bytes.fromhex(mute.graph_sha256)))
    wait_until(lambda: world.count("rounds_declined", "no_train_step") == 1)
    world.follower.take_bundle(tiny_bundle)
    world.offer(terms_for(tiny_bundle, "round-3"))
    assert read_job(world.child(1).directory).terms.round_id == "round-3"


def test_damaged_files_are_counted_over_all_graphs(begin, tmp_path, tiny_bundle):  # noqa: F811
    begin().follower.stop()
    (tmp_path / "training" / "tiny" / "voted").write_bytes(b"nothing of ours" * 9)
    world = begin()  # noqa: F811
    wait_until(lambda: world.follower.damaged_files() == 1)
    for bundle in itertools.islice(itertools.cycle((with_other_graph(tiny_bundle), tiny_bundle)), 3):
        world.follower.take_bundle(bundle)
    wait_until(lambda: world.learner.bundle.graph_sha256 == OTHER_GRAPH)
    assert world.follower.damaged_files() == 1
