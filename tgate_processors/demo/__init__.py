"""Tiny models in stock classes, the world that they draw, and a checker that reads their pictures."""

from tgate_processors.demo.checker import ATTRIBUTES, Reading, read
from tgate_processors.demo.embedded import EMBEDDED, load_demo_pipeline
from tgate_processors.demo.render import render
from tgate_processors.demo.world import Scene, Thing, caption, is_held_out, parse, sample_scenes


__all__ = [
    "ATTRIBUTES",
    "EMBEDDED",
    "Reading",
    "Scene",
    "Thing",
    "caption",
    "is_held_out",
    "load_demo_pipeline",
    "parse",
    "read",
    "render",
    "sample_scenes",
]
