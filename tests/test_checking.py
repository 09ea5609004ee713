"""The verb `check`, on good and on broken data, as a user calls it."""

import hashlib
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import run_sa
from samtune import config as c
from samtune import flags
from samtune.adapters import ADAPTERS
from samtune.checking import run
from samtune.data.files import Unpaired, find_pairs
from samtune.data.sample_data import make_sample_set
from samtune.engine.distributed import Process
from samtune.errors import EXIT_USER_ERROR, UserError
from samtune.models import MODEL_TYPES
from tiny_models import TINY

ALONE = Process(0, 1, 0, torch.device("cpu"))
SIZE = (24, 32)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(seed: int, value: int = 255) -> Image.Image:
    pixels = np.zeros(SIZE, np.uint8)
    pixels[4:16, 4 + seed % 8 : 20] = value
    return Image.fromarray(pixels)


def write(folder: Path, files: dict) -> None:
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, bytes):
            path.write_bytes(file)
        else:
            file.save(path)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """An empty place, with good training and validation data: 8 and 4 pairs."""
    monkeypatch.chdir(tmp_path)
    for name, row in TINY.items():
        monkeypatch.setitem(MODEL_TYPES, name, row)
    for split, numbers in (("train", range(8)), ("val", range(20, 24))):
        files = {f"{split}/image/{chr(97 + i)}.png": picture(i) for i in numbers}
        write(tmp_path, files | {f"{split}/mask/{chr(97 + i)}.png": mask(i) for i in numbers})
    return tmp_path


def config(**options) -> c.CheckConfig:
    """The verb's config for the data above, with these options of any group."""
    given = {
        "model_type": "tiny", "adapter": "decoder", "checkpoint": "none", "workers": 0,
        "train_image_dir": "train/image", "train_mask_dir": "train/mask",
        "val_image_dir": "val/image", "val_mask_dir": "val/mask", "output_dir": "report",
    } | options  # fmt: skip
    groups = {
        f.name: run_sa.GROUPS.get(f.name) or ADAPTERS["decoder"].options
        for f in fields(c.CheckConfig)
    }
    parts = {
        name: group(**{f.name: given.pop(f.name) for f in fields(group) if f.name in given})
        for name, group in groups.items()
    }
    assert given == {}
    return c.CheckConfig(**parts)


def report() -> dict:
    return json.loads(Path("report/check.json").read_text())


def kinds(level: str = "") -> set[str]:
    return {f["kind"] for f in report()["findings"] if level in ("", f["level"])}


def contents(folder: Path) -> dict:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files
    }


def test_good_data_is_fine_and_stays_as_it_is(data, capsys):
    before = contents(data)
    written = run(config(), ALONE)
    after = contents(data)
    assert {name for name in after if name not in before} == {
        str(data / "report" / f"check.{kind}") for kind in ("html", "json", "png")
    }
    assert all(after[name] == before[name] for name in before)
    assert (written["errors"], written["warnings"]) == (0, 0)
    assert kinds("error") == kinds("warning") == set() and "memory" in kinds("fact")
    assert report()["splits"]["training"]["usable"] == 8
    said = capsys.readouterr().out
    assert "training: 8 pairs, validation: 4 pairs" in said and "written: report/check.html" in said
    assert Image.open("report/check.png").size[0] == 6 * 220


def break_it(data: Path) -> None:
    """One of each: what repositories silently learn from."""
    dot = np.zeros(SIZE, np.uint8)
    dot[3, 3] = 255
    write(
        data / "train",
        {
            "image/lonely.png": picture(90),
            "mask/lonelier.png": mask(90),
            "image/cut.png": picture(91),
            "mask/cut.png": mask(91),
            "image/nothing.png": picture(92),
            "mask/nothing.png": mask(92, 0),
            "image/dot.png": picture(93),
            "mask/dot.png": Image.fromarray(dot),
            "image/other.png": picture(94),
            "mask/other.png": mask(94).resize((5, 24), Image.Resampling.NEAREST),
            "image/ids.png": picture(95),
            "mask/ids.png": mask(95, 38),
            "image/again.bmp": picture(0),  # a.png, with another mask
            "mask/again.png": mask(5),
            "image/leak.png": picture(20),  # in validation, too
            "mask/leak.png": mask(20),
        },
    )
    cut = data / "train/image/cut.png"
    cut.write_bytes(cut.read_bytes()[:500])


