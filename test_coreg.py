"""Tests of coreg.py: python -m pytest -q test_coreg.py. No network, no data but what they make.

As a script it is the benchmark: python test_coreg.py --help
"""
import argparse, copy, csv, dataclasses, errno, functools, io, itertools, json, math
import multiprocessing, os, pickle, re, resource, subprocess, sys, time, urllib.error
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
from PIL import Image, ImageEnhance, ImageOps
from scipy.io import savemat
from sklearn.mixture import GaussianMixture

import coreg as C

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

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

def refused(capsys, argv):
    """main(argv) must end with exit code 2 and one line, which is returned, and leave all files;
    and that before it annotates or trains."""
    def files(): return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    def never(*args): pytest.fail("bad input was accepted")
    before = files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "train", never)
        patch.setattr(C, "cached_annotation", never)
        assert C.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("coreg.py: ") and files() == before
    return lines[0]

# (1) Prompt templates and the table of datasets --------------------------------------------------

@pytest.mark.parametrize("name, sizes, count, some", [  # eurosat, fer2013: 4/5 of 15 and of 20
    ("cifar10", (20, 3), 10, {0: "airplane", 9: "truck"}),
    ("cifar100", (9, 2), 100, {0: "apple", 1: "aquarium fish", 99: "made up 99"}),
    ("svhn", (12, 2), 10, {i: f"number {i}" for i in range(10)}),
    ("fmnist", (11, 2), 10, {0: "T-shirt/top", 9: "Ankle boot"}),
    ("eurosat", (12, 3), 3, {1: "Forest"}),
    ("fer2013", (16, 4), 7, {0: "Angry Facial Expression", 6: "Neutral Facial Expression"}),
    ("gtsrb", (43, 4), 43, {0: "German Traffic Sign: Speed limit 20",
                            14: "German Traffic Sign: Stop"})])
def test_read_dataset_returns_what_was_written(name, sizes, count, some, tmp_path, unchecked):
    written, written_test = WRITERS[name](tmp_path)
    train, test, class_names = read(tmp_path, name)
    assert (len(train), len(test)) == sizes and len({*class_names}) == len(class_names) == count
    assert some.items() <= dict(enumerate(class_names)).items()
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
    assert split(1) == split(2) == (train, test)
    some, same_test = split(3, "--num-samples", "2")
    assert len({*some}) == 2 and {*some} <= {*train} and same_test == test
    assert sorted(some) != [0, 1] and split(4, "--num-samples", "2")[0] == some
    assert split(5, "--num-samples", str(size))[0] == train
    for wrong in (1, size + 1):
        with pytest.raises(C.CoregError, match=f"^--num-samples: .* 2 to {size}, got {wrong}$"):
            split(0, "--num-samples", str(wrong))

LAYOUT = dict(cifar10="cifar-10-batches-py/", cifar100="cifar-100-python/", svhn="_32x32.mat",
              fmnist="FashionMNIST/raw/", eurosat="eurosat/2750/", fer2013="fer2013/fer2013.csv",
              gtsrb="gtsrb/GTSRB/")

@pytest.mark.parametrize("name", WRITERS)
def test_read_dataset_says_what_is_missing_where(name, capsys, alone):
    said = refused(capsys, ["--dataset", name, "--data-dir", "none/here"])
    assert re.search(f"--data-dir: {name} .*expected .*'none/here': .*{LAYOUT[name]}", said)
    assert ("kaggle.com" in said) == (not alone) == (name == "fer2013")
    alone.clear()

@pytest.mark.parametrize("name, path, keep", [  # the slice that is left of the file
    ("cifar10", "cifar-10-batches-py/test_batch", slice(4000)),
    ("cifar100", "cifar-100-python/meta", slice(99)), ("svhn", "test_32x32.mat", slice(4000)),
    ("fmnist", "FashionMNIST/raw/t10k-images-idx3-ubyte", slice(999)),
    ("fer2013", "fer2013/fer2013.csv", slice(99, None)),
    ("gtsrb", "gtsrb/GT-final_test.csv", slice(70))])
def test_main_names_the_folder_of_corrupt_data(name, path, keep, tmp_path, capsys, unchecked):
    WRITERS[name](tmp_path)
    write(tmp_path / path, (tmp_path / path).read_bytes()[keep])
    argv = ["--dataset", name, "--data-dir", str(tmp_path), "--annotator", "flip"]
    assert re.search(f"expected .*'{tmp_path}': .*{LAYOUT[name]}", refused(capsys, argv))

@pytest.mark.parametrize("name, path", [
    ("eurosat", "eurosat/2750/Forest/Forest_1.jpg"),
    ("gtsrb", "gtsrb/GTSRB/Training/00007/00000_00000.ppm")])
def test_read_images_skips_a_corrupt_image_of_a_data_set(name, path, tmp_path, capsys):
    WRITERS[name](tmp_path)
    write(tmp_path / path, (tmp_path / path).read_bytes()[:99])
    cfg = C.parse(["--dataset", name, "--data-dir", str(tmp_path), "--image-size", "8"])
    parts = C.read_dataset(cfg)[:2]
    kept = [C.read_images(part, cfg, "read") for part in parts]
    whole = sum(len(part) for part in parts)
    assert sum(len(images) for images, *_ in kept) == whole - 1
    for images, labels, pairs, _ in kept:
        assert len(images) == len(labels) == len(pairs) and labels.tolist() == [y for _, y in pairs]
    assert "skipped: 1 of " in capsys.readouterr().err

