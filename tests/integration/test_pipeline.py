"""The worker roles on a real Kafka and a real qdrant-edge: what goes in comes out as labels, once, and right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent
from gpl.fit import Event, FitOptions
from gpl.fit import fit as fit_artefacts
from streams import contracts
from streams.contracts import Calibration, Feedback, Item, Recall, UserAnchors, encode
from streams.kafka import BATCH_OVERHEAD_BYTES, producer
from streams.settings import KafkaSettings
from streams.topics import full_name
from tests.integration.pipeline import Process, final_labels, kafka_section, read_all, running, wait_for

DIM, KEPT, ITEMS, USERS, REQUESTS, CANDIDATES = 24, 20, 240, 60, 2000, 40
START = 1_700_000_000_000
STEP = 2_000
WINDOW = 120
LEVELS = 3
CAP = 6_000
"""Bytes of a record: room for every label but that of a recall of the whole catalogue."""


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Raw item vectors in 12 groups: users who keep to a few groups have interests that can be found."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(12, DIM))
    return (centres[np.arange(ITEMS) % 12] + 0.4 * rng.normal(size=(ITEMS, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def artefacts(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artefacts")
    rng = np.random.default_rng(1)
    items = [ItemContent(f"item-{i}", "", row.tolist()) for i, row in enumerate(vectors)]
    events = [
        Event(f"past-{u}", f"item-{(u % 12) + 12 * rng.integers(0, ITEMS // 12)}", START - 10**9 + t, bool(t % 3))
        for u in range(40)
        for t in range(12)
    ]
    options = FitOptions(generator="history", levels=LEVELS, dim=KEPT)
    fit_artefacts(items, events, None, options, seed=0).save(directory / "fitted")
    return directory / "fitted"


@pytest.fixture
def config(tmp_path: Path, kafka_settings: KafkaSettings, artefacts: Path) -> Path:
    path = tmp_path / "gpl.toml"
    path.write_text(
        f"""
artefacts = "{artefacts}"
{kafka_section(kafka_settings)}
max_record_bytes = {CAP}
[index]
path = "{tmp_path / "index"}"
[generator]
beams = 6
[labels]
window_seconds = {WINDOW}
allowed_lateness_seconds = 10
retention_seconds = 3600
idle_timeout_wall_seconds = 4
[profiles]
min_interval_seconds = 60
idle_timeout_wall_seconds = 1
"""
    )
    return path


class Site:
    """A log of recalls and feedback, made once, with known trouble in it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.recalls: list[Recall] = []
        self.feedback: list[Feedback] = []
        for n in range(REQUESTS):
            user, ts = f"user-{rng.integers(USERS)}", START + n * STEP
            group = int(user.split("-")[1]) % 12
            candidates = [f"item-{i}" for i in rng.choice(ITEMS, CANDIDATES, replace=False)]
            # Some candidates the catalogue does not know, and one twice.
            candidates += ["ghost-1", "ghost-2", candidates[0]]
            self.recalls.append(Recall(f"r{n}", user, ts, candidates))
            for k, item in enumerate(rng.choice(candidates[:CANDIDATES], 5, replace=False)):
                named = f"r{n}" if k else None
                at = ts + 1000 * (k + 1)
                self.feedback.append(Feedback(f"e{n}-{k}", user, str(item), at, "impression", named))
                if int(item.split("-")[1]) % 12 == group or rng.random() < 0.1:
                    self.feedback.append(Feedback(f"c{n}-{k}", user, str(item), at + 1, "click", named))

    def in_order(self) -> Iterator[Recall | Feedback]:
        yield from sorted([*self.recalls, *self.feedback], key=lambda record: record.ts)


def send_items(kafka: KafkaSettings, vectors: np.ndarray) -> None:
    with producer(kafka) as out:
        for i, row in enumerate(vectors):
            item = Item(f"item-{i}", "", embedding=[float(x) for x in row])
            out.send(full_name(kafka, "items"), key=item.item_id.encode(), value=encode(item))
        calibration = Calibration("platt-test", 0, "platt", 2.5, -1.0, 100)
        out.send(full_name(kafka, "calibrations"), key=b"platt", value=encode(calibration))


def send_log(kafka: KafkaSettings, records: Iterator[Recall | Feedback]) -> None:
    with producer(kafka) as out:
        for record in records:
            topic = "recalls" if isinstance(record, Recall) else "feedback"
            out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))


def exposures(site: Site) -> dict[str, dict[str, bool]]:
    """request_id -> item -> clicked, from the contract alone."""
    window = WINDOW * 1000
    by_id = {recall.request_id: recall for recall in site.recalls}
    by_user: dict[str, list[Recall]] = {}
    for recall in site.recalls:
        by_user.setdefault(recall.user_id, []).append(recall)
    result: dict[str, dict[str, bool]] = {request_id: {} for request_id in by_id}
    for event in sorted(site.feedback, key=lambda e: (e.ts, e.event_id)):
        if event.request_id is not None:
            owner = by_id[event.request_id]
        else:
            owner = max(
                (
                    r
                    for r in by_user[event.user_id]
                    if r.ts <= event.ts <= r.ts + window and event.item_id in r.candidates
                ),
                key=lambda r: (r.ts, r.request_id),
            )
        items = result[owner.request_id]
        items[event.item_id] = items.get(event.item_id, False) or event.kind == "click"
    return result


