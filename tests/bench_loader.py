"""Measure bandcrop beside other readers, on tiles that this writes itself and removes afterwards.

    python tests/bench_loader.py                  # about 3 minutes; what `make bench` runs
    python tests/bench_loader.py --quick          # under 30 s: fewer rounds, wide intervals
    python tests/bench_loader.py --json FILE      # every figure, round by round

Each round runs every method once, in shuffled order, on files of its own: a pool larger than the
L3 cache is walked as a ring, so no method reads what another has just pulled in. Ratios are taken
round by round; tables show their median and a 95 % bootstrap interval over the rounds. A peer's
pixels are checked before it is timed.

The limit is a C function compiled at run time: open, pread of a 4 KB header, one pread of the exact
rows or strips into a reused buffer, close and, for compressed files, the codec library alone on
those strips. It makes no float, undoes no predictor and parses nothing. "With floats": the same
function, told where the window lies, also writes its floats to where bandcrop writes them.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

os.environ |= {"VIPS_CONCURRENCY": "1", "OMP_NUM_THREADS": "1"}  # one thread each; read at import

import bandcrop
import numpy as np
import torch
import torch.nn.functional as F
from bench_report import hardware, median, show, table, verdict
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from synthetic import MATERIALS, smooth_noise, write_tiff
from torch import Tensor


def optional(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


PEERS = ["rasterio", "imagecodecs", "tifffile", "pyvips", "osgeo.gdal"]
rasterio, imagecodecs, tifffile, pyvips, gdal = MODULES = [optional(name) for name in PEERS]

# --------------------------------------------------------------------------------------------------
# Settings

BATCH = 32  # samples a fill
VIEW = 224  # pixels, side of a view
POOL = {"s2": 128, "s1": 256, "lc": 128, "eurosat": 640}  # files: together more than a 32 MB L3
BASES = 8  # different tiles in a pool; the other files are copies
SECONDS = {"read": 6, "resize": 5, "pairs": 20, "workers": 14, "cold": 7}  # a row; --quick: less
STATS = {"s2": (1600.0, 900.0), "s1": (-15.0, 5.0)}  # mean, std of the views: any will do
TUNED = {  # GDAL for many small local files
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GTIFF_DIRECT_IO": "YES",  # uncompressed files: past the block cache
}
GEO = [  # EPSG:32632, 10 m pixels: tags that Sentinel tiles have and that GDAL reads
    (33550, 12, 3, (10.0, 10.0, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 500000.0, 5500000.0, 0.0), True),
    (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632), True),
]


class Layout(NamedTuple):
    """How a pool's files are written, and what is aimed at in reading a crop of one band."""

    name: str
    sensor: str
    codec: str  # "none", "deflate", "lzw", "zstd"
    planar: str  # "interleaved", "separate"
    predictor: int
    rows: int  # a strip; 0: tiles of 256 x 256
    limit: float  # aim: at most this many times the limit
    faster: float  # aim: at least this many times as fast as the best library


LAYOUTS = [  # strips as GDAL makes them: about 8 KB before compression
    Layout("S2 interleaved", "s2", "none", "interleaved", 1, 1, 1.15, 2),
    Layout("S1 interleaved", "s1", "none", "interleaved", 1, 4, 1.25, 2),
    Layout("S2 band-sequential", "s2", "none", "separate", 1, 16, 1.4, 2),
    Layout("S1 band-sequential", "s1", "none", "separate", 1, 8, 1.3, 2),
    Layout("EuroSAT 64 x 64", "eurosat", "none", "interleaved", 1, 4, 1.15, 3.3),
    Layout("S2 DEFLATE interleaved, predictor 2", "s2", "deflate", "interleaved", 2, 1, 1.05, 1.2),
    Layout("S1 DEFLATE interleaved, predictor 3", "s1", "deflate", "interleaved", 3, 4, 1.15, 1),
    Layout("S2 LZW interleaved, predictor 2", "s2", "lzw", "interleaved", 2, 1, 1.05, 1.2),
    Layout("S1 LZW interleaved, predictor 3", "s1", "lzw", "interleaved", 3, 4, 1.05, 1),
    Layout("S2 ZSTD tiled 256, predictor 2", "s2", "zstd", "interleaved", 2, 0, 1.05, 1),
    Layout("S1 ZSTD tiled 256, predictor 3", "s1", "zstd", "interleaved", 3, 0, 1.4, 3.5),
    Layout("S2 DEFLATE band-sequential", "s2", "deflate", "separate", 1, 16, 1.05, 1.2),
    Layout("S1 DEFLATE band-sequential", "s1", "deflate", "separate", 1, 8, 1.05, 1),
]
S2, S1, S2_SEPARATE = LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]
LC = Layout("lc", "lc", "none", "interleaved", 1, 4, 0, 0)  # read by torchgeo's way only


class Bench(NamedTuple):
    """What every section needs."""

    folder: Path
    rng: np.random.Generator
    functions: ctypes.CDLL | None  # compiled C; None: no compiler
    codecs: list[str]  # that the limit measures
    readers: list[str]  # installed
    share: float  # of each row's seconds and of each pool's files
    least: int  # rounds a row, crops a round


# --------------------------------------------------------------------------------------------------
# Tiles


