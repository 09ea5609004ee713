"""A miniature of every layout in the catalog, with the traps of the real one.

Each function writes a few pictures of 32 x 48 below a folder and returns what a reader must find
there: ids, class ids per pixel, groups.
"""

from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from samtune.data.codings import CODINGS
from samtune.structures import IGNORE

SIZE = (32, 48)
CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CAMVID_NAMES = {
    "train": ["0001TP_006690", "0001TP_006720", "0006R0_f00930"],
    "val": ["0016E5_07959"],
    "test": ["Seq05VD_f00000", "Seq05VD_f00030"],
}


class Miniature:
    """What was written: `truth[split][id]` is the mask that a reader must give."""

    def __init__(self, root: Path):
        self.root = root
        self.truth = defaultdict(dict)
        self.groups = {}
        self.count = 0

    def binary(self) -> np.ndarray:
        """(32, 48) of 0 and 1, other for every picture, with edges on JPEG's grid of 8."""
        self.count += 1
        mask = np.zeros(SIZE, np.uint8)
        mask[8 : 16 + 8 * (self.count % 2), 8 * (self.count % 3) : 32] = 1
        return mask

    def classes(self, number: int, ignored: bool = True) -> np.ndarray:
        """(32, 48) of all class ids in stripes, other for every picture, a block ignored."""
        self.count += 1
        row = (np.arange(SIZE[1]) * number // SIZE[1] + self.count) % number
        mask = np.broadcast_to(row, SIZE).astype(np.uint8).copy()
        if ignored:
            mask[:4, :9] = IGNORE
        return mask

    def image(self, path: str, size=SIZE) -> None:
        """An image of noise in the format of its name."""
        pixels = np.random.default_rng(self.count).integers(0, 256, (*size, 3), dtype=np.uint8)
        self.picture(path, pixels)

    def picture(self, path: str, pixels: np.ndarray) -> None:
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            return Image.fromarray(pixels).save(path, quality=75)
        return Image.fromarray(pixels).save(path)

    def add(self, split: str, id: str, mask: np.ndarray, group: str = "") -> np.ndarray:
        self.truth[split][id] = mask
        self.groups[id] = group
        return mask


def _grey(mask: np.ndarray) -> np.ndarray:
    """0 and 255, with grey edges as anti-aliased masks have them: 100 is no object, 150 is."""
    grey = mask * np.uint8(255)
    grey[0, :2] = 100
    inside = np.argwhere(mask)
    grey[tuple(inside[0])] = 150
    return grey


def _folders(mini, split, images, masks, names, prefix="", group=None):
    """Grey 0/255 masks as PNG with images as JPEG, of the same names."""
    for name in names:
        mask = mini.add(split, f"{prefix}{name}", mini.binary(), group(name) if group else "")
        mini.image(f"{images}/{name}.jpg")
        mini.picture(f"{masks}/{name}.png", _grey(mask))


def camvid(root):
    mini = Miniature(root)
    for split, names in CAMVID_NAMES.items():
        for name in names:
            mask = mini.add(split, name, mini.classes(11), name.split("_")[0])
            mini.image(f"{split}/{name}.png")
            mini.picture(f"{split}annot/{name}.png", np.where(mask == IGNORE, 11, mask))
            # the list of the real one begins with a folder of its author; nobody is to read it
        (root / f"{split}.txt").write_text("/SegNet/CamVid/nowhere.png /SegNet/nowhere.png\n")
    return mini


def camvid_lists(root):
    mini = Miniature(root)
    for split, names in CAMVID_NAMES.items():
        for name in names:
            mask = mini.add(split, name, mini.classes(11), name.split("_")[0])
            mini.image(f"image/{name}.png")
            mini.picture(f"image/{name}_L.png", np.where(mask == IGNORE, 11, mask))
        (root / "list").mkdir(exist_ok=True)
        (root / f"list/{split}_d.txt").write_text("".join(f"{n}.png\n" for n in names))
        (root / f"list/{split}_l.txt").write_text("".join(f"{n}_L.png\n" for n in names))
    return mini


def camvid_colour(root):
    """Several of the 32 colours are one class: each picture draws its classes in other ones."""
    mini = Miniature(root / "CamVid")
    of_class = defaultdict(list)
    for value, id in CODINGS["camvid_colour"].entries.items():
        of_class[id].append((value >> 16, value >> 8 & 255, value & 255))
    for split, names in CAMVID_NAMES.items():
        for name in names:
            mask = mini.add(split, name, mini.classes(11), name.split("_")[0])
            drawn = np.zeros((*SIZE, 3), np.uint8)
            for id, colours in of_class.items():
                drawn[mask == id] = colours[mini.count % len(colours)]
            mini.image(f"{split}/{name}.png")
            mini.picture(f"{split}_labels/{name}_L.png", drawn)
    (mini.root / "class_dict.csv").write_text("name,r,g,b\n")
    return mini


def massachusetts(root, kind="png"):
    """Buildings are white in one picture, pure red in the next: only the red channel is meant."""
    mini = Miniature(root)
    extension = {"png": "png", "tiff": "tif"}[kind]
    for split, count in (("train", 4), ("val", 1), ("test", 2)):
        for i in range(count):
            name = f"2267891{i}_15_{split}"
            mask = mini.add(split, name, mini.binary())
            drawn = np.repeat(_grey(mask)[..., None], 3, axis=2)
            if i % 2:
                drawn[..., 1:] = 0
            mini.image(f"{kind}/{split}/{name}.{kind}")
            mini.picture(f"{kind}/{split}_labels/{name}.{extension}", drawn)
    return mini


def massachusetts_tiff(root):
    return massachusetts(root, "tiff")


def isbi_flat(root, below=""):
    """Both files are JPEG, names differ by prefix, the object is black."""
    mini = Miniature(root)
    for i in range(30):
        split = "train" if i < 20 else "val" if i < 25 else "test"
        mask = mini.add(split, f"{i:02d}", mini.binary())
        mini.image(f"{below}images/train-volume{i:02d}.jpg")
        mini.picture(f"{below}labels/train-labels{i:02d}.jpg", (1 - mask) * np.uint8(255))
    return mini


def isbi_data(root):
    return isbi_flat(root, "data/")


def isbi_gsam(root):
    """Folder 10 follows folder 9; every third is the test set; file names repeat in each."""
    mini = Miniature(root)
    for i in range(12):
        for name in ("a", "b"):
            split = "train" if i % 3 else "test"
            mask = mini.add(split, f"{i}/{name}", mini.binary(), str(i))
            mini.image(f"Image/{i}/{name}.png")
            mini.picture(f"Label/{i}/{name}.png", (1 - mask) * np.uint8(255))
    return mini


def kvasir(root):
    mini = Miniature(root)
    for i in range(30):
        mask = mini.add("train", f"cju{i}", mini.binary())
        mini.image(f"images/cju{i}.jpg")
        mini.picture(f"masks/cju{i}.jpg", np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))
    (root / "kavsir_bboxes.json").write_text("{}")
    return mini


