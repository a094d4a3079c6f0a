"""Fixed-size records that several processes write at once, and that damage or a kill cannot make wrong."""

import errno
import fcntl
import multiprocessing
import os
import time

import numpy as np
import pytest

from dpo_lightning.data.reference_store import RECORD, ReferenceStore


def keys(*numbers):
    return np.array([n.to_bytes(16, "big") for n in numbers], "S16")


def some(count, start=0):
    return keys(*range(start, start + count)), np.arange(start, start + 2 * count, dtype=np.float32).reshape(-1, 2)


@pytest.fixture
def store(tmp_path):
    return ReferenceStore(tmp_path / "folder" / "store")


def test_what_was_appended_is_found_and_nothing_else(store):
    assert np.isnan(store.find(keys(1, 2))).all()
    store.append(keys(256, 1), np.array([[1, 2], [3, 4]], np.float32))  # a key that ends in zero bytes
    store.append(keys(7), np.array([[5, 6]], np.float32))
    found = store.find(keys(7, 2, 1, 256, 7))
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array([[5, 6], [np.nan] * 2, [3, 4], [1, 2], [5, 6]]), equal_nan=True)
    assert store.find(keys()).shape == (0, 2)


def test_a_record_is_as_large_as_it_says(store):
    store.append(*some(1000))
    assert store.file.stat().st_size == 1000 * RECORD.itemsize == 28_000


@pytest.mark.parametrize("why", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_keeps_records_too(store, monkeypatch, why):
    def none(*args):
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(fcntl, "flock", none)
    store.append(*some(3))
    store.append(*some(3, start=3))
    assert not np.isnan(store.find(some(6)[0])).any()


def test_a_lock_that_fails_otherwise_is_an_error(store, monkeypatch):
    def fails(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output error"):
        store.append(*some(3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_number_no_record(store, value):
    with pytest.raises(ValueError, match="not finite"):
        store.append(keys(1), np.array([[1, value]], np.float32))
    assert not store.file.exists()


def test_a_writer_killed_within_a_record_costs_that_record_alone(store):
    store.append(*some(3))
    os.truncate(store.file, 3 * RECORD.itemsize - 5)
    assert np.isnan(store.find(some(3)[0])[:, 0]).tolist() == [False, False, True]
    store.append(*some(2, start=2))
    assert not np.isnan(store.find(some(4)[0])).any()


@pytest.mark.parametrize("left", [0, 20])
def test_a_writer_killed_within_its_first_record_leaves_an_empty_store(store, left):
    store.append(*some(1))
    os.truncate(store.file, left)
    assert np.isnan(store.find(some(2)[0])).all()
    store.append(*some(2))
    assert np.array_equal(store.find(some(2)[0]), some(2)[1])


@pytest.mark.parametrize("byte", range(RECORD.itemsize))
def test_a_changed_byte_makes_a_record_unknown_never_wrong(store, byte):
    store.append(*some(3))
    with store.file.open("r+b") as file:
        file.seek(RECORD.itemsize + byte)
        old = file.read(1)[0]
        file.seek(RECORD.itemsize + byte)
        file.write(bytes([old ^ 0x10]))
    wanted = some(3)[0]
    found = store.find(wanted)
    assert np.isnan(found[:, 0]).tolist() == [False, True, False]
    assert np.array_equal(found[[0, 2]], some(3)[1][[0, 2]])


def _write(file, start, both):
    """Append, with time between finding the end and writing there, in which only a lock keeps the other out."""
    fstat = os.fstat
    os.fstat = lambda descriptor: (fstat(descriptor), time.sleep(0.001))[0]
    both.wait()
    for i in range(200):
        ReferenceStore(file).append(*some(3, start + 3 * i))


def test_processes_that_write_at_once_lose_nothing(store):
    spawn = multiprocessing.get_context("spawn")
    both = spawn.Barrier(2)
    writers = [spawn.Process(target=_write, args=(store.file, start, both)) for start in (0, 300)]  # half of it twice
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert store.file.stat().st_size == 2 * 600 * RECORD.itemsize
    numbers = np.arange(900)
    first = numbers - numbers % 3  # of the three records that were appended together
    assert np.array_equal(store.find(keys(*range(900)))[:, 0], first + 2 * (numbers - first))
