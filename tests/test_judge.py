"""The lists that tests/judge.py draws for the proof."""

import judge
import numpy as np
from PIL import Image


def test_tiles_that_share_ground_are_not_drawn_together(tmp_path):
    scene = np.random.default_rng(0).integers(0, 256, (128, 128), np.uint8)
    paths = []
    for row in (0, 32, 64):  # tiles of 64 pixels every 32: neighbours share a half or a quarter
        for column in (0, 32, 64):
            paths.append(tmp_path / f"{row}_{column}.png")
            Image.fromarray(scene[row : row + 64, column : column + 64]).save(paths[-1])
    assert judge.apart(paths) == [0, 2, 6, 8]  # the corners
    assert judge.apart(paths[::-1]) == [0, 2, 6, 8]
    for quarter in (paths[1], paths[5]), (paths[5], paths[7]):
        assert judge.apart(list(quarter)) == [0]
