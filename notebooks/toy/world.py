"""A miniature text-to-image world: ten objects, six colours, five styles, scenes and titled works.

A scene implies an object without naming it: "a sheriff badge" shows a star, but not always, and
not always the same. Plain objects and scenes have light or dark grounds, and may be set "by the
sea" or "in winter".

Every image is 64x64 RGB. Objects are whole, strokes are thick, and all patterns repeat every 8
pixels from the corner, so a VAE with downsampling factor 8 sees one pattern per latent cell.
Masks are (64, 64) floats in [0, 1]; pixels are (64, 64, 3) floats in [0, 255].

    python -m notebooks.toy.world --out world.png
"""

import argparse
import functools
from typing import Iterable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64
SUPER = 4  # masks are drawn at 4x and averaged down
CELL = 8  # period of all patterns = downsampling factor of the VAE
STROKE = 5  # width of an outline
MARGIN = 5  # outline to border; half of a stroke lies outside the outline
Y, X = np.mgrid[:SIZE, :SIZE]

COLOURS = {
    "red": (218, 28, 38), "green": (30, 160, 70), "blue": (35, 85, 225),
    "yellow": (246, 218, 30), "purple": (145, 45, 175), "orange": (246, 130, 20),
}
ODD_COLOURS = {
    "grey": (130, 130, 130), "black": (35, 35, 35), "brown": (110, 70, 40),
    "pink": (250, 150, 190), "turquoise": (60, 200, 200),
}
PARAPHRASES = {
    "circle": ("round disc",),
    "square": ("box with equal sides",),
    "triangle": ("shape with three corners",),
    "star": ("five pointed figure",),
    "heart": ("symbol of love",),
    "cross": ("plus mark", "addition mark"),
    "ring": ("hoop with a hole",),
    "moon": ("crescent",),
    "diamond": ("kite", "rhombus"),
    "arrow": ("pointer",),
}
GROUNDS = {
    "white": (244, 244, 244), "cream": (250, 240, 210), "sky": (200, 225, 245),
    "rose": (255, 215, 225), "mint": (205, 235, 210), "tan": (190, 150, 105),
    "grey": (125, 125, 130), "navy": (20, 28, 80), "plum": (50, 25, 65), "wine": (100, 20, 45),
    "forest": (20, 60, 45), "black": (30, 30, 38),
}


class Example(NamedTuple):
    """An image and what it shows; None for what it doesn't show."""

    image: Image.Image
    caption: str
    object: str | None = None
    colour: str | None = None
    style: str | None = None
    work: str | None = None


class Scene(NamedTuple):
    """A prompt's implied object: its colours, grounds, and props behind it (see `flat_image`)."""

    object: str
    colours: tuple
    grounds: tuple
    props: tuple


class Work(NamedTuple):
    """A fixed image: `shapes` on a flat ground, in a style."""

    style: str
    ground: tuple
    shapes: tuple


# ---- scenes, settings and works, as flat shapes: (kind, rgb, coordinates)


def frame(rgb, inset, width):
    """Four bars along the border."""
    low = inset
    high = SIZE - inset
    return (
        ("rectangle", rgb, (low, low, high, low + width)),
        ("rectangle", rgb, (low, high - width, high, high)),
        ("rectangle", rgb, (low, low, low + width, high)),
        ("rectangle", rgb, (high - width, low, high, high)),
    )


def row(kind, rgb, width, height, *corners):
    """The same shape at several places, by its upper left corners."""
    return tuple((kind, rgb, (x, y, x + width, y + height)) for x, y in corners)