class Pool(NamedTuple):
    """Files of one layout, walked as a ring."""

    layout: Layout
    paths: list[str]
    tiles: list[NDArray]  # file i holds tiles[i % BASES], [bands, h, w]
    offsets: NDArray[np.int64]  # [BASES, strips]
    counts: NDArray[np.int64]  # [BASES, strips], bytes
    place: list[int]  # one number: the next file

    def take(self, number: int) -> list[int]:
        start = self.place[0]
        self.place[0] += number
        return [i % len(self.paths) for i in range(start, start + number)]


def draw_tile(rng: np.random.Generator, sensor: str) -> NDArray:
    """[bands, h, w]: a smooth scene with noise.

    Real SEN12MS tiles shrink by 1.6 (S2) and 1.3 (S1) and take libzstd 2 and 0.3 ms; so do these.
    """
    size = 64 if sensor == "eurosat" else 256
    octaves = ((1.0, 90), (0.6, 24), (0.2, 7))
    share = sum(weight * smooth_noise(rng, size, wave, 1) for weight, wave in octaves)
    share = (1 / (1 + np.exp(-share))).astype(np.float32)
    if sensor == "lc":
        return np.broadcast_to((17 * share).astype(np.uint16), (4, size, size))
    names = ("shade", "roof") if sensor == "s1" else ("shade", "straw")
    dark, bright = np.array([MATERIALS[name] for name in names], np.float32)[..., None, None]
    level = dark + (bright - dark) * share  # [15, h, w]
    if sensor == "s1":  # speckle of 4 looks, correlated as resampling to 10 m leaves it
        speckle = gaussian_filter(rng.standard_gamma(4, (2, size, size)) / 4, (0, 0.6, 0.6))
        return (level[13:] + 10 * np.log10(speckle)).astype(np.float32)  # dB
    noise = 1 + 0.004 * rng.standard_normal((13, size, size), np.float32)
    return np.rint(level[:13] * noise).astype(np.uint16)


