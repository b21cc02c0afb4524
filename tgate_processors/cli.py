"""The command `tgate-processors`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tgate_processors import TGateConfig, TGateError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is success, 2 a bad argument."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (TGateError, ValueError) as error:
        print(f"tgate-processors {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tgate-processors", description="T-GATE for diffusers pipelines, as attention processors."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="draw the same pictures with the stock and the gated pipeline",
        description="Draws the same pictures with the stock and the gated pipeline, on the text-to-image model that "
        "comes with the package: writes them side by side and prints what was saved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="such as 'a large red circle left of a small blue square on a yellow background'; none: draws some",
    )
    demo.add_argument("--count", type=int, default=5, help="how many prompts to draw where none is given")
    demo.add_argument("--steps", type=int, default=25, help="denoising steps")
    demo.add_argument("--gate-step", type=int, default=10, help="steps before the gate closes")
    demo.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance")
    demo.add_argument("--seed", type=int, default=0, help="of the drawn prompts and of the noise")
    demo.add_argument("--rounds", type=int, default=3, help="how often each pipeline is timed, in turn")
    demo.add_argument("--out", type=Path, default=Path("tgate-demo.png"), help="where the pictures go")
    demo.set_defaults(run=run_demo)
    return top


def run_demo(options: argparse.Namespace) -> None:
    """Compare the pipelines on the demo's model."""
    # a help text must not wait for diffusers' pipelines
    from tgate_processors.demo.compare import compare
    from tgate_processors.demo.evaluate import held_out_scenes
    from tgate_processors.demo.model import load_demo_pipeline
    from tgate_processors.demo.picture import side_by_side
    from tgate_processors.demo.world import parse
    from tgate_processors.schedule import require_whole

    for name in ("count", "steps", "rounds"):
        require_whole(name, getattr(options, name), least=1)
    config = TGateConfig(gate_step=options.gate_step)
    scenes = [parse(prompt) for prompt in options.prompts] or held_out_scenes(options.count, options.seed)
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    comparison = compare(
        pipe,
        scenes,
        config,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        rounds=options.rounds,
    )
    settings = (
        f"{options.steps} steps, gate step {options.gate_step}, guidance {options.guidance:g}, seed {options.seed}"
    )
    side_by_side(comparison, settings).save(options.out)
    print(settings)
    print(comparison)
    print(f"pictures: {options.out}")
