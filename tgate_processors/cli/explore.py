"""The page of `tgate-processors explore`, which draws a prompt with the stock and with the gated pipeline."""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils import pt_to_pil
from PIL import Image
from torch import Tensor

from tgate_processors._validation import require_whole
from tgate_processors.errors import ConfigError, MissingPackageError, StateError, TGateError
from tgate_processors.measure.pair import Asked, Pair, Stock, Tell, draw_pair
from tgate_processors.measure.quality import OWN
from tgate_processors.measure.samplers import SAMPLERS, sampler_on
from tgate_processors.schedule import TGateConfig


HOST = "127.0.0.1"  # other machines do not reach the page
MOST_STEPS, MOST_LOOKS = 50, 12
LEAST_WIDTH = 384  # pixels of a picture on the page, since the embedded models draw only 64
LABELS = {"text": "prompt", "num_inference_steps": "steps"}  # the page's labels for Python arguments


def require_port(port: int) -> None:
    """Raise `ConfigError` unless the port is free."""
    require_whole("--port", port, least=1)
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"`--port` must be a free port here, got {port}: {error}. Pass another.") from error


@contextmanager
def gradio() -> Iterator[Any]:
    """Import `gradio` with its analytics off, and delete its files when the context ends.

    Raises:
        MissingPackageError: `gradio` is not installed.
    """
    with TemporaryDirectory() as files:
        # gradio reads these during its import, and when it makes components
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=files)
        try:
            import gradio
        except ImportError as error:
            raise MissingPackageError(
                "`gradio` must be installed for the page. Run `pip install 'tgate-processors[explore]'`."
            ) from error
        yield gradio


