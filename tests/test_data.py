"""Data sets on small made trees: layouts, splits, image formats, failures."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from tiny import tiny_study

from piebridge import data
from piebridge.data import DataError, allocate, decode, load_cloud, load_task


def photo(path, colour=(200, 30, 90), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def class_folders(root, counts, suffix=".png"):
    """A folder a class with so many photos; each photo has its own red value."""
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            photo(root / name / f"image_{index:04d}{suffix}", (10 * index, 40 * label, 0))
    return root


def task_of(root, name="folder", overrides=""):
    return load_task(tiny_study(
        f"data.name={name} data.root={root} data.train_per_class=null data.test_per_class=null backbone.resolution=16 "
        f"cloud.subnets=[] {overrides}"
    ))


def counts_of(task):
    return {name: len(indices) for name, indices in task.splits.items()}


# ---------------------------------------------------------------------------------------------- splits


def test_digits_are_split_class_by_class():
    task = load_task(tiny_study())
    assert task.classes == tuple("0123456789")
    assert task.images.shape == (150, 3, 32, 32)
    for name, wanted in (("train", 7), ("validation", 2), ("test", 6)):
        assert torch.bincount(task.labels[task.splits[name]]).tolist() == [wanted] * 10


def test_splits_are_disjoint_and_follow_the_seed():
    one, same, other = (load_task(tiny_study(f"seed={seed}")) for seed in (0, 0, 1))
    indices = torch.cat(list(one.splits.values()))
    assert len(indices.unique()) == len(indices) == len(one.images)
    assert torch.equal(one.images, same.images)
    assert all(torch.equal(one.splits[name], same.splits[name]) for name in data.SPLITS)
    assert not torch.equal(one.images, other.images)


def test_training_images_are_larger_where_crops_are_taken(tmp_path):
    """A photo that cannot be decoded keeps its place in both sets, so that an index means the same image in both."""
    root = class_folders(tmp_path, {"a": 6, "b": 6})
    (root / "a" / "image_0003.png").write_bytes(b"no image")
    options = "data.on_corrupt=skip backbone.resolution=20 data.test_share=0.3"
    plain, augmented = (task_of(root, overrides=f"{options} training.regime={name}") for name in ("plain", "augmented"))
    assert plain.larger is None
    assert torch.equal(plain.images[plain.splits["test"]], augmented.images[augmented.splits["test"]])
    training = torch.cat([augmented.splits["train"], augmented.splits["validation"]])
    assert augmented.larger.shape[1:] == (3, 25, 25)
    assert len(training) + 1 == len(augmented.larger) == len(augmented.images) - len(augmented.splits["test"])
    assert torch.equal(augmented.larger[training, :, 7, 7], augmented.images[training, :, 7, 7])  # of one colour each


def test_no_image_is_in_two_splits(tmp_path):
    task = task_of(class_folders(tmp_path, {"a": 12, "b": 12}))
    seen = [(int(task.images[i, 0, 8, 8]), int(task.labels[i])) for name in data.SPLITS for i in task.splits[name]]
    assert len(seen) == len(set(seen)) == 24


def test_shares_of_own_photos(tmp_path):
    class_folders(tmp_path, {"a": 20, "b": 10})
    task = task_of(tmp_path, overrides="data.test_share=0.3 data.validation_share=0.2")
    assert torch.bincount(task.labels[task.splits["test"]]).tolist() == [6, 3]
    assert torch.bincount(task.labels[task.splits["validation"]]).tolist() == [3, 1]
    assert counts_of(task)["train"] == 30 - 9 - 4


def test_more_training_images_than_there_are(tmp_path):
    class_folders(tmp_path, {"a": 9, "few": 5})
    with pytest.raises(DataError, match=r"'few' has 5 images.*train_per_class=5"):
        task_of(tmp_path, overrides="data.train_per_class=5")


def test_too_few_to_hold_out(tmp_path):
    class_folders(tmp_path, {"a": 9, "few": 2})
    with pytest.raises(DataError, match="'few' has 1 training image"):
        task_of(tmp_path)


# ---------------------------------------------------------------------------------------- data folders


def test_variable_not_set(monkeypatch):
    monkeypatch.delenv("PIEBRIDGE_DATA", raising=False)
    with pytest.raises(DataError, match="PIEBRIDGE_DATA"):
        load_task(tiny_study("data.name=caltech101"))


def test_variable_leads_to_the_data(monkeypatch, tmp_path):
    class_folders(tmp_path / "caltech101" / "101_ObjectCategories", {"a": 8, "b": 8})
    monkeypatch.setenv("PIEBRIDGE_DATA", str(tmp_path))
    assert load_task(tiny_study("data.name=caltech101 data.train_per_class=4")).classes == ("a", "b")


@pytest.mark.parametrize("name", ["caltech101", "caltech256", "dtd", "dogs_vs_cats", "folder"])
def test_missing_folder_is_named(tmp_path, name):
    with pytest.raises(DataError, match=f"{tmp_path / 'absent'}.*no such folder"):
        task_of(tmp_path / "absent", name)


def test_empty_class_folder_is_named(tmp_path):
    class_folders(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=f"{tmp_path / 'hollow'}: no images"):
        task_of(tmp_path)


@pytest.mark.parametrize("counts", [{}, {"only": 9}])
def test_one_class_is_no_task(tmp_path, counts):
    with pytest.raises(DataError, match=f"at least two class folders, found {len(counts)}"):
        task_of(class_folders(tmp_path, counts))


def test_hidden_folders_and_other_files_are_no_classes(tmp_path):
    class_folders(tmp_path, {"a": 6, "b": 6, ".cache": 3})
    (tmp_path / "README.txt").write_text("mine")
    assert task_of(tmp_path).classes == ("a", "b")


def own_splits(root, parts):
    for part, counts in parts.items():
        class_folders(root / part, counts)
    return root


def test_own_train_and_test_folders(tmp_path):
    task = task_of(own_splits(tmp_path, {"train": {"a": 8, "b": 8}, "test": {"a": 3, "b": 2}}))
    assert counts_of(task) == {"train": 14, "validation": 2, "test": 5}


@pytest.mark.parametrize("name", ["val", "validation"])
def test_own_validation_folder(tmp_path, name):
    task = task_of(own_splits(tmp_path, {"train": {"a": 8, "b": 8}, name: {"a": 3, "b": 3}, "test": {"a": 2, "b": 2}}))
    assert counts_of(task) == {"train": 16, "validation": 6, "test": 4}


def test_own_training_folder_without_a_test_folder(tmp_path):
    with pytest.raises(DataError, match="no test folder"):
        task_of(own_splits(tmp_path, {"train": {"a": 8, "b": 8}}))


def test_class_missing_in_one_split(tmp_path):
    parts = {"train": {"a": 8, "b": 8, "c": 8}, "test": {"a": 2, "c": 2}}
    with pytest.raises(DataError, match="class 'b'"):
        task_of(own_splits(tmp_path, parts))


def test_own_training_folder_with_too_few(tmp_path):
    own_splits(tmp_path, {"train": {"a": 4, "b": 8}, "test": {"a": 2, "b": 2}})
    with pytest.raises(DataError, match=r"'a' has 4 training images.*train_per_class=5"):
        task_of(tmp_path, "folder", "data.train_per_class=5")


@pytest.mark.parametrize(
    ("name", "folder", "ignored"),
    [
        ("caltech101", "caltech101/101_ObjectCategories", "BACKGROUND_Google"),
        ("caltech256", "caltech256/256_ObjectCategories", "257.clutter"),
    ],
)
def test_caltech_leaves_its_background_out(tmp_path, name, folder, ignored):
    class_folders(tmp_path / folder, {"001.ak47": 7, "002.flag": 7, ignored: 7}, ".jpg")
    task = task_of(tmp_path, name, "data.train_per_class=4")
    assert task.classes == ("001.ak47", "002.flag")
    assert counts_of(task) == {"train": 6, "validation": 2, "test": 6}


def make_dtd(root):
    folder = root / "dtd" / "dtd"
    class_folders(folder / "images", {"banded": 6, "dotted": 6}, ".jpg")
    (folder / "labels").mkdir()
    for position, file in enumerate(("train1.txt", "val1.txt", "test1.txt")):
        indices = (2 * position, 2 * position + 1)
        lines = [f"{name}/image_{index:04d}.jpg" for name in ("banded", "dotted") for index in indices]
        (folder / "labels" / file).write_text("\n".join(lines) + "\n")
    return folder


def test_dtd_uses_its_own_splits(tmp_path):
    make_dtd(tmp_path)
    task = task_of(tmp_path, "dtd")
    assert task.classes == ("banded", "dotted")
    assert counts_of(task) == {"train": 4, "validation": 4, "test": 4}
    reds = {name: set() for name in data.SPLITS}
    for name, indices in task.splits.items():
        reds[name] |= {round(task.images[i, 0].float().mean().item(), -1) for i in indices}
    assert reds == {"train": {0, 10}, "validation": {20, 30}, "test": {40, 50}}


def test_dtd_without_a_split_file(tmp_path):
    (make_dtd(tmp_path) / "labels" / "val1.txt").unlink()
    with pytest.raises(DataError, match=r"val1\.txt"):
        task_of(tmp_path, "dtd")


def test_dtd_with_an_unknown_class(tmp_path):
    path = make_dtd(tmp_path) / "labels" / "test1.txt"
    path.write_text(path.read_text() + "woven/image_0000.jpg\n")
    with pytest.raises(DataError, match=r"test1\.txt.*'woven'"):
        task_of(tmp_path, "dtd")


def test_dogs_vs_cats(tmp_path):
    for index in range(6):
        photo(tmp_path / "dogs-vs-cats" / "train" / f"cat.{index}.jpg", (200, 0, 0))
        photo(tmp_path / "dogs-vs-cats" / "train" / f"dog.{index}.jpg", (0, 0, 200))
    task = task_of(tmp_path, "dogs_vs_cats", "data.train_per_class=4")
    assert task.classes == ("cat", "dog")
    assert counts_of(task) == {"train": 6, "validation": 2, "test": 4}
    blue = task.images[:, 2].float().mean((1, 2)) > 100
    assert torch.equal(blue.long(), task.labels)


def test_dogs_without_cats(tmp_path):
    photo(tmp_path / "dogs-vs-cats" / "train" / "dog.0.jpg")
    with pytest.raises(DataError, match="cat"):
        task_of(tmp_path, "dogs_vs_cats")


# -------------------------------------------------------------------------------------------- decoding


def ramp(width=32, height=32, highest=255, kind=np.uint8):
    return np.tile(np.linspace(0, highest, width).round().astype(kind), (height, 1))


def formats(folder):
    """The same grey ramp, stored in many ways."""
    grey = Image.fromarray(ramp())
    grey.save(folder / "grey.png")
    grey.save(folder / "grey.jpg", quality=95)
    grey.convert("RGB").save(folder / "colour.webp", lossless=True)
    grey.convert("CMYK").save(folder / "cmyk.tif")
    grey.convert("P").save(folder / "palette.gif")
    grey.convert("P").save(folder / "palette.png")
    grey.convert("LA").save(folder / "grey_alpha.png")
    grey.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(ramp(highest=65535, kind=np.uint16)).save(folder / "sixteen_bits.png")
    Image.fromarray(ramp(highest=65535, kind=np.uint16)).save(folder / "sixteen_bits.tif")
    return sorted(folder.iterdir())


def test_every_format_becomes_the_same_rgb(tmp_path):
    paths = formats(tmp_path)
    images, good = decode(paths, 32, 100)
    assert good.all()
    assert images.dtype == torch.uint8
    assert images.shape == (len(paths), 3, 32, 32)
    expected = torch.from_numpy(ramp()).int()
    distances = {path.name: (image.int() - expected).abs().max().item() for path, image in zip(paths, images)}
    assert {name: distance for name, distance in distances.items() if distance > 3} == {}


def test_processes_decode_as_threads_do(tmp_path, monkeypatch):
    paths = formats(tmp_path)
    expected, _ = decode(paths, 32, 100)
    broken = tmp_path / "broken.jpg"
    broken.write_text("text", encoding="utf-8")
    monkeypatch.setattr("piebridge.data.MANY_IMAGES", 1)
    monkeypatch.setattr("sys.platform", "linux")
    images, good = decode([*paths, broken], 32, 100, skip_corrupt=True)
    assert torch.equal(images[:-1], expected)
    assert good.tolist() == [True] * len(paths) + [False]
    with pytest.raises(DataError, match=r"broken\.jpg: cannot be decoded"):
        decode([broken, *paths], 32, 100)


def test_cmyk_photo_keeps_its_colours(tmp_path):
    colour = (200, 40, 90)
    Image.new("RGB", (32, 32), colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    images, _ = decode([tmp_path / "cmyk.jpg"], 32, 100)
    assert (images[0, :, 16, 16].int() - torch.tensor(colour)).abs().max() < 8


def test_centre_square_of_the_shorter_side():
    """A wide image whose centre square is white and whose sides are black."""
    picture = np.zeros((20, 60, 3), dtype=np.uint8)
    picture[:, 20:40] = 255
    images, _ = decode([picture, picture.transpose(1, 0, 2)], 10, 100)
    assert images[:, :, 1:-1, 1:-1].min() == 255


def test_photos_are_turned_as_the_camera_notes(tmp_path):
    """Orientation 6: the camera was held on its side, the stored image is to be turned clockwise."""
    upright = Image.fromarray(ramp().T.copy()).convert("RGB")
    upright.save(tmp_path / "upright.png")
    notes = Image.Exif()
    notes[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=notes)
    images, _ = decode([tmp_path / "upright.png", tmp_path / "turned.jpg"], 32, 100)
    assert (images[0].int() - images[1].int()).abs().max() < 8


def test_files_contents_and_arrays_decode_alike(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    images, _ = decode([tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture], 24, 100)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], torch.from_numpy(picture).permute(2, 0, 1))
    assert torch.equal(images[2], images[0])
    assert images.is_contiguous(memory_format=torch.channels_last)


def spoil(path, how):
    content = path.read_bytes()
    path.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[how])


@pytest.mark.parametrize("how", ["cut off", "empty", "text"])
def test_corrupt_image_is_named(tmp_path, how):
    class_folders(tmp_path, {"a": 6, "b": 6}, ".jpg")
    broken = tmp_path / "b" / "image_0003.jpg"
    spoil(broken, how)
    with pytest.raises(DataError, match=f"{broken}: cannot be decoded"):
        task_of(tmp_path)


def test_corrupt_image_is_left_out(tmp_path, capsys):
    class_folders(tmp_path, {"a": 6, "b": 6}, ".jpg")
    whole = counts_of(task_of(tmp_path))
    spoil(tmp_path / "b" / "image_0003.jpg", "text")
    task = task_of(tmp_path, overrides="data.on_corrupt=skip")
    assert sum(counts_of(task).values()) == sum(whole.values()) - 1
    assert "image_0003.jpg" in capsys.readouterr().err
    used = torch.cat(list(task.splits.values()))
    reds = [round(task.images[i, 0].float().mean().item(), -1) for i in used if task.labels[i] == 1]
    assert sorted(reds) == [0, 10, 20, 40, 50]


def test_memory_mapped_images_equal_those_in_memory(tmp_path):
    pictures = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(100)]
    inside, _ = decode(pictures, 64, 2)
    outside, _ = decode(pictures, 64, 1, tmp_path / "scratch")
    assert inside.numel() > 2**20
    assert torch.equal(inside, outside)
    assert list((tmp_path / "scratch").iterdir()) == []  # the file has no name


def test_allocate_maps_only_what_is_too_large(tmp_path):
    small = allocate((2**20,), np.dtype(np.uint8), 1, tmp_path)
    large = allocate((2**20 + 1,), np.dtype(np.uint8), 1, tmp_path)
    assert not isinstance(small, np.memmap)
    assert isinstance(large, np.memmap)


# ------------------------------------------------------------------------------------------ cloud side


def test_rendered_characters():
    images = load_cloud(tiny_study("cloud.images=5 cloud.held_out=3"))
    assert images.train.shape == (5, 3, 32, 32)
    assert images.held_out.shape == (3, 3, 32, 32)
    assert len(images.train_labels) == 5
    assert len(images.held_out_difficulty) == 3


def write_parquet(path, reds):
    def encoded(red):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (red, 0, 0)).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [encoded(red) for red in reds], "label": [0] * len(reds)}
    parquet.write_table(pa.table(rows), path)


def cloud_of(folder, held_out=4):
    return load_cloud(tiny_study(f"cloud.data={folder} cloud.held_out={held_out}"))


def reds_of(images):
    return sorted(round(image[0].float().mean().item()) for image in images)


def test_parquet_files_named_validation_are_held_out(tmp_path):
    write_parquet(tmp_path / "one" / "train-0.parquet", range(10))
    write_parquet(tmp_path / "two" / "train-0.parquet", range(10, 15))
    write_parquet(tmp_path / "one" / "validation-0.parquet", range(100, 103))
    images = cloud_of(tmp_path)
    assert reds_of(images.train) == list(range(15))
    assert reds_of(images.held_out) == [100, 101, 102]
    assert images.train.shape[1:] == (3, 40, 40)  # a quarter larger: crops stay sharp
    assert images.held_out.shape[1:] == (3, 32, 32)
    assert len(cloud_of(tmp_path, held_out=2).held_out) == 2


def test_parquet_without_validation_holds_a_random_part_out(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", range(20))
    images, same = cloud_of(tmp_path), cloud_of(tmp_path)
    assert sorted(reds_of(images.train) + reds_of(images.held_out)) == list(range(20))
    assert len(images.held_out) == 4
    assert torch.equal(images.held_out, same.held_out)


def test_a_folders_training_images_count_as_often_as_asked(tmp_path):
    write_parquet(tmp_path / "few" / "train-0.parquet", range(5))
    write_parquet(tmp_path / "many" / "train-0.parquet", range(10, 14))
    data = f"'cloud.data=[{tmp_path}/few, {tmp_path}/many]'"
    images = load_cloud(tiny_study(f"{data} cloud.held_out=2 'cloud.copies=[3, 1]'"))
    held_out, train = reds_of(images.held_out), reds_of(images.train)
    kept = [red for red in range(5) if red not in held_out]
    assert len(held_out) == 2  # an image that is held out is in no copy
    assert train == sorted(3 * kept + list(range(10, 14)))


def test_cloud_photos(tmp_path):
    class_folders(tmp_path, {"a": 6, "b": 3})
    images = cloud_of(tmp_path)
    assert (len(images.train), len(images.held_out)) == (5, 4)


def test_cloud_folder_below_the_variable(tmp_path, monkeypatch):
    class_folders(tmp_path / "public", {"a": 6})
    monkeypatch.setenv("PIEBRIDGE_DATA", str(tmp_path))
    assert len(cloud_of("public").train) == 2


def test_cloud_folder_missing_or_too_small(tmp_path):
    with pytest.raises(DataError, match="absent"):
        cloud_of(tmp_path / "absent")
    class_folders(tmp_path, {"a": 4})
    with pytest.raises(DataError, match=str(tmp_path)):
        cloud_of(tmp_path)
