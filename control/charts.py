"""Charts as SVG text: lines, stacked areas and a tree. Pure: numbers in, text out; no style sheet of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["COLORS", "Series", "downsample", "line_chart", "stacked_chart", "ticks", "tree_chart"]

#: told apart by people who see red and green alike (Okabe and Ito), dark ones first
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a", "#b8a800")

WIDTH, HEIGHT = 620, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 40

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart. ``marks``: points with a dot each; ``faint``: thin and pale, behind its smoothed twin."""

    name: str
    points: Sequence[Point]
    color: str
    marks: bool = False
    faint: bool = False


def downsample(points: Sequence[Point], limit: int = 400) -> list[Point]:
    """Return at most ``limit`` points: means of equal runs of neighbours."""
    if len(points) <= limit:
        return list(points)
    result = []
    for i in range(limit):
        part = points[i * len(points) // limit : (i + 1) * len(points) // limit]
        result.append((part[-1][0], math.fsum(y for _, y in part) / len(part)))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers within ``[low, high]``, about ``count`` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Axes: from values to places."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.down(y):.1f}"

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (HEIGHT - TOP - BOTTOM)

    def draw(self, body: Sequence[str], *, y_label: str, y_text: Callable[[float], str], legend: Sequence[str]) -> str:
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over steps">']
        for y in ticks(*self.y):
            place = self.down(y)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{place + 3.5:.1f}" text-anchor="end">{y_text(y)}</text>'
            )
        floor = HEIGHT - BOTTOM
        for x in (x for x in ticks(*self.x, count=6) if x >= 0 and x == int(x)):
            place = self.across(x)
            parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            parts.append(f'<text class="tick" x="{place:.1f}" y="{floor + 16}" text-anchor="middle">{x:,.0f}</text>')
        parts += body
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
        parts.append(f'<text class="label" x="6" y="14">{escape(y_label)}</text>')
        return "".join([*parts, *legend, "</svg>"])


def line_chart(
    series: Sequence[Series],
    *,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
) -> str:
    """Return lines over steps. ``y_range``: bounds that the axis has at least; None: from the data."""
    series = [s for s in series if s.points]
    if not series:
        return ""
    clear = [y for s in series if not s.faint for _, y in s.points]
    # what is faint is noise: it may leave the picture at the top rather than flatten the rest
    noise = sorted(y for s in series if s.faint for _, y in s.points)
    values = clear + noise[len(noise) // 50 : len(noise) - len(noise) // 50]
    low = min([*values, *([] if y_range[0] is None else [y_range[0]])])
    high = max([*values, *([] if y_range[1] is None else [y_range[1]])])
    if low == high:
        low, high = (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))
    frame = _Frame(_x_range([s.points for s in series]), (low, high))
    body = []
    for s in series:
        inside = [(x, min(max(y, low), high)) for x, y in s.points]
        if len(inside) > 1:
            width, opacity = (1, 0.28) if s.faint else (2, 1)
            path = " ".join(frame.at(x, y) for x, y in inside)
            body.append(
                f'<polyline points="{path}" fill="none" stroke="{s.color}" stroke-width="{width}" '
                f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
            )
        if len(inside) == 1 or (s.marks and len(inside) <= 60):
            for x, y in inside:
                body.append(
                    f'<circle cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}" r="2.6" fill="#fff" '
                    f'stroke="{s.color}" stroke-width="1.6">'
                    f"<title>step {x:,.0f}: {y_text(y)}</title></circle>"
                )
    clear_series = [(s.name, s.color) for s in series if not s.faint]
    legend = _legend(clear_series) if len(clear_series) > 1 else []
    return frame.draw(body, y_label=y_label, y_text=y_text, legend=legend)