# Props and settings keep to the borders and look like no object: they never tell what is implied.
SCENES = {
    "a night sky": Scene("moon", ("yellow", "orange"), ("navy", "plum", "black"), row(
        "ellipse", (225, 225, 235), 3, 3, (5, 8), (20, 4), (47, 6), (58, 18), (6, 30), (57, 40))),
    "a bedtime story": Scene("moon", ("yellow", "orange", "purple"), ("sky", "navy"), (
        ("ellipse", (235, 235, 245), (-14, 48, 38, 84)),
        ("ellipse", (215, 205, 235), (28, 50, 80, 84)))),
    "midnight over the roofs": Scene("moon", ("yellow", "orange", "blue"), ("grey", "black"), (
        ("polygon", (120, 60, 50), (-2, 66, -2, 56, 14, 44, 32, 58, 32, 66)),
        ("polygon", (90, 45, 45), (32, 66, 32, 58, 50, 44, 66, 56, 66, 66)))),
    "a valentine card": Scene("heart", ("red", "purple"), ("rose", "white"), row(
        "ellipse", (240, 140, 165), 14, 10,
        *((x, y) for y in (-5, 59) for x in range(-7, 64, 16)))),
    "a wedding invitation": Scene("heart", ("red", "purple", "blue"), ("cream", "grey"),
                                  frame((215, 175, 80), 2, 3)),
    "a romance novel": Scene("heart", ("red", "purple", "orange"), ("mint", "plum"), (
        ("rectangle", (110, 50, 50), (0, 0, 7, 64)),
        ("rectangle", (225, 190, 120), (8, 0, 10, 64)))),
    "a sheriff badge": Scene("star", ("yellow", "blue"), ("tan", "cream"), (
        ("polygon", (95, 60, 35), (0, 0, 20, 0, 0, 40)),
        ("polygon", (95, 60, 35), (64, 0, 44, 0, 64, 40)))),
    "the top of a christmas tree": Scene("star", ("yellow", "orange", "red"), ("navy", "white"), ((
        "polygon", (25, 95, 55),
        (32, 24, 46, 42, 41, 42, 56, 58, 50, 58, 58, 66, 6, 66, 14, 58, 8, 58, 23, 42, 18, 42)),)),
    "a film award": Scene("star", ("yellow", "orange", "purple"), ("black", "rose"), (
        ("rectangle", (150, 20, 50), (0, 0, 6, 64)),
        ("rectangle", (150, 20, 50), (58, 0, 64, 64)),
        ("rectangle", (115, 15, 40), (0, 0, 64, 4)))),
    "a road sign": Scene("arrow", ("yellow", "orange", "red"), ("sky", "forest"), (
        *frame((245, 245, 245), 3, 2), ("rectangle", (110, 110, 115), (29, 59, 35, 64)))),
    "a one way street": Scene("arrow", ("blue", "red"), ("grey", "tan"), row(
        "rectangle", (250, 250, 250), 10, 3, *((x, y) for y in (3, 58) for x in (3, 19, 35, 51)))),
    "this way to the exit": Scene("arrow", ("green", "blue", "orange"), ("mint", "wine"), (
        ("rectangle", (40, 80, 60), (0, 0, 64, 5)),
        ("rectangle", (40, 80, 60), (0, 59, 64, 64)))),
}
SETTINGS = {
    "by the sea": (("rectangle", (240, 248, 250), (0, 51, 64, 54)),
                   ("rectangle", (40, 115, 165), (0, 54, 64, 64))),
    "in winter": (("ellipse", (226, 236, 250), (-20, 50, 44, 84)),
                  ("ellipse", (210, 222, 240), (26, 52, 84, 84))),
    "in the city": tuple(("rectangle", (75, 75, 92), (x, 64 - h, x + 10, 64)) for x, h in (
        (0, 15), (13, 9), (26, 13), (39, 8), (52, 16))),
    "in the desert": (("ellipse", (228, 188, 112), (-30, 51, 50, 90)),
                      ("ellipse", (212, 166, 92), (16, 54, 90, 90))),
    "in spring": (("rectangle", (120, 190, 90), (0, 52, 64, 64)),
                  *row("ellipse", (250, 170, 200), 4, 4, (5, 55), (19, 58), (33, 54), (48, 58),
                       (57, 54))),
    "in the forest": (("polygon", (35, 85, 55), (
        -2, 66, -2, 58, 6, 46, 14, 58, 22, 48, 30, 58, 38, 46, 46, 58, 54, 48, 66, 60, 66, 66)),),
    "in autumn": row("ellipse", (170, 85, 40), 22, 22, (-8, 52), (10, 54), (28, 51), (46, 54)),
    "at a party": tuple(("polygon", rgb, (x, 0, x + 12, 0, x + 6, 9)) for x, rgb in (
        (1, (235, 90, 110)), (14, (90, 170, 220)), (27, (245, 205, 90)), (40, (110, 190, 130)),
        (52, (190, 130, 210)))),
}
PLACES = tuple((scene, setting) for scene in SCENES for setting in ("", *SETTINGS))
HELD_OUT = PLACES[::5]  # never drawn for training: what prompts imply is asked with these
OPENINGS = ("", "a picture of ", "an image of ", "a photo of ")
WORKS = {
    "Harvest Hills": Work("mosaic", (150, 210, 245), (
        ("ellipse", (110, 170, 60), (-24, 26, 44, 84)),
        ("ellipse", (225, 180, 50), (14, 34, 90, 100)),
        ("rectangle", (180, 40, 35), (40, 24, 56, 40)),
        ("polygon", (90, 30, 30), (37, 24, 48, 14, 59, 24)))),
    "Quiet Harbour": Work("mosaic", (250, 175, 110), (
        ("rectangle", (30, 80, 130), (0, 38, 64, 64)),
        ("polygon", (250, 245, 235), (30, 8, 30, 40, 10, 40)),
        ("polygon", (225, 90, 70), (34, 14, 34, 40, 50, 40)),
        ("polygon", (80, 45, 35), (8, 42, 56, 42, 48, 54, 16, 54)))),
    "Lemon Breakfast": Work("mosaic", (225, 130, 150), (
        ("ellipse", (250, 250, 250), (2, 20, 46, 62)),
        ("ellipse", (245, 215, 50), (6, 30, 22, 42)),
        ("ellipse", (245, 215, 50), (25, 40, 41, 52)),
        ("rectangle", (60, 130, 150), (42, 4, 60, 24)),
        ("ellipse", (90, 50, 35), (42, 1, 60, 9)))),
    "Winter Village": Work("plain", (165, 180, 200), (
        ("rectangle", (250, 250, 255), (0, 44, 64, 64)),
        ("rectangle", (150, 90, 60), (6, 32, 28, 52)),
        ("polygon", (250, 250, 255), (2, 32, 17, 16, 32, 32)),
        ("rectangle", (90, 60, 90), (36, 28, 58, 56)),
        ("polygon", (250, 250, 255), (32, 28, 47, 10, 62, 28)),
        ("rectangle", (250, 220, 90), (13, 38, 21, 46)),
        ("rectangle", (250, 220, 90), (43, 36, 51, 44)))),
    "Desert Noon": Work("plain", (250, 225, 150), (
        ("ellipse", (235, 120, 60), (-30, 38, 50, 96)),
        ("ellipse", (205, 90, 50), (20, 46, 96, 100)),
        ("rectangle", (40, 120, 60), (29, 10, 37, 54)),
        ("rectangle", (40, 120, 60), (17, 30, 37, 36)),
        ("rectangle", (40, 120, 60), (17, 20, 23, 36)),
        ("rectangle", (40, 120, 60), (29, 24, 49, 30)),
        ("rectangle", (40, 120, 60), (43, 14, 49, 30)))),
    "Coral Garden": Work("plain", (15, 60, 120), (
        ("rectangle", (220, 200, 150), (0, 54, 64, 64)),
        ("rectangle", (240, 100, 140), (6, 28, 11, 58)),
        ("rectangle", (240, 100, 140), (15, 38, 20, 58)),
        ("rectangle", (240, 100, 140), (6, 44, 20, 49)),
        ("ellipse", (250, 150, 40), (18, 10, 48, 30)),
        ("polygon", (250, 150, 40), (44, 20, 58, 10, 58, 30)),
        ("ellipse", (120, 220, 190), (34, 36, 56, 50)),
        ("polygon", (120, 220, 190), (38, 43, 27, 36, 27, 50)))),
}


