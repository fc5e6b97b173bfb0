"""Measure training beside others' ways: the BYOL step, the whole program, the probe of one band.

    python tests/bench_train.py                       # all three; what `make bench` runs
    python tests/bench_train.py --part step --arch resnet50 --size 224 --rounds 30

step     pretrain.py's own step on views that are already on the device, augmentation included,
         beside the BYOL steps of lightly and torchgeo (where they are installed) on one-channel
         views, at equal terms: encoder, batch, size, precision, channels-last, heads' widths and
         fused SGD. Their trainer and logging are left out. torchgeo augments in its step, as we
         do; lightly does not: its ratio is to our step less its augmentation.
program  pairs/s of pretrain.py, run as a subprocess on GeoTIFF files in SEN12MS's form, over the
         same step in this process before and after it.
probe    probe.py of one band (features once, heads on them) beside a frozen encoder that runs in
         every epoch for the same heads, on images in memory, so that its reading is free.

Each round runs every method, where they are steps in shuffled order. Ratios are taken round by
round: median [95 % bootstrap interval] over the rounds. Tiles are made here and removed afterwards.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torchvision
from bench_report import hardware, median, show, table
from synthetic import write_eurosat, write_sen12ms
from torch import Tensor, nn

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import pretrain  # noqa: E402
import probe  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = pretrain.native_bf16(DEVICE)  # pretrain.py then runs in bf16
TERMS = "bf16" if FAST else "fp32"
BLOCK = 0.5  # seconds of our steps that make one round's figure
EPOCH = 4.0  # seconds of an epoch of the whole program
TILES = 64  # pairs of files, 2.2 MB each; an epoch goes over them again and again
EPOCHS = 100  # of the probe's head
IMAGES = 100  # a class, of ten, for the probe


# --------------------------------------------------------------------------------------------------
# Rounds and their statistics


def clock(run: Callable[[], object], times: int = 1) -> float:
    """Seconds of one of `times` calls, all the device's work included."""
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else torch.cpu.synchronize
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - begin) / times


# --------------------------------------------------------------------------------------------------
# The steps. Each maker returns a function that takes one step on the views it was given, [N, 1, S,
# S] each, with our precision, memory format, heads' widths and optimiser.


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=FAST)


def mark() -> float | torch.cuda.Event:
    """Now, in the order of the device's work, without waiting for it."""
    if DEVICE.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def make_ours(
    settings: argparse.Namespace, views: Tensor, marks: list | None = None
) -> Callable[[], None]:
    """The step of pretrain.py's loop; `marks` collects (begin, end) of the augmentation."""
    torch.manual_seed(0)
    encoder = pretrain.make_encoder(settings.arch, 1)
    byol = pretrain.BYOL(encoder, settings.hidden, settings.projection)
    byol = byol.to(DEVICE, memory_format=torch.channels_last)
    optimizer = pretrain.make_optimizer(byol, settings)
    off = torch.amp.GradScaler(DEVICE.type, enabled=False)
    if DEVICE.type == "cuda":  # as the program does
        byol.student.compile(dynamic=False)
        byol.teacher.compile(dynamic=False)
    plan = pretrain.plan_epoch(0, settings.batch_size, list(pretrain.BANDS), settings)
    draws = torch.from_numpy(plan.draws.swapaxes(0, 1).copy()).flatten(0, 1).to(DEVICE)  # [2N, 7]
    both, sums = views.flatten(0, 1), torch.zeros(3, device=DEVICE)

    def step() -> None:
        begin = mark()
        x = pretrain.augment(both, draws, settings)
        if marks is not None:
            marks.append((begin, mark()))
        a, b = x.contiguous(memory_format=torch.channels_last).chunk(2)
        watch = pretrain.train_step(byol, optimizer, off, a, b, settings.lr, settings.tau, autocast)
        sums.add_(watch)

    return step


