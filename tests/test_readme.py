"""What the README shows is what the system takes."""

from __future__ import annotations

import re
from pathlib import Path

from streams.contracts import Feedback, Item, Recall, decode
from streams.data.validate import problems

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_five_line_example_is_valid(tmp_path: Path):
    lines = re.findall(r"^(items|recalls|feedback)\.jsonl +(\{.*\})$", README, flags=re.MULTILINE)
    assert len(lines) == 5
    kinds = {"items": Item, "recalls": Recall, "feedback": Feedback}
    for name, line in lines:
        decode(kinds[name], line.encode())
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
    assert list(problems(tmp_path, 2**20, 1800.0)) == []


def test_every_file_that_it_points_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
