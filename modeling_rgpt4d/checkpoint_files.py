"""Checkpoint folders on disk: their tensors one by one, and output folders that are whole or absent."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

# The names that the safetensors format has for what checkpoints hold
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is known by its file's header and read when it is needed."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def load(self) -> torch.Tensor:
        """The values, on the CPU, in memory mapped from the file for as long as the result lives."""
        if self.file.suffix in PICKLE_SUFFIXES:
            return _unpickle(self.file)[self.name]
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(self.name)


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    # Memory-mapped: opening it again for each tensor costs little, and keeps no file open that may change
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """What a file holds, by name.

    Raises: `ValueError` that names the file if it is cut short, damaged, or not what its name says.
    """
    try:
        if file.suffix in PICKLE_SUFFIXES:
            entries = [(name, DTYPE_NAMES[value.dtype], value.shape) for name, value in _unpickle(file).items()]
        else:
            with safe_open(file, "pt") as opened:
                slices = ((name, opened.get_slice(name)) for name in opened.keys())
                entries = [(name, piece.get_dtype(), piece.get_shape()) for name, piece in slices]
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing: copy or download the checkpoint again") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}): copy or download it again") from error
    except Exception as error:  # weights_only refuses with an error that has no public class
        if file.suffix not in PICKLE_SUFFIXES:
            raise
        raise ValueError(f"{file} holds more than tensors and is not opened ({error})") from error
    unknown = sorted({dtype for _, dtype, _ in entries if dtype not in DTYPES})
    if unknown:
        raise ValueError(f"{file} holds tensors of the dtypes {unknown}; expected weights in one of {sorted(DTYPES)}")
    return {name: StoredTensor(file, name, dtype, tuple(shape)) for name, dtype, shape in entries}


def read_folder(folder: Path, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """The tensors that `save_pretrained` wrote into a folder: one file, or several with their index.

    Raises: `ValueError` that names the file if one is missing, damaged, not as the index says, or, without
        `allow_pickle`, pickled.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if not single.is_file() and not index.is_file():
            continue
        if suffix != ".safetensors" and not allow_pickle:
            raise ValueError(
                f"{folder} holds pickled weights ({(single if single.is_file() else index).name}) and no safetensors. A "
                "pickle can be made to run code; if you trust it, pass --allow-pickle (allow_pickle=True)"
            )
        if single.is_file():
            return tensors_in(single)
        return _read_shards(index)
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors, or model.safetensors.index.json and shards"
    )


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: copy or download it again")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r}; shards lie beside their index")
        found = tensors_in(index.parent / name)
        expected = {key for key, file in weight_map.items() if file == name}
        if found.keys() != expected:
            raise ValueError(
                f"{index.parent / name} is not as {index.name} says: "
                f"missing {quoted(expected - found.keys())}; not in the index {quoted(found.keys() - expected)}"
            )
        tensors |= found
    return tensors


def read_json(file: Path) -> dict:
    """Raises: `ValueError` that names the file if it is missing or no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing") from error
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def quoted(names: set[str] | list[str], limit: int = 5) -> str:
    """The first few of many names, for a message."""
    names = sorted(names)
    return (", ".join(names[:limit]) or "none") + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file, to the byte: names, dtypes, shapes, the order of values, metadata."""
    with open(file, "rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))


def make_header(tensors: dict[str, StoredTensor], metadata: dict[str, str] | None = None) -> bytes:
    """A header in the order of the safetensors library: wide dtypes first, then by name."""
    header: dict = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])):
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return encoded + b" " * (-len(encoded) % 8)


def write_safetensors(
    file: Path,
    tensors: dict[str, StoredTensor],
    header: bytes | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Copy tensors into a file, one at a time: the library's `save_file` would hold all of them.

    Args:
        tensors: name in the new file -> where its values are.
        header: of the new file, as `read_header` gives it, if it is to equal one that was; its names, dtypes and shapes are
            those of `tensors`.
        progress: called with the number of bytes of each tensor after it was written.
    """
    header = make_header(tensors) if header is None else header
    layout = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in layout.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    with open(file, "wb") as output:
        output.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(layout, key=lambda name: layout[name]["data_offsets"]):
            values = tensors[name].load().contiguous().reshape(-1).view(torch.uint8)
            output.write(values.numpy())
            progress(values.numel())


def write_folder(
    folder: Path,
    tensors: dict[str, StoredTensor],
    max_shard_size: int | str,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Write `model.safetensors`, or shards and their index, as `save_pretrained` names them."""
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, names in split.filename_to_tensors.items():
        write_safetensors(folder / name, {name: tensors[name] for name in names}, progress=progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def check_output(output: Path) -> None:
    """Raises: `ValueError` if `output` is there and not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: remove it or choose another output")


@contextmanager
def whole_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `output` to write into, which gets its name at the end, and vanishes if anything goes wrong.

    Args:
        num_bytes: that will be written, at least.

    Raises: `ValueError`, before anything is written, if `output` is there and not empty, or the disk is too full.
    """
    output = output.absolute()
    check_output(output)
    made = [folder for folder in output.parents if not folder.exists()]
    free = shutil.disk_usage(output.parents[len(made)]).free
    if free < num_bytes:
        raise ValueError(f"{output} needs {num_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free")
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if output.exists():
            output.rmdir()
        os.replace(unfinished, output)
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


__all__ = [
    "StoredTensor",
    "check_output",
    "make_header",
    "read_folder",
    "read_header",
    "read_json",
    "tensors_in",
    "whole_folder",
    "write_folder",
    "write_json",
    "write_safetensors",
]
