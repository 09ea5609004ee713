"""Batched decoding is stock SAM's per-image loop, without the loop and without waiting."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch.utils._python_dispatch import TorchDispatchMode

from samtune.models.mask_decoder import decode_masks
from samtune.models.prompt_encoder import embed_prompts, no_mask, position_encoding
from samtune.models.sam import build_sam
from samtune.models.segmenter import PromptedSam
from samtune.structures import Frame, Frames, Prompts


@pytest.fixture
def sam(tiny):
    torch.manual_seed(3)
    sam = build_sam(tiny)
    for parameter in sam.parameters():  # stock leaves much at zero, which would hide mistakes
        parameter.data.normal_(std=0.2)
    return sam


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)


BOXES = torch.tensor([[3.0, 5, 40, 30], [10, 2, 60, 63], [0, 0, 20, 20], [7.5, 8.25, 9, 50]])
POINTS = torch.tensor([[[4.0, 7], [20, 30]], [[1, 1], [0, 0]], [[63, 5], [31, 31]]])
LABELS = torch.tensor([[1, 0], [1, -1], [0, 0]])


def stock_rows(sam, features, index, points=None, labels=None, boxes=None):
    """Stock's prompt encoder and decoder, one row at a time, all four masks."""
    logits, quality = [], []
    for row, image in enumerate(index):
        point = None if points is None else (points[row : row + 1], labels[row : row + 1])
        box = None if boxes is None else boxes[row : row + 1]
        sparse, dense = sam.prompt_encoder(point, box, None)
        pe = sam.prompt_encoder.get_dense_pe()
        feature = features[image : image + 1]
        masks, iou = sam.mask_decoder.predict_masks(feature, pe, sparse, dense)
        logits.append(masks), quality.append(iou)
    return torch.cat(logits), torch.cat(quality)


@pytest.mark.parametrize(
    ("prompts", "index"),
    [
        (Prompts(boxes=BOXES[:3]), [0, 1, 2]),
        (Prompts(boxes=BOXES, image_index=torch.tensor([2, 0, 0, 1])), [2, 0, 0, 1]),
        (Prompts(points=POINTS, point_labels=LABELS), [0, 1, 2]),
        (Prompts(boxes=BOXES[:3], points=POINTS, point_labels=LABELS), [0, 1, 2]),
        (Prompts(), [0, 1, 2]),
    ],
    ids=["boxes", "several boxes per image", "points", "points and boxes", "none"],
)
@torch.no_grad()
def test_batched_decoding_equals_the_stock_loop(sam, image, prompts, index):
    model = PromptedSam(sam)
    features = model.encode(image)
    expected, quality = stock_rows(
        sam, features, index, prompts.points, prompts.point_labels, prompts.boxes
    )
    prediction = model.decode(features, prompts)
    assert torch.allclose(prediction.logits, expected[:, :1], atol=1e-5)
    assert torch.allclose(prediction.iou, quality[:, :1], atol=1e-5)

    sparse = embed_prompts(sam.prompt_encoder, prompts, len(index))
    pe = position_encoding(sam.prompt_encoder, (4, 4))
    rows = features[index]
    dense = no_mask(sam.prompt_encoder)
    logits, iou = decode_masks(sam.mask_decoder, rows, pe, sparse, dense, slice(1, None))
    assert torch.allclose(logits, expected[:, 1:], atol=1e-5)
    assert torch.allclose(iou, quality[:, 1:], atol=1e-5)


def test_only_the_asked_hypernetworks_run(sam, image):
    ran = []
    for i, network in enumerate(sam.mask_decoder.output_hypernetworks_mlps):
        network.register_forward_hook(lambda *_, i=i: ran.append(i))
    PromptedSam(sam)(image)
    assert ran == [0]


@torch.no_grad()
def test_end_to_end_equals_stock_forward(sam, image):
    """The same pictures of different sizes and boxes, through stock's own loop over images."""
    sizes = [Frame((50, 100), (32, 64)), Frame((64, 64), (64, 64)), Frame((90, 30), (64, 21))]
    batch = torch.zeros_like(image)
    inputs = []
    for row, frame in enumerate(sizes):
        height, width = frame.valid_size
        batch[row, :, :height, :width] = image[row, :, :height, :width]
        record = {"image": image[row, :, :height, :width], "original_size": frame.original_size}
        inputs.append(record | {"boxes": BOXES[row : row + 1]})
    stock = sam(inputs, multimask_output=False)
    frames = Frames.collate(sizes, (64, 64))
    prediction = PromptedSam(sam)(batch, Prompts(boxes=BOXES[:3]), frames.valid_size)
    restored = frames.restore(prediction.logits)
    for row, (frame, expected) in enumerate(zip(sizes, stock, strict=True)):
        assert torch.allclose(prediction.logits[row], expected["low_res_logits"][0], atol=1e-5)
        height, width = frame.original_size
        ours = restored[row, :, :height, :width]
        certain = ours.abs() > 1e-4
        assert torch.equal((ours > 0)[certain], expected["masks"][0][certain])
        assert certain.float().mean() > 0.99