class Drawer:
    """Drawer of the page's pictures, one pair at a time, until it is closed.

    It keeps the last stock run, which need not run again while only the gate changes.

    Args:
        pipe: Pipeline that makes images, without a gate.
        call: Arguments of the pipeline's call, such as `guidance_scale`.
        config: Settings of the gate. The page replaces the gate step and the look interval.
        check_prompt: Function that raises `ValueError` for a prompt that the model does not know. None accepts any.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        call: Mapping[str, Any],
        config: TGateConfig,
        check_prompt: Callable[[str], object] | None = None,
    ) -> None:
        self.pipe = pipe
        self.config = config
        self._call = call
        self._check_prompt = check_prompt
        self._last: Stock | None = None
        self._drawing = threading.Lock()
        self._closed = False

    def draw(
        self, prompt: str, steps: int, sampler: str, seed: int, gate_step: int, look_interval: int, *, tell: Tell
    ) -> tuple[Image.Image, Image.Image, str, Any]:
        """Return the stock picture, the gated picture, their figures as Markdown, and the plot of the convergence.

        Raises:
            ValueError: A setting breaks its rule. The library's own errors are `ConfigError`.
            StateError: The drawer is closed.
        """
        if not prompt.strip():
            raise ConfigError("`prompt` must say what to draw, got nothing. Write a prompt.")
        if self._check_prompt is not None:
            self._check_prompt(prompt)
        asked = Asked(prompt, steps, self._call, None if sampler == OWN else sampler, seed)
        looks = look_interval if look_interval > 1 else None
        config = replace(self.config, gate_step=gate_step, look_interval=looks)

        def tell_unless_closed(part: float, name: str) -> None:
            self._check_is_open()
            tell(part, name)

        with self._drawing:
            self._check_is_open()
            pair = draw_pair(self.pipe, asked, config, last=self._last, tell=tell_unless_closed)
            self._last = pair.stock
            return _enlarged(pair.stock.picture), _enlarged(pair.picture), told(pair), pair.plot()

    def _check_is_open(self) -> None:
        if self._closed:
            raise StateError("The page has ended, so it draws nothing more.")

    def close(self) -> None:
        """Stop the current drawing after its current evaluation, and refuse further ones."""
        self._closed = True
        with self._drawing:
            pass


def serve(gr: Any, page: Any, drawer: Drawer, port: int) -> None:
    """Serve the page to this machine alone until Ctrl-C.

    Args:
        gr: The module that `gradio()` yields.
        page: Page from `build_page`.
        drawer: Drawer of the page's pictures.
        port: Free port.
    """
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        # without fonts from another host
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        drawer.close()  # Python aborts if a thread still computes at its exit
        page.server.should_exit = True  # without a wait, because browsers keep their connections open


def build_page(gr: Any, drawer: Drawer, *, title: str, steps: int, prompts: Sequence[str] = ()) -> Any:
    """Return the page as `gradio.Blocks`.

    Args:
        gr: The module that `gradio()` yields.
        drawer: Drawer of the page's pictures.
        title: Name of the model.
        steps: Number of denoising steps that the page shows first.
        prompts: Example prompts.
    """

    def draw(
        prompt: str,
        steps: int,
        sampler: str,
        seed: int,
        gate_step: int,
        look_interval: int,
        progress: Any = gr.Progress(),  # noqa: B008  # gradio finds its progress bar by this default
    ) -> tuple[Any, ...]:
        def tell(part: float, name: str) -> None:
            progress(part, desc=name)

        try:
            return drawer.draw(prompt, steps, sampler, seed, gate_step, look_interval, tell=tell)
        except (TGateError, ValueError) as error:
            raise gr.Error(_in_labels(str(error)), print_exception=False) from error

    config = drawer.config
    gate_step_at_first = config.schedule(steps).gate_step
    with gr.Blocks(title=f"T-GATE on {title}", fill_width=True) as page:
        gr.Markdown(f"## The stock pipeline and T-GATE, on {title}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(prompts[0] if prompts else "", label="prompt", max_lines=4, autofocus=True)
                button = gr.Button("Draw", variant="primary")
                gate_step = gr.Slider(
                    1,
                    steps,
                    gate_step_at_first,
                    step=1,
                    label="gate step",
                    info="the first step that reuses cross-attention",
                )
                look_interval = gr.Slider(
                    0,
                    MOST_LOOKS,
                    config.look_interval or 0,
                    step=1,
                    label="look interval",
                    info="steps from one look (a step after the gate, in full) to the next; 0 and 1 for no looks",
                )
                steps_slider = gr.Slider(2, max(MOST_STEPS, steps), steps, step=1, label="steps")
                with gr.Row():
                    sampler = gr.Dropdown(_samplers_for(drawer.pipe), value=OWN, label="sampler", min_width=140)
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, min_width=100)
                if prompts:
                    gr.Examples(list(prompts), prompt, label="held-out prompts")
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    settings = {"format": "png", "interactive": False, "min_width": 140, "buttons": ["download"]}
                    stock = gr.Image(label="stock", **settings)
                    gated = gr.Image(label="gated", **settings)
                figures = gr.Markdown()
            with gr.Column(scale=3, min_width=320):
                curve = gr.Plot(label="convergence", show_label=False)
        steps_slider.change(
            lambda steps, gate: gr.Slider(maximum=steps, value=min(gate, steps)),
            [steps_slider, gate_step],
            gate_step,
            queue=False,
            show_progress="hidden",
        )
        gr.on(
            [button.click, prompt.submit, gate_step.release, look_interval.release],
            draw,
            [prompt, steps_slider, sampler, seed, gate_step, look_interval],
            [stock, gated, figures, curve],
            concurrency_limit=1,  # a pipeline cannot run twice at the same time
            trigger_mode="always_last",
            show_progress_on=[stock, gated],
        )
    return page


def told(pair: Pair) -> str:
    """Return what the gate saved and changed, as Markdown."""
    summary = pair.summary
    rows = [  # three columns fit on a phone
        ("", "stock", "gated"),
        ("---",) * 3,
        ("seconds", f"{pair.stock.seconds:.2f}", f"{pair.seconds:.2f}"),
        ("speed-up", "", f"{pair.stock.seconds / pair.seconds:.2f}x"),
        ("GMACs", f"{summary.stock_macs / 1e9:,.2f}", f"{summary.cost.macs / 1e9:,.2f}"),
        ("arithmetic saved", "", f"{summary.macs_saved:.1%}"),
        ("PSNR to stock", "", f"{pair.psnr:.1f} dB"),
        ("SSIM to stock", "", f"{pair.ssim:.3f}"),
    ]
    notes = [*pair.notes, *summary.notes]
    if pair.stock.convergence is None:
        notes.append("There is no curve, because the run has fewer than 5 steps or no cross-attention.")
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*table, "", f"`TGateConfig({pair.config})`", "", *(f"- {note}" for note in notes)])


def _samplers_for(pipe: Any) -> list[str]:
    return [OWN, *(name for name in SAMPLERS if _suits(pipe, name))]


def _suits(pipe: Any, name: str) -> bool:
    try:
        with sampler_on(pipe, name):
            return True
    except ConfigError:
        return False


def _enlarged(picture: Tensor) -> Image.Image:
    image: Image.Image = pt_to_pil(picture * 2 - 1)[0]
    times = max(1, LEAST_WIDTH // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _in_labels(message: str) -> str:
    """Return the message of a Python call with the page's labels for its arguments, as HTML."""
    for name, label in LABELS.items():
        message = message.replace(f"`{name}`", f"`{label}`")
    return escape(message)
