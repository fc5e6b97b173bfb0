"""Write synthetic archives shaped like SEN12MS, EuroSAT and DFC2020.

    python tests/synthetic.py data/demo                # all, in DIR/sen12ms, DIR/eurosat, ...
    python tests/synthetic.py data/demo --pairs 1000   # more pairs for pre-training
    python tests/synthetic.py data/demo --eurosat 0    # 0 leaves an archive out

Names, folders, dtypes, band orders and TIFF layouts are those of the real archives. The pixels are
invented: a smooth random land-cover map, drawn as surfaces that mix two materials (canopy and
shade, roof and street) in a pattern of their own (spots, stripes, blocks). Sentinel-2 and
Sentinel-1 see the same map and pattern. Brightness says little about the class, because sun, haze
and season change from tile to tile; the pattern says more, in every band. Results on these
archives say nothing about real images: each root holds SYNTHETIC.txt, and every file says
"synthetic" in its description.
"""

import argparse
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from numpy.typing import DTypeLike, NDArray
from scipy import fft

# --------------------------------------------------------------------------------------------------
# What the world is made of

# Top-of-atmosphere reflectance x 10000 of B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12 (near
# the class means of real EuroSAT files), then backscatter VV, VH in dB.
MATERIALS = {
    "canopy": [1090, 800, 720, 410, 800, 2350, 2950, 2900, 3250, 930, 10, 1400, 570, -9, -14.5],
    "shade": [1020, 720, 590, 340, 560, 1400, 1700, 1650, 1850, 600, 9, 750, 320, -13, -19.5],
    "grass": [1300, 1020, 950, 680, 1180, 2700, 3250, 3200, 3600, 1130, 13, 1950, 960, -12, -17.5],
    "straw": [1400, 1220, 1250, 1300, 1650, 2150, 2400, 2400, 2650, 950, 16, 2800, 1850, -13, -19],
    "soil": [1430, 1300, 1400, 1650, 1900, 2150, 2350, 2400, 2600, 850, 14, 3100, 2300, -14, -22],
    "tarmac": [1600, 1420, 1350, 1350, 1500, 1750, 1900, 1900, 2050, 600, 12, 2000, 1600, -14, -21],
    "roof": [1850, 1750, 1750, 1850, 2000, 2250, 2450, 2400, 2600, 700, 14, 2600, 2150, -5, -12],
    "sand": [1700, 1700, 1950, 2350, 2600, 2700, 2850, 2900, 3100, 950, 17, 3800, 3200, -17, -25],
    "water": [1190, 910, 730, 480, 460, 370, 360, 310, 290, 90, 8, 90, 60, -21, -27.5],
    "ripple": [1230, 960, 800, 560, 560, 500, 500, 450, 430, 150, 9, 180, 130, -17.5, -25.5],
    "snow": [5600, 5700, 5500, 5500, 5600, 5500, 5400, 5300, 5300, 1700, 28, 900, 750, -13, -21],
    "ice": [3600, 3600, 3500, 3400, 3500, 3400, 3300, 3200, 3200, 1100, 20, 650, 500, -9.5, -17],
}  # fmt: skip
HAZE = np.array([420, 380, 300, 240, 210, 190, 170, 160, 140, 60, 1, 60, 40], np.float32)
LOOKS = 4  # of the speckle, as in Sentinel-1's 10 m ground-range product


class Surface(NamedTuple):
    """Two materials mixed in a pattern; the wavelength is in pixels of 10 m."""

    bright: str
    dark: str
    pattern: str
    wavelength: float


SURFACES = {
    "forest": Surface("canopy", "shade", "spots", 4.5),
    "shrubs": Surface("canopy", "straw", "spots", 9),
    "savanna": Surface("canopy", "straw", "smooth", 18),
    "meadow": Surface("grass", "straw", "smooth", 36),
    "marsh": Surface("grass", "water", "spots", 18),
    "arable": Surface("grass", "soil", "fields", 22),
    "orchard": Surface("canopy", "soil", "stripes", 5.5),
    "houses": Surface("roof", "canopy", "blocks", 6),
    "halls": Surface("roof", "tarmac", "blocks", 15),
    "road": Surface("tarmac", "tarmac", "smooth", 20),
    "snow": Surface("snow", "ice", "smooth", 24),
    "dunes": Surface("sand", "soil", "stripes", 12),
    "water": Surface("ripple", "water", "smooth", 7),
}

