"""Probe an encoder: features once for each image, a small head on them, F1 for each band.

    python probe.py --dataset eurosat --band RE5                 # the encoder of pretrain.py
    python probe.py --dataset eurosat --band RE5 --weights random       # without training
    python probe.py --dataset eurosat --band RE5 --weights stats        # without a network
    python probe.py --dataset eurosat --band all --seeds 5 --weights runs/x/encoder.safetensors
    python probe.py --dataset eurosat-rgb --bands RGB --weights imagenet --finetune
    python probe.py --dataset csv --root tiles.csv --bands-in-file B02,B03,B04,B08 --band NIR
    python probe.py --dataset csv --root tiles.csv --band Red --embed features.npz
    python probe.py --weights seco:seco_resnet50_1m.ckpt --export seco.safetensors

One JSON in results/ for each band and seed; a rerun skips a result only when all that determines
it is the same (of files: path, size and time). The frozen encoder is proved unchanged. Head as in
the paper: Linear-128, BatchNorm, ReLU, Linear; 100 epochs. The paper names no optimiser: SGD or
Adam and a learning rate are chosen by F1 on a validation part of the training split, never on test.
Exit: 1 bad data, 2 wrong use.
"""

import argparse
import functools
import glob
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import bandcrop
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.special import stdtrit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

# ------------------------------------------------------------------------------------- settings
HUB = "https://hf.co/datasets"
EUROSAT = f"{HUB}/torchgeo/eurosat/resolve/1ce6f1bfb56db63fd91b6ecc466ea67f2509774c"
EUROSAT_RGB = f"{HUB}/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd"
RESISC45 = f"{HUB}/isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e"
DATASETS = {  # name: where it comes from; in a second line, where the lists for --split lie
    "eurosat": f"unpack {EUROSAT}/EuroSATallBands.zip (md5 5ac12b3b2557aa56e1826e981e8e200e)"
    f"\n  lists: {EUROSAT}/eurosat[-spatial]-{{train,val,test}}.txt",
    "eurosat-rgb": f"unpack {EUROSAT_RGB}/EuroSAT.zip (md5 c8fa014336c82ac7804f0398fcb19387)"
    f"\n  lists: {EUROSAT}/eurosat[-spatial]-{{train,val,test}}.txt",
    "resisc45": f"unpack {RESISC45}/NWPU-RESISC45.zip (md5 75206b2e16446591afa88e2628744886)"
    f"\n  lists: {RESISC45}/resisc45-{{train,val,test}}.txt",
    "sen12ms": "rsync it from dataserv.ub.tum.de (user and password m1474000)"
    "\n  lists: train_list.txt, test_list.txt of github.com/schmitt-muc/SEN12MS",
    "csv": "give a CSV file with the columns image,label and optionally split",
}
TIFFS, PHOTOS = (".tif", ".tiff"), (".jpg", ".jpeg", ".png")
SUFFIXES = {"eurosat": TIFFS, "eurosat-rgb": PHOTOS, "resisc45": PHOTOS}  # in folders by class
EUROSAT_BANDS = "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A".split()  # B8A is LAST
SIMPLE_IGBP = [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10]  # by IGBP id 0..17
LAND_COVER = (  # the simplified classes 1..10
    "Forest Shrubland Savanna Grassland Wetlands Croplands Urban/Built-up Snow/Ice Barren Water"
).split()
OTHERS = {  # weights that are not ours: the name in the paper's tables
    "imagenet": "ImageNet supervised",
    "byol-imagenet": "BYOL ImageNet",
    "seco": "SeCo",
    "coco": "MS-COCO DeepLabV3",
    "other": "other",  # any ResNet's, by torchvision's names; the file's name is added
}
HIDDEN = 128  # paper
HEAD_BATCH = 256
ENCODE_BATCH = 64
CHOICES: dict[str, list[tuple[str, float]]] = {  # settings tried on the validation part
    "mlp": [("sgd", 0.1), ("sgd", 0.01), ("adam", 0.0003)],  # learning rates
    "linear": [("lbfgs", 1e-4), ("lbfgs", 1e-3), ("lbfgs", 1e-2), ("lbfgs", 1e-1)],  # L2 penalties
    "knn": [("cosine", 1), ("cosine", 5), ("cosine", 20)],  # neighbours
    "finetune": [("adamw", 1e-3), ("adamw", 1e-4)],  # learning rates
}
CHOSEN = {"linear": "l2_penalty", "knn": "neighbours"}  # as results say it; learning_rate else
LEAST_STEPS = 600  # of a head, or of an encoder with its head, however few the images


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be before any file is read."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (see --help)")  # type: ignore
    add = parser.add_argument
    add("--dataset", choices=[*DATASETS])
    add("--root", type=Path, help="its folder, or FILE.csv: image,label[,split] (data/<dataset>)")
    add("--band", "--bands", dest="bands", help="RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; all")
    add("--bands-in-file", help="csv: the files' bands in order (photos: Red,Green,Blue, or one)")
    add("--nodata", type=float, help="of GeoTIFFs without such a tag, such as 0 for zero borders")
    add("--weights", help="encoder.safetensors of pretrain.py (runs/rs-byol-1's where it is, else "
        "random); random; scratch; stats: the floor, twelve statistics of each band; imagenet, "
        "coco: torchvision's; imagenet:, byol-imagenet:, seco:, coco:FILE; other:FILE: any ResNet")
    add("--export", type=Path, metavar="FILE", help="others' weights, as segment.py takes them")
    add("--finetune", action="store_true", help="train the encoder too; scratch: from random")
    add("--arch", choices=ARCHS, default="resnet50", help="of random, scratch, imagenet (resnet50)")
    add("--split", choices=["random", "official", "spatial"], help="random: 80/20, stratified; "
        "official, spatial: the published lists; official: a csv's column split (default: random, "
        "but a csv's column where it has one)")
    add("--subset", type=int, metavar="N", help="N images (7000: EuroSAT 7K, 5000: Sen12MS 5K)")
    add("--train-images", type=int, metavar="N", help="learn from N; the test set stays as it is")
    add("--size", type=int, metavar="PX", help="side of the encoder's input (EuroSAT 64, else 128)")
    add("--stats", choices=["train", "encoder"], default="train", help="mean and deviation of the "
        "bands: of the training images (default) or as the encoder was pre-trained with")
    add("--bn", choices=["encoder", "reestimate"], default="encoder", help="BatchNorm statistics: "
        "as pre-trained (default), or of the unlabelled training images (--embed: of all images)")
    add("--head", choices=["mlp", "linear", "knn"], default="mlp", help="the paper's (default), "
        "logistic regression or nearest neighbours; each on standardised features")
    add("--epochs", type=int, default=100, help="of mlp, or of --finetune (100, paper); more "
        "where the images are few: 600 steps at least")
    add("--seeds", type=int, default=1, metavar="K", help="0..K-1: split, draws, new weights (1)")
    add("--embed", type=Path, metavar="FILE.npz", help="features of every image; trains nothing")
    add("--cam", type=int, default=0, metavar="K", help="FullGrad maps of K test images, 64 at "
        "most, as a PNG (one that is there is kept)")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    # fmt: on
    least = {"size": 32, "epochs": 1, "seeds": 1, "cam": 0, "subset": 1, "train_images": 1}
    for name, value in least.items():
        if (given := getattr(args, name)) is not None and given < value:
            fail(2, f"--{name.replace('_', '-')} {given}: must be at least {value}")
    if args.nodata is not None and not np.isfinite(args.nodata):
        fail(2, f"--nodata {args.nodata}: give a number; NaN and infinity are left out anyway")
    for path in (args.export, args.embed):
        if path and path.exists():
            fail(2, f"{path} is there already: choose another name")
    if args.export:
        if str(args.weights).partition(":")[0] not in OTHERS:
            fail(2, "--export converts others' weights: imagenet, coco, seco:FILE, ... (--help)")
        return args
    if not (args.dataset and args.bands):
        fail(2, f"give --band, as RE5, RGB or all, and --dataset: one of {', '.join(DATASETS)}")
    if args.weights == "scratch" or (args.finetune and args.weights == "random"):  # the same
        args.finetune, args.weights = True, "scratch"
    if args.finetune and (args.head, args.bn, args.stats) != ("mlp", "encoder", "train"):
        fail(2, "training the encoder too: --head, --bn and --stats do not apply")
    if args.weights == "stats" and (args.finetune or args.cam or args.bn != "encoder"):
        fail(2, "--weights stats has no network: --finetune, --cam and --bn do not apply")
    if args.cam and args.head != "mlp":
        fail(2, f"--cam goes back through the paper's head: not with --head {args.head}")
    idle = args.finetune or args.cam or args.split or args.subset or args.train_images
    if args.embed and (idle or args.seeds > 1 or args.head != "mlp"):
        fail(2, "--embed trains nothing and takes every image: not with --finetune, scratch, "
                "--cam, --split, --subset, --train-images, --seeds or --head")  # fmt: skip
    if args.bands_in_file and args.dataset != "csv":
        fail(2, f"--bands-in-file is for --dataset csv: {args.dataset}'s order is known")
    args.root = args.root or Path("data") / args.dataset
    if not args.root.exists():
        fail(2, f"{args.root}: no {args.dataset} there; {DATASETS[args.dataset]}")
    args.root = args.root.parent.resolve() / args.root.name  # what a result is known by
    args.size = args.size or (64 if args.dataset.startswith("eurosat") else 128)
    return args


