"""Files are data: nothing in them runs, leads elsewhere or is believed; secrets stay secret."""

import ast
import http.server
import io
import json
import os
import pickle
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samtune import config as c
from samtune import flags
from samtune.adapters.gsam_blocks import RESNETS, CnnEncoder
from samtune.adapters.options import DecoderOptions
from samtune.data.arrays import ArraySlice, read_slice
from samtune.data.remote import refuse_secrets
from samtune.data.sample_data import make_sample_set
from samtune.data.shards import index_shards, named_shards
from samtune.engine.checkpoint import Checkpoints, load_adapted, load_run_state
from samtune.engine.distributed import Process
from samtune.errors import UserError
from samtune.evaluate import run as evaluate
from samtune.gallery import Pictures
from samtune.importing import read_published
from samtune.models.sam import build_sam
from samtune.models.weights import fetch, load_base
from samtune.run_folder import RunFolder
from samtune.train import run as train
from samtune.trained import read_description

CODE = Path(__file__).resolve().parents[1] / "code"
ALONE = Process(0, 1, 0, torch.device("cpu"))

# --- nothing in a file runs ---------------------------------------------------------------------


class Payload:
    """What an attacker would pickle: a command that leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def as_zip(content, path):
    torch.save(content, path)


def as_before_zip(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_text_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=0))


def as_tar_of_torch(content, path):
    """torch's format of 2016, whose reader unpickles and unpacks."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


READERS = {
    "base checkpoint": lambda path: load_base(build_sam("tiny", 64), path),
    "adapted state": lambda path: load_adapted(torch.nn.Linear(1, 1), path),
    "run state": load_run_state,
    "import": lambda path: read_published(str(path), "lora"),
    "cnn of gsam": lambda path: CnnEncoder(32, RESNETS[18]).load_trunk(path),
}


@pytest.mark.parametrize(
    "written", [as_zip, as_before_zip, as_pickle, as_text_pickle, as_tar_of_torch]
)
@pytest.mark.parametrize("reader", READERS)
def test_a_malicious_checkpoint_does_nothing(tmp_path, tiny, reader, written):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    for content in (Payload(marker), {"model": {"a": Payload(marker)}},
                    {"a": torch.zeros(1), "b": Payload(marker)}):  # fmt: skip
        written(content, path)
        with pytest.raises(UserError, match=r"evil\.pth") as error:
            READERS[reader](path)
        assert "\n" not in str(error.value)
    assert not marker.exists()
    if written is as_pickle:  # the payload is one: this is what would have happened
        pickle.loads(pickle.dumps(Payload(marker)))
        assert marker.exists()


def test_a_malicious_optimizer_in_a_runs_state_does_nothing(tmp_path):
    marker = tmp_path / "marker"
    last = RunFolder(tmp_path).last
    torch.save({"model": {}, "metadata": {}, "optimizer": {"state": Payload(marker)}}, last)
    with pytest.raises(UserError, match="could run code when read"):
        Checkpoints(RunFolder(tmp_path), {}).load_last()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "objects.npy"])
def test_malicious_arrays_do_nothing(tmp_path, name):
    marker, path = tmp_path / "marker", tmp_path / name
    objects = np.array([[Payload(marker)]], dtype=object)
    if name == "a.npz":
        np.savez(path, image=objects)
    elif name == "a.npy":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        np.save(path, objects)
    with pytest.raises(UserError, match=name):
        read_slice(ArraySlice(path, "image"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "lr: !!python/object/apply:os.system ['touch {}']",
        "lr: !!python/name:os.system",
        "lr: !!python/object/new:subprocess.Popen [[touch, '{}']]",
    ],
)
def test_malicious_options_do_nothing(tmp_path, text):
    marker, path = tmp_path / "marker", tmp_path / "c.yaml"
    path.write_text(text.format(marker))
    with pytest.raises(UserError, match="not valid YAML"):
        flags.parse("p", "", [c.OptimOptions], ["--config", str(path)])
    assert not marker.exists()


# --- no door is left open in the source ---------------------------------------------------------