def make_lightly(settings: argparse.Namespace, views: Tensor) -> Callable[[], None]:
    """The BYOL example of lightly's documentation (1.6): its model, loss and loop."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    resnet = getattr(torchvision.models, settings.arch)()
    resnet.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    projection = BYOLProjectionHead(resnet.fc.in_features, settings.hidden, settings.projection)
    prediction = BYOLPredictionHead(settings.projection, settings.hidden, settings.projection)
    model = nn.ModuleList([backbone, projection, prediction])
    model.to(DEVICE, memory_format=torch.channels_last)
    momentum = copy.deepcopy(model[:2])
    deactivate_requires_grad(momentum)
    criterion = NegativeCosineSimilarity()
    optimizer = pretrain.make_optimizer(model, settings)
    x0, x1 = views

    def step() -> None:
        update_momentum(backbone, momentum[0], m=0.996)
        update_momentum(projection, momentum[1], m=0.996)
        with autocast():
            p0 = prediction(projection(backbone(x0).flatten(start_dim=1)))
            z0 = momentum[1](momentum[0](x0).flatten(start_dim=1)).detach()
            p1 = prediction(projection(backbone(x1).flatten(start_dim=1)))
            z1 = momentum[1](momentum[0](x1).flatten(start_dim=1)).detach()
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_torchgeo(settings: argparse.Namespace, views: Tensor) -> Callable[[], None]:
    """torchgeo's BYOLTask: its training step, which augments."""
    import timm
    from torchgeo.trainers import BYOLTask
    from torchgeo.trainers.byol import BYOL

    task = BYOLTask(model=settings.arch, in_channels=1)
    # Its own model is for 224 x 224 alone: the same class and arguments, but for the size.
    widths = {"hidden_size": settings.hidden, "projection_size": settings.projection}
    backbone = timm.create_model(settings.arch, in_chans=1)
    task.model = BYOL(backbone, image_size=(settings.size,) * 2, in_channels=1, **widths)
    task.to(DEVICE, memory_format=torch.channels_last)
    task.log = lambda *_, **__: None
    optimizer = pretrain.make_optimizer(task, settings)
    batch = {"image": torch.cat(list(views), dim=1)}  # [N, 2, S, S]: it takes them apart again

    def step() -> None:
        with autocast():
            loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


MAKERS = {"torchgeo": make_torchgeo, "lightly": make_lightly}


def make_methods(settings: argparse.Namespace, views: Tensor, marks: list) -> dict:
    """Every step that can be taken here; the others are named with the reason."""
    methods = {"pretrain.py": make_ours(settings, views, marks)}
    clock(methods["pretrain.py"], 2)
    for peer, make in MAKERS.items():
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # their many warnings
                step = make(settings, views)
                clock(step, 2)
            methods[peer] = step
        except Exception as error:  # not installed, or another version
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"Left out, {peer}: {reason}", flush=True)
    return methods


def bench_step(settings: argparse.Namespace, rounds: int) -> None:
    shape = (2, settings.batch_size, 1, settings.size, settings.size)
    marks: list = []
    methods = make_methods(settings, torch.randn(shape, device=DEVICE), marks)
    number = max(1, round(BLOCK / clock(methods["pretrain.py"])))
    times: dict[str, list[float]] = {name: [] for name in methods}
    augmentation, rng = [], np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(methods)).tolist():
            marks.clear()
            times[name].append(clock(methods[name], number))
            if marks:
                spans = [(b - a) if DEVICE.type == "cpu" else a.elapsed_time(b) / 1e3
                         for a, b in marks]  # fmt: skip
                augmentation.append(float(np.mean(spans)))
    ours, augmented = np.array(times["pretrain.py"]), np.array(augmentation)
    rows = []
    for name, values in times.items():
        like = ours - augmented if name == "lightly" else ours
        middle, ratio = float(np.median(values)), show(median(values / like))
        row = [name, f"{1e3 * middle:.1f}", f"{settings.batch_size / middle:.1f}", ratio]
        rows.append(row)
    table(
        "1. The BYOL step",
        "step|ms|pairs/s|pretrain.py is x times as fast",
        rows,
        f"{rounds} rounds of {number} step(s) each; {TERMS}, channels-last, heads "
        f"{settings.hidden} wide, fused SGD; pretrain.py"
        f"{' compiled, and' * (DEVICE.type == 'cuda')} with its augmentation.",
    )
    share, cost = median(100 * augmented / ours), 1e3 * float(np.median(augmented))
    print(f"\nAugmentation: {cost:.1f} ms of our step, {show(share, '.1f')} %", flush=True)


