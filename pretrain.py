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

    python pretrain.py --mode single --recipe small        for small archives and short runs
    python pretrain.py --resume --out runs/rs-byol-1       go on after any interruption
    torchrun --nproc-per-node=4 pretrain.py --mode single  four GPUs, the same global batch
    python pretrain.py --mode three --pairs FILE.csv --s2-bands B02,B03,B04,B08 --s1-bands VV,VH

In this file: settings, the method, augmentation, what a sample is, the archive, the run's files,
what is learnt, the loop. To change the encoder, the augmentation or the data, change make_encoder,
augment or list_pairs. A run's folder: config.json, log.jsonl, checkpoint.pt, encoder.safetensors,
one more encoder at each restart cycle's end, views.png, bad_tiles.txt. Exit status: 0 done, 1 bad
data or diverged, 2 wrong use; 129, 130 or 143 saved and stopped by SIGHUP, Ctrl-C or SIGTERM.
"""

import argparse
import copy
import glob
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

import bandcrop
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

# Settings -----------------------------------------------------------------------------------------
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

RGB = ("Red", "Green", "Blue")
SAR = ("SAR1", "SAR2")
CHANNELS = {"single": 1, "three": 3, "rgb": 3}
VARIANTS = {  # name, random MS bands and SAR bands of a pair
    ("single", "ms-sar"): ("RS-BYOL-1", 1, 1),
    ("three", "ms-sar"): ("RS-BYOL-3 S1S2", 3, 2),
    ("rgb", "ms-sar"): ("RS-BYOL-3 RGB-S1S2", 2, 1),
    ("single", "ms-ms"): ("RS-BYOL-1 MS only", 2, 0),
    ("three", "ms-ms"): ("RS-BYOL-3 MS only", 6, 0),
    ("rgb", "ms-ms"): ("RS-BYOL-3 RGB MS only", 3, 0),
}
RECIPES = {  # defaults that differ from the paper's
    "paper": {},
    "small": {"lr": 0.03, "tau": 0.99, "blur": "0,0", "erase": 0.0, "negatives": 0.2},  # PROOF.md
}
# What a resumed run may change: where things are and how long it goes on, never what is computed.
# What is remembered holds until it is given anew; the others are of this machine and this call.
REMEMBERED = ("root", "pairs", "exclude", "bad_tiles", "epochs", "checkpoint_every", "log_every")
MAY_CHANGE = (*REMEMBERED, "out", "resume", "threads", "device", "compile", "max_steps")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
NO_ARCHIVE = """no archive in {root}: give --root DIR (SEN12MS layout) or --pairs FILE.csv
  SEN12MS (180,662 pairs, 500 GB): rsync or ftp, dataserv.ub.tum.de, user and password m1474000
  a synthetic one: python tests/synthetic.py data/demo, then --root data/demo/sen12ms"""


def number(kind: type, low: float, high: float = math.inf, count: int = 1) -> Callable:
    """An argparse type: `count` numbers from low to high, both included, with commas between."""

    def convert(text: str) -> float | list[float]:
        values = [kind(part) for part in text.split(",")]
        if len(values) != count or not all(low <= value <= high for value in values):
            numbers = f"{count} numbers" if count > 1 else "a number"
            raise argparse.ArgumentTypeError(f"{text}: give {numbers} from {low:g} to {high:g}")
        return values if count > 1 else values[0]

    convert.__name__ = kind.__name__  # argparse names it where kind() fails
    return convert


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        none = action.default is False or action.default in (None, argparse.SUPPRESS)
        return str(action.help) + ("" if none else " (default: %(default)s)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=Help,
        epilog="[open]: the paper does not say; the value is our choice, saved in config.json. So "
        "are bands standardised by mean and deviation, a rate set each step, no solarisation.",
    )
    parser.error = lambda message: fail(2, f"{message} (see --help)")
    whole, positive, share = number(int, 1, 10**9), number(float, 0), number(float, 0, 1)
    small = ", ".join(f"--{key} {value}" for key, value in RECIPES["small"].items())

    # fmt: off
    data = parser.add_argument_group("data")
    add = data.add_mutually_exclusive_group().add_argument
    add("--root", help="folder in SEN12MS layout (default: data/sen12ms)")
    add("--pairs", metavar="CSV", help="any archive: columns s1,s2, paths relative to the file")
    add = data.add_argument
    add("--s2-bands", default=",".join(SEN12MS_S2),
        help="band order in S2 files; - skips one (a first one: --s2-bands=-,B03)")
    add("--s1-bands", default=",".join(SEN12MS_S1), help="the same of S1 files, in unclipped dB")
    add("--nodata", type=number(float, -math.inf),
        help="of files without such a tag, such as 0 for zero borders")
    add("--num-pairs", type=whole, default=90000, help="seeded subset (paper: 90000, 150000)")
    add("--exclude", metavar="LIST", help="text file, a tile's name a line: places to leave out")
    add("--mode", choices=CHANNELS, help="channels of the views, as above (needed)")
    add("--views", choices=("ms-sar", "ms-ms"), default="ms-sar",
        help="ms-ms: no SAR, and no band twice")
    add("--bad-tiles", choices=("stop", "skip"), default="stop",
        help="skip: another good pair of the batch instead, up to 1 %% of the pairs")

    add = parser.add_argument_group("model").add_argument
    archs = ("resnet18", "resnet34", "resnet50")
    add("--arch", choices=archs, default="resnet50", help="encoder (paper: resnet50)")
    add("--size", type=number(int, 16, 4096), default=224, help="side of a view, pixels [open]")
    add("--hidden", type=whole, default=256, help="width of projector and predictor (paper: 256)")
    add("--projection", type=number(int, 2), default=256, help="projector's output (paper: 256)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--recipe", choices=RECIPES, default="paper",
        help=f"defaults below: paper's, or small for short runs and small archives: {small}")
    add("--batch-size", type=number(int, 2), default=32, help="of all processes (paper: 32, 64)")
    add("--epochs", type=whole, default=400, help="passes over the pairs (paper: 400)")
    add("--lr", type=positive, default=0.2, help="highest learning rate (paper: 0.2)")
    add("--lr-min", type=positive, default=0.002, help="lowest, per step (paper: 0.002)")
    add("--restart-epochs", type=whole, default=10, help="first cosine cycle (paper: 10)")
    add("--restart-mult", type=whole, default=2, help="next cycle / this cycle (paper: 2)")
    add("--momentum", type=share, default=0.9, help="of SGD [open]")
    add("--weight-decay", type=positive, default=1e-5,
        help="of all weights, biases and BatchNorm too (paper: 1e-5; BYOL leaves these out)")
    add("--tau", type=share, default=0.9, help="teacher's decay a step (paper: 0.9; BYOL: 0.99+)")
    add("--negatives", type=positive, default=0.0, metavar="TEMPERATURE",
        help="InfoNCE's loss against the batch's other places: not BYOL, and named so; 0: off")

    add = parser.add_argument_group("augmentation, drawn for each view").add_argument
    add("--crop-area", type=number(float, 0.001, 1), default=0.08,
        help="smallest share of the tile, all equally likely; 1: whole tile (BYOL: 0.08) [open]")
    add("--crop-ratio", type=number(float, 1), default=4 / 3,
        help="widest ratio of sides, R or 1/R (BYOL: 4/3) [open]")
    add("--orient", type=int, choices=(1, 4, 8), default=8,
        help="8: flips and quarter turns, 4: flips, 1: off [open]")
    add("--rotate", type=share, default=0.5, help="probability of a small rotation; 0: off [open]")
    add("--rotate-degrees", type=number(float, 0, 180), default=10.0, help="largest turn [open]")
    add("--blur", type=number(float, 0, 1, 2), default="1,0.1", metavar="A,B",
        help="probabilities; which view gets which is drawn too (BYOL: 1,0.1) [open]")
    add("--blur-sigma", type=number(float, 0.01, 100, 2), default="0.1,2", metavar="LOW,HIGH",
        help="pixels of a view of 224, scaled with --size; kernel size/10 (BYOL: 0.1,2) [open]")
    add("--erase", type=share, default=0.5,
        help="probability that a box of 2 to 33 %% becomes the band's mean; 0: off [open]")
    add("--grey", type=share, default=0.2,
        help="probability of grey, the mean of three channels (BYOL: 0.2) [open]")

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/ and the variant's name)")
    add("--resume", action="store_true", help="go on with the run in --out, by its config.json")
    add("--seed", type=number(int, 0, 2**63), default=0, help="of weights, pairs and every draw")
    add("--threads", type=number(int, 0, 1024), default=0, help="that read; 0: one a processor")
    add("--device", default="auto", help="cuda, cuda:N or cpu; auto: cuda where there is one")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="auto: bf16 where native (sm_80, AVX512-BF16, AMX), else fp16 on CUDA, fp32 on CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="(default: on CUDA, one process)")
    add("--log-every", type=whole, default=50, help="steps a log line; at least one an epoch")
    add("--checkpoint-every", type=number(int, 0), default=0, help="steps; 0: two minutes")
    add("--max-steps", type=whole, help="stop after so many steps in all; not remembered")
    # fmt: on
    return parser


def read_settings() -> tuple[Namespace, dict | None]:
    """The command line and, where it goes on with a run, that run's config, which binds it."""
    parser, typed = make_parser(), sys.argv[1:]
    unset = vars(parser.parse_args([]))  # of a setting that an older version did not know

    def parse(words: list[str]) -> Namespace:
        parser.set_defaults(**RECIPES[parser.parse_args(words).recipe])
        return parser.parse_args(words)

    args, config = parse(typed), None
    if args.mode and not args.out:
        name = run_name(args, args.num_pairs).lower()
        args.out = Path("runs", name.replace(" ", "-").replace("/", "-"))
    file = (args.out or Path("runs")) / "config.json"
    names = ("checkpoint.pt", "encoder.safetensors")
    made = [name for name in names if file.with_name(name).exists()]
    if file.exists():
        if not args.resume:
            fail(2, f"{args.out} holds another run: --resume goes on, or choose another --out")
        if made == ["encoder.safetensors"]:
            fail(2, f"{args.out}: no checkpoint.pt, from which --resume would go on, beside the "
                    "encoder: choose another --out")  # fmt: skip
        try:
            config = json.loads(file.read_text())
            saved, bands = unset | config["settings"], config["bands"]
            kept = {k.replace("_", "-"): saved[k] for k in REMEMBERED if saved[k] is not None}
            later = [f"--{key}={value}" for key, value in kept.items()]
            now = parse([*shlex.split(str(config["command"]))[1:], *later, *typed])
            mean, std = np.array([bands["mean"], bands["std"]], float)
            sound = mean.shape == (len(bands["names"]),) and np.isfinite([mean, std]).all()
            known = config["precision"] in DTYPES and config["versions"]["torch"]
            if not (known and sound and std.all() and {"sha256"} <= config["pairs"].keys()):
                raise ValueError("bands, pairs, precision or versions")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(1, f"{file} is damaged ({reason(error)}): choose another --out")
        now.out, now.max_steps, args = args.out, args.max_steps, now
        changed = [
            f"--{key.replace('_', '-')} was {saved[key]}, is {value}"
            for key, value in vars(args).items()
            if key not in MAY_CHANGE and value != saved[key]
        ]
        if changed:
            fail(2, f"{args.out} was started otherwise: {'; '.join(changed)}")
    elif made:
        fail(2, f"{args.out}: {made[0]} without its config.json: choose another --out")
    elif not args.mode:
        fail(2, f"--mode is needed: single, three or rgb; or --resume --out RUN (no run in {file})")
    if args.lr < args.lr_min:
        fail(2, f"--lr {args.lr} is below --lr-min {args.lr_min}: lower that too")
    return args, config


