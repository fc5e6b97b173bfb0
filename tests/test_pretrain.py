"""pretrain.py: the method against plain re-derivations, and a run that nothing can spoil."""

import contextlib
import glob
import itertools
import json
import math
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import tifffile
import torch
import torchvision
from conftest import in_process
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import write_sen12ms
from test_standalone import readme_code
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

import pretrain
import probe

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
NET = "--arch resnet18".split()
SMALL = "--size 32 --batch-size 4 --threads 1 --precision fp32 --log-every 2".split()
FOUR = ["--batch-size", "4"]
REST = ["--epochs", "4", "--restart-epochs", "1"]
RESNET = pretrain.make_encoder
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
MS = [band for band in pretrain.BANDS if band not in pretrain.SAR]


def flags(*more: str):
    return pretrain.make_parser().parse_args(["--mode", "single", *more])


def small_encoder(arch: str, channels: int) -> torch.nn.Module:
    """Stands in for a ResNet in tests of runs and their files, where NET is not asked for."""
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 16, 7, stride=4), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    )  # fmt: skip
    encoder.width = 16
    return encoder


def here(*arguments: object) -> tuple[int, str, str]:
    """pretrain.py in this process, where torch is imported already: status, stdout, stderr."""
    if "--arch" not in arguments and pretrain.make_encoder is RESNET:
        with mock.patch.object(pretrain, "make_encoder", small_encoder):
            return here(*arguments)
    done = in_process(pretrain.run, "pretrain.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def refused(status: int, *arguments: object) -> str:
    """The one line of a run that is refused."""
    was, _, err = here(*arguments)
    assert was == status and err.count("\n") == 1, (was, err)
    return err


def trained(*arguments: object) -> str:
    """What a run that ends well says."""
    status, out, err = here(*arguments)
    assert status == 0 and not err, err
    return out


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def same_run(one: Path, two: Path) -> None:
    """The same bits of weights and momentum; of log lines the last, as a resumed run's first
    averages over its own steps alone."""
    logs = [log_of(one), log_of(two)]
    assert len({tuple(line["step"] for line in log) for log in logs}) == 1
    assert logs[0][-1] == logs[1][-1]
    first, second = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (one, two))
    assert first["step"] == second["step"]
    for name, tensor in first["byol"].items():
        assert torch.equal(tensor, second["byol"][name]), name
    for at, slot in first["optimizer"]["state"].items():
        other = second["optimizer"]["state"][at]["momentum_buffer"]
        assert torch.equal(slot["momentum_buffer"], other)
    encoders = [load_file(out / "encoder.safetensors") for out in (one, two)]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())


def with_stats(listed: pretrain.Archive) -> pretrain.Archive:
    bands = len(listed.bands)
    return listed._replace(stats=np.float32([[0] * bands, [1] * bands]))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("archive") / "sen12ms"
    write_sen12ms(root, pairs=12, seed=0, size=64)
    return root


@pytest.fixture(scope="module")
def finished(archive, tmp_path_factory) -> Path:
    """12 steps: 4 epochs of 3, restarts after epochs 1 and 3."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    trained("--mode", "single", "--root", archive, *SMALL, *REST, "--out", out)
    return out


@pytest.fixture
def copy_of(finished, tmp_path) -> Path:
    """The finished run in a folder that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# Method ------------------------------------------------------------------------------------------
def plain_head(x, w):
    """Linear, BatchNorm with batch statistics, ReLU, Linear, written out."""
    x = x @ w["0.weight"].T + w["0.bias"]
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * w["1.weight"] + w["1.bias"]
    return x.clamp(min=0) @ w["3.weight"].T + w["3.bias"]


def test_one_step_is_byol_rederived_in_float64():
    torch.manual_seed(3)
    byol = pretrain.BYOL(small_encoder("", 1), 16, 8).double()
    with torch.no_grad():
        for parameter in byol.teacher.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    a, b = torch.randn(2, 6, 1, 32, 32, dtype=torch.float64)

    learnt = {k: v for k, v in byol.named_parameters() if not k.startswith("teacher")}
    weights = {k: v.detach().clone().requires_grad_() for k, v in learnt.items()}
    frozen = {k: v.detach().clone() for k, v in byol.teacher.named_parameters()}
    bare = small_encoder("", 1).double()

    def part(w, name):
        return {k.removeprefix(name + "."): v for k, v in w.items() if k.startswith(name + ".")}

    def project(w, x):
        h = torch.func.functional_call(bare, part(w, "encoder"), (x,))
        return plain_head(h, part(w, "projector"))

    def unit(x):
        return x / (x * x).sum(1, keepdim=True).sqrt()

    expected = 0.0
    for seen, other in ((a, b), (b, a)):
        z = project(part(weights, "student"), seen)
        p = unit(plain_head(z, part(weights, "predictor")))
        expected = expected + ((p - unit(project(frozen, other))) ** 2).sum(1).mean()
    expected.backward()

    optimizer = pretrain.make_optimizer(byol, flags("--lr", "0.1"))
    off = torch.amp.GradScaler("cpu", enabled=False)
    watch = pretrain.train_step(byol, optimizer, off, a, b, 0.1, 0.9, contextlib.nullcontext)
    assert watch[0].item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in learnt.items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-7, atol=1e-11)
    assert all(parameter.grad is None for parameter in byol.teacher.parameters())
    z_a, z_b = (unit(project(part(weights, "student"), x)) for x in (a, b))
    assert watch[1].item() == pytest.approx(torch.cat([z_a.std(0), z_b.std(0)]).mean().item())
    assert watch[2].item() == pytest.approx((z_a * z_b).sum(1).mean().item())

    for name, parameter in learnt.items():
        moved = weights[name] - 0.1 * (weights[name].grad + 1e-5 * weights[name])
        torch.testing.assert_close(parameter.detach(), moved.detach(), rtol=1e-9, atol=1e-11)
        if name.startswith("student."):
            place = name.removeprefix("student.")
            mean = 0.9 * frozen[place] + 0.1 * moved.detach()
            theirs = byol.teacher.get_parameter(place)
            torch.testing.assert_close(theirs, mean, rtol=1e-9, atol=1e-11)


