"""Before, after and difference side by side."""

from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFont, ImageOps

from .pictures import Picture, to_image

GAP = 8
CAPTION = 22
GREY = 128


def comparison(before: Picture, after: Picture, noise: float) -> Image.Image:
    """`noise` is the standard deviation that was removed, in levels of 0 to 255: three of them fill the
    range of the difference, which is drawn around mid-grey and shows structure where detail was lost.
    """
    gain = max(1, min(16, round(GREY / (3 * noise)))) if noise > 0 else 1
    left, middle = _panel(before), _panel(after)
    right = ImageChops.subtract(left, middle, scale=1 / gain, offset=GREY)
    width, height = left.size
    canvas = Image.new("RGB", (3 * width + 2 * GAP, height + CAPTION), "white")
    draw = ImageDraw.Draw(canvas)
    captions = ("before", "after", f"difference x{gain}")
    for place, (panel, caption) in enumerate(zip((left, middle, right), captions, strict=True)):
        x = place * (width + GAP)
        canvas.paste(panel, (x, CAPTION))
        draw.text((x + 4, 5), caption, fill="black", font=ImageFont.load_default())
    return canvas


def _panel(picture: Picture) -> Image.Image:
    """8-bit RGB without alpha, the way up that viewers show it."""
    levels = picture.colours
    if picture.white != 255:
        levels = (levels * (255 / picture.white)).round().astype("u1")
    mode = "L" if levels.shape[-1] == 1 else picture.mode.removesuffix("A")
    image = to_image(Picture(mode, levels)).convert("RGB")
    image.getexif()[ExifTags.Base.Orientation] = picture.orientation
    return ImageOps.exif_transpose(image)
