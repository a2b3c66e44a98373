"""What a series of rounds is told: one typed source for the command line, REST and the store. No I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from cloud_hub.core.federation.guard import GuardRules
from cloud_hub.core.federation.screening import NormRule
from cloud_hub.core.federation.server import MOMENTUM, SECOND_MOMENT
from cloud_hub.core.federation.strategies import (
    MAX_BUFFERED_VOTES,
    Strategy,
    coordinate_median,
    fed_adam,
    fed_avg,
    fed_avg_m,
    fed_buff,
    fed_prox,
    norm_clipped,
    trimmed_mean,
)
from cloud_hub.errors import ConfigError
from edge_cascade.delta_payloads import Encoding
from edge_cascade.errors import ProtocolError, SettingsError
from edge_cascade.messages import RoundTerms, SelfLabels
from edge_cascade.round_terms import MILLION, encode_terms
from edge_cascade.settings import convert_settings
from edge_cascade.training import Schedule

StrategyName = Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedbuff", "median", "trimmed", "clipped"]
STRATEGIES: Final[tuple[StrategyName, ...]] = get_args(StrategyName)
BaseEncoding = Literal["fp32", "int8"]
"""The others lose most of every step."""
SelfLabelsName = Literal["none", "hard", "soft"]

_BUFFERED: Final = ("median", "trimmed")

Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=1e-6, le=1000)]


class SeriesSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a series of rounds is run. The defaults suit a fleet of some dozen boards.

    Norms are Euclidean, over all parameters together. What the boards are told is in `terms_of`.
    """

    rounds: Annotated[int, Meta(ge=1, le=1000, description="committed rounds that make a candidate")] = 5
    cohort: Annotated[int, Meta(ge=1, le=100_000, description="boards asked in a round")] = 20
    quorum: Annotated[float, Meta(gt=0, le=1, description="share of the cohort that must answer")] = 0.6
    sleeper_share: Annotated[Share, Meta(description="share of the places for boards that are offline")] = 0.2
    grace_s: Annotated[
        float, Meta(ge=0, le=86_400, description="seconds that a round waits for the others after the quorum")
    ] = 60.0
    deadline_s: Annotated[
        float, Meta(ge=1, le=2_592_000, description="seconds after which a round ends, quorum or not")
    ] = 3600.0
    max_failures: Annotated[
        int, Meta(ge=0, le=1000, description="rounds that may fail in a row before the series does")
    ] = 3
    strategy: Annotated[StrategyName, Meta(description="how votes become a step")] = "fedavg"
    server_learning_rate: (
        Annotated[float, Meta(gt=0, le=1000, description="default 1, with fedadam 0.01")] | None
    ) = None
    server_momentum: Annotated[float, Meta(ge=0, lt=1, description="fedavgm: beta")] = 0.9
    beta_1: Annotated[float, Meta(ge=0, lt=1, description="fedadam")] = 0.9
    beta_2: Annotated[float, Meta(ge=0, lt=1, description="fedadam")] = 0.99
    tau: Annotated[float, Meta(gt=0, le=1, description="fedadam: how adaptive, smaller is more")] = 1e-3
    trim_share: Annotated[float, Meta(ge=0, lt=0.5, description="trimmed: left out at either end")] = 0.3
    max_vote_norm: (
        Annotated[float, Meta(gt=0, le=1e9, description="clipped: longer votes are shortened to it")] | None
    ) = None
    max_staleness: Annotated[int, Meta(ge=0, le=64, description="fedbuff: bases that a vote may be old")] = 4
    norm_factor: Annotated[
        float, Meta(ge=1, le=1e6, description="votes longer than this many medians are refused")
    ] = 4.0
    encoding: Annotated[Encoding, Meta(description="of updates")] = "int8"
    base_encoding: Annotated[BaseEncoding, Meta(description="of the steps from base to base")] = "int8"
    top_share: Annotated[
        float, Meta(ge=1e-6, le=0.5, description="topk: the share of values that travels")
    ] = 0.01
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 2
    batch_size: Annotated[int, Meta(ge=1, le=65_535)] = 32
    learning_rate: Annotated[Rate, Meta(description="on the boards")] = 0.001
    momentum: Annotated[float, Meta(ge=0, le=0.999, description="on the boards")] = 0.9
    prox_mu: Annotated[float, Meta(ge=0, le=1000, description="pull towards the base; fedprox needs it")] = (
        0.0
    )
    min_examples: Annotated[int, Meta(ge=1, le=2**31 - 1, description="boards with fewer do not vote")] = 16
    max_examples: Annotated[int, Meta(ge=1, le=2**31 - 1, description="the newest are taken")] = 2000
    soft_share: Annotated[
        Share, Meta(description="of a verdict's target, the share of the full model's probabilities")
    ] = 0.0
    self_labels: Annotated[
        SelfLabelsName, Meta(description="what samples that never left the board are good for")
    ] = "none"
    self_weight: Annotated[Share, Meta(description="what such a sample counts beside a verdict")] = 0.5
    private_heads: Annotated[bool, Meta(description="the exits' heads stay on the board (FedPer)")] = False
    clip_norm: Annotated[float, Meta(ge=0, le=1e6, description="boards shorten deltas to it; 0: no")] = 0.0
    noise_multiplier: Annotated[
        float, Meta(ge=0, le=1000, description="Gaussian noise on the boards, in clipping norms; 0: none")
    ] = 0.0
    include_hub: Annotated[bool, Meta(description="the hub votes as well, trained on the uploaded cases")] = (
        False
    )
    min_holdout: Annotated[
        int, Meta(ge=1, le=1_000_000, description="holdout samples without which nothing is judged")
    ] = 100
    alpha: Annotated[float, Meta(gt=0, lt=1, description="how often noise alone may roll a round back")] = (
        0.05
    )
    max_drop: Annotated[float, Meta(gt=0, le=1, description="a larger drop of accuracy is never kept")] = 0.1
    max_drift: Annotated[
        float, Meta(ge=0, le=1000, description="standard errors that a loss may lie above the series' best")
    ] = 0.5
    seed: (
        Annotated[int, Meta(ge=0, lt=2**53, description="of the draw of cohorts; default: by chance")] | None
    ) = None

    @property
    def is_asynchronous(self) -> bool:
        """Whether a round takes votes from earlier bases and has no cohort of its own (FedBuff)."""
        return self.strategy == "fedbuff"

    @property
    def self_labels_code(self) -> SelfLabels:
        """As the terms say it."""
        return SelfLabels[self.self_labels.upper()]


