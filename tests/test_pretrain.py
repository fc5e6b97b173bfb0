"""pretrain.py: the method against plain re-derivations, and a run that nothing can spoil."""

import contextlib
import copy
import glob
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import write_sen12ms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import pretrain

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SMALL = (
    "--arch resnet18 --size 32 --batch-size 4 --threads 1 --precision fp32 --log-every 2".split()
)
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
MS = [band for band in pretrain.BANDS if band not in pretrain.SAR]


def flags(*more: str):
    return pretrain.make_parser().parse_args(["--mode", "single", *more])


def run(*arguments: object, wait: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "pretrain.py", *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=wait)


def one_line(done: subprocess.CompletedProcess, status: int) -> str:
    """The error of a refused run: one line, no traceback, the right status."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def same_run(one: Path, two: Path) -> None:
    assert log_of(one) == log_of(two)
    first, second = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (one, two))
    assert first["step"] == second["step"]
    for part in ("student", "teacher"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    for at, slot in first["optimizer"]["state"].items():
        assert torch.equal(
            slot["momentum_buffer"], second["optimizer"]["state"][at]["momentum_buffer"]
        )
    encoders = [load_file(out / "encoder.safetensors") for out in (one, two)]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("archive") / "sen12ms"
    write_sen12ms(root, pairs=12, seed=0, size=64)
    return root


@pytest.fixture(scope="module")
def finished(archive, tmp_path_factory) -> Path:
    """12 steps: 4 epochs of 3, restarts after epochs 1 and 3."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("--mode", "single", "--root", archive, *SMALL, *REST, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


REST = ["--epochs", "4", "--restart-epochs", "1"]


# Method ------------------------------------------------------------------------------------------
def plain_head(x, w):
    """Linear, BatchNorm with batch statistics, ReLU, Linear, written out."""
    x = x @ w["0.weight"].T + w["0.bias"]
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * w["1.weight"] + w["1.bias"]
    return x.clamp(min=0) @ w["3.weight"].T + w["3.bias"]


def test_one_step_is_byol_rederived_in_float64():
    torch.manual_seed(3)
    student = pretrain.Network("resnet18", 1, 16, 8).double()
    teacher = pretrain.make_teacher(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    a, b = torch.randn(2, 6, 1, 32, 32, dtype=torch.float64)

    weights = {k: v.detach().clone().requires_grad_() for k, v in student.named_parameters()}
    frozen = {k: v.detach().clone() for k, v in teacher.named_parameters()}
    bare = torchvision.models.resnet18()
    bare.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    bare.fc = torch.nn.Identity()
    bare.double().train()

    def part(w, name):
        return {k.removeprefix(name + "."): v for k, v in w.items() if k.startswith(name + ".")}

    def project(w, x):
        h = torch.func.functional_call(bare, part(w, "encoder"), (x,))
        return plain_head(h, part(w, "projector"))

    def unit(x):
        return x / (x * x).sum(1, keepdim=True).sqrt()

    expected = 0.0
    for seen, other in ((a, b), (b, a)):
        p = unit(plain_head(project(weights, seen), part(weights, "predictor")))
        expected = expected + ((p - unit(project(frozen, other))) ** 2).sum(1).mean()
    expected.backward()

    optimizer = pretrain.make_optimizer(student, flags("--lr", "0.1"))
    watch = pretrain.train_step(student, teacher, optimizer, a, b, 0.9, contextlib.nullcontext)
    assert watch[0].item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-7, atol=1e-11)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    spread = torch.cat([unit(project(weights, x)).std(0) for x in (a, b)]).mean()
    assert watch[1].item() == pytest.approx(spread.item())

    for name, parameter in student.named_parameters():
        moved = weights[name] - 0.1 * (weights[name].grad + 1e-5 * weights[name])
        torch.testing.assert_close(parameter.detach(), moved.detach(), rtol=1e-9, atol=1e-11)
        if not name.startswith("predictor"):
            mean = 0.9 * frozen[name] + 0.1 * moved.detach()
            torch.testing.assert_close(teacher.get_parameter(name), mean, rtol=1e-9, atol=1e-11)