def recomputed(label: contracts.Label, anchors: UserAnchors, unit: dict[str, np.ndarray]) -> np.ndarray:
    """(n, 3) score, label and confidence of the unexposed items, in plain numpy."""
    a = np.frombuffer(anchors.vectors, "<f4").reshape(-1, KEPT).astype(np.float64)
    logprob = np.array(anchors.logprob)
    p = np.exp(logprob - logprob.max())
    p /= p.sum()
    upper = np.triu_indices(len(a), 1)
    mass = np.outer(p, p)[upper]
    spread = (mass * (1 - (a @ a.T)[upper])).sum() / mass.sum() if len(a) > 1 else 0.0
    cosine = np.stack([unit[item] for item in label.unexposed.item]).astype(np.float64) @ a.T
    best = cosine.argmax(axis=1)
    score = cosine.max(axis=1)
    history = np.array(anchors.history_factor)
    confidence = np.cbrt((1 - np.clip(spread, 0, 1)) * history[best] * np.exp(logprob[best] / LEVELS))
    return np.stack([score, 1 / (1 + np.exp(-(2.5 * score - 1.0))), confidence], axis=1)


def check_labels(kafka: KafkaSettings, site: Site, artefacts: Path, vectors: np.ndarray) -> dict[str, contracts.Label]:
    """Every promise about the final labels of a site's log, from what is on the topics."""
    final, _every = final_labels(kafka)
    space = Artefacts.load(artefacts).space
    assert space.basis is not None and space.dim == KEPT
    projected = (vectors - space.mean) @ space.basis
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    unit = {f"item-{i}": row for i, row in enumerate(projected)}
    by_user: dict[str, list[UserAnchors]] = {}
    for record in read_all(kafka, "user-anchors"):
        anchors = contracts.decode(UserAnchors, record.value)
        by_user.setdefault(anchors.user_id, []).append(anchors)
    shown = exposures(site)
    assert final.keys() == shown.keys()
    for recall in site.recalls:
        label = final[recall.request_id]
        items = dict(zip(label.exposed.item, map(bool, label.exposed.clicked), strict=True))
        assert items == shown[recall.request_id], recall.request_id
        in_force = [a for a in by_user.get(recall.user_id, []) if a.ts <= recall.ts]
        if not in_force:
            assert label.outcome == "no_anchors" and not label.unexposed.item
            continue
        anchors = max(in_force, key=lambda a: a.ts)
        assert label.outcome == "labelled"
        assert label.provenance.anchors_version == anchors.version
        expected = [i for i in dict.fromkeys(recall.candidates) if i in unit and i not in items]
        assert label.unexposed.item == expected
        got = np.array([label.unexposed.score, label.unexposed.label, label.unexposed.confidence]).T
        np.testing.assert_allclose(got, recomputed(label, anchors, unit), atol=1e-5, err_msg=recall.request_id)
    return final


