"""RS-BYOL pre-training: pairs of Sentinel-2 and Sentinel-1 tiles in, an encoder out, no labels.

BYOL (Grill et al. 2020) where the two views of a place come from two sensors. A student (encoder,
projector, predictor) sees one view and predicts what a teacher (encoder, projector; a moving
average of the student, no gradient) says of the other. Afterwards the heads are dropped and the
student's encoder is kept: encoder.safetensors, torchvision's names.

    python pretrain.py --mode single                       RS-BYOL-1: one MS band, one SAR band
    python pretrain.py --mode single --num-pairs 150000    RS-BYOL-1 w/150K
    python pretrain.py --mode single --batch-size 64       RS-BYOL-1 w/64BS
    python pretrain.py --mode single --views ms-ms         RS-BYOL-1 MS only: two MS bands
    python pretrain.py --mode three                        RS-BYOL-3 S1S2: 3 MS; VV, VH and a copy
    python pretrain.py --mode rgb                          RS-BYOL-3 RGB-S1S2: RGB; a SAR and 2 MS

    python pretrain.py --mode single --resume              go on after any interruption
    torchrun --nproc-per-node=4 pretrain.py --mode single  four GPUs, the same global batch
    python pretrain.py --mode three --pairs FILE.csv --s2-bands B02,B03,B04,B08 --s1-bands VV,VH

A run's folder: config.json (settings, versions, band statistics), log.jsonl (all but "timing" is
the same, bit for bit, for a run that was interrupted and resumed on one CPU thread),
checkpoint.pt, encoder.safetensors, encoder-epochNNNN.safetensors at each restart cycle's end,
views.png (the first batch as the networks see it), bad_tiles.txt.
On 20 real pairs (resnet18, size 64, 30 epochs, one thread of a busy 2-core CPU, bf16, November
2026): loss 4.06 to 0.87, std 0.050 to 0.036 (0.0625 is healthy), data wait under 1 %.
Exit status: 0 done, 1 bad data or diverged, 2 wrong use, 130 or 143 saved and stopped by a signal.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import fcntl
import glob
import hashlib
import json
import math
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

# >>> shared: bands
BANDS = {  # the paper's name: Sentinel's name; ten MS bands of 10 m and 20 m, two SAR polarisations
    "Blue": "B02", "Green": "B03", "Red": "B04", "RE5": "B05", "RE6": "B06", "RE7": "B07",
    "NIR": "B08", "NNIR": "B8A", "SWIR1": "B11", "SWIR2": "B12", "SAR1": "VV", "SAR2": "VH",
}  # fmt: skip
SAR = ("SAR1", "SAR2")
SEN12MS_S2 = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split()  # order in the file
SEN12MS_S1 = "VV VH".split()


def band_name(text: str) -> str:
    """The paper's name of a band given by either name, in any case: "b05" -> "RE5"."""
    for paper, sentinel in BANDS.items():
        if text.strip().lower() in (paper.lower(), sentinel.lower()):
            return paper
    known = ", ".join(f"{paper}/{sentinel}" for paper, sentinel in BANDS.items())
    fail(2, f"unknown band {text!r}: use one of {known}")


