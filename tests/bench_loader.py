"""Measure bandcrop beside other readers, on tiles that this writes itself and removes afterwards.

    python tests/bench_loader.py                  # about 3 minutes; what `make bench` runs
    python tests/bench_loader.py --quick          # under a minute: fewer rounds, wide intervals
    TMPDIR=/mnt/disk python tests/bench_loader.py # on that disk

Each round runs every method once, in shuffled order, on files of its own: a pool larger than the
L3 cache is walked as a ring. Ratios are taken round by round; tables show their median and a 95 %
bootstrap interval over the rounds. Pixels are checked before they are timed.

The limit is a C function compiled at run time: open, pread of a 4 KB header, one pread of the exact
rows into a reused buffer, close. "With floats": the same function, told where the window lies, also
writes its floats to where bandcrop writes them.
"""

import argparse
import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import bandcrop
import numpy as np
import tifffile
from bandcrop.repack import repack
from bench_report import hardware, median, show, table
from numpy.typing import NDArray

BATCH = 32  # samples a fill
VIEW = 224  # pixels, side of a view
POOL = {"s2": 128, "s1": 256, "eurosat": 640}  # files: together more than a 32 MB L3
BASES = 8  # different tiles in a pool; the other files are copies
TUNED = {  # GDAL for many small local files
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GTIFF_DIRECT_IO": "YES",  # uncompressed files: past the block cache
}


class Layout(NamedTuple):
    """How a pool's files are written."""

    name: str
    sensor: str
    codec: str | None  # None, "zlib", "lzw", "zstd"
    planar: str  # "contig", "separate"
    predictor: int
    rows: int  # a strip; 0: tiles of 256 x 256


LAYOUTS = [  # strips as GDAL makes them: about 8 KB before compression
    Layout("S2 interleaved", "s2", None, "contig", 1, 1),
    Layout("S1 interleaved", "s1", None, "contig", 1, 4),
    Layout("S2 band-sequential", "s2", None, "separate", 1, 16),
    Layout("S1 band-sequential", "s1", None, "separate", 1, 8),
    Layout("EuroSAT 64 x 64", "eurosat", None, "contig", 1, 4),
    Layout("S2 DEFLATE, predictor 2", "s2", "zlib", "contig", 2, 1),
    Layout("S1 DEFLATE, predictor 3", "s1", "zlib", "contig", 3, 4),
    Layout("S2 LZW, predictor 2", "s2", "lzw", "contig", 2, 1),
    Layout("S2 ZSTD tiled 256, predictor 2", "s2", "zstd", "contig", 2, 0),
    Layout("S1 ZSTD tiled 256, predictor 3", "s1", "zstd", "contig", 3, 0),
    Layout("S2 DEFLATE band-sequential", "s2", "zlib", "separate", 1, 16),
]

# --------------------------------------------------------------------------------------------------
# Tiles


class Pool(NamedTuple):
    """Files of one layout, walked as a ring."""

    layout: Layout
    paths: list[str]
    tiles: list[NDArray]  # file i holds tiles[i % BASES], [bands, h, w]
    first: int  # byte of the first sample
    numbers: Iterator[int]  # of the files, for ever


def draw_tile(rng: np.random.Generator, sensor: str) -> NDArray:
    """[bands, h, w]: smooth, with noise, so that codecs find about as little as in real tiles."""
    bands, side = (2, 256) if sensor == "s1" else (13, 64 if sensor == "eurosat" else 256)
    scene = rng.standard_normal((1, side, side)).cumsum(1).cumsum(2) / side
    scene = (scene - scene.mean()) / scene.std()
    if sensor == "s1":  # dB, with the speckle of 4 looks
        speckle = 10 * np.log10(rng.standard_gamma(4, (bands, side, side)) / 4)
        return (-15 + 4 * scene + speckle).astype(np.float32)
    noise = 1 + 0.004 * rng.standard_normal((bands, side, side))
    return np.rint(np.clip((1600 + 500 * scene) * noise, 1, 10000)).astype(np.uint16)


def write_pool(folder: str, rng: np.random.Generator, layout: Layout, share: float) -> Pool:
    tiles = [draw_tile(rng, layout.sensor) for _ in range(BASES)]
    paths = [f"{folder}/{i:04d}.tif" for i in range(max(64, int(share * POOL[layout.sensor])))]
    for path, tile in zip(paths, tiles, strict=False):
        tifffile.imwrite(
            path, tile if layout.planar == "separate" else tile.transpose(1, 2, 0),
            planarconfig=layout.planar, photometric="minisblack", metadata=None,
            compression=layout.codec, predictor=layout.predictor if layout.codec else None,
            **({"rowsperstrip": layout.rows} if layout.rows else {"tile": (256, 256)}),
        )  # fmt: skip
    for i in range(BASES, len(paths)):
        shutil.copyfile(paths[i % BASES], paths[i])
    with tifffile.TiffFile(paths[0]) as file:
        first = file.pages[0].dataoffsets[0]
    return Pool(layout, paths, tiles, first, itertools.cycle(range(len(paths))))