def test_teacher_shares_no_storage_has_no_predictor_and_no_gradient():
    student = pretrain.Network("resnet18", 3, 16, 8)
    teacher = pretrain.make_teacher(student)
    own = {tensor.untyped_storage().data_ptr() for tensor in student.state_dict().values()}
    assert all(t.untyped_storage().data_ptr() not in own for t in teacher.state_dict().values())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(name.startswith("predictor") for name in teacher.state_dict())


@pytest.mark.parametrize("mult", [1, 2])
def test_learning_rate_is_torchs_cosine_with_warm_restarts(mult):
    args = flags("--lr", "0.2", "--lr-min", "0.002", "--restart-mult", str(mult))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, mult, 0.002)
    for step in range(75 * 8):
        optimizer.step()
        theirs.step(step / 8)
        assert pretrain.learning_rate(step, 8, args) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12
        ), step


def test_an_encoder_is_kept_where_the_paper_s_cycles_end():
    ends = [epoch for epoch in range(1, 401) if pretrain.in_cycle(epoch, 10, 2)[0] == 0]
    assert ends == [10, 30, 70, 150, 310]


# Sampling ----------------------------------------------------------------------------------------
def test_samples_do_not_depend_on_batch_size_threads_or_the_epochs_before():
    bands = list(pretrain.BANDS)
    one = pretrain.plan_epoch(5, 40, bands, flags("--batch-size", "4", "--threads", "1"))
    pretrain.plan_epoch(6, 40, bands, flags())
    two = pretrain.plan_epoch(5, 40, bands, flags("--batch-size", "8", "--threads", "2"))
    other = pretrain.plan_epoch(6, 40, bands, flags())
    for mine, same, different in zip(one, two, other, strict=True):
        assert np.array_equal(mine, same) and not np.array_equal(mine, different)
    assert sorted(one.pairs) == list(range(40))


def test_processes_share_a_global_batch_without_overlap(archive, tmp_path):
    args = flags("--root", str(archive), "--batch-size", "4", "--size", "32", "--threads", "1")
    listed = pretrain.open_archive(args)
    stats = np.stack([np.zeros(12), np.ones(12)]).astype(np.float32)
    cpu, steps = torch.device("cpu"), range(4)
    whole = [
        (batch.views.clone(), batch.draws.clone())
        for batch in pretrain.batches(listed, stats, args, steps, cpu, 0, 1, {})
    ]
    halves = [
        [(batch.views.clone(), batch.draws.clone()) for batch in
         pretrain.batches(listed, stats, args, steps, cpu, rank, 2, {})]
        for rank in (0, 1)
    ]  # fmt: skip
    for step in steps:
        for part in (0, 1):
            both = torch.cat([halves[rank][step][part] for rank in (0, 1)], dim=1)
            assert torch.equal(both, whole[step][part])


def test_crops_stay_inside_and_reach_the_first_and_the_last_pixel():
    plan = pretrain.plan_epoch(0, 50000, list(pretrain.BANDS), flags())
    top, left, height, width = plan.windows.reshape(-1, 4).T
    for start, length in ((top, height), (left, width)):
        assert start.min() >= 0 and (start + length).max() <= 1
        small = length < 0.5  # a large crop reaches both ends by itself
        assert start[small].min() < 1 / 256 and (start + length)[small].max() > 1 - 1 / 256
    area, ratio = height * width, width / height
    assert area.min() >= 0.0799 and area.min() < 0.09 and area.max() > 0.99
    assert np.histogram(area, 4, (0.08, 1))[0] == pytest.approx(25000, rel=0.03)  # uniform
    assert 0.7499 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.3334
    assert set(plan.orient.flat) == set(range(8))
    assert (plan.windows[:, 0] != plan.windows[:, 1]).any(1).all()  # two views, two windows


def test_every_augmentation_can_be_switched_off():
    off = "--crop-area 1 --orient 1 --rotate 0 --blur 0,0 --erase 0 --grey 0".split()
    plan = pretrain.plan_epoch(0, 100, list(pretrain.BANDS), flags(*off))
    assert (plan.windows == [0, 0, 1, 1]).all() and not plan.orient.any() and not plan.draws.any()
    x = torch.randn(2, 3, 32, 32)
    assert pretrain.augment(x, torch.zeros(2, 7), flags(*off)) is x


