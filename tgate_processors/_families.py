"""Facts of each pipeline class that its instances do not tell. They hold for diffusers 0.42."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from tgate_processors.schedule import Branch


Known = TypeVar("Known")


class Guidance(Enum):
    """How a pipeline evaluates the branches of its guidance."""

    HALVES = "the batch is `[negative, positive]`, and the gate drops one half"
    HALVES_POSITIVE_FIRST = "the batch is `[positive, negative]`, and the gate drops one half"
    HALVES_THEN_CALLS = "a batch `[negative, positive]` comes before calls of one branch; the gate drops half of it"
    LISTS = "the list of pictures begins with the positive ones, and the gate drops the negative ones"
    CALLS = "each branch is a call, and the gate leaves out the calls after the first"
    PARTS = "the batch has three parts or more, and the gate keeps them all and reuses only cross-attention"
    NONE = "the pipeline does no guidance, and the gate reuses only cross-attention"

    @property
    def has_halves(self) -> bool:
        """Whether one batch has both branches, so that the gate can drop half of it."""
        return self in (
            Guidance.HALVES,
            Guidance.HALVES_POSITIVE_FIRST,
            Guidance.HALVES_THEN_CALLS,
            Guidance.LISTS,
        )

    @property
    def can_be_dropped(self) -> bool:
        """Whether the gate can leave out a branch."""
        return self.has_halves or self is Guidance.CALLS


@dataclass(frozen=True)
class Family:
    """Facts of a pipeline class that its instances do not tell.

    Args:
        guidance: How the pipeline evaluates its branches.
        branch: Branch that goes on after the gate, unless the configuration names one.
        begins_guided: Whether later steps need what both branches computed in the first step.
    """

    guidance: Guidance = Guidance.HALVES
    branch: Branch = "negative"
    begins_guided: bool = False


def class_names(value: Any) -> list[str]:
    """Return the names of an object's class and of its base classes, the nearest first."""
    return [cls.__name__ for cls in type(value).__mro__]


def _named(known: Known, names: str) -> dict[str, Known]:
    return dict.fromkeys(names.split(), known)


