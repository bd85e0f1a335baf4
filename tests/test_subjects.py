"""What the demo draws for each module, how answers are told right from wrong, and boxes on the contact sheet."""

from __future__ import annotations

from typing import Any

import pytest

from cvworker.embedded.exhibits import exhibit, label_rows, tile
from cvworker.embedded.sheet import Summary, Tile, render
from cvworker.embedded.subjects import SUBJECTS

DETECT, SCENE = SUBJECTS["detect"], SUBJECTS["scene"]


def ok(result: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "status": "ok", "result": result}


def found(*objects: tuple[str, list[float]]) -> dict[str, Any]:
    boxes = [{"label": label, "score": 0.9, "box": box} for label, box in objects]
    return ok({"width": 320, "height": 240, "objects": boxes})


def shown_with(count: int) -> Any:
    """An exhibit with so many objects of different kinds."""
    exhibits = (exhibit(0, number, None, DETECT) for number in range(200))
    return next(each for each in exhibits if len(each.objects) == count == len(set(each.labels)))


def test_objects_are_right_where_each_is_found_once_and_where_it_is() -> None:
    shown = shown_with(2)
    first, second = ((item.label, [float(side) for side in item.box]) for item in shown.objects)
    away = (first[0], [side + 1000 for side in first[1]])

    def judged(*objects: tuple[str, list[float]]) -> bool | None:
        return tile(shown, b"", found(*objects), DETECT).right

    assert judged(first, second) is True
    assert judged(second, first) is True
    assert judged(first) is False
    assert judged(away, second) is False
    assert judged(first, first, second) is False
    assert judged() is False


def test_a_picture_without_objects_is_right_where_nothing_is_found() -> None:
    shown = next(each for n in range(200) if not (each := exhibit(0, n, None, DETECT)).objects)
    assert tile(shown, b"", found(), DETECT).right is True
    assert tile(shown, b"", found(("gun", [0, 0, 9, 9])), DETECT).right is False
    rows = {
        row.label: (row.answers, row.right, row.missed) for row in label_rows([shown], {shown.name: found()}, DETECT)
    }
    assert rows["nothing"] == (1, 1, 0)


def test_a_scene_is_right_where_its_likeliest_label_is() -> None:
    shown = exhibit(0, 3, None, SCENE)
    [label] = shown.labels
    other = next(each for each in SCENE.labels if each != label)
    answers = {name: ok({"label": name, "labels": [{"label": name, "score": 0.9}]}) for name in (label, other)}
    assert tile(shown, b"", answers[label], SCENE).right is True
    assert tile(shown, b"", answers[other], SCENE).right is False
    rows = {
        row.label: (row.answers, row.right, row.wrong, row.missed)
        for row in label_rows([shown], {shown.name: answers[other]}, SCENE)
    }
    assert (rows[label], rows[other]) == ((0, 0, 0, 1), (1, 0, 1, 0))
    assert "none" not in rows


def test_nothing_is_right_or_wrong_for_a_module_that_nobody_knows() -> None:
    assert tile(exhibit(0, 1, None), b"", ok({"anything": 1}), None).right is None


def page(result: dict[str, Any]) -> str:
    html = render(Summary("title"), [Tile("p.jpg", b"\xff\xd8", [], ok(result), None)])
    return html[html.index('<div class="tiles">') :]


def test_boxes_are_drawn_in_the_pictures_own_pixels() -> None:
    html = page({"width": 640, "height": 480, "objects": [{"label": "a<b", "score": 0.9, "box": [10, 20.5, 110, 220]}]})
    assert '<svg class=boxes viewBox="0 0 640 480"' in html
    assert '<rect x="10.0" y="20.5" width="100.0" height="199.5"/>' in html
    assert ">a&lt;b</text>" in html


@pytest.mark.parametrize(
    "result",
    [
        {"width": 640, "height": 480, "objects": []},
        {"objects": [{"label": "gun", "box": [1, 2, 3, 4]}]},
        {"width": "640", "height": 480, "objects": [{"label": "gun", "box": [1, 2, 3, 4]}]},
        {"width": 640, "height": 480, "objects": [{"label": "gun", "box": [3, 2, 1, 4]}]},
        {"width": 640, "height": 480, "objects": [{"label": "gun", "box": ["<", 2, 3, 4]}]},
        {"width": 640, "height": 480, "objects": [{"label": "gun", "box": [1, 2, 3]}]},
        {"width": -1, "height": 480, "objects": [{"label": "gun", "box": [1, 2, 3, 4]}]},
    ],
)
def test_what_is_no_box_in_a_picture_of_known_size_is_not_drawn(result: dict[str, Any]) -> None:
    assert "class=boxes" not in page(result)


def test_the_likeliest_label_stands_on_the_picture() -> None:
    html = page({"label": "beach", "labels": [{"label": "beach", "score": 0.9}, {"label": "sea", "score": 0.1}]})
    assert '<b class="badge beach">beach</b>' in html
    assert "<span>sea</span>" in html
