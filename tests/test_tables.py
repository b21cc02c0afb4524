"""What is shown as a table prints as text, and is HTML in a notebook."""

import re
from html import unescape

import pytest
import torch
from tiny import tiny

from tgate_processors import Convergence, TGateConfig, apply_tgate
from tgate_processors._cost import Cost
from tgate_processors._tables import Shown, Table
from tgate_processors.measure.run_cost import RunCost
from tgate_processors.summary import Summary


class Report(Shown):
    def __repr__(self):
        return "Report"

    def _parts(self):
        return [
            "<b> & two\nlines",
            "",
            Table([("a", "b<c"), ("1", '"x" & y')]),
            Table([("k", "v")], has_heading=False),
        ]


CELL = ' style="text-align: left"'


def test_parts_are_lines_of_text():
    assert str(Report()).splitlines() == ["<b> & two", "lines", "", "a  b<c", '1  "x" & y', "k  v"]


def test_parts_are_escaped_html_in_a_notebook():
    """A heading is a row or a column of `th`; an empty line is not shown."""
    assert Report()._repr_html_().splitlines() == [
        "<p>&lt;b&gt; &amp; two<br>lines</p>",
        f"<table><tr><th{CELL}>a</th><th{CELL}>b&lt;c</th></tr>"
        f"<tr><td{CELL}>1</td><td{CELL}>&quot;x&quot; &amp; y</td></tr></table>",
        f"<table><tr><th{CELL}>k</th><td{CELL}>v</td></tr></table>",
    ]


def words(text):
    return re.findall(r"\S+", text)


def handle():
    return apply_tgate(tiny("sd").pipe, "looks")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (handle, "TGate on StableDiffusionPipeline: preset looks (gate_step=0.2, look_interval=5); run none yet"),
        (lambda: TGateConfig(gate_step=0.2).schedule(10), "Schedule(gate_step=0.2): 10 steps, gate step 2"),
        (lambda: Summary("a <setting>", known=("a & b",)), "Summary(no run yet)"),
        (lambda: Convergence(torch.ones(2, 4, 3), ("a", "b", "c"), {}), "Convergence(2 prompts, 5 steps, 3 layers)"),
        (
            lambda: Cost(macs=2 * 10**9, cross_computed=7),
            "Cost(macs=2000000000, linear_and_conv_macs=0, cross_computed",
        ),
        (lambda: RunCost(4, 4, 2, 4, 2, 10, 9, 0), "RunCost(steps=4, stock_macs=4, gated_macs=2"),
    ],
)
def test_what_is_shown_has_a_line_and_the_same_words_as_text_and_in_a_notebook(make, line):
    shown = make()
    assert repr(shown).startswith(line)
    assert "\n" not in repr(shown)
    cells = re.sub("<[^>]*>", " ", shown._repr_html_())
    assert words(unescape(cells)) == words(str(shown))
    assert "<table>" in shown._repr_html_()


def test_settings_are_shown_as_the_code_that_makes_them():
    config = TGateConfig(gate_step="auto", look_interval=5)
    assert repr(config) == "TGateConfig(gate_step='auto', look_interval=5)"
    assert eval(repr(config)) == config
