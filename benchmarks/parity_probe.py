"""What one version of transformers does with the same files. `benchmarks/parity.py` runs it by several interpreters.

    python benchmarks/parity_probe.py FOLDER OUTPUT.safetensors

FOLDER is one that `parity.py` has made. Prints one line of JSON, and writes logits. Runs on transformers 4.46 and on 5, and
uses nothing else of this project.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

NUM_POSITIONS = 1024
MASKS = ("none", "ones", "right padded", "left padded")


class OldStyleConfig(PretrainedConfig):
    model_type = "old_style"


class OldStyleModel(PreTrainedModel):
    """As models with code of their own were written for transformers 4: initialised in place, a buffer that is not saved."""

    config_class = OldStyleConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.embedding = nn.Embedding(NUM_POSITIONS, 16)
        self.register_buffer("position_ids", torch.arange(NUM_POSITIONS)[None], persistent=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 1.0)
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)


def load(folder: Path, dtype: torch.dtype, attention: str = "sdpa"):
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **{name: dtype}).eval()


def mask_of(kind: str, ids: torch.Tensor) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones_like(ids, dtype=torch.bool)
    if "padded" in kind:
        for row in range(1, len(ids)):
            gap = ids.shape[1] // 4 * row // len(ids)
            mask[row, slice(None, gap) if kind.startswith("left") else slice(ids.shape[1] - gap, None)] = False
    return mask


@torch.no_grad()
def logits_of(folder: Path, written: dict[str, torch.Tensor]) -> None:
    """Logits of a causal model in every dtype and attention; 0 where the mask is."""
    for size in ("tiny", "mid"):
        ids = load_file(folder / "ids.safetensors")[size]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for attention in ("sdpa", "eager"):
                model = load(folder / size, dtype, attention)
                for kind in MASKS:
                    mask = mask_of(kind, ids)
                    logits = model(input_ids=ids, attention_mask=mask).logits.float()
                    if mask is not None:
                        logits = logits * mask[..., None]
                    # every 16th position of the larger model keeps the file small
                    written[f"{size}/{str(dtype)[6:]}/{attention}/{kind}"] = logits[:, :: 1 if size == "tiny" else 16]


@torch.no_grad()
def rounded_frequencies(folder: Path, written: dict[str, torch.Tensor]) -> None:
    """Cause D: the whole model cast after it was loaded, and the same with the frequencies put back."""
    ids = load_file(folder / "ids.safetensors")["long"]
    exact = load(folder / "mid", torch.float32)
    frequencies = exact.model.rotary_emb.inv_freq
    written["long/float32"] = exact(input_ids=ids).logits[:, ::16]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype)[6:]
        written[f"long/{name}/at load"] = load(folder / "mid", dtype)(input_ids=ids).logits[:, ::16].float()
        cast = load(folder / "mid", torch.float32).to(dtype)
        written[f"long/{name}/cast"] = cast(input_ids=ids).logits[:, ::16].float()
        cast.model.rotary_emb.inv_freq = frequencies
        written[f"long/{name}/cast, restored"] = cast(input_ids=ids).logits[:, ::16].float()


def sampling(folder: Path) -> dict:
    """Cause C: a call with a bare GenerationConfig, where the checkpoint's own file samples."""
    model, answers = load(folder / "tiny", torch.float32), []
    ids = load_file(folder / "ids.safetensors")["tiny"][:1, :16]
    bare = GenerationConfig(max_new_tokens=16, pad_token_id=0)
    for seed in range(6):
        torch.manual_seed(seed)
        answers.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=bare)[0, 16:].tolist()
        )
    return {"different_answers": len({tuple(answer) for answer in answers}), "seeds": len(answers)}


def main(folder: Path, output: Path) -> None:
    found: dict = {"transformers": transformers.__version__, "torch": torch.__version__}
    written: dict[str, torch.Tensor] = {}

    # A and B: weights that are initialised again after they were loaded, buffers that never get their values
    model = OldStyleModel.from_pretrained(folder / "old_style")
    stored = load_file(folder / "old_style" / "model.safetensors")
    changed = [name for name, value in stored.items() if not torch.equal(model.state_dict()[name], value)]
    found["reinitialised"] = {"tensors": len(stored), "differ from the file": sorted(changed)}
    found["position_ids"] = bool(torch.equal(model.position_ids, torch.arange(NUM_POSITIONS)[None]))

    found["sampling"] = sampling(folder)
    logits_of(folder, written)
    rounded_frequencies(folder, written)

    # E: the frequencies that a config written by the newest version gives here
    found["theta"] = {}
    for name in ("saved by 5", "to_nvila"):
        if (folder / name / "config.json").is_file():
            rotary = load(folder / name, torch.float32).model.rotary_emb
            found["theta"][name] = float(rotary.inv_freq[1] ** (-len(rotary.inv_freq)))
    save_file({name: value.contiguous() for name, value in written.items()}, output)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
