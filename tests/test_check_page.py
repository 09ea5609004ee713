"""The page of `check`: whatever stands in names is text there, and nothing comes from elsewhere."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from samtune.check_page import Html, bars, histogram, page, tag
from samtune.check_sheet import COLUMNS, Tile, choose, sheet_of
from samtune.config import ReadOptions, Size
from samtune.data.findings import ERROR, FACT, WARNING, Finding, Split
from samtune.data.inspection import Facts, Values

EVIL = "\"><script>alert('x')</script><img src=x onerror=y>&amp;"
BINARY = Values("grey", {0: 9, 255: 1}, 2, 0, 255, 1.0)
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Elements and text of a page; fails where elements are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def facts(id, things=1, **more) -> Facts:
    boxes = np.array([(1, 1, 5, 6, 12)] * things, np.int32).reshape(-1, 5)
    known = {"size": (16, 16), "pixels": {0: 244, 1: 12}, "values": BINARY}
    return Facts(id, **(known | {"things": things, "boxes": boxes, "picture": id.encode()} | more))


def split(*of_files, name="training", read=None) -> Split:
    return Split(name, [], of_files, read or ReadOptions(objects="mask"), Size(32, 32))


@pytest.fixture
def evil_page() -> str:
    read = ReadOptions(
        num_classes=2, class_names=f"sky,{EVIL}".replace(",a", ";a"), objects="class"
    )
    tile = Tile("test", EVIL, EVIL, np.full((40, 60, 3), 200, np.uint8))
    findings = [
        Finding(ERROR, "unusable", EVIL, EVIL, tuple(f"{i} {EVIL}" for i in range(150)), 400),
        Finding(WARNING, "coding", "test", EVIL),
        Finding(FACT, "sizes", "test", "plain"),
    ]
    return page(EVIL, [split(facts(EVIL), name=EVIL, read=read)], findings, [(EVIL, EVIL)], [tile])


def test_names_are_text_wherever_they_stand(evil_page):
    reader = Reader(evil_page)
    kinds = {name for name, _ in reader.elements}
    assert "script" not in kinds and "alert('x')" in reader.text
    assert not any(key.startswith("on") for _, given in reader.elements for key in given)
    (image,) = [given for name, given in reader.elements if name == "img"]
    assert image["alt"].endswith(EVIL)
    assert reader.text.count(EVIL) > 100


def test_nothing_is_fetched_and_nothing_runs(evil_page):
    reader = Reader(evil_page)
    sources = [v for _, given in reader.elements for k, v in given.items() if k in ("src", "href")]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    policies = [g["content"] for _, g in reader.elements if g.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "@import" not in evil_page and "url(" not in evil_page
    image = Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert image.format == "JPEG" and image.size == (60, 40)


def test_a_long_finding_is_cut_and_says_so(evil_page):
    text = Reader(evil_page).text
    assert f"99 {EVIL}" in text and f"100 {EVIL}" not in text
    assert "and 300 more; check.json lists them" in text


def test_the_page_stands_on_phones_and_paper(evil_page):
    assert 'name="viewport"' in evil_page and "@media print" in evil_page
    assert re.search(r"<h2>Errors \(1\)</h2>", evil_page)
    assert evil_page.index("Errors (1)") < evil_page.index("Warnings (1)")


def test_tags_escape_all_but_what_they_made():
    inner = tag("b", "<i>", title='"')
    assert inner == '<b title="&quot;">&lt;i&gt;</b>'
    assert (
        tag("p", inner, "&", class_="x y", data_a=1)
        == f'<p class="x y" data-a="1">{inner}&amp;</p>'
    )
    assert isinstance(inner, Html) and tag("img", src="a<") == '<img src="a&lt;">'


def test_a_histogram_counts_every_number():
    chart = histogram("title <", np.array([1, 1, 1, 10, 1000.0]))
    heights = [float(h) for h in re.findall(r'<rect [^>]* height="([\d.]+)"', chart)]
    assert sorted(heights) == [30, 30, 90] and "title &lt;" in chart
    assert "most: 3" in chart and ">1e+03<" in chart
    assert "one value: 3 in all of 7" in histogram("one value", np.full(7, 3.0))
    assert histogram("none", np.array([])) == ""


def test_bars_have_the_length_of_their_share():
    chart = bars("classes", [("a<b", 1.0, "100 %"), ("c", 0.25, "25 %")])
    assert re.findall(r'<rect [^>]*width="([\d.]+)"', chart) == ["320.0", "80.0"]
    assert "a&lt;b" in chart


def test_the_strangest_are_shown_first_and_each_once():
    normal = [facts(f"n{i}") for i in range(50)]
    empty, tiny = facts("empty", 0), facts("tiny")
    tiny.boxes[0, 4] = 1
    twice = [facts("p", picture=b"same", truth=b"1"), facts("q", picture=b"same", truth=b"2")]
    odd = facts("odd", values=BINARY._replace(high=1, counts={0: 9, 1: 1}), border=0.5)
    train = split(*normal, empty, tiny, odd, facts("bad", 0, problems=("x",)))
    chosen = choose([train, split(*twice, name="test")], 20, seed=0)
    assert len(chosen) == 20 == len({(c.split.name, c.facts.id) for c in chosen})
    told = {c.facts.id: c.why for c in chosen[:7]}
    assert told == {
        "p": "same picture, other mask", "q": "same picture, other mask", "bad": "cannot be used",
        "empty": "empty", "tiny": "tiny", "odd": "unusual values, at the border",
    } | {chosen[6].facts.id: "sample"}  # fmt: skip
    again = choose([train, split(*twice, name="test")], 20, seed=0)
    assert [c.facts.id for c in again] == [c.facts.id for c in chosen]
    other = choose([train, split(*twice, name="test")], 20, seed=1)
    assert {c.facts.id for c in other} != {c.facts.id for c in chosen}


def test_one_kind_of_strangeness_leaves_room_for_others():
    many = split(*(facts(f"e{i}", 0) for i in range(99)), facts("n"))
    chosen = choose([many], 16, seed=0)
    assert [c.why for c in chosen].count("empty") == 2 and len(chosen) == 16
    assert choose([many], 0, seed=0) == []
    assert len(choose([split(facts("a"))], 16, seed=0)) == 1


def test_the_sheet_has_a_place_for_each_picture():
    tiles = [Tile("t", f"Zoë{i}", "why", np.zeros((30, 300, 3), np.uint8)) for i in range(8)]
    sheet = sheet_of(tiles)
    side, label = 220, 22
    assert sheet.shape == (2 * (side + 2 * label), COLUMNS * side, 3)
