# SPDX-License-Identifier: MIT
"""Co-Reg: a small image classifier from unlabeled images and a vision-language model.

CLIP labels every image once per prompt template. These labels are the image's candidate set,
clean if it holds the true one. Two networks pick out the clean sets for each other: the method
of "Pre-Trained Vision-Language Models as Partial Annotators" (arXiv 2406.18550, AAAI 2025).

    python coreg.py                    # digits: 91 % in a minute; its CLIP draws (section 13)
    python coreg.py --dataset cifar10  # the paper's setting, with OpenAI's CLIP ViT-B/32

"Eq. 5" and headings in quotes: the AAAI paper's. "Published code": in the authors' code alone.
"DIFFERS": this file departs from that code, and why. Contents: grep "^# (" coreg.py
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import sys
import time
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import TarError
from zipfile import BadZipFile

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

# Shapes in comments: N images, K classes, T prompt templates, B a batch, n some of N or B, V
# predictions, C channels, H side of an image, D embedding, E epochs; A, M: section 9. Endings
# of names: _x clean samples, _u unlabeled ones, _w1 _w2 weak views, _s1 _s2 strong views.

# (0) Settings ------------------------------------------------------------------------------
# A setting is a flag. Its value is the first that is found: on the command line, in the run to
# resume, in the preset of the data set (section 1), in the defaults below (for CIFAR-10).

class UserError(Exception):
    """A mistake that the user can mend: main() prints it in one line and returns 2."""

def between(kind, low, high=1e9):
    """A type for argparse, which names it "number" in errors: int or float, low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high:g}, got {text}")
        return value
    return number

def parse(argv):
    """Words of the command line -> settings. SystemExit(2), or UserError: bad --resume."""
    usage = "coreg.py [--flag value ...]; coreg.py --help shows all flags"
    parser = argparse.ArgumentParser("coreg.py", usage, add_help=False, allow_abbrev=False)

    def flag(name, default, kind, text, **more):
        text += " (%(default)s)"
        parser.add_argument(name, default=default, type=kind, help=text, **more)
    path = os.path.expanduser  # A type is a function of the word: this one replaces "~".
    ablations = "co-pl supcon prototype unlabeled mixup alignment split".split()
    flag("--dataset", "digits", str, "folder: your own photos", choices=PRESETS)
    flag("--data-dir", "data", path, "where data sets lie or are downloaded to")
    flag("--classes", None, str, "of a folder: cat,dog,...; its train/ is then unlabeled")
    flag("--num-samples", None, between(int, 2), "train on a random subset of N images")
    flag("--image-size", 32, between(int, 8), "side in pixels of what the networks see")
    flag("--channels", 3, int, "1: grey, 3: colour", choices=[1, 3])
    flag("--mirror", 1, int, "mirror views; 0 for text, digits, signs", choices=[0, 1])
    flag("--cutout", [0, 0.5], between(float, 0, 1), "of the side: least, most", nargs=2)
    flag("--annotations", None, path, "an .npz of probs [T,N,K], images sorted by path")
    flag("--synthetic", None, between(float, 0, 1), "sets made of TRUE labels: the chance of a"
         " wrong label to join, and that of the true one to be replaced", nargs=2)
    flag("--clip-model", "ViT-B-32-quickgelu", str, "a model of open_clip; or tiny")
    flag("--clip-pretrained", "openai", str, "open_clip's tag of the weights, or a file")
    flag("--templates", "small", str, "small, digits, or prompts: 'a {}; the {}'")
    flag("--epochs", 800, between(int, 1), "in all")
    flag("--warm-up", 50, between(int, 0), "epochs before the split; raise it for noisy sets")
    flag("--start-contrastive", 10, between(int, 0), "prototypes and contrast begin after this"
         " many epochs of co-training, plus one")
    flag("--batch-size", 256, between(int, 2), "clean images in a batch; N/20 or less")
    flag("--lr", 0.01, between(float, 0), "learning rate; lower it if the loss is not finite")
    flag("--lr-period", 800, between(int, 0), "epochs in which lr falls along a cosine: 800"
         " even for 100 epochs, as in the published code; 0: all epochs")
    flag("--width", 64, between(int, 1), "channels of the ResNet; 16 suits a CPU")
    flag("--temperature", 0.5, between(float, 0.01), "below 1 makes new labels surer")
    flag("--lambda-u", 1.0, between(float, 0), "weight of unlabeled images")
    flag("--proto-weight", 0.1, between(float, 0), "weight of the prototypes' loss")
    flag("--contrastive-weight", 0.1, between(float, 0), "weight of the contrastive loss")
    flag("--momentum", 0.999, between(float, 0, 1), "of prototypes and key encoders")
    flag("--queue-size", 8192, between(int, 1), "keys in each queue")
    flag("--ablate", [], str, "parts to leave out; split: all sets count as clean; supcon: in"
         " the contrast all samples count as clean", choices=ablations, nargs="+")
    flag("--seed", 0, between(int, 0), "of networks, order, views, mixup, synthetic sets")
    flag("--device", "cuda" if torch.cuda.is_available() else "cpu", str, "or mps, cuda:N")
    flag("--precision", "auto", str, "auto: bf16 if fast", choices=["auto", "bf16", "fp32"])
    flag("--output-dir", None, path, "the run's folder; else runs/DATASET-seedN-DATE-TIME")
    flag("--resume", None, path, "folder of a run to go on with")
    parser.add_argument("--balance", action="store_true", help="the same share of each class"
                        " counts as clean; try it if classes are lost (not in the paper)")

    # A first pass reads --dataset and --resume: they set the defaults of the second.
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[chosen.dataset])
    if chosen.resume:
        saved = read_checkpoint(chosen.resume)["settings"]
        del saved["device"]  # A resumed run may be on another machine.
        parser.set_defaults(**saved)
    parser.add_argument("-h", "--help", action="help", help="show this")
    parser.epilog = f"In brackets: the defaults of this command. Presets: {PRESETS}"
    cfg = parser.parse_args(argv)
    # A run keeps what was used before training, and what fixes the sizes of its tensors.
    kept = """dataset classes num_samples annotations synthetic clip_model clip_pretrained
        templates seed output_dir image_size channels width queue_size"""
    for name in kept.split():
        if chosen.resume and getattr(cfg, name) != saved.get(name):
            parser.error(f"--resume: leave --{name.replace('_', '-')} out: a run keeps it")
    if cfg.warm_up > cfg.epochs:
        parser.error(f"--warm-up {cfg.warm_up} is more than --epochs {cfg.epochs}: set both")
    if cfg.synthetic and cfg.annotations:
        parser.error("--synthetic and --annotations: expected one of them")
    if cfg.classes and cfg.dataset != "folder":
        parser.error("--classes: expected --dataset folder beside it")
    if not cfg.output_dir:
        cfg.output_dir = time.strftime(f"runs/{cfg.dataset}-seed{cfg.seed}-%Y%m%d-%H%M%S")
    return cfg

# (1) Prompt templates and data sets --------------------------------------------------------
# A prompt is a template filled with a class name. A data set is a sequence of pairs (PIL image
# or path of a photo, label), mostly torchvision's; the label -1 means that nobody knows it.

def phrases(text, pattern="{}"):
    """'a; b' -> ['a', 'b'], each put in the place of the pattern's first {}."""
    text = " ".join(text.split())  # Line breaks and indents become single blanks.
    return [pattern.replace("{}", phrase.strip(), 1) for phrase in text.split(";")]