def test_blur_probabilities_are_byols_and_neither_sensor_owns_one():
    sigma = pretrain.plan_epoch(0, 20000, list(pretrain.BANDS), flags()).draws[..., 1]
    assert (sigma > 0).mean(0) == pytest.approx(0.55, abs=0.02)  # of 1.0 and 0.1, by turns
    assert ((sigma > 0).sum(1) > 0).all()
    assert sigma[sigma > 0].min() > 0.0999 and sigma.max() < 2.0001


@pytest.mark.parametrize(
    "mode, views", [(m, v) for m in pretrain.CHANNELS for v in ("ms-sar", "ms-ms")]
)
def test_each_variant_draws_the_paper_s_bands(mode, views):
    bands = list(pretrain.BANDS) if views == "ms-sar" else MS
    args = flags("--views", views)
    args.mode = mode
    a, b = pretrain.plan_epoch(0, 4000, bands, args).bands.transpose(1, 0, 2)
    name = np.array(bands)
    first, second = [set(row) for row in name[a]], [set(row) for row in name[b]]
    sar, rgb = set(pretrain.SAR), set(pretrain.RGB)
    if mode == "rgb":
        assert (name[a] == ["Red", "Green", "Blue"]).all()
        assert all(len(s) == 3 and not s & rgb for s in second)
        assert all(len(s & sar) == (views == "ms-sar") for s in second)
    else:
        assert all(len(s) == pretrain.CHANNELS[mode] and not s & sar for s in first)
        assert set().union(*first) == set(MS)
    if views == "ms-ms":
        assert not any(s & t for s, t in zip(first, second, strict=True))
    elif mode != "rgb":
        assert all(s <= sar for s in second) and set().union(*second) == sar
    if mode == "three" and views == "ms-sar":
        assert all(s == sar for s in second)
        assert len({tuple(row) for row in b}) == 6  # both copies in every order


def test_the_subset_is_seeded_and_blind_to_the_order_of_files(archive, monkeypatch):
    def names(*more: str):
        return pretrain.open_archive(flags("--root", str(archive), "--num-pairs", "5", *more)).names

    first, listed = names(), glob.glob
    monkeypatch.setattr(glob, "glob", lambda *a, **k: sorted(listed(*a, **k), reverse=True))
    assert names() == first and len(set(first)) == 5
    assert any(names("--seed", str(seed)) != first for seed in (1, 2, 3))


def test_statistics_are_numpys_over_the_good_samples(archive, tmp_path):
    import bandcrop

    listed = pretrain.open_archive(flags("--root", str(archive)))
    mean, std = pretrain.band_statistics(listed, 0, "stop")
    at = listed.bands.index("NNIR")
    pixels = np.concatenate([bandcrop.read(path, [8])[0].ravel() for path in listed.files[0]])
    assert mean[at] == pytest.approx(pixels.mean(dtype=np.float64), rel=1e-9)
    assert std[at] == pytest.approx(pixels.std(dtype=np.float64), rel=1e-6)


# Augmentation ------------------------------------------------------------------------------------
def draws(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_blur_is_torchvisions_with_each_sample_s_sigma():
    x, sigmas = torch.randn(3, 2, 64, 64), [0.3, 1.1, 2.0]
    args = flags("--rotate", "0", "--erase", "0")
    ours = pretrain.augment(x, draws(*[[0, s, 0, 0, 0, 0, 0] for s in sigmas]), args)
    for i, sigma in enumerate(sigmas):
        torch.testing.assert_close(ours[i], TF.gaussian_blur(x[i], [7, 7], [sigma, sigma]))
    still = pretrain.augment(x, torch.zeros(3, 7), args)
    torch.testing.assert_close(still, x)


def test_rotation_is_torchvisions_and_fills_with_the_band_s_mean():
    x, angles = torch.randn(3, 2, 40, 40), [10.0, -7.5, 0.0]
    args = flags("--blur", "0,0", "--erase", "0")
    ours = pretrain.augment(x, draws(*[[math.radians(d), 0, 0, 0, 0, 0, 0] for d in angles]), args)
    for i, degrees in enumerate(angles):
        theirs = TF.rotate(x[i], degrees, InterpolationMode.BILINEAR)  # outside: zeros
        torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=0)


