"""analyze.py: from a tree of made-up results to tables, tests, plots and one page.

Numbers are compared with scipy, with values from R's manual and with ones worked out by hand; the
page is opened in Chromium and the LaTeX is set by pdflatex where they are installed.
"""

import base64
import csv
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from threadpoolctl import threadpool_limits

import analyze

SCRIPT = Path(analyze.__file__)
RGB, RE, SAR = ["Red", "Green", "Blue"], ["RE5", "RE6", "RE7"], ["SAR1", "SAR2", "SAR1"]
CLASSES = "AnnualCrop Forest Herbs Highway Industrial Pasture Crop Homes River Sea".split()
LAND = "Forest Shrubland Grassland Wetlands Croplands Urban Barren Water".split()
MS = analyze.BANDS[:10]
LABELS = np.arange(60) % 10
OURS = "RS-BYOL-1"


def result(stage="probe", name=OURS, bands=("Red",), seed=0, score=0.8, **changes) -> dict:
    """A result as DESIGN section 4 has it; `changes` replace keys of it, or else of config."""
    names = CLASSES if stage == "probe" else LAND
    per_class = {c: min(1.0, max(0.0, score - 0.1 + 0.02 * i)) for i, c in enumerate(names)}
    metrics = {"f1_macro": score, "f1_weighted": score, "f1_per_class": per_class}
    if stage == "segment":
        metrics = {"miou": score, "aa": min(1.0, score + 0.13), "iou_per_class": per_class}
    config = {"size": 64, "head": "mlp" if stage == "probe" else "deeplabv3", "bn": "encoder",
              "arch": "resnet50", "epochs": 100, "classes": names, "synthetic": False,
              "train_images": None, "finetune": False, "train": 80, "test": 20}  # fmt: skip
    drawn = name in ("random", "scratch", "stats", "Random init")
    weights = {"name": name, "source": name if drawn else f"runs/{name}/encoder.safetensors",
               "sha256": None if drawn else f"{sum(map(ord, name)):08x}" * 8}  # fmt: skip
    made = {
        "schema": 1, "stage": stage, "dataset": "eurosat" if stage == "probe" else "dfc2020",
        "split": "random", "subset": 7000 if stage == "probe" else None, "weights": weights,
        "bands": list(bands), "seed": seed, "metrics": metrics | {"classes": names},
        "config": config, "versions": {"torch": "2.14.0"}, "seconds": {"read": 1, "train": 2},
    }  # fmt: skip
    for key, value in changes.items():
        (made if key in made else made["config"])[key] = value
    return made


