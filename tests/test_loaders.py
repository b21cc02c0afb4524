"""The original package's loaders: its documentation's snippets, and a pipeline that stays as it was."""

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from recorded import load_case
from tiny import fingerprint, tiny

import tgate_processors as tg
from tgate_processors import ConfigError, StateError, TGateConfig, UnsupportedPipelineError, apply_tgate


LOADERS = {
    "sd": tg.TgateSDLoader,
    "sd-2.1": tg.TgateSDLoader,
    "sdxl": tg.TgateSDXLLoader,
    "lcm-sdxl": tg.TgateSDXLLoader,
    "pixart-alpha": tg.TgatePixArtAlphaLoader,
    "pixart-sigma": tg.TgatePixArtSigmaLoader,
    "lcm-pixart": tg.TgatePixArtLoader,
    "svd": tg.TgateSVDLoader,
    "sd+deepcache": tg.TgateSDDeepCacheLoader,
    "sdxl+deepcache": tg.TgateSDXLDeepCacheLoader,
}


def subject_of(name):
    return tiny(name.split("+")[0])


@pytest.mark.parametrize("name", LOADERS)
def test_the_pipeline_stays_as_it_was(name):
    subject = subject_of(name)
    before, traces = subject(), fingerprint(subject.denoiser)
    pipe = LOADERS[name](subject.pipe, gate_step=2, num_inference_steps=4).to("cpu")
    assert pipe is subject.pipe
    assert fingerprint(subject.denoiser) == traces
    kwargs = subject.kwargs()
    del kwargs["num_inference_steps"]
    gated = pipe.tgate(**kwargs, return_dict=False)[0]
    assert fingerprint(subject.denoiser) == traces
    assert torch.equal(subject(), before)
    assert not torch.equal(gated, before)


@pytest.mark.parametrize(
    ("name", "case", "variant"),
    [
        ("sd", "sd_ddim_b1", "v1:g5"),
        ("sdxl", "sdxl_euler_b1", "v2:g8_sp3_fi1_wu2"),
        ("lcm-sdxl", "sdxl_lcm_b1", "v1:g1_lcm"),
        ("pixart-alpha", "pixart_dpm_b1", "v2:g8_sp5_fi2_wu2"),
        ("pixart-sigma", "sigma_dpm_b1", "v2:g8_sp3_fi2_wu2"),
        ("lcm-pixart", "pixart_lcm_b1", "v1:g2_lcm"),
        ("svd", "svd_euler_b1", "v2:g5_sp3_fi2_wu1"),
        ("sd+deepcache", "sd_dc_ddim_b2", "v1dc:g5_i3b0"),
        ("sdxl+deepcache", "sdxl_dc_euler_b1", "v2dc:g6_sp3_fi1_wu2_i3b0"),
    ],
)
def test_the_call_is_the_originals(name, case, variant):
    case = load_case(case)
    asked = case.variants[variant]["tgate"]
    pipe = LOADERS[name](case.pipe())
    ours = pipe.tgate(**case.kwargs(), **asked, return_dict=False)[0]
    theirs = case.tensors[f"out.{variant}"]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_what_the_loader_was_given_is_the_default():
    subject = tiny("sd")
    kwargs = subject.kwargs()
    del kwargs["num_inference_steps"]
    pipe = tg.TgateSDLoader(subject.pipe, gate_step=2, num_inference_steps=4)
    by_default = pipe.tgate(**kwargs).images
    assert torch.equal(by_default, pipe.tgate(**kwargs, gate_step=2, num_inference_steps=4).images)
    assert not torch.equal(by_default, pipe.tgate(**kwargs, gate_step=1).images)
    assert not torch.equal(by_default, pipe.tgate(**kwargs, num_inference_steps=5).images)


def test_a_positional_prompt_goes_to_the_pipeline():
    subject = tiny("sd")
    pipe = tg.TgateSDLoader(subject.pipe, gate_step=2, num_inference_steps=4)
    with pytest.raises(ValueError, match="Cannot forward both `prompt`"):  # the pipeline's own words
        pipe.tgate("a fox", **subject.kwargs(num_inference_steps=4))


