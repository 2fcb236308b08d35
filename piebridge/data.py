"""Images of the target task and of the cloud side: found, split, decoded once, kept as uint8."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional, Union

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from .config import DataConfig, Study
from .embedded import handwritten_digits, render_characters

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}
CLOUD_MEMORY_MIB = 2**30  # a cloud machine holds its images in memory
MANY_IMAGES = 20_000  # from here on processes: on two cores as fast as threads, on many cores faster
SPLITS = ("train", "validation", "test")

Source = Union[Path, bytes, np.ndarray]  # a file, its content, or an image (H, W, 3) uint8


class DataError(ValueError):
    """A data set is absent or does not hold what a study asks for; the message names the file or folder."""


@dataclass(frozen=True)
class Task:
    """A target task, decoded.

    Attributes:
        classes: class names; a label is an index into them.
        images: uint8, shape (N, 3, R, R), RGB, in channels-last memory order.
        labels: int64, shape (N,).
        splits: `train`, `validation` and `test`: int64 indices into the images, disjoint.
        larger: uint8, shape (T, 3, S, S): the training and validation images at the same indices, which are the first,
            with S a quarter larger than R, so that crops stay sharp; None in the plain regime.
    """

    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    splits: dict[str, Tensor]
    larger: Optional[Tensor] = None


@dataclass(frozen=True)
class CloudImages:
    """Public images of the cloud side.

    Attributes:
        train: uint8, shape (N, 3, S, S), with S a quarter larger than the backbone's input, so that crops stay sharp.
        held_out: uint8, shape (M, 3, R, R): fidelity is measured on them; never trained on.
        train_labels: int64, shape (N,), or None where the images have none.
        held_out_difficulty: float, shape (M,), in [0, 1]: the setting of the characters' generator, else None.
    """

    train: Tensor
    held_out: Tensor
    train_labels: Optional[Tensor] = None
    held_out_difficulty: Optional[Tensor] = None


# ---------------------------------------------------------------------------------------------------- target tasks


def load_task(study: Study, scratch: Optional[Path] = None) -> Task:
    """Find, split and decode the target task of a study.

    Args:
        study: its `data` section says what; images are resized to `backbone.resolution`, and in the augmented regime
            those of training and validation decoded larger besides.
        scratch: folder for the memory-mapped file, used when the images exceed `data.memory_mib`.

    Raises:
        DataError: no such folder, an empty class, too few images, a corrupt image.
    """
    config = study.data
    sources, labels, classes, chosen = find_task(study)
    order = np.concatenate([chosen[name] for name in SPLITS])
    ordered, skip_corrupt = [sources[i] for i in order], config.on_corrupt == "skip"
    images, good = decode(ordered, study.backbone.resolution, config.memory_mib, scratch, skip_corrupt)
    ends = np.cumsum([len(chosen[name]) for name in SPLITS])
    larger = None
    if study.training.regime == "augmented":
        side = side_for_crops(study.backbone.resolution)
        larger, _ = decode(ordered[: ends[1]], side, config.memory_mib, scratch, skip_corrupt, "decoding for crops")
    bounds = zip(SPLITS, (0, *ends[:-1]), ends)
    position = torch.arange(len(order))
    indices = {name: position[start:end][torch.from_numpy(good[start:end])] for name, start, end in bounds}
    return Task(tuple(classes), images, torch.tensor([labels[i] for i in order]), indices, larger)


def side_for_crops(resolution: int) -> int:
    """Side that images are decoded at if crops of them are to be seen at `resolution`, pixels."""
    return round(1.25 * resolution)


def find_task(study: Study) -> tuple[list[Source], list[int], list[str], dict[str, np.ndarray]]:
    """Find and split the target task of a study, without decoding an image.

    Returns:
        Sources of all images, their labels, the class names, and the indices of each split.

    Raises:
        DataError: no such folder, an empty class, too few images.
    """
    sources, labels, splits, classes = _find_samples(study.data)
    return sources, labels, classes, _split(study.data, labels, splits, classes, np.random.default_rng(study.seed))


def _find_samples(config: DataConfig) -> tuple[list[Source], list[int], Optional[list[str]], list[str]]:
    """Sources, labels, the split of each sample if the data set has its own, and class names."""
    if config.name == "digits":
        images, labels = handwritten_digits()
        return list(images), labels.tolist(), None, [str(digit) for digit in range(10)]
    root = _data_root(config)
    if config.download:
        _download(config.name, root)
    if config.name == "caltech101":
        return _class_folders(root / "caltech101" / "101_ObjectCategories", ignored={"BACKGROUND_Google"})
    if config.name == "caltech256":
        return _class_folders(root / "caltech256" / "256_ObjectCategories", ignored={"257.clutter"})
    if config.name == "dtd":
        return _dtd(root / "dtd" / "dtd")
    if config.name == "dogs_vs_cats":
        return _dogs_vs_cats(root / "dogs-vs-cats" / "train")
    return _own_folder(root)


def _data_root(config: DataConfig) -> Path:
    root = config.root or os.environ.get("PIEBRIDGE_DATA")
    if not root:
        raise DataError(f"data.root: say where {config.name} lies, or set the variable PIEBRIDGE_DATA")
    return Path(root).expanduser()


def _download(name: str, root: Path) -> None:
    from torchvision import datasets

    sets = {"caltech101": datasets.Caltech101, "caltech256": datasets.Caltech256, "dtd": datasets.DTD}
    if name not in sets:
        raise DataError(f"data.download: torchvision has no download of {name}; put it under {root} yourself")
    root.mkdir(parents=True, exist_ok=True)
    sets[name](root, download=True)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; data.root or PIEBRIDGE_DATA must lead to the data set")
    return path


def _photos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())


def _class_folders(folder: Path, ignored: frozenset[str] | set[str] = frozenset()):
    names = sorted(path.name for path in _folder(folder).iterdir() if path.is_dir() and path.name[0] != ".")
    classes = [name for name in names if name not in ignored]
    if len(classes) < 2:
        raise DataError(f"{folder}: needs at least two class folders, found {len(classes)}")
    sources, labels = [], []
    for label, name in enumerate(classes):
        photos = _photos(folder / name)
        if not photos:
            raise DataError(f"{folder / name}: no images in this class folder ({', '.join(sorted(PHOTO_SUFFIXES))})")
        sources += photos
        labels += [label] * len(photos)
    return sources, labels, None, classes


def _dtd(folder: Path):
    images, sources, labels, splits = _folder(folder / "images"), [], [], []
    classes = sorted(path.name for path in images.iterdir() if path.is_dir())
    for split, file in (("train", "train1.txt"), ("validation", "val1.txt"), ("test", "test1.txt")):
        path = folder / "labels" / file
        if not path.is_file():
            raise DataError(f"{path}: no such file; DTD's own splits are needed")
        for line in path.read_text(encoding="utf-8").split():
            name = line.split("/")[0]
            if name not in classes:
                raise DataError(f"{path}: class {name!r} has no folder in {images}")
            sources.append(images / line)
            labels.append(classes.index(name))
            splits.append(split)
    return sources, labels, splits, classes


def _dogs_vs_cats(folder: Path):
    sources, labels = [], []
    for label, name in enumerate(("cat", "dog")):
        photos = sorted(_folder(folder).glob(f"{name}.*.jpg"), key=lambda path: int(path.name.split(".")[1]))
        if not photos:
            raise DataError(f"{folder}: no images named {name}.<number>.jpg")
        sources += photos
        labels += [label] * len(photos)
    return sources, labels, None, ["cat", "dog"]


def _own_folder(folder: Path):
    names = {path.name: path for path in _folder(folder).iterdir() if path.is_dir()}
    parts = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
    present = {parts[name]: path for name, path in names.items() if name in parts}
    if "train" not in present:
        return _class_folders(folder)
    if "test" not in present:
        raise DataError(f"{folder}: has a train folder but no test folder")
    sources, labels, splits, classes = [], [], [], None
    for split, path in present.items():
        part_sources, part_labels, _, part_classes = _class_folders(path)
        classes = classes or part_classes
        if part_classes != classes:
            odd = sorted(set(part_classes) ^ set(classes))[0]
            raise DataError(f"{path}: class {odd!r} is not in both this folder and {present['train']}")
        sources, labels = sources + part_sources, labels + part_labels
        splits += [split] * len(part_sources)
    return sources, labels, splits, classes


def _split(
    config: DataConfig, labels: Sequence[int], splits: Optional[Sequence[str]], classes: Sequence[str],
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Indices of each split: class by class, at random, the same for the same seed."""
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    labels = np.asarray(labels)
    own = np.asarray(splits) if splits is not None else None
    for label, name in enumerate(classes):
        members = generator.permutation(np.flatnonzero(labels == label))
        if own is None:
            wanted = config.train_per_class or len(members) - max(1, round(config.test_share * len(members)))
            if wanted >= len(members):
                raise DataError(
                    f"class {name!r} has {len(members)} images: data.train_per_class={wanted} leaves none to test on"
                )
            fitting, testing, holding = members[:wanted], members[wanted:], None
        else:
            fitting, testing, holding = (members[own[members] == part] for part in ("train", "test", "validation"))
            if config.train_per_class and config.train_per_class > len(fitting):
                raise DataError(
                    f"class {name!r} has {len(fitting)} training images, fewer than "
                    f"data.train_per_class={config.train_per_class}"
                )
            fitting = fitting[: config.train_per_class]
        if holding is None or not len(holding):
            held = max(1, round(config.validation_share * len(fitting)))
            if held >= len(fitting):
                raise DataError(f"class {name!r} has {len(fitting)} training image(s): too few to hold one out")
            holding, fitting = fitting[:held], fitting[held:]
        if not len(fitting) or not len(testing):
            raise DataError(f"class {name!r} has no {'training' if not len(fitting) else 'test'} images")
        for part, indices in (("train", fitting), ("validation", holding), ("test", testing[: config.test_per_class])):
            chosen[part] += indices.tolist()
    return {part: np.array(indices) for part, indices in chosen.items()}


