"""``gpl bench generator`` (users a second), ``gpl bench anchors`` (what anchors find), ``gpl bench codes``."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from streams.bench.options import clear_errors, one_of
from streams.cli_options import ConfigOption
from streams.settings import CodesSettings, GeneratorSettings, Settings, load

if TYPE_CHECKING:
    from gpl.anchors.quality import Floats, Ints
    from gpl.catalogue import ItemContent
    from gpl.evaluation.dataset import Events

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write all figures there too.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Directory that `gpl datasets convert` wrote; default: MovieLens-100K.")
]
GENERATORS = get_args(GeneratorSettings.model_fields["kind"].annotation)
QUANTISERS = get_args(CodesSettings.model_fields["kind"].annotation)
SeedsOption = Annotated[int, typer.Option(min=1, help="Seeds 0 to n - 1.")]


def generator(
    model: Annotated[list[str] | None, typer.Option(help="small-lm, smollm2-135m, qwen2.5-0.5b; may repeat.")] = None,
    history: Annotated[int, typer.Option(min=1, help="Items a user.")] = 100,
    beams: Annotated[int, typer.Option(min=1)] = 20,
    users: Annotated[int, typer.Option(min=1)] = 64,
    batch_users: Annotated[int, typer.Option(min=1, help="Decoded at once; small-lm takes them one by one.")] = 16,
    items: Annotated[int, typer.Option(min=1, help="Of the made-up catalogue.")] = 10_000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    repetitions: Annotated[int, typer.Option(min=1, help="The quickest counts.")] = 3,
    out: JsonOption = None,
) -> None:
    """Users a second of anchor generation with random weights of the model's shape, and the share of the limit."""
    models = model or ["small-lm", "smollm2-135m"]
    one_of(models, ("small-lm", "smollm2-135m", "qwen2.5-0.5b"), "--model")
    one_of([precision], ("auto", "float32", "bfloat16"), "--precision")
    from gpl.anchors.lora_lm import choose_device
    from gpl.anchors.throughput import measure

    try:
        choose_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    table = Table("model", "type", "history", "beams", "at once", "users/s", "GFLOP/user", "limit users/s", "share")
    found = []
    for name in models:
        made = measure(
            name,  # type: ignore[arg-type]
            history,
            beams,
            users,
            batch_users,
            items,
            device,
            precision,  # type: ignore[arg-type]
            repetitions,
        )
        found.append(made)
        table.add_row(
            made.model,
            f"{made.dtype} on {made.device}",
            str(history),
            str(beams),
            str(made.batch_users),
            f"{made.users_per_second:,.1f}",
            f"{made.flops_per_user / 1e9:.3g}",
            f"{made.limit:,.1f}",
            f"{made.share:.0%}",
        )
    Console().print(table)
    first = found[0]
    typer.echo(
        f"{first.threads} threads; machine: {first.machine_bytes / 1e9:.0f} GB/s copied, "
        + ", ".join(sorted({f"{made.machine_flops / 1e9:,.0f} GFLOP/s in {made.dtype}" for made in found}))
    )
    _write(out, [{**vars(made), "limit": made.limit, "share": made.share} for made in found])


