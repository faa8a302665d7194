"""Preview images (Open Graph) of pages, drawn with Pillow and the font that it contains.

The theme's own plugin downloads fonts. The bytes of an image depend only on its text and on Pillow.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw, ImageFont

SIZE = (1200, 630)
MARGIN = 80
BACKGROUND, ACCENT, TITLE, TEXT = "#0f172a", "#60a5fa", "#ffffff", "#cbd5e1"
TITLE_LINES, TEXT_LINES = 3, 4
PRODUCT = "KubeAI"


def uri(page: str) -> str:
    """Where the image of a page is on the site."""
    return str(PurePosixPath("assets/previews") / PurePosixPath(page).with_suffix(".png"))


def draw(path: Path, *, section: str, title: str, description: str) -> None:
    """Write the image of a page."""
    image = Image.new("RGB", SIZE, BACKGROUND)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, 16, SIZE[1]), fill=ACCENT)
    small, large = _font(34), _font(76)
    label = f"{PRODUCT}  ·  {section}" if section else PRODUCT
    canvas.text((MARGIN, 72), label, font=small, fill=ACCENT)
    y = 150
    for line in wrapped(title, large, TITLE_LINES):
        canvas.text((MARGIN, y), line, font=large, fill=TITLE, stroke_width=1, stroke_fill=TITLE)
        y += 92
    y += 28
    for line in wrapped(description, small, TEXT_LINES):
        canvas.text((MARGIN, y), line, font=small, fill=TEXT)
        y += 48
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)  # `optimize` would take four times as long, for 4 % fewer bytes


def wrapped(text: str, font: ImageFont.FreeTypeFont, lines_max: int) -> list[str]:
    """The text in lines that fit; what is left over is cut off with an ellipsis."""
    width = SIZE[0] - 2 * MARGIN
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > lines_max:
        lines = [*lines[: lines_max - 1], f"{lines[lines_max - 1]} …"]
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