# >>> shared: bands
BANDS = {  # the paper's name: Sentinel's name; ten MS bands of 10 m and 20 m, two SAR polarisations
    "Blue": "B02", "Green": "B03", "Red": "B04", "RE5": "B05", "RE6": "B06", "RE7": "B07",
    "NIR": "B08", "NNIR": "B8A", "SWIR1": "B11", "SWIR2": "B12", "SAR1": "VV", "SAR2": "VH",
}  # fmt: skip
SEN12MS_S2 = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12".split()  # order in the file
SEN12MS_S1 = "VV VH".split()
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # of this script


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


# >>> shared: results
ARCHS = ("resnet18", "resnet34", "resnet50")
TRIPLES = {"RGB": "Red,Green,Blue", "RE": "RE5,RE6,RE7", "SAR": "SAR1,SAR2,SAR1"}


def band_places(*orders: list[str]) -> dict[str, tuple[int, int]]:
    """(file, 0-based band in it) by the paper's names, from each file's band names in order.

    "-" is skipped; B01, B09 and B10 (60 m) may be named and are not used.
    """
    places: dict[str, tuple[int, int]] = {}
    for file, order in enumerate(orders):
        for place, name in enumerate(order):
            if name.strip().upper() not in ("-", "B01", "B09", "B10"):
                band = band_name(name)
                if band in places:
                    fail(2, f"band {band} ({BANDS[band]}) is named twice: name it once")
                places[band] = file, place
    return places


def requested_bands(text: str, known: dict[str, Any], dataset: str) -> list[list[str]]:
    """The band lists of --band, one for each run: "all" -> [["Blue"], ["Green"], ...]."""
    if not known:
        fail(2, f"{dataset} has none of the bands {', '.join(BANDS)}")
    if text.lower() == "all":
        return [[band] for band in BANDS if band in known]
    bands = [band_name(name) for name in TRIPLES.get(text.upper(), text).split(",")]
    for band in bands:
        if band not in known:
            fail(2, f"{dataset} has no band {band} ({BANDS[band]}); it has {', '.join(known)}")
    if len(bands) not in (1, 3):
        fail(2, f"{len(bands)} bands ({', '.join(bands)}): give one or three")
    return [bands]


