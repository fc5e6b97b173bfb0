"""Land cover from a frozen encoder: DeepLabV3's decoder on its feature maps, mIoU for each band.

    python segment.py --dataset dfc2020 --band RE5 --weights runs/x/encoder.safetensors
    python segment.py --dataset dfc2020 --band all --split official --seeds 3 --maps 6
    python segment.py --dataset csv --root tiles.csv --s1-bands VV,VH --s2-bands B02,B03,B04,B08 \\
        --classes urban,crops,forest,shrub,wetland,water --band NIR --arch resnet18

One JSON in results/ for each band and seed; a rerun skips those that are there, and an interrupted
run goes on from its last checkpoint. The encoder's last two stages are dilated (output stride 8);
its feature maps of the training tiles are computed once and cached, and it is proved unchanged at
the end. Masks are cut and oriented in whole pixels, never resampled. The paper names no optimiser:
SGD, momentum 0.9, DeepLab's polynomial decay.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

# ------------------------------------------------------------------------------------- settings
DFC2020 = (  # of Copernicus-Bench; the contest's own files need a login at ieee-dataport.org
    "https://hf.co/datasets/wangyi111/Copernicus-Bench/resolve/"
    "9d252acd3aa0e3da3128e05c6f028647f0e48e5f/l2_dfc2020_s1s2/dfc2020.zip"
)
DFC2020_MD5 = "f10ba017dab6f38b7a6857b169ea924b"
LAND_COVER = (  # DFC2020's labels 1..10
    "Forest Shrubland Savanna Grassland Wetlands Croplands Urban/Built-up Snow/Ice Barren Water"
).split()
DROPPED = (3, 8)  # Savanna and Snow/Ice: not in the 8-class set
IGNORED = 255  # in masks given to the loss
POWER = 0.9  # DeepLab: rate * (1 - step / steps) ** 0.9
ENCODE_BATCH = 16
CHECKPOINT_SECONDS = 60.0
COLOURS = {  # Okabe and Ito's, for colour-blind readers, by how a class name begins
    "forest": "#009E73", "shrub": "#E69F00", "grass": "#F0E442", "wetland": "#56B4E9",
    "crop": "#CC79A7", "urban": "#D55E00", "water": "#0072B2", "barren": "#8C8C8C",
    "savanna": "#000000", "snow": "#D9D9D9",
}  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be before torch is imported."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, choices=["dfc2020", "csv"])
    add("--root", type=Path, help="DFC2020 as the contest or Copernicus-Bench lays it out "
        "(data/dfc2020), or FILE.csv: s1,s2,mask[,split]")
    add("--band", "--bands", dest="bands", required=True,
        help="RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; all")
    add("--s1-bands", default="VV,VH", help="csv: bands of the s1 files in order (VV,VH)")
    add("--s2-bands", help="csv: bands of the s2 files in order")
    add("--weights", default="random", help="encoder.safetensors of pretrain.py; random; scratch "
        "(encoder trained too); imagenet, imagenet-v2, coco; imagenet:, byol-imagenet:, seco:, "
        "coco:FILE. Of coco the encoder is taken; the decoder is trained anew as for all")
    add("--arch", choices=ARCHS, default="resnet50", help="of random, scratch and imagenet")
    add("--split", choices=["random", "official"], help="random: --num-images drawn by seed to "
        "train, the rest to test (default); official: test on ROIs0000_test, dfc-test-new.csv "
        "or the csv's test rows, train on others")
    add("--num-images", type=int, metavar="N", help="training tiles, drawn by seed (dfc2020: 900, "
        "paper; csv: all, with --split random 80 %%)")
    add("--classes", help="dfc2020: 8 (default; without Savanna, Snow/Ice) or 10; csv: names, for "
        "the mask's ids in order, ignored ones left out")
    add("--ignore", default="0", help="csv: ids in masks that do not count (0)")
    add("--size", type=int, metavar="PX", help="square cut from each tile's middle (from anywhere "
        "with --augment, in training); default: the whole tile")
    add("--stats", choices=["train", "encoder"], default="train", help="mean and deviation of the "
        "bands: of the training tiles (default) or as the encoder was pre-trained with")
    add("--bn", choices=["encoder", "reestimate"], default="encoder", help="BatchNorm statistics: "
        "as pre-trained (default), or of the unlabelled training tiles; frozen after that")
    add("--augment", action="store_true", help="turn and mirror (and with --size, shift) training "
        "tiles in every epoch: no cache then")
    add("--no-cache", action="store_true", help="run the encoder in every epoch")
    add("--cache-gb", type=float, default=4, help="features up to this stay in memory, else in a "
        "temporary file in --out (4)")
    add("--epochs", type=int, default=100, help="(100, paper)")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=0.03, help="learning rate at the start (0.03; on "
        "BigEarthNet tiles 0.1 gave the same mIoU after 15 epochs: 0.304 and 0.303)")
    add("--seeds", type=int, default=1, metavar="K", help="seeds 0..K-1 of decoder, draw of tiles, "
        "random weights (1)")
    add("--maps", type=int, default=0, metavar="K", help="draw K test tiles: image, truth, "
        "prediction (PNG)")
    add("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    # fmt: on
    args.root = args.root or Path("data") / args.dataset
    least = {"size": 32, "epochs": 1, "seeds": 1, "maps": 0, "num_images": 2, "batch_size": 2}
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            flag = name.replace("_", "-")
            fail(2, f"--{flag} {getattr(args, name)}: must be at least {value}")
    if not 0 < args.lr < 1e30:  # beyond, float32 ends
        fail(2, f"--lr {args.lr}: must be above 0 and below 1e30")
    if args.weights == "scratch" and (args.bn, args.stats) != ("encoder", "train"):
        fail(2, "--weights scratch trains the encoder: --bn and --stats do not apply")
    if args.dataset == "dfc2020" and args.classes not in (None, "8", "10"):
        fail(2, f"--classes {args.classes}: dfc2020 has 8 or 10")
    if args.dataset == "csv" and not (args.classes and args.s2_bands):
        fail(2, "--dataset csv needs --classes NAMES and --s2-bands BANDS, as B02,B03,B04,B08")
    if not re.fullmatch(r"\d+(,\d+)*", args.ignore):
        fail(2, f"--ignore {args.ignore}: give whole numbers, as 0,255")
    args.weights = find_weights(args.weights)
    if not args.root.exists():
        fail(2, missing_data(args.dataset, args.root))
    writable_folder(args.out)
    return args


def missing_data(dataset: str, root: Path) -> str:
    """Two lines: what is not there, and how to get it."""
    if dataset == "csv":
        return f"{root}: no such file\n  it has the columns s1,s2,mask and, if it likes, split"
    where = f"unpack {DFC2020} (md5 {DFC2020_MD5})"
    return f"{root}: no DFC2020 there\n  {where} and give its folder dfc2020_s1s2 as --root"


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


# >>> shared: results
TRIPLES = {
    "RGB": ["Red", "Green", "Blue"],
    "RE": ["RE5", "RE6", "RE7"],
    "SAR": ["SAR1", "SAR2", "SAR1"],
}


def requested_bands(text: str, known: dict[str, Any], dataset: str) -> list[list[str]]:
    """The band lists of --band, one for each run: "all" -> [["Blue"], ["Green"], ...]."""
    if text.lower() == "all":
        return [[band] for band in BANDS if band in known]
    bands = TRIPLES.get(text.upper()) or [band_name(name) for name in text.split(",")]
    for band in bands:
        if band not in known:
            has = ", ".join(name for name in BANDS if name in known)
            fail(2, f"{dataset} has no band {band} ({BANDS[band]}); it has {has}")
    return [bands]


def band_places(order: list[str], file: int = 0) -> dict[str, tuple[int, int]]:
    """(file, 0-based band in it) by the paper's names, from a file's band names in order."""
    lower = [name.strip().lower() for name in order]
    return {
        paper: (file, lower.index(name))
        for paper, sentinel in BANDS.items()
        for name in (paper.lower(), sentinel.lower())
        if name in lower
    }


def writable_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(2, f"{folder}: cannot be made ({error.strerror}); choose another folder")
    if not os.access(folder, os.W_OK):
        fail(2, f"{folder}: not writable; choose another folder")


def result_stem(parts: list[str], settings: dict[str, Any], seed: int) -> str:
    """A file name that no run with other settings has."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
    return f"{readable}-{digest}-seed{seed}"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its versions; one that is there is never replaced."""
    result["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
    result["versions"] |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if not path.exists():
        write_atomic(path, lambda beside: beside.write_text(text) and None)


# <<< shared: results


# >>> shared: weights
ARCHS = ("resnet18", "resnet34", "resnet50")
WEIGHTS = {  # what --weights takes beside our own files: the name in the paper's tables
    "random": "Random init",
    "scratch": "Scratch supervised",
    "imagenet": "ImageNet supervised",
    "imagenet-v2": "ImageNet supervised V2",
    "byol-imagenet": "BYOL ImageNet",
    "seco": "SeCo",
    "coco": "MS-COCO DeepLabV3",
}


class Weights(NamedTuple):
    kind: str  # a key of WEIGHTS, or "ours"
    file: Path | None
    name: str  # as in the paper's tables
    sha256: str | None  # of the file
    metadata: dict[str, Any]  # of our own files, else empty


def find_weights(text: str) -> Weights:
    """What --weights names, its file checked; no tensor is loaded and torch is not needed yet."""
    kind, _, name = text.partition(":")
    if text in WEIGHTS and text not in ("byol-imagenet", "seco"):
        return Weights(text, None, WEIGHTS[text], None, {})
    if kind not in ("imagenet", "byol-imagenet", "seco", "coco"):
        kind, name = "ours", text
    file = Path(name)
    if not file.is_file():
        known = "an encoder.safetensors, random, scratch, imagenet, imagenet-v2, coco"
        fail(2, f"--weights {text}: no file {name!r}; use {known}, "
                "imagenet:FILE, byol-imagenet:FILE, seco:FILE or coco:FILE")  # fmt: skip
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if kind != "ours":
        return Weights(kind, file, WEIGHTS[kind], digest, {})
    import safetensors

    try:
        with safetensors.safe_open(file, framework="np") as opened:
            metadata: dict[str, Any] = dict(opened.metadata() or {})
        for key in ("bands", "mean", "std"):
            metadata[key] = json.loads(metadata[key])
        return Weights(kind, file, metadata["name"], digest, metadata | {"mode": metadata["mode"]})
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        what = f"metadata lacks {error}" if isinstance(error, KeyError) else str(error)
        fail(1, f"{file}: not an encoder of pretrain.py ({what}); others' weights are given as "
                f"imagenet:{file}, byol-imagenet:, seco: or coco:FILE")  # fmt: skip


def check_bands(weights: Weights, bands: list[str], stats: str) -> list[str]:
    """Refuse bands that the weights cannot take; return those that the encoder never saw."""
    if len(bands) not in (1, 3):
        fail(2, f"{len(bands)} bands ({', '.join(bands)}): give one or three")
    if len(bands) == 3 and weights.metadata.get("mode") == "single":
        fail(2, f"{weights.file}: a one-channel encoder cannot take {', '.join(bands)}: give one")
    unseen = [band for band in bands if band not in weights.metadata.get("bands", bands)]
    if stats == "encoder" and (unseen or not weights.metadata):
        what = f"saw no {unseen[0]}" if unseen else "carries no statistics"
        fail(2, f"--stats encoder: {weights.name} {what}; use --stats train")
    return unseen


# <<< shared: weights


if __name__ == "__main__":
    ARGS = arguments()  # wrong use ends here, before the seconds that importing torch takes

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

try:
    import bandcrop
except ImportError:
    fail(2, "bandcrop, which reads GeoTIFFs, is not installed: run `make build` first")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------- data
class Tiles(NamedTuple):
    names: list[str]  # unique
    files: list[tuple[str, str]]  # S2, S1
    masks: list[str]
    shapes: list[tuple[int, int]]  # of the masks: height, width
    part: list[str] | None  # train, val or test, where the archive says so
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    classes: dict[int, str]  # by id in the masks
    ignored: list[int]  # ids
    synthetic: bool


class Setup(NamedTuple):
    """How tiles reach the encoder."""

    bands: list[str]
    mean: list[float]
    std: list[float]


class Cut(NamedTuple):
    """Where a tile is cut and how it is turned."""

    window: tuple[int, int, int, int]  # top, left, height, width in mask pixels
    orient: int  # +4 transposes first, then +2 flips up-down, +1 flips left-right


def list_tiles(args: argparse.Namespace) -> Tiles:
    """Every labelled tile below --root, in an order that does not depend on the disk."""
    root: Path = args.root
    synthetic = (root if root.is_dir() else root.parent).joinpath("SYNTHETIC.txt").exists()
    ignored, part = [0], None
    if args.dataset == "csv":
        names, files, part = list_csv(root)
        masks = [str(root.parent / name) for name in names]
        s2, s1 = args.s2_bands.split(","), args.s1_bands.split(",")
        ignored = [int(number) for number in args.ignore.split(",")]
        labels = args.classes.split(",")
        ids = [i for i in range(len(labels) + len(ignored)) if i not in ignored]
        classes = dict(zip(ids, labels, strict=False))
    else:
        masks, part = list_dfc2020(root)
        names = [Path(mask).stem for mask in masks]
        files = [(beside(mask, "s2"), beside(mask, "s1")) for mask in masks]
        s2, s1 = SEN12MS_S2, SEN12MS_S1
        classes = {i: name for i, name in enumerate(LAND_COVER, start=1)}
        if args.classes != "10":
            ignored += DROPPED
            classes = {i: name for i, name in classes.items() if i not in DROPPED}
    for path in (path for pair in files for path in pair):
        if not os.path.isfile(path):
            fail(1, f"{path} is missing beside its mask; complete the archive")
    infos = [bandcrop.info(mask) for mask in masks]
    shapes = [(info.height, info.width) for info in infos]
    bands = band_places(s2) | band_places(s1, file=1)
    return Tiles(names, files, masks, shapes, part, bands, classes, ignored, synthetic)


def beside(mask: str, kind: str) -> str:
    """The s1 or s2 tile of a DFC2020 mask, in either layout."""
    path = Path(mask)
    folder = path.parent.name.replace("dfc", kind)
    return str(path.parents[1] / folder / path.name.replace("_dfc_", f"_{kind}_"))


def list_dfc2020(root: Path) -> tuple[list[str], list[str]]:
    """Masks and their parts. The contest's ROIs0000_validation counts as the training part."""
    masks, part = [], []
    for base in (root, root / "dfc2020_s1s2"):
        for name in ("train", "val", "test"):
            table = base / f"dfc-{name}-new.csv"  # a file name in each line
            found = table.read_text().split() if table.is_file() else []
            masks += [str(base / "dfc" / file) for file in found]
            part += [name] * len(found)
    for name, folder in (("train", "ROIs0000_validation"), ("test", "ROIs0000_test")):
        found = sorted(str(path) for path in (root / folder).glob("dfc_*/*_dfc_*.tif"))
        masks += found
        part += [name] * len(found)
    if not masks:
        fail(2, missing_data("dfc2020", root))
    return masks, part


