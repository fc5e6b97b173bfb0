"""`make bench` runs to its end, whatever the figures say: fewer files, steps and rounds here."""

import sys

import bench_loader
import bench_train
import pytest

FEW = {
    bench_loader: {"BATCH": 8, "BASES": 2},
    bench_train: {"BLOCK": 0.01, "EPOCH": 0.01, "TILES": 4, "EPOCHS": 1, "IMAGES": 5},
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for bench, values in FEW.items():
        for name, value in values.items():
            monkeypatch.setattr(bench, name, value)
    measure, program = bench_loader.measure, bench_train.bench_program
    monkeypatch.setattr(bench_loader, "measure", lambda _, *rest: measure(0, *rest))
    monkeypatch.setattr(bench_train, "bench_program", lambda a, _, folder: program(a, 1, folder))


def test_loader_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", "--quick"])
    bench_loader.main()
    assert "2. A pair of files to two views" in capsys.readouterr().out


def test_training_bench_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = "bench_train.py --rounds 2 --size 32 --batch-size 4"
    monkeypatch.setattr(sys, "argv", words.split())
    assert bench_train.main() == 0
    assert "3. The probe of one band" in capsys.readouterr().out
