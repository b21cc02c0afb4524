"""`docs/pipelines.md`, from what the tests build and run. `python tests/pipelines_page.py` writes it."""

from pathlib import Path

from every import GATED
from zoo import ENTRIES, class_of, seeded

from tgate_processors._families import FAMILIES, REFUSED, Guidance
from tgate_processors._layers import cross_attention_layers
from tgate_processors._pipelines import denoisers_of, side_networks_of, takes_callback


PAGE = Path(__file__).parent.parent / "docs" / "pipelines.md"

HEADING = """# Pipelines

Every pipeline class of diffusers 0.42, and what is known of it. Each class of the first two tables is built from
its real classes at toy size and run by `tests/test_pipelines.py`: equal to the stock pipeline when the gate never
closes; its evaluations and batches counted when it does; equal to stock after removal; two pictures at once equal
to each alone. This page is written by `python tests/pipelines_page.py`; a test fails when it is stale, or when
diffusers has a class that is not here.

A class that derives from one of these is taken to be like it. Any other pipeline whose denoiser has
cross-attention is gated with a warning: compare its pictures with the stock pipeline's.

*Guidance after the gate* says what is dropped:
"""

CROSS = """## Gated, with cross-attention

Cross-attention is reused, and guidance is dropped.
"""

ALONE = """## Gated, guidance alone

The text joins self-attention, so that no output of cross-attention could be kept. The positive branch goes on
after the gate, and only guidance is left out. `gate_step="auto"`, `sp_interval` and `fi_interval` are refused. In
pipelines that do guidance on request (FLUX and Qwen-Image with `true_cfg_scale` and a negative prompt, for
example) a run without it is told so by a warning.
"""

REFUSED_LOOPS = """## Refused

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
