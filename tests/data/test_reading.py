"""Files as people have them: what is read from each, and what is refused."""

import cv2
import numpy as np
import pytest
from PIL import Image

from samtune.config import ReadOptions
from samtune.data.files import Pair
from samtune.data.images import read_image
from samtune.data.masks import read_mask
from samtune.data.samples import read_sample
from samtune.errors import UserError

READ = ReadOptions()
ORIENTATION = 0x0112


@pytest.fixture
def picture():
    """(20, 30, 3) uint8 without any symmetry."""
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    """(20, 30) of 0 and 1 without any symmetry."""
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 4:21] = 1
    mask[9:12, 4:7] = 1
    return mask


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def as_stored(array, orientation):
    """The pixels that a camera writes so that the tag's orientation shows `array`."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = Image.fromarray(array)
    return image.transpose(undo[orientation]) if orientation in undo else image


# --- images ---


def test_red_stays_red(tmp_path):
    """OpenCV's channel order must not leak: one conversion point."""
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    deep = red.astype(np.uint16)[..., ::-1] * 257
    Image.fromarray(red).save(tmp_path / "eight.png")
    cv2.imwrite(str(tmp_path / "sixteen.png"), deep)
    cv2.imwrite(str(tmp_path / "float.tif"), (deep / 65535).astype(np.float32))
    for name in ("eight.png", "sixteen.png", "float.tif"):
        assert (read_image(tmp_path / name, READ) == red).all(), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_images_are_turned_as_their_exif_tag_says(tmp_path, picture, orientation, extension):
    path = tmp_path / f"a.{extension}"
    as_stored(picture, orientation).save(path, exif=exif(orientation))
    assert (read_image(path, READ) == picture).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_only_if_it_carries_the_tag(tmp_path, mask, orientation):
    """The same policy for both files: follow the tag where it is, and nowhere else."""
    stored = as_stored(mask * 255, orientation)
    stored.save(tmp_path / "tagged.png", exif=exif(orientation))
    stored.save(tmp_path / "plain.png")
    assert (read_mask(tmp_path / "tagged.png", READ) == mask).all()
    assert (read_mask(tmp_path / "plain.png", READ) == np.asarray(stored) // 255).all()


def test_grey_alpha_palette_and_one_bit_images(tmp_path, picture):
    grey = picture[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey, picture[..., 1]]), "LA").save(tmp_path / "grey_alpha.png")
    Image.fromarray(np.dstack([picture, grey])).save(tmp_path / "alpha.png")
    few = Image.fromarray(picture).quantize(7)
    few.save(tmp_path / "palette.png")
    Image.fromarray(grey > 99).save(tmp_path / "bit.png")
    repeated = np.repeat(grey[..., None], 3, 2)
    assert (read_image(tmp_path / "grey.png", READ) == repeated).all()
    assert (read_image(tmp_path / "grey_alpha.png", READ) == repeated).all()
    assert (read_image(tmp_path / "alpha.png", READ) == picture).all()  # dropped, not blended
    assert (read_image(tmp_path / "palette.png", READ) == np.asarray(few.convert("RGB"))).all()
    assert (read_image(tmp_path / "bit.png", READ) == np.where(repeated > 99, 255, 0)).all()


def test_a_transparent_palette_is_read_without_a_warning(tmp_path, picture, recwarn):
    few = Image.fromarray(picture).quantize(4)
    few.save(tmp_path / "a.png", transparency=bytes([0, 90, 255, 255]))
    assert (read_image(tmp_path / "a.png", READ) == np.asarray(few.convert("RGB"))).all()
    assert not recwarn.list


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert (np.abs(read_image(tmp_path / "a.jpg", READ) - [255.0, 0, 0]) <= 2).all()


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "colour.png", "colour.tif", "rgba.png"])
def test_sixteen_bits_are_neither_clipped_nor_cut(tmp_path, name):
    """12-bit values in 16-bit files: clipping saturates them, the high byte alone has 16 steps."""
    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    array = {"grey": ramp, "colour": np.dstack([ramp] * 3), "rgba": np.dstack([ramp] * 4)}
    cv2.imwrite(str(tmp_path / name), array[name.split(".")[0]])
    image = read_image(tmp_path / name, ReadOptions(intensity_range="0,4095"))
    assert np.array_equal(image[..., 0], (ramp / 4095 * 255 + 0.5).astype(np.uint8))
    assert len(np.unique(read_image(tmp_path / name, READ))) > 250


