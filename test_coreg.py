"""Tests of coreg.py: python -m pytest -q test_coreg.py. Benchmark: test_coreg.py --help"""

import argparse
import copy
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.mixture import GaussianMixture
from torch import nn

import coreg as C

torch.set_num_threads(1)  # The tensors are tiny: threads would only wait for each other.

@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A test is seeded, runs in an empty folder and has no network."""
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: open("none"))  # OSError
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

def close(actual, expected, tol=1e-5):
    """Both are tensors, numbers or lists, with equal shapes and values."""
    actual, expected = [torch.as_tensor(value).detach() for value in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol, check_dtype=False)

def contents():
    """All files below the working folder with what is in them."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

def one_line(capsys, *texts):
    """The errors must be one line with the texts, beside those of images that are left out."""
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if not line.startswith("left out: ")]
    assert line.startswith("coreg.py: ")
    assert all(text in line for text in texts), line

def refused(capsys, argv, *texts):
    """main(argv) must end with code 2 and one line that has the texts, and change no file."""
    before = contents()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(C, "train_epoch", lambda *args: pytest.fail("it trains"))
        assert C.main([str(word) for word in argv]) == 2
    one_line(capsys, *texts)
    assert contents() == before

# (0) Settings ------------------------------------------------------------------------------
PAPER = {  # the settings of the published run on CIFAR-10
    "dataset": "cifar10", "epochs": 800, "warm_up": 50, "start_contrastive": 10, "lr": 0.01,
    "batch_size": 256, "width": 64, "lr_period": 800, "image_size": 32, "channels": 3,
    "temperature": 0.5, "lambda_u": 1, "proto_weight": 0.1, "contrastive_weight": 0.1,
    "momentum": 0.999, "queue_size": 8192, "templates": "small", "synthetic": None,
    "clip_model": "ViT-B-32-quickgelu", "clip_pretrained": "openai", "mirror": 1,
    "cutout": [0, 0.5], "balance": False, "ablate": []}
DIFFERENCES = {
    "cifar10": {}, "cifar100": {"warm_up": 100}, "svhn": {"mirror": 0},
    "fmnist": {"channels": 1, "epochs": 100, "image_size": 28, "cutout": [16 / 28, 16 / 28]},
    "eurosat": {"image_size": 64, "epochs": 100},
    "fer2013": {"channels": 1, "epochs": 100, "image_size": 64, "cutout": [0.25, 0.25]},
    "gtsrb": {"image_size": 64, "epochs": 100, "mirror": 0},
    "folder": {"epochs": 100, "lr_period": 0}}

@pytest.mark.parametrize("name", DIFFERENCES)
def test_parse_takes_the_settings_of_the_data_set(name):
    found = vars(C.parse(["--dataset", name]))
    assert {key: found[key] for key in PAPER} == PAPER | {"dataset": name} | DIFFERENCES[name]

def save_run(folder, **settings):
    """A checkpoint that has nothing but the settings of a run on digits."""
    Path(folder).mkdir()
    saved = vars(C.parse(["--output-dir", str(folder)])) | settings
    torch.save({"settings": saved}, f"{folder}/checkpoint.pt")

@pytest.mark.parametrize("words", """--epochs 0; --epochs ten; --lr nan; --lr inf; --cutout 1;
    --momentum 7; --synthetic 30 10; --cutout 16 16; --epoch 3; --ablate gmm; --batch-size 1;
    --epochs 10 --warm-up 30; --epochs 2; --synthetic 0.1 0.1 --annotations a.npz; --seed -1;
    --classes a,b; --dataset cifra10; --num-samples 1; --image-size 7; --channels 2;
    --resume run --output-dir other; --resume run --seed 1; --resume run --annotations a.npz;
    --resume run --width 8; --resume run --dataset svhn; --resume run --channels 3;
    --resume run --synthetic 0.1 0.2; --resume run --classes a,b; --resume run --num-samples 9;
    --resume run --clip-model a; --resume run --clip-pretrained a; --resume run --templates a;
    --resume run --image-size 9; --resume run --queue-size 9""".split(";"))
def test_parse_refuses_a_bad_word_and_names_the_flag(words, capsys):
    save_run("run")
    before = contents()
    with pytest.raises(SystemExit, match="^2$"):
        C.main(words.split())
    flag = re.findall("--[a-z-]+", words)[-1]
    assert re.search(f"{flag}[ :]", capsys.readouterr().err.splitlines()[1])  # 0: the usage
    assert contents() == before

def test_parse_resume_takes_new_settings_of_training_and_the_device_of_the_machine():
    save_run("run", device="cuda:7", lr=0.3, width=4)
    cfg = C.parse("--resume run --epochs 30 --balance --ablate mixup split".split())
    assert [cfg.epochs, cfg.balance, cfg.ablate] == [30, True, ["mixup", "split"]]
    assert [cfg.lr, cfg.width, cfg.batch_size] == [0.3, 4, 64]
    assert cfg.device == C.parse([]).device

def test_parse_help_shows_every_flag_with_the_default_of_the_run(capsys):
    settings = vars(C.parse([]))
    with pytest.raises(SystemExit, match="^0$"):
        C.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert " --balance " in said
    for name in settings.keys() - {"balance", "output_dir"}:
        default = re.escape(f"({settings[name]})")
        assert re.search(f" --{name.replace('_', '-')} ((?! --).)*{default}", said), name

def test_parse_names_a_folder_and_puts_the_home_folder_for_a_tilde(monkeypatch):
    cfg = C.parse(["--dataset", "svhn", "--seed", "3"])
    assert re.fullmatch(r"runs/svhn-seed3-\d{8}-\d{6}", cfg.output_dir)
    monkeypatch.setenv("HOME", "/me")
    cfg = C.parse(["--data-dir=~/data", "--output-dir", "~/run", "--annotations", "~/a"])
    assert [cfg.data_dir, cfg.output_dir, cfg.annotations] == ["/me/data", "/me/run", "/me/a"]

# (1) Data sets -----------------------------------------------------------------------------
def write(path, content):
    """An image, as PNG whatever the suffix, or bytes -> file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path, "PNG")
    else:
        path.write_bytes(content)

def read_folder(*flags):
    return C.read_dataset(C.parse(["--dataset", "folder", "--data-dir", ".", *flags]))

@pytest.mark.parametrize("name", [*C.PRESETS][1:])
def test_main_says_which_data_are_missing_where(name, capsys):
    assert C.main(["--dataset", name, "--data-dir", "none/here", "--device", "cpu"]) == 2
    one_line(capsys, "none/here", "none/here/train" if name == "folder" else name)

@pytest.mark.parametrize("reader, parts", [
    ("CIFAR10", [True, False]), ("CIFAR100", [True, False]), ("FashionMNIST", [True, False]),
    ("SVHN", ["train", "test"]), ("GTSRB", ["train", "test"]), ("FER2013", ["train", None]),
    ("EuroSAT", ["whole", None])])
def test_read_known_reads_these_parts(reader, parts, monkeypatch):
    monkeypatch.setattr(f"torchvision.datasets.{reader}", lambda root, part="whole", **_: part)
    assert [*C.read_known(reader.lower().replace("fashion", "f"), "here")] == parts

def test_main_keeps_the_traceback_of_a_mistake_in_a_reader(monkeypatch):
    monkeypatch.delattr("torchvision.datasets.CIFAR10")
    with pytest.raises(AttributeError):
        C.main(["--dataset", "cifar10", "--device", "cpu"])

RED = (250, 10, 20)
GREEN = (15, 240, 30)

def two_colours(mode="RGB"):
    """64 x 32 pixels: blue, red, green, blue; the centre square is red left of green."""
    image = Image.new("RGB", (64, 32), "blue")
    image.paste(RED, (16, 0, 32, 32))
    image.paste(GREEN, (32, 0, 48, 32))
    return image.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE)

def shows(path, left, right):
    """open_image(path) must be the centre square, with these mean colours left and right."""
    image = C.open_image(path)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    pixels = np.asarray(image, float)
    assert abs(pixels[:, 2:14].mean((0, 1)) - left).max() <= 8
    assert abs(pixels[:, 18:30].mean((0, 1)) - right).max() <= 8

@pytest.mark.parametrize("mode, name, left, right", [
    ("RGB", "x.png", RED, GREEN), ("RGB", "x.webp", RED, GREEN), ("RGB", "x.jpg", RED, GREEN),
    ("CMYK", "x.jpg", RED, GREEN), ("RGBA", "x.png", RED, GREEN), ("P", "x.png", RED, GREEN),
    ("L", "x.png", 83, 149), ("LA", "x.png", 83, 149), ("1", "x.png", 0, 255)])
def test_open_image_makes_every_mode_rgb(mode, name, left, right):
    two_colours(mode).save(name)
    shows(name, left, right)

@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_open_image_turns_it_upright_unless_exif_is_damaged():
    stored = two_colours().transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[0x0112] = 6  # stored turned to the left: to be shown turned to the right
    stored.save("x.jpg", exif=exif)
    shows("x.jpg", RED, GREEN)
    for damaged in (b"junk, not TIFF", b"MM\0*\0\0\0\x08\0\x09\x01\x12"):
        two_colours().save("x.jpg", exif=b"Exif\0\0" + damaged)
        shows("x.jpg", RED, GREEN)

def grey(*paths):
    """Images whose grey value is the last number in the path."""
    for path in paths:
        write(Path(path), np.full((8, 8), int(re.findall(r"\d+", path)[-1]), np.uint8))

def labelled(pairs):
    """Pairs of paths of such images -> list of (grey value, label)."""
    return [(np.asarray(C.open_image(path)).item(0), label) for path, label in pairs]

def test_read_dataset_folder_leaves_out_hidden_names_and_sorts_class_after_class():
    grey("train/cat/1.png", "train/cat/deep/er/2.bmp", "train/dog/3.PNG", "test/dog/4.png")
    grey("train/.ipynb_checkpoints/5.png", "train/__MACOSX/._6.png", "train/cat/._7.png")
    grey("train/cat/.thumbs/8.png", "test/.hidden/9.png", "train/__background__/10.png")
    grey("train/lost/11.png", "train/cat-2/12.png", "train/cat 3/13.png", "train/cat/c.14.png")
    write(Path("train/cat/notes.txt"), b"no image")
    train, test, names = read_folder()
    assert names == ["__background__", "cat", "cat 3", "cat-2", "dog", "lost"]
    order = [(10, 0), (1, 1), (14, 1), (2, 1), (13, 2), (12, 3), (3, 4), (11, 5)]
    assert [labelled(train), labelled(test)] == [order, [(4, 4)]]

def test_main_names_a_folder_that_is_closed(monkeypatch, capsys):
    """For root no folder is closed, so the system's answer is made up."""
    grey("p/train/cat/1.png", "p/train/dog/2.png", "p/train/emu/3.png")
    real = os.scandir
    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    refused(capsys, ["--dataset", "folder", "--data-dir", "p"], "p/train/dog", "denied")

