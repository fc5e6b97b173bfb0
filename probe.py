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
it is the same. After training, the encoder is proved unchanged, BatchNorm statistics included. Head
as in the paper: Linear-128, BatchNorm, ReLU, Linear; cross-entropy, 100 epochs. The paper names no
optimiser: SGD or Adam, and its learning rate, are chosen by F1 on a validation part of the training
split, never on test. Exit status: 0 done, 1 bad data, 2 wrong use, 130 interrupted.
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
NO_BANDCROP = "bandcrop, which reads GeoTIFFs, is not installed: run `make build` first"
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
        "random); random; scratch: random and --finetune; stats: no network, twelve statistics of "
        "each band, the floor; imagenet, imagenet-v2, coco; imagenet:, byol-imagenet:, seco:, "
        "coco:FILE")
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
    add("--size", type=int, metavar="PX", help="side of the encoder's input: 64 for EuroSAT, else "
        "128 (F1 of a random ResNet-18 at 64, 128, 224: EuroSAT 0.48, 0.45, 0.49, RESISC45 0.10, "
        "0.16, 0.15; 224 takes twelve times as long as 64)")
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
    add("--embeddings", action="store_true", help="write the test images' features beside each "
        "result, for analyze.py")
    add("--cam", type=int, default=0, metavar="K", help="FullGrad maps of K test images (PNG)")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    # fmt: on
    if not args.dataset and not args.export:
        fail(2, f"--dataset is missing: one of {', '.join([*SUFFIXES, 'sen12ms', 'csv'])}")
    for name, least in (("size", 32), ("epochs", 1), ("seeds", 1), ("cam", 0),
                        ("subset", 1), ("train_images", 1)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            fail(2, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.download:
        download(args.dataset, args.root or Path("data") / args.dataset)
        if not args.bands:
            raise SystemExit(0)
    args.weights = find_any_weights(args.weights)
    if args.export:
        if args.weights.name not in OTHERS.values() or args.weights.tensors:
            fail(2, "--export converts others' weights: imagenet, coco, seco:FILE, ... (--help)")
        return args
    args.root = args.root or Path("data") / args.dataset
    args.size = args.size or SIZES.get(args.dataset, 128)
    args.finetune |= args.weights.source == "scratch"
    if args.finetune and args.weights.source == "random":  # which is the same
        args.weights = find_weights("scratch")
    if args.finetune and (args.head, args.bn, args.stats) != ("mlp", "encoder", "train"):
        fail(2, "training the encoder too: --head, --bn and --stats do not apply")
    if args.weights.source == "stats" and (args.finetune or args.cam or args.bn != "encoder"):
        fail(2, "--weights stats has no network: --finetune, --cam and --bn do not apply")
    if args.cam and args.head != "mlp":
        fail(2, f"--cam goes back through the paper's head: not with --head {args.head}")
    if not args.bands:
        fail(2, "--band is missing: RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; or all")
    if args.finetune and args.embed:
        fail(2, "--embed trains nothing: not with --finetune or scratch")
    if not args.root.exists():
        fail(2, missing_data(args.dataset, args.root))
    args.root = args.root.resolve()  # one of the things that a result is known by
    open_folder(args.embed.parent if args.embed else args.out)
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
        fail(2, f"{path}: is no file; give a CSV file with the columns {','.join(columns)}")
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


def find_any_weights(text: str | None) -> Weights:
    """What --weights names, our own or others'; of others' the tensors are not loaded yet."""
    kind, _, name = (text or "").partition(":")
    if text == "stats":
        return Weights("stats", "stats", None, {}, {})
    if kind not in OTHERS:
        return find_weights(text)
    if not name and kind in ("byol-imagenet", "seco"):
        fail(2, f"--weights {kind}: give the file that holds them, {kind}:FILE")
    if not name:
        return Weights(OTHERS[kind], kind, None, {}, {})
    digest = hashlib.sha256(weights_file(Path(name), f"--weights {text}")).hexdigest()
    return Weights(OTHERS[kind], f"{kind}:{name}", digest, {}, {})


if __name__ == "__main__":
    ARGS = arguments()  # wrong use ends here, before the seconds that importing torch takes

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

try:
    import bandcrop
except ImportError:  # photos do without
    bandcrop = None


# ----------------------------------------------------------------------------------------- data
class Images(NamedTuple):
    names: list[str]
    files: list[tuple[str, ...]]  # of each image: one file, or S2 and S1
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    counts: tuple[int, ...]  # how many bands each of `files` must have
    labels: np.ndarray | None  # int64 [N]
    classes: list[str]
    part: list[str] | None  # the csv's split column
    synthetic: bool

    @property
    def geotiff(self) -> bool:
        return self.files[0][0].lower().endswith(TIFFS)


class Setup(NamedTuple):
    """How images reach the encoder."""

    bands: list[str]
    size: int
    mean: list[float]
    std: list[float]
    device: torch.device
    spent: dict[str, Any]  # adds up: "read", seconds waited for files; "replaced", samples


def list_images(dataset: str, root: Path, bands_in_file: str | None) -> Images:
    """Every image below `root`, in an order that does not depend on the disk."""
    synthetic = (root if root.is_dir() else root.parent).joinpath("SYNTHETIC.txt").exists()
    if dataset == "sen12ms":
        return list_sen12ms(root, synthetic)
    if dataset == "csv":
        return list_csv(root, bands_in_file, synthetic)
    found: list[Path] = []
    for depth in range(7):  # class folders lie at the root, or below, by who unpacked them
        inside = root.glob("*/" * depth + "*/*")
        found = found or sorted(
            p for p in inside if p.suffix.lower() in SUFFIXES[dataset] and p.name[0] != "."
        )
    if not found:
        fail(2, missing_data(dataset, root))
    above = sorted({str(path.parents[1]) for path in found})
    if len(above) > 1:
        fail(2, f"{root}: images in {above[0]} and in {above[1]}: give one of them as --root")
    files = [(str(path),) for path in found]
    order = EUROSAT_BANDS if dataset == "eurosat" else ["Red", "Green", "Blue"]
    bands, counts = band_places(order), (len(order),)
    if dataset == "eurosat":  # its SAR twin: the same file names in a folder beside
        twin = {path.name: str(path) for path in root.parent.glob("eurosat_s1/**/*.tif")}
        if twin and all(path.name in twin for path in found):
            files = [(str(path), twin[path.name]) for path in found]
            bands, counts = bands | band_places(SEN12MS_S1, file=1), (len(order), 2)
    classes = sorted({path.parent.name for path in found})
    labels = np.array([classes.index(path.parent.name) for path in found])
    names = [path.stem for path in found]
    return Images(names, files, bands, counts, labels, classes, None, synthetic)


def list_sen12ms(root: Path, synthetic: bool) -> Images:
    """A scene's label is the simplified class that covers most of the lc tile's IGBP layer."""
    names, files, labels = [], [], []
    for lc in sorted(p for p in root.glob("ROIs*/lc_*/*_lc_*") if p.suffix.lower() in TIFFS):
        season, folder, tile = lc.relative_to(root).parts  # the season may end with _lc too
        pair = [
            root / re.sub("_lc$", f"_{kind}", season) / folder.replace("lc_", f"{kind}_")
            / tile.replace("_lc_", f"_{kind}_")
            for kind in ("s2", "s1")
        ]  # fmt: skip
        for path in pair:
            if not path.is_file():
                fail(1, f"{lc}: no tile {path} beside it; complete the archive or remove the lc")
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
    return Images(names, files, bands, (13, 2), np.array(labels), LAND_COVER, None, synthetic)


def list_csv(path: Path, bands_in_file: str | None, synthetic: bool) -> Images:
    """Images of a table: image, label (needless for --embed) and, if it likes, split."""
    rows = read_table(path, ["image"])
    files, seen, spelt = [], {}, {}
    for row in rows:
        here, file = f"{path} line {row['line']}", path.parent / row["image"]
        if not file.is_file():
            fail(1, f"{here}: no file {file}")
        first = seen.setdefault(os.path.realpath(file), row)
        if first is not row:
            differ = [k for k in ("label", "split") if row.get(k) != first.get(k)]
            fail(1, f"{here}: {row['image']} stands in line {first['line']} already"
                    + "".join(f", with another {k}" for k in differ))  # fmt: skip
        if row.get("split", "train") not in ("train", "val", "test"):
            fail(1, f"{here}: split {row['split']!r} is not train, val or test")
        label = row.get("label", "-")
        if not label.strip():
            fail(1, f"{here}: the label is empty")
        first = spelt.setdefault("".join(label.split()).lower(), row)
        if label != first.get("label", "-"):
            fail(1, f"{here}: label {label!r} differs from line {first['line']}'s "
                    f"{first['label']!r} in blanks or case only; spell them alike")  # fmt: skip
        files.append((str(file),))
    tiffs = [file.lower().endswith(TIFFS) for (file,) in files]
    if any(tiffs) != all(tiffs):
        other = rows[tiffs.index(not tiffs[0])]["line"]
        fail(1, f"{path} line {other}: GeoTIFFs and photos in one table: make it two")
    if tiffs[0] and not bands_in_file:
        fail(2, "--bands-in-file is missing: the GeoTIFFs' bands in order, as B02,B03,B04,B08")
    order = (bands_in_file or "Red,Green,Blue").split(",")
    if not tiffs[0] and len(order) not in (1, 3):
        fail(2, f"--bands-in-file names {len(order)} bands; photos have one or three")
    classes, labels = [], None
    if "label" in rows[0]:
        classes = sorted({row["label"] for row in rows})
        labels = np.array([classes.index(row["label"]) for row in rows])
    part = [row["split"] for row in rows] if "split" in rows[0] else None
    names = [row["image"] for row in rows]
    return Images(names, files, band_places(order), (len(order),), labels, classes, part, synthetic)


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

    parts: train, val, test or "" for each image, by --split's list. Without such a list the
    validation part is a fifth of the training split, and the head is trained once more, on the
    whole training split, when its settings are chosen.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(len(labels))
    if args.subset is not None:
        if args.subset > len(rows):
            fail(2, f"--subset {args.subset}: {args.root} has {len(rows)} images")
        rows = stratified(labels, args.subset, rng)
    if parts is None:
        test = rows[stratified(labels[rows], round(0.2 * len(rows)), rng)]
        fit, val = np.setdiff1d(rows, test), np.array([], int)
    else:
        fit, val, test = (rows[np.array(parts)[rows] == name] for name in ("train", "val", "test"))
    if args.train_images is not None:
        fit, val = np.sort(np.concatenate([fit, val])), np.array([], int)
        if args.train_images > len(fit):
            fail(2, f"--train-images {args.train_images}: {len(fit)} are there to learn from")
        fit = fit[stratified(labels[fit], args.train_images, rng)]
    listed = len(val) > 0
    if not listed and len(fit):
        val = fit[stratified(labels[fit], round(0.2 * len(fit)), rng)]
        fit = np.setdiff1d(fit, val)
    if min(len(fit), len(val), len(test)) < 2 or len(np.unique(labels[fit])) < 2:
        counts = f"{len(fit)} to fit, of {len(np.unique(labels[fit]))} classes; {len(val)} to "
        counts += f"validate, {len(test)} to test"
        fail(1, f"{args.root}, --split {args.split}: too few images or classes: {counts}")
    return fit, val, test, listed


def listed_parts(images: Images, args: argparse.Namespace) -> list[str] | None:
    """train, val, test or "" for each image: the csv's column, or the lists published with the data
    set; None where --split is random."""
    if args.split == "random" or images.part:
        return images.part if args.split != "random" else None
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
        try:
            stems = [Path(line).stem for line in path.read_text("utf-8").split()]
        except UnicodeDecodeError:
            fail(1, f"{path}: no list of file names but a binary file")
        for stem in stems:
            if parts.setdefault(stem, part) != part:
                fail(1, f"{path}: {stem} stands in {lists[parts[stem]]} too")
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


def read_photos(images: Images, rows: np.ndarray, setup: Setup) -> torch.Tensor:
    """Standardised whole photos float32 [n, C, size, size]."""
    where = [images.bands[band][1] for band in setup.bands]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (setup.mean, setup.std))
    photos = [open_photo(images.files[row][0], setup.size, *images.counts) for row in rows]
    return torch.from_numpy((np.stack(photos)[:, where] - mean) / std)


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
        sums, where = np.zeros((3, len(bands))), [images.bands[band][1] for band in bands]
        for row in rows:
            photo = open_photo(images.files[row][0], None, *images.counts)[where].astype(float)
            sums += [photo[0].size * np.ones(len(bands)), photo.sum((1, 2)),
                     np.square(photo).sum((1, 2))]  # fmt: skip
        mean = sums[1] / sums[0]
        std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 0))
    if (std == 0).any():
        band = bands[int(np.argmin(std))]
        fail(1, f"band {band} is constant over the {len(rows)} training images: nothing to learn")
    return mean.tolist(), std.tolist()


