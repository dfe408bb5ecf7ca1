"""Exact: what a control group leaves, from folders made as the system has them."""

import resource
import sys

import pytest
import torch

from onecard.memory.measure import available_bytes, begin_peak, group_limits, peak_memory_bytes
from tests.forks import Forked


def group(folder, limit, used, cached):
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def test_every_group_above_the_process_counts_and_its_cached_files_are_free(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/old\n0::/slice/job\n")
    group(tmp_path / "slice", 1000, 700, 600)
    group(tmp_path / "slice" / "job", "max", 300, 0)
    assert list(group_limits(tmp_path, own)) == [900]
    group(tmp_path / "slice" / "job", 500, 300, 100)
    group(tmp_path, 2000, 100, 0)
    assert list(group_limits(tmp_path, own)) == [300, 900, 1900]
    assert list(group_limits(tmp_path / "slice", tmp_path / "nothing")) == [900]


def group_v1(folder, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {cached}\n")


def test_groups_of_version_1_count_alone_and_beside_version_2(tmp_path):
    """Hierarchical; a controller that is mounted with others; both versions; a path from outside a container."""
    own, none = tmp_path / "cgroup", 9223372036854771712  # what the kernel says where there is no limit
    root = tmp_path / "fs"
    own.write_text("5:cpu,cpuacct:/job\n4:hugetlb,memory:/slice/job\n1:name=systemd:/x\n")
    group_v1(root / "memory" / "slice" / "job", none, 300, 0)
    group_v1(root / "memory" / "slice", 1000, 700, 600)
    group_v1(root / "memory", 5000, 1000, 0)
    assert sorted(group_limits(root, own)) == [900, 4000, none - 300]
    (root / "unified" / "slice").mkdir(parents=True)
    group(root / "unified" / "slice", 800, 100, 50)
    own.write_text("4:memory:/docker/abc\n0::/slice\n")
    assert sorted(group_limits(root, own)) == [750, 4000]


def limited(name):
    """Prints the free bytes before and under a limit, and with a GiB less."""
    limit, cpu = getattr(resource, name), torch.device("cpu")
    before = available_bytes(cpu)
    resource.setrlimit(limit, (1 << 36, resource.RLIM_INFINITY))  # 64 GiB
    resource.setrlimit(limit, (6 << 30, resource.RLIM_INFINITY))
    first = available_bytes(cpu)
    held = torch.ones(1 << 28)
    print(before, first, available_bytes(cpu), flush=True)
    del held


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts(limit):
    if sys.platform != "linux":
        pytest.skip("read from /proc")
    code, out, err = Forked(limited, limit).wait()
    assert code == 0, err
    before, first, second = map(int, out.split())
    assert 0 < second < first < min(before, 6 << 30)
    assert 0.9 * 2**30 < first - second < 1.5 * 2**30 or first > before - 2**30


def test_the_peak_counts_from_where_it_begins():
    cpu = torch.device("cpu")
    torch.ones(1 << 26)  # 256 MiB
    before = peak_memory_bytes(cpu)
    held = begin_peak(cpu)
    if peak_memory_bytes(cpu) == before:
        pytest.skip("this system does not reset it")
    assert held - (1 << 20) < peak_memory_bytes(cpu) < before  # the two are counted a page or two apart
    torch.ones(1 << 27)  # 512 MiB, of which malloc may have kept half
    assert peak_memory_bytes(cpu) - held > 200 << 20