# The tests run each of these classes. A class that derives from one of them is treated like it.
FAMILIES = {
    # The gate reuses cross-attention and drops guidance.
    **_named(
        Family(),
        """
        AllegroPipeline AltDiffusionImg2ImgPipeline AltDiffusionPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline
        AmusedPipeline AnimateDiffControlNetPipeline AnimateDiffPipeline AnimateDiffSDXLPipeline
        AnimateDiffSparseControlNetPipeline AnimateDiffVideoToVideoControlNetPipeline AnimateDiffVideoToVideoPipeline
        AudioLDM2Pipeline BlipDiffusionControlNetPipeline BlipDiffusionPipeline DreamLitePipeline
        HunyuanDiTControlNetPipeline HunyuanDiTPipeline Kandinsky3Img2ImgPipeline Kandinsky3Pipeline
        KolorsImg2ImgPipeline KolorsPipeline LDMTextToImagePipeline LTXConditionPipeline LTXImageToVideoPipeline
        LTXPipeline LatentConsistencyModelImg2ImgPipeline LatentConsistencyModelPipeline LattePipeline PIAPipeline
        PaintByExamplePipeline PixArtAlphaPipeline PixArtSigmaPipeline SanaControlNetPipeline SanaImageToVideoPipeline
        SanaPipeline SanaVideoPipeline StableAudioPipeline StableDiffusionAdapterPipeline
        StableDiffusionControlNetImg2ImgPipeline StableDiffusionControlNetInpaintPipeline
        StableDiffusionControlNetPipeline StableDiffusionControlNetXSPipeline StableDiffusionDepth2ImgPipeline
        StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline StableDiffusionImageVariationPipeline
        StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline StableDiffusionInpaintPipelineLegacy
        StableDiffusionLDM3DPipeline StableDiffusionLatentUpscalePipeline StableDiffusionModelEditingPipeline
        StableDiffusionPipeline StableDiffusionUpscalePipeline StableDiffusionXLAdapterPipeline
        StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline
        StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetUnionImg2ImgPipeline
        StableDiffusionXLControlNetUnionInpaintPipeline StableDiffusionXLControlNetUnionPipeline
        StableDiffusionXLControlNetXSPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
        StableDiffusionXLPipeline TextToVideoSDPipeline VQDiffusionPipeline VersatileDiffusionImageVariationPipeline
        VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline
        """,
    ),
    **_named(
        Family(Guidance.HALVES_POSITIVE_FIRST),
        """
        AceStepPipeline LuminaPipeline OmniGenPipeline
        """,
    ),
    **_named(
        Family(Guidance.CALLS),
        """
        ChronoEditPipeline Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline Cosmos2_5_PredictBasePipeline
        Cosmos2_5_TransferPipeline CosmosTextToWorldPipeline CosmosVideoToWorldPipeline HeliosPipeline
        Kandinsky5I2IPipeline Kandinsky5I2VPipeline Kandinsky5T2IPipeline Kandinsky5T2VPipeline LucyEditPipeline
        SkyReelsV2ImageToVideoPipeline SkyReelsV2Pipeline WanAnimatePipeline WanImageToVideoPipeline WanPipeline
        WanVACEPipeline WanVideoToVideoPipeline
        """,
    ),
    # For Stable Video Diffusion the original goes on with the second half, which is the image's branch, although it
    # calls these embeddings negative. In the other pipelines the image also enters outside cross-attention, and the
    # negative half has zeros there.
    **_named(
        Family(branch="positive"),
        """
        I2VGenXLPipeline StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline StableVideoDiffusionPipeline
        """,
    ),
    **_named(
        Family(Guidance.PARTS),
        """
        AnimateDiffPAGPipeline CycleDiffusionPipeline HunyuanDiTPAGPipeline KolorsPAGPipeline
        LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL PixArtSigmaPAGPipeline SanaPAGPipeline
        SemanticStableDiffusionPipeline StableDiffusionControlNetPAGInpaintPipeline
        StableDiffusionControlNetPAGPipeline StableDiffusionInstructPix2PixPipeline StableDiffusionPAGImg2ImgPipeline
        StableDiffusionPAGInpaintPipeline StableDiffusionPAGPipeline StableDiffusionPipelineSafe
        StableDiffusionXLControlNetPAGImg2ImgPipeline StableDiffusionXLControlNetPAGPipeline
        StableDiffusionXLInstructPix2PixPipeline StableDiffusionXLPAGImg2ImgPipeline
        StableDiffusionXLPAGInpaintPipeline StableDiffusionXLPAGPipeline
        """,
    ),
    **_named(
        Family(Guidance.NONE),
        """
        MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline SanaSprintImg2ImgPipeline
        SanaSprintPipeline
        """,
    ),
    # The text joins self-attention, so the gate drops only guidance.
    **_named(Family(Guidance.CALLS, begins_guided=True), "QwenImage21Pipeline"),
    **_named(
        Family(),
        """
        AnyFlowPipeline AuraFlowPipeline BriaFiboEditPipeline BriaFiboPipeline BriaPipeline CogVideoXFunControlPipeline
        CogVideoXImageToVideoPipeline CogVideoXPipeline CogVideoXVideoToVideoPipeline CogView3PlusPipeline
        ConsisIDPipeline EasyAnimateControlPipeline EasyAnimateInpaintPipeline EasyAnimatePipeline ErnieImagePipeline
        HiDreamImagePipeline IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline
        IFInpaintingSuperResolutionPipeline IFPipeline IFSuperResolutionPipeline JoyImageEditPlusPipeline
        KandinskyImg2ImgPipeline KandinskyInpaintPipeline KandinskyPipeline KandinskyPriorPipeline
        KandinskyV22ControlnetImg2ImgPipeline KandinskyV22ControlnetPipeline KandinskyV22Img2ImgPipeline
        KandinskyV22InpaintPipeline KandinskyV22Pipeline KandinskyV22PriorEmb2EmbPipeline KandinskyV22PriorPipeline
        MochiPipeline PRXPipeline PRXPixelPipeline SanaWMPipeline ShapEImg2ImgPipeline ShapEPipeline
        StableAudio3Pipeline StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3ControlNetPipeline
        StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
        """,
    ),
    **_named(
        Family(Guidance.HALVES_POSITIVE_FIRST),
        """
        DiTPipeline StableCascadeDecoderPipeline StableCascadePriorPipeline WuerstchenDecoderPipeline
        WuerstchenPriorPipeline
        """,
    ),
    **_named(
        Family(Guidance.HALVES_THEN_CALLS),
        """
        LTX2ConditionPipeline LTX2HDRPipeline LTX2ImageToVideoPipeline LTX2InContextPipeline LTX2Pipeline
        StableDiffusion3Pipeline
        """,
    ),
    **_named(
        Family(Guidance.CALLS),
        """
        BriaFibo2Pipeline ChromaImg2ImgPipeline ChromaInpaintPipeline ChromaPipeline CogView4ControlPipeline
        CogView4Pipeline Cosmos3OmniPipeline Flux2KleinInpaintPipeline Flux2KleinPipeline FluxControlNetPipeline
        FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline FluxKontextPipeline FluxPipeline
        GlmImagePipeline HunyuanImagePipeline HunyuanImageRefinerPipeline HunyuanSkyreelsImageToVideoPipeline
        HunyuanVideo15ImageToVideoPipeline HunyuanVideo15Pipeline HunyuanVideoFramepackPipeline
        HunyuanVideoImageToVideoPipeline HunyuanVideoPipeline JoyImageEditPipeline Kandinsky6TI2VAPipeline
        Krea2Pipeline LongCatAudioDiTPipeline LongCatImageEditPipeline LongCatImagePipeline Lumina2Pipeline
        MotifVideoImage2VideoPipeline MotifVideoPipeline NucleusMoEImagePipeline OvisImagePipeline 
        QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline QwenImageEditInpaintPipeline
        QwenImageEditPipeline QwenImageEditPlusPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline
        QwenImageLayeredPipeline QwenImagePipeline
        """,
    ),
    **_named(
        Family(Guidance.LISTS),
        """
        ZImageControlNetInpaintPipeline ZImageControlNetPipeline ZImageImg2ImgPipeline ZImageInpaintPipeline
        ZImageOmniPipeline ZImagePipeline
        """,
    ),
}


