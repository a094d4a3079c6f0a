"""Files and the hub: the rows they give, and where a broken one breaks."""

from __future__ import annotations

import csv
import errno
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dpo_lightning.data.datamodule import sources
from dpo_lightning.data.sources import SHIPPED, FileSource, HubSource
from dpo_lightning.types import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "chosen": "So, and\nso.", "rejected": "No"},
    {"prompt": "Größe 中 😀", "chosen": 'say "a"', "rejected": "\u2028x\x00"},
    {"prompt": "last", "chosen": "a", "rejected": "b"},
]
LINES = [json.dumps(row).encode() for row in ROWS]
JSONL = b"\n".join(LINES) + b"\n"
BOM = b"\xef\xbb\xbf"


def raw_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def csv_bytes(rows: list[dict[str, Any]], folder: Path) -> bytes:
    file = folder / "scratch"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    return file.read_bytes()


def write(folder: Path, name: str, data: bytes) -> FileSource:
    file = folder / name
    file.write_bytes(data)
    return FileSource(str(file))


def read(source: FileSource) -> list[tuple[str, dict[str, Any]]]:
    return list(source.rows())


def refusal(source: FileSource) -> str:
    with pytest.raises(UserError) as raised:
        read(source)
    return str(raised.value)


JSON_FILES = {
    "a.jsonl": JSONL,
    "A.JSONL": JSONL,
    "a.ndjson": JSONL,
    "a.b.jsonl": JSONL,
    "raw.jsonl": raw_lines(ROWS),
    "no-last-newline.jsonl": JSONL[:-1],
    "bom.jsonl": BOM + JSONL,
    "crlf.jsonl": JSONL.replace(b"\n", b"\r\n"),
    "lines.json": JSONL,
    "bom-lines.json": BOM + JSONL,
    "crlf-lines.json": b"\r\n" + JSONL.replace(b"\n", b"\r\n"),
    "a.jsonl.gz": gzip.compress(JSONL),
    "A.JSONL.GZ": gzip.compress(JSONL),
    "two-members.jsonl.gz": gzip.compress(LINES[0] + b"\n") + gzip.compress(b"\n".join(LINES[1:])),
    "lines.json.gz": gzip.compress(JSONL),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_of_json_lines_gives_its_rows_and_their_lines(name: str, tmp_path: Path) -> None:
    first = 2 if name == "crlf-lines.json" else 1
    expected = [(f"{name} line {first + i}", row) for i, row in enumerate(ROWS)]
    assert read(write(tmp_path, name, JSON_FILES[name])) == expected


LISTS = {
    "a.json": json.dumps(ROWS).encode(),
    "indented.json": b"\n  " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "bom.json": BOM + json.dumps(ROWS).encode(),
    "crlf.json": json.dumps(ROWS, indent=1).encode().replace(b"\n", b"\r\n"),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_json_list_gives_its_rows(name: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, name, LISTS[name])) == [(f"{name} row {i + 1}", row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", ["a.csv", "bom.csv", "crlf.csv", "unix.csv", "a.csv.gz"])
def test_a_csv_file_gives_its_rows(name: str, tmp_path: Path) -> None:
    rows = [{key: text.replace("\x00", "") for key, text in row.items()} for row in ROWS]
    data = csv_bytes(rows, tmp_path)  # the csv module ends lines with CRLF
    data = {"bom.csv": BOM + data, "unix.csv": data.replace(b"\r\n", b"\n"), "a.csv.gz": gzip.compress(data)}.get(
        name, data
    )
    assert read(write(tmp_path, name, data)) == [(f"{name} row {i + 1}", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "damaged",
    [
        pyarrow.array([2**62], pyarrow.int64()).cast(pyarrow.timestamp("us")),  # beyond Python's years, in no use here
        pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string()),
    ],
    ids=["time", "text"],
)
def test_a_parquet_cell_that_python_cannot_hold_is_told_in_a_line(tmp_path: Path, damaged: Any) -> None:
    table = pyarrow.table({"prompt": ["Q"], "chosen": ["a"], "rejected": ["b"], "more": damaged})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet row 1 or later: cannot be read"):
        read(FileSource(str(tmp_path / "a.parquet")))


def test_a_parquet_file_gives_its_rows_in_batches(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "chosen": "a", "rejected": "b"} for i in range(2500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    found = read(FileSource(str(tmp_path / "a.parquet")))
    assert [row for _, row in found] == rows
    assert [place for place, _ in found] == [f"a.parquet row {i}" for i in range(1, 2501)]


def test_rows_come_as_a_stream(tmp_path: Path) -> None:
    for name, data in {"a.jsonl": JSONL, "a.csv": csv_bytes(ROWS[:1], tmp_path)}.items():
        rows = write(tmp_path, name, data + b"\xff broken").rows()
        assert next(rows)[1] == ROWS[0], "the first row must not wait for the last"
        rows.close()  # type: ignore[attr-defined]


def test_empty_lines_count_but_give_no_row(tmp_path: Path) -> None:
    data = b"\n \t\r\n" + LINES[0] + b"\n\n" + LINES[1]
    assert [place for place, _ in read(write(tmp_path, "a.jsonl", data))] == ["a.jsonl line 3", "a.jsonl line 5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.csv", "a.jsonl.gz", "a.csv.gz"])
def test_an_empty_file_has_no_rows(name: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, name, b"")) == []
    assert read(write(tmp_path, name, gzip.compress(BOM) if name.endswith("gz") else BOM)) == []


def test_an_empty_list_has_no_rows_and_an_empty_json_file_is_not_json(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.json", b" [ ] ")) == []
    assert refusal(write(tmp_path, "a.json", b"")) == (
        "a.json: not JSON (Expecting value at column 1); mend or remove it"
    )


BROKEN = {
    "a broken line": (
        "a.jsonl", LINES[0] + b"\n" + b'{"prompt": oops}' + b"\n" + LINES[2],
        "a.jsonl line 2: not JSON (Expecting value at column 12); mend or remove it",
    ),
    "a broken line behind a BOM and CRLF": (
        "a.jsonl", BOM + LINES[0] + b"\r\n\r\n" + b"{]\r\n",
        "a.jsonl line 3: not JSON (Expecting property name enclosed in double quotes at column 2); mend or remove it",
    ),
    "a broken line in gz": (
        "a.jsonl.gz", gzip.compress(LINES[0] + b"\n{]"),
        "a.jsonl.gz line 2: not JSON (Expecting property name enclosed in double quotes at column 2)",
    ),
    "half a last line": (
        "a.jsonl", JSONL[:-10],
        "a.jsonl line 3: not JSON (Unterminated string starting at at column 35); mend or remove it",
    ),
    "half a last line in .json": (
        "a.json", JSONL[:-4],
        "a.json line 3: not JSON (Unterminated string starting at at column 47); mend or remove it",
    ),
    "two rows on a line": ("a.jsonl", LINES[2] * 2, "a.jsonl line 1: not JSON (Extra data at column 51)"),
    "half a list": ("a.json", b'[\n{"prompt": 1},\n', "a.json: not JSON (Expecting value at line 3 column 1)"),
    "Latin-1": (
        "a.jsonl", LINES[0] + b"\n" + '{"prompt": "Größe"}'.encode("latin-1"),
        "a.jsonl line 2: not UTF-8 (invalid start byte at byte 14); save it as UTF-8",
    ),
    "UTF-16": ("a.jsonl", JSONL.decode().encode("utf-16"), "a.jsonl line 1: not UTF-8 (invalid start byte at byte 0)"),
    "a list not UTF-8": ("a.json", b'["\xff"]', "a.json: not UTF-8 (invalid start byte at byte 2); save it as UTF-8"),
    "a number without end": ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "a.jsonl line 1: cannot be read (Exceeds"),
    "brackets without end": ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: cannot be read (maximum recursion"),
    "a row that is a list": ("a.jsonl", LINES[0] + b"\n[1]", "a.jsonl line 2: a row must be an object with keys"),
    "a row that is text": ("a.jsonl", b'"x"', "a.jsonl line 1: a row must be an object with keys, found str"),
    "a row that is null": ("a.json", b"[{}, null]", "a.json row 2: a row must be an object with keys, found NoneType"),
    "an object of several lines": ("a.json", b'\n{"data":\n[{"prompt": "a"}]}\n', "must hold a list of rows"),
    "broken first row": ("a.json", b'{"prompt": \n{"prompt": "b"}\n', "a.json line 1: not JSON"),
    "JSON that is no list": ("a.json", b"3", "a.json: must hold a list of rows, or one row a line"),
    "csv not UTF-8": (
        "a.csv", b"prompt,chosen,rejected\n" + b"q,a,b\n" * 50 + b"q,\xe4,b\n" + b"q,a,b\n" * 50,
        "a.csv line 52: not UTF-8 (invalid continuation byte at byte 2); save it as UTF-8",
    ),
    "csv with an open quote": (
        "a.csv", b'prompt,chosen,rejected\nq,a,b\nq,"a,b\nq,a,b\n',
        "a.csv line 4: unexpected end of data; mend the line",
    ),
    "csv with text behind a quote": (
        "a.csv", b'prompt,chosen,rejected\nq,a,b\nq,"a"x,b\nq,a,b\n',
        "a.csv line 3: ',' expected after '\"'; mend the line",
    ),
    "csv with a comma in bare text": (
        "a.csv", b"prompt,chosen,rejected\nq,a,b\nWhy, oh why?,a,b\n",
        "a.csv row 2: more fields than the 3 columns; quote texts that hold commas",
    ),
    "not gzip": ("a.jsonl.gz", JSONL, "a.jsonl.gz: not a whole gzip file (Not a gzipped file (b'{\"')); copy it again"),
    "half a gzip": (
        "a.jsonl.gz", gzip.compress(JSONL)[:-12],
        "a.jsonl.gz: not a whole gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "half a gzip of csv": (
        "a.csv.gz", gzip.compress(b"prompt,chosen,rejected\nq,a,b\n")[:-12],
        "a.csv.gz: not a whole gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "gzip with a wrong sum": ("a.jsonl.gz", gzip.compress(JSONL)[:-8] + b"\0" * 8, "not a whole gzip file (CRC check"),
    "gzip with a wrong block": (
        "a.jsonl.gz", gzip.compress(JSONL)[:10] + b"\xff" * 40,
        "a.jsonl.gz: not a whole gzip file (Error -3 while decompressing data",
    ),
    "not parquet": ("a.parquet", JSONL, "a.parquet: not a parquet file (Parquet magic bytes not found in footer."),
    "empty parquet": ("a.parquet", b"", "a.parquet: not a parquet file (Parquet file size is 0 bytes"),
    "unknown suffix": ("a.txt", JSONL, "unknown kind of file; give one of .jsonl, .ndjson, .json, .csv, .parquet"),
    "no suffix": ("a", JSONL, "unknown kind of file; give one of .jsonl"),
    "no suffix but .gz": ("a.gz", gzip.compress(JSONL), "unknown kind of file; give one of .jsonl"),
    "known suffix before an unknown": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "a.jsonl.zst: unknown kind of file; give"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_place_and_the_remedy(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    assert message in refusal(write(tmp_path, name, data))


def test_validation_rows_are_told_by_their_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = sources("shipped:fashion", str(tmp_path / "a.jsonl"), None, None, "train", None)
    assert given is not None

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"^data\.val_path={tmp_path}/a\.jsonl: may not be read \(Permission denied\)"):
        given.digest()


def test_rows_before_the_broken_one_are_given(tmp_path: Path) -> None:
    rows = write(tmp_path, "a.jsonl", JSONL + b"{").rows()
    assert [next(rows)[1] for _ in ROWS] == ROWS
    with pytest.raises(UserError, match=r"a.jsonl line 4"):
        next(rows)


def test_half_a_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    data = file.read_bytes()
    assert "a.parquet: not a parquet file" in refusal(write(tmp_path, "a.parquet", data[: len(data) // 2]))


def test_a_csv_row_that_is_cut_off_lacks_its_last_fields(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", b"prompt,chosen,rejected\nq,a")
    assert read(source) == [("a.csv row 1", {"prompt": "q", "chosen": "a", "rejected": None})]


def test_shipped_names_a_file_of_the_package() -> None:
    source = FileSource("shipped:fashion")
    assert source.name == "shipped:fashion"
    assert source.file == SHIPPED / "fashion.jsonl"
    place, row = next(source.rows())
    assert place == "shipped:fashion line 1"
    assert list(row) == ["prompt", "chosen", "rejected"]


def test_the_digest_is_that_of_the_bytes_and_the_kind_of_file_alone(tmp_path: Path) -> None:
    first, copy = write(tmp_path, "a.jsonl", b"{}"), write(tmp_path, "b.JSONL", b"{}")
    assert first.digest() == copy.digest() == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a.jsonl"
    others = {write(tmp_path, name, b"{}").digest() for name in ("a", "a.txt", "a.json", "a.csv", "a.jsonl.gz", "a.gz")}
    assert len(others) == 6 and copy.digest() not in others
    assert write(tmp_path, "a.jsonl", b"{ }").digest() != copy.digest()


def test_the_hub_gives_the_rows_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(repo: str, subset: str | None, split: str) -> Any:
        asked.append((repo, subset, split))
        return datasets.Dataset.from_list(ROWS if split == "train" else ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HubSource("who/what", "train", "small")
    assert list(source.rows()) == [(f"who/what/small (train) row {i + 1}", row) for i, row in enumerate(ROWS)]
    assert HubSource("who/what", "test").name == "who/what (test)"
    assert source.digest() == source.digest()
    assert source.digest() != HubSource("who/what", "test", "small").digest()
    assert set(asked) == {("who/what", "small", "train"), ("who/what", "small", "test")}


@pytest.mark.parametrize("error", [RuntimeError(), ConnectionError("no route\nlong story"), KeyError("x")])
def test_a_data_set_that_cannot_be_had_is_refused_with_the_remedy(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError) as raised:
        list(HubSource("who/what", "train").rows())
    text = str(raised.value)
    assert text.startswith(f"data.name=who/what: cannot be loaded ({type(error).__name__}: ")
    assert "long story" not in text
    assert "hf auth login" in text and "data=jsonl data.path=FILE" in text
