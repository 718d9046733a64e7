"""Supplements of one-step models: what a finished student can do besides, without any training.

sizes        pictures of other sizes and shapes than the trained one: re-dilated convolutions (ScaleCrafter)
negative     negative prompts in the same single call: steered cross-attention (NASA of SNOOPI)
composition  every object of a prompt, in its colour: the noise is optimised first (Divide-and-Bind)

Modules here import common alone.
"""
