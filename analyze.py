"""From saved results to tables, tests, plots and one page. Reads files only: no torch, no training.

    python analyze.py results/ --out report/               # tables, tests, plots, report/index.html
    python analyze.py results/ --out report/ --runs runs/  # and the curves of the pre-training runs
    python analyze.py --paper                              # the paper's Tables I to III alone

In: the JSON of probe.py and segment.py (schema 1), with NAME-embeddings.npz, NAME-cam.png and
NAME-maps.png beside NAME.json; log.jsonl and config.json of pretrain.py. Out, in one flat folder:
index.html (self-contained), tables.md, tables.csv, tables.tex, tests.csv, figures as PNG and SVG.
A value is the mean over seeds ± its 95 % t-interval; what is missing is a dash. What cannot be
read is named on stderr and left out; the exit status is then 1.
"""

import argparse
import base64
import csv
import functools
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
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import scipy
from scipy import stats

# ---------------------------------------------------------------------------- settings

SCHEMA = 1
MARKER = ".rs-byol-report"  # lists the files of a report; a folder without it is not ours to fill
ALPHA = 0.05
DASH = "–"
# Results that differ in one of these never share a table. Those that differ in one of
# ROW_SETTINGS only, or in the hash of the weights, are rows of their own in one table.
TABLE_SETTINGS = ("size", "classes", "head", "images")  # images: hash of the data set's list
ROW_SETTINGS = ("arch", "bn", "epochs", "stats", "augment", "lr", "batch")
RECIPE = ("command", "epoch", "seed")  # of an encoder's metadata
# flags of pretrain.py that say where, how fast and until when
IDLE_FLAGS = "out resume threads log-every checkpoint-every epochs max-steps".split()
METRICS = {  # what a result must hold; the tables show the metrics of SHOWN
    "probe": ("f1_macro", "f1_weighted", "accuracy"),
    "segment": ("miou", "aa", "pixel_accuracy"),
}
SHOWN = {"probe": {"f1_macro": "F1"}, "segment": {"miou": "mIoU", "aa": "AA"}}
PER_CLASS = {"probe": "f1_per_class", "segment": "iou_per_class"}
TITLES = {  # (stage, channels), in the order of the page
    ("segment", 1): "Segmentation by band (as the paper's Table I)",
    ("probe", 1): "Classification F1 by band (as the paper's Fig. 3)",
    ("probe", 3): "Classification F1, three channels (as the paper's Table II)",
    ("segment", 3): "Segmentation, three channels (as the paper's Table III)",
}
DATASETS = {
    "eurosat": "EuroSAT", "eurosat-rgb": "EuroSAT RGB (JPEG)", "sen12ms": "SEN12MS",
    "resisc45": "RESISC45", "dfc2020": "DFC2020",
}  # fmt: skip
WEIGHTS = {  # how a result may name a baseline: the paper's name
    "random": "Random init", "scratch": "Scratch supervised", "imagenet": "ImageNet supervised",
    "byol-imagenet": "BYOL ImageNet", "seco": "SeCo", "coco": "MS-COCO DeepLabV3",
    "imagenet-v2": "ImageNet supervised V2",
}  # fmt: skip
RANDOM, SCRATCH = "Random init", "Scratch supervised"  # new weights for each seed

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
    "Scratch supervised": "0.80 0.86 0.92 0.91 0.66 0.69 0.52 0.91",
    "Random init": "0.46 0.44 0.50 0.45 0.40 0.49 0.27 0.36",
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
ORDER = [
    "Random init", "Scratch supervised", "ImageNet supervised", "ImageNet supervised V2",
    "MS-COCO DeepLabV3", "BYOL ImageNet", "SeCo", "RS-BYOL-1 MS only", "RS-BYOL-1",
    "RS-BYOL-1 w/150K", "RS-BYOL-1 w/64BS", "RS-BYOL-3 RGB-S1S2", "RS-BYOL-3 S1S2",
]  # fmt: skip


def paper_value(settings: dict, name: str, metric: str, column: str) -> str:
    """The paper's figure for one cell, as printed there; "" where it has none.

    Only for the paper's data: DFC2020 with 8 classes, EuroSAT whole or 7000, SEN12MS 5000.
    """
    if settings["synthetic"]:
        return ""
    if settings["stage"] == "probe":
        place = (settings["dataset"], settings["subset"], column)
        if name in PAPER_II and place in PAPER_II_COLUMNS:
            return PAPER_II[name].split()[PAPER_II_COLUMNS.index(place)]
    elif settings["dataset"] == "dfc2020" and class_count(settings["classes"]) == 8:
        for paper, columns in ((PAPER_I, [*BANDS, "mean"]), (PAPER_III, [*TRIPLES.values()])):
            if (name, metric) in paper and column in columns:
                return paper[name, metric].split()[columns.index(column)]
    return ""


def paper_tables() -> list[tuple[str, list[str], list[list[str]]]]:
    """The paper's tables and t-tests between the variants of its Table I: (title, header, rows)."""

    def segmentation(paper: dict) -> list[list[str]]:
        return [[name, SHOWN["segment"][m], *row.split()] for (name, m), row in paper.items()]

    sizes = {7000: " 7K", 5000: " 5K", None: ""}
    second = [f"{DATASETS[data]}{sizes[n]} {bands}" for data, n, bands in PAPER_II_COLUMNS]
    tests = []
    for metric, label in SHOWN["segment"].items():
        rows = {
            n: np.array(row.split()[:12], float) for (n, m), row in PAPER_I.items() if m == metric
        }
        pairs = [paired_test(rows[a], rows[b]) | {"a": a, "b": b, "metric": label}
                 for a, b in itertools.combinations(rows, 2)]  # fmt: skip
        tests += [row[:-2] for row in test_rows(correct(pairs), digits=2)]  # without Wilcoxon
    return [
        ("The paper's Table I: DFC2020, one channel, %", ["weights", "", *BANDS, "mean"],
         segmentation(PAPER_I)),
        ("The paper's Table II: classification F1, three channels", ["weights", *second],
         [[name, *row.split()] for name, row in PAPER_II.items()]),
        ("The paper's Table III: DFC2020, three channels, % (which column is SeCo's is inferred)",
         ["weights", "", *TRIPLES.values()], segmentation(PAPER_III)),
        ("Paired t-tests over the 12 bands of the paper's Table I, computed here, points of %",
         PAIRED_HEADER[:-2], tests),
    ]  # fmt: skip


# ---------------------------------------------------------------------------- reading