def list_csv(path: Path) -> tuple[list[str], list[tuple[str, str]], list[str] | None]:
    """Masks, (S2, S1) and parts of a table with the columns s1,s2,mask and, if it likes, split."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        fail(2, f"--root {path}: not a readable CSV file: {error}")
    for column in ("s1", "s2", "mask"):
        if not rows or rows[0].get(column) is None:
            fail(1, f"{path}: no column {column!r} with rows; it needs s1,s2,mask[,split]")
    files = [(str(path.parent / row["s2"]), str(path.parent / row["s1"])) for row in rows]
    part = [row["split"] for row in rows] if "split" in rows[0] else None
    for line, name in enumerate(part or [], start=2):
        if name not in ("train", "val", "test"):
            fail(1, f"{path} line {line}: split {name!r} is not train, val or test")
    return [row["mask"] for row in rows], files, part


def split_tiles(
    tiles: Tiles, args: argparse.Namespace, seed: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Places of the training and test tiles, and whether there were fewer than --num-images."""
    rng = np.random.default_rng(seed)
    count = len(tiles.names)
    wanted = args.num_images or (900 if args.dataset == "dfc2020" else None)  # paper: 900
    if args.split == "random":
        take = round(0.8 * count)
        fewer = wanted is not None and wanted >= count
        order = rng.permutation(count)
        take = take if wanted is None or fewer else wanted
        train, test = np.sort(order[:take]), np.sort(order[take:])
    else:
        if tiles.part is None:
            fail(2, f"--split official: {args.root} has no column split; use --split random")
        part = np.array(tiles.part)
        pool, test = np.flatnonzero(part == "train"), np.flatnonzero(part == "test")
        fewer = wanted is not None and wanted > len(pool)
        train = np.sort(rng.permutation(pool)[:wanted])
    if len(train) < 2 or not len(test):
        counts = f"{len(train)} tiles to train, {len(test)} to test"
        fail(1, f"{args.root}, --split {args.split}: too few: {counts}")
    return train, test, fewer


