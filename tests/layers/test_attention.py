"""Attention: what its processors compute, and how they are reached."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model

from hubgen.layers.attention import (
    Attention,
    AttnProcessor,
    FluxAttnProcessor,
    JointAttnProcessor,
    SpatialAttention,
    project,
)


def with_weights_of(theirs: torch.nn.Module, ours: torch.nn.Module) -> torch.nn.Module:
    """`ours` with the weights of `theirs`, of which none keeps its first value."""
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-5 * theirs.std()


@pytest.mark.parametrize("cross_attention_dim", [None, 10])
def test_attention_agrees_with_diffusers(cross_attention_dim: int | None) -> None:
    theirs = DiffusersAttention(16, cross_attention_dim, heads=4, dim_head=8, processor=AttnProcessor2_0())
    ours = with_weights_of(theirs, Attention(16, cross_attention_dim, heads=4, dim_head=8))
    x = torch.randn(2, 7, 16)
    context = None if cross_attention_dim is None else torch.randn(2, 5, cross_attention_dim)
    assert_agree(ours(x, context), theirs(x, context))


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("context_pre_only", [False, True])
def test_joint_attention_agrees_with_diffusers(qk_norm: str | None, context_pre_only: bool) -> None:
    shared = {
        "query_dim": 16,
        "heads": 2,
        "dim_head": 8,
        "bias": True,
        "added_kv_proj_dim": 16,
        "context_pre_only": context_pre_only,
        "qk_norm": qk_norm,
        "eps": 1e-6,
    }
    theirs = DiffusersAttention(**shared, out_dim=16, processor=JointAttnProcessor2_0())
    ours = with_weights_of(theirs, Attention(**shared))
    x, text = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    our_image, our_text = ours(x, text)
    their_image, their_text = theirs(x, text)
    assert_agree(our_image, their_image)
    if not context_pre_only:  # otherwise nobody reads the text's features, and the two have different widths
        assert_agree(our_text, their_text)


def test_attention_with_one_key_returns_its_value() -> None:
    attention = Attention(8, heads=2, dim_head=4)
    x = torch.randn(3, 5, 8)
    only = torch.randn(3, 1, 8)
    value = attention.to_out[0](attention.to_v(only))
    torch.testing.assert_close(attention(x, only), value.expand(3, 5, 8))


def test_attention_to_itself_moves_with_its_tokens() -> None:
    attention = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm")
    x, order = torch.randn(1, 6, 8), torch.randperm(6)
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]))


def test_joint_attention_without_text_is_attention() -> None:
    attention = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm")
    x = torch.randn(2, 6, 8)
    plain = attention(x)
    attention.set_processor(JointAttnProcessor())
    torch.testing.assert_close(attention(x), plain)


def test_a_masked_key_is_not_seen() -> None:
    attention = Attention(8, heads=2, dim_head=4)
    x, context = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([True, True, True, False, False])[None, None, None]  # broadcast over batch, heads and queries
    torch.testing.assert_close(attention(x, context, attention_mask=mask), attention(x, context[:, :3]))


def test_qk_norm_makes_attention_blind_to_the_length_of_queries_and_keys() -> None:
    attention = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm", eps=0)
    x = torch.randn(2, 6, 8)
    before = attention(x)
    with torch.no_grad():
        attention.to_q.weight *= 7
        attention.to_k.weight *= 3
    torch.testing.assert_close(attention(x), before)


def test_spatial_attention_agrees_with_diffusers() -> None:
    theirs = DiffusersAttention(
        16,
        heads=1,
        dim_head=16,
        norm_num_groups=4,
        eps=1e-6,
        bias=True,
        residual_connection=True,
        processor=AttnProcessor2_0(),
    )
    ours = with_weights_of(theirs, SpatialAttention(16, groups=4))
    x = torch.randn(2, 16, 3, 5)
    assert_agree(ours(x), theirs(x))


def test_a_processor_may_be_any_callable_and_gets_the_keywords() -> None:
    class Doubled(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, factor=1.0):
            return factor * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    attention = Attention(8, heads=2, dim_head=4)
    x = torch.randn(2, 6, 8)
    plain = attention(x)
    attention.set_processor(Doubled())
    torch.testing.assert_close(attention(x, factor=2.0), 2 * plain)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_every_backend_computes_the_same(backend: str) -> None:
    attention = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm")
    x = torch.randn(2, 6, 8)
    q, k, v = project(attention, x)
    q, k, v = (y.transpose(1, 2) for y in (attention.norm_q(q), attention.norm_k(k), v))
    by_hand = F.softmax(q @ k.mT / 2, dim=-1) @ v  # the root of 4 features is 2
    expected = attention.to_out[0](by_hand.transpose(1, 2).flatten(2))
    attention.set_attention_backend(backend)
    torch.testing.assert_close(attention(x), expected)


def test_training_in_bfloat16_on_a_cpu_agrees_with_the_kernel_of_that_precision() -> None:
    attention = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm").to(torch.bfloat16)
    x = torch.randn(2, 6, 8).bfloat16()
    trained = attention(x)  # computed in float32
    assert trained.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(trained, attention(x), rtol=0, atol=2e-2)


@pytest.mark.filterwarnings("error")
def test_autocast_reaches_queries_keys_and_their_norms_without_a_warning() -> None:
    attention = Attention(8, heads=2, dim_head=4, qk_norm="rms_norm", added_kv_proj_dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = attention(torch.randn(2, 6, 8), torch.randn(2, 3, 8))
    assert image.dtype == text.dtype == torch.bfloat16
    (image.float().sum() + text.float().square().sum()).backward()
    assert {parameter.grad.dtype for parameter in attention.parameters()} == {torch.float32}


def test_an_unknown_qk_norm_is_named() -> None:
    with pytest.raises(ValueError, match=r"`qk_norm`: got 'layer_norm', expected 'rms_norm' or None"):
        Attention(8, heads=2, dim_head=4, qk_norm="layer_norm")


def test_joint_attention_is_the_same_in_any_order_of_its_tokens() -> None:
    attention = Attention(16, heads=2, dim_head=8, bias=True, qk_norm="rms_norm", added_kv_proj_dim=16)
    x, text = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    text_last = attention(x, text)
    attention.set_processor(FluxAttnProcessor())
    for first, last in zip(attention(x, text), text_last, strict=True):
        torch.testing.assert_close(first, last, rtol=1e-5, atol=1e-5)


def fusable(kind: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    x, text = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    if kind == "spatial":
        return SpatialAttention(16, groups=4), (torch.randn(2, 16, 3, 3),)
    if kind == "self":
        return Attention(16, heads=2, dim_head=8), (x,)
    if kind == "cross":
        return Attention(16, 16, heads=2, dim_head=8), (x, text)
    return Attention(16, heads=2, dim_head=8, bias=True, qk_norm="rms_norm", added_kv_proj_dim=16), (x, text)


def asked(attention: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    outputs = attention(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("kind", ["spatial", "self", "cross", "joint"])
def test_fused_projections_compute_what_separate_ones_do(kind: str) -> None:
    attention, inputs = fusable(kind)
    keys, expected = set(attention.state_dict()), asked(attention, inputs)
    attention.fuse_projections()
    separate = []
    for name in ("to_k", "to_v", "add_q_proj"):
        if getattr(attention, name, None) is not None:
            getattr(attention, name).register_forward_hook(lambda *_: separate.append(1))
    for fused, plain in zip(asked(attention, inputs), expected, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert not separate
    attention.unfuse_projections()
    assert set(attention.state_dict()) == keys
    for unfused, plain in zip(asked(attention, inputs), expected, strict=True):
        assert torch.equal(unfused, plain)


def test_an_adapter_takes_effect_whether_it_comes_before_or_after_the_fusion() -> None:
    lora = LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
    attention, inputs = fusable("joint")
    attention.fuse_projections()
    (plain, _) = attention(*inputs)
    inject_adapter_in_model(lora, attention)
    (adapted, _) = attention(*inputs)
    assert (adapted - plain).abs().max() > 1e-3
    attention.unfuse_projections()
    torch.testing.assert_close(attention(*inputs)[0], adapted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"got adapters on \['to_v'\], expected plain layers"):
        attention.fuse_projections()
