"""probe.py: measures, splits, bands, weights, frozenness, results that survive interruption."""

import argparse
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tifffile
import torch
import torchvision
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.neighbors import KNeighborsClassifier

import probe

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
CLASSES = ["Forest", "River", "SeaLake"]
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


def settings(root, out, *more, dataset="eurosat-rgb", band="Red"):
    """Command line of a small quick run."""
    argv = ["--dataset", dataset, "--root", str(root), "--band", band, "--out", str(out)]
    return [*argv, "--arch", "resnet18", "--size", "32", "--epochs", "2", *map(str, more)]


def probe_run(*args, **kwargs):
    probe.main(probe.arguments(settings(*args, **kwargs)))


def results(out):
    return [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]


def refused(capsys, status, argv, *words):
    """The run ends with this status and one error (a second line is indented) naming the words."""
    with pytest.raises(SystemExit) as ended:
        probe.main(probe.arguments(argv))
    said = capsys.readouterr().err
    assert ended.value.code == status, said
    assert "error: " in said and "Traceback" not in said
    told = said[said.index("error: ") :].strip().splitlines()  # a download's progress precedes it
    assert all(line.startswith("  ") for line in told[1:])
    for word in words:
        assert str(word) in said
    return said


# ------------------------------------------------------------------------------------- measures
def test_f1_and_confusion_equal_scikit_learn_with_a_class_that_never_occurs():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 5, 300), rng.integers(0, 6, 300)
    found = probe.f1_metrics(truth, said, list("abcdefg"))  # g: in neither
    assert found["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert found["f1_weighted"] == pytest.approx(f1_score(truth, said, average="weighted"))
    assert found["accuracy"] == pytest.approx((truth == said).mean())
    assert list(found["f1_per_class"]) == list("abcdef")
    assert list(found["f1_per_class"].values()) == pytest.approx(
        f1_score(truth, said, average=None, labels=range(6), zero_division=0)
    )
    assert found["confusion"] == confusion_matrix(truth, said, labels=range(7)).tolist()


def test_linear_head_is_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32) * [1, 5, 0.1, 2, 3, 1]
    y = (x[:, 0] + x[:, 1] / 5 + rng.normal(0, 0.5, 200) > 0).astype(int) + (x[:, 2] > 0.05)
    x = x.astype(np.float32)
    head = probe.fit_linear(torch.from_numpy(x), torch.from_numpy(y), 3, 1e-2, 200)
    scaled = (x - x.mean(0)) / x.std(0, ddof=1)
    other = LogisticRegression(C=1 / (2 * 1e-2 * len(x)), max_iter=1000).fit(scaled, y)
    shares = torch.softmax(head(torch.from_numpy(x)), 1).detach().numpy()
    np.testing.assert_allclose(shares, other.predict_proba(scaled), atol=5e-3)


def test_knn_head_is_cosine_weighted_nearest_neighbours():
    rng = np.random.default_rng(0)
    x, new = (rng.normal(size=(n, 8)).astype(np.float32) for n in (120, 50))
    y = rng.integers(0, 4, 120)
    head = probe.fit_knn(torch.from_numpy(x), torch.from_numpy(y), 4, 5)
    mean, std = x.mean(0), x.std(0, ddof=1)
    other = KNeighborsClassifier(5, metric="cosine", weights=lambda d: 2 - d)
    other.fit((x - mean) / std, y)
    said = probe.predict(head, torch.from_numpy(new))
    assert (said == other.predict((new - mean) / std)).mean() > 0.97


def test_mlp_head_learns_separable_features_and_has_the_papers_layers():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = (rng.normal(size=(300, 20)) + 4 * np.eye(20)[y]).astype(np.float32)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    chosen, head = probe.choose_head("mlp", x, y, 240, True, 3, 20)
    assert chosen in probe.CHOICES["mlp"]
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].out_features == 128
    assert (probe.predict(head, x) == y.numpy()).mean() > 0.97


