"""``python -m icw_compile.lab.documents`` (``make docs``): README and ``docs``, their figures from result files.

A page is written by hand but for its regions, which stand between two comments:

    <!-- result: decode -->       ->    <!-- result: decode -->
    whatever was here                   | cached tokens | ...
    <!-- end -->                        <!-- end -->

What a region shows is made of result files, which the commands ``bench``, ``eval``, ``sweep``, ``plan`` and ``demo``
write with ``--json``; `REGIONS` says of which. A region that begins with ``<!-- typed: name -->`` holds what was
written by hand before there was such a file, or a command that writes one; as soon as the file is there it becomes a
``result``.
``tests/test_documents.py`` fails if a page is not what its result files give.

`icw_compile.lab.documents.page` knows regions; `speed`, `quality`, `models` and `plans` make what is in them, most from
the tables that the commands themselves print.
"""

from pathlib import Path

from icw_compile.lab.documents import models, plans, quality, speed
from icw_compile.lab.documents.page import Region, Rendered, render

__all__ = ["PAGES", "REGIONS", "Region", "Rendered", "render_page", "write_documents"]

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


def render_page(root: Path, page: str) -> Rendered:
    """One page with its regions made anew, not written.

    Args:
        root: the repository.
        page: one of `PAGES`.

    Raises:
        ValueError: an unknown region, or one without an end.
        FileNotFoundError: a result file of a region that is not typed.
    """
    return render(root, (root / page).read_text(encoding="utf-8"), REGIONS)


def write_documents(root: Path) -> list[str]:
    """Make every page and picture anew; returns a line for each that changed or that still has typed figures."""
    said = []
    for page in PAGES:
        rendered, file = render_page(root, page), root / page
        if rendered.text != file.read_text(encoding="utf-8"):
            file.write_text(rendered.text, encoding="utf-8")
            said.append(f"{page}: written")
        for name in rendered.typed:
            wanted = ", ".join(REGIONS[name].missing(root)) if name in REGIONS else "a command that writes it"
            said.append(f"{page}: {name} is typed; it wants {wanted}")
    if speed.draw_picture(root):
        said.append(f"{speed.PICTURE}: drawn")
    return said
