"""Land cover from a frozen encoder: DeepLabV3's decoder on its feature maps, mIoU for each band.

    python segment.py --dataset dfc2020 --band RE5    # with the encoder that pretrain.py made
    python segment.py --dataset dfc2020 --band all --split official --seeds 3 --maps 6 \\
        --weights runs/x/encoder.safetensors
    python segment.py --dataset csv --root tiles.csv --s1-bands VV,VH --s2-bands B02,B03,B04,B08 \\
        --classes urban,crops,forest,shrub,wetland,water --band NIR --arch resnet18

One JSON in --out for each band and seed, and at the end a table beside random weights. A rerun
skips a result only where files (path, size, time), split, band order, weights and settings are the
same. The encoder's last two stages are dilated (output stride 8). Frozen, it sees each training
tile once, where feature maps fit into memory, and is proved unchanged at the end. Masks are cut in
whole pixels, never resampled. The paper names no optimiser: SGD, momentum 0.9, DeepLab's decay.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import bandcrop
import numpy as np
import safetensors
import torch
import torchvision
from scipy.special import stdtrit
from torch import nn

# ------------------------------------------------------------------------------------- settings
NO_DFC2020 = (  # Copernicus-Bench's copy; the contest's own needs a login at ieee-dataport.org
    "no DFC2020 there: unpack https://hf.co/datasets/wangyi111/Copernicus-Bench/resolve/"
    "9d252acd3aa0e3da3128e05c6f028647f0e48e5f/l2_dfc2020_s1s2/dfc2020.zip (md5 "
    "f10ba017dab6f38b7a6857b169ea924b) into this folder"
)
LAND_COVER = (  # DFC2020's labels 1..10
    "Forest Shrubland Savanna Grassland Wetlands Croplands Urban/Built-up Snow/Ice Barren Water"
).split()
IGNORED = 255  # in masks given to the loss
LEARNING_RATE = 0.03  # at the start
ENCODE_BATCH = 16
CACHE = 0.5  # the share of free memory that feature maps may fill


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be before any file is read."""
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(2, f"{message} (see --help)")
    add = parser.add_argument
    add("--dataset", required=True, choices=["dfc2020", "csv"])
    add("--root", type=Path, help="its folder, or FILE.csv: s1,s2,mask[,split], of one ground a "
        "line, in pixels of any size (data/dfc2020)")
    add("--band", "--bands", dest="bands", required=True,
        help="RE5 or B05; RE5,RE6,RE7; RGB, RE or SAR; all")
    add("--s1-bands", help="csv: bands of the s1 files in order (VV,VH)")
    add("--s2-bands", help="csv: bands of the s2 files in order")
    add("--weights", help="encoder.safetensors of pretrain.py (runs/rs-byol-1's where it is, else "
        "random) or of probe.py --export; random; scratch (encoder trained too)")
    add("--arch", choices=ARCHS, default="resnet50", help="of random and scratch")
    add("--split", choices=["random", "official"], help="random: train on --num-images, test on "
        "the rest; official: on all but the published test part, or the csv's own (csv's default)")
    add("--num-images", type=int, metavar="N", help="training tiles, drawn by seed (dfc2020: 900, "
        "paper; csv: all, or 80 %% where the split is random)")
    add("--classes", help="dfc2020: 8 (default; without Savanna, Snow/Ice) or 10; csv: names, for "
        "the mask's ids in order, ignored ones left out")
    add("--ignore", metavar="IDS", help="csv: ids that do not count (0), as "
        "--ignore=-1,255: with it id 0 is the first of --classes")
    add("--nodata", type=float, help="of s1 and s2 files without such a tag, such as 0 for "
        "borders; such pixels count as the mask says")
    add("--size", type=int, metavar="PX", help="square cut from each tile's middle (the whole)")
    add("--stats", choices=["train", "encoder"], default="train", help="mean and deviation of the "
        "bands: of the training tiles (default) or as the encoder was pre-trained with")
    add("--epochs", type=int, default=100, help="(100, paper)")
    add("--batch-size", type=int, default=16)
    add("--seeds", type=int, default=1, metavar="K", help="0..K-1: decoder, draws, new weights (1)")
    add("--maps", type=int, default=0, metavar="K", help="draw K test tiles as a PNG (one "
        "that is there is kept)")
    add("--device", default="auto", help="auto: cuda where there is one, else cpu")
    add("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    # fmt: on
    args.root = args.root or Path("data") / args.dataset
    least = {"size": 32, "epochs": 1, "seeds": 1, "maps": 0, "num_images": 2, "batch_size": 2}
    for name, value in least.items():
        if (given := getattr(args, name)) is not None and given < value:
            fail(2, f"--{name.replace('_', '-')} {given}: must be at least {value}")
    if args.nodata is not None and not np.isfinite(args.nodata):
        fail(2, f"--nodata {args.nodata}: give a number; NaN and infinity are left out anyway")
    if args.dataset == "dfc2020":
        if args.s1_bands or args.s2_bands or args.ignore:
            fail(2, "--s1-bands, --s2-bands, --ignore are for --dataset csv: dfc2020's are known")
        if args.classes not in (None, "8", "10"):
            fail(2, f"--classes {args.classes}: dfc2020 has 8 or 10")
        args.ignore = [0] if args.classes == "10" else [0, 3, 8]  # Savanna, Snow/Ice
        args.classes = [c for i, c in enumerate(LAND_COVER, 1) if i not in args.ignore]
        args.s1_bands, args.s2_bands = SEN12MS_S1, SEN12MS_S2
    else:
        args.s1_bands, args.ignore = args.s1_bands or "VV,VH", args.ignore or "0"
        if not (args.classes and args.s2_bands):
            fail(2, "--dataset csv needs --classes NAMES and --s2-bands BANDS, as B02,B03,B04,B08")
        if not re.fullmatch(r"-?\d+(,-?\d+)*", args.ignore):
            fail(2, f"--ignore {args.ignore}: give whole numbers, as --ignore=-1,255")
        names = [name.strip() for name in args.classes.split(",")]
        if not all(names) or not 1 < len({*names}) == len(names) < IGNORED:
            fail(2, f"--classes {args.classes}: give two or more different names, as crops,forest")
        args.ignore, args.classes = sorted(map(int, args.ignore.split(","))), names
        args.s1_bands, args.s2_bands = args.s1_bands.split(","), args.s2_bands.split(",")
    count = len(args.classes)  # ids of the classes: from 0 on, but what is ignored
    args.ids = np.setdiff1d(range(count + len(args.ignore)), args.ignore)[:count].tolist()
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


# -------------------------------------------------------------------------------------- encoder
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
    x = images.contiguous(memory_format=torch.channels_last)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
    return encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))