def test_with_negatives_the_loss_is_infonce_written_out():
    p, t = torch.randn(2, 5, 8, dtype=torch.float64)
    unit_p, unit_t = (x / x.norm(dim=1, keepdim=True) for x in (p, t))
    odds = torch.exp(unit_p @ unit_t.T / 0.2)
    expected = -torch.log(odds.diagonal() / odds.sum(1)).mean()
    encoder = small_encoder("", 1)
    ours, plain = (pretrain.BYOL(encoder, 8, 8, temperature).loss for temperature in (0.2, 0))
    assert ours(p, t).item() == pytest.approx(expected.item(), rel=1e-12)
    assert plain(p, t).item() == pytest.approx(((unit_p - unit_t) ** 2).sum(1).mean().item())
    exact = ours(p.float(), t.float()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(p.float(), t.float()).item() == pytest.approx(exact, rel=1e-6)


def test_negatives_are_named_in_the_run_and_in_its_encoder(archive, tmp_path, monkeypatch):
    out = tmp_path / "run"
    common = ["--mode", "single", "--root", archive, *SMALL, "--recipe", "small", "--out", out]
    said = trained(*common, "--max-steps", 2)
    assert "RS-BYOL-1 with negatives: 12" in said
    with safe_open(out / "encoder.safetensors", "pt") as file:
        assert file.metadata()["name"] == "RS-BYOL-1 with negatives"
    monkeypatch.setattr(pretrain, "WORLD", 2)
    assert "with torchrun add --negatives 0" in refused(2, *common, "--resume")


def test_a_run_of_the_small_recipe_from_before_it_had_negatives_stays_byol(archive, tmp_path):
    out = tmp_path / "run"
    common = ["--mode", "single", "--root", archive, *SMALL, "--recipe", "small", "--out", out]
    trained(*common, "--negatives", 0, "--max-steps", 2)
    config = json.loads((out / "config.json").read_text())
    del config["settings"]["negatives"]
    config["command"] = config["command"].replace("--negatives 0 ", "")
    (out / "config.json").write_text(json.dumps(config))
    assert "--negatives was 0.0, is 0.2" in refused(2, "--resume", "--out", out)
    assert "resumed at step 2" in trained("--resume", "--out", out, "--negatives", 0,
                                          "--max-steps", 3)  # fmt: skip


def test_a_step_that_loss_scaling_skips_leaves_weights_and_momentum_clean():
    byol = pretrain.BYOL(small_encoder("", 1), 16, 8)
    optimizer = pretrain.make_optimizer(byol, flags())
    before = [weight.detach().clone() for weight in byol.student.parameters()]
    half = torch.autocast("cpu", torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows in fp16
    a, b = torch.randn(2, 4, 1, 32, 32)
    pretrain.train_step(byol, optimizer, scaler, a, b, 0.1, 0.9, lambda: half)
    assert scaler.get_scale() < 2.0**60
    assert all(map(torch.equal, before, byol.student.parameters()))
    assert not any(slot["momentum_buffer"].any() for slot in optimizer.state.values())


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


# Losses of the first ten steps, and the sum of all of the encoder's absolute values (AVX2): what a
# run of old settings computes stays the same. Three channels: a ResNet-18 at commit 35ac5a0; the
# others: the small encoder at 9698cac, which gave the same as 35ac5a0 with a ResNet-18 in all four.
# The blur of 35ac5a0 was 0.1 to 2 pixels at any size: at 32 that is 0.7 to 14 of a view of 224.
OLD = {
    ("three", "ms-sar"): (NET,
        [3.929046630859375, 2.746494770050049, 1.9501245021820068, 1.7399675846099854,
         1.7323176860809326, 1.7395484447479248, 1.6849253177642822, 1.715522289276123,
         1.722011923789978, 1.7639509439468384], 2531374.367274751),
    ("single", "ms-sar"): ([],
        [4.008418083190918, 2.7781715393066406, 2.1894969940185547, 1.7414385080337524,
         1.841698169708252, 1.6683845520019531, 1.7061411142349243, 2.082855463027954,
         1.9879121780395508, 2.1732723712921143], 423.73541977714194),
    ("rgb", "ms-sar"): ([],
        [4.078400135040283, 2.8650102615356445, 1.788171648979187, 1.4934196472167969,
         1.764159917831421, 1.5901355743408203, 1.5573954582214355, 2.01588773727417,
         1.9786380529403687, 2.1105828285217285], 825.8513488448443),
    ("single", "ms-ms"): ([],
        [3.9943861961364746, 2.684668779373169, 1.4461430311203003, 1.5883586406707764,
         2.1217498779296875, 1.606443166732788, 1.2519726753234863, 2.3699073791503906,
         2.654005527496338, 1.9225940704345703], 364.35528734464606),
}  # fmt: skip
# ResNet-18 on four samples lets rounding grow so fast that AVX-512 has losses of its own; they are
# those of 35ac5a0 there, the same bits as today's in all ten steps and in the encoder.
THREE_AVX512 = [3.929046154022217, 2.756464958190918, 1.915696144104004]


@pytest.mark.parametrize("mode, views", OLD)
def test_old_settings_give_the_losses_and_the_encoder_that_they_gave(
    mode, views, archive, tmp_path
):
    net, losses, size = OLD[mode, views]
    trained("--mode", mode, "--views", views, "--root", archive, *net, *SMALL, "--log-every", 1,
            "--epochs", 4, "--max-steps", 10, "--blur-sigma", "0.7,14", "--no-compile",
            "--out", tmp_path)  # fmt: skip
    cpu = torch.backends.cpu.get_cpu_capability()
    first = THREE_AVX512 if (mode, cpu) == ("three", "AVX512") else losses[:3]
    assert [x["loss"] for x in log_of(tmp_path)][:3] == pytest.approx(first, rel=1e-3)
    if cpu == "AVX2":  # else rounding differs, and grows
        assert [x["loss"] for x in log_of(tmp_path)] == pytest.approx(losses, rel=1e-6)
        encoder = load_file(tmp_path / "encoder.safetensors")
        total = sum(float(tensor.double().abs().sum()) for tensor in encoder.values())
        assert total == pytest.approx(size, rel=1e-6)


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


def test_processes_share_a_global_batch_without_overlap(archive, monkeypatch):
    args = flags("--root", str(archive), "--batch-size", "4", "--size", "32")
    listed = with_stats(pretrain.open_archive(args))
    whole = list(pretrain.requests(listed, args, range(4)))
    monkeypatch.setattr(pretrain, "WORLD", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(pretrain, "RANK", rank)
        halves.append(list(pretrain.requests(listed, args, range(4))))
    for step, request in enumerate(whole):
        for key in ("paths", "bands", "windows", "orient", "mean", "bands_in_file"):
            mine, theirs = np.array(request[key]), [np.array(half[step][key]) for half in halves]
            for view in (0, 1):
                both = np.concatenate([part[2 * view : 2 * view + 2] for part in theirs])
                assert np.array_equal(both, mine[4 * view : 4 * view + 4]), key


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


def test_rotation_erasing_and_grey_are_drawn_as_help_says():
    draws = pretrain.plan_epoch(0, 20000, list(pretrain.BANDS), flags()).draws.reshape(-1, 7)
    angle, box, grey = draws[:, 0], draws[:, 2:6], draws[:, 6]
    assert (angle != 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.degrees([angle.min(), angle.max()]) == pytest.approx([-10, 10], abs=0.02)
    assert set(grey) == {0, 1} and grey.mean() == pytest.approx(0.2, abs=0.02)
    erased = box[box.any(1)]
    assert len(erased) / len(box) == pytest.approx(0.5, abs=0.02)
    assert (erased == np.rint(erased)).all() and erased.min() == 0 and erased.max() == 224
    area = (erased[:, 2] - erased[:, 0]) * (erased[:, 3] - erased[:, 1]) / 224**2
    assert [area.min(), area.max()] == pytest.approx([0.02, 0.33], abs=0.003)
    assert np.histogram(area, 4, (0.02, 0.33))[0] == pytest.approx(len(area) / 4, rel=0.04)


def test_blur_probabilities_are_byols_and_neither_sensor_owns_one():
    sigma, small = (
        pretrain.plan_epoch(0, 20000, list(pretrain.BANDS), flags("--size", size)).draws[..., 1]
        for size in ("224", "56")
    )
    assert (sigma > 0).mean(0) == pytest.approx(0.55, abs=0.02)  # of 1.0 and 0.1, by turns
    assert ((sigma > 0).sum(1) > 0).all()
    assert 0.0999 < sigma[sigma > 0].min() < 0.101 and 1.999 < sigma.max() < 2.0001
    np.testing.assert_allclose(small, sigma / 4, rtol=1e-6)  # as blurred for its size


@pytest.mark.parametrize(
    "mode, views", [(m, v) for m in pretrain.CHANNELS for v in ("ms-sar", "ms-ms")]
)
def test_each_variant_draws_the_paper_s_bands(mode, views):
    bands = list(pretrain.BANDS) if views == "ms-sar" else MS
    args = flags("--views", views)
    args.mode = mode
    assert [*pretrain.find_bands(args)] == bands
    a, b = pretrain.plan_epoch(0, 4000, bands, args).bands.transpose(1, 0, 2)
    name = np.array(bands)
    first, second = [set(row) for row in name[a]], [set(row) for row in name[b]]
    sar, rgb = set(pretrain.SAR), set(pretrain.RGB)
    if mode == "rgb":
        assert (name[a] == ["Red", "Green", "Blue"]).all()
        assert all(len(s) == 3 and not s & rgb for s in second)
        assert all(len(s & sar) == (views == "ms-sar") for s in second)
        assert all(len(set(column)) > 2 for column in b.T)  # in a random order
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
        return pretrain.open_archive(
            flags("--root", str(archive), "--num-pairs", "5", *FOUR, *more)
        ).names

    first, listed = names(), glob.glob
    monkeypatch.setattr(glob, "glob", lambda *a, **k: sorted(listed(*a, **k), reverse=True))
    assert names() == first and len(set(first)) == 5
    assert any(names("--seed", str(seed)) != first for seed in (1, 2, 3))


def test_statistics_are_numpys_over_the_samples_that_are_not_nodata(archive):
    import bandcrop

    common = ["--root", str(archive), *FOUR]
    listed = pretrain.open_archive(flags(*common))
    at = listed.bands.index("NNIR")
    pixels = np.concatenate([bandcrop.read(path, [8])[0].ravel() for path in listed.files[0]])
    args = flags(*common, "--nodata", str(pixels[0]))
    listed = pretrain.open_archive(args)
    mean, std = pretrain.band_statistics(listed, args)
    good = pixels[pixels != pixels[0]].astype(np.float64)
    assert 0 < len(good) < len(pixels)
    assert mean[at] == pytest.approx(good.mean(), rel=1e-9)
    assert std[at] == pytest.approx(good.std(), rel=1e-6)
    (request,) = pretrain.requests(with_stats(listed), args, range(1))
    assert request["nodata"] == pixels[0]


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


# What is learnt ----------------------------------------------------------------------------------
def test_match_is_the_mean_rank_by_cosine():
    rng = np.random.default_rng(0)
    p, t = rng.standard_normal((2, 20, 6))
    cosine = (p / np.linalg.norm(p, axis=1)[:, None]) @ (t / np.linalg.norm(t, axis=1)[:, None]).T
    ranks = [scipy.stats.rankdata(-row)[i] - 1 for i, row in enumerate(cosine)]
    ours = pretrain.mean_rank(torch.tensor(p), torch.tensor(t))
    assert ours == pytest.approx(np.mean(ranks) / 19)
    assert pretrain.mean_rank(torch.tensor(p), torch.tensor(p)) == 0
    assert pretrain.mean_rank(torch.ones(9, 4), torch.ones(9, 4)) == 0.5  # collapsed: chance
    assert pretrain.mean_rank(torch.ones(1, 4), torch.ones(1, 4)) == 0.5  # no NaN in log.jsonl


def test_watching_changes_nothing_and_looks_outside_the_training_pairs(archive):
    args = flags("--root", str(archive), *SMALL, "--num-pairs", "6")
    listed = pretrain.open_archive(args)
    assert not {*listed.files[0]} & {*listed.watched[0]} and len(listed.watched[0]) == 6
    byol = pretrain.BYOL(small_encoder("", 1), 16, 8)
    before = {name: tensor.clone() for name, tensor in byol.state_dict().items()}
    given = with_stats(listed), args, torch.device("cpu"), contextlib.nullcontext
    seen = pretrain.watch_learning(byol, *given)
    assert seen == pretrain.watch_learning(byol, *given)
    assert 0 <= seen <= 1
    assert byol.training and byol.teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in byol.state_dict().items())


# Runs --------------------------------------------------------------------------------------------
def test_a_run_leaves_what_its_docstring_promises(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["name"] == "RS-BYOL-1" and config["pairs"]["synthetic"] is True
    assert config["settings"]["momentum"] == 0.9 and config["precision"] == "fp32"
    assert [line["step"] for line in log_of(finished)] == [2, 3, 5, 6, 8, 9, 11, 12]
    assert [line["step"] for line in log_of(finished) if "match" in line] == [12]
    args = flags(*REST)
    for line in log_of(finished):
        assert line["lr"] == pretrain.learning_rate(line["step"] - 1, 3, args)
    assert (finished / "views.png").stat().st_size > 1000
    kept = sorted(path.name for path in finished.glob("encoder-epoch*"))
    assert kept == ["encoder-epoch0001.safetensors", "encoder-epoch0003.safetensors"]
    assert not list(finished.glob(".*.part")) and not (finished / "bad_tiles.txt").exists()
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12


def test_the_encoder_is_the_student_s_and_loads_into_torchvision_but_for_fc(archive, tmp_path):
    out = tmp_path / "run"
    trained("--mode", "single", "--root", archive, *NET, *SMALL, "--max-steps", 3, "--out", out)
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    tensors = load_file(out / "encoder.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    student = torch.load(out / "checkpoint.pt", weights_only=True)["byol"]
    assert all(torch.equal(v, student[f"student.encoder.{k}"]) for k, v in tensors.items())
    with safe_open(out / "encoder.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["bands"]) == list(pretrain.BANDS)
    assert len(json.loads(about["mean"])) == len(json.loads(about["std"])) == 12
    expected = {
        "name": "RS-BYOL-1", "arch": "resnet18", "mode": "single", "views": "ms-sar",
        "epoch": "1", "seed": "0", "size": "32", "synthetic": "true",
    }  # fmt: skip
    assert expected.items() <= about.items() and "pretrain.py" in about["command"]


def test_every_line_says_what_goes_on_in_80_columns(archive, tmp_path):
    out = trained("--mode", "single", "--root", archive, *SMALL, *REST, "--max-steps", 3,
                  "--recipe", "small", "--out", tmp_path)  # fmt: skip
    lines = [x for x in out.splitlines() if str(tmp_path) not in x and str(archive) not in x]
    assert all(len(line) <= 80 for line in lines), lines
    assert "band statistics" in out and "recipe small: lr 0.03, tau 0.99" in out
    assert "on cpu (no CUDA GPU in use), fp32, not compiled" in out
    (line,) = [line for line in lines if line.startswith("epoch")]
    for word in ("loss", "cosine", "spread", "pairs/s", "wait", "left"):
        assert f" {word} " in line + " "
    assert f"--weights {tmp_path}/encoder.safetensors" in out
    timing = {"pairs_per_second": 1234.5, "data_wait": 0.99}
    worst = {"epoch": 399.9, "loss": 4.0, "cosine": -0.7, "std": 0.0625, "timing": timing}
    assert len(pretrain.progress(worst, 10**8, 32)) <= 80
    timing |= {"pairs_per_second": 0.5}
    assert pretrain.progress(worst, 10**6, 32).endswith("left 740d")
    assert len(pretrain.progress(worst, 10**6, 32)) <= 80


def test_a_collapse_and_a_byol_whose_cosine_stays_high_are_warned_of(capsys):
    def warned(*more: str, step: int = 2000, **seen: float) -> str:
        record = {"step": step, "std": 0.06, "cosine": 0.3} | seen
        pretrain.judge(record, cycle_ends=True, args=flags(*more))
        return capsys.readouterr().err

    assert "cosine is 0.70" in warned(cosine=0.7) and "COLLAPSE" in warned(std=0.001)
    for quiet in (warned(), warned(cosine=0.7, step=500), warned("--negatives", "0.2", cosine=0.7)):
        assert quiet == ""


def test_help_shows_every_default_and_every_choice_the_paper_leaves_open():
    status, text, _ = here("--help")
    assert status == 0 and "RS-BYOL-3 RGB-S1S2" in text and "[open]" in text
    settings = vars(pretrain.make_parser().parse_args([]))
    told = " ".join(text.split())
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert f"(default: {value})" in told, name


# Interruptions: runs that are killed are forked, after torch's import, which takes most of a start.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torchvision.transforms.v2", "safetensors.torch", "pytest"])


def die_in(name: str, left: int) -> None:
    """Be killed in the n-th call of a function of pretrain.py, or of os."""
    module = os if hasattr(os, name) else pretrain
    real = getattr(module, name)

    def deadly(*a: object, **k: object) -> object:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)

    setattr(module, name, deadly)


def disk_is_full(after: int) -> None:
    """A process may write no file larger than this: what a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))


def reader_goes_away() -> None:
    """As `| head` does: nobody reads what is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def child(arguments: list[str], errors: str, trouble: partial | None) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv, pretrain.make_encoder = ["pretrain.py", *arguments], small_encoder
    if trouble:
        trouble()
    sys.exit(pretrain.run())


def fork(errors: Path, trouble: partial | None, *arguments: object) -> tuple[int, str]:
    """pretrain.py in a process of its own that meets `trouble`: status and stderr."""
    given = [*map(str, arguments)], str(errors), trouble
    process = FORKED.Process(target=child, args=given)
    process.start()
    process.join()
    return process.exitcode, errors.read_text()


# The first save comes after step 4, between log lines. Before it config.json, log.jsonl, views.png
# and epoch 1's encoder were renamed; it renames checkpoint.pt, then encoder.safetensors.
@pytest.mark.parametrize(
    "function, call, resumed_at", [("train_step", 7, 4), ("replace", 5, 0), ("replace", 6, 4)],
    ids=["in a step", "before a checkpoint", "between a checkpoint and its encoder"],
)  # fmt: skip
def test_resume_after_sigkill_is_bit_identical(
    function, call, resumed_at, finished, archive, tmp_path
):
    out = tmp_path / "killed"
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--checkpoint-every", "4",
              "--out", out]  # fmt: skip
    status, _ = fork(tmp_path / "errors", partial(die_in, function, call), *common)
    assert status == -signal.SIGKILL
    said = trained("--resume", "--out", out)
    assert (f"resumed at step {resumed_at} of 12" if resumed_at else "from the start") in said
    assert not list(out.glob(".*.part"))
    same_run(out, finished)


def test_a_full_disk_keeps_the_checkpoint_before(finished, archive, tmp_path):
    out = tmp_path / "full"
    trained("--mode", "single", "--root", archive, *SMALL, *REST, "--out", out, "--max-steps", 5)
    before = (out / "checkpoint.pt").read_bytes()
    trouble = partial(disk_is_full, 1 << 20)  # a checkpoint is larger
    status, said = fork(tmp_path / "errors", trouble, "--resume", "--out", out)
    assert status == 1 and said.count("\n") == 1, said
    assert f"cannot save {out}" in said and "--resume" in said
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob(".*.part"))
    trained("--resume", "--out", out)
    same_run(out, finished)


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "pretrain.py"), *map(str, arguments)]


def test_the_start_advises_short_runs_and_the_end_names_the_next_command(archive, tmp_path):
    common = ["--root", archive, *SMALL, "--max-steps", 1]
    said = trained("--mode", "rgb", *common, "--out", tmp_path / "a")
    assert "few steps: try --recipe small" in said
    assert "--band Red,Green,Blue" in said  # as they were trained on, not by wavelength
    said = trained("--mode", "single", "--recipe", "small", *common, "--out", tmp_path / "b")
    assert "few steps" not in said and "--band Blue " in said


def test_any_second_signal_leaves_at_once():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # not as nohup leaves them, under which SIGHUP stays ignored
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        asked = pretrain.listen()
        signal.raise_signal(signal.SIGHUP)
        assert asked == [signal.SIGHUP]
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(archive, tmp_path):
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command("--mode=single", "--root", archive, *NET, *SMALL, "--epochs", 10**5, "--out", out),
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not process.stdout.readline().startswith("epoch"):
        pass
    process.terminate()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and stderr == "" and "--resume --out" in stdout
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert log_of(out)[-1]["step"] <= state["step"]


def test_a_reader_that_goes_away_does_not_end_a_run(archive, tmp_path):
    out = tmp_path / "run"
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", out]
    assert fork(tmp_path / "errors", partial(reader_goes_away), *common) == (0, "")
    assert log_of(out)[-1]["step"] == 12


def test_resume_takes_all_settings_and_refuses_others_by_name(finished, archive):
    kept = [path for path in finished.iterdir() if path.name != "config.json"]  # --threads is in it
    before = {path: path.read_bytes() for path in kept}
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", finished]
    assert "holds another run" in refused(2, *common)
    message = refused(2, "--resume", "--out", finished, "--tau", "0.99", "--recipe", "small")
    assert "--tau was 0.9, is 0.99" in message and "--recipe was paper, is small" in message
    assert "--seed" not in message and "--lr was 0.2, is 0.03" in message
    assert "resumed at step 12 of 12" in trained("--resume", "--out", finished, "--threads", "2")
    assert before == {path: path.read_bytes() for path in kept}


def test_resume_goes_on_with_what_the_last_resume_changed(copy_of, archive, tmp_path):
    moved = shutil.copytree(archive, tmp_path / "moved")
    trained("--resume", "--out", copy_of, "--root", moved, "--epochs", 5, "--log-every", 3)
    config = json.loads((copy_of / "config.json").read_text())
    assert (config["settings"]["root"], config["settings"]["epochs"]) == (str(moved), 5)
    said = trained("--resume", "--out", copy_of)
    assert json.loads((copy_of / "config.json").read_text())["settings"]["log_every"] == 3
    assert f"pairs of {moved}" in said and "resumed at step 15 of 15" in said
    fewer = refused(2, "--resume", "--out", copy_of, "--epochs", 2)
    assert "is at epoch 5, past --epochs 2" in fewer
    assert "resumed at step 15 of 15" in trained("--resume", "--out", copy_of, "--epochs", 5)


@pytest.mark.parametrize("data", ["eurosat", "csv"])
def test_what_a_run_says_to_type_next_is_right(archive, tmp_path, monkeypatch, data):
    root = ["--root", archive]
    if data == "csv":
        root = ["--pairs", write_table(tmp_path / "pairs.csv", *sides_of(archive))]
        root += ["--s2-bands", ", ".join(pretrain.SEN12MS_S2)]
    out = tmp_path / "a run"
    said = trained("--mode", "three", *root, *SMALL, "--max-steps", 1, "--out", out)
    assert "\nstopped at step 1 by --max-steps, in " in said and "\ndone in " not in said
    typed = shlex.split(said.partition("next: python probe.py ")[2].replace("\\\n", ""))
    monkeypatch.chdir(tmp_path)
    Path("data/eurosat").mkdir(parents=True)
    Path("LABELS.csv").touch()
    args = probe.arguments(typed)
    assert (args.dataset, args.weights) == (data, str(out / "encoder.safetensors"))
    assert (args.bands, args.bn) == ("Blue,Green,Red", "reestimate")
    assert args.bands_in_file == (", ".join(pretrain.SEN12MS_S2) if data == "csv" else None)


def sides_of(archive: Path) -> tuple[list[Path], list[Path]]:
    """The S1 and S2 files of an archive in SEN12MS layout, pair by pair."""
    s2 = sorted(archive.glob("ROIs*/s2_*/*.tif"))
    s1 = [Path(str(path).replace("s2_", "s1_").replace("_s2", "_s1")) for path in s2]
    assert all(path.exists() for path in s1)
    return s1, s2


def write_table(table: Path, s1: list[Path], s2: list[Path]) -> Path:
    table.write_text("s1,s2\n" + "".join(f"{a},{b}\n" for a, b in zip(s1, s2, strict=True)))
    return table


def test_other_partners_are_refused(archive, tmp_path):
    s1, s2 = sides_of(shutil.copytree(archive, tmp_path / "sen12ms"))
    table, out = write_table(tmp_path / "pairs.csv", s1, s2), tmp_path / "run"
    trained("--mode", "single", "--pairs", table, *SMALL, "--max-steps", 1, "--out", out)
    write_table(table, [*s1[1:], s1[0]], s2)
    assert "other pairs" in refused(2, "--resume", "--out", out)
    write_table(table, s1, s2)
    assert "resumed at step 1" in trained("--resume", "--out", out, "--max-steps", 2)
    table.write_text(table.read_text() + f"{s1[0]},{s2[0]}\n")  # a pair twice counts once
    assert "resumed at step 2" in trained("--resume", "--out", out, "--max-steps", 3)


@pytest.mark.parametrize("change", [np.flipud, lambda x: np.pad(x, [(0, 1), (0, 1), (0, 0)])],
                         ids=["pixels", "sizes"])  # fmt: skip
def test_other_files_under_the_same_names_are_told_of(archive, tmp_path, change):
    root, out = shutil.copytree(archive, tmp_path / "sen12ms"), tmp_path / "run"
    trained("--mode", "single", "--root", root, *SMALL, "--max-steps", 1, "--out", out)
    began = json.loads((out / "config.json").read_text())["pairs"]
    for path in root.glob("ROIs*/*/*.tif"):
        pixels = change(tifffile.imread(path))
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    status, _, err = here("--resume", "--out", out, "--max-steps", 2)
    assert status == 0 and "files of the archive are others than at the start" in err
    assert json.loads((out / "config.json").read_text())["pairs"] == began
    trained("--mode", "single", "--root", root, *SMALL, "--max-steps", 1, "--out", tmp_path / "new")
    new = json.loads((tmp_path / "new/config.json").read_text())["pairs"]
    assert new["sha256"] == began["sha256"] and new["files"] != began["files"]


@pytest.mark.parametrize("value", [-21.77, -3.4e38])
def test_a_constant_band_and_an_untagged_fill_value_are_refused(archive, tmp_path, value):
    root = shutil.copytree(archive, tmp_path / "sen12ms")
    for path in root.glob("ROIs*/s1_*/*.tif"):
        pixels = tifffile.imread(path)
        pixels[: 2 if value < -1e30 else None, :, 0] = value
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    arguments = ["--mode", "single", "--root", root, *SMALL, "--out", tmp_path / "run"]
    assert "SAR1/VV's deviation" in refused(1, *arguments, "--max-steps", 1)


def test_an_encoder_says_which_code_and_archive_made_it(copy_of):
    with safe_open(copy_of / "encoder.safetensors", "pt") as file:
        about = file.metadata()
    assert about["code"] == pretrain.CODE
    config = json.loads((copy_of / "config.json").read_text())
    assert about["archive"] == config["pairs"]["files"][:12]
    config["versions"]["pretrain.py"] = "another"
    (copy_of / "config.json").write_text(json.dumps(config))
    status, _, err = here("--resume", "--out", copy_of, "--epochs", 5)
    assert status == 0 and "started by another version of this script" in err
    assert not here("--resume", "--out", copy_of)[2]  # it is noted
    with safe_open(copy_of / "encoder.safetensors", "pt") as file:
        assert file.metadata()["code"] == f"another+{pretrain.CODE}"


def test_a_run_that_was_made_longer_stays_so(copy_of):
    """Also where it is cut short again and resumed without a flag."""
    trained("--resume", "--out", copy_of, "--epochs", 6, "--max-steps", 13)
    assert "resumed at step 13 of 18" in trained("--resume", "--out", copy_of)
    assert json.loads((copy_of / "config.json").read_text())["settings"]["epochs"] == 6


def test_a_part_of_a_run_is_not_overwritten(copy_of, archive):
    (copy_of / "checkpoint.pt").rename(copy_of / "kept")
    assert "no checkpoint.pt" in refused(2, "--resume", "--out", copy_of, "--epochs", 5)
    (copy_of / "config.json").unlink()
    for name in ("encoder.safetensors", "checkpoint.pt"):
        for more in ([], ["--resume"]):
            message = refused(2, "--mode", "single", "--root", archive, *SMALL, "--seed", 7,
                              "--out", copy_of, *more)  # fmt: skip
            assert f"{name} without its config.json" in message
        (copy_of / "kept").rename(copy_of / "checkpoint.pt")
        (copy_of / "kept").write_bytes(b"")


def test_a_finished_run_gives_its_encoder_again(copy_of, finished):
    """Where it was deleted, or a kill came between the last checkpoint and it."""
    encoder = copy_of / "encoder.safetensors"
    for spoil in (encoder.unlink, lambda: os.utime(encoder, (0, 0))):
        spoil()
        trained("--resume", "--out", copy_of)
        same_run(copy_of, finished)
        assert encoder.stat().st_mtime > 0


def test_one_flipped_bit_of_a_checkpoint_is_found(copy_of):
    file = copy_of / "checkpoint.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)
    assert "damaged" in refused(1, "--resume", "--out", copy_of, "--epochs", 5)


def test_no_hand_edited_config_ends_in_a_traceback(copy_of):
    """Each key taken out, or something else in its place: one line, or it does not matter."""
    file = copy_of / "config.json"
    whole = json.loads(file.read_text())
    places = [(key, None) for key in whole]
    places += [(key, inner) for key in ("bands", "pairs") for inner in whole[key]]
    places += [("settings", inner) for inner in ("exclude", "arch", "seed", "views", "size")]
    places += [("versions", "torch")]
    for (key, inner), value in itertools.product(places, ("gone", None, "x", ["x"], [["1"]])):
        edited = json.loads(json.dumps(whole))
        within, name = (edited, key) if inner is None else (edited[key], inner)
        if value == "gone":
            del within[name]
        else:
            within[name] = value
        file.write_text(json.dumps(edited))
        status, _, err = here("--resume", "--out", copy_of)
        assert status in (0, 1, 2) and err.count("\n") <= 1, (key, inner, value, err)
    as_words = whole["bands"] | {"mean": [str(value) for value in whole["bands"]["mean"]]}
    file.write_text(json.dumps(whole | {"bands": as_words}))
    assert "resumed at step 12" in trained("--resume", "--out", copy_of)
    file.write_text(json.dumps(whole)[1:])
    assert "config.json is damaged" in refused(1, "--resume", "--out", copy_of)


def test_no_hand_edited_checkpoint_is_trained_on(copy_of):
    file = copy_of / "checkpoint.pt"
    whole = torch.load(file, weights_only=True)
    for name, value in [("step", 2.5), ("step", -5), ("more", 3), ("optimizer", {})]:
        torch.save(whole | {name: value}, file)
        assert "damaged" in refused(1, "--resume", "--out", copy_of, "--epochs", 5), name
    whole["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2)  # a segmentation fault
    torch.save(whole, file)
    assert "damaged" in refused(1, "--resume", "--out", copy_of, "--epochs", 5)


def test_only_a_torn_last_line_of_the_log_is_cut(copy_of, finished):
    log = copy_of / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 13, "lo')
    trained("--resume", "--out", copy_of, "--epochs", 5, "--max-steps", 13)
    assert log_of(copy_of)[:-1] == log_of(finished)  # and step 13
    lines = whole.splitlines(True)
    log.write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    assert "log.jsonl is damaged" in refused(1, "--resume", "--out", copy_of, "--epochs", 5)


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(archive, tmp_path):
    message = refused(1, "--mode", "single", "--root", archive, *SMALL, *REST, "--lr", "1e30",
                      "--lr-min", 0, "--checkpoint-every", 1, "--out", tmp_path)  # fmt: skip
    assert "not finite" in message and "NaN" not in (tmp_path / "log.jsonl").read_text()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["byol"].values())


def test_a_compiler_that_fails_is_one_line_and_changes_nothing(
    finished, archive, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: 1 / 0)
    status, _, err = here("--mode", "single", "--root", archive, *SMALL, *REST, "--compile",
                          "--out", tmp_path)  # fmt: skip
    assert status == 0 and err.count("\n") == 1 and "torch.compile fails here" in err
    same_run(tmp_path, finished)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"),
     RuntimeError("FIND was unable to find an engine to execute this computation")],
)  # fmt: skip
def test_out_of_memory_is_one_line_and_not_taken_for_a_compiler_that_fails(
    error, archive, tmp_path, monkeypatch
):
    step = mock.Mock(side_effect=error)
    monkeypatch.setattr(pretrain, "train_step", step)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    common = ["--mode", "single", "--root", archive, *SMALL, "--compile", "--out", tmp_path]
    assert "out of memory: use a smaller --batch-size" in refused(1, *common)
    assert step.call_count == 1


