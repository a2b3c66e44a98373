"""What `cloud-hub build` is asked for: one typed value, from the command line, a recipe file or Python.

A recipe is a TOML file with these very keys. Paths in it start at the recipe's folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from cloud_hub.builder.samples.arrays import MAX_DATA_BYTES
from cloud_hub.errors import BuildError
from edge_cascade.errors import SettingsError
from edge_cascade.manifest import Layout
from edge_cascade.settings import read_settings

Text = Annotated[str, Meta(min_length=1, max_length=1024)]
Share = Annotated[float, Meta(gt=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
PlanName = Literal["int8", "int8-fp32", "fp32"]
Size = Literal["auto", "small", "medium", "large"]
Encoding = Literal["auto", "float32", "int8", "uint8"]

_PATHS: Final = ("full", "data", "edge", "out", "profile", "rebase")
_REQUIRED: Final = ("full", "data", "out")
_ALLOWED: Final = {
    "plans": ", ".join(get_args(PlanName)),
    "size": ", ".join(get_args(Size)),
    "encoding": ", ".join(get_args(Encoding)),
    "layout": ", ".join(get_args(Layout)),
    "model": "1 to 64 letters, digits, '-' or '_'",
}


class BuildRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One build.

    `full` is the trained classifier, `data` what it is tried and its small sibling trained on, `out` the
    directory to write. `edge` is a network of the user's own; without it one of a family is trained. `rebase`
    is a model directory whose networks are kept and whose certificates are made anew for `full`.
    """

    full: Text
    data: Text
    out: Text
    edge: Text | None = None
    rebase: Text | None = None

    model: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")] | None = None
    version: Text = "1.0.0"
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0

    # --- the promise
    epsilon: Share = 0.005
    delta: Share = 0.05
    disagreement_epsilon: Share | None = None
    max_upload: Share | None = None
    plans: Annotated[tuple[PlanName, ...], Meta(min_length=1)] = ("int8", "int8-fp32", "fp32")
    uncertified: bool = False

    # --- what a sample is
    scale: Positive = 1.0
    mean: Annotated[tuple[float, ...], Meta(min_length=1)] = (0.0,)
    std: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (1.0,)
    layout: Layout = "channels_first"
    encoding: Encoding = "auto"
    wire_scale: Positive | None = None
    window: Count | None = None
    hop: Count | None = None

    # --- names in the data
    x_key: Text = "x"
    y_key: Text | None = None
    groups_key: Text | None = None
    labels_key: Text | None = None
    window_overlap: Annotated[int, Meta(ge=0)] = 0
    max_bytes: Count = MAX_DATA_BYTES

    # --- the edge network
    exits: tuple[Share, ...] = (0.2, 0.5)
    cuts: tuple[Text, ...] = ()
    size: Size = "auto"
    budget_ms: Positive | None = None
    budget_kb: Positive | None = None
    profile: Text | None = None
    epochs: Count = 15
    batch: Count = 128
    distillation: Annotated[float, Meta(ge=0, le=1)] = 0.5
    litert: bool = False


def read_recipe(path: Path, changes: Mapping[str, Any]) -> BuildRequest:
    """The request of a TOML file, with what the command line says on top.

    Raises:
        BuildError: in one line, naming the key.
    """
    try:
        recipe, _ = read_settings(path, {}, _Partial, prefix="", examples={})
    except SettingsError as error:
        raise BuildError(str(error)) from error
    document = {
        name: value for name, value in msgspec.structs.asdict(recipe).items() if value is not msgspec.UNSET
    }
    for name in _PATHS:
        if name in document:
            document[name] = str(path.parent / document[name])
    return make_request({**document, **changes}, where=str(path))


def make_request(values: Mapping[str, Any], *, where: str = "build") -> BuildRequest:
    """A checked request of plain values.

    Raises:
        BuildError: in one line, naming the key and what is allowed.
    """
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise BuildError(f"{where}: {missing[0]} is missing: give --{missing[0]}, or the key in a recipe")
    try:
        request = msgspec.convert(dict(values), BuildRequest)
    except msgspec.ValidationError as error:
        # A recipe's own values were checked when it was read.
        raise BuildError(f"build: {_explained(error, values)}") from error
    _check_values(request, where)
    _check(request, where)
    return request


def _explained(error: msgspec.ValidationError, values: Mapping[str, Any]) -> str:
    """What msgspec says, in our words: the key, its value, what is allowed."""
    what, _, place = str(error).rpartition(" - at `$.")
    key = re.split(r"[.\[`]", place)[0]
    if not what or key not in values:
        return " ".join(str(error).replace("`", "").split())
    allowed = _ALLOWED.get(key)
    reason = f"allowed: {allowed}" if allowed else what.replace("`", "").lower()
    return f"{key} = {repr(values[key])[:60]}: {' '.join(reason.split())}"


def _check_values(request: BuildRequest, where: str) -> None:
    """What the types let through and nobody means."""
    for key in request.__struct_fields__:
        value = getattr(request, key)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise BuildError(f"{where}: {key} = {one}: give a finite number")
            if isinstance(one, str) and "\0" in one:
                raise BuildError(f"{where}: {key} holds a zero byte")


def _check(request: BuildRequest, where: str) -> None:
    if request.hop is not None and request.window is None:
        raise BuildError(f"{where}: hop needs window, the number of values a channel that make one sample")
    if request.window is not None and not 1 <= (request.hop or request.window) <= request.window:
        raise BuildError(f"{where}: hop = {request.hop}: 1 to the window's {request.window}")
    if len(set(request.plans)) != len(request.plans):
        raise BuildError(f"{where}: plans names one twice")
    if request.wire_scale is not None and request.encoding == "float32":
        raise BuildError(f"{where}: wire_scale is a step of int8 or uint8, and encoding is float32")
    if request.rebase is not None and request.edge is not None:
        raise BuildError(f"{where}: rebase keeps the bundle's own edge network: leave edge out")
    sized = request.size != "auto" or request.budget_ms is not None or request.budget_kb is not None
    if sized and (request.edge is not None or request.rebase is not None):
        raise BuildError(
            f"{where}: size and budgets choose a network to train: leave them out with edge or rebase"
        )
    if request.edge is None and request.cuts:
        raise BuildError(f"{where}: cuts names values of a network of your own: give edge as well")
    if list(request.exits) != sorted(set(request.exits)):
        raise BuildError(f"{where}: exits are shares of the cost in ascending order")


# A recipe may leave to the command line what the request must have, so nothing is required of the file.
_Partial = msgspec.defstruct(
    "Recipe",
    [
        (field.name, field.type | msgspec.UnsetType, msgspec.UNSET)
        for field in msgspec.structs.fields(BuildRequest)
    ],
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
)