def cut_tiles(
    tiles: Tiles, rows: np.ndarray, size: int | None, rng: np.random.Generator | None
) -> list[Cut]:
    """The middle of each tile as it is; with `rng`, a place and one of eight orientations drawn."""
    cuts = []
    for row in rows:
        height, width = tiles.shapes[row]
        side = size or height
        if side > min(height, width) or (size is None and (height, width) != tiles.shapes[rows[0]]):
            fail(1, f"{tiles.masks[row]} is {height} x {width}: give --size, {min(height, width)} "
                    "or less, for tiles that differ or are not square")  # fmt: skip
        top, left, orient = (height - side) // 2, (width - side) // 2, 0
        if rng is not None:
            top = int(rng.integers(height - side + 1))
            left = int(rng.integers(width - side + 1))
            orient = int(rng.integers(8))
        cuts.append(Cut((top, left, side, side), orient))
    return cuts


def read_tiles(
    tiles: Tiles, rows: np.ndarray, cuts: list[Cut], setup: Setup, reader: Any
) -> tuple[np.ndarray, int]:
    """Standardised float32 [N, C, H, W] on the masks' grid, and how many samples were no number."""
    where = [tiles.bands[band] for band in setup.bands]
    paths: Any = [[tiles.files[row][file] for file, _ in where] for row in rows]
    if len({file for file, _ in where}) == 1:  # one read serves all bands
        paths = [each[0] for each in paths]
    shapes = np.array([tiles.shapes[row] for row in rows], float)  # [N, 2]
    windows = np.array([cut.window for cut in cuts]) / np.tile(shapes, 2)  # fractions
    index, mean, std = (
        np.tile(v, (len(rows), 1)) for v in ([b for _, b in where], setup.mean, setup.std)
    )
    out = np.empty((len(rows), len(where), *cuts[0].window[2:]), np.float32)
    orient = np.array([cut.orient for cut in cuts], np.uint8)
    norm = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    return out, int(reader.fill(out, paths, index, windows, orient, **norm).replaced.sum())


