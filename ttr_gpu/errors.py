"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in input or options: the CLI prints it as one line and exits with 2."""