TEMPLATES = {
    "small": phrases("""a photo of a {}; a rendering of a {}; a cropped photo of the {}; the
        photo of a {}; a photo of a clean {}; a photo of a dirty {}; a dark photo of the {}; a
        photo of my {}; a photo of the cool {}; a close-up photo of a {}; a bright photo of the
        {}; a cropped photo of a {}; a photo of the {}; a good photo of the {}; a photo of one
        {}; a close-up photo of the {}; a rendition of the {}; a photo of the clean {}; a
        rendition of a {}; a photo of a nice {}; a good photo of a {}; a photo of the nice {};
        a photo of the small {}; a photo of the weird {}; a photo of the large {}; a photo of a
        cool {}; a photo of a small {}"""),
    "digits": phrases("plain; narrow; wide; slanted; printed", "a {} number {}"),
}
DIGITS = "zero one two three four five six seven eight nine".split()
CLASS_NAMES = {  # The other data sets bring their names with them.
    "digits": DIGITS,
    "svhn": [f"number {digit}" for digit in range(10)],
    "fer2013": phrases("Angry; Disgust; Fear; Happy; Sad; Surprise; Neutral",
                       "{} Facial Expression"),
    "gtsrb": phrases("""Speed limit 20; Speed limit 30; Speed limit 50; Speed limit 60; Speed
        limit 70; Speed limit 80; Speed limit 80 cancelled; Speed limit 100; Speed limit 120;
        No passing; No truck overtaking; Only have priority at the next intersection; Priority
        road; Give way; Stop; All vehicles prohibited; Trucks prohibited; No entry; Caution!;
        Curve (to the left); Curve (to the right); Continuous curves; Rough road; Slippery
        road; The road narrows on the right; Construction site; Signal light; Pay attention to
        pedestrians; Pay attention to children; Watch out for bikes; Watch out for snow/ice on
        the road; Deer ahead; Unlimited speed; Turn right; Turn left; Go straight; Go straight
        and turn right; Go straight and turn left; Drive on the right; Drive on the left;
        Driving around the island; Lift ban on no passing; Lift ban on truck overtaking""",
                     "German Traffic Sign: {}"),
}
PRESETS = {  # as in the published code; those of digits and folder are this file's own
    "digits": dict(
        channels=1, image_size=8, mirror=0, cutout=[0, 0.33], clip_model="tiny",
        templates="digits", width=16, epochs=20, warm_up=8, start_contrastive=1,
        batch_size=64, lr=0.05, lr_period=0, momentum=0.99, queue_size=1024, precision="fp32"),
    "folder": dict(epochs=100, lr_period=0),
    "cifar10": dict(),
    "cifar100": dict(warm_up=100),
    "svhn": dict(mirror=0),
    "fmnist": dict(channels=1, image_size=28, cutout=[16 / 28, 16 / 28], epochs=100),
    "eurosat": dict(image_size=64, epochs=100),
    "fer2013": dict(channels=1, image_size=64, cutout=[0.25, 0.25], epochs=100),
    "gtsrb": dict(image_size=64, mirror=0, epochs=100),
}

def to_square(image):
    """PIL image -> its centre square in RGB, upright by its EXIF data."""
    image = TF.center_crop(image, min(image.size))  # first, since each later step copies it
    with contextlib.suppress(Exception):  # Damaged EXIF data raise any kind of error.
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")

def open_image(path):
    """Image file -> PIL image as to_square() makes it. UserError if it cannot be read."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF" or ";16" in str(image.tile):  # RGB would change its values.
            raise ValueError("it has more than 8 bits a channel")
        image.load()
    except Exception as error:  # A broken file makes Pillow raise nearly any kind of error.
        raise UserError(f"{path}: expected an image that can be read, but {error}") from error
    return to_square(image)

def find_images(root):
    """Pairs (image file at any depth, name of its top folder in root or ""), sorted by the
    parts of the path: class after class. NFC makes both forms of "é" in Unicode equal."""
    def fail(error):
        raise UserError(f"--data-dir: expected a folder of images, but {error}") from error

    pairs = []
    visited = set()
    for folder, inner, files in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in visited:  # A link has led here again.
            inner.clear()
            continue
        visited.add(os.path.realpath(folder))
        inner[:] = sorted(name for name in inner if name[0] != ".")
        parts = Path(folder).relative_to(root).parts
        top = unicodedata.normalize("NFC", parts[0].strip()) if parts else ""
        for name in files:
            if name[0] != "." and name.lower().endswith(datasets.folder.IMG_EXTENSIONS):
                pairs.append((Path(folder, name), top))
    return sorted(pairs)

def read_photos(root, classes):
    """root/train and perhaps root/test -> training pairs, test pairs, class names.
    Folders in train/ name the classes. With classes, a text such as "cat,dog", the images of
    train/ have no labels, and lie anywhere in it."""
    train = find_images(f"{root}/train")
    test = find_images(f"{root}/test") if Path(root, "test").exists() else []
    names = sorted({folder for _, folder in train})
    if classes:
        names = [unicodedata.normalize("NFC", name.strip()) for name in classes.split(",")]
    elif "" in names:
        raise UserError(f"{root}/train: expected a folder for each class, or --classes")
    strangers = {folder or "no folder" for _, folder in test} - set(names)
    if strangers:
        raise UserError(f"{root}/test: expected folders {names}, got {sorted(strangers)}")
    train = [(path, -1 if classes else names.index(folder)) for path, folder in train]
    test = [(path, names.index(folder)) for path, folder in test]
    return train, test, names

def read_known(name, root):
    """Any data set but a folder -> training part, test part or None."""
    if name == "digits":  # scikit-learn's 1,797 images of 8 x 8 pixels, with values 0 to 16
        digits = load_digits()
        pixels = (digits.images * 255 / 16).astype("uint8")
        return list(zip(map(Image.fromarray, pixels), digits.target.tolist())), None
    if name == "eurosat":
        return datasets.EuroSAT(root, download=True), None
    if name == "fer2013":  # Its own test part has no labels.
        return datasets.FER2013(root, "train"), None
    readers = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
               "fmnist": datasets.FashionMNIST, "svhn": datasets.SVHN, "gtsrb": datasets.GTSRB}
    parts = ("train", "test") if name in ("svhn", "gtsrb") else (True, False)
    return [readers[name](root, part, download=True) for part in parts]

def read_dataset(cfg):
    """Settings -> training pairs, test pairs (perhaps none), class names."""
    if cfg.dataset == "folder":
        train, test, names = read_photos(cfg.data_dir, cfg.classes)
    else:
        try:
            train, test = read_known(cfg.dataset, cfg.data_dir)
        except (OSError, RuntimeError, EOFError, TarError, BadZipFile) as error:
            text = f"--data-dir {cfg.data_dir}: expected all of {cfg.dataset}, but {error!r}"
            raise UserError(text) from error
        names = CLASS_NAMES.get(cfg.dataset) or train.classes
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise UserError(f"--data-dir, --classes: expected two or more unlike names: {names}")
    # This order is the same for every --seed. Its last fifth is held out if there is no test
    # part (published code, for EuroSAT and FER2013); --num-samples takes its first images.
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    if test is None:
        num_train = round(0.8 * len(rows))
        test = Subset(train, rows[num_train:])
        rows = rows[:num_train]
    return Subset(train, sorted(rows[: cfg.num_samples])), test, names  # [:None] keeps all

def load(pairs, transform):
    """Pairs -> batches (rows, transformed images, labels) of those that can be read.
    The others are named. A thread holds one photo, transforms it, lets it go: it is large."""
    def read(row):
        image, label = pairs[row]
        try:
            if isinstance(image, Path):
                image = open_image(image)
        except UserError as error:
            return print(f"left out: {error}", file=sys.stderr)  # None
        return row, transform(image), label

    with ThreadPoolExecutor(4) as pool:
        for rows in tqdm(torch.arange(len(pairs)).split(256), "read", disable=None):
            batch = [item for item in pool.map(read, rows.tolist()) if item]
            if batch:
                good_rows, images, labels = zip(*batch)
                yield list(good_rows), torch.stack(images), torch.tensor(labels)

def to_pixels(image, cfg):
    """PIL image -> uint8 [C,H,H], what the networks see."""
    mode = "L" if cfg.channels == 1 else "RGB"
    return TF.pil_to_tensor(TF.resize(image.convert(mode), [cfg.image_size, cfg.image_size]))

def read_images(pairs, cfg):
    """Pairs -> those that can be read, images uint8 [N,C,H,H], labels int [N] (-1: none)."""
    batches = list(load(pairs, lambda image: to_pixels(image, cfg)))
    if not batches:
        raise UserError(f"--data-dir {cfg.data_dir}: none of {len(pairs)} images can be read")
    rows, images, labels = zip(*batches)
    return Subset(pairs, np.concatenate(rows).tolist()), torch.cat(images), torch.cat(labels)

# (2) CLIP annotation -> candidate sets -----------------------------------------------------
# "CLIP Annotated Partial Labels": template t and class k give the text feature u_tk, image i
# gives the image feature v_i, and P[t,i,:] is the softmax over k of logit_scale * v_i . u_tk.
# The candidate set S_i holds the answers of the single templates: small where they agree.

def candidate_sets(probs, mode="multi_prompt"):
    """P [T,N,K] -> candidate sets S_i = {argmax_k P[t,i,k] : t = 1..T}, bool [N,K].
    DIFFERS: labels that tie all count, since P may be people's votes. A row of zeros abstains;
    a set that stays empty becomes full. mode="argmax": only the answer of the mean over t."""
    if mode == "argmax":
        probs = probs.float().mean(0, keepdim=True)  # [1,N,K]
    largest = probs.amax(2, keepdim=True)  # [T,N,1]
    candidates = ((probs == largest) & (largest > 0)).any(0)  # [N,K]
    candidates[~candidates.any(1)] = True
    return candidates

def flip_candidates(labels, num_classes, partial_rate, noise_rate, generator=None):
    """True labels int [N], on the CPU -> synthetic sets, bool [N,K] (the paper's Table 3).
    A wrong label joins with chance partial_rate. Then, with chance noise_rate, a label drawn
    from outside the set takes the true label's place; a full set stays as it is."""
    joins = torch.rand(len(labels), num_classes, generator=generator) < partial_rate
    candidates = joins | F.one_hot(labels, num_classes).bool()
    noisy = torch.rand(len(labels), generator=generator) < noise_rate  # [N]
    rows = (noisy & ~candidates.all(1)).nonzero().flatten()
    outside = (~candidates[rows]).float()  # [n,K], weights of the draw
    new_labels = outside.multinomial(1, generator=generator).flatten()
    candidates[rows, labels[rows]] = False
    candidates[rows, new_labels] = True
    return candidates

def load_clip(name, weights, device):
    """open_clip's names of model and weights -> model, preprocessing of images, tokenizer."""
    if name == "tiny":
        return TinyCLIP(), tiny_pixels, draw
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, weights, device=device, require_pretrained=True)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and downloads raise nearly any kind of error.
        raise UserError(f"--clip-model {name} --clip-pretrained {weights}: {error}") from error

