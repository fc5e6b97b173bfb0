"""analyze.py: from a tree of made-up results to tables, tests, plots and one page.

Numbers are compared with scipy and with values from R's manual; the page is opened in Chromium and
the LaTeX is set by pdflatex where they are installed.
"""

import base64
import csv
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import analyze  # noqa: E402

SCRIPT = Path(analyze.__file__)
RGB, RE, SAR = ["Red", "Green", "Blue"], ["RE5", "RE6", "RE7"], ["SAR1", "SAR2", "SAR1"]
CLASSES = "AnnualCrop Forest Herbs Highway Industrial Pasture Crop Homes River Sea".split()
LAND = "Forest Shrubland Grassland Wetlands Croplands Urban Barren Water".split()
MS = analyze.BANDS[:10]


def result(stage="probe", name="RS-BYOL-1", bands=("Red",), seed=0, score=0.8, **changes) -> dict:
    """A result as DESIGN section 4 has it; `changes` replace keys of it, or else of config."""
    names = CLASSES if stage == "probe" else LAND
    n = len(names)
    confusion = [[int(100 * score) if i == j else 3 for j in range(n)] for i in range(n)]
    per_class = {c: min(1.0, max(0.0, score - 0.1 + 0.02 * i)) for i, c in enumerate(names)}
    metrics = {
        "f1_macro": score,
        "f1_weighted": score,
        "accuracy": score,
        "f1_per_class": per_class,
    }
    if stage == "segment":
        metrics = {"miou": score, "aa": min(1.0, score + 0.13), "pixel_accuracy": score,
                   "iou_per_class": per_class, "recall_per_class": per_class}  # fmt: skip
    config = {"size": 64, "head": "mlp" if stage == "probe" else "deeplabv3", "bn": "encoder",
              "arch": "resnet50", "epochs": 100, "classes": names, "synthetic": False}  # fmt: skip
    sha = (
        None if name in ("Random init", "Scratch supervised") else (f"{sum(name.encode()):08x}" * 8)
    )
    made = {
        "schema": 1, "stage": stage, "dataset": "eurosat" if stage == "probe" else "dfc2020",
        "split": "random", "subset": 7000 if stage == "probe" else None,
        "weights": {"name": name, "source": f"runs/{name}/encoder.safetensors", "sha256": sha},
        "bands": list(bands), "seed": seed, "metrics": metrics | {"confusion": confusion},
        "config": config, "versions": {"torch": "2.12.0"}, "seconds": {"read": 1, "train": 2},
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


def fill(
    folder: Path, stage: str, scores: dict[str, float], bands: list, seeds: int, **changes
) -> list:
    """Results of every weights, bands and seed; scores drift with each, reproducibly."""
    rng, paths = np.random.default_rng(len(str(folder)) + seeds), []
    for name, score in scores.items():
        for band in bands:
            shift = 0.02 * np.sin(7 * len(paths))
            for seed in range(seeds):
                value = float(np.clip(score + shift + 0.01 * rng.standard_normal(), 0, 1))
                made = result(
                    stage, name, [band] if isinstance(band, str) else band, seed, value, **changes
                )
                paths.append(write(folder, made))
    return paths


ONE = {
    "Random init": 0.55,
    "Scratch supervised": 0.80,
    "RS-BYOL-1 MS only": 0.76,
    "RS-BYOL-1": 0.82,
}
THREE = {"Random init": 0.45, "Scratch supervised": 0.85, "ImageNet supervised": 0.87,
         "BYOL ImageNet": 0.86, "SeCo": 0.87, "RS-BYOL-3 S1S2": 0.88}  # fmt: skip
VARIANTS = {
    "Random init": 0.31,
    "RS-BYOL-1": 0.57,
    "RS-BYOL-1 w/150K": 0.571,
    "RS-BYOL-1 w/64BS": 0.58,
}
TRIPLED = {"Random init": 0.2, "RS-BYOL-3 S1S2": 0.5, "SeCo": 0.49}


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """results/ and runs/ as a week of work leaves them; nothing in it is broken."""
    root = tmp_path_factory.mktemp("tree")
    one = fill(root / "results/a", "probe", ONE, MS, 3)
    fill(root / "results/b", "probe", THREE, [RGB, RE], 3)
    fill(root / "results/b", "probe", THREE, [RGB, RE], 2, subset=None)
    few = {"Random init": 0.3, "RS-BYOL-3 S1S2": 0.8}
    fill(root / "results/c", "probe", few, [RGB, RE, SAR], 3, dataset="sen12ms", subset=5000)
    maps = fill(root / "results/d", "segment", VARIANTS, analyze.BANDS, 3)
    fill(root / "results/e", "segment", TRIPLED, [RGB, RE, SAR], 1)
    demo = {"dataset": "sen12ms", "subset": None, "synthetic": True}
    fill(root / "results/demo", "probe", {"Random init": 0.5}, ["Red", "SAR1"], 3, **demo)
    fill(root / "results/demo", "probe", {"RS-BYOL-1": 0.49}, ["Red", "SAR1"], 3, **demo,
         encoder_synthetic=True)  # fmt: skip
    rng = np.random.default_rng(0)
    for path in one:
        if "Red" in path.name and "seed0" in path.name:
            labels = np.arange(120) % 10
            features = (labels[:, None] + rng.standard_normal((120, 64))).astype(np.float32)
            names = np.array([f"image{i}" for i in range(120)])
            np.savez(beside(path, "-embeddings.npz"), features=features, labels=labels, names=names)
            sheet = rng.integers(0, 255, (60, 200, 3), np.uint8)
            Image.fromarray(sheet).save(beside(path, "-cam.png"))
        elif "-NNIR-RS-BYOL-1-MS" in path.name:
            path.unlink()
    Image.fromarray(np.full((80, 800, 3), 90, np.uint8)).save(beside(maps[0], "-maps.png"))
    write_run(root / "runs/single", seed=0)
    write_run(root / "runs/ms-only", seed=1)
    return root


def beside(path: Path, ending: str) -> Path:
    return path.with_name(path.stem + ending)


def write_run(folder: Path, seed: int, last: str = "") -> None:
    """log.jsonl and config.json of a run whose learning rate restarts at steps 100 and 300."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = {"settings": {"mode": "single", "seed": seed}, "pairs": {"synthetic": seed == 1}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(0, 700, 5):
        start, length = next((s, n) for s, n in ((0, 100), (100, 200), (300, 400)) if step < s + n)
        lr = 0.002 + 0.099 * (1 + np.cos(np.pi * (step - start) / length))
        loss = 0.4 + 3 * np.exp(-step / 100) + 0.02 * rng.standard_normal() + 0.1 * seed
        line = {
            "step": step,
            "epoch": step / 10,
            "loss": loss,
            "lr": lr,
            "std": 0.05,
            "cosine": 0.8,
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "log.jsonl").write_text("".join(lines) + last)


def run(*argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # t-SNE's threads fight over busy machines
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)


def tables_of(folder: Path) -> tuple[list[dict], list[str]]:
    faults: list[str] = []
    paths = analyze.find_files(folder, faults)
    return analyze.build_tables(analyze.read_results(paths, faults), faults), faults


def csv_rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def report(tree, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "report"
    done = run(tree / "results", "--out", out, "--runs", tree / "runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(out / "index.html")
    return out


def seed_means(folder: Path, name: str, metric: str, bands: list[str]) -> np.ndarray:
    """Mean over seeds for each band, straight from the JSON."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    mine = [r for r in found if r["weights"]["name"] == name]
    return np.array([np.mean([r["metrics"][metric] for r in mine if r["bands"] == [band]])
                     for band in bands])  # fmt: skip


# ---- tests of significance


def test_paired_tests_over_bands_equal_scipy_on_the_seed_means(tree, report):
    found = csv_rows(report / "tests.csv")
    found = [r for r in found if r["metric"] == "mIoU" and r["channels"] == "1"]
    rows = {(r["a"], r["b"]): r for r in found if r["test"] == "paired t over bands"}
    assert len(rows) == 6
    for (a, b), row in rows.items():
        x, y = (100 * seed_means(tree / "results/d", n, "miou", analyze.BANDS) for n in (a, b))
        t, w = stats.ttest_rel(x, y), stats.wilcoxon(x, y)
        low, high = t.confidence_interval()
        d = (x - y).mean() / (x - y).std(ddof=1)
        expected = [
            12,
            t.statistic,
            11,
            t.pvalue,
            (x - y).mean(),
            low,
            high,
            d,
            w.statistic,
            w.pvalue,
        ]
        keys = "n t df p difference low high d w p_w".split()
        assert [float(row[key]) for key in keys] == pytest.approx(expected, rel=1e-9)
    p = sorted(float(row["p"]) for row in rows.values())
    smallest = min(rows.values(), key=lambda row: float(row["p"]))
    assert float(smallest["p_holm"]) == pytest.approx(min(1, 6 * p[0]))


def test_a_missing_band_leaves_the_pairs_that_both_have(report):
    rows = [r for r in csv_rows(report / "tests.csv") if r["test"] == "paired t over bands"
            and r["dataset"] == "eurosat" and r["channels"] == "1"]  # fmt: skip
    assert {r["n"] for r in rows if "RS-BYOL-1 MS only" in (r["a"], r["b"])} == {"9"}
    assert {r["n"] for r in rows if "RS-BYOL-1 MS only" not in (r["a"], r["b"])} == {"10"}


def test_welch_over_seeds_equals_scipy():
    rng = np.random.default_rng(1)
    for n, m in ((2, 3), (5, 5), (3, 9)):
        a, b = rng.normal(0.8, 0.02, n), rng.normal(0.75, 0.05, m)
        test, t = analyze.welch_test(a, b), stats.ttest_ind(a, b, equal_var=False)
        low, high = t.confidence_interval()
        got = [test[key] for key in "t df p low high difference".split()]
        assert got == pytest.approx([t.statistic, t.df, t.pvalue, low, high, a.mean() - b.mean()])


def test_holm_gives_what_r_gives():
    p = [0.01, 0.02, 0.03, 0.04, 0.05]  # R: p.adjust(p, "holm")
    tests = analyze.correct([{"p": x} for x in reversed(p)] + [{"note": "not tested"}])
    assert [t.get("p_holm") for t in tests[::-1]] == pytest.approx(
        [None, 0.05, 0.08, 0.09, 0.09, 0.09]
    )
    assert [t["p_holm"] for t in analyze.correct([{"p": 0.6}, {"p": 0.9}])] == [1.0, 1.0]


def test_fewer_than_three_pairs_are_not_tested_and_said_so():
    two = analyze.paired_test(np.array([0.5, 0.6]), np.array([0.4, 0.4]))
    assert two == {
        "n": 2,
        "difference": pytest.approx(0.15),
        "note": "fewer than three pairs: not tested",
    }
    assert "p" not in analyze.paired_test(np.array([0.5, 0.6, 0.7]), np.array([0.4, 0.5, 0.6]))
    assert (
        "fewer than two seeds" in analyze.welch_test(np.array([0.5]), np.array([0.4, 0.3]))["note"]
    )
    for b in ([0.4, 0.4], [0.4, 0.4 + 1e-16]):  # rounding is no spread either
        assert "no spread" in analyze.welch_test(np.array([0.5, 0.5]), np.array(b))["note"]


def test_welch_with_one_constant_sample_is_the_one_sample_test_and_does_not_warn(recwarn):
    a, b = np.array([0.72, 0.72, 0.72]), np.array([0.5, 0.52, 0.57, 0.55])
    test, one = analyze.welch_test(a, b), stats.ttest_1samp(b, 0.72)
    assert [test["t"], test["df"], test["p"]] == pytest.approx([-one.statistic, 3, one.pvalue])
    assert not recwarn


def test_the_papers_table_one_gives_its_t_values():
    *tables, (_, header, rows) = analyze.paper_tables()
    assert len(rows) == 6  # three pairs of variants, mIoU and AA
    first = dict(zip(header, rows[0], strict=True))
    a = [54.8, 57.7, 57.8, 58.3, 54.5, 56.6, 57.6, 55.5, 58.1, 58.5, 57.2, 57.2]
    b = [54.3, 58.6, 57.6, 57.6, 56.4, 56.6, 57.6, 55.3, 57.6, 57.9, 57.5, 57.5]
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(d) / 12
    t = mean / (sum((x - mean) ** 2 for x in d) / 11 / 12) ** 0.5
    assert (first["a"], first["b"]) == ("RS-BYOL-1", "RS-BYOL-1 w/150K")
    assert (first["t"], first["df"]) == (f"{t:.3f}", "11") == ("-0.274", "11")
    assert first["p"] == "0.7893"  # scipy.stats.ttest_rel; the paper: not significant
    assert [row[6] for row in rows[1:3]] == ["-1.931", "-1.914"]
    for row in tables[0][2]:  # the paper's means, within its rounding: no figure is mistyped
        assert abs(np.mean([float(x) for x in row[2:14]]) - float(row[14])) < 0.02, row


def test_cells_are_mean_and_t_interval_over_seeds(tmp_path):
    for seed, score in enumerate([0.1, 0.2, 0.3, 0.4, 0.5]):
        write(tmp_path, result(bands=["Red"], seed=seed, score=score))
    write(tmp_path, result(bands=["Blue"], score=0.25))
    (table,), _ = tables_of(tmp_path)
    red = table["cells"]["RS-BYOL-1", "f1_macro", "Red"]
    half = 2.776445 * (0.025 / 5) ** 0.5  # t(0.975, 4) of a printed table; the variance is 0.025
    assert (red["n"], red["mean"], red["half"]) == (5, pytest.approx(0.3), pytest.approx(half))
    assert "| RS-BYOL-1 | F1 | 0.250 | 0.300 ± 0.196 |" in analyze.tables_markdown([table])


# ---- tables


@pytest.mark.parametrize("change", [
    {"dataset": "sen12ms"}, {"split": "spatial"}, {"subset": None}, {"subset": 5000}, {"size": 224},
    {"classes": ["a", "b"]}, {"head": "linear"}, {"synthetic": True},
    {"images": "abcd"},
])  # fmt: skip
def test_different_settings_never_share_a_table(tmp_path, change):
    write(tmp_path, result(seed=0, score=0.8), "one")
    write(tmp_path, result(seed=1, score=0.2, **change), "two")
    tables, faults = tables_of(tmp_path)
    means = [cell["mean"] for t in tables for cell in t["cells"].values()]
    assert sorted(means) == [0.2, 0.8] and len(tables) == 2 and not faults
    assert len({analyze.caption_of(table) for table in tables}) == 2
    assert len({analyze.title_of(table).split(". ", 1)[1] for table in tables}) == 2


def test_a_users_own_data_are_named_by_where_their_list_lies(tmp_path):
    roots = {"csv a/tiles.csv": "/data/a/tiles.csv", "csv tiles.csv": "tiles.csv", "csv": None}
    for n, root in enumerate(roots.values()):
        made = result("segment", dataset="csv", subset=n, root=root, images="ab" * 8)
        write(tmp_path, made, str(n))
    titles = [analyze.title_of(table).split(": ")[1] for table in tables_of(tmp_path)[0]]
    assert titles == [f"{name}, subset {n}" for n, name in enumerate(roots)]
    write(tmp_path / "public", result(root="/data/eurosat"))
    (table,), _ = tables_of(tmp_path / "public")
    assert "/" not in analyze.title_of(table)


def test_a_title_says_only_what_sets_its_table_apart(tmp_path):
    """RESISC45 at 64 and at 128 pixels, in the proof's page, once carried one title."""
    for size, bands in ((64, ["Red"]), (128, ["Red"]), (64, RGB)):
        made = result(size=size, bands=bands, dataset="resisc45", split="official", subset=None)
        write(tmp_path, made, f"{size}-{len(bands)}")
    tables, _ = tables_of(tmp_path)
    titles = {analyze.title_of(table).split(": ")[1] for table in tables}
    assert titles == {"RESISC45, size 64", "RESISC45, size 128", "RESISC45"}
    assert analyze.verdicts(tables[0])[0].startswith("Table 1, RESISC45, size 128: no random")


@pytest.mark.parametrize("change", [
    {"arch": "resnet18"}, {"epochs": 10}, {"lr": 0.5}, {"bn": "reestimate"},
])  # fmt: skip
def test_other_encoders_of_one_name_are_rows_of_their_own(tmp_path, change):
    write(tmp_path, result(seed=0, score=0.8), "one")
    write(tmp_path, result(seed=1, score=0.2, **change), "two")
    other = result(seed=2, score=0.5)
    other["weights"]["sha256"] = "feedbeef" * 8
    write(tmp_path, other, "three")
    (table,), faults = tables_of(tmp_path)
    labels = [row["label"] for row in table["rows"]]
    assert len(set(labels)) == 3 and not faults
    assert any("feedbeef" in label for label in labels)
    assert any(str(next(iter(change.values()))) in label for label in labels)


def test_encoders_of_one_name_are_told_apart_by_their_files(tmp_path):
    """By the run's folder, and by the hash only where two folders have one name."""
    for n, source in enumerate(["a/one", "a/two", "a/three", "b/three"]):
        weights = {"name": "RS-BYOL-1", "source": f"{source}/encoder.safetensors"}
        write(tmp_path, result(weights=weights | {"sha256": f"{n:08x}" * 8}), str(n))
    for sha, source in [("d", "my.safetensors"), ("e", "a/one/encoder-epoch0010.safetensors")]:
        weights = {"name": "RS-BYOL-1", "source": source, "sha256": sha * 64}
        write(tmp_path, result(weights=weights), sha)
    (table,), faults = tables_of(tmp_path)
    labels = ["00000002", "00000003", "my", "one", "one/encoder-epoch0010", "two"]
    assert [row["label"] for row in table["rows"]] == [f"RS-BYOL-1 ({name})" for name in labels]
    assert not faults


def test_batchnorm_is_named_on_all_frozen_rows_once_it_differs(tmp_path):
    write(tmp_path, result(name="Random init"))
    write(tmp_path, result(name="Scratch supervised"))
    write(tmp_path, result(bn="reestimate"))
    (table,), _ = tables_of(tmp_path)
    labels = {row["label"] for row in table["rows"]}
    frozen = {"Random init (bn encoder)", "RS-BYOL-1 (bn reestimate)"}
    assert labels == frozen | {"Scratch supervised"}


def pretrained(folder: Path, run: str, score: float, command: str, bn="encoder", stage="probe",
               bands=("Red",), **about) -> None:  # fmt: skip
    """Two seeds of a probe, for each band, of the encoder that `command` made, as runs/`run`."""
    encoder = {"command": f"pretrain.py {command}", "epoch": "30", "seed": "0"} | about
    for band, seed in itertools.product(bands, range(2)):
        made = result(stage, "RS-BYOL-1", [band], seed, score + 0.01 * seed, encoder=encoder, bn=bn)
        made["weights"] |= {"source": f"{run}/encoder.safetensors", "sha256": run.encode().hex()}
        write(folder, made, f"{run}-{band}-{seed}")


@pytest.mark.parametrize(("stage", "unit"), [("probe", 1), ("segment", 100)])
def test_pretrainings_of_one_recipe_are_tested_together(tmp_path, stage, unit):
    """Three pre-trainings, each the mean of its probes, against random's encoders: Welch's."""
    one = functools.partial(pretrained, tmp_path, stage=stage)
    plain = "--mode single --lr 0.03 --blur 0,0"
    one("p0", 0.80, f"{plain} --epochs 30 --out runs/p0 --log-every 5")
    one("p1", 0.84, f"--blur=0,0 --seed 1 {plain[:24]} --resume", seed="1")
    one("p2", 0.79, f"{plain} --seed 2 --out runs/p2 --epochs 70", seed="2")
    one("p0copy", 0.86, plain)  # no other seed than the first's
    one("later", 0.86, f"{plain} --seed 3", seed="3", epoch="70")
    one("other", 0.86, "--mode single --lr 0.3 --blur 0,0 --seed 4", seed="4")
    one("used", 0.86, f"{plain} --seed 5", seed="5", bn="reestimate")
    one("old", 0.86, plain, seed=None)
    drawn = [0.61, 0.66, 0.58, 0.64]
    for seed, score in enumerate(drawn):
        write(tmp_path, result(stage, "Random init", seed=seed, score=score))
    (table,), faults = tables_of(tmp_path)
    assert not faults
    test, *others = table["pretrainings"]  # of F1; of mIoU, and AA
    assert len(others) == len(analyze.SHOWN[stage]) - 1
    assert test["a"] == "3 x RS-BYOL-1 (p0; p1; p2, bn encoder)"
    assert test["b"] == "Random init (bn encoder)"
    expected = stats.ttest_ind([0.805, 0.845, 0.795], drawn, equal_var=False)
    assert test["n"] == "3, 4" and test["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert test["difference"] == pytest.approx(unit * (np.mean([0.805, 0.845, 0.795]) - 0.6225))
    assert test["p_holm"] == test["p"]
    said = analyze.verdicts(table)[-1]
    assert "3 x RS-BYOL-1 (p0; p1; p2, bn encoder) beats Random init (bn encoder) by" in said
    assert "Welch over 3 pre-trainings and 4 seeds" in said
    assert "Welch over pre-trainings" in analyze.tests_csv([table])
    assert "pre-trainings of one recipe" in analyze.html_section(table, "", "")


def test_a_verdict_names_the_bands_in_their_order(tmp_path):
    """Whatever the order of files, and of sets of strings, which each process draws anew."""
    bands = ["Red", "RE5", "NIR", "SWIR1", "SAR2"]
    for run in "01":
        pretrained(tmp_path, f"p{run}", 0.8, "--mode single", bands=bands, seed=run)
    for band, seed in itertools.product(bands, range(2)):
        write(tmp_path, result("probe", "Random init", [band], seed, 0.6 + 0.01 * seed))
    (table,), _ = tables_of(tmp_path)
    assert analyze.verdicts(table)[-1].endswith("mean of Red, RE5, NIR, SWIR1, SAR2).")


def test_random_weights_of_different_seeds_are_one_row(tmp_path):
    for seed in range(3):
        made = result(name="Random init", seed=seed)
        made["weights"]["sha256"] = f"{seed}" * 64
        write(tmp_path, made)
    (table,), _ = tables_of(tmp_path)
    assert [row["label"] for row in table["rows"]] == ["Random init"]


def test_the_papers_figures_stand_only_beside_the_papers_data(tmp_path):
    def paper(stage: str, name: str, bands: list[str], metric: str, **changes) -> str:
        made = result(stage, name, bands, **changes)
        return analyze.paper_value(
            analyze.table_settings(made), name, metric, analyze.column_of(made)
        )

    assert paper("segment", "RS-BYOL-1 w/64BS", ["Green"], "miou") == "59.6"
    assert paper("segment", "RS-BYOL-1", ["SAR2"], "aa") == "70.5"
    assert paper("segment", "SeCo", SAR, "aa") == "60.9"
    assert paper("probe", "SeCo", RGB, "f1_macro") == "0.90"
    assert paper("probe", "SeCo", RGB, "f1_macro", subset=None) == "0.92"
    assert (
        paper("probe", "RS-BYOL-3 S1S2", SAR, "f1_macro", dataset="sen12ms", subset=5000) == "0.83"
    )
    assert paper("probe", "Random init", RGB, "f1_macro", dataset="resisc45", subset=None) == "0.36"
    for changes in ({"subset": 500}, {"dataset": "eurosat-rgb"}, {"synthetic": True}):
        assert paper("probe", "SeCo", RGB, "f1_macro", **changes) == ""
    assert paper("probe", "SeCo", ["Red"], "f1_macro") == ""
    assert paper("segment", "RS-BYOL-1", ["Green"], "miou", classes=["c"] * 10) == ""
    assert paper("segment", "RS-BYOL-1", ["Green"], "miou", dataset="csv") == ""


def test_every_format_has_the_figures_and_a_dash_where_a_run_is_missing(report):
    rows = csv_rows(report / "tables.csv")
    miss = [r for r in rows if r["bands"] == "NNIR" and r["weights"] == "RS-BYOL-1 MS only"]
    assert [(r["mean"], r["half_width_95"], r["seeds"]) for r in miss] == [("-", "-", "0")]
    mean = [r for r in rows if r["bands"] == "mean" and r["weights"] == "RS-BYOL-1 MS only"]
    assert [r["mean"] for r in mean] == ["-"]  # a mean of nine bands is not one of ten
    green = next(r for r in rows if r["weights"] == "RS-BYOL-1" and r["bands"] == "Green"
                 and r["metric"] == "mIoU")  # fmt: skip
    text = f"{float(green['mean']):.1f} ± {float(green['half_width_95']):.1f}"
    markdown, latex = (report / "tables.md").read_text(), (report / "tables.tex").read_text()
    assert f"| {text} (57.7) |" in markdown
    assert text.replace("±", "$\\pm$") in latex and " & 57.7 & " in latex
    assert f"<td>{text}<br><small>(57.7)</small></td>" in (report / "index.html").read_text()
    line = next(x for x in markdown.splitlines() if x.startswith("| RS-BYOL-1 MS only | F1"))
    assert line.split("|")[10].strip() == "–" and "0.000" not in line


def test_best_is_bold_only_where_the_difference_is_significant(tmp_path):
    scores = {"Blue": ([0.80, 0.81, 0.79], [0.50, 0.51, 0.49]),
              "Red": ([0.80, 0.70, 0.90], [0.79, 0.71, 0.88]), "Green": ([0.8], [0.5])}  # fmt: skip
    for band, values in scores.items():
        for name, seeds in zip(("RS-BYOL-1", "Random init"), values, strict=True):
            for seed, score in enumerate(seeds):
                write(tmp_path, result(name=name, bands=[band], seed=seed, score=score))
    (table,), _ = tables_of(tmp_path)
    bold = {key for key, cell in table["cells"].items() if cell["bold"]}
    assert bold == {("RS-BYOL-1", "f1_macro", "Blue")}
    assert "**0.800 ± 0.025**" in analyze.tables_markdown([table])


# ---- what is left out


def test_broken_unknown_and_duplicate_results_are_named_and_left_out(tmp_path):
    results = tmp_path / "results"
    good = write(results, result())
    same = write(results / "z", result(score=0.3))
    bad = {
        "future": json.dumps(result() | {"schema": 2}), "torn": good.read_text()[:200],
        "list": "[1]", "config": '{"lr": 1}', "deep": "[" * 100_000, "bytes": "\udcff",
        "stage": json.dumps(result() | {"stage": "detect"}),
        "band": json.dumps(result() | {"bands": ["B99"]}),
        "nan": json.dumps(result(score=0.5)).replace('"f1_macro": 0.5', '"f1_macro": NaN'),
        "percent": json.dumps(result()).replace('"f1_macro": 0.8', '"f1_macro": 80.0'),
        "lacking": json.dumps({k: v for k, v in result().items() if k != "metrics"}),
    }  # fmt: skip
    for name, text in bad.items():
        (results / f"{name}.json").write_bytes(text.encode(errors="surrogateescape"))
    (results / "notes.txt").write_text("no JSON, so no matter")
    done = run(results, "--out", tmp_path / "report", "--no-tsne")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    named = [line.split("left out: ")[1].split(": ")[0] for line in done.stderr.splitlines()]
    assert sorted(named) == sorted([str(results / f"{name}.json") for name in bad] + [str(same)])
    assert "schema 2 is unknown" in done.stderr and f"the same run as {good}" in done.stderr
    assert [r["mean"] for r in csv_rows(tmp_path / "report/tables.csv")] == ["0.8"]
    assert "schema 2 is unknown" in (tmp_path / "report/index.html").read_text()


def test_a_second_result_of_one_seed_says_which_settings_differ(tmp_path):
    write(tmp_path, result(), "a")
    write(tmp_path, result(optimiser="adam"), "b")
    _, (fault,) = tables_of(tmp_path)
    assert fault.startswith(str(tmp_path / "b.json")) and "settings that differ: optimiser" in fault


def test_broken_embeddings_sheets_and_logs_are_named_and_left_out(tmp_path):
    path = write(tmp_path / "results", result())
    beside(path, "-embeddings.npz").write_bytes(b"PK no zip")
    beside(path, "-cam.png").write_bytes(b"\x89PNG no image")
    write_run(tmp_path / "runs/ok", 0, last='{"step": 700, "lo')  # still being written: no fault
    write_run(tmp_path / "runs/bad", 1, last='{"step": 700}\n')
    done = run(tmp_path / "results", "--out", tmp_path / "report", "--runs", tmp_path / "runs")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 3
    for part in ("-embeddings.npz: no embeddings", "-cam.png: no PNG", "bad/log.jsonl: line 141"):
        assert part in done.stderr
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, features=np.array([{}], object), labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="allow_pickle"):
        analyze.read_embeddings(pickled)


@pytest.mark.parametrize("argv", [
    [], ["nowhere"], ["{ok}", "--runs", "nowhere"], ["{ok}", "--out", "{ok}"],
    ["{ok}", "--out", "{ok}/r.json"],
])  # fmt: skip
def test_wrong_use_ends_with_status_two_and_one_line(tmp_path, argv, capsys):
    write(tmp_path / "ok", result(), "r")
    with pytest.raises(SystemExit) as stop:
        analyze.main([a.format(ok=tmp_path / "ok") for a in argv])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["ok", "r.json"]


def test_nothing_to_report_is_bad_data(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.main([str(tmp_path), "--out", str(tmp_path / "report")])
    assert stop.value.code == 1 and "no result" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


# ---- the folder


def test_only_an_own_earlier_report_is_overwritten(tmp_path):
    path = write(tmp_path / "results", result())
    out = tmp_path / "report"
    argv = [str(tmp_path / "results"), "--out", str(out), "--no-tsne"]
    assert analyze.main(argv) == 0
    (out / "mine.txt").write_text("notes")
    page = (out / "index.html").read_bytes()
    assert analyze.main(argv) == 0 and (out / "index.html").read_bytes() == page  # reproducible
    path.unlink()
    write(tmp_path / "results", result("segment"))
    assert analyze.main(argv) == 0
    names = {p.name for p in out.iterdir()}
    assert "mine.txt" in names and not any("probe" in name for name in names)  # stale figures left
    write(tmp_path / "results", result())
    (out / "02-probe-eurosat-1ch-bands.png").write_text("somebody's")
    with pytest.raises(SystemExit) as stop:
        analyze.main(argv)
    assert stop.value.code == 2
    assert (out / "02-probe-eurosat-1ch-bands.png").read_text() == "somebody's"


def test_a_folder_of_reports_may_be_a_report_and_no_other_folder(tmp_path):
    """README's `--out report/` after `make demo`, which leaves report/demo."""
    out = tmp_path / "report"
    for name in ("demo", "proof"):
        (out / name).mkdir(parents=True)
        analyze.write_report(out / name, {"a.md": b"1"}, set())
    assert analyze.earlier_report(out) == set()
    (out / "pictures").mkdir()
    for folder in (out, tmp_path):
        with pytest.raises(SystemExit) as stop:
            analyze.earlier_report(folder)
        assert stop.value.code == 2


@pytest.mark.parametrize("marker", ["", "[", '["../results/r.json"]', '{"a": 1}', '["a/b"]', "[1]"])
def test_a_folder_with_a_wrong_marker_is_refused(tmp_path, marker):
    write(tmp_path / "results", result(), "r")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / analyze.MARKER).write_text(marker)
    with pytest.raises(SystemExit) as stop:
        analyze.main([str(tmp_path / "results"), "--out", str(tmp_path / "out"), "--no-tsne"])
    assert stop.value.code == 2 and (tmp_path / "results/r.json").exists()


def test_a_report_that_was_killed_can_be_written_again(tmp_path, monkeypatch):
    files, out, count = {"a.md": b"1", "index.html": b"2"}, tmp_path, []

    def killed(path, write):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(path, write)

    real = analyze.write_atomic
    monkeypatch.setattr(analyze, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        analyze.write_report(out, files, set())
    monkeypatch.undo()
    assert analyze.earlier_report(out) == set(files)
    analyze.write_report(out, files, analyze.earlier_report(out))
    assert (out / "index.html").read_bytes() == b"2"


# ---- text, plots, page


EVIL = "<script>alert(1)</script> & | 50% _x_ $y$ #{z} ~^\\ \u03b2 \u2713"
MATHS = r"costs $\nothing{ or 3$"  # matplotlib raises on what it takes for mathematics


def balanced(latex: str) -> None:
    begun = re.findall(r"\\begin\{(\w+\*?)\}", latex)
    assert (
        begun
        and begun[::-1] != begun
        and sorted(begun) == sorted(re.findall(r"\\end\{(\w+\*?)\}", latex))
    )
    plain = re.sub(r"\\[{}]", "", latex)
    assert plain.count("{") == plain.count("}")


def test_names_cannot_break_the_page_or_the_tables(tmp_path):
    write(tmp_path / "results", result(name=EVIL), "evil")
    write(tmp_path / "results", result(), "good")
    write(tmp_path / "results", result(name=MATHS), "maths")
    assert (
        analyze.main([str(tmp_path / "results"), "--out", str(tmp_path / "out"), "--no-tsne"]) == 0
    )
    page = (tmp_path / "out/index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    tables, _ = tables_of(tmp_path / "results")
    lines = [x for x in analyze.tables_markdown(tables).splitlines() if x.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    latex = analyze.tables_latex(tables)
    assert (
        r"\& | 50\% \_x\_ \$y\$ \#\{z\} \textasciitilde{}\textasciicircum{}\textbackslash{} ? ?"
        in latex
    )
    balanced(latex)
    set_by_pdflatex(tmp_path, latex)


def set_by_pdflatex(folder: Path, latex: str) -> None:
    if not shutil.which("pdflatex"):
        return
    document = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (folder / "t.tex").write_text(document + latex + "\n\\end{document}\n")
    command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "t.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    assert done.returncode == 0, (folder / "t.log").read_text()[-2000:]


def test_latex_is_balanced(report):
    balanced((report / "tables.tex").read_text())


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(report, tmp_path):
    set_by_pdflatex(tmp_path, (report / "tables.tex").read_text())


def test_every_figure_is_png_and_svg_and_stands_in_the_page(report):
    stems = {p.stem for p in report.glob("*.png")}
    assert stems == {p.stem for p in report.glob("*.svg")} and "runs" in stems
    for part in ("1ch-bands", "1ch-classes", "1ch-confusion", "1ch-tsne", "3ch-bands"):
        assert any(stem.endswith(part) for stem in stems), part
    page = (report / "index.html").read_text()
    images = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', page)
    assert len(images) == len(stems) + 4 + 1  # CAM sheets of four weights, one map sheet
    for kind, data in images:
        start = base64.b64decode(data)[:300]
        assert (
            start.startswith(b"\x89PNG") if kind == "png" else b"<svg" in start or b"<?xml" in start
        )


@pytest.mark.parametrize(("names", "draw"), [(3, analyze.draw_bars), (9, analyze.draw_dots)])
def test_the_legend_stays_inside_the_figure(tmp_path, names, draw):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for index in range(names):
        for bn in ("encoder", "reestimate"):
            write(tmp_path, result("segment", f"byol number {index}", bn=bn), f"{index} {bn}")
    (table,), _ = tables_of(tmp_path)
    figure = draw(table)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    inside = figure.bbox.extents
    shown = legend.get_window_extent().extents
    assert (shown[:2] >= inside[:2]).all() and (shown[2:] <= inside[2:]).all()


def test_more_rows_than_colours_are_drawn_as_dots(tmp_path):
    """A line for each row, and its marks where the means stand."""
    for index in range(len(analyze.COLOURS) + 1):
        for band in ("Blue", "Red"):
            score = 0.5 + 0.01 * index + 0.1 * (band == "Red")
            write(tmp_path, result(name=f"encoder {index}", bands=[band], score=score))
    (table,), _ = tables_of(tmp_path)
    (_, _, figure), *_ = analyze.draw_figures(table, False, [])
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        f"encoder {index}" for index in range(len(analyze.COLOURS) + 1)
    ]
    marks = {line.get_marker(): line for line in axis.lines}
    assert list(marks["o"].get_xdata()) == pytest.approx([0.5 + 0.01 * i for i in range(9)])
    assert list(marks["s"].get_xdata()) == pytest.approx([0.6 + 0.01 * i for i in range(9)])
    assert (np.rint(marks["o"].get_ydata()) == np.arange(9)).all()


def test_the_digits_of_a_matrix_look_as_matplotlibs_text_does():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.array([[0.25, np.nan, 0.5], [0.001, 0.8, 1.0]])
    texts = {(0, 0): "25", (0, 2): "50", (1, 1): "80", (1, 2): "100"}

    def drawn(with_text: bool) -> np.ndarray:
        figure = Figure(figsize=(2, 1), dpi=400)
        axis = figure.subplots()
        if with_text:
            axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            for (i, j), text in texts.items():
                colour = "black" if values[i, j] > 0.5 else "white"
                axis.text(j, i, text, color=colour, ha="center", va="center_baseline", fontsize=6)
        else:
            analyze.draw_matrix(axis, values, ["a", "b", "c"], ["d", "e"])
        axis.set_position([0, 0, 1, 1])
        axis.set_axis_off()
        (canvas := FigureCanvasAgg(figure)).draw()
        return np.asarray(canvas.buffer_rgba())[..., 1].astype(int)

    ours, text = drawn(False), drawn(True)
    assert ours.shape == text.shape == (400, 800)
    for i, j in np.ndindex(2, 3):
        cell = np.s_[200 * i : 200 * i + 200, 800 * j // 3 + 1 : 800 * (j + 1) // 3 - 1]
        paper = int(np.median(text[cell]))
        inks = [np.argwhere(abs(image[cell] - paper) > 60) for image in (ours, text)]
        assert bool(len(inks[0])) == bool(len(inks[1])) == ((i, j) in texts)
        if len(inks[0]):
            boxes = [np.array([ink.min(0), ink.max(0)]) for ink in inks]
            assert abs(boxes[0] - boxes[1]).max() <= 3, (i, j, boxes)  # of 400 pixels an inch
            assert len(inks[0]) == pytest.approx(len(inks[1]), rel=0.15)
            soft = [gaussian_filter(image[cell].astype(float), 2) for image in (ours, text)]
            assert np.corrcoef(soft[0].ravel(), soft[1].ravel())[0, 1] > 0.96, (i, j)


def test_restarts_are_drawn_where_the_rate_rises(tree):
    runs = [analyze.read_run(tree / "runs/single/log.jsonl", [])]
    figure = analyze.draw_runs(runs)
    lines = [x for x in figure.axes[0].lines if x.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in lines] == [100, 300]


def test_the_page_says_which_data_were_synthetic(report):
    page = (report / "index.html").read_text()
    assert "Synthetic images, made by a program: table 3." in page
    assert "Pre-trained on synthetic tiles: RS-BYOL-1." in page
    assert "Pre-training runs on synthetic tiles: ms-only." in page
    rows = csv_rows(report / "tables.csv")
    assert {r["dataset"] for r in rows if r["synthetic"] == "True"} == {"sen12ms"}


@pytest.mark.parametrize("score, words", [
    (0.7, "beats Random init by 0.200 F1"), (0.3, "is WORSE than Random init by 0.200 F1"),
    (0.501, "does NOT beat Random init significantly"),
])  # fmt: skip
@pytest.mark.parametrize("bands", [["Red", "Green", "Blue", "NIR"], ["Red"]])
def test_the_verdict_says_whether_pre_training_beats_random(tmp_path, score, words, bands):
    for i, band in enumerate(bands):
        for seed in range(3):
            shake, shift = 0.01 * (seed - 1), 0.005 * (-1) ** i * (len(bands) > 1)
            low, high = 0.5 - shake - shift, score + 0.5 * shake + shift
            write(tmp_path, result(bands=[band], seed=seed, score=high))
            write(tmp_path, result(name="Random init", bands=[band], seed=seed, score=low))
    (table,), _ = tables_of(tmp_path)
    (line,) = analyze.verdicts(table)
    assert words in line and "95 % interval" in line
    assert ("paired over 4 bands" in line) == (len(bands) == 4)


def test_the_verdict_is_against_the_best_random_row_of_the_shared_bands(tmp_path):
    """BatchNorm re-estimated handicaps random weights: to beat those says little."""
    random = functools.partial(result, name="Random init")
    for seed in range(2):
        for band in ("Red", "Blue"):
            write(
                tmp_path, result(bands=[band], seed=seed, score=0.6 + 0.01 * seed), f"o{band}{seed}"
            )
            for bn, score in (("encoder", 0.58), ("reestimate", 0.4)):
                write(tmp_path, random(bands=[band], seed=seed, score=score + 0.02 * seed, bn=bn),
                      f"{bn}{band}{seed}")  # fmt: skip
        write(
            tmp_path,
            random(bands=["Red"], seed=seed, score=0.9 + 0.01 * seed, bn="third"),
            f"third{seed}",
        )
    (table,), _ = tables_of(tmp_path)
    (line,) = analyze.verdicts(table)
    assert "RS-BYOL-1 (bn encoder) does NOT beat Random init (bn encoder)" in line


def test_without_random_weights_there_is_no_verdict(tmp_path):
    write(tmp_path, result())
    (table,), _ = tables_of(tmp_path)
    assert "no random encoder" in analyze.verdicts(table)[0]


def test_the_paper_is_printed_alone():
    done = run("--paper")
    assert done.returncode == 0 and done.stderr == ""
    assert "| RS-BYOL-1 w/64BS | mIoU | 57.7 | 59.6 |" in done.stdout
    assert (
        "| RS-BYOL-3 S1S2 | 0.88 | 0.88 | 0.90 | 0.90 | 0.82 | 0.81 | 0.83 | 0.86 |" in done.stdout
    )
    assert "| RS-BYOL-3 S1S2 | mIoU | 51.6 | 51.3 | 51.6 |" in done.stdout


def test_torch_is_never_imported_and_matplotlib_only_for_plots(tmp_path):
    write(tmp_path / "results", result())
    code = """if True:
        import sys, analyze
        analyze.main(["--paper"])
        assert "matplotlib" not in sys.modules
        analyze.main(sys.argv[1:])
        assert "matplotlib" in sys.modules and not {"torch", "bandcrop"} & set(sys.modules)
    """
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "results"),
        "--out",
        str(tmp_path / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    subprocess.run(command, check=True, env=environment, capture_output=True)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def open_in_browser(page: Path, profile: Path) -> tuple[str, str]:
    """The page's DOM, and what the browser's log says of its console and of loading."""
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
             "--disable-background-networking --disable-component-update --enable-logging=stderr "
             "--dump-dom --virtual-time-budget=5000").split()  # fmt: skip
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [x for x in done.stderr.splitlines() if "CONSOLE" in x or "ERR_" in x]
    return done.stdout, "\n".join(said)


COUNT = """<script>addEventListener("load", () => {
document.title = [...document.images].filter(i => !i.naturalWidth).length + " broken"})</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_browser_opens_the_page_and_nothing_fails_to_load(report, tmp_path):
    dom, said = open_in_browser(report / "index.html", tmp_path / "profile")
    assert said == "" and "what the encoders learnt" in dom and dom.rstrip().endswith("</html>")
    copy, page = tmp_path / "copy.html", (report / "index.html").read_text()
    copy.write_text(page + COUNT)
    assert "<title>0 broken</title>" in open_in_browser(copy, tmp_path / "profile")[0]
    # the check itself tells a broken picture and an error on the console
    copy.write_text(page + COUNT + '<img src="nowhere.png"><script>nothing.at.all()</script>')
    dom, said = open_in_browser(copy, tmp_path / "profile")
    assert "<title>1 broken</title>" in dom and "CONSOLE" in said


def test_the_page_asks_for_nothing_outside_itself(report):
    page = (report / "index.html").read_text()
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|<script|<iframe|<object", page)
    assert 'name="viewport"' in page