def test_read_dataset_folder_follows_links_and_walks_a_folder_once(monkeypatch):
    grey("train/cat/1.png", "elsewhere/2.png", "train/emu/3.png")
    Path("train/dog").symlink_to("../elsewhere")
    Path("train/cat/again").symlink_to(".")
    Path("train/cat/above").symlink_to("..")
    Path("train/emu/dogs").symlink_to("../../elsewhere")
    calls = iter(range(1, 500))  # A walk in circles is cut off.
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: next(calls) and real(path))
    train, _, names = read_folder()
    assert names == ["cat", "dog", "emu"]
    assert labelled(train) == [(1, 0), (2, 1), (3, 2)]

def test_read_dataset_folder_with_classes_has_no_labels_at_any_depth():
    """Accents in one character or two, and blanks around a name, make no other class."""
    composed = "caf\u00e9"
    apart = "cafe\u0301"
    grey("train/0.png", f"train/{apart}/deep/1.png", "train/dog /2.png")
    grey(f"test/{composed}/3.png", "test/dog/4.png")
    train, test, names = read_folder("--classes", f"dog, {apart} ")
    assert names == ["dog", composed]
    assert [labelled(train), labelled(test)] == [[(0, -1), (1, -1), (2, -1)], [(3, 1), (4, 0)]]
    Path("train/0.png").unlink()
    train, test, names = read_folder()
    assert names == [composed, "dog"]
    assert labelled([*train, *test]) == [(1, 0), (2, 1), (3, 0), (4, 1)]

def test_read_images_names_broken_files_and_leaves_them_out(capsys):
    grey("train/cat/1.png", "train/dog/2.png")
    write(Path("train/cat/cut.png"), Path("train/cat/1.png").read_bytes()[:50])
    write(Path("train/cat/deep.png"), np.zeros((8, 16, 3), np.uint8))
    data = Path("train/cat/deep.png").read_bytes()  # The head of half the width and 16 bits:
    head = data[12:19] + b"\x08" + data[20:24] + b"\x10" + data[25:29]
    head += zlib.crc32(head).to_bytes(4, "big") + data[33:]
    write(Path("train/cat/deep.png"), data[:12] + head)
    write(Path("train/dog/junk.jpg"), b"junk")
    Image.new("F", (8, 8)).save("train/dog/float.tif")
    argv = ["--dataset", "folder", "--data-dir", str(Path.cwd()), "--channels", "1"]
    pairs, images, labels = C.read_images(C.read_dataset(C.parse(argv))[0], C.parse(argv))
    assert [path.name for path, _ in pairs] == ["1.png", "2.png"]
    assert [*images.shape, *images[:, 0, 0, 0], *labels] == [2, 1, 32, 32, 1, 2, 0, 1]
    left_out = re.findall(r"(\w+\.\w+):", capsys.readouterr().err)
    assert sorted(left_out) == ["cut.png", "deep.png", "float.tif", "junk.jpg"]
    Path("train/cat/1.png").write_bytes(b"")
    refused(capsys, [*argv, "--device", "cpu"], "two training images")
    Path("train/dog/2.png").write_bytes(b"")
    refused(capsys, [*argv, "--device", "cpu"], "none of 6 images can be read")

@pytest.mark.parametrize("paths, text", [
    ([], "/train"), (["test/a/1.png"], "/train"), (["train/a/1.png", "train/a/2.png"], "'a']"),
    (["train/a/1.png", "train/b/2.png", "train/3.png"], "a folder for each class"),
    (["train/a/1.png", "train/b/2.png", "test/c/3.png"], "'b'], got ['c']"),
    (["train/a/1.png", "train/b/2.png", "test/3.png"], "'b'], got ['no folder']")])
def test_main_refuses_a_folder_without_use(paths, text, capsys):
    grey(*paths)
    refused(capsys, ["--dataset", "folder", "--data-dir", Path.cwd(), "--device", "cpu"], text)

@pytest.mark.parametrize("name, archive", [
    ("eurosat", "eurosat/EuroSAT.zip"), ("cifar10", "cifar-10-python.tar.gz")])
def test_main_names_a_damaged_archive(name, archive, monkeypatch, capsys):
    """Of an archive that was cut off; its checksum counts as right, as a reader's may."""
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *args: True)
    write(Path("data", archive), b"PK\3\4" if "zip" in archive else b"\x1f\x8b\x08\0\0")
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: False)
    refused(capsys, ["--dataset", name], "--data-dir data", name)

def test_read_dataset_holds_out_the_same_fifth_and_draws_samples():
    train, test, _ = C.read_dataset(C.parse([]))
    assert [len(train), len(test)] == [1438, 359]
    assert sorted(train.indices + test.indices) == list(range(1797))
    few, same, _ = C.read_dataset(C.parse(["--num-samples", "20", "--seed", "3"]))
    assert same.indices == test.indices
    assert len(few) == 20
    assert few.indices == sorted({*few.indices} & {*train.indices})

# (2) Candidate sets ------------------------------------------------------------------------
PROBS = torch.tensor([  # [T=3,N=3,K=4]; sums over T: 11 9 4 0, 1 7 6 10, 5 9 6 4
    [[4, 3, 1, 0], [0, 2, 2, 4], [4, 3, 1, 0]],
    [[3, 4, 1, 0], [0, 1, 3, 4], [1, 3, 4, 0]],
    [[4, 2, 2, 0], [1, 4, 1, 2], [0, 3, 1, 4]]]) / 8

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_candidate_sets_by_hand(dtype):
    def sets_of(probs, mode):
        return C.candidate_sets(probs.to(dtype), mode).int().tolist()
    assert sets_of(PROBS, "multi_prompt") == [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 1]]
    assert sets_of(PROBS, "argmax") == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    votes = torch.tensor([  # Labels tie, rows of zeros abstain; nobody knows the last image.
        [[1, 1, 0], [0, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0]],
        [[1, 1, 0], [0, 1, 0], [0.5, 0.5, 0.5], [0, 0, 0]]])
    for mode in ("multi_prompt", "argmax"):
        assert sets_of(votes, mode) == [[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]]

@pytest.mark.parametrize("partial_rate, noise_rate", [(0, 0), (0.3, 0), (0.3, 0.2), (0.1, 1)])
def test_flip_candidates_rates(partial_rate, noise_rate):
    labels = torch.arange(6000) % 10
    sets = C.flip_candidates(labels, 10, partial_rate, noise_rate, torch.Generator())
    assert abs(sets[range(6000), labels].float().mean() - (1 - noise_rate)) < 0.025
    wrong = sets.sum() - 6000  # Where the true label went, a wrong one took its place.
    assert abs(wrong / 6000 / 9 - partial_rate) < 0.01
    assert C.flip_candidates(labels, 10, 1.0, noise_rate, torch.Generator()).all()

def test_templates_and_class_names():
    assert [len(set(C.TEMPLATES[name])) for name in ("small", "digits")] == [27, 5]
    assert len(C.TEMPLATES["small"]) == 27
    assert all(template.count("{}") == 1 for template in C.TEMPLATES["small"])
    assert C.TEMPLATES["digits"][3] == "a slanted number {}"
    assert C.phrases("a {};\n    the\n {} ") == ["a {}", "the {}"]
    assert C.CLASS_NAMES["svhn"][7] == "number 7"
    assert len(set(C.CLASS_NAMES["gtsrb"])) == 43
    assert C.CLASS_NAMES["gtsrb"][24] == "German Traffic Sign: The road narrows on the right"
    assert C.CLASS_NAMES["fer2013"][6] == "Neutral Facial Expression"