@torch.inference_mode()
def annotate(clip, pairs, class_names, templates, device):
    """load_clip()'s model, images as pairs, texts -> P float32 [T,N,K]."""
    model, preprocess, tokenizer = clip
    text_features = []
    for template in templates:
        tokens = tokenizer([template.replace("{}", name) for name in class_names])
        # Names may differ in capitals alone, or after 77 tokens, where CLIP cuts them off.
        if len(tokens.unique(dim=0)) < len(class_names):
            raise UserError(f"CLIP reads {template!r} alike for two of {class_names}: rename")
        text_features.append(model.encode_text(tokens.to(device), normalize=True))  # [K,D]
    text_features = torch.stack(text_features)  # [T,K,D]
    probs = []
    for _, images, _ in load(pairs, preprocess):
        image_features = model.encode_image(images.to(device), normalize=True)  # [B,D]
        logits = model.logit_scale.exp() * image_features @ text_features.mT  # [T,B,K]
        probs.append(logits.float().softmax(2).cpu())
    probs = torch.cat(probs, 1)
    if probs.shape[1] < len(pairs):  # Rows of P and of the images would not belong together.
        raise UserError("an image that was read before cannot be read now: mend or remove it")
    return probs

def read_annotations(path, num_images, num_classes):
    """An .npz with an array probs, of people's votes or other scores -> P float32 [T,N,K]."""
    try:
        probs = torch.from_numpy(np.load(path)["probs"].astype(np.float32))
    except Exception as error:  # A damaged file makes NumPy raise nearly any kind of error.
        raise UserError(f"{path}: expected an .npz with an array probs: {error!r}") from error
    shape = ("T", num_images, num_classes)
    if probs.shape[1:] != shape[1:] or len(probs) == 0:
        raise UserError(f"{path}: expected probs of shape {shape}, got {tuple(probs.shape)}")
    if not 0 <= probs.min() <= probs.max() <= 1:
        raise UserError(f"{path}: expected 0 to 1, got {probs.min():g} to {probs.max():g}")
    return probs

# (3) The weak/strong data set --------------------------------------------------------------
# Views of a whole batch are made at once, on the device: weak, a random crop, mirrored or not;
# strong, that with one of RandAugment's operations (in colour only) and a cutout. All random
# numbers come from the CPU's generator; on a CPU a resumed run therefore goes on exactly.

def crop_and_mirror(images, mirror):
    """Shifts images [B,C,H,H] by up to 1/8 of the side, black beyond; mirrors half of them."""
    count, _, side, _ = images.shape
    most = round(side / 8)
    # theta maps a place (x, y, 1) of the view to one of the image; x and y run from -1 to 1.
    theta = torch.eye(2, 3).repeat(count, 1, 1)  # [B,2,3]
    if mirror:
        theta[torch.rand(count) < 0.5, 0, 0] = -1
    theta[:, :, 2] = torch.randint(-most, most + 1, (count, 2)) * 2 / side
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "nearest", align_corners=False)

def random_operation(images):
    """One of RandAugment's 14 operations for each 16th part of a batch, [B,3,H,H] in 0..1.
    DIFFERS: torchvision's ranges; in the published code each image draws its operation."""
    changed = []
    for part in images.chunk(16):
        magnitude = torch.randint(31, ()).item()  # torchvision counts strength from 0 to 30.
        changed.append(v2.RandAugment(num_ops=1, magnitude=magnitude)(part))
    return torch.cat(changed)

def cutout(images, smallest, largest):
    """Sets a square anywhere in normalised images [B,C,H,H] to 0, the mean of all pixels.
    Its side is smallest to largest times the image's. DIFFERS: it may reach over the edge (the
    code is plainer); 0, since the published fixed colour ruins training on dark pictures."""
    count, _, side, _ = images.shape
    half = side / 2 * (smallest + (largest - smallest) * torch.rand(count, 1))  # [B,1]
    row = side * torch.rand(count, 1)  # of the square's centre, [B,1]
    column = side * torch.rand(count, 1)
    pixels = torch.arange(side) + 0.5  # [H], centres of pixels
    in_rows = (pixels - row).abs() < half  # [B,H]
    in_columns = (pixels - column).abs() < half  # [B,H]
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # [B,1,H,H]
    return images.masked_fill(inside.to(images.device), 0)