def test_read_digits_matches_scikit_learn(tmp_path):
    train, test, class_names = read(tmp_path, "digits")
    assert (len(train), len(test)) == (1438, 359)  # 0.8 * 1797 = 1437.6
    assert len({*train.indices, *test.indices}) == 1797 and class_names[:2] == ["zero", "one"]
    counts = np.bincount([label for part in (train, test) for _, label in part])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    image, label = C.read_digits(tmp_path, "train")[0]
    assert (image.mode, image.size, label) == ("L", (8, 8), 0)  # its first row: 0 0 5 13 9 1 0 0
    assert np.asarray(image)[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # times 255/16
    values = np.stack([image for image, _ in train])
    assert (values.min(), values.max()) == (0, 255)

def test_to_square_keeps_the_centre_at_the_scale_of_the_shorter_side():
    wide = np.tile(np.arange(6, dtype=np.uint8), (4, 1))  # [4,6], no change of scale
    for pixels, expected in ((wide, [[1, 2, 3, 4]] * 4), (wide.T.copy(), np.c_[1:5].repeat(4, 1))):
        assert C.to_square(Image.fromarray(pixels), 4, 1)[0].tolist() == np.array(expected).tolist()
    bands = np.uint8([[0, 40, 200, 255]]).repeat(10, 1).repeat(20, 0)  # [20,40]
    square = C.to_square(Image.fromarray(bands), 10, 1)  # at half the size columns 10..29 remain
    assert square.shape == (1, 10, 10) and square.dtype == torch.uint8
    assert square[0, :, [1, 2, 3, 6, 7, 8]].tolist() == [[40] * 3 + [200] * 3] * 10  # 0, 4: blends

@pytest.mark.parametrize("mode, pixel, rgb, grey", [  # grey: 0.299 red + 0.587 green + 0.114 blue
    ("L", 70, [70, 70, 70], 70), ("RGB", (255, 0, 0), [255, 0, 0], 76),
    ("RGBA", (0, 255, 0, 0), [0, 255, 0], 150), ("P", 1, [0, 0, 255], 29)])
def test_to_square_converts_modes(mode, pixel, rgb, grey):
    image = Image.new(mode, (9, 5), pixel)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    for channels, expected in ((3, rgb), (1, [grey])):
        expected = torch.tensor(expected, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 5, 5)
        assert C.to_square(image, 5, channels).equal(expected)

@pytest.mark.parametrize("workers, n", [(0, 300), (2, 4200)])  # few are read without workers
def test_load_batches_keep_order_and_mark_missing_labels(workers, n):
    pairs = [(Image.new("L", (8, 8), i % 256), None if i == 2 else i) for i in range(n)]
    pairs[5] = "broken"
    batches = list(C.load_batches(pairs, functools.partial(C.to_square, size=8, channels=1), "read",
                                  workers))
    images, labels, rows = zip(*batches)
    left = [i for i in range(n) if i != 5]
    assert torch.cat(images)[:, 0, 3, 3].tolist() == [i % 256 for i in left]
    assert sum(labels, []) == [-1 if i == 2 else i for i in left] and sum(rows, []) == left

def test_templates_and_signs_are_complete_and_distinct():
    assert len(C.TEMPLATES["small"]) == 27 and len(C.SIGNS) == len({*C.SIGNS}) == 43
    for templates in (C.TEMPLATES["small"], C.TEMPLATES["digits"]):
        assert len({*templates}) == len(templates)
        for text in templates:
            assert text.count("{}") == text.count("{") == text.count("}") == 1
    known = {4: "Speed limit 70", 12: "Priority road", 13: "Yield", 17: "No entry", 25: "Road work",
             32: "End of all limits", 40: "Roundabout", 42: "End of no passing for trucks"}
    assert known == {i: C.SIGNS[i] for i in known}

# (11) The command line ---------------------------------------------------------------------------

PAPER = dict(epochs=800, warm_up=50, image_size=32, channels=3, views="photo", batch_size=256,
             lr=0.01, lr_period=800, annotator="clip", templates="small", queue_size=8192)

@pytest.mark.parametrize("name, differs", [
    ("cifar10", {}), ("cifar100", dict(warm_up=100)), ("svhn", dict(views="sign")),
    ("fmnist", dict(epochs=100, channels=1, views="grey", image_size=28)),
    ("eurosat", dict(epochs=100, image_size=64)),
    ("fer2013", dict(epochs=100, channels=1, views="grey", image_size=64)),
    ("gtsrb", dict(epochs=100, image_size=64, views="sign"))])
def test_parse_takes_the_defaults_of_the_data_set(name, differs):
    for argv in (["--dataset", name], [f"--dataset={name}"], []):  # each call starts afresh
        cfg = dataclasses.asdict(C.parse(argv))
        assert not argv or {key: cfg[key] for key in PAPER} == {**PAPER, **differs}
        assert cfg["dataset"] == (name if argv else "digits")

@pytest.mark.parametrize("name", C.DATASETS)
def test_parse_lets_every_preset_be_overridden(name):
    preset = C.DATASETS[name].preset
    words = dict(tiny="clip", digits="small", digit="photo", sign="photo", grey="photo",
                 fp32="auto")
    for key, value in preset.items():
        other = {int: lambda: 3 if key == "channels" else value + 1, float: lambda: value / 2,
                 str: lambda: words[value]}[type(value)]()
        argv = [C.flag(key), str(other), "--dataset", name]  # before the data set is named, too
        cfg = C.parse(argv + ["--annotator", "clip"] * (key == "templates"))
        assert getattr(cfg, key) == other and getattr(C.parse(argv[2:]), key) == value != other
        assert all(getattr(cfg, k) == preset[k] for k in {*preset} - {key, "annotator"})

@pytest.mark.parametrize("field", dataclasses.fields(C.Config), ids=lambda field: field.name)
def test_parse_sets_every_field_by_its_flag(field):
    kinds = {bool: lambda: True, int: lambda: field.default + 1,
             float: lambda: field.default / 2, str: lambda: "x"}
    value = dict(channels=1, ablate="co-pl,gmm").get(field.name)
    value = value or (field.metadata["options"].get("choices") or [kinds[field.type]()])[-1]
    argv = [C.flag(field.name)] + [str(value)] * (field.type is not bool)
    cfg = C.parse(["--dataset", "cifar10", *argv])
    assert getattr(cfg, field.name) == value != field.default

@pytest.mark.parametrize("argv, epochs", [
    (["--dataset", "fmnist"], 100), (["--dataset=svhn"], 800)])
def test_main_help_shows_groups_and_defaults(argv, epochs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no line is broken
    with pytest.raises(SystemExit, match="^0$"):
        C.main(["--help", *argv])
    out, err = capsys.readouterr()
    for group in ("data", "annotation", "training", "details", "run"):
        assert f"\n{group}:\n" in out and not err
    out = " ".join(out.split())
    assert f" --epochs INT epochs in all (default: {epochs}) " in out
    for field in dataclasses.fields(C.Config):
        text = field.metadata["help"]
        line = rf" {C.flag(field.name)}( \[?[A-Z]+\]?)? {re.escape(text)}"
        assert len(text) > 5 and re.search(line, out)

@pytest.mark.parametrize("argv", " ".join("""
    --epochs 0; --epochs -1; --epochs 2.5; --epochs ten; --lr nan; --lr inf; --lr 0; --lr -0.1;
    --batch-size 1; --temperature 0; --temperature nan; --ratio 1.5; --ratio -0.1; --momentum -0.5;
    --partial-rate 1.01; --noise-rate nan; --momentum 1.1; --lambda-u inf; --proto-weight -1;
    --contrastive-weight -0.001; --seed -1; --seed 4294967296; --width 0; --num-samples -5;
    --num-samples 1439; --num-templates -1; --num-templates 13; --image-size 7; --top-k 0;
    --queue-size 0; --embedding-dim 0; --lr-period 0; --warm-up -1; --start-contrastive -1;
    --channels 2; --views sepia; --output-dir""".split()).split("; "))
def test_main_refuses_values_out_of_range(argv, capsys):
    said = refused(capsys, argv.split())
    assert all(word in said for word in argv.split()) and re.search("expected|invalid", said)

def test_parse_accepts_the_ends_of_the_ranges():
    argv = "--ratio 0 --momentum 1 --batch-size 2 --seed 4294967295 --epochs 1 --warm-up 0"
    cfg = C.parse(argv.split())
    assert (cfg.ratio, cfg.momentum, cfg.seed, cfg.epochs) == (0, 1, 2 ** 32 - 1, 1)

@pytest.mark.parametrize("argv, text", [
    ("--dataset cifra10", "--dataset.*'cifra10'.*cifar10"),
    ("--epoch 3", r"unknown argument --epoch, did you mean --epochs\?"),
    ("--warm_up 3", r"--warm_up, did you mean --warm-up\?"), ("stray", "unknown argument stray;"),
    ("--epochs 4 --warm-up 4", r"--warm-up: expected below --epochs 4 \(set both\), got 4"),
    ("--dataset fmnist --epochs 9", r"--warm-up: expected below --epochs 9 \(set both\), got 50"),
    ("--device cuda:99", "--device: expected auto.*'cpu'.*got cuda:99"),
    ("--device foo", "--device: expected auto.*'cpu'.*got foo"),
    ("--annotator flip --output-dir plain/run", "cannot write plain/run.*--output-dir"),
    ("--output-dir old", "--output-dir: old holds a run.*--overwrite"),
    ("--dataset cifar10 --annotator tiny", "--annotator tiny: expected --dataset digits"),
    ("--annotator tiny --templates small", "--templates digits, got digits and small"),
    ("--num-templates 13", "--num-templates: expected 0 to 12, got 13"),
    ("--device meta", "--device: expected auto.*'cpu'.*got meta"),
    ("--ablate gmm,mixin", "--ablate: expected some of .*gmm.*, got gmm,mixin"),
    ("--annotator flip --annotations x.npz", "--annotator flip: .*no --annotations"),
    ("--annotator flip --prior clip", "--annotator flip: .*--prior clip")])
def test_main_refuses_bad_input_in_one_line(argv, text, capsys):
    write(Path("plain"), "a file, not a folder")
    write(Path("old/config.json"), "{}")
    assert re.search(text, refused(capsys, argv.split()))

@pytest.mark.parametrize("raised, code, said", [
    (C.CoregError("stopped:\n so", 1), 1, "stopped: so"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space", "x/y"), 2, "cannot write x/y [(]No space[)].*"), (None, 0, None)])
def test_main_returns_the_exit_code(raised, code, said, capsys, monkeypatch):
    def run(cfg):
        if raised:
            raise raised
    monkeypatch.setattr(C, "run", run)
    assert C.main([]) == code
    assert re.fullmatch(f"coreg.py: {said}\n" if said else "", capsys.readouterr().err)

@pytest.mark.parametrize("argv, code, text", [
    ("--help --dataset fmnist", 0, "epochs in all (default: 100)"),
    ("--epoch 3", 2, "did you mean --epochs?"),
    ("--annotator flip --output-dir plain/run", 2, "cannot write plain/run")])
def test_script_returns_the_exit_code(argv, code, text, tmp_path):
    write(Path("plain"), "a file, not a folder")
    done = subprocess.run([sys.executable, C.__file__, *argv.split()], capture_output=True,
                          text=True)
    assert done.returncode == code and text in (done.stderr if code else done.stdout)
    assert done.stderr.count("\n") == bool(code)
    assert [path.name for path in tmp_path.rglob("*")] == ["plain"]

@pytest.mark.parametrize("cuda, mps, best", [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_pick_device_prefers_cuda_then_mps(cuda, mps, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda n, device: SimpleNamespace(
        device=SimpleNamespace(type=device), item=int, is_cuda=False))
    assert (C.pick_device("auto").type, C.pick_device("cpu").type) == (best, "cpu")

def test_choose_folder_counts_up_to_a_free_name():
    cfg = C.parse([])
    assert C.choose_folder(cfg) == Path("runs/digits") and not Path("runs").exists()
    for taken, free in (("runs/digits", "runs/digits-2"), ("runs/digits-2", "runs/digits-3")):
        write(Path(taken, "config.json"), "{}")
        assert C.choose_folder(cfg) == Path(free)
    assert C.choose_folder(C.parse(["--overwrite"])) == Path("runs/digits-3")  # no name: no harm
    assert C.choose_folder(C.parse(["--dataset", "svhn"])) == Path("runs/svhn")

def test_choose_folder_keeps_a_named_run_without_overwrite():
    argv = ["--output-dir", "mine"]
    assert C.choose_folder(C.parse(argv)) == Path("mine")
    write(Path("mine/config.json"), "{}")
    with pytest.raises(C.CoregError, match="^--output-dir: mine holds a run.*--overwrite"):
        C.choose_folder(C.parse(argv))
    assert C.choose_folder(C.parse([*argv, "--overwrite"])) == Path("mine")

# The user's own images, and anybody's annotations ---------------------------------------------

RED, GREEN = (250, 10, 20), (15, 240, 30)

def save_image(mode, path):
    """Two pixels wide per colour, red left of green, in the mode that the name says."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    options = {}
    if mode == "16 bit":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "EXIF":
        image = image.transpose(Image.Transpose.ROTATE_90)
        image.getexif()[0x0112] = 6  # stored turned to the left: to be shown turned to the right
        options = dict(exif=image.getexif())
    elif mode == "alpha":
        image.putalpha(Image.new("L", image.size, 255))
        image.paste((0, 0, 0, 0), (16, 0, 32, 16))
    elif mode == "palette":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    elif mode == "clear palette":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        options = dict(transparency=image.getpixel((31, 0)))
    elif mode != "RGB":
        image = image.convert(mode, dither=Image.Dither.NONE)
    image.save(path, **options)

@pytest.mark.parametrize("mode, suffix, left, right", [
    ("RGB", "png", RED, GREEN), ("RGB", "bmp", RED, GREEN), ("RGB", "webp", RED, GREEN),
    ("RGB", "jpg", RED, GREEN), ("L", "jpg", (83,) * 3, (149,) * 3), ("CMYK", "jpg", RED, GREEN),
    ("L", "png", (83,) * 3, (149,) * 3), ("16 bit", "png", (83,) * 3, (149,) * 3),
    ("1", "png", (0,) * 3, (255,) * 3), ("LA", "png", (83,) * 3, (149,) * 3),
    ("palette", "png", RED, GREEN), ("clear palette", "png", RED, (255,) * 3),
    ("alpha", "png", RED, (255,) * 3), ("EXIF", "jpg", RED, GREEN)])
def test_open_image_modes(tmp_path, mode, suffix, left, right):
    save_image(mode, tmp_path / f"x.{suffix}")
    image = C.open_image(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB" and image.size == (32, 16)
    slack = 8 if suffix in ("jpg", "webp") else 1  # lossy compression
    mean = np.asarray(image, float).reshape(16, 2, 16, 3).mean((0, 2))
    assert np.abs(mean - [left, right]).max() <= slack

def folder_config(root, *more):
    return C.parse(["--dataset", "folder", "--data-dir", str(root), *more])

@pytest.fixture
def tree(tmp_path):
    for name in ("train/b/2.JPG", "train/a cat/ü 1.png", "train/a cat/deep/er/3.bmp",
                 "train/0.webp", "test/b/x.png", "test/a cat/y.png", "test/readme.png"):
        paint(tmp_path / name, RED)
    (tmp_path / "train" / "notes.txt").write_text("no image")
    return tmp_path

def test_read_dataset_folder(tree):
    train, test, classes = C.read_dataset(folder_config(tree))
    paths = [str(path.relative_to(tree)) for path in train.dataset.paths]
    assert paths == ["train/0.webp", "train/a cat/deep/er/3.bmp", "train/a cat/ü 1.png",
                     "train/b/2.JPG"]
    assert classes == ["a cat", "b"] and [label for _, label in train] == [None] * 4
    assert [label for _, label in test] == [0, 1]  # test/readme.png lies in no class
    assert all(image.mode == "RGB" for image, _ in train)

@pytest.mark.parametrize("as_file", [False, True])
def test_read_dataset_folder_class_list(tree, as_file):
    names = ["b", "zebra_crossing", "a cat"]
    (tree / "names.txt").write_text("\n".join(names) + "\n\n")
    option = str(tree / "names.txt") if as_file else ", ".join(names)
    _, test, classes = C.read_dataset(folder_config(tree, "--classes", option))
    assert classes == ["b", "zebra crossing", "a cat"] and [label for _, label in test] == [2, 0]

def test_read_dataset_folder_without_train(tree):
    """All below the folder but test/; then --classes is needed."""
    cfg = folder_config(tree / "train", "--classes", "x,y")
    train, test, _ = C.read_dataset(cfg)
    assert len(train) == 4 and len(test) == 0
    (tree / "train").rename(tree / "more")
    train, test, _ = C.read_dataset(folder_config(tree, "--classes", "b,a cat"))
    assert len(train) == 4 and len(test) == 2
    with pytest.raises(C.CoregError, match="--classes: expected two or more"):
        C.read_dataset(folder_config(tree))

@pytest.mark.parametrize("classes", ["one", "a,a", "a,,b", "", "a_b,a b"])
def test_read_dataset_folder_bad_classes(tree, classes):
    (tree / "train").rename(tree / "more")
    with pytest.raises(C.CoregError, match="--classes: expected two or more"):
        C.read_dataset(folder_config(tree, "--classes", classes))

def test_read_dataset_folder_errors(tree):
    with pytest.raises(C.CoregError, match=r"expected names out of \['b', 'c'\], got \['a cat'\]"):
        C.read_dataset(folder_config(tree, "--classes", "b,c"))
    with pytest.raises(C.CoregError, match="got 0 images"):
        C.read_dataset(folder_config(tree / "nowhere", "--classes", "b,c"))

def test_read_images_skips_broken_ones(tree, capsys):
    whole = (tree / "train/0.webp").read_bytes()
    (tree / "train/1.webp").write_bytes(whole[:len(whole) // 2])
    for i in range(2, 8):
        (tree / f"train/{i}.png").write_bytes(b"junk")
    cfg = folder_config(tree, "--image-size", "8")
    train, test, _ = C.read_dataset(cfg)
    images, labels, kept, names = C.read_images(train, cfg, "read")
    error = capsys.readouterr().err
    assert "7 of 11" in error and error.count("train/") == 5 and "1.webp" in error
    assert images.shape == (4, 3, 8, 8) and labels is None and len(kept) == 4
    expected = [C.to_square(image, 8, 3) for image, _ in kept]
    assert torch.equal(images, torch.stack(expected)) and names[0].endswith("0.webp")
    test_images, test_labels, *_ = C.read_images(test, cfg, "read")
    assert len(test_images) == 2 and test_labels.tolist() == [0, 1]

def test_read_images_decodes_once(tree, monkeypatch):
    cfg = folder_config(tree, "--image-size", "8")
    pairs = C.read_dataset(cfg)[0]
    first = C.read_images(pairs, cfg, "read")
    with monkeypatch.context() as patch:
        patch.setattr(C, "open_image", None)  # not called again
        again = C.read_images(pairs, cfg, "read")
    assert torch.equal(first[0], again[0]) and first[3] == again[3]
    paint(tree / "train/b/2.JPG", GREEN, (20, 20))  # another size and time: all is read anew
    changed = C.read_images(pairs, cfg, "read")
    assert torch.equal(first[0][:3], changed[0][:3]) and not torch.equal(first[0][3], changed[0][3])
    (next((tree / "annotations").glob("*.json"))).write_text("[cut")
    for path in (tree / "annotations").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(C.read_images(pairs, cfg, "read")[0], changed[0])

def test_read_images_all_broken(tree, capsys):
    """Nothing readable in a whole batch, and a link to nowhere: named or left out, no traceback."""
    for path in C.find_images(tree / "train"):
        path.write_bytes(b"broken")
    (tree / "train" / "gone.png").symlink_to(tree / "nowhere.png")
    cfg = folder_config(tree)
    images, *_ = C.read_images(C.read_dataset(cfg)[0], cfg, "read")
    assert len(images) == 0 and "cannot be read" in capsys.readouterr().err

def test_read_images_cache_knows_the_order_of_the_classes(tree):
    def labels(*more):
        cfg = folder_config(tree, *more)
        return C.read_images(C.read_dataset(cfg)[1], cfg, "read")[1].tolist()
    names = tree / "names.txt"
    names.write_text("a cat\nb")
    first = labels("--classes", str(names))
    names.write_text("b\na cat")
    assert labels("--classes", str(names)) == [1 - label for label in first]

def test_on_device_leaves_large_images_in_place(monkeypatch):
    images, device = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.device("meta")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    class Cuda:
        type = "cuda"
    free = 4 * images.nbytes - 4
    assert C.on_device(images, Cuda()) is images
    assert C.on_device(images, torch.device("cpu")) is images
    assert C.on_device(images, device).device.type == "meta"

def annotations(tmp_path, n=4, k=3, rule="multi_prompt", **arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    cfg = C.Config(candidates=rule, top_k=2)
    return C.read_annotations(str(tmp_path / "x.npz"), n, k, cfg)

def test_read_annotations_candidates(tmp_path, capsys):
    sets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    candidates, shares = annotations(tmp_path, candidates=sets)
    assert candidates.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(shares[1], torch.tensor([0.5, 0.5, 0]))
    assert "1 images have no label" in capsys.readouterr().out and candidates.dtype == torch.bool

def test_read_annotations_votes(tmp_path):
    votes = np.array([[0, 1, -1, 2], [0, 2, -1, 2], [1, -1, -1, 2]])  # [T=3,N=4]
    candidates, shares = annotations(tmp_path, votes=votes)
    assert candidates.tolist() == [[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]]
    torch.testing.assert_close(shares[0], torch.tensor([2 / 3, 1 / 3, 0]))
    single, _ = annotations(tmp_path, votes=votes, rule="argmax")
    assert single[[0, 3]].tolist() == [[1, 0, 0], [0, 0, 1]] and single.sum().item() == 4

def test_read_annotations_probs(tmp_path):
    probs = torch.rand(5, 4, 3).softmax(2)
    candidates, shares = annotations(tmp_path, probs=probs.half().numpy())
    assert torch.equal(candidates, C.candidate_sets(probs.half()))
    torch.testing.assert_close(shares, probs.mean(0), atol=1e-3, rtol=0)
    top, _ = annotations(tmp_path, probs=probs.half().numpy(), rule="top_k")
    assert (top.sum(1) == 2).all()

@pytest.mark.parametrize("arrays, words", [
    (dict(wrong=np.ones((4, 3), bool)), "candidates"),
    (dict(candidates=np.ones((5, 3), bool)), r"expected \[4, 3\].*got \[5, 3\]"),
    (dict(probs=np.ones((2, 4, 4)) / 4), r"got \[2, 4, 4\]"),
    (dict(probs=np.full((2, 4, 3), np.nan)), "numbers from 0 to 1"),
    (dict(probs=-np.ones((2, 4, 3))), "numbers from 0 to 1"),
    (dict(votes=np.full((2, 4), 3)), "numbers from -1 to 2"),
    (dict(votes=np.full((2, 4), 0.5)), "numbers from -1 to 2"),
    (dict(votes=np.zeros((0, 4), int)), "expected"),
    (dict(candidates=np.array([[None] * 3] * 4)), "npz")])
def test_read_annotations_errors(tmp_path, arrays, words):
    with pytest.raises(C.CoregError, match="--annotations.*" + words):
        annotations(tmp_path, **arrays)

@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_read_annotations_no_npz(tmp_path, content):
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(C.CoregError, match="--annotations.*x.npz"):
        C.read_annotations(str(tmp_path / "x.npz"), 4, 3, C.Config())

@pytest.mark.parametrize("content, good", [
    ("a {}\n\n {} !\n", ["a {}", "{} !"]), ("none", None), ("", None), ("{} and {}", None),
    ("{name}", None), ("{0}", None)])
def test_load_templates_file(tmp_path, content, good):
    (tmp_path / "t.txt").write_text(content)
    cfg = C.Config(dataset="folder", annotator="clip", templates=str(tmp_path / "t.txt"))
    if good:
        assert C.load_templates(cfg) == good
    else:
        with pytest.raises(C.CoregError, match="--templates: expected one of small, digits"):
            C.load_templates(cfg)

def pictures(n, channels=3, side=16):
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8)

def views_of(kind, images):
    return C.Views(kind, *C.channel_statistics(images))

def picked(sets):
    """Bool [N,K] -> the classes in each set."""
    return [row.nonzero()[:, 0].tolist() for row in sets]

# Candidate sets ----------------------------------------------------------------------------------

PROBS = torch.tensor([  # [T=3,N=3,K=4] in eighths; means * 24: 11 9 4 0, 1 7 6 10, 5 9 6 4
    [[4, 3, 1, 0], [0, 2, 2, 4], [4, 3, 1, 0]],
    [[3, 4, 1, 0], [0, 1, 3, 4], [1, 3, 4, 0]],
    [[4, 2, 2, 0], [1, 4, 1, 2], [0, 3, 1, 4]]]) / 8

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("settings, expected", [
    (dict(), [[0, 1], [1, 3], [0, 2, 3]]),
    (dict(mode="argmax"), [[0], [3], [1]]),  # the last is no single template's first choice
    (dict(mode="top_k", top_k=2), [[0, 1], [1, 3], [1, 2]]),
    (dict(mode="top_k", top_k=3), [[0, 1, 2], [1, 2, 3], [0, 1, 2]]),
    (dict(mode="top_k"), [[0, 1, 2, 3]] * 3),  # top_k=5 of 4 classes
    (dict(mode="ratio"), [[0, 1], [1, 2, 3], [0, 1, 2]]),
    (dict(mode="ratio", ratio=0.65), [[0, 1], [1, 3], [1, 2]]),
    (dict(mode="ratio", top_k=2), [[0, 1], [1, 3], [1, 2]]),
    (dict(mode="ratio", ratio=1), [[0], [3], [1]]),
    (dict(mode="ratio", ratio=0), [[0, 1, 2, 3]] * 3)])
def test_candidate_sets_by_hand(settings, expected, dtype):
    assert picked(C.candidate_sets(PROBS.to(dtype), **settings)) == expected

@pytest.mark.parametrize("mode", ["multi_prompt", "argmax", "top_k", "ratio"])
def test_candidate_sets_order_of_templates_and_classes(mode):
    probs = (3 * torch.randn(5, 40, 7)).softmax(2)
    sets, classes = C.candidate_sets(probs, mode, 3), torch.randperm(7)
    assert torch.equal(C.candidate_sets(probs[torch.randperm(5)], mode, 3), sets)
    assert torch.equal(C.candidate_sets(probs[..., classes], mode, 3), sets[:, classes])
    assert sets.any(1).all() and sets.dtype == torch.bool

def test_candidate_sets_means_float16_in_float32():
    probs = torch.full((400, 1, 2), 0.5).half()
    probs[0, 0, 1] += 2 ** -11  # the sum, 200, has steps of 1/8 in half precision
    assert picked(C.candidate_sets(probs, "argmax")) == [[1]]

def test_candidate_sets_unknown_mode_error():
    with pytest.raises(ValueError, match="multi_prompt, argmax, top_k or ratio, got 'topk'"):
        C.candidate_sets(PROBS, "topk")

@pytest.mark.parametrize("partial_rate, noise_rate", [(0, 0), (0.3, 0), (0.3, 0.2), (0.1, 1)])
def test_flip_candidates_rates(partial_rate, noise_rate):
    labels = torch.arange(20_000) % 10
    true = F.one_hot(labels, 10).bool()
    sets = C.flip_candidates(labels, 10, partial_rate, noise_rate)
    kept, wrong = sets[true], sets.sum(1) - sets[true].int()
    assert abs(kept.float().mean() - (1 - noise_rate)) < 0.01
    if kept.any():
        assert abs(wrong[kept].float().mean() / 9 - partial_rate) < 0.01
    if noise_rate:  # the label that was swapped in stands beside those that joined
        assert abs((wrong[~kept].float().mean() - 1) / 9 - partial_rate) < 0.01

def test_flip_candidates_swaps_for_each_other_label_alike():
    sets = C.flip_candidates(torch.full((9000,), 4), 10, 0, 1)
    alike = torch.tensor([1000] * 4 + [0] + [1000] * 5)
    assert (sets.sum(1) == 1).all() and sets[:, 4].sum() == 0
    assert (sets.sum(0) - alike).abs().max() < 120

@pytest.mark.parametrize("num_classes, rates, expected", [
    (3, (1, 1), [[0, 1, 2]] * 2), (2, (0, 1), [[1], [0]]), (3, (0, 0), [[0], [1]])])
def test_flip_candidates_by_hand(num_classes, rates, expected):
    assert picked(C.flip_candidates(torch.tensor([0, 1]), num_classes, *rates)) == expected

def test_flip_candidates_generator_decides_alone():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return C.flip_candidates(torch.arange(50) % 5, 5, 0.4, 0.4, generator)
    first, _ = draw(1), torch.rand(1)
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)

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

def test_annotate_loop(small_clip):
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
    torch.testing.assert_close(probs.float(), expected, atol=1e-3, rtol=0)  # float16: 11 bits

def test_load_clip_takes_the_values_of_the_file(small_clip):
    from_file, _, path = small_clip
    model, preprocess, tokenizer = C.load_clip(
        C.Config(clip_model="small-clip", clip_pretrained=str(path)), "cpu")
    assert not model.training and tokenizer(NAMES).shape == (3, 16)
    assert all(torch.equal(v, from_file.state_dict()[k]) for k, v in model.state_dict().items())
    white = preprocess(Image.new("L", (40, 20), 255))  # (1 - mean) / deviation, of OpenAI's images
    assert white.shape == (3, 16, 16) and abs(white[0].mean() - (1 - 0.4815) / 0.2686) < 1e-3
    image = TF.to_pil_image(pictures(1, 3, 40)[0])
    assert torch.equal(preprocess(image), preprocess(image))  # not the random crops of training

def test_load_clip_wrong_file_error_in_one_line(small_clip, tmp_path, capsys):
    path = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    flags = ["--annotator", "clip", "--clip-model", "small-clip", "--clip-pretrained", str(path)]
    assert C.main([*flags, "--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith(f"coreg.py: {' '.join(flags[2:])} did not load: expected a file made")
    assert "Missing key(s) in state_dict" in line

def test_load_clip_unknown_name_error_names_a_near_one():
    with pytest.raises(C.CoregError, match="or another model, as .'ViT-B-32-quickgelu'"):
        C.load_clip(C.Config(clip_model="ViT-B32-quickgelu"), "cpu")

def test_load_clip_without_net_error_names_the_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no net")
    monkeypatch.setattr("open_clip.create_model_and_transforms", offline)
    with pytest.raises(C.CoregError, match=r"download huggingface.co/timm/[\w.]+openai/open_clip_"
                       r"model.safetensors and .* --clip-pretrained \(OSError: no net\)"):
        C.load_clip(C.Config(), "cpu")

# TinyCLIP ----------------------------------------------------------------------------------------

GLYPHS = C.draw_glyphs()

def bars(*rows):
    """Glyphs of horizontal bars instead of digits."""
    glyphs = torch.zeros(20, 1, 64, 64)
    for row in rows:
        glyphs[:, :, row:row + 6, 8:56] = 1
    return glyphs

def traits(images):
    """What the captions speak of, measured on images [B,1,8,8]: {name: [B]}."""
    ink, place = images[:, 0], torch.arange(8.) - 3.5
    total, rows, columns = ink.sum((1, 2)), ink.sum(2), ink.sum(1)
    x, y = columns @ place / total, rows @ place / total
    xx, xy = columns @ place ** 2 / total - x ** 2, place @ (ink @ place).T / total - x * y
    line = y[:, None] + (xy / xx)[:, None] * (place - x[:, None])  # the straight line of best fit
    off_line = (place @ ink / columns.clamp_min(1e-3) - line) ** 2 * columns
    return dict(ink=total, width=xx, height=y, lean=xy.abs(), bent=off_line.sum(1) / total,
                edge=ink.diff(dim=2).abs().amax((1, 2)))

def test_draw_glyphs_twenty_upright_digits():
    ink = GLYPHS[:, 0] > 0
    assert GLYPHS.shape == (20, 1, 64, 64) and GLYPHS.min() == 0 and GLYPHS.max() == 1
    assert (ink.any(2) == torch.tensor([False] * 6 + [True] * 52 + [False] * 6)).all()
    assert 15 < ink.any(1).sum(1).min() and ink.any(1).sum(1).max() < 60
    others = torch.cdist(GLYPHS.flatten(1), GLYPHS.flatten(1)) + 99 * torch.eye(20)
    assert others.min() > 5  # no two alike

def test_render_glyphs_shapes_and_shares():
    images, true = C.render_glyphs(GLYPHS, torch.arange(3000) % 10)
    assert images.shape == (3000, 1, 8, 8) and true.shape == (3000, len(C.TEMPLATES["digits"]))
    assert images.min() == 0 and (images.amax((1, 2, 3)) == 1).all()
    ink = images[:, 0] > 0.1  # the box around the ink fills the height
    assert ink.any(2)[:, [0, 7]].float().mean() > 0.95
    expected = [.35, 1 / 3, 1 / 3, .25, .25, .375, .32, .3, .25, .2, .2, .5]  # uniform ranges
    torch.testing.assert_close(true.mean(0), torch.tensor(expected), atol=0.04, rtol=0)
    assert (true[:, 0] == true[0, 0]).all() and ((true[:, 1:] == 0) | (true[:, 1:] == 1)).all()
    for one, other in ((1, 2), (3, 4), (9, 10)):  # bold and thin, narrow and wide, top and bottom
        assert (true[:, one] * true[:, other]).sum() == 0

@pytest.mark.parametrize("caption, glyphs, trait, sign", [
    ("bold", GLYPHS, "ink", 1), ("thin", GLYPHS, "ink", -1), ("narrow", GLYPHS, "width", -1),
    ("wide", GLYPHS, "width", 1), ("slanted", GLYPHS, "lean", 1), ("rotated", bars(29), "lean", 1),
    ("wobbly", bars(29), "bent", 1), ("blurry", GLYPHS, "edge", -1),
    ("top-heavy", bars(6, 29, 52), "height", -1), ("bottom-heavy", bars(6, 29, 52), "height", 1)])
def test_render_glyphs_captions_are_true(caption, glyphs, trait, sign):
    """The mean of the trait under the caption is half a deviation away from the rest."""
    [column] = [t for t, text in enumerate(C.TEMPLATES["digits"]) if caption in text]
    images, true = C.render_glyphs(glyphs, torch.arange(2000) % 10)
    values, said = traits(images)[trait], true[:, column] == 1
    assert sign * (values[said].mean() - values[~said].mean()) > 0.5 * values.std()

def test_render_glyphs_class_and_font():
    only = torch.zeros_like(GLYPHS)
    only[13] = GLYPHS[13]  # a three in the bitmap font
    images, true = C.render_glyphs(only, torch.arange(400) % 10)
    pixelated = true[:, C.TEMPLATES["digits"].index("a pixelated number {}.")] == 1
    assert torch.equal(images.sum((1, 2, 3)) > 0, pixelated & (torch.arange(400) % 10 == 3))
    assert images.isfinite().all()  # where nothing is drawn too

@pytest.mark.parametrize("value, expected", [(0, -1.0), (255, 1.0), (51, -0.6)])
def test_tiny_preprocess_by_hand(value, expected):
    image = C.tiny_preprocess(Image.new("RGB", (30, 20), (value,) * 3))
    torch.testing.assert_close(image, torch.full((1, 8, 8), expected))

def few_steps(monkeypatch, steps, batch):
    for name, value in dict(TINY_STEPS=steps, TINY_BATCH=batch).items():
        monkeypatch.setattr(C, name, value)

def test_load_tiny_trains_once(monkeypatch, tmp_path, capsys):
    few_steps(monkeypatch, 3, 8)
    train, runs = C.pretrain_tiny, []
    monkeypatch.setattr(C, "pretrain_tiny", lambda *args: runs.append(train(*args)))
    def load():
        model, preprocess, tokenizer = C.load_tiny(tmp_path / "new", "cpu")
        assert not model.training and preprocess is C.tiny_preprocess
        assert tokenizer(["a bold number seven."]).shape == (1, 12)
        return model.state_dict()
    def same(one, other): return all(torch.equal(v, other[k]) for k, v in one.items())
    first = load()
    assert "24 rendered digits" in capsys.readouterr().out
    [path] = (tmp_path / "new").iterdir()
    assert same(first, torch.load(path)) and len(runs) == 1
    torch.rand(3)
    assert same(first, load()) and len(runs) == 1  # from the file
    path.write_bytes(b"cut off")
    assert same(first, load()) and len(runs) == 2  # anew, from the same seed
    assert same(first, torch.load(path))
    few_steps(monkeypatch, 4, 8)
    assert not same(first, load()) and len(runs) == 3  # another recipe, another file

def test_pretrain_tiny_learns_the_digits(monkeypatch, tmp_path):
    few_steps(monkeypatch, 100, 64)
    model, _, tokenizer = C.load_tiny(tmp_path, "cpu")
    classes = torch.arange(500) % 10
    batches = [(2 * C.render_glyphs(GLYPHS, classes)[0] - 1, None)]
    probs = C.annotate(model, tokenizer, batches, C.DIGITS, C.TEMPLATES["digits"], "cpu")
    assert C.accuracy(probs.float().mean(0), classes) > 40  # by chance: 10

def test_write_atomically_failure_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.bin"
    C.write_atomically(path, b"old")
    real = C.Path.write_bytes
    def fail(self, content):
        real(self, content[:5])
        raise OSError("disk full")
    with monkeypatch.context() as patch:
        patch.setattr(C.Path, "write_bytes", fail)
        with pytest.raises(OSError, match="disk full"):
            C.write_atomically(path, b"new, but not the whole")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    C.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]

# The operations of RandAugment, against Pillow ---------------------------------------------------

def affine(coefficients):
    """Pillow's map of output to input pixels; coefficients(v, side) with v in -0.3..0.3."""
    return lambda image, u: image.transform(
        image.size, Image.Transform.AFFINE, coefficients(0.6 * u - 0.3, image.width))

def enhance(kind):
    return lambda image, u: kind(image).enhance(0.05 + 0.9 * u)

PILLOW = {  # name: the operation on one image, greatest difference in 255ths, share of exceptions
    "identity": (lambda image, u: image, 0, 0),
    "autocontrast": (lambda image, u: ImageOps.autocontrast(image), 1, 0),  # Pillow rounds down
    "equalize": (lambda image, u: ImageOps.equalize(image), 0, 0),
    "brightness": (enhance(ImageEnhance.Brightness), 1, 0),  # rounds down
    "color": (enhance(ImageEnhance.Color), 1.5, 0),  # and has a rounded grey
    "contrast": (enhance(ImageEnhance.Contrast), 1.5, 0),  # the same
    "sharpness": (enhance(ImageEnhance.Sharpness), 1.5, 0),  # and has a rounded blur
    "posterize": (lambda image, u: ImageOps.posterize(image, 4 + int(5 * u)), 0, 0),
    "solarize": (lambda image, u: ImageOps.solarize(image, 256 * u), 0, 0),
    # Nearest neighbours: a point halfway between two pixels may fall to either.
    "rotate": (lambda image, u: image.rotate(60 * u - 30), 0, 0.02),
    "shear_x": (affine(lambda v, side: (1, v, 0, 0, 1, 0)), 0, 0.02),
    "shear_y": (affine(lambda v, side: (1, 0, 0, v, 1, 0)), 0, 0.02),
    "translate_x": (affine(lambda v, side: (1, 0, v * side, 0, 1, 0)), 0, 0.02),
    "translate_y": (affine(lambda v, side: (1, 0, 0, 0, 1, v * side)), 0, 0.02)}

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PILLOW)
def test_operations_pillow(name, channels):
    images = pictures(7, channels, 31) // 2 + 40  # 40..167: autocontrast has something to do
    u, floats = torch.tensor([0, 0.12, 0.31, 0.5, 0.61, 0.87, 0.999]), images / 255
    got = C.OPERATIONS[name](floats, u) * 255
    assert torch.equal(floats, images / 255)  # not changed in place
    operation, tolerance, exceptions = PILLOW[name]
    for image, strength, one in zip(images, u.tolist(), got):
        expected = TF.pil_to_tensor(operation(TF.to_pil_image(image), strength))
        far = (one - expected).abs() > tolerance + 1e-3
        assert far.float().mean() <= exceptions

def test_random_operation_loop():
    images = pictures(300) / 255
    torch.manual_seed(1)
    got = C.random_operation(images)
    torch.manual_seed(1)
    choice, strength = torch.randint(14, (300,)), torch.rand(300)
    assert list(C.OPERATIONS) == list(PILLOW) and len(choice.unique()) == 14
    assert got.isfinite().all() and got.min() >= 0 and got.max() <= 1
    operations = list(C.OPERATIONS.values())
    for i, one in enumerate(got):
        expected = operations[choice[i]](images[i:i + 1], strength[i:i + 1]).clamp(0, 1)[0]
        torch.testing.assert_close(one, expected)

def test_random_operation_one_each_and_clamped(monkeypatch):
    operations = {str(add): lambda x, u, add=add: x + add for add in (0.25, 0.5, 7, -7)}
    monkeypatch.setattr(C, "OPERATIONS", operations)
    values, counts = C.random_operation(torch.zeros(4000, 1, 1, 1)).unique(return_counts=True)
    assert values.tolist() == [0, 0.25, 0.5, 1] and (counts - 1000).abs().max() < 120

# Geometry ----------------------------------------------------------------------------------------

def windows(image, padding):
    """All that a random crop of one image [C,S,S] may show: {bytes: (row, column, mirrored)}."""
    side = image.shape[-1]
    padded = np.pad(image.numpy(), [(0, 0), (padding, padding), (padding, padding)])
    cuts = {}
    for row, column in itertools.product(range(2 * padding + 1), repeat=2):
        cut = padded[:, row:row + side, column:column + side]
        cuts[cut.tobytes()] = row, column, False
        cuts[cut[:, :, ::-1].tobytes()] = row, column, True
    return cuts

@pytest.mark.parametrize("flip", [True, False])
def test_random_crop_windows(flip):
    images = pictures(3, 2, 8)
    cuts = [windows(image, 2) for image in images]
    got = (C.random_crop(images.repeat(300, 1, 1, 1) / 255, 2, flip) * 255).round().byte()
    found = Counter(cuts[i % 3].get(one.numpy().tobytes()) for i, one in enumerate(got))
    assert None not in found  # each is a window of its own image
    assert len(found) == (50 if flip else 25) and max(found.values()) < 80 / (1 + flip)
    assert abs(sum(found[place] for place in found if place[2]) / 900 - 0.5 * flip) < 0.05

@pytest.mark.parametrize("mode, tolerance", [("nearest", 0), ("bilinear", 1e-5)])
@pytest.mark.parametrize("side", [7, 8])
def test_warp_identity_and_shift(mode, tolerance, side):
    images, step = torch.rand(3, 2, side, side), 2 / side  # one pixel, in -1..1
    x, y = torch.tensor([0, step, -step]), torch.tensor([0, 0, 2 * step])  # each its own
    got = C.warp(images, (1, 0, x, 0, 1, y), mode)
    expected = torch.stack([images[0], F.pad(images[1, :, :, 1:], (0, 1)),
                            F.pad(images[2, :, 2:, :-1], (1, 0, 0, 2))])
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)

def test_warp_bend_moves_single_pixels():
    images, bend = torch.rand(2, 1, 4, 4), torch.zeros(2, 4, 4, 2)
    bend[1, 0, 3] = torch.tensor([-1.0, 0.5])  # two pixels to the left, one down
    got = C.warp(images, (1, 0, 0, 0, 1, 0), bend=bend)
    images[1, 0, 0, 3] = images[1, 0, 1, 1]
    assert torch.equal(got, images)

@pytest.mark.parametrize("side", [7, 8])
def test_rotate_quarter_turns(side):
    images = torch.rand(4, 3, side, side)
    got = C.rotate(images, torch.arange(-1, 3) * torch.pi / 2)
    for turns, image, one in zip(range(-1, 3), images, got):
        assert torch.equal(one, image.rot90(turns, (1, 2)))  # counter-clockwise

def test_rotate_scale_and_shift_by_hand():
    images, none = torch.rand(2, 1, 4, 4), torch.zeros(2)
    large = C.rotate(images, none, scale=2)
    assert torch.equal(large, F.interpolate(images[:, :, 1:3, 1:3], scale_factor=2))
    moved = C.rotate(images, none, shift_x=0.5, shift_y=torch.tensor([0, -0.5]))
    assert torch.equal(moved[0], F.pad(images[0, :, :, 1:], (0, 1)))
    assert torch.equal(moved[1], F.pad(images[1, :, :3, 1:], (0, 1, 1, 0)))

def dot(n, side, right=0.0):
    """A soft dot `right` pixels from the centre: [n,1,S,S]."""
    place = torch.arange(float(side)) - (side - 1) / 2
    return (-(place[:, None] ** 2 + (place - right) ** 2) / 8).exp().expand(n, 1, -1, -1)

def centre(images):
    """The centre of mass (x, y) from the middle in pixels, and the mass, [B] each."""
    place, mass = torch.arange(float(images.shape[-1])), images.sum((1, 2, 3))
    place = place - place.mean()
    return images[:, 0].sum(1) @ place / mass, images[:, 0].sum(2) @ place / mass, mass

def spans(values, low, high):
    """Uniform in low..high: nothing outside, all parts reached, the mean in the middle."""
    margin = 0.03 * (high - low)
    assert abs(values.min() - low) < margin and abs(values.max() - high) < margin
    assert abs(values.mean() - (low + high) / 2) < 2 * margin

def test_random_affine_ranges():
    images = dot(600, 64, right=16.0)
    x, y, mass = centre(C.random_affine(images, turn=20, scale=0, shift=0))
    spans(torch.atan2(y, x).rad2deg(), -20, 20)
    assert (x.hypot(y) - 16).abs().max() < 0.1
    x, y, mass = centre(C.random_affine(images, turn=0, scale=0.15, shift=0))
    spans(x / 16, 0.85, 1.15)
    assert y.abs().max() < 0.01
    torch.testing.assert_close(mass / images[0].sum(), (x / 16) ** 2, atol=0.02, rtol=0)
    x, y, mass = centre(C.random_affine(dot(600, 64), turn=0, scale=0, shift=0.1))
    spans(x, -6.4, 6.4), spans(y, -6.4, 6.4)
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.12
    torch.testing.assert_close(C.random_affine(images, 0, 0, 0), images, atol=1e-4, rtol=0)

def squares(hit):
    """Bool [N,C,S,S] -> rows and columns [N,S] of what is hit, which must be full rectangles."""
    rows, columns = hit[:, 0].any(2), hit[:, 0].any(1)
    assert torch.equal(hit, (rows[:, :, None] & columns[:, None])[:, None].expand_as(hit))
    for line in (rows, columns):
        assert (F.pad(line, (1, 1)).int().diff().abs().sum(1) <= 2).all()  # one piece
    return rows, columns

def inside(rows, columns):
    """Sides [2,N] of those rectangles that touch no border."""
    whole = ~(rows | columns)[:, [0, -1]].any(1)
    return torch.stack([rows[whole].sum(1), columns[whole].sum(1)])

def test_cutout_grey_squares():
    images = torch.rand(20_000, 2, 16, 16)
    before = images.clone()
    got = C.cutout(images, 2, 6)
    assert torch.equal(images, before) and (got[got != before] == 0.5).all()
    lines = squares(got != before)
    height, width = inside(*lines)
    assert set(height.tolist()) == set(width.tolist()) == {2, 3, 4, 5, 6}
    assert (height - width).abs().max() == 1  # one length at two places: 3.5 may cover 3 or 4
    for line in lines:  # the centre is uniform in the image: pixel 8 is hit with mean length / 16
        assert abs(line[:, 8].float().mean() - 4 / 16) < 0.01
        assert abs(line[:, 0].float().mean() - 2.5 / 16) < 0.01  # at the border part is outside
    assert abs((lines[0] & lines[1])[:, 8].float().mean() - (16 + 16 / 12) / 256) < 0.01

# Views -------------------------------------------------------------------------------------------

KINDS = ["photo", "sign", "grey", "digit"]

def grey_values(views, normalised):
    """Views -> grey values 0..255."""
    return (normalised * views.std + views.mean) * 255

@pytest.mark.parametrize("kind", KINDS)
def test_views_plain_normalises(kind):
    images = pictures(50) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 3, 1, 1)
    views = views_of(kind, images)
    plain = views.plain(images)
    torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.std((0, 2, 3)), torch.ones(3))
    torch.testing.assert_close(grey_values(views, plain), images.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(views.plain(images / 255), plain)  # floats are in 0..1

def test_views_measures_a_sample_of_many_images():
    images = torch.zeros(30_000, 1, 1, 1, dtype=torch.uint8)
    images[::3] = torch.arange(10_000).view(-1, 1, 1, 1) % 2 * 255
    assert views_of("photo", images).mean.item() == 0.5

@pytest.mark.parametrize("kind, mirrored", [("photo", 0.5), ("sign", 0), ("grey", 0.5)])
def test_views_weak_crops_by_an_eighth(kind, mirrored):
    images = pictures(1).repeat(800, 1, 1, 1)
    views, cuts = views_of(kind, pictures(20)), windows(images[0], 2)
    got = [one.numpy().tobytes() for one in grey_values(views, views.weak(images)).round().byte()]
    assert len({cuts[one][:2] for one in got}) == 25
    assert abs(sum(cuts[one][2] for one in got) / 800 - mirrored) < 0.05

def test_views_digit_moves_and_turns(monkeypatch):
    views, images = views_of("digit", pictures(20, 1, 64)), (dot(600, 64, right=16) * 255).byte()
    x, y, mass = centre(grey_values(views, views.weak(images)))
    spans(x, 12, 20), spans(y, -4, 4)  # by up to 1/16 of 64; not turned, not scaled
    assert (mass / mass.mean() - 1).abs().max() < 0.02
    monkeypatch.setattr(C, "cutout", lambda images, low, high: images)
    x, y, mass = centre(grey_values(views, views.strong(images)))
    spans((mass / (images[0] / 1.0).sum()) ** 0.5, 0.85, 1.15)
    assert 22 < x.max() < 1.15 * (16 + 6.4)  # scale 1.15, shift 0.1 of 64
    assert 12 < y.abs().max() < 1.15 * (22.4 * 0.342 + 6.4 * 0.94)  # and a turn by 20 degrees

@pytest.mark.parametrize("kind, low, high", [
    ("photo", 0, 12), ("sign", 0, 12), ("grey", 16, 16), ("digit", 0, 8)])
def test_views_strong_cutout_on_black(kind, low, high):
    """No other step of a strong view changes black images, so that the square shows alone."""
    views = views_of(kind, pictures(20, 3, 24))
    got = grey_values(views, views.strong(torch.zeros(3000, 3, 24, 24, dtype=torch.uint8)))
    hit = got > 1
    torch.testing.assert_close(got[hit], torch.full_like(got[hit], 127.5))
    sides = inside(*squares(hit))
    assert (sides.min(), sides.max()) == (low, high)

@pytest.mark.parametrize("kind, low, high", [("photo", .3, .5), ("sign", .3, .5), ("grey", 0, 0)])
def test_views_strong_operation(kind, low, high):
    """Of one bright value, crop and cutout make no values but black, that value and grey."""
    images = torch.full((1000, 1, 24, 24), 204, dtype=torch.uint8)
    views = views_of(kind, pictures(20, 1, 24))
    got = grey_values(views, views.strong(images))
    new = torch.stack([(got - value).abs() > 0.01 for value in (0, 127.5, 204)]).all(0)
    assert (got < 0.01).any((1, 2, 3)).float().mean() > 0.8  # black from the crop
    assert low <= new.any((1, 2, 3)).float().mean() <= high  # 5 or 6 of 14 operations make more

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", ["weak", "strong"])
def test_views_seed_independence_and_input(kind, view):
    images = pictures(1).repeat(60, 1, 1, 1)
    before, make = images.clone(), getattr(views_of(kind, pictures(20)), view)
    torch.manual_seed(7)
    first, second = make(images), make(images)
    torch.manual_seed(7)
    assert torch.equal(make(images), first) and not torch.equal(first, second)
    assert torch.equal(images, before) and first.dtype == torch.float32
    assert len(first.flatten(1).unique(dim=0)) > 15  # one image, sixty views

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 77, 255])
def test_views_one_colour_stays_finite(kind, value):
    images = torch.full((40, 3, 16, 16), value, dtype=torch.uint8)
    views = views_of(kind, images)
    for made in (views.plain(images), views.weak(images), views.strong(images)):
        assert made.isfinite().all() and made.abs().max() <= 255.1
    assert views.plain(images).abs().max() < 1e-3

@pytest.mark.parametrize("kind", KINDS)
def test_views_empty_batch(kind):
    views, empty = views_of(kind, pictures(20)), pictures(0)
    for made in (views.plain(empty), views.weak(empty), views.strong(empty)):
        assert made.shape == (0, 3, 16, 16)

# Each view shifts the pixels by its own amount, so a value tells which view was taken.
VIEWS = SimpleNamespace(weak=lambda x: x + 1, strong=lambda x: x - 2, plain=lambda x: x + 3)
INF, NAN = math.inf, math.nan

def close(actual, expected, tol=1e-5):
    """Both are tensors, numbers or lists, with equal shapes and values."""
    actual, expected = (torch.as_tensor(x).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, check_dtype=False)

def config(**changes):
    return C.Config(**dict(dict(
        dataset="digits", channels=1, image_size=8, width=4, embedding_dim=5, batch_size=2,
        queue_size=7, lr=0.1, momentum=0.9, epochs=9, warm_up=1, start_contrastive=1, lambda_u=0.7,
        proto_weight=0.2, contrastive_weight=0.3, temperature=0.4), **changes))

class Linear(nn.Module):
    """Stands in for a network: 3 logits and 5-d embeddings, linear in 4 pixels; notes its calls."""
    def __init__(self, logits=None):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(4, 3) / 2 if logits is None else logits)
        self.z, self.calls = nn.Parameter(torch.randn(4, 5)), []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        return images.flatten(1) @ self.logits, F.normalize(images.flatten(1) @ self.z, dim=1)

def floats(n, side=2): return torch.randn(n, 1, side, side)
def probabilities(*shape): return torch.randn(*shape).softmax(-1)
def unit_rows(*shape): return F.normalize(torch.randn(*shape), dim=1)

# (4) CoRegNet, Learner

def test_CoRegNet_parameter_count_is_the_published_one():
    assert sum(p.numel() for p in C.CoRegNet(10).parameters()) == 11_499_594

@pytest.mark.parametrize("side, last", [(8, 1), (32, 4), (63, 8), (64, 4)])
def test_CoRegNet_shapes_for_any_side(side, last):
    net, images = C.CoRegNet(6, 3, side, 2, 5).eval(), torch.randn(2, 3, side, side)
    logits, embeddings = net(images)
    assert net.encoder[:-2](images).shape == (2, 16, last, last)  # before the mean over places
    assert net.encoder[:1](images).amin() == 0  # the stem ends in a ReLU
    assert logits.shape == (2, 6) and embeddings.shape == (2, 5)
    close(embeddings.norm(dim=1), torch.ones(2))

@pytest.mark.parametrize("output, other", [(0, "head"), (1, "fc")])
def test_CoRegNet_gradient_of_each_output_reaches_the_encoder_but_not_the_other(output, other):
    net = C.CoRegNet(3, 1, 8, 4, 5)
    out = net(floats(8, 8))[output]
    (out * torch.randn_like(out)).sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) if name.startswith(other) else p.grad.abs().sum() > 0

