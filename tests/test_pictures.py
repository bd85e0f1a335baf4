from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cvworker.embedded import pictures

SMALL = (240, 180)
SEEDS = range(200)


@pytest.fixture(scope="module")
def drawn() -> list[pictures.Picture]:
    return [pictures.draw(seed, SMALL) for seed in SEEDS]


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = pictures.draw(7), pictures.draw(7)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.labels, first.objects) == (second.labels, second.objects)


def test_another_seed_draws_another_picture() -> None:
    assert pictures.draw(7, SMALL).image.tobytes() != pictures.draw(8, SMALL).image.tobytes()


def test_a_picture_is_as_large_as_asked_for() -> None:
    picture = pictures.draw(3, (301, 203))
    assert picture.image.size == (301, 203)
    assert picture.image.mode == "RGB"


def test_without_a_size_the_seed_chooses_one_and_they_vary() -> None:
    sizes = {pictures.draw(seed).image.size for seed in range(12)}
    assert sizes <= set(pictures.SIZES)
    assert len(sizes) > 3


def test_every_box_lies_inside_its_picture_and_beside_the_others(drawn: list[pictures.Picture]) -> None:
    for picture in drawn:
        taken = np.zeros((picture.image.height, picture.image.width), dtype=int)
        for item in picture.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= picture.image.width
            assert 0 <= top < bottom <= picture.image.height
            taken[top:bottom, left:right] += 1
        assert taken.max() <= 1


def test_labels_are_the_threats_among_the_objects(drawn: list[pictures.Picture]) -> None:
    for picture in drawn:
        names = {item.label for item in picture.objects}
        assert names <= {*pictures.THREATS, *pictures.HARMLESS}
        assert picture.labels == names & set(pictures.THREATS)


def test_pictures_hold_none_to_three_objects_of_every_kind_and_about_half_are_safe(
    drawn: list[pictures.Picture],
) -> None:
    assert {len(picture.objects) for picture in drawn} == {0, 1, 2, 3}
    seen = {item.label for picture in drawn for item in picture.objects}
    assert seen == {*pictures.THREATS, *pictures.HARMLESS}
    assert 0.35 < sum(not picture.labels for picture in drawn) / len(drawn) < 0.65


def test_an_object_reaches_all_four_sides_of_its_box() -> None:
    for label in (*pictures.THREATS, *pictures.HARMLESS):
        layer = pictures._layer(np.random.default_rng(1), label, 150)
        assert layer.getbbox() == (0, 0, *layer.size)
        assert max(layer.size) > 75


def test_drawing_needs_no_torch() -> None:
    code = (
        "import sys; from cvworker.embedded.pictures import draw; draw(0, (64, 48)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
