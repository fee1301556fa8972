"""notebooks/play.html: what is in the file, and, with -m browser, what it does in Chromium.

The page and Python draw the same noises, so that the numbers are the same. Needs
`apt-get install chromium` and `pip install playwright`.
"""

import json
import math
import re
from functools import partial
from typing import Iterator, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

import ddim
from notebooks import play
from notebooks.methods import plane
from sample import UsageError

PAGE = play.PAGE.read_text()
exact = partial(torch.tensor, dtype=torch.float64)
POINTS = 2000


# ---- the file


def test_it_needs_no_network():
    assert not re.search(r"https?://|//\w+\.\w", PAGE.replace("// ", ""))
    assert "default-src 'none'" in PAGE
    for _, url in re.findall(r"\b(src|href)=\"([^\"]*)\"", PAGE):
        assert url.startswith("data:")


def test_it_is_small():
    assert play.PAGE.stat().st_size < 1.6e6
    assert len(PAGE.split(play.BEGIN)[1].split(play.END)[0]) < 1.5e6


def stored() -> dict:
    """Returns the images as they are in the page."""
    return json.loads(re.search(r'id="sprites">(.*?)</script>', PAGE, re.DOTALL)[1])


def test_all_images_are_there():
    sprites = stored()
    assert sprites["guidances"] == [*play.GUIDANCES]
    for concept in play.CONCEPTS:
        prompts = [prompt._asdict() for prompt in play.prompts_for(concept)]
        assert sprites["prompts"][concept] == prompts
        for label in play.MODELS:
            sheet = sprites[f"{concept}/{label}"]
            assert sheet["image"].startswith("data:image/webp;base64,UklGR")
            assert [len(row) for row in sheet["seen"]] == [12, 12, 12]


def test_the_original_draws_what_it_is_asked_for():
    """The judge says so of nearly all images at g 5."""
    sprites = stored()
    right = []
    for concept in play.CONCEPTS:
        seen = sprites[f"{concept}/original"]["seen"][1]
        right += [a == b.wanted for a, b in zip(seen, play.prompts_for(concept))]
    assert sum(right) > 0.85 * len(right)


@pytest.mark.parametrize("concept", play.CONCEPTS)
def test_six_prompts_ask_for_the_concept_and_six_for_others(concept):
    prompts = play.prompts_for(concept)
    assert [prompt.wanted == concept for prompt in prompts] == [True] * 6 + [False] * 6
    assert len({prompt.text for prompt in prompts}) == 12


def test_new_images_take_the_place_of_the_old():
    sheet = play.Sheet(Image.new("RGB", (4, 4), "red"), [["star", None]])
    block = play.to_block({"star/original": sheet})
    page = f"before{play.BEGIN}old{play.END}after"
    once = play.put_between_markers(page, block)
    assert once == f"before{play.BEGIN}\n{block}\n{play.END}after"
    assert play.put_between_markers(once, block) == once
    assert '"seen": [["star", null]]' in block


@pytest.mark.parametrize(
    "page", ["", play.BEGIN, play.END + play.BEGIN, 2 * (play.BEGIN + play.END)]
)
def test_a_page_without_markers_is_refused(page):
    with pytest.raises(UsageError, match="the page needs"):
        play.put_between_markers(page, "")


# ---- the plane in Python: the same noises, plane.py's predictions


class Settings(NamedTuple):
    """What the page's controls say."""

    world: str = "five"
    eta: float = 1.0
    odds: bool = False
    guidance: float = 1.0
    delta: float = 0.0  # percent
    steps: int = 50
    narrow: float = 0.6
    seed: int = 1
    means: tuple = ((0, 0), (2.5, 0), (-2, 1.5), (-1, -2.5), (4.5, 2))


class World(NamedTuple):
    """A mixture and its prompts."""

    model: plane.Mixture
    null: Tensor
    c: Tensor


