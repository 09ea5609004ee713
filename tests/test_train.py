"""The verbs composed, in this process: what is refused before training, and what is scored."""

import csv
import json
import multiprocessing
import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from crash_points import full_disk, in_fork
from samtune import config as c
from samtune import flags, run_lock
from samtune.adapters.gsam import Gsam
from samtune.adapters.options import (
    DecoderOptions,
    GsamOptions,
    LoraOptions,
    SamAdapterOptions,
    TsSamOptions,
)
from samtune.data.loading import Loader
from samtune.data.sample_data import make_sample_set
from samtune.engine import durable
from samtune.engine.checkpoint import read_metadata
from samtune.engine.distributed import Process
from samtune.engine.evaluator import Evaluator
from samtune.engine.records import read_epochs
from samtune.engine.trainer import Trainer
from samtune.errors import Interrupted, UserError
from samtune.evaluate import run as evaluate
from samtune.importing import run as import_weights
from samtune.merging import run as merge
from samtune.models import MODEL_TYPES
from samtune.models.sam import build_sam
from samtune.run_folder import RunFolder
from samtune.train import run as train
from samtune.trained import load_trained, load_untuned

ALONE = Process(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(tmp_path, monkeypatch) -> c.TrainConfig:
    """One epoch of a tiny SAM on the sample set, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    tiny = replace(
        MODEL_TYPES["vit_mini"], embed_dim=32, depth=2, num_heads=2, global_blocks=(1,),
        image_size=64, window_size=3, prompt_embed_dim=32, decoder_heads=4, decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )  # fmt: skip
    monkeypatch.setitem(MODEL_TYPES, "tiny", tiny)
    files = make_sample_set(tmp_path / "sample")
    return c.TrainConfig(
        c.ModelOptions(model_type="tiny"),
        c.ReadOptions(),
        c.TrainDataOptions(
            train_image_dir=str(files.image_dir("train")),
            train_mask_dir=str(files.mask_dir("train")),
            val_image_dir=str(files.image_dir("val")),
            val_mask_dir=str(files.mask_dir("val")),
        ),
        c.TestDataOptions(str(files.image_dir("test")), str(files.mask_dir("test"))),
        c.LoaderOptions(batch_size=4, workers=0),
        c.PromptOptions(),
        c.LossOptions(),
        c.OptimOptions(lr=1e-3),
        c.RunOptions(epoch=1, output_dir="run"),
        c.LogOptions(),
        SamAdapterOptions(tune_out=12, hidden_dim=6),
    )


def score(**options) -> dict:
    mine = {f.name for f in fields(c.EvaluateOptions)}
    given = {name: value for name, value in options.items() if name not in mine - {"prompt"}}
    wanted = {name: value for name, value in options.items() if name in mine}
    wanted, loader = c.EvaluateOptions(run_dir="run", **wanted), c.LoaderOptions(4, 0)
    return evaluate(
        c.EvaluateConfig(wanted, c.TestDataOptions(), c.ReadOptions(), loader, given), ALONE
    )


def test_evaluation_scores_what_was_trained(config):
    """The parent's evaluation loaded the untuned weights; here they are the other row."""
    train(config, None, ALONE)
    scores = score()
    assert scores == json.loads(Path("run/scores.json").read_text())
    assert scores["tuned"]["loss"] < scores["zero_shot"]["loss"]
    assert scores["images"] == 6 and scores["prompt"] == "box"
    untuned, tuned = load_untuned("run"), load_trained("run")
    file = load_file("run/best.safetensors")
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, file[name]), name
    shared = untuned.state_dict().keys() & file.keys()
    assert any(not torch.equal(untuned.state_dict()[name], file[name]) for name in shared)


