"""From saved results to tables, tests, plots and one page. Reads files only: no torch, no training.

    python analyze.py results/ --out report/               # tables, tests, plots, report/index.html
    python analyze.py results/ --out report/ --runs runs/  # and the curves of the pre-training runs

In: the JSON of probe.py and segment.py (schema 1), with NAME-cam.png and NAME-maps.png beside
NAME.json; embeddings (*.npz: features [N, D], labels [N]); log.jsonl, config.json and views.png of
pretrain.py. Out: index.html (self-contained), tables.md, tables.csv, tables.tex, tests.csv and
figures as PNG and SVG; files of these names are replaced, others are left alone.

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
import platform
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes a second to import

# ---------------------------------------------------------------------------- settings

ALPHA = 0.05
DASH = "–"
SHOWN = {"probe": {"f1_macro": "F1"}, "segment": {"miou": "mIoU", "aa": "AA"}}
PER_CLASS = {"probe": "f1_per_class", "segment": "iou_per_class"}
# Results that differ in a field of SECTION never meet; TABLE sets apart the tables of a section,
# ROW the rows of a table. All are fields of Result.
SECTION = ("stage", "dataset", "synthetic", "data", "split", "subset", "size", "classes", "head")
TABLE = ("channels", "train_images")
ROW = ("name", "file", "arch", "bn", "epochs", "stats", "augment", "lr", "batch", "variant")
USE = tuple(key for key in ROW if key != "file")  # how weights were used, whichever they are
CONFIG = ("size", "head", "arch", "bn", "epochs", "stats", "augment", "lr", "batch")  # as saved
# Settings that change with the seed, or that say nothing of what was measured
NOT_SETTINGS = (
    "identity learning_rate l2_penalty neighbours optimiser mean std train test validated encoder "
    "replaced_samples device bf16 precision losses cached file root seconds"
).split()
# flags of pretrain.py that say where, how fast and until when, not how
IDLE_FLAGS = "seed out resume threads device log-every checkpoint-every epochs max-steps".split()
DATASETS = {
    "eurosat": "EuroSAT", "eurosat-rgb": "EuroSAT RGB (JPEG)", "sen12ms": "SEN12MS",
    "resisc45": "RESISC45", "dfc2020": "DFC2020",
}  # fmt: skip
WEIGHTS = {  # how a result may name what is not ours: how the tables name it
    "random": "random", "random init": "random", "scratch": "scratch",
    "scratch supervised": "scratch", "stats": "stats", "imagenet": "ImageNet supervised",
    "byol-imagenet": "BYOL ImageNet", "seco": "SeCo", "coco": "MS-COCO DeepLabV3",
    "imagenet-v2": "ImageNet supervised V2",
}  # fmt: skip
ORDER = [
    "random", "stats", "scratch", "ImageNet supervised", "ImageNet supervised V2",
    "MS-COCO DeepLabV3", "BYOL ImageNet", "SeCo", "RS-BYOL-1 MS only", "RS-BYOL-1",
    "RS-BYOL-1 w/150K", "RS-BYOL-1 w/64BS", "RS-BYOL-3 RGB-S1S2", "RS-BYOL-3 S1S2",
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
    ("RS-BYOL-1", "miou"): "54.8 57.7 57.8 58.3 54.5 56.6 57.6 55.5 58.1 58.5 57.2 57.2 56.98",
    ("RS-BYOL-1", "aa"): "68.0 72.2 70.7 72.1 68.2 69.7 70.8 68.4 71.4 72.3 70.1 70.5 70.38",
    ("RS-BYOL-1 w/150K", "miou"):
        "54.3 58.6 57.6 57.6 56.4 56.6 57.6 55.3 57.6 57.9 57.5 57.5 57.05",
    ("RS-BYOL-1 w/150K", "aa"): "71.0 72.1 73.0 70.7 69.8 69.6 71.2 67.9 70.6 71.5 71.2 71.8 70.87",
    ("RS-BYOL-1 w/64BS", "miou"):
        "57.7 59.6 58.8 59.1 57.5 54.8 56.0 56.5 59.2 58.4 58.3 57.8 57.81",
    ("RS-BYOL-1 w/64BS", "aa"): "72.0 72.7 72.5 73.1 71.3 68.0 69.6 69.6 72.4 72.0 70.9 71.2 71.27",
}  # fmt: skip
# Table II: classification F1, three channels. The header of a last column is lost in our copy of
# the paper, so that column is left out. Columns: (data set, subset, bands).
PAPER_II_COLUMNS = [
    ("eurosat", 7000, "RGB"), ("eurosat", 7000, "RE5,6,7"),
    ("eurosat", None, "RGB"), ("eurosat", None, "RE5,6,7"),
    ("sen12ms", 5000, "RGB"), ("sen12ms", 5000, "RE5,6,7"), ("sen12ms", 5000, "SAR1,2,1"),
    ("resisc45", None, "RGB"),
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
    ("RS-BYOL-3 S1S2", "miou"): "51.6 51.3 51.6", ("RS-BYOL-3 S1S2", "aa"): "66.9 65.8 65.5",
    ("SeCo", "miou"): "50.2 50.5 45.0", ("SeCo", "aa"): "64.8 64.8 60.9",
}  # fmt: skip
PAPER_TABLES = {("segment", 1): "I", ("probe", 3): "II", ("segment", 3): "III"}  # stage, channels

# ---------------------------------------------------------------------------- reading


@dataclass
class Result:
    """One file of probe.py or segment.py, flat. Words are fit to show; see `clean`."""

    path: Path
    stage: str
    dataset: str
    split: str
    subset: str  # "whole data set", or a number
    train_images: int | None  # labels to learn from, where they were limited
    size: str
    classes: tuple[str, ...]
    head: str
    data: str  # which files and labels: a digest
    root: str
    synthetic: bool
    pretrained_on_synthetic: bool
    channels: int
    bands: str  # "RE5", "RGB"
    seed: int
    name: str  # of the weights
    file: str  # their sha256; "" for weights drawn anew for each seed
    source: str
    finetuned: bool
    arch: str
    bn: str
    epochs: str
    stats: str
    augment: str
    lr: str
    batch: str
    recipe: str  # how the encoder was pre-trained, without seed and length; "" if unknown
    pretraining: str  # seed of the pre-training
    epoch: float  # of the pre-training; NaN if unknown
    overlap: float  # test images for each training image where seeds redraw the split, else 0
    metrics: dict[str, float]
    per_class: dict[str, float]
    averaged: int  # classes that macro averages run over
    identity: str  # digest of all that determines the result but the seed; "" if not given
    config: dict[str, Any]
    variant: str = ""  # what else sets it apart, where two runs would have one place
    label: str = ""  # of its row in a table
    judged: bool = True  # False: an earlier epoch of a pre-training
    pooled: int = 0  # pre-trainings of which this is the mean


def fail(status: int, message: str) -> NoReturn:
    """End with one line on stderr: status 2 for wrong use, 1 for bad data."""
    print(clean(f"{Path(sys.argv[0]).name}: error: {message}"), file=sys.stderr)
    raise SystemExit(status)


def clean(value: object) -> str:
    """Any value as text fit for terminal, SVG and table: one line, nothing that cannot be printed.

    Control characters and lone surrogates become a replacement character.
    """
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def why(error: Exception) -> str:
    """An exception as one short phrase."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def find_files(root: Path, faults: list[str]) -> list[Path]:
    """Every file under `root` whose name does not start with a dot, sorted."""
    unread = os.walk(root, onerror=lambda error: faults.append(f"{error.filename}: {error}"))
    return sorted(
        Path(folder, name) for folder, _, names in unread for name in names if name[0] != "."
    )


def is_true(value: object) -> bool:
    return value is True or str(value).lower() == "true"  # safetensors metadata holds strings only


def recipe_of(about: dict) -> str:
    """How pretrain.py made an encoder: its command's flags in any order, but IDLE_FLAGS."""
    if "command" not in about or "seed" not in about:
        return ""
    script, *flags = str(about["command"]).split(" --")
    flags = sorted(flag.replace("=", " ", 1).strip() for flag in flags)
    kept = [flag for flag in flags if flag.split(" ")[0] not in IDLE_FLAGS]
    return json.dumps([Path(script).name, *kept])


