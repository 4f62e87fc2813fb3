import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_rgpt4d.image_processing_rgpt4d import RGPT4DImageProcessor
from modeling_rgpt4d.region_marks import draw_marks

SIZE = {"height": 56, "width": 56}


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))


@pytest.fixture
def processor() -> RGPT4DImageProcessor:
    return RGPT4DImageProcessor(size=SIZE)


def expected(picture: Image.Image) -> np.ndarray:
    resized = picture.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    ("case", "names"),
    [("image_resize", ["image_wide_120x80.png"]), ("multi_image", ["image_wide_120x80.png", "image_square_64x64.png"])],
)
def test_pixels_equal_nvila(shared_dir, case, names):
    reference = load_file(shared_dir / "parity/nvila/refs/vision_70.safetensors")[f"{case}/pixel_values"]
    inputs = shared_dir / "parity/nvila/refs/inputs"
    outputs = RGPT4DImageProcessor(size={"height": 70, "width": 70})(
        [str(inputs / n) for n in names], return_tensors="pt"
    )
    torch.testing.assert_close(outputs["pixel_values"], reference.float(), rtol=0, atol=5e-4)  # kept in float16


def test_every_way_to_give_a_picture_is_the_same(processor, picture, tmp_path):
    path = tmp_path / "photo.png"
    picture.save(path)
    content = path.read_bytes()
    array = np.asarray(picture)
    for source in (picture, path, str(path), content, {"path": str(path), "bytes": None}, {"path": None, "bytes": content},
                   array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1)):  # fmt: skip
        pixels = processor(source)["pixel_values"]
        assert len(pixels) == 1
        np.testing.assert_allclose(pixels[0], expected(picture), rtol=0, atol=1e-6)


def test_camera_orientation_is_applied(processor, picture):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    picture.save(buffer, "PNG", exif=exif)
    pixels = processor(buffer.getvalue())["pixel_values"][0]
    np.testing.assert_allclose(pixels, expected(picture.transpose(Image.Transpose.ROTATE_270)), rtol=0, atol=1e-6)


def test_regions_are_drawn_on_their_picture(processor, picture):
    regions = [{"name": "obj_1", "box": [10, 20, 60, 70]}]
    pixels = processor([picture, picture], regions=[None, regions])["pixel_values"]
    np.testing.assert_allclose(pixels[0], expected(picture), rtol=0, atol=1e-6)
    np.testing.assert_allclose(pixels[1], expected(draw_marks(picture, regions)), rtol=0, atol=1e-6)
    from_array = processor(np.asarray(picture), regions=[regions])["pixel_values"]
    assert np.array_equal(from_array[0], pixels[1])


def test_bad_input_is_refused_by_name(processor, picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png: not a readable picture"):
        processor(str(tmp_path / "text.png"))
    with pytest.raises(ValueError, match="gone.jpg: no such file"):
        processor(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="'path' or 'bytes'"):
        processor({"name": 1})
    with pytest.raises(ValueError, match="picture 1: region obj_1.*120 x 80"):
        processor([picture, picture], regions=[None, [{"name": "obj_1", "box": [0, 0, 200, 10]}]])
    with pytest.raises(ValueError, match="1 entries for 2 pictures"):
        processor([picture, picture], regions=[None])
    with pytest.raises(ValueError, match="uint8"):
        processor(np.zeros((20, 20, 3), np.float32), regions=[[{"name": "obj_1", "point": [1, 1]}]])


def test_save_and_load_keeps_everything(processor, picture, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = RGPT4DImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert np.array_equal(loaded(picture)["pixel_values"], processor(picture)["pixel_values"])
