"""The embedded dataset: pictures drawn by code, each with its caption."""

from itertools import permutations

import numpy as np
import torch
from torch.utils.data import Dataset

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.05, 0.75, 0.1), "blue": (0.1, 0.2, 0.9),
           "yellow": (0.95, 0.85, 0.1)}
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}
SHAPES = ("circle", "square", "triangle")
# Ranges of the radius, that of a disc of the same area, in units of the picture; the gap keeps the two words
# apart.
SIZES = {"small": (0.22, 0.28), "large": (0.30, 0.36)}
# Half the side of each shape's box, in units of that radius.
HALF = torch.tensor([1, (torch.pi / 4)**0.5, (torch.pi / 2)**0.5])


def coverage(shape, radius, x, y, size):
    """How much of each pixel the shape covers, in [0, 1]: [N, size, size].

    shape: indices into SHAPES, [N]; radius, as in SIZES, and the centre x, y of the shape's box: [N], in
    units of the picture, y downwards. The shapes are a disc, a square and an upright triangle as wide as
    high, of equal area. Edges are one pixel soft.
    """
    grid = (torch.arange(size) + 0.5) / size
    dx = grid.view(1, 1, -1) - x.view(-1, 1, 1)
    dy = grid.view(1, -1, 1) - y.view(-1, 1, 1)
    half = (radius * HALF[shape]).view(-1, 1, 1)
    # Signed distances to the edges; the triangle's flanks rise 2 for 1.
    flank = (2 * dx.abs() - dy - half) / 5**0.5
    disc, square = torch.hypot(dx, dy) - half, torch.maximum(dx.abs(), dy.abs()) - half
    distance = torch.stack([disc, square, torch.maximum(flank, dy - half)])
    return (0.5 - distance[shape, torch.arange(len(shape))] * size).clamp(0, 1)


class Shapes(Dataset):
    """One soft-edged shape a picture, drawn by rule: picture i is a function of (seed, i), without end.

    A sample is {"image": uint8 [3, size, size], "caption": "a large red circle on white", "skipped": []}.
    rolled: another palette for the same captions, red drawn in the next colour of the list, and so on,
    backgrounds too.
    """

    endless = True
    classes = []

    def __init__(self, size, seed=0, rolled=False):
        self.size, self.seed, self.rolled = size, seed, rolled

    def attributes(self, indices, like=None):
        """Tensors [N] by name: colour, background, shape, scale, which are indices, radius, x and y.

        like: such a dict, whose indices are kept: the same captions, with the shapes in other places.
        """
        u = np.stack([np.random.default_rng([self.seed, i]).random(7) for i in indices])
        u = torch.tensor(u, dtype=torch.float32)
        counts = torch.tensor([len(COLOURS), len(BACKGROUNDS), len(SHAPES), len(SIZES)])
        words = dict(zip(("colour", "background", "shape", "scale"), (u[:, :4] * counts).long().unbind(1)))
        words = {name: like[name] for name in words} if like else words
        low, high = torch.tensor(list(SIZES.values()))[words["scale"]].unbind(1)
        radius = low + u[:, 6] * (high - low)
        half = radius * HALF[words["shape"]]
        x, y = half + u[:, 4] * (1 - 2 * half), half + u[:, 5] * (1 - 2 * half)
        return dict(**words, radius=radius, x=x, y=y)

    @staticmethod
    def all_captions():
        """Every caption once, 72 of them."""
        return [f"a {scale} {colour} {shape} on {background}"
                for scale in SIZES for colour in COLOURS for shape in SHAPES for background in BACKGROUNDS]

    def captions(self, attributes):
        """The pictures' captions, such as "a large red circle on white"."""
        names = [list(n) for n in (SIZES, COLOURS, SHAPES, BACKGROUNDS)]
        keys = zip(*(attributes[k].tolist() for k in ("scale", "colour", "shape", "background")))
        return ["a {} {} {} on {}".format(*(n[k] for n, k in zip(names, key))) for key in keys]

    def shown(self, attributes):
        """The same attributes, but with the colour and background that are drawn, not the caption's."""
        seen = dict(colour=(attributes["colour"] + self.rolled) % len(COLOURS),
                    background=(attributes["background"] + self.rolled) % len(BACKGROUNDS))
        return attributes | seen

    def draw(self, attributes):
        """Attributes -> uint8 pictures [N, 3, size, size]."""
        a = self.shown(attributes)
        mask = coverage(a["shape"], a["radius"], a["x"], a["y"], self.size)[:, None]
        colour = torch.tensor(list(COLOURS.values()))[a["colour"]][:, :, None, None]
        background = torch.tensor(list(BACKGROUNDS.values()))[a["background"]][:, :, None, None]
        return ((background + mask * (colour - background)) * 255).round().to(torch.uint8)

    @staticmethod
    def state():
        """Nothing, for a rule does not change."""
        return []

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        # DataLoader asks for a whole batch by this name, which is then drawn at once.
        a = self.attributes(indices)
        return [dict(image=x, caption=c, skipped=[]) for x, c in zip(self.draw(a), self.captions(a))]


