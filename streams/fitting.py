"""Fitting from our records: what ``gpl fit`` and the demo share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gpl.artefacts import Artefacts
from gpl.catalogue import Catalogue, ItemContent
from gpl.fit import Event, FitOptions
from gpl.fit import fit as fit_artefacts
from gpl.space import PRECOMPUTED, SentenceEncoder, choose_encoder, raw_vectors
from streams.contracts import Feedback, Item
from streams.data.reader import records
from streams.data.validate import content_problem
from streams.settings import Settings, SpaceSettings
from streams.views import labeller_config

Say = Callable[[str], None]


def fit_records(
    items: Iterable[Item],
    feedback: Iterable[Feedback],
    settings: Settings,
    seed: int,
    say: Say,
    resume: Path | None = None,
) -> Artefacts:
    """Fit on items and past feedback. ``resume``: directory of a language model's training state.

    Raises ValueError naming what does not suffice or cannot be encoded.
    """
    contents = {item.item_id: ItemContent(item.item_id, item.text, item.embedding) for item in items}
    if not contents:
        raise ValueError("items: no valid record, there is nothing to fit")
    catalogue = list(contents.values())
    name = choose_encoder(catalogue, settings.space.encoder)
    encoder = None
    if name != PRECOMPUTED:
        encoder = SentenceEncoder(
            name,
            settings.space.cache,
            settings.space.batch_size,
            lambda done, total: say(f"embedded {done:,} of {total:,} texts"),
        )
    generator = settings.generator
    options = FitOptions(
        generator=generator.kind,
        dim=settings.space.dim,
        base_model=generator.base_model,
        quantiser=settings.codes.kind,
        levels=settings.codes.levels,
        codebook_size=settings.codes.codebook_size,
        beams=generator.beams,
        history=generator.history,
        history_weight=generator.history_weight,
        epochs=generator.epochs,
        downsample_threshold=generator.downsample_threshold,
        exclude_seen=generator.exclude_seen,
        temperature=generator.temperature,
        resume=resume,
        device=generator.device,
        calibration=settings.calibration.kind,
        labelling=labeller_config(settings.labels),
    )
    events = exposures(feedback)
    say(f"fitting on {len(catalogue):,} items and {len(events):,} exposures")
    return fit_artefacts(catalogue, events, encoder, options, seed, say)


def fit_directory(data: Path, settings: Settings, seed: int, say: Say, resume: Path | None = None) -> Artefacts:
    """Fit on the usable records of a data directory's ``items.jsonl`` and ``feedback.jsonl``.

    Raises FileNotFoundError for a missing file, ValueError as ``fit_records``.
    """
    cap = settings.kafka.max_record_bytes
    items = usable(records(data / "items.jsonl", Item, cap), say)
    return fit_records(items, records(data / "feedback.jsonl", Feedback, cap), settings, seed, say, resume)


def usable(items: Iterable[Item], say: Say) -> Iterator[Item]:
    """What the catalogue will take: the first of each id, without what the stream sends to the dead letters.

    The first that is taken decides whether all have an embedding, and of which dimension.
    """
    first: tuple[int, int | None] | None = None
    seen: set[str] = set()
    passed = 0
    for item in items:
        dim = None if item.embedding is None else len(item.embedding)
        if item.item_id in seen or content_problem(item, dim, first or (1, dim)) is not None:
            passed += 1
            continue
        first = first or (1, dim)
        seen.add(item.item_id)
        yield item
    if passed:
        say(f"items: {passed:,} passed over, their id or content cannot be taken (gpl validate names them)")


def catalogue_of(items: Iterable[Item], artefacts: Artefacts, space: SpaceSettings) -> Catalogue:
    """All items as the catalogue agent would place them, in the space of the artefacts. ``space``: of the cache.

    Raises ValueError for items that cannot be encoded there.
    """
    contents = [ItemContent(item.item_id, item.text, item.embedding) for item in items]
    fitted, encoder = artefacts.space, None
    if fitted.encoder != PRECOMPUTED:
        encoder = SentenceEncoder(fitted.encoder, space.cache, space.batch_size, lambda *_: None)
    fitted.check_encoder(encoder)
    ids = [content.item_id for content in contents]
    vectors = fitted.project(raw_vectors(contents, encoder, fitted.raw_dim), ids)
    catalogue = Catalogue(artefacts.space.dim, artefacts.quantiser.levels)
    for content, vector, sid in zip(contents, vectors, artefacts.quantiser.encode(vectors), strict=True):
        catalogue.put(content.item_id, vector, sid)
    return catalogue


def exposures(feedback: Iterable[Feedback]) -> list[Event]:
    """One event an exposure, by time: a click and its impression are one, shown at the time of the earlier and clicked
    at that of the (first) click."""
    found: dict[tuple[str, str, str | None], tuple[int, int | None]] = {}
    for event in feedback:
        key = (event.user_id, event.item_id, event.request_id)
        shown, clicked = found.get(key, (event.ts, None))
        if event.kind == "click":
            clicked = event.ts if clicked is None else min(clicked, event.ts)
        found[key] = (min(shown, event.ts), clicked)
    events = (Event(u, i, shown, clicked is not None, clicked) for (u, i, _), (shown, clicked) in found.items())
    return sorted(events, key=lambda e: (e.ts, e))