# --------------------------------------------------------------------------------------------------
# The whole program


def run_program(root: Path, settings: argparse.Namespace, steps: int, flags: list) -> list[dict]:
    """Run pretrain.py over `steps` steps an epoch; the lines of its log."""
    s2 = sorted(str(path.relative_to(root)) for path in root.glob("ROIs*/s2_*/*.tif"))
    # The tiles in turn, each turn by way of another link: pretrain.py takes no pair twice.
    taken = []
    for i in range(steps * settings.batch_size):
        turn, tile = divmod(i, len(s2))
        if not (root / f"turn{turn}").exists():
            (root / f"turn{turn}").symlink_to(root)
        taken.append(f"turn{turn}/{s2[tile]}")
    rows = [f"{name.replace('/s2_', '/s1_').replace('_s2_', '_s1_')},{name}" for name in taken]
    pairs = root / "pairs.csv"
    pairs.write_text("\n".join(["s1,s2", *rows]))
    with tempfile.TemporaryDirectory(dir=root) as out:
        command = [sys.executable, REPO / "pretrain.py", "--mode", "single", "--pairs", pairs]
        for name in ("arch", "size", "batch_size", "lr"):
            command += [f"--{name.replace('_', '-')}", getattr(settings, name)]
        command += ["--device", DEVICE.type, "--out", Path(out) / "run", *flags]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench_train.py: {' '.join(map(str, command))}\n{done.stderr.strip()}")
        lines = (Path(out) / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def bench_program(settings: argparse.Namespace, rounds: int, folder: Path) -> None:
    root = folder / "sen12ms"
    write_sen12ms(root, TILES, 0)
    shape = (2, settings.batch_size, 1, settings.size, settings.size)
    step = make_ours(settings, torch.randn(shape, device=DEVICE))
    clock(step, 2)  # warms up
    number = max(4, round(EPOCH / clock(step, 3)))
    flags = ["--epochs", 4, "--log-every", number]
    alone, whole, waits = [clock(step, number)], [], []
    for _ in range(rounds):
        lines = run_program(root, settings, number, flags)
        ends = [line for line in lines if line["step"] % number == 0]
        first, last = ends[0], ends[-1]  # the first epoch warms caches up and compiles
        seconds = last["timing"]["seconds"] - first["timing"]["seconds"]
        whole.append(settings.batch_size * (last["step"] - first["step"]) / seconds)
        waits += [100 * line["timing"]["data_wait"] for line in ends[1:]]
        alone.append(clock(step, number))
    rate = settings.batch_size / np.array(alone)  # before the first run, ..., after the last
    ratio = median(np.array(whole) / (0.5 * (rate[:-1] + rate[1:])))
    table(
        "2. The whole program, from GeoTIFF files",
        "pretrain.py, pairs/s|step alone, pairs/s|ratio|data wait",
        [[f"{np.median(whole):.1f}", f"{np.median(rate):.1f}", show(ratio, ".3f"),
          f"{np.median(waits):.2f} %"]],
        f"{rounds} rounds: epochs 2 to 4 of {number} steps of pretrain.py, by its log.jsonl; the "
        f"step alone {number} times before and after. {TILES} pairs of files, in the page cache.",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The probe


def make_epoch(arch: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """An epoch of a head on a frozen encoder that runs for each batch of images [N, 1, S, S]."""
    encoder = probe.build_encoder(arch, 1).requires_grad_(False)
    encoder = encoder.to(DEVICE, memory_format=torch.channels_last)
    head = probe.build_head(encoder.width, 10).to(DEVICE)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)

    def epoch() -> None:
        for rows in torch.randperm(len(images), device=DEVICE).split(probe.ENCODE_BATCH):
            x = images[rows].contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                features = encoder(x)
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), labels[rows]).backward()
            optimizer.step()

    return epoch


