"""Images that move in a notebook: a GIF, which plays by itself, and a slider.

Both show images that were drawn beforehand. They come below a figure that doesn't move and
shows the same, since a slider needs a running notebook.
"""

import io
from typing import Sequence

import ipywidgets
from IPython.display import Image as Shown
from PIL import Image

GIF_LIMIT = 250_000  # bytes: it is stored in the notebook


def gif(frames: Sequence[Image.Image], milliseconds: int = 250) -> Shown:
    """Returns a GIF of PIL images that have one size. The last frame stays for two seconds.

    ValueError if it would be larger than GIF_LIMIT.
    """
    durations = [milliseconds] * (len(frames) - 1) + [2000]

    # one palette for all frames, so that what stays the same doesn't flicker
    width, height = frames[0].size
    strip = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, i * height))
    strip = strip.quantize(128, dither=Image.Dither.NONE)
    small = []
    for i in range(len(frames)):
        small.append(strip.crop((0, i * height, width, (i + 1) * height)))

    data = io.BytesIO()
    small[0].save(data, "gif", save_all=True, append_images=small[1:], duration=durations, loop=0)
    if data.tell() > GIF_LIMIT:
        raise ValueError(
            f"a GIF of {data.tell():,} bytes; at most {GIF_LIMIT:,}: use fewer or smaller frames"
        )
    # GitHub and nbconvert show "png"; browsers look at the bytes and play it
    return Shown(data.getvalue(), format="png")


def slider(name: str, images: dict) -> ipywidgets.Widget:
    """Returns a slider over the keys of {value: PIL image}, with the image below it."""
    values = list(images)
    choose = ipywidgets.SelectionSlider(
        options=[(str(value), value) for value in values], description=name
    )
    shown = ipywidgets.Image(format="png")

    def show(change):
        data = io.BytesIO()
        images[choose.value].save(data, "png")
        shown.value = data.getvalue()

    choose.observe(show, names="value")
    show(None)
    return ipywidgets.VBox([choose, shown])
