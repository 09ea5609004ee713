"""`requirements-test.lock`: every requirement at one version that its range allows, with hashes."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements-test.lock"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def asked() -> list[Requirement]:
    """What the files of ranges name."""
    lines = [
        line.split("#")[0].strip()
        for name in ("requirements.txt", "requirements-test.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    return [Requirement(line) for line in lines if line]


def locked() -> list[tuple[Requirement, list[str]]]:
    """(one version of a package, the hashes of its files)."""
    text = re.sub(r"\\\n", " ", LOCK.read_text())
    found = []
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        named, *hashes = line.split(" --hash=")
        found.append((Requirement(named.strip()), [one.strip() for one in hashes]))
    return found


def environment(python: str, system: str = "linux", machine: str = "x86_64") -> dict[str, str]:
    names = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
    return default_environment() | {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": system,
        "platform_machine": machine, "platform_system": names[system],
    }  # fmt: skip


def applies(requirement: Requirement, place: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(place)


def test_every_package_has_one_version_and_whole_hashes():
    assert len(locked()) > 50
    for requirement, hashes in locked():
        (version,) = requirement.specifier
        assert version.operator == "==" and "*" not in version.version, requirement
        assert hashes, f"{requirement}: without a hash"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), requirement


@pytest.mark.parametrize(
    ("system", "machine"),
    [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")],
)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_fits_the_ranges(python, system, machine):
    """For each Python and system each requirement has exactly one version, within its range."""
    place = environment(python, system, machine)
    versions = {}
    for requirement, _ in locked():
        if applies(requirement, place):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} has two versions on Python {python}"
            (version,) = requirement.specifier
            versions[name] = version.version
    for requirement in asked():
        if applies(requirement, place):
            version = versions.get(canonicalize_name(requirement.name))
            assert version, f"{requirement.name} is not locked; make the lock anew, see its head"
            assert requirement.specifier.contains(version), f"{requirement}, locked at {version}"


def test_the_lock_names_no_host():
    """Whoever installs from it chooses the index."""
    assert "://" not in LOCK.read_text() and "--index" not in LOCK.read_text()