def read_masks(tiles: Tiles, rows: np.ndarray, cuts: list[Cut]) -> np.ndarray:
    """Class numbers int64 [N, H, W], IGNORED where a pixel does not count; cut in whole pixels."""
    table = np.full(256, -1)
    table[tiles.ignored] = IGNORED
    table[list(tiles.classes)] = np.arange(len(tiles.classes))
    masks = []
    for row, (window, orient) in zip(rows, cuts, strict=True):
        mask = bandcrop.read(tiles.masks[row], bands=[0], window=window)[0]
        known = table[np.clip(mask, 0, 255).astype(np.int64)]
        if mask.min() < 0 or mask.max() > 255 or known.min() < 0:
            strange = sorted(set(np.unique(mask).tolist()) - {*tiles.classes, *tiles.ignored})
            fail(1, f"{tiles.masks[row]}: id {strange[0]} is no class; name it in --classes or "
                    "list it in --ignore")  # fmt: skip
        known = known.T if orient & 4 else known
        known = known[::-1] if orient & 2 else known
        masks.append(known[:, ::-1] if orient & 1 else known)
    return np.stack(masks)


def band_statistics(tiles: Tiles, rows: np.ndarray, bands: list[str]) -> Any:
    """Mean and standard deviation of each band over every valid sample of the tiles, [C] each."""
    where = [tiles.bands[band] for band in bands]
    count, total, squares = np.zeros((3, len(bands)))
    nodata = [bandcrop.info(tiles.files[rows[0]][file]).nodata for file, _ in where]
    for row in rows:
        for c, (file, band) in enumerate(where):
            pixels = bandcrop.read(tiles.files[row][file], bands=[band])
            good = pixels[np.isfinite(pixels) & (pixels != nodata[c])].astype(np.float64)
            count[c] += good.size
            total[c] += good.sum()
            squares[c] += np.square(good).sum()
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    if (std == 0).any():
        band = bands[int(np.argmin(std))]
        fail(1, f"band {band} is constant over the {len(rows)} training tiles: nothing to learn")
    return mean.tolist(), std.tolist()