def open_folder(folder: Path) -> None:
    """Make the folder of the results, try to write there, sweep what killed runs left half."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    for part in folder.glob(".*.[0-9]*.part"):
        if not Path("/proc", part.name.split(".")[-2]).exists():  # the process that wrote it
            part.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Let `write` fill an open file beside `path`, then rename it: readers see old or new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # a full disk names no file
        fail(1, f"cannot write {path}: {error.strerror or error}")
    finally:
        beside.unlink(missing_ok=True)


def digest_of(value: Any) -> str:
    """sha256 over anything that JSON can hold: equal if and only if all in it is equal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def done_before(path: Path) -> bool:
    """Whether this result is there; says so, and whether another version of the script made it."""
    if not path.exists():
        return False
    try:
        code = json.loads(path.read_text())["versions"].get("script")
    except (ValueError, KeyError, TypeError) as error:
        fail(1, f"{path}: is no whole result ({error!r}): remove it, then run this again")
    other = "" if code == CODE else " by another version of this script: remove it to make it anew"
    print(f"{path}: done before{other}", flush=True)
    return True


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its versions; one that is there is never replaced."""
    versions = {module.__name__: module.__version__ for module in (np, torch, torchvision)}
    result["versions"] = versions | {"script": CODE, "python": sys.version.split()[0]}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if not path.exists():
        write_atomic(path, lambda file: file.write(text.encode()))
        print(f"wrote {path}", flush=True)


def print_table(out: Path, paths: list[Path], metric: str) -> None:
    """The metric by band, beside random's and the floor's where `out` has them for the same task
    and seeds: mean over seeds, half the width of the 95 % interval (Student's t)."""
    results = [json.loads(path.read_text()) for path in paths]
    name, first = results[0]["weights"]["name"], results[0]["config"]
    seeds = {result["seed"] for result in results}
    for path in sorted(out.glob(f"{results[0]['dataset']}-*-seed*.json")):
        with suppress(ValueError, KeyError, TypeError):  # what is no result of ours
            other = json.loads(path.read_text())
            beside = other["weights"]["name"] in {"Random init", "stats"} - {name}
            if beside and other["config"]["task"] == first["task"] and other["seed"] in seeds:
                results.append(other)
    columns: dict[str, dict[str, list[float]]] = {}
    for result in results:
        title, its = result["weights"]["name"], result["config"]
        if its["arch"] not in (None, first["arch"]):  # None: the floor has none
            title += f", {its['arch']}"
        if its.get("bn") not in (None, first.get("bn")):
            title += f", bn {its['bn']}"
        column = columns.setdefault(title, {})
        column.setdefault("+".join(result["bands"]), []).append(result["metrics"][metric])
    rows = [["band", *columns]]
    for band in next(iter(columns.values())):  # those that were asked for
        rows.append([band])
        for values in (column.get(band, []) for column in columns.values()):
            cell = f"{np.mean(values):.3f}" if values else "-"
            if len(values) > 1:
                error = np.std(values, ddof=1) / len(values) ** 0.5
                cell += f" ± {stdtrit(len(values) - 1, 0.975) * error:.3f}"
            rows[-1].append(cell)
    print(f"\n{metric}: mean over seeds ± half its 95 % interval, uncorrected (see analyze.py)")
    widths = [max(map(len, cells)) + 2 for cells in zip(*rows, strict=True)]
    for row in rows:
        print("".join(map(str.ljust, row, widths)).rstrip(), flush=True)


def progress(what: str, items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items; says how many are done: on a terminal each 5 s, in a log file each minute."""
    said, pause = time.monotonic(), 5 if sys.stdout.isatty() else 60
    for done, item in enumerate(items, 1):
        yield item
        if done < count and time.monotonic() - said >= pause:
            said = time.monotonic()
            print(f"  {what}: {done} of {count}", flush=True)


# <<< shared: results


# ----------------------------------------------------------------------------------------- data
class Images(NamedTuple):
    names: list[str]
    files: list[tuple[str, ...]]  # of each image: one file, or S2 and S1
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    counts: tuple[int, ...]  # how many bands each of `files` must have
    labels: np.ndarray | None  # int64 [N]
    classes: list[str]
    part: list[str] | None = None  # train, val, test or "" for each image, where a list says so
    nodata: float | None = None  # of GeoTIFFs without a tag of their own

    @property
    def geotiff(self) -> bool:
        return self.files[0][0].lower().endswith(TIFFS)


def list_images(dataset: str, root: Path, bands_in_file: str | None) -> Images:
    """Every image below `root`, in an order that does not depend on the disk."""
    if dataset == "csv":
        return list_csv(root, bands_in_file)
    if dataset == "sen12ms":
        return list_sen12ms(root)
    everything = glob.glob(f"{glob.escape(str(root))}/**/*", recursive=True)  # hidden files aside
    kept = [p for p in everything if p.lower().endswith(SUFFIXES[dataset]) and os.path.isfile(p)]
    found = sorted(map(Path, kept))
    if not found:
        fail(2, f"{root}: no {dataset} there; {DATASETS[dataset]}")
    above = sorted({str(path.parents[1]) for path in found})
    if len(above) > 1:
        fail(2, f"{root}: images in {above[0]} and in {above[1]}: give one of them as --root")
    order = EUROSAT_BANDS if dataset == "eurosat" else ["Red", "Green", "Blue"]
    classes, labels = np.unique([path.parent.name for path in found], return_inverse=True)
    names, files = [path.stem for path in found], [(str(path),) for path in found]
    return Images(names, files, band_places(order), (len(order),), labels, classes.tolist())


def list_sen12ms(root: Path) -> Images:
    """A scene's label is the simplified class that covers most of the lc tile's IGBP layer."""
    names, files, labels = [], [], []
    for lc in sorted(p for p in root.glob("ROIs*/lc_*/*_lc_*") if p.suffix.lower() in TIFFS):
        inner = str(lc.relative_to(root))
        pair = [root / re.sub("(?<=[_/])lc(?=[_/])", kind, inner) for kind in ("s2", "s1")]
        igbp = bandcrop.read(str(lc), bands=[0])
        if not 0 <= igbp.min() <= igbp.max() <= 17:
            fail(1, f"{lc}: IGBP classes {igbp.min()} to {igbp.max()}, not 0 to 17: no lc tile?")
        most = np.bincount(np.array(SIMPLE_IGBP)[igbp.astype(np.int64).ravel()]).argmax()
        if most > 0:  # 0: unclassified
            names.append(pair[0].stem)  # the official lists name the S2 tile
            files.append(tuple(map(str, pair)))
            labels.append(int(most) - 1)
    if not names:
        fail(2, f"{root}: no SEN12MS with its lc tiles there; {DATASETS['sen12ms']}")
    bands = band_places(SEN12MS_S2, SEN12MS_S1)
    return Images(names, files, bands, (13, 2), np.array(labels), LAND_COVER)


def list_csv(path: Path, bands_in_file: str | None) -> Images:
    """Images of a table with the columns image, label (--embed needs none) and optionally split."""
    if not path.is_file():
        fail(2, f"{path}: is no file; give a CSV file with the columns image,label[,split]")
    rows = bandcrop.read_table(path, ["image"])
    names = [row["image"] for row in rows]
    geotiff = names[0].lower().endswith(TIFFS)
    if geotiff and not bands_in_file:
        fail(2, "--bands-in-file is missing: the GeoTIFFs' bands in order, as B02,B03,B04,B08")
    order = (bands_in_file or "Red,Green,Blue").split(",")
    files = [(str(path.parent / name),) for name in names]
    spelt: dict[str, str] = {}
    for row, (file,) in zip(rows, files, strict=True):
        at, label = f"{path}: line {row['line']}:", row.get("label", "-")
        if not os.path.isfile(file):
            fail(1, f"{at} no file {file}")
        if file.lower().endswith(TIFFS) != geotiff:
            fail(1, f"{at} {file}: GeoTIFFs and photos in one table: make a table of each")
        if not label.strip():
            fail(1, f"{at} the label is empty")
        if (first := spelt.setdefault("".join(label.split()).lower(), label)) != label:
            fail(1, f"{at} label {label!r} is {first!r} but for blanks or case")
    part = [row["split"] for row in rows] if "split" in rows[0] else None
    if strange := {*(part or ())} - {"train", "val", "test"}:
        fail(1, f"{path}: split {min(strange)!r} is not train, val or test")
    classes, labels = np.array([]), None
    if "label" in rows[0]:
        classes, labels = np.unique([row["label"] for row in rows], return_inverse=True)
    return Images(names, files, band_places(order), (len(order),), labels, classes.tolist(), part)


def listed_parts(images: Images, args: argparse.Namespace) -> list[str] | None:
    """train, val, test or "" for each image: the csv's column, or the lists published with the data
    set; None where --split is random."""
    if args.split == "random":
        return None
    if args.dataset == "csv":
        if args.split != "official":
            fail(2, f"--split {args.split}: a csv has its column split (official) or random")
        if not images.part:
            fail(2, f"--split official: {args.root} has no column split; use --split random")
        return images.part
    stem = args.dataset.removesuffix("-rgb") + "-spatial" * (args.split == "spatial")
    lists = {part: f"{stem}-{part}.txt" for part in ("train", "val", "test")}
    if args.dataset == "sen12ms" and args.split == "official":
        lists = {"train": "train_list.txt", "test": "test_list.txt"}
    parts: dict[str, str] = {}
    for part, name in lists.items():
        path = next((p for p in (args.root / name, args.root.parent / name) if p.is_file()), None)
        if path is None:
            fail(2, f"--split {args.split}: no list {args.root / name}; use --split random, or "
                    f"{DATASETS[args.dataset]}")  # fmt: skip
        names = [Path(line).stem for line in path.read_text("utf-8", "replace").split()]
        if not {*names} & {*images.names}:
            fail(1, f"{path} names no image of {args.root}")
        for name in names:
            if parts.setdefault(name, part) != part:
                fail(1, f"{path}: {name} stands in {lists[parts[name]]} too")
    if missing := parts.keys() - {*images.names}:
        print(f"{len(missing)} of the {len(parts)} images in the lists are not there", flush=True)
    return [parts.get(name, "") for name in images.names]


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` places in `labels`, none twice, each class in its share (largest remainder)."""
    if count > len(labels):
        fail(2, f"--subset, --train-images: {count} asked for, {len(labels)} images are there")
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    pools = [rng.permutation(np.flatnonzero(labels == name)) for name in classes]
    return np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, take, strict=True)]))


