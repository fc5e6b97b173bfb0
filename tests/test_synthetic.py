"""The synthetic archives: layouts like the real ones, seeded, informative but not trivial."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import synthetic
import tifffile
from conftest import in_process
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic import EUROSAT, write_dfc2020, write_eurosat, write_sen12ms

HERE = Path(__file__).resolve().parent
REAL = HERE.parent.parent / "shared" / "data"
SIMPLE_IGBP = np.array([0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10])  # SEN12MS's own


@pytest.fixture(scope="module")
def sen12ms(tmp_path_factory):
    root = tmp_path_factory.mktemp("sen12ms")
    write_sen12ms(root, pairs=20, seed=0)
    return root


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory):
    root = tmp_path_factory.mktemp("eurosat")
    write_eurosat(root, per_class=20, seed=0)
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def layout(path):
    """What the tables of a file say, as tifffile reads them."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        names = "Compression PlanarConfiguration Photometric SamplesPerPixel RowsPerStrip".split()
        tags = {name: page.tags.get(name) and page.tags[name].value for name in names}
        first = page.dataoffsets[0]
        contiguous = np.diff(page.dataoffsets).tolist() == list(page.databytecounts[:-1])
        tables = max(tag.valueoffset + tag.valuebytecount for tag in page.tags)
        return tags | {
            "byteorder": file.byteorder,
            "bigtiff": file.is_bigtiff,
            "pages": len(file.pages),
            "shape": page.shape,
            "dtype": page.dtype,
            "strips": len(page.dataoffsets),
            "contiguous": contiguous,
            "tables first": tables <= first,
        }


def test_sen12ms_names_pair_up_and_hold_what_the_facts_say(sen12ms):
    tiles = sorted(sen12ms.rglob("*.tif"))
    season = r"(ROIs(?:1158_spring|1868_summer|1970_fall|2017_winter))"
    pattern = season + r"/(s1|s2|lc)_(\d+)/\1_\2_\3_p\d+\.tif"
    found = [re.fullmatch(pattern, str(p.relative_to(sen12ms))) for p in tiles]
    assert len(tiles) == 60 and all(found)
    expected = {
        "s1": ("float32", 2, 4, 64),
        "s2": ("uint16", 13, 1, 256),
        "lc": ("uint16", 4, 4, 64),
    }
    for path, match in zip(tiles, found, strict=True):
        dtype, bands, rows, strips = expected[match[2]]
        got = layout(path)
        assert (got["shape"], got["dtype"]) == ((256, 256, bands), dtype)
        assert (got["RowsPerStrip"], got["strips"], got["byteorder"]) == (rows, strips, "<")
        assert got["contiguous"] and got["tables first"] and not got["bigtiff"]
        with tifffile.TiffFile(path) as file:
            assert "synthetic" in file.pages[0].description
            assert file.pages[0].dataoffsets[0] <= 4096
        sibling = path.parents[1] / path.parent.name.replace(match[2], "s2")
        assert (sibling / path.name.replace(f"_{match[2]}_", "_s2_")).is_file()


def test_sen12ms_values_are_plausible_and_every_class_leads_twice(sen12ms):
    labels = []
    for path in sorted(sen12ms.rglob("*_lc_*.tif")):
        igbp = tifffile.imread(path)[..., 0]
        assert 1 <= igbp.min() and igbp.max() <= 17
        labels.append(np.bincount(SIMPLE_IGBP[igbp].ravel(), minlength=11).argmax())
    counts = np.bincount(labels, minlength=11)[1:]
    assert counts.min() >= 1 and counts.max() <= 4  # led in turn; another may win a tile
    s1 = np.concatenate([tifffile.imread(p).reshape(-1, 2) for p in sen12ms.rglob("*_s1_*.tif")])
    s2 = np.concatenate([tifffile.imread(p).reshape(-1, 13) for p in sen12ms.rglob("*_s2_*.tif")])
    assert np.isfinite(s1).all() and s1.min() > -40
    # Published means of SEN12MS: VV -11.8, VH -18.3 dB; B02 1226 to B08 2155.
    assert np.allclose(s1.mean(0), [-11.8, -18.3], atol=3)
    assert 900 < s2[:, 1].mean() < 2500 and 1500 < s2[:, 7].mean() < 3000 and s2[:, 10].mean() < 50


