# SPDX-License-Identifier: MIT
"""Co-Reg: a small image classifier from unlabeled images and a vision-language model.

CLIP labels every image once per prompt template. These labels are the image's candidate set,
which may lack the true one. Two networks clean the sets for each other: the method
of "Pre-Trained Vision-Language Models as Partial Annotators" (arXiv 2406.18550, AAAI 2025).

    python coreg.py                     # handwritten digits and a tiny CLIP, no download
    python coreg.py --dataset cifar10   # the paper's setting, with OpenAI's CLIP ViT-B/32

"Eq. 5" is an equation of the AAAI paper. "Published code": found in the authors' code, not in
the paper. "DIFFERS": this file departs from that code, with the reason.
"""

import argparse
import copy
import functools
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
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

# Shapes in comments: N images, K classes, T prompt templates, B a batch, V views of an image,
# C channels, H side of an image, D embedding, E epochs; A and M: section 9.
# Endings of names: _x clean samples, _u unlabeled samples, _w1 _w2 weak views, _s1 _s2 strong.

# (0) Settings ------------------------------------------------------------------------------
# A setting is a flag. The command line comes first, then the run to resume, then the data
# set's preset (section 1), then the default below, which is the paper's for CIFAR-10.

class UserError(Exception):
    """A mistake that the user can mend: main() prints it in one line and returns 2."""

def number(kind, low, high=1e9):
    """A type for argparse: an int or float from low to high."""

    def number_in_range(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high:g}, got {text}")
        return value

    number_in_range.__name__ = kind.__name__  # what argparse calls it in its messages
    return number_in_range

def parse(argv):
    """Words of the command line -> settings. Errors: SystemExit 2; of --resume, UserError."""
    usage = "coreg.py [--flag value ...]; coreg.py --help shows all flags"
    parser = argparse.ArgumentParser("coreg.py", usage, add_help=False, allow_abbrev=False)

    def flag(name, default, kind, text, **more):
        text += " (%(default)s)"
        parser.add_argument(name, default=default, type=kind, help=text, **more)

    path = os.path.expanduser
    count = number(int, 0)
    weight = number(float, 0)
    share = number(float, 0, 1)
    parts = "co-pl supcon prototype unlabeled mixup alignment split".split()
    flag("--dataset", "digits", str, "folder: your own images", choices=PRESETS)
    flag("--data-dir", "data", path, "where data sets lie or are loaded to")
    flag("--classes", None, str, "of a folder: cat,dog,...; its train/ is then unlabeled")
    flag("--num-samples", None, number(int, 2), "train on a random subset of N images")
    flag("--image-size", 32, number(int, 8), "side of what the networks see")
    flag("--channels", 3, int, "1: grey, 3: colour", choices=[1, 3])
    flag("--mirror", 1, int, "mirror views; 0 for text, digits, signs", choices=[0, 1])
    flag("--operations", 1, int, "RandAugment's, in strong views", choices=[0, 1])
    flag("--cutout", [0, 0.5], share, "least and most of the side; grey value: 0.5", nargs="+")
    flag("--annotations", None, path, "an .npz with probs [T,N,K], in place of CLIP")
    flag("--clip-model", "ViT-B-32-quickgelu", str, "a model of open_clip; or tiny")
    flag("--clip-pretrained", "openai", str, "open_clip's tag of the weights, or a file")
    flag("--templates", "small", str, "small, imagenet, digits, or a file with {} a line")
    modes = ["multi_prompt", "argmax"]
    flag("--candidates", "multi_prompt", str, "argmax: of the mean", choices=modes)
    flag("--flip", None, share, "synthetic sets from TRUE labels: rates q and eta", nargs=2)
    flag("--epochs", 800, number(int, 1), "in all")
    flag("--warm-up", 50, count, "epochs on whole sets; raise it for large or noisy sets")
    flag("--start-contrastive", 10, count, "Eq. 9-11 wait this number of epochs and one more")
    flag("--batch-size", 256, number(int, 2), "clean images in a batch")
    flag("--lr", 0.01, weight, "learning rate; lower it if the loss is not finite")
    flag("--lr-period", 800, count, "epochs of the learning rate's cosine; 0: all")
    flag("--width", 64, number(int, 1), "channels of the ResNet; 16 suits a CPU")
    flag("--temperature", 0.5, number(float, 0.01), "of Eq. 7; 1 leaves labels soft")
    flag("--lambda-u", 1.0, weight, "weight of unlabeled images, Eq. 8 and 9")
    flag("--proto-weight", 0.1, weight, "weight of Eq. 9")
    flag("--contrastive-weight", 0.1, weight, "weight of Eq. 11")
    flag("--momentum", 0.999, share, "of prototypes and key encoders")
    flag("--queue-size", 8192, number(int, 1), "keys in each queue")
    flag("--ablate", None, str, "leave out; supcon: clean flags of Eq. 11", choices=parts)
    flag("--seed", 0, count, "of networks, order of images, views, flips")
    flag("--device", "auto", str, "cpu, cuda, cuda:N or mps")
    flag("--precision", "auto", str, "of convolutions; fp32 may be TF32",
         choices=["auto", "bf16", "fp32"])
    flag("--output-dir", None, path, "default: runs/DATASET-seedN-DATE-TIME")
    flag("--resume", None, path, "folder of a run to go on with")
    parser.add_argument("--balance", action="store_true", help="equal clean share per class")

    # The first pass reads --dataset and --resume, which set the defaults of the second.
    # --help is added only then, so that it shows these defaults.
    chosen, _ = parser.parse_known_args(argv)
    parser.set_defaults(**vars(parser.parse_args(PRESETS[chosen.dataset].split())))
    if chosen.resume:
        try:
            saved = json.loads(Path(chosen.resume, "config.json").read_text())
            chosen.dataset = saved["dataset"]  # KeyError: other JSON than a run's settings
        except (OSError, ValueError, TypeError, KeyError) as error:
            text = "expected a run's folder, with a whole config.json"
            raise UserError(f"--resume {chosen.resume}: {text}: {error!r}") from error
        parser.set_defaults(**saved)
    parser.add_argument("-h", "--help", action="help", help="show this")
    presets = "; ".join(f"{name}: {flags}" for name, flags in PRESETS.items())
    parser.epilog = f"In brackets: the defaults of this command. Presets: {presets}"
    cfg = parser.parse_args(argv)
    if cfg.warm_up > cfg.epochs:
        parser.error(f"--warm-up {cfg.warm_up} is more than --epochs {cfg.epochs}: set both")
    if len(cfg.cutout) not in (2, 3):
        parser.error("--cutout: expected two or three numbers")
    if chosen.flip and chosen.annotations:
        parser.error("--flip and --annotations: expected one of them")
    if cfg.classes and cfg.dataset != "folder":
        parser.error("--classes: expected --dataset folder beside it")
    kept = ["annotations", "flip", "candidates", "templates", "clip_model", "clip_pretrained"]
    kept += ["seed", "output_dir"]
    if chosen.resume and any(getattr(cfg, name) != saved.get(name) for name in kept):
        parser.error(f"--resume: a run keeps {', '.join(kept)}: leave these flags out")
    return cfg

