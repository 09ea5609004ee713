"""The page that `check` writes: one file, without scripts and without the network, for any browser.

File names, class names and whatever else comes from data is text: `tag` escapes all text that is
put into it, and the page's policy forbids scripts and foreign addresses besides.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from samtune.check_sheet import Tile
from samtune.data.findings import ERROR, FACT, WARNING, Finding, Split, covers, printable
from samtune.pictures import jpeg

_LISTED = 100  # examples of a finding; check.json has more
_BINS = 24
_MOST_CLASSES = 60
_BAR = "#1f6feb"
_VOID = {"meta", "img"}
_HEADINGS = {ERROR: "Errors", WARNING: "Warnings", FACT: "Facts"}
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.verdict { padding: .6rem .9rem; border-left: .4rem solid #2da44e; background: var(--soft); }
.finding { border-left: .3rem solid; padding: .1rem .8rem; margin: .6rem 0; overflow-wrap: anywhere; }
.error { border-color: #d1242f; } .warning { border-color: #bf8700; } .fact { border-color: #8886; }
.finding p { margin: .2rem 0; } ul { margin: .2rem 0; padding-left: 1.2rem; }
li, figcaption, td, th { font-size: .85em; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { padding: .15rem .7rem .15rem 0; text-align: left; }
td { font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.sheet { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
figure { margin: 0; break-inside: avoid; } figure img { width: 100%; height: auto; }
svg { width: 100%; max-width: 26rem; height: auto; }
@media print { body { max-width: none; font-size: 11px; } .sheet { grid-template-columns: repeat(5, 1fr); } }
"""  # noqa: E501
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already. Any other text is escaped where it is put in."""


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """An element. `class_` and the like stand for names that Python keeps; `_` within is `-`."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(str(value))}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{said}>")
    inside = "".join(child if isinstance(child, Html) else _text(child) for child in children)
    return Html(f"<{name}{said}>{inside}</{name}>")


def _text(text: str) -> str:
    return escape(printable(text))