@torch.no_grad()
def encode(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Feature maps of the images; where they take too much memory the images themselves, which are
    then encoded in every epoch: on a GPU that takes no longer than to fetch maps from the host."""
    if images.is_cuda:
        free = torch.cuda.mem_get_info(images.device)[0]  # and what torch keeps for later
        free += torch.cuda.memory_reserved(images.device)
        free -= torch.cuda.memory_allocated(images.device)
    else:  # kB stand there
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    starts = range(0, len(images), ENCODE_BATCH)
    with autocast(images.device):
        one = feature_maps(encoder, images[:1])
        if one.nbytes * len(images) > free * CACHE:
            return images
        maps = one.new_empty((len(images), *one.shape[1:]))
        for at in progress("encoding: batch", starts, len(starts)):
            maps[at : at + ENCODE_BATCH] = feature_maps(encoder, images[at : at + ENCODE_BATCH])
    return maps


# ------------------------------------------------------------------------------------- decoder
def predict_scores(model: nn.ModuleDict, x: torch.Tensor, size: Any) -> torch.Tensor:
    """Scores float32 [n, classes, H, W], enlarged bilinearly as DeepLabV3 does.

    x: images [n, C, H, W] of this size, or feature maps [n, D, H / 8, W / 8].
    """
    with autocast(x.device):
        maps = feature_maps(model["encoder"], x) if x.shape[-2:] == size else x
        scores = model["decoder"](maps.contiguous(memory_format=torch.channels_last))
    return nn.functional.interpolate(scores.float(), size, mode="bilinear", align_corners=False)


def train(
    model: nn.ModuleDict, x: torch.Tensor, masks: torch.Tensor, args: argparse.Namespace, seed: int
) -> torch.Tensor:
    """Train the decoder, and the encoder where it is not frozen; each epoch's mean loss, float32
    [epochs]. Nothing in here waits for the GPU."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    count = min(-(-len(x) // args.batch_size), len(x) // 2)  # BatchNorm needs two tiles in each
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, args.epochs * count, 0.9)  # DeepLab
    model["encoder"].train(model["encoder"].conv1.weight.requires_grad)
    model["decoder"].train()
    losses, draw = torch.zeros(args.epochs, device=x.device), torch.Generator().manual_seed(seed)
    for epoch in progress("epochs", range(args.epochs), args.epochs):
        for rows in torch.randperm(len(x), generator=draw).to(x.device).tensor_split(count):
            scores = predict_scores(model, x[rows], masks.shape[-2:])
            loss = nn.functional.cross_entropy(scores, masks[rows].long(), ignore_index=IGNORED)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses[epoch] += loss.detach() / count
    model.eval()
    return losses


