"""The scores of README's table: frozen features under the paper's head, regression, neighbours.

    python tests/judge.py lists DATA FOLDER    # FOLDER/{eurosat,optical,radar}-{val,test}.csv
    python tests/judge.py texture FOLDER SIZE  # FOLDER/texture@..., where FOLDER/stats@... is
    python tests/judge.py table FOLDER [SIZE]  # of FOLDER/NAME@SIZE@COLUMN@{val,test}.npz
    python tests/judge.py versus FOLDER SIZE A B [C D ...]    # A less B, C less D, ...
    python tests/judge.py maps DATA            # a floor for segment.py on DATA/bigearthnet

After the first, `probe.py --embed` writes the features of each list, by each encoder, at each size:
tests/proof.sh has the loop. A third of 3,000 EuroSAT JPEGs and of the labelled scenes that share no
ground, "val", serves to choose a rate, a penalty or a number of neighbours for each column. The
others, "test", give the score: macro F1, mean of five stratified splits of 80 and 20 %; of scenes,
which lie in few places, of twenty such splits that have no place in both parts. Names that differ
in -seedN alone are pre-trainings of one recipe. A difference gets Welch's interval over
pre-trainings and over the splits, widened by Nadeau and Bengio's correction as analyze.py does it;
of one encoder, over the splits alone.
"""

import csv
import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import probe  # noqa: E402
import segment  # noqa: E402
from analyze import Test, t_test_over_seeds  # noqa: E402

COLUMNS = ("Red", "Green", "Blue", "optical", "radar")
SENSORS = {"optical": "s2", "radar": "s1"}  # of s1s2_scenes
PARTS = {"EuroSAT": slice(0, 3), "optical": slice(3, 4), "radar": slice(4, 5)}  # of COLUMNS
FLOORS = ("stats", "texture")  # hand-made
OVERLAP = 0.25  # test images for each other one, in splits of 80 and 20 %
HEADS = {
    "paper's head": probe.CHOICES["mlp"],
    "regression": (1e-4, 1e-3, 1e-2, 1e-1),
    "neighbours": (1, 5, 10, 20),
}


def apart(paths: list[Path]) -> dict[int, int]:
    """Those of SEN1-2's tiles, cut with half a tile of overlap, of which no two share ground, each
    with the number of its place: tiles linked by shared ground, kept or not, are one place."""
    small = (Image.open(path).convert("F").resize((32, 32), Image.Resampling.BOX) for path in paths)
    tiles = np.stack([np.asarray(tile) for tile in small])
    count = len(tiles)
    share = np.zeros((count, count), bool)
    for down, right in ((16, 0), (0, 16), (16, 16), (16, -16)):  # half a tile
        here = tiles[:, down:, max(right, 0) : 32 + min(right, 0)].reshape(count, -1)
        there = tiles[:, : 32 - down, max(-right, 0) : 32 - max(right, 0)].reshape(count, -1)
        share |= np.corrcoef(here, there)[:count, count:] > 0.9
    share |= share.T
    _, place = connected_components(share, directed=False)
    kept: list[int] = []
    for tile in np.argsort(share.sum(1), kind="stable"):  # those with few neighbours first
        if not share[tile, kept].any():
            kept.append(int(tile))
    return {tile: int(place[tile]) for tile in sorted(kept)}


