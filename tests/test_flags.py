"""Flags: defaults < YAML < flags, typos, retired and foreign names, a run that goes on."""

from dataclasses import dataclass

import pytest
import yaml

from samtune import flags
from samtune.config import RETIRED, ModelOptions, TrainDataOptions, option
from samtune.config import Size as Pixels
from samtune.errors import UserError


@dataclass(frozen=True)
class Size:
    """Size"""

    width: int = option(3, "pixels")
    ratio: float = option(0.5, "100% of the height is 1")
    mode: str = option("near", "how", ("near", "far"))


@dataclass(frozen=True)
class Log:
    """Log"""

    loud: bool = option(False, "say more")
    name: str = option("", "of the run")


def parse(*argv, **more):
    return flags.parse("prog", "", [Size, Log], argv, **more)


def test_defaults_then_yaml_then_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("width: 5\nratio: 2\nloud: yes\n")
    size, log = parse("--config", str(file), "--width", "7").instances
    assert (size.width, size.ratio, size.mode, log.loud) == (7, 2.0, "near", True)


@pytest.mark.parametrize("word", ["yes", "True", "t", "Y", "1"])
def test_the_words_for_yes(word):
    assert parse("--loud", word).instances[1].loud is True


@pytest.mark.parametrize("word", ["no", "FALSE", "f", "n", "0"])
def test_the_words_for_no(word):
    assert parse("--loud", word).instances[1].loud is False


def test_a_boolean_alone_means_yes():
    assert parse("--loud", "--width", "4").instances[1].loud is True


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--widht", "4"], "did you mean --width?"),
        (["--rank", "4"], "belongs to lora"),
        (["--width", "four"], "expected a whole number, got 'four'"),
        (["--ratio", "x"], "expected a number"),
        (["--mode", "middle"], "invalid choice: 'middle'"),
        (["--loud", "perhaps"], "expected yes or no"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(argv, said):
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        parse(*argv, foreign={"rank": "belongs to lora"})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("widht: 4", "did you mean --width?"),
        ("width: four", "expected a whole number"),
        ("mode: middle", "invalid choice"),
        ("- 1\n- 2", "name: value"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_yaml_file_is_checked_like_flags(tmp_path, text, said):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse("--config", str(file))
    assert said in str(caught.value) and "c.yaml" in str(caught.value)


def test_retired_flags_are_accepted_and_answered():
    parsed = parse("--dist", "True", "--port", "1234", "--local_rank", "0", retired=RETIRED)
    assert [r.split(" ")[0] for r in parsed.remarks] == ["--dist", "--port", "--local_rank"]


def test_what_is_dumped_reads_back(tmp_path):
    first = parse("--width", "9", "--ratio", "1e-07", "--loud", "--name", "2024-01-01")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(flags.dump(first.instances)))
    assert parse("--config", str(file)).instances == first.instances


def test_a_run_that_goes_on_keeps_its_options(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("width: 5\nratio: 2.0\nname: a\n")
    free = {"ratio", "name"}
    parsed = parse("--width", "7", "--ratio", "3", "--name", "", base=str(file), free=free)
    assert parsed.instances[0] == Size(width=5, ratio=3.0)
    assert parsed.instances[1].name == "a"
    assert parsed.remarks == ["--width 7 is ignored: the run that goes on has 5"]


def test_peek_reads_flag_before_yaml_before_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("mode: far\n")
    assert flags.peek(["--x", "1", "--mode", "near", "--config", str(file)], "mode", "d") == "near"
    assert flags.peek(["--config", str(file)], "mode", "d") == "far"
    assert flags.peek([], "mode", "d") == "d"


def test_help_names_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "pixels (default: 3)" in text and "100% of the height" in text


@dataclass(frozen=True)
class Picture:
    """Picture"""

    frame: Pixels = option(Pixels(0, 0), "pixels")


def parse_frame(*argv):
    return flags.parse("prog", "", [Picture], argv).instances[0].frame


@pytest.mark.parametrize(
    ("text", "size"),
    [("256", (256, 256)), ("360x480", (360, 480)), ("0", (0, 0)), ("", (0, 0))],
)
def test_sizes_are_numbers_or_height_x_width(tmp_path, text, size):
    """As flag and in YAML, where the number of old files is no text; what is dumped reads back."""
    assert parse_frame("--frame", text) == size
    file = tmp_path / "c.yaml"
    file.write_text(f"frame: {text}" if text else "frame: ''")
    assert parse_frame("--config", str(file)) == size
    dumped = flags.dump([Picture(Pixels(*size))])
    assert type(dumped["frame"]) is (int if size[0] == size[1] else str)
    file.write_text(yaml.safe_dump(dumped))
    assert parse_frame("--config", str(file)) == size


@pytest.mark.parametrize("text", ["x", "360x", "x480", "3x4x5", "12.5", "-16", "360 x 480"])
def test_what_is_no_size_is_said(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(f"frame: {text}")
    for argv in ([f"--frame={text}"], ["--config", str(file)]):
        with pytest.raises(UserError, match=rf"frame: expected .*HEIGHTxWIDTH.*'{text}'"):
            parse_frame(*argv)


def test_a_size_says_itself_and_whether_it_was_said():
    assert f"{Pixels(360, 480)} {Pixels(64, 64)}" == "360x480 64"
    assert not Pixels(0, 0) and Pixels(16, 16)
    assert ModelOptions(image_size=64) == ModelOptions(image_size="64x64")
    assert TrainDataOptions(crop=(32, 64)).crop == Pixels(32, 64) and not TrainDataOptions().crop