@pytest.mark.parametrize("again, sizes", [(True, [8, 8, 8, 12]), (False, [8, 8, 8])])
def test_settings_are_chosen_on_the_validation_rows(monkeypatch, again, sizes):
    y, best, fitted = torch.tensor([0, 1, 2] * 4), probe.CHOICES["mlp"][1], []

    def fit(kind, setting, x, y_fit, classes, epochs):
        fitted.append(len(x))
        wrong = (
            0 if setting == best else 1
        )  # the others are right on the rows that they were fit to
        return lambda new: torch.eye(3)[(y[new[:, 0]] + wrong * (new[:, 0] >= 8)) % 3]

    monkeypatch.setattr(probe, "fit_head", fit)
    setting, head = probe.choose_head("mlp", torch.arange(12)[:, None], y, 8, again, 3, 1)
    assert setting == best and fitted == sizes
    assert (probe.predict(head, torch.arange(12)[:, None]) == y.numpy()).all()


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


def made_up(labels, names=None, part=None):
    names = names or [f"tile_{n}" for n in range(len(labels))]
    files = [(f"{name}.tif",) for name in names]
    return probe.Images(names, files, {}, np.array(labels), ["a", "b"], part, False)


def options(**given):
    default = {"split": "random", "subset": None, "root": Path("."), "dataset": "eurosat"}
    return argparse.Namespace(**default | given)


def test_random_split_is_a_partition_80_to_20_stratified_and_moves_with_the_seed():
    images = made_up([0] * 100 + [1] * 50)
    fit, val, test, listed = probe.split_images(images, options(), 0)
    assert sorted([*fit, *val, *test]) == list(range(150)) and not listed
    assert (len(fit), len(val), len(test)) == (96, 24, 30)
    assert (images.labels[test] == 1).sum() == 10
    assert set(test) != set(probe.split_images(images, options(), 1)[2])


def test_a_subset_is_drawn_before_the_split():
    fit, val, test, _ = probe.split_images(made_up([0] * 100 + [1] * 100), options(subset=50), 3)
    assert len({*fit, *val, *test}) == 50 and len(test) == 10


@pytest.mark.parametrize("split, stem", [("official", "eurosat"), ("spatial", "eurosat-spatial")])
def test_published_lists_are_followed_and_a_listed_validation_part_is_kept(tmp_path, split, stem):
    images = made_up([0, 1] * 5)
    parts = {"train": [0, 1, 2], "val": [5, 6], "test": [9, 8, 7]}
    for part, rows in parts.items():  # the lists say .jpg, the files are .tif
        lines = "".join(f"tile_{row}.jpg\r\n" for row in rows)
        (tmp_path / f"{stem}-{part}.txt").write_text(lines)
    fit, val, test, listed = probe.split_images(images, options(split=split, root=tmp_path), 0)
    assert [*fit] == [0, 1, 2] and [*val] == [5, 6] and [*test] == [7, 8, 9] and listed


def test_a_split_without_its_list_is_refused(photos, tmp_path, capsys):
    argv = settings(photos, tmp_path, "--split", "spatial")
    refused(capsys, 2, argv, "eurosat-spatial-train.txt", "--split random")


# ---------------------------------------------------------------------------------------- bands
def test_eurosat_bands_are_read_in_the_files_order_and_standardised(eurosat):
    images = probe.list_images("eurosat", eurosat, None)
    rows = np.array([0, 7, 25])
    for band, place in (("Blue", 1), ("NIR", 7), ("SWIR2", 11), ("NNIR", 12)):
        mean, std = probe.band_statistics(images, rows, [band])
        raw = np.stack([tifffile.imread(images.files[row][0])[..., place] for row in rows])
        assert mean[0] == pytest.approx(raw.mean()) and std[0] == pytest.approx(raw.std())
        setup = probe.Setup([band], 32, mean, std)
        [batch] = probe.read_ahead(images, rows, setup, {"read": 0.0, "replaced": 0})
        np.testing.assert_allclose(batch[:, 0], (raw - raw.mean()) / raw.std(), atol=1e-4)