def test_a_callback_beside_the_gate():
    steps = []

    def mine(pipe, step_index, timestep, kwargs):
        steps.append(step_index)
        return kwargs

    subject = tiny("sd")
    pipe = tg.TgateSDLoader(subject.pipe, gate_step=2)
    pipe.tgate(**subject.kwargs(num_inference_steps=4), callback_on_step_end=mine)
    assert steps == [0, 1, 2, 3]


def test_an_official_callback_beside_the_gate():
    subject = tiny("sd")
    pipe = tg.TgateSDLoader(subject.pipe, gate_step=3)
    cut_off = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    batches = []
    subject.denoiser.conv_in.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    pipe.tgate(**subject.kwargs(num_inference_steps=5), callback_on_step_end=cut_off)
    assert batches == [2, 2, 1, 1, 1]


def test_playground_statistics_of_latents_are_kept():
    """Playground v2.5 is SDXL with a VAE that has latents' mean and deviation; a copied `__call__` missed that."""
    pictures = {}
    for statistics in (None, [0.5, -0.5, 0.25, 0.0]):
        subject = tiny("sdxl")
        if statistics is not None:
            subject.pipe.vae.register_to_config(latents_mean=statistics, latents_std=[2.0, 1.0, 1.5, 1.0])
        pipe = tg.TgateSDXLLoader(subject.pipe, gate_step=9)
        kwargs = subject.kwargs(num_inference_steps=2, output_type="pt", guidance_scale=3.0)
        with pytest.warns(UserWarning, match="the gate never closed"):
            pictures[statistics is None] = pipe.tgate(**kwargs).images
        assert torch.equal(pictures[statistics is None], pipe(**subject.kwargs() | kwargs).images)
    assert not torch.allclose(pictures[True], pictures[False])


class TestDocumentation:
    """The snippets of the original's documentation, with the import and the model's path changed."""

    def kwargs(self, subject, *names):
        """Tiny models have no text encoders: embeddings stand in for the prompt."""
        recorded = subject.kwargs()
        keep = {"prompt_attention_mask", "height", "width", "use_resolution_binning", "clean_caption", *names}
        return {k: v for k, v in recorded.items() if k in keep or "embeds" in k or "negative" in k} | {
            "output_type": "latent"
        }

    def test_pixart_alpha(self):
        subject = tiny("pixart-alpha")
        pipe = subject.pipe
        from tgate_processors import TgatePixArtAlphaLoader

        gate_step, sp_interval, fi_interval, warm_up, inference_step = 15, 3, 1, 2, 25
        pipe = TgatePixArtAlphaLoader(pipe).to("cpu")
        image = pipe.tgate(
            **self.kwargs(subject),
            gate_step=gate_step,
            sp_interval=sp_interval,
            fi_interval=fi_interval,
            warm_up=warm_up,
            num_inference_steps=inference_step,
        ).images[0]
        assert image.isfinite().all()

    def test_pixart_of_the_first_version(self):
        subject = tiny("pixart-alpha")
        from tgate_processors import TgatePixArtLoader

        pipe = TgatePixArtLoader(subject.pipe, gate_step=8, num_inference_steps=25).to("cpu")
        assert pipe.tgate(**self.kwargs(subject)).images[0].isfinite().all()

    def test_pixart_sigma(self):
        subject = tiny("pixart-sigma")
        from tgate_processors import TgatePixArtSigmaLoader

        pipe = TgatePixArtSigmaLoader(subject.pipe).to("cpu")
        image = pipe.tgate(
            **self.kwargs(subject),
            gate_step=15,
            sp_interval=3,
            fi_interval=1,
            warm_up=2,
            num_inference_steps=25,
        ).images[0]
        assert image.isfinite().all()

    def test_sdxl(self):
        subject = tiny("sdxl")
        pipe = subject.pipe
        from tgate_processors import TgateSDXLLoader

        pipe = TgateSDXLLoader(pipe).to("cpu")
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        image = pipe.tgate(
            **self.kwargs(subject),
            gate_step=10,
            sp_interval=5,
            fi_interval=1,
            warm_up=2,
            num_inference_steps=25,
        ).images[0]
        assert image.isfinite().all()

    def test_sdxl_with_deepcache(self):
        subject = tiny("sdxl")
        pipe = subject.pipe
        from tgate_processors import TgateSDXLDeepCacheLoader

        pipe = TgateSDXLDeepCacheLoader(pipe, cache_interval=3, cache_branch_id=0).to("cpu")
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        image = pipe.tgate(
            **self.kwargs(subject),
            gate_step=10,
            sp_interval=1,
            fi_interval=1,
            warm_up=0,
            num_inference_steps=25,
        ).images[0]
        assert image.isfinite().all()

    def test_sd_with_deepcache(self):
        subject = tiny("sd")
        from tgate_processors import TgateSDDeepCacheLoader

        pipe = TgateSDDeepCacheLoader(pipe=subject.pipe, cache_interval=3, cache_branch_id=0).to("cpu")
        image = pipe.tgate(**self.kwargs(subject), gate_step=10, num_inference_steps=25).images[0]
        assert image.isfinite().all()

    def test_lcm_sdxl(self):
        subject = tiny("lcm-sdxl")
        pipe = subject.pipe
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        from tgate_processors import TgateSDXLLoader

        pipe = TgateSDXLLoader(pipe, lcm=True).to("cpu")
        image = pipe.tgate(
            **self.kwargs(subject),
            gate_step=1,
            sp_interval=1,
            fi_interval=1,
            warm_up=0,
            num_inference_steps=4,
        ).images[0]
        assert image.isfinite().all()

    def test_lcm_pixart(self):
        subject = tiny("lcm-pixart")
        from tgate_processors import TgatePixArtLoader

        pipe = TgatePixArtLoader(subject.pipe, lcm=True).to("cpu")
        image = pipe.tgate(
            **self.kwargs(subject), gate_step=1, lcm=True, num_inference_steps=4, guidance_scale=0.0
        ).images[0]
        assert image.isfinite().all()

    def test_svd(self):
        subject = tiny("svd")
        from tgate_processors import TgateSVDLoader

        pipe = TgateSVDLoader(subject.pipe).to("cpu")
        kwargs = self.kwargs(subject, "num_frames") | {"decode_chunk_size": 8, "generator": torch.manual_seed(42)}
        frames = pipe.tgate(
            subject.kwargs()["image"],
            **kwargs,
            gate_step=10,
            sp_interval=5,
            fi_interval=1,
            warm_up=2,
            num_inference_steps=25,
        ).frames[0]
        assert frames.isfinite().all()