# (1) Prompt templates and data sets --------------------------------------------------------
# A prompt is a template filled with a class name. A data set is a sequence of pairs (PIL
# image, label), mostly torchvision's; the label -1 means that nobody knows it.

def phrases(text, pattern="{}"):
    """'a; b' -> [pattern.format('a'), pattern.format('b')]."""
    return [pattern.format(phrase.strip()) for phrase in text.split(";")]

SMALL = """a photo of a {}; a rendering of a {}; a cropped photo of the {}; the photo of a {};
    a photo of a clean {}; a photo of a dirty {}; a dark photo of the {}; a photo of my {};
    a photo of the cool {}; a close-up photo of a {}; a bright photo of the {};
    a cropped photo of a {}; a photo of the {}; a good photo of the {}; a photo of one {};
    a close-up photo of the {}; a rendition of the {}; a photo of the clean {};
    a rendition of a {}; a photo of a nice {}; a good photo of a {}; a photo of the nice {};
    a photo of the small {}; a photo of the weird {}; a photo of the large {};
    a photo of a cool {}; a photo of a small {}"""
TEMPLATES = {
    "small": phrases(SMALL),
    "imagenet": [fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES],  # functions
    "digits": phrases("plain; narrow; wide; slanted; printed", "a {} number {{}}"),
}
DIGITS = "zero one two three four five six seven eight nine".split()
FACES = "Angry; Disgust; Fear; Happy; Sad; Surprise; Neutral"
SIGNS = """Speed limit 20; Speed limit 30; Speed limit 50; Speed limit 60; Speed limit 70;
    Speed limit 80; Speed limit 80 cancelled; Speed limit 100; Speed limit 120; No passing;
    No truck overtaking; Only have priority at the next intersection; Priority road; Give way;
    Stop; All vehicles prohibited; Trucks prohibited; No entry; Caution!; Curve (to the left);
    Curve (to the right); Continuous curves; Rough road; Slippery road;
    The road narrows on the right; Construction site; Signal light;
    Pay attention to pedestrians; Pay attention to children; Watch out for bikes;
    Watch out for snow/ice on the road; Deer ahead; Unlimited speed; Turn right; Turn left;
    Go straight; Go straight and turn right; Go straight and turn left; Drive on the right;
    Drive on the left; Driving around the island; Lift ban on no passing;
    Lift ban on truck overtaking"""
CLASS_NAMES = {  # The other data sets bring their names with them.
    "digits": DIGITS,
    "svhn": [f"number {digit}" for digit in range(10)],
    "fer2013": phrases(FACES, "{} Facial Expression"),
    "gtsrb": phrases(SIGNS, "German Traffic Sign: {}"),
}
GREY = "--channels 1 --operations 0"
LARGE = "--epochs 100 --image-size 64"
PRESETS = {  # flags, as in the published code; those of digits and folder are this file's own
    "digits": f"{GREY} --mirror 0 --cutout 0 0.33 0.5 --clip-model tiny --templates digits"
    " --image-size 8 --width 16 --epochs 20 --warm-up 8 --start-contrastive 1 --batch-size 64"
    " --lr 0.05 --lr-period 0 --momentum 0.99 --queue-size 1024 --precision fp32",
    "folder": "--epochs 100 --lr-period 0",
    "cifar10": "",
    "cifar100": "--warm-up 100",
    "svhn": "--mirror 0",
    "fmnist": f"{GREY} --epochs 100 --image-size 28 --cutout 0.57143 0.57143 0",  # 16 pixels
    "eurosat": LARGE,
    "fer2013": f"{GREY} {LARGE} --cutout 0.25 0.25 0",
    "gtsrb": f"{LARGE} --mirror 0",
}

def to_rgb(image):
    """PIL image of any mode -> RGB, upright as its EXIF data say, on white if transparent."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # Damaged EXIF data raise any kind of error; the image stays as it is.
        pass
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def centre_square(image):
    """PIL image -> the largest square around its centre."""
    return TF.center_crop(image, min(image.size))

def open_image(path):
    """Image file -> PIL image, RGB, upright and opaque. UserError if it cannot be read."""
    try:
        image = Image.open(path)
        image.load()
        if image.mode.startswith(("I", "F")):  # RGB would clip them to white.
            raise ValueError(f"its mode is {image.mode}, not of 8 bits a channel")
    except Exception as error:  # A broken file makes Pillow raise nearly any kind of error.
        raise UserError(f"{path}: expected an image that can be read, but {error}") from error
    return to_rgb(image)

def find_images(root):
    """Sorted pairs (image file, name of the folder right below root that it lies in).

    Each folder and file counts once, whatever links lead to it. Left out is what systems and
    editors hide or make for themselves.
    """
    hidden = (".", "__", "lost+found", "@eaDir", "$RECYCLE.BIN")
    found = {}
    visited = set()
    for parent, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(parent) in visited:
            names = []  # A link has led here again: neither its files nor its folders count.
            folders.clear()
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith(hidden))
        for name in names:
            path = Path(parent, name)
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
                parts = path.relative_to(root).parts
                folder = tidy(parts[0]) if len(parts) > 1 else ""
                found.setdefault(os.path.realpath(path), (str(path), folder))
    return sorted(found.values())

def tidy(name):
    """A name without blanks around it, its accents in one of the two forms of Unicode."""
    return unicodedata.normalize("NFC", name.strip())

class Photos:
    """Pairs (centre square of an image file, label) out of pairs (image file, label)."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return centre_square(open_image(path)), label

def read_photos(root, classes):
    """root/train and perhaps root/test -> training pairs, test pairs, class names.

    Folders in them name the classes. If classes are given, a text such as "cat,dog", images
    of train/ have no labels and lie anywhere below it.
    """
    train = find_images(root / "train")
    test = find_images(root / "test")
    names = sorted({folder for _, folder in train})
    if classes:
        names = [tidy(name) for name in classes.split(",")]
    if not train or "" in names:
        raise UserError(f"--data-dir {root}: expected images below {root}/train, in a folder"
                        f" for each class or with --classes a,b; got {len(train)}, {names}")
    unknown = {folder for _, folder in test} - set(names)
    if unknown:
        raise UserError(f"{root}/test: expected folders of classes {names}, got {unknown}")
    test = [(path, names.index(folder)) for path, folder in test]
    if classes:
        return Photos([(path, -1) for path, _ in train]), Photos(test), names
    train = [(path, names.index(folder)) for path, folder in train]
    return Photos(train), Photos(test), names

def read_known(name, root):
    """Any data set but a folder -> training part, test part (None if it has no labels)."""
    if name == "digits":  # scikit-learn's 1,797 images of 8 x 8 pixels, with values 0 to 16
        digits = load_digits()
        pixels = (digits.images * 255 / 16).astype("uint8")
        return list(zip(map(Image.fromarray, pixels), digits.target.tolist())), None
    if name == "eurosat":
        return datasets.EuroSAT(root, download=True), None
    if name == "fer2013":
        return datasets.FER2013(root, "train"), None
    readers = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100,
               "fmnist": datasets.FashionMNIST, "svhn": datasets.SVHN, "gtsrb": datasets.GTSRB}
    parts = (True, False)  # train=
    if name in ("svhn", "gtsrb"):
        parts = ("train", "test")  # split=
    return [readers[name](root, part, download=True) for part in parts]

