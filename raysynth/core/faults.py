"""What a store says when it, not the program, is at fault: which errors those are, and the remedy in words.

Local disks say errno, S3 stores say codes inside botocore's or s3fs's errors. Knows no engine and no exit codes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

FULL = {"InsufficientStorage", "507", "QuotaExceeded", "XMinioStorageFull"}
"""Codes of a full object store: the standard's, Ceph's, MinIO's."""
REFUSED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
BUSY = {"SlowDown", "503", "ServiceUnavailable", "InternalError", "500", "RequestTimeout"}


def is_storage_fault(error: BaseException) -> bool:
    """Whether the store, not the program, is at fault: disk full, connection lost, credentials refused."""
    return isinstance(error, OSError) or type(error).__module__.startswith("botocore.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def code_of(error: BaseException) -> str:
    """The S3 code behind an error, also inside the one s3fs makes of it; empty if there is none."""
    for cause in _causes(error):
        answer = getattr(cause, "response", None) or {}  # botocore's time-outs have one that is None
        code = answer.get("Error", {}).get("Code")
        if code:
            return str(code)
    return ""


def remedy(error: BaseException) -> str:
    """What a person does about a storage fault."""
    number, code = getattr(error, "errno", None), code_of(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or code in FULL:
        return "It is full: free space there or raise its quota"
    if number == errno.EROFS:
        return "It is mounted read-only: mount it writable"
    if isinstance(error, FileNotFoundError):
        return "It is gone: restore it, or run the stage that writes it"
    if code in REFUSED or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return "Access is refused: check the credentials or the folder's permissions"
    if code in BUSY or isinstance(error, TimeoutError) or type(error).__module__.startswith("botocore."):
        return "It does not answer as it should: check the store and the network"
    return "Mend the storage"


def storage_words(error: BaseException) -> str:
    """A storage fault in one line: kind, message, code and remedy."""
    code, text = code_of(error), (str(error).splitlines() or [""])[0]
    said = f" [{code}]" if code and code not in text else ""
    return f"{type(error).__name__}: {text}{said}. {remedy(error)}"