def mulberry32(seed: int) -> Iterator[float]:
    """Yields numbers in [0, 1), those of the page."""
    mask = 2**32 - 1
    while True:
        seed = (seed + 0x6D2B79F5) & mask
        z = (seed ^ seed >> 15) * (seed | 1) & mask
        z ^= z + ((z ^ z >> 7) * (z | 61) & mask) & mask
        yield (z ^ z >> 14) / 2**32


def starting_noise(seed: int) -> Tensor:
    """Returns the page's x_T, (POINTS, 2, 1, 1)."""
    uniform = mulberry32(seed)
    points = []
    for _ in range(POINTS):
        radius = math.sqrt(-2 * math.log(1 - next(uniform)))
        angle = 2 * math.pi * next(uniform)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return exact(points)[:, :, None, None]


def world_of(settings: Settings) -> World:
    five = settings.world == "five"
    null = exact([0.2] * 5) if five else exact([1, 0])
    own = exact([1, 0, 0, 0, 0]) if five else exact([0, 1])
    variances = exact([0.15] * 5) if five else exact([1, settings.narrow])
    delta = settings.delta / 100
    means = exact(settings.means)
    return World(plane.Mixture(means, variances), null, (1 - delta) * own + delta * null)


def drawn(settings: Settings) -> Tensor:
    """Returns the images of the erased model, (POINTS, 2)."""
    model, null, c = world_of(settings)
    odds = partial(plane.odds, model=model, c=c, null=null, prior=0.2)
    eta = odds if settings.odds else settings.eta
    erased = plane.erased_predictor(model, c, null=null, eta=eta)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return ddim.guide(model(x_t, t, null), erased(x_t, t), settings.guidance)

    return plane.draw(predict, starting_noise(settings.seed), steps=settings.steps)


def drawn_by_never_saw(settings: Settings) -> Tensor:
    """Returns the images of a model of p - P(c) r, (POINTS, 2)."""
    model, null, c = world_of(settings)
    others = null - 0.2 * c
    predict = partial(model, c=others / others.sum())
    return plane.draw(predict, starting_noise(settings.seed), steps=settings.steps)


def eq_4(settings: Settings) -> tuple[Tensor, Tensor]:
    """Returns points of a grid, (N, 2), and their weights in Eq. 4's density, (N,)."""
    model, null, c = world_of(settings)
    axis = torch.arange(-30, 30, 0.1, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    x = grid[:, :, None, None]
    log_p = model.log_density(x, exact(1), null)
    strength = settings.guidance * settings.eta
    log_q = log_p + strength * (log_p - model.log_density(x, exact(1), c))
    return grid, log_q.softmax(dim=0)


def summary(settings: Settings, x_0: Tensor, weights: Tensor | None = None) -> list[float]:
    """Returns a column of the page's table: percentages, then means and variances."""
    if weights is None:
        weights = torch.full((len(x_0),), 1 / len(x_0), dtype=torch.float64)
    mean = weights @ x_0
    variance = weights @ (x_0 - mean).square()
    if settings.world == "line":
        return [*mean.tolist(), *variance.tolist()]
    model = world_of(settings).model
    distances = torch.cdist(x_0, model.means)
    nearest = distances.argmin(dim=1)
    shares = torch.zeros(5, dtype=torch.float64).index_add(0, nearest, weights)
    outside = weights[distances.amin(dim=1) > 3 * model.variances[0].sqrt()].sum()
    return [*(100 * shares).tolist(), 100 * outside.item(), *mean.tolist(), *variance.tolist()]


def test_the_noises_are_standard_normal():
    noise = starting_noise(1).flatten(start_dim=1)
    torch.testing.assert_close(noise.mean(dim=0), exact([0, 0]), rtol=0, atol=0.08)
    torch.testing.assert_close(noise.T.cov(), torch.eye(2).double(), rtol=0, atol=0.1)


# ---- the page in a browser

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        yield browser
        browser.close()


COUNT_FRAMES = """
window.frames_ = [];  // when each began, and the milliseconds that the page worked in it
const request = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = callback => request(now => {
  const began = performance.now();
  callback(now);
  window.frames_.push([now, performance.now() - began]);
});
"""


def open_page(chromium, size: dict[str, int]):
    """Yields the page; at the end, nothing may have been said on the console."""
    context = chromium.new_context(
        viewport=size, reduced_motion="reduce", has_touch=size is PHONE, offline=True
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url)
            if not request.url.startswith(("file:", "data:")) else None)
    page.add_init_script(COUNT_FRAMES)
    page.goto(play.PAGE.resolve().as_uri())
    yield page
    context.close()
    assert not complaints


