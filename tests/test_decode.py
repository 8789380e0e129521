"""Decoding: every mode of Pillow is right to one grey level, or refused by name."""

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from hovit.config.runs import Pack
from hovit.config.schema import Dataset
from hovit.data.decode import OTHER_SUFFIXES, SUFFIXES, open_image, to_rgb
from hovit.data.listing import list_images
from hovit.data.pack import decode_image, open_pack, prepare
from hovit.data.readers import Item, _numbered
from hovit.utils.errors import HovitError

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # [64, 64], 64 levels
NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def saved(image: Image.Image, form: str, **options: object) -> Image.Image:
    """The image after a trip through a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return open_image(file)


def decoded(image: Image.Image, orient: bool = False) -> np.ndarray:
    rgb = to_rgb(image, orient)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int)


# Depth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_give_the_pixels_of_8(form: str) -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    eight = decoded(saved(Image.fromarray(RAMP), form))
    assert np.array_equal(decoded(saved(deep, form)), eight)
    assert np.array_equal(eight, np.repeat(RAMP[..., None], 3, axis=2))


def test_16_bit_grey_is_scaled_and_big_endian_and_inverted_too() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (9, 7)).astype(np.uint16)
    expected = values / 257
    for dtype in ("<u2", ">u2"):
        image = saved(Image.fromarray(values.astype(dtype)), "TIFF")
        assert np.abs(decoded(image)[..., 0] - expected).max() <= 0.5
    inverted = saved(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.abs(decoded(inverted)[..., 0] - (255 - expected)).max() <= 0.5


def test_a_pgm_of_12_bits_is_scaled_by_its_maximum() -> None:
    values = np.arange(0, 4096, 65, dtype=">u2")[None]
    file = io.BytesIO(b"P5 %d 1 4095\n" % values.size + values.tobytes())
    assert np.abs(decoded(open_image(file))[..., 0] - values / 4095 * 255).max() <= 1


@pytest.mark.parametrize("dtype", ["f4", "i4"])
def test_pixels_without_a_known_range_are_refused(dtype: str) -> None:
    image = saved(Image.fromarray(RAMP.astype(dtype)), "TIFF")
    with pytest.raises(ValueError, match=rf"mode {image.mode} ha(s|ve) no known range"):
        to_rgb(image)


def test_12_bits_in_a_tiff_are_refused() -> None:
    image = saved(Image.fromarray(RAMP.astype(np.uint16)), "TIFF")
    image.tag_v2[258] = (12,)
    with pytest.raises(ValueError, match="no known range"):
        to_rgb(image)


# Transparency ------------------------------------------------------------------------------------


def test_hidden_colours_do_not_show() -> None:
    """Left half transparent: white; right half as it is."""
    colours = np.full((4, 8, 3), (200, 30, 90), np.uint8)
    alpha = np.repeat(np.array([[0] * 4 + [255] * 4], np.uint8), 4, axis=0)
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    grey = Image.merge("LA", [Image.fromarray(colours[..., 0]), Image.fromarray(alpha)])
    palette = rgba.quantize(8)
    index = Image.fromarray((alpha // 255).astype(np.uint8))  # 0 transparent, 1 not
    index.putpalette([9, 9, 9, 200, 30, 90])
    deep = Image.fromarray(np.where(alpha, 200 * 257, 5).astype(np.uint16))
    images = {
        "RGBA": saved(rgba, "PNG"), "WebP": saved(rgba, "WEBP", lossless=True),
        "TIFF": saved(rgba, "TIFF"), "LA": saved(grey, "PNG"), "quantised": saved(palette, "PNG"),
        "P": saved(index, "PNG", transparency=0), "GIF": saved(index, "GIF", transparency=0),
        "I;16": saved(deep, "PNG", transparency=5),
        "RGB": saved(Image.fromarray(np.where(alpha[..., None], colours, 7).astype(np.uint8)),
                     "PNG", transparency=(7, 7, 7)),
        "L": saved(Image.fromarray(np.where(alpha, 200, 7).astype(np.uint8)), "PNG",
                   transparency=7),
        "RGBa": rgba.convert("RGBa"), "La": grey.convert("La"), "PA": rgba.convert("PA"),
    }  # fmt: skip
    for name, image in images.items():
        pixels = decoded(image)
        assert (pixels[:, :4] == 255).all(), name
        right = (200, 200, 200) if name in ("LA", "L", "La", "I;16") else (200, 30, 90)
        assert np.abs(pixels[:, 4:] - right).max() <= 1, name


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=30))
def test_half_transparent_pixels_mix_with_white(pixels: list[tuple[int, ...]]) -> None:
    rgba = np.array([pixels], np.uint8)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    assert np.abs(decoded(Image.fromarray(rgba)) - expected).max() <= 1
    grey = Image.fromarray(np.ascontiguousarray(rgba[..., [0, 3]]), "LA")
    assert np.abs(decoded(grey)[..., :1] - expected[..., :1]).max() <= 1


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    image = Image.fromarray(NOISE)
    image.info["transparency"] = (300, 1, 2)
    with pytest.raises(ValueError, match="16 bits"):
        to_rgb(image)


# Modes -------------------------------------------------------------------------------------------

REFUSED = {"F", "I", "LAB"}


@pytest.mark.parametrize("mode", [*Image.MODES, "La", "PA", "I;16", "I;16L", "I;16B", "I;16N"])
def test_every_mode_is_decoded_or_refused_by_name(mode: str) -> None:
    try:
        image = Image.new(mode, (3, 2))
    except ValueError:
        pytest.skip(f"this Pillow has no mode {mode}")
    if mode in REFUSED:
        with pytest.raises(ValueError, match=f"mode {mode} ha"):
            to_rgb(image)
    else:
        assert decoded(image).shape == (2, 3, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_are_as_pillow_converts_them(mode: str) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    assert np.array_equal(decoded(image), np.asarray(image.convert("RGB")))


# Orientation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_where_it_is_asked_for(orientation: int) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    for form in ("PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        image = saved(Image.fromarray(NOISE), form, exif=exif, **options)
        expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(decoded(image), NOISE)
        assert np.array_equal(decoded(image, orient=True), expected)
    changed = not np.array_equal(expected, NOISE)
    assert changed == (orientation in range(2, 9))


def test_photographs_are_turned_and_published_sets_are_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    for c in range(2):
        (tmp_path / f"tree/{c}").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(RAMP).save(tmp_path / f"tree/{c}/{i}.jpg", exif=exif, quality=100)
    pixels = open_pack(*packed(tmp_path, "tree")).images[0].astype(int)
    assert np.abs(pixels[..., 0] - RAMP.T).max() <= 2
    item = _numbered(tmp_path / "tree/0/0.jpg", 0, ["a"], "train")
    assert not item.orient


# Listing -----------------------------------------------------------------------------------------


def packed(root: Path, name: str, classes: int = 2) -> tuple[Pack, Path]:
    dataset = Dataset(
        id="some", title="t", about="a", reader="image_folder", num_classes=classes, files=(name,),
        split={"train": 0.5, "val": 0.25},
    )  # fmt: skip
    pack, folder = Pack(dataset, 64), root / "pack"
    prepare(pack, root, folder)
    return pack, folder


def members(path: Path) -> list[str]:
    return [member for member, _ in list_images(path)]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(NOISE).save(path, "PNG")


def test_whatever_torchvision_reads_is_read(tmp_path: Path) -> None:
    """Through symbolic links too."""
    for suffix in (*IMG_EXTENSIONS, *(s.upper() for s in IMG_EXTENSIONS)):
        touch(tmp_path / f"elsewhere/{suffix.strip('.')}/1{suffix}")
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in (tmp_path / "elsewhere").iterdir():
        (tree / folder.name).symlink_to(folder)
    (tree / "real").mkdir()
    (tree / "real/link.png").symlink_to(tmp_path / "elsewhere/png/1.png")
    theirs = {Path(path).relative_to(tree).as_posix() for path, _ in ImageFolder(tree).samples}
    assert set(members(tree)) == theirs
    assert len(theirs) == 2 * len(IMG_EXTENSIONS) + 1
    assert set(IMG_EXTENSIONS) <= SUFFIXES
    assert not SUFFIXES & OTHER_SUFFIXES
    packed(tmp_path, "tree", classes=len(theirs))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["1.heic", "1.AVIF", "1.svg", "1.tga", "1", "1.backup"])
def test_an_image_that_is_not_read_is_named(tmp_path: Path, name: str, zipped: bool) -> None:
    touch(tmp_path / "tree/cat/0.png")
    touch(tmp_path / "tree/cat" / name)
    (tmp_path / "tree/cat/notes.txt").write_text("no image")
    with pytest.raises(HovitError, match=f"cat/{name}: looks like an image") as caught:
        members(zip_of(tmp_path / "tree") if zipped else tmp_path / "tree")
    assert "\n" not in str(caught.value)


def zip_of(folder: Path, separator: str = "/") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = file.relative_to(folder).as_posix().replace("/", separator)
                archive.writestr(name, file.read_bytes())
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_the_system_are_skipped(tmp_path: Path, zipped: bool) -> None:
    junk = ("__MACOSX/cat/._0.png", "cat/._0.jpg", "cat/.ipynb_checkpoints/0-checkpoint.png",
            ".hidden/0.png", ".DS_Store", "cat/.0.heic")  # fmt: skip
    for name in junk:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"\xff\xd8\xffjunk")
    touch(tmp_path / "tree/cat/0.png")
    assert members(zip_of(tmp_path / "tree") if zipped else tmp_path / "tree") == ["cat/0.png"]


def test_backslashes_in_a_zip_are_folders(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        touch(tmp_path / "tree" / name)
    path = zip_of(tmp_path / "tree", "\\")
    assert members(path) == members(tmp_path / "tree")
    assert len(open_pack(*packed(tmp_path, "tree.zip")).labels) == 4


def test_links_that_lead_nowhere_or_upwards(tmp_path: Path) -> None:
    touch(tmp_path / "tree/cat/0.png")
    (tmp_path / "tree/cat/up").symlink_to(tmp_path / "tree")
    assert members(tmp_path / "tree") == ["cat/0.png"]
    for name in ("dog", "cat/1.png"):
        link = tmp_path / "tree" / name
        link.symlink_to(tmp_path / "gone")
        with pytest.raises(HovitError, match=f"{name}: not a file"):
            members(tmp_path / "tree")
        link.unlink()
    os.mkfifo(tmp_path / "tree/cat/2.png")
    with pytest.raises(HovitError, match=r"cat/2\.png: not a file"):
        members(tmp_path / "tree")


def test_a_link_in_a_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("cat")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../elsewhere")
    with pytest.raises(HovitError, match="cat: a symbolic link"):
        members(tmp_path / "a.zip")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "tree/cat/0.png")
    (tmp_path / "tree/cat").chmod(0)
    with pytest.raises(HovitError, match="cat: cannot be read: Permission denied"):
        members(tmp_path / "tree")


NAMES = [
    "a b",
    "a\nb",
    "a\r",
    "a,b",
    'a"b',
    "a'b",
    "ä",
    "NA",
    "null",
    "a\\b",
    "-",
    "\x01",
    "𝄞",
    "%s",
]


def test_file_names_that_the_system_allows_work(tmp_path: Path) -> None:
    for name in NAMES:
        touch(tmp_path / "tree" / name / f"{name}.png")
        touch(tmp_path / "tree" / name / f"{name}{name}.png")
    pack = open_pack(*packed(tmp_path, "tree", classes=len(NAMES)))
    assert sorted(pack.labels) == sorted([*range(len(NAMES))] * 2)


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "tree/cat/0.png")
    (tmp_path / "tree/dog").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "new.png")
    os.rename(bytes(tmp_path / "new.png"), bytes(tmp_path / "tree/dog") + b"/\xff.png")
    with pytest.raises(HovitError, match=r"udcff.png': the name is not UTF-8") as caught:
        packed(tmp_path, "tree")
    assert str(caught.value).isprintable()


# Damage ------------------------------------------------------------------------------------------

FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
CASES = 60  # of each kind


def one_line_or(call: Callable[[], Any], path: Path) -> Any:
    """What the call gives; None after a HovitError of one line that names the path."""
    try:
        return call()
    except HovitError as error:
        said = str(error)
    assert "\n" not in said
    assert str(path) in said
    return None


def fuzzed(content: bytes, data: st.DataObject) -> bytes:
    """The bytes with a few of them changed, and sometimes cut."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.sampled_from([len(changed)] * 3 + [len(changed) // 2]))])


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_image_is_one_error_or_an_rgb_image(form: str, tmp_path: Path) -> None:
    """Never a crash, another mode or another size; `HOVIT_FUZZ=1000` for more cases."""
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    modes = {"GIF": ("P",), "JPEG": ("L", "RGB", "CMYK"), "BMP": ("1", "RGB"), "PPM": ("L", "RGB")}
    contents = []
    for mode in modes.get(form, ("L", "LA", "RGB", "RGBA")):
        file = io.BytesIO()
        options = {} if form in ("GIF", "BMP", "PPM", "JPEG2000") else {"exif": exif}
        Image.fromarray(NOISE).convert(mode).save(file, form, **options)
        contents.append(file.getvalue())

    @fuzz(CASES)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        content = fuzzed(data.draw(st.sampled_from(contents)), data)
        path = tmp_path / "image"
        path.write_bytes(content)
        orient = data.draw(st.booleans())
        try:
            with open_image(path) as image:
                rgb = to_rgb(image, orient)
        except (AssertionError, AttributeError, NameError):
            raise
        except Exception:  # `decode_image` makes one line of it
            return
        assert (rgb.mode, np.asarray(rgb).dtype, np.asarray(rgb).ndim) == ("RGB", np.uint8, 3)

    run()


