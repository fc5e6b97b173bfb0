"""The reader against tifffile (samples), PIL (resampling) and hand-made hostile files."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import bandcrop
import numpy as np
import pytest
import tifffile
from PIL import Image

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="real data (../shared/data) not here")


def image(shape, dtype, seed=0):
    """Smooth values over much of the dtype's range, [bands, height, width]."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=shape).cumsum(1).cumsum(2)
    span = (walk - walk.min()) / (walk.max() - walk.min())
    if np.dtype(dtype).kind == "f":
        return (span * 40 - 30).astype(dtype)
    about = np.iinfo(dtype)
    low, high = about.min * 0.9, about.max * 0.9
    return (low + span * (high - low)).astype(dtype)


def write(path, array, planar="contig", **options):
    """[bands, height, width] as one TIFF image; tifffile writes, so the oracle is not ours."""
    data = array.transpose(1, 2, 0) if planar == "contig" else array
    options = {"photometric": "minisblack", "metadata": None, "planarconfig": planar, **options}
    if len(array) == 1:
        data, options["planarconfig"] = array[0], None
    tifffile.imwrite(path, data, **options)
    return str(path)


def samples_by_tifffile(path):
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        array = page.asarray()
        if array.ndim == 2:
            return array[None]
        return array if page.planarconfig == 2 else array.transpose(2, 0, 1)


def fill_one(path, band=0, size=(24, 24), window=None, orient=0, reader=None, **options):
    out = np.full((1, 1, *size), np.nan, np.float32)
    windows = None if window is None else np.array([window], np.float64)
    report = (reader or bandcrop.Reader(1)).fill(
        out, [str(path)], np.array([[band]]), windows, np.array([orient], np.uint8), **options
    )
    return out[0, 0], report


def oriented(array, orient):
    """The documented meaning of `orient`, in numpy."""
    if orient & 4:
        array = array.T
    if orient & 2:
        array = array[::-1]
    return array[:, ::-1] if orient & 1 else array


def resized_by_pil(band, size, window, orient=0):
    height, width = band.shape
    top, left, tall, wide = window
    box = (left * width, top * height, (left + wide) * width, (top + tall) * height)
    rows, columns = size[::-1] if orient & 4 else size
    picture = Image.fromarray(band.astype(np.float32))
    return oriented(np.asarray(picture.resize((columns, rows), Image.BICUBIC, box)), orient)


# --- read: exact samples ---------------------------------------------------------------------


@real_data
def test_read_equals_tifffile_on_real_files_of_every_archive():
    codecs = bandcrop.codecs()
    seen = 0
    for path in [*REAL.glob("zoo/*.tif"), *sorted(REAL.rglob("*.tif"))[::8]]:
        if bandcrop.info(str(path)).compression not in codecs:
            continue
        expected = samples_by_tifffile(path)
        got = bandcrop.read(str(path))
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected, err_msg=str(path))
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_an_image_of_several_pieces_is_read_across_their_borders(tmp_path, planar):
    array = np.random.default_rng(0).integers(0, 60000, (3, 1700, 1900), np.uint16)  # 6 MB a band
    path = write(tmp_path / "scene.tif", array, planar, rowsperstrip=3)
    np.testing.assert_array_equal(bandcrop.read(path), array)
    np.testing.assert_array_equal(
        bandcrop.read(path, [2, 1], (5, 9, 1690, 7)), array[[2, 1], 5:-5, 9:16]
    )
    out = np.zeros((1, 2, 1700, 1900), np.float32)
    report = bandcrop.Reader(1).fill(out, [path], [[2, 0]])
    np.testing.assert_array_equal(out[0], array[[2, 0]].astype(np.float32))
    assert report.bytes_read == array.nbytes * (1 if planar == "contig" else 2 / 3)