def read_ahead(
    tiles: Tiles, rows: np.ndarray, cuts: list[Cut], setup: Setup, batch: int, spent: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images [n, C, H, W] and masks [n, H, W], the next batch read while one is worked on."""
    reader = bandcrop.Reader()

    def read(part: np.ndarray) -> Any:
        start = time.perf_counter()
        chosen = [cuts[place] for place in part]
        images = read_tiles(tiles, rows[part], chosen, setup, reader)
        masks = read_masks(tiles, rows[part], chosen)
        spent["read"] += time.perf_counter() - start
        return *images, masks

    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // batch))  # never one left over
    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read, parts[0])
        for following in [*parts[1:], None]:
            images, replaced, masks = pending.result()
            if following is not None:
                pending = ahead.submit(read, following)
            spent["replaced"] += replaced
            moved = torch.from_numpy(images).to(DEVICE)
            yield moved.contiguous(memory_format=torch.channels_last), torch.from_numpy(masks)


# -------------------------------------------------------------------------------------- encoder
# >>> shared: encoder
def build_encoder(arch: str, channels: int) -> nn.Module:
    """torchvision's ResNet with random weights and no last layer: [N, channels, H, W] -> [N, D]."""
    encoder = getattr(torchvision.models, arch)()
    if channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.width = encoder.fc.in_features  # D: 512 or 2048
    encoder.fc = nn.Identity()
    return encoder.eval()


def read_tensors(file: Path) -> dict[str, Any]:
    """The names and tensors in a .safetensors or torch file; nothing in it is executed."""
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file raises
        if "weights_only" not in str(error).lower():
            fail(1, f"{file}: no tensors could be read: {str(error).splitlines()[0]}")
        named = re.search(r"GLOBAL (\S+)", str(error))
        fail(1, f"{file}: holds {named[1] if named else 'objects'} beside its tensors; nothing was "
                "executed. If you trust it, keep the tensors only: torch.save(torch.load(FILE, "
                "weights_only=False)['state_dict'], NEWFILE)")  # fmt: skip


def download_tensors(kind: str, arch: str) -> dict[str, torch.Tensor]:
    """torchvision's published weights, from torch hub's cache or the network, hash checked."""
    name = f"{arch.replace('resnet', 'ResNet')}_Weights.IMAGENET1K_V{2 if kind[-1] == '2' else 1}"
    if kind == "coco":
        name = "DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"
    try:
        published = torchvision.models.get_weight(name)
        return dict(published.get_state_dict(progress=False, check_hash=True))
    except ValueError:
        fail(2, f"--weights {kind}: torchvision has no {name}; use --arch resnet50")
    except (OSError, RuntimeError) as error:
        fail(1, f"--weights {kind}: {published.url} did not arrive ({error}); fetch it elsewhere "
                f"and give {kind.removesuffix('-v2')}:FILE")  # fmt: skip


def encoder_tensors(weights: Weights, arch: str) -> dict[str, Any]:
    """The encoder's tensors by torchvision's names, out of any layout that --weights knows."""
    found = read_tensors(weights.file) if weights.file else download_tensors(weights.kind, arch)
    if weights.kind == "seco":  # Lightning: encoder_q.0 = conv1, .1 = bn1, .4-.7 = layer1-layer4
        stages = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
        prefixes = {f"encoder_q.{i}.": f"{name}." for i, name in enumerate(stages) if name}
    elif weights.kind == "byol-imagenet":  # yaox12/BYOL-PyTorch: other names, torchvision's order
        values = list(found.get("online_backbone", {}).values())
        names = list(build_encoder("resnet50", 3).state_dict())
        return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}
    else:
        prefixes = {"backbone." if weights.kind == "coco" else "": ""}
    return {
        new + key.removeprefix(old): value
        for key, value in found.get("state_dict", found).items()
        for old, new in prefixes.items()
        if key.startswith(old) and not key.startswith("fc.")
    }


def load_encoder(weights: Weights, arch: str, bands: int, seed: int = 0) -> tuple[nn.Module, str]:
    """The encoder in eval mode, frozen unless it is `scratch`, and its architecture."""
    if weights.kind in ("random", "scratch"):
        torch.manual_seed(seed)
        return build_encoder(arch, bands).requires_grad_(weights.kind == "scratch"), arch
    tensors = encoder_tensors(weights, arch)
    # BatchNorm's step counters aside (0-dimensional), the number of tensors tells the architecture
    count = sum(getattr(value, "ndim", 0) > 0 for value in tensors.values())
    arch = {100: "resnet18", 180: "resnet34", 265: "resnet50"}.get(count, "")
    try:
        if not arch:
            raise RuntimeError(f"{count} tensors fit it; a ResNet has 100, 180 or 265")
        encoder = build_encoder(arch, tensors["conv1.weight"].shape[1])
        encoder.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        told = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        held = list(read_tensors(weights.file) if weights.file else tensors)
        fail(1, f"{weights.file or weights.kind}: not the layout of {weights.kind!r}: {told}; it "
                f"holds {len(held)} entries: {', '.join(held[:3])} ...")  # fmt: skip
    for key, value in tensors.items():
        if not value.isfinite().all():
            fail(1, f"{weights.file or weights.kind}: {key} holds NaN or infinity: it was saved "
                    "from a run that diverged; use an earlier one")  # fmt: skip
    if encoder.conv1.in_channels < bands:
        fail(2, f"{weights.file}: a one-channel encoder cannot take {bands} bands: give one")
    return encoder.requires_grad_(False), arch


