"""Adapters learn, and nothing else does: on every family, for LoRA and DreamBooth, from a recipe to a file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import hubgen
from hubgen.adaptation.adapters import AdapterShape, add_adapter, targets
from hubgen.training import train_dreambooth, train_lora
from hubgen.training.kit.adapters import NAME, Asked, with_adapters
from hubgen.training.kit.groups import Adapter
from hubgen.training.kit.new_words import NewRows
from hubgen.training.kit.parse import SettingsError, parse_settings
from tests import models
from tests.parity import first_output
from tests.training.conftest import draw_pictures

Official = Callable[[str], Path]
FAMILIES = ["sd1", "sd2", "sdxl", "sd3", "sd3.5", "flux-dev", "flux-schnell"]
SCRIPTS: dict[str, Any] = {"lora": train_lora, "dreambooth": train_dreambooth}
DREAMBOOTH: dict[str, Any] = {
    "instance.prompt": "a big cat",
    "prior.prompt": "a cat",
    "prior.pictures": 3,
    "prior.inference_steps": 2,
}


@pytest.fixture
def run(problem: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A few steps of a script in this process; returns the output folder."""

    def train(script: str, changes: dict[str, Any]) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        output = changes.get("run.output_dir", str(tmp_path / "run"))
        settings = {
            "data.source": problem["data.source"],
            "data.size": 16,
            "run.output_dir": output,
            "run.batch_size": 2,
            "run.max_train_steps": 3,
            "run.log_steps": 1,
            "run.report_to": "none",
            "adapter.rank": 2,
            "optim.learning_rate": 0.01,
            "validation.prompts": ["a cat"],
            "validation.inference_steps": 2,
            "publish.dtype": "float32",
            **(DREAMBOOTH if script == "dreambooth" else {}),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
        SCRIPTS[script].main(parse_settings(SCRIPTS[script].Settings, ["--config", str(path)]))
        return Path(output)

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def opened(cls: Any, folder: Path) -> Any:
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "generator": generator}
    return pipe("a cat", **call).images


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_learns_on_every_family_and_is_the_same_in_diffusers(
    run: Callable[..., Path], official: Official, family: str
) -> None:
    folder = run("lora", {"base.model": str(official(family)), "adapter.alpha": 3, "adapter.ranks": {"to_q": 1}})
    ours, theirs = (opened(cls, official(family)) for cls in (hubgen.TextToImagePipeline, diffusers.DiffusionPipeline))
    before = picture(ours)
    for pipe in (ours, theirs):
        pipe.load_lora_weights(folder / "lora")
    assert np.abs(picture(ours) - before).max() > 1e-4
    np.testing.assert_allclose(picture(theirs), picture(ours), atol=1e-4)
    base = sum(value.numel() for value in ours.backbone.state_dict().values())
    newest = max((folder / "checkpoints").glob("step-*"))
    held = sum(value.numel() for value in load_file(newest / "adapter.safetensors").values())
    assert held < base / 4, "a checkpoint holds the base"
    assert {file.name for file in (folder / "lora").iterdir()} == {
        *("README.md", "pytorch_lora_weights.safetensors", "training.json", "before.png", "after.png"),
        *("curve-adapter.png", "sample-0.png"),
    }


def test_an_adapter_learns_on_a_model_of_classes(run: Callable[..., Path], official: Official, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "data", 6)
    table = tmp_path / "data" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps({**row, "class": 7 + n}) + "\n" for n, row in enumerate(rows)))
    data = {"data.source": str(tmp_path / "data"), "data.label_column": "class", "validation.prompts": ["7", "8"]}
    folder = run("lora", {"base.model": str(official("dit")), **data})
    pipe = hubgen.ClassToImagePipeline.from_pretrained(official("dit"))
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe([7], num_inference_steps=2, output_type="np", generator=generator).images

    before = drawn()
    pipe.load_lora_weights(folder / "lora")
    assert np.abs(drawn() - before).max() > 1e-4
    pipe.unload_lora_weights()
    assert np.array_equal(drawn(), before)