def fail(status: int, message: str) -> NoReturn:
    """End with one line on stderr: status 2 for wrong use, 1 for bad data."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def find_files(root: Path, faults: list[str]) -> list[Path]:
    """Every file under `root` whose name does not start with a dot, sorted."""
    unread = os.walk(root, onerror=lambda error: faults.append(f"{error.filename}: {error}"))
    return sorted(
        Path(folder, name) for folder, _, names in unread for name in names if name[0] != "."
    )


def flaw(data: object) -> str:
    """What keeps `data` from being a result of probe.py or segment.py; "" if nothing does."""
    if type(data) is not dict or "schema" not in data:
        return 'no result: it has no "schema"'
    if type(data["schema"]) is not int or data["schema"] != SCHEMA:
        return f"schema {data['schema']!r} is unknown: this analyze.py reads schema {SCHEMA}"
    if data.get("stage") not in list(METRICS):
        return f"stage {data.get('stage')!r} is unknown: expected one of {', '.join(METRICS)}"
    kinds = {"dataset": str, "split": str, "weights": dict, "bands": list, "seed": int,
             "metrics": dict, "config": dict}  # fmt: skip
    for key, kind in kinds.items():
        if type(data.get(key)) is not kind:
            return f'"{key}" is missing or not of type {kind.__name__}'
    if type(data.get("subset")) not in (int, type(None)):
        return f'"subset" is {data["subset"]!r}: expected a number of images or null'
    if type(data["weights"].get("name")) is not str:
        return '"weights" has no "name"'
    if unknown := [band for band in data["bands"] if band not in BANDS] or not data["bands"]:
        return f'"bands" holds {unknown}: expected names among {" ".join(BANDS)}'

    def number(value: object, most: float) -> bool:
        return type(value) in (int, float) and 0 <= value <= most

    metrics, key = data["metrics"], PER_CLASS[data["stage"]]
    for name in METRICS[data["stage"]]:
        if not number(metrics.get(name), 1):
            return f'metric "{name}" is {metrics.get(name)!r}: expected a number from 0 to 1'
    shares = [*metrics[key].values()] if type(metrics.get(key)) is dict else []
    if not shares or not all(share is None or number(share, 1) for share in shares):
        return f'metric "{key}" is missing or holds no number from 0 to 1'
    rows = metrics.get("confusion")
    lists = type(rows) is list and all(type(row) is list for row in rows)
    if not lists or not rows or {len(row) for row in rows} != {len(rows)}:
        return 'metric "confusion" is missing or not square'
    if not all(number(x, sys.float_info.max) for row in rows for x in row):
        return 'metric "confusion" holds something that is no count'
    return ""


def read_results(paths: list[Path], faults: list[str]) -> list[dict]:
    """The results among the *.json of `paths`, each with its "path"; others go to `faults`."""
    results = []
    for path in paths:
        if path.suffix != ".json":
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            problem = flaw(result)
        except (OSError, ValueError, RecursionError) as error:
            problem = f"cannot be read: {error}"
        if problem:
            faults.append(f"{path}: {problem}")
        else:
            results.append(result | {"path": path})
    return results


def read_run(log: Path, faults: list[str]) -> dict:
    """A pre-training run: {"name", "config", "step": [...], "loss": [...], "lr": ..., "std": ...}.

    A last line that breaks off is skipped silently: the run may be writing it.
    """
    run = {"name": log.parent.name, "config": {}, "step": [], "loss": [], "lr": [], "std": []}
    config = log.with_name("config.json")
    try:
        if config.exists() and type(saved := json.loads(config.read_text("utf-8"))) is dict:
            run["config"] = saved
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{log}: the run cannot be read: {error}")
        return run
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            values = [float(entry[key]) for key in ("step", "loss", "lr", "std")]
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith("\n"):
                faults.append(f"{log}: line {number} is no step of a run; this line is left out")
            continue
        for key, value in zip(("step", "loss", "lr", "std"), values, strict=True):
            run[key].append(value)
    return run


# ---------------------------------------------------------------------------- tests


@functools.cache
def t_quantile(df: int) -> float:
    return float(stats.t.ppf(1 - ALPHA / 2, df))


def summarise(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval, which is NaN for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return float(np.mean(values)), t_quantile(len(values) - 1) * float(stats.sem(values))


def rounding(a: np.ndarray, b: np.ndarray) -> float:
    """The spread that rounding alone may give to values as large as those of `a` and `b`."""
    return 1e-12 * float(np.abs(np.concatenate([a, b])).max())


def paired_test(a: np.ndarray, b: np.ndarray) -> dict:
    """Paired t-test of a - b over bands, and Cohen's d: mean / std of the differences.

    a, b: float [n], the same bands in the same order. Fewer than three pairs are not tested: the
    dict then holds only n, difference and a note.
    """
    difference = a - b
    test = {"n": len(a), "difference": float(difference.mean()) if len(a) else math.nan}
    if len(a) < 3:
        return test | {"note": "fewer than three pairs: not tested"}
    if np.ptp(difference) <= rounding(a, b):
        return test | {"note": "all differences equal: not tested"}
    t = stats.ttest_rel(a, b)
    low, high = t.confidence_interval(1 - ALPHA)
    return test | {
        "t": float(t.statistic), "df": float(t.df), "p": float(t.pvalue),
        "low": float(low), "high": float(high),
        "d": test["difference"] / float(difference.std(ddof=1)),
    }  # fmt: skip


def welch_test(a: np.ndarray, b: np.ndarray) -> dict:
    """Welch's t-test of a - b over seeds; Cohen's d on the mean of the two variances."""
    test = {"n": f"{len(a)}, {len(b)}"}
    test["difference"] = float(a.mean() - b.mean()) if len(a) and len(b) else math.nan
    if min(len(a), len(b)) < 2:
        return test | {"note": "fewer than two seeds: not tested"}
    if max(np.ptp(a), np.ptp(b)) <= rounding(a, b):
        return test | {"note": "no spread over seeds: not tested"}
    with warnings.catch_warnings():  # of one constant sample: its variance is 0, as it should be
        warnings.simplefilter("ignore", RuntimeWarning)
        t = stats.ttest_ind(a, b, equal_var=False)
    low, high = t.confidence_interval(1 - ALPHA)
    spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return test | {
        "t": float(t.statistic), "df": float(t.df), "p": float(t.pvalue),
        "low": float(low), "high": float(high), "d": test["difference"] / spread,
    }  # fmt: skip


def correct(tests: list[dict]) -> list[dict]:
    """Add "p_holm" (Holm 1979) to those of one family of tests that have a "p"; returns `tests`."""
    tested = sorted((test for test in tests if "p" in test), key=lambda test: test["p"])
    largest = 0.0
    for rank, test in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * test["p"]))
        test["p_holm"] = largest
    return tests


# ---------------------------------------------------------------------------- tables


def class_count(classes: object) -> int | None:
    return len(classes) if isinstance(classes, (list, dict)) else classes


def is_true(value: object) -> bool:
    return value is True or str(value).lower() == "true"  # safetensors metadata holds strings only


def column_of(result: dict) -> str:
    bands = tuple(result["bands"])
    return TRIPLES.get(bands, "+".join(bands))


def table_settings(result: dict) -> dict:
    """What every result of one table has in common."""
    config = result["config"]
    settings = {key: result.get(key) for key in ("stage", "dataset", "split", "subset")}
    settings |= {key: config.get(key) for key in TABLE_SETTINGS}
    if settings["classes"] is None:
        settings["classes"] = sorted(result["metrics"][PER_CLASS[result["stage"]]])
    settings["channels"] = len(result["bands"])
    settings["confusion"] = len(result["metrics"]["confusion"])
    return settings | {"synthetic": is_true(config.get("synthetic"))}


def row_settings(result: dict) -> dict:
    """What sets the rows of one table apart: weights by name and hash, and how they were used."""
    name = result["weights"]["name"]
    name = WEIGHTS.get(name.split(":")[0].strip().lower(), name)
    # random and scratch draw new weights for each seed, so their hash is no other encoder
    sha = "" if name in (RANDOM, SCRATCH) else str(result["weights"].get("sha256") or "")
    row = {"name": name, "sha256": sha[:8]}
    row |= {key: result["config"].get(key) for key in ROW_SETTINGS}
    return row | ({"bn": None} if name == SCRATCH else {})  # its BatchNorm is trained


def file_of(result: dict) -> str:
    """The file of the weights in short: "plain-seed0", "plain-seed0/encoder-epoch0070"."""
    file = Path(str(result["weights"].get("source") or ""))
    return "/".join(part for part in (file.parent.name, file.stem) if part not in ("", "encoder"))


def recipe_of(result: dict) -> tuple[str, str]:
    """How pretrain.py made the encoder, without its seed, and the seed; "" for other weights.

    From the command in the encoder's metadata, its flags in any order, and the epoch.
    """
    about = result["config"].get("encoder")
    if type(about) is not dict or not all(type(about.get(k)) is str for k in RECIPE):
        return "", ""
    script, *flags = about["command"].split(" --")
    flags = sorted(flag.replace("=", " ", 1).strip() for flag in flags)
    kept = [flag for flag in flags if flag.split(" ")[0] not in ("seed", *IDLE_FLAGS)]
    return json.dumps([Path(script).name, about["epoch"], *kept]), about["seed"]


def build_tables(results: list[dict], faults: list[str]) -> list[dict]:
    """Sort results into tables: {"settings", "columns", "rows": [{"name", "label", "runs"}], ...}.

    A row's "runs" is {column: {seed: result}}. A second result for one seed of one cell is named in
    `faults` and left out. "cells" and "tests" are added by fill_cells, "apart" by tell_apart.
    """
    grouped: dict[str, dict[str, dict]] = {}
    for result in results:
        rows = grouped.setdefault(json.dumps(table_settings(result), sort_keys=True), {})
        runs = rows.setdefault(json.dumps(row_settings(result)), {})
        seeds = runs.setdefault(column_of(result), {})
        if first := seeds.get(result["seed"]):
            old, new = first["config"], result["config"]
            other = sorted(key for key in old | new if old.get(key) != new.get(key))
            why = f" (settings that differ: {', '.join(other)})" if other else ""
            faults.append(f"{result['path']}: the same run as {first['path']}, which is kept{why}")
        else:
            seeds[result["seed"]] = result
    tables = []
    for key, rows in grouped.items():
        table = {"settings": json.loads(key), "rows": []}
        firsts = [next(iter(next(iter(runs.values())).values())) for runs in rows.values()]
        table["settings"]["root"] = str(firsts[0]["config"].get("root") or "")
        about = [json.loads(row) for row in rows]
        files = {row["sha256"]: file_of(first) for row, first in zip(about, firsts, strict=True)}
        places = list(files.values())
        for sha, place in files.items():  # the file's name instead, where it tells them apart
            files[sha] = place if place and places.count(place) == 1 else sha
        mixed = len({row["bn"] for row in about} - {None}) > 1  # then each frozen row names its own
        for row, runs, first in zip(about, rows.values(), firsts, strict=True):
            same = [other for other in about if other["name"] == row["name"]]
            differ = [k for k in row if any(other[k] != row[k] for other in same)
                      or k == "bn" and mixed and row["bn"]]  # fmt: skip
            extra = {k: files[row[k]] if k == "sha256" else f"{k} {row[k]}" for k in differ}
            label = row["name"] + (f" ({', '.join(extra.values())})" if extra else "")
            recipe, seed = recipe_of(first)
            recipe = recipe and recipe + json.dumps(row | {"sha256": ""})  # and how it was used
            table["rows"].append({"name": row["name"], "label": label, "runs": runs, "extra": extra,
                                  "recipe": recipe, "pretrain_seed": seed})  # fmt: skip
        rank = {name: index for index, name in enumerate(ORDER)}
        table["rows"].sort(key=lambda row: (rank.get(row["name"], len(rank)), row["label"]))
        rank = {name: index for index, name in enumerate([*BANDS, *TRIPLES.values()])}
        columns = {column for row in table["rows"] for column in row["runs"]}
        table["columns"] = sorted(columns, key=lambda column: (rank.get(column, len(rank)), column))
        fill_cells(table)
        tables.append(table)
    places = list(TITLES)
    kinds = [(t["settings"]["stage"], t["settings"]["channels"]) for t in tables]
    order = [places.index(kind) if kind in places else len(places) for kind in kinds]
    ranked = sorted(zip(order, kinds, grouped, tables, strict=True), key=lambda entry: entry[:3])
    for number, (*_, table) in enumerate(ranked, 1):
        table["number"] = number
    tell_apart(tables)
    return [table for *_, table in ranked]


def values_of(row: dict, column: str, metric: str) -> np.ndarray:
    """float [seeds], in % for segmentation; in the column "mean" each seed's mean over bands."""
    if column == "mean":
        common = set.intersection(*(set(seeds) for seeds in row["runs"].values()))
        bands = [[seeds[s] for s in sorted(common)] for seeds in row["runs"].values()]
        return np.mean([[value_of(result, metric) for result in runs] for runs in bands], axis=0)
    runs = row["runs"].get(column, {})
    return np.array([value_of(runs[seed], metric) for seed in sorted(runs)])


