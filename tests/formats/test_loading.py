"""A checkpoint loads as a whole or not at all, and the error says what is wrong with which file."""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from hubgen.formats.checkpoints import read_checkpoint
from hubgen.formats.folders import check_pipeline_folder
from hubgen.formats.headers import read_header
from hubgen.formats.loading import StrictModelMixin

NAME = "diffusion_pytorch_model"
WEIGHTS = f"{NAME}.safetensors"
INDEX = f"{NAME}.safetensors.index.json"


class OldAttention(nn.Module):
    _from_deprecated_attn_block = True

    def __init__(self, width: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class Net(StrictModelMixin, ConfigMixin):
    """Some layers and an attention that bore other names once."""

    _no_split_modules = ["OldAttention"]
    _keys_to_ignore_on_load_unexpected = [r"^position_ids$"]

    @register_to_config
    def __init__(self, width: int = 8, num_layers: int = 3, table: int = 4):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(num_layers)])
        self.attention = OldAttention(width)
        self.register_buffer("waves", torch.arange(table), persistent=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model, one file."""
    torch.manual_seed(0)
    Net().save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files."""
    torch.manual_seed(0)
    Net().save_pretrained(tmp_path / "shards", max_shard_size=600)
    assert (tmp_path / "shards" / INDEX).is_file()
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever happens, loading changes no default and leaves no module on the meta device."""
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_map(folder: Path, value: Any) -> None:
    """Puts `value` in place of one shard's name."""
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = value
    (folder / INDEX).write_text(json.dumps(index))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# what loads


@pytest.mark.parametrize(
    "options",
    [{}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}, {"use_safetensors": True}, {"check_finite": True}],
    ids=str,
)
def test_a_saved_model_loads_bit_for_bit(folder: Path, shards: Path, options: dict[str, Any]) -> None:
    one, other = Net.from_pretrained(folder, **options), Net.from_pretrained(str(shards), **options)
    torch.manual_seed(0)
    assert same(one, Net()) and same(other, one)
    assert one.config._name_or_path == str(folder) and not one.training


def test_a_subfolder_a_variant_a_dtype_and_the_loading_info_are_those_asked_for(folder: Path) -> None:
    net = Net.from_pretrained(folder)
    net.half().save_pretrained(folder, variant="fp16")
    (folder / WEIGHTS).unlink()
    loaded, info = Net.from_pretrained(
        folder.parent, subfolder="net", variant="fp16", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert loaded.dtype == torch.bfloat16 and info["missing_keys"] == []
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors.*found.*fp16"):
        Net.from_pretrained(folder)


def test_a_sharded_variant_loads(folder: Path) -> None:
    net = Net.from_pretrained(folder).half()
    net.save_pretrained(folder.parent / "fp16", variant="fp16", max_shard_size=300)
    assert same(Net.from_pretrained(folder.parent / "fp16", variant="fp16", torch_dtype=torch.float16), net)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names_and_shapes_load_as_the_new_ones(folder: Path, convolutions: bool) -> None:
    new = Net.from_pretrained(folder)

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for then, now in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            for leaf in ("weight", "bias"):
                value = tensors.pop(f"attention.{now}.{leaf}")
                shape = (*value.shape, 1, 1) if convolutions and leaf == "weight" else value.shape
                tensors[f"attention.{then}.{leaf}"] = value.reshape(shape)

    edit_weights(folder, age)
    assert same(Net.from_pretrained(folder), new)
    assert same(Net.from_pretrained(folder, low_cpu_mem_usage=False), new)


def test_a_key_that_the_class_lists_may_be_there(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update(position_ids=torch.arange(3)))
    Net.from_pretrained(folder)


def test_values_that_override_the_config_are_checked_with_it(folder: Path) -> None:
    assert Net.from_pretrained(folder, table=5).waves.shape == (5,)
    with pytest.raises(ValueError, match=r"2 tensors missing:\s+layers.3.bias\s+layers.3.weight"):
        Net.from_pretrained(folder, num_layers=4)


# what does not


def test_missing_unknown_and_misshapen_keys_are_all_listed_before_anything_loads(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.weight"], tensors["layers.1.bias"]
        tensors["extra.weight"] = torch.zeros(1)
        tensors["layers.2.weight"] = torch.zeros(8, 9)
        tensors["layers.2.bias"] = torch.zeros(8, dtype=torch.int64)

    edit_weights(folder, spoil)
    with pytest.raises(ValueError) as caught:
        Net.from_pretrained(folder)
    text = str(caught.value)
    assert str(folder / WEIGHTS) in text
    for part in (
        "2 tensors missing",
        "layers.0.weight",
        "layers.1.bias",
        "1 tensors unknown",
        "extra.weight",
        "layers.2.weight: [8, 9], expected [8, 8]",
        "layers.2.bias: of type torch.int64",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "Other"}, "the config of a Other, expected a Net"),
        ({"num_layers": -3}, "negative numbers:\n    num_layers=-3"),
        ({"num_layers": 10**9}, "num_layers=1000000000"),
        ({"width": 320_000}, r"expected \[320000, 320000\]"),
        ({"width": 10**12}, "no Net can be made of it"),
        ({"width": "wide"}, "no Net can be made of it"),
        ({"table": 10**11}, "tables of 100,000,000,000 numbers"),
    ],
    ids=str,
)
def test_an_absurd_config_fails_fast_and_takes_no_memory(folder: Path, config: dict[str, Any], message: str) -> None:
    edit_config(folder, **config)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        Net.from_pretrained(folder)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_an_unreadable_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        Net.from_pretrained(folder)