@pytest.mark.parametrize("name", models.DENOISERS)
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft", "rslora"])
def test_a_fresh_adapter_changes_no_bit_and_leaves_the_base_without_gradients(name: str, kind: str) -> None:
    network = models.NETWORKS[name]
    model = network.build().requires_grad_(False)  # torch rounds otherwise where a weight may learn
    inputs = network.inputs()
    with torch.no_grad():
        expected = first_output(model(**inputs))
    shape = AdapterShape(
        kind=kind if kind in ("loha", "lokr", "oft") else "lora",  # type: ignore[arg-type]
        rank=4 if kind == "oft" else 2,
        rank_stabilised=kind == "rslora",
        decomposed=kind == "dora",
    )
    add_adapter(model, "one", shape, targets(model, "attention"))
    with torch.no_grad():
        found = first_output(model(**inputs))
    if kind == "dora":  # divides by the norm that it multiplies with
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    first_output(model(**inputs)).square().mean().backward()
    learning = {key for key, value in model.named_parameters() if value.grad is not None}
    assert learning and all(".one" in key for key in learning)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_what_is_published_is_what_was_learnt_whatever_the_factors_began_as(init: str) -> None:
    pipe = models.pipeline()
    base = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    adapted = with_adapters(pipe, Adapter(rank=2, init=init))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    inputs = models.NETWORKS["SD 3"].inputs()
    with torch.no_grad():
        trained = first_output(pipe.transformer(**inputs))
    fresh = models.pipeline()
    fresh.transformer.load_state_dict(base)
    from hubgen.adaptation.attach import attach

    attach(fresh.transformer, "again", adapted.layers()["transformer"])
    with torch.no_grad():
        torch.testing.assert_close(first_output(fresh.transformer(**inputs)), trained, rtol=1e-4, atol=1e-4)