def write(folder: Path, data: dict, stem: str | None = None) -> Path:
    """Write one result where probe.py would."""
    name = re.sub(r"\W+", "-", data["weights"]["name"])
    words = [data["stage"], data["dataset"], str(data["subset"]), *data["bands"], name]
    stem = stem or "-".join([*words, f"seed{data['seed']}"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(data))
    return path


def fill(folder: Path, stage: str, scores: dict, bands: list, seeds: int, **changes) -> list[Path]:
    """Results of every weights, bands and seed; scores drift with each, reproducibly."""
    rng, paths = np.random.default_rng(len(bands) + seeds), []
    for name, score in scores.items():
        for band in bands:
            shift = 0.02 * np.sin(7 * len(paths))
            for seed in range(seeds):
                value = float(np.clip(score + shift + 0.01 * rng.standard_normal(), 0, 1))
                of = [band] if isinstance(band, str) else band
                paths.append(write(folder, result(stage, name, of, seed, value, **changes)))
    return paths


def pretrained(folder: Path, run: str, score: float, seed: int, seeds=range(2), epoch="30",
                   stage="probe", bands=("Red",), command="--mode single --lr 0.03",
               made_by=None, **changes) -> None:  # fmt: skip
    """A probe, for each band and seed, of the encoder that `command --seed seed` made as `run`."""
    about = {"command": f"pretrain.py {command} --seed {seed}", "epoch": epoch, "seed": str(seed)}
    about |= made_by or {}
    for band, k in itertools.product(bands, seeds):
        made = result(stage, OURS, [band], k, score + 0.01 * k, encoder=about, **changes)
        source = f"{run}/encoder.safetensors" if "/" not in run else f"{run}.safetensors"
        made["weights"] |= {"source": source, "sha256": hashlib.sha256(run.encode()).hexdigest()}
        write(folder, made, f"{run.replace('/', '-')}-{band}-{k}")


ONE = {"random": 0.55, "stats": 0.7, "scratch": 0.80, "RS-BYOL-1 MS only": 0.76, OURS: 0.82}
THREE = {"random": 0.45, "scratch": 0.85, "ImageNet supervised": 0.87,
         "BYOL ImageNet": 0.86, "SeCo": 0.87, "RS-BYOL-3 S1S2": 0.88}  # fmt: skip
VARIANTS = {"random": 0.31, OURS: 0.57, "RS-BYOL-1 w/64BS": 0.58}


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Half a second a figure is saved where only what is read and said matters."""
    for name in ("draw_bars", "draw_labels", "draw_runs"):
        monkeypatch.setattr(analyze, name, lambda *_: None)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Not where a user's own runs/ may lie."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of t-SNE: on a busy machine two that wait for each other take thirty times as long."""
    import sklearn.manifold  # noqa: F401  # its libraries must be there to be limited

    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """results/ and runs/ as a week of work leaves them; nothing in it is broken."""
    root = tmp_path_factory.mktemp("tree")
    one = fill(root / "results/a", "probe", ONE, MS, 3)
    for labels in (20, 40):
        fill(root / f"results/a{labels}", "probe", ONE, MS[:2], 2, train_images=labels)
    fill(root / "results/b", "probe", THREE, [RGB, RE], 3)
    for seed, epoch in itertools.product(range(3), (10, 30, 70)):
        pretrained(root / "results/c", f"plain{seed}/encoder-epoch00{epoch}",
                   0.4 + 0.03 * seed + 0.002 * epoch, seed, bands=MS[:3], dataset="sen12ms",
                   subset=5000, epoch=str(epoch))  # fmt: skip
    fill(root / "results/c", "probe", {"random": 0.5, "stats": 0.6}, MS[:3], 2, dataset="sen12ms",
         subset=5000)  # fmt: skip
    maps = fill(root / "results/d", "segment", VARIANTS, analyze.BANDS, 3, subset=900)
    demo = {"dataset": "sen12ms", "subset": None, "synthetic": True}
    fill(root / "results/demo", "probe", {"random": 0.5, OURS: 0.49}, ["Red", "SAR1"], 3, **demo)
    rng = np.random.default_rng(0)
    save_features(root / "results/red.npz", LABELS[:, None] + rng.random((60, 16)))
    for path in one:
        if "-Red-" in path.name and "seed0" in path.name:
            sheet = rng.integers(0, 255, (60, 200, 3), np.uint8)
            Image.fromarray(sheet).save(beside(path, "-cam.png"))
        elif "-NNIR-RS-BYOL-1-MS" in path.name:
            path.unlink()
    Image.fromarray(np.full((80, 800, 3), 90, np.uint8)).save(beside(maps[0], "-maps.png"))
    write_run(root / "runs/single", seed=0)
    write_run(root / "runs/ms-only", seed=1)
    write_run(root / "runs/demo", seed=2, synthetic=True)
    Image.fromarray(np.full((50, 90, 3), 200, np.uint8)).save(root / "runs/single/views.png")
    return root


def beside(path: Path, ending: str) -> Path:
    return path.with_name(path.stem + ending)


def save_features(path: Path, features: np.ndarray, labels: np.ndarray | None = None) -> None:
    """As probe.py --embed writes them."""
    labels = np.arange(len(features)) % 10 if labels is None else labels
    np.savez(path, features=features.astype(np.float32), labels=labels, classes=np.array(CLASSES))


def write_run(folder: Path, seed: int, last: str = "", synthetic: bool = False) -> None:
    """log.jsonl and config.json as pretrain.py writes them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {"settings": {"mode": "single", "seed": seed}, "pairs": {"synthetic": synthetic}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(0, 700, 5):
        loss = 0.4 + 3 * np.exp(-step / 100) + 0.02 * rng.standard_normal() + 0.1 * seed
        line = {"step": step, "loss": loss, "lr": 0.1, "std": 0.05, "cosine": 0.8, "match": None}
        if step % 50 == 0:
            line |= {"match": 0.5 / (1 + step)}
        lines.append(json.dumps(line) + "\n")
    (folder / "log.jsonl").write_text("".join(lines) + last)


def report_on(folder: Path, *argv: object) -> int:
    """analyze.py on folder/in, written to folder/out."""
    return analyze.main([str(folder / "in"), "--out", str(folder / "out"), *map(str, argv)])


def tables_of(folder: Path) -> tuple[list[analyze.Table], list[str]]:
    faults: list[str] = []
    results = [analyze.Result(path) for path in sorted(folder.rglob("*.json"))]
    return list(itertools.chain(*analyze.build_tables(results, faults))), faults


def verdict_of(folder: Path) -> str:
    tables, faults = tables_of(folder)
    assert not faults
    return analyze.verdict(tables)


def found_tests(table: analyze.Table, kind: str) -> list[analyze.Test]:
    return [t for t in table.tests if (t.kind, t.metric) == (kind, table.metric)]


def csv_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    said, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        status = analyze.main([str(tree / "results"), "--out", str(out), "--runs",
                               str(tree / "runs")])  # fmt: skip
    assert (status, said.getvalue()) == (0, "")
    assert printed.getvalue().splitlines()[-1] == str(out / "index.html")
    (out / "printed").write_text(printed.getvalue())
    return out


def test_a_reader_that_stops_early_costs_no_report(tree, tmp_path):
    words = [sys.executable, str(SCRIPT), str(tree / "results"), "--out", str(tmp_path)]
    done = subprocess.run(f"{shlex.join(words)} | true", shell=True, capture_output=True, text=True)
    assert (tmp_path / "index.html").exists() and done.stderr == ""


def test_it_imports_nothing_that_reads_tiles_or_trains():
    imports = re.findall(r"^ *(?:from|import) (\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert {"numpy", "scipy", "sklearn"} < set(imports)
    assert not {"torch", "torchvision", "bandcrop", "probe", "segment", "pretrain"} & set(imports)


def seed_means(folder: Path, name: str, metric: str, bands: list[str]) -> np.ndarray:
    """Mean over seeds for each band, straight from the JSON."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    mine = [r for r in found if r["weights"]["name"] == name]
    return np.array([np.mean([r["metrics"][metric] for r in mine if r["bands"] == [band]])
                     for band in bands])  # fmt: skip


# ---- tests of significance


def test_tests_over_bands_equal_scipy_on_the_seed_means(tree, report):
    found = [r for r in csv_rows(report / "tests.csv")
             if (r["metric"], r["channels"], r["kind"]) == ("mIoU", "1", "over bands")]  # fmt: skip
    assert len(found) == 3
    for row in found:
        x, y = (100 * seed_means(tree / "results/d", row[n], "miou", analyze.BANDS) for n in "ab")
        t = stats.ttest_rel(x, y)
        low, high = t.confidence_interval()
        d = (x - y).mean() / (x - y).std(ddof=1)
        expected = [12, t.statistic, 11, t.pvalue, (x - y).mean(), low, high, d]
        got = [float(row[key]) for key in "n t df p difference low high d".split()]
        assert got == pytest.approx(expected, rel=1e-9) and row["effect"] == "d_z"


def test_a_missing_band_leaves_the_pairs_that_both_have(report):
    rows = [r for r in csv_rows(report / "tests.csv") if r["kind"] == "over bands"
            and r["dataset"] == "eurosat" and r["train_images"] == "-"
            and r["channels"] == "1"]  # fmt: skip
    assert {r["n"] for r in rows if "RS-BYOL-1 MS only" in (r["a"], r["b"])} == {"9"}
    assert {r["n"] for r in rows if "RS-BYOL-1 MS only" not in (r["a"], r["b"])} == {"10"}


def test_rows_are_compared_over_the_seeds_that_both_have(tmp_path):
    """Equal seed by seed; random's further seeds are worse, and say nothing of the other row."""
    drawn = [0.50, 0.52, 0.43, 0.44, 0.45]
    for band, (seed, score) in itertools.product(MS[:4], enumerate(drawn)):
        shift = 0.01 * MS.index(band)
        write(tmp_path, result(name="random", bands=[band], seed=seed, score=score + shift))
        if seed < 2:
            odd = 0.0003 + 0.001 * (-1) ** MS.index(band)
            write(tmp_path, result(bands=[band], seed=seed, score=score + shift + odd))
    (table,), _ = tables_of(tmp_path)
    for kind in ("over bands", "over seeds"):
        (test,) = found_tests(table, kind)
        assert test.difference == pytest.approx(0.0003)
    said = "is not tested against random (+0.000 F1 on 4 bands; fewer than three values over seeds)"
    assert said in analyze.verdict([table])  # one draw of random weights says nothing of others


def test_a_band_that_is_still_being_probed_costs_no_seed_of_the_others(tmp_path):
    for name, band, seed in itertools.product(("random", OURS), MS[:4], range(5)):
        if band != MS[3] or seed == 0:
            score = (0.6 if name == OURS else 0.5) + 0.01 * math.sin(9 * seed + len(name))
            write(tmp_path, result(name=name, bands=[band], seed=seed, score=score))
    (table,), _ = tables_of(tmp_path)
    (test,) = found_tests(table, "over seeds")
    assert test.n == "5" and test.bands == " ".join(MS[:3])
    for seed in range(3):  # nor does it cost a recipe its verdict
        pretrained(tmp_path, f"p{seed}", 0.6 + 0.01 * seed, seed, range(5), bands=MS[:3])
        pretrained(tmp_path, f"p{seed}", 0.6, seed, range(1), bands=MS[3:4])
    (table,), _ = tables_of(tmp_path)
    test, *_ = found_tests(table, "over pre-trainings")
    assert (test.n, test.bands) == ("3 and 5", " ".join(MS[:3])) and test.p < 0.05


def test_rows_without_a_seed_in_common_are_not_tested_and_said_so(tmp_path):
    for band, seed in (("Red", 0), ("Blue", 1)):
        for name in ("random", OURS):
            write(tmp_path, result(name=name, bands=[band], seed=seed))
    said = verdict_of(tmp_path)
    assert "nan" not in said and "is not tested against random" in said


@pytest.mark.parametrize(("split", "overlap"), [("random", 0.25), ("official", 0)])
def test_tests_over_seeds_pair_the_seeds_and_widen_for_overlapping_splits(tmp_path, split, overlap):
    """Nadeau and Bengio: the variance of the mean is (1/J + n_test/n_train) times the spread's."""
    a, b = np.array([0.80, 0.83, 0.79, 0.84, 0.80]), np.array([0.70, 0.75, 0.71, 0.73, 0.72])
    for seed in range(5):
        for name, x in ((OURS, a), ("random", b)):
            write(tmp_path, result(name=name, seed=seed, score=x[seed], split=split, subset=None))
    (table,), _ = tables_of(tmp_path)
    (test,) = found_tests(table, "over seeds")
    error = math.sqrt((1 / 5 + overlap) * np.var(a - b, ddof=1))
    t = (a - b).mean() / error
    assert [test.t, test.df, test.p] == pytest.approx([t, 4, 2 * stats.t.sf(t, 4)])
    half = stats.t.ppf(0.975, 4) * error
    assert (test.low, test.high) == pytest.approx((np.mean(a - b) - half, np.mean(a - b) + half))
    cell = next(c for c in table.cells if c.weights == OURS)
    plain = stats.t.ppf(0.975, 4) * stats.sem(a)
    assert cell.half_width_95 == pytest.approx(plain * (1.5 if overlap else 1))
    said = analyze.notes(table)
    assert ("Nadeau and Bengio" in said) == bool(overlap)
    assert ("seeds redraw the head" in said) == (not overlap)
    assert ("Nadeau and Bengio" in analyze.verdict([table])) == bool(overlap)
    assert ("for this one test set" in analyze.verdict([table])) == (not overlap)


def test_few_labels_overlap_no_more_than_the_split_they_are_drawn_from(tmp_path):
    path = write(tmp_path, result(train=10, test=500, train_images=10))
    assert analyze.Result(path).overlap == 0.25
    path = write(tmp_path, result(train=700, test=300))
    assert analyze.Result(path).overlap == pytest.approx(3 / 7)


def blank(kind="over seeds") -> analyze.Test:
    return analyze.Test(kind, "others", "F1", "a", "b")


def test_welch_equals_scipy():
    rng = np.random.default_rng(1)
    for n, m in ((4, 3), (5, 5), (3, 9)):
        a, b = rng.normal(0.8, 0.02, n), rng.normal(0.75, 0.05, m)
        test = analyze.t_test(blank(), a.mean() - b.mean(), [(a, 0), (b, 0)])
        t = stats.ttest_ind(a, b, equal_var=False)
        low, high = t.confidence_interval()
        got = [test.t, test.df, test.p, test.low, test.high, test.difference]
        assert got == pytest.approx([t.statistic, t.df, t.pvalue, low, high, a.mean() - b.mean()])


def test_welch_with_one_constant_sample_is_the_one_sample_test():
    a, b = np.array([0.72, 0.72, 0.72]), np.array([0.5, 0.52, 0.57, 0.55])
    test, one = analyze.t_test(blank(), 0.185, [(a, 0), (b, 0)]), stats.ttest_1samp(b, 0.72)
    assert [test.t, test.df, test.p] == pytest.approx([-one.statistic, 3, one.pvalue])


def test_too_few_values_or_no_spread_are_not_tested_and_said_so():
    two = analyze.t_test(blank("over bands"), 0.15, [(np.array([0.1, 0.2]), 0)])
    assert two.difference == pytest.approx(0.15) and math.isnan(two.p)
    assert two.note == "fewer than three values over bands"
    gaps = np.array([0.5, 0.6, 0.7]) - np.array([0.4, 0.5, 0.6])  # rounding is no spread
    for parts in ([(gaps, 0)], [(np.full(3, 0.5), 0), (gaps, 0.25)]):
        same = analyze.t_test(blank(), 0.1, parts)
        assert math.isnan(same.p) and same.note == "no spread"
    few = analyze.t_test(blank("over pre-trainings"), 1, [(np.arange(3.0), 0), (np.ones(2), 0)])
    assert few.note == "fewer than three values over pre-trainings or seeds"


def corrected(p_values: list[float], df=9) -> list[analyze.Test]:
    tests = []
    for p in p_values:
        test, t = blank(), stats.t.isf(p / 2, df)
        test.difference, test.error, test.df, test.p = t * 0.1, 0.1, df, p
        test.low, test.high = test.interval(0.05)
        tests.append(test)
    analyze.correct([*tests, blank()])
    return tests


def test_holm_gives_what_r_gives():
    p = [0.01, 0.02, 0.03, 0.04, 0.05]  # R: p.adjust(p, "holm")
    got = [t.p_holm for t in corrected(p[::-1])[::-1]]
    assert got == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert [t.p_holm for t in corrected([0.6, 0.9])] == [1.0, 1.0]


def test_a_corrected_interval_leaves_out_zero_where_the_corrected_p_is_small():
    rng = np.random.default_rng(0)
    for _ in range(40):
        tests = corrected(list(rng.beta(0.4, 3, rng.integers(1, 8))))
        for test in tests:
            assert (test.p_holm < 0.05) == (test.low_holm > 0)
            assert test.low_holm <= test.low and test.high_holm >= test.high - 1e-12
    first, *_ = corrected([0.001, 0.2, 0.3, 0.4])  # the smallest of four: Bonferroni's interval
    half = stats.t.isf(0.05 / 4 / 2, 9) * 0.1
    assert first.high_holm - first.difference == pytest.approx(half)
    (alone,) = corrected([0.03])
    assert (alone.low_holm, alone.high_holm) == pytest.approx((alone.low, alone.high))


def test_random_against_ours_is_a_family_of_its_own(tree):
    """Other pairs, however many, do not weaken it."""
    (table, *_), _ = tables_of(tree / "results/a")
    tests = found_tests(table, "over bands")
    families = {name: [t for t in tests if t.family == name] for name in
                ("against random", "against stats", "against scratch", "others")}  # fmt: skip
    assert [len(f) for f in families.values()] == [2, 2, 2, 4] and len(tests) == 10
    for family in families.values():
        smallest, holm = min(t.p for t in family), min(t.p_holm for t in family)
        assert holm == pytest.approx(min(1, len(family) * smallest))


# ---- one encoder and a recipe


def test_one_pretraining_speaks_for_itself_and_three_for_their_recipe(tmp_path):
    for seed, score in enumerate([0.61, 0.66, 0.58]):
        write(tmp_path, result(name="random", seed=seed, score=score))
    for seed, score in enumerate([0.80, 0.84, 0.79]):
        pretrained(tmp_path, f"p{seed}", score, seed, seeds=range(3))
        said = verdict_of(tmp_path)
        assert said.lower().count("this encoder") == (seed + 1 if seed < 2 else 0)
        assert said.count("beats random") == (1 if seed == 2 else seed + 1)
    assert "RS-BYOL-1 (3 pre-trainings) beats random" in said
    method = "Welch's t-test over pre-trainings and seeds, variance by Nadeau and Bengio"
    assert f"{method}, n = 3 and 3" in said


def welch(difference: float, ours: np.ndarray, gaps: np.ndarray, overlap: float):
    """scipy's, over pre-trainings and seeds: the spread of the seeds' gaps is that of overlapping
    splits."""
    wide = math.sqrt(1 + len(gaps) * overlap)
    spreads = np.std(ours, ddof=1), len(ours), 0, wide * np.std(gaps, ddof=1), len(gaps)
    return stats.ttest_ind_from_stats(difference, *spreads, equal_var=False)


@pytest.mark.parametrize(("stage", "unit"), [("probe", 1), ("segment", 100)])
def test_a_recipe_is_welchs_test_over_its_pretrainings(tmp_path, stage, unit):
    """Each the mean of its probes at the seeds that random has too."""
    plain = "--mode single --lr 0.03 --blur 0,0"
    for run_name, score, seed, command in [
        ("p0", 0.80, 0, f"{plain} --epochs 30 --out runs/p0 --log-every 5"),
        ("p1", 0.84, 1, f"--blur=0,0 --lr 0.03 --resume {plain[:13]}"),
        ("p2", 0.79, 2, f"{plain} --out runs/p2 --epochs 70"),
        ("p0copy", 0.86, 0, plain),  # no other seed than the first's
        ("other", 0.86, 4, plain.replace("0.03", "0.3")),
    ]:
        pretrained(tmp_path, run_name, score, seed, range(4), stage=stage, command=command)
    pretrained(tmp_path, "later", 0.86, 3, range(4), "70", stage, command=plain)
    pretrained(tmp_path, "used", 0.86, 5, range(4), stage=stage, command=plain, bn="reestimate")
    drawn = [0.61, 0.66, 0.58, 0.64]
    for seed, score in enumerate(drawn):
        write(tmp_path, result(stage, "random", seed=seed, score=score))
    (table,), faults = tables_of(tmp_path)
    assert faults == ["p0copy: the same command, seed and epoch as p0, which is tested"]
    label = "RS-BYOL-1 (3 pre-trainings, bn encoder)"
    assert {k: len(v) for k, v in table.recipes.items()} == {label: 3}
    (test,) = [t for t in found_tests(table, "over pre-trainings") if t.b.startswith("random")]
    ours, by_seed = np.array([0.80, 0.84, 0.79]) + 0.015, 0.81 + 0.01 * np.arange(4)
    gaps = by_seed - drawn
    expected = welch(gaps.mean(), ours, gaps, 0.25)
    assert (test.a, test.n) == (label, "3 and 4")
    assert test.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert test.difference == pytest.approx(unit * gaps.mean())
    assert test.d == pytest.approx(gaps.mean() / ours.std(ddof=1)) and test.effect == "d_z"
    cell = next(c for c in table.cells if c.weights == label)
    t = welch(ours.mean(), ours, by_seed, 0.25).statistic
    shares = np.array([np.var(ours, ddof=1) / 3, np.var(by_seed, ddof=1) * (1 / 4 + 0.25)])
    df = shares.sum() ** 2 / (shares**2 / [2, 3]).sum()
    half = stats.t.ppf(0.975, df) * ours.mean() / t
    assert (cell.n, cell.over) == (3, "pre-trainings")
    assert (cell.mean, cell.half_width_95) == pytest.approx((unit * ours.mean(), unit * half))


def test_a_recipe_against_the_floor_may_owe_its_gap_to_pretrainings_and_to_splits(tmp_path):
    scores, floor = np.array([0.80, 0.84, 0.79, 0.83]), [0.78, 0.75, 0.81]
    for seed, score in enumerate(scores):
        pretrained(tmp_path, f"p{seed}", score, seed, range(3))
    for seed, score in enumerate([*floor, 0.99]):  # the fourth, which no other has, does not count
        write(tmp_path, result(name="stats", seed=seed, score=score))
    (table,), _ = tables_of(tmp_path)
    (test,) = found_tests(table, "over pre-trainings")
    gaps = scores.mean() + 0.01 * np.arange(3) - floor
    expected = welch(gaps.mean(), scores, gaps, 0.25)
    assert (test.b, test.n) == ("stats", "4 and 3")
    assert (test.t, test.p) == pytest.approx((expected.statistic, expected.pvalue))


def test_two_recipes_are_compared_over_the_pretrainings_of_both(tmp_path):
    a, b = [0.80, 0.84, 0.79], [0.70, 0.75, 0.71, 0.74]
    for scores, lr in ((a, "0.03"), (b, "0.2")):
        for seed, score in enumerate(scores):
            pretrained(tmp_path, f"{lr}-{seed}", score, seed, range(3), command=f"--lr {lr}")
    (table,), _ = tables_of(tmp_path)
    (test,) = [t for t in found_tests(table, "over pre-trainings") if t.b in table.recipes]
    expected = stats.ttest_ind(a, b, equal_var=False)  # equal at all seeds: no luck of splits
    assert (test.t, test.p) == pytest.approx((expected.statistic, expected.pvalue))
    d = test.difference / math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)
    assert test.d == pytest.approx(d) and test.effect == "d"
    assert sorted(table.recipes) == ["RS-BYOL-1 (3 pre-trainings, --lr 0.03)",
                                     "RS-BYOL-1 (4 pre-trainings, --lr 0.2)"]  # fmt: skip