def at_step(number, happens, monkeypatch):
    """Let something happen after a step of the next training, counted over its epochs."""
    train_step, done = Trainer.train_step, []

    def step(self, *arguments):
        train_step(self, *arguments)
        done.append(1)
        if len(done) == number:
            happens()

    monkeypatch.setattr(Trainer, "train_step", step)


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def test_loader_processes_live_as_long_as_the_training_and_no_longer(config, monkeypatch):
    """Started once, not per epoch; ended with it, however it ends. Nothing depends on them."""
    starts, get_iterator = [], Loader._get_iterator
    monkeypatch.setattr(
        Loader,
        "_get_iterator",
        lambda self: (starts.append(self.num_workers), get_iterator(self))[1],
    )
    config = replace(config, loader=c.LoaderOptions(4, 1), run=c.RunOptions(2, output_dir="run"))
    train(config, None, ALONE)
    assert starts == [1, 1], "one for training, one for validation"
    assert multiprocessing.active_children() == []
    run = replace(config.run, output_dir="alone")
    train(replace(config, loader=c.LoaderOptions(4, 0), run=run), None, ALONE)
    files = [load_file(f"{folder}/best.safetensors") for folder in ("run", "alone")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0] | files[1])


@pytest.mark.parametrize("how", [interrupt, lambda: 1 / 0], ids=["signal", "error"])
def test_no_loader_process_outlives_a_training_that_ends_early(config, monkeypatch, how):
    at_step(2, how, monkeypatch)
    config = replace(config, loader=c.LoaderOptions(4, 2))
    with pytest.raises((Interrupted, ZeroDivisionError)) as caught:
        train(config, None, ALONE)
    assert multiprocessing.active_children() == [], caught  # whose traceback holds the loader


def test_steps_are_told_between_epochs_and_none_twice(config, monkeypatch):
    """Interrupted in the second epoch after its fifth step, and gone on with."""
    config = replace(
        config, log=c.LogOptions(log_every=2), run=c.RunOptions(2, output_dir="run", patience=0)
    )
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        at_step(11, interrupt, patched)
        train(config, None, ALONE)
    train(config, RunFolder("run"), ALONE)
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [(r.get("kind", "epoch"), r["step"]) for r in records] == [
        ("step", 2), ("step", 4), ("step", 6), ("epoch", 6),
        ("step", 8), ("step", 10), ("step", 12), ("epoch", 12),
    ]  # fmt: skip
    assert [record["epoch"] for record in read_epochs(Path("run/metrics.jsonl"))] == [1, 2]
    for record in records:
        assert record["prompt"] == "box" and record["train"]["loss"] > 0
        assert record["speed"].keys() == {
            "images_per_second", "seconds_per_step", "data_wait", "peak_memory_bytes"
        }  # fmt: skip


def test_the_prompt_of_a_score_can_be_chosen_and_is_said(config):
    train(config, None, ALONE)
    assert score(prompt="none")["prompt"] == "none"
    assert "box_filled" not in json.loads(Path("run/scores.json").read_text())


def test_validation_on_training_images_is_refused(config):
    """Nor can the test set choose the best model: it is not looked at in training."""
    data = replace(
        config.data, val_image_dir=config.data.train_image_dir,
        val_mask_dir=config.data.train_mask_dir, train_slice=":20", val_slice="19:",
    )  # fmt: skip
    with pytest.raises(UserError, match="1 images are in training and in validation"):
        train(replace(config, data=data), None, ALONE)
    assert not Path("run").exists()


