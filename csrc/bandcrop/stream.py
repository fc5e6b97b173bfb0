"""Batches read ahead into pinned memory, and the statistics of bands."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bandcrop._core import Reader, Report, TileError, info, read

if TYPE_CHECKING:
    import torch


class Batch(NamedTuple):
    """What `stream` yields for a request."""

    x: torch.Tensor  # float32 [N, C, H, W] on the device; on the CPU valid until the next batch
    request: dict[str, Any]  # as it was given
    report: Report
    waited: float  # seconds that the caller waited for files


@cache
def copy_stream(index: int) -> Any:
    """One for each GPU: torch keeps memory that was freed on a stream for that stream."""
    import torch

    return torch.cuda.Stream(index)


def stream(
    requests: Iterable[dict[str, Any]],
    shape: tuple[int, int, int, int],
    device: torch.device | str = "cpu",
    threads: int = 0,
    ahead: int = 2,
) -> Generator[Batch, None, None]:
    """Read `requests` in order, `ahead` of them under way while the caller works on one.

    requests  dicts of Reader.submit's arguments by name, all but `out` ("paths" and "bands" at
              least); "extra", if there is one, is not read: it is the caller's own
    shape     N, C, H, W of the largest batch; a request with fewer paths gets a smaller one
    device    the CPU, or a CUDA device: then the buffers are pinned, and copied beside the
              caller's kernels, whose stream (the current one) waits for its batch

    Raises what Reader.submit and Ticket.wait do, when the caller comes to that batch. Closed early,
    by close() or an exception, it waits for the samples that are being read and reads no more.
    """
    import torch

    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}: use cpu or cuda")
    cuda = device.type == "cuda"
    reader = Reader(threads)
    # One buffer more than is read ahead: the one that the caller has, or that is being copied.
    plain = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    ring = [torch.empty(shape, **plain, pin_memory=cuda) for _ in range(ahead + 1)]
    copied: list[Any] = [None] * len(ring)  # events: the copy out of this buffer is done
    current = torch.cuda.current_device() if cuda and device.index is None else device.index
    copies = copy_stream(current) if cuda else None
    under_way: deque[tuple[int, dict[str, Any], Any, Any]] = deque()

    def oldest() -> Batch:
        began = time.perf_counter()
        report = under_way[0][-1].wait()  # no name here: a traceback would keep the ticket reading
        waited = time.perf_counter() - began
        slot, request, x, _ = under_way.popleft()
        if copies is not None:
            with torch.cuda.stream(copies):
                x = x.to(copies.device, non_blocking=True)
                copied[slot] = copies.record_event()
            compute = torch.cuda.current_stream(copies.device)
            compute.wait_event(copied[slot])
            x.record_stream(compute)  # else freed memory goes to the next copy while kernels read
        return Batch(x, request, report, waited)

    try:
        for number, request in enumerate(requests):
            slot = number % len(ring)
            if copied[slot] is not None:
                copied[slot].synchronize()  # else the next files would overwrite what is copied
            x = ring[slot][: len(request["paths"])]
            asked = {name: value for name, value in request.items() if name != "extra"}
            under_way.append((slot, request, x, reader.submit(x, **asked)))
            if len(under_way) > ahead:
                yield oldest()
        while under_way:
            yield oldest()
    finally:
        under_way.clear()  # cancels what has not started and waits for what has


@np.errstate(over="ignore", invalid="ignore")
def statistics(
    paths: Iterable[Any],
    bands: npt.ArrayLike,
    bands_in_file: npt.ArrayLike | None = None,
    bad: str = "raise",
    nodata: float | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of C channels over every sample of N tiles, float64 [C] each.

    paths (any iterable), bands, bands_in_file and nodata as for Reader.fill, whole tiles. Samples
    that are not finite or nodata are left out; a channel without any has mean and deviation 0, one
    whose samples are all equal has deviation 0, one of samples too large to be squared infinity.
    bad="report" leaves out tiles that cannot be read; "raise" raises TileError.
    """
    chosen = np.asarray(bands)
    expected = np.zeros(chosen.shape, int)
    if bands_in_file is not None:
        given = np.asarray(bands_in_file)
        expected += given[:, None] if given.ndim == 1 else given
    moments = np.zeros((3, chosen.shape[1]))  # count, sum, sum of squares
    for index, files in enumerate(paths):
        row = files if isinstance(files, (list, tuple)) else [files] * chosen.shape[1]
        for path, channels in groupby(range(len(row)), row.__getitem__):
            at = list(channels)
            try:
                tile = info(path, nodata)
                most = chosen[index, at].max() + 1
                if tile.bands < most or expected[index, at[0]] not in (0, tile.bands):
                    wanted = expected[index, at[0]] or f"{most} or more"
                    raise TileError(f"{path}: has {tile.bands} bands, not {wanted}")
                values = read(path, chosen[index, at].tolist())
            except TileError as error:
                if bad != "report":
                    error.index = index
                    raise
                continue
            for c, x in zip(at, values, strict=True):
                good = x[np.isfinite(x) & (x != tile.nodata)].astype(np.float64)
                moments[:, c] += good.size, good.sum(), np.square(good).sum()
    count, total, square = moments
    mean, power = total / np.maximum(count, 1), square / np.maximum(count, 1)  # power: of squares
    variance = power - mean**2
    variance[variance <= 1e-14 * power] = 0  # what rounding leaves of equal samples
    variance[np.isnan(variance)] = np.inf
    return mean, np.sqrt(variance)