def for_encoder(encoder: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W]; one band is copied into three channels where the weights want three."""
    return batch.expand(-1, encoder.conv1.in_channels, -1, -1)


def autocast() -> torch.autocast:
    """bf16 where that is native, 1.9 times as fast on a CPU with AVX512-BF16; else fp32."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=native_bf16(DEVICE))


def reestimate_batchnorm(encoder: nn.Module, batches: Iterator[torch.Tensor]) -> None:
    """Set each BatchNorm's running statistics to their mean over these batches; then eval mode."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative mean
            module.train()
    with torch.no_grad(), autocast():
        for batch in batches:
            encoder(for_encoder(encoder, batch))
    encoder.eval()


def assert_unchanged(encoder: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Proof that the encoder stayed frozen: each weight and BatchNorm statistic equals `before`."""
    for name, value in encoder.state_dict().items():
        if not torch.equal(value, before[name]):
            fail(1, f"the frozen encoder changed in training, first in {name}; nothing is written")


# <<< shared: encoder


# >>> shared: precision
def native_bf16(device: torch.device) -> bool:
    """Whether this device computes in bf16 faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# <<< shared: precision


def dilate(encoder: nn.Module) -> nn.Module:
    """layer3 and layer4 at layer2's resolution, as torchvision's replace_stride_with_dilation does,
    which refuses ResNet-18 and 34. Weights are untouched."""
    for layer, rate in ((encoder.layer3, 2), (encoder.layer4, 4)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):  # the first block keeps the rate before it
                    here = rate // 2 if name.startswith("0.") else rate
                    module.dilation = module.padding = (here, here)
    return encoder


def feature_maps(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[N, 1 or 3, H, W] -> [N, D, H / 8, W / 8]."""
    x = for_encoder(encoder, images)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
    return encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))


def cache_features(
    encoder: nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int,
    gigabytes: float, folder: Path,
) -> tuple[np.ndarray, torch.Tensor]:  # fmt: skip
    """Feature maps float32 [count, D, h, w], in memory or a temporary file; masks [count, H, W]."""
    features, masks, done = None, [], 0
    for images, truth in batches:
        with torch.no_grad(), autocast():
            maps = feature_maps(encoder, images).float().cpu().contiguous().numpy()
        if features is None:
            shape = (count, *maps.shape[1:])
            size = 4 * int(np.prod(shape))
            if size <= gigabytes * 2**30:
                features = np.empty(shape, np.float32)
            else:
                if size > shutil.disk_usage(folder).free:
                    fail(1, f"{folder}: the feature cache needs {size / 2**30:.1f} GB there; free "
                            "some, choose another --out or use --no-cache")  # fmt: skip
                with tempfile.TemporaryFile(dir=folder) as file:  # gone when it is let go
                    features = np.memmap(file, np.float32, "w+", shape=shape)
        features[done : done + len(maps)] = maps
        done += len(maps)
        masks.append(truth)
    return features, torch.cat(masks)


