"""The one error that users see.

Everything that can be wrong with what a user supplied (parameters, files, models, machines) is raised as
`BwskError` with a message of one line: the thing, what was found, and what to do. The command line prints that line
and exits with status 1; as a library the exception is an ordinary `ValueError`.
"""


class BwskError(ValueError):
    """A fault in what was supplied; `str(error)` is one line that names the thing, what was found and what to do."""