SHUT = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads",
    "shelve.open", "joblib.load", "torch.jit.load", "torch.hub.load", "tempfile.mktemp",
    "shutil.unpack_archive", "pandas.read_pickle",
}  # fmt: skip
SAFE_WITH = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
}


def open_doors(source: str) -> list[str]:
    """ "line: call" of every call that could run what is in a file, or start a shell."""
    tree, real = ast.parse(source), {}
    for node in ast.walk(tree):  # what names stand for
        if isinstance(node, ast.Import):
            real |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                     for a in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            real |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = real.get(first, first) + dot + rest
        words = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        key, safe = SAFE_WITH.get(name, ("", None))
        if (
            name in SHUT
            or (key and words.get(key) is not safe)
            or ("shell" in words and words["shell"] is not False)
            or rest.endswith(("extractall", "extract"))
        ):
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "path", sorted(CODE.rglob("*.py")), ids=lambda path: str(path.relative_to(CODE))
)
def test_no_call_runs_what_a_file_holds(path):
    assert open_doors(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "import os\nos.system(x)", "from os import system as s\ns(x)",
        "import yaml as y\ny.load(f, Loader=y.Loader)", "from pickle import loads\nloads(b)",
        "import torch\ntorch.load(f)", "import torch\ntorch.load(f, weights_only=False)",
        "import numpy as np\nnp.load(f)", "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import subprocess\nsubprocess.run(x, shell=True)", "tar.extractall(folder)",
        "import torch\ntorch.load(f, weights_only=flag)",
    ],
)  # fmt: skip
def test_an_open_door_is_found(source):
    assert len(open_doors(source)) == 1


# --- names are data -----------------------------------------------------------------------------


def test_hostile_metadata_is_refused(tmp_path):
    """A file that says of itself what no run would say."""
    good = {
        "adapter": "decoder", "model_type": "vit_mini", "image_size": 256, "base_file": "",
        "base_sha256": "", "epoch": 1,
        "config": {"adapter": "decoder", "model_type": "vit_mini", "prompt": "box", "seed": 1,
                   "train": "auto"},
    }  # fmt: skip
    changes = [
        {"adapter": "../../evil"}, {"adapter": "lora"}, {"config": []}, {"image_size": [1]},
        {"image_size": 10**9}, {"base_sha256": None}, {"model_type": {}}, {"base_file": 3},
        *({"config": good["config"] | one} for one in (
            {"prompt": "shell"}, {"seed": "x"}, {"num_classes": 10**9}, {"adapter": None},
            {"image_size": "1e9"}, {"class_names": ["x"]}, {"model_type": "vit_x"},
        )),
    ]  # fmt: skip
    path = tmp_path / "best.safetensors"

    def say(metadata):
        save_file({"a": torch.zeros(1)}, path, {"samtune": json.dumps(metadata)})
        return read_description(path)

    assert say(good)["config"]["prompt"] == "box"
    for change in changes:
        with pytest.raises(UserError):
            say(good | change)
    for text in ("[" * 100_000, "5", "null", '"x"', "{"):
        save_file({"a": torch.zeros(1)}, path, {"samtune": text})
        with pytest.raises(UserError, match="does not say what model"):
            read_description(path)