def value_of(result: dict, metric: str) -> float:
    return result["metrics"][metric] * (100 if result["stage"] == "segment" else 1)


def pretrainings(rows: list[dict]) -> list[dict]:
    """For each recipe that was pre-trained with several seeds a row {"name", "label", "runs"}.

    Its runs are {column: {seed of the pre-training: the mean over the probe's seeds, as a result}}.
    """
    recipes: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["recipe"]:
            recipes.setdefault(row["recipe"], {}).setdefault(row["pretrain_seed"], row)
    several = []
    for found in recipes.values():
        if len(found) > 1:
            name, same = (next(iter(found.values()))[key] for key in ("name", "extra"))
            files = "; ".join(row["extra"]["sha256"] for row in found.values())
            extra = ", ".join((same | {"sha256": files}).values())
            columns = set.intersection(*(set(row["runs"]) for row in found.values()))
            runs = {column: {seed: mean_result(row["runs"][column]) for seed, row in found.items()}
                    for column in columns}  # fmt: skip
            label = f"{len(found)} x {name} ({extra})"
            several.append({"name": name, "label": label, "runs": runs})
    return several


def mean_result(seeds: dict[int, dict]) -> dict:
    """The mean of some results' metrics as a result."""
    stage = next(iter(seeds.values()))["stage"]
    means = {metric: float(np.mean([result["metrics"][metric] for result in seeds.values()]))
             for metric in SHOWN[stage]}  # fmt: skip
    return {"stage": stage, "metrics": means}


def welch_tests(
    pairs: list[tuple[dict, dict]], columns: list[str], metric: str, shown: str
) -> list[dict]:
    """Welch's t-tests of pairs of rows in each column, corrected for the pairs of that column."""
    tests = []
    for column in columns:
        family = []
        for a, b in pairs:
            if column in a["runs"] and column in b["runs"]:
                test = {"a": a["label"], "b": b["label"], "metric": shown, "column": column}
                both = (values_of(row, column, metric) for row in (a, b))
                family.append(test | welch_test(*both))
        tests += correct(family)
    return tests


def fill_cells(table: dict) -> None:
    """Add "cells" {(label, metric, column): {mean, half, n, paper, bold}} and the tests to `table`.

    The column "mean" (one channel only) holds the mean over bands of rows that have every band.
    """
    settings, rows, bands = table["settings"], table["rows"], list(table["columns"])
    with_mean = settings["channels"] == 1 and len(bands) > 1
    table["columns"] = bands + ["mean"] * with_mean
    table["cells"], table["paired"], table["welch"], table["pretrainings"] = {}, [], [], []
    several = table["several"] = pretrainings(rows)
    drawn = [row for row in rows if row["name"] in (RANDOM, SCRATCH)]  # new weights for each seed
    for metric, shown in SHOWN[settings["stage"]].items():
        means = {}  # label: {band: mean over seeds}
        for row in rows:
            means[row["label"]] = {}
            draws = {frozenset(seeds) for seeds in row["runs"].values()}
            for column in table["columns"]:
                cell = {"paper": paper_value(settings, row["name"], metric, column), "bold": False}
                whole = column != "mean" or len(row["runs"]) == len(bands)
                values = values_of(row, column, metric) if whole else []
                cell["n"], (cell["mean"], cell["half"]) = len(values), summarise(list(values))
                if column != "mean" and cell["n"]:
                    means[row["label"]][column] = cell["mean"]
                elif column == "mean" and whole and len(draws) > 1:
                    cell["half"] = math.nan  # bands of other seeds: a mean of means, no interval
                    cell["mean"] = float(np.mean([*means[row["label"]].values()]))
                table["cells"][row["label"], metric, column] = cell
        paired = []
        for a, b in itertools.combinations(rows, 2):
            both = [c for c in bands if c in a["runs"] and c in b["runs"]]
            one, two = (np.array([means[r["label"]][c] for c in both]) for r in (a, b))
            test = {"a": a["label"], "b": b["label"], "metric": shown, "column": "mean"}
            test |= paired_test(one, two)
            if "p" in test:
                rank = stats.wilcoxon(one, two)
                test |= {"w": float(rank.statistic), "p_w": float(rank.pvalue)}
            paired.append(test)
        table["paired"] += correct(paired)
        pairs = list(itertools.combinations(rows, 2))
        table["welch"] += welch_tests(pairs, bands, metric, shown)
        pairs = list(itertools.combinations(several, 2)) + list(itertools.product(several, drawn))
        table["pretrainings"] += welch_tests(pairs, bands, metric, shown)
        mark_best(table, metric, shown)


