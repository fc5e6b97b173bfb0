"""The scores of README's table: frozen features under the paper's head, regression, neighbours.

    python tests/judge.py lists DATA FOLDER    # FOLDER/{eurosat,optical,radar}-{val,test}.csv
    python tests/judge.py texture FOLDER SIZE  # FOLDER/texture@..., where FOLDER/stats@... is
    python tests/judge.py table FOLDER [SIZE]  # of FOLDER/NAME@SIZE@COLUMN@{val,test}.npz
    python tests/judge.py versus FOLDER SIZE A B [C D ...]    # A less B, C less D, ...

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
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import probe  # noqa: E402
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


def local_patterns(x: np.ndarray) -> np.ndarray:
    """Texture of an image [S, S]: uniform local binary patterns (Ojala et al. 2002), float [30].

    At distances of 1, 2 and 4 pixels the share of pixels of whose eight neighbours 0, 1, ... 8, all
    side by side, are at least as bright, and the share of all other pixels.
    """
    circle = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    shares: list[float] = []
    for far in (1, 2, 4):
        inner = slice(far, -far)
        shifted = [np.roll(x, (-far * down, -far * right), (0, 1)) for down, right in circle]
        bright = np.stack([each[inner, inner] >= x[inner, inner] for each in shifted])
        changes = (bright != np.roll(bright, 1, 0)).sum(0)  # around the circle
        kinds = np.where(changes <= 2, bright.sum(0), 9)
        shares += (np.bincount(kinds.ravel(), minlength=10) / kinds.size).tolist()
    return np.array(shares)


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


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "lists":
        write_lists(*map(Path, words))
    elif what == "versus":
        for pair in zip(words[2::2], words[3::2], strict=True):
            print_versus(Path(words[0]), words[1], pair)
    elif what == "texture":
        write_texture(Path(words[0]), words[1])
    else:
        for each in words[1:] or ("64", "128"):
            print_table(Path(words[0]), each)
