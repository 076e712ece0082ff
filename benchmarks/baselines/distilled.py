"""Distilled encoders: smaller ones, trained by what a fine-tuned one says. They stand in for DistilBERT and TinyBERT.

Cuttlefish is compared on GLUE with the two (Wang et al., MLSys 2023, Table 4), which were distilled from BERT on its whole pretraining text
before they were fine-tuned. Here the teacher is MiniLM-L6, fine-tuned on the task, the students have half of its layers, and all that
they are taught on is the task: their losses are those of the papers (Sanh et al. 2019; Jiao et al. 2020), the pretraining and TinyBERT's
augmented data are not there.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def taken(depth: int, layers: int) -> list[int]:
    """Which of a teacher's layers a student starts from: every second for half as many, the last, which the head reads, among them.
    `ValueError` if they do not divide.
    """
    if not 0 < layers <= depth or depth % layers:
        raise ValueError(f"a student's layers must divide its teacher's {depth}; got {layers}.")
    step = depth // layers
    return list(range(step - 1, depth, step))


def student(teacher: nn.Module, layers: int) -> nn.Module:
    """A copy of a BERT classifier with some of its layers (`taken`), with embeddings and head, all to be trained. It returns hidden states."""
    model = copy.deepcopy(teacher)
    encoder: Any = model.get_submodule("bert.encoder")
    encoder.layer = nn.ModuleList(encoder.layer[i] for i in taken(len(encoder.layer), layers))
    config: Any = model.config
    config.num_hidden_layers, config.output_hidden_states = layers, True
    return model


# -- parts of the losses


def soft_targets(found: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`T² KL(softmax(taught / T) ‖ softmax(found / T))`, the mean over examples, of logits `(N, classes)` (Hinton et al. 2015, §2). Of scores
    `(N, 1)`, which have no distribution, the mean squared difference.
    """
    if found.shape[1] == 1:
        return F.mse_loss(found, taught)
    logs, targets = (F.log_softmax(logits / temperature, 1) for logits in (found, taught))
    return temperature**2 * F.kl_div(logs, targets, reduction="batchmean", log_target=True)


def hidden_cosine(found: Tensor, taught: Tensor, mask: Tensor) -> Tensor:
    """`1 - cos` between hidden states `(N, T, width)`, the mean over the tokens that the mask `(N, T)` has (Sanh et al. 2019, §3)."""
    a, b = found[mask], taught[mask]
    return F.cosine_embedding_loss(a, b, torch.ones(len(a), device=a.device))


def attention_scores(model: nn.Module, layer: int, hidden: Tensor) -> Tensor:
    """Attention before the softmax and without dropout, `Q Kᵀ / √d` `(N, heads, T, T)`, of a layer whose input is `hidden` `(N, T, width)`."""
    attention: Any = model.get_submodule(f"bert.encoder.layer.{layer}.attention.self")
    heads = (attention.num_attention_heads, -1)
    query, key = (side(hidden).unflatten(-1, heads).transpose(1, 2) for side in (attention.query, attention.key))
    scores: Tensor = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores


def layer_losses(
    student: nn.Module, found: Any, teacher: nn.Module, taught: Any, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """TinyBERT's losses of hidden states and of attention matrices (Jiao et al. 2020, eq. 7-9, with the uniform map of layers).

    The mean squared difference of the embeddings and of each layer's output from those of the teacher's layer in its place, summed over the
    layers, and the same of the attention scores, all of tokens that the mask `(N, T)` has. The widths are alike: no matrix is learned between.
    `found` and `taught` are what the two models return, with their hidden states.
    """
    ours, theirs = found.hidden_states, taught.hidden_states
    step = (len(theirs) - 1) // (len(ours) - 1)
    hidden = torch.stack([F.mse_loss(state[mask], theirs[i * step][mask]) for i, state in enumerate(ours)])
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    attention = []
    for i in range(len(ours) - 1):
        mine = attention_scores(student, i, ours[i])
        above = (i + 1) * step - 1
        with torch.no_grad():
            wanted = attention_scores(teacher, above, theirs[above])
        attention.append(F.mse_loss(mine[pairs.expand_as(mine)], wanted[pairs.expand_as(wanted)]))
    return hidden.sum(), torch.stack(attention).sum()


# -- losses of a batch, as `auto_lowrank` takes them: of the student's outputs, and the batch


@dataclass(frozen=True)
class DistilBert:
    """DistilBERT's loss: soft targets at a temperature, the task's own loss, and the cosine of the last hidden states, with the weights and the
    temperature of its authors' command (Sanh et al. 2019, §3). The task's stands where the pretraining has that of masked words.
    """

    teacher: nn.Module
    temperature: float = 2.0
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0)

    def __call__(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of a batch."""
        taught = _asked(self.teacher, batch)
        parts = (
            soft_targets(outputs.logits, taught.logits, self.temperature),
            outputs.loss,
            hidden_cosine(outputs.hidden_states[-1], taught.hidden_states[-1], batch["attention_mask"].bool()),
        )
        total: Tensor = sum(weight * part for weight, part in zip(self.weights, parts, strict=True))
        return total


@dataclass(frozen=True)
class TinyBertLayers:
    """TinyBERT's loss of the first stage: its layers' (`layer_losses`). The `student` is the model that is trained."""

    teacher: nn.Module
    student: nn.Module

    def __call__(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of a batch."""
        mask = batch["attention_mask"].bool()
        hidden, attention = layer_losses(self.student, outputs, self.teacher, _asked(self.teacher, batch), mask)
        return hidden + attention


@dataclass(frozen=True)
class TinyBertPrediction:
    """TinyBERT's loss of the second stage: soft targets at a temperature of 1 (Jiao et al. 2020, eq. 10)."""

    teacher: nn.Module

    def __call__(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of a batch."""
        return soft_targets(outputs.logits, _asked(self.teacher, batch).logits, 1.0)


def _asked(teacher: nn.Module, batch: dict[str, Tensor]) -> Any:
    """What the teacher says of a batch, without dropout and gradients."""
    teacher.eval()
    with torch.no_grad():
        return teacher(**batch, output_hidden_states=True)
