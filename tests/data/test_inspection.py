"""What is known of a pair after one look, whatever its files hold."""

import pickle

import numpy as np
import pytest
from PIL import Image

from samtune.config import PromptOptions, ReadOptions
from samtune.data.decoding import decode
from samtune.data.files import Pair
from samtune.data.inspection import (
    LOOK_BITS,
    Inspected,
    digest_of,
    inspect,
    look_of,
    mode_of,
    values_of,
)
from samtune.data.objects import settle_objects
from samtune.structures import IGNORE

READ = settle_objects(ReadOptions(), PromptOptions())
NOISE = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def square() -> np.ndarray:
    """(12, 16) of 0 and 1: rows 2 to 5, columns 3 to 8."""
    mask = np.zeros((12, 16), np.uint8)
    mask[2:6, 3:9] = 1
    return mask


def save(folder, name, mask, image=NOISE, extension="png", **how):
    folder.mkdir(exist_ok=True)
    pair = Pair(name, folder / f"{name}.image.{extension}", folder / f"{name}.png")
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(pair.image_path, **how)
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    mask.save(pair.mask_path)
    return pair


def test_the_facts_of_a_plain_pair(tmp_path):
    facts = inspect(save(tmp_path, "a", square() * 255), READ)
    assert facts.problems == () and facts.notes == ()
    assert facts.size == facts.mask_size == (12, 16)
    assert (facts.image_mode, facts.mask_mode) == ("8-bit RGB", "8-bit grey")
    assert facts.values.counts == {0: 192 - 24, 255: 24} and facts.values.extreme == 1
    assert facts.pixels == {0: 192 - 24, 1: 24} and facts.share == 24 / 192
    assert facts.things == 1 and facts.boxes.tolist() == [[3, 2, 9, 6, 24]]
    assert facts.border == 0 and not facts.touches_border and not facts.plain


def test_the_border_counts_each_pixel_once(tmp_path):
    mask = square() * 0
    mask[0, :4] = 255
    facts = inspect(save(tmp_path, "a", mask), READ)
    assert facts.border == pytest.approx(4 / (2 * 16 + 2 * 10)) and facts.touches_border


def test_what_is_ignored_is_in_no_share(tmp_path):
    mask = square()
    mask[8:] = IGNORE
    facts = inspect(save(tmp_path, "a", mask), ReadOptions(num_classes=2, objects="class"))
    assert facts.pixels == {0: 128 - 24, 1: 24, IGNORE: 64}
    assert facts.share == 24 / 128


def test_boxes_are_those_of_what_is_asked_about(tmp_path):
    mask = square() * 2
    mask[10:, 14:] = 1
    pair = save(tmp_path, "a", mask)
    facts = inspect(pair, ReadOptions(num_classes=3, objects="class"))
    assert facts.things == 2 and facts.boxes[:, 4].tolist() == [4, 24]
    facts = inspect(pair, ReadOptions(objects="instance"))
    assert facts.things == 2 and sorted(facts.boxes[:, 4].tolist()) == [4, 24]


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (Image.fromarray(NOISE[..., 0]), "8-bit grey"),
        (Image.fromarray(NOISE).convert("1"), "1-bit"),
        (Image.fromarray(NOISE).convert("P"), "palette"),
        (Image.fromarray(NOISE).convert("RGBA"), "8-bit RGB with alpha"),
        (Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200), "16-bit grey"),
    ],
)
def test_how_a_file_holds_its_pixels(tmp_path, picture, said):
    pair = save(tmp_path, "a", square(), picture)
    assert inspect(pair, READ).image_mode == said


