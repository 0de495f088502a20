"""scikit-learn's handwritten digits as an ImageFolder, to try examples/train.py or timm's train.py without a download.

python examples/digits_folder.py DIGITS
python examples/train.py DIGITS --model ltm_test_vit --model-kwargs img_size=32 patch_size=4 merge_warmup_epochs=8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write_digits(folder: Path, size: int = 32) -> None:
    """train/CLASS/*.png of 1,437 digits and validation/CLASS/*.png of 360, of size x size pixels."""
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    for split, xs, ys in (("train", x, y), ("validation", x_test, y_test)):
        for i, (image, label) in enumerate(zip(xs, ys, strict=True)):
            file = folder / split / str(label) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((image.reshape(8, 8) * 15.9).astype("uint8"))
            picture.resize((size, size), Image.BILINEAR).convert("RGB").save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    args = parser.parse_args()
    write_digits(args.folder, args.size)


if __name__ == "__main__":
    main()