class Draw(NamedTuple):
    """Crops to read: a file, a band and a window in whole pixels for each sample."""

    pool: Pool
    files: list[int]
    bands: NDArray[np.int64]  # [N]
    boxes: NDArray[np.int64]  # [N, 4]: top, left, height, width

    @property
    def paths(self) -> list[str]:
        return [self.pool.paths[i] for i in self.files]

    def calls(self) -> Iterator[tuple[str, int, list[int]]]:
        return zip(self.paths, self.bands.tolist(), self.boxes.tolist(), strict=True)


def random_size(u: float, v: float, side: int) -> tuple[int, int]:
    """BYOL's resized crop: area 0.08 to 1, ratio 3/4 to 4/3 (u, v uniform), in whole pixels."""
    area, aspect = (0.08 + 0.92 * u) * side * side, (3 / 4) ** (1 - 2 * v)
    return min(side, round((area / aspect) ** 0.5)), min(side, round((area * aspect) ** 0.5))


def draw_crops(
    pool: Pool, rng: np.random.Generator, number: int, size: tuple[int, int] | None = None
) -> Draw:
    """size: height and width of every window; None: each sample draws its own."""
    bands, side, _ = pool.tiles[0].shape
    sizes = np.array([size or random_size(*rng.random(2), side) for _ in range(number)])
    boxes = np.hstack([rng.integers(0, side - sizes + 1), sizes])
    files = list(itertools.islice(pool.numbers, number))
    return Draw(pool, files, rng.integers(0, bands, number), boxes)


def right(draw: Draw, out: NDArray) -> bool:
    """Whether out [N, 1, h, w] holds the pixels that were asked for."""
    tiles = [draw.pool.tiles[i % BASES] for i in draw.files]
    return all(
        np.array_equal(made, tile[band, t : t + h, x : x + w])
        for (made,), tile, (_, band, (t, x, h, w)) in zip(out, tiles, draw.calls(), strict=True)
    )


# --------------------------------------------------------------------------------------------------
# Readers

LIMIT = r"""
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>
// Reads bytes[i] bytes at offsets[i] of each of n files; returns how many were read. With `made` it
// also writes the windows' floats there: `row` bytes from row to row, `size` bytes a sample,
// `stride` samples from one to the next; of each file bytes to the first, rows, columns.
long limit(const char **paths, long n, const int64_t *offsets, const int64_t *bytes, char *in,
           int64_t row, int64_t size, int64_t stride, const int64_t *window, float *made) {
  static char header[4096];
  long good = 0;
  for (long i = 0; i < n; i++, window += 3) {
    int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    good += pread(fd, header, 4096, 0) > 0 && pread(fd, in, bytes[i], offsets[i]) == bytes[i];
    close(fd);
    if (!made) continue;
#define FLOATS(TYPE, STRIDE)                                                       \
  for (int64_t r = 0; r < window[1]; r++, made += window[2]) {                     \
    const TYPE *from = (const TYPE *)(in + window[0] + r * row);                   \
    for (int64_t c = 0; c < window[2]; c++) made[c] = (float)from[c * (STRIDE)];   \
  }
    if (size == 2 && stride == 1) FLOATS(uint16_t, 1)
    else if (size == 2) FLOATS(uint16_t, stride)
    else if (stride == 1) FLOATS(float, 1)
    else FLOATS(float, 2)
  }
  return good;
}
"""
PIXELS = np.ones(1 << 22, np.uint8)  # what the limit reads into; ones: pages that are there


def compile_limit(folder: Path) -> ctypes.CDLL:
    (folder / "limit.c").write_text(LIMIT)
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", "limit.so", "limit.c"]
    subprocess.run([os.environ.get("CC", "cc"), *flags], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "limit.so"))


