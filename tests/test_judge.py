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


def test_local_patterns_by_hand():
    flat = judge.local_patterns(np.full((32, 32), 7.0)).reshape(3, 10)
    assert (flat == np.eye(10)[8]).all()  # all eight are as bright
    slope = judge.local_patterns(np.tile(np.arange(32.0), (32, 1))).reshape(3, 10)
    assert (slope == np.eye(10)[5]).all()  # to the right three, above and below one each
    board = judge.local_patterns(np.indices((32, 32)).sum(0) % 2).reshape(3, 10)
    assert (board[0] == np.eye(10)[8] / 2 + np.eye(10)[9] / 2).all()  # dark: all; bright: corners
