"""Negative prompts in one call: negative-away steer attention (NASA of SNOOPI, arXiv 2412.02687).

Guidance cannot do it: the difference of two one-step pictures is a blend of both. NASA subtracts earlier, in
every cross-attention (Eq. 7 to 9), where the text has its say:
Z = softmax(Q K+^T / sqrt(d)) V+ - alpha softmax(Q K-^T / sqrt(d)) V-.
"""

from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from common import UserError


def steered_attention(attn, x, encoder_hidden_states, attention_mask, negative, alpha):
    """An attention processor of diffusers: Eq. 9 in all heads, then the layer's output projection.

    x [B, N, D]; encoder_hidden_states [B, M, C], the prompts' tokens; attention_mask [B, 1, M], added to
    their logits, or None; negative [1, M', C], the negative prompt's tokens. Returns [B, N, D].
    """
    heads = lambda v: v.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    query = heads(attn.to_q(x))

    def attend(text, mask=None):
        return F.scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)), mask)

    mask = None if attention_mask is None else attention_mask[:, None]
    z = attend(encoder_hidden_states, mask) - alpha * attend(negative.expand(len(x), -1, -1))
    return attn.to_out[1](attn.to_out[0](z.transpose(1, 2).flatten(2)))


@contextmanager
def steered(student, codec, prompt, alpha):
    """Inside the with block the student steers away from a negative prompt; "": no change.

    Raises UserError if the model takes no text.
    """
    if not prompt:
        yield
        return
    if codec.vae is None:
        raise UserError("--negative: the model takes no text; leave it out")
    cond, net = codec.cond([prompt]), student.net
    negative = cond["encoder_hidden_states"]
    if "encoder_attention_mask" in cond:  # PixArt, whose network projects the text and masks its padding
        negative = net.caption_projection(negative[:, cond["encoder_attention_mask"][0].bool()])
    layers = [m for m in net.modules() if isinstance(m, Attention) and m.is_cross_attention]
    before = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = partial(steered_attention, negative=negative, alpha=alpha)
        yield
    finally:
        for layer, processor in zip(layers, before):
            layer.processor = processor
