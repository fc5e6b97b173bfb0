"""bandcrop.stream on streams and events that finish late and at random; threads at an end.

A stand-in for torch runs each CUDA stream on a thread of its own, as late as it likes, and gives
memory that is free to the next copy at once, so that a wait that is missing shows.
"""

import csv
import queue
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import bandcrop
import numpy as np
import pytest
import tifffile

TILES, SIDE = 12, 16


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Files whose one band holds the file's number, from 1 on."""
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(TILES):
        tifffile.imwrite(folder / f"{i:02d}.tif", np.full((SIDE, SIDE), i + 1, np.float32))
    return [str(folder / f"{i:02d}.tif") for i in range(TILES)]


def requests_of(tiles, number, batch=2):
    for i in range(number):
        paths = [tiles[(i * batch + j) % TILES] for j in range(batch)]
        yield {"paths": paths, "bands": np.zeros((batch, 1), int), "extra": i}


def values_of(number, batch=2):
    """What each batch's samples hold."""
    return [[(i * batch + j) % TILES + 1 for j in range(batch)] for i in range(number)]


# --- a stand-in for torch and its device -----------------------------------------------------


class Stream:
    """Runs what is given to it in order, on a thread, each after a pause."""

    def __init__(self, pause):
        self.work, self.pause, self.device = queue.Queue(), pause, "cuda:0"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            step = self.work.get()
            time.sleep(self.pause())
            step()

    def record_event(self):
        event = threading.Event()
        self.work.put(event.set)
        return SimpleNamespace(wait=event.wait, synchronize=event.wait)

    def wait_event(self, event):
        self.work.put(event.wait)


class DeviceTensor:
    """Memory of a stream: once dropped it is free for that stream's next tensor, or, after
    record_stream, as soon as the other stream has come so far."""

    def __init__(self, owner, shape):
        self.owner, self.streams = owner, []
        self.memory = owner.free.pop() if owner.free else np.zeros(shape, np.float32)

    def record_stream(self, stream):
        self.streams.append(stream)

    def __del__(self):
        owner, memory = self.owner, self.memory
        if self.streams:
            self.streams[0].work.put(lambda: owner.free.append(memory))
        else:
            owner.free.append(memory)


class HostTensor:
    """Pinned memory: copied when the current stream comes to it."""

    def __init__(self, device, array):
        self.device, self.array = device, array

    def __getitem__(self, at):
        return HostTensor(self.device, self.array[at])

    def numpy(self):
        return self.array

    def to(self, device, non_blocking):
        assert non_blocking
        made = DeviceTensor(self.device.current, self.array.shape)
        memory, array = made.memory, self.array
        self.device.current.work.put(lambda: np.copyto(memory, array))
        return made


class Device:
    """One graphics processor and the functions of torch that stream() calls on it."""

    def __init__(self, copies_pause, compute_pause):
        self.current = self.compute = Stream(compute_pause)
        self.copies_pause, self.host, self.device = copies_pause, [], SimpleNamespace
        self.copy_streams = 0
        self.cuda = SimpleNamespace(
            Stream=self.new_stream, stream=self.using, current_stream=lambda device: self.current,
            current_device=lambda: 0,
        )  # fmt: skip

    def torch(self):
        sys.modules["bandcrop.stream"].copy_stream.cache_clear()  # another device's
        kind = lambda name: SimpleNamespace(type=name.split(":")[0], index=None)  # noqa: E731
        return SimpleNamespace(device=kind, empty=self.empty, cuda=self.cuda, float32=None)

    def new_stream(self, device):
        made, self.copy_streams = Stream(self.copies_pause), self.copy_streams + 1
        made.free = []
        return made

    def using(self, stream):
        device = self

        class Using:
            def __enter__(self):
                self.before, device.current = device.current, stream

            def __exit__(self, *_):
                device.current = self.before

        return Using()

    def empty(self, shape, dtype, device, pin_memory):
        self.host.append(np.full(shape, np.nan, np.float32))
        return HostTensor(self, self.host[-1])

    def kernel(self, x, seen):
        """Reads x, much later than it is asked to."""
        memory = x.memory
        self.compute.work.put(lambda: seen.append(memory[:, 0, 0, 0].tolist()))

    def synchronize(self):
        self.compute.record_event().wait()