# -------------------------------------------------------------------------------------------------------- decoding


def allocate(shape: tuple[int, ...], dtype: np.dtype, memory_mib: int, scratch: Optional[Path]) -> np.ndarray:
    """An array in memory, or above `memory_mib` (MiB) in a memory-mapped file that vanishes with it.

    Args:
        shape, dtype: of the array; its content is arbitrary.
        memory_mib: limit.
        scratch: folder of the file, made if absent; default: the system's temporary folder.
    """
    if np.prod(shape, dtype=np.int64) * dtype.itemsize <= memory_mib * 2**20:
        return np.empty(shape, dtype=dtype)
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - nameless: gone when the last user of the mapping is
    return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def decode(
    sources: Sequence[Source], side: int, memory_mib: int, scratch: Optional[Path] = None, skip_corrupt: bool = False,
    progress: str = "decoding images",
) -> tuple[Tensor, np.ndarray]:
    """Decode images once: RGB, shorter side resized to `side`, centre square.

    Args:
        sources: files, their contents, or uint8 arrays (H, W, 3).
        side: side of the square result, pixels.
        memory_mib: above this size (MiB) the images go to a memory-mapped file in `scratch`, removed with the tensor.
        skip_corrupt: leave images out that cannot be decoded (and name them) instead of raising.

    Returns:
        uint8 tensor of shape (N, 3, side, side) in channels-last memory order, and a boolean array (N,): decoded.

    Raises:
        DataError: an image that cannot be decoded, by name.
    """
    store = allocate((len(sources), side, side, 3), np.dtype(np.uint8), memory_mib, scratch)
    good = np.ones(len(sources), dtype=bool)

    with _workers(len(sources)) as pool:
        found = pool.map(partial(_decode_or_say_why, side=side), sources, chunksize=32)
        for index, image in enumerate(tqdm(found, total=len(sources), desc=progress, disable=len(sources) < 500)):
            if not isinstance(image, str):
                store[index] = image
                continue
            name = sources[index] if isinstance(sources[index], Path) else f"image {index}"
            if not skip_corrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise DataError(
                    f"{name}: cannot be decoded ({image}); remove it, or set data.on_corrupt=skip to leave it out"
                )
            good[index] = False
            tqdm.write(f"left out, cannot be decoded: {name}", file=sys.stderr)
    return torch.from_numpy(store).permute(0, 3, 1, 2), good


