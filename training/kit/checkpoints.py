"""Checkpoints that a run can be killed beside: written under a temporary name, verified, renamed into place.

    output_dir/checkpoints/step-00001000/
        backbone.safetensors             one file per module: what of it is trained
        ema.backbone.safetensors         its average
        optimizer.backbone.adamw.safetensors   one file per optimizer
        state.json                       step, identity of the run, optimizer groups, whatever the script adds
        manifest.json                    size and sha256 of each of the above; written last

A save writes all files and then the manifest in a folder `.tmp-*`, fsyncs them, renames the folder, fsyncs its parent,
and only then removes old checkpoints. A folder named `step-N` is therefore complete at every moment; bits that rot
later fail the hash, and the checkpoint before is taken. Tensors are safetensors and the rest is JSON; nothing is ever
unpickled. Tensors that are sharded over processes are gathered, so that a file is the same on any number of them.
"""

import fcntl
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hubgen.errors import FULL
from hubgen.formats.atomic import sweep, written
from hubgen.formats.digests import file_digest

FORMAT = 2
"""Version of the layout above, part of every manifest."""

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Stateful(Protocol):
    """A module, or what has a module's two methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Takes over what `state_dict` gave."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or does not belong to this run; the message names the folder and the remedy."""


class DiskFullError(CheckpointError):
    """There is no room for the checkpoint; the ones before are untouched."""


