"""From saved results to tables, tests, plots and one page. Reads files only: no torch, no training.

    python analyze.py results/                             # report/index.html, and runs/'s curves
    python analyze.py results/demo --runs runs/demo --out report/demo

In: the JSON of probe.py and segment.py (schema 1), with NAME-cam.png and NAME-maps.png beside
NAME.json; the NPZ files of probe.py --embed; log.jsonl, config.json and views.png of pretrain.py.
Out: index.html (self-contained), tables.md, tables.csv, tables.tex, tests.csv and figures as PNG
and SVG; files of these names are replaced, others are left alone.

A value is the mean over seeds ± its 95 % t-interval; what is missing is a dash. Where seeds redraw
the split, their test and training images overlap from seed to seed: the interval and the tests over
seeds are widened as Nadeau and Bengio (2003) have it. What cannot be read is named on stderr and
left out; the exit status is then 1.
"""

import argparse
import base64
import csv
import html
import io
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

# ---------------------------------------------------------------------------- settings

ALPHA = 0.05
DASH = "–"
SHOWN = {"probe": {"f1_macro": "F1"}, "segment": {"miou": "mIoU", "aa": "AA"}}
# Results that differ in a field of SECTION are never compared; TABLE parts a section into tables.
SECTION = ("stage", "dataset", "synthetic", "data", "split", "subset", "size", "classes", "head")
TABLE = ("channels", "train_images")
DATA = "files images parts places ignored nodata".split()  # in config: what was learnt and judged
# In config: what changes with the seed, or says nothing of how the weights were used
NOT_SETTINGS = {*DATA, *(
    "identity task learning_rate l2_penalty neighbours optimiser mean std train test validated "
    "encoder unseen_bands device losses cached root train_images validation").split()}  # fmt: skip
USAGE = {  # told of every row where rows of a section differ in it
    "probe": ("bn", "stats", "epochs", "bf16"),
    "segment": ("stats", "epochs", "batch", "bf16"),
}
# flags of pretrain.py that say where, how fast and until when, not how
IDLE_FLAGS = "seed out resume threads device log-every checkpoint-every epochs max-steps".split()
DATASETS = {
    "eurosat": "EuroSAT", "eurosat-rgb": "EuroSAT RGB (JPEG)", "sen12ms": "SEN12MS",
    "resisc45": "RESISC45", "dfc2020": "DFC2020",
}  # fmt: skip
SHORT_NAMES = {"Random init": "random", "Scratch supervised": "scratch"}
OTHERS = [  # weights that are not ours, in the tables' order
    "random", "stats", "scratch", "ImageNet supervised", "MS-COCO DeepLabV3", "BYOL ImageNet",
    "SeCo",
]  # fmt: skip
DRAWN = ("random", "scratch")  # new weights for each seed

# ---------------------------------------------------------------------------- the paper

BANDS = "Blue Green Red RE5 RE6 RE7 NIR NNIR SWIR1 SWIR2 SAR1 SAR2".split()
TRIPLES = {
    ("Red", "Green", "Blue"): "RGB",
    ("RE5", "RE6", "RE7"): "RE5,6,7",
    ("SAR1", "SAR2", "SAR1"): "SAR1,2,1",
}
# Table I: DFC2020, one channel, in %: a value for each of BANDS, then the paper's own mean.
PAPER_I = {
    "RS-BYOL-1 miou": "54.8 57.7 57.8 58.3 54.5 56.6 57.6 55.5 58.1 58.5 57.2 57.2 56.98",
    "RS-BYOL-1 aa": "68.0 72.2 70.7 72.1 68.2 69.7 70.8 68.4 71.4 72.3 70.1 70.5 70.38",
    "RS-BYOL-1 w/150K miou": "54.3 58.6 57.6 57.6 56.4 56.6 57.6 55.3 57.6 57.9 57.5 57.5 57.05",
    "RS-BYOL-1 w/150K aa": "71.0 72.1 73.0 70.7 69.8 69.6 71.2 67.9 70.6 71.5 71.2 71.8 70.87",
    "RS-BYOL-1 w/64BS miou": "57.7 59.6 58.8 59.1 57.5 54.8 56.0 56.5 59.2 58.4 58.3 57.8 57.81",
    "RS-BYOL-1 w/64BS aa": "72.0 72.7 72.5 73.1 71.3 68.0 69.6 69.6 72.4 72.0 70.9 71.2 71.27",
}
# Table II: classification F1, three channels. The header of a last column is lost in our copy of
# the paper, so that column is left out. Columns: (data set, subset, bands).
WHOLE = "all images"
IMAGES = {"eurosat": 27000, "resisc45": 31500}  # all of them
PAPER_II_COLUMNS = [
    ("eurosat", "subset 7000", "RGB"), ("eurosat", "subset 7000", "RE5,6,7"),
    ("eurosat", WHOLE, "RGB"), ("eurosat", WHOLE, "RE5,6,7"),
    ("sen12ms", "subset 5000", "RGB"), ("sen12ms", "subset 5000", "RE5,6,7"),
    ("sen12ms", "subset 5000", "SAR1,2,1"), ("resisc45", WHOLE, "RGB"),
]  # fmt: skip
PAPER_II = {
    "scratch": "0.80 0.86 0.92 0.91 0.66 0.69 0.52 0.91",
    "random": "0.46 0.44 0.50 0.45 0.40 0.49 0.27 0.36",
    "ImageNet supervised": "0.88 0.87 0.91 0.88 0.77 0.77 0.64 0.90",
    "BYOL ImageNet": "0.88 0.83 0.89 0.87 0.78 0.78 0.66 0.90",
    "SeCo": "0.90 0.85 0.92 0.88 0.81 0.80 0.68 0.88",
    "RS-BYOL-3 RGB-S1S2": "0.84 0.80 0.86 0.81 0.65 0.62 0.53 0.68",
    "RS-BYOL-3 S1S2": "0.88 0.88 0.90 0.90 0.82 0.81 0.83 0.86",
}
# Table III: DFC2020, three channels, in %. Our copy says RS-BYOL-3 without the variant, taken to be
# S1S2; which column is SeCo's is inferred.
PAPER_III = {
    "RS-BYOL-3 S1S2 miou": "51.6 51.3 51.6", "RS-BYOL-3 S1S2 aa": "66.9 65.8 65.5",
    "SeCo miou": "50.2 50.5 45.0", "SeCo aa": "64.8 64.8 60.9",
}  # fmt: skip
PAPER_TABLES = {("segment", 1): "I", ("probe", 3): "II", ("segment", 3): "III"}  # stage, channels

# ---------------------------------------------------------------------------- reading


def fail(status: int, message: str) -> NoReturn:
    """End with one line on stderr: status 2 for wrong use, 1 for bad data."""
    print(clean(f"{Path(sys.argv[0]).name}: error: {message}"), file=sys.stderr)
    raise SystemExit(status)


