"""The one exception for input that breaks a rule: the command line turns it into one line and exit code 2."""


class InputError(ValueError):
    """Input, settings or files that the caller can correct. The message names the thing and the rule, in one line."""
