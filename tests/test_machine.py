"""What a process may take of the machine, read from files as Linux and containers write them."""

import os
import time

import torch

from samtune import machine
from samtune.engine.distributed import Process
from samtune.machine import Stopwatch, free_memory, free_ram, matmul_peak, ram_of

GIB = 2**30
CPU = torch.device("cpu")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def machine_with(tmp_path, groups: str):
    """/proc of a machine with 8 GiB free, and the empty folder where groups are mounted."""
    write(tmp_path / "proc", meminfo=f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB")
    write(tmp_path / "proc/self", cgroup=groups)
    return tmp_path / "proc", tmp_path / "cgroup"


def test_without_a_limit_it_is_what_the_machine_has(tmp_path):
    proc, mount = machine_with(tmp_path, "0::/user.slice")
    write(mount / "user.slice", memory__max="max", memory__current=1, memory__stat="anon 1")
    assert free_ram(proc, mount) == 8 * GIB


def test_a_container_of_version_2_counts_with_those_around_it(tmp_path):
    proc, mount = machine_with(tmp_path, "0::/pod/job")
    stat = f"anon 5\ninactive_file {GIB}"
    write(mount / "pod/job", memory__max="max", memory__current=GIB, memory__stat=stat)
    write(mount / "pod", memory__max=4 * GIB, memory__current=2 * GIB, memory__stat=stat)
    assert free_ram(proc, mount) == 3 * GIB, "cached files can be dropped"


def test_a_container_of_version_1_whose_path_is_the_hosts(tmp_path):
    proc, mount = machine_with(tmp_path, "4:cpu,memory:/docker/abc\n1:name=systemd:/x")
    write(
        mount / "memory", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=2 * GIB,
        memory__stat="total_inactive_file 0",
    )  # fmt: skip
    assert free_ram(proc, mount) == GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    proc, mount = machine_with(tmp_path, "0::/")
    write(mount, memory__max=GIB, memory__current=2 * GIB, memory__stat="inactive_file 0")
    assert free_ram(proc, mount) == 0


def test_processes_share_the_memory_of_a_machine(monkeypatch):
    monkeypatch.setattr(machine, "free_ram", lambda: 8 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(Process(1, 4, 1, CPU)) == 2 * GIB


def test_this_machine():
    assert 0 < free_ram() < 2**50
    assert 10 * 2**20 < ram_of(os.getpid()) < 2**40 and ram_of(2**31 - 1) == 0
    assert matmul_peak(CPU, "fp32") > 1e8


def test_laps():
    watch = Stopwatch(CPU)
    assert watch.laps() == []
    for _ in range(3):
        watch.mark()
        time.sleep(0.001)
    assert len(watch.laps()) == 2 and all(lap >= 0.001 for lap in watch.laps())