def run_name(args: Namespace, pairs: int) -> str:
    """The paper's name of what these settings train."""
    name = VARIANTS[args.mode, args.views][0]
    if name == "RS-BYOL-1":
        name += " w/150K" * (pairs == 150000) + " w/64BS" * (args.batch_size == 64)
    return name + " with negatives" * (args.negatives > 0)


# The method: networks, loss, teacher, one step, schedule ------------------------------------------
def make_encoder(arch: str, channels: int) -> nn.Module:
    """[N, channels, S, S] -> features [N, D]. Swap in your own: it needs only `width`, its D."""
    encoder = getattr(torchvision.models, arch)(weights=None)
    if channels != 3:
        encoder.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.width = encoder.fc.in_features  # 512 or 2048
    encoder.fc = nn.Identity()
    return encoder


def make_head(features: int, hidden: int, out: int) -> nn.Sequential:
    """Projector and predictor: a two-layer MLP."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class BYOL(nn.Module):
    """Student (encoder, projector), its predictor, and a teacher that follows the student."""

    def __init__(self, encoder: nn.Module, hidden: int, projection: int, negatives: float = 0):
        super().__init__()
        self.loss = partial(contrast, temperature=negatives) if negatives else byol_loss
        projector = make_head(encoder.width, hidden, projection)
        self.student = nn.Sequential(OrderedDict(encoder=encoder, projector=projector))
        self.predictor = make_head(projection, hidden, projection)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views [N, C, S, S] -> loss, and [loss, spread, cosine] of the projections to watch.

        Each view passes on its own, so that BatchNorm's statistics never mix the two sensors.
        """
        z_a, z_b = self.student(a), self.student(b)  # [N, P]
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)  # [N, P]
        with torch.no_grad():
            t_a, t_b = self.teacher(a), self.teacher(b)  # [N, P]
            n_a, n_b = F.normalize(widen(z_a), dim=1), F.normalize(widen(z_b), dim=1)
            spread = (n_a.std(0).mean() + n_b.std(0).mean()) / 2  # 1 / sqrt(P) healthy, 0 collapse
        loss = self.loss(p_a, t_b) + self.loss(p_b, t_a)
        return loss, torch.stack([loss.detach(), spread, (n_a * n_b).sum(1).mean()])

    @torch.no_grad()
    def update_teacher(self, tau: float) -> None:
        """Weights only: in training nothing reads the teacher's running BatchNorm statistics."""
        teacher, student = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1 - tau)  # tau * teacher + (1 - tau) * student


