"""Draws an answer: every entity's mask over the image, the prompts, a legend and the text."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mimo_jax.data.prompts import Prompts

_COLOURS = (
    (230, 85, 70), (60, 160, 240), (90, 200, 90), (245, 190, 50), (190, 110, 230), (50, 205, 200), (245, 130, 190), (170, 200, 60),
)  # fmt: skip
_LONG_SIDE = 512  # images are enlarged until their longest side has at least this size
_TILE, _GAP = 256, 4  # longest side of a slice on a sheet, and the gap between two
_MIN_WIDTH = 320  # of the canvas, for the legend and the caption
_ALPHA = 0.35
_BACKGROUND, _TEXT, _FAINT_TEXT = (18, 18, 20), (235, 235, 235), (150, 150, 155)
_POINT_IN, _POINT_OUT, _MARK = (60, 230, 110), (255, 70, 70), (255, 235, 90)


def draw_overlay(
    image: np.ndarray, entities: Sequence[tuple[str, np.ndarray]], prompts: Prompts | None = None, caption: str = ""
) -> Image.Image:
    """The image, uint8 RGB [H, W, 3], with each entity (name, bool [H, W]) filled and outlined in its own colour.

    Small images are enlarged by an integer factor, so that every pixel is visible. Prompts: points as + (inside) and - (outside),
    boxes, scribbles. Below: a legend with every name (also of empty masks) and the wrapped `caption`.
    Raises ValueError for a mask of another size than the image.
    """
    height, width = image.shape[:2]
    for name, mask in entities:
        if mask.shape != (height, width):
            raise ValueError(f"mask of {name!r} is {list(mask.shape)}, the image {[height, width]} (rows, columns)")
    factor = max(1, -(-_LONG_SIDE // max(height, width)))
    colours = [colour(i) for i in range(len(entities))]
    drawing = Image.fromarray(_fill_masks(image, [mask for _, mask in entities], colours, factor))
    if prompts is not None:
        _draw_prompts(drawing, prompts, factor)
    return _with_text(drawing, [(name, paint, bool(mask.any())) for (name, mask), paint in zip(entities, colours, strict=True)], caption)


def draw_sheet(tiles: Sequence[tuple[str, np.ndarray, Sequence[np.ndarray]]], names: Sequence[str], caption: str = "") -> Image.Image:
    """A contact sheet of tiles (title, uint8 RGB [H, W, 3], bool [H, W] for each of `names`), all of one size, in rows from left to right,
    with names and caption below as in `draw_overlay`; a name with an empty mask in every tile is shown as not found."""
    colours = [colour(i) for i in range(len(names))]
    columns = max(1, int(np.ceil(np.sqrt(len(tiles)))))
    font = ImageFont.load_default(size=14.0)
    drawn = []
    for title, image, masks in tiles:
        tile = Image.fromarray(_fill_masks(image, masks, colours, max(1, -(-_TILE // max(image.shape[:2])))))
        tile.thumbnail((_TILE, _TILE))
        ImageDraw.Draw(tile).text((4, 2), title, fill=_TEXT, font=font, stroke_width=2, stroke_fill=(0, 0, 0))
        drawn.append(tile)
    width, height = drawn[0].size if drawn else (_MIN_WIDTH, 0)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, -(-len(drawn) // columns) * (height + _GAP)), _BACKGROUND)
    for n, tile in enumerate(drawn):
        sheet.paste(tile, (n % columns * (width + _GAP), n // columns * (height + _GAP)))
    present = [any(masks[i].any() for _, _, masks in tiles) for i in range(len(names))]
    return _with_text(sheet, list(zip(names, colours, present, strict=True)), caption)


def _fill_masks(image: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[tuple[int, int, int]], factor: int) -> np.ndarray:
    """uint8 RGB, enlarged by an integer factor, with each mask filled and outlined in its colour."""
    picture = np.repeat(np.repeat(image, factor, 0), factor, 1)
    masks = [np.repeat(np.repeat(np.asarray(mask, bool), factor, 0), factor, 1) for mask in masks]
    for mask, paint in zip(masks, colours, strict=True):
        picture[mask] = np.rint((1 - _ALPHA) * picture[mask] + _ALPHA * np.array(paint))
    thick = max(1, round(max(picture.shape[:2]) / 500))
    for mask, paint in zip(masks, colours, strict=True):  # after all fills, so that no outline is covered
        picture[mask & ~ndimage.binary_erosion(mask, iterations=thick)] = paint
    return picture


def colour(index: int) -> tuple[int, int, int]:
    """RGB of the index-th entity: from a fixed table, then hues spread by the golden ratio."""
    if index < len(_COLOURS):
        return _COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.65, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_prompts(picture: Image.Image, prompts: Prompts, factor: int) -> None:
    draw = ImageDraw.Draw(picture)
    radius = max(4, round(max(picture.size) / 90))
    line = max(2, radius // 3)

    def to_canvas(xy: np.ndarray) -> np.ndarray:  # pixel centres of the image -> Pillow's coordinates on the enlarged image
        return (np.asarray(xy, float) + 0.5) * factor - 0.5

    for x0, y0, x1, y1 in prompts.boxes:
        (left, top), (right, bottom) = to_canvas([(x0 - 0.5, y0 - 0.5), (x1 - 0.5, y1 - 0.5)])
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=_MARK, width=line)
    for scribble in prompts.scribbles:
        path = [tuple(xy) for xy in to_canvas(scribble)]
        draw.line(path, fill=_MARK, width=line, joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse((x - line, y - line, x + line, y + line), fill=_MARK)
    for x, y, label in prompts.points:
        x, y = to_canvas((x, y))
        fill = _POINT_IN if label else _POINT_OUT
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=(0, 0, 0), width=max(1, line // 2))
        draw.line((x - radius / 2, y, x + radius / 2, y), fill=(0, 0, 0), width=line // 2 + 1)
        if label:
            draw.line((x, y - radius / 2, x, y + radius / 2), fill=(0, 0, 0), width=line // 2 + 1)


def _with_text(picture: Image.Image, legend: list[tuple[str, tuple[int, int, int], bool]], caption: str) -> Image.Image:
    """The image with legend and caption below, on a canvas wide enough to read them."""
    if not legend and not caption:
        return picture
    width = max(picture.width, _MIN_WIDTH)
    font = ImageFont.load_default(size=float(max(14, round(width / 42))))
    row = round(font.size * 1.45)
    pad = row // 2
    rows = _legend_rows(legend, font, width - 2 * pad, row)
    lines = _wrap(caption, font, width - 2 * pad)
    below = pad + row * len(rows) + (pad // 2 if rows and lines else 0) + row * len(lines) + pad
    canvas = Image.new("RGB", (width, picture.height + below), _BACKGROUND)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    y = picture.height + pad
    for items in rows:
        for x, text, paint, present in items:
            swatch = (pad + x, y + row // 5, pad + x + row // 2, y + row // 5 + row // 2)
            draw.rectangle(swatch, fill=paint if present else None, outline=paint)
            draw.text((pad + x + row * 3 // 4, y), text, fill=_TEXT if present else _FAINT_TEXT, font=font)
        y += row
    y += pad // 2 if rows and lines else 0
    for text in lines:
        draw.text((pad, y), text, fill=_TEXT, font=font)
        y += row
    return canvas


def _legend_rows(legend, font: ImageFont.FreeTypeFont, width: int, row: int) -> list[list[tuple]]:
    """Rows of (x, text, colour, present); a new row begins if the next name does not fit."""
    rows: list[list[tuple]] = []
    x = width
    for name, paint, present in legend:
        text = _wrap(name if present else f"{name} (nothing found)", font, width - row)[:1] or [""]
        needed = row * 3 // 4 + int(font.getlength(text[0])) + row
        if x + needed - row > width or not rows:
            rows.append([])
            x = 0
        rows[-1].append((x, text[0], paint, present))
        x += needed
    return rows


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, within a word only if the word alone is wider."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                fits = max(1, next(i for i in range(len(word), -1, -1) if font.getlength(word[:i]) <= width))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        if line:
            lines.append(line)
    return lines