@pytest.mark.parametrize("sign, expected", [(1, [11, 2]), (-1, [3, 2])])
def test_PreActBlock_values_by_hand(sign, expected):
    block = C.PreActBlock(1, 1, 1).eval()  # fresh BatchNorm: adds its bias, here 1, and no more
    for conv, weight in ((block.conv1, sign), (block.conv2, 2)):
        nn.init.zeros_(conv.weight).data[0, 0, 1, 1] = weight  # multiplies by `weight`
    block.bn1.bias.data[:], block.bn2.bias.data[:] = 1, 1
    out = block(torch.tensor([2., -3.]).view(2, 1, 1, 1))  # a = 3, 0; 2 relu(1 + sign a) + a
    close(out.view(2), expected, 1e-4)

def test_Learner_starts_with_a_frozen_copy_and_an_empty_queue():
    own = C.Learner(C.CoRegNet(3, 1, 8, 4, 5), config())
    for p, q in zip(own.net.parameters(), own.key_net.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q and p.requires_grad and not q.requires_grad
    assert own.losses == [] and own.queue.size == 7 and own.queue.keys.shape == (0, 5)

def test_Learner_step_is_sgd_on_the_sum_of_the_terms():
    net = nn.Linear(2, 1, bias=False)
    own, w, velocity = C.Learner(net, config()), net.weight.detach().clone(), 0
    for _ in range(3):
        terms = own.step({"a": (net.weight ** 2).sum(), "b": 3 * net.weight.sum()})
        assert [*terms] == ["a", "b"] and not terms["a"].requires_grad
        close([*terms.values()], [(w ** 2).sum(), 3 * w.sum()])
        velocity = 0.9 * velocity + 2 * w + 3 + 5e-4 * w
        w = w - 0.1 * velocity
        close(net.weight, w, 1e-6)

# (5) warm-up

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

@pytest.mark.parametrize("n, sizes", [(9, [4, 5]), (8, [4, 4]), (10, [4, 4, 2]), (5, [5]), (1, [1]),
                                      (0, [0])])
def test_batches_hold_each_row_once_and_none_is_left_alone(n, sizes):
    rows = 10 * torch.arange(n)
    parts = C.batches(rows, 4)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts).sort().values, rows)
    assert n < 5 or not torch.equal(torch.cat(parts), torch.cat(C.batches(rows, 4)))  # shuffled

