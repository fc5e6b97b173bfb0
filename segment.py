"""Land cover from a frozen encoder: DeepLabV3's decoder on its feature maps, mIoU for each band.

    python segment.py --dataset dfc2020 --band RE5    # with the encoder that pretrain.py made
    python segment.py --dataset dfc2020 --band all --split official --seeds 3 --maps 6 \\
        --weights runs/x/encoder.safetensors
    python segment.py --dataset csv --root tiles.csv --s1-bands VV,VH --s2-bands B02,B03,B04,B08 \\
        --classes urban,crops,forest,shrub,wetland,water --band NIR --arch resnet18

One JSON in --out for each band and seed, and at the end a table beside random weights. A rerun
skips a result only where all that determines it is the same: files, masks, split, band order,
weights and settings; else it makes another one.
The encoder's last two stages are dilated (output stride 8); it sees each training tile once, its
feature maps are kept, and it is proved unchanged at the end. Masks are cut in whole pixels, never
resampled. The paper names no optimiser: SGD, momentum 0.9, DeepLab's polynomial decay.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

# ------------------------------------------------------------------------------------- settings
NO_DFC2020 = (  # Copernicus-Bench's copy; the contest's own needs a login at ieee-dataport.org
    "no DFC2020 there: unpack https://hf.co/datasets/wangyi111/Copernicus-Bench/resolve/"
    "9d252acd3aa0e3da3128e05c6f028647f0e48e5f/l2_dfc2020_s1s2/dfc2020.zip (md5 "
    "f10ba017dab6f38b7a6857b169ea924b) and give its folder dfc2020_s1s2 as --root"
)
LAND_COVER = (  # DFC2020's labels 1..10
    "Forest Shrubland Savanna Grassland Wetlands Croplands Urban/Built-up Snow/Ice Barren Water"
).split()
DROPPED = (3, 8)  # Savanna and Snow/Ice: not in the 8-class set
IGNORED = 255  # in masks given to the loss
UNKNOWN = 254  # while masks are read: an id that nobody has named
POWER = 0.9  # DeepLab: rate * (1 - step / steps) ** 0.9
ENCODE_BATCH = 16
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
    parser.error = lambda message: fail(2, f"{message} (see --help)")
    add = parser.add_argument
    add("--dataset", required=True, choices=["dfc2020", "csv"])
    add("--root", type=Path, help="DFC2020 as the contest or Copernicus-Bench lays it out "
        "(data/dfc2020), or FILE.csv: s1,s2,mask[,split]")
    add("--band", "--bands", dest="bands", required=True,
        help="RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; all")
    add("--s1-bands", default="VV,VH", help="csv: bands of the s1 files in order (VV,VH)")
    add("--s2-bands", help="csv: bands of the s2 files in order")
    add("--weights", help="encoder.safetensors of pretrain.py or of probe.py --export; random; "
        f"scratch (encoder trained too). Default: {OWN_WEIGHTS} where it is, else random")
    add("--arch", choices=ARCHS, default="resnet50", help="of random and scratch")
    add("--split", choices=["random", "official"], help="random: --num-images drawn by seed to "
        "train, the rest to test (default); official: test on ROIs0000_test, dfc-test-new.csv "
        "or the csv's test rows (default where it has any), train on all others")
    add("--num-images", type=int, metavar="N", help="training tiles, drawn by seed (dfc2020: 900, "
        "paper; csv: all, with --split random 80 %%)")
    add("--classes", help="dfc2020: 8 (default; without Savanna, Snow/Ice) or 10; csv: names, for "
        "the mask's ids in order, ignored ones left out")
    add("--ignore", default="0", metavar="IDS", help="csv: ids in masks that do not count, as "
        "--ignore=-1,255 (0)")
    add("--size", type=int, metavar="PX", help="square cut from each tile's middle; default: the "
        "whole tile")
    add("--stats", choices=["train", "encoder"], default="train", help="mean and deviation of the "
        "bands: of the training tiles (default) or as the encoder was pre-trained with")
    add("--bn", choices=["encoder", "reestimate"], default="encoder", help="BatchNorm statistics: "
        "as pre-trained (default), or of the unlabelled training tiles; frozen after that")
    add("--epochs", type=int, default=100, help="(100, paper)")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=0.03, help="learning rate at the start (0.03; on "
        "BigEarthNet tiles 0.1 gave the same mIoU after 15 epochs: 0.304 and 0.303)")
    add("--seeds", type=int, default=1, metavar="K", help="seeds 0..K-1 of decoder, draw of tiles, "
        "random weights (1)")
    add("--maps", type=int, default=0, metavar="K", help="draw K test tiles: image, truth, "
        "prediction (PNG)")
    add("--device", default="auto", help="auto (default): cuda where there is one; cpu; cuda:N")
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
    if args.dataset == "csv":
        if not (args.classes and args.s2_bands):
            fail(2, "--dataset csv needs --classes NAMES and --s2-bands BANDS, as B02,B03,B04,B08")
        names = [name.strip() for name in args.classes.split(",")]
        if not all(names) or not 1 < len({*names}) == len(names) < UNKNOWN:
            fail(2, f"--classes {args.classes}: give two or more different names, as crops,forest")
    if not re.fullmatch(r"-?\d+(,-?\d+)*", args.ignore):
        fail(2, f"--ignore {args.ignore}: give whole numbers, as --ignore=-1,255")
    if args.dataset == "dfc2020" and not args.root.is_dir():
        fail(2, f"{args.root}: {NO_DFC2020}")
    args.weights = find_weights(args.weights)
    open_folder(args.out)
    return args


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


if __name__ == "__main__":
    ARGS = arguments()  # wrong use ends here, before the seconds that importing torch takes

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import nn  # noqa: E402

try:
    import bandcrop
except ImportError:
    fail(2, "bandcrop, which reads GeoTIFFs, is not installed: run `make build` first")


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
    x = for_encoder(encoder, images).contiguous(memory_format=torch.channels_last)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
    return encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))


def free_memory(device: torch.device) -> int:
    """Bytes that can be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


