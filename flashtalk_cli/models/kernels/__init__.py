"""What happens to tokens between matrix products, as Triton kernels for CUDA devices, without gradients.

    rows.py   the kernels: residual sum and norm, RMS norm and rotation, quantisation of rows
    ops.py    the same interface as models/token_ops.py, by these kernels

Each reads its inputs once and writes its outputs once, computes in float32, and is held to the plain code
by tests/test_kernels.py, on a GPU or through Triton's interpreter.
"""
