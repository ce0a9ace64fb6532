"""Faults of storage in words: each says what a person does about it."""

from __future__ import annotations

import errno
import os

import pytest
from botocore.exceptions import ClientError, NoCredentialsError, ReadTimeoutError
from s3fs.errors import translate_boto_error

from raysynth.core.faults import code_of, is_storage_fault, storage_words


def answered(code: str) -> Exception:
    """What s3fs raises where a store answers with this code."""
    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "free space"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "mount it writable"),
        (PermissionError(errno.EACCES, "denied"), "permissions"),
        (FileNotFoundError(errno.ENOENT, "nothing", "export"), "restore it"),
        (answered("XMinioStorageFull"), "free space"),
        (answered("QuotaExceeded"), "free space"),
        (answered("InvalidAccessKeyId"), "credentials"),
        (answered("SlowDown"), "network"),
        (NoCredentialsError(), "credentials"),
        (ReadTimeoutError(endpoint_url="http://s3"), "network"),
        (OSError("odd"), "Mend the storage"),
    ],
)
def test_every_fault_has_a_remedy(error: Exception, words: str) -> None:
    assert is_storage_fault(error)
    assert words in storage_words(error)
    assert "\n" not in storage_words(error)


def test_the_stores_own_code_is_found_and_said() -> None:
    assert code_of(answered("XMinioStorageFull")) == "XMinioStorageFull"
    assert "[AccessDenied]" in storage_words(answered("AccessDenied"))
    assert code_of(ValueError()) == ""
    assert not is_storage_fault(ValueError())
