"""The model zoo: every torchvision model, one of each timm module, tiny configurations of the transformers models,
and small models of the kinds that users write themselves. Each entry builds an untrained model and one example call.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.subjects import zoo_misc

BATCH = 2


@dataclass(frozen=True)
class Entry:
    """One model: `source` is torchvision, timm, hf or misc; `example` makes the inputs of one call, batch of 2."""

    source: str
    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]


def entries(sources: tuple[str, ...] = ("torchvision", "timm", "hf", "misc"), every_timm: bool = False) -> list[Entry]:
    """All models of the sources; `every_timm` takes all of timm's registered names instead of one a module."""
    found: list[Entry] = []
    for source in sources:
        found += SOURCES[source](every_timm) if source == "timm" else SOURCES[source]()
    return found


# -- torchvision

_VIDEO_SIZES = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224), "swin3d": (8, 112)}
_RCNN = ("rcnn", "retinanet", "fcos", "ssd")


def _torchvision() -> list[Entry]:
    models = importlib.import_module("torchvision.models")
    return [
        Entry("torchvision", n, partial(_torchvision_model, n), partial(_torchvision_example, n))
        for n in models.list_models()
    ]


def needs_data(name: str) -> bool:
    """Whether only a real run shows what the model does: detectors choose boxes by their scores."""
    return any(part in name for part in _RCNN)


def _torchvision_model(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    options: dict[str, Any] = {"weights": None}
    if any(part in name for part in (*_RCNN, "deeplab", "fcn_", "lraspp")):
        options["weights_backbone"] = None
    if any(part in name for part in _RCNN) and "ssd" not in name:
        options |= {"min_size": 128, "max_size": 160}  # the images are small; the network is the same
    if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        options |= {"aux_logits": True, "init_weights": False}
    model: nn.Module = models.get_model(name, **options)
    return model.eval()


def _torchvision_example(name: str) -> Any:
    if any(part in name for part in _RCNN):
        return ([torch.rand(3, 96, 128), torch.rand(3, 112, 96)],)
    if name.startswith("raft"):
        return torch.rand(BATCH, 3, 128, 128), torch.rand(BATCH, 3, 128, 128)
    for prefix, (frames, size) in _VIDEO_SIZES.items():
        if name.startswith(prefix):
            return torch.rand(BATCH, 3, frames, size, size)
    if name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        return torch.rand(BATCH, 3, 4, 56, 56)
    return torch.rand(BATCH, 3, 299 if "inception" in name else 224, 299 if "inception" in name else 224)


# -- timm

TIMM = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0
test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs
mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d
test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224
test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception
xception41p xcit_nano_12_p8_224
"""
"""The registered variant with the fewest parameters of each timm module (1.0.31)."""
WELL_KNOWN = """
resnet50 wide_resnet50_2 convnext_tiny convnextv2_tiny vit_base_patch16_224 vit_base_patch16_clip_224
vit_small_patch14_dinov2 deit3_small_patch16_224 eva02_tiny_patch14_224 beitv2_base_patch16_224
maxvit_tiny_tf_224 coatnet_0_rw_224 caformer_s18 efficientnet_b0 tf_efficientnetv2_s mobilenetv3_large_100
mobilenetv4_conv_small mixer_b16_224 resmlp_12_224
"""
"""What most people take from timm, and some makes that the smallest variants lack."""


def _timm(every: bool = False) -> list[Entry]:
    timm = importlib.import_module("timm")
    names = timm.list_models() if every else (TIMM + WELL_KNOWN).split()
    return [Entry("timm", n, partial(_timm_model, n), partial(_timm_example, n)) for n in names]


def _timm_model(name: str) -> nn.Module:
    model: nn.Module = importlib.import_module("timm").create_model(name)
    return model.eval()


def _timm_example(name: str) -> Tensor:
    pretrained = importlib.import_module("timm.models").get_pretrained_cfg(name)
    size = (3, 224, 224) if pretrained is None else pretrained.input_size
    if name.startswith("naflexvit") or pretrained is None:
        size = (3, 224, 224)
    return torch.rand(1 if size[-1] > 400 else BATCH, *size)


# -- transformers

_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3} | {k: v for k, v in _TEXT.items() if k != "vocab_size"}


def _ids(length: int = 8) -> Tensor:
    return torch.randint(3, 99, (BATCH, length))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(BATCH, 8, dtype=torch.long)}


def _seq2seq() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(6)}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(BATCH, 3, 32, 32)}


def _clip() -> dict[str, Tensor]:
    return _tokens() | _pixels()


def _audio() -> dict[str, Tensor]:
    return {"input_features": torch.rand(BATCH, 16, 64), "decoder_input_ids": _ids(6)}


_CLIP_PART = {k: v for k, v in _TEXT.items() if k != "vocab_size"}
HF: dict[str, tuple[str, str, dict[str, Any], Callable[[], Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _TEXT, _tokens),
    "bert_mlm": ("BertConfig", "BertForMaskedLM", _TEXT, _tokens),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        _tokens,
    ),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _TEXT, _tokens),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _TEXT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        _tokens,
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}, _tokens),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        _tokens,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA, _tokens),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA, _tokens),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA, _tokens),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA | {"head_dim": 8}, _tokens),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _tokens,
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        _seq2seq,
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGE, _pixels),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _IMAGE, _pixels),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _pixels,
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": _TEXT | {"max_position_embeddings": 16, "eos_token_id": 98}, "vision_config": _IMAGE},
        _clip,
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        _audio,
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        lambda: {"input_ids": _ids()},
    ),
}


def _hf() -> list[Entry]:
    return [Entry("hf", name, partial(hf_model, name), HF[name][3]) for name in HF]


def hf_model(name: str) -> nn.Module:
    """A transformers model in a tiny configuration, randomly initialized, in evaluation mode."""
    transformers = importlib.import_module("transformers")
    config, cls, options, _ = HF[name]
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options))
    return model.eval()


# -- models as users write them


def _misc() -> list[Entry]:
    return [Entry("misc", name, build, example) for name, (build, example) in zoo_misc.MODELS.items()]


SOURCES: dict[str, Callable[..., list[Entry]]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hf, "misc": _misc}


def named(name: str) -> Iterator[Entry]:
    """The entries of that name, whatever the source."""
    return (entry for entry in entries() if entry.name == name)