class WeakStrongImages:
    """Training images uint8 [N,C,H,H], sets bool [N,K]; weak or strong views of rows int [B].
    DIFFERS: mean and deviation are measured, since users bring their own images."""
    def __init__(self, images, candidates, cfg):
        self.images = images
        self.candidates = candidates
        self.cfg = cfg
        sample = images[:: 1 + len(images) // 1000] / 255  # up to 1,000 of them, for memory
        self.mean = sample.mean((0, 2, 3), keepdim=True)  # [1,C,1,1]
        self.std = sample.std((0, 2, 3), keepdim=True).clamp_min(1 / 255)  # never 0

    def __len__(self):
        return len(self.images)

    def weak(self, rows):
        images = crop_and_mirror(self.images[rows] / 255, self.cfg.mirror)
        return (images - self.mean) / self.std

    def strong(self, rows):
        images = crop_and_mirror(self.images[rows] / 255, self.cfg.mirror)
        if self.cfg.channels == 3:
            images = random_operation(images)
        return cutout((images - self.mean) / self.std, *self.cfg.cutout)

# (4) Both networks -------------------------------------------------------------------------
# Two pre-activation ResNet-18 start from different random weights. Each has a linear
# classifier f and a projection head, whose output z, of norm 1, is the image's embedding.

EMBEDDING_DIM = 128  # D, published code
SGD_SETTINGS = dict(momentum=0.9, weight_decay=5e-4)  # published code

def bf16_is_fast(device):
    """Are convolutions on a torch.device faster in bfloat16? On new GPUs and some CPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)

class PreActBlock(nn.Module):
    """Two convolutions and a shortcut, which, too, begins after the first BatchNorm, ReLU."""
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            # AvgPool2d keeps every stride'th pixel. A strided 1x1 convolution does so, too,
            # but its backward pass can write out of bounds on a CPU (torch 2.14).
            conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), conv)

    def forward(self, x):
        x = F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(x)))
        return self.conv2(y) + self.shortcut(x)

class CoRegNet(nn.Module):
    """Images [B,C,H,H] -> logits [B,K], embeddings [B,D] of norm 1; for any side from 8."""
    def __init__(self, num_classes, in_channels=3, image_size=32, width=64, embedding_dim=128):
        super().__init__()
        self.bf16 = False  # DIFFERS: True has convolutions computed in bfloat16, for speed.
        layers = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        dim = width
        for channels in (width, 2 * width, 4 * width, 8 * width):
            # Each stage halves the sides, but not the first if images have under 64 pixels.
            stride = 1 if channels == width and image_size < 64 else 2
            layers += [PreActBlock(dim, channels, stride), PreActBlock(channels, channels, 1)]
            dim = channels
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(dim, num_classes)
        hidden = nn.Linear(dim, dim)
        self.head = nn.Sequential(hidden, nn.ReLU(), nn.Linear(dim, embedding_dim))

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.encoder(images).float()  # [B,dim]
        return self.fc(features), F.normalize(self.head(features))

class Learner:
    """One of the two networks with all that belongs to it alone. key_net, queue: section 9.
    losses: [N] of each of the last epochs; split: what split_data() returned; section 6."""
    def __init__(self, num_classes, cfg, device):
        net = CoRegNet(num_classes, cfg.channels, cfg.image_size, cfg.width, EMBEDDING_DIM)
        self.net = net.to(device, memory_format=torch.channels_last)
        is_fast = cfg.precision == "auto" and bf16_is_fast(torch.device(device))
        self.net.bf16 = cfg.precision == "bf16" or is_fast
        self.optimizer = torch.optim.SGD(self.net.parameters(), cfg.lr, **SGD_SETTINGS)
        self.key_net = copy.deepcopy(self.net)
        self.queue = MomentumQueue(cfg.queue_size, EMBEDDING_DIM, device)
        self.losses = []
        self.split = None

    def step(self, terms):
        """Optimizer step on the sum of loss terms, {name: scalar} -> the same, detached."""
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def state(self):
        """For the checkpoint; without key_net and split, which every epoch makes anew."""
        queue = [self.queue.keys, self.queue.classes, self.queue.clean]
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                "queue": queue, "losses": self.losses}

    def load_state(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.queue.keys, self.queue.classes, self.queue.clean = state["queue"]
        self.losses = state["losses"]

# (5) Warm-up -------------------------------------------------------------------------------
# "Supervised Training": each network by itself learns, on strong views, that the labels of
# a set together have probability 1. Eq. 2 keeps it unsure, lest it learn wrong sets by heart.
# The losses and labels from here on take any dtype and compute in float32.

def partial_cross_entropy(logits, candidates):
    """Eq. 1: mean of -log(sum_{k in S_i} p_ik + 1e-5). logits [B,K], S bool [B,K] -> scalar.
    Published code: the 1e-5; full sets do not count, and if all are full the loss is 0."""
    prob_of_set = (logits.float().softmax(1) * candidates).sum(1)  # [B]
    is_partial = ~candidates.all(1)  # [B]
    losses = -torch.log(prob_of_set + 1e-5) * is_partial
    return losses.sum() / is_partial.sum().clamp_min(1)

def negative_entropy(logits):
    """Eq. 2: mean of sum_k p_ik log p_ik; lower is less sure. logits [B,K] -> scalar <= 0."""
    log_probs = logits.float().log_softmax(1)
    return (log_probs.exp() * log_probs).sum(1).mean()

def random_batches(rows, batch_size):
    """Rows int [n] -> list of batches in random order.
    DIFFERS: a last batch of one row is left out, since BatchNorm cannot train on it."""
    batches = rows[torch.randperm(len(rows))].split(batch_size)
    return [batch for batch in batches if len(batch) > 1]

def mean_terms(steps):
    """Loss terms of all steps, a list of {name: scalar tensor} -> {name: mean, a float}."""
    return {name: torch.stack([terms[name] for terms in steps]).mean().item()
            for name in steps[0]}

def warm_up_epoch(learner, data, cfg):
    """An epoch of Eq. 3, the sum of both losses -> means of the loss terms."""
    learner.net.train()
    rows = torch.arange(len(data), device=data.images.device)
    batches = random_batches(rows, 2 * cfg.batch_size)  # twice: published code
    steps = []
    for batch in tqdm(batches, "warm-up", disable=None, leave=False):
        logits, _ = learner.net(data.strong(batch))
        set_loss = partial_cross_entropy(logits, data.candidates[batch])
        steps.append(learner.step({"set": set_loss, "entropy": negative_entropy(logits)}))
    return mean_terms(steps)

# (6) GMM split -----------------------------------------------------------------------------
# "Co-Pseudo-Labeling": before each later epoch both networks judge all sets. A set with the
# true label is learnt early: its loss l_i is small. Two Gaussians are fitted to all l_i; w_i
# is the probability that l_i is of the Gaussian of lower mean, so that set i is clean. The
# paper does not mention alignment, scaling, averaging and the numbers below (published code).

MIXTURE_SETTINGS = dict(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4)
HISTORY_EPOCHS = 5
CLEAN_THRESHOLD = 0.5  # A set is clean if its w is above this.
MAX_LOSS = 88.0  # about -log of the least normal float32

def align_distribution(probs, mean_probs, prior):
    """p <- normalise(p * prior / mean p). probs [B,K], mean_probs [K], prior [K] -> [B,K]."""
    ratio = prior.float() / mean_probs.float().clamp_min(1e-8)  # 1e-8: a class never predicted
    aligned = probs.float() * ratio
    return aligned / aligned.sum(1, keepdim=True)

def max_candidate_loss(probs, candidates):
    """Eq. 4: l_i = -log max_{k in S_i} p_ik. probs [B,K], S bool [B,K] -> [B], finite."""
    largest = (probs.float() * candidates).amax(1)  # [B]
    return -largest.log().clamp_min(-MAX_LOSS)

def clean_probability(loss_history):
    """Losses [E,N], newest last -> w [N], the posterior of the component with the lower mean.
    Each epoch's losses are scaled to 0..1, the last epochs' averaged. All equal: w = 0."""
    losses = loss_history[-HISTORY_EPOCHS:].float().clamp_max(MAX_LOSS)
    low = losses.amin(1, keepdim=True)  # [E,1]
    high = losses.amax(1, keepdim=True)  # [E,1]
    scaled = (losses - low) / (high - low).clamp_min(1e-12)  # 1e-12: where all are equal
    values = scaled.mean(0).cpu().numpy()[:, None]  # [N,1]
    if not values.min() < values.max():  # all equal, or NaN
        return torch.zeros_like(losses[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ten rounds without convergence are normal here.
        mixture = GaussianMixture(random_state=0, **MIXTURE_SETTINGS).fit(values)
    posterior = mixture.predict_proba(values)[:, mixture.means_.argmin()]  # [N]
    return torch.from_numpy(posterior).to(losses)

def balance_classes(clean_prob, losses, classes):
    """w, losses [N] -> new w: the same share of each class is clean, its sets of lowest loss.
    classes int [N]: the likeliest label in each set. DIFFERS (with --balance): one mixture
    over all classes can call no set of a hard class clean; the class is then not learnt."""
    share = (clean_prob > CLEAN_THRESHOLD).float().mean().item()
    balanced = torch.zeros_like(clean_prob)
    for k in classes.unique():
        members = (classes == k).nonzero().flatten()
        num_clean = round(share * len(members))
        lowest = members[losses[members].argsort()[:num_clean]]
        balanced[lowest] = clean_prob[lowest].clamp_min(0.75)  # any above the threshold
    return balanced

@torch.no_grad()
def split_data(learner, data, cfg):
    """A network judges all sets -> aligned predictions [N,K], w [N]; adds to learner.losses.
    DIFFERS: the alignment takes the mean of this pass, not partly an older one; and if fewer
    sets than a batch and than a tenth are clean, the tenth of lowest loss counts as clean."""
    learner.net.eval()
    batches = torch.arange(len(data), device=data.images.device).split(512)  # to fit in memory
    logits = torch.cat([learner.net(data.weak(rows))[0] for rows in batches])
    probs = logits.softmax(1)  # [N,K]
    if "alignment" not in cfg.ablate:
        uniform = torch.full_like(probs[0], 1 / len(probs[0]))
        probs = align_distribution(probs, probs.mean(0), uniform)
    losses = max_candidate_loss(probs, data.candidates)  # [N]
    learner.losses = [*learner.losses, losses][-HISTORY_EPOCHS:]
    if "split" in cfg.ablate:
        return probs, torch.ones_like(losses)  # w = 1: Eq. 6 takes the partner alone
    clean_prob = clean_probability(torch.stack(learner.losses))
    if cfg.balance:
        classes = (probs * data.candidates).argmax(1)
        clean_prob = balance_classes(clean_prob, losses, classes)
    num_clean = (clean_prob > CLEAN_THRESHOLD).sum().item()
    tenth = max(2, len(data) // 10)
    if num_clean < min(cfg.batch_size, tenth):
        print(f"split: too few sets ({num_clean}) are clean; the {tenth} of lowest loss count")
        clean_prob = torch.zeros_like(losses)
        clean_prob[losses.argsort()[:tenth]] = 1
    return probs, clean_prob

# (7) Co-pseudo-labeling, sharpening, mixup -------------------------------------------------
# Each network learns from the split of the other, its partner. The target of a clean sample is
# w times the partner's prediction within the set, plus 1 - w times the network's own; that of
# an unlabeled one, the mean of both. Mixup, Beta(4,4) and ramp are only in the published code.

MIXUP_ALPHA = 4.0
RAMP_EPOCHS = 16

def sharpen(probs, temperature):
    """Eq. 7: normalise(p^(1/temperature)); below 1 it makes labels surer. [B,K] -> [B,K]."""
    return (probs.float().log() / temperature).softmax(1)

def refine_labels(own_probs, partner_probs, candidates, clean_prob, temperature):
    """Targets of clean samples, Eq. 6 and 7: sharpen(w r + (1-w) own). [B,K], w [B] -> [B,K].
    own: own_probs, means over both weak views. r: partner_probs within the set, normalised
    (Eq. 5). w: clean_prob, from the partner's split."""
    inside = partner_probs.float().clamp_min(1e-12) * candidates  # 1e-12: where all underflow
    r = inside / inside.sum(1, keepdim=True)
    w = clean_prob[:, None]
    return sharpen(w * r + (1 - w) * own_probs, temperature)

def guess_labels(probs, temperature):
    """Targets of unlabeled samples, Eq. 6, 7: sharpened mean. Predictions [V,B,K] -> [B,K]."""
    return sharpen(probs.float().mean(0), temperature)

def draw_mixup(count):
    """Number of rows -> lambda = max(b, 1-b) with b ~ Beta(4,4), and a random permutation."""
    b = torch.distributions.Beta(MIXUP_ALPHA, MIXUP_ALPHA).sample().item()
    return max(b, 1 - b), torch.randperm(count)

def mixup(values, lam, permutation):
    """lambda * row + (1 - lambda) * permuted row. values [B,...], permutation int [B]."""
    return lam * values + (1 - lam) * values[permutation]

def ramp_up(epoch, warm_up, length=RAMP_EPOCHS):
    """From 0 at the end of the warm-up to 1 `length` epochs later; epoch may be a fraction."""
    return min(max((epoch - warm_up) / length, 0.0), 1.0)

def self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u):
    """Eq. 8: cross-entropy of clean rows + weight_u * mean squared error of unlabeled rows.
    All [B,K] -> scalar; there may be no unlabeled rows. Squared errors are averaged
    over classes (published code); the paper sums them."""
    loss_x = F.cross_entropy(logits_x.float(), targets_x.float())
    errors_u = (logits_u.float().softmax(1) - targets_u.float()) ** 2
    loss_u = errors_u.sum() / max(1, errors_u.numel())  # the mean; 0 if there are no rows
    return loss_x + weight_u * loss_u