@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """The flags of a CLIP of one thin layer with random weights, which open_clip builds."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(5)
    torch.save(open_clip.create_model("small-clip").state_dict(), folder / "weights.pt")
    return ["--clip-model", "small-clip", "--clip-pretrained", str(folder / "weights.pt")]

def test_annotate_matches_a_plain_loop(small_clip):
    model, preprocess, tokenizer = clip = C.load_clip(small_clip[1], small_clip[3], "cpu")
    assert not model.training
    names = ["cat", "fire engine", "seven"]
    templates = ["a photo of a {}", "{}", "many {}s", "no {}!"]
    arrays = [torch.randint(256, (30, 40, 3)).byte().numpy() for _ in range(5)]
    pairs = [(Image.fromarray(array), -1) for array in arrays]
    scores = torch.empty(4, 5, 3)
    for t, template in enumerate(templates):
        for k, name in enumerate(names):
            u = model.encode_text(tokenizer([template.format(name)]))[0]
            for i, (image, _) in enumerate(pairs):
                v = model.encode_image(preprocess(image)[None])[0]
                scores[t, i, k] = model.logit_scale.exp() * (v @ u) / (v.norm() * u.norm())
    expected = scores.detach().softmax(2)
    assert min(expected.std(axis).mean() for axis in range(3)) > 0.005  # Each axis matters.
    probs = C.annotate(clip, pairs, names, templates, "cpu")
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-4)  # float32, too

@pytest.mark.parametrize("name, weights, text", [
    ("no-such-clip", "openai", "no-such-clip"), ("small-clip", "no-such-tag", "no-such-tag"),
    ("small-clip", "other.pt", "Missing key"), ("small-clip", "", "small-clip")])
def test_main_names_a_model_that_does_not_load(name, weights, text, small_clip, capsys):
    torch.save(torch.nn.Linear(2, 3).state_dict(), "other.pt")
    argv = ["--clip-model", name, "--clip-pretrained", weights, "--num-samples", 9]
    refused(capsys, argv, f"--clip-model {name} --clip-pretrained {weights}", text)

@pytest.mark.parametrize("classes, template, model, text", [
    ("Cat,cat", "a {}", "small-clip", "alike"), ("a,b", "a {}", "tiny", "number six"),
    ("a,b", "word " * 80 + "{}", "small-clip", "alike"),
    ("one,cat", "a wide number {}", "tiny", "number six")])
def test_main_refuses_unfit_names(classes, template, model, text, small_clip, capsys):
    grey("p/train/1.png", "p/train/2.png")
    argv = ["--dataset", "folder", "--data-dir", "p", "--classes", classes, *small_clip]
    refused(capsys, [*argv, "--templates", template, "--clip-model", model], text)

@pytest.mark.parametrize("flags, text", [
    ("--templates a", "--templates"), ("--templates a_{};the", "'the'"),
    ("--synthetic 0.1 0.1", "--synthetic"), ("--annotations none.npz", "none.npz"),
    ("--classes a,b,a", "'b', 'a']"), ("--classes a,,b", "'', 'b']"), ("--classes a", "'a']")])
def test_main_checks_before_it_loads_CLIP(flags, text, monkeypatch, capsys):
    forbid_clip(monkeypatch)
    grey("p/train/1.png", "p/train/2.png")
    refused(capsys, f"--dataset folder --data-dir p --classes a,b {flags}".split(), text)

VOTES = np.eye(3)[[[0, 1, 2, 2], [0, 0, 2, 1]]]  # [2,4,3]

@pytest.mark.parametrize("content, text", [
    (VOTES.astype(int), None), (VOTES.astype(np.float64), None), (VOTES * 2e-8, None),
    (VOTES[0], "('T', 4, 3)"), (VOTES[:, :3], "('T', 4, 3)"), (VOTES[:0], "expected"),
    (VOTES * 2, "got 0 to 2"), (VOTES * math.nan, "nan"), (-VOTES, "got -1 to"),
    (np.full((2, 4, 3), "x"), "probs"), (b"", "expected"), (b"junk", "expected"),
    (b"PK\3\4 cut", "expected")])
def test_read_annotations_takes_what_fits_alone(content, text):
    np.savez("p.npz", probs=content)
    if isinstance(content, bytes):
        Path("p.npz").write_bytes(content)
    if text:
        with pytest.raises(C.UserError, match=f"^p.npz: .*{re.escape(text)}"):
            C.read_annotations("p.npz", 4, 3)
        return
    probs = C.read_annotations("p.npz", 4, 3)
    assert probs.dtype == torch.float32
    close(probs, content)
    sets = C.candidate_sets(probs).int().tolist()  # Tiny scores do not count as none.
    assert sets == [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]]

# (3) The weak/strong data set --------------------------------------------------------------
def make_pictures(count, channels, side):
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8)

def make_data(images, flags):
    candidates = torch.ones(len(images), 3, dtype=torch.bool)
    return C.WeakStrongImages(images, candidates, C.parse(flags.split()))

@pytest.mark.parametrize("mirror, channels", [(0, 1), (1, 3)])
def test_weak_shifts_by_up_to_an_eighth_mirrors_half_and_normalises(mirror, channels):
    image = make_pictures(1, channels, 16)
    image[:, 0] //= 3  # The channels differ in mean and deviation.
    windows = F.pad(image, (2, 2, 2, 2)).unfold(2, 16, 1).unfold(3, 16, 1)[0].flatten(1, 2)
    windows = torch.cat([windows, windows.flip(3)], 1).movedim(1, 0)  # [25 + 25,C,16,16]
    data = make_data(image.repeat(800, 1, 1, 1), f"--mirror {mirror}")
    std, mean = torch.std_mean(image / 255, (0, 2, 3), correction=0, keepdim=True)
    views = ((data.weak(torch.arange(800)) * std + mean) * 255).round()
    found = (views[:, None] == windows).flatten(2).all(2)  # [800,25 + 25]
    assert found.any(1).all()
    counts = found.sum(0)
    assert counts.max() < 70
    assert (counts[:25] + counts[25:]).min() > 0
    assert abs(counts[25:].sum() / 800 - mirror / 2) < 0.05

@pytest.mark.parametrize("channels, side, least, most", [
    (3, 32, 0, 16), (1, 24, 0, 8), (1, 28, 16, 16)])
def test_cutout_blanks_one_square(channels, side, least, most):
    images = torch.full((2000, channels, side, side), 0.8)
    changed = C.cutout(images, least / side, most / side)
    hit = (changed != images).any(1)  # [N,H,H]
    assert (changed.movedim(1, 3)[hit] == 0).all()
    rows, columns = [hit.any(axis) for axis in (2, 1)]
    assert torch.equal(hit, rows[:, :, None] & columns[:, None])  # It is a rectangle.
    inner = ~(rows | columns)[:, [0, -1]].any(1) & hit.any((1, 2))
    heights = rows[inner].sum(1)
    assert (heights - columns[inner].sum(1)).abs().max() <= 1  # 3.5 pixels cover 3 or 4.
    assert set(heights.tolist()) == set(range(max(least, 1), most + 1))
    assert hit[:, side // 4, -side // 4].any() or least  # off the diagonal, too
    for line in (rows, columns):  # The centre lies anywhere.
        assert abs(line[:, side // 2].float().mean() - (least + most) / 2 / side) < 0.04

def test_strong_views_of_dark_pictures_are_those_of_bright_ones():
    """Grey values of a sixteenth change nothing once the pixels are normalised."""
    bright = make_pictures(64, 1, 16) // 16 * 16
    views = []
    for images in (bright, bright // 16):
        torch.manual_seed(1)
        views.append(make_data(images, "").strong(torch.arange(64)))
    close(views[1], views[0], 1e-4)
    assert (views[0] == 0).any()  # The cutout has the mean, which no grey value equals.

def test_mean_and_deviation_are_of_at_most_1000_images():
    images = torch.zeros(2500, 1, 2, 2, dtype=torch.uint8)
    images[::3] = 51
    data = make_data(images, "")
    close([data.mean, data.std], [0.2, 1 / 255])

def test_random_operation_changes_a_16th_of_the_batch_alike():
    images = torch.rand(1, 3, 16, 16).repeat(64, 1, 1, 1)
    changed = C.random_operation(images)
    assert changed.shape == images.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    parts = changed.unflatten(0, (16, 4))
    assert torch.equal(parts, parts[:, :1].repeat(1, 4, 1, 1, 1))
    assert len({str(part[0].tolist()) for part in parts}) > 8
    means = {C.random_operation(images[:1]).mean().item() for _ in range(300)}
    assert len(means) > 60  # Their strength differs, too.

@pytest.mark.parametrize("channels, kept", [(1, True), (3, False)])
def test_strong_operations_are_for_colour_alone(channels, kept, monkeypatch):
    monkeypatch.setattr(C, "random_operation", lambda images: 1 - images)
    data = make_data(make_pictures(8, channels, 16), f"--channels {channels} --cutout 0 0")
    torch.manual_seed(1)
    weak = data.weak(torch.arange(8))
    torch.manual_seed(1)
    assert torch.equal(data.strong(torch.arange(8)), weak) == kept

@pytest.mark.parametrize("view", ["weak", "strong"])
def test_views_are_those_of_the_rows_and_depend_on_the_seed(view):
    images = torch.arange(50, 90, 10, dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 16, 16)
    data = make_data(images, "--cutout 0 0")
    make_views = getattr(data, view)
    rows = torch.tensor([2, 0, 2, 3])
    first = make_views(rows)
    close((first * data.std + data.mean)[:, 0, 8, 8] * 255, [70, 50, 70, 80], 1e-3)
    assert not torch.equal(make_views(rows), first)
    torch.manual_seed(0)
    assert torch.equal(make_views(rows), first)
    assert images[:, 0, 0, 0].tolist() == [50, 60, 70, 80]

# (4) Both networks -------------------------------------------------------------------------
def settings(text=""):
    few = """--width 4 --batch-size 3 --lr 0.1 --momentum 0.9 --epochs 9 --warm-up 1
        --start-contrastive 1 --lambda-u 0.7 --temperature 0.4 --proto-weight 0.2
        --contrastive-weight 0.3 """
    return C.parse((few + text).split())

class SmallNet(nn.Module):
    """Linear in 4 pixels. It notes of its calls: number of images, train mode, gradient."""
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5)
        self.calls = []
    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        return self.fc(images.flatten(1)), F.normalize(self.head(images.flatten(1)))

def small_learner(cfg):
    learner = C.Learner(3, cfg, "cpu")
    learner.net = SmallNet()
    learner.key_net = SmallNet()
    learner.queue = C.MomentumQueue(7, 5)
    learner.optimizer = torch.optim.SGD(learner.net.parameters(), cfg.lr, 0.9)
    return learner

class SmallData:
    """For WeakStrongImages: a view depends on its row and on its place in the batch."""
    def __init__(self, count):
        self.images = torch.randn(count, 1, 2, 2)
        self.candidates = torch.rand(count, 3) < 0.4
        self.candidates[torch.arange(count), torch.arange(count) % 3] = True
    def __len__(self):
        return len(self.images)
    def weak(self, rows):
        return self.images[rows] + 0.1 * (torch.arange(len(rows)) % 60).view(-1, 1, 1, 1)
    def strong(self, rows):
        return self.images[rows] / 2 - 0.1 * torch.arange(len(rows)).view(-1, 1, 1, 1)

def random_probs(*shape):
    return torch.randn(*shape).softmax(-1)

def unit_rows(*shape):
    return F.normalize(torch.randn(*shape), dim=1)

@pytest.mark.parametrize("channels, stride", [(2, 1), (4, 2)])
def test_PreActBlock_equals_the_formula(channels, stride):
    block = C.PreActBlock(2, channels, stride)
    x = torch.randn(3, 2, 8, 8)
    h = F.batch_norm(x, None, None, training=True).relu()
    y = F.conv2d(h, block.conv1.weight, stride=stride, padding=1)
    y = F.batch_norm(y, None, None, training=True).relu()
    if stride == 2:
        h = F.conv2d(h[:, :, ::2, ::2], block.shortcut[1].weight)
    close(block(x), F.conv2d(y, block.conv2.weight, padding=1) + h)

def test_Learner_takes_the_published_optimizer_and_the_precision_asked_for():
    for word in ("bf16", "fp32"):
        learner = C.Learner(3, settings(f"--precision {word}"), "cpu")
        assert learner.net.bf16 == (word == "bf16")
    [group] = learner.optimizer.param_groups
    assert [group[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 5e-4]

def test_CoRegNet_has_the_published_number_of_parameters():
    assert sum(weight.numel() for weight in C.CoRegNet(10).parameters()) == 11_499_594

@pytest.mark.parametrize("side, last", [(8, 1), (28, 4), (32, 4), (64, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_CoRegNet_shapes_and_norms(side, last, channels):
    net = C.CoRegNet(6, channels, side, 2, 5).eval()
    images = torch.randn(2, channels, side, side)
    logits, embeddings = net(images)
    assert (logits.shape, embeddings.shape) == ((2, 6), (2, 5))
    assert net.encoder[:-2](images).shape == (2, 16, last, last)  # before the mean over places
    close(embeddings.norm(dim=1), [1, 1])
    net.bf16 = True
    error = (net(images)[0] - logits).abs().max()
    assert 0 < error < 0.1 and net(images)[1].dtype == torch.float32

# (5) Warm-up -------------------------------------------------------------------------------
def test_partial_cross_entropy_by_hand_and_at_the_edge():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]])
    sets = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()  # A full set does not count.
    expected = -(math.log(0.8 + 1e-5) + math.log(0.1 + 1e-5)) / 2
    close(C.partial_cross_entropy(probs.log() + 5, sets), expected, 1e-6)
    close(C.partial_cross_entropy(probs, sets[1:2]), 0.0)
    logits = torch.tensor([[0, 0, 1e4]], requires_grad=True)
    loss = C.partial_cross_entropy(logits, sets[:1])
    close(loss, -math.log(1e-5))
    close(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 3))

def test_negative_entropy_by_hand_and_at_the_edge():
    logits = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    expected = (0.9 * math.log(0.9) + 0.1 * math.log(0.1) - math.log(2)) / 2
    close(C.negative_entropy(logits), expected)
    logits = torch.tensor([[0, 1e4, 0]], requires_grad=True)
    loss = C.negative_entropy(logits)
    close(loss, 0.0)
    close(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 3))

def test_warm_up_epoch_learns_from_strong_views_in_training_mode(monkeypatch):
    monkeypatch.setattr(C, "random_batches", lambda rows, batch_size: rows.split(batch_size))
    cfg = settings()
    learner = small_learner(cfg)
    data = SmallData(8)
    net = copy.deepcopy(learner.net)
    optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9)
    sums = Counter()
    for rows in ([*range(6)], [6, 7]):  # twice --batch-size 3
        logits, _ = net(data.strong(rows))
        set_loss = C.partial_cross_entropy(logits, data.candidates[rows])
        terms = {"set": set_loss, "entropy": C.negative_entropy(logits)}
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        sums.update({name: term.item() for name, term in terms.items()})
    learner.net.eval()
    terms = C.warm_up_epoch(learner, data, cfg)
    assert terms == pytest.approx({name: total / 2 for name, total in sums.items()}, 1e-4)
    close(learner.net.fc.weight, net.fc.weight)
    assert learner.net.calls == [(6, True, True), (2, True, True)]

@pytest.mark.parametrize("count, sizes", [(6, [3, 3]), (7, [3, 3]), (8, [2, 3, 3]), (1, [])])
def test_random_batches_leaves_out_a_lone_row(count, sizes):
    rows = torch.arange(count) + 5
    batches = C.random_batches(rows, 3)
    assert sorted(len(batch) for batch in batches) == sizes
    drawn = [row for batch in batches for row in batch.tolist()]
    assert torch.cat(C.random_batches(torch.arange(99), 3)).tolist() != list(range(99))
    assert len({*drawn} & {*rows.tolist()}) == len(drawn) == count - (count % 3 == 1)

# (6) GMM split -----------------------------------------------------------------------------
def oracle_clean_probability(history):
    """A list of losses [N] -> w: each scaled to 0..1, a mixture of the mean of the last 5."""
    scaled = [(row - row.min()) / (row.max() - row.min()) for row in history[-5:]]
    values = (sum(scaled) / len(scaled)).numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    mixture.fit(values)
    lower = 0 if mixture.means_[0] < mixture.means_[1] else 1
    return torch.tensor(mixture.predict_proba(values)[:, lower])

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epochs", [1, 2, 4, 5, 6, 8])
def test_clean_probability_equals_the_oracle(epochs):
    losses = torch.cat([0.3 * torch.randn(60), 0.8 + 0.6 * torch.randn(40)]).abs()
    history = (losses + 0.3 * torch.rand(epochs, 100)) * (1 + 9 * torch.rand(epochs, 1))
    close(C.clean_probability(history), oracle_clean_probability(list(history)), 1e-3)

@pytest.mark.parametrize("losses, clean", [
    ([0.1, 0.2, 0.1, math.inf], [1, 1, 1, 0]), ([2.0] * 6, [0] * 6), ([1.0], [0])])
def test_clean_probability_at_the_edge(losses, clean):
    prob = C.clean_probability(torch.tensor([losses]))
    assert prob.isfinite().all()
    assert (prob > 0.5).tolist() == clean

@pytest.mark.parametrize("w, losses, classes, expected", [
    ([0.9, 0, 0.6, 0], [3, 1, 4, 2], [0, 0, 1, 1], [0, 0.75, 0, 0.75]),  # half of each class
    # Of classes of 1 and 4, two fifths, rounded; the first is of the highest loss.
    ([0, 0.1, 1, 0.9, 0.3], [9, 4, 3, 2, 1], [7, 4, 4, 4, 4], [0, 0, 0, 0.9, 0.75]),
    ([0.5, 0.4, 0], [1, 2, 3], [0, 1, 0], [0, 0, 0])])  # Nothing is clean.
def test_balance_classes_by_hand(w, losses, classes, expected):
    given = torch.tensor(w, dtype=torch.float32)
    balanced = C.balance_classes(given, torch.tensor(losses) * 0.1, torch.tensor(classes))
    close(balanced, expected)
    close(given, w)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags", ["", "--ablate alignment", "--ablate split", "--balance"])
def test_split_data_equals_the_oracle_epoch_after_epoch(flags):
    learner = small_learner(settings())
    data = SmallData(600)
    history = []
    for _ in range(7):
        nn.init.normal_(learner.net.fc.weight)
        with torch.no_grad():
            views = [data.weak(rows) for rows in torch.arange(600).split(512)]
            expected = learner.net(torch.cat(views))[0].softmax(1)
        if flags != "--ablate alignment":
            expected = F.normalize(expected / expected.mean(0), p=1, dim=1)
        in_sets = expected.masked_fill(~data.candidates, 0)
        history.append(-in_sets.amax(1).log())
        w = torch.ones(600) if flags == "--ablate split" else oracle_clean_probability(history)
        if flags == "--balance":
            w = C.balance_classes(w, history[-1], in_sets.argmax(1))
        learner.net.train()
        learner.net.calls.clear()
        probs, clean_prob = C.split_data(learner, data, settings(flags))
        assert learner.net.calls == [(512, False, False), (88, False, False)]
        close(probs, expected)
        close(torch.stack(learner.losses), torch.stack(history[-5:]))
        close(clean_prob, w, 1e-3)

@pytest.mark.parametrize("count, batch, clean, tenth", [
    (5, 9, 0, 2), (35, 9, 2, 3), (49, 9, 3, 4), (9, 9, 2, 0), (40, 2, 2, 0)])
def test_split_data_takes_the_lowest_tenth(count, batch, clean, tenth, monkeypatch, capsys):
    given = torch.where(torch.arange(count) < clean, 0.8, 0.5)  # 0.5 is not clean.
    monkeypatch.setattr(C, "clean_probability", lambda history: given)
    learner = small_learner(settings())
    _, w = C.split_data(learner, SmallData(count), settings(f"--batch-size {batch}"))
    lowest = learner.losses[-1].argsort()[:tenth].tolist()
    close(w, [float(i in lowest) for i in range(count)] if tenth else given)
    numbers = re.findall(r"\d+", capsys.readouterr().out)
    assert numbers == ([str(clean), str(tenth)] if tenth else [])

# (7) Co-pseudo-labeling, sharpening, mixup -------------------------------------------------
def test_sharpen_by_hand():
    close(C.sharpen(torch.tensor([[0.6, 0.3, 0.1]]), 0.5), [[36 / 46, 9 / 46, 1 / 46]])
    close(C.sharpen(torch.tensor([[0.36, 0.64, 0]]), 2), [[3 / 7, 4 / 7, 0]])
    close(C.sharpen(torch.tensor([[1e-30, 5e-31, 0]]), 0.5), [[0.8, 0.2, 0]])

@pytest.mark.parametrize("partner, w, temperature, expected", [
    ([0.2, 0.6, 0.2], 0, 1, [0.5, 0.1, 0.4]), ([0.2, 0.6, 0.2], 0.8, 1, [0.3, 0.62, 0.08]),
    ([0.2, 0.6, 0.2], 1, 0.5, [0.1, 0.9, 0]), ([0, 0, 1.0], 1, 0.5, [0.5, 0.5, 0])])
def test_refine_labels_by_hand(partner, w, temperature, expected):
    own = torch.tensor([[0.5, 0.1, 0.4]] * 2)
    sets = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    both = torch.tensor([partner, [0, 0, 1.0]])  # In the last case both sets exclude the rest.
    labels = C.refine_labels(own, both, sets, torch.tensor([w, 1]), temperature)
    close(labels, [expected, [0, 0, 1.0]])

def test_draw_mixup_draws_the_larger_part_of_beta_4_4_and_an_order():
    lams, orders = zip(*[C.draw_mixup(7) for _ in range(2000)])
    assert min(lams) >= 0.5
    assert abs(np.mean(lams) - (1 / 2 + 35 / 256)) < 0.008
    assert {tuple(order.sort()[0].tolist()) for order in orders} == {(0, 1, 2, 3, 4, 5, 6)}
    assert len({str(order) for order in orders}) > 1000

@pytest.mark.parametrize("epoch, expected", [(0, 0), (10.5, 1 / 32), (26, 1), (99, 1)])
def test_ramp_up_by_hand(epoch, expected):
    assert C.ramp_up(epoch, 10) == expected
    assert C.ramp_up(10 + (epoch - 10) / 2, 10, length=8) == expected

def oracle_self_training(logits, targets, n, weight_u):
    """Eq. 8, row by row; the first n are clean."""
    rows = list(zip(logits, targets))
    losses = [-(y * row.log_softmax(0)).sum() for row, y in rows[:n]]
    errors = [((row.softmax(0) - y) ** 2).mean() for row, y in rows[n:]]
    return sum(losses) / n + weight_u * sum(errors) / max(1, len(errors))

# (8) Prototype EMA alignment ---------------------------------------------------------------
def oracle_prototypes(prototypes, embeddings, classes, momentum):
    moved = prototypes.clone()
    for z, k in zip(embeddings, classes):
        moved[k] = momentum * moved[k] + (1 - momentum) * z
    return torch.stack([row / max(row.norm(), 1e-12) for row in moved])

@pytest.mark.parametrize("num_u", [0, 2])
def test_prototype_loss_has_the_gradient_of_the_published_formula(num_u):
    similarity = torch.randn(3 + num_u, 4, requires_grad=True)
    a = torch.cat([torch.eye(4)[:3], random_probs(num_u, 4)])
    b = random_probs(3 + num_u, 4)
    published = 0
    for i, row in enumerate(similarity):
        q = (row / 0.3).softmax(0)
        for lam, y in ((0.8, a[i]), (0.2, b[i])):
            if i < 3:  # KL divergence
                published += lam * sum(t * (t / p).log() for t, p in zip(y, q) if t > 0) / 3
            else:
                published += 0.5 * lam * ((q - y) ** 2).mean() / num_u
    y = 0.8 * a + 0.2 * b
    loss = C.prototype_loss(similarity[:3], y[:3], similarity[3:], y[3:], 0.5)
    close(*[torch.autograd.grad(value, similarity)[0] for value in (loss, published)])

# (9) MoCo queue, noisy supervised contrastive loss -----------------------------------------
def test_contrastive_masks_by_hand():
    # Two anchors of class 0, clean and not; their keys; the queue: 0 clean, 0 not, 1 clean.
    classes = torch.tensor([0, 0, 0, 0, 0, 0, 1])
    clean = torch.tensor([1, 0, 1, 0, 1, 0, 1]).bool()
    positives, ignored = C.contrastive_masks(classes, clean, 2)
    assert positives.int().tolist() == [[1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    assert ignored.int().tolist() == [[0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1, 0]]

def oracle_contrast(features, classes, clean, num_anchors, temperature):
    """Eq. 11 with its masks, entry by entry."""
    loss = 0
    for i in range(num_anchors):
        total = 0
        positives = []
        for j in range(len(features)):
            own_key = j == i + num_anchors
            same = classes[i] == classes[j]
            ignored = same and not own_key and not (clean[i] and clean[j])
            if j != i and not ignored:
                similarity = features[i] @ features[j] / temperature
                total = total + similarity.exp()
                positives += [similarity] if same or own_key else []
        loss = loss + sum(total.log() - s for s in positives) / len(positives) / num_anchors
    return loss

@pytest.mark.parametrize("queued", [0, 6])
@pytest.mark.parametrize("clean_share", [0, 0.6, 1])
def test_supcon_loss_equals_the_oracle_inside_autocast_too(queued, clean_share):
    features = unit_rows(8 + queued, 3).requires_grad_()
    rows = [0, 1, 2, 3, *range(4 + queued)]  # A key has the class and the flag of its anchor.
    classes = torch.randint(3, (4 + queued,))[rows]
    clean = (torch.rand(4 + queued) < clean_share)[rows]
    masks = C.contrastive_masks(classes, clean, 4)
    expected = oracle_contrast(features, classes, clean, 4, 0.2)
    expected_grad = torch.autograd.grad(expected, features)[0]
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss = C.supcon_loss(features, *masks, 0.2)
        assert loss.dtype == torch.float32
        close(loss, expected)
        close(torch.autograd.grad(loss, features)[0], expected_grad)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_and_labels_of_half_inputs_are_finite(dtype):
    logits = torch.tensor([[3e4, -3e4, 0], [9, 8, 7]], dtype=dtype, requires_grad=True)
    probs = torch.tensor([[1, 0, 0], [1e-7, 0.5, 0.5]], dtype=dtype)
    sets = torch.tensor([[0, 1, 0], [1, 1, 0]]).bool()
    z = F.normalize(torch.rand(3000, 3) + 0.1).to(dtype).requires_grad_()
    positives = torch.ones(2, 3000, dtype=torch.bool)
    losses = [
        C.partial_cross_entropy(logits, sets), C.negative_entropy(logits),
        C.self_training_loss(logits, probs, logits, probs, 1),
        C.prototype_loss(z[:2], probs, z[:2], probs, 1),
        C.supcon_loss(z, positives, ~positives, 0.07)]
    sum(losses).backward()
    others = [
        logits.grad, z.grad, C.align_distribution(probs, probs.mean(0), probs[1]),
        C.max_candidate_loss(probs, sets), C.sharpen(probs, 0.5),
        C.clean_probability(torch.tensor([[0.1, 0.2, 9, 8]], dtype=dtype)),
        C.refine_labels(probs, probs, sets, probs[:, 0], 0.5), C.guess_labels(probs[None], 1),
        C.update_prototypes(probs, probs, torch.tensor([0, 0]), 0.9)]
    assert all(values.isfinite().all() for values in losses + others)

# (10) Evaluation ---------------------------------------------------------------------------
def test_clean_shares_by_hand():
    probs = torch.tensor([[0.6, 0.3, 0.1, 0]] * 5 + [[0.1, 0.2, 0.7, 0]] * 2)
    sets = torch.ones(7, 4, dtype=torch.bool)
    sets[3:5, 0] = False  # The likeliest labels within the sets: 0 0 0 1 1 2 2.
    w = torch.tensor([0.9, 0.5, 0.1, 0.6, 0.7, 0.2, 0.5])  # 0.5 is not clean.
    close(C.clean_shares((probs, w), sets), [100 / 3, 100, 0, 0])

def test_evaluate_by_hand():
    learners = [small_learner(settings()), small_learner(settings())]
    data = SmallData(4)
    data.mean, data.std = torch.tensor([0.4, 0.3]).view(2, 1, 1, 1, 1)
    data.candidates = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()
    labels = torch.tensor([0, 1, 0, 2])
    images = torch.randint(256, (6, 1, 2, 2)).byte()
    logits = sum(learner.net((images / 255 - 0.4) / 0.3)[0] for learner in learners)
    test_labels = (logits.argmax(1) + (torch.arange(6) < 3)) % 3
    figures = C.evaluate(learners, data, labels, (images, test_labels), "abc")
    assert figures == {"test_acc": 50}
    assert [learner.net.calls[1] for learner in learners] == [(6, False, False)] * 2
    probs = torch.tensor([[0.5, 0.3, 0.2]] * 4)  # Classes within the sets: 0 1 1 2.
    learners[0].split = (probs, torch.tensor([0.9, 0.9, 0.9, 0.9]))
    learners[1].split = (probs, torch.tensor([0.9, 0.1, 0.6, 0.1]))
    assert C.evaluate(learners, data, labels, None, "abc") == {
        "clean": 3, "least_clean": 50, "least_class": "c", "split_precision": 62.5}
    assert "split_precision" not in C.evaluate(learners, data, labels - 1, None, "abc")

# (11) Training -----------------------------------------------------------------------------
def fixed_mixup(count):
    return 0.5 + count / 30, torch.arange(count).roll(3)

def oracle_epoch(net, partner, split, prototypes, queue, data, cfg, batches):
    """Epoch 5 of co-training in loops over samples; the network is trained.
    -> sums of the terms, prototypes, key encoder, the queue [keys, classes, clean]."""
    optimizer = torch.optim.SGD(net.parameters(), cfg.lr, 0.9)
    key_net = copy.deepcopy(net)
    sums = Counter()
    for step, (x, u) in enumerate(batches):
        rows = [*x, *x, *u, *u]
        n = 2 * len(x)
        weak = data.weak(rows)
        strong = data.strong(rows)
        with torch.no_grad():
            p, q = [model(weak)[0].softmax(1) for model in (net, partner)]
        # Targets of the first and second views, which stand at i and j.
        first = [*range(len(x)), *range(n, n + len(u))]
        second = [i for i in range(len(rows)) if i not in first]
        y = {}
        for i, j in zip(first, second):
            target = (p[i] + p[j] + q[i] + q[j]) / 4
            if i < n:
                r = split[0][rows[i]] * data.candidates[rows[i]]
                w = split[1][rows[i]]
                target = w * r / r.sum() + (1 - w) * (p[i] + p[j]) / 2
            target = target ** (1 / cfg.temperature)
            y[i] = target / target.sum()
            y[j] = y[i]
        classes = [y[i].argmax().item() for i in first]
        clean = [i < n or "supcon" in cfg.ablate for i in first]
        # Self-training and prototypes, on mixed images.
        lam, order = fixed_mixup(len(rows))
        lam = 1 if "mixup" in cfg.ablate else lam
        logits, z = net(lam * strong + (1 - lam) * strong[order])
        targets = [lam * y[i] + (1 - lam) * y[j] for i, j in enumerate(order.tolist())]
        weight_u = cfg.lambda_u * (5 + step / len(batches) - cfg.warm_up) / 16
        terms = {"self": oracle_self_training(logits, targets, n, weight_u)}
        if "prototype" not in cfg.ablate:
            z_x = net(weak)[1][: len(x)].detach()
            prototypes = oracle_prototypes(prototypes, z_x, classes, cfg.momentum)
            logits = z @ prototypes.T / 0.3
            loss = oracle_self_training(logits, targets, n, cfg.lambda_u)
            terms["prototype"] = cfg.proto_weight * loss
        for theta_key, theta in zip(key_net.parameters(), net.parameters()):
            theta_key.data = cfg.momentum * theta_key + (1 - cfg.momentum) * theta.detach()
        keys = key_net(strong[second])[1].detach()
        features = torch.cat([net(strong[first])[1], keys, queue[0]])
        entries = (features, classes + classes + queue[1], clean + clean + queue[2])
        loss = oracle_contrast(*entries, len(first), 0.07)
        terms["contrastive"] = cfg.contrastive_weight * loss
        queue = [torch.cat([queue[0], keys]), queue[1] + classes, queue[2] + clean]
        queue = [part[-7:] for part in queue]
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        sums.update({name: term.item() for name, term in terms.items()})
    return sums, prototypes, key_net, queue

@pytest.mark.parametrize("ablate", ["", "supcon", "prototype", "unlabeled", "mixup", "co-pl"])
def test_co_train_epoch_of_two_batches_equals_the_oracle(ablate, monkeypatch):
    monkeypatch.setattr(C, "random_batches", lambda rows, batch_size: rows.split(batch_size))
    monkeypatch.setattr(C, "draw_mixup", fixed_mixup)
    cfg = settings(ablate and f"--ablate {ablate}")
    data = SmallData(10)
    learner = small_learner(cfg)
    learner.queue.push(unit_rows(4, 5), torch.tensor([0, 1, 2, 0]), torch.arange(4) > 1)
    partner = learner if ablate == "co-pl" else small_learner(cfg)
    w = torch.tensor([0.9, 0.5, 0.6, 1, 0, 0.7, 0.1, 0.8, 0.2, 0.3])  # 0.5 is not clean.
    partner.split = (random_probs(10, 3), w)
    prototypes = unit_rows(3, 5)
    batches = [([0, 2, 3], [1, 4, 6]), ([5, 7], [8, 9])]
    if ablate == "unlabeled":
        batches = [(x, []) for x, _ in batches]
    net = copy.deepcopy(learner.net)
    partner_net = net if ablate == "co-pl" else partner.net
    queue = [learner.queue.keys, [0, 1, 2, 0], [False, False, True, True]]
    sums, moved, key_net, queue = oracle_epoch(
        net, partner_net, partner.split, prototypes, queue, data, cfg, batches)
    terms = C.co_train_epoch(learner, partner, prototypes, data, cfg, 5)
    assert terms == pytest.approx({name: total / 2 for name, total in sums.items()}, 1e-4)
    actual = [*learner.net.parameters(), *learner.key_net.parameters(), prototypes]
    actual += [learner.queue.keys, learner.queue.classes, learner.queue.clean]
    expected = [*net.parameters(), *key_net.parameters(), moved, *queue]
    for value, target in zip(actual, expected):
        close(value, target, 1e-4)

def test_co_train_epoch_passes_each_weak_view_once_and_in_the_right_mode():
    learner, partner = [small_learner(settings()) for _ in range(2)]
    partner.split = (random_probs(5, 3), torch.tensor([1, 0, 1, 0, 1]))
    learner.net.eval()
    C.co_train_epoch(learner, partner, torch.zeros(3, 5), SmallData(5), settings(), 5)
    weak = [(2, True, False), (2, True, False), (3, True, False), (3, True, False)]
    assert learner.net.calls == [*weak, (10, True, True), (5, True, True)]
    assert learner.key_net.calls == [(5, True, False)]
    assert {call[1:] for call in partner.net.calls} == {(False, False)}
    assert sum(call[0] for call in partner.net.calls) == 4
    for net in (partner.net, learner.key_net):
        assert all(weight.grad is None for weight in net.parameters())

@pytest.mark.parametrize("clean, other", [(2, 0), (2, 1), (9, 8), (9, 9), (3, 30), (17, 2)])
def test_co_train_epoch_finite_at_the_edge(clean, other):
    """Batches of one row, no or one unlabeled sample, prototypes all 0, an empty queue."""
    cfg = settings("--batch-size 8")
    learner, partner = [C.Learner(3, cfg, "cpu") for _ in range(2)]
    partner.split = (random_probs(clean + other, 3), torch.tensor([1.0] * clean + [0] * other))
    prototypes = torch.zeros(3, 128)
    data = make_data(make_pictures(clean + other, 1, 8), "")
    terms = C.co_train_epoch(learner, partner, prototypes, data, cfg, 5)
    assert sorted(terms) == ["contrastive", "prototype", "self"]
    values = [torch.tensor([*terms.values()]), prototypes, *learner.net.parameters()]
    assert all(value.isfinite().all() for value in values)

def test_cosine_lr_by_hand():
    assert C.cosine_lr(0, 0.2, 20) == pytest.approx(0.2)
    assert C.cosine_lr(5, 0.2, 20) == pytest.approx(2e-4 + 0.1998 * (2 + math.sqrt(2)) / 4)
    assert C.cosine_lr(20, 0.2, 20) == C.cosine_lr(35, 0.2, 20) == pytest.approx(2e-4)

@pytest.mark.parametrize("flags, partners, period", [
    ("--lr-period 0", [1, 0], 3), ("--lr-period 8 --ablate co-pl", [0, 1], 8)])
def test_train_epoch_gives_each_network_its_split(flags, partners, period, monkeypatch):
    cfg = settings(f"--epochs 3 {flags}")
    learners = [small_learner(cfg), small_learner(cfg)]
    used = []
    def co_train_epoch(learner, partner, prototypes, data, cfg, epoch):
        used.append([learners.index(learner), partner.split])
        assert learners[1].split is not None  # Both networks split before one of them learns.
        assert learner.optimizer.param_groups[0]["lr"] == C.cosine_lr(epoch, cfg.lr, period)
        return {"self": 2.0 + learners.index(learner)}
    monkeypatch.setattr(C, "split_data", lambda learner, data, cfg: learners.index(learner))
    monkeypatch.setattr(C, "co_train_epoch", co_train_epoch)
    monkeypatch.setattr(C, "warm_up_epoch", lambda learner, data, cfg: {"set": 1.0})
    assert C.train_epoch(learners, None, None, cfg, 0) == {"set": 1}
    assert C.train_epoch(learners, None, None, cfg, 1) == {"self": 2.5}
    assert used == [[0, partners[0]], [1, partners[1]]]

# (12) Whole runs ---------------------------------------------------------------------------
COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
FLAGS = """--image-size 16 --width 4 --batch-size 8 --epochs 4 --warm-up 1 --lr 0.05
    --start-contrastive 0 --queue-size 64 --momentum 0.9 --device cpu --precision fp32"""
NEED_LABELS = {"test_acc", "split_precision"}

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """36 small photos of three colours with noise, and 9 more to test with."""
    root = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        for i in range(15):
            pixels = colour + np.random.default_rng(i).integers(-25, 25, (12, 10, 3))
            part = "train" if i < 12 else "test"
            write(root / part / name / f"{i:02}.png", pixels.astype(np.uint8))
    return root

@pytest.fixture(scope="module")
def words(photos, small_clip):
    """The words of a small run, as a list."""
    argv = ["--dataset", "folder", "--data-dir", str(photos), "--output-dir", "run"]
    return [*argv, *small_clip, *FLAGS.split()]

@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert C.main([*words, "--output-dir", str(folder)]) == 0
    return folder

def metrics(folder, left_out=frozenset()):
    """The records of a run without what the clock says."""
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]
    assert all(record.pop("seconds") >= 0 for record in records)
    return [{k: v for k, v in record.items() if k not in left_out} for record in records]

def forbid_clip(monkeypatch):
    monkeypatch.setattr(C, "load_clip", lambda *args: pytest.fail("CLIP was loaded"))

def test_main_writes_three_files_and_records_every_epoch(finished):
    assert {*os.listdir(finished)} == {"annotations.npz", "checkpoint.pt", "metrics.jsonl"}
    probs = np.load(finished / "annotations.npz")["probs"]
    assert (probs.shape, probs.dtype) == ((27, 36, 3), np.float32)
    terms = [{"set", "entropy"}, {"self"}] + 2 * [{"self", "prototype", "contrastive"}]
    split_names = {"clean", "least_clean", "least_class", "split_precision"}
    for i, (record, names) in enumerate(zip(metrics(finished), terms, strict=True)):
        others = set(record) - names - {"epoch", "phase", "loss"}
        assert others == {"test_acc"} | (split_names if i else set())
        assert all(0 <= record[name] <= 100 for name in others - {"least_class"})
        assert record["loss"] == pytest.approx(sum(record[name] for name in names))
        phase = "co-train" if i else "warm-up"
        assert (record["epoch"], record["phase"]) == (i + 1, phase)
        assert 0 < record.get("clean", 1) <= 36
        assert record.get("least_class", "red") in COLOURS

def test_main_prints_a_log_with_labels(words, capsys):
    assert C.main([*words, "--epochs", "2"]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("split: ")]
    *head, note, title, first, second, end, result = lines
    assert head[:3] == ["folder: 36 training, 9 test images, on cpu",
                        "3 classes: blue, green, red", "results go to run"]
    assert [line.split(":")[0] for line in head[3:]] == [
        "candidate sets", "sets without the true label*",
        "the annotator, the mean of its templates, is right in*"]
    assert note.startswith("note: an epoch has fewer than 20 steps")
    assert title.split() == "epoch phase loss clean test% right*% seconds least clean".split()
    one, two = C.read_checkpoint("run")["records"]
    cells = f"{one['loss']:7.4f}       - {one['test_acc']:7.1f}       - {one['seconds']:7.1f}"
    assert first == f"    1  warm-up {cells}"
    cells = [two[name] for name in ("clean", "test_acc", "split_precision", "seconds")]
    cells = " ".join(f"{cell:7.1f}" for cell in cells)
    health = f"{two['least_clean']:.0f} % of {two['least_class']}"
    assert second == f"    2 co-train {two['loss']:7.4f} {cells}  {health}"
    assert end == "finished after epoch 2, files in run"
    assert result == f"result: {two['test_acc']:.1f} % of test images right"

def test_main_counts_the_images_that_can_be_read(words, photos, capsys):
    shutil.copytree(photos, "p")
    write(Path("p/test/red/13.png"), b"junk")
    write(Path("p/train/red/03.png"), b"junk")
    assert C.main([*words, "--data-dir", "p", "--epochs", "1"]) == 0
    assert "folder: 35 training, 8 test images" in capsys.readouterr().out
    assert np.load("run/annotations.npz")["probs"].shape == (27, 35, 3)

def test_main_refuses_a_photo_that_fails_only_later(words, photos, monkeypatch, capsys):
    """Else rows of P and of the images would not belong together: 07 takes the place of 03."""
    shutil.copytree(photos, "p")
    write(Path("p/train/green/03.png"), b"junk")
    real = C.load_clip
    def load_clip(*args):
        Path("p/train/green/07.png").replace("p/train/green/03.png")
        return real(*args)
    monkeypatch.setattr(C, "load_clip", load_clip)
    assert C.main([*words, "--data-dir", "p"]) == 2
    one_line(capsys, "cannot be read now")
    assert not any(Path("run").iterdir())

def test_main_other_seed_other_numbers(words, finished):
    assert C.main([*words, "--seed", "1"]) == 0
    assert metrics("run")[0] != metrics(finished)[0]

@pytest.mark.parametrize("flags", [[], ["--classes", "blue,green,red"]])
def test_main_never_trains_on_labels(flags, words, photos, finished, capsys):
    """The same images in the same order, below folders of which many name a wrong class."""
    for i, path in enumerate(sorted((photos / "train").rglob("*.png"))):
        name = "blue" if i < 6 else "green" if i < 30 else "red"
        write(Path("p", "train", name, f"{i:02}.png"), path.read_bytes())
    assert C.main([*words, "--data-dir", "p", *flags]) == 0
    assert metrics("run", NEED_LABELS) == metrics(finished, NEED_LABELS)
    out = capsys.readouterr().out
    assert "36 training, 0 test images" in out
    assert ("*:" in out) == (not flags)  # * marks what needs labels.
    lines = [line.split() for line in out.splitlines() if not line.startswith("split: ")]
    *_, first, second, third, fourth, end = lines
    assert [first[3:6], fourth[4], fourth[-2]] == [["-", "-", "-"], "-", "of"]
    assert (fourth[5] == "-") == ("split_precision" not in metrics("run")[-1]) == bool(flags)
    assert end == "finished after epoch 4, files in run".split()

@pytest.mark.parametrize("parts", [
    "co-pl", "supcon", "prototype", "unlabeled", "mixup", "alignment", "split", "split mixup"])
def test_main_each_ablation_changes_the_numbers(parts, words, finished):
    assert C.main([*words, "--ablate", *parts.split()]) == 0
    assert metrics("run")[0] == metrics(finished)[0]
    assert metrics("run")[1:] != metrics(finished)[1:]
    assert ("prototype" in metrics("run")[-1]) == ("prototype" not in parts)
    assert (metrics("run")[-1]["clean"] == 36) == ("split" in parts)

@pytest.mark.parametrize("rated, size", [(36, "1.00"), (5, "2.72"), (0, "3.00")])
def test_main_warm_up_to_the_end_on_a_file_of_votes(rated, size, words, monkeypatch, capsys):
    forbid_clip(monkeypatch)
    probs = np.eye(3)[None, np.arange(36) // 12]  # the true labels
    probs[:, rated:] = 0  # Of the other images nobody says anything.
    np.savez("votes.npz", probs=probs)
    assert C.main([*words, "--annotations", "votes.npz", "--warm-up", "4"]) == 0
    said = capsys.readouterr().out
    assert f"candidate sets: {size} labels" in said
    assert "without the true label*: 0.00 %" in said
    assert ("right in*: 100.00 %" in said) == ("right in" in said) == (rated > 0)
    for record in metrics("run"):
        assert record["phase"] == "warm-up"
        assert record["loss"] == pytest.approx(record["set"] + record["entropy"])

def test_main_synthetic_makes_sets_that_a_resume_keeps(words, monkeypatch, capsys):
    forbid_clip(monkeypatch)
    assert C.main([*words, "--synthetic", "0.5", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "without the true label*" in said
    assert "annotator" not in said
    probs = np.load("run/annotations.npz")["probs"]
    for epochs in (5, 6):
        assert C.main(["--resume", "run", "--epochs", str(epochs)]) == 0
        assert len(metrics("run")) == epochs
    assert (np.load("run/annotations.npz")["probs"] == probs).all()

@pytest.mark.parametrize("name, number, left", [
    ("warm_up_epoch", 1, 0), ("co_train_epoch", 1, 1), ("co_train_epoch", 6, 3)])
def test_main_resumes_after_ctrl_c(name, number, left, words, finished, monkeypatch, capsys):
    """It strikes at the end of the given call of a function; then the folder is moved."""
    real = getattr(C, name)
    calls = []
    def stopped(*args):
        calls.append(real(*args))
        if len(calls) == number:
            raise KeyboardInterrupt
        return calls[-1]
    monkeypatch.setattr(C, name, stopped)
    assert C.main(words) == 130
    one_line(capsys, "interrupted", "--resume run")
    assert len(metrics("run")) == left
    forbid_clip(monkeypatch)
    Path("run").rename("moved")
    assert C.main(["--resume", "moved"]) == 0
    assert metrics("moved") == metrics(finished)
    assert not Path("run").exists()

def test_main_resume_of_a_finished_run_changes_nothing_and_takes_more_epochs(finished, capsys):
    shutil.copytree(finished, "run")
    before = contents()
    for flags in ([], ["--epochs", "1", "--lr", "0.5"]):
        assert C.main(["--resume", "run", *flags]) == 0
        assert "finished after epoch 4" in capsys.readouterr().out
        assert contents() == before
    assert C.main(["--resume", "run", "--epochs", "5", "--balance"]) == 0
    assert metrics("run")[:-1] == metrics(finished)
    assert C.read_checkpoint("run")["settings"]["balance"]

@pytest.mark.parametrize("flags, text", [
    ("--resume run --data-dir p", "--data-dir p"), ("--resume run --device tpu", "tpu"),
    ("--resume run --data-dir q", "--data-dir q"), ("--output-dir run", "--resume"),
    ("--output-dir mine", "annotations.npz"), ("--resume nowhere", "nowhere")])
def test_main_refuses_what_does_not_fit_the_run(flags, text, finished, photos, capsys):
    shutil.copytree(finished, "run")
    shutil.copytree(photos / "train", "p/train")
    shutil.copytree(photos / "train", "q/train")
    shutil.copy("p/train/red/03.png", "p/train/green/03.png")  # p: one other image
    Path("q/train/red").rename("q/train/rose")  # q: one other name
    write(Path("mine/annotations.npz"), b"somebody's")
    refused(capsys, flags.split(), text)

def test_main_resume_of_a_damaged_run_ends_in_one_line(finished, capsys):
    content = Path(finished, "checkpoint.pt").read_bytes()
    torch.save({"learners": [], "records": []}, "older.pt")
    for damaged in (b"", content[:-99], b'{"dim": 2}', Path("older.pt").read_bytes()):
        write(Path("run/checkpoint.pt"), damaged)
        refused(capsys, ["--resume", "run"], "run/checkpoint.pt")

def test_main_refuses_a_closed_place_before_it_annotates(words, monkeypatch, capsys):
    """Root may write everywhere, so the system's answers are made up."""
    forbid_clip(monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "run")
    refused(capsys, words, "run", "may be written")
    Path("file").write_bytes(b"")
    refused(capsys, [*words, "--output-dir", "file/run"], "file")