def broken(path: Path, how: str) -> None:
    """Spoil one training file."""
    if how == "truncated image":
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "mask of another size":
        Image.fromarray(np.zeros((31, 400), np.uint8)).save(path)
    elif how == "undecidable mask":
        Image.fromarray(np.arange(9, dtype=np.uint8).reshape(3, 3)).resize((200, 160)).save(path)
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("truncated image", "image", "truncated|damaged|cannot be read"),
        ("mask of another size", "mask", "400 x 31 pixels, its image"),
        ("undecidable mask", "mask", "--mask_threshold"),
        ("missing", "mask", "--train_image_dir: without a mask"),
    ],
)
def test_bad_files_are_named_before_training(config, how, kind, said):
    folder = Path(getattr(config.data, f"train_{kind}_dir"))
    victim = sorted(folder.iterdir())[3]
    broken(victim, how)
    with pytest.raises(UserError, match=said) as caught:
        train(config, None, ALONE)
    assert victim.stem in str(caught.value)
    assert not any(Path().glob("run/*")), "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("group", "changes", "said"),
    [
        ("model", {"image_size": 100}, "--image_size 100"),
        ("model", {"image_size": "48x100"}, "--image_size 48x100"),
        ("data", {"crop": 32}, "--crop 32: --adapter sam_adapter"),
        ("model", {"model_type": "vit_b"}, "sam_vit_b_01ec64.pth"),
        ("model", {"checkpoint": "gone.pth"}, "gone.pth"),
        ("data", {"train_image_dir": "nowhere"}, "nowhere"),
        ("data", {"train_mask_dir": ""}, "--train_mask_dir is not set"),
        ("data", {"val_image_dir": ""}, "nothing to validate on"),
        ("test", {"test_image_dir": "nowhere"}, "nowhere"),
        ("test", {"test_slice": "90:"}, "--test_slice"),
        ("data", {"train_slice": "90:"}, "--train_slice"),
        ("optim", {"precision": "fp16"}, "--precision fp16"),
        ("optim", {"lr": -1.0}, "--lr"),
        ("loader", {"batch_size": 0}, "--batch_size"),
        ("run", {"keep": 0}, "--keep 0"),
        ("run", {"save_every": -1.0}, "--save_every -1"),
        ("run", {"save_every": float("nan")}, "--save_every nan"),
    ],
)
def test_what_cannot_work_is_said_before_training(config, group, changes, said):
    wrong = replace(config, **{group: replace(getattr(config, group), **changes)})
    with pytest.raises(UserError, match=said):
        train(wrong, None, ALONE)
    assert not Path("run/last.pt").exists()


def test_two_runs_in_one_folder(config, monkeypatch):
    """The second is refused with the folder's name, and changes nothing; the first goes on."""
    refused = []

    def contents():  # to read the lock would free it
        return {path: path.read_bytes() for path in Path("run").glob("[!.]*")}

    def second():
        def run_there():
            for resumed in (None, RunFolder("run")):
                with pytest.raises(UserError, match="--output_dir run: another run is at work"):
                    train(config, resumed, ALONE)

        before = contents()
        refused.append(in_fork(run_there))
        assert contents() == before

    at_step(2, second, monkeypatch)
    train(config, None, ALONE)
    assert refused == [0] and load_trained("run")


def test_a_signal_in_validation_ends_it_after_a_batch(config, monkeypatch):
    """And the next launch validates that epoch, and is done."""
    predict, batches = Evaluator._predict, []

    def predicting(self, batch):
        batches.append(1)
        interrupt()
        return predict(self, batch)

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="epoch 1 after 6 of"):
        patched.setattr(Evaluator, "_predict", predicting)
        train(config, None, ALONE)
    assert len(batches) == 1 and not Path("run/best.safetensors").exists()
    train(config, RunFolder("run"), ALONE)
    assert [record["epoch"] for record in read_epochs(Path("run/metrics.jsonl"))] == [1]


def test_as_many_states_stay_as_asked_for_and_a_damaged_one_is_said(config, capsys):
    config = replace(config, run=replace(config.run, epoch=3, keep=3))
    train(config, None, ALONE)
    assert [path.name for path in RunFolder("run").states()] == [
        "last.pt", "last-1.pt", "last-2.pt"
    ]  # fmt: skip
    Path("run/last.pt").write_bytes(b"half of it")
    capsys.readouterr()
    train(config, RunFolder("run"), ALONE)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1
    assert "run/last.pt" in said and "goes on from run/last-1.pt" in said
    assert [record["epoch"] for record in read_epochs(Path("run/metrics.jsonl"))] == [1, 2, 3]


