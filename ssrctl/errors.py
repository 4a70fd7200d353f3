"""The exceptions that users see."""


class UserError(Exception):
    """Something the user can mend: a wrong path, a torn file, an impossible setting.

    The command line prints ``message`` and ``remedy`` on one line each and exits with code 2, without
    a traceback.

    Args:
        message: what was wrong, with the numbers.
        remedy: what to do about it.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message} ({remedy})")
        self.message = message
        self.remedy = remedy


class Stopped(Exception):
    """Work that ended early at a limit that the user set, or for an outage; what was done is kept.

    The command line prints ``message`` and ``remedy`` and exits with code 3, so that a script can tell "go on
    later" from a mistake (2) and a failure (1).

    Args:
        message: why, with the numbers.
        remedy: how to go on.
    """

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message} ({remedy})")
        self.message = message
        self.remedy = remedy


class CheckFailed(Exception):
    """A check that the user asked for does not hold; the report of it is written.

    The command line prints ``message`` and exits with code 4, for use in continuous integration.

    Args:
        message: what does not hold, with the numbers.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