def share(value: object) -> float:
    """A number from 0 to 1, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{clean(value)[:40]} is no number from 0 to 1")
    return float(value)


def read_result(path: Path) -> Result:
    """A result of probe.py or segment.py; raises whatever a file that is none leads to."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or "schema" not in saved:
        raise ValueError('it has no "schema", so it is no result')
    if saved["schema"] != 1:
        raise ValueError(f"schema {clean(saved['schema'])} is unknown: this reads schema 1")
    stage, config, weights = saved["stage"], saved["config"], saved["weights"]
    if not isinstance(stage, str) or stage not in SHOWN:
        raise ValueError(f"stage {clean(stage)} is unknown: expected {' or '.join(SHOWN)}")
    for key in ("dataset", "split"):
        if not isinstance(saved[key], str):
            raise ValueError(f'"{key}" is {clean(saved[key])[:40]}, not a word')
    if not isinstance(weights["name"], str) or not all(isinstance(b, str) for b in saved["bands"]):
        raise ValueError("the weights' name or a band is not a word")
    name = WEIGHTS.get(weights["name"].split(":")[0].strip().lower(), clean(weights["name"]))
    finetuned = config.get("finetune") is True
    per_class = {clean(k): math.nan if v is None else share(v)
                 for k, v in saved["metrics"].get(PER_CLASS[stage], {}).items()}  # fmt: skip
    classes = config.get("classes")
    classes = list(per_class) if classes is None else classes
    classes = range(classes) if isinstance(classes, int) else classes
    about = dict(weights)
    if isinstance(config.get("encoder"), dict):
        about = config["encoder"] | about
    train, test = config.get("train"), config.get("test")
    overlap = 0.25 if saved["split"] == "random" else 0.0  # probe.py's random split is 80/20
    if overlap and not config.get("train_images") and train and test:
        overlap = test / train

    settings = {key: clean(config.get(key)) for key in CONFIG}
    if name == "scratch" or finetuned:
        settings["bn"] = ""  # it is trained
    subset = saved.get("subset")
    if not isinstance(subset, int | None) or not 0 <= overlap < 1e6 or len(classes) > 10_000:
        raise ValueError('"subset", "train", "test" or "classes" is no number that can be')
    return Result(
        path=path, stage=stage, dataset=clean(saved["dataset"]), split=clean(saved["split"]),
        subset="whole data set" if subset is None else f"subset {clean(subset)}",
        train_images=None if config.get("train_images") is None else int(config["train_images"]),
        classes=tuple(map(clean, classes)),
        data=clean(config.get("files") or config.get("images"))[:16],
        root=clean(config.get("root")), synthetic=is_true(config.get("synthetic")),
        pretrained_on_synthetic=is_true(config.get("encoder_synthetic", about.get("synthetic"))),
        channels=len(saved["bands"]),
        bands=TRIPLES.get(tuple(saved["bands"]), clean("+".join(saved["bands"]))),
        seed=int(saved["seed"]), name=name,
        file="" if name in DRAWN else clean(weights.get("sha256")),
        source=clean(weights.get("source")), finetuned=finetuned, recipe=recipe_of(about),
        pretraining=clean(about.get("seed")), epoch=float(about.get("epoch", "nan")),
        overlap=overlap, metrics={key: share(saved["metrics"][key]) for key in SHOWN[stage]},
        per_class=per_class, averaged=len(saved["metrics"].get("classes") or per_class),
        identity=clean(config.get("identity")), config=config,
        **settings,
    )  # fmt: skip


def read_results(paths: list[Path], faults: list[str]) -> list[Result]:
    """The results among the *.json of `paths`; the others go to `faults`."""
    results = []
    for path in paths:
        if path.suffix == ".json":
            try:
                results.append(read_result(path))
            except Exception as error:  # whatever a stranger's file leads to, it is named
                faults.append(f"{path}: no result: {why(error)}")
    return results


@dataclass
class Run:
    """A pre-training run: its log as columns, NaN where a line lacks the value."""

    name: str
    folder: Path
    synthetic: bool
    log: dict[str, np.ndarray]


LOGGED = {  # in log.jsonl: how the figure names it
    "loss": "loss", "cosine": "cosine of positives", "std": "std of the projection",
    "lr": "learning rate", "match": "match (0 best, 0.5 chance)", "rank": "rank of the features",
}  # fmt: skip


def read_run(log: Path, faults: list[str]) -> Run:
    """The log.jsonl and config.json of one folder; a last line that breaks off is being written."""
    config, lines = {}, log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if (file := log.with_name("config.json")).exists():
        config = json.loads(file.read_text(encoding="utf-8"))
    columns: dict[str, list[float]] = {key: [] for key in ("step", *LOGGED)}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            values = [float(entry["step"]), float(entry["loss"])]
            values += [math.nan if entry.get(key) is None else float(entry[key])
                       for key in [*LOGGED][1:]]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines) or line.endswith("\n"):
                faults.append(f"{log}: line {number} is no step of a run; this line is left out")
            continue
        for key, value in zip(columns, values, strict=True):
            columns[key].append(value)
    return Run(clean(log.parent.name), log.parent, '"synthetic": true' in json.dumps(config),
               {key: np.array(values) for key, values in columns.items()})  # fmt: skip


# ---------------------------------------------------------------------------- what is compared


def groups(results: Iterable[Result], *fields: str) -> dict[tuple, list[Result]]:
    """Results by the values of some fields, in the order in which they come."""
    found: dict[tuple, list[Result]] = {}
    for result in results:
        found.setdefault(tuple(getattr(result, f) for f in fields), []).append(result)
    return found


def set_apart(results: list[Result], faults: list[str]) -> list[Result]:
    """Drop second copies of a run; runs that differ in any other setting get a `variant` each.

    Two results of one seed, row and bands are the same run only if all that determines them is
    equal: their `identity`, or, where a file has none, every setting.
    """
    row = SECTION + TABLE + ROW
    differ: dict[tuple, set[str]] = {}  # row: settings in which its results differ
    kept: dict[tuple, Result] = {}
    for (*place, _), found in groups(results, *row, "bands").items():
        for r in found:
            same = (r.seed, r.bands, r.identity or json.dumps(r.config, sort_keys=True), *place)
            if kept.setdefault(same, r) is not r:
                faults.append(f"{r.path}: the same run as {kept[same].path}, which is kept")
        keys = {key for r in found for key in r.config} - {*NOT_SETTINGS}
        differ.setdefault(tuple(place), set()).update(
            key for key in keys if len({clean(r.config.get(key)) for r in found}) > 1
        )
    for place, found in groups(kept.values(), *row).items():
        for r in found:
            values = {key: clean(r.config.get(key)) for key in sorted(differ[place])}
            r.variant = ", ".join(f"{key} {value[:12] + '…' * (len(value) > 12)}"
                                  for key, value in values.items())  # fmt: skip
    for found in groups(kept.values(), *row, "bands", "seed").values():
        for r in found[1:]:  # no setting in sight tells them apart
            r.variant = f"{r.variant} file {clean(r.path.stem)}".strip()
    return list(kept.values())


def file_of(source: str) -> str:
    """The file of weights in short: "plain-seed0", "plain-seed0/encoder-epoch0070"."""
    file = Path(source)
    return "/".join(part for part in (file.parent.name, file.stem) if part not in ("", "encoder"))


def label_rows(results: list[Result]) -> None:
    """Set `label` of one section's results: the name, and what tells rows of one name apart."""
    names = {file: {file_of(r.source) for r in found}
             for (file,), found in groups(results, "file").items()}  # fmt: skip
    places = list(itertools.chain(*names.values()))
    mixed = len({r.bn for r in results} - {""}) > 1  # then each frozen row says its own
    for alike in groups(results, "name", "channels").values():
        differ = [f for f in ROW[1:] if len({getattr(r, f) for r in alike}) > 1]
        for r in alike:
            extra = []
            for key in differ + ["bn"] * (mixed and "bn" not in differ):
                value = getattr(r, key)
                if key == "file" and value:
                    place = min(names[value])
                    extra.append(place if place and places.count(place) == 1 else value[:8])
                elif value and key != "file":
                    extra.append(value if key == "variant" else f"{key} {value}")
            r.label = r.name + (f" ({', '.join(extra)})" if extra else "")


def judge_last(results: list[Result]) -> None:
    """Only the latest encoder of each pre-training is compared with others; see `judged`."""
    for (recipe, *_), found in groups(results, "recipe", "pretraining", "channels", *USE).items():
        if recipe and not any(math.isnan(r.epoch) for r in found):
            last = max(found, key=lambda r: (r.epoch, -len(r.source)))  # encoder, not its copy
            for r in found:
                r.judged = r.file == last.file


