"""The demo: what its page asks for, without a browser; and the page in one."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import timm_ltm
from timm_ltm.cost import gmacs

FILE = Path(__file__).parents[1] / "examples" / "demo.py"
spec = importlib.util.spec_from_file_location("demo_of_examples", FILE)
page_of = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_of)
CHINA, FLOWER = page_of.photos()
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WAIT = 240_000  # ms; of a machine that does other things beside
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def demo(*argv: str) -> page_of.Demo:
    return page_of.Demo(page_of.arguments(list(argv)))


def rows(numbers: str) -> dict[str, list[str]]:
    """Cells of the table by model."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in numbers.splitlines()]
    assert lines[0][:3] == ["model", "GMACs", "latency"]
    return {name: cells for name, *cells in lines[2:]}


@pytest.fixture(scope="module")
def small():
    return demo("test_vit")


def test_answers_are_those_of_the_two_models(small):
    answer = small.answer(CHINA, "test_vit", "ltm", 0.65)
    plain = small.model("test_vit")
    merging = timm_ltm.convert(plain, "ltm", gmacs=0.65)
    _, x = page_of.load_photo(CHINA, page_of.data_config(plain))
    with torch.no_grad():
        logits = [model(x[None])[0] for model in (plain, merging)]
    for found, expected in zip((answer.plain, answer.merging), logits, strict=True):
        p = expected.softmax(dim=0)
        assert list(found.values()) == pytest.approx(sorted(p.tolist(), reverse=True)[:5])
        k = int(p.argmax())
        assert next(iter(found)) == f"{ImageNetInfo().index_to_description(k)} ({k})"
    cells = rows(answer.numbers)
    cost = [gmacs(model) for model in (plain, merging)]
    assert cells["plain"][0] == f"{cost[0]:.3f}"
    assert cells["ltm"][0] == f"{cost[1]:.3f} ({cost[1] / cost[0]:.3f})"
    assert float(cells["ltm"][2]) == pytest.approx(torch.cosine_similarity(*logits, dim=0).item(), abs=1e-4)
    assert all(float(cells[name][1].split()[0]) > 0 for name in ("plain", "ltm"))


@pytest.mark.parametrize("method", list(timm_ltm.METHODS))
def test_every_method_is_shown_block_by_block(small, method):
    answer = small.answer(FLOWER, "test_vit", method, 0.65)
    share = float(re.search(r"\((.*)\)", rows(answer.numbers)[method][0])[1])
    assert share <= (1.0 if method == "ltmp" else 0.65)  # whose r_FLOPs leaves out matching, much of a tiny model
    captions = [caption for _, caption in answer.pictures]
    assert captions[0] == "photograph"
    counts = [tuple(map(int, re.fullmatch(r"block \d+: (\d+) to (\d+)", c).groups())) for c in captions[1:]]
    assert counts[0][0] == 100  # 160 pixels, patches of 16
    assert all(P == N for (_, P), (N, _) in itertools.pairwise(counts))
    assert counts[-1][1] < 100
    assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p, _ in answer.pictures)
    assert all(picture.std() > 0 for picture, _ in answer.pictures)


def test_every_view_has_pictures_of_its_own(small):
    pictures = [small.answer(CHINA, "test_vit", "tome", 0.65, view).pictures for view in page_of.VIEWS]
    assert len({len(each) for each in pictures}) == 1
    assert all((first[0][0] == other[0][0]).all() for first, other in itertools.pairwise(pictures))
    assert len({each[-1][0].tobytes() for each in pictures}) == len(page_of.VIEWS)


def test_models_are_kept(small, monkeypatch):
    """Of other photographs too, unless what the model costs depends on them."""
    small.pair.cache_clear()
    made = []
    convert = timm_ltm.convert
    monkeypatch.setattr(timm_ltm, "convert", lambda *a, **k: made.append(a[1]) or convert(*a, **k))
    for photo in (CHINA, FLOWER, CHINA):
        for method in ("tome", "ltmp"):
            small.answer(photo, "test_vit", method, 0.65)
    assert made == ["tome", "ltmp", "ltmp"]
    small.answer(CHINA, "test_vit", "tome", 0.7)
    assert made[3:] == ["tome"]


@pytest.mark.parametrize(
    ("photo", "name", "method", "budget", "message"),
    [
        (None, "test_vit", "ltm", 0.65, "photograph: got None, expected an image"),
        (__file__, "test_vit", "ltm", 0.65, "expected an image file"),
        (CHINA, "test_vitt", "ltm", 0.65, "Did you mean 'test_vit'"),
        (CHINA, __file__, "ltm", 0.65, "expected a name of timm's"),
        (CHINA, "test_resnet", "ltm", 0.65, "model: got 'ResNet', expected one of timm's"),
        (CHINA, "test_vit", "tomee", 0.65, "tomee"),
        (CHINA, "test_vit", "ltm", 0.001, "gmacs: got 0.001, expected at least"),
        (CHINA, "mobilevit_xxs", "patch_merger", 0.65, "expected one that merges maps, stage by stage"),
    ],
)
def test_what_does_not_fit_is_told(small, photo, name, method, budget, message):
    with pytest.raises(ValueError, match=message):
        small.answer(photo, name, method, budget)