def test_stock_predictor_works_on_the_shared_parts(sam, image):
    model = PromptedSam(sam)
    predictor = SamPredictor(model.as_sam())
    picture = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    predictor.set_image(picture)
    box = BOXES[0].numpy()
    masks, _, logits = predictor.predict(box=box, multimask_output=False)
    with torch.no_grad():
        prediction = model(image[:1], Prompts(boxes=BOXES[:1]))
    assert np.allclose(logits, prediction.logits[0].numpy(), atol=1e-5)
    assert masks.shape == (1, 64, 64)
    assert model.as_sam().mask_decoder is model.mask_decoder


def test_state_dict_has_the_names_of_stock(sam):
    assert PromptedSam(sam).state_dict().keys() == sam.state_dict().keys()


def test_padding_is_the_mean_colour(sam, image):
    model = PromptedSam(sam)
    valid = torch.tensor([[64, 64], [10, 64], [33, 1]])
    ours = model.preprocess(image, valid)
    for row, (height, width) in enumerate(valid.tolist()):
        stock = sam.preprocess(image[row, :, :height, :width])
        assert torch.equal(ours[row], stock)


class Recorder(TorchDispatchMode):
    """The operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operators(model, image, prompts):
    valid = torch.full((len(image), 2), 60)
    model.zero_grad()
    with Recorder() as recorder:
        model(image, prompts, valid).logits.sum().backward()
    return recorder.names


KINDS = ["boxes", "points", "none"]


def ask(kind: str, rows: int) -> Prompts:
    if kind == "boxes":
        return Prompts(boxes=BOXES[:rows], image_index=torch.arange(rows))
    if kind == "points":
        return Prompts(points=POINTS[:rows], point_labels=LABELS[:rows])
    return Prompts()


@pytest.mark.parametrize("kind", KINDS)
def test_no_loop_over_images_and_no_wait_for_the_device(sam, image, kind):
    model = PromptedSam(sam)
    two, three = (operators(model, image[:n], ask(kind, n)) for n in (2, 3))
    assert two == three
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal")
    assert not [name for name in three if any(wait in name for wait in waits)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_no_wait_on_a_gpu(sam, image, kind):
    """CUDA itself reports every wait, also those that no operator's name tells."""
    model, image = PromptedSam(sam).cuda(), image.cuda()
    valid = torch.full((3, 2), 60, device="cuda")
    prompts = Prompts(*(p.cuda() if isinstance(p, torch.Tensor) else p for p in ask(kind, 3)))
    model(image, prompts, valid).logits.sum().backward()  # the first call loads libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(image, prompts, valid).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bf16_forward_is_finite_and_prompts_stay_float32(sam, image):
    model, seen = PromptedSam(sam), []
    sam.mask_decoder.transformer.register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(image, Prompts(boxes=BOXES[:3]))
    exact = model(image, Prompts(boxes=BOXES[:3])).logits
    assert prediction.logits.isfinite().all()
    assert torch.allclose(
        prediction.logits.float(), exact, atol=0.1 * float(exact.detach().abs().max())
    )
    _, image_pe, queries = seen[:3]
    assert image_pe.dtype == queries.dtype == torch.float32


def test_frozen_batch_norm_keeps_its_statistics(sam, image):
    frozen = torch.nn.BatchNorm2d(3)
    trained = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout())
    sam.requires_grad_(False)
    frozen.requires_grad_(False)
    sam.image_encoder.patch_embed = torch.nn.Sequential(
        frozen, trained, sam.image_encoder.patch_embed
    )
    model = PromptedSam(sam).train()
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    model(image)
    assert not frozen.training and not model.mask_decoder.training
    assert trained[0].training and trained[1].training  # a dropout has no parameters to freeze
    assert all(torch.equal(before[name], frozen.state_dict()[name]) for name in before)
    assert trained[0].num_batches_tracked == 1
    assert not any(module.training for module in model.eval().modules())


def test_features_of_any_grid_decode(sam):
    """An adapter may change the encoder's stride: decoding follows the features' own grid."""
    prediction = PromptedSam(sam).decode(torch.randn(2, 32, 3, 5))
    assert prediction.logits.shape == (2, 1, 12, 20)
