"""Measure training beside others' ways: the BYOL step, the whole program, the probe of one band.

    python tests/bench_train.py                       # all three; what `make bench` runs
    python tests/bench_train.py --part step --arch resnet50 --size 224 --rounds 30

step     pretrain.py's own step on views that are already on the device, augmentation included,
         beside the BYOL steps of lightly, solo-learn and torchgeo (those that are installed) at the
         same encoder, batch and size, on one-channel views. As shipped: fp32, default memory
         format, their own heads and optimiser. Equal terms: our precision, channels-last, heads'
         widths and fused SGD. Their trainer and logging are left out. torchgeo augments in its
         step, as we do; the others do not: their ratio is to our step less its augmentation.
         solo-learn 1.0.2 runs with pytorch-lightning 1.9 and lightning-bolts (pip's --no-deps).
program  pairs/s of pretrain.py, run as a subprocess on GeoTIFF files in SEN12MS's form, over the
         same step in this process before and after it; and what saving a checkpoint costs.
probe    probe.py of one band (features once, heads on them) beside a frozen encoder that runs in
         every epoch, on images in memory, so that its reading is free.

Each round runs every method, where they are steps in shuffled order. Ratios are taken round by
round: median [95 % bootstrap interval] over the rounds. Tiles are made here and removed afterwards.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torchvision
from bench_report import hardware, median, show, table, verdict
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
# S] each. `equal`: with our precision, memory format, heads' widths and optimiser.


def autocast(on: bool) -> torch.autocast:
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=on and FAST)


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
    fast, off = partial(autocast, True), torch.amp.GradScaler(DEVICE.type, enabled=False)
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
        watch = pretrain.train_step(byol, optimizer, off, a, b, settings.lr, settings.tau, fast)
        sums.add_(watch)

    return step


def place(model: nn.Module, equal: bool) -> nn.Module:
    return model.to(DEVICE, memory_format=torch.channels_last if equal else None)


def one_channel(encoder: nn.Module) -> nn.Module:
    encoder.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return encoder


def lightning_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, batch: object, equal: bool
) -> None:
    """A step of a LightningModule as its trainer takes it."""
    with autocast(equal):
        loss = module.training_step(batch, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make_lightly(settings: argparse.Namespace, views: Tensor, equal: bool) -> Callable[[], None]:
    """The BYOL example of lightly's documentation (1.6): its model, loss, optimiser and loop."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    resnet = one_channel(getattr(torchvision.models, settings.arch)())
    hidden = settings.hidden if equal else 1024  # the example's
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    projection = BYOLProjectionHead(resnet.fc.in_features, hidden, 256)
    prediction = BYOLPredictionHead(256, hidden, 256)
    model = place(nn.ModuleList([backbone, projection, prediction]), equal)
    momentum = copy.deepcopy(model[:2])
    deactivate_requires_grad(momentum)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    if equal:
        optimizer = pretrain.make_optimizer(model, settings)
    x0, x1 = views

    def step() -> None:
        update_momentum(backbone, momentum[0], m=0.996)
        update_momentum(projection, momentum[1], m=0.996)
        with autocast(equal):
            p0 = prediction(projection(backbone(x0).flatten(start_dim=1)))
            z0 = momentum[1](momentum[0](x0).flatten(start_dim=1)).detach()
            p1 = prediction(projection(backbone(x1).flatten(start_dim=1)))
            z1 = momentum[1](momentum[0](x1).flatten(start_dim=1)).detach()
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_solo(settings: argparse.Namespace, views: Tensor, equal: bool) -> Callable[[], None]:
    """solo-learn's BYOL with the defaults of its command line, SGD; it trains a classifier too."""
    from solo.methods.byol import BYOL

    parser = argparse.ArgumentParser()
    BYOL.add_model_specific_args(parser)
    given = ["--optimizer", "sgd", "--scheduler", "none", "--encoder", settings.arch]
    keywords = vars(parser.parse_args(given)) | {"backbone_args": {}, "num_classes": 10}
    keywords |= {"max_epochs": 1, "accumulate_grad_batches": 1, "extra_optimizer_args": {}}
    keywords |= {"num_large_crops": 2, "num_small_crops": 0, "lr": 0.03, "classifier_lr": 0.03}
    if equal:
        keywords |= {"proj_hidden_dim": settings.hidden, "pred_hidden_dim": settings.hidden}
    model = BYOL(**keywords)
    one_channel(model.encoder)
    one_channel(model.momentum_encoder).conv1.requires_grad_(False)
    place(model, equal)
    model.log_dict = lambda *_, **__: None
    optimizer = pretrain.make_optimizer(model, settings) if equal else model.configure_optimizers()
    labels = torch.zeros(views.shape[1], dtype=torch.int64, device=DEVICE)
    batch = (None, list(views), labels)

    def step() -> None:
        lightning_step(model, optimizer, batch, equal)
        for pair in model.momentum_pairs:  # as its on_train_batch_end, which wants a trainer
            model.momentum_updater.update(*pair)

    return step