@pytest.mark.parametrize("soft", [False, True])
def test_warm_up_epoch_terms_cover_every_image_once(soft):
    own, images, sizes = C.Learner(Linear(), config(lr=1e-12)), floats(10), [4, 4, 2]  # 2B = 4
    sets = probabilities(10, 3) if soft else torch.eye(3).bool()[torch.arange(10) % 3]
    p = own.net.eval()(images - 2)[0].softmax(1)  # of the strong view
    expected = {"set": -(sets * p.log()).sum()} if soft else {
        "set": -((sets * p).sum(1) + 1e-5).log().sum(), "entropy": (p * p.log()).sum()}
    own.net.calls.clear()
    steps = list(C.warm_up_epoch(own, images, sets, VIEWS, config()))
    assert own.net.calls == [(size, True, True) for size in sizes]
    assert steps[0].keys() == expected.keys()
    for name, total in expected.items():
        close(sum(size * terms[name] for size, terms in zip(sizes, steps)), total)

def test_warm_up_epoch_learns():
    own, images, sets = C.Learner(Linear(), config()), floats(4), torch.eye(3)[[0, 0, 1, 2]]
    first, second = (next(C.warm_up_epoch(own, images, sets, VIEWS, config()))["set"] for _ in "12")
    assert second < first

# (6) split

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

