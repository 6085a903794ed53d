"""The ways a run may end without a result, apart from a defect."""


class UserError(ValueError):
    """The user asked for something that cannot be done; one sentence: what, the value seen, what to do. Exit code 2."""


class CheckFailed(RuntimeError):  # noqa: N818 - a finding about the result, not an error of the program
    """A proof or a quality bound did not hold, and nothing was written. Exit code 1."""


class Diverged(CheckFailed):
    """Losses or gradients were not finite several times in a row; the last good state is kept. Exit code 1."""


class Lost(RuntimeError):  # noqa: N818 - what happened to the run, not a defect of it
    """Another process of the run is gone; what was saved can be resumed. Exit code 1."""

    def __init__(self, problem: str) -> None:
        first = (problem.strip() or "no reason given").splitlines()[0].rstrip(".")
        super().__init__(f"another process of the run is gone ({first}); give the same command with --resume to go on.")
        self.problem = problem


class Interrupted(RuntimeError):  # noqa: N818 - the user's wish, not an error
    """The run was asked to end, has saved its state and can be resumed. Exit code 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, code: int, text: str = "interrupted; give the same command with --resume to go on") -> None:
        super().__init__(text)
        self.code = code
