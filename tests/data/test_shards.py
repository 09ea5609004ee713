"""Tar shards: which ones a flag names, which members pair, and that bytes are those of a place."""

import gzip
import io
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samtune.config import NameOptions, PromptOptions, ReadOptions, ShardsOptions
from samtune.data import tar_files
from samtune.data.datasets import SampleKey, SegmentationDataset
from samtune.data.decoding import decode
from samtune.data.files import find_pairs
from samtune.data.loading import make_loader
from samtune.data.shards import index_shards, named_shards, shard_pairs
from samtune.data.tar_files import read_bytes
from samtune.errors import UserError
from samtune.sharding import run as pack

FLAG = "--train_shards"


def make_tar(path: Path, members: dict[str, bytes] | list[str]) -> Path:
    """A tar with these files; where only names are given, the content is the name."""
    if not isinstance(members, dict):
        members = {name: name.encode() for name in members}
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(seed: int, mask: bool = False) -> bytes:
    """A small picture of noise, or a mask with one square."""
    out = io.BytesIO()
    if mask:
        pixels = np.zeros((24, 32), np.uint8)
        pixels[4 : 12 + seed % 8, 5:20] = 255
    else:
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def folders(root: Path, count: int = 5) -> Path:
    """image/N.png and mask/N.png below a folder."""
    for kind in ("image", "mask"):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            (root / kind / f"{i}.png").write_bytes(png(i, kind == "mask"))
    return root


def pairs_of(*places, **read):
    return shard_pairs(index_shards([str(p) for p in places]), ReadOptions(**read), FLAG)


def names_of(pairs):
    return [(pair.id, pair.image_path.name, pair.mask_path.name) for pair in pairs]


# --- which shards -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("a.tar", ["a.tar"]),
        ("a.tar, b.tar", ["a.tar", "b.tar"]),
        ("t-{08..11}.tar", ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]),
        ("{a,b}-{0..1}.tar,c.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar", "c.tar"]),
        ("s3://bucket/{0..1}.tar", ["s3://bucket/0.tar", "s3://bucket/1.tar"]),
        ("https://host/a.tar?sig=$SAMTUNE_S", ["https://host/a.tar?sig=$SAMTUNE_S"]),
    ],
)
def test_commas_and_braces(text, places):
    assert named_shards(text, FLAG) == places


def test_wildcards_are_in_natural_order(tmp_path):
    for name in ("t-10.tar", "t-2.tar", "v-1.tar", "odd[1].tar"):
        (tmp_path / name).touch()
    found = named_shards(f"{tmp_path}/t-*.tar", FLAG)
    assert [Path(place).name for place in found] == ["t-2.tar", "t-10.tar"]
    assert named_shards(f"{tmp_path}/odd[1].tar", FLAG) == [f"{tmp_path}/odd[1].tar"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no shard"),
        ("a.tar,", "names no shard"),
        ("t-{0..9.tar", "names no shard"),
        ("t-{x}.tar", "neither FIRST..LAST nor a list"),
        ("t-{9..0}.tar", "from the smaller number up"),
        ("t-{0..9999999}.tar", "from the smaller number up"),
        ("nowhere/*.tar", "there is no such file"),
        ("s3://bucket/*.tar", "a URL takes no wildcard"),
        ("a.tar,a.tar", "names a.tar twice"),
    ],
)
def test_text_that_names_no_shards(text, said):
    with pytest.raises(UserError, match=f"^{FLAG}.*{said}"):
        named_shards(text, FLAG)


# --- which members pair -------------------------------------------------------------------------


def test_members_pair_by_key_over_all_shards(tmp_path):
    one = make_tar(tmp_path / "0.tar", ["a/10.jpg", "a/10.seg.png", "a/2.JPG"])
    two = make_tar(tmp_path / "1.tar", ["./b.v/7.image.png", "./b.v/7.LABEL.tif", "a/2.mask.png"])
    assert names_of(pairs_of(one, two)) == [
        ("a/2", "0.tar[a/2.JPG]", "1.tar[a/2.mask.png]"),
        ("a/10", "0.tar[a/10.jpg]", "0.tar[a/10.seg.png]"),
        ("b.v/7", "1.tar[b.v/7.image.png]", "1.tar[b.v/7.LABEL.tif]"),
    ]
    assert pairs_of(two, one) == pairs_of(one, two), "the order of shards decides nothing"