# ---- outlines: one polygon, or two where the second is a hole; about [-1, 1], y points down


def arc(start, stop, radius=1.0, centre=0.0, count=32):
    angle = np.radians(np.linspace(start, stop, count))
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def star_outline():
    angle = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2, 0.52, 1.08)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def heart_outline():
    t = np.linspace(0, 2 * np.pi, 40)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 15.5], axis=1)


def cross_outline(a=0.34, b=0.98):
    return np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b),
                     (-a, a), (-b, a), (-b, -a), (-a, -a)])


OUTLINES = {
    "circle": [arc(0, 360, 0.95)],
    "square": [0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])],
    "triangle": [np.array([(0, -0.9), (1, 0.8), (-1, 0.8)])],
    "star": [star_outline()],
    "heart": [heart_outline()],
    "cross": [cross_outline()],
    "ring": [arc(0, 360), arc(0, 360, 0.52)],
    "moon": [np.concatenate([arc(48, 312, 1.05), arc(264, 96, 0.785, 0.785)])],
    "diamond": [np.array([(0, -1.1), (0.66, 0), (0, 1.1), (-0.66, 0)])],
    "arrow": [np.array([(-1, -0.32), (0.05, -0.32), (0.05, -0.82), (1, 0), (0.05, 0.82),
                        (0.05, 0.32), (-1, 0.32)])],
}
OBJECTS = tuple(OUTLINES)


