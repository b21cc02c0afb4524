"""Every tiny pipeline that there is, and how some differ from the others."""

import re
from pathlib import Path

import zoo_images
import zoo_joint
import zoo_motion
import zoo_older
import zoo_qwen
import zoo_refused
import zoo_transformers
import zoo_unets
import zoo_videos
import zoo_worlds
from zoo import ENTRIES, class_of

from tgate_processors._families import FAMILIES, Guidance


ZOOS = (
    zoo_images,
    zoo_joint,
    zoo_motion,
    zoo_older,
    zoo_qwen,
    zoo_refused,
    zoo_transformers,
    zoo_unets,
    zoo_videos,
    zoo_worlds,
)
ONE_PICTURE_ONLY = {name for zoo in ZOOS for name in getattr(zoo, "ONE_PICTURE_ONLY", ())}
GATED = [name for name in ENTRIES if class_of(name) in FAMILIES]
NOT_GATED = [name for name in ENTRIES if class_of(name) not in FAMILIES]

# Those that have no cross-attention of their own, as the page says, which a test compares with the pipelines.
_PAGE = (Path(__file__).parent.parent / "docs" / "pipelines.md").read_text()
_SECTION = _PAGE.partition("## Pipelines that drop guidance alone")[2].partition("\n## ")[0]
_NAMES = set(re.findall(r"^\| (\w+) \|", _SECTION, re.MULTILINE))
ALONE = [name for name in GATED if class_of(name) in _NAMES]
assert ALONE, "the page has another heading"
# Those with a call for each branch and cross-attention of their own.
_OTHERWISE = {
    "Cosmos2_5_TransferPipeline",  # calls a ControlNet as often
    "Cosmos2_5_TransferPipeline (two chunks)",
    "HeliosPipeline",  # is not counted
    "HeliosPipeline (two chunks)",
    "LucyEditPipeline (two denoisers)",  # as Wan's, which is here
    "WanAnimatePipeline (two segments)",
    "WanAnimatePipeline (without guidance)",
}
CALLS = [
    name for name in GATED if FAMILIES[class_of(name)].guidance is Guidance.CALLS and name not in {*ALONE, *_OTHERWISE}
]
