"""What kernels cost in machine code, for two architectures: they compile without a device, and nothing is run.

The loop of decode that is counted is the one over blocks that are read whole, of one query token in bfloat16.
"""

from collections import Counter

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from machine_code import compile_for

#: (head size, bits of keys and values, mask) -> at most so many registers of a thread, and instructions for a block of
#: positions, on sm_80 and sm_90: what Triton 3.7 makes, and a few in a hundred. A multiprocessor has room for four
#: programs of 128 registers, and for three of 168.
BUDGETS = {
    (128, (8, 8), None): (128, 415),
    (128, (8, 8), "bool"): (128, 415),
    (128, (8, 8), "ragged"): (128, 415),
    (64, (8, 8), None): (128, 315),
    (64, (8, 8), "bool"): (128, 320),
    (256, (8, 8), None): (160, 370),
    (128, (8, 4), None): (128, 605),
    (128, (4, 4), None): (160, 830),
    (128, (4, 4), "bool"): (160, 830),
    (128, (4, 4), "ragged"): (160, 830),
    (64, (4, 4), None): (168, 645),
    (256, (4, 4), None): (176, 760),
}
#: The same with 128 kept rows of what is of 4 bits: besides, instructions for a block that has some of them, and bytes
#: of a thread in memory, for it has too few registers for such a block. The loop over blocks that are read whole reads
#: a few numbers from there that stay the same.
KEPT_BUDGETS = {
    (128, (4, 4), None): (168, 845, 2780, 128),
    (128, (4, 4), "bool"): (168, 845, 2780, 128),
    (64, (4, 4), None): (168, 655, 2105, 128),
    (256, (4, 4), None): (200, 770, 2330, 128),
    (128, (8, 4), None): (168, 715, 2120, 384),
}


@pytest.mark.parametrize("arch", [80, 90])
def test_decode_with_kept_rows(arch, tmp_path):
    cases = [
        ("bfloat16", 32, 8, 1, 4096, (size, size), bits, mask, False, None, False, 8, 128, "packed")
        for size, bits, mask in KEPT_BUDGETS
    ]
    attends = (code for code in compile_for("cuda", arch, cases, tmp_path) if code.name == "attend")
    for (case, budget), code in zip(KEPT_BUDGETS.items(), attends, strict=True):
        (registers, instructions, kept_instructions, stack), used, loops = budget, code.resources(), code.loops()
        found = f"sm_{arch}, {case}: {used}, {[(loop.total(), loop.most_common()) for loop in loops]}"
        loop, kept = loops
        assert used["REG"] <= registers and used["STACK"] <= stack and used["LOCAL"] == 0, found
        assert loop.total() <= instructions and kept.total() <= kept_instructions, found
        assert any(name.startswith("LDGSTS") for name in loop), found
        assert not any(name.startswith(("LDS.U8", "LDS.S8", "LDG.E.U8", "I2F")) for name in loop), found
        in_memory = {name: number for name, number in loop.items() if name.startswith(("LDL", "STL"))}
        assert sum(in_memory.values()) <= 30, found


@pytest.mark.parametrize("arch", [80, 90])
def test_decode(arch, tmp_path):
    cases = [
        ("bfloat16", 32, 8, 1, 4096, (size, size), bits, mask, False, None, False, 8) for size, bits, mask in BUDGETS
    ]
    cases.append(("bfloat16", 32, 8, 1, 4095, (128, 128), (8, 8), None, False, None, False, 8))
    *attends, odd = (code for code in compile_for("cuda", arch, cases, tmp_path) if code.name == "attend")
    totals = {}
    for (case, (registers, instructions)), code in zip(BUDGETS.items(), attends, strict=True):
        (size, bits, mask), used, loops = case, code.resources(), code.loops()
        found = f"sm_{arch}, {case}: {used}, {[(loop.total(), loop.most_common()) for loop in loops]}"
        loop, totals[case] = loops[0], loops[0].total()
        assert used["REG"] <= registers and used["STACK"] == used["LOCAL"] == 0, found
        assert loop.total() <= instructions, found
        # Rows come by asynchronous copies, and so do scales, but not all codes of 4 bits.
        assert any(name.startswith("LDGSTS") for name in loop), found
        loads = sum(number for name, number in loop.items() if name.startswith("LDG."))
        assert loads <= (0 if bits == (8, 8) else 6), found
        # No byte comes alone, and none is converted by an instruction that is for that.
        for each in loops:
            assert not any(name.startswith(("LDS.U8", "LDS.S8", "LDG.E.U8", "LDL", "STL", "I2F")) for name in each), (
                found
            )
        if mask is not None:
            assert totals[case] <= 1.1 * totals[size, bits, None], found
    threads, plain = 4 * 32, totals[128, (8, 8), None]
    for total in (plain, totals[128, (8, 8), "bool"], totals[128, (8, 8), "ragged"]):
        assert total * threads / (64 * 2 * 128) <= 3.25  # instructions per byte
        assert total <= 1.05 * plain
    # Of an odd length, scales do not begin at even addresses: they are loaded one by one, and nothing else changes.
    loop, used = odd.loops()[0], odd.resources()
    assert used["REG"] <= 128 and used["STACK"] == 0 and loop.total() <= 415
    assert {name for name in loop if name.startswith("LDG.")} == {"LDG.E.U16"}


def test_what_waits_for_the_kernel_ahead(tmp_path):
    """From sm_90 on, kernels are launched early: nothing that another one writes is read before that is done."""
    cases = [
        ("bfloat16", 32, 8, 1, 4096, (128, 128), (8, 8), mask, False, None, False, splits)
        for mask in (None, "ragged")
        for splits in (8, 40)
    ]
    for code, case in zip(compile_for("cuda", 90, cases, tmp_path), [case for case in cases for _ in range(2)]):
        names = code.instructions()
        assert names.count("ACQBULK") == 1
        wait = names.index("ACQBULK")
        loads = [i for i, name in enumerate(names) if name.startswith("LDG")]
        if code.name == "attend":
            assert wait < loads[0]
            continue
        # A mask's shares were there before the attention was: those of a sequence and of the one before it.
        assert sum(i < wait for i in loads) == (2 if case[7] == "ragged" else 0), names
        divisions = [i for i, name in enumerate(names) if name.startswith("I2F")]
        assert divisions and divisions[-1] < wait, "what is known before is worked out before"


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_settling_shifts(arch, tmp_path):
    """For prompts: rows are read by wide loads, and nothing goes to memory."""
    settled = [
        ("bfloat16", 8, 8192, 32768, 128, "bfloat16"),
        ("float32", 2, 300, 300, 80, "float32"),
        ("bfloat16", 1, 8192, 32768, 256, "bfloat16"),
        ("bfloat16", 1, 8192, 32768, 128, "uint8"),
    ]
    compiled = compile_for("cuda", arch, [], tmp_path, settled)
    assert Counter(code.name for code in compiled) == {"look": 7, "settle": 4, "settle_again": 3}
    for code in compiled:
        used, names = code.resources(), code.instructions()
        found = f"sm_{arch}, {code.name}: {used}, {len(names)} instructions"
        assert used["REG"] <= (128 if code.name == "look" else 255) and used["STACK"] == used["LOCAL"] == 0, found
        if code.name == "look":
            assert any(name.startswith("LDG.E.128") for name in names), found