def page(
    verdict: str,
    splits: Sequence[Split],
    findings: Sequence[Finding],
    about: Sequence[tuple[str, str]],
    tiles: Sequence[Tile],
) -> str:
    """The whole page. verdict: a sentence; about: what was looked at, name and value."""
    levels = [finding.level for finding in findings]
    worst = next((level for level in (ERROR, WARNING) if level in levels), "fine")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"samtune check: {verdict}"),
        tag("style", Html(_STYLE)),
    )
    body = tag(
        "body",
        tag("h1", "samtune check"),
        tag("p", verdict, class_=f"verdict {worst}"),
        tag("table", *(tag("tr", tag("th", name), tag("td", value)) for name, value in about)),
        *(_findings(level, findings) for level in _HEADINGS if level in levels),
        *(_charts(split) for split in splits if split.usable),
        _sheet(tiles),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _findings(level: str, findings: Sequence[Finding]) -> Html:
    told = [_finding(finding) for finding in findings if finding.level == level]
    return tag("section", tag("h2", f"{_HEADINGS[level]} ({len(told)})"), *told)


def _finding(finding: Finding) -> Html:
    split = tag("strong", f"{finding.split}: ") if finding.split else Html("")
    parts = [tag("p", split, finding.text)]
    if finding.examples:
        listed = finding.examples[:_LISTED]
        lines = [tag("li", example) for example in listed]
        if more := finding.count - len(listed):
            lines.append(tag("li", f"and {more} more; check.json lists them"))
        open_ = {"open": ""} if finding.level == ERROR else {}
        summary = tag("summary", f"{finding.count} in detail")
        parts.append(tag("details", summary, tag("ul", *lines), **open_))
    return tag("div", *parts, class_=f"finding {finding.level}")


def _charts(split: Split) -> Html:
    """What numbers look like: shares, sides of boxes, classes."""
    shares = np.concatenate([covers(one) for one in split.usable])
    boxes = np.concatenate([one.boxes for one in split.usable])
    sides = np.maximum(boxes[:, 2:4] - boxes[:, :2], 1).max(axis=1)
    charts = [
        histogram("share of the picture that an object covers, %", 100 * shares),
        histogram("longer side of an object's box, pixels", sides),
        histogram(
            "objects per picture that shows any",
            np.array([one.things for one in split.usable if one.things]),
        ),
    ]
    if split.classes.number:
        charts.append(_class_bars(split))
    title = f"{split.name}: {len(split.usable)} pictures"
    return tag("section", tag("h2", title), tag("div", *charts, class_="charts"))


def _class_bars(split: Split) -> Html:
    shares, names = split.classes, split.classes.names
    labelled = sum(shares.pixels[i] for i in range(len(names)))
    rows = [
        (f"{i} {name}" if name != str(i) else name, shares.pixels[i] / max(1, labelled),
         f"{shares.pixels[i] / max(1, labelled):.2%} in {shares.images[i]} pictures")
        for i, name in enumerate(names[:_MOST_CLASSES])
    ]  # fmt: skip
    return bars("share of the labelled pixels per class", rows)


def histogram(title: str, numbers: np.ndarray) -> Html:
    """How often numbers, all above 0, are how large: a chart with a logarithmic axis."""
    numbers = np.asarray(numbers, np.float64)
    if not len(numbers):
        return Html("")
    low, high = numbers.min(), numbers.max()
    if low == high:
        return tag("figure", tag("figcaption", f"{title}: {low:.3g} in all of {len(numbers)}"))
    edges = np.geomspace(low, high * 1.0001, _BINS + 1)
    counts, _ = np.histogram(numbers, edges)
    wide, tall = 320 / _BINS, 90 / max(1, counts.max())
    shapes = [
        tag("rect", fill=_BAR, x=f"{i * wide:.1f}", y=f"{100 - count * tall:.1f}",
            width=f"{wide - 1:.1f}", height=f"{count * tall:.1f}")
        for i, count in enumerate(counts.tolist()) if count
    ]  # fmt: skip
    shapes.append(tag("line", stroke="currentColor", x1=0, x2=320, y1=100, y2=100))
    for x, anchor, value in ((0, "start", low), (160, "middle", edges[_BINS // 2]),
                             (320, "end", high)):  # fmt: skip
        shapes.append(_words(f"{value:.3g}", x=x, y=113, text_anchor=anchor))
    shapes.append(_words(f"most: {counts.max()}", x=320, y=8, text_anchor="end"))
    return _figure(title, 116, shapes)


def bars(title: str, rows: Iterable[tuple[str, float, str]]) -> Html:
    """A bar for each row: label, length from 0 to 1, and what it says."""
    shapes, y = [], 0
    for label, length, said in rows:
        shapes.append(_words(label, x=0, y=y + 10))
        shapes.append(_words(said, x=320, y=y + 10, text_anchor="end"))
        width = f"{320 * length:.1f}"
        shapes.append(tag("rect", fill=_BAR, x=0, y=y + 13, width=width, height=5))
        y += 24
    return _figure(title, y, shapes)


def _words(text: str, **place: object) -> Html:
    return tag("text", text, font_size=10, fill="currentColor", **place)


def _figure(title: str, height: int, shapes: Sequence[Html]) -> Html:
    drawing = tag("svg", *shapes, viewBox=f"0 0 320 {height}", role="img", aria_label=title)
    return tag("figure", drawing, tag("figcaption", title))


def _sheet(tiles: Sequence[Tile]) -> Html:
    if not tiles:
        return Html("")
    return tag(
        "section",
        tag("h2", f"Pictures ({len(tiles)}): the strangest first, then a sample"),
        tag("div", *map(_tile, tiles), class_="sheet"),
    )


def _tile(tile: Tile) -> Html:
    source = "data:image/jpeg;base64," + base64.b64encode(jpeg(tile.image)).decode()
    (height, width), name = tile.image.shape[:2], f"{tile.split} {tile.id}"
    image = tag("img", src=source, alt=f"{name}: {tile.why}", width=width, height=height)
    return tag("figure", image, tag("figcaption", tag("strong", tile.why), f" {name}"))
