"""Errors of a user's input and of a full machine are told from faults, and said in one line."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hubgen.errors import is_expected, one_line
from hubgen.formats.atomic import written


def test_errors_of_libraries_over_files_are_expected_and_faults_are_not(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(SafetensorError) as caught, safe_open(tmp_path / "cut.safetensors", framework="pt"):
        pass
    assert is_expected(caught.value)
    assert is_expected(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_expected(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    for fault in (RuntimeError("shapes differ"), KeyError("x"), TypeError("x"), AttributeError("x")):
        assert not is_expected(fault)


def test_messages_are_one_line_and_name_the_file() -> None:
    assert one_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png")) == (
        "a.png: No such file or directory"
    )
    assert one_line(ValueError("first\n  second")) == "first second"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(OSError(errno.ENOSPC, "No space left on device", "x")).startswith("disk full while writing x (")
    assert "; use less (" in one_line(torch.OutOfMemoryError("much"), "use less")


def test_a_full_disk_is_an_error_of_the_system_with_the_files_name_also_from_safetensors(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No space left") as caught, written(target):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert os.listdir(tmp_path) == []
    with pytest.raises(SafetensorError), written(target) as temporary:
        save_file({}, temporary)
        raise SafetensorError("another reason")
