"""Charts as HTML text, a legend and a drawing in SVG: lines, stacked areas, a tree; and the style that they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "COLORS",
    "STYLE",
    "Series",
    "downsample",
    "legend",
    "line_chart",
    "short",
    "stacked_chart",
    "ticks",
    "tree_chart",
]

#: told apart by people who see red and green alike (Okabe and Ito), then some more
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a", "#b8a800", "#882255", "#3f51b5")

#: letters of drawings shrink with them: on a small screen they start larger
STYLE = """
svg{display:block;width:100%;height:auto;margin:0 auto;font-family:inherit}
.grid{stroke:#e9ecef}.axis{stroke:#9aa5b1}.tick{font-size:11px;fill:#616e7c}.label{font-size:11.5px;fill:#3d4852}
.edge{fill:none;stroke:#b8c2cc;stroke-width:1.5}
.node{font-size:13px;font-weight:600;fill:#fff}.note{font-size:10px;font-weight:400;fill:#fff;fill-opacity:.9}
.key{margin:0 0 10px;font-size:12.5px;color:#3d4852}.key span{margin-right:16px;white-space:nowrap}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
@media(max-width:660px){.tick,.label{font-size:17px}}
"""

WIDTH, HEIGHT = 620, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 30, 40

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
    if not high - low > 0:
        return [low]
    step = _step(high - low, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number in few characters, as an axis has room for."""
    for least, unit, sign in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.4g} {sign}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def legend(entries: Mapping[str, str]) -> str:
    """Return names with their colours, which wrap where a line is short."""
    named = [(escape(name.replace("_", " ")), color) for name, color in entries.items()]
    shown = "".join(f'<span><i style="background:{color}"></i>{name}</span>' for name, color in named)
    return f'<p class="key">{shown}</p>'


def _step(span: float, count: int = 5) -> float:
    raw = max(span / count, 1e-300)  # nothing smaller has a logarithm everywhere
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)


def _outward(low: float, high: float) -> tuple[float, float]:
    """Return the range up to the next ticks, so that the highest and lowest values can be read."""
    step = _step(high - low)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


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

    def draw(self, body: Sequence[str], *, y_label: str, y_text: Callable[[float], str]) -> str:
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
        return "".join([*parts, "</svg>"])


def line_chart(
    series: Sequence[Series],
    *,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    y_text: Callable[[float], str] = short,
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
    low, high = _outward(low, high)
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
    named = {s.name: s.color for s in series if not s.faint}
    return (legend(named) if len(named) > 1 else "") + frame.draw(body, y_label=y_label, y_text=y_text)


def stacked_chart(
    x: Sequence[float], layers: Mapping[str, Sequence[float]], colors: Mapping[str, str], *, y_label: str
) -> str:
    """Return layers stacked over steps, the first at the bottom. The y axis starts at 0."""
    layers = {name: values for name, values in layers.items() if any(values)}
    if not layers or not x:
        return ""
    tops = [math.fsum(values) for values in zip(*layers.values(), strict=True)]
    # one slow step (a checkpoint, a lost sphere) must not flatten all others
    _, high = _outward(0.0, min(max(tops), 1.6 * sorted(tops)[int(0.95 * (len(tops) - 1))]) or 1.0)
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
            f"<title>{escape(name.replace('_', ' '))}</title></polygon>"
        )
        below = above
    return legend({name: colors[name] for name in layers}) + frame.draw(body, y_label=y_label, y_text=short)


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
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px;min-width:{0.6 * width:.0f}px" '
        f'role="img" '
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
    low, high = min(xs), max(xs)
    if high - low < 1:
        return low - 1, high + 1
    return (0.0 if 0 <= low < 0.05 * high else low), high  # means of several steps begin a little after the first
