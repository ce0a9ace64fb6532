"""What users bring that cannot be used: quarantined with a reason, or refused with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysynth.core.errors import DataError
from raysynth.core.storage import open_storage
from raysynth.data.images import BadImage
from raysynth.data.quarantine import Quarantine
from raysynth.data.reading import ImageReader
from raysynth.data.sources import list_source
from tests.unit.data.test_sources import data_of, four, picture, reasons, write_csv


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
    others = {"pics/link.png": "file without row"} if path != "pics/link.png" else {}
    assert reasons(listing) == {path: "path leaves the image folder", **others}, "what lies behind the link is no stray"
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


def test_images_in_a_linked_folder_below_the_images_are_found(tmp_path: Path) -> None:
    storage = four(str(tmp_path))
    storage.put("sets/first/8.png", picture(8))
    storage.put("sets/first/stray.png", picture(9))
    (tmp_path / "pics" / "first").symlink_to(tmp_path / "sets" / "first")
    (tmp_path / "pics" / "loop").symlink_to(tmp_path / "pics")
    write_csv(storage, ["pics/0.png,a", "pics/first/8.png,a", "pics/first/9.png,a"])
    listing = list_source(data_of(str(tmp_path)), "x")
    assert listing.rows["location"].to_pylist() == ["pics/0.png", "pics/first/8.png"]
    assert reasons(listing)["pics/first/9.png"] == "row without file"
    assert reasons(listing)["pics/first/stray.png"] == "file without row"
    storage.put("sets/first/8.png", picture(7) + b"more")
    assert list_source(data_of(str(tmp_path)), "x").digest != listing.digest, "new data is seen"


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


@pytest.mark.parametrize("root_too", [False, True])
def test_file_without_row_is_listed_in_any_folder_below_those_that_rows_name(any_root: str, root_too: bool) -> None:
    storage = open_storage(any_root)
    strays = ["images/4.png", "images/a/2.png", "images/b/3.png", *(["6.png"] if root_too else [])]
    for path in ("images/a/1.png", "5.png", "runs/sheet.png", *strays):
        storage.put(path, picture(5))
    write_csv(storage, ["images/a/1.png,a", *(["5.png,a"] if root_too else [])])
    listing = list_source(data_of(any_root), "x")
    assert reasons(listing) == dict.fromkeys(strays, "file without row")
    assert (listing.n_rows, listing.notes) == (1 + root_too, [])
    quarantine = Quarantine(listing)
    assert (quarantine.fraction, quarantine.kinds()) == (0, {"file without row": len(strays)})


def test_folders_beside_those_that_rows_name_are_told(any_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(any_root)
    for name in ("p1", "p2", "p3", ".cache"):
        storage.put(f"{name}/1.png", picture(5))
    write_csv(storage, ["p1/1.png,a", "p2/1.png,b"])
    listing = list_source(data_of(any_root), "x")
    assert listing.notes == ["rows name files in 2 folders; 1 beside them were not looked into: p3"]
    assert listing.quarantined.num_rows == 0

    def refuse(*_: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(storage), "folders", refuse)
    assert list_source(data_of(any_root), "x").notes == []


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
    words = r"Of 4 rows none is: 'pics/0\.png': row without file\. There is no .*pics/pics/0\.png: check"
    with pytest.raises(DataError, match=words):
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