def members_of(results: list[Result]) -> dict[str, list[str]]:
    """Recipes that were pre-trained three times or more: label -> the labels of the encoders.

    One recipe: the same flags but the seed's, as many epochs, and probed in the same way.
    """
    recipes: dict[str, list[str]] = {}
    judged = [r for r in results if r.recipe and r.judged]
    for (_, _, *row), found in groups(judged, "recipe", "epoch", "channels", *USE).items():
        first = {}  # of two copies of one pre-training one counts
        for r in found:
            first.setdefault(r.pretraining, r.label)
        if len(first) >= 3:
            labels = list(first.values())
            about = [part for r in found[:1] for part in r.label.split(" (", 1)[1:]]
            used_as = "".join(about).rstrip(")").split(", ")[1:]
            label = f"{row[1]} ({', '.join([f'{len(first)} pre-trainings', *used_as])})"
            while label in recipes:  # another recipe of the same name
                label = label.removesuffix(")") + "; another recipe)"
            recipes[label] = labels
    return recipes


def pool(results: list[Result], recipes: dict[str, list[str]]) -> list[Result]:
    """For each recipe and bands one result a pre-training, the mean over the seeds all have."""
    pooled = []
    for label, members in recipes.items():
        mine = [r for r in results if r.label in members]
        for _, found in groups(mine, "bands", "train_images").items():
            by_member = {m: {r.seed: r for r in found if r.label == m} for m in members}
            seeds = set.intersection(*(set(s) for s in by_member.values()))
            for number, runs in enumerate(by_member.values()):
                if seeds:
                    first = runs[min(seeds)]
                    metrics = {key: float(np.mean([runs[s].metrics[key] for s in seeds]))
                               for key in first.metrics}  # fmt: skip
                    shares = {key: float(np.mean([runs[s].per_class.get(key, math.nan)
                                                  for s in seeds]))
                              for key in first.per_class}  # fmt: skip
                    pooled.append(Result(**vars(first) | {
                        "label": label, "seed": number, "metrics": metrics, "per_class": shares,
                        "overlap": 0.0, "pooled": len(members), "file": "", "recipe": "",
                    }))  # fmt: skip
    return pooled


# ---------------------------------------------------------------------------- tests


@dataclass
class Test:
    """A test of a - b; low and high are the 95 % interval, *_holm corrected for its family."""

    kind: str  # over bands, over seeds, over pre-trainings
    family: str  # against random, against stats, others: corrected apart
    metric: str
    bands: str  # a column of the table; "mean": over the bands that both have
    a: str
    b: str
    method: str
    n: str
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    t: float = math.nan
    df: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    low_holm: float = math.nan
    high_holm: float = math.nan
    d: float = math.nan  # Cohen's d_z (paired), d with the mean of both variances (Welch)
    effect: str = ""  # which of the two
    note: str = ""


def summarise(values: list[float], overlap: float = 0.0) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval, which is NaN for fewer than two values.

    overlap: test images for each training image where the values come from random splits of one
    data set, else 0: the variance of the mean is taken as (1/J + overlap) times the values'
    (Nadeau and Bengio, Inference for the generalization error, 2003).
    """
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    error = math.sqrt((1 / len(values) + overlap) * np.var(values, ddof=1))
    return float(np.mean(values)), float(stdtrit(len(values) - 1, 1 - ALPHA / 2)) * error


def decide(test: Test, error: float, df: float, d: float) -> Test:
    """Fill t, df, p, the interval and d from the standard error of the difference."""
    test.t, test.df, test.d = test.difference / error, float(df), float(d)
    test.p = float(2 * stdtr(df, -abs(test.t)))
    half = float(stdtrit(df, 1 - ALPHA / 2)) * error
    test.low, test.high = test.difference - half, test.difference + half
    return test


def rounding(*values: np.ndarray) -> float:
    """The spread that rounding alone may give to values as large as these."""
    return 1e-12 * float(np.abs(np.concatenate(values)).max(initial=0))


def paired_test(test: Test, a: np.ndarray, b: np.ndarray, overlap: float = 0.0) -> Test:
    """Paired t-test of a - b, float [n] each; d_z: mean / deviation of the differences.

    overlap: as in `summarise`. Fewer than three pairs are not tested.
    """
    differences, test.n, test.effect = a - b, str(len(a)), "d_z"
    test.difference = float(differences.mean()) if len(a) else math.nan
    if len(a) < 3:
        test.note = f"fewer than three {test.kind.removeprefix('over ')} in common: not tested"
    elif np.ptp(differences) <= rounding(a, b):
        test.note = "all differences equal: not tested"
    else:
        spread = differences.std(ddof=1)
        error = math.sqrt(1 / len(a) + overlap) * spread
        return decide(test, error, len(a) - 1, test.difference / spread)
    return test


def welch_test(test: Test, a: np.ndarray, b: np.ndarray) -> Test:
    """Welch's t-test of a - b; d on the mean of the two variances. At least two values each."""
    test.n, test.effect = f"{len(a)}, {len(b)}", "d"
    if min(len(a), len(b)) < 2:
        test.note = "fewer than two values: not tested"
        return test
    test.difference = float(a.mean() - b.mean())
    if max(np.ptp(a), np.ptp(b)) <= rounding(a, b):
        test.note = "no spread: not tested"
        return test
    one, two = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    df = (one + two) ** 2 / (one**2 / (len(a) - 1) + two**2 / (len(b) - 1))
    spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return decide(test, math.sqrt(one + two), df, test.difference / spread)


def correct(tests: list[Test]) -> None:
    """Holm's correction (1979) of one family: p_holm, and the interval that agrees with it.

    Holm multiplies p by a number; the interval is the one at 1 - ALPHA / that number, so it leaves
    out 0 where p_holm < ALPHA, and only there.
    """
    tested = sorted((test for test in tests if test.p == test.p), key=lambda test: test.p)
    largest = 0.0
    for rank, test in enumerate(tested):
        factor = len(tested) - rank
        if factor * test.p < largest:
            factor = largest / test.p
        largest = factor * test.p
        test.p_holm = min(1.0, largest)
        half = float(stdtrit(test.df, 1 - ALPHA / factor / 2)) * abs(test.difference / test.t or 1)
        test.low_holm, test.high_holm = test.difference - half, test.difference + half


Values = dict[tuple[str, str], dict[int, float]]  # (row, bands) -> seed -> one metric


def over_bands(values: Values, test: Test, columns: list[str]) -> Test:
    """Paired over the bands that both rows have, each the mean over the seeds that both have."""
    means = []
    for column in columns:
        a, b = values.get((test.a, column), {}), values.get((test.b, column), {})
        if seeds := sorted(a.keys() & b.keys()):
            means.append([np.mean([side[s] for s in seeds]) for side in (a, b)])
    return paired_test(test, *np.array(means).reshape(-1, 2).T)


def common(values: Values, rows: list[str], columns: list[str]) -> tuple[list[str], list[int]]:
    """The columns that all rows have, and the seeds that they all have in each of these."""
    both = [c for c in columns if all(values.get((row, c)) for row in rows)]
    seeds = [set(values[row, c]) for row in rows for c in both]
    return both, sorted(set.intersection(*seeds)) if seeds else []


def over_seeds(values: Values, test: Test, columns: list[str], overlap: float) -> Test:
    """Paired over the seeds that both rows have, each the mean over the bands that both have."""
    both, seeds = common(values, [test.a, test.b], columns)
    a, b = (np.array([np.mean([values[row, c][s] for c in both]) for s in seeds])
            for row in (test.a, test.b))  # fmt: skip
    return paired_test(test, a, b, overlap)


def over_pretrainings(
    values: Values, test: Test, columns: list[str], recipes: dict[str, list[str]], drawn: bool
) -> Test:
    """A recipe's pre-trainings, each the mean over seeds and bands that all rows have.

    Against another recipe, or weights drawn anew for each seed: Welch. Against a row that is one
    thing, such as `stats`: the pre-trainings' differences from it, tested against 0.
    """
    others = recipes.get(test.b, [test.b])
    both, seeds = common(values, recipes[test.a] + others, columns)

    def means(rows: list[str]) -> np.ndarray:
        cells = [[[values[row, c][s] for c in both] for s in seeds] for row in rows]
        return np.array(cells, float).reshape(len(rows), -1).mean(1) if seeds else np.array([])

    a = means(recipes[test.a])
    if test.b in recipes:
        return welch_test(test, a, means(others))
    if drawn:
        draws = [np.mean([values[test.b, c][s] for c in both]) for s in seeds]
        return welch_test(test, a, np.array(draws))
    test.method = "t-test of differences"
    return paired_test(test, a, np.resize(means(others), len(a)))


# ---------------------------------------------------------------------------- tables


