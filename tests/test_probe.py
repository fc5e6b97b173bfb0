"""probe.py: measures, splits, bands, weights, frozenness, results that are never stale."""

import argparse
import copy
import csv
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import bandcrop
import conftest
import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import tifffile
import torch
import torchvision
from conftest import results, runner
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.preprocessing import StandardScaler

import probe

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
CLASSES = ["Forest", "River", "SeaLake"]
CPU = torch.device("cpu")
torch.set_num_threads(1)  # tiny sizes: threads would only wait for each other


def write_eurosat(root: Path, per_class: int = 10, size: int = 32) -> Path:
    """EuroSAT's layout; band number b of class c has mean 1000 + 100 b + 300 c."""
    rng = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for n in range(per_class):
            tile = rng.normal(0, 40, (size, size, 13)) + 1000 + 100 * np.arange(13) + 300 * c
            tile[n % size] += 500
            tifffile.imwrite(root / name / f"{name}_{n}.tif", tile.astype(np.uint16),
                             photometric="minisblack", planarconfig="contig")  # fmt: skip
    return root


def write_photos(root: Path, per_class: int = 10, size: int = 32) -> Path:
    rng = np.random.default_rng(0)
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for n in range(per_class):
            photo = rng.integers(0, 60, (size, size, 3)) + 70 * c
            Image.fromarray(photo.astype(np.uint8)).save(root / name / f"{name}_{n}.jpg")
    return root


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory):
    return write_eurosat(tmp_path_factory.mktemp("data") / "eurosat")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos")


def settings(root, out, *more, dataset="eurosat-rgb", band="Red", weights="random"):
    """Command line of a small quick run."""
    argv = ["--dataset", dataset, "--root", str(root), "--band", band, "--out", str(out)]
    argv += ["--arch", "resnet18", "--size", "32", "--epochs", "2", "--weights", str(weights)]
    return [*argv, *map(str, more)]


probe_run, refused = runner(probe, settings), partial(conftest.refused, probe)


def read(images, rows, bands):
    """Standardised images and how they were standardised."""
    args = argparse.Namespace(size=32, device=CPU, stats="train")
    setup = probe.set_up(args, images, bands, rows)
    return torch.cat([x.clone() for x in probe.read_ahead(setup, rows)]), setup


