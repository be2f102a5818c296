"""Files of IP-Adapters: told apart by their keys, refused by their keys, written as they were read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubgen.controls.image_attention import Adapter, network_of
from hubgen.formats.ip_adapter_files import LAYOUTS, read_ip_adapter, write_ip_adapter
from tests import models
from tests.ip_adapter_weights import tensors

BACKBONES = {"sd3": "SD 3.5", "xlabs": "FLUX.1 dev", "instantx": "FLUX.1 dev"}
"""Of layouts that are for no U-Net"""


def of(layout: str) -> dict[str, torch.Tensor]:
    return tensors(layout, models.NETWORKS[BACKBONES.get(layout, "SD 1.x")].fresh())


def nested(flat: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As in a .bin file."""
    parts: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in flat.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    return parts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_told_by_its_keys_and_written_as_it_was(layout: str, tmp_path: Path) -> None:
    given = of(layout)
    save_file(given, tmp_path / "a.safetensors")
    found = read_ip_adapter(tmp_path / "a.safetensors")
    assert found.layout == layout
    assert bool(found.lora) == (layout == "faceid")
    network_of(found)
    Adapter.read(given).save(tmp_path / "b.safetensors")
    write_ip_adapter(found, tmp_path / "c.safetensors")
    for name in ("b", "c"):
        again = load_file(tmp_path / f"{name}.safetensors")
        assert again.keys() == given.keys() and all(torch.equal(again[key], given[key]) for key in given)
    if layout != "xlabs":
        torch.save(nested(given), tmp_path / "a.bin")
        pickled = read_ip_adapter(tmp_path / "a.bin")
        assert pickled.layout == layout and pickled.tensors.keys() == found.tensors.keys()
        assert pickled.lora.keys() == found.lora.keys()


def test_an_adapter_of_dit_has_the_base_layout_with_every_attention() -> None:
    found = read_ip_adapter(tensors("base", models.NETWORKS["DiT"].fresh()))
    assert found.layout == "base" and list(found.layers()) == [0, 1, 2]


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_pickles_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"image_proj": {"x": Evil()}}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match=r"evil.bin: not a pickle of weights alone"):
        read_ip_adapter(tmp_path / "evil.bin")
    assert "code ran" not in capsys.readouterr().out


def changed(given: dict[str, torch.Tensor], *without: str, **added: Any) -> dict[str, Any]:
    found: dict[str, Any] = {key: value for key, value in given.items() if not key.startswith(without or ("?",))}
    return found | {key.replace("__", "."): value for key, value in added.items()}


def test_other_keys_are_refused_the_first_five_by_name_with_their_count(tmp_path: Path) -> None:
    base, plus, one = of("base"), of("plus"), torch.zeros(3, 3)
    many = {f"ip_adapter__{n}__to_q_ip__weight": one for n in (1, 3, 5, 7)}
    cases: list[tuple[dict[str, Any], str]] = [
        (changed(base, unet__conv_in=one), "1 keys are not those of an IP-Adapter:\n    unet.conv_in: unknown"),
        (changed(base, "ip_adapter."), r"ip_adapter\.\*: missing"),
        (changed(base, "image_proj.proj."), "`image_proj`: got 2 keys of no known layout"),
        (changed(base, "image_proj.norm.weight"), "image_proj.norm.weight: missing"),
        (changed(base, "image_proj.norm.bias"), "image_proj.norm.bias: missing"),
        (changed(base, "ip_adapter.1.to_v_ip"), "ip_adapter.1.to_v_ip.weight: missing"),
        (changed(base, "ip_adapter.1.to_k_ip"), "ip_adapter.1.to_k_ip.weight: missing"),
        (changed(base, ip_adapter__x__to_k_ip__weight=one), "ip_adapter.x.to_k_ip.weight: without a number"),
        (changed(base, ip_adapter__1__to_k_ip__weight=one), "for 3 features, expected 16, those of `image_proj`"),
        (changed(base, ip_adapter__1__to_v_ip__weight=one), r"of shape \[3, 3\], expected \[8, 16\]"),
        (changed(base, ip_adapter__1__to_k_lora__down__weight=one), "to_k_lora.down.weight: unknown"),
        (changed(plus, "image_proj.layers.1.0.norm1"), "2 keys .*\n    image_proj.layers.1.0.norm1.weight: missing"),
        (changed(plus, "image_proj.layers.0"), "image_proj.layers.0.0.to_q.weight: missing"),
        (
            changed(base, **many, ip_adapter__9__a=one, ip_adapter__1__b=one),
            r"missing|7 keys .*(\n.*){5}\n    \.\.\. and",
        ),
        (changed(base, image_proj__perceiver_resampler__latents=one), "FaceID-Plus"),
        (changed(base, image_proj__proj__weight="text"), "image_proj.proj.weight: no tensor, str"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            Adapter.read(given)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.bin"):
        with pytest.raises(FileNotFoundError, match=name):
            read_ip_adapter(tmp_path / name)
    save_file(of("base"), tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"cut.safetensors: the file is truncated"):
        read_ip_adapter(tmp_path / "cut.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match=r"list.bin: got list, expected tensors by name"):
        read_ip_adapter(tmp_path / "list.bin")
