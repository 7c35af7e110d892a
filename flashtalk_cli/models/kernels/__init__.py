"""What happens to tokens between matrix products, as Triton kernels for CUDA devices, without gradients.

    rows.py     residual sum and norm, RMS norm and rotation, quantisation of rows
    vectors.py  the time's vectors
    cross.py    attention to prompt and picture
    speech.py   attention to speech, between its products
    heads.py    q, k and v in eight bits, for models/attention_fp8.py
    ops.py      the interface of models/token_ops.py, by all of these
    frames.py   the video VAE's passes between convolutions

Each reads its inputs once and writes its outputs once, computes in float32, and is held to the plain code
by tests/test_kernels.py, on a GPU or through Triton's interpreter.
"""
