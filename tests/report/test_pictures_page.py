"""The page of pictures: everything given is shown as text, pictures travel inside, nothing is loaded."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from dllm_sparse.report.pictures_page import Part, pictures_page, shown
from tests.report.conftest import ATTACKS


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_is_never_markup_and_pictures_are_inside(attack: str, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG not really")
    part = Part(attack, [attack], (picture, attack), [attack], [[attack, attack]])
    page = pictures_page(attack, attack, [part])
    if "<" in attack:
        assert attack not in page
    assert f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}" in page
    policy = page.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy
    assert policy.count("'sha256-") == page.count("<script>") == 2


def test_cells_are_short_and_say_what_is_missing() -> None:
    assert [shown(value) for value in (None, float("nan"), 0.123456, 3, "x")] == ["-", "-", "0.1235", "3", "x"]
