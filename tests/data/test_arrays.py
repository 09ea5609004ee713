"""Pictures inside .npy, .npz and .h5 files, and lists of files."""

import h5py
import numpy as np
import pytest
from PIL import Image

from samtune.config import ReadOptions
from samtune.data.arrays import ArraySlice, count_slices, read_slice
from samtune.data.files import Pair
from samtune.data.lists import listed_pairs
from samtune.data.samples import read_sample
from samtune.errors import UserError


@pytest.fixture
def stack():
    return np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)


def test_every_kind_gives_the_same_slice(tmp_path, stack):
    np.save(tmp_path / "a.npy", stack)
    np.savez(tmp_path / "a.npz", image=stack, one=stack[1])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = stack
    for address in (
        ArraySlice(tmp_path / "a.npy", "", 1),
        ArraySlice(tmp_path / "a.npz", "image", 1),
        ArraySlice(tmp_path / "a.npz", "one"),
        ArraySlice(tmp_path / "a.h5", "image", 1),
    ):
        assert np.array_equal(read_slice(address), stack[1])
    assert count_slices(tmp_path / "a.h5", "image") == count_slices(tmp_path / "a.npy") == 3
    assert str(ArraySlice(tmp_path / "a.npz", "image", 1)).endswith("a.npz[image][1]")


def test_what_cannot_be_read_is_said(tmp_path, stack):
    np.savez(tmp_path / "a.npz", image=stack)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("image")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}, None]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", image=np.array([{"a": 1}, None]))
    np.save(tmp_path / "line.npy", np.zeros(4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:90])
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    for address, said in (
        (ArraySlice(tmp_path / "a.npz", "label", 0), "no array named 'label' in it; it has image"),
        (ArraySlice(tmp_path / "a.npz", "image", 3), "has 3 slices only"),
        (ArraySlice(tmp_path / "a.npz", "image", -1), "has 3 slices only"),
        (ArraySlice(tmp_path / "a.h5", "image", 0), "no array named 'image'"),
        (ArraySlice(tmp_path / "none.h5", "image", 0), "no such file"),
        (ArraySlice(tmp_path / "none.npy", "", 0), "no such file"),
        (ArraySlice(tmp_path / "objects.npy", "", 0), "cannot be read as arrays"),
        (ArraySlice(tmp_path / "objects.npz", "image", 0), "cannot be read as arrays"),
        (ArraySlice(tmp_path / "cut.npz", "image", 0), "cannot be read as arrays"),
        (ArraySlice(tmp_path / "cut.h5", "image", 0), "cannot be read as arrays"),
        (ArraySlice(tmp_path / "line.npy", ""), r"shape \(4,\)"),
    ):
        with pytest.raises(UserError, match=said) as error:
            read_slice(address)
        assert address.file.name in str(error.value)
    with pytest.raises(UserError, match="expected one of"):
        count_slices(tmp_path / "line.npy")


def test_labels_of_float_are_ids_only_where_they_are_whole(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 2)), label=np.array([[0.0, 1], [2, 2]]))
    np.savez(tmp_path / "b.npz", image=np.zeros((2, 2)), label=np.array([[0.0, 1], [1.5, 2]]))
    good, bad = (
        Pair(n, *(ArraySlice(tmp_path / f"{n}.npz", part) for part in ("image", "label")))
        for n in "ab"
    )
    read = ReadOptions(num_classes=3, intensity_range="0,1")
    assert read_sample(good, read).sample.mask.tolist() == [[0, 1], [2, 2]]
    with pytest.raises(UserError, match=r"b.npz\[label\]: .* 1.5 are no class id"):
        read_sample(bad, read)


@pytest.fixture
def folder(tmp_path):
    """Images i/0..2 and masks m/0..2."""
    for name in ("i/0", "i/1", "m/0", "m/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "i/1.png,m/1.png\ni/0.png,m/0.png\n",
        "image,mask\r\ni/1.png, m/1.png\r\n\r\ni/0.png,m/0.png\r\n",
        "i/1.png m/1.png\ni/0.png   m/0.png",
        "\ufeffi/1.png\tm/1.png\ni/0.png\tm/0.png\n",
    ],
)
def test_a_list_pairs_in_its_order(folder, text):
    (folder / "train.txt").write_text(text, encoding="utf-8")
    pairs = listed_pairs(folder / "train.txt", "", "", "--train_list")
    assert [pair.id for pair in pairs] == ["i/1", "i/0"]
    assert pairs[0].mask_path == folder / "m/1.png"


def test_a_list_is_relative_to_the_folders_that_are_named(folder):
    (folder / "m" / "list.csv").write_text("0.png,0.png\n")
    (pair,) = listed_pairs(folder / "m/list.csv", folder / "i", folder / "m", "--val_list")
    assert pair == Pair("0", folder / "i/0.png", folder / "m/0.png")


def test_an_id_never_leads_out_of_a_folder(folder):
    (folder / "m" / "list.csv").write_text(f"../i/0.png,0.png\n{folder}/i/1.png,1.png\n")
    ids = [pair.id for pair in listed_pairs(folder / "m/list.csv", "", "", "--val_list")]
    assert ids[0] == "i/0" and not any(id.startswith("/") or ".." in id for id in ids)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("i/0.png\n", "entry 1: 1 columns; expected an image and its mask"),
        ("i/0.png,m/0.png\ni/7.png,m/0.png\n", "entry 2: .*i/7.png: there is no such file"),
        ("i/0.png,m/0.png\ni/0.png,m/1.png\n", "entry 2: i/0.png is listed twice"),
        ("\n", "no line in it"),
    ],
)
def test_lists_that_cannot_be_used(folder, text, said):
    (folder / "l.csv").write_text(text)
    with pytest.raises(UserError, match=f"--train_list .*l.csv.*{said}"):
        listed_pairs(folder / "l.csv", "", "", "--train_list")
    with pytest.raises(UserError, match="cannot be read"):
        listed_pairs(folder / "none.csv", "", "", "--train_list")