def test_what_is_neither_is_counted_and_said(tmp_path, caplog):
    names = ["x.jpg", "x.mask.png", "x.cls", "x.json", "y.json", "x.depth.png", "x.pyd", "._x.jpg"]
    path = make_tar(tmp_path / "0.tar", [*names, "README", ".DS_Store"])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind!r}.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        tar.add(tmp_path, "folder.jpg", recursive=False)
    with caplog.at_level(logging.INFO, "samtune"):
        assert [pair.id for pair in pairs_of(path)] == ["x"]
    assert f"{FLAG}: 8 members that are neither" in caplog.text
    for said in (".json (2)", "links and special files (2)", ".depth.png (1)", ".pyd (1)"):
        assert said in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jpg", "b.jpg", "b.mask.png"], r"without a mask: 0\.tar\[a\.jpg\]$"),
        (["a.mask.png", "b.jpg", "b.mask.png"], r"without an image: 0\.tar\[a\.mask\.png\]$"),
        (["a.jpg", "a.png"], r"0\.tar\[a\.jpg\], 0\.tar\[a\.png\] have the same key 'a'"),
        (["a.jpg", "a.mask.png", "a.seg.png"], "have the same key 'a'"),
        (["a.jpg", "a_mask.png"], r"without a mask: .*a\.jpg.*a_mask\.png.*--mask_suffix"),
        (["a.txt"], r"no image and no mask in 1 shard\(s\)"),
        ([], "no image and no mask"),
    ],
)
def test_the_checks_of_folders_name_shard_and_member(tmp_path, names, said):
    with pytest.raises(UserError, match=f"^{FLAG}.*{said}"):
        pairs_of(make_tar(tmp_path / "0.tar", names))


def test_one_key_in_two_shards_is_refused(tmp_path):
    shards = [make_tar(tmp_path / f"{i}.tar", ["a.jpg", "a.mask.png"]) for i in range(2)]
    with pytest.raises(UserError, match=r"0\.tar\[a\.jpg\], 1\.tar\[a\.jpg\] have the same key"):
        pairs_of(*shards)


def test_affixes_tell_masks_apart_as_in_one_folder(tmp_path):
    path = make_tar(tmp_path / "0.tar", ["images/a.b.jpg", "masks/a.b.png", "notes.png"])
    found = pairs_of(path, image_prefix="images/", mask_prefix="masks/")
    assert names_of(found) == [("a.b", "0.tar[images/a.b.jpg]", "0.tar[masks/a.b.png]")]
    path = make_tar(tmp_path / "1.tar", ["a.jpg", "a.truth.png"])
    assert [pair.id for pair in pairs_of(path, mask_suffix=".truth")] == ["a"]
    with pytest.raises(UserError, match="need --mask_prefix or --mask_suffix"):
        pairs_of(path, image_suffix="_rgb")


# --- tars that cannot be used -------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "compressed":
        path.write_bytes(gzip.compress(whole))
    elif how == "truncated in a member":
        path.write_bytes(whole[: 512 + 5])
    elif how == "truncated in a header":
        path.write_bytes(whole[: 1024 + 5])
    elif how == "truncated between members":
        path.write_bytes(whole[:1024])
    elif how == "joined":
        path.write_bytes(whole + whole)
    elif how == "damaged":
        path.write_bytes(whole[:1024] + b"\1" * 512 + whole[1536:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 30)
    elif how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("compressed", "is compressed.*plain .tar"),
        ("truncated in a member", "ends within the member a.jpg|unexpected end of data"),
        ("truncated in a header", "truncated|unexpected end"),
        ("truncated between members", "has no end mark"),
        ("joined", "several tars joined"),
        ("damaged", "is damaged after byte 1024"),
        ("empty", "is no tar"),
        ("text", "is no tar"),
        ("missing", "there is no such file"),
        ("folder", "is a folder"),
    ],
)
def test_a_shard_that_cannot_be_used_is_named(tmp_path, how, said):
    path = make_tar(tmp_path / "0.tar", ["a.jpg", "a.mask.png"])
    spoil(path, how)
    with pytest.raises(UserError, match=rf"0\.tar: .*({said})"):
        pairs_of(path)


def test_all_bad_shards_are_said_at_once(tmp_path):
    good = make_tar(tmp_path / "0.tar", ["a.jpg", "a.mask.png"])
    with pytest.raises(UserError, match=r"1\.tar: there is no(.|\n)*2\.tar: there is no"):
        pairs_of(tmp_path / "1.tar", good, tmp_path / "2.tar")


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg"])
def test_names_that_lead_out_of_the_tar_are_refused(tmp_path, name):
    """An id also names files that scoring writes."""
    with pytest.raises(UserError, match="leads out of the tar"):
        pairs_of(make_tar(tmp_path / "0.tar", [name]))


