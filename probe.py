"""Probe a frozen encoder: features once for each image, a small head on them, F1 for each band.

    python probe.py --dataset eurosat --band RE5                             # random weights
    python probe.py --dataset eurosat --band all --seeds 5 --weights runs/x/encoder.safetensors
    python probe.py --dataset eurosat-rgb --bands RGB --weights imagenet --subset 7000
    python probe.py --dataset csv --root tiles.csv --bands-in-file B02,B03,B04,B08 --band NIR

One JSON in results/ for each band and seed; a rerun skips those that are there. After training, the
encoder is proved unchanged, BatchNorm statistics included. Head as in the paper: Linear-128,
BatchNorm, ReLU, Linear; cross-entropy, 100 epochs. The paper names no optimiser: SGD or Adam, and
its learning rate, are chosen by F1 on a validation part of the training split, never on test.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import shutil
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
eurosat       eurosat      EuroSATallBands.zip        5ac12b3b2557aa56e1826e981e8e200e
eurosat-rgb   eurosat-rgb  EuroSAT.zip                c8fa014336c82ac7804f0398fcb19387
resisc45      resisc45     NWPU-RESISC45.zip          75206b2e16446591afa88e2628744886
resisc45      resisc45     resisc45-train.txt         b5a4c05a37de15e4ca886696a85c403e
resisc45      resisc45     resisc45-val.txt           a0770cee4c5ca20b8c32bbd61e114805
resisc45      resisc45     resisc45-test.txt          3dda9e4988b47eb1de9f07993653eb08
eurosat*      eurosat      eurosat-train.txt          908f142e73d6acdf3f482c5e80d851b1
eurosat*      eurosat      eurosat-val.txt            95de90f2aa998f70a3b2416bfe0687b4
eurosat*      eurosat      eurosat-test.txt           7ae5ab94471417b6e315763121e67c5f
eurosat*      eurosat      eurosat-spatial-train.txt  7be3254be39f23ce4d4d144290c93292
eurosat*      eurosat      eurosat-spatial-val.txt    acf392290050bb3df790dc8fc0ebf193
eurosat*      eurosat      eurosat-spatial-test.txt   5ec1733f9c16116bf0aa2d921fc613ef
"""  # data set, revision, file, MD5
FOLDERS = {  # where the class folders lie below the root, by who unpacked them
    "eurosat": ("", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"),
    "eurosat-rgb": ("", "2750"),
    "resisc45": ("", "NWPU-RESISC45"),
}
EUROSAT_BANDS = "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A".split()  # B8A is LAST
SIMPLE_IGBP = [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10]  # by IGBP id 0..17
LAND_COVER = (  # the simplified classes 1..10
    "Forest Shrubland Savanna Grassland Wetlands Croplands Urban/Built-up Snow/Ice Barren Water"
).split()
SIZES = {"eurosat": 64, "eurosat-rgb": 64}  # the images' own; 128 else
HIDDEN = 128  # paper
HEAD_BATCH = 256
ENCODE_BATCH = 64
CHOICES = {  # settings tried on the validation part
    "mlp": [("sgd", 0.1), ("sgd", 0.01), ("adam", 0.0003)],  # learning rates
    "linear": [("lbfgs", 1e-4), ("lbfgs", 1e-3), ("lbfgs", 1e-2), ("lbfgs", 1e-1)],  # L2 penalties
    "knn": [("cosine", 1), ("cosine", 5), ("cosine", 20)],  # neighbours
}
CHOSEN = {"mlp": "learning_rate", "linear": "l2_penalty", "knn": "neighbours"}  # as results say it


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be before torch is imported."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, choices=[*FOLDERS, "sen12ms", "csv"])
    add("--root", type=Path, help="its folder, or FILE.csv: image,label[,split] (data/<dataset>)")
    add("--download", action="store_true", help="fetch eurosat, eurosat-rgb, resisc45 into --root")
    add("--band", "--bands", dest="bands", help="RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; all")
    add("--bands-in-file", help="csv: the files' bands in order (photos: Red,Green,Blue)")
    add("--weights", default="random", help="encoder.safetensors of pretrain.py; random; scratch "
        "(encoder trained too); imagenet, imagenet-v2; imagenet:, byol-imagenet:, seco:FILE")
    add("--arch", choices=ARCHS, default="resnet50", help="of random, scratch and imagenet")
    add("--split", choices=["random", "official", "spatial"], help="random: 80/20, stratified, by "
        "seed (default); official, spatial: the published lists, or the csv's own column")
    add("--subset", type=int, metavar="N", help="N images, stratified, drawn anew for each seed: "
        "7000 is the paper's EuroSAT 7K, 5000 its Sen12MS 5K")
    add("--size", type=int, metavar="PX", help="side of the encoder's input: 64 for EuroSAT, else "
        "128 (F1 of a random ResNet-18 at 64, 128, 224: EuroSAT 0.48, 0.45, 0.49, RESISC45 0.10, "
        "0.16, 0.15; 224 takes twelve times as long as 64)")
    add("--stats", choices=["train", "encoder"], default="train", help="mean and deviation of the "
        "bands: of the training images (default) or as the encoder was pre-trained with")
    add("--bn", choices=["encoder", "reestimate"], default="encoder", help="BatchNorm statistics: "
        "as pre-trained (default), or of the unlabelled training images; frozen after that")
    add("--head", choices=list(CHOICES), default="mlp", help="mlp (paper), linear: logistic "
        "regression, knn: nearest neighbours; both on standardised features")
    add("--epochs", type=int, default=100, help="of the head, or of scratch's all (100, paper)")
    add("--seeds", type=int, default=1, metavar="K", help="seeds 0..K-1 of head, split, subset, "
        "random weights (1)")
    add("--embeddings", action="store_true", help="write the test images' features (NPZ)")
    add("--cam", type=int, default=0, metavar="K", help="FullGrad maps of K test images (PNG)")
    add("--cache", type=Path, metavar="DIR", help="keep features on disk for reruns")
    add("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    # fmt: on
    args.root = args.root or Path("data") / args.dataset
    args.size = SIZES.get(args.dataset, 128) if args.size is None else args.size
    for name, least in (("size", 32), ("epochs", 1), ("seeds", 1), ("cam", 0)):
        if getattr(args, name) < least:
            fail(2, f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.cam and args.head == "knn":
        fail(2, "--cam explains a logit and --head knn has none: use mlp or linear")
    if args.weights == "scratch" and (args.head, args.bn, args.stats) != (
        "mlp",
        "encoder",
        "train",
    ):
        fail(2, "--weights scratch trains encoder and head: --head, --bn, --stats do not apply")
    if args.download:
        download(args.dataset, args.root)
        if not args.bands:
            raise SystemExit(0)
    if not args.bands:
        fail(2, "--band is missing: RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; or all")
    args.weights = find_weights(args.weights)
    if not args.root.exists():
        fail(2, missing_data(args.dataset, args.root))
    for folder in filter(None, (args.out, args.cache)):
        open_folder(folder)
    return args


def sources(dataset: str) -> list[tuple[str, str]]:
    """(URL, MD5) of each file of a data set, the archive first; none where it cannot be fetched."""
    rows = [line.split() for line in DOWNLOADS.strip().splitlines()]
    return [
        (f"{HUB}/{REVISIONS[revision]}/{file}", md5)
        for name, revision, file, md5 in rows
        if name == dataset or (name.endswith("*") and dataset.startswith(name[:-1]))
    ]


def missing_data(dataset: str, root: Path) -> str:
    """Two lines: what is not there, and how to get it."""
    if dataset == "csv":
        return f"{root}: no such file\n  it has the columns image,label and, if it likes, split"
    if dataset == "sen12ms":
        where = "comes by rsync from dataserv.ub.tum.de (user and password m1474000)"
        return (
            f"{root}: no SEN12MS with its lc tiles there\n  it {where}; give its folder as --root"
        )
    (url, md5), *_ = sources(dataset)
    command = f"python probe.py --dataset {dataset} --root {root} --download"
    return (
        f"{root}: no {dataset} there; get it with: {command}\n  or unpack {url} (md5 {md5}) there"
    )


def download(dataset: str, root: Path) -> None:
    """Fetch and unpack a data set with its split lists; `root` appears once all of it is there."""
    if not sources(dataset):
        fail(2, f"--download does not know {dataset}: " + missing_data(dataset, root))
    if root.exists() and any(root.iterdir()):
        fail(2, f"--download: {root} is not empty; remove it or choose another --root")
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive

    part = root.with_name(root.name + ".part")
    for url, md5 in sources(dataset):
        file = part / url.rsplit("/", 1)[1]
        try:
            if not check_integrity(file, md5):  # else an interrupted run has fetched it
                file.unlink(missing_ok=True)
                download_url(url, part, md5=md5)
            if file.suffix == ".zip":
                extract_archive(file, part)
        except (OSError, RuntimeError) as error:
            fail(1, f"--download: {url}: {str(error).splitlines()[0]}; run it again to go on")
    for archive in part.glob("*.zip"):
        archive.unlink()
    shutil.rmtree(root, ignore_errors=True)  # empty, as checked above
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
        fail(2, f"{path}: no such file; it is a CSV file with the columns {','.join(columns)}")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(1, f"{path}: not a readable UTF-8 text ({error})")
    header: list[str] = []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            values = next(csv.reader([line], strict=True), [])
        except csv.Error as error:
            fail(1, f"{path} line {number}: {error} (a quotation mark astray?)")
        if not header:
            header = [value.strip() for value in values]
            for column in columns:
                if header.count(column) != 1:
                    other = next((mark for mark in ";\t" if mark in line), "")
                    why = f" (separator {other!r}?)" if other else ""
                    fail(1, f"{path} line 1: no column {column}{why}: {line[:80]!r}")
        elif values:
            if len(values) != len(header):
                fail(1, f"{path} line {number}: {len(values)} values under {len(header)} columns")
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
# Results whose settings are equal in these may stand in one table.
COMPARED = "files images classes ignored train_images head size arch bn stats epochs".split()


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
    result["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
    result["versions"] |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    if not path.exists():
        write_atomic(path, lambda beside: beside.write_text(text) and None)
        print(f"wrote {path}", flush=True)


def print_table(out: Path, paths: list[Path], metric: str) -> None:
    """The metric of this run's results by band, beside random's and the floor's in `out`.

    Mean over seeds and half the width of the 95 % interval (Student's t) where there are several.
    """
    from scipy.special import stdtrit  # Student's quantile; here, as it takes a second to import

    first = json.loads(paths[0].read_text())
    found: dict[str, dict[str, dict[int, float]]] = {}  # name: band: seed
    for path in [*paths, *sorted(out.glob("*.json"))]:
        try:
            result = json.loads(path.read_text())
            name, settings = result["weights"]["name"], result["config"]
            if path not in paths:
                if name not in ("Random init", "stats") or name == first["weights"]["name"]:
                    continue
                if any(
                    result[key] != first[key] for key in ("stage", "dataset", "split", "subset")
                ):
                    continue
                both = [(settings.get(key), first["config"].get(key)) for key in COMPARED]
                if any(None not in pair and pair[0] != pair[1] for pair in both):
                    continue
            seeds = found.setdefault(name, {}).setdefault("+".join(result["bands"]), {})
            seeds[result["seed"]] = result["metrics"][metric]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no result of this script
    print(f"\n{metric}, mean over seeds ± half the 95 % interval")
    print("".join(f"{title:22}" for title in ("band", *found)).rstrip())
    for band in found[first["weights"]["name"]]:
        cells = [band]
        for bands in found.values():
            values = np.array([*bands.get(band, {}).values()])
            cells.append(f"{values.mean():.3f}" if len(values) else "-")
            if len(values) > 1:
                half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values) ** 0.5
                cells[-1] += f" ± {half:.3f}"
        print("".join(f"{cell:22}" for cell in cells).rstrip(), flush=True)


class Progress:
    """Says how far a part of the work is: in place on a terminal, once a minute in a log file."""

    def __init__(self, what: str) -> None:
        self.what, self.terminal, self.said = what, sys.stderr.isatty(), time.monotonic()

    def __call__(self, done: int, count: int, note: str = "") -> None:
        if time.monotonic() - self.said < (0.1 if self.terminal else 60) and done < count:
            return
        self.said = time.monotonic()
        if self.terminal:
            line = f"  {self.what}: {done} of {count}{note}" if done < count else ""
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif done < count:
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
    if not start:
        fail(1, f"{file}: is empty: fetch it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        fail(1, f"{file}: is no weights file but a web page: fetch it again")
    if start.startswith(b"version https://git-lfs"):
        fail(1, f"{file}: is no weights file but a git-lfs pointer: run git lfs pull")
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


if __name__ == "__main__":
    ARGS = arguments()  # wrong use ends here, before the seconds that importing torch takes

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

try:
    import bandcrop
except ImportError:  # photos do without
    bandcrop = None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------- data
class Images(NamedTuple):
    names: list[str]  # unique
    files: list[tuple[str, ...]]  # of each image: one file, or S2 and S1
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    labels: np.ndarray  # int64 [N]
    classes: list[str]
    part: list[str] | None  # the csv's split column
    synthetic: bool

    @property
    def geotiff(self) -> bool:
        return self.files[0][0].lower().endswith((".tif", ".tiff"))


class Setup(NamedTuple):
    """How images reach the encoder."""

    bands: list[str]
    size: int
    mean: list[float]
    std: list[float]


def list_images(dataset: str, root: Path, bands_in_file: str | None) -> Images:
    """Every labelled image below `root`, in an order that does not depend on the disk."""
    synthetic = (root if root.is_dir() else root.parent).joinpath("SYNTHETIC.txt").exists()
    if dataset == "sen12ms":
        return list_sen12ms(root, synthetic)
    if dataset == "csv":
        return list_csv(root, bands_in_file, synthetic)
    suffix = ".tif" if dataset == "eurosat" else ".jpg"
    found: list[Path] = []
    for inner in FOLDERS[dataset]:
        found = found or sorted((root / inner).glob(f"*/*{suffix}"))
    if not found:
        fail(2, missing_data(dataset, root))
    files = [(str(path),) for path in found]
    bands = band_places(EUROSAT_BANDS if suffix == ".tif" else ["Red", "Green", "Blue"])
    if dataset == "eurosat":  # its SAR twin: the same file names in a folder beside
        twin = {path.name: str(path) for path in root.parent.glob("eurosat_s1/**/*.tif")}
        if twin and all(path.name in twin for path in found):
            files = [(str(path), twin[path.name]) for path in found]
            bands |= band_places(SEN12MS_S1, file=1)
    classes = sorted({path.parent.name for path in found})
    labels = np.array([classes.index(path.parent.name) for path in found])
    return Images([path.stem for path in found], files, bands, labels, classes, None, synthetic)


def list_sen12ms(root: Path, synthetic: bool) -> Images:
    """A scene's label is the simplified class that covers most of the lc tile's IGBP layer."""
    names, files, labels = [], [], []
    for lc in sorted(root.glob("ROIs*/lc_*/*_lc_*.tif")):
        folder, tile = lc.parent.name.replace("lc_", "{}_"), lc.name.replace("_lc_", "_{}_")
        pair = [lc.parents[1] / folder.format(s) / tile.format(s) for s in ("s2", "s1")]
        for path in pair:
            if not path.is_file():
                fail(1, f"{lc}: no tile {path} beside it; complete the archive or remove the lc")
        igbp = bandcrop.read(str(lc), bands=[0])
        if igbp.min() < 0 or igbp.max() > 17:
            fail(1, f"{lc}: IGBP class {igbp.max()} is outside 0..17; is this an lc tile?")
        most = np.bincount(np.array(SIMPLE_IGBP)[igbp.astype(np.int64).ravel()]).argmax()
        if most > 0:  # 0: unclassified
            names.append(pair[0].stem)  # the official lists name the S2 tile
            files.append(tuple(map(str, pair)))
            labels.append(int(most) - 1)
    if not names:
        fail(2, missing_data("sen12ms", root))
    bands = band_places(SEN12MS_S2) | band_places(SEN12MS_S1, file=1)
    return Images(names, files, bands, np.array(labels), LAND_COVER, None, synthetic)


def list_csv(path: Path, bands_in_file: str | None, synthetic: bool) -> Images:
    """Images of a file with the columns image,label and, if it likes, split (train, val, test)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        fail(2, f"--root {path}: not a readable CSV file: {error}")
    for column in ("image", "label"):
        if not rows or rows[0].get(column) is None:
            fail(1, f"{path}: no column {column!r} with rows; it needs image,label[,split]")
    files = [(str(path.parent / row["image"]),) for row in rows]
    for line, (file,) in enumerate(files, start=2):
        if not Path(file).is_file():
            fail(1, f"{path} line {line}: no file {file}")
    if not bands_in_file and files[0][0].lower().endswith((".tif", ".tiff")):
        fail(2, "--bands-in-file is missing: the GeoTIFFs' bands in order, as B02,B03,B04,B08")
    part = [row["split"] for row in rows] if "split" in rows[0] else None
    for line, name in enumerate(part or [], start=2):
        if name not in ("train", "val", "test"):
            fail(1, f"{path} line {line}: split {name!r} is not train, val or test")
    classes = sorted({row["label"] for row in rows})
    labels = np.array([classes.index(row["label"]) for row in rows])
    bands = band_places((bands_in_file or "Red,Green,Blue").split(","))
    return Images([r["image"] for r in rows], files, bands, labels, classes, part, synthetic)


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` places in `labels`, none twice, each class in its share (largest remainder)."""
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    pools = [rng.permutation(np.flatnonzero(labels == name)) for name in classes]
    return np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, take, strict=True)]))