def test_compiling_does_not_count_as_slow_training(archive, tmp_path, monkeypatch):
    def first_step(byol, take):
        time.sleep(2)
        return take()

    monkeypatch.setattr(pretrain, "first_step", first_step)
    trained("--mode", "single", "--root", archive, *SMALL, "--compile", "--max-steps", 2,
            "--out", tmp_path)  # fmt: skip
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["step"] == 2 and line["timing"]["pairs_per_second"] > 4  # 8 pairs in 2 s, else


def test_bf16_is_asked_of_the_gpu_that_is_used(monkeypatch):
    capability = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability[gpu.index])
    assert [pretrain.native_bf16(torch.device("cuda", i)) for i in (0, 1)] == [True, False]


# Data that is not as it should be ----------------------------------------------------------------
@pytest.fixture
def damaged(tmp_path) -> Path:
    """104 pairs, one cut short: just under 1 %."""
    root = tmp_path / "sen12ms"
    write_sen12ms(root, pairs=104, seed=1, size=32)
    tile = sorted(root.glob("ROIs*/s2_*/*.tif"))[50]
    tile.write_bytes(tile.read_bytes()[:2000])
    return root


def test_a_bad_tile_stops_a_run_or_is_replaced_by_a_good_pair_of_its_batch(damaged, tmp_path):
    common = ["--mode", "single", "--root", damaged, *SMALL, "--epochs", 1, "--batch-size", 26]
    message = refused(1, *common, "--out", tmp_path / "stop")
    bad = sorted(damaged.glob("ROIs*/s2_*/*.tif"))[50]
    assert bad.name in message and "--bad-tiles skip" in message
    out = tmp_path / "skip"
    trained(*common, "--bad-tiles", "skip", "--out", out)
    (line,) = (out / "bad_tiles.txt").read_text().splitlines()
    assert line.split("\t")[0] == str(bad.relative_to(damaged))

    common[2:4] = ["--pairs", write_table(tmp_path / "pairs.csv", *sides_of(damaged))]
    bad.unlink()  # a file that is missing is a bad one
    assert bad.name in refused(1, *common, "--out", tmp_path / "stop")
    trained(*common, "--bad-tiles", "skip", "--out", tmp_path / "missing")
    (line,) = (tmp_path / "missing/bad_tiles.txt").read_text().splitlines()
    assert bad.name in line
    bad.write_bytes(b"")
    common[2:4] = ["--root", damaged]

    other = sorted(damaged.glob("ROIs*/s1_*/*.tif"))[70]
    other.write_bytes(other.read_bytes()[:2000])
    message = refused(1, *common, "--bad-tiles", "skip", "--out", tmp_path / "many")
    assert "over 1 %" in message