def test_lcm_on_a_run_with_guidance():
    subject = tiny("sd")
    pipe = tg.TgateSDLoader(subject.pipe, gate_step=2, lcm=True)
    with pytest.raises(
        ConfigError, match=r"`lcm` must be False in a run with guidance, got True with a .* of 5\.0\. Leave"
    ):
        pipe.tgate(**subject.kwargs())
    pipe.tgate(**subject.kwargs(guidance_scale=1.0))


def test_a_gate_past_the_run_is_said():
    subject = tiny("sd")
    stock = subject(num_inference_steps=4)
    pipe = tg.TgateSDLoader(subject.pipe)
    with pytest.warns(
        UserWarning, match=r"below the number of steps, got 9 of 4: the gate never closed. Pass `gate_step=0.4`"
    ):
        image = pipe.tgate(**subject.kwargs(num_inference_steps=4), gate_step=9).images
    assert torch.equal(image, stock)


def test_a_callback_that_the_pipeline_would_swallow():
    subject = tiny("pixart-alpha")
    pipe = tg.TgatePixArtLoader(subject.pipe, gate_step=2)
    with pytest.raises(ConfigError, match="must be left out, since PixArtAlphaPipeline takes none"):
        pipe.tgate(**subject.kwargs(), callback_on_step_end=lambda *_: {})


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("wrong", [{"gate_step": 0}, {"num_inference_steps": 0}])
def test_a_bad_default_leaves_no_method(name, wrong):
    pipe = subject_of(name).pipe
    with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}` must be a whole number of at least 1, .*got 0"):
        LOADERS[name](pipe, **wrong)
    assert not hasattr(pipe, "tgate")


def test_a_pipeline_that_cannot_be_gated_leaves_no_method():
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32)), diffusers.DDPMScheduler()
    )
    with pytest.raises(UnsupportedPipelineError):
        tg.TgateSDLoader(pipe)
    assert not hasattr(pipe, "tgate")


def test_a_pipeline_that_is_gated_already():
    subject = tiny("sd")
    apply_tgate(subject.pipe, TGateConfig(gate_step=2))
    with pytest.raises(StateError, match="must not be gated already"):
        tg.TgateSDLoader(subject.pipe)
