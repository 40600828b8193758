"""What a page is made of: markup, a chart, a style. Knows no trial and no budget.

A page holds no script and nothing from elsewhere.

Only `tag` makes markup, and it escapes whatever it did not make itself.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_LABELLED = 40  # points that get their trial's number; more of them would hide each other


@dataclass(frozen=True)
class Point:
    """One trial in the chart: its cost, that as a share of the budget, its figure and the error of it.

    `most` is the largest figure that there can be: 1 for an accuracy.
    """

    number: int
    cost: int
    share: float
    value: float
    error: float
    best: bool
    most: float = 1.0

    @property
    def ends(self) -> tuple[float, float]:
        """Where its error bar ends; no figure lies beyond 0 and `most`, so no bar does."""
        low, high = max(0.0, self.value - self.error), min(self.most, self.value + self.error)
        return min(low, self.value), max(high, self.value)


def chart(points: Sequence[Point], across: str, up: str) -> Markup:
    """Points with error bars over labelled axes; of an end that was cut at 0 or 1 no cap is drawn."""
    left, right, top, bottom = 76, 612, 26, 296
    low, high = min(point.ends[0] for point in points), max(point.ends[1] for point in points)
    if high - low < 0.02:
        middle = min(max((low + high) / 2, 0.01), points[0].most - 0.01)
        low, high = min(low, middle - 0.01), max(high, middle + 0.01)
    xs, ys = _ticks(0.0, 1.12 * max(point.share for point in points) or 0.01), _ticks(low, high)

    def x_at(share: float) -> float:
        return left + (right - left) * share / xs[-1]

    def y_at(value: float) -> float:
        return bottom - (bottom - top) * (value - ys[0]) / (ys[-1] - ys[0])

    drawn = []
    for tick in xs:
        label = tag("text", f"{tick:.{_digits(100 * xs[1])}%}", x=_px(x_at(tick)), y=bottom + 20, text_anchor="middle")
        drawn.append(tag("g", _line("grid", x_at(tick), bottom, x_at(tick), top), label, class_="x"))
    for tick in ys:
        text = f"{tick:.{_digits(ys[1] - ys[0])}f}"
        label = tag("text", text, x=left - 8, y=_px(y_at(tick)), dy="0.35em", text_anchor="end")
        drawn.append(tag("g", _line("grid", left, y_at(tick), right, y_at(tick)), label, class_="y"))
    drawn += [_line("axis", left, bottom, right, bottom), _line("axis", left, bottom, left, top)]
    drawn.append(tag("text", across, x=(left + right) // 2, y=bottom + 46, text_anchor="middle"))
    drawn.append(tag("text", up, transform=f"translate(18 {(top + bottom) // 2}) rotate(-90)", text_anchor="middle"))

    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(point.cost, []).append(point)
    places = sorted(x_at(column[0].share) for column in columns.values())
    gap = min((b - a for a, b in zip(places, places[1:], strict=False)), default=0.6 * (right - left))
    for column in columns.values():
        step = min(14.0, 0.8 * gap / len(column))
        for i, point in enumerate(column):
            x = x_at(point.share) + step * (i - (len(column) - 1) / 2)
            drawn.append(_mark(point, x, y_at, up, labelled=point.best or len(points) <= _LABELLED))
    return tag("svg", *drawn, class_="chart", viewBox="0 0 640 350", role="img", aria_label=f"{up}, against {across}")


def _mark(point: Point, x: float, y_at: Callable[[float], float], figure: str, labelled: bool) -> Markup:
    ends = [y_at(end) for end in point.ends]
    whole = (point.value - point.error, point.value + point.error)
    caps = [
        _line("cap", x - 4, y, x + 4, y) for y, end, all_ in zip(ends, point.ends, whole, strict=True) if end == all_
    ]
    name = f"{point.number} ★" if point.best else point.number
    return tag(
        "g",
        tag("title", f"trial {point.number}: {figure} {point.value:.3f} ± {point.error:.3f}, cost {point.share:.1%}"),
        _line("error", x, ends[0], x, ends[1]),
        *caps,
        tag("circle", cx=_px(x), cy=_px(y_at(point.value)), r=6 if point.best else 4.5),
        *([tag("text", name, x=_px(x), y=_px(ends[1] - 7), text_anchor="middle")] if labelled else []),
        class_="point best" if point.best else "point",
        data_trial=point.number,
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("line", class_=kind, x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2))


def _px(place: float) -> str:
    return f"{place:.2f}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers that enclose `low` to `high`."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough * (1 - 1e-9))
    return [step * n for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _digits(step: float) -> int:
    """Decimals that tell two ticks apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


class Markup(str):
    """Text that is markup already. Joining or formatting it gives a plain `str`, which is escaped again."""


def tag(element: str, /, *inside: object, **attributes: object) -> Markup:
    """One element; `class_` means class, `data_label` data-label. Escapes everything but `Markup`."""
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    if element == "meta":
        return Markup(f"<meta{said}>\n")
    content = "".join(part if isinstance(part, Markup) else _escaped(part) for part in inside)
    end = "\n" if element in ("p", "h1", "h2", "h3", "tr", "li", "dd", "g", "svg", "section", "head", "table") else ""
    return Markup(f"<{element}{said}>{content}</{element}>{end}")


