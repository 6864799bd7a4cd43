"""What decode costs in machine code, for two architectures: it compiles without a device, and nothing is run.

The loop that is counted is the one over blocks that are read whole, of one query token in bfloat16.
"""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from machine_code import compile_for

#: (head size, bits of keys and values, mask) -> at most so many registers of a thread, and instructions for a block of
#: positions: what Triton 3.7 makes, and a few in a hundred. A multiprocessor has room for three programs of 168
#: registers, and for four of 128.
BUDGETS = {
    (128, (8, 8), None): (168, 860),
    (128, (8, 8), "bool"): (168, 870),
    (128, (8, 4), None): (128, 920),
    (128, (4, 4), None): (168, 1110),
    (128, (4, 4), "bool"): (168, 1120),
    (64, (4, 4), None): (168, 850),
    (256, (4, 4), None): (200, 1090),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_decode(arch, tmp_path):
    cases = [
        ("bfloat16", 32, 8, 1, 4096, (size, size), bits, mask, False, None, False, 8) for size, bits, mask in BUDGETS
    ]
    attends = [code for code in compile_for("cuda", arch, cases, tmp_path) if code.name == "attend"]
    for ((_, bits, mask), (registers, instructions)), code in zip(BUDGETS.items(), attends, strict=True):
        used, (loop, *_) = code.resources(), code.loops()
        found = f"sm_{arch}, {bits} bits, mask {mask}: {used}, {loop.total()} instructions: {loop.most_common()}"
        assert used["REG"] <= registers, found
        assert used["STACK"] == 0 or mask is not None, found
        assert loop.total() <= instructions, found
        # Rows come by asynchronous copies, those of 4 bits never byte by byte, and nothing else lies in memory.
        assert any(name.startswith("LDGSTS") for name in loop), found
        assert loop["LDS.U8"] == 0 or bits[1] == 8, found
        assert not any(name.startswith(("LDL", "STL", "LDG.E.U8")) for name in loop), found
