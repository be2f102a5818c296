"""Repositories that bring hubgen's code along load where hubgen is not installed, and where it is without running it.

The client reads the Hub's address when it is imported, so what asks a Hub is a process of its own; in some of them
hubgen cannot be imported.
"""

import ast
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hubgen
from hubgen.formats.checkpoints import read_json
from hubgen.hub.carried_code import as_carried, as_installed, closure, code_of, quoted, source_of
from hubgen.hub.carried_loader import CarriedModules, without_bars
from hubgen.hub.publish import prepare
from tests import models
from tests.hub.loopback import WITHOUT_HUBGEN, Hub, environment_of, loopback_hub

CODE = "hubgen_text_to_image.py"
DRAW = """
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("a red cat", num_inference_steps=2, generator=generator, output_type="pt").images

def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that diffusers lacks, as hubgen saves it."""
    folder = tmp_path_factory.mktemp("carried") / "model"
    models.pipeline().save_pretrained(folder)
    return folder


def run(code: str, hub: Hub, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = environment_of(hub, home)
    environment |= {name: value for name, value in variables.items() if name.isupper()}
    head = "".join(f"{name} = {value!r}\n" for name, value in variables.items() if not name.isupper())
    done = subprocess.run([sys.executable, "-c", head + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def picture(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe("a red cat", num_inference_steps=2, generator=generator, output_type="pt").images


def test_it_loads_without_hubgen_draws_the_same_and_loses_nothing_when_saved_again(
    hub: Hub, saved: Path, tmp_path: Path
) -> None:
    hub.add("tester/carried", saved)
    ours = hubgen.TextToImagePipeline.from_pretrained(saved)
    torch.save(picture(ours), tmp_path / "picture.pt")
    code = """
for place in (repo, folder):
    message = refusal(lambda: DiffusionPipeline.from_pretrained(place))
    assert "trust_remote_code=True" in message and "custom code" in message, message
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
assert type(pipe).__name__ == "TextToImagePipeline"
assert type(pipe.scheduler).__module__ == "hubgen.schedulers.flow_match_euler"  # editing needs it
assert (picture(pipe) - torch.load(expected)).abs().max() < 1e-5
torch.save(pipe.transformer.state_dict(), out + "/transformer.pt")
pipe.save_pretrained(out + "/again")
again = DiffusionPipeline.from_pretrained(out + "/again", trust_remote_code=True)
assert (picture(again) - torch.load(expected)).abs().max() < 1e-5
print(pipe.push_to_hub("tester/again", license="mit"))
"""
    done = run(
        WITHOUT_HUBGEN + DRAW + code,
        hub,
        tmp_path / "home",
        repo="tester/carried",
        folder=str(saved),
        expected=str(tmp_path / "picture.pt"),
        out=str(tmp_path),
    )
    assert f"{hub.url}/tester/again" in done.stdout
    weights = load_file(saved / "transformer/diffusion_pytorch_model.safetensors")
    loaded = torch.load(tmp_path / "transformer.pt")
    assert weights.keys() <= loaded.keys() and all(torch.equal(loaded[key], value) for key, value in weights.items())
    for place in (tmp_path / "again" / CODE, saved / CODE):
        assert place.read_bytes() == hub.repos["tester/again"][CODE]
    index = json.loads(hub.repos["tester/again"]["model_index.json"])
    assert index == {**read_json(saved / "model_index.json"), "_name_or_path": index.get("_name_or_path")} or (
        index == read_json(saved / "model_index.json")
    )
    assert "license: mit" in hub.repos["tester/again"]["README.md"].decode()


def test_where_remote_code_is_off_it_stays_refused_and_native_repositories_load(
    hub: Hub, saved: Path, official: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.add("tester/carried", saved)
    native = hubgen.TextToImagePipeline.from_pretrained(official("sd3"))
    native.save_pretrained(tmp_path / "native")
    hub.add("tester/native", tmp_path / "native")
    assert not any(name.endswith(".py") for name in hub.repos["tester/native"])
    torch.save(picture(native), tmp_path / "picture.pt")
    code = """
message = refusal(lambda: DiffusionPipeline.from_pretrained("tester/carried", trust_remote_code=True))
assert "DIFFUSERS_DISABLE_REMOTE_CODE" in message, message
for cls in (DiffusionPipeline, AutoPipelineForText2Image):
    pipe = cls.from_pretrained("tester/native")
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert (picture(pipe) - torch.load(expected)).abs().max() < 1e-5
assert "hubgen" not in sys.modules
"""
    run(
        WITHOUT_HUBGEN + DRAW + code,
        hub,
        tmp_path / "home",
        expected=str(tmp_path / "picture.pt"),
        DIFFUSERS_DISABLE_REMOTE_CODE="true",
    )


def test_where_hubgen_is_imported_nothing_of_it_is_run_and_no_trust_is_asked(
    hub: Hub, saved: Path, tmp_path: Path
) -> None:
    hub.add("tester/carried", saved)
    hub.repos["tester/carried"][CODE] = b"raise SystemExit('it was run')"
    code = """
import hubgen
ours = hubgen.TextToImagePipeline.from_pretrained("tester/carried")
theirs = DiffusionPipeline.from_pretrained("tester/carried")
trusted = DiffusionPipeline.from_pretrained("tester/carried", trust_remote_code=True)
for pipe in (ours, theirs, trusted):
    assert type(pipe) is hubgen.TextToImagePipeline and type(pipe.transformer) is hubgen.SD3Transformer2DModel
assert torch.equal(picture(ours), picture(theirs))
"""
    run(DRAW + code, hub, tmp_path / "home")


def test_a_file_holds_every_module_that_it_needs_word_for_word() -> None:
    text = code_of(hubgen.TextToImagePipeline)
    carried: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            carried[ast.literal_eval(node.targets[0].slice)] = without_bars(ast.literal_eval(node.value))
    assert set(carried) == closure("hubgen.pipelines.text_to_image")
    assert all(source == source_of(module) for module, source in carried.items())
    assert {"hubgen", "hubgen.layers.attention", "hubgen.hub.carried_code"} <= set(carried)
    assert not any(name.startswith(("hubgen.training", "hubgen.cli")) for name in carried)
    assert code_of(hubgen.TextToImagePipeline) == text
    # diffusers looks for imports line by line
    starts = [line.split()[1] for line in text.splitlines() if line.startswith(("from ", "import "))]
    assert all(name.partition(".")[0] in sys.stdlib_module_names for name in starts)


def test_bars_are_put_before_lines_and_taken_away_again() -> None:
    for text in ("a\n", "|a\n\n||\n", 'x = r"\\n"\n', "\n\n"):
        assert without_bars(ast.literal_eval(quoted(text))) == text
    for text in ("a", "a = '''b'''\n", "a\x0cb\n"):
        with pytest.raises(ValueError, match="a module that shall be carried"):
            quoted(text)


def test_components_that_diffusers_lacks_are_carried_and_others_are_not(tmp_path: Path) -> None:
    unet = models.NETWORKS["DDPM"].build()
    pipe = hubgen.UnconditionalPipeline(unet, hubgen.AnnealedLangevinScheduler(num_train_timesteps=3))
    pipe.save_pretrained(tmp_path)
    index = read_json(tmp_path / "model_index.json")
    assert index["_class_name"] == ["hubgen_unconditional", "UnconditionalPipeline"]
    assert index["scheduler"] == ["hubgen_annealed_langevin", "AnnealedLangevinScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.py")} == {
        "hubgen_unconditional.py",
        "scheduler/hubgen_annealed_langevin.py",
    }
    again = hubgen.UnconditionalPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is hubgen.AnnealedLangevinScheduler
    # What is saved there next takes its own files alone.
    pipe.register_modules(scheduler=hubgen.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "scheduler/hubgen_annealed_langevin.py").exists()


def test_a_setting_that_diffusers_does_not_know_keeps_a_pipeline_from_being_native(
    official: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = hubgen.TextToImagePipeline.from_pretrained(official("sd3"))
    pipe.scheduler = hubgen.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_once=True)
    assert pipe.native_index() is None
    pipe.save_pretrained(tmp_path)
    assert read_json(tmp_path / "model_index.json")["scheduler"][0] == "hubgen_flow_match_euler"
    assert hubgen.TextToImagePipeline.from_pretrained(tmp_path).scheduler.config.shift_once
    plain = hubgen.FlowMatchEulerDiscreteScheduler()
    assert "shift_once" not in plain.to_json_string()  # diffusers would warn of it


def test_a_pipeline_of_somebody_elses_keeps_its_index() -> None:
    index = {"_class_name": "Mine", "unet": ["hubgen", "UNet2DModel"]}
    assert as_carried(index, lambda name: {}) == (index, {})
    read = {
        "_class_name": ["hubgen_x", "TextToImagePipeline"],
        "vae": ["diffusers", "AutoencoderKL"],
        "a": [None, None],
    }
    assert as_installed(read) == {
        "_class_name": "TextToImagePipeline",
        "vae": ["hubgen", "AutoencoderKL"],
        "a": [None, None],
    }


def test_a_folder_without_code_is_sent_with_it_and_without_places_of_this_machine(saved: Path, tmp_path: Path) -> None:
    pipe = models.pipeline()
    pipe.save_pretrained(tmp_path)
    index = as_installed(read_json(tmp_path / "model_index.json"))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / CODE).unlink()
    config = read_json(tmp_path / "vae/config.json")
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path)}))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    shipment = prepare(tmp_path, "tester/old")
    assert CODE in shipment.files and shipment.made[CODE] == (saved / CODE).read_bytes()
    assert json.loads(shipment.made["model_index.json"]) == read_json(saved / "model_index.json")
    sent = json.loads(shipment.made["vae/config.json"])
    assert "_name_or_path" not in sent and sent["latent_channels"] == 4
    assert shipment.files["vae/config.json"] == len(shipment.made["vae/config.json"])


def test_modules_are_imported_from_texts_and_other_versions_are_told(caplog: pytest.LogCaptureFixture) -> None:
    finder = CarriedModules("1.0")
    finder.add("1.0", {"hubgen": '"""Package."""\n', "hubgen.part": "VALUE = 1\n"})
    spec = finder.find_spec("hubgen", None)
    assert spec is not None and spec.submodule_search_locations is not None
    module = __import__("importlib").util.module_from_spec(spec)
    finder.exec_module(module)
    assert module.__version__ == "1.0" and module.__doc__ == "Package."
    assert finder.file_of("hubgen.part") == "hubgen/part.py" and finder.find_spec("torch", None) is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hubgen.other' in what this model has brought"):
        finder.find_spec("hubgen.other", None)
    with caplog.at_level(logging.WARNING):
        finder.add("2.0", {"hubgen.part": "VALUE = 2\n", "hubgen.more": ""})
    assert "hubgen 1.0" in caplog.text and "2.0" in caplog.text
    assert finder.sources["hubgen.part"] == "VALUE = 1\n" and "hubgen.more" in finder.sources