def clean_oracle(history, seed=0):
    rows = history[-5:].clone()
    for row in rows:
        row[~row.isfinite()] = row[row.isfinite()].max()
        row.copy_((row - row.min()) / (row.max() - row.min()))
    values = rows.mean(0).numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    posterior = mixture.fit(values).predict_proba(values)
    return posterior[:, 0 if mixture.means_[0] < mixture.means_[1] else 1]

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epochs", [1, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_clean_probability_matches_loop_oracle(epochs, seed):
    groups = torch.cat([.3 * torch.randn(60), 1.2 + .5 * torch.randn(40)]).abs()
    history = (groups + 0.3 * torch.rand(epochs, 100)) * (1 + 9 * torch.rand(epochs, 1))
    history[-1, [3, 70]] = torch.tensor([INF, NAN])  # both count as the worst of their epoch
    close(C.clean_probability(history, seed=seed), clean_oracle(history, seed), 1e-3)

@pytest.mark.filterwarnings("ignore")
def test_clean_probability_stops_after_ten_rounds():
    history = torch.linspace(0, 1, 100)[None] ** 4  # it takes an eleventh to converge
    close(C.clean_probability(history), clean_oracle(history), 1e-3)

def test_clean_probability_averages_the_window():
    old, new = torch.tensor([0., 0, 0, 1, 1, 1]), torch.tensor([5., 5, 5, 5, 5, 25])
    prob = C.clean_probability(torch.stack([1 - old, old, old, new]), window=3)
    assert (prob > .5).tolist() == [True] * 3 + [False] * 3  # scaled means 0, 0, 0, 2/3, 2/3, 1

@pytest.mark.parametrize("losses", [[2.] * 6, [1.], [INF] * 4, [NAN, NAN], [3., INF]])
def test_clean_probability_zeros_where_no_mixture_fits(losses):
    assert C.clean_probability(torch.tensor([losses])).tolist() == [0.] * len(losses)

def test_split_data_aligns_with_the_mean_of_this_pass(monkeypatch):
    monkeypatch.setattr(C, "EVAL_BATCH", 3)
    own, images, prior = C.Learner(Linear(), config()), floats(20), torch.tensor([.5, .3, .2])
    own.losses = [torch.full((20,), float(i)) for i in range(5)]
    sets = torch.rand(20, 3) < .5
    sets[:, 0] |= ~sets.any(1)
    p = own.net(images + 1)[0].softmax(1)  # of the weak view
    own.net.train().calls.clear()
    probs, clean_prob = C.split_data(own, images, VIEWS, sets, prior, config())
    assert own.net.calls == [(3, False, False)] * 6 + [(2, False, False)]  # eval mode, no gradient
    aligned = p * prior / p.mean(0)
    aligned = aligned / aligned.sum(1, keepdim=True)
    close(probs, aligned)
    close(own.losses[-1], -(aligned * sets).amax(1).log())
    assert [x[0].item() for x in own.losses[:4]] == [1, 2, 3, 4] and len(own.losses) == 5
    close(clean_prob, C.clean_probability(torch.stack(own.losses), seed=0))