def widen(x: Tensor) -> Tensor:
    """bf16 or fp16, as autocast leaves it, becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos, i.e. the squared distance of the L2-normalised vectors; mean over N."""
    return (2 - 2 * F.cosine_similarity(widen(prediction), widen(target), dim=1)).mean()


def contrast(prediction: Tensor, target: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): which of the N targets is the prediction's own?"""
    p, t = F.normalize(widen(prediction), dim=1), F.normalize(widen(target), dim=1)
    with torch.autocast(p.device.type, enabled=False):  # else the cosines would be bf16 or fp16
        logits = p @ t.T / temperature
    return F.cross_entropy(logits, torch.arange(len(p), device=p.device))


def make_optimizer(byol: nn.Module, args: Namespace) -> torch.optim.SGD:
    weights = [weight for weight in byol.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(
        weights, args.lr, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    for weight in weights:  # else garbage, where loss scaling skips the first step
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    a: Tensor, b: Tensor, lr: float, tau: float, autocast: Callable[[], torch.autocast],
) -> Tensor:  # fmt: skip
    """Learn from one batch of views; returns what to watch. `model`: a BYOL, or DDP of one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast():
        loss, watch = model(a, b)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    getattr(model, "module", model).update_teacher(tau)
    return watch


def in_cycle(at: int, length: int, mult: int) -> tuple[int, int]:
    """Place in the restart cycle that `at` falls in, and that cycle's length."""
    while at >= length:
        at, length = at - length, length * mult
    return at, length


def learning_rate(step: int, steps_per_epoch: int, args: Namespace) -> float:
    """Cosine annealing with warm restarts (Loshchilov and Hutter 2017) at one step."""
    at, length = in_cycle(step, args.restart_epochs * steps_per_epoch, args.restart_mult)
    return args.lr_min + (args.lr - args.lr_min) * (1 + math.cos(math.pi * at / length)) / 2


# Augmentation on the device: one batched pass, each sample with its own draw ----------------------
@lru_cache(maxsize=2)
def shifts(size: int, device: torch.device) -> Tensor:
    """[2r + 1, size * size]: shifts by -r..r as matrices, mirrored at borders; r = size/20."""
    radius = size // 20
    offset = torch.arange(-radius, radius + 1)[:, None] + torch.arange(size)  # [k, size]
    source = (size - 1 - (size - 1 - offset.abs()).abs()).to(device)
    return F.one_hot(source, size).float().flatten(1)


def augment(x: Tensor, draws: Tensor, args: Namespace) -> Tensor:
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


# What sample i of epoch e is: a pure function of (seed, e, i) -------------------------------------
SUBSET, STATISTICS, WATCHED = 2**64 - 1, 2**64 - 2, 2**64 - 3  # streams that no epoch uses
DRAWS = {"ms": 10, "sar": 2, "order": 3, "view_a": 15, "view_b": 15, "swap": 1}  # of a sample
VIEW = {"crop": 4, "orient": 1, "turn": 2, "blur": 2, "erase": 1, "box": 4, "grey": 1}


def stream(seed: int, number: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, number); epoch e uses number e."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def split(u: np.ndarray, widths: dict[str, int]) -> dict[str, np.ndarray]:
    """Columns of u [..., columns] by name, in the order of `widths`."""
    return dict(zip(widths, np.split(u, np.cumsum([*widths.values()])[:-1], -1), strict=True))


class Plan(NamedTuple):
    """An epoch's n samples."""

    pairs: np.ndarray  # int64 [n]: index in the archive
    bands: np.ndarray  # int64 [n, 2, C]: index in archive.bands
    windows: np.ndarray  # float64 [n, 2, 4]: top, left, height, width, fractions of the tile
    orient: np.ndarray  # uint8 [n, 2]
    draws: np.ndarray  # float32 [n, 2, 7]: angle, sigma, top, left, bottom, right, grey


def boxes(u: np.ndarray, smallest: float, largest: float, widest: float) -> np.ndarray:
    """Uniform draws [..., 4] -> boxes [..., 4] = top, left, height, width in the unit square.

    Area uniform; the log of width / height uniform where the box fits, so that nothing is rejected
    and redrawn (torchvision redraws, which favours small areas); position uniform.
    """
    area = smallest + (largest - smallest) * u[..., 0]
    tallest = np.maximum(np.log(area), -math.log(widest))  # width / height, log
    ratio = np.exp(tallest * (1 - 2 * u[..., 1]))
    height, width = np.minimum(np.sqrt([area / ratio, area * ratio]), 1)
    return np.stack([u[..., 2] * (1 - height), u[..., 3] * (1 - width), height, width], axis=-1)


def choose_bands(u: dict[str, np.ndarray], bands: list[str], mode: str, views: str) -> np.ndarray:
    """Uniform draws of n samples -> index in `bands` for each view and channel, [n, 2, C]."""
    rgb = np.array([bands.index(b) for b in RGB] if mode == "rgb" else [], int)
    ms = np.array([i for i, b in enumerate(bands) if b not in SAR and i not in rgb])
    sar = np.array([i for i, b in enumerate(bands) if b in SAR])
    samples = len(u["ms"])

    def pick(pool: np.ndarray, u: np.ndarray, k: int) -> np.ndarray:  # k of pool, no repeats
        return pool[np.argsort(u[:, : len(pool)], axis=1, kind="stable")[:, :k]]

    optical = [np.tile(rgb, (samples, 1)), pick(ms, u["ms"], VARIANTS[mode, views][1])]
    a, b = np.hsplit(np.hstack(optical), [CHANNELS[mode]])
    if views == "ms-sar":
        b = np.hstack([b, pick(sar, u["sar"], 1)])
        if mode == "three":
            b = np.hstack([b, np.tile(sar, (samples, 1))])
    if mode != "single":  # the other sensor's channels in random order
        b = np.take_along_axis(b, np.argsort(u["order"], axis=1, kind="stable"), axis=1)
    return np.stack([a, b], axis=1)


def plan_epoch(epoch: int, pairs: int, bands: list[str], args: Namespace) -> Plan:
    """Draw a whole epoch: neither batch size, threads nor processes enter."""
    random = stream(args.seed, epoch)
    order = np.argsort(random.random(pairs), kind="stable")
    u = split(random.random((pairs, sum(DRAWS.values()))), DRAWS)
    chosen = choose_bands(u, bands, args.mode, args.views)
    v = split(np.stack([u["view_a"], u["view_b"]], axis=1), VIEW)  # [n, 2, width] each
    windows = boxes(v["crop"], args.crop_area, 1.0, args.crop_ratio)
    orient = np.floor(v["orient"][..., 0] * args.orient).astype(np.uint8)
    turned, by = np.split(v["turn"], 2, axis=-1)
    angle = np.deg2rad(args.rotate_degrees) * (2 * by - 1) * (turned < args.rotate)
    blurred, by = np.split(v["blur"], 2, axis=-1)
    low, high = np.array(args.blur_sigma) * args.size / 224
    often = np.where(u["swap"] < 0.5, args.blur[::-1], args.blur)[..., None]  # [n, 2, 1]
    sigma = (low + (high - low) * by) * (blurred < often)
    # torchvision's RandomErasing: area 2 to 33 %, ratio 0.3 to 3.3
    corner, sides = np.split(np.rint(boxes(v["box"], 0.02, 0.33, 10 / 3) * args.size), 2, axis=-1)
    box = np.concatenate([corner, corner + sides], axis=-1) * (v["erase"] < args.erase)
    draws = np.concatenate([angle, sigma, box, v["grey"] < args.grey], axis=-1)
    return Plan(order, chosen, windows, orient, draws.astype(np.float32))


# The archive: which pairs there are, and what is read of them -------------------------------------
class Archive(NamedTuple):
    names: list[str]  # one a pair: its S2 path in the archive, sorted
    files: np.ndarray  # str [2, pairs]: S2 paths, S1 paths
    watched: np.ndarray  # str [2, places]: whole tiles to watch learning by
    bands: list[str]  # the paper's names of the bands that this mode uses: MS first, then SAR
    place: np.ndarray  # int64 [bands, 3]: 0 S2 or 1 S1 file; 0-based band in it; bands it must have
    nodata: float | None  # of files without a tag of their own
    about: dict  # for config.json: pairs used and left out, digest of their list, synthetic or not
    stats: np.ndarray | None = None  # float32 [2, bands]: mean, std


def list_pairs(args: Namespace) -> list[tuple[str, str]]:
    """(S2, S1) paths of each place, relative to --root or to the CSV. Swap in your own archive."""
    if args.pairs:
        return list_csv(Path(args.pairs), args.bad_tiles == "skip")
    root = Path(args.root or "data/sen12ms")
    s2, s1 = (glob.glob(f"ROIs*/{s}_*/*_{s}_*.tif", root_dir=root) for s in ("s2", "s1"))
    twins = {path.replace("/s2_", "/s1_").replace("_s2_", "_s1_"): path for path in s2}
    if alone := sorted(twins.keys() ^ set(s1)):
        path = root / twins.get(alone[0], alone[0])
        fail(1, f"{path} has no twin of the other sensor ({len(alone)} such): fetch or remove it")
    return [(path, twin) for twin, path in twins.items()]


def list_csv(path: Path, missing: bool) -> list[tuple[str, str]]:
    """(S2, S1) paths of a CSV's columns s1 and s2; where `missing`, files need not be there."""
    if not path.is_file():
        fail(2, f"no file {path}: --pairs takes a CSV with the columns s1 and s2")
    rows = bandcrop.read_table(path, ("s1", "s2"))
    for row, column in itertools.product(rows, ("s1", "s2")):
        if not (missing or (path.parent / row[column]).is_file()):
            fail(1, f"{path}: line {row['line']}: column {column}: no file {row[column]!r}")
    return [(os.path.normpath(row["s2"]), os.path.normpath(row["s1"])) for row in rows]


def find_bands(args: Namespace) -> dict[str, tuple[int, int, int]]:
    """Bands that this mode uses, MS first, then SAR, each with its row of Archive.place."""
    place: dict[str, tuple[int, int, int]] = {}
    for sensor, order in enumerate((args.s2_bands, args.s1_bands)):
        names = order.split(",")
        for at, text in enumerate(names):
            if text.strip().upper() in ("-", "B01", "B09", "B10"):  # not wanted; the 60 m bands
                continue
            band = band_name(text)
            if band in place or (band in SAR) != sensor:
                fail(2, f"--s{2 - sensor}-bands {order}: {band} stands twice or in the wrong file")
            place[band] = sensor, at, len(names)
    _, need_ms, need_sar = VARIANTS[args.mode, args.views]
    rgb = RGB if args.mode == "rgb" else ()
    free = [band for band in place if band not in SAR + rgb]
    if not {*rgb} <= place.keys() or len(free) < need_ms or len({*SAR} & place.keys()) < need_sar:
        wants = [*rgb, f"{need_ms} other MS bands", f"{need_sar} of SAR1, SAR2"]
        fail(2, f"--mode {args.mode} --views {args.views} needs {', '.join(wants)}; this archive "
             f"has {', '.join(place)}")  # fmt: skip
    return {b: place[b] for b in BANDS if b in place and (need_sar or b not in SAR)}


def open_archive(args: Namespace) -> Archive:
    """List the pairs, check that the mode has its bands, draw the seeded subset."""
    root = Path(args.pairs).parent if args.pairs else Path(args.root or "data/sen12ms")
    say(f"listing the pairs of {args.pairs or root}")
    listed = sorted({*list_pairs(args)})  # each pair once
    if not listed:
        fail(2, NO_ARCHIVE.format(root=args.pairs or root))
    found, place = len(listed), find_bands(args)
    if args.exclude:
        if not os.path.isfile(args.exclude):
            fail(2, f"no file {args.exclude}: --exclude takes a text file, a tile's name a line")
        text = Path(args.exclude).read_text("utf-8-sig", errors="surrogateescape")
        lines = {line.strip() for line in text.splitlines()}  # names of tiles, or paths in root
        listed = [pair for pair in listed if not lines & {*pair, *map(os.path.basename, pair)}]
        if len(listed) == found:
            fail(2, f"--exclude {args.exclude} names no tile of {root}: one file name a line")
        say(f"{found - len(listed)} pairs left out by the {len(lines)} lines of {args.exclude}")
    order = np.argsort(stream(args.seed, SUBSET).random(len(listed)), kind="stable")
    chosen, spare = np.sort(order[: args.num_pairs]), np.sort(order[args.num_pairs :])
    if len(chosen) < args.batch_size:
        fail(2, f"{len(chosen)} pairs fill no batch of {args.batch_size}: add pairs or lower it")
    pool = spare if len(spare) > 1 else chosen  # not trained on, if there are
    watched = pool[stream(args.seed, WATCHED).permutation(len(pool))[:256]]
    names = [listed[i][0] for i in chosen]
    sha = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    sides = zip(*listed, strict=True)
    files = np.array([[str(root / path) for path in side] for side in sides], object)
    content = hashlib.sha256(sha.encode())
    for path in files[:, :: math.ceil(len(listed) / 1000)].flat:
        with suppress(OSError), open(path, "rb") as file:
            content.update(file.read(16384) + b"%d" % file.seek(0, os.SEEK_END))
    about = {"used": len(names), "sha256": sha, "files": content.hexdigest(),
             "excluded": found - len(listed),
             "synthetic": (root / "SYNTHETIC.txt").exists()}  # fmt: skip
    return Archive(names, files[:, chosen], files[:, watched], list(place),
                   np.array([*place.values()]), args.nodata, about)  # fmt: skip


def band_statistics(archive: Archive, args: Namespace) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each band over up to 256 pairs; NaN and nodata left out."""
    chosen = stream(args.seed, STATISTICS).permutation(len(archive.names))[:256]
    say(f"measuring band statistics: {len(archive.bands)} bands of {len(chosen)} pairs")
    file, band, width = (np.tile(x, (len(chosen), 1)) for x in archive.place.T)
    largest = 0
    for s2, s1 in archive.files[:, chosen].T:
        with suppress(bandcrop.TileError):  # what is bad is found where it is read
            a = bandcrop.info(s2)
            b = bandcrop.info(s1) if args.views == "ms-sar" else a  # ms-ms reads no S1 file
            largest = max(largest, a.height, a.width)
            if abs(a.width * b.height / (a.height * b.width) - 1) > 0.02:
                fail(1, f"{s2} is {a.height} x {a.width}, {s1} {b.height} x {b.width}: they do not "
                        "show the same ground")  # fmt: skip
    if largest > 2048:
        warn(f"S2 files have up to {largest} pixels a side: crops of a whole scene are shrunk: "
             "cut tiles first: gdal_retile.py -ps 256 256 -targetDir tiles FILE")  # fmt: skip
    paths = tqdm(archive.files[file, chosen[:, None]].tolist(), disable=None, leave=False, ncols=79)
    bad = "report" if args.bad_tiles == "skip" else "raise"
    try:
        mean, std = bandcrop.statistics(paths, band, width, bad, nodata=args.nodata)
    except bandcrop.TileError as error:
        fail(1, f"{error} (--s2-bands and --s1-bands name the bands of every file; --bad-tiles "
                "skip goes on without up to 1 % of the pairs)")  # fmt: skip
    for name, m, s in zip(archive.bands, mean, std, strict=True):
        if not 0 < s < 1e30:
            fail(1, f"band {name}/{BANDS[name]}'s deviation over {len(chosen)} tiles is {s:.2g}: "
                    "empty, constant, or a fill value without a tag (--nodata)?")  # fmt: skip
        if name in SAR and 0 < m < 10:
            warn(f"{name}'s mean is {m:.3g}: linear power? Decibels are expected: "
                 "gdal_calc.py -A FILE --allBands=A --calc='10*log10(A)' --outfile=DB.tif"
                 )  # fmt: skip
    return mean.tolist(), std.tolist()


def make_request(archive: Archive, files: np.ndarray, pairs: np.ndarray, bands: np.ndarray) -> dict:
    """What bandcrop is to read: whole tiles, view a of each of `pairs` int [N], then each view b.

    bands: int [N, 2, C]; "extra" has both as they are given.
    """
    channels = np.concatenate(bands.swapaxes(0, 1))  # [2N, C], as all that follows
    file, band, width = archive.place[channels].transpose(2, 0, 1)
    mean, std = archive.stats[:, channels]
    return {
        "paths": files[file, np.tile(pairs, 2)[:, None]].tolist(), "bands": band,
        "mean": mean, "std": std, "bands_in_file": width, "nodata": archive.nodata,
        "bad": "report", "extra": {"pairs": pairs, "bands": bands},
    }  # fmt: skip


def requests(archive: Archive, args: Namespace, steps: range) -> Iterator[dict]:
    """This process's share of the global batches `steps`."""
    pairs, local = len(archive.names), args.batch_size // WORLD
    plan_of = lru_cache(1)(lambda epoch: plan_epoch(epoch, pairs, archive.bands, args))
    for step in steps:
        epoch, at = divmod(step, pairs // args.batch_size)
        plan, first = plan_of(epoch), at * args.batch_size + RANK * local
        rows = slice(first, first + local)
        request = make_request(archive, archive.files, plan.pairs[rows], plan.bands[rows])
        views = (np.concatenate(part[rows].swapaxes(0, 1)) for part in plan[2:])  # a, then b
        request["windows"], request["orient"], request["extra"]["draws"] = views
        yield request


def replace_bad(batch: bandcrop.Batch, bad: dict, archive: Archive, args: Namespace) -> str:
    """Replace each pair that cannot be read by the batch's next good one, and note it in `bad`.

    Returns why the run must stop, or "".
    """
    pairs = batch.request["extra"]["pairs"]
    count = len(pairs)
    errors = {i % count: message for i, message in reversed(batch.report.errors)}
    for i, message in sorted(errors.items()):
        if args.bad_tiles == "stop":
            return f"{message} (--bad-tiles skip goes on without up to 1 % of the pairs)"
        bad.setdefault(archive.names[pairs[i]], message)
        good = next((j % count for j in range(i + 1, i + count) if j % count not in errors), None)
        if len(bad) > 0.01 * len(archive.names) or good is None:
            return f"{len(bad)} pairs are bad, over 1 % or a whole batch: {message}"
        batch.x[[i, count + i]] = batch.x[[good, count + good]]
    return ""


# The run's files ----------------------------------------------------------------------------------
def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let the first process write a whole file or, if a disk is full, leave the one before."""
    beside = path.with_name(f".{path.name}.part")
    try:
        if RANK == 0:
            write(beside)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's RuntimeError does not name a full disk
        beside.unlink(missing_ok=True)
        why = reason(error) if isinstance(error, OSError) else f"a full disk? {reason(error)}"
        fail(1, f"cannot save {path}: {why}: once that is mended, --resume goes on")


def say(text: str, where: TextIO | None = None) -> None:
    """Print, by the first process; a reader that has gone or a full disk does not end a run."""
    try:
        if not RANK:
            print(text, file=where, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (where or sys.stdout).fileno())


def warn(message: str) -> None:
    say(f"pretrain.py: warning: {message}", sys.stderr)


def reason(error: Exception) -> str:
    """An error's first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def new_config(args: Namespace, archive: Archive, device: torch.device, precision: str) -> dict:
    """What config.json says of a run, beside its name and settings, which prepare adds."""
    mean, std = band_statistics(archive, args)
    return {
        "schema": 1, "pairs": archive.about,
        "bands": {"names": archive.bands, "mean": mean, "std": std},
        "precision": precision,
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch_threads": torch.get_num_threads(),
            "processes": WORLD,
            "fp32_matmul": torch.get_float32_matmul_precision(),  # "highest": no TF32
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        },
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np, safetensors)}
        | {"python": sys.version.split()[0], "pretrain.py": CODE},
        "command": shlex.join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def save_encoder(path: Path, encoder: nn.Module, config: dict, epoch: float) -> None:
    """The student's encoder under torchvision's names; metadata says what it is and saw."""
    settings, bands, pairs = config["settings"], config["bands"], config["pairs"]
    about = {
        "name": config["name"], "epoch": f"{epoch:g}", "command": config["command"],
        "bands": json.dumps(bands["names"]), "mean": json.dumps(bands["mean"]),
        "std": json.dumps(bands["std"]), "synthetic": str(pairs["synthetic"]).lower(),
        "pairs": str(pairs["used"]), "archive": pairs.get("files", pairs["sha256"])[:12],
        "code": config["versions"]["pretrain.py"],
    } | {key: str(settings[key]) for key in ("arch", "mode", "views", "seed", "size")}  # fmt: skip
    if settings["exclude"]:
        about["exclude"] = f"{pairs['excluded']} pairs of {Path(settings['exclude']).name}"
    about = {k: v.encode(errors="backslashreplace").decode() for k, v in about.items()}
    tensors = {k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}
    write_atomic(path, lambda part: part.write_bytes(safetensors.torch.save(tensors, about)))