def test_auto_range_is_the_half_and_ninety_nine_and_a_half_percentile(tmp_path):
    ramp = np.arange(10000, dtype=np.uint16).reshape(100, 100)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", READ)[..., 0].ravel()
    assert image[49] == 0 and image[80] > 0 and image[9951] == 255 and image[9900] < 255


def test_float_images(tmp_path):
    values = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif", ReadOptions(intensity_range="0,1"))
    assert np.array_equal(image[..., 2], (values * 255 + 0.5).astype(np.uint8))
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    with pytest.raises(UserError, match=r"nan\.tif: holds NaN"):
        read_image(tmp_path / "nan.tif", READ)
    Image.fromarray(np.full((4, 4), 7.5, np.float32)).save(tmp_path / "constant.tif")
    assert (read_image(tmp_path / "constant.tif", READ) == 0).all()


@pytest.mark.parametrize("text", ["5", "9,1", "a,b", "1,1", "nan,2"])
def test_a_wrong_range_names_its_flag(tmp_path, text):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"--intensity_range {text}"):
        read_image(tmp_path / "a.png", ReadOptions(intensity_range=text))


def test_content_decides_not_the_name(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert (read_image(tmp_path / "a.jpg", READ) == picture).all()


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "bmp", "webp", "gif", "ppm"])
@pytest.mark.parametrize("kept", [0, 1, 10, 30, 0.5])
def test_truncated_files_are_refused(tmp_path, extension, kept):
    path = tmp_path / f"a.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else len(content) // 2])
    with pytest.raises(UserError, match=rf"a\.{extension}"):
        read_image(path, READ)


def test_truncated_sixteen_bit_colour_is_refused(tmp_path):
    """OpenCV, which reads these, would fill the missing part without a word."""
    noise = np.random.default_rng(0).integers(0, 65536, (99, 99, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), noise)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.png: truncated"):
        read_image(tmp_path / "a.png", READ)


def test_stacks_folders_and_absent_files_are_refused(tmp_path, picture):
    page = Image.fromarray(picture)
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page, page])
    with pytest.raises(UserError, match=r"stack\.tif: holds 3 pages"):
        read_image(tmp_path / "stack.tif", READ)
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "absent.png", READ)
    with pytest.raises(UserError, match="directory"):
        read_image(tmp_path, READ)
    (tmp_path / "page.png").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.png: not a readable image"):
        read_image(tmp_path / "page.png", READ)


# --- masks ---


def save_mask(path, mask, coding):
    """Write a 0/1 mask in one of the codings that people use."""
    image = {
        "0/1": lambda: Image.fromarray(mask),
        "0/255": lambda: Image.fromarray(mask * 255),
        "1-bit": lambda: Image.fromarray(mask.astype(bool)),
        "rgb": lambda: Image.fromarray(np.dstack([mask * 255] * 3)),
        "rgb 0/1": lambda: Image.fromarray(np.dstack([mask] * 3)),
        "16-bit": lambda: Image.fromarray(mask.astype(np.uint16)),
        "int32": lambda: Image.fromarray(mask.astype(np.int32) * 255),
        "float": lambda: Image.fromarray(mask.astype(np.float32)),
        "grey alpha": lambda: Image.fromarray(np.dstack([mask * 255, mask * 0 + 255]), "LA"),
        "only alpha": lambda: Image.fromarray(np.dstack([mask * 0] * 3 + [mask * 255])),
        "only alpha, grey": lambda: Image.fromarray(np.dstack([mask * 0 + 9, mask * 255]), "LA"),
    }
    if coding == "palette":
        picture = Image.fromarray(mask)
        picture.putpalette([0, 0, 0, 128, 0, 0])  # index 1 has luminance 38
    else:
        picture = image[coding]()
    picture.save(path)