@pytest.mark.parametrize("key", ["code", "archive"])
def test_encoders_of_another_script_or_list_of_pairs_are_another_recipe(tmp_path, key):
    """Also where the command is the same: README has users edit `augment`. The second was resumed
    by another version of the script than it was begun with."""
    values = ("1" * 12, f"{'1' * 12}+{'2' * 12}")
    for value, scores in zip(values, ([0.60, 0.61, 0.62], [0.90, 0.91, 0.92]), strict=True):
        for seed, score in enumerate(scores):
            pretrained(tmp_path, f"{len(value)}-{seed}", score, seed, made_by={key: value})
    (table,), faults = tables_of(tmp_path)
    means = {c.weights: c.mean for c in table.cells if c.over == "pre-trainings"}
    named = [f"RS-BYOL-1 (3 pre-trainings, {key} {value})" for value in values]
    assert means == dict(zip(named, [pytest.approx(0.615), pytest.approx(0.915)], strict=True))
    assert not faults


def test_fine_tuned_and_frozen_encoders_are_recipes_of_their_own(tmp_path):
    for seed in range(3):
        pretrained(tmp_path, f"p{seed}", 0.6 + 0.02 * seed, seed, range(3))
        for path in tmp_path.glob(f"p{seed}-*.json"):
            made = json.loads(path.read_text())
            made["weights"]["name"] += " fine-tuned"
            made["metrics"]["f1_macro"] += 0.3
            made["config"] |= {"finetune": True}
            if seed < 2:
                write(tmp_path / "tuned", made, path.stem)
    (table,), _ = tables_of(tmp_path)
    assert [len(rows) for rows in table.recipes.values()] == [3]  # two fine-tuned ones make none
    assert {row for row in table.rows if "fine-tuned" in row} <= {*table.shown()}
    write(tmp_path / "tuned", made, path.stem)
    (table,), _ = tables_of(tmp_path)
    assert sorted(table.recipes) == [f"{OURS} (3 pre-trainings)",
                                     f"{OURS} fine-tuned (3 pre-trainings)"]  # fmt: skip