# DFC2020's class 1..10 (SEN12MS's simplified class): surfaces, IGBP ids, the other MODIS layers
COVERS = {
    1: (["forest"], [1, 2, 3, 4, 5], (14, 10, 10)),  # Forest
    2: (["shrubs"], [6, 7], (41, 40, 40)),  # Shrubland
    3: (["savanna"], [8, 9], (22, 20, 20)),  # Savanna
    4: (["meadow"], [10], (31, 30, 30)),  # Grassland
    5: (["marsh"], [11], (31, 30, 50)),  # Wetlands
    6: (["arable", "orchard"], [12, 14], (31, 36, 30)),  # Croplands
    7: (["houses", "halls"], [13], (1, 9, 1)),  # Urban/Built-up
    8: (["snow"], [15], (2, 2, 2)),  # Snow/Ice
    9: (["dunes"], [16], (1, 1, 1)),  # Barren
    10: (["water"], [17], (3, 3, 3)),  # Water
}
SEASONS = ["ROIs1158_spring", "ROIs1868_summer", "ROIs1970_fall", "ROIs2017_winter"]
PATCHES_PER_SCENE = 8  # few, so that a small archive can be split by scene

EUROSAT = {  # class: surface; None: a line of `road` or `water` through open country
    "AnnualCrop": "arable", "Forest": "forest", "HerbaceousVegetation": "shrubs", "Highway": None,
    "Industrial": "halls", "Pasture": "meadow", "PermanentCrop": "orchard", "Residential": "houses",
    "River": None, "SeaLake": "water",
}  # fmt: skip
COUNTRY = ["forest", "shrubs", "meadow", "arable"]
EUROSAT_ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 8]  # B8A last: the order in the files


# --------------------------------------------------------------------------------------------------
# Pictures of it


def smooth_noise(rng: np.random.Generator, size: int, wavelength: float, octaves: float) -> NDArray:
    """Gaussian noise [size, size], variance 1, around a wavelength (pixels), some octaves wide."""
    frequency = np.hypot(fft.fftfreq(size)[:, None], fft.rfftfreq(size)[None])
    frequency[0, 0] = 1e-9  # the mean goes
    keep = np.exp(-0.5 * (np.log2(frequency * wavelength) / octaves) ** 2).astype(np.float32)
    white = rng.standard_normal((size, size), np.float32)
    noise = fft.irfft2(fft.rfft2(white) * keep, s=(size, size))
    return noise / (noise.std() + 1e-6)


def draw_pattern(rng: np.random.Generator, size: int, pattern: str, wavelength: float) -> NDArray:
    """Share of the bright material, 0 to 1, [size, size]; scale, direction and density vary."""
    wavelength = wavelength * np.exp(rng.normal(0, 0.15))
    angle = rng.uniform(0, np.pi)
    across = np.arange(size, dtype=np.float32)
    u = across[None] * np.float32(np.cos(angle)) + across[:, None] * np.float32(np.sin(angle))
    v = across[:, None] * np.float32(np.cos(angle)) - across[None] * np.float32(np.sin(angle))
    if pattern == "smooth":
        z = 1.5 * smooth_noise(rng, size, wavelength, 0.8) + rng.normal(0, 0.4)
        return 1 / (1 + np.exp(-z))
    if pattern == "spots":  # crowns, ponds
        z = 4 * (smooth_noise(rng, size, wavelength, 0.4) + rng.normal(0, 0.3))
        return 1 / (1 + np.exp(-z))
    if pattern == "stripes":  # rows, dunes
        bend = 0.5 * wavelength * smooth_noise(rng, size, 12 * wavelength, 0.8)
        return 0.5 + 0.5 * np.sin(2 * np.pi * (u + bend) / wavelength)
    # "blocks": houses and streets; "fields": long parcels without streets
    length = wavelength * (rng.uniform(1, 1.5) if pattern == "blocks" else rng.uniform(1.5, 3))
    row, column = u / wavelength + rng.uniform(0, 1), v / length + rng.uniform(0, 1)
    levels = rng.random((97, 89), np.float32)
    cell = levels[np.floor(row).astype(int) % 97, np.floor(column).astype(int) % 89]
    if pattern == "fields":
        return 0.85 * cell + 0.15 * (0.5 + 0.5 * np.sin(2 * np.pi * u / 3.5))
    street = (row % 1 < 0.3) | (column % 1 < 0.3)
    return np.where(street, 0.05, 0.45 + 0.55 * cell)


