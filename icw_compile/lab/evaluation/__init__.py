"""``icw-compile eval``: what the int8 cache changes, measured through the cache, and models made hard for it."""

from icw_compile.lab.evaluation.advise import run_advise
from icw_compile.lab.evaluation.command import Settings, run_eval

__all__ = ["Settings", "run_advise", "run_eval"]
