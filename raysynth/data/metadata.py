"""Reads the user's table, CSV or parquet, into columns of text. Never reads pixels and knows no vocabulary.

Every problem is a DataError that names the key, what was got, what is allowed and the likely remedy.
"""

from __future__ import annotations

import difflib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from raysynth.core.errors import DataError
from raysynth.core.storage import Entry, Storage, open_storage

Cells = list[str | None]


def split_url(path: str) -> tuple[Storage, str]:
    """Folder and name of a file: `s3://b/p/x.csv` -> (storage of `s3://b/p`, `x.csv`)."""
    folder, _, name = path.rpartition("/")
    return open_storage(folder if folder or not path.startswith("/") else "/"), name


def read_file(path: str, key: str, what: str) -> bytes:
    """The bytes of one file the experiment names. Raises DataError where it cannot be read."""
    storage, name = split_url(path)
    try:
        return storage.get(name)
    except FileNotFoundError as error:
        raise DataError(key, path, f"{what} that exists") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise DataError(key, path, f"{what} that can be read", f"The system says: {error.strerror}.") from error


def read_csv(raw: bytes, key: str, path: str) -> pa.Table:
    """CSV bytes -> a table of strings. Raises DataError where they are not UTF-8 or no CSV."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            key, path, "UTF-8 text",
            f"Byte 0x{raw[error.start]:02x} at {error.start} is not. Save it as UTF-8, such as with "
            f"`iconv -f latin1 -t utf-8`.",
        ) from error  # fmt: skip
    try:
        return pa_csv.read_csv(
            io.BytesIO(raw),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(default_column_type=pa.string(), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise DataError(key, path, "a CSV file with one header line", str(error).splitlines()[0] + ".") from error


def require_column(names: Sequence[str], name: str, key: str) -> str:
    """`name` if the table has it. Raises DataError naming the columns there are and the likely one."""
    if names.count(name) == 1:
        return name
    if name in names:
        raise DataError(key, name, "a column that occurs once", "Rename one of them.")
    folded = {n.lower().strip(): n for n in names}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.4)
    shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
    raise DataError(key, name, f"one of the columns: {shown}", f"Did you mean {folded[near[0]]}?" if near else "")


def text_column(table: pa.Table, name: str) -> Cells:
    """A column as text: whole floats without the point, booleans as 1 and 0, Hugging Face class labels by name."""
    field = table.schema.field(name)
    values = table[name].to_pylist()
    names = _class_names(table.schema, name)
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return values
    return [None if v is None else _text(v, names) for v in values]


def _text(value: Any, names: list[str]) -> str | None:
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        if value != value:
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _class_names(schema: pa.Schema, name: str) -> list[str]:
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(name)
    is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return list(feature.get("names", [])) if is_class else []


def damage(error: BaseException) -> str | None:
    """What is wrong with a parquet file's content, in words; None where the store or the system is at fault.

    Arrow raises a plain OSError without a number for a damaged page or footer; those of the system and of s3fs carry
    one.
    """
    if isinstance(error, ValueError | pa.ArrowNotImplementedError) or (type(error) is OSError and error.errno is None):
        return "damaged: " + (str(error).splitlines() or [""])[0].rstrip(".")
    return None


def parquet_files(path: str) -> tuple[Storage, list[Entry]]:
    """The parquet file, or every `*.parquet` below the folder, sorted. Raises DataError if there is none."""
    storage = open_storage(path)
    try:
        found = [e for e in storage.list() if e.path.endswith(".parquet")]
        if not found and path.endswith(".parquet"):
            storage, name = split_url(path)
            found = storage.list(name)
    except NotADirectoryError:  # a single local file
        storage, name = split_url(path)
        stat = os.stat(path)
        found = [Entry(name, stat.st_size, f"{stat.st_mtime_ns:x}")]
    except OSError as error:
        raise DataError("data.path", path, "a folder that can be read", f"The system: {error.strerror}.") from error
    if not found:
        raise DataError("data.path", path, "a parquet file or a folder holding *.parquet")
    return storage, found


@contextmanager
def _whole(storage: Storage, name: str) -> Iterator[None]:
    """Turns what reading a damaged parquet file raises into a DataError."""
    try:
        yield
    except Exception as error:
        if why := damage(error):
            raise DataError("data.path", storage.url(name), "a whole parquet file", f"It is {why}.") from error
        raise


def open_parquet(storage: Storage, name: str) -> pq.ParquetFile:
    """A parquet file opened for reading. Raises DataError where it is none."""
    with _whole(storage, name):
        return pq.ParquetFile(storage.open(name))


def read_parquet(
    storage: Storage, files: Sequence[str], columns: dict[str, str], image: str
) -> tuple[pa.Table, list[str]]:
    """The named columns of all files below one another, without pixels, and each row's `file.parquet#row`.

    Args:
        columns: configuration key -> column name.
        image: the image column; only read where it holds paths as text.
    """
    tables, locations = [], []
    for name in files:
        file = open_parquet(storage, name)
        there = file.schema_arrow.names
        for key, column in {"data.columns.file": image, **columns}.items():
            require_column(there, column, key)
        wanted = list(dict.fromkeys(columns.values()))
        kind = file.schema_arrow.field(image).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            wanted.append(image)
        with _whole(storage, name):
            table = file.read(columns=wanted)
            table.validate(full=True)  # lengths, and that text is UTF-8
            if table.num_rows != file.metadata.num_rows:
                raise pa.ArrowInvalid(f"{table.num_rows:,} of {file.metadata.num_rows:,} rows are there")
            for column in wanted:
                _class_names(table.schema, column)
        tables.append(table)
        locations += [f"{name}#{i}" for i in range(table.num_rows)]
    try:
        return pa.concat_tables(tables, promote_options="permissive"), locations
    except pa.ArrowTypeError as error:
        raise DataError(
            "data.path", storage.url(), "the same type in every file", f"{error}. Write one of them as the other."
        ) from error
