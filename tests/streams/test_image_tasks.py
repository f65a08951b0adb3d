from __future__ import annotations

import csv
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from growthring.errors import ConfigError, DataError
from growthring.streams import Examples, Images, Task, TaskStream


def picture(seed, shape=(4, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rows(count, first=0):
    return [(picture(first + i), "ab"[i % 2]) for i in range(count)]


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


TRAIN, TEST = rows(12), rows(4, 100)


def same(examples, expected):
    return all(
        np.array_equal(pixels, wanted) and label == word
        for (pixels, label), (wanted, word) in zip(examples, expected, strict=True)
    )


def test_an_image_task():
    task = Task("x", TRAIN, TEST, label_texts={"a": "an apple"})
    assert task.modality == task.train.modality == "image"
    assert isinstance(task.train.inputs, Images)
    assert task.train.inputs[3].shape == (4, 5, 3)
    assert same(task.train, TRAIN)
    assert task.labels == ("a", "b")
    assert task.label_texts == {"a": "an apple", "b": "b"}
    assert task.encode("test") == [0, 1, 0, 1]
    assert repr(task) == "Task('x', 2 labels of images, train=12, test=4)"
    with pytest.raises(ConfigError, match=r"are images and have no texts.*\.inputs"):
        _ = task.train.texts
    with pytest.raises(ConfigError, match=r"no split 'validation'"):
        task.encode("validation")
    again = pickle.loads(pickle.dumps(task))
    assert (again.train, again.labels) == (task.train, task.labels)
    assert same(again.train, TRAIN)
    taken = Task("y", task.train, task.test)
    assert taken.train == task.train
    assert taken.train.inputs[0].shape == (4, 5, 3)


def test_a_text_task_stays_one():
    task = Task("x", [("p", "a"), ("q", "b")], [("r", "a")])
    assert task.modality == task.test.modality == "text"
    assert task.train.inputs == task.train.texts == ["p", "q"]
    assert Examples(["p"], ["a"]).take([0, 0]).inputs == ["p", "p"]


def columns(tmp_path):
    import datasets

    arrays, labels = [pixels for pixels, _ in TRAIN], [label for _, label in TRAIN]
    (tmp_path / "in").mkdir()
    for i, pixels in enumerate(arrays):
        (tmp_path / "in" / f"{i}.png").write_bytes(png(pixels))
    listing = tmp_path / "rows.csv"
    with listing.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *((f"in/{i}.png", label) for i, label in enumerate(labels))])
    paths = [tmp_path / "in" / f"{i}.png" for i in range(len(arrays))]
    typed = datasets.Dataset.from_dict(
        {"image": [str(path) for path in paths], "label": labels, "other": labels},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("string"), "other": datasets.Value("string")}
        ),
    )
    typed.to_parquet(tmp_path / "rows.parquet")
    stored = datasets.Features({"image": datasets.Array3D((4, 5, 3), "uint8"), "label": datasets.Value("string")})

    class MapStyle(torch.utils.data.Dataset):
        def __len__(self):
            return len(arrays)

        def __getitem__(self, i):
            return torch.from_numpy(arrays[i]).permute(2, 0, 1), labels[i]

    return {
        "stacked": {"image": np.stack(arrays), "label": np.array(labels)},
        "tensors": {"image": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), "label": labels},
        "dicts": [{"image": pixels, "label": label} for pixels, label in TRAIN],
        "paths": list(zip(paths, labels, strict=True)),
        "strings": list(zip(map(str, paths), labels, strict=True)),
        "encoded": list(zip(map(png, arrays), labels, strict=True)),
        "csv": listing,
        "datasets": typed,
        "datasets rows": typed.select(range(len(labels))[::-1]).select(range(len(labels))[::-1]),
        "datasets with torch format": typed.with_format("torch"),
        "datasets, not decoding": typed.cast_column("image", datasets.Image(decode=False)),
        "datasets stream": typed.to_iterable_dataset(),
        "datasets arrays": datasets.Dataset.from_dict({"image": arrays, "label": labels}, features=stored),
        "datasets lists": datasets.Dataset.from_dict({"image": [a.tolist() for a in arrays], "label": labels}),
        "parquet": tmp_path / "rows.parquet",
        "torch data set": MapStyle(),
    }