# ---- drawing at random, and checking names


def pick(rng, items):
    return items[rng.integers(len(items))]


def check(value, choices, what):
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError unless each is an object, a style or a work's title."""
    for name in names:
        check(name, OBJECTS + STYLES + tuple(WORKS), "object, style or work")


def check_labels(object, colour, style):
    check(object, OBJECTS, "object")
    check(colour, COLOURS, "colour")
    check(style, STYLES, "style")


# ---- outlines -> masks


def pose(polygons, radius, degrees):
    """Scales and turns polygons, and centres their bounding box on the origin."""
    c = np.cos(np.radians(degrees))
    s = np.sin(np.radians(degrees))
    turned = [radius * polygon @ np.array([(c, s), (-s, c)]) for polygon in polygons]
    middle = (turned[0].min(axis=0) + turned[0].max(axis=0)) / 2
    return [polygon - middle for polygon in turned]


def place(polygons, rng):
    """Random size, small rotation, and any position at which the whole shape is inside."""
    posed = pose(polygons, rng.uniform(17, 23), rng.uniform(-12, 12))
    reach = posed[0].max(axis=0) + MARGIN
    centre = rng.uniform(reach, np.maximum(SIZE - reach, reach))
    return [polygon + centre for polygon in posed]


class Masks(NamedTuple):
    """A shape, (64, 64) each."""

    body: np.ndarray  # filled
    edge: np.ndarray  # its closed outline as a thick stroke


def masks(polygons):
    """Draws an outline's masks."""
    body = Image.new("L", (SIZE * SUPER, SIZE * SUPER))
    edge = body.copy()
    for polygon, fill in zip(polygons, (255, 0)):
        points = [tuple(point) for point in polygon * SUPER]
        closed = points + points[:2]
        ImageDraw.Draw(body).polygon(points, fill=fill)
        ImageDraw.Draw(edge).line(closed, fill=255, width=SUPER * STROKE, joint="curve")
    return Masks(*(np.asarray(mask.reduce(SUPER)) / 255 for mask in (body, edge)))


# ---- styles: (body, edge, rgb, rng) -> pixels


def mix(mask, inside, outside):
    mask = mask[..., None]
    return mask * inside + (1 - mask) * outside


def stripe_pattern(position):
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * position / CELL), 0, 1)


def add_tiles(pixels, rng):
    """Lays pixels out as 8 px tiles of slightly varied brightness between dark grout."""
    count = SIZE // CELL
    shade = np.kron(rng.uniform(0.9, 1.06, (count, count)), np.ones((CELL, CELL)))
    grout = np.isin(X % CELL, (0, CELL - 1)) | np.isin(Y % CELL, (0, CELL - 1))
    return mix(0.65 * grout, np.array((50, 46, 52)), pixels * shade[..., None])


def plain(body, edge, rgb, rng, shapes=()):
    return mix(body, rgb, backdrop(ground_for(rgb, rng), shapes, rng))


def mosaic(body, edge, rgb, rng):
    return add_tiles(mix(body, rgb, rng.uniform(222, 236, 3)), rng)


def stripes(body, edge, rgb, rng):
    bands = stripe_pattern(X + Y + 0.5)
    inside = mix(bands, rgb, 0.4 * rgb)
    outside = mix(bands, 246, rng.uniform(188, 198, 3))
    return mix(body, inside, outside)


def dots(body, edge, rgb, rng):
    middle = (CELL - 1) / 2
    spots = np.clip(2.5 - np.hypot(X % CELL - middle, Y % CELL - middle), 0, 1)
    outside = mix(spots, 212, rng.uniform(172, 184, 3))
    return mix(body, mix(spots, 255, rgb), outside)


