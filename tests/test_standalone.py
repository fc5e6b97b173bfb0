"""Each script copied ALONE into an empty folder runs there; README's code runs; types are right.

Nothing of the repository can be imported in these runs but the built `bandcrop`.
"""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import bandcrop
import pytest
import torch
import torchvision
from bandcrop import _core
from safetensors.torch import load_file, save_file
from synthetic import write_dfc2020, write_eurosat, write_sen12ms

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "csrc" / "bandcrop" / "_core.pyi"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory) -> Path:
    """A folder with tiny archives, and site/ that holds `bandcrop` alone."""
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "site").mkdir()
    (place / "site" / "bandcrop").symlink_to(Path(bandcrop.__file__).parent)
    write_sen12ms(place / "sen12ms", pairs=8, seed=0, size=48)
    write_eurosat(place / "eurosat", per_class=3, seed=0)
    write_dfc2020(place / "dfc2020", validation=3, test=3, seed=0, size=32)
    return place


def python(place: Path, folder: Path, *argv: object) -> subprocess.CompletedProcess:
    """Python in `folder`, with site/ of `place` as the only addition to its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    env |= {"PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def alone(place: Path, script: str, *argv: object) -> Path:
    """Run a copy of the script in a folder that holds nothing else, and return the folder."""
    folder = place / script
    folder.mkdir()
    shutil.copy(ROOT / f"{script}.py", folder)
    done = python(place, folder, f"{script}.py", *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def encoder(elsewhere) -> Path:
    """encoder.safetensors of a copy of pretrain.py: three steps of a ResNet-18 at size 32."""
    flags = "--mode single --root ../sen12ms --arch resnet18 --size 32 --batch-size 4".split()
    flags += "--max-steps 3 --threads 1 --precision fp32 --no-compile --out runs/x".split()
    return alone(elsewhere, "pretrain", *flags) / "runs/x/encoder.safetensors"


@pytest.fixture(scope="session")
def results(elsewhere, encoder) -> Path:
    """results/ with one JSON of a copy of probe.py and one of a copy of segment.py."""
    out, weights = elsewhere / "results", ["--weights", encoder]
    flags = "--dataset eurosat --root ../eurosat --band RE5 --size 32 --head linear".split()
    alone(elsewhere, "probe", *flags, *weights, "--out", out)
    flags = "--dataset dfc2020 --root ../dfc2020 --band SAR1 --epochs 1 --num-images 3".split()
    alone(elsewhere, "segment", *flags, *weights, "--batch-size", 3, "--out", out)
    return out


def test_pretrain_runs_alone(encoder):
    assert load_file(encoder)["conv1.weight"].shape == (64, 1, 7, 7)


def test_probe_and_segment_run_alone(results):
    found = [json.loads(path.read_text()) for path in results.glob("*.json")]
    assert sorted((r["stage"], *r["bands"], r["weights"]["name"]) for r in found) == [
        ("probe", "RE5", "RS-BYOL-1"), ("segment", "SAR1", "RS-BYOL-1"),
    ]  # fmt: skip


def test_analyze_runs_alone(elsewhere, encoder, results):
    folder = alone(elsewhere, "analyze", "../results", "--runs", encoder.parents[1])
    page = (folder / "report/index.html").read_text()
    assert "EuroSAT" in page and "DFC2020" in page and "Pre-training" in page


# ---- README's code


def readme_code(word: str) -> str:
    """README's one Python block that holds `word`."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if word in b]
    return block


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_readmes_code_loads_an_encoder(library, tmp_path, monkeypatch):
    plain = torchvision.models.resnet18()
    plain.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    plain.fc = torch.nn.Identity()
    monkeypatch.chdir(tmp_path)
    Path("runs/rs-byol-1").mkdir(parents=True)
    about = {"arch": "resnet18", "bands": '["Green", "Red"]', "mean": "[1, 2]", "std": "[3, 4]"}
    save_file(plain.state_dict(), "runs/rs-byol-1/encoder.safetensors", about)
    code = readme_code("torchvision.models")
    if library == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
        line = next(line for line in code.splitlines() if "timm." in line)
        code = "import timm\n" + code.replace(line, line[line.index("encoder =") :])
    x = torch.randn(2, 1, 64, 64)
    names: dict = {"x": x}
    with torch.no_grad():
        exec(code, names)
        assert torch.equal(names["features"], plain.eval()((x - 2) / 4))


# ---- bandcrop's docstrings and types