EIGHT_BIT = ["0/1", "0/255", "palette", "1-bit", "rgb", "rgb 0/1"]
OTHER = ["16-bit", "grey alpha", "only alpha", "only alpha, grey"]


@pytest.mark.parametrize("coding", EIGHT_BIT + OTHER)
def test_every_plain_coding_gives_the_same_mask(tmp_path, mask, coding):
    """0/255, 0/1, palette and 1-bit masks are one and the same, not an error or another image."""
    save_mask(tmp_path / "a.png", mask, coding)
    result = read_mask(tmp_path / "a.png", READ)
    assert result.dtype == np.uint8
    assert (result == mask).all()
    below = read_mask(tmp_path / "a.png", ReadOptions(foreground="below"))
    assert (below == 1 - mask).all()


@pytest.mark.parametrize("coding", ["float", "int32"])
def test_number_masks_in_tiff(tmp_path, mask, coding):
    save_mask(tmp_path / "a.tif", mask, coding)
    assert (read_mask(tmp_path / "a.tif", READ) == mask).all()


@pytest.mark.parametrize("value", [0, 1, 255])
def test_masks_of_one_value(tmp_path, value):
    Image.new("L", (8, 8), value).save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png", READ) == (value > 0)).all()


def test_an_undecidable_mask_names_values_and_flag(tmp_path):
    Image.fromarray(np.array([[0, 1, 2], [7, 2, 2]], np.uint8)).save(tmp_path / "ids.png")
    with pytest.raises(UserError) as error:
        read_mask(tmp_path / "ids.png", READ)
    message = str(error.value)
    assert "ids.png" in message and "0, 1, 2, 7" in message and "--mask_threshold" in message


@pytest.mark.parametrize("values", [(0, 128), (0, 254), (0, 1, 255), (2,), (0, 65535)])
def test_near_misses_are_not_guessed(tmp_path, values):
    Image.fromarray(np.array([values], np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--mask_threshold"):
        read_mask(tmp_path / "a.png", READ)


def test_threshold_and_polarity(tmp_path):
    Image.fromarray(np.array([[0, 99, 100, 200]], np.uint8)).save(tmp_path / "a.png")
    above = ReadOptions(mask_threshold=100)
    below = ReadOptions(mask_threshold=100, foreground="below")
    assert read_mask(tmp_path / "a.png", above).tolist() == [[0, 0, 1, 1]]
    assert read_mask(tmp_path / "a.png", below).tolist() == [[1, 1, 0, 0]]


def test_a_threshold_cannot_empty_a_one_bit_mask(tmp_path, mask):
    save_mask(tmp_path / "a.png", mask, "1-bit")
    assert (read_mask(tmp_path / "a.png", ReadOptions(mask_threshold=128)) == mask).all()


def test_a_palette_mask_is_thresholded_by_index(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    picture.putpalette([255, 255, 255, 9, 9, 9, 0, 0, 0])
    picture.save(tmp_path / "a.png")
    result = read_mask(tmp_path / "a.png", ReadOptions(mask_threshold=2))
    assert result.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("read", [READ, ReadOptions(mask_threshold=100)])
def test_a_coloured_mask_is_refused_with_its_colours(tmp_path, read):
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[2:] = (64, 0, 128)
    Image.fromarray(colours).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"coloured \(2 colours: \(0, 0, 0\), \(64, 0, 128\)\)"):
        read_mask(tmp_path / "a.png", read)


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_black_and_white_jpeg_is_cut_at_the_middle(tmp_path, quality, mode):
    mask = np.zeros((96, 64), np.uint8)
    cv2.circle(mask, (30, 40), 20, 1, -1)
    Image.fromarray(mask * 255).convert(mode).save(tmp_path / "a.jpg", quality=quality)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.jpg")))) > 2
    assert (read_mask(tmp_path / "a.jpg", READ) == mask).all()


def test_a_jpeg_is_never_taken_for_ids_or_zero_and_one(tmp_path, mask):
    """Compression moved the values: 0/1 masks and id maps cannot be saved from it by guessing."""
    for values in (mask, mask * 11, mask * 120):
        Image.fromarray(values).save(tmp_path / "a.jpg", quality=95)
        with pytest.raises(UserError, match="not those of a black and white JPEG"):
            read_mask(tmp_path / "a.jpg", READ)
    photo = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match="--mask_threshold"):
        read_mask(tmp_path / "photo.jpg", READ)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (255, 1)])
