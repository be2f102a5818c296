"""Do claims of the papers hold in miniature? The page of what formulations and autoencoders have measured.

    python -m tests.benchmarks.claims [--results DIR]

A claim says that one cell is better than another by some measure. Both were trained from the same seeds, so that the
claim is judged by their differences seed by seed: the mean, and Student's 95 % interval of it. A claim

    agrees        if the whole interval lies on the paper's side of zero,
    differs       if it lies on the other side,
    cannot tell   if zero is in it, or there are fewer than two seeds.

Differences of distances are those of logarithms, and are shown in per cent. Cells that are not there are named, and the
page is made of the others.

Reads formulations/formulations.json and autoencoders/autoencoders.json below the folder of the results. Stored there:
claims.md, and plots in claims/.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from hubgen.formats.atomic import written
from tests.benchmarks import autoencoders, formulations, report

RESULTS = Path(__file__).parent / "results"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's distribution, of 1 degree of freedom and more"""

Result = Mapping[str, Any]
Cells = Mapping[str, Sequence[Result]]


# ---------------------------------------------------------------------------------------------------------------------
# The rule


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean; `None` for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    quantile = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    half = quantile * statistics.stdev(differences) / math.sqrt(count)
    mean = statistics.mean(differences)
    return mean - half, mean + half


def verdict(differences: Sequence[float], expected: int) -> str:
    """Whether differences have the paper's sign, 1 or -1; see the module."""
    bounds = interval(differences)
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return "cannot tell"
    return "agrees" if (bounds[0] > 0) == (expected > 0) else "differs"


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Measure:
    """A number of a result."""

    name: str
    of: Callable[[Result], float]
    better: int
    """The sign of an improvement"""
    relative: bool = True
    """Whether ratios are compared, and not differences"""
    digits: int = 1

    beside: "Measure | None" = None
    """The same by other features, whose verdict is shown too"""

    def value(self, result: Result) -> float:
        """On the scale on which differences are taken."""
        return math.log(self.of(result)) if self.relative else self.of(result)

    def shown(self, values: Sequence[float]) -> str:
        """The mean of such values."""
        mean = statistics.mean(values)
        return f"{math.exp(mean) if self.relative else mean:.{self.digits}f}"

    def difference(self, value: float) -> str:
        """A difference of such values."""
        return f"{100 * math.expm1(value):+.1f}" if self.relative else f"{value:+.{self.digits}f}"


def drawn(result: Result, steps: int, sampler: str = "deterministic", guidance: float = 1.0) -> Result:
    """What was measured of pictures that were drawn in one way."""
    for found in result["measured"]:
        if (found["sampler"], found["steps"], found["guidance"]) == (sampler, steps, guidance):
            return found
    raise KeyError(f"{result['cell']}: no pictures by {sampler} in {steps} steps with guidance {guidance:g}")


def distance(found: Result, features: str = "pooled") -> float:
    """A thousand times Fréchet's distance."""
    return 1000 * found[features]["distance"]


def numbers_of_steps(result: Result) -> list[int]:
    """Of the deterministic sampler without guidance."""
    plain = [found for found in result["measured"] if found["sampler"] == "deterministic" and found["guidance"] == 1.0]
    return sorted(found["steps"] for found in plain)


def over_all(result: Result, features: str) -> float:
    """The geometric mean of the distances at all numbers of steps."""
    return statistics.geometric_mean(distance(drawn(result, steps), features) for steps in numbers_of_steps(result))


def growth(result: Result, features: str) -> float:
    """How many times the distance at the fewest steps is that at the most."""
    fewest, *_, most = numbers_of_steps(result)
    return distance(drawn(result, fewest), features) / distance(drawn(result, most), features)


def found_rate(result: Result) -> float:
    """Captions that are found, in per cent, with guidance."""
    return 100 * drawn(result, formulations.GUIDED_STEPS, guidance=formulations.GUIDANCE)["found"]["rate"]


def of_distances(name: str, of: Callable[[Result, str], float], digits: int = 1) -> Measure:
    """A measure of distances by pooled features, and beside it the same by layout features."""
    layout = Measure(name, lambda result: of(result, "layout"), -1, digits=digits)
    return Measure(name, lambda result: of(result, "pooled"), -1, digits=digits, beside=layout)


def at(steps: int) -> Measure:
    """The distance at a number of steps."""
    return of_distances(f"distance at {steps} steps", lambda result, features: distance(drawn(result, steps), features))


