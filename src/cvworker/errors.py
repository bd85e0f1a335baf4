"""What may go wrong, told apart by type.

A :class:`JobError` is an answer the client can be given: its ``code`` is part of the callback contract. A
:class:`StartupError` ends the command with exit code 2 and its text as the one line the user sees.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

E = TypeVar("E", bound=BaseException)


class CvworkerError(Exception):
    """Every error that cvworker raises on purpose."""


class StartupError(CvworkerError):
    """Bad usage, settings or surroundings at start; the text names the setting and the way out."""


class WorkerFailed(CvworkerError):
    """The worker cannot go on (exit code 1), such as a model process that cannot be brought back."""


class JobError(CvworkerError):
    """One image could not be answered with a result.

    ``code`` is the ``error.code`` of the answer. ``retryable`` says whether the same request may succeed later;
    such an error is tried again by SQS and only answered on the last allowed receive.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool] = False

    @property
    def message(self) -> str:
        return str(self)


class InvalidMessage(JobError):
    """The message is not a valid request: a field is missing, empty or of the wrong type."""

    code = "invalid_message"


class UnsupportedTask(JobError):
    """The request names a task other than this module."""

    code = "unsupported_task"


class UrlNotAllowed(JobError):
    """A URL that cannot be used or may not be: scheme, userinfo, host, port, bucket or resolved address."""

    code = "url_not_allowed"


class ImageNotFound(JobError):
    """The image host answered 404 or 410, or the bucket has no such key."""

    code = "image_not_found"


class DownloadFailed(JobError):
    """The download failed in a way that trying again would not mend, such as HTTP 403."""

    code = "download_failed"


class DownloadInterrupted(DownloadFailed):
    """The download failed in a way that may pass: 5xx, 429, a reset, a short body, a name that does not resolve.

    ``retry_after`` is the host's own wish in seconds, where it gave one.
    """

    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DownloadTimeout(DownloadFailed):
    """The download was not done within ``download_timeout``; never tried again in place."""

    retryable = True


class ImageTooLarge(JobError):
    """More bytes or more pixels than allowed."""

    code = "image_too_large"


class ImageUnsupported(JobError):
    """The bytes are not one of the accepted image formats."""

    code = "image_unsupported"


class ImageInvalid(JobError):
    """The bytes are of an accepted format, but damaged or truncated."""

    code = "image_invalid"


class PreprocessFailed(JobError):
    """The module's ``preprocess`` raised, or killed its process, for this image."""

    code = "preprocess_failed"


class ProcessFailed(JobError):
    """The module's ``process`` raised, gave an unusable result, or killed its process, for this image."""

    code = "process_failed"


def without_frames(error: E) -> E:
    """``error`` as it may be kept: the frames it passed through, and those of its causes, hold images and tensors."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _leaves(cls: type[JobError]) -> list[type[JobError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


_BY_NAME = {cls.__name__: cls for cls in _leaves(JobError)}


def error_codes() -> list[str]:
    """Every ``error.code`` that an answer may have."""
    return sorted({code for cls in _BY_NAME.values() if (code := getattr(cls, "code", None))})


def crosses(error: JobError) -> bool:
    """Whether the error can be told by its name, which a module's own subclass cannot."""
    return _BY_NAME.get(type(error).__name__) is type(error)


def job_error(name: str, message: str) -> JobError:
    """The error of class ``name``, as it was in another process (only names and texts cross the border)."""
    return _BY_NAME[name](message)