def read_dataset(cfg):
    """Settings -> training pairs, test pairs (perhaps none), class names."""
    root = Path(cfg.data_dir)
    if cfg.dataset == "folder":
        train, test, names = read_photos(root, cfg.classes)
    else:
        try:
            train, test = read_known(cfg.dataset, root)
        except (OSError, RuntimeError) as error:  # what torchvision and downloads raise
            raise UserError(f"--data-dir {root}: no {cfg.dataset} there: {error}") from error
        names = CLASS_NAMES.get(cfg.dataset) or train.classes

    # This order is the same for every --seed. Its last fifth is held out if there is no test
    # part (published code, for EuroSAT and FER2013); --num-samples takes its first images.
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    if test is None:
        num_train = round(0.8 * len(rows))
        test = Subset(train, rows[num_train:])
        rows = rows[:num_train]
    rows = sorted(rows[: cfg.num_samples])
    if len(rows) < 2 or len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"--data-dir {root}: expected two or more images, and classes with"
                        f" different names, got {len(rows)} images and classes {names}")
    return Subset(train, rows), test, names

# A photo is read twice, for CLIP and for the networks; the cache drops a repeated message.
print_once = functools.cache(print)

def load(pairs, transform):
    """Pairs -> batches (transformed images, labels); broken photos are named and left out.

    Four threads read. Each holds one photo, transforms it and lets it go: photos are large.
    """

    def read(row):
        try:
            image, label = pairs[row]
            return transform(image), label
        except UserError as error:
            print_once(f"left out: {error}", file=sys.stderr)

    with ThreadPoolExecutor(4) as pool:
        for rows in tqdm(torch.arange(len(pairs)).split(256), "read", disable=None):
            batch = [pair for pair in pool.map(read, rows.tolist()) if pair]
            if batch:
                images, labels = zip(*batch)
                yield torch.stack(images), torch.tensor(labels)

def to_pixels(image, cfg):
    """PIL image -> uint8 [C,H,H], what the networks see."""
    mode = "L" if cfg.channels == 1 else "RGB"
    return TF.pil_to_tensor(TF.resize(image.convert(mode), [cfg.image_size, cfg.image_size]))

def read_images(pairs, cfg):
    """Pairs -> images uint8 [N,C,H,H], labels int [N] (-1: unknown)."""
    batches = list(load(pairs, lambda image: to_pixels(image, cfg)))
    if not batches:
        raise UserError(f"--data-dir {cfg.data_dir}: none of {len(pairs)} images can be read")
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)

# (2) CLIP annotation -> candidate sets -----------------------------------------------------
# "CLIP Annotated Partial Labels": template t and class k give the text feature u_tk, image i
# gives the image feature v_i, and P[t,i,:] is the softmax over k of logit_scale * v_i . u_tk.
# The candidate set S_i holds the answers of the single templates: small where they agree.

def candidate_sets(probs, mode="multi_prompt"):
    """P [T,N,K] -> candidate sets S_i = {argmax_k P[t,i,k] : t = 1..T}, bool [N,K].

    DIFFERS: labels that tie all count, as people's votes may. A row of zeros abstains, and a
    set that stays empty becomes full.
    Mode argmax: S_i holds the answer of the mean over t alone.
    """
    if mode == "argmax":
        probs = probs.float().mean(0, keepdim=True)  # [1,N,K]
    candidates = torch.zeros(probs.shape[1:], dtype=torch.bool)
    for template_probs in probs:
        largest = template_probs.amax(1, keepdim=True)  # [N,1]
        candidates |= (template_probs == largest) & (largest > 0)
    candidates[~candidates.any(1)] = True
    return candidates

def flip_candidates(labels, num_classes, partial_rate, noise_rate, generator=None):
    """True labels int [N] -> synthetic candidate sets, bool [N,K] (the paper's Table 3).

    A wrong label joins with chance partial_rate. Then, with chance noise_rate, a label drawn
    from outside the set takes the true label's place; a full set stays as it is.
    """
    joins = torch.rand(len(labels), num_classes, generator=generator) < partial_rate
    candidates = joins | F.one_hot(labels, num_classes).bool()
    noisy = torch.rand(len(labels), generator=generator) < noise_rate  # [N]
    rows = (noisy & ~candidates.all(1)).nonzero().flatten()
    if len(rows):
        outside = (~candidates[rows]).float()  # [n,K]
        new_labels = outside.multinomial(1, generator=generator).flatten()
        candidates[rows, labels[rows]] = False
        candidates[rows, new_labels] = True
    return candidates

def load_templates(name):
    """Name of a list in TEMPLATES, or of a text file with a template a line -> list."""
    templates = TEMPLATES.get(name, [])
    if not templates and Path(name).is_file():
        text = Path(name).read_text("utf-8-sig", "replace")  # -sig: no byte-order mark
        templates = [line.strip() for line in text.splitlines() if line.strip()]
    if not templates or any(line.count("{}") != 1 for line in templates):
        raise UserError(f"--templates {name}: expected {[*TEMPLATES]} or a file, {{}} a line")
    return templates

def load_clip(name, weights, device):
    """open_clip's names of model and weights -> model, preprocessing of images, tokenizer."""
    if name == "tiny":
        return TinyCLIP(), TinyCLIP.preprocess, TinyCLIP.tokenize
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, weights, device=device, require_pretrained=True)
        return model.eval(), preprocess, open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and downloads raise nearly any kind of error.
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise UserError(f"--clip-model {name} --clip-pretrained {weights}: expected a model of"
                        f" open_clip, and a file or one of {tags}, but {error}") from error

@torch.inference_mode()
def annotate(clip, pairs, class_names, templates, device):
    """CLIP's answers to the images of pairs: P float16 [T,N,K].

    DIFFERS: float16, as in the run's file, so that a resume sees the same numbers; labels
    closer than its rounding tie. UserError if two prompts have equal tokens.
    """
    model, preprocess, tokenizer = clip
    text_features = []
    for template in templates:
        tokens = tokenizer([template.replace("{}", name) for name in class_names])
        if len(tokens.unique(dim=0)) < len(class_names):
            raise UserError(f"CLIP reads {template!r} alike for two classes of {class_names}")
        text_features.append(model.encode_text(tokens.to(device), normalize=True))  # [K,D]
    text_features = torch.stack(text_features)  # [T,K,D]

    probs = []
    for images, _ in load(pairs, preprocess):
        image_features = model.encode_image(images.to(device), normalize=True)  # [B,D]
        logits = model.logit_scale.exp() * image_features @ text_features.mT  # [T,B,K]
        probs.append(logits.float().softmax(2).half().cpu())
    return torch.cat(probs, 1)

