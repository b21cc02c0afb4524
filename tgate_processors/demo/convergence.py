"""Measure how cross-attention converges in each embedded model: `python -m tgate_processors.demo.convergence`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from tgate_processors.demo.embedded import EMBEDDED, load_demo_pipeline
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.world import caption
from tgate_processors.measure.convergence import Convergence, measure_convergence, plot_curve, suggestion
from tgate_processors.measure.plotting import GREY, new_figure
from tgate_processors.presets import preset
from tgate_processors.schedule import TGateConfig


FEW = 8  # steps of the models that usually draw in four, which would be too few for a curve


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.convergence", description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="number of held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts; picture i has the seed `seed + i`")
    parser.add_argument("--out", type=Path, default=Path("convergence.png"), help="file for the plot")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    prompts = [caption(scene) for scene in held_out_scenes(options.count, options.seed)]
    measured = {}
    for name, embedded in EMBEDDED.items():
        pipe = load_demo_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        call = {**embedded.call, "num_inference_steps": max(FEW, embedded.call["num_inference_steps"])}
        measured[name] = measure_convergence(pipe, prompts, seed=options.seed, **call)
        del call["num_inference_steps"]
        print(f"{name}\n{suggestion(pipe, measured[name], **call)}\n")
    plot(measured, options.out)
    print(f"picture: {options.out}")


def plot(measured: Mapping[str, Convergence], path: Path) -> None:
    """Plot the curves of the models on one scale, with room for the legends above them.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    figure = new_figure(12, 8)
    top = 1.4 * max(float(convergence.band()[1].max()) for convergence in measured.values())
    for (name, convergence), axes in zip(measured.items(), figure.subplots(2, 2, sharey=True).flat, strict=True):
        steps = convergence.num_inference_steps
        papers = preset(EMBEDDED[name].preset).schedule(steps).gate_step
        axes.axvline(papers, color=GREY, label=f"the papers' gate step: {papers}")
        plot_curve(convergence, axes, TGateConfig.tolerance)
        axes.set_ylim(0, top)
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
        axes.set_title(f"{name}: {steps} steps, {convergence.settings['scheduler']}", fontsize=10, loc="left")
        axes.set_xlabel("step")
    figure.suptitle(f"Cross-attention from step to step, {len(convergence.changes)} prompts", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