def mark_best(table: dict, metric: str, shown: str) -> None:
    """Set "bold" where the best of a column differs significantly from the second best (BOLD)."""
    holm = {}
    for test in table["paired"] + table["welch"]:
        if test["metric"] == shown:
            holm[test["column"], frozenset((test["a"], test["b"]))] = test.get("p_holm", 1.0)
    for column in table["columns"]:
        cells = {
            row["label"]: table["cells"][row["label"], metric, column] for row in table["rows"]
        }
        there = [label for label in cells if not math.isnan(cells[label]["mean"])]
        there.sort(key=lambda label: -cells[label]["mean"])
        if len(there) > 1:
            cells[there[0]]["bold"] = holm[column, frozenset(there[:2])] < ALPHA


BOLD = (
    "Bold: the best of its column, where it differs from the second best with p < 0.05 after "
    "Holm's correction over all pairs of that column (Welch's t-test over seeds; in the column "
    "mean, the paired t-test over bands)."
)


def title_of(table: dict) -> str:
    settings = table["settings"]
    kind = (settings["stage"], settings["channels"])
    what = {"probe": "Classification F1", "segment": "Segmentation"}[settings["stage"]]
    title = TITLES.get(kind, f"{what}, {settings['channels']} channels")
    return f"{table['number']}. {title}: {subject_of(table)}"


def dataset_of(settings: dict) -> str:
    """Its name; of a user's own, where its list of images lies: "csv bigearthnet/tiles.csv"."""
    where = "/".join(Path(settings["root"]).parts[-2:])
    name = DATASETS.get(settings["dataset"]) or f"{settings['dataset']} {where}".strip()
    return name + (" (SYNTHETIC images)" if settings["synthetic"] else "")


def subject_of(table: dict) -> str:
    """The data set, and what sets this table apart from others of it."""
    return ", ".join([dataset_of(table["settings"]), *table["apart"]])


def phrases_of(settings: dict) -> dict[str, str]:
    """Setting of a table -> how a title or caption says it."""
    few = "whole data set" if settings["subset"] is None else f"subset {settings['subset']}"
    phrases = {"images": f"images {str(settings['images'])[:8]}"} if settings["images"] else {}
    phrases |= {"split": f"split {settings['split']}", "subset": few}
    for key in ("size", "head"):
        if settings[key] is not None:
            phrases[key] = f"{key} {settings[key]}"
    return phrases | {"classes": f"{class_count(settings['classes'])} classes"}


def tell_apart(tables: list[dict]) -> None:
    """Add "apart": what sets a table apart from those of the same data set, stage and channels."""
    same = ("stage", "channels", "dataset", "synthetic")
    for table in tables:
        mine = table["settings"]
        others = [phrases_of(other["settings"]) for other in tables
                  if all(other["settings"][key] == mine[key] for key in same)]  # fmt: skip
        table["apart"] = [phrase for key, phrase in phrases_of(mine).items()
                          if any(other.get(key) != phrase for other in others)]  # fmt: skip


def settings_of(table: dict) -> str:
    """What the results of a table have in common, as a phrase."""
    settings = table["settings"]
    phrases = phrases_of(settings)
    if settings["dataset"] in DATASETS and phrases.get("images") not in table["apart"]:
        phrases.pop("images", None)  # a user's own data are named by their hash
    return ", ".join([dataset_of(settings), *phrases.values()])


def caption_of(table: dict) -> str:
    """What the table is made of, and how to read it."""
    settings = table["settings"]
    counts = {cell["n"] for (*_, c), cell in table["cells"].items() if cell["n"] and c != "mean"}
    few = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    unit = "mIoU and AA in %" if settings["stage"] == "segment" else "macro F1"
    words = [f"{settings_of(table)}. {unit}, mean over {few} seed(s) ± 95 % t-interval."]
    if any(cell["paper"] for cell in table["cells"].values()):
        words.append("In brackets: the paper's figure.")
    if settings["synthetic"]:
        words.append("The paper's figures are of real images, so none stands here.")
    if "mean" in table["columns"]:
        words.append("Mean: over bands, where a row has every band.")
    return " ".join([*words, f"{DASH}: no result.", BOLD])


def digits_of(table: dict) -> int:
    return 1 if table["settings"]["stage"] == "segment" else 3


def table_lines(table: dict, plain: Callable[[str], str], bold: str):
    """Each line of a table: ([label, metric], values "57.9 ± 0.3", the paper's figures or "").

    `plain` escapes a text; `bold` is a format for the best of a column.
    """
    digits, metrics = digits_of(table), SHOWN[table["settings"]["stage"]]
    for row, metric in itertools.product(table["rows"], metrics):
        cells = [table["cells"][row["label"], metric, column] for column in table["columns"]]
        texts = []
        for cell in cells:
            half = "" if math.isnan(cell["half"]) else f" ± {cell['half']:.{digits}f}"
            text = plain(fixed(cell["mean"], digits) + half)
            texts.append(bold.format(text) if cell["bold"] else text)
        yield [plain(row["label"]), metrics[metric]], texts, [cell["paper"] for cell in cells]


def result_rows(table: dict, plain: Callable[[str], str], bold: str, paper: str) -> tuple:
    """Header and rows of a table; `paper` is a format for the paper's figure behind a value."""
    rows = [
        head + [text + (paper.format(figure) if figure else "")
                for text, figure in zip(texts, figures, strict=True)]
        for head, texts, figures in table_lines(table, plain, bold)
    ]  # fmt: skip
    return ["weights", "", *map(plain, table["columns"])], rows


PAIRED_HEADER = ["", "a", "b", "pairs", "a − b", "95 % interval", "t", "df", "p", "p (Holm)",
                 "Cohen's d", "Wilcoxon W", "p (W)"]  # fmt: skip
WELCH_HEADER = ["", "band", "a", "b", "seeds", *PAIRED_HEADER[4:11]]


def fixed(value: float | None, digits: int) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def p_text(p: float | None) -> str:
    return DASH if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def test_rows(tests: list[dict], digits: int, band: bool = False) -> list[list[str]]:
    """Tests as rows of text under PAIRED_HEADER, or under WELCH_HEADER with `band`."""
    rows = []
    for test in tests:
        get = test.get
        interval = f"{test['low']:.{digits}f} to {test['high']:.{digits}f}" if "p" in test else DASH
        rows.append([
            test["metric"], *([test["column"]] if band else []), test["a"], test["b"],
            str(test["n"]), fixed(test["difference"], digits), get("note", interval),
            fixed(get("t"), 3), fixed(get("df"), 1 if band else 0), p_text(get("p")),
            p_text(get("p_holm")), fixed(get("d"), 2),
        ] + ([] if band else [fixed(get("w"), 1), p_text(get("p_w"))]))  # fmt: skip
    return rows