class Split(NamedTuple):
    fit: np.ndarray  # places in Images
    val: np.ndarray  # to choose settings by
    test: np.ndarray
    listed: bool  # whether a list names the validation part

    @property
    def train(self) -> np.ndarray:
        """What the chosen head learns from: `val` too, unless a list says that it is apart."""
        return self.fit if self.listed else np.concatenate([self.fit, self.val])


def split_images(
    labels: np.ndarray, parts: list[str] | None, args: argparse.Namespace, seed: int
) -> Split:
    """By `parts`, or 80 to 20; without a listed validation part it is a fifth of the training."""
    rng, rows = np.random.default_rng(seed), np.arange(len(labels))
    if args.subset is not None:
        rows = stratified(labels, args.subset, rng)
    if parts is None:
        test = rows[stratified(labels[rows], round(0.2 * len(rows)), rng)]
        fit, val = np.setdiff1d(rows, test), rows[:0]
    else:
        fit, val, test = (rows[np.array(parts)[rows] == name] for name in ("train", "val", "test"))
    if args.train_images is not None:
        fit, val = np.sort(np.concatenate([fit, val])), rows[:0]
        fit = fit[stratified(labels[fit], args.train_images, rng)]
    listed = len(val) > 0
    if not listed and len(fit):
        val = fit[stratified(labels[fit], round(0.2 * len(fit)), rng)]
        fit = np.setdiff1d(fit, val)
    classes = len(np.unique(labels[fit]))
    if min(len(fit), len(val), len(test), classes) < 2:
        fail(1, f"{args.root}, --split {args.split}: too few: {len(fit)} images of {classes} "
                f"classes to fit, {len(val)} to validate, {len(test)} to test (2 of each needed); "
                "see --subset, --train-images")  # fmt: skip
    return Split(fit, val, test, listed)


def open_photo(path: str, size: int | None = None, bands: int = 3) -> np.ndarray:
    """A JPEG or PNG as uint8 [bands, H, W], to `size` by Pillow's bicubic where it differs."""
    try:
        with Image.open(path) as opened:
            if opened.mode[0] in "IF" or any(";16" in str(tile) for tile in opened.tile):  # or RGB
                raise ValueError("a photo of 16 bits or more: give a GeoTIFF")
            photo = opened.convert("L" if opened.mode in ("1", "L", "LA") else "RGB")
        if (has := len(photo.getbands())) != bands:
            raise ValueError(f"a photo of {has} band(s), --bands-in-file names {bands}")
    except Exception as error:  # whatever a broken or a huge photo raises
        raise bandcrop.TileError(f"{path}: {str(error) or repr(error)}") from None
    if size and photo.size != (size, size):
        photo = photo.resize((size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(photo)).transpose(2, 0, 1)


def which_bands(images: Images, rows: np.ndarray, bands: list[str]) -> dict[str, Any]:
    """What bandcrop is to read: paths [n][C], bands [n, C], bands_in_file [n, C], nodata."""
    where = [images.bands[band] for band in bands]
    return {
        "paths": [[images.files[row][file] for file, _ in where] for row in rows],
        "bands": np.tile([place for _, place in where], (len(rows), 1)),
        "bands_in_file": np.tile([images.counts[file] for file, _ in where], (len(rows), 1)),
        "nodata": images.nodata,
    }


class Setup(NamedTuple):
    """How images reach the encoder."""

    args: argparse.Namespace
    images: Images
    bands: list[str]
    mean: list[float]
    std: list[float]


def set_up(args: argparse.Namespace, images: Images, bands: list[str], rows: np.ndarray) -> Setup:
    """Bands standardised over every valid sample of the images `rows`, or as the encoder's own."""
    if args.stats == "encoder":
        about = args.weights.metadata
        at = [about["bands"].index(band) for band in bands]
        return Setup(args, images, bands, *([about[key][i] for i in at] for key in ("mean", "std")))
    if images.geotiff:
        mean, std = bandcrop.statistics(**which_bands(images, rows, bands))
    else:
        where, sums = [images.bands[band][1] for band in bands], 0
        for row in rows:
            photo = open_photo(images.files[row][0], None, *images.counts)[where].astype(float)
            sums += np.array([np.ones_like(photo), photo, photo**2]).sum((2, 3))  # [3, C]
        mean, squares = sums[1:] / sums[0]
        std = np.sqrt(np.maximum(squares - mean**2, 0))
    for band, deviation in zip(bands, std, strict=True):
        if not 0 < deviation < 1e30:
            fail(1, f"band {band} of {len(rows)} training images has deviation {deviation:.2g}: "
                    "constant, or a fill value without a tag (--nodata)?")  # fmt: skip
    return Setup(args, images, bands, mean.tolist(), std.tolist())


def read_ahead(setup: Setup, rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Batches float32 [n, C, S, S] of the images `rows` in order; valid until the next one."""
    images, size, device = setup.images, setup.args.size, setup.args.device
    parts = np.array_split(rows, -(-len(rows) // ENCODE_BATCH))  # never leaves a batch of one
    mean, std = (np.array(value, np.float32) for value in (setup.mean, setup.std))
    if images.geotiff:
        requests = (
            which_bands(images, part, setup.bands)
            | {"mean": np.tile(mean, (len(part), 1)), "std": np.tile(std, (len(part), 1))}
            for part in parts
        )
        shape = (len(parts[0]), len(setup.bands), size, size)
        for batch in bandcrop.stream(requests, shape, device):
            yield batch.x.contiguous(memory_format=torch.channels_last)
        return
    where = [images.bands[band][1] for band in setup.bands]
    with ThreadPoolExecutor() as pool:
        for part in parts:
            files = [images.files[row][0] for row in part]
            photos = pool.map(lambda file: open_photo(file, size, *images.counts), files)
            x = (np.stack([*photos])[:, where] - mean[:, None, None]) / std[:, None, None]
            yield torch.from_numpy(x).to(device).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------- encoder
# >>> shared: encoder
OWN_WEIGHTS = Path("runs/rs-byol-1/encoder.safetensors")  # of `pretrain.py --mode single`
NEW_WEIGHTS = {"random": "Random init", "scratch": "Scratch supervised"}


class Weights(NamedTuple):
    name: str  # as in the paper's tables
    source: str  # the file; or what was typed
    sha256: str | None  # of the file; None: new weights, drawn from the seed
    metadata: dict[str, Any]  # pretrain.py's: arch, mode, epoch, ...; bands, mean, std as lists
    tensors: dict[str, Any]  # by torchvision's names


def find_weights(text: str | None, arch: str) -> Weights:
    """What --weights names, read and checked; `arch`: of new weights."""
    if text is None:
        text = str(OWN_WEIGHTS) if OWN_WEIGHTS.is_file() else "random"
    if text in NEW_WEIGHTS:
        return Weights(NEW_WEIGHTS[text], text, None, {"arch": arch}, {})
    digest = weights_digest(text)
    try:
        with safetensors.safe_open(text, "pt") as opened:
            metadata: dict[str, Any] = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        for key in {"bands", "mean", "std"} & metadata.keys():
            metadata[key] = json.loads(metadata[key])
        name, arch = metadata.get("name"), metadata.get("arch")
        if not name or arch not in ARCHS:
            raise ValueError(f"its metadata have name {name!r}, arch {arch!r}")
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        fail(1, f"{text}: no whole encoder.safetensors of pretrain.py ({error}); others' are "
                f"converted once: probe.py --weights other:{text} --export NEW")  # fmt: skip
    return Weights(name, text, digest, metadata, tensors)


def weights_digest(file: str) -> str:
    """sha256 of a file that may hold weights; refuses what is something else by its first bytes."""
    if not Path(file).is_file():
        fail(2, f"--weights: no file {file}; see --help for what it takes; others', such as coco, "
                "are converted by probe.py --export")  # fmt: skip
    data = Path(file).read_bytes()
    start = data[:64].lstrip().lower()
    if not start:
        fail(1, f"{file}: is empty: fetch it again")
    if start.startswith((b"<!doctype", b"<html")):
        fail(1, f"{file}: is no weights file but a web page: fetch it again")
    if start.startswith(b"version https://git-lfs"):
        fail(1, f"{file}: is no weights file but a git-lfs pointer: run git lfs pull")
    return hashlib.sha256(data).hexdigest()


def check_bands(weights: Weights, bands: list[str], stats: str) -> list[str]:
    """Refuse bands that the weights cannot take; return those that the encoder never saw."""
    if "conv1.weight" in weights.tensors:
        channels = weights.tensors["conv1.weight"].shape[1]
        if channels != len(bands) and (channels, len(bands)) != (3, 1):  # one is copied into three
            fail(2, f"{weights.source}: a {channels}-channel encoder, {len(bands)} band(s) given")
    unseen = [band for band in bands if band not in weights.metadata.get("bands", bands)]
    if stats == "encoder" and (unseen or "mean" not in weights.metadata):
        what = f"saw no {unseen[0]}" if unseen else "carries no statistics"
        fail(2, f"--stats encoder: {weights.name} {what}; use --stats train")
    return unseen


def find_device(text: str) -> torch.device:
    """What --device names; auto: cuda where there is one, else cpu."""
    name = text if text != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(2, f"--device {text}: use auto, cpu, cuda or cuda:N")
    try:
        torch.zeros(1, device=name).add_(1).item()  # fails where this build has no kernels for it
    except (RuntimeError, AssertionError) as error:
        fail(2, f"--device {text} cannot be used: {str(error).splitlines()[0]}")
    return torch.device(name)


def build_encoder(arch: str, channels: int) -> nn.Module:
    """torchvision's ResNet with random weights and no last layer: [N, channels, H, W] -> [N, D]."""
    encoder = getattr(torchvision.models, arch)()
    if channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.conv1.register_forward_pre_hook(  # one band is copied into three channels
        lambda conv, images: images[0].expand(-1, conv.in_channels, -1, -1)
    )
    encoder.width = encoder.fc.in_features  # D: 512 or 2048
    encoder.fc = nn.Identity()
    return encoder.eval()


def load_encoder(weights: Weights, bands: int, seed: int) -> nn.Module:
    """The encoder in eval mode, frozen, on the CPU; new weights are drawn from `seed`."""
    torch.manual_seed(seed)
    arch = weights.metadata["arch"]
    if not weights.tensors:
        return build_encoder(arch, bands).requires_grad_(False)
    try:
        encoder = build_encoder(arch, weights.tensors["conv1.weight"].shape[1])
        encoder.load_state_dict(weights.tensors)
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        fail(1, f"{weights.source}: no {arch}: {why} (this script takes torchvision's ResNets)")
    if not all(value.isfinite().all() for value in encoder.state_dict().values()):
        fail(1, f"{weights.source}: holds NaN or infinity: its run diverged; use an earlier one")
    return encoder.requires_grad_(False)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where that is native, 1.9 times as fast on a CPU with AVX512-BF16; else fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device))