def test_a_recipe_is_judged_at_the_latest_epoch_that_three_pre_trainings_have(tmp_path):
    for seed in range(3):
        pretrained(tmp_path, f"p{seed}/encoder-epoch0030", 0.6 + 0.02 * seed, seed, range(3))
    pretrained(tmp_path, "p0/encoder-epoch0070", 0.7, 0, range(3), epoch="70")
    pretrained(tmp_path, "p0/encoder-epoch0010", 0.5, 0, range(3), epoch="10", train_images=20)
    table, few = tables_of(tmp_path)[0]
    assert table.shown() == [f"{OURS} (3 pre-trainings)"]
    assert table.first(table.shown()[0]).epoch == 30
    assert "judged at epoch 30." in analyze.notes(table)
    assert "judged at" not in analyze.notes(few)
    assert len(few.shown()) == 1  # judged, as no later encoder was probed with so few labels


def test_bands_of_unequal_seeds_are_told_of(tmp_path):
    for band, seeds in (("Red", 5), ("Green", 3)):
        for seed in range(seeds):
            score = 0.6 + 0.05 * seed + 0.1 * (band == "Green")
            write(tmp_path, result(name="random", bands=(band,), seed=seed, score=score))
    (table,), _ = tables_of(tmp_path)
    means = {cell.bands: cell.mean for cell in table.cells}
    assert means == pytest.approx({"Red": 0.7, "Green": 0.75, "mean": 0.7})
    assert "Means of bands are over the seeds that all have" in analyze.notes(table)
    (tmp_path / "even").mkdir()
    for path in tmp_path.glob("*seed[012].json"):
        path.rename(tmp_path / "even" / path.name)
    (table,), _ = tables_of(tmp_path / "even")
    assert "Means of bands" not in analyze.notes(table)


def test_a_recipe_has_one_name_at_every_number_of_labels(tmp_path):
    for seed, command, labels in itertools.product(range(3), ("--lr 1", "--lr 2"), (None, 20)):
        if labels is None or command == "--lr 1":
            validation = "its list" if labels else "a fifth of the training split"
            pretrained(tmp_path / str(labels), f"{command[-1]}{seed}", 0.6 + 0.02 * seed, seed,
                       command=command, train_images=labels, validation=validation)  # fmt: skip
    all_labels, few = tables_of(tmp_path)[0]
    assert sorted(all_labels.recipes) == [f"{OURS} (3 pre-trainings, --lr {n})" for n in (1, 2)]
    assert list(few.recipes) == [f"{OURS} (3 pre-trainings, --lr 1)"]


def test_results_of_two_precisions_are_two_rows_not_one_for_each_file(tmp_path):
    for seed, bf16 in itertools.product(range(3), (False, True)):
        made = result(name="random", seed=seed, score=0.5 + 0.01 * seed, bf16=bf16)
        write(tmp_path / str(bf16), made | {"config": made["config"] | {"identity": f"{bf16}"}})
    (table,), _ = tables_of(tmp_path)
    assert table.rows == ["random (bf16 false)", "random (bf16 true)"]


def test_the_same_archive_under_another_path_is_the_same_recipe(tmp_path):
    for seed, root in enumerate(("data/sen12ms", "/home/me/data/sen12ms", "data/sen12ms/")):
        pretrained(tmp_path, f"p{seed}", 0.6 + 0.02 * seed, seed, made_by={"archive": "a" * 12},
                   command=f"--mode single --root {root}")  # fmt: skip
    (table,), _ = tables_of(tmp_path)
    assert list(table.recipes) == [f"{OURS} (3 pre-trainings)"]


def test_what_is_no_better_seldom_seems_so():
    """Nominal: 5 %. Bands of one encoder go together, pre-trainings differ, splits are shared: what
    suits an encoder in one split of 80 to 20 correlates by 0.2 with what does in another."""
    rng, wrong, columns = np.random.default_rng(3), np.zeros(3), MS[:3]
    pretrainings = ["p0", "p1", "p2"]
    for _ in range(400):
        split, drawn = rng.normal(0, 0.02, (2, 5))
        luck = 0.02 * (0.2**0.5 * rng.normal(size=(3, 1)) + 0.8**0.5 * rng.normal(size=(3, 5)))
        rows = {"random": drawn + luck[0], "stats": luck[1], "average": luck[2]}
        rows |= {name: rng.normal(0, 0.005) + luck[2] for name in pretrainings}
        values = {(row, column): dict(enumerate(0.5 + split + of + rng.normal(0, 0.005, 5)))
                  for row, of in rows.items() for column in columns}  # fmt: skip
        for i, (kind, a, b) in enumerate([
            ("over seeds", ["average"], "random"), ("over pre-trainings", pretrainings, "random"),
            ("over pre-trainings", pretrainings, "stats"),
        ]):  # fmt: skip
            wrong[i] += analyze.compare(values, blank(kind), a, [b], columns, 0.25).p < 0.05
    assert (wrong / 400 < 0.07).all(), wrong / 400


@pytest.mark.parametrize(("score", "words"), [
    (0.7, "beats random by 0.200 F1"), (0.3, "is below random by 0.200 F1"),
    (0.501, "does not differ significantly from random"),
])  # fmt: skip
@pytest.mark.parametrize("bands", [["Red", "Green", "Blue", "NIR"], ["Red"]])
def test_the_verdict_says_whether_pre_training_beats_random(tmp_path, score, words, bands):
    for i, band in enumerate(bands):
        for seed in range(3):
            shake, shift = 0.01 * (seed - 1), 0.005 * (-1) ** i * (len(bands) > 1)
            low, high = 0.5 - shake - shift, score + 0.5 * shake + shift
            write(tmp_path, result(bands=[band], seed=seed, score=high))
            write(tmp_path, result(name="random", bands=[band], seed=seed, score=low))
    said = verdict_of(tmp_path)
    assert f"This encoder, RS-BYOL-1, {words}" in said and "95 % interval" in said


def test_the_verdict_is_against_the_best_random_row_of_the_shared_bands(tmp_path):
    """BatchNorm re-estimated handicaps random weights: to beat those says little."""
    for seed, band in itertools.product(range(3), ("Red", "Blue")):
        shake = 0.01 * seed
        write(tmp_path, result(bands=[band], seed=seed, score=0.6 + shake), f"o{band}{seed}")
        for bn, score in (("encoder", 0.58), ("reestimate", 0.4)):
            made = result(name="random", bands=[band], seed=seed, score=score + 2 * shake, bn=bn)
            write(tmp_path, made, f"{bn}{band}{seed}")
        made = result(name="random", bands=["Red"], seed=seed, score=0.9 + shake, bn="third")
        write(tmp_path, made, f"third{seed}")
    assert ("RS-BYOL-1 (bn encoder), does not differ significantly from random (bn encoder)"
            in verdict_of(tmp_path))  # fmt: skip


def test_the_verdict_is_against_random_weights_of_the_same_architecture(tmp_path):
    for seed, (name, arch) in itertools.product(
        range(3), ((OURS, "resnet18"), ("random", "resnet18"), ("random", "resnet50"))
    ):
        score = 0.5 + 0.1 * (arch == "resnet50") + 0.01 * seed * (name == OURS)
        write(tmp_path, result(name=name, arch=arch, seed=seed, score=score), f"{name}{arch}{seed}")
    assert "from random (arch resnet18)" in verdict_of(tmp_path)


