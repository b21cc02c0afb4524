"""The page of `explore`: what it draws, what it says, and that it asks nobody else for anything."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import fingerprint

from tgate_processors import StateError, TGateConfig
from tgate_processors.cli import main
from tgate_processors.cli.explore import Drawer, build_page, gradio, told
from tgate_processors.demo.embedded import load_demo_pipeline
from tgate_processors.demo.world import parse
from tgate_processors.measure.pair import Asked, draw_pair
from tgate_processors.measure.quality import OWN


PROMPT, STEPS = "a large red circle on a blue background", 6
CALL = {"guidance_scale": 5.0}
ASKED = Asked(PROMPT, STEPS, CALL)
GATE = TGateConfig(gate_step=2)


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pair(pipe):
    return draw_pair(pipe, ASKED, GATE)


@pytest.fixture
def drawer(pipe):
    return Drawer(pipe, call=CALL, config=GATE, check_prompt=parse)


def silent(part, name):
    """No progress bar."""


# A pair


def test_a_pair_is_what_the_pipeline_draws_with_and_without_the_gate(pipe, pair):
    def drawn(config):
        noise = torch.Generator().manual_seed(0)
        if config is None:
            return pipe(PROMPT, num_inference_steps=STEPS, generator=noise, output_type="pt", **CALL).images
        return draw_pair(pipe, ASKED, config, last=pair.stock).picture

    assert torch.equal(pair.stock.picture, drawn(None))
    assert torch.equal(pair.stock.picture, drawn(TGateConfig(gate_step=STEPS)))  # which never closes
    assert not torch.equal(pair.stock.picture, pair.picture)
    assert pair.summary.gate_closed_at == 2
    assert pair.psnr < 60
    assert 0 < pair.ssim < 1


def test_a_pair_leaves_the_pipeline_as_it_was(pipe):
    before = fingerprint(pipe.unet), pipe.scheduler
    draw_pair(pipe, Asked(PROMPT, STEPS, CALL, sampler="euler"), GATE)
    assert (fingerprint(pipe.unet), pipe.scheduler) == before


def test_the_stock_run_is_taken_where_it_was_asked_for_the_same(pipe, pair):
    told_of = []
    again = draw_pair(pipe, ASKED, TGateConfig(gate_step=3), last=pair.stock, tell=lambda *now: told_of.append(now))
    assert again.stock is pair.stock
    assert told_of == [(step / STEPS, "gated run") for step in range(1, STEPS + 1)]
    for other in (Asked(PROMPT, STEPS, {"guidance_scale": 4.0}), Asked(PROMPT, STEPS, CALL, seed=1)):
        assert draw_pair(pipe, other, GATE, last=pair.stock).stock.asked == other


def test_the_figure_has_the_gate_and_its_looks(pipe, pair):
    def lines(one):
        return {line.get_label(): line.get_xdata()[0] for line in one.plot().axes[0].lines if line.get_label()}

    assert lines(pair)["this gate: 2"] == 2
    assert "looks" not in lines(pair)
    looking = draw_pair(pipe, ASKED, TGateConfig(gate_step=2, look_interval=2), last=pair.stock)
    assert lines(looking)["looks"] == 3
    assert any(label.startswith("suggested gate step: ") and "to" not in label for label in lines(pair))


def test_a_run_too_short_for_a_curve_has_none(pipe):
    pair = draw_pair(pipe, Asked(PROMPT, 4, CALL), GATE)
    assert pair.plot() is None
    assert "- There is no curve" in told(pair)


def test_what_the_library_warns_of_is_on_the_page(pipe):
    pair = draw_pair(pipe, Asked(PROMPT, STEPS, CALL, sampler="dpm++-2m-sde-karras"), GATE)
    (note,) = pair.notes
    assert note.startswith("`look_interval` should be given with an SDE sampler")
    assert f"- {note}" in told(pair)


def test_the_figures_of_a_pair(pair):
    said = told(pair)
    assert f"| arithmetic saved |  | {pair.summary.macs_saved:.1%} |" in said
    assert f"| PSNR to stock |  | {pair.psnr:.1f} dB |" in said
    assert "`TGateConfig(gate_step=2)`" in said
    assert "There is no curve" not in said


# The drawer


def test_the_drawer_draws_with_the_settings_and_keeps_the_last_stock_run(drawer):
    stock, gated, said, figure = drawer.draw(PROMPT, STEPS, OWN, 0, 2, 0, tell=silent)
    assert stock.size == gated.size == (384, 384)
    assert stock.tobytes() != gated.tobytes()
    assert "`TGateConfig(gate_step=2)`" in said
    assert figure.axes
    first = drawer._last
    said = drawer.draw(PROMPT, STEPS, OWN, 0, 3, 2, tell=silent)[2]
    assert "`TGateConfig(gate_step=3, look_interval=2)`" in said
    assert drawer._last is first
    said = drawer.draw(PROMPT, STEPS, OWN, 1, 3, 1, tell=silent)[2]
    assert "`TGateConfig(gate_step=3)`" in said
    assert drawer._last is not first


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  ", "`prompt` must say what to draw, got nothing"),
        ("a red fox", "world's words only, got the unknown 'fox'"),
    ],
)
def test_a_bad_prompt_is_said_before_anything_is_drawn(drawer, prompt, message, monkeypatch):
    monkeypatch.setattr("tgate_processors.cli.explore.draw_pair", lambda *_, **__: pytest.fail("it is drawn"))
    with pytest.raises(ValueError, match=message):
        drawer.draw(prompt, STEPS, OWN, 0, 2, 0, tell=silent)


def test_closing_ends_what_is_being_drawn(pipe, drawer):
    before = fingerprint(pipe.unet)
    evaluations = []

    def close_in_the_third(part, name):
        evaluations.append(part)
        if len(evaluations) == 3:
            closing.start()
            while not drawer._closed:
                pass

    closing = threading.Thread(target=drawer.close)
    with pytest.raises(StateError, match="The page has ended"):
        drawer.draw(PROMPT, STEPS, OWN, 0, 2, 0, tell=close_in_the_third)
    closing.join()
    with pytest.raises(StateError, match="The page has ended"):
        drawer.draw(PROMPT, STEPS, OWN, 0, 2, 0, tell=close_in_the_third)
    assert len(evaluations) == 3
    assert fingerprint(pipe.unet) == before


# The command


def test_a_port_that_is_taken_is_said_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr("tgate_processors.cli.commands.pipeline_of", lambda *_: pytest.fail("the work has begun"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 0, 65536):
            assert main(["explore", "--port", str(port)]) == 2
            assert "`--port` must be " in capsys.readouterr().err


def test_gradio_missing_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("tgate_processors.cli.commands.pipeline_of", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["explore", "--port", str(free_port())]) == 1
    assert "pip install 'tgate-processors[explore]'" in capsys.readouterr().err


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# The page


NEEDS_GRADIO = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
NEEDS_PLAYWRIGHT = pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed")


@NEEDS_GRADIO
@pytest.mark.filterwarnings("default")  # gradio's imports warn of one another
def test_the_page_hands_on_what_is_drawn(drawer):
    with gradio() as gr:
        page = build_page(gr, drawer, title="sd", steps=STEPS, prompts=[PROMPT])
        draw = next(one.fn for one in page.fns.values() if one.name == "draw")
        stock, gated, figures, curve = draw(PROMPT, STEPS, OWN, 0, 2, 0)
        assert stock.size == gated.size == (384, 384)
        assert stock.tobytes() != gated.tobytes()
        assert "arithmetic saved" in figures
        assert curve.axes
        with pytest.raises(gr.Error) as said:
            draw("a <b>fox</b>", STEPS, OWN, 0, 2, 0)
        assert (
            "`prompt` must use this world&#x27;s words only, got the unknown &#x27;&lt;b&gt;fox" in said.value.message
        )
        assert page.config["analytics_enabled"] is False


@pytest.fixture
def served():
    """The address of the page, in a process of its own, which Ctrl-C ends at once and quietly."""
    port = free_port()
    ends_by_ctrl_c = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    runs = f"from tgate_processors.cli import main; sys.exit(main(['explore', '--steps', '6', '--port', '{port}']))"
    child = subprocess.Popen(
        [sys.executable, "-c", ends_by_ctrl_c + runs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )
    assert child.stdout.readline() == f"http://127.0.0.1:{port} (Ctrl-C ends it)\n", child.stderr.read()
    yield f"http://127.0.0.1:{port}/"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "Traceback" not in errors
    assert "terminate" not in errors


@pytest.fixture
def browser():
    """Chromium: the system's, or playwright's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        path = shutil.which("chromium") or running.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("there is no Chromium")
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@NEEDS_GRADIO
@NEEDS_PLAYWRIGHT
def test_a_browser_draws_and_asks_no_other_host(browser, served):
    page = browser.new_page(viewport={"width": 420, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served)
    page.get_by_label("prompt").first.fill("a red fox")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("got the unknown 'fox'").wait_for(timeout=120_000)
    page.get_by_label("prompt").first.fill(PROMPT)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("PSNR to stock").wait_for(timeout=120_000)
    assert page.locator("img[src*='/file=']").count() == 2
    assert page.locator("img[src^='data:image']").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 420  # nothing sticks out
    assert all(url.startswith((served, "data:", "blob:")) for url in asked)
    page.get_by_label("seed").fill("7")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("stock run").first.wait_for(timeout=120_000)  # and Ctrl-C comes while it draws
