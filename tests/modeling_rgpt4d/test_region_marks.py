import numpy as np
import pytest
import torch
from PIL import Image

from modeling_rgpt4d import region_marks
from modeling_rgpt4d.region_marks import colour_of, draw_marks, names_in_text, region_name, rewrite_names

SIZES = [(56, 56), (112, 112), (224, 224), (640, 360), (1080, 1920), (3840, 2160)]


def canvas(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def pixels_of(image: Image.Image, name: str) -> np.ndarray:
    return (np.asarray(image) == colour_of(name)).all(-1)


def place(regions: list[dict], width: int, height: int):
    checked = region_marks.check_regions(regions, (width, height))
    placed = region_marks._place_labels(checked, width, height, 1, "the picture")
    return [box for _, box, _ in placed], [font for _, _, font in placed]


@pytest.mark.parametrize("name", ["obj_1", "<obj_1>", "R1", "<R1>", "R_1", "<R_1>", "obj_01"])
def test_names_of_paper_and_benchmark_are_one(name):
    assert region_name(name) == "obj_1"


@pytest.mark.parametrize("name", ["car", "obj", "obj_", "object_1", "", None, 1, "obj_1 ", "R-1"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="obj_1"):
        region_name(name)


def test_names_in_text():
    text = "Is <R2> left of <obj_10>, and <R_2> before <obj_1>? <R> R1 <region> <obj_x>"
    assert names_in_text(text) == ["obj_2", "obj_10", "obj_1"]
    assert rewrite_names(text) == "Is <obj_2> left of <obj_10>, and <obj_2> before <obj_1>? <R> R1 <region> <obj_x>"


def test_colours_differ():
    colours = np.array([colour_of(f"obj_{i}") for i in range(1, region_marks.NUM_COLOURS + 1)], dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + np.eye(len(colours)) * 1e3
    assert distances[:10, :10].min() > 90 and distances.min() > 30


def test_box_is_outlined_exactly():
    image = draw_marks(canvas(224, 224), [{"name": "obj_1", "box": [20, 30, 120, 130]}])
    marked = pixels_of(image, "obj_1")
    outline = np.zeros((224, 224), bool)
    outline[30:130, 20:120] = True
    outline[31:129, 21:119] = False
    assert marked[outline].all()
    inside = np.asarray(image)[31:129, 21:119]
    assert (inside == 90).all()  # a box is not filled, and its label has room above it
    assert marked[:30].any() and not marked[130:].any()


def test_mask_is_filled_lightly_and_outlined():
    mask = np.zeros((224, 224), bool)
    mask[60:160, 50:150] = True
    pixels = np.asarray(draw_marks(canvas(224, 224), [{"name": "obj_3", "mask": mask}]))
    expected = np.round(90 * 0.75 + np.array(colour_of("obj_3")) * 0.25)
    assert np.array_equal(pixels[100, 100], expected)
    assert (pixels[60, 50:150] == colour_of("obj_3")).all() and (pixels[60:160, 50] == colour_of("obj_3")).all()
    assert (pixels[161:, 160:] == 90).all()


@pytest.mark.parametrize("kind", [torch.from_numpy, np.ndarray.tolist, np.asarray])
def test_masks_of_every_kind_are_the_same(kind):
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:60] = True
    drawn = draw_marks(canvas(80, 60), [{"name": "obj_1", "mask": kind(mask)}])
    assert drawn.tobytes() == draw_marks(canvas(80, 60), [{"name": "obj_1", "mask": mask}]).tobytes()


def test_point_is_a_dot_at_its_place():
    marked = pixels_of(draw_marks(canvas(224, 224), [{"name": "obj_4", "point": [100, 50]}]), "obj_4")
    assert marked[50, 100] and marked[49:52, 99:102].all()
    rows, columns = np.nonzero(marked[50:60, 90:111])  # below the label
    assert rows.max() == 2 and columns.mean() == 10.0


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_labels_stay_inside_and_never_cover_each_other(width, height):
    rng = np.random.default_rng(width)
    for _ in range(5):
        regions = []
        for i in range(3 if width < 100 else 6):
            x, y = rng.uniform(0, 0.9, 2) * (width, height)
            w, h = rng.uniform(0.02, 1, 2) * (width - x, height - y)
            regions.append({"name": f"obj_{i + 1}", "box": [x, y, x + w, y + h]})
        boxes, fonts = place(regions, width, height)
        assert len({font.size for font in fonts}) == 1
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            for other in boxes[:i]:
                assert region_marks._overlap((left, top, right, bottom), other) == 0


@pytest.mark.parametrize(("width", "height"), [(224, 224), (640, 360), (3840, 2160), (2160, 2160)])
def test_labels_are_legible_at_their_own_size_and_as_the_model_sees_them(width, height):
    boxes, fonts = place(
        [{"name": "obj_1", "box": [width * 0.4, height * 0.4, width * 0.7, height * 0.7]}], width, height
    )
    left, top, right, bottom = boxes[0]
    assert fonts[0].size >= 11
    assert (right - left) * 448 / width >= 40 and (bottom - top) * 448 / height >= 11  # seven letters in 40 pixels
    assert right - left <= 0.25 * width and bottom - top <= 0.15 * height


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_letters_contrast_with_their_ground_and_lie_on_it(width, height):
    for name in ("obj_1", "obj_3"):
        region = {"name": name, "box": [width * 0.3, height * 0.5, width * 0.8, height * 0.9]}
        pixels = np.asarray(draw_marks(canvas(width, height), [region])).astype(int)
        left, top, right, bottom = place([region], width, height)[0][0]
        label = pixels[top:bottom, left:right]
        text = np.array(region_marks._text_colour(colour_of(name)))
        # letters never touch the rim of their ground
        rim = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]])
        assert (rim == colour_of(name)).all()
        closest = np.abs(label - text).sum(-1).min()
        assert closest <= (60 if width >= 224 else 200)
        assert np.abs(text - colour_of(name)).sum() > 300


