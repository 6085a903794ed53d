"""The two ways a run may end without a result, apart from a defect: the user's mistake and a failed check."""


class UserError(ValueError):
    """The user asked for something that cannot be done; one sentence: what, the value seen, what to do. Exit code 2."""


class CheckFailed(RuntimeError):  # noqa: N818 - a finding about the result, not an error of the program
    """A proof or a quality bound did not hold, and nothing was written. Exit code 1."""
