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
it is the same. The frozen encoder is proved unchanged. Head as in the paper: Linear-128, BatchNorm,
ReLU, Linear; 100 epochs. The paper names no optimiser: SGD or Adam and a learning rate are chosen
by F1 on a validation part of the training split, never on test. Exit: 1 bad data, 2 wrong use.
"""

import argparse
import csv
import functools
import glob
import hashlib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

# ------------------------------------------------------------------------------------- settings
HUB = "https://hf.co/datasets"
REVISIONS = {  # repository on the hub, revision
    "eurosat": "torchgeo/eurosat/resolve/1ce6f1bfb56db63fd91b6ecc466ea67f2509774c",
    "eurosat-rgb": "torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd",
    "resisc45": "isaaccorley/resisc45/resolve/883edc0eee77b2c84225472f10f126e3ed83fa6e",
}
DOWNLOADS = """
eurosat              eurosat      EuroSATallBands.zip        5ac12b3b2557aa56e1826e981e8e200e
eurosat-rgb          eurosat-rgb  EuroSAT.zip                c8fa014336c82ac7804f0398fcb19387
resisc45             resisc45     NWPU-RESISC45.zip          75206b2e16446591afa88e2628744886
resisc45             resisc45     resisc45-train.txt         b5a4c05a37de15e4ca886696a85c403e
resisc45             resisc45     resisc45-val.txt           a0770cee4c5ca20b8c32bbd61e114805
resisc45             resisc45     resisc45-test.txt          3dda9e4988b47eb1de9f07993653eb08
eurosat,eurosat-rgb  eurosat      eurosat-train.txt          908f142e73d6acdf3f482c5e80d851b1
eurosat,eurosat-rgb  eurosat      eurosat-val.txt            95de90f2aa998f70a3b2416bfe0687b4
eurosat,eurosat-rgb  eurosat      eurosat-test.txt           7ae5ab94471417b6e315763121e67c5f
eurosat,eurosat-rgb  eurosat      eurosat-spatial-train.txt  7be3254be39f23ce4d4d144290c93292
eurosat,eurosat-rgb  eurosat      eurosat-spatial-val.txt    acf392290050bb3df790dc8fc0ebf193
eurosat,eurosat-rgb  eurosat      eurosat-spatial-test.txt   5ec1733f9c16116bf0aa2d921fc613ef
"""  # data sets, revision, file, MD5
TIFFS, PHOTOS = (".tif", ".tiff"), (".jpg", ".jpeg", ".png")
SUFFIXES = {"eurosat": TIFFS, "eurosat-rgb": PHOTOS, "resisc45": PHOTOS}  # in folders by class
EUROSAT_BANDS = "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A".split()  # B8A is LAST
SIMPLE_IGBP = [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10]  # by IGBP id 0..17
LAND_COVER = (  # the simplified classes 1..10
    "Forest Shrubland Savanna Grassland Wetlands Croplands Urban/Built-up Snow/Ice Barren Water"
).split()
SIZES = {"eurosat": 64, "eurosat-rgb": 64}  # the images' own; 128 else
OTHERS = {  # weights that are not ours: the name in the paper's tables
    "imagenet": "ImageNet supervised",
    "imagenet-v2": "ImageNet supervised V2",
    "byol-imagenet": "BYOL ImageNet",
    "seco": "SeCo",
    "coco": "MS-COCO DeepLabV3",
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
FINETUNE_STEPS = 600  # at least, however few the images


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be before torch is imported."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (see --help)")  # type: ignore
    add = parser.add_argument
    add("--dataset", choices=[*SUFFIXES, "sen12ms", "csv"])
    add("--root", type=Path, help="its folder, or FILE.csv: image,label[,split] (data/<dataset>)")
    add("--download", action="store_true", help="fetch eurosat, eurosat-rgb, resisc45 into --root")
    add("--band", "--bands", dest="bands", help="RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; all")
    add("--bands-in-file", help="csv: the files' bands in order (photos: Red,Green,Blue, or one)")
    add("--weights", help="encoder.safetensors of pretrain.py (runs/rs-byol-1's where it is, else "
        "random); random; scratch: random and --finetune; stats: the floor, twelve statistics of "
        "each band; imagenet, imagenet-v2, coco; imagenet:, byol-imagenet:, seco:, coco:FILE")
    add("--export", type=Path, metavar="FILE", help="write these weights in our format, which "
        "segment.py takes, and end")
    add("--finetune", action="store_true", help="train the encoder too: AdamW, one cycle, flips "
        "and turns; learning rate chosen on the validation part")
    add("--arch", choices=ARCHS, default="resnet50", help="of random, scratch and imagenet")
    add("--split", choices=["random", "official", "spatial"], help="random: 80/20, stratified, by "
        "seed (default); official, spatial: the published lists, or the csv's own column")
    add("--subset", type=int, metavar="N", help="N images, stratified, drawn anew for each seed: "
        "7000 is the paper's EuroSAT 7K, 5000 its Sen12MS 5K")
    add("--train-images", type=int, metavar="N", help="learn from N labels, stratified, drawn anew "
        "for each seed; the test set stays as it is")
    add("--size", type=int, metavar="PX", help="side of the encoder's input (EuroSAT 64, else 128)")
    add("--stats", choices=["train", "encoder"], default="train", help="mean and deviation of the "
        "bands: of the training images (default) or as the encoder was pre-trained with")
    add("--bn", choices=["encoder", "reestimate"], default="encoder", help="BatchNorm statistics: "
        "as pre-trained (default), or of the unlabelled training images; frozen after that")
    add("--head", choices=["mlp", "linear", "knn"], default="mlp", help="mlp (paper), linear: "
        "logistic regression, knn: nearest neighbours; both on standardised features")
    add("--epochs", type=int, default=100, help="of the head mlp, or of --finetune (100, paper; "
        f"--finetune takes at least {FINETUNE_STEPS} steps)")
    add("--seeds", type=int, default=1, metavar="K", help="seeds 0..K-1 of head, split, subset, "
        "random weights (1)")
    add("--embed", type=Path, metavar="FILE.npz", help="write the features of every image, "
        "labelled or not, and end; bands standardised over all of them")
    add("--cam", type=int, default=0, metavar="K", help="FullGrad maps of K test images (PNG)")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    # fmt: on
    for name, least in (("size", 32), ("epochs", 1), ("seeds", 1), ("cam", 0),
                        ("subset", 1), ("train_images", 1)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            fail(2, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not args.dataset and not args.export:
        fail(2, f"--dataset is missing: one of {', '.join([*SUFFIXES, 'sen12ms', 'csv'])}")
    args.root = args.root or Path("data") / str(args.dataset)
    if args.download:
        download(args.dataset, args.root)
        if not args.bands:
            raise SystemExit(0)
    args.weights = find_any_weights(args.weights)
    source, others = args.weights.source, args.weights.name in OTHERS.values()
    if args.export and (not others or args.weights.tensors):
        fail(2, "--export converts others' weights: imagenet, coco, seco:FILE, ... (--help)")
    if args.export:
        return args
    args.size = args.size or SIZES.get(args.dataset, 128)
    if source == "scratch" or (args.finetune and source == "random"):  # which are the same
        args.finetune, args.weights = True, find_weights("scratch")
    for wrong, message in (
        (args.finetune and (args.head, args.bn, args.stats) != ("mlp", "encoder", "train"),
         "training the encoder too: --head, --bn and --stats do not apply"),
        (source == "stats" and (args.finetune or args.cam or args.bn != "encoder"),
         "--weights stats has no network: --finetune, --cam and --bn do not apply"),
        (args.cam and args.head != "mlp",
         f"--cam goes back through the paper's head: not with --head {args.head}"),
        (args.embed and args.finetune, "--embed trains nothing: not with --finetune or scratch"),
        (not args.bands, "--band is missing: RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; or all"),
        (not args.root.exists(), missing_data(args.dataset, args.root)),
    ):  # fmt: skip
        if wrong:
            fail(2, message)
    args.root = args.root.resolve()  # one of the things that a result is known by
    open_folder(args.embed.parent if args.embed else args.out)
    return args


def sources(dataset: str) -> list[tuple[str, str]]:
    """(URL, MD5) of each file of a data set, the archive first; none where it cannot be fetched."""
    rows = [line.split() for line in DOWNLOADS.strip().splitlines()]
    return [
        (f"{HUB}/{REVISIONS[revision]}/{file}", md5)
        for names, revision, file, md5 in rows
        if dataset in names.split(",")
    ]


def missing_data(dataset: str, root: Path) -> str:
    """Two lines: what is not there, and how to get it."""
    if dataset == "csv":
        return f"{root}: no such file\n  it has the columns image,label and, if it likes, split"
    if dataset == "sen12ms":
        return (
            f"{root}: no SEN12MS with its lc tiles there; give its folder as --root\n"
            "  it comes by rsync from dataserv.ub.tum.de (user and password m1474000)"
        )
    (url, md5), *_ = sources(dataset)
    return (
        f"{root}: no {dataset} there; get it with: python probe.py --dataset {dataset} "
        f"--root {root} --download\n  or unpack {url} (md5 {md5}) there"
    )


def download(dataset: str, root: Path) -> None:
    """Fetch and unpack a data set with its split lists; `root` appears once all of it is there."""
    if not sources(dataset):
        fail(2, f"--download does not know {dataset}: " + missing_data(dataset, root))
    if root.exists() and any(root.iterdir()):
        fail(2, f"--download: {root} is not empty; remove it or choose another --root")
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    part = root.with_name(root.name + ".part")
    for url, md5 in sources(dataset):
        fetch = download_and_extract_archive if url.endswith(".zip") else download_url
        try:
            fetch(url, str(part), md5=md5)  # keeps what an interrupted run has fetched
        except (OSError, RuntimeError) as error:
            fail(1, f"--download: {url}: {str(error).splitlines()[0]}; run it again to go on")
    for archive in part.glob("*.zip"):
        archive.unlink()
    if root.exists():
        root.rmdir()  # empty, as checked above
    part.rename(root)


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
    finally:
        beside.unlink(missing_ok=True)


# <<< shared: files


# >>> shared: table
def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a comma-separated UTF-8 file that has at least these columns; "line" is added."""
    if not path.is_file():
        fail(2, f"{path}: is no file; give a CSV file with the columns {','.join(columns)}")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(1, f"{path}: not a readable UTF-8 text ({error})")
    header = [name.strip() for name in next(csv.reader([lines[0]]), [])]
    if any(header.count(column) != 1 for column in columns):
        fail(1, f"{path} line 1: {lines[0][:80]!r} lacks one of the columns {','.join(columns)}, "
                "or commas between them")  # fmt: skip
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            values = next(csv.reader([line], strict=True), [])
        except csv.Error as error:
            fail(1, f"{path} line {number}: {error} (a quotation mark astray?)")
        if values and len(values) != len(header):
            fail(1, f"{path} line {number}: {len(values)} values under {len(header)} columns")
        if values:
            rows.append(dict(zip(header, values, strict=True)) | {"line": str(number)})
    if not rows:
        fail(1, f"{path}: no row under the header {','.join(header)}")
    return rows


