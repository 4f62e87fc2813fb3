"""The same contracts on a CUDA device, in the precisions that people use there."""

import pytest
import torch
from datasets import Dataset

from trainer import P4DCollator, P4DConfig, P4DTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def prompt(processor, rows):
    conversations = [row["messages"][:1] for row in rows]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 4, "padding": True, "padding_side": "left"},
    )


def test_cuda_logits_equal_those_of_the_cpu(make_model, processor, rows):
    inputs = prompt(processor, rows[:3])
    model = make_model().eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model.to("cuda")(**inputs.to("cuda")).logits.cpu()
    real = inputs["attention_mask"].cpu().bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_batch_generates_with_every_cache(make_model, processor, rows, attention):
    model = make_model().to("cuda", torch.bfloat16).eval()
    model.set_attn_implementation(attention)
    inputs = prompt(processor, rows[:3]).to("cuda", torch.bfloat16)
    assert inputs["video_timestamps"].dtype == torch.float32
    answers = [
        model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        for cache in (None, "static")
    ]
    uncached = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    for answer in (*answers, uncached):
        assert answer.shape == (3, inputs["input_ids"].shape[1] + 4)
    # the first new token comes from the same prefill; later ones may part by rounding in bfloat16
    first = inputs["input_ids"].shape[1]
    assert torch.equal(answers[0][:, first], uncached[:, first])


def test_p4d_trains_in_mixed_precision_with_checkpointing(make_model, processor, rows, teacher, tmp_path):
    args = P4DConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=1e-3,
        trainable=["vision", "projector", "llm"],
        decoder_hidden_size=16,
        bf16=True,
        gradient_checkpointing=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
    )
    dataset = Dataset.from_dict({"index": range(len(rows))})
    trainer = P4DTrainer(
        make_model(),
        args,
        teacher=teacher,
        train_dataset=dataset.with_transform(lambda batch: {"row": [rows[i] for i in batch["index"]]}),
        processing_class=processor,
        data_collator=lambda examples: P4DCollator(processor, 4)([example["row"] for example in examples]),
    )
    trainer.train()
    for name in ("loss_sft", "loss_ld", "loss_ed"):
        values = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert sum(values[-3:]) < sum(values[:3]), name