def _workers(images: int) -> Executor:
    """Threads; for many images on Linux processes, which do not wait for each other's Python."""
    if images < MANY_IMAGES or not sys.platform.startswith("linux"):
        return ThreadPoolExecutor(os.cpu_count())
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork"))


def _decode_or_say_why(source: Source, side: int) -> np.ndarray | str:
    try:
        return _decode_one(source, side)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__


def _decode_one(source: Source, side: int) -> np.ndarray:
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.draft("RGB", (side, side))  # JPEG only: decode no larger than needed
        image = ImageOps.exif_transpose(image)  # cameras note how they were held
    width, height = image.size
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    left, top = (width - min(width, height)) / 2, (height - min(width, height)) / 2
    box = (left, top, left + min(width, height), top + min(width, height))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


# ------------------------------------------------------------------------------------------------------ cloud side


def load_cloud(study: Study) -> CloudImages:
    """The public images that subnets are aligned on and the router learns from.

    Raises:
        DataError: no images in the folder that `cloud.data` names.
    """
    config, side = study.cloud, study.backbone.resolution
    if config.data == "characters":
        characters = render_characters(config.images + config.held_out, side, study.seed)
        pixels = torch.from_numpy(characters.images).permute(0, 3, 1, 2)
        return CloudImages(
            pixels[: config.images], pixels[config.images :], torch.from_numpy(characters.labels[: config.images]),
            torch.from_numpy(characters.difficulty[config.images :]),
        )
    train, held_out = _cloud_sources(study)
    decoded, _ = decode(train, side_for_crops(side), CLOUD_MEMORY_MIB, progress="decoding cloud images")
    return CloudImages(decoded, decode(held_out, side, CLOUD_MEMORY_MIB)[0])