def test_both_sensors_see_the_same_map(sen12ms):
    """Class means over the lc map explain much of either sensor; another tile's map does not."""
    lcs = sorted(sen12ms.rglob("*_lc_*.tif"))
    maps = [tifffile.imread(p)[..., 0] for p in lcs]
    for sensor, band in (("s2", 7), ("s1", 0)):
        own, other = [], []
        for index, path in enumerate(lcs):
            twin = path.parents[1] / path.parent.name.replace("lc", sensor)
            tile = tifffile.imread(twin / path.name.replace("_lc_", f"_{sensor}_"))[..., band]
            tile = tile.astype(np.float64)
            for scores, cover in ((own, maps[index]), (other, maps[index - 1])):
                ids, places = np.unique(cover, return_inverse=True)
                means = ndimage.mean(tile, cover, ids)
                scores.append(np.var(means[places]) / np.var(tile))
        assert np.mean(own) > 0.25 and np.mean(other) < 0.1, sensor


def test_eurosat_names_layout_and_band_order(eurosat):
    tiles = sorted(eurosat.rglob("*.tif"))
    names = [re.fullmatch(r"(\w+)/\1_(\d+)\.tif", str(p.relative_to(eurosat))) for p in tiles]
    assert len(tiles) == 200 and all(names) and {m[1] for m in names} == set(EUROSAT)
    got = layout(tiles[0])
    assert (got["shape"], got["dtype"]) == ((64, 64, 13), "uint16")
    assert (got["RowsPerStrip"], got["strips"], got["tables first"]) == (4, 16, True)
    mean = np.mean([tifffile.imread(p).mean((0, 1)) for p in tiles], axis=0)
    assert mean[9] < 50  # B10 (cirrus) is nearly black: index 9 where B8A stands last, 10 otherwise
    assert mean[12] > mean[7] > mean[8] * 2  # B8A a little above B08; B09 far below


@pytest.mark.parametrize("s1, label", [("float32", "uint8"), ("float64", "int32")])
def test_dfc2020_has_the_contests_layout(tmp_path, s1, label):
    root = tmp_path / "dfc2020"
    write_dfc2020(root, 10, 5, seed=0, size=64, s1_dtype=s1, label_dtype=label)
    expected = {"s1": ((64, 64, 2), s1), "s2": ((64, 64, 13), "uint16")}
    expected |= {"lc": ((64, 64, 4), "uint16"), "dfc": ((64, 64), label)}
    for part, ending, total in (("validation", "validation", 10), ("test", "0", 5)):
        for kind, (shape, dtype) in expected.items():
            for number in range(total):
                name = f"ROIs0000_{part}_{kind}_0_p{number}.tif"
                got = layout(root / f"ROIs0000_{part}" / f"{kind}_{ending}" / name)
                assert (got["shape"], got["dtype"]) == (shape, dtype)
    masks = [tifffile.imread(p) for p in sorted(root.rglob("*_dfc_*.tif"))]
    igbp = [tifffile.imread(p)[..., 0] for p in sorted(root.rglob("*_lc_*.tif"))]
    assert set(np.unique(masks)) == set(range(1, 11))
    assert all(np.array_equal(SIMPLE_IGBP[i], m) for i, m in zip(igbp, masks, strict=True))


@pytest.mark.parametrize("kind", ["s1", "s2", "eurosat"])
def test_layout_is_that_of_the_real_files(kind, sen12ms, eurosat):
    folder, pattern = ("eurosat", "*.tif") if kind == "eurosat" else ("sen12ms", f"*_{kind}_*.tif")
    real = sorted((REAL / folder).rglob(pattern))
    if not real:
        pytest.skip(f"real {folder} files: not at {REAL / folder}")
    ours = sorted((eurosat if kind == "eurosat" else sen12ms).rglob(pattern))
    assert layout(ours[0]) == layout(real[0])


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    def write(folder, seed):
        write_sen12ms(folder / "a", 2, seed, size=32)
        write_eurosat(folder / "b", 1, seed)
        write_dfc2020(folder / "e", 1, 1, seed, size=32)
        return contents(folder)

    first, again, other = (write(tmp_path / n, s) for n, s in (("x", 5), ("y", 5), ("z", 6)))
    assert first == again and first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if "_lc_" not in name)