@pytest.fixture
def page(chromium):
    yield from open_page(chromium, DESKTOP)


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def sized(request, chromium):
    yield from open_page(chromium, request.param)


def slide(page, name: str, value: float) -> None:
    """Moves a slider to a value, as a browser does when it is dragged."""
    page.locator(f"#{name}").fill(f"{value:g}")


def set_controls(page, settings: Settings) -> None:
    page.select_option("#world", settings.world)
    ranges = ["guidance", "delta", "steps"]
    ranges += [] if settings.odds else ["eta"]
    ranges += ["narrow"] if settings.world == "line" else []
    for name in ranges:
        slide(page, name, getattr(settings, name))
    if settings.odds:
        page.check("#odds")
    page.fill("#seed", str(settings.seed))
    page.locator("#seed").press("Enter")


def columns(page) -> list[list[str]]:
    """Returns the table's columns without the headings, once it is up to date."""
    page.wait_for_selector("#readout[aria-busy=false]")
    rows = [row.split("\t")[1:] for row in page.inner_text("#table tbody").split("\n")]
    return [[*column] for column in zip(*rows)]


def numbers(column: list[str]) -> list[float]:
    return [float(text.removesuffix(" %")) for text in column]


def assert_column(column: list[str], expected: list[float]) -> None:
    """Within 1 %, and of shares, what rounding and a point or two make."""
    for text, right in zip(column, expected, strict=True):
        (found,) = numbers([text])
        assert found == pytest.approx(right, rel=0.01, abs=0.16 if "%" in text else 0.01)


CASES = [
    Settings(),
    Settings(eta=-0.5, guidance=2),
    Settings(steps=200, seed=7),
    Settings(eta=0.3, guidance=3.5, steps=37),  # 37 doesn't divide 1000
    Settings(delta=5, eta=0.3),
    Settings(delta=5, eta=3),
    Settings(odds=True),
    Settings(odds=True, delta=10, guidance=1.5),
]


def what_differs(settings: Settings) -> str:
    """Returns what isn't the default, as a test's name: "delta-5-eta-3"."""
    default = Settings()._asdict()
    names = [f"{key}-{value}" for key, value in settings._asdict().items() if value != default[key]]
    return "-".join(names) or "default"


@pytest.mark.browser
@pytest.mark.parametrize("settings", CASES, ids=what_differs)
def test_the_numbers_are_pythons(page, settings):
    set_controls(page, settings)
    erased, never_saw, density = columns(page)
    assert_column(erased, summary(settings, drawn(settings)))
    assert_column(never_saw, summary(settings, drawn_by_never_saw(settings)))
    if settings.odds:
        assert {*density} == {"–"}
    else:
        assert_column(density, summary(settings, *eq_4(settings)))


