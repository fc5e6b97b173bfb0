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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from tqdm import tqdm  # type: ignore[import-untyped]

from bandcrop._core import info, read

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


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def repack(source: Path, target: Path, bands: list[int] | None) -> int:
    """Make target of source, whole or not at all, unless it is done. Returns the bytes written.

    bands   0-based; a file that lacks one of them keeps all of its own
    """
    if not source.is_file():
        raise ValueError(f"{source}: is no file, or a link to none")
    tiff = is_tiff(source)
    if not tiff or (bands and max(bands) >= info(source).bands):
        bands = None
    kept = "all" if bands is None else ",".join(str(band + 1) for band in bands)
    made_by = maker = f"bandcrop.repack, bands {kept}"  # into tag 305, Software
    if target.exists():
        if tiff:
            with tifffile.TiffFile(target) as file:
                made_by = file.pages[0].software
        if made_by == maker and source.stat().st_mtime_ns == target.stat().st_mtime_ns:
            return 0
        if not (tiff and made_by.startswith("bandcrop")):
            raise ValueError(f"{target}: was not made from {source}: delete it to have it made")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        if tiff:
            rewrite(source, part, bands, maker)
        else:
            shutil.copyfile(source, part)
        shutil.copystat(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def rewrite(source: Path, part: Path, bands: list[int] | None, maker: str) -> None:
    """Write the samples and tags of source to part, and read them back."""
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


def numbers(text: str) -> list[int]:
    """0-based bands of "2,3,4"."""
    bands = [int(word) - 1 for word in text.split(",")]
    if min(bands) < 0 or len(set(bands)) < len(bands):
        raise ValueError
    return bands


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bandcrop.repack", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--bands", type=numbers, metavar="2,3,4", help="keep these, by GDAL's "
                        "numbers, of files that have all of them; others stay whole")  # fmt: skip
    args = parser.parse_args(argv)
    source, target = args.source.resolve(), args.target.resolve()
    if not source.is_dir():
        parser.error(f"{args.source} is no folder")
    if source in (target, *target.parents) or target in source.parents:
        parser.error(f"{args.source} and {args.target} must not lie in each other")
    tree = os.walk(source, followlinks=True)
    files = sorted(Path(folder, name) for folder, _, names in tree for name in names)
    if not any(map(is_tiff, files)):
        sys.exit(f"bandcrop.repack: error: {args.source} holds no .tif file")

    sizes = []
    pool = ThreadPoolExecutor(4)
    try:
        jobs = [pool.submit(repack, path, target / path.relative_to(source), args.bands)
                for path in files]  # fmt: skip
        for job in tqdm(as_completed(jobs), total=len(jobs), unit=" files"):
            try:
                sizes.append(job.result())
            except OSError as error:  # a full disk, no permission: the others would fail too
                sys.exit(f"bandcrop.repack: error: {error}; the same command goes on from here")
            except Exception as error:  # TileError, or what tifffile makes of a damaged file
                tqdm.write(f"not done: {error}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    done = sizes.count(0)
    print(f"{len(sizes) - done} files written ({sum(sizes) / 1e6:.1f} MB), {done} done before")
    if len(sizes) < len(files):
        sys.exit(f"bandcrop.repack: error: {len(files) - len(sizes)} of {len(files)} files are not "
                 f"in {args.target}")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("bandcrop.repack: stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
