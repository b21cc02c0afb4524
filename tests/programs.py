"""What programs are made of: seven kinds of pipelines, calls of them, and what fresh ones answer."""

import copy
from dataclasses import dataclass, field, replace
from functools import cache, partial

import diffusers
import torch
import zoo_motion  # noqa: F401  # registers its pipelines
import zoo_transformers  # noqa: F401  # registers its pipelines
import zoo_unets  # noqa: F401  # registers its pipelines
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from zoo import ENTRIES, seeded

from tgate_processors import TGateConfig, apply_tgate
from tgate_processors._layers import attention_layers
from tgate_processors._pipelines import denoisers_of, side_networks_of, takes_callback


CONFIGS = [
    TGateConfig(gate_step=2),
    TGateConfig(gate_step=1),
    TGateConfig(gate_step=3, branch="positive"),
    TGateConfig(gate_step=0.5, fi_interval=2),
    TGateConfig(gate_step=3, sp_interval=2, fi_interval=2),
    TGateConfig(gate_step=1, offload_cache=True),
    TGateConfig(gate_step=2, sp_interval=2, offload_cache=True),
    TGateConfig(gate_step=2, look_interval=2),
    TGateConfig(gate_step=1, look_interval=2, fi_interval=2, branch="negative"),
    TGateConfig(gate_step="auto", tolerance=0.99),  # closes as soon as it may
    TGateConfig(gate_step="auto", look_interval=2, tolerance=0.3),
    TGateConfig(gate_step=99),
    TGateConfig(gate_step=99, sp_interval=2),
]
OF_STABLE_DIFFUSION = (
    partial(diffusers.DDIMScheduler, steps_offset=1, clip_sample=False),
    partial(diffusers.EulerDiscreteScheduler, steps_offset=1),
    partial(diffusers.PNDMScheduler, steps_offset=1, skip_prk_steps=True),
    partial(diffusers.HeunDiscreteScheduler, steps_offset=1),
    partial(diffusers.UniPCMultistepScheduler, steps_offset=1),
)
OF_VIDEOS = {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
OF_FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DIFFUSERS_PROCESSORS = (AttnProcessor2_0, AttnProcessor)


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline.

    Args:
        name: Of its entry in the zoo.
        settings: Arguments by which its calls differ: guidance, perturbed attention, what is given to a ControlNet.
        schedulers: What makes each of its schedulers.
        processors: Classes of attention processors that it works with, the default first.
        fewest: Steps that the stock pipeline can do.
    """

    name: str
    settings: tuple[dict, ...] = ({"guidance_scale": 5.0}, {"guidance_scale": 1.0})
    schedulers: tuple = OF_STABLE_DIFFUSION
    processors: tuple = DIFFUSERS_PROCESSORS
    fewest: int = 1

    def __hash__(self):
        return hash(self.name)

    def __repr__(self):
        return self.name

    @property
    def perturbs(self):
        """Whether its runs put processors of their own on the denoiser, and take them off at their end."""
        return "PAG" in self.name

    def build(self, scheduler=0, processors=0):
        """A fresh pipeline, always with the same weights."""
        pipe = seeded(ENTRIES[self.name].build)
        pipe.scheduler = self.schedulers[scheduler]()
        for network in networks_of(pipe) if processors else ():
            network.set_attn_processor(self.processors[processors]())
        return pipe


KINDS = [
    Kind("StableDiffusionPipeline"),
    Kind("StableDiffusionXLPipeline"),
    Kind(
        "PixArtAlphaPipeline",
        schedulers=(diffusers.DPMSolverMultistepScheduler, *OF_STABLE_DIFFUSION),
        fewest=2,
    ),
    Kind(
        "StableVideoDiffusionPipeline",
        settings=({"max_guidance_scale": 3.0}, {"max_guidance_scale": 1.0}),
        schedulers=(
            partial(diffusers.EulerDiscreteScheduler, **OF_VIDEOS),
            partial(diffusers.HeunDiscreteScheduler, **OF_VIDEOS),
            partial(diffusers.DDIMScheduler, **OF_VIDEOS),
        ),
    ),
    Kind(
        "StableDiffusionControlNetPipeline",
        settings=({"guidance_scale": 5.0}, {"guidance_scale": 1.0}, {"guidance_scale": 5.0, "guess_mode": True}),
    ),
    Kind(
        "WanPipeline",
        schedulers=(
            partial(diffusers.UniPCMultistepScheduler, **OF_FLOWS),
            partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0),
        ),
        processors=(WanAttnProcessor, WanAttnProcessor),
    ),
    Kind(
        "StableDiffusionPAGPipeline",
        settings=(
            {"guidance_scale": 5.0, "pag_scale": 2.0},
            {"guidance_scale": 1.0, "pag_scale": 2.0},
            {"guidance_scale": 5.0, "pag_scale": 0.0},
            {"guidance_scale": 1.0, "pag_scale": 0.0},
        ),
    ),
]


@dataclass(frozen=True)
class Call:
    """A call of a pipeline.

    Args:
        steps: How many.
        pictures: How many.
        setting: Which of its kind's.
        wide: Whether the pictures are twice as wide.
    """

    steps: int
    pictures: int = 1
    setting: int = 0
    wide: bool = False

    def of(self, kind):
        """The same for a kind that has not so many settings, or needs more steps."""
        return replace(self, steps=max(self.steps, kind.fewest), setting=self.setting % len(kind.settings))

    def kwargs(self, kind):
        kwargs = ENTRIES[kind.name].call(list(range(self.pictures))) | kind.settings[self.setting]
        if self.wide:
            kwargs["width"] *= 2
            kwargs["latents"] = torch.cat([kwargs["latents"], kwargs["latents"].flip(-1)], -1)
        return kwargs | {"num_inference_steps": self.steps}

    def perturbs(self, kind):
        return kind.settings[self.setting].get("pag_scale", 0.0) > 0


@dataclass
class Step:
    """A callback of one's own: `does(pipe, step)` after every step."""

    does: object
    tensor_inputs: list = field(default_factory=list)

    def __call__(self, pipe, step, timestep, kwargs):
        self.does(pipe, step)
        return kwargs


def draw(pipe, kwargs, tgate=None, does=None, passed="alone"):
    """What a pipeline draws.

    Args:
        pipe: The pipeline.
        kwargs: Of the call.
        tgate: Its handle, if it is gated.
        does: A function that is called with the pipeline and the step after every step.
        passed: How the handle is: "alone", "before" or "after" the other callback, or it is "forgotten".
    """
    torch.manual_seed(0)
    mine = None if does is None else Step(does)
    if not takes_callback(pipe):
        if does is not None:
            kwargs["callback"] = lambda step, timestep, latents: does(pipe, step)
    elif tgate is None or passed == "forgotten":
        if mine is not None:
            kwargs["callback_on_step_end"] = mine
    elif mine is None or passed == "alone":
        tgate.callback_on_step_end = mine
        kwargs["callback_on_step_end"] = tgate
    else:
        tgate.callback_on_step_end = None
        both = [tgate, mine] if passed == "before" else [mine, tgate]
        kwargs["callback_on_step_end"] = MultiPipelineCallbacks(both)
    return pipe(**kwargs)[0]


def networks_of(pipe):
    """Its denoiser and its ControlNet."""
    return [*denoisers_of(pipe), *side_networks_of(pipe)]


def part_of(pipe):
    """The name of its denoiser."""
    return "unet" if hasattr(pipe, "unet") else "transformer"


def sibling(pipe, scheduler):
    """Another pipeline of the same networks."""
    other = type(pipe).from_pipe(pipe, scheduler=scheduler, torch_dtype=None)
    other.set_progress_bar_config(disable=True)
    return other


def twin(pipe):
    """A copy of a pipeline."""
    copied = copy.deepcopy(pipe)
    copied.set_progress_bar_config(disable=True)
    return copied


def held_by(network):
    """The processors of a network."""
    return {name: layer.processor for name, layer in attention_layers(network).items()}


def first_of(network):
    """Its first layer."""
    return next(module for name, module in network.named_modules() if name in ("conv_in", "pos_embed", "rope"))


def middle_of(network):
    """An attention layer."""
    return list(attention_layers(network).values())[1]


def last_of(network):
    """Its last layer."""
    return next(module for name, module in network.named_modules() if name in ("conv_out", "proj_out"))


# What fresh pipelines answer


@dataclass(frozen=True)
class Picture:
    """All that a picture depends on.

    Args:
        kind: Of the pipeline.
        scheduler: Which of the kind's.
        processors: Which of the kind's.
        call: The call.
        config: Which of `CONFIGS` the pipeline is gated with, if any.
        end: How and after which step the run is ended by a callback, if at all: "cancel" or "remove".
    """

    kind: Kind
    scheduler: int
    processors: int
    call: Call
    config: int | None = None
    end: tuple[str, int] | None = None

    @property
    def is_too_short(self):
        """Whether the run is refused, since it leaves no time to measure."""
        return self.config is not None and CONFIGS[self.config].gate_step == "auto" and self.call.steps < 5


@cache
def fresh(picture):
    """The latents that a fresh pipeline draws."""
    return _drawn(picture)[0]


@cache
def fresh_summary(picture):
    """What a fresh pipeline's handle says of it."""
    return str(_drawn(picture)[1].summary())


def _drawn(picture):
    pipe = picture.kind.build(picture.scheduler, picture.processors)
    tgate = None if picture.config is None else apply_tgate(pipe, CONFIGS[picture.config])

    def does(pipe, step):
        if picture.end is not None and picture.end[1] == step:
            end(picture.end[0], pipe, tgate)

    return draw(pipe, picture.call.kwargs(picture.kind), tgate, does), tgate


def end(how, pipe, tgate):
    """End a run in a callback: cancel it, or remove the gate."""
    if how == "cancel":
        pipe._interrupt = True
    elif tgate is not None:
        tgate.remove()


@cache
def inputs_of(kind, setting):
    """What each network of a kind is called with in the first step of a run of two pictures."""
    pipe, given = kind.build(), {}

    def note(network, args, kwargs):
        given.setdefault(network, (args, kwargs))

    hooks = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks_of(pipe)]
    draw(pipe, Call(kind.fewest, 2, setting).kwargs(kind))
    for hook in hooks:
        hook.remove()
    return [given[network] for network in networks_of(pipe)]


