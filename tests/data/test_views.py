"""Pictures are scaled to cover their size and cropped, never stretched; what is said of a view is true of it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hubgen.data.errors import DataError
from hubgen.data.views import SHIFT, TURN, ZOOM, Views, bucket_of, bucket_sizes, pixels_of, square_view


def kohya(side: int, smallest: int, largest: int, step: int) -> list[tuple[int, int]]:
    """The rule of sd-scripts (make_bucket_resolutions): widths upwards, heights as they fit."""
    found = {(side // step * step,) * 2}
    for width in range(smallest, largest + 1, step):
        height = min(largest, side * side // width // step * step)
        if height >= smallest:
            found |= {(width, height), (height, width)}
    return sorted(found)


@pytest.mark.parametrize(("side", "smallest", "largest", "step"), [(512, 256, 1024, 64), (1024, 256, 2048, 64)])
def test_buckets_are_kohyas(side: int, smallest: int, largest: int, step: int) -> None:
    sizes = bucket_sizes(side, step, smallest, largest)
    assert sizes == kohya(side, smallest, largest, step)
    assert all(h * w <= side * side and h % step == 0 == w % step for h, w in sizes)


def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect_ratio() -> None:
    sizes = bucket_sizes(512, 64, 256, 1024)
    assert bucket_of((1000, 1000), sizes) == (512, 512)
    assert bucket_of((900, 1600), sizes) == (384, 640)
    assert bucket_of((4000, 1000), sizes) == (1024, 256)


def disc(width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).ellipse(
        (width // 2 - 60, height // 2 - 60, width // 2 + 60, height // 2 + 60), fill="black"
    )
    return picture


@pytest.mark.parametrize("original", [(300, 500), (500, 300), (301, 299)])
def test_a_disc_stays_round(original: tuple[int, int]) -> None:
    (size,) = [(128, 192)]
    view = Views([original], ["0" * 64], [size]).view(0, 0)
    dark = np.asarray(view.of(disc(original[1], original[0])).convert("L")) < 128
    high, wide = np.ptp(np.nonzero(dark)[0]) + 1, np.ptp(np.nonzero(dark)[1]) + 1
    assert dark.shape == size and abs(int(high) - int(wide)) <= 2


def test_a_crop_without_scaling_is_the_pixels_themselves() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    views = Views([(40, 64)], ["ab" * 32], [(40, 40)], crops=3, mirror=True, seed=5)
    assert views.count == 6
    for number in range(6):
        view = views.view(0, number)
        left = int(view.box[0])
        expected = np.asarray(picture)[:, left : left + 40]
        expected = expected[:, ::-1] if view.mirrored else expected
        assert np.array_equal(np.asarray(view.of(picture)), expected)
        # SDXL's numbers lead to the same pixels of the (mirrored) picture
        micro = view.micro()
        whole = np.asarray(picture)[:, ::-1] if view.mirrored else np.asarray(picture)
        top, first = micro.crops_coords_top_left
        assert np.array_equal(whole[top : top + 40, first : first + 40], expected)
        assert micro.original_size == (40, 64) and micro.target_size == (40, 40)
    assert len({views.view(0, number).box for number in range(3)}) > 1


def test_crop_coordinates_are_those_of_the_scaled_picture() -> None:
    view = Views([(100, 400)], ["0" * 64], [(50, 50)]).view(0, 0)
    assert view.micro().crops_coords_top_left == (0, 75)  # (400 / 2 - 50) / 2


def test_crops_depend_on_the_picture_and_not_on_its_row() -> None:
    sizes, digests = [(40, 64), (64, 40)], ["12" * 32, "34" * 32]
    one, other = Views(sizes, digests, [(40, 40)], crops=4), Views(sizes[::-1], digests[::-1], [(40, 40)], crops=4)
    assert [one.key(0, n) for n in range(4)] == [other.key(1, n) for n in range(4)]
    assert len({one.key(row, number) for row in (0, 1) for number in range(4)}) == 8


def test_small_pictures_are_refused_unless_they_may_be_enlarged() -> None:
    with pytest.raises(DataError, match="a.png: got 20x30 pixels, expected at least 32x32"):
        Views([(30, 20)], ["0" * 64], [(32, 32)], names=["a.png"])
    assert Views([(30, 20)], ["0" * 64], [(32, 32)], upscale=True).view(0, 0).of(disc(20, 30)).size == (32, 32)


def test_the_square_view_is_the_central_square() -> None:
    picture = disc(200, 120)
    crop = picture.crop((40, 0, 160, 120)).resize((64, 64), Image.Resampling.LANCZOS)
    assert torch.equal(pixels_of(square_view((120, 200), 64).of(picture)), pixels_of(crop))


def test_moved_views_are_turned_shifted_and_scaled_a_little_on_white() -> None:
    side = 200
    picture = disc(side, side)
    views = Views([(side, side)], ["ab" * 32], [(100, 100)], moves=20, mirror=True, seed=3)
    assert views.count == 42 and len({views.key(0, number) for number in range(42)}) == 42
    plain = Views([(side, side)], ["ab" * 32], [(100, 100)])
    assert views.view(0, 0) == plain.view(0, 0), "the first is the plain one"
    places = []
    for number in range(1, 21):
        view = views.view(0, number)
        assert 0 < abs(view.turn) <= TURN and not view.mirrored
        shown = np.asarray(view.of(picture).convert("L"))
        assert shown.shape == (100, 100) and (shown[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
        down, right = np.nonzero(shown < 128)
        diameter = np.ptp(down) + 1
        assert abs(diameter - (np.ptp(right) + 1)) <= 2 and abs(diameter / 60 - 1) <= ZOOM + 0.05
        places.append((down.mean() - 49.5, right.mean() - 49.5))
        assert views.view(0, 21 + number).mirrored
        again = np.asarray(views.view(0, 21 + number).of(picture).convert("L"))
        assert np.array_equal(again, shown[:, ::-1])
    assert 0.5 < np.abs(places).max() <= 100 * SHIFT * (1 + ZOOM) + 1
    black = Image.new("L", (side, side), 0)
    assert any(np.asarray(views.view(0, number).of(black)).max() == 255 for number in range(1, 21))