@dataclass
class Cell:
    """A value of a table. A new column of tables.csv: a field here, set in `make_table`."""

    weights: str
    bands: str  # "mean": over all bands of the table, where the row has each
    metric: str
    n: int  # seeds, or pre-trainings
    over: str
    mean: float
    half_width_95: float
    paper: str  # as printed there; "" if it has none
    best: bool = False  # of its column


@dataclass
class Table:
    """Rows of one section with as many channels, and all that is said of them."""

    number: int
    title: str
    results: list[Result]  # every row, those of pooled recipes too
    columns: list[str]
    rows: list[str]
    recipes: dict[str, list[str]]
    cells: list[Cell] = field(default_factory=list)
    tests: list[Test] = field(default_factory=list)

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def bands(self) -> list[str]:
        return [column for column in self.columns if column != "mean"]

    def of(self, label: str) -> list[Result]:
        return [r for r in self.results if r.label == label]

    def shown(self) -> list[str]:
        """Rows for figures: recipes for their pre-trainings, the latest encoder of each."""
        pooled = list(itertools.chain(*self.recipes.values()))
        return [row for row in self.rows if row not in pooled and self.of(row)[0].judged]


def paper_value(r: Result, metric: str, column: str) -> str:
    """The paper's figure for one cell, as printed there; "" where it has none.

    Only for the paper's data: DFC2020 with 8 classes, EuroSAT whole or 7000, SEN12MS 5000.
    """
    if r.synthetic or r.finetuned or r.train_images is not None:
        return ""
    if r.stage == "probe":
        subset = None if r.subset == "whole data set" else int(r.subset.split()[-1])
        place = (r.dataset, subset, column)
        if r.name in PAPER_II and place in PAPER_II_COLUMNS:
            return PAPER_II[r.name].split()[PAPER_II_COLUMNS.index(place)]
    elif r.dataset == "dfc2020" and len(r.classes) == 8:
        for paper, columns in ((PAPER_I, [*BANDS, "mean"]), (PAPER_III, [*TRIPLES.values()])):
            if (r.name, metric) in paper and column in columns:
                return paper[r.name, metric].split()[columns.index(column)]
    return ""


def section_title(r: Result, sections: list[Result]) -> str:
    """The data set and all its settings in one line; of a user's own data, where they lie."""
    where = "/".join(Path(r.root).parts[-2:])
    name = DATASETS.get(r.dataset) or f"{r.dataset} {where}".strip()
    parts = ["land cover maps" if r.stage == "segment" else "", r.subset, f"split {r.split}"]
    parts += [f"{r.size} px" if r.size else "", f"{len(r.classes)} classes", r.head]
    title = ", ".join([name + " (SYNTHETIC images)" * r.synthetic, *filter(None, parts)])
    twins = [s for s in sections if (s.dataset, s.stage) == (r.dataset, r.stage) and s is not r]
    if any(s.data != r.data for s in twins):
        title += f", files {r.data}"
    if any(len(s.classes) == len(r.classes) and s.classes != r.classes for s in twins):
        title += f", {', '.join(r.classes[:3])} …"
    return title


def build_tables(results: list[Result], faults: list[str]) -> list[list[Table]]:
    """Sort results into sections, and each section into tables: of most labels first."""
    results = set_apart(results, faults)
    found = list(groups(results, *SECTION).values())
    firsts = [section[0] for section in found]
    stages = list(SHOWN)
    found.sort(key=lambda s: (stages.index(s[0].stage), s[0].synthetic, s[0].dataset,
                              section_title(s[0], firsts)))  # fmt: skip
    sections: list[list[Table]] = []
    number = itertools.count(1)
    for section in found:
        label_rows(section)
        judge_last(section)
        title = section_title(section[0], firsts)
        tables = []
        by_table = groups(section, *TABLE)
        for channels, labels in sorted(by_table, key=lambda k: (-(k[1] or math.inf), k[0])):
            about = f"; {labels} labelled images to learn from" if labels is not None else ""
            own = by_table[channels, labels]
            tables.append(make_table(next(number), title + about, own))
        sections.append(tables)
    return sections


def make_table(number: int, title: str, results: list[Result]) -> Table:
    """The cells and tests of the results of one table."""
    recipes = members_of(results)
    results = results + pool(results, recipes)
    rank = {name: index for index, name in enumerate(ORDER)}
    rows = sorted({r.label: (rank.get(r.name, len(rank)), not r.pooled, r.label)
                   for r in results}.items(), key=lambda row: row[1])  # fmt: skip
    rank = {name: index for index, name in enumerate([*BANDS, *TRIPLES.values()])}
    bands = sorted({r.bands for r in results}, key=lambda c: (rank.get(c, len(rank)), c))
    with_mean = results[0].channels == 1 and len(bands) > 1
    table = Table(number, title, results, bands + ["mean"] * with_mean, [r for r, _ in rows],
                  recipes)  # fmt: skip
    scale = 100 if table.first.stage == "segment" else 1
    for metric, shown in SHOWN[table.first.stage].items():
        values: Values = {}
        for r in results:
            values.setdefault((r.label, r.bands), {})[r.seed] = scale * r.metrics[metric]
        for row, column in itertools.product(table.rows, table.columns):
            first = table.of(row)[0]
            both, seeds = common(values, [row], bands if column == "mean" else [column])
            if column == "mean" and len(both) < len(bands):
                seeds = []
            means = [float(np.mean([values[row, c][s] for c in both])) for s in seeds]
            mean, half = summarise(means, first.overlap)
            over = "pre-trainings" if first.pooled else "seeds"
            table.cells.append(Cell(row, column, shown, len(means), over, mean, half,
                                    paper_value(first, metric, column)))  # fmt: skip
        for column in table.columns:
            there = [c for c in table.cells if (c.bands, c.metric) == (column, shown) and c.n]
            if len(there) > 1:
                max(there, key=lambda c: c.mean).best = True
        table.tests += make_tests(table, shown, values)
    return table


def make_tests(table: Table, metric: str, values: Values) -> list[Test]:
    """Every pair of judged rows over bands and over seeds, every recipe over its pre-trainings."""
    kept = {row: table.of(row)[0] for row in table.rows if table.of(row)[0].judged}
    singles = [row for row in kept if not kept[row].pooled]
    pairs = list(itertools.combinations(singles, 2))
    pairs += itertools.combinations(table.recipes, 2)
    pairs += [(a, b) for a in table.recipes for b in singles if not is_ours(kept[b])]
    tests = []
    for a, b in pairs:
        names = [kept[row].name for row in (a, b)]
        if is_ours(kept[b]) and not is_ours(kept[a]):
            a, b, names = b, a, names[::-1]  # ours less the other
        family = f"against {names[1]}" if is_ours(kept[a]) and names[1] in FLOORS else "others"
        if a in table.recipes:
            test = Test("over pre-trainings", family, metric, "mean", a, b, "Welch", "")
            drawn = names[1] in DRAWN
            tests.append(over_pretrainings(values, test, table.bands, table.recipes, drawn))
            continue
        overlap = max(kept[a].overlap, kept[b].overlap)
        method = "paired t-test" + " with Nadeau and Bengio's variance" * (overlap > 0)
        test = Test("over bands", family, metric, "mean", a, b, "paired t-test", "")
        if len(table.bands) > 2:
            tests.append(over_bands(values, test, table.bands))
        for column in table.columns if "mean" in table.columns else [*table.columns, "mean"]:
            if column == "mean" or all((row, column) in values for row in (a, b)):
                columns = table.bands if column == "mean" else [column]
                test = Test("over seeds", family, metric, column, a, b, method, "")
                tests.append(over_seeds(values, test, columns, overlap))
    by_family: dict[tuple, list[Test]] = {}
    for test in tests:
        by_family.setdefault((test.kind, test.family, test.bands), []).append(test)
    for family in by_family.values():
        correct(family)
    return tests


FLOORS = ("random", "stats", "scratch")


def is_ours(r: Result) -> bool:
    return r.name.removesuffix(" fine-tuned") not in WEIGHTS.values()


# ---------------------------------------------------------------------------- what is said


def digits_of(table: Table) -> int:
    return 1 if table.first.stage == "segment" else 3


def fixed(value: float, digits: int) -> str:
    return DASH if math.isnan(value) else f"{value:.{digits}f}"


def p_text(p: float) -> str:
    return DASH if math.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def clause(test: Test, digits: int) -> str:
    """What a test says of its a, without its name: "beats random by 0.05 F1 (...)"."""
    gap = f"{test.difference:+.{digits}f} {test.metric}"
    if math.isnan(test.p):
        return f"is not tested against {test.b} ({gap}; {test.note})"
    p = p_text(test.p_holm) if test.p_holm < 0.0001 else f"= {p_text(test.p_holm)}"
    evidence = f"{test.low_holm:+.{digits}f} to {test.high_holm:+.{digits}f}, p {p}"
    if test.p_holm >= ALPHA:
        return f"does not differ significantly from {test.b}: {gap} ({evidence})"
    return f"{'beats' if test.difference > 0 else 'is below'} {test.b} by {gap[1:]} ({evidence})"


