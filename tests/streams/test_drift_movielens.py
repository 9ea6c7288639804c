"""Drift on real users of MovieLens-100K whose taste changes: it is found where it happens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from streams.contracts import AnchorRequest
from streams.demo import movielens
from streams.profiles.state import AnchorsInForce, Positive, Profile, advance, answered, apply_positive
from streams.settings import ProfileSettings

VERSIONS = ("g", "q", "e")
SETTINGS = ProfileSettings(min_interval_seconds=0, max_age_seconds=1e12)
ANCHORS = 10

USERS = ("22", "87", "545")
"""Those with at least 60 liked films whose two halves differ most in genres (8 to 12 standard deviations above what the
same clicks give in random order), less two that change gradually or near an end."""
PROMPT = 5
"""Clicks within which a change is to be found."""


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    """Film -> centred unit vector over genres."""
    films = {item.item_id: (item.attributes or {}).get("genres") or [] for item in movielens.items(movielens.locate())}
    genres = sorted({genre for of_film in films.values() for genre in of_film})
    raw = {film: np.array([genre in of_film for genre in genres], np.float32) for film, of_film in films.items()}
    mean = np.mean(list(raw.values()), axis=0)
    return {film: (v - mean) / np.linalg.norm(v - mean) for film, v in raw.items() if np.linalg.norm(v - mean) > 0}


@pytest.fixture(scope="module")
def liked() -> dict[str, list[Positive]]:
    """User -> films rated 4 or 5, in time order."""
    found: dict[str, list[Positive]] = defaultdict(list)
    for n, rating in enumerate(movielens.ratings(movielens.locate())):
        if rating.value >= 4:
            found[rating.user_id].append(Positive(rating.ts, f"{n:06}", rating.item_id))
    return found


def split_of(rows: np.ndarray) -> int:
    """The click that best divides the history into two phases: least squares, 5 clicks or more in each."""
    n = len(rows)

    def between(k: int) -> float:
        return k * (n - k) / n * float(np.sum((rows[:k].mean(0) - rows[k:].mean(0)) ** 2))

    return max(range(5, n - 5), key=between)


def requests_of(positives: list[Positive], vectors: dict[str, np.ndarray]) -> list[tuple[int, AnchorRequest]]:
    """What the fold asks for, and at which click, when a request's clicks become the anchors that answer it."""
    profile, in_force, asked = Profile("u"), None, []
    for n, positive in enumerate(positives):
        profile = apply_positive(profile, positive, 100) or profile
        profile, request = advance(profile, in_force, VERSIONS, vectors.get, SETTINGS, history=ANCHORS)
        if request is not None:
            asked.append((n, request))
            rows = [vectors[film] for film in request.positives if film in vectors]
            in_force = AnchorsInForce(request.sequence, request.ts, VERSIONS, np.stack(rows))
            profile = answered(profile, in_force)
    return asked


@pytest.mark.parametrize("user", USERS)
def test_a_change_of_taste_is_found_where_it_happens(user, vectors, liked):
    positives = [p for p in liked[user] if p.item_id in vectors]
    change = split_of(np.stack([vectors[p.item_id] for p in positives]))
    asked = requests_of(positives, vectors)
    assert [request.reason for _, request in asked] == ["cold"] + ["drift"] * (len(asked) - 1)
    found = [request for n, request in asked if change <= n <= change + PROMPT]
    assert found, (change, [n for n, _ in asked])
    # The miss that is told is that of the clicks that raised the alarm.
    before = [request for n, request in asked if n < change][-1]
    anchors = np.stack([vectors[film] for film in before.positives])
    newest = np.stack([vectors[film] for film in found[0].positives[-5:]])
    assert found[0].miss == pytest.approx(float((1 - (newest @ anchors.T).max(axis=1)).mean()), abs=1e-5)
    # And there are far fewer alarms than clicks: a refresh is for a change, not for every click.
    assert len(asked) <= len(positives) / 10