def test_what_torchrun_starts_again_goes_on_by_itself(config, monkeypatch, capsys):
    """Nobody says --resume, nor where the run lies; before anything was saved it begins anew."""
    import run_sa

    monkeypatch.setitem(run_sa.CHOICES, "model_type", list(MODEL_TYPES))  # made at import
    monkeypatch.setattr(run_lock, "launch_name", lambda: "ours")
    monkeypatch.setattr("samtune.train.launch_name", lambda: "ours")
    config = replace(
        config, run=replace(config.run, output_dir="", epoch=2), test=c.TestDataOptions(),
        log=c.LogOptions(log_every=0),
    )  # fmt: skip
    options = flags.dump([getattr(config, f.name) for f in fields(config)])
    argv = [f"--{name}={value}" for name, value in options.items()]
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        at_step(2, lambda: 1 / 0, patched)
        run_sa.train(argv)
    (run,) = Path("checkpoints").iterdir()
    assert not RunFolder(run).states() and "started again" not in capsys.readouterr().err
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        at_step(8, lambda: 1 / 0, patched)
        run_sa.train(argv)
    assert f"started again: {run} has no state yet and begins anew" in capsys.readouterr().err
    run_sa.train(argv)
    assert f"started again: {run} goes on from its last state" in capsys.readouterr().err
    assert [run] == list(Path("checkpoints").iterdir())
    assert [record["epoch"] for record in read_epochs(run / "metrics.jsonl")] == [1, 2]


def test_a_disk_that_fills_up_while_a_run_is_at_it_is_one_sentence(config, monkeypatch):
    """In the files beside the checkpoints as well; the states from before are whole."""
    train(config, None, ALONE)
    before = Path("run/last.pt").read_bytes()
    config = replace(config, run=replace(config.run, epoch=2))
    for name in ("config.yaml", "model.txt", "metrics.jsonl", "last.pt"):
        with monkeypatch.context() as patched:
            patched.setattr(durable.Disk, "__init__", full_for(name, durable.Disk.__init__))
            with pytest.raises(UserError, match=rf"run/{name} could not be written: No space"):
                train(config, RunFolder("run"), ALONE)
        assert Path("run/last.pt").read_bytes() == before
        assert not list(Path("run").glob(".part*"))
    train(config, RunFolder("run"), ALONE)
    assert [record["epoch"] for record in read_epochs(Path("run/metrics.jsonl"))] == [1, 2]


def full_for(name: str, opened):
    """Opening a file to write, for which the disk is full if it has this name."""

    def refusing(self, path, refusals):
        opened(self, path, refusals)
        if path.name.endswith(name):
            full_disk()

    return refusing


