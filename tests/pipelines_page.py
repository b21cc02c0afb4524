"""`docs/pipelines.md`, from what the tests build and run. `python tests/pipelines_page.py` writes it."""

import re
from pathlib import Path

import zoo_motion  # noqa: F401  # registers its pipelines
import zoo_transformers  # noqa: F401  # registers its pipelines
import zoo_unets  # noqa: F401  # registers its pipelines
from refused import REFUSED_DENOISERS, build_denoiser
from zoo import ENTRIES, class_of, seeded

from tgate_processors import UnsupportedPipelineError
from tgate_processors._layers import check_can_be_gated
from tgate_processors._pipelines import FAMILIES, REFUSED, Guidance, denoisers_of, side_networks_of, takes_callback


PAGE = Path(__file__).parent.parent / "docs" / "pipelines.md"

HEADING = """# Pipelines

What is known of each pipeline class of diffusers 0.42. Every class of the first table is built from its real classes
at toy size and run by `tests/test_pipelines.py`: equal to the stock pipeline when the gate never closes; its
evaluations, batches and attention calls counted when it does; equal to stock after removal; two pictures at once equal
to each alone. This page is written by `python tests/pipelines_page.py`; a test fails when it is stale.

A class that derives from one of these is taken to be like it. Any other pipeline whose denoiser has cross-attention is
gated with a warning: compare its pictures with the stock pipeline's.
"""

GUIDANCE = """## Gated

*Guidance after the gate* says what is dropped:

"""


def page():
    kinds = [f"- **{guidance.name.lower().replace('_', ' ')}**: {guidance.value}." for guidance in Guidance]
    rows = ["| pipeline | gated | guidance after the gate | step counted by |", "| --- | --- | --- | --- |"]
    rows += [_row(name) for name in sorted(FAMILIES)]
    gated = GUIDANCE + "\n".join([*kinds, "", *rows])
    loops = ["| pipeline | why |", "| --- | --- |", *(f"| {name} | {why} |" for name, why in sorted(REFUSED.items()))]
    denoisers = ["| denoiser | why | pipelines |", "| --- | --- | --- |"]
    for name, pipelines in sorted(REFUSED_DENOISERS.items()):
        denoisers.append(f"| {name} | {why_not(name)} | {', '.join(pipelines)} |")
    refused = "\n".join(
        [
            "## Refused",
            "",
            "`apply_tgate` raises `UnsupportedPipelineError` with the reason.",
            "",
            *loops,
            "",
            *denoisers,
        ]
    )
    return f"{HEADING}\n{gated}\n\n{refused}\n"


def _row(name):
    pipe = seeded(next(entry.build for label, entry in ENTRIES.items() if class_of(label) == name))
    networks = dict.fromkeys(type(network).__name__ for network in [*denoisers_of(pipe), *side_networks_of(pipe)])
    family = FAMILIES[name]
    guidance = family.guidance.name.lower().replace("_", " ")
    if family.branch == "positive":
        guidance += ", the positive branch goes on"
    counted = "`callback_on_step_end`" if takes_callback(pipe) else "the denoiser's evaluations"
    return f"| {name} | {', '.join(networks)} | {guidance} | {counted} |"


def why_not(denoiser):
    """The reason that the error gives."""
    try:
        check_can_be_gated(build_denoiser(denoiser))
    except UnsupportedPipelineError as error:
        return re.search(r"got \w+: (.*?)\. Pass a denoiser", str(error)).group(1)
    raise AssertionError(f"{denoiser} can be gated")


if __name__ == "__main__":
    PAGE.write_text(page())
    refused = len(REFUSED) + sum(map(len, REFUSED_DENOISERS.values()))
    print(f"{PAGE}: {len(FAMILIES)} classes gated, {refused} refused")