def test_a_fine_tuned_encoder_is_compared_with_one_trained_from_scratch(tmp_path):
    for seed in range(3):
        for name, score in ((f"{OURS} fine-tuned", 0.9), ("scratch", 0.8), ("random", 0.5)):
            tuned = name != "random"
            made = result(name=name, seed=seed, score=score + 0.01 * seed**2 * tuned)
            made["config"] |= {"finetune": tuned, "bn": None if tuned else "encoder"}
            write(tmp_path, made)
    assert "fine-tuned, is not tested against scratch (+0.100 F1" in verdict_of(tmp_path)


def test_without_random_weights_there_is_no_verdict(tmp_path):
    write(tmp_path, result())
    assert "stands beside no random encoder" in verdict_of(tmp_path)
    write(tmp_path / "random", result(name="random"))
    assert "No encoder of pretrain.py" in verdict_of(tmp_path / "random")


def test_the_papers_own_means_say_that_no_figure_is_mistyped():
    for row in analyze.PAPER_I.values():
        *bands, mean = map(float, row.split())
        assert len(bands) == 12 and abs(np.mean(bands) - mean) < 0.02, row


# ---- tables


def test_cells_are_mean_and_t_interval_over_seeds(tmp_path):
    for seed, score in enumerate([0.1, 0.2, 0.3, 0.4, 0.5]):
        write(tmp_path, result(seed=seed, score=score, split="official", subset=None))
    write(tmp_path, result(bands=["Blue"], score=0.25, split="official", subset=None))
    (table,), _ = tables_of(tmp_path)
    red = next(c for c in table.cells if c.bands == "Red")
    half = 2.776445 * (0.025 / 5) ** 0.5  # t(0.975, 4) of a printed table; the variance is 0.025
    assert (red.n, red.mean, red.half_width_95) == (5, pytest.approx(0.3), pytest.approx(half))
    assert "| RS-BYOL-1 | F1 | 0.250 | 0.300 ± 0.196 |" in analyze.tables_markdown([[table]])


@pytest.mark.parametrize("change", [
    {"dataset": "sen12ms"}, {"split": "spatial"}, {"subset": None}, {"subset": 5000}, {"size": 224},
    {"classes": ["a", "b"]}, {"head": "linear"}, {"synthetic": True}, {"files": "abcd"},
    {"train_images": 50}, {"places": {"Red": [0, 5]}}, {"ignored": [255]}, {"images": "labels"},
    {"parts": "a split"}, {"nodata": 0.0},
])  # fmt: skip
def test_different_settings_never_share_a_table(tmp_path, change):
    write(tmp_path, result(seed=0, score=0.8), "one")
    write(tmp_path, result(seed=1, score=0.2, **change), "two")
    tables, faults = tables_of(tmp_path)
    means = [cell.mean for t in tables for cell in t.cells]
    assert sorted(means) == [0.2, 0.8] and len(tables) == 2 and not faults
    assert len({table.title for table in tables}) == 2


def test_a_users_own_tables_are_named_by_where_they_lie(tmp_path):
    """By a digest of their files only where two of one place differ."""
    for name in ("radar", "optical"):
        root = f"/home/me/{name}.csv"
        write(tmp_path, result(dataset="csv", root=root, files=name, subset=None), name)
    first, second = sorted(table.title for table in tables_of(tmp_path)[0])
    assert "csv me/optical.csv" in first and "csv me/radar.csv" in second
    assert "files" not in first + second
    write(tmp_path, result(dataset="csv", root=root, files="copied anew", subset=None), "new")
    assert sum("files" in table.title for table in tables_of(tmp_path)[0]) == 2


@pytest.mark.parametrize("change", [
    {"arch": "resnet18"}, {"epochs": 10}, {"lr": 0.5}, {"bn": "reestimate"}, {"something_new": "b"},
])  # fmt: skip
def test_runs_that_differ_in_any_setting_are_rows_of_their_own(tmp_path, change):
    """Whether they have one seed or two; the last: a setting of tomorrow's probe."""
    for key in change:
        write(tmp_path, result(score=0.8, **{key: "a"}), "one")
        write(tmp_path, result(score=0.2, **change), "two")
        write(tmp_path, result(seed=1, score=0.3, **change), "three")
    (table,), faults = tables_of(tmp_path)
    assert not faults and len(table.rows) == 2
    assert sorted(c.mean for c in table.cells) == [pytest.approx(0.25), 0.8]
    assert all(next(iter(change)) in row for row in table.rows)


def test_runs_of_other_files_are_never_called_the_same(tmp_path):
    """Where only the digest of all that determines a result tells them apart, it does."""
    write(tmp_path, result(score=0.8, identity="a" * 64), "one")
    write(tmp_path, result(score=0.2, identity="b" * 64), "two")
    write(tmp_path, result(score=0.3, identity="b" * 64, device="cuda"), "two2")
    (table,), (fault,) = tables_of(tmp_path)
    assert sorted(c.mean for c in table.cells) == [0.2, 0.8]
    assert "the same run as" in fault and "two.json, with other numbers, which" in fault


def test_a_choice_that_a_probe_makes_for_each_seed_is_no_setting(tmp_path):
    for seed in range(2):
        write(tmp_path, result(seed=seed, optimiser=str(seed), mean=[seed], identity=str(seed),
                               learning_rate=seed))  # fmt: skip
    (table,), faults = tables_of(tmp_path)
    assert table.rows == [OURS] and not faults


def test_encoders_of_one_name_are_told_apart_by_their_files(tmp_path):
    """By the run's folder, and by the hash only where two folders have one name."""
    for n, source in enumerate(["a/one", "a/two", "a/three", "b/three"]):
        weights = {"name": OURS, "source": f"{source}/encoder.safetensors"}
        write(tmp_path, result(weights=weights | {"sha256": f"{n:08x}" * 8}), str(n))
    for sha, source in [("d", "my.safetensors"), ("e", "a/one/encoder-epoch0010.safetensors")]:
        weights = {"name": OURS, "source": source, "sha256": sha * 64}
        write(tmp_path, result(weights=weights), sha)
    (table,), faults = tables_of(tmp_path)
    labels = ["00000002", "00000003", "my", "one", "one/encoder-epoch0010", "two"]
    assert table.rows == [f"RS-BYOL-1 ({name})" for name in labels] and not faults


def test_rows_that_were_probed_with_other_settings_say_so_and_are_not_tested(tmp_path):
    """Or 100 epochs of ours would beat 2 epochs of random."""
    for seed in range(3):
        score = 0.5 + 0.01 * seed
        write(tmp_path, result(name="random", seed=seed, score=score, epochs=2, task="a"))
        write(tmp_path, result(seed=seed, score=0.7 + 0.02 * seed, task="b"))
    (table,), _ = tables_of(tmp_path)
    assert table.rows == ["random (epochs 2)", f"{OURS} (epochs 100)"]
    assert [test.note for test in table.tests] == ["probed with other settings"]
    said = "is not tested against random (epochs 2) (probed with other settings)."
    assert said in analyze.verdict([table])


def test_any_resnets_weights_are_not_judged_as_ours(tmp_path):
    for seed, name in itertools.product(range(3), ("random", "other stats")):
        write(tmp_path, result(name=name, seed=seed, score=0.5 + 0.01 * seed))
    assert "No encoder of pretrain.py" in verdict_of(tmp_path)


def test_bands_with_fewer_seeds_count_in_means_and_in_tests_over_bands(tmp_path):
    """Red has five seeds, the others one: over bands n is 3, over seeds Red alone is tested."""
    for name, base in (("random", 0.5), (OURS, 0.6)):
        for i, band in enumerate(MS[:3]):
            for seed in range(5 if band == "Red" else 1):
                score = base + 0.03 * (i + seed) * (name == OURS)
                write(tmp_path, result(name=name, bands=[band], seed=seed, score=score))
    (table,), _ = tables_of(tmp_path)
    means = {c.weights: (c.n, round(c.mean, 3)) for c in table.cells if c.bands == "mean"}
    assert means == {"random": (1, 0.5), OURS: (1, 0.63)}
    over = {test.kind: test for test in table.tests}
    assert over["over bands"].n == "3" and over["over bands"].p == over["over bands"].p
    assert (over["over seeds"].bands, over["over seeds"].n) == ("Red", "5")


def test_a_subset_that_each_seed_draws_from_fixed_lists_widens_intervals_too(tmp_path):
    for split, subset, overlap in (("official", 7000, 0.25), ("official", None, 0)):
        path = write(tmp_path, result(split=split, subset=subset))
        assert analyze.Result(path).overlap == overlap
    tiles = write(tmp_path, result("segment", split="official", subset=900))  # of the training part
    assert analyze.Result(tiles).overlap == 0