def test_broken_data_is_told_file_by_file(data, capsys):
    break_it(data)
    with pytest.raises(UserError, match=r"^2 error\(s\) and \d+ warning.*report/check.html$"):
        run(config(image_size=16), ALONE)
    assert kinds("error") == {"unpaired", "unusable"}
    assert kinds("warning") == {
        "coding", "empty_masks", "tiny_objects", "shared_pictures", "repeated_pictures",
        "contradicting_masks",
    }  # fmt: skip
    found = {f["kind"]: f for f in report()["findings"]}
    assert sorted(found["unpaired"]["examples"]) == [
        "train/image/lonely.png: no mask; nearest is lonelier.png",
        "train/mask/lonelier.png: no image; nearest is lonely.png",
    ]
    lines = "\n".join(found["unusable"]["examples"])
    assert found["unusable"]["count"] == 3
    assert "cut.png: truncated" in lines and "other.png: 5 x 24" in lines and "ids.png" in lines
    assert found["empty_masks"]["examples"] == ["nothing"]
    assert found["tiny_objects"]["examples"] == ["dot"]
    assert found["shared_pictures"]["examples"] == ["training leak = validation u"]
    assert found["contradicting_masks"]["examples"] == ["training a = training again"]
    said = capsys.readouterr().out
    assert "errors (2):" in said and "cut.png: truncated" in said
    page = Path("report/check.html").read_text()
    assert "lonelier.png" in page and page.count("<img ") == 8 + 7 - 1 + 4  # all but the cut one


def test_only_with_strict_do_warnings_end_badly(data):
    write(data / "train", {"image/e.png": picture(40), "mask/e.png": mask(1, 0)})
    assert run(config(), ALONE)["warnings"] == 1
    with pytest.raises(UserError, match=r"^0 error\(s\) and 1 warning\(s\) in the data"):
        run(config(strict=True), ALONE)


def test_names_are_text_in_the_page(data):
    evil = "<script>alert(1)<&'\"é"
    write(data / "train", {f"image/{evil}.png": picture(50), f"mask/{evil}.png": mask(1, 0)})
    control = "bell\a\x1b[31m"
    write(data / "train", {f"image/{control}.png": picture(51), f"mask/{control}.png": mask(1, 0)})
    run(config(), ALONE)
    page = Path("report/check.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;&amp;" in page
    assert "\x1b" not in page and "\x1b" not in Path("report/check.json").read_text()


def test_no_pictures_no_sheet(data):
    run(config(pictures=0), ALONE)
    assert (
        not Path("report/check.png").exists()
        and "<img" not in Path("report/check.html").read_text()
    )
    with pytest.raises(UserError, match="--pictures -1"):
        run(config(pictures=-1), ALONE)


def test_slices_of_one_folder_and_a_picture_in_both(data):
    one = {"val_image_dir": "", "val_mask_dir": ""}
    run(config(train_slice=":6", val_slice="6:", **one), ALONE)
    splits = report()["splits"]
    assert splits["training"]["pairs"] == 6 and splits["validation"]["pairs"] == 2
    with pytest.raises(UserError):
        run(config(train_slice=":6", val_slice="5:", **one), ALONE)
    assert kinds("error") == {"source"} and "shared_pictures" in kinds("warning")
    (data / "train/mask/h.png").unlink()
    with pytest.raises(UserError):
        run(config(train_slice=":5", val_slice="5:", **one), ALONE)
    assert [f["kind"] for f in report()["findings"] if f["level"] == "error"] == ["unpaired"]
    assert report()["splits"]["validation"]["pairs"] == 2


def test_what_is_missing_does_not_hide_what_is_there(data):
    """Training ends at the first of these; a check tells all, and looks at the rest."""
    with pytest.raises(UserError):
        run(config(val_image_dir="", val_mask_dir="", test_image_dir="no", test_mask_dir="no"),
            ALONE)  # fmt: skip
    texts = [f["text"] for f in report()["findings"] if f["level"] == "error"]
    assert "nothing to validate on" in texts[0] and "there is no such folder" in texts[1]
    assert report()["splits"]["training"]["usable"] == 8


def test_flags_that_no_data_fits_are_refused_before_any_file_is_read(data):
    with pytest.raises(UserError, match="--num_classes 19"):
        run(config(mask_coding="cityscapes"), ALONE)
    with pytest.raises(UserError, match="--prompt"):
        run(config(num_classes=2, refine_steps=1, prompt="none"), ALONE)
    assert not Path("report").exists()


def test_test_data_classes_and_instances(data):
    for i in range(20, 24):
        mask(i, 2).save(data / f"val/mask/{chr(97 + i)}.png")
    for i in range(8):
        mask(i, 1).save(data / f"train/mask/{chr(97 + i)}.png")
    classes = {"num_classes": 3, "class_names": "sky,<b>,car"}
    same = {"test_image_dir": "val/image", "test_mask_dir": "val/mask"}
    report_of = run(config(**classes, **same), ALONE)
    assert kinds("warning") == {"classes", "unseen_classes", "shared_pictures"}
    assert report_of["splits"]["test"]["classes"]["car"]["pictures"] == 4
    assert "&lt;b&gt;" in Path("report/check.html").read_text()
    run(config(objects="instance"), ALONE)
    assert report()["splits"]["training"]["things"] == 8


def test_an_unwritable_folder_is_one_sentence(data):
    Path("report").write_text("a file")
    with pytest.raises(UserError, match="--output_dir report cannot be written"):
        run(config(), ALONE)


def test_it_takes_what_a_training_takes():
    assert {f.name for f in fields(c.TrainConfig)} < {f.name for f in fields(c.CheckConfig)}


def _rank(argv: list[str], place: Path, port: int, rank: int, world: int) -> None:
    """One process of the verb, forked from this one, which has imported all."""
    os.chdir(place)
    with open(f"said{rank}.txt", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout = sys.stderr = said
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))  # fmt: skip
        sys.exit(run_sa.main(argv))


