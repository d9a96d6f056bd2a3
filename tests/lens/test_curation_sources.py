"""Sources: every sample is found once, in an order of its own, and read by its address."""

import io
import json
import sys
import tarfile

import pytest

from wellposed.lens.curation_sources import Address, BrokenMetadataError, DamagedFile, SampleReader, list_samples


def tar_of(path, members, end=True):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if not end:
        path.write_bytes(path.read_bytes()[: archive.offset])
    return path


def samples(source):
    return list(list_samples(source, "image"))


def read(source, address):
    with SampleReader(source, "image") as reader:
        return reader.picture(address), reader.metadata(address)


def test_folders_are_listed_by_name_without_sidecars_and_hidden_files(tmp_path):
    for name in (
        "b/2.png",
        "b/10.jpg",
        "a.webp",
        "b.png",
        "a.txt",
        "b/2.json",
        ".hidden",
        ".git/x.png",
        "b/deep/no_end",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    names = ["a.webp", "b/10.jpg", "b/2.png", "b/deep/no_end", "b.png"]
    assert samples(tmp_path) == [Address(file=name) for name in names]
    with SampleReader(tmp_path, "image") as reader:
        assert [reader.picture(Address(file=name)) for name in names] == [name.encode() for name in names]


def test_a_single_picture_is_a_source(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    (tmp_path / "x.txt").write_text(" caption\n")
    assert samples(tmp_path / "x.png") == [Address(file="x.png")]
    assert read(tmp_path / "x.png", Address(file="x.png")) == (b"picture", {"caption": "caption"})


def test_metadata_are_json_and_the_text_beside_it(tmp_path):
    (tmp_path / "x.y.png").write_bytes(b"")
    (tmp_path / "x.y.json").write_text(json.dumps({"caption": "of the json", "n": [1, {"a": None}], "x": float("nan")}))
    address = Address(file="x.y.png")
    assert read(tmp_path, address)[1] == {"caption": "of the json", "n": [1, {"a": None}], "x": None}
    (tmp_path / "x.y.txt").write_bytes("\ufeffein schönes Bild\n".encode())
    assert read(tmp_path, address)[1]["caption"] == "ein schönes Bild"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'{"a": ', "its .json cannot be read"),
        ("x.json", b"[1, 2]", "its .json holds list, expected an object"),
        ("x.json", b"[" * 100_000, "its .json cannot be read"),
        ("x.txt", b"\xff\xfe\x00", "its .txt cannot be read"),
        ("x.txt", b" " * (1 << 24) + b"x", "its .txt has 16777217 bytes"),
    ],
)
def test_broken_metadata_are_an_error_of_the_sample(name, content, message, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenMetadataError, match=message):
        read(tmp_path, Address(file="x.png"))


def test_archives_hold_samples_of_members_with_one_name(tmp_path):
    members = [
        ("a/0001.jpg", b"one"),
        ("a/0001.json", b'{"caption": "first"}'),
        ("a/0002.txt", b"second"),
        ("a/0002.PNG", b"two" * 400),
        ("b/0002.seg.png", b"mask"),
        ("b/0002.webp", b"three"),
        ("notes.txt", b"no picture"),
        ("a/._0003.jpg", b"resource fork"),
    ]
    path = tar_of(tmp_path / "x.tar", members)
    first, second, third = samples(path)
    assert read(path, first) == (b"one", {"caption": "first"})
    assert read(path, second) == (b"two" * 400, {"caption": "second"})
    assert read(path, third) == (b"three", {})
    assert samples(tmp_path) == [first, second, third]
    assert len({str(first), str(second), str(third)}) == 3 and str(first).startswith("x.tar#")


@pytest.mark.parametrize("kept", [0, 700, 1024, 1100, 1536, 2048, 2560, 3000])
def test_archives_that_end_early_give_the_samples_before_and_say_so(kept, tmp_path):
    members = [(f"{i}.{end}", b"%d" % i * 300) for i in range(2) for end in ("jpg", "txt")]  # 1024 bytes each
    path = tar_of(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[:kept])
    *found, damaged = samples(path)
    assert isinstance(damaged, DamagedFile) and damaged.file == "x.tar"
    assert len(found) == (kept > 2048)
    if kept > 2560:
        assert "left out from '1' on" in damaged.error
    for address in found:
        assert read(path, address) == (b"0" * 300, {"caption": "0" * 300})


def test_files_that_are_no_archives_are_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"hello" * 1000)
    assert [type(found) for found in samples(tmp_path)] == [DamagedFile]


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a folder, a .parquet file or a .tar file"):
        samples(tmp_path / "nowhere")


def test_tables_hold_a_sample_in_each_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "image": {"bytes": b"%d" % i, "path": f"{i}.png"},
            "caption": f"c{i}",
            "score": i / 2,
            "raw": b"ab",
            "tags": ["x"],
        }
        for i in range(10)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    flat = pyarrow.table({"image": [b"p", None], "when": pyarrow.array([0, None], pyarrow.date32())})
    parquet.write_table(flat, tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"picture": [b"p"]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"no table")
    found = samples(tmp_path)
    assert found[:12] == [Address(file="a.parquet", place=i) for i in range(10)] + [
        Address(file="b.parquet", place=0),
        Address(file="b.parquet", place=1),
    ]
    assert [damaged.file for damaged in found[12:]] == ["c.parquet", "d.parquet"]
    assert "it has no column 'image'; it has picture" in found[12].error
    with SampleReader(tmp_path, "image") as reader:
        for i in (0, 1, 2, 3, 9, 4, 0):
            assert reader.picture(found[i]) == b"%d" % i
        about = reader.metadata(found[3])
        assert about == {"caption": "c3", "score": 1.5, "raw": "2 bytes", "tags": ["x"]}
        assert reader.picture(found[11]) == b""
        assert reader.metadata(found[10]) == {"when": "1970-01-01"}


def test_without_pyarrow_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"wellposed\[data\]"):
        samples(tmp_path)