def clean(value: object) -> str:
    """Any value as text for terminal, SVG and table: one line; U+FFFD for what is not printable."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


@contextmanager
def surviving(faults: list[str], what: str) -> Iterator[None]:
    """Turn an exception inside into a line of `faults`, so that one bad input costs no report."""
    try:
        yield
    except Exception as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:200]
        faults.append(f"{what}: {type(error).__name__}: {why}")


def recipe_of(about: dict[str, str]) -> tuple[str, ...]:
    """How pretrain.py made an encoder: its command's flags in any order, but IDLE_FLAGS; the script
    and the list of pairs, by their digests."""
    if "command" not in about:
        return ()
    script, *flags = about["command"].split(" --")
    flags = sorted(flag.replace("=", " ", 1).strip() for flag in flags)
    idle = IDLE_FLAGS + ["root", "pairs", "exclude"] * bool(about.get("archive"))
    kept = [f"--{flag}" for flag in flags if flag.split(" ")[0] not in idle]
    kept += [f"{key} {about[key]}" for key in ("code", "archive") if about.get(key)]
    return (Path(script).name, *kept)


def share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{value} is no number from 0 to 1")
    return float(value)


class Result:
    """A result file of probe.py or segment.py, its words `clean`; another file raises an error."""

    def __init__(self, path: Path) -> None:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["schema"] != 1:
            raise ValueError(f"schema {saved['schema']} is unknown: this reads schema 1")
        stage, config, weights, bands = (saved[k] for k in ("stage", "config", "weights", "bands"))
        words = [stage, saved["dataset"], saved["split"], weights["name"], *bands]
        if not all(isinstance(word, str) for word in words) or stage not in SHOWN:
            raise ValueError("stage, data set, split, weights or bands are not what they can be")
        name, labels = clean(weights["name"]), config.get("train_images")
        about = config.get("encoder") or {}  # the metadata that pretrain.py wrote into the weights

        self.path, self.config, self.stage = path, config, stage
        self.script = clean(saved.get("versions", {}).get("script"))  # its digest
        self.dataset, self.split = clean(saved["dataset"]), clean(saved["split"])
        subset = saved.get("subset")
        self.subset = WHOLE if subset is None else f"subset {int(subset)}"
        self.train_images = None if labels is None else int(labels)  # None: not limited
        self.size, self.head = clean(config.get("size")), clean(config.get("head"))
        self.classes = tuple(map(clean, config["classes"]))
        used = json.dumps([config.get(key) for key in DATA], sort_keys=True)
        self.data = sha256(used.encode()).hexdigest()[:8]
        self.synthetic = config.get("synthetic") is True
        self.channels, self.seed = len(bands), int(saved["seed"])
        self.bands = TRIPLES.get(tuple(bands), clean("+".join(bands)))  # "RE5", "RGB"
        self.metrics = {key: share(saved["metrics"][key]) for key in SHOWN[stage]}
        per_class = saved["metrics"].get("iou_per_class") or {}
        self.scored = len(saved["metrics"].get("classes") or self.classes)  # that the truth holds
        self.per_class = {clean(k): share(v) for k, v in per_class.items() if v is not None}
        self.overlap = 0.0  # where seeds redraw the test set: test images for each other image
        if self.split == "random" or (stage == "probe" and subset):
            self.overlap = 0.25 if labels else config["test"] / config["train"]

        self.name = SHORT_NAMES.get(name, name)
        known = self.name.removesuffix(" fine-tuned") in OTHERS
        self.ours = not known and not self.name.startswith("other ")  # that: any ResNet's
        source = Path(clean(weights.get("source")))  # in short: "run", "run/encoder-epoch0070"
        place = f"{source.parent.name}/{source.stem}".removesuffix("/encoder").strip("/")
        self.file = "" if self.name in DRAWN else clean(weights.get("sha256"))
        self.place = place or self.file[:8]
        self.finetuned = config.get("finetune") is True
        self.recipe = recipe_of(about)
        self.pretraining = clean(about.get("seed"))
        self.epoch = float(about.get("epoch", "0"))  # of the pre-training
        self.synthetic_tiles = about.get("synthetic") == "true"  # it was pre-trained on these
        self.label = ""  # of its row in a table; see label_rows
        self.usage: tuple[str, ...] = ()  # the part of it that says how the weights were used
        self.judged = True  # False: another epoch of its pre-training is; see judge_encoders

    def setting(self, key: str) -> str:
        """One of config in a word; "" where it does not apply."""
        text = "" if (key, self.name) == ("bn", "scratch") else clean(self.config.get(key))
        return text if len(text) <= 24 else sha256(text.encode()).hexdigest()[:8]


LOGGED = {  # in log.jsonl: how the figure names it
    "loss": "loss", "cosine": "cosine of positives", "std": "std of the projection",
    "match": "match (0 best, 0.5 chance)",
}  # fmt: skip


class Run:
    """A folder of pretrain.py; `log`: its log as columns, NaN where a line lacks the value."""

    def __init__(self, log: Path) -> None:
        config = json.loads(log.with_name("config.json").read_text(encoding="utf-8"))
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        steps = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
        if not steps:
            raise ValueError("no line in it yet")
        self.folder, self.name = log.parent, clean(str(log.parent))
        self.synthetic = config["pairs"]["synthetic"] is True
        self.log = {key: np.array([step.get(key) for step in steps], float)
                    for key in ("step", *LOGGED)}  # fmt: skip


# ---------------------------------------------------------------------------- what is compared


def groups(results: Iterable[Result], *fields: str) -> dict[tuple, list[Result]]:
    """Results by the values of some fields, in the order in which they come."""
    found: dict[tuple, list[Result]] = {}
    for result in results:
        found.setdefault(tuple(getattr(result, f) for f in fields), []).append(result)
    return found


def label_rows(results: list[Result]) -> None:
    """Set `label` of one section's results: the name, and what tells rows of one name apart."""
    places = {r.file: r.place for r in results if r.file}
    usage = USAGE[results[0].stage]
    common = {key for key in usage if len({r.setting(key) for r in results} - {""}) > 1}
    for alike in groups(results, "name", "channels").values():
        keys = {key for r in alike for key in r.config} - NOT_SETTINGS
        apart = common | {key for key in keys if len({r.setting(key) for r in alike}) > 1}
        for r in alike:
            r.usage = tuple(f"{key} {r.setting(key)}" for key in sorted(apart) if r.setting(key))
            r.usage += ("synthetic tiles",) * r.synthetic_tiles
            place = [places[r.file]] if r.file and len({s.file for s in alike}) > 1 else []
            if place and list(places.values()).count(*place) > 1:  # two folders, or lengths, alike
                place = [f"epoch {r.epoch:.4g}"] * (r.epoch > 0) + [r.file[:8]]
            r.label = named(r.name, [*place, *r.usage])


def without_copies(results: list[Result], faults: list[str]) -> list[Result]:
    """Drop second copies of a run: equal in all that determines it, which `identity` digests;
    where a file has none, in every setting. Others of one label get the file's name into it."""
    kept = []
    for found in groups(results, *TABLE, "label", "bands", "seed").values():
        runs: dict[str, Result] = {}
        for r in found:
            same = runs.setdefault(clean(r.config.get("identity") or r.config), r)
            if same is not r:
                but = ", with other numbers" * (r.metrics != same.metrics)
                faults.append(f"{r.path}: the same run as {same.path}{but}, which is kept")
            elif len(runs) > 1:
                r.label = named(r.label, [f"file {clean(r.path.stem)}"])
        kept += runs.values()
    return kept


def named(name: str, details: list[str]) -> str:
    return f"{name} ({', '.join(details)})" if details else name