def test_pictures_of_hostile_names_stay_in_their_folder(tmp_path):
    folder = RunFolder(tmp_path / "run" / "deep")
    written = []

    class Draw:
        def answer(self, *_):
            return np.zeros((2, 2, 3), np.uint8)

        def write(self, path, mask):
            written.append(path)

    pictures = Pictures(folder, {}, set(), Draw())
    pictures._image = pictures._truth = lambda key: None
    for name, key in (("../../x", "../../x"), ("a#../../../x", "a"), ("/etc/x#\0", "/etc/x"),
                      ("a#" + "x" * 5000, "a"), ("a#\ud800", "a")):  # fmt: skip
        pictures._write(name, key, np.zeros((2, 2), np.uint8), None)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(set(written)) == 5
    for path in (*files, *written):
        assert (folder.path / "predictions").resolve() in path.resolve().parents


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def served():
    """Serve what `served.content` holds, telling of `served.length` bytes; a URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(Handler.length))
            self.end_headers()
            self.wfile.write(Handler.content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/w.pth"
    yield Handler
    server.shutdown()
    server.server_close()


CONTENT = b"weights" * 1000
DIGEST = "b0a15fc7b9e0ea0fb4f2a2c4a5b4a4ee0a0f4d5b6f8b9a6f3a1a4d1c6f1c2b3a"


@pytest.mark.parametrize(
    ("content", "length", "digest"),
    [
        (CONTENT[:3000], len(CONTENT), None),  # the server hangs up
        (CONTENT, len(CONTENT), DIGEST),
        (CONTENT, len(CONTENT), "prefix"),  # a part of the digest is not the digest
        (CONTENT, len(CONTENT), ""),
        (CONTENT + b"x", len(CONTENT) + 1, None),
        (b"", 0, None),
    ],
    ids=["truncated", "other digest", "part of a digest", "no digest", "more", "nothing"],
)
def test_what_did_not_arrive_whole_is_never_kept(tmp_path, served, content, length, digest):
    import hashlib

    whole = hashlib.sha256(CONTENT).hexdigest()
    served.content, served.length = content, length
    path = tmp_path / "w.pth"
    path.write_bytes(b"what was there")
    digest = whole if digest is None else whole[:8] if digest == "prefix" else digest
    with pytest.raises((UserError, OSError)):
        fetch(served.url, path, digest)
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]
    assert path.read_bytes() == b"what was there"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_download_leaves_nothing(tmp_path, served, monkeypatch, error):
    from samtune.models import weights

    served.content, served.length = CONTENT, len(CONTENT)

    class Bar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            raise error

    monkeypatch.setattr(weights, "tqdm", Bar)
    with pytest.raises((KeyboardInterrupt, OSError)):
        fetch(served.url, tmp_path / "w.pth", "0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", ["-5", "x", "1e9"])
def test_a_strange_length_is_no_traceback(tmp_path, served, length):
    served.content, served.length = CONTENT, length
    with pytest.raises((UserError, OSError)):
        fetch(served.url, tmp_path / "w.pth", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_every_official_digest_is_whole():
    from samtune.models import MODEL_TYPES

    digests = [row.sha256 for row in MODEL_TYPES.values() if row.sha256]
    digests += [row.sha256 for row in RESNETS.values()]
    assert len(digests) == 6 and all(len(digest) == 64 for digest in digests)
    for row in (*MODEL_TYPES.values(), *RESNETS.values()):
        if row.sha256 and "_" not in row.file:
            assert row.sha256.startswith(Path(row.file).stem.rpartition("-")[2])


# --- secrets ------------------------------------------------------------------------------------

SECRET = "s3cr3t-0123456789abcdef"


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/a.tar",
        f"https://{SECRET}@host/a.tar",
        f"s3://key:{SECRET}@bucket/{{0..9}}.tar",
        f"https://host/a.tar?X-Amz-Signature={SECRET}&x=1",
        f"https://host/a.tar?sv=1&sig={SECRET}",
        f"https://host/a.tar?access_token={SECRET}",
        f"simplecache::https://u:{SECRET}@host/a.tar",
        f"b.tar,https://u:{SECRET}@host/a.tar",
        f"https://host/a.tar?sig=$SAMTUNE_{SECRET}",
        f"https://host/a.tar?sig=$HOME{SECRET}",
    ],
)
def test_a_secret_in_a_url_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match=r"--train_shards: .*write \$SAMTUNE_NAME") as error:
        named_shards(url, "--train_shards")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["https://host/a.tar?version=3", "s3://bucket/a.tar", "sftp://me@host/a.tar",
     "https://$SAMTUNE_USER:$SAMTUNE_PASSWORD@host/a.tar", "https://host/a.tar?sig=$SAMTUNE_SIG", "https://[::1/a.tar"],
)  # fmt: skip
def test_other_urls_are_taken(url):
    refuse_secrets(url, "--train_shards")


def test_a_variable_is_looked_up_and_never_told(tmp_path, monkeypatch):
    (tmp_path / SECRET).mkdir()
    (tmp_path / SECRET / "0.tar").write_bytes(bytes(10_240))
    url = f"file://{tmp_path}/$SAMTUNE_TEST/0.tar"
    monkeypatch.delenv("SAMTUNE_TEST", raising=False)
    with pytest.raises(UserError, match="the environment has no SAMTUNE_TEST; set it"):
        index_shards([url])
    monkeypatch.setenv("SAMTUNE_TEST", SECRET)
    (index,) = index_shards([url])
    assert index.members == []
    monkeypatch.setenv("OTHER", SECRET)  # a stranger's file must not learn of it
    with pytest.raises(UserError, match=r"\$OTHER.*there is no such file"):
        index_shards([f"file://{tmp_path}/$OTHER/0.tar"])
    for name in ("1.tar", ""):  # missing, and a folder: what fsspec says holds the path
        with pytest.raises(UserError) as error:
            index_shards([f"file://{tmp_path}/$SAMTUNE_TEST/{name}"])
        assert SECRET not in str(error.value)


def pack(tmp_path, split: str, to: Path) -> None:
    """The sample set's pictures of one split as a tar."""
    files = make_sample_set(tmp_path / "sample")
    with tarfile.open(to, "w") as tar:
        for image in sorted(files.image_dir(split).glob("*.png")):
            (mask,) = files.mask_dir(split).glob(f"{image.stem}.*")
            tar.add(image, f"{image.stem}.png")
            tar.add(mask, f"{image.stem}.mask.png")