def truncate(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:
    return data + b"\0"


def cut_in_header(data: bytes) -> bytes:
    return data[:40]


def huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**63) + data[8:]


def not_json(data: bytes) -> bytes:
    return data[:8] + b"}" + data[9:]


def header(content: Any) -> bytes:
    raw = json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated"),
        (lengthen, "longer than its header says"),
        (cut_in_header, "not a whole safetensors file"),
        (huge_header, "not a whole safetensors file"),
        (not_json, "header is corrupt"),
        (lambda data: b"", "0 bytes"),
        (lambda data: b"PK\x03\x04" + data, "pickled"),
        (lambda data: b"\x80\x02" + data, "weights_only=True"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (lambda data: b"<!DOCTYPE html><html></html>", "a web page"),
        (lambda data: header([]), "header is corrupt"),
        (lambda data: header({"a": 3}), "'a' is not a tensor"),
        (lambda data: header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}), "wrong shape"),
        (lambda data: header({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 1]}}), "type 'Q4'"),
        (lambda data: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1]}}) + b"1", "has 1 bytes"),
        (lambda data: header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}) + b"12", "expected 0"),
    ],
)
@pytest.mark.parametrize("which", ["folder", "shards"])
def test_a_damaged_file_is_named(
    which: str, spoil: Callable[[bytes], bytes], message: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        Net.from_pretrained(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", [f"{NAME}.bin", f"{NAME}.ckpt", "model.pt"])
def test_pickled_weights_are_refused_and_the_way_to_convert_them_is_told(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(
        ValueError, match=r"(?s)only pickled weights.*torch.load\(.*weights_only=True.*save_file"
    ) as caught:
        Net.from_pretrained(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("options", [{"use_safetensors": False}, {"use_flashpack": True}], ids=str)
def test_asking_for_other_formats_is_refused(folder: Path, options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="safetensors only"):
        Net.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "name", ["../net/x.safetensors", "/etc/passwd", "..", "", 7, None, ["a"], "C:x.safetensors", "a\\b.safetensors"]
)
def test_a_weight_map_that_leads_elsewhere_is_refused(shards: Path, name: Any) -> None:
    edit_map(shards, name)
    with pytest.raises(ValueError, match="plain file name in the same folder") as caught:
        Net.from_pretrained(shards)
    assert str(shards / INDEX) in str(caught.value)


def test_a_shard_that_links_out_of_the_folder_is_refused(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[0]
    shard.rename(shards.parent / "outside.safetensors")
    shard.symlink_to(shards.parent / "outside.safetensors")
    with pytest.raises(ValueError, match="a link out of the folder"):
        Net.from_pretrained(shards)


def test_the_links_of_the_hubs_cache_are_taken(shards: Path) -> None:
    snapshot = shards.parent / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(shards, snapshot)
    (shards.parent / "models--a--b" / "blobs").mkdir()
    for shard in snapshot.glob("*.safetensors"):
        blob = shard.rename(shards.parent / "models--a--b" / "blobs" / shard.name)
        shard.symlink_to(blob)
    Net.from_pretrained(snapshot)


def test_a_missing_shard_and_a_map_that_disagrees_are_named(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[0]
    hidden = shard.rename(shard.with_suffix(".hidden"))
    with pytest.raises(FileNotFoundError, match=f"names '{shard.name}', which is not in the folder"):
        Net.from_pretrained(shards)
    hidden.rename(shard)
    key, where = next(iter(json.loads((shards / INDEX).read_text())["weight_map"].items()))
    edit_map(shards, next(path.name for path in sorted(shards.glob("*.safetensors")) if path.name != where))
    with pytest.raises(ValueError, match=f"(?s)2 entries disagree with the shards.*{key}: in {where}"):
        Net.from_pretrained(shards)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_where_asked_for(folder: Path, value: float) -> None:
    edit_weights(folder, lambda tensors: tensors["layers.1.weight"].fill_(value))
    Net.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinite weights:\s+layers.1.weight"):
        Net.from_pretrained(folder, check_finite=True)


def test_the_header_tells_what_the_safetensors_library_reads(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    headers = read_header(folder / WEIGHTS)
    assert {name: (entry.shape, entry.dtype) for name, entry in headers.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert read_checkpoint(folder).tensors == headers


def test_one_broken_component_of_a_pipeline_is_found_before_any_loads(folder: Path, shards: Path) -> None:
    home = folder.parent
    classes = {"net": Net, "shards": Net}
    check_pipeline_folder(home, classes)
    check_pipeline_folder(home, classes, variant="fp16")
    (home / "text").mkdir()
    (home / "text" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(9)}, home / "text" / "model.safetensors")
    check_pipeline_folder(home, {**classes, "text": nn.Module})
    for name in ("text/model.safetensors", f"net/{WEIGHTS}"):
        data = (home / name).read_bytes()
        (home / name).write_bytes(data[:-1])
        with pytest.raises(ValueError, match="truncated"):
            check_pipeline_folder(home, {**classes, "text": nn.Module})
        (home / name).write_bytes(data)
    edit_map(shards, "../x.safetensors")
    with pytest.raises(ValueError, match="weight_map"):
        check_pipeline_folder(home, classes)
    check_pipeline_folder(home, {**classes, "shards": None})
    (home / "model_index.json").write_text('{"unet": ["hubgen", "Net"]}')
    with pytest.raises(FileNotFoundError, match=r"unet: no such folder.*lists 'unet'"):
        check_pipeline_folder(home, {"unet": Net})