@pytest.mark.parametrize("late", ["copies", "kernels", "both"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_buffer_is_written_while_it_is_copied_nor_read_before(tiles, monkeypatch, late, ahead):
    draw = random.Random(f"{late}{ahead}")
    slow, fast = lambda: draw.random() * 0.008, lambda: 0
    device = Device(slow if late != "kernels" else fast, slow if late != "copies" else fast)
    monkeypatch.setitem(sys.modules, "torch", device.torch())
    seen = []
    requests = requests_of(tiles, 24)
    for batch in bandcrop.stream(requests, (2, 1, SIDE, SIDE), "cuda", threads=2, ahead=ahead):
        device.kernel(batch.x, seen)
        del batch  # its memory may be given to the next copy
    device.synchronize()
    assert seen == values_of(24)


def test_a_device_has_one_stream_for_copies_also_where_two_are_read_at_once(tiles, monkeypatch):
    device = Device(lambda: 0.002, lambda: 0.002)
    monkeypatch.setitem(sys.modules, "torch", device.torch())
    seen, within = [], []
    for number, batch in enumerate(
        bandcrop.stream(requests_of(tiles, 6), (2, 1, SIDE, SIDE), "cuda")
    ):
        if number % 2:
            for other in bandcrop.stream(requests_of(tiles, 3), (2, 1, SIDE, SIDE), "cuda"):
                device.kernel(other.x, within)
        device.kernel(batch.x, seen)
    device.synchronize()
    assert seen == values_of(6) and within == values_of(3) * 3 and device.copy_streams == 1


# --- order, sizes, ends ------------------------------------------------------------------------


def test_batches_come_in_order_with_their_request_and_size(tiles):
    requests = [*requests_of(tiles, 5), {"paths": tiles[:1], "bands": np.zeros((1, 1), int)}]
    found = []
    for batch in bandcrop.stream(iter(requests), (2, 1, SIDE, SIDE), threads=2):
        found.append(batch.x[:, 0, 0, 0].tolist())
        assert batch.request is requests[len(found) - 1]
        assert batch.waited >= 0 and len(batch.report.replaced) == len(batch.x)
    assert found == [*values_of(5), [1]]


def test_a_bad_tile_is_raised_when_its_batch_comes(tiles):
    requests = [*requests_of(tiles, 3)]
    requests[1]["paths"] = [tiles[0], "missing.tif"]
    batches = bandcrop.stream(requests, (2, 1, SIDE, SIDE), threads=2)
    assert next(batches).request is requests[0]
    with pytest.raises(bandcrop.TileError, match=r"missing\.tif") as caught:
        next(batches)
    assert caught.value.index == 1
    with pytest.raises(StopIteration):
        next(batches)


def test_torchs_defaults_do_not_matter(tiles):
    import torch

    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            (batch,) = bandcrop.stream(requests_of(tiles, 1), (2, 1, SIDE, SIDE), threads=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.x.dtype == torch.float32 and batch.x[:, 0, 0, 0].tolist() == values_of(1)[0]


def test_a_device_that_it_cannot_fill_is_refused_by_name(tiles):
    with pytest.raises(ValueError, match="mps"):
        next(bandcrop.stream(requests_of(tiles, 1), (2, 1, SIDE, SIDE), "mps"))


@pytest.mark.parametrize("how", ["close", "exception", "bad tile", "ctrl-c"])
def test_after_the_loop_no_thread_writes(tmp_path, monkeypatch, how):
    tifffile.imwrite(tmp_path / "slow.tif", np.ones((1500, 1500), np.float32))
    device = Device(lambda: 0, lambda: 0)
    monkeypatch.setitem(sys.modules, "torch", device.torch())
    requests = [*requests_of([str(tmp_path / "slow.tif")] * TILES, 12, batch=20)]
    if how == "bad tile":
        requests[2]["paths"][0] = "missing.tif"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    batches, kept = bandcrop.stream(requests, (20, 1, SIDE, SIDE), "cuda", threads=2), None
    try:
        for number, _ in enumerate(batches):
            if number == 1 and how == "close":
                batches.close()
            elif number == 1 and how == "exception":
                raise ZeroDivisionError
            elif number == 1 and how == "ctrl-c":
                threading.Timer(0.03, signal.raise_signal, [signal.SIGINT]).start()
    except (ZeroDivisionError, KeyboardInterrupt):
        del batches
    except bandcrop.TileError as error:
        kept = error  # and with it the frames that it came through
    finally:
        signal.signal(signal.SIGINT, before)
    for buffer in device.host:
        buffer[:] = -1
    time.sleep(0.05)
    assert len(device.host) == 3 and all((buffer == -1).all() for buffer in device.host)
    assert number < 11 and (kept is not None) == (how == "bad tile")


def test_importing_bandcrop_imports_nothing_heavier_than_numpy():
    code = "import sys, bandcrop; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "tifffile", "scipy", "PIL", "matplotlib"]
    command = [sys.executable, "-c", code, *heavy]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "[]\n"


def test_equal_neighbouring_paths_are_opened_and_read_once(tmp_path):
    path, other = tmp_path / "tile.tif", tmp_path / "other.tif"
    tile = np.random.default_rng(0).random((8, 8, 3), np.float32)
    tifffile.imwrite(path, tile, planarconfig="contig", photometric="minisblack")
    tifffile.imwrite(other, tile[::-1], planarconfig="contig", photometric="minisblack")
    reader, out = bandcrop.Reader(1), np.empty((1, 4, 8, 8), np.float32)
    once = reader.fill(out, [path], [[0, 1, 2, 1]]).bytes_read
    assert reader.fill(out, [[path] * 4], [[0, 1, 2, 1]]).bytes_read == once
    assert reader.fill(out, [[path, path, other, other]], [[0, 1, 2, 1]]).bytes_read == 2 * once
    np.testing.assert_array_equal(out[0, :2], tile.transpose(2, 0, 1)[:2])
    np.testing.assert_array_equal(out[0, 2:], tile[::-1].transpose(2, 0, 1)[[2, 1]])


def test_every_file_of_another_number_of_bands_is_refused(tiles, tmp_path):
    odd = str(tmp_path / "odd.tif")
    tifffile.imwrite(odd, np.zeros((2, 8, 8), np.float32), planarconfig="separate",
                     photometric="minisblack")  # fmt: skip
    reader, out = bandcrop.Reader(2), np.ones((3, 1, 8, 8), np.float32)
    call = (out, [tiles[0], odd, tiles[1]], np.zeros((3, 1), int))
    for wanted in (1, [1, 1, 1]):
        with pytest.raises(bandcrop.TileError, match=r"odd\.tif: has 2 bands, not 1") as caught:
            reader.fill(*call, bands_in_file=wanted)
        assert caught.value.index == 1
        report = reader.submit(*call, bad="report", bands_in_file=wanted).wait()
        assert [index for index, _ in report.errors] == [1] and not out[1].any()
    assert reader.fill(*call, bands_in_file=[1, 2, 1]).errors == []
    for wrong in (0, 1.0, [1, 2], [[1], [2], [1]]):
        with pytest.raises((TypeError, ValueError), match="bands_in_file"):
            reader.fill(*call, bands_in_file=wrong)


# --- statistics ----------------------------------------------------------------------------------


def test_statistics_leave_out_each_files_own_nodata(tmp_path):
    rng = np.random.default_rng(0)
    kept, paths = [], []
    for i, nodata in enumerate([None, -9999, 0]):
        tile = rng.integers(1, 2000, (2, 9, 11)).astype(np.float32)
        tile[1, 0, :4] = np.nan
        tile[:, 3] = -9999 if nodata is None else nodata  # of the first file: an honest value
        tags = [] if nodata is None else [(42113, 2, 0, str(nodata), True)]
        paths.append(str(tmp_path / f"{i}.tif"))
        tifffile.imwrite(paths[-1], tile, planarconfig="separate", photometric="minisblack",
                         metadata=None, extratags=tags)  # fmt: skip
        kept.append([band[np.isfinite(band) & ((band != nodata) | (nodata is None))]
                     for band in tile.astype(np.float64)])  # fmt: skip
    expected = [np.concatenate([tile[c] for tile in kept]) for c in (1, 0)]
    mean, std = bandcrop.statistics(paths, [[1, 0]] * 3, bands_in_file=2)
    np.testing.assert_allclose(mean, [x.mean() for x in expected], rtol=1e-12)
    np.testing.assert_allclose(std, [x.std() for x in expected], rtol=1e-9)
    alone = bandcrop.statistics([[p, p] for p in paths], [[1, 0]] * 3, bands_in_file=[[2, 2]] * 3)
    np.testing.assert_array_equal(alone, (mean, std))


@pytest.mark.parametrize(
    "dtype, value, deviation",
    [
        (np.float32, -21.77, 0), (np.float64, 1e-3, 0), (np.uint16, 65000, 0),
        (np.float64, np.finfo(np.float64).min, np.inf),
    ],
)  # fmt: skip
def test_statistics_of_equal_samples_and_of_ones_too_large(tmp_path, dtype, value, deviation):
    paths = [str(tmp_path / f"{i}.tif") for i in range(37)]
    for path in paths:
        tifffile.imwrite(path, np.full((60, 60), value, dtype))
    _, std = bandcrop.statistics(paths, [[0]] * 37)
    assert std.tolist() == [deviation]


def test_statistics_refuse_or_leave_out_a_file_of_other_bands(tiles, tmp_path):
    odd = str(tmp_path / "odd.tif")
    tifffile.imwrite(odd, np.zeros((2, 8, 8), np.float32), planarconfig="separate",
                     photometric="minisblack")  # fmt: skip
    with pytest.raises(bandcrop.TileError, match="odd.tif.*2 bands") as caught:
        bandcrop.statistics([tiles[0], odd], [[0], [0]], bands_in_file=1)
    assert caught.value.index == 1
    left = bandcrop.statistics([tiles[4], odd], [[0], [0]], bands_in_file=1, bad="report")
    assert np.array(left).tolist() == [[5], [0]]
    with pytest.raises(bandcrop.TileError):
        bandcrop.statistics([odd], [[0]], bands_in_file=1, bad="reports")


# --- Python's end, other interpreters -----------------------------------------------------------


@pytest.mark.parametrize("call", ["fill", "wait", "read"])
def test_a_daemon_thread_that_waits_when_python_ends_does_not_abort(tiles, call):
    code = """
        import sys, threading, time, numpy as np, bandcrop
        reader, paths = bandcrop.Reader(2), sys.argv[2:] * 200
        out, bands = np.zeros((len(paths), 1, 224, 224), np.float32), np.zeros((len(paths), 1), int)
        def read():
            while True:
                bandcrop.read(paths[0])
        calls = {"fill": lambda: reader.fill(out, paths, bands), "read": read,
                 "wait": lambda: reader.submit(out, paths, bands).wait()}
        threading.Thread(target=calls[sys.argv[1]], daemon=True).start()
        time.sleep(0.05)
    """
    for _ in range(3):
        command = [sys.executable, "-c", textwrap.dedent(code), call, *tiles]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="the module's name is of Python 3.8 to 3.12"
)
def test_a_sub_interpreter_gets_an_import_error():
    code = """
        import sys, _xxsubinterpreters as sub
        path = f"import sys; sys.path[:] = {sys.path!r}"
        sub.run_string(sub.create(), path + "\\nimport bandcrop._core")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "ImportError" in done.stderr and "main interpreter" in done.stderr


# Tables ------------------------------------------------------------------------------------------
def test_a_table_is_what_csv_makes_of_it_with_the_lines_of_its_rows(tmp_path):
    text = '\ufeffS1 , s2,note\r\na.tif, b.tif,"x, y"\r\n\r\nc.tif,d.tif,\r\n'
    (tmp_path / "t.csv").write_text(text, newline="")
    rows = bandcrop.read_table(tmp_path / "t.csv", ["s1", "s2"])
    assert [row.pop("line") for row in rows] == [2, 4]
    plain = text.removeprefix("\ufeff").replace("S1 ", "s1").splitlines()
    assert rows == list(csv.DictReader(plain, skipinitialspace=True))


@pytest.mark.parametrize("text, line", [
    (b"", 1), (b"s1;s2\na;b\n", 1), (b"s1,s2,s2\n", 1), (b"s1,s2\n", 2), (b"s1,s2\na\n", 2),
    (b"s1,s2\na,b\na,b,c\n", 3), (b's1,s2\na,"b\nc,d\n', 2), (b"\xff\xfe", 1),
    (b"s1,s2\r\na,b\r\n\r\n\xe9,b\r\n", 4),
])  # fmt: skip
def test_what_is_no_table_is_an_error_with_its_line(text, line, tmp_path):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(bandcrop.TileError, match=rf"t\.csv: line {line}: "):
        bandcrop.read_table(tmp_path / "t.csv", ["s1", "s2"])
    with pytest.raises(OSError):
        bandcrop.read_table(tmp_path, ["s1"])