def read_annotations(path, images, class_names):
    """An .npz with an array probs -> P float16 [T,N,K].

    If it has arrays classes (names) or images (checksum), as a run's has, they must match.
    """
    try:
        arrays = dict(np.load(path))
        probs = torch.from_numpy(arrays["probs"].astype(np.float16))
    except Exception as error:  # A damaged file makes NumPy raise nearly any kind of error.
        raise UserError(f"{path}: expected an .npz with an array probs: {error!r}") from error
    shape = ("T", len(images), len(class_names))
    if probs.shape[1:] != shape[1:] or len(probs) == 0:
        raise UserError(f"{path}: expected probs of shape {shape}, got {tuple(probs.shape)}")
    if not 0 <= probs.min() <= probs.max() <= 1:
        raise UserError(f"{path}: expected probs from 0 to 1, got others")
    for name, expected in (("classes", class_names), ("images", zlib.crc32(images.numpy()))):
        if name in arrays and arrays[name].tolist() != expected:
            raise UserError(f"{path}: its {name} are others than those of this run")
    return probs

def make_probs(cfg, pairs, images, labels, device):
    """P [T,N,K] from a file, from true labels (--flip) or from CLIP."""
    if cfg.annotations:
        print(f"annotations: from {cfg.annotations}")
        return read_annotations(cfg.annotations, images, cfg.class_names)
    if cfg.flip:
        if labels.min() < 0:
            raise UserError("--flip: expected labels of the training images, got none")
        generator = torch.Generator().manual_seed(cfg.seed)
        candidates = flip_candidates(labels, len(cfg.class_names), *cfg.flip, generator)
        return candidates[None].half()  # one annotator, for whom the labels of a set tie
    clip = load_clip(cfg.clip_model, cfg.clip_pretrained, device)
    return annotate(clip, pairs, cfg.class_names, load_templates(cfg.templates), device)

# (3) The weak/strong data set --------------------------------------------------------------
# Views of a whole batch are made at once, on the device: weak, a random crop, mirrored or not;
# strong, that with a random operation and a cutout. Kinds and ranges are the published code's.
# All random numbers come from the CPU's generator, so that a resumed run goes on exactly.

def crop_and_mirror(images, mirror):
    """Shifts [B,C,H,H] by up to 1/8 of the side, black beyond; may mirror half the images."""
    count, _, side, _ = images.shape
    most = round(side / 8)
    # A view shows at (x, y) what was at theta (x, y, 1); x and y run from -1 to 1.
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = 1
    theta[:, 1, 1] = 1
    if mirror:
        theta[torch.rand(count) < 0.5, 0, 0] = -1
    theta[:, :, 2] = torch.randint(-most, most + 1, (count, 2)) * 2 / side
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "nearest", align_corners=False)

def random_number(low, high):
    """Uniform between low and high."""
    return low + (high - low) * torch.rand(()).item()

SHEAR = math.degrees(math.atan(0.3))  # by 0.3 of the side, as an angle
OPERATIONS = [  # RandAugment's, on float images of 0 to 1; each call draws its strength
    lambda images: images,
    TF.autocontrast,
    TF.equalize,
    v2.ColorJitter(brightness=(0.05, 0.95)),
    v2.ColorJitter(saturation=(0.05, 0.95)),
    v2.ColorJitter(contrast=(0.05, 0.95)),
    lambda images: TF.adjust_sharpness(images, random_number(0.05, 0.95)),
    lambda images: TF.posterize(images, int(random_number(4, 8))),  # 4 to 7 bits
    lambda images: TF.solarize(images, random_number(0, 1)),
    v2.RandomRotation(30),
    # DIFFERS: torchvision shears about the centre, the published code about an edge.
    v2.RandomAffine(0, shear=(-SHEAR, SHEAR, 0, 0)),
    v2.RandomAffine(0, shear=(0, 0, -SHEAR, SHEAR)),
    v2.RandomAffine(0, translate=(0.3, 0)),
    v2.RandomAffine(0, translate=(0, 0.3)),
]

def random_operation(images):
    """One of OPERATIONS for each image, float [B,C,H,H].

    DIFFERS: images of a batch with the same operation share its strength, so that
    torchvision's transforms of batches serve; in the published code each draws its own.
    """
    choice = torch.randint(len(OPERATIONS), (len(images),))
    changed = images.clone()
    for index, operation in enumerate(OPERATIONS):
        rows = (choice == index).nonzero().flatten()
        if len(rows):
            changed[rows] = operation(images[rows])
    return changed.clamp(0, 1)

def cutout(images, smallest, largest, value=0.5):
    """Sets a square anywhere to value; its side is smallest to largest times the image's.

    DIFFERS: grey, and cut off at the edges, for plain code; in the published code it has the
    colour (125, 123, 114) and is moved inward at two edges.
    """
    count, _, side, _ = images.shape
    half = side / 2 * (smallest + (largest - smallest) * torch.rand(count, 1))  # [B,1]
    pixels = torch.arange(side) + 0.5
    in_rows = (pixels - side * torch.rand(count, 1)).abs() < half  # [B,H]
    in_columns = (pixels - side * torch.rand(count, 1)).abs() < half  # [B,H]
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # [B,1,H,H]
    return images.masked_fill(inside.to(images.device), value)

