"""One column of a shard as a .npy file that grows by rows, and whose end can be taken back.

The file has its name once it is whole. The header of an .npy has room for a growing first axis, so
it is written twice and the rows once; memory holds only the block that is appended.
"""

from pathlib import Path

import numpy as np
from numpy.lib import format as npy


class Column:
    """Rows (n, ...) of one dtype and shape, `example`'s; `save` or `drop` ends it."""

    def __init__(self, path: Path, example: np.ndarray):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype, self.shape = path, example.dtype, example.shape[1:]
        self._temporary = path.with_name(f"{path.stem}.tmp.npy")
        self._file = self._temporary.open("w+b")
        self.rows = self.kept = 0  # written, and up to the end of the last whole episode
        self._header()
        self._start = self._file.tell()
        self._size = int(np.prod(self.shape)) * self.dtype.itemsize

    def append(self, rows: np.ndarray) -> None:
        """More rows. Raises ValueError where they are of another kind."""
        if (rows.dtype, rows.shape[1:]) != (self.dtype, self.shape):
            given, known = f"{rows.dtype} {rows.shape[1:]}", f"{self.dtype} {self.shape}"
            raise ValueError(f"rows of {self.path.stem} are {given}, those before are {known}")
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def keep(self) -> None:
        """What is written up to here stays."""
        self.kept = self.rows

    def back(self) -> None:
        """Forget what was not kept."""
        self.rows = self.kept
        self._file.truncate(self._start + self.rows * self._size)
        self._file.seek(0, 2)

    def save(self) -> None:
        """End the file and give it its name."""
        self._file.seek(0)
        self._header()
        self._file.close()
        self._temporary.replace(self.path)

    def drop(self) -> None:
        """Remove a file that was not ended."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _header(self) -> None:
        about = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False}
        npy.write_array_header_1_0(self._file, about | {"shape": (self.rows, *self.shape)})