def test_erasing_and_greyscale_touch_what_was_drawn_and_nothing_else():
    x = torch.randn(2, 3, 16, 16)
    args = flags("--rotate", "0", "--blur", "0,0")
    ours = pretrain.augment(x, draws([0, 0, 2, 3, 7, 11, 0], [0, 0, 0, 0, 0, 0, 1]), args)
    torch.testing.assert_close(ours[0], TF.erase(x[0], 2, 3, 5, 8, torch.zeros(1)))
    torch.testing.assert_close(ours[1], x[1].mean(0, keepdim=True).expand(3, -1, -1))


# Runs --------------------------------------------------------------------------------------------
def test_a_run_leaves_what_its_docstring_promises(finished, archive):
    config = json.loads((finished / "config.json").read_text())
    assert config["name"] == "RS-BYOL-1" and config["pairs"]["synthetic"] is True
    assert config["paper_leaves_open"]["momentum"] == 0.9 and config["precision"] == "fp32"
    assert [line["step"] for line in log_of(finished)] == [2, 3, 5, 6, 8, 9, 11, 12]
    assert (finished / "views.png").stat().st_size > 1000
    kept = sorted(path.name for path in finished.glob("encoder-epoch*"))
    assert kept == ["encoder-epoch0001.safetensors", "encoder-epoch0003.safetensors"]
    assert not list(finished.glob(".*.part")) and not (finished / "bad_tiles.txt").exists()
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12


def test_the_encoder_is_the_student_s_and_loads_into_torchvision_but_for_fc(finished):
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    tensors = load_file(finished / "encoder.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    student = torch.load(finished / "checkpoint.pt", weights_only=True)["student"]
    assert all(torch.equal(v, student[f"encoder.{k}"]) for k, v in tensors.items())
    with safe_open(finished / "encoder.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["bands"]) == list(pretrain.BANDS)
    assert len(json.loads(about["mean"])) == len(json.loads(about["std"])) == 12
    expected = {
        "name": "RS-BYOL-1", "arch": "resnet18", "mode": "single", "views": "ms-sar",
        "epoch": "4", "seed": "0", "size": "32", "synthetic": "true",
    }  # fmt: skip
    assert expected.items() <= about.items() and "pretrain.py" in about["command"]


# Importing torch takes most of a start's time: runs that are killed are forked after it.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torchvision.transforms.v2", "safetensors.torch", "pytest"])


def child(arguments: list[str]) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    sys.argv = ["pretrain.py", *arguments]
    sys.exit(pretrain.main(*pretrain.prepare()))


def fork(*arguments: object) -> multiprocessing.Process:
    process = FORKED.Process(target=child, args=([*map(str, arguments)],))
    process.start()
    return process


def test_resume_after_sigkill_at_random_moments_is_bit_identical(finished, archive, tmp_path):
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--checkpoint-every", "2"]
    fork("--help").join()  # starts the server, which is not to be timed
    began = time.monotonic()
    whole = fork(*common, "--out", tmp_path / "whole")
    whole.join()
    longest = time.monotonic() - began
    assert whole.exitcode == 0
    moments, kills, out = random.Random(0), 0, tmp_path / "killed"
    while kills < 10 or out.exists():
        process = fork(*common, "--resume", "--out", out)
        process.join(moments.uniform(0, longest) if kills < 10 else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if process.exitcode == 0:  # done before the kill
            same_run(out, finished)
            shutil.rmtree(out)


@pytest.mark.parametrize("file", ["checkpoint.pt", "encoder.safetensors"])
def test_resume_after_sigkill_in_the_middle_of_a_save_is_bit_identical(
    file, finished, archive, tmp_path
):
    out = tmp_path / "killed"
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", out, "--resume"]
    hits, moments = 0, random.Random(1)
    for end in ("1", "4", "9", "12"):  # the only save is the one at the end
        process = fork(*common, "--max-steps", end)
        while process.is_alive():
            if part := list(out.glob(f".{file}.*.part")):
                time.sleep(moments.uniform(0, 0.01))
                process.kill()
                process.join()
                hits += part[0].exists()
        again = fork(*common, "--max-steps", end)
        again.join()
        assert again.exitcode == 0 and not list(out.glob(".*.part"))
    assert hits > 1  # not each: a kill may come just after the rename
    same_run(out, finished)


@pytest.mark.parametrize("file, largest", [("encoder.safetensors", 20), ("checkpoint.pt", 60)])
def test_a_full_disk_keeps_the_checkpoint_before(file, largest, finished, archive, tmp_path):
    out = tmp_path / "full"
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", out]
    first = fork(*common, "--checkpoint-every", "4", "--max-steps", "5")
    first.join()
    before = {name: (out / name).read_bytes() for name in ("checkpoint.pt", file)}
    # A process may write no file larger than this: what a full disk does to it.
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest << 20}, {largest << 20}));"
        f"sys.argv = {['pretrain.py', *map(str, common), '--resume']!r};"
        f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')"
    )
    full = subprocess.run([sys.executable, "-c", limited], env=ENV, capture_output=True, text=True)
    assert "the last checkpoint is whole" in one_line(full, 1)
    assert all((out / name).read_bytes() == kept for name, kept in before.items())
    assert not list(out.glob(".*.part"))
    resumed = fork(*common, "--resume")
    resumed.join()
    assert first.exitcode == 0 and resumed.exitcode == 0
    same_run(out, finished)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, status, archive, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "pretrain.py"), "--mode=single", "--root", str(archive),
               *SMALL, "--epochs", "100000", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "epoch" not in process.stdout.readline():
        pass
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status and stderr == "" and "--resume goes on" in stdout
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert log_of(out)[-1]["step"] <= state["step"]


