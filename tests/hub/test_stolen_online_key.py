"""What whoever stole the hub's online key can make a board take, with a real bundle: each attempt by its name."""

import datetime
import random
import shutil
import threading
from copy import deepcopy

import numpy as np
import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from safetensors.numpy import load_file
from tuf.api.metadata import Metadata, Root, Targets

from cloud_hub.releases.changes import name_part, put_policy
from cloud_hub.releases.create import create_repository
from cloud_hub.releases.keys import make_key, read_key
from cloud_hub.releases.metadata import MetadataFiles
from cloud_hub.releases.online import ONLINE_KEY, OnlineRoles
from edge_cascade.bounds import norms_around
from edge_cascade.bundle import MANIFEST, load_bundle
from edge_cascade.shipped import find_bundle
from edge_cascade.signed_releases import (
    ONLINE_ROLE,
    POLICY_TARGET,
    PartNote,
    Policy,
    graph_target,
    weights_target,
)
from edge_daemon.errors import RefusedError
from edge_daemon.ports import Wanted
from edge_daemon.releases.bundle_store import BundleStore
from edge_daemon.releases.downloader import Downloader
from edge_daemon.releases.http_fetch import StatusError
from edge_daemon.releases.trust import Trust
from tests.cascade.test_bundle import rewrite, rewrite_graph, rewrite_weights

NOW = datetime.datetime(2030, 5, 1, 12, tzinfo=datetime.UTC)
SHIPPED = find_bundle("digits")


class Clock:
    now_s = 5.0

    def monotonic_s(self):
        return self.now_s

    def wall_ms(self):
        return 0


class Stolen:
    """A hub whose offline keys signed release 1, its online key in other hands, and a board that trusts it."""

    def __init__(self, directory):
        self.directory = directory
        self.root_key, self.targets_key = (
            make_key(directory / f"offline/{role}.pem", b"secret") for role in ("root", "targets")
        )
        self.hub = create_repository(
            directory / "tuf",
            [self.root_key],
            [self.targets_key],
            root_threshold=1,
            targets_threshold=1,
            now=NOW,
        )
        graph, weights = ((SHIPPED / part / MANIFEST).read_bytes() for part in ("graph", "weights"))
        norms = norms_around(load_file(SHIPPED / "weights/weights.safetensors"))
        self.hub.sign_offline(
            "digits", 1, graph=graph, weights=weights, keys=[self.targets_key], now=NOW, norms=norms
        )
        self.files = MetadataFiles(directory / "tuf")
        self.roles = OnlineRoles(self.files)
        self.key = read_key(directory / "tuf" / ONLINE_KEY, None)
        self.store = BundleStore(directory / "board")
        self.trust = Trust(directory / "trust", root=self.hub.first_root(), stream=self.stream, clock=Clock())
        self.downloader = Downloader(
            self.store,
            self.trust,
            None,
            shipped={"digits": load_bundle(SHIPPED)},
            wait=lambda stop, delay_s: False,
            rng=random.Random(0),
            clock=Clock(),
        )

    def stream(self, path, stop):
        path = self.directory / "tuf" / path
        if not path.exists():
            raise StatusError(str(path), 404)
        yield path.read_bytes()

    def evil(self, change, *arguments):
        """A copy of the shipped bundle, changed."""
        bundle = self.directory / "evil"
        shutil.copytree(SHIPPED, bundle, copy_function=shutil.copyfile)
        change(bundle, *arguments)
        return bundle

    def sign(self, bundle, release=2, *, with_graph=False):
        """Name the weights of a bundle, as the online key can, and publish."""
        role = self.roles.weights()
        loaded = load_bundle(bundle)
        name = weights_target("digits", loaded.weights_sha256)
        note = PartNote(release, loaded.graph_sha256)
        name_part(role, name, (bundle / "weights" / MANIFEST).read_bytes(), note)
        if with_graph:
            name = graph_target("digits", loaded.graph_sha256)
            name_part(role, name, (bundle / "graph" / MANIFEST).read_bytes(), PartNote(release))
        self.roles.sign_weights(role, NOW)
        self.roles.publish(NOW)

    def take(self, bundle):
        """Have the board look at a bundle, as if it had fetched it."""
        loaded = load_bundle(bundle)
        wanted = Wanted(
            "digits", "2", loaded.bundle_id, loaded.graph_sha256, loaded.weights_sha256, 10_000_000
        )
        self.trust.authorise("digits", "2", loaded.graph_sha256, loaded.weights_sha256, threading.Event())
        place = self.store.directory_of("digits", loaded.bundle_id)
        shutil.copytree(bundle, place, copy_function=shutil.copyfile)
        self.downloader.verify(wanted)

    def refusal(self, bundle):
        with pytest.raises(RefusedError) as caught:
            self.take(bundle)
        return caught.value.detail


@pytest.fixture
def stolen(tmp_path):
    return Stolen(tmp_path)


def change_weights(bundle, change):
    rewrite(bundle / "weights", change)


def grown(name, factor):
    def change(bundle):
        rewrite_weights(
            bundle, lambda tensors: tensors.update({name: np.asarray(tensors[name] * factor, np.float32)})
        )

    return change


def test_what_it_may_sign_is_taken_and_what_offline_keys_signed_too(stolen):
    stolen.take(SHIPPED)
    evil = stolen.evil(grown("fp32/stage1.conv0.weight", 1.5))
    stolen.sign(evil)
    stolen.take(evil)


def test_it_cannot_change_a_graph(stolen):
    evil = stolen.evil(rewrite_graph, lambda manifest: manifest["bounds"].update(max_accept_score=1.0))
    stolen.sign(evil, with_graph=True)
    assert "signed by the online role alone; offline keys must" in stolen.refusal(evil)