def fail(status: int, message: str) -> NoReturn:
    """End with one line on stderr: status 2 for wrong use, 1 for bad data."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


# <<< shared: bands


# >>> shared: files
def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it: readers see old or new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


# <<< shared: files

# Settings -----------------------------------------------------------------------------------------
RGB = ("Red", "Green", "Blue")
CHANNELS = {"single": 1, "three": 3, "rgb": 3}
VARIANTS = {  # name, random MS bands and SAR bands of a pair
    ("single", "ms-sar"): ("RS-BYOL-1", 1, 1),
    ("three", "ms-sar"): ("RS-BYOL-3 S1S2", 3, 2),
    ("rgb", "ms-sar"): ("RS-BYOL-3 RGB-S1S2", 2, 1),
    ("single", "ms-ms"): ("RS-BYOL-1 MS only", 2, 0),
    ("three", "ms-ms"): ("RS-BYOL-3 MS only", 6, 0),
    ("rgb", "ms-ms"): ("RS-BYOL-3 RGB MS only", 3, 0),
}
# What a resumed run may change: where things are and how long it goes on, never what is computed.
MAY_CHANGE = (
    "root", "pairs", "out", "resume", "threads", "device", "compile", "bad_tiles", "epochs",
    "max_steps", "checkpoint_every",
)  # fmt: skip
NO_ARCHIVE = """no archive in {root}: give --root DIR (SEN12MS layout) or --pairs FILE.csv
  SEN12MS (180,662 pairs, 500 GB): rsync or ftp, dataserv.ub.tum.de, user and password m1474000
  a synthetic one: python tests/synthetic.py data/demo, then --root data/demo/sen12ms"""


def number(kind: type, low: float, high: float = math.inf, count: int = 1) -> Callable:
    """An argparse type: `count` numbers from low to high, both included, with commas between."""

    def convert(text: str) -> float | list[float]:
        values = [kind(part) for part in text.split(",")]
        if len(values) != count or not all(low <= value <= high for value in values):
            raise argparse.ArgumentTypeError(f"{text} is not {count} from {low} to {high}")
        return values if count > 1 else values[0]

    convert.__name__ = kind.__name__  # argparse names it where kind() fails
    return convert


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="[open]: the paper does not say; the value is our choice, saved in config.json.",
    )
    parser.error = lambda message: fail(2, f"{message} (see --help)")
    whole, positive, share = number(int, 1), number(float, 0), number(float, 0, 1)

    # fmt: off
    data = parser.add_argument_group("data")
    add = data.add_mutually_exclusive_group().add_argument
    add("--root", help="folder in SEN12MS layout (default: data/sen12ms)")
    add("--pairs", metavar="CSV", help="any archive: columns s1,s2, paths relative to the file")
    add = data.add_argument
    add("--s2-bands", default=",".join(SEN12MS_S2), help="band order in S2 files; - skips one")
    add("--s1-bands", default=",".join(SEN12MS_S1), help="band order in S1 files; - skips one")
    add("--num-pairs", type=whole, default=90000, help="seeded subset (paper: 90000, 150000)")
    add("--mode", choices=CHANNELS, required=True, help="channels of the views, as above")
    add("--views", choices=("ms-sar", "ms-ms"), default="ms-sar", help="ms-ms: no SAR view")
    add("--bad-tiles", choices=("stop", "skip"), default="stop",
        help="skip: the next good pair of the epoch instead, up to 1 %% of the pairs")

    add = parser.add_argument_group("model").add_argument
    archs = ("resnet18", "resnet34", "resnet50")
    add("--arch", choices=archs, default="resnet50", help="encoder (paper: resnet50)")
    add("--size", type=number(int, 16), default=224, help="side of a view, pixels [open]")
    add("--hidden", type=whole, default=256, help="width of projector and predictor (paper: 256)")
    add("--projection", type=number(int, 2), default=256, help="projector's output (paper: 256)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=number(int, 2), default=32, help="of all processes (paper: 32, 64)")
    add("--epochs", type=whole, default=400, help="passes over the pairs (paper: 400)")
    add("--lr", type=positive, default=0.2, help="highest learning rate (paper: 0.2)")
    add("--lr-min", type=positive, default=0.002, help="lowest, per step (paper: 0.002)")
    add("--restart-epochs", type=whole, default=10, help="first cosine cycle (paper: 10)")
    add("--restart-mult", type=whole, default=2, help="next cycle / this cycle (paper: 2)")
    add("--momentum", type=share, default=0.9, help="of SGD [open]")
    add("--weight-decay", type=positive, default=1e-5, help="of all weights (paper: 1e-5)")
    add("--tau", type=share, default=0.9, help="teacher's decay a step (paper: 0.9; BYOL: 0.99+)")

    add = parser.add_argument_group("augmentation, drawn for each view").add_argument
    add("--crop-area", type=number(float, 0.001, 1), default=0.08,
        help="smallest share of the tile; 1: whole tile (BYOL: 0.08) [open]")
    add("--crop-ratio", type=number(float, 1), default=4 / 3,
        help="widest ratio of sides, R or 1/R (BYOL: 4/3) [open]")
    add("--orient", type=int, choices=(1, 4, 8), default=8,
        help="8: flips and quarter turns, 4: flips, 1: off [open]")
    add("--rotate", type=share, default=0.5, help="probability of a small rotation; 0: off [open]")
    add("--rotate-degrees", type=number(float, 0, 180), default=10.0, help="largest turn [open]")
    add("--blur", type=number(float, 0, 1, 2), default=[1.0, 0.1], metavar="A,B",
        help="probabilities; which view gets which is drawn too (BYOL: 1,0.1) [open]")
    add("--blur-sigma", type=number(float, 0.01, 100, 2), default=[0.1, 2.0], metavar="LOW,HIGH",
        help="in pixels of the view; the kernel spans size/10 (BYOL: 0.1,2) [open]")
    add("--erase", type=share, default=0.5,
        help="probability that a box of 2 to 33 %% becomes the band's mean; 0: off [open]")
    add("--grey", type=share, default=0.2,
        help="probability of greyscale, three channels only (BYOL: 0.2) [open]")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/ and the variant's name)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of weights, pairs and every draw")
    add("--threads", type=number(int, 0), default=0, help="reading threads; 0: one a processor")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 where native (CUDA; CPU with AVX512-BF16 or AMX), else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA, one process")
    add("--log-every", type=whole, default=50, help="steps a log line; at least one an epoch")
    add("--checkpoint-every", type=number(int, 0), default=0,
        help="steps; 0: as often as costs under 1 %% of the time, at most once a minute")
    add("--max-steps", type=whole, help="stop after so many steps in all")
    # fmt: on
    return parser


# Data: which pairs there are, and what sample i of epoch e is -------------------------------------
class Archive(NamedTuple):
    names: list[str]  # one a pair: its S2 path in the archive, sorted
    files: tuple[list[str], list[str]]  # S2 paths, S1 paths
    bands: list[str]  # the paper's names of the bands that this mode uses: MS first, then SAR
    place: np.ndarray  # int64 [bands, 2]: 0 S2 file or 1 S1 file; 0-based band in that file
    widths: tuple[int, int]  # bands that an S2 and an S1 file must have
    synthetic: bool


def list_sen12ms(root: Path) -> list[tuple[str, str]]:
    """(S2, S1) paths relative to root of ROIs*/s2_<scene>/*_s2_*.tif and their twins."""
    s2, s1 = (glob.glob(f"ROIs*/{s}_*/*_{s}_*.tif", root_dir=root) for s in ("s2", "s1"))
    twins = {path.replace("/s2_", "/s1_").replace("_s2_", "_s1_"): path for path in s2}
    if alone := sorted(twins.keys() ^ set(s1)):
        sensor, path = ("S1", twins[alone[0]]) if alone[0] in twins else ("S2", alone[0])
        fail(1, f"{root / path} has no {sensor} twin ({len(alone)} such tiles): fetch what is "
             "missing or move them away")  # fmt: skip
    return sorted((path, twin) for twin, path in twins.items())


def list_csv(path: Path) -> list[tuple[str, str]]:
    """(S2, S1) paths of a CSV with columns s1 and s2; other columns are left alone."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        fail(2, f"{path} cannot be read as a CSV with the header s1,s2: {error}")
    for line, row in enumerate(rows, start=2):
        for column in ("s1", "s2"):
            file = path.parent / (row.get(column) or "")
            if not file.is_file():
                fail(1, f"{path}: line {line}, column {column} (header: s1,s2): no file {file}")
    return sorted((row["s2"], row["s1"]) for row in rows)


def open_archive(args: argparse.Namespace) -> Archive:
    """List the pairs, check that the mode has its bands, draw the seeded subset."""
    root = Path(args.pairs).parent if args.pairs else Path(args.root or "data/sen12ms")
    listed = list_csv(Path(args.pairs)) if args.pairs else list_sen12ms(root)
    if not listed:
        fail(2, NO_ARCHIVE.format(root=args.pairs or root))

    orders = args.s2_bands.split(","), args.s1_bands.split(",")
    place: dict[str, tuple[int, int]] = {}  # band: 0 S2 file or 1 S1 file; 0-based band in it
    for sensor, order in enumerate(orders):
        for at, text in enumerate(order):
            if text.strip().upper() in ("-", "B01", "B09", "B10"):  # not wanted; the 60 m bands
                continue
            band = band_name(text)
            if band in place or (band in SAR) != sensor:
                fail(2, f"--s{2 - sensor}-bands {','.join(order)}: {band}/{BANDS[band]} stands "
                     "twice or in the wrong file")  # fmt: skip
            place[band] = sensor, at

    ms, sar = ([b for b in BANDS if b in place and (b in SAR) == s] for s in (False, True))
    rgb = RGB if args.mode == "rgb" else ()
    _, need_ms, need_sar = VARIANTS[args.mode, args.views]
    if not {*rgb} <= {*ms} or len(ms) < len(rgb) + need_ms or len(sar) < need_sar:
        free = ", ".join(band for band in BANDS if band not in SAR + rgb)
        wants = [*rgb, f"{need_ms} of {free}"]
        wants += [f"{need_sar} of SAR1, SAR2"] if need_sar else []
        fail(2, f"--mode {args.mode} --views {args.views} needs {', '.join(wants)}; this archive "
             f"has {', '.join(ms + sar)}")  # fmt: skip

    if args.num_pairs < len(listed):  # the stream that no epoch uses
        keys = stream(args.seed, 2**64 - 1).random(len(listed))
        listed = [listed[i] for i in np.sort(np.argsort(keys, kind="stable")[: args.num_pairs])]
    s2, s1 = zip(*listed, strict=True)
    use = ms + sar if need_sar else ms
    return Archive(
        list(s2), ([str(root / path) for path in s2], [str(root / path) for path in s1]),
        use, np.array([place[band] for band in use]), (len(orders[0]), len(orders[1])),
        (root / "SYNTHETIC.txt").exists(),
    )  # fmt: skip


def band_statistics(archive: Archive, seed: int, bad_tiles: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each band over up to 256 pairs; NaN and nodata left out."""
    from bandcrop import TileError, info, read

    chosen = stream(seed, 2**64 - 2).permutation(len(archive.names))[:256]
    moments = np.zeros((3, len(archive.bands)))  # count, sum, sum of squares
    for pair in chosen:
        for sensor in sorted(set(archive.place[:, 0])):
            path, columns = archive.files[sensor][pair], archive.place[:, 0] == sensor
            try:
                tile = info(path)
                if tile.bands != archive.widths[sensor]:
                    fail(1, f"{path} has {tile.bands} bands, --s{2 - sensor}-bands names "
                         f"{archive.widths[sensor]}")  # fmt: skip
                values = read(path, archive.place[columns, 1].tolist())
            except TileError as error:
                if bad_tiles == "stop":
                    fail(1, f"{error} (--bad-tiles skip goes on without it)")
                continue
            for band, x in zip(np.flatnonzero(columns), values, strict=True):
                good = x[np.isfinite(x) & (x != tile.nodata)].astype(np.float64)
                moments[:, band] += good.size, good.sum(), good @ good
    count, total, square = moments
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 0))
    for band, value in zip(archive.bands, std, strict=True):
        if value == 0:
            fail(1, f"band {band}/{BANDS[band]} is empty or constant in {len(chosen)} tiles")
    return mean.tolist(), std.tolist()


def stream(seed: int, number: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, number); epoch e uses number e."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


class Plan(NamedTuple):
    """What an epoch's samples are; row i is a pure function of (seed, epoch, i)."""

    pairs: np.ndarray  # int64 [n]: index in the archive
    bands: np.ndarray  # int64 [n, 2, C]: index in archive.bands
    windows: np.ndarray  # float64 [n, 2, 4]: top, left, height, width, fractions of the tile
    orient: np.ndarray  # uint8 [n, 2]
    draws: np.ndarray  # float32 [n, 2, 7]: angle, sigma, top, left, bottom, right, grey


def boxes(u: np.ndarray, smallest: float, largest: float, widest: float) -> np.ndarray:
    """Uniform draws [4, n] -> boxes [n, 4] = top, left, height, width in the unit square.

    Area uniform; the log of width / height uniform where the box fits, so that nothing is rejected
    and redrawn (torchvision redraws, which favours small areas); position uniform.
    """
    area = smallest + (largest - smallest) * u[0]
    tallest = np.maximum(np.log(area), -math.log(widest))  # width / height, log
    ratio = np.exp(tallest * (1 - 2 * u[1]))
    height, width = np.minimum(np.sqrt([area / ratio, area * ratio]), 1)
    return np.stack([u[2] * (1 - height), u[3] * (1 - width), height, width], axis=1)


def choose_bands(u: np.ndarray, bands: list[str], mode: str, views: str) -> np.ndarray:
    """Uniform draws [n, 15] -> index in `bands` for each view and channel, [n, 2, C]."""
    rgb = [bands.index(b) for b in RGB] if mode == "rgb" else []
    ms = np.array([i for i, b in enumerate(bands) if b not in SAR and i not in rgb])
    sar = np.array([i for i, b in enumerate(bands) if b in SAR])

    def pick(pool: np.ndarray, u: np.ndarray, k: int) -> np.ndarray:  # k of pool, no repeats
        return pool[np.argsort(u[:, : len(pool)], axis=1, kind="stable")[:, :k]]

    drawn = pick(ms, u[:, :10], VARIANTS[mode, views][1])
    if mode == "rgb":
        a, b = np.tile(rgb, (len(u), 1)), drawn
    else:
        a, b = np.hsplit(drawn, [CHANNELS[mode]])
    if views == "ms-sar":
        b = np.hstack([b, pick(sar, u[:, 10:12], 1)])
        if mode == "three":
            b = np.hstack([b, np.tile(sar, (len(u), 1))])
    if mode != "single":  # the other sensor's channels in random order
        b = np.take_along_axis(b, np.argsort(u[:, 12:15], axis=1, kind="stable"), axis=1)
    return np.stack([a, b], axis=1)


def plan_epoch(epoch: int, pairs: int, bands: list[str], args: argparse.Namespace) -> Plan:
    """Draw a whole epoch: neither batch size, threads nor processes enter."""
    random = stream(args.seed, epoch)
    order = np.argsort(random.random(pairs), kind="stable")
    u = random.random((pairs, 46))
    swap = (u[:, 45] < 0.5).astype(int)
    windows, orient, draws = [], [], []
    for view in (0, 1):
        v = u[:, 15 + 15 * view : 30 + 15 * view].T
        windows.append(boxes(v[0:4], args.crop_area, 1.0, args.crop_ratio))
        orient.append(np.floor(v[4] * args.orient).astype(np.uint8))
        angle = np.deg2rad(args.rotate_degrees) * (2 * v[6] - 1) * (v[5] < args.rotate)
        low, high = args.blur_sigma
        sigma = (low + (high - low) * v[8]) * (v[7] < np.array(args.blur)[swap ^ view])
        # torchvision's RandomErasing: area 2 to 33 %, ratio 0.3 to 3.3
        top, left, height, width = np.rint(boxes(v[10:14], 0.02, 0.33, 10 / 3).T * args.size)
        edges = np.stack([top, left, top + height, left + width]) * (v[9] < args.erase)
        draws.append(np.stack([angle, sigma, *edges, v[14] < args.grey], axis=1))
    chosen = choose_bands(u[:, :15], bands, args.mode, args.views)
    together = [np.stack(part, axis=1) for part in (windows, orient, draws)]
    return Plan(order, chosen, together[0], together[1], together[2].astype(np.float32))


# Before torch is imported: everything that can be refused -----------------------------------------
def prepare() -> tuple[argparse.Namespace, Archive, dict]:
    """Flags, archive, the run's folder and its config: as it was, or new and not yet written."""
    args = make_parser().parse_args()
    needs = ("bandcrop", "torch", "torchvision", "safetensors", "PIL")
    if missing := [name for name in needs if util.find_spec(name) is None]:
        fail(2, f"not installed in {sys.executable}: {', '.join(missing)}; run make build")
    archive = open_archive(args)
    pairs = len(archive.names)
    if pairs < args.batch_size:
        fail(2, f"{pairs} pairs fill no batch: use --batch-size {pairs} or less")
    name, _, _ = VARIANTS[args.mode, args.views]
    if name == "RS-BYOL-1":
        name += " w/150K" * (pairs == 150000) + " w/64BS" * (args.batch_size == 64)
    args.out = args.out or Path("runs", name.lower().replace(" ", "-").replace("/", "-"))
    if os.environ.get("RANK", "0") != "0":
        return args, archive, {}  # torchrun: start() sends the first process's config
    kind = "synthetic pairs" if archive.synthetic else "pairs"
    source = args.pairs or args.root or "data/sen12ms"
    fewer = f" (fewer than --num-pairs {args.num_pairs})" if pairs < args.num_pairs else ""
    print(f"{name}: {pairs} {kind} of {source}{fewer} -> {args.out}", flush=True)

    settings = vars(args) | {"out": str(args.out)}
    sha = hashlib.sha256("\n".join(archive.names).encode()).hexdigest()
    listed = {"used": pairs, "sha256": sha, "synthetic": archive.synthetic}
    config = old_config(args, settings, listed)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
        # Held until the process ends, however it ends: two runs never write into one folder.
        args.lock = os.open(args.out, os.O_RDONLY)
        fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(2, f"another process is writing to {args.out}: choose another --out")
    except OSError as error:
        fail(2, f"cannot write to {args.out}: {error.strerror}: choose another --out")
    for left_behind in args.out.glob(".*.part"):
        left_behind.unlink()
    if config:
        return args, archive, config

    mean, std = band_statistics(archive, args.seed, args.bad_tiles)
    opened = [a.dest for a in make_parser()._actions if "[open]" in (a.help or "")]
    packages = ("torch", "torchvision", "numpy", "safetensors")
    return args, archive, {
        "schema": 1, "name": name, "settings": settings,
        "paper_leaves_open": {key: settings[key] for key in opened},
        "pairs": listed, "bands": {"names": archive.bands, "mean": mean, "std": std},
        "versions": {p: metadata.version(p) for p in packages} | {"python": sys.version.split()[0]},
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def old_config(args: argparse.Namespace, settings: dict, listed: dict) -> dict | None:
    """The config of the run in --out, None where there is none; refused unless it is this run's."""
    file = args.out / "config.json"
    if not file.exists():
        return None
    if not args.resume:
        fail(2, f"{args.out} holds another run: --resume goes on with it, or choose another --out")
    try:
        config = json.loads(file.read_text())
        old, pairs = config["settings"], config["pairs"]
    except (ValueError, KeyError) as error:
        fail(1, f"{file} is not a run's config ({error}): choose another --out")
    changed = [
        f"--{key.replace('_', '-')} was {old.get(key)}, is {value}"
        for key, value in settings.items()
        if key not in MAY_CHANGE and value != old.get(key)
    ]
    if pairs["sha256"] != listed["sha256"]:
        changed.append(f"the list of pairs (then {pairs['used']}, now {listed['used']})")
    if changed:
        fail(2, f"{args.out} was started otherwise: {'; '.join(changed)}")
    return config


# Torch takes seconds to import: a mistyped flag or a missing folder has been answered by now.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    PREPARED = prepare()

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402


# Model --------------------------------------------------------------------------------------------
def head(features: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class Network(nn.Module):
    """Encoder and heads. The teacher has no predictor."""

    def __init__(self, arch: str, channels: int, hidden: int, projection: int):
        super().__init__()
        self.encoder = getattr(torchvision.models, arch)(weights=None)
        if channels != 3:
            stem = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # theirs
            self.encoder.conv1 = stem
        features = self.encoder.fc.in_features
        self.encoder.fc = nn.Identity()
        self.projector = head(features, hidden, projection)
        self.predictor: nn.Sequential | None = head(projection, hidden, projection)

    def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """Two views [N, C, S, S] -> projections of a and b, predictions of a and b, each [N, D].

        Each view passes on its own, so that BatchNorm's statistics never mix the two sensors. One
        call for both: DistributedDataParallel wants one forward a backward.
        """
        z = [self.projector(self.encoder(x)) for x in (a, b)]
        return z + [self.predictor(x) for x in z] if self.predictor is not None else z


def make_teacher(student: Network) -> Network:
    """A copy without predictor, without gradient and without shared storage."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.predictor = None
    return teacher


def synchronise_batchnorm(network: Network, device: torch.device) -> Network:
    """BatchNorm over the batches of all processes."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    from torch.distributed.nn.functional import all_gather  # differentiable

    rank, world = dist.get_rank(), dist.get_world_size()
    for module in network.modules():  # torch's does not run on the CPU: normalise all, keep ours
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, x: torch.cat(all_gather(x[0])))
            module.register_forward_hook(lambda _, x, y: y.unflatten(0, (world, -1))[rank])
    return network


# Augmentation on the device: one batched pass, each sample with its own draw ----------------------
@lru_cache(maxsize=2)
def shifts(size: int, device: torch.device) -> Tensor:
    """[2r + 1, size * size]: shifts by -r..r as matrices, mirrored at borders; r = size/20."""
    radius = size // 20
    offset = torch.arange(-radius, radius + 1)[:, None] + torch.arange(size)  # [k, size]
    source = (size - 1 - (size - 1 - offset.abs()).abs()).to(device)
    return F.one_hot(source, size).float().flatten(1)


def augment(x: Tensor, draws: Tensor, args: argparse.Namespace) -> Tensor:
    """Rotation, blur, greyscale, erasing of normalised views; 0 is the band's mean.

    x [N, C, S, S], draws [N, 7] = angle (radians, counter-clockwise), sigma (pixels), erased box
    (top, left, bottom, right in pixels), grey (0 or 1), all 0 where off. Returns [N, C, S, S].
    """
    angle, sigma, top, left, bottom, right, grey = draws.unbind(1)
    size = x.shape[-1]
    if args.rotate:
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    if any(args.blur):  # as two products with a banded matrix a sample: fast on every device
        at = torch.arange(-(size // 20), size // 20 + 1, device=x.device)
        weight = torch.exp(-0.5 * (at / sigma.clamp(min=1e-3)[:, None]) ** 2)  # [N, k]
        weight = weight / weight.sum(1, keepdim=True)
        blur = (weight @ shifts(size, x.device)).view(-1, 1, size, size)
        x = blur @ x @ blur.mT
    if args.grey and x.shape[1] == 3:
        x = torch.where(grey.view(-1, 1, 1, 1) > 0, x.mean(1, keepdim=True), x)
    if args.erase:
        at = torch.arange(size, device=x.device)
        rows = (at >= top[:, None]) & (at < bottom[:, None])  # [N, S]
        columns = (at >= left[:, None]) & (at < right[:, None])
        x = x.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)
    return x


# Loss, EMA, schedule ------------------------------------------------------------------------------
def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos, i.e. the squared distance of the L2-normalised vectors; mean over N."""
    return (2 - 2 * F.cosine_similarity(prediction, target, dim=1)).mean()


def step_loss(student: nn.Module, teacher: Network, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric loss, and [loss, spread of the projection, cosine of the positives] to watch."""
    with torch.no_grad():
        targets = teacher(a, b)
    outputs = [*student(a, b), *targets]  # under autocast bf16; from here on float32 or more
    outputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in outputs]
    z_a, z_b, p_a, p_b, t_a, t_b = outputs
    loss = byol_loss(p_a, t_b) + byol_loss(p_b, t_a)
    with torch.no_grad():
        n_a, n_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
        spread = (n_a.std(0).mean() + n_b.std(0).mean()) / 2
        watch = torch.stack([loss.detach(), spread, (n_a * n_b).sum(1).mean()])
    return loss, watch


@torch.no_grad()
def update_teacher(teacher: Network, student: Network, tau: float) -> None:
    """teacher = tau * teacher + (1 - tau) * student, for weights only.

    BatchNorm's running statistics stay each network's own: both train on batch statistics, as in
    BYOL, so nothing ever reads the teacher's.
    """
    weights = dict(student.named_parameters())
    pairs = [(t, weights[name]) for name, t in teacher.named_parameters()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - tau)


def make_optimizer(network: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    return torch.optim.SGD(
        network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )


def train_step(
    model: nn.Module, teacher: Network, optimizer: torch.optim.Optimizer, a: Tensor, b: Tensor,
    tau: float, autocast: Callable[[], torch.autocast],
) -> Tensor:  # fmt: skip
    """Learn from one batch of views; returns what to watch. `model`: the student, or DDP of it."""
    with autocast():
        loss, watch = step_loss(model, teacher, a, b)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    update_teacher(teacher, getattr(model, "module", model), tau)
    return watch


def in_cycle(at: int, length: int, mult: int) -> tuple[int, int]:
    """Place in the restart cycle that `at` falls in, and that cycle's length."""
    while at >= length:
        at, length = at - length, length * mult
    return at, length


def learning_rate(step: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """Cosine annealing with warm restarts (Loshchilov and Hutter 2017) at one step."""
    at, length = in_cycle(step, args.restart_epochs * steps_per_epoch, args.restart_mult)
    return args.lr_min + (args.lr - args.lr_min) * (1 + math.cos(math.pi * at / length)) / 2


# Batches: read ahead into a ring of buffers while the device works --------------------------------
class Batch(NamedTuple):
    views: Tensor  # float32 [2, N, C, S, S] on the device, normalised
    draws: Tensor  # float32 [2, N, 7]
    plan: Plan
    rows: np.ndarray  # int64 [N]: the samples' places in the epoch
    waited: float  # seconds
    replaced: int  # NaN and nodata samples that became the band's mean


def batches(
    archive: Archive, stats: np.ndarray, args: argparse.Namespace, steps: range,
    device: torch.device, rank: int, world: int, bad: dict[str, str],
) -> Iterator[Batch]:  # fmt: skip
    """This process's slice of the global batches `steps`; stats float32 [2, bands] = mean, std.

    A bad pair is replaced by the next good one of the epoch, read with the sample's own draw: still
    a pure function of (seed, epoch, i) and the files. `bad` collects what was replaced.
    """
    import bandcrop

    reader = bandcrop.Reader(args.threads or max(1, len(os.sched_getaffinity(0)) // world))
    cuda = device.type == "cuda"
    pairs, local = len(archive.names), args.batch_size // world
    shape = (2, local, CHANNELS[args.mode], args.size, args.size)
    ring = [torch.empty(shape, pin_memory=cuda) for _ in range(3)]
    copied: list = [None] * 3
    copies = torch.cuda.Stream(device) if cuda else None
    under_way: deque = deque()

    @lru_cache(maxsize=1)
    def plan_of(epoch: int) -> Plan:
        return plan_epoch(epoch, pairs, archive.bands, args)

    def submit(views: Tensor, plan: Plan, rows: np.ndarray, which: np.ndarray) -> list:
        """Tickets that fill `views` [2, N, C, S, S] with pairs `which`, drawn as samples `rows`."""
        tickets = []
        for v, view in enumerate(views):
            chosen = plan.bands[rows, v]  # [N, C]
            file, band = archive.place[chosen].transpose(2, 0, 1)
            paths = [[archive.files[f][p] for f in fs] for fs, p in zip(file, which, strict=True)]
            if (file == file[:, :1]).all():  # else a file for each channel: a SAR and two MS bands
                paths = [files[0] for files in paths]
            tickets.append(reader.submit(
                view, paths, band, plan.windows[rows, v], plan.orient[rows, v],
                stats[0][chosen], stats[1][chosen], bad="report",
            ))  # fmt: skip
        return tickets

    def collect(tickets: list) -> tuple[int, dict[int, str]]:
        """Samples that became the mean; place in the batch -> what is wrong with its pair."""
        reports = [ticket.wait() for ticket in tickets]
        errors = dict(error for report in reversed(reports) for error in report.errors)
        return sum(int(report.replaced.sum()) for report in reports), errors

    def replace(views: Tensor, plan: Plan, row: int, message: str) -> int:
        """Fill `views` [2, 1, C, S, S] with the next good pair after sample `row`'s own."""
        for at in range(row, row + pairs):
            bad.setdefault(archive.names[plan.pairs[at % pairs]], message)
            if args.bad_tiles == "stop":
                fail(1, f"{message} (--bad-tiles skip goes on without it)")
            if len(bad) > 0.01 * pairs:
                fail(1, f"{len(bad)} of {pairs} pairs are bad, over 1 %: {message}")
            following = plan.pairs[[(at + 1) % pairs]]
            replaced, errors = collect(submit(views, plan, np.array([row]), following))
            if not errors:
                return replaced
            message = errors[0]
        fail(1, f"no good pair is left: {message}")

    for ahead in range(steps.start, steps.stop + 2):
        if ahead < steps.stop:
            epoch, at = divmod(ahead, pairs // args.batch_size)
            rows = np.arange(local) + at * args.batch_size + rank * local
            plan, slot = plan_of(epoch), ahead % 3
            if copied[slot] is not None:
                copied[slot].synchronize()
            tickets = submit(ring[slot], plan, rows, plan.pairs[rows])
            under_way.append((slot, plan, rows, tickets))
        if ahead < steps.start + 2:
            continue
        slot, plan, rows, tickets = under_way.popleft()
        began = time.perf_counter()
        replaced, errors = collect(tickets)
        for place, message in sorted(errors.items()):
            replaced += replace(ring[slot][:, place : place + 1], plan, rows[place], message)
        waited = time.perf_counter() - began
        views, draws = ring[slot], torch.from_numpy(plan.draws[rows].swapaxes(0, 1))
        if copies is not None:  # beside the previous step's kernels
            with torch.cuda.stream(copies):
                views, draws = (x.to(device, non_blocking=True) for x in (views, draws))
                copied[slot] = copies.record_event()
            torch.cuda.current_stream().wait_stream(copies)
            views.record_stream(torch.cuda.current_stream())
            draws.record_stream(torch.cuda.current_stream())
        yield Batch(views, draws, plan, rows, waited, replaced)


def draw_views(path: Path, views: Tensor, batch: Batch, bands: list[str]) -> None:
    """Up to eight pairs as the networks see them: view a above view b, mean grey, +-2.5 std."""
    from PIL import Image, ImageDraw

    count, side = min(8, views.shape[1]), max(96, views.shape[-1])
    sheet = Image.new("RGB", (count * (side + 4), 2 * (side + 18)), "white")
    write = ImageDraw.Draw(sheet)
    for view in (0, 1):
        for i in range(count):
            image = ((views[view, i].float().cpu() / 5 + 0.5).clamp(0, 1) * 255).byte().numpy()
            tile = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            left, top = i * (side + 4), view * (side + 18)
            sheet.paste(tile.convert("RGB").resize((side, side)), (left, top))
            names = [bands[b] for b in batch.plan.bands[batch.rows[i], view]]
            write.text((left, top + side + 2), " ".join(names), fill="black")
    write_atomic(path, lambda beside: sheet.save(beside, format="PNG"))


# Checkpoint ---------------------------------------------------------------------------------------
def save_encoder(path: Path, student: Network, config: dict, epoch: float) -> None:
    """The student's encoder under torchvision's names; metadata says what it is and saw."""
    settings, bands = config["settings"], config["bands"]
    about = {
        "name": config["name"], "epoch": f"{epoch:g}", "command": config["command"],
        "bands": json.dumps(bands["names"]), "mean": json.dumps(bands["mean"]),
        "std": json.dumps(bands["std"]), "synthetic": str(config["pairs"]["synthetic"]).lower(),
        "pairs": str(config["pairs"]["used"]),
    } | {key: str(settings[key]) for key in ("arch", "mode", "views", "seed", "size")}  # fmt: skip
    tensors = {k: v.cpu().contiguous() for k, v in student.encoder.state_dict().items()}
    data = safetensors.torch.save(tensors, about)
    write_atomic(path, lambda beside: beside.write_bytes(data) and None)


def save(out: Path, config: dict, student: Network, epoch: float, state: dict) -> None:
    """encoder.safetensors and checkpoint.pt; a full disk costs this save, never the one before.

    The checkpoint comes last: a run killed in between takes the steps again and writes both.
    """

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            torch.save(state, file)

    try:
        save_encoder(out / "encoder.safetensors", student, config, epoch)
        write_atomic(out / "checkpoint.pt", write)
    except (OSError, RuntimeError) as error:  # torch and safetensors say RuntimeError too
        why = f"cannot save to {out}: {reason(error)}"
        fail(1, f"{why}: the last checkpoint is whole: make room, then --resume")


def reason(error: Exception) -> str:
    """An error's first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda beside: beside.write_text(text) and None)


def resume_log(path: Path, step: int) -> None:
    """Cut what was logged after the checkpoint: those steps are taken again."""
    kept = ""
    for line in path.read_text(errors="replace").splitlines(True) if path.exists() else []:
        torn = not (line.startswith("{") and line.endswith("}\n"))  # by a full disk, a lost machine
        if torn or json.loads(line)["step"] > step:
            break
        kept += line
    write_text(path, kept)


# Loop ---------------------------------------------------------------------------------------------
# >>> shared: precision
def native_bf16(device: torch.device) -> bool:
    """Whether this device computes in bf16 faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# <<< shared: precision


def start(args: argparse.Namespace, config: dict) -> tuple[dict, torch.device, int, int]:
    """Settle device, processes and precision; write a new run's config.json."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(2, f"--device {name} cannot be used: {reason(error)}")
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(2, f"--batch-size {args.batch_size} is not 2 or more for each of {world} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        shared = [config]
        dist.broadcast_object_list(shared, device=device)
        config = shared[0]
    if "precision" not in config:  # "auto" is settled once: a resumed run keeps it on any machine
        auto = "bf16" if native_bf16(device) else "fp32"
        config["precision"] = auto if args.precision == "auto" else args.precision
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        threads = torch.get_num_threads()
        config["hardware"] = {"device": hardware, "torch_threads": threads, "processes": world}
        if rank == 0:
            write_text(args.out / "config.json", json.dumps(config, indent=1))
    return config, device, rank, world


def compile_networks(student: Network, teacher: Network, example: Tensor, autocast) -> None:
    """torch.compile both, tried forward and backward on the spot; on any failure go on without."""
    networks = (student, teacher)
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    try:
        for network in networks:
            network.compile(dynamic=False)
        with autocast():
            loss, _ = step_loss(student, teacher, example, example)
        loss.backward()
    except Exception as error:  # a missing compiler, an unsupported card: many types
        print(f"torch.compile fails here: {reason(error)}: going on without it", file=sys.stderr)
        for network in networks:
            network._compiled_call_impl = None
    for network, state in zip(networks, before, strict=True):
        network.load_state_dict(state)
    student.zero_grad(set_to_none=True)


def agree(sums: Tensor, bad: dict[str, str], asked: list[int], world: int) -> list[int]:
    """Share sums and bad tiles among processes at the same step; signals that any of them got."""
    dist.all_reduce(sums)
    sums[:3] /= world  # means; the fourth is a count
    everyone: list = [None] * world
    dist.all_gather_object(everyone, (bad, asked))
    for theirs, _ in everyone:
        bad.update(theirs)
    return [signum for _, signals in everyone for signum in signals]


def build(args: argparse.Namespace, device: torch.device, world: int) -> tuple:
    """Student, teacher and optimiser of a new run, and its state: what a checkpoint holds."""
    torch.manual_seed(args.seed)  # the only use of torch's generator: the first weights
    student = Network(args.arch, CHANNELS[args.mode], args.hidden, args.projection)
    student = student.to(device, memory_format=torch.channels_last)
    if world > 1:
        student = synchronise_batchnorm(student, device)
    teacher = make_teacher(student)
    optimizer = make_optimizer(student, args)
    step, bad = 0, {}
    sums = torch.zeros(4, device=device)  # since the last log line: watch (3), replaced
    path = args.out / "checkpoint.pt"
    if path.exists():
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            fail(1, f"{path} is damaged ({reason(error)}): start again with another --out")
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        step, bad, sums = state["step"], state["bad"], state["sums"][:4]
    return student, teacher, optimizer, step, bad, sums


def main(args: argparse.Namespace, archive: Archive, config: dict) -> int:
    config, device, rank, world = start(args, config)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, config["precision"] == "bf16")
    student, teacher, optimizer, step, bad, sums = build(args, device, world)
    out, first = args.out, rank == 0
    sums[3] *= first  # a count that is summed over processes, not a mean
    per_epoch = len(archive.names) // args.batch_size
    end = min(args.epochs * per_epoch, args.max_steps or sys.maxsize)
    if args.resume and first:
        print(f"resumed at step {step} of {end}" if step else "no checkpoint yet: from the start")
        resume_log(out / "log.jsonl", step)
    if step >= end:
        print(f"nothing left to do: step {step} of {end}")
        return 0
    if args.compile or (args.compile is None and device.type == "cuda" and world == 1):
        shape = (args.batch_size // world, CHANNELS[args.mode], args.size, args.size)
        example = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
        compile_networks(student, teacher, example, autocast)
    model: nn.Module = student
    if world > 1:
        model = nn.parallel.DistributedDataParallel(student)

    asked: list[int] = []  # the signals that asked to stop

    def ask(signum: int, frame: object) -> None:
        asked.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second one leaves at once

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)

    stats = np.array([config["bands"]["mean"], config["bands"]["std"]], np.float32)
    log_every, healthy = min(args.log_every, per_epoch), args.projection**-0.5
    terminal = sys.stdout.isatty()
    log = open(out / "log.jsonl" if first else os.devnull, "a")
    began = shown = saved = since = time.monotonic()
    save_seconds, waited, taken, listed = 0.0, 0.0, 0, 0
    warned = not first  # of a collapse: once, by one process

    for batch in batches(archive, stats, args, range(step, end), device, rank, world, bad):
        lr = learning_rate(step, per_epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        views = augment(batch.views.flatten(0, 1), batch.draws.flatten(0, 1), args)
        a, b = views.contiguous(memory_format=torch.channels_last).chunk(2)  # [N, C, S, S] each
        if step == 0 and first:
            draw_views(out / "views.png", torch.stack([a, b]), batch, archive.bands)
        sums[:3] += train_step(model, teacher, optimizer, a, b, args.tau, autocast)
        sums[3] += batch.replaced
        step, taken, waited = step + 1, taken + 1, waited + batch.waited

        # What is due after this step: a log line, a progress line, a checkpoint
        now = time.monotonic()
        epoch_ends = step % per_epoch == 0
        count = (step - 1) % per_epoch % log_every + 1  # steps since the last log line
        line = epoch_ends or count == log_every
        stop = list(asked) if world == 1 else agree(sums, bad, asked, world) if line else []
        show = first and (epoch_ends or now - shown > (2 if terminal else 60))
        due = now - saved > max(60, 100 * save_seconds)
        if args.checkpoint_every:
            due = step % args.checkpoint_every == 0
        due = first and (due or stop or step == end)
        if first and len(bad) > listed:
            listed = len(bad)
            rows = [f"{pair}\t{message}\n" for pair, message in bad.items()]
            write_text(out / "bad_tiles.txt", "".join(rows))
        if not (line or show or due):
            continue

        total, spread, cosine, replaced = sums.tolist()  # waits for the device
        weights = student.parameters() if due else ()
        if not (math.isfinite(total) and all(bool(w.isfinite().all()) for w in weights)):
            fail(1, f"loss or weights are not finite by step {step}: {out} keeps its last good "
                 "checkpoint: lower --lr or --precision fp32")  # fmt: skip
        record = {
            "step": step, "epoch": step / per_epoch, "lr": lr, "loss": total / count,
            "std": spread / count, "cosine": cosine / count, "replaced": int(replaced),
            "timing": {
                "seconds": round(now - began, 3), "data_wait": round(waited / (now - since), 4),
                "pairs_per_second": round(taken * args.batch_size / (now - since), 2),
                "peak_memory_mb": peak_memory(device),
            },
        }  # fmt: skip
        if show:
            progress(record, end, args, terminal, epoch_ends)
            shown = now
        if line:
            log.write(json.dumps(record) + "\n")
            log.flush()
            sums.zero_()
            since, waited, taken = now, 0.0, 0
            if record["std"] < 0.1 * healthy and not warned:
                warned = True
                print(f"\nWARNING: COLLAPSE: the projection's std is {record['std']:.2g}, healthy "
                      f"is {healthy:.2g}: try a higher --tau or a lower --lr",
                      file=sys.stderr)  # fmt: skip
        epoch = step // per_epoch
        restarts = in_cycle(epoch, args.restart_epochs, args.restart_mult)[0] == 0
        if first and epoch_ends and restarts:
            save_encoder(out / f"encoder-epoch{epoch:04d}.safetensors", student, config, epoch)
        if due:
            os.fsync(log.fileno())  # the log never falls behind the checkpoint
            save(out, config, student, step / per_epoch, {
                "step": step, "student": student.state_dict(), "teacher": teacher.state_dict(),
                "optimizer": optimizer.state_dict(), "sums": sums, "bad": bad,
            })  # fmt: skip
            saved = time.monotonic()
            save_seconds = saved - now
        if stop:
            break
    if stop and first:
        print(f"\nstopped at step {step}, saved: --resume goes on", flush=True)
    return 128 + stop[0] if stop else 0


def peak_memory(device: torch.device) -> int:
    """Megabytes: of the device's memory on CUDA, of the process elsewhere (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def progress(record: dict, end: int, args: argparse.Namespace, terminal: bool, keep: bool) -> None:
    """One line: rewritten in place on a terminal, and kept at an epoch's end."""
    timing = record["timing"]
    left = (end - record["step"]) * args.batch_size / max(timing["pairs_per_second"], 1e-9)
    text = (
        f"epoch {record['epoch']:.2f}/{args.epochs}  loss {record['loss']:.4f}  "
        f"lr {record['lr']:.4f}  std {record['std']:.4f} ({args.projection**-0.5:.4f} is healthy)  "
        f"{timing['pairs_per_second']:.1f} pairs/s  data wait {100 * timing['data_wait']:.1f} %  "
        f"left {datetime.timedelta(seconds=round(left))}"
    )
    before, after = ("\r\x1b[K", "\n" if keep else "") if terminal else ("", "\n")
    print(before + text, end=after, flush=True)


if __name__ == "__main__":
    try:
        STATUS = main(*PREPARED)
        if dist.is_available() and dist.is_initialized():  # main's networks use it to their end
            dist.destroy_process_group()
    except OSError as problem:  # a full or vanished disk
        place = PREPARED[0].out
        fail(1, f"{place}: {problem}: the last checkpoint is whole: mend it, then --resume")
    sys.exit(STATUS)