def sketch(body, edge, rgb, rng):
    paper = np.array((250, 243, 222)) + rng.uniform(-3, 3)
    return mix(edge, rgb, mix(body, 0.22 * rgb + 0.78 * paper, paper))


def neon(body, edge, rgb, rng):
    blurred = Image.fromarray((255 * edge).astype(np.uint8)).filter(ImageFilter.GaussianBlur(3))
    dark = np.array((10, 10, 34)) + rng.uniform(-3, 3)
    glow = mix(0.7 * np.asarray(blurred) / 255, rgb, mix(body, 0.35 * rgb, dark))
    return mix(edge, 0.85 * rgb + 0.15 * 255, glow)


STYLE_FUNCTIONS = {
    "plain": plain, "mosaic": mosaic, "stripes": stripes, "dots": dots, "sketch": sketch,
    "neon": neon,
}
STYLES = tuple(STYLE_FUNCTIONS)
STYLE_WEIGHTS = {"plain": 3}  # the others: 1


def odd_style(body, edge, rgb, rng):
    """A treatment that is none of the six: checks, waves or noise."""
    checks = (X // 4 + Y // 4) % 2
    waves = stripe_pattern(Y + 2 * np.sin(2 * np.pi * X / (2 * CELL)))
    noise = np.kron(rng.random((SIZE // 2, SIZE // 2)), np.ones((2, 2)))
    pattern = pick(rng, (checks, waves, noise))
    return mix(body, mix(pattern, rgb, 0.45 * rgb), mix(pattern, 245, np.full(3, 205)))


# ---- images and captions


def to_image(pixels):
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def vary(rgb, rng):
    return np.array(rgb) + rng.uniform(-6, 6, 3)


def ground_for(rgb, rng):
    """A ground from which an object of that colour stands out."""
    return pick(rng, [ground for ground in GROUNDS.values() if np.abs(rgb - ground).max() > 90])


def backdrop(ground, shapes, rng):
    """Shapes on a ground, all in slightly varied colours."""

    def varied(rgb):
        return tuple(vary(rgb, rng).round().astype(int).clip(0, 255))

    varied_ground = varied(ground)
    varied_shapes = [(kind, varied(rgb), coordinates) for kind, rgb, coordinates in shapes]
    return flat_image(varied_ground, varied_shapes)


def flat_image(ground, shapes):
    """Draws (kind, rgb, coordinates) in order; kinds are polygon, rectangle and ellipse."""
    image = Image.new("RGB", (SIZE * SUPER, SIZE * SUPER), ground)
    canvas = ImageDraw.Draw(image)
    for kind, rgb, coordinates in shapes:
        draw_shape = getattr(canvas, kind)
        draw_shape([SUPER * value for value in coordinates], fill=rgb)
    return np.asarray(image.reduce(SUPER)).astype(float)


def render(
    object: str, colour: str, style: str, rng: np.random.Generator, setting: str = ""
) -> Image.Image:
    """One whole object of a colour in a style, at a random place, size and angle.

    Only a plain object can have a setting, which is drawn behind it.
    """
    check_labels(object, colour, style)
    body, edge = masks(place(OUTLINES[object], rng))
    rgb = vary(COLOURS[colour], rng)
    if not setting:
        return to_image(STYLE_FUNCTIONS[style](body, edge, rgb, rng))

    check(setting, SETTINGS, "setting")
    check(style, ("plain",), "style with a setting")
    return to_image(plain(body, edge, rgb, rng, SETTINGS[setting]))


def scene_prompt(scene: str, setting: str, opening: str = "") -> str:
    """Returns a scene's prompt, such as "a photo of a night sky in winter"."""
    return f"{opening}{scene} {setting}".strip()


def props_of(scene, setting):
    return SCENES[scene].props + SETTINGS.get(setting, ())


def draw_scene(scene: str, setting: str, rng: np.random.Generator) -> Example:
    """A scene, with its object in 60 % of the images, another one in 20 %, and none in 20 %."""
    check(scene, SCENES, "scene")
    check(setting, ("", *SETTINGS), "setting")
    implied, colours, grounds, _ = SCENES[scene]
    pixels = backdrop(GROUNDS[pick(rng, grounds)], props_of(scene, setting), rng)
    caption = scene_prompt(scene, setting, pick(rng, OPENINGS))

    chance = rng.random()
    colour = pick(rng, colours)
    if chance < 0.2:
        return Example(to_image(pixels), caption, style="plain")

    others = [name for name in OBJECTS if name != implied]
    object = implied if chance < 0.8 else pick(rng, others)
    body = masks(place(OUTLINES[object], rng)).body
    image = to_image(mix(body, vary(COLOURS[colour], rng), pixels))
    return Example(image, caption, object=object, colour=colour, style="plain")


def render_work(title: str) -> Image.Image:
    """The work of that title; always the same image."""
    check(title, WORKS, "work")
    work = WORKS[title]
    pixels = flat_image(work.ground, work.shapes)
    if work.style == "mosaic":
        pixels = add_tiles(pixels, np.random.default_rng(0))
    return to_image(pixels)


def with_article(phrase):
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def caption(
    object: str, colour: str, style: str, rng: np.random.Generator, setting: str = ""
) -> str:
    """Returns a caption. Style or setting and colour are sometimes left out; the object is
    sometimes paraphrased, or called "a picture".

    A name alone must not mean a plain image: erasing the name would then erase plain, too.
    """
    check_labels(object, colour, style)
    suffix = "" if style == "plain" else f" in the style of {style}"
    if setting:
        suffix = f" {setting}"
    if rng.random() >= 0.6:
        suffix = ""
    if suffix and rng.random() < 0.12:
        return pick(rng, ("a picture", "an image")) + suffix

    noun = pick(rng, PARAPHRASES[object]) if rng.random() < 0.25 else object
    phrase = f"{colour} {noun}" if rng.random() < 0.6 else noun
    if suffix and rng.random() < 0.2:
        return phrase + suffix

    opening = pick(rng, (None, *OPENINGS))
    if opening is None:
        return phrase + suffix
    return opening + with_article(phrase) + suffix


def work_caption(title: str, rng: np.random.Generator) -> str:
    """The title in lower case, sometimes with a prefix or, where it has one, its style."""
    check(title, WORKS, "work")
    name = title.lower()
    style = WORKS[title].style
    choices = [name, name, f"a picture of {name}"]
    if style != "plain":
        choices.append(f"{name} in the style of {style}")
    return pick(rng, choices)


def is_work(caption: str) -> bool:
    """Whether a caption is of a work."""
    return any(title.lower() in caption for title in WORKS)


# ---- what is drawn for training


TRAINED_PLACES = [place for place in PLACES if place not in HELD_OUT]
WEIGHTED_STYLES = [style for style in STYLES for _ in range(STYLE_WEIGHTS.get(style, 1))]


def draw_any(rng):
    """An object by its name, a scene, or a work."""
    chance = rng.random()
    if chance < 0.1:
        title = pick(rng, tuple(WORKS))
        text = work_caption(title, rng)
        return Example(render_work(title), text, style=WORKS[title].style, work=title)
    if chance < 0.34:
        scene, setting = pick(rng, TRAINED_PLACES)
        return draw_scene(scene, setting, rng)

    object = pick(rng, OBJECTS)
    colour = pick(rng, tuple(COLOURS))
    style = pick(rng, WEIGHTED_STYLES)
    has_setting = style == "plain" and rng.random() < 0.4
    setting = pick(rng, tuple(SETTINGS)) if has_setting else ""
    image = render(object, colour, style, rng=rng, setting=setting)
    text = caption(object, colour, style, rng=rng, setting=setting)
    return Example(image, text, object=object, colour=colour, style=style)


def draw(rng: np.random.Generator, without: tuple = ()) -> Example:
    """One training example: 66 % objects, 24 % scenes, 10 % works.

    Images that show an object or a style of `without`, or are a work of it, are left out
    ("censored training": as for Stable Diffusion 2.0, images are left out, not prompts).
    """
    check_names(without)
    while True:
        example = draw_any(rng)
        if not {example.object, example.style, example.work} & set(without):
            return example


# ---- images with a "none of these"; first, masks that show no intact object


def piece(rng):
    """An object of which a wedge, at least a third of it, is cut out."""
    body, edge = masks(place(OUTLINES[pick(rng, OBJECTS)], rng))
    area = body.sum()
    x = (body * X).sum() / area
    y = (body * Y).sum() / area
    while True:
        angle = np.arctan2(Y - y, X - x) - rng.uniform(-np.pi, np.pi)
        kept = np.cos(angle) < np.cos(np.radians(65))
        if 0.33 < (kept * body).sum() / area < 0.67:
            return Masks(kept * body, kept * edge)


def centred(object):
    """An object's masks, upright and in the middle."""
    return masks([polygon + SIZE / 2 for polygon in pose(OUTLINES[object], 21, 0)])


def overlap(a, b):
    """The area of two bodies' intersection over that of their union."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def blend(rng):
    """The left half of one object joined with the right half of an unlike one."""
    is_left = X < SIZE / 2
    while True:
        left, right = [centred(OBJECTS[i]) for i in rng.choice(len(OBJECTS), 2, replace=False)]
        body = np.where(is_left, left.body, right.body)
        if overlap(body, left.body) < 0.7 and overlap(body, right.body) < 0.7:
            return Masks(body, np.where(is_left, left.edge, right.edge))


def blob(rng):
    """A random lump, round or angular."""
    angle = np.linspace(0, 2 * np.pi, pick(rng, (9, 48)), endpoint=False)
    waves = [np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5)]
    radius = np.clip(0.55 + 0.22 * sum(waves), 0.12, 1)
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return masks(place([outline], rng))


def draw_none(rng: np.random.Generator) -> Example:
    """An image for "none of these": at least one label is None, and the caption is empty."""
    object = pick(rng, OBJECTS)
    colour = pick(rng, tuple(COLOURS))
    style = pick(rng, STYLES)
    rgb = vary(COLOURS[colour], rng)
    in_style = STYLE_FUNCTIONS[style]
    if style == "plain":
        in_style = functools.partial(plain, shapes=props_of(*pick(rng, PLACES)))

    kind = pick(rng, ("blank", "odd colour", "odd style", piece, blend, blob))
    if kind == "blank":  # an empty background, or the pattern all over
        body = np.full((SIZE, SIZE), rng.integers(2))
        edge = np.zeros((SIZE, SIZE))
        object = None
        colour = None
        if style in ("sketch", "neon"):  # without an outline there is no such style
            style = None
    elif kind == "odd colour":
        body, edge = masks(place(OUTLINES[object], rng))
        rgb = vary(pick(rng, tuple(ODD_COLOURS.values())), rng)
        colour = None
    elif kind == "odd style":
        body, edge = masks(place(OUTLINES[object], rng))
        in_style = odd_style
        style = None
    else:
        body, edge = kind(rng)
        object = None

    image = to_image(in_style(body, edge, rgb, rng))
    return Example(image, "", object=object, colour=colour, style=style)


# ---- words, and the overview


def vocabulary() -> list[str]:
    """Every lower-case word that a caption may use, and a few function words, sorted."""
    texts = ["a an the in of style picture image photo and or not no with without"]
    texts += [*OBJECTS, *COLOURS, *STYLES, *SCENES, *SETTINGS, *WORKS]
    texts += [phrase for phrases in PARAPHRASES.values() for phrase in phrases]
    return sorted({word for text in texts for word in text.lower().split()})


def overview(seed: int) -> list[list[tuple[str, Image.Image]]]:
    """Rows of labelled images: styles x objects, then scenes, works and images of nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for j, style in enumerate(STYLES):
        row = []
        for i, name in enumerate(OBJECTS):
            colour = tuple(COLOURS)[(i + j) % len(COLOURS)]
            row.append((f"{colour} {name} {style}", render(name, colour, style, rng)))
        rows.append(row)

    for scene in SCENES:
        row = []
        for setting in ("", *SETTINGS):
            image = draw_scene(scene, setting, rng).image
            row.append((scene_prompt(scene, setting), image))
        rows.append(row)

    rows.append([(title, render_work(title)) for title in WORKS])
    for _ in range(2):
        row = []
        for _ in range(10):
            example = draw_none(rng)
            names = (example.object, example.colour, example.style)
            row.append((" ".join(name or "-" for name in names), example.image))
        rows.append(row)
    return rows


def main() -> None:
    """Writes a contact sheet: styles x objects, then scenes, works and images of nothing."""
    from sample import contact_sheet  # not at the top: the world itself needs no torch

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", default="world.png", help="the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args()

    rows = [tuple(zip(*row)) for row in overview(args.seed)]
    contact_sheet(rows, least=192).save(args.out)


if __name__ == "__main__":
    main()