def bench_probe(settings: argparse.Namespace, rounds: int, folder: Path) -> None:
    root, size = folder / "eurosat", 64
    write_eurosat(root, IMAGES, 0)
    train = round(0.8 * 10 * IMAGES)  # probe.py's random split
    images, labels = torch.randn(train, 1, size, size), torch.randint(10, (train,))
    epoch = make_epoch(settings.arch, images.to(DEVICE), labels.to(DEVICE))
    # Heads that probe.py trains, in epochs over all training images: each choice on four fifths.
    trained = EPOCHS * (0.8 * len(probe.CHOICES["mlp"]) + 1)
    ours, others = [], []
    for number in range(-1, rounds):  # the first warms up
        given = ["--dataset", "eurosat", "--root", root, "--band", "RE5", "--arch", settings.arch]
        given += ["--size", size, "--epochs", EPOCHS, "--out", folder / f"results{number}"]
        args = probe.arguments([str(part) for part in given])
        with contextlib.redirect_stdout(io.StringIO()):
            ours.append(clock(lambda args=args: probe.main(args)))
        others.append(trained * clock(epoch))
    a, b = np.array(ours[1:]), np.array(others[1:])
    table(
        f"3. The probe of one band, {settings.arch}, {EPOCHS} epochs",
        "probe.py, s|encoder in every epoch, s (estimated)|ratio",
        [[f"{np.median(a):.2f}", f"{np.median(b):.0f}", show(median(b / a), ".1f")]],
        f"{rounds} rounds; {10 * IMAGES} images of {size} x {size}, {train} to train on; ours "
        f"encodes in {TERMS}, theirs in fp32. probe.py: reading, encoding, "
        f"{len(probe.CHOICES['mlp'])} settings tried, then all. Encoder in every epoch: ESTIMATED "
        f"as {trained:.0f} measured epochs of the same heads, its reading and its test free.",
    )


# --------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} missing"


def main() -> int:
    cuda = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", choices=["step", "program", "probe", "all"], default="all")
    add("--arch", choices=["resnet18", "resnet50"], default="resnet50" if cuda else "resnet18",
        help="encoder (resnet18 on a CPU, resnet50 on CUDA)")  # fmt: skip
    add("--size", type=int, default=224 if cuda else 64,
        help="side of the views (64 on a CPU, 224 on CUDA); the probe's is 64")  # fmt: skip
    add("--batch-size", type=int, default=32)
    add("--rounds", type=int, help="step 15, program 5, probe 5")
    add("--folder", type=Path, help="where tiles and checkpoints go (the temporary folder)")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: 2 or more")
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: no such folder")

    given = ["--mode", "single", "--arch", args.arch, "--size", args.size, "--lr", 0.03]
    given += ["--batch-size", args.batch_size]
    settings = pretrain.make_parser().parse_args([str(part) for part in given])
    load = os.getloadavg()[0]
    packages = ("torch", "torchvision", *MAKERS)
    card = f"{torch.cuda.get_device_name()}; " if cuda else ""
    print(f"Measured {time.strftime('%Y-%m-%d %H:%M')} on {card}{hardware()}, bf16 "
          f"{'native' if FAST else 'not native'}; load {load:.1f} before.")  # fmt: skip
    print(f"{args.arch}, {args.size} x {args.size}, batch {args.batch_size}, one channel; "
          f"{torch.get_num_threads()} thread(s) of torch; Python {platform.python_version()}, "
          f"{', '.join(version(package) for package in packages)}.")  # fmt: skip
    if load > 0.5 * len(os.sched_getaffinity(0)):
        print("The machine is busy: times are too long, and ratios may be off.")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes then too
    with tempfile.TemporaryDirectory(prefix="bench_train.", dir=args.folder) as name:
        if args.part in ("step", "all"):
            bench_step(settings, args.rounds or 15)
        if args.part in ("program", "all"):
            bench_program(settings, args.rounds or 5, Path(name))
        if args.part in ("probe", "all"):
            bench_probe(settings, args.rounds or 5, Path(name))
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