def test_no_secret_of_the_environment_reaches_a_file_or_the_output(
    tmp_path, tiny, monkeypatch, capsys
):
    """A run on shards behind a URL with a secret in it, scored, with keys in the environment."""
    room = tmp_path / "data" / SECRET
    room.mkdir(parents=True)
    for split in ("train", "val", "test"):
        pack(tmp_path, split, room / f"{split}.tar")
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "SAMTUNE_TEST"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    place = f"file://{tmp_path}/data/$SAMTUNE_TEST"
    train(
        c.TrainConfig(
            c.ModelOptions(model_type="tiny", adapter="decoder"), c.ReadOptions(),
            c.TrainDataOptions(train_shards=f"{place}/train.tar", val_shards=f"{place}/val.tar"),
            c.TestDataOptions(test_shards=f"{place}/test.tar"), c.LoaderOptions(4, 0),
            c.PromptOptions(), c.LossOptions(), c.OptimOptions(),
            c.RunOptions(epoch=1, output_dir="run"), c.LogOptions(), DecoderOptions(),
        ),
        None, ALONE,
    )  # fmt: skip
    wanted = c.EvaluateOptions(run_dir="run", save_predictions=True)
    loader = c.LoaderOptions(4, 0)
    evaluate(c.EvaluateConfig(wanted, c.TestDataOptions(), c.ReadOptions(), loader, {}), ALONE)
    out = capsys.readouterr()
    assert "written: run/scores.json" in out.out and SECRET not in out.out + out.err
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "scores.json"} <= {path.name for path in files}
    assert "$SAMTUNE_TEST" in Path("run/config.yaml").read_text()
    for path in files:
        assert SECRET.encode() not in path.read_bytes() and SECRET not in str(path)


def test_weights_and_biases_is_told_options_only(tmp_path, monkeypatch):
    """Its config is every option by name and nothing of the environment."""
    from samtune.engine.wandb_run import WandbRun

    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    told = {}

    class Wandb:
        @staticmethod
        def Settings(**words):
            return words

        @staticmethod
        def init(**words):
            told.update(words)
            raise RuntimeError(f"no route with key {SECRET}\nmore")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    said = []
    WandbRun(tmp_path, c.LogOptions(wandb=True, wandb_mode="offline"), {"lr": 1e-4}, said.append)
    assert told["config"] == {"lr": 1e-4} and SECRET not in repr(told)
    assert len(said) == 1 and "***" in said[0] and SECRET not in said[0]