# ------------------------------------------------------------------------------------- decoder
def train_decoder(
    model: nn.ModuleDict, batches_of: Callable, args: argparse.Namespace, seed: int, kept: Path
) -> list[float]:
    """Train model["decoder"] (and the encoder where it is not frozen); the mean loss of each epoch.

    batches_of(rng) yields feature maps [n, D, h, w] and masks [n, H, W] of one epoch. Each epoch
    draws from (seed, epoch) alone, so that one resumed from the checkpoint `kept` ends the same.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    losses: list[float] = []
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]
        print(f"{kept.name}: going on after epoch {len(losses)}", file=sys.stderr, flush=True)
    saved = time.monotonic()
    for epoch in range(len(losses), args.epochs):
        rng = np.random.default_rng([seed, epoch])
        torch.manual_seed(int(rng.integers(2**62)))  # of dropout
        model["decoder"].train()
        sums = []
        for step, (maps, masks, steps) in enumerate(batches_of(rng)):
            if (masks == IGNORED).all():
                continue
            rate = args.lr * (1 - (epoch + step / steps) / args.epochs) ** POWER
            optimiser.param_groups[0]["lr"] = rate
            with autocast():
                scores = predict_scores(model["decoder"], maps, masks.shape[-2:])
            loss = nn.functional.cross_entropy(scores, masks.to(DEVICE), ignore_index=IGNORED)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            sums.append(loss.item())
        losses.append(float(np.mean(sums)) if sums else 0.0)
        if not (math.isfinite(losses[-1]) and all(bool(p.isfinite().all()) for p in trained)):
            fail(1, f"loss or weights are not finite after epoch {epoch + 1}: lower --lr")
        if sys.stderr.isatty():
            end = "\r" if epoch + 1 < args.epochs else "\r\033[K"
            said = f"  epoch {epoch + 1} of {args.epochs}, loss {losses[-1]:.3f}"
            print(said, end=end, file=sys.stderr, flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS and epoch + 1 < args.epochs:
            save_checkpoint(kept, model, optimiser, losses)
            saved = time.monotonic()
    model.eval()
    return losses


def save_checkpoint(
    path: Path, model: nn.ModuleDict, optimiser: torch.optim.Optimizer, losses: list[float]
) -> None:
    """What training changes: a frozen encoder is not in it."""
    scratch = any(p.requires_grad for p in model["encoder"].parameters())
    state = {k: v for k, v in model.state_dict().items() if scratch or k.startswith("decoder.")}
    whole = {"model": state, "optimiser": optimiser.state_dict(), "losses": losses}
    write_atomic(path, lambda beside: torch.save(whole, beside))


def predict_scores(decoder: nn.Module, maps: torch.Tensor, size: Any) -> torch.Tensor:
    """Scores float32 [n, classes, H, W], enlarged bilinearly as DeepLabV3 does."""
    scores = decoder(maps).float()
    return nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------- measures
def count_pixels(truth: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """Confusion int64 [classes, classes], rows truth, over the pixels that count."""
    counts = truth != IGNORED
    flat = truth[counts] * classes + said[counts]
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def map_metrics(confusion: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """mIoU, AA (mean recall), pixel accuracy, by class, from one confusion matrix of all pixels.

    A class that is in neither truth nor prediction is left out of mIoU; recall needs it in truth.
    """
    hits, truth, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = truth + said - hits
    iou = {name: float(h / u) for name, h, u in zip(classes, hits, union, strict=True) if u}
    recall = {name: float(h / t) for name, h, t in zip(classes, hits, truth, strict=True) if t}
    return {
        "miou": float(np.mean(list(iou.values()))),
        "aa": float(np.mean(list(recall.values()))),
        "pixel_accuracy": float(hits.sum() / truth.sum()),
        "iou_per_class": iou,
        "recall_per_class": recall,
        "confusion": confusion.tolist(),
    }


def colours_of(classes: list[str]) -> list[str]:
    """A colour for each class: its own where its name is known, else the next one that is free."""
    known = [next((c for k, c in COLOURS.items() if name.lower().startswith(k)), "")
             for name in classes]  # fmt: skip
    free = [colour for colour in COLOURS.values() if colour not in known]
    return [colour or (free.pop(0) if free else "#FFFFFF") for colour in known]


def draw_maps(
    path: Path, images: np.ndarray, truth: np.ndarray, said: np.ndarray, classes: list[str]
) -> None:
    """A sheet of image [K, C, H, W], truth and prediction [K, H, W] side by side, with a legend."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = [*colours_of(classes), "#FFFFFF"]  # the last: pixels that do not count
    figure = Figure(figsize=(7.5, 2.5 * len(images) + 0.8), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False)
    for row, image, true, guess in zip(axes, images, truth, said, strict=True):
        low, high = np.percentile(image, (2, 98), axis=(1, 2), keepdims=True)
        shown = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1).transpose(1, 2, 0)
        row[0].imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=1)
        for axis, mask in zip(row[1:], (true, guess), strict=True):
            numbers = np.where(true == IGNORED, len(classes), mask)
            axis.imshow(numbers, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(classes) + 0.5,
                        interpolation="nearest")  # fmt: skip
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title)
    labels = [*classes, "ignored"]
    patches = [Patch(facecolor=c, edgecolor="black", label=n)
               for n, c in zip(labels, colours, strict=True)]  # fmt: skip
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    write_atomic(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


# -------------------------------------------------------------------------------------- one run
def run(args: argparse.Namespace, tiles: Tiles, bands: list[str], seed: int) -> None:
    """One band (or three) and one seed: read, encode, train the decoder, measure, write."""
    weights: Weights = args.weights
    begin, spent = time.perf_counter(), {"read": 0.0, "replaced": 0}
    unseen = check_bands(weights, bands, args.stats)
    train, test, fewer = split_tiles(tiles, args, seed)
    classes = list(tiles.classes.values())
    settings = {
        "size": args.size, "epochs": args.epochs, "batch": args.batch_size, "lr": args.lr,
        "optimiser": "sgd", "bn": args.bn, "stats": args.stats, "augment": args.augment,
        "classes": classes, "kind": weights.kind, "arch": "" if weights.file else args.arch,
        "file": weights.sha256,
        "images": hashlib.sha256("\n".join(tiles.names).encode()).hexdigest()[:16],
    }  # fmt: skip
    scope = {"dataset": args.dataset, "split": args.split, "subset": len(train), "bands": bands}
    parts = [args.dataset, args.split, str(len(train)), weights.name, "+".join(bands)]
    stem = result_stem([*parts, f"{len(classes)}classes"], settings | scope, seed)
    path, png = args.out / f"{stem}.json", args.out / f"{stem}-maps.png"
    if path.exists() and (png.exists() or not args.maps):
        print(f"{path}: done before", flush=True)
        return
    if fewer:
        print(f"--num-images: {args.root} has {len(tiles.names)} tiles in all; {len(train)} train, "
              f"{len(test)} test", file=sys.stderr, flush=True)  # fmt: skip

    if args.stats == "encoder":
        where = [weights.metadata["bands"].index(band) for band in bands]
        mean, std = ([weights.metadata[key][i] for i in where] for key in ("mean", "std"))
    else:
        mean, std = band_statistics(tiles, train, bands)
    setup = Setup(bands, mean, std)
    spent["read"] = time.perf_counter() - begin
    encoder, arch = load_encoder(weights, args.arch, len(bands), seed)
    encoder = dilate(encoder).to(DEVICE, memory_format=torch.channels_last)
    middle = cut_tiles(tiles, train, args.size, None)
    if args.bn == "reestimate":
        order = np.random.default_rng(seed).permutation(len(train))
        cuts = [middle[place] for place in order]
        batches = read_ahead(tiles, train[order], cuts, setup, ENCODE_BATCH, spent)
        reestimate_batchnorm(encoder, (images for images, _ in batches))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(seed)
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(encoder.width, len(classes))
    model = nn.ModuleDict({"encoder": encoder, "decoder": head})
    model = model.to(DEVICE, memory_format=torch.channels_last)

    start = time.perf_counter()
    scratch, cached = weights.kind == "scratch", None
    if not (scratch or args.augment or args.no_cache):
        batches = read_ahead(tiles, train, middle, setup, ENCODE_BATCH, spent)
        cached = cache_features(encoder, batches, len(train), args.cache_gb, args.out)
    encoded = time.perf_counter()
    steps = -(-len(train) // args.batch_size)

    def batches_of(rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        order = rng.permutation(len(train))
        if cached:
            for part in np.array_split(order, steps):
                maps = torch.from_numpy(cached[0][part]).to(DEVICE)
                yield maps.contiguous(memory_format=torch.channels_last), cached[1][part], steps
            return
        rows, cuts = train[order], [middle[place] for place in order]
        if args.augment:
            cuts = cut_tiles(tiles, rows, args.size, rng)
        encoder.train(scratch)
        for images, masks in read_ahead(tiles, rows, cuts, setup, args.batch_size, spent):
            with torch.set_grad_enabled(scratch), autocast():
                maps = feature_maps(encoder, images)
            yield maps, masks, steps

    kept = args.out / f".{stem}.checkpoint.pt"
    losses = train_decoder(model, batches_of, args, seed, kept)
    trained = time.perf_counter()
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    shown: list[tuple[np.ndarray, ...]] = []
    cuts = cut_tiles(tiles, test, args.size, None)
    for images, masks in read_ahead(tiles, test, cuts, setup, ENCODE_BATCH, spent):
        with torch.no_grad(), autocast():
            maps = feature_maps(encoder, images)
            said = predict_scores(model["decoder"], maps, masks.shape[-2:]).argmax(1).cpu()
        confusion += count_pixels(masks.numpy(), said.numpy(), len(classes))
        shown += zip(images.cpu().numpy(), masks.numpy(), said.numpy(), strict=True)
        del shown[args.maps :]
    if not scratch:
        assert_unchanged(encoder, before)
    if not confusion.any():
        fail(1, f"{args.root}: no pixel of the {len(test)} test masks counts; see --ignore")
    if args.maps:
        draw_maps(png, *(np.stack(each) for each in zip(*shown, strict=True)), classes)
    metrics = map_metrics(confusion, classes)
    write_result(path, {
        "schema": 1, "stage": "segment", **scope, "seed": seed, "metrics": metrics,
        "weights": {"name": weights.name, "source": str(weights.file or weights.kind),
                    "sha256": weights.sha256},
        "config": settings | {
            "arch": arch, "decoder": "DeepLabHead", "output_stride": 8, "train": len(train),
            "test": len(test), "fewer_than_asked": fewer, "losses": losses,
            "root": str(args.root), "mean": mean, "std": std, "unseen_bands": unseen,
            "replaced_samples": spent["replaced"], "cached": bool(cached),
            "bf16": native_bf16(DEVICE), "device": DEVICE.type,
            "synthetic": tiles.synthetic, "encoder": weights.metadata,
            "encoder_synthetic": weights.metadata.get("synthetic") == "true",
        },
        "seconds": {"read": spent["read"], "encode": encoded - start, "train": trained - encoded},
    })  # fmt: skip
    kept.unlink(missing_ok=True)
    note = f"; the encoder never saw {', '.join(unseen)}" if unseen else ""
    print(f"{args.dataset} {args.split} {'+'.join(bands)}, {weights.name}, seed {seed}: "
          f"mIoU {metrics['miou']:.3f}, AA {metrics['aa']:.3f}, "
          f"{time.perf_counter() - begin:.1f} s{note} -> {path}", flush=True)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    try:
        tiles = list_tiles(args)
        args.split = args.split or (
            "official" if args.dataset == "csv" and tiles.part else "random"
        )
        for bands in requested_bands(args.bands, tiles.bands, args.dataset):
            check_bands(args.weights, bands, args.stats)
            for seed in range(args.seeds):
                run(args, tiles, bands, seed)
    except (OSError, bandcrop.TileError) as error:  # a full disk, a bad tile
        fail(1, str(error))


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