def judge(table: Table, row: str) -> list[Test]:
    """The tests that speak of one row, against random weights and against the floor.

    A recipe is judged over its pre-trainings; a single encoder over the seeds in common where there
    are three, else over the bands in common. Of random weights used in several ways (--bn) those
    of the same architecture count, and of these the best on most bands in common.
    """
    first, found = table.of(row)[0], []
    shown = next(iter(SHOWN[first.stage].values()))
    mine = {r.bands for r in table.of(row)}
    for floor in ("scratch" if first.finetuned else "random", "stats"):
        rivals = [rival for rival in table.shown() if table.of(rival)[0].name == floor]
        alike = [rival for rival in rivals if table.of(rival)[0].arch == first.arch]
        means = {rival: [c.mean for c in table.cells if (c.weights, c.metric) == (rival, shown)
                         and c.bands in mine and c.n]
                 for rival in alike or rivals}  # fmt: skip
        if means:
            best = max(means, key=lambda rival: (len(means[rival]), np.mean(means[rival] or [0])))
            tests = [t for t in table.tests
                     if (t.a, t.b, t.metric, t.bands) == (row, best, shown, "mean")]  # fmt: skip
            tests.sort(key=lambda t: (math.isnan(t.p), t.kind != "over seeds"))
            found += tests[:1]
    return found


def verdict(tables: list[Table]) -> str:
    """A section in one sentence: recipes first, then single encoders, at the most labels."""
    rows = [(t, row) for t in main_of(tables) for row in t.shown() if is_ours(t.of(row)[0])]
    rows.sort(key=lambda entry: not entry[0].of(entry[1])[0].pooled)
    if not rows:
        return f"{tables[0].title}: no pre-trained encoder, so no verdict."
    clauses, hows = [], []
    for table, row in rows[:3]:
        tests = judge(table, row)
        said = [clause(test, digits_of(table)) for test in tests]
        who = row if table.of(row)[0].pooled else f"this encoder, {row},"
        clauses.append(f"{who} {' and '.join(said) or 'stands beside no random encoder'}")
        hows += [f"{t.method}, {t.n.replace(', ', ' pre-trainings and ')} "
                 + (f"draws of {t.b}" if ", " in t.n else t.kind.removeprefix("over "))
                 for t in tests if t.p == t.p]  # fmt: skip
    if len(rows) > 3:
        clauses.append(f"{len(rows) - 3} more in the tests below")
    how = "; ".join(dict.fromkeys(hows))
    how = f" In brackets: 95 % interval and p, Holm-corrected ({how})." if how else ""
    if any(not table.of(row)[0].pooled for table, row in rows):
        how += " One encoder does not speak for its recipe: that takes three pre-trainings."
    return f"{tables[0].title}: {'; '.join(clauses)}.{how}"


def notes(table: Table) -> str:
    """How to read a table, in as few words as it takes."""
    counts = sorted({c.n for c in table.cells if c.n and c.over == "seeds"})
    few = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(*counts)
    unit = "mIoU and AA in %" if table.first.stage == "segment" else "Macro F1"
    words = [f"{unit}, mean over {few} seed{'s' * (few != '1')} ± 95 % t-interval"]
    if any(r.overlap for r in table.results):
        words.append(", widened by Nadeau and Bengio's correction for random splits that overlap.")
    else:
        words.append(". The split is fixed: seeds redraw only the head (and random's and scratch's "
                     "weights; a subset too).")  # fmt: skip
    if table.recipes:
        words.append(" Rows of several pre-trainings: over these.")
    if any(cell.paper for cell in table.cells):
        words.append(" In brackets: the paper's figure.")
    averaged = {r.averaged for r in table.results if not r.pooled}
    if averaged - {len(table.first.classes), 0}:
        words.append(f" Averaged over the {min(averaged)} to {max(averaged)} classes that a test "
                     "set holds.")  # fmt: skip
    if "mean" in table.columns:
        words.append(" Mean: over bands, where a row has every band.")
    return "".join([*words, f" {DASH}: no result. Bold: the best of its column."])


def caption(table: Table) -> str:
    """A title that says which of the paper's tables this is like."""
    paper = PAPER_TABLES.get((table.first.stage, table.first.channels))
    like = f" (as the paper's Table {paper})" if paper else ""
    return f"Table {table.number}{like}. {table.title}"


# ---------------------------------------------------------------------------- text


def lines_of(table: Table, plain: Callable, bold: str, paper: str) -> list[list[str]]:
    """A table as text, the header first; `plain` escapes, `bold` marks the best of a column and
    `paper` shows the paper's figure behind a value: formats."""
    lines = [["weights", "", *map(plain, table.columns)]]
    for row, metric in itertools.product(table.rows, SHOWN[table.first.stage].values()):
        texts = []
        for cell in (c for c in table.cells if (c.weights, c.metric) == (row, metric)):
            half = fixed(cell.half_width_95, digits_of(table))
            text = fixed(cell.mean, digits_of(table)) + f" ± {half}" * (half != DASH)
            text = bold.format(plain(text)) if cell.best else plain(text)
            texts.append(text + paper.format(cell.paper) * bool(cell.paper))
        lines.append([plain(row), metric, *texts])
    return lines


def plain_markdown(text: str) -> str:
    return "".join("\\" + c if c in "\\|*_<>[]`#" else c for c in text)


def plain_latex(text: str) -> str:
    """Text as LaTeX that pdflatex sets with no package; what it cannot set becomes "?"."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               "±": r"$\pm$", DASH: "--", "<": "$<$", ">": "$>$"}  # fmt: skip
    special |= {c: "\\" + c for c in "&%$#_{}"}
    out = []
    for c in text:
        ascii_only = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        out.append(special.get(c) or "".join(special.get(a, a) for a in ascii_only) or "?")
    return "".join(out)


def tables_markdown(sections: list[list[Table]]) -> str:
    parts = []
    for tables in sections:
        parts.append(f"{plain_markdown(verdict(tables))}\n")
        for table in tables:
            header, *lines = lines_of(table, plain_markdown, "**{}**", " ({})")
            lines = [header, ["---"] * len(header), *lines]
            body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"## {plain_markdown(caption(table))}\n\n{body}\n\n"
                         f"{plain_markdown(notes(table))}\n")  # fmt: skip
    return "\n".join(parts)


def tables_latex(tables: list[Table]) -> str:
    r"""One table environment for each table; needs \usepackage{booktabs,graphicx}."""
    parts = ["% Written by analyze.py. Needs \\usepackage{booktabs,graphicx}.\n"]
    for table in tables:
        title, papers = table.title, any(cell.paper for cell in table.cells)
        title += ": mean over seeds ± 95 % interval" + "; in brackets the paper's" * papers
        lines = lines_of(table, plain_latex, r"\textbf{{{}}}", " ({})")
        header, *body = [" & ".join(line) + r" \\" for line in lines]
        parts.append("\n".join([
            r"\begin{table*}", r"\centering", rf"\caption{{{plain_latex(title)}.}}",
            rf"\label{{tab:rsbyol-{table.number}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{ll{'r' * len(table.columns)}}}", r"\toprule", header,
            r"\midrule", *body, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", "",
        ]))  # fmt: skip
    return "\n".join(parts)


def csv_text(rows: list[dict]) -> str:
    """CSV; missing is a dash (pandas: na_values="-"), no cell is a spreadsheet's formula."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for key, value in row.items():
            if value in ("", None) or value != value:
                row[key] = "-"
            elif isinstance(value, str) and value[0] in "=+@-" and len(value) > 1:
                row[key] = "'" + value
        writer.writerow(row)
    return text.getvalue()


def about(table: Table) -> dict:
    """The columns that tables.csv and tests.csv begin with."""
    r = table.first
    settings = {key: getattr(r, key) for key in (*SECTION, *TABLE)}
    return {"table": table.number} | settings | {"classes": len(r.classes)}


# ---------------------------------------------------------------------------- plots

# Okabe and Ito's colours for colour-blind readers; hatches tell bars apart in black and white
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
HATCHES = ["", "///", "...", "\\\\\\", "xxx", "---", "ooo"]
GREY = "#999999"  # random
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "rs-byol", "hatch.linewidth": 0.5,
        "text.parse_math": False}  # fmt: skip  # a name may hold dollars


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of `width` x `height` inches and its axes as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def short(text: str) -> str:
    """A name that fits a figure; matplotlib leaves out of legends what begins with "_"."""
    text = f" {text}" if text[:1] in ("_", "") else text
    return text if len(text) <= 60 else f"{text[:59]}…"