def write_tile(path: Path, tile: NDArray, layout: Layout) -> tuple[NDArray, NDArray]:
    """Write [bands, h, w]; returns the strips' (or tiles') offsets and byte counts."""
    separate = layout.planar == "separate"
    if layout.codec == "none":
        write_tiff(path, tile, layout.rows, layout.planar, epsg=32632)
        planes = len(tile) if separate else 1
        strip = tile.nbytes // planes // tile.shape[1] * layout.rows
        counts = np.full(tile.nbytes // strip, strip)
        return path.stat().st_size - tile.nbytes + np.cumsum(counts) - strip, counts
    tifffile.imwrite(
        path,
        tile if separate else tile.transpose(1, 2, 0),
        planarconfig="separate" if separate else "contig",
        photometric="minisblack",
        compression=layout.codec,
        predictor=layout.predictor if layout.predictor > 1 else None,
        metadata=None,
        extratags=GEO,
        **({"rowsperstrip": layout.rows} if layout.rows else {"tile": (256, 256)}),
    )
    with tifffile.TiffFile(path) as file:
        return np.array(file.pages[0].dataoffsets), np.array(file.pages[0].databytecounts)


@contextlib.contextmanager
def pool_of(bench: Bench, layout: Layout) -> Iterator[Pool]:
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        base = Path(folder, "base.tif")
        tiles = [draw_tile(bench.rng, layout.sensor) for _ in range(BASES)]
        strips, contents = [], []
        for tile in tiles:
            strips.append(write_tile(base, tile, layout))
            contents.append(base.read_bytes())
        number = max(2 * BATCH, int(bench.share * POOL[layout.sensor]))
        paths = [f"{folder}/{i:04d}.tif" for i in range(number)]
        for i, path in enumerate(paths):
            Path(path).write_bytes(contents[i % BASES])
        offsets, counts = (np.array(values, np.int64) for values in zip(*strips, strict=True))
        yield Pool(layout, paths, tiles, offsets, counts, [0])


class Draw(NamedTuple):
    """Crops to read: a file, a band and a window in whole pixels for each sample."""

    pool: Pool
    files: list[int]
    bands: NDArray[np.int64]  # [N]
    boxes: NDArray[np.int64]  # [N, 4]: top, left, height, width

    @property
    def paths(self) -> list[str]:
        return [self.pool.paths[i] for i in self.files]

    def truth(self, i: int) -> NDArray[np.float32]:
        t, x, h, w = self.boxes[i]
        tile = self.pool.tiles[self.files[i] % BASES]
        return tile[self.bands[i], t : t + h, x : x + w].astype(np.float32)


def random_size(u: float, v: float, side: int) -> tuple[int, int]:
    """BYOL's resized crop: area 0.08 to 1, ratio 3/4 to 4/3 (u, v uniform), in whole pixels."""
    area, aspect = (0.08 + 0.92 * u) * side * side, (3 / 4) ** (1 - 2 * v)
    return min(side, round((area / aspect) ** 0.5)), min(side, round((area * aspect) ** 0.5))


def round_size(number: int, side: int) -> tuple[int, int]:
    """The one window size of a round: a sequence that covers areas and ratios evenly."""
    return random_size((number * 0.618034) % 1, (number * 0.754878) % 1, side)


def draw_crops(
    pool: Pool, rng: np.random.Generator, number: int, size: tuple[int, int] | None = None
) -> Draw:
    """size: height and width of every window; None: each sample draws its own."""
    bands, side, _ = pool.tiles[0].shape
    sizes = np.array([size or random_size(*rng.random(2), side) for _ in range(number)])
    boxes = np.hstack([rng.integers(0, side - sizes + 1), sizes])
    return Draw(pool, pool.take(number), rng.integers(0, bands, number), boxes)


# --------------------------------------------------------------------------------------------------
# The limit

LIMIT = r"""
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef DEFLATE
#include <libdeflate.h>
#endif
#ifdef ZSTD
#include <zstd.h>
#endif
// codec 0: read only; 1: zlib streams; 2: zstd frames. File i: strips[i] neighbouring strips of at
// most `unit` decoded bytes each. Returns how many files were read.
// With `made` it also writes the window's floats there; window: bytes from row to row, bytes of a
// sample, samples from one to the next; then of each file bytes to the first, rows, columns.
long limit(const char **paths, long n, int codec, const int64_t *strips, const int64_t *offsets,
           const int64_t *counts, char *in, char *out, int64_t unit, const int64_t *window,
           float *made) {
  static char header[4096];
#ifdef DEFLATE
  static struct libdeflate_decompressor *inflate;
  if (!inflate) inflate = libdeflate_alloc_decompressor();
#endif
#ifdef ZSTD
  static ZSTD_DCtx *context;
  if (!context) context = ZSTD_createDCtx();
#endif
  long good = 0;
  for (long i = 0; i < n; offsets += strips[i], counts += strips[i], i++) {
    int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    int64_t bytes = offsets[strips[i] - 1] + counts[strips[i] - 1] - offsets[0];
    int ok = pread(fd, header, 4096, 0) > 0 && pread(fd, in, bytes, offsets[0]) == bytes;
    close(fd);
    for (long j = 0; ok && codec && j < strips[i]; j++) {
      const char *strip = in + (offsets[j] - offsets[0]);
      ok = 0;
#ifdef DEFLATE
      size_t got;
      if (codec == 1) ok = !libdeflate_zlib_decompress(inflate, strip, counts[j], out, unit, &got);
#endif
#ifdef ZSTD
      if (codec == 2) ok = !ZSTD_isError(ZSTD_decompressDCtx(context, out, unit, strip, counts[j]));
#endif
    }
    if (made) {
      const int64_t *at = window + 3 + 3 * i, stride = window[2];
#define FLOATS(TYPE, STRIDE)                                                       \
  for (int64_t r = 0; r < at[1]; r++, made += at[2]) {                             \
    const TYPE *row = (const TYPE *)(in + at[0] + r * window[0]);                  \
    for (int64_t c = 0; c < at[2]; c++) made[c] = (float)row[c * (STRIDE)];        \
  }
      if (window[1] == 2 && stride == 1) FLOATS(uint16_t, 1)
      else if (window[1] == 2) FLOATS(uint16_t, stride)
      else if (stride == 1) FLOATS(float, 1)
      else FLOATS(float, 2)
    }
    good += ok;
  }
  return good;
}
// Share of a file's pages in the page cache; 1 where that cannot be told.
double resident(const char *path) {
  static unsigned char pages[1 << 16];
  struct stat st;
  int fd = open(path, O_RDONLY);
  if (fd < 0 || fstat(fd, &st) || st.st_size > (int64_t)sizeof pages * 4096) return 1;
  void *at = mmap(0, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
  close(fd);
  if (at == MAP_FAILED) return 1;
  long number = (st.st_size + 4095) / 4096, in = 0;
  int failed = mincore(at, st.st_size, pages);
  munmap(at, st.st_size);
  for (long i = 0; i < number; i++) in += pages[i] & 1;
  return failed ? 1 : (double)in / number;
}
"""
READ, DECODED = np.ones((2, 1 << 22), np.uint8)  # reused; ones: pages that are there


def compile_limit(folder: Path) -> tuple[ctypes.CDLL | None, list[str]]:
    """The C functions, and the codecs that they measure with this machine's libraries."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        return None, []
    source, library = folder / "limit.c", folder / "limit.so"
    source.write_text(LIMIT)
    base = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
    codecs, flags = ["none"], []
    for codec, more in (("deflate", ["-DDEFLATE", "-ldeflate"]), ("zstd", ["-DZSTD", "-lzstd"])):
        if subprocess.run([*base, *flags, *more], capture_output=True).returncode == 0:
            codecs.append(codec)
            flags += more
    if subprocess.run([*base, *flags], capture_output=True).returncode:
        return None, []
    functions = ctypes.CDLL(str(library))
    functions.resident.restype = ctypes.c_double
    return functions, [*codecs, *(["lzw"] if imagecodecs else [])]


def prepare_limit(
    functions: ctypes.CDLL, draw: Draw, out: NDArray | None = None
) -> Callable[[], None]:
    """A call that reads, and decodes, what `draw` needs and no more; or fills out [N, 1, h, w]."""
    pool, layout = draw.pool, draw.pool.layout
    bands, height, width = pool.tiles[0].shape
    separate = layout.planar == "separate"
    row = width * pool.tiles[0].itemsize * (1 if separate else bands)  # bytes
    strip_rows = layout.rows or height
    offsets, counts = [], []  # of each sample's strips; uncompressed: of its rows, one piece
    for file, band, (top, _, rows, _) in zip(draw.files, draw.bands, draw.boxes, strict=True):
        plane = band * pool.offsets.shape[1] // bands if separate else 0
        if layout.codec == "none":
            offsets.append(pool.offsets[file % BASES, [plane]] + top * row)
            counts.append(np.array([rows * row]))
        else:
            last = (top + rows - 1) // strip_rows
            strips = slice(plane + top // strip_rows, plane + last + 1)
            offsets.append(pool.offsets[file % BASES, strips])
            counts.append(pool.counts[file % BASES, strips])
    paths = [os.fsencode(path) for path in draw.paths]
    stride = 1 if separate else bands
    window = np.zeros((1 + len(paths), 3), np.int64)
    window[0] = row, row // width // stride, stride
    window[1:, 0] = (draw.boxes[:, 1] * stride + draw.bands * (not separate)) * window[0, 1]
    window[1:, 1:] = draw.boxes[:, 2:]
    made = None if out is None else ctypes.c_void_p(out.ctypes.data)
    everything = list(range(len(paths)))
    codec = {"deflate": 1, "zstd": 2}.get(layout.codec, 0)
    calls = []  # one; for LZW, which C does not decode, one a file
    for group in [[i] for i in everything] if layout.codec == "lzw" else [everything]:
        lengths = np.array([len(offsets[i]) for i in group])
        at = np.concatenate([offsets[i] for i in group])
        sizes = np.concatenate([counts[i] for i in group])
        names = (ctypes.c_char_p * len(group))(*[paths[i] for i in group])
        kept = lengths, at, sizes, window
        *arrays, place = [ctypes.c_void_p(a.ctypes.data) for a in kept]
        buffers = [ctypes.c_void_p(a.ctypes.data) for a in (READ, DECODED)]
        unit = ctypes.c_int64(strip_rows * row)
        arguments = names, ctypes.c_long(len(group)), codec, *arrays, *buffers, unit, place, made
        calls.append((arguments, *kept))

    def run() -> None:
        good = 0
        for arguments, _, at, sizes, _ in calls:
            good += functions.limit(*arguments)
            if layout.codec == "lzw":
                for begin, size in zip((at - at[0]).tolist(), sizes.tolist(), strict=True):
                    strip = READ[begin : begin + size]
                    imagecodecs.lzw_decode(strip, out=DECODED[: strip_rows * row])
        if good != len(paths):
            raise OSError(f"the limit read {good} of {len(paths)} files")

    return run


# --------------------------------------------------------------------------------------------------
# Readers: each fills out, float32 [h, w], with one band's box


def read_rasterio(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    t, x, h, w = box
    with rasterio.open(path) as file:
        file.read(band + 1, window=rasterio.windows.Window(x, t, w, h), out=out)


def read_tuned(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    t, x, h, w = box
    with rasterio.open(path, driver="GTiff", sharing=False) as file:
        file.read(band + 1, window=rasterio.windows.Window(x, t, w, h), out=out)


def read_gdal(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    t, x, h, w = box
    file = gdal.OpenEx(path, gdal.OF_RASTER, allowed_drivers=["GTiff"])
    file.GetRasterBand(band + 1).ReadAsArray(x, t, w, h, buf_obj=out)


def read_imagecodecs(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    cut(imagecodecs.tiff_decode(Path(path).read_bytes()), pool, band, box, out)


def read_tifffile(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    cut(tifffile.imread(path, maxworkers=1), pool, band, box, out)


def read_pyvips(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    t, x, h, w = box
    image = pyvips.Image.new_from_file(path, access="sequential", fail_on="warning")
    out[:] = image.crop(x, t, w, h)[band].numpy()


def read_memmap(pool: Pool, path: str, band: int, box: list[int], out: NDArray) -> None:
    bands, h, w = pool.tiles[0].shape
    shape = (h, w, bands) if pool.layout.planar == "interleaved" else (bands, h, w)
    pixels = np.memmap(path, pool.tiles[0].dtype, "r", int(pool.offsets[0, 0]), shape)
    cut(pixels, pool, band, box, out)


def cut(pixels: NDArray, pool: Pool, band: int, box: list[int], out: NDArray) -> None:
    t, x, h, w = box
    plane = pixels[..., band] if pool.layout.planar == "interleaved" else pixels[band]
    out[:] = plane[t : t + h, x : x + w]


READERS = {  # memmap is hand-written, knows where the pixels lie, and is no library
    "rasterio": (rasterio, read_rasterio),
    "rasterio tuned": (rasterio, read_tuned),
    "gdal": (gdal, read_gdal),
    "imagecodecs": (imagecodecs, read_imagecodecs),
    "tifffile": (tifffile, read_tifffile),
    "pyvips": (pyvips, read_pyvips),
    "memmap": (np, read_memmap),
}


def settings(reader: str) -> contextlib.AbstractContextManager:
    return rasterio.Env(**TUNED) if reader == "rasterio tuned" else contextlib.nullcontext()


def loop(reader: str, draw: Draw, out: NDArray) -> None:
    """A peer reads a batch, one call a sample. out float32 [N, 1, h, w]."""
    function = READERS[reader][1]
    with settings(reader):
        for i, (path, band, box) in enumerate(calls_of(draw)):
            function(draw.pool, path, band, box, out[i, 0])


def calls_of(draw: Draw) -> Iterator[tuple[str, int, list[int]]]:
    return zip(draw.paths, draw.bands.tolist(), draw.boxes.tolist(), strict=True)


def fill_arguments(draw: Draw, normalised: bool = False) -> dict:
    side, shape = draw.pool.tiles[0].shape[1], (len(draw.files), 1)
    arguments = {"paths": draw.paths, "bands": draw.bands[:, None], "windows": draw.boxes / side}
    if normalised:
        mean, std = STATS[draw.pool.layout.sensor]
        arguments["mean"] = np.full(shape, mean, np.float32)
        arguments["std"] = np.full(shape, std, np.float32)
    return arguments


# --------------------------------------------------------------------------------------------------
# Rounds and their statistics


def measure(bench: Bench, row: str, methods: dict[str, Callable[[int], float]]) -> dict:
    """Seconds a sample of each method, float [rounds]; a method gets the round's number.

    A round's figure is the median of three batches, so that one that the scheduler interrupted does
    not count; slow methods run one. The first round warms caches and buffers and is not kept.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    end, number = time.perf_counter() + SECONDS[row] * bench.share, -1
    while number < bench.least or (time.perf_counter() < end and number < 400):
        for name in bench.rng.permutation(list(methods)).tolist():
            begin, values = time.perf_counter(), []
            while not values or (len(values) < 3 and time.perf_counter() - begin < 0.01):
                values.append(methods[name](number))
            if number >= 0:
                times[name].append(float(np.median(values)))
        number += 1
    return {name: np.array(values) for name, values in times.items()}


def clock(run: Callable[[], object], number: int) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) / number


