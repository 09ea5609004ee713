"""Every method of G-SAM's repository at vit_b: names, shapes and counts are those of its files."""

import json

import pytest
from test_build import rename

from samtune.adapters import ADAPTERS
from samtune.adapters.options import (
    AdaptFormerOptions,
    ConvLoraOptions,
    GsamOptions,
    LoraOptions,
    SamusOptions,
)
from samtune.complexity import build_weightless, count_trainable
from samtune.config import ModelOptions

METHODS = {
    "SAM": ("decoder", None),
    "SAM_LoRA": ("lora", LoraOptions(form="gsam")),
    "SAM_ConvLoRA": ("conv_lora", ConvLoraOptions(form="gsam")),
    "SAM_AdaptFormer": ("adaptformer", AdaptFormerOptions("gsam")),
    "SAM_SMAdaptFormer": ("adaptformer", AdaptFormerOptions("spatial")),
    "SAMUS": ("samus", SamusOptions()),
    "GSAM": ("gsam", GsamOptions()),
}
# Parameters, and those that train, where there is one kind of object against its background.
COUNTS = {
    "SAM": (93_735_472, 4_058_340),
    "SAM_LoRA": (93_809_200, 4_132_068),
    "SAM_ConvLoRA": (94_164_160, 4_487_028),
    "SAM_AdaptFormer": (97_285_936, 7_608_804),
    "SAM_SMAdaptFormer": (113_653_552, 23_976_420),
    "SAMUS": (133_323_568, 39_653_120 + 4_058_340),  # its decoder trains here
    # Without the CNN's end; and its position convolution trains here.
    "GSAM": (157_901_208 - 17_013_736, 54_413_412 + 7_680),
}
IOU_HEAD, UNREAD_NETWORKS = 132_612, 419_424  # frozen here
MORE = {11: 991_712, 19: 2_120_416}  # parameters of the decoder for so many classes


def model_of(method: str, num_classes: int = 1):
    adapter, options = METHODS[method]
    asked = ModelOptions("vit_b", adapter=adapter, train="adapter", class_layout="gsam")
    return build_weightless(asked, options or ADAPTERS[adapter].options(), num_classes)


def published_shapes(tables: dict, method: str, num_classes: int) -> dict[str, list[int]]:
    """The names and shapes of a file, for 2 classes (1 here) or 19."""
    shapes = dict(tables["SAM"])
    if method != "SAM":
        shapes |= tables[method]["added_or_reshaped"]
        shapes = {n: s for n, s in shapes.items() if n not in tables[method]["removed"]}
    return shapes | (tables["decoder_num_classes_19"] if num_classes == 19 else {})


@pytest.mark.parametrize("num_classes", [1, 19])
@pytest.mark.parametrize("method", METHODS)
def test_names_and_shapes(golden_dir, method, num_classes):
    """The two sets are equal: no tensor of the file is left over, and none of ours."""
    tables = json.loads((golden_dir / "gsam_state_dict_keys.json").read_text())
    state = model_of(method, num_classes).state_dict()
    ours = {name: list(tensor.shape) for name, tensor in state.items()}
    reached = set()
    for name, shape in published_shapes(tables, method, num_classes).items():
        for new_name in rename([name], METHODS[method][0]):
            assert ours.get(new_name) == shape, name
            reached.add(new_name)
    assert reached == ours.keys()


def test_no_method_is_forgotten(golden_dir):
    tables = json.loads((golden_dir / "gsam_state_dict_keys.json").read_text())
    assert tables.keys() - {"note", "decoder_num_classes_19"} == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_counts(method):
    total, trainable = COUNTS[method]
    model = model_of(method)
    assert sum(p.numel() for p in model.parameters()) == total
    assert count_trainable(model) == trainable - IOU_HEAD - UNREAD_NETWORKS
    for num_classes, more in MORE.items():
        model = model_of(method, num_classes)
        assert sum(p.numel() for p in model.parameters()) == total + more
        assert count_trainable(model) == trainable + more - IOU_HEAD