def legend_below(figure, labelled: dict[str, Any]) -> None:
    """Artists by their labels under all axes, in as many columns as fit the width."""
    labels = [*map(short, labelled)]
    widest = (5 + 0.6 * max(map(len, labels), default=1)) * 8 / 72  # inches, the handle included
    columns = max(1, min(4, int(figure.get_figwidth() / widest)))
    figure.legend(list(labelled.values()), labels, loc="outside lower center", ncols=columns,
                  frameon=False, fontsize=8)  # fmt: skip


def draw_bars(tables: list[Table]):
    """Every row and band of a section: a group for each band, a bar for each row that has it.

    The floor `stats` is a line across its group; the paper's figures are diamonds. Past seven rows
    the next go to a further panel; random weights stand in each.
    """
    columns = list(dict.fromkeys((t.number, c) for t in tables for c in t.columns))
    rows = list(dict.fromkeys(row for t in tables for row in t.shown()))
    names = {row: t.of(row)[0].name for t in tables for row in t.shown()}
    floor = [row for row in rows if names[row] == "stats"]
    drawn = [row for row in rows if names[row] == "random"]
    others = [row for row in rows if row not in floor + drawn]
    parts = [others[i : i + 7] for i in range(0, len(others), 7)] or [[]]
    metrics = list(SHOWN[tables[0].first.stage].values())
    cells = {(t.number, c.weights, c.metric, c.bands): c for t in tables for c in t.cells if c.n}
    most = max(len(drawn + part) for part in parts)
    slots = max(14, len(columns) * (most + 1))
    figure, axes = new_figure(max(4.5, min(9.0, 0.8 + 0.2 * slots)),
                              2.4 * len(metrics) * len(parts) + 0.1 * len(rows) + 0.3,
                              rows=len(metrics) * len(parts))  # fmt: skip
    legend: dict[str, Any] = {}
    for axis, (metric, part) in zip(axes, itertools.product(metrics, parts), strict=True):
        x, ticks, highest = 0.0, [], 0.0
        for number, column in columns:
            there = [r for r in drawn + part if (number, r, metric, column) in cells]
            start = x
            for row in there:
                cell, place = cells[number, row, metric, column], others.index(row) % 7 \
                    if row in others else None  # fmt: skip
                style = {"color": GREY} if place is None else \
                    {"color": COLOURS[place], "hatch": HATCHES[place]}  # fmt: skip
                legend[row] = axis.bar(x, cell.mean, 0.9, edgecolor="black", linewidth=0.5, **style)
                axis.errorbar(x, cell.mean, cell.half_width_95, fmt="none", ecolor="black",
                              elinewidth=0.8, capsize=1.5)  # fmt: skip
                if cell.paper:
                    (legend["the paper"],) = axis.plot(
                        x, float(cell.paper), "D", ms=3.5, mfc="white", mec="black")  # fmt: skip
                highest = max(highest, cell.mean, float(cell.paper or 0))
                x += 1
            for row in floor:
                if cell := cells.get((number, row, metric, column)):
                    x = max(x, start + 1)
                    legend[f"{row} (the floor)"] = axis.hlines(
                        cell.mean, start - 0.6, x - 0.4, colors="black", linestyles="--", lw=1.2
                    )
                    highest = max(highest, cell.mean)
            ticks.append((start + x - 1) / 2)
            x += 1
        small = 7 if len(columns) > 12 else 9
        axis.set_xticks(ticks, [column for _, column in columns], fontsize=small)
        space = max(0, 14 - x) / 2  # few bars stay narrow
        axis.set(xlim=(-1 - space, x + space - 1), ylim=(0, 1.15 * highest or 1))
        axis.set_ylabel(metric + (" (%)" if tables[0].first.stage == "segment" else ""))
    legend_below(figure, legend)
    return figure


def overall(table: Table, row: str, bands: set[str]) -> tuple[float, float]:
    """Mean over bands, and over seeds with its half width, of a row's first metric."""
    metric, scale = next(iter(SHOWN[table.first.stage])), 10 ** (5 - 2 - digits_of(table))
    found: dict[int, list[float]] = {}
    for r in table.of(row):
        if r.bands in bands:
            found.setdefault(r.seed, []).append(scale * r.metrics[metric])
    whole = [float(np.mean(v)) for v in found.values() if len(v) == len(bands)]
    return summarise(whole, table.of(row)[0].overlap)


def draw_lines(lines: dict[str, list[tuple]], flat: dict[str, tuple], labels: tuple[str, str]):
    """Points (x, mean, half) as a line each; `flat`: (mean, half) of what has no x, as a band."""
    figure, (axis,) = new_figure(6.5, 3.4)
    legend: dict[str, Any] = {}
    for index, (label, points) in enumerate(lines.items()):
        x, y, half = np.array(sorted(points)).T
        style = {"color": GREY} if label == "random" else {"color": COLOURS[index % 7]}
        style |= {"linestyle": "--", "color": "black"} if label == "stats" else {}
        legend[label] = axis.errorbar(x, y, half, marker="o", ms=3, lw=1, elinewidth=0.6, **style)
    for label, (mean, half) in flat.items():
        if label.startswith("stats"):
            legend[f"{label} (the floor)"] = axis.axhline(mean, color="black", ls="--", lw=1)
        else:
            axis.axhline(mean, color=GREY, lw=1)
            spread = 0 if math.isnan(half) else half
            legend[label] = axis.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.35)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    middles = [p[1] for points in lines.values() for p in points] + [m for m, _ in flat.values()]
    axis.set_ylim(max(0, min(middles) - 0.15 * max(middles)), 1.15 * max(middles))
    legend_below(figure, legend)
    return figure, axis


def draw_steps(table: Table):
    """F1 against the length of pre-training, a line for each; None where all have one length."""
    firsts = {row: table.of(row)[0] for row in table.rows}
    lines: dict[tuple, list[str]] = {}
    for row, r in firsts.items():
        if r.recipe and not math.isnan(r.epoch):
            lines.setdefault((r.recipe, r.pretraining, r.bn), []).append(row)
    lines = {key: rows for key, rows in lines.items() if len(rows) > 1}
    flat = [row for row in table.shown() if firsts[row].name in ("random", "stats")]
    drawn = [*itertools.chain(*lines.values()), *flat]
    bands = set(table.bands).intersection(*({r.bands for r in table.of(row)} for row in drawn))
    if not lines or not bands:
        return None
    points = {}
    for rows in lines.values():  # thin lines without whiskers
        last = max(rows, key=lambda row: firsts[row].epoch)
        points[last] = [(firsts[row].epoch, overall(table, row, bands)[0], 0.0) for row in rows]
    labels = "epochs of pre-training", value_name(table, bands)
    return draw_lines(points, {row: overall(table, row, bands) for row in flat}, labels)[0]


def value_name(table: Table, bands: Iterable[str]) -> str:
    metric = next(iter(SHOWN[table.first.stage].values()))
    return f"{metric}, mean of {', '.join(b for b in table.bands if b in bands)}"


