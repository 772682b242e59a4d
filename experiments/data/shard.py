"""One file of fixed-size records: a table of headers, then the payloads, both by place.

A payload is written before its header, and both carry checksums, so a write that was cut short
costs its own record and no other. The table lies in one piece: to know what a file holds is to
read 48 bytes a record. Files are sparse: a place costs disk once it is written.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HEADER = np.dtype(
    [
        ("check", "<u4"),  # crc32 of the rest of the header; an unused header is all zeros
        ("crc", "<u4"),  # crc32 of the payload
        ("key", "<u8", (2,)),  # 128-bit hash of the user's id
        ("sequence", "<i8"),  # which put it came with, from 1
        ("generation", "<i8"),  # of the slow weights
        ("length", "<i8"),  # bytes of the payload
    ]
)
PAGE = 4096


class Shard:
    """`records` places of `length` bytes in the file `path`, made if it is not there."""

    def __init__(self, path: Path, records: int, length: int):
        self.path, self.records, self.length = path, records, length
        self._start = -(-records * HEADER.itemsize // PAGE) * PAGE  # payloads begin on a page
        self.size = self._start + records * length
        new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.found = self.size if new else os.fstat(self._file).st_size
        if new or self.found != self.size:
            os.ftruncate(self._file, self.size)
        self.headers = np.memmap(path, HEADER, "r", 0, (records,))
        self.payloads = np.memmap(path, np.uint8, "r", self._start, (records, length))
        self._dirty = new

    def write(self, places: np.ndarray, headers: np.ndarray, payloads: np.ndarray) -> None:
        """Records at ascending places (n,): all payloads, then all headers. OSError if it fails."""
        self._dirty = True
        for first, last in runs(places):
            self._pwrite(payloads[first:last], self._start + int(places[first]) * self.length)
        self._put_headers(places, headers)

    def clear(self, places: np.ndarray, payloads: bool = False) -> None:
        """Make these places unused; `payloads` also wipes what they held."""
        self._dirty = True
        self._put_headers(places, np.zeros(len(places), HEADER))
        for place in places.tolist() if payloads else ():
            self._pwrite(np.zeros(self.length, np.uint8), self._start + place * self.length)

    def end(self, places: np.ndarray) -> np.ndarray:
        """Where the payloads of these places end in the file."""
        return self._start + (places + 1) * self.length

    def sync(self) -> None:
        """What was written survives a power failure from here on."""
        if self._dirty:
            os.fsync(self._file)
            self._dirty = False

    def close(self) -> None:
        os.close(self._file)

    def _put_headers(self, places: np.ndarray, headers: np.ndarray) -> None:
        for first, last in runs(places):
            self._pwrite(headers[first:last], int(places[first]) * HEADER.itemsize)

    def _pwrite(self, array: np.ndarray, offset: int) -> None:
        rest = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
        while rest:
            done = os.pwrite(self._file, rest, offset)  # a full disk may take a part
            rest, offset = rest[done:], offset + done


def runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the stretches of ascending places that follow each other."""
    if len(places):
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True)


def checks(headers: np.ndarray) -> np.ndarray:
    """What `check` of each header must be."""
    raw, size = headers.tobytes(), HEADER.itemsize
    found = [zlib.crc32(raw[at + 4 : at + size]) for at in range(0, len(raw), size)]
    return np.array(found, np.uint32)


def crcs(payloads: np.ndarray) -> np.ndarray:
    """What `crc` of each payload (n, length) must be."""
    return np.array([zlib.crc32(row) for row in payloads], np.uint32)
