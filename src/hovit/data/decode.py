"""Decoding of image files to 8-bit RGB. Every reader of the project uses this decoder.

Rules, by what the file holds:

- 8-bit grey, RGB, CMYK, YCbCr, HSV and palettes: as Pillow converts them.
- 16-bit grey: scaled from 0..65535 to 0..255. (16-bit colour is reduced to 8 bits by Pillow.)
- transparency: composited on white, so that hidden colours do not show.
- EXIF orientation: applied if the caller asks for it. `image_folder` does. Data sets that
  torchvision reads, ImageNet and COCO keep their published orientation, as torchvision and timm do.
- several frames: the first frame.
- everything else (32-bit integers, floats, LAB): refused, because the range of values is unknown.

Imports no torch.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# The formats of torchvision's ImageFolder and GIF. Naming them keeps Pillow from starting other
# programs (Ghostscript for EPS) on a file with a wrong suffix.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm",
     ".pnm", ".tif", ".tiff", ".webp"}
)  # fmt: skip
OTHER_SUFFIXES = frozenset(
    {".apng", ".arw", ".avif", ".avifs", ".cr2", ".cr3", ".cur", ".dcx", ".dds", ".dng", ".exr",
     ".hdr", ".heic", ".heif", ".icns", ".ico", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx",
     ".jxl", ".jxr", ".mpo", ".nef", ".orf", ".pcx", ".pfm", ".psd", ".qoi", ".raw", ".rw2",
     ".sgi", ".svg", ".tga", ".xbm", ".xpm"}
)  # fmt: skip
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
OPAQUE = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # EXIF and TIFF tags


def looks_like_image(suffix: str, start: bytes) -> bool:
    """Whether a file that is not read could be an image.

    Args:
        suffix: of its name, in lower case.
        start: the first 16 bytes of the file.
    """
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return suffix in OTHER_SUFFIXES or webp or start.startswith(SIGNATURES)


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Open an image file of one of `FORMATS`, reading only its header."""
    return Image.open(source, formats=FORMATS)


def to_rgb(image: Image.Image, orient: bool = False) -> Image.Image:
    """Convert an image to 8-bit RGB.

    Args:
        image: an open image.
        orient: apply the EXIF orientation.

    Raises:
        ValueError: for pixels whose range of values is unknown.
        Exception: whatever Pillow raises for a damaged file.
    """
    image.load()
    if orient:
        image = _oriented(image)
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        image = _scale_16_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode not in OPAQUE:
        raise ValueError(f"pixels of mode {image.mode} have no known range; save 8 or 16 bits")
    return image.convert("RGB")


def _oriented(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing of the orientation
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _scale_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits -> L, or LA where one grey level is transparent.

    Pillow opens a PGM of more than 8 bits as mode I, scaled to 16 bits.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))
    if (image.mode == "I" and image.format != "PPM") or tuple(bits) != (16,):
        raise ValueError(f"grey of mode {image.mode} has no known range; save 8 or 16 bits")
    values = np.asarray(image).astype(np.uint32)  # [H, W]
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white
        values = 65535 - values
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and max(image.info["transparency"]) > 255:
        raise ValueError("a transparent colour of 16 bits cannot be matched in 8 bits")
    if image.mode == "La":  # premultiplied; Pillow converts it in two steps
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
