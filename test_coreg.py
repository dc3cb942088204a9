"""Tests of coreg.py: python -m pytest -q test_coreg.py. No network, no data but what they make.

As a script it is the benchmark: python test_coreg.py --help
"""
import argparse, copy, dataclasses, errno, importlib.util, inspect, itertools, json, math, os
import pickle, random, re, resource, shutil, subprocess, sys, time, unicodedata, urllib.error, zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy.io import savemat
from sklearn.mixture import GaussianMixture

import coreg as C

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
INF, NAN = math.inf, math.nan

@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A test is seeded and runs in an empty folder. Downloads fail, and so does a test that does
    not clear the list of those it tried."""
    attempts = []
    def refuse(request, *args, **kwargs):
        attempts.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield attempts
    assert not attempts, f"downloads were tried: {attempts}"

def close(actual, expected, tol=1e-5):
    """Both are tensors, numbers or lists, with equal shapes and values."""
    actual, expected = (torch.as_tensor(x).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, check_dtype=False)
def refused(capsys, argv):
    """main(argv) must end with exit code 2 and one line, which is returned, and leave all files;
    and that before it annotates or trains."""
    def files(): return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    def never(*args, **kwargs): pytest.fail("bad input was accepted")
    before = files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "train", never)
        patch.setattr(C, "annotate", never)
        capsys.readouterr()
        assert C.main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("coreg.py: ") and files() == before, lines
    return lines[0]

# (0) Settings ------------------------------------------------------------------------------------

PAPER = dict(
    dataset="cifar10", epochs=800, warm_up=50, start_contrastive=10, batch_size=256, width=64,
    lr=0.01, lr_period=800, image_size=32, temperature=0.5, lambda_u=1, proto_weight=0.1,
    contrastive_weight=0.1, momentum=0.999, queue_size=8192, candidates="multi_prompt",
    templates="small", clip_model="ViT-B-32-quickgelu", clip_pretrained="openai",
    partial_rate=0.01, noise_rate=0.1, annotator="clip", ablate="", num_samples=0)

def test_Config_defaults_are_the_run_on_cifar10():
    cfg = dataclasses.asdict(C.Config())
    assert {name: cfg[name] for name in PAPER} == PAPER
    assert C.parse(["--dataset", "cifar10", "--output-dir", ""]) == C.Config()
@pytest.mark.parametrize("name, value", [
    ("dataset", "cifra10"), ("annotator", "blip"), ("candidates", "top"), ("precision", "fp8"),
    ("ablate", "gmm,mixup"), ("epochs", 0), ("batch_size", 1), ("lr", NAN), ("lr", INF),
    ("lr", -0.1), ("image_size", 7), ("width", 0), ("temperature", 0.0), ("momentum", NAN),
    ("queue_size", 0), ("seed", -1), ("warm_up", 801), ("num_samples", -5), ("lambda_u", -INF)])
def test_Config_refuses_a_bad_value_by_its_flag(name, value):
    with pytest.raises(C.CoregError, match="^--" + name.replace("_", "-") + ": expected"):
        C.Config(**{name: value})

@pytest.mark.parametrize("name, differs", [
    ("cifar10", {}), ("cifar100", dict(warm_up=100)), ("svhn", {}), ("folder", dict(epochs=100)),
    ("fmnist", dict(epochs=100, image_size=28)), ("eurosat", dict(epochs=100, image_size=64)),
    ("fer2013", dict(epochs=100, image_size=64)), ("gtsrb", dict(epochs=100, image_size=64))])
def test_parse_takes_the_settings_of_the_data_set(name, differs):
    cfg = dataclasses.asdict(C.parse(["--dataset", name]))
    assert {key: cfg[key] for key in PAPER} == {**PAPER, "dataset": name, **differs}
    assert C.DATASETS[name].channels == (1 if name in ("fmnist", "fer2013") else 3)
def test_parse_without_arguments_is_the_digits_run():
    cfg = C.parse([])
    assert (cfg.dataset, cfg.clip_model, cfg.templates, cfg.image_size) == (
        "digits", "tiny", "digits", 8)

def test_main_help_has_the_comment_of_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    with pytest.raises(SystemExit, match="^0$"):
        C.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    lines = inspect.getsource(C.Config).splitlines()
    for field in dataclasses.fields(C.Config):
        [line] = [line for line in lines if line.startswith(f"    {field.name}: ")]
        comment = line.split("  # ")[1].strip()
        name = "--" + field.name.replace("_", "-")
        assert len(comment) > 5
        assert re.search(f"{name} [A-Z_]+ ((?! --).)*{re.escape(comment)}", said)

# (1) Data sets -----------------------------------------------------------------------------------
# Writers: a few random images in the layout in which a data set is published. Each returns them as
# two lists of (array, label): the training and the test part; the second is empty without such.

def draw(labels, *shape, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), np.uint8)
    return list(zip(pixels, labels))
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        return Image.fromarray(content).save(path, quality=95)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
def write_cifar(folder, train, test, parts, label, meta):
    files = {name: train[i::len(parts)] for i, name in enumerate(parts)}
    for name, part in {**files, **test}.items():
        rows = [image.transpose(2, 0, 1).ravel() for image, _ in part]  # all red values first
        write(folder / name, dict(data=np.stack(rows), **{label: [y for _, y in part]}))
    for name, content in meta.items():
        write(folder / name, content)
    return train, *test.values()
def write_cifar10(root):
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    return write_cifar(
        root / "cifar-10-batches-py", draw([*range(10)] * 2, 32, 32, 3),
        dict(test_batch=draw([9, 0, 9], 32, 32, 3, seed=1)), [f"data_batch_{i}" for i in
        range(1, 6)], "labels", {"batches.meta": dict(label_names=names)})
def write_cifar100(root):
    names = ["apple", "aquarium_fish"] + [f"made_up_{i}" for i in range(2, 100)]
    return write_cifar(
        root / "cifar-100-python", draw([99, 1, 40] * 3, 32, 32, 3),
        dict(test=draw([7, 98], 32, 32, 3, seed=1)), ["train"], "fine_labels",
        dict(meta=dict(fine_label_names=names, coarse_label_names=["fish"] * 20)))
def write_svhn(root):  # [32,32,3,N], and the digit 0 has the label 10
    parts = draw([*range(10), 0, 1], 32, 32, 3), draw([0, 9], 32, 32, 3, seed=1)
    for name, part in zip(("train", "test"), parts):
        savemat(root / f"{name}_32x32.mat", dict(X=np.stack([image for image, _ in part], 3),
                                                 y=np.uint8([[label or 10] for _, label in part])))
    return parts
def write_fmnist(root):  # IDX: a magic number, the sizes in four bytes each, the values
    parts = draw([*range(10), 3], 28, 28), draw([9, 4], 28, 28, seed=1)
    for name, part in zip(("train", "t10k"), parts):
        count, raw = bytes([0, 0, 0, len(part)]), root / "FashionMNIST" / "raw"
        write(raw / f"{name}-images-idx3-ubyte", b"\0\0\x08\x03" + count
              + bytes([0, 0, 0, 28] * 2) + b"".join(image.tobytes() for image, _ in part))
        write(raw / f"{name}-labels-idx1-ubyte", b"\0\0\x08\x01" + count
              + bytes(label for _, label in part))
    return parts
def write_eurosat(root):  # one colour an image: JPEG keeps it within 2 of 255 grey values
    colours = [(16 * i, 240 - 16 * i, 128) for i in range(15)]
    train = [(np.full((64, 64, 3), c, np.uint8), i % 3) for i, c in enumerate(colours)]
    for i, (image, label) in enumerate(train):
        name = ["AnnualCrop", "Forest", "SeaLake"][label]
        write(root / "eurosat" / "2750" / name / f"{name}_{i // 3 + 1}.jpg", image)
    return train, []
def write_fer2013(root):  # the rows of the competition's test parts are not used
    parts = draw([*range(7)] * 3, 48, 48)[:20], draw([6, 6], 48, 48, seed=1)
    rows = [f'{label},{" ".join(map(str, image.ravel()))},{usage}\n' for usage, part in
            zip(("Training", "PublicTest"), parts) for image, label in part]
    write(root / "fer2013" / "fer2013.csv", "".join(["emotion,pixels,Usage\n", *rows]))
    return parts[0], []
def write_gtsrb(root):  # PPM of any size, in a folder per class; the test labels are in a table
    folder = root / "gtsrb" / "GTSRB"
    train = [draw([i], 20 + i % 3, 31, 3, seed=i)[0] for i in range(43)]
    test, rows = draw([42, 14, 0, 14], 33, 30, 3, seed=99), []
    for image, label in train:
        write(folder / "Training" / f"{label:05}" / "00000_00000.ppm", image)
    for i, (image, label) in enumerate(test):
        write(folder / "Final_Test" / "Images" / f"{i:05}.ppm", image)
        rows.append(f"{i:05}.ppm;30;33;5;5;25;28;{label}\n")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    write(root / "gtsrb" / "GT-final_test.csv", "".join([header, *rows]))
    return train, test

WRITERS = dict(cifar10=write_cifar10, cifar100=write_cifar100, svhn=write_svhn, fmnist=write_fmnist,
               eurosat=write_eurosat, fer2013=write_fer2013, gtsrb=write_gtsrb)

@pytest.fixture
def unchecked(monkeypatch):
    """torchvision takes files whatever their checksum."""
    for module in ("cifar", "fer2013", "svhn", "utils"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity",
                            lambda path, md5=None: Path(path).is_file())

def read(root, name, *flags):
    return C.read_dataset(C.parse(["--dataset", name, "--data-dir", str(root), *flags]))
def places(pairs, written):
    """Where in `written` each pair is: the same label and, to what JPEG loses, the same pixels."""
    found = []
    for image, label in pairs:
        hits = [i for i, (pixels, _) in enumerate(written) if pixels.shape == np.shape(image)
                and abs(np.asarray(image).astype(int) - pixels).max() <= 2]
        assert len(hits) == 1 and label == written[hits[0]][1]
        found += hits
    return found

SIGNS = {0: "Speed limit 20", 6: "Speed limit 80 cancelled", 14: "Stop", 18: "Caution!",
         30: "Watch out for snow/ice on the road", 42: "Lift ban on truck overtaking"}

@pytest.mark.parametrize("name, sizes, count, some", [  # eurosat, fer2013: 4/5 of 15 and of 20
    ("cifar10", (20, 3), 10, {0: "airplane", 9: "truck"}),
    ("cifar100", (9, 2), 100, {0: "apple", 1: "aquarium_fish", 99: "made_up_99"}),
    ("svhn", (12, 2), 10, {i: f"number {i}" for i in range(10)}),
    ("fmnist", (11, 2), 10, {0: "T-shirt/top", 9: "Ankle boot"}),
    ("eurosat", (12, 3), 3, {0: "AnnualCrop", 1: "Forest", 2: "SeaLake"}),
    ("fer2013", (16, 4), 7, {i: f"{face} Facial Expression" for i, face in enumerate(
        "Angry Disgust Fear Happy Sad Surprise Neutral".split())}),
    ("gtsrb", (43, 4), 43, {i: f"German Traffic Sign: {sign}" for i, sign in SIGNS.items()})])
def test_read_dataset_returns_what_was_written(name, sizes, count, some, tmp_path, unchecked):
    written, written_test = WRITERS[name](tmp_path)
    train, test, class_names = read(tmp_path, name)
    assert (len(train), len(test)) == sizes and len({*class_names}) == len(class_names) == count
    assert some.items() <= dict(enumerate(class_names)).items()
    if name == "gtsrb":  # the names decide the prompts: not one letter may change
        signs = "; ".join(text.removeprefix("German Traffic Sign: ") for text in class_names)
        assert zlib.crc32(signs.encode()) == 1592205802
    here = places(train, written)
    if written_test:
        assert places(test, written_test) == [*range(len(written_test))]
    else:
        here += places(test, written)
    assert sorted(here) == [*range(len(written))]  # each image once: the parts are disjoint
@pytest.mark.parametrize("name, size", [("cifar10", 20), ("eurosat", 12), ("fer2013", 16)])
def test_read_dataset_draws_the_same_images_for_every_seed(name, size, tmp_path, unchecked):
    written, written_test = WRITERS[name](tmp_path)
    def split(seed, *flags):
        torch.manual_seed(seed)
        train, test, _ = read(tmp_path, name, "--seed", str(seed), *flags)
        return places(train, written), places(test, written_test or written)
    train, test = split(0)
    assert split(1) == (train, test) and len(train) == size
    some, same_test = split(3, "--num-samples", "2")
    assert len({*some}) == 2 and {*some} <= {*train} and same_test == test
    assert sorted(some) != [0, 1] and split(4, "--num-samples", "2")[0] == some

@pytest.mark.parametrize("name", WRITERS)
def test_read_dataset_says_what_is_missing_where(name, tmp_path, alone):
    with pytest.raises(C.CoregError, match=f"^--data-dir none/here: .*{name}") as e:
        read("none/here", name)
    assert ("kaggle.com" in str(e.value)) == (not alone) == (name == "fer2013")
    alone.clear()

def test_read_dataset_digits_are_those_of_scikit_learn(tmp_path):
    train, test, class_names = read(tmp_path, "digits")
    assert (len(train), len(test)) == (1438, 359)  # 0.8 * 1797 = 1437.6
    assert class_names == "zero one two three four five six seven eight nine".split()
    first = np.float32([0, 0, 5, 13, 9, 1, 0, 0]) * 255 / 16  # the first image's first row
    assert any(abs(np.asarray(image)[0] - first).max() < 1 and label == 0
               for part in (train, test) for image, label in part)

@pytest.mark.parametrize("name, kept", [("gtsrb", [0, 100, 200]), ("folder", [100] * 3)])
def test_read_images_squeezes_signs_and_crops_photos_in_order(name, kept):
    """Three vertical bands, the middle one a square: photos keep that, signs all of the image."""
    bands = np.uint8([[0, 100, 200]]).repeat(40, 1).repeat(40, 0)  # [40,120]
    cfg = C.parse(["--dataset", name, "--image-size", "12"])
    pairs = [(Image.new("L", (9, 9), i % 256), i) for i in range(300)]
    images, labels = C.read_images([(Image.fromarray(bands), 4), *pairs], cfg)
    assert images.shape == (301, 3, 12, 12) and images.dtype == torch.uint8
    assert images[0, 0, :, [0, 5, 11]].tolist() == [kept] * 12
    assert labels.tolist() == [4, *range(300)]
    assert images[1:, 1, 6, 6].tolist() == [i % 256 for i in range(300)]
    assert C.read_images([(image, -1) for image, _ in pairs], cfg)[1] is None

# One's own photos --------------------------------------------------------------------------------

RED, GREEN = (250, 10, 20), (15, 240, 30)

def two_colours(path, mode="RGB", **options):
    """32 x 16 pixels, red left of green."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode, dither=Image.Dither.NONE).save(path, **options)
    return path