def test_info_reads_nodata_and_epsg(tmp_path):
    geokeys = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633)
    extra = [(42113, 2, 6, "-9999", True), (34735, 3, len(geokeys), geokeys, True)]
    path = write(tmp_path / "tile.tif", image((1, 8, 8), "f4"), extratags=extra)
    about = bandcrop.info(path)
    assert about.nodata == -9999 and about.epsg == 32633
    plain = bandcrop.info(write(tmp_path / "plain.tif", image((1, 8, 8), "f4")))
    assert plain.nodata is None and plain.epsg is None


@pytest.mark.parametrize(
    "keys, code",
    [
        ((1024, 0, 1, 1, 3072, 0, 1, 32767, 2048, 0, 1, 4326), None),  # projected, user-defined
        ((1024, 0, 1, 1, 2048, 0, 1, 4326), None),  # projected, it does not say how
        ((3072, 0, 1, 32767, 2048, 0, 1, 4326), None),
        ((1024, 0, 1, 2, 2048, 0, 1, 4326), 4326),
        ((2048, 0, 1, 4326), 4326),
        ((1024, 0, 1, 1, 2048, 0, 1, 4258, 3072, 0, 1, 25832), 25832),
    ],
)
def test_epsg_is_the_systems_own_not_its_bases(tmp_path, keys, code):
    directory = (1, 1, 0, len(keys) // 4, *keys)
    extra = [(34735, 3, len(directory), directory, True)]
    path = write(tmp_path / "tile.tif", image((1, 8, 8), "u1"), extratags=extra)
    assert bandcrop.info(path).epsg == code


# --- fill: resampling, orientation, normalisation --------------------------------------------


def windows_to_try(rng, n):
    for _ in range(n):
        tall, wide = rng.uniform(0.02, 1, 2)
        yield rng.uniform(0, 1 - tall), rng.uniform(0, 1 - wide), tall, wide
    yield 0, 0, 1, 1
    yield 0.5, 0.25, 1 / 100, 0.5  # one row
    yield 0.31, 0.99, 0.6, 0.01  # the last column
    yield 0.77, 0.2, 0.004, 0.003  # less than a pixel


@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize("orient", range(8))
def test_fill_agrees_with_pil_on_any_window(tmp_path, dtype, orient):
    array = image((3, 100, 90), dtype, seed=orient)
    path = write(tmp_path / "tile.tif", array, rowsperstrip=1)
    rng = np.random.default_rng(orient)
    for i, window in enumerate(windows_to_try(rng, 12)):
        size = [(64, 64), (224, 200), (17, 23), (8, 120)][i % 4]
        got, _ = fill_one(path, 1, size, window, orient)
        expected = resized_by_pil(array[1], size, window, orient)
        assert np.abs(got - expected).max() < 1e-3 * array[1].std(dtype=np.float64), window


@real_data
def test_fill_agrees_with_pil_on_real_tiles():
    rng = np.random.default_rng(0)
    for path in sorted(REAL.glob("sen12ms/**/*_s?_*.tif"))[::5]:
        bands = bandcrop.read(str(path)).astype(np.float32)
        for window in windows_to_try(rng, 4):
            band, orient = int(rng.integers(len(bands))), int(rng.integers(8))
            got, _ = fill_one(path, band, (96, 130), window, orient)
            expected = resized_by_pil(bands[band], (96, 130), window, orient)
            assert np.abs(got - expected).max() < 1e-3 * bands[band].std()


def test_fill_agrees_with_torch_on_the_whole_tile(tmp_path):
    functional = pytest.importorskip("torch.nn.functional")
    torch = sys.modules["torch"]
    array = image((1, 100, 90), "f4")
    path = write(tmp_path / "tile.tif", array)
    for size in (224, 224), (31, 47):
        expected = functional.interpolate(
            torch.from_numpy(array[None]), size, mode="bicubic", antialias=True
        )
        # torch's antialiased bicubic kernel has a = -0.5 too
        got, _ = fill_one(path, 0, size)
        assert np.abs(got - expected[0, 0].numpy()).max() < 1e-3 * array.std()


@pytest.mark.parametrize("orient", range(8))
@pytest.mark.parametrize("shape", [(40, 56), (120, 60)])
def test_a_window_as_large_as_the_output_is_copied_exactly(tmp_path, orient, shape):
    height, width = shape
    array = image((2, height, width), "f4")
    path = write(tmp_path / "tile.tif", array)
    for top, left, tall, wide in [(0, 0, height, width), (7, 3, 24, 40), (height - 9, 19, 9, 11)]:
        window = (top / height, left / width, tall / height, wide / width)
        size = (wide, tall) if orient & 4 else (tall, wide)
        got, _ = fill_one(path, 1, size, window, orient, mean=[0, 2.5], std=[1, 3.1])
        crop = (array[1, top : top + tall, left : left + wide] - np.float32(2.5)) / np.float32(3.1)
        np.testing.assert_array_equal(got, oriented(crop, orient))


def test_mean_and_std_are_taken_by_band_or_by_sample(tmp_path):
    array = image((3, 20, 20), "i2")
    path = write(tmp_path / "tile.tif", array)
    bands = np.array([[2, 0], [1, 1]])
    mean, std = np.float32([10, -5, 300]), np.float32([2, 4, 8])
    by_band, by_sample = np.zeros((2, 2, 2, 20, 20), np.float32)
    reader = bandcrop.Reader(2)
    reader.fill(by_band, [path, path], bands, mean=mean, std=std)
    reader.fill(by_sample, [path, path], bands, mean=mean[bands], std=std[bands])
    expected = (array.astype(np.float32) - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_array_equal(by_band, expected[bands])
    np.testing.assert_array_equal(by_sample, by_band)


def test_missing_samples_become_the_mean_before_resampling(tmp_path):
    array = image((2, 32, 32), "f4")
    holes = np.zeros((32, 32), bool)
    holes[3:9, 4:30] = holes[20, 20] = True
    array[0][holes] = np.resize([np.nan, np.inf, -np.inf, -9999], holes.sum())
    path = write(tmp_path / "tile.tif", array, extratags=[(42113, 2, 6, "-9999", True)])
    mean, std = np.float32([-12, 1]), np.float32([4, 1])
    filled = np.where(holes, mean[0], array[0])
    for size in (32, 32), (50, 50), (9, 13):
        got, report = fill_one(path, 0, size, mean=mean, std=std)
        expected = (resized_by_pil(filled, size, (0, 0, 1, 1)) - mean[0]) / std[0]
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert report.replaced.tolist() == [holes.sum()]
    got, report = fill_one(path, 0, (32, 32))
    assert not got[holes].any() and report.replaced[0] == holes.sum()


LARGEST = float(np.finfo("f4").max)
# The samples that GDAL 3.10 masks (rasterio 1.4's read_masks) under a text of the nodata tag.
MASKED_BY_GDAL = {
    "0": {"u1": 0, "i2": 0, "f4": 0, "u8": 0},
    "-9999": {"u1": None, "i1": None, "u2": None, "u4": None, "i2": -9999, "i4": -9999,
              "i8": -9999, "u8": 2**64 - 9999, "f4": -9999, "f8": -9999},
    " \t-9999 ": {"u2": None, "i2": -9999, "i8": -9999, "f4": -9999},
    "+5": {"u1": 5, "i8": 5, "f8": 5},
    "5.7": {"u1": 5, "i2": 5, "i8": 5, "f4": float(np.float32(5.7)), "f8": 5.7},
    "-5.5": {"u1": None, "i1": -5, "f4": -5.5},
    "5,5": {"u2": 5, "f8": 5.5},
    "1e2": {"u1": 100, "i4": 100, "f4": 100, "i8": 1},
    "12abc": {"u1": 12, "f4": 12},
    "abc": {"u1": 0, "f8": 0, "i8": 0},
    " ": {"u1": 0, "f4": 0},
    "": {"u1": None, "f4": None, "u8": None},
    "256": {"u1": None, "i1": None, "u2": 256},
    "4294967295": {"u4": 2**32 - 1, "i4": None},
    "9007199254740993": {"i8": 2**53 + 1, "u8": 2**53 + 1},
    "-9223372036854775808": {"i8": -(2**63)},
    "18446744073709551615": {"u8": 2**64 - 1, "i8": 2**63 - 1},
    "0.1": {"u1": 0, "f4": float(np.float32(0.1)), "f8": 0.1},
    "1e300": {"f8": 1e300, "u4": None},
    "1e-400": {"f8": 0},
    "-3.4028234663852886e+38": {"f4": -LARGEST, "f8": -LARGEST},
    "-3.40282346638529e+38": {"f4": -LARGEST},
    "-3.4028235e+38": {"f4": -LARGEST, "f8": -3.4028235e38, "i4": None},
    "-3.402823e+38": {"f4": -LARGEST},
    "3.4028235E+38": {"f4": LARGEST},
}  # fmt: skip


@pytest.mark.parametrize("text", MASKED_BY_GDAL)
def test_nodata_is_the_sample_that_gdal_masks(tmp_path, text):
    for dtype, masked in MASKED_BY_GDAL[text].items():
        array = image((1, 16, 16), dtype)
        array[array == masked] += 1
        array[0, 0, 0] = np.array(-9999).astype(dtype)  # in another type, other bits
        if masked is not None:
            array[0, 2:5, 2:5] = masked
        extra = [(42113, 2, len(text) + 1, text.encode() + b"\0", True)]
        path = write(tmp_path / "tile.tif", array, extratags=extra)
        value = bandcrop.info(path).nodata
        assert value == masked and (masked is None or (array == value).any())
        out, report = fill_one(path, 0, (16, 16), mean=[7.0], std=[1.0])
        gone = np.zeros((16, 16), bool) if masked is None else array[0] == masked
        with np.errstate(over="ignore"):  # as float32 some are infinite
            missing = gone | ~np.isfinite(array[0].astype(np.float32))
        assert report.replaced[0] == missing.sum()
        assert not out[gone].any() and out[~gone].any()


@pytest.mark.parametrize(
    "text",
    ["1.#QNAN", "-1.#QNAN", "1.#SNAN", "-1.#IND", " -1.#ind", "nan", "NaN", "-nan", " NAN ",
     "inf", "-INF", "Infinity", "1.#INF", "-1.#inf", "1e400"],
)  # fmt: skip
def test_nodata_that_is_no_number_masks_no_number(tmp_path, text):
    array = np.float32([[[np.nan, np.inf, 0, 1, -1]]])
    extra = [(42113, 2, len(text) + 1, text.encode() + b"\0", True)]
    path = write(tmp_path / "tile.tif", array, extratags=extra)
    assert not np.isfinite(bandcrop.info(path).nodata)
    out, report = fill_one(path, 0, (1, 5), mean=[9.0], std=[1.0])
    assert report.replaced[0] == 2 and out.tolist() == [[0, 0, -9, -8, -10]]
    path = write(tmp_path / "whole.tif", image((1, 8, 8), "i8"), extratags=extra)
    assert bandcrop.info(path).nodata is None


def test_nodata_can_be_named_for_files_without_a_tag(tmp_path):
    array = image((1, 24, 24), "f4")
    array[0, :3] = 0
    plain = write(tmp_path / "plain.tif", array)
    tagged = write(tmp_path / "tagged.tif", array, extratags=[(42113, 2, 6, "-9999", True)])
    out = np.empty((2, 1, 24, 24), np.float32)
    report = bandcrop.Reader(1).fill(out, [plain, tagged], [[0], [0]], mean=[7.0], nodata=0)
    assert report.replaced.tolist() == [72, 0]  # a file's own tag counts, and no other value
    assert (out[0, 0, :3] == 0).all() and np.array_equal(out[0, 0, 3:], array[0, 3:] - 7)
    mean, std = bandcrop.statistics([plain], [[0]], nodata=0)
    assert np.allclose([mean[0], std[0]], [array[0, 3:].mean(), array[0, 3:].std()])
    mean, _ = bandcrop.statistics([tagged], [[0]], nodata=0)
    assert np.isclose(mean[0], array.mean())


@pytest.mark.parametrize(
    "dtype, absent, nodata", [("f4", -LARGEST, -3.402823e38), ("u1", 10, 10.5), ("u1", 255, -1)]
)
def test_statistics_take_for_nodata_what_fill_does(tmp_path, dtype, absent, nodata):
    array = np.array([[[absent, 1, 7, 7]]], dtype)
    path = write(tmp_path / "tile.tif", array)
    out = np.empty((1, 1, 1, 4), np.float32)
    gone = bandcrop.Reader(1).fill(out, [path], [[0]], nodata=nodata).replaced[0]
    assert gone == (nodata != -1)  # that is no byte
    mean, _ = bandcrop.statistics([path], [[0]], nodata=nodata)
    assert mean[0] == array[0, 0, gone:].astype(float).mean()


def test_statistics_leave_out_files_with_too_few_bands(tmp_path):
    paths = [write(tmp_path / f"{n}.tif", image((n, 8, 8), "u2")) for n in (3, 1)]
    with pytest.raises(bandcrop.TileError, match="1.tif"):
        bandcrop.statistics(paths, [[2], [2]])
    mean, _ = bandcrop.statistics(paths, [[2], [2]], bad="report")
    assert np.isclose(mean[0], bandcrop.read(paths[0])[2].mean())


def test_statistics_leave_out_each_files_own_nodata_exactly(tmp_path):
    big = 2**53 + 1  # as a float it would be its neighbour too
    arrays = np.array([[[[big, big - 1, 5]]], [[[big, 7, 5]]]])
    paths = [
        write(tmp_path / f"{text}.tif", a, extratags=[(42113, 2, len(text) + 1, text, True)])
        for a, text in zip(arrays, (str(big), "5"), strict=True)
    ]
    kept = np.array([big - 1, 5, big, 7], float)
    mean, std = bandcrop.statistics(paths, [[0], [0]])
    np.testing.assert_allclose([mean[0], std[0]], [kept.mean(), kept.std()])


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_integers_of_64_bits_are_read_exactly_and_filled_as_floats(tmp_path, dtype):
    about = np.iinfo(dtype)
    array = np.array([[[about.min, about.max, 2**53 + 1, 7]]], dtype)
    path = write(tmp_path / "tile.tif", array)
    np.testing.assert_array_equal(bandcrop.read(path), array)
    out, _ = fill_one(path, 0, (1, 4))
    np.testing.assert_array_equal(out, array[0].astype(np.float32))


@pytest.mark.parametrize("dtype, nodata", [("i8", -(2**63)), ("u8", 2**64 - 1)])
def test_nodata_of_64_bits_can_be_named(tmp_path, dtype, nodata):
    array = np.array([[[1, 9, nodata, 5]]], dtype)
    path = write(tmp_path / "tile.tif", array)
    out = np.empty((1, 1, 1, 4), np.float32)
    report = bandcrop.Reader(1).fill(out, [path], [[0]], mean=[1.0], nodata=nodata)
    assert report.replaced[0] == 1 and out.ravel().tolist() == [0, 8, 0, 4]


def test_bands_in_files_of_their_own_cut_the_same_ground(tmp_path):
    fine = image((1, 120, 120), "u2")
    coarse = fine[:, ::2, ::2].copy()
    paths = [[write(tmp_path / "a.tif", fine), write(tmp_path / "b.tif", coarse)]] * 2
    window = np.array([(0.25, 0.5, 0.5, 0.25), (0, 0, 1, 1)], np.float64)
    out = np.zeros((2, 2, 64, 64), np.float32)
    bandcrop.Reader(2).fill(out, paths, np.zeros((2, 2), int), window)
    for i in range(2):
        for channel, band in enumerate((fine[0], coarse[0])):
            expected = resized_by_pil(band, (64, 64), window[i])
            assert np.abs(out[i, channel] - expected).max() < 1e-3 * band.std()


def batch_of_files(folder, n=24):
    paths = [write(folder / f"{i}.tif", image((4, 60, 60), "u2", i)) for i in range(n)]
    rng = np.random.default_rng(1)
    bands = rng.integers(0, 4, (n, 2))
    windows = np.column_stack([rng.uniform(0, 0.5, (n, 2)), rng.uniform(0.1, 0.5, (n, 2))])
    return paths, bands, windows, rng.integers(0, 8, n).astype(np.uint8)


def test_result_does_not_depend_on_threads_or_batching(tmp_path):
    paths, bands, windows, orient = batch_of_files(tmp_path)
    outs = []
    for threads in 1, 2, 8:
        out = np.full((24, 2, 50, 50), np.nan, np.float32)
        bandcrop.Reader(threads).fill(out, paths, bands, windows, orient)
        outs.append(out)
    one_by_one = np.full_like(outs[0], np.nan)
    reader = bandcrop.Reader(3)
    tickets = [
        reader.submit(
            one_by_one[i : i + 1], *(x[i : i + 1] for x in (paths, bands, windows, orient))
        )
        for i in range(24)
    ]
    assert sum(ticket.wait().bytes_read for ticket in reversed(tickets)) > 0
    for out in [*outs[1:], one_by_one]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("file_per_band", [False, True])
def test_files_out_of_the_page_cache_give_the_same(tmp_path, file_per_band):
    files, bands, windows, orient = batch_of_files(tmp_path)
    paths = [[file, files[-1 - i]] for i, file in enumerate(files)] if file_per_band else files
    warm, cold = np.zeros((2, 24, 2, 50, 50), np.float32)
    reader = bandcrop.Reader(2)
    expected = reader.fill(warm, paths, bands, windows, orient)
    for file in files[::2]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    report = reader.submit(cold, paths, bands, windows, orient).wait()
    np.testing.assert_array_equal(cold, warm)
    assert report.bytes_read == expected.bytes_read


# --- what goes wrong -------------------------------------------------------------------------


def test_bad_file_is_raised_for_the_lowest_index_or_reported(tmp_path):
    paths, bands, windows, orient = batch_of_files(tmp_path)
    Path(paths[7]).write_bytes(Path(paths[7]).read_bytes()[:3000])
    Path(paths[3]).write_bytes(b"not an image at all")
    for threads in 1, 4:
        reader = bandcrop.Reader(threads)
        out = np.ones((24, 2, 50, 50), np.float32)
        with pytest.raises(bandcrop.TileError, match=r"3\.tif: not a TIFF file") as caught:
            reader.fill(out, paths, bands, windows, orient)
        assert caught.value.index == 3
        report = reader.fill(out, paths, bands, windows, orient, bad="report")
        assert [index for index, _ in report.errors] == [3, 7]
        assert "7.tif" in report.errors[1][1] and "truncated" in report.errors[1][1]
        assert not out[[3, 7]].any() and out[[0, 4, 23]].all()
        with pytest.raises(bandcrop.TileError, match="3.tif"):
            reader.submit(out, paths, bands, windows, orient).wait()


def test_errors_name_the_file_and_what_to_do(tmp_path):
    missing, folder, pipe = tmp_path / "missing.tif", tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    empty = tmp_path / "empty.tif"
    empty.touch()
    jpeg = tmp_path / "jpeg.tif"
    tifffile.imwrite(jpeg, image((1, 16, 16), "u1")[0], compression="jpeg")
    half = write(tmp_path / "half.tif", image((1, 16, 16), "f2"))
    few = write(tmp_path / "few.tif", image((2, 16, 16), "u2"))
    for path, band, words in [
        (missing, 0, "No such file"),
        (folder, 0, "not a regular file"),
        (pipe, 0, "not a regular file"),
        (empty, 0, "only 0 bytes"),
        (jpeg, 0, r"tag 259 \(Compression\) is 7"),
        (half, 0, r"tag 258 \(BitsPerSample\) is 16 with SampleFormat 3"),
        (few, 2, r"tag 277 \(SamplesPerPixel\) is 2, but band 2"),
    ]:
        with pytest.raises(bandcrop.TileError, match=words) as caught:
            fill_one(path, band)
        assert str(caught.value).startswith(str(path))
    for path in missing, folder, pipe, empty, jpeg, half:
        with pytest.raises(bandcrop.TileError):
            bandcrop.info(path)
        with pytest.raises(bandcrop.TileError):
            bandcrop.read(path)


def test_paths_may_be_an_array(tmp_path):
    arrays = image((40, 8, 8), "u2")
    paths = [write(tmp_path / f"{i:02d}.tif", array[None]) for i, array in enumerate(arrays)]
    out = np.empty((40, 1, 8, 8), np.float32)
    bandcrop.Reader(1).fill(out, np.array(paths), np.zeros((40, 1), int))
    np.testing.assert_array_equal(out[:, 0], arrays)


def test_wrong_arguments_are_refused(tmp_path):
    path = write(tmp_path / "tile.tif", image((2, 16, 16), "u2"))
    good = {"out": np.zeros((1, 1, 8, 8), np.float32), "paths": [path], "bands": [[0]]}
    read_only = np.zeros((1, 1, 8, 8), np.float32)
    read_only.flags.writeable = False
    copied = pickle.loads(pickle.dumps(good["out"]))  # float32, by a dtype object of its own
    bandcrop.Reader(1).fill(**{**good, "out": copied})
    assert copied.any()
    for error, change in [
        (TypeError, {"out": np.zeros((1, 1, 8, 8))}),
        (TypeError, {"out": np.zeros((1, 1, 8, 8), ">f4")}),
        (TypeError, {"out": np.zeros((1, 1, 8, 16), np.float32)[..., ::2]}),
        (TypeError, {"out": read_only}),
        (TypeError, {"out": np.frombuffer(bytearray(257), "f4", 64, 1).reshape(1, 1, 8, 8)}),
        (TypeError, {"out": [[[[0.0]]]]}),
        (ValueError, {"paths": []}),
        (ValueError, {"paths": path}),
        (ValueError, {"paths": [[path, path]]}),
        (ValueError, {"bands": [0]}),
        (ValueError, {"bands": [[-1]]}),
        (TypeError, {"bands": [[0.5]]}),
        (ValueError, {"windows": [[0, 0, 1, 1.1]]}),
        (ValueError, {"windows": [[0, 0, np.nan, 1]]}),
        (ValueError, {"windows": [[0, 0, 0, 1]]}),
        (ValueError, {"orient": [8]}),
        (ValueError, {"mean": np.zeros((2, 2))}),
        (ValueError, {"std": [0.0, 1.0]}),
        (ValueError, {"std": [1e-39, 1.0]}),  # 1 / std is infinite
        (ValueError, {"mean": [np.nan, 1.0]}),
        (ValueError, {"bad": "ignore"}),
    ]:
        with pytest.raises(error):
            bandcrop.Reader(1).fill(**{**good, **change})
    with pytest.raises(ValueError, match="threads"):
        bandcrop.Reader(-1)
    with pytest.raises(IndexError):
        bandcrop.read(path, [2])
    for wrong in (0, [0.5]), (None, 3):
        with pytest.raises(TypeError):
            bandcrop.read(path, *wrong)
    for window in (0, 0, 17, 1), (-1, 0, 2, 2), (0, 0, 0, 1), (2**62, 0, 2**62, 1):
        with pytest.raises(ValueError, match="window"):
            bandcrop.read(path, None, window)


# --- threads, tickets, processes -------------------------------------------------------------


def test_dropped_tickets_and_readers_leave_memory_alone(tmp_path):
    paths, bands, windows, orient = batch_of_files(tmp_path)
    out = np.zeros((24, 2, 200, 200), np.float32)
    for _ in range(6):
        reader = bandcrop.Reader(4)
        ticket = reader.submit(out, paths, bands, windows, orient)
        kept = reader.submit(np.zeros_like(out), paths, bands, windows, orient)
        del ticket, reader
        gc.collect()
        out[:] = 5  # nobody writes here any more
        assert (out == 5).all()
        assert kept.wait().bytes_read > 0  # a ticket keeps its pool alive


def test_the_gil_is_free_while_a_batch_is_filled(tmp_path):
    paths, bands, windows, orient = batch_of_files(tmp_path)
    out = np.zeros((24, 2, 900, 900), np.float32)
    ticks, stop = [], threading.Event()

    def count():
        while not stop.is_set():
            ticks.append(0)
            stop.wait(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    before = len(ticks)
    bandcrop.Reader(1).fill(out, paths, bands, windows, orient)
    after = len(ticks)
    stop.set()
    thread.join()
    assert after - before >= 3


def run_python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_from_before_a_fork_refuses_in_the_child(tmp_path):
    path = write(tmp_path / "tile.tif", image((1, 64, 64), "u2"))
    code = """
        import os, sys, numpy as np, bandcrop
        out = np.zeros((8, 1, 64, 64), np.float32)
        reader = bandcrop.Reader(2)
        call = (out, [sys.argv[1]] * 8, np.zeros((8, 1), int))
        ticket = reader.submit(*call)
        child = os.fork()
        if child == 0:
            for use in (lambda: reader.fill(*call), lambda: reader.submit(*call), ticket.wait):
                try:
                    use()
                except RuntimeError as error:
                    print(error, flush=True)
            del ticket, reader
            bandcrop.Reader(2).fill(*call)
            print("a new one works", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        ticket.wait()
        reader.fill(*call)
    """
    process = run_python(code, path)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.count("before the process was forked") == 3 and "a new one works" in out


def test_exit_with_batches_under_way_is_clean(tmp_path):
    path = write(tmp_path / "tile.tif", image((1, 256, 256), "u2"))
    code = """
        import sys, numpy as np, bandcrop
        out = np.zeros((2000, 1, 224, 224), np.float32)
        reader = bandcrop.Reader(2)
        tickets = [reader.submit(out, [sys.argv[1]] * 2000, np.zeros((2000, 1), int))]
        sys.exit(3)
    """
    process = run_python(code, path)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 3


@pytest.mark.parametrize("how, threads", [("fill", 1), ("submit", 2)])
def test_ctrl_c_stops_a_fill_and_leaves_the_reader_usable(tmp_path, how, threads):
    path = write(tmp_path / "tile.tif", image((1, 256, 256), "u2"))
    code = """
        import signal, sys, numpy as np, bandcrop
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        out = np.zeros((4, 1, 1024, 1024), np.float32)
        many = [sys.argv[1]] * 4
        reader = bandcrop.Reader(int(sys.argv[3]))
        bands = np.zeros((4, 1), int)
        print("ready", flush=True)
        try:
            while True:
                if sys.argv[2] == "fill":
                    reader.fill(out, many, bands)
                else:
                    reader.submit(out, many, bands).wait()
        except KeyboardInterrupt:
            reader.fill(out, many, bands)
            print("usable", out.any(), flush=True)
    """
    process = run_python(code, path, how, threads)
    assert process.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (out, errors, process.returncode) == ("usable True\n", "", 0)
