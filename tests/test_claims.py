"""The benchmarks of claims: their measure is right, cells are alike where they should be, and the rule is kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.conditioning.families import family_of
from hubgen.training import train_text_to_image
from hubgen.training.kit.parse import parse_settings
from tests import models
from tests.benchmarks import autoencoders, claims, formulations
from tests.benchmarks.cross_attention_dit import CrossAttentionDiT
from tests.benchmarks.formulations import Bench, Cell, Directions, Gaussian, Network
from tests.parity import randomize_
from tests.training.conftest import draw_pictures

LATENTS = {"side": 8, "channels": 16, "tokens": 384, "pooled": 384}
"""Of the bundled autoencoder and the text encoder"""
SMALL = {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
TINY = Network(formulations.MMDIT.cls, {**SMALL, "qk_norm": "rms_norm"})


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The measure


def test_the_distance_of_equal_sets_is_zero() -> None:
    points = drawn(40, 5)
    assert Gaussian.of(points).distance(Gaussian.of(points.flip(0))) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_gaussians_whose_axes_agree_is_that_of_their_means_and_deviations() -> None:
    turn = torch.linalg.qr(drawn(4, 4)).Q
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.25]).double(), torch.tensor([4.0, 1.0, 1.0, 0.0]).double()
    moved = torch.tensor([1.0, 0.0, -2.0, 0.0]).double()
    ours, theirs = (turn @ torch.diag(variances) @ turn.T for variances in (first, second))
    expected = moved.square().sum() + (first.sqrt() - second.sqrt()).square().sum()  # 5 + 1 + 1 + 4 + 0.25
    found = Gaussian(torch.zeros(4).double(), ours).distance(Gaussian(turn @ moved, theirs))
    assert found == pytest.approx(expected.item()) == pytest.approx(11.25)


def test_the_distance_is_the_same_both_ways() -> None:
    first, second = Gaussian.of(drawn(30, 4)), Gaussian.of(2 * drawn(30, 4, seed=1) + 1)
    assert first.distance(second) == pytest.approx(second.distance(first))


def test_the_error_of_a_distance_is_its_spread_over_other_pictures() -> None:
    real = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    sets = [1.3 * drawn(150, 3, seed=seed) + 0.5 for seed in range(60)]
    distances = torch.tensor([real.distance(Gaussian.of(points)) for points in sets])
    errors = torch.tensor([formulations.bootstrap_error(points, real, resamples=60) for points in sets])
    assert errors.mean() == pytest.approx(distances.std().item(), rel=0.2)
    covered = (distances - distances.mean()).abs() < 1.96 * errors
    assert covered.float().mean() > 0.88  # of 60 intervals of 95 %, 53 or more


def test_directions_hold_all_of_what_differs_in_so_many() -> None:
    plane = drawn(2, 20, seed=1)
    features, others = drawn(50, 2) @ plane + 3, (1.5 * drawn(40, 2, seed=2) + 0.3) @ plane + 3
    directions = Directions(features, dimensions=2)
    found = directions.distance(others)
    assert directions.kept == pytest.approx(1)
    assert found["distance"] == pytest.approx(Gaussian.of(features).distance(Gaussian.of(others)), rel=1e-4)
    assert found["interval_95"][0] < found["distance"] < found["interval_95"][1]


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def test_the_networks_that_are_compared_are_of_one_size() -> None:
    cells = {"rf/lognorm(0,1)": formulations.FORMULATIONS["rf/lognorm(0,1)"], **formulations.NETWORKS}
    built = {name: cell.network.build(**LATENTS) for name, cell in cells.items()}
    sizes = {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in built.items()}
    formulations.check_sizes(sizes)
    with pytest.raises(ValueError, match=r"other: got .* parameters, expected .* within 5 %"):
        formulations.check_sizes({**sizes, "other": round(1.06 * sizes["rf/lognorm(0,1)"])})


def test_all_formulations_see_the_same_noise_and_take_their_times_from_the_same_numbers() -> None:
    latents = drawn(8, 4, 2, 2).float()
    expected = torch.stack([torch.randn(4, 2, 2, generator=after_a_time(seed)) for seed in range(8)])
    shares = {}
    for name, cell in formulations.FORMULATIONS.items():
        objective = cell.learns()
        sample = objective.draw(latents, [torch.Generator().manual_seed(seed) for seed in range(8)])
        alpha, sigma = (one(sample.t)[:, None, None, None] for one in (objective.path.alpha, objective.path.sigma))
        assert torch.allclose((sample.x_t - alpha * latents) / sigma, expected, atol=1e-2), name
        shares[name] = objective.density.cdf(sample.t.double())
    assert torch.allclose(shares["rf"], shares["rf/lognorm(0,1)"], atol=1e-5)
    assert torch.allclose(shares["rf"], shares["rf/cosmap"], atol=1e-5)
    assert torch.allclose(shares["rf"], 1 - shares["rf/mode(1.29)"], atol=1e-5)  # its time falls as the number grows


def after_a_time(seed: int) -> torch.Generator:
    """A generator that has drawn the time."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(1, generator=generator, dtype=torch.float64)
    return generator