def test_changed_settings_are_refused_by_name_and_another_run_s_folder_is(finished, archive):
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", finished]
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert "holds another run" in one_line(run(*common), 2)
    message = one_line(run(*common, "--resume", "--tau", "0.99", "--seed", "1"), 2)
    assert "--tau was 0.9, is 0.99" in message and "--seed was 0, is 1" in message
    assert "list of pairs" in one_line(run(*common[:4], *SMALL, *REST, "--out", finished,
                                           "--resume", "--num-pairs", "8"), 2)  # fmt: skip
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}
    done = run(*common, "--resume", "--threads", "2", "--max-steps", "12")
    assert done.returncode == 0 and "nothing left to do" in done.stdout


def test_two_processes_never_write_into_one_folder(archive, tmp_path):
    import fcntl

    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    done = run("--mode", "single", "--root", archive, *SMALL, "--out", tmp_path)
    os.close(folder)
    assert "another process" in one_line(done, 2)


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(archive, tmp_path):
    out = tmp_path / "diverged"
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--lr", "1e30", "--lr-min", "0"]
    done = run(*common, "--checkpoint-every", "1", "--out", out)
    assert "not finite" in one_line(done, 1)
    assert "NaN" not in (out / "log.jsonl").read_text()
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["student"].values())


# Bad tiles ---------------------------------------------------------------------------------------
@pytest.fixture
def damaged(tmp_path) -> Path:
    """104 pairs, one cut short: just under 1 %."""
    root = tmp_path / "sen12ms"
    write_sen12ms(root, pairs=104, seed=1, size=32)
    tile = sorted(root.glob("ROIs*/s2_*/*.tif"))[50]
    tile.write_bytes(tile.read_bytes()[:2000])
    return root


def test_a_bad_tile_stops_a_run_or_is_replaced_by_the_next_good_pair(damaged, tmp_path):
    common = ["--mode", "single", "--root", damaged, *SMALL, "--epochs", "1", "--batch-size", "26"]
    message = one_line(run(*common, "--out", tmp_path / "stop"), 1)
    bad = sorted(damaged.glob("ROIs*/s2_*/*.tif"))[50]
    assert bad.name in message and "--bad-tiles skip" in message
    out = tmp_path / "skip"
    done = run(*common, "--bad-tiles", "skip", "--out", out)
    assert done.returncode == 0, done.stderr
    (line,) = (out / "bad_tiles.txt").read_text().splitlines()
    assert line.split("\t")[0] == str(bad.relative_to(damaged))