def anchors(
    data: DataOption = None,
    kind: Annotated[list[str] | None, typer.Option(help="small-lm, lora-lm, history; may repeat.")] = None,
    codes: Annotated[list[str] | None, typer.Option(help="rq-kmeans, rq-vae; may repeat.")] = None,
    beams: Annotated[int, typer.Option(min=1)] = 10,
    seeds: SeedsOption = 3,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of each user's items, one at least.")] = 0.2,
    tau: Annotated[
        float | None,
        typer.Option(min=0.001, help="Of the kernel, beside the largest cosine; default: labels.kernel_tau."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="Judge language models at this generator.history_weight too; may repeat."),
    ] = None,
    config: ConfigOption = None,
    out: JsonOption = None,
) -> None:
    """Recall of what users took next, by each generator's anchors and without any, split in time user by user.

    The language models train on the part before the split of all users (one in ten decides when to stop) under the
    settings in force, and are asked for what follows it. MovieLens: ratings of at least 4.
    """
    settings = load(config)
    generators, quantisers = kind or ["history", "small-lm"], codes or [settings.codes.kind]
    one_of(generators, GENERATORS, "--kind")
    one_of(quantisers, QUANTISERS, "--codes")
    import numpy as np

    from gpl.anchors.base import AnchorGenerator
    from gpl.anchors.near_history import NearHistory
    from gpl.anchors.quality import (
        Recall,
        Split,
        anchor_scores,
        max_history_scores,
        mean_history_scores,
        recall,
    )
    from gpl.codes.trie import SidTrie
    from gpl.fit import CANDIDATES, FitOptions, fit_quantiser, train_generator

    tau = settings.labels.kernel_tau if tau is None else tau
    with clear_errors():
        items, sequences, vectors = _data(data, settings)
    split = Split.of(sequences, len(items), held_out)
    length, popularity = settings.generator.history, split.popularity.astype(np.float32)
    typer.echo(
        f"{len(items):,} items, {len(split.judged):,} users judged, {int(popularity.sum()):,} items before the split"
    )
    rows: dict[str, list[Recall]] = {
        "popularity": [recall(split, (popularity for _ in split.judged))],
        "mean of history": [recall(split, mean_history_scores(split, vectors, length))],
        "every item of the history": [recall(split, max_history_scores(split, vectors, length))],
    }
    for quantiser_kind in quantisers:
        for seed in range(seeds):
            options = FitOptions(
                quantiser=quantiser_kind,  # type: ignore[arg-type]
                levels=settings.codes.levels,
                codebook_size=settings.codes.codebook_size,
                base_model=settings.generator.base_model,
                history=length,
                epochs=settings.generator.epochs,
                downsample_threshold=settings.generator.downsample_threshold,
                exclude_seen=settings.generator.exclude_seen,
                history_weight=settings.generator.history_weight,
                beams=beams,
                temperature=settings.generator.temperature,
            )
            quantiser = fit_quantiser(vectors, options, seed)
            sids = quantiser.encode(vectors)
            trie = SidTrie(sids, quantiser.codebook_size, vectors)
            for name in generators:
                started = time.perf_counter()
                chosen = replace(options, generator=name)  # type: ignore[arg-type]
                pasts = [sids[past] for past in split.past if len(past) >= 2]
                made, _, _ = train_generator(pasts, items, sids, trie, quantiser, chosen, seed)
                typer.echo(f"{name}, {quantiser_kind}, seed {seed}: {time.perf_counter() - started:.0f} s")
                # As `gpl fit` leaves it, and beside that as asked for.
                variants: dict[str, AnchorGenerator] = {name: made}
                if name != "history":
                    alone = made.language_model if isinstance(made, NearHistory) else made
                    for asked in weight or []:
                        held = NearHistory(alone, asked, CANDIDATES[name]) if asked else alone
                        variants[f"{name}, history weight {asked:g}"] = held
                for label, variant in variants.items():
                    for score, width in (("max", None), ("kernel", tau)):
                        scores = anchor_scores(split, variant, sids, vectors, trie, beams, length, width)
                        rows.setdefault(f"{label}, {quantiser_kind}, {score}", []).append(recall(split, scores))
    table = Table("anchors", "R@10", "R@50", "tail R@50", "seeds")
    for label, results in rows.items():
        columns = [[r.recall_10 for r in results], [r.recall_50 for r in results], [r.tail_recall_50 for r in results]]
        table.add_row(label, *map(_spread, columns), str(len(results)))
    Console().print(table)
    _write(out, {label: [result.to_dict() for result in results] for label, results in rows.items()})


