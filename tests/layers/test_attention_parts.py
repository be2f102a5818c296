"""Parts of attention: what controls may change, see and add in a layer, in every family of backbones."""

from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor as DiffusersFluxAttnProcessor
from torch import nn

import hubgen
from hubgen.layers.attention import (
    Attention,
    AttentionCall,
    AttnProcessor,
    FluxAttnProcessor,
    JointAttnProcessor,
    Part,
)
from tests.parity import first_output, randomize_

B, TEXT = 3, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet() -> tuple[nn.Module, dict[str, Any]]:
    model = hubgen.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )
    inputs = {"sample": drawn(B, 4, 8, 8), "timestep": 7, "encoder_hidden_states": drawn(B, TEXT, 12, seed=1)}
    return model, inputs


def sd3(**config: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = hubgen.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 6,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            **config,
        }
    )
    inputs = {
        "hidden_states": drawn(B, 4, 8, 8),
        "encoder_hidden_states": drawn(B, TEXT, 12, seed=1),
        "pooled_projections": drawn(B, 6, seed=2),
        "timestep": torch.tensor([7.0, 300.0, 900.0]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = hubgen.FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 6, 6),
    )
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    inputs = {
        "hidden_states": drawn(B, 12, 8),
        "encoder_hidden_states": drawn(B, TEXT, 12, seed=1),
        "pooled_projections": drawn(B, 6, seed=2),
        "timestep": torch.tensor([0.1, 0.5, 0.9]),
        "img_ids": torch.stack([torch.zeros(12), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, inputs


def dit() -> tuple[nn.Module, dict[str, Any]]:
    model = hubgen.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=5
    )
    inputs = {
        "hidden_states": drawn(B, 4, 8, 8),
        "timestep": torch.tensor([7, 300, 900]),
        "class_labels": torch.tensor([0, 3, 5]),
    }
    return model, inputs


FAMILIES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "unet": unet,
    "sd3": sd3,
    "sd3.5": lambda: sd3(dual_attention_layers=(0, 1)),
    "flux": flux,
    "dit": dit,
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def built(family: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = FAMILIES[family]()
    return randomize_(model).eval(), inputs


@torch.no_grad()
def predicted(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return first_output(model(**inputs))


def put(model: nn.Module, *parts: Part, names: Iterable[str] | None = None) -> None:
    """Gives the named layers, by default all, these parts."""
    for name, processor in model.attn_processors.items():
        if names is None or name in names:
            processor.parts = parts


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * expected.std()


class Maps(Part):
    """Looks at the maps and leaves them."""

    wants_maps = True

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []

    def maps(self, call: AttentionCall, probabilities: torch.Tensor) -> torch.Tensor:
        self.sums.append(probabilities.sum(dim=-1))
        return probabilities


class Swap(Part):
    """Gives every other row of the batch the queries and keys of the first."""

    def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return query[:1].expand_as(query), key[:1].expand_as(key), value


class Backwards(Part):
    """Keys and values in reverse order."""

    def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return query, key.flip(1), value.flip(1)


class Decoupled(Part):
    """IP-Adapter (2308.06721, eq. 5): attention to tokens of its own, added to the layer's."""

    def __init__(self, to_k: nn.Module, to_v: nn.Module, tokens: torch.Tensor, scale: float = 1.0):
        self.to_k, self.to_v, self.tokens, self.scale = to_k, to_v, tokens, scale

    def query(self, call: AttentionCall) -> torch.Tensor:
        return call.projected[0]

    def key(self, key: torch.Tensor) -> torch.Tensor:
        return key

    def added(self, call: AttentionCall) -> torch.Tensor:
        key, value = (
            layer(self.tokens).unflatten(-1, (call.attn.heads, -1)).transpose(1, 2) for layer in (self.to_k, self.to_v)
        )
        query = self.query(call).transpose(1, 2)
        return self.scale * F.scaled_dot_product_attention(query, self.key(key), value).transpose(1, 2).flatten(2)


@every_family
def test_a_part_that_does_nothing_changes_not_one_bit(family: str) -> None:
    model, inputs = built(family)
    plain = predicted(model, inputs)
    put(model, Part(), Part())
    assert torch.equal(predicted(model, inputs), plain)
    put(model)
    assert torch.equal(predicted(model, inputs), plain)


@every_family
def test_attention_by_its_maps_is_attention(family: str) -> None:
    model, inputs = built(family)
    plain, looking = predicted(model, inputs), Maps()
    put(model, looking)
    assert_close(predicted(model, inputs), plain)
    assert len(looking.sums) == len(model.attn_processors)
    assert all(torch.allclose(total, torch.ones(())) for total in looking.sums)


@pytest.mark.parametrize("boolean", [False, True])
def test_attention_by_its_maps_obeys_a_mask(boolean: bool) -> None:
    attention = Attention(8, heads=2, dim_head=4)
    x, context = drawn(2, 4, 8), drawn(2, 5, 8, seed=1)
    mask = torch.tensor([True, True, True, False, False])[None, None].expand(2, 1, 5)
    if not boolean:
        mask = torch.where(mask, 0.0, -10000.0)
    plain = attention(x, context, attention_mask=mask)
    attention.processor.parts = (Maps(),)
    torch.testing.assert_close(attention(x, context, attention_mask=mask), plain)


@every_family
def test_the_order_of_keys_does_not_matter(family: str) -> None:
    model, inputs = built(family)
    plain = predicted(model, inputs)
    put(model, Backwards())
    assert_close(predicted(model, inputs), plain)


@every_family
def test_queries_and_keys_of_the_first_row_change_the_other_rows_alone(family: str) -> None:
    """What prompt-to-prompt does with MM-DiTs (2508.07519)."""
    model, inputs = built(family)
    plain = predicted(model, inputs)
    put(model, Swap())
    swapped = predicted(model, inputs)
    assert torch.equal(swapped[0], plain[0])
    assert (swapped[1:] - plain[1:]).abs().amax(dim=(-1, -2)).min() > 1e-3 * plain.std()


def test_keys_and_values_of_the_first_row_are_the_first_prompt() -> None:
    class FirstPrompt(Part):
        def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
            return query, key[:1].expand_as(key), value[:1].expand_as(value)

    model, inputs = built("unet")
    prompt = inputs["encoder_hidden_states"]
    expected = predicted(model, {**inputs, "encoder_hidden_states": prompt[:1].expand_as(prompt)})
    put(model, FirstPrompt(), names=[name for name in model.attn_processors if ".attn2." in name])
    assert_close(predicted(model, inputs), expected)


def test_parts_act_in_their_order() -> None:
    class Doubled(Part):
        def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
            return query, key, 2 * value

        def added(self, call: AttentionCall) -> torch.Tensor:
            return torch.ones(())[None, None, None].expand(2, 6, 8)

    class Shifted(Doubled):
        def edit(self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
            return query, key, value + 1

    attention, x = Attention(8, heads=2, dim_head=4), drawn(2, 6, 8)
    attended: list[torch.Tensor] = []
    attention.to_out[0].register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    attention(x)
    for parts, expected in (
        ((Doubled(), Shifted()), lambda y: 2 * y + 1),
        ((Shifted(), Doubled()), lambda y: 2 * y + 2),
    ):
        attention.processor.parts = parts
        attention(x)  # rows of a map add up to 1, so that what is added to the values comes out again
        torch.testing.assert_close(attended[-1], expected(attended[0]) + 2)  # and 1 by each part


@every_family
def test_what_is_added_before_the_output_is_decoupled_attention(family: str) -> None:
    model, inputs = built(family)
    plain = predicted(model, inputs)
    tokens = drawn(B, 4, 10, seed=4)
    for module in model.modules():
        if isinstance(module, Attention):
            to_k, to_v = (randomize_(nn.Linear(10, module.inner_dim), seed) for seed in (1, 2))
            module.processor.parts = (Decoupled(to_k, to_v, tokens),)
    with_adapter = predicted(model, inputs)
    assert (with_adapter - plain).abs().max() > 1e-2 * plain.std()

    # one layer by hand
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    x = drawn(B, 6, attention.query_dim, seed=5)
    context = drawn(B, TEXT, attention.added_kv_proj_dim, seed=6) if attention.added_kv_proj_dim else None
    attended: list[torch.Tensor] = []
    attention.to_out[0].register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    (part,) = attention.processor.parts
    attention(x, context)
    attention.processor.parts = ()
    attention(x, context)
    query = attention.to_q(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key, value = (
        layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for layer in (part.to_k, part.to_v)
    )
    probabilities = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)
    torch.testing.assert_close(attended[0], attended[1] + (probabilities @ value).transpose(1, 2).flatten(2))


def test_decoupled_attention_is_that_of_diffusers_ip_adapter() -> None:
    attention = Attention(16, 12, heads=2, dim_head=8)
    x, context, tokens = drawn(2, 7, 16), drawn(2, 5, 12, seed=1), drawn(2, 4, 12, seed=2)
    theirs = randomize_(IPAdapterAttnProcessor2_0(16, 12, num_tokens=(4,), scale=0.7))
    attention.processor.parts = (Decoupled(theirs.to_k_ip[0], theirs.to_v_ip[0], tokens, scale=0.7),)
    ours = attention(x, context)
    torch.testing.assert_close(ours, theirs(attention, x, (context, [tokens])))


def test_decoupled_joint_attention_is_that_of_diffusers_ip_adapter_for_sd3() -> None:
    theirs = randomize_(SD3IPAdapterJointAttnProcessor2_0(16, 12, head_dim=8, timesteps_emb_dim=6, scale=0.7))

    class SD3Adapter(Part):
        def added(self, call: AttentionCall) -> torch.Tensor:
            query, key, value = call.projected
            normed = theirs.norm_ip(tokens, temb=temb)
            own_key, own_value = (
                layer(normed).unflatten(-1, (call.attn.heads, -1)) for layer in (theirs.to_k_ip, theirs.to_v_ip)
            )
            key = torch.cat([theirs.norm_k(key), theirs.norm_ip_k(own_key)], dim=1)
            value = torch.cat([value, own_value], dim=1)
            query, key, value = (y.transpose(1, 2) for y in (theirs.norm_q(query), key, value))
            return 0.7 * F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    attention = randomize_(Attention(16, heads=2, dim_head=8, bias=True, qk_norm="rms_norm", added_kv_proj_dim=16))
    x, text, tokens, temb = drawn(2, 7, 16), drawn(2, 5, 16, seed=1), drawn(2, 4, 12, seed=2), drawn(2, 6, seed=3)
    attention.processor.parts = (SD3Adapter(),)
    expected = theirs(attention, x, text, ip_hidden_states=tokens, temb=temb)
    for actual, other in zip(attention(x, text), expected, strict=True):
        torch.testing.assert_close(actual, other)


def test_what_is_added_after_the_mlp_is_diffusers_ip_adapter_for_flux() -> None:
    class FluxAdapter(Decoupled):
        where = "after_mlp"

        def query(self, call: AttentionCall) -> torch.Tensor:
            return call.query

    model, inputs = built("flux")
    tokens, adapters = drawn(B, 4, 10, seed=4), {}
    double = [name for name in model.attn_processors if name.startswith("transformer_blocks")]
    for seed, name in enumerate(double):
        adapters[name] = randomize_(FluxIPAdapterAttnProcessor(32, 10, num_tokens=(4,), scale=0.7), seed)
        part = FluxAdapter(adapters[name].to_k_ip[0], adapters[name].to_v_ip[0], tokens, scale=0.7)
        put(model, part, names=[name])
    ours = predicted(model, inputs)
    put(model)
    model.set_attn_processor({**model.attn_processors, **adapters})
    with_theirs = predicted(model, {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [tokens]}})
    assert_close(ours, with_theirs)


def test_parts_of_a_single_block_know_the_image_from_the_text() -> None:
    class Loud(Part):
        def added(self, call: AttentionCall) -> torch.Tensor:
            assert call.text == slice(0, TEXT)
            return torch.ones_like(call.query).flatten(2)

    block = randomize_(built("flux")[0].single_transformer_blocks[0])
    x, text, temb = drawn(2, 12, 32), drawn(2, TEXT, 32, seed=1), drawn(2, 32, seed=2)
    plain_text, plain_image = block(x, text, temb)
    block.attn.processor.parts = (Loud(),)
    loud_text, loud_image = block(x, text, temb)
    assert torch.equal(loud_text, plain_text)
    assert ((loud_image - plain_image).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("family", "layer", "where"),
    [
        ("unet", "attn2", "after_mlp"),
        ("dit", "attn1", "after_mlp"),
        ("sd3.5", "attn2", "after_mlp"),
        ("flux", "single_transformer_blocks", "after_out"),
    ],
)
def test_a_place_that_a_layer_does_not_have_is_refused(family: str, layer: str, where: str) -> None:
    class Misplaced(Part):
        pass

    Misplaced.where = where
    model, inputs = built(family)
    put(model, Misplaced(), names=[name for name in model.attn_processors if layer in name])
    with pytest.raises(ValueError, match=rf"`where`: got '{where}', expected one of \('before_out'"):
        predicted(model, inputs)


@every_family
def test_parts_pass_gradients_on(family: str) -> None:
    model, inputs = built(family)
    put(model, Maps(), Backwards())
    first_output(model(**inputs)).square().mean().backward()
    by_maps = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    put(model)
    first_output(model(**inputs)).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(by_maps[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_keywords_of_the_joint_attention_do_not_reach_the_second_one() -> None:
    class Noted(JointAttnProcessor):
        def __call__(self, *args: Any, note: str = "", **kwargs: Any) -> Any:
            notes.append(note)
            return super().__call__(*args, **kwargs)

    notes: list[str] = []
    model, inputs = built("sd3.5")
    plain = predicted(model, inputs)
    own = {name: p if ".attn2." in name else Noted() for name, p in model.attn_processors.items()}
    model.set_attn_processor(own)
    assert torch.equal(predicted(model, {**inputs, "joint_attention_kwargs": {"note": "seen"}}), plain)
    assert notes == ["seen"] * 3


# our processors on diffusers' layers; the other way round stands in test_attention.py and in the backbones' tests


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cross_attention_dim", [None, 12])
def test_our_processor_computes_for_diffusers_attention(cross_attention_dim: int | None, fused: bool) -> None:
    attention = randomize_(DiffusersAttention(16, cross_attention_dim, heads=2, dim_head=8))
    x, context = drawn(2, 7, 16), None if cross_attention_dim is None else drawn(2, 5, 12, seed=1)
    attention.set_processor(AttnProcessor2_0())
    expected = attention(x, context)
    attention.set_processor(AttnProcessor())
    if fused:
        attention.fuse_projections()
    torch.testing.assert_close(attention(x, context), expected)


def test_our_joint_processor_computes_for_diffusers_attention() -> None:
    attention = DiffusersAttention(
        16, heads=2, dim_head=8, added_kv_proj_dim=16, context_pre_only=False, bias=True, qk_norm="rms_norm", out_dim=16
    )
    attention = randomize_(attention)
    x, text = drawn(2, 7, 16), drawn(2, 5, 16, seed=1)
    attention.set_processor(JointAttnProcessor2_0())
    expected = attention(x, text)
    attention.set_processor(JointAttnProcessor())
    for actual, other in zip(attention(x, text), expected, strict=True):
        torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("single", [False, True])
def test_our_flux_processor_computes_for_diffusers_attention(single: bool) -> None:
    changes = {"pre_only": True} if single else {"added_kv_proj_dim": 16, "context_pre_only": False}
    attention = randomize_(FluxAttention(16, heads=2, dim_head=8, bias=True, eps=1e-6, **changes))
    x, text = drawn(2, 7, 16), None if single else drawn(2, 5, 16, seed=1)
    attention.set_processor(DiffusersFluxAttnProcessor())
    expected = attention(x, text)
    attention.set_processor(FluxAttnProcessor())
    actual = attention(x, text)
    for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_parts_work_in_diffusers_own_unet() -> None:
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    model, (_, inputs) = randomize_(diffusers.UNet2DConditionModel(**config)).eval(), unet()
    plain, looking = predicted(model, inputs), Maps()
    model.set_attn_processor(AttnProcessor())
    put(model, looking)
    assert_close(predicted(model, inputs), plain)
    assert len(looking.sums) == len(model.attn_processors)