# (8) Prototype EMA alignment ---------------------------------------------------------------
# The prototype o_k of class k is a moving average of the embeddings of its clean images. The
# softmax of z . o / tau is a second classifier, which learns the same targets. Both networks
# share the prototypes, so that their embedding spaces are aligned, too.

PROTO_TEMPERATURE = 0.3  # tau, published code

def update_prototypes(prototypes, embeddings, classes, momentum):
    """Eq. 10: o_k <- m o_k + (1-m) z for each z of class k in turn; then norm 1 -> [K,D].
    prototypes [K,D], embeddings [B,D], classes int [B]. The n steps of a class make, at once,
    m^n o_k + sum of (1-m) m^j z, where j is how many z of the class come later."""
    belongs = F.one_hot(classes, len(prototypes)).float()  # [B,K]
    n = belongs.sum(0)  # [K]
    j = n - belongs.cumsum(0)  # [B,K]
    weights = belongs * (1 - momentum) * momentum**j
    kept = momentum ** n[:, None] * prototypes  # [K,D]
    return F.normalize(kept + weights.T @ embeddings.float())

def prototype_loss(similarity_x, targets_x, similarity_u, targets_u, weight_u,
                   temperature=PROTO_TEMPERATURE):
    """Eq. 9: KL(y || q) on clean rows, (q - y)^2 on unlabeled ones, up to constants -> scalar.
    similarity_x, _u: z . o [B,K] of mixed images; q = softmax(similarity / tau); targets: the
    mixed ones, y = lam a + (1-lam) b. The published code has
        lam KL(a || q) + (1-lam) KL(b || q)   = cross-entropy(y, q) + a constant,
        lam (q - a)^2 + (1-lam) (q - b)^2     = (q - y)^2 + a constant.
    DIFFERS: without the constants (no gradient), this is Eq. 8 on similarity / tau."""
    logits_x = similarity_x / temperature
    logits_u = similarity_u / temperature
    return self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u)

