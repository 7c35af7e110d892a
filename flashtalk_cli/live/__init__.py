"""A person on air: sound comes in at its own pace, frames with their sound go out at theirs.

    sources, listen  ->  timeline  ->  loop (session: the model)  ->  delivery  ->  media/live

What decides when is in pacing, as functions of values. Only session knows torch.
"""
