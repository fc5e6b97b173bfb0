"""segment.py: masks that stay on their images, measures, the cache, resuming, frozenness."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torchvision
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

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
    return [*argv, "--epochs", "2", "--batch-size", "4", *map(str, more)]


def segment_run(*args, **kwargs):
    segment.main(segment.arguments(settings(*args, **kwargs)))


def results(out):
    return [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]


def refused(capsys, status, argv, *words):
    with pytest.raises(SystemExit) as ended:
        segment.main(segment.arguments(argv))
    said = capsys.readouterr().err
    assert ended.value.code == status, said
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert all(line.startswith("  ") for line in said.strip().splitlines()[1:])
    for word in words:
        assert str(word) in said


# ------------------------------------------------------------------------------------ alignment
def turned(pixels: np.ndarray, bits: int) -> np.ndarray:
    pixels = pixels.T if bits & 4 else pixels
    pixels = np.flipud(pixels) if bits & 2 else pixels
    return np.fliplr(pixels) if bits & 1 else pixels


def test_masks_are_cut_and_turned_exactly_with_their_images_under_every_orientation(
    table, tmp_path
):
    args = segment.arguments(settings(table, tmp_path))
    tiles = segment.list_tiles(args)
    setup = segment.Setup(["Blue"], [1000.0], [100.0])  # standardised, the first band IS the id
    rows = np.arange(8)
    windows = [(0, 0, 24, 24), (3, 5, 24, 24), (16, 16, 24, 24), (7, 0, 24, 24)] * 2
    cuts = [segment.Cut(window, bits) for bits, window in enumerate(windows)]
    images, replaced = segment.read_tiles(tiles, rows, cuts, setup, segment.bandcrop.Reader())
    masks = segment.read_masks(tiles, rows, cuts)
    ids = np.where(masks == segment.IGNORED, 0, masks + 1)
    assert np.abs(images[:, 0] - ids).max() < 1e-4 and replaced == 0
    for row, (window, bits) in enumerate(cuts):
        top, left, side, _ = window
        whole = tifffile.imread(tiles.masks[row])
        assert (ids[row] == turned(whole[top : top + side, left : left + side], bits)).all()


def test_drawn_cuts_reach_every_place_and_orientation_and_the_middle_is_the_default(
    table, tmp_path
):
    tiles = segment.list_tiles(segment.arguments(settings(table, tmp_path)))
    rows = np.zeros(3000, int)
    cuts = segment.cut_tiles(tiles, rows, 34, np.random.default_rng(0))
    assert {cut.window[0] for cut in cuts} == {cut.window[1] for cut in cuts} == set(range(7))
    assert {cut.orient for cut in cuts} == set(range(8))
    assert segment.cut_tiles(tiles, rows[:1], 34, None) == [segment.Cut((3, 3, 34, 34), 0)]
    assert segment.cut_tiles(tiles, rows[:1], None, None) == [segment.Cut((0, 0, 40, 40), 0)]


def test_a_mask_id_that_is_neither_class_nor_ignored_is_refused(table, tmp_path, capsys):
    argv = settings(table, tmp_path, "--classes", "a,b,c")
    refused(capsys, 1, argv, "id 4", "--ignore", "mask/")
    args = segment.arguments(settings(table, tmp_path, "--classes", "z,a,c,d", "--ignore", "2,9"))
    assert segment.list_tiles(args).classes == {0: "z", 1: "a", 3: "c", 4: "d"}


# ------------------------------------------------------------------------------------- measures
def test_measures_equal_scikit_learn_on_the_pixels_that_count():
    rng = np.random.default_rng(0)
    truth, said = (
        rng.choice([0, 1, 2, 4, segment.IGNORED], (3, 50, 50)),
        rng.integers(0, 4, (3, 50, 50)),
    )
    classes = list("abcdef")  # f: in neither; e: in truth alone; d: predicted alone
    found = segment.map_metrics(segment.count_pixels(truth, said, 6), classes)
    counts = truth != segment.IGNORED
    y, p = truth[counts], said[counts]
    assert found["miou"] == pytest.approx(jaccard_score(y, p, average="macro", labels=range(5)))
    assert found["aa"] == pytest.approx(recall_score(y, p, average="macro", labels=[0, 1, 2, 4]))
    assert found["pixel_accuracy"] == pytest.approx((y == p).mean())
    assert list(found["iou_per_class"]) == list("abcde")
    assert list(found["recall_per_class"]) == list("abce")
    assert found["confusion"] == confusion_matrix(y, p, labels=range(6)).tolist()


# -------------------------------------------------------------------------------------- encoder
def test_dilation_by_hand_is_torchvisions():
    torch.manual_seed(0)
    stretch = [False, True, True]
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=stretch).eval()
    ours = segment.dilate(segment.build_encoder("resnet50", 3))
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 48, 48)
    body = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        assert torch.equal(segment.feature_maps(ours, x), body(x))
        small = segment.dilate(segment.build_encoder("resnet18", 1))
        assert segment.feature_maps(small, x[:, :1]).shape == (1, 512, 6, 6)


def test_training_from_the_cache_gives_what_training_without_it_gives(table, tmp_path):
    for name, more in (("memory", []), ("file", ["--cache-gb", 0]), ("none", ["--no-cache"])):
        segment_run(table, tmp_path / name, *more)
    [memory], [file], [none] = (results(tmp_path / n) for n in ("memory", "file", "none"))
    assert memory["config"]["cached"] and file["config"]["cached"] and not none["config"]["cached"]
    assert memory["metrics"] == file["metrics"] == none["metrics"]
    assert memory["config"]["losses"] == file["config"]["losses"] == none["config"]["losses"]
    assert len(list((tmp_path / "file").iterdir())) == 1  # the temporary file is gone


@pytest.mark.parametrize(("bf16", "error"), [(False, 1e-4), (True, 0.1)])
def test_the_cache_holds_each_tiles_own_features(table, tmp_path, monkeypatch, bf16, error):
    monkeypatch.setattr(segment, "native_bf16", lambda device: bf16)
    tiles = segment.list_tiles(segment.arguments(settings(table, tmp_path)))
    setup, rows = segment.Setup(["NIR"], [1500.0], [900.0]), np.arange(8)
    torch.manual_seed(0)
    encoder = segment.dilate(segment.build_encoder("resnet18", 1)).requires_grad_(False)
    cuts = segment.cut_tiles(tiles, rows, None, None)
    spent = {"read": 0.0, "replaced": 0}
    batches = segment.read_ahead(tiles, rows, cuts, setup, 3, spent)
    features, masks = segment.cache_features(encoder, batches, 8, 1.0, tmp_path)
    rounded = torch.from_numpy(features).bfloat16().float().numpy()
    assert features.dtype == np.float32 and np.array_equal(features, rounded) == bf16
    for row in rows:
        image = (tifffile.imread(tiles.files[row][0])[..., 3] - 1500.0) / 900.0
        alone = segment.feature_maps(encoder, torch.from_numpy(image).float()[None, None])
        np.testing.assert_allclose(features[row], alone[0], rtol=1e-3, atol=error)
        ids = np.where(masks[row] == segment.IGNORED, 0, masks[row] + 1)
        assert (ids == tifffile.imread(tiles.masks[row])).all()


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


def test_only_the_decoder_learns_unless_scratch(table, tmp_path, monkeypatch):
    train, seen = segment.train_decoder, {}

    def spy(model, batches_of, args, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = train(model, batches_of, args, *rest)
        moved = {
            k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])
        }
        seen[args.weights.kind] = moved
        return losses

    monkeypatch.setattr(segment, "train_decoder", spy)
    segment_run(table, tmp_path, "--epochs", 1)
    segment_run(table, tmp_path, "--epochs", 1, "--weights", "scratch")
    assert seen == {"random": {"decoder"}, "scratch": {"encoder", "decoder"}}


def test_a_decoder_learns_a_band_that_is_the_mask(table, tmp_path):
    segment_run(table, tmp_path, "--epochs", 15)
    [result] = results(tmp_path)
    losses = result["config"]["losses"]
    assert losses[-1] < 0.9 * losses[0]


def test_coco_weights_give_their_own_encoder(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, aux_loss=True
    ).eval()
    torch.save(whole.state_dict(), tmp_path / "coco.pth")
    weights = segment.find_weights(f"coco:{tmp_path / 'coco.pth'}")
    encoder, arch = segment.load_encoder(weights, "resnet18", 1)
    x = torch.randn(1, 1, 40, 40)
    with torch.no_grad():
        maps = segment.feature_maps(segment.dilate(encoder), x)
        assert arch == "resnet50"
        assert torch.equal(maps, whole.backbone(x.repeat(1, 3, 1, 1))["out"])


def test_a_decoder_that_diverges_fails_the_run_and_writes_nothing(
    table, tmp_path, monkeypatch, capsys
):
    refused(capsys, 1, settings(table, tmp_path, "--lr", 1e20), "not finite", "--lr")
    step = torch.optim.SGD.step

    def overflows(optimiser):
        step(optimiser)
        optimiser.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.SGD, "step", overflows)
    last_step = ["--epochs", 1, "--batch-size", 8]  # its loss was still finite
    refused(capsys, 1, settings(table, tmp_path, *last_step), "not finite", "--lr")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_without_a_pixel_that_counts_is_passed_over(table, tmp_path):
    lines = ["s1,s2,mask,split"]
    for n in range(12):  # six of eight training masks are ignored: of four batches two at least
        s1, s2, mask = coded(n, 40)
        tiles = {"s1": s1, "s2": s2, "mask": mask * (n >= 6)}
        for kind, pixels in tiles.items():
            write_tile(tmp_path / kind / f"{n}.tif", pixels)
        lines.append(f"s1/{n}.tif,s2/{n}.tif,mask/{n}.tif,{'train' if n < 8 else 'test'}")
    (tmp_path / "tiles.csv").write_text("\n".join(lines))
    segment_run(tmp_path / "tiles.csv", tmp_path / "out", "--batch-size", 2)
    [result] = results(tmp_path / "out")
    losses = result["config"]["losses"]
    assert len(losses) == 2 and all(0 < loss < 9 for loss in losses)


# -------------------------------------------------------------------------------------- results
def test_a_result_follows_the_schema_and_a_rerun_skips_it(table, tmp_path, monkeypatch, capsys):
    segment_run(table, tmp_path, "--seeds", 2, "--maps", 3)
    first, second = results(tmp_path)
    assert first["stage"] == "segment" and first["schema"] == 1 and first["split"] == "official"
    assert (first["bands"], first["subset"], first["seed"], second["seed"]) == (["Blue"], 8, 0, 1)
    assert set(first["metrics"]) == {
        "miou", "aa", "pixel_accuracy", "iou_per_class", "recall_per_class", "confusion"
    }  # fmt: skip
    masks = [tifffile.imread(table.parent / f"mask/{n}.tif") for n in range(8, 12)]
    assert np.sum(first["metrics"]["confusion"]) == sum((mask > 0).sum() for mask in masks)
    assert {"size", "arch", "classes", "train", "test", "lr", "losses"} <= set(first["config"])
    sheets = list(tmp_path.glob("*-maps.png"))
    assert len(sheets) == 2 and Image.open(sheets[0]).size[1] > Image.open(sheets[0]).size[0]
    monkeypatch.setattr(segment, "train_decoder", lambda *_: pytest.fail("trained again"))
    segment_run(table, tmp_path, "--seeds", 2, "--maps", 3)
    assert capsys.readouterr().out.count("done before") == 2


def test_an_interrupted_run_resumes_to_the_same_result(table, tmp_path, monkeypatch):
    segment_run(table, tmp_path / "whole", "--epochs", 4)
    monkeypatch.setattr(segment, "CHECKPOINT_SECONDS", 0.0)
    save, saves = segment.save_checkpoint, []

    def interrupted(*args):
        save(*args)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(segment, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        segment_run(table, tmp_path / "cut", "--epochs", 4)
    assert results(tmp_path / "cut") == [] and len(list((tmp_path / "cut").iterdir())) == 1
    segment_run(table, tmp_path / "cut", "--epochs", 4)
    assert len(saves) == 3  # epochs 1 and 2 were not trained again
    [whole], [cut] = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert whole["config"]["losses"] == cut["config"]["losses"]
    assert whole["metrics"] == cut["metrics"]
    assert len(list((tmp_path / "cut").iterdir())) == 1  # the checkpoint is gone


def test_augmented_training_draws_anew_in_every_epoch(table, tmp_path, monkeypatch):
    drawn, draw = [], segment.cut_tiles

    def spy(tiles, rows, size, rng):
        cuts = draw(tiles, rows, size, rng)
        if rng is not None:
            drawn.append(cuts)
        return cuts

    monkeypatch.setattr(segment, "cut_tiles", spy)
    segment_run(table, tmp_path, "--augment", "--size", 32)
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    assert not results(tmp_path)[0]["config"]["cached"]


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


@pytest.mark.parametrize("copernicus", [False, True])
@pytest.mark.parametrize("types", [(np.float64, np.int32), (np.float32, np.uint8)])
def test_both_dfc2020_layouts_are_read(tmp_path, copernicus, types):
    root = write_dfc2020(tmp_path / "dfc2020_s1s2", copernicus, *types)
    argv = ["--dataset", "dfc2020", "--root", str(root), "--band", "VV", "--out", str(tmp_path)]
    for classes, labels in (("8", 8), ("10", 10)):
        args = segment.arguments([*argv, "--classes", classes, "--split", "official"])
        tiles = segment.list_tiles(args)
        train, test, fewer = segment.split_tiles(tiles, args, 0)
        assert len(train) == 4 and len(test) == 2 and fewer
        assert all("validation" in tiles.names[row] for row in train)
        assert len(tiles.classes) == labels
        cuts = segment.cut_tiles(tiles, train, None, None)
        masks = segment.read_masks(tiles, train, cuts)
        raw = np.stack([tifffile.imread(tiles.masks[row]) for row in train])
        ignored = np.isin(raw, [0, 3, 8] if labels == 8 else [0])
        assert ((masks == segment.IGNORED) == ignored).all()
        back = np.array(list(tiles.classes))[np.where(ignored, 0, masks)]
        assert (back[~ignored] == raw[~ignored]).all()
        mean, std = segment.band_statistics(tiles, train, ["SAR1", "NNIR"])
        s1 = np.stack([tifffile.imread(tiles.files[row][1])[..., 0] for row in train])
        s2 = np.stack([tifffile.imread(tiles.files[row][0])[..., 8] for row in train])
        assert mean == pytest.approx([s1.mean(), s2.mean()], rel=1e-5)
        setup = segment.Setup(["SAR1", "NNIR"], mean, std)
        images, _ = segment.read_tiles(tiles, train, cuts, setup, segment.bandcrop.Reader())
        np.testing.assert_allclose(images[:, 0], (s1 - mean[0]) / std[0], atol=1e-4)
        np.testing.assert_allclose(images[:, 1], (s2 - mean[1]) / std[1], atol=1e-4)


def test_random_split_draws_the_number_asked_for_and_tests_on_the_rest(table, tmp_path):
    args = segment.arguments(settings(table, tmp_path, "--split", "random", "--num-images", 5))
    args.split = "random"
    tiles = segment.list_tiles(args)
    train, test, fewer = segment.split_tiles(tiles, args, 0)
    assert len(train) == 5 and sorted([*train, *test]) == list(range(12)) and not fewer
    assert [*train] != [*segment.split_tiles(tiles, args, 1)[0]]
    args.num_images = 900
    train, test, fewer = segment.split_tiles(tiles, args, 0)
    assert (len(train), len(test), fewer) == (10, 2, True)


@pytest.mark.skipif(not (REAL / "bigearthnet").is_dir(), reason="no ../shared/data/bigearthnet")
def test_real_bigearthnet_tiles_run(tmp_path):
    names = "urban,crops,forest,shrub,wetland,water"
    small = ["--num-images", 6, "--size", 32, "--epochs", 1, "--classes", names]
    argv = settings(REAL / "bigearthnet" / "tiles.csv", tmp_path, *small, band="VH")
    segment.main(segment.arguments(argv))
    [result] = results(tmp_path)
    assert result["config"]["train"] == 6 and result["config"]["test"] == 24
    assert -30 < result["config"]["mean"][0] < -5  # dB


def test_wrong_use_and_bad_data_end_in_one_line(table, tmp_path, capsys):
    dfc = ["--dataset", "dfc2020", "--band", "RE5"]
    refused(capsys, 2, [*dfc, "--root", str(tmp_path / "none")], "dfc2020.zip", segment.DFC2020_MD5)
    refused(capsys, 2, [*dfc, "--root", str(tmp_path), "--out", str(tmp_path)], "no DFC2020")
    refused(capsys, 2, [*dfc, "--root", str(tmp_path), "--classes", "9"], "--classes 9", "8 or 10")
    refused(capsys, 2, settings(table, tmp_path, band="RE5"), "RE5 (B05)", "NIR")
    refused(capsys, 2, settings(table, tmp_path, "--batch-size", 1), "--batch-size 1")
    for lr in ("0", "-0.1", "nan", "1e39"):
        refused(capsys, 2, settings(table, tmp_path, f"--lr={lr}"), "--lr", "above 0")
    refused(capsys, 1, settings(table, tmp_path, "--size", 64), "40 x 40", "--size")
    broken = tmp_path / "tiles.csv"
    broken.write_text("s1,s2,mask\na,b,c")
    refused(capsys, 1, settings(broken, tmp_path), "missing beside its mask")
    broken.write_text("s1,s2\na,b")
    refused(capsys, 1, settings(broken, tmp_path), "'mask'")
    assert results(tmp_path) == []