# Pipelines that `apply_tgate` refuses, each with the reason why the gate can leave nothing out.
REFUSED = {
    **_named(
        "it differentiates its cross-attention maps in every step",
        """
        StableDiffusionAttendAndExcitePipeline StableDiffusionPix2PixZeroPipeline
        """,
    ),
    "StableDiffusionPanoramaPipeline": "it evaluates the denoiser for one view after the other in each step",
    "StableDiffusionParadigmsPipeline": "it denoises many steps in one batch",
    "StableDiffusionSAGPipeline": "it evaluates the denoiser again on a blurred picture in every step",
    **_named(
        "its frames are at different steps of denoising",
        """
        SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingPipeline
        SkyReelsV2DiffusionForcingVideoToVideoPipeline
        """,
    ),
    **_named(
        "it runs parts of the loop several times, with different numbers of frames",
        """
        TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline
        """,
    ),
    **_named(
        "it does no guidance in its loop, and its text joins self-attention, so there is nothing to leave out",
        """
        Flux2KleinKVPipeline Flux2Pipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline
        FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxControlPipeline FluxFillPipeline
        Kandinsky6SRPipeline LTX2DFRPipeline LTX2DFRTemporalRefinePipeline StableAudio3AudioToAudioPipeline
        StableAudio3InpaintPipeline VisualClozeGenerationPipeline VisualClozePipeline
        """,
    ),
    **_named(
        "its guidance has three parts, and its text joins self-attention",
        """
        StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline
        """,
    ),
    **_named(
        "it does no guidance, and has no cross-attention to a prompt",
        """
        ConsistencyModelPipeline DDIMPipeline DDPMPipeline DanceDiffusionPipeline DreamLiteMobilePipeline
        KarrasVePipeline LDMPipeline LDMSuperResolutionPipeline PNDMPipeline RFD4ProteinaPipeline RePaintPipeline
        ScoreSdeVePipeline
        """,
    ),
    **_named(
        "its loops belong to other pipelines: gate `pipe.prior_pipe` and `pipe.decoder_pipe`, and call these",
        """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
        KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22InpaintCombinedPipeline
        StableCascadeCombinedPipeline WuerstchenCombinedPipeline
        """,
    ),
    **_named(
        "it denoises text in blocks, each with as many steps as it needs",
        """
        DiffusionGemmaPipeline LLaDA2Pipeline
        """,
    ),
    **_named(
        "it has no denoising loop of its own",
        """
        FluxPriorReduxPipeline LTX2LatentUpsamplePipeline LTX2VideoDiffusionDecodePipeline LTXLatentUpsamplePipeline
        VersatileDiffusionPipeline
        """,
    ),
    **_named(
        "its cross-attention attends to the sound itself, which changes in every step",
        """
        AudioLDMPipeline MusicLDMPipeline
        """,
    ),
    "AnyFlowFARPipeline": "it keeps keys and values of both branches from one chunk of frames to the next",
    "HeliosPyramidPipeline": "it denoises in stages, each with a short loop of its own",
    "SanaWMLTX2Refiner": "it refines the video of another pipeline, without guidance",
    **_named(
        "its loops have schedulers of their own, and none is `pipe.scheduler`",
        """
        UnCLIPImageVariationPipeline UnCLIPPipeline
        """,
    ),
    "UniDiffuserPipeline": "its negative branch is fresh noise in every step",
    "StableDiffusionGLIGENTextImagePipeline": (
        "it evaluates the denoiser twice in a step, with its grounding and without"
    ),
    "VersatileDiffusionDualGuidedPipeline": (
        "it does not run in diffusers 0.42, whose blocks do not take its arguments"
    ),
    "LTXI2VLongMultiPromptPipeline": (
        "it gives its callback other latents than it takes back, so no callback can be passed"
    ),
    "Ideogram4Pipeline": "its negative branch is a separate network, with a sequence of another length",
}