def micro(times: dict, name: str) -> str:
    return f"{1e6 * np.median(times[name]):.0f}" if name in times else "-"


def best_library(times: dict) -> str | None:
    others = ("bandcrop", "limit", "with floats", "memmap")
    libraries = [name for name in times if name not in others]
    return min(libraries, key=lambda name: np.median(times[name]), default=None)


# --------------------------------------------------------------------------------------------------
# 1. Reading


def wrong_pixels(reader: str, pool: Pool, bench: Bench) -> str:
    """Why a reader cannot be timed on these files; "" where its pixels are right."""
    draw, out = draw_crops(pool, bench.rng, 6, (37, 29)), np.zeros((6, 1, 37, 29), np.float32)
    try:
        if reader == "with floats":
            prepare_limit(bench.functions, draw, out)()
        elif reader == "bandcrop":
            for i, (path, band, box) in enumerate(calls_of(draw)):
                out[i] = bandcrop.read(path, [band], tuple(box))
        else:
            loop(reader, draw, out)
    except Exception as error:  # whatever a peer raises
        return f"{reader} fails: {' '.join(str(error).split())[:100]}"
    right = all(np.array_equal(out[i, 0], draw.truth(i)) for i in range(6))
    return "" if right else f"{reader} returns wrong pixels"


