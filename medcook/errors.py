"""One exception for everything a user can put right."""


class MedcookError(Exception):
    """A problem the user can solve: one sentence that names the file, and the way out.

    The command line prints `problem` and `hint` without a traceback and exits with `status`.
    """

    status = 1

    def __init__(self, problem: str, hint: str = ""):
        self.problem, self.hint = problem, hint
        super().__init__(f"{problem} {hint}".strip())


class Paused(MedcookError):
    """A training that ran out of its time with its state saved; its exit status lets a script tell it from a failure.

    step, steps  how far it came; `run` names it where that is known
    """

    status = 75

    def __init__(self, step: int, steps: int, run: str = ""):
        self.step, self.steps = step, steps
        where = f"step {step} of {steps}" + (f" of {run}" if run else "")
        super().__init__(f"Paused at {where}; the same command goes on.")