def test_every_source_of_the_same_images_gives_the_same_task(tmp_path):
    plain = Task("x", TRAIN, TEST)
    for name, source in columns(tmp_path).items():
        task = Task("x", source, TEST, image="image")
        assert task.train == plain.train, name
        assert same(task.train, TRAIN), name
        assert same(task.train.take([5, 2]), [TRAIN[5], TRAIN[2]]), name


def test_images_of_a_datasets_column_stay_on_disk(tmp_path):
    import datasets

    typed = columns(tmp_path)["datasets"]
    task = Task("x", typed, TEST, image="image")
    (tmp_path / "in" / "3.png").unlink()
    with pytest.raises(DataError, match=r"image 3, which could be read when its task was made"):
        task.train.inputs[3]
    with pytest.raises(DataError, match=r"train split, row 3: the image cannot be read \(FileNotFoundError"):
        Task("x", typed, TEST, image="image")
    wide = datasets.Dataset.from_dict({"image": [[[0, 256]], [[1, 2]]], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"row 0: .*array of int64.* from 0 to 256: scale them"):
        Task("x", wide, TEST, image="image")
    labels = datasets.ClassLabel(names=["b", "a"])
    ordered = Task("x", typed.select([0, 1]).cast_column("label", labels), TEST, image="image")
    assert ordered.labels == ("b", "a")


def test_paths_stay_paths_and_arrays_are_not_copied(tmp_path):
    big = np.zeros((40, 200, 200, 3), np.uint8)
    big[np.arange(40), 0, 0, 0] = np.arange(40)
    labels = ["ab"[i % 2] for i in range(40)]
    files = []
    for i in range(40):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(png(big[i]))
    tracemalloc.start()
    try:
        by_array = Task(
            "x", {"image": big[:30], "label": labels[:30]}, {"image": big[30:], "label": labels[30:]}, image="image"
        )
        by_file = Task("x", list(zip(files[:30], labels, strict=False)), list(zip(files[30:], labels, strict=False)))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert by_array.train == by_file.train
    assert kept < big[0].nbytes
    assert peak < 12 * big[0].nbytes < big.nbytes / 3
    assert by_array.train.inputs[7][0, 0, 0] == 7
    big[7] = 9
    assert by_array.train.inputs[7][0, 0, 0] == 9  # the array itself, which the caller promised to leave alone


def test_limit_carve_and_fingerprint_go_by_pixels(tmp_path):
    plain = Task("x", TRAIN, TEST)
    other = Task("x", columns(tmp_path)["parquet"], TEST, image="image")
    turned = Task("x", TRAIN[::-1], TEST)
    for task in (plain, other, turned):
        small = task.limit(train=6, test=2, seed=3)
        assert small.train.counts() == {"a": 3, "b": 3}
        assert sorted(small.train.keys) == sorted(plain.limit(train=6, seed=3).train.keys)
        carved = task.carve_validation(0.25, seed=1)
        assert carved.validation is not None
        assert set(carved.validation.keys) == set(plain.carve_validation(0.25, seed=1).validation.keys)
        assert not set(carved.validation.keys) & set(carved.train.keys)
    assert set(plain.limit(train=6, seed=4).train.keys) != set(plain.limit(train=6, seed=3).train.keys)

    def fingerprint(train, label="a"):
        last = Task("y", rows(6, 50), [(picture(70), label)])
        return TaskStream([Task("x", train, TEST), last]).fingerprint()

    changed = [(pixels.copy(), label) for pixels, label in TRAIN]
    changed[4][0][1, 2, 0] ^= 1
    assert fingerprint(TRAIN) == fingerprint(other.train)
    assert len({fingerprint(TRAIN), fingerprint(changed), fingerprint(TRAIN, "b"), fingerprint(TRAIN[::-1])}) == 4


def test_the_draw_of_images_is_the_same_in_every_process():
    code = (
        "from test_image_tasks import TRAIN, TEST, Task, TaskStream, rows\n"
        "s = TaskStream([Task('x', TRAIN, TEST), Task('y', rows(8, 50), TEST)], scenario='online-class', seed=5)\n"
    )
    with pytest.warns(UserWarning, match="in more than one task"):
        stream = TaskStream([Task("x", TRAIN, TEST), Task("y", rows(8, 50), TEST)], scenario="online-class", seed=5)
    here = f"{stream.fingerprint()} {stream.pass_order(1)}"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}print(s.fingerprint(), s.pass_order(1))"],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert said == here