# ------------------------------------------------------------------------------------- measures
def test_f1_averages_over_the_classes_of_the_truth_as_scikit_learn_does_when_told_them():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 5, 300), rng.integers(0, 6, 300)  # 5 is only predicted
    found = probe.f1_metrics(truth, said, list("abcdefg"))
    for average in ("macro", "weighted"):
        expected = f1_score(truth, said, average=average, labels=range(5))
        assert found[f"f1_{average}"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx((truth == said).mean())
    assert [*found["f1_per_class"]] == found["classes"] == list("abcde")
    assert found["only_predicted"] == ["f"]
    expected = f1_score(truth, said, average=None, labels=range(5))
    assert list(found["f1_per_class"].values()) == pytest.approx(expected)
    assert found["confusion"] == confusion_matrix(truth, said, labels=range(7)).tolist()
    by_hand = probe.f1_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2]), list("abc"))
    assert by_hand["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def features(n=200, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 6)) * [1, 5, 0.1, 2, 3, 1]).astype(np.float32)
    y = (x[:, 0] + x[:, 1] / 5 + rng.normal(0, 0.5, n) > 0).astype(int) + (x[:, 2] > 0.05)
    return torch.from_numpy(x), torch.from_numpy(y)


def test_the_linear_head_is_logistic_regression_that_has_converged():
    x, y = features()
    [head] = probe.fit_heads("linear", [("lbfgs", 1e-4)], x, y, 3, 1)
    assert head[-1].n_iter_.max() < head[-1].max_iter
    scaled = StandardScaler().fit_transform(x)
    other = LogisticRegression(C=1 / (2 * 1e-4 * 200), tol=1e-8, max_iter=10_000).fit(scaled, y)
    assert (probe.predict(head, x) == other.predict(scaled)).mean() > 0.99


def test_the_knn_head_votes_by_cosine_similarity():
    (x, y), (new, _) = features(), features(50, 1)
    [head] = probe.fit_heads("knn", [("cosine", 5)], x, y, 3, 1)
    scale = StandardScaler().fit(x)
    a, b = (scale.transform(each) for each in (new, x))
    near = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    votes = np.zeros((50, 3))
    for row, place in enumerate(np.argsort(-near)[:, :5]):
        np.add.at(votes[row], y.numpy()[place], 1 + near[row, place])
    assert (probe.predict(head, new) == votes.argmax(1)).mean() > 0.97


def test_mlp_heads_learn_separable_features_and_have_the_papers_layers(monkeypatch):
    monkeypatch.setattr(probe, "LEAST_STEPS", 1)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = torch.from_numpy((rng.normal(size=(300, 20)) + 4 * np.eye(20)[y]).astype(np.float32))
    for head in probe.fit_heads("mlp", probe.CHOICES["mlp"][:2], x, torch.from_numpy(y), 3, 20):
        layers = [type(layer).__name__ for layer in head]
        assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert head[0].out_features == 128
        assert (probe.predict(head, x) == y).mean() > 0.97


def test_heads_trained_side_by_side_are_those_trained_alone(monkeypatch):
    build, (x, y) = probe.build_head, features()

    def same(width, classes):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return build(width, classes)

    def fit(settings):
        torch.manual_seed(0)
        return probe.fit_mlps(x, y, 3, settings, 3)

    monkeypatch.setattr(probe, "build_head", same)
    monkeypatch.setattr(probe, "LEAST_STEPS", 1)
    together = fit(probe.CHOICES["mlp"])
    for setting, head in zip(probe.CHOICES["mlp"], together, strict=True):
        [alone] = fit([setting])
        for a, b in zip(head.state_dict().values(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_head_on_few_images_takes_as_many_steps_as_it_needs(monkeypatch):
    """With 100 steps on 50 labels the statistics lost 0.05 F1, more than encoders did."""
    x, y = features()

    def fit(least, epochs):
        monkeypatch.setattr(probe, "LEAST_STEPS", least)
        torch.manual_seed(0)
        [head] = probe.fit_mlps(x, y, 3, [("sgd", 0.01)], epochs)
        return head[0].weight

    assert len(x) <= probe.HEAD_BATCH  # one batch an epoch
    assert torch.equal(fit(9, 1), fit(1, 9)) and torch.equal(fit(5, 9), fit(1, 9))


def test_the_scale_of_a_feature_does_not_decide_how_well_its_head_learns(monkeypatch):
    """With raw features the statistics, which differ most in scale, lost 0.06 F1."""
    monkeypatch.setattr(probe, "LEAST_STEPS", 1)
    x, y = features()
    x = torch.cat([x, torch.full((len(x), 1), 3.0)], 1)  # a constant one
    scale = torch.tensor([1, 1e-3, 1e3, 10, 0.1, 1, 1])
    said = []
    for seen in (x, 40 + x * scale):
        torch.manual_seed(0)
        [head] = probe.fit_mlps(seen, y, 3, [("sgd", 0.01)], 30)
        said.append(probe.predict(head, seen))
    assert (said[0] == said[1]).mean() > 0.99


@pytest.mark.parametrize(
    "listed, fitted", [(False, [[0, 1, 2], [0, 1, 2, 3, 4]]), (True, [[0, 1, 2]])]
)
def test_settings_are_chosen_on_the_validation_part(listed, fitted):
    truth, seen = np.array([0, 1, 2, 0, 1, 2]), []

    def fit(settings, rows):
        seen.append(rows.tolist())
        return settings

    def classify(setting, rows):  # others than the best are right where they were fit and tested
        wrong = (setting[1] != 7) & np.isin(rows, [3, 4])
        return (truth[rows] + wrong) % 3

    images = probe.Images([], [], {}, (), truth, list("abc"))
    split = probe.Split(np.arange(3), np.array([3, 4]), np.array([5]), listed)
    settings = [("sgd", 1), ("sgd", 7), ("adam", 3)]
    assert probe.choose(settings, fit, classify, images, split) == (("sgd", 7), ("sgd", 7))
    assert seen == fitted


def test_the_floor_is_twelve_statistics_of_each_band():
    x = torch.randn(4, 2, 9, 11, generator=torch.Generator().manual_seed(0)) * 3 + 1
    found = probe.BandStatistics()(x).numpy().reshape(4, 12, 2)
    flat = x.numpy().reshape(4, 2, -1).astype(float)
    expected = [flat.mean(-1), flat.std(-1, ddof=1)]
    expected += [np.percentile(flat, p, axis=-1, method="nearest") for p in (0, 10, 25, 50, 75, 90)]
    expected.append(flat.max(-1))
    down = np.diff(x.numpy(), axis=2)[..., :-1]
    across = np.diff(x.numpy(), axis=3)[..., :-1, :]
    expected += [np.abs(down).mean((2, 3)), np.abs(across).mean((2, 3))]
    expected.append(np.sqrt(down**2 + across**2).std((2, 3), ddof=1))
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-4)


# --------------------------------------------------------------------------------------- splits
def test_a_stratified_draw_has_the_exact_count_no_repeats_and_each_class_in_proportion():
    labels = np.repeat([0, 1, 2], [50, 31, 19])
    draw = probe.stratified(labels, 37, np.random.default_rng(0))
    assert len(draw) == len(set(draw.tolist())) == 37
    share = np.bincount(labels[draw])
    assert np.abs(share - np.array([50, 31, 19]) * 0.37).max() < 1
    again = probe.stratified(labels, 37, np.random.default_rng(0))
    other = probe.stratified(labels, 37, np.random.default_rng(1))
    assert (draw == again).all() and (draw != other).any()


def options(**given):
    default = {"split": "random", "subset": None, "train_images": None, "dataset": "eurosat"}
    return argparse.Namespace(**default | {"root": Path(".")} | given)


def test_random_split_is_a_partition_80_to_20_stratified_and_moves_with_the_seed():
    labels = np.array([0] * 100 + [1] * 50)
    fit, val, test, listed = probe.split_images(labels, None, options(), 0)
    assert sorted([*fit, *val, *test]) == list(range(150)) and not listed
    assert (len(fit), len(val), len(test)) == (96, 24, 30)
    assert (labels[test] == 1).sum() == 10
    assert set(test) != set(probe.split_images(labels, None, options(), 1)[2])


def test_a_subset_shrinks_both_parts_and_train_images_the_training_part_alone(capsys):
    labels = np.array([0] * 120 + [1] * 80)
    fit, val, test, _ = probe.split_images(labels, None, options(subset=50), 3)
    assert len({*fit, *val, *test}) == 50 and len(test) == 10
    whole = probe.split_images(labels, None, options(), 3)
    fit, val, test, _ = probe.split_images(labels, None, options(train_images=20), 3)
    assert set(test) == set(whole[2]) and not {*fit, *val} & set(test)
    assert len({*fit, *val}) == 20 and (labels[[*fit, *val]] == 1).sum() == 8
    with pytest.raises(SystemExit) as ended:
        probe.split_images(labels, None, options(train_images=161), 3)
    assert ended.value.code == 2 and "160 images are there" in capsys.readouterr().err


@pytest.mark.parametrize("split, stem", [("official", "eurosat"), ("spatial", "eurosat-spatial")])
def test_published_lists_are_followed_and_a_listed_validation_part_is_kept(
    tmp_path, split, stem, capsys
):
    names = [f"tile_{n}" for n in range(10)]
    images = probe.Images(names, [("x.tif",)] * 10, {}, (13,), None, [])
    lists = {"train": [0, 1, 2], "val": [5, 6], "test": [9, 8, 7]}
    for part, rows in lists.items():  # the lists say .jpg, the files are .tif
        lines = "".join(f"tile_{row}.jpg\r\n" for row in rows)
        (tmp_path / f"{stem}-{part}.txt").write_text(lines)
    args = options(split=split, root=tmp_path)
    parts = probe.listed_parts(images, args)
    fit, val, test, listed = probe.split_images(np.array([0, 1] * 5), parts, args, 0)
    assert [*fit] == [0, 1, 2] and [*val] == [5, 6] and [*test] == [7, 8, 9] and listed
    assert not capsys.readouterr().out
    assert probe.listed_parts(images._replace(names=names[1:9]), args)[6:] == ["test", "test"]
    assert capsys.readouterr().out == "2 of the 8 images in the lists are not there\n"
    (tmp_path / f"{stem}-test.txt").write_bytes(b"tile_0.jpg")
    with pytest.raises(SystemExit) as ended:
        probe.listed_parts(images, args)
    assert ended.value.code == 1 and "tile_0" in capsys.readouterr().err
    (tmp_path / f"{stem}-test.txt").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(SystemExit) as ended:
        probe.split_images(np.array([0, 1] * 5), probe.listed_parts(images, args), args, 0)
    assert ended.value.code == 1 and "names no image" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- bands
def test_eurosat_bands_are_read_in_the_files_order_and_standardised(eurosat):
    images = probe.list_images("eurosat", eurosat, None)
    rows = np.array([0, 7, 25])
    for band, place in (("Blue", 1), ("NIR", 7), ("SWIR2", 11), ("NNIR", 12)):
        x, setup = read(images, rows, [band])
        raw = np.stack([tifffile.imread(images.files[row][0])[..., place] for row in rows])
        assert setup.mean == pytest.approx([raw.mean()]) and setup.std == pytest.approx([raw.std()])
        np.testing.assert_allclose(x[:, 0], (raw - raw.mean()) / raw.std(), atol=1e-4)


@pytest.mark.skipif(not (REAL / "eurosat").is_dir(), reason="no ../shared/data/eurosat")
def test_b8a_is_the_last_band_of_real_eurosat_files():
    """B8A looks like B08, at its brightness; B09 (water vapour) and B10 (cirrus) are far darker."""
    images = probe.list_images("eurosat", REAL / "eurosat", None)
    tiles = np.stack([tifffile.imread(file) for (file,) in images.files]).astype(np.float64)
    mean = read(images, np.arange(len(tiles)), ["NNIR", "NIR"])[1].mean
    assert mean == pytest.approx([tiles[..., 12].mean(), tiles[..., 7].mean()])
    assert 0.9 < mean[0] / mean[1] < 1.3 and tiles[..., 9].mean() < 100  # B10 is the tenth
    tile_means = tiles.mean((1, 2))
    assert np.corrcoef(tile_means[:, 12], tile_means[:, 7])[0, 1] > 0.98


@pytest.mark.parametrize(
    "asked, bands",
    [("b05", [["RE5"]]), ("RGB", [["Red", "Green", "Blue"]]), ("VV", [["SAR1"]]),
     ("SAR", [["SAR1", "SAR2", "SAR1"]]), ("RE5,b06,RE7", [["RE5", "RE6", "RE7"]]),
     ("all", [[band] for band in probe.BANDS])],
)  # fmt: skip
def test_bands_go_by_either_name(asked, bands):
    assert probe.requested_bands(asked, dict.fromkeys(probe.BANDS), "x") == bands


def test_a_band_that_the_data_lack_is_refused_by_name(photos, tmp_path, capsys):
    refused(capsys, 2, settings(photos, tmp_path, band="B05"), "RE5 (B05)", "Red, Green, Blue")
    refused(capsys, 2, settings(photos, tmp_path, band="B99"), "'B99'", "RE5/B05")
    refused(capsys, 2, settings(photos, tmp_path, band="Red,Blue"), "one or three")


def test_files_of_another_band_count_and_unknown_names_are_refused(eurosat, tmp_path, capsys):
    table = tmp_path / "t.csv"
    rows = [f"{eurosat}/{c}/{c}_{n}.tif,{c}" for c in CLASSES for n in range(4)]
    table.write_text("\n".join(["image,label", *rows]))
    argv = settings(table, tmp_path / "out", dataset="csv", band="Blue", weights="stats")
    order = ["--bands-in-file", "B02,B03,B04,B08"]
    refused(capsys, 1, [*argv, *order], ".tif: has 13 bands, not 4")
    argv = settings(table, tmp_path / "out", dataset="csv", band="all", weights="stats")
    refused(capsys, 2, [*argv, "--bands-in-file", "B2,B3,B4"], "'B2'")
    refused(capsys, 2, [*argv, "--bands-in-file", "B02,Blue"], "twice")
    refused(capsys, 2, argv, "--bands-in-file is missing")
    assert not list((tmp_path / "out").glob("*.json"))


def write_sen12ms(root: Path, tiles: int = 12, season: str = "ROIs1158_spring") -> Path:
    rng = np.random.default_rng(0)
    for n in range(tiles):
        igbp = np.full((32, 32, 4), [10, 17, 13][n % 3], np.uint16)
        igbp[:10] = 1  # less than half
        tile = {"lc": igbp, "s2": rng.integers(0, 3000, (32, 32, 13)).astype(np.uint16),
                "s1": rng.normal(-12, 4, (32, 32, 2)).astype(np.float32)}  # fmt: skip
        if n == 0:
            tile["s1"][3, 4] = np.nan
        for kind, pixels in tile.items():
            path = root / season.format(kind) / f"{kind}_1/ROIs1158_spring_{kind}_1_p{n}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    return root


@pytest.mark.parametrize("season", ["ROIs1158_spring", "ROIs1158_spring_{}"])  # SEN12MS, -CR
def test_sen12ms_scene_labels_are_the_simplified_majority_and_nan_becomes_the_mean(
    tmp_path, season
):
    root = write_sen12ms(tmp_path / "sen12ms", season=season)
    images = probe.list_images("sen12ms", root, None)
    names = {images.names[n]: images.classes[images.labels[n]] for n in range(3)}
    assert names == {  # IGBP 10 grassland, 17 water, 13 urban; p0, p1, p10 sort first
        "ROIs1158_spring_s2_1_p0": "Grassland",
        "ROIs1158_spring_s2_1_p1": "Water",
        "ROIs1158_spring_s2_1_p10": "Water",
    }
    x, setup = read(images, np.arange(12), ["SAR2", "NNIR"])
    raw = np.stack([tifffile.imread(files[1])[..., 1] for files in images.files])
    assert setup.mean[0] == pytest.approx(np.nanmean(raw), rel=1e-5)
    assert x[0, 0, 3, 4] == 0
    s2 = tifffile.imread(images.files[5][0])[..., 8]  # B8A is the ninth of thirteen here
    np.testing.assert_allclose(x[5, 1], (s2 - setup.mean[1]) / setup.std[1], atol=1e-4)


def test_a_scene_that_is_linked_to_twice_is_refused(tmp_path, capsys):
    root = write_sen12ms(tmp_path / "sen12ms")
    (root / "ROIs1158_spring2").symlink_to(root / "ROIs1158_spring")
    argv = settings(root, tmp_path / "out", dataset="sen12ms", band="Red")
    refused(capsys, 1, argv, "spring2", "comes twice")


@pytest.mark.parametrize("inner, dataset, suffix", [
    ("", "eurosat", ".TIF"),
    ("ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "eurosat", ".tiff"),
    ("eurosat/2750", "eurosat-rgb", ".JPG"), ("NWPU-RESISC45", "resisc45", ".jpg"),
])  # fmt: skip
def test_class_folders_are_found_where_each_source_unpacks_them(tmp_path, inner, dataset, suffix):
    for name in CLASSES:
        (tmp_path / inner / name).mkdir(parents=True)
        for n in range(2):
            (tmp_path / inner / name / f"{name}_{n}{suffix}").touch()
        (tmp_path / inner / name / f"._{name}_0{suffix}").touch()
    images = probe.list_images(dataset, tmp_path, None)
    assert images.classes == CLASSES and images.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_in_several_folders_of_classes_are_refused(tmp_path, capsys):
    for name in ("2750", "copy"):
        write_photos(tmp_path / name, per_class=1)
    argv = settings(tmp_path, tmp_path / "out")
    refused(capsys, 2, argv, tmp_path / "2750", tmp_path / "copy", "--root")


# -------------------------------------------------------------------------------------- weights
@pytest.fixture(scope="module")
def resnets():
    torch.manual_seed(1)
    models = {arch: getattr(torchvision.models, arch)() for arch in ("resnet18", "resnet50")}
    for model in models.values():
        model.eval().bn1.running_mean.uniform_(-0.2, 0.2)
    return models


def layout(kind, model):
    """The same encoder as each source publishes it (FACTS section 8)."""
    state = model.state_dict()
    encoder = {k: v for k, v in state.items() if not k.startswith("fc.")}
    if kind == "byol-imagenet":
        renamed = {f"module.encoder.{n}": v for n, v in enumerate(encoder.values())}
        return {"epoch": 1, "online_backbone": renamed, "target_backbone": {}}
    if kind == "coco":
        return {f"backbone.{k}": v for k, v in encoder.items()} | {"classifier.4.bias": 0}
    if kind == "imagenet, wrapped":
        return {"state_dict": {"module.backbone." + k: v for k, v in state.items()}, "epoch": 3}
    if kind != "seco":
        return state
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    seco = {"heads_q.0.0.weight": torch.zeros(4), "queue": torch.zeros(3)}
    for key, value in encoder.items():
        first, rest = key.split(".", 1)
        seco[f"encoder_q.{places[first]}.{rest}"] = value
        seco[f"encoder_k.{places[first]}.{rest}"] = torch.zeros_like(value)
    return {"epoch": 3, "state_dict": seco, "lr_schedulers": []}


def loaded(kind, file):
    weights = probe.find_any_weights(f"{kind}:{file}", "")
    return weights, probe.load_encoder(weights, 3, 0)


@pytest.mark.parametrize("kind, arch", [
    ("imagenet", "resnet18"), ("imagenet, wrapped", "resnet18"), ("byol-imagenet", "resnet50"),
    ("seco", "resnet18"), ("coco", "resnet18"),
])  # fmt: skip
def test_each_published_layout_gives_the_encoder_it_was_made_from(kind, arch, resnets, tmp_path):
    torch.save(layout(kind, resnets[arch]), tmp_path / "weights.ckpt")
    weights, encoder = loaded(kind.split(",")[0], tmp_path / "weights.ckpt")
    assert weights.metadata["arch"] == arch
    body = torch.nn.Sequential(*list(resnets[arch].children())[:-1], torch.nn.Flatten())
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(encoder(x), body(x))
        one = x[:, :1]
        assert torch.equal(encoder(one), body(one.repeat(1, 3, 1, 1)))


def test_the_network_taken_of_several_in_a_file_is_named(resnets, tmp_path, capsys):
    own = layout("torchvision", resnets["resnet18"])
    both = {f"student.{k}": v for k, v in own.items()}
    both |= {f"teacher.{k}": torch.zeros_like(v) for k, v in own.items()}
    torch.save(both, tmp_path / "w.pth")
    _, encoder = loaded("other", tmp_path / "w.pth")
    assert torch.equal(encoder.conv1.weight, own["conv1.weight"])
    assert "file: student.*, not that with teacher.conv1" in capsys.readouterr().out
    torch.save(own, tmp_path / "w.pth")
    loaded("other", tmp_path / "w.pth")
    assert not capsys.readouterr().out


def test_an_exported_encoder_is_ours(resnets, tmp_path, capsys):
    torch.save(resnets["resnet18"].state_dict(), tmp_path / "w.pth")
    weights, encoder = loaded("imagenet", tmp_path / "w.pth")
    probe.main(probe.arguments(["--weights", weights.source, "--export", str(tmp_path / "own")]))
    assert str(tmp_path / "own") in capsys.readouterr().out
    argv = ["--weights", weights.source, "--export", tmp_path / "w.pth"]
    refused(capsys, 2, argv, tmp_path / "w.pth", "there already")
    own = probe.find_weights(str(tmp_path / "own"), "resnet50")
    assert (own.name, own.metadata["arch"]) == ("ImageNet supervised", "resnet18")
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(probe.load_encoder(own, 3, 0)(x), encoder(x))
    other = probe.find_any_weights(f"other:{tmp_path / 'w.pth'}", "resnet50")
    assert other.name == "other w" and other.metadata["arch"] == "resnet18"  # nobody else's name
    (tmp_path / "own").rename(tmp_path / "own.safetensors")
    with pytest.raises(SystemExit) as ended:  # ours under another's name
        probe.find_any_weights(f"imagenet:{tmp_path / 'own.safetensors'}", "resnet18")
    assert ended.value.code == 2 and "name it alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, other, told",
    [
        ("imagenet", "seco", "no resnet18: Error(s) in loading"),
        ("byol-imagenet", "imagenet", "it holds conv1.weight"),
    ],
)
def test_a_file_of_another_layout_is_refused(kind, other, told, resnets, tmp_path, capsys):
    torch.save(layout(other, resnets["resnet18"]), tmp_path / "weights.pt")
    with pytest.raises(SystemExit) as ended:
        loaded(kind, tmp_path / "weights.pt")
    said = capsys.readouterr().err
    assert ended.value.code == 1 and told in said and "weights.pt" in said and len(said) < 500


def test_tensors_that_are_not_finite_are_refused(photos, tmp_path, capsys):
    encoder = probe.build_encoder("resnet18", 1)
    encoder.bn1.bias.data[0] = float("nan")  # as a diverged training leaves it
    file = write_encoder(tmp_path / "e.safetensors", encoder=encoder)
    refused(capsys, 1, settings(photos, tmp_path / "out", weights=file), "NaN", "diverged")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_executes_nothing_from_the_file(tmp_path, capsys):
    bomb = Bomb()
    bomb.path = tmp_path / "executed"
    torch.save({"state_dict": {}, "hparams": bomb}, tmp_path / "bomb.ckpt")
    with pytest.raises(SystemExit):
        loaded("seco", tmp_path / "bomb.ckpt")
    assert not (tmp_path / "executed").exists()
    assert "none of it was executed" in capsys.readouterr().err


@pytest.mark.parametrize("kind, content, told", [
    ("", b"", "is empty"), ("", b"\n<!DOCTYPE html>", "a web page"), ("", b"junk", "no whole"),
    ("imagenet:", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("imagenet:", b"junk", "no whole"),
])  # fmt: skip
def test_what_is_no_weights_file_is_named_without_advice_to_load_it(
    photos, tmp_path, capsys, kind, content, told
):
    (tmp_path / "w.pth").write_bytes(content)
    argv = settings(photos, tmp_path, weights=f"{kind}{tmp_path}/w.pth")
    assert "weights_only" not in refused(capsys, 1, argv, "w.pth", told)


class Tiny(torch.nn.Module):
    """An encoder in a hundredth of the time."""

    def __init__(self):
        super().__init__()
        self.channels, self.width = 1, 4
        self.conv1, self.bn1 = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn1(self.conv1(x)).relu().mean((2, 3))


def write_encoder(path: Path, bands=("Red", "SAR1"), encoder=None, **more) -> Path:
    encoder = encoder or Tiny()
    metadata = {"name": "RS-BYOL-1", "arch": "resnet18", "mode": "single", "synthetic": "true",
                "bands": json.dumps(bands), "mean": json.dumps([100.0] * len(bands)),
                "std": json.dumps([50.0] * len(bands))} | more  # fmt: skip
    tensors = {k: v.contiguous() for k, v in encoder.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def test_our_own_encoders_bands_and_statistics_are_used_and_told(photos, tmp_path, capsys, quick):
    file = write_encoder(tmp_path / "encoder.safetensors", epoch="7")
    probe_run(photos, tmp_path, "--stats", "encoder", weights=file)
    probe_run(photos, tmp_path, weights=file, band="Green")
    red, green = sorted(results(tmp_path), key=lambda r: r["bands"] != ["Red"])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert red["weights"] == {"name": "RS-BYOL-1", "source": str(file), "sha256": digest}
    about = {"arch": "resnet18", "epoch": "7", "mode": "single", "bands": ["Red", "SAR1"]}
    assert about.items() <= red["config"]["encoder"].items()
    assert red["config"]["mean"] == [100.0] and red["config"]["std"] == [50.0]
    assert red["config"]["synthetic"] is False
    assert red["config"]["unseen_bands"] == [] and green["config"]["unseen_bands"] == ["Green"]
    said = capsys.readouterr().out
    assert "never seen by the encoder: Green" in said
    assert "(RS-BYOL-1, resnet18, epoch 7)" in said.splitlines()[0]
    argv = settings(photos, tmp_path, "--stats", "encoder", band="Green", weights=file)
    refused(capsys, 2, argv, "saw no Green", "--stats train")


@pytest.mark.parametrize("channels, band", [(1, "RGB"), (13, "Red")])
def test_weights_whose_channels_do_not_match_are_refused(photos, tmp_path, capsys, channels, band):
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    argv = settings(photos, tmp_path, band=band, weights=f"imagenet:{tmp_path}/w.pth")
    refused(capsys, 2, argv, "w.pth", f"{channels}-channel encoder, {3 if band == 'RGB' else 1} ba")


@pytest.mark.parametrize("value, said", [(-21.77, "deviation 0:"), (-3.4e38, "--nodata")])
def test_a_constant_band_and_an_untagged_fill_value_are_refused(tmp_path, capsys, value, said):
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.normal(-10, 3, (40, 40)).astype(np.float32)
        pixels[: 2 if value < -1e30 else None] = value
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels)
    table(tmp_path / "t.csv", [{"image": f"{i}.tif", "label": "ab"[i % 2]} for i in range(20)])
    argv = settings(tmp_path / "t.csv", tmp_path, "--bands-in-file", "VV", dataset="csv", band="VV")
    refused(capsys, 1, argv, "band SAR1 of 16 training images", said)


def test_a_recipe_of_its_own_statistics_stands_beside_the_floor(photos, tmp_path, capsys, quick):
    file = write_encoder(tmp_path / "encoder.safetensors")
    probe_run(photos, tmp_path, weights="stats")
    probe_run(photos, tmp_path, "--stats", "encoder", weights=file)
    ours, floor = sorted(results(tmp_path), key=lambda r: r["weights"]["name"])
    assert ours["config"]["task"] == floor["config"]["task"]
    table = capsys.readouterr().out.rpartition("f1_macro")[2].splitlines()
    assert table[1].split() == ["band", "RS-BYOL-1", "stats"]


def test_weights_that_are_no_encoder_are_refused(photos, tmp_path, capsys):
    file = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.zeros(2)}, file)
    refused(capsys, 1, settings(photos, tmp_path, weights=file), file, f"other:{file} --export")
    refused(capsys, 2, settings(photos, tmp_path, weights="nonsense"), "nonsense", "--help")
    refused(capsys, 2, settings(photos, tmp_path, weights="seco"), "seco:FILE")


def test_without_weights_the_users_own_encoder_is_probed_and_else_a_random_one(
    photos, tmp_path, monkeypatch, capsys, quick
):
    monkeypatch.chdir(tmp_path)
    argv = [word for word in settings(photos, "out") if word != "random"]
    argv.remove("--weights")
    probe.main(probe.arguments(argv))
    assert "weights: random" in capsys.readouterr().out.splitlines()[0]
    Path("runs/rs-byol-1").mkdir(parents=True)
    write_encoder(Path("runs/rs-byol-1/encoder.safetensors"))
    probe.main(probe.arguments(argv))
    said = capsys.readouterr().out
    assert "weights: runs/rs-byol-1/encoder.safetensors" in said.splitlines()[0]
    assert "Random init" in said  # beside it in the table


def test_imagenet_without_network_names_the_file_alternative(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    argv = settings(photos, tmp_path, weights="imagenet")
    refused(capsys, 1, argv, "https://download.pytorch.org/models/resnet18", "imagenet:FILE")


@pytest.mark.parametrize("data", [b"", b"another file"])
def test_a_damaged_file_in_torch_hubs_cache_is_refused(data, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "hub/hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(data)
    refused(capsys, 1, settings(photos, tmp_path, weights="imagenet"), "resnet18-f37072fd.pth")


def test_odd_contents_of_others_files_are_one_line(resnets, photos, tmp_path, capsys):
    file = tmp_path / "w.pt"
    whole = resnets["resnet18"].state_dict()
    nan = whole | {"bn1.bias": torch.full((64,), float("nan"))}
    flat = whole | {"conv1.weight": torch.zeros(64)}
    bent = whole | {"layer1.0.bn1.bias": torch.zeros(7)}
    short = {name: tensor for name, tensor in whole.items() if name != "layer4.1.bn2.bias"}
    for held in ({1: torch.zeros(1)}, {"state_dict": 3}, nan, flat, bent, short):
        torch.save(held, file)
        refused(capsys, 1, settings(photos, tmp_path / "out", weights=f"other:{file}"))
        refused(capsys, 1, ["--weights", f"other:{file}", "--export", tmp_path / "x.safetensors"])
    assert not (tmp_path / "x.safetensors").exists()


def test_the_same_image_twice_and_photos_among_geotiffs_are_refused(
    photos, eurosat, tmp_path, capsys
):
    shutil.copytree(photos, tmp_path / "photos")
    one, *_, last = sorted((tmp_path / "photos").glob("*/*.jpg"))
    last.unlink()
    last.symlink_to(one)
    refused(capsys, 1, settings(tmp_path / "photos", tmp_path / "out"), last, "comes twice")
    last.unlink()
    os.mkfifo(last)  # is no file: left out, not waited for
    assert len(probe.list_images("eurosat-rgb", tmp_path / "photos", None).files) > 1
    last.unlink()
    rows = [{"image": one, "label": "a"}, {"image": next(eurosat.glob("**/*.tif")), "label": "b"}]
    table(tmp_path / "t.csv", rows)
    argv = settings(tmp_path / "t.csv", tmp_path / "out", dataset="csv")
    refused(capsys, 1, argv, "line 3", "a table of each")
    table(tmp_path / "t.csv", [{"image": one}, {"image": one}])
    refused(capsys, 1, [*argv, "--embed", tmp_path / "x.npz"], "comes twice")
    table(tmp_path / "t.csv", [{"image": last, "label": "a"}])
    refused(capsys, 1, argv, "line 2", "no file")
    os.mkfifo(last)
    refused(capsys, 1, argv, "line 2", "no file")


def test_embed_takes_every_image_and_refuses_what_would_choose_some(photos, tmp_path, capsys):
    argv = settings(photos, tmp_path, "--embed", tmp_path / "x.npz")
    for more in (["--subset", 9], ["--train-images", 9], ["--split", "random"], ["--seeds", 2]):
        refused(capsys, 2, [*argv, *more], "every image")
    table(tmp_path / "t.csv", [{"image": next(photos.glob("*/*.jpg")), "label": "a"}])
    argv = settings(tmp_path / "t.csv", tmp_path, "--embed", tmp_path / "x.npz", dataset="csv")
    refused(capsys, 2, [*argv, "--bn", "reestimate"], "two images")


# ---------------------------------------------------------------------------------- frozenness
def test_a_batchnorm_that_drifts_fails_the_run_and_writes_nothing(
    photos, tmp_path, monkeypatch, capsys
):
    def forgets_eval(encoder, setup, rows):
        encoder.train()
        with torch.no_grad():
            return torch.cat([encoder(batch) for batch in probe.read_ahead(setup, rows)])

    monkeypatch.setattr(probe, "encode", forgets_eval)
    refused(capsys, 1, settings(photos, tmp_path), "running_mean", "changed")
    assert list(tmp_path.iterdir()) == []


def test_reestimated_batchnorm_holds_the_statistics_of_the_images(eurosat, monkeypatch):
    monkeypatch.setattr(probe, "native_bf16", lambda device: False)  # to compare in fp32
    images = probe.list_images("eurosat", eurosat, None)
    x, setup = read(images, np.arange(30), ["Red"])
    setup.args.weights = probe.find_weights("random", "resnet18")
    setup.args.bn = "reestimate"
    encoder = probe.prepare(setup, np.arange(30), 0)
    with torch.no_grad():
        first = encoder.conv1(x)
    torch.testing.assert_close(encoder.bn1.running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(encoder.bn1.running_var, first.var((0, 2, 3)), rtol=1e-3, atol=1e-6)
    assert not any(module.training for module in encoder.modules())


def test_features_are_float32_though_the_encoder_computes_in_bf16_and_must_be_finite(
    photos, monkeypatch, capsys
):
    images = probe.list_images("eurosat-rgb", photos, None)
    encoder, rows = probe.build_encoder("resnet18", 1), np.arange(6)
    x, setup = read(images, rows, ["Red"])
    with torch.no_grad():
        exact = encoder(x)
    for fast in (False, True):
        monkeypatch.setattr(probe, "native_bf16", lambda device, fast=fast: fast)
        found = probe.encode(encoder, setup, rows)
        assert found.dtype == torch.float32
        error = (found - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.02 if fast else error < 1e-6
    encoder.bn1.bias.data[0] = float("inf")
    with pytest.raises(SystemExit) as ended:
        probe.encode(encoder, setup, rows)
    assert ended.value.code == 1 and "not finite" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- results
def test_a_result_follows_the_schema_and_a_rerun_skips_it(photos, tmp_path, monkeypatch, capsys):
    seen, prove = [], probe.assert_unchanged

    def spy(encoder, before):
        prove(encoder, before)
        still = [not module.training for module in encoder.modules()]
        seen.append(all(still) and not any(p.requires_grad for p in encoder.parameters()))

    monkeypatch.setattr(probe, "assert_unchanged", spy)
    argv = (photos, tmp_path, "--seeds", 2, "--subset", 24)
    probe_run(*argv)
    assert seen == [True, True]
    first, second = sorted(results(tmp_path), key=lambda r: r["seed"])
    assert first["schema"] == 1 and first["stage"] == "probe" and first["dataset"] == "eurosat-rgb"
    assert (first["split"], first["subset"], first["bands"]) == ("random", 24, ["Red"])
    assert [first["seed"], second["seed"]] == [0, 1]
    metrics = "f1_macro f1_weighted accuracy f1_per_class classes only_predicted confusion"
    assert set(first["metrics"]) == set(metrics.split())
    assert set(first["weights"]) == {"name", "source", "sha256"}
    assert set(first["seconds"]) == {"read", "encode", "train"}
    assert {"torch", "numpy", "python"} <= set(first["versions"])
    told = "identity size arch head bn stats epochs optimiser learning_rate classes batch synthetic"
    told += " task train test train_images finetune root files images"
    assert set(told.split()) <= set(first["config"])
    assert first["config"]["train"] == 19 and first["config"]["test"] == 5
    assert np.sum(first["metrics"]["confusion"]) == 5
    said = capsys.readouterr().out
    assert all(str(path) in said for path in tmp_path.iterdir())  # every file is named

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(probe, "encode", lambda *_: pytest.fail("encoded again"))
    probe_run(*argv)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    assert capsys.readouterr().out.count("done before") == 2


@pytest.fixture
def quick(monkeypatch):
    """Networks and heads that take no time: what is left is what tells results apart."""
    monkeypatch.setattr(probe, "load_encoder", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(probe, "encode", lambda e, setup, rows: torch.zeros(len(rows), 512))
    head = torch.nn.Linear(512, 3)
    monkeypatch.setattr(probe, "fit_heads", lambda kind, settings, *_: [head] * len(settings))
    monkeypatch.setattr(probe, "fine_tune", lambda *_: torch.nn.Sequential(torch.nn.ReLU(), head))


def test_every_determinant_of_a_result_gives_a_new_one(eurosat, tmp_path, quick, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(write_encoder(tmp_path / "x").read_bytes())
    other = write_encoder(tmp_path / "y.safetensors", epoch="2")
    for name in ("a", "b"):  # equal but for the folder
        rows = []
        (tmp_path / name).mkdir()
        for n in range(30):
            source = sorted(eurosat.glob("*/*.tif"))[n]
            (tmp_path / name / f"{n}.tif").write_bytes(source.read_bytes())
            os.utime(tmp_path / name / f"{n}.tif", (1, 1))
            part = ("train", "val", "test", "train", "test")[n % 5]
            rows.append({"image": f"{n}.tif", "label": source.parent.name, "split": part})
        table(tmp_path / name / "t.csv", rows)
    relabelled = [row | {"label": "River"} if row["image"] == "3.tif" else row for row in rows]
    resplit = [row | {"split": "train"} if row["image"] == "4.tif" else row for row in rows]
    order = ",".join(probe.EUROSAT_BANDS)
    swapped = order.replace("B04", "?").replace("B08", "B04").replace("?", "B08")
    out, count = tmp_path / "out", 0

    def run(what, *more, folder="a", names=order, weights="random", **kwargs):
        """A new result, and none when the same is asked for once more."""
        nonlocal count
        count += 1
        for _ in range(2):
            probe_run(tmp_path / folder / "t.csv", out, "--bands-in-file", names, *more,
                      dataset="csv", weights=weights, **kwargs)  # fmt: skip
            assert len(results(out)) == count, what

    run("the first")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    probe_run(tmp_path / "link/t.csv", out, "--bands-in-file", order, dataset="csv",
              weights="random")  # fmt: skip
    assert len(results(out)) == 1  # the same files by another path
    run("root", folder="b")
    run("band order", names=swapped)
    run("band", band="NIR")
    run("--split", "--split", "random")
    run("--subset", "--subset", 24)
    run("--train-images", "--train-images", 12)
    run("--size", "--size", 48)
    run("--seeds", "--seeds", 2)
    native = probe.native_bf16(torch.device("cpu"))
    monkeypatch.setattr(probe, "native_bf16", lambda device: not native)
    run("bf16")
    monkeypatch.setattr(probe, "native_bf16", lambda device: native)
    run("--head", "--head", "linear")
    run("--epochs", "--epochs", 3)
    run("--bn", "--bn", "reestimate")
    run("--arch", "--arch", "resnet34")
    run("--finetune", "--finetune")
    run("the floor", weights="stats")
    run("a file of weights", weights=tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(other.read_bytes())
    run("other weights of the same name", weights=tmp_path / "w.safetensors")
    run("--stats", "--stats", "encoder", weights=other)
    run("--nodata", "--nodata", "0")
    table(tmp_path / "a/t.csv", relabelled)
    run("a label")
    table(tmp_path / "a/t.csv", resplit)
    run("the split column")
    table(tmp_path / "a/t.csv", rows[:-1])
    run("an image less")
    table(tmp_path / "a/t.csv", rows)
    (tmp_path / "a/7.tif").write_bytes((tmp_path / "a/8.tif").read_bytes())
    run("pixels")
    (tmp_path / "a/7.tif").rename(tmp_path / "a/new.tif")
    table(tmp_path / "a/t.csv", [r | {"image": r["image"].replace("7.tif", "new.tif")} if
                                 r["image"] == "7.tif" else r for r in rows])  # fmt: skip
    run("a name")
    assert len({r["config"]["identity"] for r in results(out)}) == count


def table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_an_interrupted_run_leaves_whole_results_and_the_rerun_completes_it(
    photos, tmp_path, monkeypatch, quick
):
    sync, calls = os.fsync, []

    def dies_once(file):
        calls.append(1)
        sync(file)
        if len(calls) == 2:
            os.truncate(file, 50)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", dies_once)
    with pytest.raises(KeyboardInterrupt):
        probe_run(photos, tmp_path, band="all")
    assert len(list(tmp_path.iterdir())) == len(results(tmp_path)) == 1
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    parts = [tmp_path / f".x.json.{pid}.part" for pid in (killed.pid, os.getpid())]
    for part in parts:
        part.touch()
    probe_run(photos, tmp_path, band="all")
    assert sorted(r["bands"] for r in results(tmp_path)) == [["Blue"], ["Green"], ["Red"]]
    assert len(calls) == 4  # the first band was not run again
    assert [part.exists() for part in parts] == [False, True]  # the second's process still writes


def test_a_full_disk_is_told_with_the_file(photos, tmp_path, capsys, monkeypatch, quick):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, 1, settings(photos, tmp_path), "cannot write", ".json: No space left on device")
    assert not list(tmp_path.iterdir())


def test_maps_are_added_to_a_finished_run_without_touching_it(photos, tmp_path):
    probe_run(photos, tmp_path)
    [path] = tmp_path.iterdir()
    before = path.read_bytes(), path.stat().st_mtime_ns
    probe_run(photos, tmp_path, "--cam", 2)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert Image.open(path.with_name(path.stem + "-cam.png")).size[0] > 500


def test_embed_writes_the_features_of_every_image_labelled_or_not(photos, tmp_path, capsys):
    images = probe.list_images("eurosat-rgb", photos, None)
    table(tmp_path / "t.csv", [{"image": str(file)} for (file,) in images.files])
    argv = settings(tmp_path / "t.csv", tmp_path / "out", dataset="csv", weights="stats")
    refused(capsys, 1, argv, "no column label", "--embed")
    probe.main(probe.arguments([*argv, "--embed", str(tmp_path / "all.npz")]))
    assert f"wrote {tmp_path / 'all.npz'}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    found = np.load(tmp_path / "all.npz", allow_pickle=False)
    x, _ = read(images, np.arange(30), ["Red"])
    np.testing.assert_allclose(found["features"], probe.BandStatistics()(x), rtol=1e-5)
    assert found["names"].tolist() == [file for (file,) in images.files]
    assert found["bands"].tolist() == ["Red"] and "labels" not in found and not found["synthetic"]
    refused(capsys, 2, settings(photos, tmp_path, "--embed", tmp_path / "all.npz"), "there already")
    probe_run(photos, tmp_path, "--embed", tmp_path / "photos.npz")
    found = np.load(tmp_path / "photos.npz", allow_pickle=False)
    assert found["features"].shape == (30, 512) and found["classes"].tolist() == CLASSES
    assert found["labels"].tolist() == images.labels.tolist()
    root = shutil.copytree(photos, tmp_path / "synthetic")
    (root / "SYNTHETIC.txt").write_text("as tests/synthetic.py leaves it")
    probe_run(root, tmp_path, "--embed", tmp_path / "synthetic.npz", weights="stats")
    assert np.load(tmp_path / "synthetic.npz")["synthetic"]


def test_the_table_at_the_end_has_means_and_intervals_beside_random_and_the_floor(
    photos, tmp_path, capsys, quick, monkeypatch
):
    scores, places = np.random.default_rng(0), probe.band_places
    monkeypatch.setattr(probe, "predict", lambda head, x: scores.integers(0, 3, len(x)))
    probe_run(photos, tmp_path, "--seeds", 3, weights="stats", band="all")  # one seed more
    probe_run(photos, tmp_path, "--seeds", 2)
    probe_run(photos, tmp_path, "--seeds", 2, "--size", 40)  # stands in a table of its own
    monkeypatch.setattr(probe, "band_places", lambda _: {"Red": (0, 2), "Blue": (0, 0)})
    probe_run(photos, tmp_path, "--seeds", 2)  # and so does another band order
    monkeypatch.setattr(probe, "band_places", places)
    for name, text in (("", "[]"), ("-1", "{}"), ("-2", '{"config"')):  # what is no result
        (tmp_path / f"eurosat-rgb-junk-seed0{name}.json").write_text(text)
    file = write_encoder(tmp_path / "e.safetensors")
    capsys.readouterr()
    probe_run(photos, tmp_path, "--seeds", 2, weights=file, band="all")
    lines = capsys.readouterr().out.splitlines()
    for junk in tmp_path.glob("*junk*"):
        junk.unlink()
    names = ("RS-BYOL-1", "Random init", "stats")
    assert lines[-4].split("  ")[0] == "band" and all(name in lines[-4] for name in names)
    for band, line in zip(("Blue", "Green", "Red"), lines[-3:], strict=True):
        cells = [band]
        for name in names:
            values = [
                r["metrics"]["f1_macro"]
                for r in results(tmp_path)
                if r and (r["bands"], r["weights"]["name"], r["seed"] < 2) == ([band], name, True)
                if r["config"]["size"] == 32 and len(r["config"]["places"]) == 3
            ]
            if values:
                half = scipy.stats.t.ppf(0.975, 1) * scipy.stats.sem(values)
                cells += [f"{np.mean(values):.3f}", "±", f"{half:.3f}"]
            else:
                cells.append("-")
        assert line.split() == cells
    probe_run(photos, tmp_path, "--seeds", 2, "--bn", "reestimate", weights=file)
    titles = capsys.readouterr().out.splitlines()[-2]
    assert titles.startswith("band  RS-BYOL-1  ") and "Random init, bn encoder  " in titles
    probe_run(photos, tmp_path, "--seeds", 2, weights="stats")  # the floor has no architecture
    assert "Random init, resnet18" in capsys.readouterr().out.splitlines()[-2]


def test_classes_without_a_test_or_a_training_image_are_named(photos, tmp_path, capsys, quick):
    rows = [{"image": str(path), "label": path.parent.name, "split": ("train", "test")[at % 2]}
            for at, path in enumerate(sorted(photos.glob("*/*")))]  # fmt: skip
    for row in rows:
        if row["label"] == CLASSES[1]:
            row["split"] = "train"
        if row["label"] == CLASSES[2]:
            row["split"] = "test"
    table(tmp_path / "t.csv", rows)
    probe_run(tmp_path / "t.csv", tmp_path, dataset="csv")
    said = capsys.readouterr().out
    assert f"\n  in no test image: {CLASSES[1]}\n" in said
    assert f"\n  tested, but in no training image: {CLASSES[2]}\n" in said


def test_a_result_is_not_taken_as_done_where_it_is_damaged_and_named_where_the_script_changed(
    photos, tmp_path, capsys, quick, monkeypatch
):
    argv = settings(photos, tmp_path)
    probe.main(probe.arguments(argv))
    (path,) = tmp_path.glob("*.json")
    capsys.readouterr()
    monkeypatch.setattr(probe, "CODE", "of another version")
    probe.main(probe.arguments(argv))
    assert f"{path}: done before by another version of this script" in capsys.readouterr().out
    path.write_text(path.read_text()[:200])
    refused(capsys, 1, argv, path, "no whole result", "remove it")


def test_progress_stands_in_a_log_file_once_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(probe.time, "monotonic", lambda: now[0])
    for _ in probe.progress("encoding", range(200), 200):
        now[0] += 1.0
    assert capsys.readouterr().out.splitlines() == [
        "  encoding: 60 of 200", "  encoding: 120 of 200", "  encoding: 180 of 200",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------- fine-tuning
def test_fine_tuning_trains_the_encoder_for_enough_steps_and_says_how(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(probe, "LEAST_STEPS", 2)  # one batch: two epochs, of 24 images
    monkeypatch.setitem(probe.CHOICES, "finetune", [("adamw", 1e-3)])
    tune, models, drawn = probe.fine_tune, [], []
    monkeypatch.setattr(probe, "fine_tune", lambda *a: models.append(tune(*a)) or models[-1])
    ahead = probe.read_ahead
    monkeypatch.setattr(probe, "read_ahead", lambda *a: drawn.append(sorted(a[1])) or ahead(*a))
    tiny = Tiny()
    monkeypatch.setattr(probe, "load_encoder", lambda *_: copy.deepcopy(tiny))
    file = write_encoder(tmp_path / "e.safetensors")
    probe_run(photos, tmp_path, "--finetune", "--epochs", 1, weights=file)
    assert "  2 epochs, for at least 2 steps" in capsys.readouterr().out
    [result] = results(tmp_path)
    assert result["weights"]["name"] == "RS-BYOL-1 fine-tuned"
    config = result["config"]
    assert config["finetune"] and config["optimiser"] == "adamw"
    assert config["learning_rate"] in [rate for _, rate in config["tried"]]
    test, *drawn = drawn  # read before the training, as a bad image would cost it
    fit, val = drawn[0], drawn[2]
    assert [len(rows) for rows in drawn[:5]] == [19, 19, 5, 24, 24] and drawn[3] == drawn[4]
    for encoder, _ in models:
        assert not torch.equal(encoder.conv1.weight, tiny.conv1.weight)
        assert not torch.equal(encoder.bn1.running_mean, tiny.bn1.running_mean)
    assert not {*fit} & {*val} and {*test} == {*range(30)} - {*drawn[3]}


def test_scratch_is_fine_tuning_from_random_weights(photos, tmp_path, quick):
    probe_run(photos, tmp_path, weights="scratch")
    probe_run(photos, tmp_path, "--finetune")
    names = [(r["weights"]["name"], r["config"]["finetune"]) for r in results(tmp_path)]
    assert names == [("Scratch supervised", True)]


# ------------------------------------------------------------------------------------- FullGrad
def test_fullgrad_contributions_sum_to_the_logit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(probe.build_encoder("resnet18", 1), probe.build_head(512, 4))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = model.double().eval()
    x, target = torch.randn(2, 1, 33, 33, dtype=torch.float64), torch.tensor([3, 1])
    terms = probe.fullgrad_terms(model, x, target)
    with torch.no_grad():
        logits = model(x).gather(1, target[:, None])[:, 0]
    parts = torch.stack([term.flatten(1).sum(1) for term in terms])
    torch.testing.assert_close(parts.sum(0), logits, rtol=1e-9, atol=1e-9)
    assert parts[1:].abs().sum() > logits.abs().sum()  # the bias terms matter in this model

    # The map by the paper's formula: a BatchNorm's bias in eval mode is b - w m / sqrt(v + eps)
    outputs = {}

    def keep(module, inputs, output):
        outputs[module] = output
        return output.clone()

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(keep)
    image = x.clone().requires_grad_()
    score = model(image).gather(1, target[:, None]).sum()
    first, *gradients = torch.autograd.grad(score, [image, *outputs.values()])

    def scaled(term):
        term = term.abs() - term.abs().amin((1, 2, 3), keepdim=True)
        return (term / term.amax((1, 2, 3), keepdim=True)).detach()

    expected = scaled(first * image).sum(1)
    for bn, gradient in zip(outputs, gradients, strict=True):
        bias = bn.bias - bn.weight * bn.running_mean / (bn.running_var + bn.eps).sqrt()
        term = scaled(gradient * bias[:, None, None])
        term = torch.nn.functional.interpolate(term, (33, 33), mode="bilinear", align_corners=True)
        expected += term.sum(1)
    torch.testing.assert_close(probe.fullgrad(model, x, target), expected)


def test_maps_see_the_three_copies_of_one_band(photos, tmp_path, monkeypatch):
    file = write_encoder(tmp_path / "e.safetensors", encoder=probe.build_encoder("resnet18", 3))
    seen, fullgrad = [], probe.fullgrad
    monkeypatch.setattr(
        probe, "fullgrad", lambda m, x, t: seen.append(x.shape) or fullgrad(m, x, t)
    )
    probe_run(photos, tmp_path, "--cam", 2, weights=file)
    assert seen == [(2, 3, 32, 32)]


# ------------------------------------------------------------------------------ data and errors
def test_csv_images_with_their_own_split(photos, tmp_path, capsys):
    rows = [
        {"image": f"{photos}/{name}/{name}_{n}.jpg", "label": name,
         "split": "train" if n < 6 else "val" if n < 8 else "test"}
        for name in CLASSES for n in range(10)
    ]  # fmt: skip
    table(tmp_path / "t.csv", rows)
    probe_run(tmp_path / "t.csv", tmp_path / "out", dataset="csv", band="RGB", weights="stats")
    [result] = results(tmp_path / "out")
    config = result["config"]
    assert (result["split"], config["test"], config["train"]) == ("official", 6, 18)
    said = capsys.readouterr().out
    assert said.splitlines()[2] == "30 images of 3 classes, split official"
    path = tmp_path / "t.csv"
    path.write_text(path.read_text().replace("image,label,split", "Image, Label, Split", 1))
    probe_run(path, tmp_path / "out", dataset="csv", band="RGB", weights="stats")
    assert "done before" in capsys.readouterr().out
    argv = settings(path, tmp_path / "out", "--split", "spatial", dataset="csv")
    refused(capsys, 2, argv, "--split spatial", "column split")
    argv = settings(photos, tmp_path, "--bands-in-file", "B04")
    refused(capsys, 2, argv, "--bands-in-file is for --dataset csv")


@pytest.mark.parametrize("text, status, words", [
    ("image,label\nA,a\nB", 1, ["line 3", "1 value"]),
    ("image,label,label\nA,a,b", 1, ["one twice"]),
    ("image,label\nnone.jpg,a\n", 1, ["line 2", "none.jpg"]),
    ("image,label,split\nA,a,training\n", 1, ["'training'"]),
    ("image,label\nA,a\nA,a\nB,b", 1, ["/A comes twice"]),
    ("image,label\nA,a\nlink,b\n", 1, ["/link comes twice"]),
    ("image,label,split\nA,a,train\nA,a,test\n", 1, ["/A comes twice"]),
    ("image,label\nA,\nB,b\n", 1, ["line 2", "empty"]),
    ("image,label\nA,a\nB,a \n", 1, ["line 3", "blanks or case"]),
    ("image,label\nA,a\nB,A\n", 1, ["line 3", "blanks or case"]),
    ("image,label\nA,a\nB,a\n", 1, ["1 classes"]),
])  # fmt: skip
def test_a_faulty_table_is_one_line(photos, tmp_path, capsys, text, status, words):
    for name, source in (("A", "Forest_0"), ("B", "Forest_1")):
        (tmp_path / name).write_bytes((photos / "Forest" / f"{source}.jpg").read_bytes())
    (tmp_path / "link").symlink_to("A")
    (tmp_path / "t.csv").write_text(text)
    argv = settings(tmp_path / "t.csv", tmp_path / "o", dataset="csv", weights="stats")
    refused(capsys, status, argv, *words)


def test_a_table_that_is_no_file_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.csv")
    refused(capsys, 2, settings(tmp_path / "pipe.csv", tmp_path, dataset="csv"), "is no file")


def test_photos_of_16_bits_of_another_band_count_and_of_400_megapixels_are_refused(tmp_path):
    ramp = np.linspace(0, 1000, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.new("L", (8, 8)).save(tmp_path / "huge.png")
    png = bytearray((tmp_path / "huge.png").read_bytes())
    png[16:24] = struct.pack(">II", 20_000, 20_000)  # IHDR: width, height
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "huge.png").write_bytes(png)
    rgb = bytearray((tmp_path / "huge.png").read_bytes()[:33])
    rgb[16:26] = struct.pack(">IIBB", 2, 1, 16, 2)  # two pixels of three times 16 bits
    rgb[29:33] = struct.pack(">I", zlib.crc32(rgb[12:29]))
    pixels = b"IDAT" + zlib.compress(bytes(13))
    rgb += struct.pack(">I", len(pixels) - 4) + pixels + struct.pack(">I", zlib.crc32(pixels))
    (tmp_path / "deep-rgb.png").write_bytes(rgb)
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    for name, bands, told in (
        ("deep", 3, "16 bits"),
        ("deep-rgb", 3, "16 bits"),
        ("huge", 3, "pixels"),
        ("rgb", 1, "3 band"),
        ("grey", 3, "1 band"),
    ):
        with pytest.raises(bandcrop.TileError, match=rf"{name}\.png.*{told}"):
            probe.open_photo(str(tmp_path / f"{name}.png"), None, bands)
    one = probe.open_photo(str(tmp_path / "grey.png"), None, 1)
    assert one.shape == (1, 8, 8) and one[0].ravel().tolist() == list(range(64))


def test_each_files_own_nodata_is_left_out_of_the_statistics(tmp_path, capsys):
    rng, valid = np.random.default_rng(0), []
    for n in range(4):
        tile = rng.integers(1000, 2000, (32, 32)).astype(np.uint16)
        tags = [(42113, 2, 2, b"0\0", True)] if n % 2 else []  # GDAL's nodata: 0
        tile[:, : 16 * (n % 2)] = 0
        valid.append(tile[:, 16 * (n % 2) :].ravel())
        tifffile.imwrite(tmp_path / f"{n}.tif", tile, extratags=tags)
    table(tmp_path / "t.csv", [{"image": f"{n}.tif", "label": "ab"[n % 2]} for n in range(4)])
    images = probe.list_images("csv", tmp_path / "t.csv", "B04")
    _, setup = read(images, np.arange(4), ["Red"])
    assert setup.mean == pytest.approx([np.concatenate(valid).mean()])
    assert setup.std == pytest.approx([np.concatenate(valid).std()])
    for n in (0, 2):  # files without a tag: --nodata speaks for them
        tile = tifffile.imread(tmp_path / f"{n}.tif")
        tile[:8] = 0
        tifffile.imwrite(tmp_path / f"{n}.tif", tile)
        valid[n] = tile[8:].ravel()
    images = images._replace(nodata=0)
    _, setup = read(images, np.arange(4), ["Red"])
    assert setup.mean == pytest.approx([np.concatenate(valid).mean()])
    x, _ = read(images, np.array([0]), ["Red"])
    assert x[0, 0, :7].abs().max() < 1e-3  # zeros became the mean, but where a cubic reaches over
    common = {"dataset": "csv", "weights": "stats"}
    more = ["--bands-in-file", "B04", "--nodata", 0, "--embed", tmp_path / "x.npz"]
    probe_run(tmp_path / "t.csv", tmp_path, *more, **common)
    every = np.concatenate(valid)
    lowest = (valid[0].min() - every.mean()) / every.std()
    assert np.load(tmp_path / "x.npz")["features"][0, 2] == pytest.approx(lowest, rel=1e-5)
    assert "a valid sample" not in capsys.readouterr().out
    tifffile.imwrite(tmp_path / "2.tif", np.zeros((32, 32), np.uint16))
    more[-1] = tmp_path / "y.npz"
    probe_run(tmp_path / "t.csv", tmp_path, *more, **common)
    assert "  images without a valid sample of Red: 1\n" in capsys.readouterr().out


def test_out_of_memory_is_one_line(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "encode", mock.Mock(side_effect=torch.OutOfMemoryError("x")))
    refused(capsys, 1, settings(photos, tmp_path), "too little memory", "--size")


def test_a_broken_tile_is_named(tmp_path, capsys):
    root = write_eurosat(tmp_path / "eurosat")
    broken = root / "River" / "River_3.tif"
    broken.write_bytes(broken.read_bytes()[:2000])
    argv = settings(root, tmp_path / "out", dataset="eurosat", band="RE5")
    refused(capsys, 1, argv, "River_3.tif")
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_data_and_lists_are_told_with_where_to_get_them(tmp_path, photos, capsys):
    argv = ["--dataset", "eurosat", "--band", "RE5", "--root", tmp_path / "none"]
    said = refused(capsys, 2, argv, tmp_path / "none", "EuroSATallBands.zip", lines=2)
    assert "5ac12b3b2557aa56e1826e981e8e200e" in said and "eurosat[-spatial]" in said
    argv = settings(tmp_path, tmp_path / "out")
    refused(capsys, 2, argv, "no eurosat-rgb", "EuroSAT.zip", lines=2)
    argv = settings(photos, tmp_path, "--split", "spatial")
    words = ("no list", "eurosat-spatial-train.txt", "--split random", "EuroSAT.zip")
    refused(capsys, 2, argv, *words, lines=2)


def test_wrong_use_is_refused_in_one_line(photos, tmp_path, capsys):
    def wrong(*more, words, **kwargs):
        refused(capsys, 2, settings(photos, tmp_path, *more, **kwargs), *words)

    wrong("--subset", 31, words=["--subset", "31 asked for, 30 images"])
    wrong("--head", "knn", "--cam", 3, words=["--cam"])
    wrong("--size", 8, words=["--size 8"])
    wrong("--head", "knn", words=["--head"], weights="scratch")
    wrong("--finetune", words=["--finetune"], weights="stats")
    wrong("--device", "mps", words=["--device mps"])
    wrong("--sizes", "ten", words=["--sizes", "--help"])
    wrong("--embed", tmp_path / "x.npz", words=["--embed"], band="all")
    refused(capsys, 2, ["--dataset", "eurosat-rgb", "--root", photos], "--band")
    refused(capsys, 2, ["--band", "Red"], "--dataset")
    refused(capsys, 2, ["--weights", "random", "--export", "x"], "--export")
    (tmp_path / "file").write_text("")
    refused(capsys, 1, settings(photos, tmp_path / "file" / "out"), "file/out")
