"""Where rows come from: a file, a data set that ships with the package, or the hub.

Rows of files are read as a stream, so that memory does not grow with the file; a list in a .json is read whole.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import itertools
import json
import shlex
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dpo_lightning.types import UserError

SHIPPED = Path(__file__).parent / "shipped"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


class Source(Protocol):
    """A named, repeatable stream of rows."""

    @property
    def name(self) -> str:
        """Return what to call it in messages, in the summary and on the model card."""
        ...

    def digest(self) -> str:
        """Return a text that changes whenever the rows do."""
        ...

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each row with the place it stands at, for error messages."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A jsonl, json (a list of rows), csv or parquet file, each also as .gz but parquet; `key` is told in errors."""

    path: str
    key: str = "data.path"

    @property
    def name(self) -> str:
        """Return the file's name, or shipped:NAME as it was given."""
        return self.path if self.path.startswith("shipped:") else Path(self.path).name

    @property
    def file(self) -> Path:
        """Return where the file lies."""
        shipped = self.path.startswith("shipped:")
        return SHIPPED / f"{self.path.removeprefix('shipped:')}.jsonl" if shipped else Path(self.path)

    @property
    def kind(self) -> str:
        """Return the suffix that says how the file is read, with .gz where it is zipped."""
        name = self.file.name.lower()
        return Path(name.removesuffix(".gz")).suffix + (".gz" if name.endswith(".gz") else "")

    def digest(self) -> str:
        """Return the sha256 of the file's bytes, and its kind: what are rows in one may be none in another."""
        try:
            with self.file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() + self.kind
        except PermissionError as error:
            raise UserError(f"{self.key}={self.path}: may not be read ({error.strerror})") from None

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `("FILE line 3", row)`; a UserError names the first line that cannot be read."""
        zipped, kind = self.kind.endswith(".gz"), self.kind.removesuffix(".gz")
        if kind not in SUFFIXES:
            raise UserError(f"{self.key}={self.path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
        if kind == ".parquet":
            yield from self._parquet()
            return
        with cast(BinaryIO, gzip.open(self.file) if zipped else self.file.open("rb")) as stream:
            try:
                yield from {".csv": self._csv, ".json": self._json}.get(kind, self._jsonl)(stream)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise UserError(f"{self.name}: not a whole gzip file ({error}); copy it again") from None

    def _jsonl(self, stream: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(stream, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                place = f"{self.name} line {number}"
                yield place, self._object(place, self._parse(place, line))

    def _json(self, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
        if _has_rows_a_line(stream):  # whatever the file is called
            yield from self._jsonl(stream)
            return
        rows = self._parse(self.name, stream.read())
        if not isinstance(rows, list):
            raise UserError(f"{self.name}: must hold a list of rows, or one row a line")
        for number, row in enumerate(rows, 1):
            place = f"{self.name} row {number}"
            yield place, self._object(place, row)

    def _csv(self, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
        # Decoded a line at a time, so that an error knows its line; strict, so that an open quote eats no rows.
        csv.field_size_limit(sys.maxsize)  # long answers are no error
        reader = csv.DictReader((line.decode("utf-8-sig") for line in stream), strict=True)
        try:
            for number, row in enumerate(reader, 1):
                place = f"{self.name} row {number}"
                if None in row:
                    raise UserError(
                        f"{place}: more fields than the {len(row) - 1} columns; quote texts that hold commas"
                    )
                yield place, row
        except csv.Error as error:
            raise UserError(f"{self.name} line {reader.reader.line_num}: {error}; mend the line") from None
        except UnicodeDecodeError as error:
            place = f"{self.name} line {reader.reader.line_num + 1}"  # the line that was to be read
            raise UserError(f"{place}: {_not_utf8(error)}") from None

    def _parquet(self) -> Iterator[tuple[str, dict[str, Any]]]:
        import pyarrow
        from pyarrow import parquet

        numbers = itertools.count(1)
        try:
            batches = parquet.ParquetFile(self.file).iter_batches(batch_size=1000)
            for batch in batches:
                yield from ((f"{self.name} row {next(numbers)}", row) for row in batch.to_pylist())
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{self.name}: not a parquet file ({str(error).splitlines()[0]})") from None
        except (UnicodeDecodeError, OverflowError) as error:  # a text that is none, a time beyond Python's
            raise UserError(f"{self.name} row {next(numbers)} or later: cannot be read ({error})") from None

    def _parse(self, place: str, text: bytes) -> Any:
        try:
            return json.loads(text.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: {_not_utf8(error)}") from None
        except json.JSONDecodeError as error:
            where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
            raise UserError(f"{place}: not JSON ({error.msg} at {where}); mend or remove it") from None
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets 1000 deep
            raise UserError(f"{place}: cannot be read ({error}); mend or remove it") from None

    @staticmethod
    def _object(place: str, row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row must be an object with keys, found {type(row).__name__}")
        return row


def _has_rows_a_line(stream: BinaryIO) -> bool:
    """Return whether a file opens with an object, and is not one over several lines; it is to be read anew."""
    start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    stream.seek(0)
    if not start.startswith(b"{"):
        return False
    line = stream.readline()
    several = not _is_json(line) and _is_json(line + stream.read())
    stream.seek(0)
    return not several


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the hub, or in its local cache."""

    repo: str
    split: str
    subset: str | None = None

    @property
    def name(self) -> str:
        """Return repository, subset and split."""
        return f"{self.repo}{f'/{self.subset}' if self.subset else ''} ({self.split})"

    def digest(self) -> str:
        """Return the fingerprint that `datasets` keeps for the loaded split."""
        return f"{self.repo}/{self.subset}/{self.split}/{_from_hub(self.repo, self.subset, self.split)._fingerprint}"

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the split's rows in order."""
        for number, row in enumerate(_from_hub(self.repo, self.subset, self.split), 1):
            yield f"{self.name} row {number}", row


@functools.cache
def _from_hub(repo: str, subset: str | None, split: str) -> Any:
    from datasets import config, load_dataset

    try:
        return load_dataset(repo, subset, split=split)
    except Exception as error:  # the hub raises a dozen kinds; all mean that the data cannot be had
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        keys = {"data.name": repo, "data.subset": subset, "data.split": split}
        words = ["data=hub", *(f"{key}={value}" for key, value in keys.items() if value is not None)]
        remedy = (
            # `hf download` would not do: `datasets` looks for the tables that it has made itself
            "it is not in the local cache: where there is a network, "
            f"`{shlex.join(['python', '-m', 'dpo_lightning', 'check', 'model=tiny', *words])}`"
            if config.HF_HUB_OFFLINE
            else "check the name, subset and split, log in with `hf auth login` if it is gated, "
            "or download it where there is a network and give data=jsonl data.path=FILE"
        )
        raise UserError(f"data.name={repo}: cannot be loaded ({why}); {remedy}") from None
