"""Where the caller keeps each cache tensor: the one place that knows what a cache of transformers looks like.

Dynamo knows of an input where it comes from, and of an output which attribute of which object it becomes. Both are
found here for the layers of transformers' caches, those that are passed in and those that the graph makes.
"""

from collections.abc import Iterable

from torch.fx import Node

from icw_compile.compat.dynamo import Owner, attribute_of, source_name, stored_attributes
from icw_compile.compat.transformers import CacheLayerMixin, is_sliding
from icw_compile.passes.graph import Endpoint, Role

__all__ = ["ROLES", "input_endpoints", "output_endpoints"]

#: The attributes in which a cache layer keeps its tensors.
ROLES: dict[str, Role] = {"keys": "key", "values": "value"}


def input_endpoints(placeholders: Iterable[Node]) -> dict[Node, Endpoint]:
    """The placeholders of Dynamo's graph that take keys or values of a cache layer."""
    found = {}
    for node in placeholders:
        if source_name(node).rpartition(".")[2] not in ROLES:
            continue
        place = attribute_of(node)
        if place is not None and place[0].cls is not None and issubclass(place[0].cls, CacheLayerMixin):
            found[node] = place
    return _numbered(found)


def output_endpoints() -> dict[Node, Endpoint]:
    """The nodes of Dynamo's graph whose results become keys or values of a cache layer, once it has run."""
    stored = stored_attributes(CacheLayerMixin)
    return _numbered({each.node: (each.owner, each.attribute) for each in stored if each.attribute in ROLES})


def _numbered(found: dict[Node, tuple[Owner, str]]) -> dict[Node, Endpoint]:
    return {
        node: Endpoint(
            name=f"{owner.source or owner.held_by}.{attribute}",
            layer=owner.index or 0,
            role=ROLES[attribute],
            source=f"{owner.source}.{attribute}" if owner.source else "",
            is_sliding=owner.cls is not None and is_sliding(owner.cls),
            is_last=owner.siblings is not None and owner.index == owner.siblings - 1,
        )
        for node, (owner, attribute) in found.items()
    }