def test_batchnorm_is_named_on_all_frozen_rows_once_it_differs(tmp_path):
    for name, bn in (("random", "encoder"), ("scratch", "encoder"), (OURS, "reestimate")):
        write(tmp_path, result(name=name, bn=bn))
    (table,), _ = tables_of(tmp_path)
    assert table.rows == ["random (bn encoder)", "scratch", "RS-BYOL-1 (bn reestimate)"]


def test_random_weights_of_different_seeds_are_one_row_under_either_name(tmp_path):
    for seed, name in enumerate(["random", "Random init", "random"]):
        made = result(name=name, seed=seed)
        made["weights"]["sha256"] = f"{seed}" * 64
        write(tmp_path, made)
    (table,), _ = tables_of(tmp_path)
    assert table.rows == ["random"] and table.cells[0].n == 3


def test_the_title_says_all_settings_and_where_a_users_own_data_lie(tmp_path):
    roots = {"csv a/tiles.csv": "/data/a/tiles.csv", "csv tiles.csv": "tiles.csv", "csv": None}
    for n, root in enumerate(roots.values()):
        write(tmp_path, result("segment", dataset="csv", subset=n, root=root), str(n))
    titles = [table.title for table in tables_of(tmp_path)[0]]
    rest = "split random, 64 px, 8 classes, deeplabv3"
    assert titles == sorted(f"{name}, land cover maps, subset {n}, {rest}"
                            for n, name in enumerate(roots))  # fmt: skip


def test_the_papers_figures_stand_only_beside_the_papers_data(tmp_path):
    def paper(stage: str, name: str, bands: list[str], metric: str, **changes) -> str:
        r = analyze.Result(write(tmp_path, result(stage, name, bands, **changes)))
        return analyze.paper_value(r, metric, r.bands)

    tiles = {"subset": 900}
    assert paper("segment", "RS-BYOL-1 w/64BS", ["Green"], "miou", **tiles) == "59.6"
    assert paper("segment", OURS, ["SAR2"], "aa", **tiles) == "70.5"
    assert paper("segment", "SeCo", SAR, "aa", **tiles) == "60.9"
    assert paper("segment", "SeCo", SAR, "aa", subset=50) == ""
    assert paper("probe", "SeCo", RGB, "f1_macro") == "0.90"
    whole = {"subset": None, "train": 21600, "test": 5400}
    assert paper("probe", "SeCo", RGB, "f1_macro", **whole) == "0.92"
    assert paper("probe", "Random init", RGB, "f1_macro", **whole) == "0.50"
    assert paper("probe", "SeCo", RGB, "f1_macro", **whole | {"train": 173, "test": 43}) == ""
    assert paper("probe", "SeCo", RGB, "f1_macro", **whole | {"arch": "resnet18"}) == ""
    assert paper("probe", "Scratch supervised", RGB, "f1_macro", finetune=True) == "0.80"
    s12 = {"dataset": "sen12ms", "subset": 5000}
    assert paper("probe", "RS-BYOL-3 S1S2", SAR, "f1_macro", **s12) == "0.83"
    whole |= {"dataset": "resisc45", "train": 25200, "test": 6300}
    assert paper("probe", "random", RGB, "f1_macro", **whole) == "0.36"
    for changes in ({"subset": 500}, {"dataset": "eurosat-rgb"}, {"synthetic": True},
                    {"encoder": {"synthetic": "true"}},
                    {"train_images": 10}, {"finetune": True}, {"head": "knn"}):  # fmt: skip
        assert paper("probe", "SeCo", RGB, "f1_macro", **changes) == ""
    assert paper("probe", "SeCo", ["Red"], "f1_macro") == ""
    assert paper("segment", OURS, ["Green"], "miou", classes=["c"] * 10, **tiles) == ""
    assert paper("segment", OURS, ["Green"], "miou", dataset="csv", **tiles) == ""


def test_every_format_has_the_figures_and_a_dash_where_a_run_is_missing(report):
    rows = [r for r in csv_rows(report / "tables.csv") if r["train_images"] == "-"]
    miss = [r for r in rows if r["bands"] == "NNIR" and r["weights"] == "RS-BYOL-1 MS only"]
    assert [(r["mean"], r["half_width_95"], r["n"]) for r in miss] == [("-", "-", "0")]
    mean = [r for r in rows if r["bands"] == "mean" and r["weights"] == "RS-BYOL-1 MS only"]
    assert [r["mean"] for r in mean] == ["-"]  # a mean of nine bands is not one of ten
    green = next(r for r in rows if r["weights"] == OURS and r["bands"] == "Green"
                 and r["metric"] == "mIoU")  # fmt: skip
    mean, half = (f"{float(green[key]):.1f}" for key in ("mean", "half_width_95"))
    markdown, latex = (report / "tables.md").read_text(), (report / "tables.tex").read_text()
    assert f"{mean} ± {half}" in markdown and "(57.7) |" in markdown
    assert f"{mean} $\\pm$ {half}" in latex and "(57.7) &" in latex
    page = (report / "index.html").read_text()
    assert f"{mean}<br>± {half}" in page and "<br><small>(57.7)</small></td>" in page
    line = next(x for x in markdown.splitlines() if x.startswith("| RS-BYOL-1 MS only | F1"))
    assert line.split("|")[10].strip() == "–" and "0.000" not in line