def read_layout(bench: Bench, pool: Pool, left_out: list[str]) -> dict[str, NDArray]:
    """Seconds a crop of every reader, float [rounds]; `left_out` collects who is not timed, why."""
    layout, rng, side = pool.layout, bench.rng, pool.tiles[0].shape[1]
    reader, space = bandcrop.Reader(1), np.ones(BATCH * side * side, np.float32)

    def crops(number: int, count: int) -> tuple[Draw, NDArray]:
        h, w = round_size(number, side)
        out = space[: count * h * w].reshape(count, 1, h, w)
        return draw_crops(pool, rng, count, (h, w)), out

    def ours(number: int) -> float:
        draw, out = crops(number, BATCH)
        arguments = fill_arguments(draw)
        return clock(lambda: reader.fill(out, **arguments), BATCH)

    def limit(number: int) -> float:
        return clock(prepare_limit(bench.functions, crops(number, BATCH)[0]), BATCH)

    def floats(number: int) -> float:
        return clock(prepare_limit(bench.functions, *crops(number, BATCH)), BATCH)

    def peer(number: int, name: str, count: int) -> float:
        draw, out = crops(number, count)
        return clock(lambda: loop(name, draw, out), count)

    methods = {"bandcrop": ours}
    if layout.codec in bench.codecs:
        methods["limit"] = limit
        if layout.codec == "none":
            methods["with floats"] = floats
    for name in methods:
        if name != "limit" and (why := wrong_pixels(name, pool, bench)):
            raise SystemExit(f"bench_loader.py: error: {layout.name}: {why}")
    for name in bench.readers:
        if name == "memmap" and layout.codec != "none":
            continue
        if why := wrong_pixels(name, pool, bench):
            left_out.append(f"{layout.name}: {why}")
            continue
        count = int(np.clip(0.02 / peer(0, name, 4), bench.least, BATCH))  # slow: fewer a round
        methods[name] = partial(peer, name=name, count=count)
    return measure(bench, "read", methods)


def bench_read(bench: Bench) -> dict:
    rows, every, left_out, figures = [], [], [], {}
    for layout in LAYOUTS:
        ready = tifffile and imagecodecs and layout.codec in bandcrop.codecs()
        if layout.codec != "none" and not ready:
            left_out.append(f"{layout.name}: needs tifffile, imagecodecs and bandcrop's codec")
            continue
        with pool_of(bench, layout) as pool:
            times = read_layout(bench, pool, left_out)
        figures[layout.name] = times
        row = [layout.name, *[micro(times, key) for key in ("limit", "with floats", "bandcrop")]]
        if "limit" in times:
            value = median(times["bandcrop"] / times["limit"])
            row += [show(value), verdict(value, layout.limit, at_most=True)]
        else:
            row += ["-", "-"]
        if best := best_library(times):
            value = median(times[best] / times["bandcrop"])
            row += [f"{best}, {micro(times, best)}", show(value), verdict(value, layout.faster)]
        else:
            row += ["-", "-", "-"]
        rows.append([*row, str(len(times["bandcrop"]))])
        every.append([layout.name, *[micro(times, name) for name in bench.readers]])
    notes = f"""\
One band's random crop as float32 at native size, one thread, warm cache; us a crop. bandcrop: fills
of {BATCH}; the limit: one C call for {BATCH}; peers: a call a crop. Windows have BYOL's areas
(0.08 to 1) and ratios, one size a round. LZW has no library: its limit calls
imagecodecs.lzw_decode for each strip from Python, which bandcrop's own decoder may beat."""
    head = "file|limit|with floats|bandcrop|x limit|aim|best library|x faster|aim|rounds"
    table("1. Reading", head, rows, notes)
    notes = "us a crop; memmap is hand-written and knows where the pixels lie."
    table("Every reader", "|".join(["file", *bench.readers]), every, notes)
    print("\n" + "\n".join(f"- Not timed: {line}." for line in left_out))
    return figures


