"""What a graph does with its cache, as a picture: `icw_compile.drawing`."""

import xml.etree.ElementTree as ElementTree

import torch
from graphs import HEAD_DIM, QUERY_HEADS, kv, query, trace
from support import tiny_model, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.nn.functional import softmax

import icw_compile
from icw_compile.drawing import COLOURS, Drawing, draw
from icw_compile.passes import PASSES, run_passes

SVG = "{http://www.w3.org/2000/svg}"
AT = torch.tensor([3])


def step(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
    k.index_copy_(2, AT, new)
    v.index_copy_(2, AT, new * 2)
    return sdpa(q * 2, k, v, enable_gqa=True).transpose(1, 2).reshape(2, 1, QUERY_HEADS * HEAD_DIM) + 1


def drawn(drawing: Drawing) -> dict[str, str]:
    return {box.call if box.call != "input" else box.name: box.role for box in drawing.boxes}


def test_roles_and_edges() -> None:
    graph = trace(step, query(), kv(), kv(), kv(1), quantized=[1, 2])
    (before,) = draw(graph)
    assert drawn(before) == {
        "k_1": "storage",
        "v_1": "storage",
        "new_1": "other",
        "mul": "other",
        "index_copy_": "write",
        "scaled_dot_product_attention": "attention",
        "constant": "other",
    }
    boxes = {box.name: box for box in before.boxes}
    attention = boxes["scaled_dot_product_attention"]
    # What was written is read, not what was there before; where the attention's output goes is not drawn.
    assert set(attention.inputs) == {"mul_1", "index_copy_", "index_copy__1"}
    uses = {"mul_1": "query", "new_1": "new rows", "mul": "new rows", "_tensor_constant0": "index"}
    assert {name: boxes[name].use for name in uses} == uses
    run_passes(graph, PASSES)
    (after,) = draw(graph)
    assert before.calls("write") == ("index_copy_",) * 2
    assert sorted(after.calls("write")) == ["index_copy_"] * 4 + ["quantize_per_head"] * 2
    assert after.calls("attention") == ("attention_decode",)
    assert {box.value.partition("[")[0] for box in after.boxes if box.role == "storage"} == {"int8", "float32"}


def test_spelled_out_attention_is_one_colour() -> None:
    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return softmax(
            torch.tanh(q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4) * 4 + mask, -1
        ) @ v.repeat_interleave(2, 1)

    mask = torch.zeros(2, 1, 1, 8)
    (drawing,) = draw(trace(eager, query(), kv(), kv(), mask, quantized=[1, 2]))
    assert drawing.calls("read") == ("repeat_interleave", "repeat_interleave")
    assert drawing.calls("attention") == ("transpose", "matmul", "div", "tanh", "mul", "add", "softmax", "matmul")
    assert {box.name: box.use for box in drawing.boxes if box.role == "other"} == {"q_1": "query", "mask_1": "mask"}


def test_attention_that_no_rule_knows_is_something_else() -> None:
    def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q[:, :2] @ k.mT) @ v

    (drawing,) = draw(trace(sigmoid, query(), kv(), kv(), quantized=[1, 2]))
    assert not drawing.calls("attention") and drawing.calls("other").count("matmul") == 2


def test_a_graph_without_a_cache() -> None:
    assert draw(trace(step, query(), kv(), kv(), kv(1))) == ()


def test_svg() -> None:
    (drawing,) = draw(trace(step, query(), kv(), kv(), kv(1), quantized=[1, 2]))
    text = drawing.svg("a <title> & more")
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == "a <title> & more, the cache"
    assert text.count("http") == 1, "the name space, which nothing fetches"
    assert len(root.findall(f"{SVG}g")) == len(drawing.boxes)
    assert len(root.findall(f"{SVG}path")) == sum(len(box.inputs) for box in drawing.boxes)
    filled = [rect.attrib["fill"] for rect in root.findall(f"{SVG}g/{SVG}rect")]
    assert filled == [COLOURS[box.role][0] for box in drawing.boxes]
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    corners = {(float(r.attrib["x"]), float(r.attrib["y"])) for r in root.findall(f"{SVG}g/{SVG}rect")}
    assert len(corners) == len(drawing.boxes), "no box lies on another"
    assert all(0 <= x < width - 200 and 0 <= y < height - 40 for x, y in corners)


def test_of_a_model() -> None:
    """A drawing for each step and kind of layer; what a graph returns is known by where the caller keeps it."""
    model = tiny_model("mistral", head_dim=16, num_hidden_layers=2)
    (graph,) = icw_compile.explain(model, input_ids=tokens(20)).graphs
    assert len(graph.drawings) == 1 + len(graph.passes)
    for drawings in graph.drawings:
        (drawing,) = drawings
        assert drawing.layers == (0, 1) and drawing.calls("attention")
        roles = {part for box in drawing.boxes for part in ("keys", "values") if box.returned.endswith(part)}
        assert roles == {"keys", "values"}
