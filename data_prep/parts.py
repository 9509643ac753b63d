"""Documents of a stage <-> a part: lz4 parquet with the columns `text` and `row`, its place in what was read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.batches import BATCH_BYTES
from moe.recipe import Section

_SCHEMA = pa.schema([("text", pa.large_string()), ("row", pa.int64())])


class PartFacts(Section):
    """A part's file name and what is in it."""

    name: str
    documents: int
    bytes: int


@dataclass
class PartWriter:
    """Writes `00000.parquet`, `00001.parquet`, ... into `folder`; a new one begins after `part_bytes` of text."""

    folder: Path
    part_bytes: int
    parts: list[PartFacts] = field(default_factory=list)
    _texts: list[bytes] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)
    _waiting: int = 0
    _documents: int = 0
    _bytes: int = 0
    _sink: Any = None
    _file: Any = None

    def add(self, text: bytes, row: int) -> None:
        """Append a document of UTF-8."""
        self._texts.append(text)
        self._rows.append(row)
        self._waiting += len(text)
        if self._waiting >= BATCH_BYTES:
            self._flush()
        if self._bytes >= self.part_bytes:
            self._finish()

    def close(self) -> list[PartFacts]:
        """All parts, the last one finished."""
        self._flush()
        self._finish()
        return self.parts

    def abandon(self) -> None:
        """Let go of the open file, which holds its room on the disk as long as it is."""
        if self._file is not None:
            self._file.is_open = False  # or it would write its end
            self._sink.close()
            self._file = None

    def _flush(self) -> None:
        if not self._texts:
            return
        if self._file is None:
            path = self.folder / f"{len(self.parts):05d}.parquet"
            self._sink = pa.OSFile(str(path), "wb")
            self._file = pq.ParquetWriter(
                self._sink,
                _SCHEMA,
                compression="lz4",
                use_dictionary=False,
                write_statistics=False,
            )
        # From buffers, since pa.array of a list imports pandas first, and the texts are known to be UTF-8.
        ends_D = np.cumsum([0, *map(len, self._texts)], dtype=np.int64)
        buffers = [None, pa.py_buffer(ends_D), pa.py_buffer(b"".join(self._texts))]
        texts = pa.Array.from_buffers(pa.large_string(), len(self._texts), buffers)
        rows = pa.Array.from_buffers(
            pa.int64(), len(self._rows), [None, pa.py_buffer(np.array(self._rows, dtype=np.int64))]
        )
        self._file.write_batch(pa.record_batch([texts, rows], schema=_SCHEMA))
        self._documents += len(self._texts)
        self._bytes += self._waiting
        self._texts, self._rows, self._waiting = [], [], 0

    def _finish(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._sink.close()
        self.parts.append(
            PartFacts(name=f"{len(self.parts):05d}.parquet", documents=self._documents, bytes=self._bytes)
        )
        self._file, self._documents, self._bytes = None, 0, 0


def texts(path: Path) -> Iterator[list[bytes]]:
    """The documents of a part as UTF-8, a megabyte at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["text"], use_threads=False)
            column = pa.concat_arrays(table.column(0).chunks)
            assert column.offset == 0
            _, ends, letters = column.buffers()
            ends_D = np.frombuffer(ends, dtype=np.int64)[: len(column) + 1].tolist()
            whole = memoryview(letters if letters is not None else b"")
            yield [bytes(whole[start:end]) for start, end in pairwise(ends_D)]


def kept(path: Path, verdicts_D: npt.NDArray[np.uint8] | None) -> Iterator[list[bytes]]:
    """Those whose verdict is 0; all of them without verdicts."""
    at = 0
    for batch in texts(path):
        if verdicts_D is None:
            yield batch
        else:
            verdicts_B = verdicts_D[at : at + len(batch)].tolist()
            yield [text for text, verdict in zip(batch, verdicts_B, strict=True) if not verdict]
        at += len(batch)