def save(
    out: Path, config: dict, parts: dict, step: int, per_epoch: int, bad: dict[str, str]
) -> None:
    """All that a resumed run needs, and then what it would make again."""
    if RANK:
        return
    byol = parts["byol"]
    if not all(bool(value.isfinite().all()) for value in byol.state_dict().values()):
        raise FloatingPointError(f"by step {step}")
    state = {name: part.state_dict() for name, part in parts.items()} | {"step": step}
    write_atomic(out / "checkpoint.pt", partial(torch.save, state))
    save_encoder(out / "encoder.safetensors", byol.student.encoder, config, step / per_epoch)
    if bad:
        rows = "".join(f"{pair}\t{message}\n" for pair, message in bad.items())
        write_atomic(out / "bad_tiles.txt", lambda part: part.write_bytes(os.fsencode(rows)))


def open_log(out: Path, step: int) -> TextIO:
    """Open log.jsonl; cut a torn last line and the steps after the checkpoint: they come again."""
    path = out / "log.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = text.split("\n")[:-1]  # without a torn last one
    try:
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError):
        fail(1, f"{path} is damaged: remove the line that is no JSON, then --resume")
    write_atomic(path, lambda part: part.write_text("".join(kept)))
    return open(os.devnull if RANK else path, "a")