def draw_labels(tables: list[Table]):
    """F1 against the number of labelled images, a line for each row; None with one number only."""
    rows = [{row: table for row in table.shown()} for table in tables]
    lines: dict[str, list[tuple]] = {}
    bands = set.intersection(*(set(t.bands) for t in tables))
    for row in dict.fromkeys(itertools.chain(*rows)):
        for table in tables:
            found = {r.bands for r in table.of(row)}
            x = table.first.train_images or table.first.config.get("train")
            if bands and bands <= found and x:
                lines.setdefault(row, []).append((float(x), *overall(table, row, bands)))
    if len(tables) < 2 or not any(len(points) > 1 for points in lines.values()):
        return None
    labels = "labelled images to learn from", value_name(tables[0], bands)
    figure, axis = draw_lines(lines, {}, labels)
    axis.set_xscale("log")
    places = sorted({int(x) for points in lines.values() for x, *_ in points})
    axis.set_xticks(places, map(str, places))
    axis.set_xticks([], minor=True)
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
            found = [100 * value for value in found if value == value]
            if found:
                values[i, j] = np.mean(found)
                style = {"color": "black" if values[i, j] > 50 else "white", "fontsize": 6,
                         "ha": "center", "va": "center", "in_layout": False}  # fmt: skip
                axis.text(j, i, f"{values[i, j]:.0f}", **style)
        axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axis.spines[:].set_visible(False)
        axis.set_xticks(range(len(table.bands)), table.bands, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(f"{short(row)}: IoU (%)", fontsize=9)
    return figure


def read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """features float64 [n, D] and labels int [n] of at most 2,000 images, drawn with a fixed seed;
    names of the classes, where the file has them. Without labels all are 0.

    ValueError says what no t-SNE can be made of: values that are not finite, fewer than two
    columns, features that are all alike, as those of a collapsed encoder are.
    """
    with np.load(path, allow_pickle=False) as file:
        features = file["features"]
        labels = file["labels"] if "labels" in file.files else np.zeros(len(features), int)
        names = tuple(map(clean, file["classes"])) if "classes" in file.files else ()
    if features.ndim != 2 or features.shape[1] < 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features {features.shape} and labels {labels.shape} do not fit")
    if features.dtype.kind != "f" or labels.dtype.kind not in "iu" or len(labels) < 12:
        raise ValueError(f"{len(labels)} features of {features.dtype}, labels of {labels.dtype}")
    kept = np.random.default_rng(0).permutation(len(labels))[:2000]
    features, labels = features[kept].astype(np.float64), labels[kept]
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    features /= max(np.abs(features).max(), 1e-300)
    features -= features.mean(0)
    if (spread := np.abs(features).max()) < 1e-6:
        raise ValueError("all features are alike: a collapsed encoder?")
    return features / spread, labels, names


def draw_tsne(files: list[tuple[str, Path]], names: tuple[str, ...], faults: list[str]):
    """t-SNE of embeddings, a panel for each file, on the first 50 principal components.

    Up to 20 classes have a colour each; of more, the names stand at the medians of their points.
    """
    panels = []
    for title, path in files:
        try:
            panels.append((title, *read_embeddings(path)))
        except Exception as error:  # np.load raises many kinds on broken archives
            faults.append(f"{path}: no embeddings: {why(error)}")
    if not panels:
        return None
    import matplotlib
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    figure, axes = new_figure(3 * len(panels), 3.4, columns=len(panels))
    colours, legend = matplotlib.colormaps["tab20"].colors, {}
    classes = np.unique(np.concatenate([labels for _, _, labels, _ in panels]))
    names = names or panels[0][3]
    word = {c: names[c] if 0 <= c < len(names) else str(c) for c in classes.tolist()}
    for axis, (title, features, labels, _) in zip(axes, panels, strict=True):
        features = PCA(min(50, *features.shape), random_state=0).fit_transform(features)
        tsne = TSNE(perplexity=min(30, len(labels) / 4), init="pca", random_state=0)
        with threadpool_limits(1):  # on a busy machine its threads wait for each other
            points = tsne.fit_transform(features)
        for index, c in enumerate(classes.tolist()):
            mine = points[labels == c]
            if len(classes) <= 20:
                legend[word[c]] = axis.scatter(*mine.T, 8, color=colours[index], linewidths=0)
            elif len(mine):
                axis.scatter(*mine.T, 4, color=colours[index % 20], linewidths=0, alpha=0.4)
                axis.text(*np.median(mine, axis=0), word[c], fontsize=5, ha="center")
        axis.set_title(short(title), fontsize=8)
        axis.set(xticks=[], yticks=[])
    if legend:
        legend_below(figure, legend)
    return figure


def draw_runs(runs: list[Run]):
    """What pre-training logged, by step; dotted where the schedule restarts."""
    shown = [key for key in LOGGED if any(np.isfinite(run.log[key]).any() for run in runs)]
    rows = -(-len(shown) // 2)
    figure, axes = new_figure(9, 2.1 * rows + 0.6, rows=rows, columns=2)
    legend: dict[str, Any] = {}
    for axis, key in itertools.zip_longest(axes, shown):
        if key is None:
            axis.set_axis_off()
            continue
        for index, run in enumerate(runs):
            there = np.isfinite(run.log[key])
            step, values = run.log["step"][there], run.log[key][there]
            many = max(1, len(step) // 500)  # a point is the mean of so many lines of the log
            cut = len(step) // many * many
            x, y = (v[:cut].reshape(-1, many).mean(1) for v in (step, values))
            style = {"color": COLOURS[index % 7], "ls": ["-", "--", "-."][index // 7 % 3]}
            (line,) = axis.plot(x, y, lw=1, marker="." if len(x) < 40 else "", **style)
            name = run.name if [r.name for r in runs].count(run.name) == 1 else str(run.folder)
            legend[clean(name)] = line
            if key == "lr":  # within a cycle of the cosine the rate only falls
                for restart in step[1:][np.diff(values) > 0]:
                    axis.axvline(restart, linestyle=":", lw=0.6, color=style["color"])
        axis.set(xlabel="step", ylabel=LOGGED[key])
        if key in ("std", "match"):
            axis.set_ylim(bottom=0)
    legend_below(figure, legend)
    return figure


def figure_bytes(figure) -> tuple[bytes, bytes]:
    """A figure as PNG and as SVG; the same figure gives the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.get_layout_engine().execute(figure)  # once, not again in each savefig: half of the time
    figure.set_layout_engine(None)
    figure.savefig(png, format="png", dpi=150)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


# ---------------------------------------------------------------------------- page

STYLE = """
:root{color-scheme:light dark;--line:#8885}
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:1rem;
overflow-wrap:anywhere}h1{font-size:1.5rem}
h2{font-size:1.15rem;margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.8rem}
th,td{padding:.25rem .4rem;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top}td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
thead th{border-bottom-width:2px;overflow-wrap:normal}th[scope=row]{font-weight:500;min-width:7rem}
small,figcaption,.note{font-size:.8rem;opacity:.8}figure{margin:1.5rem 0}
figure img{background:#fff;display:block;max-width:100%;height:auto}
.sheets{display:flex;flex-wrap:wrap;gap:1rem}.sheets figure{max-width:36rem;margin:0}
.verdict{border-left:4px solid #0072b2;padding:.2rem 1rem}
details{margin:.5rem 0}summary{cursor:pointer}
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


def html_image(kind: str, data: bytes, text: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (f'<figure><img src="{source}" alt="{escape(text)}">'
            f"<figcaption>{escape(text)}</figcaption></figure>\n")  # fmt: skip


def html_details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n" if body else ""


def html_results(table: Table) -> str:
    header, *rows = lines_of(table, escape, "<b>{}</b>", "<br><small>({})</small>")
    rows = [[cell.replace(" ± ", "<br>± ") for cell in row] for row in rows]
    return html_table(header, rows, len(table.columns))


def html_tests(table: Table) -> str:
    """The tests over all bands in common; those of each band are in tests.csv."""
    digits, rows = digits_of(table), []
    for t in table.tests:
        if t.bands == "mean":
            interval = f"{fixed(t.low_holm, digits)} to {fixed(t.high_holm, digits)}"
            rows.append([t.metric, t.kind, t.a, t.b, t.note or t.method, t.n,
                         fixed(t.difference, digits), interval, fixed(t.t, 2), fixed(t.df, 1),
                         p_text(t.p), p_text(t.p_holm),
                         f"{fixed(t.d, 2)} {t.effect}" * (t.d == t.d) or DASH])  # fmt: skip
    header = ["", "", "a", "b", "test", "n", "a − b", "95 % interval (Holm)", "t", "df", "p",
              "p (Holm)", "Cohen's d"]  # fmt: skip
    rows = [[escape(cell) for cell in row] for row in rows]
    note = ("<p class=note>Holm's correction runs over the pairs against random, those against "
            "stats and all others apart; the interval is corrected as its p is. Bands of one "
            "sensor are alike: p over bands is too small.</p>")  # fmt: skip
    return html_details("Tests", html_table(header, rows, 7) + note) if rows else ""


def beside(r: Result, ending: str) -> Path | None:
    path = r.path.with_name(r.path.stem + ending)
    return path if path.exists() else None


def read_sheet(path: Path) -> bytes:
    """A PNG as it is; raises whatever PIL does if it is none."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        image.load()
    return path.read_bytes()


def section_files(tables: list[Table]) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """(Caption, file) of example sheets, one of each kind a row; (title, file) of embeddings."""
    sheets, embeddings = {}, {}
    for table in tables:
        for row in table.shown():
            members = [row, *table.recipes.get(row, [])]
            for r in sorted((r for m in members for r in table.of(m)), key=lambda r: r.seed):
                for ending, what in (("-maps.png", "maps"), ("-cam.png", "class activation")):
                    if not r.pooled and (path := beside(r, ending)):
                        sheets.setdefault((row, ending), (f"{row}, {r.bands}, seed {r.seed}: "
                                                          f"{what}", path))  # fmt: skip
                if not r.pooled and (path := beside(r, "-embeddings.npz")):
                    embeddings.setdefault(row, (f"{row}, {r.bands}", path))
    return list(sheets.values())[:4], list(embeddings.values())[:4]


class Page:
    """The figures of a report, drawn one by one: what fails is named and left out."""

    def __init__(self, faults: list[str]) -> None:
        self.files: dict[str, bytes] = {}
        self.faults = faults

    def figure(self, name: str, text: str, draw: Callable, *args: Any) -> str:
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
        try:
            if (figure := draw(*args)) is None:
                return ""
            png, svg = figure_bytes(figure)
        except Exception as error:  # one odd input costs its figure, never the report
            self.faults.append(f"figure {name}: {why(error)}")
            return ""
        self.files |= {f"{name}.png": png, f"{name}.svg": svg}
        return html_image("svg+xml", svg, text)

    def sheet(self, text: str, path: Path) -> str:
        try:
            return html_image("png", read_sheet(path), text)
        except Exception as error:  # PIL raises many kinds on broken files
            self.faults.append(f"{path}: no PNG: {why(error)}")
            return ""


def main_of(tables: list[Table]) -> list[Table]:
    """The tables of a section that learnt from most labels: of one channel, of three."""
    return [t for t in tables if t.first.train_images == tables[0].first.train_images]


def html_section(page: Page, tables: list[Table], tsne: bool) -> str:
    """A section's answer with its figures and examples."""
    first, title = tables[0].first, tables[0].title
    stem = f"{tables[0].number:02d}-{first.stage}-{first.dataset}"
    metrics = " and ".join(SHOWN[first.stage].values())
    sheets, embeddings = section_files(main_of(tables))
    parts = [
        f"<h2>{escape(title)}</h2>\n",
        f"<p class=verdict>{escape(verdict(tables).removeprefix(title + ': '))}</p>\n",
        page.figure(f"{stem}-bars", f"{metrics} by bands; whiskers: 95 % interval", draw_bars,
                    main_of(tables)),
        *(page.figure(f"{stem}-{t.first.channels}ch-labels", "By number of labelled images",
                      draw_labels, [u for u in tables if u.first.channels == t.first.channels])
          for t in main_of(tables)),
        *(page.figure(f"{stem}-{t.first.channels}ch-steps", "By length of pre-training; grey: "
                      "random weights and their 95 % interval", draw_steps, t)
          for t in main_of(tables)),
        *(page.figure(f"{stem}-{t.first.channels}ch-classes", "IoU by class and band, mean over "
                      "seeds", draw_classes, t)
          for t in main_of(tables) if first.stage == "segment"),
        '<div class=sheets>', *(page.sheet(*sheet) for sheet in sheets), "</div>",
    ]  # fmt: skip
    if embeddings and tsne:
        parts.append(page.figure(f"{stem}-tsne", "t-SNE of the test images' embeddings",
                                 draw_tsne, embeddings, first.classes, page.faults))  # fmt: skip
    return "".join(parts)


def html_tables(tables: list[Table]) -> str:
    return "".join(f"<h3>{escape(caption(t))}</h3>\n{html_results(t)}<p class=note>"
                   f"{escape(notes(t))}</p>\n{html_tests(t)}" for t in tables)  # fmt: skip


def synthetic_line(results: list[Result], runs: list[Run]) -> str:
    """What was synthetic, if anything was."""
    found = {DATASETS.get(r.dataset, r.dataset) for r in results if r.synthetic}
    found |= {f"the tiles that {r.name} learnt from" for r in results if r.pretrained_on_synthetic}
    found |= {f"the tiles of run {run.name}" for run in runs if run.synthetic}
    return f"Synthetic, made by a program: {', '.join(sorted(found))}." if found else ""


# ---------------------------------------------------------------------------- writing


def write_file(path: Path, data: bytes) -> None:
    """Replace a file whole: a reader, or the next run after a kill, sees the old or the new."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(data)
    os.replace(beside, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, help="folder with the JSON of probe.py and segment.py")
    add("--out", type=Path, default=Path("report"), help="folder of the report (report)")
    add("--runs", type=Path, help="folder with the runs of pretrain.py (log.jsonl)")
    add("--no-tsne", action="store_true", help="leave out the t-SNE, the one slow figure")
    args = parser.parse_args(argv)
    for folder, writer in ((args.results, "probe.py and segment.py"), (args.runs, "pretrain.py")):
        if folder is not None and not folder.is_dir():
            fail(2, f"no folder {folder}: name the one that {writer} wrote to")
    return args


def without_synthetic(things: list, said: list[str], what: str) -> list:
    """Synthetic data, such as the demo's, never stand beside real ones in a report."""
    real = [thing for thing in things if not thing.synthetic]
    if real and len(real) < len(things):
        said.append(f"{len(things) - len(real)} {what} on synthetic images are left out: give "
                    "their folder alone for a report on them")  # fmt: skip
    return real or things


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    faults: list[str] = []
    said: list[str] = []
    paths = find_files(args.results, faults)
    results = without_synthetic(read_results(paths, faults), said, "results")
    runs = []
    for log in find_files(args.runs, faults) if args.runs else []:
        if log.name == "log.jsonl":
            try:
                run = read_run(log, faults)
                runs += [run] if len(run.log["step"]) else []
            except Exception as error:  # whatever a stranger's file leads to, it is named
                faults.append(f"{log}: the run cannot be read: {why(error)}")
    runs = without_synthetic(runs, said, "runs")
    if not results and not runs:
        for fault in faults:
            print(clean(f"analyze.py: left out: {fault}"), file=sys.stderr)
        fail(1, f"{args.results} holds no result that can be read: nothing to report")
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # now, not after the minutes of a t-SNE
    except OSError as error:
        fail(2, f"--out {args.out}: {error.strerror}")
    sections = build_tables(results, faults)
    for tables in sections:
        print(verdict(tables), flush=True)

    import matplotlib

    warnings.filterwarnings("ignore", message="Glyph")  # a name in a script the font lacks
    page = Page(faults)
    with matplotlib.rc_context(FONT):
        answers = [html_section(page, tables, not args.no_tsne) for tables in sections]
        loose = [(clean(p.stem), p) for p in paths
                 if p.suffix == ".npz" and not p.stem.endswith("-embeddings")][:4]  # fmt: skip
        curves = ""
        if loose and not args.no_tsne:
            text = "t-SNE of embeddings"
            answers.append(page.figure("tsne", text, draw_tsne, loose, (), faults))
        if runs:
            text = "Pre-training, by step. The std falls to 0 where the projection collapses."
            curves = page.figure("runs", text, draw_runs, runs)
            for run in runs[:4]:
                if (views := run.folder / "views.png").exists():
                    text = f"{run.name}: pairs as they are, and as the networks see them"
                    curves += page.sheet(text, views)
    every = [table for tables in sections for table in tables]
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    left_out = "".join(f"<li>{escape(fault)}</li>" for fault in said + faults)
    text = "".join([
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n',
        '<link rel="icon" href="data:,"><title>RS-BYOL report</title>',
        f"<style>{STYLE}</style></head>\n<body><h1>RS-BYOL: what the encoders learnt</h1>\n",
        f"<p>{escape(synthetic_line(results, runs))}</p>\n",
        *answers,
        f"<h2>Pre-training</h2>\n{curves}" if runs else "",
        "<h2>Tables and tests</h2>\n" if sections else "", *map(html_tables, sections),
        f"<h2>Left out</h2>\n<ul>{left_out}</ul>\n" if left_out else "",
        f"<p class=note>Made by analyze.py, {escape(versions)}.</p>\n</body></html>\n",
    ])  # fmt: skip
    cells = [about(t) | asdict(cell) for t in every for cell in t.cells]
    tests = [about(t) | asdict(test) for t in every for test in t.tests]
    texts = {"tables.md": tables_markdown(sections), "tables.tex": tables_latex(every),
             "tables.csv": csv_text(cells), "tests.csv": csv_text(tests),
             "index.html": text}  # fmt: skip
    try:
        for name, data in (page.files | {n: t.encode() for n, t in texts.items()}).items():
            write_file(args.out / name, data)
    except OSError as error:
        fail(1, f"--out {args.out}: {error.strerror}; the report is not complete")
    for line in said:
        print(clean(line))
    for fault in faults:
        print(clean(f"analyze.py: left out: {fault}"), file=sys.stderr)
    print(clean(str(args.out / "index.html")))
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail(130, "interrupted; the same command writes the report anew")
