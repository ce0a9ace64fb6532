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


@pytest.mark.parametrize(
    "path", ["../secret.png", "pics/../../secret.png", "/etc/passwd", "pics/link.png", "out/s.png"]
)
def test_path_that_leaves_the_folder(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    storage = four(str(root))
    (tmp_path / "secret.png").write_bytes(picture(9))
    (root / "pics" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "s.png").write_bytes(picture(9))
    (root / "out").symlink_to(tmp_path)
    write_csv(storage, ["pics/0.png,a", f"{path},a", *(f"pics/{i}.png,a" for i in (1, 2, 3))])
    listing = list_source(data_of(str(root)), "x")
    assert reasons(listing)[path] == "path leaves the image folder"
    assert listing.rows.num_rows == 4
    with pytest.raises(BadImage, match="leaves"):
        ImageReader(data_of(str(root))).read(path)


def test_s3_keys_with_dots_stay_inside(s3_root: str) -> None:
    write_csv(four(s3_root), ["pics/0.png,a", "../../other/secret.png,a"])
    assert reasons(list_source(data_of(s3_root), "x"))["../../other/secret.png"] == "path leaves the image folder"


def test_full_paths_below_the_folder_and_links_within_it_are_fine(tmp_path: Path) -> None:
    storage = four(str(tmp_path))
    (tmp_path / "pics" / "link.png").symlink_to("0.png")
    write_csv(storage, [f"{tmp_path}/pics/0.png,a", "pics/link.png,a", "./pics/1.png,a"])
    listing = list_source(data_of(str(tmp_path)), "x")
    assert listing.rows["location"].to_pylist() == ["pics/0.png", "pics/link.png", "pics/1.png"]


def test_duplicate_id_keeps_the_first_row(tmp_path: Path) -> None:
    write_csv(four(str(tmp_path)), ["pics/0.png,a", "pics/0.png,b", "pics/1.png,b"])
    listing = list_source(data_of(str(tmp_path)), "x")
    assert listing.rows["label_a"].to_pylist() == [1, 0]
    assert reasons(listing)["pics/0.png"] == "duplicate id: an earlier row has it"


def test_label_outside_the_vocabulary(tmp_path: Path) -> None:
    four(str(tmp_path))
    listing = list_source(data_of(str(tmp_path), labels={"classes": ["b"]}), "x")
    assert set(reasons(listing).values()) == {"label 'a' is not in data.labels.classes"}
    assert listing.rows.num_rows == 2


def test_row_without_file_label_or_id(any_root: str) -> None:
    lines = ["pics/0.png,a,i", "pics/gone.png,a,j", ",a,k", "pics/1.png,,l", "pics/2.png,a,"]
    write_csv(four(any_root), lines, "file,dx,id")
    listing = list_source(data_of(any_root, columns={"label": "dx", "id": "id"}), "x")
    found = reasons(listing)
    assert {k: found[k] for k in ("j", "k", "l", "")} == {
        "j": "row without file", "k": "row without file", "l": "no label", "": "no id",
    }  # fmt: skip
    assert listing.n_rows == 5


def test_file_without_row_is_listed_but_no_row(any_root: str) -> None:
    storage = four(any_root)
    storage.put("pics/extra.png", picture(5))
    storage.put("pics/notes.txt", b"no picture")
    storage.put("pics/.hidden.png", picture(5))
    storage.put(".pics/also.png", picture(5))
    storage.put("runs/ingest/sheet.png", picture(6))  # artifacts beside the data are none of the source
    listing = list_source(data_of(any_root), "x")
    assert reasons(listing) == {"pics/extra.png": "file without row"}
    assert listing.n_rows == 4


def test_hidden_files_that_rows_name_are_read(any_root: str) -> None:
    storage = four(any_root)
    hidden = ["pics/.h.png", ".more/1.png", "._2.png"]
    for path in (*hidden, "pics/.unnamed.png"):
        storage.put(path, picture(5))
    write_csv(storage, [f"{p},a" for p in hidden])
    listing = list_source(data_of(any_root), "x")
    assert listing.rows["location"].to_pylist() == hidden
    assert not any(".unnamed" in name for name in reasons(listing))


def test_class_without_images_is_refused(tmp_path: Path) -> None:
    four(str(tmp_path))
    with pytest.raises(DataError, match=r"data\.labels\.classes: got 'c: no usable rows'.*Add images"):
        list_source(data_of(str(tmp_path), labels={"classes": ["a", "b", "c"]}), "x")


def test_class_whose_rows_are_all_left_out_says_why(tmp_path: Path) -> None:
    storage = four(str(tmp_path))
    for i in (1, 3):
        storage.delete(f"pics/{i}.png")
    with pytest.raises(DataError, match=r"'b: no usable rows'.*All 2 of it are left out, the first as: row without fi"):
        list_source(data_of(str(tmp_path)), "x")


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    four(str(tmp_path))
    with pytest.raises(DataError, match=r"Of 4 rows none is: 'pics/0\.png': row without file"):
        list_source(data_of(str(tmp_path), images=str(tmp_path / "pics")), "x")


def test_csv_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    four(str(tmp_path)).put("table.csv", "file,dx\npics/0.png,café\n".encode("latin1"))
    with pytest.raises(DataError, match=r"data\.path: got .*UTF-8 text. Byte 0xe9 at 22 .*iconv"):
        list_source(data_of(str(tmp_path)), "x")


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    four(str(tmp_path)).put("table.csv", "file,dx\npics/0.png,a\n".encode("utf-8-sig"))
    assert list_source(data_of(str(tmp_path)), "x").rows.num_rows == 1


@pytest.mark.parametrize("content", [b"", b"file,dx\npics/0.png\n", b"file,dx\n"])
def test_broken_csv_is_refused(tmp_path: Path, content: bytes) -> None:
    four(str(tmp_path)).put("table.csv", content)
    with pytest.raises(DataError, match=r"data\.path"):
        list_source(data_of(str(tmp_path)), "x")


def test_wrong_column_name_says_the_columns_and_the_likely_one(tmp_path: Path) -> None:
    four(str(tmp_path))
    message = r"data\.columns\.attributes\.view: got 'DX '.*one of the columns: file, dx\. Did you mean dx"
    with pytest.raises(DataError, match=message):
        list_source(data_of(str(tmp_path), columns={"label": "dx", "attributes": {"view": "DX "}}), "x")


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    write_csv(four(str(tmp_path)), ["pics/0.png,a,holdout"], "file,dx,part")
    with pytest.raises(DataError, match=r"data\.columns\.split: got 'holdout', must be train, val, test"):
        list_source(data_of(str(tmp_path), columns={"label": "dx", "split": "part"}), "x")


def test_source_that_is_not_there(any_root: str) -> None:
    with pytest.raises(DataError, match=r"data\.path: got .*a CSV file that exists"):
        list_source(data_of(any_root), "x")
    for kind, allowed in (("parquet", r"holding \*\.parquet"), ("class_folders", "one folder a class. It is empty")):
        with pytest.raises(DataError, match=allowed):
            list_source(data_of(any_root, kind), "x")


def test_unreadable_folder(tmp_path: Path) -> None:
    # A path through a file cannot be listed, not even by root.
    storage = four(str(tmp_path))
    blocked = str(tmp_path / "table.csv" / "pics")
    with pytest.raises(DataError, match=r"data\.images: got .*can be read. The system says: Not a directory"):
        list_source(data_of(str(tmp_path), images=blocked), "x")
    for kind in ("class_folders", "csv"):
        with pytest.raises(DataError, match=r"data\.path: got .*can be read"):
            list_source(data_of(blocked, kind), "x")
    with pytest.raises(DataError, match=r"data\.path: got .*can be read"):
        list_source(data_of(str(tmp_path), path=storage.root), "x")


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


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    open_storage(str(tmp_path)).put("a.parquet", b"PAR1 but not really")
    with pytest.raises(DataError, match=r"data\.path: got .*a whole parquet file"):
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