@pytest.mark.parametrize("n, batch_size, count, fallback", [
    (5, 2, 0, 2), (25, 9, 2, 3), (40, 9, 3, 4), (40, 9, 4, 0), (40, 2, 1, 4), (40, 2, 2, 0)])
def test_split_data_too_few_clean_takes_the_lowest_tenth(monkeypatch, capsys, n, batch_size, count,
                                                         fallback):
    given = torch.where(torch.arange(n) < count, .8, .5)  # exactly .5 is not clean
    monkeypatch.setattr(C, "clean_probability", lambda history, seed: given if seed == 3 else None)
    own = C.Learner(Linear(), config())
    _, clean_prob = C.split_data(own, floats(n), VIEWS, torch.eye(3)[torch.arange(n) % 3].bool(),
                                 torch.full((3,), 1 / 3), config(batch_size=batch_size, seed=3))
    lowest = own.losses[-1].argsort().argsort() < fallback
    assert torch.equal(clean_prob, lowest.float() if fallback else given)
    line = f"split: {count} clean samples are too few: the {fallback} of lowest loss count\n"
    assert capsys.readouterr().out == (line if fallback else "")

# (7) pseudo-labels, mixup, self-training

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
    inputs, targets = image(0., 4, 8), torch.eye(3)
    mixed, labels = C.mixup(inputs, targets, .75, torch.tensor([1, 2, 0]))
    close(mixed, image(1., 5, 6))
    close(labels, torch.tensor([[.75, .25, 0], [0, .75, .25], [.25, 0, .75]]))

@pytest.mark.parametrize("epoch, expected", [
    (0, 0), (10, 0), (10.5, 1 / 32), (18, .5), (26, 1), (99, 1)])
def test_ramp_up_by_hand(epoch, expected):
    assert C.ramp_up(epoch, 10) == expected
    assert C.ramp_up(10 + (epoch - 10) / 2, 10, length=8) == expected

def test_squared_error_by_hand():
    close(C.squared_error(torch.tensor([[.5, .5], [1, 0]]), torch.tensor([[1, 0], [.8, .2]])),
          (.25 + .25 + .04 + .04) / 4)
    assert C.squared_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0

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

# (8) prototypes

def prototype_oracle(prototypes, embeddings, classes, momentum):
    new = [list(row) for row in prototypes.tolist()]
    for z, k in zip(embeddings.tolist(), classes.tolist()):
        new[k] = [momentum * c + (1 - momentum) * x for c, x in zip(new[k], z)]
    return torch.tensor([[c / (math.hypot(*row) or 1) for c in row] for row in new])

@pytest.mark.parametrize("momentum", [0., .7, .999, 1.])
@pytest.mark.parametrize("size", [0, 1, 8])
def test_update_prototypes_matches_loop_oracle(momentum, size):
    old, z = unit_rows(4, 5), unit_rows(size, 5)
    old[2] = 0
    before, classes = old.clone(), torch.tensor([1, 2, 1, 0, 1, 2, 0, 1])[:size]
    close(C.update_prototypes(old, z, classes, momentum),
          prototype_oracle(old, z, classes, momentum))
    assert torch.equal(old, before)  # not in place

@pytest.mark.parametrize("num_u", [0, 2])
def test_prototype_loss_matches_loop_oracle(num_u):
    sim_x, a, b = torch.randn(3, 4, requires_grad=True), probabilities(3, 4), torch.eye(4)[:3]
    sim_u, c, d = torch.randn(num_u, 4), probabilities(num_u, 4), probabilities(num_u, 4)
    expected, q_x, q_u = 0, (sim_x / .3).softmax(1), (sim_u / .3).softmax(1)
    for share, x, u in ((.8, a, c), (.2, b, d)):
        for t, q in zip(x.flatten(), q_x.flatten()):
            expected += share * (t * (t / q).log() if t else 0) / 3
        for t, q in zip(u.flatten(), q_u.flatten()):
            expected += share * .5 * (t - q) ** 2 / 8
    loss = C.prototype_loss(sim_x, a, b, sim_u, c, d, .8, .3, .5)
    close(loss, expected)
    close(*(torch.autograd.grad(x, sim_x)[0] for x in (loss, expected)))

# (9) queue, contrast, one step

@pytest.mark.parametrize("sizes", [[3], [2, 2, 2], [5, 5], [3, 4, 1, 5, 2], [12], [3, 12, 2], [0]])
def test_MomentumQueue_holds_the_last_keys_with_class_and_flag(sizes):
    queue, pushed = C.MomentumQueue(5, 2), []
    for size in sizes:
        number = torch.arange(len(pushed), len(pushed) + size)
        pushed += number.tolist()
        keys = number.float()[:, None].repeat(1, 2).requires_grad_()
        queue.push(keys, number * 10, number % 3 == 0)
    assert sorted(queue.classes.tolist()) == [10 * i for i in pushed[-5:]]
    assert torch.equal(queue.keys, (queue.classes / 10)[:, None].repeat(1, 2))
    assert torch.equal(queue.clean, queue.classes % 30 == 0)
    assert not queue.keys.requires_grad

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

@pytest.mark.parametrize("column, one", [(2, math.log(2 + math.e) - 1), (0, 0.)])
def test_supcon_loss_by_hand(column, one):  # an anchor alone is no positive: it then adds nothing
    features = torch.tensor([[1., 0], [0, 1], [1, 0], [0, -1]])  # anchors 0, 1 and their keys 2, 3
    positives, none = torch.eye(4)[[column, 3]].bool(), torch.zeros(2, 4).bool()
    two = math.log(2 + math.exp(-1)) + 1
    close(C.supcon_loss(features, positives, none, 1.), (one + two) / 2)

def test_supcon_loss_never_negative_where_ignored_entries_dominate():
    features = F.normalize(torch.ones(200, 2) + 1e-3 * torch.randn(200, 2), dim=1).requires_grad_()
    classes, clean = torch.zeros(200, dtype=torch.long), torch.zeros(200, dtype=torch.bool)
    loss = C.supcon_loss(features, *C.contrastive_masks(classes, clean, 4), .07)
    loss.backward()
    close(loss, 0.)  # the own key is all that is left
    assert features.grad.isfinite().all()

def step_input(num_x=3, num_u=2, queued=4, side=2):
    """A queue that holds `queued` keys, and what co_training_terms takes after the networks."""
    queue, n = C.MomentumQueue(7, 5), 2 * (num_x + num_u)
    queue.push(unit_rows(queued, 5), torch.randint(3, (queued,)), torch.arange(queued) % 2 == 0)
    sets = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()[:num_x]
    return queue, (unit_rows(3, 5), floats(n, side), floats(n, side), sets, torch.rand(num_x),
                   probabilities(num_x, 3), .8, torch.arange(n).roll(3), .4)

def step_oracle(net, key_net, partner, queue, arguments, cfg):
    """One step, view by view -> terms, prototypes, key encoder, what the queue receives."""
    prototypes, weak, strong, sets, clean_prob, partner_probs, lam, order, weight_u = arguments
    sizes = [len(sets)] * 2 + [len(weak) // 2 - len(sets)] * 2
    (x_w1, x_w2, u_w1, u_w2), (x_s1, x_s2, u_s1, u_s2) = (v.split(sizes) for v in (weak, strong))
    def p(network, images): return network(images)[0].softmax(1).detach()
    y_x = C.refine_labels((p(net, x_w1) + p(net, x_w2)) / 2, partner_probs, sets, clean_prob, 0.4)
    y_u = C.guess_labels(torch.stack([p(net, u_w1), p(net, u_w2), p(partner, u_w1),
                                      p(partner, u_w2)]), 0.4)
    y, images = torch.cat([y_x, y_x, y_u, y_u]), torch.cat([x_s1, x_s2, u_s1, u_s2])
    logits, z = net(lam * images + (1 - lam) * images[order])
    mixed, n = lam * y + (1 - lam) * y[order], 2 * len(y_x)
    prototypes = prototype_oracle(prototypes, net(x_w1)[1], y_x.argmax(1), 0.9)
    sim, moved = z @ prototypes.T, Linear()
    for new, old, now in zip(moved.parameters(), key_net.parameters(), net.parameters()):
        new.data = 0.9 * old + 0.1 * now.detach()
    keys = torch.cat([moved(x_s2)[1], moved(u_s2)[1]]).detach()
    classes = [row.argmax().item() for row in [*y_x, *y_u]]
    clean = [True] * len(y_x) + [False] * len(y_u)
    contrast = contrast_oracle(
        torch.cat([net(x_s1)[1], net(u_s1)[1], keys, queue.keys]),
        classes * 2 + queue.classes.tolist(), clean * 2 + queue.clean.tolist(), len(clean), 0.07)
    return {
        "self": C.self_training_loss(logits[:n], mixed[:n], logits[n:], mixed[n:], weight_u),
        "prototype": cfg.proto_weight * C.prototype_loss(
            sim[:n], y[:n], y[order][:n], sim[n:], y[n:], y[order][n:], lam, 0.3, cfg.lambda_u),
        "contrastive": cfg.contrastive_weight * contrast,
    }, prototypes, moved, (keys, torch.tensor(classes), torch.tensor(clean))

@pytest.mark.parametrize("num_u, queued", [(2, 4), (2, 0), (1, 0), (0, 4), (5, 9)])
def test_co_training_terms_match_loop_oracle(num_u, queued):
    own, partner, cfg = C.Learner(Linear(), config()), Linear().eval(), config()
    own.key_net, (own.queue, arguments) = Linear(), step_input(3, num_u, queued)
    queue, before = copy.deepcopy(own.queue), arguments[0].clone()
    net, key_net = copy.deepcopy(own.net), copy.deepcopy(own.key_net)
    expected, prototypes, moved, pushed = step_oracle(net, key_net, partner, queue, arguments, cfg)
    partner.calls.clear()
    terms, updated = C.co_training_terms(own, partner, *arguments, True, cfg)
    n = 3 + num_u  # (images, train mode, gradient) of each pass
    assert own.net.calls == [(2 * n, True, False), (2 * n, True, True), (n, True, True)]
    assert own.key_net.calls == [(n, True, False)]
    assert partner.calls == [(2 * num_u, False, False)] * (num_u > 0)
    assert terms.keys() == expected.keys()
    for name in terms:  # equal gradients: none flows through a target, a prototype or a key
        close(terms[name], expected[name], 1e-4)
        grads, references = (torch.autograd.grad(
            term, list(of.parameters()), retain_graph=True, allow_unused=True,
            materialize_grads=True) for term, of in ((terms[name], own.net), (expected[name], net)))
        close(torch.cat(grads, 1), torch.cat(references, 1), 1e-4)
    close(updated, prototypes)
    for key, reference in zip(own.key_net.parameters(), moved.parameters()):
        close(key, reference)
    queue.push(*pushed)
    for name in ("keys", "classes", "clean"):
        close(getattr(own.queue, name), getattr(queue, name))
    sum(terms.values()).backward()
    assert all(p.grad is None for n in (partner, own.key_net) for p in n.parameters())
    assert torch.equal(arguments[0], before) and not updated.requires_grad

def test_co_training_terms_without_representation_is_the_self_term_alone():
    own, partner, cfg = C.Learner(Linear(), config()), Linear(), config()
    own.key_net, (own.queue, arguments) = Linear(), step_input()
    before = copy.deepcopy((own.key_net.state_dict(), own.queue.state_dict(), arguments[0]))
    expected = step_oracle(own.net, own.key_net, partner, own.queue, arguments, cfg)[0]["self"]
    terms, prototypes = C.co_training_terms(own, partner, *arguments, False, cfg)
    assert list(terms) == ["self"]
    close(terms["self"], expected)
    for old, new in zip(before, (own.key_net.state_dict(), own.queue.state_dict(), prototypes)):
        torch.testing.assert_close(new, old, rtol=0, atol=0)

@pytest.mark.parametrize("num_x, num_u", [(3, 0), (2, 0), (2, 1), (3, 3)])
def test_co_training_terms_finite_at_the_edge(num_x, num_u):
    own, partner = C.Learner(C.CoRegNet(3, 1, 8, 4, 5), config()), C.CoRegNet(3, 1, 8, 4, 5).eval()
    _, (_, *arguments) = step_input(num_x, num_u, side=8)
    terms, prototypes = C.co_training_terms(  # prototypes all 0 and the queue empty: a first step
        own, partner, torch.zeros(3, 5), *arguments, True, config())
    own.step(terms)
    assert all(term.isfinite() for term in terms.values()) and prototypes.isfinite().all()
    assert all(p.grad.isfinite().all() for p in own.net.parameters())

@pytest.mark.parametrize("epoch, count", [(1, 1), (4, 1), (5, 3)])
def test_co_training_epoch_representation_starts_after_the_sum_of_both_waits(epoch, count):
    own, partner = (C.Learner(Linear(), config()) for _ in range(2))
    split = probabilities(6, 3), torch.tensor([1, 0, .9, .5, 0, .8])
    steps = C.co_training_epoch(own, partner, split, torch.zeros(3, 5), floats(6),
                                torch.ones(6, 3).bool(), VIEWS, config(start_contrastive=3), epoch)
    assert [list(terms) for terms in steps] == [["self", "prototype", "contrastive"][:count]]

# (10) evaluation; the learning rate

def test_predict_matches_the_network_in_eval_mode(monkeypatch):
    monkeypatch.setattr(C, "EVAL_BATCH", 3)
    net, images = Linear(), floats(7)
    logits = C.predict(net, images, VIEWS.plain)
    assert net.calls == [(3, False, False), (3, False, False), (1, False, False)]
    close(logits, (images + 3).flatten(1) @ net.logits)

@pytest.mark.parametrize("labels, hits, held", [
    ([0, 1, 2, 0], 100, 50), ([0, 1, 1, 2], 50, 100), ([2, 0, 0, 2], 0, 25), (None, None, None)])
def test_accuracy_and_coverage_by_hand(labels, hits, held):
    scores = torch.tensor([[3., 1, 2], [0, 2, 1], [1, 0, 2], [5, 4, 3]])
    sets = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1]]).bool()
    labels = None if labels is None else torch.tensor(labels)
    assert C.accuracy(scores, labels) == hits and C.coverage(sets, labels) == held

