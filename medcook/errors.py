"""One exception for everything a user can put right."""


class MedcookError(Exception):
    """A problem the user can solve: one sentence that names the file, and the way out.

    The command line prints `problem` and `hint` without a traceback and exits with status 1.
    """

    def __init__(self, problem: str, hint: str = ""):
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem} {hint}".strip())