def test_sizes_may_differ():
    mixed = [(picture(1, (3, 9)), "a"), (picture(2, (8, 2, 3)), "b"), (picture(3, (5, 5, 4)), "a")]
    assert [pixels.shape for pixels in Task("x", mixed, TEST).train.inputs] == [(3, 9, 3), (8, 2, 3), (5, 5, 3)]


def test_the_same_pixels_in_two_splits_warn_however_they_are_stored(tmp_path):
    (tmp_path / "copy.png").write_bytes(png(TRAIN[4][0]))
    test = [*TEST, (tmp_path / "copy.png", "a"), (torch.from_numpy(TRAIN[5][0]).permute(2, 0, 1), "b")]
    with pytest.warns(UserWarning, match=r"2 of 6 test images are also in train \(first: row 4\).*remove") as caught:
        Task("x", TRAIN, test)
    assert caught[0].filename == __file__


BAD = {
    "float": ([(picture(0) / 255.0, "a")], {}, r"test split, row 0: the image is an array of float64.*Mend the image"),
    "two bad": ([TEST[0], (None, "a"), (3, "a")], {}, r"row 1: the image is missing \(None\) \(1 more bad rows: 2\)"),
    "no file": ([("gone.png", "a")], {}, r"row 0: the image file 'gone.png' is not there"),
    "label": ([(picture(0), "c")], {}, r"row 0: the label 'c' never appears in train"),
    "no label": ([(picture(0), None)], {}, r"row 0: the label is missing"),
    "empty": ([], {}, r"test split is empty"),
    "column": ([{"img": picture(0), "label": "a"}], {"image": "image"}, r"row 0: there is no image column 'image'"),
    "row": ([picture(0)], {}, r"row 0: got a ndarray; rows must be .* Two arrays are given as"),
    "triple": ([(1, 2, 3)], {"image": "image"}, r"rows must be \{\"image\": .*\(image, label\) pairs"),
    "no such csv": ("rows.csv", {"image": "image"}, r"there is no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_named_with_task_split_row_and_fix(case):
    test, settings, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        Task("x", TRAIN, test, **settings)
    assert str(caught.value).startswith("task 'x', test split")


def test_what_is_meant_is_asked_when_it_is_unclear(tmp_path):
    with pytest.raises(ConfigError, match=r"task 'x': text='body' and image='img'; its inputs are one or the other"):
        Task("x", TRAIN, TEST, text="body", image="img")
    for wrong in (True, "", 3):
        with pytest.raises(ConfigError, match=r"give the name of the image column, or None for texts"):
            Task("x", TRAIN, TEST, image=wrong)
    stacked = np.stack([pixels for pixels, _ in TRAIN])
    with pytest.raises(DataError, match=r'row 0: got a ndarray.*Two arrays are given as \{"image": images, "label"'):
        Task("x", (stacked, [label for _, label in TRAIN]), TEST)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"there is no such file\. did you mean 'train'\?"):
        Task("x", TRAIN, tmp_path / "trian", image="image")
    dicts = [{"image": pixels, "label": label} for pixels, label in TRAIN]
    with pytest.raises(DataError, match=r"no text column 'text'.*If the inputs are images: image='image'"):
        Task("x", dicts, TEST)
    with pytest.raises(DataError, match=r"row 0: the text is of type ndarray"):
        Task("x", [("p", "a"), ("q", "b")], [(picture(0), "a")])
    names = [("cat.png", "a"), ("dog.JPG", "b")]
    with pytest.warns(UserWarning, match=r"train split: every text is the name of an image file.*pass image="):
        assert Task("x", names, [("some text", "a")]).modality == "text"


def test_without_pillow_the_first_file_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(png(TRAIN[0][0]))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"^image files are read with Pillow.*pip install growthring\[image\]"):
        Task("x", [(tmp_path / "a.png", "a")], TEST)


