"""Options that many commands of the command line have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; default gpl.toml or GPL_CONFIG.")]
