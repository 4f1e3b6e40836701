"""Options that several verbs of the command line take."""

from pathlib import Path
from typing import Annotated

import typer

from jaxslm.config import ComputeDtype

Checkpoint = Annotated[Path, typer.Option("--model", help="A checkpoint folder.")]
ScoringDtype = Annotated[
    ComputeDtype | None,
    typer.Option("--dtype", help="By default float32 on a CPU, where bfloat16 may be faster, and bfloat16 elsewhere."),
]
NewPath = Annotated[Path, typer.Option("--out", help="Where to write; must not exist.")]