def test_jpeg_masks_of_one_value(tmp_path, value, expected):
    Image.new("L", (16, 16), value).save(tmp_path / "a.jpg")
    assert (read_mask(tmp_path / "a.jpg", READ) == expected).all()


# --- both files together ---


def save_pair(tmp_path, image, mask, **options):
    Image.fromarray(image).save(tmp_path / "a.jpg", **options)
    Image.fromarray(mask * 255).save(tmp_path / "a.png")
    return Pair("a", tmp_path / "a.jpg", tmp_path / "a.png")


def test_a_pair_is_read_as_a_sample(tmp_path, picture, mask):
    sample, notes = read_sample(save_pair(tmp_path, picture, mask), READ)
    assert sample.image.shape == (20, 30, 3) and (sample.mask == mask).all()
    assert sample.id == "a" and sample.mask_path.endswith("a.png") and notes == ()


def test_a_mask_of_the_same_aspect_is_resized_by_pixel_centres(tmp_path):
    big, small = np.zeros((7, 7, 3), np.uint8), np.diag([1, 1, 0, 1, 1]).astype(np.uint8)
    sample, notes = read_sample(save_pair(tmp_path, big, small), READ)
    centres = ((np.arange(7) + 0.5) * 5 / 7).astype(int)
    assert (sample.mask == small[np.ix_(centres, centres)]).all()
    assert notes == ("resized",)


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        ((667, 1000), (67, 100), True),  # rounded to a whole pixel
        ((667, 1000), (66, 100), True),
        ((67, 100), (667, 1000), True),
        ((667, 1000), (65, 100), False),
        ((100, 100), (100, 101), True),
        ((100, 100), (100, 102), False),
        ((100, 100), (50, 51), False),
    ],
)
def test_another_aspect_is_refused(tmp_path, image, mask, fits):
    pair = save_pair(tmp_path, np.zeros((*image, 3), np.uint8), np.zeros(mask, np.uint8))
    if fits:
        assert read_sample(pair, READ).sample.mask.shape == image
    else:
        size = rf"a\.png: {mask[1]} x {mask[0]} pixels, its image .*a\.jpg {image[1]} x {image[0]}"
        with pytest.raises(UserError, match=size):
            read_sample(pair, READ)


def test_a_mask_on_its_side_is_suspected_of_exif(tmp_path, picture, mask):
    """A JPEG that the camera held upright, its mask drawn on the pixels as stored."""
    stored = np.asarray(as_stored(picture, 6))
    pair = save_pair(tmp_path, stored, as_array(as_stored(mask, 6)), exif=exif(6))
    with pytest.raises(UserError, match=r"a\.png: 20 x 30 .* 30 x 20: .*EXIF"):
        read_sample(pair, READ)


def test_a_turned_image_with_an_upright_mask_fits_and_is_remarked(tmp_path, picture, mask):
    pair = save_pair(tmp_path, np.asarray(as_stored(picture, 6)), mask, exif=exif(6))
    sample, notes = read_sample(pair, READ)
    assert sample.image.shape[:2] == sample.mask.shape == (20, 30)
    assert notes == ("turned",)


def as_array(image):
    return np.ascontiguousarray(image)
