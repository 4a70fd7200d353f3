"""The one exception that users see."""


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
