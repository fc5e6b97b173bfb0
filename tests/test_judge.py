"""The lists that tests/judge.py draws for the proof, its higher floor, its splits."""

import judge
import numpy as np
from PIL import Image


def write_tiles(folder, seed):
    """Nine tiles of 64 pixels every 32 of a scene: neighbours share a half or a quarter."""
    scene = np.random.default_rng(seed).integers(0, 256, (128, 128), np.uint8)
    paths = []
    for row in (0, 32, 64):
        for column in (0, 32, 64):
            paths.append(folder / f"{seed}_{row}_{column}.png")
            Image.fromarray(scene[row : row + 64, column : column + 64]).save(paths[-1])
    return paths


def test_tiles_that_share_ground_are_not_drawn_together(tmp_path):
    paths = write_tiles(tmp_path, 0)
    assert [*judge.apart(paths)] == [0, 2, 6, 8]  # the corners
    assert [*judge.apart(paths[::-1])] == [0, 2, 6, 8]
    for quarter in (paths[1], paths[5]), (paths[5], paths[7]):
        assert [*judge.apart(list(quarter))] == [0]


def test_tiles_linked_by_shared_ground_are_one_place(tmp_path):
    corner, *_ = write_tiles(tmp_path, 2)
    places = judge.apart([*write_tiles(tmp_path, 0), corner, *write_tiles(tmp_path, 1)])
    assert [*places] == [0, 2, 6, 8, 9, 10, 12, 16, 18]
    assert [*places.values()] == [0] * 4 + [1] + [2] * 4


def test_no_place_is_in_both_parts_of_a_split():
    y, places = np.arange(200) % 4, np.arange(200) // 10
    found = judge.splits(y, places)
    assert len(found) == 20 and len({tuple(test) for _, test in found}) > 5
    for fit, test in found:
        assert not {*places[fit]} & {*places[test]} and len(fit) + len(test) == 200
    assert len(judge.splits(y, None)) == 5


def test_a_table_and_a_pair_of_recipes_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "HEADS", {"neighbours": (1,)})
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    for sensor in judge.SENSORS:
        rows = "\n".join(f"{i},{i % 3},{i // 6}" for i in range(60))
        (tmp_path / f"{sensor}-test.csv").write_text(f"image,label,place\n{rows}\n")
    for name in ("stats", "a-seed0", "a-seed1", "b-seed0", "b-seed1"):
        for column in judge.COLUMNS:
            for part in ("val", "test"):
                known = name != "stats"  # the class, or nothing
                x = rng.normal(size=(60, 4)) + 9 * known * np.eye(4)[labels]
                np.savez(tmp_path / f"{name}@64@{column}@{part}.npz", features=x, labels=labels)
    judge.print_table(tmp_path, "64")
    judge.print_versus(tmp_path, "64", ("a", "b"))
    said = capsys.readouterr().out
    assert "a-seed0                  1.000 1.000 1.000 1.000 1.000" in said
    assert "b, 2 pre-trainings, less stats, radar: +0." in said
    assert "neighbours, 64 px, b, mean of 2: 1.000 1.000 1.000 1.000 1.000" in said
    assert "neighbours, optical: +0.000" in said


def test_local_patterns_by_hand():
    flat = judge.local_patterns(np.full((32, 32), 7.0)).reshape(3, 10)
    assert (flat == np.eye(10)[8]).all()  # all eight are as bright
    slope = judge.local_patterns(np.tile(np.arange(32.0), (32, 1))).reshape(3, 10)
    assert (slope == np.eye(10)[5]).all()  # to the right three, above and below one each
    board = judge.local_patterns(np.indices((32, 32)).sum(0) % 2).reshape(3, 10)
    assert (board[0] == np.eye(10)[8] / 2 + np.eye(10)[9] / 2).all()  # dark: all; bright: corners


def test_surroundings_by_hand():
    slope = np.tile(2 * np.arange(96, dtype=np.float32), (96, 1))
    found = judge.surroundings(slope)
    assert found.shape == (45, 96, 96) and found.dtype == np.float32
    pixel, mean, deviation, *near = found[:15, 48, 48]
    assert (pixel, mean) == (96, 95) and np.isclose(deviation, slope.std())
    blurred, gradient, spread = np.reshape(near, (4, 3)).T  # at 1, 2, 4 and 8 pixels
    np.testing.assert_allclose(blurred, 96, rtol=1e-5)
    np.testing.assert_allclose(gradient, 2, rtol=1e-3)
    np.testing.assert_allclose(spread, [2, 4, 8, 16], rtol=0.01)
    kinds = found[15:, 48, 48].reshape(3, 10)  # to the right three, above and below one each
    np.testing.assert_allclose(kinds, np.eye(10)[[5] * 3], atol=1e-6)