def test_without_a_head_the_pooled_features_are_compared():
    found = demo("test_vit", "--num-classes", "0")
    answer = found.answer(CHINA, "test_vit", "tome", 0.65)
    assert answer.plain is None
    assert answer.merging is None
    assert "cosine of the pooled features" in answer.numbers
    assert 0 < float(rows(answer.numbers)["tome"][2]) <= 1


def test_a_merging_model_is_shown_as_it_is():
    found = demo("tome_test_vit", "--model-kwargs", "r=8")
    assert found.merges("tome_test_vit")
    answer = found.answer(CHINA, "tome_test_vit", "ltm", 0.65)
    cells = rows(answer.numbers)
    assert set(cells) == {"plain", "tome"}
    assert answer.pictures[1][1] == "block 1: 100 to 92"
    assert not found.merges("test_vit")
    plain = found.pair("tome_test_vit", "ltm", 0.65, CHINA).plain
    assert cells["plain"][0] == f"{gmacs(plain):.3f}"
    assert gmacs(plain) == pytest.approx(gmacs(timm.create_model("test_vit").eval()))


def test_names_of_classes():
    """The model's own where it tells them, indices where nothing does."""
    model = timm.create_model("test_vit", num_classes=3)
    logits = torch.tensor([0.0, 2.0, 1.0])
    assert list(page_of.likeliest(model, logits)) == ["class 1", "class 2", "class 0"]
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["ant", "bee", "cat"]}
    assert list(page_of.likeliest(model, logits, 2)) == ["bee (1)", "cat (2)"]


def test_large_photographs_are_made_smaller(small, tmp_path):
    Image.new("RGB", (1600, 1200), "red").save(tmp_path / "large.png")
    (picture, _), *_ = small.answer(str(tmp_path / "large.png"), "test_vit", "tome", 0.65).pictures
    assert picture.shape == (page_of.PIXELS, page_of.PIXELS, 3)  # the middle, of the model's shape
    assert (picture[..., 0] > 250).all()


def test_the_page_tells_errors_in_the_words_of_the_library(small):
    gr = pytest.importorskip("gradio", reason="gradio is not installed")
    blocks = page_of.page(small)
    (show,) = {f.fn for f in blocks.fns.values() if getattr(f.fn, "__name__", "") == "show"}
    assert not blocks.analytics_enabled
    values = show(CHINA, "test_vit", "ltm", 0.65, page_of.TOGETHER)
    assert len(values) == 6
    assert "| ltm |" in values[1]
    with pytest.raises(gr.Error, match=r"gmacs: got 0\.001, expected at least"):
        show(CHINA, "test_vit", "ltm", 0.001, page_of.TOGETHER)
    with pytest.raises(gr.Error, match="expected a name of timm's"):
        show(CHINA, "/etc/hostname", "ltm", 0.65, page_of.TOGETHER)


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    if BROWSER is None:
        pytest.skip("there is no chromium or google-chrome")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS.split())  # with a profile of its own
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_a_browser(browser, tmp_path):
    """The slider moves the numbers, the method the pictures, and nothing is asked of any other machine."""
    from playwright.sync_api import expect

    blocks, url = page_of.serve(page_of.arguments(["test_vit"]), prevent_thread_lock=True, quiet=True)
    asked, problems = [], []
    try:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        numbers, pictures = page.locator("#numbers tbody tr").nth(1), page.locator("#blocks img")

        def share() -> float:
            return float(re.search(r"\((.*?)\)", numbers.locator("td").nth(1).inner_text())[1])

        def sources() -> list[str]:
            return [pictures.nth(i).get_attribute("src") for i in range(pictures.count())]

        expect(numbers).to_contain_text("ltm")
        expect(page.locator("#plain")).to_contain_text("(")  # a class and its index
        expect(page.locator("#merging")).to_contain_text("(")
        expect(pictures.nth(1)).to_be_visible()
        first, before = share(), sources()
        assert 0.6 < first <= 0.65

        page.locator("#budget input[type=range]").fill("0.85")
        expect(numbers).to_contain_text(re.compile(r"\(0\.8[1-5]\d*\)"))
        expect(pictures.nth(1)).not_to_have_attribute("src", before[1])
        moved = sources()
        assert first < share() <= 0.85
        assert moved[0] == before[0]  # the photograph

        page.locator("#method input").click()
        page.get_by_role("option", name="tofu", exact=True).click()
        expect(numbers).to_contain_text("tofu")
        expect(pictures.nth(1)).not_to_have_attribute("src", moved[1])
        of_method = sources()
        page.get_by_label("means of the merged tokens").click()
        expect(pictures.nth(1)).not_to_have_attribute("src", of_method[1])

        box = page.locator("#model input")
        box.fill("test_resnet")
        box.press("Enter")
        expect(page.get_by_text("got 'ResNet', expected one of timm's")).to_be_visible()
        expect(page.locator("#method input")).to_have_value("tofu")
        expect(page.locator("#method").get_by_text("Error")).not_to_be_visible()  # choices stay within reach
        page.screenshot(path=tmp_path / "page.png")
    finally:
        blocks.close()
    assert not problems
    assert {re.match(r"\w+:/*([^:/,]*)", address)[1] for address in asked} <= {"127.0.0.1", "image", "font"}
