"""What people load onto a pipeline, drawn at random: IP-Adapters and LoRAs."""

import torch
from zoo import of_pictures

from tgate_processors._layers import cross_attention_layers


IMAGE_WIDTH, IMAGE_TOKENS = 6, 4


def ip_adapter(unet, seed=0):
    """The state of an adapter, as its files hold it."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) * 0.5

    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": drawn(IMAGE_TOKENS * width, IMAGE_WIDTH),
        "proj.bias": drawn(IMAGE_TOKENS * width),
        "norm.weight": 1 + drawn(width),
        "norm.bias": drawn(width),
    }
    layers = {}
    for index, layer in enumerate(cross_attention_layers(unet).values()):
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{part}.weight"] = drawn(layer.inner_dim, width)
    return {"image_proj": projection, "ip_adapter": layers}


def load_ip_adapters(pipe, adapters=1):
    states = [ip_adapter(pipe.unet, seed) for seed in range(adapters)]
    pipe.load_ip_adapter(states, subfolder=None, weight_name=[None] * adapters, image_encoder_folder=None)


def with_images(kwargs, adapters=1, kind=20):
    """Each adapter is given embeddings of nothing, for the negative branch, and of an image."""
    embeds = [of_pictures([0, 1], 1, IMAGE_WIDTH, kind=kind + n) for n in range(adapters)]
    return kwargs | {"ip_adapter_image_embeds": embeds}


def lora(pipe):
    """A LoRA of the denoiser, as `load_lora_weights` takes it."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, layer in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            for part, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                state[f"unet.{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
    return state