def test_evaluate_by_hand():
    # The first pixel is 1 after VIEWS.plain, the others 0: every image gets these logits.
    one, two = (Linear(torch.tensor([row] * 4)) for row in ([3., 2, 0], [0., 2, 3]))
    images = torch.tensor([-2., -3, -3, -3]).view(1, 1, 2, 2).repeat(5, 1, 1, 1)
    sets = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0]]).bool()
    splits = [(torch.tensor([[.5, .4, .1]] * 4), torch.tensor([.9, .9, .5, .1])),
              (torch.tensor([[0, .4, .6]] * 4), torch.tensor([.9, .4, .6, .7]))]
    train, test = torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 1, 0, 0])
    on_test = dict(test_acc=60., test_acc_net1=40., test_acc_net2=0.)  # answers: 1, 0 and 2
    # Clean sets that hold the label: rows 0 and 1 of 0, 1; row 0 of 0, 2, 3. Their answer is 1.
    on_train = {"clean_precision*": (100 + 100 / 3) / 2, "pseudo_label_acc*": 75.}
    for train_labels, test_labels, given, expected in (
            (train, test, splits, on_test | on_train), (train, test, [], on_test),
            (None, test, splits, on_test), (train, None, splits, on_train),
            (None, None, splits, {})):
        figures = C.evaluate(train_labels, test_labels, images, sets, (one, two), VIEWS, given)
        assert figures == pytest.approx(expected)

@pytest.mark.parametrize("epoch, expected", [
    (0, .2), (10, .1001), (5, .0002 + .1998 * (2 + math.sqrt(2)) / 4), (20, .0002), (35, .0002)])
def test_cosine_lr_by_hand(epoch, expected):
    assert C.cosine_lr(epoch, .2, 20) == pytest.approx(expected)

# Whole runs, by main() ---------------------------------------------------------------------------

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SMALL = ["--image-size", "8", "--width", "4", "--batch-size", "8", "--epochs", "4", "--warm-up",
         "2", "--start-contrastive", "0", "--lr", "0.05", "--embedding-dim", "8",
         "--queue-size", "64"]

def paint(path, colour, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(-25, 25, (*size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """36 unlabeled squares, 9 labelled ones, and votes of 5 annotators that err and disagree."""
    root = tmp_path_factory.mktemp("photos")
    for i, (name, colour) in enumerate(COLOURS.items()):
        for j in range(12):
            paint(root / "train" / f"{j:02}{name}.png", colour)
        for j in range(3):
            paint(root / "test" / name / f"{j}.png", colour)
    truth = torch.tensor([i for _ in range(12) for i in (2, 1, 0)])  # sorted: blue, green, red
    wrong = torch.rand(5, 36, generator=torch.Generator().manual_seed(0)) < 0.3
    np.savez(root / "votes.npz", votes=torch.where(wrong, (truth + 1) % 3, truth).numpy())
    return root

def arguments(photos, folder, *more):
    return ["--dataset", "folder", "--data-dir", str(photos), "--classes", "red,green,blue",
            "--annotations", str(photos / "votes.npz"), "--output-dir", str(folder), *SMALL, *more]

def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]

def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("coreg.py: ") and len(error) < 900, error
    for word in words:
        assert str(word) in error, error

@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert C.main(arguments(photos, folder)) == 0
    return folder

def test_run_files(finished):
    records, config = metrics(finished), json.loads((finished / "config.json").read_text())
    assert [r["epoch"] for r in records] == [1, 2, 3, 4] and config["epochs"] == 4
    assert [r["phase"] for r in records] == ["warm-up"] * 2 + ["co-train"] * 2
    for r in records:
        assert r["loss"] == pytest.approx(sum(r[name] for name in C.TERMS))
        assert {"lr", "clean", "test_acc", "test_acc_net1", "test_acc_net2"} <= set(r)
        assert not any("*" in key for key in r)  # nothing here knows labels of training images
    assert records[-1]["contrastive"] > 0 and records[-1]["prototype"] > 0
    assert records[0]["contrastive"] == records[2]["contrastive"] == 0  # ">" warm-up + start
    assert [r["lr"] for r in records] == [C.cosine_lr(e, 0.05, 800) for e in range(4)]

def test_run_same_seed_same_numbers(photos, finished, tmp_path):
    assert C.main(arguments(photos, tmp_path / "again")) == 0
    assert C.main(arguments(photos, tmp_path / "other", "--seed", "1")) == 0
    assert metrics(tmp_path / "again") == metrics(finished) != metrics(tmp_path / "other")

def test_run_never_sees_folder_names(photos, tmp_path):
    """The same images, below folders whose names say the wrong class: the same numbers."""
    for kind, shift in (("right", 0), ("wrong", 1)):
        for i, path in enumerate(sorted((photos / "train").iterdir())):
            own = list(COLOURS).index(path.stem[2:])
            target = tmp_path / kind / "train" / f"{i:02}" / list(COLOURS)[own - shift]
            target.mkdir(parents=True)
            (target / path.name).write_bytes(path.read_bytes())
        args = arguments(photos, tmp_path / f"run {kind}", "--data-dir", str(tmp_path / kind))
        assert C.main(args) == 0
    assert metrics(tmp_path / "run right") == metrics(tmp_path / "run wrong")
    assert "test_acc" not in metrics(tmp_path / "run right")[-1]  # no test/: no accuracy

def test_classifier_predicts(finished, photos):
    saved = torch.load(finished / "model.pt", weights_only=True)
    classify = C.Classifier(finished / "model.pt")
    image = Image.open(photos / "test" / "red" / "0.png")
    batch = torch.stack([classify.prepare(image)] * 2)
    probs = classify(batch)
    assert classify.class_names == ["red", "green", "blue"] and batch.shape == (2, 3, 8, 8)
    nets = [C.CoRegNet(3, 3, 8, 4, 8) for _ in range(2)]
    for net, state in zip(nets, saved["networks"]):
        net.load_state_dict(state)
        net.eval()
    floats = (batch / 255 - saved["mean"]) / saved["std"]
    expected = sum(net(floats)[0] for net in nets).div(2).softmax(1)
    torch.testing.assert_close(probs, expected.detach(), atol=1e-5, rtol=1e-5)

def test_predict_writes_csv(finished, photos, tmp_path, capsys):
    folder = tmp_path / "füße und mehr"
    for name in ("a b.png", "deep/er/ü.PNG"):
        paint(folder / name, COLOURS["red"])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    args = ["--predict", str(folder), "--model", str(finished / "model.pt"), "--output-dir"]
    assert C.main([*args, str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "1 of 3" in captured.err and "broken.jpg" in captured.err
    text = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    paths = [folder / "a b.png", folder / "deep/er/ü.PNG"]
    assert [row["path"] for row in rows] == [*map(str, paths)]
    for row in rows:
        shares = [float(row[f"confidence{i}"]) for i in ("", "_2", "_3")]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=2e-4)
        assert {row["label"], row["label_2"], row["label_3"]} == set(COLOURS)
        classify = C.Classifier(finished / "model.pt")
        probs = classify(classify.prepare(C.open_image(row["path"]))[None])[0]
        assert row["label"] == classify.class_names[probs.argmax()]
    assert C.main([*args, "-"]) == 0 and capsys.readouterr().out == text
    assert C.main([*args, str(tmp_path / "out")]) == 2  # would replace a file
    one_line(capsys, "predictions.csv", "--overwrite")
    single = ["--predict", str(folder / "a b.png"), *args[2:], "-"]
    assert C.main(single) == 0 and capsys.readouterr().out.splitlines() == text.splitlines()[:2]

@pytest.mark.parametrize("content", [None, b"", b"no model", "cut"])
def test_predict_bad_model(finished, photos, tmp_path, capsys, content):
    model = tmp_path / "model.pt"
    if content is not None:
        whole = (finished / "model.pt").read_bytes()
        model.write_bytes(whole[:len(whole) // 2] if content == "cut" else content)
    assert C.main(["--predict", str(photos), "--model", str(model), "--output-dir", "-"]) == 2
    one_line(capsys, "--model", model)

def test_predict_nothing_to_read(finished, tmp_path, capsys):
    args = ["--predict", str(tmp_path / "nowhere"), "--model", str(finished / "model.pt")]
    assert C.main([*args, "--output-dir", "-"]) == 2
    one_line(capsys, "--predict", "nowhere")

@pytest.mark.parametrize("more, phase", [
    (["--method", "pce"], "pce"), (["--method", "hard"], "hard"),
    (["--method", "distill"], "distill"),
    (["--candidates", "soft"], "distill"), (["--ablate", "co-pl,mixup"], "co-train"),
    (["--ablate", "prototype,contrastive,multi-prompt"], "co-train"),
    (["--ablate", "gmm"], "co-train"),
    (["--ablate", "alignment"], "co-train"), (["--prior", "clip"], "co-train")])
def test_run_variants(photos, finished, tmp_path, more, phase):
    assert C.main(arguments(photos, tmp_path / "run", *more)) == 0
    records = metrics(tmp_path / "run")
    assert records[-1]["phase"] == phase and records != metrics(finished)
    last = records[-1]
    assert math.isfinite(last["loss"]) and (last["clean"] == 36) == ("gmm" in more)
    if "contrastive" in str(more):
        assert last["prototype"] == last["contrastive"] == 0
    if phase in ("hard", "distill"):
        assert all(r["entropy"] == 0 and r["set"] > 0 for r in records)

def test_run_true_labels_only_when_asked(photos, tmp_path, capsys):
    """`flip` and `supervised` take the names of train/<class>/, and say so."""
    for path in (photos / "train").iterdir():
        target = tmp_path / "data" / "train" / path.stem[2:] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    base = ["--dataset", "folder", "--data-dir", str(tmp_path / "data"), *SMALL,
            "--annotator", "flip"]
    flip = [*base, "--noise-rate", "0", "--partial-rate", "0",
            "--output-dir", str(tmp_path / "run")]
    assert C.main(flip) == 0
    out = capsys.readouterr().out
    assert "TRUE labels" in out and "candidate sets with the true label* %    100.00" in out
    assert C.main([*flip, "--method", "supervised", "--overwrite"]) == 0
    assert "upper bound" in capsys.readouterr().out
    assert C.main([*base, "--data-dir", str(photos), "--classes", "red,green,blue"]) == 2
    one_line(capsys, "train", "red")

def stop_in_epoch(monkeypatch, number, error):
    """Let an error strike in the middle of an epoch, after steps of both networks."""
    real, calls = C.mean_terms, []

    def mean_terms(steps, epoch):
        calls.append(epoch)
        result = real(steps, epoch)
        if len(calls) == number:
            raise error
        return result
    monkeypatch.setattr(C, "mean_terms", mean_terms)

@pytest.mark.parametrize("save_every", ["0", "3"])
def test_resume_after_interrupt(photos, finished, tmp_path, monkeypatch, capsys, save_every):
    args = arguments(photos, tmp_path / "run", "--save-every", save_every)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 6, KeyboardInterrupt())  # epoch 3, after network 2
        assert C.main(args) == 130
    one_line(capsys, "interrupted", f"--resume {tmp_path / 'run'}")
    assert len(metrics(tmp_path / "run")) == 2 and not (tmp_path / "run" / "model.pt").exists()
    assert C.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True)["networks"]
                    for folder in (tmp_path / "run", finished))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, theirs) for name in a)

def test_resume_newest_unfinished(photos, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [a for a in arguments(photos, "x") if a not in ("--output-dir", "x")]
    for _ in range(2):  # runs/folder, and then runs/folder-2
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, 5, KeyboardInterrupt())
            assert C.main(args) == 130
    assert C.main(["--dataset", "digits", "--resume"]) == 2
    assert "unfinished run of digits" in capsys.readouterr().err
    assert C.main(["--dataset", "folder", "--resume"]) == 0
    assert metrics(tmp_path / "runs/folder-2") == metrics(finished)
    assert not (tmp_path / "runs/folder/model.pt").exists()
    assert C.main(["--dataset", "folder", "--resume"]) == 0
    assert metrics(tmp_path / "runs/folder") == metrics(finished)
    assert C.main(["--dataset", "folder", "--resume"]) == 2

def test_resume_refuses_conflicts(photos, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 3, KeyboardInterrupt())
        assert C.main(arguments(photos, tmp_path / "run")) == 130
    capsys.readouterr()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for flag, value in (("--lr", "0.5"), ("--epochs", "9"), ("--dataset", "digits")):
        assert C.main(["--resume", str(tmp_path / "run"), flag, value]) == 2
        one_line(capsys, flag, value)
    votes = np.load(photos / "votes.npz")["votes"]
    np.savez(tmp_path / "other.npz", votes=(votes + 1) % 3)
    with monkeypatch.context() as patch:
        patch.setattr(C, "FREE", C.FREE | {"annotations"})  # as if the file itself had changed
        assert C.main(["--resume", str(tmp_path / "run"), "--annotations",
                       str(tmp_path / "other.npz")]) == 2
    one_line(capsys, "--resume", "annotations")
    holder = C.lock(tmp_path / "run")
    assert C.main(["--resume", str(tmp_path / "run")]) == 2
    one_line(capsys, "another process")
    holder.close()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before

