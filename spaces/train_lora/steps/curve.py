"""The loss over the steps, as a drawing in the page's colours with a sentence for those who do not see it."""

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 34
SMOOTH = 0.7
"""Of the mean so far, in the running mean"""


def curve(points: Sequence[tuple[int, float]], steps: int) -> str:
    """HTML of the curve.

    Args:
        points: (step, loss).
        steps: Where the axis ends.
    """
    if not points:
        return ""
    means = running_mean([loss for _, loss in points])
    low, high = bounds([loss for _, loss in points])
    last = max(steps, points[-1][0], 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        return (
            LEFT + step / last * (WIDTH - LEFT - RIGHT),
            TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    def line(values: Sequence[float]) -> str:
        places = [place(step, value) for (step, _), value in zip(points, values, strict=True)]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

    parts = []
    for value in (low, (low + high) / 2, high):
        _, y = place(0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((0, "start"), (last // 2, "middle"), (last, "end")):
        x, _ = place(step, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{step:,}</text>')
    parts.append(f'<polyline class="raw" points="{line([loss for _, loss in points])}"/>')
    parts.append(f'<polyline class="mean" points="{line(means)}"/>')
    x, y = place(points[-1][0], means[-1])
    parts.append(f'<circle class="now" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    text = (
        f"Loss by step, {len(points)} points: {points[0][1]:.3g} at step {points[0][0]}, "
        f"now about {means[-1]:.3g} at step {points[-1][0]} of {steps}."
    )
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(text)}" '
        f'data-points="{len(points)}">{"".join(parts)}</svg>'
        f"<figcaption><span>Loss at each step, and its running mean</span>"
        f"<span>now about {means[-1]:.3g}</span></figcaption></figure>"
    )


def running_mean(values: Sequence[float]) -> list[float]:
    """Of the values so far, the newer ones counting more; without a bias towards the first."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTH * total + value, SMOOTH * weight + 1
        means.append(total / weight)
    return means


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Of the axis, with some room."""
    low, high = min(values), max(values)
    room = max((high - low) * 0.1, abs(high) * 0.02, 1e-6)
    return max(low - room, 0.0) if low >= 0 else low - room, high + room
