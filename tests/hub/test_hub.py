"""Loading from a Hub and publishing to it, by the real client against a Hub on the loopback address.

The client reads the Hub's address when it is imported, so each test is a process of its own.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.loopback import Hub, environment_of, loopback_hub

REPO = "tester/tiny"
DRAW = """
def picture(pipe):
    import torch
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("a red cat", num_inference_steps=2, generator=generator, output_type="pt").images
"""


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with loopback_hub() as hub:
        hub.add(REPO, tiny_model)
        yield hub


def run(code: str, hub: Hub, home: Path, check: bool = True, **arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, which knows only this Hub; `arguments` are its variables."""
    environment = environment_of(hub, home)
    head = "".join(f"{name} = {value!r}\n" for name, value in arguments.items())
    done = subprocess.run([sys.executable, "-c", head + DRAW + code], env=environment, capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_repository_loads_by_our_class_and_by_plain_diffusers(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    """No trust_remote_code, no components handed over; after `import hubgen`, nothing else of it named."""
    code = """
import hubgen
from diffusers import DiffusionPipeline

theirs = DiffusionPipeline.from_pretrained(repo)
ours = hubgen.TextToImagePipeline.from_pretrained(repo)
local = hubgen.TextToImagePipeline.from_pretrained(folder)
assert type(theirs) is type(ours) is hubgen.TextToImagePipeline
vae = hubgen.AutoencoderKL.from_pretrained(repo, subfolder="vae")
assert vae.config.latent_channels == 4
assert type(theirs.transformer) is hubgen.SD3Transformer2DModel and type(theirs.vae) is hubgen.AutoencoderKL
assert (picture(theirs) - picture(local)).abs().max() < 1e-4
assert (picture(ours) - picture(local)).abs().max() < 1e-4
"""
    run(code, hub, tmp_path / "home", repo=REPO, folder=str(tiny_model))
    weights = f"GET /{REPO}/resolve/{hub.commit(REPO)}/transformer/diffusion_pytorch_model.safetensors"
    assert hub.requests.count(weights) == 1  # the second load came from the cache


def test_without_registration_our_class_still_loads_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """As with a diffusers whose loader keeps its libraries elsewhere; a repository that is not there is named."""
    code = """
import diffusers.pipelines.pipeline_loading_utils as loading
import hubgen
from hubgen.hub.registration import is_registered
pipeline = hubgen.TextToImagePipeline

def load_missing():
    try:
        pipeline.from_pretrained("tester/missing")
    except OSError as error:
        return str(error)

assert "tester/missing" in load_missing()
del loading.LOADABLE_CLASSES["hubgen"]
assert not is_registered()
assert "tester/missing" in load_missing()
assert type(pipeline.from_pretrained(repo)) is pipeline
"""
    run(code, hub, tmp_path / "home", repo=REPO)


@pytest.mark.parametrize("registered", [True, False])
def test_an_official_repository_loads_with_our_classes(
    registered: bool, hub: Hub, official: Callable[[str], Path], tmp_path: Path
) -> None:
    """Made by diffusers; also with a diffusers that hubgen cannot register with."""
    hub.add("tester/official", official("sdxl"))
    code = """
import diffusers.pipelines.pipeline_loading_utils as loading
import hubgen
if not registered:
    hubgen.TextToImagePipeline
    del loading.LOADABLE_CLASSES["hubgen"]
pipe = hubgen.TextToImagePipeline.from_pretrained(repo)
assert type(pipe.unet) is hubgen.UNet2DConditionModel and type(pipe.vae) is hubgen.AutoencoderKL
assert type(pipe.text_encoder_2).__module__.startswith("transformers.")
assert (picture(pipe) - picture(hubgen.TextToImagePipeline.from_pretrained(folder))).abs().max() < 1e-4
"""
    code = code.replace("not registered", str(not registered))
    run(code, hub, tmp_path / "home", repo="tester/official", folder=str(official("sdxl")))


def test_an_index_with_something_unknown_is_refused_before_weights_are_fetched(
    hub: Hub, official: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(official("sd1"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNetOfTomorrow"]}))
    hub.add("tester/unknown", folder)
    code = """
import hubgen
try:
    hubgen.TextToImagePipeline.from_pretrained(repo)
except ValueError as error:
    assert "tester/unknown" in str(error) and "UNetOfTomorrow" in str(error), error
else:
    raise AssertionError("it loaded")
"""
    run(code, hub, tmp_path / "home", repo="tester/unknown")
    assert not [request for request in hub.requests if "safetensors" in request]


def test_what_is_pushed_loads_again(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    code = """
import hubgen
pipe = hubgen.TextToImagePipeline.from_pretrained(folder)
pipe.push_to_hub(repo)
again = hubgen.TextToImagePipeline.from_pretrained(repo)
assert (picture(again) - picture(pipe)).abs().max() < 1e-4
"""
    run(code, hub, tmp_path / "home", repo="tester/pushed", folder=str(tiny_model))
    files = hub.repos["tester/pushed"]
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["hubgen_text_to_image", "TextToImagePipeline"]
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert files[weights] == (tiny_model / weights).read_bytes()


def test_the_command_says_both_reasons_why_a_repository_is_not_found(hub: Hub, tmp_path: Path) -> None:
    code = """
import sys
from hubgen.cli import main
sys.exit(main(["generate", "a cat", "--model", "nobody/nothing", "--out", out]))
"""
    done = run(code, hub, tmp_path / "home", check=False, out=str(tmp_path / "cat.png"))
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "--model nobody/nothing: not found: here is no folder of that name; on the Hub there is no such" in line
    assert "or it is private and needs a login" in line
    assert not [request for request in hub.requests if "safetensors" in request]