def _escaped(value: object) -> str:
    """`value` as text in which nothing is markup; see `plain`."""
    return html.escape(plain(value))


def whole(title: str, *inside: object) -> str:
    """A whole page under its `title`, which a browser shows without network and a printer prints."""
    # Even if something did slip through unescaped, a browser would neither run nor fetch it.
    policy = tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        policy,
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", tag("h1", title), *inside))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def plain(value: object) -> str:
    """`value` as text in which nothing invisible turns or hides what stands around it."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value))


def headed(title: str, *inside: object) -> Markup:
    """A section under its heading."""
    return tag("section", tag("h2", title), *inside)


def items(lines: Iterable[object], **attributes: object) -> Markup:
    """An unordered list."""
    return tag("ul", *(tag("li", line) for line in lines), **attributes)


def definitions(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Names and what they stand for."""
    return tag("dl", *(part for name, value in pairs for part in (tag("dt", name), tag("dd", value))))


def table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], best: int | None = None, kind: str = "cards"
) -> Markup:
    """Rows of cells; on a narrow screen each of `cards` becomes one. `best` is the number of the row that is marked."""
    lines = []
    for number, cells in enumerate(rows):
        filled = (tag("td", cell, data_label=head) for head, cell in zip(heads, cells, strict=True))
        lines.append(tag("tr", *filled, **({"class_": "best"} if number == best else {})))
    head = tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads)))
    return tag("div", tag("table", head, tag("tbody", *lines), class_=kind), class_="wide")


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c232c;--soft:#566270;--line:#d8dee5;--card:#f6f8fa;--mine:#1f5fbf;
--before:#8b97a4;--others:#8a5fb0;--held:#d19a2a;--left:#e3e8ed;--good:#1a7f37;--warn:#8a5a00;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e4e8ed;--soft:#9aa6b3;--line:#343c46;
--card:#1c2229;--mine:#6ea8fe;--before:#7a8794;--others:#b794d6;--held:#e0b04a;--left:#2b323a;--good:#57c878;
--warn:#e0b04a;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1.5rem 1rem 3rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .5rem} h3{font-size:1rem;margin:0} p,ul{margin:.4rem 0}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
.soft,small,figcaption,dt{color:var(--soft)} figure,dd{margin:0} figcaption{font-size:.9rem} ul{padding-left:1.2rem}
small{display:block;font-size:.85rem;line-height:1.35} small,code,dd{overflow-wrap:anywhere}
.account small{margin-top:.6rem} .wide{overflow-x:auto} .whole{white-space:nowrap}
code{font:.85em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.promise{margin:1rem 0;padding:.8rem 1rem;background:var(--card);border-left:4px solid var(--mine);border-radius:4px}
.account{margin:1rem 0;padding:.9rem 1rem;border:1px solid var(--line);border-radius:8px}
table{width:100%;border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);vertical-align:bottom} tr:last-child td{border-bottom:0}
tr.best td{background:var(--card);font-weight:600} tr.best small{font-weight:400}
dl{display:grid;grid-template-columns:minmax(9rem,max-content) 1fr;gap:.3rem 1rem;margin:.8rem 0;font-size:.92rem}
ul.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;font-size:.9rem}
.legend svg{width:.8rem;height:.8rem;margin-right:.4rem}
.bar{display:block;width:100%;height:1.1rem;margin:.6rem 0;border-radius:4px} .left{fill:var(--left)}
.before{fill:var(--before)} .mine{fill:var(--mine)} .others{fill:var(--others)} .held{fill:var(--held)}
.completed{color:var(--good)} .stopped,.refused{color:var(--warn)} .failed{color:var(--bad)}
.chart{display:block;width:100%;max-width:44rem;height:auto;margin:0 auto;font-size:13px} .chart text{fill:var(--soft)}
.chart .axis{stroke:var(--soft)} .chart .grid{stroke:var(--line)} .point line{stroke:var(--before);stroke-width:1.5}
.point circle{fill:var(--before);stroke:var(--bg)} .point.best line{stroke:var(--mine);stroke-width:2.5}
.point.best circle{fill:var(--mine)} .chart .best text{fill:var(--mine);font-weight:700}
@media (max-width:40rem){body{padding:1rem .8rem 2rem} .chart{font-size:18px}
dl{grid-template-columns:1fr;gap:0} dd{margin-bottom:.5rem}
.cards,.cards tbody,.cards tr,.cards td{display:block} .cards thead{display:none}
.cards tr{margin:.6rem 0;padding:.3rem .7rem;border:1px solid var(--line);border-radius:8px}
.cards tr.best{border-color:var(--mine)} .cards td,.cards tr.best td{padding:.15rem 0;border:0;background:none}
.cards td::before{content:attr(data-label);display:inline-block;min-width:8.5rem;padding-right:.6rem;
color:var(--soft);font-weight:400}}
td small{min-width:9rem;font-size:.92em}
@media print{@page{margin:1.5cm} body{max-width:none;padding:0;font-size:10pt} h2,h3{break-after:avoid}
table{font-size:8pt} th,td{padding:.25rem .35rem} .wide{overflow:visible}
.account,.promise,figure,tr,li{break-inside:avoid} *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