def verdicts(table: dict) -> list[str]:
    """One sentence for each pre-trained encoder of a table: does it beat random weights?

    By the paired t-test over bands where there are three bands, else by Welch's over seeds on the
    mean of the bands in common. One for each recipe of several pre-trainings: by Welch's over them.
    Of random rows that were used in several ways, the one of most bands in common and best there.
    """
    digits, start = digits_of(table), f"Table {table['number']}, {subject_of(table)}"
    randoms = [row for row in table["rows"] if row["name"] == RANDOM]
    ours = [row for row in table["rows"] if row["name"] not in WEIGHTS.values()]
    metric, shown = next(iter(SHOWN[table["settings"]["stage"]].items()))
    if not randoms or not ours:
        return [f"{start}: no {'random' if ours else 'pre-trained'} encoder, so no verdict."]
    lines = []
    for mine in ours + table["several"]:
        shared = []  # the bands in common with each random row, and its mean there
        for row in randoms:
            common = [c for c in table["columns"] if c in mine["runs"] and c in row["runs"]]
            means = [table["cells"][row["label"], metric, column]["mean"] for column in common]
            shared.append((len(common), float(np.mean(means or [0])), common, row))
        _, _, common, random = max(shared, key=lambda entry: entry[:2])
        names = f"pre-trained {mine['label']}", random["label"]
        if not common:
            lines.append(f"{start}: {names[0]} and {names[1]} have no band in common: no verdict.")
            continue
        pair = {mine["label"], random["label"]}
        test = next((t for t in table["paired"]
                     if t["metric"] == shown and {t["a"], t["b"]} == pair), {})  # fmt: skip
        sign = 1 if test.get("a") == mine["label"] else -1
        how = f"paired over {test.get('n')} bands, Holm-corrected"
        if "p" not in test:
            both = [{"runs": {c: row["runs"][c] for c in common}} for row in (mine, random)]
            test, sign = welch_test(*(values_of(row, "mean", metric) for row in both)), 1
            join = " pre-trainings and " if mine in table["several"] else " and "
            over = test["n"].replace(", ", join)
            how = f"Welch over {over} seeds, mean of {', '.join(common)}"
        gap = sign * test["difference"]
        low, high = sorted(sign * test.get(end, math.nan) for end in ("low", "high"))
        if "p" not in test:
            lines.append(
                f"{start}: {names[0]} less {names[1]}: {gap:+.{digits}f} {shown}; {test['note']}."
            )
            continue
        p = test.get("p_holm", test["p"])
        what = f"beats {names[1]} by" if gap > 0 else f"is WORSE than {names[1]} by"
        gap = abs(gap) if p < ALPHA else gap
        what = what if p < ALPHA else f"does NOT beat {names[1]} significantly:"
        p_is = p_text(p) if p < 0.0001 else f"= {p_text(p)}"
        lines.append(
            f"{start}: {names[0]} {what} {gap:.{digits}f} {shown} (95 % interval of the difference "
            f"{low:+.{digits}f} to {high:+.{digits}f}; p {p_is}; {how})."
        )
    return lines


# ---------------------------------------------------------------------------- text


def plain_markdown(text: str) -> str:
    return "".join("\\" + c if c in "\\|*_<>[]`#" else c for c in " ".join(text.split()))