def answer(pipe, kind, number, timestep, setting=0):
    """What network `number` of a pipeline of a kind answers, called on its own at a timestep.

    The batch is that of a run with the setting.
    """
    args, kwargs = inputs_of(kind, setting)[number]
    if "timestep" in kwargs:
        kwargs = kwargs | {"timestep": _shaped(timestep, kwargs["timestep"])}
    else:
        args = (args[0], _shaped(timestep, args[1]), *args[2:])
    with torch.no_grad():
        output = networks_of(pipe)[number](*args, **kwargs)
    output = output if isinstance(output, tuple) else tuple(output.values())
    return [part for item in output for part in (item if isinstance(item, tuple | list) else [item])]


def _shaped(timestep, given):
    return timestep.expand(given.shape) if isinstance(given, torch.Tensor) and given.ndim else timestep


@cache
def fresh_answer(kind, processors, number, timestep, within=None):
    """What `answer` gives of a fresh pipeline, or of one that is in a run with the setting `within`."""
    pipe = kind.build(0, processors)
    timestep = torch.tensor(timestep)
    if within is None:
        return answer(pipe, kind, number, timestep)
    answers = []
    call = Call(max(2, kind.fewest), 1, within).kwargs(kind)
    draw(pipe, call, does=lambda *_: answers.append(answer(pipe, kind, number, timestep, within)))
    return answers[0]


def is_equal(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))
