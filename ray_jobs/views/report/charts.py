"""Charts as geometry: numbers → where everything lies in a drawing. The templates turn it into SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HEIGHT, LEFT, TOP, RIGHT = 250.0, 58.0, 14.0, 12.0
FULL = 1140.0  # pixels: the width of a page
LEAST_PITCH, LEAST_GROUP, MOST_GROUP = 4.0, 14.0, 120.0  # from mark to mark, and from column to column
CHARACTER = 5.9  # about the width of one in a chart's type, in pixels
WHISKERS = (5, 25, 50, 75, 95)  # per cent of the neurons


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """From values in [low, high] to pixels in [start, end], evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[Tick]:
        """Round numbers on the scale."""
        return [Tick(self(value), short(value)) for value in self.round_numbers(about)]

    def round_numbers(self, about: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if len(decades) > about else (1, 3) if len(decades) > 2 else (1, 2, 5)
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            if sum(self.low <= value <= self.high for value in found) < 3:  # too narrow for the logarithm to matter
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
    """The spread of some values in a column: a line for nine in ten of them, a bar for half, a point for the median."""

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
    """path: as SVG has it.  kind: plain, thin, strong or dashed."""

    path: str
    series: int
    kind: str = "plain"
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """What lies where in a drawing of width × height pixels, within a frame; series are colours by number."""

    name: str
    title: str
    width: float
    height: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_title: str = ""
    y_title: str = ""
    turned: bool = False  # the words of x_ticks run upwards
    wide: bool = False  # scrolled rather than shrunk where there is no room
    series: list[tuple[str, int]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    bands: list[Line] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    left: float = LEFT
    top: float = TOP

    @property
    def right(self) -> float:
        return self.width - RIGHT


Spread = Sequence[float]  # the values at WHISKERS


def spreads(
    name: str, title: str, y_title: str, columns: Sequence[str], spread: Mapping[tuple[str, str], Spread]
) -> Chart:
    """Spreads by column and series, side by side: the paper's Figure 3."""
    series = list(dict.fromkeys(one for _, one in spread))
    group = min(MOST_GROUP, max((FULL - LEFT - RIGHT) / len(columns), LEAST_PITCH * (len(series) + 1), LEAST_GROUP))
    pitch = group / (len(series) + 1)
    width = LEFT + group * len(columns) + RIGHT
    bottom = TOP + HEIGHT
    values = [value for five in spread.values() for value in five]
    y = Scale(min(0.0, *values), max(1.0, *values), bottom, TOP)
    centres = {column: LEFT + group * (i + 0.5) for i, column in enumerate(columns)}
    marks = []
    for (column, one), five in spread.items():
        number = series.index(one)
        x = round(centres[column] + pitch * (number - (len(series) - 1) / 2), 1)
        said = f"{column}, {one}: median {five[2]:.3f}, half of the neurons {five[1]:.3f} to {five[3]:.3f}"
        low, lower, median, upper, high = (y(value) for value in five)
        marks.append(Mark(x, low, upper, median, lower, high, round(min(pitch * 0.72, 14), 1), number, said))
    ticks = [Tick(round(x, 1), column) for column, x in centres.items()]
    height = bottom + 14 + CHARACTER * max(map(len, columns))
    legend = [(one, number) for number, one in enumerate(series)]
    return Chart(
        name, title, width, height, bottom, ticks, y.ticks(), "", y_title, turned=True, wide=True, series=legend,
        marks=marks,
    )  # fmt: skip


Point = tuple[float, float]


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """A line through some points."""
    return "M" + "L".join(f"{x(a):g} {y(b):g}" for a, b in points)


def framed(points: Sequence[Point], width: float, log: bool, floor: float | None = None) -> tuple[Scale, Scale]:
    """Scales that hold some points."""
    xs, ys = zip(*points)
    low = min(ys) if floor is None else min(floor, *ys)
    x = Scale(min(xs), max(xs), LEFT, width - RIGHT, log)
    return x, Scale(low, max(ys), TOP + HEIGHT, TOP, log)


def banded(
    name: str, title: str, x_title: str, y_title: str, curves: Mapping[str, Sequence[tuple[float, float, float, float]]]
) -> Chart:
    """Curves of (x, mean, low, high), each with its band, if low and high are numbers."""
    width = 760.0
    everything = [(x, v) for rows in curves.values() for x, *values in rows for v in values if not math.isnan(v)]
    x, y = framed(everything, width, log=False, floor=0.0)
    bands, lines = [], []
    for number, (one, rows) in enumerate(curves.items()):
        above, below = [(r[0], r[3]) for r in rows], [(r[0], r[2]) for r in reversed(rows)]
        if not any(math.isnan(value) for _, value in above):
            bands.append(Line(path([*above, *below], x, y) + "Z", number))
        kind = "dashed" if one == "random" else "plain"
        lines.append(Line(path([(r[0], r[1]) for r in rows], x, y), number, kind, one))
    legend = [(one, number) for number, one in enumerate(curves)]
    bottom = TOP + HEIGHT
    return Chart(
        name, title, width, bottom + 40, bottom, x.ticks(8), y.ticks(), x_title, y_title, series=legend, bands=bands,
        lines=lines,
    )  # fmt: skip


def narrowing(
    name: str, title: str, x_title: str, y_title: str, lines: Mapping[str, Sequence[Point]], tolerance: float | None
) -> Chart:
    """Lines that fall on logarithmic scales, the upper edge of all of them, and what it is to fall below."""
    width = 380.0
    points = [point for line in lines.values() for point in line]
    shown = [*points, *([(points[0][0], tolerance)] if tolerance else [])]
    x, y = framed(shown, width, log=True)
    drawn = [Line(path(line, x, y), 0, "thin", one) for one, line in lines.items()]
    worst = [(a, max(b for c, b in points if c == a)) for a in sorted({a for a, _ in points})]
    drawn.append(Line(path(worst, x, y), 0, "strong", "the worst operator at each look"))
    if tolerance:
        drawn.append(Line(path([(x.low, tolerance), (x.high, tolerance)], x, y), 3, "dashed", "tolerance"))
    bottom = TOP + HEIGHT
    return Chart(
        name, title, width, bottom + 40, bottom, x.ticks(), y.ticks(), x_title, y_title, lines=drawn,
    )  # fmt: skip


def short(value: float) -> str:
    """A number on an axis: 0.01, 500, 20k, 1.28M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