def write_lists(data: Path, folder: Path) -> None:
    """The same third of EuroSAT for each band, of the scenes for each sensor."""
    rng = np.random.default_rng(2026)
    photos = sorted((data / "eurosat_rgb").resolve().glob("*/*.jpg"))
    scenes = (data / "s1s2_scenes").resolve()
    rows = list(csv.DictReader(open(scenes / "pairs.csv")))
    kept = apart([scenes / row["s2"] for row in rows])
    eurosat = {"eurosat": [f"{path},{path.parent.name}," for path in photos]}
    sensors = {name: [f"{scenes / rows[tile][sensor]},{rows[tile]['label']},{place}"
                      for tile, place in kept.items()]
               for name, sensor in SENSORS.items()}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for lists in (eurosat, sensors):
        count = len(next(iter(lists.values())))
        val, test = np.split(rng.permutation(count), [count // 3])
        for name, lines in lists.items():
            for part, chosen in (("val", val), ("test", test)):
                text = "\n".join(["image,label,place", *(lines[i] for i in sorted(chosen))])
                (folder / f"{name}-{part}.csv").write_text(text + "\n")


def pattern_kinds(x: np.ndarray, far: int) -> np.ndarray:
    """Uniform local binary patterns (Ojala et al. 2002) of an image [S, S]: int [S, S].

    0 to 8: how many of a pixel's eight neighbours, `far` pixels off, are at least as bright, where
    these stand side by side; else 9. The image is mirrored at its borders.
    """
    circle = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    padded = np.pad(x, far, mode="reflect")
    shifted = [np.roll(padded, (-far * down, -far * right), (0, 1)) for down, right in circle]
    bright = np.stack([each[far:-far, far:-far] >= x for each in shifted])
    changes = (bright != np.roll(bright, 1, 0)).sum(0)  # around the circle
    return np.where(changes <= 2, bright.sum(0), 9)


def local_patterns(x: np.ndarray) -> np.ndarray:
    """Texture of an image [S, S]: the share of each kind of pattern at distances of 1, 2 and 4
    pixels, float [30]; pixels nearer to the border than the distance do not count."""
    kinds = [pattern_kinds(x, far)[far:-far, far:-far] for far in (1, 2, 4)]
    return np.concatenate([np.bincount(k.ravel(), minlength=10) / k.size for k in kinds])


def write_texture(folder: Path, size: str) -> None:
    """The features of a higher floor: those of `--weights stats`, and each image's patterns."""
    for column in COLUMNS:
        bands, band = (1, 0) if column in SENSORS else (3, COLUMNS.index(column))
        for part in ("val", "test"):
            file = np.load(folder / f"stats@{size}@{column}@{part}.npz")
            photos = [probe.open_photo(name, int(size), bands) for name in file["names"]]
            patterns = np.stack([local_patterns(photo[band]) for photo in photos])
            features = np.hstack([file["features"], patterns]).astype(np.float32)
            np.savez(folder / f"texture@{size}@{column}@{part}.npz", features=features,
                     labels=file["labels"], names=file["names"])  # fmt: skip


def splits(y: np.ndarray, places: list[str] | None) -> list[tuple]:
    """Five of 80 and 20 %; where tiles lie in few `places`, twenty with no place in both parts."""
    if places is None:
        return [*StratifiedShuffleSplit(5, test_size=0.2, random_state=0).split(y, y)]
    folds = [StratifiedGroupKFold(5, shuffle=True, random_state=seed) for seed in range(4)]
    return [split for fold in folds for split in fold.split(y, y, places)]


def scores(
    x: np.ndarray, y: np.ndarray, head: str, value: Any, places: list[str] | None = None
) -> np.ndarray:
    """Macro F1, over the classes to be found, of each split."""
    found = []
    for fit, test in splits(y, places):
        if head == "paper's head":
            torch.manual_seed(0)
            known, classes = map(torch.from_numpy, (x[fit], y[fit])), len(np.unique(y))
            (model,) = probe.fit_mlps(*known, classes, [value], 100)
            predicted = probe.predict(model, torch.from_numpy(x[test]))
        else:
            model = KNeighborsClassifier(value, metric="cosine")
            if head == "regression":  # mean cross-entropy + value * |W|^2
                model = LogisticRegression(C=1 / (2 * value * len(fit)), max_iter=400, tol=1e-3)
            predicted = make_pipeline(StandardScaler(), model).fit(x[fit], y[fit]).predict(x[test])
        labels = np.unique(y[test])
        found.append(f1_score(y[test], predicted, labels=labels, average="macro"))
    return np.array(found)


@functools.cache  # a recipe stands in several pairs
def judge(folder: Path, name: str, size: str, column: str, head: str) -> np.ndarray:
    """The test list's scores with the value that the validation list likes best.

    The floors get the value that the test list itself likes best, so their scores are high.
    """
    files = [np.load(folder / f"{name}@{size}@{column}@{part}.npz") for part in ("val", "test")]
    val, test = ((file["features"], file["labels"]) for file in files)
    places = None
    if column in SENSORS:
        places = [row["place"] for row in csv.DictReader(open(folder / f"{column}-test.csv"))]
    x, y, near = (*test, places) if name in FLOORS else (*val, None)
    best = max(HEADS[head], key=lambda value: scores(x, y, head, value, near).mean())
    return scores(*test, head, best, places)


def print_table(folder: Path, size: str) -> None:
    names = sorted({path.name.split("@")[0] for path in folder.glob(f"*@{size}@radar@test.npz")})
    for head in HEADS:
        print(f"\n{head}, {size} px: {', '.join(COLUMNS)}", flush=True)
        found = {}  # name: of each column float [splits]
        for name in names:
            found[name] = [judge(folder, name, size, c, head) for c in COLUMNS]
            print(f"{name:24}", *(f"{value.mean():.3f}" for value in found[name]), flush=True)
        recipes: dict[str, list[list[np.ndarray]]] = {}
        for name in names:
            recipes.setdefault(re.sub(r"-seed\d+", "", name), []).append(found[name])
        for floor, name in itertools.product(FLOORS, recipes):
            if floor not in found or name in FLOORS:
                continue
            for column in PARTS:
                what = f"{name}, {len(recipes[name])} pre-trainings, less {floor}, {column}"
                compare(what, column, recipes[name], [found[floor]])


def compare(what: str, column: str, *both_runs: list[list[np.ndarray]]) -> None:
    """Print the difference of the scores [splits] of each run's columns, in one of PARTS."""
    both = [np.array([np.mean(run[PARTS[column]], 0) for run in runs]) for runs in both_runs]
    test = t_test_over_seeds(Test("over pre-trainings", "", "F1", "", ""), *both, OVERLAP)
    spread = "".join(f", standard deviation {each.mean(1).std(ddof=1):.3f}"
                     for each in both if len(each) > 1)  # fmt: skip
    print(f"{what}: {test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f}; p = {test.p:.4f})"
          f"{spread}", flush=True)  # fmt: skip


def print_versus(folder: Path, size: str, recipes: tuple[str, str]) -> None:
    """The first recipe's scores less the second's."""
    for head in HEADS:
        both = []  # of each recipe, run and column: float [splits]
        for recipe in recipes:
            files = sorted(folder.glob(f"{recipe}-seed?@{size}@radar@test.npz"))
            names = [file.name.split("@")[0] for file in files]
            runs = [[judge(folder, name, size, c, head) for c in COLUMNS] for name in names]
            both.append(runs)
            means = " ".join(f"{np.mean(column):.3f}" for column in zip(*runs, strict=True))
            print(f"{head}, {size} px, {recipe}, mean of {len(names)}: {means}", flush=True)
        for column in PARTS:
            compare(f"{head}, {column}", column, *both)


def surroundings(x: np.ndarray) -> np.ndarray:
    """What lies around each pixel of a tile [S, S], in 45 hand-made numbers: float32 [45, S, S].

    The pixel itself, the tile's mean and deviation; at 1, 2, 4 and 8 pixels (of a Gaussian) the
    mean, gradient and deviation; and within 8 pixels the share of each kind of pattern.
    """
    maps = [x, np.full_like(x, x.mean()), np.full_like(x, x.std())]
    for sigma in (1, 2, 4, 8):
        mean, squares = (ndimage.gaussian_filter(values, sigma) for values in (x, x**2))
        maps += [mean, ndimage.gaussian_gradient_magnitude(x, sigma)]
        maps.append(np.sqrt(np.maximum(squares - mean**2, 0)))
    for far in (1, 2, 4):
        kinds = np.eye(10, dtype=np.float32)[pattern_kinds(x, far)]  # [S, S, 10]
        maps += [*ndimage.gaussian_filter(kinds, (8, 8, 0)).transpose(2, 0, 1)]
    return np.stack(maps)


def print_maps(data: Path) -> None:
    """mIoU of BigEarthNet's maps, drawn from one band's surroundings by a random forest (scikit-
    learn's, 100 trees, leaves of 5 pixels) that learnt from 100,000 pixels of the training tiles.
    First by the archive's split, then by the random ones that `segment.py --seeds 5` takes.
    """
    args = segment.arguments(["--dataset=csv", f"--root={data}/bigearthnet/tiles.csv", "--band=all",
        "--s2-bands=B02,B03,B04,B08", "--classes=urban,crops,forest,shrub/grass,wetland,water"]
    )  # fmt: skip
    tiles = segment.list_tiles(args)
    for split, seed in [("official", 0), *(("random", seed) for seed in range(5))]:
        args.split, rng, found = split, np.random.default_rng(0), []
        _, train, test = segment.split_tiles(tiles, args, seed)
        for band in tiles.bands:
            norm = segment.band_statistics(tiles, train, [band], args)
            both = []  # of the training and the test tiles: float32 [pixels, 45]
            for rows in (train, test):
                batches = segment.read_images(tiles, rows, [band], norm, torch.device("cpu"))
                maps = [surroundings(x) for batch in batches for x in batch[:, 0].numpy().copy()]
                both.append(np.stack(maps).transpose(0, 2, 3, 1).reshape(-1, len(maps[0])))
            truth, known = tiles.masks[test], tiles.masks[train].ravel()
            drawn = rng.choice(np.flatnonzero(known != segment.IGNORED), 100_000, replace=False)
            forest = RandomForestClassifier(100, min_samples_leaf=5, random_state=0)
            forest.fit(both[0][drawn], known[drawn])
            given = forest.predict(both[1]).reshape(truth.shape)
            metrics = segment.map_metrics(truth, given, args.classes)
            found.append(metrics["miou"])
            each = ", ".join(f"{name} {iou:.2f}" for name, iou in metrics["iou_per_class"].items())
            print(f"{split} {seed} {band}: mIoU {found[-1]:.3f} ({each})", flush=True)
        print(f"{split} {seed}, mean of bands: {np.mean(found):.3f}", flush=True)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "lists":
        write_lists(*map(Path, words))
    elif what == "versus":
        for pair in zip(words[2::2], words[3::2], strict=True):
            print_versus(Path(words[0]), words[1], pair)
    elif what == "texture":
        write_texture(Path(words[0]), words[1])
    elif what == "maps":
        print_maps(Path(words[0]))
    else:
        for each in words[1:] or ("64", "128"):
            print_table(Path(words[0]), each)