def keep_features(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """Feature maps [N, D, H / 8, W / 8] of the images, on their device, in bf16 where it is native.

    None where they would take more than half of the free memory: the encoder then runs in every
    epoch. A GPU does that as fast as it could fetch them from the host: a ResNet-50 takes 54 GFLOP
    for a tile of 256 px, 0.2 ms at 300 TFLOP/s, and so do its 4 MB by PCIe at 25 GB/s.
    """
    with torch.no_grad(), autocast(images.device):
        one = feature_maps(encoder, images[:1])
        if one.nbytes * len(images) > free_memory(images.device) / 2:
            return None
        kept = one.new_empty((len(images), *one.shape[1:]))
        progress = Progress("tiles encoded")
        for at in range(0, len(images), ENCODE_BATCH):
            part = slice(at, at + ENCODE_BATCH)
            kept[part] = feature_maps(encoder, images[part])
            progress(min(part.stop, len(images)), len(images))
    return kept


# ------------------------------------------------------------------------------------- decoder
def predict_scores(decoder: nn.Module, maps: torch.Tensor, size: Any) -> torch.Tensor:
    """Scores float32 [n, classes, H, W], enlarged bilinearly as DeepLabV3 does."""
    scores = decoder(maps.contiguous(memory_format=torch.channels_last)).float()
    return nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)


