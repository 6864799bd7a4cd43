"""The passes that turn a captured graph with a float key/value cache into one with an int8 cache, in order."""

from icw_compile.passes.base import Pass, PassResult, run_passes
from icw_compile.passes.canonicalize import canonicalize
from icw_compile.passes.encode import encode_at_once
from icw_compile.passes.graph import Input, KVGraph, Output, Site, Skipped
from icw_compile.passes.latent import absorb
from icw_compile.passes.lower import lower
from icw_compile.passes.place import place_rows
from icw_compile.passes.prompt import read_prompts
from icw_compile.passes.propagate import propagate
from icw_compile.passes.reads import fuse_reads
from icw_compile.passes.ring import turn_windows
from icw_compile.passes.storage import find_storage

__all__ = ["PASSES", "Input", "KVGraph", "Output", "Pass", "PassResult", "Site", "Skipped", "run_passes"]

#: Every pass, in the order in which they run.
PASSES: tuple[Pass, ...] = (
    Pass("canonicalize", canonicalize),
    Pass("latent", absorb),
    Pass("storage", find_storage),
    Pass("propagate", propagate),
    Pass("reads", fuse_reads),
    Pass("lower", lower),
    Pass("ring", turn_windows),
    Pass("prompt", read_prompts),
    Pass("place", place_rows),
    Pass("encode", encode_at_once),
)