@pytest.mark.skipif(not (REAL / "eurosat").is_dir(), reason="no ../shared/data/eurosat")
def test_b8a_is_the_last_band_of_real_eurosat_files():
    """B8A looks like B08, at its brightness; B09 (water vapour) and B10 (cirrus) are far darker."""
    images = probe.list_images("eurosat", REAL / "eurosat", None)
    tiles = np.stack([tifffile.imread(file) for (file,) in images.files]).astype(np.float64)
    own = {band: tiles[..., place] for band, (_, place) in images.bands.items()}
    mean, _ = probe.band_statistics(images, np.arange(len(tiles)), ["NNIR", "NIR"])
    assert mean == pytest.approx([own["NNIR"].mean(), own["NIR"].mean()])
    assert 0.9 < own["NNIR"].mean() / own["NIR"].mean() < 1.3
    tile_means = {band: pixels.mean((1, 2)) for band, pixels in own.items()}
    alike = {b: np.corrcoef(tile_means["NNIR"], tile_means[b])[0, 1] for b in own if b != "NNIR"}
    assert max(alike, key=alike.get) in ("NIR", "RE7") and alike["NIR"] > 0.98
    used = {place for _, place in images.bands.values()}
    unused = tiles.mean((0, 1, 2))[sorted(set(range(13)) - used)]  # B01, B09, B10
    assert unused[2] < 100 and unused[1] < 0.6 * own["NNIR"].mean()
    assert own["SWIR2"].mean() < own["SWIR1"].mean()


@pytest.mark.parametrize(
    "asked, bands",
    [("b05", [["RE5"]]), ("RGB", [["Red", "Green", "Blue"]]), ("VV", [["SAR1"]]),
     ("SAR", [["SAR1", "SAR2", "SAR1"]]), ("RE5,b06,RE7", [["RE5", "RE6", "RE7"]]),
     ("all", [[band] for band in probe.BANDS])],
)  # fmt: skip
def test_bands_go_by_either_name(asked, bands):
    assert probe.requested_bands(asked, dict.fromkeys(probe.BANDS), "x") == bands


def test_a_band_that_the_data_lack_is_refused_by_name(photos, tmp_path, capsys):
    refused(capsys, 2, settings(photos, tmp_path, band="B05"), "RE5 (B05)", "Blue, Green, Red")
    refused(capsys, 2, settings(photos, tmp_path, band="B99"), "'B99'", "RE5/B05")
    refused(capsys, 2, settings(photos, tmp_path, band="Red,Blue"), "one or three")