def test_main_shows_the_head_of_the_log_before_a_long_pass(words, monkeypatch):
    """What a log file holds when CLIP is loaded, while Python still buffers it."""
    monkeypatch.setattr(C, "load_clip", lambda *args: pytest.fail(Path("log").read_text()))
    with open("log", "w") as log, pytest.raises(pytest.fail.Exception, match="\nresults go"):
        monkeypatch.setattr(sys, "stdout", log)
        C.main(words)

def test_main_second_of_two_runs_for_one_folder_is_refused(words, monkeypatch, capsys):
    """The first run starts and ends while the second one annotates."""
    real = C.annotate
    seen = []
    def slow(*args):
        monkeypatch.setattr(C, "annotate", real)
        assert C.main([*words, "--epochs", "1"]) == 0
        seen.append(contents())
        return real(*args)
    monkeypatch.setattr(C, "annotate", slow)
    assert C.main([*words, "--seed", "1"]) == 2
    one_line(capsys, "run/annotations.npz")
    assert contents() == seen[0]

def test_main_names_the_epoch_of_a_loss_that_is_not_finite(words, capsys):
    assert C.main([*words, "--epochs", "9", "--lr", "1e9"]) == 2
    [epoch] = re.findall(r"^coreg.py: epoch (\d).*--lr\n$", capsys.readouterr().err)
    assert len(metrics("run")) == int(epoch) - 1
    assert C.main(["--resume", "run", "--lr", "0.01", "--epochs", str(epoch)]) == 0

