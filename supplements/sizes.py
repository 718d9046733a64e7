"""Other sizes than the trained one, without training: ScaleCrafter (He et al., arXiv 2310.07702).

Supplement 8.5 of SwiftBrush v2: convolutions are re-dilated. At twice the size a 3 x 3 kernel sees half of
what it saw in training, and a network draws its objects several times. With taps that are farther apart it
sees as much as then.
"""

from contextlib import contextmanager
from functools import partial
from math import ceil, sqrt

import torch.nn.functional as F

from common import UserError


def redilated_conv(x, weight, bias, ratio):
    """A convolution with taps that are `ratio` pixels apart; x [B, C, H, W] -> [B, O, H, W].

    Dilation is whole: it is ceil(ratio), on an x that is enlarged by what this is too much, and the result is
    brought back to the size of x (ReDilateConvProcessor in ScaleCrafter's model.py). weight [O, C, K, K], K
    odd; bias [O] or None; stride 1.
    """
    dilation, size = ceil(ratio), x.shape[2:]
    enlarged = F.interpolate(x, [round(side * dilation / ratio) for side in size], mode="bilinear")
    padding = dilation * (weight.shape[-1] // 2)
    return F.interpolate(F.conv2d(enlarged, weight, bias, 1, padding, dilation), size, mode="bilinear")


def redilated_layers(unet):
    """The convolutions that are re-dilated: those of the lowest level.

    ScaleCrafter's lists for 2 and 2.5 times the size, assets/dilate_settings/sd1.5_1024x1024.txt and
    sd2.1_1280x1280.txt: the last down block, the middle, the first up block with its upsampler.
    """
    up = unet.up_blocks[0]
    for resnet in (*unet.down_blocks[-1].resnets, *unet.mid_block.resnets, *up.resnets):
        yield from (resnet.conv1, resnet.conv2)
    yield from (upsampler.conv for upsampler in up.upsamplers or ())


@contextmanager
def redilated(unet, ratio):
    """Inside the with block the taps of the lowest level's convolutions are `ratio` pixels apart."""
    layers = list(redilated_layers(unet))
    for layer in layers:
        layer.forward = partial(redilated_conv, weight=layer.weight, bias=layer.bias, ratio=ratio)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # behind it is the class's own


@contextmanager
def resized(student, codec, size):
    """Inside the with block pictures are drawn in the size (H, W), in pixels; None: no change.

    One ratio serves both directions, the root of that of the areas; a smaller picture takes the network as it
    is. Raises UserError if the network cannot halve such a picture as often as it does, or is no UNet.
    """
    if size is None:
        yield
        return
    if not hasattr(student.net, "mid_block"):
        raise UserError(f"--size: {codec.name} has no convolutions to re-dilate; leave it out")
    shape, trained = codec.shape, codec.picture_size
    pixels = trained // shape[-1]
    step = pixels * 2 ** (len(student.net.down_blocks) - 1)
    if any(side < step or side % step for side in size):
        raise UserError(f"--size {size[0]} {size[1]}: must be two multiples of {step}; the model's own is "
                        f"{trained} {trained}")
    try:
        codec.shape, codec.picture_size = (shape[0], size[0] // pixels, size[1] // pixels), max(size)
        with redilated(student.net, max(1, sqrt(size[0] * size[1]) / trained)):
            yield
    finally:
        codec.shape, codec.picture_size = shape, trained