def judge_encoders(results: list[Result], faults: list[str]) -> list[tuple]:
    """Set `judged` of a table's results: one encoder of each pre-training is compared with others.

    A recipe is the same flags but the seed's, probed in the same way. Its epoch is the latest that
    three pre-trainings have here; its details and a result of each are returned. Of other encoders
    the latest of each pre-training is judged.
    """
    recipes = []
    for (flags, _, usage), found in groups(results, "recipe", "name", "usage").items():
        if not flags:
            continue
        by_length = sorted(found[::-1], key=lambda r: -len(r.place))
        encoders = {(r.pretraining, r.epoch): r for r in by_length}  # the shortest place's stays
        epochs = [epoch for _, epoch in encoders]
        several = [epoch for epoch in epochs if epochs.count(epoch) >= 3]
        chosen = [r for (seed, epoch), r in encoders.items()
                  if epoch == max(several or [e for s, e in encoders if s == seed])]  # fmt: skip
        for r in found:
            kept = encoders[r.pretraining, r.epoch]
            r.judged = kept in chosen and r.file == kept.file
            line = f"{r.place}: the same command, seed and epoch as {kept.place}, which is tested"
            if kept in chosen and not r.judged and line not in faults:
                faults.append(line)
        if several:
            recipes.append(((*flags, f"epoch {max(several):g}", *usage), chosen))
    return recipes


# ---------------------------------------------------------------------------- tests


@dataclass
class Test:
    """A test of a - b; low and high are the 95 % interval, *_holm corrected for its family."""

    kind: str  # over bands, over seeds, over pre-trainings
    family: str  # against random, against stats, others: corrected apart
    metric: str
    a: str
    b: str
    method: str = ""
    bands: str = ""  # that both have
    n: str = ""
    difference: float = math.nan
    error: float = math.nan  # standard error of the difference
    low: float = math.nan
    high: float = math.nan
    t: float = math.nan
    df: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    low_holm: float = math.nan
    high_holm: float = math.nan
    d: float = math.nan  # Cohen's d_z; between two recipes d, by the mean of their variances
    effect: str = ""  # which of the two
    note: str = ""  # why it is not tested

    def interval(self, alpha: float) -> tuple[float, float]:
        """Of the difference: it leaves out 0 where p < alpha, and only there."""
        return stats.t.interval(1 - alpha, self.df, self.difference, self.error)


Part = tuple[np.ndarray, float]  # one source of chance: means by seed, say; and their overlap


def standard_error(parts: list[Part]) -> tuple[float, float]:
    """Of a mean with several sources of chance, such as seeds and pre-trainings: their variances
    add up. And its degrees of freedom, by Welch and Satterthwaite. NaN where one has one value.

    overlap: test images for each image that is none, where the values come from random splits of
    one data set, else 0: the variance of the mean is taken as (1/J + overlap) times the values'
    (Nadeau and Bengio, Inference for the generalization error, 2003). Few labels are drawn from
    all that are no test images, so that their number does not enter.
    """
    if min(len(x) for x, _ in parts) < 2:
        return math.nan, math.nan
    shares = np.array([(1 / len(x) + overlap) * x.var(ddof=1) for x, overlap in parts])
    error = math.sqrt(shares.sum())
    if error < 1e-12:
        return 0.0, 1.0
    shares /= shares.sum()
    return error, float(1 / sum(shares**2 / [len(x) - 1 for x, _ in parts]))


def t_test(test: Test, difference: float, parts: list[Part]) -> Test:
    """A t-test that a difference is 0. With fewer than three values of a part it errs too often, so
    it is not made. parts: as in `standard_error`, the seeds or bands last."""
    test.difference, test.n = float(difference), " and ".join(str(len(x)) for x, _ in parts)
    test.effect = "d" if len(parts) > 2 else "d_z"
    if min(len(x) for x, _ in parts) < 3:
        test.note = f"fewer than three values {test.kind}" + " or seeds" * (len(parts) > 1)
        return test
    test.error, test.df = standard_error(parts)
    if not test.error:
        test.note = "no spread"
        return test
    test.t = test.difference / test.error
    test.p = float(2 * stats.t.sf(abs(test.t), test.df))
    test.low, test.high = test.interval(ALPHA)
    test.d = test.difference / np.mean([x.var(ddof=1) for x, _ in parts[:-1] or parts]) ** 0.5
    return test


def t_test_over_seeds(test: Test, ours: np.ndarray, other: np.ndarray, overlap: float) -> Test:
    """Of scores [pre-trainings, seeds], one or several pre-trainings on each side. By chance vary
    the pre-trainings of a recipe, and always the seeds: the splits are the same for all
    pre-trainings, so that their luck is not averaged out over them."""
    gaps = ours.mean(0) - other.mean(0)
    recipes = [(side.mean(1), 0) for side in (ours, other) if len(side) > 1]
    test.method = "paired t-test over seeds"
    if recipes:
        test.method = "Welch's t-test over pre-trainings and seeds"
    test.method += ", variance by Nadeau and Bengio" * (overlap > 0)
    return t_test(test, gaps.mean(), [*recipes, (gaps, overlap)])


def correct(tests: list[Test]) -> None:
    """Holm's correction (1979) of one family: p_holm, and the interval that agrees with it.

    Holm multiplies p by a number; the interval is the one at 1 - ALPHA / that number.
    """
    tested = sorted((test for test in tests if test.p == test.p), key=lambda test: test.p)
    largest = 0.0
    for rank, test in enumerate(tested):
        factor = max(len(tested) - rank, largest / (test.p or 1))
        largest = factor * test.p
        test.p_holm = min(1.0, largest)
        test.low_holm, test.high_holm = test.interval(ALPHA / factor)


Values = dict[tuple[str, str], dict[int, float]]  # (row, bands) -> seed -> one metric


def matched(
    values: Values, rows: list[str], bands: list[str], seeds_first: bool = False
) -> tuple[list[str], np.ndarray]:
    """Those of `bands` that all rows have, and float [rows, bands, seeds] over their common seeds;
    seeds_first: only the bands with most seeds."""
    seeds = {
        band: set.intersection(*(set(values.get((row, band), ())) for row in rows))
        for band in bands
    }
    most = max(map(len, seeds.values()), default=0)
    both = [band for band in bands if len(seeds[band]) >= (most if seeds_first else 1) > 0]
    common = sorted(set.intersection(*(seeds[band] for band in both))) if both else []
    x = [[[values[row, band][seed] for seed in common] for band in both] for row in rows]
    return both, np.array(x, float).reshape(len(rows), len(both), len(common))


def compare(
    values: Values, test: Test, a: list[str], b: list[str], bands: list[str], overlap: float = 0.0
) -> Test:
    """Fill in a test from what its rows have in common; overlap: as in `standard_error`.

    a, b: one row, or the pre-trainings of a recipe.
    """
    both, x = matched(values, a + b, bands, test.kind != "over bands")
    if not x.size:
        test.note = "no band and seed in common"
        return test
    test.bands = " ".join(both)
    if test.kind == "over bands":
        test.method, gaps = "paired t-test over bands", np.subtract(*x.mean(2))
        return t_test(test, gaps.mean(), [(gaps, 0)])
    x = x.mean(1)  # [pre-trainings, seeds]
    return t_test_over_seeds(test, x[: len(a)], x[len(a) :], overlap)


# ---------------------------------------------------------------------------- tables


