"""The base of every error that a user, not a programmer, must read."""


class BoresightError(Exception):
    """A mistake in the input or a known failure. Its message is one line that names the field or file, what was
    given and what is allowed; the command ends with it and exit code 2, without a traceback."""