@torch.no_grad()
def predict(model: nn.ModuleDict, batches: Iterable[torch.Tensor]) -> np.ndarray:
    """Places in --classes, uint8 [N, H, W], of the pixels of images [n, C, H, W]."""
    predicted = [predict_scores(model, x, x.shape[-2:]).argmax(1).byte().cpu() for x in batches]
    return torch.cat(predicted).numpy()


# ------------------------------------------------------------------------------------- measures
def map_metrics(truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """mIoU, AA (mean recall), pixel accuracy, by class, over all pixels that count of [N, H, W].

    Means are over the classes that the truth holds, as scikit-learn's jaccard_score and
    recall_score with these as labels: pixels given to another class still are in a union.
    """
    confusion = np.zeros((len(classes), len(classes)), np.int64)  # rows: truth
    for mask, guess in zip(truth, predicted, strict=True):  # all at once would take 16 GB
        counts = mask != IGNORED
        pairs = mask[counts].astype(int) * len(classes) + guess[counts]
        confusion += np.bincount(pairs, minlength=confusion.size).reshape(confusion.shape)
    hits, true, given = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    held = np.flatnonzero(true)
    iou = {classes[i]: float(hits[i] / (true[i] + given[i] - hits[i])) for i in held}
    recall = {classes[i]: float(hits[i] / true[i]) for i in held}
    return {
        "miou": float(np.mean(list(iou.values()))),
        "aa": float(np.mean(list(recall.values()))),
        "pixel_accuracy": float(hits.sum() / true.sum()),
        "classes": list(iou),
        "only_predicted": [classes[i] for i in np.flatnonzero((true == 0) & (given > 0))],
        "iou_per_class": iou,
        "recall_per_class": recall,
        "confusion": confusion.tolist(),
    }


# ----------------------------------------------------------------------------------------- data
class Tiles(NamedTuple):
    names: list[str]  # of the masks, below --root
    files: list[tuple[str, str]]  # S2, S1
    bands: dict[str, tuple[int, int]]  # paper's name: place in `files`, 0-based band in that file
    masks: np.ndarray  # uint8 [N, S, S]: place in --classes, IGNORED where a pixel does not count
    windows: np.ndarray  # float64 [N, 4]: where they were cut: top, left, height, width, fractions
    part: list[str] | None  # train, val or test, where the archive says so
    digest: str  # of all files and parts
    nodata: float | None  # of files without a tag of their own
    synthetic: bool


def list_tiles(args: argparse.Namespace) -> Tiles:
    """Every labelled tile below --root, in an order that does not depend on the disk."""
    if args.dataset == "dfc2020":
        folder, rows = args.root, list_dfc2020(args.root)
    else:
        if not args.root.is_file():
            fail(2, f"{args.root}: is no file; give a CSV file with the columns s1,s2,mask[,split]")
        folder, rows = args.root.parent, bandcrop.read_table(args.root, ["s1", "s2", "mask"])
    part = [row["split"] for row in rows] if "split" in rows[0] else None
    if strange := {*(part or ())} - {"train", "val", "test"}:
        fail(1, f"{args.root}: split {min(strange)!r} is not train, val or test")
    files = {kind: [str(folder / row[kind]) for row in rows] for kind in ("mask", "s2", "s1")}
    for row in rows:
        info = {kind: bandcrop.info(str(folder / row[kind])) for kind in ("s2", "s1", "mask")}
        mask = info["mask"]
        for kind, order in (("s2", args.s2_bands), ("s1", args.s1_bands)):
            path, tile = folder / row[kind], info[kind]
            if tile.bands != len(order):
                fail(1, f"{path} has {tile.bands} bands, --{kind}-bands names {len(order)}")
            if abs(tile.width * mask.height / (tile.height * mask.width) - 1) > 0.02:
                size = f"{mask.height} x {mask.width}"
                fail(1, f"{path} is {tile.height} x {tile.width}, {folder / row['mask']} {size}: "
                        "they do not show the same ground")  # fmt: skip
    digest = digest_of([*map(bandcrop.digest, files.values()), part])
    return Tiles(
        names=[row["mask"] for row in rows], files=list(zip(files["s2"], files["s1"], strict=True)),
        bands=band_places(args.s2_bands, args.s1_bands), part=part, digest=digest,
        **read_masks(files["mask"], args), nodata=args.nodata,
        synthetic=(folder / "SYNTHETIC.txt").exists(),
    )  # fmt: skip


def list_dfc2020(root: Path) -> list[dict[str, str]]:
    """Rows as of a table s1,s2,mask,split; the contest's ROIs0000_validation is to train on."""
    masks: list[tuple[str, str]] = []
    inner = "dfc2020_s1s2/" if (root / "dfc2020_s1s2").is_dir() else ""
    for part in ("train", "val", "test"):
        table = root / inner / f"dfc-{part}-new.csv"  # of Copernicus-Bench: a name in each line
        for name in table.read_text("utf-8", "replace").split() if table.is_file() else []:
            if not name.endswith(".tif"):
                fail(1, f"{table}: {name[:40]!r} is no name of a mask")
            masks.append((part, f"{inner}dfc/{name}"))
    listed = len(masks)
    for part, folder in (("train", "ROIs0000_validation"), ("test", "ROIs0000_test")):
        found = sorted(root.glob(f"{folder}/dfc_*/*_dfc_*.tif"))
        if listed and found:  # the two split the same tiles otherwise
            fail(2, f"{root} holds DFC2020 twice: {folder} and dfc-*-new.csv: move one away")
        masks += [(part, str(mask.relative_to(root))) for mask in found]
    if not masks:
        fail(2, f"{root}: {NO_DFC2020}")
    return [
        {"split": part} | {kind: re.sub("dfc(?!2020)", kind, mask) for kind in ("s1", "s2")}
        | {"mask": mask} for part, mask in masks
    ]  # fmt: skip


def read_masks(paths: list[str], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The middle of each mask, and where that is: `masks` and `windows` of Tiles."""
    masks, windows = [], []
    for path in paths:
        whole = bandcrop.read(path)  # of any type
        bands, height, width = whole.shape
        if bands != 1:
            fail(1, f"{path} has {bands} bands, a mask has 1")
        side = args.size or (len(masks[0]) if masks else height)
        if side > min(height, width) or not (args.size or height == width == side):
            fail(1, f"{path} is {height} x {width}: give --size, at most the smallest tile's")
        top, left = (height - side) // 2, (width - side) // 2
        cut = whole[0, top : top + side, left : left + side]
        mask = np.full(cut.shape, IGNORED, np.uint8)
        for number, id in enumerate(args.ids):
            mask[cut == id] = number
        if (strange := cut[~np.isin(cut, [*args.ids, *args.ignore])]).size:
            fail(1, f"{path}: holds {strange[0]}: --classes are ids {args.ids}, --ignore has "
                    f"{args.ignore}: add it to one, or number the masks anew")  # fmt: skip
        masks.append(mask)
        windows.append((top / height, left / width, side / height, side / width))
    return {"masks": np.stack(masks), "windows": np.array(windows)}


def split_tiles(tiles: Tiles, args: argparse.Namespace, seed: int) -> tuple[np.ndarray, ...]:
    """Places of the training tiles, of those with a pixel that counts, and of the test tiles."""
    random = args.split == "random"
    if not random and tiles.part is None:
        fail(2, f"--split official: {args.root} has no column split; use --split random")
    tested = np.zeros(len(tiles.names), bool) if random else np.array(tiles.part) == "test"
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~tested))
    most = len(order) - random  # at least one must test
    if (args.num_images or 0) > most:
        fail(2, f"--num-images {args.num_images}: at most {most} tiles are there to train on")
    take = args.num_images or (900 if args.dataset == "dfc2020" else len(order))  # 900: paper
    if random and take > most:
        take = round(0.8 * len(order))
    train = np.sort(order[:take])
    test = np.sort(order[take:]) if random else np.flatnonzero(tested)
    counts, truth = (tiles.masks != IGNORED).any((1, 2)), tiles.masks[train]
    held = sum((truth == number).any() for number in range(len(args.classes)))
    if counts[train].sum() < 2 or held < 2 or not counts[test].any():
        fail(1, f"{args.root}: pixels that count are in {counts[train].sum()} training tiles (2 "
                f"needed), of {held} classes (2), and in {counts[test].sum()} test tiles (1); see "
                f"--split, --classes, --ignore (ids {args.ignore} do not count)")  # fmt: skip
    return train, train[counts[train]], test


def source(tiles: Tiles, rows: np.ndarray, bands: list[str]) -> dict[str, Any]:
    """Where bandcrop finds these bands of these tiles."""
    where = [tiles.bands[band] for band in bands]
    paths = [[tiles.files[row][file] for file, _ in where] for row in rows]
    bands = [[band for _, band in where]] * len(rows)
    return {"paths": paths, "bands": bands, "nodata": tiles.nodata}


def band_statistics(
    tiles: Tiles, rows: np.ndarray, bands: list[str], args: argparse.Namespace
) -> np.ndarray:
    """float64 [2, C]: mean and standard deviation of each band, in these tiles or the encoder's."""
    if args.stats == "encoder":
        about = args.weights.metadata
        where = [about["bands"].index(band) for band in bands]
        return np.array([about["mean"], about["std"]], float)[:, where]
    norm = np.array(bandcrop.statistics(**source(tiles, rows, bands)))
    for band, deviation in zip(bands, norm[1], strict=True):
        if not 0 < deviation < 1e30:
            fail(1, f"band {band} of {len(rows)} training tiles has deviation {deviation:.2g}: "
                    "constant, or a fill value without a tag (--nodata)?")  # fmt: skip
    return norm


def read_images(
    tiles: Tiles, rows: np.ndarray, bands: list[str], norm: np.ndarray, device: torch.device
) -> Iterator[torch.Tensor]:
    """Standardised images float32 [n, C, S, S] on the device; on the CPU valid until the next."""
    side, requests = tiles.masks.shape[-1], []
    for part in np.split(rows, range(ENCODE_BATCH, len(rows), ENCODE_BATCH)):
        mean, std = np.repeat(np.float32(norm)[:, None], len(part), axis=1)
        more = {"windows": tiles.windows[part], "mean": mean, "std": std}
        requests.append(source(tiles, part, bands) | more)
    batches = bandcrop.stream(requests, (ENCODE_BATCH, len(bands), side, side), device)
    for batch in progress("reading: batch", batches, len(requests)):
        yield batch.x


# ---------------------------------------------------------------------------------------- maps
def draw_maps(path: Path, tiles: list[tuple], classes: list[str]) -> None:
    """A sheet with a row for each tile: name, image [C, H, W], truth and prediction [H, W]."""
    from matplotlib import colormaps  # here: it takes a second to import
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours, last = colormaps["tab20"].resampled(len(classes)), len(classes) - 1
    figure = Figure(figsize=(7.5, 2.65 * len(tiles) + 0.9), layout="constrained")
    axes = figure.subplots(len(tiles), 3, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for row, (name, image, truth, guess) in zip(axes, tiles, strict=True):
        pixels = np.clip(image / 4 + 0.5, 0, 1).transpose(1, 2, 0)  # two deviations either way
        row[0].imshow(pixels, "gray", vmin=0, vmax=1)
        row[0].set_xlabel(name if len(name) < 36 else "…" + name[-35:], fontsize=8)
        for axis, mask in ((row[1], truth), (row[2], guess)):
            counted = np.ma.masked_where(truth == IGNORED, mask)  # the others stay white
            axis.imshow(counted, colours, vmin=0, vmax=last, interpolation="nearest")
    for axis, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        axis.set_title(title)
    patches = [Patch(facecolor=colours(i), label=name) for i, name in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"wrote {path}", flush=True)


# -------------------------------------------------------------------------------------- one run
def train_and_predict(
    args: argparse.Namespace, tiles: Tiles, rows: np.ndarray, test: np.ndarray, bands: list[str],
    norm: np.ndarray, seed: int,
) -> tuple[np.ndarray, dict[str, Any], dict[str, float]]:  # fmt: skip
    """Classes of the test tiles, uint8 [N, S, S], by a decoder that learnt from the tiles `rows`;
    what is to be saved of its training; the seconds that each part took."""
    clock, device, scratch = [time.perf_counter()], args.device, args.weights.source == "scratch"
    encoder = load_encoder(args.weights, len(bands), seed).requires_grad_(scratch)
    torch.manual_seed(seed)
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(encoder.width, len(args.classes))
    model = nn.ModuleDict({"encoder": dilate(encoder), "decoder": head})
    model.to(device, memory_format=torch.channels_last)
    images = torch.cat([x.clone() for x in read_images(tiles, rows, bands, norm, device)])
    for _ in read_images(tiles, test, bands, norm, torch.device("cpu")):
        pass  # a bad tile ends the run here, not after the training
    clock.append(time.perf_counter())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = images if scratch else encode(encoder, images)
    clock.append(time.perf_counter())
    losses = train(model, x, torch.from_numpy(tiles.masks[rows]).to(device), args, seed)
    if not all(values.isfinite().all() for values in (losses, *model.parameters())):
        fail(1, "loss or weights are not finite: this training, or the encoder's, diverged")
    clock.append(time.perf_counter())
    predicted = predict(model, read_images(tiles, test, bands, norm, device))
    if not scratch:
        assert_unchanged(encoder, before)
    about = {"losses": losses.tolist(), "cached": x is not images}
    about |= {"mean": [*norm[0]], "std": [*norm[1]]}
    return predicted, about, dict(zip(("read", "encode", "train"), np.diff(clock), strict=True))


def run(args: argparse.Namespace, tiles: Tiles, bands: list[str], seed: int) -> Path:
    """One band (or three) and one seed: split, train and predict, measure, draw, write."""
    weights, classes, device = args.weights, args.classes, args.device
    drawn, used, test = split_tiles(tiles, args, seed)
    scope = {"dataset": args.dataset, "split": args.split, "subset": len(drawn)}
    settings = {
        "size": tiles.masks.shape[-1], "epochs": args.epochs, "batch": args.batch_size,
        "lr": LEARNING_RATE, "classes": classes, "ignored": args.ignore,
        "files": tiles.digest, "places": tiles.bands, "nodata": tiles.nodata,
        "bf16": native_bf16(device),
    }  # fmt: skip
    arch = weights.metadata["arch"]
    task = digest_of([scope, settings])  # equal: comparable, band by band and seed by seed
    identity = digest_of([task, args.stats, bands, arch, weights.name, weights.sha256])
    parts = [args.dataset, args.split, str(len(drawn)), weights.name, *bands]
    parts.append(f"{len(classes)}classes")
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)) + f"-{identity[:12]}-seed{seed}"
    path, png = args.out / f"{stem}.json", args.out / f"{stem}-maps.png"
    if (png.exists() or not args.maps) and done_before(path):
        return path

    title = f"{'+'.join(bands)}, seed {seed}"
    blank = len(drawn) - len(used)
    without = f", {blank} of them without a pixel that counts" * (blank > 0)
    print(f"{title}: {len(drawn)} tiles to train{without}, {len(test)} to test", flush=True)
    norm = band_statistics(tiles, drawn, bands, args)
    predicted, about, seconds = train_and_predict(args, tiles, used, test, bands, norm, seed)
    truth = tiles.masks[test]
    metrics = map_metrics(truth, predicted, classes)
    unseen = check_bands(weights, bands, args.stats)
    write_result(path, {
        "schema": 1, "stage": "segment", **scope, "bands": bands, "seed": seed, "metrics": metrics,
        "weights": {"name": weights.name, "source": weights.source, "sha256": weights.sha256},
        "config": settings | about | {
            "task": task, "identity": identity, "stats": args.stats, "arch": arch,
            "train": len(used), "test": len(test),
            "root": str(args.root), "device": device.type, "synthetic": tiles.synthetic,
            "unseen_bands": unseen, "encoder": weights.metadata,
        },
        "seconds": seconds,
    })  # fmt: skip
    print(f"{title}: mIoU {metrics['miou']:.3f}, AA {metrics['aa']:.3f}", flush=True)
    given = [classes[i] for i in np.flatnonzero(np.sum(metrics["confusion"], axis=0))]
    learnt = {classes[i] for i in np.unique(tiles.masks[used]) if i != IGNORED}
    for found, note in (
        ([name for name in classes if name not in metrics["classes"]], "not in the test masks"),
        (sorted({*metrics["classes"]} - learnt), "tested, but in no training mask"),
        (metrics["only_predicted"], "predicted, though no test mask holds it"),
        (given if len(given) == 1 else [], "the only class predicted; more --epochs may help"),
        (unseen, "never seen by the encoder"),
    ):
        if found:
            print(f"  {note}: {', '.join(found)}", flush=True)
    if args.maps:
        shown = np.linspace(0, len(test) - 1, min(args.maps, len(test))).astype(int)
        batches = read_images(tiles, test[shown], bands, norm, torch.device("cpu"))
        images = torch.cat([x.clone() for x in batches]).numpy()
        names = [tiles.names[row] for row in test[shown]]
        draw_maps(png, [*zip(names, images, truth[shown], predicted[shown], strict=True)], classes)
    return path


def main(args: argparse.Namespace) -> None:
    try:
        args.device = find_device(args.device)
        args.weights = find_weights(args.weights, args.arch)
        open_folder(args.out)
        weights, arch = args.weights, args.weights.metadata["arch"]
        epoch = f", epoch {weights.metadata['epoch']}" if "epoch" in weights.metadata else ""
        print(f"weights: {weights.source} ({weights.name}, {arch}{epoch}) on {args.device}\n"
              f"listing the tiles of {args.root}", flush=True)  # fmt: skip
        tiles = list_tiles(args)
        if args.split is None:
            args.split = "official" if args.dataset == "csv" and tiles.part else "random"
        asked = requested_bands(args.bands, tiles.bands, args.dataset)
        for bands in asked:
            check_bands(args.weights, bands, args.stats)
        print(f"{len(tiles.names)} tiles, split {args.split}", flush=True)
        classes = [f"{id} {name}" for id, name in zip(args.ids, args.classes, strict=True)]
        ignored = ", ".join(map(str, args.ignore))
        print(f"ids: {', '.join(classes)}; ignored: {ignored}", flush=True)
        for number, name in enumerate(classes):
            if not (tiles.masks == number).any():
                print(f"warning: no mask holds {name}: see --classes and --ignore", flush=True)
        paths = [run(args, tiles, bands, seed) for bands in asked for seed in range(args.seeds)]
        for metric in ("miou", "aa"):
            print_table(args.out, paths, metric)
    except (OSError, bandcrop.TileError) as error:  # a full disk, a bad tile
        fail(1, str(error))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail(1, f"{args.device} has too little memory: lower --batch-size, --num-images or --size")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed: >&-
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        main(arguments())
    except KeyboardInterrupt:
        fail(130, "interrupted; finished results are kept, the same command goes on from them")
