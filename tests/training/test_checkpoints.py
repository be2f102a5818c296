"""At every moment there is a whole checkpoint, and what is restored is what was saved, bit for bit."""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hubgen.training.kit import checkpoints as checkpoints_module
from hubgen.training.kit.checkpoints import CheckpointError, Checkpoints, DiskFullError

IDENTITY = {"settings": {"learning_rate": 0.1, "betas": (0.9, 0.99)}, "data": "abc"}


class Run:
    """A module and its optimizer, trained on numbers that follow from the step."""

    def __init__(self, seed: int = 0, width: int = 4):
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)

    @property
    def parts(self) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
        return {"model": self.module}, {"adamw": self.optimizer}

    def step(self, number: int) -> None:
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        self.module(inputs).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = [state[parameter][key] for parameter in sorted(state) for key in sorted(state[parameter])]
        return [*self.module.state_dict().values(), *moments]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Run)
        return all(torch.equal(a, b) for a, b in zip(self.state(), other.state(), strict=True))


@contextmanager
def opened(folder: Path, **arguments: Any) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder, **{"identity": IDENTITY, **arguments})
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save_steps(folder: Path, count: int, **arguments: Any) -> Run:
    run = Run()
    with opened(folder, **arguments) as checkpoints:
        for number in range(1, count + 1):
            run.step(number)
            checkpoints.save(number, *run.parts, {"number": number / 3})
    return run


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def test_a_restored_run_is_the_saved_one_and_goes_on_as_it(tmp_path: Path) -> None:
    run, resumed = save_steps(tmp_path, 3), Run(seed=1)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(*resumed.parts) == (3, {"number": 1.0})
    assert run == resumed
    assert resumed.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    run.step(4)
    resumed.step(4)
    assert run == resumed