OVER_ALL = of_distances("distance, mean over the numbers of steps", over_all)
GROWTH = of_distances("distance at 5 steps by that at 50", growth, digits=2)
FOUND = Measure("captions found, %", found_rate, 1, relative=False)
PSNR = Measure("PSNR, dB", lambda result: result["psnr_db"]["mean"], 1, relative=False, digits=2)
PERCEPTUAL = Measure("perceptual distance", lambda result: result["perceptual_distance"]["mean"], -1, digits=3)
IN_SPACE = of_distances(
    "distance after the same seconds", lambda result, features: distance(result["measured"], features)
)


@dataclass(frozen=True)
class Claim:
    """That the first of two cells is better, by a measure."""

    first: str
    second: str
    measure: Measure
    paper: str
    """Its figures, the first cell's and the second's"""


@dataclass(frozen=True)
class Group:
    """Claims that belong together."""

    title: str
    source: str
    claims: Sequence[Claim]
    plot: str
    """Name of the picture"""


LOGNORM = "rf/lognorm(0,1)"
RANKS = {
    LOGNORM: (1.54, 1.25, 1.50),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "rf": (5.67, 6.50, 5.75),
    "v/cos": (9.17, 12.25, 8.75),
    "edm(-1.2,1.2)": (15.58, 20.25, 15.00),
}
"""SD3, table 1: the rank averaged over all settings, over those of 5 steps and over those of 50"""
FLOWS = ("rf", LOGNORM)
OTHERS = ("eps/linear", "v/cos", "edm(-1.2,1.2)")
FACTORS = "f=4 (3 channels) 27.53, f=8 (4) 24.19, f=16 (8) 21.94; of 16 channels f=16 24.08, f=32 20.38"


def ranked(first: str, second: str, measure: Measure, column: int) -> Claim:
    """A claim whose figures are the paper's ranks."""
    return Claim(first, second, measure, f"ranks {RANKS[first][column]:.2f} and {RANKS[second][column]:.2f}")


def of_channels(more: int, fewer: int, measure: Measure, paper: str) -> Claim:
    return Claim(f"f=8, {more} channels", f"f=8, {fewer} channels", measure, paper)


GROUPS = (
    Group(
        "Rectified flow needs few steps",
        "SD3 (2403.03206), section 5.1.1 with figure 3: the performance of rectified flows degrades less than that of "
        "other formulations when the number of sampling steps is reduced; table 1, settings of 5 steps.",
        (
            *(Claim(flow, other, GROWTH, "degrades less") for flow in FLOWS for other in OTHERS),
            *(ranked(LOGNORM, other, at(5), 1) for other in OTHERS),
        ),
        "steps",
    ),
    Group(
        "Logit-normal times beat uniform ones",
        "SD3 (2403.03206), table 1, averaged over all settings; table 2 has at 25 steps on ImageNet the FID 45.78 for "
        "rf/lognorm(0,1) and 49.70 for rf.",
        (
            ranked(LOGNORM, "rf", OVER_ALL, 0),
            ranked("rf/mode(1.29)", "rf", OVER_ALL, 0),
            ranked("rf/cosmap", "rf", OVER_ALL, 0),
            ranked(LOGNORM, "rf/mode(1.29)", OVER_ALL, 0),
            ranked(LOGNORM, "rf/cosmap", OVER_ALL, 0),
        ),
        "densities",
    ),
    Group(
        "The order of the formulations",
        "SD3 (2403.03206), table 1. Only flows with other than uniform times are ranked above eps/linear there.",
        (
            ranked(LOGNORM, "eps/linear", OVER_ALL, 0),
            ranked(LOGNORM, "eps/linear", at(50), 2),
            ranked("eps/linear", "rf", OVER_ALL, 0),
            ranked("rf", "v/cos", OVER_ALL, 0),
            ranked("v/cos", "edm(-1.2,1.2)", OVER_ALL, 0),
        ),
        "formulations",
    ),
    Group(
        "MM-DiT learns more than cross-attention",
        "SD3 (2403.03206), section 5.2.3 with figure 4: MM-DiT outperforms the cross-attention variant (CrossDiT) in "
        "validation loss, CLIP score and FID, and CrossDiT ends below UViT, a hybrid of U-Net and transformer; a plain "
        "U-Net is not in the figure.",
        (
            Claim(LOGNORM, "cross-attention DiT", OVER_ALL, "outperforms (FID)"),
            Claim(LOGNORM, "cross-attention DiT", FOUND, "outperforms (CLIP)"),
            Claim("cross-attention DiT", "U-Net", OVER_ALL, "outperforms UViT"),
        ),
        "networks",
    ),
    Group(
        "More latent channels reconstruct better",
        "SD3 (2403.03206), table 3, f=8: PSNR and perceptual similarity (lower is better) of 4, 8 and 16 channels.",
        (
            of_channels(8, 4, PSNR, "26.40 and 25.12 dB"),
            of_channels(16, 8, PSNR, "28.62 and 26.40 dB"),
            of_channels(8, 4, PERCEPTUAL, "0.68 and 0.85"),
            of_channels(16, 8, PERCEPTUAL, "0.45 and 0.68"),
        ),
        "channels",
    ),
    Group(
        "Smaller factors reconstruct better",
        f"Latent diffusion (2112.10752), table 8, KL, PSNR on ImageNet: {FACTORS}.",
        (
            Claim("f=4, 16 channels", "f=8, 16 channels", PSNR, "27.53 (3 channels) and 24.19 dB (4)"),
            Claim("f=8, 16 channels", "f=16, 16 channels", PSNR, "24.19 (4 channels) and 24.08 dB (16)"),
            Claim("f=4, 16 channels", "f=16, 16 channels", PSNR, "27.53 (3 channels) and 24.08 dB (16)"),
        ),
        "factors",
    ),
    Group(
        "In equal time latents teach more than pixels",
        "Latent diffusion (2112.10752), section 4.1 with figure 6: on ImageNet the FID of LDM-8 is 38 below that of "
        "pixels after 2 million steps; here the same seconds take the place of the same steps.",
        tuple(Claim("latents", name, IN_SPACE, "FID 38 lower") for name in autoencoders.SPACES if name != "latents"),
        "spaces",
    ),
)