def test_it_cannot_have_everything_accepted(stolen):
    def accept_all(manifest):
        for plan in manifest["plans"]:
            plan["chosen"] = len(plan["points"]) - 1

    evil = stolen.evil(change_weights, accept_all)
    stolen.sign(evil)
    assert "accepts scores up to 1, the bound is 0.99" in stolen.refusal(evil)


def test_it_cannot_promise_less(stolen):
    evil = stolen.evil(
        change_weights, lambda manifest: [each.update(epsilon=0.5) for each in manifest["certificates"]]
    )
    stolen.sign(evil)
    assert "allows 0.5, the bound is 0.05" in stolen.refusal(evil)


def test_it_cannot_make_every_answer_sure_by_a_temperature(stolen):
    evil = stolen.evil(
        change_weights, lambda manifest: manifest["plans"][0]["rungs"][0].update(temperature=0.001)
    )
    stolen.sign(evil)
    assert "has the temperature 0.001" in stolen.refusal(evil)


@pytest.mark.parametrize("name", ["fp32/stage0.conv0.bias", "int8/exit2.dense0.bias"])
def test_it_cannot_grow_floats_fiftyfold_though_each_is_below_the_largest_allowed(stolen, name):
    evil = stolen.evil(grown(name, 50))
    stolen.sign(evil)
    assert f"the norm of {name} is" in stolen.refusal(evil)


@pytest.mark.parametrize(
    "name", ["int8/stage0.conv0.weight_scale", "int8/x_scale", "int8/stage1.conv0.bias_quantized_scale"]
)
def test_it_cannot_grow_a_scale_of_int8_a_hundredfold(stolen, name):
    evil = stolen.evil(grown(name, 100))
    stolen.sign(evil)
    assert name in (said := stolen.refusal(evil)) or name.removesuffix("_quantized_scale") in said
    assert "the bound is" in said


def test_it_cannot_lower_the_floor(stolen):
    stolen.hub.set_policy(Policy({"digits": 2}), keys=[stolen.targets_key], now=NOW)
    assert "below the security floor 2" in stolen.refusal(SHIPPED)
    role = stolen.roles.weights()

    class Draft:
        targets, blobs, changed = role, [], set()

    put_policy(Policy({}))(Draft)
    assert POLICY_TARGET in role.targets
    stolen.roles.sign_weights(role, NOW)
    stolen.roles.publish(NOW)
    assert "below the security floor 2" in stolen.refusal(SHIPPED)


def test_it_cannot_sign_a_release_below_the_floor_nor_a_new_number_on_an_old_graph(stolen):
    stolen.hub.set_policy(Policy({"digits": 5}), keys=[stolen.targets_key], now=NOW)
    evil = stolen.evil(grown("fp32/stage1.conv0.weight", 1.5))
    stolen.sign(evil, release=4)
    assert "its weights are of release 4, below the security floor 5" in stolen.refusal(evil)
    stolen.sign(evil, release=999)
    assert "its graph are of release 1, below the security floor 5" in stolen.refusal(evil)


def test_it_cannot_delegate_more_paths_to_itself(stolen):
    evil = stolen.evil(rewrite_graph, lambda manifest: manifest["bounds"].update(max_epsilon=1.0))
    # In its own role, where no delegation of its own reaches a graph.
    role = stolen.roles.weights()
    role.delegations = deepcopy(stolen.roles.targets().delegations)
    role.delegations.roles[ONLINE_ROLE].paths = ["*/*/*", "*"]
    stolen.roles.sign_weights(role, NOW)
    stolen.sign(evil, with_graph=True)
    assert "offline keys must" in stolen.refusal(evil)


@pytest.mark.parametrize("role", ["targets", "root"])
def test_it_cannot_sign_for_offline_keys(stolen, role):
    stolen.take(SHIPPED)
    metadata = stolen.files.load({"targets": Targets, "root": Root}[role], role)
    signed = metadata.signed
    signed.version += 1
    if role == "targets":
        signed.delegations.roles[ONLINE_ROLE].paths = ["*/*/*"]
    else:
        signed.add_key(stolen.key.public_key, "targets")
    forged = Metadata(signed)
    forged.sign(stolen.key)
    stolen.files.write_metadata(f"{signed.version}.{role}.json", forged.to_bytes())
    stolen.roles.publish(NOW)
    evil = stolen.evil(grown("fp32/stage1.conv0.weight", 1.5))
    assert stolen.refusal(evil).startswith("wrong keys")


def test_it_cannot_move_the_norms_that_its_graph_was_signed_with(stolen):
    evil = stolen.evil(grown("fp32/stage0.conv0.bias", 50))
    role = stolen.roles.weights()
    loaded = load_bundle(evil)
    wide = norms_around(load_file(evil / "weights/weights.safetensors"))
    for name, part in (
        (weights_target("digits", loaded.weights_sha256), "weights"),
        (graph_target("digits", loaded.graph_sha256), "graph"),
    ):
        note = PartNote(2, loaded.graph_sha256, wide)
        name_part(role, name, (evil / part / MANIFEST).read_bytes(), note)
    stolen.roles.sign_weights(role, NOW)
    stolen.roles.publish(NOW)
    assert "the norm of fp32/stage0.conv0.bias is" in stolen.refusal(evil)


def test_once_rotated_it_signs_nothing(stolen):
    evil = stolen.evil(grown("fp32/stage1.conv0.weight", 1.5))
    stolen.sign(evil)
    stolen.hub.rotate_online_key(keys=[stolen.root_key, stolen.targets_key], now=NOW)
    assert "signed by nobody" in stolen.refusal(evil)