@pytest.mark.browser
def test_the_closed_forms(page):
    """theory.md's: S 1, C .6, eta 1 and 3. Eq. 4's density doesn't exist for eta 3."""
    line = Settings(world="line", means=((0, 0), (0.8, 0)), steps=200)
    set_controls(page, line)
    erased, density = columns(page)
    assert erased.pop() == "1.67"
    assert density.pop() == "3.00"
    assert_column(erased, summary(line, drawn(line)))
    assert numbers(erased)[2:] == pytest.approx([1.667, 1.667], rel=0.1)  # of 2,000 points
    assert_column(density, [-4, 0, 3, 3])

    slide(page, "eta", 3)
    erased, density = columns(page)
    assert erased[-1] == "4.63"
    assert density == ["–"] * 4 + ["none"]
    assert "isn't a distribution" in page.inner_text("#note")

    slide(page, "delta", 5)
    wrong = line._replace(eta=3, delta=5)
    erased, density = columns(page)
    assert_column(erased, summary(wrong, drawn(wrong)))
    assert_column(density, summary(wrong, *eq_4(wrong)))


@pytest.mark.browser
@pytest.mark.parametrize("settings", [
    Settings(world="line", means=((0, 0), (0.8, 0)), eta=3, guidance=10, delta=0.5, narrow=1),
    Settings(world="line", means=((0, 0), (0.8, 0)), eta=-1, guidance=3),
    Settings(eta=3, guidance=10, delta=0.5),
], ids=what_differs)
def test_eq_4s_density_is_found_wherever_it_is(page, settings):
    """Guided, its eta is g eta; wrong captions let it go far, but not without end."""
    set_controls(page, settings)
    expected = summary(settings, *eq_4(settings))
    assert_column(columns(page)[-1][: len(expected)], expected)  # the closed form is below