def described(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names of the arguments with their defaults."""
    arguments = function.args.args
    without = len(arguments) - len(function.args.defaults)
    defaults = [None] * without + [ast.unparse(value) for value in function.args.defaults]
    return [(a.arg, d) for a, d in zip(arguments, defaults, strict=True) if a.arg != "self"]


def stub_functions() -> dict[str, ast.FunctionDef]:
    """Dotted name -> function of the stub, properties left out."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef) and not inner.decorator_list:
                name = inner.name if inner is node else f"{node.name}.{inner.name}"
                found[name] = inner
    return found


def test_the_stub_has_the_modules_arguments_and_defaults():
    functions = stub_functions()
    assert {"info", "read", "codecs", "Reader.__init__", "Reader.fill"} <= set(functions)
    for name, function in functions.items():
        item = bandcrop
        for part in name.split("."):
            item = getattr(item, part)
        signature = inspect.getdoc(item).splitlines()[0]  # pybind11 writes it there
        assert described(ast.parse(f"def {signature}: ...").body[0]) == described(function), name


def test_the_stub_has_the_modules_names():
    """Every class with its attributes, and every function; nothing more, nothing less."""
    stub = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [getattr(n, "name", None) or n.target.id for n in getattr(node, "body", [])
                     if isinstance(n, (ast.FunctionDef, ast.AnnAssign))]  # fmt: skip
            stub[node.name] = {name for name in names if name[0] != "_"}
    core = {name: getattr(_core, name) for name in dir(_core) if name[0] != "_"}
    inherited = set(dir(Exception))
    assert stub == {
        name: {n for n in dir(item) if n[0] != "_"} - inherited if isinstance(item, type) else set()
        for name, item in core.items()
    }
    assert set(core) <= set(bandcrop.__all__)


def test_every_public_name_of_bandcrop_has_a_docstring():
    for name in bandcrop.__all__:
        text = inspect.getdoc(getattr(bandcrop, name))
        assert text and len(text.splitlines()[-1]) > 20, name  # more than pybind11's signature
    assert bandcrop.__doc__ and "batches" in bandcrop.__doc__


RIGHT = """
import os
import numpy as np
import bandcrop

tile: bandcrop.TileInfo = bandcrop.info(b"a.tif")
height: int = tile.height
out = np.empty((2, 1, 8, 8), np.float32)
reader = bandcrop.Reader(threads=2)
ticket = reader.submit(
    out, ["a.tif", "b.tif"], [[0], [1]], windows=np.zeros((2, 4)), bad="report"
)
count: int = int(ticket.wait().replaced.sum())
report: bandcrop.Report = reader.fill(out, ["a.tif"], [[0]], bands_in_file=[13])
try:
    bandcrop.read("a.tif", bands=[0], window=(0, 0, 4, 4))
except bandcrop.TileError as error:
    index: int | None = error.index
batches = bandcrop.stream(
    ({"paths": [name], "bands": [[0]], "extra": name} for name in os.listdir()),
    (1, 1, 8, 8), device="cuda", ahead=3,
)
for batch in batches:
    seconds: float = batch.waited
    number: float = batch.x.mean().item()
    batch.report.errors[0][1].upper()
batches.close()
mean, std = bandcrop.statistics(["a.tif"], [[0]], bands_in_file=13)
mean.tolist()
"""
WRONG = """
import bandcrop

bandcrop.Reader(threads="two")
bandcrop.info(3)
bandcrop.info("a.tif").heigth
bandcrop.Reader().fill(None, ["a.tif"])
bandcrop.Reader().fill(None, ["a.tif"], [[0]], bad="rasie")
bandcrop.nothing()
bandcrop.stream([], (1, 8, 8))
bandcrop.stream([3], (1, 1, 8, 8))
bandcrop.statistics(["a.tif"])
bandcrop.statistics(["a.tif"], [[0]], bands_in_flie=13)
next(bandcrop.stream([], (1, 1, 8, 8))).y
"""


@pytest.fixture
def typed(tmp_path) -> Path:
    """A folder where a type checker finds the package as it is installed."""
    if not find_spec("mypy"):
        pytest.skip("mypy is not installed")
    shutil.copytree(STUB.parent, tmp_path / "site" / "bandcrop")
    return tmp_path


def mypy(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    env = os.environ | {"MYPYPATH": str(folder / "site")}
    command = [sys.executable, "-m", "mypy", *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_a_type_checker_accepts_right_use_and_names_wrong_use(typed):
    (typed / "right.py").write_text(RIGHT)
    (typed / "wrong.py").write_text(WRONG)
    # Torch's own types would take minutes, and are anything here.
    (typed / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,tifffile.*]\nfollow_imports = skip\n")
    done = mypy(typed, "--strict", "right.py", "site/bandcrop")
    assert done.returncode == 0, done.stdout + done.stderr
    done = mypy(typed, "wrong.py")
    lines = [int(n) for n in re.findall(r"^wrong\.py:(\d+): error", done.stdout, re.M)]
    assert lines == [*range(4, 15)], done.stdout