def test_an_html_page_or_another_model_is_no_base(config):
    Path("page.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match="web page"):
        train(replace(config, model=replace(config.model, checkpoint="page.pth")), None, ALONE)


def test_the_config_of_a_run_repeats_it(config):
    """`--config checkpoints/run/config.yaml` is the same run."""
    train(config, None, ALONE)
    groups = [type(getattr(config, f.name)) for f in fields(config)]
    parsed = flags.parse("x", "", groups, ["--config", "run/config.yaml", "--output_dir", "again"])
    again = c.TrainConfig(*parsed.instances)
    assert replace(again, run=replace(again.run, output_dir="run")) == config
    train(again, None, ALONE)
    first, second = load_file("run/best.safetensors"), load_file("again/best.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_parents_file_is_written_and_becomes_a_run_again(config, prefix):
    """best.pth, as the parent writes it with one process or with several, scores the same."""
    torch.manual_seed(0)
    torch.save(build_sam("tiny").state_dict(), "base.pth")
    model = replace(config.model, checkpoint="base.pth")
    run = replace(config.run, save_pth=True)
    train(replace(config, model=model, run=run), None, ALONE)
    state = torch.load("run/best.pth", weights_only=True)
    torch.save({prefix + name: tensor for name, tensor in state.items()}, "theirs.pth")
    source = c.ImportConfig(
        c.ImportOptions("theirs.pth"), model, config.read, config.prompts,
        c.RunOptions(output_dir="imported"), config.adapter,
    )  # fmt: skip
    import_weights(source, ALONE)
    first, second = (load_trained(name).state_dict() for name in ("run", "imported"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_imported_tensors_that_samtune_would_not_train_are_kept(config):
    torch.manual_seed(0)
    torch.save(build_sam("tiny").state_dict(), "base.pth")
    model = replace(config.model, checkpoint="base.pth")
    train(replace(config, model=model, run=replace(config.run, save_pth=True)), None, ALONE)
    state = torch.load("run/best.pth", weights_only=True)
    frozen = "mask_decoder.iou_prediction_head.layers.0.weight"
    state[frozen] = state[frozen] * 0.99  # as weight decay leaves it
    torch.save(state, "theirs.pth")
    source = c.ImportConfig(
        c.ImportOptions("theirs.pth"), model, config.read, config.prompts,
        c.RunOptions(output_dir="imported"), config.adapter,
    )  # fmt: skip
    import_weights(source, ALONE)
    assert torch.equal(load_trained("imported").state_dict()[frozen], state[frozen])


def test_a_trained_lora_becomes_a_checkpoint_of_stock_sam(config):
    """The file loads strictly into the unmodified package and answers as the tuned model does."""
    from segment_anything import SamPredictor

    torch.manual_seed(0)
    torch.save(build_sam("tiny").state_dict(), "base.pth")
    model = replace(config.model, checkpoint="base.pth", adapter="lora")
    train(replace(config, model=model, adapter=LoraOptions()), None, ALONE)
    merge(c.MergeOptions("run", output="merged.pth"), ALONE)
    stock = build_sam("tiny")
    stock.load_state_dict(torch.load("merged.pth", weights_only=True))
    image = np.random.default_rng(0).integers(0, 255, (60, 50, 3), dtype=np.uint8)
    answers = []
    for sam in (stock, load_trained("run").as_sam()):
        predictor = SamPredictor(sam)
        predictor.set_image(image)
        box = np.array([5, 5, 40, 50])
        answers.append(predictor.predict(box=box, multimask_output=False, return_logits=True)[0])
    np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_cannot_be_merged_says_so(config):
    train(config, None, ALONE)
    with pytest.raises(UserError, match="--adapter sam_adapter cannot be merged"):
        merge(c.MergeOptions("run"), ALONE)


def test_a_prompt_that_the_adapter_does_not_take_is_refused_in_scoring(config):
    model = replace(config.model, adapter="ts_sam")
    prompts = replace(config.prompts, prompt="none")
    train(replace(config, model=model, prompts=prompts, adapter=TsSamOptions()), None, ALONE)
    assert score()["prompt"] == "none"
    with pytest.raises(UserError, match="--adapter ts_sam does not take --prompt box"):
        score(prompt="box")


def class_masks(folder: Path) -> None:
    """Turn the sample set's masks into class ids: 0, 1, 2 for the object's right half, 9 unread."""
    for path in folder.rglob("*.png"):
        mask = np.asarray(Image.open(path))
        if mask.ndim == 2 and set(np.unique(mask)) <= {0, 255}:
            ids = (mask > 0).astype(np.uint8)
            ids[:, mask.shape[1] // 2 :] *= 2
            ids[:2] = 9
            Image.fromarray(ids).save(path)


@pytest.mark.parametrize("layout", ["samed", "gsam"])
def test_several_classes_are_trained_scored_and_drawn(config, layout):
    class_masks(Path("sample"))
    config = replace(
        config,
        model=replace(config.model, adapter="decoder", class_layout=layout),
        adapter=DecoderOptions(),
        read=c.ReadOptions(num_classes=3, ignore_index=9),
        prompts=c.PromptOptions(prompt="none"),
        loss=c.LossOptions(dice_weight=0.5),
        run=c.RunOptions(epoch=2, output_dir="run", best_by="mIoU"),
    )
    train(config, None, ALONE)
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {"loss", "ce", "dice_loss", "mIoU", "pixel_accuracy"} <= records[-1]["validation"].keys()
    scores = score(save_predictions=True)
    assert scores["tuned"]["loss"] < scores["zero_shot"]["loss"]
    assert scores["protocol"]["name"] == "semantic" and scores["num_classes"] == 3
    last = records[-1] if records[-1]["best"] else records[-2]
    assert {f"iou/{c}" for c in range(3)} <= scores["tuned"].keys() and last["best"]
    low, high = scores["headlines"]["tuned"]["mIoU"]["interval"]
    assert low <= scores["tuned"]["mIoU"] <= high
    assert 0 < scores["majority"]["pixel_accuracy"] < 1 and scores["prompt"] == "none"
    drawn = sorted(Path("run/predictions/masks").iterdir())
    assert len(drawn) == scores["images"] == 6
    with Image.open(drawn[0]) as picture:
        assert picture.mode == "P" and np.asarray(picture).max() < 3
    with pytest.raises(UserError, match="--num_classes 4: the run answers with 3 classes"):
        score(num_classes=4)
    assert Path("run/examples.png").stat().st_size


def test_the_score_that_chooses_the_best_epoch_must_be_measured(config):
    asked = replace(config, run=replace(config.run, best_by="mIoU"))
    with pytest.raises(UserError, match="--best_by mIoU: this run measures loss, iou, dice"):
        train(asked, None, ALONE)


def test_one_run_under_several_prompts_in_one_table(config, capsys):
    """A score with the true box must not pass for what the model finds by itself."""
    train(config, None, ALONE)
    scores = score(prompts="exact_box,jittered_box,whole_image,centre_point,none")
    by_prompt = scores["prompts"]
    assert list(by_prompt) == [
        "exact_box", "jittered_box", "whole_image", "centre_point", "none"
    ]  # fmt: skip
    assert by_prompt["exact_box"]["tuned"] == scores["tuned"]
    boxes = {name: by_prompt[name]["box_filled"]["iou"] for name in ("exact_box", "whole_image")}
    assert boxes["exact_box"] > boxes["whole_image"]
    assert "box_filled" not in by_prompt["none"]
    assert len({prompt["tuned"]["loss"] for prompt in by_prompt.values()}) == 5
    text = capsys.readouterr().out
    assert "exact_box: the box of the true mask" in text and "none: nothing" in text
    with pytest.raises(UserError, match="--prompts circle"):
        score(prompts="circle")


def test_every_prompt_is_asked_about_the_same_images(config):
    """None needs no object, a box does: both are scored where there is one."""
    train(replace(config, prompts=c.PromptOptions(prompt="none")), None, ALONE)
    victim = sorted(Path(config.test.test_mask_dir).iterdir())[0]
    Image.fromarray(np.zeros_like(np.asarray(Image.open(victim)))).save(victim)
    assert score()["images"] == 6
    scores = score(prompts="none,exact_box")
    assert (scores["images"], scores["skipped_empty"]) == (5, 1)
    assert scores["counts"]["empty_truths"] == 0


def test_a_run_that_goes_on_is_scored_on_the_test_data_it_is_given_then(config, monkeypatch):
    import run_sa

    monkeypatch.setitem(run_sa.CHOICES, "model_type", list(MODEL_TYPES))  # made at import
    train(replace(config, test=c.TestDataOptions()), None, ALONE)
    test = [f"--{name}={value}" for name, value in vars(config.test).items() if value]
    run_sa.train(["--resume", "run", "--workers", "0", *test])
    assert json.loads(Path("run/scores.json").read_text())["images"] == 6


@pytest.mark.parametrize(
    "protocol, score_name", [("cod", "S_measure"), ("shadow", "BER"), ("polyp", "iou")]
)
def test_the_protocol_says_what_is_measured(config, protocol, score_name):
    train(config, None, ALONE)
    scores = score(protocol=protocol)
    assert scores["protocol"]["name"] == protocol and scores["tuned"][score_name] is not None
    assert scores["policy"] and scores["versions"]["torch"] and len(scores["run_sha256"]) == 64
    with pytest.raises(UserError, match="semantic"):
        score(protocol="semantic")


def test_classes_under_boxes_are_questions_of_their_own(config):
    class_masks(Path("sample"))
    config = replace(
        config,
        read=c.ReadOptions(
            num_classes=3, ignore_index=9, class_names="ground,left,right", ask_classes="right"
        ),
    )
    train(config, None, ALONE)
    scores = score()
    assert scores["objects"] == "class" and scores["protocol"]["name"] == "binary"
    rows = list(csv.DictReader(Path("run/scores.csv").read_text().splitlines()))
    assert rows and all(row["id"].endswith("#right") for row in rows)
    with pytest.raises(UserError, match="cannot be scored under it"):
        score(prompt="none")


def test_class_ids_that_are_none_are_said_before_training(config):
    class_masks(Path("sample"))
    config = replace(
        config,
        read=c.ReadOptions(num_classes=2, ignore_index=9),
        prompts=c.PromptOptions(prompt="none"),
    )
    with pytest.raises(UserError, match=r"2.*--num_classes 2"):
        train(config, None, ALONE)


# Frames that are not square


def test_a_frame_that_is_not_square_from_training_to_score(config):
    """Its size is written once and known to all: going on, loading, scoring, importing."""
    torch.manual_seed(0)
    torch.save(build_sam("tiny").state_dict(), "base.pth")
    model = replace(config.model, checkpoint="base.pth", image_size="48x80")
    run = replace(config.run, save_pth=True)
    config = replace(config, model=model, run=run)
    train(config, None, ALONE)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["image_size"] == "48x80"
    assert read_metadata("run/best.safetensors")["image_size"] == "48x80"
    train(replace(config, run=replace(run, epoch=2)), RunFolder("run"), ALONE)
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    assert load_trained("run").image_size == load_untuned("run").image_size == (48, 80)
    scores = score()
    assert scores["image_size"] == "48x80" and scores["zero_shot"]["loss"] > 0
    with pytest.raises(UserError, match="frames of 48x80 pixels, and stock SAM squares only"):
        load_trained("run").as_sam()
    source = c.ImportConfig(
        c.ImportOptions("run/best.pth"), config.model, config.read, config.prompts,
        c.RunOptions(output_dir="imported"), config.adapter,
    )  # fmt: skip
    import_weights(source, ALONE)
    assert load_trained("imported").image_size == (48, 80)


def test_a_run_in_another_frame_is_another_model(config):
    train(replace(config, model=replace(config.model, image_size="48x80")), None, ALONE)
    turned = replace(config, model=replace(config.model, image_size="80x48"))
    with pytest.raises(UserError, match=r"image_size '48x80' \(here '80x48'\)"):
        train(turned, RunFolder("run"), ALONE)


def test_squares_are_written_as_they_always_were(config):
    """So that runs from before other frames existed go on, and are scored."""
    train(config, None, ALONE)
    metadata = read_metadata("run/best.safetensors")
    assert metadata["image_size"] == 64 and metadata["config"]["image_size"] == 0
    assert load_trained("run").image_size == load_untuned("run").image_size == (64, 64)
    assert score()["image_size"] == 64


@pytest.mark.parametrize("prompt", ["box", "none"])
def test_gsam_trains_on_crops_and_is_scored_on_whole_frames(config, prompt, monkeypatch):
    seen = {True: set(), False: set()}  # in training?
    encode = Gsam.encode

    def spy(self, image, *rest):
        seen[self.training].add(tuple(image.shape[-2:]))
        return encode(self, image, *rest)

    monkeypatch.setattr(Gsam, "encode", spy)
    config = replace(
        config,
        model=replace(config.model, adapter="gsam", image_size="40x72"),
        data=replace(config.data, crop="24x32", train_slice=":8", val_slice=":4"),
        prompts=replace(config.prompts, prompt=prompt),
        adapter=GsamOptions(resnet_depth=18),
    )
    train(config, None, ALONE)
    assert seen == {True: {(24, 32)}, False: {(40, 72)}}
    assert load_trained("run").image_size == (40, 72) and load_untuned("run") is None
    scores = score()
    assert seen[False] == {(40, 72)} and scores["image_size"] == "40x72"
    assert 0 <= scores["tuned"]["dice"] <= 1 and "zero_shot" not in scores


def test_gsam_is_scored_beside_sam_where_its_frame_is_one(config):
    config = replace(
        config,
        model=replace(config.model, adapter="gsam", image_size="48x64"),
        data=replace(config.data, crop="32", train_slice=":8", val_slice=":4"),
        adapter=GsamOptions(resnet_depth=18),
    )
    train(config, None, ALONE)
    assert load_untuned("run").image_size == (48, 64)
    assert {"tuned", "zero_shot", "box_filled"} <= score().keys()


def test_a_question_about_one_object_needs_a_prompt(config):
    asked = replace(
        config, read=c.ReadOptions(objects="component"), prompts=c.PromptOptions(prompt="none")
    )
    with pytest.raises(UserError, match=r"--objects component: .* needs a --prompt"):
        train(asked, None, ALONE)
