"""GPUs are hidden from tests, so that they are the same on every machine; `gpu` asks for one."""

import os
import subprocess
import sys

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
