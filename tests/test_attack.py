"""The reader against hostile, damaged and shrinking files, small limits, sanitizers and mutations.

The sanitizer builds need a compiler (they run in the background from the first test on); real files
are found in ../shared/data. How to fuzz for longer: tests/fuzz_reader.cpp.
"""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from itertools import product
from pathlib import Path

import bandcrop
import numpy as np
import pytest
import tifffile
from test_bandcrop import REAL, fill_one, image, samples_by_tifffile, write

ROOT = Path(__file__).resolve().parents[1]
CORE = [f"csrc/{room}.cpp" for room in ("tiff", "decode", "resample")]
CXX = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(not CXX, reason="no C++ compiler (g++ or $CXX)")

MUTATIONS = os.environ.get("MUTATIONS", "20000")  # of files, for the sanitizers to watch
# To build with all checks takes four times as long as to run 20,000: make fuzz has them.
QUICK = "-fno-sanitize=null,vptr,object-size,alignment -O0".split()
LOOP_FLAGS = ["-O1", "-g"] if "MUTATIONS" in os.environ else QUICK

SIZES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF's field types


def tiff(tags, pixels=b"", big=False, after=0):
    """A file of the given tags, {tag: (type, values)}; the pixels lie at byte 8 (BigTIFF: 16)."""
    tags = {key: tags[key] for key in sorted(tags)}
    start, place = (16, 8) if big else (8, 4)
    directory = start + len(pixels)
    beyond = directory + (8 if big else 2) + len(tags) * (20 if big else 12) + place
    entries, values = b"", b""
    for tag, (kind, numbers, *claimed) in tags.items():
        data = struct.pack(f"<{len(numbers)}{SIZES[kind]}", *numbers)
        count = claimed[0] if claimed else len(numbers)
        entries += struct.pack("<HHQ" if big else "<HHI", tag, kind, count)
        if len(data) > place:
            entries += struct.pack("<Q" if big else "<I", beyond + len(values))
            values += data
        else:
            entries += data.ljust(place, b"\0")
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, directory) if big else b""
    head = head or struct.pack("<2sHI", b"II", 42, directory)
    number = struct.pack("<Q" if big else "<H", len(tags))
    return head + pixels + number + entries + struct.pack("<Q" if big else "<I", after) + values


def plain(width=16, height=16, **changes):
    """Tags of one uncompressed strip of bytes; changes as t257=(type, values), None removes."""
    tags = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]),
        273: (4, [8]), 277: (3, [1]), 278: (4, [height]),
        279: (4, [min(width * height, 2**32 - 1)]),
    }  # fmt: skip
    tags.update({int(key[1:]): value for key, value in changes.items()})
    return {tag: value for tag, value in tags.items() if value is not None}


PIXELS = bytes(range(256))


def refused(path, words="."):
    """info() may pass; read() and fill() refuse, naming the file and a tag or byte."""
    for call in (lambda: bandcrop.read(str(path)), lambda: fill_one(path)):
        with pytest.raises(bandcrop.TileError, match=words) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(str(path)) and re.search(r"tag \d+|\d+ bytes|byte \d+", message)


