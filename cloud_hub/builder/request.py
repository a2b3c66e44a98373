"""What `cloud-hub build` is asked for: one typed value, from the command line, a recipe file or Python.

A recipe is a TOML file with these very keys. Paths in it start at the recipe's folder. What is typed outranks
it: a key of the file that does nothing beside a typed one is left out. Any other key that would do nothing is
refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import NoneType
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

_EXITS_ALONE: Final = "edge without fine_tune"

_IDLE: Final[Sequence[tuple[str, tuple[str, ...], str]]] = (
    (
        "uncertified",
        ("delta", "disagreement_epsilon", "max_upload"),
        "without a promise nothing is held to it",
    ),
    (
        "rebase",
        (
            *("edge", "cuts", "exits", "fine_tune", "learning_rate", "size", "budget_ms", "budget_kb"),
            *("epochs", "batch", "distillation"),
        ),
        "the bundle's own network is kept as it is",
    ),
    ("edge", ("size", "budget_ms", "budget_kb"), "they choose a network to train, and edge brings one"),
    (
        _EXITS_ALONE,
        ("epochs", "batch"),
        "its exits are trained by a schedule of their own, and no more of it but with fine_tune",
    ),
    ("cuts", ("exits",), "cuts say by name where exits go"),
    ("size", ("budget_ms", "budget_kb"), "the size is chosen already"),
)
"""A key, the keys that do nothing beside it, and why."""

_NEEDS: Final[Sequence[tuple[str, tuple[str, ...], str]]] = (
    ("hop", ("window", "rebase"), "it is the distance between windows of a stream"),
    ("cuts", ("edge",), "they name values of a network of your own"),
    ("exits", ("edge",), "they are places in a network of your own"),
    ("fine_tune", ("edge",), "it trains a network of your own further"),
    ("learning_rate", ("fine_tune",), "it is the pace of fine-tuning"),
    (
        "calibration_is_fresh",
        ("edge", "rebase"),
        "a network that is trained here never sees calibration data",
    ),
)
"""A key, those of which it needs one, and why."""


class BuildRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One build.

    `full` is the trained classifier, `data` what it is tried and its small sibling trained on, `out` the
    directory to write. `edge` is a network of the user's own; without it one of a family is trained. `rebase`
    is a model directory whose networks are kept and whose certificates are made anew for `full`.

    None is what was not said. `rebase` then takes the bundle's model name, preprocessing, wire and window;
    what is said and differs from them is refused, but for the name. Else the model is called as its
    directory, `scale` is 1, `mean` 0, `std` 1, `layout` channels_first, `encoding` auto, `hop` the window.

    `calibration_is_fresh` vouches that the network of `edge` or `rebase` has seen none of the data. Only then
    may data in one piece certify it, or where a bundle's report shows that its training part is the same.
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
    scale: Positive | None = None
    mean: Annotated[tuple[float, ...], Meta(min_length=1)] | None = None
    std: Annotated[tuple[Positive, ...], Meta(min_length=1)] | None = None
    layout: Layout | None = None
    encoding: Encoding | None = None
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
    calibration_is_fresh: bool = False

    # --- the edge network
    exits: tuple[Share, ...] = (0.2, 0.5)
    cuts: tuple[Text, ...] = ()
    size: Size = "auto"
    budget_ms: Positive | None = None
    budget_kb: Positive | None = None
    profile: Text | None = None
    epochs: Count = 15
    batch: Count = 128
    fine_tune: bool = False
    learning_rate: Positive = 0.003
    distillation: Annotated[float, Meta(ge=0, le=1)] = 0.5
    litert: bool = False


def read_recipe(path: Path, changes: Mapping[str, Any]) -> BuildRequest:
    """The request of a TOML file, with what the command line says on top.

    What a recipe says of how its network is made does not hinder that it is rebased.

    Raises:
        BuildError: in one line, naming the key.
    """
    try:
        recipe = read_settings(path, {}, _Partial, prefix="", examples={})
    except SettingsError as error:
        raise BuildError(str(error)) from error
    document = {
        name: value for name, value in msgspec.structs.asdict(recipe).items() if value is not msgspec.UNSET
    }
    for name in _PATHS:
        if name in document:
            document[name] = str(path.parent / document[name])
    typed = {name for name, value in changes.items() if _is_said(value)}
    said = typed | {name for name, value in document.items() if _is_said(value)}
    overruled = {key for name, keys, _ in _IDLE if _holds(name, typed, said) for key in keys}
    if "rebase" in changes:
        # It was said of the recipe's own edge network, not of the one that is kept.
        overruled.add("calibration_is_fresh")
    kept = {name: value for name, value in document.items() if name not in overruled}
    return make_request({**kept, **changes}, where=str(path))


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
    _check_combinations(request, values, where)
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
    return f"{key} = {repr(values[key])[:60]}: {' '.join(reason.replace(' | null', '').split())}"


def _check_values(request: BuildRequest, where: str) -> None:
    """What the types let through and nobody means."""
    for key in request.__struct_fields__:
        value = getattr(request, key)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                raise BuildError(f"{where}: {key} = {one}: give a finite number")
            if isinstance(one, str) and "\0" in one:
                raise BuildError(f"{where}: {key} holds a zero byte")


def _check_combinations(request: BuildRequest, values: Mapping[str, Any], where: str) -> None:
    """Refuse a key that was said, be it as its default, and that would do nothing."""
    said = {key for key in values if _is_said(getattr(request, key))}
    for key, idle, why in _IDLE:
        if _holds(key, said, said) and (beside := said.intersection(idle)):
            first = min(beside, key=idle.index)
            shown = key.split()[0]
            raise BuildError(f"{where}: {first} does nothing with {shown}: {why}: leave one of them out")
    for key, needed, why in _NEEDS:
        if key in said and not said.intersection(needed):
            raise BuildError(f"{where}: {key} does nothing without {' or '.join(needed)}: {why}")


def _holds(key: str, said: Set[str], anywhere: Set[str]) -> bool:
    """Whether a key of `_IDLE` was said."""
    if key == _EXITS_ALONE:
        return "edge" in said and "fine_tune" not in anywhere
    return key in said


def _is_said(value: object) -> bool:
    """Whether a value is more than the absence of one; `--size auto` takes a recipe's size back."""
    return value is not None and value is not False and value not in ("auto", ())


def _check(request: BuildRequest, where: str) -> None:
    if request.window is not None and not 1 <= (request.hop or request.window) <= request.window:
        raise BuildError(f"{where}: hop = {request.hop}: 1 to the window's {request.window}")
    if len(set(request.plans)) != len(request.plans):
        raise BuildError(f"{where}: plans names one twice")
    if request.wire_scale is not None and request.encoding == "float32":
        raise BuildError(f"{where}: wire_scale is a step of int8 or uint8, and encoding is float32")
    if list(request.exits) != sorted(set(request.exits)):
        raise BuildError(f"{where}: exits are shares of the cost in ascending order")


def _without_none(kind: Any) -> Any:
    """A key's type in TOML, which knows no null and should not be told of one."""
    kinds = get_args(kind)
    return next(each for each in kinds if each is not NoneType) if NoneType in kinds else kind


# A recipe may leave to the command line what the request must have, so nothing is required of the file.
_Partial = msgspec.defstruct(
    "Recipe",
    [
        (field.name, _without_none(field.type) | msgspec.UnsetType, msgspec.UNSET)
        for field in msgspec.structs.fields(BuildRequest)
    ],
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
)
