"""``report.html`` of a finished run: one file with its figures, charts and tree, without scripts or outside links.

It reads journal.jsonl, events.jsonl and summary.json of the run directory, and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from control.charts import COLORS, Point, Series, downsample, line_chart, stacked_chart, tree_chart
from spheres.errors import ConfigError

__all__ = ["write_report"]

#: phases from the bottom of the stack up; others follow. Colours go with the phase, on every chart of the page.
PHASES = ("compute", "sum", "send_up", "send_down", "wait", "optimizer", "journal")
#: parts of a run that one chart tells apart
BUCKETS = 240
ROLES = {"control": "#3d4852", "leaf": "#0072b2", "inner": "#00795a", "relay": "#a8541f"}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from what the run left, also of a run that failed, and return its path.

    Raises ConfigError where the directory holds no run.
    """
    steps = _steps(run_dir / "journal.jsonl")
    events = list(_records(run_dir / "events.jsonl"))
    summary = next(_records(run_dir / "summary.json", whole=True), {})
    if not steps and not summary:
        raise ConfigError(f"{run_dir} holds no run: there is neither journal.jsonl nor summary.json in it")
    path = run_dir / "report.html"
    fresh = path.with_suffix(".html.tmp")
    fresh.write_text(_page(run_dir.name, steps, events, summary), encoding="utf-8")
    fresh.replace(path)
    return path


