"""Reads, band-selects, crops and resamples GeoTIFF tiles into caller-owned float32 batches."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class TileError(Exception):
    """A file that cannot be read: names it, what is wrong, and the TIFF tag or byte offset.

    `index` is its sample's place in the batch, or None.
    """

    index: int | None

class TileInfo:
    """Layout of a TIFF file's first image."""

    height: int
    width: int
    bands: int
    dtype: str  # numpy name: "uint8" ... "float64"
    planar: str  # "interleaved" or "separate"
    compression: str  # "none", "packbits", "lzw", "deflate", "zstd"
    tiled: bool
    big_tiff: bool
    byte_order: str  # "little" or "big"
    nodata: float | None
    epsg: int | None

class Report:
    """What a filled batch met."""

    replaced: npt.NDArray[np.int64]  # [N]: samples that became the band's mean
    errors: list[tuple[int, str]]  # bad="report": (index in the batch, message), in order
    bytes_read: int  # bytes of pixel data read from files

class Ticket:
    """A batch under way; dropping it cancels what has not started and waits for what has."""

    def wait(self) -> Report: ...
    def done(self) -> bool: ...

class Reader:
    """A pool of threads that fills batches."""

    def __init__(self, threads: int = 0) -> None: ...
    @property
    def threads(self) -> int: ...
    def fill(
        self,
        out: object,  # float32 [N, C, H, W], C-contiguous: numpy array or CPU tensor
        paths: Sequence[str] | Sequence[Sequence[str]],
        bands: npt.ArrayLike,  # int [N, C]
        windows: npt.ArrayLike | None = None,  # float64 [N, 4]: top, left, height, width
        orient: npt.ArrayLike | None = None,  # uint8 [N]: 4 transpose, 2 flip y, 1 flip x
        mean: npt.ArrayLike | None = None,  # float32 [bands in file] or [N, C]
        std: npt.ArrayLike | None = None,
        bad: str = "raise",  # or "report"
    ) -> Report: ...
    def submit(
        self,
        out: object,
        paths: Sequence[str] | Sequence[Sequence[str]],
        bands: npt.ArrayLike,
        windows: npt.ArrayLike | None = None,
        orient: npt.ArrayLike | None = None,
        mean: npt.ArrayLike | None = None,
        std: npt.ArrayLike | None = None,
        bad: str = "raise",
    ) -> Ticket: ...

def info(path: str) -> TileInfo: ...
def read(
    path: str,
    bands: Sequence[int] | None = None,
    window: tuple[int, int, int, int] | None = None,  # top, left, height, width in pixels
) -> npt.NDArray[np.generic]: ...
def codecs() -> list[str]: ...