# <<< shared: table


# >>> shared: results
TRIPLES = {
    "RGB": ["Red", "Green", "Blue"],
    "RE": ["RE5", "RE6", "RE7"],
    "SAR": ["SAR1", "SAR2", "SAR1"],
}


def band_places(order: list[str], file: int = 0) -> dict[str, tuple[int, int]]:
    """(file, 0-based band in it) by the paper's names, from a file's band names in order.

    B01, B09 and B10 (60 m) may be named and are not used.
    """
    places: dict[str, tuple[int, int]] = {}
    for place, name in enumerate(order):
        if name.strip().upper() not in ("B01", "B09", "B10"):
            band = band_name(name)
            if band in places:
                fail(2, f"band {band} ({BANDS[band]}) stands twice in {','.join(order)}")
            places[band] = file, place
    return places


def requested_bands(text: str, known: dict[str, Any], dataset: str) -> list[list[str]]:
    """The band lists of --band, one for each run: "all" -> [["Blue"], ["Green"], ...]."""
    if text.lower() == "all":
        return [[band] for band in BANDS if band in known]
    bands = TRIPLES.get(text.upper()) or [band_name(name) for name in text.split(",")]
    for band in bands:
        if band not in known:
            has = ", ".join(name for name in BANDS if name in known)
            fail(2, f"{dataset} has no band {band} ({BANDS[band]}); it has {has}")
    if len(bands) not in (1, 3):
        fail(2, f"{len(bands)} bands ({', '.join(bands)}): give one or three")
    return [bands]


def open_folder(folder: Path) -> None:
    """Make the folder of the results, or refuse it; clear it of what killed runs left half."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(2, f"{folder}: cannot be made ({error.strerror}); choose another folder")
    if not os.access(folder, os.W_OK):
        fail(2, f"{folder}: not writable; choose another folder")
    for part in folder.glob(".*.[0-9]*.part"):
        if not Path("/proc", part.name.split(".")[-2]).exists():  # the process that wrote it
            part.unlink(missing_ok=True)


def digest_files(files: Iterable[str]) -> str:
    """sha256 over names, sizes and times of change: another archive, or other pixels, differs."""
    digest = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        digest.update(os.fsencode(os.path.abspath(file)))
        digest.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 over anything that JSON can hold: equal if and only if all in it is equal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def result_path(out: Path, parts: list[str], identity: str, seed: int) -> Path:
    """A file for this result and no other: `identity` is the digest of all that determines it."""
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts)
    return out / f"{readable}-{identity[:12]}-seed{seed}.json"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its versions; one that is there is never replaced."""
    result["versions"] = {
        "python": platform.python_version(), "numpy": np.__version__,
        "torch": torch.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if not path.exists():
        write_atomic(path, lambda beside: beside.write_text(text) and None)
        print(f"wrote {path}", flush=True)


def print_table(out: Path, paths: list[Path], metric: str) -> None:
    """The metric of this run's results by band, beside random's and the floor's in `out`.

    They stand beside it where config's "task" is equal: all that determines a result but weights.
    Mean over seeds and half the width of the 95 % interval (Student's t) where there are several.
    """
    from scipy.special import stdtrit  # Student's quantile; here, as it takes a second to import

    own = [json.loads(path.read_text()) for path in paths]
    name, config = own[0]["weights"]["name"], own[0]["config"]
    tasks = {result["config"]["task"] for result in own}
    for path in sorted(out.glob("*.json")):
        try:
            other = json.loads(path.read_text())
            alike = other["config"]["task"] in tasks and all(
                other["config"][key] in (None, config[key]) for key in ("arch", "bn")
            )  # None: the floor has neither
            if alike and other["weights"]["name"] in {"Random init", "stats"} - {name}:
                own.append(other)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no result of this script
    found: dict[str, dict[str, list[float]]] = {}  # name: band
    for result in own:
        bands = found.setdefault(result["weights"]["name"], {})
        bands.setdefault("+".join(result["bands"]), []).append(result["metrics"][metric])
    print(f"\n{metric}, mean over seeds ± half the 95 % interval")
    print("".join(f"{title:22}" for title in ("band", *found)).rstrip())
    for band in found[name]:
        cells = [band]
        for bands in found.values():
            values = np.array(bands.get(band, []))
            cells.append(f"{values.mean():.3f}" if len(values) else "-")
            if len(values) > 1:
                half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values) ** 0.5
                cells[-1] += f" ± {half:.3f}"
        print("".join(f"{cell:22}" for cell in cells).rstrip(), flush=True)