def looks(image):
    """Mean colours of the left and right half."""
    return np.asarray(image, float).reshape(image.height, 2, -1, 3).mean((0, 2))

@pytest.mark.parametrize("mode, suffix, left, right", [
    ("RGB", "png", RED, GREEN), ("RGB", "bmp", RED, GREEN), ("RGB", "webp", RED, GREEN),
    ("RGB", "jpg", RED, GREEN), ("CMYK", "jpg", RED, GREEN), ("RGBA", "png", RED, GREEN),
    ("P", "png", RED, GREEN), ("L", "png", (83,) * 3, (149,) * 3),
    ("LA", "png", (83,) * 3, (149,) * 3), ("1", "png", (0,) * 3, (255,) * 3)])
def test_open_image_makes_every_mode_rgb(tmp_path, mode, suffix, left, right):
    image = C.open_image(two_colours(tmp_path / f"x.{suffix}", mode))
    assert image.mode == "RGB" and image.size == (32, 16)
    slack = 30 if mode == "P" else 8 if suffix in ("jpg", "webp") else 1  # a palette; lossy
    assert np.abs(looks(image) - [left, right]).max() <= slack
def test_open_image_turns_it_upright(tmp_path):
    stored = Image.open(two_colours(tmp_path / "x.png")).transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[0x0112] = 6  # stored turned to the left: to be shown turned to the right
    stored.save(tmp_path / "x.jpg", exif=exif)
    image = C.open_image(tmp_path / "x.jpg")
    assert image.size == (32, 16) and np.abs(looks(image) - [RED, GREEN]).max() < 9
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"junk, not TIFF", b"MM\0*\0\0\0\x08\0\x09\x01\x12"])
def test_open_image_with_damaged_exif_leaves_it(tmp_path, exif):
    path = two_colours(tmp_path / "x.jpg", exif=b"Exif\0\0" + exif)
    image = C.open_image(path)
    assert image.size == (32, 16) and np.abs(looks(image) - [RED, GREEN]).max() < 9

@pytest.fixture
def tree(tmp_path):
    """Photos of two classes, with what file systems and editors leave between them."""
    root = tmp_path / "photos"
    for name in ("train/cat/1.png", "train/cat/deep/er/2.bmp", "train/dog/ü 3.JPG",
                 "test/cat/4.png", "test/dog/5.png", "train/.ipynb_checkpoints/6.png",
                 "train/__MACOSX/cat/7.png", "train/cat/._1.png", "train/cat/.thumbs/8.png",
                 "test/.hidden/9.png"):
        two_colours(root / name)
    write(root / "train/cat/notes.txt", "no image")
    return root

def labelled(part):
    """Pairs of a folder -> the label of each file by its name."""
    files = getattr(part, "dataset", part).samples
    pixels = [np.shape(image) for image, _ in part]
    assert pixels == [(16, 32, 3)] * len(files)
    found = {Path(path).name: label for path, label in files}
    assert len(found) == len(files) == len(part)
    assert [label for _, label in part] == [label for _, label in files]
    return found

def test_read_dataset_folder_takes_classes_from_its_folders(tree):
    train, test, names = read(tree, "folder")
    assert names == ["cat", "dog"]
    assert labelled(train) == {"1.png": 0, "2.bmp": 0, "ü 3.JPG": 1}
    assert labelled(test) == {"4.png": 0, "5.png": 1}
@pytest.mark.parametrize("moved", [False, True])
def test_read_dataset_folder_with_classes_never_sees_folder_names(tree, moved):
    if moved:
        (tree / "train/dog").rename(tree / "train/wolf")
        two_colours(tree / "train/0.png")
    train, test, names = read(tree, "folder", "--classes", "dog, cat,")
    files = {"1.png": -1, "2.bmp": -1, "ü 3.JPG": -1} | ({"0.png": -1} if moved else {})
    assert labelled(train) == files and names == ["dog", "cat"]
    assert labelled(test) == {"4.png": 1, "5.png": 0}
def test_read_dataset_folder_matches_names_as_people_read_them(tmp_path):
    """Accents in one character or two, and blanks around a name, do not make another class."""
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    two_colours(tmp_path / "train" / apart / "1.png")
    two_colours(tmp_path / "train" / "dog " / "2.png")
    two_colours(tmp_path / "test" / composed / "3.png")
    two_colours(tmp_path / "test" / "dog" / "4.png")
    for flags in ([], ["--classes", f" {apart} ,dog"]):
        _, test, names = read(tmp_path, "folder", *flags)
        assert names == [composed, "dog"] and labelled(test) == {"3.png": 0, "4.png": 1}
def test_read_dataset_folder_follows_links(tree, tmp_path):
    (tree / "train/dog").rename(tmp_path / "elsewhere")
    (tree / "train/dog").symlink_to(tmp_path / "elsewhere")
    train, _, names = read(tree, "folder")
    assert names == ["cat", "dog"] and labelled(train)["ü 3.JPG"] == 1