def test_jpeg_cmyk_and_exif_are_named(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(NOISE).convert("CMYK").save(tmp_path / "b.jpg")
    assert mode_of(decode(tmp_path / "a.jpg")) == "8-bit RGB, JPEG, turned by its EXIF tag"
    assert mode_of(decode(tmp_path / "b.jpg")) == "8-bit CMYK, JPEG"


@pytest.mark.parametrize(
    ("mask", "kind", "counts"),
    [
        (Image.fromarray(square() * 255).convert("1"), "1-bit", {0: 168, 1: 24}),
        (np.repeat(square()[..., None] * 200, 3, 2), "grey", {0: 168, 200: 24}),
        (square()[..., None] * np.array([255, 0, 1], np.uint8), "colour", {0: 168, 0xFF0001: 24}),
        (square().astype(np.uint16) * 700, "grey", {0: 168, 700: 24}),
        (np.dstack([NOISE[..., :3] * 0 + 9, square() * 7]), "alpha", {0: 168, 7: 24}),
    ],
)
def test_the_values_of_a_mask_file(tmp_path, mask, kind, counts):
    pair = save(tmp_path, "a", mask)
    values = values_of(decode(pair.mask_path, palette_indices=True))
    assert (values.kind, values.counts, values.distinct) == (kind, counts, 2)
    assert (values.low, values.high) == (min(counts), max(counts))


def test_a_palette_gives_its_indices(tmp_path):
    mask = Image.fromarray(square(), "P")
    mask.putpalette([0, 0, 0, 200, 10, 10])
    facts = inspect(save(tmp_path, "a", mask), READ)
    assert facts.values.kind == "palette" and facts.values.counts == {0: 168, 1: 24}
    assert facts.mask_mode == "palette" and facts.pixels == {0: 168, 1: 24}


def test_a_refused_mask_says_all_the_same_what_it_holds(tmp_path):
    mask = square() * 38
    facts = inspect(save(tmp_path, "a", mask), READ)
    (problem,) = facts.problems
    assert "--mask_threshold" in problem
    assert facts.values.counts == {0: 168, 38: 24} and facts.picture and not facts.truth
    assert len(facts.boxes) == 0


def test_both_files_problems_are_told(tmp_path):
    pair = save(tmp_path, "a", square())
    pair.image_path.write_bytes(pair.image_path.read_bytes()[:80])
    pair.mask_path.write_bytes(b"")
    facts = inspect(pair, READ)
    assert len(facts.problems) == 2 and facts.size == (0, 0) and facts.values is None
    assert "a.image.png" in facts.problems[0] and "a.png" in facts.problems[1]


def test_no_file_raises(tmp_path, monkeypatch):
    """Missing, a folder, text, of another shape: each is a problem in words; a defect, too."""
    folder = Pair("f", tmp_path, tmp_path)
    missing = Pair("m", tmp_path / "no.png", tmp_path / "no.png")
    other = save(tmp_path, "o", square()[:5])
    for pair in (folder, missing, other):
        assert inspect(pair, READ).problems, pair
    monkeypatch.setattr("samtune.data.inspection.decode", lambda path: 1 / 0)
    assert "ZeroDivisionError" in inspect(other, READ).problems[0]


def test_equal_pixels_have_one_digest_whatever_the_file(tmp_path):
    one = inspect(save(tmp_path, "a", square()), READ)
    two = inspect(save(tmp_path, "b", square() * 255, extension="bmp"), READ)
    grey = np.repeat(NOISE[..., :1], 3, 2)
    rgb = inspect(save(tmp_path, "c", square(), grey), READ)
    single = inspect(save(tmp_path, "d", square(), grey[..., 0]), READ)
    assert one.picture == two.picture and one.truth == two.truth
    assert rgb.picture == single.picture != one.picture
    assert digest_of(NOISE) != digest_of(NOISE.reshape(16, 12, 3))


def test_looks_survive_size_and_compression(tmp_path):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    large = coarse.resize((300, 260), Image.Resampling.BICUBIC)
    large.save(tmp_path / "a.jpg", quality=50)
    small = np.asarray(Image.open(tmp_path / "a.jpg").resize((150, 130)))
    other = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((300, 260))

    def differ(one, two):
        bits = [np.unpackbits(np.frombuffer(look_of(np.asarray(i)), np.uint8)) for i in (one, two)]
        assert bits[0].size == LOOK_BITS
        return (bits[0] != bits[1]).mean()

    assert differ(large, small) < 0.1 < 0.3 < differ(large, other)


def test_one_colour_is_seen(tmp_path):
    plain = np.full((12, 16, 3), (9, 20, 40), np.uint8)
    almost = plain.copy()
    almost[7, 7] = 0
    assert inspect(save(tmp_path, "a", square(), plain), READ).plain
    assert not inspect(save(tmp_path, "b", square(), almost), READ).plain


def test_facts_are_small_and_travel(tmp_path):
    """Thousands of them pass between processes and stay in memory."""
    inspected = Inspected([save(tmp_path, "a", square())], READ)
    sent = pickle.dumps(inspected[0])
    assert len(inspected) == 1 and len(sent) < 2000
    assert pickle.loads(sent).boxes.tolist() == [[3, 2, 9, 6, 24]]