@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "bit", "other"])
def test_resume_damaged_checkpoint(finished, tmp_path, capsys, damage):
    (tmp_path / "run").mkdir()
    whole = bytearray((finished / "checkpoint.pt").read_bytes())
    whole[len(whole) // 2] ^= 255 * (damage == "bit")
    content = {"empty": b"", "cut": whole[:-100], "bit": whole[:len(whole) // 2 + 9],
               "other": (finished / "model.pt").read_bytes()}
    if damage != "gone":
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content[damage])
    assert C.main(["--resume", str(tmp_path / "run")]) == 2
    one_line(capsys, "--resume", tmp_path / "run")

def test_run_full_disk_keeps_checkpoint(photos, finished, tmp_path, monkeypatch, capsys):
    real, count = C.write_atomically, []

    def full(path, content):
        count.append(path)
        if len(count) > 8:  # two labels, config, two at the start, then two an epoch
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(C, "write_atomically", full)
        assert C.main(arguments(photos, tmp_path / "run")) == 1
    one_line(capsys, "No space left", "--resume")
    assert C.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(finished)

def test_train_loss_not_finite(photos, tmp_path, capsys):
    assert C.main(arguments(photos, tmp_path / "run", "--lr", "1e30")) == 1
    one_line(capsys, "not finite", "epoch", "step", "--lr")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["records"] == []

def test_resume_after_kill(photos, tmp_path, monkeypatch):
    """SIGKILL at random moments, five times; the metrics are those of a run left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coreg"])
    run, quiet, random = tmp_path / "run", tmp_path / "quiet", np.random.default_rng(0)

    def lines(): return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0

    def start(*args):
        process = context.Process(target=C.main, args=(args,))
        process.start()
        return process

    for kill in range(5):
        begun = (run / "checkpoint.pt").exists()
        process = start("--resume", str(run)) if begun else start(*arguments(
            photos, run, "--epochs", "14", "--save-every", "2"))
        while process.is_alive() and lines() < 2 * kill:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.4))
        assert process.is_alive()
        process.kill()
        process.join()
    start("--resume", str(run)).join(120)
    start(*arguments(photos, quiet, "--epochs", "14")).join(120)
    assert len(metrics(run)) == 14 and metrics(run) == metrics(quiet)

def test_digits_from_annotation_to_metrics(tmp_path, monkeypatch, capsys):
    """The embedded default in small: TinyCLIP hardly trained, three epochs."""
    monkeypatch.setattr(C, "TINY_STEPS", 30)
    args = ["--data-dir", str(tmp_path / "data"), "--output-dir", str(tmp_path / "run"), "--epochs",
            "3", "--warm-up", "2", "--width", "4", "--start-contrastive", "0",
            "--num-samples", "200"]
    assert C.main(args) == 0
    out = capsys.readouterr().out
    for text in ("pre-training", "written to", "zero-shot %, best single template*",
                 "zero-shot %, mean of templates", "candidate sets with the true label* %",
                 "candidate sets, mean size", "after warm-up", "network 1", "network 2", "both"):
        assert text in out
    last = metrics(tmp_path / "run")[-1]
    assert {"clean_precision*", "pseudo_label_acc*", "test_acc"} <= set(last) and last["clean"] > 0
    monkeypatch.setattr(C, "load_tiny", None)  # not needed again, whatever the seed
    cached = [*args, "--seed", "5", "--overwrite", "--candidates", "argmax"]
    assert C.main(cached) == 0 and "read from" in capsys.readouterr().out
    with np.load(next((tmp_path / "data/annotations").glob("*.npz")), allow_pickle=False) as file:
        assert file["probs"].shape == (12, 200, 10) and file["probs"].dtype == np.float16
    path = str(next((tmp_path / "data/annotations").glob("*.npz")))
    assert C.main([*args, "--overwrite", "--annotations", path]) == 0  # is valid input itself
    monkeypatch.setattr(C, "load_tiny", lambda *_: (_ for _ in ()).throw(C.CoregError("asked")))
    for more in (["--num-templates", "3"], ["--num-samples", "201"]):  # other questions: asked anew
        assert C.main([*args, "--overwrite", *more]) == 2
        one_line(capsys, "asked")
    Path(path).write_bytes(b"cut")
    assert C.main([*args, "--overwrite"]) == 2 and "cannot be read" in capsys.readouterr().out

def test_net_bf16_is_close():
    torch.manual_seed(0)
    net, images = C.CoRegNet(5, 1, 8, 16), torch.randn(6, 1, 8, 8)
    (logits, z), net.bf16 = net(images), True
    half_logits, half_z = net(images)
    assert half_logits.dtype == half_z.dtype == torch.float32 and not torch.equal(z, half_z)
    torch.testing.assert_close(logits, half_logits, atol=0.1, rtol=0.05)
    torch.testing.assert_close(half_z.norm(dim=1), torch.ones(6))

@pytest.mark.parametrize("width", [4, 12])
def test_net_narrow_channels_last_backward(width):
    """Narrow strided 1x1 convolutions once corrupted memory in the backward pass."""
    net = C.CoRegNet(3, 3, 32, width).to(memory_format=torch.channels_last)
    for n in (30, 29, 27, 28) * 2:
        net(torch.randn(n, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())

# The benchmark: python test_coreg.py --help -----------------------------------------------------

class Stopwatch:
    """Seconds spent inside wrapped functions, each under a name; waits for the device."""
    def __init__(self, device):
        self.seconds, self.device = {}, device

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, owner, function, name):
        inner = getattr(owner, function)

        def timed(*args, **kwargs):
            start = self.now()
            result = inner(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0) + self.now() - start
            return result
        setattr(owner, function, timed)
        return lambda: setattr(owner, function, inner)

    def median(self, function, repeats):
        times = []
        for _ in range(repeats + 1):  # the first warms up
            start = self.now()
            function()
            times.append(self.now() - start)
        return float(np.median(times[1:]))

def benchmark_annotation(args, device, watch):
    """What annotation of images that are in memory costs beside the image encoder of CLIP alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(args.clip, device=device)
    model, tokenizer = model.eval(), open_clip.get_tokenizer(args.clip)
    pairs = [(Image.fromarray(np.random.randint(0, 256, (32, 32, 3), np.uint8)), None)
             for _ in range(args.images)]
    ready = torch.stack([preprocess(image) for image, _ in pairs[:256]]).to(device)
    names, templates = C.DIGITS, C.TEMPLATES["small"]

    def annotate(some):
        C.annotate(model, tokenizer, C.load_batches(some, preprocess, "annotate", 2), names,
                   templates, device)

    @torch.inference_mode()
    def encode():
        for _ in range(0, args.images, len(ready)):
            model.encode_image(ready)
    times = [(watch.median(lambda: annotate(pairs), 1), watch.median(lambda: annotate([]), 1),
              watch.median(encode, 1)) for _ in range(args.repeats)]
    whole, texts, alone = (float(np.median(column)) for column in zip(*times))
    print(json.dumps(dict(clip=args.clip, images=args.images, device=str(device), prompts_s=texts,
                          images_s=whole - texts, encoder_alone_s=alone,
                          overhead=(whole - texts) / alone)))

def benchmark(argv=None):
    """One table and one JSON line: what co-training costs beside its network calls alone."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=benchmark.__doc__,
        epilog="All else, as --width, --image-size, --device or --precision, is as for coreg.py; "
               "without --dataset: --dataset cifar10 --batch-size 128.")
    for name, value in (("--images", 256), ("--clean", 204), ("--repeats", 5)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--epoch-only", action="store_true", help="time epochs, to compare sizes")
    parser.add_argument("--clip", help="time annotation by this open_clip model, random weights")
    args, rest = parser.parse_known_args(argv)
    paper = [] if "--dataset" in rest else ["--dataset", "cifar10", "--batch-size", "128"]
    cfg = C.parse([*paper, *rest])
    device = C.pick_device(cfg.device)
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    n, k, side = args.images, 10, cfg.image_size
    images = torch.randint(256, (n, cfg.channels, side, side), dtype=torch.uint8).to(device)
    candidates = (torch.rand(n, k) < 0.2).to(device)
    views = C.Views(cfg.views, *C.channel_statistics(images))
    watch = Stopwatch(device)
    if args.clip:
        return benchmark_annotation(args, device, watch)
    own = C.make_learner(cfg, k, device)
    clean_prob = (torch.arange(n, device=device) < args.clean).float()
    split = torch.rand(n, k, device=device).softmax(1), clean_prob
    prototypes, prior = torch.zeros(k, cfg.embedding_dim, device=device), torch.ones(k) / k

    def memory():
        return 2 ** -20 * (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
                           resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def latency(count, *nets):
        return 1000 * watch.median(lambda: [C.predict(x.net, images[:count], views.plain)
                                            for x in nets], 5)

    def epoch(rows=slice(None)):  # so late that all terms are on
        for _ in C.co_training_epoch(own, partner, [part[rows] for part in split], prototypes,
                                     images[rows], candidates[rows], views, cfg, cfg.epochs):
            steps.append(1)

    def whole_epoch():
        C.split_data(own, images, views, candidates, prior.to(device), cfg)
        epoch()

    calls, steps = [], []
    if args.epoch_only:
        partner = own
        epoch(slice(args.clean - 512, args.clean + 512))  # the first steps are slow
        seconds = watch.median(whole_epoch, args.repeats)
        return print(json.dumps(dict(
            images=n, ms_per_image=1000 * seconds / n, peak_memory_mib=memory(),
            images_mib=images.nbytes / 2 ** 20)))
    # One plainly trained network: one pass over the images with one label each.
    plain = watch.median(lambda: list(C.warm_up_epoch(own, images, split[0], views, cfg)), 3)
    plain_memory, few = memory(), min(256, n)
    plain_latency = latency(1, own), latency(few, own)
    partner = C.make_learner(cfg, k, device)

    def note(net, inputs):
        calls.append((net, inputs[0].shape, torch.is_grad_enabled(), net.training, len(steps)))

    epoch()
    hooks = [net.register_forward_pre_hook(note) for net in (own.net, own.key_net, partner.net)]
    steps.clear()
    epoch()
    for hook in hooks:
        hook.remove()
    count = len(steps)
    inputs = {shape: torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
              for _, shape, *_ in calls}

    def network_alone():
        for step in range(count):
            total = 0
            for net, shape, grad, training, at in calls:
                if at == step:
                    net.train(training)
                    with torch.set_grad_enabled(grad):
                        logits, embeddings = net(inputs[shape])
                    total = total + (logits.sum() + embeddings.sum() if grad else 0)
            own.net.zero_grad()
            total.backward()

    pairs = [(watch.median(epoch, 1), watch.median(network_alone, 1)) for _ in range(args.repeats)]
    whole, alone = (float(np.median(column)) for column in zip(*pairs))
    undo = [watch.wrap(C, name, "losses") for name in (
        "mixup", "self_training_loss", "update_prototypes", "prototype_loss", "contrastive_masks",
        "supcon_loss")]
    undo += [watch.wrap(views, "weak", "views"), watch.wrap(views, "strong", "views"),
             watch.wrap(own.optimizer, "step", "optimizer"),
             watch.wrap(C, "refine_labels", "pseudo-labels"),
             watch.wrap(C, "guess_labels", "pseudo-labels")]
    start = watch.now()
    epoch()
    shared = watch.now() - start
    for restore in undo:
        restore()
    warm = watch.median(lambda: list(C.warm_up_epoch(own, images, candidates, views, cfg)), 3)
    both = 2 * (whole + watch.median(lambda: C.split_data(
        own, images, views, candidates, prior.to(device), cfg), 3))
    floats = views.plain(images)

    @torch.inference_mode()
    def forward_only():
        for batch in floats.split(C.EVAL_BATCH):
            own.net.eval()(batch)
    evaluation = [(watch.median(lambda: C.predict(own.net, images, views.plain), 1),
                   watch.median(forward_only, 1)) for _ in range(args.repeats)]
    evaluate, evaluate_alone = (float(np.median(column)) for column in zip(*evaluation))
    result = {
        "clean images/s, co-training of one network": args.clean / whole,
        "seconds per step": whole / count, "seconds per step, network alone": alone / count,
        "overhead": float(np.median([a / b for a, b in pairs])),
        **{f"share of {name} %": 100 * seconds / shared for name, seconds in watch.seconds.items()},
        "warm-up images/s": n / warm, "evaluation images/s": n / evaluate,
        "evaluation, share of the network's own speed %": 100 * evaluate_alone / evaluate,
        "epoch, seconds": both, "epoch of one plain network, seconds": plain,
        "peak memory, MiB": memory(), "peak memory of one plain network, MiB": plain_memory,
        "prediction, 1 image, ms": latency(1, own, partner),
        "prediction of one plain network, 1 image, ms": plain_latency[0],
        f"prediction, {few} images, ms": latency(few, own, partner),
        f"prediction of one plain network, {few} images, ms": plain_latency[1],
        "parameters of one network": sum(p.numel() for p in own.net.parameters())}
    asked = dict(vars(args), **{name: getattr(cfg, name) for name in (
        "width", "batch_size", "image_size", "channels", "views", "queue_size", "compile")})
    print(f"{device}, {'bf16' if own.net.bf16 else 'fp32'}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {asked}")
    for name, value in result.items():
        print(f"{name:52} {value:14,.3f}")
    print(json.dumps(dict(asked, bf16=own.net.bf16, **result)))

if __name__ == "__main__":
    benchmark()