def by_seed(cells: Cells, name: str) -> dict[int, Result]:
    """The results of a cell; of a space those after the longest training."""
    ordered = sorted(cells.get(name, ()), key=lambda result: result.get("after", 0))
    return {result["seed"]: result for result in ordered}


def compared(cells: Cells, claim: Claim, measure: Measure) -> tuple[list[float], list[float]]:
    """Values of both cells for the seeds that both have."""
    first, second = by_seed(cells, claim.first), by_seed(cells, claim.second)
    seeds = sorted(first.keys() & second.keys())
    return [measure.value(first[seed]) for seed in seeds], [measure.value(second[seed]) for seed in seeds]


def check_budgets(cells: Cells) -> None:
    """Raises ValueError if cells that are compared were trained or measured in different ways."""
    for names in (formulations.CELLS, autoencoders.SHAPES, autoencoders.SPACES):
        results = [result for name in names for result in cells.get(name, ())]
        for result in results:
            found, expected = budget(result), budget(results[0])
            if found != expected:
                name = f"{result['cell']}, seed {result['seed']}"
                raise ValueError(f"{name}: got {found}, expected {expected}, as {results[0]['cell']} has it")


def budget(result: Result) -> Any:
    """What has to be the same for cells that are compared."""
    identity = result["identity"]
    return identity["bench"] if "bench" in identity else identity["run.max_train_steps"]


# ---------------------------------------------------------------------------------------------------------------------
# Plots

PLOT_SIZE = (760, 420)
MARGINS = (64, 16, 200, 48)
"""Left, top, right, bottom"""
COLOURS = ("#1b6ca8", "#c8442d", "#3a8f4d", "#8a5db0", "#d08b1d", "#5b5b5b", "#17a2a2", "#b8477f", "#7a8b1f")
GREY, BLACK = "#d8d8d8", "#202020"


@dataclass(frozen=True)
class Point:
    """A mean over seeds, with the smallest and the largest."""

    x: float
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, x: float, values: Sequence[float]) -> "Point":
        return cls(x, statistics.mean(values), min(values), max(values))


def padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """Ends of an axis that shows values from `low` to `high`."""
    if log:
        room = max((high / low) ** 0.06, 1.02)
        return low / room, high * room
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from `low` to `high`, about five."""
    if log and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    else:
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
        found = [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [value for value in found if low <= value <= high]


def draw_plot(
    series: Mapping[str, Sequence[Point]],
    path: Path,
    labels: tuple[str, str],
    log: tuple[bool, bool] = (False, False),
) -> None:
    """Stores a plot: a line a series, at each point a bar from the smallest value to the largest.

    Args:
        series: Points by the name that the legend has; at least one.
        path: Of the PNG.
        labels: Of both axes.
        log: Whether each axis is logarithmic.
    """
    points = [point for line in series.values() for point in line]
    columns = sorted({point.x for point in points})
    lowest, highest = padded(min(point.low for point in points), max(point.high for point in points), log[1])
    left, top, right, bottom = MARGINS
    width, height = PLOT_SIZE[0] - left - right, PLOT_SIZE[1] - top - bottom

    def part(value: float, low: float, high: float, log: bool) -> float:
        value, low, high = (math.log(one) if log else one for one in (value, low, high))
        return (value - low) / (high - low) if high > low else 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.04 + 0.92 * part(x, columns[0], columns[-1], log[0])
        return left + across * width, top + height - part(y, lowest, highest, log[1]) * height

    image = Image.new("RGB", PLOT_SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for value in ticks(lowest, highest, log[1]):
        y = place(columns[0], value)[1]
        pen.line([(left, y), (left + width, y)], fill=GREY)
        pen.text((left - 6, y), f"{value:g}", fill=BLACK, font=font, anchor="rm")
    for value in columns:
        pen.text((place(value, lowest)[0], top + height + 6), f"{value:g}", fill=BLACK, font=font, anchor="mt")
    pen.rectangle([left, top, left + width, top + height], outline=BLACK)
    pen.text((left + width / 2, PLOT_SIZE[1] - 6), labels[0], fill=BLACK, font=font, anchor="mb")
    upright = Image.new("RGB", (height, 18), "white")
    ImageDraw.Draw(upright).text((height / 2, 2), labels[1], fill=BLACK, font=font, anchor="mt")
    image.paste(upright.rotate(90, expand=True), (2, top))
    for number, (name, line) in enumerate(series.items()):
        colour, line = COLOURS[number % len(COLOURS)], sorted(line, key=lambda point: point.x)
        pen.line([place(point.x, point.mean) for point in line], fill=colour, width=2)
        for point in line:
            x, y = place(point.x, point.mean)
            pen.line([(x, place(point.x, point.low)[1]), (x, place(point.x, point.high)[1])], fill=colour)
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        y = top + 8 + 20 * number
        pen.line([(left + width + 12, y), (left + width + 32, y)], fill=colour, width=2)
        pen.text((left + width + 38, y), name, fill=BLACK, font=font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def by_steps(cells: Cells, names: Sequence[str]) -> dict[str, list[Point]]:
    """Distances at each number of steps."""
    series = {}
    for name in names:
        results = list(by_seed(cells, name).values())
        if results:
            grid = numbers_of_steps(results[0])
            series[name] = [Point.of(n, [distance(drawn(one, n)) for one in results]) for n in grid]
    return series


def draw_plots(cells: Cells, folder: Path) -> None:
    """Stores the plots for which there are cells."""
    axes = ("sampling steps", "1000 x Frechet distance")  # the font has no accents
    densities = [name for name in formulations.FORMULATIONS if name.startswith("rf")]
    kinds = {"steps": [*FLOWS, *OTHERS], "densities": densities, "formulations": list(formulations.FORMULATIONS)}
    kinds["networks"] = [LOGNORM, *formulations.NETWORKS]
    for kind, names in kinds.items():
        series = by_steps(cells, names)
        if kind == "networks" and LOGNORM in series:
            series = {"MM-DiT": series.pop(LOGNORM), **series}
        if series:
            draw_plot(series, folder / f"{kind}.png", axes, log=(True, True))
    shapes = {name: list(by_seed(cells, name).values()) for name in autoencoders.SHAPES if name in cells}
    for kind, own, other, usual in (("channels", "channels", "factor", 8), ("factors", "factor", "channels", 16)):
        points = [
            Point.of(results[0][own], [result["psnr_db"]["mean"] for result in results])
            for results in shapes.values()
            if results[0][other] == usual
        ]
        if points:
            label = "latent channels, f=8" if kind == "channels" else "factor f, 16 channels"
            draw_plot({"held-out pictures": points}, folder / f"{kind}.png", (label, "PSNR, dB"), log=(True, False))
    spaces = {}
    for name in autoencoders.SPACES:
        after: dict[float, list[float]] = {}
        for result in cells.get(name, ()):
            after.setdefault(result["after"], []).append(distance(result["measured"]))
        if after:
            spaces[name] = [Point.of(seconds, values) for seconds, values in after.items()]
    if spaces:
        draw_plot(spaces, folder / "spaces.png", ("seconds of computing", axes[1]), log=(True, True))


# ---------------------------------------------------------------------------------------------------------------------
# The page


def named(claim: Claim) -> str:
    """The claim in words."""
    better = {1: "above", -1: "below"}[claim.measure.better]
    return f"{shown_name(claim, claim.first)} {better} {shown_name(claim, claim.second)}: {claim.measure.name}"


def shown_name(claim: Claim, name: str) -> str:
    """rf/lognorm(0,1) is the MM-DiT where networks are compared."""
    networks = claim.first in formulations.NETWORKS or claim.second in formulations.NETWORKS
    return "MM-DiT" if networks and name == LOGNORM else name


def row_of(cells: Cells, claim: Claim) -> list[str]:
    """A line of the table."""
    measure = claim.measure
    first, second = compared(cells, claim, measure)
    if not first:
        missing = [name for name in (claim.first, claim.second) if not by_seed(cells, name)]
        return [named(claim), f"not run: {', '.join(missing) or 'no seed in common'}", claim.paper, "", ""]
    differences = [one - other for one, other in zip(first, second, strict=True)]
    unit, bounds = " %" if measure.relative else "", interval(differences)
    within = "one seed" if bounds is None else " to ".join(measure.difference(bound) for bound in bounds)
    ours = f"{measure.shown(first)} and {measure.shown(second)}; "
    ours += f"{measure.difference(statistics.mean(differences))}{unit} ({within})"
    beside = ""
    if measure.beside is not None:
        others = [one - other for one, other in zip(*compared(cells, claim, measure.beside), strict=True)]
        beside = verdict(others, measure.beside.better)
    return [named(claim), ours, claim.paper, f"**{verdict(differences, measure.better)}**", beside]


def with_spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, smallest and largest."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table_of_formulations(cells: Cells) -> str:
    """Distances and rates of all formulations and networks."""
    present = [name for name in formulations.CELLS if by_seed(cells, name)]
    if not present:
        return ""
    grid = numbers_of_steps(next(iter(by_seed(cells, present[0]).values())))
    guided = f"guidance {formulations.GUIDANCE:g}, {formulations.GUIDED_STEPS} steps"
    rows = []
    for name in present:
        results = list(by_seed(cells, name).values())
        ancestral = []
        for steps in (grid[0], grid[-1]):
            try:
                ancestral.append(with_spread([distance(drawn(one, steps, "ancestral")) for one in results]))
            except KeyError:
                ancestral.append("")
        scaled = [drawn(one, formulations.GUIDED_STEPS, guidance=formulations.GUIDANCE) for one in results]
        rows.append(
            [
                f"{name} ({results[0]['parameters'] / 1e6:.2f} M)",
                *(with_spread([distance(drawn(one, steps)) for one in results]) for steps in grid),
                with_spread([distance(found) for found in scaled]),
                *ancestral,
                with_spread([100 * found["found"]["rate"] for found in scaled]),
                f"{statistics.mean(one['seconds'] for one in results):.0f}",
            ]
        )
    header = ["cell", *(f"{steps} steps" for steps in grid), guided]
    header += [f"ancestral, {grid[0]}", f"ancestral, {grid[-1]}", "captions found, guided, %", "seconds of training"]
    return report.markdown_table(header, rows)


def table_of_ranks(cells: Cells) -> str:
    """Our order of the formulations beside the paper's, with Spearman's coefficient; empty unless all are there."""
    if any(not by_seed(cells, name) for name in RANKS):
        return ""
    means = {name: statistics.mean(OVER_ALL.value(one) for one in by_seed(cells, name).values()) for name in RANKS}
    order = sorted(means, key=means.__getitem__)
    places = {name: (order.index(name) + 1, place) for place, name in enumerate(RANKS, start=1)}
    squares = sum((ours - theirs) ** 2 for ours, theirs in places.values())
    coefficient = 1 - 6 * squares / (len(places) * (len(places) ** 2 - 1))
    rows = [[name, str(ours), str(theirs), f"{RANKS[name][0]:.2f}"] for name, (ours, theirs) in places.items()]
    table = report.markdown_table(["formulation", "place here", "place in the paper", "its averaged rank"], rows)
    return f"{table}\nSpearman's coefficient of the two orders: {coefficient:.2f}.\n"


def table_of_autoencoders(cells: Cells) -> str:
    """Both measures of all autoencoders."""
    rows = []
    for name in autoencoders.SHAPES:
        results = list(by_seed(cells, name).values())
        if results:
            values = [[one[key]["mean"] for one in results] for key in ("psnr_db", "perceptual_distance")]
            numbers = f"{results[0]['numbers']:,}"
            rows.append([name, numbers, with_spread(values[0], 2), with_spread(values[1], 3)])
    header = ["autoencoder", "numbers a picture", "PSNR, dB", "perceptual distance"]
    return report.markdown_table(header, rows) if rows else ""


def table_of_spaces(cells: Cells) -> str:
    """Distances of the spaces after each time."""
    rows = []
    for name in autoencoders.SPACES:
        for after in sorted({result["after"] for result in cells.get(name, ())}):
            results = [result for result in cells[name] if result["after"] == after]
            steps, seconds = (statistics.mean(one[key] for one in results) for key in ("steps", "seconds"))
            distances = with_spread([distance(one["measured"]) for one in results])
            rows.append([name, f"{after:g}", f"{seconds:.1f}", f"{steps:.0f}", distances])
    header = ["space", "seconds asked", "seconds trained", "steps", "distance"]
    return report.markdown_table(header, rows) if rows else ""


def ends_of(ends: Result) -> str:
    """Where the distance begins."""
    kept = 100 * ends["variance_kept"]["pooled"]
    return (
        f"Distances are a thousand times those of {ends['pictures']} pictures; the real pictures of the same captions "
        f"have {distance(ends['real']):.1f}, and through the autoencoder {distance(ends['autoencoder']):.1f}. The "
        f"directions keep {kept:.0f} % of the variance. Captions of real pictures are found in "
        f"{100 * ends['real']['found']['rate']:.0f} % of the cases.\n\n"
    )


HEADER = ["claim", "here: both, difference (95 %)", "paper: both", "verdict", "by layout features"]


def to_markdown(cells: Cells, ends: Result | None = None) -> str:
    """The page; plots are named where there are cells for them."""
    tables = {
        "formulations": table_of_ranks(cells),
        "networks": table_of_formulations(cells),
        "factors": table_of_autoencoders(cells),
        "spaces": table_of_spaces(cells),
    }
    missing = [name for name in (*formulations.CELLS, *autoencoders.CELLS) if not by_seed(cells, name)]
    counts = {len(by_seed(cells, name)) for name in cells}
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else "no"
    text = (
        "# Claims of papers, in miniature\n\n"
        "Written by `python -m tests.benchmarks.claims`, of what `formulations` and `autoencoders` measured on emoji, "
        f"with {seeds} seeds a cell. A claim is judged by the differences between two cells, seed by "
        "seed: it *agrees* if Student's 95 % interval of their mean lies on the paper's side of zero, *differs* if it "
        "lies on the other side, and else we *cannot tell*. The intervals are of one claim each: of twenty, one may "
        "miss by chance. Distances are by pooled features, as usual, and the last column has the verdict by features "
        "that tell where in the picture something is. What holds here holds for small networks, short trainings and "
        "one kind of pictures.\n\n"
    )
    text += "" if ends is None else ends_of(ends)
    text += f"Not run yet: {', '.join(missing)}.\n\n" if missing else ""
    for group in GROUPS:
        rows = [row_of(cells, claim) for claim in group.claims]
        names = {name for claim in group.claims for name in (claim.first, claim.second)}
        table = report.markdown_table(HEADER, rows)
        text += f"## {group.title}\n\n{group.source}\n\n{table}\n"
        if any(by_seed(cells, name) for name in names):
            text += f"![{group.title}](claims/{group.plot}.png)\n\n"
        if tables.get(group.plot):
            text += f"{tables[group.plot]}\n"
    return text.rstrip("\n") + "\n"


def stored(results: Path) -> tuple[dict[str, list[Result]], Result | None]:
    """All cells, and where the distance begins, below the folder of the results."""
    cells: dict[str, list[Result]] = {}
    ends = None
    for name in ("formulations", "autoencoders"):
        path = results / name / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            cells |= content["cells"]
            ends = content.get("ends", ends)
    return cells, ends


def main(argv: Sequence[str] | None = None) -> None:
    """Reads what is stored and writes the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of all results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    cells, ends = stored(arguments.results)
    check_budgets(cells)
    draw_plots(cells, arguments.results / "claims")
    page = to_markdown(cells, ends)
    report.write_text(arguments.results / "claims.md", page)
    print(page)


if __name__ == "__main__":
    main()