def plain_latex(text: str) -> str:
    """Text as LaTeX that pdflatex sets with no package; what it cannot set becomes "?"."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
               "±": r"$\pm$", "−": "$-$", DASH: "--", "<": "$<$", ">": "$>$"}  # fmt: skip
    special |= {c: "\\" + c for c in "&%$#_{}"}
    out = []
    for c in " ".join(text.split()):
        ascii_only = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        out.append(special.get(c) or "".join(special.get(a, a) for a in ascii_only) or "?")
    return "".join(out)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown_of_text(title: str, header: list[str], rows: list[list[str]]) -> str:
    escaped = [[plain_markdown(cell) for cell in row] for row in [header, *rows]]
    return f"## {plain_markdown(title)}\n\n{markdown_table(escaped[0], escaped[1:])}"


def tables_markdown(tables: list[dict]) -> str:
    parts = []
    for table in tables:
        body = markdown_table(*result_rows(table, plain_markdown, "**{}**", " ({})"))
        title, caption = plain_markdown(title_of(table)), plain_markdown(caption_of(table))
        parts.append(f"## {title}\n\n{body}\n{caption}\n")
    return "\n".join(parts)


def tables_latex(tables: list[dict]) -> str:
    r"""One table environment for each table; needs \usepackage{booktabs,graphicx}."""
    parts = ["% Written by analyze.py. Needs \\usepackage{booktabs,graphicx}.\n"]
    for table in tables:
        lines = []
        for head, texts, figures in table_lines(table, plain_latex, r"\textbf{{{}}}"):
            lines.append(head + texts)
            if any(figures):
                lines.append([r"\quad the paper", head[1], *figures])
        header = ["weights", "", *map(plain_latex, table["columns"])]
        body = [" & ".join(line) + r" \\" for line in [header, *lines]]
        caption = caption_of(table).replace("In brackets: the paper's figure.", "")
        parts.append("\n".join([
            r"\begin{table*}", r"\centering",
            rf"\caption{{{plain_latex(title_of(table).split('. ', 1)[1] + '. ' + caption)}}}",
            rf"\label{{tab:rsbyol-{table['number']}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{ll{'r' * len(table['columns'])}}}", r"\toprule", body[0],
            r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}}", r"\end{table*}", "",
        ]))  # fmt: skip
    return "\n".join(parts)


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV under the union of their keys; missing is a dash (pandas: na_values="-")."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="-", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        missing = ("", None)
        writer.writerow({key: "-" if v in missing or v != v else v for key, v in row.items()})
    return text.getvalue()


def about_csv(table: dict) -> dict:
    about = {"table": table["number"]} | table["settings"]
    return about | {"classes": class_count(about["classes"])}


def tables_csv(tables: list[dict]) -> str:
    rows = []
    for table in tables:
        metrics = SHOWN[table["settings"]["stage"]]
        for row, metric, column in itertools.product(table["rows"], metrics, table["columns"]):
            cell = table["cells"][row["label"], metric, column]
            names = {"weights": row["label"], "bands": column, "metric": metrics[metric]}
            values = {"seeds": cell["n"], "mean": cell["mean"], "half_width_95": cell["half"]}
            marks = {"paper": cell["paper"], "bold": cell["bold"]}
            rows.append(about_csv(table) | names | values | marks)
    return csv_text(rows)


def tests_csv(tables: list[dict]) -> str:
    kinds = (("paired", "paired t over bands"), ("welch", "Welch over seeds"),
             ("pretrainings", "Welch over pre-trainings"))  # fmt: skip
    rows = [about_csv(table) | {"test": name} | test
            for table in tables for kind, name in kinds for test in table[kind]]  # fmt: skip
    return csv_text(rows)


# ---------------------------------------------------------------------------- plots

# Okabe and Ito's colours for colour-blind readers; hatches tell bars apart in black and white
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555"]
HATCHES = ["", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++"]
MARKERS = "os^vDPX*"
PAPER_MARK = {"marker": "D", "linestyle": "", "markersize": 3.5, "markerfacecolor": "white",
              "markeredgecolor": "black"}  # fmt: skip
FONT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "rs-byol", "hatch.linewidth": 0.5,
        "text.parse_math": False}  # fmt: skip  # a name may hold dollars


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of `width` x `height` inches and its axes as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def legend_below(figure, axis, columns: int, size: int = 8) -> None:
    """The labels of `axis` under all axes, in so many columns or in fewer that fit the width."""
    handles, labels = axis.get_legend_handles_labels()
    widest = (5 + 0.6 * max(map(len, labels))) * size / 72  # inches, the handle included
    columns = max(1, min(columns, int(figure.get_figwidth() / widest)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=size
    )


def draw_bars(table: dict):
    """A group of bars for each band, a bar for each row; the paper's figures as diamonds."""
    rows, columns = table["rows"], table["columns"]
    metrics = SHOWN[table["settings"]["stage"]]
    width = max(5.0, min(11.0, 1.5 + 0.16 * len(columns) * (len(rows) + 1)))
    figure, axes = new_figure(width, 2.9 * len(metrics) + 0.2 * len(rows), rows=len(metrics))
    step = 0.84 / len(rows)
    for axis, (metric, shown) in zip(axes, metrics.items(), strict=True):
        for index, row in enumerate(rows):
            cells = [table["cells"][row["label"], metric, column] for column in columns]
            x = np.arange(len(columns)) + (index - (len(rows) - 1) / 2) * step
            means = [cell["mean"] for cell in cells]
            style = {"color": COLOURS[index], "hatch": HATCHES[index], "edgecolor": "black"}
            axis.bar(x, means, step * 0.94, label=row["label"], linewidth=0.5, **style)
            halves = [cell["half"] for cell in cells]
            axis.errorbar(x, means, halves, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
            paper = [float(cell["paper"] or "nan") for cell in cells]
            axis.plot(x, paper, **PAPER_MARK)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_ylabel(shown + (" (%)" if table["settings"]["stage"] == "segment" else ""))
    legend_below(figure, axes[0], 3)
    return figure


def draw_dots(table: dict):
    """The same for more rows than there are colours: a line for each, marks for the bands."""
    rows, columns = table["rows"], table["columns"]
    metrics = SHOWN[table["settings"]["stage"]]
    height = 1.4 + max(0.22, 0.045 * len(columns)) * len(rows)
    figure, axes = new_figure(10, height, columns=len(metrics), sharey=True)
    for axis, (metric, shown) in zip(axes, metrics.items(), strict=True):
        for index, column in enumerate(columns):
            cells = [table["cells"][row["label"], metric, column] for row in rows]
            y = np.arange(len(rows)) + 0.8 * (index - (len(columns) - 1) / 2) / len(columns)
            means, halves = ([cell[key] for cell in cells] for key in ("mean", "half"))
            style = {"color": COLOURS[index % 8], "fmt": MARKERS[(index + index // 8) % 8]}
            axis.errorbar(means, y, xerr=halves, label=column, ms=4, elinewidth=0.8, **style)
            paper = [float(cell["paper"] or "nan") for cell in cells]
            axis.plot(paper, y, **PAPER_MARK)
        axis.set_xlabel(shown + (" (%)" if table["settings"]["stage"] == "segment" else ""))
        axis.grid(axis="y", linewidth=0.3)
    axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    legend_below(figure, axes[0], 7)
    return figure


@functools.cache
def outline(text: str):
    """A text of 6 points as a path around its middle, in points."""
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), text, size=6)
    return path.transformed(Affine2D().translate(*-path.get_extents().get_points().mean(0)))


def draw_matrix(axis, values: np.ndarray, across: list[str], down: list[str]) -> None:
    """A matrix of values in 0..1 in %: NaN stays white, what rounds to 0 has no digits."""
    axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axis.spines[:].set_visible(False)
    every = math.ceil(len(down) / 24)  # the 45 classes of RESISC45: every second name
    axis.set_xticks(range(0, len(across), every), across[::every], rotation=90, fontsize=7)
    axis.set_yticks(range(0, len(down), every), down[::every], fontsize=7)
    if every > 1:
        return
    from matplotlib.collections import PathCollection
    from matplotlib.transforms import IdentityTransform

    alike: dict[tuple[str, str], list] = {}  # text and colour: places
    for i, j in np.argwhere(values >= 0.005):
        colour = "black" if values[i, j] > 0.5 else "white"
        alike.setdefault((f"{100 * values[i, j]:.0f}", colour), []).append((j, i))
    for (text, colour), places in alike.items():  # a text for each took half of all the time
        style = {"color": colour, "linewidths": 0, "transform": IdentityTransform()}
        where = {"offsets": places, "offset_transform": axis.transData}
        axis.add_collection(PathCollection([outline(text)], [1], **style, **where), autolim=False)


def draw_classes(table: dict):
    """Classes by bands: IoU, mean over seeds, a panel for each row."""
    rows, bands = table["rows"], [column for column in table["columns"] if column != "mean"]
    found = [[[run["metrics"]["iou_per_class"] for run in row["runs"].get(band, {}).values()]
              for band in bands] for row in rows]  # fmt: skip
    names = list(
        dict.fromkeys(name for row in found for cell in row for run in cell for name in run)
    )
    size = max(4.5, 2 + 0.45 * len(bands)), (0.9 + 0.2 * len(names)) * len(rows)
    figure, axes = new_figure(*size, rows=len(rows))
    for axis, row, cells in zip(axes, rows, found, strict=True):
        values = np.full((len(names), len(bands)), np.nan)
        for i, j in np.ndindex(values.shape):
            there = [run[names[i]] for run in cells[j] if run.get(names[i]) is not None]
            values[i, j] = np.mean(there) if there else np.nan
        draw_matrix(axis, values, bands, names)
        axis.set_title(f"{row['label']}: IoU (%)", fontsize=9)
    return figure


def draw_confusions(table: dict):
    """Row-normalised confusion, summed over seeds, at the bands with the best result of the table.

    Up to three rows: random, then the best. Returns the figure and the bands.
    """
    metric = next(iter(SHOWN[table["settings"]["stage"]]))
    means = {(label, column): cell["mean"] for (label, m, column), cell in table["cells"].items()
             if m == metric and column != "mean" and cell["n"]}  # fmt: skip
    column = max(means, key=means.__getitem__)[1]
    rows = [row for row in table["rows"] if column in row["runs"]]
    rows.sort(key=lambda row: (row["name"] != RANDOM, -means[row["label"], column]))
    figure, axes = new_figure(4 * len(rows[:3]), 3.9, columns=len(rows[:3]))
    for axis, row in zip(axes, rows, strict=False):
        runs = [run["metrics"] for run in row["runs"][column].values()]
        total = np.array(runs[0]["confusion"], float)
        for run in runs[1:]:
            total += np.array(run["confusion"], float)
        names = class_names(table, len(total))
        counts = total.sum(1, keepdims=True)
        shares = np.divide(total, counts, np.full_like(total, np.nan), where=counts > 0)
        draw_matrix(axis, shares, names, names)
        axis.set_title(f"{row['label']}, {column}", fontsize=9)
        axis.set_xlabel("predicted")
    axes[0].set_ylabel("true (rows sum to 100 %)")
    return figure, column


def class_names(table: dict, count: int) -> list[str]:
    """Names of `count` classes, from the results' own list where it fits."""
    names = table["settings"]["classes"]
    if isinstance(names, list) and len(names) == count:
        return [str(name) for name in names]
    return [str(index) for index in range(count)]


def read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """features float32 [N, D] and labels int [N], from 0; ValueError says what is wrong."""
    with np.load(path, allow_pickle=False) as file:
        if missing := {"features", "labels"} - set(file.files):
            raise ValueError(f"it has no array {', '.join(sorted(missing))}")
        features, labels = file["features"], file["labels"]
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) < 4:
        raise ValueError(f"features {features.shape} and labels {labels.shape} do not fit")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or not np.isfinite(features).all():
        raise ValueError("labels are no places of classes, or features hold NaN or infinity")
    return features, labels


def draw_tsne(table: dict, faults: list[str]):
    """t-SNE of the embeddings of the first seed at the bands that most rows have; None without any.

    At most 2,000 images, drawn with a fixed seed; on the first 50 principal components.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    for row in table["rows"]:
        for column, seeds in row["runs"].items():
            if first := first_beside(seeds, "-embeddings.npz"):
                found.setdefault(column, []).append((row["label"], first[1]))
    column = max(found, key=lambda column: len(found[column]), default="")
    panels = []
    for label, path in found.get(column, []):
        try:
            panels.append((label, *read_embeddings(path)))
        except Exception as error:  # np.load raises many kinds on broken archives
            faults.append(f"{path}: no embeddings: {error}")
    if not panels:
        return None
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    figure, axes = new_figure(3.4 * len(panels), 4.2, columns=len(panels))
    count = max(table["settings"]["confusion"], *(1 + labels.max() for *_, labels in panels))
    for axis, (label, features, labels) in zip(axes, panels, strict=True):
        drawn = np.random.default_rng(0).permutation(len(labels))[:2000]
        features, labels = features[drawn], labels[drawn]
        features = PCA(min(50, *features.shape), random_state=0).fit_transform(features)
        tsne = TSNE(perplexity=min(30, (len(labels) - 1) / 3), init="pca", random_state=0)
        points = tsne.fit_transform(features)
        for index, name in enumerate(class_names(table, count)):
            style = {"color": COLOURS[index % 8], "marker": MARKERS[(index + index // 8) % 8]}
            axis.scatter(*points[labels == index].T, 10, label=name, linewidths=0.1, **style)
        axis.set_title(f"{label}, {column}", fontsize=9)
        axis.set(xticks=[], yticks=[])
    legend_below(figure, axes[0], 5, 7)
    return figure


def draw_runs(runs: list[dict]):
    """Loss, spread of the projection, learning rate by step; dotted where the schedule restarts."""
    labels = {"loss": "loss", "std": "std of the projection", "lr": "learning rate"}
    figure, axes = new_figure(8, 6.4, rows=3, sharex=True)
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for index, run in enumerate(runs):
            step, values = np.array(run["step"]), np.array(run[key])
            many = max(1, len(step) // 1000)  # a point is the mean of so many lines of the log
            cut = len(step) // many * many
            x, y = (v[:cut].reshape(-1, many).mean(1) for v in (step, values))
            style = {"color": COLOURS[index % 8], "linestyle": ["-", "--", "-."][index // 8 % 3]}
            axis.plot(x, y, linewidth=1.2, label=run["name"] if key == "loss" else None, **style)
            # within a cycle of the cosine the rate only falls
            for restart in step[1:][np.diff(run["lr"]) > 0]:
                axis.axvline(restart, linestyle=":", linewidth=0.8, color=style["color"])
        axis.set_ylabel(label)
    axes[-1].set_xlabel("step (dotted: restart of the learning rate)")
    axes[1].set_ylim(bottom=0)
    legend_below(figure, axes[0], 3)
    return figure


def first_beside(seeds: dict[int, dict], ending: str) -> tuple[int, Path] | None:
    """The first seed whose result NAME.json has NAME + `ending` beside it, and that file."""
    for seed in sorted(seeds):
        path = seeds[seed]["path"]
        if (file := path.with_name(path.stem + ending)).exists():
            return seed, file
    return None


def read_sheet(path: Path, faults: list[str]) -> bytes:
    """A CAM or map sheet as it is; b"" if it is no PNG."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
        return path.read_bytes()
    except Exception as error:  # PIL raises many kinds on broken files
        faults.append(f"{path}: no PNG: {error}")
        return b""


def sheets(table: dict, faults: list[str]) -> list[tuple[str, bytes]]:
    """The CAM and map sheets of a table: the first seed that has one, for each row and bands."""
    found = []
    for ending, what in (("-cam.png", "class activation"), ("-maps.png", "maps")):
        for row, column in itertools.product(table["rows"], table["columns"]):
            if first := first_beside(row["runs"].get(column, {}), ending):
                caption = f"{row['label']}, {column}, seed {first[0]}: {what}"
                found.append((caption, read_sheet(first[1], faults)))
    return [(caption, data) for caption, data in found if data]


def draw_figures(table: dict, tsne: bool, faults: list[str]) -> list[tuple[str, str, object]]:
    """Every figure of a table: (name of its files, caption, matplotlib figure)."""
    settings, place = table["settings"], settings_of(table)
    stem = (
        f"{table['number']:02d}-{settings['stage']}-{settings['dataset']}-{settings['channels']}ch"
    )
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem)
    figures = []
    caption = f"{' and '.join(SHOWN[settings['stage']].values())} by bands; whiskers: 95 % interval"
    if any(cell["paper"] for cell in table["cells"].values()):
        caption += "; diamonds: the paper"
    draw = draw_bars if len(table["rows"]) <= len(COLOURS) else draw_dots
    figures.append((f"{stem}-bands", f"{caption}. {place}.", draw(table)))
    if settings["stage"] == "segment":
        caption = f"IoU by class and band, mean over seeds. {place}."
        figures.append((f"{stem}-classes", caption, draw_classes(table)))
    figure, column = draw_confusions(table)
    caption = f"Confusion in % of the true class, all seeds, at the best bands ({column}). {place}."
    figures.append((f"{stem}-confusion", caption, figure))
    if tsne and (figure := draw_tsne(table, faults)):
        caption = f"t-SNE of the embeddings, at most 2,000 images, first seed. {place}."
        figures.append((f"{stem}-tsne", caption, figure))
    return figures


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
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1rem;
overflow-wrap:anywhere}h1{font-size:1.5rem}
h2{font-size:1.15rem;margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1rem}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.85rem;overflow-wrap:normal}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap;vertical-align:top;font-variant-numeric:tabular-nums}
thead th{border-bottom-width:2px}th:first-child,td.text{text-align:left}
th[scope=row]{position:sticky;left:0;background:Canvas;font-weight:500}
small,figcaption,.note{font-size:.8rem;opacity:.8}figure{margin:1.5rem 0}
figure img{background:#fff;display:block;max-width:100%}
.verdict{border-left:4px solid #0072b2;padding:.2rem 1rem .2rem 2rem}
details{margin:.5rem 0}summary{cursor:pointer}
@media(max-width:40rem){figure img{min-width:36rem;max-width:none}
th[scope=row]{white-space:normal;min-width:6rem}}
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def html_table(header: list[str], rows: list[list[str]], text: int) -> str:
    """A table of cells that are HTML already; the first `text` columns are set flush left."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ""
    for first, *cells in rows:
        line = [f"<td{' class=text' * (i < text)}>{cell}</td>" for i, cell in enumerate(cells, 1)]
        body += f'<tr><th scope="row">{first}</th>{"".join(line)}</tr>\n'
    return (f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>\n")  # fmt: skip


def html_of_text(header: list[str], rows: list[list[str]], text: int) -> str:
    escaped = [[escape(cell) for cell in row] for row in [header, *rows]]
    return html_table(escaped[0], escaped[1:], text)


def html_image(kind: str, data: bytes, caption: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    image = f'<img src="{source}" alt="{escape(caption)}">'
    return (f'<figure><div class="scroll" tabindex="0">{image}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>\n")  # fmt: skip


def html_details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n" if body else ""


def html_settings(table: dict) -> str:
    """The results' config, versions and weights: what all share, then what differs."""
    cells = [(row["label"], column, seeds) for row in table["rows"]
             for column, seeds in row["runs"].items()]  # fmt: skip
    values: dict[str, list[set[str]]] = {}  # setting: the values found in each cell
    for index, (*_, seeds) in enumerate(cells):
        for result in seeds.values():
            for part in ("weights", "config", "versions"):
                entries = result.get(part)
                for key, value in entries.items() if isinstance(entries, dict) else ():
                    text = value if isinstance(value, str) else json.dumps(value)
                    text = text if len(text) <= 90 else text[:87] + "..."
                    values.setdefault(f"{part}.{key}", [set() for _ in cells])[index].add(text)
    same = {key: found[0] for key, found in values.items()
            if len(found[0]) == 1 and all(other == found[0] for other in found)}  # fmt: skip
    differ = [key for key in values if key not in same]
    shared = "; ".join(f"{escape(key)} = {escape(*value)}" for key, value in same.items())
    rows = []
    for index, (label, column, seeds) in enumerate(cells):
        line = [label, column, ", ".join(map(str, sorted(seeds)))]
        rows.append(line + [" | ".join(sorted(values[key][index])) or DASH for key in differ])
    body = html_of_text(["weights", "bands", "seeds", *differ], rows, len(differ) + 3)
    return html_details("Settings and versions", f"<p class=note>In all: {shared}.</p>{body}")


def html_section(table: dict, figures: str, pictures: str) -> str:
    digits = digits_of(table)
    paired = html_of_text(PAIRED_HEADER, test_rows(table["paired"], digits), 3)
    welch, over = (html_of_text(WELCH_HEADER, test_rows(table[kind], digits, band=True), 4)
                   for kind in ("welch", "pretrainings"))  # fmt: skip
    return "".join([
        f"<h2>{escape(title_of(table))}</h2>\n",
        html_table(*result_rows(table, escape, "<b>{}</b>", "<br><small>({})</small>"), 2),
        f"<p class=note>{escape(caption_of(table))}</p>\n",
        html_details("Paired t-tests over bands", paired if table["paired"] else ""),
        html_details("Welch's t-tests over seeds, by band", welch if table["welch"] else ""),
        html_details("Welch's t-tests over pre-trainings of one recipe (mean of the probe's seeds "
                     "each; random and scratch: new weights each seed), by band",
                     over if table["pretrainings"] else ""),
        html_settings(table), figures, html_details("Sheets of single images", pictures),
    ])  # fmt: skip


def synthetic_lines(tables: list[dict], runs: list[dict]) -> list[str]:
    """Which images were synthetic: of the tables, of the encoders' pre-training, of the runs."""
    results = [(table, result) for table in tables for row in table["rows"]
               for seeds in row["runs"].values() for result in seeds.values()]  # fmt: skip
    tested = [f"table {t['number']}" for t in tables if t["settings"]["synthetic"]]
    trained = sorted({result["weights"]["name"] for _, result in results
                      if is_true(result["config"].get("encoder_synthetic"))})  # fmt: skip
    ran = [run["name"] for run in runs if '"synthetic": true' in json.dumps(run["config"])]
    lines = [
        (tested, "Synthetic images, made by a program"),
        (trained, "Pre-trained on synthetic tiles"),
        (ran, "Pre-training runs on synthetic tiles"),
    ]
    said = [f"{what}: {', '.join(names)}." for names, what in lines if names]
    return said or ["No result here says that its images were synthetic."]


def page(
    tables: list[dict], sections: list[str], runs: list[dict], curves: str, faults: list[str]
) -> str:
    """The whole report as one HTML page that loads nothing."""
    said = "".join(f"<li>{escape(line)}</li>" for table in tables for line in verdicts(table))
    versions = {
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    settings = ""
    for run in runs:
        inner = run["config"].get("settings")
        flat = run["config"] | inner if isinstance(inner, dict) else run["config"]
        rows = [[key, json.dumps(flat[key])[:200]] for key in flat if flat[key] is not inner]
        settings += html_details(
            f"Settings of run {run['name']}", html_of_text(["setting", "value"], rows, 2)
        )
    paper = "".join(f"<p>{escape(title)}</p>{html_of_text(header, rows, 2 if '' in header else 1)}"
                    for title, header, rows in paper_tables())  # fmt: skip
    left_out = "".join(f"<li>{escape(fault)}</li>" for fault in faults)
    return "".join([
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n',
        '<link rel="icon" href="data:,"><title>RS-BYOL report</title>',
        f"<style>{STYLE}</style></head>\n",
        "<body><h1>RS-BYOL: what the encoders learnt</h1>\n",
        f"<p>{escape(' '.join(synthetic_lines(tables, runs)))}</p>\n",
        f"<ul class=verdict>{said}</ul>\n",
        *sections,
        f"<h2>Pre-training</h2>\n{curves}{settings}" if runs else "",
        "<h2>The paper's own tables</h2>\n",
        html_details("Tables I to III, and t-tests on Table I", paper),
        f"<h2>Left out</h2>\n<ul>{left_out}</ul>\n" if faults else "",
        "<p class=note>Bands of one sensor are alike, and seeds redraw head, split and subset, not "
        "the pre-training: the tests know of neither, but for those over pre-trainings. "
        "Made by analyze.py, "
        f"{escape(', '.join(f'{name} {version}' for name, version in versions.items()))}.</p>\n",
        "</body></html>\n",
    ])  # fmt: skip


# ---------------------------------------------------------------------------- writing


# >>> shared: files
def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it: readers see old or new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        beside.unlink(missing_ok=True)


# <<< shared: files


def earlier_report(out: Path) -> set[str]:
    """The files of an earlier report in `out`; ends with status 2 where `out` is something else."""
    try:
        if not out.exists() or all((out / name / MARKER).exists() for name in os.listdir(out)):
            return set()  # new, empty, or a folder of reports: report/ beside report/demo
        names = json.loads((out / MARKER).read_text(encoding="utf-8"))
        if type(names) is list and all(type(n) is str and n == Path(n).name for n in names):
            return set(names)
    except (OSError, ValueError):
        pass
    fail(2, f"--out {out} is no earlier report (it has no {MARKER}): name a new or an empty folder")


def write_report(out: Path, files: dict[str, bytes], earlier: set[str]) -> None:
    """Write `files`, then remove what only the earlier report had. Touches no other file."""
    for name in files:
        if name not in earlier and (out / name).exists():
            fail(2, f"{out / name} was not written by analyze.py: move it, or name another --out")

    def mark(names: set[str]) -> None:
        text = json.dumps(sorted(names), indent=1) + "\n"
        write_atomic(out / MARKER, lambda path: path.write_text(text))

    mark(earlier | set(files))  # a run that is killed leaves a folder which the next one may fill
    for name, data in files.items():
        write_atomic(out / name, functools.partial(Path.write_bytes, data=data))
    for name in earlier - set(files):
        (out / name).unlink(missing_ok=True)
    mark(set(files))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", nargs="?", type=Path, help="folder with the JSON of probe.py and segment.py")
    add("--out", type=Path, default=Path("report"), help="new, empty, or an earlier report")
    add("--runs", type=Path, help="folder with the runs of pretrain.py (log.jsonl)")
    add("--no-tsne", action="store_true", help="leave out the t-SNE, the one slow figure")
    add("--paper", action="store_true", help="print the paper's tables and end")
    args = parser.parse_args(argv)
    if not args.paper and args.results is None:
        fail(2, "no folder of results: python analyze.py results/ --out report/")
    for folder, writer in ((args.results, "probe.py and segment.py"), (args.runs, "pretrain.py")):
        if folder is not None and not folder.is_dir():
            fail(2, f"no folder {folder}: name the one that {writer} wrote to")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.paper:
        print("\n".join(markdown_of_text(*table) for table in paper_tables()))
        return 0
    earlier = earlier_report(args.out)
    faults: list[str] = []
    tables = build_tables(read_results(find_files(args.results, faults), faults), faults)
    logs = [p for p in find_files(args.runs, faults) if p.name == "log.jsonl"] if args.runs else []
    runs = [run for run in (read_run(log, faults) for log in logs) if run["step"]]
    if not tables and not runs:
        for fault in faults:
            print(f"analyze.py: left out: {fault}", file=sys.stderr)
        fail(1, f"{args.results} holds no result that can be read: nothing to report")
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # now, not after the minutes of a t-SNE
    except OSError as error:
        fail(2, f"--out {args.out}: {error.strerror}")

    import matplotlib

    files: dict[str, bytes] = {}

    def keep(name: str, caption: str, figure) -> str:
        files[f"{name}.png"], files[f"{name}.svg"] = figure_bytes(figure)
        return html_image("svg+xml", files[f"{name}.svg"], caption)

    sections = []
    with matplotlib.rc_context(FONT):
        for table in tables:
            figures = [keep(*entry) for entry in draw_figures(table, not args.no_tsne, faults)]
            pictures = [html_image("png", data, caption) for caption, data in sheets(table, faults)]
            sections.append(html_section(table, "".join(figures), "".join(pictures)))
        caption = "Pre-training, by step. The spread falls to 0 where the projection collapses."
        curves = keep("runs", caption, draw_runs(runs)) if runs else ""

    texts = {
        "tables.md": tables_markdown(tables), "tables.tex": tables_latex(tables),
        "tables.csv": tables_csv(tables), "tests.csv": tests_csv(tables),
        "index.html": page(tables, sections, runs, curves, faults),
    }  # fmt: skip
    files |= {name: text.encode() for name, text in texts.items()}
    try:
        write_report(args.out, files, earlier)
    except OSError as error:
        fail(1, f"--out {args.out}: {error.strerror}; the report is not complete")
    for table in tables:
        print("\n".join(verdicts(table)))
    for fault in faults:
        print(f"analyze.py: left out: {fault}", file=sys.stderr)
    print(f"{args.out / 'index.html'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