def draw_views(path: Path, request: dict, views: Tensor, archive: Archive) -> None:
    """Up to eight pairs as they lie on the ground, above the same as the networks see them.

    Each: view a, then view b; mean grey, +-2.5 standard deviations.
    """
    pairs, bands = (request["extra"][key][:8] for key in ("pairs", "bands"))
    whole = make_request(archive, archive.files, pairs, bands)
    (ground,) = bandcrop.stream([whole], (16, *views.shape[1:]), threads=1)
    tiles = torch.cat([ground.x, *(view[:8].float().cpu() for view in views.chunk(2))])
    sheet = torchvision.utils.make_grid(tiles, len(pairs), 4, True, (-2.5, 2.5))
    write_atomic(path, partial(torchvision.utils.save_image, sheet, format="png"))


# What is learnt, without labels -------------------------------------------------------------------
def mean_rank(prediction: Tensor, projection: Tensor) -> float:
    """[N, P] each: mean rank of the right row among all, by cosine; 0 best, 0.5 chance."""
    if len(prediction) < 2:
        return 0.5  # nothing to tell apart
    cosine = F.normalize(prediction, dim=1) @ F.normalize(projection, dim=1).T  # [N, N]
    right = cosine.diagonal()[:, None]
    rank = (cosine > right).sum(1) + ((cosine == right).sum(1) - 1) / 2
    return float(rank.mean()) / (len(cosine) - 1)