@pytest.mark.kafka
@pytest.mark.parametrize(
    "roles", [["all"], ["labels", "labels", "profiles", "anchors", "anchors"]], ids=["one", "five"]
)
def test_every_request_gets_one_right_label_and_trouble_ends_in_the_dead_letters(
    kafka_settings: KafkaSettings, config: Path, artefacts: Path, vectors: np.ndarray, tmp_path: Path, roles: list[str]
) -> None:
    """In one process, and with the roles in processes of their own, two of them shared by two workers."""
    kafka = kafka_settings
    site = Site()
    workers = [
        # An embedded shard has one owner.
        Process(["worker", role], config, tmp_path / f"worker-{n}.log", GPL_INDEX__PATH=str(tmp_path / f"index-{n}"))
        for n, role in enumerate(roles)
    ]
    with running(*workers):
        wait_for("the workers to be ready", lambda: all(worker.ready() for worker in workers))
        send_items(kafka, vectors)
        wait_for("the catalogue", lambda: all(w.metric("gpl_catalogue_items") == ITEMS for w in workers))
        # Trouble goes in between the good records, under keys that spread over all partitions.
        # As large as the broker takes it: its dead letter is larger.
        largest = np.random.default_rng(0).bytes(kafka.max_record_bytes + BATCH_OVERHEAD_BYTES - 200)
        bad: list[tuple[str, bytes | None, bytes, str]] = [
            ("recalls", b"k1", b"{not json", "malformed"),
            ("recalls", b"k2", b'{"request_id":"x","user_id":"u","ts":1,"candidates":["a"],"oops":1}', "invalid"),
            ("recalls", b"k3", b'{"request_id":"x","user_id":"u","ts":"soon","candidates":["a"]}', "invalid"),
            ("recalls", b"k4", b'{"request_id":"x","user_id":"u","ts":1,"candidates":[]}', "invalid"),
            ("recalls", b"k5", b"", "malformed"),
            ("recalls", b"k6", largest, "malformed"),
            ("feedback", b"k6", b"\xff\xfe", "malformed"),
            ("feedback", b"k7", b'{"event_id":"x","user_id":"u","item_id":"i","ts":1,"kind":"purchase"}', "invalid"),
            (
                "feedback",
                b"u",
                encode(Feedback("far", "u", "item-1", 10 * START, "click")),
                "future",
            ),
            ("recalls", b"k9", encode(Recall("astray", "u", START, ["item-1"])), "key"),
            ("feedback", b"k10", encode(Feedback("astray", "u", "item-1", START, "click")), "key"),
            ("feedback", None, encode(Feedback("nobody's", "u", "item-1", START, "click")), "key"),
            ("items", b"bad", b'{"item_id":"bad","text":"no vector"}', "item"),
            ("items", b"short", encode(Item("short", "", embedding=[1.0, 2.0])), "item"),
            ("items", b"other", encode(Item("key", "", embedding=[1.0] * DIM)), "key"),
        ]
        records = list(site.in_order())
        with producer(kafka) as out:
            for n, record in enumerate(records):
                if n % 1000 == 500 and n // 1000 < len(bad):
                    topic, key, value, _ = bad[n // 1000]
                    out.send(full_name(kafka, topic), key=key, value=value)
                topic = "recalls" if isinstance(record, Recall) else "feedback"
                out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))
                if n % 97 == 0:  # redelivered
                    out.send(full_name(kafka, topic), key=record.user_id.encode(), value=encode(record))
            for topic, key, value, _ in bad[(len(records) + 499) // 1000 :]:
                out.send(full_name(kafka, topic), key=key, value=value)
        wait_for("every request's label", lambda: len(final_labels(kafka)[0]) == REQUESTS)
        wait_for(
            "the refreshes to be answered",
            lambda: len(read_all(kafka, "user-anchors")) == len(read_all(kafka, "anchor-requests")),
        )
        wait_for("all to be settled", lambda: settled(kafka, site, artefacts, vectors))
        # Its user has anchors by now, so its label is over the cap.
        whole = Recall("whole", "user-0", START + REQUESTS * STEP, [f"item-{i}" for i in range(ITEMS)])
        bad.append(("recalls", b"user-0", encode(whole), "too_large"))
        with producer(kafka) as out:
            out.send(full_name(kafka, "recalls"), key=b"user-0", value=bad[-1][2])

        wait_for("the dead letters", lambda: len(read_all(kafka, "dead-letters")) >= len(bad))
        letters = read_all(kafka, "dead-letters")
        found = {(letter.key, letter.value): dict(letter.headers) for letter in letters}
        for topic, key, value, reason in bad:
            headers = found[(key, value)]
            assert headers["gpl-topic"].decode() == full_name(kafka, topic)
            assert headers["gpl-reason"].decode() == reason, headers
            assert headers["gpl-message"]
        assert len(letters) == len(bad)
        assert all(worker.get("/health")[0] == 200 for worker in workers)

    final = check_labels(kafka, site, artefacts, vectors)
    assert sum(label.outcome == "labelled" for label in final.values()) > REQUESTS * 0.8
    # Nothing is published twice: each revision once, and no revision that says nothing new.
    _, every = final_labels(kafka)
    identities = [(label.request_id, label.revision) for label in every]
    assert len(identities) == len(set(identities))


def settled(kafka: KafkaSettings, site: Site, artefacts: Path, vectors: np.ndarray) -> bool:
    try:
        check_labels(kafka, site, artefacts, vectors)
    except AssertionError:
        return False
    return True


@pytest.mark.kafka
def test_killed_workers_leave_the_same_labels(
    kafka_settings: KafkaSettings, config: Path, artefacts: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    """SIGKILL at several moments of the stream: the final labels are those of the contract, none twice."""
    kafka = kafka_settings
    site = Site()
    worker = Process(["worker", "all"], config, tmp_path / "worker.log")
    records = list(site.in_order())
    cuts = [len(records) * part // 4 for part in range(5)]
    with running(worker):
        wait_for("the worker to be ready", worker.ready)
        send_items(kafka, vectors)
        wait_for("the catalogue", lambda: worker.metric("gpl_catalogue_items") == ITEMS)
    for part in range(4):
        worker = Process(["worker", "all"], config, tmp_path / "worker.log")
        with running(worker):
            before = len(read_all(kafka, "labels"))
            send_log(kafka, iter(records[cuts[part] : cuts[part + 1]]))
            wait_for("new labels", lambda before=before: len(read_all(kafka, "labels")) > before + 50)
            if part < 3:
                worker.kill()
                continue
            wait_for("every request's label", lambda: len(final_labels(kafka)[0]) == REQUESTS)
            wait_for("all to be settled", lambda: settled(kafka, site, artefacts, vectors))
    check_labels(kafka, site, artefacts, vectors)
    _, every = final_labels(kafka)
    by_identity: dict[tuple[str, int], set[bytes]] = {}
    for label in every:
        said = msgspec.structs.replace(label, provenance=msgspec.structs.replace(label.provenance, correction=None))
        by_identity.setdefault((label.request_id, label.revision), set()).add(encode(said))
    assert all(len(said) == 1 for said in by_identity.values())