@pytest.mark.browser
def test_a_mean_moves_by_keys_and_by_mouse(page):
    set_controls(page, Settings())
    handle = page.locator(".mean").nth(4)
    handle.focus()
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight"):
        page.keyboard.press(key)
    assert "at 5.4, 2.1" in handle.get_attribute("aria-label")
    moved = Settings(means=(*Settings().means[:4], (5.4, 2.1)))
    assert_column(columns(page)[0], summary(moved, drawn(moved)))

    box = page.locator("#canvas").bounding_box()
    unit = box["width"] / 19
    handle = page.locator(".mean").nth(0)
    start = handle.bounding_box()
    x = start["x"] + start["width"] / 2
    y = start["y"] + start["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + unit, y - 0.5 * unit, steps=4)
    page.mouse.up()
    assert "at 1, 0.5" in handle.get_attribute("aria-label")
    moved = Settings(means=((1, 0.5), *moved.means[1:]))
    assert_column(columns(page)[1], summary(moved, drawn_by_never_saw(moved)))


@pytest.mark.browser
def test_a_mean_moves_by_touch(chromium):
    """And the screen doesn't scroll."""
    for page in open_page(chromium, PHONE):
        columns(page)
        handle = page.locator(".mean").nth(2)
        handle.scroll_into_view_if_needed()
        scrolled = page.evaluate("window.scrollY")
        box = handle.bounding_box()
        x = box["x"] + box["width"] / 2
        y = box["y"] + box["height"] / 2
        unit = page.locator("#canvas").bounding_box()["width"] / 19

        touch = page.context.new_cdp_session(page)
        for kind, moved in (("touchStart", 0), ("touchMove", 1), ("touchMove", 2), ("touchEnd", 2)):
            points = [{"x": x, "y": y + moved * unit}] if kind != "touchEnd" else []
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_selector(".mean[aria-label*='at -2, -0.5']")
        assert page.evaluate("window.scrollY") == scrolled


@pytest.mark.browser
def test_all_of_it_can_be_used_with_the_keyboard(sized):
    """Every control is reached by Tab and has a name; the tabs change by arrows."""
    columns(sized)
    sized.locator("#tab-plane").focus()
    reached = []
    for _ in range(30):
        focused = "document.activeElement"
        reached.append(sized.evaluate(f"{focused}.id || {focused}.className"))
        sized.keyboard.press("Tab")
    wanted = {"tab-plane", "play", "time", "show-eq4", "eta", "odds", "guidance", "delta", "steps",
              "width", "world", "seed", "new-noise", "reset", "mean", "mean concept"}
    assert wanted <= {*reached}, wanted - {*reached}

    names = "[...document.querySelectorAll('input, select, button')].filter(each => " \
        "!each.labels?.length && !each.getAttribute('aria-label') && !each.textContent.trim())"
    assert sized.evaluate(f"{names}.map(each => each.outerHTML)") == []

    sized.locator("#eta").focus()
    sized.keyboard.press("ArrowRight")
    assert sized.inner_text("#eta-out") == "1.1"
    assert numbers(columns(sized)[2])[6] == pytest.approx(2.1 * 4.5, abs=0.01)

    sized.locator("#tab-plane").focus()
    sized.keyboard.press("ArrowRight")
    assert sized.locator("#miniature").is_visible() and not sized.locator("#plane").is_visible()
    assert sized.evaluate("document.activeElement.id") == "tab-miniature"


@pytest.mark.browser
def test_nothing_is_wider_than_the_screen(sized):
    columns(sized)
    width = sized.viewport_size["width"]
    assert sized.evaluate("document.documentElement.scrollWidth") == width
    sized.select_option("#world", "line")
    columns(sized)
    assert sized.evaluate("document.documentElement.scrollWidth") == width
    sized.click("#tab-miniature")
    assert sized.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_the_miniature_shows_what_was_stored(sized):
    sized.click("#tab-miniature")
    sprites = stored()
    choices = {"concept": "heart", "method": "kept", "eta": "3", "g": "5"}
    for name, value in choices.items():
        sized.check(f"input[name={name}][value='{value}']")
    after = sprites["heart/kept, eta 3"]
    hits = after["seen"][1][:6].count("heart")
    assert f"sees a heart in {hits} of the 6 images" in sized.inner_text("#verdict")

    images = sized.locator("#miniature .sprite")
    assert images.count() == 24
    style = images.nth(7).evaluate("each => each.style.backgroundImage")  # the fourth's after
    assert after["image"] in style
    place = images.nth(7).evaluate("each => each.style.backgroundPosition")
    across, down = place.split()
    assert float(across.removesuffix("%")) == pytest.approx(100 * 3 / 11, abs=0.01)
    assert down == "50%"
    assert sized.locator("#miniature .sprite.seen").count() == after["seen"][1].count("heart")

    sized.locator("input[name=g][value='5']").focus()
    sized.keyboard.press("ArrowRight")
    hits = after["seen"][2][:6].count("heart")
    assert f"sees a heart in {hits} of the 6 images" in sized.inner_text("#verdict")


class Speed(NamedTuple):
    """What a stretch of frames took."""

    frames_a_second: float
    work: float  # the page's own, mean milliseconds a frame


def speed(page) -> Speed:
    """Returns the speed since frames were last counted."""
    frames = page.evaluate("window.frames_.splice(0)")
    seconds = (frames[-1][0] - frames[0][0]) / 1000
    return Speed((len(frames) - 1) / seconds, sum(work for _, work in frames) / len(frames))


@pytest.mark.browser
def test_frames_per_second(sized, capsys):
    """Measures; how busy the machine is isn't the page's fault. Its work must fit into a frame."""
    columns(sized)
    sized.evaluate("window.frames_.splice(0)")
    sized.click("#play")
    sized.wait_for_selector("#play:text-is('Play')")
    playing = speed(sized)

    for i in range(60):
        slide(sized, "eta", (i % 30) / 10)
    columns(sized)
    sliding = speed(sized)
    with capsys.disabled():
        for what, (rate, work) in (("playing", playing), ("sliding eta", sliding)):
            print(f"\n{sized.viewport_size['width']} px, {what}: {rate:.0f} frames a second, "
                  f"{work:.1f} ms of work in each", end="")
    assert playing.work < 1000 / 30
