"""Rows of parquet files, a few at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from streamprune.errors import CalibrationError
from streamprune.text.rows import Row

#: Rows that are decoded at a time. Few, since one long text may stand for all of them in a small file.
BATCH_ROWS = 16
#: Bytes of text, and numbers of columns and row groups, that a file's description may claim.
_MOST_THRIFT_STRING, _MOST_THRIFT_ITEMS = 1 << 26, 1 << 20


def read_parquet(path: Path, rng: random.Random) -> Iterator[Row]:
    """The rows of a parquet file, its row groups in a random order. Raises CalibrationError, naming the file."""
    # Imported where it is needed: it takes a second and 50 MiB.
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            path,
            pre_buffer=False,
            thrift_string_size_limit=_MOST_THRIFT_STRING,
            thrift_container_size_limit=_MOST_THRIFT_ITEMS,
        ) as file:
            groups = list(range(file.num_row_groups))
            rng.shuffle(groups)
            for group in groups:
                number = 0
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                    nbytes = batch.nbytes // max(1, batch.num_rows)
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(f"{path} row {number} of row group {group + 1}", values, nbytes)
    except FileNotFoundError:
        raise CalibrationError(f"There is no calibration file {path}.") from None
    except Exception as error:
        # Damaged files fail as one of Arrow's errors, as an OSError, as a ValueError, or for lack of memory.
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise CalibrationError(f"{path} cannot be read as a parquet file: {reason}. Download it again.") from None