def _records(path: Path, *, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; a missing file has none, and a line cut by a crash is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for text in [file.read()] if whole else file:
            try:
                record = json.loads(text)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _steps(path: Path) -> list[dict[str, Any]]:
    """Return one record per step, in order: of a step that was done again, the last."""
    latest = {record["step"]: record for record in _records(path) if record.get("event", "step") == "step"}
    return [latest[step] for step in sorted(latest)]


def _page(
    name: str, steps: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> str:
    evaluations = {r["step"]: r for r in events if r.get("event") == "evaluation"}
    ordered = [evaluations[step] for step in sorted(evaluations)]
    charts = [
        ("Loss", _learning_chart(steps, ordered, "loss")),
        *((_title(metric), _learning_chart(steps, ordered, metric)) for metric in _metric_names(steps, ordered)),
        ("Where the time of a step goes, mean over the spheres", _time_chart(steps)),
        ("Gradient norm", _single_chart(steps, ("gradient", "norm"), "norm of the mean gradient", COLORS[3])),
        ("Throughput", _throughput_chart(steps)),
        ("Learning rate", _single_chart(steps, ("learning_rate",), "learning rate", COLORS[4])),
    ]
    spheres = _spheres(summary)
    parts = [
        _header(name, summary),
        _cards(summary),
        '<div class="charts">',
        *(f"<section><h2>{escape(title)}</h2>{chart}</section>" for title, chart in charts if chart),
        "</div>",
        _tree(summary, spheres),
        _sphere_table(spheres),
        _event_table(events),
    ]
    return _SHELL.format(
        title=escape(f"Run {summary.get('run_id', name)}"), style=_STYLE, body="\n".join(p for p in parts if p)
    )


# --- charts


def _value(record: Mapping[str, Any], *keys: str) -> float | None:
    found: Any = record
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _points(records: Sequence[Mapping[str, Any]], *keys: str) -> list[Point]:
    pairs = ((record["step"], _value(record, *keys)) for record in records)
    return [(float(step), value) for step, value in pairs if value is not None]


def _metric_names(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for r in (*steps[-1:], *evaluations[-1:]) for name in r.get("metrics", {})))


def _learning_chart(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], name: str) -> str:
    keys = ("loss",) if name == "loss" else ("metrics", name)
    train = _points(steps, *keys)
    percent = "accuracy" in name
    return line_chart(
        [
            Series("per step", downsample(train, 700), COLORS[0], faint=True),
            Series("training", _smooth(train), COLORS[0]),
            Series("test", _points(evaluations, *keys), COLORS[1], marks=True),
        ],
        y_label=name,
        y_range=(None, 1.0) if percent else (0.0, None),
        y_text=(lambda y: f"{y * 100:.4g} %") if percent else (lambda y: f"{y:.4g}"),
    )


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Return means over a window around each point, a fiftieth of the run wide and narrower at both ends."""
    half = len(points) // 100
    sums = list(accumulate((y for _, y in points), initial=0.0))
    smooth = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        smooth.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return downsample(smooth)


def _single_chart(steps: Sequence[Mapping[str, Any]], keys: tuple[str, ...], label: str, color: str) -> str:
    points = _points(steps, *keys)
    return line_chart([Series(label, downsample(points), color)], y_label=label, y_range=(0.0, None))


def _throughput_chart(steps: Sequence[Mapping[str, Any]]) -> str:
    pairs = [(r["step"], _value(r, "batch_samples"), _value(r, "seconds", "step")) for r in steps]
    buckets = _buckets([(s, n, t) for s, n, t in pairs if n is not None and t])
    points = [(float(part[-1][0]), sum(n for _, n, _ in part) / sum(t for _, _, t in part)) for part in buckets]
    return line_chart(
        [Series("samples/s", points, COLORS[2])],
        y_label="samples per second",
        y_range=(0.0, None),
        y_text=lambda y: f"{y:,.0f}",
    )


def _time_chart(steps: Sequence[Mapping[str, Any]]) -> str:
    """Stack the phases of a step: the mean of its spheres, and what control does after them."""
    rows = [_phase_seconds(record) for record in steps]
    colors = _phase_colors(rows)
    buckets = _buckets(list(zip(steps, rows, strict=True)))
    x = [float(part[-1][0]["step"]) for part in buckets]
    layers = {n: [1000 * sum(row.get(n, 0.0) for _, row in part) / len(part) for part in buckets] for n in colors}
    return stacked_chart(x, layers, colors, y_label="milliseconds")


def _phase_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    count = max(1, record.get("spheres") or 1)
    phases = {name: (_value(phase, "sum") or 0.0) / count for name, phase in record.get("phases", {}).items()}
    own = {name: _value(record, "seconds", name) or 0.0 for name in ("optimizer", "journal")}
    return phases | {name: value for name, value in own.items() if value}


def _phase_colors(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    seen = dict.fromkeys(name for row in rows for name in row)
    names = [n for n in PHASES if n in seen] + [n for n in seen if n not in PHASES]
    return {name: COLORS[(PHASES.index(name) if name in PHASES else i) % len(COLORS)] for i, name in enumerate(names)}


def _buckets(items: Sequence[Any]) -> list[Sequence[Any]]:
    count = min(BUCKETS, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


# --- the rest of the page


def _header(name: str, summary: Mapping[str, Any]) -> str:
    state = str(summary.get("state", "unfinished"))
    error = f'<p class="error">{escape(str(summary["error"]))}</p>' if summary.get("error") else ""
    shown = f'<span class="state {escape(state)}">{escape(state)}</span>'
    return f"<h1>Run {escape(str(summary.get('run_id', name)))} {shown}</h1>{error}"


def _cards(summary: Mapping[str, Any]) -> str:
    metrics = summary.get("metrics") or {}
    shown = [
        (name, _percent(value) if "accuracy" in name else _number(value))
        for name, value in metrics.items()
        if name != "loss"
    ]
    shown += [
        ("loss", _number(summary.get("loss"))),
        ("steps", _number(summary.get("steps"))),
        ("epochs", _number(summary.get("epochs"))),
        ("samples", _number(summary.get("samples"))),
        ("samples/s", _number(summary.get("samples_per_second"))),
        ("seconds", _number(summary.get("wall_seconds"))),
        ("in synchronisation", _percent(summary.get("sync_fraction"))),
    ]
    cards = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for label, value in shown if value)
    digest = summary.get("weights_sha256")
    below = f'<p class="digest">SHA-256 of the weights <code>{escape(str(digest))}</code></p>' if digest else ""
    return f'<div class="cards">{cards}</div>{below}' if cards else ""


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: object) -> str:
    return f"{value * 100:.4g} %" if isinstance(value, int | float) else ""


def _spheres(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    spheres = summary.get("spheres")
    return [s for s in spheres if isinstance(s, Mapping)] if isinstance(spheres, list) else []


def _tree(summary: Mapping[str, Any], spheres: Sequence[Mapping[str, Any]]) -> str:
    parents = summary.get("tree") or {s["id"]: s.get("parent") or "control" for s in spheres}
    if not parents:
        return ""
    roles = {s["id"]: str(s.get("role") or "leaf") for s in spheres}
    inner = set(parents.values())
    colors = {"control": ROLES["control"]}
    for node in parents:
        # summaries of failed runs may know a tree but no reports
        colors[node] = ROLES.get(roles.get(node, "inner" if node in inner else "leaf"), ROLES["leaf"])
    notes = {s["id"]: f"{_number(s.get('samples'))} samples" for s in spheres if s.get("samples") is not None}
    used = [role for role in ROLES if ROLES[role] in colors.values()]
    legend = "".join(f'<span><i style="background:{ROLES[role]}"></i>{role}</span>' for role in used)
    drawing = tree_chart(parents, colors=colors, notes=notes)
    return f'<section class="wide"><h2>Tree</h2><p class="key">{legend}</p>{drawing}</section>'


def _sphere_table(spheres: Sequence[Mapping[str, Any]]) -> str:
    if not spheres:
        return ""
    colors = _phase_colors([s.get("phase_seconds") or {} for s in spheres])
    longest = max(sum((s.get("phase_seconds") or {}).values()) for s in spheres) or 1.0
    rows = []
    for s in spheres:
        phases = s.get("phase_seconds") or {}
        bar = "".join(
            f'<i style="width:{100 * phases[n] / longest:.2f}%;background:{c}" '
            f'title="{escape(n)} {phases[n]:.3g} s"></i>'
            for n, c in colors.items()
            if phases.get(n)
        )
        cells = [s.get(key) for key in ("id", "parent", "role", "host")]
        numbers = [s.get(key) for key in ("microbatches", "samples")]
        rows.append(
            "<tr>"
            + "".join(f"<td>{escape(str(cell if cell is not None else ''))}</td>" for cell in cells)
            + "".join(f'<td class="number">{_number(number)}</td>' for number in numbers)
            + f'<td class="number">{sum(phases.values()):.3g}</td><td class="bar"><div>{bar}</div></td></tr>'
        )
    numbers_head = "".join(f'<th class="number">{name}' for name in ("microbatches", "samples", "seconds"))
    head = f"<th>sphere<th>parent<th>role<th>host{numbers_head}<th>by phase"
    legend = "".join(f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colors.items())
    return (
        f'<section class="wide"><h2>Spheres</h2><p class="key">{legend}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    """List what is out of the ordinary: lost spheres, failed checkpoints, errors."""
    odd = [e for e in events if e.get("event") in ("sphere_lost", "error") or e.get("ok") is False]
    if not odd:
        return ""
    rows = "".join(
        f"<tr><td>{_number(e.get('step'))}</td><td>{escape(str(e.get('event')).replace('_', ' '))}</td>"
        f"<td>{escape(' '.join(str(e[key]) for key in ('sphere', 'reason', 'error') if e.get(key)))}</td></tr>"
        for e in odd[:200]
    )
    more = f"<p>and {len(odd) - 200} more in events.jsonl</p>" if len(odd) > 200 else ""
    head = "<tr><th>step<th>event<th>what</tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f'<section class="wide"><h2>Out of the ordinary</h2>{table}{more}</section>'


_SHELL = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

_STYLE = """
body{margin:0;background:#f6f7f9;color:#1f2933;font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:24px;font-weight:650;margin:0 0 18px}h2{font-size:15px;font-weight:600;margin:0 0 10px}
.state{font-size:13px;padding:3px 10px;border-radius:99px;vertical-align:3px;
background:#e4e7eb;color:#3d4852}
.state.completed{background:#d7f2e3;color:#0b6b41}.state.error{background:#fbdcd9;color:#9b1c12}
.error{background:#fdeceb;border-left:3px solid #c8372d;padding:10px 14px;margin:0 0 18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:12px}
.cards div,section{background:#fff;border:1px solid #e4e7eb;border-radius:10px}
.cards div{padding:12px 14px}.cards b{display:block;font-size:20px;font-weight:650;font-variant-numeric:tabular-nums}
.cards span{font-size:12.5px;color:#616e7c}
.digest{font-size:12.5px;color:#616e7c;margin:10px 2px 20px;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:16px}
section{padding:16px 18px}.wide{margin-top:16px;overflow-x:auto}
svg{display:block;width:100%;height:auto;margin:0 auto;font-family:inherit}
.grid{stroke:#e9ecef}.axis{stroke:#9aa5b1}.tick{font-size:11px;fill:#616e7c}.label{font-size:11.5px;fill:#3d4852}
.legend{font-size:11.5px;fill:#3d4852}.edge{fill:none;stroke:#b8c2cc;stroke-width:1.5}
.node{font-size:13px;font-weight:600;fill:#fff}.note{font-size:10px;font-weight:400;fill:#fff;fill-opacity:.9}
.key{margin:0 0 10px;font-size:12.5px;color:#3d4852}.key span{margin-right:16px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
table{border-collapse:collapse;width:100%;font-size:13.5px}th{font-weight:600;text-align:left;color:#616e7c;font-size:12.5px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid #eef0f2}tr:last-child td{border-bottom:0}
td:last-child{padding-right:0}.number{text-align:right;font-variant-numeric:tabular-nums}.bar{width:36%;min-width:160px}
.bar div{display:flex;height:12px;border-radius:3px;overflow:hidden;background:#eef0f2}
"""


def _title(metric: str) -> str:
    return metric[:1].upper() + metric[1:].replace("_", " ")