def batches(count: int, size: int) -> int:
    """How many batches to make of `count` >= 2 tiles: BatchNorm needs two or more in each."""
    return min(-(-count // size), count // 2)


def train_epoch(
    model: nn.ModuleDict, x: torch.Tensor, masks: torch.Tensor, order: torch.Tensor,
    optimiser: torch.optim.Optimizer, rates: list[float],
) -> torch.Tensor:  # fmt: skip
    """One step for each learning rate in `rates`; the mean loss. Nothing in here waits for the GPU.

    x: feature maps, or images of the size of the masks, uint8 [N, H, W]; order: int64 [N].
    """
    total = torch.zeros((), device=x.device)
    for rate, rows in zip(rates, order.tensor_split(len(rates)), strict=True):
        optimiser.param_groups[0]["lr"] = rate
        with autocast(x.device):
            maps = x[rows]
            if x.shape[-2:] == masks.shape[-2:]:
                with torch.set_grad_enabled(model["encoder"].training):  # scratch
                    maps = feature_maps(model["encoder"], maps)
            scores = predict_scores(model["decoder"], maps, masks.shape[-2:])
        loss = nn.functional.cross_entropy(scores, masks[rows].long(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.detach()
    return total / len(rates)


def train_decoder(
    model: nn.ModuleDict, x: torch.Tensor, masks: torch.Tensor, args: argparse.Namespace, seed: int
) -> list[float]:
    """Train the decoder, and the encoder where it is not frozen; the mean loss of each epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(seed)
    steps = batches(len(x), args.batch_size)
    model["encoder"].train(model["encoder"].conv1.weight.requires_grad)
    model["decoder"].train()
    losses: list[float] = []
    progress = Progress("epochs")
    for epoch in range(args.epochs):
        order = torch.randperm(len(x), generator=draw).to(x.device)
        left = 1 - (epoch + np.arange(steps) / steps) / args.epochs
        rates = (args.lr * left**POWER).tolist()
        losses.append(float(train_epoch(model, x, masks, order, optimiser, rates)))
        progress(epoch + 1, args.epochs, f", loss {losses[-1]:.3f}")
        if not np.isfinite(losses[-1]):
            break
    if not np.isfinite(losses[-1]) or not all(bool(p.isfinite().all()) for p in trained):
        fail(1, f"loss or weights are not finite after epoch {len(losses)}: lower --lr")
    model.eval()
    return losses


# ------------------------------------------------------------------------------------- measures
def count_pixels(truth: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """Confusion int64 [classes, classes], rows truth, over the pixels that count."""
    counts = truth != IGNORED
    flat = truth[counts].astype(np.int64) * classes + said[counts]
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def map_metrics(confusion: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """mIoU, AA (mean recall), pixel accuracy, by class, from one confusion matrix of all pixels.

    Means are over the classes that the truth holds, as scikit-learn's jaccard_score and
    recall_score with these as labels: pixels given to another class still are in a union.
    """
    hits, truth, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    held = np.flatnonzero(truth)
    iou = {classes[i]: float(hits[i] / (truth[i] + said[i] - hits[i])) for i in held}
    recall = {classes[i]: float(hits[i] / truth[i]) for i in held}
    return {
        "miou": float(np.mean(list(iou.values()))),
        "aa": float(np.mean(list(recall.values()))),
        "pixel_accuracy": float(hits.sum() / truth.sum()),
        "classes": list(iou),
        "only_predicted": [classes[i] for i in np.flatnonzero((truth == 0) & (said > 0))],
        "iou_per_class": iou,
        "recall_per_class": recall,
        "confusion": confusion.tolist(),
    }


# ----------------------------------------------------------------------------------------- data
class Tiles(NamedTuple):
    names: list[str]  # of the masks, below --root
    files: list[tuple[str, str]]  # S2, S1
    widths: tuple[int, int]  # bands in an S2 and in an S1 file
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    masks: np.ndarray  # uint8 [N, S, S]: place in `classes`, IGNORED where a pixel does not count
    windows: np.ndarray  # float64 [N, 4]: where they were cut: top, left, height, width, fractions
    classes: list[str]
    part: list[str] | None  # train, val or test, where the archive says so
    labelled: np.ndarray  # bool [N]: whether any pixel of the mask counts
    content: str  # digest of names and masks
    digest: str  # of all files
    synthetic: bool


def list_tiles(args: argparse.Namespace) -> Tiles:
    """Every labelled tile below --root, in an order that does not depend on the disk."""
    folder = args.root if args.dataset == "dfc2020" else args.root.parent
    if args.dataset == "csv":
        rows = read_table(args.root, ["s1", "s2", "mask"])
        orders = args.s2_bands.split(","), args.s1_bands.split(",")
        ignored = [int(number) for number in args.ignore.split(",")]
        labels = [name.strip() for name in args.classes.split(",")]
        ids = [i for i in range(len(labels) + len(ignored)) if i not in ignored]
        classes = dict(zip(ids, labels, strict=False))
    else:
        rows, orders = list_dfc2020(folder), (SEN12MS_S2, SEN12MS_S1)
        ignored = [0] if args.classes == "10" else [0, *DROPPED]
        classes = {i: c for i, c in enumerate(LAND_COVER, start=1) if i not in ignored}
    part = [row["split"] for row in rows] if "split" in rows[0] else None
    for row, name in zip(rows, part or [], strict=False):
        if name not in ("train", "val", "test"):
            fail(1, f"{args.root} line {row['line']}: split {name!r} is not train, val or test")
    bands = band_places(orders[0]), band_places(orders[1], file=1)
    if both := [band for band in bands[0] if band in bands[1]]:
        fail(2, f"band {both[0]} is in --s2-bands and in --s1-bands: name it in one")
    widths = len(orders[0]), len(orders[1])
    masks, s2, s1 = ([str(folder / row[kind]) for row in rows] for kind in ("mask", "s2", "s1"))
    check_files(masks, 1, "a mask has 1")
    check_files(s2, widths[0], f"--s2-bands names {widths[0]}")
    check_files(s1, widths[1], f"--s1-bands names {widths[1]}")
    numbers = {id: number for number, id in enumerate(classes)} | dict.fromkeys(ignored, IGNORED)
    truth, windows = read_masks(masks, numbers, args.size)
    names = [row["mask"] for row in rows]
    return Tiles(
        names, list(zip(s2, s1, strict=True)), widths, bands[0] | bands[1], truth, windows,
        list(classes.values()), part, (truth != IGNORED).any((1, 2)),
        digest_of([names, hashlib.sha256(truth).hexdigest()]), digest_files([*masks, *s2, *s1]),
        (folder / "SYNTHETIC.txt").exists(),
    )  # fmt: skip


def list_dfc2020(root: Path) -> list[dict[str, str]]:
    """Rows as of a table s1,s2,mask,split; the contest's ROIs0000_validation is to train on."""
    masks: list[tuple[str, str]] = []
    for base in ("", "dfc2020_s1s2/"):
        for part in ("train", "val", "test"):
            table = root / base / f"dfc-{part}-new.csv"  # of Copernicus-Bench: a name in each line
            for name in table.read_text("utf-8", "replace").split() if table.is_file() else []:
                if not name.endswith(".tif"):
                    fail(1, f"{table}: {name[:40]!r} is no name of a mask")
                masks.append((part, f"{base}dfc/{name}"))
    for part, folder in (("train", "ROIs0000_validation"), ("test", "ROIs0000_test")):
        found = sorted(root.glob(f"{folder}/dfc_*/*_dfc_*.tif"))
        masks += [(part, str(mask.relative_to(root))) for mask in found]
    if not masks:
        fail(2, f"{root}: {NO_DFC2020}")
    rows = []
    for part, mask in masks:
        twin = re.sub(r"dfc(_\w+)?/(\w+)_dfc_", r"{0}\1/\2_{0}_", mask)
        rows.append({"mask": mask, "split": part} | {s: twin.format(s) for s in ("s1", "s2")})
    return rows


def check_files(paths: list[str], width: int, named: str) -> None:
    """Refuse a file that comes twice, or that has another number of bands than `width`."""
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            fail(1, f"{path}: comes twice; a tile both trained and tested on proves nothing")
        seen.add(real)
        if (has := bandcrop.info(path).bands) != width:
            fail(1, f"{path}: has {has} bands, {named}")


def read_masks(
    paths: list[str], numbers: dict[int, int], size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The middle of each mask, uint8 [N, S, S], and where that is, float64 [N, 4].

    numbers: by the ids in the files, of any type, the numbers to write for them.
    """
    masks, windows = [], []
    progress = Progress("masks read")
    for path in paths:
        ids = bandcrop.read(path)[0]
        height, width = ids.shape
        side = size or (len(masks[0]) if masks else height)
        if side > min(height, width) or (size is None and (height, width) != (side, side)):
            fail(1, f"{path} is {height} x {width}: give --size, {min(height, width)} or less, "
                    "for tiles that differ or are not square")  # fmt: skip
        top, left = (height - side) // 2, (width - side) // 2
        ids = ids[top : top + side, left : left + side]
        mask = np.full(ids.shape, UNKNOWN, np.uint8)
        for number, value in numbers.items():
            mask[ids == number] = value
        if (strange := ids[mask == UNKNOWN]).size:
            fail(1, f"{path}: holds {strange[0]}, which is no class: ids are whole numbers, named "
                    "in --classes in their order or listed in --ignore")  # fmt: skip
        masks.append(mask)
        windows.append((top / height, left / width, side / height, side / width))
        progress(len(masks), len(paths))
    return np.stack(masks), np.array(windows)


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
        pool, test = np.flatnonzero(part != "test"), np.flatnonzero(part == "test")
        fewer = wanted is not None and wanted > len(pool)
        train = np.sort(rng.permutation(pool)[:wanted])
    for rows, least, use in ((train, 2, "train"), (test, 1, "test")):
        if (counts := tiles.labelled[rows].sum()) < least:
            fail(1, f"{args.root}, --split {args.split}: {len(rows)} tiles to {use}, of which "
                    f"{counts} have a pixel that counts; {least} are needed")  # fmt: skip
    truth = tiles.masks[train]
    held = [name for number, name in enumerate(tiles.classes) if (truth == number).any()]
    if len(held) == 1:
        fail(1, f"{args.root}: {held[0]!r} is the only class in the {len(train)} training masks: "
                "nothing to learn")  # fmt: skip
    return train, test, fewer


def source(tiles: Tiles, rows: np.ndarray, bands: list[str]) -> dict[str, Any]:
    """Where bandcrop finds these bands of these tiles."""
    where = [tiles.bands[band] for band in bands]
    return {
        "paths": [[tiles.files[row][file] for file, _ in where] for row in rows],
        "bands": [[band for _, band in where]] * len(rows),
        "bands_in_file": [[tiles.widths[file] for file, _ in where]] * len(rows),
    }


def band_statistics(
    tiles: Tiles, rows: np.ndarray, bands: list[str], args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each band over the training tiles, or as --stats says."""
    if args.stats == "encoder":
        about = args.weights.metadata
        where = [about["bands"].index(band) for band in bands]
        return [about["mean"][i] for i in where], [about["std"][i] for i in where]
    mean, std = bandcrop.statistics(**source(tiles, rows, bands))
    if (std == 0).any():
        band = bands[int(np.argmin(std))]
        fail(1, f"band {band} is constant over the {len(rows)} training tiles: nothing to learn")
    return mean.tolist(), std.tolist()


def read_images(
    tiles: Tiles, rows: np.ndarray, bands: list[str], norm: tuple[list[float], list[float]],
    device: torch.device, spent: dict[str, float],
) -> Iterator[tuple[slice, torch.Tensor]]:  # fmt: skip
    """Standardised images float32 [n, C, S, S] on the device, with their places in `rows`."""
    progress = Progress("tiles read")
    side = tiles.masks.shape[-1]

    def requests() -> Iterator[dict[str, Any]]:
        for at in range(0, len(rows), ENCODE_BATCH):
            part = rows[at : at + ENCODE_BATCH]
            mean, std = (np.tile(np.float32(value), (len(part), 1)) for value in norm)
            yield source(tiles, part, bands) | {
                "windows": tiles.windows[part], "mean": mean, "std": std,
                "extra": slice(at, at + len(part)),
            }  # fmt: skip

    for batch in bandcrop.stream(requests(), (ENCODE_BATCH, len(bands), side, side), device):
        spent["read"] += batch.waited
        spent["replaced"] += int(batch.report.replaced.sum())
        places = batch.request["extra"]
        progress(places.stop, len(rows))
        yield places, batch.x


# ---------------------------------------------------------------------------------------- maps
def colours_of(classes: list[str]) -> list[str]:
    """A colour for each class: its own where its name is known, else the next one that is free."""
    known = [next((c for k, c in COLOURS.items() if name.lower().startswith(k)), "")
             for name in classes]  # fmt: skip
    free = [colour for colour in COLOURS.values() if colour not in known]
    return [colour or (free.pop(0) if free else "#FFFFFF") for colour in known]


def draw_maps(
    path: Path, shown: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], classes: list[str],
    bands: list[str],
) -> None:  # fmt: skip
    """A sheet with a row for each tile: its name; image [C, H, W], truth, prediction [H, W]."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = [*colours_of(classes), "#FFFFFF"]  # the last: pixels that do not count
    figure = Figure(figsize=(7.5, 2.5 * len(shown) + 0.8), layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, (name, image, truth, said) in zip(axes, shown, strict=True):
        low, high = np.percentile(image, (2, 98), axis=(1, 2), keepdims=True)
        pixels = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1).transpose(1, 2, 0)
        row[0].imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
        counts = truth != IGNORED
        for axis, mask in zip(row[1:], (truth, said), strict=True):
            axis.imshow(np.where(counts, mask, len(classes)), cmap=ListedColormap(colours),
                        vmin=-0.5, vmax=len(classes) + 0.5, interpolation="nearest")  # fmt: skip
        right = f"{(truth == said)[counts].mean():.0%} of its pixels right" if counts.any() else ""
        for axis, label in zip(row, (name, "", right), strict=True):
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(label, fontsize=8)
    titles = f"image ({', '.join(bands)})", "truth", "prediction"
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    labels = [*classes, "does not count"]
    patches = [Patch(facecolor=c, edgecolor="black", label=n)
               for n, c in zip(labels, colours, strict=True)]  # fmt: skip
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    write_atomic(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
    print(f"wrote {path}", flush=True)


# -------------------------------------------------------------------------------------- one run
def evaluate(
    model: nn.ModuleDict, batches: Iterator[tuple[slice, torch.Tensor]], masks: np.ndarray,
    names: list[str], classes: int, maps: int,
) -> tuple[np.ndarray, list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]:  # fmt: skip
    """Confusion int64 [classes, classes] over masks [N, S, S], and `maps` tiles for draw_maps."""
    confusion = np.zeros((classes, classes), np.int64)
    wanted = np.linspace(0, len(names) - 1, min(maps, len(names))).astype(int)
    shown = []
    for places, x in batches:
        with torch.no_grad(), autocast(x.device):
            features = feature_maps(model["encoder"], x)
            said = predict_scores(model["decoder"], features, x.shape[-2:]).argmax(1).cpu().numpy()
        truth = masks[places]
        confusion += count_pixels(truth, said, classes)
        for at in wanted[(wanted >= places.start) & (wanted < places.stop)] - places.start:
            name = names[places.start + at]
            shown.append((name, x[at].cpu().numpy().copy(), truth[at], said[at]))
    return confusion, shown


def run(
    args: argparse.Namespace, tiles: Tiles, bands: list[str], seed: int, device: torch.device
) -> Path:
    """One band (or three) and one seed: read, encode, train the decoder, measure, write."""
    weights: Weights = args.weights
    begin, spent = time.perf_counter(), {"read": 0.0, "replaced": 0}
    unseen = check_bands(weights, bands, args.stats)
    train, test, fewer = split_tiles(tiles, args, seed)
    classes, side = tiles.classes, tiles.masks.shape[-1]
    scope = {"dataset": args.dataset, "split": args.split, "subset": len(train), "bands": bands}
    part = tiles.part if args.split == "official" else None
    settings = {  # with scope, weights and seed all that determines the result
        "size": side, "epochs": args.epochs, "batch": args.batch_size, "lr": args.lr,
        "optimiser": "sgd", "bn": args.bn, "stats": args.stats, "classes": classes,
        "arch": weights.metadata.get("arch", args.arch), "bf16": native_bf16(device),
        "images": digest_of([tiles.content, part])[:16],
        "files": tiles.digest, "places": [tiles.bands[band] for band in bands],
    }  # fmt: skip
    identity = digest_of([scope, settings, weights.name, weights.sha256])
    named = [args.dataset, args.split, str(len(train)), weights.name, "+".join(bands)]
    path = result_path(args.out, [*named, f"{len(classes)}classes"], identity, seed)
    png = path.with_name(f"{path.stem}-maps.png")
    if path.exists() and (png.exists() or not args.maps):
        print(f"{path}: done before", flush=True)
        return path

    used = train[tiles.labelled[train]]  # the others have nothing to learn from
    print(f"{'+'.join(bands)}, seed {seed}: {len(train)} tiles to train"
          + " (fewer than --num-images)" * fewer
          + f", {len(train) - len(used)} of them without a pixel that counts"
          * (len(used) < len(train))
          + f"; {len(test)} to test", flush=True)  # fmt: skip
    mean, std = norm = band_statistics(tiles, train, bands, args)
    spent["read"] = time.perf_counter() - begin
    scratch = weights.source == "scratch"
    encoder = dilate(load_encoder(weights, args.arch, len(bands), seed)).requires_grad_(scratch)
    torch.manual_seed(seed)
    decoder = torchvision.models.segmentation.deeplabv3.DeepLabHead(encoder.width, len(classes))
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    model.to(device, memory_format=torch.channels_last)
    images = torch.empty(len(used), len(bands), side, side, device=device)
    for places, x in read_images(tiles, used, bands, norm, device, spent):
        images[places] = x
    if args.bn == "reestimate":
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
        drawn = order.to(device).tensor_split(batches(len(used), ENCODE_BATCH))
        reestimate_batchnorm(encoder, (images[rows] for rows in drawn))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    start = time.perf_counter()
    kept = None if scratch else keep_features(encoder, images)
    encoded = time.perf_counter()
    truth = torch.from_numpy(tiles.masks[used]).to(device)
    x = images if kept is None else kept
    losses = train_decoder(model, x, truth, args, seed)
    trained = time.perf_counter()
    tested = read_images(tiles, test, bands, norm, device, spent)
    names = [tiles.names[row] for row in test]
    found = evaluate(model, tested, tiles.masks[test], names, len(classes), args.maps)
    if not scratch:
        assert_unchanged(encoder, before)
    metrics = map_metrics(found[0], classes)
    if args.maps:
        draw_maps(png, found[1], classes, bands)
    write_result(path, {
        "schema": 1, "stage": "segment", **scope, "seed": seed, "metrics": metrics,
        "weights": {"name": weights.name, "source": weights.source, "sha256": weights.sha256},
        "config": settings | {
            "decoder": "DeepLabHead", "output_stride": 8, "train": len(used), "test": len(test),
            "fewer_than_asked": fewer, "losses": losses, "root": str(args.root), "mean": mean,
            "std": std, "unseen_bands": unseen, "replaced_samples": spent["replaced"],
            "cached": kept is not None, "device": device.type, "synthetic": tiles.synthetic,
            "encoder": weights.metadata,
            "encoder_synthetic": weights.metadata.get("synthetic") == "true",
        },
        "seconds": {"read": spent["read"], "encode": encoded - start, "train": trained - encoded},
    })  # fmt: skip
    notes = [f"mIoU {metrics['miou']:.3f}, AA {metrics['aa']:.3f}"]
    if absent := [name for name in classes if name not in metrics["classes"]]:
        notes.append(f"means without {', '.join(absent)}, which the test masks lack")
    if metrics["only_predicted"]:
        notes.append(f"predicted all the same: {', '.join(metrics['only_predicted'])}")
    if unseen:
        notes.append(f"the encoder never saw {', '.join(unseen)}")
    print(f"{'+'.join(bands)}, seed {seed}: {'; '.join(notes)}; "
          f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
    return path


def main(args: argparse.Namespace) -> None:
    try:
        device = find_device(args.device)
        tiles = list_tiles(args)
        args.split = args.split or (
            "official" if args.dataset == "csv" and tiles.part else "random"
        )
        asked = requested_bands(args.bands, tiles.bands, args.dataset)
        print(f"{len(tiles.names)} tiles, {len(tiles.classes)} classes; {args.weights.name} "
              f"({args.weights.source}) on {device}, {'bf16' if native_bf16(device) else 'fp32'}",
              flush=True)  # fmt: skip
        for bands in asked:
            check_bands(args.weights, bands, args.stats)
        paths = [
            run(args, tiles, bands, seed, device) for bands in asked for seed in range(args.seeds)
        ]
        for metric in ("miou", "aa"):
            print_table(args.out, paths, metric)
    except (OSError, bandcrop.TileError) as error:  # a full disk, a bad tile
        fail(1, str(error))
    except torch.OutOfMemoryError:
        fail(1, f"{device} has too little memory: lower --batch-size, --num-images or --size")


if __name__ == "__main__":
    try:
        main(ARGS)
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
