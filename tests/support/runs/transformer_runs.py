"""`transformers.Trainer` on a tiny BERT."""

import torch
import transformers
from nets import BERT, SOON

from fxrank.integrations.huggingface import LowRankCallback, LowRankTrainer

TOKENS = torch.randint(0, 50, (24, 8), generator=torch.Generator().manual_seed(3))
DATA = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in TOKENS]
"""24 sentences of 8 tokens; the class is whether the first token is odd."""


def bert(seed=0):
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, max_position_embeddings=16))


def trainer_of(folder, model=None, policy=SOON, cls=LowRankTrainer, callback=None, **options):
    """12 optimizer steps: 4 epochs of 3, each of two batches of 4."""
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 3,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **(settings | options))
    callback = LowRankCallback(policy) if callback is None else callback
    model = bert() if model is None else model
    return cls(model, args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=[callback]), callback
