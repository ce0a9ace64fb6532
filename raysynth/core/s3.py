"""The three promises of `storage` on S3 and stores that speak its protocol, through s3fs.

Requests that fail in passing are sent again by botocore and s3fs. A put whose answer was lost is sent again too, and
then finds what it wrote itself. Time-outs and retries are set as for any fsspec program:
`FSSPEC_S3='{"config_kwargs": {"read_timeout": 60, "retries": {"max_attempts": 12}}}'`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import IO, Any

from raysynth.core.errors import EnvironmentFault
from raysynth.core.faults import code_of
from raysynth.core.storage import Entry, Storage

CONFLICT_TRIES = 20
RETRIES = {"max_attempts": 8, "mode": "adaptive"}


@cache
def _session() -> Any:
    """One a process, for s3fs shares connections where everything it is given is equal."""
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header

    class Session(AioSession):
        def __reduce__(self) -> tuple:
            return _session, ()  # Ray Train sends its file system to other processes, and botocore's state cannot go

    session = Session()
    # aiohttp waits without limit for the `100 Continue` that botocore asks for with every put: a store that goes
    # silent just then would hold a worker for ever. Without it the read time-out holds, and a put is a trip shorter.
    session.unregister("before-call.s3", add_expect_header)
    return session


def _connect() -> Any:
    import fsspec.config
    import s3fs

    typed = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return s3fs.S3FileSystem(
        use_listings_cache=False, session=_session(), config_kwargs={"retries": RETRIES} | typed,
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
    )  # fmt: skip


class S3Storage(Storage):
    """A prefix in an S3 bucket. Endpoint and credentials come from the usual AWS variables."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._prefix = self.root.removeprefix("s3://")
        self._connection: Any = None

    @property
    def fs(self) -> Any:
        """The s3fs file system, made on first use in each process."""
        if self._connection is None:
            self._connection = _connect()
        return self._connection

    def _full(self, path: str) -> str:
        return f"{self._prefix}/{path}" if path else self._prefix

    def get(self, path: str) -> bytes:
        # With more than one request at a time s3fs asks for the size first, and lists the folder of what is not there.
        return self.fs.cat_file(self._full(path), max_concurrency=1)

    def put(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(self._full(path), data)

    def create(self, path: str, data: bytes) -> bool:
        for _ in range(CONFLICT_TRIES):
            try:
                self.fs.pipe_file(self._full(path), data, mode="create")
            except FileExistsError:
                return self._is_ours(path, data)
            except OSError as error:
                # s3fs knows AWS's full answer only; other stores say the bare code.
                code = code_of(error)
                if code in ("PreconditionFailed", "412"):
                    return self._is_ours(path, data)
                if code not in ("ConditionalRequestConflict", "409"):
                    raise
                time.sleep(0.2)  # two conditional writers at once; S3 asks both to try again
            else:
                return True
        raise EnvironmentFault(f"{self.url(path)}: other writers kept it busy. Run the same command again.")

    def _is_ours(self, path: str, data: bytes) -> bool:
        """Whether what is there is what we wrote: a put whose answer was lost is sent again, and then finds itself."""
        try:
            return self.get(path) == data
        except FileNotFoundError:  # deleted meanwhile
            return False

    def size(self, path: str) -> int:
        # One HEAD; `info` would go on to list the folder of what is not there, at twelve times the price.
        bucket, key, _ = self.fs.split_path(self._full(path))
        return int(self.fs.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def _walk(self, folder: str) -> Iterator[Entry]:
        try:
            found = self.fs.find(self._full(folder), detail=True)
        except FileNotFoundError:
            return
        for full, info in found.items():
            etag, written = str(info.get("ETag", "")).strip('"'), info.get("LastModified")
            yield Entry(
                full[len(self._prefix) + 1 :], int(info["size"]), etag, written.timestamp() if written else 0.0
            )

    def folders(self, folder: str = "") -> Sequence[str]:
        try:
            found = self.fs.ls(self._full(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(i["name"].rsplit("/", 1)[-1] for i in found if i["type"] == "directory")

    def delete(self, path: str) -> None:
        self.fs.rm_file(self._full(path))

    def open(self, path: str) -> IO[bytes]:
        # s3fs reads 50 MiB ahead unless told; callers here want a footer and a row group.
        return self.fs.open(self._full(path), "rb", block_size=1 << 20, cache_type="readahead")