def test_nothing_to_restore_is_none(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(*Run().parts) is None


def test_only_the_newest_are_kept_and_no_temporaries(tmp_path: Path) -> None:
    save_steps(tmp_path, 5, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    with pytest.raises(CheckpointError, match="`keep`: got 1, expected at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_tensors_are_safetensors_and_the_rest_is_json(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    for path in (tmp_path / "checkpoints" / "step-00000002").iterdir():
        assert path.suffix in (".safetensors", ".json")
        if path.suffix == ".json":
            json.loads(path.read_text())


FILES = ["model.safetensors", "optimizer.adamw.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file_name", FILES)
@pytest.mark.parametrize("harm", ["truncate", "flip a bit", "delete"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file_name: str, harm: str
) -> None:
    save_steps(tmp_path, 1)
    expected = Run()
    expected.step(1)
    run = Run()
    with opened(tmp_path) as checkpoints:
        checkpoints.restore(*run.parts)
        run.step(2)
        checkpoints.save(2, *run.parts)
    path = tmp_path / "checkpoints" / "step-00000002" / file_name
    content = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    resumed = Run(seed=1)
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(*resumed.parts)
        assert restored is not None and restored[0] == 1
        assert resumed == expected
        message = capsys.readouterr().err
        assert "step-00000002 is damaged" in message and file_name in message
        resumed.step(2)
        checkpoints.save(2, *resumed.parts)
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001", "step-00000002"]


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    for _ in range(2):  # also when the command is given again
        with opened(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            checkpoints.restore(*Run().parts)


class PowerLoss(BaseException):
    """Ends a save where it stands, as SIGKILL does: nothing is cleaned up."""


def test_a_save_cut_at_any_write_fsync_or_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = [
        *((os, name) for name in ("fsync", "replace", "unlink", "rmdir")),
        *((checkpoints_module, name) for name in ("save_file", "_write_json")),
    ]
    outcomes = []
    for cut_after in itertools.count():
        folder = tmp_path / str(cut_after)
        run = save_steps(folder, 2)  # so that the next save rotates too
        run.step(3)
        calls = itertools.count()

        def cut(original: Any, calls: Iterator[int] = calls, cut_after: int = cut_after) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if next(calls) >= cut_after:
                    raise PowerLoss
                return original(*arguments, **keywords)

            return call

        finished = False
        with opened(folder) as checkpoints, monkeypatch.context() as patch:
            for owner, name in functions:
                patch.setattr(owner, name, cut(getattr(owner, name)))
            with suppress(PowerLoss):
                checkpoints.save(3, *run.parts)
                finished = True
        resumed = Run(seed=1)
        with opened(folder) as checkpoints:
            restored = checkpoints.restore(*resumed.parts)
            assert restored is not None
            outcomes.append(restored[0])
            if restored[0] == 2:
                resumed.step(3)
                checkpoints.save(3, *resumed.parts)
        assert resumed == run
        assert not [name for name in names(folder) if name.startswith(".")]
        if finished:
            break
    assert outcomes == sorted(outcomes) and outcomes.count(2) > 5 and outcomes.count(3) > 2


def test_a_full_disk_keeps_the_checkpoints_and_removes_the_temporary(tmp_path: Path) -> None:
    run = save_steps(tmp_path, 2)
    before = names(tmp_path)
    run.step(3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        try:
            with pytest.raises(DiskFullError, match="disk full: .*step-00000003 needs .* step 2 is kept"):
                checkpoints.save(3, *run.parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == before
        resumed = Run(seed=1)
        restored = checkpoints.restore(*resumed.parts)
        assert restored is not None and restored[0] == 2


def test_a_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file")


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom hubgen.training.kit.checkpoints import Checkpoints, CheckpointError\n"
        "try:\n    Checkpoints(sys.argv[1])\nexcept CheckpointError as error:\n    sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with opened(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "another process is training into this folder" in second.stderr
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    other = {"settings": {"learning_rate": 0.2, "betas": (0.9, 0.99)}, "data": "abc", "size": 64}
    with opened(tmp_path, identity=other) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(*Run().parts)
    assert "settings.learning_rate: 0.1 in the checkpoint, 0.2 now; size: None in the checkpoint, 64 now" in str(
        error.value
    )


def test_missing_left_over_and_misshapen_tensors_are_errors(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    run = Run()
    with opened(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"2 tensors missing \['2.bias', '2.weight'\]"):
            checkpoints.restore({"model": nn.Sequential(*run.module, nn.Linear(4, 4))}, {"adamw": run.optimizer})
        with pytest.raises(CheckpointError, match="left over"):
            checkpoints.restore({"model": run.module[:1]}, {"adamw": run.optimizer})
        with pytest.raises(CheckpointError, match=r"is \(4,\) torch.float32, expected \(5,\)"):
            checkpoints.restore(*Run(width=5).parts)
        with pytest.raises(CheckpointError, match="expected .*ema.safetensors"):
            checkpoints.restore({"model": run.module, "ema": run.module}, {"adamw": run.optimizer})
        with pytest.raises(CheckpointError, match="groups of"):
            optimizer = torch.optim.AdamW(run.module[0].parameters())
            checkpoints.restore({"model": run.module}, {"adamw": optimizer})


def test_foreign_folders_are_ignored(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "step-best").mkdir()
    (folder / "checkpoint-9").mkdir()
    (folder / "step-00000007").symlink_to(folder / "step-00000001")
    shutil.copytree(folder / "step-00000001", folder / ".tmp-step-00000009")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        restored = checkpoints.restore(*Run().parts)
    assert restored is not None and restored[0] == 1
    assert names(tmp_path) == ["checkpoint-9", "step-00000001", "step-00000007", "step-best"]


def test_saving_draws_no_random_number(tmp_path: Path) -> None:
    run = Run()
    before = torch.get_rng_state()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, *run.parts)
        checkpoints.restore(*run.parts)
    assert torch.equal(before, torch.get_rng_state())
