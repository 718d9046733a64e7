"""Composition by Divide-and-Bind (Li et al., arXiv 2307.10864) in one step: SwiftBrush v2, supplement 8.2.

A picture of "a red circle and a blue square" may lack one of them, or give it the other's colour. A_s, the
cross-attention map of token s in the student's one call, shows it. The noise z is moved until the maps are
better, by the gradient through the frozen student:
  L_attend = -min_s TV(A_s)    over the objects s: each has a map that rises and falls somewhere
  L_bind   = JSD(A_r || A_s)   attribute r lies where its object s lies; the mean over the pairs
  z <- z - scale grad_z (L_attend + L_bind), some times; then the picture is drawn

Constants of github.com/boschresearch/Divide-and-Bind: maps of 16 x 16 places, softmax over the tokens of 100
times the map, Gaussian smoothing of 3 x 3 with sigma 0.5, softmax over the places for JSD, L_bind's weight 1
of the first steps. That code differs: it takes attributes from maps of 32 x 32 and 64 x 64 places, cuts low
places off before JSD, and takes the worst token of -TV + JSD; its vertical differences are to the last row,
not to the next, which seems a slip.
"""

import math
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from common import UserError, chunks_of, one_step

SIDE, SHARPNESS, KERNEL, SIGMA = 16, 100.0, 3, 0.5
NO_ATTRIBUTES = {"a", "an", "the", "and", "or", "of", "with", "on", "in"}


def smoothed_maps(maps):
    """Maps [B, places, tokens] as images [B, tokens, side, side], in which the words compete for each place.

    The first and the last token, which no word is, compete for none: their images are 0.
    """
    words = F.pad(torch.softmax(SHARPNESS * maps[..., 1:-1], -1), (1, 1))
    side = math.isqrt(maps.shape[1])
    return gaussian_blur(words.transpose(1, 2).unflatten(2, (side, side)), KERNEL, SIGMA)


def total_variation(images):
    """Mean absolute difference of neighbours, across plus down: [..., side, side] -> [...]."""
    return images.diff(dim=-1).abs().mean((-1, -2)) + images.diff(dim=-2).abs().mean((-1, -2))


def attendance_loss(images, objects):
    """L_attend: minus the least total variation of the objects; images [tokens, side, side]."""
    return -total_variation(images[objects]).min()


def jensen_shannon(p, q):
    """JSD(p || q) = H((p + q) / 2) - (H(p) + H(q)) / 2 of distributions [..., places], 0 to ln 2: [...]."""
    entropy = lambda d: torch.special.entr(d).sum(-1)
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def binding_loss(images, objects, attributes):
    """L_bind: mean divergence of each attribute's map and its object's, by their softmax over the places.

    images [tokens, side, side]; the attribute of an object without one is None.
    """
    places = torch.softmax(images.flatten(1), 1)
    losses = [jensen_shannon(places[r], places[s]) for s, r in zip(objects, attributes) if r is not None]
    return sum(losses) / max(1, len(losses))


class Recorder:
    """An attention processor that keeps the map [B, places, tokens], the heads' mean, and acts as another."""

    def __init__(self, processor, maps):
        self.processor, self.maps = processor, maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        scores = attn.get_attention_scores(*map(attn.head_to_batch_dim, (query, key)))
        self.maps.append(scores.unflatten(0, (len(hidden_states), -1)).mean(1))
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


@contextmanager
def recorded_maps(net):
    """Gives a list, to which inside the with block each call of the UNet appends its cross-attention maps."""
    layers = [module for name, module in net.named_modules() if name.endswith(".attn2")]
    processors, maps = [layer.processor for layer in layers], []
    for layer in layers:
        layer.processor = Recorder(layer.processor, maps)
    try:
        yield maps
    finally:
        for layer, processor in zip(layers, processors):
            layer.processor = processor


def mean_map(maps):
    """The mean [B, places, tokens] over the layers whose side is the nearest to SIDE."""
    places = min((m.shape[1] for m in maps), key=lambda places: abs(math.isqrt(places) - SIDE))
    return torch.stack([m for m in maps if m.shape[1] == places]).mean(0)


def tokens_of(tokenizer, prompt, words):
    """The last tokens (objects, attributes) of those of `words` in the prompt, and of the word before each.

    An article or the like is no attribute: None. Raises UserError if none is in what the tokenizer reads.
    """
    encoded, wanted = tokenizer(prompt, truncation=True), {word.lower() for word in words}
    found = [(m[0].lower(), encoded.char_to_token(m.end() - 1)) for m in re.finditer(r"\w+", prompt)]
    before = [("a", None), *found]
    rows = [(token, None if other in NO_ATTRIBUTES else attribute)
            for (other, attribute), (word, token) in zip(before, found) if word in wanted]
    if not rows or any(token is None for token, _ in rows):
        raise UserError(f"--compose {' '.join(words)}: the text encoder reads no such word in the prompt "
                        f"{prompt!r}; name its objects, in its own words")
    return tuple(map(list, zip(*rows)))


def optimised_noise(student, z, cond, tokens, steps, scale):
    """The noise z [B, C, H, W] after `steps` updates; tokens: (objects, attributes) of each sample."""
    with recorded_maps(student.net) as maps, torch.enable_grad():
        for _ in range(steps):
            maps.clear()
            z = z.detach().requires_grad_(True)
            one_step(student, z, cond)
            images = smoothed_maps(mean_map(maps))
            # Each sample's gradient is its own: nothing in the network mixes a batch.
            loss = sum(attendance_loss(image, objects) + binding_loss(image, objects, attributes)
                       for image, (objects, attributes) in zip(images, tokens))
            z = z - scale * torch.autograd.grad(loss, z)[0]
    return z.detach()


def draw_composed(student, codec, prompts, seed, words, steps, scale):
    """common.draw_samples from optimised noise; words: the objects, of which a prompt may name others.

    Raises UserError if the network is not Stable Diffusion's, or a prompt names none of them.
    """
    if "StableDiffusion" not in codec.name:
        raise UserError(f"--compose: not for a {codec.name}; give a Stable Diffusion student")
    tokens, pictures = {y: tokens_of(codec.pipe.tokenizer, y, words) for y in prompts}, []
    for y, z in chunks_of(prompts, codec, seed):
        cond = codec.cond(y)
        z = optimised_noise(student, z, cond, [tokens[prompt] for prompt in y], steps, scale)
        with torch.no_grad():
            pictures.append(codec.decode(one_step(student, z, cond)).clamp(-1, 1).cpu())
    return torch.cat(pictures)
