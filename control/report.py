"""``report.html`` of a finished run: one file with its figures, charts and tree, without scripts or outside links.

It reads journal.jsonl, events.jsonl, summary.json and run.json of the run directory, and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

from control import charts
from control.charts import COLORS, Point, Series
from control.store import atomic_file
from spheres.errors import ConfigError

__all__ = ["write_report"]

#: phases from the bottom of the stack up; others follow. Colours go with the phase, on every chart of the page.
PHASES = ("compute", "sum", "send_up", "send_down", "wait", "optimizer", "journal")
#: parts of a run that one chart tells apart
BUCKETS = 240
#: what of a step's record is shown; the rest of a long journal would not fit into memory
KEYS = ("step", "loss", "metrics", "learning_rate", "gradient", "batch_samples", "seconds", "phases", "spheres")
ROLES = {"control": "#3d4852", "leaf": "#0072b2", "inner": "#00795a", "relay": "#a8541f"}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from what the run left, also of a run that failed, and return its path.

    Raises ConfigError where the directory holds no run, or cannot be written.
    """
    steps = _steps(run_dir / "journal.jsonl")
    events = list(_records(run_dir / "events.jsonl"))
    summary = next(_records(run_dir / "summary.json", whole=True), {})
    if not steps and not summary:
        raise ConfigError(f"{run_dir} holds no run: there is neither journal.jsonl nor summary.json in it")
    config = next(_records(run_dir / "run.json", whole=True), {}).get("config") or {}
    path = run_dir / "report.html"
    try:
        with atomic_file(path) as file:
            file.write(_page(run_dir.name, steps, events, summary, config).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
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
    latest: dict[int, dict[str, Any]] = {}
    for record in _records(path):
        if record.get("event") == "forget":
            latest = {step: kept for step, kept in latest.items() if step < record["from_step"]}
        elif isinstance(record.get("step"), int):
            latest[record["step"]] = {key: record[key] for key in KEYS if key in record}
    return [latest[step] for step in sorted(latest)]


def _page(
    name: str,
    steps: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
) -> str:
    evaluations = {r["step"]: r for r in events if r.get("event") == "evaluation"}
    ordered = [evaluations[step] for step in sorted(evaluations)]
    drawn = [
        ("Loss", _learning_chart(steps, ordered, "loss")),
        *((_title(metric), _learning_chart(steps, ordered, metric)) for metric in _metric_names(steps, ordered)),
        ("Where the time of a step goes, mean over the spheres", _time_chart(steps)),
        ("Gradient norm", _single_chart(steps, ("gradient", "norm"), "norm of the mean gradient", COLORS[3])),
        ("Throughput", _throughput_chart(steps)),
        ("Learning rate", _single_chart(steps, ("learning_rate",), "learning rate", COLORS[4])),
    ]
    parents = summary.get("tree") or {}
    spheres = _spheres(summary, parents)
    parts = [
        _header(name, summary, config),
        _cards(summary),
        '<div class="charts">',
        *(f"<section><h2>{escape(title)}</h2>{chart}</section>" for title, chart in drawn if chart),
        "</div>",
        _tree(parents, spheres),
        _sphere_table(spheres),
        _event_table(events),
    ]
    return _SHELL.format(
        title=escape(f"Run {summary.get('run_id', name)}"),
        style=charts.STYLE + _STYLE,
        body="\n".join(p for p in parts if p),
    )


# --- charts


def _value(record: Mapping[str, Any], *keys: str) -> float | None:
    found: Any = record
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
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
    return charts.line_chart(
        [
            Series("per step", charts.downsample(train, 700), COLORS[0], faint=True),
            Series("training", _smooth(train), COLORS[0]),
            Series("test", _points(evaluations, *keys), COLORS[1], marks=True),
        ],
        y_label=name,
        y_range=(None, 1.0) if percent else (0.0, None),
        y_text=(lambda y: f"{y * 100:.4g} %") if percent else charts.short,
    )


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Return means over a window around each point, a fiftieth of the run wide and narrower at both ends."""
    half = len(points) // 100
    sums = list(accumulate((y for _, y in points), initial=0.0))
    smooth = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        smooth.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return charts.downsample(smooth)


def _single_chart(steps: Sequence[Mapping[str, Any]], keys: tuple[str, ...], label: str, color: str) -> str:
    points = _points(steps, *keys)
    return charts.line_chart([Series(label, charts.downsample(points), color)], y_label=label, y_range=(0.0, None))


def _throughput_chart(steps: Sequence[Mapping[str, Any]]) -> str:
    pairs = [(r["step"], _value(r, "batch_samples"), _value(r, "seconds", "step")) for r in steps]
    buckets = _buckets([(s, n, t) for s, n, t in pairs if n is not None and t])
    points = [(float(part[-1][0]), sum(n for _, n, _ in part) / sum(t for _, _, t in part)) for part in buckets]
    series = [Series("samples/s", points, COLORS[2])]
    return charts.line_chart(series, y_label="samples per second", y_range=(0.0, None))


def _time_chart(steps: Sequence[Mapping[str, Any]]) -> str:
    """Stack the phases of a step: the mean of its spheres, and what control does after them."""
    rows = [_phase_seconds(record) for record in steps]
    colors = _phase_colors(rows)
    buckets = _buckets(list(zip(steps, rows, strict=True)))
    x = [float(part[-1][0]["step"]) for part in buckets]
    layers = {n: [1000 * sum(row.get(n, 0.0) for _, row in part) / len(part) for part in buckets] for n in colors}
    return charts.stacked_chart(x, layers, colors, y_label="milliseconds")


def _phase_seconds(record: Mapping[str, Any]) -> dict[str, float]:
    count = max(1, record.get("spheres") or 1)
    phases = {name: (_value(phase, "sum") or 0.0) / count for name, phase in record.get("phases", {}).items()}
    own = {name: _value(record, "seconds", name) or 0.0 for name in ("optimizer", "journal")}
    return phases | {name: value for name, value in own.items() if value}


def _phase_colors(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    seen = dict.fromkeys(name for row in rows for name, value in row.items() if value)
    names = [n for n in PHASES if n in seen] + [n for n in seen if n not in PHASES]
    order = [*PHASES, *(name for name in names if name not in PHASES)]
    return {name: COLORS[order.index(name) % len(COLORS)] for name in names}


def _buckets(items: Sequence[Any]) -> list[Sequence[Any]]:
    count = min(BUCKETS, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


# --- the rest of the page


def _header(name: str, summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    state = str(summary.get("state", "unfinished"))
    shown = f'<span class="state {escape(state)}">{escape(state)}</span>'
    named = {key: value.get("name", "") if isinstance(value, Mapping) else value for key, value in config.items()}
    keys = ("task", "optimizer", "learning_rate", "batch_size", "microbatches", "seed")
    texts = [f"{key.replace('_', ' ')} <b>{escape(str(named[key]))}</b>" for key in keys if key in named]
    error, reason = summary.get("error"), summary.get("reason")
    parts = [
        f"<h1>Run {escape(str(summary.get('run_id') or name))} {shown}</h1>",
        f'<p class="config">{" · ".join(texts)}</p>' if texts else "",
        f'<p class="error">{escape(str(error))}</p>' if error else "",
        f'<p class="reason">{escape(str(reason))}</p>' if reason and reason != error else "",
    ]
    return "".join(parts)


def _cards(summary: Mapping[str, Any]) -> str:
    metrics = summary.get("metrics") or {}
    shown = [
        (name, _percent(value) if "accuracy" in name else _brief(value))
        for name, value in metrics.items()
        if name != "loss"
    ]
    labels = {"wall_seconds": "seconds", "samples_per_second": "samples/s"}
    keys = ("loss", "steps", "epochs", "samples", "samples_per_second", "wall_seconds")
    shown += [(labels.get(key, key), _brief(summary.get(key))) for key in keys]
    shown.append(("synchronising", _percent(summary.get("sync_fraction"))))
    cards = "".join(
        f"<div><b>{value}</b><span>{escape(label.replace('_', ' '))}</span></div>" for label, value in shown if value
    )
    digest = summary.get("weights_sha256")
    below = f'<p class="digest">SHA-256 of the weights <code>{escape(str(digest))}</code></p>' if digest else ""
    held_up = str(summary.get("bottleneck") or "")
    below = (f'<p class="reason">Bottleneck: {escape(held_up)}</p>' if held_up else "") + below
    return f'<div class="cards">{cards}</div>{below}' if cards else ""


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _brief(value: object) -> str:
    return charts.short(value) if isinstance(value, int | float) and abs(value) >= 1e6 else _number(value)


def _percent(value: object) -> str:
    return f"{value * 100:.4g} %" if isinstance(value, int | float) else ""


def _spheres(summary: Mapping[str, Any], parents: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Return the spheres with the role that the tree says: their own reports may be missing, or older than it."""
    found = summary.get("spheres")
    inner = set(parents.values())
    return [
        {**s, "role": "relay" if s.get("role") == "relay" else "inner" if s["id"] in inner else "leaf"}
        for s in (found if isinstance(found, list) else [])
    ]


def _tree(parents: Mapping[str, str], spheres: Sequence[Mapping[str, Any]]) -> str:
    if not parents:
        return ""
    roles = {s["id"]: s["role"] for s in spheres}
    colors = {node: ROLES[roles.get(node, "leaf")] for node in parents} | {"control": ROLES["control"]}
    notes = {s["id"]: f"{_number(s.get('samples'))} samples" for s in spheres if s.get("samples") is not None}
    used = {role: color for role, color in ROLES.items() if color in colors.values()}
    drawing = charts.tree_chart(parents, colors=colors, notes=notes)
    return f'<section class="wide"><h2>Tree</h2>{charts.legend(used)}{drawing}</section>'


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
    return (
        f'<section class="wide"><h2>Spheres</h2>{charts.legend(colors)}'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _event_table(events: Sequence[Mapping[str, Any]]) -> str:
    """List what is out of the ordinary: lost spheres, what is not finite, failed checkpoints, errors."""
    odd, over = [], False
    for e in events:
        if e.get("event") == "state":
            over = e.get("state") in ("completed", "stopped", "error")
        elif e.get("event") in ("error", "nonfinite") or e.get("ok") is False:
            odd.append(e)
        elif e.get("event") == "sphere_lost" and not over:
            odd.append(e)  # spheres that leave when all is over do as they were told
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
p.error{background:#fdeceb;border-left:3px solid #c8372d;padding:10px 14px;margin:0 0 18px;overflow-wrap:anywhere}
.config,.reason{margin:-8px 0 18px;color:#616e7c;font-size:13.5px;overflow-wrap:anywhere}
.config b{color:#1f2933;font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(106px,1fr));gap:12px}
.cards div,section{background:#fff;border:1px solid #e4e7eb;border-radius:10px}
.cards div{padding:12px}
.cards b{display:block;white-space:nowrap;font-size:19px;font-weight:650;font-variant-numeric:tabular-nums}
.cards span{font-size:12.5px;color:#616e7c}
.digest{font-size:12.5px;color:#616e7c;margin:10px 2px 20px;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:16px}
section{padding:16px 18px}.wide{margin-top:16px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}th{font-weight:600;text-align:left;color:#616e7c;font-size:12.5px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid #eef0f2;white-space:nowrap}tr:last-child td{border-bottom:0}
td:last-child{padding-right:0;white-space:normal;overflow-wrap:anywhere;min-width:200px}.number{text-align:right;font-variant-numeric:tabular-nums}.bar{width:36%}
.bar div{display:flex;height:12px;border-radius:3px;overflow:hidden;background:#eef0f2}
@media(max-width:660px){main{padding:20px 12px 32px}}
"""


def _title(metric: str) -> str:
    return metric[:1].upper() + metric[1:].replace("_", " ")