def limit(library: ctypes.CDLL, draw: Draw, out: NDArray | None) -> Callable[[], None]:
    """A call that reads what `draw` needs and no more; or also fills out [N, 1, h, w]."""
    bands, height, width = draw.pool.tiles[0].shape
    size, separate = draw.pool.tiles[0].itemsize, draw.pool.layout.planar == "separate"
    stride = 1 if separate else bands
    row = width * size * stride  # bytes
    top, left, rows, columns = draw.boxes.T
    offsets = draw.pool.first + draw.bands * separate * height * row + top * row
    to_first = (left * stride + draw.bands * (not separate)) * size
    arrays = offsets, rows * row, PIXELS, np.stack([to_first, rows, columns], 1).copy()
    at = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    made = None if out is None else ctypes.c_void_p(out.ctypes.data)
    names = (ctypes.c_char_p * len(rows))(*map(os.fsencode, draw.paths))
    steps = [ctypes.c_int64(value) for value in (row, size, stride)]

    def run() -> None:
        good = library.limit(names, ctypes.c_long(len(rows)), *at[:3], *steps, at[3], made)
        assert good == len(arrays[0])

    return run


def by_rasterio(draw: Draw, out: NDArray) -> None:
    import rasterio

    with rasterio.Env(**TUNED):
        for (pixels,), (path, band, (t, x, h, w)) in zip(out, draw.calls(), strict=True):
            window = rasterio.windows.Window(x, t, w, h)
            with rasterio.open(path, driver="GTiff", sharing=False) as file:
                file.read(band + 1, window=window, out=pixels)


def by_imagecodecs(draw: Draw, out: NDArray) -> None:
    import imagecodecs

    for (pixels,), (path, band, (t, x, h, w)) in zip(out, draw.calls(), strict=True):
        tile = imagecodecs.tiff_decode(Path(path).read_bytes())
        plane = tile[..., band] if draw.pool.layout.planar == "contig" else tile[band]
        pixels[:] = plane[t : t + h, x : x + w]


PEERS = {"imagecodecs": by_imagecodecs, "rasterio": by_rasterio}  # the two fastest of six
PEERS = {name: peer for name, peer in PEERS.items() if find_spec(name)}


def fill_arguments(draw: Draw) -> dict:
    side = draw.pool.tiles[0].shape[1]
    return {"paths": draw.paths, "bands": draw.bands[:, None], "windows": draw.boxes / side}


# --------------------------------------------------------------------------------------------------
# Rounds


def measure(rng: np.random.Generator, seconds: float, methods: dict[str, Callable]) -> dict:
    """Seconds a sample of each method, float [rounds]; a method gets the round's number.

    The first round warms caches and buffers and is not kept.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    end, number = time.perf_counter() + seconds, -1
    while number < 5 or (time.perf_counter() < end and number < 400):
        for name in rng.permutation(list(methods)).tolist():
            value = methods[name](number)
            if number >= 0:
                times[name].append(value)
        number += 1
    return {name: np.array(values) for name, values in times.items()}


def clock(run: Callable[[], object], number: int) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) / number


def read_layout(
    rng: np.random.Generator, library: ctypes.CDLL, pool: Pool, seconds: float
) -> dict[str, NDArray]:
    """Seconds a crop of every reader whose pixels are right, float [rounds]."""
    side, reader = pool.tiles[0].shape[1], bandcrop.Reader(1)
    space = np.ones(BATCH * side * side, np.float32)
    methods: dict[str, Callable] = {
        name: lambda draw, out, peer=peer: partial(peer, draw, out) for name, peer in PEERS.items()
    }
    methods["bandcrop"] = lambda draw, out: partial(reader.fill, out, **fill_arguments(draw))
    if pool.layout.codec is None:
        methods["with floats"] = partial(limit, library)
    for name in list(methods):
        draw, out = draw_crops(pool, rng, 6, (37, 29)), np.zeros((6, 1, 37, 29), np.float32)
        with contextlib.suppress(Exception):  # whatever a peer raises that cannot read these files
            methods[name](draw, out)()
        if not right(draw, out):
            print(f"\n{pool.layout.name}: {name} is not timed: no pixels, or others")
            del methods[name]
    if pool.layout.codec is None:
        methods["limit"] = lambda draw, out: limit(library, draw, None)

    def crops(number: int, name: str) -> float:
        # One size a round, of a sequence that covers areas and ratios evenly; peers are slow
        h, w = random_size((number * 0.618034) % 1, (number * 0.754878) % 1, side)
        count = 4 if name in PEERS else BATCH
        out = space[: count * h * w].reshape(count, 1, h, w)
        return clock(methods[name](draw_crops(pool, rng, count, (h, w)), out), count)

    return measure(rng, seconds, {name: partial(crops, name=name) for name in methods})


def bench_read(folder: Path, rng: np.random.Generator, share: float) -> None:
    rows, library = [], compile_limit(folder)
    for layout in LAYOUTS:
        if {"zlib": "deflate"}.get(layout.codec, layout.codec or "none") not in bandcrop.codecs():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            times = read_layout(rng, library, write_pool(place, rng, layout, share), 6 * share)
        ours, names = times["bandcrop"], ("limit", "with floats", "bandcrop", *PEERS)
        best = min((times[name] for name in PEERS if name in times), key=np.median, default=None)
        micros = {name: f"{1e6 * np.median(times[name]):.0f}" for name in times}
        rows.append([
            layout.name, *[micros.get(name, "-") for name in names],
            show(median(ours / times["limit"])) if "limit" in times else "-",
            "-" if best is None else show(median(best / ours)), str(len(ours)),
        ])  # fmt: skip
    notes = f"""\