def settings_of(values: Mapping[str, Any]) -> SeriesSettings:
    """Settings from plain values, the defaults for what is not given.

    Raises:
        ConfigError: in one line: key, value, what is allowed.
    """
    try:
        settings = convert_settings(dict(values), SeriesSettings, source="series")
    except SettingsError as error:
        raise ConfigError(str(error)) from error
    check_settings(settings)
    return settings


def check_settings(settings: SeriesSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: in one line.
    """
    problems = (
        (
            settings.strategy == "fedprox" and settings.prox_mu == 0.0,
            "strategy = fedprox: needs prox_mu above 0, for example 0.01; without it this is fedavg",
        ),
        (
            settings.strategy == "clipped" and settings.max_vote_norm is None,
            "strategy = clipped: needs max_vote_norm, the length that votes are shortened to",
        ),
        (
            settings.strategy in _BUFFERED and settings.cohort > MAX_BUFFERED_VOTES,
            f"cohort = {settings.cohort}: {settings.strategy} holds the votes, {MAX_BUFFERED_VOTES} at most",
        ),
        (
            settings.grace_s > settings.deadline_s,
            f"grace_s = {settings.grace_s:g}: is longer than deadline_s = {settings.deadline_s:g}",
        ),
        (
            settings.min_examples > settings.max_examples,
            f"min_examples = {settings.min_examples}: is more than max_examples = {settings.max_examples}",
        ),
        (
            settings.noise_multiplier > 0.0 and settings.clip_norm == 0.0,
            "noise_multiplier: noise without clip_norm hides nothing; set clip_norm, for example 1.0",
        ),
        (
            settings.noise_multiplier > 0.0 and settings.encoding in {"sign", "topk"},
            f"encoding = {settings.encoding}: error feedback brings back what noise hid; use fp32 or int8",
        ),
    )
    for is_wrong, why in problems:
        if is_wrong:
            raise ConfigError(f"series: {why}")
    try:
        encode_terms(terms_of(settings, "m", "any", graph=bytes(32), base=bytes(32), base_bytes=4))
    except ProtocolError as error:
        raise ConfigError(f"series: {error}") from error


def terms_of(
    settings: SeriesSettings, model: str, round_id: str, *, graph: bytes, base: bytes, base_bytes: int
) -> RoundTerms:
    """What the boards are told of a round."""
    return RoundTerms(
        model=model,
        round_id=round_id,
        graph=graph,
        training_base=base,
        base_bytes=base_bytes,
        encoding=settings.encoding,
        top_share_ppm=_ppm(settings.top_share),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate_ppm=_ppm(settings.learning_rate),
        momentum_ppm=_ppm(settings.momentum),
        prox_mu_ppm=_ppm(settings.prox_mu),
        min_examples=settings.min_examples,
        max_examples=settings.max_examples,
        soft_ppm=_ppm(settings.soft_share),
        self_labels=settings.self_labels_code,
        self_weight_ppm=_ppm(settings.self_weight),
        private_heads=settings.private_heads,
        clip_norm_ppm=_ppm(settings.clip_norm),
        noise_multiplier_ppm=_ppm(settings.noise_multiplier),
    )


def strategy_of(settings: SeriesSettings) -> Strategy:  # noqa: PLR0911 - a table
    """The strategy that is meant."""
    rate = settings.server_learning_rate or (0.01 if settings.strategy == "fedadam" else 1.0)
    match settings.strategy:
        case "fedavg":
            return fed_avg(rate)
        case "fedprox":
            return fed_prox(rate)
        case "fedavgm":
            return fed_avg_m(rate, settings.server_momentum)
        case "fedadam":
            return fed_adam(rate, settings.beta_1, settings.beta_2, settings.tau)
        case "fedbuff":
            return fed_buff(rate)
        case "median":
            return coordinate_median(_buffer_of(settings), rate)
        case "trimmed":
            return trimmed_mean(settings.trim_share, _buffer_of(settings), rate)
        case "clipped":
            assert settings.max_vote_norm is not None
            return norm_clipped(settings.max_vote_norm, rate)


def rule_vectors_of(settings: SeriesSettings) -> tuple[str, ...]:
    """The names of what the strategy keeps from round to round."""
    return {"fedavgm": (MOMENTUM,), "fedadam": (MOMENTUM, SECOND_MOMENT)}.get(settings.strategy, ())


def schedule_of(settings: SeriesSettings) -> Schedule:
    """How the boards train, and the hub where it votes as well."""
    return Schedule(
        settings.epochs,
        settings.batch_size,
        settings.learning_rate,
        settings.momentum,
        settings.prox_mu,
    )


def guard_rules_of(settings: SeriesSettings) -> GuardRules:
    """What the guard judges by."""
    return GuardRules(settings.alpha, settings.max_drop, settings.min_holdout, settings.max_drift)


def norm_rule_of(settings: SeriesSettings) -> NormRule:
    """How long a vote may be."""
    return NormRule(settings.norm_factor)


def votes_needed(settings: SeriesSettings, asked: int) -> int:
    """The quorum of so many who are asked, which may be fewer than the settings would have."""
    return max(1, math.ceil(settings.quorum * min(asked, settings.cohort) - 1e-9))


def _buffer_of(settings: SeriesSettings) -> int:
    """One more than the cohort where the hub votes too."""
    return settings.cohort + settings.include_hub


def _ppm(value: float) -> int:
    return round(value * MILLION)