class Checkpoints:
    """The checkpoints of one run in one output folder.

    Args:
        output_dir: Folder of the run; made if missing. Another process that uses it at the same time is refused.
        keep: Checkpoints that stay; at least 2, so that a damaged one has one before it.
        identity: JSON values that make the run what it is (settings that change the weights, fingerprint of the data).
            Resuming with others is refused.
        writer: Whether this process writes; with several processes, only the main one does. The others take part where
            tensors have to be gathered, and restore.

    Raises:
        CheckpointError: The folder is in use by another process, or `keep` is below 2.
        OSError: The folder cannot be made or written to.
    """

    def __init__(
        self, output_dir: str | Path, keep: int = 2, identity: Mapping[str, Any] | None = None, writer: bool = True
    ):
        if keep < 2:
            raise CheckpointError(
                f"`keep`: got {keep}, expected at least 2 (a damaged checkpoint needs one before it)."
            )
        self.folder = Path(output_dir) / "checkpoints"
        self.keep, self.writer = keep, writer
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity or {})))
        self._lock: IO[bytes] | None = None
        if writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire_lock(Path(output_dir) / ".lock")
            sweep(self.folder)
            probe = self.folder / ".tmp-probe"
            probe.write_bytes(b"a folder that cannot be written to fails here and not at the first save")
            probe.unlink()

    # Saving

    def save(
        self,
        step: int,
        modules: Mapping[str, Stateful],
        optimizers: Mapping[str, Optimizer] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` (steps done) and remove those beyond `keep`; called by all processes.

        Args:
            step: Number of optimizer steps that the state has seen.
            modules: Name to module; what its `state_dict` holds is stored.
            optimizers: Name to optimizer.
            extra: Other JSON values that `restore` shall return.

        Returns:
            The checkpoint's folder.

        Raises:
            DiskFullError: No room; the checkpoints before are as they were and the temporary folder is gone.
        """
        target = self.folder / f"step-{step:08d}"
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        state: dict[str, Any] = {"step": step, "identity": self.identity, "extra": dict(extra or {}), "optimizers": {}}
        for name, module in modules.items():
            content: dict[str, torch.Tensor] = {}
            tensors[f"{name}.safetensors"] = content
            _packed(dict(module.state_dict()), "", content, self.writer)
        for name, optimizer in (optimizers or {}).items():
            content = {}
            tensors[f"optimizer.{name}.safetensors"] = content
            state["optimizers"][name] = _packed(bare(optimizer).state_dict(), "", content, self.writer)
        if not self.writer or (target.is_dir() and self._damage(target) is None):
            return target
        try:
            with written(target) as temporary:  # in the place of a damaged checkpoint of the same step, if there is one
                temporary.mkdir()
                for file_name, content in tensors.items():
                    save_file(content, temporary / file_name)
                _write_json(temporary / "state.json", state)
                files = {
                    name: {"size": (temporary / name).stat().st_size, "sha256": file_digest(temporary / name)}
                    for name in [*tensors, "state.json"]
                }
                _write_json(temporary / "manifest.json", {"format": FORMAT, "step": step, "files": files})
        except OSError as error:
            if error.errno not in FULL:
                raise
            size = sum(t.numel() * t.element_size() for content in tensors.values() for t in content.values())
            kept = self.steps()
            raise DiskFullError(
                f"disk full: {target} needs {size / 1e6:.1f} MB; "
                + (f"the checkpoint of step {kept[-1]} is kept. " if kept else "there is no checkpoint yet. ")
                + "Free some space and start the same command again."
            ) from error
        for old in self.steps()[: -self.keep]:
            self._remove(self.folder / f"step-{old:08d}")
        sweep(self.folder)
        return target

    # Restoring

    def check(self) -> None:
        """Raises CheckpointError where the newest checkpoint is of another run; reads nothing large."""
        for step in reversed(self.steps()):
            folder = self.folder / f"step-{step:08d}"
            try:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                self._check_identity(folder, state["identity"])
            except CheckpointError:
                raise
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: `restore` says so
            return

    def _check_identity(self, folder: Path, identity: Any) -> None:
        differences = _differences(identity, self.identity)
        if differences:
            raise CheckpointError(
                f"{folder} was written by another run: {'; '.join(differences)}. "
                "Restore these settings, or choose another output_dir."
            )

    def restore(
        self, modules: Mapping[str, Stateful], optimizers: Mapping[str, Optimizer] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest checkpoint that is whole into `modules` and `optimizers`.

        A damaged one is reported, renamed to `damaged-step-N`, and the one before is taken.

        Returns:
            Its step and the `extra` of its save; None where there is no checkpoint.

        Raises:
            CheckpointError: The checkpoint is of another run (the differences are listed), has tensors missing, left
                over, or of another shape or dtype, or every checkpoint is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.folder / f"step-{step:08d}"
            damage = self._damage(folder)
            if damage is None:
                return self._load(folder, modules, dict(optimizers or {}))
            print(f"checkpoint {folder} is damaged ({damage}); falling back to the one before.", file=sys.stderr)
            if self.writer:
                aside = self.folder / f"damaged-{folder.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
        damaged = sorted(path.name for path in self.folder.glob("damaged-step-*")) if self.folder.is_dir() else []
        if steps or damaged:
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged ({', '.join(damaged) or 'none can be read'}), expected "
                "one that is whole; remove them to start anew."
            )
        return None

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, ascending; foreign names, symlinks and temporaries do not count."""
        if not self.folder.is_dir():
            return []
        matches = ((entry, _STEP_FOLDER.fullmatch(entry.name)) for entry in os.scandir(self.folder))
        return sorted(int(match[1]) for entry, match in matches if match and entry.is_dir(follow_symlinks=False))

    def close(self) -> None:
        """Give the folder free for another process."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # Parts

    def _acquire_lock(self, path: Path) -> None:
        self._lock = path.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(
                f"{path.parent}: another process is training into this folder; stop it or choose another output_dir."
            ) from None
        # A forked data worker that outlives a killed run must not keep the folder locked.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (checkpoints := reference()) and checkpoints.close())  # type: ignore[func-returns-value]

    def _remove(self, folder: Path) -> None:
        # Renamed first: a removal that is killed half way leaves a temporary, not half a checkpoint.
        doomed = folder.with_name(f".tmp-removed-{folder.name}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with the checkpoint's files, or None."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            files = manifest["files"]
            if manifest["format"] != FORMAT:
                return f"format {manifest['format']!r} in manifest.json, expected {FORMAT}"
            if f"step-{manifest['step']:08d}" != folder.name:
                return f"manifest.json is of step {manifest['step']}"
            if "state.json" not in files:
                return "state.json is not in manifest.json"
            for name, expected in files.items():
                path = folder / name
                if Path(name).name != name or path.is_symlink() or not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != expected["size"]:
                    return f"{name} has {path.stat().st_size} bytes, in manifest.json {expected['size']}"
                if file_digest(path) != expected["sha256"]:
                    return f"{name} has another sha256 than in manifest.json"
        except FileNotFoundError:
            return "manifest.json is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"manifest.json cannot be read: {error}"
        return None

    def _load(
        self, folder: Path, modules: Mapping[str, Stateful], optimizers: Mapping[str, Optimizer]
    ) -> tuple[int, dict[str, Any]]:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._check_identity(folder, state["identity"])
        stored = {path.name for path in folder.glob("*.safetensors")}
        wanted = {f"{name}.safetensors" for name in modules} | {f"optimizer.{name}.safetensors" for name in optimizers}
        if stored != wanted:
            raise CheckpointError(f"{folder}: got {sorted(stored)}, expected {sorted(wanted)}.")
        for name, module in modules.items():
            path = folder / f"{name}.safetensors"
            tensors, expected = load_file(path), module.state_dict()
            _check_tensors(path, tensors, expected)
            module.load_state_dict({key: _shared_out(value, expected[key]) for key, value in tensors.items()})
        for name, optimizer in optimizers.items():
            path = folder / f"optimizer.{name}.safetensors"
            _restore_optimizer(optimizer, load_file(path), state["optimizers"][name], path)
        return state["step"], state["extra"]


def bare(optimizer: Any) -> Any:
    """The torch optimizer below Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _packed(tree: Any, name: str, tensors: dict[str, torch.Tensor], keep: bool) -> Any:
    """A nest of dicts, lists and tuples as JSON, its tensors put into `tensors` under the names of their places.

    Args:
        tree: The nest; beside tensors it holds what JSON has.
        name: Of its place.
        tensors: Filled with own copies on the CPU: safetensors refuses weights that share storage.
        keep: Whether they are wanted; without, sharded tensors are only gathered, which all processes have to do.

    Raises:
        CheckpointError: Something is neither.
    """
    if torch.is_tensor(tree):
        tensor = tree.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            tensors[name] = tensor.to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        inner = [
            [key, _packed(value, f"{name}.{key}" if name else str(key), tensors, keep)] for key, value in tree.items()
        ]
        return {"items": inner}
    if isinstance(tree, list | tuple):
        values = [_packed(value, f"{name}.{number}", tensors, keep) for number, value in enumerate(tree)]
        return {type(tree).__name__: values}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise CheckpointError(f"{name}: got a {type(tree).__name__}, expected tensors and plain values in what is saved.")


def _unpacked(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The nest that `_packed` was given."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _unpacked(value, tensors) for key, value in content}
    values = [_unpacked(value, tensors) for value in content]
    return tuple(values) if kind == "tuple" else values


def _shared_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded over processes as another one is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def _restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, torch.Tensor], stored: Mapping[str, Any], path: Path
) -> None:
    optimizer = bare(optimizer)
    state, now = _unpacked(stored, tensors), optimizer.state_dict()["param_groups"]
    if [group["params"] for group in now] != [group["params"] for group in state["param_groups"]]:
        raise CheckpointError(
            f"{path}: got groups of {[len(group['params']) for group in state['param_groups']]} parameters, "
            f"expected {[len(group['params']) for group in now]}."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if torch.is_tensor(value):
                entries[key] = _shared_out(value, parameters[number])
    optimizer.load_state_dict(state)


def _check_tensors(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing, left_over = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or left_over:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors missing {missing[:3]}, {len(left_over)} left over {left_over[:3]}."
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            raise CheckpointError(
                f"{path}: '{key}' is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(expected[key].shape)} {expected[key].dtype}."
            )


def _differences(stored: Any, now: Any, name: str = "") -> list[str]:
    """'learning_rate: 0.1 in the checkpoint, 0.2 now' for each leaf that differs."""
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = [*stored, *(key for key in now if key not in stored)]
        return [
            line
            for key in keys
            for line in _differences(stored.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if stored == now else [f"{name}: {stored!r} in the checkpoint, {now!r} now"]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
