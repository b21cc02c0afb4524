"""The attention layers of a network, which of them attend to the prompt, and whether the network can be gated."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from tgate_processors.errors import UnsupportedPipelineError


# Patterns of the names of cross-attention layers, for networks whose layers do not say whether they are
# cross-attention, or say it wrongly, in diffusers 0.42.
CROSS_ATTENTION = {
    "Kandinsky3UNet": r"attentions\.[1-9]\d*\.attention",  # number 0 is self-attention, but says that it is not
    "OmniGenTransformer2DModel": r"$^",  # its self-attention says that it is cross-attention
    "Kandinsky5Transformer3DModel": r"\.cross_attention",
    "LTXVideoTransformer3DModel": r"\.attn2",
    "WanAnimateTransformer3DModel": r"\.attn2",  # its other cross-attention is to the face of each frame
}


def attention_layers(denoiser: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the attention layers of a denoiser by the names of their processors, as in `denoiser.attn_processors`.

    This also works for denoisers whose layers have processors, but which have no `attn_processors` (Allegro's,
    Cosmos').
    """
    return {
        f"{name}.processor".replace("_orig_mod.", ""): layer  # torch.compile's wrappers
        for name, layer in denoiser.named_modules()
        if hasattr(layer, "set_processor")
    }


def set_processors(denoiser: torch.nn.Module, processors: Mapping[str, Any]) -> None:
    """Do what `denoiser.set_attn_processor(processors)` does, also for denoisers without that method."""
    for name, layer in attention_layers(denoiser).items():
        if layer.processor is not processors[name]:
            layer.set_processor(processors[name])  # type: ignore[operator]  # of diffusers' layers


def is_of_diffusers(processor: Any) -> bool:
    """Return whether a processor's class is one of diffusers."""
    return type(processor).__module__.startswith("diffusers.")


def cross_attention_layers(denoiser: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return those of `attention_layers` that attend to the prompt and to nothing else."""
    layers = attention_layers(denoiser)
    pattern = CROSS_ATTENTION.get(type(getattr(denoiser, "_orig_mod", denoiser)).__name__)
    if pattern is not None:
        return {name: layer for name, layer in layers.items() if re.search(rf"{pattern}\.processor$", name)}
    return {
        name: layer
        for name, layer in layers.items()
        if getattr(layer, "is_cross_attention", False) and not is_joint(layer)
    }


def is_joint(layer: torch.nn.Module) -> bool:
    """Return whether self- and cross-attention are one operation in a layer, so that neither has its own output."""
    return isinstance(layer, Attention) and getattr(layer, "added_kv_proj_dim", None) is not None


def check_merges_no_cross_attention(denoiser: torch.nn.Module) -> None:
    """Check that outputs of cross-attention fit a later step.

    Raises:
        UnsupportedPipelineError: The denoiser merges tokens around cross-attention.
    """
    merging: list[Any] = [block for block in denoiser.modules() if type(block).__name__ == "ToMeBlock"]
    if any(block._tome_info["args"]["merge_crossattn"] for block in merging):
        raise UnsupportedPipelineError(
            "`merge_crossattn` must be False with T-GATE, got tokens that tomesd merges around cross-attention: it "
            "merges other tokens in each step. Call `tomesd.apply_patch(pipe, merge_crossattn=False)`."
        )


def check_has_cross_attention(denoiser: torch.nn.Module) -> None:
    """Check that the denoiser has a layer to gate.

    Raises:
        UnsupportedPipelineError: The denoiser has no cross-attention layer of its own.
    """
    if cross_attention_layers(denoiser):
        return
    layers = attention_layers(denoiser)
    if not layers:
        reason = "it has no attention processors"
    elif any(getattr(layer, "added_kv_proj_dim", None) is not None for layer in layers.values()):
        reason = "its text joins self-attention (joint or added-KV attention), so it has no output of cross-attention"
    else:
        reason = "none of its attention layers is known to attend to the prompt alone"
    raise UnsupportedPipelineError(
        f"`denoiser` must have cross-attention layers to gate, got {type(denoiser).__name__}: {reason}. "
        "Pass a denoiser with separate cross-attention, such as `UNet2DConditionModel` or `PixArtTransformer2DModel`."
    )
