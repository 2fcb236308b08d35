"""What needs no download: rendered characters, real handwritten digits, and a small residual network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Characters:
    """Rendered characters.

    Attributes:
        images: uint8, shape (N, side, side, 3), light strokes on a dark ground.
        labels: int64, shape (N,), indices into `CHARACTERS`.
        difficulty: float32, shape (N,), in [0, 1]: how strongly the generator distorted the image.
    """

    images: np.ndarray
    labels: np.ndarray
    difficulty: np.ndarray


def typefaces() -> list[Path]:
    """The text fonts that matplotlib ships, without those that hold symbols only."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    symbols = ("cmex", "cmmi", "cmsy", "STIXNonUni", "STIXSiz", "LastResort", "Display")
    return sorted(path for path in folder.glob("*.ttf") if not any(part in path.name for part in symbols))


def render_characters(count: int, side: int, seed: int) -> Characters:
    """Render random characters in random typefaces, distorted, cluttered and noisy.

    A difficulty is drawn uniformly for each image and scales every distortion: rotation, shear, size, position, stroke
    thickness, blur, clutter by strokes, and pixel noise.

    Args:
        count: number of images.
        side: pixels.
        seed: the same seed gives the same images.
    """
    generator = np.random.default_rng(seed)
    canvas = 2 * side  # drawn at twice the size, then reduced: smooth edges
    fonts = {
        (path, size): ImageFont.truetype(str(path), round(canvas * size))
        for path in typefaces()
        for size in (0.75, 0.95, 1.2)
    }
    keys = sorted(fonts)
    images = np.empty((count, side, side, 3), dtype=np.uint8)
    labels = generator.integers(len(CHARACTERS), size=count)
    difficulty = generator.random(count).astype(np.float32)
    for index in tqdm(range(count), desc="rendering characters", disable=count < 500):
        hardness = float(difficulty[index])
        font = fonts[keys[generator.integers(len(keys))]]
        glyph = _glyph(CHARACTERS[labels[index]], font, canvas, hardness, generator)
        images[index] = _photograph(glyph, side, hardness, generator)[..., None]
    return Characters(images, labels, difficulty)


def _glyph(character: str, font, canvas: int, hardness: float, generator: np.random.Generator) -> Image.Image:
    image = Image.new("L", (canvas, canvas))
    stroke = int(generator.integers(0, 1 + round(1 + 2 * hardness)))
    ImageDraw.Draw(image).text(
        (canvas / 2, canvas / 2), character, fill=255, font=font, anchor="mm", stroke_width=stroke
    )
    angle, shear = generator.normal(0, 0.05 + 0.25 * hardness, size=2)
    stretch = 1 + generator.normal(0, 0.05 + 0.10 * hardness, size=2)
    shift = generator.normal(0, canvas * (0.01 + 0.04 * hardness), size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)
    offset = canvas / 2 - matrix @ (canvas / 2 + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform((canvas, canvas), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)


def _photograph(glyph: Image.Image, side: int, hardness: float, generator: np.random.Generator) -> np.ndarray:
    draw = ImageDraw.Draw(glyph)
    for _ in range(generator.binomial(3, 0.6 * hardness)):
        draw.line(
            generator.uniform(0, glyph.width, size=4).tolist(), fill=int(generator.integers(60, 200)),
            width=int(generator.integers(1, 3)),
        )
    coarse = round(side * (1 - generator.uniform(0.2, 0.3 + 0.45 * hardness)))
    image = glyph.resize((coarse, coarse), Image.Resampling.BOX).resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32)
    contrast = 1 - generator.uniform(0, 0.5 * hardness)
    noise = generator.normal(0, 2 + 28 * hardness, size=pixels.shape)
    return np.clip(pixels * contrast + noise, 0, 255).astype(np.uint8)


def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 real handwritten digits.

    Returns:
        uint8 images, shape (1797, 8, 8, 3), light strokes on a dark ground, and int64 labels, shape (1797,).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.clip(digits.images * 255 / 16, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1), digits.target.astype(np.int64)


class SmallResNet(nn.Module):
    """A residual network for 32 px images: three stages of basic blocks, 32, 64 and 128 channels.

    Its parts carry torchvision's names, so that it is cut and pruned by the same code as its large relatives.
    """

    def __init__(self, num_classes: int = len(CHARACTERS)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer2 = nn.Sequential(BasicBlock(32, 64, 2, _shortcut(32, 64)), BasicBlock(64, 64))
        self.layer3 = nn.Sequential(BasicBlock(64, 128, 2, _shortcut(64, 128)), BasicBlock(128, 128))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of normalised images, shape (B, 3, H, W)."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.fc(self.avgpool(self.layer3(self.layer2(self.layer1(maps)))).flatten(1))


def _shortcut(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
