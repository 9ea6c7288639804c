"""The directory of a demo: what is kept in it and under which name, and what a run may take away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streams.data.reader import FILES
from streams.demo import prepare
from streams.settings import CalibrationSettings, GeneratorSettings, LabelSettings, Settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    for name in FILES:
        (directory / name).write_text(f"{name}\n")
    return directory


@pytest.mark.parametrize(
    "other",
    [
        {"calibration": CalibrationSettings(kind="isotonic")},
        {"labels": LabelSettings(matching="kernel")},
        {"generator": GeneratorSettings(kind="history")},
    ],
)
def test_a_fit_is_found_again_under_what_made_it_only(data: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    def place(settings: Settings) -> Path:
        return prepare.place_of_fit(tmp_path, data, 0.5, 0, settings)

    settings = Settings()
    assert place(settings) == place(settings.model_copy(update={"labels": LabelSettings(window_seconds=1)}))
    assert place(settings.model_copy(update=other)) != place(settings)