class Table:
    """Rows of one section with as many channels: their cells, their tests, how they are shown."""

    def __init__(self, number: int, title: str, results: list[Result],
                 recipes: dict[str, list[str]]) -> None:  # fmt: skip
        self.number, self.title, self.results = number, title, results
        self.stage, self.channels = results[0].stage, results[0].channels
        self.metric = next(iter(SHOWN[self.stage].values()))  # the one of verdicts and figures
        self.form = ".1f" if self.stage == "segment" else ".3f"
        self.recipes = recipes  # row: the rows of its pre-trainings
        names = {r.label: r.name for r in results} | {row: self.first(row).name for row in recipes}
        order = [*OTHERS, *sorted(names.values())]
        self.rows = sorted(names, key=lambda r: (order.index(names[r]), r not in self.recipes, r))
        bands = {r.bands for r in results}
        order = [*BANDS, *TRIPLES.values(), *sorted(bands)]
        self.bands = sorted(bands, key=order.index)
        self.columns = self.bands + ["mean"] * (self.channels == 1 and len(self.bands) > 1)
        self.values: dict[str, Values] = {}
        self.cells, self.tests = [], []
        scale, runs = 100 if self.stage == "segment" else 1, groups(results, "label", "bands")
        for metric, shown in SHOWN[self.stage].items():
            self.values[shown] = {key: {r.seed: scale * r.metrics[metric] for r in its}
                                  for key, its in runs.items()}  # fmt: skip
            for row, column in itertools.product(self.rows, self.columns):
                n, mean, half = self.mean(row, shown, self.bands if column == "mean" else [column])
                self.cells.append(SimpleNamespace(  # a column of tables.csv each
                    weights=row, bands=column, metric=shown, n=n,
                    over="pre-trainings" if row in self.recipes else "seeds", mean=mean,
                    half_width_95=half, paper=paper_value(self.first(row), metric, column)
                    if column != "mean" or self.bands == BANDS else "",
                ))  # fmt: skip
            self.tests += make_tests(self, shown)
        paper = PAPER_TABLES.get((self.stage, self.channels))
        like = f" (as the paper's Table {paper})" * any(cell.paper for cell in self.cells)
        self.caption = f"Table {number}{like}. {title}"

    def of(self, row: str) -> list[Result]:
        return [r for r in self.results if r.label in self.recipes.get(row, [row])]

    def first(self, row: str) -> Result:
        return self.of(row)[0]

    def shown(self) -> list[str]:
        """Rows for figures: recipes for their pre-trainings, the latest encoder of each."""
        members = list(itertools.chain(*self.recipes.values()))
        return [row for row in self.rows if row not in members and self.first(row).judged]

    def mean(self, row: str, metric: str, bands: list[str]) -> tuple[int, float, float]:
        """Number, mean and half width of a row's means over `bands`: one for each seed, or for each
        pre-training of a recipe. None where the row lacks one of the bands."""
        held, x = matched(self.values[metric], self.recipes.get(row, [row]), bands)
        if len(held) < len(bands) or not x.size:
            return 0, math.nan, math.nan
        x = x.mean(1)  # [pre-trainings, seeds]
        parts = [(x.mean(1), 0)] * (row in self.recipes) + [(x.mean(0), self.first(row).overlap)]
        error, df = standard_error(parts)
        return len(parts[0][0]), float(x.mean()), float(stats.t.ppf(1 - ALPHA / 2, df) * error)


def paper_value(r: Result, metric: str, column: str) -> str:
    """The paper's figure for one cell, as printed there; "" where it has none.

    Only for the paper's data, network and head: DFC2020 with 8 classes and 900 tiles to learn from,
    EuroSAT whole or 7000, SEN12MS 5000, RESISC45 whole; ResNet-50.
    """
    finetuned = r.finetuned and r.name != "scratch"
    other = r.head in ("linear", "knn") or r.train_images or finetuned
    if other or r.synthetic or r.synthetic_tiles or r.config.get("arch") != "resnet50":
        return ""
    if r.subset == WHOLE and r.config["train"] + r.config["test"] < IMAGES.get(r.dataset, 0):
        return ""
    place, row = (r.dataset, r.subset, column), f"{r.name} {metric}"
    if r.stage == "probe" and r.name in PAPER_II and place in PAPER_II_COLUMNS:
        return PAPER_II[r.name].split()[PAPER_II_COLUMNS.index(place)]
    if (r.dataset, r.subset, len(r.classes)) == ("dfc2020", "subset 900", 8):
        for paper, columns in ((PAPER_I, [*BANDS, "mean"]), (PAPER_III, [*TRIPLES.values()])):
            if row in paper and column in columns:
                return paper[row].split()[columns.index(column)]
    return ""


def data_name(r: Result) -> str:
    """The data set; of a user's own data, where they lie."""
    root = "/".join(Path(clean(r.config.get("root"))).parts[-2:])
    return DATASETS.get(r.dataset) or f"{r.dataset} {root}".strip()


