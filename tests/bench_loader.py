"""Measure bandcrop beside other readers, on tiles that this writes itself and removes afterwards.

    python tests/bench_loader.py                  # about 3 minutes; what `make bench` runs
    python tests/bench_loader.py --quick          # under a minute: fewer rounds, wide intervals
    TMPDIR=/mnt/disk python tests/bench_loader.py # on that disk

Each round runs every method once, in shuffled order, on files of its own: a pool larger than the
L3 cache is walked as a ring. Ratios are taken round by round; tables show their median and a 95 %
bootstrap interval over the rounds. Pixels are checked in a round that is not counted.

The limit is a C function compiled at run time: open, pread of a 4 KB header, one pread of the exact
rows into a reused buffer, close. "With floats": the same function, told where the window lies, also
writes its floats to where bandcrop writes them.
"""

import argparse
import ctypes
import itertools
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
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

RNG = np.random.default_rng(0)
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
LAYOUTS = {  # sensor, planar configuration, rows a strip (0: tiles of 256 x 256), codec
    # strips as GDAL makes them: about 8 KB before compression
    "S2 interleaved": ("s2", "contig", 1, {}),
    "S1 interleaved": ("s1", "contig", 4, {}),
    "S2 band-sequential": ("s2", "separate", 16, {}),
    "S1 band-sequential": ("s1", "separate", 8, {}),
    "EuroSAT 64 x 64": ("eurosat", "contig", 4, {}),
    "S2 DEFLATE, predictor 2": ("s2", "contig", 1, {"compression": "zlib", "predictor": 2}),
    "S1 DEFLATE, predictor 3": ("s1", "contig", 4, {"compression": "zlib", "predictor": 3}),
    "S2 LZW, predictor 2": ("s2", "contig", 1, {"compression": "lzw", "predictor": 2}),
    "S2 ZSTD tiled 256, predictor 2": ("s2", "contig", 0, {"compression": "zstd", "predictor": 2}),
    "S1 ZSTD tiled 256, predictor 3": ("s1", "contig", 0, {"compression": "zstd", "predictor": 3}),
    "S2 DEFLATE band-sequential": ("s2", "separate", 16, {"compression": "zlib"}),
}

# --------------------------------------------------------------------------------------------------
# Tiles


class Pool(NamedTuple):
    """Files of one layout, walked as a ring."""

    planar: str
    first: int  # byte of a file's first sample
    files: deque[tuple[str, NDArray]]  # a path, and the tile that it holds: [bands, side, side]


Crop = tuple[str, NDArray, int, tuple[int, int, int, int]]  # path, tile, band; top, left, h, w


def draw_tile(sensor: str) -> NDArray:
    """[bands, h, w]: smooth, with noise, so that codecs find about as little as in real tiles."""
    bands, side = (2, 256) if sensor == "s1" else (13, 64 if sensor == "eurosat" else 256)
    scene = RNG.standard_normal((1, side, side)).cumsum(1).cumsum(2) / side
    scene = (scene - scene.mean()) / scene.std()
    if sensor == "s1":  # dB, with the speckle of 4 looks
        speckle = 10 * np.log10(RNG.standard_gamma(4, (bands, side, side)) / 4)
        return (-15 + 4 * scene + speckle).astype(np.float32)
    noise = 1 + 0.004 * RNG.standard_normal((bands, side, side))
    return np.rint(np.clip((1600 + 500 * scene) * noise, 1, 10000)).astype(np.uint16)


def write_pool(folder: str, share: float, sensor: str, planar: str, rows: int, codec: dict) -> Pool:
    tiles = [draw_tile(sensor) for _ in range(BASES)]
    paths = [f"{folder}/{i:04d}.tif" for i in range(max(64, int(share * POOL[sensor])))]
    form = codec | ({"rowsperstrip": rows} if rows else {"tile": (256, 256)})
    form |= {"planarconfig": planar, "photometric": "minisblack", "metadata": None}
    for path, tile in zip(paths, tiles, strict=False):
        pixels = tile if planar == "separate" else tile.transpose(1, 2, 0)
        tifffile.imwrite(path, pixels, **form)
    for path, copy in zip(paths, paths[BASES:], strict=False):
        shutil.copyfile(path, copy)
    with tifffile.TiffFile(paths[0]) as file:
        first = file.pages[0].dataoffsets[0]
    return Pool(planar, first, deque(zip(paths, itertools.cycle(tiles), strict=False)))


def random_size(u: float, v: float, side: int) -> tuple[int, int]:
    """BYOL's resized crop: area 0.08 to 1, ratio 3/4 to 4/3 (u, v uniform), in whole pixels."""
    area, aspect = (0.08 + 0.92 * u) * side * side, (3 / 4) ** (1 - 2 * v)
    return min(side, round((area / aspect) ** 0.5)), min(side, round((area * aspect) ** 0.5))