@pytest.fixture
def dit() -> CrossAttentionDiT:
    network: CrossAttentionDiT = Network(CrossAttentionDiT, SMALL).build(side=4, channels=4, tokens=6, pooled=5)
    randomize_(network)
    return network


def inputs(texts: int = 3) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": drawn(2, 4, 4, 4).float(),
        "encoder_hidden_states": drawn(2, texts, 6, seed=1).float(),
        "pooled_projections": drawn(2, 5, seed=2).float(),
        "timestep": torch.tensor([30.0, 700.0]),
    }


def test_cross_attention_does_not_look_at_padding(dit: CrossAttentionDiT) -> None:
    given = inputs()
    longer = {
        **given,
        "encoder_hidden_states": torch.cat([given["encoder_hidden_states"], torch.zeros(2, 4, 6)], dim=1),
    }
    assert torch.allclose(dit(**given).sample, dit(**longer).sample, atol=1e-5)


def test_cross_attention_reads_the_tokens(dit: CrossAttentionDiT) -> None:
    given = inputs()
    changed = given["encoder_hidden_states"].clone()
    changed[:, 2] += 1
    difference = dit(**given).sample - dit(**{**given, "encoder_hidden_states": changed}).sample
    assert (difference.abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_a_text_of_padding_alone_gives_no_nan(dit: CrossAttentionDiT) -> None:
    assert dit(**{**inputs(), "encoder_hidden_states": torch.zeros(2, 3, 6)}).sample.isfinite().all()


def test_gradients_come_to_all_parameters(dit: CrossAttentionDiT) -> None:
    dit(**inputs()).sample.square().mean().backward()
    assert [name for name, one in dit.named_parameters() if one.grad is None or not one.grad.any()] == []


def test_a_fresh_network_predicts_zero_and_is_called_as_an_mmdit() -> None:
    fresh = Network(CrossAttentionDiT, SMALL).build(side=4, channels=4, tokens=6, pooled=5)
    assert not fresh(**inputs()).sample.any()
    assert family_of(fresh).takes == {"tokens", "pooled"}


# ---------------------------------------------------------------------------------------------------------------------
# Cells, on a problem that takes seconds


@pytest.fixture(autouse=True)
def forgotten_precision() -> Iterator[None]:
    """Accelerate remembers the precision of the process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    draw_pictures(tmp_path / "data" / "train", 14)
    draw_pictures(tmp_path / "data" / "test", 4, first=14)
    models.vae(scaling_factor=0.9).save_pretrained(tmp_path / "autoencoder")
    models.tokenizer(max_length=16).save_pretrained(tmp_path / "text")
    models.text_encoder().save_pretrained(tmp_path / "text")
    return Bench(
        data=tmp_path / "data",
        work=tmp_path / "work",
        autoencoder=tmp_path / "autoencoder",
        text_encoder=str(tmp_path / "text"),
        size=16,
        steps=4,
        batch_size=4,
        pictures=6,
        numbers_of_steps=(1, 2),
        features=EfficientNetLite0().eval(),
    )


def tiny(name: str) -> Cell:
    cell = formulations.CELLS[name]
    return Cell(cell.objective, cell.density, TINY)


def test_a_cell_is_trained_measured_and_not_computed_again(bench: Bench) -> None:
    result = formulations.run_cell("v/cos", tiny("v/cos"), 1, bench)
    ways = [(one["sampler"], one["steps"], one["guidance"]) for one in result["measured"]]
    plain = [("deterministic", 1, 1.0), ("deterministic", 2, 1.0), ("deterministic", 25, 2.5)]
    assert ways == [*plain, ("ancestral", 1, 1.0), ("ancestral", 2, 1.0)]
    assert all(one["pooled"]["distance"] > 0 and one["found"]["count"] == 6 for one in result["measured"])
    (path,) = bench.work.glob("cells/*/seed-1.json")
    before = path.stat().st_mtime_ns
    (weights,) = bench.work.glob("runs/*/*/weights.safetensors")
    weights.unlink()  # a training would write them anew
    assert formulations.run_cell("v/cos", tiny("v/cos"), 1, bench) == json.loads(json.dumps(result))
    assert path.stat().st_mtime_ns == before and not weights.exists()
    assert formulations.collected(bench.work, list(formulations.CELLS)) == {"v/cos": [json.loads(json.dumps(result))]}
    with pytest.raises(ValueError, match="has other settings than those asked for"):
        formulations.run_cell("v/cos", tiny("eps/linear"), 1, bench)


def test_results_that_are_stored_are_laid_where_they_would_be_made(tmp_path: Path) -> None:
    cell = {"cell": "v/cos", "seed": 1, "identity": {}}
    spaces = [{"cell": "latents", "seed": 0, "after": after, "identity": {}} for after in (60.0, 240.0)]
    content = {"cells": {"v/cos": [cell], "latents": spaces}, "ends": {"identity": {}}}
    formulations.store(tmp_path / "results.json", content)
    mine = {**cell, "mine": True}
    formulations.store(formulations.place(tmp_path / "work", "cells", "v/cos", 1).with_suffix(".json"), mine)
    formulations.lay_out(tmp_path / "results.json", tmp_path / "work")
    found = formulations.collected(tmp_path / "work", ["v/cos", "latents"])
    assert found == {"v/cos": [mine], "latents": spaces}
    names = sorted(path.name for path in tmp_path.glob("work/cells/latents/*"))
    assert names == ["seed-0-after-240.json", "seed-0-after-60.json"]
    assert json.loads((tmp_path / "work" / "ends.json").read_text()) == {"identity": {}}


def test_a_training_that_was_done_is_only_measured(bench: Bench) -> None:
    result = formulations.run_cell("rf", tiny("rf"), 0, bench)
    (path,) = bench.work.glob("cells/*/seed-0.json")
    path.unlink()
    again = formulations.run_cell("rf", tiny("rf"), 0, bench)
    assert again["seconds"] == result["seconds"]
    first, second = (one["measured"][0]["pooled"]["distance"] for one in (result, again))
    assert first == pytest.approx(second)


def test_the_loop_learns_what_the_training_script_learns(bench: Bench, tmp_path: Path) -> None:
    formulations.run_cell("rf/lognorm(0,1)", tiny("rf/lognorm(0,1)"), 3, bench)
    (ours,) = bench.work.glob("runs/*/*/weights.safetensors")
    optim = formulations.OPTIM
    recipe = {
        "base.autoencoder": str(bench.autoencoder),
        "base.text_encoder": bench.text_encoder,
        "base.max_text_tokens": formulations.MAX_TEXT_TOKENS,
        "base.backbone_config": {**TINY.config, "pos_embed_max_size": 4},
        "data.source": str(bench.data),
        "data.size": bench.size,
        "objective.path": "rectified_flow",
        "optim.learning_rate": optim.learning_rate,
        "optim.lr_warmup_steps": optim.lr_warmup_steps,
        "optim.ema_decay": optim.ema_decay,
        "run.output_dir": str(tmp_path / "script"),
        "run.max_train_steps": bench.steps,
        "run.batch_size": bench.batch_size,
        "run.seed": 3,
        "run.report_to": "none",
        "publish.dtype": "float32",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train_text_to_image.main(parse_settings(train_text_to_image.Settings, ["--config", str(tmp_path / "recipe.yaml")]))
    theirs = load_file(tmp_path / "script" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    found = load_file(ours)
    assert found.keys() == theirs.keys()
    assert [name for name, value in found.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize("network", [Network(CrossAttentionDiT, SMALL), None])
def test_networks_that_the_kit_does_not_build_are_trained_and_sampled(bench: Bench, network: Network | None) -> None:
    unet = {**formulations.UNET.config, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 2}
    network = network or Network(formulations.UNET.cls, unet)
    result = formulations.run_cell("mine", formulations.flow("logit_normal", network), 0, bench)
    assert result["measured"][0]["pooled"]["distance"] > 0


@pytest.mark.parametrize("pixels", [True, False])
def test_a_space_is_measured_after_each_share_of_its_seconds(bench: Bench, pixels: bool) -> None:
    space = autoencoders.Space(Network(TINY.cls, {**TINY.config, "patch_size": 4 if pixels else 2}), pixels)
    results = autoencoders.run_space("space", space, 0, 0.2, bench)
    assert [result["after"] for result in results] == pytest.approx([0.05, 0.1, 0.2])
    assert all(result["after"] <= result["seconds"] < result["after"] + 0.3 for result in results)
    assert all(result["measured"]["pooled"]["distance"] > 0 for result in results)
    stamps = [path.stat().st_mtime_ns for path in sorted(bench.work.glob("cells/*/*.json"))]
    assert autoencoders.run_space("space", space, 0, 0.2, bench) == json.loads(json.dumps(results))
    assert [path.stat().st_mtime_ns for path in sorted(bench.work.glob("cells/*/*.json"))] == stamps


def test_pixels_come_through_as_they_are_and_are_learned_with_a_deviation_of_one(bench: Bench) -> None:
    from hubgen.autoencoders.latents import decode, encode

    pictures = drawn(5, 3, 8, 8).float() / 3 + 0.5
    space = autoencoders.Pixels.of(pictures)
    latents = encode(space, pictures)
    assert latents.mean().item() == pytest.approx(0, abs=1e-5) and latents.std().item() == pytest.approx(1)
    assert torch.allclose(decode(space, latents), pictures, atol=1e-6)


def test_an_autoencoder_is_trained_measured_and_not_computed_again(bench: Bench) -> None:
    shape = autoencoders.Shape(4, 2)
    result = autoencoders.run_autoencoder("small", shape, 0, 2, bench)
    assert (result["numbers"], result["factor"], result["channels"]) == (2 * 4 * 4, 4, 2)
    low, high = result["psnr_db"]["interval_95"]
    assert 0 < low < result["psnr_db"]["mean"] < high
    (weights,) = bench.work.glob("runs/*/*/autoencoder/*.safetensors")
    weights.unlink()
    assert autoencoders.run_autoencoder("small", shape, 0, 2, bench) == json.loads(json.dumps(result))
    with pytest.raises(ValueError, match="has other settings than those asked for"):
        autoencoders.run_autoencoder("small", shape, 0, 3, bench)


# ---------------------------------------------------------------------------------------------------------------------
# The rule and the page


def test_the_interval_is_students() -> None:
    # Mean 2, deviation 1, of three: 2 +- 4.303 / sqrt(3)
    assert claims.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert claims.interval([1.0]) is None


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.30, -0.31, -0.29], "agrees"),
        ([0.30, 0.31, 0.29], "differs"),
        ([-0.30, 0.31, -0.29], "cannot tell"),
        ([-0.30], "cannot tell"),
        ([], "cannot tell"),
    ],
)
def test_a_claim_is_judged_by_the_side_on_which_the_interval_lies(differences: list[float], verdict: str) -> None:
    assert claims.verdict(differences, -1) == verdict
    opposite = {"agrees": "differs", "differs": "agrees"}
    assert claims.verdict(differences, 1) == opposite.get(verdict, verdict)


def made_up(name: str, seed: int, scale: float, growth: float = 2.0) -> dict[str, Any]:
    """A result whose distance at 50 steps is `scale` and at 5 steps `growth` times that, or an autoencoder's."""
    if name in autoencoders.SHAPES:
        shape = autoencoders.SHAPES[name]
        values = {"psnr_db": {"mean": scale}, "perceptual_distance": {"mean": 1 / scale}}
        own = {"factor": shape.factor, "channels": shape.channels, "numbers": 256}
        return {"cell": name, "seed": seed, **own, **values, "identity": {"run.max_train_steps": 1}}

    def found(distance: float) -> dict[str, Any]:
        return {"pooled": {"distance": distance}, "layout": {"distance": 1 / distance}, "found": {"rate": 0.1}}

    common = {"cell": name, "seed": seed, "parameters": 1, "seconds": 1.0, "identity": {"bench": 1}}
    if name in autoencoders.SPACES:
        return {**common, "after": 60, "steps": 9, "measured": found(scale)}
    grid = {5: growth * scale, 10: scale, 25: scale, 50: scale}
    ways = [{"sampler": "deterministic", "steps": n, "guidance": 1.0, **found(value)} for n, value in grid.items()]
    guided = {"sampler": "deterministic", "steps": 25, "guidance": 2.5, **found(scale)}
    return {**common, "measured": [*ways, guided]}


def noisy(name: str, scale: float, growth: float = 2.0) -> list[dict[str, Any]]:
    """Three seeds, nearly alike."""
    return [made_up(name, seed, scale * (1 + 0.001 * seed**2), growth) for seed in range(3)]


def line_of(page: str, beginning: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {beginning}")]
    return line


def test_the_page_says_what_the_figures_say() -> None:
    cells = {name: noisy(name, 0.05) for name in formulations.CELLS}
    cells["rf/lognorm(0,1)"] = noisy("rf/lognorm(0,1)", 0.04, growth=1.5)
    cells["rf/cosmap"] = noisy("rf/cosmap", 0.06)
    cells["rf/mode(1.29)"] = [made_up("rf/mode(1.29)", seed, scale) for seed, scale in enumerate((0.03, 0.05, 0.08))]
    page = claims.to_markdown(cells)
    line = line_of(page, "rf/lognorm(0,1) below eps/linear: distance at 5 steps by that at 50")
    assert "1.50 and 2.00; -25.0 % (-25.0 to -25.0)" in line
    assert line.endswith("| **agrees** | differs |")  # the made-up layout says the opposite
    assert "**differs**" in line_of(page, "rf/cosmap below rf")
    assert "**cannot tell**" in line_of(page, "rf/mode(1.29) below rf")
    assert "**agrees**" in line_of(page, "MM-DiT below cross-attention DiT")
    assert "not run: latents, pixels, patches of 8" in line_of(page, "latents below pixels, patches of 8")
    assert "Spearman's coefficient" in page and "Not run yet: f=8, 4 channels" in page


def test_the_page_and_the_plots_are_made_of_whatever_there_is(tmp_path: Path) -> None:
    assert "no seeds a cell" in claims.to_markdown({})
    claims.draw_plots({}, tmp_path)
    assert not list(tmp_path.iterdir())
    everything = [*formulations.CELLS, *autoencoders.CELLS]
    cells = {name: noisy(name, 0.04 + 0.01 * number) for number, name in enumerate(everything)}
    page = claims.to_markdown(cells)
    assert "not run" not in page.lower()
    claims.draw_plots(cells, tmp_path)
    plots = {group.plot for group in claims.GROUPS}
    assert {path.stem for path in tmp_path.glob("*.png")} == plots
    for plot in plots:
        assert f"claims/{plot}.png" in page
        picture = Image.open(tmp_path / f"{plot}.png").convert("RGB")
        assert picture.size == claims.PLOT_SIZE and len(picture.getcolors(100_000)) > 3


def test_every_claim_is_about_cells_that_there_are() -> None:
    known = {*formulations.CELLS, *autoencoders.CELLS}
    named = {name for group in claims.GROUPS for claim in group.claims for name in (claim.first, claim.second)}
    assert named == known
    assert claims.RANKS.keys() == formulations.FORMULATIONS.keys()


def test_cells_of_other_budgets_are_not_compared() -> None:
    cells = {name: noisy(name, 0.05) for name in ("rf", "eps/linear")}
    cells["rf"][1]["identity"] = {"bench": 2}
    with pytest.raises(ValueError, match="rf, seed 1: got 2, expected 1, as rf has it"):
        claims.check_budgets(cells)


@pytest.mark.parametrize(("low", "high", "log"), [(3.0, 90.0, True), (20.0, 31.0, True), (0.012, 0.013, False)])
def test_ticks_are_a_few_round_numbers_inside(low: float, high: float, log: bool) -> None:
    found = claims.ticks(low, high, log)
    assert 3 <= len(found) <= 7 and low <= found[0] < found[-1] <= high
    assert all(
        float(f"{value:.2g}") == pytest.approx(value) or float(f"{value:.3g}") == pytest.approx(value)
        for value in found
    )


def test_a_stored_page_is_that_of_the_stored_figures() -> None:
    page = claims.RESULTS / "claims.md"
    if not page.is_file():
        pytest.skip("nothing is stored yet")
    assert page.read_text(encoding="utf-8") == claims.to_markdown(*claims.stored(claims.RESULTS))
