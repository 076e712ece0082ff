"""A small GPT-2, built from a configuration, learns to write Python in Transformers' Trainer, and becomes low-rank on the way.

python examples/transformers_trainer.py    (needs transformers and accelerate)
"""

import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

import fxrank
from fxrank.integrations.huggingface import LowRankCallback, LowRankTrainer, from_pretrained, save_pretrained

LENGTH = 64

# A text that every Python has: the first 8 KB of one of its own modules, byte by byte.
text = torch.frombuffer(bytearray(Path(textwrap.__file__).read_bytes()[:8192]), dtype=torch.uint8).long()
pieces = [{"input_ids": piece, "labels": piece} for piece in text.split(LENGTH) if len(piece) == LENGTH]
train, held_out = pieces[: -len(pieces) // 10], pieces[-len(pieces) // 10 :]

set_seed(0)
config = GPT2Config(
    vocab_size=256, n_positions=LENGTH, n_embd=96, n_layer=2, n_head=3, bos_token_id=None, eos_token_id=None
)
model = GPT2LMHeadModel(config)
callback = LowRankCallback(
    fxrank.Cuttlefish(objective="size")
)  # leave the policy out, and pairs must be faster as well
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8,
        num_train_epochs=6,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=15,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    # `LowRankTrainer` is `Trainer` with a `resume_from_checkpoint` that works after the switch too.
    trainer = LowRankTrainer(model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[callback])
    trainer.train()
    print(callback.plan)
    before = trainer.evaluate()["eval_loss"]

    save_pretrained(model, f"{folder}/small")  # plan.json beside config.json
    small = from_pretrained(AutoModelForCausalLM, f"{folder}/small")
    trainer = LowRankTrainer(small, arguments, eval_dataset=held_out)
    after = trainer.evaluate()["eval_loss"]

print(f"loss on held-out text {before:.4f}, read back from its folder {after:.4f}")
