"""One process with one or all of the worker roles: ``gpl worker profiles|anchors|labels|all``.

With ``all`` (the embedded mode) the Faust apps share one event loop, one view of the catalogue and, where the index
is embedded, its one owner. The role ``labels`` includes the catalogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from functools import partial
from typing import Any, Literal

import numpy as np
import structlog
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from gpl.artefacts import Artefacts
from gpl.catalogue import Catalogue
from gpl.index.base import VectorIndex, batches
from gpl.space import PRECOMPUTED, SentenceEncoder
from streams import calibrations, metrics
from streams.contracts import ItemVector
from streams.faust_app import show_errors
from streams.labels.agent import LabelsRole
from streams.labels.catalogue import CatalogueRole
from streams.labels.matrix import RecalledVectors
from streams.labels.outage import when_available
from streams.labels.record import Versions
from streams.liveness import health_of
from streams.log_view import Handler, LogView
from streams.profiles.agent import ProfilesRole
from streams.role import Role
from streams.settings import IndexSettings, Settings
from streams.views import CatalogueView, vectors_from

log = structlog.get_logger()

RoleName = Literal["profiles", "anchors", "labels", "all"]

FILL = 1_000
"""Items that are looked for in an index server at a time."""


def open_index(settings: IndexSettings, dim: int, version: str) -> VectorIndex:
    """The vector index that the settings name, one for each ``version`` of the space: cosines do not compare across.

    Its own error tells why it cannot be opened.
    """
    if settings.kind == "server":
        from gpl.index.server import ServerIndex

        key = settings.api_key.get_secret_value() if settings.api_key else None
        name = f"{settings.collection}-{version}"
        return ServerIndex.connect(settings.url, key, name, dim, settings.grpc_port, settings.timeout_seconds)
    from gpl.index.edge import EdgeIndex

    settings.path.mkdir(parents=True, exist_ok=True)
    return EdgeIndex(settings.path / version, dim)


class Worker:
    """Builds the roles over what they share, starts them, and stops them in turn."""

    def __init__(self, settings: Settings, role: RoleName) -> None:
        wanted = ("labels", "profiles", "anchors") if role == "all" else (role,)
        self._settings = settings
        self._artefacts = artefacts = Artefacts.load(settings.artefacts, with_generator="anchors" in wanted)
        self._dim, self._levels = artefacts.space.dim, artefacts.quantiser.levels
        self._versions = (artefacts.generator.version, artefacts.quantiser.version, artefacts.space.version)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.health = health_of(settings.metrics)
        self._catalogue = Catalogue(self._dim, self._levels)
        self._view = CatalogueView(
            self._catalogue, self._dim, artefacts.space.version, artefacts.quantiser.version, self._changed
        )
        self._log: LogView | None = None
        self._handlers: dict[str, Handler] = {"item-vectors": self._view}
        self._index: VectorIndex | None = None
        self._index_whole = settings.index.kind == "edge" or "labels" not in wanted
        self._recalled: RecalledVectors | None = None
        self._changes: dict[str, ItemVector | None] = {}
        self._roles: list[Role[Any]] = []
        if "labels" in wanted:
            self._add_labels()
        if "profiles" in wanted:
            self._roles.append(
                ProfilesRole(settings, self._versions, self._dim, self._vector_of, self._ready, self.health, self._fail)
            )
        if "anchors" in wanted:
            self._add_anchors()

    def _add_labels(self) -> None:
        settings, space = self._settings, self._artefacts.space
        self._index = open_index(settings.index, self._dim, space.version)
        shared = self._index if settings.index.kind == "server" else None
        encoder = None
        if space.encoder != PRECOMPUTED:
            _torch_on_one_thread()
            encoder = SentenceEncoder(space.encoder, settings.space.cache, settings.space.batch_size)
        self._recalled = RecalledVectors(
            self._index, self._view.content, self._dim, self._levels, waits=shared is not None
        )
        versions = Versions(space.version, self._artefacts.quantiser.version, settings.fingerprint())
        labels = LabelsRole(
            settings,
            versions,
            self._dim,
            self._levels,
            self._recalled.lookup,
            self._ready,
            self.health,
            self._fail,
            self._recalled.have if shared is not None else None,
        )
        self._handlers[calibrations.TOPIC] = labels.calibrations
        catalogue = CatalogueRole(
            settings,
            self._artefacts,
            encoder,
            shared,
            self._view.content,
            self._ready,
            self._look_again,
            self.health,
            self._fail,
        )
        self._roles += [catalogue, labels]

    def _add_anchors(self) -> None:
        from streams.anchors.agent import AnchorsRole

        _torch_on_one_thread()
        self._roles.append(
            AnchorsRole(
                self._settings,
                self._artefacts.generator,
                self._catalogue,
                self._artefacts.quantiser.codebook_size,
                self._versions,
                self._ready,
                self.health,
                self._fail,
            )
        )

    def _ready(self) -> bool:
        return self._log is not None and self._log.ready and self._index_whole

    async def _fill_index(self, log_view: LogView, index: VectorIndex) -> None:
        """Give a server back what the log says that it holds: it may have a new disk, or that of a backup.

        The number of items tells: a difference of any other kind is not looked for at every start.
        """
        try:
            while not log_view.ready:
                await asyncio.sleep(0.05)
            held = await when_available(index.count, lambda: True)
            if held is not None and held != len(self._catalogue):
                log.warning("the index does not hold the catalogue: compared", held=held, items=len(self._catalogue))
                for some in batches(self._catalogue.ids(), FILL):
                    ids, vectors = self._catalogue.lookup(some)
                    sids = self._catalogue.sids[self._catalogue.rows(ids)]
                    await when_available(partial(_put_missing, index, ids, vectors, sids), lambda: True)
            self._index_whole = True
        except Exception as error:
            self._fail(error)

    def _look_again(self) -> None:
        if self._log is not None:
            self._log.look_again()

    def _vector_of(self, item_id: str) -> NDArray[np.float32] | None:
        known, vectors = self._catalogue.lookup([item_id])
        return vectors[0] if known else None

    def _changed(self, item_id: str, item: ItemVector | None) -> None:
        if self._index is not None:
            self._changes[item_id] = item

    async def _apply_changes(self) -> None:
        """Bring the embedded index and the matrix of recalled items up to the view."""
        changes, self._changes = self._changes, {}
        if changes and self._index is not None and self._recalled is not None:
            if self._settings.index.kind == "edge":
                put = [item for item in changes.values() if item is not None]
                if put:
                    vectors = np.concatenate([vectors_from(item.vector, self._dim) for item in put])
                    sids = np.array([item.sid for item in put], dtype=np.int32)
                    self._index.upsert([item.item_id for item in put], vectors, sids)
                removed = [item_id for item_id, item in changes.items() if item is None]
                if removed:
                    self._index.delete(removed)
            for item_id, item in changes.items():
                self._recalled.changed(item_id, item)
        metrics.CATALOGUE_ITEMS.set(len(self._catalogue))

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set. Raises what made a role fail: the process then exits and is started again."""
        if calibrations.TOPIC in self._handlers:
            await asyncio.to_thread(calibrations.publish_first, self._settings.kafka, self._artefacts.calibration)
        self._log = await asyncio.to_thread(LogView, self._settings.kafka, self._handlers)
        following = asyncio.ensure_future(self._log.follow(self._apply_changes))
        filling = None
        if self._index is not None and not self._index_whole:
            filling = asyncio.ensure_future(self._fill_index(self._log, self._index))
        try:
            await asyncio.gather(*(role.start() for role in self._roles))
            log.info("worker started", roles=[role.name for role in self._roles], items=len(self._catalogue))
            stopping = asyncio.ensure_future(stop.wait())
            ends: set[asyncio.Future[Any]] = {stopping, self._failed, following}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if following.done():
                following.result()
            if self._failed.done():
                self._failed.result()
        finally:
            if filling is not None:
                filling.cancel()
            await asyncio.gather(*(role.stop() for role in self._roles), return_exceptions=True)
            self._log.stop()
            with contextlib.suppress(Exception):
                await following
            if self._index is not None:
                self._index.close()