def test_the_loss_of_dreambooth_is_that_of_the_subject_and_a_share_of_the_class(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {"captions": [], "loss": [], "prediction": []}
    forward = train_dreambooth.whole.__globals__["Learner"].forward

    def watched(self: Any, asked: list[Asked]) -> list[torch.Tensor]:
        found = forward(self, asked)
        seen["captions"].append([list(one.captions) for one in asked])
        seen["prediction"].append([one.detach() for one in found])
        return found

    monkeypatch.setattr(train_dreambooth.whole.__globals__["Learner"], "forward", watched)
    losses: list[torch.Tensor] = []
    loss_of = hubgen.schedulers.objective.Objective.loss

    def noted(self: Any, prediction: torch.Tensor, sample: Any, mask: Any = None) -> torch.Tensor:
        found = loss_of(self, prediction, sample, mask)
        losses.append(found.detach())
        return found

    monkeypatch.setattr(hubgen.schedulers.objective.Objective, "loss", noted)
    backward = train_dreambooth.Run.trains

    def trains(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained = backward(self, *args, **kwargs)
        plain = trained.backward

        def counted(loss: torch.Tensor, names: Any) -> None:
            seen["loss"].append(loss.detach())
            plain(loss, names)

        trained.backward = counted
        return trained

    monkeypatch.setattr(train_dreambooth.Run, "trains", trains)
    base = models.saved_pipeline(tmp_path / "base")
    run("dreambooth", {"base.model": str(base), "prior.weight": 0.3, "validation.prompts": []})
    assert len(seen["loss"]) == 3
    for step, total in enumerate(seen["loss"]):
        subject, prior = losses[2 * step : 2 * step + 2]
        torch.testing.assert_close(total, subject.mean() + 0.3 * prior.mean(), rtol=1e-6, atol=1e-6)
    assert all(captions == [["a big cat"] * 2, ["a cat"] * 2] for captions in seen["captions"])


def test_dreambooth_without_a_class_is_plain_training_and_may_move_all_weights(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    base = models.saved_pipeline(tmp_path / "base")
    changes = {"base.model": str(base), "prior.weight": 0, "prior.prompt": None, "learns": "all"}
    folder = run("dreambooth", {**changes, "adapter.text_encoder": True, "data.cache_texts": False})
    assert not (folder / "class_pictures").exists()
    before, after = (hubgen.TextToImagePipeline.from_pretrained(one) for one in (base, folder / "pipeline"))
    for part in ("transformer", "text_encoder"):
        old, new = (getattr(one, part).state_dict() for one in (before, after))
        assert any(not torch.equal(value, new[key]) for key, value in old.items())


def test_class_pictures_that_are_there_are_kept_and_others_are_refused(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    base = models.saved_pipeline(tmp_path / "base")
    settings = {"base.model": str(base), "validation.prompts": []}
    folder = run("dreambooth", settings)
    times = {file: file.stat().st_mtime_ns for file in (folder / "class_pictures").glob("*.png")}
    assert len(times) == 3
    run("dreambooth", settings | {"run.max_train_steps": 4})
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    first = sorted(times)[0]
    first.write_bytes(sorted(times)[1].read_bytes())
    with pytest.raises(SettingsError, match="class_pictures: got other class pictures than those that the run began"):
        run("dreambooth", settings | {"run.max_train_steps": 5})
    other = {"run.output_dir": str(tmp_path / "other"), "prior.folder": str(folder / "class_pictures")}
    with pytest.raises(SettingsError, match="'prior.prompt': got 'a dog', expected 'a cat', the words of the pictures"):
        run("dreambooth", settings | other | {"prior.prompt": "a dog"})


def test_text_encoders_learn_beside_the_backbone(run: Callable[..., Path], official: Official) -> None:
    for number, family in enumerate(("sd1", "sdxl", "flux-dev")):
        changes = {"adapter.text_encoder": True, "data.cache_texts": False, "adapter.rank": 1}
        output = str(official(family).parent / f"run-{number}")
        folder = run("lora", {"base.model": str(official(family)), "run.output_dir": output, **changes})
        parts = {key.split(".")[0] for key in load_file(folder / "lora" / "pytorch_lora_weights.safetensors")}
        encoders = {"sd1": {"text_encoder"}}.get(family, {"text_encoder", "text_encoder_2"})
        assert parts == {"transformer" if family == "flux-dev" else "unet", *encoders}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_word_is_learned_beside_an_adapter_and_both_load_in_diffusers(
    run: Callable[..., Path], official: Official, family: str, tmp_path: Path
) -> None:
    base = official(family)
    words = {"adapter.new_words": ["<zog>"], "adapter.word_vectors": 2, "adapter.word_start": "cat"}
    changes = {"instance.prompt": "a <zog> cat", "data.cache_texts": False, "validation.prompts": ["a <zog>"]}
    folder = run("dreambooth", {"base.model": str(base), **words, **changes}) / "lora"
    ours, theirs = (opened(cls, base) for cls in (hubgen.TextToImagePipeline, diffusers.DiffusionPipeline))
    table = ours.text_encoder.get_input_embeddings().weight.detach().clone()
    held = load_file(folder / "learned_embeds.safetensors")
    ours.load_lora_weights(folder)
    ours.load_textual_inversion(str(folder), token="<zog>")
    theirs.load_lora_weights(folder)
    if family == "sd1":
        theirs.load_textual_inversion(str(folder), token="<zog>")
        assert held["<zog>"].shape == (2, table.shape[1])
    else:
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(theirs, f"text_encoder{number}"), getattr(theirs, f"tokenizer{number}")
            theirs.load_textual_inversion(held[key], token="<zog>", text_encoder=encoder, tokenizer=tokenizer)
    grown = ours.text_encoder.get_input_embeddings().weight
    assert torch.equal(grown[: len(table)], table) and len(grown) == len(table) + 2

    def drawn(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
        return pipe("a <zog>", generator=generator, **options).images

    np.testing.assert_allclose(drawn(theirs), drawn(ours), atol=1e-4)


def test_only_new_rows_of_a_table_learn() -> None:
    table = torch.nn.Embedding(6, 3)
    before = table.weight.detach().clone()
    rows = NewRows(table, 2)
    ids = torch.tensor([[0, 5, 4], [4, 3, 1]])
    assert torch.equal(rows(ids), before[ids]) and torch.equal(rows.weight, before)
    rows(ids).square().sum().backward()
    assert table.weight.grad is None and [key for key, one in rows.named_parameters() if one.grad is not None] == [
        "rows"
    ]


QUANTIZED = {"transformer": "torchao-8bit", "text_encoder": "torchao-8bit"}


def test_an_adapter_learns_on_a_base_in_8_bits_and_loads_on_the_whole_one(
    run: Callable[..., Path], official: Official
) -> None:
    pytest.importorskip("torchao")
    base = official("flux-dev")
    settings = {"base.model": str(base), "run.report_to": "none", "run.output_dir": str(base.parent / "packed")}
    folder = run("lora", {**settings, "base.quantization": QUANTIZED})
    learnt = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    plain = run("lora", {**settings, "run.output_dir": str(base.parent / "plain")})
    likewise = load_file(plain / "lora" / "pytorch_lora_weights.safetensors")
    assert learnt.keys() == likewise.keys()
    for name, value in learnt.items():  # eight bits tell a weight to one part in 127
        assert not torch.equal(value, likewise[name]), name
        assert torch.cosine_similarity(value.flatten(), likewise[name].flatten(), 0) > 0.9, name
    pipe = opened(hubgen.TextToImagePipeline, base)
    before = picture(pipe)
    pipe.load_lora_weights(folder / "lora")
    assert np.abs(picture(pipe) - before).max() > 1e-4
    with pytest.raises(ValueError, match="quantization.transformer: .torchao-8bit. in the checkpoint, None"):
        run("lora", {**settings, "run.max_train_steps": 4})


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("lora", {"adapter.kind": "oft", "adapter.rank": 4}, "`kind`: got oft for a quantised model, expected lora"),
        ("lora", {"adapter.init": "pissa"}, "`init`: got pissa for a quantised model, whose weights it cannot change"),
        ("dreambooth", {"learns": "all"}, "the transformer is quantised"),
        ("lora", {"base.quantization": {"unet": "torchao-8bit"}},
         "'base.quantization': got unet, expected components of the base: scheduler, text_encoder, tokenizer, trans"),
        ("lora", {"base.quantization": {"transformer": "8bit"}},
         "'base.quantization' in .*: got .*transformer.*, expected mapping to one of bitsandbytes-4bit, "),
        ("lora", {"base.quantization": {"transformer": "bitsandbytes-4bit"}}, "a machine without a GPU, expected torc"),
    ],
)  # fmt: skip
def test_what_a_quantised_base_cannot_do_is_said(
    run: Callable[..., Path], tmp_path: Path, script: str, changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.is_available() and "bitsandbytes-4bit" in str(changes):
        pytest.skip("there is a GPU")
    base = {"base.model": str(models.saved_pipeline(tmp_path / "base")), "base.quantization": QUANTIZED}
    with pytest.raises((SettingsError, ValueError), match=message):
        run(script, {**base, **changes})
    assert not (tmp_path / "run" / "class_pictures").exists()


def test_an_adapter_is_float32_on_a_model_of_half_precision() -> None:
    pipe = models.pipeline()
    pipe.transformer.to(torch.bfloat16)
    adapted = with_adapters(pipe, Adapter(rank=2))
    parameters = list(adapted.learner.parameters())
    assert {one.dtype for one in parameters if one.requires_grad} == {torch.float32}
    assert {one.dtype for one in parameters if not one.requires_grad} == {torch.bfloat16}
    inputs = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in models.NETWORKS["SD 3"].inputs().items()
    }
    first_output(pipe.transformer(**inputs)).float().square().mean().backward()
    assert any(one.grad is not None and one.grad.any() for one in parameters if one.requires_grad)


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("lora", {"adapter.new_words": ["<x>"]}, "'adapter.new_words': got .*with data.cache_texts"),
        ("lora", {"adapter.new_words": ["cat"], "data.cache_texts": False}, "'adapter.new_words': got the word 'cat'"),
        ("lora", {"adapter.new_words": ["<x>"], "adapter.word_start": "zzz", "data.cache_texts": False},
         "'adapter.word_start': got 'zzz', expected words that text_encoder knows"),
        ("lora", {"adapter.targets": "nothing"}, "`targets`: got 'nothing', which no layer of SD3Transformer2DModel"),
        ("lora", {"adapter.targets": "("}, r"`targets`: got '\(', expected a regular expression"),
        ("lora", {"adapter.rank": 200}, "`rank`: got 200 for .*, expected at most its width, 32"),
        ("lora", {"adapter.ranks": {"zzz": 2}}, "`ranks`: got 'zzz', which none of the layers matches"),
        ("lora", {"adapter.kind": "loha", "adapter.decomposed": True}, "`decomposed`: got True with loha"),
        ("lora", {"adapter.init": "pissa", "adapter.decomposed": True}, "`init`: got 'pissa' with `decomposed`"),
        ("lora", {"adapter.text_encoder": True}, "'adapter.text_encoder': got True with data.cache_texts"),
        ("lora", {"base.model": "/nowhere"}, "'base.model': /nowhere: "),
        ("lora", {"adapter.rnk": 3}, "unknown setting 'adapter.rnk'.*rank"),
        ("dreambooth", {"prior.prompt": None}, "'prior.prompt': got none with prior.weight 1, expected words"),
        ("dreambooth", {"prior.pictures": 1}, "'prior.pictures': got 1, expected at least 2"),
        ("dreambooth", {"data.source": "/nowhere"}, "/nowhere: no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line_before_the_first_step(
    run: Callable[..., Path], tmp_path: Path, script: str, changes: dict[str, Any], message: str
) -> None:
    base = {} if "base.model" in changes else {"base.model": str(models.saved_pipeline(tmp_path / "base"))}
    with pytest.raises((SettingsError, ValueError), match=message) as error:
        run(script, {**base, **changes})
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_no_subject(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    base = models.saved_pipeline(tmp_path / "base")
    with pytest.raises(ValueError, match="empty"):
        run("dreambooth", {"base.model": str(base), "data.source": str(tmp_path / "empty")})


def test_a_card_says_what_the_adapter_is_for(run: Callable[..., Path], tmp_path: Path) -> None:
    draw_pictures(tmp_path / "few", 4)
    base = models.saved_pipeline(tmp_path / "base")
    folder = run("dreambooth", {"base.model": str(base), "data.source": str(tmp_path / "few")})
    card = (folder / "lora" / "README.md").read_text()
    assert (
        'load_lora_weights("path/to/this/folder")' in card
        and "![a cat](after.png)" in card
        and str(tmp_path) not in card
    )
    assert NAME == "default"
