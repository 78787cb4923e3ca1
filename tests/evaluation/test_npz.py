"""Sample files of the ADM suite."""

import numpy as np
import pytest
import torch

from fastasync.errors import UserError
from fastasync.evaluation import load_npz, save_npz


def test_round_trip_and_layout(tmp_path, photos):
    images = photos(5, 1)
    save_npz(tmp_path / "samples.npz", images)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"][3, 2, 7], images[3, :, 2, 7].numpy())
    assert torch.equal(load_npz(tmp_path / "samples.npz", count=5, size=8), images)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_grey_images_become_three_equal_channels(tmp_path, photos):
    images = photos(2, 2, channels=1)
    save_npz(tmp_path / "grey.npz", images)
    assert torch.equal(load_npz(tmp_path / "grey.npz"), images.expand(-1, 3, -1, -1))


def test_bad_images_leave_the_old_file(tmp_path, photos):
    path = tmp_path / "samples.npz"
    save_npz(path, photos(2, 3))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"uint8 \[N, C, H, W\]"):
        save_npz(path, photos(2, 3).float())
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 10, 300, -1, -30])
def test_truncated(tmp_path, photos, kept):
    path = tmp_path / "samples.npz"
    save_npz(path, photos(4, 4))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"samples\.npz: truncated or not an npz"):
        load_npz(path)


def test_corrupt(tmp_path, photos):
    path = tmp_path / "samples.npz"
    save_npz(path, photos(4, 5))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="truncated or not an npz"):
        load_npz(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "no array arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"\(0, 4, 4, 3\)"),
        ({"arr_0": np.array([{}], dtype=object)}, "not an npz"),
    ],
)
def test_wrong_content(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_npz(tmp_path / "bad.npz")


def test_wrong_count_size_and_missing_file(tmp_path, photos):
    save_npz(tmp_path / "samples.npz", photos(4, 6))
    with pytest.raises(UserError, match="4 images: expected 50"):
        load_npz(tmp_path / "samples.npz", count=50)
    with pytest.raises(UserError, match="8x8 images: expected 16x16"):
        load_npz(tmp_path / "samples.npz", size=16)
    with pytest.raises(UserError, match="no such file"):
        load_npz(tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="a single array"):
        load_npz(tmp_path / "one.npy")
