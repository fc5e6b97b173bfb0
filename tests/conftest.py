"""GPUs are hidden from tests, so that they are the same on every machine; `gpu` asks for one.

Also what tests of several commands share: a run in this process, its error line, its results.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported


@pytest.fixture(scope="session")
def gpu() -> dict[str, str]:
    """Environment of a process that sees this machine's GPUs; skips where there is none."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"CUDA_VISIBLE_DEVICES": VISIBLE} if VISIBLE is not None else {}
    look = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", look], env=env, capture_output=True).returncode:
        pytest.skip("no GPU is here")
    return env


def in_process(main: Callable, name: str, *argv: object) -> subprocess.CompletedProcess:
    """A command in this process: as a finished process, and as quick as a call."""
    argv, out, err = [name, *map(str, argv)], io.StringIO(), io.StringIO()
    kept = {number: signal.getsignal(number) for number in (1, 2, 15)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", argv):
            try:
                status = main() or 0
            except SystemExit as stop:
                status = stop.code
                if isinstance(status, str):
                    status = print(status, file=err) or 1
            finally:
                for number, handler in kept.items():
                    signal.signal(number, handler)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def runner(script: ModuleType, settings: Callable[..., list[str]]) -> Callable[..., None]:
    """A run of probe.py or segment.py with what `settings` makes of the call's arguments."""
    return lambda *args, **kwargs: script.main(script.arguments(settings(*args, **kwargs)))


def refused(script: ModuleType, capsys, status: int, argv, *words: object, lines: int = 1) -> str:
    """The run ends with this status and one error, its further lines indented, naming the words."""
    with pytest.raises(SystemExit) as ended:
        script.main(script.arguments([str(word) for word in argv]))
    said = capsys.readouterr().err
    assert ended.value.code == status, said
    first, *more = said.strip().splitlines()
    assert said.count("error: ") == 1 and "error: " in first and len(more) < lines, said
    assert all(line.startswith("  ") for line in more), said
    for word in words:
        assert str(word) in said
    return said


def results(out: str | Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))]
