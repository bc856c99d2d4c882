"""Commands around the notebooks: doctor, cook, work, figures, publish, check."""


def doctor() -> None:
    """What this machine has, and what each profile will take on it."""


def cook() -> None:
    """Run chapters headlessly."""


def work() -> None:
    """Copy a chapter into a folder of your own."""


def figures() -> None:
    """Redraw every evidence figure."""


def publish() -> None:
    """Publish an executed chapter."""


def check() -> None:
    """Check the notebooks."""
