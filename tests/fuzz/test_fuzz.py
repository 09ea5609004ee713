"""Changed real files: every input is understood or refused in words; nothing else is raised."""

import signal
import subprocess
import sys
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samtune.data import limits

HERE = Path(__file__).resolve().parent
CASES = 100  # of each target
GUIDED_CASES = 150
PATIENCE = 300  # seconds, in which a case of milliseconds is called a hang
PIECES = (
    b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0", b"\xff", b"\0", b"9" * 20,
    b"[", b"{", b'"', b",", b":", b"null", b"-1", b"1e999", b"NaN", b"\\ud800", b"\\u0000", b"../",
    b"/", b"\n", b"!!python/object/apply:os.system [x]", b"&a [*a]", b"0.5", b"true",
)  # fmt: skip


@st.composite
def changed(draw, seeds: list[bytes]) -> bytes:
    """A real file with some of its bytes changed, cut out, put twice, or what no file holds."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.integers(0, 5))
        if how == 0:
            data[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif how == 1:
            piece = draw(st.sampled_from(PIECES))
            data[place : place + len(piece)] = piece
        elif how == 2:
            data[place:place] = draw(st.sampled_from(PIECES))
        elif how == 3:
            del data[place : place + draw(st.integers(1, 64))]
        elif how == 4:
            data[place:place] = data[place : place + draw(st.integers(1, 64))]
        else:
            del data[place:]
    return bytes(data)


@pytest.fixture
def watched(monkeypatch):
    """A case that hangs fails; pictures at the real bound would only be slow."""

    def hung(*_):
        raise TimeoutError(f"a case took longer than {PATIENCE} s")

    monkeypatch.setattr(limits, "MOST_PIXELS", 2**20)
    before = signal.signal(signal.SIGALRM, hung)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")  # of damaged files
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name, watched):
    target = TARGETS[name]

    @settings(
        max_examples=CASES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(changed(target.seeds()))
    def each(data):
        signal.alarm(PATIENCE)
        target(data)

    each()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_understood(name, watched):
    """At least one of a target's seeds passes whole, so that changes start from what is read."""
    refused = 0
    for seed in TARGETS[name].seeds():
        try:
            TARGETS[name].run(seed)
        except fuzz_targets.UserError:
            refused += 1
    assert refused < len(TARGETS[name].seeds())


def test_a_defect_is_told_from_a_refusal():
    def broken(data):
        raise KeyError("x") if data else fuzz_targets.UserError("refused")

    target = fuzz_targets.Target(broken, list)
    target(b"")
    with pytest.raises(KeyError):
        target(b"1")


def test_guided_by_coverage(tmp_path, pytestconfig):
    """libFuzzer over the same targets; `--fuzz MINUTES` lets it run that long."""
    pytest.importorskip("atheris", reason="there is no Atheris for this system")
    minutes = pytestconfig.getoption("--fuzz")
    amount = ["--minutes", str(minutes)] if minutes else ["--cases", str(GUIDED_CASES)]
    command = [
        sys.executable,
        str(HERE / "fuzz_longer.py"),
        *amount,
        "--found",
        str(tmp_path / "found"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("target ")]
    assert [row[1] for row in rows] == list(TARGETS)
    for row in rows:
        assert int(row[3]) >= (1 if minutes else GUIDED_CASES), row
        assert int(row[5]) > 10, f"{row}: nothing was instrumented"
    assert list((tmp_path / "found").iterdir()) == []
