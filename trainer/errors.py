"""Everything that training raises on purpose. Each has a stable reason code."""


class TrainingError(Exception):
    """Base of every error here; the message names the thing, the value and what to do."""

    code = "training_failed"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadConfig(TrainingError):
    """A preset or an override is wrong."""

    code = "bad_config"


class BadData(TrainingError):
    """The rows cannot be trained on."""

    code = "bad_data"


class BadAdapter(TrainingError):
    """The adapter to train on from does not fit."""

    code = "bad_adapter"


class DoesNotFit(TrainingError):
    """Training would need more memory than there is."""

    code = "insufficient_memory"


class Diverged(TrainingError):
    """The loss is no longer a number."""

    code = "diverged"


class Cancelled(BaseException):
    """Asked to stop. Not an `Exception`, so that no library swallows it."""