def _put_missing(index: VectorIndex, ids: list[str], vectors: NDArray[np.float32], sids: NDArray[np.int32]) -> None:
    """Write the items that the index does not hold, or holds with another vector: rows (n, dim) and (n, levels)."""
    found = index.retrieve(ids)
    wrong = [
        n for n, name in enumerate(ids) if name not in found or not np.allclose(found[name], vectors[n], atol=1e-5)
    ]
    if wrong:
        index.upsert([ids[n] for n in wrong], vectors[wrong], sids[wrong])


def _torch_on_one_thread() -> None:
    import torch  # seconds to import; only a generator and an encoder need it

    torch.set_num_threads(1)


async def _main(settings: Settings, role: RoleName) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    worker = Worker(settings, role)
    port, close = metrics.serve(settings.metrics.host, settings.metrics.port, worker.health)
    log.info("metrics served", port=port)
    try:
        await worker.run(stop)
    finally:
        close()


def run(settings: Settings, role: RoleName) -> None:
    """Run a worker until SIGTERM or SIGINT. Raises what made it fail."""
    # Requests are small matrices: more threads would only fight over the cores with the other roles.
    threadpool_limits(1)
    # The event loop shares the interpreter with the clients' network threads and the generator; at the default of
    # 5 ms every send that lets go of the lock may wait that long to get it back.
    sys.setswitchinterval(0.0005)
    show_errors()
    asyncio.run(_main(settings, role))
