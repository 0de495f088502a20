"""Images made of scikit-learn's handwritten digits among fragments of others, drawn as they are needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["Digit", "Pair"]

SIDE = 32


class Digit:
    """Images (n, 1, 32, 32): a digit of 10 pixels in one quadrant, fragments of others everywhere, noise; which one."""

    logits = 10

    def __init__(self, train: bool, size: int = 10) -> None:
        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
        images, labels = (split[0], split[2]) if train else (split[1], split[3])
        self.images = F.interpolate(torch.tensor(images / 16).float().view(-1, 1, 8, 8), size=10, mode="bilinear")
        self.images = F.interpolate(self.images, size=size, mode="bilinear")
        self.labels, self.size = torch.tensor(labels), size

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images with mean about 0, and their labels."""
        canvas = torch.zeros(n, SIDE, SIDE)
        for _ in range(6):
            which, cut = self._random(len(self.images), generator, n), self._random(6, generator, 2, n)
            self._paste(canvas, 0.6 * self._fragments(which, cut), self._random(SIDE - 5, generator, 2, n), add=True)
        which, quadrant = self._random(len(self.images), generator, n), self._random(4, generator, n)
        place = self._random(7, generator, 2, n) + 16 * torch.stack((quadrant // 2, quadrant % 2))
        self._paste(canvas, self.images[which, 0], place)
        canvas = canvas + 0.1 * torch.randn(n, SIDE, SIDE, generator=generator)
        return ((canvas - 0.15) / 0.3).unsqueeze(1), self.labels[which]

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of (B, logits)."""
        return F.cross_entropy(output, y, label_smoothing=0.1)

    def right(self, output: Tensor, y: Tensor) -> Tensor:
        """(B,) 1 where the answer is right."""
        return (output.argmax(dim=1) == y).float()

    def targets(self, y: Tensor) -> Tensor:
        """What clusters are told of the labels: (B,), or shares (B, logits)."""
        return y

    def _random(self, high: int, generator: torch.Generator, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    def _fragments(self, which: Tensor, cut: Tensor) -> Tensor:
        """(n, 5, 5) of images ``which`` from the corners ``cut`` (2, n)."""
        rows, columns = (c.view(-1, 1) + torch.arange(5) for c in cut)
        return self.images[which, 0][torch.arange(len(which)).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]

    def _paste(self, canvas: Tensor, pieces: Tensor, place: Tensor, add: bool = False) -> None:
        """Put ``pieces`` (n, s, s) at ``place`` (2, n), added or where they are brighter."""
        rows, columns = (p.view(-1, 1) + torch.arange(pieces.shape[1]) for p in place)
        at = (torch.arange(len(canvas)).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1))
        canvas[at] = canvas[at] + pieces if add else torch.maximum(canvas[at], pieces)


class Pair(Digit):
    """A digit of 11 pixels in the left half, one in the right half, fragments, texture, noise; which two: 100 classes.

    The head has 10 logits for each half; an image counts as right if both are.
    """

    logits = 20

    def __init__(self, train: bool) -> None:
        super().__init__(train, size=11)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n images with mean about 0, and their labels, 10 left + right."""
        texture = torch.rand(n, 1, 12, 12, generator=generator)
        canvas = 0.25 * F.interpolate(texture, size=SIDE, mode="bilinear")[:, 0]
        for _ in range(5):
            which, cut = self._random(len(self.images), generator, n), self._random(self.size - 4, generator, 2, n)
            self._paste(canvas, 0.7 * self._fragments(which, cut), self._random(SIDE - 5, generator, 2, n))
        y = torch.zeros(n, dtype=torch.long)
        for half in range(2):
            which = self._random(len(self.images), generator, n)
            row = self._random(SIDE - self.size + 1, generator, n)
            column = 16 * half + self._random(17 - self.size, generator, n)
            self._paste(canvas, self.images[which, 0], torch.stack((row, column)))
            y = 10 * y + self.labels[which]
        canvas = canvas + 0.1 * torch.randn(n, SIDE, SIDE, generator=generator)
        return ((canvas - 0.25) / 0.3).unsqueeze(1), y

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The sum of both halves' cross entropies."""
        return super().loss(output[:, :10], y // 10) + super().loss(output[:, 10:], y % 10)

    def right(self, output: Tensor, y: Tensor) -> Tensor:
        """(B,) 1 where both answers are right."""
        return super().right(output[:, :10], y // 10) * super().right(output[:, 10:], y % 10)

    def targets(self, y: Tensor) -> Tensor:
        """Half a share for each digit, (B, 20)."""
        return 0.5 * (F.one_hot(y // 10, 20) + F.one_hot(10 + y % 10, 20)).float()
