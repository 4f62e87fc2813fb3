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

from .region_marks import draw_marks


class RGPT4DImagesKwargs(ImagesKwargs, total=False):
    """Options of a call, beside those of every image processor.

    regions (`list`): for each picture None or a list of regions as `draw_marks` takes them.
    """

    regions: list | tuple | None


class RGPT4DImageProcessor(PilBackend):
    """Draw regions, resize by PIL's bicubic filter without keeping the aspect ratio, scale and normalise to [-1, 1].

    `pixel_values` is `(num_images, 3, height, width)` float32. A picture may be a PIL image, an array, a tensor, a path, or
    `{"path": ..., "bytes": ...}` as the `datasets` feature `Image(decode=False)` gives it.
    """

    do_resize = True
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    valid_kwargs = RGPT4DImagesKwargs
    model_input_names = ["pixel_values"]

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

    def _preprocess_image_like_inputs(self, images: Any, *args, regions: list | None = None, **kwargs) -> BatchFeature:
        if regions:
            images = make_flat_list_of_images(self.fetch_images(images))
            regions = [regions] if len(images) == 1 and isinstance(regions[0], dict) else regions
            if len(regions) != len(images):
                raise ValueError(f"regions: got {len(regions)} entries for {len(images)} pictures; give one for each")
            images = [
                draw_marks(_as_picture(image), marks, source=f"picture {i}") if marks else image
                for i, (image, marks) in enumerate(zip(images, regions, strict=True))
            ]
        return super()._preprocess_image_like_inputs(images, *args, **kwargs)


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
