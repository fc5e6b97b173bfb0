"""Reads, band-selects, crops and resamples GeoTIFF tiles into caller-owned float32 batches."""

import os
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

_Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_Paths: TypeAlias = Sequence[_Path] | Sequence[Sequence[_Path]]

class TileError(Exception):
    """A file that cannot be read: names it, what is wrong, and the TIFF tag or byte offset.

    `index` is its sample's place in the batch, or None.
    """

    index: int | None

class TileInfo:
    """Layout of a TIFF file's first image."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def bands(self) -> int: ...
    @property
    def dtype(self) -> str: ...  # numpy name: "uint8" ... "float64"
    @property
    def planar(self) -> Literal["interleaved", "separate"]: ...
    @property
    def compression(self) -> Literal["none", "packbits", "lzw", "deflate", "zstd"]: ...
    @property
    def tiled(self) -> bool: ...
    @property
    def big_tiff(self) -> bool: ...
    @property
    def byte_order(self) -> Literal["little", "big"]: ...
    @property
    def nodata(self) -> int | float | None: ...  # as the samples are
    @property
    def epsg(self) -> int | None: ...

class Report:
    """What a filled batch met."""

    @property
    def replaced(self) -> npt.NDArray[np.int64]: ...  # [N]: samples that became the band's mean
    @property
    def errors(self) -> list[tuple[int, str]]: ...  # bad="report": (index, message), in order
    @property
    def bytes_read(self) -> int: ...  # bytes of pixel data read from files

class Ticket:
    """A batch under way; dropping it cancels what has not started and waits for what has."""

    def wait(self) -> Report: ...

class Reader:
    """A pool of threads that fills batches."""

    def __init__(self, threads: int = 0) -> None: ...
    def fill(
        self,
        out: object,  # float32 [N, C, H, W], C-contiguous: numpy array or CPU tensor
        paths: _Paths,
        bands: npt.ArrayLike,  # int [N, C]
        windows: npt.ArrayLike | None = None,  # float64 [N, 4]: top, left, height, width
        orient: npt.ArrayLike | None = None,  # uint8 [N]: 4 transpose, 2 flip y, 1 flip x
        mean: npt.ArrayLike | None = None,  # float32 [bands in file] or [N, C]
        std: npt.ArrayLike | None = None,
        bad: Literal["raise", "report"] = "raise",
        bands_in_file: npt.ArrayLike | None = None,  # int: one number, or one for each path
        nodata: float | None = None,  # of files without such a tag
    ) -> Report: ...
    def submit(
        self,
        out: object,
        paths: _Paths,
        bands: npt.ArrayLike,
        windows: npt.ArrayLike | None = None,
        orient: npt.ArrayLike | None = None,
        mean: npt.ArrayLike | None = None,
        std: npt.ArrayLike | None = None,
        bad: Literal["raise", "report"] = "raise",
        bands_in_file: npt.ArrayLike | None = None,  # int: one number, or one for each path
        nodata: float | None = None,  # of files without such a tag
    ) -> Ticket: ...

def info(
    path: _Path,
    nodata: float | None = None,  # of files without such a tag
) -> TileInfo: ...
def read(
    path: _Path,
    bands: Sequence[int] | None = None,
    window: tuple[int, int, int, int] | None = None,  # top, left, height, width in pixels
) -> npt.NDArray[np.generic]: ...
def codecs() -> list[str]: ...