def test_a_larger_archive_begins_with_the_smaller_one(tmp_path):
    write_sen12ms(tmp_path / "few", 3, seed=0, size=32)
    write_sen12ms(tmp_path / "many", 12, seed=0, size=32)
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert all(few[name] == many[name] for name in few if name != "SYNTHETIC.txt")


def macro_f1(features, labels):
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    return f1_score(labels, cross_val_predict(model, features, labels, cv=folds), average="macro")


@pytest.mark.parametrize("band, name", [(2, "Green"), (7, "NIR")])
def test_one_band_tells_the_class_by_texture_more_than_by_brightness(eurosat, band, name):
    """Chance is 0.1; means and spreads of filtered images are the simplest classifier."""
    paths = sorted(eurosat.rglob("*.tif"))
    labels = [path.parent.name for path in paths]
    tiles = np.array([tifffile.imread(path)[..., band] for path in paths], np.float32)
    level = np.log(np.stack([tiles.mean((1, 2)), tiles.std((1, 2))], 1))
    rest = (tiles - tiles.mean((1, 2), keepdims=True)) / tiles.std((1, 2), keepdims=True)
    texture = []
    for sigma in (0.7, 1.4, 2.8, 5.6):
        smooth = ndimage.gaussian_filter(rest, (0, sigma, sigma))
        detail, rest = rest - smooth, smooth
        spread = detail.std((1, 2))
        texture += [np.log(spread), (detail**3).mean((1, 2)) / spread**3]
    by_level, by_texture = macro_f1(level, labels), macro_f1(np.stack(texture, 1), labels)
    assert 0.15 < by_level < 0.6, (by_level, name)
    assert max(0.4, by_level + 0.1) < by_texture < 0.95, (by_texture, name)


def test_foreign_folder_is_refused_and_own_archive_is_kept_or_renewed(tmp_path):
    root = tmp_path / "sen12ms"
    root.mkdir()
    (root / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"sen12ms.*not a synthetic archive"):
        write_sen12ms(root, 1, seed=0, size=32)
    assert contents(tmp_path) == {"sen12ms/mine.txt": b"precious"}
    (root / "mine.txt").unlink()

    assert write_sen12ms(root, 2, seed=0, size=32)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not write_sen12ms(root, 2, seed=0, size=32)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_sen12ms(root, 1, seed=0, size=32)
    assert len(list(root.rglob("*.tif"))) == 3 and os.listdir(tmp_path) == ["sen12ms"]


run = partial(in_process, synthetic.main, "synthetic.py")
SMALL = "--pairs 2 --eurosat 1 --dfc2020 1 1 --size 32".split()


def test_the_command_writes_all_then_skips_them(tmp_path):
    done = run(tmp_path / "demo", *SMALL)
    names = "sen12ms eurosat dfc2020".split()
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "demo" / name) for name in names
    ]
    assert sorted(os.listdir(tmp_path / "demo")) == sorted(names)
    for name in names:
        assert "synthetic" in (tmp_path / "demo" / name / "SYNTHETIC.txt").read_text()
    assert run(tmp_path / "demo", *SMALL).stdout.count("skipped") == len(names)


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "dfc2020").mkdir()
    (tmp_path / "dfc2020" / "real.tif").write_bytes(b"real")
    done = run(tmp_path, *SMALL)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "dfc2020 exists and is not" in done.stderr
    assert os.listdir(tmp_path) == ["dfc2020"]  # checked before the first archive is begun
    file = tmp_path / "file"
    file.write_text("")
    assert run(file, *SMALL).returncode == 2
    assert run(tmp_path / "x", "--pairs", "-1").returncode == 2


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_half_made(tmp_path, kill):
    arguments = [tmp_path / "demo", "--pairs", "5000", "--size", "64"]
    command = [sys.executable, str(HERE / "synthetic.py"), *map(str, arguments)]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in background jobs
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed)
    for _ in range(500):  # until it is at work
        if any((tmp_path / "demo").rglob("*.tif")):
            break
        time.sleep(0.02)
    process.send_signal(kill)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + kill and out == "" and "Traceback" not in err
    assert os.listdir(tmp_path / "demo") == []


def test_the_command_starts_without_torch():
    heavy = {"torch", "matplotlib", "sklearn"}
    code = f"import sys, synthetic; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
