"""Puts another bundle, or other heads of it, in the place of the one that answers. Decides nothing.

Two threads may want that at once: the swapper, which says which bundle answers, and whoever has private heads
answer, which must never bring back the bundle before. So there is one order in which they come.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future

from edge_cascade.bundle import Bundle
from edge_cascade.pauses import Pause, no_pause
from edge_daemon.config import ModelConfig
from edge_daemon.errors import ModelError
from edge_daemon.inference import InferenceThread
from edge_daemon.models import Numbering, open_ladder, open_pipeline
from edge_daemon.pipeline import Pipeline
from edge_daemon.ports import Clock


class Installer:
    """Works on the pipelines that an inference thread answers with; any thread may ask."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        inference: InferenceThread,
        configs: Mapping[str, ModelConfig],
        numbering: Numbering,
        clock: Clock,
        *,
        pause: Pause = no_pause,
    ) -> None:
        """`pipelines` and `configs` by model; `pause` is called before each stage that is opened."""
        self._pipelines = pipelines
        self._inference = inference
        self._configs = configs
        self._numbering = numbering
        self._clock = clock
        self._pause = pause
        self._shared = {name: pipeline.bundle for name, pipeline in pipelines.items()}
        self._lock = threading.Lock()

    def install(self, bundle: Bundle) -> Future[Pipeline]:
        """Open a bundle beside the one that answers, on the thread that asks, and have it answer.

        Raises:
            CascadeError: when this board's runtime does not take it.
            ModelError: when it is another model, or needs a newer daemon.
        """
        name = bundle.graph.model
        before = self._pipelines[name]
        was, now = before.bundle.graph, bundle.graph
        if (was.labels, was.input_shape, was.window) != (now.labels, now.input_shape, now.window):
            raise ModelError(f"{name!r} has other labels, another input shape or window there: another model")
        after = open_pipeline(
            bundle,
            self._configs[name],
            before.coin,
            self._numbering,
            now_s=self._clock.monotonic_s,
            pause=self._pause,
        )
        after.ladder.warm_up(pause=self._pause)
        with self._lock:
            shared, self._shared[name] = self._shared[name], bundle
            flipped = self._inference.install(name, after)

        def note(done: Future[Pipeline]) -> None:
            if done.cancelled() or done.exception() is not None:
                # It never came to answer: heads for the one that does are welcome again.
                with self._lock:
                    if self._shared[name] is bundle:
                        self._shared[name] = shared

        flipped.add_done_callback(note)
        return flipped

    def install_heads(self, bundle: Bundle) -> Future[Pipeline]:
        """The same for the bundle that answers with other heads, or with its own again.

        What golden outputs and certificates say is not of those heads: nothing is compared, and the pipeline
        is marked.

        Raises:
            CascadeError: when this board's runtime does not take it.
            ModelError: when another bundle answers by now, or is about to.
        """
        name = bundle.graph.model
        ladder = open_ladder(bundle, self._configs[name], pause=self._pause)
        ladder.warm_up(pause=self._pause)
        with self._lock:
            shared = self._shared[name]
            if shared.bundle_id != bundle.bundle_id:
                raise ModelError(f"another bundle answers for {name!r} by now")
            after = Pipeline(
                bundle,
                ladder,
                self._pipelines[name].coin,
                boot=self._numbering.boot,
                next_seq=self._numbering.next_seq,
                now_s=self._clock.monotonic_s,
                is_personal=bundle is not shared,
            )
            return self._inference.install(name, after)
