"""A model is found by its name, and known by its configs before its weights are read."""

from pathlib import Path

import pytest

from hubgen import TextToImagePipeline, bundled_model
from hubgen.hub.bare import bare_parts
from hubgen.hub.finding import BUNDLED, find_model, read_index


def test_a_name_is_the_bundled_model_a_folder_a_file_or_a_repository(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    file.touch()
    assert find_model(BUNDLED) == bundled_model()
    assert find_model(str(tiny_model)) == tiny_model
    assert find_model(str(file)) == file
    assert find_model("owner/name") is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere", "no such folder; expected a pipeline folder or owner/name on the Hub"),
        ("empty", "not a pipeline folder, it holds no model_index.json"),
        ("damaged", "its model_index.json is not JSON"),
        ("nameless", "its model_index.json names no pipeline"),
        ("one.safetensors", "is a file, expected a pipeline folder or owner/name on the Hub"),
    ],
)
def test_a_name_that_is_no_model_is_told_with_its_argument(
    name: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, index in (("empty", None), ("damaged", "{"), ("nameless", "{}")):
        Path(folder).mkdir()
        if index is not None:
            (Path(folder) / "model_index.json").write_text(index)
    Path("one.safetensors").touch()
    with pytest.raises(ValueError, match=f"^model {name}: {problem}"):
        find_model(name, single_files=False)
    with pytest.raises(ValueError, match=f"^base {name}: {problem}"):
        find_model(name, "base", single_files=False)


def test_bare_parts_are_the_networks_that_load_without_their_numbers(tiny_model: Path) -> None:
    bare = bare_parts(read_index(str(tiny_model), None, tiny_model), str(tiny_model), None, tiny_model)
    loaded = TextToImagePipeline.from_pretrained(tiny_model).adaptable_models()
    assert bare.keys() == loaded.keys() == {"transformer", "text_encoder"}
    for name, model in bare.items():
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        assert shapes == {key: value.shape for key, value in loaded[name].state_dict().items()}
        assert all(value.is_meta for value in model.parameters())


def test_a_class_that_nobody_has_is_told_of_its_part(tiny_model: Path) -> None:
    index = {**read_index(str(tiny_model), None, tiny_model), "transformer": ["hubgen", "NoSuchModel"]}
    with pytest.raises(ValueError, match="^model tiny: `transformer`: hubgen has no class 'NoSuchModel'"):
        bare_parts(index, "tiny", None, tiny_model)