class Progress:
    """Says how far a part of the work is: on a terminal each 5 s, in a log file each minute."""

    def __init__(self, what: str) -> None:
        self.what, self.said = what, time.monotonic()
        self.pause = 5 if sys.stdout.isatty() else 60

    def __call__(self, done: int, count: int, note: str = "") -> None:
        if done < count and time.monotonic() - self.said >= self.pause:
            self.said = time.monotonic()
            print(f"  {self.what}: {done} of {count}{note}", flush=True)


# <<< shared: results


# >>> shared: weights
ARCHS = ("resnet18", "resnet34", "resnet50")
OWN_WEIGHTS = Path("runs/rs-byol-1/encoder.safetensors")  # of `pretrain.py --mode single`
NEW_WEIGHTS = {"random": "Random init", "scratch": "Scratch supervised"}


class Weights(NamedTuple):
    name: str  # as in the paper's tables
    source: str  # the file; or what was typed
    sha256: str | None  # of the file; None: new weights, drawn from the seed
    metadata: dict[str, Any]  # pretrain.py's: arch, mode, epoch, ...; bands, mean, std as lists
    tensors: dict[str, Any]  # by torchvision's names


def find_weights(text: str | None) -> Weights:
    """What --weights names, read and checked; torch is not needed yet."""
    if text is None:
        text = str(OWN_WEIGHTS) if OWN_WEIGHTS.is_file() else "random"
    if text in NEW_WEIGHTS:
        return Weights(NEW_WEIGHTS[text], text, None, {}, {})
    digest = hashlib.sha256(weights_file(Path(text), f"--weights {text}")).hexdigest()
    others = f"others' are converted once: probe.py --weights imagenet:{text} --export NEW"
    import safetensors

    try:
        with safetensors.safe_open(text, framework="np") as opened:
            metadata: dict[str, Any] = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        for key in {"bands", "mean", "std"} & metadata.keys():
            metadata[key] = json.loads(metadata[key])
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        fail(1, f"{text}: no whole safetensors file ({error}); {others}")
    if not metadata.get("name") or metadata.get("arch") not in ARCHS:
        fail(1, f"{text}: no encoder of pretrain.py: its metadata lack name or arch; {others}")
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            fail(1, f"{text}: {name} holds NaN or infinity: its run diverged; use an earlier one")
    return Weights(metadata["name"], text, digest, metadata, tensors)


def weights_file(file: Path, asked: str) -> bytes:
    """The bytes of a file that may hold weights; what it is instead, where its start says so."""
    if not file.is_file():
        fail(2, f"{asked}: no file {file}; see --help for what --weights takes")
    data = file.read_bytes()
    start = data[:64].lstrip().lower()
    for beginning, what in (
        (b"<!doctype", "a web page: fetch it again"), (b"<html", "a web page: fetch it again"),
        (b"version https://git-lfs", "a git-lfs pointer: run git lfs pull"),
    ):  # fmt: skip
        if start.startswith(beginning):
            fail(1, f"{file}: is no weights file but {what}")
    if not start:
        fail(1, f"{file}: is empty: fetch it again")
    return data


def check_bands(weights: Weights, bands: list[str], stats: str) -> list[str]:
    """Refuse bands that the weights cannot take; return those that the encoder never saw."""
    if "conv1.weight" in weights.tensors:
        channels = weights.tensors["conv1.weight"].shape[1]
        if channels != len(bands) and (channels, len(bands)) != (3, 1):  # one is copied into three
            named = f"{len(bands)} band{'s' * (len(bands) > 1)} ({', '.join(bands)})"
            fail(2, f"{weights.source}: a {channels}-channel encoder, {named}: they must match")
    unseen = [band for band in bands if band not in weights.metadata.get("bands", bands)]
    if stats == "encoder" and (unseen or "mean" not in weights.metadata):
        what = f"saw no {unseen[0]}" if unseen else "carries no statistics"
        fail(2, f"--stats encoder: {weights.name} {what}; use --stats train")
    return unseen


# <<< shared: weights


def find_any_weights(text: str | None) -> Weights:
    """What --weights names, our own or others'; of others' the tensors are not loaded yet."""
    kind, _, name = (text or "").partition(":")
    if text == "stats":
        return Weights("stats", "stats", None, {}, {})
    if kind not in OTHERS:
        return find_weights(text)
    if not name and kind in ("byol-imagenet", "seco"):
        fail(2, f"--weights {kind}: give the file that holds them, {kind}:FILE")
    digest = name and hashlib.sha256(weights_file(Path(name), f"--weights {text}")).hexdigest()
    return Weights(OTHERS[kind], str(text), digest or None, {}, {})


if __name__ == "__main__":
    ARGS = arguments()  # wrong use ends here, before the seconds that importing torch takes

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

try:
    import bandcrop
except ImportError:
    fail(2, "bandcrop, which reads GeoTIFFs, is not installed: run `make build` first")


# ----------------------------------------------------------------------------------------- data
class Images(NamedTuple):
    names: list[str]
    files: list[tuple[str, ...]]  # of each image: one file, or S2 and S1
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    counts: tuple[int, ...]  # how many bands each of `files` must have
    labels: np.ndarray | None  # int64 [N]
    classes: list[str]
    part: list[str] | None = None  # train, val, test or "" for each image, where a list says so

    @property
    def geotiff(self) -> bool:
        return self.files[0][0].lower().endswith(TIFFS)


class Setup(NamedTuple):
    """How images reach the encoder."""

    images: Images
    bands: list[str]
    size: int
    mean: list[float]
    std: list[float]
    device: torch.device
    spent: dict[str, Any]  # adds up: "read", seconds waited for files; "replaced", samples


def list_images(dataset: str, root: Path, bands_in_file: str | None) -> Images:
    """Every image below `root`, in an order that does not depend on the disk."""
    if dataset == "sen12ms":
        return list_sen12ms(root)
    if dataset == "csv":
        return list_csv(root, bands_in_file)
    everything = glob.glob(f"{glob.escape(str(root))}/**/*", recursive=True)  # hidden files aside
    found = sorted(Path(p) for p in everything if p.lower().endswith(SUFFIXES[dataset]))
    if not found:
        fail(2, missing_data(dataset, root))
    above = sorted({str(path.parents[1]) for path in found})
    if len(above) > 1:
        fail(2, f"{root}: images in {above[0]} and in {above[1]}: give one of them as --root")
    order = EUROSAT_BANDS if dataset == "eurosat" else ["Red", "Green", "Blue"]
    names, files = [path.stem for path in found], [(str(path),) for path in found]
    bands, counts = band_places(order), (len(order),)
    twin = {path.name: str(path) for path in root.parent.glob("eurosat_s1/**/*.tif")}  # SAR
    if dataset == "eurosat" and twin.keys() >= {path.name for path in found}:
        files = [(str(path), twin[path.name]) for path in found]
        bands, counts = bands | band_places(SEN12MS_S1, file=1), (len(order), 2)
    classes, labels = np.unique([path.parent.name for path in found], return_inverse=True)
    return Images(names, files, bands, counts, labels, classes.tolist())