def assert_unchanged(encoder: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Proof that the encoder stayed frozen: each weight and BatchNorm statistic equals `before`."""
    for name, value in encoder.state_dict().items():
        if not torch.equal(value, before[name]):
            fail(1, f"the frozen encoder changed in training, first in {name}; nothing is written")


# <<< shared: encoder


# >>> shared: device
def native_bf16(device: torch.device) -> bool:
    """Whether this device computes in bf16 faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def out_of_memory(error: Exception) -> bool:
    """Also by what cuDNN, cuBLAS and the CPU's allocator say; the last: no workspace fits."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
             "unable to find an engine")  # fmt: skip
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in words)


# <<< shared: device


# ------------------------------------------------------------------------------- others' weights
def find_any_weights(text: str | None, arch: str) -> Weights:
    """What --weights names: the floor, our own, or others' with torchvision's names."""
    kind, _, file = (text or "").partition(":")
    if text == "stats":
        return Weights("stats", text, None, {"arch": None}, {})
    if kind not in OTHERS:
        return find_weights(text, arch)
    if not file and kind not in ("imagenet", "coco"):
        fail(2, f"--weights {kind}: give the file that holds them, {kind}:FILE")
    cached = "" if file else published(kind, arch)
    file = file or cached
    digest = weights_digest(file)
    if cached and not digest.startswith(Path(cached).stem.rpartition("-")[2]):
        fail(1, f"{cached}: is damaged: remove it, then run this again")
    found = read_tensors(file)
    tensors = by_torchvisions_names(kind, found)
    if getattr(tensors.get("conv1.weight"), "ndim", 0) != 4:
        fail(1, f"{text}: not the layout of {kind!r}: it holds {', '.join(list(found)[:3])} ... "
                "(torch.save the encoder's state_dict alone)")  # fmt: skip
    arch = "resnet34" if "layer1.2.conv1.weight" in tensors else "resnet18"
    arch = "resnet50" if "layer1.0.conv3.weight" in tensors else arch  # load_encoder checks it all
    name = OTHERS[kind] + f" {Path(file).stem}" * (kind == "other")
    return Weights(name, str(text), digest, {"arch": arch}, tensors)


def by_torchvisions_names(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    """The encoder's tensors in what a file of this kind of OTHERS holds."""
    held = found["state_dict"] if isinstance(found.get("state_dict"), dict) else found
    if kind == "byol-imagenet":  # yaox12/BYOL-PyTorch: other names, torchvision's order
        names, values = build_encoder("resnet50", 3).state_dict(), found.get("online_backbone")
        return dict(zip(names, values.values(), strict=False)) if isinstance(values, dict) else {}
    # "", "module.", "backbone.": whatever precedes the first convolution's name
    firsts = [key for key in held if key.endswith("conv1.weight")]
    start = min(firsts, key=len, default="").removesuffix("conv1.weight")
    if kind == "seco":  # Lightning: encoder_q.0 = conv1, .1 = bn1, .4-.7 = layer1-layer4
        start = "encoder_q."
    if others := [key for key in firsts if not key.startswith(start)]:  # a student and its teacher
        print(f"of several networks in the file: {start}*, not that with {others[0]}", flush=True)
    children = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc".split()
    return {
        re.sub(r"^\d", lambda place: children[int(place[0])], key.removeprefix(start)): value
        for key, value in held.items()
        if key.startswith(start) and not key.startswith(start + "fc.")
    }


def read_tensors(file: str) -> dict[str, Any]:
    """The names and tensors in a .safetensors or torch file; nothing in it is executed."""
    try:
        if file.endswith(".safetensors"):
            with safetensors.safe_open(file, "pt") as opened:
                if "arch" in (opened.metadata() or {}):
                    fail(2, f"{file}: is an encoder of pretrain.py or --export: name it alone")
            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}
    except Exception:  # whatever a broken file raises
        fail(1, f"{file}: is no whole weights file, or holds more than tensors (none of it was "
                "executed): torch.save the encoder's state_dict alone")  # fmt: skip