def make_torchgeo(settings: argparse.Namespace, views: Tensor, equal: bool) -> Callable[[], None]:
    """torchgeo's BYOLTask: its training step, which augments, and its AdamW."""
    import timm
    from torchgeo.trainers import BYOLTask
    from torchgeo.trainers.byol import BYOL

    task = BYOLTask(model=settings.arch, in_channels=1)
    # Its own model is for 224 x 224 alone: the same class and arguments, but for the size.
    backbone, widths = timm.create_model(settings.arch, in_chans=1), {}
    if equal:
        widths = {"hidden_size": settings.hidden, "projection_size": settings.projection}
    task.model = BYOL(backbone, image_size=(settings.size,) * 2, in_channels=1, **widths)
    place(task, equal)
    task.log = lambda *_, **__: None
    optimizer = task.configure_optimizers()["optimizer"]
    if equal:
        optimizer = pretrain.make_optimizer(task, settings)
    batch = {"image": torch.cat(list(views), dim=1)}  # [N, 2, S, S]: it takes them apart again

    return partial(lightning_step, task, optimizer, batch, equal)


MAKERS = {"torchgeo": make_torchgeo, "lightly": make_lightly, "solo-learn": make_solo}


def make_methods(settings: argparse.Namespace, views: Tensor, marks: list) -> dict:
    """Every step that can be taken here, each taken twice; the others are named with the reason."""
    methods = {"pretrain.py": make_ours(settings, views, marks)}
    clock(methods["pretrain.py"], 2)
    missing = [peer for peer in MAKERS if version(peer).endswith("missing")]
    if missing:
        print(f"Not installed, left out: {', '.join(missing)}.", flush=True)
    for peer, terms in itertools.product(MAKERS, ("as shipped", "equal terms")):
        if peer in missing:
            continue
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # their many warnings
                step = MAKERS[peer](settings, views, terms == "equal terms")
                clock(step, 2)
            methods[f"{peer}, {terms}"] = step
        except Exception as error:  # other versions of a peer fail in ways of their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"Left out, {peer} {terms}: {reason}", flush=True)
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
        peer, _, terms = name.partition(", ")
        like = ours - augmented if peer in ("lightly", "solo-learn") else ours
        ratio, middle = median(values / like), float(np.median(values))
        aim = "" if not terms else verdict(ratio, 1) if terms == "equal terms" else "-"
        if name == "torchgeo, as shipped" and DEVICE.type == "cpu" and FAST:
            aim = verdict(ratio, 2.5)
        rate = f"{settings.batch_size / middle:.1f}"
        rows.append([peer, terms, f"{1e3 * middle:.1f}", rate, show(ratio) if terms else "1", aim])
    table(
        "1. The BYOL step",
        "step|terms|ms|pairs/s|pretrain.py is x times as fast|aim",
        rows,
        f"{rounds} rounds of {number} step(s) each. pretrain.py: {TERMS}, channels-last"
        f"{', torch.compile' if DEVICE.type == 'cuda' else ''}, augmentation within. Equal terms: "
        f"{TERMS}, channels-last, heads {settings.hidden} wide, fused SGD.",
    )
    share, cost = median(100 * augmented / ours), 1e3 * float(np.median(augmented))
    print(f"\nAugmentation within our step: {cost:.1f} ms of it, {show(share, '.1f')} %, aim "
          f"{verdict(share, 10, at_most=True)}", flush=True)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The whole program


