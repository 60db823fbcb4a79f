"""Everything that evaluation raises on purpose. Each has a stable reason code."""


class EvaluationError(Exception):
    """Base of every error here; the message names the thing, the value and what to do."""

    code = "evaluation_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class SuiteInvalid(EvaluationError):
    """The suite's YAML or data is wrong."""

    code = "suite_invalid"


class ServingFailed(EvaluationError):
    """The gateway or the engine behind it did not answer: nothing was learned about the version."""

    code = "serving_failed"


class WrongVersionServed(EvaluationError):
    """The answer's headers name other weights than those under evaluation."""

    code = "wrong_version_served"


class FingerprintMismatch(EvaluationError):
    """Two sets of scores were made under different conditions and must not be compared."""

    code = "fingerprint_mismatch"


class VerifyRefused(EvaluationError):
    """The version must not reach an engine; the code says why."""

    code = "verify_refused"