def write_sen12ms(root: Path, tiles: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for n in range(tiles):
        igbp = np.full((32, 32, 4), [10, 17, 13][n % 3], np.uint16)
        igbp[:10] = 1  # less than half
        tile = {"lc": igbp, "s2": rng.integers(0, 3000, (32, 32, 13)).astype(np.uint16),
                "s1": rng.normal(-12, 4, (32, 32, 2)).astype(np.float32)}  # fmt: skip
        if n == 0:
            tile["s1"][3, 4] = np.nan
        for kind, pixels in tile.items():
            path = root / f"ROIs1158_spring/{kind}_1/ROIs1158_spring_{kind}_1_p{n}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    return root


def test_sen12ms_scene_labels_are_the_simplified_majority_and_nan_becomes_the_mean(tmp_path):
    root = write_sen12ms(tmp_path / "sen12ms")
    images = probe.list_images("sen12ms", root, None)
    names = {images.names[n]: images.classes[images.labels[n]] for n in range(3)}
    assert names == {  # IGBP 10 grassland, 17 water, 13 urban; p0, p1, p10 sort first
        "ROIs1158_spring_s2_1_p0": "Grassland",
        "ROIs1158_spring_s2_1_p1": "Water",
        "ROIs1158_spring_s2_1_p10": "Water",
    }
    rows = np.arange(12)
    mean, std = probe.band_statistics(images, rows, ["SAR2", "NNIR"])
    raw = np.stack([tifffile.imread(images.files[row][1])[..., 1] for row in rows])
    assert mean[0] == pytest.approx(np.nanmean(raw), rel=1e-5)
    spent = {"read": 0.0, "replaced": 0}
    setup = probe.Setup(["SAR2", "NNIR"], 32, mean, std)
    [batch] = probe.read_ahead(images, rows, setup, spent)
    assert spent["replaced"] == 1 and batch[0, 0, 3, 4] == 0
    s2 = tifffile.imread(images.files[5][0])[..., 8]  # B8A is the ninth of thirteen here
    np.testing.assert_allclose(batch[5, 1], (s2 - mean[1]) / std[1], atol=1e-4)


# -------------------------------------------------------------------------------------- weights
@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(1)
    model = torchvision.models.resnet50()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
    return model.eval()


def layout(kind, model):
    """The same encoder as each source publishes it (FACTS section 8)."""
    state = model.state_dict()
    if kind == "imagenet":
        return state
    encoder = {k: v for k, v in state.items() if not k.startswith("fc.")}
    if kind == "byol-imagenet":
        renamed = {f"module.encoder.{n}": v for n, v in enumerate(encoder.values())}
        return {"epoch": 1, "online_backbone": renamed, "target_backbone": {}}
    if kind == "coco":
        return {f"backbone.{k}": v for k, v in encoder.items()} | {
            "classifier.4.bias": state["fc.bias"]
        }
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    seco = {}
    for key, value in encoder.items():
        first, rest = key.split(".", 1)
        seco[f"encoder_q.{places[first]}.{rest}"] = value
        seco[f"encoder_k.{places[first]}.{rest}"] = torch.zeros_like(value)
    seco |= {"heads_q.0.0.weight": torch.zeros(4), "queue": torch.zeros(3)}
    return {"epoch": 3, "state_dict": seco, "lr_schedulers": []}


@pytest.mark.parametrize("kind", ["imagenet", "byol-imagenet", "seco", "coco"])
def test_each_published_layout_gives_the_encoder_it_was_made_from(kind, resnet50, tmp_path):
    torch.save(layout(kind, resnet50), tmp_path / "weights.ckpt")
    weights = probe.find_weights(f"{kind}:{tmp_path / 'weights.ckpt'}")
    encoder, arch = probe.load_encoder(weights, "resnet18", 3)
    assert arch == "resnet50" and weights.name == probe.WEIGHTS[kind]
    body = torch.nn.Sequential(*list(resnet50.children())[:-1], torch.nn.Flatten())
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(encoder(x), body(x))
        one = x[:, :1]
        assert torch.equal(encoder(probe.for_encoder(encoder, one)), body(one.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("kind", ["imagenet", "byol-imagenet", "seco", "coco"])
def test_a_file_of_another_layout_is_refused_with_what_it_holds(kind, resnet50, tmp_path, capsys):
    other = {"imagenet": "seco", "byol-imagenet": "imagenet", "seco": "coco", "coco": "imagenet"}[
        kind
    ]
    torch.save(layout(other, resnet50), tmp_path / "weights.pt")
    with pytest.raises(SystemExit) as ended:
        probe.load_encoder(probe.find_weights(f"{kind}:{tmp_path / 'weights.pt'}"), "resnet50", 3)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "entries" in said and "weights.pt" in said


def test_a_byol_tensor_of_another_shape_is_refused(resnet50, tmp_path, capsys):
    found = layout("byol-imagenet", resnet50)
    found["online_backbone"]["module.encoder.60"] = torch.zeros(7)
    torch.save(found, tmp_path / "weights.pt")
    with pytest.raises(SystemExit):
        probe.load_encoder(probe.find_weights(f"byol-imagenet:{tmp_path / 'weights.pt'}"), "", 3)
    assert "size mismatch" in capsys.readouterr().err


def test_weights_and_features_that_are_not_finite_are_refused(resnet50, tmp_path, capsys):
    found = {key: value.clone() for key, value in layout("imagenet", resnet50).items()}
    found["layer1.0.bn1.running_var"][3] = float("nan")
    torch.save(found, tmp_path / "weights.pt")
    with pytest.raises(SystemExit) as ended:
        probe.load_encoder(probe.find_weights(f"imagenet:{tmp_path / 'weights.pt'}"), "", 3)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "weights.pt: layer1.0.bn1.running_var holds NaN" in said
    encoder, _ = probe.load_encoder(probe.find_weights("random"), "resnet18", 1)
    encoder.bn1.bias.data[0] = float("inf")  # as training from scratch may leave it
    with pytest.raises(SystemExit) as ended:
        probe.encode(encoder, iter([torch.zeros(2, 1, 32, 32)]))
    assert ended.value.code == 1 and "not finite" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_executes_nothing_from_the_file(tmp_path, capsys):
    bomb = Bomb()
    bomb.path = tmp_path / "executed"
    torch.save({"state_dict": {}, "hparams": bomb}, tmp_path / "bomb.ckpt")
    with pytest.raises(SystemExit):
        probe.load_encoder(probe.find_weights(f"seco:{tmp_path / 'bomb.ckpt'}"), "", 3)
    assert not (tmp_path / "executed").exists()
    said = capsys.readouterr().err
    assert "mkdir" in said and "nothing was executed" in said and "torch.save" in said


def write_encoder(path: Path, mode="single", bands=("Red", "SAR1"), **more) -> Path:
    torch.manual_seed(5)
    encoder = probe.build_encoder("resnet18", 1 if mode == "single" else 3)
    metadata = {"name": "RS-BYOL-1", "arch": "resnet18", "mode": mode, "bands": json.dumps(bands),
                "mean": json.dumps([100.0] * len(bands)), "std": json.dumps([50.0] * len(bands)),
                "synthetic": "true"} | more  # fmt: skip
    tensors = {k: v.contiguous() for k, v in encoder.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def test_our_own_encoder_is_loaded_and_its_bands_and_statistics_are_told(photos, tmp_path, capsys):
    file = write_encoder(tmp_path / "encoder.safetensors")
    probe_run(photos, tmp_path, "--weights", file, "--stats", "encoder")
    probe_run(photos, tmp_path, "--weights", file, band="Green")
    red, green = sorted(results(tmp_path), key=lambda r: r["bands"] != ["Red"])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert red["weights"] == {"name": "RS-BYOL-1", "source": str(file), "sha256": digest}
    assert red["config"]["mean"] == [100.0] and red["config"]["std"] == [50.0]
    assert red["config"]["encoder_synthetic"] is True and red["config"]["synthetic"] is False
    assert red["config"]["unseen_bands"] == [] and green["config"]["unseen_bands"] == ["Green"]
    assert "never saw Green" in capsys.readouterr().out
    argv = settings(photos, tmp_path, "--weights", file, "--stats", "encoder", band="Green")
    refused(capsys, 2, argv, "saw no Green", "--stats train")


def test_three_bands_into_one_channel_are_refused(photos, tmp_path, capsys):
    file = write_encoder(tmp_path / "encoder.safetensors")
    refused(
        capsys, 2, settings(photos, tmp_path, "--weights", file, band="RGB"), file, "one-channel"
    )


def test_weights_that_are_no_encoder_are_refused(photos, tmp_path, capsys):
    file = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file({"conv1.weight": torch.zeros(2)}, file)
    refused(capsys, 1, settings(photos, tmp_path, "--weights", file), file, f"imagenet:{file}")
    file.write_bytes(b"not tensors")
    refused(capsys, 1, settings(photos, tmp_path, "--weights", file), file)
    refused(capsys, 1, settings(photos, tmp_path, "--weights", f"imagenet:{file}"), file)
    refused(capsys, 2, settings(photos, tmp_path, "--weights", "nonsense"), "nonsense", "random")
    refused(capsys, 2, settings(photos, tmp_path, "--weights", "seco"), "seco:FILE")


def test_imagenet_without_network_names_the_file_alternative(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    argv = settings(photos, tmp_path, "--weights", "imagenet")
    refused(capsys, 1, argv, "https://download.pytorch.org/models/resnet18", "imagenet:FILE")


# ---------------------------------------------------------------------------------- frozenness
def test_the_encoder_is_in_eval_mode_and_equal_after_training(photos, tmp_path, monkeypatch):
    seen = {}

    def spy(encoder, before):
        seen["same"] = all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
        seen["eval"] = not any(module.training for module in encoder.modules())
        seen["frozen"] = not any(p.requires_grad for p in encoder.parameters())

    monkeypatch.setattr(probe, "assert_unchanged", spy)
    probe_run(photos, tmp_path)
    assert seen == {"same": True, "eval": True, "frozen": True}


def test_a_batchnorm_that_drifts_fails_the_run_and_writes_nothing(
    photos, tmp_path, monkeypatch, capsys
):
    def forgets_eval(encoder, batches):
        encoder.train()
        with torch.no_grad():
            return torch.cat([encoder(batch) for batch in batches])

    monkeypatch.setattr(probe, "encode", forgets_eval)
    refused(capsys, 1, settings(photos, tmp_path, "--embeddings"), "running_mean", "changed")
    assert list(tmp_path.iterdir()) == []


def test_reestimated_batchnorm_holds_the_statistics_of_the_images(eurosat, monkeypatch):
    monkeypatch.setattr(probe, "native_bf16", lambda device: False)  # to compare in fp32
    images = probe.list_images("eurosat", eurosat, None)
    rows = np.arange(30)
    setup = probe.Setup(["Red"], 32, *probe.band_statistics(images, rows, ["Red"]))
    encoder, _ = probe.load_encoder(probe.find_weights("random"), "resnet18", 1, 0)
    batches = list(probe.read_ahead(images, rows, setup, {"read": 0.0, "replaced": 0}))
    probe.reestimate_batchnorm(encoder, iter(batches))
    with torch.no_grad():
        first = encoder.conv1(torch.cat(batches))
    torch.testing.assert_close(encoder.bn1.running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(encoder.bn1.running_var, first.var((0, 2, 3)), rtol=1e-3, atol=1e-6)
    assert not any(module.training for module in encoder.modules())


# -------------------------------------------------------------------------------------- results
def test_a_result_follows_the_schema_and_a_rerun_skips_it(photos, tmp_path, monkeypatch, capsys):
    probe_run(photos, tmp_path, "--seeds", 2, "--subset", 24)
    first, second = results(tmp_path)
    assert first["schema"] == 1 and first["stage"] == "probe" and first["dataset"] == "eurosat-rgb"
    assert (first["split"], first["subset"], first["bands"]) == ("random", 24, ["Red"])
    assert [first["seed"], second["seed"]] == [0, 1]
    assert set(first["metrics"]) == {
        "f1_macro",
        "f1_weighted",
        "accuracy",
        "f1_per_class",
        "confusion",
    }
    assert set(first["weights"]) == {"name", "source", "sha256"}
    assert set(first["seconds"]) == {"read", "encode", "train"}
    assert {"torch", "numpy", "python"} <= set(first["versions"])
    told = "size arch head bn stats epochs optimiser learning_rate classes hidden batch synthetic"
    told += " encoder_synthetic train validated test"
    assert set(told.split()) <= set(first["config"])
    assert first["config"]["train"] == 19 and first["config"]["test"] == 5
    assert np.sum(first["metrics"]["confusion"]) == 5

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(probe, "encode", lambda *_: pytest.fail("encoded again"))
    probe_run(photos, tmp_path, "--seeds", 2, "--subset", 24)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    assert capsys.readouterr().out.count("done before") == 2


def test_other_settings_never_share_a_file(photos, tmp_path):
    for more in ([], ["--subset", 24], ["--bn", "reestimate"], ["--head", "knn"], ["--epochs", 3]):
        probe_run(photos, tmp_path, *more)
    assert len(results(tmp_path)) == 5


def test_an_interrupted_run_keeps_what_is_finished_and_the_rerun_completes_it(
    photos, tmp_path, monkeypatch
):
    choose, calls = probe.choose_head, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return choose(*args)

    monkeypatch.setattr(probe, "choose_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_run(photos, tmp_path, band="all")
    assert len(list(tmp_path.iterdir())) == len(results(tmp_path)) == 1
    probe_run(photos, tmp_path, band="all")
    assert [r["bands"] for r in results(tmp_path)] == [["Blue"], ["Green"], ["Red"]]
    assert len(calls) == 4  # the first band was not run again


def test_an_interrupted_write_leaves_no_file(photos, tmp_path, monkeypatch):
    def dies(self, text):
        self.write_bytes(text.encode()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        probe_run(photos, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_and_maps_are_added_to_a_finished_run_without_touching_it(photos, tmp_path):
    probe_run(photos, tmp_path)
    [path] = tmp_path.iterdir()
    before = path.read_bytes(), path.stat().st_mtime_ns
    probe_run(photos, tmp_path, "--embeddings", "--cam", 4)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    found = np.load(path.with_name(path.stem + "-embeddings.npz"), allow_pickle=False)
    assert found["features"].shape == (6, 512) and found["features"].dtype == np.float32
    assert found["labels"].dtype == np.int64 and found["names"].dtype.kind == "U"
    classes = json.loads(before[0])["config"]["classes"]
    for name, label in zip(found["names"], found["labels"], strict=True):
        assert name.startswith(classes[label])
    assert Image.open(path.with_name(path.stem + "-cam.png")).size[0] > 500


def test_features_on_disk_are_used_again_for_the_same_weights_data_bands_and_size(
    photos, tmp_path, monkeypatch
):
    cache = ["--cache", tmp_path / "cache"]
    probe_run(photos, tmp_path / "a", *cache)
    encode = probe.encode
    monkeypatch.setattr(probe, "encode", lambda *_: pytest.fail("encoded again"))
    probe_run(photos, tmp_path / "b", *cache)
    [a], [b] = results(tmp_path / "a"), results(tmp_path / "b")
    assert a["metrics"] == b["metrics"]
    encoded = []
    monkeypatch.setattr(probe, "encode", lambda *args: encoded.append(1) or encode(*args))
    probe_run(photos, tmp_path / "b", *cache, band="Green")
    probe_run(photos, tmp_path / "b", *cache, "--size", 40)
    probe_run(photos, tmp_path / "b", *cache, "--bn", "reestimate")
    assert len(encoded) == 3


@pytest.mark.parametrize("fast", [False, True])
def test_features_are_float32_whatever_the_encoder_computes_in(fast, monkeypatch):
    monkeypatch.setattr(probe, "native_bf16", lambda device: fast)
    encoder, _ = probe.load_encoder(probe.find_weights("random"), "resnet18", 1)
    images = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    features = probe.encode(encoder, iter(images.split(4)))
    with torch.no_grad():
        exact = encoder(images)
    assert features.dtype == torch.float32
    error = (features - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02 if fast else error < 1e-6


def test_scratch_trains_the_encoder_too(photos, tmp_path):
    probe_run(photos, tmp_path, "--weights", "scratch", "--cam", 2, "--epochs", 3)
    [result] = results(tmp_path)
    assert result["weights"]["name"] == "Scratch supervised"
    assert result["config"]["optimiser"] == "adamw"
    encoder = probe.build_encoder("resnet18", 1)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images = probe.list_images("eurosat-rgb", photos, None)
    setup = probe.Setup(["Red"], 32, [100.0], [50.0])
    spent = {"read": 0.0, "replaced": 0}
    probe.train_scratch(encoder, images, np.arange(30), setup, 1, 0, spent)
    assert not torch.equal(encoder.conv1.weight, before["conv1.weight"])
    assert not torch.equal(encoder.bn1.running_mean, before["bn1.running_mean"])


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
    x, target = torch.randn(3, 1, 40, 40, dtype=torch.float64), torch.tensor([0, 3, 1])
    logits, input_term, biases = probe.fullgrad_terms(model, x, target)
    with torch.no_grad():
        expected = model(x).gather(1, target[:, None])[:, 0]
    assert torch.equal(logits, expected)
    parts = torch.stack([term.flatten(1).sum(1) for term in (input_term, *biases)])
    torch.testing.assert_close(parts.sum(0), logits, rtol=1e-9, atol=1e-9)
    assert parts[1:].abs().sum() > logits.abs().sum()  # the bias terms matter in this model
    maps = probe.fullgrad(model, x, target)
    assert maps.shape == (3, 40, 40) and (maps >= 0).all() and maps.std() > 0


# ------------------------------------------------------------------------------ data and errors
def test_csv_images_with_their_own_split(tmp_path, capsys):
    root = write_photos(tmp_path / "photos")
    lines = ["image,label,split"]
    for name in CLASSES:
        part = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
        lines += [f"photos/{name}/{name}_{n}.jpg,{name},{part[n]}" for n in range(10)]
    table = tmp_path / "tiles.csv"
    table.write_text("\n".join(lines))
    probe_run(table, tmp_path / "out", dataset="csv", band="RGB")
    [result] = results(tmp_path / "out")
    assert (result["split"], result["config"]["test"], result["config"]["train"]) == (
        "official",
        6,
        18,
    )
    table.write_text("\n".join([*lines, "photos/none.jpg,River,train"]))
    refused(capsys, 1, settings(table, tmp_path / "out", dataset="csv"), "line 32", "none.jpg")
    table.write_text("picture,label\na,b")
    refused(capsys, 1, settings(table, tmp_path / "out", dataset="csv"), "'image'")
    assert root.is_dir()


def test_csv_of_geotiffs_needs_and_uses_its_band_order(eurosat, tmp_path, capsys):
    table = tmp_path / "tiles.csv"
    rows = [f"{eurosat}/{c}/{c}_{n}.tif,{c}" for c in CLASSES for n in range(10)]
    table.write_text("\n".join(["image,label", *rows]))
    refused(capsys, 2, settings(table, tmp_path, dataset="csv"), "--bands-in-file")
    order = ",".join(probe.EUROSAT_BANDS)
    images = probe.list_images("csv", table, order)
    assert images.bands == probe.list_images("eurosat", eurosat, None).bands


def test_a_broken_tile_is_named(tmp_path, capsys):
    root = write_eurosat(tmp_path / "eurosat")
    broken = root / "River" / "River_3.tif"
    broken.write_bytes(broken.read_bytes()[:2000])
    refused(
        capsys, 1, settings(root, tmp_path / "out", dataset="eurosat", band="RE5"), "River_3.tif"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_data_are_told_in_two_lines_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    command = [sys.executable, str(ROOT / "probe.py"), "--dataset", "eurosat", "--band", "RE5"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.strip().splitlines()
    assert "data/eurosat" in first and "--download" in first
    assert "EuroSATallBands.zip" in second and "5ac12b3b2557aa56e1826e981e8e200e" in second


def test_wrong_use_is_refused_in_one_line(photos, tmp_path, capsys):
    refused(capsys, 2, settings(photos, tmp_path, "--subset", 31), "--subset 31", "30 images")
    refused(capsys, 2, settings(photos, tmp_path, "--head", "knn", "--cam", 3), "--cam")
    refused(capsys, 2, settings(photos, tmp_path, "--size", 8), "--size 8")
    refused(
        capsys, 2, settings(photos, tmp_path, "--weights", "scratch", "--head", "knn"), "scratch"
    )
    refused(capsys, 2, ["--dataset", "eurosat-rgb", "--root", str(photos)], "--band")
    (tmp_path / "file").write_text("")
    refused(capsys, 2, settings(photos, tmp_path / "file" / "out"), "file/out")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "hub").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "hub"))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", tmp_path / "hub"
    httpd.shutdown()
    httpd.server_close()


def test_download_fetches_checks_unpacks_and_leaves_nothing_half(
    server, tmp_path, monkeypatch, capsys
):
    url, hub = server
    folder = hub / probe.REVISIONS["resisc45"]
    folder.mkdir(parents=True)
    write_photos(tmp_path / "NWPU-RESISC45")
    with zipfile.ZipFile(folder / "NWPU-RESISC45.zip", "w") as archive:
        for path in (tmp_path / "NWPU-RESISC45").rglob("*.jpg"):
            archive.write(path, path.relative_to(tmp_path))
    (folder / "resisc45-train.txt").write_text("Forest_0.jpg\n")
    files = sorted(folder.iterdir())
    digests = [hashlib.md5(path.read_bytes()).hexdigest() for path in files]
    rows = [f"resisc45 resisc45 {p.name} {d}" for p, d in zip(files, digests, strict=True)]
    monkeypatch.setattr(probe, "HUB", url)
    root = tmp_path / "data" / "resisc45"
    argv = ["--dataset", "resisc45", "--root", str(root), "--download"]

    monkeypatch.setattr(probe, "DOWNLOADS", "\n".join(rows).replace(digests[0], "0" * 32))
    refused(capsys, 1, argv, "NWPU-RESISC45.zip")
    assert not root.exists()

    monkeypatch.setattr(probe, "DOWNLOADS", "\n".join(rows))
    with pytest.raises(SystemExit) as ended:
        probe.arguments(argv)
    assert ended.value.code == 0
    assert len(probe.list_images("resisc45", root, None).names) == 30
    assert sorted(p.name for p in root.iterdir()) == ["NWPU-RESISC45", "resisc45-train.txt"]
    assert [p.name for p in root.parent.iterdir()] == ["resisc45"]
    refused(capsys, 2, argv, "not empty")
    refused(capsys, 2, ["--dataset", "sen12ms", "--download"], "dataserv.ub.tum.de")
