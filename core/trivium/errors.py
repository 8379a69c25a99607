"""Every error a person can meet; the message says what was asked, what was found and what to set."""


class TriviumError(Exception):
    """Base of every error that is the caller's to mend; printed without a stack trace unless `--debug`."""

    exit_code = 1


class ConfigError(TriviumError):
    """A wrong option, value or combination: nothing has run yet."""

    exit_code = 2


class PluginError(TriviumError):
    """A plugin that cannot be imported, clashes with another, or speaks another API level."""

    exit_code = 2


class DataError(TriviumError):
    """A file or example that is missing, empty, unreadable, malformed or of the wrong schema.

    rule: the doctor's rule that it breaks, where there is one.
    """

    def __init__(self, message: str = "", rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class CheckpointError(TriviumError):
    """A checkpoint that is damaged, incomplete, or of another architecture, tokenizer or data set."""


class TrainingError(TriviumError):
    """A number that must never reach the weights, such as a loss of NaN."""


class BackendError(TriviumError):
    """A request that an inference backend cannot honour."""


class FeedbackError(TriviumError):
    """A response or a verdict on one that the feedback store does not take; nothing of it was kept.

    status: the HTTP status that says the same.
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class SessionError(BackendError):
    """A conversation that cannot be continued. reason: missing | busy (another writes it) | foreign (it was held with
    another model or template) | full (the model's context) | order (of its turns) | form (of what was asked)."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = {"missing": 404, "busy": 409, "foreign": 409}.get(reason, 400)
        """Of HTTP."""