NAME = st.text("ab.\\/_ \n\0é:~" + "".join(SUFFIXES), min_size=1, max_size=12) | st.sampled_from(
    [
        "__MACOSX/a/1.png",
        ".a/1.png",
        "a\\1.png",
        "a/1.heic",
        "../a/1.png",
        "/a/1.png",
        "a/",
        "a/1.png",
    ]
)


def test_a_zip_of_any_names_and_damage_is_read_or_one_line(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    png, path = file.getvalue(), tmp_path / "a.zip"

    @fuzz(CASES)
    @given(names=st.lists(NAME, min_size=1, max_size=5, unique=True), data=st.data())
    def run(names: list[str], data: st.DataObject) -> None:
        with zipfile.ZipFile(path, "w", data.draw(st.sampled_from([0, 8]))) as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), png)
        path.write_bytes(fuzzed(path.read_bytes(), data))
        found = one_line_or(lambda: list(list_images(path)), path)
        for member, load in found or []:
            parts = member.split("/")
            assert ".." not in parts
            assert "\\" not in member
            assert not any(part.startswith(".") and part != "." for part in parts)
            item = Item(f"{path}/{member}", "a", load)
            pixels = one_line_or(lambda item=item: decode_image(item, 8), path)
            assert pixels is None or (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)

    run()