@pytest.mark.parametrize(
    "box", [[0, 0, 40, 40], [184, 0, 224, 40], [0, 184, 40, 224], [184, 184, 224, 224], [0, 0, 224, 224]]
)
def test_labels_of_boxes_at_the_border_are_whole(box):
    (left, top, right, bottom), *_ = place([{"name": "obj_1", "box": box}], 224, 224)[0]
    assert 0 <= left and right <= 224 and 0 <= top and bottom <= 224
    if box != [0, 0, 224, 224]:
        assert region_marks._overlap((left, top, right, bottom), tuple(box)) == 0  # there is room beside it


def test_many_labels_shrink_until_they_fit():
    regions = [{"name": f"obj_{i + 1}", "box": [50, 50, 60, 60]} for i in range(20)]
    boxes, fonts = place(regions, 112, 112)
    assert fonts[0].size < place(regions[:1], 112, 112)[1][0].size
    for i, box in enumerate(boxes):
        assert all(region_marks._overlap(box, other) == 0 for other in boxes[:i])


def test_too_many_labels_are_refused():
    regions = [{"name": f"obj_{i + 1}", "box": [5, 5, 9, 9]} for i in range(40)]
    with pytest.raises(ValueError, match="56 x 56 pixels are too few for 40 labels"):
        draw_marks(canvas(56, 56), regions)
    with pytest.raises(ValueError, match="12 x 12"):
        draw_marks(canvas(12, 12), [{"name": "obj_1", "box": [2, 2, 9, 9]}])


def test_same_input_gives_same_pixels_and_input_is_not_changed():
    mask = np.zeros((120, 160), bool)
    mask[10:60, 20:90] = True
    regions = [{"name": "R2", "mask": mask, "box": None}, {"name": "obj_1", "box": [5, 5, 80, 70], "point": None}]
    image = canvas(160, 120)
    before = image.tobytes()
    first, second = draw_marks(image, regions), draw_marks(image, regions)
    assert first.tobytes() == second.tobytes() != before
    assert image.tobytes() == before and regions[0]["name"] == "R2" and regions[0]["mask"] is mask


def test_no_regions_draw_nothing():
    image = canvas(20, 20)
    drawn = draw_marks(image, [])
    assert drawn is not image and drawn.tobytes() == image.tobytes()


def test_grey_pictures_are_marked_in_colour():
    drawn = draw_marks(Image.new("L", (224, 224), 90), [{"name": "obj_1", "box": [10, 40, 90, 100]}])
    assert drawn.mode == "RGB" and pixels_of(drawn, "obj_1").any()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"name": "obj_1", "box": [-5, 0, 10, 10]}, "does not lie in the frame of 80 x 60"),
        ({"name": "obj_1", "box": [0, 0, 81, 10]}, "x2 <= 80"),
        ({"name": "obj_1", "box": [0, 0, 10, 61]}, "y2 <= 60"),
        ({"name": "obj_1", "box": [100, 100, 120, 120]}, "does not lie"),
        ({"name": "obj_1", "box": [10, 0, 10, 5]}, "x1 < x2"),
        ({"name": "obj_1", "box": [0, 9, 10, 5]}, "y1 < y2"),
        ({"name": "obj_1", "box": [0, 0, 10]}, "x1, y1, x2, y2"),
        ({"name": "obj_1", "box": "0 0 9 9"}, "x1, y1, x2, y2"),
        ({"name": "obj_1", "box": [0, 0, float("nan"), 10]}, "finite"),
        ({"name": "obj_1", "point": [90, 10]}, "point.*does not lie"),
        ({"name": "obj_1", "point": [1, 2, 3]}, r"point \[x, y\]"),
        ({"name": "obj_1", "mask": np.ones((80, 60), bool)}, r"\(60, 80\)"),
        ({"name": "obj_1", "mask": np.zeros((60, 80), bool)}, "no true pixel"),
        ({"name": "obj_1", "mask": np.ones((60, 80), np.uint8)}, "booleans"),
        ({"name": "obj_1"}, "exactly one of"),
        ({"name": "obj_1", "box": [0, 0, 9, 9], "point": [1, 1]}, "exactly one of"),
        ({"name": "obj_1", "bbox": [0, 0, 9, 9]}, "unknown keys.*bbox"),
        ({"name": "car", "box": [0, 0, 9, 9]}, "car"),
        ({"box": [0, 0, 9, 9]}, "None"),
        ("obj_1", "must be a dict"),
    ],
)
def test_bad_regions_are_refused_by_picture_and_name(region, message):
    with pytest.raises(ValueError, match=message) as error:
        draw_marks(canvas(80, 60), [region], source="street.mp4")
    assert "street.mp4" in str(error.value)


def test_two_regions_of_one_name_are_refused():
    regions = [{"name": "obj_1", "box": [0, 0, 9, 9]}, {"name": "R1", "box": [20, 20, 40, 40]}]
    with pytest.raises(ValueError, match="two regions are called obj_1"):
        draw_marks(canvas(80, 60), regions)


def test_rounding_at_the_border_is_no_error():
    drawn = draw_marks(canvas(80, 60), [{"name": "obj_1", "box": [-0.3, 20.0, 80.4, 60.2]}])
    assert pixels_of(drawn, "obj_1")[20:60, 0].all() and pixels_of(drawn, "obj_1")[59].all()