def test_read_dataset_folder_leaves_out_broken_files_by_name(tree, capsys):
    whole = (tree / "train/cat/1.png").read_bytes()
    write(tree / "train/cat/cut.png", whole[:len(whole) // 2])
    write(tree / "train/dog/junk.jpg", b"junk")
    (tree / "train/dog/gone.png").symlink_to(tree / "nowhere.png")
    Image.new("I;16", (16, 16)).save(tree / "train/dog/deep.png")  # convert would clip its greys
    train, _, _ = read(tree, "folder")
    assert labelled(train) == {"1.png": 0, "2.bmp": 0, "ü 3.JPG": 1}
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("left out: ") for line in lines)
    for name in ("cut.png", "junk.jpg", "gone.png", "deep.png"):
        assert sum(name in line for line in lines) == 1

@pytest.mark.parametrize("kind", ["missing", "no train", "empty", "broken", "unknown test class"])
@pytest.mark.parametrize("flags", [[], ["--classes", "cat,dog"]])
def test_main_folder_without_images_error_in_one_line(tree, kind, flags, capsys):
    files = [path for path in (tree / "train").rglob("*.*") if path.is_file()]
    if kind in ("missing", "no train"):
        shutil.rmtree(tree if kind == "missing" else tree / "train")
    elif kind == "unknown test class":
        two_colours(tree / "test/wolf/1.png")
    for path in files if kind in ("empty", "broken") else []:
        path.unlink() if kind == "empty" else path.write_bytes(b"broken")
    argv = ["--dataset", "folder", "--data-dir", str(tree), *flags]
    assert C.main([*argv, "--output-dir", "run", "--device", "cpu"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " not in line]
    assert len(lines) == 1 and f"--data-dir {tree}" in lines[0]
    assert not Path("run").exists()

# (2) Candidate sets ------------------------------------------------------------------------------

def picked(sets):
    """Bool [N,K] -> the classes in each set."""
    return [row.nonzero()[:, 0].tolist() for row in sets]

PROBS = torch.tensor([  # [T=3,N=3,K=4] in eighths; means * 24: 11 9 4 0, 1 7 6 10, 5 9 6 4
    [[4, 3, 1, 0], [0, 2, 2, 4], [4, 3, 1, 0]],
    [[3, 4, 1, 0], [0, 1, 3, 4], [1, 3, 4, 0]],
    [[4, 2, 2, 0], [1, 4, 1, 2], [0, 3, 1, 4]]]) / 8

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings, expected", [
    (dict(), [[0, 1], [1, 3], [0, 2, 3]]),
    (dict(mode="argmax"), [[0], [3], [1]]),  # the last is no single template's first choice
    (dict(mode="top_k", top_k=2), [[0, 1], [1, 3], [1, 2]]),
    (dict(mode="ratio"), [[0, 1], [1, 2, 3], [0, 1, 2]]),
    (dict(mode="ratio", ratio=0.65), [[0, 1], [1, 3], [1, 2]]),
    (dict(mode="ratio", top_k=2), [[0, 1], [1, 3], [1, 2]]),
    (dict(mode="ratio", ratio=1), [[0], [3], [1]])])
def test_candidate_sets_by_hand(settings, expected, dtype):
    assert picked(C.candidate_sets(PROBS.to(dtype), **settings)) == expected
@pytest.mark.parametrize("mode", ["multi_prompt", "argmax", "top_k", "ratio"])
def test_candidate_sets_rows_of_zeros_abstain_and_an_empty_set_becomes_full(mode):
    votes = torch.zeros(3, 2, 3)
    votes[1, 0, 1] = 1  # one of three annotators knows the first image, nobody the second
    assert picked(C.candidate_sets(votes, mode)) == [[1], [0, 1, 2]]
def test_candidate_sets_unknown_mode_error():
    with pytest.raises(ValueError, match="topk"):
        C.candidate_sets(PROBS, "topk")

@pytest.mark.parametrize("partial_rate, noise_rate", [(0, 0), (0.3, 0), (0.3, 0.2), (0.1, 1)])
def test_flip_candidates_rates(partial_rate, noise_rate):
    labels = torch.arange(20_000) % 10
    true = torch.eye(10).bool()[labels]
    sets = C.flip_candidates(labels, 10, partial_rate, noise_rate)
    kept, wrong = sets[true], sets.sum(1) - sets[true].int()
    assert abs(kept.float().mean() - (1 - noise_rate)) < 0.01
    if kept.any():
        assert abs(wrong[kept].float().mean() / 9 - partial_rate) < 0.01
    if noise_rate:  # the label that was swapped in stands beside those that joined
        assert abs((wrong[~kept].float().mean() - 1) / 9 - partial_rate) < 0.01

# Annotation --------------------------------------------------------------------------------------

NAMES, PROMPTS = ["cat", "fire engine", "seven"], ["a photo of a {}", "{}", "many {}s", "no {}!"]

@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A CLIP of one thin layer that open_clip builds by name, and a file with its weights."""
    folder = tmp_path_factory.mktemp("clip")
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    vision = dict(image_size=16, patch_size=8, width=64, layers=1)
    (folder / "small-clip.json").write_text(
        json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(5)
    model = open_clip.create_model("small-clip")
    torch.save(model.state_dict(), folder / "weights.pt")
    return model.eval(), open_clip.get_tokenizer("small-clip"), folder / "weights.pt"

def test_annotate_matches_a_loop(small_clip):
    model, tokenizer, _ = small_clip
    images = torch.randn(5, 3, 16, 16)
    batches = [(part, None) for part in images.split(3)]
    probs = C.annotate(model, tokenizer, batches, NAMES, PROMPTS, "cpu")
    expected = torch.empty(4, 5, 3)
    with torch.no_grad():
        for (t, prompt), (i, image) in itertools.product(enumerate(PROMPTS), enumerate(images)):
            v = model.encode_image(image[None])[0]
            texts = [model.encode_text(tokenizer([prompt.format(n)]))[0] for n in NAMES]
            scores = [model.logit_scale.exp() * (v @ u) / (v.norm() * u.norm()) for u in texts]
            expected[t, i] = torch.stack(scores).softmax(0)
    assert probs.dtype == torch.float16 and probs.shape == (4, 5, 3)
    assert min(expected.std(axis).mean() for axis in range(3)) > 0.03  # each axis matters here
    close(probs.float(), expected, 1e-3)  # float16: 11 bits

def test_load_clip_takes_the_values_of_the_file(small_clip):
    from_file, _, path = small_clip
    model, preprocess, tokenizer = C.load_clip("small-clip", str(path), "cpu")
    assert not model.training and tokenizer(NAMES).shape == (3, 16)
    assert all(torch.equal(v, from_file.state_dict()[k]) for k, v in model.state_dict().items())
    image = Image.fromarray(draw([0], 30, 40, 3)[0][0])
    assert torch.equal(preprocess(image), preprocess(image))  # not the random crops of training

@pytest.mark.parametrize("name, weights, text", [
    ("no-such-clip", "openai", "no-such-clip"), ("small-clip", "no-such-tag", "no-such-tag"),
    ("small-clip", "other.pt", "Missing key"), ("small-clip", "", "small-clip"),
    ("small-clip", "tokenizer", "No module named 'transformers'")])
def test_load_clip_error_in_one_line(name, weights, text, small_clip, capsys, monkeypatch):
    def absent(*args, **kwargs): raise ImportError("No module named 'transformers'")
    torch.save(nn.Linear(2, 3).state_dict(), "other.pt")
    if weights == "tokenizer":
        weights = small_clip[2]
        monkeypatch.setattr("open_clip.get_tokenizer", absent)
    said = refused(capsys, ["--clip-model", name, "--clip-pretrained", weights, "--num-samples",
                            "9", "--output-dir", "run", "--device", "cpu"])
    assert f"--clip-model {name} --clip-pretrained {weights}" in said and text in said

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}

class ColourClip:
    """Stands in for CLIP: an image's features are its mean colour, a prompt's that of the class in
    it, and much of its own."""
    def __init__(self):
        self.loads, self.prompts, self.stop, self.logit_scale = 0, [], None, torch.tensor(2.0)
    def load(self, *args):
        self.loads += 1
        return self, self.preprocess, self.tokenizer
    def tokenizer(self, texts):
        self.prompts += texts
        return torch.arange(len(self.prompts) - len(texts), len(self.prompts))
    def preprocess(self, image):
        if self.stop:
            raise self.stop
        return TF.pil_to_tensor(TF.resize(image.convert("RGB"), [4, 4])) / 255
    def encode_image(self, images, normalize):
        return F.normalize(images.mean((2, 3)), dim=1)
    def encode_text(self, tokens, normalize):
        rows = []
        for prompt in [self.prompts[i] for i in tokens.tolist()]:
            [colour] = [colour for name, colour in COLOURS.items() if name in prompt]
            rows.append(colour + np.random.default_rng([*prompt.encode()]).integers(0, 250, 3))
        return F.normalize(torch.tensor(np.stack(rows)).float(), dim=1)

@pytest.fixture
def clip(monkeypatch):
    clip = ColourClip()
    monkeypatch.setattr(C, "load_clip", clip.load)
    return clip

def paint(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([*path.name.encode()])
    noise = generator.integers(-25, 25, (12, 10, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
def make_photos(root, number=12, test=True):
    """36 photos, and 9 more to test with."""
    for name, colour in COLOURS.items():
        for j in range(number):
            paint(root / "train" / name / f"{j:02}.png", colour)
        for j in range(3 * test):
            paint(root / "test" / name / f"{j:02}.png", colour)
    return root

SMALL = """--image-size 16 --width 4 --batch-size 8 --epochs 4 --warm-up 1 --start-contrastive 0
    --lr 0.05 --queue-size 64 --momentum 0.9 --device cpu --precision fp32""".split()

def words(root, folder, *more):
    return ["--dataset", "folder", "--data-dir", str(root), "--output-dir", str(folder), *SMALL,
            *map(str, more)]
def metrics(folder):
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert all(record["seconds"] >= 0 for record in records)
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]

ONE = ["--epochs", "1", "--warm-up", "1"]

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Annotated once, by the stand-in; the file that keeps it serves all other runs."""
    root = make_photos(tmp_path_factory.mktemp("photos"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "load_clip", ColourClip().load)
        assert C.main(words(root, root / "run", *ONE)) == 0
    return root
def test_main_reads_a_templates_file_without_its_byte_order_mark(photos, clip):
    Path("t.txt").write_bytes("\ufeffa {}, in ü\n\n {} !\n".encode())
    assert C.main(words(photos, "run", "--data-dir", make_photos(Path("p")), *ONE,
                             "--templates", "t.txt")) == 0
    assert clip.prompts == [f"a {n}, in ü" for n in COLOURS] + [f"{n} !" for n in COLOURS]
@pytest.mark.parametrize("content", ["a {}".encode("utf-16"), b"", b"a {}\nnone", b"{} {}"])
def test_main_refuses_bad_templates_in_one_line(content, photos, capsys):
    Path("t.txt").write_bytes(content)
    assert "--templates t.txt" in refused(capsys, words(photos, "run", "--templates", "t.txt"))

@pytest.mark.parametrize("probs", [np.ones((2, 3, 2)), np.full((1, 4, 3), 2.), [[["a"] * 3] * 4]])
def test_read_probs_refuses_a_wrong_shape_or_value(probs):
    np.savez("p.npz", probs=probs), pytest.raises(C.CoregError, C.read_probs, "p.npz", 4, 3)
def cache(root):
    return sorted(path for path in (Path(root) / "annotations").rglob("*") if path.is_file())
def test_annotation_cache_saves_the_second_annotation(clip):
    make_photos(Path("p"))
    assert C.main(words("p", "one")) == C.main(words("p", "two", "--seed", "3")) == 0
    assert clip.loads == 1
    shutil.rmtree("p/annotations")
    assert C.main(words("p", "three")) == 0
    assert clip.loads == 2 and metrics("one") == metrics("three") != metrics("two")
    [path] = cache("p")
    probs = np.load(path, allow_pickle=False)["probs"]
    assert probs.shape == (27, 36, 3) and probs.dtype == np.float16
@pytest.mark.parametrize("change", ["templates", "classes", "image", "fewer", "model", "weights"])
def test_annotation_cache_asks_anew_after_a_change(change, clip):
    make_photos(Path("p"))
    Path("w.pt").write_bytes(b"1")
    args = words("p", "one", *ONE, "--clip-pretrained", "w.pt", "--classes", "blue,green,red")
    assert C.main(args) == 0
    if change == "image":
        paint(Path("p/train/red/03.png"), COLOURS["green"])
    elif change == "weights":
        Path("w.pt").write_bytes(b"2")
    more = dict(templates=["--templates", "digits"], classes=["--classes", "green,blue,red"],
                fewer=["--num-samples", "20"], model=["--clip-model", "other"]).get(change, [])
    assert C.main([*args, *more, "--output-dir", "two"]) == 0
    assert clip.loads == 2 and len(cache("p")) == 2
def test_annotation_cache_is_written_whole_or_not_at_all(clip, capsys):
    make_photos(Path("p"))
    clip.stop = KeyboardInterrupt()
    assert C.main(words("p", "one")) == 130 and cache("p") == []
    clip.stop = None
    assert C.main(words("p", "two")) == 0 and clip.loads == 2
    [path] = cache("p")
    path.write_bytes(path.read_bytes()[:-99])
    capsys.readouterr()
    assert str(path) in refused(capsys, words("p", "three"))
def test_annotation_cache_that_cannot_be_written_costs_a_warning(clip, capsys):
    write(make_photos(Path("p")) / "annotations", "a file, not a folder")
    assert C.main(words("p", "one")) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning") and len(metrics("one")) == 4

# (3) Views ---------------------------------------------------------------------------------------

def pictures(n, channels=3, side=16):
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8)
def views_of(name, images):
    return C.Views(images, **C.DATASETS[name].views)
def grey_values(views, images, normalised):
    """Views of images -> grey values 0..255; the images must show the scale at their plain view."""
    plain = views.plain(images)
    low, high = plain.amin(), plain.amax()
    scale = (images.max() - images.min()).item() / (high - low)
    return (normalised - low) * scale + images.min().item()
def windows(image, padding):
    """All that a shift of one image [C,S,S] may show: {bytes: (row, column, mirrored)}."""
    side = image.shape[-1]
    padded = np.pad(image.numpy(), [(0, 0), (padding, padding), (padding, padding)])
    cuts = {}
    for row, column in itertools.product(range(2 * padding + 1), repeat=2):
        cut = padded[:, row:row + side, column:column + side]
        cuts[cut.tobytes()] = row, column, False
        cuts[cut[:, :, ::-1].tobytes()] = row, column, True
    return cuts

def test_Views_plain_normalises_with_the_training_images():
    images = pictures(50) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1)
    plain = views_of("cifar10", images).plain(images)
    close(plain.mean((0, 2, 3)), torch.zeros(3), 1e-4)
    close(plain.std((0, 2, 3)), torch.ones(3), 1e-3)
    assert plain.dtype == torch.float32