@torch.no_grad()
def watch_learning(
    byol: BYOL, archive: Archive, args: Namespace, device: torch.device, autocast: Callable
) -> float:
    """`match`: mean_rank over both directions, of whole tiles without augmentation."""
    places = archive.watched.shape[1]
    u = split(stream(args.seed, WATCHED).random((places, sum(DRAWS.values()))), DRAWS)
    bands = choose_bands(u, archive.bands, args.mode, args.views)  # [places, 2, C]
    wanted = [
        make_request(archive, archive.watched, at, bands[at])
        for at in np.array_split(np.arange(places), math.ceil(places / args.batch_size))
    ]
    shape = (2 * args.batch_size, CHANNELS[args.mode], args.size, args.size)
    seen = []  # of each batch: predictions and projections of both views, [2, 2, N, P]
    byol.eval()
    for batch in bandcrop.stream(wanted, shape, device, args.threads, ahead=1):
        views = batch.x.contiguous(memory_format=torch.channels_last)
        with autocast():
            prediction = byol.predictor(byol.student.forward(views))  # forward: not compiled
            projection = byol.teacher.forward(views)
        both = widen(torch.stack([prediction, projection])).unflatten(1, (2, -1))
        bad = {i % both.shape[2] for i, _ in batch.report.errors}
        seen.append(both[:, :, [i for i in range(both.shape[2]) if i not in bad]])
    byol.train()
    p, t = torch.cat(seen, dim=2).cpu()
    return (mean_rank(p[0], t[1]) + mean_rank(p[1], t[0])) / 2


# Loop ---------------------------------------------------------------------------------------------
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


def choose_device(name: str, precision: str) -> tuple[torch.device, str]:
    """The device to run on and its precision, both tried."""
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if name == "auto" else name)
        if cuda := device.type == "cuda":  # its own card, before anything else touches CUDA
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        elif device.type != "cpu":
            raise RuntimeError("only cuda and cpu are known here")
        torch.zeros(1, device=device).add_(1).item()  # fails where this build has no kernels for it
    except (RuntimeError, AssertionError) as error:
        fail(2, f"--device {name} cannot be used: {reason(error)}")
    if precision == "bf16" and cuda and not native_bf16(device):
        fail(2, f"{torch.cuda.get_device_name(device)} has no bf16: use --precision fp16")
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp16" if cuda else "fp32"
    return device, precision


