"""Ranks under a target, of a model in several files: by what each block gives."""

import torch
from language_models import of_transformers, padded

import fxrank
from fxrank.large.stream import compress_shards
from fxrank.policies.outputs import Outputs


def compressed(model, build, folder):
    model.save_pretrained(folder / "big", max_shard_size="30KB")
    budget = fxrank.Budget("params", 0.7, 0.0)
    plan = compress_shards(
        build(), padded(1)[0], folder / "big", folder / "small", calibration=padded(3), budget=budget
    )
    return plan, fxrank.load(type(model)(model.config), folder / "small").eval()


def test_ranks_go_where_their_block_hears_them(tmp_path, monkeypatch):
    model, build = of_transformers("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 1e-3  # of what the mlp does nearly nothing comes out
    found = {}
    for ranks in ("weighed", "own losses"):
        if ranks == "own losses":
            monkeypatch.setattr(Outputs, "weights", lambda self, alone: {})
        plan, small = compressed(model, build, tmp_path / ranks)
        with torch.no_grad():
            off = small(**padded(3)[2]).logits - model(**padded(3)[2]).logits
        found[ranks] = {name for name in plan.R if "o_proj" in name}, float(off.square().sum())
    assert not found["weighed"][0] and found["own losses"][0]
    assert found["weighed"][1] < 0.5 * found["own losses"][1]


def test_a_block_that_cannot_be_weighed_is_named(tmp_path, monkeypatch):
    real = Outputs.weights

    def weights(self, alone):
        if self.model.path == "model.layers.1":
            raise ValueError("its outputs are the same whatever it is called with.")
        return real(self, alone)

    monkeypatch.setattr(Outputs, "weights", weights)
    plan, _ = compressed(*of_transformers("llama"), tmp_path)
    assert plan.note.endswith(
        "layers in model.layers.1 count with the median weight, as what it gives cannot be compared: its outputs are the same whatever it is called with."
    )
    assert plan.note.count("median weight") == 1
    assert fxrank.Plan.load(tmp_path / "small" / "plan.json").note == plan.note