class WeakStrongImages:
    """Training images uint8 [N,C,H,H], sets bool [N,K]; views of chosen rows, float [B,C,H,H].

    DIFFERS: mean and deviation are measured, since users bring their own images.
    """

    def __init__(self, images, candidates, cfg):
        self.images = images
        self.candidates = candidates
        self.cfg = cfg
        sample = images[:: 1 + len(images) // 10_000] / 255  # up to 10,000 of them
        self.mean = sample.mean((0, 2, 3), keepdim=True)  # [1,C,1,1]
        self.std = sample.std((0, 2, 3), keepdim=True).clamp_min(1 / 255)  # never 0

    def __len__(self):
        return len(self.images)

    def weak(self, rows):
        images = crop_and_mirror(self.images[rows] / 255, self.cfg.mirror)
        return (images - self.mean) / self.std

    def strong(self, rows):
        images = crop_and_mirror(self.images[rows] / 255, self.cfg.mirror)
        if self.cfg.operations:
            images = random_operation(images)
        return (cutout(images, *self.cfg.cutout) - self.mean) / self.std

# (4) Both networks -------------------------------------------------------------------------
# Two pre-activation ResNet-18 start from different random weights. Each has a linear
# classifier f and a projection head, whose output z, of norm 1, is the image's embedding.

EMBEDDING_DIM = 128  # D, published code
SGD_SETTINGS = dict(momentum=0.9, weight_decay=5e-4)  # published code

class PreActBlock(nn.Module):
    """Two convolutions and a shortcut; both branches begin after the first BatchNorm, ReLU."""

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

    bf16 = False  # DIFFERS: a Learner may have convolutions computed in bfloat16, for speed.

    def __init__(self, num_classes, in_channels=3, image_size=32, width=64, embedding_dim=128):
        super().__init__()
        layers = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        dim = width
        for channels in (width, 2 * width, 4 * width, 8 * width):
            # Every stage halves the sides, but for the first one of images under 64 pixels.
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
    """One of the two networks with all that belongs to it alone.

    net, optimizer: the network. key_net, queue: for the contrast, see section 9.
    losses: of the last epochs, [N] each. split: predictions [N,K] and w [N], see section 6.
    """

    def __init__(self, num_classes, cfg, device, bf16=False):
        net = CoRegNet(num_classes, cfg.channels, cfg.image_size, cfg.width, EMBEDDING_DIM)
        net.bf16 = bf16
        self.net = net.to(device, memory_format=torch.channels_last)
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
        """What a checkpoint keeps; not key_net, since every epoch makes it anew."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "queue": [self.queue.keys, self.queue.classes, self.queue.clean],
            "losses": self.losses,
            "split": self.split,
        }

    def load_state(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.queue.keys, self.queue.classes, self.queue.clean = state["queue"]
        self.losses = state["losses"]
        self.split = state["split"]

# (5) Warm-up -------------------------------------------------------------------------------
# "Supervised Training": each network by itself learns, on strong views, that the labels of
# a set together have probability 1. Eq. 2 keeps it unsure, lest it learn wrong sets by heart.

def partial_cross_entropy(logits, candidates):
    """Eq. 1: mean of -log(sum_{k in S_i} p_ik + 1e-5). logits [B,K], S bool [B,K] -> scalar.

    Published code: the 1e-5; full sets do not count, and if all are full the loss is 0.
    """
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

    DIFFERS: a last batch of one row is left out, since BatchNorm cannot train on it.
    """
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
# true label is learnt early, so its loss is small. Two Gaussians are fitted to the losses; w_i
# is the probability that loss i belongs to the lower one, that is, that set i is clean. The
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

    Each epoch's losses are scaled to 0..1, the last epochs' averaged. Equal ones give w = 0.
    """
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
    """w [N] -> w [N] by which the same share of every class is clean, those of lowest loss.

    losses [N]; classes int [N], the likeliest label within each set. DIFFERS (with --balance):
    one mixture can call no image of a hard class clean, and the class is then not learnt.
    """
    num_clean = (clean_prob > CLEAN_THRESHOLD).sum().item()
    balanced = torch.zeros_like(clean_prob)
    for k in classes.unique():
        members = (classes == k).nonzero().flatten()
        count = math.ceil(num_clean * len(members) / len(classes))
        lowest = members[losses[members].argsort()[:count]]
        balanced[lowest] = clean_prob[lowest].clamp_min(0.75)  # above the threshold
    return balanced

@torch.no_grad()
def split_data(learner, data, cfg):
    """A network judges all sets -> aligned predictions [N,K], w [N]; notes learner.losses.

    DIFFERS: the alignment divides by this pass's mean; the published code's is partly an epoch
    old. And if hardly any set is clean, the tenth of lowest loss counts as clean.
    """
    learner.net.eval()
    batches = torch.arange(len(data), device=data.images.device).split(512)  # to fit in memory
    logits = torch.cat([learner.net(data.weak(rows))[0] for rows in batches])
    probs = logits.softmax(1)  # [N,K]
    if cfg.ablate != "alignment":
        uniform = torch.full_like(probs[0], 1 / len(probs[0]))
        probs = align_distribution(probs, probs.mean(0), uniform)
    losses = max_candidate_loss(probs, data.candidates)  # [N]
    learner.losses = [*learner.losses, losses][-HISTORY_EPOCHS:]
    if cfg.ablate == "split":
        return probs, torch.ones_like(losses)
    clean_prob = clean_probability(torch.stack(learner.losses))
    if cfg.balance:
        classes = (probs * data.candidates).argmax(1)
        clean_prob = balance_classes(clean_prob, losses, classes)

    num_clean = (clean_prob > CLEAN_THRESHOLD).sum().item()
    tenth = max(2, len(data) // 10)
    if num_clean < min(cfg.batch_size, tenth):
        print(f"split: {num_clean} sets are clean; the {tenth} of lowest loss count as clean")
        clean_prob = torch.zeros_like(losses)
        clean_prob[losses.argsort()[:tenth]] = 1
    return probs, clean_prob

# (7) Co-pseudo-labeling, sharpening, mixup -------------------------------------------------
# The target of a clean sample is w times the partner's prediction within the set, plus 1 - w
# times the network's own over all classes. The target of an unlabeled sample is the mean of
# both networks. Mixup, its Beta(4,4) and the ramp are only in the published code.

MIXUP_ALPHA = 4.0
RAMP_EPOCHS = 16

def sharpen(probs, temperature):
    """Eq. 7: normalise(p^(1/temperature)), surer labels if that is below 1. [B,K] -> [B,K]."""
    return (probs.float().log() / temperature).softmax(1)

def refine_labels(own_probs, partner_probs, candidates, clean_prob, temperature):
    """Targets of clean samples, Eq. 6 and 7: sharpen(w r + (1-w) own). [B,K], w [B] -> [B,K].

    own: own_probs, the network's mean over both weak views. r: partner_probs within the set,
    normalised (Eq. 5). w: clean_prob, from the partner's split.
    """
    inside = partner_probs.float().clamp_min(1e-12) * candidates  # 1e-12: where all underflow
    r = inside / inside.sum(1, keepdim=True)
    w = clean_prob[:, None]
    return sharpen(w * r + (1 - w) * own_probs, temperature)

def guess_labels(probs, temperature):
    """Targets of unlabeled samples, Eq. 6 and 7: the sharpened mean. [V,B,K] -> [B,K]."""
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
    over classes (published code); the paper sums them.
    """
    loss_x = F.cross_entropy(logits_x.float(), targets_x.float())
    errors_u = (logits_u.float().softmax(1) - targets_u) ** 2
    return loss_x + weight_u * errors_u.sum() / max(1, errors_u.numel())

# (8) Prototype EMA alignment ---------------------------------------------------------------
# The prototype o_k of class k is a moving average of the embeddings of its clean images. The
# softmax of z . o / tau is a second classifier, which learns the same targets. Both networks
# share the prototypes, so that their embedding spaces are aligned, too.

PROTO_TEMPERATURE = 0.3  # tau, published code

def update_prototypes(prototypes, embeddings, classes, momentum):
    """Eq. 10: o_k <- m o_k + (1-m) z for each z of class k in turn; then norm 1 -> [K,D].

    prototypes [K,D], embeddings [B,D], classes int [B]. The n steps of a class make, at once,
    m^n o_k + sum of (1-m) m^j z, where j is how many z of the class come later.
    """
    belongs = F.one_hot(classes, len(prototypes)).float()  # [B,K]
    n = belongs.sum(0)  # [K]
    j = n - belongs.cumsum(0)  # [B,K]
    weights = belongs * (1 - momentum) * momentum**j
    kept = momentum ** n[:, None] * prototypes  # [K,D]
    return F.normalize(kept + weights.T @ embeddings.float())

def prototype_loss(similarity_x, targets_x, similarity_u, targets_u, weight_u):
    """Eq. 9: KL(y || q) on clean rows, (q - y)^2 on unlabeled ones, up to constants -> scalar.

    similarity: z . o [B,K] of mixed images; q = softmax(similarity / tau); targets [B,K]: the
    mixed ones, y = lam a + (1-lam) b. The published code has
        lam KL(a || q) + (1-lam) KL(b || q)   = cross-entropy(y, q) + a constant,
        lam (q - a)^2 + (1-lam) (q - b)^2     = (q - y)^2 + a constant.
    DIFFERS: without the constants, which have no gradient, this is Eq. 8 on similarity / tau.
    """
    logits_x = similarity_x / PROTO_TEMPERATURE
    logits_u = similarity_u / PROTO_TEMPERATURE
    return self_training_loss(logits_x, targets_x, logits_u, targets_u, weight_u)

# (9) MoCo queue, noisy supervised contrastive loss -----------------------------------------
# "Noisy Contrastive Learning". An anchor is the embedding of an image's first strong view. Its
# key is that of the second, by a slowly moving copy of the network. An anchor is contrasted
# with all anchors, keys and earlier keys (the queue). It is pulled to its own key, and to
# entries of its pseudo-class if both are clean; the others of its class are ignored.

CONTRASTIVE_TEMPERATURE = 0.07  # published code

class MomentumQueue:
    """The last `size` keys [n,D] with their classes int [n] and clean flags bool [n].

    DIFFERS: it starts empty; in the published code with random keys, classes and flags.
    """

    def __init__(self, size, dim, device="cpu"):
        self.size = size
        self.keys = torch.zeros(0, dim, device=device)
        self.classes = torch.zeros(0, dtype=torch.long, device=device)
        self.clean = torch.zeros(0, dtype=torch.bool, device=device)

    def push(self, keys, classes, clean):
        """Appends in new tensors: the backward pass still needs the old ones."""
        self.keys = torch.cat([self.keys, keys.detach().float()])[-self.size :]
        self.classes = torch.cat([self.classes, classes])[-self.size :]
        self.clean = torch.cat([self.clean, clean])[-self.size :]

def contrastive_masks(classes, clean, num_anchors):
    """Pseudo-classes int [M], clean flags bool [M] -> positives, ignored: bool [A,M] (Eq. 11).

    The M entries are the A anchors, their A own keys in the same order, and the queue.
    positives: same class and both clean, or the own key. ignored: same class, not positive.
    """
    same_class = classes[:num_anchors, None] == classes  # [A,M]
    both_clean = clean[:num_anchors, None] & clean  # [A,M]
    own_key = torch.zeros_like(same_class)
    own_key.diagonal(num_anchors).fill_(True)  # anchor i, entry A + i
    positives = (same_class & both_clean) | own_key
    return positives, same_class & ~positives

def supcon_loss(features, positives, ignored, temperature):
    """Eq. 11: mean over anchors of the mean over positives of -log softmax(. / temperature).

    features [M,D] of norm 1, the A anchors first; positives, ignored: bool [A,M]. An anchor is
    never contrasted with itself. DIFFERS: ignored entries are left out of a logsumexp in
    float32; the published code subtracts their sum, and the difference can fall below 0.
    """
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
# The prediction is the class with the largest sum of both networks' logits. Training sees no
# true labels, unless --flip makes the sets of them. Figures with * need the training images'.

@torch.inference_mode()
def predict(net, images, mean, std):
    """Images uint8 [N,C,H,H] -> logits [N,K], in eval mode. mean, std: of WeakStrongImages."""
    net.eval()
    batches = images.to(mean.device).split(512)
    return torch.cat([net((batch / 255 - mean) / std)[0] for batch in batches])

def accuracy(scores, labels):
    """Percentage of images whose label, int [N], has the largest score, [N,K]."""
    right = scores.argmax(1).cpu() == labels
    return 100 * right.float().mean().item()

def coverage(candidates, labels):
    """Percentage of candidate sets, bool [N,K], that hold the label, int [N]."""
    holds_label = candidates.cpu().gather(1, labels[:, None])
    return 100 * holds_label.float().mean().item()

def evaluate(learners, data, labels, test):
    """{name: percentage}. labels int [N]: of training; test: (images, labels) or None."""
    figures = {}
    if test:
        images, test_labels = test
        logits = [predict(learner.net, images, data.mean, data.std) for learner in learners]
        figures["test_acc_net1"] = accuracy(logits[0], test_labels)
        figures["test_acc_net2"] = accuracy(logits[1], test_labels)
        figures["test_acc"] = accuracy(sum(logits), test_labels)
    if learners[0].split and labels.min() >= 0:
        clean = [learner.split[1].cpu() > CLEAN_THRESHOLD for learner in learners]
        right = [coverage(data.candidates.cpu()[rows], labels[rows]) for rows in clean]
        figures["split_precision"] = sum(right) / 2  # clean sets that hold the true label
    return figures

# (11) Training -----------------------------------------------------------------------------
# After the warm-up, in every epoch, both networks split the data. Then network 1 trains on the
# split of network 2, and network 2 on that of network 1.

def endless_batches(rows, batch_size):
    """Batches without end, in a new order each round; of fewer than 2 rows, empty ones."""
    while True:
        batches = random_batches(rows, batch_size)
        if not batches:
            yield rows[:0]
        yield from batches

def co_train_epoch(learner, partner, prototypes, data, cfg, epoch):
    """A network learns for an epoch from the split of its partner -> means of the loss terms.

    prototypes [K,D] change in place. epoch: from 0, the warm-up counted.
    """
    # Published code: every epoch the key encoder starts again as a copy of the network.
    # DIFFERS: BatchNorm's running statistics are copied, too, as a copy should have them.
    learner.key_net.load_state_dict(learner.net.state_dict())
    partner.net.eval()
    learner.net.train()  # after eval(): with --ablate co-pl both are the same network
    learner.key_net.train()
    partner_probs, clean_prob = partner.split
    rows_x = (clean_prob > CLEAN_THRESHOLD).nonzero().flatten()
    rows_u = (clean_prob <= CLEAN_THRESHOLD).nonzero().flatten()
    if cfg.ablate == "unlabeled":
        rows_u = rows_u[:0]
    # Are Eq. 9-11 used yet? ">" and not ">=": published code. DIFFERS: until then they are not
    # computed, to save time, so prototypes and queue stay as they were.
    with_representation = epoch > cfg.warm_up + cfg.start_contrastive

    batches_x = random_batches(rows_x, cfg.batch_size)
    batches_u = endless_batches(rows_u, cfg.batch_size)
    steps = []
    for batch_x in tqdm(batches_x, "co-train", disable=None, leave=False):
        batch_u = next(batches_u)

        # Views: two weak and two strong ones of every image.
        rows = torch.cat([batch_x, batch_x, batch_u, batch_u])
        sizes = [len(batch_x), len(batch_x), len(batch_u), len(batch_u)]
        x_w1, x_w2, u_w1, u_w2 = data.weak(rows).split(sizes)
        x_s1, x_s2, u_s1, u_s2 = data.strong(rows).split(sizes)

        with torch.no_grad():
            # Labels of unlabeled samples: both networks on both weak views.
            targets_u = partner_probs[:0]
            if len(batch_u):
                partner_logits, _ = partner.net(torch.cat([u_w1, u_w2]))
                logits_u = [learner.net(u_w1)[0], learner.net(u_w2)[0]]
                logits_u += partner_logits.chunk(2)
                probs_u = torch.stack(logits_u).softmax(2)  # [V,B,K], V = 4
                targets_u = guess_labels(probs_u, cfg.temperature)

            # Labels of clean samples: the partner within the set, mixed with the network.
            logits_w1, embeddings_w1 = learner.net(x_w1)
            logits_w2, _ = learner.net(x_w2)
            own_probs = (logits_w1.softmax(1) + logits_w2.softmax(1)) / 2
            candidates_x = data.candidates[batch_x]
            targets_x = refine_labels(own_probs, partner_probs[batch_x], candidates_x,
                                      clean_prob[batch_x], cfg.temperature)

        # Mixup of all strong views; the first n rows count as clean, whatever is mixed in.
        n = 2 * len(batch_x)
        lam, permutation = draw_mixup(len(rows))
        if cfg.ablate == "mixup":
            lam = 1.0
        targets = torch.cat([targets_x, targets_x, targets_u, targets_u])
        targets = mixup(targets, lam, permutation)  # [2 B_x + 2 B_u, K]
        images = mixup(torch.cat([x_s1, x_s2, u_s1, u_s2]), lam, permutation)

        # Self-training, Eq. 8.
        logits, embeddings = learner.net(images)
        weight_u = cfg.lambda_u * ramp_up(epoch + len(steps) / len(batches_x), cfg.warm_up)
        loss = self_training_loss(logits[:n], targets[:n], logits[n:], targets[n:], weight_u)
        terms = {"self": loss}

        # Prototypes: weak views move them (Eq. 10), mixed images learn them (Eq. 9; no ramp).
        if with_representation and cfg.ablate != "prototype":
            classes_x = targets_x.argmax(1)
            moved = update_prototypes(prototypes, embeddings_w1, classes_x, cfg.momentum)
            prototypes.copy_(moved)
            similarity = embeddings @ prototypes.T
            proto_loss = prototype_loss(similarity[:n], targets[:n],
                                        similarity[n:], targets[n:], cfg.lambda_u)
            terms["prototype"] = cfg.proto_weight * proto_loss

        # Contrast, Eq. 11: queries of the first strong views, keys of the second, not mixed.
        if with_representation:
            _, queries = learner.net(torch.cat([x_s1, u_s1]))
            with torch.no_grad():
                weights = zip(learner.key_net.parameters(), learner.net.parameters())
                for key_weight, weight in weights:
                    key_weight.mul_(cfg.momentum).add_(weight, alpha=1 - cfg.momentum)
                _, keys = learner.key_net(torch.cat([x_s2, u_s2]))
            classes = torch.cat([targets_x, targets_u]).argmax(1)
            clean = torch.arange(len(classes), device=rows.device) < len(batch_x)
            if cfg.ablate == "supcon":
                clean[:] = True
            queue = learner.queue
            # The M entries: the anchors, their own keys, the queue.
            all_classes = torch.cat([classes, classes, queue.classes])  # [M]
            all_clean = torch.cat([clean, clean, queue.clean])  # [M]
            features = torch.cat([queries, keys, queue.keys])  # [M,D]
            positives, ignored = contrastive_masks(all_classes, all_clean, len(queries))
            contrast = supcon_loss(features, positives, ignored, CONTRASTIVE_TEMPERATURE)
            terms["contrastive"] = cfg.contrastive_weight * contrast
            queue.push(keys, classes, clean)

        steps.append(learner.step(terms))
    return mean_terms(steps)

def cosine_lr(epoch, lr, period):
    """Half a cosine from lr to lr/1000 at `period` epochs, where it stays (published code)."""
    low = lr / 1000
    return low + (lr - low) * (1 + math.cos(math.pi * min(epoch / period, 1))) / 2

def train(learner_1, learner_2, prototypes, data, cfg, records, measure, save):
    """Trains for the epochs that are left; each appends a record and calls save().

    measure() -> the figures of evaluate(); save() writes the checkpoint.
    """
    partner_1, partner_2 = learner_2, learner_1
    if cfg.ablate == "co-pl":
        partner_1, partner_2 = learner_1, learner_2
    print("epoch    phase    loss clean seconds  (test %; clean sets right*, %)")
    for epoch in range(len(records), cfg.epochs):
        start = time.time()
        lr = cosine_lr(epoch, cfg.lr, cfg.lr_period or cfg.epochs)
        for learner in (learner_1, learner_2):
            learner.optimizer.param_groups[0]["lr"] = lr

        record = {"epoch": epoch + 1, "phase": "warm-up", "lr": lr, "clean": 0}
        if epoch < cfg.warm_up:
            terms_1 = warm_up_epoch(learner_1, data, cfg)
            terms_2 = warm_up_epoch(learner_2, data, cfg)
        else:
            learner_1.split = split_data(learner_1, data, cfg)
            learner_2.split = split_data(learner_2, data, cfg)
            clean_probs = torch.stack([learner_1.split[1], learner_2.split[1]])  # [2,N]
            record["clean"] = (clean_probs > CLEAN_THRESHOLD).sum().item() / 2
            record["phase"] = "co-train"
            terms_1 = co_train_epoch(learner_1, partner_1, prototypes, data, cfg, epoch)
            terms_2 = co_train_epoch(learner_2, partner_2, prototypes, data, cfg, epoch)

        terms = {name: (terms_1[name] + terms_2[name]) / 2 for name in terms_1}
        weights = [*learner_1.net.parameters(), *learner_2.net.parameters()]
        finite = all(weight.isfinite().all() for weight in weights)
        if not finite or not math.isfinite(sum(terms.values())):
            raise UserError(f"epoch {epoch + 1}: {terms} or weights not finite: lower --lr")
        record.update(terms, loss=sum(terms.values()), **measure())
        record["seconds"] = time.time() - start
        records.append(record)
        save()
        line = "{epoch:5} {phase:>8} {loss:7.4f} {clean:5.0f} {seconds:7.1f}"
        line = line.format(**record)
        for name in ("test_acc", "split_precision"):
            line += f" {record[name]:5.1f}" if name in record else " " * 6
        print(line.rstrip(), flush=True)

# (12) The run: files, command line ---------------------------------------------------------
# A run's folder holds config.json (its settings), annotations.npz (P and what it was made of),
# metrics.jsonl (a record of every epoch) and checkpoint.pt (all that training goes on with).

def pick_device(cfg):
    """Settings -> torch.device, and whether convolutions are to compute in bfloat16."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: expected one that is here: {error}") from error
    if cfg.precision != "auto":
        return device, cfg.precision == "bf16"
    if device.type == "cuda":
        return device, torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):  # Older versions of torch do not tell.
        return device, torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device, False

def write_whole(path, content):
    """Writes bytes to PATH.tmp and renames it, so that PATH is never half written."""
    try:
        neighbour = Path(f"{path}.tmp")
        neighbour.write_bytes(content)
        neighbour.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written, and is as before: {error}") from error

def restore(learners, folder, device):
    """Puts a run's checkpoint into both learners -> the whole checkpoint, a dict."""
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", device, weights_only=True)
        for learner, state in zip(learners, checkpoint["learners"]):
            learner.load_state(state)
        return checkpoint
    except Exception as error:  # A damaged file makes torch raise nearly any kind of error.
        raise UserError(f"{folder}/checkpoint.pt: expected one that is whole and fits the"
                        f" settings, got {type(error).__name__}") from error

def run(cfg):
    """Data -> annotation -> training -> the files of the run."""
    device, bf16 = pick_device(cfg)
    name = time.strftime(f"runs/{cfg.dataset}-seed{cfg.seed}-%Y%m%d-%H%M%S")
    folder = Path(cfg.resume or cfg.output_dir or name)
    config_path = folder / "config.json"
    annotations_path = folder / "annotations.npz"
    if config_path.exists() and not cfg.resume:
        raise UserError(f"{folder} holds a run: expected another --output-dir, or --resume")

    # Data and candidate sets.
    pairs, test_pairs, cfg.class_names = read_dataset(cfg)
    settings = json.dumps(dict(vars(cfg), resume=None, output_dir=None), indent=1)
    # A resumed run reads its own annotations; config.json keeps the name that the user gave.
    if annotations_path.exists() and cfg.resume:
        cfg.annotations = str(annotations_path)
    images, labels = read_images(pairs, cfg)
    if len(images) < 2:
        raise UserError(f"--data-dir {cfg.data_dir}: expected two images that can be read")
    test = read_images(test_pairs, cfg) if len(test_pairs) else None
    num_test = len(test[1]) if test else 0
    print(f"{cfg.dataset}: {len(images)} training, {num_test} test images, on {device}")
    print(f"{len(cfg.class_names)} classes: {', '.join(cfg.class_names)}")
    print(f"results go to {folder}")
    probs = make_probs(cfg, pairs, images, labels, device)
    candidates = candidate_sets(probs, cfg.candidates)
    print(f"candidate sets: {candidates.sum(1).float().mean():.2f} labels on average")
    if labels.min() >= 0:
        print(f"sets without the true label*: {100 - coverage(candidates, labels):.2f} %")
    if labels.min() >= 0 and not cfg.flip:
        clip_acc = accuracy(probs.float().mean(0), labels)
        print(f"the annotator, the mean of its templates, is right in*: {clip_acc:.2f} %")

    # The state of training, new or from the checkpoint.
    torch.manual_seed(cfg.seed)
    data = WeakStrongImages(images.to(device), candidates.to(device), cfg)
    learners = [Learner(len(cfg.class_names), cfg, device, bf16) for _ in range(2)]
    prototypes = torch.zeros(len(cfg.class_names), EMBEDDING_DIM, device=device)
    records = []
    if cfg.resume and (folder / "checkpoint.pt").exists():
        checkpoint = restore(learners, folder, device)
        prototypes = checkpoint["prototypes"]
        records = checkpoint["records"]
        torch.set_rng_state(checkpoint["random_state"].cpu())

    # The folder is claimed only now, so that a mistake found before leaves nothing behind.
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.resume:
        write_whole(config_path, settings.encode())
    else:
        with open(config_path, "x") as file:  # fails if another run has claimed it meanwhile
            file.write(settings)
    if not (cfg.resume and annotations_path.exists()):
        content = io.BytesIO()
        checksum = zlib.crc32(images.numpy())
        np.savez(content, probs=probs, classes=cfg.class_names, images=checksum)
        write_whole(annotations_path, content.getbuffer())

    def save():
        lines = [json.dumps(record) + "\n" for record in records]
        write_whole(folder / "metrics.jsonl", "".join(lines).encode())
        checkpoint = dict(learners=[learner.state() for learner in learners],
                          mean=data.mean, std=data.std, prototypes=prototypes,
                          records=records, random_state=torch.get_rng_state())
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(folder / "checkpoint.pt", content.getbuffer())

    if len(records) >= cfg.epochs:
        print(f"this run is finished; --epochs above {len(records)} would go on with it")
    else:
        train(*learners, prototypes, data, cfg, records,
              lambda: evaluate(learners, data, labels, test), save)
    result = "finished"
    if "test_acc" in records[-1]:
        result = f"{records[-1]['test_acc']:.1f} % of test images right"
    print(f"result after epoch {len(records)}: {result}, files in {folder}")

def load_classifier(folder, device="cpu"):
    """A run's folder -> class names, function: list of 8-bit PIL images -> probs [n,K]."""
    cfg = parse(["--resume", str(folder)])
    learners = [Learner(len(cfg.class_names), cfg, device) for _ in range(2)]
    checkpoint = restore(learners, Path(folder), device)

    def classify(images):
        images = [to_rgb(image) for image in images]
        if cfg.dataset == "folder":
            images = [centre_square(image) for image in images]
        pixels = torch.stack([to_pixels(image, cfg) for image in images])  # [n,C,H,H]
        mean, std = checkpoint["mean"], checkpoint["std"]
        logits = [predict(learner.net, pixels, mean, std) for learner in learners]
        return torch.stack(logits).mean(0).softmax(1)

    return cfg.class_names, classify

def main(argv=None):
    """Command line -> exit code: 0, 2 (the user can mend it), 130 (Ctrl-C); or SystemExit."""
    try:
        run(parse(argv))
        return 0
    except KeyboardInterrupt:
        text = "coreg.py: interrupted; --resume goes on with a run that has begun to train"
        print(text, file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print("coreg.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2

# (13) Appendix: TinyCLIP -------------------------------------------------------------------
# The annotator of the digits has CLIP's interface and learns nothing: its text encoder draws
# the prompt in a style, and a feature is the 64 pixels of a drawing or an image, centred and
# of norm 1. It errs, and its templates disagree. Styles and numbers were chosen with true
# labels, so that the sets are neither right nor useless.

class TinyCLIP:
    """What annotate() needs of a CLIP, without weights; it always normalizes."""

    logit_scale = torch.tensor(20.0).log()

    def encode_image(self, images, normalize):
        pixels = images.flatten(1)  # [B,64]
        return F.normalize(pixels - pixels.mean(1, keepdim=True))

    encode_text = encode_image  # The "tokens" of a prompt are its drawing.

    @staticmethod
    def preprocess(image):
        return TF.pil_to_tensor(image.convert("L").resize((8, 8))) / 255

    @staticmethod
    def tokenize(prompts):
        return torch.stack([TinyCLIP.preprocess(draw(prompt)) for prompt in prompts])

def draw(prompt):
    """A prompt such as 'a wide number six' -> PIL image, 8 x 8 pixels."""
    words = prompt.split()
    if words[-1] not in DIGITS:
        raise UserError(f"--clip-model tiny: expected 'a wide number six', got {prompt!r}")
    font = ImageFont.load_default_imagefont()  # made of few pixels
    if "printed" in words:
        font = ImageFont.load_default(30)  # made of outlines
    width = 16 if "narrow" in words else 30 if "wide" in words else 20
    degrees = -15.0 if "slanted" in words else 0.0
    image = Image.new("L", (64, 64))
    digit = str(DIGITS.index(words[-1]))
    ImageDraw.Draw(image).text((20, 12), digit, 255, font, stroke_width=1)
    image = image.crop(image.getbbox()).resize((width, 40))
    image = TF.affine(TF.center_crop(image, 64), 0, [0, 0], 1.0, [degrees, 0.0])
    return ImageOps.pad(image.crop(image.getbbox()), (8, 8), Image.Resampling.BOX)

if __name__ == "__main__":
    sys.exit(main())