@pytest.mark.parametrize("name, mirrored", [
    ("cifar10", 0.5), ("cifar100", 0.5), ("svhn", 0), ("gtsrb", 0), ("eurosat", 0.5),
    ("fmnist", 0.5), ("fer2013", 0.5), ("folder", 0.5), ("digits", 0)])
def test_Views_weak_shifts_by_up_to_an_eighth_and_mirrors_half(name, mirrored):
    images = pictures(1, 1).repeat(800, 1, 1, 1)
    views, cuts = views_of(name, images), windows(images[0], 2)
    got = grey_values(views, images, views.weak(images)).round().byte()
    found = Counter(cuts.get(one.numpy().tobytes()) for one in got)
    assert None not in found  # each is a window of its own image
    assert len({place[:2] for place in found}) == 25 and max(found.values()) < 70
    assert abs(sum(found[place] for place in found if place[2]) / 800 - mirrored) < 0.05

def squares(hit):
    """Bool [N,S,S] -> rows and columns [N,S] of what is hit, which must be full rectangles."""
    rows, columns = hit.any(2), hit.any(1)
    assert torch.equal(hit, rows[:, :, None] & columns[:, None])
    for line in (rows, columns):
        assert (F.pad(line, (1, 1)).int().diff().abs().sum(1) <= 2).all()  # one piece
    return rows, columns
@pytest.mark.parametrize("name, side, largest", [
    ("cifar10", 32, 16), ("svhn", 32, 16), ("gtsrb", 64, 32), ("digits", 24, 8)])