def load_held_out(study: Study) -> Tensor:
    """The held-out public images alone, uint8, shape (M, 3, R, R); raises as `load_cloud`."""
    if study.cloud.data == "characters":
        return load_cloud(study).held_out
    return decode(_cloud_sources(study)[1], study.backbone.resolution, CLOUD_MEMORY_MIB)[0]


def _cloud_sources(study: Study) -> tuple[list[Source], list[Source]]:
    data = study.cloud.data
    folders = data if isinstance(data, tuple) else (data,)
    copies = study.cloud.copies or (1,) * len(folders)
    return _public_images([_cloud_folder(path) for path in folders], copies, study.cloud.held_out, study.seed)


def _cloud_folder(path: Path) -> Path:
    data = os.environ.get("PIEBRIDGE_DATA")
    for folder in (path.expanduser(), Path(data) / path if data else path):
        if folder.is_dir():
            return folder
    raise DataError(f"cloud.data: {path}: no such folder, neither here nor below PIEBRIDGE_DATA")


def _public_images(
    folders: Sequence[Path], copies: Sequence[int], held_out: int, seed: int
) -> tuple[list[Source], list[Source]]:
    """(training, held-out) images: Parquet files named validation-* are never trained on; the first folder's are held
    out, or, if it has none, a random part of it is. Training images of a folder count as often as `copies` says."""
    import pyarrow.parquet as parquet

    def read(path: Path) -> list[Source]:
        return [image["bytes"] for image in parquet.read_table(path, columns=["image"])["image"].to_pylist()]

    train: list[Source] = []
    validation: list[Source] = []
    generator = np.random.default_rng(seed)
    for place, (folder, times) in enumerate(zip(folders, copies)):
        found: list[Source] = list(_photos(folder))
        for path in sorted(folder.rglob("*.parquet")):
            if not path.name.startswith("validation"):
                found += read(path)
            elif place == 0:
                validation += read(path)
        if place == 0:
            candidates = validation or found
            order = generator.permutation(len(candidates))
            if not validation:
                found = [candidates[i] for i in order[held_out:]]
            validation = [candidates[i] for i in order[:held_out]]
        train += times * found
    if not train or not validation:
        names = ", ".join(map(str, folders))
        raise DataError(f"{names}: {len(train)} training and {len(validation)} held-out images; more are needed")
    return train, validation
