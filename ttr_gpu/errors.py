"""Exceptions that are explained in their message: the CLI prints that line alone."""


class UserError(Exception):
    """A mistake in input or options: the CLI prints it as one line and exits with 2."""


class TrainingDiverged(Exception):
    """The loss or the gradient is not finite; the message says where it began and what to try. The CLI exits with 1."""
