"""The contact sheet: one page that stands alone, whatever the answers hold."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cvworker.embedded.sheet import Summary, Tally, Tile, render, thumbnail, write_sheet

TIMES = {"queue": 100.0, "download": 20.0, "preprocess": 5.0, "process": 15.0, "total": 150.0}
EVIL = '<script>alert(\'1\')</script>"&<img src=x onerror="alert(2)">'


def ok(*labels, times=TIMES, **result):
    found = [{"label": label, "score": 0.9} for label in labels]
    verdict = "threat" if labels else "safe"
    scores = {"gun": 0.1, "knife": 0.2, **dict.fromkeys(labels, 0.9)}
    result = result or {"verdict": verdict, "labels": found, "scores": scores}
    return {"id": "x", "status": "ok", "result": result, "timings_ms": dict(times)}


def failed(code, message="because"):
    error = {"code": code, "message": message, "retryable": False}
    return {"id": "x", "status": "error", "error": error, "timings_ms": {"queue": 100.0, "total": 110.0}}


def tile(answer, right=True, name="p.jpg", expected=(), picture=b"\xff\xd8"):
    return Tile(name, picture, expected, answer, right)


class Page(HTMLParser):
    """What a browser makes of the page: its elements, and the text inside them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.within = [], {}, []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.within.append(tag)

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if self.within:
            self.text[self.within[-1]] = self.text.get(self.within[-1], "") + data

    def every(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


MIXED = [
    tile(ok("gun"), expected=["gun"]),
    tile(ok("gun", "knife"), right=False, expected=["gun"]),
    tile(ok()),
    tile(failed("image_not_found"), right=None),
    tile(None, right=None),
]


def test_the_tally_counts_answers_labels_errors_and_times():
    tally = Tally.of(MIXED)
    assert (tally.images, tally.right, tally.wrong, tally.unanswered) == (5, 2, 1, 1)
    assert tally.verdicts == {"threat": 2, "safe": 1}
    assert tally.labels == {"gun": 2, "knife": 1}
    assert tally.errors == {"image_not_found": 1}
    assert tally.totals == [110.0, 150.0, 150.0, 150.0]
    assert tally.steps == {"download": 60.0, "preprocess": 15.0, "process": 45.0, "waiting": 40.0}


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 50.0), (95, 95.0), (99.5, 100.0), (100, 100.0)])
def test_percentiles_are_times_that_were_measured(percent, expected):
    tiles = [tile(ok(times={"total": float(n)})) for n in range(100, 0, -1)]
    assert Tally.of(tiles).percentile(percent) == expected
    assert Tally.of([]).percentile(percent) is None


def test_the_page_states_what_was_counted():
    html = render(Summary("Threat", "on the CPU", seconds=2.0, figures=[("batch", "6.5")], notes=["Look."]), MIXED)
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert figures == {
        "pictures": "5",
        "right": "2 of 3",
        "safe": "1",
        "threat": "2",
        "errors": "1",
        "without an answer": "1",
        "images/s": "2.5",
        "p50 sent to answered": "150 ms",
        "p95 sent to answered": "150 ms",
        "batch": "6.5",
    }
    assert "<h1>Threat</h1><p>on the CPU</p><p>Look.</p>" in html


def test_each_button_names_as_many_pictures_as_it_shows():
    html = render(Summary("Threat"), MIXED)
    buttons = re.findall(r'data-filter="(\d+)"[^>]*>([^<]*?) <span>(\d+)</span>', html)
    tags = [article["data-tags"].split() for article in Page(html).every("article")]
    shown = {name: sum(number in tile for tile in tags) for number, name, _ in buttons}
    assert shown == {name: int(count) for _, name, count in buttons}
    assert shown == {"all": 5, "wrong": 1, "errors": 1, "no answer": 1, "safe": 1, "threat": 2, "gun": 2, "knife": 1}


def test_the_policy_lets_only_the_pages_own_style_and_script_run():
    page = Page(render(Summary(EVIL), [tile(ok("gun"), name=EVIL)]))
    [policy] = [meta["content"] for meta in page.every("meta") if "content-security-policy" in str(meta).lower()]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.text[element].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
        assert len(page.every(element)) == 1
    assert "unsafe" not in policy