# --------------------------------------------------------------------------------------------------
# 2. Resizing


def resize_torch(pixels: NDArray, out: Tensor) -> None:
    whole = torch.from_numpy(pixels)[None, None]
    out[:] = F.interpolate(whole, (VIEW, VIEW), mode="bicubic", antialias=True)[0, 0]


def resize_pil(pixels: NDArray, out: Tensor) -> None:
    image = Image.fromarray(pixels).resize((VIEW, VIEW), Image.Resampling.BICUBIC)
    out.numpy()[:] = np.asarray(image)


def bench_resize(bench: Bench) -> dict:
    reader, views = bandcrop.Reader(1), torch.ones(BATCH, 1, VIEW, VIEW)
    space = np.ones(BATCH * 256 * 256, np.float32)
    with pool_of(bench, S2) as pool:

        def crops(number: int) -> tuple[dict, NDArray]:
            h, w = round_size(number, 256)
            out = space[: BATCH * h * w].reshape(BATCH, 1, h, w)
            return fill_arguments(draw_crops(pool, bench.rng, BATCH, (h, w))), out

        def native(number: int) -> float:
            arguments, out = crops(number)
            return clock(lambda: reader.fill(out, **arguments), BATCH)

        def whole(number: int) -> float:
            arguments, _ = crops(number)
            return clock(lambda: reader.fill(views, **arguments), BATCH)

        def peer(number: int, resize: Callable) -> float:
            arguments, out = crops(number)
            reader.fill(out, **arguments)
            return clock(lambda: [resize(out[i, 0], views[i, 0]) for i in range(BATCH)], BATCH)

        methods = {"bandcrop: fill to 224": whole, "bandcrop: fill at native size": native}
        methods["F.interpolate"] = partial(peer, resize=resize_torch)
        methods["PIL"] = partial(peer, resize=resize_pil)
        times = measure(bench, "resize", methods)
    times["bandcrop: the difference"] = alone = times[list(times)[0]] - times[list(times)[1]]
    rows = []
    for name in times:
        row = [name, micro(times, name), "", ""]
        if name in ("F.interpolate", "PIL"):
            value = median(times[name] / alone)
            row[2:] = [show(value), verdict(value, 3.5) if name == "F.interpolate" else ""]
        rows.append(row)
    notes = f"""\
A crop of S2 interleaved to {VIEW} x {VIEW}, bicubic and antialiased, one thread; us a crop;
{len(alone)} rounds of {BATCH} crops of one size. Peers resize float32 crops that lie in memory;
bandcrop's resizing is the difference of two fills."""
    table("2. Resizing", "method|median|x the difference|aim", rows, notes)
    return times


# --------------------------------------------------------------------------------------------------
# 3. A pair of files to two views


def draw_pairs(pools: list[Pool], rng: np.random.Generator, number: int) -> list[Draw]:
    return [draw_crops(pool, rng, number) for pool in pools]


def normalise(views: Tensor, draws: list[Draw]) -> None:
    for view, draw in zip(views, draws, strict=True):
        mean, std = STATS[draw.pool.layout.sensor]
        view.sub_(mean).div_(std)


def library_pairs(readers: list[str], resize: Callable, draws: list[Draw], views: Tensor) -> None:
    """The usual loop: read a crop, resize it, next; then normalise. views [2, N, 1, 224, 224]."""
    for view, reader, draw in zip(views, readers, draws, strict=True):
        with settings(reader):
            for i, (path, band, box) in enumerate(calls_of(draw)):
                pixels = np.empty(box[2:], np.float32)
                READERS[reader][1](draw.pool, path, band, box, pixels)
                resize(pixels, view[i, 0])
    normalise(views, draws)


def torchgeo_pairs(labels: Pool, draws: list[Draw], views: Tensor) -> None:
    """As torchgeo's SEN12MS: all bands of lc, s1 and s2, joined; then band, crop and resize."""
    for i, lc in enumerate(labels.take(len(draws[0].files))):
        parts = []
        for path in (labels.paths[lc], draws[1].paths[i], draws[0].paths[i]):
            with rasterio.open(path) as file:
                parts.append(torch.from_numpy(file.read().astype(np.float32)))
        image = torch.cat(parts[1:])  # [2 + 13, 256, 256]
        for view, draw, first in zip(views, draws, (2, 0), strict=True):
            t, x, h, w = draw.boxes[i].tolist()
            resize_torch(image[first + draw.bands[i], t : t + h, x : x + w].numpy(), view[i, 0])
    normalise(views, draws)


