"""Every error a user can cause: one message that says what was wrong, what was expected and what to do."""


class GuardError(Exception):
    """Root of all errors raised on purpose; its text is written for the user."""


class UsageError(GuardError):
    """A request that makes no sense as it was written (exit status 2 on the command line)."""


class BundleError(GuardError):
    """A bundle that is missing, incomplete, corrupt, or whose parts do not belong together."""


class DataError(GuardError):
    """Data that cannot be read, or that is not what the model or the command needs."""


class ModelError(GuardError):
    """An ONNX model that cannot be guarded as it is."""


class UnsupportedOperatorError(ModelError):
    """An ONNX operator on the path from input to logits that has no differentiation rule."""


class CalibrationError(GuardError):
    """A calibration that cannot be made from what was given."""


class TrainingError(GuardError):
    """Training that cannot start or go on."""


class ImageError(GuardError):
    """An upload that is not an image the service accepts.

    `status` is the HTTP status that answers it, `code` the machine-readable name in the error envelope.
    """

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