def test_main_names_weights_that_end_not_finite(words, monkeypatch, capsys):
    real = C.train_epoch
    def train_epoch(learners, *args):
        terms = real(learners, *args)
        with torch.no_grad():
            learners[1].net.fc.bias[0] = math.inf
        return terms
    monkeypatch.setattr(C, "train_epoch", train_epoch)
    assert C.main(words) == 2
    one_line(capsys, "epoch 1", "finite")
    assert metrics("run") == []

def test_main_full_disk_keeps_the_checkpoint(words, finished, monkeypatch, capsys):
    real = Path.write_bytes
    def full(path, content):
        if "checkpoint" in path.name and len(metrics("run")) == 3:
            real(path, bytes(content)[:99])
            raise OSError(28, "No space left on device")
        real(path, content)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert C.main(words) == 2
    one_line(capsys, "run: ", "No space left")
    monkeypatch.setattr(Path, "write_bytes", real)
    assert len(C.read_checkpoint("run")["records"]) == 2
    assert C.main(["--resume", "run"]) == 0
    assert metrics("run") == metrics(finished)

def test_script_renamed_and_alone_resumes_after_a_kill(words):
    """A copy runs its own code where there is no coreg.py, and a kill costs no numbers."""
    source = Path(C.__file__).read_bytes()
    write(Path("alone/mine.py"), source.replace(b"candidate sets:", b"my own sets:"))
    argv = [*words, "--synthetic", "0.3", "0.1", "--epochs", "9"]
    process = subprocess.Popen([sys.executable, "mine.py", *argv], cwd="alone",
                               stdout=subprocess.PIPE, text=True)
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("    2 "):
            process.kill()
    assert process.wait() == -9
    assert "my own sets:" in said
    assert len(metrics("alone/run")) < 9
    assert C.main(["--resume", "alone/run"]) == 0
    assert C.main(argv) == 0
    assert metrics("alone/run") == metrics("run")