def draw_crops(pool: Pool, number: int, size: tuple[int, int] | None = None) -> list[Crop]:
    """size: height and width of every window; None: each sample draws its own."""
    crops = []
    for _ in range(number):
        path, tile = pool.files[0]
        pool.files.rotate(-1)
        bands, side, _ = tile.shape
        h, w = size or random_size(*RNG.random(2), side)
        band, top, left = RNG.integers([bands, side - h + 1, side - w + 1]).tolist()
        crops.append((path, tile, band, (top, left, h, w)))
    return crops


def right(crops: list[Crop], out: NDArray) -> bool:
    """Whether out [N, 1, h, w] holds the pixels that were asked for."""
    return all(
        np.array_equal(made, tile[band, t : t + h, x : x + w])
        for (made,), (_, tile, band, (t, x, h, w)) in zip(out, crops, strict=True)
    )


# --------------------------------------------------------------------------------------------------
# Readers

LIMIT = r"""
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>
typedef struct {
  int64_t offset, bytes;        // to read
  int64_t first, rows, columns; // the window in it: byte of its first sample, size in samples
  int64_t row, size, stride;    // bytes a row, bytes a sample, samples from one to the next
} Job;
// Reads what each of n jobs asks of its file; returns how many were read. With `made` it also
// writes the windows' floats there.
int limit(const char **paths, int n, const Job *job, char *in, float *made) {
  static char header[4096];
  int good = 0;
  for (int i = 0; i < n; i++, job++) {
    int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    good += pread(fd, header, 4096, 0) > 0 && pread(fd, in, job->bytes, job->offset) == job->bytes;
    close(fd);
    if (!made) continue;
#define FLOATS(TYPE, STRIDE)                                                          \
  for (int64_t r = 0; r < job->rows; r++, made += job->columns) {                     \
    const TYPE *from = (const TYPE *)(in + job->first + r * job->row);                \
    for (int64_t c = 0; c < job->columns; c++) made[c] = (float)from[c * (STRIDE)];   \
  }
    if (job->size == 2 && job->stride == 1) FLOATS(uint16_t, 1)
    else if (job->size == 2) FLOATS(uint16_t, job->stride)
    else if (job->stride == 1) FLOATS(float, 1)
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


def limit(library: ctypes.CDLL, pool: Pool, crops: list[Crop], out: NDArray | None) -> Callable:
    """A call that reads what `crops` need and no more; or also fills out [N, 1, h, w]."""
    jobs, separate = [], pool.planar == "separate"
    for _, tile, band, (top, left, rows, columns) in crops:
        bands, height, width = tile.shape
        size, stride = tile.itemsize, 1 if separate else bands
        row = width * size * stride
        offset = pool.first + (band * separate * height + top) * row
        first = (left * stride + band * (not separate)) * size
        jobs.append((offset, rows * row, first, rows, columns, row, size, stride))
    jobs = np.array(jobs, np.int64)
    paths = (ctypes.c_char_p * len(jobs))(*[os.fsencode(path) for path, *_ in crops])
    at = [None if x is None else ctypes.c_void_p(x.ctypes.data) for x in (jobs, PIXELS, out)]

    def run() -> None:
        assert library.limit(paths, len(jobs), *at) == len(jobs)

    return run


def by_rasterio(crops: list[Crop], out: NDArray) -> None:
    import rasterio

    with rasterio.Env(**TUNED):
        for (pixels,), (path, _, band, (t, x, h, w)) in zip(out, crops, strict=True):
            window = rasterio.windows.Window(x, t, w, h)
            with rasterio.open(path, driver="GTiff", sharing=False) as file:
                file.read(band + 1, window=window, out=pixels)


def by_imagecodecs(crops: list[Crop], out: NDArray) -> None:
    import imagecodecs

    for (pixels,), (path, tile, band, (t, x, h, w)) in zip(out, crops, strict=True):
        made = imagecodecs.tiff_decode(Path(path).read_bytes())
        plane = made[band] if made.shape == tile.shape else made[..., band]
        pixels[:] = plane[t : t + h, x : x + w]


PEERS = {"imagecodecs": by_imagecodecs, "rasterio": by_rasterio}  # the two fastest of six
PEERS = {name: peer for name, peer in PEERS.items() if find_spec(name)}


def fill_arguments(crops: list[Crop]) -> dict:
    paths, tiles, bands, boxes = zip(*crops, strict=True)
    windows = np.array(boxes) / tiles[0].shape[1]
    return {"paths": paths, "bands": np.array(bands)[:, None], "windows": windows}


# --------------------------------------------------------------------------------------------------
# Rounds


def measure(seconds: float, names: list[str], run: Callable) -> dict[str, NDArray]:
    """What run(number of the round, name) returns, an array [rounds, ...] for each name.

    Round 0 warms caches and buffers and is not kept.
    """
    found: dict[str, list] = {name: [] for name in names}
    end, number = time.perf_counter() + seconds, 0
    while number < 6 or (time.perf_counter() < end and number <= 400):
        for name in RNG.permutation(names).tolist():
            found[name].append(run(number, name))
        number += 1
    return {name: np.array(values[1:]) for name, values in found.items()}


def read_pool(library: ctypes.CDLL | None, pool: Pool, seconds: float) -> dict[str, NDArray]:
    """Seconds a crop of every reader, float [rounds]; library None: of compressed files."""
    side, reader = pool.files[0][1].shape[1], bandcrop.Reader(1)
    space = np.ones(BATCH * side * side, np.float32)
    methods: dict[str, Callable] = {name: partial(partial, peer) for name, peer in PEERS.items()}
    methods["bandcrop"] = lambda crops, out: partial(reader.fill, out, **fill_arguments(crops))
    if library:
        methods["limit"] = lambda crops, out: limit(library, pool, crops, None)
        methods["with floats"] = partial(limit, library, pool)

    def read(number: int, name: str) -> float:
        # One size a round, of a sequence that covers areas and ratios evenly; peers are slow
        h, w = random_size((number * 0.618034) % 1, (number * 0.754878) % 1, side)
        count = 4 if name in PEERS else BATCH
        out = space[: count * h * w].reshape(count, 1, h, w)
        crops = draw_crops(pool, count, (h, w))
        run = methods[name](crops, out)
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        if number == 0 and name != "limit" and not right(crops, out):
            raise SystemExit(f"{name} reads other pixels of {crops[0][0]}")
        return seconds / count

    return measure(seconds, list(methods), read)


def bench_read(folder: Path, share: float) -> None:
    rows, library = [], compile_limit(folder)
    for layout, form in LAYOUTS.items():
        codec = form[-1].get("compression", "none")
        if codec.replace("zlib", "deflate") not in bandcrop.codecs():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            pool = write_pool(place, share, *form)
            times = read_pool(library if codec == "none" else None, pool, 6 * share)
        ours, names = times["bandcrop"], ("limit", "with floats", "bandcrop", *PEERS)
        best = min((times[name] for name in PEERS), key=np.median, default=None)
        micros = {name: f"{1e6 * np.median(times[name]):.0f}" for name in times}
        rows.append([
            layout, *[micros.get(name, "-") for name in names],
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


def prepare(path: str, cold: bool) -> None:
    """Have a file in the page cache, or not."""
    with open(path, "rb") as file:
        file.read()
        if cold:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_pairs(folder: Path, share: float) -> None:
    views = np.ones((2, BATCH, 1, VIEW, VIEW), np.float32)
    pools, repacked = [], []
    for layout in ("S2 interleaved", "S1 interleaved"):
        pools.append(write_pool(tempfile.mkdtemp(dir=folder), share, *LAYOUTS[layout]))
        there = deque((f"{path}.repacked.tif", tile) for path, tile in pools[-1].files)
        for (path, _), (new, _) in zip(pools[-1].files, there, strict=True):
            repack(Path(path), Path(new), None)
        repacked.append(pools[-1]._replace(files=there))
    one, two = bandcrop.Reader(1), bandcrop.Reader(2)
    usage = partial(resource.getrusage, resource.RUSAGE_SELF)
    methods = {  # reader, archive, cold
        "1 thread": (one, pools, False),
        "2 threads": (two, pools, False),
        "2 threads, repacked": (two, repacked, False),
        "2 threads, cold": (two, pools, True),
        "2 threads, cold, repacked": (two, repacked, True),
    }

    def read(number: int, name: str) -> NDArray:
        """Seconds, KB of pixels and KB from the disk of a pair."""
        reader, archive, cold = methods[name]
        draws = [draw_crops(pool, BATCH) for pool in archive]
        for path, *_ in draws[0] + draws[1]:
            prepare(path, cold)
        before, begin = usage().ru_inblock, time.perf_counter()
        tickets = [reader.submit(view, **fill_arguments(crops))
                   for view, crops in zip(views, draws, strict=True)]  # fmt: skip
        asked = sum(ticket.wait().bytes_read for ticket in tickets)
        seconds = time.perf_counter() - begin
        disk = 512 * (usage().ru_inblock - before)
        return np.array([seconds, asked / 1e3, disk / 1e3]) / BATCH

    found = measure(30 * share, list(methods), read)
    rows = []
    for name, rounds in found.items():
        other = name.removesuffix(", repacked") if "repacked" in name else "1 thread"
        seconds, asked, disk = rounds.T
        faster = f"{show(median(found[other][:, 0] / seconds))} ({other})"
        numbers = [f"{value:.0f}" for value in (1 / np.median(seconds), asked.mean(), disk.mean())]
        rows.append([name, numbers[0], faster, *numbers[1:]])
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

    share, load = 0.06 if args.quick else 1.0, os.getloadavg()[0]
    print(f"Measured {time.strftime('%Y-%m-%d %H:%M')} on {hardware()}; load {load:.1f} before.")
    print("Times: medians; ratios: median [95 % interval] over the rounds.", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench_loader.") as folder:
        bench_read(Path(folder), share)
        bench_pairs(Path(folder), share)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")


if __name__ == "__main__":
    main()
