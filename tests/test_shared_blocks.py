"""The scripts share no module: what they share stands in each, letter for letter."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / f"{name}.py" for name in ("pretrain", "probe", "segment", "analyze")]
BLOCK = re.compile(r"^# >>> shared: (\w+)\n(.*?)^# <<< shared: \1\n", re.S | re.M)


def copies() -> dict[str, dict[str, str]]:
    """Block name -> script name -> text."""
    found: dict[str, dict[str, str]] = {}
    for script in SCRIPTS:
        for name, text in BLOCK.findall(script.read_text() if script.exists() else ""):
            assert script.name not in found.setdefault(name, {}), f"{script.name}: {name} twice"
            found[name][script.name] = text
    return found


@pytest.mark.parametrize("name", sorted(copies()))
def test_every_copy_of_a_shared_block_is_equal(name):
    scripts = copies()[name]
    assert len(scripts) > 1, f"{name} stands in {list(scripts)} alone: it is not shared"
    first, *others = scripts.items()
    for script, text in others:
        assert text == first[1], f"block {name!r} differs between {first[0]} and {script}"


def test_every_marker_opens_and_closes_a_block():
    for script in filter(Path.exists, SCRIPTS):
        text = script.read_text()
        assert len(re.findall(r"^# (?:>>>|<<<) shared: ", text, re.M)) == 2 * len(
            BLOCK.findall(text)
        )


def test_no_script_imports_another():
    for script in filter(Path.exists, SCRIPTS):
        names = "|".join(other.stem for other in SCRIPTS)
        assert not re.search(rf"^\s*(?:import|from) (?:{names})\b", script.read_text(), re.M)