def test_a_folder_of_any_names_is_read_or_one_line(tmp_path: Path) -> None:
    """What is not listed is hidden or does not look like an image."""
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    contents = [file.getvalue(), b"", b"text"]
    name = st.binary(min_size=1, max_size=8) | st.text("ab. \n\\é", min_size=1, max_size=6).map(
        str.encode
    )

    @fuzz(CASES)
    @given(
        files=st.dictionaries(
            st.tuples(name, st.sampled_from([b"", b".png", b".jpg", b".txt", b".heic"])),
            st.sampled_from(contents), min_size=1, max_size=5,
        )
    )  # fmt: skip
    def run(files: dict[tuple[bytes, bytes], bytes]) -> None:
        root = tmp_path / "tree"
        shutil.rmtree(root, ignore_errors=True)
        (root / "a").mkdir(parents=True)
        expected, refused = set(), False
        for (stem, suffix), content in files.items():
            full = stem + suffix
            if b"/" in full or b"\0" in full or full in (b".", b".."):
                continue
            with open(os.path.join(os.fsencode(root), b"a", full), "wb") as out:
                out.write(content)
            text = os.fsdecode(full)
            if text.startswith("."):
                continue
            read = Path(text).suffix.lower() in SUFFIXES
            expected |= {f"a/{text}"} if read else set()
            other = Path(text).suffix.lower() in OTHER_SUFFIXES or content == contents[0]
            refused |= not read and other
        if refused:
            with pytest.raises(HovitError, match="looks like an image") as caught:
                members(root)
            assert "\n" not in str(caught.value)
            str(caught.value).encode()
        else:
            assert set(members(root)) == expected

    run()
