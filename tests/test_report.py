"""Reports: one page that needs nothing beside it, and pictures that are the same for the same numbers."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from cvworker.report import Bar, Line, Page, bar_chart, line_chart

SERIES = [Line("fp32", [1, 2, 4], [10, 18, None]), Line("bf16 & co", [1, 2, 4], [20, 30, 44], dashed=True)]


def picture() -> str:
    return line_chart("Pace <now>", SERIES, x_label="batch", y_label="images/s", x_scale="log2", limit=("decode", 40))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]


def tags_of(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


def test_the_same_numbers_give_the_same_picture_byte_for_byte() -> None:
    assert picture() == picture()
    assert bar_chart("Rungs", [Bar("one", 3)], x_label="images/s") == bar_chart(
        "Rungs", [Bar("one", 3)], x_label="images/s"
    )


def test_a_picture_says_what_it_shows_and_takes_the_colour_of_the_text_around_it() -> None:
    svg = picture()
    assert 'aria-label="Pace &lt;now&gt;"' in svg
    assert "currentColor" in svg
    for text in ("fp32", "bf16 &amp; co", "decode", "images/s"):
        assert text in svg


def test_a_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = Page("A report", "two cores")
    page.picture(picture(), "how it was measured")
    page.write(tmp_path / "report.html")
    tags = tags_of((tmp_path / "report.html").read_text())
    assert "script" not in tags.seen
    assert all(link.startswith("#") for link in tags.links)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_text_is_escaped() -> None:
    page = Page("<script>1</script>", "<script>2</script>")
    page.heading("<script>3</script>")
    page.text("<script>4</script>")
    page.code("<script>5</script>")
    page.table(["<script>6</script>"], [["<script>7</script>"]], caption="<script>8</script>")
    page.picture(picture(), "<script>9</script>")
    assert "script" not in tags_of(page.html()).seen


def test_a_table_shows_a_dash_where_there_is_no_number() -> None:
    page = Page("A report")
    page.table(["batch", "images/s"], [[1, 12.5], [2, None]], marked=[1])
    assert '<tr><td>1</td><td>12.5</td></tr><tr class="marked"><td>2</td><td>–</td></tr>' in page.html()
