"""Pictures to normalised pixels by PIL, without torchvision."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from .image_tiling import dynamic_tiles, multi_scale_grid, multi_scale_tiles, scale_grids, tile_grid
from .region_marks import draw_marks

ASPECT_RATIOS = ("resize", "dynamic", "dynamic_s2")  # NVILA's names


class RGPT4DImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of a call, beside those of every image processor.

    regions (`list`): for each picture None or a list of regions as `draw_marks` takes them.
    tiled (`list[bool]`): for each picture whether it may be tiled; all may if omitted.
    image_aspect_ratio, min_tiles, max_tiles, s2_scales: see `RGPT4DImageProcessor`.
    """

    regions: list | tuple | None
    tiled: list | tuple | None
    image_aspect_ratio: str
    min_tiles: int
    max_tiles: int
    s2_scales: list | tuple | None


class RGPT4DImageProcessor(PilBackend):
    """Draw regions, resize by PIL's bicubic filter without keeping the aspect ratio, scale and normalise to [-1, 1].

    A picture may be a PIL image, an array, a tensor, a path, or `{"path": ..., "bytes": ...}` as the `datasets` feature
    `Image(decode=False)` gives it.

    Args:
        image_aspect_ratio (`str`): `"resize"` makes one tile of a picture; `"dynamic"` (NVILA-Lite) as many as
            `dynamic_tiles` says; `"dynamic_s2"` (NVILA-8B) those of `multi_scale_tiles`.
        min_tiles, max_tiles (`int`): bounds of the number of tiles, without the one of the whole picture.
        s2_scales (`list[int]`, *optional*), s2_resize_output_to_scale_idx (`int`): of `"dynamic_s2"`, as in the model's
            config.

    Returns: `pixel_values` `(num_tiles_of_all_images, 3, height, width)` float32; the list `num_tiles` of the tiles of each
        picture, unless the mode is `"resize"`; for `"dynamic_s2"` also `image_block_sizes` `(num_images, 2)`, rows and
        columns of the last scale, 1 and 1 for a picture that is not tiled, and the list `num_blocks` of the blocks that
        the projector makes tokens of.
    Raises: `ValueError` for a file that is no picture, and for an unknown mode.
    """

    do_resize = True
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    image_aspect_ratio = "resize"
    min_tiles = 1
    max_tiles = 12
    s2_scales = None
    s2_resize_output_to_scale_idx = -1
    valid_kwargs = RGPT4DImageProcessorKwargs

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", *(["image_block_sizes"] if self.image_aspect_ratio == "dynamic_s2" else [])]

    def count_tiles(self, width: int, height: int) -> tuple[int, tuple[int, int]]:
        """How many tiles a picture of that size in pixels is cut into, and the rows and columns of their grid."""
        side = self.size["height"]
        if self.image_aspect_ratio == "resize":
            return 1, (1, 1)
        if self.image_aspect_ratio == "dynamic":
            columns, rows = tile_grid(width, height, side, self.min_tiles, self.max_tiles)
            return columns * rows + (columns * rows > 1), (rows, columns)
        grid = multi_scale_grid(width, height, self.s2_scales, self.max_tiles)
        return sum(rows * columns for rows, columns in scale_grids(self.s2_scales, *grid)), grid

    def count_blocks(self, rows: int, columns: int) -> int:
        """How many blocks of tokens a picture gives by `"dynamic_s2"` that has this grid at its last scale."""
        if (rows, columns) == (1, 1):
            return 1
        rows, columns = scale_grids(self.s2_scales, rows, columns)[self.s2_resize_output_to_scale_idx]
        return rows * columns

    def fetch_images(self, images: Any) -> Any:
        """Open what is not open yet, in nested lists too. A `ValueError` names a file that is no picture."""
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, dict):
            path, content = images.get("path"), images.get("bytes")
            if path is None and content is None:
                raise ValueError(f"a picture given as a dict needs 'path' or 'bytes', got keys {sorted(images)}")
            if content is None:
                return self.fetch_images(path)
            images = content
            name = str(path) if path is not None else "picture given as bytes"
        elif isinstance(images, Path) or (isinstance(images, str) and Path(images).suffix and "://" not in images):
            name, images = str(images), Path(images)
            if not images.is_file():
                raise ValueError(f"{name}: no such file; expected a picture")
        elif isinstance(images, bytes):
            name = "picture given as bytes"
        else:
            return super().fetch_images(images)
        try:
            with Image.open(io.BytesIO(images) if isinstance(images, bytes) else images) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{name}: not a readable picture ({error})") from error

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        *args,
        regions: list | None = None,
        tiled: list | None = None,
        image_aspect_ratio: str = "resize",
        min_tiles: int = 1,
        max_tiles: int = 12,
        s2_scales: list | None = None,
        **kwargs,
    ) -> BatchFeature:
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(f"unknown image_aspect_ratio {image_aspect_ratio!r}: choose one of {ASPECT_RATIOS}")
        if image_aspect_ratio == "dynamic_s2" and not s2_scales:
            raise ValueError("image_aspect_ratio 'dynamic_s2' needs s2_scales, for example [448, 896, 1344]")
        if regions:
            images = make_flat_list_of_images(self.fetch_images(images))
            regions = [regions] if len(images) == 1 and isinstance(regions[0], dict) else regions
            if len(regions) != len(images):
                raise ValueError(f"regions: got {len(regions)} entries for {len(images)} pictures; give one for each")
            images = [
                draw_marks(_as_picture(image), marks, source=f"picture {i}") if marks else image
                for i, (image, marks) in enumerate(zip(images, regions, strict=True))
            ]
        if image_aspect_ratio == "resize":
            return super()._preprocess_image_like_inputs(images, *args, **kwargs)

        side, resample = _square_side(kwargs["size"]), kwargs["resample"]
        images = [_as_picture(image).convert("RGB") for image in make_flat_list_of_images(self.fetch_images(images))]
        tiled = [True] * len(images) if tiled is None else tiled
        if len(tiled) != len(images):
            raise ValueError(f"tiled: got {len(tiled)} entries for {len(images)} pictures; give one for each")
        tiles, num_tiles, grids = [], [], []
        for image, may_tile in zip(images, tiled, strict=True):
            if not may_tile:
                of_image, grid = [image], (1, 1)
            elif image_aspect_ratio == "dynamic":
                of_image, grid = dynamic_tiles(image, side, min_tiles, max_tiles, resample)
            else:
                of_image, grid = multi_scale_tiles(image, list(s2_scales), max_tiles, resample)
            tiles += of_image
            num_tiles.append(len(of_image))
            grids.append(grid)
        features = super()._preprocess_image_like_inputs(tiles, *args, **kwargs)
        features["num_tiles"] = num_tiles
        if image_aspect_ratio == "dynamic_s2":
            features["image_block_sizes"] = grids
            features["num_blocks"] = [self.count_blocks(*grid) for grid in grids]
            lists = ["num_tiles", "num_blocks"]
            features.convert_to_tensors(kwargs.get("return_tensors"), skip_tensor_conversion=lists)
        return features


def _square_side(size: Any) -> int:
    if not size or size.height != size.width:
        raise ValueError(f"tiles are square: size must be {{'height': n, 'width': n}} in pixels, got {size}")
    return size.height


def _as_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(f"marks are drawn on uint8 arrays (H, W, 3), got {array.dtype} {tuple(array.shape)}")
    return Image.fromarray(array)


__all__ = ["RGPT4DImageProcessor"]
