"""segment.py: masks that stay on their images, measures, what a result depends on, frozenness."""

import argparse
import itertools
import json
import shutil
from collections import OrderedDict
from functools import partial
from pathlib import Path
from unittest import mock

import conftest
import numpy as np
import pytest
import tifffile
import torch
import torchvision
from conftest import results, runner
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score
from test_probe import write_encoder

import segment

torch.set_num_threads(1)  # tiny sizes: threads would only wait for each other
REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
S2 = ["B02", "B03", "B04", "B08"]


def write_tile(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    planar = "contig" if pixels.ndim == 3 else None
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig=planar)


def coded(number: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S1, S2 and a mask whose ids 0..4 can be read back from the first S2 band: 1000 + 100 * id."""
    rng = np.random.default_rng(number)
    mask = np.kron(rng.integers(0, 5, (size // 4, size // 4)), np.ones((4, 4), int))
    s2 = np.stack([1000 + 100 * mask, *rng.integers(0, 3000, (3, size, size))], -1)
    s1 = rng.normal(-12, 4, (size, size, 2))
    return s1.astype(np.float32), s2.astype(np.uint16), mask.astype(np.uint8)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """12 tiles of 40 x 40: 8 to train, 4 to test; id 0 ignored, ids 1..4 classes."""
    root = tmp_path_factory.mktemp("data")
    lines = ["s1,s2,mask,split"]
    for n in range(12):
        for kind, pixels in zip(("s1", "s2", "mask"), coded(n, 40), strict=True):
            write_tile(root / kind / f"{n}.tif", pixels)
        lines.append(f"s1/{n}.tif,s2/{n}.tif,mask/{n}.tif,{'train' if n < 8 else 'test'}")
    (root / "tiles.csv").write_text("\n".join(lines))
    return root / "tiles.csv"


def settings(root, out, *more, band="B02"):
    argv = ["--dataset", "csv", "--root", str(root), "--band", band, "--out", str(out)]
    argv += ["--s2-bands", ",".join(S2), "--classes", "a,b,c,d", "--arch", "resnet18"]
    argv += ["--weights", "random"]  # not the user's own, where tests run in a clone that has some
    return [*argv, "--epochs", "2", "--batch-size", "4", *map(str, more)]


segment_run, refused = runner(segment, settings), partial(conftest.refused, segment)


# ------------------------------------------------------------------------------ masks and images
def write_masks(table: Path, folder: Path, edit) -> Path:
    """A copy of the table beside masks that `edit` has changed; its path."""
    folder.mkdir()
    lines = table.read_text().splitlines()
    for line in lines[1:]:
        s1, s2, mask, _ = line.split(",")
        write_tile(folder / mask, edit(tifffile.imread(table.parent / mask)))
    for kind in ("s1", "s2"):
        (folder / kind).symlink_to(table.parent / kind)
    (folder / "tiles.csv").write_text(table.read_text())
    return folder / "tiles.csv"


def images_of(tiles, rows, bands, norm):
    batches = segment.read_images(tiles, rows, bands, np.array(norm), torch.device("cpu"))
    return torch.cat([x.clone() for x in batches]).numpy()


def tiles_of(*settings_and_more):
    args = segment.arguments(settings(*settings_and_more))
    return segment.list_tiles(args), args


@pytest.mark.parametrize("size", [[], ["--size", 34]])
def test_masks_are_cut_exactly_with_their_images(table, tmp_path, monkeypatch, size):
    monkeypatch.setattr(segment, "ENCODE_BATCH", 5)  # 12 tiles: batches of 5, 5 and 2
    tiles, _ = tiles_of(table, tmp_path, *size)
    images = images_of(tiles, np.arange(12), ["Blue"], ([1000.0], [100.0]))  # now Blue IS the id
    ids = np.where(tiles.masks == segment.IGNORED, 0, tiles.masks.astype(int) + 1)
    assert np.abs(images[:, 0] - ids).max() < 1e-4
    at = 3 if size else 0
    for n in range(12):
        whole = tifffile.imread(table.parent / f"mask/{n}.tif")
        assert (ids[n] == whole[at : 40 - at, at : 40 - at]).all()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float32, np.nan), (np.float32, 1.5), (np.int16, -1), (np.uint16, 65535), (np.uint8, 7)],
)
def test_a_mask_value_that_is_no_class_is_named_or_ignored_as_asked(
    table, tmp_path, capsys, dtype, value
):
    def edit(mask):
        mask = mask.astype(dtype)
        mask[:9] = value
        return mask

    other = write_masks(table, tmp_path / "data", edit)
    refused(capsys, 1, settings(other, tmp_path), "mask/0.tif", f"holds {value}:", "--ignore")
    if value == int(value if np.isfinite(value) else 0.5):
        tiles, _ = tiles_of(other, tmp_path, f"--ignore={value},0")
        assert (tiles.masks[:, :9] == segment.IGNORED).all()
        before, _ = tiles_of(table, tmp_path)
        assert (tiles.masks[:, 9:] == before.masks[:, 9:]).all()


def test_a_constant_band_is_refused(table, tmp_path, capsys):
    root = shutil.copytree(table.parent, tmp_path / "data")
    for path in root.glob("s2/*.tif"):
        write_tile(path, np.full((40, 40, 4), 1000, np.uint16))
    refused(capsys, 1, settings(root / "tiles.csv", tmp_path), "band Blue of 8 training tiles")


def test_classes_name_the_ids_that_are_not_ignored(table, tmp_path):
    tiles, args = tiles_of(table, tmp_path, "--classes", "z,a,c,d", "--ignore", "2,9")
    raw = np.stack([tifffile.imread(table.parent / f"mask/{n}.tif") for n in range(12)])
    assert args.classes == ["z", "a", "c", "d"]
    for number, id in enumerate((0, 1, 3, 4)):
        assert ((tiles.masks == number) == (raw == id)).all()
    assert ((tiles.masks == segment.IGNORED) == (raw == 2)).all()


def test_which_id_is_which_class_is_said_and_a_class_in_no_mask_is_warned_of(
    table, tmp_path, capsys, instant
):
    segment_run(table, tmp_path, "--classes", "a,b,c,d,e")  # ids 0..4, and 0 is ignored
    said = capsys.readouterr().out
    assert "ids: 1 a, 2 b, 3 c, 4 d, 5 e; ignored: 0\nwarning: no mask holds 5 e" in said
    segment_run(table, tmp_path, "--classes", "a,b,c,d,e", "--ignore=-1")
    said = capsys.readouterr().out
    assert "ids: 0 a, 1 b, 2 c, 3 d, 4 e; ignored: -1\n" in said and "warning" not in said


def test_masks_and_tiles_with_another_number_of_bands_are_refused(table, tmp_path, capsys):
    other = write_masks(table, tmp_path / "data", lambda mask: np.stack([mask] * 3, -1))
    refused(capsys, 1, settings(other, tmp_path), "mask/0.tif", "has 3 bands", "a mask has 1")
    argv = settings(table, tmp_path, "--s2-bands", "B02,B03,B04")
    refused(capsys, 1, argv, "s2/0.tif has 4 bands, --s2-bands names 3")
    argv = settings(table, tmp_path, "--s1-bands", "VV")
    refused(capsys, 1, argv, "s1/0.tif has 2 bands, --s1-bands names 1")


def test_nodata_that_is_named_is_left_out_of_the_statistics(table, tmp_path):
    segment_run(table, tmp_path, "--epochs", 1, "--nodata", 1000)  # Blue of id 0
    [result] = results(tmp_path)
    pixels = np.stack([tifffile.imread(table.parent / f"s2/{n}.tif")[..., 0] for n in range(8)])
    assert result["config"]["mean"] == pytest.approx([pixels[pixels != 1000].mean()])


# ------------------------------------------------------------------------------------- measures
def test_measures_equal_scikit_learns_over_the_classes_of_the_truth():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 4, segment.IGNORED], (3, 50, 50)).astype(np.uint8)
    said = rng.integers(0, 4, (3, 50, 50))
    classes = list("abcdef")  # f: in neither; e: in truth alone; d: predicted alone
    found = segment.map_metrics(truth, said, classes)
    counts = truth != segment.IGNORED
    y, p = truth[counts], said[counts]
    held = [0, 1, 2, 4]
    assert found["miou"] == pytest.approx(jaccard_score(y, p, average="macro", labels=held))
    assert found["aa"] == pytest.approx(recall_score(y, p, average="macro", labels=held))
    assert found["pixel_accuracy"] == pytest.approx((y == p).mean())
    assert [*found["iou_per_class"].values()] == pytest.approx(
        jaccard_score(y, p, average=None, labels=held)
    )
    assert found["classes"] == [*found["iou_per_class"]] == [*found["recall_per_class"]]
    assert (found["classes"], found["only_predicted"]) == (list("abce"), ["d"])
    assert found["confusion"] == confusion_matrix(y, p, labels=range(6)).tolist()


def test_each_prediction_is_held_against_its_own_mask(table, tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "ENCODE_BATCH", 3)
    near = torch.arange(1, 5).view(1, 4, 1, 1)
    monkeypatch.setattr(segment, "predict_scores", lambda model, x, size: -(x - near).abs())
    tiles, _ = tiles_of(table, tmp_path)
    rows, norm = np.arange(1, 12), np.array(([1000.0], [100.0]))  # an image IS its mask's ids
    batches = segment.read_images(tiles, rows, ["Blue"], norm, torch.device("cpu"))
    said, truth = segment.predict(None, batches), tiles.masks[rows]
    assert said.dtype == np.uint8
    assert (said == truth)[truth != segment.IGNORED].all()


# -------------------------------------------------------------------------------------- encoder
def test_dilation_by_hand_is_torchvisions():
    torch.manual_seed(0)
    stretch = [False, True, True]
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=stretch).eval()
    ours = segment.dilate(segment.build_encoder("resnet50", 3))
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    body = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        assert torch.equal(segment.feature_maps(ours, x), body(x))
        small = segment.dilate(segment.build_encoder("resnet18", 1))
        assert segment.feature_maps(small, x[:, :1]).shape == (1, 512, 6, 6)


def test_only_the_decoder_learns_from_kept_features_or_from_new_ones_unless_scratch(
    table, tmp_path, monkeypatch
):
    learn, seen = segment.train, []

    def spy(model, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = learn(model, *rest)
        after = model.state_dict()
        seen.append({k.split(".")[0] for k in before if not torch.equal(after[k], before[k])})
        assert not any(module.training for module in model.modules())
        return losses

    monkeypatch.setattr(segment, "train", spy)
    segment_run(table, tmp_path / "kept", "--size", 32)
    monkeypatch.setattr(segment, "CACHE", 0)
    segment_run(table, tmp_path / "anew", "--size", 32)
    segment_run(table, tmp_path / "s", "--epochs", 1, "--size", 32, "--weights", "scratch")
    assert seen == [{"decoder"}, {"decoder"}, {"encoder", "decoder"}]
    [kept], [anew] = results(tmp_path / "kept"), results(tmp_path / "anew")
    assert kept["config"]["cached"] and not anew["config"]["cached"]
    assert kept["metrics"] == anew["metrics"]
    assert kept["config"]["losses"] == anew["config"]["losses"]
    first, last = kept["config"]["losses"]
    assert last < first


@pytest.mark.parametrize(("bf16", "error"), [(False, 1e-4), (True, 0.1)])
def test_kept_features_are_each_tiles_own(table, tmp_path, monkeypatch, bf16, error):
    monkeypatch.setattr(segment, "native_bf16", lambda device: bf16)
    monkeypatch.setattr(segment, "ENCODE_BATCH", 2)
    tiles, _ = tiles_of(table, tmp_path)
    images = torch.from_numpy(images_of(tiles, np.arange(3), ["NIR"], ([1500.0], [900.0])))
    torch.manual_seed(0)
    encoder = segment.dilate(segment.build_encoder("resnet18", 1)).requires_grad_(False)
    kept = segment.encode(encoder, images)
    assert kept.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for row in range(3):
        image = (tifffile.imread(tiles.files[row][0])[..., 3] - 1500.0) / 900.0
        alone = segment.feature_maps(encoder, torch.from_numpy(image).float()[None, None])
        np.testing.assert_allclose(kept[row].float(), alone[0], rtol=1e-3, atol=error)


def test_an_encoder_that_drifts_fails_the_run_and_writes_nothing(
    table, tmp_path, monkeypatch, capsys
):
    maps = segment.feature_maps

    def forgets_eval(encoder, images):
        encoder.train()
        return maps(encoder, images)

    monkeypatch.setattr(segment, "feature_maps", forgets_eval)
    refused(capsys, 1, settings(table, tmp_path, "--maps", 2), "running_mean", "changed")
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_that_diverges_fails_the_run_and_writes_nothing(
    table, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(segment, "LEARNING_RATE", 1e20)
        refused(capsys, 1, settings(table, tmp_path, "--batch-size", 8), "not finite")
    step = torch.optim.SGD.step

    def overflows(optimiser):
        step(optimiser)
        optimiser.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", overflows)
    last_step = ["--epochs", 1, "--batch-size", 8]  # its loss was still finite
    refused(capsys, 1, settings(table, tmp_path, *last_step), "not finite")
    assert list(tmp_path.iterdir()) == []


def test_batches_are_never_of_one_tile_and_never_more_than_one_too_large(monkeypatch):
    sizes = []
    monkeypatch.setattr(segment, "predict_scores", lambda model, x, size: (
        sizes.append(len(x)) or model["decoder"].weight.expand(len(x), 2, 1, 1)))  # fmt: skip
    parts = {"encoder": torch.nn.Sequential(OrderedDict(conv1=torch.nn.Conv2d(1, 1, 1)))}
    parts["decoder"] = torch.nn.Conv2d(1, 1, 1)
    for count, size in itertools.product(range(2, 20), range(2, 9)):
        x, masks = torch.zeros(count, 1, 1, 1), torch.zeros(count, 1, 1, dtype=torch.uint8)
        args = argparse.Namespace(epochs=1, batch_size=size)
        segment.train(torch.nn.ModuleDict(parts), x, masks, args, 0)
        assert sum(sizes) == count and all(2 <= n <= size + 1 for n in sizes)
        sizes.clear()


def test_tiles_without_a_pixel_that_counts_are_left_out_and_said(table, tmp_path, capsys):
    numbers = iter(range(12))
    other = write_masks(table, tmp_path / "data", lambda mask: mask * (next(numbers) >= 5))
    segment_run(other, tmp_path / "out", "--epochs", 1, "--batch-size", 2)
    [result] = results(tmp_path / "out")
    assert (result["subset"], result["config"]["train"]) == (8, 3)
    assert all(0 < loss < 9 for loss in result["config"]["losses"])
    assert "8 tiles to train, 5 of them without a pixel that counts, 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda n, mask: mask * (n >= 8), ("0 training tiles (2 needed)",)),
        (lambda n, mask: mask * (n < 8), ("0 test tiles (1)",)),
        (lambda n, mask: np.minimum(mask, 1), ("of 1 classes (2)",)),
    ],
)
def test_masks_that_teach_or_test_nothing_are_refused(table, tmp_path, capsys, edit, words):
    numbers = iter(range(12))
    other = write_masks(table, tmp_path / "data", lambda mask: edit(next(numbers), mask))
    refused(capsys, 1, settings(other, tmp_path), *words)
    assert results(tmp_path) == []


# -------------------------------------------------------------------------------------- results
def test_a_result_follows_the_schema_and_a_rerun_skips_it(table, tmp_path, monkeypatch, capsys):
    segment_run(table, tmp_path, "--seeds", 2, "--maps", 1, "--epochs", 1)
    said = capsys.readouterr().out
    first, second = results(tmp_path)
    assert first["stage"] == "segment" and first["schema"] == 1 and first["split"] == "official"
    assert (first["bands"], first["subset"], first["seed"], second["seed"]) == (["Blue"], 8, 0, 1)
    assert set(first["metrics"]) == {
        "miou", "aa", "pixel_accuracy", "iou_per_class", "recall_per_class", "confusion",
        "classes", "only_predicted",
    }  # fmt: skip
    masks = [tifffile.imread(table.parent / f"mask/{n}.tif") for n in range(8, 12)]
    assert np.sum(first["metrics"]["confusion"]) == sum((mask > 0).sum() for mask in masks)
    assert {"size", "arch", "classes", "train", "test", "lr", "losses"} <= set(first["config"])
    assert set(first["seconds"]) == {"read", "encode", "train"}
    sheets = list(tmp_path.glob("*-maps.png"))
    assert [Image.open(sheet).size for sheet in sheets] == [(900, 426)] * 2  # a row each
    for path in tmp_path.iterdir():
        assert f"wrote {path}" in said
    mean = np.mean([result["metrics"]["miou"] for result in (first, second)])
    assert f"\nBlue  {mean:.3f} ± " in said
    monkeypatch.setattr(segment, "train", lambda *_: pytest.fail("trained again"))
    segment_run(table, tmp_path, "--seeds", 2, "--maps", 1, "--epochs", 1)
    assert capsys.readouterr().out.count("done before") == 2


@pytest.fixture
def instant(monkeypatch):
    """Runs whose model is nothing: what is left is which files they would write."""

    class Nothing(torch.nn.Module):
        width = 1

    deeplab = torchvision.models.segmentation.deeplabv3
    monkeypatch.setattr(deeplab, "DeepLabHead", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(segment, "load_encoder", lambda *_: Nothing())
    monkeypatch.setattr(segment, "dilate", lambda encoder: encoder)
    monkeypatch.setattr(segment, "encode", lambda encoder, images: images)
    monkeypatch.setattr(segment, "train", lambda *_: torch.ones(1))
    monkeypatch.setattr(segment, "predict", lambda model, batches: np.concatenate(
        [np.zeros((len(x), *x.shape[2:]), np.uint8) for x in batches]))  # fmt: skip


def test_whatever_determines_a_result_makes_another_one_when_it_changes(
    table, tmp_path, instant, monkeypatch, capsys
):
    def copied(name):
        shutil.copytree(table.parent, tmp_path / name)
        return tmp_path / name / "tiles.csv"

    def changed(path, at, value):
        pixels = tifffile.imread(path)
        size = path.stat().st_size
        pixels[at] = value
        write_tile(path, pixels)
        assert path.stat().st_size == size

    here, out = copied("here"), tmp_path / "out"
    weights = [write_encoder(tmp_path / f"{n}.safetensors", ["Blue", "NIR"]) for n in range(2)]
    base = ["--weights", weights[0], "--num-images", 6]
    seen, tasks = set(), []

    def new(*more, root=here, band="B02", s2="B02,B03,B04,B08"):
        before = set(out.glob("*.json"))
        segment_run(root, out, *base, "--s2-bands", s2, *more, band=band)
        made = set(out.glob("*.json")) - before
        assert "done before" in capsys.readouterr().out or made
        seen.update(made)
        tasks.append({json.loads(path.read_text())["config"]["task"] for path in made})
        return len(made)

    assert new() == 1 and new() == 0  # the same again: nothing
    flags = [
        ("--epochs", 3), ("--batch-size", 3), ("--size", 32),
        ("--stats", "encoder"), ("--num-images", 5), ("--seeds", 2), ("--split", "random"),
        ("--ignore", "4"), ("--classes", "a,b,c,e"), ("--classes", "z,a,b,c,d", "--ignore", "77"),
        ("--classes", "a,b,c", "--ignore", "0,4"), ("--weights", weights[1]),
        ("--weights", "random"), ("--weights", "random", "--arch", "resnet34"),
        ("--weights", "scratch"), ("--nodata", 0),
    ]  # fmt: skip
    for flag in flags:
        assert new(*flag) == 1, flag
        same = flag[0] in ("--weights", "--seeds", "--stats")  # what a table may set side by side
        assert (tasks[-1] == tasks[0]) == same, flag
        assert new(*flag) == 0, flag
    assert new(band="B08") == 1 and tasks[-1] == tasks[0]
    assert new(s2="B08,B03,B04,B02") == 1  # the band order corrected
    assert new(root=copied("there")) == 1  # another archive with the same names
    for kind, at in (("s2", (0, 0, 0)), ("s1", (0, 0, 0)), ("mask", (0, 0))):
        changed(here.parent / kind / "0.tif", at, 3)
        assert new() == 1, kind
    changed(here.parent / "s2/11.tif", (5, 5, 0), 4000)  # a test tile
    assert new() == 1
    here.write_text(here.read_text().replace("7.tif,train", "7.tif,test"))
    assert new() == 1
    native = segment.native_bf16(torch.device("cpu"))
    monkeypatch.setattr(segment, "native_bf16", lambda device: not native)
    assert new() == 1
    assert len(seen) == len(flags) + 10


# ------------------------------------------------------------------------------ data and errors
def write_dfc2020(root: Path, copernicus: bool, s1_type=np.float64, mask_type=np.int32) -> Path:
    for n in range(6):
        rng = np.random.default_rng(n)
        mask = np.kron(rng.integers(0, 11, (4, 4)), np.ones((8, 8), int)).astype(mask_type)
        tiles = {"dfc": mask, "s2": rng.integers(0, 3000, (32, 32, 13)).astype(np.uint16),
                 "s1": rng.normal(-12, 4, (32, 32, 2)).astype(s1_type)}  # fmt: skip
        part, folder = ("validation", "validation") if n < 4 else ("test", "0")
        for kind, pixels in tiles.items():
            name = f"ROIs0000_{part}_{kind}_0_p{n}.tif"
            inner = kind if copernicus else f"ROIs0000_{part}/{kind}_{folder}"
            write_tile(root / inner / name, pixels)
    if copernicus:
        names = [path.name for path in sorted((root / "dfc").glob("*.tif"))]  # test first
        for part, found in (("train", names[2:]), ("val", []), ("test", names[:2])):
            (root / f"dfc-{part}-new.csv").write_text("".join(f"{name}\n" for name in found))
    return root


@pytest.mark.parametrize(
    "copernicus, types", [(False, (np.float64, np.int32)), (True, (np.float32, np.uint8))]
)
def test_both_dfc2020_layouts_are_read(tmp_path, copernicus, types):
    root = write_dfc2020(tmp_path / "dfc2020_s1s2", copernicus, *types)
    argv = ["--dataset", "dfc2020", "--root", str(root), "--band", "VV", "--out", str(tmp_path)]
    for classes, labels in (("8", 8), ("10", 10)):
        args = segment.arguments([*argv, "--classes", classes, "--split", "official"])
        tiles = segment.list_tiles(args)
        train, _, test = segment.split_tiles(tiles, args, 0)
        assert len(train) == 4 and len(test) == 2
        assert all("validation" in tiles.names[row] for row in train)
        assert len(args.classes) == labels
        raw = np.stack([tifffile.imread(root / tiles.names[row]) for row in train])
        ignored = np.isin(raw, [0, 3, 8] if labels == 8 else [0])
        masks = tiles.masks[train]
        assert ((masks == segment.IGNORED) == ignored).all()
        ids = np.array([segment.LAND_COVER.index(name) + 1 for name in args.classes])
        assert (ids[masks[~ignored]] == raw[~ignored]).all()
        s1 = np.stack([tifffile.imread(tiles.files[row][1])[..., 0] for row in train])
        s2 = np.stack([tifffile.imread(tiles.files[row][0])[..., 8] for row in train])
        mean, std = segment.band_statistics(tiles, train, ["SAR1", "NNIR"], args)
        assert mean == pytest.approx([s1.mean(), s2.mean()], rel=1e-5)
        images = images_of(tiles, train, ["SAR1", "NNIR"], (mean, std))
        np.testing.assert_allclose(images[:, 0], (s1 - mean[0]) / std[0], atol=1e-4)
        np.testing.assert_allclose(images[:, 1], (s2 - mean[1]) / std[1], atol=1e-4)


def test_both_dfc2020_layouts_at_once_are_refused(tmp_path, capsys):
    for copernicus in (False, True):  # else the same tile can be in training and in test
        write_dfc2020(tmp_path / "dfc2020_s1s2", copernicus)
    argv = ["--dataset", "dfc2020", "--root", str(tmp_path / "dfc2020_s1s2"), "--band", "VV"]
    refused(capsys, 2, [*argv, "--out", str(tmp_path)], "holds DFC2020 twice")


def test_a_list_that_is_no_text_is_one_line(tmp_path, capsys):
    root = write_dfc2020(tmp_path / "dfc2020_s1s2", True)
    (root / "dfc-val-new.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    argv = ["--dataset", "dfc2020", "--root", str(root), "--band", "VV", "--out", str(tmp_path)]
    refused(capsys, 1, argv, "dfc-val-new.csv", "PNG", "no name of a mask")


def test_random_split_draws_the_number_asked_for_and_tests_on_the_rest(table, tmp_path):
    tiles, args = tiles_of(table, tmp_path, "--split", "random", "--num-images", 5)
    train, _, test = segment.split_tiles(tiles, args, 0)
    assert len(train) == 5 and sorted([*train, *test]) == list(range(12))
    assert [*train] != [*segment.split_tiles(tiles, args, 1)[0]]
    args.num_images, args.dataset = None, "dfc2020"  # 900, but there are 12
    train, _, test = segment.split_tiles(tiles, args, 0)
    assert (len(train), len(test)) == (10, 2)
    args.num_images = 12
    with pytest.raises(SystemExit, match="^2$"):
        segment.split_tiles(tiles, args, 0)


def test_the_official_split_trains_on_all_that_is_not_test(table, tmp_path):
    tiles, args = tiles_of(table, tmp_path, "--split", "official")
    part = ["train"] * 5 + ["val"] * 3 + ["test"] * 4
    train, _, test = segment.split_tiles(tiles._replace(part=part), args, 0)
    assert [*train] == [0, 1, 2, 3, 4, 5, 6, 7] and [*test] == [8, 9, 10, 11]
    args.num_images = 9
    with pytest.raises(SystemExit, match="^2$"):
        segment.split_tiles(tiles._replace(part=part), args, 0)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_file_in_two_rows_is_refused_by_name(table, tmp_path, capsys, column):
    for kind in ("s1", "s2", "mask"):
        (tmp_path / kind).symlink_to(table.parent / kind)
    rows = [line.split(",") for line in table.read_text().splitlines()]
    rows[9][column] = "s1/../" + rows[2][column]  # row 2 trains, row 9 tests
    (tmp_path / "tiles.csv").write_text("\n".join(map(",".join, rows)))
    argv = settings(tmp_path / "tiles.csv", tmp_path)
    refused(capsys, 1, argv, f"{rows[2][column]} comes twice")


@pytest.mark.skipif(not (REAL / "bigearthnet").is_dir(), reason="no ../shared/data/bigearthnet")
def test_real_bigearthnet_tiles_run(tmp_path):
    names = "urban,crops,forest,shrub,wetland,water"
    small = ["--num-images", 6, "--size", 32, "--epochs", 1, "--classes", names]
    argv = settings(REAL / "bigearthnet" / "tiles.csv", tmp_path, *small, band="VH")
    segment.main(segment.arguments(argv))
    [result] = results(tmp_path)
    assert result["config"]["train"] == 6 and result["config"]["test"] == 24
    assert -30 < result["config"]["mean"][0] < -5  # dB


def test_out_of_memory_is_one_line(table, tmp_path, capsys, monkeypatch):
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    monkeypatch.setattr(segment, "train", mock.Mock(side_effect=error))
    refused(capsys, 1, settings(table, tmp_path), "too little memory", "--batch-size")


def test_wrong_use_ends_in_one_line(table, tmp_path, capsys):
    dfc = ["--dataset", "dfc2020", "--band", "RE5"]
    refused(capsys, 2, [*dfc, "--s2-bands", "B02"], "are for --dataset csv")
    refused(capsys, 2, [*dfc, "--ignore", "3"], "are for --dataset csv")
    refused(capsys, 2, [*dfc, "--nodata", "nan"], "--nodata nan")
    dfc += ["--out", str(tmp_path)]
    refused(capsys, 2, [*dfc, "--root", str(tmp_path / "none")], "dfc2020.zip", "md5 f10ba017")
    refused(capsys, 2, [*dfc, "--root", str(tmp_path), "--classes", "9"], "--classes 9", "8 or 10")
    refused(capsys, 2, [*dfc, "--epochs", "x"], "--epochs", "'x'", "--help")
    refused(capsys, 2, settings(table, tmp_path, band="RE5"), "RE5 (B05)", "NIR")
    refused(capsys, 2, settings(table, tmp_path, "--batch-size", 1), "--batch-size 1")
    for classes in ("a", "a,b,a", "a,,b"):
        refused(capsys, 2, settings(table, tmp_path, "--classes", classes), f"--classes {classes}")
    refused(capsys, 2, settings(table, tmp_path, "--ignore", "0,x"), "--ignore 0,x", "whole")
    refused(capsys, 2, settings(table, tmp_path, "--device", "cuda:99"), "--device cuda:99")
    refused(capsys, 2, settings(table, tmp_path, "--s2-bands", "VV,B03,B04,B08"), "SAR1", "name it")
    refused(capsys, 1, settings(table, tmp_path, "--size", 64), "40 x 40", "--size")
    assert results(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s1,s2\na,b", ("line 1: 's1,s2' lacks", "mask", "no commas")),
        ('s1,s2,mask\n"a,b,c', ("line 2", "quotation mark")),
        ("s1,s2,mask\n", ("line 2: no row",)),
        ("s1,s2,mask\na,b,c", ("No such file", "/b")),
        ("s1,s2,mask,split\na,b,c,training", ("tiles.csv", "'training'")),
    ],
)
def test_a_fault_of_the_table_is_one_line_with_its_place(tmp_path, capsys, text, words):
    (tmp_path / "tiles.csv").write_text(text)
    refused(capsys, 1, settings(tmp_path / "tiles.csv", tmp_path), *words)


def altered(table: Path, folder: Path, number: int, edit) -> Path:
    """A copy of the archive in which `edit` has changed one S2 file; its table."""
    shutil.copytree(table.parent, folder)
    edit(folder / "s2" / f"{number}.tif")
    return folder / "tiles.csv"


def test_a_tile_of_another_shape_than_its_mask_is_refused(table, tmp_path, capsys):
    """It would be stretched; one of other pixels, as wide as it is high, is not."""

    def rewrite(rows, columns):
        return lambda path: write_tile(path, np.random.rand(rows, columns, 4).astype(np.float32))

    argv = settings(altered(table, tmp_path / "a", 3, rewrite(10, 40)), tmp_path / "out")
    refused(capsys, 1, argv, "s2/3.tif is 10 x 40", "mask/3.tif 40 x 40: they")
    segment_run(altered(table, tmp_path / "b", 3, rewrite(20, 20)), tmp_path / "out")


def test_a_bad_test_tile_is_found_before_the_training(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(segment, "train", lambda *_: pytest.fail("it has begun to train"))
    cut = lambda path: path.write_bytes(path.read_bytes()[:-3000])  # noqa: E731
    argv = settings(altered(table, tmp_path / "a", 11, cut), tmp_path / "out")
    refused(capsys, 1, argv, "s2/11.tif")


def test_a_class_without_a_training_mask_is_told_of(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(segment, "predict", lambda *_: np.zeros((4, 40, 40), np.uint8))
    segment_run(table, tmp_path / "all")
    assert "no training mask" not in capsys.readouterr().out
    tiles, args = tiles_of(table, tmp_path)
    train = segment.split_tiles(tiles, args, 0)[0]
    read = segment.read_masks

    def without(paths, args):
        found = read(paths, args)
        found["masks"][train] = np.where(found["masks"][train] == 1, 0, found["masks"][train])
        return found

    monkeypatch.setattr(segment, "read_masks", without)
    segment_run(table, tmp_path / "some")
    assert "  tested, but in no training mask: b\n" in capsys.readouterr().out


def test_a_map_of_a_single_class_is_told_of(table, tmp_path, capsys, monkeypatch):
    whole = "the only class predicted"
    monkeypatch.setattr(segment, "predict", lambda *_: np.zeros((4, 40, 40), np.uint8))
    segment_run(table, tmp_path / "one")
    assert f"  {whole}; more --epochs may help: a" in capsys.readouterr().out
    two = np.zeros((4, 40, 40), np.uint8)
    two[0, 0, 0] = 1
    monkeypatch.setattr(segment, "predict", lambda *_: two)
    segment_run(table, tmp_path / "two")
    assert whole not in capsys.readouterr().out