# --- bytes --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_member(tmp_path):
    long = "d" * 90 + "/" + "n" * 150 + ".jpg"  # more than a plain header holds
    contents = {"a.jpg": b"image", "a.mask.png": b"", "ü.jpg": b"x" * 2000, long: b"long"}
    index = index_shards([str(make_tar(tmp_path / "0.tar", contents))])[0]
    assert {member.member: read_bytes(member) for member in index.members} == contents
    assert index.passed_over == Counter()


def test_a_shard_that_changes_under_a_run_is_refused(tmp_path):
    path = make_tar(tmp_path / "0.tar", {"a.jpg": b"old", "a.mask.png": b"mask"})
    (pair,) = pairs_of(path)
    assert read_bytes(pair.image_path) == b"old"
    make_tar(path, {"b.txt": b"other", "a.jpg": b"new", "a.mask.png": b"mask"})
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"0\.tar: has changed since it was indexed"):
        read_bytes(pair.image_path)
    assert read_bytes(pairs_of(path)[0].image_path) == b"new"
    path.unlink()
    tar_files._local.cache_clear()
    with pytest.raises(UserError, match=r"0\.tar\[a\.jpg\]: No such file"):
        read_bytes(pair.image_path)


def test_few_shards_stay_open_however_many_are_read(tmp_path):
    names = [[f"{i}.jpg", f"{i}.mask.png"] for i in range(70)]
    paths = [make_tar(tmp_path / f"{i}.tar", members) for i, members in enumerate(names)]
    pairs = pairs_of(*paths)
    tar_files._local.cache_clear()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda pair: read_bytes(pair.image_path), pairs * 3))
    assert read == [f"{i}.jpg".encode() for i in range(70)] * 3
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 64


def test_a_damaged_picture_is_named_with_its_shard(tmp_path):
    content = {"a.png": png(0)[:-200], "a.mask.png": png(0, True)}
    (pair,) = pairs_of(make_tar(tmp_path / "0.tar", content))
    with pytest.raises(UserError, match=r"0\.tar\[a\.png\]: truncated or damaged"):
        decode(pair.image_path)


def test_loader_processes_read_what_folders_give(tmp_path):
    root = folders(tmp_path / "files")
    pack(ShardsOptions(f"{root}/image", f"{root}/mask", output_dir=str(tmp_path),
                       pairs_per_shard=2), NameOptions())  # fmt: skip
    shards = pairs_of(*sorted(tmp_path.glob("*.tar")))
    plain = find_pairs(root / "image", root / "mask", ReadOptions(), ("a", "b"))
    assert [pair.id for pair in shards] == [pair.id for pair in plain]
    read_bytes(shards[0].image_path)  # a shard is open here when the others are started
    assert pickle.loads(pickle.dumps(shards)) == shards, "as a fork server gets them"
    keys = [[SampleKey(0, i), SampleKey(0, (i + 2) % 5)] for i in (4, 0, 3)]
    loaded = [
        list(make_loader(
            SegmentationDataset(pairs, ReadOptions(), 32, PromptOptions(), "original"),
            keys, workers, start_method="fork",
        ))
        for pairs, workers in ((plain, 0), (shards, 2))
    ]  # fmt: skip
    for one, other in zip(*loaded, strict=True):
        assert one.ids == other.ids
        assert (one.image == other.image).all() and (one.target == other.target).all()


# --- URLs ---------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(tmp_path):
    """A shard behind memory://, and the same as a local file."""
    fsspec = pytest.importorskip("fsspec")
    path = make_tar(tmp_path / "0.tar", {"a.png": png(1), "a.mask.png": png(1, True)})
    with fsspec.open("memory://bucket/0.tar", "wb") as file:
        file.write(path.read_bytes())
    yield "memory://bucket/0.tar", path
    fsspec.filesystem("memory").store.clear()


def test_shards_behind_urls_read_as_local_ones(in_memory):
    url, path = in_memory
    for place in (url, f"file://{path}"):
        (near,), (far,) = pairs_of(path), pairs_of(*named_shards(place, FLAG))
        assert far.id == near.id and str(far.image_path) == f"{place}[a.png]"
        assert read_bytes(far.mask_path) == read_bytes(near.mask_path)
        assert (decode(far.image_path).array == decode(near.image_path).array).all()