def test_load_classifier_takes_every_mode_and_size(finished):
    names, classify = C.load_classifier(finished)
    assert names == ["blue", "green", "red"]
    square = two_colours().crop((16, 0, 48, 32))
    images = [square, two_colours(), Image.new("RGB", (1, 1)), Image.new("RGB", (300, 2))]
    images += [two_colours(mode) for mode in "1 L LA P RGBA CMYK HSV".split()]
    probs = classify(images)
    assert probs.dtype == torch.float32
    close(probs.sum(1), torch.ones(11))
    close(probs[1], probs[0])  # A photo counts as its centre square.

def test_main_digits_from_annotation_to_classifier(capsys):
    argv = "--epochs 3 --warm-up 1 --width 4 --start-contrastive 0 --num-samples 200"
    argv += " --batch-size 10 --device cpu --output-dir run"
    assert C.main(argv.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits: 200 training, 359 test images")
    assert not any(line.startswith("note") for line in lines[-6:])
    accuracy = metrics("run")[-1]["test_acc"]
    assert lines[-1] == f"result: {accuracy:.1f} % of test images right"
    _, test, _ = C.read_dataset(C.parse([]))
    _, classify = C.load_classifier("run")
    classes = classify([image for image, _ in test]).argmax(1).tolist()
    right = [k == label for k, (_, label) in zip(classes, test)]
    assert 100 * sum(right) / 359 == pytest.approx(accuracy)

def test_load_holds_few_photos_at_once(monkeypatch):
    """One in each of four threads; and a batch comes before the next one is read."""
    held = weakref.WeakSet()
    most = []
    def open_image(path):
        photo = torch.zeros(1)
        held.add(photo)
        most.append(len(held))
        return photo
    monkeypatch.setattr(C, "open_image", open_image)
    batches = C.load([(Path("photo"), 0)] * 600, lambda photo: photo + 1)
    seen = [(len(images), len(most)) for _, images, _ in batches]
    assert seen == [(256, 256), (256, 512), (88, 600)]
    assert max(most) <= 4

# (13) TinyCLIP -----------------------------------------------------------------------------
def test_TinyCLIP_gives_the_same_sets_on_every_machine():
    train, _, names = C.read_dataset(C.parse([]))
    clip = C.load_clip("tiny", "", "cpu")
    probs = C.annotate(clip, train, names, C.TEMPLATES["digits"], "cpu")
    assert zlib.crc32(np.packbits(C.candidate_sets(probs).numpy())) == 778879908
    right = [k == label for k, (_, label) in zip(probs.mean(0).argmax(1).tolist(), train)]
    assert 0.5 < np.mean(right) <= 0.8  # One that is nearly always right would show nothing.

# The benchmark: python test_coreg.py --help ------------------------------------------------
def timed_functions(module, args, words):
    """What is timed of a coreg.py, on random images with a made-up split."""
    cfg = module.parse(words)
    images = make_pictures(max(args.images, 256), cfg.channels, cfg.image_size).to(cfg.device)
    candidates = (torch.arange(10) < 3).repeat(args.images, 1).to(cfg.device)
    data = module.WeakStrongImages(images[: args.images], candidates, cfg)
    both = [module.Learner(10, cfg, cfg.device) for _ in range(2)]
    is_clean = torch.arange(args.images) < args.clean
    both[1].split = (candidates / 3, is_clean.float().to(cfg.device))
    prototypes = torch.zeros(10, 128, device=cfg.device)
    epoch = cfg.warm_up + args.representation * (cfg.start_contrastive + 1)
    functions = {
        "co_train_epoch": partial(module.co_train_epoch, *both, prototypes, data, cfg, epoch),
        "split_data": partial(module.split_data, both[0], data, cfg),
        "warm_up_epoch": partial(module.warm_up_epoch, both[0], data, cfg)}
    for count in (1, 256):
        inputs = (images[:count], data.mean, data.std)
        functions[f"predict {count}, one network"] = partial(module.predict, both[:1], *inputs)
        functions[f"predict {count}, both"] = partial(module.predict, both, *inputs)
    return functions

def benchmark():
    """Times one network. Other flags: of coreg.py; else --dataset cifar10 --batch-size 128."""
    parser = argparse.ArgumentParser(description=benchmark.__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--clean", type=int, default=204, help="of the images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--representation", action="store_true", help="with Eq. 9 to 11")
    parser.add_argument("--old", help="another coreg.py, timed in turns with this one")
    args, words = parser.parse_known_args()
    if "--dataset" not in words:
        words = ["--dataset", "cifar10", "--batch-size", "128", *words]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    functions = timed_functions(C, args, words)
    if args.old:
        spec = importlib.util.spec_from_file_location("old", args.old)
        sys.modules["old"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["old"])
        functions["old"] = timed_functions(sys.modules["old"], args, words)["co_train_epoch"]
    times = {name: [] for name in functions}
    for _ in range(args.repeats + 1):  # in turns, for a busy machine; the first is a warm-up
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    seconds = {name: np.median(values[1:]) for name, values in times.items()}
    result = {"clean images per second": args.clean / seconds["co_train_epoch"],
              "ratio to --old": args.old and seconds["co_train_epoch"] / seconds["old"]}
    print(json.dumps(vars(args) | result | {"seconds": seconds}, indent=1))

if __name__ == "__main__":
    benchmark()