# (9) MoCo queue, noisy supervised contrastive loss -----------------------------------------
# "Noisy Contrastive Learning". An anchor is the embedding of an image's first strong view. Its
# key is that of the second, by a slowly moving copy of the network. Each of A anchors has M
# entries: anchors, keys, earlier keys (the queue). It is pulled to its own key, and to entries
# of its pseudo-class if both are clean; the others of its class are ignored.

CONTRASTIVE_TEMPERATURE = 0.07  # tau, published code

class MomentumQueue:
    """The last `size` keys [n,D] with their classes int [n] and clean flags bool [n].
    DIFFERS: it starts empty, not with random keys, classes and flags, which would mislead."""
    def __init__(self, size, dim, device="cpu"):
        self.size = size
        self.keys = torch.zeros(0, dim, device=device)
        self.classes = torch.zeros(0, dtype=torch.long, device=device)
        self.clean = torch.zeros(0, dtype=torch.bool, device=device)

    def push(self, keys, classes, clean):
        """Appends keys [n,D], classes [n], flags [n]; drops the oldest beyond `size`."""
        self.keys = torch.cat([self.keys, keys.detach().float()])[-self.size :]
        self.classes = torch.cat([self.classes, classes])[-self.size :]
        self.clean = torch.cat([self.clean, clean])[-self.size :]

def contrastive_masks(classes, clean, num_anchors):
    """Pseudo-classes int [M], clean flags bool [M] -> positives, ignored: bool [A,M] (Eq. 11).
    The M entries are the A anchors, their A own keys in the same order, and the queue.
    positives: same class, both clean (itself, too), or own key. ignored: others of a class."""
    same_class = classes[:num_anchors, None] == classes  # [A,M]
    both_clean = clean[:num_anchors, None] & clean  # [A,M]
    own_key = torch.zeros_like(same_class)
    own_key.diagonal(num_anchors).fill_(True)  # anchor i, entry A + i
    positives = (same_class & both_clean) | own_key
    return positives, same_class & ~positives

def supcon_loss(features, positives, ignored, temperature=CONTRASTIVE_TEMPERATURE):
    """Eq. 11: mean over anchors of the mean over positives of -log softmax(. / tau).
    features [M,D] of norm 1, the A anchors first; positives, ignored: bool [A,M]. An anchor is
    never contrasted with itself. DIFFERS: ignored entries are left out of a logsumexp in
    float32; the published code subtracts their sum, and the difference can fall below 0."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        similarity = features[: len(positives)] @ features.T / temperature  # [A,M]
    itself = torch.zeros_like(positives)
    itself.fill_diagonal_(True)
    counted = similarity.masked_fill(ignored | itself, -math.inf)
    log_probs = similarity - counted.logsumexp(1, keepdim=True)  # [A,M]
    positives = positives & ~itself
    sums = log_probs.masked_fill(~positives, 0).sum(1)  # [A]
    return -(sums / positives.sum(1).clamp_min(1)).mean()

# (10) Evaluation ---------------------------------------------------------------------------
# The prediction is the class with the largest mean of both networks' logits. Figures with *
# need true labels of training images, which training never sees (but for --synthetic).

@torch.inference_mode()
def predict(learners, images, mean, std):
    """Images uint8 [N,C,H,H] -> mean of the networks' logits [N,K], in eval mode."""
    batches = images.to(mean.device).split(512)
    logits = []
    for learner in learners:
        learner.net.eval()
        outputs = [learner.net((batch / 255 - mean) / std)[0] for batch in batches]
        logits.append(torch.cat(outputs))
    return torch.stack(logits).mean(0)

def accuracy(scores, labels):
    """Percentage of images whose label, int [N], has the largest score, [N,K]."""
    right = scores.argmax(1).cpu() == labels
    return 100 * right.float().mean().item()

def coverage(candidates, labels):
    """Percentage of candidate sets, bool [N,K], that hold the label, int [N]."""
    holds_label = candidates.cpu().gather(1, labels[:, None])
    return 100 * holds_label.float().mean().item()

def clean_shares(split, candidates):
    """Percentage of clean sets in each class, [K]; near 0 for a class that is lost or absent.
    split: predictions [N,K] and w [N]. A set is of the class that is likeliest within it."""
    probs, clean_prob = split
    members = F.one_hot((probs * candidates).argmax(1), probs.shape[1])  # [N,K]
    is_clean = (clean_prob > CLEAN_THRESHOLD)[:, None]  # [N,1]
    return 100 * (members * is_clean).sum(0) / members.sum(0).clamp_min(1)

def evaluate(learners, data, labels, test, class_names):
    """{name: figure}. labels int [N]: of training; test: (images, labels) or None."""
    figures = {}
    if test:
        logits = predict(learners, test[0], data.mean, data.std)
        figures["test_acc"] = accuracy(logits, test[1])
    if learners[0].split is not None:
        clean = [learner.split[1].cpu() > CLEAN_THRESHOLD for learner in learners]
        shares = [clean_shares(learner.split, data.candidates) for learner in learners]
        shares = sum(shares) / 2  # [K]
        figures["clean"] = sum(clean).sum().item() / 2  # sets, mean of both networks
        figures["least_clean"] = shares.min().item()
        figures["least_class"] = class_names[shares.argmin()]
        if labels.min() >= 0:
            right = [coverage(data.candidates.cpu()[rows], labels[rows]) for rows in clean]
            figures["split_precision"] = sum(right) / 2  # right*%: clean sets with the label
    return figures

# (11) Training -----------------------------------------------------------------------------
# After the warm-up, in every epoch, both networks split the data. Then network 1 trains on the
# split of network 2, its partner, and network 2 on that of network 1.

def endless_batches(rows, batch_size):
    """Batches without end, a new order each round; with fewer than 2 rows, empty batches."""
    while True:
        batches = random_batches(rows, batch_size)
        if not batches:
            yield rows[:0]
        yield from batches