def published(kind: str, arch: str) -> str:
    """The file of torchvision's published weights, in torch hub's cache or fetched into it; its
    name ends in the first digits of its sha256."""
    model = "deeplabv3_resnet50" if kind == "coco" else arch
    url = [*torchvision.models.get_model_weights(model)][0].url  # version 1
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])  # resnet18-f37072fd.pth
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), progress=False)
    except OSError as error:
        fail(1, f"--weights {kind}: {url} did not arrive ({error}); use {kind}:FILE")
    return str(file)


def export(weights: Weights, path: Path) -> None:
    """Others' weights in our own format."""
    encoder = load_encoder(weights, 3, 0)
    about = {"name": weights.name, "arch": weights.metadata["arch"], "source": weights.source}
    tensors = {key: value.contiguous() for key, value in encoder.state_dict().items()}
    data = safetensors.torch.save(tensors, about | {"source_sha256": weights.sha256 or ""})
    write_atomic(path, lambda file: file.write(data))
    print(f"wrote {path}: {weights.name}, {weights.metadata['arch']}", flush=True)


# ------------------------------------------------------------------------------------- features
class BandStatistics(nn.Module):
    """The floor that a network must clear, in an encoder's place: [N, C, H, W] -> [N, 12 C].

    Of each band mean, standard deviation, minimum, maximum, percentiles 10, 25, 50, 75 and 90, mean
    size of the gradient down and across, and the standard deviation of its length.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, across = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
        ordered = x.flatten(2).sort(-1).values
        shares = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
        places = [round(share * (ordered.shape[2] - 1)) for share in shares]
        measures = [
            x.mean((2, 3)), x.std((2, 3)), *ordered[..., places].unbind(-1),
            down.abs().mean((2, 3)), across.abs().mean((2, 3)),
            torch.hypot(down, across).std((2, 3)),
        ]  # fmt: skip
        return torch.cat(measures, 1)


def prepare(setup: Setup, rows: np.ndarray, seed: int) -> nn.Module:
    """The frozen encoder on the device, its BatchNorm re-estimated on `rows` where asked; or the
    statistics that stand in for one."""
    args = setup.args
    if args.weights.source == "stats":
        return BandStatistics()
    encoder = load_encoder(args.weights, len(setup.bands), seed)
    encoder = encoder.to(args.device, memory_format=torch.channels_last)
    if args.bn == "reestimate":  # each running statistic becomes its mean over these batches
        order = np.random.default_rng(seed).permutation(rows)
        with autocast(args.device):
            torch.optim.swa_utils.update_bn(read_ahead(setup, order), encoder)
    return encoder


def encode(encoder: nn.Module, setup: Setup, rows: np.ndarray) -> torch.Tensor:
    """Features float32 [n, D] on the device."""
    encoder.eval()  # else BatchNorm would use, and change with, the batch
    features, batches, empty = [], -(-len(rows) // ENCODE_BATCH), 0
    with torch.no_grad(), autocast(setup.args.device):
        for x in progress("encoding: batch", read_ahead(setup, rows), batches):
            features.append(encoder(x).float())
            empty += (x == 0).flatten(2).all(2).any(1).sum()  # what is not valid became the mean
    whole = torch.cat(features)
    if empty:
        print(f"  images without a valid sample of {' or '.join(setup.bands)}: {empty}", flush=True)
    if not whole.isfinite().all():
        fail(1, "the encoder's features are not finite: its training diverged; nothing is written")
    return whole


# ---------------------------------------------------------------------------------------- heads
def build_head(width: int, classes: int) -> nn.Sequential:
    """The paper's head: features [N, width] -> logits [N, classes]."""
    hidden = [nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, classes))