def test_a_place_that_cannot_be_read_is_no_part_of_match(archive, tmp_path):
    """Six of twelve pairs are watched, not trained on; of these one, then all but one are bad."""
    root = Path(shutil.copytree(archive, tmp_path / "sen12ms"))
    common = ["--mode", "single", "--root", root, *SMALL, "--num-pairs", 6, "--epochs", 1]
    spare = pretrain.open_archive(flags(*map(str, common[2:]))).watched[1]
    for number, path in enumerate(spare[:5], 1):
        Path(path).write_bytes(Path(path).read_bytes()[:500])
        if number in (1, 5):
            out = tmp_path / str(number)
            status, _, err = here(*common, "--out", out)
            assert status == 0 and not err
            match = log_of(out)[-1]["match"]
            # The sum of ten ranks, of five places in two directions, over 10 and over the worst, 4
            assert match == 0.5 if number == 5 else (40 * match) % 1 == pytest.approx(0, abs=1e-6)


def test_a_slow_step_has_a_log_line_of_its_own(archive, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(pretrain.time, "monotonic", lambda: next(clock))
    common = ["--mode", "single", "--root", archive, *SMALL, *REST, "--out", tmp_path]
    said = trained(*common, "--log-every", 50, "--checkpoint-every", 1000)
    assert len(log_of(tmp_path)) == said.count("\nepoch ") > 4


def test_an_archive_that_vanishes_costs_no_step(archive, tmp_path, monkeypatch):
    root, steps = tmp_path / "sen12ms", []
    shutil.copytree(archive, root)
    step = pretrain.train_step

    def vanish(*arguments: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 4:
            shutil.rmtree(root)
        return step(*arguments)

    monkeypatch.setattr(pretrain, "train_step", vanish)
    out = tmp_path / "run"
    common = ["--mode", "single", "--root", root, *SMALL, "--epochs", 9, "--out", out]
    status, _, err = here(*common)
    assert status == 1 and err.count("\n") == 1 and ".tif" in err
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == len(steps) >= 4
    assert not (out / "bad_tiles.txt").exists()  # what comes back is good again


def test_pairs_that_can_be_read_again_are_not_bad_for_ever(damaged, tmp_path):
    common = ["--mode", "single", "--root", damaged, *SMALL, "--epochs", 2, "--batch-size", 26]
    common += ["--bad-tiles", "skip", "--out", tmp_path / "run"]
    tiles = sorted(damaged.glob("ROIs*/s2_*/*.tif"))
    trained(*common, "--max-steps", 4)
    tiles[50].write_bytes(tiles[51].read_bytes())
    tiles[70].write_bytes(b"")  # with the mended one it would be over 1 %
    assert here(*common, "--resume")[0] == 0
    (line,) = (tmp_path / "run/bad_tiles.txt").read_text().splitlines()
    assert tiles[70].name in line


def test_excluded_tiles_are_neither_trained_on_nor_watched(archive, tmp_path, capsys):
    tiles = sorted(archive.glob("ROIs*/s2_*/*.tif"))
    listing = tmp_path / "test_list.txt"
    listing.write_text(f"{tiles[0].name}\r\n{tiles[5].name}\r\nROIs1_s2_elsewhere.tif\r\n")
    listed = pretrain.open_archive(flags("--root", str(archive), "--exclude", str(listing),
                                         "--batch-size", "4"))  # fmt: skip
    left = {Path(path).name for path in [*listed.files[0], *listed.watched[0]]}
    assert left == {tile.name for tile in tiles} - {tiles[0].name, tiles[5].name}
    status, said, err = here("--mode", "single", "--root", archive, *SMALL, "--exclude", listing,
                             "--max-steps", 1, "--out", tmp_path / "run")  # fmt: skip
    assert status == 0 and not err and "2 pairs left out by the 3 lines of" in said
    assert "epoch 0.5 loss" in said  # a run that ends between two log lines says where it is
    with safe_open(tmp_path / "run" / "encoder.safetensors", "pt") as file:
        assert file.metadata()["exclude"] == "2 pairs of test_list.txt"
    lists = {  # as written by other programs: how many of the 12 pairs are left
        "\ufeff" + tiles[0].name: 11,
        f"{tiles[0].relative_to(archive)}\n{tiles[5].name}\n": 10,
        f"elsewhere/{tiles[0].name}\n{tiles[5].name}\n": 11,
    }
    for text, left in lists.items():
        listing.write_text(text, encoding="utf-8")
        capsys.readouterr()
        arguments = flags("--root", str(archive), "--exclude", str(listing), "--batch-size", "4")
        assert len(pretrain.open_archive(arguments).names) == left
        assert f"{12 - left} pairs left out" in capsys.readouterr().out
    odd = os.fsdecode(b"ROIs1_caf\xe9_s2_p1.tif")  # a name that is not UTF-8
    for s in ("s2", "s1"):
        folder = tmp_path / "odd" / "ROIs1" / f"{s}_1"
        folder.mkdir(parents=True)
        for name in (odd, tiles[0].name):
            (folder / name.replace("_s2_", f"_{s}_")).touch()
    listing.write_bytes(os.fsencode(odd))
    arguments = flags("--root", str(tmp_path / "odd"), "--exclude", str(listing))
    arguments.batch_size = 1
    assert pretrain.open_archive(arguments).names == [f"ROIs1/s2_1/{tiles[0].name}"]
    common = ["--mode", "single", "--root", archive, *SMALL, "--exclude", listing]
    listing.write_bytes(tiles[0].name.encode("utf-16"))
    assert "names no tile" in refused(2, *common, "--out", tmp_path / "none")
    assert "no-list" in refused(2, "--mode", "single", "--root", archive, "--exclude", "no-list")
    listing.write_text("nothing.tif\n")
    assert "names no tile" in refused(2, "--mode", "single", "--root", archive, *SMALL, "--exclude",
                                      listing, "--out", tmp_path / "none")  # fmt: skip


def test_tiles_of_other_shapes_are_no_pair(archive, tmp_path):
    s1, s2 = sides_of(archive)
    half = tmp_path / "half.tif"
    tifffile.imwrite(half, np.zeros((2, 32, 64), np.float32), planarconfig="separate")
    table = write_table(tmp_path / "pairs.csv", [*s1[:5], half, *s1[6:]], s2)
    out = tmp_path / "out"
    said = refused(1, "--mode", "single", "--pairs", table, *SMALL, *REST, "--out", out)
    assert f"{s2[5]} is 64 x 64, {half} 32 x 64: they do not show the same ground" in said
    assert not out.exists()
    trained("--mode", "single", "--views", "ms-ms", "--pairs", table, *SMALL, *REST, "--out", out)


def test_linear_power_and_whole_scenes_are_warned_of(tmp_path):
    import tifffile

    for name, bands, high in (("s1", 2, 0.5), ("s2", 13, 3000)):
        values = np.random.default_rng(0).uniform(0, high, (bands, 2100, 16)).astype(np.float32)
        for place in range(4):
            tifffile.imwrite(tmp_path / f"{name}-{place}.tif", values, planarconfig="separate")
    rows = [f"s1-{place}.tif, s2-{place}.tif\n" for place in range(4)]
    (tmp_path / "pairs.csv").write_text("s1, s2\n" + "".join(rows))
    status, _, err = here("--mode", "single", "--pairs", tmp_path / "pairs.csv", *SMALL,
                          "--max-steps", 1, "--out", tmp_path / "run")  # fmt: skip
    assert status == 0 and "10*log10" in err and "gdal_retile.py" in err


def test_a_missing_archive_says_where_to_get_one(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        status, _, err = here("--mode", "single", "--root", root, "--out", tmp_path / "out")
        assert status == 2 and str(root) in err
        assert "m1474000" in err and "tests/synthetic.py" in err
    assert not (tmp_path / "out").exists()


def test_wrong_use_is_one_clear_line(archive, tmp_path):
    pairs = tmp_path / "pairs.csv"
    tiles = sorted(archive.glob("ROIs*/s2_*/*.tif"))[:4]
    rows = [f"{str(tile).replace('s2_', 's1_')},{tile}\n" for tile in tiles]
    pairs.write_text("s1,s2\n" + "".join(rows))
    s1, s2 = rows[0].strip().split(",")
    csv = ["--pairs", pairs, *SMALL, "--out", tmp_path / "out"]
    lone = tmp_path / "lone"
    shutil.copytree(archive, lone)
    sorted(lone.glob("ROIs*/s1_*/*.tif"))[3].unlink()
    (tmp_path / "file").write_text("")
    (tmp_path / "short.csv").write_text(f"s1,s2\n{s1},{s2}\n{s1}\n")
    (tmp_path / "latin.csv").write_bytes(b"s1,s2\n\xe9,\xe9\n")
    other = ["--mode", "single", *SMALL, "--pairs"]
    cases = [
        (1, ["--mode", "single", "--root", lone, *SMALL], ["has no twin"]),
        (1, ["--mode", "single", *csv, "--s2-bands", "B02,B03"], ["13 bands", "--s2-bands"]),
        (2, ["--mode", "rgb", *csv, "--s2-bands", "B02,B03"], ["Red", "2 other MS", "Blue, Green"]),
        (2, ["--mode", "three", *csv, "--s1-bands", "VH,-"], ["2 of SAR1, SAR2; this"]),
        (2, ["--mode", "single", *csv, "--s2-bands", "B02,B77"], ["'B77'"]),
        (2, ["--mode", "single", *csv, "--s2-bands", "B02,VV"], ["wrong file"]),
        (2, [*other, tmp_path / "none.csv"], ["none.csv"]),
        (1, [*other, tmp_path / "short.csv"], ["short.csv: line 3: 1 values"]),
        (1, [*other, tmp_path / "latin.csv"], ["latin.csv", "utf-8"]),
        (2, ["--mode", "single", "--root", archive], ["12 pairs fill no batch"]),
        (1, ["--mode=single", "--root", archive, *SMALL, "--out", tmp_path / "file"], ["file"]),
        (2, ["--mode", "single", *csv, "--lr", "0.001"], ["below --lr-min 0.002"]),
        (2, ["--mode", "single", "--size", "3"], ["--size"]),
        (2, ["--mode", "single", "--size", "100000"], ["--size"]),
        (2, ["--mode", "single", "--threads", "1000000"], ["--threads"]),
        (2, ["--mode", "double"], ["--mode"]),
        (2, [], ["--mode is needed"]),
        (2, ["--resume", "--out", tmp_path / "nothing"], ["no run in"]),
        (2, ["--mode", "single", "--device", "cuda:7"], ["cuda:7"]),
        (2, ["--mode", "single", "--device", "mps"], ["mps"]),
    ]  # fmt: skip
    for status, arguments, parts in cases:
        message = refused(status, *arguments)
        assert all(part in message for part in parts), message


def test_folders_whose_names_are_not_utf8_work(archive, tmp_path):
    root = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    shutil.copytree(archive, root)
    out = os.path.join(root, "run")
    trained("--mode", "single", "--root", root, *SMALL, "--max-steps", 1, "--out", out)
    assert "resumed at step 1" in trained("--resume", "--out", out, "--max-steps", 2)
    assert b"caf\\\\udce9" in Path(out, "encoder.safetensors").read_bytes()  # its metadata, as JSON


@pytest.mark.parametrize(
    "mode, folder, file, more",
    [("single", "sar_rgb_pairs", "pairs.csv", ["--s2-bands", "Red,Green,Blue", "--s1-bands", "VH"]),
     ("three", "bigearthnet", "tiles.csv", ["--s2-bands", "B02,B03,B04,B08"])],
)  # fmt: skip
def test_any_archive_with_a_csv_of_pairs(mode, folder, file, more, tmp_path):
    pairs = SHARED / folder / file
    if not pairs.exists():
        pytest.skip(f"real data {folder} is not here")
    trained("--mode", mode, "--pairs", pairs, *more, *SMALL, "--num-pairs", 8, "--epochs", 1,
            "--out", tmp_path / "run")  # fmt: skip


# Copying: one function is another ----------------------------------------------------------------
class Tiny(torch.nn.Module):  # as timm's models: features [N, num_features]
    num_features = 12

    def __init__(self, in_chans: int):
        super().__init__()
        self.stem = torch.nn.Conv2d(in_chans, 12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).mean((2, 3))


def test_readmes_code_swaps_encoder_augmentation_and_data(archive, tmp_path, monkeypatch):
    for sensor, name in (("s2", "optical"), ("s1", "radar")):
        (tmp_path / name).mkdir()
        for place, path in enumerate(sorted(archive.glob(f"ROIs*/{sensor}_*/*.tif"))[:8]):
            shutil.copy(path, tmp_path / name / f"{place}.tif")
    timm = SimpleNamespace(create_model=lambda name, in_chans, num_classes: Tiny(in_chans))
    monkeypatch.setitem(sys.modules, "timm", timm)
    names: dict = {}
    exec(readme_code("def make_encoder"), names)
    seen = []

    def list_pairs(args):
        tiles = sorted(path.name for path in Path(args.root, "optical").glob("*.tif"))
        return [(f"optical/{tile}", f"radar/{tile}") for tile in tiles]

    def augment(x, draws, args):
        seen.append((x.shape, draws.shape))
        return x * (1 + draws[:, :1, None, None])

    for swapped in (names["make_encoder"], list_pairs, augment):
        monkeypatch.setattr(pretrain, swapped.__name__, swapped)
    out = tmp_path / "run"
    said = trained("--mode", "single", "--root", tmp_path, *SMALL, "--epochs", 1, "--out", out)
    assert ": 8 pairs" in said and "\nTiny, 0." in said
    with safe_open(out / "encoder.safetensors", "pt") as file:
        assert file.metadata()["arch"] == "Tiny"
    shapes = {k: v.shape for k, v in load_file(out / "encoder.safetensors").items()}
    assert shapes == {"stem.weight": (12, 1, 3, 3), "stem.bias": (12,)}
    assert seen == [((8, 1, 32, 32), (8, 7))] * 2  # two steps of four pairs


# More than one process, and a GPU ----------------------------------------------------------------
def test_two_processes_of_torchrun_are_killed_and_one_resumes(archive, tmp_path):
    import tifffile

    out, root = tmp_path / "run", shutil.copytree(archive, tmp_path / "sen12ms")
    for path in root.glob("ROIs*/s2_*/*.tif"):  # [H, W, 13]; a border of zeros
        pixels = tifffile.imread(path)
        pixels[: len(pixels) // 2] = 0
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    common = ["--mode", "single", "--root", root, *NET, *SMALL, *REST, "--nodata", 0]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += command(*common, "--epochs", 100, "--checkpoint-every", 5, "--out", out)[1:]
    launched = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)  # fmt: skip
    while not (out / "checkpoint.pt").exists():
        assert launched.poll() is None
        time.sleep(0.05)
    workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    assert len(workers) >= 2
    for pid in (launched.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    launched.wait()
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step % 5 == 0
    trained(*common, "--max-steps", 3, "--out", tmp_path / "alone")  # reads the same in all
    replaced = [[line["replaced"] for line in log_of(run)[:2]] for run in (out, tmp_path / "alone")]
    assert replaced[0] == replaced[1] > [0, 0]
    said = trained("--resume", "--out", out, *NET, "--epochs", 4)
    assert f"resumed at step {step} of 12" in said
    steps = [line["step"] for line in log_of(out)]
    assert steps[:8] == [2, 3, 5, 6, 8, 9, 11, 12]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_and_the_cpu_resumes(precision, gpu, archive, tmp_path):
    out = tmp_path / "run"
    common = ["--mode", "single", "--root", archive, *NET, *SMALL, *REST, "--precision", precision,
              "--device", "cuda", "--out", out]  # fmt: skip
    done = subprocess.run(
        command(*common, "--max-steps", 6), env=gpu, capture_output=True, text=True
    )
    if "has no bf16" in done.stderr:
        pytest.skip("this GPU has no bf16")
    said = [line for line in done.stderr.splitlines() if "Not enough SMs" not in line]
    assert done.returncode == 0 and not said, done.stderr
    trained("--resume", "--out", out, *NET, "--device", "cpu")
    assert all(math.isfinite(line["loss"]) for line in log_of(out))
