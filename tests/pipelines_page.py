"""`docs/pipelines.md`, from what the tests build and run. `python tests/pipelines_page.py` writes it."""

from pathlib import Path

from every import GATED
from zoo import ENTRIES, class_of, seeded

from tgate_processors._families import FAMILIES, REFUSED, Guidance
from tgate_processors._layers import cross_attention_layers
from tgate_processors._pipelines import denoisers_of, side_networks_of, takes_callback


PAGE = Path(__file__).parent.parent / "docs" / "pipelines.md"

HEADING = """# Pipelines

This page lists every pipeline class of diffusers 0.42 and what T-GATE leaves out of it. `tests/test_pipelines.py`
builds each class of the first two tables from its real classes at toy size and runs it. The tests check that:

- the gated pipeline equals the stock pipeline when the gate never closes, and again after removal;
- it makes the right number of evaluations, with the right batches, when the gate closes;
- two pictures at once equal each picture alone.

`python tests/pipelines_page.py` writes this page. A test fails if the page is out of date, or lacks a class of
diffusers.

A class that derives from one of these is treated like it. `apply_tgate` gates any other pipeline whose denoiser has
cross-attention too, and warns. Compare its pictures with the stock pipeline's.

The column *guidance after the gate* says what the gate drops:
"""

CROSS = """## Pipelines that reuse cross-attention

The gate reuses cross-attention, and drops guidance as the third column says.
"""

ALONE = """## Pipelines that drop guidance alone

In these models the text is part of self-attention, so they have no cross-attention output to keep. After the gate the
positive branch goes on, and the gate leaves out only guidance. `apply_tgate` refuses `gate_step="auto"`, `sp_interval`
and `fi_interval`. Some pipelines do guidance only on request (FLUX and Qwen-Image with `true_cfg_scale` and a negative
prompt, for example). Without guidance, the run warns that the gate does nothing.
"""

REFUSED_LOOPS = """## Pipelines that are refused

`apply_tgate` raises `UnsupportedPipelineError` with the reason.
"""

HEAD = ["| pipeline | gated | guidance after the gate | callback |", "| --- | --- | --- | --- |"]


def page():
    kinds = [f"- **{name_of(guidance)}**: {guidance.value}." for guidance in Guidance]
    pipes = {class_of(label): seeded(ENTRIES[label].build) for label in reversed(GATED)}
    rows = {name: _row(name, pipe) for name, pipe in sorted(pipes.items())}
    alone = {name for name, pipe in pipes.items() if not any(map(cross_attention_layers, denoisers_of(pipe)))}
    cross = [*HEAD, *(row for name, row in rows.items() if name not in alone)]
    dropped = [*HEAD, *(row for name, row in rows.items() if name in alone)]
    refused = [
        "| pipeline | why |",
        "| --- | --- |",
        *(f"| {name} | {why} |" for name, why in sorted(REFUSED.items())),
    ]
    parts = [HEADING, *kinds, "", CROSS, *cross, "", ALONE, *dropped, "", REFUSED_LOOPS, *refused]
    return "\n".join(parts) + "\n"


def _row(name, pipe):
    networks = dict.fromkeys(type(network).__name__ for network in [*denoisers_of(pipe), *side_networks_of(pipe)])
    family = FAMILIES[name]
    guidance = name_of(family.guidance)
    if family.branch == "positive":
        guidance += ", the positive branch goes on"
    callback = "`callback_on_step_end`" if takes_callback(pipe) else "none"
    return f"| {name} | {', '.join(networks)} | {guidance} | {callback} |"


def name_of(guidance):
    return guidance.name.lower().replace("_", " ")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE}: {len(FAMILIES)} classes gated, {len(REFUSED)} refused")