def read_ahead(images: Images, rows: np.ndarray, setup: Setup) -> Iterator[torch.Tensor]:
    """Batches float32 [n, C, S, S] of `rows` in order; the next is read while one is worked on.

    On the CPU a batch is valid until the next one.
    """
    parts = np.array_split(rows, -(-len(rows) // ENCODE_BATCH))  # never leaves a batch of one
    if images.geotiff:
        norm = [np.array(value, np.float32) for value in (setup.mean, setup.std)]
        requests = (
            which_bands(images, part, setup.bands)
            | {
                key: np.tile(v, (len(part), 1))
                for key, v in zip(("mean", "std"), norm, strict=True)
            }
            for part in parts
        )
        shape = (len(parts[0]), len(setup.bands), setup.size, setup.size)
        for batch in bandcrop.stream(requests, shape, setup.device):
            setup.spent["read"] += batch.waited
            setup.spent["replaced"] += int(batch.report.replaced.sum())
            yield batch.x.contiguous(memory_format=torch.channels_last)
        return
    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read_photos, images, parts[0], setup)
        for following in [*parts[1:], None]:
            began = time.perf_counter()
            x = pending.result()
            setup.spent["read"] += time.perf_counter() - began
            if following is not None:
                pending = ahead.submit(read_photos, images, following, setup)
            yield x.to(setup.device).contiguous(memory_format=torch.channels_last)


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


# ------------------------------------------------------------------------------- others' weights
def others_tensors(weights: Weights, arch: str) -> Weights:
    """The weights with the encoder's tensors by torchvision's names, from a layout of OTHERS."""
    kind, _, name = weights.source.partition(":")
    found = read_tensors(Path(name)) if name else download_tensors(kind, arch)
    if kind == "byol-imagenet":  # yaox12/BYOL-PyTorch: other names, torchvision's order
        values = list(found.get("online_backbone", {}).values())
        names = list(build_encoder("resnet50", 3).state_dict())
        tensors = dict(zip(names, values, strict=True)) if len(values) == len(names) else {}
    else:
        held = found.get("state_dict", found)
        if kind == "seco":  # Lightning: encoder_q.0 = conv1, .1 = bn1, .4-.7 = layer1-layer4
            stages = ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
            starts = {f"encoder_q.{i}.": f"{stage}." for i, stage in enumerate(stages) if stage}
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
                f"has 100, 180 or 265; it holds {len(found)} entries: {', '.join(list(found)[:3])}"
                " ...")  # fmt: skip
    for key, value in tensors.items():
        if not value.isfinite().all():
            fail(1, f"{weights.source}: {key} holds NaN or infinity: its run diverged")
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
        named = re.search(r"GLOBAL (\S+)", str(error))
        if not named:
            fail(1, f"{file}: is no whole weights file: {str(error).splitlines()[0][:80]}")
        fail(1, f"{file}: holds {named[1]} beside its tensors; nothing was executed. If you trust "
                "it, keep the tensors only: torch.save(torch.load(FILE, weights_only=False)"
                "['state_dict'], NEWFILE)")  # fmt: skip


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
def encode(encoder: Callable, images: Images, rows: np.ndarray, setup: Setup) -> torch.Tensor:
    """Features float32 [n, D] on the device, by a frozen encoder or `image_statistics`.

    In bf16 instead of fp32, on 3,000 EuroSAT photos, single seeds' F1 moved by up to 0.02 either
    way, means of five by -0.005, -0.004 and 0.000.
    """
    network = isinstance(encoder, nn.Module)
    if network:
        encoder.eval()  # else BatchNorm would use, and change with, the batch
    features, done, progress = [], 0, Progress("encoding")
    with torch.no_grad(), autocast(setup.device):
        for x in read_ahead(images, rows, setup):
            features.append(encoder(for_encoder(encoder, x) if network else x).float())
            done += len(x)
            progress(done, len(rows))
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
    optimisers: list[Any] = [
        torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        if how == "sgd" else torch.optim.Adam(head.parameters(), lr=rate)
        for head, (how, rate) in zip(heads, settings, strict=True)
    ]  # fmt: skip
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
    kind: str, settings: list[tuple[str, float]], x: torch.Tensor, y: torch.Tensor, classes: int,
    epochs: int,
) -> list[Any]:  # fmt: skip
    """Heads of a kind, one for each setting, on features [N, D] and labels int64 [N]."""
    if kind == "mlp":
        return fit_mlps(x, y, classes, settings, epochs)
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    heads = []
    for _, value in settings:
        if kind == "linear":  # mean cross-entropy + value * |W|^2
            head: Any = LogisticRegression(C=1 / (2 * value * len(x)), max_iter=10_000)
        else:  # votes weighed by cosine similarity + 1
            near = min(int(value), len(x))
            head = KNeighborsClassifier(near, metric="cosine", weights=lambda far: 2 - far)
        heads.append(make_pipeline(StandardScaler(), head).fit(x.cpu().numpy(), y.cpu().numpy()))
    return heads


