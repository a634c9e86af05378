"""Compute the geometry of the report's charts; the templates write it as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_jobs.units import format_quantity

HEIGHT, LEFT, TOP, RIGHT = 250.0, 58.0, 14.0, 12.0
FULL = 1140.0  # pixels: the width of a page
MIN_PITCH, MIN_GROUP, MAX_GROUP = 4.0, 14.0, 120.0  # pixels between marks, and between columns
CHARACTER = 5.9  # approximate width of a character in a chart, in pixels
WHISKERS = (5, 25, 50, 75, 95)  # percentiles over the neurons


@dataclass(frozen=True)
class Tick:
    """A tick of an axis.

    Attributes:
        at: Position in pixels.
        text: Label.
    """

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Map values in [low, high] to pixels in [start, end], linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value in pixels."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[Tick]:
        """Return about the given number of ticks at round numbers."""
        return [Tick(self(value), format_quantity(value)) for value in self.round_numbers(about)]

    def round_numbers(self, about: int) -> list[float]:
        """Return about the given number of round values on the scale."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if len(decades) > about else (1, 3) if len(decades) > 2 else (1, 2, 5)
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            if sum(self.low <= value <= self.high for value in found) < 3:  # a narrow range is nearly linear
                return Scale(self.low, self.high, self.start, self.end).round_numbers(about)
        else:
            rough = max(self.high - self.low, 1e-12) / about
            unit = 10.0 ** math.floor(math.log10(rough))
            step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
            first = math.ceil(self.low / step - 1e-9)
            found = [round(step * i, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0]


@dataclass(frozen=True)
class Mark:
    """The distribution of values in a column, in pixels.

    A line spans the 5th to 95th percentile, a bar the 25th to 75th, and a point marks the median.
    """

    x: float
    low: float
    upper: float
    median: float
    lower: float
    high: float
    width: float
    series: int
    title: str


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        path: The SVG path.
        series: Number of the series, which selects the color.
        kind: `plain`, `thin`, `strong` or `dashed`.
        title: Text shown by the browser under the pointer.
    """

    path: str
    series: int
    kind: str = "plain"
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing of width × height pixels with its frame; `bottom`, `left` and `top` are the frame's edges."""

    name: str
    title: str
    width: float
    height: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_title: str = ""
    y_title: str = ""
    turned: bool = False  # the labels of x_ticks are vertical
    wide: bool = False  # scrolled instead of shrunk on a narrow page
    series: list[tuple[str, int]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    bands: list[Line] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    left: float = LEFT
    top: float = TOP

    @property
    def right(self) -> float:
        """The right edge of the frame in pixels."""
        return self.width - RIGHT


Spread = Sequence[float]  # the values at WHISKERS


def spreads(
    name: str, title: str, y_title: str, columns: Sequence[str], spread: Mapping[tuple[str, str], Spread]
) -> Chart:
    """Return a chart of distributions by column and series, like Figure 3 of the paper.

    Args:
        name: Identifier in the page.
        title: Title of the chart.
        y_title: Title of the vertical axis.
        columns: The columns, in order.
        spread: For each (column, series) the values at the percentiles `WHISKERS`.
    """
    series = list(dict.fromkeys(one for _, one in spread))
    group = min(MAX_GROUP, max((FULL - LEFT - RIGHT) / len(columns), MIN_PITCH * (len(series) + 1), MIN_GROUP))
    pitch = group / (len(series) + 1)
    width = LEFT + group * len(columns) + RIGHT
    bottom = TOP + HEIGHT
    values = [value for five in spread.values() for value in five]
    y = Scale(min(0.0, *values), max(1.0, *values), bottom, TOP)
    centers = {column: LEFT + group * (i + 0.5) for i, column in enumerate(columns)}
    marks = []
    for (column, one), five in spread.items():
        number = series.index(one)
        x = round(centers[column] + pitch * (number - (len(series) - 1) / 2), 1)
        text = f"{column}, {one}: median {five[2]:.3f}, half of the neurons {five[1]:.3f} to {five[3]:.3f}"
        low, lower, median, upper, high = (y(value) for value in five)
        marks.append(Mark(x, low, upper, median, lower, high, round(min(pitch * 0.72, 14), 1), number, text))
    ticks = [Tick(round(x, 1), column) for column, x in centers.items()]
    height = bottom + 14 + CHARACTER * max(map(len, columns))
    legend = [(one, number) for number, one in enumerate(series)]
    return Chart(
        name, title, width, height, bottom, ticks, y.ticks(), "", y_title, turned=True, wide=True, series=legend,
        marks=marks,
    )  # fmt: skip


Point = tuple[float, float]


def svg_path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Return the SVG path of a line through points."""
    return "M" + "L".join(f"{x(a):g} {y(b):g}" for a, b in points)


def scales_for(points: Sequence[Point], width: float, log: bool, floor: float | None = None) -> tuple[Scale, Scale]:
    """Return scales for x and y that contain all points; the y scale also contains `floor`."""
    xs, ys = zip(*points)
    low = min(ys) if floor is None else min(floor, *ys)
    x = Scale(min(xs), max(xs), LEFT, width - RIGHT, log)
    return x, Scale(low, max(ys), TOP + HEIGHT, TOP, log)


def curves_with_bands(
    name: str, title: str, x_title: str, y_title: str, curves: Mapping[str, Sequence[tuple[float, float, float, float]]]
) -> Chart:
    """Return a chart of curves with confidence bands.

    Args:
        name: Identifier in the page.
        title: Title of the chart.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
        curves: For each curve its points (x, mean, low, high). Without numbers for low and high it has no band.
    """
    width = 760.0
    everything = [(x, v) for rows in curves.values() for x, *values in rows for v in values if not math.isnan(v)]
    x, y = scales_for(everything, width, log=False, floor=0.0)
    bands, lines = [], []
    for number, (one, rows) in enumerate(curves.items()):
        above, below = [(r[0], r[3]) for r in rows], [(r[0], r[2]) for r in reversed(rows)]
        if not any(math.isnan(value) for _, value in above):
            bands.append(Line(svg_path([*above, *below], x, y) + "Z", number))
        kind = "dashed" if one == "random" else "plain"
        lines.append(Line(svg_path([(r[0], r[1]) for r in rows], x, y), number, kind, one))
    legend = [(one, number) for number, one in enumerate(curves)]
    bottom = TOP + HEIGHT
    return Chart(
        name, title, width, bottom + 40, bottom, x.ticks(8), y.ticks(), x_title, y_title, series=legend, bands=bands,
        lines=lines,
    )  # fmt: skip


def convergence_lines(
    name: str, title: str, x_title: str, y_title: str, lines: Mapping[str, Sequence[Point]], tolerance: float | None
) -> Chart:
    """Return a chart of lines on logarithmic scales, with their maximum and the tolerance that it must reach.

    Args:
        name: Identifier in the page.
        title: Title of the chart.
        x_title: Title of the horizontal axis.
        y_title: Title of the vertical axis.
        lines: The points of each line.
        tolerance: The tolerance; None if there is none.
    """
    width = 380.0
    points = [point for line in lines.values() for point in line]
    shown = [*points, *([(points[0][0], tolerance)] if tolerance else [])]
    x, y = scales_for(shown, width, log=True)
    drawn = [Line(svg_path(line, x, y), 0, "thin", one) for one, line in lines.items()]
    worst = [(a, max(b for c, b in points if c == a)) for a in sorted({a for a, _ in points})]
    drawn.append(Line(svg_path(worst, x, y), 0, "strong", "worst operator at each check"))
    if tolerance:
        drawn.append(Line(svg_path([(x.low, tolerance), (x.high, tolerance)], x, y), 3, "dashed", "tolerance"))
    bottom = TOP + HEIGHT
    return Chart(
        name, title, width, bottom + 40, bottom, x.ticks(), y.ticks(), x_title, y_title, lines=drawn,
    )  # fmt: skip
