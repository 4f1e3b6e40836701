"""The one exception for input that breaks a rule: commands and scripts turn it into one line and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input, settings or files that the caller can correct. The message names the thing and the rule, in one line."""


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """Ends the program with one line and exit code 2 where the block raises `InputError`."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
