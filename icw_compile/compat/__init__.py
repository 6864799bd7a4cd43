"""Every private name of torch, transformers and Triton that this package uses, each behind a function of ours.

The bottom floor: nothing of `icw_compile` is imported here, and each file imports one library only. A docstring says
what a function gives and in which releases the name behind it was read and run: "torch 2.11, 2.13, 2.14" is torch
2.11.0, 2.13.0 and 2.14.1; transformers 5.17, 5.23, 5.24; Triton 3.6, 3.7, 3.8. ``tests/test_compat.py`` has a test for
each that fails when the private thing changes its behaviour, not only its name. With torch 2.15.0 and Triton 3.9 they
pass, unread.
"""