def split_images(
    images: Images, args: argparse.Namespace, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Places of the fit, validation and test images; and whether a list names the validation part.

    Without such a list it is a fifth of the training split, and the head is trained once more, on
    the whole training split, when its settings are chosen.
    """
    rng = np.random.default_rng(seed)
    labels, rows = images.labels, np.arange(len(images.labels))
    if args.subset is not None:
        if not 0 < args.subset <= len(rows):
            fail(2, f"--subset {args.subset}: {args.root} has {len(rows)} images")
        rows = stratified(labels, args.subset, rng)
    if args.split == "random":
        test = rows[stratified(labels[rows], round(0.2 * len(rows)), rng)]
        fit, val = np.setdiff1d(rows, test), np.array([], int)
    else:
        part = np.array(images.part or listed_parts(images.names, args))
        fit, val, test = (rows[part[rows] == name] for name in ("train", "val", "test"))
    listed = len(val) > 0
    if not listed and len(fit):
        val = fit[stratified(labels[fit], round(0.2 * len(fit)), rng)]
        fit = np.setdiff1d(fit, val)
    if min(len(fit), len(val), len(test)) < 2:
        counts = f"{len(fit)} to fit, {len(val)} to validate, {len(test)} to test"
        fail(1, f"{args.root}, --split {args.split}: too few images: {counts}")
    return fit, val, test, listed


def listed_parts(names: list[str], args: argparse.Namespace) -> list[str]:
    """train, val, test or "" for each image, from the lists published with the data set."""
    if args.dataset == "sen12ms" and args.split == "official":
        lists = {"train": "train_list.txt", "test": "test_list.txt"}
    else:
        stem = args.dataset.removesuffix("-rgb") + "-spatial" * (args.split == "spatial")
        lists = {part: f"{stem}-{part}.txt" for part in ("train", "val", "test")}
    parts: dict[str, str] = {}
    for part, name in lists.items():
        path = next((p for p in (args.root / name, args.root.parent / name) if p.is_file()), None)
        if path is None:
            fail(2, f"--split {args.split}: no list {args.root / name}; use --split random")
        parts |= {Path(line).stem: part for line in path.read_text().split()}
    return [parts.get(name, "") for name in names]


def open_photo(path: str, size: int | None = None) -> np.ndarray:
    """A JPEG or PNG as uint8 [3, H, W], to `size` by Pillow's bicubic where it differs."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
    except OSError as error:
        fail(1, f"{path}: {error}")
    if size and photo.size != (size, size):
        photo = photo.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(photo).transpose(2, 0, 1)


def read_images(
    images: Images, rows: np.ndarray, setup: Setup, reader: Any
) -> tuple[np.ndarray, int]:
    """Standardised whole images float32 [N, C, size, size], and how many samples were no number."""
    where = [images.bands[band] for band in setup.bands]
    mean, std = (np.array(v, np.float32) for v in (setup.mean, setup.std))  # [C]
    out = np.empty((len(rows), len(where), setup.size, setup.size), np.float32)
    if not images.geotiff:
        for n, row in enumerate(rows):
            out[n] = open_photo(images.files[row][0], setup.size)[[band for _, band in where]]
        return (out - mean[:, None, None]) / std[:, None, None], 0
    paths: Any = [[images.files[row][file] for file, _ in where] for row in rows]
    if len({file for file, _ in where}) == 1:  # one read serves all bands
        paths = [each[0] for each in paths]
    index, mean, std = (np.tile(v, (len(rows), 1)) for v in ([b for _, b in where], mean, std))
    return out, int(reader.fill(out, paths, index, mean=mean, std=std).replaced.sum())


def band_statistics(images: Images, rows: np.ndarray, bands: list[str]) -> Any:
    """Mean and standard deviation of each band over every valid sample of the images, [C] each."""
    where = [images.bands[band] for band in bands]
    count, total, squares = np.zeros((3, len(bands)))
    nodata: list[float | None] = [None] * len(bands)
    if images.geotiff:
        nodata = [bandcrop.info(images.files[rows[0]][file]).nodata for file, _ in where]
    for row in rows:
        files = images.files[row]
        if images.geotiff:
            pixels = [bandcrop.read(files[file], bands=[band]) for file, band in where]
        else:
            pixels = list(open_photo(files[0])[[band for _, band in where]])
        for c, band in enumerate(pixels):
            good = band[np.isfinite(band) & (band != nodata[c])].astype(np.float64)
            count[c] += good.size
            total[c] += good.sum()
            squares[c] += np.square(good).sum()
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
    if (std == 0).any():
        band = bands[int(np.argmin(std))]
        fail(1, f"band {band} is constant over the {len(rows)} training images: nothing to learn")
    return mean.tolist(), std.tolist()


def read_ahead(
    images: Images, rows: np.ndarray, setup: Setup, spent: dict[str, Any]
) -> Iterator[torch.Tensor]:
    """Batches float32 [n, C, S, S] of `rows` in order; the next is read while one is worked on."""
    reader = bandcrop.Reader() if images.geotiff else None

    def read(part: np.ndarray) -> tuple[np.ndarray, int]:
        start = time.perf_counter()
        out = read_images(images, part, setup, reader)
        spent["read"] += time.perf_counter() - start
        return out

    parts = np.array_split(rows, -(-len(rows) // ENCODE_BATCH))  # never leaves a batch of one
    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read, parts[0])
        for done, following in enumerate([*parts[1:], None], start=1):
            pixels, replaced = pending.result()
            if following is not None:
                pending = ahead.submit(read, following)
            spent["replaced"] += replaced
            if sys.stderr.isatty():
                end = "\r" if following is not None else "\r\033[K"
                print(f"  {done} of {len(parts)} batches", end=end, file=sys.stderr, flush=True)
            yield torch.from_numpy(pixels).to(DEVICE).contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------- encoder
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
    """Set each BatchNorm's running statistics to their mean over these batches; then eval mode."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative mean
            module.train()
    with torch.no_grad():
        for batch in batches:
            with autocast(batch.device):
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


def encode(encoder: nn.Module, batches: Iterator[torch.Tensor]) -> torch.Tensor:
    """Features float32 [N, D] on the CPU, by the encoder in eval mode.

    In bf16 instead of fp32, on 3,000 EuroSAT photos, single seeds' F1 moved by up to 0.02 either
    way, means of five by -0.005, -0.004 and 0.000.
    """
    encoder.eval()  # else BatchNorm would use, and change with, the batch
    with torch.no_grad(), autocast():
        features = torch.cat([encoder(for_encoder(encoder, x)).float().cpu() for x in batches])
    if not features.isfinite().all():
        fail(1, "the encoder's features are not finite: its training diverged; nothing is written")
    return features


# ---------------------------------------------------------------------------------------- heads
def build_head(width: int, classes: int) -> nn.Sequential:
    """The paper's head: features [N, width] -> logits [N, classes]."""
    hidden = [nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, classes))


def fit_mlp(
    x: torch.Tensor, y: torch.Tensor, classes: int, how: str, rate: float, epochs: int
) -> nn.Module:
    """The paper's head on features [N, D] and labels int64 [N]; the rate falls along a cosine."""
    head = build_head(x.shape[1], classes)
    if how == "sgd":
        optimiser: Any = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    else:
        optimiser = torch.optim.Adam(head.parameters(), lr=rate)
    batches = -(-len(x) // HEAD_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).tensor_split(batches):
            optimiser.zero_grad()
            nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    return head.eval()


def standardiser(x: torch.Tensor) -> nn.Module:
    """Features to mean 0, deviation 1 over the training images: a BatchNorm without weights."""
    scale = nn.BatchNorm1d(x.shape[1], affine=False)
    scale.running_mean, scale.running_var = x.mean(0), x.var(0)
    return scale.eval()


def fit_linear(
    x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float, steps: int
) -> nn.Module:
    """Logistic regression: mean cross-entropy + penalty * |W|^2, by L-BFGS."""
    scale, head = standardiser(x), nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    x = scale(x)
    lbfgs = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = nn.functional.cross_entropy(head(x), y) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    lbfgs.step(loss)
    return nn.Sequential(scale, head)


def fit_knn(x: torch.Tensor, y: torch.Tensor, classes: int, k: int) -> Callable:
    """The k nearest training images by cosine vote, each with its similarity."""
    scale = standardiser(x)
    known = nn.functional.normalize(scale(x))

    def vote(new: torch.Tensor) -> torch.Tensor:
        near, which = (nn.functional.normalize(scale(new)) @ known.T).topk(min(k, len(known)))
        return torch.zeros(len(new), classes).scatter_add_(1, y[which], 1 + near)

    return vote


def fit_head(
    kind: str, setting: tuple, x: torch.Tensor, y: torch.Tensor, classes: int, epochs: int
) -> Callable:
    """A head of any kind: features [n, D] -> scores [n, classes]."""
    if kind == "mlp":
        return fit_mlp(x, y, classes, *setting, epochs)
    if kind == "linear":
        return fit_linear(x, y, classes, setting[1], epochs)
    return fit_knn(x, y, classes, setting[1])


def choose_head(
    kind: str, x: torch.Tensor, y: torch.Tensor, fit: int, again: bool, classes: int, epochs: int
) -> tuple[tuple, Callable]:
    """The setting with the best F1 on the validation rows, and its head.

    x, y: the training split's features and labels, the first `fit` rows to fit, the rest to choose
    by; with `again` the chosen head is trained anew on all of them. Each setting is tried for all
    epochs: tried for a quarter of them, the fastest wins instead of the best (up to 0.05 less F1).
    """
    scores, heads = [], []
    for setting in CHOICES[kind]:
        heads.append(fit_head(kind, setting, x[:fit], y[:fit], classes, epochs))
        names = [str(label) for label in range(classes)]
        scores.append(f1_metrics(y[fit:].numpy(), predict(heads[-1], x[fit:]), names)["f1_macro"])
    best = int(np.argmax(scores))
    setting = CHOICES[kind][best]
    return setting, fit_head(kind, setting, x, y, classes, epochs) if again else heads[best]


def predict(head: Callable, x: torch.Tensor) -> np.ndarray:
    """Class numbers int64 [n]."""
    with torch.no_grad():
        return torch.cat([head(part).argmax(1) for part in x.split(4096)]).numpy()


def train_scratch(
    encoder: nn.Module, images: Images, rows: np.ndarray, setup: Setup, epochs: int, seed: int,
    spent: dict[str, Any],
) -> nn.Module:  # fmt: skip
    """Encoder and head together: AdamW 1e-3, decay 0.05, one cycle, turned and mirrored batches."""
    head = build_head(encoder.width, len(images.classes)).to(DEVICE)
    model = nn.Sequential(encoder, head).train()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(rows) // ENCODE_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(rows)
        labels, done = torch.from_numpy(images.labels[order]).to(DEVICE), 0
        for batch in read_ahead(images, order, setup, spent):
            y = labels[done : done + len(batch)]
            done += len(batch)
            batch = torch.rot90(batch, int(rng.integers(4)), (2, 3))
            batch = batch.flip(3) if rng.integers(2) else batch
            optimiser.zero_grad()
            with autocast():
                logits = model(batch)
            nn.functional.cross_entropy(logits.float(), y).backward()
            optimiser.step()
            schedule.step()
    model.eval().requires_grad_(False)
    return head.cpu()


# ------------------------------------------------------------------------------------- measures
def f1_metrics(truth: np.ndarray, said: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """F1 macro, weighted and by class, accuracy, confusion (rows: truth), as scikit-learn's.

    A class that is in neither truth nor prediction is left out, not counted as 0.
    """
    n = len(classes)
    confusion = np.bincount(truth * n + said, minlength=n * n).reshape(n, n)
    support, hits = confusion.sum(1), np.diag(confusion)
    present = np.flatnonzero(support + confusion.sum(0))
    f1 = 2 * hits[present] / (support + confusion.sum(0))[present]
    return {
        "f1_macro": float(f1.mean()),
        "f1_weighted": float((f1 * support[present]).sum() / support.sum()),
        "accuracy": float(hits.sum() / support.sum()),
        "f1_per_class": {classes[i]: float(v) for i, v in zip(present, f1, strict=True)},
        "confusion": confusion.tolist(),
    }


# ---------------------------------------------------------- FullGrad (Srinivas and Fleuret 2019)
def fullgrad_terms(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Take logits apart: each equals the sum of its input term and its bias terms (completeness).

    model: in eval mode, of layers with biases, ReLU, pooling; x: [N, C, H, W]; target: int64 [N].
    Returns the logits [N], gradient * input [N, C, H, W] and, for each layer with a bias, gradient
    * bias in the shape of its output; BatchNorm's bias is beta - mean * gamma / sqrt(var + eps).
    """
    kept: list[tuple[nn.Module, torch.Tensor]] = []

    def keep(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append((module, output))
        return output.clone()  # for what follows in place: torchvision's ReLU and +=

    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, kinds)]
    try:
        x = x.detach().requires_grad_()
        logits = model(x).gather(1, target[:, None])[:, 0]
        gradients = torch.autograd.grad(logits.sum(), [x, *(output for _, output in kept)])
    finally:
        for hook in hooks:
            hook.remove()
    biases = []
    for (module, output), gradient in zip(kept, gradients[1:], strict=True):
        bias = module.bias
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            shift = module.running_mean / (module.running_var + module.eps).sqrt()
            bias = -shift if bias is None else bias - shift * module.weight
        if bias is not None:
            biases.append((gradient * bias.view(1, -1, *[1] * (output.ndim - 2))).detach())
    return logits.detach(), (gradients[0] * x).detach(), biases


def fullgrad(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Saliency [N, H, W]: the input term and each layer's bias term (those that have a place), as
    magnitudes, rescaled to 0..1, enlarged bilinearly, summed over channels and layers."""
    _, input_term, biases = fullgrad_terms(model, x, target)
    saliency = torch.zeros_like(x[:, 0])
    for term in (input_term, *(term for term in biases if term.ndim == 4)):
        term = term.abs() - term.abs().amin((1, 2, 3), keepdim=True)
        term = term / term.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        saliency += nn.functional.interpolate(term, x.shape[-2:], mode="bilinear").sum(1)
    return saliency


def draw_cams(path: Path, pixels: np.ndarray, maps: np.ndarray, titles: list[str]) -> None:
    """A sheet of images [K, C, H, W], each beside its map [K, H, W] under its title."""
    from matplotlib.figure import Figure

    columns = min(3, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for axis in axes.ravel():
        axis.set_axis_off()
    for (left, right), image, heat, title in zip(axes, pixels, maps, titles, strict=False):
        low, high = np.percentile(image, (2, 98), axis=(1, 2), keepdims=True)
        shown = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1).transpose(1, 2, 0)
        left.imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=1)
        left.set_title(title, fontsize=8, loc="left")
        right.imshow(heat, cmap="inferno")
    write_atomic(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


# -------------------------------------------------------------------------------------- one run
def cached_features(
    encoder: nn.Module,
    images: Images,
    rows: np.ndarray,
    setup: Setup,
    cache: Path | None,
    spent: Any,
) -> torch.Tensor:
    """Features of `rows` [N, D]; from `cache` where the same weights met the same pixels before."""
    key = hashlib.sha256(json.dumps([setup, native_bf16(DEVICE)]).encode())
    for name, value in encoder.state_dict().items():
        key.update(name.encode() + value.cpu().numpy().tobytes())
    for path in (path for row in rows for path in images.files[row] if cache):
        stat = os.stat(path)
        key.update(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode())
    file = cache / f"{key.hexdigest()[:32]}.pt" if cache else None
    if file and file.exists():
        return torch.load(file, weights_only=True)
    features = encode(encoder, read_ahead(images, rows, setup, spent))
    if file:
        write_atomic(file, lambda beside: torch.save(features, beside))
    return features


def save_cams(
    path: Path, encoder: nn.Module, head: nn.Module, images: Images, test: np.ndarray,
    said: np.ndarray, setup: Setup, count: int, spent: dict[str, Any],
) -> None:  # fmt: skip
    """Maps of the predicted class for `count` test images, spread over the classes."""
    draw = stratified(images.labels[test], min(count, len(test)), np.random.default_rng(0))
    model = nn.Sequential(encoder, head.to(DEVICE))
    pixels, maps, targets = [], [], torch.from_numpy(said[draw]).to(DEVICE)
    for batch in read_ahead(images, test[draw], setup, spent):
        target, targets = targets[: len(batch)], targets[len(batch) :]
        maps.append(fullgrad(model, for_encoder(encoder, batch), target).cpu())
        pixels.append(batch.cpu())
    titles = []
    for truth, guess in zip(images.labels[test][draw], said[draw], strict=True):
        name = images.classes[truth]
        titles.append(
            name + (": correct" if truth == guess else f": wrong, {images.classes[guess]}")
        )
    draw_cams(path, torch.cat(pixels).numpy(), torch.cat(maps).numpy(), titles)
    head.cpu()


def list_hash(images: Images) -> str:
    """Which labelled images a data set holds, wherever it lies."""
    pairs = [[name, int(label)] for name, label in zip(images.names, images.labels, strict=True)]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def run(args: argparse.Namespace, images: Images, bands: list[str], seed: int) -> None:
    """One band (or three) and one seed: read, encode, train the head, measure, write."""
    weights: Weights = args.weights
    settings = {
        "size": args.size, "head": args.head, "hidden": HIDDEN, "epochs": args.epochs,
        "batch": HEAD_BATCH, "tried": CHOICES[args.head], "bn": args.bn, "stats": args.stats,
        "kind": weights.kind, "arch": "" if weights.file else args.arch, "file": weights.sha256,
        "images": list_hash(images),
    }  # fmt: skip
    scope = {"dataset": args.dataset, "split": args.split, "subset": args.subset, "bands": bands}
    parts = [args.dataset, args.split, str(args.subset or "full"), weights.name, "+".join(bands)]
    stem = result_stem([*parts, str(args.size)], settings | scope, seed)
    path, npz, png = (args.out / (stem + e) for e in (".json", "-embeddings.npz", "-cam.png"))
    if all(p.exists() for p in [path] + [npz] * args.embeddings + [png] * (args.cam > 0)):
        print(f"{path}: done before", flush=True)
        return

    begin, spent = time.perf_counter(), {"read": 0.0, "replaced": 0}
    unseen = check_bands(weights, bands, args.stats)
    fit, val, test, listed = split_images(images, args, seed)
    train = fit if listed else np.concatenate([fit, val])
    if args.stats == "encoder":
        where = [weights.metadata["bands"].index(band) for band in bands]
        mean, std = ([weights.metadata[key][i] for i in where] for key in ("mean", "std"))
    else:
        mean, std = band_statistics(images, train, bands)
    setup = Setup(bands, args.size, mean, std)
    spent["read"] = time.perf_counter() - begin
    encoder, arch = load_encoder(weights, args.arch, len(bands), seed)
    encoder = encoder.to(DEVICE, memory_format=torch.channels_last)
    if args.bn == "reestimate":
        order = np.random.default_rng(seed).permutation(train)
        reestimate_batchnorm(encoder, read_ahead(images, order, setup, spent))

    torch.manual_seed(seed)
    start = time.perf_counter()
    if weights.kind == "scratch":
        head: Any = train_scratch(encoder, images, train, setup, args.epochs, seed, spent)
        before, chosen, rows = encoder.state_dict(), ("adamw", 1e-3), test
        trained = time.perf_counter()
        features = cached_features(encoder, images, rows, setup, None, spent)
        seconds = {"encode": time.perf_counter() - trained, "train": trained - start}
    else:
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        rows = np.concatenate([fit, val, test])
        features = cached_features(encoder, images, rows, setup, args.cache, spent)
        encoded = time.perf_counter()
        x, y = features[: -len(test)], torch.from_numpy(images.labels[rows[: -len(test)]])
        count = len(images.classes)
        chosen, head = choose_head(args.head, x, y, len(fit), not listed, count, args.epochs)
        seconds = {"encode": encoded - start, "train": time.perf_counter() - encoded}
    said = predict(head, features[-len(test) :])
    metrics = f1_metrics(images.labels[test], said, images.classes)
    assert_unchanged(encoder, before)
    if args.cam:
        save_cams(png, encoder, head, images, test, said, setup, args.cam, spent)
    if args.embeddings:
        names = np.array([images.names[row] for row in test])
        found = {"features": features[-len(test) :].numpy(), "labels": images.labels[test]}
        write_atomic(npz, lambda beside: save_npz(beside, names=names, **found))
    write_result(path, {
        "schema": 1, "stage": "probe", **scope, "seed": seed, "metrics": metrics,
        "weights": {"name": weights.name, "source": str(weights.file or weights.kind),
                    "sha256": weights.sha256},
        "config": settings | {
            "arch": arch, "optimiser": chosen[0], CHOSEN[args.head]: chosen[1],
            "classes": images.classes,
            "validation": "its list" if listed else "a fifth of the training split",
            "train": len(train), "validated": len(val), "test": len(test),
            "root": str(args.root), "mean": mean, "std": std, "replaced_samples": spent["replaced"],
            "unseen_bands": unseen, "synthetic": images.synthetic, "device": DEVICE.type,
            "bf16": native_bf16(DEVICE),
            "encoder_synthetic": weights.metadata.get("synthetic") == "true",
            "encoder": weights.metadata,
        },
        "seconds": {"read": spent["read"], **seconds},
    })  # fmt: skip
    note = f"; the encoder never saw {', '.join(unseen)}" if unseen else ""
    print(f"{args.dataset} {'+'.join(bands)}, {weights.name}, seed {seed}: F1 macro "
          f"{metrics['f1_macro']:.3f}, accuracy {metrics['accuracy']:.3f}, "
          f"{time.perf_counter() - begin:.1f} s{note} -> {path}", flush=True)  # fmt: skip


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:  # given a path, numpy would add .npz to it
        np.savez(file, **arrays)


def main(args: argparse.Namespace) -> None:
    try:
        images = list_images(args.dataset, args.root, args.bands_in_file)
        if images.geotiff and bandcrop is None:
            fail(2, "bandcrop, which reads GeoTIFFs, is not installed: run `make build` first")
        args.split = args.split or ("official" if images.part else "random")
        for bands in requested_bands(args.bands, images.bands, args.dataset):
            check_bands(args.weights, bands, args.stats)
            for seed in range(args.seeds):
                run(args, images, bands, seed)
    except (OSError, getattr(bandcrop, "TileError", OSError)) as error:  # a full disk, a bad tile
        fail(1, str(error))


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