def write_seeds(folder):
    """Small files of every codec and layout, for the fuzz target. Returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    grid = product([None, "packbits", "lzw", "zlib", "zstd"], ["contig", "separate"], [0, 16])
    for n, (codec, planar, tile) in enumerate(grid):
        dtype = ["u1", "u2", "i2", "f4", "f8", "u4", "i8", "i4"][n % 8]
        array = rng.normal(0, 30, (2, 19, 21)).cumsum(2).astype(dtype)
        options = {"tile": (tile, tile)} if tile else {"rowsperstrip": 5}
        if codec in ("lzw", "zlib", "zstd") and n % 3 != 0:
            options["predictor"] = 3 if dtype[0] == "f" else 2
        if n % 3 == 0:
            options["extratags"] = [(42113, 2, 6, "-9999", True)]
        path = folder / f"{n}_{codec}_{planar}_{dtype}.tif"
        write(path, array, planar, compression=codec, byteorder="<>"[n // 2 % 2],
              bigtiff=n % 5 == 4, **options)  # fmt: skip
        paths.append(str(path))
    return paths


# --- builds, under way while the first tests run -----------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def builds(request, tmp_path_factory):
    """Starts the sanitizer builds that are wanted. Returns a function that waits for one."""
    tests = " ".join(item.name for item in request.session.items)
    wanted = {"loop": "mutated_files" in tests, "race": "thread_sanitizer" in tests,
              "extension": "the_other_tests" in tests}  # fmt: skip
    if not CXX or not any(wanted.values()):
        yield None
        return
    folder = tmp_path_factory.mktemp("builds")
    hidden = folder / "hidden"  # zlib's turn: everywhere else libdeflate is used, where it is there
    hidden.mkdir()
    (hidden / "libdeflate.h").write_text("#error hidden\n")
    has = bandcrop.codecs()
    macros = ["-DBANDCROP_ZSTD"] if "zstd" in has else []
    libraries = ["-lzstd"] if "zstd" in has else []
    if "deflate" in has:
        deflate = links_libdeflate()
        macros.append("-DBANDCROP_LIBDEFLATE" if deflate else "-DBANDCROP_ZLIB")
        libraries.append("-ldeflate" if deflate else "-lz")
    compile_ = [CXX, "-std=c++17", "-Wno-psabi", "-Icsrc", "-pthread"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    commands = {
        "extension": [sys.executable, "setup.py", "build", "--build-lib", folder / "extension"]
        + ["--build-temp", folder / "objects"],
        "loop": [*compile_, *sanitize, *LOOP_FLAGS, "-DSEEDED_LOOP", *macros]
        + ["tests/fuzz_reader.cpp", *CORE, "-o", folder / "loop", *libraries],
        "race": [*compile_, "-O1", "-g", "-fsanitize=thread", *macros, "tests/race_pool.cpp", *CORE]
        + ["csrc/pool.cpp", "-o", folder / "race", *libraries],
    }
    environment = {
        **os.environ, "BANDCROP_SANITIZE": "address,undefined", "CPATH": str(hidden), "CI": "",
    }  # fmt: skip
    processes = {}
    for name in (name for name in commands if wanted[name]):
        log = open(folder / f"{name}.log", "w")  # noqa: SIM115
        env = environment if name == "extension" else None
        processes[name] = subprocess.Popen(
            commands[name],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

    def finished(name):
        status = processes[name].wait(timeout=300)
        assert status == 0, (folder / f"{name}.log").read_text()[-4000:]
        return folder / name

    yield finished
    for process in processes.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the compiler too
            process.wait()


def links_libdeflate():
    done = subprocess.run(
        [CXX, "-x", "c++", "-", "-ldeflate", "-o", os.devnull],
        input="#include <libdeflate.h>\nint main() { return !libdeflate_alloc_decompressor(); }",
        capture_output=True,
        text=True,
    )
    return done.returncode == 0


# --- truncated files ---------------------------------------------------------------------------


def check_truncations(path, work, step=1):
    """At each length: a TileError or the exact pixels."""
    exact = samples_by_tifffile(path)
    shutil.copyfile(path, work)
    whole = work.stat().st_size
    for length in range(whole, -1, -step):
        os.truncate(work, length)
        try:
            got = bandcrop.read(str(work))
        except bandcrop.TileError as error:
            assert length < whole and str(error).startswith(str(work))
        else:
            assert np.array_equal(got, exact, equal_nan=exact.dtype.kind == "f"), length
        if length % 101 == 0:
            out, report = fill_one(work, 0, exact.shape[1:], bad="report")
            if report.errors:
                assert not out.any()
            else:
                np.testing.assert_array_equal(out, exact[0].astype(np.float32))


@pytest.mark.parametrize(
    "name",
    ["bigearthnet/mask/000.tif", "zoo/bigearthnet_B05.tif", "zoo/mask_deflate_tiled_int16.tif"],
)
def test_every_truncation_of_a_real_file_is_refused_or_exact(tmp_path, name):
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"real data (../shared/data/{name}) not here")
    if bandcrop.info(str(path)).compression not in bandcrop.codecs():
        pytest.skip(f"this build has no {bandcrop.info(str(path)).compression}")
    check_truncations(path, tmp_path / "cut.tif")


def test_truncations_of_a_file_of_each_layout_are_refused_or_exact(tmp_path):
    for path in write_seeds(tmp_path / "seeds"):
        if bandcrop.info(path).compression in bandcrop.codecs():
            check_truncations(path, tmp_path / "cut.tif", step=3)


def test_a_file_that_shrinks_while_it_is_read_is_refused_or_exact(tmp_path):
    array = image((4, 200, 200), "u2")
    whole = Path(write(tmp_path / "whole.tif", array, compression="lzw", rowsperstrip=1))
    content = whole.read_bytes()
    path = tmp_path / "tile.tif"
    reader = bandcrop.Reader(2)
    outcomes = set()
    rng = np.random.default_rng(0)
    for _ in range(30):
        path.write_bytes(content)
        out = np.full((16, 1, 200, 200), np.nan, np.float32)
        ticket = reader.submit(out, [str(path)] * 16, [[2]] * 16, bad="report")
        threading.Event().wait(rng.uniform(0, 0.004))
        length = len(content)
        while length > 200:
            length = int(length * rng.uniform(0.5, 0.99))
            os.truncate(path, length)
        failed = {index for index, message in ticket.wait().errors}
        for i in range(16):
            outcomes.add(i in failed)
            if i in failed:
                assert not out[i].any()
            else:
                np.testing.assert_array_equal(out[i, 0], array[2].astype(np.float32))
    assert outcomes == {True, False}


# --- hostile directories -----------------------------------------------------------------------


def test_the_files_built_here_are_right_before_they_are_wrong(tmp_path):
    path = tmp_path / "tile.tif"
    for big in False, True:
        start = 16 if big else 8
        path.write_bytes(tiff(plain(t273=(16 if big else 4, [start])), PIXELS, big))
        np.testing.assert_array_equal(bandcrop.read(str(path)).ravel(), np.frombuffer(PIXELS, "u1"))
        np.testing.assert_array_equal(samples_by_tifffile(path).tobytes(), PIXELS)


def test_loops_of_directories_are_never_entered(tmp_path):
    path = tmp_path / "loop.tif"
    directory = 8 + len(PIXELS)
    for after in directory, 8, 4, 2**32 - 1:
        path.write_bytes(tiff(plain(), PIXELS, after=after))
        assert bandcrop.read(str(path)).tobytes() == PIXELS
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 4))  # the directory is the header
    refused(path)


@pytest.mark.parametrize(
    "words, changes",
    [
        (r"tag 256 .* is 0", {"t256": (4, [0])}),
        (r"tag 256 .* holds different values", {"t256": (4, [16, 17])}),
        (r"tag 256 .* is 4294967295", {"t256": (4, [2**32 - 1])}),
        (r"tag 257 .* is 2147483648", {"t257": (4, [2**31])}),
        (r"tag 257 .* is 18446744073709551615", {"t257": (16, [2**64 - 1])}),
        (r"tag 258 .* is 12", {"t258": (3, [12])}),
        (r"tag 258 .* holds different values", {"t258": (3, [8, 8, 16]), "t277": (3, [3])}),
        (r"tag 258 .* past the end", {"t258": (3, [8, 8, 8], 2**30), "t277": (3, [3])}),
        (r"tag 259 .* is 34712", {"t259": (3, [34712])}),
        (r"tag 266 .* is 2", {"t266": (3, [2])}),
        (r"tag 273 .* is missing", {"t273": None}),
        (r"tag 273 .* past the end", {"t273": (4, [8] * 4, 2**32 - 1)}),
        (r"tag 273 .* past the end", {"t273": (4, [8] * 4, 2**30)}),
        (r"tag 273 .* header", {"t273": (4, [7])}),
        (r"tag 273 .* past the end", {"t273": (4, [2**32 - 1])}),
        (r"tag 273 .* past the end", {"t273": (16, [2**64 - 1])}),
        (r"tag 273 .* past the end", {"t273": (16, [2**63])}),
        (r"tag 273 .* has 1 values", {"t278": (4, [4])}),
        (r"tag 273 .* has 1 values", {"t284": (3, [2]), "t277": (3, [3])}),
        (r"tag 277 .* is 0", {"t277": (3, [0])}),
        (r"tag 277 .* is 70000", {"t277": (4, [70000])}),
        (r"tag 278 .* is 0", {"t278": (4, [0])}),
        (r"tag 262 .* is 6, YCbCr", {"t262": (3, [6]), "t277": (3, [3])}),
        (r"tag 262 .* is 6, YCbCr", {"t262": (3, [6]), "t277": (3, [3]), "t530": (3, [2, 1])}),
        (r"tag 279 .* is missing", {"t279": None, "t278": (4, [8]), "t273": (4, [8, 136])}),
        (r"tag 279 .* is missing", {"t279": None, "t259": (3, [5])}),
        (r"tag 279 .* 0 bytes", {"t279": (4, [0]), "t259": (3, [5])}),
        (r"tag 279 .* 0 bytes",
         {"t279": (4, [128, 0]), "t278": (4, [8]), "t273": (4, [8, 136])}),
        (r"tag 279 .* has 1 values",
         {"t279": (4, [128]), "t278": (4, [8]), "t273": (4, [8, 136])}),
        (r"tag 279 .* is missing", {"t279": None, "t273": (4, [0]), "t259": (3, [8])}),
        (r"tag 279 .* holds 255 bytes", {"t279": (4, [255])}),
        (r"tag 279 .* unsigned", {"t279": (4, [256]), "t256": (4, [16])}),
        (r"tag 284 .* is 3", {"t284": (3, [3])}),
        (r"tag 317 .* is 4", {"t317": (3, [4]), "t259": (3, [5])}),
        (r"tag 317 .* floating", {"t317": (3, [3]), "t259": (3, [5])}),
        (r"tag 339 .* is 5", {"t339": (3, [5])}),
        (r"tag 32997 .* is 2", {"t32997": (4, [2])}),
        (r"tag 322 .* is 0", {"t324": (4, [8]), "t325": (4, [256])}),
        (r"tag 325 .* is missing",
         {"t322": (4, [8]), "t323": (4, [16]), "t324": (4, [8, 136])}),
    ],
)  # fmt: skip
def test_wrong_tags_are_named(tmp_path, words, changes):
    path = tmp_path / "tile.tif"
    content = tiff(plain(**changes), PIXELS)
    if words.endswith("unsigned"):  # a byte count as a signed LONG
        content = content.replace(struct.pack("<HH", 279, 4), struct.pack("<HH", 279, 9))
    path.write_bytes(content)
    refused(path, words)


def test_tiles_under_the_strips_tags_are_read_as_tiles(tmp_path):
    # As libtiff and tifffile do: 16 x 16 tiles of a 20 x 24 image.
    array = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24)
    padded = np.zeros((32, 32), np.uint8)
    padded[:20, :24] = array
    tiles = padded.reshape(2, 16, 2, 16).swapaxes(1, 2).tobytes()
    tags = plain(24, 20, t322=(3, [16]), t323=(3, [16]), t279=(4, [256] * 4))
    tags[273] = (4, [8 + 256 * i for i in range(4)])
    path = tmp_path / "tile.tif"
    path.write_bytes(tiff(tags, tiles))
    np.testing.assert_array_equal(samples_by_tifffile(path)[0], array)
    np.testing.assert_array_equal(bandcrop.read(str(path))[0], array)
    assert bandcrop.info(str(path)).tiled


def test_a_byte_count_that_the_rows_tell_may_be_missing_or_zero(tmp_path):
    path = tmp_path / "tile.tif"
    for count in None, (4, [0]), (3, [0]):
        path.write_bytes(tiff(plain(t279=count), PIXELS))
        assert bandcrop.read(str(path)).tobytes() == PIXELS
        path.write_bytes(tiff(plain(16, 17, t279=count), PIXELS)[:-10])
        refused(path)
    tile = {"t322": (3, [16]), "t323": (3, [16]), "t324": (4, [8]), "t325": (4, [0])}
    path.write_bytes(tiff(plain(**tile), PIXELS))
    assert bandcrop.read(str(path)).tobytes() == PIXELS


def test_bands_saved_as_pages_are_refused_and_overviews_and_masks_are_not(tmp_path):
    array = image((13, 24, 20), "u2")
    path = tmp_path / "tile.tif"
    small = array[:, ::2, ::2]
    options = {"photometric": "minisblack", "metadata": None}
    tifffile.imwrite(path, array, **options)
    for call in (bandcrop.info, bandcrop.read, fill_one):
        with pytest.raises(bandcrop.TileError, match="tif: 13 pages of one band: save as bands of"):
            call(str(path))
    with tifffile.TiffWriter(path) as file:
        file.write(array[0], **options)
        file.write(small[0], subfiletype=1, **options)  # an overview
        file.write(array[1] > 0, subfiletype=4, **options)  # a mask
    np.testing.assert_array_equal(bandcrop.read(str(path))[0], array[0])
    with tifffile.TiffWriter(path) as file:  # one page of all bands, and another
        for _ in range(2):
            file.write(array, planarconfig="separate", **options)
    np.testing.assert_array_equal(bandcrop.read(str(path)), array)


def test_as_many_planes_as_there_can_be_are_read(tmp_path):
    n = 65535
    pixels = np.random.default_rng(0).integers(0, 256, 2 * n).astype(np.uint8)
    tags = plain(2, 1, t277=(3, [n]), t284=(3, [2]), t279=(3, [2] * n))
    tags[273] = (4, [8 + 2 * i for i in range(n)])
    path = tmp_path / "planes.tif"
    path.write_bytes(tiff(tags, pixels.tobytes()))
    bands = [*range(n - 1, -1, -1), 7, 7]
    np.testing.assert_array_equal(
        bandcrop.read(str(path), bands)[:, 0], pixels.reshape(n, 2)[bands]
    )


def test_headers_that_point_anywhere_are_refused(tmp_path):
    path = tmp_path / "tile.tif"
    whole = tiff(plain(), PIXELS)
    for at in [*range(0, 8), len(whole) - 1, len(whole), 2**31, 2**32 - 1, 2**32 - 2]:
        path.write_bytes(whole[:4] + struct.pack("<I", at) + whole[8:])
        refused(path)
    big = tiff(plain(t273=(16, [16])), PIXELS, True)
    for at in [0, 8, len(big), 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]:
        path.write_bytes(big[:8] + struct.pack("<Q", at) + big[16:])
        refused(path)
    directory = 16 + len(PIXELS)
    for entries in 65536, 2**63, 2**64 - 1, 2**64 // 20, 65535:
        path.write_bytes(big[:directory] + struct.pack("<Q", entries) + big[directory + 8 :])
        refused(path)
    path.write_bytes(big[:4] + struct.pack("<HH", 4, 0) + big[8:])
    refused(path, "offsets at byte 4")


def test_counts_and_products_that_overflow_are_refused(tmp_path):
    path = tmp_path / "tile.tif"
    most = 2**31 - 1
    tile = {"t322": (4, [most]), "t323": (4, [most]), "t324": (4, [8]), "t325": (4, [256])}
    strip = {"t273": None, "t278": None, "t279": None}
    for changes in (
        {**tile, "t277": (4, [65535]), "t258": (3, [64]), "t339": (3, [3])},  # bytes of a tile
        {**tile, "t322": (4, [1]), "t323": (4, [1]), "t277": (4, [65535]), "t284": (3, [2])},
        {**tile, "t322": (4, [1]), "t323": (4, [1])},  # 2^62 tiles
    ):
        path.write_bytes(tiff(plain(most, most, **{**strip, **changes}), PIXELS))
        refused(path, r"tag \d+")
    for kind, value in ((16, 2**64 - 1), (16, 2**64 - 8), (16, 2**63), (4, 2**32 - 1)):
        path.write_bytes(
            tiff(plain(t273=(16, [16]), t279=(kind, [value]), t259=(3, [5])), PIXELS, True)
        )
        refused(path, "tag 273 .* past the end")


def test_strips_that_overlap_beyond_the_files_size_are_refused(tmp_path):
    path = tmp_path / "tile.tif"
    strips = {"t278": (4, [1]), "t273": (4, [8] * 400), "t279": (4, [256] * 400)}
    path.write_bytes(tiff(plain(256, 400, **strips), PIXELS))
    refused(path, "overlap")
    # A few equal strips are no attack: some writers store them once.
    strips = {"t278": (4, [1]), "t273": (4, [8] * 2), "t279": (4, [128] * 2)}
    path.write_bytes(tiff(plain(128, 2, **strips), PIXELS))
    assert bandcrop.read(str(path)).tobytes() == PIXELS[:128] * 2


def test_odd_paths_are_refused_by_name(tmp_path, monkeypatch):
    pipe, dangling, loop = tmp_path / "pipe", tmp_path / "dangling", tmp_path / "loop"
    os.mkfifo(pipe)
    dangling.symlink_to(tmp_path / "nowhere")
    loop.symlink_to(loop)
    for path, words in [
        (pipe, "not a regular file"), (tmp_path, "not a regular file"), (dangling, "No such file"),
        (loop, "[Ss]ymbolic links"), (tmp_path / ("x" * 300), "too long"),
        (Path("/dev/zero"), "not a regular file"), (Path("/dev/tty"), "."),
    ]:  # fmt: skip
        for call in (bandcrop.info, bandcrop.read, fill_one):
            with pytest.raises(bandcrop.TileError, match=words) as caught:
                call(str(path))
            assert str(caught.value).startswith(str(path))
    with pytest.raises(ValueError, match="null"):
        bandcrop.info("tile\0.tif")


def test_a_name_that_is_not_utf8_is_read_or_named(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe4.tif")
    for call in (bandcrop.info, bandcrop.read, fill_one):
        with pytest.raises(bandcrop.TileError, match="No such file") as caught:
            call(name)
        assert str(caught.value).startswith(name)
    _, report = fill_one(name, bad="report")
    assert report.errors[0][1].startswith(name)
    Path(name).write_bytes(tiff(plain(), PIXELS))
    assert bandcrop.read(name).tobytes() == PIXELS
    for wrong, error in (([9], None), IndexError), ((None, [0, 0, 17, 1]), ValueError):
        with pytest.raises(error) as caught:
            bandcrop.read(name, *wrong)
        assert str(caught.value).startswith(f"{name} has ")


# --- limits of the machine: in processes of their own ------------------------------------------


def run_limited(code, *arguments, **environment):
    """Runs `code` after a few imports, within 60 s of processor time, and returns its output."""
    start = """
        import os, resource, sys, time
        import numpy as np
        import bandcrop
        TileError = bandcrop.TileError
        hard = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_CPU, (60, hard))
        def status(field):  # KiB
            for line in open("/proc/self/status"):
                if line.startswith(field + ":"):
                    return int(line.split()[1])
        def limit_memory(more):  # bytes beyond what is mapped now
            resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") * 1024 + more, hard))
    """
    program = textwrap.dedent(start) + textwrap.dedent(code)
    folder = Path(bandcrop.__file__).parents[1]  # the same build as this process's
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(folder), "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:] or done.returncode
    return done.stdout


def test_no_permission_is_named(tmp_path):
    path = Path(write(tmp_path / "tile.tif", image((1, 8, 8), "u1")))
    path.chmod(0)
    code = """
        if os.geteuid() == 0:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)  # permissions do not bind root
        for call in bandcrop.info, bandcrop.read:
            try:
                call(sys.argv[1])
            except TileError as error:
                print(error)
    """
    said = run_limited(code, path).splitlines()
    assert said == [f"{path}: cannot be opened: Permission denied"] * 2


def test_too_many_open_files_are_named_and_pass(tmp_path):
    path = write(tmp_path / "tile.tif", image((1, 8, 8), "u1"))
    code = """
        reader = bandcrop.Reader(4)
        out = np.zeros((64, 1, 8, 8), np.float32)
        call = (out, sys.argv[1:] * 64, np.zeros((64, 1), int))
        reader.fill(*call)
        expected = out.copy()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, soft))
        for use in (lambda: bandcrop.read(sys.argv[1]), lambda: reader.fill(*call)):
            try:
                use()
            except TileError as error:
                print(error)
        print(len(reader.fill(*call, bad="report").errors))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
        reader.fill(*call)
        print((out == expected).all() and out.any())
    """
    one, two, count, same = run_limited(code, path).splitlines()
    assert one == two == f"{path}: cannot be opened: Too many open files"
    assert int(count) == 64 and same == "True"


def huge_claims():
    """Small files that claim very much: (name, content)."""
    square, most = 65536, 2**31 - 1
    nothing = {"t273": (4, [0]), "t279": (4, [0])}
    yield "2^32 pixels", tiff(plain(square, square), PIXELS)
    yield "2^32 pixels never written", tiff(plain(square, square, **nothing), PIXELS)
    yield "2^62 pixels never written", tiff(plain(most, most, **nothing), PIXELS)
    yield "a row of 2^31 pixels", tiff(plain(most, 1, **nothing), PIXELS)
    yield "a column of 2^31 pixels", tiff(plain(1, most, **nothing), PIXELS)
    bands = {"t277": (3, [65535])}
    yield "65535 bands", tiff(plain(most, most, **nothing, **bands), PIXELS)
    tiles = {"t322": (4, [most]), "t323": (4, [16]), "t324": (4, [0]), "t325": (4, [0])}
    yield "a tile 2^31 wide", tiff(plain(most, 16, **tiles, t273=None, t279=None), PIXELS)
    for codec, number in ("packbits", 32773), ("lzw", 5), ("deflate", 8), ("zstd", 50000):
        if codec in bandcrop.codecs():
            tags = plain(square, square, t259=(3, [number]), t279=(4, [256]))
            yield f"2^32 pixels of {codec}", tiff(tags, PIXELS)
            tags = plain(square, 16384, t259=(3, [number]), t279=(4, [256]))
            yield f"2^30 pixels of {codec}", tiff(tags, PIXELS)


def bombs():
    """Compressed strips and tiles that hold far more than an image needs: (name, content)."""
    import imagecodecs

    zeros = bytes(2**26)
    packed = {
        5: imagecodecs.lzw_encode(zeros), 8: zlib.compress(zeros, 9),
        32773: b"\xfe\0" + b"\x81\0" * 2**19, 50000: imagecodecs.zstd_encode(zeros),
    }  # fmt: skip
    for number, data in packed.items():
        names = {5: "lzw", 8: "deflate", 32773: "packbits", 50000: "zstd"}
        if names[number] in bandcrop.codecs():
            tags = plain(t259=(3, [number]), t279=(4, [len(data)]))
            yield f"bomb {number}", tiff(tags, data)
            tile = {"t322": (4, [16]), "t323": (4, [2**22]), "t324": (4, [8, 8 + len(data)])}
            tags = plain(32, 160, t259=(3, [number]), **tile, t325=(4, [len(data)] * 2))
            yield f"tall tiles {number}", tiff(tags, data * 2)


def test_strips_and_tiles_that_hold_more_than_is_needed_cost_only_that(tmp_path):
    paths = []
    for name, content in bombs():
        paths.append(tmp_path / f"{name}.tif")
        paths[-1].write_bytes(content)
    code = """
        reader = bandcrop.Reader(1)
        out = np.ones((1, 1, 224, 224), np.float32)
        before = status("VmHWM")
        for path in sys.argv[1:]:
            reader.fill(out, [path], [[0]])
            assert not out.any() and not bandcrop.read(path).any()
        print(status("VmHWM") - before)
    """
    assert int(run_limited(code, *paths)) < 16 * 1024


def test_huge_claims_take_neither_memory_nor_time(tmp_path):
    paths = []
    for name, content in huge_claims():
        paths.append(tmp_path / f"{name}.tif")
        paths[-1].write_bytes(content)
    code = """
        reader = bandcrop.Reader(1)
        out = np.zeros((1, 1, 224, 224), np.float32)
        before = status("VmHWM")
        for path in sys.argv[1:]:
            refusals = 0
            for use in (lambda: bandcrop.read(path), lambda: reader.fill(out, [path], [[0]])):
                try:
                    use()
                except TileError as error:
                    assert str(error).startswith(path)
                    refusals += 1
            print(refusals, path)
        print(status("VmHWM") - before)
    """
    *lines, grown = run_limited(code, *paths).splitlines()
    assert [line for line in lines if not line.startswith("2 ")] == []
    assert int(grown) < 16 * 1024


def test_a_small_window_of_a_vast_sparse_image_is_read(tmp_path):
    # What is claimed matters only where it is asked for.
    path = tmp_path / "sparse.tif"
    tags = plain(2**30, 2**30, t273=(4, [0]), t279=(4, [0]))
    path.write_bytes(tiff(tags, PIXELS))
    assert not bandcrop.read(str(path), None, (2**29, 2**30 - 20, 10, 20)).any()
    out, _ = fill_one(path, 0, (8, 8), (0.5, 0.25, 2.0**-26, 2.0**-26))
    assert not out.any()


def test_a_window_too_long_to_resample_is_refused(tmp_path):
    # 32 MiB of rows never written are not too much to read, but what a resampler keeps of them is.
    path = tmp_path / "column.tif"
    for tags in plain(1, 2**25), plain(2**25, 1):
        tags.update({273: (4, [0]), 279: (4, [0])})
        path.write_bytes(tiff(tags, PIXELS))
        with pytest.raises(bandcrop.TileError, match="at most 65536 a side"):
            fill_one(path, 0, (224, 224))
    assert bandcrop.read(str(path)).size == 2**25


def test_when_memory_runs_out_the_reader_says_so_and_goes_on(tmp_path):
    paths = [
        write(tmp_path / "a.tif", image((3, 60, 300), "f4"), compression="lzw"),
        write(tmp_path / "b.tif", image((3, 90, 300), "u2"), "separate"),
    ]
    code = """
        out, expected = np.zeros((2, 1, 120, 8, 100), np.float32)
        refused = filled = 0
        for name in sys.argv[1:]:
            call = ([name], [[2, 0, 1] * 40])
            bandcrop.Reader(1).fill(expected, *call)
            kib = [*range(0, 256, 8), *range(256, 2048, 128), *range(4096, 65536, 6144)]
            for more in [1024 * k for k in kib]:
                reader = bandcrop.Reader(1)  # without memory of its own yet
                limit_memory(more)
                try:
                    reader.fill(out, *call)
                    ok = True
                except (TileError, MemoryError) as error:
                    ok = False
                    assert "memory" in str(error) or isinstance(error, MemoryError)
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
                filled += ok
                refused += not ok
                assert not ok or (out == expected).all()
                # What was half made must not be taken for whole.
                out[:] = 7
                reader.fill(out, *call)
                assert (out == expected).all()
        print(refused, filled)
    """
    # Every larger block is mapped by itself, so that the limit meets each of them.
    small = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0"}
    refused, filled = map(int, run_limited(code, *paths, **small).split())
    assert refused > 10 and filled > 2


def test_when_threads_run_out_nothing_writes_behind_the_callers_back(tmp_path):
    path = write(tmp_path / "tile.tif", image((1, 64, 64), "u2"))
    code = """
        limit_memory(200 << 20)  # room for the stacks of some threads
        reader = bandcrop.Reader(500)
        out = np.zeros((8, 1, 64, 64), np.float32)
        call = (out, sys.argv[1:] * 8, np.zeros((8, 1), int))
        try:
            reader.fill(*call)
        except RuntimeError as error:
            print(error)
        time.sleep(0.3)
        assert not out.any()
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        reader.fill(*call)
        print(out.any())
    """
    said = run_limited(code, path).splitlines()
    assert len(said) == 2 and said[1] == "True"


# Run by hand for longer: python tests/test_attack.py fills 200000
FILLS = """
    from pathlib import Path
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    fills, folder = int(sys.argv[1]), Path(sys.argv[2])
    paths = sorted(map(str, folder.glob("*.tif"))) + [str(folder / "missing.tif"), str(folder)]
    rng = np.random.default_rng(0)
    reader = bandcrop.Reader(8)
    out = np.zeros((2, 8, 1, 48, 40), np.float32)
    memory, descriptors, refused = [], set(), 0
    for i in range(fills):
        names = [paths[k] for k in rng.integers(0, len(paths), 8)]
        windows = np.concatenate([rng.uniform(0, 0.5, (8, 2)), rng.uniform(0.02, 0.5, (8, 2))], 1)
        call = (names, np.zeros((8, 1), int), windows, rng.integers(0, 8, 8).astype(np.uint8))
        if i % 3 == 0:
            ticket = reader.submit(out[1], *call, bad="report")
            dropped = reader.submit(out[0], *call) if i % 9 == 0 else None
            ticket.wait()
            del ticket, dropped
        elif i % 3 == 1:
            try:
                reader.fill(out[0], *call)
            except TileError:
                refused += 1
        else:
            reader.fill(out[0], *call, bad="report")
        if (i + 1) % (fills // 100) == 0:
            memory.append(status("VmRSS"))
            descriptors.add(len(os.listdir("/proc/self/fd")))
    half = memory[len(memory) // 2 :]
    slope = np.polyfit(np.arange(len(half)) * (fills // 100), half, 1)[0] * 1000
    print(len(descriptors), refused, half[-1] - half[0], f"{slope:.3f}", *memory[9::10])
"""


def test_many_fills_hold_memory_flat_and_leak_no_descriptor(tmp_path):
    write_seeds(tmp_path)
    (tmp_path / "cut.tif").write_bytes(tiff(plain(), PIXELS)[:-40])
    descriptors, refused, grown, slope, *_ = run_limited(FILLS, 2000, tmp_path).split()
    assert int(descriptors) == 1 and int(refused) > 100
    assert int(grown) < 512 and float(slope) < 50  # KiB; KiB for each 1000 fills


# --- sanitizers --------------------------------------------------------------------------------


@needs_compiler
def test_mutated_files_pass_the_sanitizers(tmp_path, builds):
    seeds = write_seeds(tmp_path)
    for name in "bigearthnet/mask/000.tif", "zoo/bigearthnet_B05.tif":
        if (REAL / name).is_file():
            seeds.append(str(REAL / name))
    done = subprocess.run(
        [builds("loop"), "2024", MUTATIONS, *seeds],
        env={**os.environ, "ASAN_OPTIONS": "max_allocation_size_mb=512"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stderr[-4000:]}\nKEEP_LAST=FILE keeps what it was at"
    assert done.stdout == f"{MUTATIONS} executions\n"


@pytest.mark.fuzz
@needs_compiler
def test_the_pool_passes_the_thread_sanitizer(tmp_path, builds):
    seeds = write_seeds(tmp_path)
    done = subprocess.run(
        [builds("race"), *seeds, tmp_path / "missing.tif", tmp_path],
        capture_output=True,
        text=True,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-4000:]


@pytest.mark.fuzz
@needs_compiler
def test_the_other_tests_pass_the_address_and_undefined_behaviour_sanitizers(builds):
    folder = builds("extension")

    def library(name):
        command = [CXX, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    code = """
        import sys
        folder, *arguments = sys.argv[1:]
        sys.path.insert(0, folder)
        import bandcrop, pytest
        assert bandcrop.__file__.startswith(folder), bandcrop.__file__
        sys.exit(pytest.main(arguments))
    """
    # torch does not load under it; and its allocator's locks, held by a thread at a fork, stay held
    # in the child for ever (GCC 12's: two threads of the child waited in it, once in 300 forks)
    skipped = "not torch and not missing_codec and not before_a_fork"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), folder, "-q", "-x", "-p", "no:cacheprovider"]
        + [
            "-k",
            skipped,
            ROOT / "tests/test_bandcrop.py",
            ROOT / "tests/test_codecs.py",
        ],
        cwd=folder,
        env={
            **os.environ,
            "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": str(folder),  # for the processes that the tests start
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "passed" in done.stdout


if __name__ == "__main__":  # python tests/test_attack.py fills N | seeds FOLDER
    import tempfile

    if sys.argv[1] == "seeds":
        print("\n".join(write_seeds(sys.argv[2])))
    else:
        with tempfile.TemporaryDirectory() as seeds:
            write_seeds(seeds)
            print(run_limited(FILLS, sys.argv[2], seeds))