# --------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folders(tmp_path):
    for split, first, count in (("train", 0, 8), ("test", 100, 2), ("val", 200, 2)):
        for label in ("cat", "very_big_dog"):
            for i in range(count):
                path = tmp_path / split / label / ("deep" if i % 2 else "") / f"{i}.PNG"
                path.parent.mkdir(parents=True, exist_ok=True)
                first += 1
                path.write_bytes(png(picture(first)))
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"x")
    return tmp_path


def test_from_folder(folders):
    task = Task.from_folder("x", folders / "train", str(folders / "test"), label_texts={"cat": "a cat"})
    assert task.modality == "image"
    assert task.label_texts == {"cat": "a cat", "very_big_dog": "very big dog"}
    assert task.train.counts() == {"cat": 8, "very_big_dog": 8}
    assert task.test.counts() == {"cat": 2, "very_big_dog": 2}
    assert task.validation is None
    assert np.array_equal(task.train.inputs[0], picture(1))
    whole = Task.from_folder("x", folders / "train", folders / "test", folders / "val", labels=["very_big_dog", "cat"])
    assert whole.labels == ("very_big_dog", "cat")
    assert whole.validation is not None
    assert whole.validation.counts() == {"cat": 2, "very_big_dog": 2}
    same_way = Task("x", folders / "train", folders / "test", image="image")
    assert same_way.train == task.train


def test_class_folders_may_be_links(folders):
    (folders / "linked").mkdir()
    (folders / "linked" / "cat").symlink_to(folders / "train" / "cat", target_is_directory=True)
    (folders / "linked" / "dog").symlink_to(folders / "train" / "very_big_dog", target_is_directory=True)
    task = Task.from_folder("x", folders / "linked", folders / "test", labels=["cat", "dog", "very_big_dog"])
    assert task.train.counts() == {"cat": 8, "dog": 8}


def test_unreadable_folders_are_not_passed_over(folders, monkeypatch):
    def walk(top, *, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/deep"))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataError, match=r"train split \(.*\): the folder '.*deep' cannot be read \(Permission denied"):
        Task.from_folder("x", folders / "train", folders / "test")


def test_bad_folders(folders):
    train, test = folders / "train", folders / "test"

    def fails(message, first=train, second=test):
        with pytest.raises(DataError, match=message) as caught:
            Task.from_folder("x", first, second)
        assert str(caught.value).startswith("task 'x', ")

    fails(r"train split: the folder '.*trian' is not there", folders / "trian")
    fails(r"test split: the folder '.*0\.PNG' is a file", train, train / "cat" / "0.PNG")
    fails(r"train split \(.*cat\): it must hold one folder a class.*it holds 4 image files \('0\.PNG'", train / "cat")
    (folders / "none").mkdir()
    fails(r"it holds 0 files and no folder", folders / "none")
    (train / "emu").mkdir()
    fails(r"the folder of class 'emu' holds no image file \(endings: \.png")
    (train / "emu").rmdir()
    (test / "emu").mkdir()
    (test / "emu" / "1.png").write_bytes(png(picture(7)))
    fails(r"test split \(.*\), row 2: the label 'emu' never appears in train")
    (train / "cat" / "0.PNG").write_bytes(b"broken")
    fails(r"train split \(.*\), row 0: the image file '.*cat.0\.PNG' is not in an image format that Pillow knows")
    with pytest.raises(DataError, match=r"this is a folder.*Task\.from_folder"):
        Task("x", folders / "train", TEST)


def test_files_that_are_no_images_are_counted_aloud(folders):
    (folders / "train" / "cat" / "notes.txt").write_text("x")
    (folders / "train" / "cat" / "raw.cr2").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"2 files are left out because .*\(first: .*notes\.txt\)"):
        Task.from_folder("x", folders / "train", folders / "test")


def test_from_hub_passes_the_image_column(monkeypatch):
    import datasets

    def load(path, config, *, split):
        first = {"train": 0, "test": 50}[split]
        return datasets.Dataset.from_dict(
            {"img": [{"bytes": png(picture(first + i)), "path": None} for i in range(4)], "label": [0, 1, 0, 1]},
            features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = Task.from_hub("x", "u/d", image="img")
    assert task.labels == ("cat", "dog")
    assert np.array_equal(task.test.inputs[1], picture(51))


def test_good_images_give_no_warning(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Task.from_folder("x", folders / "train", folders / "test").limit(4, 2, 2)