class Pairs(torch.utils.data.Dataset):
    """Batch number `step`, by a Reader made in the worker: the kindest way to use DataLoader."""

    def __init__(self, pools: list[Pool]) -> None:
        self.pools, self.reader = pools, None

    def __getitem__(self, step: int) -> Tensor:
        self.reader = self.reader or bandcrop.Reader(1)
        views = torch.empty(2, BATCH, 1, VIEW, VIEW)
        for view, arguments in zip(views, self.arguments(step), strict=True):
            self.reader.fill(view, **arguments)
        return views

    def arguments(self, step: int) -> list[dict]:
        for pool in self.pools:
            pool.place[0] = step * BATCH
        draws = draw_pairs(self.pools, np.random.default_rng(step), BATCH)
        return [fill_arguments(draw, normalised=True) for draw in draws]


def measure_pairs(bench: Bench, pools: list[Pool], labels: Pool, best: list[str | None]) -> dict:
    rng, views = bench.rng, torch.ones(2, BATCH, 1, VIEW, VIEW)
    readers = {1: bandcrop.Reader(1), 2: bandcrop.Reader(2)}

    def fill(draws: list[Draw], views: Tensor, threads: int) -> None:
        tickets = [
            readers[threads].submit(view, **fill_arguments(draw, normalised=True))
            for view, draw in zip(views, draws, strict=True)
        ]
        for ticket in tickets:
            ticket.wait()

    def run(number: int, method: Callable, count: int) -> float:
        draws = draw_pairs(pools, rng, count)
        return clock(lambda: method(draws=draws, views=views[:, :count]), count)

    peers = {"memmap + F.interpolate": partial(library_pairs, ["memmap", "memmap"], resize_torch)}
    if all(best):
        names = " / ".join(dict.fromkeys(best))
        peers[f"{names} + F.interpolate"] = partial(library_pairs, best, resize_torch)
        peers[f"{names} + PIL"] = partial(library_pairs, best, resize_pil)
    if rasterio:
        peers["torchgeo's way"] = partial(torchgeo_pairs, labels)

    draws = draw_pairs(pools, rng, 4)  # the same views from all, but at the crops' edges
    fill(draws, views[:, :4], 1)
    expected = views[:, :4].clone()
    for name, method in peers.items():
        method(draws=draws, views=views[:, :4])
        if (views[:, :4] - expected).abs().median() > 1e-3:
            raise SystemExit(f"bench_loader.py: error: {name} makes other views than bandcrop")
    methods = {
        "bandcrop, 1 thread": partial(run, method=partial(fill, threads=1), count=BATCH),
        "bandcrop, 2 threads": partial(run, method=partial(fill, threads=2), count=BATCH),
    }
    methods |= {name: partial(run, method=method, count=8) for name, method in peers.items()}
    return measure(bench, "pairs", methods)


def measure_workers(bench: Bench, pools: list[Pool], length: int) -> dict:
    """Whole loops over `length` batches, each summed on arrival."""
    reader, dataset, steps = bandcrop.Reader(2), Pairs(pools), []
    ring = [torch.ones(2, BATCH, 1, VIEW, VIEW) for _ in range(3)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=steps, num_workers=2, persistent_workers=True
    )

    def submit(step: int) -> list[bandcrop.Ticket]:
        requests = zip(ring[step % 3], dataset.arguments(step), strict=True)
        return [reader.submit(view, **arguments) for view, arguments in requests]

    def threads() -> None:
        pending = [submit(steps[0]), submit(steps[1])]
        for step in steps:
            for ticket in pending.pop(0):
                ticket.wait()
            ring[step % 3].sum()
            if step + 2 in steps:
                pending.append(submit(step + 2))

    def workers() -> None:
        for views in loader:
            views.sum()

    def run(number: int, method: Callable) -> float:
        first = steps[-1] + 1 if steps else 0
        steps[:] = range(first, first + length)  # the sampler: files that come next
        return clock(method, length * BATCH)

    methods = {"Reader(2), submitted ahead": partial(run, method=threads)}
    methods["2 DataLoader workers"] = partial(run, method=workers)
    return measure(bench, "workers", methods)


def bench_pairs(bench: Bench, read: dict) -> dict:
    length = max(4, int(16 * bench.share))
    with contextlib.ExitStack() as stack:
        *pools, labels = [stack.enter_context(pool_of(bench, layout)) for layout in (S2, S1, LC)]
        best = [best_library(read[layout.name]) for layout in (S2, S1)]
        times = measure_pairs(bench, pools, labels, best)
        loops = measure_workers(bench, pools, length)
    one, two = times["bandcrop, 1 thread"], times["bandcrop, 2 threads"]
    gain = median(one / two)
    rows = [["bandcrop, 1 thread", micro(times, "bandcrop, 1 thread"), "", ""]]
    rows.append(["bandcrop, 2 threads", micro(times, "bandcrop, 2 threads")])
    rows[-1] += [f"{show(gain)} times as fast", verdict(gain, 1.6)]
    for name in list(times)[2:]:
        value = median(times[name] / one)
        aim = 25 if name == "torchgeo's way" else 1.8 if name.startswith("memmap") else 5
        rows.append([name, micro(times, name), show(value), verdict(value, aim)])
    ahead, workers = loops
    rows.append([ahead, micro(loops, ahead), "", ""])
    slower = f"{show(median(loops[workers] / loops[ahead]))} against Reader(2)"
    rows.append([workers, micro(loops, workers), slower, ""])
    notes = f"""\
An S2 and an S1 file (interleaved) to two normalised views of {VIEW} x {VIEW}, each its own band and
window; us a pair; one thread but where it says so; {len(one)} rounds. torchgeo's way: all bands of
s1, s2 and lc through rasterio, written out here. Last two rows: {length} batches of {BATCH} pairs,
each summed on arrival; the workers use the same reader."""
    table("3. A pair of files to two views", "method|median|x slower|aim", rows, notes)
    return times | loops