def test_Views_strong_cuts_a_grey_square_out(name, side, largest):
    """No other step of a strong view changes black images, so that the square shows alone."""
    images = torch.zeros(2000, 1, side, side, dtype=torch.uint8)
    images[0, 0, 0, 0] = 255  # shows the scale, and is left out
    views = views_of(name, images)
    got = grey_values(views, images, views.strong(images))[1:, 0]
    hit = got > 1
    assert (got[hit] - 127.5).abs().max() < 0.5
    rows, columns = squares(hit)
    height, width = (line[~(rows | columns)[:, [0, -1]].any(1)].sum(1) for line in (rows, columns))
    assert {*height.tolist()} == {*width.tolist()} == {*range(largest + 1)}
    assert (height - width).abs().max() <= 1  # one length at two places: 3.5 may cover 3 or 4
    share = rows[:, side // 2].float().mean()  # the centre of the square is anywhere
    assert abs(share - largest / 2 / side) < 0.04
@pytest.mark.parametrize("name, side", [("fmnist", 28), ("fer2013", 64)])
def test_Views_strong_of_grey_data_sets_has_a_black_square_and_no_operation(name, side):
    images = torch.full((1000, 1, side, side), 204, dtype=torch.uint8)
    images[0, 0, 0, 0] = 0
    views, edge = views_of(name, images), side // 8 + 1
    got = grey_values(views, images, views.strong(images))[1:, 0]
    black = got < 1
    assert ((got - 204).abs() < 1).logical_or(black).all()  # nothing but black and that value
    inner = black[:, edge:-edge, edge:-edge]  # where the shift brings no black in
    rows, columns = squares(inner)
    whole = ~(rows | columns)[:, [0, -1]].any(1) & inner.any((1, 2))
    assert whole.sum() > 5 and (inner[whole].sum((1, 2)) == 16 * 16).all()
def test_Views_strong_of_colour_images_has_an_operation_on_some():
    images = torch.full((1000, 3, 24, 24), 204, dtype=torch.uint8)
    images[0, 0, 0, 0] = 0
    for name, low, high in (("cifar10", 0.25, 0.5), ("digits", 0, 0)):
        views = views_of(name, images)
        got = grey_values(views, images[:, :1], views.strong(images)[:, :1])[1:]
        known = torch.stack([(got - value).abs() < 0.5 for value in (0, 127.5, 204)]).any(0)
        changed = (~known).any((1, 2, 3)).float().mean()  # 4 to 6 of 14 change the brightness
        assert low <= changed <= high

@pytest.mark.parametrize("name", C.DATASETS)
@pytest.mark.parametrize("view", ["weak", "strong"])
def test_Views_seed_independence_and_input(name, view):
    images = pictures(1, C.DATASETS[name].channels).repeat(60, 1, 1, 1)
    before, make = images.clone(), getattr(views_of(name, images), view)
    torch.manual_seed(7)
    first, second = make(images), make(images)
    torch.manual_seed(7)
    assert torch.equal(make(images), first) and not torch.equal(first, second)
    assert torch.equal(images, before) and first.dtype == torch.float32
    assert len(first.flatten(1).unique(dim=0)) > 15  # one image, sixty views
def test_random_operation_posterize_leaves_4_to_7_bits():
    gradient, found = (torch.arange(256.0) / 255).view(1, 1, 16, 16).repeat(20, 1, 1, 1), set()
    for _ in range(60):
        for image in C.random_operation(gradient):
            values = image.flatten()
            levels = len(values.unique())
            if (values.diff() >= 0).all() and levels <= 128:  # no other operation does that
                steps = [*Counter(values.tolist()).values()]
                assert max(steps) - min(steps) <= 1  # of equal width
                found.add(levels)
    assert found == {16, 32, 64, 128}


# (4) Networks ------------------------------------------------------------------------------------

def config(**changes):
    return C.Config(**dict(dict(
        dataset="digits", image_size=8, width=4, batch_size=2, queue_size=7, lr=0.1, momentum=0.9,
        epochs=9, warm_up=1, start_contrastive=1, lambda_u=0.7, proto_weight=0.2,
        contrastive_weight=0.3, temperature=0.4, device="cpu", precision="fp32"), **changes))

class Linear(nn.Module):
    """Stands in for a network: 3 logits and 5-d embeddings, linear in 4 pixels; notes its calls:
    what it was given, in train mode or not, with gradient or not."""
    def __init__(self):
        super().__init__()
        self.fc, self.z = nn.Linear(4, 3, bias=False), nn.Linear(4, 5, bias=False)
        self.calls = []

    def forward(self, images):
        self.calls.append((images, self.training, torch.is_grad_enabled()))
        return 3 * self.fc(images.flatten(1)), F.normalize(self.z(images.flatten(1)), dim=1)

# Each view shifts the pixels by its own amount, so a value tells which view was taken.
VIEWS = SimpleNamespace(weak=lambda x: x + 1, strong=lambda x: x - 2, plain=lambda x: x + 3)

def floats(n, side=2): return torch.randn(n, 1, side, side)
def probabilities(*shape): return torch.randn(*shape).softmax(-1)
def unit_rows(*shape): return F.normalize(torch.randn(*shape), dim=1)
def test_CoRegNet_parameter_count_is_the_published_one():
    assert sum(p.numel() for p in C.CoRegNet(10).parameters()) == 11_499_594
@pytest.mark.parametrize("side, last", [(8, 1), (28, 4), (32, 4), (64, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_CoRegNet_shapes_for_any_side(side, last, channels):
    net, images = C.CoRegNet(6, channels, side, 2, 5).eval(), torch.randn(2, channels, side, side)
    sizes = []
    for module in net.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    logits, embeddings = net(images)
    assert logits.shape == (2, 6) and embeddings.shape == (2, 5)
    assert sizes == [(2, 16, last, last)]  # before the mean over places
    close(embeddings.norm(dim=1), torch.ones(2))
@pytest.mark.parametrize("width", [4, 12])
def test_CoRegNet_narrow_channels_last_backward(width):
    """Narrow strided 1x1 convolutions once corrupted memory in the backward pass."""
    net = C.CoRegNet(3, 3, 32, width).to(memory_format=torch.channels_last)
    for n in (30, 29, 27, 28) * 2:
        net(torch.randn(n, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

def learner(cfg=None, **changes):
    return C.Learner(3, cfg or config(**changes), torch.device("cpu"), False)

# (5) Warm-up -------------------------------------------------------------------------------------

def test_partial_cross_entropy_by_hand():
    probs = torch.tensor([[.5, .3, .2], [.1, .1, .8], [.5, .4, .1]])
    sets = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    expected = -(math.log(.8 + 1e-5) + math.log(.1 + 1e-5)) / 2  # the full set does not count
    close(C.partial_cross_entropy(probs.log() + 5, sets), expected, 1e-6)
@pytest.mark.parametrize("scale, full, expected", [(1, True, 0.), (1e4, False, -math.log(1e-5))])
def test_partial_cross_entropy_finite_at_the_edge(scale, full, expected):
    logits = torch.tensor([[0., 0., scale]], requires_grad=True)
    loss = C.partial_cross_entropy(logits, torch.tensor([[True, True, full]]))
    close(loss, expected)
    close(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 3))

@pytest.mark.parametrize("row, expected", [
    ([5., 5, 5, 5], -math.log(4)), ([0., 1e4, 0, 0], 0.),  # uniform, certain
    ([math.log(.9), math.log(.1)], .9 * math.log(.9) + .1 * math.log(.1))])
def test_negative_entropy_by_hand(row, expected):
    logits = torch.tensor([row, row], requires_grad=True)
    loss = C.negative_entropy(logits)
    close(loss, expected)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()

def test_warm_up_epoch_terms_cover_every_image_once_and_are_learnt():
    own, images, net = learner(lr=1e-12), floats(8), Linear()
    sets = torch.eye(3).bool()[torch.arange(8) % 3]
    own.net, own.optimizer = net, torch.optim.SGD(net.parameters(), 1e-12)
    p = net(images - 2)[0].softmax(1).detach()  # of the strong view
    net.calls.clear()
    terms = C.warm_up_epoch(own, images, sets, VIEWS, config(), 0)
    assert [(len(given), *mode) for given, *mode in net.calls] == [(4, True, True)] * 2  # 2B = 4
    assert terms.keys() == {"set", "entropy"}
    close([terms["set"], terms["entropy"]], [-((sets * p).sum(1) + 1e-5).log().mean(),
                                             (p * p.log()).sum(1).mean()])
    own.optimizer.param_groups[0]["lr"] = 0.01
    later = [C.warm_up_epoch(own, images, sets, VIEWS, config(), 1) for _ in range(9)]
    assert later[-1]["set"] < terms["set"]

# (6) The split -----------------------------------------------------------------------------------

@pytest.mark.parametrize("mean, prior, expected", [
    ([.75, .25], [.5, .5], [1 / 3, 2 / 3]), ([.75, .25], [.9, .1], [9 / 11, 2 / 11]),
    ([.75, .25], [.75, .25], [.6, .4]), ([1, 0], [.5, .5], [0, 1])])  # last: a class never seen
def test_align_distribution_by_hand(mean, prior, expected):
    probs = torch.tensor([[.6, .4], [.6, .4]])
    aligned = C.align_distribution(probs, torch.tensor(mean), torch.tensor(prior))
    close(aligned, torch.tensor([expected] * 2))
def test_max_candidate_loss_by_hand():
    probs = torch.tensor([[.5, .3, .2], [.1, .7, .2], [1, 0, 0]])
    loss = C.max_candidate_loss(probs, torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool())
    close(loss[:2], [-math.log(.5), -math.log(.2)])
    assert 50 < loss[2] < INF

def clean_oracle(history, seed=0, window=5):
    rows = []
    for row in history.tolist()[-window:]:
        rows.append([(loss - min(row)) / (max(row) - min(row)) for loss in row])
    values = np.float32([[sum(column) / len(rows)] for column in zip(*rows)])
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    posterior = mixture.fit(values).predict_proba(values)
    return posterior[:, 0 if mixture.means_[0] < mixture.means_[1] else 1]

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epochs", [1, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_clean_probability_matches_loop_oracle(epochs, seed):
    groups = torch.cat([.3 * torch.randn(60), 1.2 + .5 * torch.randn(40)]).abs()
    history = (groups + 0.3 * torch.rand(epochs, 100)) * (1 + 9 * torch.rand(epochs, 1))
    close(C.clean_probability(history, seed=seed), clean_oracle(history, seed), 1e-3)
def test_clean_probability_averages_the_window():
    old, new = torch.tensor([0., 0, 0, 1, 1, 1]), torch.tensor([5., 5, 5, 5, 5, 25])
    prob = C.clean_probability(torch.stack([1 - old, old, old, new]), window=3)
    assert (prob > .5).tolist() == [True] * 3 + [False] * 3  # scaled means 0, 0, 0, 2/3, 2/3, 1
@pytest.mark.parametrize("losses, clean", [
    ([.1, .2, .1, INF], [1, 1, 1, 0]), ([2.] * 6, [0] * 6), ([1.], [0]), ([INF] * 4, [0] * 4)])
def test_clean_probability_finite_at_the_edge(losses, clean):
    prob = C.clean_probability(torch.tensor([losses]))
    assert (prob > .5).tolist() == clean and prob.isfinite().all()

@pytest.mark.filterwarnings("ignore")
def test_split_data_aligns_with_the_mean_of_this_pass():
    own, images = SimpleNamespace(net=Linear().eval(), losses=[]), floats(60)
    sets = torch.rand(60, 3) < .5
    sets[:, 0] |= ~sets.any(1)
    p = own.net(images + 1)[0].softmax(1).detach()  # of the weak view
    expected = torch.stack([row / p.mean(0) / (row / p.mean(0)).sum() for row in p])
    losses = torch.stack([-max(row[sets[i]]).log() for i, row in enumerate(expected)])
    own.net.train().calls.clear()
    for epoch in range(6):
        probs, clean_prob = C.split_data(own, images, VIEWS, sets, config())
        close(probs, expected), close(own.losses[-1], losses)
        if epoch == 0:
            close(clean_prob, clean_oracle(losses[None]), 1e-3)
    assert all(mode == [False, False] for _, *mode in own.net.calls)  # eval mode, no gradient
    assert len(own.losses) == 5
@pytest.mark.parametrize("n, batch_size, count, fallback", [
    (5, 2, 0, 2), (25, 9, 2, 3), (40, 9, 3, 4), (40, 9, 4, 0), (40, 2, 1, 4), (40, 2, 2, 0)])
def test_split_data_too_few_clean_takes_the_lowest_tenth(monkeypatch, capsys, n, batch_size, count,
                                                         fallback):
    given = torch.where(torch.arange(n) < count, .8, .5)  # exactly .5 is not clean
    monkeypatch.setattr(C, "clean_probability", lambda *args, **kwargs: given)
    own = SimpleNamespace(net=Linear(), losses=[])
    _, clean_prob = C.split_data(own, floats(n), VIEWS, torch.eye(3)[torch.arange(n) % 3].bool(),
                                 config(batch_size=batch_size))
    lowest = own.losses[-1].argsort().argsort() < fallback
    assert torch.equal(clean_prob, lowest.float() if fallback else given)
    said = capsys.readouterr().out
    assert re.search(rf"^split: .*\b{count}\b.*\b{fallback}\b", said) if fallback else not said

# (7) Pseudo-labels, mixup, self-training ---------------------------------------------------------

@pytest.mark.parametrize("row, temperature, expected", [
    ([.6, .3, .1], .5, [36 / 46, 9 / 46, 1 / 46]), ([.6, .3, .1], 1., [.6, .3, .1]),
    ([.36, .64, 0], 2., [3 / 7, 4 / 7, 0]), ([.4, .3, .3], 1e-3, [1, 0, 0]),
    ([1e-30, 5e-31, 0], .5, [.8, .2, 0])])
def test_sharpen_by_hand(row, temperature, expected):
    close(C.sharpen(torch.tensor([row, row]), temperature), torch.tensor([expected] * 2))
@pytest.mark.parametrize("partner, w, temperature, expected", [
    ([.2, .6, .2], 1., 1., [.25, .75, 0]), ([.2, .6, .2], 0., 1., [.5, .1, .4]),
    ([.2, .6, .2], .8, 1., [.3, .62, .08]), ([.2, .6, .2], 1., .5, [.1, .9, 0]),
    ([0, 0, 1.], 1., .5, [.5, .5, 0])])  # last: nothing of the partner is left inside the set
def test_refine_labels_by_hand(partner, w, temperature, expected):
    own, given = torch.tensor([[.5, .1, .4]] * 2), torch.tensor([partner, [0, 0, 1.]])
    sets = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    labels = C.refine_labels(own, given, sets, torch.tensor([w, 1.]), temperature)
    close(labels, torch.tensor([expected, [0, 0, 1.]]))
def test_guess_labels_takes_the_mean_before_it_sharpens():
    probs = torch.tensor([[[.9, .1], [.5, .5]], [[.3, .7], [.5, .5]]])  # mean of the first: .6, .4
    close(C.guess_labels(probs, .5), torch.tensor([[9 / 13, 4 / 13], [.5, .5]]))
def test_mixup_by_hand():
    def image(*x): return torch.tensor(x).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    mixed, labels = C.mixup(image(0., 4, 8), torch.eye(3), .75, torch.tensor([1, 2, 0]))
    close(mixed, image(1., 5, 6))
    close(labels, torch.tensor([[.75, .25, 0], [0, .75, .25], [.25, 0, .75]]))
@pytest.mark.parametrize("epoch, expected", [
    (0, 0), (10, 0), (10.5, 1 / 32), (18, .5), (26, 1), (99, 1)])
def test_ramp_up_by_hand(epoch, expected):
    assert C.ramp_up(epoch, 10) == expected
    assert C.ramp_up(10 + (epoch - 10) / 2, 10, length=8) == expected

@pytest.mark.parametrize("num_u", [0, 1, 4])
def test_self_training_loss_by_its_formula(num_u):
    logits_x, logits_u = torch.randn(3, 5), torch.randn(num_u, 5, requires_grad=True)
    targets_x, targets_u = probabilities(3, 5), probabilities(num_u, 5)
    expected = -(targets_x * logits_x.softmax(1).log()).sum() / 3
    expected += 0.3 * ((targets_u - logits_u.softmax(1)) ** 2).sum() / (5 * num_u or 1)
    loss = C.self_training_loss(logits_x.requires_grad_(), targets_x, logits_u, targets_u, 0.3)
    close(loss, expected)
    loss.backward()
    close(logits_x.grad, (logits_x.softmax(1) - targets_x) / 3)
    assert (logits_u.grad != 0).all()  # none for an empty part

# (8) Prototypes ----------------------------------------------------------------------------------

def prototype_oracle(prototypes, embeddings, classes, momentum):
    new = [list(row) for row in prototypes.tolist()]
    for z, k in zip(embeddings.tolist(), classes):
        new[k] = [momentum * c + (1 - momentum) * x for c, x in zip(new[k], z)]
    return torch.tensor([[c / (math.hypot(*row) or 1) for c in row] for row in new])
@pytest.mark.parametrize("momentum", [0., .7, .999, 1.])
@pytest.mark.parametrize("size", [0, 1, 8])
def test_update_prototypes_matches_loop_oracle(momentum, size):
    old, z = unit_rows(4, 5), unit_rows(size, 5)
    old[2] = 0
    before, classes = old.clone(), torch.tensor([1, 2, 1, 0, 1, 2, 0, 1])[:size]
    close(C.update_prototypes(old, z, classes, momentum),
          prototype_oracle(old, z, classes.tolist(), momentum))
    assert torch.equal(old, before)  # not in place

def alignment_oracle(similarity, targets_a, targets_b, lam, temperature, n, weight_u):
    """The first n rows are clean; their loss is a mean of sums, that of the others of squares."""
    loss_x, loss_u, q = 0, 0, (similarity / temperature).softmax(1)
    for i in range(len(q)):
        for share, targets in ((lam, targets_a), (1 - lam, targets_b)):
            for t, p in zip(targets[i], q[i]):
                if i < n and t > 0:
                    loss_x = loss_x + share * t * (t / p).log() / n
                elif i >= n:
                    loss_u = loss_u + share * (t - p) ** 2 / q[n:].numel()
    return loss_x + weight_u * loss_u

@pytest.mark.parametrize("num_u", [0, 2])
def test_prototype_loss_matches_loop_oracle(num_u):
    sim, n = torch.randn(3 + num_u, 4, requires_grad=True), 3
    a, b = torch.cat([torch.eye(4)[:3], probabilities(num_u, 4)]), probabilities(3 + num_u, 4)
    expected = alignment_oracle(sim, a, b, .8, .3, n, .5)
    loss = C.prototype_loss(sim[:n], a[:n], b[:n], sim[n:], a[n:], b[n:], .8, .3, .5)
    close(loss, expected)
    close(*(torch.autograd.grad(x, sim)[0] for x in (loss, expected)))

# (9) Queue, contrast, one step -------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[3], [2, 2, 2], [5, 5], [3, 4, 1, 5, 2], [12], [3, 12, 2], [0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_MomentumQueue_holds_the_last_keys_with_class_and_flag(sizes, dtype):
    queue, pushed = C.MomentumQueue(5, 2), []
    for size in sizes:
        number = torch.arange(len(pushed), len(pushed) + size)
        pushed += number.tolist()
        keys = number.to(dtype)[:, None].repeat(1, 2).requires_grad_()
        queue.push(keys, number * 10, number % 3 == 0)
    assert sorted(queue.classes.tolist()) == [10 * i for i in pushed[-5:]]
    assert torch.equal(queue.keys, (queue.classes / 10)[:, None].repeat(1, 2))
    assert torch.equal(queue.clean, queue.classes % 30 == 0)
    assert not queue.keys.requires_grad and queue.keys.dtype == torch.float32
def test_MomentumQueue_graph_before_a_push_stays_valid():
    queue, weight = C.MomentumQueue(4, 2), torch.ones(2, requires_grad=True)
    queue.push(torch.ones(4, 2), torch.zeros(4).long(), torch.ones(4).bool())
    loss, classes = (queue.keys * weight).pow(2).sum(), queue.classes
    queue.push(torch.full((3, 2), 5.), torch.ones(3).long(), torch.ones(3).bool())
    loss.backward()
    assert weight.grad.tolist() == [8, 8] and classes.tolist() == [0] * 4

def test_contrastive_masks_by_hand():
    # Two anchors (clean, not) of class 0, their keys, then the queue: 0 clean, 0 not, 1 clean.
    classes = torch.tensor([0, 0, 0, 0, 0, 0, 1])
    clean = torch.tensor([1, 0, 1, 0, 1, 0, 1]).bool()
    positives, ignored = C.contrastive_masks(classes, clean, 2)
    assert positives.int().tolist() == [[1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    assert ignored.int().tolist() == [[0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1, 0]]

def contrast_oracle(features, classes, clean, anchors, temperature):
    loss = 0
    for i in range(anchors):
        positives, total = [], 0
        for j in range(len(features)):
            same = classes[i] == classes[j]
            if j == i or (same and not (clean[i] and clean[j]) and j != i + anchors):
                continue
            similarity = features[i] @ features[j] / temperature
            total = total + similarity.exp()
            if same or j == i + anchors:
                positives.append(similarity)
        loss = loss + sum(total.log() - s for s in positives) / len(positives) / anchors
    return loss

@pytest.mark.parametrize("queued", [0, 6])
@pytest.mark.parametrize("clean_share", [0., .6, 1.])
def test_supcon_loss_matches_loop_oracle(queued, clean_share):
    features = unit_rows(8 + queued, 3).requires_grad_()
    classes, clean = torch.randint(3, (8 + queued,)), torch.rand(8 + queued) < clean_share
    classes[4:8], clean[4:8] = classes[:4], clean[:4]
    loss = C.supcon_loss(features, *C.contrastive_masks(classes, clean, 4), .2)
    expected = contrast_oracle(features, classes, clean, 4, .2)
    close(loss, expected)
    close(*(torch.autograd.grad(x, features)[0] for x in (loss, expected)))
def test_supcon_loss_never_negative_where_ignored_entries_dominate():
    features = F.normalize(torch.ones(200, 2) + 1e-3 * torch.randn(200, 2), dim=1).requires_grad_()
    classes, clean = torch.zeros(200, dtype=torch.long), torch.zeros(200, dtype=torch.bool)
    loss = C.supcon_loss(features, *C.contrastive_masks(classes, clean, 4), .07)
    loss.backward()
    close(loss, 0.)  # the own key is all that is left
    assert loss >= 0 and features.grad.isfinite().all()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_supcon_loss_of_half_inputs_with_thousands_of_positives_is_finite(dtype):
    features = unit_rows(8196, 16).to(dtype).requires_grad_()
    classes, clean = torch.zeros(8196).long(), torch.ones(8196).bool()
    masks = C.contrastive_masks(classes, clean, 2)
    loss = C.supcon_loss(features, *masks, .07)
    loss.backward()
    close(loss, C.supcon_loss(features.float(), *masks, .07), 1e-3)
    assert loss.dtype == torch.float32 and 9 < loss < 50 and features.grad.isfinite().all()

def sharp(p, temperature):
    p = p ** (1 / temperature)
    return p / p.sum()
def step_input(num_x, num_u, queued, side=2):
    """Keys in a queue, and what co_training_step takes after the networks, up to weight_u."""
    keys = unit_rows(queued, 5), torch.randint(3, (queued,)), torch.arange(queued) % 2 == 0
    sizes, n = (num_x, num_x, num_u, num_u), 2 * (num_x + num_u)
    weak, strong = ([floats(size, side) for size in sizes] for _ in range(2))
    sets = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()[:num_x]
    return keys, [unit_rows(3, 5), weak, strong, sets, torch.rand(num_x), probabilities(num_x, 3),
                  .8, torch.arange(n).roll(3), .4]
def step_oracle(net, key_net, partner, keys, arguments, representation, cfg):
    """One step, sample by sample -> terms, prototypes, key encoder, what the queue then holds."""
    prototypes, weak, strong, sets, w, partner_probs, lam, order, weight_u = arguments
    (x_w1, x_w2, u_w1, u_w2), (x_s1, x_s2, u_s1, u_s2) = weak, strong
    def p(network, image): return network(image[None])[0][0].softmax(0).detach()
    y_x, y_u = [], []
    for i in range(len(sets)):
        inside = torch.stack([q if s else 0 * q for q, s in zip(partner_probs[i], sets[i])])
        own = (p(net, x_w1[i]) + p(net, x_w2[i])) / 2
        y_x.append(sharp(w[i] * inside / inside.sum() + (1 - w[i]) * own, cfg.temperature))
    for one, two in zip(u_w1, u_w2):
        y_u.append(sharp((p(net, one) + p(net, two) + p(partner, one) + p(partner, two)) / 4,
                         cfg.temperature))
    y, images = [*y_x, *y_x, *y_u, *y_u], [*x_s1, *x_s2, *u_s1, *u_s2]
    classes = [row.argmax().item() for row in (*y_x, *y_u)]
    n, pairs = 2 * len(y_x), [*enumerate(order.tolist())]
    logits, z = net(torch.stack([lam * images[i] + (1 - lam) * images[j] for i, j in pairs]))
    loss_x = loss_u = 0
    for i, j in pairs:
        target = lam * y[i] + (1 - lam) * y[j]
        if i < n:
            loss_x = loss_x - (target * logits[i].log_softmax(0)).sum() / n
        else:
            loss_u = loss_u + ((target - logits[i].softmax(0)) ** 2).sum() / logits[n:].numel()
    terms = {"self": loss_x + weight_u * loss_u}
    if not representation:
        return terms, prototypes, key_net, keys
    if cfg.ablate != "prototype":
        prototypes = prototype_oracle(prototypes, net(x_w1)[1], classes[:len(y_x)], cfg.momentum)
        terms["prototype"] = cfg.proto_weight * alignment_oracle(
            z @ prototypes.T, y, [y[j] for _, j in pairs], lam, 0.3, n, cfg.lambda_u)
    moved = copy.deepcopy(key_net)
    for new, now in zip(moved.parameters(), net.parameters()):
        new.data = cfg.momentum * new.data + (1 - cfg.momentum) * now.detach()
    clean = [i < len(y_x) or cfg.ablate == "supcon" for i in range(len(classes))]
    new_keys = torch.cat([moved(x_s2)[1], moved(u_s2)[1]]).detach()
    terms["contrastive"] = cfg.contrastive_weight * contrast_oracle(
        torch.cat([net(x_s1)[1], net(u_s1)[1], new_keys, keys[0]]),
        classes * 2 + keys[1].tolist(), clean * 2 + keys[2].tolist(), len(classes), 0.07)
    new = new_keys, torch.tensor(classes), torch.tensor(clean)
    return terms, prototypes, moved, [torch.cat(parts)[-7:] for parts in zip(keys, new)]

@pytest.mark.parametrize("num_u, queued, ablate, representation", [
    (2, 4, "", True), (2, 0, "", True), (1, 0, "", True), (0, 4, "", True), (5, 7, "", True),
    (2, 4, "", False), (0, 0, "", False), (2, 4, "supcon", True), (2, 4, "prototype", True)])
def test_co_training_step_matches_loop_oracle(num_u, queued, ablate, representation):
    cfg, net, key_net, partner = config(ablate=ablate), Linear(), Linear(), Linear().eval()
    keys, arguments = step_input(3, num_u, queued)
    own = SimpleNamespace(net=copy.deepcopy(net), key_net=copy.deepcopy(key_net),
                          queue=C.MomentumQueue(7, 5))
    own.queue.push(*keys)
    before = arguments[0].clone()
    expected, prototypes, moved, held = step_oracle(net, key_net, partner, keys, arguments,
                                                    representation, cfg)
    partner.calls.clear()
    terms, updated = C.co_training_step(own, partner, *arguments, representation, cfg)
    x_w1, x_w2, u_w1, u_w2 = arguments[1]
    order = [u_w1, u_w2, x_w1, x_w2] if num_u else [x_w1, x_w2]
    for (given, *mode), view in zip(own.net.calls, order):  # one pass a weak view, in this order
        assert torch.equal(given, view) and mode == [True, False]
    n = 3 + num_u
    assert [(len(given), *mode) for given, *mode in own.net.calls[len(order):]] == [
        (2 * n, True, True), (n, True, True)][:1 + representation]
    for network, calls in ((own.key_net, [(n, True, False)] * representation),
                           (partner, [(2 * num_u, False, False)] * bool(num_u))):  # both at once
        assert [(len(given), *mode) for given, *mode in network.calls] == calls
    assert terms.keys() == expected.keys()
    for name in terms:  # equal gradients: none flows through a target, a prototype or a key
        close(terms[name], expected[name], 1e-4)
        grads, references = (torch.autograd.grad(
            term, list(of.parameters()), retain_graph=True, allow_unused=True,
            materialize_grads=True) for term, of in ((terms[name], own.net), (expected[name], net)))
        for grad, reference in zip(grads, references):
            close(grad, reference, 1e-4)
    close(updated, prototypes)
    for key, reference in zip(own.key_net.parameters(), moved.parameters()):
        close(key, reference)
    for name, expected in zip(("keys", "classes", "clean"), held):
        close(getattr(own.queue, name), expected)
    sum(terms.values()).backward()
    assert all(p.grad is None for n in (partner, own.key_net) for p in n.parameters())
    assert torch.equal(arguments[0], before) and not updated.requires_grad

@pytest.mark.parametrize("clean, unlabeled", [(2, 0), (2, 1), (9, 8), (9, 9), (3, 30), (17, 2)])
@pytest.mark.parametrize("ablate", ["", "unlabeled"])
def test_co_train_epoch_finite_at_the_edge(clean, unlabeled, ablate):
    """A batch of a single row, no unlabeled samples, prototypes all 0, an empty queue."""
    n, cfg = clean + unlabeled, config(batch_size=8, ablate=ablate)
    own, partner, prototypes = learner(cfg), learner(cfg), torch.zeros(3, 128)
    images = pictures(n, 1, 8)
    split = probabilities(n, 3), (torch.arange(n) < clean).float()
    terms = C.co_train_epoch(own, partner, split, prototypes, images, torch.ones(n, 3).bool(),
                             views_of("digits", images), cfg, 5)
    assert terms.keys() == {"self", "prototype", "contrastive", "clean"}
    assert terms["clean"] == clean and all(math.isfinite(term) for term in terms.values())
    assert prototypes.isfinite().all() and prototypes.abs().sum() > 0  # changed in place
    assert all(p.isfinite().all() for p in own.net.parameters())
@pytest.mark.parametrize("epoch, on", [(1, False), (4, False), (5, True)])
def test_co_train_epoch_representation_starts_after_the_sum_of_both_waits(epoch, on):
    cfg, images = config(start_contrastive=3), pictures(7, 1, 8)
    own, partner = learner(cfg), learner(cfg)
    split = probabilities(7, 3), torch.tensor([1, 0, .9, .5, 0, .8, .7])  # .5 is not clean
    before = copy.deepcopy(own.net.state_dict())
    partner.net.train(), own.net.eval()
    terms = C.co_train_epoch(own, partner, split, torch.zeros(3, 128), images,
                             torch.ones(7, 3).bool(), views_of("digits", images), cfg, epoch)
    assert terms["clean"] == 4 and ("prototype" in terms) == ("contrastive" in terms) == on
    assert own.net.training and not partner.net.training
    # The key encoder starts every epoch as a copy, and moves with the terms alone.
    keys = own.key_net.state_dict()
    assert all(torch.equal(keys[name], before[name]) for name in before) != on

# (10) Evaluation; (11) whole runs, by main() -----------------------------------------------------

@pytest.mark.parametrize("epoch, expected", [
    (0, .2), (10, .1001), (5, .0002 + .1998 * (2 + math.sqrt(2)) / 4), (20, .0002), (35, .0002)])
def test_cosine_lr_by_hand(epoch, expected):
    assert C.cosine_lr(epoch, .2, 20) == pytest.approx(expected)

def one_line(capsys, *texts):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("coreg.py: ") and len(lines[0]) < 900, lines
    for text in texts:
        assert str(text) in lines[0]

@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert C.main(words(photos, folder)) == 0
    return folder

def test_main_writes_config_metrics_and_checkpoint(finished):
    records, settings = metrics(finished), json.loads((finished / "config.json").read_text())
    assert {p.name for p in finished.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert settings["epochs"] == 4 and settings["lr"] == 0.05 and settings["dataset"] == "folder"
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert [r["phase"] for r in records] == ["warm-up"] + ["co-train"] * 3
    terms = ["set", "entropy", "self", "prototype", "contrastive"]
    for i, r in enumerate(records):
        assert {*r} == {"epoch", "phase", "lr", "loss", "clean", "test_acc", "test_acc_net1",
                        "test_acc_net2", *terms}
        assert r["loss"] == pytest.approx(sum(r[name] for name in terms))
        assert r["lr"] == pytest.approx(0.02502 + 0.02498 * math.cos(math.pi * i / 800), rel=1e-3)
        on = terms[:2] if i == 0 else terms[2:3] if i == 1 else terms[2:]  # ">": not yet in epoch 2
        assert [name for name in terms if r[name] != 0] == on
    assert 0 < records[-1]["clean"] <= 36
def test_main_predicts_with_the_sum_of_both_networks(finished, photos):
    state = torch.load(finished / "checkpoint.pt", weights_only=False)["state"]
    images, labels = C.read_images(read(photos, "folder")[1], state.cfg)
    one, two = (net.net.eval()(state.views.plain(images))[0] for net in (state.net_1, state.net_2))
    for name, logits in (("_net1", one), ("_net2", two), ("", one + two)):
        share = 100 * (logits.argmax(1) == labels).float().mean().item()
        assert metrics(finished)[-1]["test_acc" + name] == pytest.approx(share)
def test_main_same_seed_same_numbers(photos, finished):
    assert C.main(words(photos, "again")) == C.main(words(photos, "other", "--seed", 1)) == 0
    assert metrics("again") == metrics(finished) != metrics("other")

@pytest.mark.parametrize("flags", [[], ["--classes", "blue,green,red"]])
def test_main_never_trains_on_folder_names(flags, photos, finished, capsys):
    """The same images in the same order, below folders of which many name a wrong class."""
    make_photos(Path("p"), test=False)
    files = [path.read_bytes() for path in sorted(Path("p/train").rglob("*.png"))]
    shutil.rmtree("p/train"), shutil.copytree(photos / "annotations", "p/annotations")
    for i, content in enumerate(files):
        write(Path("p/train", "blue" if i < 6 else "green" if i < 30 else "red", f"{i:02}.png"),
              content)
    assert C.main(words("p", "run", *flags)) == 0
    assert ("*" in capsys.readouterr().out) == (not flags)  # * marks what needs true labels
    expected = [{k: v for k, v in r.items() if "acc" not in k} for r in metrics(finished)]
    assert metrics("run") == expected  # and no test/: no accuracy
@pytest.mark.parametrize("part", "co-pl supcon prototype unlabeled".split())
def test_main_ablation_changes_the_numbers(part, photos, finished):
    assert C.main(words(photos, "run", "--ablate", part)) == 0
    records, full = metrics("run"), metrics(finished)
    assert records[0] == full[0] and records[1:] != full[1:]  # the warm-up is the same
    assert all(r["prototype"] == 0 < r["self"] for r in records[1:]) == (part == "prototype")
def test_main_warm_up_to_the_end_is_the_set_loss_alone(photos, finished):
    assert C.main(words(photos, "run", "--warm-up", 4, "--candidates", "argmax")) == 0
    for r in metrics("run"):
        assert r["phase"] == "warm-up" and r["self"] == r["contrastive"] == r["clean"] == 0
        assert r["set"] > 0 > r["entropy"]
    assert metrics("run")[0]["set"] != metrics(finished)[0]["set"]  # one label instead of sets

@pytest.mark.parametrize("ablate, swapped", [("", True), ("co-pl", False)])
def test_train_gives_each_network_the_split_of_the_other(ablate, swapped, photos, monkeypatch):
    made, used, split, epoch = [], [], C.split_data, C.co_train_epoch
    def split_data(own, *args):
        made.append((own, split(own, *args)))
        return made[-1][1]
    def co_train_epoch(own, partner, given, *args):
        used.append((own, partner, given))
        return epoch(own, partner, given, *args)
    monkeypatch.setattr(C, "split_data", split_data)
    monkeypatch.setattr(C, "co_train_epoch", co_train_epoch)
    assert C.main(words(photos, "run", "--epochs", 2, "--ablate", ablate)) == 0
    for (own, partner, given), (author, split) in zip(used, made[::-1] if swapped else made):
        assert given is split and partner is author and (own is not author) == swapped

@pytest.mark.parametrize("name", WRITERS)
def test_main_runs_on_every_data_set(name, tmp_path, unchecked):
    WRITERS[name](tmp_path)
    assert C.main(["--dataset", name, "--data-dir", ".", "--annotator", "flip", "--output-dir",
                   "run", "--width", "2", "--batch-size", "4", "--epochs", "3", "--warm-up", "1",
                   "--start-contrastive", "0", "--device", "cpu", "--precision", "fp32"]) == 0
    assert metrics("run")[-1]["contrastive"] > 0 and 0 <= metrics("run")[-1]["test_acc"] <= 100

def stop_in(monkeypatch, function, number, error):
    """Let an error strike in the given call of a function, after it has done its work."""
    real, calls = getattr(C, function), []
    def stopped(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        if len(calls) == number:
            raise error
        return calls[-1]
    monkeypatch.setattr(C, function, stopped)

@pytest.mark.parametrize("function, number, left", [
    ("warm_up_epoch", 2, 0), ("co_train_epoch", 1, 1), ("co_train_epoch", 6, 3)])
def test_resume_after_an_interrupt_gives_the_same_numbers(function, number, left, photos, finished,
                                                          monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in(patch, function, number, KeyboardInterrupt())
        assert C.main(words(photos, "run")) == 130
    one_line(capsys, "interrupted", "--resume")
    assert len(metrics("run")) == left
    assert C.main(["--resume", str(Path("run").rename("moved"))]) == 0
    assert metrics("moved") == metrics(finished) and not Path("run").exists()
    assert torch.load("moved/checkpoint.pt", weights_only=False)["state"].cfg.resume == "moved"
@pytest.mark.parametrize("change", ["annotations", "classes", "image"])
def test_resume_refuses_other_data(change, finished, clip, capsys):
    root, run = make_photos(Path("p"), test=False), shutil.copytree(finished, "run")
    flags = dict(annotations=["--candidates", "argmax"], classes=["--classes", "blue,red,green"])
    if change == "image":
        paint(root / "train/red/03.png", COLOURS["green"])
    before = Path("run/checkpoint.pt").read_bytes()
    assert C.main(["--resume", run, "--data-dir", "p", *flags.get(change, [])]) == 2
    one_line(capsys, "--resume", "those that the run began with")
    assert Path("run/checkpoint.pt").read_bytes() == before
@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other"])
def test_resume_of_a_damaged_run_error_in_one_line(name, damage, finished, capsys):
    shutil.copytree(finished, "run")
    path = Path("run", name)
    whole, _ = path.read_bytes(), path.unlink()
    if damage != "gone":
        write(path, {"empty": b"", "cut": whole[:-99], "other": b'{"dim": 2}'}[damage])
    assert "--resume" in refused(capsys, ["--resume", "run"])
def test_main_full_disk_keeps_the_checkpoint(photos, finished, monkeypatch, capsys):
    real = Path.write_bytes
    def full(path, content):
        done = Path("run/metrics.jsonl").exists() and len(metrics("run")) == 3
        real(path, bytes(content)[:99] if done else content)
        if done:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert C.main(words(photos, "run")) == 2
    one_line(capsys, "No space left")
    assert len(torch.load("run/checkpoint.pt", weights_only=False)["state"].records) == 2
    assert C.main(["--resume", "run"]) == 0 and metrics("run") == metrics(finished)
def test_main_names_epoch_and_term_of_a_loss_that_is_not_finite(photos, capsys):
    assert C.main(words(photos, "run", "--lr", "1e30")) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"coreg.py: epoch 1, .*'(set|entropy)'.*--lr.*\n", error)
    assert torch.load("run/checkpoint.pt", weights_only=False)["state"].records == []
@pytest.mark.parametrize("argv, text", [
    ("--epochs -3", "--epochs"), ("--epochs ten", "--epochs"), ("--lr nan", "--lr"),
    ("--batch-size 0", "--batch-size"), ("--warm-up 50 --epochs 10", "--warm-up"),
    ("--annotations nowhere.npz", "nowhere.npz"), ("--num-samples 1", "two or more images"),
    ("--epoch 3", "--epoch 3"), ("--dataset cifra10", "cifra10"), ("--ablate mixin", "--ablate"),
    ("--dataset folder --data-dir no/where", "no/where"), ("--resume nowhere", "nowhere"),
    ("--device cuda:9", "cuda:9"), ("--device tpu", "tpu"), ("--output-dir old", "--output-dir"),
    ("--momentum 1", "--momentum"), ("--resume old --width 8 --seed 1", "checkpoint fixes")])
def test_main_refuses_bad_input_in_one_line(argv, text, capsys):
    write(Path("old/config.json"), "{}")
    assert text in refused(capsys, argv.split())
def test_main_never_shares_a_folder_with_a_run_of_the_same_second(photos, monkeypatch, capsys):
    monkeypatch.setattr(C.time, "strftime", lambda _: "begun")
    Path("begun").mkdir()
    assert C.main(words(photos, "", *ONE)) == 2
    one_line(capsys, "begun")

def script(argv, **changes):
    environment = dict(os.environ, OMP_NUM_THREADS="1", **changes)
    return subprocess.Popen([sys.executable, C.__file__, *argv], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
def test_script_resumes_after_a_kill_with_the_same_numbers(photos):
    more = "--epochs", 12
    process = script(words(photos, "run", *more))
    while not Path("run/metrics.jsonl").exists() or len(metrics("run")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 2 <= len(metrics("run")) < 12
    assert C.main(words(photos, "quiet", *more)) == 0
    process = script(["--resume", "run"])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0 and not error and metrics("run") == metrics("quiet")
def test_script_prints_in_ascii_and_returns_the_exit_code(photos):
    make_photos(Path("p"), test=False)
    Path("p/train/red").rename("p/train/rötlich")
    argv = words("p", "läufe", "--annotator", "flip", *ONE)
    for code in (0, 2):  # the second time the folder holds a run
        process = script(argv, PYTHONIOENCODING="ascii")
        out, error = process.communicate(timeout=120)
        assert process.returncode == code and error.count("\n") == bool(code)
        assert r"l\xe4ufe" in (error if code else out)
def test_script_into_head_ends_without_a_traceback(photos):
    process = script(words(photos, "run", "--epochs", 30))
    assert process.stdout.readline().startswith("folder: 36 training")
    process.stdout.close()  # as `| head -1` does
    error = process.stderr.read()
    assert process.wait(timeout=120) != 0 and "Traceback" not in error and "Broken" not in error

# (13) TinyCLIP -----------------------------------------------------------------------------------

@pytest.mark.parametrize("word, sign, axes", [("bold", 1, (0, 1)), ("thin", -1, (0, 1)),
                                              ("narrow", -1, 0), ("wide", 1, 0)])
def test_draw_digit_truths_are_true(word, sign, axes):
    rng, values, all_truths = random.Random(0), {True: [], False: []}, []
    [at] = [t for t, text in enumerate(C.TEMPLATES["digits"]) if f" {word} " in text]
    for i in range(400):
        image, truths = C.draw_digit(i % 10, rng)
        assert image.size == (8, 8) and np.asarray(image).max() > 100
        ink = np.asarray(image, float).sum(axes)  # all of it, or of each column
        values[bool(truths[at])].append(sign * (ink if axes else (ink > 99).sum()))
        all_truths.append(truths)
    shown, other = np.mean(values[True]), np.mean(values[False])
    assert shown > other + 0.3 * np.std(values[False])
    shares = np.mean(all_truths, 0)
    assert len(shares) == len(C.TEMPLATES["digits"]) and shares[0] == 1  # "a photo of the number"
    assert all(0.05 < share < 0.95 for share in shares[1:])

def test_load_clip_tiny_knows_drawn_digits(monkeypatch):
    monkeypatch.setattr(C, "TINY_STEPS", 60)
    monkeypatch.setattr(C, "TINY_DRAWINGS", 600)
    model, preprocess, tokenizer = C.load_clip("tiny", "openai", "cpu")
    rng = random.Random(1)
    drawings = [C.draw_digit(i % 10, rng)[0] for i in range(200)]
    images = torch.stack([preprocess(x.resize((32, 32)).convert("RGB")) for x in drawings])
    templates, names = C.TEMPLATES["digits"], C.DATASETS["digits"].class_names
    probs = C.annotate(model, tokenizer, [(images, None)], names, templates, "cpu")
    assert probs.shape == (len(templates), 200, 10) and not model.training
    assert C.accuracy(probs.float().mean(0), torch.arange(200) % 10) > 30  # by chance: 10

def test_main_digits_from_annotation_to_metrics(monkeypatch, capsys):
    """The default in small: TinyCLIP hardly trained, four epochs."""
    monkeypatch.setattr(C, "TINY_STEPS", 30)
    monkeypatch.setattr(C, "TINY_DRAWINGS", 300)
    argv = "--epochs 4 --warm-up 2 --width 4 --start-contrastive 0 --num-samples 300 --device cpu"
    assert C.main([*argv.split(), "--output-dir", "run"]) == 0
    assert "digits: 300 training and 359 test images" in capsys.readouterr().out
    last = metrics("run")[-1]
    assert last["clean"] > 0 and last["contrastive"] > 0 and last["test_acc"] > 0

# The benchmark: python test_coreg.py --help -----------------------------------------------------

def benchmark(argv=None):
    """What co-training of one network costs beside its bare calls, on random images with a made-up
    split. Other flags are those of coreg.py; default: --dataset cifar10 --batch-size 128."""
    parser = argparse.ArgumentParser(description=benchmark.__doc__)
    for name, value in (("--images", 256), ("--clean", 204), ("--repeats", 2)):
        parser.add_argument(name, type=int, default=value)
    for name, text in (("--representation", "with Eq. 9 to 11"), ("--epoch-only", "no more")):
        parser.add_argument(name, action="store_true", help=text)
    for name, text in (("--annotate", "an open_clip model"), ("--old", "another coreg.py's path")):
        parser.add_argument(name, help=text)
    args, rest = parser.parse_known_args(argv)
    rest += [] if "--dataset" in rest else ["--dataset", "cifar10", "--batch-size", "128"]
    rest += ["--lr", "1e-9"]  # the bare calls minimise a mean that has no minimum
    cfg, n, k, calls = C.parse(rest), args.images, 10, []
    device, bf16 = C.pick_device(cfg)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def seconds(*functions, repeats=args.repeats):
        """Median of each, in turns, after one round that warms up."""
        times = []
        for _, function in itertools.product(range(repeats + 1), functions):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return np.median(np.reshape(times, (-1, len(functions)))[1:], 0)

    if args.annotate:
        model, _, preprocess = open_clip.create_model_and_transforms(args.annotate, device=device)
        tokenizer = open_clip.get_tokenizer(args.annotate)
        pairs = [(Image.fromarray(pixels), 0) for pixels, _ in draw([0] * n, 32, 32, 3)]
        ready = torch.stack([preprocess(image) for image, _ in pairs]).to(device).split(256)
        encode = torch.inference_mode()(lambda: [model.eval().encode_image(x) for x in ready])
        def annotate(part):
            C.annotate(model, tokenizer, C.load(part, preprocess), C.DIGITS, ["a {}"], device)
        whole, text, alone = seconds(lambda: annotate(pairs), lambda: annotate(pairs[:1]), encode)
        return print(json.dumps(dict(images_per_s=n / (whole - text), encoder=n / alone)))

    images = pictures(n, C.DATASETS[cfg.dataset].channels, cfg.image_size).to(device)
    sets, probs = (torch.rand(n, k) < 0.2).to(device), torch.rand(n, k).softmax(1).to(device)
    sets[:, 0] |= ~sets.any(1)
    split = probs, (torch.arange(n, device=device) < args.clean).float()
    epoch = cfg.warm_up + (cfg.start_contrastive + 1) * args.representation

    def setting(M):
        """A coreg.py, of today or older -> both networks, the views, co-training of an epoch."""
        cfg, today = M.parse(rest), hasattr(M, "co_train_epoch")
        own, partner = (M.Learner(k, cfg, device, bf16) if today else
                        M.make_learner(cfg, k, device) for _ in range(2))
        views = (M.Views(images, **M.DATASETS[cfg.dataset].views) if today else
                 M.Views(cfg.views, *M.channel_statistics(images)))
        data = torch.zeros(k, 128, device=device), images, sets, views, cfg, epoch
        train = M.co_train_epoch if today else lambda *data: [*M.co_training_epoch(*data)]
        return own, partner, views, lambda: train(own, partner, split, *data)

    own, partner, views, co_train = setting(C)
    def bare():
        total = 0
        for net, given, training, grad in calls:
            if net is None:
                own.step({"all": total})
                total = 0
                continue
            with torch.set_grad_enabled(grad):
                logits, embeddings = net.train(training)(given)
            total = total + (logits.mean() + embeddings.mean() if grad else 0)
    turns = [co_train]
    if not args.epoch_only:
        hooks = [net.register_forward_pre_hook(lambda net, given: calls.append(
            (net, given[0].detach().clone(), net.training, torch.is_grad_enabled())))
            for net in (own.net, own.key_net, partner.net)]
        hooks.append(own.optimizer.register_step_post_hook(lambda *_: calls.append([None] * 4)))
        co_train(), [hook.remove() for hook in hooks]
        turns += [bare, lambda: C.split_data(own, images, views, sets, cfg), lambda:
                  C.warm_up_epoch(own, images, F.one_hot(probs.argmax(1), k) > 0, views, cfg, 0)]
    if args.old:
        spec = importlib.util.spec_from_file_location("old_coreg", args.old)
        sys.modules["old_coreg"] = old = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(old)
        turns.append(setting(old)[3])
    times = seconds(*turns)
    result = {"clean images/s": args.clean / times[0], "ms per image": 1000 * times[0] / n}
    if not args.epoch_only:
        result.update({"ratio to bare network calls": times[0] / times[1],
                       "epoch of both networks, s": 2 * (times[0] + times[2]),
                       "epoch of one plain network, s": times[3]})
        for count, nets in itertools.product((1, 256), ((own,), (own, partner))):
            [one] = seconds(lambda: [C.predict(x.net, images[:count], views.plain) for x in nets])
            result[f"{len(nets)} network(s) predict {count} images, ms"] = 1000 * one
    if args.old:
        result["ratio to --old"] = times[0] / times[-1]
    result["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(vars(args), device=str(device), bf16=bf16, **result), indent=1))

if __name__ == "__main__":
    benchmark()
