"""``python -m icw_compile.lab.documents`` (``make docs``): README and ``docs``, their figures from result files.

A page is written by hand but for its regions, which stand between two comments:

    <!-- result: decode -->       ->    <!-- result: decode -->
    whatever was here                   | cached tokens | ...
    <!-- end -->                        <!-- end -->

What a region shows is made of result files, which the commands ``bench``, ``eval``, ``sweep``, ``plan`` and ``demo``
write with ``--json``; `REGIONS` says of which. ``tests/test_documents.py`` fails if a page is not what its result files
give.

`icw_compile.lab.documents.page` knows regions; `speed`, `quality`, `models` and `plans` make what is in them, most from
the tables that the commands themselves print.
"""

from pathlib import Path

from icw_compile.lab.documents import models, plans, quality, speed
from icw_compile.lab.documents.page import Region, render

__all__ = ["PAGES", "REGIONS", "Region", "render_page", "write_documents"]

#: name -> what makes it. A name is used on as many pages as like.
REGIONS: dict[str, Region] = {**speed.REGIONS, **quality.REGIONS, **models.REGIONS, **plans.REGIONS}
#: Everything that has regions, relative to the repository.
PAGES = (
    "README.md",
    "docs/comparison.md",
    "docs/integrations.md",
    "docs/models.md",
    "docs/quality.md",
    "docs/speed.md",
)


def render_page(root: Path, page: str) -> str:
    """The text of one page with its regions made anew, not written.

    Args:
        root: the repository.
        page: one of `PAGES`.

    Raises:
        ValueError: an unknown region, or one without an end.
        FileNotFoundError: a result file of a region.
    """
    return render(root, (root / page).read_text(encoding="utf-8"), REGIONS)


def write_documents(root: Path) -> list[str]:
    """Make every page and picture anew; returns a line for each that changed."""
    said = []
    for page in PAGES:
        text, file = render_page(root, page), root / page
        if text != file.read_text(encoding="utf-8"):
            file.write_text(text, encoding="utf-8")
            said.append(f"{page}: written")
    if speed.draw_picture(root):
        said.append(f"{speed.PICTURE}: drawn")
    return said