def render(
    rng: np.random.Generator, cover: NDArray, surfaces: list[Surface]
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """What the two satellites see of a map.

    cover: [h, w] index into `surfaces`. Returns S2 [h, w, 13] uint16, reflectance x 10000, in the
    order B01..B08, B8A, B09..B12, and S1 [h, w, 2] float32, VV and VH in dB.
    """
    size, classes = len(cover), len(surfaces)
    share = np.zeros((size, size), np.float32)
    for index, surface in enumerate(surfaces):
        here = cover == index
        if here.any():
            share[here] = draw_pattern(rng, size, surface.pattern, surface.wavelength)[here]
    share += 0.08 * rng.standard_normal(
        share.shape, np.float32
    )  # untidy nature: both sensors see it

    ends = [[MATERIALS[s.dark], MATERIALS[s.bright]] for s in surfaces]
    ends = np.array(ends, np.float64)  # [K, 2, 15]
    optical, radar = ends[..., :13], ends[..., 13:]
    # What makes brightness unreliable: season (each surface), sun (each tile), haze.
    season = rng.normal(0, 0.1, (classes, 1, 1)) + rng.normal(0, 0.04, (classes, 1, 13))
    sun = rng.normal(0, 0.2) + rng.normal(0, 0.03, 13)
    optical = (optical * np.exp(season + sun)).astype(np.float32)
    dark, span = optical[:, 0], optical[:, 1] - optical[:, 0]  # [K, 13]
    s2 = dark[cover] + span[cover] * share[..., None]  # [h, w, 13]
    haze = abs(rng.normal(0, 0.5)) * (1 + 0.3 * smooth_noise(rng, size, size, 0.8))
    s2 += HAZE * haze[..., None]
    s2 *= 1 + 0.02 * rng.standard_normal(s2.shape, np.float32)

    radar += rng.normal(0, 1, (classes, 1, 2)) + rng.normal(0, 1.5)  # moisture; incidence angle
    radar = radar.astype(np.float32)
    dark, span = radar[:, 0], radar[:, 1] - radar[:, 0]  # [K, 2]
    decibel = dark[cover] + span[cover] * share[..., None]  # [h, w, 2]
    speckle = rng.standard_gamma(LOOKS, decibel.shape, np.float32) / LOOKS
    s1 = 10 * np.log10(10 ** (decibel / 10) * speckle + np.float32(1e-3))  # noise floor -30 dB
    return np.clip(np.rint(s2), 1, 65535).astype(np.uint16), s1.astype(np.float32)


def draw_tile(
    rng: np.random.Generator, main_cover: int, size: int
) -> tuple[NDArray, NDArray, NDArray[np.uint16], NDArray[np.uint8]]:
    """S2 [h, w, 13], S1 [h, w, 2], lc [h, w, 4] and DFC2020 label [h, w]; `main_cover` leads."""
    others = [c for c in COVERS if c != main_cover]
    covers = np.array([main_cover, *rng.choice(others, rng.integers(2, 5), replace=False)])
    height = np.stack([smooth_noise(rng, size, 0.6 * size, 1.0) for _ in covers])
    height[0] += 1.0
    cover = height.argmax(0)
    surfaces = [SURFACES[rng.choice(COVERS[c][0])] for c in covers]
    s2, s1 = render(rng, cover, surfaces)
    modis = np.array([(rng.choice(COVERS[c][1]), *COVERS[c][2]) for c in covers], np.uint16)
    return s2, s1, modis[cover], covers[cover].astype(np.uint8)


def draw_eurosat(rng: np.random.Generator, name: str) -> NDArray[np.uint16]:
    """S2 [64, 64, 13]: the class's surface, up to a quarter of another one."""
    size = 64
    main = EUROSAT[name] or rng.choice(COUNTRY)
    other = rng.choice([s for s in COUNTRY if s != main])
    height = smooth_noise(rng, size, 60, 1.0)
    cover = (height > np.quantile(height, rng.uniform(0.75, 1))).astype(int)
    surfaces = [SURFACES[main], SURFACES[other]]
    if EUROSAT[name] is None:
        angle, place = rng.uniform(0, np.pi), np.arange(size) - size / 2
        u = place[None] * np.cos(angle) + place[:, None] * np.sin(angle)
        if name == "River":
            u = u + 5 * smooth_noise(rng, size, 40, 0.6)
        width = rng.uniform(7, 18) if name == "River" else rng.uniform(2, 4)
        cover[np.abs(u - rng.uniform(-12, 12)) < width / 2] = 2
        surfaces.append(SURFACES["water" if name == "River" else "road"])
    return render(rng, cover, surfaces)[0]


# --------------------------------------------------------------------------------------------------
# Files


def write_archive(root: Path, settings: str, fill: Callable[[Path], None]) -> bool:
    """Let `fill` write into a new folder, then rename it to `root`; False: it was there already.

    A synthetic archive of other settings is replaced. Raises FileExistsError for any other folder.
    """
    check_free(root)
    # With this file's checksum, so that an archive made by an older version of it is renewed.
    source = zlib.crc32(Path(__file__).read_bytes())
    text = (
        "synthetic: invented pixels, not satellite images\n"
        f"{settings}\nmade by tests/synthetic.py {source:08x}\n"
    )
    note = root / "SYNTHETIC.txt"
    if note.is_file() and note.read_text() == text:
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    for left in root.parent.glob(f".{root.name}.*.part"):  # of a killed run
        if not Path("/proc", left.name.split(".")[-2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    new, old = (root.parent / f".{root.name}.{os.getpid()}.{end}" for end in ("part", "old.part"))
    try:
        new.mkdir()
        fill(new)
        (new / "SYNTHETIC.txt").write_text(text)
        if root.exists():
            root.rename(old)
        new.rename(root)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return True


def check_free(root: Path) -> None:
    """Raise FileExistsError unless `root` is missing, empty or a synthetic archive."""
    if root.is_dir() and not root.is_symlink():
        if (root / "SYNTHETIC.txt").is_file() or not any(root.iterdir()):
            return
    if root.exists() or root.is_symlink():
        raise FileExistsError(
            f"{root} exists and is not a synthetic archive: name another folder, or move it away"
        )


def random_of(archive: str, seed: int, index: int) -> np.random.Generator:
    """The stream of one tile alone, so a larger archive begins with the tiles of a smaller one."""
    return np.random.default_rng([seed, zlib.crc32(archive.encode()), index])


def write_bands(
    path: Path, tile: NDArray, rows_per_strip: int, description: str, epsg: int | None
) -> None:
    """[h, w, bands] -> a pixel-interleaved file, its folder made where missing.

    epsg: a projected system; 10 m pixels at a made-up place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, epsg)
    place = [
        (33550, "d", 3, (10.0, 10.0, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 5500000.0, 0.0), True),
        (34735, "H", 16, keys, True),
    ]
    tifffile.imwrite(
        path, tile[..., 0] if tile.shape[2] == 1 else tile, photometric="minisblack",
        planarconfig=None if tile.shape[2] == 1 else "contig", metadata=None, software=False,
        rowsperstrip=rows_per_strip, description=description, extratags=place if epsg else (),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Archives. Each returns False, and writes nothing, where the same archive is there already.


def write_sen12ms(root: str | Path, pairs: int, seed: int, size: int = 256) -> bool:
    """`pairs` triplets: s1 [2] float32 dB, s2 [13] uint16, lc [4] uint16 (IGBP first).

    The ten simplified classes lead in turn: among ten tiles each is the scene label about once.
    """

    def fill(folder: Path) -> None:
        for index in range(pairs):
            rng = random_of("sen12ms", seed, index)
            s2, s1, lc, _ = draw_tile(rng, 1 + index % 10, size)
            block, patch = divmod(index, PATCHES_PER_SCENE)
            season, scene = SEASONS[block % 4], 1 + block // 4
            for sensor, tile, rows in (("s1", s1, 4), ("s2", s2, 1), ("lc", lc, 4)):
                name = f"{season}_{sensor}_{scene}_p{30 + patch}.tif"
                path = folder / season / f"{sensor}_{scene}" / name
                write_bands(path, tile, rows, f"synthetic SEN12MS {sensor}", 32632)

    return write_archive(Path(root), f"sen12ms pairs={pairs} seed={seed} size={size}", fill)


def write_eurosat(root: str | Path, per_class: int, seed: int) -> bool:
    """<Class>/<Class>_<n>.tif, [13, 64, 64] uint16, B8A last."""

    def fill(folder: Path) -> None:
        for index in range(10 * per_class):
            name, number = list(EUROSAT)[index % 10], 1 + index // 10
            tile = draw_eurosat(random_of("eurosat", seed, index), name)[..., EUROSAT_ORDER]
            path = folder / name / f"{name}_{number}.tif"
            write_bands(path, tile, 4, f"synthetic EuroSAT {name}", 32632)

    return write_archive(Path(root), f"eurosat per_class={per_class} seed={seed}", fill)


def write_dfc2020(
    root: str | Path,
    validation: int,
    test: int,
    seed: int,
    size: int = 256,
    s1_dtype: DTypeLike = np.float32,
    label_dtype: DTypeLike = np.uint8,
) -> bool:
    """The contest's layout: s1, s2, lc and dfc (labels 1..10) of each tile; not georeferenced.

    Copies in use differ: S1 is float32 or float64, labels are uint8 or int32.
    """
    s1_dtype, label_dtype = np.dtype(s1_dtype), np.dtype(label_dtype)

    def fill(folder: Path) -> None:
        for index in range(validation + test):
            part = "validation" if index < validation else "test"
            number = index if index < validation else index - validation
            rng = random_of(f"dfc2020 {part}", seed, number)
            s2, s1, lc, label = draw_tile(rng, 1 + number % 10, size)
            tiles = {"s1": (s1.astype(s1_dtype), 4), "s2": (s2, 1), "lc": (lc, 4)}
            tiles["dfc"] = (label[..., None].astype(label_dtype), 4)
            for kind, (tile, rows) in tiles.items():
                inner = f"{kind}_validation" if part == "validation" else f"{kind}_0"
                path = (
                    folder / f"ROIs0000_{part}" / inner / f"ROIs0000_{part}_{kind}_0_p{number}.tif"
                )
                write_bands(path, tile, rows, f"synthetic DFC2020 {kind}", None)

    numbers = f"validation={validation} test={test} seed={seed} size={size}"
    return write_archive(Path(root), f"dfc2020 {numbers} {s1_dtype} {label_dtype}", fill)


# --------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write synthetic archives; a number of 0 leaves the archive out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="sen12ms, eurosat, ... are made in it")
    number = partial(parser.add_argument, type=count)
    number("--seed", default=0, help="another seed gives other tiles")
    number("--pairs", default=160, help="SEN12MS pairs")
    number("--eurosat", default=40, help="EuroSAT images a class")
    number("--dfc2020", default=[24, 48], nargs=2, help="validation and test tiles")
    number("--size", default=256, help="side of SEN12MS and DFC2020 tiles in pixels")
    args = parser.parse_args()
    if not 16 <= args.size <= 4096:
        parser.error(f"--size {args.size}: use 16 to 4096")

    validation, test = args.dfc2020
    eurosat = {"per_class": args.eurosat}
    dfc2020 = {"validation": validation, "test": test, "size": args.size}
    archives = [  # folder, number, what, and what writes it
        ("sen12ms", args.pairs, "pairs", write_sen12ms, {"pairs": args.pairs, "size": args.size}),
        ("eurosat", 10 * args.eurosat, "images of 13 bands", write_eurosat, eurosat),
        ("dfc2020", validation + test, "validation and test tiles", write_dfc2020, dfc2020),
    ]
    archives = [archive for archive in archives if archive[1] > 0]
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name, *_ in archives:  # before any is written
            check_free(args.folder / name)
        for name, total, what, write, settings in archives:
            root, begin = args.folder / name, time.perf_counter()
            wrote = write(root, seed=args.seed, **settings)
            end = f"{time.perf_counter() - begin:.1f} s" if wrote else "there already, skipped"
            print(f"{root}: {total} synthetic {what}, seed {args.seed}: {end}", flush=True)
    except OSError as error:
        print(f"synthetic.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synthetic.py: interrupted; the archive under way was removed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