def _stacks(root, of_split, image_channels):
    mini = Miniature(root)
    (root / "datamodel").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, (make, code) in of_split(mini).items():
        masks = [mini.add(split, f"{i:03d}/{split}", make()) for i in range(3)]
        mini.truth[split] = {f"{i:03d}": mask for i, mask in enumerate(masks)}
        shape = (3, *SIZE, 3)[: 3 + image_channels]
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        np.save(root / f"datamodel/{split}_data_1.npy", images)
        np.save(root / f"datamodel/{split}_label_1.npy", np.stack([code(m) for m in masks]))
    mini.groups = {f"{i:03d}": "" for i in range(3)}
    return mini


def kvasir_stacks(root):
    """More than 200 is the polyp; 200 itself is none."""

    def code(mask):
        return np.where(mask, 230, 200).astype(np.uint8)

    return _stacks(root, lambda m: dict.fromkeys(("train", "val", "test"), (m.binary, code)), 1)


def synapse_stacks(root):
    def of_split(mini):
        rule = (lambda: mini.classes(9, False), lambda mask: mask.astype(np.float32))
        return dict.fromkeys(("train", "val", "test"), rule)

    return _stacks(root, of_split, 0)


def synapse(root):
    """Images are 0..1 in float32, labels float32 too, volumes are numbered by case."""
    mini = Miniature(root / "Synapse")
    for folder in ("train_npz", "test_vol_h5"):
        (mini.root / folder).mkdir(parents=True)
    image = np.linspace(0, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    for case in ("case0005", "case0006", "case0010"):
        for i in range(4):
            name = f"{case}_slice{i:03d}"
            mask = mini.add("train", name, mini.classes(9, False), case)
            file = mini.root / f"train_npz/{name}.npz"
            np.savez(file, image=image, label=mask.astype(np.float32))
    for case in ("case0001", "case0038"):
        masks = [mini.classes(9, False) for _ in range(3)]
        for i, mask in enumerate(masks):
            mini.add("test", f"{case}_slice{i:03d}", mask, case)
        with h5py.File(mini.root / f"test_vol_h5/{case}.npy.h5", "w") as file:
            file["image"] = np.stack([image] * 3)
            file["label"] = np.stack(masks).astype(np.float32)
    return mini


def cityscapes(root, labels="labelIds"):
    """Coloured pictures and polygons lie beside the labels; the test labels are dummies."""
    mini = Miniature(root)
    cities = {"train": ("aachen", "bochum", "ulm"), "val": ("frankfurt",), "test": ("berlin",)}
    for split, names in cities.items():
        for city in names:
            for i in range(2):
                stem = f"{city}_00000{i}_000019"
                mask = mini.classes(19)
                ids = np.append(CITY_IDS, [4]).astype(np.uint8)[np.minimum(mask, 19)]
                ids[0, :2] = 255, 0  # a licence plate (-1) and what is unlabelled
                if labels == "labelTrainIds":
                    ids = mask
                if split != "test":
                    mini.add({"train": "train", "val": "test"}[split], stem, mask, city)
                mini.image(f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
                mini.picture(f"gtFine/{split}/{city}/{stem}_gtFine_{labels}.png", ids)
                mini.image(f"gtFine/{split}/{city}/{stem}_gtFine_color.png")
    return mini


def cityscapes_train_ids(root):
    return cityscapes(root, "labelTrainIds")


def trans10k(root, val="validation"):
    """Easy and hard have pictures of the same names; things are drawn in any pure colour."""
    mini = Miniature(root)
    parts = {"train": [""], "val": ["easy/", "hard/"], "test": ["easy/", "hard/"]}
    for split, subfolders in parts.items():
        folder = val if split == "val" else split
        for part in subfolders:
            for name in ("1", "2", "10") if split == "val" else ("3", "4", "11", "12"):
                mask = mini.add(split, f"{part}{name}", mini.classes(3, False))
                drawn = np.zeros((*SIZE, 3), np.uint8)
                drawn[mask == 1, mini.count % 3] = 255
                drawn[mask == 2] = 255
                mini.image(f"{folder}/{part}images/{name}.jpg")
                mini.picture(f"{folder}/{part}masks/{name}_mask.png", drawn)
    return mini


def trans10k_val(root):
    return trans10k(root, "val")


def _cod_names(count):
    return [f"COD10K-CAM-1-Aquatic-{i}-Fish-{i}" for i in range(count)]


def _camo_names(first, count):
    return [f"camourflage_{i:05d}" for i in range(first, first + count)]


def bundle(root, name):
    """The joined training folder of camouflage papers, and its four test sets."""
    mini = Miniature(root)
    train = {"COD10K": _cod_names(12), "CAMO": _camo_names(0, 12)}
    for owner, names in train.items():
        split = "train" if owner == name else "of others"
        _folders(mini, split, "TrainDataset/Imgs", "TrainDataset/GT", names)
    for owner in ("CAMO", "CHAMELEON", "COD10K", "NC4K"):
        names = [f"{owner.lower()}-{i}" for i in range(3)]
        split = "test" if owner == name else "of others"
        folder = f"TestDataset/{owner}"
        _folders(mini, split, f"{folder}/Imgs", f"{folder}/GT", names)
    del mini.truth["of others"]
    return mini


def bundle_cod10k(root):
    return bundle(root, "COD10K")


def bundle_camo(root):
    return bundle(root, "CAMO")


def bundle_chameleon(root):
    return bundle(root, "CHAMELEON")


def bundle_nc4k(root):
    return bundle(root, "NC4K")


def cod10k(root):
    """Pictures without camouflage have empty masks and are not counted."""
    mini = Miniature(root / "COD10K-v3")
    for split, names in (("Train", _cod_names(11)), ("Test", _cod_names(15)[11:])):
        images, masks = f"{split}/Image", f"{split}/GT_Object"
        _folders(mini, split.lower(), images, masks, names)
        mini.image(f"{images}/COD10K-NonCAM-1-Aquatic-7-Fish-7.jpg")
        empty = np.zeros(SIZE, np.uint8)
        mini.picture(f"{masks}/COD10K-NonCAM-1-Aquatic-7-Fish-7.png", empty)
        mini.image(f"{images}/COD10K-NonCAM-5-Other-8-Other-8.jpg")  # not even a mask
    return mini


def camo(root):
    """One folder of masks for both splits, whose pictures alternate in it."""
    mini = Miniature(root / "CAMO-V.1.0-CVIU2019")
    names = _camo_names(0, 15)
    _folders(mini, "test", "Images/Test", "GT", names[::3])
    _folders(mini, "train", "Images/Train", "GT", [n for n in names if n not in names[::3]])
    return mini


def plain_chameleon(root):
    mini = Miniature(root / "CHAMELEON")
    _folders(mini, "test", "Imgs", "GT", ["animal-1", "animal-10", "animal-2"])
    return mini


def plain_nc4k(root):
    mini = Miniature(root)
    _folders(mini, "test", "Imgs", "GT", ["1", "2"])
    return mini


def istd(root):
    mini = Miniature(root)
    for split, scenes in (("train", range(1, 7)), ("test", range(90, 93))):
        names = [f"{scene}-{i}" for scene in scenes for i in (1, 2)]
        _folders(
            mini, split, f"{split}/{split}_A", f"{split}/{split}_B", names,
            group=lambda name: name.split("-")[0],
        )  # fmt: skip
        for name in names:
            mini.image(f"{split}/{split}_C/{name}.png")
    return mini


def duts(root):
    mini = Miniature(root)
    for split, s in (("train", "TR"), ("test", "TE")):
        folder = f"DUTS-{s}/DUTS-{s}"
        names = [f"ILSVRC2012_{split}_{i:05d}" for i in range(10)]
        _folders(mini, split, f"{folder}-Image", f"{folder}-Mask", names)
    return mini


def _salient(root, images, masks):
    mini = Miniature(root)
    _folders(mini, "test", images, masks, ["0001", "0002", "0010"])
    return mini


def ecssd(root):
    return _salient(root, "images", "ground_truth_mask")


def dut_omron(root):
    return _salient(root, "DUT-OMRON-image", "pixelwiseGT-new-PNG")


def hku_is(root):
    return _salient(root, "imgs", "gt")


def pascal_s(root):
    return _salient(root, "JPEGImages/PASCAL-S", "Annotations/PASCAL-S")


# data set -> a miniature of each of its layouts, in the order of its row
MINIATURES = {
    "camvid": (camvid, camvid_lists),
    "camvid_colour": (camvid_colour,),
    "massachusetts": (massachusetts, massachusetts_tiff),
    "isbi2012": (isbi_flat, isbi_data, isbi_gsam),
    "kvasir": (kvasir, kvasir_stacks),
    "synapse": (synapse, synapse_stacks),
    "cityscapes": (cityscapes_train_ids, cityscapes),
    "trans10k": (trans10k, trans10k_val),
    "cod10k": (bundle_cod10k, cod10k),
    "camo": (bundle_camo, camo),
    "chameleon": (bundle_chameleon, plain_chameleon),
    "nc4k": (bundle_nc4k, plain_nc4k),
    "istd": (istd,),
    "duts": (duts,),
    "ecssd": (ecssd,),
    "dut_omron": (dut_omron,),
    "hku_is": (hku_is,),
    "pascal_s": (pascal_s,),
}
