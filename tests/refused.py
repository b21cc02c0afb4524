"""Pipelines of diffusers 0.42 that cannot be gated, since their denoiser has no cross-attention of its own."""

import inspect
import warnings

import diffusers
import torch


ADDED_KV = "UNet2DConditionModel (added keys and values)"

REFUSED_DENOISERS = {
    ADDED_KV: (
        "IFImg2ImgPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingPipeline",
        "IFInpaintingSuperResolutionPipeline",
        "IFPipeline",
        "IFSuperResolutionPipeline",
        "KandinskyImg2ImgPipeline",
        "KandinskyInpaintPipeline",
        "KandinskyPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
        "KandinskyV22ControlnetPipeline",
        "KandinskyV22Img2ImgPipeline",
        "KandinskyV22InpaintPipeline",
        "KandinskyV22Pipeline",
    ),
    "AnyFlowFARTransformer3DModel": ("AnyFlowFARPipeline",),
    "AnyFlowTransformer3DModel": ("AnyFlowPipeline",),
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline",),
    "BriaFibo2Transformer2DModel": ("BriaFibo2Pipeline",),
    "BriaFiboTransformer2DModel": ("BriaFiboEditPipeline", "BriaFiboPipeline"),
    "ChromaTransformer2DModel": ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline", "ChromaPipeline"),
    "CogVideoXTransformer3DModel": (
        "CogVideoXFunControlPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXPipeline",
        "CogVideoXVideoToVideoPipeline",
    ),
    "CogView3PlusTransformer2DModel": ("CogView3PlusPipeline",),
    "CogView4Transformer2DModel": ("CogView4ControlPipeline", "CogView4Pipeline"),
    "DiTTransformer2DModel": ("DiTPipeline",),
    "ErnieImageTransformer2DModel": ("ErnieImagePipeline",),
    "Flux2Transformer2DModel": (
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
        "Flux2KleinPipeline",
        "Flux2Pipeline",
    ),
    "FluxTransformer2DModel": (
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlPipeline",
        "FluxFillPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxKontextInpaintPipeline",
        "FluxKontextPipeline",
        "FluxPipeline",
        "VisualClozeGenerationPipeline",
        "VisualClozePipeline",
    ),
    "GlmImageTransformer2DModel": ("GlmImagePipeline",),
    "HunyuanVideoFramepackTransformer3DModel": ("HunyuanVideoFramepackPipeline",),
    "HunyuanVideoTransformer3DModel": (
        "HunyuanSkyreelsImageToVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideoPipeline",
    ),
    "Ideogram4Transformer2DModel": ("Ideogram4Pipeline",),
    "JoyImageEditPlusTransformer3DModel": ("JoyImageEditPlusPipeline",),
    "JoyImageEditTransformer3DModel": ("JoyImageEditPipeline",),
    "Kandinsky6SRTransformer3DModel": ("Kandinsky6SRPipeline",),
    "Kandinsky6Transformer3DModel": ("Kandinsky6TI2VAPipeline",),
    "Krea2Transformer2DModel": ("Krea2Pipeline",),
    "LTX2VideoTransformer3DModel": (
        "LTX2ConditionPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTX2HDRPipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2InContextPipeline",
        "LTX2Pipeline",
    ),
    "LongCatImageTransformer2DModel": ("LongCatImagePipeline",),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline",),
    "MochiTransformer3DModel": ("MochiPipeline",),
    "MotifVideoTransformer3DModel": ("MotifVideoImage2VideoPipeline", "MotifVideoPipeline"),
    "NucleusMoEImageTransformer2DModel": ("NucleusMoEImagePipeline",),
    "OvisImageTransformer2DModel": ("OvisImagePipeline",),
    "PRXTransformer2DModel": ("PRXPipeline", "PRXPixelPipeline"),
    "QwenImageTransformer2DModel": (
        "QwenImageControlNetInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageLayeredPipeline",
        "QwenImagePipeline",
    ),
    "SD3Transformer2DModel": (
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3Pipeline",
    ),
    "StableAudio3DiTModel": (
        "StableAudio3AudioToAudioPipeline",
        "StableAudio3InpaintPipeline",
        "StableAudio3Pipeline",
    ),
    "UNet1DModel": ("DanceDiffusionPipeline",),
    "UNet2DModel": (
        "ConsistencyModelPipeline",
        "DDPMPipeline",
        "KarrasVePipeline",
        "LDMPipeline",
        "LDMSuperResolutionPipeline",
        "RePaintPipeline",
        "ScoreSdeVePipeline",
    ),
    "ZImageTransformer2DModel": (
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageOmniPipeline",
        "ZImagePipeline",
    ),
}


def build_denoiser(name):
    """A refused denoiser, without its weights and with as few layers as may be."""
    with torch.device("meta"), warnings.catch_warnings():
        if name == ADDED_KV:
            return diffusers.UNet2DConditionModel(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                cross_attention_dim=8,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
                up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            )
        warnings.simplefilter("ignore")  # some build parts of theirs that are deprecated
        cls = getattr(diffusers, name)
        few = {"num_layers": 1} if "num_layers" in inspect.signature(cls.__init__).parameters else {}
        return cls(**few)
