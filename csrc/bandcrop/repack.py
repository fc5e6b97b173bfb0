"""Rewrite an archive of GeoTIFFs so that reading one band costs the bytes of one band.

    python -m bandcrop.repack data/sen12ms data/sen12ms-bands
    python -m bandcrop.repack data/sen12ms data/sen12ms-bands --bands 2,3,4,5,6,7,8,9,12,13

The tree below DST is that of SRC. TIFF files become uncompressed and band-sequential; samples,
georeference, nodata and GDAL metadata stay as they were, and each file is read back to see that.
Other files are copied. What is done is skipped: after an interruption run the same command again.
"""

import argparse
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from bandcrop._core import TileError, info, read

try:
    import tifffile
except ImportError:
    sys.exit("bandcrop.repack: error: tifffile is not installed: pip install tifffile")

# pixel scale, tie points, transformation, three of GeoTIFF's keys, GDAL's metadata and nodata
KEPT_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113)


def kept_tags(path: Path, bands: list[int] | None = None) -> dict[int, tuple[int, Any]]:
    """Tag -> (type, value) of the first image, text as bytes."""
    tags = {}
    with tifffile.TiffFile(path) as file:
        if not all(page.is_reduced for page in file.pages[1:]):
            raise ValueError(f"{path}: of its {len(file.pages)} images only one would be kept")
        for tag in (file.pages[0].tags.get(code) for code in KEPT_TAGS):
            value = getattr(tag, "value", None)
            if isinstance(value, str):
                file.filehandle.seek(tag.valueoffset)
                value = file.filehandle.read(tag.valuebytecount).rstrip(b"\0")
            if bands and value and tag.code == 42112:  # what it says of each band, by number
                value = re.sub(rb'\s*<Item [^>]*sample=".*?</Item>', b"", value, flags=re.DOTALL)
            if value is not None:
                tags[tag.code] = (int(tag.dtype), value)
    return tags


def repack(source: Path, target: Path, bands: list[int] | None) -> int:
    """Make target of source, whole or not at all, unless it is done. Returns the bytes written.

    bands   0-based; a file that lacks one of them keeps all of its own
    """
    tiff = is_tiff(source)
    if not tiff or (bands and max(bands) >= info(source).bands):
        bands = None
    kept = "all" if bands is None else ",".join(str(band + 1) for band in bands)
    maker = f"bandcrop.repack, bands {kept}"  # into tag 305, Software
    if target.exists():
        unchanged = source.stat().st_mtime_ns == target.stat().st_mtime_ns
        if tiff:
            with tifffile.TiffFile(target) as file:
                made_by = file.pages[0].software
            ours, unchanged = made_by.startswith("bandcrop"), unchanged and made_by == maker
        else:
            ours = unchanged = unchanged and source.stat().st_size == target.stat().st_size
        if unchanged:
            return 0
        if not ours:
            raise ValueError(f"{target}: was not made from {source}: delete it to have it made")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        if tiff:
            pixels, tags = read(source, bands), kept_tags(source, bands)
            one = len(pixels) == 1
            extra = [(code, kind, 1 if np.isscalar(value) else len(value), value, True)
                     for code, (kind, value) in tags.items()]  # fmt: skip
            tifffile.imwrite(
                part, pixels[0] if one else pixels, planarconfig=None if one else "separate",
                photometric="minisblack", metadata=None, software=maker, extratags=extra,
                bigtiff=pixels.nbytes > 2**32 - 2**25,
            )  # fmt: skip
            again = read(part)
            same = (again.dtype, again.shape) == (pixels.dtype, pixels.shape)
            if not same or again.tobytes() != pixels.tobytes() or kept_tags(part) != tags:
                raise ValueError(f"{source}: its copy differs from it, and is not kept")
        else:
            shutil.copyfile(source, part)
        shutil.copystat(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def bytes_of(path: Path, bands: list[int] | None) -> int:
    """How many bytes a file becomes; 0 if it cannot be read."""
    try:
        if not is_tiff(path):
            return path.stat().st_size
        tile = info(path)
    except (OSError, TileError):
        return 0
    kept = len(bands) if bands and max(bands) < tile.bands else tile.bands
    return kept * tile.height * tile.width * np.dtype(tile.dtype).itemsize


def numbers(text: str) -> list[int]:
    """0-based bands of "2,3,4"."""
    bands = [int(word) - 1 for word in text.split(",")]
    if min(bands) < 0 or len(set(bands)) < len(bands):
        raise ValueError
    return bands


def fail(status: int, message: str) -> None:
    print(f"bandcrop.repack: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bandcrop.repack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--bands", type=numbers, metavar="2,3,4", help="keep these, by GDAL's "
                        "numbers, of files that have all of them; others stay whole")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (4)")
    args = parser.parse_args()
    source, target = args.source.resolve(), args.target.resolve()
    if not source.is_dir():
        fail(2, f"{args.source} is no folder")
    if source in (target, *target.parents) or target in source.parents:
        fail(2, f"{args.source} and {args.target} must not lie in each other")
    if args.jobs < 1:
        fail(2, f"--jobs is {args.jobs}")
    tree = os.walk(source, followlinks=True)
    files = sorted(Path(folder, name) for folder, _, names in tree for name in names)
    if not any(map(is_tiff, files)):
        fail(1, f"{args.source} holds no .tif file")
    places = [target / path.relative_to(source) for path in files]
    missing = [path for path, place in zip(files, places, strict=True) if not place.exists()]
    step = len(missing) // 100 + 1  # a hundred files tell how large all will be
    needed = step * sum(bytes_of(path, args.bands) for path in missing[::step])
    there = next(folder for folder in (target, *target.parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        fail(1, f"{args.target} needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    began, total, terminal = time.monotonic(), len(files), sys.stderr.isatty()
    written = made = failed = 0
    pool = ThreadPoolExecutor(args.jobs)
    try:
        jobs = [pool.submit(repack, *pair, args.bands) for pair in zip(files, places, strict=True)]
        for done, job in enumerate(as_completed(jobs), 1):
            error = job.exception()
            if isinstance(error, OSError):  # a full disk, no permission: the others would fail too
                fail(1, f"{error}; the same command goes on from here")
            if error:
                failed += 1
                print(f"\nnot done: {error}", file=sys.stderr)
            else:
                written, made = written + job.result(), made + (job.result() > 0)
            steps = 1000 if terminal else 20  # a terminal shows all lines as one
            if done * steps // total == (done - 1) * steps // total:
                continue
            spent = time.monotonic() - began
            bar, left = "#" * (20 * done // total), spent / done * (total - done)
            print(f"[{bar:20}] {done}/{total} files  {written / 1e6 / spent:.0f} MB/s  "
                  f"{left:.0f} s left   ", end="\r" if terminal and done < total else "\n",
                  file=sys.stderr, flush=True)  # fmt: skip
    except KeyboardInterrupt:
        fail(130, "stopped: the same command goes on from here")
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{made} files written ({written / 1e6:.1f} MB), {total - made - failed} done before")
    if failed:
        fail(1, f"{failed} of {total} files are not in {args.target}")


if __name__ == "__main__":
    main()
