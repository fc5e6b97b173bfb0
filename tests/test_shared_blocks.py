"""The scripts share no module: what they share stands in each, letter for letter, name for name."""

import re
from pathlib import Path

import pytest

import analyze
import pretrain
import probe
import segment

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    name: (ROOT / f"{name}.py").read_text() for name in "pretrain probe segment analyze".split()
}
BLOCK = re.compile(r"^# >>> shared: (\w+)\n(.*?)^# <<< shared: \1\n", re.S | re.M)


def test_every_copy_of_a_shared_block_is_equal():
    found: dict[str, list[str]] = {}
    for text in SCRIPTS.values():
        blocks = BLOCK.findall(text)
        assert len(re.findall(r"^# (?:>>>|<<<) shared: ", text, re.M)) == 2 * len(blocks)
        for name, block in blocks:
            found.setdefault(name, []).append(block)
    assert {name: len(copies) for name, copies in found.items()} == {
        "bands": 3, "results": 2, "encoder": 2, "device": 3,
    }  # fmt: skip
    for name, (first, *others) in found.items():
        assert all(other == first for other in others), name


def test_no_script_imports_another():
    for name, text in SCRIPTS.items():
        assert not re.search(rf"^\s*(?:import|from) (?:{'|'.join(SCRIPTS)})\b", text, re.M), name


def test_the_scripts_agree_on_names(monkeypatch, tmp_path):
    known = {*analyze.OTHERS, *analyze.SHORT_NAMES}
    others = {*probe.OTHERS.values(), *probe.NEW_WEIGHTS.values(), "stats"} - {"other"}
    assert others <= known  # else analyze.py takes them for encoders of ours
    assert list(probe.BANDS) == analyze.BANDS
    assert {tuple(text.split(",")) for text in probe.TRIPLES.values()} == analyze.TRIPLES.keys()
    monkeypatch.chdir(tmp_path)
    trained = {}
    for flags in ("single", "single --num-pairs 150000", "single --batch-size 64", "three", "rgb"):
        monkeypatch.setattr("sys.argv", ["pretrain.py", "--mode", *flags.split()])
        args, _ = pretrain.read_settings()
        trained[pretrain.run_name(args, args.num_pairs)] = args.out
    assert trained["RS-BYOL-1"] == probe.OWN_WEIGHTS.parent
    rows = [*analyze.PAPER_I, *analyze.PAPER_III]
    papers = {row.rpartition(" ")[0] for row in rows} | analyze.PAPER_II.keys()
    assert trained.keys() == papers - known


@pytest.mark.parametrize("parse", [probe.arguments, segment.arguments, analyze.main])
def test_help_is_printed(parse, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        parse(["--help"])
    assert "python " in capsys.readouterr().out