def run_program(root: Path, settings: argparse.Namespace, steps: int, flags: list) -> list[dict]:
    """Run pretrain.py over `steps` steps an epoch; the lines of its log."""
    s2 = sorted(str(path.relative_to(root)) for path in root.glob("ROIs*/s2_*/*.tif"))
    taken = [s2[i % len(s2)] for i in range(steps * settings.batch_size)]  # the tiles in turn
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
        "pretrain.py, pairs/s|step alone, pairs/s|ratio|aim|data wait",
        [[f"{np.median(whole):.1f}", f"{np.median(rate):.1f}", show(ratio, ".3f"),
          verdict(ratio, 0.98), f"{np.median(waits):.2f} %"]],
        f"{rounds} rounds: epochs 2 to 4 of {number} steps of pretrain.py, by its log.jsonl; the "
        f"step alone {number} times before and after. {TILES} pairs of files, in the page cache.",
    )  # fmt: skip

    # A line's time is taken before its save: every second interval holds a save, the others none.
    large = argparse.Namespace(**vars(settings) | {"arch": "resnet50", "size": 32, "batch_size": 4})
    flags = ["--epochs", 1, "--log-every", 1, "--checkpoint-every", 2, "--no-compile"]
    seconds = [x["timing"]["seconds"] for x in run_program(root, large, 20, flags)]
    spans = np.diff(seconds)[3:]  # from the one after step 4, which saves
    save = median(spans[0::2] - spans[1::2])
    share = 100 * save[0] / (120 + save[0])
    print(f"\nSaving a ResNet-50 run: {show(save)} s; once in 120 s: {share:.2f} % of the time, "
          f"aim < 1 {'met' if share < 1 else 'MISSED'}", flush=True)  # fmt: skip


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
    width = probe.build_encoder(settings.arch, 1).width
    features = torch.randn(train, width)
    rate = probe.CHOICES["mlp"][0]
    # Heads that probe.py trains, in epochs over all training images: each choice on four fifths.
    trained = EPOCHS * (0.8 * len(probe.CHOICES["mlp"]) + 1)
    whole, heads, once, others = [], [], [], []
    for number in range(-1, rounds):  # the first warms up
        out = folder / f"results{number}"
        given = ["--dataset", "eurosat", "--root", root, "--band", "RE5", "--arch", settings.arch]
        given += ["--size", size, "--epochs", EPOCHS, "--out", out]
        args = probe.arguments([str(part) for part in given])
        with contextlib.redirect_stdout(io.StringIO()):
            whole.append(clock(lambda args=args: probe.main(args)))
        result = json.loads(next(out.glob("*.json")).read_text())
        heads.append(result["seconds"]["train"])
        head = clock(lambda: probe.fit_mlps(features, labels, 10, [rate], EPOCHS))
        once.append(whole[-1] - heads[-1] + head)
        others.append(clock(epoch))
    whole, heads, once, others = (np.array(v[1:]) for v in (whole, heads, once, others))
    tried = f"probe.py: {len(probe.CHOICES['mlp'])} settings tried, then all"
    rows = [
        [tried, "one setting", whole, EPOCHS * others],
        ["features, then one setting's head", "one setting", once, EPOCHS * others],
        [tried, "the same settings", whole, trained * others],
    ]
    cells = []
    for ours, theirs, a, b in rows:
        ratio = median(b / a)
        seconds = [f"{np.median(a):.2f}", f"{np.median(b):.0f}"]
        cells.append([ours, theirs, *seconds, show(ratio, ".1f"), verdict(ratio, 50)])
    table(
        f"3. The probe of one band, {settings.arch}, {EPOCHS} epochs",
        "ours|encoder in every epoch|ours, s|theirs, s (estimated)|ratio|aim",
        cells,
        f"{rounds} rounds; {10 * IMAGES} images of {size} x {size}, {train} to train on; ours "
        f"encodes in {TERMS}, theirs in fp32. probe.py's time: reading, encoding, "
        f"{np.median(heads):.2f} s of heads (second row: one head of {EPOCHS} epochs, timed "
        f"apart, in their place). Encoder in every epoch: ESTIMATED "
        f"as epochs x one measured epoch ({np.median(others):.2f} s), its reading and its test "
        f"free; with the same settings {trained:.0f} epochs of that length.",
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
