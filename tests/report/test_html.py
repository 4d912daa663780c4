import base64
import hashlib
import json
import re
from importlib.resources import files

from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.report.html import Section, bullets, figure, json_block, page, paragraph, select, table
from tests.report.conftest import ATTACKS

ASSETS = files("dllm_sparse.report").joinpath("assets")


@given(st.text() | st.sampled_from(ATTACKS))
def test_data_survives_and_cannot_leave_its_block(text):
    block = json_block("data", {text: [text]})
    content = block.removeprefix('<script type="application/json" id="data">').removesuffix("</script>")
    assert not set(content) & set("<>&\u2028\u2029")
    assert json.loads(content) == {text: [text]}


@given(st.sampled_from(ATTACKS) | st.text())
def test_text_is_shown_and_never_markup(text):
    attack = text + "<b onclick='x'>\""
    for markup in (
        paragraph(attack),
        bullets([attack]),
        table([attack], [[attack, attack]]),
        select("id", attack, [(attack, attack)]),
    ):
        assert "<b" not in markup
        assert "'x'" not in markup
    assert "<b" not in figure("id", attack)


def test_a_page_loads_nothing_and_names_its_scripts_by_hash():
    markup = page("title", "subtitle", [Section("one", "One", "<p>body</p>")], {"data": {"a": 1}})
    outside = re.sub(r"<script>.*?</script>", "", markup, flags=re.DOTALL)
    assert not re.search(r"https?://|(src|href)=\"(?!#|data:,)", outside)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', markup)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline'; img-src data:" in policy
    for source in re.findall(r"<script>(.*?)</script>", markup, flags=re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_vendored_libraries_come_with_their_licences():
    for name in ("d3", "plot"):
        assert "Permission to use, copy, modify" in ASSETS.joinpath("vendor", f"LICENSE.{name}.txt").read_text()
    names = ("vendor/d3.min.js", "vendor/plot.min.js")
    assert sum(len(ASSETS.joinpath(name).read_bytes()) for name in names) < 2_000_000