def co_train_epoch(own, partner, prototypes, data, cfg, epoch):
    """A network learns for an epoch from the split of its partner -> means of the loss terms.
    own, partner: Learners. prototypes [K,D] change in place. epoch: of the run, from 0."""
    # Published code: each epoch the key encoder starts as a copy; only the partner is in eval
    # mode, while the network makes labels in training mode.
    own.key_net.load_state_dict(own.net.state_dict())
    partner.net.eval()
    own.net.train()  # after eval(): with --ablate co-pl both are the same network
    partner_probs, clean_prob = partner.split
    rows_x = (clean_prob > CLEAN_THRESHOLD).nonzero().flatten()
    rows_u = (clean_prob <= CLEAN_THRESHOLD).nonzero().flatten()
    if "unlabeled" in cfg.ablate:
        rows_u = rows_u[:0]
    # Are Eq. 9-11 used yet? ">" and not ">=": published code. DIFFERS: until then they are not
    # computed, to save time, so prototypes and queue stay as they were.
    with_representation = epoch > cfg.warm_up + cfg.start_contrastive

    batches_x = random_batches(rows_x, cfg.batch_size)
    batches_u = endless_batches(rows_u, cfg.batch_size)
    steps = []
    for step, batch_x in enumerate(tqdm(batches_x, "co-train", disable=None, leave=False)):
        batch_u = next(batches_u)

        # Views: two weak and two strong ones of every image.
        rows = torch.cat([batch_x, batch_x, batch_u, batch_u])
        sizes = [len(batch_x), len(batch_x), len(batch_u), len(batch_u)]
        x_w1, x_w2, u_w1, u_w2 = data.weak(rows).split(sizes)
        x_s1, x_s2, u_s1, u_s2 = data.strong(rows).split(sizes)

        with torch.no_grad():
            # Labels of unlabeled samples: both networks on both weak views.
            targets_u = partner_probs[:0]  # [0,K], if there are none
            if len(batch_u):
                partner_logits, _ = partner.net(torch.cat([u_w1, u_w2]))
                logits_u = [own.net(u_w1)[0], own.net(u_w2)[0]]  # BatchNorm: view by view
                logits_u += partner_logits.chunk(2)
                probs_u = torch.stack(logits_u).softmax(2)  # [V,B,K], V = 4
                targets_u = guess_labels(probs_u, cfg.temperature)

            # Labels of clean samples: the partner's split within the set, own predictions.
            logits_w1, embeddings_w1 = own.net(x_w1)
            logits_w2, _ = own.net(x_w2)
            own_probs = (logits_w1.softmax(1) + logits_w2.softmax(1)) / 2
            candidates_x = data.candidates[batch_x]
            targets_x = refine_labels(own_probs, partner_probs[batch_x], candidates_x,
                                      clean_prob[batch_x], cfg.temperature)

        # Mixup of all strong views; the first n rows count as clean, whatever is mixed in.
        n = 2 * len(batch_x)
        lam, permutation = draw_mixup(len(rows))
        if "mixup" in cfg.ablate:
            lam = 1.0
        targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
        mixed_targets = mixup(targets, lam, permutation)  # [2 B_x + 2 B_u, K]
        y_x, y_u = mixed_targets[:n], mixed_targets[n:]
        mixed_images = mixup(torch.cat([x_s1, x_s2, u_s1, u_s2]), lam, permutation)

        # Self-training, Eq. 8.
        logits, embeddings = own.net(mixed_images)
        weight_u = cfg.lambda_u * ramp_up(epoch + step / len(batches_x), cfg.warm_up)
        terms = {"self": self_training_loss(logits[:n], y_x, logits[n:], y_u, weight_u)}

        # Prototypes: first weak views of clean samples move them (Eq. 10), mixed images are
        # drawn to them (Eq. 9). Published code: here lambda_u has no ramp.
        if with_representation and "prototype" not in cfg.ablate:
            classes_x = targets_x.argmax(1)
            moved = update_prototypes(prototypes, embeddings_w1, classes_x, cfg.momentum)
            prototypes.copy_(moved)
            similarity = embeddings @ prototypes.T  # [2 B_x + 2 B_u, K]
            proto_loss = prototype_loss(similarity[:n], y_x, similarity[n:], y_u, cfg.lambda_u)
            terms["prototype"] = cfg.proto_weight * proto_loss

        # Contrast, Eq. 11: anchors of the first strong views, keys of the second, not mixed.
        if with_representation:
            _, anchors = own.net(torch.cat([x_s1, u_s1]))
            with torch.no_grad():
                weights = zip(own.key_net.parameters(), own.net.parameters())
                for key_weight, weight in weights:
                    key_weight.mul_(cfg.momentum).add_(weight, alpha=1 - cfg.momentum)
                _, keys = own.key_net(torch.cat([x_s2, u_s2]))
            classes = torch.cat([targets_x, targets_u]).argmax(1)
            clean = torch.arange(len(classes), device=rows.device) < len(batch_x)
            if "supcon" in cfg.ablate:
                clean[:] = True
            all_classes = torch.cat([classes, classes, own.queue.classes])  # [M]
            all_clean = torch.cat([clean, clean, own.queue.clean])  # [M]
            features = torch.cat([anchors, keys, own.queue.keys])  # [M,D]
            positives, ignored = contrastive_masks(all_classes, all_clean, len(anchors))
            contrast = supcon_loss(features, positives, ignored)
            terms["contrastive"] = cfg.contrastive_weight * contrast
            own.queue.push(keys, classes, clean)

        steps.append(own.step(terms))
    return mean_terms(steps)

def cosine_lr(epoch, lr, period):
    """Half a cosine from lr to lr/1000 at `period` epochs. DIFFERS: it does not rise again."""
    low = lr / 1000
    return low + (lr - low) * (1 + math.cos(math.pi * min(epoch / period, 1))) / 2

def train_epoch(learners, prototypes, data, cfg, epoch):
    """Both networks learn for an epoch, counted from 0 -> means of their loss terms."""
    for learner in learners:
        lr = cosine_lr(epoch, cfg.lr, cfg.lr_period or cfg.epochs)
        learner.optimizer.param_groups[0]["lr"] = lr
    if epoch < cfg.warm_up:
        terms_1, terms_2 = [warm_up_epoch(learner, data, cfg) for learner in learners]
    else:
        for learner in learners:
            learner.split = split_data(learner, data, cfg)
        partners = [learners[1], learners[0]]
        if "co-pl" in cfg.ablate:
            partners = learners
        terms_1, terms_2 = [co_train_epoch(own, partner, prototypes, data, cfg, epoch)
                            for own, partner in zip(learners, partners)]
    return {name: (terms_1[name] + terms_2[name]) / 2 for name in terms_1}

# (12) The run: files, command line ---------------------------------------------------------
# A run's folder holds checkpoint.pt, all that --resume and load_classifier() need, and, for
# people, metrics.jsonl (a record of every epoch) and annotations.npz (P, for --annotations).

def read_checkpoint(folder, device="cpu"):
    """A run's folder -> the dict that run() saved there."""
    path = Path(folder, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, device, weights_only=True)
        if "settings" not in checkpoint:
            raise ValueError("it is of an older version of coreg.py")
        return checkpoint
    except Exception as error:  # A damaged file makes torch raise nearly any kind of error.
        raise UserError(f"{path}: expected a run's complete checkpoint: {error!r}") from error