def test_the_replacement_is_the_next_pair_of_the_epoch_with_the_sample_s_own_draw(damaged):
    args = flags("--root", str(damaged), "--batch-size", "8", "--size", "32", "--bad-tiles", "skip")
    listed = pretrain.open_archive(args)
    stats = np.stack([np.zeros(12), np.ones(12)]).astype(np.float32)
    plan = pretrain.plan_epoch(0, 104, listed.bands, args)
    row = int(np.flatnonzero(plan.pairs == 50)[0])
    bad: dict[str, str] = {}
    steps = range(row // 8 + 1)
    for batch in pretrain.batches(listed, stats, args, steps, torch.device("cpu"), 0, 1, bad):
        ours = batch.views[:, row % 8].clone()
    assert list(bad) == [listed.names[50]]
    healed = plan.pairs.copy()
    healed[row] = plan.pairs[(row + 1) % 104]
    import bandcrop

    out = np.empty((1, 1, 32, 32), np.float32)
    for view in (0, 1):
        chosen = plan.bands[row, view]
        sensor, band = listed.place[chosen[0]]
        path = listed.files[sensor][healed[row]]
        bandcrop.Reader(1).fill(out, [path], [[band]], plan.windows[[row], view],
                                plan.orient[[row], view])  # fmt: skip
        assert np.array_equal(ours[view].numpy(), out[0])


def test_more_than_one_percent_of_bad_tiles_stops_even_when_skipping(damaged, tmp_path):
    other = sorted(damaged.glob("ROIs*/s1_*/*.tif"))[70]
    other.write_bytes(other.read_bytes()[:2000])
    done = run("--mode", "single", "--root", damaged, *SMALL, "--epochs", "1", "--batch-size", "26",
               "--bad-tiles", "skip", "--out", tmp_path / "run")  # fmt: skip
    assert "over 1 %" in one_line(done, 1)


# Refusals ----------------------------------------------------------------------------------------
def test_a_missing_archive_says_where_to_get_one(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        done = run("--mode", "single", "--root", root, "--out", tmp_path / "out")
        assert done.returncode == 2 and str(root) in done.stderr
        assert "m1474000" in done.stderr and "tests/synthetic.py" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_one_clear_line(archive, tmp_path):
    pairs = tmp_path / "pairs.csv"
    s2 = sorted(archive.glob("ROIs*/s2_*/*.tif"))[0]
    s1 = Path(str(s2).replace("s2_", "s1_"))
    pairs.write_text("s1,s2\n" + f"{s1},{s2}\n" * 4)
    csv = ["--pairs", pairs, *SMALL, "--out", tmp_path / "out"]
    lone = tmp_path / "lone"
    shutil.copytree(archive, lone)
    sorted(lone.glob("ROIs*/s1_*/*.tif"))[3].unlink()
    (tmp_path / "file").write_text("")
    cases = [
        (1, ["--mode", "single", "--root", lone, *SMALL], ["has no S1 twin"]),
        (1, ["--mode", "single", *csv, "--s2-bands", "B02,B03"], ["13 bands", "--s2-bands"]),
        (2, ["--mode", "rgb", *csv, "--s2-bands", "B02,B03"], ["Red", "RE5", "Blue, Green"]),
        (2, ["--mode", "three", *csv, "--s1-bands", "VH,-"], ["2 of SAR1, SAR2; this"]),
        (2, ["--mode", "single", *csv, "--s2-bands", "B02,B77"], ["'B77'"]),
        (2, ["--mode", "single", *csv, "--s2-bands", "B02,VV"], ["wrong file"]),
        (2, ["--mode", "single", "--pairs", tmp_path / "none.csv"], ["none.csv"]),
        (2, ["--mode", "single", "--root", archive], ["12 pairs fill no batch"]),
        (2, ["--mode=single", "--root", archive, *SMALL, "--out", tmp_path / "file"], ["cannot"]),
        (2, ["--mode", "single", "--size", "3"], ["--size"]),
        (2, ["--mode", "double"], ["--mode"]),
        (2, ["--mode", "single", "--root", archive, *SMALL, "--device", "cuda:7",
             "--out", tmp_path / "gpu"], ["cuda:7"]),
    ]  # fmt: skip
    for status, arguments, parts in cases:
        message = one_line(run(*arguments), status)
        assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "mode, folder, file, more",
    [("single", "sar_rgb_pairs", "pairs.csv", ["--s2-bands", "Red,Green,Blue", "--s1-bands", "VH"]),
     ("three", "bigearthnet", "tiles.csv", ["--s2-bands", "B02,B03,B04,B08"])],
)  # fmt: skip
def test_any_archive_with_a_csv_of_pairs(mode, folder, file, more, tmp_path):
    pairs = SHARED / folder / file
    if not pairs.exists():
        pytest.skip(f"real data {folder} is not here")
    done = run("--mode", mode, "--pairs", pairs, *more, *SMALL, "--num-pairs", 8, "--epochs", "1",
               "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr


# More than one process ---------------------------------------------------------------------------
TWO = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import pretrain
dist.init_process_group("gloo")
rank = dist.get_rank()


def work():  # what uses the group is gone before the group is
    student, a, b = torch.load(sys.argv[2], weights_only=False)
    student = pretrain.synchronise_batchnorm(student, torch.device("cpu"))
    teacher = pretrain.make_teacher(student)
    model = torch.nn.parallel.DistributedDataParallel(student)
    mine = slice(4 * rank, 4 * rank + 4)
    loss, watch = pretrain.step_loss(model, teacher, a[mine], b[mine])
    loss.backward()
    dist.all_reduce(watch)
    if rank == 0:
        grads = {name: p.grad for name, p in student.named_parameters()}
        torch.save([watch[0] / 2, grads, student.state_dict()], sys.argv[3])


work()
dist.destroy_process_group()
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run([*command, *map(str, arguments)], env=ENV, capture_output=True, text=True)


def test_two_processes_give_the_loss_gradients_and_statistics_of_one(tmp_path):
    torch.manual_seed(0)
    student = pretrain.Network("resnet18", 1, 32, 16)
    teacher = pretrain.make_teacher(student)
    a, b = torch.randn(2, 8, 1, 32, 32)
    torch.save([student, a, b], tmp_path / "in.pt")
    (tmp_path / "two.py").write_text(TWO)
    done = torchrun(tmp_path / "two.py", ROOT, tmp_path / "in.pt", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    loss, gradients, state = torch.load(tmp_path / "out.pt", weights_only=True)

    exact = copy.deepcopy(student).double()
    right, _ = pretrain.step_loss(exact, copy.deepcopy(teacher).double(), a.double(), b.double())
    right.backward()
    mine, _ = pretrain.step_loss(student, teacher, a, b)
    mine.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    for name, parameter in exact.named_parameters():
        # Float32 rounding: as far from float64 as one process is, within a small factor.
        rounding = (student.get_parameter(name).grad - parameter.grad).norm()
        scale = parameter.grad.norm()
        assert (gradients[name] - parameter.grad).norm() <= 10 * rounding + 1e-5 * scale, name
    for name, buffer in student.named_buffers():
        torch.testing.assert_close(state[name], buffer, rtol=1e-4, atol=1e-5)


def test_torchrun_trains_and_one_process_resumes_it(archive, tmp_path):
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", tmp_path / "run"]
    done = torchrun(ROOT / "pretrain.py", *common, "--max-steps", "6")
    assert done.returncode == 0, done.stderr
    done = run(*common, "--resume")
    assert done.returncode == 0 and "resumed at step 6" in done.stdout, done.stderr
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2, 3, 5, 6, 8, 9, 11, 12]


def test_help_names_every_choice_the_paper_leaves_open():
    text = run("--help").stdout
    assert "RS-BYOL-3 RGB-S1S2" in text and "[open]" in text