def launch(argv: list[str], place: Path, world: int = 1) -> list[int]:
    """Exit codes of the command on `world` processes; what each says is in said<rank>.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(argv, place, port, rank, world))
        for rank in range(world)
    ]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(300)
    assert not any(one.is_alive() for one in ranks), "hangs"
    return [one.exitcode for one in ranks]


FLAGS = ["--model_type", "vit_mini", "--adapter", "decoder", "--checkpoint", "none"]
FOLDERS = ["--train_image_dir", "train/image", "--train_mask_dir", "train/mask",
           "--val_image_dir", "val/image", "--val_mask_dir", "val/mask"]  # fmt: skip


def test_two_processes_find_what_one_finds(data):
    """Each reads its share, with a loader process each; both end with the code of an error."""
    break_it(data)
    argv = ["check", *FLAGS, *FOLDERS, "--epoch", "5", "--workers", "1", "--output_dir"]
    assert launch([*argv, "one"], data) == [EXIT_USER_ERROR]
    assert launch([*argv, "two"], data, 2) == [EXIT_USER_ERROR] * 2
    for name in ("check.json", "check.html"):
        assert (data / "one" / name).read_bytes() == (data / "two" / name).read_bytes()
    said = [(data / f"said{rank}.txt").read_text() for rank in range(2)]
    assert "".join(said).count("error: 2 error(s)") == 1 and "Traceback" not in "".join(said)
    assert "errors (2):" in said[0] and "errors (2):" not in said[1]


def test_the_sample_set_and_a_runs_config(data):
    """Without any flag the sample set is looked at; a run's own file says the rest."""
    make_sample_set(data / "dataset/sample")
    assert launch(["check", *FLAGS, "--workers", "0"], data) == [0]
    report = json.loads((data / "checkpoints/check/check.json").read_text())
    assert {name: s["pairs"] for name, s in report["splits"].items()} == {
        "training": 24, "validation": 6, "test": 6,
    }  # fmt: skip
    assert (report["errors"], report["warnings"]) == (0, 0)
    told = config(model_type="vit_mini")
    groups = [getattr(told, f.name) for f in fields(c.TrainConfig)]
    run_folder = data / "run"
    run_folder.mkdir()
    saved = flags.dump(groups) | {"output_dir": "run"}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert launch(["check", "--config", "run/config.yaml"], data) == [0]
    assert (run_folder / "check.html").is_file()


def test_unpaired_files_keep_the_pairs_that_there_are(data):
    (data / "train/mask/c.png").rename(data / "train/mask/cc.png")
    with pytest.raises(Unpaired) as caught:
        find_pairs("train/image", "train/mask", c.ReadOptions(), ("--a", "--b"))
    error = caught.value
    assert (list(error.images), list(error.masks)) == (["c"], ["cc"])
    assert [pair.id for pair in error.pairs] == list("abdefgh")


def test_memory_is_that_of_what_trains(data):
    small = run(config(checkpoint="auto", model_type="vit_b"), ALONE)["memory_bytes"]
    all_of_it = run(config(checkpoint="auto", model_type="vit_b", train="all"), ALONE)
    assert small["gradients_and_optimizer"] == 12 * 3_506_304  # the README's number
    assert small["weights"] == all_of_it["memory_bytes"]["weights"] > 4 * 90e6
    assert all_of_it["memory_bytes"]["gradients_and_optimizer"] > 12 * 90e6
    auto = run(replace(config(), loader=c.LoaderOptions("auto", 0)), ALONE)["memory_bytes"]
    assert "batch" not in auto and small["batch"] == 3 * 1024**2 + 24 * 32