def fit_mlps(
    x: torch.Tensor, y: torch.Tensor, classes: int, settings: list[tuple[str, float]], epochs: int
) -> list[nn.Module]:
    """The paper's head on features [N, D] and labels int64 [N], once for each setting, side by side
    on the same batches; the rates fall along a cosine. Few images get more epochs: LEAST_STEPS.

    They learn from standardised features, as otherwise the scale of a feature decides how fast it
    is learnt; what they return takes features as they are.
    """
    std, mean = torch.std_mean(x, 0)
    std[std <= 1e-5 * x.abs().amax(0)] = 1  # of a feature that is constant
    x = (x - mean) / std
    heads = [build_head(x.shape[1], classes).to(x.device) for _ in settings]
    kinds = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam}
    optimisers = [
        kinds[how](head.parameters(), lr=rate)
        for head, (how, rate) in zip(heads, settings, strict=True)
    ]
    batches = -(-len(x) // HEAD_BATCH)  # of sizes that differ by one: none has a single row
    epochs = max(epochs, -(-LEAST_STEPS // batches))
    falls = [torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs * batches) for o in optimisers]
    for _ in progress("head: epoch", range(epochs), epochs):
        for rows in torch.randperm(len(x), device=x.device).tensor_split(batches):
            part, truth = x[rows], y[rows]
            loss = sum(F.cross_entropy(head(part), truth) for head in heads)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            for step in (*optimisers, *falls):
                step.step()
    for first in (head[0] for head in heads):
        first.weight.data /= std
        first.bias.data -= first.weight.data @ mean
    return [head.eval() for head in heads]


def fit_heads(
    kind: str, settings: list[tuple], x: torch.Tensor, y: torch.Tensor, classes: int, epochs: int
) -> list[Any]:
    """Heads of a kind, one for each setting, on features [N, D] and labels int64 [N]."""
    if kind == "mlp":
        return fit_mlps(x, y, classes, settings, epochs)
    heads: list[Any] = []
    for _, value in settings:
        if kind == "linear":  # mean cross-entropy + value * |W|^2
            head = LogisticRegression(C=1 / (2 * value * len(x)), max_iter=10_000)
        else:  # votes weighed by cosine similarity + 1
            near = min(int(value), len(x))
            head = KNeighborsClassifier(near, metric="cosine", weights=lambda far: 2 - far)
        heads.append(make_pipeline(StandardScaler(), head).fit(x.cpu().numpy(), y.cpu().numpy()))
    return heads


def predict(head: Any, x: torch.Tensor) -> np.ndarray:
    """Class numbers int64 [n]."""
    if not isinstance(head, nn.Module):
        return head.predict(x.cpu().numpy())
    with torch.no_grad():
        return torch.cat([head(part).argmax(1) for part in x.split(4096)]).cpu().numpy()


def fine_tune(setup: Setup, rows: np.ndarray, rate: float, seed: int) -> nn.Sequential:
    """Encoder and head, trained together on the images `rows`: AdamW, decay 0.05, one cycle, turned
    and mirrored batches; where the images are few, as many epochs as make LEAST_STEPS."""
    images, device, encoder = setup.images, setup.args.device, prepare(setup, rows, seed)
    torch.manual_seed(seed)
    head = build_head(encoder.width, len(images.classes)).to(device)
    model = nn.Sequential(encoder, head).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = -(-len(rows) // ENCODE_BATCH)
    epochs = max(setup.args.epochs, -(-LEAST_STEPS // batches))
    if epochs > setup.args.epochs:
        print(f"  {epochs} epochs, for at least {LEAST_STEPS} steps", flush=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches)
    rng = np.random.default_rng(seed)
    for _ in progress(f"learning rate {rate}: epoch", range(epochs), epochs):
        order = rng.permutation(rows)
        labels = torch.from_numpy(images.labels[order]).to(device).tensor_split(batches)
        for x, y in zip(read_ahead(setup, order), labels, strict=True):  # split alike
            x = torch.rot90(x, int(rng.integers(4)), (2, 3))
            x = x.flip(3) if rng.integers(2) else x
            optimiser.zero_grad()
            with autocast(device):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def choose(
    settings: list[tuple], fit: Callable, classify: Callable, images: Images, split: Split
) -> tuple[tuple, Any]:
    """The setting with the best F1 on the validation part, and its model, trained on all of the
    training split. fit(settings, rows) -> models; classify(model, rows) -> class numbers."""
    models, truth = fit(settings, split.fit), images.labels[split.val]
    f1 = functools.partial(f1_score, truth, labels=np.unique(truth), average="macro")
    best = int(np.argmax([f1(classify(model, split.val)) for model in models]))
    if split.listed:
        return settings[best], models[best]
    return settings[best], fit([settings[best]], split.train)[0]


# ------------------------------------------------------------------------------------- measures
def f1_metrics(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """F1 macro, weighted and by class, accuracy, confusion (rows: truth).

    Means are over the classes that the truth holds; a class that is only predicted is listed, and
    what was taken for it counts against the others.
    """
    present = np.unique(truth)
    f1 = functools.partial(f1_score, truth, predicted, labels=present)
    return {
        "f1_macro": float(f1(average="macro")),
        "f1_weighted": float(f1(average="weighted")),
        "accuracy": float((truth == predicted).mean()),
        "f1_per_class": dict(zip([classes[i] for i in present], f1(average=None), strict=True)),
        "classes": [classes[i] for i in present],
        "only_predicted": [classes[i] for i in np.setdiff1d(predicted, truth)],
        "confusion": confusion_matrix(truth, predicted, labels=range(len(classes))).tolist(),
    }


# ---------------------------------------------------------- FullGrad (Srinivas and Fleuret 2019)
def fullgrad_terms(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    """The terms that add up to the logits of the classes `target`: gradient * input [N, C, H, W]
    and, for each layer, gradient * bias in the shape of its output.

    model: in eval mode, of affine layers, ReLU, pooling; a layer's bias is its output for zeros.
    """
    kinds = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)  # a ResNet's convolutions have no bias
    outputs, biases = [], []

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(module, kinds):
            return None
        outputs.append(output)
        biases.append(module.forward(torch.zeros_like(inputs[0][:1])))
        return output.clone()  # for what follows in place: torchvision's ReLU and +=

    x = x.detach().requires_grad_()
    with nn.modules.module.register_module_forward_hook(keep):
        logits = model(x).gather(1, target[:, None])
    first, *gradients = torch.autograd.grad(logits.sum(), [x, *outputs])
    terms = [gradient * bias for gradient, bias in zip(gradients, biases, strict=True)]
    return [term.detach() for term in (first * x, *terms)]


def fullgrad(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Saliency [N, H, W]: the terms that have a place, as magnitudes, rescaled to 0..1, enlarged
    bilinearly, summed over channels and layers, as github.com/idiap/fullgrad-saliency does."""
    saliency = torch.zeros_like(x[:, 0])
    for term in fullgrad_terms(model, x, target):
        if term.ndim == 4:
            term = term.abs() - term.abs().amin((1, 2, 3), keepdim=True)
            term = term / term.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
            term = term.sum(1, keepdim=True)
            saliency += F.interpolate(term, x.shape[2:], mode="bilinear", align_corners=True)[:, 0]
    return saliency


def save_cams(
    path: Path, model: nn.Sequential, setup: Setup, rows: np.ndarray, predicted: np.ndarray
) -> None:
    """A sheet with a row for each image: the image, the map of its predicted class, and that map
    divided by the mean map. The last shows what differs from image to image: at 64 px nearly all of
    a map comes from bias terms on grids of 2 to 16 places and from zero padding."""
    from matplotlib.figure import Figure  # here: it takes a second to import

    images, x = setup.images, next(read_ahead(setup, rows))
    target = torch.from_numpy(predicted).to(x.device)
    seen = x.expand(-1, model[0].conv1.in_channels, -1, -1)  # the copies count apart
    maps = fullgrad(model, seen, target).cpu().numpy()
    low, high = np.percentile(x.cpu(), (2, 98), axis=(2, 3), keepdims=True)
    photos = np.clip((x.cpu().numpy() - low) / np.maximum(high - low, 1e-6), 0, 1)
    mean = np.maximum(maps.mean(0), 1e-12)
    figure = Figure(figsize=(7.5, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, row, guess, photo, heat in zip(axes, rows, predicted, photos, maps, strict=True):
        truth = images.labels[row]
        right = "right" if truth == guess else f"predicted as {images.classes[guess]}"
        for axis, title, pixels, colours in (
            (line[0], f"{images.classes[truth]}:\n{right}", photo.transpose(1, 2, 0), "gray"),
            (line[1], "FullGrad", heat, "inferno"),
            (line[2], "divided by the mean map", heat / mean, "inferno"),
        ):
            axis.imshow(pixels, colours)
            axis.set_axis_off()
            axis.set_title(title, fontsize=8, loc="left")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"wrote {path}", flush=True)


# ------------------------------------------------------------------------------------- one run
def train_and_predict(
    setup: Setup, split: Split, seed: int
) -> tuple[np.ndarray, tuple, nn.Sequential, float]:
    """Class numbers of the test images; the setting chosen; encoder and head; when they began."""
    args, images = setup.args, setup.images
    if not args.finetune:
        encoder = prepare(setup, split.train, seed)
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        used = np.concatenate([split.fit, split.val, split.test])
        features, place = encode(encoder, setup, used), np.empty(len(images.labels), int)
        place[used] = np.arange(len(used))  # where an image's features are
        y = torch.from_numpy(images.labels).to(args.device)
    else:
        for _ in read_ahead(setup, split.test):
            pass  # a bad image ends the run here, not after the training

    def fit(settings: list[tuple], rows: np.ndarray) -> list[Any]:
        if args.finetune:
            return [fine_tune(setup, rows, rate, seed) for _, rate in settings]
        x, classes = features[place[rows]], len(images.classes)
        heads = fit_heads(args.head, settings, x, y[rows], classes, args.epochs)
        return [(encoder, head) for head in heads]

    def classify(model: Any, rows: np.ndarray) -> np.ndarray:
        x = encode(model[0], setup, rows) if args.finetune else features[place[rows]]
        return predict(model[1], x)

    began = time.perf_counter()
    torch.manual_seed(seed)
    kind = "finetune" if args.finetune else args.head
    chosen, model = choose(CHOICES[kind], fit, classify, images, split)
    predicted = classify(model, split.test)
    if not args.finetune:
        assert_unchanged(encoder, before)
    return predicted, chosen, model, began


def run(args: argparse.Namespace, images: Images, data: dict, bands: list[str], seed: int) -> Path:
    """One band (or three) and one seed: read, encode, train the head, measure, write.

    data: what identifies images, labels, parts and band order.
    """
    weights, kind = args.weights, "finetune" if args.finetune else args.head
    floor, name = weights.source == "stats", weights.name
    if args.finetune and weights.tensors:
        name += " fine-tuned"
    scope = {"dataset": args.dataset, "split": args.split, "subset": args.subset}
    task = data | {  # but for weights, band and seed, all that determines the result
        "train_images": args.train_images, "size": args.size,
        "head": args.head, "hidden": HIDDEN, "tried": CHOICES[args.head],
        "bf16": native_bf16(args.device), "epochs": args.epochs if args.head == "mlp" else None,
        "least_steps": LEAST_STEPS if args.head == "mlp" else None,
    }  # fmt: skip
    settings = task | {
        "task": digest_of([scope, task]), "arch": weights.metadata["arch"],
        "stats": args.stats, "bn": None if floor else args.bn,
        "finetune": args.finetune, "tried": CHOICES[kind],
        "recipe": "decay 0.05, one cycle, turned and mirrored" if args.finetune else None,
        "batch": ENCODE_BATCH if args.finetune else HEAD_BATCH,
    }  # fmt: skip
    identity = digest_of([settings, bands, seed, name, weights.sha256 or weights.source])
    parts = [args.dataset, args.split, str(args.subset or "full"), name, *bands, str(args.size)]
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)) + f"-{identity[:12]}-seed{seed}"
    path, png = args.out / f"{stem}.json", args.out / f"{stem}-cam.png"
    if (png.exists() or not args.cam) and done_before(path):
        return path

    clock, unseen = [time.perf_counter()], check_bands(weights, bands, args.stats)
    split = split_images(images.labels, images.part, args, seed)
    setup = set_up(args, images, bands, split.train)
    clock.append(time.perf_counter())
    predicted, chosen, model, began = train_and_predict(setup, split, seed)
    clock += [began, time.perf_counter()]
    metrics = f1_metrics(images.labels[split.test], predicted, images.classes)
    write_result(path, {
        "schema": 1, "stage": "probe", **scope, "bands": bands, "seed": seed, "metrics": metrics,
        "weights": {"name": name, "source": weights.source, "sha256": weights.sha256},
        "config": settings | {
            "identity": identity, "optimiser": chosen[0],
            CHOSEN.get(kind, "learning_rate"): chosen[1], "classes": images.classes,
            "validation": "its list" if split.listed else "a fifth of the training split",
            "train": len(split.train), "validated": len(split.val), "test": len(split.test),
            "root": str(args.root), "mean": setup.mean, "std": setup.std,
            "device": args.device.type, "synthetic": args.synthetic,
            "unseen_bands": unseen, "encoder": weights.metadata,
        },
        "seconds": dict(zip(("read", "encode", "train"), np.diff(clock), strict=True)),
    })  # fmt: skip
    print(f"{args.dataset} {'+'.join(bands)}, {name}, seed {seed}: F1 macro "
          f"{metrics['f1_macro']:.3f}, accuracy {metrics['accuracy']:.3f}", flush=True)  # fmt: skip
    if unseen:
        print(f"  never seen by the encoder: {', '.join(unseen)}", flush=True)
    learnt = {images.classes[label] for label in images.labels[split.train]}
    if never := sorted({*metrics["classes"]} - learnt):
        print(f"  tested, but in no training image: {', '.join(never)}", flush=True)
    if absent := sorted({*images.classes} - {*metrics["classes"]}):
        print(f"  in no test image: {', '.join(absent)}", flush=True)
    if extra := metrics["only_predicted"]:
        print(f"  predicted, but in no test image: {', '.join(extra)}", flush=True)
    if args.cam:  # some test images, spread over the classes
        count = min(args.cam, len(split.test), ENCODE_BATCH)
        draw = stratified(images.labels[split.test], count, np.random.default_rng(0))
        save_cams(png, nn.Sequential(*model), setup, split.test[draw], predicted[draw])
    return path


def embed(args: argparse.Namespace, images: Images, bands: list[str]) -> None:
    """The features of every image, with what is known of it, in one NPZ file."""
    rows = np.arange(len(images.names))
    if args.bn == "reestimate" and len(rows) < 2:
        fail(2, f"--bn reestimate needs two images or more: {args.root} has one")
    setup = set_up(args, images, bands, rows)
    features = encode(prepare(setup, rows, 0), setup, rows).cpu().numpy()
    arrays = {"names": np.array(images.names), "bands": np.array(bands), "features": features,
              "synthetic": np.array(args.synthetic)}  # fmt: skip
    if images.labels is not None:
        arrays |= {"labels": images.labels, "classes": np.array(images.classes)}
    write_atomic(args.embed, lambda file: np.savez(file, **arrays))
    print(f"wrote {args.embed}", flush=True)


def main(args: argparse.Namespace) -> None:
    try:
        args.device = find_device(args.device)
        args.weights = find_any_weights(args.weights, args.arch)
        if args.export:
            open_folder(args.export.parent)
            return export(args.weights, args.export)
        open_folder(args.embed.parent if args.embed else args.out)
        weights, arch = args.weights, args.weights.metadata["arch"] or "no network"
        epoch = f", epoch {weights.metadata['epoch']}" if "epoch" in weights.metadata else ""
        print(f"weights: {weights.source} ({weights.name}, {arch}{epoch}) on {args.device}\n"
              f"listing the images of {args.root}", flush=True)  # fmt: skip
        images = list_images(args.dataset, args.root, args.bands_in_file)
        images = images._replace(nodata=args.nodata)
        args.split = args.split or ("official" if images.part else "random")
        folder = args.root if args.root.is_dir() else args.root.parent
        args.synthetic = (folder / "SYNTHETIC.txt").exists()
        classes = f" of {len(images.classes)} classes" if images.classes else ""
        print(f"{len(images.names)} images{classes}, split {args.split}", flush=True)
        if args.nodata is not None and not images.geotiff:
            fail(2, "--nodata is for GeoTIFFs: these are photos")
        asked = requested_bands(args.bands, images.bands, args.dataset)
        for bands in asked:
            check_bands(args.weights, bands, args.stats)
        if args.embed and len(asked) > 1:
            fail(2, "--embed writes one file: give one band, or three")
        files = bandcrop.digest(file for each in images.files for file in each)
        if args.embed:
            return embed(args, images, asked[0])
        if images.labels is None:
            fail(1, f"{args.root}: no column label; without one only --embed works")
        images = images._replace(part=listed_parts(images, args))
        data = {
            "files": files,
            "images": digest_of([images.names, images.labels.tolist(), images.classes])[:16],
            "parts": images.part and digest_of(images.part), "places": images.bands,
            "bands_in_files": images.counts, "nodata": args.nodata,
        }  # fmt: skip
        seeds = range(args.seeds)
        paths = [run(args, images, data, bands, seed) for bands in asked for seed in seeds]
        print_table(args.out, paths, "f1_macro")
    except (OSError, bandcrop.TileError) as error:  # a full disk, a bad tile
        fail(1, str(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail(1, f"{args.device} has too little memory: lower --size")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed: >&-
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no UTF-8
    try:
        main(arguments())
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