def everyone(value: object) -> list:
    """`value` of each process, by rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def first_step(byol: BYOL, take: Callable[[], Tensor]) -> Tensor:
    """A step that compiles; without torch.compile where that fails: no compiler, an old card."""
    say("compiling, minutes")
    try:
        byol.student.compile(dynamic=False)
        byol.teacher.compile(dynamic=False)
        return take()
    except Exception as error:
        if out_of_memory(error):
            raise
        warn(f"torch.compile fails here, going on without it: {reason(error)}")
    byol.student._compiled_call_impl = byol.teacher._compiled_call_impl = None
    return take()  # here, where `error` no longer holds the failed step's activations


def listen() -> list[int]:
    """The list that SIGINT, SIGTERM and SIGHUP will be added to; a second one leaves at once."""
    asked: list[int] = []
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    heard = [n for n in signals if signal.getsignal(n) != signal.SIG_IGN]  # nohup, a background

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for each in heard:
            signal.signal(each, signal.SIG_DFL)

    for number in heard:
        signal.signal(number, ask)
    return asked


def describe(args: Namespace, device: torch.device, precision: str, steps: int) -> None:
    """Say once what the run is on, what it will do, and how to read its lines."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no CUDA GPU in use"
    say(f"on {device} ({card}), {precision}, {'' if args.compile else 'not '}compiled")
    say(f"recipe {args.recipe}: " + ", ".join(f"{k} {vars(args)[k]}" for k in RECIPES["small"]))
    if args.recipe == "paper" and steps < 20000 and not args.resume:
        say("few steps: try --recipe small (after 890 steps F1 0.62 instead of 0.45: PROOF.md)")
    if device.type == "cpu" and WORLD > 1:
        warn("on the CPU each process normalises its own samples: torchrun is for GPUs")
    say(f"spread: {args.projection**-0.5:.3f} is healthy, 0 collapse")


def progress(record: dict, steps_left: int, batch_size: int) -> str:
    """A line of 80 columns or fewer; the time that is left in hours and minutes."""
    speed, wait = record["timing"]["pairs_per_second"], 100 * record["timing"]["data_wait"]
    hours, minutes = divmod(math.ceil(steps_left * batch_size / speed / 60), 60)
    left = f"{hours}h{minutes:02}" if hours < 100 else f"{hours // 24}d"
    return (
        f"epoch {record['epoch']:.1f} loss {record['loss']:.2f} cosine {record['cosine']:.2f} "
        f"spread {record['std']:.3f} {speed:.{1 if speed < 100 else 0}f} pairs/s "
        f"wait {wait:.0f}% left {left}"
    )


def judge(record: dict, cycle_ends: bool, args: Namespace) -> None:
    """Warn at an epoch's end of what is wrong."""
    if record["std"] < 0.1 * args.projection**-0.5:
        warn(f"COLLAPSE: spread is {record['std']:.2g}: try a higher --tau or a lower --lr")
    as_measured = args.views == "ms-sar" and not args.negatives and record["step"] >= 1000
    if cycle_ends and record["cosine"] > 0.6 and as_measured:  # as the runs that are cited
        warn(f"cosine is {record['cosine']:.2f} at a cycle's end: of twelve runs those that learnt "
             "ended at 0.2 to 0.3, the others at 0.66 to 0.70 (PROOF.md)")  # fmt: skip


def prepare() -> tuple[Namespace, dict, Archive, torch.device]:
    """Settings, the run's config (written, where it is new), its pairs, its device."""
    args, config = read_settings()
    if args.batch_size % WORLD or args.batch_size < 2 * WORLD:
        fail(2, f"--batch-size {args.batch_size}: give a multiple of {WORLD}, from {2 * WORLD} on")
    if WORLD > 1 and args.negatives:
        fail(2, "--negatives compares the places of one process: with torchrun add --negatives 0")
    device, precision = choose_device(args.device, (config or vars(args))["precision"])
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    archive = open_archive(args)
    pairs = len(archive.names)
    fewer = f" (fewer than --num-pairs {args.num_pairs})" if pairs < args.num_pairs else ""
    kind = "synthetic pairs" if archive.about["synthetic"] else "pairs"
    say(f"{run_name(args, pairs)}: {pairs} {kind}{fewer} -> {args.out}")
    if RANK == 0:
        config = config or new_config(args, archive, device, precision)
    config = everyone(config)[0]
    bands, began, now = config["bands"], config["pairs"], archive.about
    if (began | {"files": ""}, bands["names"]) != (now | {"files": ""}, archive.bands):
        fail(2, f"{args.out} was started with other pairs or bands: choose another --out")
    if began.get("files", now["files"]) != now["files"]:
        warn("files of the archive are others than at the start: fine if repacked; if they show "
             "other places, or in other units, choose another --out")  # fmt: skip
    code = str(config["versions"].get("pretrain.py"))
    if CODE not in code:
        warn(f"{args.out} was started by another version of this script")
        config["versions"]["pretrain.py"] = f"{code}+{CODE}"
    config |= {"name": run_name(args, pairs), "settings": vars(args)}
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1, default=str)  # str: of the path --out
    write_atomic(args.out / "config.json", lambda part: part.write_text(text))
    stats = np.array([bands["mean"], bands["std"]], np.float32)
    if args.compile is None:
        args.compile = device.type == "cuda" and WORLD == 1
    processors = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.threads = args.threads or max(1, processors)  # of this process, that read
    return args, config, archive._replace(stats=stats), device