def test_the_page_refers_to_nothing_outside_and_needs_no_inline_styles_or_handlers():
    page = Page(render(Summary("Threat"), MIXED))
    attributes = [(name, value) for _, element in page.elements for name, value in element.items()]
    assert [value for name, value in attributes if name in {"src", "href", "srcset"} and value[:5] != "data:"] == []
    assert [name for name, _ in attributes if name == "style" or name.startswith("on")] == []
    assert "url(" not in page.text["style"]


def test_nothing_from_pictures_or_answers_becomes_markup():
    plain = Page(render(Summary("Threat"), [tile(ok("gun")), tile(failed("x"))]))
    answer = {**ok(EVIL), "id": EVIL}
    answer["result"]["verdict"] = EVIL
    evil = Page(
        render(
            Summary(EVIL, EVIL, figures=[(EVIL, EVIL)], notes=[EVIL]),
            [tile(answer, name=EVIL, expected=[EVIL]), tile(failed(EVIL, EVIL), name=EVIL)],
        )
    )
    for element in ("script", "img"):
        assert len(evil.every(element)) == len(plain.every(element))
    assert EVIL in evil.text["h1"]
    assert EVIL in evil.text["title"]
    assert evil.every("img")[0]["alt"] == EVIL
    assert not [name for _, element in evil.elements for name in element if name.startswith("on")]


def test_a_result_the_page_knows_nothing_of_is_shown_as_it_is():
    page = Page(render(Summary("Scene"), [tile(ok(scene="beach", how=[1, 2]), right=None)]))
    assert '"scene": "beach"' in page.text["pre"]
    assert "open" in page.every("details")[0]


def test_objects_with_labels_are_found_under_any_name_and_shown_with_their_best_score():
    objects = [{"label": "person", "score": 0.5, "box": [1, 2, 3, 4]}, {"label": "person", "score": 0.75}]
    html = render(Summary("Detect"), [tile(ok(other=[], objects=objects), right=None)])
    assert "0.75" in html
    assert Tally.of([tile(ok(other=[], objects=objects))]).labels == {"person": 1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    ["status", "error", "result", "timings_ms", "code", "labels", "label", "score", "scores", "total"]
)
answers = st.recursive(
    json_values, lambda inner: st.dictionaries(names, inner, max_size=4) | st.lists(inner, max_size=3), max_leaves=12
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, answers, max_size=4))
def test_any_answer_at_all_can_be_shown(answer):
    page = Page(render(Summary("Any"), [tile(answer, right=None)]))
    assert len(page.every("article")) == 1
    assert len(page.every("script")) == 1


def test_text_that_is_not_unicode_and_numbers_beyond_bounds_can_be_shown(tmp_path):
    answer = {**ok("gun", times={"total": 10**400}), "id": "\ud800"}
    assert write_sheet(tmp_path / "sheet.html", Summary("Odd"), [tile(answer)]).stat().st_size


def test_no_pictures_at_all_make_a_page_too(tmp_path):
    path = write_sheet(tmp_path / "new" / "sheet.html", Summary("Nothing"), [])
    assert path == tmp_path / "new" / "sheet.html"
    assert "Nothing" in path.read_text(encoding="utf-8")


def test_a_thumbnail_is_a_small_upright_jpeg():
    large, rotated = io.BytesIO(), Image.Exif()
    rotated[0x0112] = 6  # to be turned by a quarter
    Image.new("CMYK", (1600, 800)).save(large, "JPEG", exif=rotated)
    with Image.open(io.BytesIO(thumbnail(large.getvalue()))) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (160, 320))


@pytest.mark.parametrize("damage", [lambda jpeg: jpeg[:300], lambda jpeg: b"", lambda jpeg: b"GIF89a" + jpeg])
def test_bytes_that_are_no_picture_have_no_thumbnail(damage):
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    assert thumbnail(damage(jpeg.getvalue())) is None
    assert "no picture" in render(Summary("Damaged"), [tile(None, right=None, picture=None)])