def test_results_of_synthetic_images_stand_in_a_report_of_their_own(tree, report, tmp_path):
    page = (report / "index.html").read_text()
    assert "SYNTHETIC" not in page
    assert "12 of " in page and "results are synthetic" in page and "1 of 3 runs" in page
    out = ["--out", str(tmp_path)]
    assert analyze.main([str(tree / "results/demo"), *out]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "SEN12MS (SYNTHETIC images)" in page


def test_results_of_two_versions_of_a_script_are_told_of(tmp_path, capsys, undrawn):
    for seed, script in enumerate(("aaa", "aaa", "bbb")):
        write(tmp_path / "results", result(seed=seed, versions={"script": script}))
    assert analyze.main([str(tmp_path / "results"), "--out", str(tmp_path / "report")]) == 0
    assert "2 versions of probe.py made these results" in capsys.readouterr().out
    (tmp_path / "results/probe-eurosat-7000-Red-RS-BYOL-1-seed2.json").unlink()
    assert analyze.main([str(tmp_path / "results"), "--out", str(tmp_path / "report")]) == 0
    assert "versions of" not in capsys.readouterr().out


# ---- what is left out


def test_broken_unknown_and_duplicate_results_are_named_and_left_out(tmp_path, capsys, undrawn):
    results = tmp_path / "in"
    good = write(results, result(score=0.8))
    same = write(results / "z", result(score=0.8))
    text = json.dumps(result(score=0.5))
    bad = {
        "future": json.dumps(result() | {"schema": 2}), "torn": good.read_text()[:200],
        "list": "[1]", "config": '{"lr": 1}', "deep": "[" * 100_000, "bytes": "\udcff",
        "stage": json.dumps(result() | {"stage": ["probe"]}),
        "word": json.dumps(result() | {"dataset": ["eurosat"]}),
        "bands": json.dumps(result() | {"bands": [["Red"]]}),
        "nan": text.replace('"f1_macro": 0.5', '"f1_macro": NaN'),
        "percent": text.replace('"f1_macro": 0.5', '"f1_macro": 80.0'),
        "lacking": json.dumps({k: v for k, v in result().items() if k != "metrics"}),
        "weights": json.dumps(result() | {"weights": "random"}),
    }  # fmt: skip
    for name, content in bad.items():
        (results / f"{name}.json").write_bytes(content.encode(errors="surrogateescape"))
    (results / "notes.txt").write_text("no JSON, so no matter")
    assert report_on(tmp_path) == 1
    said = capsys.readouterr().err
    named = [line.split("left out: ")[1].split(": ")[0] for line in said.splitlines()]
    assert sorted(named) == sorted([str(results / f"{name}.json") for name in bad] + [str(same)])
    assert "schema 2 is unknown" in said and f"the same run as {good}, which" in said
    assert [r["mean"] for r in csv_rows(tmp_path / "out/tables.csv")] == ["0.8"]
    assert "schema 2 is unknown" in (tmp_path / "out/index.html").read_text()


def test_odd_settings_cost_no_report(tmp_path, undrawn):
    odd = [
        {"size": [64]}, {"bn": {"a": 1}}, {"epochs": None}, {"train": "many"}, {"train": 0},
        {"encoder": [1]}, {"encoder": {"command": 3, "seed": [0], "epoch": "x"}}, {"classes": 10},
        {"root": ["a"]}, {"files": 3}, {"lr": 1e308}, {"subset": "some"}, {"test": 1e300},
        {"train_images": "all"},
    ]  # fmt: skip
    write(tmp_path / "in", result(), "good")
    for number, changes in enumerate(odd):
        write(tmp_path / "in", result(seed=number % 3, **changes), f"odd{number}")
    assert report_on(tmp_path) == 1
    assert "0.8" in {r["mean"] for r in csv_rows(tmp_path / "out/tables.csv")}


def test_broken_embeddings_and_logs_are_named_and_left_out(tmp_path, capsys, undrawn):
    write(tmp_path / "results", result())
    (tmp_path / "results/red.npz").write_bytes(b"PK no zip")
    write_run(tmp_path / "runs/ok", 0, last='{"step": 700, "lo')  # still being written: no fault
    write_run(tmp_path / "runs/bad", 1, last='{"step": 700\n')
    write_run(tmp_path / "runs/worse", 2)
    (tmp_path / "runs/worse/config.json").write_text("[")
    write_run(tmp_path / "runs/young", 3)
    (tmp_path / "runs/young/log.jsonl").write_text("")
    argv = ["results", "--out", "report", "--runs", "runs"]
    assert analyze.main([str(tmp_path / a) if a[0] != "-" else a for a in argv]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 4
    for part in ("red.npz: no embeddings", "bad/log.jsonl: JSON", "worse/log.jsonl: JSON",
                 "young/log.jsonl: ValueError: no line in it yet"):  # fmt: skip
        assert part in said


ODD_FEATURES = {  # sklearn's t-SNE ends the process on some of these
    "constant": (np.ones((60, 8)), LABELS),
    "nearly constant": (1 + 1e-9 * np.random.default_rng(0).random((60, 8)), LABELS),
    "no columns": (np.ones((60, 0)), LABELS),
    "one column": (np.random.default_rng(0).random((60, 1)), LABELS),
    "not finite": (np.full((60, 8), np.nan), LABELS),
    "few": (np.random.default_rng(0).random((3, 8)), LABELS[:3]),
    "labels that do not fit": (np.random.default_rng(0).random((60, 8)), LABELS[:59]),
    "labels of words": (np.random.default_rng(0).random((60, 8)), LABELS.astype(str)),
    "objects": (np.array([{}] * 60, object), LABELS),
}


@pytest.mark.parametrize("what", ODD_FEATURES)
def test_embeddings_that_no_tsne_can_be_made_of_are_refused(tmp_path, what):
    features, labels = ODD_FEATURES[what]
    np.savez(tmp_path / "f.npz", features=features, labels=labels, classes=np.array(CLASSES))
    faults: list[str] = []
    assert analyze.draw_tsne([tmp_path / "f.npz"], faults) is None
    assert len(faults) == 1 and "f.npz: no embeddings" in faults[0]


def test_huge_tiny_and_sparse_embeddings_and_labels_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(60) % 2, 999_999, -1)  # far from any list of classes
    for name, features in {
        "huge": 1e30 * rng.random((60, 8)), "tiny": 1e-30 * rng.random((60, 8)),
        "sparse": np.eye(60, 8),
    }.items():  # fmt: skip
        save_features(tmp_path / f"{name}.npz", features, labels)
    faults: list[str] = []
    figure = analyze.draw_tsne(sorted(tmp_path.glob("*.npz")), faults)
    assert len(figure.axes) == 3 and not faults
    assert [text.get_text() for text in figure.axes[0].texts] == ["-1", "999999"]


def test_classes_are_named_at_their_points_and_twenty_have_a_colour_each(tmp_path):
    labels = np.arange(60) % 20
    names = [f"class {i}" for i in range(20)]
    features = np.eye(60, 8) + labels[:, None]
    np.savez(tmp_path / "f.npz", features=features, labels=labels, classes=np.array(names),
             synthetic=np.array(True))  # fmt: skip
    (axis,) = analyze.draw_tsne([tmp_path / "f.npz"], []).axes
    assert axis.get_title() == "f\n(SYNTHETIC images)"
    assert len({tuple(c.get_facecolor()[0]) for c in axis.collections}) == 20
    assert {text.get_text() for text in axis.texts} == set(names)


EVIL = "<script>alert(1)</script> & | 50% _x_ $y$ #{z} ~^\\ \u03b2 \u2713"
MATHS = r"costs $\nothing{ or 3$"  # matplotlib raises on what it takes for mathematics


def test_odd_names_of_weights_and_runs_cannot_break_the_report(tmp_path, capsys):
    names = ["_x", "a\ud800b", "a\x1b[31mb\nc", "=1+2", "@sum", "x" * 500, "", EVIL, MATHS]
    for number, name in enumerate(names):
        made = result(name=name, score=0.1 * number)
        made["weights"]["source"] = f"{name}/encoder.safetensors"
        write(tmp_path / "in", made, f"odd {number}")
    for folder in ("_x", "a\x1b[31mb", "=1+2", "$x", "x" * 200, os.fsdecode(b"\xff")):
        write_run(tmp_path / "runs" / folder, 0)
    write(tmp_path / "in", result(name="random"), "random")
    assert report_on(tmp_path, "--runs", tmp_path / "runs") == 0
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()
             if path.suffix not in (".png", ".csv")}  # fmt: skip
    page, markdown, latex = (texts[n] for n in ("index.html", "tables.md", "tables.tex"))
    for text in [capsys.readouterr().out, *texts.values()]:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    for path in (tmp_path / "out").glob("*.csv"):
        rows = csv_rows(path)
        assert rows and not any(cell[:1] in ("=", "+", "@") for r in rows for cell in r.values())
    assert "<script" not in page and "&lt;script&gt;" in page
    lines = [x for x in markdown.splitlines() if x.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert (r"\& | 50\% \_x\_ \$y\$ \#\{z\} \textasciitilde{}\textasciicircum{}\textbackslash{} "
            "? ?") in latex  # fmt: skip
    balanced(latex)
    set_by_pdflatex(tmp_path, latex)


def test_a_figure_that_fails_is_named_and_the_report_goes_on(tmp_path, monkeypatch, capsys):
    write(tmp_path / "in", result())
    monkeypatch.setattr(analyze, "draw_bars", lambda tables: 1 / 0)
    assert report_on(tmp_path) == 1
    assert "-bars: ZeroDivisionError" in capsys.readouterr().err
    assert "0.800" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize("argv", [[], ["nowhere"], ["{ok}", "--runs", "nowhere"],
                                  ["{ok}", "--out", "{ok}/r.json"]])  # fmt: skip
def test_wrong_use_ends_with_status_two_and_one_line(tmp_path, argv, capsys):
    write(tmp_path / "ok", result(), "r")
    with pytest.raises(SystemExit) as stop:
        analyze.main([a.format(ok=tmp_path / "ok") for a in argv])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([x for x in said if "error" in x]) == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["ok", "r.json"]


def test_nothing_to_report_is_bad_data(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.main([str(tmp_path), "--out", str(tmp_path / "report")])
    assert stop.value.code == 1 and "no result" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


# ---- the folder


def test_a_report_replaces_its_own_files_and_no_other(tmp_path):
    write(tmp_path / "in", result())
    assert report_on(tmp_path) == 0
    out = tmp_path / "out"
    (out / "mine.txt").write_text("notes")
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert report_on(tmp_path) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first  # reproducible


# ---- text, plots, page


def balanced(latex: str) -> None:
    begun = re.findall(r"\\begin\{(\w+\*?)\}", latex)
    assert begun and sorted(begun) == sorted(re.findall(r"\\end\{(\w+\*?)\}", latex))
    plain = re.sub(r"\\[{}]", "", latex)
    assert plain.count("{") == plain.count("}")


def set_by_pdflatex(folder: Path, latex: str) -> None:
    if not shutil.which("pdflatex"):
        return
    document = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (folder / "t.tex").write_text(document + latex + "\n\\end{document}\n")
    command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "t.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    assert done.returncode == 0, (folder / "t.log").read_text()[-2000:]


def test_latex_is_balanced_with_short_captions_and_compiles(report, tmp_path):
    latex = (report / "tables.tex").read_text()
    balanced(latex)
    captions = re.findall(r"\\caption\{(.*)\}", latex)
    assert captions and max(len(text.split()) for text in captions) < 35
    set_by_pdflatex(tmp_path, latex)


def test_the_page_opens_with_answers_holds_every_figure_and_asks_for_nothing_else(report):
    page = (report / "index.html").read_text()
    head, tables = page.split("<h2>Tables and tests</h2>")
    assert "<table" not in head and "<img" not in tables and "beats random by" in head
    for section in head.split("<h2>")[1:-2]:  # then embeddings and pre-training
        assert re.search(r"<p class=verdict>.*?</p>\s*<figure><img", section)
    printed, markdown = (report / "printed").read_text(), (report / "tables.md").read_text()
    for line in printed.splitlines()[:3]:
        assert html.escape(line.split(": ", 1)[1]) in page  # the verdict, in all three places
        assert analyze.plain_markdown(line) in markdown
    stems = {p.stem for p in report.glob("*.png")}
    assert stems == {p.stem for p in report.glob("*.svg")} and "runs" in stems
    for part in ("bars", "tsne", "1ch-labels", "1ch-steps", "1ch-classes"):
        assert any(stem.endswith(part) for stem in stems), part
    images = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', page)
    sheets = 4 + 1 + 1  # CAM sheets of four rows of one section, one map sheet, views.png
    assert len(images) == len(stems) + sheets
    for kind, data in images:
        start = base64.b64decode(data)[:300]
        assert start.startswith(b"\x89PNG") if kind == "png" else b"<?xml" in start
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert all(link.startswith("data:") for link in links) and 'name="viewport"' in page
    assert not re.search(r"url\(|@import|<script|<iframe|<object", page)


def bars_of(folder: Path):
    tables, _ = tables_of(folder)
    return analyze.draw_bars(tables)


def test_the_bars_show_every_row_and_band_and_the_floor_as_a_line(tmp_path):
    names = ["random", "stats"] + [f"encoder {i}" for i in range(9)]
    for name, band in itertools.product(names, (["Red"], ["Blue"], RGB)):
        write(tmp_path, result(name=name, bands=band, score=0.5))
    figure = bars_of(tmp_path)
    shown = [[t.get_text() for t in axis.get_xticklabels()] for axis in figure.axes]
    assert shown == [["Blue", "Red", "mean"]] * 2 + [["RGB"]] * 2  # seven rows a panel,
    bars = [len(axis.patches) for axis in figure.axes]
    assert bars == [(1 + 7) * 3, (1 + 2) * 3, 1 + 7, 1 + 2]  # random in each
    for axis, bands in zip(figure.axes, shown, strict=True):
        floors = [c for c in axis.collections if c.get_linestyle()[0][1]]
        assert len(floors) == len(bands)
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == sorted(["random", "stats (the floor)", *names[2:]])


def test_bars_start_at_zero_and_a_wide_interval_does_not_stretch_the_axis(tmp_path):
    for seed, score in ((0, 0.3), (1, 0.7)):
        write(tmp_path, result(seed=seed, score=score))
    (axis,) = bars_of(tmp_path).axes
    assert axis.get_ylim()[0] == 0 and 0.5 < axis.get_ylim()[1] < 0.7
    bar = axis.patches[0].get_width() / np.ptp(axis.get_xlim())
    assert bar < 0.1  # one band is no giant bar


def test_the_legend_stays_inside_the_figure(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for index, bn in itertools.product(range(9), ("encoder", "reestimate")):
        made = result("segment", f"_byol number {index}", bn=bn)
        write(tmp_path, made, f"{index} {bn}")
    figure = bars_of(tmp_path)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 18
    inside, shown = figure.bbox.extents, legend.get_window_extent().extents
    assert (shown[:2] >= inside[:2]).all() and (shown[2:] <= inside[2:]).all()


def test_f1_is_drawn_against_the_length_of_pre_training(tree):
    """A line for each pre-training, random as a band, the floor as a line."""
    tables, _ = tables_of(tree / "results/c")
    axis = analyze.draw_steps(tables[0]).axes[0]
    curves = [line for line in axis.lines if len(line.get_xdata()) == 3]
    assert len(curves) == 3 and all(list(c.get_xdata()) == [10, 30, 70] for c in curves)
    folder = tree / "results/c"
    means = [np.mean([json.loads(p.read_text())["metrics"]["f1_macro"]
                      for p in folder.glob(f"plain1-encoder-epoch00{epoch}-*")])
             for epoch in (10, 30, 70)]  # fmt: skip
    assert any(list(c.get_ydata()) == pytest.approx(means) for c in curves)
    levels = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert levels == [[10, 70]] * 2 and len(axis.collections) == 1
    shown = {text.get_text() for text in axis.figure.legends[0].get_texts()}
    assert {"random", "stats"} < shown
    assert list(tables[0].recipes) == ["RS-BYOL-1 (3 pre-trainings)"]
    assert not [row for row in tables[0].shown() if "0010" in row]  # judged at its end


def test_a_row_has_one_colour_in_all_figures_of_a_section():
    names = {"random (a)": "random", "random (b)": "random", "SeCo": "SeCo", "stats": "stats"}
    colours = analyze.colours_of(names)
    assert len({*colours.values()}) == 4 and colours["stats"] == "black"
    assert analyze.colours_of({"SeCo": "SeCo"})["SeCo"] == colours["SeCo"]


def test_f1_is_drawn_against_the_number_of_labels(tree, tmp_path):
    for name in ("a", "a20", "a40"):
        shutil.copytree(tree / "results" / name, tmp_path / name)
    tables, _ = tables_of(tmp_path)
    axis = analyze.draw_labels(tables).axes[0]
    assert axis.get_xscale() == "log"
    curves = [line for line in axis.lines if len(line.get_xdata()) == 3]
    assert len(curves) == 5
    assert all(list(c.get_xdata()) == [20, 40, 80] for c in curves)
    assert analyze.draw_labels(tables[:1]) is None


def test_a_further_row_on_other_bands_takes_no_figure_away(tmp_path):
    for labels, name in itertools.product((None, 20), ("random", OURS)):
        write(tmp_path / str(labels), result(name=name, train_images=labels))
    write(tmp_path, result(name="SeCo", bands=["SWIR1"]))
    figure = analyze.draw_labels(tables_of(tmp_path)[0])
    assert [text.get_text() for text in figure.legends[0].texts] == ["random", OURS]


def test_curves_have_cosine_and_match(tree):
    log = tree / "runs/single/log.jsonl"
    figure = analyze.draw_runs([analyze.Run(log)])
    axes = {axis.get_ylabel(): axis for axis in figure.axes}
    assert set(axes) == set(analyze.LOGGED.values())
    match = axes["match (0 best, 0.5 chance)"]
    assert len(match.lines[0].get_xdata()) == 14  # on some lines only
    logged = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert list(axes["loss"].lines[0].get_ydata()) == logged


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """<script>addEventListener("load", () => {
const wide = [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth);
const images = [...document.images];
parent.postMessage([innerWidth, images.filter(i => !i.naturalWidth).length,
  images.filter(i => i.getBoundingClientRect().right > innerWidth).length,
  document.documentElement.scrollWidth > innerWidth, wide.length].join(" "), "*")})</script>"""
FRAMES = """<script>addEventListener("message", e => document.body.append(`[${e.data}]`))</script>
<iframe src="page.html" width=1280 height=900></iframe>
<iframe src="page.html" width=390 height=900></iframe>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_opens_the_page_and_it_fits(report, tmp_path):
    """At 1,280 px no table scrolls sideways; at a phone's 390 px the page and figures shrink."""
    page = (report / "index.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("<details>", "<details open>") + MEASURE)
    (tmp_path / "frames.html").write_text(FRAMES)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr "
        "--dump-dom --virtual-time-budget=5000 --window-size=1800,1000"
    ).split()
    profile, address = f"--user-data-dir={tmp_path}/profile", (tmp_path / "frames.html").as_uri()
    done = subprocess.run([CHROMIUM, *flags, profile, address], capture_output=True, text=True)
    assert not [x for x in done.stderr.splitlines() if "CONSOLE" in x or "ERR_" in x]
    assert "[1280 0 0 false 0]" in done.stdout
    assert re.search(r"\[390 0 0 false \d+\]", done.stdout)


def test_maps_say_what_their_rows_and_means_differ_in(tmp_path):
    """The batch, the classes in each test set, the classes' names where their number is equal."""
    sizes = {OURS: 16, "scratch": 8}
    for (name, batch), seed in itertools.product(sizes.items(), range(2)):
        made = result("segment", name, seed=seed, batch=batch)
        made["metrics"]["classes"] = LAND[: 5 + seed]
        write(tmp_path / "a", made)
    (table,), _ = tables_of(tmp_path / "a")
    assert table.rows == ["scratch (batch 8)", f"{OURS} (batch 16)"]
    assert "over the 5 to 6 classes in its test set" in analyze.notes(table)
    for n, names in enumerate((LAND, LAND[::-1])):
        write(tmp_path / "b", result("segment", classes=names), str(n))
    tables, _ = tables_of(tmp_path / "b")
    assert all(", ".join(t.results[0].classes) in t.title for t in tables)
    assert "in its test set" not in analyze.notes(tables[0])


def test_two_lengths_of_one_file_are_told_apart_by_their_epochs(tmp_path):
    for n, epoch in enumerate(("6.67", "8.67")):
        weights = {"name": OURS, "source": "runs/mine/encoder.safetensors"}
        about = {"command": "pretrain.py --mode single", "epoch": epoch, "seed": "0"}
        made = result(weights=weights | {"sha256": f"{n:08x}" * 8}, encoder=about)
        write(tmp_path, made, str(n))
    (table,), _ = tables_of(tmp_path)
    assert table.rows == [f"{OURS} (epoch 6.67, 00000000)", f"{OURS} (epoch 8.67, 00000001)"]


def test_the_papers_figures_are_named_only_where_they_stand(tmp_path):
    for dataset, subset in (("csv", None), ("resisc45", 50), ("eurosat", 7000)):
        write(tmp_path / dataset, result(name="SeCo", bands=RGB, dataset=dataset, subset=subset))
    for dataset in ("csv", "resisc45"):
        (own,), _ = tables_of(tmp_path / dataset)
        assert "paper" not in own.caption + analyze.notes(own)
    (theirs,), _ = tables_of(tmp_path / "eurosat")
    assert "as the paper's Table II" in theirs.caption
    assert "the paper's figure" in analyze.notes(theirs)
