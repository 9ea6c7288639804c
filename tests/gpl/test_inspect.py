"""A look inside: every number that is shown against the parts it comes from, and pages that stand alone."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from gpl.anchors.base import History, anchors_of
from gpl.artefacts import Artefacts
from gpl.catalogue import ItemContent
from gpl.codes import SidCentroids
from gpl.codes.trie import SidTrie
from gpl.fit import Event, FitOptions, fit
from gpl.inspect import Inspector, ItemView, UserView, html, text
from gpl.inspect.page import _when
from gpl.labels import labeller
from gpl.labels.confidence import dispersion_factor

ITEMS, GROUPS, DIM = 90, 6, 12


def items() -> list[ItemContent]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(GROUPS, DIM))[np.arange(ITEMS) % GROUPS] + 0.3 * rng.normal(size=(ITEMS, DIM))
    return [ItemContent(f"i{n}", f"<b>item</b> & {n}", row.tolist()) for n, row in enumerate(rows)]


def events() -> list[Event]:
    rng = np.random.default_rng(1)
    return [
        Event(f"u{u}", f"i{n}", 1_700_000_000_000 + 60_000 * t, bool(n % GROUPS == u % GROUPS))
        for u in range(12)
        for t, n in enumerate(rng.choice(ITEMS, 40, replace=False))
    ] + [Event("u0", "gone", 5, True), Event("stranger", "gone", 5, True)]


@pytest.fixture(scope="module")
def artefacts() -> Artefacts:
    return fit(items(), events(), None, FitOptions(generator="history", beams=4))


@pytest.fixture(scope="module")
def inspector(artefacts: Artefacts) -> Inspector:
    return Inspector(artefacts, items(), events(), None, labeller.Config(matching="kernel"), beams=4, history=5)


def test_a_user_is_shown_as_the_parts_see_him(artefacts: Artefacts, inspector: Inspector):
    view = inspector.user("u3")
    clicks = sorted((e for e in events() if e.user_id == "u3" and e.clicked), key=lambda e: e.ts)
    assert [met.item_id for met in view.history] == [e.item_id for e in clicks]
    assert [met.read for met in view.history] == [at >= len(clicks) - 5 for at in range(len(clicks))]

    raw = np.array([item.embedding for item in items()], np.float32)
    vectors = artefacts.space.project(raw)
    sids = artefacts.quantiser.encode(vectors)
    rows = [int(e.item_id[1:]) for e in clicks][-5:]
    history = History(sids[rows], vectors[rows])
    trie = SidTrie(sids, artefacts.quantiser.codebook_size, vectors)
    (beams,) = artefacts.generator.generate([history], trie, 4)
    anchors = anchors_of(beams, SidCentroids(sids, vectors), history)
    config = labeller.Config(matching="kernel")
    prepared = labeller.PreparedAnchors.build(anchors.vectors, anchors.logprobs, anchors.history_factor, 3, config)
    labelled = labeller.label(prepared, artefacts.calibration, vectors)

    assert [anchor.sid for anchor in view.anchors] == list(map(tuple, anchors.sids.tolist()))
    for k, anchor in enumerate(view.anchors):
        assert anchor.probability == pytest.approx(np.exp(anchors.logprobs[k]), abs=1e-6)
        assert anchor.history_factor == pytest.approx(anchors.history_factor[k], abs=1e-6)
        assert anchor.confidence == pytest.approx(prepared.weight[k], abs=1e-6)
        near = [float(vectors[int(n.item_id[1:])] @ anchors.vectors[k]) for n in anchor.nearest]
        assert [n.cosine for n in anchor.nearest] == pytest.approx(near, abs=1e-5)
        assert near == sorted(near, reverse=True)
        assert not {n.item_id for n in anchor.nearest} & {met.item_id for met in view.history}
    assert view.dispersion_factor == pytest.approx(dispersion_factor(anchors.vectors, anchors.logprobs))
    unmet = np.setdiff1d(np.arange(ITEMS), [int(e.item_id[1:]) for e in clicks])
    assert view.labels is not None
    assert sum(view.labels.counts) == len(unmet)
    assert view.labels.mean == pytest.approx(labelled.label[unmet].mean(), abs=1e-5)
    assert view.top[0].label == pytest.approx(labelled.label[unmet].max(), abs=1e-6)
    assert {row.item_id for row in view.top} <= {f"i{n}" for n in unmet}


def test_a_user_as_of_a_time_and_what_is_not_known(inspector: Inspector):
    clicks = sorted((e for e in events() if e.user_id == "u0" and e.clicked), key=lambda e: e.ts)
    view = inspector.user("u0", until=clicks[2].ts)
    assert (len(view.history), view.unknown_items) == (2, 1)
    alone = inspector.user("stranger")
    assert (alone.history, alone.anchors, alone.labels, alone.unknown_items) == ([], [], None, 1)
    assert "No anchors" in html(alone)
    with pytest.raises(KeyError, match="nobody"):
        inspector.user("nobody")
    with pytest.raises(KeyError, match="until 4"):
        inspector.user("u0", until=4)


def test_an_item_and_a_sid(artefacts: Artefacts, inspector: Inspector):
    view = inspector.item("i7")
    assert view.positives == sum(e.item_id == "i7" and e.clicked for e in events())
    assert view.labels is not None
    assert view.asked == sum(view.labels.counts)
    assert [label for _, label in view.interested] == sorted((label for _, label in view.interested), reverse=True)
    assert int(view.nearest[0].item_id[1:]) % GROUPS == 7 % GROUPS
    below = inspector.sid(view.sid[:1])
    assert below.count == sum(count for _, count, _ in below.children)
    whole = inspector.sid(view.sid)
    assert {"i7", *(n.item_id for n in view.same_sid)} == {n.item_id for n in whole.items}
    assert whole.children == []
    with pytest.raises(KeyError, match="no item's SID begins so"):
        inspector.sid((99,))
    with pytest.raises(ValueError, match="4 codes, expected 1 to 3"):
        inspector.sid((1, 2, 3, 4))
    with pytest.raises(KeyError, match="i999"):
        inspector.item("i999")


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "link", "img", "circle", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "rect", "line"):
            assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("ts", "said"),
    [
        (5, "5"),
        (1_700_000_000_000, "2023-11-14 22:13"),
        (1_700_000_000_000_000, "1700000000000000"),
        (10**20, "1" + "0" * 20),
    ],
)
def test_a_time_in_another_unit_than_ours_is_shown_as_it_is(ts: int, said: str):
    assert _when(ts) == said


@pytest.mark.parametrize("of", ["user", "item", "sid"])
def test_pages_stand_alone_and_the_terminal_shows_the_same(inspector: Inspector, of: str):
    view = {
        "user": lambda: inspector.user("u3"),
        "item": lambda: inspector.item("i7"),
        "sid": lambda: inspector.sid(inspector.item("i7").sid[:1]),
    }[of]()
    page = html(view)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert not re.search(r"(?:src|href)=|url\(|https?://", page), "nothing is loaded from elsewhere"
    assert "<b>item</b>" not in page, "texts of items are escaped"
    assert "&lt;b&gt;item&lt;/b&gt;" in page
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text(view))
    shown = console.export_text()
    assert "item" in shown
    if of == "user":
        assert "<b>item</b> &" in shown, "texts are shown as they are, markup is not followed"
        assert page.count("<circle") >= ITEMS
        for anchor in view.anchors:
            assert "-".join(map(str, anchor.sid)) in shown
            assert "-".join(map(str, anchor.sid)) in page


def test_texts_give_the_terminal_no_orders(artefacts: Artefacts):
    loud = [replace(item, text=f"\x1b[31m\x9b2J\x07red {item.item_id}") for item in items()]
    loud[7] = replace(loud[7], item_id="i7\x1b[0m")
    clicks = [e._replace(user_id=f"{e.user_id}\x1b[1m") for e in events()]
    seen = Inspector(artefacts, loud, clicks, None, beams=4)
    sid = seen.item("i5").sid
    for view in (seen.user("u3\x1b[1m"), seen.item("i7\x1b[0m"), seen.sid(sid), seen.sid(sid[:1])):
        said = io.StringIO()
        Console(width=200, file=said).print(text(view))
        assert "[31m" in said.getvalue() and not set("\x1b\x9b\x07") & set(said.getvalue())


def test_what_is_counted_and_what_the_stream_would_not_have_is_said(artefacts: Artefacts):
    seen = Inspector(artefacts, items(), events(), None, beams=4, min_positives=3)

    def shown(view: UserView | ItemView) -> str:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(text(view))
        return console.export_text()

    times = sorted(e.known_ts for e in events() if e.user_id == "u3" and e.clicked)
    view = seen.user("u3", until=times[1])
    for said in (shown(view), html(view)):
        assert said.index("no anchors or labels yet: 2 of 3 clicks (profiles.min_positives)") < said.index(
            "nearest not"
        )
    assert "min_positives" not in shown(seen.user("u3", until=times[2]))
    assert re.search(r"labels for (\d+) users with anchors who .*, \1 users\n", shown(seen.item("i7")))
    # Nor has the stream labels for users with fewer clicks.
    strict = Inspector(artefacts, items(), events(), None, beams=4, min_positives=7)
    enough = [user for user in strict.users if sum(e.user_id == user and e.clicked for e in events()) >= 7]
    asked = [user for user, _ in strict.item("i7").interested]
    assert asked and set(asked) <= set(enough) < set(strict.users)


@pytest.mark.parametrize(("count", "dim"), [(1, 8), (5, 1), (2, 8)])
def test_one_item_or_one_dimension_can_be_looked_at(count: int, dim: int):
    rng = np.random.default_rng(0)
    few = [ItemContent(f"i{n}", "text", rng.normal(size=dim).tolist()) for n in range(count)]
    clicks = [Event("u", "i0", 1, True)]
    seen = Inspector(fit(few, clicks, None), few, clicks, None)
    assert "text" in html(seen.user("u"))
    assert np.isfinite(seen.user("u").map.history).all()
    assert "text" in html(seen.item("i0"))


def test_an_item_that_comes_twice_is_named(artefacts: Artefacts):
    with pytest.raises(ValueError, match="'i0': its id comes twice"):
        Inspector(artefacts, [*items(), items()[0]], events(), None)
