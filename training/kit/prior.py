"""Pictures of the class of a subject, made by the base before it learns (DreamBooth, 2208.12242, section 3.2)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hubgen.data.order import generator_of
from hubgen.formats.atomic import written
from hubgen.training.kit.groups import Prior
from hubgen.training.kit.parse import SettingsError
from hubgen.training.kit.run import Run

AT_ONCE = 8
"""Pictures of a call"""


def check_prior(prior: Prior, pictures: int) -> bool:
    """Whether there is a prior.

    Args:
        prior: The settings.
        pictures: Of a batch.

    Raises:
        SettingsError: It has a weight and no prompt, or too few pictures for a batch.
    """
    if prior.weight == 0:
        return False
    if prior.prompt is None:
        raise SettingsError(
            f"setting 'prior.prompt': got none with prior.weight {prior.weight:g}, expected words of the subject's "
            "class, or prior.weight 0."
        )
    if prior.pictures < pictures:
        raise SettingsError(
            f"setting 'prior.pictures': got {prior.pictures}, expected at least {pictures}, those of a batch."
        )
    return True


def class_pictures(run: Run, pipe: Any, prior: Prior, folder: Path, side: int) -> Path:
    """The folder of the class pictures; those that are missing are made, each on the seed of its number.

    Args:
        run: The processes, which share the work, and the seed.
        pipe: The base, as it was before anything learnt.
        prior: The settings.
        folder: Where they go; see `check_folder`.
        side: Height and width in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # By number, not by what is missing now: the others may have begun already.
    numbers = range(run.rank, prior.pictures, run.world_size)
    own = [number for number in numbers if not (folder / file_name(number)).is_file()]
    options: dict[str, Any] = {"num_inference_steps": prior.inference_steps, "guidance_scale": prior.guidance_scale}
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(own), desc="class pictures", disable=not run.writer or not own) as progress:
        for first in range(0, len(own), AT_ONCE):
            chosen = own[first : first + AT_ONCE]
            generators = [generator_of(run.options.seed, number, "class picture") for number in chosen]
            with run.accelerator.autocast(), torch.no_grad():
                made = pipe(
                    [prior.prompt] * len(chosen), generator=generators, height=side, width=side, **options
                ).images
            for number, picture in zip(chosen, made, strict=True):
                with written(folder / file_name(number)) as temporary:
                    picture.save(temporary, format="PNG")
            progress.update(len(chosen))
    run.accelerator.wait_for_everyone()
    if run.writer:
        rows = [{"file_name": file_name(number), "text": prior.prompt} for number in range(prior.pictures)]
        with written(folder / "metadata.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    return folder


def check_folder(folder: Path, prior: Prior) -> None:
    """Raises SettingsError for a folder with class pictures of another prompt."""
    table = folder / "metadata.jsonl"
    if not table.is_file():
        return
    found = {json.loads(line).get("text") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()}
    if found != {prior.prompt}:
        raise SettingsError(
            f"setting 'prior.prompt': got {prior.prompt!r}, expected {sorted(map(str, found))[0]!r}, the words of the "
            f"pictures in {folder}, or another prior.folder."
        )


class Unchanged:
    """Has checkpoints hold what class pictures a run was shown, so that it does not go on with others.

    Args:
        fingerprint: Of the pictures.
        folder: Where they are.
    """

    def __init__(self, fingerprint: str, folder: Path) -> None:
        self.fingerprint, self.folder = fingerprint, folder

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The fingerprint."""
        return {"fingerprint": torch.tensor(list(self.fingerprint.encode()), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises SettingsError where the pictures are others."""
        if bytes(state["fingerprint"].tolist()).decode() != self.fingerprint:
            raise SettingsError(
                f"{self.folder}: got other class pictures than those that the run began with; expected the same, or "
                "another output_dir."
            )


def file_name(number: int) -> str:
    """Of a class picture."""
    return f"{number:05}.png"