# --------------------------------------------------------------------------------------------------
# 4. Cold files


def drop(bench: Bench, paths: list[str]) -> float:
    """Drop files from the page cache; returns the share of their pages that stays."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return float(np.mean([bench.functions.resident(os.fsencode(path)) for path in paths]))


def cold_layout(bench: Bench, pool: Pool) -> dict:
    """Seconds a crop, or {} where files cannot be dropped from the cache."""
    for path in pool.paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if drop(bench, pool.paths) > 0.02:
        return {}
    reader, out = bandcrop.Reader(1), np.ones((2 * BATCH, 1, 128, 128), np.float32)

    def cold(number: int, run: Callable[[Draw], object], count: int) -> float:
        draw = draw_crops(pool, bench.rng, count, (128, 128))
        drop(bench, draw.paths)
        return clock(lambda: run(draw), count)

    def batch(draw: Draw) -> None:
        reader.submit(out, **fill_arguments(draw)).wait()

    def one_by_one(draw: Draw) -> None:
        windows = draw.boxes / 256
        for i, path in enumerate(draw.paths):
            reader.fill(out[i : i + 1], [path], draw.bands[i : i + 1, None], windows[i : i + 1])

    methods = {"one submit": partial(cold, run=batch, count=2 * BATCH)}
    methods["one by one"] = partial(cold, run=one_by_one, count=2 * BATCH)
    for name in ("memmap", "rasterio tuned"):
        if name in bench.readers:
            run = partial(loop, name, out=out)
            methods[name] = partial(cold, run=run, count=BATCH // 2)
    return measure(bench, "cold", methods)


def bench_cold(bench: Bench) -> dict:
    rows, figures, names = [], {}, ["one submit", "one by one", "memmap", "rasterio tuned"]
    for layout, prototype in ((S2, "2.2 to 2.6"), (S2_SEPARATE, "13 to 28")):
        times = {}
        if bench.functions is not None and hasattr(os, "posix_fadvise"):
            with pool_of(bench, layout) as pool:
                times = cold_layout(bench, pool)
        if not times:
            print("\n### 4. Cold files\n\nNot possible here: the cache does not let go of files.")
            return {}
        figures[layout.name] = times
        value = show(median(times["one by one"] / times["one submit"]))
        cells = [micro(times, name) for name in names]
        rows.append([layout.name, *cells, value, prototype, str(len(times["one submit"]))])
    notes = f"""\
One band's crop of 128 x 128, one thread; us a crop; one submit of {2 * BATCH} crops, or a fill for
each. Files are dropped from the page cache before each method (posix_fadvise, checked with
mincore); a host below may have a cache of its own."""
    head = "|".join(["file", *names, "submit x faster than one by one", "prototype", "rounds"])
    table("4. Cold files", head, rows, notes)
    return figures


# --------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer files and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--folder", type=Path, help="a disk to measure on (the temporary folder)")
    args = parser.parse_args()
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: no such folder")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    if shutil.disk_usage(args.folder or tempfile.gettempdir()).free < 2**30:
        parser.error("less than 1 GiB is free for the tiles: name another disk with --folder")

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="rasterio")
    if pyvips:
        pyvips.cache_set_max(0)  # each crop is read, not remembered
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes then too
    with tempfile.TemporaryDirectory(prefix="bench_loader.", dir=args.folder) as name:
        functions, codecs = compile_limit(Path(name))
        missing = [peer for peer, module in zip(PEERS, MODULES, strict=True) if module is None]
        wanted = ("none", "deflate", "zstd", "lzw")
        missing += [f"the limit of codec {codec}" for codec in wanted if codec not in codecs]
        readers = [reader for reader, (module, _) in READERS.items() if module is not None]
        share, least = (0.06, 3) if args.quick else (1.0, 5)
        rng = np.random.default_rng(0)
        bench = Bench(Path(name), rng, functions, codecs, readers, share, least)
        versions = [f"{m.__name__} {getattr(m, '__version__', '')}" for m in (*MODULES, torch) if m]
        date, load = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()[0]
        print(f"Measured {date} on {hardware()}; load {load:.1f} before.", end=" ")
        print(f"Beside {', '.join(versions)}; missing here: {', '.join(missing) or 'nothing'}.")
        print("Times: medians; ratios: median [95 % interval] over the rounds.", flush=True)
        if load > 0.5 * len(os.sched_getaffinity(0)):
            print(
                "The machine is busy: times are too long, and the row of two threads says nothing."
            )
        figures = {"read": bench_read(bench), "resize": bench_resize(bench)}
        figures["pairs"] = bench_pairs(bench, figures["read"])
        figures["cold"] = bench_cold(bench)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")
    if args.json:
        about = {"hardware": hardware(), "date": date, "load": load, "unit": "seconds a sample"}
        text = json.dumps(about | figures, indent=1, default=lambda array: array.tolist())
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
