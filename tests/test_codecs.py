"""Every codec, predictor and layout against tifffile and imagecodecs, sample for sample."""

import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import bandcrop
import imagecodecs
import numpy as np
import pytest
import tifffile
from test_bandcrop import fill_one, image, samples_by_tifffile, write

ROOT = Path(__file__).resolve().parents[1]
CODECS = {  # tifffile's name: ours; "deflate" is DEFLATE's older number, 32946
    None: "none", "packbits": "packbits", "lzw": "lzw", "zlib": "deflate", "deflate": "deflate",
    "zstd": "zstd",
}  # fmt: skip
DTYPES = "u1 u2 u4 u8 i1 i2 i4 i8 f4 f8".split()
PREDICTED = ["lzw", "zlib", "deflate", "zstd"]
SHAPES = {"strips": {"rowsperstrip": 5}, "tiles": {"tile": (16, 32)}}
HEIGHT, WIDTH = 37, 53  # the last strip has 2 rows; tiles hang over both edges


@pytest.fixture(scope="module", autouse=True)
def bare_build(request, tmp_path_factory):
    """A second extension, built meanwhile as without any codec library: (process, folder)."""
    if not any("missing_codec" in item.name for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("bare")
    hidden = folder / "hidden"
    hidden.mkdir()
    for header in "libdeflate.h", "zlib.h", "zstd.h":
        (hidden / header).write_text("#error not here\n")
    process = subprocess.Popen(
        [sys.executable, "setup.py", "build", "--build-lib", folder]
        + ["--build-temp", folder / "objects"],
        cwd=ROOT,
        env={**os.environ, "CPATH": str(hidden)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process, folder
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler too
        process.wait()


def missing(codec):
    return codec not in bandcrop.codecs()


def chunk_tags(page):
    return (page.tags[324], page.tags[325]) if page.is_tiled else (page.tags[273], page.tags[279])


def chunks_of(path):
    """(offset, bytes) of each strip or tile, in the file's order."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def make_sparse(path, absent):
    """Forgets the strips or tiles of these numbers: offset and count become 0."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        for tag in chunk_tags(file.pages[0]):
            values = np.array(tag.value)
            values[absent] = 0
            tag.overwrite(values.tolist())


def damage(path, chunks):
    """Overwrites these (offset, bytes) with what no codec accepts as so many pixels."""
    with open(path, "r+b") as file:
        for offset, count in chunks:
            file.seek(offset)
            file.write(b"\x80" * count)


def random_window(rng):
    tall, wide = rng.integers(1, HEIGHT + 1), rng.integers(1, WIDTH + 1)
    top, left = rng.integers(0, HEIGHT - tall + 1), rng.integers(0, WIDTH - wide + 1)
    return int(top), int(left), int(tall), int(wide)


def check_pixels(path, array, rng):
    """Whole, a window of it, and a native-size crop by fill()."""
    got = bandcrop.read(path)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    top, left, tall, wide = window = random_window(rng)
    bands = rng.integers(0, len(array), 2).tolist()
    crop = array[:, top : top + tall, left : left + wide]
    np.testing.assert_array_equal(bandcrop.read(path, bands, window), crop[bands])
    part = (top / HEIGHT, left / WIDTH, tall / HEIGHT, wide / WIDTH)
    out, _ = fill_one(path, bands[0], (tall, wide), part)
    np.testing.assert_array_equal(out, crop[bands[0]].astype(np.float32))


# --- the grid ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_codec_and_layout_equals_tifffile(tmp_path, codec, dtype):
    if missing(CODECS[codec]):
        pytest.skip(f"this build has no {CODECS[codec]}")
    predictors = [None]
    if codec in PREDICTED:
        predictors.append(3 if dtype[0] == "f" else 2)
    rng = np.random.default_rng(len(dtype))
    path = str(tmp_path / "tile.tif")
    for bands in 1, 3:
        array = image((bands, HEIGHT, WIDTH), dtype, seed=bands)
        planars = ["contig", "separate"] if bands > 1 else ["contig"]
        for predictor, planar, shape, order in product(predictors, planars, SHAPES, "<>"):
            big = order == ">" if planar == "contig" else order == "<"
            options = {"compression": codec, "byteorder": order, "bigtiff": big, **SHAPES[shape]}
            if predictor:
                options["predictor"] = predictor
            write(path, array, planar, **options)
            about = bandcrop.info(path)
            assert about.compression == CODECS[codec]
            assert (about.tiled, about.big_tiff) == (shape == "tiles", big)
            assert (about.bands, about.height, about.width) == (bands, HEIGHT, WIDTH)
            assert about.dtype == np.dtype(dtype).name
            assert about.byte_order == ("little" if order == "<" else "big")
            assert about.planar == ("interleaved" if planar == "contig" else "separate")
            np.testing.assert_array_equal(samples_by_tifffile(path), array)
            check_pixels(path, array, rng)


@pytest.mark.parametrize("codec", PREDICTED)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_horizontal_differences_of_floats_are_those_of_their_bits(tmp_path, codec, dtype):
    # As in libtiff. tifffile writes them for integers only: of the same bits, under another format.
    if missing(CODECS[codec]):
        pytest.skip(f"this build has no {CODECS[codec]}")
    array = image((3, HEIGHT, WIDTH), dtype)
    rng = np.random.default_rng(0)
    for planar, shape, order in product(("contig", "separate"), SHAPES, "<>"):
        options = {"compression": codec, "predictor": 2, "byteorder": order, **SHAPES[shape]}
        path = write(tmp_path / "tile.tif", array.view("i" + dtype[1]), planar, **options)
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[339].overwrite((3, 3, 3))
        if planar == "contig":
            by_libtiff = imagecodecs.tiff_decode(Path(path).read_bytes())
            np.testing.assert_array_equal(by_libtiff.transpose(2, 0, 1), array)
        check_pixels(path, array, rng)


@pytest.mark.parametrize("codec", CODECS)
def test_one_strip_and_one_tile_larger_than_the_image(tmp_path, codec):
    if missing(CODECS[codec]):
        pytest.skip(f"this build has no {CODECS[codec]}")
    rng = np.random.default_rng(0)
    array = image((2, HEIGHT, WIDTH), "u2")
    for shape in {"rowsperstrip": HEIGHT}, {"rowsperstrip": 1}, {"tile": (64, 64)}:
        path = write(tmp_path / "tile.tif", array, compression=codec, **shape)
        check_pixels(path, array, rng)
    with tifffile.TiffFile(path, mode="r+b") as file:  # tiles know their own size
        assert 278 not in file.pages[0].tags
    path = write(tmp_path / "tile.tif", array, compression=codec, rowsperstrip=HEIGHT)
    with tifffile.TiffFile(path, mode="r+b") as file:  # "all rows in one strip"
        file.pages[0].tags[278].overwrite(2**32 - 1, dtype="I")
    check_pixels(path, array, rng)


@pytest.mark.parametrize("codec", CODECS)
def test_long_strips_that_fill_the_codecs_tables(tmp_path, codec):
    # LZW clears its table several times, DEFLATE and ZSTD begin new blocks.
    if missing(CODECS[codec]):
        pytest.skip(f"this build has no {CODECS[codec]}")
    rng = np.random.default_rng(0)
    smooth = image((1, 300, 400), "u1")
    noise = rng.integers(0, 256, (1, 300, 400), np.uint8)
    flat = np.full((1, 300, 400), 7, np.uint8)
    for array in smooth, noise, flat, np.where(noise < 250, flat, noise):
        path = write(tmp_path / "tile.tif", array, compression=codec, rowsperstrip=300)
        np.testing.assert_array_equal(bandcrop.read(path), array)
        np.testing.assert_array_equal(
            bandcrop.read(path, None, (100, 17, 51, 300)), array[:, 100:151, 17:317]
        )


# --- sparse files ------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "lzw"])  # no codec sees a chunk that is not there
@pytest.mark.parametrize("dtype, nodata", [("u2", None), ("i2", -999), ("f4", -9999), ("u1", 255)])
def test_sparse_chunks_are_nodata_or_zero(tmp_path, codec, dtype, nodata):
    text = f"{nodata}"
    extra = [] if nodata is None else [(42113, 2, len(text) + 1, text, True)]
    array = image((2, HEIGHT, WIDTH), dtype)
    for planar, shape, order in product(("contig", "separate"), SHAPES, "<>"):
        path = write(
            tmp_path / "tile.tif", array, planar, compression=codec, byteorder=order,
            extratags=extra, **SHAPES[shape],
        )  # fmt: skip
        make_sparse(path, [0, 3, len(chunks_of(path)) - 1])
        expected = samples_by_tifffile(path)
        assert (expected != array).any()
        np.testing.assert_array_equal(bandcrop.read(path), expected)
        np.testing.assert_array_equal(
            bandcrop.read(path, [1], (2, 9, 31, 40)), expected[[1], 2:33, 9:49]
        )
        for band in 0, 1:
            out, report = fill_one(path, band, (HEIGHT, WIDTH), mean=[40.0, -3], std=[1.0, 2])
            normal = (expected[band].astype(np.float32) - (40, -3)[band]) / (1, 2)[band]
            gone = expected[band] == nodata if nodata is not None else np.zeros(normal.shape, bool)
            np.testing.assert_array_equal(out, np.where(gone, 0, normal))
            assert report.replaced.tolist() == [gone.sum()]


def test_zeros_that_are_not_written_are_normalised_as_written_ones(tmp_path):
    rng = np.random.default_rng(0)
    paths = [write(tmp_path / name, np.zeros((1, 64, 64), "u2")) for name in ("a.tif", "b.tif")]
    make_sparse(paths[0], slice(None))
    for mean, std in rng.random((20, 2), np.float32) + 0.5:
        sparse, dense = (fill_one(p, 0, (20, 20), mean=[mean], std=[std])[0] for p in paths)
        np.testing.assert_array_equal(sparse, dense)


def test_a_file_with_no_chunk_written_is_all_nodata(tmp_path):
    extra = [(42113, 2, 4, "nan", True)]
    path = write(tmp_path / "tile.tif", image((2, HEIGHT, WIDTH), "f4"), extratags=extra)
    make_sparse(path, slice(None))
    assert np.isnan(bandcrop.read(path)).all()
    out, report = fill_one(path, 1, (20, 20), mean=[5.0, 6], std=[1.0, 2])
    assert not out.any() and report.replaced[0] == HEIGHT * WIDTH


# --- only what is needed -----------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_only_the_strips_and_tiles_that_a_window_touches_are_decoded(tmp_path, codec, planar):
    if missing(CODECS[codec]):
        pytest.skip(f"this build has no {CODECS[codec]}")
    array = image((3, HEIGHT, WIDTH), "u2")
    for shape in SHAPES:
        options = {"compression": codec, **SHAPES[shape]}
        path = write(tmp_path / "tile.tif", array, planar, **options)
        # Rows 11 to 14: strip 2 of rows 10 to 14, tiles of the first row; columns 33 to 50: the
        # second tile of two in a row. Of planes only the one of band 1.
        chunks = chunks_of(path)
        planes = np.arange(len(chunks)).reshape(3 if planar == "separate" else 1, -1)
        touched = [planes[-2 if planar == "separate" else 0, 2 if shape == "strips" else 1]]
        damage(path, [chunk for i, chunk in enumerate(chunks) if i not in touched])
        expected = array[1, 11:15, 33:51]
        np.testing.assert_array_equal(bandcrop.read(path, [1], (11, 33, 4, 18))[0], expected)
        window = (11 / HEIGHT, 33 / WIDTH, 4 / HEIGHT, 18 / WIDTH)
        out, report = fill_one(path, 1, (4, 18), window)
        np.testing.assert_array_equal(out, expected.astype(np.float32))
        if codec is None:  # rows, not chunks
            row = (WIDTH if shape == "strips" else 32) * 2 * (1 if planar == "separate" else 3)
            assert report.bytes_read == 4 * row
        else:
            assert report.bytes_read == sum(chunks[i][1] for i in touched)
            with pytest.raises(
                bandcrop.TileError, match=r"(strip|tile) at byte \d+: .* (data|code)"
            ):
                bandcrop.read(path)


@pytest.mark.parametrize("codec", ["packbits", "lzw", "zlib", "zstd"])
def test_later_rows_of_a_strip_are_not_unpacked(tmp_path, codec):
    if missing(CODECS[codec]):
        pytest.skip(f"this build has no {CODECS[codec]}")
    rng = np.random.default_rng(0)
    walk = rng.integers(-2, 3, (1, 4000, 500)).cumsum(2).astype(np.int8)
    noise = rng.integers(0, 256, (1, 4000, 500)).astype(np.uint8)  # DEFLATE stores it
    for array in walk, noise, np.zeros_like(noise):
        path = write(tmp_path / "tile.tif", array, compression=codec, rowsperstrip=4000)
        for rows in 1, 90, 300, 1000:
            got = bandcrop.read(path, None, (rows - 1, 0, 1, 500))
            np.testing.assert_array_equal(got, array[:, rows - 1 : rows])
        if not array.any():
            continue
        [(offset, count)] = chunks_of(path)
        damage(path, [(offset + count * 3 // 4, count - count * 3 // 4)])
        np.testing.assert_array_equal(bandcrop.read(path, None, (0, 0, 1000, 500)), array[:, :1000])
        with pytest.raises(bandcrop.TileError):
            bandcrop.read(path)


def test_any_flipped_bit_of_deflate_is_refused_or_harmless(tmp_path):
    # Also where zlib reads it: make fuzz runs this file in a build without libdeflate.
    if missing("deflate"):
        pytest.skip("this build has no deflate")
    array = image((1, 4, 24), "u1")
    path = write(tmp_path / "tile.tif", array, compression="zlib", rowsperstrip=2)
    content, refused = Path(path).read_bytes(), 0
    bits = [bit for start, n in chunks_of(path) for bit in range(8 * start, 8 * (start + n))]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        Path(path).write_bytes(flipped)
        try:
            np.testing.assert_array_equal(bandcrop.read(path), array)
        except bandcrop.TileError:
            refused += 1
    assert refused > len(bits) * 0.9  # the last byte's padding may hold anything


def test_zstd_frames_that_do_not_say_their_length_are_read(tmp_path):
    # As libtiff's are. Made by hand of raw blocks: magic, no flags, window of 2 MiB, blocks.
    if missing("zstd"):
        pytest.skip("this build has no zstd")
    array = image((1, 700, 500), "u1")
    path = write(tmp_path / "tile.tif", array, compression="zstd", rowsperstrip=700)

    def frame(data):
        blocks = [data[i : i + 100_000] for i in range(0, len(data), 100_000)]
        headers = [(len(b) << 3 | (b is blocks[-1])).to_bytes(3, "little") for b in blocks]
        parts = [header + block for header, block in zip(headers, blocks, strict=True)]
        return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(parts)

    data = frame(array.tobytes()[:150_000]) + frame(array.tobytes()[150_000:])  # one after another
    start = Path(path).stat().st_size
    with tifffile.TiffFile(path, mode="r+b") as file:
        offsets, counts = chunk_tags(file.pages[0])
        offsets.overwrite([start])
        counts.overwrite([len(data)])
    with open(path, "ab") as file:
        file.write(data)
    np.testing.assert_array_equal(bandcrop.read(path), array)
    for top in 0, 250, 299, 300, 450, 699:
        got = bandcrop.read(path, None, (top, 3, 1, 400))
        np.testing.assert_array_equal(got, array[:, top : top + 1, 3:403])


# --- libraries that are not there --------------------------------------------------------------


@pytest.mark.fuzz  # builds the extension once more
def test_a_missing_codec_library_is_named_and_the_rest_works(tmp_path, bare_build):
    process, folder = bare_build
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    said = [line for line in output.splitlines() if line.startswith("bandcrop: codecs")]
    assert len(said) == 1 and "none, packbits, lzw" in said[0]
    for package in "libdeflate-dev", "libzstd-dev":
        assert package in said[0]
    array = image((1, 16, 16), "u2")
    for codec in CODECS:
        write(tmp_path / f"{codec}.tif", array, compression=codec)
    code = """if True:
        import sys, bandcrop
        print(bandcrop.__file__, bandcrop.codecs())
        for name in sys.argv[1:]:
            try:
                bandcrop.read(name)
            except bandcrop.TileError as error:
                assert str(error).startswith(name), error
                print(bandcrop.info(name).compression, error)
    """
    paths = [f"{tmp_path}/{codec}.tif" for codec in CODECS]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=folder, capture_output=True, text=True, check=True
    )
    where, *errors = done.stdout.splitlines()
    assert str(folder) in where and where.endswith("['none', 'packbits', 'lzw']")
    assert len(errors) == 3
    for line, name, package in zip(
        errors,
        ("deflate", "deflate", "zstd"),
        ("libdeflate-dev", "libdeflate-dev", "libzstd-dev"),
        strict=True,
    ):
        assert line.startswith(name) and f"install {package}" in line
