"""The errors that a user can cause or mend, each one clear line with a hint."""


class SoftcheckError(Exception):
    """Nothing could be verified: says what is wrong and where; `hint` names the command or option that helps.

    Raised for bad input, missing backends and devices, and for code under test that breaks its contract;
    the command line prints it as `error: …` and `hint: …` and exits with 2.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