def codes(
    data: DataOption = None,
    kind: Annotated[list[str] | None, typer.Option(help="rq-kmeans, rq-vae; may repeat.")] = None,
    levels: Annotated[list[int] | None, typer.Option(min=1, help="May repeat; default: suggested.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=2, help="May repeat; default: suggested.")] = None,
    seed: int = 0,
    config: ConfigOption = None,
    out: JsonOption = None,
) -> None:
    """Semantic ids of a catalogue under several shapes: use of codes, collisions, reconstruction, also of new items.

    New items: one in ten, left out of the fit of a second quantiser.
    """
    import numpy as np

    from gpl.codes import suggest_codebook_size, suggest_levels
    from gpl.fit import FitOptions, fit_quantiser

    kinds = kind or list(QUANTISERS)
    one_of(kinds, QUANTISERS, "--kind")
    settings = load(config)
    with clear_errors():
        items, _, vectors = _data(data, settings)
    order = np.random.default_rng(seed).permutation(len(items))
    new, known = order[: len(items) // 10], order[len(items) // 10 :]
    sizes = size or [suggest_codebook_size(len(items))]
    table = Table("kind", "codes", "perplexity a level", "sharing a SID", "error", "of new items", "seconds")
    found = []
    for name in kinds:
        for width in sizes:
            for depth in levels or [suggest_levels(len(items), width)]:
                options = FitOptions(quantiser=name, levels=depth, codebook_size=width)  # type: ignore[arg-type]
                started = time.perf_counter()
                made = fit_quantiser(vectors, options, seed)
                seconds = time.perf_counter() - started
                report = made.report(vectors)
                error = fit_quantiser(vectors[known], options, seed).report(vectors[new])["relative_error"]
                found.append({"kind": name, "levels": depth, "size": width, **report, "new_error": error})
                table.add_row(
                    name,
                    f"{depth} x {width}",
                    ", ".join(f"{value:.1f}" for value in report["perplexity"]),
                    f"{report['collision_rate']:.1%}",
                    f"{report['relative_error']:.3f}",
                    f"{error:.3f}",
                    f"{seconds:.1f}",
                )
    Console().print(table)
    _write(out, found)


def _data(data: Path | None, settings: Settings) -> tuple[list[ItemContent], list[Ints], Floats]:
    """Items with content, each user's positives oldest first as rows of them, and the items' vectors."""
    import numpy as np

    from gpl.catalogue import ItemContent
    from gpl.evaluation.dataset import Dataset
    from gpl.evaluation.embed import embed
    from gpl.evaluation.neutral import load as load_dataset
    from gpl.evaluation.sources.movielens import RELEVANT_FROM, films, locate, ratings
    from gpl.space import SentenceEncoder

    if data is None:
        folder = locate()
        listed = [ItemContent(film.item_id, film.text) for film in films(folder)]
        taken = [(r.user_id, r.item_id) for r in ratings(folder) if r.value >= RELEVANT_FROM]
        users = list(dict.fromkeys(user for user, _ in taken))
        dataset = Dataset("ml-100k", listed, users, events=_events(listed, users, taken))
    else:
        try:
            dataset = load_dataset(data)
        except FileNotFoundError as error:
            wanted = "expected items.jsonl and events.csv, as `gpl datasets convert` writes them"
            raise typer.BadParameter(f"{error}; {wanted}", param_hint="--data") from error
    if dataset.events is None:
        raise typer.BadParameter(f"{data}: has no events.csv, so nobody's items in order", param_hint="--data")
    space = settings.space
    encoder = SentenceEncoder(
        space.encoder, space.cache, space.batch_size, lambda done, total: typer.echo(f"embedded {done:,} of {total:,}")
    )
    _, _, vectors = embed(dataset, encoder, space.dim)
    having = np.flatnonzero(np.abs(vectors).sum(axis=1) > 0)
    row_of = np.full(len(vectors), -1)
    row_of[having] = np.arange(len(having))
    taken_rows = row_of[dataset.events.item]
    by_user = [taken_rows[dataset.events.user == user] for user in range(len(dataset.users))]
    return [dataset.items[at] for at in having], [rows[rows >= 0] for rows in by_user], vectors[having]


def _events(items: list[ItemContent], users: list[str], taken: list[tuple[str, str]]) -> Events:
    import numpy as np

    from gpl.evaluation.dataset import Events

    user_at = {user: at for at, user in enumerate(users)}
    item_at = {item.item_id: at for at, item in enumerate(items)}
    user = np.array([user_at[user] for user, _ in taken])
    order = np.argsort(user, kind="stable")
    item = np.array([item_at[item] for _, item in taken])
    return Events(user[order], item[order], np.arange(len(taken)))


def _spread(values: list[float]) -> str:
    """Mean, and the range over seeds where there are several."""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def _write(out: Path | None, figures: Any) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")
