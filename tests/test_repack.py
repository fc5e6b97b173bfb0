"""`python -m bandcrop.repack` against tifffile: the same samples and tags, whatever happens."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import bandcrop
import numpy as np
import pytest
import tifffile
from bandcrop import repack
from conftest import in_process
from test_bandcrop import REAL, image, real_data, samples_by_tifffile, write

GDAL_XML = (
    '<GDALMetadata>\n  <Item name="SCENE">Zürich</Item>\n'
    '  <Item name="DESCRIPTION" sample="1" role="description">B02</Item>\n</GDALMetadata>'
)
TAGS = [
    (33550, 12, 3, (10.0, 10.0, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 5.2e6, 0.0), True),
    (34264, 12, 16, tuple(map(float, range(16))), True),
    (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632), True),
    (34736, 12, 1, 6378137.0, True),
    (34737, 2, 0, "WGS 84 / UTM zone 32N|", True),
    (42112, 2, 0, GDAL_XML.encode(), True),
    (42113, 2, 0, "-9999", True),
]


run = partial(in_process, repack.main, "repack")


@pytest.fixture
def archive(tmp_path):
    """A tree of two sensors, a list and a folder of another name."""
    root = tmp_path / "archive"
    for folder in ("s1", "s2/a b"):
        (root / folder).mkdir(parents=True)
    (root / "pairs.csv").write_text("s1,s2\ns1/0.tif,s2/a b/0.tif\n")
    for i in range(3):
        sar = image((2, 20, 24), "f4", i)
        sar[0, 3, :5] = np.nan
        write(root / f"s1/{i}.tif", sar, compression="lzw", extratags=TAGS)
        write(root / f"s2/a b/{i}.tif", image((5, 20, 24), "u2", i), byteorder=">", extratags=TAGS)
    write(root / "s2/one.TIFF", image((1, 70, 30), "i2"), compression="zlib", tile=(32, 32))
    return root


def files_below(root):
    return {p.relative_to(root): p for p in sorted(root.rglob("*")) if p.is_file()}


def tags_of(path):
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        return {t[0]: page.tags[t[0]].value for t in TAGS if t[0] in page.tags}


def assert_same(source, target):
    before, after = samples_by_tifffile(source), samples_by_tifffile(target)
    assert before.dtype.newbyteorder("=") == after.dtype
    np.testing.assert_array_equal(before, after)
    assert tags_of(source) == tags_of(target)
    tile = bandcrop.info(target)
    assert (tile.compression, tile.tiled) == ("none", False)
    assert tile.planar == "separate" or tile.bands == 1


def test_samples_tags_and_tree_stay_and_bands_lie_in_planes(archive, tmp_path):
    done = run(archive, tmp_path / "new")
    assert done.returncode == 0, done.stderr
    sources, targets = files_below(archive), files_below(tmp_path / "new")
    assert sources.keys() == targets.keys()
    for name, source in sources.items():
        if name.suffix == ".csv":
            assert targets[name].read_bytes() == source.read_bytes()
        else:
            assert_same(source, targets[name])


@real_data
@pytest.mark.parametrize("name", ["sen12ms", "zoo"])
def test_real_archives_stay_the_same(tmp_path, name):
    done = run(REAL / name, tmp_path / "new")
    assert done.returncode == 0, done.stderr
    sources, targets = files_below(REAL / name), files_below(tmp_path / "new")
    assert sources.keys() == targets.keys()
    for name, source in sources.items():
        if name.suffix in (".tif", ".tiff"):
            assert_same(source, targets[name])


def test_bands_are_kept_of_the_files_that_have_them(archive, tmp_path):
    assert run(archive, tmp_path / "new", "--bands", "5,1").returncode == 0
    sources, targets = files_below(archive), files_below(tmp_path / "new")
    name = Path("s2/a b/1.tif")
    kept = samples_by_tifffile(targets[name])
    np.testing.assert_array_equal(kept, samples_by_tifffile(sources[name])[[4, 0]])
    text = tags_of(targets[name])[42112]
    assert "Zürich" in text and "B02" not in text  # it was said of the second band
    assert_same(sources[Path("s1/0.tif")], targets[Path("s1/0.tif")])
    # Other bands of the same files are made anew, not taken for done.
    assert run(archive, tmp_path / "new", "--bands", "2,3").returncode == 0
    kept = samples_by_tifffile(targets[name])
    np.testing.assert_array_equal(kept, samples_by_tifffile(sources[name])[[1, 2]])


def test_what_is_done_is_not_made_again_and_what_changed_is(archive, tmp_path):
    new = tmp_path / "new"
    assert run(archive, new).returncode == 0
    inodes = {name: path.stat().st_ino for name, path in files_below(new).items()}
    changed = Path("s1/2.tif")
    write(archive / changed, image((2, 20, 24), "f4", 9))
    assert "1 files written" in run(archive, new).stdout
    for name, path in files_below(new).items():
        assert (path.stat().st_ino == inodes[name]) == (name != changed)
    assert_same(archive / changed, new / changed)


def test_a_kill_leaves_only_whole_files_and_the_next_run_the_rest(archive, tmp_path):
    for i in range(200):
        shutil.copy(archive / "s2/a b/0.tif", archive / f"s2/{i}.tif")
    new = tmp_path / "new"
    command = [sys.executable, "-m", "bandcrop.repack", archive, new]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (new / "s2").is_dir() or len(os.listdir(new / "s2")) < 20:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = [path for path in files_below(new).values() if path.suffix != ".part"]
    for path in whole:
        if repack.is_tiff(path):
            assert_same(archive / path.relative_to(new), path)
    made = 208 - len(whole)
    assert 0 < made and f"{made} files written" in run(archive, new).stdout
    assert files_below(new).keys() == files_below(archive).keys()


def test_a_file_that_cannot_be_kept_is_named_and_the_others_are_done(archive, tmp_path):
    (archive / "s1/0.tif").write_bytes(b"II*\0damaged")
    tifffile.imwrite(
        archive / "pages.tif", image((3, 8, 8), "u1"), photometric="minisblack", metadata=None
    )
    (archive / "a.txt").symlink_to("nowhere")
    done = run(archive, tmp_path / "new")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(name in done.stderr for name in ("s1/0.tif", "pages.tif", "a.txt"))
    assert " 3 of " in done.stderr
    missing = files_below(archive).keys() - files_below(tmp_path / "new").keys()
    assert missing == {Path("s1/0.tif"), Path("pages.tif")}


def test_files_that_repack_did_not_make_are_never_overwritten(archive, tmp_path):
    mine = write(tmp_path / "new.tif", image((2, 9, 9), "u1"))
    new = tmp_path / "new"
    (new / "s1").mkdir(parents=True)
    shutil.move(mine, new / "s1/0.tif")
    (new / "pairs.csv").write_text("mine")
    before = (new / "s1/0.tif").read_bytes()
    done = run(archive, new)
    assert done.returncode == 1
    assert (new / "s1/0.tif").read_bytes() == before
    assert (new / "pairs.csv").read_text() == "mine"


@pytest.mark.parametrize("damage", ["pixels", "tags"])
def test_a_copy_that_differs_is_not_kept(archive, tmp_path, monkeypatch, damage):
    right = tifffile.imwrite

    def wrong(path, data, **options):
        if damage == "pixels":
            data = data.copy()
            data.flat[7] += 1
        else:
            options["extratags"] = options["extratags"][:-1]
        right(path, data, **options)

    monkeypatch.setattr(tifffile, "imwrite", wrong)
    with pytest.raises(ValueError, match="differs"):
        repack.repack(archive / "s2/a b/0.tif", tmp_path / "x" / "0.tif", None)
    assert list((tmp_path / "x").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(archive, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/s1").write_text("a file where a folder should be")
    done = run(archive, tmp_path / "new")
    assert done.returncode == 1 and "new/s1" in done.stderr and "Trace" not in done.stderr
    assert done.stderr.count("error") == 1


def test_wrong_use_is_refused(archive, tmp_path):
    wrong = [
        (archive, archive), (archive, archive / "below"), (archive, tmp_path),
        (tmp_path / "missing", tmp_path / "new"), (archive, tmp_path / "new", "--bands", "0,1"),
        (archive, tmp_path / "new", "--bands", "1,1"), (archive,),
    ]  # fmt: skip
    for argv in wrong:
        done = run(*argv)
        assert done.returncode == 2 and "error:" in done.stderr and "Trace" not in done.stderr
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "new").returncode == 1
