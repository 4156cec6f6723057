"""The one exception that means: the input is wrong, not the program."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a name, a shape. Its message is one line that says what is
    wrong, where, and what would be right. The command line prints it and exits with 2."""