@pytest.mark.parametrize("how", ["truncated in a member", "truncated between members", "empty"])
def test_a_bad_shard_behind_a_url_is_named(in_memory, how):
    import fsspec

    url, path = in_memory
    spoil(path, how)
    with fsspec.open(url, "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(UserError, match=r"^memory://bucket/0\.tar: "):
        pairs_of(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://bucket/1.tar", "there is no such file"),
        ("nonsense://bucket/1.tar", "cannot be read .*nonsense"),
        ("pipe:curl http://host/1.tar", "cannot be read"),
    ],
)
def test_urls_that_cannot_be_read(url, said):
    pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=f"^{url}: {said}"):
        pairs_of(url)


@pytest.mark.parametrize(
    ("module", "url"), [("fsspec", "memory://x.tar"), ("s3fs", "s3://b/x.tar")]
)
def test_a_missing_package_is_said_with_its_pip_line(monkeypatch, module, url):
    if module != "fsspec":
        pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"needs {module}: pip install {module}$"):
        pairs_of(url)


def test_local_shards_import_no_fsspec(tmp_path):
    path = make_tar(tmp_path / "0.tar", {"a.png": png(1), "a.mask.png": png(1, True)})
    script = (
        "import sys; from samtune.data.shards import *; from samtune.data.tar_files import *; "
        f"print(len(read_bytes(index_shards([{str(path)!r}])[0].members[0])));"
        "assert 'fsspec' not in sys.modules and 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(tar_files.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == str(len(png(1))), done.stderr.decode()


# --- the verb that packs ------------------------------------------------------------------------


def test_packing_is_repeatable_and_keeps_every_byte(tmp_path):
    root = folders(tmp_path / "files", 5)
    options = ShardsOptions(f"{root}/image", f"{root}/mask", pairs_per_shard=2)
    written = []
    for name in ("one", "two"):
        into = ShardsOptions(**(vars(options) | {"output_dir": str(tmp_path / name)}))
        written.append(pack(into, NameOptions()))
    assert [path.name for path in written[0]] == [f"train-00000{i}.tar" for i in range(3)]
    assert [p.read_bytes() for p in written[0]] == [p.read_bytes() for p in written[1]]
    with tarfile.open(written[0][2]) as tar:
        assert tar.getnames() == ["4.png", "4.mask.png"]
    for pair in pairs_of(*written[0]):
        assert read_bytes(pair.image_path) == (root / "image" / f"{pair.id}.png").read_bytes()
        assert read_bytes(pair.mask_path) == (root / "mask" / f"{pair.id}.png").read_bytes()
    with pytest.raises(UserError, match="already holds train-00000"):
        pack(into, NameOptions())


def test_packing_knows_affixes_dots_and_lists(tmp_path, capsys):
    for name in ("v1.5_rgb.png", "v1.5_mask.png"):
        (tmp_path / name).write_bytes(png(1))
    names = NameOptions(image_suffix="_rgb", mask_suffix="_mask")
    (path,) = pack(ShardsOptions(str(tmp_path), str(tmp_path), output_dir=f"{tmp_path}/a"), names)
    assert [pair.id for pair in pairs_of(path)] == ["v1_5"]
    assert "1 names hold a dot" in capsys.readouterr().out
    (tmp_path / "list.csv").write_text("v1.5_rgb.png,v1.5_mask.png\n")
    listed = ShardsOptions(list=f"{tmp_path}/list.csv", output_dir=f"{tmp_path}/b", name="val")
    (path,) = pack(listed, NameOptions())
    assert path.name == "val-000000.tar" and [p.id for p in pairs_of(path)] == ["v1_5_rgb"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output_dir": ""}, "--output_dir is not set"),
        ({"image_dir": "nowhere"}, "--image_dir nowhere: there is no such folder"),
        ({"mask_dir": "x.json"}, "--mask_dir x.json: a shard holds a mask for each image"),
        ({"pairs_per_shard": 0}, "--pairs_per_shard 0: must be at least 1"),
    ],
)
def test_what_cannot_be_packed(tmp_path, options, said):
    root = folders(tmp_path / "files", 1)
    given = {
        "image_dir": f"{root}/image",
        "mask_dir": f"{root}/mask",
        "output_dir": f"{tmp_path}/o",
    }
    with pytest.raises(UserError, match=said):
        pack(ShardsOptions(**(given | options)), NameOptions())
    assert not (tmp_path / "o").exists()


def test_names_that_would_become_one_are_refused(tmp_path):
    for kind in ("image", "mask"):
        (tmp_path / kind).mkdir()
        for name in ("a.b.png", "a_b.png"):
            (tmp_path / kind / name).write_bytes(png(1))
    options = ShardsOptions(f"{tmp_path}/image", f"{tmp_path}/mask", output_dir=f"{tmp_path}/o")
    with pytest.raises(UserError, match="a_b would name 2 pairs"):
        pack(options, NameOptions())
