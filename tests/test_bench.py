"""`make bench` runs to its end, whatever the figures say: fewer files, steps and rounds here."""

import sys

import bench_loader
import bench_train
import pytest


def test_loader_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", "--quick"])
    bench_loader.main()
    assert "2. A pair of files to two views" in capsys.readouterr().out


def test_training_bench_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in {"BLOCK": 0.01, "EPOCH": 0.01, "EPOCHS": 1, "IMAGES": 5}.items():
        monkeypatch.setattr(bench_train, name, value)
    words = "bench_train.py --rounds 2 --size 32 --batch-size 4"
    monkeypatch.setattr(sys, "argv", words.split())
    assert bench_train.main() == 0
    assert "3. The probe of one band" in capsys.readouterr().out
