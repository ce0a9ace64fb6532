"""Listing sources: what is a row, what is left out and why, what is refused. The pictures are real digits."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysynth.core.config import build_experiment
from raysynth.core.errors import DataError
from raysynth.core.experiment import Data
from raysynth.core.storage import Storage, open_storage
from raysynth.data.images import BadImage, decode, decode_png
from raysynth.data.reading import ImageReader
from raysynth.data.sources import SourceListing, list_source


def picture(i: int) -> bytes:
    return ImageReader(Data(kind="digits")).read(f"digits#{i}")


def data_of(root: str, kind: str = "csv", **more: Any) -> Data:
    default = {"path": f"{root}/table.csv" if kind == "csv" else root, "kind": kind}
    if kind in ("csv", "parquet"):
        default["columns"] = {"label": "dx"}
    return build_experiment({"name": "x", "data": {**default, **more}}).data


def write_csv(storage: Storage, lines: list[str], header: str = "file,dx") -> None:
    storage.put("table.csv", "\n".join([header, *lines, ""]).encode())


def four(root: str) -> Storage:
    """Two images a class and their table."""
    storage = open_storage(root)
    for i in range(4):
        storage.put(f"pics/{i}.png", picture(i))
    write_csv(storage, ["pics/0.png,a", "pics/1.png,b", "pics/2.png,a", "pics/3.png,b"])
    return storage


def reasons(listing: SourceListing) -> dict[str, str]:
    return dict(zip(listing.quarantined["image_id"].to_pylist(), listing.quarantined["reason"].to_pylist()))


def test_csv_and_folder(any_root: str) -> None:
    four(any_root)
    data = data_of(any_root)
    listing = list_source(data, "set")
    assert listing.rows["image_id"].to_pylist() == [f"pics/{i}.png" for i in range(4)]
    assert listing.rows["dataset"].unique().to_pylist() == ["set"]
    assert listing.rows["source_uri"][1].as_py() == "pics/1.png"
    assert listing.rows["label_a"].to_pylist() == [1, 0, 1, 0]
    assert (listing.n_rows, listing.quarantined.num_rows) == (4, 0)
    assert ImageReader(data).read(listing.rows["location"][2].as_py()) == picture(2)


def test_listing_reads_no_image(tmp_path: Path) -> None:
    storage = four(str(tmp_path))
    storage.put("pics/0.png", b"not a picture")
    assert list_source(data_of(str(tmp_path)), "x").rows.num_rows == 4


def test_every_column_is_mapped(tmp_path: Path) -> None:
    storage = four(str(tmp_path))
    header = "name,path,dx,who,part,place,text,Sex,Age"
    write_csv(storage, ['n1,0.png,a,p1,Train,H1,"two\nlines",F,80.0', "n2,1.png,b,,valid,H2,,unknown,"], header)
    data = data_of(str(tmp_path), images=str(tmp_path / "pics"), dataset="D", columns={
        "file": "path", "id": "name", "label": "dx", "patient": "who", "split": "part", "site": "place",
        "report": "text", "attributes": {"sex": "Sex", "age": "Age"},
    })  # fmt: skip
    listing = list_source(data, "x")
    assert listing.attributes == ["sex", "age", "age_bin", "site"]
    first, second = listing.rows.drop_columns(["source_uri", "label_a", "label_b"]).to_pylist()
    assert first == {
        "image_id": "n1", "dataset": "D", "location": "0.png", "site": "H1", "patient": "p1", "split": "train",
        "report": "two\nlines", "attr_sex": "F", "attr_age": "80", "attr_age_bin": ">=80", "attr_site": "H1",
    }  # fmt: skip
    assert (second["patient"], second["split"], second["attr_sex"], second["attr_age_bin"]) == (None, "val", None, None)
    assert listing.notes == ["1 images name no patient; each counts as its own"]


def test_findings_columns(tmp_path: Path) -> None:
    write_csv(four(str(tmp_path)), ["pics/0.png,1.0,", "pics/1.png,-1.0,1", "pics/2.png,0,9"], "file,E,M")
    columns = {"findings": {"edema": "E", "mass": "M"}}
    listing = list_source(data_of(str(tmp_path), columns=columns, labels={"kind": "multi"}), "x")
    assert listing.rows["label_edema"].to_pylist() == [1, -1]
    assert listing.rows["label_mass"].to_pylist() == [None, 1]
    assert reasons(listing)["pics/2.png"].startswith("finding 'mass' is '9'")


def test_class_folders(any_root: str) -> None:
    storage = open_storage(any_root)
    for i, folder in enumerate(["b", "a", "a/deeper"]):
        storage.put(f"{folder}/{i}.PNG", picture(i))
    storage.put("a/Thumbs.db", b"thumbs")
    storage.put("a/.DS_Store", b"x")
    storage.put("stray.png", picture(3))
    storage.put("README.md", b"about")
    data = data_of(any_root, "class_folders")
    listing = list_source(data, "x")
    assert listing.classes == ["a", "b"]
    assert listing.rows["image_id"].to_pylist() == ["a/1.PNG", "a/deeper/2.PNG", "b/0.PNG"]
    assert reasons(listing) == {"a/Thumbs.db": "not an image file", "stray.png": "in no class folder"}
    assert ImageReader(data).read("a/1.PNG") == picture(1)


def test_class_folders_below_split_folders(any_root: str) -> None:
    storage = open_storage(any_root)
    for i, folder in enumerate(["train/a", "train/b", "test/a", "test/b"]):
        storage.put(f"{folder}/{i}.png", picture(i))
    listing = list_source(data_of(any_root, "class_folders"), "x")
    assert listing.classes == ["a", "b"]
    assert listing.rows["split"].to_pylist() == ["test", "test", "train", "train"]


def test_empty_class_folder_and_linked_image(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "set"))
    storage.put("a/0.png", picture(0))
    storage.put("a/1.png", picture(1))
    (tmp_path / "else.png").write_bytes(picture(2))
    os.symlink(tmp_path / "else.png", tmp_path / "set" / "a" / "2.png")
    listing = list_source(data_of(storage.root, "class_folders"), "x")
    assert reasons(listing) == {"a/2.png": "path leaves the image folder"}
    (tmp_path / "set" / "b").mkdir()
    with pytest.raises(DataError, match=r"data\.labels\.classes: got 'b: no usable rows'"):
        list_source(data_of(storage.root, "class_folders"), "x")


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def test_parquet_of_images_with_class_labels(any_root: str) -> None:
    names = {"dx": {"_type": "ClassLabel", "names": ["normal", "pneumonia"]}}
    meta = {b"huggingface": json.dumps({"info": {"features": names}}).encode()}
    storage = open_storage(any_root)
    for part in range(2):
        rows = [{"bytes": picture(3 * part + i), "path": None} for i in range(3)]
        table = pa.table({"image": rows, "dx": [0, 1, 0], "age": [1.0, None, 50.5]}).replace_schema_metadata(meta)
        storage.put(f"p{part}.parquet", parquet(table, row_group_size=2))
    columns = {"file": "image", "label": "dx", "attributes": {"age": "age"}}
    data = data_of(any_root, "parquet", columns=columns)
    listing = list_source(data, "x")
    assert listing.classes == ["normal", "pneumonia"]
    assert listing.rows["image_id"][4].as_py() == "p1.parquet#1"
    assert listing.rows["attr_age"].to_pylist()[:3] == ["1", None, "50.5"]
    reader = ImageReader(data)
    assert [reader.read(p) for p in listing.rows["location"].to_pylist()] == [picture(i) for i in range(6)]
    single = data_of(any_root, "parquet", path=f"{any_root}/p1.parquet", columns=columns)
    assert list_source(single, "x").rows.num_rows == 3
    assert ImageReader(single).read("p1.parquet#2") == picture(5)


def test_parquet_of_bytes_and_of_paths(tmp_path: Path) -> None:
    storage = four(str(tmp_path))
    table = pa.table({"png": [picture(0), None], "file": ["pics/1.png", "../x.png"], "dx": ["a", "a"]})
    storage.put("t/all.parquet", parquet(table))
    more = {"path": str(tmp_path / "t"), "images": str(tmp_path)}
    by_bytes = data_of("", "parquet", columns={"file": "png", "label": "dx"}, **more)
    reader = ImageReader(by_bytes)
    assert reader.read(list_source(by_bytes, "x").rows["location"][0].as_py()) == picture(0)
    with pytest.raises(BadImage, match="row without image"):
        reader.read("all.parquet#1")
    by_path = data_of("", "parquet", columns={"file": "file", "label": "dx"}, **more)
    listing = list_source(by_path, "x")
    assert ImageReader(by_path).read(listing.rows["location"][0].as_py()) == picture(1)
    assert reasons(listing)["../x.png"] == "path leaves the image folder"


def with_damaged_footer() -> bytes:
    content = parquet(pa.table({"file": ["pics/0.png"], "dx": ["a"]}))
    length = int.from_bytes(content[-8:-4], "little")
    return content[: -8 - length] + b"\xff" * length + content[-8:]


@pytest.mark.parametrize("content", [b"PAR1 but not really", with_damaged_footer()], ids=["other", "footer"])
def test_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    open_storage(str(tmp_path)).put("a.parquet", content)
    with pytest.raises(DataError, match=r"data\.path: got .*a whole parquet file. It is damaged: "):
        list_source(data_of(str(tmp_path), "parquet"), "x")


@pytest.mark.parametrize("flaw", ["text", "description", "types"])
def test_parquet_whose_columns_cannot_be_read(tmp_path: Path, flaw: str) -> None:
    storage, pictures = open_storage(str(tmp_path)), [picture(0), picture(1)]
    latin = pa.array([b"m\xe9lanome", b"nv"], pa.binary())
    words = pa.StringArray.from_buffers(2, latin.buffers()[1], latin.buffers()[2]) if flaw == "text" else ["a", "b"]
    table = pa.table({"file": pictures, "dx": words})
    if flaw == "description":
        table = table.replace_schema_metadata({"huggingface": '{"info": {"features": {"dx"'})
    storage.put("a.parquet", parquet(table))
    if flaw == "types":
        storage.put("b.parquet", parquet(pa.table({"file": pictures, "dx": [0, 1]})))
    allowed = r"a whole parquet file. It is dam"
    if flaw == "types":
        allowed = r"the same type in every file\. .*string vs int64"
    with pytest.raises(DataError, match=rf"data\.path: got .*{allowed}"):
        list_source(data_of(str(tmp_path), "parquet"), "x")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damaged_parquet_page_costs_its_row_group_only(tmp_path: Path, compression: str) -> None:
    pictures = [picture(i) for i in range(4)]
    content = bytearray(parquet(pa.table({"png": pictures, "dx": list("abab")}), row_group_size=2,
                                compression=compression, use_dictionary=False))  # fmt: skip
    column = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(1).column(0)
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    open_storage(str(tmp_path)).put("a.parquet", bytes(content))
    data = data_of(str(tmp_path), "parquet", columns={"file": "png", "label": "dx"})
    assert list_source(data, "x").rows.num_rows == 4
    reader = ImageReader(data)
    assert [reader.read(f"a.parquet#{i}") for i in range(2)] == pictures[:2]
    for i in (2, 3):
        with pytest.raises(BadImage, match="damaged: "):
            reader.read(f"a.parquet#{i}")
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    with pytest.raises(FileNotFoundError):
        ImageReader(data).read("a.parquet#0")
    labels = data_of(str(tmp_path), "parquet", columns={"file": "dx", "label": "png"})
    with pytest.raises(DataError, match=r"data\.path: got .*whole parquet file.*damaged"):
        list_source(labels, "x")


def test_digits() -> None:
    data = data_of("", "digits", path="")
    listing = list_source(data, "x")
    assert listing.classes == [str(i) for i in range(10)]
    assert listing.rows["image_id"][:2].to_pylist() == ["digit-0000", "digit-0001"]
    assert listing.rows.num_rows == 1797
    array = decode_png(ImageReader(data).read("digits#0"))
    assert array.shape == (8, 8, 1)
    assert array.max() == round(15 * 255 / 16)
    assert decode(ImageReader(data).read("digits#1"), data.image).array.shape == (8, 8, 3)


def test_digest_sees_new_data_and_nothing_else(any_root: str) -> None:
    storage = four(any_root)
    data = data_of(any_root)
    before = list_source(data, "x").digest
    storage.put("runs/ingest/x/table.parquet", b"an artifact beside the data")
    assert list_source(data, "another name").digest == before
    seen = {before}
    storage.put("pics/9.png", picture(9))
    assert list_source(data, "x").digest == before
    for path, content in {"pics/0.png": picture(8), "table.csv": b"file,dx\npics/0.png,a\n"}.items():
        storage.put(path, content)
        seen.add(list_source(data, "x").digest)
    assert len(seen) == 3


def test_gone_since_the_listing(any_root: str) -> None:
    storage = four(any_root)
    storage.delete("pics/0.png")
    with pytest.raises(BadImage, match="row without file"):
        ImageReader(data_of(any_root)).read("pics/0.png")