def stacked_chart(
    x: Sequence[float], layers: Mapping[str, Sequence[float]], colors: Mapping[str, str], *, y_label: str
) -> str:
    """Return layers stacked over steps, the first at the bottom. The y axis starts at 0."""
    layers = {name: values for name, values in layers.items() if any(values)}
    if not layers or not x:
        return ""
    tops = [math.fsum(values) for values in zip(*layers.values(), strict=True)]
    # one slow step (a checkpoint, a lost sphere) must not flatten all others
    high = min(max(tops), 1.6 * sorted(tops)[int(0.95 * (len(tops) - 1))]) or 1.0
    if len(x) == 1:  # an area needs two edges
        x, layers = [x[0] - 0.4, x[0] + 0.4], {name: [values[0]] * 2 for name, values in layers.items()}
    frame = _Frame(_x_range([[(value, 0.0) for value in x]]), (0.0, high))
    body, below = [], [0.0] * len(x)
    for name, values in layers.items():
        above = [b + v for b, v in zip(below, values, strict=True)]
        edge = [frame.at(a, min(y, high)) for a, y in zip(x, above, strict=True)]
        edge += [frame.at(a, min(y, high)) for a, y in zip(reversed(x), reversed(below), strict=True)]
        body.append(
            f'<polygon points="{" ".join(edge)}" fill="{colors[name]}" fill-opacity="0.85">'
            f"<title>{escape(name)}</title></polygon>"
        )
        below = above
    legend = _legend([(name, colors[name]) for name in layers])
    return frame.draw(body, y_label=y_label, y_text=lambda y: f"{y:g}", legend=legend)


def tree_chart(parents: Mapping[str, str], *, colors: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """Return a drawing of the tree ``{id: parent}``; what has no parent in it hangs below ``control``.

    ``notes`` is shown below each id and in full when one points at it.
    """
    children: dict[str, list[str]] = {}
    for node in sorted(parents, key=_natural):
        parent = parents[node]
        children.setdefault(parent if parent in parents and parent != node else "control", []).append(node)
    places: dict[str, Point] = {}
    leaves = _place("control", children, places, depth=0, next_leaf=0)
    depth = max(y for _, y in places.values())
    # a wide tree gets narrower boxes, then none but dots
    gap = min(116.0, max(12.0, 1240.0 / leaves))
    box = gap - 12 if gap >= 50 else 0.0
    width, height = max(leaves * gap, 150.0), depth * 66 + 52

    def at(node: str) -> Point:
        x, y = places[node]
        return (width - leaves * gap) / 2 + (x + 0.5) * gap, y * 66 + 24

    edges, nodes = [], []
    for node in places:
        x, y = at(node)
        for child in children.get(node, ()):
            a, b = at(child)
            middle = f"{(y + b) / 2:.1f}"
            edges.append(
                f'<path class="edge" d="M{x:.1f},{y:.1f} C{x:.1f},{middle} {a:.1f},{middle} {a:.1f},{b:.1f}"/>'
            )
        color, note = colors.get(node, "#3d4852"), notes.get(node, "")
        title = f"<title>{escape(f'{node} {note}'.strip())}</title>"
        if node != "control" and not box:
            nodes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}">{title}</circle>')
            continue
        w = max(box, 92.0) if node == "control" else box
        shown = f'<tspan class="note" x="{x:.1f}" dy="13">{escape(note)}</tspan>' if note and w >= 80 else ""
        nodes.append(
            f'<rect x="{x - w / 2:.1f}" y="{y - 19:.1f}" width="{w:.1f}" height="38" rx="7" fill="{color}">{title}'
            f'</rect><text class="node" x="{x:.1f}" y="{y - 2 if shown else y + 4:.1f}" text-anchor="middle">'
            f"{escape(node)}{shown}</text>"
        )
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="tree of spheres">{"".join(edges + nodes)}</svg>'
    )


def _place(
    node: str, children: Mapping[str, Sequence[str]], places: dict[str, Point], *, depth: int, next_leaf: int
) -> int:
    """Put leaves side by side and parents above the middle of their children. Return the next free leaf."""
    below = [child for child in children.get(node, ()) if child not in places]
    places[node] = (float(next_leaf), float(depth))
    if not below:
        return next_leaf + 1
    for child in below:
        next_leaf = _place(child, children, places, depth=depth + 1, next_leaf=next_leaf)
    places[node] = ((places[below[0]][0] + places[below[-1]][0]) / 2, float(depth))
    return next_leaf


def _natural(name: str) -> tuple[str, int]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or -1)


def _x_range(lines: Sequence[Sequence[Point]]) -> tuple[float, float]:
    xs = [x for points in lines for x, _ in points]
    return (min(xs), max(xs)) if max(xs) - min(xs) >= 1 else (min(xs) - 1, max(xs) + 1)


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return the legend from the right end of the top line."""
    parts, x = [], float(WIDTH - RIGHT)
    for name, color in reversed(entries):
        x -= 6.4 * len(name)
        parts.append(f'<text class="legend" x="{x:.0f}" y="14">{escape(name)}</text>')
        x -= 14
        parts.append(f'<rect x="{x:.0f}" y="6" width="9" height="9" rx="2" fill="{color}"/>')
        x -= 12
    return parts