class TwoShapes(Shapes):
    """Two shapes a picture, of two kinds and two colours, drawn by rule like those of Shapes.

    A caption is "a red circle and a blue square on white". One is in the left half, one in the right, and the
    caption does not say which.
    """

    RADII = (0.16, 0.20)  # the widest triangle is then as wide as a half, to 0.002

    def attributes(self, indices):
        """colour, shape, radius, x and y [N, 2], of the first and the second shape; background [N]."""
        u = np.stack([np.random.default_rng([self.seed, i]).random(12) for i in indices])
        u = torch.tensor(u, dtype=torch.float32)
        words = dict(background=(u[:, 0] * len(BACKGROUNDS)).long())
        for name, part, names in (("colour", u[:, 1:3], COLOURS), ("shape", u[:, 3:5], SHAPES)):
            first = (part[:, 0] * len(names)).long()
            second = first + 1 + (part[:, 1] * (len(names) - 1)).long()
            words[name] = torch.stack([first, second % len(names)], 1)
        low, high = self.RADII
        radius = low + u[:, 5:7] * (high - low)
        half = radius * HALF[words["shape"]]
        left = torch.stack([u[:, 7] < 0.5, u[:, 7] >= 0.5], 1)
        x = half + u[:, 8:10] * (0.5 - 2 * half) + torch.where(left, 0, 0.5)
        return dict(**words, radius=radius, x=x, y=half + u[:, 10:12] * (1 - 2 * half))

    @staticmethod
    def all_captions():
        """Every caption once, 216 of them."""
        return [f"a {colour} {shape} and a {other_colour} {other_shape} on {background}"
                for colour, other_colour in permutations(COLOURS, 2)
                for shape, other_shape in permutations(SHAPES, 2) for background in BACKGROUNDS]

    def captions(self, attributes):
        """The pictures' captions, such as "a red circle and a blue square on white"."""
        colours, shapes, backgrounds = map(list, (COLOURS, SHAPES, BACKGROUNDS))
        keys = zip(*(attributes[k].tolist() for k in ("colour", "shape", "background")))
        return [f"a {colours[c]} {shapes[s]} and a {colours[d]} {shapes[t]} on {backgrounds[b]}"
                for (c, d), (s, t), b in keys]

    def draw(self, attributes):
        """Attributes -> uint8 pictures [N, 3, size, size]."""
        a, colours = attributes, torch.tensor(list(COLOURS.values()))
        picture = torch.tensor(list(BACKGROUNDS.values()))[a["background"]][:, :, None, None]
        for i in range(2):
            places = (a[name][:, i] for name in ("shape", "radius", "x", "y"))
            mask = coverage(*places, self.size)[:, None]
            picture = picture + mask * (colours[a["colour"][:, i]][:, :, None, None] - picture)
        return (picture * 255).round().to(torch.uint8)
