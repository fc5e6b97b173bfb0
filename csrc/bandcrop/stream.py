"""Batches read ahead into pinned memory, and the statistics of bands."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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


def stream(
    requests: Iterable[dict[str, Any]],
    shape: tuple[int, int, int, int],
    device: torch.device | str = "cpu",
    threads: int = 0,
    ahead: int = 2,
) -> Iterator[Batch]:
    """Read `requests` in order, `ahead` of them under way while the caller works on one.

    requests  dicts of Reader.submit's arguments by name, all but `out` ("paths" and "bands" at
              least); "extra", if there is one, is not read: it is the caller's own
    shape     N, C, H, W of the largest batch; a request with fewer paths gets a smaller one
    device    on CUDA the buffers are pinned, and copied beside the caller's kernels

    Raises what Reader.submit and Ticket.wait do. Closed early, it waits for what is being read.
    """
    import torch

    device = torch.device(device)
    cuda = device.type == "cuda"
    reader = Reader(threads)
    ring = [torch.empty(shape, pin_memory=cuda) for _ in range(ahead + 1)]
    copied: list[Any] = [None] * len(ring)  # events: the copy out of this buffer is done
    copies = torch.cuda.Stream(device) if cuda else None
    under_way: deque[tuple[int, dict[str, Any], Any, Any]] = deque()

    def oldest() -> Batch:
        slot, request, x, ticket = under_way.popleft()
        began = time.perf_counter()
        report = ticket.wait()
        waited = time.perf_counter() - began
        if copies is not None:
            with torch.cuda.stream(copies):
                x = x.to(device, non_blocking=True)
                copied[slot] = copies.record_event()
            compute = torch.cuda.current_stream(device)
            compute.wait_event(copied[slot])
            x.record_stream(compute)  # its memory, the copy stream's, is in use there
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


def statistics(
    paths: Sequence[Any],
    bands: npt.ArrayLike,
    bands_in_file: npt.ArrayLike | None = None,
    bad: str = "raise",
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of C channels over every sample of N tiles, float64 [C] each.

    paths, bands, bands_in_file as for Reader.fill, whole tiles. Samples that are not finite or are
    their own file's nodata are left out; a channel without any has mean and deviation 0.
    bad="report" leaves out tiles that cannot be read; "raise" raises TileError.
    """
    chosen = np.asarray(bands)
    files = [p if isinstance(p, (list, tuple)) else [p] * chosen.shape[1] for p in paths]
    expected = np.zeros(chosen.shape, int)
    if bands_in_file is not None:
        given = np.asarray(bands_in_file)
        expected += given[:, None] if given.ndim == 1 else given
    moments = np.zeros((3, chosen.shape[1]))  # count, sum, sum of squares
    for index, row in enumerate(files):
        for path, channels in groupby(range(len(row)), row.__getitem__):
            at = list(channels)
            try:
                tile = info(path)
                if expected[index, at[0]] not in (0, tile.bands):
                    raise TileError(f"{path}: has {tile.bands} bands, not {expected[index, at[0]]}")
                values = read(path, chosen[index, at].tolist())
            except TileError as error:
                if bad == "raise":
                    error.index = index
                    raise
                continue
            for c, x in zip(at, values, strict=True):
                good = x[np.isfinite(x) & (x != tile.nodata)].astype(np.float64)
                moments[:, c] += good.size, good.sum(), np.square(good).sum()
    count, total, square = moments
    mean = total / np.maximum(count, 1)
    return mean, np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 0))
