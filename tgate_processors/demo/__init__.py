"""A tiny Stable Diffusion in stock classes, the world it was trained on, and a checker of its pictures."""

from tgate_processors.demo.checker import ATTRIBUTES, Reading, read
from tgate_processors.demo.model import load_demo_pipeline
from tgate_processors.demo.render import render
from tgate_processors.demo.world import Scene, Thing, caption, is_held_out, parse, sample_scenes


__all__ = [
    "ATTRIBUTES",
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