def section_title(r: Result, sections: list[Result]) -> str:
    """The data set and all its settings in one line."""
    name = data_name(r)
    alike = [s for s in sections if (data_name(s), s.stage) == (name, r.stage)]
    twins, lists = {s.data for s in alike}, {s.classes for s in alike}
    classes = f"{len(r.classes)} classes"
    if len({len(names) for names in lists}) < len(lists):  # their number tells no sections apart
        classes += f" ({', '.join(r.classes)})"
    parts = [
        name + " (SYNTHETIC images)" * r.synthetic, "land cover maps" * (r.stage == "segment"),
        r.subset, f"split {r.split}", f"{r.size} px" if r.size else "", classes, r.head,
        f"{r.data} (other or newer files, labels, split, band order or nodata)" * (len(twins) > 1),
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def build_tables(results: list[Result], faults: list[str]) -> list[list[Table]]:
    """Sort results into sections, and each section into tables: of most labels first."""
    found = list(groups(results, *SECTION).values())
    titled = [(section_title(section[0], [s[0] for s in found]), section) for section in found]
    sections: list[list[Table]] = []
    number = itertools.count(1)
    for title, section in sorted(titled, key=lambda t: (t[1][0].stage, t[1][0].dataset, t[0])):
        label_rows(section)
        by_table = groups(without_copies(section, faults), *TABLE)
        recipes = {key: judge_encoders(its, faults) for key, its in by_table.items()}
        details = [set(detail) for its in recipes.values() for detail, _ in its]
        common = set.intersection(*details) if details else set()  # it needs no saying
        sections.append([])
        for key in sorted(by_table, key=lambda key: (-(key[1] or math.inf), key[0])):
            about = f"{title}; {key[1]} labelled images to learn from" if key[1] else title
            rows = {}  # the label of a recipe: those of its encoders
            for detail, members in recipes[key]:
                apart = [d for d in detail if d not in common or d in members[0].usage]
                row = named(members[0].name, [f"{len(members)} pre-trainings", *apart])
                rows[row] = [r.label for r in members]
            sections[-1].append(Table(next(number), about, by_table[key], rows))
    return sections


def make_tests(table: Table, metric: str) -> list[Test]:
    """Every pair of judged rows over bands and over seeds, every recipe over its pre-trainings."""
    kept = {row: table.first(row) for row in table.rows if table.first(row).judged}
    families: dict[tuple, list[Test]] = {}
    for a, b in itertools.combinations(kept, 2):
        if kept[b].ours and not kept[a].ours:
            a, b = b, a  # ours less the other
        if kept[b].ours and (a in table.recipes) != (b in table.recipes):
            continue  # a recipe is not compared with one encoder
        floor = kept[a].ours and kept[b].name in ("random", "stats", "scratch")
        family = f"against {kept[b].name}" if floor else "others"
        kinds = ["over seeds"] + ["over bands"] * (len(table.bands) > 2)
        for kind in ["over pre-trainings"] if a in table.recipes else kinds:
            test = Test(kind, family, metric, a, b)
            families.setdefault((kind, family), []).append(test)
            if kept[a].config.get("task") == kept[b].config.get("task"):
                members = [table.recipes.get(row, [row]) for row in (a, b)]
                compare(table.values[metric], test, *members, table.bands, kept[b].overlap)
            else:
                test.note = "probed with other settings"
    for family in families.values():
        correct(family)
    return list(itertools.chain(*families.values()))


# ---------------------------------------------------------------------------- what is said


def fixed(value: float, form: str) -> str:
    return DASH if math.isnan(value) else format(value, form)


def listed(bands: list[str]) -> str:
    return ", ".join(bands) if len(bands) < 4 else f"{len(bands)} bands"


def clause(test: Test, form: str) -> str:
    """What a test says of its a, without its name: "beats random by 0.05 F1 on Red (...)"."""
    gap = f"{test.difference:+{form}} {test.metric} on {listed(test.bands.split())}"
    if math.isnan(test.p):
        return f"is not tested against {test.b} ({f'{gap}; ' * bool(test.bands)}{test.note})"
    p = f"= {test.p_holm:.4f}" if test.p_holm >= 0.0001 else "< 0.0001"
    evidence = f"({test.low_holm:+{form}} to {test.high_holm:+{form}}, p {p})"
    if test.p_holm >= ALPHA:
        return f"does not differ significantly from {test.b}: {gap} {evidence}"
    return f"{'beats' if test.difference > 0 else 'is below'} {test.b} by {gap[1:]} {evidence}"


def judge(table: Table, row: str) -> list[Test]:
    """The tests that speak of one row: against random weights, and against the floor.

    Over seeds or pre-trainings: one random encoder on many bands says nothing of others. Of random
    weights used in several ways (--bn) those of the same architecture count, and of these the best
    on most bands in common.
    """
    arch, found = table.first(row).config.get("arch"), []
    for floor in ("scratch" if table.first(row).finetuned else "random", "stats"):
        tests = [t for t in table.tests
                 if (t.a, t.metric) == (row, table.metric) and t.kind != "over bands"
                 and table.first(t.b).name == floor
                 and table.first(t.b).config.get("arch") in (arch, None)]  # fmt: skip
        found += sorted(tests, key=lambda t: (
            -len(t.bands.split()), math.isnan(t.p), t.difference,
        ))[:1]  # fmt: skip
    return found


def main_of(tables: list[Table]) -> list[Table]:
    """The tables of a section that learnt from most labels: of one channel, of three."""
    return [t for t in tables if t.results[0].train_images == tables[0].results[0].train_images]


def verdict(tables: list[Table]) -> str:
    """A section in a few sentences: recipes first, then single encoders, at the most labels."""
    rows = [(t, row) for t in main_of(tables) for row in t.shown() if t.first(row).ours]
    rows.sort(key=lambda entry: entry[1] not in entry[0].recipes)
    if not rows:
        return "No encoder of pretrain.py, so no verdict."
    clauses, methods = [], []
    for table, row in rows[:3]:
        tests = judge(table, row)
        who = row if row in table.recipes else f"This encoder, {row},"
        said = " and ".join(clause(test, table.form) for test in tests)
        clauses.append(f"{who} {said or 'stands beside no random encoder of its kind'}.")
        methods += [f"{t.method}, n = {t.n}" for t in tests if t.p == t.p]
    text = " ".join(clauses) + f" {len(rows) - 3} more in the tests below." * (len(rows) > 3)
    if methods := "; ".join(dict.fromkeys(methods)):
        alone = not any(table.first(row).overlap for table, row in rows)
        where = " for this one test set, not for other images" * alone
        text += f" In brackets: 95 % interval and p after Holm{where} ({methods})."
    if any(row not in table.recipes for table, row in rows):
        text += (" One encoder does not speak for its recipe: that takes three pre-trainings, "
                 "probed at the same epoch.")  # fmt: skip
    return text


def notes(table: Table) -> str:
    """What a reader of the table must know, a sentence each."""
    unit = "mIoU and AA in %" if table.stage == "segment" else "Macro F1"
    counts = sorted({c.n for c in table.cells if c.n and c.over == "seeds"})
    seeds = f"{' to '.join(map(str, counts[:1] + counts[1:][-1:]))} seed{'s' * (counts != [1])}"
    split = "on a fixed test set: seeds redraw the head, random weights and what is learnt from"
    if any(r.overlap for r in table.results):
        split = "widened by Nadeau and Bengio's correction for random splits that overlap"
    interval = "mean ± 95 % t-interval"
    said = [f"{unit}, {interval} over {seeds} (of a recipe: and pre-trainings), {split}."]
    scored = sorted({r.scored for r in table.results})
    if len(scored) > 1:
        least, most = scored[0], scored[-1]
        said.append(f"A result's mean is over the {least} to {most} classes in its test set.")
    held = {(cell.weights, cell.n) for cell in table.cells if cell.n and cell.bands != "mean"}
    if len(held) > len({row for row, _ in held}):  # more seeds of one band than of another
        said.append("Means of bands are over the seeds that all have, tests over the bands with "
                    "most seeds.")  # fmt: skip
    if len({r.epoch for r in table.results if r.recipe}) > 1 and table.recipes:
        epochs = sorted({table.first(row).epoch for row in table.recipes})
        said.append(f"Pre-trainings are judged at epoch {listed([f'{e:g}' for e in epochs])}.")
    if any(cell.paper for cell in table.cells):
        said.append("In brackets: the paper's figure.")
    return " ".join([*said, f"{DASH}: no result."])


# ---------------------------------------------------------------------------- text


def lines_of(table: Table, plain: Callable, paper: str) -> list[list[str]]:
    """A table as text, the header first; `plain` escapes, `paper` is the form of the paper's."""
    lines = [["weights", "", *map(plain, table.columns)]]
    for row, metric in itertools.product(table.rows, table.values):
        lines.append([plain(row), metric])
        for cell in (c for c in table.cells if (c.weights, c.metric) == (row, metric)):
            half = f" ± {cell.half_width_95:{table.form}}" * (cell.half_width_95 >= 0)
            text = plain(fixed(cell.mean, table.form) + half)
            lines[-1].append(text + paper.format(cell.paper) * bool(cell.paper))
    return lines


def plain_markdown(text: str) -> str:
    return "".join("\\" + c if c in "\\|*_<>[]`#" else c for c in text)


def plain_latex(text: str) -> str:
    """Text as LaTeX that pdflatex sets with no package; what it cannot set becomes "?"."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               "±": r"$\pm$", DASH: "--", "<": "$<$", ">": "$>$"}  # fmt: skip
    special |= {c: "\\" + c for c in "&%$#_{}"}
    return "".join(special.get(c, c if c.isascii() else "?") for c in text)


def tables_markdown(sections: list[list[Table]]) -> str:
    parts = []
    for tables in sections:
        parts.append(plain_markdown(f"{tables[0].title}: {verdict(tables)}"))
        for table in tables:
            header, *lines = lines_of(table, plain_markdown, " ({})")
            lines = [header, ["---"] * len(header), *lines]
            parts += [f"## {plain_markdown(table.caption)}",
                      "\n".join(f"| {' | '.join(line)} |" for line in lines),
                      plain_markdown(notes(table))]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def tables_latex(tables: list[Table]) -> str:
    r"""One table environment for each table; needs \usepackage{booktabs,graphicx}."""
    parts = ["% Written by analyze.py. Needs \\usepackage{booktabs,graphicx}.\n"]
    for table in tables:
        title = plain_latex(f"{table.title}: mean ± 95 % interval (in brackets: the paper's).")
        lines = lines_of(table, plain_latex, " ({})")
        header, *body = [" & ".join(line) + r" \\" for line in lines]
        parts += [
            r"\begin{table*}", r"\centering", rf"\caption{{{title}}}",
            rf"\label{{tab:rsbyol-{table.number}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{ll{'r' * len(table.columns)}}}", r"\toprule", header,
            r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", "",
        ]  # fmt: skip
    return "\n".join(parts)


def tables_csv(tables: list[Table], what: str) -> str:
    """The "cells" or "tests" of all tables, each row led by its section's settings.

    Missing is a dash (pandas: na_values="-"); no cell is a spreadsheet's formula.
    """
    rows = []
    for table in tables:
        about = {key: getattr(table.results[0], key) for key in (*SECTION, *TABLE)}
        about |= {"table": table.number, "classes": len(about["classes"])}
        rows += [about | vars(entry) for entry in getattr(table, what)]
    for line in rows:
        for key, value in line.items():
            if value in ("", None) or value != value:
                line[key] = "-"
            elif isinstance(value, str) and value[0] in "=+@-":
                line[key] = "'" + value
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------- plots

# Okabe and Ito's, for colour-blind readers
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
GREYS = ["#999999", "#dddddd", "#555555"]  # random weights, used in several ways
PLOTS = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "errorbar.capsize": 1.5,
    "lines.linewidth": 1, "lines.markersize": 3, "svg.hashsalt": "rs-byol",
    "text.parse_math": False,  # a name may hold dollars
}  # fmt: skip


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of `width` x `height` inches and its axes as a flat list."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def short(text: str) -> str:
    """A name that fits a figure; matplotlib leaves out of legends what begins with "_"."""
    text = f" {text}" if text[:1] in ("_", "") else text
    return text if len(text) <= 60 else f"{text[:35]}…{text[-24:]}"


def legend_below(figure, labelled: dict[str, Any]) -> None:
    """Artists by their labels under all axes; two columns of the longest fit 9 inches."""
    figure.legend(list(labelled.values()), [*map(short, labelled)], loc="outside lower center",
                  ncols=2)  # fmt: skip


def colours_of(names: dict[str, str]) -> dict[str, str]:
    """A colour for each row, given the names of its weights: greys for random ones, black for the
    floor, so that a row looks the same in all figures of a table."""
    rest = [row for row, name in names.items() if name not in ("random", "stats")]
    colours = {row: COLOURS[i % len(COLOURS)] for i, row in enumerate(rest)}
    random = [row for row, name in names.items() if name == "random"]
    colours |= {row: GREYS[i % len(GREYS)] for i, row in enumerate(random)}
    return dict.fromkeys(names, "black") | colours


def draw_bars(tables: list[Table]):
    """Every row and band of a section: a group for each band, a bar for each row.

    The floor `stats` is a line across its group. One channel and three have a panel each; past
    seven rows the next go to a further panel. Random weights stand in each.
    """
    names = {row: t.first(row).name for t in tables for row in t.shown()}
    colours, panels = colours_of(names), []
    for table in tables:
        drawn = [row for row in table.shown() if names[row] == "random"]
        rest = [row for row in table.shown() if names[row] not in ("random", "stats")]
        panels += [(table, drawn + rest[i : i + 7]) for i in range(0, max(1, len(rest)), 7)]
    figure, axes = new_figure(9, 2.4 * len(panels) + 0.1 * len(names) + 0.4, rows=len(panels))
    legend: dict[str, Any] = {}
    for axis, (table, part) in zip(axes, panels, strict=True):
        cells = [c for c in table.cells if c.n and c.metric == table.metric]
        width, highest = 0.85 / max(1, len(part)), max(cell.mean for cell in cells)
        for cell in cells:
            x, row = table.columns.index(cell.bands), cell.weights
            if names.get(row) == "stats":
                floor = axis.hlines(cell.mean, x - 0.45, x + 0.45, colors="black", ls="--")
                legend[f"{row} (the floor)"] = floor
            elif row in part:
                style = {"color": colours[row], "edgecolor": "black", "lw": 0.5}
                x += (part.index(row) - (len(part) - 1) / 2) * width
                legend[row] = axis.bar(x, cell.mean, width, yerr=cell.half_width_95, **style)
        space = max(0.6, 10 / (len(part) + 1) - len(table.columns) / 2)  # few bars stay narrow
        axis.set(xlim=(-space, len(table.columns) - 1 + space), ylim=(0, 1.15 * highest or 1),
                 ylabel=table.metric + " (%)" * (table.stage == "segment"))  # fmt: skip
        axis.set_xticks(range(len(table.columns)), table.columns)
    legend_below(figure, legend)
    return figure


Points = list[tuple[float, str, Table]]  # x, and whose value stands there: a row of a table


def draw_lines(table: Table, lines: dict[str, Points], xlabel: str, whiskers: bool):
    """The metric against x over those of table's bands that most lines have: random weights grey,
    in their interval, the floor dashed. None where no line has two points."""
    held = {line: {band for band in table.bands
                   if all(t.mean(row, t.metric, [band])[0] for _, row, t in points)}
            for line, points in lines.items() if len(points) > 1}  # fmt: skip
    times = {band: sum(band in its for its in held.values()) for band in table.bands}
    bands = [band for band in table.bands if times[band] == max(times.values()) > 0]
    if not bands:
        return None
    figure, (axis,) = new_figure(9, 3.4)
    legend: dict[str, Any] = {}
    means: list[float] = []
    drawn = {line: lines[line] for line in held if held[line].issuperset(bands)}
    names = {line: points[0][2].first(points[0][1]).name for line, points in drawn.items()}
    colours = colours_of(names)
    for line, points in drawn.items():
        values = sorted((x, *t.mean(row, t.metric, bands)[1:]) for x, row, t in points)
        x, y, half = np.nan_to_num(values).T
        legend[line] = axis.errorbar(
            x, y, half if whiskers else None, color=colours[line],
            ls="--" if names[line] == "stats" else "-", marker="o",
        )  # fmt: skip
        if names[line] == "random":
            axis.fill_between(x, y - half, y + half, color=colours[line], alpha=0.35)
        means += list(y)
    axis.set_ylim(max(0, min(means) - 0.15 * max(means)), 1.15 * max(means) or 1)
    where = "mean of " * (len(bands) > 1) + listed(bands)
    axis.set(xlabel=xlabel, ylabel=f"{table.metric}, {where}")
    legend_below(figure, legend)
    return figure


def draw_steps(table: Table):
    """F1 against the length of pre-training: a thin line for each that was probed at several."""
    trained = {r.label: r for r in table.results if r.recipe}.values()  # one of each row
    runs = groups(trained, "recipe", "pretraining", "name", "usage").values()
    several = [[(r.epoch, r.label, table) for r in run] for run in runs if len(run) > 1]
    lines = {max(points)[1]: points for points in several}
    if not lines:
        return None
    epochs = [epoch for points in lines.values() for epoch, _, _ in points]
    for row in table.rows:
        if table.first(row).name in ("random", "stats"):  # the same at every length
            lines[row] = [(min(epochs), row, table), (max(epochs), row, table)]
    return draw_lines(table, lines, "epochs of pre-training", False)


def draw_labels(tables: list[Table]):
    """F1 against the number of labelled images, a line for each row."""
    lines: dict[str, Points] = {}
    for table, row in ((t, row) for t in tables for row in t.shown()):
        x = table.results[0].train_images or table.results[0].config["train"]
        lines.setdefault(row, []).append((x, row, table))
    if figure := draw_lines(tables[0], lines, "labelled images to learn from", True):
        ticks = sorted({x for points in lines.values() for x, _, _ in points})
        figure.axes[0].set(xscale="log", xticks=ticks, xticklabels=ticks)
        figure.axes[0].minorticks_off()
    return figure


def draw_classes(table: Table):
    """Classes by bands: IoU in %, mean over seeds, a panel for each row."""
    rows = table.shown()
    names = list(dict.fromkeys(name for r in table.results for name in r.per_class))
    figure, axes = new_figure(max(4.5, 2 + 0.45 * len(table.bands)),
                              (0.9 + 0.2 * len(names)) * len(rows), rows=len(rows))  # fmt: skip
    for axis, row in zip(axes, rows, strict=True):
        values = np.full((len(names), len(table.bands)), np.nan)
        for i, j in np.ndindex(values.shape):
            found = [r.per_class.get(names[i], math.nan)
                     for r in table.of(row) if r.bands == table.bands[j]]  # fmt: skip
            if not np.isnan(found).all():
                values[i, j] = 100 * np.nanmean(found)
                axis.text(j, i, f"{values[i, j]:.0f}", fontsize=6, ha="center", va="center",
                          color="black" if values[i, j] > 50 else "white")  # fmt: skip
        axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(table.bands)), table.bands, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(f"{short(row)}: IoU (%)")
    return figure


def embed(path: Path) -> tuple[str, np.ndarray, np.ndarray, list[str]]:
    """Title, t-SNE [n, 2] and labels int [n] of at most 2,000 images by a fixed seed, class names.

    ValueError where it cannot be made, also of equal features: there scikit-learn's would crash.
    """
    from sklearn.manifold import TSNE  # two seconds, for this figure only

    with np.load(path, allow_pickle=False) as file:
        features = file["features"]
        labels = file["labels"] if "labels" in file else np.zeros(len(features), int)
        names = [str(name) for name in file["classes"]] if "classes" in file else [""]
        title = short(path.stem) + "\n(SYNTHETIC images)" * bool(file.get("synthetic", False))
    if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu" or len(labels) < 12:
        raise ValueError("it takes 12 images or more, and for each an integer label")
    kept = np.random.default_rng(0).permutation(len(labels))[:2000]
    features, labels = features[kept].astype(np.float64), labels[kept]
    features /= max(np.abs(features).max(), 1e-300)
    features -= features.mean(0)
    if (spread := np.abs(features).max()) < 1e-6:
        raise ValueError("all features are alike: a collapsed encoder?")
    tsne = TSNE(perplexity=min(30, len(labels) / 4), init="pca", random_state=0)
    return title, tsne.fit_transform(features / spread), labels, names


def draw_tsne(files: list[Path], faults: list[str]):
    """t-SNE of embeddings, a panel for each file, classes named at the medians of their points."""
    panels = []
    for path in files:
        with surviving(faults, f"{path}: no embeddings"):
            panels.append(embed(path))
    if not panels:
        return None
    figure, axes = new_figure(3.4 * len(panels), 3.6, columns=len(panels))
    for axis, (title, points, labels, names) in zip(axes, panels, strict=True):
        for index, c in enumerate(np.unique(labels).tolist()):
            mine, colour = points[labels == c], matplotlib.colormaps["tab20"].colors[index % 20]
            axis.scatter(*mine.T, 5, color=colour, linewidths=0, alpha=0.6)
            word = names[c] if 0 <= c < len(names) else str(c)
            axis.text(*np.median(mine, axis=0), word, fontsize=6, ha="center")
        axis.set_title(title)
        axis.set(xticks=[], yticks=[])
    return figure


def draw_runs(runs: list[Run]):
    """What pre-training logged, by step."""
    shown = [key for key in LOGGED if any(np.isfinite(run.log[key]).any() for run in runs)]
    rows = math.ceil(len(shown) / 2)
    figure, axes = new_figure(9, 2.1 * rows + 0.6 + 0.09 * len(runs), rows, columns=2)
    legend: dict[str, Any] = {}
    for axis, key in zip(axes, shown, strict=False):
        for index, run in enumerate(runs):
            there = np.isfinite(run.log[key])
            x, y = run.log["step"][there], run.log[key][there]
            style = {"color": COLOURS[index % 7], "ls": ["-", "--", "-."][index // 7 % 3]}
            (legend[run.name],) = axis.plot(x, y, marker="." * (len(x) < 40), **style)
        axis.set(xlabel="step", ylabel=LOGGED[key])
        axis.set_xlim(left=0)
        if key in ("std", "match"):
            axis.set_ylim(0, max(1.1 * axis.dataLim.y1, 0.55 * (key == "match")))
        if key == "match":
            axis.axhline(0.5, color="black", ls="--")  # chance
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    legend_below(figure, legend)
    return figure


# ---------------------------------------------------------------------------- page

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<link rel="icon" href="data:,"><title>RS-BYOL report</title><style>
:root{color-scheme:light dark}h1{font-size:1.5rem}
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:1rem;
overflow-wrap:anywhere}
h2{font-size:1.15rem;margin-top:2.5rem;border-top:1px solid #8885;padding-top:1rem}
.scroll{overflow-x:auto;margin:.5rem 0}table{border-collapse:collapse;font-size:.8rem}
th,td{padding:.25rem .4rem;text-align:left;border-bottom:1px solid #8885;vertical-align:top}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td{overflow-wrap:break-word}
thead th{border-bottom-width:2px;overflow-wrap:normal}th[scope=row]{font-weight:500;min-width:7rem}
small,figcaption,.note{font-size:.8rem;opacity:.8}figure{margin:1.5rem 0}
figure img{background:#fff;display:block;max-width:100%;height:auto}
.sheets{display:flex;flex-wrap:wrap;gap:1rem}.sheets figure{max-width:36rem;margin:0}
.verdict{border-left:4px solid #0072b2;padding:.2rem 1rem}
</style></head>
<body><h1>RS-BYOL: what the encoders learnt</h1>
"""


def escape(text: object) -> str:
    return html.escape(clean(text))


def html_table(header: list[str], rows: list[list[str]], numbers: int) -> str:
    """A table of cells that are HTML already; the first is a heading, the last so many numbers."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for first, *cells in rows:
        line = [f"<td{' class=n' * (i >= len(cells) - numbers)}>{cell}</td>"
                for i, cell in enumerate(cells)]  # fmt: skip
        body += f'<tr><th scope="row">{first}</th>{"".join(line)}</tr>\n'
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>\n")  # fmt: skip


def html_tables(table: Table) -> str:
    """A table as HTML, its notes, and its tests folded."""
    header, *rows = lines_of(table, escape, "<br><small>({})</small>")
    rows = [[cell.replace(" ± ", "<br>± ") for cell in row] for row in rows]
    text = (f"<h3>{escape(table.caption)}</h3>\n{html_table(header, rows, len(table.columns))}"
            f"<p class=note>{escape(notes(table))}</p>\n")  # fmt: skip
    if not table.tests:
        return text
    shown = "metric a b method note n difference low_holm high_holm t df p p_holm d effect".split()
    rows = [[escape(fixed(value, ".3g") if isinstance(value, float) else value)
             for value in map(vars(test).get, shown)] for test in table.tests]  # fmt: skip
    return (f"{text}<details><summary>Tests</summary>{html_table(shown, rows, 10)}<p class=note>"
            "Holm's correction runs over the pairs against random, stats, scratch and others apart "
            "(over seeds, bands and pre-trainings apart, too); low_holm and high_holm are the 95 % "
            "interval of a - b, corrected as p_holm is. Bands of one sensor are alike: p over "
            "bands is too small."
            "</p></details>\n")  # fmt: skip


@dataclass
class Pictures:
    """The pictures of a report as HTML, one by one: what fails is named and left out."""

    out: Path
    faults: list[str]

    def figure(self, name: str, text: str, draw: Callable, *args: Any) -> str:
        """Save what draw(*args) returns as PNG and SVG, and embed it; "" where it is None."""
        stem = self.out / re.sub(r"[^A-Za-z0-9_-]", "_", name)
        with surviving(self.faults, f"figure {stem.name}"):
            if figure := draw(*args):
                figure.get_layout_engine().execute(figure)  # once for both: half of the time
                figure.set_layout_engine(None)
                figure.savefig(stem.with_suffix(".png"), dpi=150)
                figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
                return self.sheet(text, stem.with_suffix(".svg"))
        return ""

    def sheet(self, text: str, path: Path) -> str:
        with surviving(self.faults, str(path)):
            kind = "svg+xml" if path.suffix == ".svg" else "png"
            data = base64.b64encode(path.read_bytes()).decode()
            return (f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(text)}">'
                    f"<figcaption>{escape(text)}</figcaption></figure>\n")  # fmt: skip
        return ""

    def examples(self, tables: list[Table], ending: str) -> str:
        """What lies beside the results as NAME-ending.png: one a row, four at most."""
        found: dict[str, str] = {}
        for table, row in ((t, row) for t in tables for row in t.shown()):
            for r in sorted(table.of(row), key=lambda r: r.seed):
                path = r.path.with_name(f"{r.path.stem}-{ending}.png")
                if row not in found and len(found) < 4 and path.exists():
                    found[row] = self.sheet(f"{row}, {r.bands}, seed {r.seed}: {ending}", path)
        return "".join(found.values())


def html_section(pictures: Pictures, tables: list[Table]) -> str:
    """A section's answer with its figures and examples."""
    first, most, figure = tables[0], main_of(tables), pictures.figure
    stem = f"{first.number:02d}-{first.stage}-{first.results[0].dataset}"
    parts = [
        f"<h2>{escape(first.title)}</h2>\n<p class=verdict>{escape(verdict(tables))}</p>\n",
        figure(f"{stem}-bars", f"{first.metric} by bands; whiskers: 95 % interval",
               draw_bars, most),
    ]  # fmt: skip
    for table in most:
        name = f"{stem}-{table.channels}ch"
        alike = [t for t in tables if t.channels == table.channels]
        parts.append(figure(f"{name}-labels", "By number of labelled images", draw_labels, alike))
        text = "By length of pre-training; grey: random weights and their 95 % interval"
        parts.append(figure(f"{name}-steps", text, draw_steps, table))
        if table.stage == "segment":
            text = "IoU by class and band, mean over seeds"
            parts.append(figure(f"{name}-classes", text, draw_classes, table))
    sheets = [pictures.examples(most, ending) for ending in ("maps", "cam")]
    return "".join([*parts, "<div class=sheets>", *sheets, "</div>"])


def html_page(sections: list[list[Table]], runs: list[Run], embeddings: list[Path],
              pictures: Pictures, left_out: list[str]) -> str:  # fmt: skip
    """The whole page; what has failed until the end of it is in pictures.faults."""
    parts = [html_section(pictures, tables) for tables in sections]
    if embeddings:
        text = "What probe.py --embed wrote (four files at most): t-SNE of the features, by class."
        parts.append("<h2>Embeddings</h2>\n")
        parts.append(pictures.figure("tsne", text, draw_tsne, embeddings, pictures.faults))
    if runs:
        text = "By step. The std falls to 0 where the projection collapses."
        parts.append(f"<h2>Pre-training{' (SYNTHETIC tiles)' * runs[0].synthetic}</h2>\n")
        parts.append(pictures.figure("runs", text, draw_runs, runs))
        views = [run.folder / "views.png" for run in runs]
        parts += [pictures.sheet(f"{file}: pairs as they are, and as the networks see them", file)
                  for file in views if file.exists()][:4]  # fmt: skip
    if sections:
        parts.append("<h2>Tables and tests</h2>\n")
        parts += map(html_tables, itertools.chain(*sections))
    if lines := [f"<li>{escape(line)}</li>" for line in left_out + pictures.faults]:
        parts.append(f"<h2>Left out, and remarks</h2>\n<ul>{''.join(lines)}</ul>\n")
    return "".join([HEAD, *parts, "<p class=note>Made by analyze.py.</p>\n</body></html>\n"])


# ---------------------------------------------------------------------------- writing


def read_all(kind: Callable, files: list[Path], faults: list[str], remarks: list[str]) -> list:
    """What can be read. Synthetic data, such as the demo's, never stand beside real ones."""
    found = []
    for path in sorted(files):
        with surviving(faults, str(path)):
            found.append(kind(path))
    real = [thing for thing in found if not thing.synthetic]
    if real and len(real) < len(found):
        remarks.append(f"{len(found) - len(real)} of {len(found)} {kind.__name__.lower()}s are "
                    "synthetic and left out: give their folder alone to see them")  # fmt: skip
    return real or found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: fail(2, f"{message} (see --help)")
    add = parser.add_argument
    add("results", type=Path, help="folder with the JSON of probe.py and segment.py")
    add("--out", type=Path, default=Path("report"), help="folder of the report (report)")
    add("--runs", type=Path, default=Path("runs") if Path("runs").is_dir() else None,
        help="folder with the runs of pretrain.py (runs, where it is)")  # fmt: skip
    args = parser.parse_args(argv)
    for folder in filter(None, (args.results, args.runs)):
        if not folder.is_dir():
            fail(2, f"no folder {folder}: name the one that the other scripts wrote to")

    faults: list[str] = []
    remarks: list[str] = []
    results = read_all(Result, [*args.results.rglob("*.json")], faults, remarks)
    for (stage,), found in groups(results, "stage").items():
        if (versions := len({r.script for r in found})) > 1:
            remarks.append(f"{versions} versions of {stage}.py made these results: a difference "
                           "may be theirs; a fresh --out makes all anew")  # fmt: skip
    runs = read_all(Run, [*args.runs.rglob("log.jsonl")] if args.runs else [], faults, remarks)
    embeddings = sorted(args.results.rglob("*.npz"))[:4]
    if not results and not runs:
        fail(1, "; ".join([f"{args.results} holds no result that can be read", *faults]))
    sections = build_tables(results, faults)
    every = [table for tables in sections for table in tables]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        texts = {"tables.md": tables_markdown(sections), "tables.tex": tables_latex(every),
                 "tables.csv": tables_csv(every, "cells"),
                 "tests.csv": tables_csv(every, "tests")}  # fmt: skip
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script the font lacks
        with matplotlib.rc_context(PLOTS):
            page = Pictures(args.out, faults)
            texts["index.html"] = html_page(sections, runs, embeddings, page, remarks)
        for name, text in texts.items():
            part = args.out / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(args.out / name)
    except OSError as error:
        fail(2, f"--out {args.out}: {error.strerror}; the report is not complete")
    for fault in faults:
        print(clean(f"analyze.py: left out: {fault}"), file=sys.stderr)
    found = [f"{tables[0].title}: {verdict(tables)}" for tables in sections]
    try:
        print(*map(clean, [*found, *remarks, str(args.out / "index.html")]), sep="\n", flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.stdout:  # None where it was closed: >&-
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail(130, "interrupted; the same command writes the report anew")
