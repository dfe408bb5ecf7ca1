"""Exact: what a control group leaves, from folders made as the system has them."""

import pytest
import torch

from onecard.memory.measure import begin_peak, group_limits, peak_memory_bytes


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
