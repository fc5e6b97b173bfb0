"""Files by name: tables of them, as people write and edit them, and what tells archives apart."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bandcrop._core import TileError


def read_table(path: str | Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a UTF-8 CSV file by its header, in lower case, with their line number as "line".

    Raises OSError where the file cannot be read; TileError, with file and line, where it is no such
    table, lacks one of `columns` or has no row. Empty lines are left out.
    """
    header: list[str] = []
    rows: list[dict[str, Any]] = []
    try:
        for number, coded in enumerate((Path(path).read_bytes() + b"\n").splitlines(), 1):
            line = coded.decode("utf-8-sig")
            # each line alone, so that a stray quote ends, and is found, on its own
            values = next(csv.reader([line], strict=True, skipinitialspace=True), [])
            if not header:
                header = [name.strip().lower() for name in values]
                if any(header.count(column) != 1 for column in {*columns, *header} - {""}):
                    raise ValueError(f"{line[:80]!r} lacks one of the columns {','.join(columns)}, "
                                     "has one twice, or no commas")  # fmt: skip
            elif values and len(values) != len(header):
                raise ValueError(f"{len(values)} values under {len(header)} columns")
            elif values:
                rows.append(dict(zip(header, values, strict=True)) | {"line": number})
        if not rows:
            raise ValueError("no row under the header")
    except ValueError as error:  # also of what is no UTF-8
        raise TileError(f"{path}: line {number}: {error}") from None
    except csv.Error as error:
        raise TileError(f"{path}: line {number}: {error} (a stray quotation mark?)") from None
    return rows


def digest(paths: Iterable[str]) -> str:
    """sha256 over real paths, sizes and times of change: other files, or other pixels, differ.

    Raises OSError where a file is not there; TileError where one comes twice, by any of its paths.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for path in paths:
        stat, real = os.stat(path), os.path.realpath(path)
        if real in found:
            raise TileError(f"{path} comes twice: trained and tested on, it would prove nothing")
        found[real] = real, stat.st_size, stat.st_mtime_ns
    return hashlib.sha256(json.dumps([*found.values()]).encode()).hexdigest()