def form_of(value: object) -> object:
    """What two states of one run have in common, where their values differ."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)


def build(args: Namespace, device: torch.device, precision: str) -> tuple[dict, int]:
    """What learns (networks, optimizer, loss scaling) and at which step: new, or resumed."""
    torch.manual_seed(args.seed)  # the only use of torch's generator: the first weights
    encoder = make_encoder(args.arch, CHANNELS[args.mode])
    if not isinstance(encoder, torchvision.models.ResNet):  # your own: --arch does not name it
        args.arch = type(encoder).__name__
    byol = BYOL(encoder, args.hidden, args.projection, args.negatives)
    if WORLD > 1 and device.type == "cuda":
        byol = nn.SyncBatchNorm.convert_sync_batchnorm(byol)
    byol = byol.to(device, memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = {"byol": byol, "optimizer": make_optimizer(byol, args), "scaler": scaler}
    step, file = 0, args.out / "checkpoint.pt"
    try:
        if file.exists():
            if damaged := zipfile.ZipFile(file).testzip():  # torch does not verify checksums
                raise ValueError(f"the checksum of {damaged}")
            new = {name: part.state_dict() for name, part in parts.items()} | {"step": 0}
            state = torch.load(file, map_location="cpu", weights_only=True)
            if tree_map(form_of, new) != tree_map(form_of, state) or state["step"] < 0:
                raise ValueError("it holds something else than such a run")
            for name, part in parts.items():
                part.load_state_dict(state.pop(name))
            step = state["step"]
    except Exception as error:  # a damaged file fails in many ways
        if out_of_memory(error):
            raise
        fail(1, f"{file} is damaged or of another version ({reason(error)}): use another --out")
    if len({*(steps := everyone(step))}) > 1:
        fail(2, f"the processes start at steps {steps}: give all nodes the same {args.out}")
    return parts, step


def main() -> int:
    args, config, archive, device = prepare()
    out, per_epoch = args.out, len(archive.names) // args.batch_size
    parts, began_at = build(args, device, config["precision"])
    byol, optimizer, scaler = parts.values()
    bad: dict[str, str] = {}  # pairs that could not be read, and why: anew in each session
    save_now = partial(save, out, config, parts, per_epoch=per_epoch, bad=bad)
    if began_at > args.epochs * per_epoch:
        fail(2, f"{out} is at epoch {began_at / per_epoch:g}, past --epochs {args.epochs}")
    step, end = began_at, max(began_at, min(args.epochs * per_epoch, args.max_steps or sys.maxsize))
    millions = sum(weight.numel() for weight in byol.student.parameters()) / 1e6
    describe(args, device, config["precision"], end)
    say(f"{args.arch}, {millions:.1f} million parameters; {end} steps, {per_epoch} an epoch")
    if args.resume:
        say(f"resumed at step {step} of {end}" if step else "no checkpoint yet: from the start")
    model = byol
    if WORLD > 1:
        distribute = nn.parallel.DistributedDataParallel
        model = distribute(byol, gradient_as_bucket_view=True, static_graph=True)
        model.broadcast_buffers = False  # torch 2.14 warns of it as an argument
    dtype = DTYPES[config["precision"]]
    autocast = partial(torch.autocast, device.type, dtype, dtype != torch.float32)
    log = open_log(out, step)
    places = archive.watched.shape[1]
    watch_every = math.ceil(50 * places / len(archive.names))  # under 1 % of time
    say(f"match of {places} places, every {watch_every} epochs and at last: 0 is best, 0.5 chance")
    asked, waited, began = listen(), 0.0, time.monotonic()
    since = shown = saved = began
    sums, count = torch.zeros(4, device=device), 0  # loss, spread, cosine, replaced; steps

    shape = (2 * args.batch_size // WORLD, CHANNELS[args.mode], args.size, args.size)
    wanted = requests(archive, args, range(step, end))
    for batch in bandcrop.stream(wanted, shape, device, args.threads):
        if problem := replace_bad(batch, bad, archive, args):
            if step > began_at:
                save_now(step)
            fail(1, problem)
        draws = torch.from_numpy(batch.request["extra"]["draws"]).to(device, non_blocking=True)
        views = augment(batch.x, draws, args).contiguous(memory_format=torch.channels_last)
        if step == 0:
            draw_views(out / "views.png", batch.request, views, archive)
        a, b = views.chunk(2)
        lr = learning_rate(step, per_epoch, args)
        take = partial(train_step, model, optimizer, scaler, a, b, lr, args.tau, autocast)
        compiles = args.compile and step == began_at
        sums[:3] += first_step(byol, take) if compiles else take()
        sums[3] += WORLD * int(batch.report.replaced.sum())  # of the mean over processes
        step, count, waited = step + 1, count + 1, waited + batch.waited

        # What is due after this step: a log line, an encoder, a checkpoint
        epoch, within = divmod(step, per_epoch)
        now = time.monotonic()
        slow = now - shown > 30 and WORLD == 1 and not compiles
        line, stop = within % args.log_every == 0 or slow, asked[0] if asked else 0
        due = step % args.checkpoint_every == 0 if args.checkpoint_every else now - saved > 120
        if WORLD > 1:  # all save and stop at the same step: one that all know, or every tenth
            if step % 10 and not (line or step == end or (due and args.checkpoint_every)):
                continue
            for also_due, also_stop, theirs in everyone((due, stop, bad)):
                due, stop = due or also_due, max(stop, also_stop)
                bad |= theirs
        cycle_ends = not within and not in_cycle(epoch, args.restart_epochs, args.restart_mult)[0]
        last = bool(stop) or step == end
        if line or last:
            if WORLD > 1:
                dist.all_reduce(sums)
                sums /= WORLD
            *means, replaced = sums.tolist()  # waits for the device
            loss, spread, cosine = (value / count for value in means)
            if not math.isfinite(loss):
                raise FloatingPointError(f"by step {step}")
            now = time.monotonic()
            timing = {"seconds": now - began, "data_wait": waited / (now - since),
                      "pairs_per_second": count * args.batch_size / (now - since)}  # fmt: skip
            record = {
                "step": step, "epoch": step / per_epoch, "lr": lr, "loss": loss, "std": spread,
                "cosine": cosine, "replaced": round(replaced),
                "timing": {name: round(value, 4) for name, value in timing.items()},
            }  # fmt: skip
            if not within or last or now - shown > 30:
                say(progress(record, end - step, args.batch_size))
                shown = now
            if not within and (epoch % watch_every == 0 or epoch == args.epochs):
                record["match"] = watch_learning(byol, archive, args, device, autocast)
                say(f"  match {record['match']:.3f}")
            if not within:
                judge(record, cycle_ends, args)
            print(json.dumps(record), file=log, flush=True)
            sums.zero_()
            count, waited, since = 0, 0.0, time.monotonic()
        elif compiles:  # minutes that say nothing of the speed
            waited, since = 0.0, time.monotonic()
            shown = since
        if cycle_ends:
            file = out / f"encoder-epoch{epoch:04d}.safetensors"
            save_encoder(file, byol.student.encoder, config, epoch)
        if due or last:
            save_now(step)
            saved = time.monotonic()
        if stop:
            say(f"stopped at step {step} of {end}, saved: --resume --out {shlex.quote(str(out))}")
            return 128 + stop
    bands = RGB if args.mode == "rgb" else archive.bands[: CHANNELS[args.mode]]
    encoder, checkpoint = out / "encoder.safetensors", out / "checkpoint.pt"
    times = [path.stat().st_mtime_ns if path.exists() else 0 for path in (encoder, checkpoint)]
    if times[0] < times[1]:  # the encoder was deleted, or a kill came between the two
        save_encoder(encoder, byol.student.encoder, config, step / per_epoch)
    order = shlex.quote(args.s2_bands)
    data = f"csv --root LABELS.csv --bands-in-file={order}" if args.pairs else "eurosat"
    done = "done" if step >= args.epochs * per_epoch else f"stopped at step {step} by --max-steps,"
    say(f"{done} in {timedelta(seconds=round(time.monotonic() - began))}: {encoder}\n"
        f"next: python probe.py --dataset {data} --band {','.join(bands)} \\\n"
        f"    --bn reestimate --weights {shlex.quote(str(encoder))}")  # fmt: skip
    return 0


def run() -> int:
    """main, with one line for what may fail in any place: a disk, memory, an early Ctrl-C."""
    try:
        status = main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except KeyboardInterrupt:
        return 130
    except FloatingPointError as error:
        fail(1, f"loss or weights are not finite {error}: lower --lr or --precision fp32")
    except bandcrop.TileError as error:
        fail(1, reason(error))
    except OSError as error:
        fail(1, f"{reason(error)} (if a run had begun, --resume goes on from its last checkpoint)")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            fail(1, f"another process has ended, see its error: {reason(error)}")
        if not out_of_memory(error):
            raise
        fail(1, f"out of memory: use a smaller --batch-size and another --out: {reason(error)}")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed: >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    sys.exit(run())