def list_sen12ms(root: Path) -> Images:
    """A scene's label is the simplified class that covers most of the lc tile's IGBP layer."""
    names, files, labels = [], [], []
    for lc in sorted(p for p in root.glob("ROIs*/lc_*/*_lc_*") if p.suffix.lower() in TIFFS):
        season, folder, tile = lc.relative_to(root).parts  # the season may end with _lc too
        pair = [
            root / re.sub("_lc$", f"_{kind}", season) / folder.replace("lc_", f"{kind}_")
            / tile.replace("_lc_", f"_{kind}_")
            for kind in ("s2", "s1")
        ]  # fmt: skip
        igbp = bandcrop.read(str(lc), bands=[0])
        if not 0 <= igbp.min() <= igbp.max() <= 17:
            fail(1, f"{lc}: IGBP classes {igbp.min()} to {igbp.max()}, not 0 to 17: no lc tile?")
        most = np.bincount(np.array(SIMPLE_IGBP)[igbp.astype(np.int64).ravel()]).argmax()
        if most > 0:  # 0: unclassified
            names.append(pair[0].stem)  # the official lists name the S2 tile
            files.append(tuple(map(str, pair)))
            labels.append(int(most) - 1)
    if not names:
        fail(2, missing_data("sen12ms", root))
    bands = band_places(SEN12MS_S2) | band_places(SEN12MS_S1, file=1)
    return Images(names, files, bands, (13, 2), np.array(labels), LAND_COVER)


