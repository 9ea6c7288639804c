"""Configuration: one TOML file, environment variables over it, checked once at start.

``GPL_KAFKA__BOOTSTRAP_SERVERS=host:9092`` overrides ``[kafka] bootstrap_servers``. The file is ``gpl.toml`` in the
working directory or the one that ``--config`` or ``GPL_CONFIG`` names. Durations are seconds: those of
``labels`` and ``profiles`` are event time unless their name says ``wall``.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from streams.storage import Location

_SERVER = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?")

# Kubernetes gives every container variables of the services beside it: of one named gpl-scorer, GPL_SCORER_PORT.
_OF_A_SERVICE = re.compile(r"\w+_SERVICE_(HOST|PORT\w*)=.*|\w+_PORT(_\d+_(TCP|UDP|SCTP)\w*=.*|=(tcp|udp|sctp)://.*)")


class ConfigError(Exception):
    """A configuration file that is missing or cannot be read, or settings that do not go together; the message names
    them."""


class Section(BaseModel):
    # Defaults are validated too, or a float left out would be the int that stands here, and say another fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class KafkaSettings(Section):
    bootstrap_servers: str = Field("127.0.0.1:9092", description="host[:port] of brokers, separated by commas")
    prefix: str = Field("gpl.", pattern=r"^[A-Za-z0-9._-]*$", description="put before every topic name")
    group_prefix: str = Field("gpl-", description="put before every consumer group")
    partitions: int = Field(6, ge=1, description="of all topics that are keyed by user")
    replication_factor: int = Field(
        1, ge=1, description="of the topics that `gpl topics create` makes; `check` reports those with fewer replicas"
    )
    max_record_bytes: int = Field(
        8 * 2**20, ge=1024, description="cap on one record, enforced at the producer and topic"
    )
    compression: Literal["none", "gzip", "lz4", "snappy", "zstd"] = Field(
        "zstd", description="of what is produced; measured on labels: 33 times as fast as gzip, and as small"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how brokers are spoken to"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="for the protocols with SASL"
    )
    sasl_username: str | None = Field(None, description="for SASL")
    sasl_password: SecretStr | None = Field(None, description="for SASL")
    ssl_cafile: Path | None = Field(
        None, description="authorities that brokers' certificates are checked against; None: the system's"
    )

    @field_validator("bootstrap_servers")
    @classmethod
    def _addresses(cls, servers: str) -> str:
        stripped = [server.strip() for server in servers.split(",")]
        for server in stripped:
            found = _SERVER.fullmatch(server)
            if found is None or not 0 < int(found[1] or 9092) < 2**16:
                raise ValueError(f"{server!r} is not host[:port]")
        return ",".join(stripped)

    def check_security(self) -> None:
        """For whoever connects: what only looks at files does without secrets and certificates. Raises ConfigError."""
        if self.security_protocol.startswith("SASL"):
            for name in ("sasl_mechanism", "sasl_username", "sasl_password"):
                if not getattr(self, name):
                    raise ConfigError(f"kafka.{name}: kafka.security_protocol = {self.security_protocol!r} needs it")
        if self.ssl_cafile is not None:
            try:
                ssl.create_default_context(cafile=str(self.ssl_cafile))
            except OSError as error:
                raise ConfigError(
                    f"kafka.ssl_cafile = {str(self.ssl_cafile)!r}: no certificates could be read: {error.strerror}"
                ) from None


class IndexSettings(Section):
    kind: Literal["edge", "server"] = Field("edge", description="embedded shard of this process, or a Qdrant server")
    url: str = Field("http://127.0.0.1:6333", description="of the server")
    grpc_port: int | None = Field(None, ge=1, le=65535, description="of the server: gRPC instead of HTTP")
    timeout_seconds: int = Field(30, ge=1, description="of one call of the server")
    api_key: SecretStr | None = Field(None, description="of the server")
    collection: str = Field("gpl-items", description="of the server; the version of the space is put after it")
    path: Path = Field(Path("runs/index"), description="directory of the embedded shard")


class SpaceSettings(Section):
    encoder: str = Field(
        "all-MiniLM-L6-v2",
        description='sentence-transformers name or path, or "precomputed" for vectors that come with the items',
    )
    dim: int | None = Field(
        None,
        ge=1,
        description="dimensions of the vectors that `gpl fit` keeps (docs/method.md); None: all",
    )
    cache: Path = Field(Path(".cache/embeddings"), description="raw embeddings by content hash")
    batch_size: int = Field(64, ge=1, description="texts that are embedded at a time")


class CodesSettings(Section):
    kind: Literal["rq-kmeans", "rq-vae"] = Field(
        "rq-kmeans", description="how items get semantic ids (docs/semantic-ids.md)"
    )
    levels: int | None = Field(None, ge=1, le=8, description="None: chosen from the catalogue's size")
    codebook_size: int | None = Field(None, ge=2, le=4096, description="None: chosen from the catalogue's size")


class GeneratorSettings(Section):
    kind: Literal["small-lm", "lora-lm", "history"] = Field(
        "small-lm",
        description="what makes anchors: a small language model, a pre-trained one, or clusters of the history",
    )
    base_model: str = Field("smollm2", description="of lora-lm: smollm2, or any causal LM by directory or hub name")
    beams: int = Field(10, ge=1, le=200, description="anchors a user, K")
    history: int = Field(50, ge=1, description="most recent positives read by the generator")
    history_weight: float | None = Field(
        None,
        ge=0,
        description="of nearness to the history in a language model's anchors (docs/generators.md); 0: of none, "
        "None: chosen by `gpl fit`",
    )
    epochs: int | None = Field(None, ge=1, description="most passes over the sequences; None: what suits the kind")
    downsample_threshold: float = Field(
        1e-3, gt=0, description="t in min(1, sqrt(t / f)): keep probability of an item with frequency f"
    )
    exclude_seen: bool = Field(False, description="no anchors at semantic ids that are in the user's history")
    temperature: float = Field(1.0, gt=0, description="of a language model's scores; below 1 sharper, above 1 flatter")
    device: str | None = Field(
        None,
        description="where `gpl fit` trains a language model, as torch names it (`cpu`, `cuda:1`); None: the CPU for "
        "small-lm, a GPU if there is one for lora-lm",
    )


class CalibrationSettings(Section):
    kind: Literal["platt", "isotonic", "none"] = Field(
        "platt", description="form of the map from score to click probability that `gpl fit` fits"
    )


class ProfileSettings(Section):
    min_positives: int = Field(3, ge=1, description="clicks that a user needs for the first anchors")
    max_positives: int = Field(100, ge=1, description="kept per user, newest first to stay")
    max_age_seconds: float = Field(
        7 * 86400, gt=0, description="a click that comes this long after the user's anchors asks for new ones"
    )
    min_interval_seconds: float = Field(
        1800, ge=0, description="between two requests for a user's anchors, whatever asks for them"
    )
    drift_delta: float = Field(0.05, ge=0, description="Page-Hinkley tolerance, in units of the anchor miss")
    drift_threshold: float = Field(0.5, gt=0, description="Page-Hinkley alarm level")
    allowed_lateness_seconds: float = Field(
        60, ge=0, description="clicks wait this long for earlier ones; one that comes later still is not applied"
    )
    idle_timeout_wall_seconds: float | None = Field(
        None,
        gt=0,
        description="at its end and quiet this long, a partition's clicks are applied; None: the lateness",
    )


class AnchorSettings(Section):
    batch_size: int = Field(64, ge=1, description="requests that the generator is given at a time")
    batch_wait_wall_seconds: float = Field(
        0.05, gt=0, description="until requests are looked for again when there were none"
    )
    refreshes_per_minute: int = Field(
        0, ge=0, description="budget of a worker; what is over it waits, the neediest first to be served; 0: no bound"
    )
    breaker_failures: int = Field(
        3, ge=1, description="failed or slow batches in a row that stop calls of the generator"
    )
    breaker_open_wall_seconds: float = Field(30, gt=0, description="until one request tries whether it works again")
    slow_wall_seconds: float = Field(20, gt=0, description="a batch that takes longer counts as failed; it is used")


class LabelSettings(Section):
    window_seconds: float = Field(1800, gt=0, description="feedback counts up to this long after the recall")
    allowed_lateness_seconds: float = Field(
        60,
        ge=0,
        description="a window closes when event time is this far past its end, so that late events still count",
    )
    idle_timeout_wall_seconds: float | None = Field(
        None,
        gt=0,
        description="at its end and quiet this long, a partition counts as over; None: window + lateness",
    )
    retention_seconds: float = Field(600, ge=0, description="closed requests stay correctable for this long")
    retention_wall_seconds: float = Field(
        30, ge=0, description="and at least this long: anchors come later than a backlog is labelled"
    )
    store: Literal["memory", "disk"] = Field(
        "memory", description="where the recalls that are held are; disk is RocksDB, from the extra `disk`"
    )
    store_path: Path = Field(
        Path("runs/recalls"), description="directory of the store on disk; of one machine (or container) alone"
    )
    max_open_requests: int = Field(
        500_000, ge=1, description="of a worker; over it the source that is ahead is not read"
    )
    max_retained_bytes: int = Field(
        4 * 2**30, ge=2**20, description="estimated memory of what a worker holds; over it the source ahead is not read"
    )
    matching: Literal["max", "kernel"] = Field(
        "max", description="an item's score: cosine to the nearest anchor, or a kernel over all of them"
    )
    kernel_tau: float = Field(1.0, gt=0, description="width of the kernel, exp((cosine - 1) / tau)")
    dispersion: bool = Field(True, description="confidence counts how closely the user's anchors agree")
    history: bool = Field(True, description="confidence counts how near the anchor is to the user's history")
    generation: bool = Field(True, description="confidence counts how probable the generator found the anchor")
    max_ahead_seconds: float = Field(
        300,
        ge=0,
        description="an event further ahead of its Kafka timestamp is refused: it would take event time along",
    )


_NOT_WHAT_A_LABEL_SAYS = {
    "idle_timeout_wall_seconds",
    "allowed_lateness_seconds",
    "retention_seconds",
    "retention_wall_seconds",
    "store",
    "store_path",
    "max_open_requests",
    "max_retained_bytes",
}


class DeadLetterSettings(Section):
    max_consecutive: int = Field(
        100, ge=1, description="refused records in a row, in one partition, after which the consumer halts"
    )
    max_ratio: float = Field(
        0.2, ge=0, le=1, description="share of refused records in the window above which it halts; 1: never"
    )
    window_records: int = Field(1000, ge=10, description="newest records of a topic that the ratio is over")


class TrainerSettings(Section):
    checkpoints: Location = Field(
        Path("runs/checkpoints"),
        description="a directory, or a URL such as s3://bucket/path; of exactly one `gpl train`. A second one does not "
        "start on the same directory; in a store of objects nothing keeps it out",
    )
    models: Location = Field(Path("runs/models"), description="the same; scorers must reach it too")
    model_name: str = Field("preranker", description="under which models are announced, and which scorers serve")
    batch_records: int = Field(32, ge=1, description="label records a step")
    dim: int = Field(64, ge=1, description="width of the pre-ranker's embeddings")
    learning_rate: float = Field(3e-3, gt=0, description="of Adam")
    weight_decay: float = Field(1e-5, ge=0, description="of the projection of item vectors alone")
    pseudo_weight: float = Field(
        3.0, ge=0, description="lambda, the weight of the pseudo-label loss; 0 is without them"
    )
    evidence: bool = Field(
        True,
        description="scale lambda and the sharpness of labels by the evidence that anchor scores tell of clicks",
    )
    temperature: float = Field(
        1.0, gt=0, description="of listwise labels beside that; above 1 flatter, very large: a control without anchors"
    )
    negatives_weight: float = Field(0.2, ge=0, description="weight of unexposed candidates as not clicked")
    negatives: Literal["softmax", "pointwise"] = Field(
        "softmax", description="softmax ranks clicks above them; pointwise is milder to rare items"
    )
    loss: Literal["listwise", "pointwise"] = Field(
        "listwise",
        description="of pseudo-labels: a request's candidates in the order of their scores; or each by itself, "
        "calibrated for its user and item, which with `negatives_weight` 0 is better where many of the exposed are "
        "clicked (docs/method.md)",
    )
    personal: bool = Field(
        False, description="listwise labels teach taste alone, not how good items are; for users of many clicks"
    )
    shadow: bool = Field(
        False,
        description="train an exposed-only twin beside it, to see live what pseudo-labels and negatives gain together",
    )
    checkpoint_every_wall_seconds: float = Field(
        30, gt=0, description="between checkpoints, if something was trained on"
    )
    publish_every_wall_seconds: float = Field(5, gt=0, description="between attempts; each saves a checkpoint first")
    keep_checkpoints: int = Field(3, ge=1, description="newest ones that stay")
    keep_hourly_checkpoints: int = Field(24, ge=0, description="beside them the first of each of so many hours")
    journal_days: float = Field(30, gt=0, description="how long the batch journal is kept, for rebuilding models")
    max_users: int = Field(1_000_000, ge=1, description="ids above which those seen longest ago are forgotten")
    max_items: int = Field(1_000_000, ge=1, description="the same of items")
    id_ttl_seconds: float | None = Field(
        90 * 86400, gt=0, description="event time after which an id that was not seen is forgotten; None: never"
    )
    window_records: int = Field(2000, ge=1, description="requests in the sliding window of the progressive metrics")
    recent_records: int = Field(500, ge=1, description="requests in a second, shorter window")
    dedup_requests: int = Field(50_000, ge=1, description="requests remembered, so that no label is trained twice")
    publish_min_records: int = Field(100, ge=1, description="evaluated label records below which nothing is published")
    publish_max_regression: float = Field(
        0.1, ge=0, description="nats by which progressive log loss may be worse than the last published model's"
    )
    publish_max_auc_drop: float = Field(0.1, ge=0, description="the same for progressive AUC")
    publish_max_psi: float = Field(
        1.0, ge=0, description="population stability index of scores on the last model's probe, above which it is drift"
    )
    publish_min_agreement: float = Field(
        0.3, ge=-1, le=1, description="mean rank correlation within the last model's probe, below which it is drift"
    )
    publish_max_click_rate_shift: float = Field(
        1.5, ge=0, description="log-odds by which the click rate of labels may differ from the last published model's"
    )
    publish_max_user_share: float = Field(0.5, gt=0, le=1, description="of requests that may be of one user")
    keep_models: int = Field(20, ge=2, description="newest published versions that stay")
    keep_hourly_models: int = Field(24, ge=0, description="beside them the first of each of so many hours")
    journal: Path | None = Field(None, description="file of JSON lines with each request's evaluation before training")
    seed: int = Field(0, description="of the first weights")


class ServeSettings(Section):
    host: str = Field("127.0.0.1", description="address that the scorer answers on")
    port: int = Field(
        8080, ge=0, le=65535, description="of the scorer, /metrics and /health included; 0 takes a free one"
    )
    workers: int = Field(1, ge=1, description="processes behind the port, each with the model in its memory")
    max_candidates: int = Field(10_000, ge=1, description="of one request; more are answered with 422")
    memo_mb: int = Field(64, ge=0, description="of anchor scores that a process remembers for users' next requests")
    max_concurrency: int = Field(1000, ge=1, description="connections or requests of a process above which it says 503")


class MetricsSettings(Section):
    host: str = Field(
        "127.0.0.1", description="address that /metrics and /health answer on; the scorer has them on its own port"
    )
    port: int = Field(9464, ge=0, le=65535, description="of /metrics and /health; 0 takes a free one")
    stalled_after_wall_seconds: float = Field(
        60, gt=0, description="without progress, after which a loop is stalled and /health answers 503"
    )
    exit_when_stalled: bool = Field(False, description="end the process then, with exit code 70, for a supervisor")


class Settings(BaseSettings):
    """Everything that can be set. Unknown keys are errors that name the key."""

    model_config = SettingsConfigDict(env_prefix="GPL_", env_nested_delimiter="__", extra="forbid", frozen=True)

    artefacts: Path = Field(Path("runs/artefacts"), description="what `gpl fit` wrote: space, quantiser, generator")
    kafka: KafkaSettings = KafkaSettings()
    index: IndexSettings = IndexSettings()
    space: SpaceSettings = SpaceSettings()
    codes: CodesSettings = CodesSettings()
    generator: GeneratorSettings = GeneratorSettings()
    profiles: ProfileSettings = ProfileSettings()
    anchors: AnchorSettings = AnchorSettings()
    labels: LabelSettings = LabelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    trainer: TrainerSettings = TrainerSettings()
    serve: ServeSettings = ServeSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="before")
    @classmethod
    def _known_variables(cls, values: Any) -> Any:
        # A variable of no field is not looked at by pydantic-settings. GPL_CONFIG names the file.
        for name, value in os.environ.items():
            field, nested, _ = name.lower().removeprefix("gpl_").partition("__")
            if not name.lower().startswith("gpl_") or name.lower() == "gpl_config" or field in cls.model_fields:
                continue
            if not _OF_A_SERVICE.fullmatch(f"{name}={value}"):
                raise ValueError(f"{name}: there is no {'section' if nested else 'setting'} {field!r}")
        return values

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = os.environ.get("GPL_CONFIG")
        path = Path(named or "gpl.toml")
        document = read(path) if named or path.is_file() else {}
        return (init_settings, env_settings, InitSettingsSource(settings_cls, document))

    def fingerprint(self) -> str:
        """Hash of the settings that change what a label says (not of when or where it is made)."""
        labels = self.labels.model_dump(exclude=_NOT_WHAT_A_LABEL_SAYS)
        canonical = msgspec.json.encode(labels, order="sorted")
        return hashlib.sha256(canonical).hexdigest()[:12]


SECRETS = frozenset(
    name
    for section in Settings.model_fields.values()
    if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
    for name, field in section.annotation.model_fields.items()
    if field.annotation == SecretStr | None
)
"""Names of the settings whose values are not to be shown."""


def load(path: Path | None = None) -> Settings:
    """Settings in force. Raises ConfigError for the file, pydantic.ValidationError for what it or a variable says."""
    if path is not None:
        os.environ["GPL_CONFIG"] = str(path)
    return Settings()


def read(path: Path) -> dict[str, Any]:
    """What a configuration file says, not yet checked. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except (OSError, ValueError) as error:  # of which are bytes that are not UTF-8 and text that is not TOML
        raise ConfigError(f"configuration file {path}: {getattr(error, 'strerror', None) or error}") from None