def choose_head(
    kind: str, x: torch.Tensor, y: torch.Tensor, fit: int, again: bool, classes: int, epochs: int
) -> tuple[tuple, Any]:
    """The setting with the best F1 on the validation rows, and its head.

    x, y: the training split's features and labels, the first `fit` rows to fit, the rest to choose
    by; with `again` the chosen head is trained anew on all of them. Each setting is tried for all
    epochs: tried for a quarter of them, the fastest wins instead of the best (up to 0.05 less F1).
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
    encoder: nn.Module, images: Images, rows: np.ndarray, setup: Setup, rate: float, epochs: int,
    seed: int,
) -> nn.Module:  # fmt: skip
    """Encoder and head together: AdamW, decay 0.05, one cycle, turned and mirrored batches.

    Where the images are few, as many epochs as make FINETUNE_STEPS. Returns the head.
    """
    torch.manual_seed(seed)
    head = build_head(encoder.width, len(images.classes)).to(setup.device)
    model = nn.Sequential(encoder, head).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = -(-len(rows) // ENCODE_BATCH)
    epochs = max(epochs, -(-FINETUNE_STEPS // batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches)
    rng, progress = np.random.default_rng(seed), Progress(f"learning rate {rate}: epoch")
    for epoch in range(epochs):
        order = rng.permutation(rows)
        labels, done = torch.from_numpy(images.labels[order]).to(setup.device), 0
        for batch in read_ahead(images, order, setup):
            y = labels[done : done + len(batch)]
            done += len(batch)
            batch = torch.rot90(batch, int(rng.integers(4)), (2, 3))
            batch = batch.flip(3) if rng.integers(2) else batch
            optimiser.zero_grad()
            with autocast(setup.device):
                logits = head(encoder(for_encoder(encoder, batch)))
            nn.functional.cross_entropy(logits.float(), y).backward()
            optimiser.step()
            schedule.step()
        progress(epoch + 1, epochs)
    model.eval().requires_grad_(False)
    return head


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
    """A sheet with a row for each image [K, C, H, W] under its title: the image, its map [K, H, W],
    and the map divided by the mean of all maps, which shows what is this image's own.

    At 64 px nearly all of a map comes from bias terms on grids of 2 to 8 px, with zero padding's
    pattern: maps of six classes correlate by 0.90 (authors' code: 0.91, and 0.98 with ours).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.5 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 3, squeeze=False)
    for row, image, heat, title in zip(axes, pixels, maps, titles, strict=True):
        low, high = np.percentile(image, (2, 98), axis=(1, 2), keepdims=True)
        shown = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1).transpose(1, 2, 0)
        row[0].imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=1)
        row[1].imshow(heat, cmap="inferno")
        row[2].imshow(heat / np.maximum(maps.mean(0), 1e-12), cmap="inferno")
        for axis, text in zip(row, (title, "FullGrad", "divided by the mean map"), strict=True):
            axis.set_axis_off()
            axis.set_title(text, fontsize=8, loc="left")
    write_atomic(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


# -------------------------------------------------------------------------------------- one run
def save_cams(
    path: Path, encoder: nn.Module, head: nn.Module, images: Images, test: np.ndarray,
    said: np.ndarray, setup: Setup, count: int,
) -> None:  # fmt: skip
    """Maps of the predicted class for `count` test images, spread over the classes."""
    draw = stratified(images.labels[test], min(count, len(test)), np.random.default_rng(0))
    model = nn.Sequential(encoder, head)
    pixels, maps, targets = [], [], torch.from_numpy(said[draw]).to(setup.device)
    for batch in read_ahead(images, test[draw], setup):
        target, targets = targets[: len(batch)], targets[len(batch) :]
        maps.append(fullgrad(model, for_encoder(encoder, batch), target).cpu())
        pixels.append(batch.cpu().clone())  # its memory is the next batch's
    titles = []
    for truth, guess in zip(images.labels[test][draw], said[draw], strict=True):
        right = "right" if truth == guess else f"predicted as {images.classes[guess]}"
        titles.append(f"{images.classes[truth]}: {right}")
    draw_cams(path, torch.cat(pixels).numpy(), torch.cat(maps).numpy(), titles)
    print(f"wrote {path}", flush=True)


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    def write(beside: Path) -> None:
        with open(beside, "wb") as file:  # given a path, numpy would add .npz to it
            np.savez(file, **arrays)

    write_atomic(path, write)
    print(f"wrote {path}", flush=True)


def choose_fine_tuned(
    make: Callable[[], nn.Module], images: Images, fit: np.ndarray, val: np.ndarray, again: bool,
    setup: Setup, epochs: int, seed: int,
) -> tuple[tuple, nn.Module, nn.Module]:  # fmt: skip
    """The learning rate with the best F1 on the validation part, the encoder and the head.

    Each rate starts from make(); with `again` the chosen one is trained once more, on both parts.
    """

    def tuned(rate: float, rows: np.ndarray) -> tuple[nn.Module, nn.Module]:
        encoder = make()
        return encoder, fine_tune(encoder, images, rows, setup, rate, epochs, seed)

    models = [tuned(rate, fit) for _, rate in CHOICES["finetune"]]
    scores = []
    for encoder, head in models:
        said = predict(head, encode(encoder, images, val, setup))
        scores.append(f1_metrics(images.labels[val], said, images.classes)["f1_macro"])
    best = int(np.argmax(scores))
    setting = CHOICES["finetune"][best]
    return setting, *(tuned(setting[1], np.concatenate([fit, val])) if again else models[best])


def run(
    args: argparse.Namespace, images: Images, known: dict[str, Any], parts: list[str] | None,
    bands: list[str], seed: int, device: torch.device,
) -> Path:  # fmt: skip
    """One band (or three) and one seed: read, encode, train the head, measure, write.

    known: what is the same for all bands and seeds and helps to determine the result.
    """
    weights: Weights = args.weights
    floor, kind = weights.source == "stats", "finetune" if args.finetune else args.head
    name = weights.name + " fine-tuned" * (args.finetune and bool(weights.tensors))
    settings = known | {  # None: does not apply
        "places": {band: images.bands[band] for band in bands}, "train_images": args.train_images,
        "size": args.size, "stats": args.stats, "head": args.head, "hidden": HIDDEN,
        "finetune": args.finetune, "tried": CHOICES[kind],
        "least_steps": FINETUNE_STEPS if args.finetune else None,
        "arch": None if floor else weights.metadata.get("arch", args.arch),
        "bn": None if floor or args.finetune else args.bn,
        "epochs": args.epochs if kind in ("mlp", "finetune") else None,
        "batch": ENCODE_BATCH if args.finetune else HEAD_BATCH, "bf16": native_bf16(device),
    }  # fmt: skip
    scope = {"dataset": args.dataset, "split": args.split, "subset": args.subset, "bands": bands}
    identity = digest_of([settings, scope, seed, name, weights.sha256 or weights.source])
    stem = [args.dataset, args.split, str(args.subset or "full"), name, "+".join(bands)]
    path = result_path(args.out, [*stem, str(args.size)], identity, seed)
    npz, png = (path.with_name(path.stem + end) for end in ("-embeddings.npz", "-cam.png"))
    if all(p.exists() for p in [path] + [npz] * args.embeddings + [png] * (args.cam > 0)):
        print(f"{path}: done before", flush=True)
        return path

    begin = time.perf_counter()
    unseen = check_bands(weights, bands, args.stats)
    fit, val, test, listed = split_images(images.labels, parts, args, seed)
    train = fit if listed else np.concatenate([fit, val])
    setup = standardise(args, images, bands, train, device)
    setup.spent["read"] = time.perf_counter() - begin
    start, count = time.perf_counter(), len(images.classes)
    if args.finetune:

        def make() -> nn.Module:
            return prepare(args, images, train, setup, seed)

        chosen, encoder, head = choose_fine_tuned(
            make, images, fit, val, not listed, setup, args.epochs, seed
        )
        trained = time.perf_counter()
        features = encode(encoder, images, test, setup)
        seconds = {"encode": time.perf_counter() - trained, "train": trained - start}
    else:
        encoder = prepare(args, images, train, setup, seed)
        before = {} if floor else {k: v.clone() for k, v in encoder.state_dict().items()}
        torch.manual_seed(seed)
        rows = np.concatenate([fit, val, test])
        x, features = encode(encoder, images, rows, setup).tensor_split([len(fit) + len(val)])
        encoded = time.perf_counter()
        y = torch.from_numpy(images.labels[rows[: len(x)]]).to(device)
        chosen, head = choose_head(args.head, x, y, len(fit), not listed, count, args.epochs)
        if not floor:
            assert_unchanged(encoder, before)
        seconds = {"encode": encoded - start, "train": time.perf_counter() - encoded}
    said = predict(head, features)
    metrics = f1_metrics(images.labels[test], said, images.classes)
    if args.cam:
        save_cams(png, encoder, head, images, test, said, setup, args.cam)
    if args.embeddings:
        save_npz(npz, names=np.array([images.names[row] for row in test]),
                 features=features.cpu().numpy(), labels=images.labels[test])  # fmt: skip
    about = {k: v for k, v in weights.metadata.items() if k not in ("bands", "mean", "std")}
    write_result(path, {
        "schema": 1, "stage": "probe", **scope, "seed": seed, "metrics": metrics,
        "weights": about | {"name": name, "source": weights.source, "sha256": weights.sha256},
        "config": settings | {
            "identity": identity, "optimiser": chosen[0],
            CHOSEN.get(kind, "learning_rate"): chosen[1], "classes": images.classes,
            "validation": "its list" if listed else "a fifth of the training split",
            "train": len(train), "validated": len(val), "test": len(test),
            "mean": setup.mean, "std": setup.std, "replaced_samples": setup.spent["replaced"],
            "unseen_bands": unseen, "synthetic": images.synthetic, "device": device.type,
            "encoder_synthetic": weights.metadata.get("synthetic") == "true",
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


def embed(args: argparse.Namespace, images: Images, bands: list[str], device: torch.device) -> None:
    """The features of every image, with what is known of it, in one NPZ file."""
    rows = np.arange(len(images.names))
    setup = standardise(args, images, bands, rows, device)
    encoder = prepare(args, images, rows, setup, 0)
    arrays = {"features": encode(encoder, images, rows, setup).cpu().numpy()}
    if images.labels is not None:
        arrays |= {"labels": images.labels, "classes": np.array(images.classes)}
    save_npz(args.embed, names=np.array(images.names), bands=np.array(bands), **arrays)


def standardise(
    args: argparse.Namespace, images: Images, bands: list[str], rows: np.ndarray,
    device: torch.device,
) -> Setup:  # fmt: skip
    """By mean and deviation of each band over the training images `rows`, or the encoder's own."""
    about = args.weights.metadata
    if args.stats == "train":
        mean, std = band_statistics(images, rows, bands)
    else:
        where = [about["bands"].index(band) for band in bands]
        mean, std = ([about[key][i] for i in where] for key in ("mean", "std"))
    return Setup(bands, args.size, mean, std, device, {"read": 0.0, "replaced": 0})


def prepare(
    args: argparse.Namespace, images: Images, rows: np.ndarray, setup: Setup, seed: int
) -> Any:
    """The frozen encoder on the device, its BatchNorm re-estimated on `rows` if asked; or the
    statistics that stand in for one."""
    if args.weights.source == "stats":
        return image_statistics
    encoder = load_encoder(args.weights, args.arch, len(setup.bands), seed)
    encoder = encoder.to(setup.device, memory_format=torch.channels_last)
    if args.bn == "reestimate":
        order = np.random.default_rng(seed).permutation(rows)
        reestimate_batchnorm(encoder, read_ahead(images, order, setup))
    return encoder


def main(args: argparse.Namespace) -> None:
    device, weights = find_device(args.device), args.weights
    try:
        if weights.name in OTHERS.values() and not weights.tensors:
            args.weights = weights = others_tensors(weights, args.arch)
        if args.export:
            return export(weights, args.export)
        if bandcrop is None and args.dataset in ("eurosat", "sen12ms"):
            fail(2, NO_BANDCROP)
        images = list_images(args.dataset, args.root, args.bands_in_file)
        if bandcrop is None and images.geotiff:
            fail(2, NO_BANDCROP)
        arch = (
            "no network" if weights.source == "stats" else weights.metadata.get("arch", args.arch)
        )
        print(f"{args.dataset}, {len(images.names)} images; weights: {weights.source} "
              f"({weights.name}, {arch}); on {device}", flush=True)  # fmt: skip
        asked = requested_bands(args.bands, images.bands, args.dataset)
        for bands in asked:
            check_bands(weights, bands, args.stats)
        if args.embed:
            if len(asked) > 1:
                fail(2, "--embed writes one file: give one band, or three")
            return embed(args, images, asked[0], device)
        if images.labels is None:
            fail(1, f"{args.root}: no column label; without one only --embed works")
        if len(images.classes) < 2:
            fail(1, f"{args.root}: all images are of one class, {images.classes[0]}")
        args.split = args.split or ("official" if images.part else "random")
        parts = listed_parts(images, args)
        known = {
            "root": str(args.root), "files": digest_files(f for each in images.files for f in each),
            "images": digest_of([images.names, images.labels.tolist(), images.classes])[:16],
            "parts": parts and digest_of(parts), "bands_in_files": images.counts,
        }  # fmt: skip
        paths = [
            run(args, images, known, parts, bands, seed, device)
            for bands in asked
            for seed in range(args.seeds)
        ]
        print_table(args.out, paths, "f1_macro")
    except getattr(bandcrop, "TileError", OSError) as error:
        said = r"bands, --bands-in-file names \1" if args.dataset == "csv" else r"bands, not \1"
        fail(1, re.sub(r"bands, not (\d+)( \(.*)?", said, str(error)))
    except OSError as error:  # a full disk
        fail(1, str(error))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no UTF-8
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