def list_csv(path: Path, bands_in_file: str | None) -> Images:
    """Images of a table: image, label (needless for --embed) and, if it likes, split."""
    rows = read_table(path, ["image"])
    files = [str(path.parent / row["image"]) for row in rows]
    seen, spelt = {}, {}  # the first row of each file, of each label
    for row, file in zip(rows, files, strict=True):
        label, split = row.get("label", "-"), row.get("split", "train")
        same = seen.setdefault(os.path.realpath(file), row)
        alike = spelt.setdefault("".join(label.split()).lower(), row)
        for wrong, fault in (
            (not os.path.isfile(file), f"no file {file}"),
            (same is not row, f"{row['image']} stands in line {same['line']} already"),
            (split not in ("train", "val", "test"), f"split {split!r} is not train, val or test"),
            (not label.strip(), "the label is empty"),
            (label != alike.get("label", "-"),
             f"label {label!r} is line {alike['line']}'s but for blanks or case; spell them alike"),
            (file.lower().endswith(TIFFS) != files[0].lower().endswith(TIFFS),
             "GeoTIFFs and photos in one table: make it two"),
        ):  # fmt: skip
            if wrong:
                fail(1, f"{path} line {row['line']}: {fault}")
    order = (bands_in_file or "Red,Green,Blue").split(",")
    if files[0].lower().endswith(TIFFS) and not bands_in_file:
        fail(2, "--bands-in-file is missing: the GeoTIFFs' bands in order, as B02,B03,B04,B08")
    if not files[0].lower().endswith(TIFFS) and len(order) not in (1, 3):
        fail(2, f"--bands-in-file names {len(order)} bands; photos have one or three")
    names = [row["image"] for row in rows]
    images = Images(names, [(file,) for file in files], band_places(order), (len(order),), None, [])
    if "split" in rows[0]:
        images = images._replace(part=[row["split"] for row in rows])
    if "label" in rows[0]:
        classes, labels = np.unique([row["label"] for row in rows], return_inverse=True)
        images = images._replace(labels=labels, classes=classes.tolist())
    return images


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` places in `labels`, none twice, each class in its share (largest remainder)."""
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    pools = [rng.permutation(np.flatnonzero(labels == name)) for name in classes]
    return np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, take, strict=True)]))


def split_images(
    labels: np.ndarray, parts: list[str] | None, args: argparse.Namespace, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Places of the fit, validation and test images; and whether a list names the validation part.

    Without such a list it is a fifth of the training split, and the head is trained once more, on
    the whole training split, when its settings are chosen.
    """
    rng, none = np.random.default_rng(seed), np.array([], int)
    rows = np.arange(len(labels))
    if args.subset is not None:
        if args.subset > len(rows):
            fail(2, f"--subset {args.subset}: {args.root} has {len(rows)} images")
        rows = stratified(labels, args.subset, rng)
    if parts is None:
        test = rows[stratified(labels[rows], round(0.2 * len(rows)), rng)]
        fit, val = np.setdiff1d(rows, test), none
    else:
        fit, val, test = (rows[np.array(parts)[rows] == name] for name in ("train", "val", "test"))
    if args.train_images is not None:
        fit, val = np.sort(np.concatenate([fit, val])), none
        if args.train_images > len(fit):
            fail(2, f"--train-images {args.train_images}: {len(fit)} are there to learn from")
        fit = fit[stratified(labels[fit], args.train_images, rng)]
    listed = len(val) > 0
    if not listed and len(fit):
        val = fit[stratified(labels[fit], round(0.2 * len(fit)), rng)]
        fit = np.setdiff1d(fit, val)
    classes = len(np.unique(labels[fit]))
    if min(len(fit), len(val), len(test), classes) < 2:
        fail(1, f"{args.root}, --split {args.split}: too few: {len(fit)} images of {classes} "
                f"classes to fit, {len(val)} to validate, {len(test)} to test")  # fmt: skip
    return fit, val, test, listed


def listed_parts(images: Images, args: argparse.Namespace) -> list[str] | None:
    """train, val, test or "" for each image: the csv's column, or the lists published with the data
    set; None where --split is random."""
    if args.split == "random" or images.part:
        return images.part if args.split != "random" else None
    stem = args.dataset.removesuffix("-rgb") + "-spatial" * (args.split == "spatial")
    lists = {part: f"{stem}-{part}.txt" for part in ("train", "val", "test")}
    if args.dataset == "sen12ms" and args.split == "official":
        lists = {"train": "train_list.txt", "test": "test_list.txt"}
    parts: dict[str, str] = {}
    for part, name in lists.items():
        path = next((p for p in (args.root / name, args.root.parent / name) if p.is_file()), None)
        if path is None:
            fail(2, f"--split {args.split}: no list {args.root / name}; use --split random")
        for line in path.read_text("utf-8", "replace").split():
            if parts.setdefault(Path(line).stem, part) != part:
                fail(1, f"{path}: {line} stands in {lists[parts[Path(line).stem]]} too")
    return [parts.get(name, "") for name in images.names]


def open_photo(path: str, size: int | None = None, bands: int = 3) -> np.ndarray:
    """A JPEG or PNG as uint8 [bands, H, W], to `size` by Pillow's bicubic where it differs."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode[0] in "IF":
                fail(1, f"{path}: a photo of 16 bits or more: give a GeoTIFF")
            if bands == 1 and opened.mode not in ("1", "L"):
                fail(1, f"{path}: has {len(opened.getbands())} bands, --bands-in-file names 1")
            photo = opened.convert("RGB" if bands == 3 else "L")
    except Exception as error:  # whatever a broken or a huge photo raises
        fail(1, f"{path}: {str(error).splitlines()[0]}")
    if size and photo.size != (size, size):
        photo = photo.resize((size, size), Image.Resampling.BICUBIC)
    return np.atleast_3d(np.asarray(photo)).transpose(2, 0, 1)


def which_bands(images: Images, rows: np.ndarray, bands: list[str]) -> dict[str, Any]:
    """paths [n][C], bands [n, C] and bands_in_file [n, C] for bandcrop."""
    where = [images.bands[band] for band in bands]
    return {
        "paths": [[images.files[row][file] for file, _ in where] for row in rows],
        "bands": np.tile([place for _, place in where], (len(rows), 1)),
        "bands_in_file": np.tile([images.counts[file] for file, _ in where], (len(rows), 1)),
    }


def band_statistics(images: Images, rows: np.ndarray, bands: list[str]) -> Any:
    """Mean and standard deviation of each band over every valid sample of the images, [C] each."""
    if images.geotiff:
        mean, std = bandcrop.statistics(**which_bands(images, rows, bands))
    else:
        count, total, squares = 0, np.zeros(len(bands)), np.zeros(len(bands))
        where = [images.bands[band][1] for band in bands]
        for row in rows:
            photo = open_photo(images.files[row][0], None, *images.counts)[where].astype(float)
            count += photo[0].size
            total += photo.sum((1, 2))
            squares += np.square(photo).sum((1, 2))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if (std == 0).any():
        band = bands[int(np.argmin(std))]
        fail(1, f"band {band} is constant over the {len(rows)} training images: nothing to learn")
    return mean.tolist(), std.tolist()


def read_ahead(setup: Setup, rows: np.ndarray) -> Iterator[torch.Tensor]:
    """Batches float32 [n, C, S, S] of the images `rows` in order; valid until the next one."""
    images, channels_last = setup.images, torch.channels_last
    parts = np.array_split(rows, -(-len(rows) // ENCODE_BATCH))  # never leaves a batch of one
    mean, std = (np.array(value, np.float32) for value in (setup.mean, setup.std))
    if images.geotiff:
        requests = (
            which_bands(images, part, setup.bands)
            | {"mean": np.tile(mean, (len(part), 1)), "std": np.tile(std, (len(part), 1))}
            for part in parts
        )
        shape = (len(parts[0]), len(setup.bands), setup.size, setup.size)
        for batch in bandcrop.stream(requests, shape, setup.device):
            setup.spent["read"] += batch.waited
            setup.spent["replaced"] += int(batch.report.replaced.sum())
            yield batch.x.contiguous(memory_format=channels_last)
        return
    where = [images.bands[band][1] for band in setup.bands]
    with ThreadPoolExecutor() as pool:
        for part in parts:
            began = time.perf_counter()
            files = [images.files[row][0] for row in part]
            photos = pool.map(lambda file: open_photo(file, setup.size, *images.counts), files)
            x = (np.stack([*photos])[:, where] - mean[:, None, None]) / std[:, None, None]
            setup.spent["read"] += time.perf_counter() - began
            yield torch.from_numpy(x).to(setup.device).contiguous(memory_format=channels_last)


# ------------------------------------------------------------------------------------- encoder
# >>> shared: encoder
def find_device(text: str) -> torch.device:
    """What --device names; auto: cuda where there is one, else cpu."""
    name = text if text != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(2, f"--device {text}: use auto, cpu, cuda or cuda:N")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(2, f"--device {text} cannot be used: {str(error).splitlines()[0]}")
    return torch.device(name)


def build_encoder(arch: str, channels: int) -> nn.Module:
    """torchvision's ResNet with random weights and no last layer: [N, channels, H, W] -> [N, D]."""
    encoder = getattr(torchvision.models, arch)()
    if channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.width = encoder.fc.in_features  # D: 512 or 2048
    encoder.fc = nn.Identity()
    return encoder.eval()


def load_encoder(weights: Weights, arch: str, bands: int, seed: int) -> nn.Module:
    """The encoder in eval mode, frozen, on the CPU; new weights are drawn from `seed`."""
    torch.manual_seed(seed)
    if not weights.tensors:
        return build_encoder(arch, bands).requires_grad_(False)
    tensors = {name: torch.as_tensor(value) for name, value in weights.tensors.items()}
    try:
        encoder = build_encoder(weights.metadata["arch"], tensors["conv1.weight"].shape[1])
        encoder.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        told = "; ".join(line.strip() for line in str(error).splitlines()[:2])
        fail(1, f"{weights.source}: no {weights.metadata['arch']}: {told}")
    return encoder.requires_grad_(False)


def for_encoder(encoder: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W]; one band is copied into three channels where the weights want three."""
    return batch.expand(-1, encoder.conv1.in_channels, -1, -1)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where that is native, 1.9 times as fast on a CPU with AVX512-BF16; else fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device))


def reestimate_batchnorm(encoder: nn.Module, batches: Iterator[torch.Tensor]) -> None:
    """Set each BatchNorm's running statistics to their mean over these batches."""
    with autocast(next(encoder.parameters()).device):
        images = (for_encoder(encoder, batch) for batch in batches)
        torch.optim.swa_utils.update_bn(images, encoder)  # leaves the mode as it was


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


# ------------------------------------------------------------------------------- others' weights
def others_tensors(weights: Weights, arch: str) -> Weights:
    """The weights with the encoder's tensors by torchvision's names, from a layout of OTHERS."""
    kind, _, name = weights.source.partition(":")
    found = read_tensors(Path(name)) if name else download_tensors(kind, arch)
    held = found.get("state_dict", found)
    if kind == "byol-imagenet":  # yaox12/BYOL-PyTorch: other names, torchvision's order
        values = found.get("online_backbone", {}).values()
        tensors = dict(zip(build_encoder("resnet50", 3).state_dict(), values, strict=False))
    else:
        if kind == "seco":  # Lightning: encoder_q.0 = conv1, .1 = bn1, .4-.7 = layer1-layer4
            stages = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"}
            starts = {f"encoder_q.{place}.": f"{stage}." for place, stage in stages.items()}
        else:  # "", "module.", "backbone.": whatever precedes the first convolution's name
            firsts = [key for key in held if key.endswith("conv1.weight")]
            starts = {min(firsts, key=len, default="").removesuffix("conv1.weight"): ""}
        tensors = {
            new + key.removeprefix(old): value
            for key, value in held.items()
            for old, new in starts.items()
            if key.startswith(old) and not key.startswith(old + "fc.")
        }
    # BatchNorm's step counters aside (0-dimensional), the number of tensors tells the architecture
    count = sum(getattr(value, "ndim", 0) > 0 for value in tensors.values())
    arch = {100: "resnet18", 180: "resnet34", 265: "resnet50"}.get(count, "")
    if not arch or "conv1.weight" not in tensors:
        fail(1, f"{weights.source}: not the layout of {kind!r}: {count} tensors fit it, a ResNet "
                f"has 100, 180 or 265; it holds {', '.join(list(found)[:3])} ...")  # fmt: skip
    return weights._replace(tensors=tensors, metadata={"arch": arch})


def read_tensors(file: Path) -> dict[str, Any]:
    """The names and tensors in a .safetensors or torch file; nothing in it is executed."""
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        return found if isinstance(found, dict) else {}
    except Exception as error:  # whatever a broken file raises
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            fail(1, f"{file}: holds {named[1]} beside its tensors; nothing was executed. Where you "
                    "trust it, save its 'state_dict' alone with torch.save")  # fmt: skip
        fail(1, f"{file}: is no whole weights file: {str(error).splitlines()[0][:80]}")


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


def export(weights: Weights, path: Path) -> None:
    """Others' weights in our own format."""
    import safetensors.torch

    encoder = load_encoder(weights, "", 3, 0)
    about = {"name": weights.name, "arch": weights.metadata["arch"], "source": weights.source}
    tensors = {key: value.contiguous() for key, value in encoder.state_dict().items()}
    data = safetensors.torch.save(tensors, about | {"source_sha256": weights.sha256 or ""})
    write_atomic(path, lambda beside: beside.write_bytes(data) and None)
    print(f"wrote {path}: {weights.name}, {weights.metadata['arch']}", flush=True)


# ------------------------------------------------------------------------------------- features
def encode(encoder: Callable, setup: Setup, rows: np.ndarray) -> torch.Tensor:
    """Features float32 [n, D] on the device, by a frozen encoder or `image_statistics`."""
    network = isinstance(encoder, nn.Module)
    if network:
        encoder.eval()  # else BatchNorm would use, and change with, the batch
    features, progress = [], Progress("encoding: batch")
    with torch.no_grad(), autocast(setup.device):
        for x in read_ahead(setup, rows):
            features.append(encoder(for_encoder(encoder, x) if network else x).float())
            progress(len(features), -(-len(rows) // ENCODE_BATCH))
    whole = torch.cat(features)
    if not whole.isfinite().all():
        fail(1, "the encoder's features are not finite: its training diverged; nothing is written")
    return whole


def image_statistics(x: torch.Tensor) -> torch.Tensor:
    """The floor that a network must clear: [N, C, H, W] -> [N, 12 C].

    Of each band mean, standard deviation, minimum, maximum, percentiles 10, 25, 50, 75 and 90, mean
    size of the gradient down and across, and the standard deviation of its length.
    """
    x = x.float()
    down, across = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
    ordered = x.flatten(2).sort(-1).values
    places = [round(share * (ordered.shape[2] - 1)) for share in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    measures = [
        x.mean((2, 3)), x.std((2, 3)), *ordered[..., places].unbind(-1),
        down.abs().mean((2, 3)), across.abs().mean((2, 3)), torch.hypot(down, across).std((2, 3)),
    ]  # fmt: skip
    return torch.cat(measures, 1)


# ---------------------------------------------------------------------------------------- heads
def build_head(width: int, classes: int) -> nn.Sequential:
    """The paper's head: features [N, width] -> logits [N, classes]."""
    hidden = [nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, classes))


def fit_mlps(
    x: torch.Tensor, y: torch.Tensor, classes: int, settings: list[tuple[str, float]], epochs: int
) -> list[nn.Module]:
    """The paper's head on features [N, D] and labels int64 [N], once for each setting, side by side
    on the same batches; the rates fall along a cosine."""
    heads = [build_head(x.shape[1], classes).to(x.device) for _ in settings]
    kinds = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam}
    optimisers = [
        kinds[how](head.parameters(), lr=rate)
        for head, (how, rate) in zip(heads, settings, strict=True)
    ]
    batches = -(-len(x) // HEAD_BATCH)  # of sizes that differ by one: none has a single row
    falls = [torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs * batches) for o in optimisers]
    progress = Progress("head: epoch")
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), device=x.device).tensor_split(batches):
            part, truth = x[rows], y[rows]
            loss = sum(nn.functional.cross_entropy(head(part), truth) for head in heads)
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            for step in (*optimisers, *falls):
                step.step()
        progress(epoch + 1, epochs)
    return [head.eval() for head in heads]


def fit_heads(
    kind: str, settings: list[tuple], x: torch.Tensor, y: torch.Tensor, classes: int, epochs: int
) -> list[Any]:
    """Heads of a kind, one for each setting, on features [N, D] and labels int64 [N]."""
    if kind == "mlp":
        return fit_mlps(x, y, classes, settings, epochs)
    from sklearn import linear_model, neighbors, pipeline, preprocessing

    def fit(value: float) -> Any:
        if kind == "linear":  # mean cross-entropy + value * |W|^2
            penalty = 1 / (2 * value * len(x))
            head: Any = linear_model.LogisticRegression(C=penalty, max_iter=10_000)
        else:  # votes weighed by cosine similarity + 1
            head = neighbors.KNeighborsClassifier(
                min(int(value), len(x)), metric="cosine", weights=lambda far: 2 - far
            )
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), head)
        return model.fit(x.cpu().numpy(), y.cpu().numpy())

    return [fit(value) for _, value in settings]


def choose_head(
    kind: str, x: torch.Tensor, y: torch.Tensor, fit: int, again: bool, classes: int, epochs: int
) -> tuple[tuple, Any]:
    """The setting with the best F1 on the validation rows, and its head.

    x, y: the training split's features and labels, the first `fit` rows to fit, the rest to choose
    by; with `again` the chosen head is trained anew on all of them.
    """
    heads = fit_heads(kind, CHOICES[kind], x[:fit], y[:fit], classes, epochs)
    truth, names = y[fit:].cpu().numpy(), [str(label) for label in range(classes)]
    scores = [f1_metrics(truth, predict(head, x[fit:]), names)["f1_macro"] for head in heads]
    best = int(np.argmax(scores))
    setting = CHOICES[kind][best]
    if again:
        return setting, fit_heads(kind, [setting], x, y, classes, epochs)[0]
    return setting, heads[best]


def predict(head: Any, x: torch.Tensor) -> np.ndarray:
    """Class numbers int64 [n]."""
    if not isinstance(head, nn.Module):
        return head.predict(x.cpu().numpy())
    with torch.no_grad():
        return torch.cat([head(part).argmax(1) for part in x.split(4096)]).cpu().numpy()


def fine_tune(
    args: argparse.Namespace, setup: Setup, rows: np.ndarray, rate: float, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Encoder and head, trained together on the images `rows`: AdamW, decay 0.05, one cycle, turned
    and mirrored batches; where the images are few, as many epochs as make FINETUNE_STEPS."""
    images, encoder = setup.images, prepare(args, setup, rows, seed)
    torch.manual_seed(seed)
    head = build_head(encoder.width, len(images.classes)).to(setup.device)
    model = nn.Sequential(encoder, head).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = -(-len(rows) // ENCODE_BATCH)
    epochs = max(args.epochs, -(-FINETUNE_STEPS // batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches)
    rng, progress = np.random.default_rng(seed), Progress(f"learning rate {rate}: epoch")
    for epoch in range(epochs):
        order = rng.permutation(rows)
        labels = torch.from_numpy(images.labels[order]).to(setup.device).tensor_split(batches)
        for x, y in zip(read_ahead(setup, order), labels, strict=True):  # split alike
            x = torch.rot90(x, int(rng.integers(4)), (2, 3))
            x = x.flip(3) if rng.integers(2) else x
            optimiser.zero_grad()
            with autocast(setup.device):
                logits = head(encoder(for_encoder(encoder, x)))
            nn.functional.cross_entropy(logits.float(), y).backward()
            optimiser.step()
            schedule.step()
        progress(epoch + 1, epochs)
    model.eval().requires_grad_(False)
    return encoder, head


def choose_fine_tuned(
    args: argparse.Namespace, setup: Setup, fit: np.ndarray, val: np.ndarray, again: bool, seed: int
) -> tuple[tuple, nn.Module, nn.Module]:
    """The learning rate with the best F1 on the validation images, the encoder and the head; with
    `again` these two are trained once more, on both parts."""
    models = [fine_tune(args, setup, fit, rate, seed) for _, rate in CHOICES["finetune"]]
    truth, classes = setup.images.labels[val], setup.images.classes
    said = [predict(head, encode(encoder, setup, val)) for encoder, head in models]
    best = int(np.argmax([f1_metrics(truth, each, classes)["f1_macro"] for each in said]))
    setting = CHOICES["finetune"][best]
    if again:
        models[best] = fine_tune(args, setup, np.concatenate([fit, val]), setting[1], seed)
    return setting, *models[best]


# ------------------------------------------------------------------------------------- measures
def f1_metrics(truth: np.ndarray, said: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """F1 macro, weighted and by class, accuracy, confusion (rows: truth), as scikit-learn's.

    Means are over the classes that the truth holds; a class that is only predicted is listed, and
    what was taken for it counts against the others.
    """
    n = len(classes)
    confusion = np.bincount(truth * n + said, minlength=n * n).reshape(n, n)
    support, guesses, hits = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    present = np.flatnonzero(support)
    f1 = 2 * hits[present] / (support + guesses)[present]
    return {
        "f1_macro": float(f1.mean()),
        "f1_weighted": float((f1 * support[present]).sum() / support.sum()),
        "accuracy": float(hits.sum() / support.sum()),
        "f1_per_class": {classes[i]: float(v) for i, v in zip(present, f1, strict=True)},
        "classes": [classes[i] for i in present],
        "only_predicted": [classes[i] for i in np.flatnonzero((support == 0) & (guesses > 0))],
        "confusion": confusion.tolist(),
    }


# ---------------------------------------------------------- FullGrad (Srinivas and Fleuret 2019)
def fullgrad_terms(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Take logits apart: each equals the sum of its terms (completeness).

    model: in eval mode, of layers with biases, ReLU, pooling; x: [N, C, H, W]; target: int64 [N].
    Returns the logits [N]; and gradient * input [N, C, H, W] with, for each layer, gradient * bias
    in the shape of its output; BatchNorm's bias is beta - mean * gamma / sqrt(var + eps).
    """
    kept: list[tuple[nn.Module, torch.Tensor]] = []

    def keep(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append((module, output))
        return output.clone()  # for what follows in place: torchvision's ReLU and +=

    kinds = (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)  # a ResNet's convolutions have no bias
    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, kinds)]
    x = x.detach().requires_grad_()
    logits = model(x).gather(1, target[:, None])[:, 0]
    first, *gradients = torch.autograd.grad(logits.sum(), [x, *(output for _, output in kept)])
    for hook in hooks:
        hook.remove()
    terms = [first * x]
    for (module, output), gradient in zip(kept, gradients, strict=True):
        bias = module.bias
        if not isinstance(module, nn.Linear):
            shift = module.running_mean / (module.running_var + module.eps).sqrt()
            bias = bias - shift * module.weight
        terms.append(gradient * bias.view(1, -1, *[1] * (output.ndim - 2)))
    return logits.detach(), [term.detach() for term in terms]


def fullgrad(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Saliency [N, H, W]: the terms that have a place, as magnitudes, rescaled to 0..1, enlarged
    bilinearly, summed over channels and layers."""
    saliency = torch.zeros_like(x[:, 0])
    for term in fullgrad_terms(model, x, target)[1]:
        if term.ndim == 4:
            term = term.abs() - term.abs().amin((1, 2, 3), keepdim=True)
            term = term / term.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
            saliency += nn.functional.interpolate(term, x.shape[-2:], mode="bilinear").sum(1)
    return saliency


def save_cams(
    path: Path, model: nn.Module, setup: Setup, rows: np.ndarray, said: np.ndarray
) -> None:
    """A sheet with a row for each image of `rows`: the image, the map of the class that was said of
    it, and the map divided by the mean of all maps, which shows what is this image's own.

    At 64 px nearly all of a map comes from bias terms on grids of 2 to 8 px, with zero padding's
    pattern: maps of six classes correlate by 0.90 (authors' code: 0.91, and 0.98 with ours).
    """
    from matplotlib.figure import Figure

    images, (encoder, _) = setup.images, model
    targets = torch.from_numpy(said).to(setup.device).tensor_split(-(-len(rows) // ENCODE_BATCH))
    pixels, parts = [], []
    for x, target in zip(read_ahead(setup, rows), targets, strict=True):
        parts.append(fullgrad(model, for_encoder(encoder, x), target).cpu())
        pixels += [*x.cpu().numpy().copy()]  # its memory is the next batch's
    maps = torch.cat(parts).numpy()
    figure = Figure(figsize=(7.5, 2.5 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 3, squeeze=False)
    for shown, image, heat, truth, guess in zip(
        axes, pixels, maps, images.labels[rows], said, strict=True
    ):
        low, high = np.percentile(image, (2, 98), axis=(1, 2), keepdims=True)
        photo = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1).transpose(1, 2, 0)
        shown[0].imshow(photo.squeeze(), cmap="gray", vmin=0, vmax=1)
        shown[1].imshow(heat, cmap="inferno")
        shown[2].imshow(heat / np.maximum(maps.mean(0), 1e-12), cmap="inferno")
        right = "right" if truth == guess else f"predicted as {images.classes[guess]}"
        titles = (f"{images.classes[truth]}: {right}", "FullGrad", "divided by the mean map")
        for axis, title in zip(shown, titles, strict=True):
            axis.set_axis_off()
            axis.set_title(title, fontsize=8, loc="left")
    write_atomic(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
    print(f"wrote {path}", flush=True)


# -------------------------------------------------------------------------------------- one run
def standardise(
    args: argparse.Namespace, images: Images, bands: list[str], rows: np.ndarray
) -> Setup:
    """By mean and deviation of each band over the training images `rows`, or the encoder's own."""
    began, about = time.perf_counter(), args.weights.metadata
    if args.stats == "train":
        mean, std = band_statistics(images, rows, bands)
    else:
        where = [about["bands"].index(band) for band in bands]
        mean, std = ([about[key][i] for i in where] for key in ("mean", "std"))
    spent = {"read": time.perf_counter() - began, "replaced": 0}
    return Setup(images, bands, args.size, mean, std, args.device, spent)


def prepare(args: argparse.Namespace, setup: Setup, rows: np.ndarray, seed: int) -> Any:
    """The frozen encoder on the device, its BatchNorm re-estimated on `rows` if asked; or the
    statistics that stand in for one."""
    if args.weights.source == "stats":
        return image_statistics
    encoder = load_encoder(args.weights, args.arch, len(setup.bands), seed)
    encoder = encoder.to(setup.device, memory_format=torch.channels_last)
    if args.bn == "reestimate":
        order = np.random.default_rng(seed).permutation(rows)
        reestimate_batchnorm(encoder, read_ahead(setup, order))
    return encoder


def embed(args: argparse.Namespace, images: Images, bands: list[str]) -> None:
    """The features of every image, with what is known of it, in one NPZ file."""
    rows = np.arange(len(images.names))
    setup = standardise(args, images, bands, rows)
    features = encode(prepare(args, setup, rows, 0), setup, rows).cpu().numpy()
    arrays = {"names": np.array(images.names), "bands": np.array(bands), "features": features}
    if images.labels is not None:
        arrays |= {"labels": images.labels, "classes": np.array(images.classes)}
    filled = io.BytesIO()
    np.savez(filled, **arrays)
    write_atomic(args.embed, lambda beside: beside.write_bytes(filled.getbuffer()) and None)
    print(f"wrote {args.embed}", flush=True)


def run(args: argparse.Namespace, images: Images, known: dict, bands: list[str], seed: int) -> Path:
    """One band (or three) and one seed: read, encode, train the head, measure, write.

    known: what is the same for all bands and seeds and helps to determine the result.
    """
    weights: Weights = args.weights
    floor, kind = weights.source == "stats", "finetune" if args.finetune else args.head
    name = weights.name + " fine-tuned" * (args.finetune and bool(weights.tensors))
    scope = {"dataset": args.dataset, "split": args.split, "subset": args.subset}
    settings = known | {  # but for weights and seed, all that determines the result
        "train_images": args.train_images, "size": args.size, "stats": args.stats,
        "head": args.head, "hidden": HIDDEN, "bf16": native_bf16(args.device),
        "epochs": args.epochs if args.head == "mlp" else None,
    }  # fmt: skip
    settings["task"] = digest_of([scope, settings])
    settings |= {  # None: does not apply
        "arch": None if floor else weights.metadata.get("arch", args.arch),
        "bn": None if floor else args.bn, "finetune": args.finetune, "tried": CHOICES[kind],
        "least_steps": FINETUNE_STEPS if args.finetune else None,
        "batch": ENCODE_BATCH if args.finetune else HEAD_BATCH,
    }  # fmt: skip
    identity = digest_of([settings, bands, seed, name, weights.sha256 or weights.source])
    stem = [args.dataset, args.split, str(args.subset or "full"), name, "+".join(bands)]
    path = result_path(args.out, [*stem, str(args.size)], identity, seed)
    png = path.with_name(path.stem + "-cam.png")
    if path.exists() and (png.exists() or not args.cam):
        print(f"{path}: done before", flush=True)
        return path

    begin = time.perf_counter()
    unseen = check_bands(weights, bands, args.stats)
    fit, val, test, listed = split_images(images.labels, images.part, args, seed)
    both = np.concatenate([fit, val])
    train = fit if listed else both
    setup = standardise(args, images, bands, train)
    start = time.perf_counter()
    if args.finetune:
        chosen, encoder, head = choose_fine_tuned(args, setup, fit, val, not listed, seed)
        trained = time.perf_counter()
        features = encode(encoder, setup, test)
        seconds = {"encode": time.perf_counter() - trained, "train": trained - start}
    else:
        encoder = prepare(args, setup, train, seed)
        before = {} if floor else {k: v.clone() for k, v in encoder.state_dict().items()}
        torch.manual_seed(seed)
        x, features = encode(encoder, setup, np.concatenate([both, test])).tensor_split([len(both)])
        encoded, count = time.perf_counter(), len(images.classes)
        y = torch.from_numpy(images.labels[both]).to(args.device)
        chosen, head = choose_head(args.head, x, y, len(fit), not listed, count, args.epochs)
        if not floor:
            assert_unchanged(encoder, before)
        seconds = {"encode": encoded - start, "train": time.perf_counter() - encoded}
    said = predict(head, features)
    metrics = f1_metrics(images.labels[test], said, images.classes)
    if args.cam:  # some test images, spread over the classes
        rng = np.random.default_rng(0)
        draw = stratified(images.labels[test], min(args.cam, len(test)), rng)
        save_cams(png, nn.Sequential(encoder, head), setup, test[draw], said[draw])
    about = {k: v for k, v in weights.metadata.items() if k not in ("bands", "mean", "std")}
    folder = args.root if args.root.is_dir() else args.root.parent
    write_result(path, {
        "schema": 1, "stage": "probe", **scope, "bands": bands, "seed": seed,
        "metrics": metrics,
        "weights": about | {"name": name, "source": weights.source, "sha256": weights.sha256},
        "config": settings | {
            "identity": identity, "optimiser": chosen[0],
            CHOSEN.get(kind, "learning_rate"): chosen[1], "classes": images.classes,
            "validation": "its list" if listed else "a fifth of the training split",
            "train": len(train), "validated": len(val), "test": len(test),
            "mean": setup.mean, "std": setup.std, "replaced_samples": setup.spent["replaced"],
            "unseen_bands": unseen, "device": args.device.type,
            "synthetic": (folder / "SYNTHETIC.txt").exists(),
            "encoder": weights.metadata,
        },
        "seconds": {"read": setup.spent["read"], **seconds},
    })  # fmt: skip
    note = f"; the encoder never saw {', '.join(unseen)}" if unseen else ""
    if metrics["only_predicted"]:
        note += f"; predicted, but in no test image: {', '.join(metrics['only_predicted'])}"
    print(f"{args.dataset} {'+'.join(bands)}, {name}, seed {seed}: F1 macro "
          f"{metrics['f1_macro']:.3f}, accuracy {metrics['accuracy']:.3f}, "
          f"{time.perf_counter() - begin:.1f} s{note}", flush=True)  # fmt: skip
    return path


def main(args: argparse.Namespace) -> None:
    args.device, weights = find_device(args.device), args.weights
    try:
        if weights.name in OTHERS.values() and not weights.tensors:
            args.weights = weights = others_tensors(weights, args.arch)
        if args.export:
            return export(weights, args.export)
        images = list_images(args.dataset, args.root, args.bands_in_file)
        print(f"{args.dataset}, {len(images.names)} images; weights: {weights.source} "
              f"({weights.name}); on {args.device}", flush=True)  # fmt: skip
        asked = requested_bands(args.bands, images.bands, args.dataset)
        for bands in asked:
            check_bands(weights, bands, args.stats)
        if args.embed:
            if len(asked) > 1:
                fail(2, "--embed writes one file: give one band, or three")
            return embed(args, images, asked[0])
        if images.labels is None:
            fail(1, f"{args.root}: no column label; without one only --embed works")
        if len(images.classes) < 2:
            fail(1, f"{args.root}: all images are of one class, {images.classes[0]}")
        args.split = args.split or ("official" if images.part else "random")
        images = images._replace(part=listed_parts(images, args))
        known = {
            "root": str(args.root), "files": digest_files(f for each in images.files for f in each),
            "images": digest_of([images.names, images.labels.tolist(), images.classes])[:16],
            "parts": images.part and digest_of(images.part), "places": images.bands,
            "bands_in_files": images.counts,
        }  # fmt: skip
        paths = [
            run(args, images, known, bands, seed) for bands in asked for seed in range(args.seeds)
        ]
        print_table(args.out, paths, "f1_macro")
    except (OSError, bandcrop.TileError) as error:  # a full disk, a bad tile
        fail(1, str(error))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no UTF-8
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