def make_sets(cfg, folder, pairs, images, labels, class_names):
    """Claims the run's folder, writes P to annotations.npz -> candidate sets, bool [N,K]."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(path.name for path in folder.iterdir())
    if found or not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: expected an empty folder that may be written, or --resume"
                        f" if it holds checkpoint.pt; it holds {found}")
    if cfg.synthetic:
        if labels.min() < 0:
            raise UserError("--synthetic: expected labels of training images: no --classes")
        generator = torch.Generator().manual_seed(cfg.seed)
        sets = flip_candidates(labels, len(class_names), *cfg.synthetic, generator)
        probs = sets[None].float()  # one annotator, for whom the labels of a set tie
    elif cfg.annotations:
        probs = read_annotations(cfg.annotations, len(images), len(class_names))
    else:
        templates = TEMPLATES.get(cfg.templates) or phrases(cfg.templates)
        if any("{}" not in template for template in templates):
            raise UserError(f"--templates: expected {{}} for the class in each of {templates}")
        clip = load_clip(cfg.clip_model, cfg.clip_pretrained, cfg.device)
        probs = annotate(clip, pairs, class_names, templates, cfg.device)
    with open(folder / "annotations.npz", "xb") as file:  # fails if it is another run's now
        np.savez(file, probs=probs)
    candidates = candidate_sets(probs)
    print(f"candidate sets: {candidates.sum(1).float().mean():.2f} labels on average")
    answered = probs.sum((0, 2)) > 0  # [N]; of some images all annotators may abstain.
    if labels.min() >= 0:
        print(f"sets without the true label*: {100 - coverage(candidates, labels):.2f} %")
    if labels.min() >= 0 and answered.any() and not cfg.synthetic:
        clip_acc = accuracy(probs.mean(0)[answered], labels[answered])
        print(f"the annotator, the mean of its templates, is right in*: {clip_acc:.2f} %")
    return candidates

def run(cfg):
    """Data -> candidate sets -> training -> the files of the run."""
    try:
        device = torch.zeros(1, device=cfg.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: expected one that works: {error}") from error
    folder = Path(cfg.resume or cfg.output_dir)

    pairs, test_pairs, class_names = read_dataset(cfg)
    pairs, images, labels = read_images(pairs, cfg)
    if len(images) < 2:
        raise UserError(f"--data-dir {cfg.data_dir}: expected two training images or more")
    test = read_images(test_pairs, cfg)[1:] if len(test_pairs) else None
    num_test = len(test[1]) if test else 0
    print(f"{cfg.dataset}: {len(images)} training, {num_test} test images, on {device}")
    print(f"{len(class_names)} classes: {', '.join(class_names)}")
    print(f"results go to {folder}", flush=True)
    fingerprint = [zlib.crc32(images.numpy()), class_names]
    if cfg.resume:
        checkpoint = read_checkpoint(folder, device)
        candidates = checkpoint["candidates"]
        if checkpoint["fingerprint"] != fingerprint:
            raise UserError(f"--data-dir {cfg.data_dir}: expected the images of {folder}")
    else:
        candidates = make_sets(cfg, folder, pairs, images, labels, class_names)

    # The state of training, new or from the checkpoint.
    torch.manual_seed(cfg.seed)
    data = WeakStrongImages(images.to(device), candidates.to(device), cfg)
    learners = [Learner(len(class_names), cfg, device) for _ in range(2)]
    prototypes = torch.zeros(len(class_names), EMBEDDING_DIM, device=device)
    records = []
    if cfg.resume:
        for learner, state in zip(learners, checkpoint["learners"]):
            learner.load_state(state)
        prototypes = checkpoint["prototypes"]
        records = checkpoint["records"]
        torch.set_rng_state(checkpoint["random_state"].cpu())

    def save():
        text = "".join(json.dumps(record) + "\n" for record in records)
        Path(folder, "metrics.jsonl").write_text(text)
        state = dict(
            settings=vars(cfg), class_names=class_names, fingerprint=fingerprint,
            candidates=candidates, mean=data.mean, std=data.std, prototypes=prototypes,
            learners=[learner.state() for learner in learners], records=records,
            random_state=torch.get_rng_state())
        content = io.BytesIO()  # torch.save() itself hides why a file cannot be written.
        torch.save(state, content)
        Path(folder, "checkpoint.tmp").write_bytes(content.getbuffer())
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # whole at any time

    if not cfg.resume:
        save()
    if len(images) < 20 * cfg.batch_size:
        print("note: an epoch has fewer than 20 steps; a lower --batch-size may learn more")
    print("epoch    phase    loss   clean   test% right*% seconds  least clean", flush=True)
    for epoch in range(len(records), cfg.epochs):
        start = time.time()
        terms = train_epoch(learners, prototypes, data, cfg, epoch)
        loss = sum(terms.values())
        # Weights, too, since no term has seen the last step.
        weights = [*learners[0].net.parameters(), *learners[1].net.parameters()]
        if not math.isfinite(loss) or not all(weight.isfinite().all() for weight in weights):
            raise UserError(f"epoch {epoch + 1} not finite, {terms}: --resume with lower --lr")
        phase = "warm-up" if epoch < cfg.warm_up else "co-train"
        record = {"epoch": epoch + 1, "phase": phase, "loss": loss, **terms}
        record.update(evaluate(learners, data, labels, test, class_names))
        record["seconds"] = time.time() - start
        records.append(record)
        save()
        line = f"{epoch + 1:5} {phase:>8} {loss:7.4f}"
        for name in ("clean", "test_acc", "split_precision", "seconds"):
            line += f" {record[name]:7.1f}" if name in record else f" {'-':>7}"
        if "least_clean" in record:
            line += f"  {record['least_clean']:.0f} % of {record['least_class']}"
        print(line, flush=True)
    print(f"finished after epoch {len(records)}, files in {folder}")
    if "test_acc" in records[-1]:
        print(f"result: {records[-1]['test_acc']:.1f} % of test images right")

def load_classifier(folder, device="cpu"):
    """A run's folder -> class names, function: list of 8-bit PIL images -> probs [n,K]."""
    checkpoint = read_checkpoint(folder, device)
    cfg = argparse.Namespace(**checkpoint["settings"])
    learners = [Learner(len(checkpoint["class_names"]), cfg, device) for _ in range(2)]
    for learner, state in zip(learners, checkpoint["learners"]):
        learner.net.load_state_dict(state["net"])

    def classify(images):
        if cfg.dataset == "folder":  # Images of other data sets are not cut to squares.
            images = [to_square(image) for image in images]
        pixels = torch.stack([to_pixels(image, cfg) for image in images])  # [n,C,H,H]
        return predict(learners, pixels, checkpoint["mean"], checkpoint["std"]).softmax(1)
    return checkpoint["class_names"], classify

def main(argv=None):
    """Command line -> exit code: 0, 2 (the user can mend it), 130 (Ctrl-C); or SystemExit."""
    folder = "RUN"
    try:
        cfg = parse(argv)
        folder = cfg.resume or cfg.output_dir
        run(cfg)
        return 0
    except KeyboardInterrupt:
        print(f"coreg.py: interrupted; --resume {folder}, if training began", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not error.filename:  # a full disk
            error = f"{folder}: {error}"
        print("coreg.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2

# (13) Appendix: TinyCLIP -------------------------------------------------------------------
# The annotator of the digits has CLIP's interface and learns nothing: it draws the prompt in
# a style, and a feature is the 64 pixels of a drawing or an image, centred, of norm 1. It
# errs, and its templates disagree. Styles and numbers were chosen with true labels.

class TinyCLIP:
    """What annotate() needs of a CLIP, without weights; normalize is ignored."""

    logit_scale = torch.tensor(20.0).log()  # annotate() takes its exp, as of CLIP's.

    def encode_image(self, images, normalize):
        pixels = images.flatten(1)  # [B,64]
        return F.normalize(pixels - pixels.mean(1, keepdim=True))

    encode_text = encode_image  # The "tokens" of a prompt are its drawing.

def tiny_pixels(image):
    """The preprocessing: PIL image -> float [1,8,8]."""
    return TF.pil_to_tensor(image.convert("L").resize((8, 8))) / 255

def draw(prompts):
    """The tokenizer: prompts such as 'a wide number six' -> drawings, float [n,1,8,8]."""
    drawings = []
    for prompt in prompts:
        words = prompt.split()
        if len(words) != 4 or words[3] not in DIGITS:
            raise UserError(f"--clip-model tiny: expected 'a wide number six', got {prompt!r}")
        style = words[1]
        width = {"narrow": 16, "wide": 30}.get(style, 20)  # unknown styles are plain
        slant = {"slanted": -15.0}.get(style, 0.0)  # in degrees
        font = ImageFont.load_default_imagefont()  # made of few pixels
        if style == "printed":
            font = ImageFont.load_default(30)  # made of outlines
        image = Image.new("L", (64, 64))
        digit = str(DIGITS.index(words[3]))
        ImageDraw.Draw(image).text((20, 12), digit, 255, font, stroke_width=1)
        image = image.crop(image.getbbox()).resize((width, 40))
        image = TF.affine(TF.center_crop(image, 64), 0, [0, 0], 1.0, [slant, 0.0])
        image = ImageOps.pad(image.crop(image.getbbox()), (8, 8), Image.Resampling.BOX)
        drawings.append(tiny_pixels(image))
    return torch.stack(drawings)

if __name__ == "__main__":
    sys.exit(main())