One band's random crop as float32 at native size, one thread, warm cache; us a crop. bandcrop: fills
of {BATCH}; the limit: one C call for {BATCH}; peers: a call a crop, rasterio tuned for small local
files. Windows have BYOL's areas (0.08 to 1) and ratios, one size a round."""
    head = f"file|limit|with floats|bandcrop|{'|'.join(PEERS)}|x limit|x faster than best|rounds"
    table("1. Reading", head, rows, notes)


# --------------------------------------------------------------------------------------------------
# Pairs, from an archive as it is and repacked


def fill_pairs(reader: bandcrop.Reader, draws: list[Draw], views: NDArray) -> int:
    """views [2, N, 1, 224, 224]; returns the bytes of pixels that were read."""
    tickets = [
        reader.submit(view, **fill_arguments(draw)) for view, draw in zip(views, draws, strict=True)
    ]
    return sum(ticket.wait().bytes_read for ticket in tickets)


def prepare(path: str, cold: bool) -> None:
    """Have a file in the page cache, or not."""
    with open(path, "rb") as file:
        file.read()
        if cold:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def bench_pairs(folder: Path, rng: np.random.Generator, share: float) -> None:
    views, asked, disk = np.ones((2, BATCH, 1, VIEW, VIEW), np.float32), {}, {}
    pools, repacked = [], []
    for layout in LAYOUTS[:2]:
        place = Path(tempfile.mkdtemp(dir=folder))
        pools.append(write_pool(str(place), rng, layout, share))
        there = [place / "repacked" / Path(path).name for path in pools[-1].paths]
        for path, new in zip(pools[-1].paths, there, strict=True):
            repack(Path(path), new, None)
        repacked.append(pools[-1]._replace(paths=[*map(str, there)]))
    methods = {  # threads, archive, cold
        "1 thread": (1, pools, False),
        "2 threads": (2, pools, False),
        "2 threads, repacked": (2, repacked, False),
        "2 threads, cold": (2, pools, True),
        "2 threads, cold, repacked": (2, repacked, True),
    }
    readers = {threads: bandcrop.Reader(threads) for threads in (1, 2)}

    def run(number: int, name: str) -> float:
        threads, archive, cold = methods[name]
        draws = [draw_crops(pool, rng, BATCH) for pool in archive]
        for path in draws[0].paths + draws[1].paths:
            prepare(path, cold)
        before, read = bytes_from_disk(), []
        seconds = clock(lambda: read.append(fill_pairs(readers[threads], draws, views)), BATCH)
        asked.setdefault(name, []).append(read[0] / BATCH / 1e3)
        disk.setdefault(name, []).append((bytes_from_disk() - before) / BATCH / 1e3)
        return seconds

    times = measure(rng, 30 * share, {name: partial(run, name=name) for name in methods})
    rows = []
    for name, seconds in times.items():
        other = name.removesuffix(", repacked") if "repacked" in name else "1 thread"
        pairs, faster = f"{1 / np.median(seconds):.0f}", show(median(times[other] / seconds))
        kilobytes = [f"{np.mean(values[name]):.0f}" for values in (asked, disk)]
        rows.append([name, pairs, f"{faster} ({other})", *kilobytes])
    notes = f"""\
An S2 and an S1 file to two views of {VIEW} x {VIEW}, each its own band and window, from
an interleaved archive (as SEN12MS is) and from what bandcrop.repack makes of it; warm but where it
says cold; {len(seconds)} rounds. Cold: dropped from the page cache before each fill of {BATCH}; the
disk's bytes are the kernel's count, read-ahead included. A host below may have its own cache."""
    head = "method|pairs/s|x as fast as|KB of pixels a pair|KB from the disk a pair"
    table("2. A pair of files to two views", head, rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer files and rounds")
    args = parser.parse_args()

    rng, share, load = np.random.default_rng(0), 0.06 if args.quick else 1.0, os.getloadavg()[0]
    print(f"Measured {time.strftime('%Y-%m-%d %H:%M')} on {hardware()}; load {load:.1f} before.")
    print("Times: medians; ratios: median [95 % interval] over the rounds.", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench_loader.") as folder:
        bench_read(Path(folder), rng, share)
        bench_pairs(Path(folder), rng, share)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
